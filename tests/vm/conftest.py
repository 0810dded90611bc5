# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines for the boots in this directory."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vm import build, phases
from vm.console import repeated
from vm.deadline import Deadline
from vm.disk import Disk
from vm.machine import Machine

MachineMaker = Callable[..., Machine]
_MACHINES = pytest.StashKey[list[Machine]]()
# Files in the order of their worth, should the time not last for all; so are the tests in each.
ORDER = (
    *("test_ram_session", "test_snapshot", "test_disk", "test_image", "test_faults"),
    *("test_formula", "test_roots", "test_qubes", "test_watch", "test_splash"),
)


def pytest_configure(config: pytest.Config) -> None:
    """tests/run sets RAMBOOT_TEST_DEADLINE where it was given a time to end in."""
    if at := os.environ.get("RAMBOOT_TEST_DEADLINE"):
        config.pluginmanager.register(Deadline(float(at)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files take turns: each one's first test, then each one's second, and so on. Files that
    are not in ORDER come last in a turn.

    In a turn, those that need the applied disk follow the others, but for the first of all: while
    it makes that disk, other processes run tests that can do without.
    """
    turns: Counter[Path] = Counter()
    places: dict[pytest.Item, tuple[int, bool, int]] = {}
    for item in items:
        file = ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER)
        applied = "applied_disk" in getattr(item, "fixturenames", ())
        places[item] = turns[item.path], applied, file
        turns[item.path] += 1
    items.sort(key=places.__getitem__)
    makes_it = next((item for item in items if places[item][1]), None)
    if makes_it:
        items.remove(makes_it)
        items.insert(0, makes_it)


def results_dir() -> Path:
    """Where consoles and screenshots go: RAMBOOT_VM_RESULTS, or `results` in the cache."""
    return Path(os.environ.get("RAMBOOT_VM_RESULTS") or build.cache_dir() / "results")


@pytest.fixture(scope="session")
def base_disk() -> Disk:
    """The machine before the formula."""
    return build.base()


@pytest.fixture(scope="session")
def applied_disk() -> Disk:
    """The machine after `state.apply ramboot`, with a menu entry for each backend."""
    return build.applied()


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[MachineMaker]:
    """Makes machines: `machine(disk, memory_mib=...)`. They are switched off and thrown away at
    the test's end.
    """
    made: list[Machine] = []
    request.node.stash[_MACHINES] = made
    name = re.sub(r"\W+", "-", request.node.name).strip("-")

    def make(disk: Disk, **options: Any) -> Machine:
        number = f"-{len(made) + 1}" if made else ""
        made.append(Machine(disk, name + number, results_dir(), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """A test of whose machine the emulator made a mess begins again, with new machines."""
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    made = pyfuncitem.stash.get(_MACHINES, [])

    def attempt() -> None:
        while made:
            made.pop().close()
        pyfuncitem.obj(**arguments)

    repeated(attempt)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what was on the consoles of a failed boot."""
    report = yield
    if report.failed and call.when == "call":
        for one in item.stash.get(_MACHINES, []):
            if one._console is not None:  # still on
                one.console.drain()
                report.sections.append(
                    (f"console of {one.name}", one.console.transcript.last_lines())
                )
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist hands on where its minutes went."""
    if handed := getattr(session.config, "workeroutput", None):
        handed["phases"] = phases.booked()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    phases.take(getattr(node, "workeroutput", {}).get("phases", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say where the minutes went."""
    if table := phases.table():
        terminalreporter.section("where the time went")
        terminalreporter.write_line(table)
