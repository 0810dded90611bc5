# SPDX-License-Identifier: GPL-2.0-or-later
"""In a full run a test that was skipped is a test that did not happen: an error."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """tests/run sets RAMBOOT_NO_SKIP after it has installed every tool."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("RAMBOOT_NO_SKIP"):
        report.outcome = "failed"
        report.longrepr = f"skipped, though everything was installed: {report.longrepr}"
    return report
