# SPDX-License-Identifier: GPL-2.0-or-later
"""Boots one disk into RAM in our way and in the guide's, in turn. See tests/bench/run.

Every boot has the same disk, kernel and initramfs, without Xen. For the guide its script is laid
over the initramfs and ours is switched off (`ramboot=off`). What is compared:

    boot      from "y" to a root shell, less the time from "n" to a root shell in a boot from disk
    copy      ours: the phases copy and prove of status.json. The guide's: from `modprobe zram` or
              `mount -t tmpfs` to the end of `cp -a`; nothing is proven there
    ram       mm_stat's mem_used_total of the zram device that / is on, once the system has started
    written   to the disk from power-on to power-off, a session with zram that does nothing
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import figures, guide
from vm import build
from vm.disk import Disk
from vm.machine import Machine

BACKENDS = ("zram", "tmpfs")
QUESTION_S = 600
POWEROFF_S = 600  # the guide's way leaves the disk busy at shutdown
FILES = build.REPOSITORY / "ramboot"
ROOT_FSTYPES = {
    ("ours", "zram"): "ext4",
    ("guide", "zram"): "ext2",
    ("ours", "tmpfs"): "tmpfs",
    ("guide", "tmpfs"): "tmpfs",
}


@dataclass(frozen=True)
class Boot:
    """What one boot into RAM took."""

    shell_s: float
    copy_s: float
    ram_bytes: int | None = None
    written_bytes: int | None = None


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def our_configuration(backend: str) -> dict[str, str]:
    """What the formula writes for a pillar with that backend and no time limit."""
    settings = yaml.safe_load((FILES / "defaults.yaml").read_text(encoding="utf-8"))["ramboot"]
    settings["boot"] |= {"backend": backend, "timeout_s": 0}
    source = (FILES / "initramfs/files/ramboot.conf.j2").read_text(encoding="utf-8")
    return {"etc/ramboot/ramboot.conf": jinja2.Template(source).render(settings=settings) + "\n"}


def shell_at(dom0: Machine) -> float:
    """The moment at which the root shell has run its first command."""
    dom0.shell()
    return time.monotonic()


def from_disk(disk: Disk, results: Path) -> dict[str, float]:
    """Seconds to a shell in a boot from disk where both ways ask and get "n"."""
    files = our_configuration("zram") | guide.files("zram", "n")
    with Machine(disk, "disk", results) as dom0:
        dom0.start_direct(files=files)
        dom0.unlock()
        dom0.at_prompt()
        ours = time.monotonic()
        dom0.answer("n")
        dom0.wait_for(guide.MARK, QUESTION_S)
        guides = time.monotonic()
        end = shell_at(dom0)
        if "qubes_dom0-root" not in dom0.succeed("findmnt -no SOURCE /"):
            raise RuntimeError("the boot from disk was none")
        return {"ours": end - ours, "guide": end - guides}


def into_ram(disk: Disk, results: Path, way: str, backend: str) -> Boot:
    """One boot into RAM and, with zram, a session until power-off."""
    with Machine(disk, f"{way}-{backend}", results) as dom0:
        if way == "ours":
            dom0.start_direct(files=our_configuration(backend))
            dom0.unlock()
            dom0.at_prompt()
            begin = time.monotonic()
            dom0.answer("y")
        else:
            dom0.start_direct("ramboot=off", files=guide.files(backend, "y"))
            dom0.unlock()
            dom0.wait_for(guide.MARK, QUESTION_S)
            begin = time.monotonic()
        shell_s = shell_at(dom0) - begin
        copy_s = copy_seconds(dom0, way)
        fstype = dom0.succeed("findmnt -no FSTYPE /").strip()
        if fstype != ROOT_FSTYPES[way, backend]:
            raise RuntimeError(f"{way}, {backend}: the root is {fstype}")
        if backend != "zram":
            return Boot(shell_s, copy_s)
        # both have written what they copied before RAM is read
        dom0.succeed("timeout 60 systemctl is-system-running --wait; sync")
        stat = dom0.succeed('cat "/sys/block/$(findmnt -no SOURCE / | cut -d / -f 3)/mm_stat"')
        dom0.poweroff(POWEROFF_S)
        return Boot(shell_s, copy_s, int(stat.split()[2]), dom0.written_bytes())


def copy_seconds(dom0: Machine, way: str) -> float:
    """What the copy took, by the guest's clock."""
    if way == "guide":
        return guide.copy_seconds(dom0.succeed(f"cat {guide.TRACE}"))
    told = json.loads(dom0.succeed("cat /run/ramboot/status.json"))
    if told["session"] != "ram":
        raise RuntimeError(f"no RAM session: {told['reason']}")
    say(f"    phases: {told['seconds']}")
    return told["seconds"]["copy"] + told["seconds"]["prove"]


def measure(disk: Disk, results: Path) -> dict[str, tuple[float, float]]:
    """One round: name to what ours and the guide's took."""
    persistent = from_disk(disk, results)
    say(f"  from disk: {persistent}")
    found: dict[str, tuple[float, float]] = {}
    for backend in BACKENDS:
        boots = {}
        for way in ("ours", "guide"):
            boots[way] = into_ram(disk, results, way, backend)
            say(f"  {way}, {backend}: {boots[way]}")
        ours, guides = boots["ours"], boots["guide"]
        found[f"boot.{backend}.time"] = (
            ours.shell_s - persistent["ours"],
            guides.shell_s - persistent["guide"],
        )
        found[f"copy.{backend}.time"] = (ours.copy_s, guides.copy_s)
        if ours.ram_bytes is not None and guides.ram_bytes is not None:
            found["copy.zram.ram"] = (ours.ram_bytes, guides.ram_bytes)
        if ours.written_bytes is not None and guides.written_bytes is not None:
            found["written.attached"] = (ours.written_bytes, guides.written_bytes)
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="tests/bench/run", description="Our way into RAM beside that of the forum's guide."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--rounds", type=int, default=1, help="averaged over so many (default: 1)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    disk = build.applied()
    results = Path(tempfile.mkdtemp(prefix="ramboot-bench-"))
    say(f"The consoles are in {results}.")
    rounds = []
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        rounds.append(measure(disk, results))
    found = figures.averaged(rounds)
    print(figures.table(found), end="")
    if options.json:
        options.json.write_text(figures.to_json(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
