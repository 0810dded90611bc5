# SPDX-License-Identifier: GPL-2.0-or-later
"""How large the image is, and how long building, hashing and unpacking it takes, by zstd level and
block size: `sudo python3 tests/bench/image.py`. On the host, over the files of the test machine's
root; what counts are the ratios within one run.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vm import build

LEVELS = (1, 3, 6, 9, 15, 19)
BLOCKS_KIB = (128, 256, 1024)
MIB = 1 << 20
# as copy:exclude leaves them behind, and /boot, which is a file system of its own
LEFT_BEHIND = ("tmp", "var/tmp", "var/cache", "boot")


@dataclass(frozen=True)
class Row:
    """One way to build it."""

    level: int
    block_kib: int
    size_bytes: int
    build_s: float
    hash_s: float
    unpack_s: float


def timed(*command: str | Path) -> float:
    """Seconds that a command takes; raises when it fails."""
    begin = time.monotonic()
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return time.monotonic() - begin


def measure(tree: Path, work: Path, level: int, block_kib: int) -> Row:
    """Build one image, read it, unpack it."""
    image, out = work / "image", work / "out"
    left_out = [tree / name for name in LEFT_BEHIND]
    compressed = ["-comp", "zstd", "-Xcompression-level", str(level), "-b", f"{block_kib}K"]
    build_s = timed(
        "mksquashfs", tree, image, *compressed, "-noappend", "-no-progress", "-e", *left_out
    )
    begin = time.monotonic()
    hashlib.sha256(image.read_bytes())
    hash_s = time.monotonic() - begin
    unpack_s = timed("unsquashfs", "-quiet", "-no-progress", "-processors", "1", "-d", out, image)
    timed("rm", "-rf", out)
    return Row(level, block_kib, image.stat().st_size, build_s, hash_s, unpack_s)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| zstd level | block, KiB | MiB | built in, s | hashed in, s | unpacked in, s |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.level} | {row.block_kib} | {row.size_bytes / MIB:.0f} | {row.build_s:.1f} |"
        f" {row.hash_s:.2f} | {row.unpack_s:.1f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and print."""
    tree = build.tree()
    rows = []
    with tempfile.TemporaryDirectory(prefix="ramboot-bench-") as work:
        for level in LEVELS:
            for block_kib in BLOCKS_KIB:
                rows.append(measure(tree, Path(work), level, block_kib))
                print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
