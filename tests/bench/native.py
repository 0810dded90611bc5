# SPDX-License-Identifier: GPL-2.0-or-later
"""What both ways into RAM copy, at this host's own speed, without a VM.

Each way has name spaces of its own and, in RAM, the files of the machine's initramfs as its /: the
tools and the boot scripts are those of a boot. Ours is `make_root` without the layer (the host may
have no device-mapper) and without asking whether the image is stale; the guide's is its script. The
root that they copy is an ext4 file on a loop device, and no cache holds any of it when they begin.
Needs root, and zram.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench import guide
from vm import build

ALGORITHM = "lz4"  # ours chooses it; the kernel's default, which the guide takes, may be another
WAY_S = 900
TIMES = 3
MIB = 1 << 20
HOT_ADD = Path("/sys/class/zram-control/hot_add")
IMAGES = "var/lib/ramboot/image"

# A shell in name spaces of its own. $1: where the initramfs is to lie; $2: its archive; $3: files
# over it; $4: what to run in it.
_ENTER = """\
mount -t tmpfs -o mode=0755 initramfs "$1"
zstd -dcq "$2" | (cd "$1" && cpio -id --quiet)
cp -R "$3/." "$1"
for part in dev sys; do mount --bind "/$part" "$1/$part"; done
mount -t proc proc "$1/proc"
# the host's log and console are not for this
for quiet in kmsg console; do mount --bind /dev/null "$1/dev/$quiet"; done
mount --bind "$1/osrelease" "$1/proc/sys/kernel/osrelease"
sync
echo 3 > /proc/sys/vm/drop_caches
exec chroot "$1" /usr/bin/bash "$4"
"""
_SHMEM = "awk '/^Shmem:/ { print $2 * 1024 }' /proc/meminfo"
# The last line on stdout: what tmpfs took. Before it ours has the phases of the boot, the guide's
# its script's trace.
_OURS = f"""\
sed '/^case /,$d' /usr/bin/ramboot-initramfs > /functions
sed -i 's/^zram_algorithm=.*/zram_algorithm={ALGORITHM}/' /etc/ramboot/ramboot.conf
set -- # dracut's functions look at them
set -o posix
. /functions
layer_up() {{ :; }}
layer_healthy() {{ :; }}
image_choose() {{ :; }}
ST_BACKEND=$backend ST_DISK=attached LAYER_ZRAM=
ROOT_KIND=device ROOT_SPEC=$device SOURCE_DISK=$device SOURCE_ROOT=$device
before=$({_SHMEM})
read_config && make_root && phase end || {{
    printf '%s\\n' "$reason" >&2
    exit 1
}}
rm -rf "$RUN/work"
cat "$RUN/seconds"
echo $(($({_SHMEM}) - before))
"""
_GUIDE = f"""\
if grep -q zram0 /usr/bin/tmpfs; then
    number=$(cat {HOT_ADD})
    echo {ALGORITHM} > "/sys/block/zram$number/comp_algorithm"
    sed -i "s/zram0/zram$number/" /usr/bin/tmpfs
fi
before=$({_SHMEM})
echo y | bash /usr/bin/bench-traced > /log 2> /trace
sync
cat /log /trace
echo $(($({_SHMEM}) - before))
"""


@dataclass(frozen=True)
class Took:
    """What one way took."""

    seconds: float
    ram_bytes: int


def require_host() -> None:
    """Raises when this host can't measure."""
    if os.geteuid() != 0:
        raise RuntimeError("the native measure mounts file systems, which needs root")
    if not HOT_ADD.exists() and shutil.which("modprobe"):
        subprocess.run(["modprobe", "-q", "zram"], check=False)
    if not HOT_ADD.exists():
        raise RuntimeError(f"the native measure needs zram, which this kernel lacks: no {HOT_ADD}")


def machine_root(target: Path) -> Path:
    """The test machine's root as it lies on its disk, /boot being elsewhere, in the file target."""
    _run("cp", "--sparse=always", build.root().image, target)
    with mounted(target) as top:
        for path in (top / "boot").iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return target


def add_image(root: Path) -> None:
    """The image of that root into it, as the formula builds it. The guide would copy it along."""
    known = yaml.safe_load((build.REPOSITORY / "ramboot/defaults.yaml").read_text(encoding="utf-8"))
    settings = known["ramboot"]
    with mounted(root) as top:
        directory = top / IMAGES
        directory.mkdir(parents=True)
        file = directory / "root-native.squashfs"
        patterns = [f"/{IMAGES}", *settings["copy"]["exclude"]]
        excluded = [path for pattern in patterns for path in glob.glob(f"{top}{pattern}")]
        level, block_kib = settings["image"]["level"], settings["image"]["block_kib"]
        how = ["-comp", "zstd", "-Xcompression-level", level, "-b", f"{block_kib}K"]
        _run("mksquashfs", top, file, *how, "-noappend", "-no-progress", "-e", *excluded)
        text = manifest(file, known["image_build"]["chunk_mib"], _kernel(top))
        (directory / "manifest").write_text(text, encoding="ascii")


def manifest(file: Path, chunk_mib: int, kernel: str) -> str:
    """What the boot reads of an image, but for the state of the root, which is not looked at."""
    none = "0" * 64
    chunks = []
    with file.open("rb") as stream:
        while data := stream.read(chunk_mib * MIB):
            chunks.append(hashlib.sha256(data).hexdigest())
    found: dict[str, Any] = {
        "version": 1,
        "file": file.name,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernels": kernel,
        **dict.fromkeys(("sha256", "packages", "configuration", "programs", "qubes"), none),
        "bytes": file.stat().st_size,
        "chunk_mib": chunk_mib,
    }
    lines = [f"{key}={value}" for key, value in found.items()]
    return "\n".join([*lines, *(f"chunk={sha256}" for sha256 in chunks)]) + "\n"


def ours(root: Path, backend: str) -> Took:
    """Our copy, proven. It leaves changes in the root, as it does in the layer: `zram` the most."""
    with _loop(root) as device:
        script = f"backend={backend} device={device}\n{_OURS}"
        said, ram_bytes = _way(root, {"way": script})
    return Took(copy_seconds(said), ram_bytes)


def guides(root: Path, backend: str) -> Took:
    """The guide's copy."""
    files = guide.files(backend, "y") | {"way": _GUIDE}
    with _loop(root) as device:
        script = files["usr/bin/tmpfs"].replace("/dev/mapper/qubes_dom0-root", device)
        said, ram_bytes = _way(root, files | {"usr/bin/tmpfs": script})
    return Took(guide.copy_seconds(said), ram_bytes)


def typical(way: Callable[[Path, str], Took], root: Path, backend: str) -> Took:
    """The median of `ours` or `guides`, run some times."""
    took = sorted((way(root, backend) for _ in range(TIMES)), key=lambda one: one.seconds)
    return took[TIMES // 2]


def copy_seconds(phases: str) -> float:
    """The phases copy and prove, or overlay, which copies nothing, of lines "NAME HUNDREDTHS"."""
    took = dict(line.split() for line in phases.splitlines())
    of = ("overlay",) if "overlay" in took else ("copy", "prove")
    return sum(int(took[name]) for name in of) / 100


def _way(root: Path, files: dict[str, str]) -> tuple[str, int]:
    """Run /way in an initramfs with these files: what it said, and the RAM that it came to hold."""
    with tempfile.TemporaryDirectory(prefix="ramboot-native-") as work, zram_removed() as added:
        place, over = Path(work) / "initramfs", Path(work) / "over"
        place.mkdir()
        with mounted(root) as top:
            files |= {"osrelease": _kernel(top) + "\n"}
        for name, text in files.items():
            (over / name).parent.mkdir(parents=True, exist_ok=True)
            (over / name).write_text(text, encoding="utf-8")
        enter = ["sh", "-ec", _ENTER, "sh", place, build.initramfs(), over, "/way"]
        spaces = ["unshare", "--mount", "--propagation", "private"]
        # all that it started ends with it
        spaces += ["--pid", "--fork", "--kill-child"]
        said = _run(*spaces, *enter, limit_s=WAY_S)
        *lines, tmpfs_bytes = said.splitlines()
        # the unmounting wrote all of it
        zram_bytes = sum(_mem_used(path) for path in added())
    return "\n".join(lines), int(tmpfs_bytes) + zram_bytes


def _mem_used(zram: Path) -> int:
    return int((zram / "mm_stat").read_text(encoding="ascii").split()[2])


@contextlib.contextmanager
def zram_removed() -> Iterator[Any]:
    """The zram devices that came up meanwhile (yields what lists them) are removed at the end."""
    before = set(Path("/sys/block").glob("zram*"))

    def added() -> list[Path]:
        return sorted(set(Path("/sys/block").glob("zram*")) - before)

    try:
        yield added
    finally:
        for path in added():
            number = path.name.removeprefix("zram")
            for _ in range(50):  # it may take a moment until nothing holds it
                with contextlib.suppress(OSError):
                    (path / "reset").write_text("1", encoding="ascii")
                    HOT_ADD.with_name("hot_remove").write_text(number, encoding="ascii")
                    break
                time.sleep(0.2)
            else:
                raise RuntimeError(f"{path.name} could not be removed")


@contextlib.contextmanager
def mounted(image: Path) -> Iterator[Path]:
    """The file system in a file."""
    with tempfile.TemporaryDirectory(prefix="ramboot-native-") as top:
        _run("mount", "-o", "loop", image, top)
        try:
            yield Path(top)
        finally:
            _run("umount", top)


@contextlib.contextmanager
def _loop(image: Path) -> Iterator[str]:
    device = _run("losetup", "--find", "--show", image).strip()
    try:
        yield device
    finally:
        _run("losetup", "--detach", device)


def _kernel(top: Path) -> str:
    return next((top / "usr/lib/modules").iterdir()).name


def _run(*command: object, limit_s: float | None = None) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{words[0]} failed ({done.returncode}): {done.stderr or done.stdout}")
    return done.stdout
