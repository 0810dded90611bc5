# SPDX-License-Identifier: GPL-2.0-or-later
"""The backend image: the formula builds it in the machine, the next boots read it into RAM. The
initramfs is built on the host; all but the menu entry starts it without GRUB and Xen.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vm import build
from vm.claims import (
    FAILED_UNITS,
    assert_disk_is_closed,
    assert_disk_is_hidden,
    assert_persistent,
    settled,
    status,
)
from vm.disk import Disk
from vm.machine import Machine

MachineMaker = Callable[..., Machine]
STATE = "salt-call --local --retcode-passthrough state"
APPLY = f"{STATE}.apply ramboot.image"
UNIT = "/etc/systemd/system/ramboot-image-shutdown.service"
# quick to build
PILLAR = "ramboot: {image: {level: 1, rebuild: background}}\n"


@pytest.fixture(scope="session")
def image_disk() -> Disk:
    """The machine after `state.apply ramboot.image`, the second run of which changes nothing, and
    after a shutdown that built the image once more.
    """
    return build.with_formula("image", build.base(), PILLAR, with_image)


def with_image(start: Disk, payload: Path, place: Path) -> None:
    results = build.cache_dir() / "results" / "image"
    shutil.rmtree(results, ignore_errors=True)
    with Machine(start, "image-built", results, payload=payload) as dom0:
        dom0.start_direct("ramboot=off", initrd=build.initramfs())
        dom0.unlock()
        dom0.shell()
        dom0.install_payload()
        dom0.succeed("salt-call --local saltutil.sync_all", timeout_s=300)
        dom0.succeed(APPLY, timeout_s=600)
        assert "holds the root as it is" in dom0.succeed(APPLY, timeout_s=300)
        assert "ramboot-image" not in dom0.succeed("lvs; mount")
        # what the timer does in later boots; now there is nothing to do
        dom0.succeed("systemctl daemon-reload")
        assert "ramboot-image.timer" in dom0.succeed("systemctl show -P Wants timers.target")
        dom0.succeed("systemctl start ramboot-image.service", timeout_s=300)
        assert "the image is current" in dom0.succeed("journalctl -u ramboot-image.service")
        # its units alone: all of the state would build right now, for units lie in /etc
        dom0.succeed("sed -i s/background/shutdown/ /srv/pillar/ramboot.sls")
        dom0.succeed(f"{STATE}.sls_id ramboot-image-shutdown-active ramboot.image")
        dom0.succeed("echo changed last > /etc/ramboot-note")
        dom0.poweroff(600)
        told = dom0.console.transcript.text()
        for line in (
            "the image is built anew: changed since .*/etc",
            "building the image: [0-9]+ %",
            "the image has been built anew",
        ):
            assert re.search(f"ramboot: {line}", told), dom0.console.transcript.last_lines()
        dom0.disk.path.rename(place)


def test_a_root_from_an_image_runs_without_the_disk(
    image_disk: Disk, machine: MachineMaker
) -> None:
    dom0 = machine(image_disk)
    dom0.start_direct(initrd=build.initramfs(), files=build.asking_for("image", disk="detached"))
    dom0.unlock()
    assert "image" in dom0.at_prompt()
    dom0.answer("y")
    dom0.wait_for("reading the image of 20")
    dom0.shell()
    told = status(dom0)
    assert (told["session"], told["backend"], told["disk"]) == ("ram", "image", "detached")
    # neither shutting down nor the boot before made it stale
    assert told["reason"] is None
    assert dom0.succeed("findmnt -no FSTYPE,SOURCE /").split() == ["overlay", "ramboot-image"]
    assert settled(dom0) == "running", dom0.succeed(FAILED_UNITS)
    assert_disk_is_hidden(dom0)
    assert_disk_is_closed(dom0)
    assert dom0.succeed("swapon --show --noheadings") == ""
    dom0.fail("mountpoint -q /boot")
    assert dom0.succeed("ls -A /var/lib/ramboot/image") == ""
    # the image's device, which udev has seen again since, is none for qubes
    known = dom0.succeed("udevadm info --query=property --name=$(losetup -nO NAME)")
    assert "QUBES_EXPORT_BLOCK_DEVICE=0" in known
    assert "DM_UDEV_DISABLE_DISK_RULES_FLAG=1" in known
    assert dom0.succeed("cat /etc/ramboot-note") == "changed last"
    assert dom0.fail("systemctl is-active ramboot-image-shutdown") == "inactive"
    reporter = "/etc/systemd/system/qubes-meminfo-writer-dom0.service"
    assert dom0.succeed(f"readlink {reporter}") == "/dev/null"
    dom0.succeed("rm /etc/hostname && echo gone with the power > /root/note && sync")
    dom0.poweroff()
    assert dom0.written_bytes() == 0
    assert dom0.disk_unchanged()


# A subvolume that fstab mounts, one that lies in /, and one that is excluded.
SUBVOLUMES = """set -e
device=$(findmnt -vno SOURCE /)
mount -o subvolid=5 "$device" /mnt
btrfs -q subvolume create /mnt/home
echo on its own > /mnt/home/note
umount /mnt
echo "UUID=$(findmnt -no UUID /) /home btrfs subvol=home 0 0" >> /etc/fstab
btrfs -q subvolume create /srv/nested
echo nested > /srv/nested/note
btrfs -q subvolume create /srv/excluded
"""
BTRFS_PILLAR = "ramboot: {image: {level: 1}, copy: {exclude: [/srv/excluded]}}\n"


def test_an_image_of_btrfs_holds_all_of_its_subvolumes(
    machine: MachineMaker, tmp_path: Path
) -> None:
    payload = build.formula_payload(tmp_path / "payload.tar", BTRFS_PILLAR)
    dom0 = machine(build.base("luks-btrfs"), payload=payload)
    dom0.start_direct("ramboot=off", initrd=build.initramfs())
    dom0.unlock()
    dom0.shell()
    dom0.install_payload()
    dom0.succeed(f"cat > /root/subvolumes <<'E'\n{SUBVOLUMES}E\nsh /root/subvolumes")
    dom0.succeed("salt-call --local saltutil.sync_all", timeout_s=300)
    # afterwards the state itself looks whether the image is stale
    dom0.succeed(APPLY, timeout_s=600)
    assert "ramboot-image" not in dom0.succeed("btrfs subvolume list /; mount")
    dom0.poweroff()

    dom0.start_direct("ramboot=image ramboot.disk=detached", initrd=build.initramfs())
    dom0.unlock()
    dom0.shell()
    told = status(dom0)
    assert (told["session"], told["backend"], told["disk"]) == ("ram", "image", "detached")
    # what the boot finds on the disk is what the image was built from
    assert told["reason"] is None
    assert settled(dom0) == "running", dom0.succeed(FAILED_UNITS)
    assert_disk_is_hidden(dom0)
    assert dom0.succeed("findmnt -no FSTYPE,SOURCE /").split() == ["overlay", "ramboot-image"]
    assert_disk_is_closed(dom0)
    assert dom0.succeed("cat /home/note /srv/nested/note") == "on its own\nnested"
    dom0.fail("test -e /srv/excluded")
    assert dom0.succeed("ls -A /var/lib/ramboot/image") == ""
    dom0.poweroff()
    assert dom0.written_bytes() == 0


# Copies well, but for one bit of the second chunk that comes by.
FLIPPING = """#!/bin/bash
/usr/bin/dd.real "$@" || exit 1
for word; do
    case $word in
    of=*) file=${word#of=} ;;
    seek=1) printf x | /usr/bin/dd.real of="$file" bs=1 seek=20000000 conv=notrunc status=none ;;
    esac
done
"""


def test_a_damaged_image_ends_in_a_persistent_boot(image_disk: Disk, machine: MachineMaker) -> None:
    dom0 = machine(image_disk)
    dd = next((build.tree() / "usr/bin").glob("dd"))
    dom0.start_direct(
        "ramboot=image",
        initrd=build.initramfs(),
        files={"usr/bin/dd": FLIPPING, "usr/bin/dd.real": Path(dd)},
    )
    dom0.unlock()
    dom0.shell()
    assert_persistent(dom0, "the image is damaged between 16 and 32 MiB")
    # the end of each boot builds it anew; a build that hangs keeps no machine on. Salt takes some
    # of its minute to begin
    assert dom0.succeed("systemctl is-active ramboot-image-shutdown") == "active"
    dom0.succeed(f"sed -i 's/ 20m / 60s /' {UNIT} && systemctl daemon-reload")
    dom0.succeed("printf '#!/bin/sh\\nsleep infinity\\n' > /usr/bin/mksquashfs")
    dom0.poweroff()
    told = dom0.console.transcript.text()
    assert "the image is built anew: changed since" in told
    assert "the old one stays" in told


IMAGE = "/var/lib/ramboot/image"
# Laid in the boot before, the last fault taken back; the file's last byte is padding, and zero.
FAULTS = (
    ("mv root-*.squashfs kept", "is missing on"),
    ("mv kept $(sed -n s/^file=//p manifest); truncate -s -1 root-*", "bytes instead of"),
)
ENTRY_PILLAR = "ramboot: {grub: {entries: [image]}, image: {stale: use-and-say}}"
STALE = "is stale: changed since: configuration (/etc)"


def test_a_faulty_image_is_not_used_and_a_stale_one_not_in_silence(
    image_disk: Disk, machine: MachineMaker
) -> None:
    """Each boot finds what was laid in the one before."""
    # what ramboot.initramfs would put into /boot
    packed = build.initramfs(settings={"image": {"stale": "use-and-say"}})
    dom0 = machine(image_disk, payload=packed)

    def refused(reason: str, files: dict[str, str] | None = None) -> None:
        dom0.start_direct("ramboot=image", initrd=build.initramfs(), files=files)
        dom0.unlock()
        dom0.shell()
        assert_persistent(dom0, reason)

    def boots() -> str:
        dom0.unlock()
        dom0.shell()
        told = status(dom0)
        assert (told["session"], told["requested"], told["disk"]) == ("ram", "image", "attached")
        assert STALE in told["reason"]
        assert settled(dom0) == "running", dom0.succeed(FAILED_UNITS)
        assert_disk_is_hidden(dom0)
        assert "vm-work-private" in dom0.succeed("lvs --noheadings -o lv_name qubes_dom0")
        return told["backend"]

    little = build.configuration(memory={"reserve_mib": 4096, "headroom_mib": 128})
    refused("not enough RAM for image", {"etc/ramboot/ramboot.conf": little + "\n"})
    for lay, reason in FAULTS:
        dom0.succeed(f"(set -e; cd {IMAGE}; {lay}; sync)")
        dom0.crash()
        refused(reason)
    # a menu entry is a change of the system
    dom0.succeed(f"truncate -s +1 {IMAGE}/root-*")
    dom0.succeed(f"echo '{ENTRY_PILLAR}' > /srv/pillar/ramboot.sls")
    # with dracut's minutes: the entry needs an initramfs with the module
    dom0.succeed(APPLY.replace(".image", ".grub"), timeout_s=1500)
    dom0.succeed("cat /dev/vdb > /boot/initrd.img-$(uname -r)")
    # what reads /boot next replays no journal
    dom0.succeed("umount /boot && sync")
    dom0.crash()
    refused("it has to be built anew (state ramboot.image)")
    dom0.crash()

    dom0.start(entry="in RAM (image)")
    assert boots() == "image"
    assert dom0.succeed("cat /sys/hypervisor/type") == "xen"
    # it is as it was before the entry
    dom0.fail("test -e /etc/grub.d/21_ramboot")
    dom0.poweroff()
    # activating a thin pool writes its superblock
    assert dom0.written_bytes() < 64 << 10

    copy = build.configuration(image={"stale": "copy"}) + "\n"
    files = {"etc/ramboot/ramboot.conf": copy}
    dom0.start_direct("ramboot=image", initrd=build.initramfs(), files=files)
    assert boots() == "zram"
    assert "the root was copied (zram) instead" in status(dom0)["reason"]
    dom0.succeed("test -e /etc/grub.d/21_ramboot")
    assert dom0.succeed(f"ls -A {IMAGE}") == ""
