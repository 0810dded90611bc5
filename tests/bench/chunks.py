# SPDX-License-Identifier: GPL-2.0-or-later
"""What the chunk of the layer of `snapshot` costs: RAM and seconds of small scattered writes, and
what a discard gives back. `sudo python3 tests/bench/chunks.py`, in the test machine; what counts
are the ratios within one run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vm import build
from vm.machine import Machine

# 64: the smallest of a thin pool and what the layer has at least; LVM takes 512 for a pool of a TB
CHUNKS_KIB = (4, 64, 512)
# In the machine: a layer as ramboot-layer.sh makes it, over half a GiB of the root in RAM.
_MEASURE = """
import json, mmap, os, random, subprocess, sys, time
MIB = 1 << 20
SMALL, LARGE, SIZE = 2000, 100, 512 * MIB

def run(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()

def write(device, offsets, size):
    buffer = mmap.mmap(-1, size)
    begin = time.monotonic()
    for offset in offsets:
        buffer[:] = os.urandom(size)
        os.pwritev(device, [buffer], offset)
    os.fsync(device)
    return time.monotonic() - begin

run("modprobe", "-a", "zram", "dm_snapshot")
run("dd", "if=/dev/mapper/qubes_dom0-root", "of=/dev/shm/origin", "bs=1M", f"count={SIZE // MIB}")
origin = run("losetup", "--find", "--show", "/dev/shm/origin")
rows = []
for kib in map(int, sys.argv[1:]):
    number = open("/sys/class/zram-control/hot_add").read().strip()
    zram = f"/sys/block/zram{number}"
    open(f"{zram}/disksize", "w").write("2G")
    store = run("losetup", "--find", "--show", "--sector-size", "512", f"/dev/zram{number}")
    table = f"0 {SIZE // 512} snapshot {origin} {store} N {kib * 2} 1 discard_zeroes_cow"
    run("dmsetup", "create", "bench", "--table", table)
    used = lambda: int(open(f"{zram}/mm_stat").read().split()[2])
    device = os.open("/dev/mapper/bench", os.O_RDWR | os.O_DIRECT)
    # the same places each time, all in the second half
    places = random.Random(1).sample(range(SIZE // 8192, SIZE // 4096), SMALL)
    small_s = write(device, [place * 4096 for place in places], 4096)
    small = used()
    large_s = write(device, range(0, LARGE * MIB, MIB), MIB)
    large = used()
    run("blkdiscard", "--offset", "0", "--length", str(LARGE * MIB), "/dev/mapper/bench")
    rows.append([kib, small, small_s, large - small, large_s, large - used()])
    os.close(device)
    run("dmsetup", "remove", "--retry", "bench")
    run("losetup", "--detach", store)
    open(f"{zram}/reset", "w").write("1")
print(json.dumps(rows))
"""


def measure() -> list[list[float]]:
    """Rows of: chunk in KiB; bytes and seconds of the small writes, then of the large; bytes that
    the discard of the large gave back.
    """
    results = Path(tempfile.mkdtemp(prefix="ramboot-bench-"))
    with Machine(build.base(), "chunks", results, processors=2) as dom0:
        dom0.start_direct("ramboot=off", initrd=build.initramfs())
        dom0.unlock()
        dom0.shell()
        chunks = " ".join(map(str, CHUNKS_KIB))
        said = dom0.succeed(f"python3 - {chunks} <<'END'\n{_MEASURE}END", timeout_s=900)
        return json.loads(said.splitlines()[-1])


def table(rows: list[list[float]]) -> str:
    """Markdown."""
    lines = [
        "| chunk, KiB | RAM of 2,000 x 4 KiB | in | RAM of 100 MiB in a row | in | given back |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {kib} | {small / 2**20:.0f} MiB | {small_s:.1f} s | {large / 2**20:.0f} MiB |"
        f" {large_s:.1f} s | {back / 2**20:.0f} MiB |"
        for kib, small, small_s, large, large_s, back in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(measure()), end="")
