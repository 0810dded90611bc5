# SPDX-License-Identifier: GPL-2.0-or-later
"""Boots one disk into RAM in our way and in the guide's, in turn. See tests/bench/run.

Every boot has the same disk, kernel and initramfs, without Xen. For the guide its script is laid
over the initramfs and ours is switched off (`ramboot=off`). The copy of `image` alone is measured
natively, see native.py: there reading and hashing weigh what they do on hardware. What is compared:

    boot      from "y" to a root shell, less the time from "n" to a root shell in a boot from disk
    copy      ours: the phases copy and prove of status.json. The guide's: from `modprobe zram` or
              `mount -t tmpfs` to the end of `cp -a`; nothing is proven there
    copy.ram  mm_stat's mem_used_total of the zram device that / is on, once the system has started
    ram       what is available (MemAvailable) less than in a boot from disk, once it has started
    written   to the disk from power-on to power-off, a session that does nothing
    work      as boot, of a backend that copies nothing, beside the guide's copy to zram
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import figures, growth, guide, native
from vm import build
from vm.disk import Disk
from vm.machine import Machine

# A disk of its own has the image: the guide would copy it with the rest.
WITH_IMAGE = "ramboot: {grub: {entries: [zram, image]}}\n"
QUESTION_S = 600
FROM_DISK_TIMES = 3
POWEROFF_S = 600  # the guide's way leaves the disk busy at shutdown
ROOT_FSTYPES = {
    ("ours", "zram"): "ext4",
    ("guide", "zram"): "ext2",
    ("ours", "tmpfs"): "tmpfs",
    ("guide", "tmpfs"): "tmpfs",
    ("ours", "image"): "overlay",
    ("ours", "overlay"): "overlay",
    ("ours", "snapshot"): "ext4",
}
# The rest of our ways, beside the guide's zram, whose place they take: backend, disk policy, and
# what is measured under which name.
BESIDE_ZRAM = (
    ("image", "attached", {"above_s": "boot.image.time", "taken_bytes": "ram.image"}),
    ("overlay", "attached", {"above_s": "boot.overlay.work"}),
    (
        "snapshot",
        "attached",
        {"above_s": "boot.snapshot.work", "written_bytes": "written.snapshot"},
    ),
    ("zram", "readonly", {"written_bytes": "written.readonly"}),
    ("zram", "detached", {"written_bytes": "written.detached"}),
)


@dataclass(frozen=True)
class Boot:
    """What one boot into RAM, and the session until power-off, took."""

    above_s: float  # to a shell, above a boot from disk
    copy_s: float | None
    ram_bytes: int | None
    taken_bytes: int
    written_bytes: int


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def shell_at(dom0: Machine) -> float:
    """The moment at which the root shell has run its first command."""
    dom0.shell()
    return time.monotonic()


def available_bytes(dom0: Machine) -> int:
    """MemAvailable, once nothing is starting any more and what was written is on its way."""
    dom0.succeed("timeout 60 systemctl is-system-running --wait; sync")
    return int(dom0.succeed("awk '/^MemAvailable/ {print $2}' /proc/meminfo")) * 1024


def from_disk(disk: Disk, results: Path) -> dict[str, float]:
    """Seconds to a shell in a boot from disk where both ways ask and get "n", and RAM available."""
    files = build.asking_for("zram") | guide.files("zram", "n")
    with Machine(disk, "disk", results, processors=2) as dom0:
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
        available = available_bytes(dom0)
        return {"ours": end - ours, "guide": end - guides, "available": available}


def into_ram(
    disk: Disk, results: Path, way: str, backend: str, policy: str, persistent: Mapping[str, float]
) -> Boot:
    """One boot into RAM and a session until power-off, above what a boot from disk took."""
    with Machine(disk, f"{way}-{backend}-{policy}", results, processors=2) as dom0:
        if way == "ours":
            dom0.start_direct(f"ramboot.disk={policy}", files=build.asking_for(backend))
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
        taken = round(persistent["available"]) - available_bytes(dom0)
        source = dom0.succeed("findmnt -no SOURCE /").strip()
        ram = None
        if source.startswith("/dev/zram"):
            stat = dom0.succeed(f"cat /sys/block/{source.removeprefix('/dev/')}/mm_stat")
            ram = int(stat.split()[2])
        dom0.poweroff(POWEROFF_S)
        return Boot(shell_s - persistent[way], copy_s, ram, taken, dom0.written_bytes())


def copy_seconds(dom0: Machine, way: str) -> float | None:
    """What the copy took, by the guest's clock; None where nothing is copied."""
    if way == "guide":
        return guide.copy_seconds(dom0.succeed(f"cat {guide.TRACE}"))
    told = json.loads(dom0.succeed("cat /run/ramboot/status.json"))
    if told["session"] != "ram":
        raise RuntimeError(f"no RAM session: {told['reason']}")
    seconds = told["seconds"]
    say(f"    phases: {seconds}")
    return seconds["copy"] + seconds["prove"] if "copy" in seconds else None


def measure(disk: Disk, with_image: Disk, results: Path) -> dict[str, tuple[float, float]]:
    """One round: name to what ours and the guide's took."""
    # all else is measured by it: one slow boot must not make the rest look quick
    boots = [from_disk(disk, results) for _ in range(FROM_DISK_TIMES)]
    persistent = {what: median(boot[what] for boot in boots) for what in boots[0]}
    say(f"  from disk: {boots}")

    def one(way: str, backend: str, policy: str = "attached") -> Boot:
        of = with_image if backend == "image" else disk
        took = into_ram(of, results, way, backend, policy, persistent)
        say(f"  {way}, {backend}, {policy}: {took}")
        return took

    ours = {backend: one("ours", backend) for backend in ("zram", "tmpfs")}
    guides = {backend: one("guide", backend) for backend in ("zram", "tmpfs")}
    found = {"copy.image.time": native_image()}
    for backend in ("zram", "tmpfs"):
        found[f"boot.{backend}.time"] = ours[backend].above_s, guides[backend].above_s
        found[f"copy.{backend}.time"] = _both(ours[backend], guides[backend], "copy_s")
    found["copy.zram.ram"] = _both(ours["zram"], guides["zram"], "ram_bytes")
    found["written.attached"] = _both(ours["zram"], guides["zram"], "written_bytes")
    for backend, policy, figures_of in BESIDE_ZRAM:
        took = one("ours", backend, policy)
        for part, name in figures_of.items():
            found[name] = _both(took, guides["zram"], part)
    return found


def native_image() -> tuple[float, float]:
    """Seconds, without a VM, of the same root: our image and the guide's copy to zram."""
    with tempfile.TemporaryDirectory(prefix="ramboot-bench-") as work:
        root = native.machine_root(Path(work) / "root.img")
        guides = native.typical(native.guides, root, "zram")
        native.add_image(root)
        ours = native.typical(native.ours, root, "image")
    say(f"  natively: ours, image: {ours}; guide, zram: {guides}")
    return ours.seconds, guides.seconds


def _both(ours: Boot, guides: Boot, part: str) -> tuple[float, float]:
    pair = getattr(ours, part), getattr(guides, part)
    if None in pair:
        raise RuntimeError(f"{part} was not measured in both ways: {pair}")
    return pair


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="tests/bench/run", description="Our way into RAM beside that of the forum's guide."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--rounds", type=int, default=1, help="averaged over so many (default: 1)")
    parser.add_argument(
        "--growth", action="store_true", help="instead: natively, how the copies grow with the root"
    )
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    native.require_host()
    if options.growth:
        rows = []
        for row in growth.measure():
            say(str(row))
            rows.append(row)
        print(growth.tables(rows), end="")
        return 0
    disk, with_image = build.applied(), build.applied(pillar=WITH_IMAGE)
    results = Path(tempfile.mkdtemp(prefix="ramboot-bench-"))
    say(f"The consoles are in {results}.")
    rounds = []
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        rounds.append(measure(disk, with_image, results))
    found = figures.averaged(rounds)
    print(figures.table(found), end="")
    if options.json:
        options.json.write_text(figures.to_json(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
