# SPDX-License-Identifier: GPL-2.0-or-later
"""A run that ends in time where machines are emulated slowly, and says what it did not come to.

After the deadline no test begins, and the one that runs is cut off; each of them is named at the
end.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Generator, Iterator
from types import FrameType

import pytest

OUTCOME = "out of time"


class OutOfTime(BaseException):
    """The deadline has come. No `except Exception` of a test keeps it."""


class Deadline:
    """A plugin of pytest. `at`: seconds since the epoch."""

    def __init__(self, at: float) -> None:
        self._at = at

    @contextlib.contextmanager
    def _limit(self) -> Iterator[None]:
        left = self._at - time.time()
        if left <= 0:
            raise OutOfTime
        before = signal.signal(signal.SIGALRM, self._end)
        signal.setitimer(signal.ITIMER_REAL, left)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    @staticmethod
    def _end(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Generator[None]:
        with self._limit():
            yield

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None]:
        with self._limit():
            yield

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.excinfo is not None and call.excinfo.errisinstance(OutOfTime):
            if getattr(item, "execution_count", 1) > 1:  # of pytest-rerunfailures
                report.longrepr = f"it failed, and was {OUTCOME} while it was tried once more"
                return report
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, OUTCOME)
            report.sections.append((OUTCOME, ""))
        return report

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        if (OUTCOME, "") in report.sections:
            return OUTCOME, "t", OUTCOME.upper()
        return None

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if left := terminalreporter.stats.get(OUTCOME):
            terminalreporter.section("NOT ALL WAS RUN: the time was up before the end of")
            for report in left:
                terminalreporter.write_line(report.nodeid)
