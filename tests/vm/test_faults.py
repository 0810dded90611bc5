# SPDX-License-Identifier: GPL-2.0-or-later
"""Faults of the disk itself. Those of tools and files of the initramfs are beside what they break:
test_ram_session.py, test_disk.py, test_image.py. The initramfs is built on the host and started
without GRUB and Xen.
"""

from __future__ import annotations

from collections.abc import Callable

from vm import build
from vm.machine import Machine

MachineMaker = Callable[..., Machine]


def test_a_disk_that_is_pulled_while_copying_is_said_and_the_machine_switches_off(
    machine: MachineMaker,
) -> None:
    dom0 = machine(build.base())
    dom0.start_direct("ramboot=zram", initrd=build.initramfs())
    dom0.unlock()
    dom0.wait_for("Copying to RAM:", 120)
    dom0.pull_disk()
    dom0.wait_for("is gone", 120)
    dom0.switches_off(90)
    assert dom0.disk_unchanged()
