# SPDX-License-Identifier: GPL-2.0-or-later
"""The control: the machine without the formula is what the other boots take it for."""

from __future__ import annotations

from collections.abc import Callable

from vm.claims import FAILED_UNITS, settled
from vm.disk import Disk
from vm.machine import Machine


def test_the_machine_without_the_formula_boots_from_its_disk(
    base_disk: Disk, machine: Callable[..., Machine]
) -> None:
    dom0 = machine(base_disk)
    dom0.start()
    dom0.unlock()
    dom0.shell()
    assert dom0.succeed("findmnt -no SOURCE,FSTYPE /").split() == [
        "/dev/mapper/qubes_dom0-root",
        "ext4",
    ]
    assert dom0.succeed("cat /sys/hypervisor/type") == "xen"
    assert settled(dom0) == "running", dom0.succeed(FAILED_UNITS)
    assert dom0.succeed("swapon --show=NAME --noheadings").startswith("/dev/dm-")
    assert "True" in dom0.succeed("salt-call --local test.ping", timeout_s=300)
    dom0.poweroff()
    assert dom0.written_bytes() > 0, "a persistent boot writes, or what is counted is wrong"
    assert not dom0.disk_unchanged()
