# SPDX-License-Identifier: GPL-2.0-or-later
"""The disk policies readonly and detached, and the backend overlay. Each policy once through GRUB
and Xen with the image that the formula built; the others start an initramfs built on the host.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from vm import build
from vm.build import with_fault
from vm.claims import (
    FAILED_UNITS,
    assert_disk_is_closed,
    assert_disk_is_hidden,
    assert_fault_ends_on_disk,
    assert_persistent,
    assert_ram_session,
    settled,
    status,
)
from vm.disk import LUKS, Disk
from vm.machine import Machine

MachineMaker = Callable[..., Machine]
# A wait of systemd's becomes one that no slow machine's power-off takes.
LONG_WAITS = """
mkdir -p /run/systemd/system.conf.d
cat > /run/systemd/system.conf.d/test.conf <<'E'
[Manager]
DefaultTimeoutStopSec=1h
DefaultDeviceTimeoutSec=1h
E
systemctl daemon-reload
"""
# How long a session stays before its disk is pulled, and after; by hand: RAMBOOT_STAY_S=3600
STAY_S = float(os.environ.get("RAMBOOT_STAY_S", "0"))
# As a qube writes: past the page cache, so that an error is the writer's.
WRITE = "dd if=/dev/urandom bs=1M count=4 oflag=direct conv=notrunc status=none"


def poweroff_without_waiting(dom0: Machine) -> None:
    """systemd waits for no device and no unit that does not stop."""
    dom0.succeed(LONG_WAITS)
    assert dom0.succeed("systemctl show --value -p DefaultTimeoutStopUSec") == "1h"
    dom0.poweroff(900)


def test_a_sealed_disk_refuses_every_write(applied_disk: Disk, machine: MachineMaker) -> None:
    dom0 = machine(applied_disk)
    dom0.start(arguments="ramboot.disk=readonly ramboot.timeout=0")
    dom0.unlock()
    dom0.at_prompt()
    said = "no qube on the disk will start, network and USB qubes included"
    assert said in dom0.console.transcript.text()
    dom0.answer("y")
    dom0.shell()
    assert dom0.succeed("cat /sys/hypervisor/type") == "xen"
    told = status(dom0)
    assert (told["session"], told["disk"], told["reason"]) == ("ram", "readonly", None)
    assert settled(dom0) == "running", dom0.succeed(FAILED_UNITS)
    assert_disk_is_hidden(dom0)
    volume, seal = "/dev/qubes_dom0/vm-work-private", "/dev/mapper/ramboot-seal"
    assert dom0.succeed("pvs --noheadings -o pv_name").split() == [seal]
    # what a qube has can be read, once LVM's own activation is through
    dom0.succeed(f"timeout 290 sh -c 'until [ -e {volume} ]; do sleep 1; done'")
    dom0.succeed(f"mount -o ro,noload {volume} /mnt && umount /mnt")
    for attempt in (
        # qubesd: a qube's start, a new qube, one removed
        "lvcreate -kn -ay -s -n vm-work-private-snap qubes_dom0/vm-work-private",
        "lvcreate -V 100M --thinpool vm-pool -n vm-new-private qubes_dom0",
        "lvremove -f qubes_dom0/vm-work-root",
        # a running qube: what is there, what is new, a file system
        f"{WRITE} of={volume}",
        f"{WRITE} of={volume} seek=900",
        f"mount {volume} /mnt",
        # under the pools, the read-only flags taken away
        f"blockdev --setrw /dev/loop[0-9] {seal}; {WRITE} of={seal} seek=100",
        f"blkdiscard -f -z {seal}",
    ):
        # 124: it hung
        dom0.succeed(
            f"timeout -k 5 30 sh -c '{attempt}'; code=$?; test $code != 0 -a $code -lt 124"
        )
    # a thin pool takes a discard, and takes it back when its metadata can't be written
    dom0.succeed(f"blkdiscard -f {volume}; sync")
    dom0.succeed(f"mount -o ro,noload {volume} /mnt && umount /mnt")
    poweroff_without_waiting(dom0)
    assert dom0.written_bytes() == 0
    assert dom0.disk_unchanged()


def test_a_detached_disk_can_be_pulled_under_xen(applied_disk: Disk, machine: MachineMaker) -> None:
    dom0 = machine(applied_disk)
    dom0.start(entry="in RAM (zram)", arguments="ramboot.disk=detached")
    dom0.unlock()
    dom0.shell()
    assert dom0.succeed("cat /sys/hypervisor/type") == "xen"
    assert_disk_can_be_pulled(dom0)


@pytest.mark.parametrize(("layout", "backend"), [("luks-btrfs", "tmpfs"), ("thin", "zram")])
def test_a_detached_disk_can_be_pulled(machine: MachineMaker, layout: str, backend: str) -> None:
    dom0 = machine(build.base(layout))
    dom0.start_direct(f"ramboot={backend} ramboot.disk=detached", initrd=build.initramfs())
    dom0.unlock()
    dom0.shell()
    assert_disk_can_be_pulled(dom0)


def assert_disk_can_be_pulled(dom0: Machine) -> None:
    told = status(dom0)
    assert (told["session"], told["disk"], told["reason"]) == ("ram", "detached", None)
    assert settled(dom0) == "running", dom0.succeed(FAILED_UNITS)
    assert_disk_is_hidden(dom0)
    assert_disk_is_closed(dom0)
    # without LUKS the disk is there still
    assert dom0.succeed("pvs --noheadings") == ""
    time.sleep(STAY_S)
    assert dom0.written_bytes() == 0
    dom0.pull_disk()
    dom0.succeed(
        "for i in $(seq 120); do test -e /dev/vda || break; sleep 1; done; ! test -e /dev/vda", 300
    )
    dom0.succeed(
        "echo gone with the power > /root/note && sync && systemctl restart systemd-logind"
    )
    time.sleep(STAY_S)
    assert settled(dom0) == "running"
    # nothing waits for it, nor at the end
    dom0.fail("journalctl -b -o cat | grep 'Timed out waiting for device'")
    poweroff_without_waiting(dom0)
    assert dom0.disk_unchanged()


@pytest.mark.parametrize("layout", ["luks-btrfs", "lvm-xfs"])
def test_an_overlay_keeps_dom0s_writes_in_ram(machine: MachineMaker, layout: str) -> None:
    """On LVM thin: its menu entry (test_ram_session.py)."""
    dom0 = machine(build.base(layout))
    dom0.start_direct(initrd=build.initramfs(), files=build.asking_for("overlay"))
    dom0.unlock()
    assert "overlay" in dom0.at_prompt()
    dom0.answer("y")
    dom0.shell()
    assert_ram_session(dom0, "overlay", "overlay")
    dom0.succeed("dd if=/dev/urandom of=/root/data bs=1M count=50 status=none && sync")
    dom0.poweroff()
    assert dom0.written_bytes() == 0
    assert dom0.disk_unchanged()


def test_an_overlay_over_a_dirty_journal_is_refused(machine: MachineMaker) -> None:
    # ext4's: tests/scripts
    dom0 = machine(build.base("lvm-xfs"))
    dom0.start_direct("ramboot=off", initrd=build.initramfs())
    dom0.unlock()
    dom0.shell()
    dom0.succeed("touch /root/note && sync")
    dom0.crash()
    dom0.start_direct("ramboot=overlay", initrd=build.initramfs())
    dom0.unlock()
    dom0.shell()
    assert_persistent(dom0, "not left in good order")


def test_an_overlay_that_fails_midway_leaves_the_disk_writable(machine: MachineMaker) -> None:
    failing = with_fault("ramboot-overlay.sh", '    overlay_is_whole "$RUN/root/root" &&')
    dom0 = machine(build.base("luks-btrfs"))
    assert_fault_ends_on_disk(dom0, "ramboot=overlay", failing, LUKS)
    dom0.succeed("touch /root/note && sync")


def test_a_fault_after_the_seal_ends_on_the_disk(machine: MachineMaker) -> None:
    """Killed there: nobody scans for volumes any more, and the layer holds them."""
    point = '    try 10 mount --move "$RUN/root/root"'
    killed = build.changed_script("ramboot-initramfs.sh", point, f"    kill -9 $$\n{point}")
    dom0 = machine(build.base())
    # the seal and the layer are gone, the volume group is the disk's
    arguments = "ramboot=zram ramboot.disk=readonly"
    assert_fault_ends_on_disk(dom0, arguments, killed, said="ramboot ended unexpectedly")
    assert dom0.succeed("losetup --list --noheadings") == ""
    before = dom0.written_bytes()
    # what the seal refuses
    dom0.succeed(f"touch /root/note && {WRITE} of=/dev/qubes_dom0/vm-work-private")
    assert dom0.written_bytes() - before >= 4 << 20


def test_a_detached_snapshot_is_a_contradiction(machine: MachineMaker) -> None:
    dom0 = machine(build.base())
    dom0.start_direct("ramboot=snapshot ramboot.disk=detached", initrd=build.initramfs())
    dom0.unlock()
    dom0.shell()
    assert_persistent(dom0, "can't be detached")
