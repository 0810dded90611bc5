# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine's disks, each made once and kept under a hash of all that it is made from.

    root      a Debian with Xen, GRUB, dracut, plymouth, LUKS, LVM and Salt, made on the host
    base      that root installed on a disk in one of the layouts of guest/install
    applied   base after real Salt applied the formula of the working tree in it
    image     base with an image of its root (test_image.py)

By hand: `sudo python3 tests/vm/build.py [LAYOUT...]` makes and names the base disks, with
`--applied` the other as well.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import gzip
import hashlib
import inspect
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import jinja2
import yaml

if __package__ in (None, ""):  # started by hand
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vm import cpio, phases, toolbox
from vm.console import repeated
from vm.disk import LAYOUTS, PASSPHRASE, ROOT_OFFSET_MIB, Disk, run
from vm.toolbox import GUEST

SALT = "salt==3008.3"
RELEASE = "4.3"  # the Qubes release whose dom0 the machine resembles
SUITES = {"4.3": "trixie", "4.2": "bookworm"}
SUITE = SUITES[RELEASE]
DEBIAN = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
ROOT_SIZE = "4G"  # as big as the volume that it is copied to
DISK_SIZE = "8G"
REPOSITORY = Path(__file__).resolve().parents[2]
# Prints all that the formula may touch: mode, owner, name and target, then hashes; grubenv is the
# running system's own.
TOUCHED = (
    "cd / && files=$({"
    " find boot etc/default etc/fstab etc/dracut.conf.d etc/grub.d etc/profile.d etc/systemd"
    " -xdev ! -name grubenv; find etc/ramboot usr var/lib -xdev -path '*ramboot*'; } 2>/dev/null"
    " | sort -u) && stat -c '%A %u %g %N' $files && find $files -maxdepth 0 -type f"
    " -exec sha256sum {} +"
)
# Every backend in the menu; for the rest the defaults.
PILLAR = "ramboot: {grub: {entries: [zram, tmpfs, overlay, snapshot]}}\n"
# What dom0 gets: the same set as a Salt formula's package.
FORMULA_PARTS = ("FORMULA", "ramboot", "_modules", "_states", "pillar.example")


def cache_dir() -> Path:
    """Where the disks are kept: RAMBOOT_VM_CACHE, or ramboot-vm in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ramboot-vm"
    path = Path(os.environ.get("RAMBOOT_VM_CACHE") or default)
    path.mkdir(parents=True, exist_ok=True)
    return path


def files_below(*parts: Path) -> list[Path]:
    """All files of the given files and directories in a fixed order, without what Python and
    editors leave.
    """
    found: list[Path] = []
    for part in parts:
        found += [part] if part.is_file() else [p for p in part.rglob("*") if p.is_file()]
    return sorted(
        p for p in set(found) if "__pycache__" not in p.parts and p.suffix not in {".pyc", ".swp"}
    )


def fingerprint(*parts: Path, extra: str = "") -> str:
    """A short hash over names, modes and contents."""
    total = hashlib.sha256(extra.encode())
    for path in files_below(*parts):
        name = path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path.name
        total.update(
            f"{name}\0{path.stat().st_mode & 0o111:o}\0".encode() + path.read_bytes() + b"\0"
        )
    return total.hexdigest()[:16]


def code_of(*functions: Callable[..., object]) -> str:
    """What these functions do, as `extra` of a fingerprint: their code without its comments and
    layout.
    """
    sources = (textwrap.dedent(inspect.getsource(function)) for function in functions)
    return "\n".join(ast.dump(ast.parse(source)) for source in sources)


@contextlib.contextmanager
def _made_once(target: Path, uses: Path | None = None) -> Iterator[Path | None]:
    """Yield a place to build in, to be renamed to `target`; None when it is there already. One
    builder at a time of the same target, or of all that change `uses` to build theirs.
    """
    busy = uses or target
    with (busy.parent / f".{busy.name}.lock").open("w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            yield None
            return
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as tmp:
            place = Path(tmp) / "new"
            yield place
            place.rename(target)


def _apt_options() -> list[str]:
    """The host's way through a proxy, if it has one; used for this build, not kept in the root."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    lines = [
        ln
        for ln in dump.splitlines()
        if ln.lower().startswith(("acquire::http::proxy ", "acquire::https::proxy "))
    ]
    return [f"--aptopt={line}" for line in lines]


def _mirror() -> str:
    """The Debian mirror that the host itself uses."""
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    uris = [
        line.split(" ", 1)[1].strip() for line in listing.splitlines() if line.startswith("Debian ")
    ]
    return uris[0] if uris else DEBIAN


def _debian(directory: Path, packages: Path, suite: str) -> None:
    lines = packages.read_text(encoding="ascii").splitlines()
    names = [line for line in lines if line and line[0] != "#"]
    subprocess.run(
        [
            *("mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(names)}"),
            *(f"--keyring={KEYRING}", '--aptopt=APT::Install-Recommends "false"'),
            *_apt_options(),
            *(
                f"--dpkgopt=path-exclude=/usr/share/{name}/*"
                for name in ("man", "doc", "locale", "info")
            ),
            *(suite, str(directory), _mirror()),
        ],
        check=True,
    )
    (directory / "etc/apt/apt.conf.d/99mmdebstrap").unlink(missing_ok=True)


def _salt(directory: Path) -> None:
    """Salt from PyPI into the root's own Python; its needs are the distribution's packages."""
    python = next(p.name for p in (directory / "usr/lib").glob("python3.*"))
    target = directory / "usr/local/lib" / python / "dist-packages"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(prefix="ramboot-vm-") as tmp:
        subprocess.run([*pip, "wheel", "--no-deps", SALT, "-w", tmp], check=True)
        wheel = next(Path(tmp).glob("salt-*.whl"))
        install = [
            "install",
            "--no-deps",
            "--no-compile",
            "--root-user-action=ignore",
            "--target",
            str(target),
        ]
        subprocess.run([*pip, *install, str(wheel)], check=True)
    for name in ("bin", "share"):
        shutil.rmtree(target / name, ignore_errors=True)


def _in_chroot(directory: Path, script: Path, *arguments: str) -> None:
    """Run `script` in the root; the mounts end with the name space that it runs in."""
    copy = directory / "root/provision"
    shutil.copy(script, copy)
    steps = (
        'for d in proc sys dev; do mount --bind "/$d" "$1/$d"; done; '
        'mount -t tmpfs tmpfs "$1/run"; '
        'mkdir -p "$1/run/udev"; exec chroot "$@"'
    )
    subprocess.run(
        [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-ec",
            steps,
            "sh",
            *(str(directory), "/bin/sh", "/root/provision", *arguments),
        ],
        check=True,
    )
    copy.unlink()


def root() -> toolbox.Root:
    """The root file system as one ext4 image, with its kernel and initramfs beside it."""
    parts = [GUEST / name for name in ("packages", "provision", "root")]
    made_by = code_of(root, _debian, _salt, _in_chroot)
    target = cache_dir() / f"root-{fingerprint(*parts, extra=SALT + SUITE + ROOT_SIZE + made_by)}"
    with _made_once(target) as place:
        if place is not None:
            place.mkdir()
            tree = place / "tree"
            with phases.phase("build: Debian packages"):
                _debian(tree, GUEST / "packages", SUITE)
            with phases.phase("build: Salt, initramfs, image"):
                _salt(tree)
                shutil.copytree(GUEST / "root", tree, dirs_exist_ok=True)
                _in_chroot(tree, GUEST / "provision")
                for name, prefix in (("kernel", "vmlinuz-"), ("initrd", "initrd.img-")):
                    shutil.copy(next((tree / "boot").glob(prefix + "*")), place / name)
                shutil.copy(tree / "usr/sbin/switch_root", place / "switch_root")
                subprocess.run(
                    [
                        "mkfs.ext4",
                        "-q",
                        "-L",
                        "root",
                        "-d",
                        str(tree),
                        str(place / "root.img"),
                        ROOT_SIZE,
                    ],
                    check=True,
                )
                shutil.rmtree(tree)
    return toolbox.Root(
        target / "root.img", target / "kernel", target / "initrd", target / "switch_root"
    )


def sector_of(path: str) -> int:
    """Where on a disk with the layout ext4, on which the root lies block by block, a file of it
    begins.
    """
    blocks = run("debugfs", "-R", f"blocks {path}", root().image).stdout.split()
    return (ROOT_OFFSET_MIB << 11) + int(blocks[0]) * 8


def tree(release: str = RELEASE) -> Path:
    """The files, on the host, that an initramfs for this Qubes release is made from: those of the
    root, or an older Debian's.
    """
    if release == RELEASE:
        image = root().image
        target = image.parent / "tree"
    else:
        packages = GUEST / f"packages-initramfs-r{release}"
        key = fingerprint(packages, extra=SUITES[release] + code_of(_debian))
        target = cache_dir() / f"tree-r{release}-{key}"
    with _made_once(target) as place:
        if place is not None:
            with phases.phase(f"build: files for R{release}"):
                if release == RELEASE:
                    place.mkdir()
                    run("debugfs", "-R", f"rdump / {place}", image)
                else:
                    _debian(place, packages, SUITES[release])
    return target


def kernel(release: str = RELEASE) -> Path:
    """The kernel that `initramfs` of this release belongs to."""
    return next((tree(release) / "boot").glob("vmlinuz-*"))


def xen_tools() -> Path:
    """What the root lacks of the packages that start a Xen guest: a directory with usr and etc."""
    packages = GUEST / "packages-xen"
    have = tree()
    key = fingerprint(packages, extra=have.parent.name + code_of(xen_tools))
    target = cache_dir() / f"xen-tools-{key}"
    with _made_once(target) as place:
        if place is not None:
            lines = packages.read_text(encoding="ascii").splitlines()
            names = [line for line in lines if line and line[0] != "#"]
            all_of_them = place.with_name("all")
            with phases.phase("build: Xen's tools"):
                run(
                    *("mmdebstrap", "--quiet", "--variant=extract"),
                    *(f"--include={','.join(names)}", f"--keyring={KEYRING}"),
                    *('--aptopt=APT::Install-Recommends "false"', *_apt_options()),
                    *(SUITE, all_of_them, _mirror()),
                )
            place.mkdir()
            for part in ("usr/bin", "usr/sbin", "usr/lib", "etc/xen"):
                for path in (all_of_them / part).rglob("*"):
                    inside = path.relative_to(all_of_them)
                    if (path.is_symlink() or path.is_file()) and not os.path.lexists(have / inside):
                        (place / inside).parent.mkdir(parents=True, exist_ok=True)
                        path.rename(place / inside)
    return target


def initramfs(
    *options: str,
    release: str = RELEASE,
    settings: dict[str, object] | None = None,
    **boot: object,
) -> Path:
    """An initramfs with the working tree's dracut module for any layout, built on the host, where
    dracut is quick. `options` are dracut's; `boot` overrides the pillar's `ramboot:boot` and
    `settings` its other keys.
    """
    module = REPOSITORY / "ramboot/initramfs/files/50ramboot"
    text = configuration(boot, **settings or {}) + "\n"
    directory = tree(release)
    made_by = code_of(initramfs, _in_chroot)
    made_from = [text, *options, directory.parent.name, directory.name, made_by]
    key = fingerprint(module, GUEST / "initramfs", extra="\n".join(made_from))
    target = cache_dir() / f"initramfs-{key}.img"
    with _made_once(target, uses=directory) as place:
        if place is not None:
            inside = directory / "usr/lib/dracut/modules.d/50ramboot"
            shutil.rmtree(inside, ignore_errors=True)
            shutil.copytree(module, inside)
            (directory / "etc/ramboot").mkdir(exist_ok=True)
            (directory / "etc/ramboot/ramboot.conf").write_text(text, encoding="utf-8")
            with phases.phase("build: initramfs on the host"):
                _in_chroot(directory, GUEST / "initramfs", *options)
            shutil.move(directory / "root/initramfs.img", place)
    return target


def changed_script(part: str, point: str, instead: str) -> dict[str, str]:
    """Laid over an initramfs: a boot script with `instead` where its text `point` stood."""
    text = (REPOSITORY / "ramboot/initramfs/files/50ramboot" / part).read_text(encoding="utf-8")
    assert text.count(point) == 1
    program = part == "ramboot-initramfs.sh"
    place = "usr/bin/ramboot-initramfs" if program else f"usr/lib/ramboot/{part}"
    return {place: text.replace(point, instead)}


def with_fault(part: str, point: str) -> dict[str, str]:
    """Laid over an initramfs: a boot script that fails where its line `point` was to run."""
    return changed_script(part, point, f"    reason='injected fault'\n    return 1\n{point}")


def configuration(boot: dict[str, object] | None = None, **settings: object) -> str:
    """The configuration that Salt renders: the defaults, with `boot` over the pillar's
    `ramboot:boot` and `settings` over its other keys.
    """
    defaults = yaml.safe_load((REPOSITORY / "ramboot/defaults.yaml").read_text(encoding="utf-8"))
    found = defaults["ramboot"] | settings
    found["boot"] |= boot or {}
    template = (REPOSITORY / "ramboot/initramfs/files/ramboot.conf.j2").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=False).from_string(template).render(settings=found)


def asking_for(backend: str, **boot: object) -> dict[str, str]:
    """Laid over an initramfs: the configuration that asks, without a time limit, for `backend`."""
    text = configuration({"backend": backend, "timeout_s": 0, **boot})
    return {"etc/ramboot/ramboot.conf": text + "\n"}


def base(layout: str = "luks-thin") -> Disk:
    """A disk with that root, laid out as `layout` says."""
    if layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    made = root()
    scripts = [GUEST / name for name in ("install", "lib", "toolbox-init", "toolbox-main")]
    made_by = code_of(base, toolbox.run, toolbox.drive, cpio.laid_over, cpio.archive)
    made_from = [made.image.parent.name, DISK_SIZE, PASSPHRASE, made_by]
    key = fingerprint(*scripts, extra="\n".join(made_from))
    target = cache_dir() / f"base-{layout}-{key}.qcow2"
    with _made_once(target) as place:
        if place is not None:
            with phases.phase(f"build: base disk {layout}"):
                subprocess.run(
                    ["qemu-img", "create", "-q", "-f", "qcow2", str(place), DISK_SIZE], check=True
                )
                toolbox.run(
                    made,
                    "install",
                    {"layout": layout, "disk": "/dev/vdb", "passphrase": PASSPHRASE},
                    toolbox.drive(place, "qcow2"),
                    target.with_suffix(".log"),
                    timeout_s=1200,
                )
    return Disk(target, layout)


def export_root(disk: Disk, image: Path) -> Path:
    """Copy the disk's root volume, decrypted, to the raw file `image`, without a write to the
    disk.
    """
    size = subprocess.run(["truncate", "-s", DISK_SIZE, str(image)], check=False)
    size.check_returncode()
    with phases.phase("root volume copied to the host"):
        text = toolbox.run(
            root(),
            "export-root",
            {"layout": disk.layout, "disk": "/dev/vdb", "passphrase": PASSPHRASE},
            [*toolbox.drive(disk.path, "qcow2", snapshot=True), *toolbox.drive(image, "raw")],
            image.with_suffix(".log"),
            timeout_s=600,
        )
    length = next(line for line in text.splitlines() if line.startswith("TOOLBOX BYTES ")).split()[
        2
    ]
    os.truncate(image, int(length))
    return image


def gunzip(packed: Path, target: Path) -> None:
    """Unpack a .gz file."""
    with gzip.open(packed) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out)


def formula_payload(target: Path, pillar: str) -> Path:
    """The formula and its configuration as a tar file, laid out from the machine's /; a drive can
    hold it as it is.
    """

    def plain_owner(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if "__pycache__" in info.name:
            return None
        info.uid = info.gid = 0
        info.uname = info.gname = "root"
        return info

    with tempfile.TemporaryDirectory(prefix="ramboot-vm-") as tmp, tarfile.open(target, "w") as tar:
        for name in FORMULA_PARTS:
            if (REPOSITORY / name).exists():
                tar.add(
                    REPOSITORY / name,
                    f"srv/formulas/base/ramboot-formula/{name}",
                    filter=plain_owner,
                )
        minion = "etc/salt/minion.d/formula-ramboot.conf"
        tar.add(REPOSITORY / "packaging/formula-ramboot.conf", minion, filter=plain_owner)
        texts = {
            "etc/salt/minion.d/pillar.conf": "pillar_roots:\n  base:\n    - /srv/pillar\n",
            "srv/pillar/top.sls": "base:\n  '*':\n    - ramboot\n",
            "srv/pillar/ramboot.sls": pillar,
        }
        for name, text in texts.items():
            local = Path(tmp) / "file"
            local.write_text(text, encoding="utf-8")
            tar.add(local, name, filter=plain_owner)
    return target


def applied(layout: str = "luks-thin", pillar: str = PILLAR) -> Disk:
    """`base` after `state.apply ramboot` in it, with real Salt."""
    return with_formula("applied", base(layout), pillar, _apply)


def with_formula(
    name: str, start: Disk, pillar: str, make: Callable[[Disk, Path, Path], None]
) -> Disk:
    """A disk that `make(start, payload, place)` leaves at `place`; the payload is the formula."""
    from vm.machine import Machine  # it needs this module in turn

    parts = [REPOSITORY / part for part in FORMULA_PARTS if (REPOSITORY / part).exists()]
    made_by = code_of(with_formula, make, formula_payload, Machine.install_payload)
    key = fingerprint(*parts, extra="\n".join([start.path.name, pillar, made_by]))
    target = cache_dir() / f"{name}-{start.layout}-{key}.qcow2"
    with _made_once(target) as place:
        if place is not None:
            payload = formula_payload(place.parent / "payload.tar", pillar)
            with phases.phase(f"build: formula {name} {start.layout}"):
                repeated(lambda: make(start, payload, place))
            for beside in place.parent.glob(f"{place.name}.*"):
                beside.rename(target.with_suffix(beside.suffix))
    return Disk(target, start.layout)


def before_applied(disk: Disk) -> list[str]:
    """The lines of TOUCHED on an applied disk before the formula came."""
    return disk.path.with_suffix(".before").read_text(encoding="utf-8").splitlines()


def _apply(start: Disk, payload: Path, place: Path) -> None:
    from vm.machine import Machine  # it needs this module in turn

    results = cache_dir() / "results" / f"apply-{start.layout}"
    shutil.rmtree(results, ignore_errors=True)
    with Machine(start, "apply", results, payload=payload) as dom0:
        # without Xen dracut takes a third of the time, and makes the same image
        dom0.start_direct()
        dom0.unlock()
        dom0.shell()
        place.with_suffix(".before").write_text(
            dom0.succeed(TOUCHED, timeout_s=200), encoding="utf-8"
        )
        dom0.install_payload()
        with phases.phase("salt: sync_all"):
            dom0.succeed("salt-call --local saltutil.sync_all", timeout_s=300)
        with phases.phase("salt: state.apply ramboot"):
            dom0.succeed(
                "salt-call --local --retcode-passthrough state.apply ramboot", timeout_s=1500
            )
        dom0.poweroff()
        dom0.disk.path.rename(place)


def main() -> int:
    """Make disks by hand."""
    parser = argparse.ArgumentParser(description="Build the test machine's disks.")
    parser.add_argument("layout", nargs="*", default=["luks-thin"], help=", ".join(LAYOUTS))
    parser.add_argument("--applied", action="store_true", help="also apply the formula in each")
    options = parser.parse_args()
    for layout in options.layout:
        print(base(layout).path)
        if options.applied:
            print(applied(layout).path)
    print(phases.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
