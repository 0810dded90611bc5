# SPDX-License-Identifier: GPL-2.0-or-later
"""status, plan and audit against fake /proc and /sys."""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
from types import SimpleNamespace

import pytest
from salt.exceptions import CommandExecutionError

from conftest import unchanged

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


# around btime in /proc/stat below, 2026-09-21 14:13:20 +0000
BEFORE, AFTER = "2026-09-21 14:00:00 +0000", "2026-09-21 17:00:00 +0200"
VOLUME = {"vg_name": "qubes_dom0", "pool_lv": "", "lv_size": "21474836480"}


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
        world.write("/proc/stat", "cpu 1 2 3\nbtime 1790000000\n")
        self.volumes = [{**VOLUME, "lv_name": "root", "lv_time": BEFORE}]
        self.lvs = None
        world.salt["ramboot_swap.active"] = lambda: self.swaps
        world.salt["cmd.run_all"] = self.run
        self.xen = {"retcode": 1, "stdout": "", "stderr": "xencall: error"}
        world.write("/usr/sbin/xl", mode=0o755)
        self.write()

    def run(self, command, python_shell=None, env=None):
        if command == [f"{self.world.root}/usr/sbin/xl", "info"]:
            return self.xen
        assert command[0] == "lvs"
        good = {"stdout": json.dumps({"report": [{"lv": self.volumes}]})}
        return {"retcode": 0, "stderr": "", **(self.lvs or good)}

    def write(self):
        self.world.write("/proc/self/mountinfo", "\n".join(self.mounts) + "\n")

    def block(self, name, slaves=(), uuid=None, dm=None):
        self.world.write(f"/sys/class/block/{name}/dev", "1:1")
        for slave in slaves:
            self.world.write(f"/sys/class/block/{name}/slaves/{slave}")
        if uuid:
            # one is a link to the other
            for top in ("block", "class/block"):
                self.world.write(f"/sys/{top}/{name}/dm/uuid", f"{uuid}\n")
                self.world.write(f"/sys/{top}/{name}/dm/name", f"{dm}\n")

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
    for name in ("config", "image", "qubesadmin", "qubes_record", "qubes", "qubes_audit", "audit"):
        world.module(f"ramboot_{name}")
    world.module("ramboot_qubes_pools")
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
            "filled": None,
            "swap": system.swaps,
            "initramfs": {"image": str(image)},
            "image": None,
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


def test_status_has_what_the_watch_found_while_it_watches(world, ramboot):
    noted = {"schema": 1, "percent": 7, "what": "store", "lost": False}
    path = world.write("/run/ramboot/filled.json", json.dumps(noted))
    assert ramboot.status()["live"]["filled"] == noted
    os.utime(path, (0, 1))
    assert ramboot.status()["live"]["filled"] is None
    # the last word on a lost session stays
    path.write_text(json.dumps({**noted, "lost": True}))
    os.utime(path, (0, 1))
    assert ramboot.status()["live"]["filled"]["lost"] is True
    path.write_text("{")
    assert ramboot.status()["live"]["filled"] is None


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

ALL = ["zram", "tmpfs", "image", "snapshot", "overlay"]


def test_plan_reckons_as_the_boot_does(world, ramboot):
    world.pillar["ramboot"] = {
        "memory": {"reserve_mib": 1000, "headroom_mib": 500},
        "grub": {"dom0_mem_max_mib": 10240, "entries": ALL},
    }
    used, spare = 5 * GIB, 1500 * MIB
    # with the table of a device of 20 GiB, and of a store of eight times the room for it
    zram, tmpfs = used * 68 // 100 + 80 * MIB, used * 104 // 100 + 16 * MIB
    available = 10 * GIB * 95 // 100
    store = (available - 1000 * MIB) // 32
    common = {
        "available_bytes": available,
        "fits": True,
        "fits_ordinary": False,
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
            "says": "5061 MiB of RAM needed, 9728 MiB available in its menu entry: fits; at the"
            " question of the ordinary entry, with 3891 MiB: does not fit",
            **common,
        },
        "tmpfs": {
            "needed_bytes": tmpfs + spare,
            "root_bytes": tmpfs,
            "expected_bytes": used * 102 // 100,
            "algorithm": None,
            "says": "6840 MiB of RAM needed, 9728 MiB available: fits"
            "; dom0 keeps 10240 MiB for the whole session",
            **common,
        },
        "image": {
            "needed_bytes": used // 2 + 16 * MIB + spare,
            "root_bytes": used // 2 + 16 * MIB,
            "expected_bytes": used * 45 // 100,
            "algorithm": None,
            "says": "4076 MiB of RAM needed, 9728 MiB available: fits"
            "; dom0 keeps 10240 MiB for the whole session; no image is built yet",
            **common,
        },
        "snapshot": {
            "needed_bytes": store + spare,
            "root_bytes": store,
            "expected_bytes": store,
            "algorithm": "lz4",
            "says": "1772 MiB of RAM needed, 9728 MiB available: fits",
            **(common | {"fits_now": True, "fits_ordinary": True}),
        },
        "overlay": {
            "needed_bytes": spare,
            "root_bytes": 0,
            "expected_bytes": 0,
            "algorithm": None,
            "says": "1500 MiB of RAM needed, 9728 MiB available: fits"
            "; dom0 keeps 10240 MiB for the whole session",
            **(common | {"fits_now": True, "fits_ordinary": True}),
        },
    }


@pytest.mark.parametrize("backend", ["image", "overlay"])
def test_plan_is_not_made_of_what_a_session_shows_of_another_root(world, ramboot, backend):
    note = {"schema": 1, "session": "ram", "backend": backend}
    world.write("/run/ramboot/status.json", json.dumps(note))
    with pytest.raises(
        CommandExecutionError, match=rf"RAM session \({backend}\), where / does not"
    ):
        ramboot.plan()


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("zram", "whether there is an image can't be told in this session"),
        ("tmpfs", "whether there is an image can't be told in this session"),
        ("snapshot", "no image is built yet"),
    ],
)
def test_plan_does_not_deny_an_image_that_no_copy_has(world, ramboot, backend, says):
    note = {"schema": 1, "session": "ram", "backend": backend}
    world.write("/run/ramboot/status.json", json.dumps(note))
    assert ramboot.plan()["image"]["says"].endswith(f"; {says}")


def test_plan_says_when_it_does_not_fit(world, ramboot):
    world.pillar["ramboot"] = {"grub": {"dom0_mem_max_mib": 4096}}
    found = ramboot.plan()
    assert [found[backend]["fits"] for backend in ("zram", "tmpfs")] == [False, False]
    assert found["zram"]["says"] == "5609 MiB of RAM needed, 3891 MiB available: does not fit"


def says(ramboot, world, backend="zram", **pillar):
    world.pillar["ramboot"] = pillar
    found = ramboot.plan()[backend]
    return found["fits"], found["fits_ordinary"], unkept(found["says"]).partition(" needed, ")[2]


def unkept(says):
    return re.sub("; dom0 keeps [0-9]+ MiB for the whole session", "", says)


def test_plan_reckons_with_the_memory_of_the_way_to_the_session(world, ramboot):
    """4 GiB now, 10 GiB in the menu entries; zram takes 5609 MiB, tmpfs 7388."""
    entry = "9728 MiB available"
    now = "3891 MiB available: does not fit"
    both = f"{entry} in its menu entry: fits; at the question of the ordinary entry, with 3891 MiB:"
    assert says(ramboot, world) == (True, False, f"{both} does not fit")
    straight = says(ramboot, world, boot={"mode": "zram"})
    assert straight == (True, False, both.replace("at the question of", "in") + " does not fit")
    # by its entry alone
    for boot in ({"mode": "off"}, {"backend": "tmpfs"}, {"mode": "tmpfs"}):
        assert says(ramboot, world, boot=boot) == (True, False, f"{entry}: fits")
    # without one
    told = f"{now}; in a menu entry (grub:entries), with 9728 MiB: fits"
    assert says(ramboot, world, grub={"entries": []}) == (False, False, told)
    assert says(ramboot, world, "tmpfs") == (False, False, told)
    small = {"entries": [], "dom0_mem_max_mib": 4096}
    assert says(ramboot, world, grub=small) == (False, False, now)
    for entries in ([], ["zram"]):
        all_of_them = {"entries": entries, "dom0_mem_scope": "all"}
        assert says(ramboot, world, grub=all_of_them) == (True, True, f"{entry}: fits")
        kept = {"entries": entries, "dom0_mem_max_mib": "keep", "dom0_mem_scope": "all"}
        assert says(ramboot, world, grub=kept) == (False, False, now)


def test_plan_sizes_the_store_of_a_snapshot_by_the_memory_of_its_way(world, ramboot):
    for entries, available in ((["snapshot"], 10 * GIB), ([], 4 * GIB)):
        world.pillar["ramboot"] = {"grub": {"entries": entries}}
        room = available * 95 // 100 - GIB
        assert ramboot.plan()["snapshot"]["root_bytes"] == room * 8 // 256


@pytest.mark.parametrize(
    ("backend", "fstype", "mib", "good"),
    [
        ("tmpfs", "ext4", 5120, False),
        ("tmpfs", "ext4", 5121, True),
        # onto a new file system, whose inodes take their part
        ("zram", "xfs", 5200, False),
        ("zram", "xfs", 5210, True),
        ("zram", "ext4", 4096, False),
        ("zram", "ext4", 6144, True),
    ],
)
def test_plan_says_that_a_size_of_the_pillar_does_not_hold_the_copy(
    world, system, ramboot, backend, fstype, mib, good
):
    rooted(system, fstype)
    ways = {"entries": ["zram", "tmpfs"], "dom0_mem_scope": "all", "dom0_mem_max_mib": 20480}
    fits, at_the_question, told = says(
        ramboot, world, backend, **{backend: {"size_mib": mib}}, grub=ways
    )
    assert fits == at_the_question == good
    small = f"does not fit: {backend}:size_mib is too small for the 5120 MiB to be copied"
    assert told == f"19456 MiB available: {'fits' if good else small}"
    found = ramboot.plan()
    other = "tmpfs" if backend == "zram" else "zram"
    assert found[other]["fits"]
    assert found[backend]["fits_now"] is False


def test_plan_copies_a_root_as_blocks_that_is_nearly_full(world, ramboot, monkeypatch):
    """Whatever the inodes take, the copy has as many."""
    full = SimpleNamespace(f_blocks=5 << 18, f_bfree=1, f_frsize=4096)
    monkeypatch.setattr(ramboot.os, "statvfs", lambda _path: full)
    assert says(ramboot, world, zram={"size_mib": 5120})[0]
    assert not says(ramboot, world, zram={"size_mib": 5119})[0]


# Xen 4.17's, shortened
XL_INFO = """\
host                   : dom0
nr_cpus                : 4
total_memory           : 8061
free_memory            : 3412
xen_version            : 4.17.5
"""


@pytest.mark.parametrize(
    ("has", "available"),
    [("8061", 8061), ("10240", 10240), ("65401", 10240), ("unknown", 10240)],
)
def test_plan_promises_no_more_than_the_machine_has(world, system, ramboot, has, available):
    world.pillar["ramboot"] = {"grub": {"dom0_mem_max_mib": 10240, "entries": ["tmpfs"]}}
    system.xen = {"retcode": 0, "stdout": XL_INFO.replace("8061", has), "stderr": ""}
    found = ramboot.plan()["tmpfs"]
    assert found["available_bytes"] == available * MIB * 95 // 100
    assert ("available with all that the machine has" in found["says"]) == (available < 10240)
    left = "" if has == "unknown" else f" and leaves {max(0, int(has) - 10240)} MiB for qubes"
    kept = f"; dom0 keeps {available} MiB for the whole session{left}"
    for backend, way in ramboot.plan().items():
        # of those without a menu entry this boot's 4 GiB
        there = kept if backend == "tmpfs" else "; dom0 keeps 4096 MiB"
        assert (there in way["says"]) == (backend in ("tmpfs", "image", "overlay"))


def test_plan_does_without_xen(world, system, ramboot):
    world.pillar["ramboot"] = {"grub": {"dom0_mem_max_mib": 10240}}
    system.xen = {"retcode": 1, "stdout": XL_INFO, "stderr": "can't open"}
    assert ramboot.plan()["zram"]["available_bytes"] == 10 * GIB * 95 // 100
    # nothing is run that is not there, or this would be its answer
    system.xen["retcode"] = 0
    (world.root / "usr/sbin/xl").unlink()
    assert ramboot.plan()["zram"]["available_bytes"] == 10 * GIB * 95 // 100


def test_plan_reckons_with_sizes_of_the_pillar(world, system, ramboot):
    world.pillar["ramboot"] = {"zram": {"size_mib": 10240}, "snapshot": {"store_mib": 5120}}
    found = ramboot.plan()
    assert found["zram"]["root_bytes"] == 5 * GIB * 68 // 100 + 40 * MIB
    assert found["snapshot"]["root_bytes"] == 20 * MIB
    # copied as files
    del world.pillar["ramboot"]["zram"]
    rooted(system, "xfs")
    assert found["zram"]["source_bytes"] == 5 * GIB
    size = 5 * GIB * 115 // 100 + 2 * GIB
    assert ramboot.plan()["zram"]["root_bytes"] == 5 * GIB * 68 // 100 + size // 256


def test_plan_takes_todays_memory_where_grub_keeps_it(world, ramboot):
    world.pillar["ramboot"] = {"grub": {"dom0_mem_max_mib": "keep"}}
    found = ramboot.plan()["zram"]
    assert found["available_bytes"] == found["available_now_bytes"] == 4 * GIB * 95 // 100


def test_plan_knows_that_zstd_is_smaller(world, ramboot):
    world.pillar["ramboot"] = {"zram": {"algorithm": "zstd"}}
    found = ramboot.plan()["zram"]
    assert (found["algorithm"], found["root_bytes"]) == ("zstd", 5 * GIB * 55 // 100 + 80 * MIB)
    assert found["expected_bytes"] == 5 * GIB * 48 // 100


def test_plan_bears_a_file_that_is_deleted_while_it_looks(world, ramboot, monkeypatch):
    world.pillar["ramboot"] = {"copy": {"exclude": ["/var/tmp/*"]}}
    gone = f"{world.root}/dom0/var/tmp/gone"
    monkeypatch.setattr(ramboot.glob, "glob", lambda path: [gone] if path.endswith("tmp/*") else [])
    assert ramboot.plan()["zram"]["excluded_bytes"] == 0


def test_plan_leaves_the_excludes_out(world, system, ramboot):
    del system.mounts[3]
    system.write()
    world.pillar["ramboot"] = {"copy": {"exclude": ["/tmp/*"]}}
    world.write("/dom0/tmp/large", b"x" * MIB)
    world.write("/dom0/tmp/.hidden", b"x" * MIB)
    world.write("/dom0/other", b"x" * MIB)
    found = ramboot.plan()["zram"]
    # the shell's * does not match hidden names, at boot neither
    assert MIB <= found["excluded_bytes"] < 1.5 * MIB
    assert found["source_bytes"] == 5 * GIB - found["excluded_bytes"]


@pytest.mark.parametrize("exclude", ["/tmp/*", "/mnt/disk/data", "/mnt/*", "/linked/*", "/twice/*"])
def test_plan_takes_nothing_off_that_is_on_no_root(world, system, ramboot, exclude):
    """A tmpfs, another disk, a place where the root shows a second time: no copy has them."""
    world.pillar["ramboot"] = {"copy": {"exclude": [exclude]}}
    system.mounts += [
        "30 21 8:17 / /mnt/disk rw - ext4 /dev/sdb1 rw",
        "31 21 253:1 /data /twice rw - ext4 /dev/dm-1 rw",
    ]
    system.write()
    for place in ("tmp/file", "mnt/disk/data", "twice/file"):
        world.write(f"/dom0/{place}", b"x" * MIB)
    (world.root / "dom0/linked").symlink_to("tmp")
    found = ramboot.plan()["zram"]
    assert (found["source_bytes"], found["excluded_bytes"]) == (5 * GIB, 0)
    # a mount may be below what is on the root
    world.pillar["ramboot"] = {"copy": {"exclude": ["/mnt"]}}
    world.write("/dom0/mnt/file", b"x" * MIB)
    assert MIB <= ramboot.plan()["zram"]["excluded_bytes"] < 1.5 * MIB


def test_plan_takes_off_of_a_btrfs_what_is_copied_of_it(world, system, ramboot):
    rooted(system, "btrfs")
    world.pillar["ramboot"] = {"copy": {"exclude": ["/home/me", "/snapshots/*", "/file"]}}
    system.mounts += [
        "30 21 0:31 /home /home rw - btrfs /dev/sda2 rw",
        "31 21 0:32 /snapshots /snapshots rw - btrfs /dev/sda2 rw",
    ]
    system.write()
    fstab(world)
    for place, size in (("home/me", 2), ("snapshots/old", 4), ("file", 1), ("other", 3)):
        world.write(f"/dom0/{place}", b"x" * (size * MIB))
    found = ramboot.plan()["zram"]
    assert 3 * MIB <= found["excluded_bytes"] < 3.5 * MIB
    assert 3 * MIB <= found["source_bytes"] < 3.5 * MIB


def test_plan_counts_what_two_excludes_name_once(world, ramboot):
    exclude = ["/data/*", "/data/films", "/data/films/*", "/data/[f]ilms/old/*"]
    world.pillar["ramboot"] = {"copy": {"exclude": exclude}}
    world.write("/dom0/data/films/old/large", b"x" * MIB)
    assert MIB <= ramboot.plan()["zram"]["excluded_bytes"] < 1.5 * MIB


def rooted(system, fstype):
    source = "/dev/sda2"
    system.mounts[0] = f"21 1 0:30 /root / rw - {fstype} {source} rw"
    system.write()


def fstab(world):
    """Of the same btrfs, and of others."""
    world.write(
        "/etc/fstab",
        "UUID=1 / btrfs subvol=root 0 0\nUUID=1 /home btrfs subvol=home 0 0\n"
        "#UUID=1 /snapshots btrfs subvol=snapshots 0 0\nUUID=2 /mnt ext4 defaults 0 0\n",
    )


def test_plan_counts_a_btrfs_by_the_files_of_its_subvolumes_there(world, system, ramboot):
    rooted(system, "btrfs")
    system.mounts += [
        "30 21 0:31 /home /home rw - btrfs /dev/sda2 rw",
        "31 21 8:17 / /mnt rw - btrfs /dev/sdb1 rw",
    ]
    system.write()
    fstab(world)
    first = world.write("/dom0/file", b"x" * (4 * MIB))
    os.link(first, f"{world.root}/dom0/same-file")
    world.write("/dom0/home/me/file", b"x" * (2 * MIB))
    world.write("/dom0/mnt/file", b"x" * (8 * MIB))
    found = ramboot.plan()["zram"]
    assert 6 * MIB <= found["source_bytes"] < 7 * MIB


def test_plan_counts_blocks_that_files_of_an_xfs_share_for_each(
    world, system, ramboot, monkeypatch
):
    """Nothing here shares any: what is allocated is made more than the file system says."""
    del system.mounts[3]
    rooted(system, "xfs")
    world.pillar["ramboot"] = {"copy": {"exclude": ["/tmp/*"]}}
    world.write("/dom0/file", b"x" * (4 * MIB))
    world.write("/dom0/tmp/file", b"x" * (2 * MIB))
    room = {"f_blocks": 1 << 20, "f_bfree": (1 << 20) - 3 * MIB // 4096, "f_frsize": 4096}
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(**room))
    found = ramboot.plan()["zram"]
    assert 4 * MIB <= found["source_bytes"] < 5 * MIB
    assert 2 * MIB <= found["excluded_bytes"] < 3 * MIB
    rooted(system, "ext4")
    assert ramboot.plan()["zram"]["source_bytes"] < 2 * MIB


@pytest.mark.parametrize("disk", ["readonly", "detached"])
def test_plan_says_what_the_disk_policy_means(world, ramboot, disk):
    world.pillar["ramboot"] = {"boot": {"disk": disk}}
    found = ramboot.plan()
    assert found["zram"]["says"].endswith(f"; with boot:disk {disk} no qube on the disk will start")
    assert found["overlay"]["says"].endswith(
        f"; not with boot:disk {disk}, which the pillar asks for"
    )


def test_plan_changes_nothing(world, ramboot):
    before = {path: unchanged(path) for path in world.root.rglob("*")}
    ramboot.plan()
    assert {path: unchanged(path) for path in world.root.rglob("*")} == before


def test_plan_reckons_qubes_that_the_pillar_asks_for_as_if_they_were_there(world, ramboot):
    before = ramboot.plan()
    world.salt["ramboot_qubes.budget"] = lambda: {
        "present_bytes": GIB,
        "pending_bytes": 2 * GIB,
    }
    assert len(before) == 5
    for backend, plan in ramboot.plan().items():
        assert plan["source_bytes"] == before[backend]["source_bytes"] + 2 * GIB
        assert (plan["qubes_bytes"], plan["qubes_pending_bytes"]) == (GIB, 2 * GIB)
        copied = GIB if backend in ("zram", "tmpfs") else -1
        assert plan["needed_bytes"] > before[backend]["needed_bytes"] + copied


# audit


def verdicts(found):
    return {item["place"]: item["verdict"] for item in found}


def row(place, finding, verdict, **would):
    return {"place": place, "finding": finding, "verdict": verdict, **would}


LEAVES = "each start of a qube in it leaves some"
NONE_MADE = f"made since this boot: none that is still there; {LEAVES}"


def test_audit_of_a_persistent_session_shows_the_disk_and_what_a_ram_session_would(system, ramboot):
    assert ramboot.audit() == [
        row("/", "ext4 from /dev/dm-1, writable", "disk", would="ram"),
        row("/boot", "ext4 from /dev/sda1, writable", "disk", would="ram"),
        row("swap", "none is active", "ram", would="ram"),
        row("volume qubes_dom0-root", "active, on disk", "trace", would="trace"),
        row("names in qubes_dom0", NONE_MADE, "trace", would="trace"),
        row(
            "all",
            "2 on a disk, 2 can leave a trace, 0 not known, 1 in RAM",
            "disk",
            would="trace",
        ),
    ]


@pytest.mark.parametrize("when", ["now", "then"])
def test_what_a_part_of_the_audit_could_not_tell_is_not_taken_for_gone(
    world, system, ramboot, monkeypatch, when
):
    real = ramboot._audit_mounts

    def _audit_mounts():
        if (ramboot._pretended() is not None) is (when == "then"):
            raise CommandExecutionError("no answer")
        return real()

    monkeypatch.setattr(ramboot, "_audit_mounts", _audit_mounts)
    found = would(ramboot.audit())
    places = ["/", "/boot"] if when == "then" else ["mounts"]
    assert [found[place] for place in places] == ["unknown"] * len(places)
    # of what could be told, what is no more is gone
    assert found["swap"] == "ram"


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
        "names in qubes_dom0": "trace",
        "all": "trace",
    }
    # this is a RAM session: it does not guess at another
    assert not any("would" in item for item in found)


def would(found):
    return {item["place"]: item["would"] for item in found}


@pytest.mark.parametrize(
    "boot",
    [{"backend": "snapshot"}, {"mode": "snapshot"}, {"backend": "zram", "disk": "detached"}],
    ids=str,
)
def test_nothing_would_be_left_where_the_pillar_keeps_lvm_off_the_disk(
    world, system, ramboot, boot
):
    world.pillar["ramboot"] = {"boot": boot}
    system.swaps = [{"name": "/dev/dm-1", "type": "partition", "size_bytes": 1, "used_bytes": 0}]
    system.zram(4, mounted=None)
    world.write("/usr/lib/systemd/user/grub-boot-success.timer")
    found = ramboot.audit()
    assert verdicts(found)["all"] == "disk"
    assert set(would(found).values()) == {"ram"}


def test_swap_that_the_pillar_keeps_would_go_on(world, system, ramboot):
    world.pillar["ramboot"] = {"swap": "keep"}
    system.swaps = [{"name": "/dev/dm-1", "type": "partition", "size_bytes": 1, "used_bytes": 0}]
    assert would(ramboot.audit())["swap /dev/dm-1"] == "disk"


def test_a_snapshot_session_would_use_nothing_beside_its_layer(world, system, ramboot):
    """Partitions are left alone; a LUKS mapping of another disk may be opened and mounted yet."""
    world.pillar["ramboot"] = {"boot": {"backend": "snapshot"}, "swap": "keep"}
    system.block("dm-2", slaves=["sda3"], uuid="CRYPT-LUKS2-y", dm="luks-y")
    system.block("sda3")
    for target, source in (("/srv", "/dev/sda3"), ("/mnt", "/dev/dm-2"), ("/home/x", "/dev/dm-1")):
        system.mounts.append(f"27 21 8:9 / {target} rw - ext4 {source} rw")
    system.write()
    system.swaps = [
        {"name": name, "type": kind, "size_bytes": 1, "used_bytes": 0}
        for name, kind in (
            ("/dev/sda3", "partition"),
            ("/dev/dm-1", "partition"),
            ("/swapfile", "file"),
            ("/mnt/swap", "file"),
        )
    ]
    assert would(ramboot.audit()) == {
        "/": "ram",
        "/boot": "ram",
        "/srv": "ram",
        "/mnt": "disk",
        "/home/x": "ram",
        "swap /dev/sda3": "ram",
        "swap /dev/dm-1": "ram",
        "swap /swapfile": "ram",
        "swap /mnt/swap": "disk",
        "volume qubes_dom0-root": "ram",
        "names in qubes_dom0": "ram",
        "all": "disk",
    }


@pytest.mark.parametrize("device", ["/dev/sda2", "/dev/dm-0", "/dev/dm-1"])
@pytest.mark.parametrize("backend", ["zram", "tmpfs", "image", "snapshot"])
def test_what_a_btrfs_mounts_of_its_own_would_go_with_its_root(
    world, system, ramboot, backend, device
):
    """A copy has what fstab mounts of it, the layer of a snapshot all."""
    world.pillar["ramboot"] = {"boot": {"backend": backend}, "swap": "keep"}
    system.mounts[0] = f"21 1 0:30 /root / rw - btrfs {device} rw"
    for target in ("home", "snapshots"):
        system.mounts.append(f"30 21 0:31 /{target} /{target} rw - btrfs {device} rw")
    system.mounts.append("33 21 0:33 / /mnt rw - btrfs /dev/sdb1 rw")
    system.block("sdb1")
    system.write()
    fstab(world)
    system.swaps = [{"name": "/home/swap", "type": "file", "size_bytes": 1, "used_bytes": 0}]
    found = would(ramboot.audit())
    assert (found["/"], found["/home"], found["swap /home/swap"]) == ("ram", "ram", "ram")
    assert found["/snapshots"] == ("ram" if backend == "snapshot" else "disk")
    assert found["/mnt"] == ("ram" if backend == "snapshot" else "disk")


def test_another_backend_would_mount_what_it_mounts_now(world, system, ramboot):
    world.pillar["ramboot"] = {"swap": "keep"}
    system.block("sda3")
    system.mounts.append("27 21 8:9 / /srv rw - ext4 /dev/sda3 rw")
    system.write()
    system.swaps = [{"name": "/dev/sda3", "type": "partition", "size_bytes": 1, "used_bytes": 0}]
    found = would(ramboot.audit())
    assert (found["/srv"], found["swap /dev/sda3"]) == ("disk", "disk")


def test_a_swap_file_on_a_copied_root_is_in_ram(system, ramboot):
    system.zram(1)
    system.swaps = [{"name": "/swapfile", "type": "file", "size_bytes": 1, "used_bytes": 0}]
    assert verdicts(ramboot.audit())["swap /swapfile"] == "ram"


def test_the_pretence_ends_with_the_audit(world, system, ramboot):
    before = ramboot.backing("/dev/dm-1")
    world.pillar["ramboot"] = {"boot": {"backend": "snapshot"}}
    ramboot.audit()
    assert (before, ramboot.backing("/dev/dm-1")) == ("disk", "disk")
    assert ramboot._root_mount()["source"] == "/dev/dm-1"


OURS = "21 1 0:50 / / rw - overlay ramboot-root rw,lowerdir=/x,upperdir=/run/ramboot/root/rw/upper"


def overlay_noted(world, **other):
    world.write("/run/ramboot/status.json", json.dumps({**NOTED, "backend": "overlay", **other}))


def test_the_root_of_the_backend_overlay_is_written_to_ram_over_the_disk(world, system, ramboot):
    overlay_noted(world)
    system.mounts[:2] = [OURS]
    system.write()
    found = ramboot.audit()
    assert found[0] == row("/", "overlay from ramboot-root, writable", "ram")
    assert found[1] == row(
        "below /",
        "ext4 from /dev/mapper/qubes_dom0-root, mounted read-only and without its journal",
        "trace",
    )
    assert verdicts(found)["all"] == "trace"


@pytest.mark.parametrize(
    ("line", "noted"),
    [
        (OURS.replace("/run/ramboot/root/rw/upper", "/mnt/upper"), {}),
        (OURS.replace("overlay ramboot-root", "ext4 ramboot-root"), {}),
        (OURS, {"backend": "zram"}),
        (OURS, {"session": "persistent"}),
    ],
    ids=["another upper", "no overlay", "not noted", "not in RAM"],
)
def test_an_overlay_that_may_not_be_ours_is_not_known(world, system, ramboot, line, noted):
    overlay_noted(world, **noted)
    system.mounts[:2] = [line]
    system.write()
    found = verdicts(ramboot.audit())
    assert (found["/"], found["all"]) == ("unknown", "unknown")


def test_an_overlay_without_any_note_is_not_known(system, ramboot):
    system.mounts[:2] = [OURS]
    system.write()
    assert ramboot.backing("ramboot-root") == "unknown"
    assert ramboot.status()["session"] == "unknown"
    assert verdicts(ramboot.audit())["/"] == "unknown"


def loop(system, file):
    # the test's own files are in /tmp, which is a tmpfs here
    del system.mounts[3]
    system.block("loop0")
    system.world.write("/sys/class/block/loop0/loop/backing_file", f"{file}\n")
    system.world.write("/sys/class/block/loop0/size", "2048\n")
    system.mounts.append("25 21 7:0 / /mnt ro - squashfs /dev/loop0 ro")
    system.write()


def test_a_loop_device_is_where_its_file_is(world, system, ramboot):
    file = world.write("/image")
    loop(system, file)
    found = verdicts(ramboot.audit())
    assert (found["/mnt"], found["device loop0"]) == ("trace", "trace")
    system.zram(1)
    found = verdicts(ramboot.audit())
    assert found["/mnt"] == "ram"
    assert "device loop0" not in found


def test_a_loop_device_whose_file_is_deleted_is_not_known(world, system, ramboot):
    system.zram(1)
    loop(system, f"{world.root}/image (deleted)")
    found = verdicts(ramboot.audit())
    assert (found["/mnt"], found["device loop0"]) == ("unknown", "trace")


def test_a_loop_device_over_a_disk_is_that_disk_and_has_no_row_of_its_own(system, ramboot):
    loop(system, "/dev/dm-0")
    found = verdicts(ramboot.audit())
    assert found["/mnt"] == "trace"
    assert ramboot.backing("/dev/loop0") == "disk"
    assert "device loop0" not in found


def disk(system, name, size=4 << 21, **files):
    for key, text in {"size": size, "ro": 0, "removable": 0, **files}.items():
        system.world.write(f"/sys/class/block/{name}/{key}", f"{text}\n")


def test_every_disk_is_told_with_who_is_on_it(world, system, ramboot):
    disk(system, "sda", size=500 << 21)
    world.write("/sys/class/block/sda/device/model", "FAST  DISK\n")
    for part in ("sda1", "sda2"):
        world.write(f"/sys/class/block/sda/{part}/partition", "1\n")
        disk(system, part, partition=1)
    world.write("/sys/class/block/sda2/holders/dm-0")
    world.write("/sys/class/block/dm-0/dm/name", "luks-x\n")
    disk(system, "sdb", removable=1, size=100 << 11)
    disk(system, "sdc", ro=1)
    disk(system, "sdd", ro=1)
    world.write("/sys/class/block/sdd/holders/dm-9")
    disk(system, "fd0", size=8)
    disk(system, "sr0", size=0)
    system.zram(1, mounted=None)
    disk(system, "zram1")
    disk(system, "dm-1")
    found = [item for item in ramboot.audit() if item["place"].startswith("device ")]
    assert found == [
        row(f"device {name}", finding, verdict, would=verdict)
        for name, finding, verdict in (
            ("fd0", "4 KiB, writable, not in use", "trace"),
            ("sda", "FAST DISK, 500.0 GiB, writable, in use: /boot, luks-x", "trace"),
            ("sdb", "100.0 MiB, removable, writable, not in use", "trace"),
            ("sdc", "4.0 GiB, marked read-only, not in use", "ram"),
            ("sdd", "4.0 GiB, marked read-only, in use: dm-9", "trace"),
        )
    ]


def test_names_that_this_session_left_in_lvm_are_listed(system, ramboot):
    system.zram(1)
    for name, when in (("vm-work-private-snap", AFTER), ("vm-work-private", BEFORE)):
        system.volumes.append({**VOLUME, "lv_name": name, "lv_time": when})
    assert (
        row(
            "names in qubes_dom0",
            f"made since this boot: vm-work-private-snap; {LEAVES}",
            "trace",
        )
        in ramboot.audit()
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [(5, ""), (0, "no JSON"), (0, "[]"), *((0, json.dumps({"report": report})) for report in
     ([], None, [{}], [{"lv": None}], [{"lv": [{}]}], [{"lv": ["root"]}],
      [{"lv": [{**VOLUME, "lv_name": "root", "lv_time": None}]}]))],
)  # fmt: skip
def test_an_answer_of_lvm_that_can_not_be_understood_ends_no_audit(system, ramboot, code, said):
    system.lvs = {"retcode": code, "stdout": said, "stderr": "no device"}
    found = verdicts(ramboot.audit())
    assert (found["names"], found["/"]) == ("unknown", "disk")
    with pytest.raises(CommandExecutionError, match="^lvs --reportformat json "):
        system.world.salt["ramboot_audit.volumes"]()


@pytest.mark.parametrize("fault", ["time", "no btime"])
def test_names_that_can_not_be_told_are_not_known(world, system, ramboot, fault):
    if fault == "time":
        system.volumes[0]["lv_time"] = "yesterday"
    else:
        world.write("/proc/stat", "cpu 1\n")
    assert verdicts(ramboot.audit())["names"] == "unknown"


def test_logs_and_files_of_ours_are_where_their_mount_is(world, system, ramboot):
    for folder in ("/var/log", "/run/ramboot"):
        (world.root / folder[1:]).mkdir(parents=True)
    system.zram(1)
    system.mounts.append(f"26 21 8:2 / {world.root}/var/log rw - ext4 /dev/sda2 rw")
    system.write()
    found = verdicts(ramboot.audit())
    assert found[f"files in {world.root}/var/log"] == "disk"
    assert found[f"files in {world.root}/run/ramboot"] == "ram"


def test_the_table_has_the_worst_first_and_the_verdict_over_all_last(system, ramboot):
    assert ramboot.audit(table=True).splitlines() == [
        "now    in RAM  place                   finding",
        "disk   ram     /                       ext4 from /dev/dm-1, writable",
        "disk   ram     /boot                   ext4 from /dev/sda1, writable",
        "trace  trace   volume qubes_dom0-root  active, on disk",
        f"trace  trace   names in qubes_dom0     {NONE_MADE}",
        "ram    ram     swap                    none is active",
        "disk   trace   all                     2 on a disk, 2 can leave a trace, 0 not known, 1 in"
        " RAM",
    ]


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
    assert row(f"swap {name}", f"{kind}, 2 MiB used", verdict, would="ram") in ramboot.audit()


IMAGE = {
    "version": 1,
    "file": "root-0.squashfs",
    "bytes": 700 * MIB,
    "chunk_mib": 16,
    "source_bytes": 5 * GIB,
    "sha256": "5" * 64,
    "made": "2026-11-25T01:00:00Z",
    "kernels": "6.12.0",
    **dict.fromkeys(("packages", "configuration", "programs", "qubes"), "0" * 64),
}


def an_image(world, place):
    world.write(place, "".join(f"{key}={value}\n" for key, value in IMAGE.items()))


def test_a_root_made_of_an_image_goes_with_the_power(world, system, ramboot):
    system.mounts[0] = "21 1 0:30 / / rw - overlay ramboot-image rw,lowerdir=/x"
    system.write()
    # a name alone proves nothing
    assert verdicts(ramboot.audit())["/"] == "unknown"
    an_image(world, "/run/ramboot/image")
    assert verdicts(ramboot.audit())["/"] == "ram"
    found = ramboot.status()["live"]["image"]
    assert found.pop("age_s") >= 0
    assert found == {"made": "2026-11-25T01:00:00Z", "bytes": 700 * MIB}


def test_an_image_on_the_disk_is_a_trace_of_what_the_root_held(world, ramboot):
    an_image(world, "/var/lib/ramboot/image/manifest")
    assert {
        "place": f"{world.root}/var/lib/ramboot/image",
        "finding": f"the image of {IMAGE['made']}: what / held then, also what was deleted since",
        "verdict": "disk",
        "would": "disk",
    } in ramboot.audit()
    world.write("/var/lib/ramboot/image/manifest", "version=1\n")
    assert verdicts(ramboot.audit())["image"] == "unknown"


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        (None, "the image of 2026-11-25T01:00:00Z is current"),
        ("changed since", "the image is stale: changed since"),
    ],
)
def test_plan_reckons_with_the_image_that_there_is(world, ramboot, reason, says):
    an_image(world, "/var/lib/ramboot/image/manifest")
    world.salt["ramboot_image.stale"] = lambda: reason
    found = ramboot.plan()["image"]
    assert (found["root_bytes"], found["expected_bytes"]) == (716 * MIB, 700 * MIB)
    assert unkept(found["says"]).endswith(f"fits; {says}")
    # and with what the next one will have
    world.salt["ramboot_qubes.budget"] = lambda: {"present_bytes": GIB, "pending_bytes": GIB}
    more = 700 * MIB // 5
    found = ramboot.plan()["image"]
    assert (found["root_bytes"], found["expected_bytes"]) == (716 * MIB + more, 700 * MIB + more)


def test_verify_looks_at_the_image_too(world, ramboot):
    world.module("ramboot_record")
    world.salt["ramboot_initramfs.verify"] = lambda: {"disk": {}, "initramfs": {}, "faults": []}
    an_image(world, "/var/lib/ramboot/image/manifest")
    file = f"{world.root}/var/lib/ramboot/image/root-0.squashfs"
    missing = {"expected": "5" * 64, "actual": None, "mode": None, "owner": None}
    assert ramboot.verify() == {
        "disk": {file: {**missing, "verdict": "missing"}},
        "initramfs": {},
        "faults": [f"{file}: missing"],
    }


def test_a_zram_device_that_writes_back_is_a_disk(system, ramboot):
    system.zram(0, backing="/dev/sda3")
    system.world.write("/sys/class/block/zram0/backing_dev", "/dev/sda3\n")
    system.zram(1, backing=None, mounted=None)
    found = ramboot.audit()
    assert row("zram0", "backing device: /dev/sda3", "disk", would="disk") in found
    # and with it what lies on it
    assert verdicts(found)["/"] == "disk"
    assert verdicts(found)["zram1"] == "ram"


def test_units_that_write_grubenv_are_named_until_they_are_masked(world, ramboot):
    world.write("/usr/lib/systemd/user/grub-boot-success.timer")
    world.write("/usr/lib/systemd/system/grub-boot-indeterminate.service")
    mask = world.root / "etc/systemd/system/grub-boot-indeterminate.service"
    mask.parent.mkdir(parents=True)
    mask.symlink_to("/dev/null")
    found = ramboot.audit()
    timer = row("grub-boot-success.timer", "can write grubenv in /boot", "trace", would="ram")
    assert timer in found
    assert row("grub-boot-indeterminate.service", "masked", "ram", would="ram") in found


@pytest.mark.parametrize(
    ("line", "writes"),
    [
        ("  save_env boot_success boot_indeterminate", True),
        ("save_env next_entry", False),
        ("# save_env boot_success", False),
    ],
)
def test_what_grub_itself_writes_at_each_boot_is_named(world, ramboot, line, writes):
    world.write("/boot/grub2/grub.cfg", f"set boot_success=0\n{line}\nmenuentry x {{\n}}\n")
    found = [item for item in ramboot.audit() if item["place"] == "grubenv"]
    finding = (
        f"GRUB writes boot_success beside {world.root}/boot/grub2/grub.cfg at each boot,"
        " before Linux"
    )
    assert found == ([row("grubenv", finding, "trace", would="trace")] if writes else [])


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
