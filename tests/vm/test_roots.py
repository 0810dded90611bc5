# SPDX-License-Identifier: GPL-2.0-or-later
"""Every kind of root (thin without LUKS: test_splash.py), an initramfs without systemd, and one as
old as that of R4.2. The initramfs is built on the host and started without GRUB and Xen.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vm import build
from vm.claims import assert_persistent, assert_ram_session, assert_snapshot_session
from vm.machine import Machine

MachineMaker = Callable[..., Machine]
# What dracut 10x brings of systemd; without it dracut's own init runs the hooks.
NO_SYSTEMD = ("--omit", "systemd systemd-initrd systemd-cryptsetup dracut-systemd plymouth")
# What an image for a root on a partition alone has not.
BARE = ("--omit", "crypt lvm btrfs")
FAILING = "#!/bin/sh\necho 'injected fault' >&2\nexit 1\n"


@pytest.mark.parametrize(
    ("layout", "backend", "root", "disk"),
    [
        ("ext4", "zram", "ext4", "attached"),
        ("lvm-xfs", "tmpfs", "tmpfs", "readonly"),
        ("luks-btrfs", "zram", "ext4", "attached"),
    ],
)
def test_a_ram_session_from(
    machine: MachineMaker, layout: str, backend: str, root: str, disk: str
) -> None:
    dom0 = machine(build.base(layout))
    image = build.initramfs(*(BARE if layout == "ext4" else ()))
    dom0.start_direct(f"ramboot={backend} ramboot.disk={disk}", initrd=image)
    dom0.unlock()
    dom0.shell()
    assert_ram_session(dom0, backend, root, disk)
    if disk == "readonly":
        # plain LVM, on a partition; LVM's own activation takes a while
        volume = "/dev/qubes_dom0/root"
        dom0.succeed(f"timeout 290 sh -c 'until [ -e {volume} ]; do sleep 1; done'")
        dom0.succeed(f"mount -o ro,norecovery {volume} /mnt && test -d /mnt/etc && umount /mnt")
        dom0.fail(f"mount {volume} /mnt")
        dom0.fail(f"dd if=/dev/zero of={volume} bs=1M count=1 oflag=direct conv=notrunc")
        dom0.fail("lvcreate -y -L 100M -n new qubes_dom0")
    dom0.poweroff()
    assert dom0.disk_unchanged(), f"{dom0.written_bytes()} bytes were written"


def test_without_luks_it_is_asked_too(machine: MachineMaker) -> None:
    dom0 = machine(build.base("thin"))
    dom0.start_direct(initrd=build.initramfs())
    dom0.at_prompt()
    dom0.answer("n")
    dom0.shell()
    assert_persistent(dom0, None)


def test_without_systemd_in_the_initramfs(machine: MachineMaker) -> None:
    dom0 = machine(build.base())
    dom0.start_direct("ramboot.timeout=120", initrd=build.initramfs(*NO_SYSTEMD))
    dom0.unlock()
    dom0.at_prompt()
    dom0.answer("y")
    dom0.shell()
    assert_ram_session(dom0, "zram", "ext4")
    dom0.poweroff()
    assert dom0.disk_unchanged(), f"{dom0.written_bytes()} bytes were written"


def test_a_fault_without_systemd_in_the_initramfs(machine: MachineMaker) -> None:
    dom0 = machine(build.base())
    dom0.start_direct(
        "ramboot=zram", initrd=build.initramfs(*NO_SYSTEMD), files={"usr/bin/dd": FAILING}
    )
    dom0.unlock()
    dom0.shell()
    assert_persistent(dom0, "the copy failed")


# The root has no modules for that kernel, so what needs one stays out.
WITHOUT_MODULES = " ".join(
    f"systemd.mask={unit}"
    for unit in (
        "proc-sys-fs-binfmt_misc.automount",
        "proc-sys-fs-binfmt_misc.mount",
        "systemd-binfmt.service",
    )
)


@pytest.mark.parametrize(
    ("backend", "disk"), [("zram", "readonly"), ("tmpfs", "attached"), ("snapshot", "attached")]
)
def test_with_dracut_059_as_in_r42(machine: MachineMaker, backend: str, disk: str) -> None:
    dom0 = machine(build.base())
    dom0.start_direct(
        f"ramboot.disk={disk} {WITHOUT_MODULES}",
        kernel=build.kernel("4.2"),
        initrd=build.initramfs(release="4.2"),
        files=build.asking_for(backend),
    )
    dom0.unlock()
    assert backend in dom0.at_prompt()
    dom0.answer("y")
    dom0.shell()
    assert dom0.succeed("uname -r").startswith("6.1.")
    if backend == "snapshot":
        assert_snapshot_session(dom0)
        dom0.succeed("echo gone with the power > /root/note && sync")
    else:
        assert_ram_session(dom0, backend, "ext4" if backend == "zram" else "tmpfs", disk)
    dom0.poweroff()
    assert dom0.disk_unchanged(), f"{dom0.written_bytes()} bytes were written"
