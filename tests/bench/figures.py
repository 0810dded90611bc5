# SPDX-License-Identifier: GPL-2.0-or-later
"""What was measured, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

UNITS = {
    "boot.zram.time": "s",
    "boot.tmpfs.time": "s",
    "boot.image.time": "s",
    "boot.overlay.work": "s",
    "boot.snapshot.work": "s",
    "copy.zram.time": "s",
    "copy.tmpfs.time": "s",
    "copy.image.time": "s",
    "copy.zram.ram": "bytes",
    "ram.image": "bytes",
    "written.attached": "bytes",
    "written.readonly": "bytes",
    "written.detached": "bytes",
    "written.snapshot": "bytes",
}
_HEAD = ("what", "ours", "guide", "ours / guide", "unit")


@dataclass(frozen=True)
class Figure:
    """One quantity, measured in both ways."""

    ours: float
    guide: float
    unit: str

    @property
    def ratio(self) -> float | None:
        """Ours by the guide's; None where the guide's is zero."""
        return round(self.ours / self.guide, 3) if self.guide else None

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        return {"ours": self.ours, "guide": self.guide, "ratio": self.ratio, "unit": self.unit}


def averaged(rounds: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, Figure]:
    """The means over rounds; each maps a name to what ours and the guide's took."""
    measured = list(rounds)
    found: dict[str, Figure] = {}
    for name, unit in UNITS.items():
        digits = 2 if unit == "s" else None
        ours, guide = (round(fmean(one[name][way] for one in measured), digits) for way in (0, 1))
        found[name] = Figure(ours, guide, unit)
    return found


def to_json(figures: Mapping[str, Figure]) -> str:
    """The file's text."""
    return json.dumps({name: one.as_dict() for name, one in figures.items()}, indent=2) + "\n"


def from_json(text: str) -> dict[str, Figure]:
    """What `to_json` wrote."""
    return {
        name: Figure(one["ours"], one["guide"], one["unit"])
        for name, one in json.loads(text).items()
    }


def table(figures: Mapping[str, Figure]) -> str:
    """All of them."""
    rows: list[tuple[str, ...]] = [_HEAD]
    for name, one in figures.items():
        shown = (f"{v:,.1f}" if one.unit == "s" else f"{v:,.0f}" for v in (one.ours, one.guide))
        ratio = "-" if one.ratio is None else f"{one.ratio:.2f}"
        rows.append((f"`{name}`", *shown, ratio, one.unit))
    return markdown(rows, left=(0, len(_HEAD) - 1))


def markdown(rows: Sequence[tuple[str, ...]], left: Collection[int] = (0,)) -> str:
    """A table that reads well in a terminal and is Markdown. The first row is its head; columns
    that are not in `left` hold numbers.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: tuple[str, ...]) -> str:
        cells = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join(cells) + " |"

    rule = ("-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(rows[0]), "| " + " | ".join(rule) + " |", *map(line, rows[1:])]) + "\n"
