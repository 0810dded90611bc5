# SPDX-License-Identifier: GPL-2.0-or-later
"""The watch of a RAM session, on its own /proc, /sys and /run, with stand-ins for the programs that
it starts, for the kernel's answer about the layer, and for qubesd.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from conftest import import_standin, populate

WATCH = Path(__file__).resolve().parents[2] / "ramboot" / "session" / "files" / "ramboot-watch"
UNIT, WANTED = "ramboot-watch.service", "50-ramboot.conf"
MIB = 1 << 20
GIB = 1 << 30


class Session:
    """A RAM session: what the watch sees, and what it did."""

    def __init__(self, root: Path, monkeypatch):
        loader = importlib.machinery.SourceFileLoader("ramboot_watch", str(WATCH))
        self.module = importlib.util.module_from_spec(
            importlib.util.spec_from_loader("ramboot_watch", loader)
        )
        # NamedTuple looks its module up there
        monkeypatch.setitem(sys.modules, "ramboot_watch", self.module)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        loader.exec_module(self.module)
        self.root, self.commands, self.now = root, [], 1000.0
        self.answers = {}
        self.size, self.used = 20 * GIB, 5 * GIB
        self.layer = "2048/2097152 16"
        monkeypatch.setattr(self.module, "PREFIX", str(root))
        monkeypatch.setattr(self.module, "layer_status", lambda: self.layer)
        monkeypatch.setattr(self.module, "run", self.run)
        monkeypatch.setattr(self.module, "start", self.start)
        monkeypatch.setattr(self.module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(self.module.os, "statvfs", self.statvfs)
        self.write("/dev/kmsg", "")
        self.write("/dev/console", "")
        self.write("/run/ramboot/layer-zram", "3")
        self.write("/proc/self/mountinfo", "25 1 253:5 / / rw - ext4 /dev/mapper/root rw\n")
        self.ram(4 * GIB)
        self.zram(3, 2 * MIB)

    def write(self, path: str, text: str) -> None:
        target = Path(f"{self.root}{path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def ram(self, available: int) -> None:
        self.write("/proc/meminfo", f"MemTotal: 9 kB\nMemAvailable: {available // 1024} kB\n")

    def zram(self, number: int, held: int) -> None:
        self.write(f"/sys/block/zram{number}/mm_stat", f"1 1 {held} 0 {held} 0 0 0 0\n")

    def store(self, percent: float) -> None:
        self.layer = f"{int(20971.52 * percent)}/2097152 16"

    def statvfs(self, _path):
        free = (self.size - self.used) // 4096
        return SimpleNamespace(f_blocks=self.size // 4096, f_bfree=free, f_frsize=4096)

    def run(self, command, timeout_s, **options):
        assert timeout_s > 0
        self.commands.append((command, options))
        for word, answer in self.answers.items():
            if word in command:
                return answer if isinstance(answer, tuple) else (answer, True)
        return "", True

    def start(self, command):
        self.commands.append((command, {}))
        return SimpleNamespace(poll=lambda: self.trim_ended)

    trim_ended = 0

    def did(self, word: str) -> list[list[str]]:
        return [command for command, _ in self.commands if word in command]

    @property
    def filled(self) -> dict:
        return json.loads((self.root / "run/ramboot/filled.json").read_text())


@pytest.fixture
def session(tmp_path, monkeypatch):
    return Session(tmp_path, monkeypatch)


@pytest.fixture
def watch(session):
    return session.module.Watch("snapshot", 600)


def told(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def loop(session, number: int, file: str) -> None:
    """A loop device over a file that is there."""
    session.write(file, "")
    session.write(f"/sys/block/loop{number}/loop/backing_file", f"{file}\n")


# How full


def test_of_a_snapshot_session_the_store_or_ram_is_fullest(session, watch):
    session.store(40)
    session.zram(3, 960 * MIB)
    session.ram((2048 + 256) * MIB)
    watch.look()
    assert session.filled == {
        "schema": 1,
        "percent": 39,
        "what": "store",
        "left_bytes": GIB - 838860 * 512,
        "warn_percent": [70, 85],
        "pause_percent": 95,
        "paused": [],
        "start_bytes": {},
        "lost": False,
    }
    # RAM is full long before a store that may be larger than RAM; 256 MiB are dom0's own
    session.ram((960 + 256) * MIB)
    watch.look()
    found = session.filled
    assert (found["percent"], found["what"], found["left_bytes"]) == (50, "RAM", 960 * MIB)


def test_ram_that_dom0_needs_to_go_on_is_not_left(session, watch):
    session.ram(200 * MIB)
    watch.look()
    assert (session.filled["percent"], session.filled["left_bytes"]) == (100, 0)


@pytest.mark.parametrize("backend", ["zram", "tmpfs"])
def test_of_a_copied_root_only_what_was_written_since_counts(session, backend):
    """Else a root that is three quarters full would be warned of at each boot."""
    session.write("/proc/self/mountinfo", "25 1 252:7 / / rw - ext4 /dev/zram7 rw\n")
    session.size, session.used = 8 * GIB, 6 * GIB
    session.zram(7, 3 * GIB)
    watch = session.module.Watch(backend, 600)
    watch.look()
    assert session.filled["percent"] == 0
    session.used = 7 * GIB
    watch.look()
    found = session.filled
    assert (found["percent"], found["what"]) == (50, "root file system")
    # a restart of the watch goes on from the same start
    session.module.Watch(backend, 600).look()
    assert session.filled["percent"] == 50
    assert session.filled["start_bytes"] == {
        "root": 6 * GIB,
        "RAM": 3 * GIB if backend == "zram" else 6 * GIB,
    }
    session.zram(7, 4 * GIB)
    session.ram((256 + 512) * MIB)
    watch.look()
    assert (session.filled["percent"], session.filled["what"]) == (66, "RAM")


def test_an_overlay_counts_from_nothing(session):
    session.size, session.used = 4 * GIB, 3 * GIB
    session.module.Watch("overlay", 600).look()
    assert (session.filled["percent"], session.filled["what"]) == (75, "root file system")


# What is said


@pytest.mark.parametrize(("percent", "priority"), [(70.1, 4), (85.1, 2)])
def test_a_level_is_told_once_everywhere(session, watch, capsys, percent, priority):
    session.write("/run/user/1000/bus", "")
    session.write("/run/user/0/bus", "")
    (session.root / "run/user/1001").mkdir()
    session.store(percent - 1)
    watch.look()
    before = told(capsys)
    session.store(percent)
    for _ in range(3):
        watch.look()
    (line,) = told(capsys)
    assert len(before) == (1 if percent > 80 else 0)
    text = line.removeprefix(f"<{priority}>")
    assert text.startswith(f"ramboot: {int(percent)} % of the store for this session is used, ")
    assert text.endswith("Delete files, shut down qubes, or end the session.")
    assert session.did("wall")[-1] == ["wall", text]
    notified = [
        item
        for item in session.commands
        if "notify-send" in item[0] and "Backend" not in item[0][-1]
    ]
    assert len(notified) == len(before) + 1, "root's bus is nobody's desktop"
    shown, options = notified[-1]
    assert shown[-1] == text
    assert f"--urgency={'normal' if priority == 4 else 'critical'}" in shown
    bus = f"unix:path={session.root}/run/user/1000/bus"
    assert options["env"]["DBUS_SESSION_BUS_ADDRESS"] == bus
    if os.geteuid() == 0:
        assert (options["user"], options["group"], options["extra_groups"]) == (1000, 1000, ())


@pytest.mark.parametrize(
    ("backend", "end"), [("snapshot", "the session is lost"), ("zram", "dom0 can write no more")]
)
def test_what_comes_at_the_end_is_told_of_the_backend(session, capsys, backend, end):
    session.module.Watch(backend, 600).say(session.module.Room("RAM", 9, 1), 85)
    (line,) = told(capsys)
    assert f"When it is full, {end}. " in line


def test_a_level_is_told_again_only_when_it_was_well_below(session, watch, capsys):
    for percent in (71, 68, 71, 66, 71):
        session.store(percent)
        watch.look()
    assert len(told(capsys)) == 1
    session.store(64)
    watch.look()
    session.store(71)
    watch.look()
    assert len(told(capsys)) == 1


def test_a_jump_over_two_levels_is_told_as_the_higher(session, watch, capsys):
    session.store(90)
    watch.look()
    (line,) = told(capsys)
    assert line.startswith("<2>ramboot: ")


def test_a_program_that_is_missing_or_hangs_does_not_end_the_watch(session, monkeypatch):
    fresh = importlib.util.spec_from_loader(
        "again", importlib.machinery.SourceFileLoader("again", str(WATCH))
    )
    module = importlib.util.module_from_spec(fresh)
    monkeypatch.setitem(sys.modules, "again", module)
    fresh.loader.exec_module(module)
    assert module.run(["/nonexistent"], 1) == ("", False)
    assert module.run(["sleep", "5"], 0.1) == ("", False)
    assert module.run(["false"], 60) == ("", False)
    assert module.run(["echo", "a"], 60) == ("a\n", True)
    # what was said before counts
    assert module.run(["sh", "-c", "echo a; exit 1"], 60) == ("a\n", False)
    # that long a loaded host may take to begin
    for limit in (0.5, 2, 8, 32):
        said = module.run(["sh", "-c", "echo a; exec sleep 99"], limit)
        if said != ("", False):
            break
    assert said == ("a\n", False)
    assert module.start(["/nonexistent"]) is None


@pytest.mark.parametrize("says", ["Invalid", "Overflow", ""])
def test_a_lost_store_is_told_once_past_the_journal(session, watch, capsys, says):
    session.store(50)
    watch.look()
    session.layer = says
    for _ in range(3):
        watch.look()
    (line,) = told(capsys)
    assert line.startswith("<0>ramboot: the store of this session is full and the session is lost")
    assert "power button" in line
    assert (session.root / "dev/kmsg").read_text() == f"{line}\n"
    assert line[3:] in (session.root / "dev/console").read_text()
    assert (session.filled["percent"], session.filled["lost"]) == (100, True)


# Trimming


def on_layer(session) -> None:
    """/ and one more lie on the layer through LUKS and LVM; /boot and a stick do not."""
    session.write(
        "/proc/self/mountinfo",
        "25 1 253:5 / / rw - ext4 /dev/mapper/root rw\n"
        "26 25 253:5 / /bind rw - ext4 /dev/mapper/root rw\n"
        "27 25 253:6 / /var/lib/qu\\040bes rw - ext4 /dev/mapper/q rw\n"
        "28 25 8:1 / /boot rw - ext4 /dev/sda1 rw\n"
        "29 25 0:5 / /dev rw - devtmpfs dev rw\n",
    )
    for number in (5, 6):
        session.write(
            f"/sys/dev/block/253:{number}/slaves/dm-4/slaves/dm-1/dm/name", "ramboot-layer\n"
        )
    session.write("/sys/dev/block/8:1/size", "1")


def trims(session) -> list[list[str]]:
    return [command[4:] for command, _ in session.commands if command[0] == "sh"]


def test_it_trims_every_ten_minutes_what_lies_on_the_layer_alone(session, watch):
    on_layer(session)
    watch.look()
    assert trims(session) == []
    session.now += 599
    watch.look()
    assert trims(session) == []
    session.now += 1
    watch.look()
    assert trims(session) == [["/", "/var/lib/qu bes"]]
    session.now += 599
    watch.look()
    assert len(trims(session)) == 1
    session.now += 1
    watch.look()
    assert len(trims(session)) == 2


def test_it_trims_a_btrfs_once_whatever_number_its_subvolumes_have(session, watch):
    for name in ("/dev/dm-1", "/dev/sdb"):
        session.write(name, "")
    Path(f"{session.root}/dev/mapper").mkdir()
    Path(f"{session.root}/dev/mapper/ramboot-layer").symlink_to("../dm-1")
    session.write(
        "/proc/self/mountinfo",
        "25 1 0:30 /root / rw - btrfs /dev/mapper/ramboot-layer rw\n"
        "26 25 0:31 /home /home rw - btrfs /dev/mapper/ramboot-layer rw\n"
        "27 25 0:32 / /data rw - btrfs /dev/sdb rw\n"
        "28 25 0:5 / /dev rw - devtmpfs dev rw\n",
    )
    session.write("/sys/class/block/dm-1/dm/name", "ramboot-layer\n")
    session.write("/sys/class/block/sdb/size", "1")
    session.now += 600
    watch.look()
    assert trims(session) == [["/"]]


def test_it_trims_at_each_level_and_never_twice_at_a_time(session, watch):
    on_layer(session)
    session.store(71)
    watch.look()
    assert len(trims(session)) == 1
    session.trim_ended = None
    session.store(86)
    watch.look()
    session.now += 1000
    watch.look()
    assert len(trims(session)) == 1
    session.trim_ended = 0
    watch.look()
    assert len(trims(session)) == 2


@pytest.mark.parametrize(("largest", "count"), [("0", 1), ("65536", 0)])
def test_a_layer_that_takes_no_discards_is_told_once(session, watch, capsys, largest, count):
    session.write("/sys/block/dm-1/dm/name", "ramboot-layer\n")
    session.write("/sys/block/dm-1/queue/discard_max_bytes", f"{largest}\n")
    watch.look()
    watch.look()
    lines = told(capsys)
    assert len(lines) == count
    assert all("opened without discard" in line for line in lines)


def test_other_backends_are_not_trimmed(session):
    on_layer(session)
    watch = session.module.Watch("zram", 0)
    session.write(
        "/proc/self/mountinfo",
        "25 1 252:3 / / rw - ext4 /dev/zram3 rw\n26 25 253:5 / /x rw - ext4 /dev/dm-5 rw\n",
    )
    session.now += 1
    watch.look()
    assert trims(session) == []


# Qubes


def test_at_95_percent_qubes_are_paused_and_go_on_below_85(session, watch, capsys):
    session.answers["--pause"] = "work vault\n"
    session.store(95.1)
    watch.look()
    first, second = told(capsys)
    assert first.startswith("<1>ramboot: 95 % of the store")
    assert second == "<1>ramboot: paused: work, vault. To go on: qvm-unpause NAME"
    assert session.filled["paused"] == ["work", "vault"]
    command = session.did("--pause")[0]
    assert command == [sys.executable, "-I", str(WATCH), "--pause"]

    # one that starts now is paused as well; one that its user let go on is not
    session.answers["--pause"] = "late\n"
    session.now += 9
    watch.look()
    assert len(session.did("--pause")) == 1
    session.now += 1
    watch.look()
    assert session.did("--pause")[1][4:] == ["vault", "work"]
    assert session.filled["paused"] == ["work", "vault", "late"]

    session.answers["--unpause"] = ("", False)  # qubesd does not answer
    session.store(86)
    session.now += 10
    watch.look()
    assert session.did("--unpause") == []
    capsys.readouterr()
    session.store(84)
    watch.look()
    assert session.did("--unpause")[0][4:] == ["work", "vault", "late"]
    assert session.filled["paused"] == ["work", "vault", "late"]
    session.answers["--unpause"] = "work late\n"
    session.now += 9
    watch.look()
    session.now += 1
    watch.look()
    assert len(session.did("--unpause")) == 2
    assert told(capsys) == ["<5>ramboot: there is room again, no longer paused: work, late"]
    assert session.filled["paused"] == []
    session.now += 10
    watch.look()
    assert len(session.did("--unpause")) == 2


def test_a_pause_that_failed_is_tried_again(session, watch):
    session.answers["--pause"] = ("", False)
    session.store(96)
    for _ in range(3):
        watch.look()
        session.now += 10
    assert len(session.did("--pause")) == 3
    assert session.filled["paused"] == []


def test_what_was_done_before_a_failure_counts(session, watch, capsys):
    session.answers["--pause"] = ("work vault\n", False)
    session.store(96)
    watch.look()
    assert told(capsys)[-1] == "<1>ramboot: paused: work, vault. To go on: qvm-unpause NAME"
    assert session.filled["paused"] == ["work", "vault"]
    session.answers["--unpause"] = ("work\n", False)
    session.store(50)
    session.now += 10
    watch.look()
    assert told(capsys) == ["<5>ramboot: there is room again, no longer paused: work"]
    assert session.filled["paused"] == ["vault"]
    # one that goes on through us may be paused again
    session.answers["--pause"] = ""
    session.store(96)
    session.now += 10
    watch.look()
    assert session.did("--pause")[-1][4:] == ["vault"]
    session.answers["--unpause"] = ("vault\n", False)
    session.store(50)
    session.now += 10
    watch.look()
    assert session.did("--unpause")[-1][4:] == ["vault"]
    assert session.filled["paused"] == []


def test_a_restarted_watch_knows_whom_it_paused(session, watch):
    session.answers["--pause"] = "work\n"
    session.store(96)
    watch.look()
    again = session.module.Watch("snapshot", 600)
    session.store(50)
    again.look()
    assert session.did("--unpause")[0][4:] == ["work"]


@pytest.fixture
def qubes(session, tmp_path, monkeypatch):
    world = import_standin(monkeypatch).WORLD
    populate(world, tmp_path)
    app = sys.modules["qubesadmin"].Qubes()
    for name in ("work", "vault", "halted", "sys-usb"):
        app.add_new_vm("AppVM", name, "blue", template="debian-12-xfce")
    for name in ("work", "vault", "sys-usb"):
        world.run(name)
    world.qubes["sys-usb"]["pci"]["00_14.0"] = {}
    world.calls.clear()
    return world


def paused(world) -> list[str]:
    return sorted(name for name, qube in world.qubes.items() if qube.get("paused"))


@pytest.mark.parametrize("release", ["4.2", "4.3"])
def test_running_qubes_are_paused_but_those_with_a_keyboard_or_told_apart(session, qubes, release):
    qubes.release = release
    assert list(session.module.pause({"vault"})) == ["work"]
    assert paused(qubes) == ["work"]
    # paused ones are not running
    assert list(session.module.pause(set())) == ["vault"]
    assert paused(qubes) == ["vault", "work"]


def test_one_qube_that_cant_be_paused_does_not_keep_the_others_from_it(session, qubes, capsys):
    def fault(method, subject):
        if (method, subject) == ("admin.vm.Pause", "vault"):
            raise sys.modules["qubesadmin"].exc.QubesVMError("no")

    qubes.fault = fault
    assert list(session.module.pause(set())) == ["work"]
    assert capsys.readouterr().err == "ramboot: vault can't be paused: no\n"


@pytest.mark.parametrize("method", ["CurrentState", "property.Get", "device.pci", "Pause"])
def test_a_qube_that_vanishes_meanwhile_keeps_no_other_from_being_paused(
    session, qubes, capsys, method
):
    def fault(found, subject):
        if found == f"admin.vm.{method}" and subject.startswith("vault"):
            raise sys.modules["qubesadmin"].exc.QubesVMNotFoundError("vault is gone")

    qubes.fault = fault
    assert list(session.module.pause(set())) == ["work"]
    assert capsys.readouterr().err == "ramboot: vault can't be paused: vault is gone\n"


def test_a_qube_that_vanishes_meanwhile_keeps_no_other_from_going_on(session, qubes, capsys):
    assert list(session.module.pause(set())) == ["vault", "work"]

    def fault(method, subject):
        if (method, subject) == ("admin.vm.CurrentState", "vault"):
            raise sys.modules["qubesadmin"].exc.QubesVMNotFoundError("vault is gone")

    qubes.fault = fault
    assert list(session.module.unpause(["work", "vault"])) == ["work"]
    assert capsys.readouterr().err == "ramboot: vault can't go on: vault is gone\n"


def test_each_name_is_out_before_the_next_qube_has_its_turn(session, qubes, tmp_path, monkeypatch):
    said = tmp_path / "said"

    def fault(method, subject):
        if method in ("admin.vm.Pause", "admin.vm.Unpause") and subject == "work":
            assert said.read_text() == "vault\n"
            raise KeyboardInterrupt

    qubes.fault = fault
    for action in (["--pause"], ["--unpause", "vault", "work"]):
        # filled before it is written, as a pipe is
        with said.open("w") as output, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", output)
            with pytest.raises(KeyboardInterrupt):
                session.module.main(action)
        qubes.qubes["work"]["paused"] = True


def test_only_what_is_paused_goes_on(session, qubes, capsys):
    assert list(session.module.pause(set())) == ["vault", "work"]
    sys.modules["qubesadmin"].Qubes().domains["vault"].unpause()
    capsys.readouterr()
    assert list(session.module.unpause(["work", "vault", "gone"])) == ["work"]
    assert capsys.readouterr().err == ""
    assert paused(qubes) == []


# The kind of session


@pytest.mark.parametrize(
    ("backend", "who"),
    [("snapshot", "dom0 and all qubes write"), ("overlay", "dom0 writes"), ("zram", "dom0 writes")],
)
def test_each_desktop_is_told_once_that_it_is_a_ram_session(session, backend, who):
    session.write("/proc/self/mountinfo", "25 1 253:5 / / rw - ext4 /dev/zram3 rw\n")
    watch = session.module.Watch(backend, 600)
    watch.look()
    assert session.did("notify-send") == []
    # at first nobody is there to show it
    session.write("/run/user/1000/bus", "")
    session.answers = {"notify-send": ("", False)}
    watch.look()
    watch.look()
    assert len(session.did("notify-send")) == 2
    session.answers = {}
    for _ in range(3):
        watch.look()
    session.write("/run/user/1001/bus", "")
    watch.look()
    texts = [command[-2:] for command in session.did("notify-send")]
    text = f"Backend {backend}: what {who} is gone when the machine is switched off."
    assert texts == [["RAM session", text]] * 4


def test_a_desktop_that_shows_no_notices_is_left_alone(session, watch):
    session.write("/run/user/1000/bus", "")
    session.answers = {"notify-send": ("", False)}
    for _ in range(40):
        watch.look()
    assert len(session.did("notify-send")) == 30


# Templates


def test_a_template_in_ram_is_told_of_at_each_start(session, watch, capsys):
    session.write("/run/user/1000/bus", "")
    top = "/var/lib/qubes/vm-templates"
    loop(session, 0, f"{top}/mine/root.img")
    watch.look()
    # a qube on it reads its root as well
    assert told(capsys) == []
    loop(session, 1, f"{top}/mine/private.img")
    loop(session, 2, f"{top}/other/private-dirty.img")
    loop(session, 3, "/var/lib/qubes/appvms/work/private.img")
    session.write("/sys/block/loop4/loop/backing_file", f"{top}/gone/private.img\n")
    watch.look()
    watch.look()
    text = (
        "ramboot: what the template {} writes lies in RAM: an update or installation in it now is"
        " forgotten at the end of this session. Update in a persistent boot."
    )
    assert told(capsys) == [f"<4>{text.format(name)}" for name in ("mine", "other")]
    assert session.did("notify-send")[-2][-1] == text.format("mine")
    for number in (1, 2):
        session.write(f"/sys/block/loop{number}/loop/backing_file", "")
    watch.look()
    assert told(capsys) == []
    loop(session, 1, f"{top}/mine/private.img")
    watch.look()
    assert told(capsys) == [f"<4>{text.format('mine')}"]


@pytest.mark.parametrize("layer", [False, True])
def test_a_template_on_another_file_system_is_told_of_where_that_lies_on_the_layer(
    session, watch, capsys, monkeypatch, layer
):
    loop(session, 0, "/mnt/vm-templates/mine/private.img")
    real = os.stat
    place = f"{session.root}/mnt/vm-templates/mine"
    monkeypatch.setattr(
        session.module.os,
        "stat",
        lambda path, **options: (
            SimpleNamespace(st_dev=os.makedev(253, 6)) if path == place else real(path, **options)
        ),
    )
    if layer:
        on_layer(session)
    watch.look()
    assert len(told(capsys)) == layer


def volume(session, number: int, name: str, below: str = "dm-4/slaves/dm-1") -> None:
    """A logical volume of qubes_dom0 that is active; the layer is dm-1."""
    escaped = name.replace("-", "--")
    session.write(f"/sys/block/dm-{number}/dm/name", f"qubes_dom0-{escaped}\n")
    session.write(f"/sys/block/dm-{number}/slaves/{below}/dm/name", "ramboot-layer\n")


def test_in_a_snapshot_session_a_template_on_lvm_is_told_of_too(session, watch, capsys):
    templates = session.root / "var/lib/qubes/vm-templates"
    for name in ("debian-12-xfce", "halted", "work-root"):
        (templates / name).mkdir(parents=True)
    volume(session, 20, "vm-debian-12-xfce-root-snap")
    # halted; an app qube; of no qube
    volume(session, 21, "vm-halted-root")
    volume(session, 22, "vm-work-root-snap")
    volume(session, 23, "root")
    session.write("/sys/block/dm-1/dm/name", "ramboot-layer\n")
    watch.look()
    watch.look()
    assert [line.split(" ")[4] for line in told(capsys)] == ["debian-12-xfce"]
    (session.root / "sys/block/dm-20/dm/name").unlink()
    watch.look()
    volume(session, 20, "vm-debian-12-xfce-root-snap")
    watch.look()
    assert len(told(capsys)) == 1


def test_a_template_on_a_disk_that_is_written_to_keeps_its_updates(session, watch, capsys):
    (session.root / "var/lib/qubes/vm-templates/mine").mkdir(parents=True)
    volume(session, 20, "vm-mine-root-snap")
    (session.root / "sys/block/dm-20/slaves/dm-4/slaves/dm-1/dm/name").write_text("luks-1\n")
    watch.look()
    assert told(capsys) == []


def test_without_qubes_nothing_is_paused():
    for action in ("--pause", "--unpause"):
        done = subprocess.run(
            [sys.executable, "-I", str(WATCH), action, "work"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# As a program


def test_in_a_persistent_session_it_ends(tmp_path):
    status = tmp_path / "run/ramboot/status.json"
    status.parent.mkdir(parents=True)
    status.write_text('{"session": "persistent", "backend": null}')
    environment = {"RAMBOOT_PREFIX": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-I", WATCH], env=environment, check=False, timeout=60)
    assert done.returncode == 0
    assert os.listdir(status.parent) == ["status.json"]


def test_it_is_a_program_for_dom0s_own_python():
    assert WATCH.read_text().startswith("#!/usr/bin/python3 -I\n")
    assert os.access(WATCH, os.X_OK)


def test_the_static_files_name_each_other_as_the_states_place_them():
    defaults = WATCH.parents[2] / "defaults.yaml"
    paths = yaml.safe_load(defaults.read_text())["paths"]
    unit, wanted = (WATCH.with_name(name).read_text() for name in (UNIT, WANTED))
    assert f"ExecStart={paths['watch']}\n" in unit
    assert "ConditionPathExists=/run/ramboot/ready\n" in unit
    assert f"Wants={os.path.basename(paths['watch_unit'])}\n" in wanted
    module = WATCH.read_text()
    assert f'FILLED = "{paths["filled"]}"' in module
    assert f'FILLED = "{paths["filled"]}"' in WATCH.with_name("ramboot").read_text()
