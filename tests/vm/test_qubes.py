# SPDX-License-Identifier: GPL-2.0-or-later
"""What a stateless qube writes stays in RAM, and what one in the disk's pool writes does not: the
disk's own counter, and the audit beside it. Volumes are laid and opened as Qubes' storage drivers
do it, and Xen guests write to them.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vm import build, xen_guest
from vm.build import REPOSITORY
from vm.claims import assert_ram_session
from vm.machine import Machine

MachineMaker = Callable[..., Machine]
MIB = 1 << 20
STANDIN, WORLD = "srv/standin", "run/qubesd.json"

# The driver `file` (QubesOS/qubes-core-admin: qubes/storage/file.py, linux/system-config/
# create-snapshot): sparse files, loop devices, device-mapper snapshots of 256 sectors a chunk.
LAID = """(
set -eu
mkdir -p /var/lib/qubes && cd /var/lib/qubes
for file in vm-templates/t/root vm-templates/t/root-cow vm-templates/t/private appvms/dvm/private \
    appvms/dvm/private-cow appvms/disp1/root-cow appvms/disp1/private-cow appvms/disp1/volatile; do
    mkdir -p "${file%/*}" && truncate -s 1G "$file.img"
done
loop() { losetup --find --nooverlap --show "$1.img"; }
layer() { dmsetup create "$1" --table "0 $(blockdev --getsz "$2") snapshot $2 $3 P 256"; }
modprobe dm_snapshot
layer snapshot-t "$(loop vm-templates/t/root)" "$(loop vm-templates/t/root-cow)"
layer snapshot-root /dev/mapper/snapshot-t "$(loop appvms/disp1/root-cow)"
dvm=$(loop appvms/dvm/private)
layer snapshot-dvm "$dvm" "$(loop appvms/dvm/private-cow)"
layer snapshot-private /dev/mapper/snapshot-dvm "$(loop appvms/disp1/private-cow)"
dmsetup create origin-dvm --table "0 $(blockdev --getsz "$dvm") snapshot-origin $dvm"
loop appvms/disp1/volatile > /run/volatile
)"""
# Where what a qube writes must be found: volume opened, file that grew.
RAM_VOLUMES = {
    "disp1": {
        "/dev/mapper/snapshot-root": "appvms/disp1/root-cow.img",
        "/dev/mapper/snapshot-private": "appvms/disp1/private-cow.img",
        "$(cat /run/volatile)": "appvms/disp1/volatile.img",
    },
    "dvm": {"/dev/mapper/origin-dvm": "appvms/dvm/private.img"},
}
# The driver `lvm_thin` (qubes/storage/lvm.py): what a start makes in the disk's pool.
STARTED = """(
set -eu
lvcreate -qq -kn -ay -s -n vm-work-private-snap qubes_dom0/vm-work-private
lvcreate -qq -kn -ay -V 1G -T qubes_dom0/vm-pool -n vm-work-volatile
sync
)"""


# What qubes-core.service makes at each boot (linux/aux-tools/startup-misc.sh): here before disp1.
BEGAN = """(
set -eu
mkdir -p /var/lib/qubes/backup
for name in t dvm work; do
    echo "<domain><properties><property name='name'>$name</property></properties></domain>"
done > /run/domains
echo "<qubes><domains>$(cat /run/domains)</domains></qubes>" > /var/lib/qubes/backup/qubes-now.xml
)"""


def volume(pool: str, vid: str, **other: Any) -> dict[str, Any]:
    """As the stand-in for qubesadmin keeps it; one that a qube keeps."""
    plain = {"size": 1 << 30, "rw": True, "ephemeral": False, "source": None}
    plain |= {"snap_on_start": False, "save_on_stop": True, "revisions_to_keep": 0}
    return {**plain, "pool": pool, "vid": vid, **other}


def scratch(pool: str, vid: str) -> dict[str, Any]:
    """A volatile volume."""
    return volume(pool, vid, save_on_stop=False)


def snapshot(pool: str, vid: str, source: str) -> dict[str, Any]:
    """A volume that begins as another one at each start."""
    return volume(pool, vid, snap_on_start=True, save_on_stop=False, source=source)


def qube(cls: str, template: str | None, running: bool, **volumes: Any) -> dict[str, Any]:
    """As the stand-in keeps it."""
    plain = {"label": "red", "properties": {}, "features": {}, "tags": [], "pci": {}}
    return {
        **plain,
        "class": cls,
        "template": template,
        "running": running,
        "volumes": volumes,
    }


def qubesd() -> dict[str, Any]:
    """A stateless template, disposables of it, and a qube on the disk."""
    files, thin, group = "varlibqubes", "vm-pool", "qubes_dom0/vm-work"
    pools = {
        files: {"driver": "file", "dir_path": "/var/lib/qubes"},
        thin: {"driver": "lvm_thin", "volume_group": "qubes_dom0", "thin_pool": thin},
    }
    return {
        "release": "4.3",
        "pools": {name: {"name": name, **config} for name, config in pools.items()},
        "system": {"default_pool": thin},
        "features": {},
        "usage": {},
        "revisions": {},
        "qubes": {
            "t": qube(
                "TemplateVM",
                None,
                False,
                root=volume(files, "vm-templates/t/root"),
                private=volume(files, "vm-templates/t/private"),
                volatile=scratch(files, "vm-templates/t/volatile"),
            ),
            "dvm": qube(
                "AppVM",
                "t",
                True,
                root=snapshot(files, "appvms/dvm/root", "vm-templates/t/root"),
                private=volume(files, "appvms/dvm/private"),
                volatile=scratch(files, "appvms/dvm/volatile"),
            ),
            "disp1": qube(
                "DispVM",
                "dvm",
                True,
                root=snapshot(files, "appvms/disp1/root", "vm-templates/t/root"),
                private=snapshot(files, "appvms/disp1/private", "appvms/dvm/private"),
                volatile=scratch(files, "appvms/disp1/volatile"),
            ),
            "work": qube(
                "StandaloneVM",
                None,
                True,
                root=volume(thin, f"{group}-root"),
                private=volume(thin, f"{group}-private"),
                volatile=scratch(thin, f"{group}-volatile"),
            ),
        },
    }


def payload(target: Path) -> Path:
    """The formula, the stand-in for qubesadmin and what its qubesd knows, and a guest."""
    build.formula_payload(target, "{}\n")
    with tarfile.open(target, "a") as tar:
        xen_guest.add_to(tar)
        for source in sorted((REPOSITORY / "tests/standin/qubesadmin").glob("*.py")):
            tar.add(source, f"{STANDIN}/qubesadmin/{source.name}")
        text = json.dumps(qubesd()).encode()
        info = tarfile.TarInfo(WORLD)
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))
    return target


def test_a_stateless_qube_writes_to_ram_and_one_in_the_disks_pool_to_the_disk(
    machine: MachineMaker, tmp_path: Path
) -> None:
    dom0 = machine(
        build.base(),
        # dom0 takes its dom0_mem=max first
        memory_mib=5120,
        payload=payload(tmp_path / "payload.tar"),
    )
    dom0.start_direct("ramboot=zram", xen=True, initrd=build.initramfs())
    dom0.unlock()
    dom0.shell()
    assert_ram_session(dom0, "zram", "ext4")
    dom0.install_payload()
    dom0.succeed(BEGAN)

    xen_guest.services(dom0)
    dom0.succeed(LAID)
    for name, volumes in RAM_VOLUMES.items():
        xen_guest.write_all(dom0, name, *volumes)
        for device, file in volumes.items():
            held = int(dom0.succeed(f"stat -c %b /var/lib/qubes/{file}")) * 512
            assert held >= 100 * MIB, f"{device}: {file} holds {held} bytes"
    dom0.succeed("sync")
    assert dom0.written_bytes() == 0

    # the control, in the same boot: its names reach LVM's metadata, then its bytes the pool
    dom0.succeed(STARTED)
    named = dom0.written_bytes()
    assert named > 0
    made = ("vm-work-private-snap", "vm-work-volatile")
    xen_guest.write_all(dom0, "work", *(f"/dev/qubes_dom0/{volume}" for volume in made))
    assert dom0.written_bytes() >= named + 200 * MIB

    # a qube that dom0 does not know any more
    dom0.succeed("lvcreate -qq -kn -ay -V 64M -T qubes_dom0/vm-pool -n vm-gone-private")
    audit = rows(dom0)
    told = {place: verdict for place, (verdict, _finding) in audit.items()}
    for name in ("t", "dvm", "disp1"):
        found = {key: told[f"qube {name}{key}"] for key in ("", " root", " private", " volatile")}
        assert set(found.values()) == {"ram"}, found
    for key in ("", " root", " private", " volatile"):
        assert told[f"qube work{key}"] == "disk"
    assert told["pool varlibqubes"] == "ram"
    assert told["pool vm-pool"] == told["default_pool_root"] == told["qubes"] == "disk"
    assert told["left over qubes_dom0/vm-gone-private"] == "trace"
    assert "made in this session" in audit["qube disp1"][1]
    assert "made in this session" not in audit["qube dvm"][1]
    assert audit["names in qubes_dom0"] == (
        "trace",
        "made since this boot: vm-gone-private, vm-work-private-snap, vm-work-volatile; each start"
        " of a qube in it leaves some",
    )
    assert told["device vda"] == "trace"
    assert "luks-" in audit["device vda"][1]
    # the volumes' loop devices are followed to their files
    assert not [place for place in told if place.startswith("device loop")]
    assert told["files in /var/log"] == told["files in /run/ramboot"] == "ram"
    assert told["all"] == "disk"


def rows(dom0: Machine) -> dict[str, tuple[str, str]]:
    """The audit as a user gets it, by place; the stand-in answers for qubesd."""
    dom0.succeed("salt-call --local saltutil.sync_all", timeout_s=300)
    told = dom0.succeed(
        f"export PYTHONPATH=/{STANDIN} RAMBOOT_STANDIN=/{WORLD};"
        " salt-call --local --log-level=error --out=json ramboot.audit",
        timeout_s=300,
    )
    found = json.loads(told[told.index("{") :])["local"]
    return {row["place"]: (row["verdict"], row["finding"]) for row in found}
