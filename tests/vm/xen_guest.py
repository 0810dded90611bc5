# SPDX-License-Identifier: GPL-2.0-or-later
"""A Xen guest in the machine that writes to the disks it is given, and ends. The machine has to be
booted through Xen, with room beside dom0.
"""

from __future__ import annotations

import io
import lzma
import tarfile

from . import build, cpio
from .machine import Machine
from .toolbox import GUEST

MEMORY_MIB = 192
_FILES = "srv/guest"
_PATH = "PATH=$(echo /usr/lib/xen-[0-9]*/bin):$PATH"
# What the services of Debian and Qubes come to, without their waits.
_SERVICES = f"""(
set -eu
{_PATH}
modprobe -a xen-privcmd xen-evtchn xen-gntdev xen-gntalloc xen-blkback
mount -t xenfs xenfs /proc/xen
ldconfig
mkdir -p /run/xen /run/xenstored /var/lib/xen /var/lib/xenstored /var/log/xen
xenstored --pid-file /run/xenstored.pid
timeout 150 sh -c 'until xenstore-read -s / >/dev/null 2>&1; do sleep 1; done'
xen-init-dom0
xenconsoled --pid-file=/run/xenconsoled.pid --log=guest --log-dir=/run/xen
)"""
_GUEST = f"""(
set -eu
{_PATH}
cat > /run/xen/NAME.cfg <<CFG
name = "NAME"
type = "pv"
kernel = "/{_FILES}/vmlinuz"
ramdisk = "/{_FILES}/initramfs"
memory = {MEMORY_MIB}
vcpus = 1
extra = "console=hvc0 quiet disks=DISKS"
disk = [ SPECIFIED ]
on_poweroff = "destroy"
on_crash = "destroy"
CFG
timeout 290 xl create -F /run/xen/NAME.cfg
cat /run/xen/guest-NAME.log
)"""


def add_to(payload: tarfile.TarFile) -> None:
    """Put Xen's tools, and the guest's kernel and initramfs, into a machine's payload."""
    tools = build.xen_tools()
    for part in sorted(tools.iterdir()):
        payload.add(part, part.name)
    payload.add(build.kernel(), f"{_FILES}/vmlinuz")
    driver = next((build.tree() / "usr/lib/modules").rglob("xen-blkfront.ko.xz"))
    content = cpio.archive(
        {
            "init": GUEST / "xen-guest-init",
            "bin/busybox": tools / "usr/bin/busybox",
            "xen-blkfront.ko": lzma.decompress(driver.read_bytes()),
        }
    )
    info = tarfile.TarInfo(f"{_FILES}/initramfs")
    info.size = len(content)
    payload.addfile(info, io.BytesIO(content))


def services(dom0: Machine) -> None:
    """Start what guests need."""
    dom0.succeed(_SERVICES)


def write_all(dom0: Machine, name: str, *devices: str) -> None:
    """Start a guest that writes 100 MiB to each of these devices of dom0, and wait for its end."""
    disks = [f"xvd{letter}" for letter in "abcdefgh"[: len(devices)]]
    specified = (f'"phy:{device},{disk},w"' for device, disk in zip(devices, disks, strict=True))
    command = _GUEST.replace("SPECIFIED", ", ".join(specified)).replace("DISKS", ",".join(disks))
    told = dom0.succeed(command.replace("NAME", name), timeout_s=450)
    for disk in disks:
        assert f"wrote {disk}" in told, f"guest {name} did not write to {disk}:\n{told}"
