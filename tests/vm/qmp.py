# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's control socket: questions, answers, and the one event that matters here."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path
from typing import Any


class QmpError(Exception):
    """QEMU refused a command or went away."""


class Qmp:
    """A connection to one running QEMU."""

    def __init__(self, path: Path, timeout_s: float = 120) -> None:
        limit = time.monotonic() + timeout_s
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(str(path))
                break
            except OSError as error:
                self._socket.close()
                if time.monotonic() > limit:
                    raise QmpError(
                        f"QEMU's control socket did not open within {timeout_s:.0f} s: {error}"
                    ) from error
                time.sleep(0.05)
        self._pending = b""
        self._off = False
        self._read(timeout_s)
        self.command("qmp_capabilities")

    def close(self) -> None:
        """Let go of the connection."""
        self._socket.close()

    def quit(self) -> None:
        """End QEMU at once; the guest is not asked, but what it wrote is kept."""
        with contextlib.suppress(QmpError, OSError):
            self.command("quit", timeout_s=10)
        self.close()

    def _read(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message, or None when there was none in time."""
        limit = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            left = limit - time.monotonic()
            if left <= 0:
                return None
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                return None
            except OSError as error:
                raise QmpError(f"QEMU went away: {error}") from error
            if not data:
                raise QmpError("QEMU went away")
            self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        if message.get("event") == "SHUTDOWN":
            self._off = True
        return message

    def command(self, name: str, timeout_s: float = 30, **arguments: Any) -> Any:
        """Run one command and return its answer."""
        request: dict[str, Any] = {"execute": name}
        if arguments:
            request["arguments"] = arguments
        self._socket.settimeout(timeout_s)
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        limit = time.monotonic() + timeout_s
        while (message := self._read(max(0.0, limit - time.monotonic()))) is not None:
            if "error" in message:
                raise QmpError(f"{name}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
        raise QmpError(f"{name}: no answer within {timeout_s:.0f} s")

    def wait_for_shutdown(self, timeout_s: float) -> bool:
        """Whether the guest switched itself off (or reset) within the limit."""
        limit = time.monotonic() + timeout_s
        while not self._off:
            if self._read(max(0.0, limit - time.monotonic())) is None:
                return self._off
        return True
