# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks of the test machine as the host can see them: overlays, comparison, what lies in /boot."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

PASSPHRASE = "labpass"
# What guest/lib calls the opened disk.
LUKS = "/dev/mapper/luks-11111111-2222-4333-8444-555555555555"
LAYOUTS = ("luks-thin", "thin", "lvm-xfs", "luks-btrfs", "ext4")
_BOOT_OFFSET_MIB, _BOOT_SIZE_MIB = 1, 512  # as guest/install partitions
ROOT_OFFSET_MIB = _BOOT_OFFSET_MIB + _BOOT_SIZE_MIB


class DiskError(Exception):
    """A tool of the host refused; the message has its words."""


def run(*command: str | Path, accept: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run a host command, or raise with what it said."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode not in accept:
        raise DiskError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done


@dataclass(frozen=True)
class BootFiles:
    """What GRUB would load, copied out to the host."""

    kernel: Path
    initrd: Path
    xen: Path
    grub_cfg: str


@dataclass(frozen=True)
class Disk:
    """A qcow2 disk image and how its root is laid out."""

    path: Path
    layout: str

    @property
    def encrypted(self) -> bool:
        """Whether it asks for a passphrase."""
        return self.layout.startswith("luks-")

    def overlay(self, path: Path) -> Disk:
        """A throw-away copy: reads from this one, keeps its writes in `path`."""
        run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            self.path.resolve(),
            "-F",
            "qcow2",
            path,
        )
        return Disk(path, self.layout)

    def same_as(self, other: Disk) -> bool:
        """Whether the two disks hold the same bytes from first to last."""
        done = run(
            "qemu-img",
            "compare",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            self.path,
            other.path,
            accept=(0, 1),
        )
        return done.returncode == 0

    def _boot_partition(self, directory: Path) -> Path:
        part = directory / "boot.img"
        run(
            *("qemu-img", "dd", "-f", "qcow2", "-O", "raw", "bs=1M", f"skip={_BOOT_OFFSET_MIB}"),
            *(f"count={_BOOT_OFFSET_MIB + _BOOT_SIZE_MIB}", f"if={self.path}", f"of={part}"),
        )
        return part

    def grub_cfg(self) -> str:
        """The text of /boot/grub2/grub.cfg."""
        with tempfile.TemporaryDirectory(prefix="ramboot-vm-") as tmp:
            return run(
                "debugfs", "-R", "cat /grub/grub.cfg", self._boot_partition(Path(tmp))
            ).stdout

    def boot_files(self, directory: Path) -> BootFiles:
        """Copy kernel, initramfs and Xen out of /boot into `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        part = self._boot_partition(directory)
        listing = run("debugfs", "-R", "ls -p /", part).stdout
        names = [line.split("/")[5] for line in listing.splitlines() if line.count("/") > 5]
        found: dict[str, Path] = {}
        for key, prefix in (("kernel", "vmlinuz-"), ("initrd", "initrd.img-"), ("xen", "xen-")):
            name = next(
                n
                for n in sorted(names)
                if n.startswith(prefix) and not n.endswith((".config", ".efi", ".old"))
            )
            found[key] = directory / key
            run("debugfs", "-R", f"dump /{name} {found[key]}", part)
        config = run("debugfs", "-R", "cat /grub/grub.cfg", part).stdout
        part.unlink()
        return BootFiles(found["kernel"], found["initrd"], found["xen"], config)
