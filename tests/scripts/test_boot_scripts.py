# SPDX-License-Identifier: GPL-2.0-or-later
"""The boot scripts' functions against a tree with its own /proc, /sys and /etc, in both shells that
dracut puts into an initramfs."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

MODULE = Path(__file__).resolve().parents[2] / "ramboot/initramfs/files/50ramboot"
# in the order of the program
PARTS = re.findall(
    r"^for part in (.*); do$", (MODULE / "ramboot-initramfs.sh").read_text(), re.MULTILINE
)[0].split()
GOOD = {
    "version": "1",
    "mode": "ask",
    "backend": "zram",
    "default": "n",
    "timeout_s": "30",
    "disk": "attached",
    "swap": "session",
    "zram_algorithm": "auto",
    "zram_size_mib": "auto",
    "tmpfs_size_mib": "auto",
    "snapshot_store_mib": "auto",
    "image_stale": "rebuild-first",
    "reserve_mib": "1024",
    "headroom_mib": "1024",
    "copy_timeout_s": "1800",
}
Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(params=["dash", "bash --posix"])
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Shell:
    """Runs lines of shell after the boot scripts' functions, with tmp_path as the root."""
    for directory in ("dev", "run/ramboot/work", "etc/ramboot", "proc", "sys"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "proc/uptime").write_text("12.34 5.6\n")
    sources = "".join(f". {MODULE}/ramboot-{part}.sh\n" for part in PARTS)
    # dracut's
    sources += "getcmdline() { printf '%s' \"${CMDLINE-}\"; }\n"

    def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*request.param.split(), "-c", sources + script],
            env={**os.environ, "RAMBOOT_PREFIX": str(tmp_path), "LC_ALL": "C", **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def config(tmp_path: Path, *extra: str, **values: str) -> None:
    lines = [f"{key}={value}" for key, value in {**GOOD, **values}.items() if value]
    (tmp_path / "etc/ramboot/ramboot.conf").write_text("\n".join([*lines, *extra]) + "\n")


# --- configuration ---------------------------------------------------------------------------


def test_a_good_configuration_is_read(shell: Shell, tmp_path: Path) -> None:
    config(tmp_path, "# comment", "exclude=/tmp/*", "exclude=/var/tmp/*")
    done = shell(
        'read_config && printf "%s|%s|%s" "$CONF_backend" "$CONF_timeout_s" "$CONF_EXCLUDE"'
    )
    assert done.stdout == "zram|30|/tmp/*\n/var/tmp/*\n"


@pytest.mark.parametrize(
    "line",
    [
        "backend=$(touch pwned)",
        "mode=erofs",
        "timeout_s=-1",
        "timeout_s=99999999999999999999",
        "reserve_mib=1k",
        "exclude=relative/*",
        "unknown=1",
        "no equals sign",
        "zram_size_mib=",
    ],
)
def test_a_line_that_is_not_understood_is_an_error(shell: Shell, tmp_path: Path, line: str) -> None:
    config(tmp_path, line)
    done = shell('cd "$P"; read_config || printf "%s" "$reason"')
    assert done.stdout == (
        f"the configuration {tmp_path}/etc/ramboot/ramboot.conf has a line that is not understood: "
        f"{line}"
    )
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_key_is_an_error(shell: Shell, tmp_path: Path, key: str) -> None:
    config(tmp_path, **{key: ""})
    done = shell('read_config || printf "%s" "$reason"')
    assert done.stdout.endswith(f"has no line {key}=")


def test_no_configuration_is_an_error(shell: Shell) -> None:
    assert "is missing" in shell('read_config || printf "%s" "$reason"').stdout


# --- the question ---------------------------------------------------------------------------------

ASK = (
    "read_config; ST_BACKEND=zram ASK_NEEDED='1 GiB' ASK_AVAILABLE='2 GiB'\n"
    'ASK_REFRESH_S=${REFRESH:-10}; console_flows; ask; echo "$answer $answered"'
)


def asked(
    shell: Shell, tmp_path: Path, *typed: tuple[str, str], **values: str
) -> tuple[str, str, str]:
    """Ask at a terminal where, each time the first text appears, the second is typed. Returns
    what ramboot took for the answer, what decided, and what was on the terminal.
    """
    config(tmp_path, **values)
    (tmp_path / "proc/uptime").unlink()
    (tmp_path / "proc/uptime").symlink_to("/proc/uptime")
    person, terminal = pty.openpty()
    (tmp_path / "dev/console").symlink_to(os.ttyname(terminal))
    seen: list[str] = []

    def type_it() -> None:
        left = list(typed)
        position = 0
        with contextlib.suppress(OSError):
            while text := os.read(person, 1000).decode(errors="replace"):
                seen.append(text)
                while left and (at := "".join(seen).find(left[0][0], position)) >= 0:
                    position = at + len(left[0][0])
                    os.write(person, left.pop(0)[1].encode())

    watcher = threading.Thread(target=type_it, daemon=True)
    watcher.start()
    ran = shell(ASK)
    assert ran.stderr == ""
    os.close(terminal)
    watcher.join(5)
    answer, decided = ran.stdout.split()
    return answer, decided, "".join(seen)


@pytest.mark.parametrize(
    ("key", "default", "answer"),
    [
        ("y\r", "n", "y"),
        (" YES \r", "n", "y"),
        ("n\r", "y", "n"),
        ("No\r", "y", "n"),
        ("\r", "n", "n"),
        ("\r", "y", "y"),
    ],
)
def test_an_answer_at_the_console(
    shell: Shell, tmp_path: Path, key: str, default: str, answer: str
) -> None:
    got, decided, screen = asked(shell, tmp_path, ("left)", key), default=default)
    assert (got, decided) == (answer, "key")
    assert f"Boot to RAM? y/n + Enter [{default}]  (zram: needs about 1 GiB" in screen


def test_a_key_right_after_a_wrong_answer_is_not_lost(shell: Shell, tmp_path: Path) -> None:
    got, decided, screen = asked(shell, tmp_path, ("left)", "perhaps\r"), ("Please", "y\r"))
    assert (got, decided) == ("y", "key")
    assert "Please answer y or n (or Enter for n)." in screen


def test_wrong_answers_end_in_an_ordinary_boot(shell: Shell, tmp_path: Path) -> None:
    wrong = [("left)", "maybe\r")] * 10
    assert asked(shell, tmp_path, *wrong, default="y")[:2] == ("n", "tries")


# The keys that end, erase or stop a line; arrow up; more than a terminal's line holds (4096).
@pytest.mark.parametrize(
    "garbage",
    ["y" * 5000, "\x1b[A", "\x16\x03", "\x07y", "\xff"],
    ids=["long", "arrow", "interrupt", "bell", "not-ascii"],
)
def test_garbage_at_the_question_is_neither_an_answer_nor_enter(
    shell: Shell, tmp_path: Path, garbage: str
) -> None:
    typed = [("left)", f"{garbage}\r"), ("Please", "n\r")]
    got, decided, screen = asked(shell, tmp_path, *typed, default="y", timeout_s="20")
    assert (got, decided) == ("n", "key")
    assert "Please answer y or n" in screen


@pytest.mark.parametrize("key", ["\x13", "\x04", "\x1a"], ids=["stop", "end-of-file", "suspend"])
def test_no_key_keeps_the_boot_from_going_on(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("REFRESH", "1")
    assert asked(shell, tmp_path, ("left)", key), timeout_s="3")[:2] == ("n", "time-out")


@pytest.mark.parametrize("default", ["y", "n"])
def test_nobody_answers(shell: Shell, tmp_path: Path, default: str) -> None:
    got = asked(shell, tmp_path, default=default, timeout_s="2")
    assert got[:2] == (default, "time-out")


@pytest.mark.parametrize(
    ("timeout", "result"), [("2", "y time-out"), ("0", "n key")], ids=["limit", "no-limit"]
)
def test_a_console_that_cannot_be_read_is_nobodys_enter(
    shell: Shell, tmp_path: Path, timeout: str, result: str
) -> None:
    config(tmp_path, default="y", timeout_s=timeout)
    (tmp_path / "proc/uptime").unlink()
    (tmp_path / "proc/uptime").symlink_to("/proc/uptime")
    begin = time.monotonic()
    assert shell(ASK).stdout.strip() == result
    assert time.monotonic() - begin >= (1 if timeout == "2" else 0)


# --- status ----------------------------------------------------------------------------------


def test_status_is_json_whatever_the_reason_holds(shell: Shell, tmp_path: Path) -> None:
    shell(
        """
        printf 'copy 1234\\nprove 5\\n' > "$RUN/seconds"
        reason='a "quoted" \\\\ back\tslash'
        ST_REQUESTED=zram ST_DEVICE=/dev/x ST_FSTYPE=ext4 ST_BYTES=7 ST_NEEDED=8 ST_AVAILABLE=9
        write_status persistent
        """
    )
    assert json.loads((tmp_path / "run/ramboot/status.json").read_text()) == {
        "schema": 1,
        "session": "persistent",
        "requested": "zram",
        "backend": None,
        "disk": None,
        "reason": 'a "quoted" \\\\ back?slash',
        "source": {"device": "/dev/x", "fstype": "ext4", "bytes": 7},
        "ram": {"needed_bytes": 8, "available_bytes": 9, "limit_bytes": 0},
        "seconds": {"copy": 12.34, "prove": 0.05},
    }


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 MiB"), (512 << 20, "512 MiB"), (3500 << 20, "3.4 GiB")]
)
def test_sizes_as_a_person_reads_them(shell: Shell, size: int, text: str) -> None:
    assert shell(f"human {size}").stdout == text


# --- the root's device -----------------------------------------------------------------------


FIND = """
getarg() { printf '%s' "$ROOT"; }
getargs() {
    case $1 in
        rd.lvm.lv) printf '%s\\n' qubes_dom0/root qubes_dom0/swap ;;
        rd.luks.uuid) printf '%s\\n' $LUKS ;;
        rd.luks.key) printf '%s' "$KEY" ;;
    esac
}
lvm() {
    printf 'asked\\n' >> "$P/asked"
    case $* in
        'pvs -a '*) printf '%s\\n' "$PVS" ;;
        *) printf '%s\\n' "$PVS" | grep -v duplicate ;;
    esac
}
initqueue() { printf '%s ' "$@" > "$P/queued"; }
timeout() { shift 3; "$@"; }
udevadm() { eval "$SETTLES"; }
hookdir=$P/hooks
find_root; printf '%s|%s|%s|%s|%s' $? "$ROOT_KIND" "$SOURCE_DISK" "$ROOT_SPEC" "$reason"
"""
LUKS = "11111111-2222-4333-8444-555555555555"


def physical_volume(tmp_path: Path) -> None:
    data = tmp_path / "run/udev/data"
    data.mkdir(parents=True)
    (data / "b254:0").write_text("E:ID_FS_TYPE=LVM2_member\n")


def luks_mapping(tmp_path: Path, uuid: str = LUKS, device: str = "dm-0") -> None:
    """What the kernel and udev show of an opened LUKS device."""
    shown = tmp_path / f"sys/class/block/{device}/dm"
    shown.mkdir(parents=True)
    name = f"CRYPT-LUKS2-{uuid.replace('-', '')}-luks-{uuid}"
    (shown / "uuid").write_text(f"{name}\n")
    (shown / "name").write_text(f"luks-{uuid}\n")
    links = tmp_path / "dev/disk/by-id"
    links.mkdir(parents=True, exist_ok=True)
    (links / f"dm-uuid-{name}").touch()


def luks_device(tmp_path: Path) -> None:
    """A LUKS device of the kernel line, for which dracut waits."""
    (tmp_path / "dev/disk/by-uuid").mkdir(parents=True)
    (tmp_path / "dev/disk/by-uuid" / LUKS).touch()
    finished = tmp_path / "hooks/initqueue/finished"
    finished.mkdir(parents=True)
    (finished / "90-crypt.sh").touch()


def lvm_scan_queued(tmp_path: Path, *devices: str) -> Path:
    """dracut is about to scan these devices; returns its job."""
    (tmp_path / "tmp").mkdir()
    for device in devices:
        (tmp_path / f"tmp/.lvm_scan-{device}").touch()
    job = tmp_path / "hooks/initqueue/settled/lvm_scan.sh"
    job.parent.mkdir(parents=True)
    job.touch()
    return job


def noted(tmp_path: Path) -> list[str]:
    """The devices that dracut's lvm_scan will look at."""
    return sorted(path.name.removeprefix(".lvm_scan-") for path in (tmp_path / "tmp").iterdir())


OWN, TWIN = " /dev/dm-0 0 qubes_dom0 uuid-1 \n", " /dev/vdb 0 qubes_dom0 uuid-2 \n"


@pytest.mark.parametrize(
    ("root", "pvs", "found"),
    [
        ("/dev/mapper/qubes_dom0-root", OWN, "0|lvm|/dev/dm-0|qubes_dom0/root|"),
        ("UUID=1-2", f" /dev/vda1 0   \n{OWN}", "0|lvm|/dev/dm-0|qubes_dom0/root|"),
        # incomplete: its other device is not here yet
        ("/dev/qubes_dom0/root", " /dev/dm-0 1 qubes_dom0 uuid-1 ", "1||||"),
        ("/dev/qubes_dom0/root", " /dev/dm-0 0 other uuid-1 ", "1||||"),
        (
            "/dev/qubes_dom0/root",
            f"{OWN} /dev/dm-1 0 qubes_dom0 uuid-1 ",
            "2||||the volume group qubes_dom0 lies on 2 devices; ramboot supports one",
        ),
        ("", "", "2||||the kernel line has no root="),
        ("/dev/mapper/luks-1", "", "1||||"),
    ],
)
@pytest.mark.parametrize("luks", ["", LUKS], ids=["bare", "luks"])
def test_which_device_holds_the_root(
    shell: Shell, tmp_path: Path, root: str, pvs: str, found: str, luks: str
) -> None:
    physical_volume(tmp_path)
    if luks:
        luks_device(tmp_path)
        luks_mapping(tmp_path)
    job = lvm_scan_queued(tmp_path, "dm-0", "dm-1")
    assert shell(FIND, ROOT=root, PVS=pvs, LUKS=luks, main_loop="0").stdout == found
    # LVM's own scan goes on as ever
    assert job.exists()
    assert noted(tmp_path) == ["dm-0", "dm-1"]
    assert not (tmp_path / "queued").exists()


def test_lvm_is_not_asked_again_until_udev_saw_another_volume(shell: Shell, tmp_path: Path) -> None:
    physical_volume(tmp_path)
    again = FIND + f'PVS="{OWN}"; find_root; printf "/%s" $?'
    done = shell(again, ROOT="/dev/qubes_dom0/root", PVS="")
    assert done.stdout == "1||||/1"
    assert (tmp_path / "asked").read_text() == "asked\n"


# --- a second volume group with the root's name --------------------------------------------------

OF_TWO = "there is more than one volume group qubes_dom0"


@pytest.mark.parametrize(
    ("pvs", "named", "reason"),
    [
        (TWIN + OWN, ["dm-0"], f": the root's on /dev/mapper/luks-{LUKS}, another on /dev/vdb"),
        # a copy, with the same UUIDs, whichever of them LVM would use
        (
            " /dev/vdb 0 qubes_dom0 uuid-1 \n /dev/dm-0 0 qubes_dom0 uuid-1 duplicate\n",
            ["dm-0"],
            f": the root's on /dev/mapper/luks-{LUKS}, another on /dev/vdb",
        ),
        # an incomplete one takes the name as well
        (
            f"{OWN} /dev/vdb 1 qubes_dom0 uuid-2 \n /dev/vdc 0 qubes_dom0 uuid-3 ",
            ["dm-0"],
            f": the root's on /dev/mapper/luks-{LUKS}, another on /dev/vdb, /dev/vdc",
        ),
        (OWN + TWIN, [], ", on /dev/dm-0, /dev/vdb, and nothing tells which is the root's"),
        (
            f"{OWN} /dev/dm-1 0 qubes_dom0 uuid-2 ",
            ["dm-0", "dm-1"],
            ", on /dev/dm-0, /dev/dm-1, and nothing tells which is the root's",
        ),
    ],
    ids=["other", "copy", "three", "both-bare", "both-luks"],
)
def test_a_second_group_of_the_roots_name_is_refused(
    shell: Shell, tmp_path: Path, pvs: str, named: list[str], reason: str
) -> None:
    physical_volume(tmp_path)
    job = lvm_scan_queued(tmp_path, "dm-0", "dm-1", "vdb", "vdc", "vdd")
    second = "66666666-2222-4333-8444-555555555555"
    for device, uuid in zip(named, [LUKS, second], strict=False):
        luks_mapping(tmp_path, uuid, device)
    done = shell(
        FIND + 'printf "|%s" "$TWIN_ROOT"',
        ROOT="/dev/mapper/qubes_dom0-root",
        PVS=pvs,
        LUKS=f"luks-{LUKS} {second[:8]}",
    )
    spec = "qubes_dom0/root"
    if len(named) == 1:
        assert done.stdout == f"2|||{spec}|{OF_TWO}{reason}|/dev/dm-0"
        # not in LVM's sight; the others are, those of other groups as well
        others = {"vdb", "vdc"} if "vdc" in pvs else {"vdb"}
        assert noted(tmp_path) == sorted({"dm-0", "dm-1", "vdb", "vdc", "vdd"} - others)
        assert (tmp_path / "queued").read_text() == "--settled --onetime --unique /sbin/lvm_scan "
    else:
        assert done.stdout == f"2|||{spec}|{OF_TWO}{reason}|"
        assert job.exists()
        assert len(noted(tmp_path)) == 5


def test_volumes_come_from_the_roots_own_device_alone(shell: Shell, tmp_path: Path) -> None:
    done = shell(
        "getargs() { printf '%s\\n' qubes_dom0/root other/data qubes_dom0/swap; }\n"
        "udevadm() { :; }\n"
        'try() { shift; printf "%s\\n" "$*"; reason=failed; return 1; }\n'
        "alert() { printf 'warning: %s\\n' \"$*\"; }\n"
        "reason=two ROOT_SPEC=qubes_dom0/root TWIN_ROOT=/dev/dm-0; twin_boot\n"
        'printf "%s" "$reason"; TWIN_ROOT=; twin_boot'
    )
    only = (
        'devices{global_filter=["a|^/dev/dm-0$|","r|.*|"] filter=["a|.*|"] use_devicesfile=0}'
        " activation{monitoring=0}"
    )
    assert done.stdout.splitlines() == [
        f"lvm lvchange -ay -K --yes --sysinit qubes_dom0/root --config {only}",
        "warning: the volume qubes_dom0/root could not be activated: failed",
        f"lvm lvchange -ay -K --yes --sysinit qubes_dom0/swap --config {only}",
        "warning: the volume qubes_dom0/swap could not be activated: failed",
        "two",
    ]


def test_a_bare_group_waits_for_the_disk_that_the_kernel_line_opens(
    shell: Shell, tmp_path: Path
) -> None:
    physical_volume(tmp_path)
    luks_device(tmp_path)
    job = lvm_scan_queued(tmp_path, "vdb", "vdc")
    asked = {"ROOT": "/dev/mapper/qubes_dom0-root", "LUKS": f"luks-{LUKS}", "main_loop": "0"}
    for _ in range(2):
        assert shell(FIND, PVS=TWIN, **asked).stdout == "1||||"
        assert noted(tmp_path) == ["vdc"]
        assert not job.exists()
    # another event of the bare disk
    (tmp_path / "tmp/.lvm_scan-vdb").touch()
    assert shell(FIND, PVS=TWIN, **asked).stdout == "1||||"
    assert noted(tmp_path) == ["vdc"]
    assert (tmp_path / "asked").read_text() == "asked\n"

    # opened, and there was no other group in it: the bare one is the root's, and free for LVM
    luks_mapping(tmp_path)
    assert shell(FIND, PVS=TWIN, **asked).stdout == "0|lvm|/dev/vdb|qubes_dom0/root|"
    assert noted(tmp_path) == ["vdb", "vdc"]
    assert (tmp_path / "queued").read_text() == "--settled --onetime --unique /sbin/lvm_scan "


def bare_group_first(tmp_path: Path) -> dict[str, str]:
    """A bare disk is seen, and the LUKS device of the kernel line is closed; returns what FIND is
    to be told.
    """
    physical_volume(tmp_path)
    luks_device(tmp_path)
    lvm_scan_queued(tmp_path, "vdb")
    return {"ROOT": "/dev/mapper/qubes_dom0-root", "LUKS": f"luks-{LUKS}", "main_loop": "0"}


def test_the_disk_that_opens_has_the_roots_group(shell: Shell, tmp_path: Path) -> None:
    asked = bare_group_first(tmp_path)
    assert shell(FIND, PVS=TWIN, **asked).stdout == "1||||"
    luks_mapping(tmp_path)
    (tmp_path / "run/udev/data/b254:1").write_text("E:ID_FS_TYPE=LVM2_member\n")
    (tmp_path / "tmp/.lvm_scan-dm-0").touch()
    done = shell(FIND, PVS=TWIN + OWN, **asked)
    assert done.stdout.endswith(
        f"|{OF_TWO}: the root's on /dev/mapper/luks-{LUKS}, another on /dev/vdb"
    )
    assert noted(tmp_path) == ["dm-0"]
    assert (tmp_path / "queued").exists()
    assert not (tmp_path / "run/ramboot/held").exists()


def test_a_disk_that_opens_while_lvm_is_asked_is_the_next_turns(
    shell: Shell, tmp_path: Path
) -> None:
    asked = bare_group_first(tmp_path)
    luks_mapping(tmp_path)
    (opened,) = (tmp_path / "dev/disk/by-id").iterdir()
    opened.unlink()
    opens = FIND.replace("'pvs -a '*) ", f"'pvs -a '*) : > {opened}; ")
    done = shell(opens, PVS=TWIN, **asked)
    assert opened.exists()
    assert done.stdout == "1||||"
    assert noted(tmp_path) == []


def test_an_opened_disk_is_looked_at_when_udev_is_done_with_it(
    shell: Shell, tmp_path: Path
) -> None:
    asked = bare_group_first(tmp_path)
    assert shell(FIND, PVS=TWIN, **asked).stdout == "1||||"
    luks_mapping(tmp_path)
    known = tmp_path / "run/udev/data/b254:1"
    done = shell(
        FIND,
        PVS=TWIN + OWN,
        SETTLES=f'[ "$1" != settle ] || echo E:ID_FS_TYPE=LVM2_member > {known}',
        **asked,
    )
    assert done.stdout.endswith(
        f"|{OF_TWO}: the root's on /dev/mapper/luks-{LUKS}, another on /dev/vdb"
    )


@pytest.mark.parametrize(
    "why",
    ["no LUKS", "not waited for", "not there", "key", "another mapping", "time is up", "pre-mount"],
)
def test_what_a_bare_group_does_not_wait_for(shell: Shell, tmp_path: Path, why: str) -> None:
    physical_volume(tmp_path)
    luks_device(tmp_path)
    job = lvm_scan_queued(tmp_path, "vdb")
    asked = {"LUKS": LUKS, "KEY": "", "main_loop": "3", "RDRETRY": "360", "PVS": TWIN}
    expected = "0|lvm|/dev/vdb|qubes_dom0/root|"
    if why == "no LUKS":
        asked["LUKS"] = ""
    elif why == "not waited for":
        (tmp_path / "hooks/initqueue/finished/90-crypt.sh").unlink()
    elif why == "not there":  # it may lie in the group itself
        (tmp_path / "dev/disk/by-uuid" / LUKS).unlink()
        asked["main_loop"] = "19"
        assert shell(FIND, ROOT="/dev/mapper/qubes_dom0-root", **asked).stdout == "1||||"
        assert noted(tmp_path) == []
        job.touch()
        asked["main_loop"] = "20"
    elif why == "key":  # it may lie in the group itself
        asked["KEY"] = "/key:UUID=1"
    elif why == "another mapping":  # a second encrypted disk may never be opened
        luks_mapping(tmp_path, "66666666-2222-4333-8444-555555555555")
        asked["LUKS"] += " 66666666-2222-4333-8444-555555555555"
        asked["PVS"], asked["main_loop"] = OWN, "120"
        expected = "0|lvm|/dev/dm-0|qubes_dom0/root|"
    else:
        asked["main_loop"] = "120" if why == "time is up" else ""
        expected = (
            "2||||a LUKS device of the kernel line is still closed: it may hold the root, not "
            "/dev/vdb"
        )
    done = shell(FIND, ROOT="/dev/mapper/qubes_dom0-root", **asked)
    assert done.stdout == expected
    assert job.exists()
    assert noted(tmp_path) == ["vdb"]


OTHER_LUKS = "66666666-2222-4333-8444-555555555555"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a block device")
@pytest.mark.parametrize(
    ("root", "found"),
    [
        ("/dev/mapper/qubes_dom0-root", "0|lvm|/dev/dm-0|qubes_dom0/root|"),
        ("/dev/dm-0", f"0|device|/dev/mapper/luks-{OTHER_LUKS}|/dev/dm-0|"),
    ],
)
def test_nothing_is_asked_while_another_passphrase_is(
    shell: Shell, tmp_path: Path, root: str, found: str
) -> None:
    """The root's disk is open already. LVM must not take it meanwhile."""
    physical_volume(tmp_path)
    luks_device(tmp_path)
    luks_mapping(tmp_path, OTHER_LUKS)
    job = lvm_scan_queued(tmp_path, "dm-0")
    os.mknod(tmp_path / "dev/dm-0", stat.S_IFBLK)
    asked = {"LUKS": f"{LUKS} {OTHER_LUKS}", "PVS": OWN, "ROOT": root}
    assert shell(FIND, main_loop="3", **asked).stdout == "1||||"
    if "lvm" in found:
        assert (noted(tmp_path), job.exists()) == ([], False)
    luks_mapping(tmp_path, LUKS, "dm-1")
    assert shell(FIND, main_loop="4", **asked).stdout == found
    assert noted(tmp_path) == ["dm-0"]


@pytest.mark.parametrize("closed", [True, False])
def test_a_root_that_comes_while_lvm_is_asked_is_not_left_to_dracuts_scan(
    shell: Shell, tmp_path: Path, closed: bool
) -> None:
    """Another group is there already."""
    physical_volume(tmp_path)
    luks_device(tmp_path)
    if not closed:
        luks_mapping(tmp_path, LUKS, "dm-1")
    job = lvm_scan_queued(tmp_path, "dm-0")
    asked = {"LUKS": LUKS, "ROOT": "/dev/mapper/qubes_dom0-root", "main_loop": "3"}
    other = " /dev/dm-0 0 other uuid-3 "
    known = tmp_path / "run/udev/data/b254:1"
    comes = "" if closed else f"echo E:ID_FS_TYPE=LVM2_member > {known}; "
    done = shell(FIND.replace("'pvs -a '*) ", f"'pvs -a '*) {comes}"), PVS=other, **asked)
    assert (done.stdout, job.exists()) == ("1||||", False)
    if closed:
        luks_mapping(tmp_path, LUKS, "dm-1")
        known.write_text("E:ID_FS_TYPE=LVM2_member\n")
    (tmp_path / "tmp/.lvm_scan-dm-1").touch()
    job.touch()
    mine = OWN.replace("dm-0", "dm-1")
    assert shell(FIND, PVS=other + "\n" + mine, **asked).stdout == (
        "0|lvm|/dev/dm-1|qubes_dom0/root|"
    )
    assert noted(tmp_path) == ["dm-0", "dm-1"]


def test_an_answer_that_lvm_did_not_give_is_asked_for_again(shell: Shell, tmp_path: Path) -> None:
    physical_volume(tmp_path)
    luks_device(tmp_path)
    lvm_scan_queued(tmp_path, "dm-0")
    asked = {"LUKS": LUKS, "ROOT": "/dev/mapper/qubes_dom0-root", "main_loop": "3"}
    assert shell(FIND, PVS=OWN, **asked).stdout == "1||||"
    luks_mapping(tmp_path, LUKS, "dm-1")
    (tmp_path / "run/udev/data/b254:1").write_text("E:ID_FS_TYPE=LVM2_member\n")
    failing = FIND.replace("'pvs -a '*) ", "'pvs -a '*) return 5; ")
    assert shell(failing, PVS=OWN, **asked).stdout == "1||||"
    # nothing is kept from LVM for that
    assert noted(tmp_path) == ["dm-0"]
    assert (tmp_path / "queued").exists()
    assert shell(FIND, PVS=OWN, **asked).stdout == "0|lvm|/dev/dm-0|qubes_dom0/root|"


def test_lvm_gets_the_disk_back_when_the_time_is_up(shell: Shell, tmp_path: Path) -> None:
    physical_volume(tmp_path)
    luks_device(tmp_path)
    lvm_scan_queued(tmp_path, "vdb")
    asked = {"ROOT": "/dev/mapper/qubes_dom0-root", "LUKS": LUKS, "PVS": TWIN, "RDRETRY": "360"}
    assert shell(FIND, main_loop="119", **asked).stdout == "1||||"
    assert noted(tmp_path) == []
    assert shell(FIND, main_loop="120", **asked).stdout.startswith("2||||a LUKS device")
    assert noted(tmp_path) == ["vdb"]
    assert (tmp_path / "queued").exists()


@pytest.mark.parametrize(
    ("argument", "mode", "off"),
    [
        ("off", "zram", True),
        ("", "off", True),
        ("zram", "off", False),
        ("", "ask", False),
        ("ask", "ask", False),
    ],
)
def test_a_boot_that_stays_on_the_disk_looks_at_no_volume_group(
    shell: Shell, tmp_path: Path, argument: str, mode: str, off: bool
) -> None:
    config(tmp_path, mode=mode)
    text = (MODULE / "ramboot-initramfs.sh").read_text()
    phases = text[text.index("\nrequested() {") : text.index("\n# build: make_root")]
    done = shell(
        f"getarg() {{ printf '{argument}'; }}\nfind_root() {{ printf 'looked '; return 1; }}\n"
        f"decide() {{ return 1; }}\npersistent() {{ printf persistent; }}\n{phases}\nopen_disk"
    )
    assert done.stdout == ("persistent" if off else "looked ")


def test_a_refused_boot_gets_the_roots_volumes_before_its_reason_is_shown(
    shell: Shell, tmp_path: Path
) -> None:
    config(tmp_path)
    text = (MODULE / "ramboot-initramfs.sh").read_text()
    phases = text[text.index("\nrequested() {") : text.index("\n# build: make_root")]
    done = shell(
        "getarg() { printf zram; }\nfind_root() { reason=two; return 2; }\n"
        "console_flows() { printf 'console '; }\ntwin_boot() { printf 'volumes '; }\n"
        'persistent() { printf \'%s %s\' "$ST_REQUESTED" "$reason"; }\n'
        f"{phases}\nopen_disk"
    )
    assert done.stdout == "console volumes zram two"


def test_a_refused_boot_tells_what_the_configuration_had_asked_for(
    shell: Shell, tmp_path: Path
) -> None:
    config(tmp_path, mode="snapshot")
    text = (MODULE / "ramboot-initramfs.sh").read_text()
    phases = text[text.index("\nrequested() {") : text.index("\n# build: make_root")]
    done = shell(
        "getarg() { return 1; }\nfind_root() { reason=two; return 2; }\n"
        "console_flows() { :; }\ntwin_boot() { :; }\n"
        f'persistent() {{ printf %s "$ST_REQUESTED"; }}\n{phases}\nopen_disk'
    )
    assert done.stdout == "snapshot"


@pytest.mark.parametrize(
    ("first", "gone"), [(b"PV", False), (b"\0" * 512, False), (b"\n" * 512, False), (None, True)]
)
def test_a_disk_that_can_not_be_read_is_gone(
    shell: Shell, tmp_path: Path, first: bytes | None, gone: bool
) -> None:
    disk = tmp_path / "disk"
    if first:
        disk.write_bytes(first)
    done = shell(
        "sleep() { :; }; blockdev() { :; }\n"
        f"SOURCE_DISK={disk}; disk_gone && printf gone; SOURCE_DISK=; disk_gone && printf none"
    )
    assert done.stdout == ("gone" if gone else "")


PERSISTENT = """
sleep() { :; }; phase() { :; }; save_state() { :; }; write_status() { printf '%s.' "$1"; }
disk_gone() { return 1; }; alert() { printf 'warning: %s.' "$*"; }; screen() { printf '%s' "$*"; }
GONE_PAUSE_S=60 REASON_PAUSE_S=5 reason=busy
"""


@pytest.mark.parametrize("layer", [True, False])
def test_a_boot_that_would_run_in_the_throw_away_layer_is_no_persistent_one(
    shell: Shell, tmp_path: Path, layer: bool
) -> None:
    trigger = tmp_path / "proc/sysrq-trigger"
    text = (MODULE / "ramboot-initramfs.sh").read_text()
    phases = text[text.index("\npersistent() {") : text.index("\npre_mount() {")]
    done = shell(f"{PERSISTENT}dmsetup() {{ return {0 if layer else 1}; }}\n{phases}\npersistent")
    if layer:
        assert "the disk can't be freed for a persistent boot: busy" in done.stdout
        assert trigger.read_text() == "b"
    else:
        assert done.stdout == "persistent.warning: persistent boot: busy."
        assert not trigger.exists()


@pytest.mark.parametrize(("left", "detached"), [("nothing", True), ("the mapping", False)])
def test_a_disk_is_closed_when_its_mapping_is_gone(
    shell: Shell, tmp_path: Path, left: str, detached: bool
) -> None:
    luks_mapping(tmp_path)
    done = shell(
        "layer_down() { :; }; kernel_name() { printf dm-0; }\n"
        'try() { reason=late; return 1; }; dmsetup() { [ "$LEFT" != nothing ]; }\n'
        "detach_disk && printf detached",
        LEFT=left,
    )
    assert done.stdout == ("detached" if detached else "")


# dmsetup for mappings in sysfs, of which $STAYS can't be removed.
MAPPINGS = """
layer_down() { printf 'layer. '; }; kernel_name() { printf dm-0; }
systemctl() { echo "$*" >> "$P/systemctl"; }
timeout() { shift; "$@"; }
dmsetup() {
    local device holder
    for device in "$P"/sys/class/block/dm-*; do
        eval "last=\\$$#"
        [ "$(cat "$device/dm/name")" = "$last" ] || continue
        case $1,$last in
            info,*) return 0 ;;
            remove,$STAYS) return 1 ;;
            remove,*)
                rm -r "$device" "$P"/sys/class/block/*/holders/"${device##*/}" 2> /dev/null
                printf 'closed %s. ' "$last"
                return 0
                ;;
        esac
    done
    return 1
}
try() { shift; "$@" 2> /dev/null || { reason="$1 failed"; return 1; }; }
ST_DISK=detached SOURCE_DISK=/dev/mapper/root
"""


def mapping(tmp_path: Path, number: int, name: str, uuid: str, *below: str) -> None:
    device = tmp_path / f"sys/class/block/dm-{number}"
    (device / "dm").mkdir(parents=True)
    (device / "dm/name").write_text(f"{name}\n")
    (device / "dm/uuid").write_text(f"{uuid}\n")
    (device / "dev").write_text(f"254:{number}\n")
    for part in below:
        (device / "slaves" / part).mkdir(parents=True)
        if part.startswith("dm-"):
            holders = tmp_path / "sys/class/block" / part / "holders"
            (holders / f"dm-{number}").mkdir(parents=True)


def partition(tmp_path: Path, disk: str, name: str) -> None:
    place = tmp_path / "sys/devices" / disk / name
    place.mkdir(parents=True)
    (place / "partition").write_text("1\n")
    (tmp_path / "sys/class/block").mkdir(parents=True, exist_ok=True)
    (tmp_path / "sys/class/block" / name).symlink_to(place)


CLOSED = "closed data-music. closed luks-data. "


@pytest.mark.parametrize(
    ("function", "stays", "mounted", "said"),
    [
        ("detach_disk", "none", "", f"layer. {CLOSED}closed root. done"),
        ("close_others", "none", "", f"{CLOSED}done"),
        # nothing is closed then, for a persistent boot needs it all
        (
            "detach_disk",
            "none",
            "30 1 254:2 / /keys rw - ext4 /dev/dm-2 rw\n",
            "the disk can't be detached: data-music is on it and in use",
        ),
        (
            "detach_disk",
            "data-music",
            "",
            "layer. the disk can't be detached: data-music is on it and in use",
        ),
    ],
)
def test_all_that_was_opened_of_the_roots_disk_is_closed_and_nothing_else(
    shell: Shell, tmp_path: Path, function: str, stays: str, mounted: str, said: str
) -> None:
    for disk, part in (("vda", "vda2"), ("vda", "vda3"), ("vdb", "vdb1")):
        partition(tmp_path, disk, part)
    mapping(tmp_path, 0, "root", "CRYPT-LUKS2-1", "vda2")
    mapping(tmp_path, 1, "luks-data", "CRYPT-LUKS2-2", "vda3")
    mapping(tmp_path, 2, "data-music", "LVM-1", "dm-1")
    mapping(tmp_path, 3, "other", "CRYPT-LUKS2-3", "vdb1")
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/mountinfo").write_text(mounted)
    done = shell(
        f'{MAPPINGS}{function} && printf done || printf "%s" "$reason"',
        STAYS=stays,
    )
    assert done.stdout == said, done.stderr
    assert "pipe" not in done.stderr, "the console is for the user"
    if CLOSED in said:
        # or a persistent boot, which a later failure ends in, would take it for open
        stopped = (tmp_path / "systemctl").read_text()
        assert "stop systemd-cryptsetup@luks\\x2ddata.service\n" in stopped


KEYS = "1a2b I--Q---     1 {} 3f010000     0     0 user      cryptsetup: 9\n"


@pytest.mark.parametrize(
    ("keys", "keyctl", "said"),
    [
        ("", "return 127", "forgotten"),
        # the kernel takes its time
        (KEYS.format("  2m"), "[ $2 = @u ]", "forgotten"),
        # as long as it lasts, and not for ever
        (KEYS.format("  2m"), "return 127", "waits forgotten"),
        (KEYS.format("perm"), "return 127", "waits the kernel did not forget the passphrase"),
        # nobody can read it any more
        (KEYS.format("expd"), "return 127", "forgotten"),
        ("1a2b I--Q--- 1 perm 3f010000 0 0 user other: 9\n", "return 127", "forgotten"),
    ],
)
def test_a_disk_is_detached_when_nobody_remembers_its_passphrase(
    shell: Shell, tmp_path: Path, keys: str, keyctl: str, said: str
) -> None:
    (tmp_path / "proc/keys").write_text(keys)
    sleep = "PASSED=$((PASSED + 17000))" if "perm" in keys else ': > "$P/proc/keys"'
    done = shell(
        f"keyctl() {{ {keyctl}; }}; say() {{ printf 'waits '; }}\n"
        f"sleep() {{ {sleep}; }}\n"
        'PASSED=0; now_cs() { printf %s "$PASSED"; }\n'
        'forget_passphrase && printf forgotten || printf "%s" "$reason"'
    )
    assert done.stdout.startswith(said), done.stdout + done.stderr
    assert done.stdout.startswith("waits") == said.startswith("waits")


@pytest.mark.parametrize("there", [True, False])
def test_who_lacks_keyctl_learns_of_it(shell: Shell, tmp_path: Path, there: bool) -> None:
    (tmp_path / "proc/keys").write_text(KEYS.format("  2m"))
    done = shell(
        f"keyctl() {{ return {0 if there else 127}; }}; say() {{ printf '%s' \"$1\"; }}\n"
        'sleep() { [ $1 != 1 ] || : > "$P/proc/keys"; }\n'
        "forget_passphrase"
    )
    assert done.stdout.startswith("waiting until the kernel forgets the passphrase, 160 s at most")
    assert ("keyutils" in done.stdout) == (not there)


def test_a_layer_goes_though_its_disk_stays_read_only(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "run/ramboot/read-only").touch()
    (tmp_path / "run/ramboot/layer").touch()
    done = shell(
        "dmsetup() { return 1; }; udevadm() { :; }; umount_below() { :; }\n"
        "try() { reason='blockdev failed'; return 1; }; ROOT_KIND=device\n"
        'reason=first; layer_down || printf "%s" "$reason"'
    )
    assert done.stdout == "first; blockdev failed"
    assert not (tmp_path / "run/ramboot/layer").exists()


@pytest.mark.parametrize("flag", ["0", "1"])
def test_the_disk_below_a_snapshot_is_read_only_and_writable_again_without_it(
    shell: Shell, flag: str
) -> None:
    """One that was write-protected before stays as it was."""
    done = shell(
        "FLAG=$WAS; blockdev() {\n"
        "    case $1 in --getro) printf $FLAG ;; --setro) FLAG=1 ;; --setrw) FLAG=0 ;; esac\n"
        "}\n"
        'try() { shift; "$@"; }; SOURCE_DISK=/dev/disk\n'
        "disk_read_only && printf $FLAG; disk_writable && printf $FLAG; disk_writable",
        WAS=flag,
    )
    assert done.stdout == f"1{flag}"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("status", "healthy"),
    [
        ("0 100 snapshot 16/200 8", True),
        ("0 100 snapshot Invalid", False),
        ("0 100 snapshot Overflow", False),
        ("", False),
    ],
)
def test_a_layer_whose_store_is_full_is_not_healthy(
    shell: Shell, status: str, healthy: bool
) -> None:
    done = shell(
        f"dmsetup() {{ printf '{status}'; }}\n"
        'layer_healthy && printf healthy || printf "%s" "$reason"'
    )
    assert (done.stdout == "healthy") == healthy
    assert healthy or "became invalid" in done.stdout


HOLDERS = """
kernel_name() {
    case $1 in
        */disk) printf vda2 ;;
        */ramboot-layer) printf dm-0 ;;
        *) printf dm-1 ;;
    esac
}
layer_healthy() { :; }; SOURCE_DISK=/dev/disk ROOT_KIND=lvm ROOT_SPEC=vg/root
"""


@pytest.mark.parametrize(
    ("holders", "alone"),
    [(["dm-0"], True), (["dm-0", "dm-2"], False), (["dm-2"], False), ([], False)],
)
def test_nothing_but_the_layer_may_hold_the_disk(
    shell: Shell, tmp_path: Path, holders: list[str], alone: bool
) -> None:
    (tmp_path / "sys/class/block/vda2/holders").mkdir(parents=True)
    for name in holders:
        (tmp_path / "sys/class/block/vda2/holders" / name).mkdir()
    done = shell(f"{HOLDERS}layer_holds_root && printf alone || printf '%s' \"$reason\"")
    assert done.stdout == (
        "alone" if alone else "something else than ramboot's layer uses /dev/disk"
    )


@pytest.mark.parametrize(("below", "ready"), [("dm-0", True), ("vda2", False)])
def test_a_snapshots_root_lies_on_the_layer(
    shell: Shell, tmp_path: Path, below: str, ready: bool
) -> None:
    (tmp_path / "sys/class/block/dm-1/slaves" / below).mkdir(parents=True)
    done = shell(
        f"{HOLDERS}layer_holds_root() {{ :; }}\n"
        'snapshot_ready && printf ready || printf "%s" "$reason"'
    )
    assert done.stdout == ("ready" if ready else "the root volume does not lie on ramboot's layer")


def test_a_chunk_size_that_lvm_does_not_tell_is_not_guessed(shell: Shell) -> None:
    done = shell(
        "getargs() { :; }; blockdev() { printf 1073741824; }\n"
        "meminfo_bytes() { printf 4294967296; }\n"
        "timeout() { return 5; }; ROOT_KIND=lvm ROOT_SPEC=vg/root SOURCE_DISK=/dev/disk\n"
        "CONF_reserve_mib=1024 CONF_snapshot_store_mib=auto CONF_zram_algorithm=auto\n"
        'snapshot_plan || printf "%s" "$reason"'
    )
    assert done.stdout == "LVM did not tell the chunk size of the thin pools of vg"


@pytest.mark.parametrize("late", [True, False])
def test_a_build_that_fails_when_nobody_scans_any_more_gives_the_volumes_back(
    shell: Shell, tmp_path: Path, late: bool
) -> None:
    text = (MODULE / "ramboot-initramfs.sh").read_text()
    phase = text[text.index("\npre_mount() {") : text.index("\ntake_place() {")]
    run = tmp_path / "run/ramboot"
    run.mkdir(parents=True, exist_ok=True)
    if not late:
        (run / "decided").touch()
    (run / "status.json").touch()
    done = shell(
        "open_disk() { printf 'asked '; }; load_state() { :; }\n"
        f"volumes_back() {{ printf volumes; }}\n{phase}\npre_mount"
    )
    assert done.stdout == ("asked volumes" if late else "asked ")


def test_a_disk_whose_volumes_are_active_gets_no_layer(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "sys/class/block/dm-0/holders/dm-1").mkdir(parents=True)
    done = shell(
        "modprobe() { :; }; blockdev() { printf 2048; }; kernel_name() { printf dm-0; }\n"
        'dmsetup() { printf made; }; SOURCE_DISK=/dev/dm-0; layer_up || printf "%s" "$reason"'
    )
    assert done.stdout == "something else than ramboot's layer uses /dev/dm-0 already"
    assert not (tmp_path / "run/ramboot/layer").exists()


@pytest.mark.parametrize("stage", ["pre-mount", ""])
def test_what_ended_unexpectedly_leaves_the_volumes_to_a_boot_that_scans_no_more(
    shell: Shell, stage: str
) -> None:
    text = (MODULE / "ramboot-initramfs.sh").read_text()
    recover = text[text.index("\nrecover() {") : text.index("\ncase ${1:-} in")]
    done = shell(
        "load_state() { :; }; take_back() { printf 'back '; }\n"
        "volumes_back() { printf 'volumes '; }\n"
        f'persistent() {{ printf "%s" "$reason"; }}\n{recover}\nrecover {stage}'
    )
    volumes = "volumes " if stage else ""
    assert done.stdout == f"back {volumes}ramboot ended unexpectedly"
    hook = (MODULE / f"hooks/{stage or 'settled'}.sh").read_text()
    assert f"ramboot-initramfs {'recover ' + stage if stage else 'recover'} <" in hook


def test_dashes_in_volume_names_are_doubled(shell: Shell) -> None:
    assert shell("dm_name my-vg/a-b").stdout == "my--vg-a--b"


# --- zram ------------------------------------------------------------------------------------


def zram(tmp_path: Path, number: int = 3) -> Path:
    control = tmp_path / "sys/class/zram-control"
    control.mkdir(parents=True)
    (control / "hot_add").write_text(f"{number}\n")
    device = tmp_path / f"sys/block/zram{number}"
    device.mkdir(parents=True)
    (device / "comp_algorithm").write_text("[lzo-rle] lzo lz4 zstd\n")
    (device / "backing_dev").write_text("none\n")
    return device


def test_zram_takes_the_device_that_the_kernel_gives(shell: Shell, tmp_path: Path) -> None:
    device = zram(tmp_path)
    assert shell('zram_new N 4096 zstd && printf "%s" "$N"').stdout == "3"
    assert (device / "disksize").read_text() == "4096"
    assert (device / "comp_algorithm").read_text() == "zstd"


def test_zram_with_a_backing_device_is_refused(shell: Shell, tmp_path: Path) -> None:
    (zram(tmp_path) / "backing_dev").write_text("/dev/sda3\n")
    assert shell('zram_new N 1 "" || printf "%s" "$reason"').stdout == "zram3 has a backing device"


def test_no_zram_module_is_said(shell: Shell) -> None:
    done = shell('modprobe() { return 1; }; zram_new N 1 "" || printf "%s" "$reason"')
    assert done.stdout == "the kernel module zram is not there"


@pytest.mark.parametrize(("asked", "chosen"), [("auto", "lz4"), ("zstd", "zstd")])
def test_the_algorithm(shell: Shell, tmp_path: Path, asked: str, chosen: str) -> None:
    zram(tmp_path)
    assert (
        shell(f'CONF_zram_algorithm={asked}; choose_algorithm 3; printf "%s" "$ALGORITHM"').stdout
        == chosen
    )


# --- what the copy becomes -------------------------------------------------------------------

FSTAB = """\
# a comment
/dev/mapper/qubes_dom0-root / ext4 defaults,x-systemd.device-timeout=0 1 1
UUID=1 /boot ext4 defaults 1 2
UUID=2 /boot/efi vfat umask=0077 0 2
/dev/mapper/qubes_dom0-swap none swap defaults,x-systemd.device-timeout=0 0 0
/swapfile none swap sw 0 0
/dev/qubes/pool /var/lib/qubes xfs defaults 0 2
tmpfs /tmp tmpfs size=1G 0 0
"""
PREPARE = """
CONF_swap=$SWAP SOURCE_DISK=/dev/dm-0 ST_FSTYPE=ext4 ST_BACKEND=$BACKEND
root_prepare "$P/root" && printf done || printf '%s' "$reason"
"""


def a_root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "etc/systemd/system").mkdir(parents=True)
    (root / "usr/lib/systemd/system").mkdir(parents=True)
    (root / "usr/lib/systemd/system/data.swap").write_text("[Swap]\nWhat=/data\n")
    (root / "etc/fstab").write_text(FSTAB)
    (root / "etc/fstab").chmod(0o640)
    (root / "etc/crypttab").write_text(
        "luks-1 UUID=1 none\nswap /dev/sda9 /dev/urandom swap\nx /y\n"
    )
    name = tmp_path / "sys/class/block/dm-0/dm"
    name.mkdir(parents=True)
    (name / "name").write_text("luks-1\n")
    (tmp_path / "dev/dm-0").touch()
    return root


def test_the_boot_refuses_the_system_directories_that_apply_refuses(shell: Shell) -> None:
    known = yaml.safe_load((MODULE / "../../../defaults.yaml").read_text())["mounts"]["system"]
    assert sorted(shell('printf "%s" "$SYSTEM_DIRS"').stdout.split()) == known


def test_the_copy_mounts_neither_root_nor_swap_nor_boot(shell: Shell, tmp_path: Path) -> None:
    root = a_root(tmp_path)
    script = "kernel_name() { printf '%s' \"${1##*/}\"; }" + PREPARE
    assert shell(script, SWAP="session", BACKEND="zram").stdout == "done"
    active = [line for line in (root / "etc/fstab").read_text().splitlines() if line[0] != "#"]
    assert active == [
        "UUID=1 /boot ext4 defaults,noauto,nofail 1 0",
        "UUID=2 /boot/efi vfat umask=0077,noauto,nofail 0 0",
        "/dev/qubes/pool /var/lib/qubes xfs defaults,nofail 0 0",
        "tmpfs /tmp tmpfs size=1G 0 0",
    ]
    assert (root / "etc/fstab").stat().st_mode & 0o777 == 0o640
    crypttab = (root / "etc/crypttab").read_text().splitlines()
    assert [line for line in crypttab if line[0] != "#"] == ["x /y"]
    for unit in ("swap.target", "data.swap", "grub-boot-indeterminate.service"):
        assert os.readlink(root / "etc/systemd/system" / unit) == "/dev/null"
    assert os.readlink(root / "etc/systemd/user/grub-boot-success.timer") == "/dev/null"
    assert not (root / "etc/systemd/system/qubes-meminfo-writer-dom0.service").is_symlink()


@pytest.mark.parametrize("disk", ["readonly", "detached"])
def test_nothing_of_a_disk_that_is_sealed_or_gone_is_mounted(
    shell: Shell, tmp_path: Path, disk: str
) -> None:
    root = a_root(tmp_path)
    script = "kernel_name() { printf '%s' \"${1##*/}\"; }\nST_DISK=$DISK" + PREPARE
    assert shell(script, SWAP="keep", BACKEND="zram", DISK=disk).stdout == "done"
    active = [line for line in (root / "etc/fstab").read_text().splitlines() if line[0] != "#"]
    assert [line.split()[3] for line in active if line[0] != "t"] == [
        "defaults,ro,norecovery,noauto,nofail",
        "umask=0077,ro,noauto,nofail",
        "defaults,x-systemd.device-timeout=0,nofail,noauto",
        "sw",
        "defaults,nofail,noauto",
    ]
    lvm = root / "etc/lvm/lvmlocal.conf"
    if disk == "readonly":
        # the system's LVM sees the sealed disk and no other
        assert 'global_filter=["a|^/dev/mapper/ramboot-seal$|","r|.*|"]' in lvm.read_text()
    else:
        # it is closed
        assert not lvm.exists()


@pytest.mark.parametrize("own", ['local {\n\tsystem_id = "a"\n}\n', ""])
def test_what_the_user_tells_lvm_stays_and_comes_back(
    shell: Shell, tmp_path: Path, own: str
) -> None:
    conf = tmp_path / "etc/lvm/lvmlocal.conf"
    conf.parent.mkdir(parents=True)
    if own:
        conf.write_text(own)
    layer = 'global_filter=["a|^/dev/mapper/ramboot-layer$|","r|.*|"]'
    for _ in range(2):
        shell('layer_lvm_config "$P"')
        assert conf.read_text().startswith(own)
        assert layer in conf.read_text().removeprefix(own)
    for _ in range(2):
        shell("layer_gives_back")
        assert (conf.read_text() if own else conf.exists()) == (own or False)


def test_lvm_does_not_take_a_detached_disk_up_again_that_luks_does_not_close(
    shell: Shell, tmp_path: Path
) -> None:
    root = a_root(tmp_path)
    (tmp_path / "sys/class/block/dm-0/dm/name").unlink()
    script = "kernel_name() { printf '%s' \"${1##*/}\"; }\nST_DISK=detached" + PREPARE
    assert shell(script, SWAP="session", BACKEND="zram").stdout == "done"
    conf = (root / "etc/lvm/lvmlocal.conf").read_text()
    assert 'global_filter=["a|^/dev/mapper/ramboot-detached$|","r|.*|"]' in conf


@pytest.mark.parametrize(
    ("options", "disk", "rewritten"),
    [
        ("noauto,x-systemd.automount", "detached", "noauto,nofail,noauto"),
        ("x-systemd.automount", "readonly", "nofail,noauto"),
        (
            "ro,x-systemd.wanted-by=multi-user.target,x-systemd.required-by=a.mount,user",
            "detached",
            "ro,user,nofail,noauto",
        ),
        ("noauto,x-systemd.automount", "attached", "noauto,x-systemd.automount,nofail"),
    ],
)
def test_systemd_is_not_asked_to_mount_what_must_not_be_written(
    shell: Shell, tmp_path: Path, options: str, disk: str, rewritten: str
) -> None:
    root = a_root(tmp_path)
    (root / "etc/fstab").write_text(
        f"UUID=9 /mnt/backup ext4 {options} 0 2\nUUID=1 /boot xfs x-systemd.automount 0 0\n"
    )
    script = "kernel_name() { printf '%s' \"${1##*/}\"; }\nST_DISK=$DISK" + PREPARE
    assert shell(script, SWAP="session", BACKEND="zram", DISK=disk).stdout == "done"
    backup, boot = (root / "etc/fstab").read_text().splitlines()
    assert backup.split()[3] == rewritten
    sealed = "" if disk == "attached" else "ro,norecovery,"
    assert boot.split()[3] == f"{sealed}noauto,nofail"


@pytest.mark.parametrize(
    ("spec", "own"),
    [
        ("UUID=root", True),
        ("/dev/dm-0", True),
        ("/dev/disk/by-uuid/root", True),
        ("UUID=data", False),
    ],
)
def test_a_subvolume_of_the_root_is_its_copys_however_fstab_names_it(
    shell: Shell, tmp_path: Path, spec: str, own: bool
) -> None:
    fstab = f"UUID=root / btrfs subvol=root 0 0\n{spec} /var/lib/qubes btrfs subvol=qubes 0 0\n"
    names = {"SWAP": "session", "BACKEND": "zram", "KIND": "device"}
    left = [] if own else ["UUID=data /var/lib/qubes btrfs subvol=qubes,nofail 0 0"]
    assert rewritten(shell, tmp_path, fstab, **names) == left
    (tmp_path / "root/etc/fstab").write_text(fstab)
    listed = shell(LAYERED + 'fstab_subvolumes "$P/root"; root_check "$P/root"', **names)
    assert listed.stdout == ("/var/lib/qubes ,subvol=qubes\n" if own else "")


@pytest.mark.parametrize("spec", ["/dev/qubes_dom0/root", "/dev/mapper/qubes_dom0-root"])
def test_a_volume_of_lvm_has_two_paths(shell: Shell, tmp_path: Path, spec: str) -> None:
    fstab = f"{spec} /home btrfs subvol=home 0 0\n/dev/qubes_dom0/data /data btrfs defaults 0 0\n"
    names = {"SWAP": "session", "BACKEND": "zram", "KIND": "lvm"}
    assert rewritten(shell, tmp_path, fstab, **names) == [
        "/dev/qubes_dom0/data /data btrfs defaults,nofail 0 0"
    ]


def test_swap_kept_stays_as_it_was(shell: Shell, tmp_path: Path) -> None:
    root = a_root(tmp_path)
    assert shell(PREPARE, SWAP="keep", BACKEND="tmpfs").stdout == "done"
    swaps = [line for line in (root / "etc/fstab").read_text().splitlines() if " swap " in line]
    assert [line[0] for line in swaps] == ["/", "/"]
    assert not (root / "etc/systemd/system/swap.target").is_symlink()
    # a tmpfs root counts as free memory for qmemman, which would take it away
    reporter = root / "etc/systemd/system/qubes-meminfo-writer-dom0.service"
    assert os.readlink(reporter) == "/dev/null"


@pytest.mark.parametrize("target", ["/var", "/usr/local", "/home", "/etc"])
def test_a_system_directory_on_another_volume_is_refused(
    shell: Shell, tmp_path: Path, target: str
) -> None:
    root = a_root(tmp_path)
    # the last line may lack its end
    (root / "etc/fstab").write_text(f"UUID=9 {target} ext4 defaults 0 2")
    done = shell('root_check "$P/root" || printf "%s" "$reason"')
    assert done.stdout == (
        f"{target} is on a volume of its own, which a RAM session would go on writing"
    )


UNIT = "[Mount]\nWhat={}\nWhere={}\nType=ext4\n"


@pytest.mark.parametrize(
    ("fstab", "unit", "refused"),
    [
        ("UUID=9 /data ext4 defaults 0 2\n/data/home /home none bind 0 0\n", "", "/home"),
        ("/data/home /home none rbind,ro 0 0\nUUID=9 /data ext4 defaults 0 2\n", "", "/home"),
        (
            "UUID=9 /data ext4 defaults 0 2\n/data/a /b none bind 0 0\n/b/var /var none bind 0 0\n",
            "",
            "/var",
        ),
        ("", UNIT.format("/dev/sda9", "/home"), "/home"),
        ("UUID=9 /data ext4 defaults 0 2\n", UNIT.format("/data/opt", "/opt"), "/opt"),
        # of the root itself, of RAM, elsewhere
        ("UUID=9 /data ext4 defaults 0 2\n/srv/home /home none bind 0 0\n", "", ""),
        ("tmpfs /data tmpfs defaults 0 0\n/data/home /home none bind 0 0\n", "", ""),
        ("UUID=9 /data ext4 defaults 0 2\n/data/x /mnt/x none bind 0 0\n", "", ""),
        ("", UNIT.format("/dev/sda9", "/data"), ""),
    ],
)
def test_a_system_directory_that_is_bound_from_another_volume_or_a_units_is_refused(
    shell: Shell, tmp_path: Path, fstab: str, unit: str, refused: str
) -> None:
    root = a_root(tmp_path)
    (root / "etc/fstab").write_text(f"/dev/mapper/qubes_dom0-root / ext4 defaults 1 1\n{fstab}")
    (root / "etc/systemd/system/own.mount").write_text(unit)
    done = shell('root_check "$P/root" || printf "%s" "$reason"')
    said = f"{refused} is on a volume of its own, which a RAM session would go on writing"
    assert (done.stdout, done.stderr) == (said if refused else "", "")


@pytest.mark.parametrize(
    ("links", "refused"),
    [
        ({"home": "/data/home"}, "/home leads to /data/home"),
        ({"home": "data/home"}, "/home leads to /data/home"),
        ({"var/log": "../data/log"}, "/var/log leads to /data/log"),
        ({"more": "/data", "home": "more/../more/./home"}, "/home leads to /data/home"),
        ({"more": "data/one", "opt": "/srv/opt", "srv/opt": "/more"}, "/opt leads to /data/one"),
        ({"home": "/data"}, "/home leads to /data"),
        # of the root itself, of /boot, to nowhere, in a circle
        ({"home": "/srv/home", "bin": "usr/bin", "opt": "/data2"}, ""),
        ({"etc/grub2.cfg": "../boot/grub2/grub.cfg"}, ""),
        ({"home": "/none/home", "srv": "srv"}, ""),
        # a file that a program brings
        ({"bin": "usr/bin", "usr/bin/tool": "/data/tool"}, ""),
    ],
)
def test_a_system_directory_that_is_a_link_to_another_volume_is_refused(
    shell: Shell, tmp_path: Path, links: dict[str, str], refused: str
) -> None:
    root = a_root(tmp_path)
    (root / "etc/fstab").write_text("UUID=8 /boot ext4 defaults\nUUID=9 /data ext4 defaults\n")
    for link, target in links.items():
        (root / link).parent.mkdir(parents=True, exist_ok=True)
        (root / link).symlink_to(target)
    done = shell('root_check "$P/root" || printf "%s" "$reason"')
    said = f"{refused}, on a volume of its own, which a RAM session would go on writing"
    assert (done.stdout, done.stderr) == (said if refused else "", "")


# The disk is dm-0, the layer on it dm-9, and dm-10 a volume in the layer.
LAYERED = """
kernel_name() {
    case $1 in /dev/mapper/ramboot-layer) printf dm-9; return ;; esac
    readlink -f "$1" | sed 's|.*/||'
}
CONF_swap=$SWAP SOURCE_DISK=$P/dev/dm-0 ST_FSTYPE=btrfs ST_BACKEND=$BACKEND ROOT_KIND=$KIND
ROOT_SPEC=qubes_dom0/root
blkid() { printf '%s' "${UUID:-root}"; }
getarg() { printf UUID=root; }
"""


def devices(tmp_path: Path) -> None:
    links = {"root": "dm-0", "boot": "vda1", "swap": "vda3", "data": "sdb1", "in": "dm-10"}
    (tmp_path / "dev/disk/by-uuid").mkdir(parents=True)
    for uuid, name in links.items():
        (tmp_path / "dev" / name).touch()
        (tmp_path / "dev/disk/by-uuid" / uuid).symlink_to(f"../../{name}")
    (tmp_path / "sys/class/block/dm-10/slaves/dm-9").mkdir(parents=True)
    (tmp_path / "sys/class/block/dm-10/dm").mkdir()
    (tmp_path / "sys/class/block/dm-10/dm/uuid").write_text("LVM-1\n")


def rewritten(shell: Shell, tmp_path: Path, fstab: str, **names: str) -> list[str]:
    root = a_root(tmp_path)
    devices(tmp_path)
    (root / "etc/fstab").write_text(fstab)
    prepare = LAYERED + 'root_prepare "$P/root" && printf done || printf "%s" "$reason"'
    done = shell(prepare, **names)
    assert done.stdout == "done", done.stdout + done.stderr
    return [line for line in (root / "etc/fstab").read_text().splitlines() if line[0] != "#"]


def test_a_root_on_the_layer_itself_is_mounted_from_it_and_nothing_beside_it(
    shell: Shell, tmp_path: Path
) -> None:
    fstab = (
        "UUID=root / btrfs subvol=root,compress=zstd 0 1\n"
        "UUID=boot /boot ext4 defaults 1 2\n"
        "/dev/dm-0 /home btrfs subvol=home 0 0\n"
        "UUID=data /data ext4 defaults 0 2\n"
        "UUID=swap none swap defaults 0 0\n"
        "tmpfs /tmp tmpfs size=1G 0 0\n"
        "UUID=data /more ext4 defaults 0 2"
    )
    names = {"SWAP": "session", "BACKEND": "snapshot", "KIND": "device"}
    assert rewritten(shell, tmp_path, fstab, **names) == [
        "/dev/mapper/ramboot-layer / btrfs subvol=root,compress=zstd 0 0",
        "UUID=boot /boot ext4 defaults,ro,norecovery,noauto,nofail 1 0",
        "/dev/mapper/ramboot-layer /home btrfs subvol=home 0 0",
        "UUID=data /data ext4 defaults,nofail,noauto 0 0",
        "tmpfs /tmp tmpfs size=1G 0 0",
        "UUID=data /more ext4 defaults,nofail,noauto 0 0",
    ]


def test_with_lvm_on_the_layer_only_what_is_beside_it_stays_out(
    shell: Shell, tmp_path: Path
) -> None:
    fstab = (
        "/dev/mapper/qubes_dom0-root / btrfs subvol=root 0 1\n"
        "UUID=in /home btrfs subvol=home 0 0\n"
        "UUID=in /pool xfs defaults 0 2\n"
        "/dev/mapper/qubes_dom0-later /more xfs defaults 0 2\n"
        "/dev/qubes_dom0/later /again xfs defaults 0 2\n"
        "UUID=data /data ext4 defaults 0 2\n"
        # still closed, not plugged in, another group's
        "/dev/mapper/luks-2 /closed ext4 defaults 0 2\n"
        "UUID=later /later ext4 defaults 0 2\n"
        "/dev/mapper/qubes_dom0--2-data /other ext4 defaults 0 2\n"
        "/dev/mapper/qubes_dom0-swap none swap defaults 0 0\n"
        "UUID=swap none swap defaults 0 0\n"
    )
    names = {"SWAP": "keep", "BACKEND": "snapshot", "KIND": "lvm", "UUID": "in"}
    assert rewritten(shell, tmp_path, fstab, **names) == [
        "/dev/mapper/qubes_dom0-root / btrfs subvol=root 0 1",
        "UUID=in /home btrfs subvol=home,nofail 0 0",
        "UUID=in /pool xfs defaults,nofail 0 0",
        "/dev/mapper/qubes_dom0-later /more xfs defaults,nofail 0 0",
        "/dev/qubes_dom0/later /again xfs defaults,nofail 0 0",
        "UUID=data /data ext4 defaults,nofail,noauto 0 0",
        "/dev/mapper/luks-2 /closed ext4 defaults,nofail,noauto 0 0",
        "UUID=later /later ext4 defaults,nofail,noauto 0 0",
        "/dev/mapper/qubes_dom0--2-data /other ext4 defaults,nofail,noauto 0 0",
        "/dev/mapper/qubes_dom0-swap none swap defaults,nofail 0 0",
    ]


HIDDEN_FSTAB = """\
UUID=root / btrfs subvol=root 0 1
UUID=boot /boot ext4 noauto 1 2
LABEL=ESP /boot/efi vfat umask=0077 0 2
/dev/mapper/qubes_dom0-swap none swap defaults 0 0
UUID=in /in xfs defaults 0 2
PARTUUID=data /data ext4 defaults 0 2
/dev/sdb2 /own ext4 noauto 0 2
UUID=a*b /pattern ext4 defaults 0 2
tmpfs /tmp tmpfs size=1G 0 0
"""
BELOW = ["KERNEL vda3", "KERNEL vda"]
BOOT = ["ENV{ID_FS_UUID} boot", "ENV{ID_FS_LABEL} ESP"]
SWAP = ["SYMLINK mapper/qubes_dom0-swap"]
NO_MORE = ["ENV{ID_FS_UUID} in", "ENV{ID_PART_ENTRY_UUID} data"]


# of crypttab: encrypted swap, the root's own
CRYPT_SWAP = ["KERNEL sda9"]
CRYPT = ["ENV{ID_FS_UUID} 1", *CRYPT_SWAP]
VOLUME, MAPPING = "ENV{DM_NAME} qubes_dom0-root", "ENV{DM_NAME} luks-1"


@pytest.mark.parametrize(
    ("backend", "kind", "disk", "swap", "hidden"),
    [
        ("zram", "lvm", "attached", "session", [VOLUME, *BELOW, *BOOT, *SWAP, *CRYPT_SWAP]),
        ("zram", "lvm", "attached", "keep", [VOLUME, *BELOW, *BOOT]),
        ("tmpfs", "device", "attached", "off", [MAPPING, *BELOW, *BOOT, *SWAP, *CRYPT_SWAP]),
        (
            "image",
            "lvm",
            "readonly",
            "keep",
            [VOLUME, MAPPING, *BELOW, *BOOT, *SWAP, *NO_MORE, *CRYPT],
        ),
        ("zram", "lvm", "detached", "session", [VOLUME, *BELOW, *BOOT, *SWAP, *NO_MORE, *CRYPT]),
        # what lies on the layer is mounted, and has to be found by its links
        ("snapshot", "lvm", "attached", "session", [*BELOW, *BOOT, *SWAP, NO_MORE[1], *CRYPT]),
        ("snapshot", "lvm", "attached", "keep", [*BELOW, *BOOT, NO_MORE[1], *CRYPT]),
        (
            "snapshot",
            "device",
            "attached",
            "session",
            [MAPPING, *BELOW, *BOOT, *SWAP, NO_MORE[1], *CRYPT],
        ),
    ],
)
def test_what_nobody_uses_of_the_disk_is_hidden(
    shell: Shell, tmp_path: Path, backend: str, kind: str, disk: str, swap: str, hidden: list[str]
) -> None:
    root = a_root(tmp_path)
    devices(tmp_path)
    (root / "etc/fstab").write_text(HIDDEN_FSTAB)
    (tmp_path / "sys/class/block/dm-0/slaves/vda3").mkdir(parents=True)
    partition(tmp_path, "vda", "vda3")
    names = {"BACKEND": backend, "KIND": kind, "DISK": disk, "SWAP": swap, "UUID": "in"}
    lines, marks = hidden_by_udev(shell, tmp_path, **names)
    assert marks == hidden
    assert lines[0] == 'SUBSYSTEM!="block", GOTO="ramboot_hidden_end"'
    assert 'ENV{DM_UDEV_DISABLE_DISK_RULES_FLAG}="1", ENV{UDISKS_IGNORE}="1"' in lines[len(marks) :]
    # a volume group beside the root's is not activated on a disk that is to be pulled
    no_member = 'ENV{ID_FS_TYPE}=="LVM2_member", ENV{ID_FS_TYPE}=""'
    assert lines[-2:-1] == [no_member] or disk != "detached"
    assert (no_member in lines) == (disk == "detached")


def hidden_by_udev(shell: Shell, tmp_path: Path, **names: str) -> tuple[list[str], list[str]]:
    """The lines of the session's rules, and what they mark."""
    script = LAYERED + 'ST_DISK=$DISK; hidden_rules "$P/root" > "$RUN/hidden.rules" && hide_disk'
    done = shell(script, **names)
    assert (done.stdout, done.stderr) == ("", "")
    lines = (tmp_path / "run/udev/rules.d/63-ramboot-hidden.rules").read_text().splitlines()
    marks = [line for line in lines if line.endswith('", ENV{RAMBOOT_HIDDEN}="1"')]
    return lines, [mark.rpartition('", ENV')[0].replace('=="', " ") for mark in marks]


def test_swap_that_the_formula_took_out_of_use_is_hidden(shell: Shell, tmp_path: Path) -> None:
    root = a_root(tmp_path)
    devices(tmp_path)
    (root / "etc/crypttab").unlink()
    mark = yaml.safe_load((MODULE / "../../../defaults.yaml").read_text())["swap"]["mark"]
    (root / "etc/fstab").write_text(
        f"# was: {mark}/dev/sdz none swap\n{mark}UUID=swap none swap defaults 0 0\n"
    )
    units = root / "var/lib/ramboot/swap-units"
    units.mkdir(parents=True)
    (units / "own.swap").write_text("[Swap]\nWhat=/dev/sda8\n")
    (root / "usr/lib/systemd/system/more.swap").write_text("[Swap]\nWhat=PARTUUID=more\n")
    names = {"BACKEND": "zram", "KIND": "lvm", "DISK": "attached", "SWAP": "off"}
    assert hidden_by_udev(shell, tmp_path, **names)[1] == [
        VOLUME,
        "ENV{ID_FS_UUID} swap",
        "ENV{ID_PART_ENTRY_UUID} more",
        "KERNEL sda8",
    ]


def test_with_a_partition_on_another_disk_all_of_that_is_hidden(
    shell: Shell, tmp_path: Path
) -> None:
    """In a persistent boot it is mounted, and Qubes offers no disk of which that is so."""
    root = a_root(tmp_path)
    devices(tmp_path)
    (root / "etc/crypttab").write_text("data UUID=data none\n")
    (root / "etc/fstab").write_text("UUID=boot /boot ext4 defaults 0 2\n")
    partition(tmp_path, "sdc", "vda1")
    partition(tmp_path, "sdb", "sdb1")
    # what LVM has of it stays in use
    mapping(tmp_path, 11, "qubes_dom0-swap", "LVM-1", "vda9")
    partition(tmp_path, "sdd", "vda9")
    (tmp_path / "dev/disk/by-uuid/lv").symlink_to("../../dm-11")
    (tmp_path / "dev/dm-11").touch()
    with (root / "etc/fstab").open("a") as stream:
        stream.write("UUID=lv none swap defaults 0 0\n")
    (tmp_path / "sys/class/block/sdc").symlink_to(tmp_path / "sys/devices/sdc")
    (tmp_path / "sys/devices/sdc/dev").write_text("8:32\n")
    (tmp_path / "run/udev/data").mkdir(parents=True)
    (tmp_path / "run/udev/data/b8:32").write_text("E:ID_PART_TABLE_UUID=9f1c\n")
    names = {"BACKEND": "snapshot", "KIND": "lvm", "DISK": "attached", "SWAP": "session"}
    assert hidden_by_udev(shell, tmp_path, **names)[1] == [
        "ENV{ID_FS_UUID} boot",
        # not its other partitions, nor the next disk
        'ENV{DEVTYPE} disk", ENV{ID_PART_TABLE_UUID} 9f1c',
        "ENV{ID_FS_UUID} lv",
        "ENV{ID_FS_UUID} data",
        "KERNEL sdb",
    ]


def test_a_pulled_disk_takes_its_names_with_it(shell: Shell, tmp_path: Path) -> None:
    """The next disk gets them from the kernel, and it may be the stick to save something on."""
    root = a_root(tmp_path)
    devices(tmp_path)
    (root / "etc/crypttab").unlink()
    (root / "etc/fstab").write_text("")
    (tmp_path / "sys/class/block/dm-0/slaves/vda3").mkdir(parents=True)
    partition(tmp_path, "vda", "vda3")
    (tmp_path / "sys/devices/vda/vda3/dev").write_text("8:3\n")
    (tmp_path / "sys/class/block/vda").symlink_to(tmp_path / "sys/devices/vda")
    (tmp_path / "sys/devices/vda/dev").write_text("8:0\n")
    data = tmp_path / "run/udev/data"
    data.mkdir(parents=True)
    for number in ("b8:0", "b8:3"):
        (data / number).write_text("E:ID_PART_TABLE_UUID=9f1c\n")
    names = {"BACKEND": "zram", "KIND": "lvm", "DISK": "detached", "SWAP": "session"}
    assert hidden_by_udev(shell, tmp_path, **names)[1] == [VOLUME, "ENV{ID_PART_TABLE_UUID} 9f1c"]


@pytest.mark.parametrize("luks", [True, False])
def test_a_detached_disk_is_hidden_by_a_name_that_stays_its_own(
    shell: Shell, tmp_path: Path, luks: bool
) -> None:
    a_root(tmp_path)
    devices(tmp_path)
    if not luks:
        (tmp_path / "sys/class/block/dm-0/dm/name").unlink()
    script = LAYERED + 'ST_DISK=detached; hidden_rules "$P/root"'
    done = shell(script, BACKEND="zram", KIND="device", SWAP="session")
    assert "luks-1" not in done.stdout
    assert ('KERNEL=="dm-0"' in done.stdout) == (not luks)


@pytest.mark.parametrize(("swap", "said"), [("session", "done"), ("keep", "with swap: keep this")])
def test_a_kernel_whose_tmpfs_can_be_swapped_takes_none_where_swap_is_kept(
    shell: Shell, tmp_path: Path, swap: str, said: str
) -> None:
    text = (MODULE / "ramboot-initramfs.sh").read_text()
    function = text[text.index("\nmount_noswap() {") : text.index("\n# --- phases that the hooks")]
    done = shell(
        # by its name the overlay's root is told from it
        "try() { case $* in *size=1m' tmpfs /x') ;; *) reason='mount failed'; return 1 ;; esac; }\n"
        f"CONF_swap={swap} ST_BACKEND=tmpfs\n{function}\n"
        'mount_noswap size=1m /x && printf "done%s" "$reason" || printf "%s" "$reason"'
    )
    assert done.stdout.startswith(said)
    # no reason is left where it goes on
    assert swap == "keep" or done.stdout == said


DISK_UNITS = {
    "data.mount": "[Mount]\nWhat=/dev/sda9\nWhere=/data\n",
    "dev-sda8.swap": "[Swap]\nWhat=/dev/sda8\n",
    "in.mount": "[Mount]\nWhat=UUID=in\nWhere=/in\n",
    "share.mount": "[Mount]\nWhat=server:/share\nWhere=/share\n",
    "file.swap": "[Swap]\nWhat=/file\n",
}


@pytest.mark.parametrize(
    ("backend", "disk", "opened", "masked"),
    [
        ("zram", "attached", ["swap", "other", "in", "file"], []),
        ("zram", "readonly", ["file"], ["data.mount", "dev-sda8.swap", "in.mount"]),
        ("tmpfs", "detached", ["file"], ["data.mount", "dev-sda8.swap", "in.mount"]),
        ("snapshot", "attached", ["in", "file"], ["data.mount", "dev-sda8.swap"]),
    ],
)
def test_nothing_is_opened_of_a_disk_that_must_not_be_written(
    shell: Shell, tmp_path: Path, backend: str, disk: str, opened: list[str], masked: list[str]
) -> None:
    root = a_root(tmp_path)
    devices(tmp_path)
    (root / "etc/crypttab").write_text(
        "luks-1 UUID=1 none\nswap /dev/sda9 /dev/urandom swap\nother UUID=data /key tmp=ext4\n"
        "in UUID=in /key\nfile /file /key"
    )
    units = root / "etc/systemd/system"
    for name, text in DISK_UNITS.items():
        (units / name).write_text(text)
    done = shell(
        LAYERED + 'ST_DISK=$DISK; root_prepare "$P/root" && printf done || printf "%s" "$reason"',
        SWAP="keep",
        BACKEND=backend,
        KIND="lvm",
        DISK=disk,
    )
    assert done.stdout == "done", done.stdout + done.stderr
    lines = (root / "etc/crypttab").read_text().splitlines()
    assert [line.split()[0] for line in lines if line[0] != "#"] == opened
    assert [name for name in DISK_UNITS if (units / name).is_symlink()] == masked


@pytest.mark.parametrize(
    ("backend", "spec", "refused"),
    [
        ("snapshot", "UUID=data", True),
        ("snapshot", "UUID=in", False),
        ("snapshot", "UUID=later", True),
        ("snapshot", "/dev/mapper/qubes_dom0-later", False),
        ("zram", "UUID=data", False),
    ],
)
def test_a_snapshot_without_the_qubes_is_refused(
    shell: Shell, tmp_path: Path, backend: str, spec: str, refused: bool
) -> None:
    root = a_root(tmp_path)
    devices(tmp_path)
    (root / "etc/fstab").write_text(f"{spec} /var/lib/qubes xfs defaults 0 2\n")
    done = shell(
        LAYERED + 'root_check "$P/root" && printf good || printf "%s" "$reason"',
        SWAP="session",
        BACKEND=backend,
        KIND="lvm",
    )
    said = (
        f"/var/lib/qubes is on {spec}, which is not seen to lie on ramboot's layer (a volume of LVM"
        " is, by its name): qubes would go on writing there"
    )
    assert done.stdout == (said if refused else "good")


# --- copies ----------------------------------------------------------------------------------

COPY = """
layer_healthy() { :; }
meminfo_bytes() { printf 9999999999; }
now_cs() { read -r up _ < /proc/uptime; printf '%s' "${up%.*}${up#*.}"; }
CONF_reserve_mib=1 CONF_copy_timeout_s=60 ST_DEVICE=source ST_BYTES=$(used_bytes "$RUN/source")
"""


ACL, CAPABILITY, COLOUR = "system.posix_acl_access", "security.capability", "user.colour"


def a_tree(tmp_path: Path) -> Path:
    source = tmp_path / "run/ramboot/source"
    (source / "dir with space/deep").mkdir(parents=True)
    (tmp_path / "run/ramboot/root/root").mkdir(parents=True)
    (source / "new\nline").write_text("x")
    os.link(source / "new\nline", source / "dir with space/hard")
    (source / "link").symlink_to("/nowhere")
    with (source / "sparse").open("wb") as stream:
        stream.truncate(50 << 20)
        stream.seek(10 << 20)
        stream.write(b"data")
    os.mkfifo(source / "fifo")
    os.setxattr(source / "sparse", COLOUR, b"blue")
    (source / "setuid").write_text("x")
    (source / "setuid").chmod(0o4755)
    os.utime(source / "setuid", ns=(1_000_000_001, 1_000_000_001))
    for number in range(40):
        (source / f"dir with space/deep/{number}").write_text("y" * number)
    os.utime(source / "dir with space", ns=(5, 5))
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\nprocessor : 1\n")
    return source


def test_what_is_left_out_is_looked_for_in_the_root_alone(shell: Shell, tmp_path: Path) -> None:
    source, outside = tmp_path / "run/ramboot/source", tmp_path / "outside"
    for directory in ("var/tmp/deep", "var/cache/dnf", "usr"):
        (source / directory).mkdir(parents=True)
    outside.mkdir()
    for file in (source / "var/tmp/deep/a", source / "var/cache/dnf/b", source / "usr/c"):
        file.touch()
    (outside / "kept").touch()
    # absolute, so of the initramfs; and one that stays inside
    (source / "var/out").symlink_to(outside)
    (source / "var/in").symlink_to("cache")
    patterns = ("/var/tmp/*", "/var/out/*", "/var/in/dnf/*", "/usr/../../../../outside/*", "/none*")
    config(tmp_path, *(f"exclude={pattern}" for pattern in patterns))
    done = shell('read_config && source_exclude && printf done || printf "%s" "$reason"')
    assert (done.stdout, done.stderr) == ("done", "")
    left = sorted(str(path.relative_to(source)) for path in source.rglob("*"))
    assert left == sorted(
        ["usr", "usr/c", "var", "var/cache", "var/cache/dnf", "var/in", "var/out", "var/tmp"]
    )
    assert (outside / "kept").exists()


MEASURE = """
ST_BACKEND=$BACKEND ST_FSTYPE=$FSTYPE
used_bytes() { printf %s "$DF"; }
du() { printf '%s\\t%s\\n' "$DU" "$3"; return "$RC"; }
measure && printf %s "$ST_BYTES" || printf %s "$reason"
"""


@pytest.mark.parametrize(
    ("backend", "fstype", "figures", "measured"),
    [
        # a copy has what its source has
        ("zram", "ext4", {"DF": "100", "DU": "300"}, "100"),
        # files that share blocks; and a file system's own, which du does not see
        ("zram", "xfs", {"DF": "100", "DU": "300"}, "300"),
        ("tmpfs", "xfs", {"DF": "300", "DU": "100"}, "300"),
        # other subvolumes do not count
        ("zram", "btrfs", {"DF": "900", "DU": "300"}, "300"),
        ("tmpfs", "btrfs", {"DF": "100", "DU": "300"}, "300"),
        # copies nothing
        ("snapshot", "xfs", {"DF": "100", "DU": "300"}, "100"),
        ("image", "btrfs", {"DF": "100", "DU": "300"}, "100"),
        # half a figure is none
        ("zram", "xfs", {"DF": "100", "DU": "50", "RC": "1"}, None),
        ("zram", "btrfs", {"DF": "100", "DU": "50", "RC": "1"}, None),
    ],
)
def test_of_shared_blocks_each_file_has_its_own_in_the_copy(
    shell: Shell, backend: str, fstype: str, figures: dict[str, str], measured: str | None
) -> None:
    done = shell(MEASURE, BACKEND=backend, FSTYPE=fstype, **{"RC": "0", **figures})
    assert done.stdout == (measured or "the size of the root file system could not be measured")


def test_what_a_tree_holds_is_what_it_has_allocated(shell: Shell, tmp_path: Path) -> None:
    source = a_tree(tmp_path)
    (source / "large").write_bytes(b"x" * (4 << 20))
    os.link(source / "large", source / "the same")
    done = shell('tree_bytes "$RUN/source"')
    assert 4 << 20 <= int(done.stdout) < 5 << 20


@pytest.mark.parametrize("shared_bytes", [1, 16 << 20])  # each directory apart, all in one tree
def test_a_file_copy_keeps_what_it_found(shell: Shell, tmp_path: Path, shared_bytes: int) -> None:
    source = a_tree(tmp_path)
    subprocess.run(["setfacl", "-m", "u:1:rx,d:g:2:w", source / "dir with space"], check=True)
    subprocess.run(["setfacl", "-m", "u:7:w", source / "new\nline"], check=True)
    kept = [("dir with space", "system.posix_acl_default"), ("new\nline", ACL), ("sparse", COLOUR)]
    if os.geteuid() == 0:
        os.mknod(source / "null", 0o020666, os.makedev(1, 3))
        os.chown(source / "fifo", 1234, 5678)
        # cap_net_raw=ep
        os.setxattr(
            source / "setuid", CAPABILITY, bytes.fromhex("01000002" + "00200000" + "00" * 12)
        )
        kept.append(("setuid", CAPABILITY))
    done = shell(
        f"{COPY} SHARED_BYTES={shared_bytes}\n"
        'build_files && prove_files && printf done || printf "%s" "$reason"'
    )
    assert done.stdout.endswith("done"), done.stdout + done.stderr
    copy = tmp_path / "run/ramboot/root/root"
    assert (copy / "new\nline").stat().st_ino == (copy / "dir with space/hard").stat().st_ino
    for name, attribute in kept:
        assert os.getxattr(copy / name, attribute) == os.getxattr(source / name, attribute)
    assert (copy / "sparse").stat().st_blocks <= (source / "sparse").stat().st_blocks + 256
    assert (copy / "setuid").stat().st_mode & 0o7777 == 0o4755


@pytest.mark.parametrize(
    "damage",
    [
        'printf z >> "$RUN/root/root/setuid"',
        'rm "$RUN/root/root/link"',
        'chmod 0700 "$RUN/root/root/dir with space"',
        'touch "$RUN/root/root/sparse"',
        'touch "$RUN/root/root/more"',
    ],
)
def test_a_copy_that_differs_is_not_proven(shell: Shell, tmp_path: Path, damage: str) -> None:
    a_tree(tmp_path)
    done = shell(f'{COPY} build_files; {damage}; prove_files || printf "/%s" "$reason"')
    assert "/the copy differs from its source" in done.stdout


@pytest.mark.parametrize("side", ["source", "root"])
def test_a_tree_that_could_not_be_listed_is_not_proven(shell: Shell, side: str) -> None:
    done = shell(
        "mkdir -p $RUN/work; layer_healthy() { :; }\n"
        f"tree_list() {{ printf same; case $1 in */{side}) return 1 ;; esac; }}\n"
        'prove_files && printf proven || printf "%s" "$reason"'
    )
    assert done.stdout == "source and copy could not be compared"


@pytest.mark.parametrize("tool", ["tar", "xargs"])
def test_an_unreadable_source_is_a_copy_error(shell: Shell, tmp_path: Path, tool: str) -> None:
    a_tree(tmp_path)
    script = COPY + (
        f'{tool}() {{ echo "Cannot read: Input/output error" >&2; return 2; }};'
        ' build_files || printf "/%s" "$reason"'
    )
    assert "/the copy failed: Cannot read: Input/output error" in shell(script).stdout


WATCHED = f"""{COPY}
rm -r "$P/proc"; ln -s /proc "$P/proc"
done_bytes() {{ printf %s "$DONE"; }}
WATCH_S=0.1
"""


def test_the_end_of_the_last_worker_is_seen_at_once(shell: Shell) -> None:
    # or it would look again in a thousand seconds
    done = shell(
        f"{WATCHED} WATCH_S=1000 DONE=1\n"
        "work sh -c :; work sh -c 'sleep 0.2; sleep 0.2'\n"
        "watch_copy 100 done_bytes && collect_workers && printf ended"
    )
    assert done.stdout == "ended", done.stderr


def test_a_worker_that_fails_at_last_fails_the_copy(shell: Shell) -> None:
    done = shell(
        f"{WATCHED} DONE=1 WATCH_S=1000\n"
        "work sh -c :; work sh -c 'exit 3'\n"
        'echo "tar: no" > "$RUN/work/err.1"\n'
        'watch_copy 100 done_bytes && collect_workers || printf "%s" "$reason"'
    )
    assert done.stdout == "the copy failed: tar: no"


def test_a_worker_that_fails_ends_the_copy(shell: Shell) -> None:
    done = shell(
        f"{WATCHED} DONE=1\n"
        # the others hold stdout, for whose end the test waits
        "work sh -c 'sleep 1000; :'; work sh -c 'exit 3'\n"
        'echo "tar: no" > "$RUN/work/err.1"\n'
        'watch_copy 100 done_bytes && collect_workers || printf "%s" "$reason"'
    )
    assert done.stdout == "the copy failed: tar: no"


def test_of_stopped_workers_nothing_runs_on(shell: Shell) -> None:
    """Not even what they start at that moment, as they do for piece after piece."""
    done = shell(
        f"{WATCHED}\n"
        'told="$RUN/work/told"; : > "$told"; export told\n'
        "copies() { while :; do sh -c 'sleep 0.02; echo read >> \"$told\"'; done; }\n"
        # no limit of time ends a wait
        "now_cs() { printf 0; }\n"
        "for i in 1 2 3 4 5; do\n"
        '    before=$(wc -l < "$told"); work copies; work copies\n'
        '    until [ "$(wc -l < "$told")" -gt "$before" ]; do sleep 0.01; done\n'
        "    stop_workers\n"
        '    before=$(wc -l < "$told"); sleep 0.3\n'
        '    [ "$(wc -l < "$told")" = "$before" ] && printf $i || printf "?"\n'
        "done\n"
        # there was something to stop
        '[ "$before" -ge 1 ] && printf " reads"'
    )
    assert done.stdout == "12345 reads", done.stderr


def test_a_worker_that_stops_late_has_not_started_its_last_unseen(shell: Shell) -> None:
    """As in the midst of a fork, which ends before the stop that was asked for takes effect."""
    done = shell(
        f"{WATCHED}\n"
        'told="$RUN/work/told"; : > "$told"; export told\n'
        "copies() { while :; do sh -c 'sleep 0.05; echo read >> \"$told\"'; done; }\n"
        "now_cs() { printf 0; }\n"
        "kill() {\n"
        '    case "$1" in\n'
        '        -STOP) (sleep 0.2; command kill "$@") 9>&- & ;;\n'
        '        *) command kill "$@" ;;\n'
        "    esac\n"
        "}\n"
        "for i in 1 2 3; do\n"
        '    before=$(wc -l < "$told"); work copies\n'
        '    until [ "$(wc -l < "$told")" -gt "$before" ]; do sleep 0.01; done\n'
        "    stop_workers\n"
        '    before=$(wc -l < "$told"); sleep 0.3\n'
        '    [ "$(wc -l < "$told")" = "$before" ] && printf $i || printf "?"\n'
        "done"
    )
    assert done.stdout == "123", done.stderr
    assert "/stat" not in done.stderr, "the console is for the user"


def test_a_build_that_was_killed_leaves_no_worker_behind(shell: Shell) -> None:
    text = (MODULE / "ramboot-initramfs.sh").read_text()
    take_back = text[text.index("\ntake_back() {") : text.index("\n# volumes_back:")]
    done = shell(
        f"{WATCHED}{take_back}\n"
        'told="$RUN/work/told"; : > "$told"; export told\n'
        "copies() { while :; do sh -c 'sleep 0.02; echo read >> \"$told\"'; done; }\n"
        'give_back_sysroot() { cp "$told" "$P/told"; sleep 0.3; cmp "$told" "$P/told"; }\n'
        "umount_below() { :; }; zram_drop() { :; }; seal_down() { :; }\n"
        "(work copies; work copies; watch_copy 100 done_bytes) & build=$!\n"
        'until [ -s "$told" ]; do sleep 0.01; done\n'
        "kill -KILL $build; wait $build 2> /dev/null\n"
        'take_back && printf "back "; cat "$RUN/workers" 2> /dev/null || printf forgotten'
    )
    assert done.stdout == "back forgotten", done.stderr


def test_what_ends_late_of_stopped_workers_is_waited_for(shell: Shell) -> None:
    """As a read that has begun, of which the kernel lets nobody go before it has ended."""
    done = shell(
        f"{WATCHED}\n"
        "kill() {\n"
        '    case "$1 $WORKERS " in\n'
        '        *" $2 "* | -STOP*) command kill "$@" ;;\n'
        '        *) (sleep 0.5; command kill "$@") 9>&- & ;;\n'
        "    esac\n"
        "}\n"
        'begun="$RUN/work/begun"; export begun; now_cs() { printf 0; }\n'
        "work sh -c 'sleep 1000 & : > \"$begun\"; wait'\n"
        'until [ -e "$begun" ]; do sleep 0.01; done; stop_workers\n'
        'for pid in $KILLED; do runs "$pid" && printf "runs " || printf "ended "; done'
    )
    # the worker, its shell and what that waits for
    assert done.stdout == "ended ended ended ", done.stderr


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("STALL_S=-1", "the copy stood still for -1 s after 0 MiB"),
        (
            "CONF_copy_timeout_s=-1 STALL_S=1000",
            "the copy did not end within -1 s",
        ),
        (
            "meminfo_bytes() { printf 1048575; }",
            "RAM ran out while copying: only 0 MiB available after 0 MiB, the reserve is 1 MiB",
        ),
    ],
)
def test_a_copy_that_gets_nowhere_is_ended(shell: Shell, trouble: str, reason: str) -> None:
    done = shell(
        f"{WATCHED} {trouble}\nDONE=0\n"
        # what it started holds the pipe as well, and stdout, for whose end the test waits
        "work sh -c 'sleep 1000; :'\n"
        'watch_copy 100 done_bytes || printf "%s%s" "$reason" "$WORKERS"'
    )
    assert done.stdout == reason


def test_an_error_of_dd_is_the_reason_and_not_its_figures(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "run/ramboot/work/list.0").write_text("0 4096\n")
    done = shell(
        "dd() { command dd if=/dev/zero of=/dev/full count=1; }\n"
        'copy_piece_list "$RUN/work/list.0"; copy_error; printf "%s" "$reason"\n'
    )
    assert done.stdout == ("the copy failed: dd: writing to '/dev/full': No space left on device")


def test_what_was_wrong_with_a_file_is_told_whatever_its_path(shell: Shell, tmp_path: Path) -> None:
    said = f"cp: error reading './usr/lib/{'directory/' * 10}file': Input/output error"
    (tmp_path / "run/ramboot/work/err.cp").write_text(f"{said}\ncp: more\n")
    assert shell('copy_error; printf "%s" "$reason"').stdout == f"the copy failed: {said}"


def test_a_block_copy_is_the_same_file_system(shell: Shell, tmp_path: Path) -> None:
    a_tree(tmp_path)
    image = tmp_path / "source.img"
    with image.open("wb") as stream:
        stream.truncate(96 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-d", tmp_path / "etc", image], check=True)
    with (tmp_path / "copy.img").open("wb") as stream:
        stream.truncate(96 << 20)
    (tmp_path / "dev/zram7").symlink_to(tmp_path / "copy.img")
    script = COPY + (
        f"SOURCE_ROOT={image} ROOT_ZRAM=7\n"
        'plan_blocks || printf "%s" "$reason"\n'
        'mv "$RUN/work/pieces" "$RUN/work/list.0"\n'
        'copy_piece_list "$RUN/work/list.0"\n'
    )
    done = shell(script)
    assert done.stdout == "", done.stdout + done.stderr
    pieces = (tmp_path / "run/ramboot/work/list.0").read_text().split("\n")[:-1]
    assert sum(int(piece.split()[1]) for piece in pieces) < 96 << 20
    subprocess.run(["e2fsck", "-fn", tmp_path / "copy.img"], check=True, capture_output=True)
    heads = [
        subprocess.run(["dumpe2fs", "-h", path], capture_output=True, check=True).stdout
        for path in (image, tmp_path / "copy.img")
    ]
    assert heads[0] == heads[1]


# The piece with that percentage of what is copied can't be read: the memory of a process is such.
BROKEN = """
PIECE_BYTES=4194304 SOURCE_ROOT=$P/source.img ROOT_ZRAM=7 WORKERS=
dd() {
    for word; do
        case $word in skip=*) at=${word#skip=} ;; count=*) length=${word#count=} ;; esac
    done
    [ "$at" != "$(awk -v at="$AT" '{ start[NR] = $1; sum += $2; end[NR] = sum }
        END {
            for (i = 1; i <= NR && end[i] < sum * at / 100; i++);
            print start[i]
        }' "$RUN/work/pieces")" ] \\
        || { command dd if=/proc/self/mem of=/dev/null count=1; return; }
    command dd if="$SOURCE_ROOT" of="$P/copy.img" bs=1M iflag=skip_bytes,count_bytes \\
        oflag=seek_bytes conv=notrunc skip="$at" seek="$at" count="$length"
}
build_blocks && printf copied || printf '%s' "$reason"
printf '|%s' "$WORKERS" $(jobs -p)
"""


@pytest.mark.parametrize("at", [10, 50, 99, 101])
def test_a_block_copy_ends_at_a_read_error_wherever_it_is(
    shell: Shell, tmp_path: Path, at: int
) -> None:
    a_tree(tmp_path)
    (tmp_path / "etc/data").write_bytes(os.urandom(40 << 20))
    (tmp_path / "sys/block/zram7").mkdir(parents=True)
    (tmp_path / "sys/block/zram7/stat").write_text("0 0 0 0 0 0 0 0\n")
    for name in ("source.img", "copy.img"):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(96 << 20)
    image = tmp_path / "source.img"
    subprocess.run(["mkfs.ext4", "-q", "-d", tmp_path / "etc", image], check=True)
    done = shell(COPY + BROKEN, AT=str(at))
    error = "the copy failed: dd: error reading '/proc/self/mem': Input/output error"
    # nobody goes on reading
    assert done.stdout == (f"{error}|" if at <= 100 else "copied|"), done.stdout + done.stderr


# e2fsprogs 1.47
EXTENTS = """\
Filesystem type is: ef53
File size of system.journal is 8388608 (8388608 blocks of 1 bytes)
 ext:     logical_offset:        physical_offset: length:   expected: flags:
   0:        0..    4095:  568328192.. 568332287:   4096:
   1:     4096.. 2125823:   35815424..  37937151: 2121728:  568332288:
   2:  2125824.. 2129919:   37937152..  37941247:   4096:             unwritten
   3:  2129920.. 8388607:   37941248..  44199935: 6258688:  37941247: last,unwritten,eof
system.journal: 2 extents found
"""


def test_what_a_journal_allocated_ahead_leaves_the_copy(shell: Shell, tmp_path: Path) -> None:
    journal = tmp_path / "run/ramboot/root/root/var/log/journal/1/system.journal"
    journal.parent.mkdir(parents=True)
    journal.touch()
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "filefrag").write_text(f"#!/bin/sh\ncat <<'END'\n{EXTENTS}END\n")
    (tools / "fallocate").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/punched\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    done = shell("drop_unwritten", PATH=f"{tools}:{os.environ['PATH']}")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "punched").read_text().splitlines() == [
        f"-p -o 2125824 -l 4096 {journal}",
        f"-p -o 2129920 -l 6258688 {journal}",
    ]


@pytest.mark.parametrize("short", [0, 1])
@pytest.mark.parametrize(
    ("backend", "root_mib"),
    # of 1000 MiB, in a zram device or a store of 4096 MiB
    [("zram", 680 + 16), ("tmpfs", 1040 + 16), ("snapshot", 16), ("overlay", 0)],
)
def test_ram_that_is_one_page_short_is_refused(
    shell: Shell, tmp_path: Path, backend: str, root_mib: int, short: int
) -> None:
    config(tmp_path, reserve_mib="1000", headroom_mib="500")
    needed_kib = (root_mib + 1500) << 10
    (tmp_path / "proc/meminfo").write_text(f"MemAvailable: {needed_kib - 4 * short} kB\n")
    done = shell(
        "read_config; say() { :; }\n"
        f"ST_BACKEND={backend} ST_BYTES=1048576000 ROOT_SIZE=4294967296 ALGORITHM=lz4\n"
        'budget && printf "fits, %s" "$ST_LIMIT" || printf "%s" "$reason"'
    )
    if short:
        assert done.stdout.startswith(f"not enough RAM for {backend}: "), done.stdout
        assert "1000 MiB reserve, 500 MiB headroom" in done.stdout
    else:
        assert done.stdout == f"fits, {(root_mib + 500) << 20}"


def test_an_overlay_that_is_made_later_has_its_reserve_too(shell: Shell, tmp_path: Path) -> None:
    """pre-mount is another process than the one that read the configuration."""
    config(tmp_path, reserve_mib="1000", headroom_mib="500")
    (tmp_path / "proc/meminfo").write_text(f"MemAvailable: {1499 << 10} kB\n")
    text = (MODULE / "ramboot-initramfs.sh").read_text()
    state = text[text.index("\nSTATE=") : text.index("\n# rescan:")]
    shell(f"{state}\nread_config; ST_BACKEND=overlay; save_state")
    done = shell(f'{state}\nload_state; ST_BYTES=0; budget || printf "%s" "$reason"')
    assert done.stdout.startswith("not enough RAM for overlay: 1.4 GiB needed"), done.stdout


# --- snapshot and overlay -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pools", "chunk"),
    [("", 128), ("  128\n", 128), ("  128\n  512\n", 512), ("  384\n", 512), ("nonsense", 128)],
)
def test_a_chunk_of_the_layer_holds_one_of_each_thin_pool(
    shell: Shell, tmp_path: Path, pools: str, chunk: int
) -> None:
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 4194304 kB\n")
    config(tmp_path)
    done = shell(
        f"blockdev() {{ printf 1000000000000; }}\nlvm() {{ printf '{pools}'; }}\n"
        'timeout() { shift 3; "$@"; }\n'
        "read_config; ROOT_KIND=lvm ROOT_SPEC=vg/root\n"
        'snapshot_plan && echo "$LAYER_CHUNK $LAYER_STORE_MIB"'
    )
    # eight times what is above the reserve of 1 GiB
    assert done.stdout.split() == [str(chunk), str(8 * 3072)]


def test_the_store_is_not_larger_than_the_disk(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 4194304 kB\n")
    config(tmp_path)
    done = shell(
        "blockdev() { printf 6442450944; }\ntimeout() { :; }\n"
        "read_config; ROOT_KIND=lvm ROOT_SPEC=vg/root\n"
        'snapshot_plan && echo "$LAYER_STORE_MIB"'
    )
    assert done.stdout.strip() == str(6144 + 1)


def test_a_root_on_the_disk_itself_asks_no_lvm_for_the_chunk(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 4194304 kB\n")
    config(tmp_path)
    plan = (
        "blockdev() { printf 6442450944; }\nlvm() { touch $P/asked; printf 512; }\n"
        'getargs() { printf \'%s\' "$VOLUMES"; }\ntimeout() { shift 3; "$@"; }\n'
        "read_config; ROOT_KIND=device ROOT_SPEC=UUID=1\n"
        'snapshot_plan && echo "$LAYER_CHUNK" || printf "%s" "$reason"'
    )
    assert shell(plan, VOLUMES="").stdout.strip() == "128"
    assert not (tmp_path / "asked").exists()
    # which would be activated from the disk
    assert shell(plan, VOLUMES="vg/swap").stdout.startswith("the kernel line asks for LVM volumes")


def test_a_disk_has_a_name_of_its_own(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "dev/disk/by-uuid").mkdir(parents=True)
    for uuid, name in (("1", "vda2"), ("2", "dm-0")):
        (tmp_path / "dev" / name).touch()
        (tmp_path / "dev/disk/by-uuid" / uuid).symlink_to(f"../../{name}")
    (tmp_path / "sys/class/block/dm-0/dm").mkdir(parents=True)
    (tmp_path / "sys/class/block/dm-0/dm/name").write_text("luks-1\n")
    done = shell('for i in 1 2; do own_name "$P/dev/disk/by-uuid/$i"; echo; done')
    assert done.stdout.split() == ["/dev/vda2", "/dev/mapper/luks-1"]


@pytest.mark.parametrize(
    ("leads", "root", "said"),
    [
        ("dm-9", "UUID=root", "good"),
        ("dm-0", "UUID=root", "/root does not lead to ramboot's layer"),
        ("dm-9", "PARTUUID=1", "root=PARTUUID=1 can't be found on ramboot's layer"),
    ],
)
def test_the_links_lead_to_the_layer_and_udev_leaves_the_disk_alone(
    shell: Shell, tmp_path: Path, leads: str, root: str, said: str
) -> None:
    devices(tmp_path)
    (tmp_path / "dev/dm-9").touch()
    link = tmp_path / "dev/disk/by-uuid/root"
    link.unlink()
    link.symlink_to(f"../../{leads}")
    names = {"SWAP": "session", "BACKEND": "snapshot", "KIND": "device"}
    done = shell(
        LAYERED + 'udevadm() { echo "$*" >> "$P/udev"; }\nROOT_SPEC=$ROOT\n'
        'layer_takes_links && printf good || printf "%s" "$reason"',
        ROOT=root,
        **names,
    )
    assert said in done.stdout, done.stdout + done.stderr
    flags = (
        'SUBSYSTEM=="block", KERNEL=="dm-0", ENV{DM_UDEV_DISABLE_DISK_RULES_FLAG}="1",'
        ' ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}="1"'
    )
    files = [tmp_path / f"run/udev/rules.d/{number}-ramboot-layer.rules" for number in (11, 59)]
    assert [file.read_text() for file in files] == [f'{flags}, ENV{{ID_FS_USAGE}}="other"\n'] * 2
    assert (tmp_path / "udev").read_text().startswith("control --reload\n")
    shell(LAYERED + "udevadm() { :; }\nlayer_gives_back", **names)
    # udev would keep them
    assert [file.read_text() for file in files] == [flags.replace('"1"', '""') + "\n"] * 2


def test_the_systems_lvm_must_see_nothing_where_the_root_is_on_none(shell: Shell) -> None:
    ask = (
        "try() { :; }\numount() { :; }\ntimeout() { printf '%s' \"$SEEN\"; }\n"
        "lvm_sees_alone /new '' && printf alone || printf '%s' \"$reason\""
    )
    assert shell(ask, SEEN="").stdout == "alone"
    assert shell(ask, SEEN="  /dev/vda3\n").stdout.endswith("than ramboot's: /dev/vda3")


DIRTY = "the disk was not left in good order, and its journal would have to be replayed"


def superblock(path: Path, devices: int, log: int) -> None:
    """What is asked of the one of a btrfs."""
    data = bytearray(128 << 10)
    struct.pack_into("<Q", data, (64 << 10) + 136, devices)
    struct.pack_into("<Q", data, (64 << 10) + 96, log)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("devices", "log", "said"),
    [
        (1, 0, "ro,rescue=nologreplay,subvol=root"),
        (2, 0, "the btrfs on disk has more devices than this one"),
        (0x30303030303031, 0, "the btrfs on disk has more devices than this one"),
        (1, 0x3030303030303030, DIRTY),
        (1, 4 << 20, DIRTY),
    ],
)
def test_an_overlay_over_btrfs(
    shell: Shell, tmp_path: Path, devices: int, log: int, said: str
) -> None:
    superblock(tmp_path / "disk", devices, log)
    done = shell(
        "getarg() { printf compress=zstd,subvol=root; }\nST_DEVICE=disk SOURCE_ROOT=$P/disk\n"
        'overlay_btrfs && printf "%s" "$LOWER_OPTIONS" || printf "%s" "$reason"'
    )
    assert done.stdout.startswith(said), done.stdout + done.stderr


@pytest.mark.parametrize(("mounts", "said"), [(0, "ro,norecovery"), (32, DIRTY)])
def test_an_overlay_over_xfs(shell: Shell, tmp_path: Path, mounts: int, said: str) -> None:
    done = shell(
        "modprobe() { :; }\n"
        'losetup() { echo "$*" >> "$P/asked"; [ "$1" = -d ] || printf loop7; }\n'
        'timeout() { shift 3; echo "$*" >> "$P/asked"; [ "$1" != mount ] || return $MOUNTS; }\n'
        "SOURCE_ROOT=/dev/root\n"
        'overlay_xfs && printf "%s" "$LOWER_OPTIONS" || printf "%s" "$reason"',
        MOUNTS=str(mounts),
    )
    assert done.stdout.startswith(said), done.stdout + done.stderr
    root = tmp_path / "run/ramboot/root/root"
    asked = ["--read-only --find --show /dev/root", f"mount -t xfs -o ro loop7 {root}", "-d loop7"]
    assert (tmp_path / "asked").read_text().splitlines() == [
        *asked,
        *([] if mounts else [f"umount {root}"]),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "ro,noload"),
        ("feature needs_recovery", DIRTY),
        ("set_super_value state 0", "the file system on the disk needs a check"),
        ("set_super_value state 3", "the file system on the disk needs a check"),
        # a mount removes them from the disk, read-only or not
        ("set_super_value last_orphan 12", "the file system on the disk needs a check"),
        ("feature orphan_present", "the file system on the disk needs a check"),
    ],
)
def test_an_overlay_over_ext4(shell: Shell, tmp_path: Path, change: str | None, said: str) -> None:
    an_ext4(tmp_path / "source.img", change)
    done = shell(
        "SOURCE_ROOT=$P/source.img\n"
        'overlay_ext4 && printf "%s" "$LOWER_OPTIONS" || printf "%s" "$reason"'
    )
    assert done.stdout.startswith(said), done.stdout + done.stderr


@pytest.mark.parametrize(
    "change",
    [
        None,
        "feature ^has_journal",
        "set_super_value journal_dev 0x0801",
        "set_super_value journal_uuid random",
    ],
)
def test_a_journal_on_another_device_is_refused(
    shell: Shell, tmp_path: Path, change: str | None
) -> None:
    an_ext4(tmp_path / "source.img", change)
    done = shell('ST_DEVICE=/dev/root; journal_inside "$P/source.img" || printf "%s" "$reason"')
    elsewhere = change is not None and "journal_" in change.removeprefix("feature ^has_")
    said = "the journal of the file system on /dev/root is on another device"
    assert (done.stdout, done.stderr) == (said if elsewhere else "", "")


def an_ext4(image: Path, change: str | None) -> None:
    """An empty file system, changed by debugfs."""
    with image.open("wb") as stream:
        stream.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    if change:
        subprocess.run(["debugfs", "-w", "-R", change, image], check=True, capture_output=True)


def test_an_overlay_of_several_subvolumes_is_refused(shell: Shell, tmp_path: Path) -> None:
    root = a_root(tmp_path)
    fstab = root / "etc/fstab"
    ask = LAYERED + 'overlay_is_whole "$P/root" && printf whole || printf "%s" "$reason"'
    names = {"SWAP": "session", "BACKEND": "overlay", "KIND": "device"}
    fstab.write_text("UUID=root / btrfs subvol=root 0 0\nUUID=other /home btrfs defaults 0 0\n")
    assert shell(ask, **names).stdout == "whole"
    fstab.write_text("UUID=root / btrfs subvol=root 0 0\nUUID=root /home btrfs subvol=home 0 0\n")
    assert shell(ask, **names).stdout == (
        "the backend overlay needs all of the root in one btrfs subvolume, and /home is another"
    )


# --- the seal -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "said"),
    [
        ("exit 1", "sealed"),
        ("exit 0", "the seal of /dev/disk takes writes"),
        # dd, or timeout, was ended: the write may be under way
        ("kill -9 $$", "the seal of /dev/disk does not refuse a write at once"),
        ("exit 124", "the seal of /dev/disk does not refuse a write at once"),
    ],
)
def test_a_seal_that_takes_a_write_is_none(
    shell: Shell, tmp_path: Path, write: str, said: str
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "dd").write_text(
        f'#!/bin/sh\ncase "$*" in *of=/dev/mapper/*) {write} ;; esac\nexit 0\n'
    )
    (tools / "dd").chmod(0o755)
    done = shell(
        "SOURCE_DISK=/dev/disk\nseal_holds && printf sealed || printf '%s' \"$reason\"",
        PATH=f"{tools}:{os.environ['PATH']}",
    )
    assert done.stdout == said


def test_a_disk_that_can_not_be_read_through_the_seal_is_not_sealed(shell: Shell) -> None:
    done = shell("SOURCE_DISK=/dev/disk SEAL=none\nseal_holds || printf '%s' \"$reason\"")
    assert "dd failed" in done.stdout


def test_no_read_only_loop_device_is_said(shell: Shell, tmp_path: Path) -> None:
    done = shell(
        'blockdev() { printf 4096; }\nmodprobe() { :; }\ntimeout() { shift 3; "$@"; }\n'
        "losetup() { echo 'losetup: no free loop device' >&2; return 1; }\n"
        'SOURCE_DISK=/dev/disk\nseal_up "$P" || printf \'%s\' "$reason"; seal_down'
    )
    assert done.stdout == "the disk /dev/disk could not be sealed: no read-only loop device"
    assert not (tmp_path / "run/ramboot/seal-loop").exists()


@pytest.mark.parametrize(
    ("seen", "alone"),
    [
        ("/dev/mapper/ramboot-seal", True),
        ("", False),
        ("/dev/mapper/luks-1", False),
        ("/dev/mapper/ramboot-seal /dev/mapper/luks-1", False),
    ],
)
def test_the_systems_lvm_must_see_the_seal_alone(shell: Shell, seen: str, alone: bool) -> None:
    done = shell(
        "try() { :; }\numount() { :; }\n"
        f"timeout() {{ shift 3; [ \"$1 $2 $3\" = 'chroot /new lvm' ] && echo '  {seen}'; }}\n"
        'lvm_sees_alone /new "$SEAL" && printf alone || printf \'%s\' "$reason"'
    )
    expected = f"LVM of the system would use other devices than ramboot's: {seen}"
    assert done.stdout == ("alone" if alone else expected)


# --- which disk policy ----------------------------------------------------------------------------


def decide() -> str:
    """The functions that decide, from the program."""
    text = (MODULE / "ramboot-initramfs.sh").read_text()
    return text[text.index("\ndecide() {") : text.index("\nask_user() {")]


@pytest.mark.parametrize(
    ("backend", "disk", "root", "reason"),
    [
        ("zram", "readonly", "lvm", None),
        ("tmpfs", "readonly", "lvm", None),
        ("tmpfs", "detached", "device", None),
        ("image", "readonly", "lvm", None),
        ("image", "detached", "device", None),
        ("overlay", "attached", "device", None),
        ("snapshot", "attached", "device", None),
        ("zram", "readonly", "device", "ramboot.disk=readonly needs a root on LVM"),
        ("snapshot", "readonly", "lvm", "the backend snapshot needs the disk's volume group"),
        ("overlay", "readonly", "lvm", "the backend overlay needs the disk's volume group"),
        ("overlay", "detached", "lvm", "the backend overlay needs the disk: it can't be detached"),
        ("zram", "sealed", "lvm", "ramboot.disk=sealed is not known"),
    ],
)
@pytest.mark.parametrize("given", ["argument", "configuration"])
def test_disk_policies_and_what_contradicts_them(
    shell: Shell,
    tmp_path: Path,
    given: str,
    backend: str,
    disk: str,
    root: str,
    reason: str | None,
) -> None:
    if given == "argument":
        config(tmp_path)
        arguments = f"ramboot=) printf {backend} ;; ramboot.disk=) printf {disk} ;;"
    else:
        config(tmp_path, mode=backend, backend=backend, disk=disk)
        arguments = ""
        if disk == "sealed":
            reason = f"the configuration {tmp_path}/etc/ramboot/ramboot.conf has a line"
    done = shell(
        f"getarg() {{ case $1 in {arguments} *) return 1 ;; esac; }}\n"
        f"getargs() {{ :; }}\n{decide()}\nROOT_KIND={root}\n"
        'decide && printf "%s" "$ST_BACKEND $ST_DISK" || printf "%s" "$reason"'
    )
    assert done.stdout.startswith(reason or f"{backend} {disk}"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        ("ro ramboot.disc=detached quiet", "ramboot.disc=detached"),
        ("ramboot.disk=", "ramboot.disk="),
        ("ramboot.disk", "ramboot.disk"),
        ("ro ramboot", "ramboot"),
        ("ramboot= quiet", "ramboot="),
        ("ramboot=zram ramboot.timeout=", "ramboot.timeout="),
        (
            "ramboot=zram ramboot.disk=attached ramboot.timeout=0 rambootx=1 x=ramboot. root=/r",
            None,
        ),
        ("", None),
    ],
)
def test_a_mistyped_argument_is_not_passed_over(
    shell: Shell, tmp_path: Path, line: str, unknown: str | None
) -> None:
    config(tmp_path, mode="zram")
    done = shell(
        f"getarg() {{ return 1; }}\ngetargs() {{ :; }}\n{decide()}\nROOT_KIND=device\n"
        'decide && printf "%s" "$ST_BACKEND $ST_DISK" || printf "%s" "$reason"',
        CMDLINE=line,
    )
    expected = f"the kernel argument {unknown} is unknown or has no value"
    assert done.stdout.startswith(expected if unknown else "zram attached"), done.stdout


@pytest.mark.parametrize(
    ("backend", "root", "protected", "disk"),
    [
        ("zram", "lvm", "1", "readonly"),
        ("image", "lvm", "1", "readonly"),
        ("zram", "lvm", "0", "attached"),
        ("tmpfs", "device", "1", "attached"),
        ("snapshot", "lvm", "1", "attached"),
    ],
)
def test_a_write_protected_disk_is_sealed(
    shell: Shell, tmp_path: Path, backend: str, root: str, protected: str, disk: str
) -> None:
    config(tmp_path, mode=backend)
    done = shell(
        f"getarg() {{ return 1; }}\ngetargs() {{ :; }}\nblockdev() {{ printf {protected}; }}\n"
        f'{decide()}\nROOT_KIND={root}; decide; printf "%s|%s" "$ST_DISK" "$ST_NOTE"'
    )
    note = "the disk is write-protected: it is sealed (readonly)" if disk == "readonly" else ""
    assert done.stdout == f"{disk}|{note}"


@pytest.mark.parametrize("there", [False, True], ids=["to-come", "there"])
@pytest.mark.parametrize("argument", ["rd.lvm.lv=other/swap", "rd.lvm.vg=other"])
@pytest.mark.parametrize(
    ("backend", "disk", "root", "refused"),
    [
        ("snapshot", "attached", "lvm", True),
        ("zram", "readonly", "lvm", True),
        ("tmpfs", "detached", "lvm", True),
        ("zram", "attached", "lvm", False),
        ("overlay", "attached", "lvm", False),
        # closed at the very end, when nobody waits any more
        ("zram", "detached", "device", False),
    ],
)
def test_a_volume_that_would_never_come_is_not_waited_for(
    shell: Shell,
    tmp_path: Path,
    backend: str,
    disk: str,
    root: str,
    refused: bool,
    argument: str,
    there: bool,
) -> None:
    config(tmp_path)
    name, _, value = argument.partition("=")
    if there:
        (tmp_path / "dev" / value).mkdir(parents=True)
    done = shell(
        "getarg() { case $1 in ramboot=) printf $BACKEND ;; *.disk=) printf $DISK ;; esac; }\n"
        "getargs() { [ $1 != rd.lvm.lv ] || printf '%s\\n' vg/root vg/swap\n"
        f"    [ $1 != {name} ] || printf {value}; }}\n{decide()}\n"
        f'ROOT_KIND={root} ROOT_SPEC=vg/root; decide && printf go || printf "%s" "$reason"',
        BACKEND=backend,
        DISK=disk,
    )
    said = f"the kernel line asks for {value}, which is not in the root's volume group"
    assert done.stdout.startswith(said if refused and not there else "go"), done.stdout


@pytest.mark.parametrize("timeout", ["soon", "-1", "08", "1e9", "86401", "9" * 30, "$(reboot)"])
def test_a_timeout_that_is_none_ends_in_a_persistent_boot(
    shell: Shell, tmp_path: Path, timeout: str
) -> None:
    config(tmp_path)
    done = shell(
        f"getarg() {{ [ $1 != ramboot.timeout= ] || printf '%s' '{timeout}'; }}\n"
        f"getargs() {{ :; }}\n{decide()}\nask_user() {{ printf asked; }}\n"
        'decide && printf go || printf "%s" "$reason"'
    )
    assert done.stdout == f"ramboot.timeout={timeout} is not a number of seconds"
