# SPDX-License-Identifier: GPL-2.0-or-later
"""Work on disks that needs device-mapper, done in a VM, because the host may have none."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import cpio
from .console import LINES_SHOWN, plain

GUEST = Path(__file__).parent / "guest"
# Xen crashes its dom0 under emulation when the processor has the first four. With erms and fsrm the
# guest copies and clears byte after byte, which the emulator does one by one: a boot takes a sixth
# more. For svm the guest loads KVM.
CPU = "max,-smap,-smep,-pku,-la57,-erms,-fsrm,-svm"
# KVM is left out on purpose: where it is offered inside another virtual machine, the guest may hang
# in its boot.
ACCELERATOR = "tcg,thread=multi"


class ToolboxError(Exception):
    """A job failed; the message has the end of its console."""


@dataclass(frozen=True)
class Root:
    """The built root file system with the kernel and initramfs that start it."""

    image: Path
    kernel: Path
    initrd: Path
    switch_root: Path  # the command; an initramfs with systemd has none


def drive(path: Path, image_format: str, *, snapshot: bool = False) -> list[str]:
    """QEMU's arguments for a disk whose host cache nobody needs to survive."""
    options = f"file={path},if=virtio,format={image_format},cache=unsafe,discard=unmap"
    return ["-drive", options + (",snapshot=on" if snapshot else "")]


def run(
    root: Root,
    job: str,
    settings: Mapping[str, str],
    drives: Sequence[str],
    log: Path,
    timeout_s: float,
) -> str:
    """Run guest/`job` with `settings` as shell variables; `drives` become /dev/vdb and on.
    Returns the console's text.
    """
    files: dict[str, bytes | str | Path] = {
        "toolbox-init": GUEST / "toolbox-init",
        "toolbox/switch_root": root.switch_root,
        "toolbox/main": GUEST / "toolbox-main",
        "toolbox/lib": GUEST / "lib",
        "toolbox/job": GUEST / job,
        "toolbox/settings": "".join(
            f"{key}={shlex.quote(value)}\n" for key, value in settings.items()
        ),
    }
    with tempfile.TemporaryDirectory(prefix="ramboot-vm-") as tmp:
        initrd = Path(tmp) / "initrd"
        initrd.write_bytes(cpio.laid_over(root.initrd.read_bytes(), files))
        command = [
            # one processor: see EmulatorError for what two can do
            *("qemu-system-x86_64", "-accel", ACCELERATOR, "-cpu", CPU, "-m", "2048", "-smp", "1"),
            *(
                "-display",
                "none",
                "-no-reboot",
                "-serial",
                "stdio",
                "-kernel",
                str(root.kernel),
                "-initrd",
                str(initrd),
            ),
            *("-append", "rdinit=/toolbox-init console=ttyS0 quiet panic=-1"),
            *drive(root.image, "raw", snapshot=True),
            *drives,
        ]
        with log.open("w", encoding="utf-8") as console:
            try:
                subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    timeout=timeout_s,
                    check=False,
                )
                ending = "ended without a result"
            except subprocess.TimeoutExpired:
                ending = f"did not end within {timeout_s:.0f} s"
    text = plain(log.read_text(encoding="utf-8", errors="replace"))
    if "TOOLBOX DONE" not in text:
        last = "\n".join("    | " + line for line in text.splitlines()[-LINES_SHOWN:])
        failed = "failed" if "TOOLBOX FAILED" in text else ending
        raise ToolboxError(f"the toolbox job {job!r} {failed}; its console's last lines:\n{last}")
    return text
