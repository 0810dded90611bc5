# SPDX-License-Identifier: GPL-2.0-or-later
"""A serial console: what was on it, and waiting for what comes next, always with a limit."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pexpect

from . import phases

LINES_SHOWN = 40
# Xen keeps 128 characters for dom0 and drops what comes while they are not fetched
# (xen/drivers/char/console.c, SERIAL_RX_SIZE), so a line is typed in pieces, with a pause for dom0.
PIECE, PAUSE_S = 48, 0.4
_ESCAPES = re.compile(
    r"\x1b(?:\[[0-9;?=]*[ -/]*[@-~]|\][^\x07]*\x07|[()][0-9A-B]|[=>78cM])|[\x00-\x08\x0b-\x1f]"
)


# After these nothing else will come. Nothing of the project runs in the guest's kernel, so an
# exception there is an emulated processor's, or a bug of the kernel's own that will be there again
# the next time. QEMU before 8.1 makes them of code patched by one processor while it is translated
# for another (fixed by QEMU commit deba78709a, "accel/tcg: Always lock pages before translation").
_EMULATOR_FAULT = re.compile(r"Oops: |Kernel panic - not syncing: Fatal exception")
_ENDS = re.compile(rf"{_EMULATOR_FAULT.pattern}|Kernel panic - not syncing|Hardware Dom0 crashed")


def plain(text: str) -> str:
    """`text` as a person reads it: no escape sequences, no carriage returns."""
    return _ESCAPES.sub("", text.replace("\r\n", "\n"))


class ConsoleError(AssertionError):
    """Something awaited did not appear. The message shows what was on the console instead."""


class EmulatorError(ConsoleError):
    """QEMU, not the guest, went wrong; the same boot again is likely to go well."""


def repeated(attempt: Callable[[], None]) -> None:
    """Call `attempt` until the emulator lets it end in its own way, three times at most."""
    for _ in range(2):
        try:
            return attempt()
        except EmulatorError as error:
            phases.add("emulator fault, begun again", 0)
            print(f"begins again: {error}")
    return attempt()


class Transcript:
    """Everything that the console said, in memory and in a file, flushed as it comes."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._text: list[str] = []

    def write(self, text: str) -> None:
        """Take what was read from the console."""
        self._text.append(text)
        self._file.write(text)
        self._file.flush()

    def flush(self) -> None:
        """Part of what pexpect calls on a log."""

    def close(self) -> None:
        """Close the file; what was said stays readable."""
        self._file.close()

    def text(self) -> str:
        """All of it, plain."""
        return plain("".join(self._text))

    def last_lines(self, count: int = LINES_SHOWN) -> str:
        """The last lines that are not empty, each marked."""
        lines = [line for line in self.text().splitlines() if line.strip()]
        return "\n".join("    | " + line for line in lines[-count:])


class Console:
    """The console of one running QEMU (or of any pexpect process, in the tests)."""

    def __init__(self, process: Any, transcript: Transcript) -> None:
        self.process = process
        self.transcript = transcript
        process.logfile_read = transcript

    def wait_for(self, text: str, timeout_s: float, *, regex: bool = False) -> re.Match[str]:
        """Wait until `text` appears after what was waited for last."""
        pattern = re.compile(text if regex else re.escape(text))
        try:
            ended = self.process.expect([pattern, _ENDS], timeout=timeout_s)
        except pexpect.TIMEOUT:
            raise self._error(f"{text!r} did not appear within {timeout_s:.0f} s") from None
        except pexpect.EOF:
            raise self._error(f"{text!r} did not appear, the machine stopped") from None
        match: re.Match[str] = self.process.match
        if ended:
            self.drain(2)
            fault = _EMULATOR_FAULT.search(self.transcript.text())
            kind = EmulatorError if fault else ConsoleError
            raise self._error(f"{text!r} did not appear, the kernel stopped", kind)
        return match

    @property
    def before(self) -> str:
        """What came between the last two things waited for, plain."""
        return plain(self.process.before or "")

    def drain(self, seconds: float = 0.3) -> None:
        """Read on without waiting for anything, so that the transcript is complete."""
        with contextlib.suppress(pexpect.TIMEOUT, pexpect.EOF):
            self.process.expect(pexpect.EOF, timeout=seconds)

    def type(self, keys: str) -> None:
        """Send keys as they are."""
        self.process.send(keys)

    def enter(self, line: str) -> None:
        """Send a line and the Enter key, no faster than Xen takes it."""
        keys = line + "\r"
        for start in range(0, len(keys), PIECE):
            if start:
                time.sleep(PAUSE_S)
            self.process.send(keys[start : start + PIECE])

    def _error(self, what: str, kind: Callable[[str], ConsoleError] = ConsoleError) -> ConsoleError:
        return kind(
            f"{what}; the console's last {LINES_SHOWN} lines:\n{self.transcript.last_lines()}"
        )
