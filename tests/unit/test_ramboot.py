# SPDX-License-Identifier: GPL-2.0-or-later
"""status, plan and audit against fake /proc and /sys."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from types import SimpleNamespace

import pytest
from salt.exceptions import CommandExecutionError

MIB = 1 << 20
GIB = 1 << 30
NOTED = {
    "schema": 1,
    "session": "ram",
    "requested": "zram",
    "backend": "zram",
    "disk": "attached",
    "reason": None,
    "source": {"device": "/dev/mapper/qubes_dom0-root", "fstype": "ext4", "bytes": 5 * GIB},
    "ram": {"needed_bytes": 1, "available_bytes": 2, "limit_bytes": 3},
    "seconds": {"copy": 1.5},
}


class System:
    """A dom0 on LUKS and LVM; every part can be replaced."""

    def __init__(self, world):
        self.world = world
        self.mounts = [
            "21 1 253:1 / / rw,relatime shared:1 - ext4 /dev/dm-1 rw",
            "22 21 8:1 / /boot rw,relatime - ext4 /dev/sda1 rw",
            "23 21 0:5 / /proc rw - proc proc rw",
            "24 21 0:6 / /tmp rw - tmpfs tmpfs rw",
        ]
        self.swaps = []
        world.write(
            "/proc/meminfo", "MemTotal: 4194304 kB\nMemFree: 1 kB\nMemAvailable: 3145728 kB\n"
        )
        self.block("sda")
        self.block("sda1")
        self.block("sda2")
        self.block("dm-0", slaves=["sda2"], uuid="CRYPT-LUKS2-x", dm="luks-x")
        self.block("dm-1", slaves=["dm-0"], uuid="LVM-abc", dm="qubes_dom0-root")
        world.salt["ramboot_swap.active"] = lambda: self.swaps
        self.write()

    def write(self):
        self.world.write("/proc/self/mountinfo", "\n".join(self.mounts) + "\n")

    def block(self, name, slaves=(), uuid=None, dm=None):
        self.world.write(f"/sys/class/block/{name}/dev", "1:1")
        for slave in slaves:
            self.world.write(f"/sys/class/block/{name}/slaves/{slave}")
        if uuid:
            self.world.write(f"/sys/block/{name}/dm/uuid", f"{uuid}\n")
            self.world.write(f"/sys/block/{name}/dm/name", f"{dm}\n")

    def zram(self, number, backing="none", mounted="/"):
        self.block(f"zram{number}")
        folder = f"/sys/block/zram{number}"
        self.world.write(f"{folder}/mm_stat", "4096000 1024000 1228800 0 1228800 1 2 3 4\n")
        self.world.write(f"{folder}/comp_algorithm", "lzo [lz4] zstd \n")
        if backing is not None:
            self.world.write(f"{folder}/backing_dev", f"{backing}\n")
        if mounted:
            self.mounts[0] = f"21 1 252:{number} / / rw - ext4 /dev/zram{number} rw"
            self.write()


@pytest.fixture
def system(world):
    return System(world)


@pytest.fixture
def ramboot(world, system, monkeypatch):
    for name in ("config", "qubesadmin", "qubes_record", "qubes", "qubes_audit"):
        world.module(f"ramboot_{name}")
    module = world.module("ramboot")
    (world.root / "dom0").mkdir()
    monkeypatch.setattr(module, "ROOT", f"{world.root}/dom0")
    usage = SimpleNamespace(f_blocks=20 << 18, f_bfree=15 << 18, f_frsize=4096)
    monkeypatch.setattr(module.os, "statvfs", lambda _path: usage)
    monkeypatch.setattr(module.os, "uname", lambda: SimpleNamespace(release="6.12.0"))
    return module


# status


def test_status_is_what_was_noted_at_boot_with_live_figures(world, system, ramboot):
    system.zram(3)
    system.swaps = [{"name": "/dev/zram1", "type": "partition", "size_bytes": 1, "used_bytes": 0}]
    image = world.write("/boot/initramfs-6.12.0.img", "image")
    os.utime(image, (0, 1))
    world.write("/run/ramboot/status.json", json.dumps(NOTED))
    found = ramboot.status()
    age = found["live"]["initramfs"].pop("age_s")
    assert age > 10**9
    assert found == {
        **NOTED,
        "live": {
            "ram": {"total_bytes": 4 * GIB, "available_bytes": 3 * GIB},
            "root": {
                "device": "/dev/zram3",
                "fstype": "ext4",
                "size_bytes": 20 * GIB,
                "used_bytes": 5 * GIB,
            },
            "zram": {
                "device": "/dev/zram3",
                "algorithm": "lz4",
                "data_bytes": 4096000,
                "compressed_bytes": 1024000,
                "memory_bytes": 1228800,
            },
            "swap": system.swaps,
            "initramfs": {"image": str(image)},
        },
    }


def test_status_where_the_module_did_not_run_is_persistent_and_says_so(world, ramboot):
    found = ramboot.status()
    live = found.pop("live")
    assert found == {
        "schema": 1,
        "session": "persistent",
        "requested": None,
        "backend": None,
        "disk": None,
        "reason": "the ramboot module did not run at this boot: there is no "
        f"{world.root}/run/ramboot/status.json",
        "source": None,
        "ram": None,
        "seconds": {},
    }
    assert (live["zram"], live["initramfs"], live["swap"]) == (None, None, [])


def test_status_without_a_note_in_ram_is_unknown(system, ramboot):
    system.zram(0)
    assert ramboot.status()["session"] == "unknown"


@pytest.mark.parametrize("text", ["{", ""])
def test_a_note_that_is_no_json_is_an_error(world, ramboot, text):
    path = world.write("/run/ramboot/status.json", text)
    with pytest.raises(CommandExecutionError) as failure:
        ramboot.status()
    assert str(failure.value).startswith(f"{path} can't be understood: ")


@pytest.mark.parametrize("text", ["[]", '{"schema": 2}'])
def test_a_note_of_another_format_is_an_error(world, ramboot, text):
    path = world.write("/run/ramboot/status.json", text)
    with pytest.raises(CommandExecutionError) as failure:
        ramboot.status()
    assert str(failure.value) == f"{path} has another format than this version's"


# plan


def test_plan_reckons_as_the_boot_does(world, ramboot):
    world.pillar["ramboot"] = {
        "memory": {"reserve_mib": 1000, "headroom_mib": 500},
        "grub": {"dom0_mem_max_mib": 10240},
    }
    used, spare = 5 * GIB, 1500 * MIB
    zram, tmpfs = used * 68 // 100, used * 104 // 100 + 16 * MIB
    available = 10 * GIB * 95 // 100
    common = {
        "available_bytes": available,
        "fits": True,
        "available_now_bytes": 4 * GIB * 95 // 100,
        "fits_now": False,
        "source_bytes": used,
        "excluded_bytes": 0,
        "qubes_bytes": 0,
        "qubes_pending_bytes": 0,
    }
    assert ramboot.plan() == {
        "zram": {
            "needed_bytes": zram + spare,
            "root_bytes": zram,
            "expected_bytes": used * 62 // 100,
            "algorithm": "lz4",
            "says": "4981 MiB of RAM needed, 9728 MiB available: fits",
            **common,
        },
        "tmpfs": {
            "needed_bytes": tmpfs + spare,
            "root_bytes": tmpfs,
            "expected_bytes": used * 102 // 100,
            "algorithm": None,
            "says": "6840 MiB of RAM needed, 9728 MiB available: fits",
            **common,
        },
        "snapshot": {
            "needed_bytes": spare,
            "root_bytes": 0,
            "expected_bytes": 0,
            "algorithm": "lz4",
            "says": "1500 MiB of RAM needed, 9728 MiB available: fits",
            **(common | {"fits_now": True}),
        },
        "overlay": {
            "needed_bytes": spare,
            "root_bytes": 0,
            "expected_bytes": 0,
            "algorithm": None,
            "says": "1500 MiB of RAM needed, 9728 MiB available: fits",
            **(common | {"fits_now": True}),
        },
    }


def test_plan_says_when_it_does_not_fit(world, ramboot):
    world.pillar["ramboot"] = {"grub": {"dom0_mem_max_mib": 4096}}
    found = ramboot.plan()
    assert [found[backend]["fits"] for backend in ("zram", "tmpfs")] == [False, False]
    assert found["zram"]["says"] == "5529 MiB of RAM needed, 3891 MiB available: does not fit"


def test_plan_takes_todays_memory_where_grub_keeps_it(world, ramboot):
    world.pillar["ramboot"] = {"grub": {"dom0_mem_max_mib": "keep"}}
    found = ramboot.plan()["zram"]
    assert found["available_bytes"] == found["available_now_bytes"] == 4 * GIB * 95 // 100


def test_plan_knows_that_zstd_is_smaller(world, ramboot):
    world.pillar["ramboot"] = {"zram": {"algorithm": "zstd"}}
    found = ramboot.plan()["zram"]
    assert (found["algorithm"], found["root_bytes"]) == ("zstd", 5 * GIB * 55 // 100)
    assert found["expected_bytes"] == 5 * GIB * 48 // 100


def test_plan_leaves_the_excludes_out(world, ramboot):
    world.pillar["ramboot"] = {"copy": {"exclude": ["/tmp/*"]}}
    world.write("/dom0/tmp/large", b"x" * MIB)
    world.write("/dom0/tmp/.hidden", b"x" * MIB)
    world.write("/dom0/other", b"x" * MIB)
    found = ramboot.plan()["zram"]
    # the shell's * does not match hidden names, at boot neither
    assert MIB <= found["excluded_bytes"] < 1.5 * MIB
    assert found["source_bytes"] == 5 * GIB - found["excluded_bytes"]


def test_plan_counts_a_btrfs_subvolume_by_its_files(world, system, ramboot):
    system.mounts[0] = "21 1 0:30 /root / rw - btrfs /dev/sda2 rw"
    system.write()
    first = world.write("/dom0/file", b"x" * (4 * MIB))
    os.link(first, f"{world.root}/dom0/same-file")
    found = ramboot.plan()["zram"]
    assert 4 * MIB <= found["source_bytes"] < 5 * MIB


@pytest.mark.parametrize("disk", ["readonly", "detached"])
def test_plan_says_what_the_disk_policy_means(world, ramboot, disk):
    world.pillar["ramboot"] = {"boot": {"disk": disk}}
    found = ramboot.plan()
    assert found["zram"]["says"].endswith(f"; with boot:disk {disk} no qube on the disk will start")
    assert found["overlay"]["says"].endswith(
        f"; not with boot:disk {disk}, which the pillar asks for"
    )


def test_plan_changes_nothing(world, ramboot):
    before = {path: path.stat() for path in world.root.rglob("*")}
    ramboot.plan()
    assert {path: path.stat() for path in world.root.rglob("*")} == before


def test_plan_reckons_qubes_that_the_pillar_asks_for_as_if_they_were_there(world, ramboot):
    before = ramboot.plan()
    world.salt["ramboot_qubes.budget"] = lambda: {
        "present_bytes": GIB,
        "pending_bytes": 2 * GIB,
    }
    for backend, plan in ramboot.plan().items():
        assert plan["source_bytes"] == before[backend]["source_bytes"] + 2 * GIB
        assert (plan["qubes_bytes"], plan["qubes_pending_bytes"]) == (GIB, 2 * GIB)
        copied = GIB if backend in ("zram", "tmpfs") else -1
        assert plan["needed_bytes"] > before[backend]["needed_bytes"] + copied


# audit


def verdicts(found):
    return {item["place"]: item["verdict"] for item in found}


def test_audit_of_a_persistent_session_shows_the_disk(system, ramboot):
    assert ramboot.audit() == [
        {"place": "/", "finding": "ext4 from /dev/dm-1, writable", "verdict": "disk"},
        {"place": "/boot", "finding": "ext4 from /dev/sda1, writable", "verdict": "disk"},
        {"place": "swap", "finding": "none is active", "verdict": "ram"},
        {
            "place": "volume qubes_dom0-root",
            "finding": "active, on disk",
            "verdict": "trace",
        },
    ]


def test_audit_of_a_ram_session_shows_what_is_left(system, ramboot):
    system.zram(2)
    system.mounts[1] = "22 21 8:1 / /boot ro,relatime - ext4 /dev/sda1 ro"
    system.write()
    found = ramboot.audit()
    assert verdicts(found) == {
        "/": "ram",
        "/boot": "trace",
        "swap": "ram",
        "zram2": "ram",
        "volume qubes_dom0-root": "trace",
    }


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ("25 21 0:40 / /mnt rw - nfs server:/export rw", "unknown"),
        ("25 21 0:40 / /mnt rw - overlay overlay rw,upperdir=/x", "unknown"),
        ("25 21 7:0 / /mnt ro - squashfs /dev/loop0 ro", "unknown"),
        ("25 21 253:9 / /mnt rw - ext4 /dev/dm-9 rw", "disk"),
        ("25 21 253:8 / /mnt rw - ext4 /dev/dm-8 rw", "ram"),
        ("25 21 0:41 / /mnt rw - efivarfs efivarfs rw", "trace"),
        ("25 21 0:42 / /mnt rw - tmpfs tmpfs rw", None),
        ("25 21 8:77 / /mnt rw - ext4 /dev/gone rw", "unknown"),
        ("25 21 8:1 / /mnt\\040x rw - ext4 /dev/sda1 rw", None),
    ],
)
def test_audit_of_a_mount(system, ramboot, line, verdict):
    system.zram(1, mounted=None)
    system.block("loop0")
    # a snapshot: the disk below, its store in RAM
    system.block("dm-9", slaves=["dm-0", "zram1"])
    system.block("dm-8", slaves=["zram1"])
    system.mounts.append(line)
    system.write()
    found = verdicts(ramboot.audit())
    assert found.get("/mnt") == verdict
    if "\\040" in line:
        assert found["/mnt x"] == "disk"


def test_what_lies_on_the_layer_is_written_to_ram(system, ramboot):
    system.zram(1, mounted=None)
    system.block("dm-9", slaves=["dm-0", "zram1"])
    system.world.write("/sys/class/block/dm-9/dm/name", "ramboot-layer\n")
    system.block("dm-10", slaves=["dm-9"])
    system.mounts.append("25 21 253:10 / /mnt rw - ext4 /dev/dm-10 rw")
    system.write()
    assert verdicts(ramboot.audit())["/mnt"] == "ram"


def sealed(system, ramboot, monkeypatch, flags, holders=()):
    """A RAM session under the disk policy readonly; `flags` are the loop driver's (linux
    include/uapi/linux/loop.h; 1: read-only, 16: direct I/O).
    """
    system.world.write("/run/ramboot/status.json", json.dumps({**NOTED, "disk": "readonly"}))
    system.block("loop0")
    system.world.write("/sys/class/block/loop0/loop/backing_file", "/dm-0\n")
    (system.world.root / "sys/class/block/dm-0/holders").mkdir()
    for holder in holders:
        system.world.write(f"/sys/class/block/dm-0/holders/{holder}")
    system.block("dm-5", slaves=["loop0"])
    system.world.write("/sys/class/block/dm-5/dm/name", "ramboot-seal\n")
    system.block("dm-1", slaves=["dm-5"], uuid="LVM-abc", dm="qubes_dom0-vm")
    (system.world.root / "sys/class/block/dm-1/slaves/dm-0").unlink()
    system.zram(2)
    system.mounts[1] = "22 21 253:1 / /mnt ro,relatime - ext4 /dev/dm-1 ro"
    system.write()

    def ioctl(device, request, room):
        assert (device, request, len(room)) == ("/dev/loop0", 0x4C05, 232)
        if flags is None:
            raise OSError("no such device")
        return struct.pack("=5Q4I", 5, 6, 7, 8, 9, 10, 11, 12, flags).ljust(232, b"\0")

    def opened(path, *how, **more):
        return contextlib.nullcontext(path) if path == "/dev/loop0" else open(path, *how, **more)

    monkeypatch.setattr(ramboot.fcntl, "ioctl", ioctl)
    monkeypatch.setattr(ramboot, "open", opened, raising=False)
    return {row["place"]: (row["verdict"], row["finding"]) for row in ramboot.audit()}


def test_a_sealed_disk_takes_no_traces(system, ramboot, monkeypatch):
    found = sealed(system, ramboot, monkeypatch, 17)
    refuses = "the disk is sealed and refuses every write"
    assert found["seal"] == ("ram", "/dev/dm-0, through loop0, which is read-only")
    assert found["volume qubes_dom0-vm"] == ("ram", f"active; {refuses}")
    assert found["/mnt"] == ("ram", f"ext4 from /dev/dm-1, read-only; {refuses}")
    assert ramboot.backing("/dev/dm-1") == "sealed"


@pytest.mark.parametrize("flags", [16, None], ids=["writable", "not told"])
def test_a_seal_that_is_none_counts_as_a_trace(system, ramboot, monkeypatch, flags):
    found = sealed(system, ramboot, monkeypatch, flags)
    assert found["seal"] == ("unknown", "the disk was to be sealed, and no seal was found")
    assert found["volume qubes_dom0-vm"] == ("unknown", "active, on unknown")
    assert found["/mnt"][0] == "unknown"


def test_what_goes_around_the_seal_is_a_trace(system, ramboot, monkeypatch):
    found = sealed(system, ramboot, monkeypatch, 17, holders=["dm-7"])
    assert found["seal"] == ("trace", "/dev/dm-0 is used beside the seal, by dm-7")


def test_the_last_mount_at_a_place_counts(system, ramboot):
    system.mounts.append("30 21 252:0 / / rw - ext4 /dev/zram0 rw")
    system.block("zram0")
    system.write()
    assert verdicts(ramboot.audit())["/"] == "ram"


@pytest.mark.parametrize(
    ("name", "kind", "verdict"),
    [
        ("/dev/dm-1", "partition", "disk"),
        ("/dev/zram5", "partition", "ram"),
        ("/swapfile", "file", "disk"),
        ("/dev/gone", "partition", "unknown"),
    ],
)
def test_audit_of_swap(system, ramboot, name, kind, verdict):
    system.block("zram5")
    system.swaps = [{"name": name, "type": kind, "size_bytes": 5 * MIB, "used_bytes": 2 * MIB}]
    assert {
        "place": f"swap {name}",
        "finding": f"{kind}, 2 MiB used",
        "verdict": verdict,
    } in ramboot.audit()


def test_a_zram_device_that_writes_back_is_a_disk(system, ramboot):
    system.zram(0, backing="/dev/sda3")
    system.zram(1, backing=None, mounted=None)
    found = ramboot.audit()
    assert {
        "place": "zram0",
        "finding": "backing device: /dev/sda3",
        "verdict": "disk",
    } in found
    assert verdicts(found)["zram1"] == "ram"


def test_units_that_write_grubenv_are_named_until_they_are_masked(world, ramboot):
    world.write("/usr/lib/systemd/user/grub-boot-success.timer")
    world.write("/usr/lib/systemd/system/grub-boot-indeterminate.service")
    mask = world.root / "etc/systemd/system/grub-boot-indeterminate.service"
    mask.parent.mkdir(parents=True)
    mask.symlink_to("/dev/null")
    found = ramboot.audit()
    assert {
        "place": "grub-boot-success.timer",
        "finding": "can write grubenv in /boot",
        "verdict": "trace",
    } in found
    assert {
        "place": "grub-boot-indeterminate.service",
        "finding": "masked",
        "verdict": "ram",
    } in found


def test_what_cannot_be_determined_is_a_finding(world, ramboot):
    (world.root / "proc/self/mountinfo").unlink()

    def fails():
        raise CommandExecutionError("no /proc")

    world.salt["ramboot_swap.active"] = fails
    found = verdicts(ramboot.audit())
    assert found["mounts"] == "unknown"
    assert found["swap"] == "unknown"


# the others


@pytest.mark.parametrize(
    ("name", "call", "arguments"),
    [
        ("states", lambda r: r.initramfs(), {}),
        ("verify", lambda r: r.verify(), {}),
        ("rebuild", lambda r: r.rebuild(), {"kernel": None, "force": False}),
        ("rebuild", lambda r: r.rebuild("6.1", True), {"kernel": "6.1", "force": True}),
    ],
)
def test_the_public_names_lead_to_the_work(world, ramboot, name, call, arguments):
    seen = []
    world.salt[f"ramboot_initramfs.{name}"] = lambda **given: seen.append(given) or "result"
    assert call(ramboot) == "result"
    assert seen == [arguments]
