# SPDX-License-Identifier: GPL-2.0-or-later
"""The formula in the machine, by real Salt: applied again, with a later kernel, undone, cut off
by the power twice, with another pillar, and undone again. Without Xen, where Salt takes a third of
the time; the last boot goes through GRUB and Xen, and is the control: what the others take an
ordinary boot for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from vm.build import TOUCHED, before_applied
from vm.claims import FAILED_UNITS, assert_persistent, settled
from vm.disk import Disk
from vm.machine import Machine

MachineMaker = Callable[..., Machine]
SALT = "salt-call --local --retcode-passthrough --out=json"
# A kernel as a package brings it, with the hooks that the package calls, without us.
NEW_KERNEL = """(
set -e
old=$(uname -r)
mkdir /lib/modules/$old.later
cp -al /lib/modules/$old/. /lib/modules/$old.later/
cp /boot/vmlinuz-$old /boot/vmlinuz-$old.later
cp /boot/config-$old /boot/config-$old.later
depmod $old.later
run-parts --arg=$old.later --arg=/boot/vmlinuz-$old.later /etc/kernel/postinst.d
)"""
REMOVE_IT = "rm -r /lib/modules/*.later /boot/*.later && update-grub"
ALL_OF_IT = "{ramboot: {swap: 'off', grub: {dom0_mem_scope: all, entries: [zram, snapshot]}}}"
# dracut is at work on an image; or Salt, begun last, has ended without it
BUILDING = (
    "until ls /boot/.ramboot-* 2>/dev/null; do kill -0 $! || break; sleep 0.2; done;"
    " ls /boot/.ramboot-*"
)


def apply(dom0: Machine, state: str, options: str = "") -> dict[str, Any]:
    """Apply a state; returns each state's result."""
    text = dom0.succeed(f"{SALT} state.apply {state} {options} 2>/dev/null", timeout_s=1500)
    return json.loads(text[text.index("{") :])["local"]


def call(dom0: Machine, function: str) -> Any:
    """What a function of the module `ramboot` returns."""
    text = dom0.succeed(f"{SALT} ramboot.{function} 2>/dev/null", timeout_s=400)
    return json.loads(text[text.index("{") :])["local"]


def touched(dom0: Machine) -> list[str]:
    """All that the formula may touch, a line each."""
    return dom0.succeed(TOUCHED, timeout_s=200).splitlines()


def boots(dom0: Machine, arguments: str = "") -> None:
    dom0.start_direct(arguments)
    dom0.unlock()
    dom0.shell()


def test_applied_again_undone_cut_off_and_undone_again(
    applied_disk: Disk, machine: MachineMaker
) -> None:
    before = before_applied(applied_disk)
    dom0 = machine(applied_disk)
    boots(dom0, "ramboot=off")
    assert_persistent(dom0, None)
    assert any("50ramboot" in line for line in touched(dom0))
    assert call(dom0, "verify")["faults"] == []

    again = apply(dom0, "ramboot")
    assert all(one["result"] for one in again.values())
    assert [one["__id__"] for one in again.values() if one["changes"]] == []

    dom0.succeed(NEW_KERNEL, timeout_s=400)
    images = call(dom0, "initramfs")
    later = next(kernel for kernel in images if kernel.endswith(".later"))
    assert images[later]["state"] == "current", images[later]

    with_it = touched(dom0)
    dry = apply(dom0, "ramboot.absent", "test=True")
    assert any(one["changes"] for one in dry.values()), "the dry run keeps silent"
    assert touched(dom0) == with_it

    undone = apply(dom0, "ramboot.absent")
    assert all(one["result"] for one in undone.values())
    dom0.fail(f"lsinitrd /boot/initrd.img-{later} | grep -q ramboot")
    dom0.fail("grep -q ramboot /boot/grub/grub.cfg")
    dom0.succeed(REMOVE_IT)
    clean = touched(dom0)
    # update-grub words it otherwise than the installer did
    assert [x for x in clean if "grub.cfg" not in x] == [x for x in before if "grub.cfg" not in x]

    # the power fails in the middle of an image
    dom0.succeed(f"echo {ALL_OF_IT!r} > /srv/pillar/ramboot.sls && sync")
    dom0.succeed("salt-call --local state.apply ramboot >/dev/null 2>&1 & true")
    dom0.succeed(BUILDING, timeout_s=900)
    dom0.crash()
    boots(dom0)
    dom0.fail("test -e /run/ramboot/status.json")  # the old image is there as it was
    # and again when grub.cfg has just been replaced
    old = dom0.succeed("stat -c %i /boot/grub/grub.cfg").strip()
    dom0.succeed("salt-call --local state.apply ramboot >/dev/null 2>&1 & true")
    dom0.succeed(
        f"until [ $(stat -c %i /boot/grub/grub.cfg) != {old} ]; do sleep 0.1; done", timeout_s=900
    )
    dom0.crash()
    boots(dom0, "ramboot=off")
    dom0.succeed("grub-script-check /boot/grub/grub.cfg && grep -q ramboot /boot/grub/grub.cfg")
    done = apply(dom0, "ramboot")
    assert all(one["result"] for one in done.values())
    assert dom0.succeed("swapon --show --noheadings") == ""
    assert call(dom0, "verify")["faults"] == []
    assert dom0.succeed("grep -c 'dom0_mem=.*max:10240M' /boot/grub/grub.cfg") != "0"
    undone = apply(dom0, "ramboot.absent")
    assert all(one["result"] for one in undone.values())
    assert touched(dom0) == clean
    assert dom0.succeed("swapon --show --noheadings") != ""
    dom0.poweroff()

    dom0.start()
    dom0.unlock()
    dom0.shell()
    dom0.fail("test -e /run/ramboot/status.json")
    root = dom0.succeed("findmnt -no SOURCE,FSTYPE /")
    assert root.split() == ["/dev/mapper/qubes_dom0-root", "ext4"]
    assert dom0.succeed("cat /sys/hypervisor/type") == "xen"
    assert settled(dom0) == "running", dom0.succeed(FAILED_UNITS)
    assert dom0.succeed("swapon --show=NAME --noheadings").startswith("/dev/dm-")
    dom0.poweroff()
    assert dom0.written_bytes() > 0, "a persistent boot writes, or what is counted is wrong"
    assert not dom0.disk_unchanged()
