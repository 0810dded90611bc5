# SPDX-License-Identifier: GPL-2.0-or-later
"""The image by format, compression and block size: `sudo python3 tests/bench/image.py`.

How large it is, and how long building it and reading all of its files takes: in RAM, of the files
of the test machine's root, on the host. Of erofs what this host's mkfs.erofs has.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vm import build

MIB = 1 << 20
RAM = Path("/dev/shm")
# as copy:exclude leaves them behind, and /boot, which is a file system of its own
LEFT_BEHIND = ("tmp", "var/tmp", "var/cache", "boot")
# zstd level, block
SQUASHFS = [(level, kib) for level in (1, 3, 6, 9, 15) for kib in (128, 256, 1024)]
# compression with its level, largest compressed block
EROFS = [("lz4hc,12", 64), ("lz4hc,12", 1024), ("zstd,6", 64), ("zstd,6", 256), ("zstd,15", 256)]


@dataclass(frozen=True)
class Way:
    """One way to build it."""

    filesystem: str
    how: str
    block_kib: int

    def command(self, tree: Path, image: Path) -> list[str | Path]:
        if self.filesystem == "erofs":
            without = [f"--exclude-path={name}" for name in LEFT_BEHIND]
            options = [f"-z{self.how}", f"-C{self.block_kib << 10}", "--quiet", *without]
            return ["mkfs.erofs", *options, image, tree]
        compression, level = self.how.split(",")
        options = ["-comp", compression, "-Xcompression-level", level, "-b", f"{self.block_kib}K"]
        left_out = [tree / name for name in LEFT_BEHIND]
        return ["mksquashfs", tree, image, *options, "-noappend", "-no-progress", "-e", *left_out]


@dataclass(frozen=True)
class Row:
    """What one way took."""

    way: Way
    size_bytes: int
    build_s: float
    read_s: float


def ways() -> Iterator[Way]:
    """Those that the tools of this host have."""
    for level, kib in SQUASHFS:
        yield Way("squashfs", f"zstd,{level}", kib)
    if tool := shutil.which("mkfs.erofs"):
        said = subprocess.run([tool, "--help"], capture_output=True, text=True, check=False)
        for how, kib in EROFS:
            if how.partition(",")[0] in said.stdout + said.stderr:
                yield Way("erofs", how, kib)


def timed(*command: str | Path) -> float:
    """Seconds that a command takes; raises when it fails."""
    begin = time.monotonic()
    words = [str(word) for word in command]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


def measure(tree: Path, work: Path, way: Way) -> Row:
    """Build one image, mount it, read its files."""
    image, mounted = work / "image", work / "mounted"
    mounted.mkdir(exist_ok=True)
    build_s = timed(*way.command(tree, image))
    timed("mount", "-t", way.filesystem, "-o", "ro,loop", image, mounted)
    try:
        read_s = timed("find", mounted, "-type", "f", "-exec", "cat", "{}", "+")
    finally:
        timed("umount", mounted)
    size_bytes = image.stat().st_size
    image.unlink()
    return Row(way, size_bytes, build_s, read_s)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| | block, KiB | MiB | built in, s | read in, s |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {row.way.filesystem} {row.way.how} | {row.way.block_kib} |"
        f" {row.size_bytes / MIB:.0f} | {row.build_s:.1f} | {row.read_s:.1f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and print."""
    tree = build.tree()
    rows = []
    with tempfile.TemporaryDirectory(prefix="ramboot-bench-", dir=RAM) as work:
        for way in ways():
            rows.append(measure(tree, Path(work), way))
            print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
