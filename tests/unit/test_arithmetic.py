# SPDX-License-Identifier: GPL-2.0-or-later
"""RAM is reckoned twice, by the boot scripts and by ramboot.plan: one result for each backend."""

from __future__ import annotations

import re
import subprocess
from types import SimpleNamespace

import pytest
from test_ramboot import System, rooted

from conftest import REPO

MIB = 1 << 20
GIB = 1 << 30
SCRIPTS = REPO / "ramboot/initramfs/files/50ramboot"
# what dom0 has at the prompt, of grub:dom0_mem_max_mib by ramboot.plan's reckoning
MAX_MIB, AVAILABLE_MIB = 10240, 9728


def plan(world, monkeypatch, root, settings, image):
    """Bytes needed, by backend."""
    system = System(world)
    for name in ("config", "qubes_pools"):
        world.module(f"ramboot_{name}")
    rooted(system, root["fstype"])
    memory = {"dom0_mem_max_mib": MAX_MIB, "dom0_mem_scope": "all"}
    world.pillar["ramboot"] = {**settings, "grub": memory}
    world.salt["ramboot_qubes.budget"] = lambda: {"present_bytes": 0, "pending_bytes": 0}
    made = {"bytes": image, "source_bytes": root["used"], "made": "2001-02-03T04:05:06Z"}
    world.salt["ramboot_image.manifest_or_none"] = lambda: made if image else None
    world.salt["ramboot_image.stale"] = lambda: None
    module = world.module("ramboot")
    usage = SimpleNamespace(f_blocks=root["size"] // 4096, f_bfree=0, f_frsize=4096)
    monkeypatch.setattr(module.os, "statvfs", lambda _path: usage)
    # how much there is to copy is measured elsewhere
    monkeypatch.setattr(module, "source_bytes", lambda _exclude: (root["used"], 0))
    return {backend: found["needed_bytes"] for backend, found in module.plan().items()}


def boot(world, root, settings, image):
    """The same by the boot scripts' functions, which are given what they would have measured."""
    world.write("/proc/meminfo", f"MemAvailable: {AVAILABLE_MIB * 1024} kB\n")
    world.write("/sys/block/zram7/comp_algorithm", "lzo-rle lzo [lz4] zstd\n")
    # the program itself would run
    program = (SCRIPTS / "ramboot-initramfs.sh").read_text()
    (plan_zram,) = re.findall(r"^plan_zram\(\) \{\n.*?^\}\n", program, re.MULTILINE | re.DOTALL)
    parts = ("lib", "source", "copy", "snapshot", "image")
    lines = [f". {SCRIPTS}/ramboot-{part}.sh" for part in parts] + [plan_zram]
    known = {
        f"CONF_{section}_{key}": value
        for section, keys in (("zram", ("algorithm", "size_mib")), ("snapshot", ("store_mib",)))
        for key in keys
        for value in [settings.get(section, {}).get(key, "auto")]
    }
    known |= {f"CONF_{key}": value for key, value in settings["memory"].items()}
    known |= {"ST_FSTYPE": root["fstype"], "LAYER_ZRAM": 7, "ROOT_KIND": "lvm", "ROOT_SPEC": "q/r"}
    known |= {"SOURCE_DISK": "disk", "SOURCE_ROOT": "root"} | (
        {"IMAGE_bytes": image} if image else {}
    )
    lines += [f"{name}={value}" for name, value in known.items()]
    lines += [
        "dumpe2fs() { :; }; tune2fs() { :; }; lvm() { :; }; timeout() { :; }",
        # a store is never larger than the disk, which plan does not look at
        f"blockdev() {{ [ $2 = root ] && printf {root['size']} || printf {1 << 50}; }}",
    ]
    before = {"zram": "plan_zram", "snapshot": "snapshot_plan"}
    for backend in ("zram", "tmpfs", "image", "snapshot", "overlay"):
        lines.append(
            f"(ST_BACKEND={backend} ST_BYTES={root['used']}; {before.get(backend, ':')}"
            f" && {{ budget > /dev/null; echo {backend} $ST_NEEDED; }})"
        )
    done = subprocess.run(
        ["dash", "-c", "\n".join(lines)],
        env={"RAMBOOT_PREFIX": str(world.root), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    found = (line.split() for line in done.stdout.splitlines())
    return {backend: int(needed) for backend, needed in found}


@pytest.mark.parametrize(
    "root",
    [
        {"fstype": "ext4", "used": 5 * GIB + 4097, "size": 20 * GIB},
        {"fstype": "ext4", "used": 1_234_567_890, "size": 100 * GIB},
        {"fstype": "xfs", "used": 7 * GIB + 12345, "size": 64 * GIB},
        {"fstype": "btrfs", "used": 3 * GIB + 99, "size": 400 * GIB},
    ],
    ids=lambda root: f"{root['fstype']}-{root['size'] // GIB}",
)
@pytest.mark.parametrize(
    ("settings", "image"),
    [
        ({"memory": {"reserve_mib": 1024, "headroom_mib": 1024}}, None),
        ({"memory": {"reserve_mib": 700, "headroom_mib": 128}}, 1_500_000_001),
        (
            {
                "memory": {"reserve_mib": 256, "headroom_mib": 4096},
                "zram": {"algorithm": "zstd", "size_mib": 9000},
                "snapshot": {"store_mib": 5120},
            },
            None,
        ),
        (
            {
                "memory": {"reserve_mib": 2048, "headroom_mib": 300},
                "zram": {"algorithm": "lzo-rle"},
            },
            None,
        ),
    ],
    ids=["default", "with-an-image", "sizes", "algorithm"],
)
def test_the_boot_and_plan_need_the_same(world, monkeypatch, root, settings, image):
    at_boot = boot(world, root, settings, image)
    assert len(at_boot) == 5
    assert plan(world, monkeypatch, root, settings, image) == at_boot
