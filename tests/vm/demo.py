# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole story for a person to watch: apply, boot into RAM, come back, undo. See tests/demo."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vm import build, phases
from vm.machine import Machine


def say(text: str) -> None:
    """One step of the story."""
    print(f"\n== {text}", flush=True)


def show(dom0: Machine, command: str, timeout_s: float = 300) -> None:
    """Run a command in dom0 and show it as it would stand in a terminal."""
    print(f"[root@dom0 ~]# {command}", flush=True)
    print(dom0.succeed(command, timeout_s), flush=True)


def boot_into_ram(dom0: Machine) -> None:
    """Power-on, passphrase, question, yes, and what dom0 then looks like."""
    say("Power on. GRUB starts Xen, Xen starts dom0, dom0 asks for the passphrase of its disk.")
    dom0.start()
    dom0.unlock()
    say("The passphrase is typed; the disk is open, and before anything of it is mounted comes:")
    print("Boot to RAM?" + dom0.at_prompt())
    say("Answer: y")
    dom0.answer("y")
    dom0.shell()
    show(dom0, "findmnt /")
    show(dom0, "swapon --show")
    show(dom0, "ramboot status")
    dom0.succeed("echo gone with the power >/root/note")
    say("A note was written to /root/note. Power off.")
    dom0.poweroff()
    print(f"Bytes written to the disk since power-on: {dom0.written_bytes()}")
    print(f"The disk is the same from first to last byte: {dom0.disk_unchanged()}")


def come_back_and_undo(dom0: Machine) -> None:
    """A persistent boot, ramboot.absent, and a boot that asks nothing."""
    say("Power on again, without Xen, under which emulation is slow, and answer: n")
    dom0.start_direct()
    dom0.unlock()
    dom0.at_prompt()
    dom0.answer("n")
    dom0.shell()
    show(dom0, "findmnt /")
    show(dom0, "ls /root/note || echo 'the note is gone'")
    say("Undo everything: state.apply ramboot.absent")
    undo = "salt-call --local --retcode-passthrough --state-output=terse state.apply ramboot.absent"
    show(dom0, undo, timeout_s=1500)
    say("Power on through GRUB and Xen: nothing asks, dom0 runs from its disk as before.")
    dom0.poweroff()
    dom0.start()
    dom0.unlock()
    dom0.shell()
    show(dom0, "findmnt /")
    show(
        dom0,
        "journalctl -b --no-pager | grep 'Boot to RAM' || echo 'no question in the journal'",
    )
    dom0.poweroff()


def main() -> int:
    """Tell it."""
    results = Path(tempfile.mkdtemp(prefix="ramboot-demo-"))
    say(
        "A dom0-like machine: Debian with Xen, LUKS, LVM thin volumes, GRUB and dracut. Built once."
    )
    print(build.base().path)
    say("In it real Salt applies the formula of this checkout: state.apply ramboot. Done once.")
    disk = build.applied()
    print(disk.path)
    with Machine(disk, "demo", results, processors=2) as dom0:
        boot_into_ram(dom0)
        come_back_and_undo(dom0)
    say(f"Done. The whole consoles are in {results}.")
    print(phases.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
