# SPDX-License-Identifier: GPL-2.0-or-later
"""The command `ramboot` as a program, with its own /proc, /sys, /run, and a stand-in for Salt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).resolve().parents[2] / "ramboot" / "session" / "files" / "ramboot"
MIB = 1 << 20
FILLED = {
    "schema": 1,
    "percent": 72,
    "what": "store",
    "left_bytes": 300 * MIB,
    "warn_percent": [70, 85],
    "pause_percent": 95,
    "paused": [],
    "start_bytes": {},
    "lost": False,
}
NOTED = {
    "schema": 1,
    "session": "ram",
    "requested": "zram",
    "backend": "zram",
    "disk": "attached",
    "reason": None,
    "source": {"device": "/dev/mapper/root", "fstype": "ext4", "bytes": 5 << 30},
    "ram": {"needed_bytes": 4 << 30, "available_bytes": 9 << 30, "limit_bytes": 10 << 30},
    "seconds": {"copy": 41.25, "prove": 3.0},
}
MOUNTINFO = (
    "1 0 0:2 / / rw - rootfs rootfs rw\n"
    "25 1 252:1 / / rw,relatime shared:1 - ext4 /dev/zram1 rw\n"
    "26 25 0:5 / /dev rw - devtmpfs dev rw\n"
)
SALT = """#!/bin/sh
printf '%s\\n' "$@" >"$RAMBOOT_TEST/arguments"
[ -z "$SAYS" ] || printf '%s\\n' "$SAYS"
[ -z "$COMPLAINS" ] || printf '%s\\n' "$COMPLAINS" >&2
exit "${EXITS:-0}"
"""
ENTRY = '{"local": {"id": "i", "title": "Qubes, in RAM (zram)", "kernel": "6.12.1"}}'


class Dom0:
    def __init__(self, root: Path):
        self.root = root
        self.environment = {"RAMBOOT_PREFIX": str(root), "RAMBOOT_TEST": str(root), "PATH": ""}
        self.write("/proc/meminfo", "MemTotal: 10240000 kB\nMemAvailable: 3072000 kB\nHuge: 0\n")
        self.write("/proc/self/mountinfo", MOUNTINFO)
        self.write("/proc/swaps", "Filename Type Size Used Priority\n")
        self.write("/sys/block/zram1/mm_stat", f"{4096 * MIB} {1500 * MIB} {1600 * MIB} 0 0 0 0\n")
        self.write("/sys/block/zram1/comp_algorithm", "lzo-rle lzo [lz4] zstd\n")
        image = self.write(f"/boot/initramfs-{os.uname().release}.img", "")
        old = image.stat().st_mtime - 3 * 86400 - 60
        os.utime(image, (old, old))

    def write(self, path: str, text: str) -> Path:
        target = Path(f"{self.root}{path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target

    def note(self, **changes) -> None:
        self.write("/run/ramboot/status.json", json.dumps({**NOTED, **changes}))

    def salt(self, name="salt-call", **environment) -> None:
        self.write(f"/bin/{name}", SALT).chmod(0o755)
        self.environment.update(environment, PATH=f"{self.root}/bin:/usr/bin:/bin")

    @property
    def arguments(self) -> list[str]:
        return (self.root / "arguments").read_text().splitlines()

    def run(self, *arguments: str, user: int | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-I", str(COMMAND), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            user=user,
        )


@pytest.fixture
def dom0(tmp_path):
    return Dom0(tmp_path)


def shown(done) -> dict[str, str]:
    return dict(line.split(":", 1) for line in done.stdout.splitlines())


def test_status_of_a_ram_session(dom0):
    dom0.note()
    done = dom0.run("status")
    assert (done.returncode, done.stderr) == (0, "")
    lines = {label: text.strip() for label, text in shown(done).items()}
    assert lines.pop("Root").startswith("/dev/zram1, ext4, ")
    assert lines == {
        "Session": "in RAM (zram), disk attached",
        "Requested": "zram",
        "zram": "1.6 GiB of RAM for 4.0 GiB, lz4",
        "Filled": "unknown: nobody watches (systemctl status ramboot-watch)",
        "RAM": "2.9 GiB of 9.8 GiB available",
        "Swap": "none",
        "Took": "copy 41.2 s, prove 3.0 s",
        "Initramfs": f"/boot/initramfs-{os.uname().release}.img, 3 days old",
    }


def test_status_of_a_snapshot_shows_how_full_its_store_is(dom0):
    dom0.note(backend="snapshot", requested="snapshot")
    dom0.write("/proc/self/mountinfo", "25 1 253:5 / / rw - ext4 /dev/mapper/root rw\n")
    dom0.write("/run/ramboot/layer-zram", "1")
    lines = shown(dom0.run("status"))
    assert lines["Session"].strip() == "in RAM (snapshot), disk attached"
    assert lines["zram"].strip() == "1.6 GiB of RAM for 4.0 GiB, lz4"


def test_status_of_a_sealed_disk_says_what_does_not_work(dom0):
    dom0.note(disk="readonly")
    lines = shown(dom0.run("status"))
    assert lines["Session"].strip() == "in RAM (zram), disk readonly"
    assert lines["Disk"].strip() == "sealed: qubes on it can be read, not started"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {},
            "72 % of the store for this session, 300 MiB left; warns at 70 and 85 %, "
            "pauses qubes at 95 %",
        ),
        (
            {"what": "RAM", "percent": 96, "left_bytes": 3 << 30, "paused": ["work", "vault"]},
            "96 % of the RAM for this session, 3.0 GiB left; warns at 70 and 85 %, "
            "pauses qubes at 95 %; paused: work, vault",
        ),
        (
            {"lost": True, "percent": 100},
            "100 %: this session is lost; switch off with the power button",
        ),
    ],
)
def test_status_shows_what_the_watch_found(dom0, changes, told):
    dom0.note(backend="snapshot")
    dom0.write("/run/ramboot/filled.json", json.dumps({**FILLED, **changes}))
    assert shown(dom0.run("status"))["Filled"].strip() == told


def test_status_says_so_when_nobody_watches_any_more(dom0):
    dom0.note(backend="snapshot")
    noted = dom0.write("/run/ramboot/filled.json", json.dumps(FILLED))
    os.utime(noted, (1, 1))
    assert "nobody watches" in shown(dom0.run("status"))["Filled"]


def test_status_of_a_session_that_fell_back_says_why(dom0):
    dom0.note(session="persistent", backend=None, disk=None, reason="not enough RAM")
    lines = dom0.run("status").stdout.splitlines()
    assert lines[:3] == [
        "Session:   persistent, on the disk",
        "Requested: zram",
        "Reason:    not enough RAM",
    ]


def test_status_names_active_swap(dom0):
    dom0.note()
    dom0.write(
        "/proc/swaps", "Filename Type Size Used Priority\n/dev/dm-1 partition 8192 1024 -2\n"
    )
    assert "Swap:      /dev/dm-1 (1 MiB used)" in dom0.run("status").stdout


def test_status_for_programs_has_what_was_noted_and_live_figures(dom0):
    dom0.note()
    found = json.loads(dom0.run("status", "--json").stdout)
    live = found.pop("live")
    assert found == NOTED
    assert live["root"].pop("size_bytes") >= live["root"].pop("used_bytes") >= 0
    assert live.pop("initramfs")["age_s"] >= 3 * 86400
    assert live == {
        "ram": {"total_bytes": 10240000 * 1024, "available_bytes": 3072000 * 1024},
        "root": {"device": "/dev/zram1", "fstype": "ext4"},
        "zram": {
            "device": "/dev/zram1",
            "algorithm": "lz4",
            "data_bytes": 4096 * MIB,
            "compressed_bytes": 1500 * MIB,
            "memory_bytes": 1600 * MIB,
        },
        "filled": None,
        "swap": [],
        "image": None,
    }


def test_status_tells_the_age_of_the_image_that_the_root_is_made_of(dom0):
    dom0.note(backend="image", reason="the image of 2001-02-03T04:05:06Z is stale")
    dom0.write("/run/ramboot/image", f"version=1\nmade=2001-02-03T04:05:06Z\nbytes={700 * MIB}\n")
    lines = dom0.run("status").stdout.splitlines()
    assert "Session:   in RAM (image), disk attached" in lines
    assert "Reason:    the image of 2001-02-03T04:05:06Z is stale" in lines
    (told,) = (line for line in lines if line.startswith("Image:"))
    assert told.startswith("Image:     2001-02-03T04:05:06Z, ")
    assert told.endswith(" days old, 700 MiB")


@pytest.mark.parametrize("text", ["", "made=\n", "made=now\nbytes=1\n", "nonsense\n"])
def test_a_note_of_an_image_that_is_not_understood_is_none(dom0, text):
    dom0.note()
    dom0.write("/run/ramboot/image", text)
    assert json.loads(dom0.run("status", "--json").stdout)["live"]["image"] is None


def test_status_where_nothing_was_recorded_is_code_3(dom0):
    done = dom0.run("status")
    assert done.returncode == 3
    assert done.stdout.splitlines()[:2] == [
        "Session:   unknown",
        "Reason:    the ramboot module did not run at this boot: "
        "there is no /run/ramboot/status.json",
    ]


def test_status_where_nothing_was_recorded_on_a_disk_is_persistent_and_code_3(dom0):
    dom0.write("/proc/self/mountinfo", "25 1 8:2 / / rw - ext4 /dev/sda2 rw\n")
    dom0.write("/sys/class/block/sda2/dev", "8:2\n")
    done = dom0.run("status")
    assert done.returncode == 3
    assert done.stdout.splitlines()[0] == "Session:   persistent, on the disk"


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2}', ""])
def test_status_that_is_not_understood_is_an_error(dom0, text):
    dom0.write("/run/ramboot/status.json", text)
    done = dom0.run("status")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ramboot: /run/ramboot/status.json ")


def test_once_asks_salts_module(dom0):
    dom0.salt(SAYS=ENTRY)
    done = dom0.run("once", "zram")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "The next boot, and only that one: Qubes, in RAM (zram) (Linux 6.12.1)\n"
    )
    assert dom0.arguments == [
        "--local",
        "--log-level=quiet",
        "--out=json",
        "ramboot_grub.once",
        "zram",
    ]


@pytest.mark.parametrize(
    ("says", "complains", "exits", "told"),
    [
        (
            "",
            "Error running 'ramboot_grub.once': no entry",
            1,
            "the next boot stays as it was: no entry",
        ),
        (
            "",
            "'ramboot_grub.once' is not available.",
            1,
            "the next boot stays as it was: 'ramboot_grub",
        ),
        ('{"local": "an error as text"}', "", 0, 'the next boot stays as it was: {"local": "an'),
        ("", "", 0, "said nothing"),
        (ENTRY, "crashed", 4, "ended with 4: crashed"),
    ],
)
def test_once_tells_what_salt_says(dom0, says, complains, exits, told):
    dom0.salt(SAYS=says, COMPLAINS=complains, EXITS=str(exits))
    done = dom0.run("once", "zram")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ramboot: ")
    assert told in done.stderr


def test_once_without_salt(dom0):
    dom0.environment["PATH"] = str(dom0.root / "nothing")
    done = dom0.run("once", "zram")
    assert (done.returncode, done.stderr) == (
        1,
        "ramboot: neither salt-call nor qubesctl is installed\n",
    )


def test_once_needs_root_and_status_does_not(dom0):
    script = COMMAND.read_text().replace("os.geteuid()", "1000")
    assert script != COMMAND.read_text()
    code = f"import sys; sys.argv = ['ramboot', 'once', 'zram']\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", code.replace("from __future__ import annotations\n", "")],
        env=dom0.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (
        1,
        "ramboot: once needs root: sudo ramboot once zram\n",
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["once"],
        ["once", "a=b"],
        ["once", "--help=x"],
        ["once", "ZRAM"],
        ["status", "x"],
    ],
)
def test_wrong_usage_is_code_2(dom0, arguments):
    dom0.salt(SAYS=ENTRY)
    done = dom0.run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert not (dom0.root / "arguments").exists()


def test_help_documents_the_exit_codes(dom0):
    done = dom0.run("--help")
    assert done.returncode == 0
    for line in ("0  done", "1  refused or failed", "2  wrong usage", "3  status: nothing"):
        assert line in done.stdout


def test_it_is_a_program_for_dom0s_own_python():
    assert COMMAND.read_text().startswith("#!/usr/bin/python3 -I\n")
    assert os.access(COMMAND, os.X_OK)
