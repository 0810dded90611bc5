# SPDX-License-Identifier: GPL-2.0-or-later
"""The formula in the machine, applied by real Salt: what it did, again, dry, and undone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from vm.disk import Disk
from vm.machine import Machine

SALT = "salt-call --local --retcode-passthrough --out=json"
# all that the formula may touch; grubenv and logs are the running system's own
TOUCHED = (
    "cd / && find boot etc/ramboot etc/dracut.conf.d etc/grub.d etc/default etc/fstab"
    " usr/lib/dracut usr/bin/ramboot var/lib/ramboot -xdev ! -name grubenv"
    " -printf '%y %m %U %G %p %l ' \\( -type f -exec sha256sum {} \\; -o -printf '\\n' \\)"
    " 2>/dev/null | sort"
)


def apply(dom0: Machine, state: str, options: str = "") -> dict[str, Any]:
    """Apply a state; returns each state's result."""
    text = dom0.succeed(f"{SALT} state.apply {state} {options} 2>/dev/null", timeout_s=1500)
    return json.loads(text[text.index("{") :])["local"]


def test_apply_twice_dry_and_undone(
    base_disk: Disk, applied_disk: Disk, machine: Callable[..., Machine]
) -> None:
    before = machine(base_disk)
    before.start_direct()
    before.unlock()
    before.shell()
    untouched = before.succeed(TOUCHED, timeout_s=200)
    before.close()

    dom0 = machine(applied_disk)
    # Salt takes a third of the time without Xen
    dom0.start_direct("ramboot=off")
    dom0.unlock()
    dom0.shell()
    applied = dom0.succeed(TOUCHED, timeout_s=200)
    assert "50ramboot" in applied
    assert applied != untouched

    verify = json.loads(dom0.succeed(f"{SALT} ramboot.verify 2>/dev/null", timeout_s=400))["local"]
    assert verify["faults"] == []
    assert any("initrd" in image for image in verify["initramfs"])

    again = apply(dom0, "ramboot")
    assert all(one["result"] for one in again.values())
    assert [one["__id__"] for one in again.values() if one["changes"]] == []

    dry = apply(dom0, "ramboot.absent", "test=True")
    assert any(one["changes"] for one in dry.values()), "the dry run keeps silent"
    assert dom0.succeed(TOUCHED, timeout_s=200) == applied

    undone = apply(dom0, "ramboot.absent")
    assert all(one["result"] for one in undone.values())
    assert dom0.succeed(TOUCHED, timeout_s=200) == untouched

    # and through GRUB and Xen: nothing asks
    dom0.reboot()
    dom0.unlock()
    dom0.shell()
    dom0.fail("test -e /run/ramboot/status.json")
    assert dom0.succeed("findmnt -no SOURCE /") == "/dev/mapper/qubes_dom0-root"
