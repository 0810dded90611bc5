# SPDX-License-Identifier: GPL-2.0-or-later
"""`ramboot status` and ramboot.status are two programs, for one needs no Salt and no root: on one
system they say the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from salt.exceptions import CommandExecutionError
from test_command import COMMAND, FILLED
from test_ramboot import NOTED, System

STATUS, WATCHED = "/run/ramboot/status.json", "/run/ramboot/filled.json"
MADE = "2001-02-03T04:05:06Z"
IMAGE = f"""version=1
file=image
bytes=734003200
sha256=a
chunk_mib=16
made={MADE}
kernels=6.12.1
source_bytes=1
packages=a
configuration=a
programs=a
qubes=a
"""


@pytest.fixture
def system(world, monkeypatch):
    system = System(world)
    for name in ("config", "image", "qubes_pools", "swap"):
        world.module(f"ramboot_{name}")
    system.module = world.module("ramboot")
    monkeypatch.setattr(system.module, "ROOT", str(world.root))
    world.write("/proc/swaps", "Filename Type Size Used Priority\n")
    world.write(f"/boot/initramfs-{os.uname().release}.img")
    return system


def rooted(system, device, fstype="ext4", options="rw"):
    system.mounts[0] = f"21 1 252:9 / / rw - {fstype} {device} {options}"
    system.write()


def note(system, **changes):
    system.world.write(STATUS, json.dumps({**NOTED, **changes}))


def of_the_module(system):
    try:
        return system.module.status()
    except CommandExecutionError:
        return None


def of_the_command(system):
    done = subprocess.run(
        [sys.executable, "-I", str(COMMAND), "status", "--json"],
        env={"RAMBOOT_PREFIX": str(system.world.root), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode in (0, 1, 3), done.stderr
    assert (done.returncode == 1) == (done.stdout == ""), done.stderr
    return json.loads(done.stdout) if done.stdout else None


def said_by_both(system):
    """What both say; None where both refuse."""
    found = [of_the_module(system), of_the_command(system)]
    for said in filter(None, found):
        del said["live"]["root"]["used_bytes"]  # of the test's own disk
        for part in ("initramfs", "image"):
            if said["live"][part]:
                assert said["live"][part].pop("age_s") >= 0
    same = [json.dumps(said, sort_keys=True).replace(str(system.world.root), "") for said in found]
    assert same[0] == same[1]
    return found[0]


def test_of_a_session_that_stayed_on_the_disk(system):
    note(system, session="persistent", backend=None, disk=None, reason="not enough RAM")
    found = said_by_both(system)
    assert (found["session"], found["live"]["zram"]) == ("persistent", None)
    assert found["live"]["initramfs"]


def test_of_a_root_on_zram(system):
    note(system)
    system.zram(1)
    assert said_by_both(system)["live"]["zram"]["device"] == "/dev/zram1"


@pytest.mark.parametrize(
    ("text", "age_s", "known"),
    [
        (json.dumps(FILLED), 0, True),
        (json.dumps(FILLED), 3600, False),
        (json.dumps({**FILLED, "lost": True}), 3600, True),
        ("{", 0, False),
        ("[]", 0, False),
        ("[]", 3600, False),
    ],
)
def test_of_a_snapshot_and_its_watch(system, text, age_s, known):
    note(system, backend="snapshot", requested="snapshot")
    system.zram(2, mounted=None)
    system.world.write("/run/ramboot/layer-zram", "2")
    noted = system.world.write(WATCHED, text)
    then = noted.stat().st_mtime - age_s
    os.utime(noted, (then, then))
    live = said_by_both(system)["live"]
    assert (live["zram"]["device"], bool(live["filled"])) == ("/dev/zram2", known)


@pytest.mark.parametrize(
    ("text", "known"), [(IMAGE, True), ("", False), (IMAGE.replace(MADE, "now"), False)]
)
def test_of_an_image(system, text, known):
    """Without one in RAM the module tells of the one on the disk, which only root can read."""
    note(system, backend="image", requested="image")
    system.world.write("/run/ramboot/image", text)
    rooted(system, "ramboot-image", "overlay")
    assert bool(said_by_both(system)["live"]["image"]) == known


def test_of_swap(system):
    note(system)
    system.world.write(
        "/proc/swaps",
        "Filename Type Size Used Priority\n/dev/dm-1 partition 8192 1024 -2\n"
        "/var/a\\040file file 4096 0 -3\n",
    )
    found = said_by_both(system)["live"]["swap"]
    assert [swap["name"] for swap in found] == ["/dev/dm-1", "/var/a file"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"schema": 2}',
        "",
        json.dumps(NOTED).encode() + b"\xff",
        b'{"schema": 1, "reason": "\xff"}',
    ],
)
def test_of_a_damaged_note(system, text):
    system.world.write(STATUS, text)
    assert said_by_both(system) is None


def test_of_a_note_that_cannot_be_read(system):
    system.world.write(f"{STATUS}/file")
    assert said_by_both(system) is None


@pytest.mark.parametrize(
    ("device", "session"),
    [
        ("/dev/dm-1", "persistent"),
        ("/dev/sda2", "persistent"),
        ("/dev/zram0", "unknown"),
        ("/dev/zram1", "persistent"),
        ("/dev/ram0", "unknown"),
        ("/dev/dm-5", "unknown"),
        ("/dev/dm-6", "unknown"),
        ("/dev/dm-7", "unknown"),
        ("/dev/loop1", "persistent"),
        ("/dev/nbd0", "unknown"),
        ("/dev/absent", "unknown"),
        ("tmpfs", "unknown"),
        ("ramboot-root", "unknown"),
        ("ramboot-image", "unknown"),
    ],
)
def test_where_nothing_was_noted(system, device, session):
    system.zram(0, mounted=None)
    for disk in ("zram1", "ram0", "loop1", "nbd0"):
        system.block(disk)
    system.world.write("/sys/class/block/zram1/backing_dev", "/dev/sda2\n")
    system.world.write("/sys/class/block/zram0/backing_dev", "none\n")
    system.world.write("/sys/class/block/loop1/loop/backing_file", "/dev/sda2\n")
    system.block("dm-4", slaves=["sda2", "zram0"], uuid="CRYPT-x", dm="ramboot-layer")
    system.block("dm-5", slaves=["dm-4"], uuid="LVM-x", dm="qubes_dom0-root")
    # a target without devices
    system.block("dm-6", uuid="x", dm="zero")
    system.block("dm-7", slaves=["zram0"], uuid="x", dm="linear")
    rooted(system, device, {"tmpfs": "tmpfs"}.get(device, "ext4"))
    assert said_by_both(system)["session"] == session
