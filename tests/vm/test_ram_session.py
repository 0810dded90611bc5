# SPDX-License-Identifier: GPL-2.0-or-later
"""RAM sessions: through GRUB and Xen with the image that the formula built, and their controls."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vm import build
from vm.claims import (
    FAILED_UNITS,
    assert_persistent,
    assert_ram_session,
    filled,
    settled,
    status,
)
from vm.disk import Disk
from vm.machine import Machine

MachineMaker = Callable[..., Machine]


def test_yes_at_the_prompt_runs_dom0_from_zram_and_leaves_the_disk_as_it_was(
    applied_disk: Disk, machine: MachineMaker
) -> None:
    dom0 = machine(applied_disk)
    dom0.start()
    dom0.unlock()
    line = dom0.at_prompt()
    assert "zram" in line
    assert "GiB" in line
    assert "[n]" in line
    dom0.answer("y")
    dom0.shell()
    assert dom0.succeed("cat /sys/hypervisor/type") == "xen"
    assert_ram_session(dom0, "zram", "ext4")
    assert dom0.succeed("findmnt -no SOURCE /").startswith("/dev/zram")
    # the watch was started by the boot; the copy itself does not count
    assert filled(dom0)["percent"] < 10
    shown = dom0.succeed("runuser -u nobody -- ramboot status")
    assert "zram" in shown
    assert "warns at 70 and 85 %" in shown
    # the journal goes on, without what was deleted in the blocks that it had allocated ahead
    assert "unwritten" not in dom0.succeed("filefrag -v /var/log/journal/*/system.journal")
    # the volume group is back for the qubes
    assert "vm-work-private" in dom0.succeed("lvs --noheadings -o lv_name qubes_dom0")
    # /boot stays away, the persistent session's files are all here
    dom0.fail("mountpoint -q /boot")
    dom0.succeed("echo gone with the power > /root/note && sync")
    # the formula refuses to change a disk that it does not run from
    said = dom0.fail(
        "salt-call --local --retcode-passthrough state.apply ramboot.preflight", timeout_s=400
    )
    assert "RAM session" in said
    dom0.poweroff()
    assert dom0.disk_unchanged(), f"{dom0.written_bytes()} bytes were written"


def test_once_boots_into_ram_a_single_time_and_the_next_boot_knows_nothing_of_it(
    applied_disk: Disk, machine: MachineMaker
) -> None:
    dom0 = machine(applied_disk)
    dom0.start_direct("ramboot=off")
    dom0.unlock()
    dom0.shell()
    dom0.fail("runuser -u nobody -- ramboot once zram")
    dom0.succeed("ramboot once zram", timeout_s=600)
    dom0.poweroff()
    dom0.start()
    dom0.unlock()
    dom0.shell()
    assert_ram_session(dom0, "zram", "ext4")
    dom0.succeed("echo gone with the power > /root/note && sync")
    dom0.crash()
    dom0.start(arguments="ramboot.timeout=0")  # typed in GRUB's editor
    dom0.unlock()
    dom0.at_prompt()
    dom0.answer("n")
    dom0.shell()
    assert_persistent(dom0, None)
    assert dom0.fail("systemctl is-active ramboot-watch") == "inactive"
    dom0.fail("test -e /root/note")
    assert dom0.succeed("swapon --show=NAME --noheadings") != ""
    dom0.poweroff()
    assert dom0.written_bytes() > 0


@pytest.mark.parametrize("backend", ["tmpfs", "overlay"])
def test_a_menu_entry_needs_no_answer(
    applied_disk: Disk, machine: MachineMaker, backend: str
) -> None:
    """Of zram: see once; of snapshot and image: test_snapshot.py, test_image.py."""
    dom0 = machine(applied_disk)
    # that of overlay is mounted
    root = dom0.root_checksum() if backend == "overlay" else None
    dom0.start(entry=f"in RAM ({backend})")
    dom0.unlock()
    dom0.shell()
    assert dom0.succeed("cat /sys/hypervisor/type") == "xen"
    assert_ram_session(dom0, backend, backend)
    assert filled(dom0)["percent"] < 10
    # qmemman would take its memory away
    assert (
        dom0.succeed("readlink /etc/systemd/system/qubes-meminfo-writer-dom0.service")
        == "/dev/null"
    )
    # the volume group is back for the qubes
    assert "vm-work-private" in dom0.succeed("lvs --noheadings -o lv_name qubes_dom0")
    dom0.poweroff()
    # activating a thin pool writes its superblock
    assert dom0.written_bytes() < 64 << 10
    assert root is None or dom0.root_checksum() == root


# --- without GRUB and Xen: the same initramfs, quicker --------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        pytest.param("ramboot.timeout=4", None, id="nobody-answers"),
        pytest.param("ramboot=snapshoot", "ramboot=snapshoot is unknown", id="unknown-argument"),
    ],
)
def test_these_kernel_arguments_end_in_a_persistent_boot(
    applied_disk: Disk, machine: MachineMaker, arguments: str, reason: str | None
) -> None:
    dom0 = machine(applied_disk)
    dom0.start_direct(arguments)
    dom0.unlock()
    dom0.shell()
    assert_persistent(dom0, reason)


def test_swap_stays_where_the_pillar_says_keep(applied_disk: Disk, machine: MachineMaker) -> None:
    dom0 = machine(applied_disk)
    dom0.start_direct("ramboot=zram", files={CONF: build.configuration(swap="keep") + "\n"})
    dom0.unlock()
    dom0.shell()
    assert status(dom0)["session"] == "ram"
    dom0.succeed("until swapon --show --noheadings | grep -q .; do sleep 1; done", timeout_s=60)
    assert settled(dom0) == "running", dom0.succeed(FAILED_UNITS)


def test_a_bare_console_takes_the_answer_right_after_a_wrong_one(
    applied_disk: Disk, machine: MachineMaker
) -> None:
    dom0 = machine(applied_disk)
    dom0.start_direct("plymouth.enable=0 ramboot.timeout=0")
    dom0.unlock()
    dom0.at_prompt()
    dom0.answer("\x01perhaps\x1b[A" + "s" * 300)
    dom0.wait_for("Please answer y or n")
    dom0.answer("y")
    dom0.wait_for("Copying to RAM:")
    dom0.shell()
    assert_ram_session(dom0, "zram", "ext4")


# --- faults ---------------------------------------------------------------------------------------

CONF = "etc/ramboot/ramboot.conf"
# These take the place of a tool in the initramfs.
KILLER = """#!/bin/sh
for process in /proc/[0-9]*; do
    grep -aq ramboot-initramfs "$process/cmdline" && kill -9 "${process#/proc/}"
done
"""
# Reads nothing and writes nothing, but says that it did.
LYING = """#!/bin/sh
for word; do
    case $word in count=*) echo "${word#count=} bytes copied" >&2 ;; esac
done
"""
NO_ZRAM = """#!/bin/bash
case "$*" in *zram*) exit 1 ;; esac
exec -a modprobe /usr/bin/kmod "$@"
"""


def killed_while_handing_over() -> dict[str, str]:
    """The main script, killed when systemd's units for the disk's root are already replaced."""
    point = "        try 60 systemctl daemon-reload || return 1\n"
    return build.changed_script("ramboot-initramfs.sh", point, point + "        kill -9 $$\n")


def with_floor_reached_midway() -> dict[str, str]:
    """The copy script, with a floor 100 MiB below what is free when the copy begins."""
    point = '    one_of "$ST_BACKEND" snapshot overlay image || say "copying'
    floor = "    CONF_reserve_mib=$((ST_AVAILABLE / MIB - 100))\n"
    return build.changed_script("ramboot-copy.sh", point, floor + point)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        pytest.param(
            {CONF: "version=1\nbackend=$(reboot)\n"}, "is not understood", id="tampered-config"
        ),
        pytest.param({CONF: ""}, "has no line version=", id="empty-config"),
        pytest.param({"usr/bin/dd": LYING}, "e2fsck failed", id="copy-unsound"),
        pytest.param(
            with_floor_reached_midway(),
            "RAM ran out while copying",
            id="ram-full-midway",
        ),
        pytest.param({"usr/sbin/modprobe": NO_ZRAM}, "module zram is not there", id="no-zram"),
        pytest.param({"usr/sbin/tune2fs": KILLER}, "unexpectedly", id="killed"),
        pytest.param(
            killed_while_handing_over(),
            "unexpectedly",
            id="killed-while-handing-over",
        ),
    ],
)
def test_a_fault_ends_in_a_persistent_boot_that_says_so(
    applied_disk: Disk, machine: MachineMaker, files: dict[str, str], reason: str
) -> None:
    dom0 = machine(applied_disk)
    dom0.start_direct("ramboot=zram", files=files)
    dom0.unlock()
    dom0.shell()
    assert_persistent(dom0, reason)


def test_too_little_ram_says_need_and_have(applied_disk: Disk, machine: MachineMaker) -> None:
    dom0 = machine(applied_disk, memory_mib=1700)
    dom0.start_direct("ramboot=zram")
    dom0.unlock()
    dom0.wait_for("not enough RAM for zram")
    dom0.shell()
    assert_persistent(dom0, "available")
