# SPDX-License-Identifier: GPL-2.0-or-later
"""The watch of a RAM session: before the store is full the session is told and qubes are paused;
when it is full, the disk is as it was.

Its files are put into a running machine; that a boot starts them is seen with those that the
formula applied (test_snapshot.py, test_ram_session.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from vm import build
from vm.claims import filled
from vm.machine import Machine

MachineMaker = Callable[..., Machine]
FILES = build.REPOSITORY / "ramboot/session/files"
STANDIN = build.REPOSITORY / "tests/standin"
UNIT = """[Service]
Environment=RAMBOOT_STANDIN=/run/qubes.json
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
    lines = build.configuration().splitlines()
    return "".join(
        f"{key}={changes.get(key, value)}\n" if "=" in line else f"{line}\n"
        for line in lines
        for key, _, value in [line.partition("=")]
    )


def start_watch(dom0: Machine) -> None:
    dom0.install_payload()
    dom0.succeed("systemctl daemon-reload && systemctl start multi-user.target")
    dom0.succeed(wait("systemctl is-active ramboot-watch"))


def wait(condition: str, seconds: int = 90) -> str:
    """A command that succeeds once `condition` does."""
    loop = f"for i in $(seq {seconds}); do {condition} >/dev/null && break; sleep 1; done"
    return f"{loop}; {condition}"


def fill_to(dom0: Machine, percent: int, step_mib: int) -> None:
    """Write what can't be compressed until the watch has found that much."""
    dom0.succeed(
        f"cat > /run/fill <<'END'\n{FILL}END\nsh /run/fill {percent} {step_mib}", timeout_s=400
    )


FILL = """
percent() { sed 's/.*"percent": \\([0-9]*\\).*/\\1/' /run/ramboot/filled.json; }
while [ "$(percent)" -lt "$1" ]; do
    dd if=/dev/urandom of=/root/fill bs=1M count="$2" oflag=append conv=notrunc,fsync status=none
    sleep 2.5
done
"""


def said(dom0: Machine, priority: str) -> str:
    """What the journal has from us with just this priority."""
    return dom0.succeed(f"journalctl -b -t ramboot -p {priority}..{priority} -o cat")


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

    for percent, priority, step_mib in ((70, "warning", 16), (85, "crit", 8)):
        fill_to(dom0, percent, step_mib)
        assert " % of the store for this session is used" in said(dom0, priority)
        assert filled(dom0)["paused"] == []
    fill_to(dom0, 95, 4)
    # the one with the keyboard and the one that is halted are left alone
    dom0.succeed(wait("grep work /run/ramboot/filled.json"))
    assert filled(dom0)["paused"] == ["work"]
    assert "paused: work" in dom0.succeed("ramboot status")

    # dom0 writes on
    dom0.console.enter("cat /dev/urandom > /root/more")
    dom0.wait_for("the store of this session is full", 180)
    assert dom0.written_bytes() == 0
    dom0.crash()
    assert dom0.disk_unchanged()
