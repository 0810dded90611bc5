# SPDX-License-Identifier: GPL-2.0-or-later
"""The backend overlay, and the disk policy detached."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vm import build
from vm.build import REPOSITORY
from vm.claims import assert_persistent, assert_ram_session, settled, status
from vm.machine import Machine

MachineMaker = Callable[..., Machine]


def test_an_overlay_keeps_dom0s_writes_in_ram(machine: MachineMaker) -> None:
    dom0 = machine(build.base())
    dom0.start_direct("ramboot=overlay", initrd=build.initramfs())
    dom0.unlock()
    dom0.shell()
    assert_ram_session(dom0, "overlay", "overlay")
    dom0.succeed("dd if=/dev/urandom of=/root/data bs=1M count=50 status=none && sync")
    # qubes on the disk work
    assert "vm-work-private" in dom0.succeed("lvs --noheadings -o lv_name qubes_dom0")
    dom0.poweroff()
    # activating a thin pool writes its superblock
    assert dom0.written_bytes() < 64 << 10


def test_an_overlay_over_a_dirty_journal_is_refused(machine: MachineMaker) -> None:
    dom0 = machine(build.base())
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
    part = "ramboot/initramfs/files/50ramboot/ramboot-overlay.sh"
    text = (REPOSITORY / part).read_text(encoding="utf-8")
    point = '    root_check "$RUN/root/root" &&'
    assert text.count(point) == 1
    failing = text.replace(point, f"    reason='injected fault'\n    return 1\n{point}")
    dom0 = machine(build.base())
    dom0.start_direct(
        "ramboot=overlay",
        initrd=build.initramfs(),
        files={"usr/lib/ramboot/ramboot-overlay.sh": failing},
    )
    dom0.unlock()
    dom0.shell()
    assert_persistent(dom0, "injected fault")
    dom0.succeed("touch /root/note && sync")


@pytest.mark.parametrize(("layout", "backend"), [("luks-thin", "zram"), ("luks-btrfs", "tmpfs")])
def test_a_detached_disk_can_be_pulled(machine: MachineMaker, layout: str, backend: str) -> None:
    dom0 = machine(build.base(layout))
    dom0.start_direct(f"ramboot={backend} ramboot.disk=detached", initrd=build.initramfs())
    dom0.unlock()
    dom0.shell()
    told = status(dom0)
    assert (told["session"], told["disk"], told["reason"]) == ("ram", "detached", None)
    assert settled(dom0) == "running", dom0.succeed("systemctl --failed --plain --no-legend")
    # no mapping, and with it no key, is left in the kernel
    assert dom0.succeed("dmsetup ls") == "No devices found"
    assert dom0.written_bytes() == 0
    dom0.pull_disk()
    dom0.succeed(
        "for i in $(seq 20); do test -e /dev/vda || break; sleep 1; done; ! test -e /dev/vda"
    )
    dom0.succeed(
        "echo gone with the power > /root/note && sync && systemctl restart systemd-logind"
    )
    assert settled(dom0) == "running"
    dom0.poweroff()
    assert dom0.disk_unchanged()


def test_a_detached_snapshot_is_a_contradiction(machine: MachineMaker) -> None:
    dom0 = machine(build.base())
    dom0.start_direct("ramboot=snapshot ramboot.disk=detached", initrd=build.initramfs())
    dom0.unlock()
    dom0.shell()
    assert_persistent(dom0, "can't be detached")
