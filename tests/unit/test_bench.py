# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmark, as far as it needs no VM."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import bench, figures, growth, guide, native

REPO = Path(__file__).resolve().parents[2]

ROUND = {
    "boot.zram.time": (10.0, 40.0),
    "boot.tmpfs.time": (12.0, 24.0),
    "boot.image.time": (5.0, 40.0),
    "boot.overlay.work": (0.5, 40.0),
    "boot.snapshot.work": (1.0, 40.0),
    "copy.zram.time": (5.0, 10.0),
    "copy.tmpfs.time": (6.0, 8.0),
    "copy.image.time": (1.0, 10.0),
    "ram.image": (200_000_000, 340_000_000),
    "copy.zram.ram": (300_000_000, 330_000_000),
    "written.attached": (0, 9_600_000),
    "written.readonly": (0, 9_600_000),
    "written.detached": (0, 9_600_000),
    "written.snapshot": (0, 9_600_000),
}


def test_json_has_ours_guide_ratio_and_unit_of_every_name():
    told = json.loads(figures.to_json(figures.averaged([ROUND])))
    assert set(told) == set(ROUND)
    assert told["copy.zram.time"] == {"ours": 5.0, "guide": 10.0, "ratio": 0.5, "unit": "s"}
    assert told["written.attached"] == {
        "ours": 0,
        "guide": 9_600_000,
        "ratio": 0.0,
        "unit": "bytes",
    }


def test_rounds_are_averaged_before_the_ratio():
    second = ROUND | {"copy.zram.time": (7.0, 14.0), "copy.zram.ram": (300_000_001, 330_000_000)}
    found = figures.averaged([ROUND, second])
    assert found["copy.zram.time"] == figures.Figure(6.0, 12.0, "s")
    assert isinstance(found["copy.zram.ram"].ours, int)


def test_a_round_that_lacks_a_figure_is_refused():
    with pytest.raises(KeyError, match=r"copy\.tmpfs\.time"):
        figures.averaged([{k: v for k, v in ROUND.items() if k != "copy.tmpfs.time"}])


def test_nothing_is_divided_by_zero():
    found = {"written.attached": figures.Figure(4096, 0, "bytes")}
    assert json.loads(figures.to_json(found))["written.attached"]["ratio"] is None
    assert figures.table(found).splitlines()[2].split("|")[4].strip() == "-"


def test_the_table_lines_up_and_is_markdown():
    lines = figures.table(figures.averaged([ROUND])).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == set("|-: ")
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert cells == ["", "`boot.zram.time`", "10.0", "40.0", "0.25", "s", ""]
    assert "330,000,000" in next(line for line in lines if "`copy.zram.ram`" in line)


def test_the_published_table_is_that_of_the_published_figures():
    published = figures.from_json((REPO / "docs/figures.json").read_text(encoding="utf-8"))
    assert set(published) == set(figures.UNITS)
    assert figures.table(published) in (REPO / "docs/figures.md").read_text(encoding="utf-8")


def test_the_guides_script_is_the_one_whose_checksum_the_thread_publishes():
    assert hashlib.sha256(guide.SCRIPTS["zram"].encode()).hexdigest() == guide.PUBLISHED_SHA256
    assert "zram" not in guide.SCRIPTS["tmpfs"]


@pytest.mark.parametrize("backend", ["zram", "tmpfs"])
def test_the_guides_copy_is_timed_from_its_file_system_to_the_end_of_cp(backend, tmp_path):
    # the guide's script in the hook's own bash, with nothing that it does
    # but that each step takes a second by a clock of its own
    clock = tmp_path / "uptime"
    harmless = (
        f"at=1; echo 1.00 1.00 > {clock}\n"
        "for c in mkdir umount mount modprobe cp; do\n"
        f'    eval "$c() {{ at=\\$((at + 1)); echo \\$at.00 1.00 > {clock}; }}"\n'
        "done\n"
    )
    script = tmp_path / "tmpfs"
    script.write_text(
        guide.SCRIPTS[backend]
        .replace("/sys/block/zram0/disksize", "/dev/null")
        .replace("/mnt/usr/sbin/mkfs.ext2", "true")
    )
    traced = guide.files(backend, "y")["usr/bin/bench-traced"]
    traced = traced.replace("/proc/uptime", str(clock))
    (tmp_path / "traced").write_text(harmless + traced.replace("/usr/bin/tmpfs", str(script)))
    done = subprocess.run(
        ["bash", str(tmp_path / "traced")], input="y\n", capture_output=True, text=True, check=True
    )
    # modprobe, mount and cp; mount and cp
    assert guide.copy_seconds(done.stderr) == (3 if backend == "zram" else 2)


def test_a_guide_that_did_not_end_has_no_time():
    trace = "+ 30.10 50.00 modprobe zram\ncp: error\n+ 31.20 51.00 cp -a /mnt/bin /sysroot\n"
    with pytest.raises(ValueError, match="did not come to its end"):
        guide.copy_seconds(trace)
    with pytest.raises(ValueError, match="did not come to its end"):
        guide.copy_seconds("+ 30.10 50.00 read line\n+ 30.20 50.10 exit 0\n")


def test_our_side_is_the_formulas_configuration_with_the_backend():
    text = bench.build.asking_for("tmpfs")["etc/ramboot/ramboot.conf"].splitlines()
    assert {"mode=ask", "backend=tmpfs", "timeout_s=0", "zram_algorithm=auto"} <= set(text)


# --- natively ---------------------------------------------------------------------------------


def test_a_native_copy_is_timed_as_one_in_the_vm():
    assert native.copy_seconds("layer 1\nmeasure 2\nfresh 200\ncopy 42\nprove 8\n") == 0.5
    assert native.copy_seconds("overlay 7\ndrop 1\n") == 0.07
    with pytest.raises(KeyError, match="copy"):
        native.copy_seconds("layer 1\nmeasure 2\n")


@pytest.mark.parametrize("size", [1, 2 << 20, (2 << 20) + 1])
def test_the_boot_understands_a_native_images_manifest(size, tmp_path):
    directory = tmp_path / "run/ramboot/source/var/lib/ramboot/image"
    directory.mkdir(parents=True)
    (tmp_path / "run/ramboot/work").mkdir()
    image = directory / "root-native.squashfs"
    image.write_bytes(os.urandom(size))
    text = native.manifest(image, 1, "6.12.0-1.qubes.x86_64")
    (directory / "manifest").write_text(text)
    module = REPO / "ramboot/initramfs/files/50ramboot"
    done = subprocess.run(
        ["sh", "-c", f". {module}/ramboot-lib.sh; . {module}/ramboot-image.sh; {MANIFEST}"],
        env={**os.environ, "RAMBOOT_PREFIX": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    chunks = [image.read_bytes()[at : at + (1 << 20)] for at in range(0, size, 1 << 20)]
    hashes = "".join(f"{hashlib.sha256(chunk).hexdigest()}\n" for chunk in chunks)
    assert (done.stdout, done.stderr) == (hashes, "")


MANIFEST = 'image_manifest && cat "$RUN/work/chunks" || printf "%s" "$reason"'


def test_a_host_without_zram_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "HOT_ADD", tmp_path / "hot_add")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="needs zram, which this kernel lacks"):
        native.require_host()


@pytest.mark.parametrize(("count", "total"), [(1000, 1 << 20), (50_000, 8 << 30)])
def test_a_grown_root_has_its_bytes_most_of_them_in_few_files(count, total):
    sizes = growth.sizes(count, total)
    assert sizes == growth.sizes(count, total)
    assert len(sizes) == count
    assert sum(sizes) == pytest.approx(total, rel=0.01)
    assert sum(sorted(sizes)[-count // 10 :]) > total / 2


def test_no_two_files_of_a_grown_root_are_alike(tmp_path):
    sizes = [0, 1, *[7000] * 120]
    growth.fill(tmp_path / "srv", sizes, bytes(range(250)) * 4)
    files = sorted(p for p in (tmp_path / "srv").rglob("*") if p.is_file())
    assert sorted(p.stat().st_size for p in files) == sizes
    assert len({p.read_bytes() for p in files}) == len(files)


def test_growth_is_told_in_seconds_and_ram():
    took = {name: native.Took(1.25, 3 << 29) for name in growth.COLUMNS}
    rows = [growth.Row(2, 10_000, took), growth.Row(8, 50_000, took)]
    seconds, held = growth.tables(rows).split("\n\n")
    assert [cell.strip() for cell in seconds.splitlines()[3].split("|")][1:4] == [
        "8 GiB",
        "50,000",
        "1.2",
    ]
    assert held.splitlines()[2].split("|")[3].strip() == "1.50"


def test_the_published_growth_is_of_all_roots_and_ways():
    text = (REPO / "docs/figures.md").read_text(encoding="utf-8")
    for head in ("seconds for a root of", "GiB of RAM for a root of"):
        table = text[text.index(f"| {head}") :].split("\n\n")[0].splitlines()
        cells = [[cell.strip() for cell in line.split("|")][1:-1] for line in table]
        assert cells[0] == [head, "files", *growth.COLUMNS]
        assert [row[:2] for row in cells[2:]] == [[f"{g} GiB", f"{n:,}"] for g, n in growth.ROOTS]
