# SPDX-License-Identifier: GPL-2.0-or-later
"""Initramfs archives (cpio, "newc") made without root and without cpio."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

_DIR, _FILE = 0o040755, 0o100755


def laid_over(initramfs: bytes, files: Mapping[str, bytes | str | Path]) -> bytes:
    """`initramfs` with `files` over it. The kernel looks for a next archive at multiples of 4."""
    return initramfs + b"\0" * (-len(initramfs) % 4) + archive(files)


def archive(files: Mapping[str, bytes | str | Path]) -> bytes:
    """An archive with each path's content (bytes, text, or a file to read), all executable, root's.

    Parent directories are added. The kernel lays a later archive over an earlier one: a directory
    named here
    replaces a symlink of that name, so name paths by their real directories (dracut-ng's hooks lie
    in
    var/lib/dracut/hooks).
    """
    out = io.BytesIO()
    seen: set[str] = set()
    inode = 0

    def entry(name: str, mode: int, data: bytes = b"") -> None:
        nonlocal inode
        inode += 1
        raw = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + raw)
        out.write(b"\0" * (-out.tell() % 4))
        out.write(data)
        out.write(b"\0" * (-out.tell() % 4))

    for name, content in files.items():
        path = PurePosixPath(name.lstrip("/"))
        for parent in reversed(path.parents):
            if str(parent) not in {".", *seen}:
                seen.add(str(parent))
                entry(str(parent), _DIR)
        if isinstance(content, Path):
            content = content.read_bytes()
        entry(str(path), _FILE, content.encode() if isinstance(content, str) else content)
    entry("TRAILER!!!", 0)
    out.write(b"\0" * (-out.tell() % 512))
    return out.getvalue()
