# SPDX-License-Identifier: GPL-2.0-or-later
"""The watch of a RAM session: before RAM or the store is full the session is told and qubes are
paused; what is deleted comes back by itself; when the store is full, the disk is as it was.

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
# The zram device under the layer, and the bytes of RAM that it takes.
STORE = "cat /sys/block/zram$(cat /run/ramboot/layer-zram)/mm_stat | awk '{print $3}'"
# As Qubes' own crypttab has it; the initramfs that is built on the host has no crypttab.
DISCARD = "rd.luks.options=discard"
UNIT = """[Service]
Environment=RAMBOOT_STANDIN=/run/qubes.json
ExecStart=
ExecStart=/usr/libexec/ramboot-watch --trim-s 10
"""
# A desktop of the user 1000: who is told what.
NOTIFY = """#!/bin/sh
echo "$(id -u) $DBUS_SESSION_BUS_ADDRESS $*" >> /tmp/notified
"""
# Something else takes all RAM but this much above what the watch leaves to dom0.
TAKEN = """(
set -e
mount -t tmpfs -o size=100% taken /mnt
available=$(awk '/MemAvailable/ {print int($2 / 1024)}' /proc/meminfo)
fallocate -l $((available - 256 - 96))M /mnt/taken
)"""
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
    notify = directory / "notify-send"
    notify.write_text(NOTIFY, encoding="utf-8")
    notify.chmod(0o755)
    systemd = "usr/lib/systemd/system"
    target = directory / "payload.tar"
    with tarfile.open(target, "w") as tar:
        for source, place in (
            (FILES / "ramboot", "usr/bin/ramboot"),
            (FILES / "ramboot-watch", "usr/libexec/ramboot-watch"),
            (FILES / "ramboot-watch.service", f"{systemd}/ramboot-watch.service"),
            (FILES / "50-ramboot.conf", f"{systemd}/multi-user.target.d/50-ramboot.conf"),
            (override, "run/systemd/system/ramboot-watch.service.d/test.conf"),
            (notify, "usr/bin/notify-send"),
            (notify, "run/user/1000/bus"),
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


def test_what_fills_up_is_told_what_is_deleted_comes_back_and_the_disk_gets_nothing(
    machine: MachineMaker, tmp_path: Path
) -> None:
    dom0 = machine(build.base(), payload=payload(tmp_path))
    dom0.start_direct(
        f"ramboot=snapshot {DISCARD}",
        initrd=build.initramfs(),
        files={"etc/ramboot/ramboot.conf": config(snapshot_store_mib=256)},
    )
    dom0.unlock()
    dom0.shell()
    start_watch(dom0)

    # RAM ends before the store, of which that leaves more than half
    dom0.succeed(TAKEN)
    fill_to(dom0, 95, 8)
    # the one with the keyboard and the one that is halted are left alone
    dom0.succeed(wait("grep work /run/ramboot/filled.json"))
    found = filled(dom0)
    assert (found["what"], found["paused"]) == ("RAM", ["work"])
    assert " % of the RAM for this session is used" in said(dom0, "alert")
    assert "no longer paused" not in said(dom0, "notice")
    notified = dom0.succeed("cat /tmp/notified").splitlines()
    assert notified[0].startswith("1000 unix:path=/run/user/1000/bus --app-name=ramboot")
    assert " RAM session Backend snapshot: what dom0 and all qubes write is gone" in notified[0]
    assert "--urgency=critical RAM session ramboot: paused: work." in notified[-1]
    # it is the watch that gives back, not the file system
    assert "discard" not in dom0.succeed("findmnt -no OPTIONS /")
    deleted = int(dom0.succeed("stat -c %s /root/fill"))
    full = int(dom0.succeed(STORE))
    assert full > deleted >= 50 << 20
    dom0.succeed("rm /root/fill && sync")
    dom0.succeed(wait("grep '\"paused\": \\[\\]' /run/ramboot/filled.json"))
    assert "there is room again, no longer paused: work" in said(dom0, "notice")
    assert int(dom0.succeed(STORE)) < full - deleted * 0.9
    dom0.succeed("umount /mnt")
    # a chunk of the store stays taken, though its RAM came back
    dom0.succeed(wait("""grep '"percent": [1-5]\\?[0-9],' /run/ramboot/filled.json"""))

    # the store ends before RAM
    for percent, priority, step_mib in ((70, "warning", 16), (85, "crit", 8)):
        fill_to(dom0, percent, step_mib)
        assert " % of the store for this session is used" in said(dom0, priority)
        assert filled(dom0)["paused"] == []
    fill_to(dom0, 95, 4)
    dom0.succeed(wait("grep work /run/ramboot/filled.json"))
    assert filled(dom0)["paused"] == ["work"]
    assert "paused: work" in dom0.succeed("ramboot status")

    # dom0 writes on
    dom0.console.enter("cat /dev/urandom > /root/more")
    dom0.wait_for("the store of this session is full")
    assert dom0.written_bytes() == 0
    dom0.crash()
    assert dom0.disk_unchanged()
