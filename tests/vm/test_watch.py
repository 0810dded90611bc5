# SPDX-License-Identifier: GPL-2.0-or-later
"""The watch of a RAM session: what is deleted comes back by itself; before the store is full the
session is told and qubes are paused; when it is full, the disk is as it was.

Its files are put into a running machine; that a boot starts them is seen with those that the
formula applied (test_snapshot.py, test_ram_session.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from vm import build
from vm.machine import Machine

MachineMaker = Callable[..., Machine]
FILES = build.REPOSITORY / "ramboot/session/files"
STANDIN = build.REPOSITORY / "tests/standin"
STORE = "cat /sys/block/zram$(cat /run/ramboot/layer-zram)/mm_stat | awk '{print $3}'"
UNIT = """[Service]
Environment=RAMBOOT_STANDIN=/run/qubes.json
ExecStart=
ExecStart=/usr/libexec/ramboot-watch --trim-s 10
"""
QUBES = """
import qubesadmin
qubesadmin.WORLD.add_pool("vm-pool", "lvm_thin", volume_group="qubes_dom0", thin_pool="vm-pool")
qubesadmin.WORLD.system["default_pool"] = "vm-pool"
app = qubesadmin.Qubes()
app.add_new_vm("TemplateVM", "debian", "black")
for name in ("work", "sys-usb", "halted"):
    app.add_new_vm("AppVM", name, "red", template="debian")
qubesadmin.WORLD.qubes["sys-usb"]["pci"]["00_14.0"] = {}
for name in ("work", "sys-usb"):
    qubesadmin.WORLD.run(name)
"""


def payload(directory: Path) -> Path:
    """The component as its states lay it down, and qubes: the stand-in for qubesadmin."""
    qubes = directory / "qubes.json"
    environment = {**os.environ, "PYTHONPATH": str(STANDIN), "RAMBOOT_STANDIN": str(qubes)}
    subprocess.run([sys.executable, "-c", QUBES], env=environment, check=True)
    override = directory / "override"
    override.write_text(UNIT, encoding="utf-8")
    systemd = "usr/lib/systemd/system"
    target = directory / "payload.tar"
    with tarfile.open(target, "w") as tar:
        for source, place in (
            (FILES / "ramboot", "usr/bin/ramboot"),
            (FILES / "ramboot-watch", "usr/libexec/ramboot-watch"),
            (FILES / "ramboot-watch.service", f"{systemd}/ramboot-watch.service"),
            (FILES / "50-ramboot.conf", f"{systemd}/multi-user.target.d/50-ramboot.conf"),
            (override, "run/systemd/system/ramboot-watch.service.d/test.conf"),
            (qubes, "run/qubes.json"),
            (STANDIN / "qubesadmin", "usr/lib/python3/dist-packages/qubesadmin"),
        ):
            tar.add(source, place, filter=_of_root)
    return target


def _of_root(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return None if "__pycache__" in info.name else info


def config(**changes: object) -> str:
    """The boot configuration with other values of some of its lines."""
    lines = build._boot_conf({}).splitlines()
    return "".join(
        f"{key}={changes.get(key, value)}\n" if "=" in line else f"{line}\n"
        for line in lines
        for key, _, value in [line.partition("=")]
    )


def start_watch(dom0: Machine) -> None:
    dom0.install_payload()
    dom0.succeed("systemctl daemon-reload && systemctl start multi-user.target")
    dom0.succeed(wait("systemctl is-active ramboot-watch"))
    dom0.succeed(wait("test -e /run/ramboot/filled.json"))


def wait(condition: str, seconds: int = 90) -> str:
    return (
        f"for i in $(seq {seconds}); do {condition} >/dev/null && break; sleep 1; done; {condition}"
    )


def filled(dom0: Machine) -> dict:
    return json.loads(dom0.succeed("cat /run/ramboot/filled.json"))


def fill_to(dom0: Machine, percent: int) -> None:
    """Write, as a qube would, until the watch has found that much."""
    dom0.succeed(
        "while ! python3 -c 'import json, sys; "
        f'sys.exit(json.load(open("/run/ramboot/filled.json"))["percent"] < {percent})\'; '
        "do dd if=/dev/urandom of=/root/fill bs=1M count=4 oflag=append conv=notrunc,fsync "
        "status=none; sleep 2.5; done",
        timeout_s=400,
    )


def test_a_store_that_fills_up_is_told_and_costs_the_disk_nothing(
    machine: MachineMaker, tmp_path: Path
) -> None:
    dom0 = machine(build.base(), payload=payload(tmp_path))
    dom0.start_direct(
        "ramboot=snapshot",
        initrd=build.initramfs(),
        files={"etc/ramboot/ramboot.conf": config(snapshot_store_mib=256)},
    )
    dom0.unlock()
    dom0.shell()
    start_watch(dom0)
    print(
        dom0.succeed(
            "cat /run/ramboot/filled.json; ramboot status; ls -l /run/ramboot; grep -E 'VmRSS|RssAnon' /proc/$(systemctl show -p MainPID --value ramboot-watch)/status"
        )
    )

    # what is deleted gives its RAM back, and nobody did anything
    dom0.succeed("dd if=/dev/urandom of=/root/gone bs=1M count=50 conv=fsync status=none")
    full = int(dom0.succeed(STORE))
    assert full > 50_000_000
    dom0.succeed("rm /root/gone && sync")
    dom0.succeed(wait(f"test $({STORE}) -lt {full - 45_000_000}"))

    for percent, priority in ((70, "warning"), (85, "crit")):
        fill_to(dom0, percent)
        told = dom0.succeed(f"journalctl -b -t ramboot -p {priority}..{priority} -o cat")
        print(told)
        assert f"{percent}" in told
    assert filled(dom0)["paused"] == []
    fill_to(dom0, 95)
    dom0.succeed(wait("grep work /run/ramboot/filled.json"))
    # the qube with the keyboard goes on
    assert filled(dom0)["paused"] == ["work"]
    print(
        dom0.succeed(
            "journalctl -b -t ramboot -o short; dmsetup status ramboot-layer; ramboot status; cat /run/qubes.json"
        )
    )
    # dom0 writes on
    dom0.console.enter("cat /dev/urandom > /root/fill2")
    dom0.wait_for("the session is lost", 120)
    dom0.console.drain(5)
    print(dom0.console.transcript.last_lines(60))
    assert dom0.written_bytes() == 0
    dom0.crash()
    assert dom0.disk_unchanged()
