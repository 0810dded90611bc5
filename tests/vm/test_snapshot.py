# SPDX-License-Identifier: GPL-2.0-or-later
"""The backend snapshot: what the machine writes stays in RAM, what it deletes gives RAM back. The
first boot goes through GRUB and Xen with the image that the formula built, the others start an
initramfs built on the host.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vm import build
from vm.build import with_fault
from vm.claims import (
    FAILED_UNITS,
    assert_disk_is_hidden,
    assert_fault_ends_on_disk,
    assert_persistent,
    assert_snapshot_session,
    filled,
    settled,
    status,
)
from vm.disk import LUKS, Disk
from vm.machine import Machine

MachineMaker = Callable[..., Machine]
LAYER = "/dev/mapper/ramboot-layer"
# The zram device under the layer, and the bytes of RAM that it takes.
STORE = "cat /sys/block/zram$(cat /run/ramboot/layer-zram)/mm_stat | awk '{print $3}'"


def work_like_qubes(dom0: Machine) -> None:
    """What qubesd does with volumes at a qube's start and stop, and a qube that writes."""
    dom0.succeed("vgchange -ay qubes_dom0")
    dom0.succeed("lvcreate -q -kn -ay -s -n vm-work-private-snap qubes_dom0/vm-work-private")
    dom0.succeed("mount /dev/qubes_dom0/vm-work-private-snap /mnt")
    dom0.succeed("dd if=/dev/urandom of=/mnt/data bs=1M count=100 conv=fsync status=none")
    dom0.succeed("umount /mnt && lvremove -q -f qubes_dom0/vm-work-private")
    dom0.succeed("lvrename -q qubes_dom0 vm-work-private-snap vm-work-private")
    dom0.succeed("lvcreate -q -V 1G -T qubes_dom0/vm-pool -n vm-secret-volatile")
    dom0.succeed("echo gone with the power > /root/note && sync")


def test_nothing_that_dom0_or_a_qube_writes_reaches_the_disk(
    applied_disk: Disk, machine: MachineMaker
) -> None:
    dom0 = machine(applied_disk)
    dom0.start(entry="in RAM (snapshot)")
    dom0.unlock()
    dom0.shell()
    assert dom0.succeed("cat /sys/hypervisor/type") == "xen"
    assert_snapshot_session(dom0)
    assert filled(dom0)["percent"] < 10
    work_like_qubes(dom0)
    full = int(dom0.succeed(STORE))
    assert full > 100_000_000
    # what is discarded gives its RAM back. Removing a thin volume alone discards nothing; Qubes
    # discards it first (core-admin, qubes/storage/lvm.py, qubes_lvm_coro)
    dom0.succeed("blkdiscard /dev/qubes_dom0/vm-work-private")
    dom0.succeed("lvremove -q -f qubes_dom0/vm-work-private && sync")
    assert int(dom0.succeed(STORE)) < full - 90_000_000
    dom0.poweroff()
    assert dom0.written_bytes() == 0
    assert dom0.disk_unchanged()


def test_a_write_protected_disk_is_sealed_below_a_copy(machine: MachineMaker) -> None:
    """LVM activates no thin pool on it, and without one dracut would wait for the root in vain."""
    dom0 = machine(build.base(), read_only=True)
    dom0.start_direct("ramboot=zram", initrd=build.initramfs())
    dom0.unlock()
    dom0.shell()
    told = status(dom0)
    assert (told["session"], told["backend"], told["disk"]) == ("ram", "zram", "readonly")
    assert told["reason"] == "the disk is write-protected: it is sealed (readonly)"
    assert settled(dom0) == "running", dom0.succeed(FAILED_UNITS)
    assert dom0.succeed("pvs --noheadings -o pv_name").split() == ["/dev/mapper/ramboot-seal"]
    dom0.poweroff()


def test_a_write_protected_disk_boots(machine: MachineMaker) -> None:
    dom0 = machine(build.base(), read_only=True)
    dom0.start_direct(initrd=build.initramfs(), files=build.asking_for("snapshot"))
    dom0.unlock()
    assert "snapshot" in dom0.at_prompt()
    dom0.answer("y")
    dom0.shell()
    assert_snapshot_session(dom0)
    work_like_qubes(dom0)


@pytest.mark.parametrize("root", ["", f"root={LUKS}"], ids=["by-uuid", "by-name"])
def test_a_root_on_btrfs_lies_on_the_layer_itself(machine: MachineMaker, root: str) -> None:
    dom0 = machine(build.base("luks-btrfs"))
    # this initramfs has no crypttab
    dom0.start_direct(f"ramboot=snapshot rd.luks.options=discard {root}", initrd=build.initramfs())
    dom0.unlock()
    dom0.shell()
    told = status(dom0)
    assert (told["session"], told["backend"], told["reason"]) == ("ram", "snapshot", None)
    assert told["source"]["device"] == LUKS
    assert settled(dom0) == "running", dom0.succeed(FAILED_UNITS)
    assert_disk_is_hidden(dom0)
    assert dom0.succeed("findmnt -vno SOURCE,FSTYPE /").split() == [LAYER, "btrfs"]
    # the disk below has the same UUID, and nothing finds it by that, btrfs itself included
    assert dom0.succeed("readlink -f $(findfs UUID=$(findmnt -no UUID /))") == dom0.succeed(
        f"readlink -f {LAYER}"
    )
    assert LAYER in dom0.succeed("btrfs filesystem show / 2>/dev/null")
    dom0.fail(f"mount {LUKS} /mnt")
    assert dom0.succeed("ls /sys/block/dm-0/holders | wc -l") == "1"
    # nothing else of the disk is in use
    assert dom0.succeed("swapon --show --noheadings") == ""
    assert dom0.succeed("findmnt -rno TARGET -t ext4,vfat || true") == ""
    dom0.succeed("dd if=/dev/urandom of=/root/data bs=1M count=100 conv=fsync status=none")
    full = int(dom0.succeed(STORE))
    assert full > 100_000_000
    dom0.succeed("rm /root/data && sync && fstrim /")
    assert int(dom0.succeed(STORE)) < full - 90_000_000
    dom0.poweroff()
    assert dom0.written_bytes() == 0
    assert dom0.disk_unchanged()


def test_a_root_on_btrfs_is_the_disks_again_when_the_layer_is_taken_back(
    machine: MachineMaker,
) -> None:
    failing = with_fault("ramboot-initramfs.sh", '    try 10 mount --move "$RUN/root/root"')
    dom0 = machine(build.base("luks-btrfs"))
    assert_fault_ends_on_disk(dom0, "ramboot=snapshot", failing, LUKS)
    assert dom0.succeed("swapon --show --noheadings") != ""
    before = dom0.written_bytes()
    dom0.succeed("dd if=/dev/urandom of=/root/data bs=1M count=4 conv=fsync status=none")
    assert dom0.written_bytes() - before >= 4 << 20


# Its LVM has a device of its own in mind, whatever the layer's configuration says.
STUBBORN = "#!/bin/sh\necho /dev/mapper/ramboot-layer /dev/sdz1\n"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        pytest.param(
            {"usr/sbin/chroot": STUBBORN}, "would use other devices", id="lvm-sees-the-disk"
        ),
        pytest.param({"usr/bin/mountpoint": "#!/bin/sh\nexit 0\n"}, "is busy", id="root-busy"),
    ],
)
def test_a_snapshot_that_is_not_safe_is_taken_back(
    machine: MachineMaker, files: dict[str, str], reason: str
) -> None:
    dom0 = machine(build.base())
    dom0.start_direct("ramboot=snapshot", initrd=build.initramfs(), files=files)
    dom0.unlock()
    dom0.shell()
    assert_persistent(dom0, reason)
