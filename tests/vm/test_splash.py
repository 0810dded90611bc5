# SPDX-License-Identifier: GPL-2.0-or-later
"""The question and the progress on a graphical splash, answered on a keyboard."""

from __future__ import annotations

import time
from collections.abc import Callable

from vm import build
from vm.claims import assert_ram_session
from vm.conftest import results_dir
from vm.console import ConsoleError
from vm.machine import Machine


def test_the_splash_asks_and_takes_one_key(machine: Callable[..., Machine]) -> None:
    dom0 = machine(build.base("thin"), graphics=True)
    # A serial console would keep plymouth in text mode. The splash takes over what is written to
    # /dev/console, so that the kernel's log alone tells on the serial line how far it is.
    dom0.start_direct(
        "splash plymouth.ignore-serial-consoles ramboot.timeout=0 loglevel=6",
        initrd=build.initramfs(),
        files={"usr/lib/ramboot/estimate": "500000000"},  # it was built where / is another
    )
    dom0.wait_for("Show Plymouth Boot Screen")
    question, progress = (results_dir() / f"splash-{name}.png" for name in ("question", "progress"))
    time.sleep(20)
    for _ in range(20):
        dom0.screenshot(question)
        dom0.send_key("y")
        try:
            dom0.wait_for("Boot to RAM? y (key)", 5)
            break
        except ConsoleError:
            continue
    dom0.wait_for("ramboot: copying")
    time.sleep(8)
    dom0.screenshot(progress)
    dom0.shell()
    assert_ram_session(dom0, "zram", "ext4")
    # the splash has something to show, and not the same all the time
    assert question.read_bytes() != progress.read_bytes()
    dom0.poweroff()
    assert dom0.disk_unchanged(), f"{dom0.written_bytes()} bytes were written"
