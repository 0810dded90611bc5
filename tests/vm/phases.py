# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the minutes of a run went."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

_SECONDS: dict[str, list[float]] = {}


def add(name: str, seconds: float) -> None:
    """Book `seconds` under `name`."""
    _SECONDS.setdefault(name, []).append(seconds)


def booked() -> dict[str, list[float]]:
    """All that this process has booked, for another to `take`."""
    return _SECONDS


def take(others: dict[str, list[float]]) -> None:
    """Book what another process has."""
    for name, seconds in others.items():
        _SECONDS.setdefault(name, []).extend(seconds)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Book the time that the block takes, whether it succeeds or not."""
    begin = time.monotonic()
    try:
        yield
    finally:
        add(name, time.monotonic() - begin)


def table() -> str:
    """One line per phase: how often, seconds in all, seconds at most; in order of first use."""
    if not _SECONDS:
        return ""
    rows = [f"{'phase':<34}{'times':>6}{'seconds':>10}{'longest':>10}"]
    rows += [f"{name:<34}{len(s):>6}{sum(s):>10.1f}{max(s):>10.1f}" for name, s in _SECONDS.items()]
    return "\n".join(rows)
