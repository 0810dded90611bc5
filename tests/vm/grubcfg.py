# SPDX-License-Identifier: GPL-2.0-or-later
"""The menu that a grub.cfg makes: what a person at the machine would see and edit."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_ENTRY = re.compile(
    r"""^\s*menuentry\s+(?P<quote>['"])(?P<title>.*?)(?P=quote)(?P<rest>.*)\{\s*$"""
)
_ID = re.compile(r"""\$menuentry_id_option\s+['"]?([^'"\s{]+)|--id[= ]\s*['"]?([^'"\s{]+)""")


@dataclass
class Entry:
    """One menu entry; `lines` are those that GRUB's editor shows, in order."""

    title: str
    id: str
    lines: list[str] = field(default_factory=list)

    def _line(self, *commands: str) -> int:
        for number, line in enumerate(self.lines):
            words = line.split()
            if words and words[0] in commands and any("vmlinuz" in word for word in words):
                return number
        raise LookupError(f"the menu entry {self.title!r} boots no Linux")

    @property
    def linux_line(self) -> int:
        """Which of the lines has dom0's kernel arguments."""
        return self._line("module2", "module", "linux")

    @property
    def linux_arguments(self) -> list[str]:
        """dom0's kernel arguments."""
        words = self.lines[self.linux_line].split()
        at = next(i for i, word in enumerate(words) if "vmlinuz" in word)
        # Xen's loader takes the kernel's path a second time, as "placeholder".
        return [word for word in words[at + 1 :] if word != "placeholder"]

    @property
    def xen_arguments(self) -> list[str]:
        """Xen's arguments; empty without Xen."""
        for line in self.lines:
            words = line.split()
            if words and words[0].startswith("multiboot"):
                return [word for word in words[2:] if word != "placeholder"]
        return []


def entries(text: str) -> list[Entry]:
    """All menu entries in menu order. Entries inside a submenu are not supported."""
    found: list[Entry] = []
    entry: Entry | None = None
    for line in text.splitlines():
        match = _ENTRY.match(line)
        if entry is None and match:
            identity = _ID.search(match["rest"])
            entry = Entry(match["title"], next(filter(None, identity.groups())) if identity else "")
        elif entry is not None and line.strip() == "}":
            found.append(entry)
            entry = None
        elif entry is not None:
            entry.lines.append(line.strip())
    return found


def find(text: str, wanted: str) -> tuple[int, Entry]:
    """Position and entry whose id or title is `wanted`, or else the only ones whose title
    contains it.
    """
    menu = list(enumerate(entries(text)))
    for match in (
        [e for e in menu if wanted in (e[1].id, e[1].title)],
        [e for e in menu if wanted in e[1].title],
    ):
        if match:
            return match[0]
    raise LookupError(
        f"no menu entry {wanted!r}; the menu has: "
        + ", ".join(f"{e.title} ({e.id})" for _, e in menu)
    )
