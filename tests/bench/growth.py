# SPDX-License-Identifier: GPL-2.0-or-later
"""How what is copied grows with the root: its bytes, and its number of files.

The roots are made of the bytes of the test machine's files, in files of sizes that spread as those
of a system do: most are small, a few have most of the bytes.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import figures, native
from vm import build

GIB = 1 << 30
# GiB of content, files
ROOTS = ((1, 50_000), (2, 50_000), (4, 50_000), (8, 50_000), (2, 10_000), (2, 200_000))
# In this order: an overlay changes nothing, a copy removes the image from the root, and that to
# zram changes all of it.
OURS = ("overlay", "image", "tmpfs", "zram")
GUIDES = {"guide's zram": "zram", "guide's tmpfs": "tmpfs"}
COLUMNS = ("zram", "guide's zram", "tmpfs", "guide's tmpfs", "image", "overlay")


@dataclass(frozen=True)
class Row:
    """One root, and what each of COLUMNS took."""

    gib: int
    files: int
    took: dict[str, native.Took]


def measure() -> Iterator[Row]:
    """Row by row, as it takes minutes each."""
    pool = content()
    for gib, files in ROOTS:
        with tempfile.TemporaryDirectory(prefix="ramboot-bench-") as work:
            root = Path(work) / "root.img"
            make_root(root, sizes(files, gib * GIB), pool)
            took = {name: native.typical(native.guides, root, of) for name, of in GUIDES.items()}
            native.add_image(root)
            for backend in OURS:
                took[backend] = native.typical(native.ours, root, backend)
            yield Row(gib, files, took)


def content() -> bytes:
    """What the files of the test machine's root hold, without those of /boot."""
    tree = build.tree()
    paths = [p for p in sorted(tree.rglob("*")) if p.is_file() and not p.is_symlink()]
    return b"".join(p.read_bytes() for p in paths if p.relative_to(tree).parts[0] != "boot")


def sizes(count: int, total: int) -> list[int]:
    """Of so many files, in bytes; the same at each call."""
    chance = random.Random(count)
    shares = [chance.lognormvariate(0, 2) for _ in range(count)]
    unit = total / sum(shares)
    return [round(share * unit) for share in shares]


def make_root(image: Path, file_sizes: list[int], pool: bytes) -> None:
    """An ext4 in a sparse file: what a root must have to be taken for one, and the files."""
    # room for the image, and for the rest of a block after each file
    size = sum(file_sizes) * 2 + len(file_sizes) * 4096 + GIB
    subprocess.run(["truncate", "-s", str(size), image], check=True)
    subprocess.run(
        ["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image], check=True
    )
    with native.mounted(image) as top:
        for directory in ("etc", "sbin", "usr/sbin", "usr/lib/modules/6.12.0"):
            (top / directory).mkdir(parents=True)
        (top / "sbin/init").symlink_to("/usr/lib/systemd/systemd")
        # the guide takes it from the root
        shutil.copy(build.tree() / "usr/sbin/mke2fs", top / "usr/sbin/mkfs.ext2")
        fill(top / "srv", file_sizes, pool)


def fill(directory: Path, file_sizes: list[int], pool: bytes) -> None:
    """Files with parts of `pool`, each with other bytes, for squashfs keeps equal ones once."""
    view, at = memoryview(pool), 0
    for number, size in enumerate(file_sizes):
        path = directory / str(number // 2500) / str(number // 50) / str(number)
        if number % 50 == 0:
            path.parent.mkdir(parents=True)
        with path.open("wb") as stream:
            stream.write((b"%d\n" % number)[:size])
            left = size - stream.tell()
            while left > 0:
                part = view[at : at + left]
                stream.write(part)
                left -= len(part)
                at = (at + len(part)) % len(pool)


def tables(rows: Iterable[Row]) -> str:
    """Seconds, and GiB of RAM held, in Markdown."""
    measured = list(rows)

    def table(what: str, shown: Callable[[native.Took], str]) -> str:
        lines: list[tuple[str, ...]] = [(f"{what} for a root of", "files", *COLUMNS)]
        for row in measured:
            cells = (shown(row.took[name]) for name in COLUMNS)
            lines.append((f"{row.gib} GiB", f"{row.files:,}", *cells))
        return figures.markdown(lines)

    seconds = table("seconds", lambda took: f"{took.seconds:.1f}")
    return seconds + "\n" + table("GiB of RAM", lambda took: f"{took.ram_bytes / GIB:.2f}")
