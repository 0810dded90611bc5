# SPDX-License-Identifier: GPL-2.0-or-later
"""Faults of the disks, the clock and the person at the machine. Those of tools and files of the
initramfs are beside what they break: test_ram_session.py, test_disk.py, test_image.py. The
initramfs is built on the host and started without GRUB and Xen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vm import build
from vm.claims import (
    assert_disk_is_closed,
    assert_disk_is_hidden,
    assert_persistent,
    settled,
    status,
)
from vm.disk import PASSPHRASE
from vm.machine import Machine

MachineMaker = Callable[..., Machine]


LUKS_NAME = "luks-11111111-2222-4333-8444-555555555555"
# LVM that sees the second disk alone
SECOND = """use_devicesfile=0 global_filter=["a|^/dev/vdb$|","r|.*|"]"""
# A group of the running one's name is renamed to it, where its directory has that name not in it.
TWIN = f"""
vgcreate --config 'devices{{{SECOND}}}' twin /dev/vdb
for volume in root swap; do
    lvcreate --config 'devices{{{SECOND}}}' -an -Zn -Wn -L 8M -n $volume twin
done
vgrename --config 'devices{{{SECOND} dir="/run" scan=["/dev"]}}' twin qubes_dom0
"""


def test_volume_groups_on_two_disks_are_refused(machine: MachineMaker, tmp_path: Path) -> None:
    """First a second group of the root's name on a bare disk, which LVM sees before the passphrase
    is typed, with volumes of the names that the kernel line asks for; then one group on both.
    """
    second = tmp_path / "second.raw"
    with second.open("wb") as stream:
        stream.truncate(64 << 20)
    dom0 = machine(build.base(), payload=second, payload_writable=True)
    dom0.start_direct("ramboot=off", initrd=build.initramfs())
    dom0.unlock()
    dom0.shell()
    dom0.succeed(f"(set -e; {TWIN})")
    dom0.poweroff()

    dom0.start_direct("ramboot=zram", initrd=build.initramfs())
    dom0.unlock()
    dom0.wait_for(f"the root's on /dev/mapper/{LUKS_NAME}, another on /dev/vdb")
    dom0.shell()
    # not assert_persistent: LVM's own unit fails, which can't tell which of the two is meant
    told = status(dom0)
    assert (told["session"], told["reason"]) == (
        "persistent",
        "there is more than one volume group qubes_dom0: "
        f"the root's on /dev/mapper/{LUKS_NAME}, another on /dev/vdb",
    )
    assert dom0.succeed("findmnt -no SOURCE /") == "/dev/mapper/qubes_dom0-root"
    for volume in ("root", "swap"):
        below = dom0.succeed(f"lsblk -sno NAME /dev/mapper/qubes_dom0-{volume}")
        assert LUKS_NAME in below
        assert "vdb" not in below
    assert dom0.succeed("swapon --show=NAME --noheadings") != ""
    # nothing was activated there, and nothing written
    assert dom0.succeed("ls /sys/class/block/vdb/holders") == ""
    assert dom0.succeed("awk '{ print $7 }' /sys/class/block/vdb/stat") == "0"

    dom0.succeed("wipefs -qa /dev/vdb && vgextend qubes_dom0 /dev/vdb")
    dom0.poweroff()
    dom0.start_direct("ramboot=zram", initrd=build.initramfs())
    dom0.unlock()
    dom0.shell()
    assert_persistent(dom0, "the volume group qubes_dom0 lies on 2 devices")


# Sets the flag by which a thin pool asks for a check, as the kernel does after a failed write of
# its metadata (drivers/md/dm-thin-metadata.c: a CRC, flags, the block's number), then resets the
# machine before the pool writes it anew.
UNCLEAN = """
import mmap, os, struct
def crc(data):
    value = 0xffffffff
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82f63b78 if value & 1 else 0)
    return value ^ 160774
device = os.open("/dev/mapper/qubes_dom0-root--pool_tmeta", os.O_RDWR | os.O_DIRECT)
block = mmap.mmap(-1, 4096)
os.preadv(device, [block], 0)
if struct.unpack_from("<I", block)[0] != crc(block[4:]):
    raise SystemExit("this is no superblock of a thin pool")
struct.pack_into("<I", block, 4, 1)
struct.pack_into("<I", block, 0, crc(block[4:]))
os.pwritev(device, [block], 0)
print("unclean", flush=True)
open("/proc/sysrq-trigger", "w").write("b")
"""
# each event of a block device takes longer than what it is about
SLOW = 'SUBSYSTEM=="block", KERNEL=="vd*|dm-*|zram*", PROGRAM="/usr/bin/sleep 2"\n'


OTHER_NAME = "luks-66666666-2222-4333-8444-555555555555"
ENCRYPT = f"cryptsetup luksFormat -q --type luks2 --uuid {OTHER_NAME[5:]}"


def test_what_does_no_harm_ends_in_a_ram_session(machine: MachineMaker) -> None:
    """A dirty journal on an unclean thin pool, a wrong passphrase before the right one, one more
    for another part of the disk, slow udev and a clock in 1970: if any of them did harm, there
    would be no session from RAM."""
    dom0 = machine(build.base(), clock="1970-01-02")
    dom0.start_direct("ramboot=off", initrd=build.initramfs())
    dom0.unlock()
    dom0.shell()
    dom0.succeed(f"cat >/run/unclean.py <<'END'\n{UNCLEAN}END")
    dom0.succeed(f"printf other | {ENCRYPT} --pbkdf-force-iterations 1000 --pbkdf pbkdf2 /dev/vda3")
    dom0.succeed("echo from the journal >/root/note && sync")
    dom0.console.enter("python3 /run/unclean.py")
    dom0.wait_for("unclean")
    dom0.switches_off(300)

    dom0.start_direct(
        f"ramboot.disk=detached rd.luks.uuid={OTHER_NAME}",
        initrd=build.initramfs(),
        files={"etc/udev/rules.d/00-slow.rules": SLOW} | build.asking_for("zram"),
    )
    passphrases = {LUKS_NAME: ["not the passphrase", PASSPHRASE], OTHER_NAME: ["other"]}
    for _ in range(3):
        asked = dom0.wait_for(
            r"(?i)\n[^\n]*passphrase[^\n]*(luks-[0-9a-f-]{36})[^\n]*:", 600, regex=True
        )
        dom0.answer(passphrases[asked[1]].pop(0))
    # it would take the keys of another question, or they of it
    assert "Boot to RAM?" not in dom0.console.transcript.text()
    dom0.at_prompt()
    dom0.answer("y")
    dom0.shell()
    told = status(dom0)
    assert (told["session"], told["backend"], told["reason"]) == ("ram", "zram", None)
    assert "1970-01-02" in dom0.succeed("dmesg | grep 'setting system clock'")
    assert settled(dom0) == "running"
    assert_disk_is_closed(dom0)
    assert_disk_is_hidden(dom0)
    assert dom0.succeed("cat /root/note") == "from the journal"
    dom0.poweroff()
    assert dom0.written_bytes() == 0


def test_a_disk_that_is_pulled_while_copying_is_said_and_the_machine_switches_off(
    machine: MachineMaker,
) -> None:
    dom0 = machine(build.base())
    dom0.start_direct("ramboot=zram", initrd=build.initramfs())
    dom0.unlock()
    dom0.wait_for("Copying to RAM:")
    dom0.pull_disk()
    dom0.wait_for("is gone")
    dom0.switches_off(170)  # dracut alone would wait for three minutes
    assert dom0.disk_unchanged()


def test_a_read_error_while_copying_ends_in_a_persistent_boot(machine: MachineMaker) -> None:
    """In other places, and of blocks: tests/scripts."""
    path = "/usr/lib/udev/hwdb.d/20-OUI.hwdb"  # in the middle of the root; no boot reads it
    dom0 = machine(build.base("ext4"), read_error=build.sector_of(path))
    dom0.start_direct("ramboot=tmpfs", initrd=build.initramfs())
    dom0.shell()
    assert_persistent(dom0, f"error reading '.{path}': Input/output error", "/dev/vda2")
    dom0.fail(f"cat {path} > /dev/null")
