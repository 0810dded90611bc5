# SPDX-License-Identifier: GPL-2.0-or-later
"""Swap policy `off` and back: fstab, units, active swaps, on a fake system."""

import json
import os

import pytest
from salt.exceptions import CommandExecutionError

HEAD = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
QUBES = (
    "/dev/mapper/qubes_dom0-swap none                    swap    "
    "defaults,x-systemd.device-timeout=0 0 0\n"
)
FSTAB = (
    "# by hand: none swap\n"
    "/dev/mapper/qubes_dom0-root /                       ext4    defaults 1 1\n"
    + QUBES
    + "#/dev/old none swap sw 0 0\n"
    + "/srv/swap file\t/mnt/swap\text4 defaults 0 0\n"
    + "  UUID=5eed\tnone\tswap\tsw,noauto\t0\t0"
)
UNIT = "[Swap]\nWhat=/var/swapfile\n"
NAME = "swap of the persistent system"


class System:
    """The commands that the module runs, and what they do to /proc/swaps."""

    def __init__(self, world):
        self.world = world
        self.ran = []
        self.fails = {}
        self.swaps = []
        self.write()

    def write(self):
        lines = [f"{name}\tpartition\t2097148\t\t512\t\t-2\n" for name in self.swaps]
        self.world.write("/proc/swaps", HEAD + "".join(lines))

    def on(self, *names):
        self.swaps += names
        self.write()

    def run_all(self, cmd, python_shell=None):
        assert python_shell is False
        self.ran.append(" ".join(cmd))
        if cmd[0] in self.fails:
            return {"retcode": 255, "stdout": "", "stderr": self.fails[cmd[0]]}
        if cmd[0] == "swapoff":
            self.swaps.remove(cmd[1])
        elif cmd[0] == "swapon":
            self.swaps.append(cmd[-1])
        else:
            assert cmd == ["systemctl", "daemon-reload"]
        self.write()
        return {"retcode": 0, "stdout": "", "stderr": ""}


@pytest.fixture
def system(world):
    system = System(world)
    world.salt["cmd.run_all"] = system.run_all
    world.module("ramboot_config")
    world.module("ramboot_record")
    return system


@pytest.fixture
def swap(world, system):
    return world.module("ramboot_swap")


@pytest.fixture
def state(world, swap):
    return world.state("ramboot_swap")


@pytest.fixture
def dom0(world, system):
    """Swap in every form: fstab, an own and a packaged unit, both active."""
    world.write("/etc/fstab", FSTAB, 0o640)
    world.write("/etc/systemd/system/own.swap", UNIT, 0o600)
    world.write("/usr/lib/systemd/system/packaged.swap", "[Swap]\nWhat=/dev/sdz9\n")
    system.on("/dev/dm-1", "/var/swapfile")
    return world


def tree(world):
    """Every file below the root but /proc: mode and bytes, or what a link says."""
    found = {}
    for folder, _folders, names in os.walk(world.root):
        for name in names:
            path = os.path.join(folder, name)
            key = path.removeprefix(str(world.root))
            if key.startswith("/proc/"):
                continue
            if os.path.islink(path):
                found[key] = os.readlink(path)
            else:
                with open(path, "rb") as handle:
                    found[key] = (oct(os.stat(path).st_mode & 0o7777), handle.read())
    return found


def text(world, path):
    return (world.root / path.lstrip("/")).read_text()


# Questions


def test_active_swaps_in_bytes(swap, world):
    world.write("/proc/swaps", HEAD + "/srv/a\\040b file\t\t2097148\t\t512\t\t-2\n")
    assert swap.active() == [
        {"name": "/srv/a b", "type": "file", "size_bytes": 2147479552, "used_bytes": 524288}
    ]


def test_no_active_swap(swap):
    assert swap.active() == []


def test_a_system_without_fstab_and_units_has_no_swap(swap):
    assert swap.pending() == {"fstab": [], "units": [], "active": []}


# Off


def expected_changes(world):
    line = QUBES.strip()
    second = "UUID=5eed\tnone\tswap\tsw,noauto\t0\t0"
    return {
        f"fstab: {line}": {"old": line, "new": f"#ramboot: {line}"},
        f"fstab: {second}": {"old": second, "new": f"#ramboot: {second}"},
        f"{world.root}/etc/systemd/system/own.swap": {"old": "not masked", "new": "masked"},
        f"{world.root}/usr/lib/systemd/system/packaged.swap": {
            "old": "not masked",
            "new": "masked",
        },
        "/dev/dm-1": {"old": "on", "new": "off"},
        "/var/swapfile": {"old": "on", "new": "off"},
    }


def test_off_lists_the_same_changes_in_both_modes(state, dom0, system, test_mode):
    before = tree(dom0)
    assert state.off(NAME) == {
        "name": NAME,
        "result": None if test_mode else True,
        "changes": expected_changes(dom0),
        "comment": "swap would be switched off" if test_mode else "swap has been switched off",
    }
    if test_mode:
        assert tree(dom0) == before
        assert system.ran == []


def test_off_marks_fstab_masks_units_and_switches_off(state, dom0, system):
    state.off(NAME)

    assert text(dom0, "/etc/fstab") == FSTAB.replace(QUBES, f"#ramboot: {QUBES}").replace(
        "  UUID", "#ramboot:   UUID"
    )
    assert (dom0.root / "etc/fstab").stat().st_mode & 0o777 == 0o640
    units = dom0.root / "etc/systemd/system"
    assert os.readlink(units / "own.swap") == "/dev/null"
    assert os.readlink(units / "packaged.swap") == "/dev/null"
    assert text(dom0, "/usr/lib/systemd/system/packaged.swap") == "[Swap]\nWhat=/dev/sdz9\n"
    assert system.ran == [
        "systemctl daemon-reload",
        "swapoff /dev/dm-1",
        "swapoff /var/swapfile",
    ]


def test_a_second_off_changes_nothing(state, dom0, system):
    state.off(NAME)
    before, ran = tree(dom0), list(system.ran)
    assert state.off(NAME) == {
        "name": NAME,
        "result": True,
        "changes": {},
        "comment": "swap is off",
    }
    assert (tree(dom0), system.ran) == (before, ran)


def test_off_leaves_a_mask_of_the_users_alone(state, world, system):
    world.write("/usr/lib/systemd/system/a.swap", UNIT)
    folder = world.root / "etc/systemd/system"
    folder.mkdir(parents=True)
    (folder / "a.swap").symlink_to("/dev/null")
    before = tree(world)

    assert state.off(NAME)["changes"] == {}
    assert state.restored(NAME)["changes"] == {}
    assert tree(world) == before


def test_off_writes_through_a_link_to_fstab(state, world):
    target = world.write("/srv/fstab", QUBES)
    (world.root / "etc").mkdir()
    (world.root / "etc/fstab").symlink_to(target)
    state.off(NAME)
    assert (world.root / "etc/fstab").is_symlink()
    assert target.read_text() == f"#ramboot: {QUBES}"


def test_a_swap_that_stays_on_is_a_failure_that_tells_what_was_done(state, dom0, system):
    system.fails["swapoff"] = "Cannot allocate memory"
    ret = state.off(NAME)

    changes = expected_changes(dom0)
    del changes["/dev/dm-1"], changes["/var/swapfile"]
    assert ret["result"] is False
    assert ret["changes"] == changes
    assert ret["comment"] == (
        "/dev/dm-1 is still on (swapoff /dev/dm-1: exit 255: Cannot allocate memory); it is off"
        f" from the next boot. Done until then: {QUBES.strip()}, UUID=5eed\tnone\tswap\tsw,noauto"
        f"\t0\t0, {dom0.root}/etc/systemd/system/own.swap,"
        f" {dom0.root}/usr/lib/systemd/system/packaged.swap"
    )


def test_no_error_but_still_on_is_a_failure_of_its_own(state, system, world):
    system.on("/dev/dm-1")
    world.salt["cmd.run_all"] = lambda cmd, python_shell: {"retcode": 0, "stderr": ""}
    assert state.off(NAME) == {
        "name": NAME,
        "result": False,
        "changes": {},
        "comment": "swap is still there: {'/dev/dm-1': {'old': 'on', 'new': 'off'}}",
    }


# Back


def test_restored_gives_back_every_byte(state, dom0):
    before = tree(dom0)
    state.off(NAME)
    assert tree(dom0) != before
    ret = state.restored(NAME)
    assert ret["result"] is True
    assert ret["comment"] == "swap has been restored"
    assert tree(dom0) == before
    assert not (dom0.root / "var/lib/ramboot").exists()


def test_restored_keeps_bytes_that_are_no_text(state, world):
    data = b"# caf\xe9 \x0c x\r\n" + QUBES.encode() + b"/dev/\xff none swap sw 0 0\r\n\n"
    path = world.write("/etc/fstab", data)
    state.off(NAME)
    assert path.read_bytes().count(b"#ramboot: ") == 2
    state.restored(NAME)
    assert path.read_bytes() == data


def test_restored_lists_the_same_changes_in_both_modes(state, dom0, system, test_mode):
    dom0.opts["test"] = False
    state.off(NAME)
    dom0.opts["test"] = test_mode
    before, ran = tree(dom0), list(system.ran)
    ret = state.restored(NAME)
    changes = {
        key: {"old": value["new"], "new": value["old"]}
        for key, value in expected_changes(dom0).items()
        if not key.startswith(("/dev/", "/var/"))
    }
    units = f"{dom0.root}/etc/systemd/system"
    changes[f"{units}/packaged.swap"] = changes.pop(
        f"{dom0.root}/usr/lib/systemd/system/packaged.swap"
    )
    changes[f"{dom0.root}/var/lib/ramboot/swap.json"] = {"old": "present", "new": "absent"}
    assert ret == {
        "name": NAME,
        "result": None if test_mode else True,
        "changes": changes,
        "comment": "swap would be restored" if test_mode else "swap has been restored",
    }
    if test_mode:
        assert (tree(dom0), system.ran) == (before, ran)


def test_restored_does_nothing_where_ramboot_never_was(state, dom0, system, test_mode):
    before = tree(dom0)
    assert state.restored(NAME) == {
        "name": NAME,
        "result": True,
        "changes": {},
        "comment": "swap is as ramboot found it",
    }
    assert (tree(dom0), system.ran) == (before, [])


@pytest.fixture
def device(world):
    """A swap device that is there, in fstab and on."""
    return str(world.write("/dev/swap"))


def test_restored_switches_on_what_is_in_fstab_and_was_on(state, world, system, device):
    world.write("/etc/fstab", f"{device} none swap defaults 0 0\n")
    system.on(device)
    state.off(NAME)
    assert system.swaps == []

    ret = state.restored(NAME)

    assert ret["changes"][device] == {"old": "off", "new": "on"}
    assert system.swaps == [device]


@pytest.mark.parametrize(
    ("fields", "options"),
    [("sw,pri=5,discard=once 0 0", "sw,pri=5,discard=once"), ("", "defaults")],
)
def test_restored_switches_on_with_the_options_of_fstab(
    state, world, system, device, fields, options
):
    # of two lines the first counts, as for swapon -a
    world.write("/etc/fstab", f"{device} none swap {fields}\n{device} none swap pri=1\n")
    system.on(device)
    state.off(NAME)
    system.ran.clear()
    assert state.restored(NAME)["result"] is True
    assert system.ran == ["systemctl daemon-reload", f"swapon -o {options} {device}"]


def test_restored_finds_a_device_by_uuid(state, world, system):
    device = str(world.write("/dev/disk/by-uuid/5eed"))
    world.write("/etc/fstab", 'UUID="5eed" none swap defaults 0 0\n')
    system.on(device)
    state.off(NAME)
    state.restored(NAME)
    assert system.swaps == [device]


@pytest.mark.parametrize("options", ["noauto", "nofail,noauto"])
def test_restored_leaves_noauto_swaps_off(state, world, system, device, options):
    world.write("/etc/fstab", f"{device} none swap {options} 0 0\n")
    system.on(device)
    state.off(NAME)
    state.restored(NAME)
    assert system.swaps == []


def test_restored_leaves_swap_off_that_was_not_on(state, world, system, device):
    world.write("/etc/fstab", f"{device} none swap defaults 0 0\n")
    state.off(NAME)
    state.restored(NAME)
    assert system.swaps == []


def test_restored_names_a_swap_that_does_not_come_on(state, world, system, device):
    world.write("/etc/fstab", f"{device} none swap defaults 0 0\n")
    system.on(device)
    state.off(NAME)
    system.fails["swapon"] = "Invalid argument"
    ret = state.restored(NAME)
    assert ret["result"] is True
    assert device not in ret["changes"]
    assert ret["comment"] == (
        f"swap has been restored\nleft: {device} is not on yet, the next boot brings it:"
        f" swapon -o defaults {device}: exit 255: Invalid argument"
    )


def test_restored_leaves_and_names_what_the_user_changed(state, dom0):
    state.off(NAME)
    fstab = dom0.root / "etc/fstab"
    fstab.write_text(fstab.read_text().replace(f"#ramboot: {QUBES}", "/dev/new none swap sw 0 0\n"))
    for unit, content in (("own.swap", "[Swap]\nWhat=/a\n"), ("packaged.swap", "[Swap]\n")):
        path = dom0.root / "etc/systemd/system" / unit
        path.unlink()
        path.write_text(content)

    ret = state.restored(NAME)

    root = dom0.root
    assert ret["result"] is True
    assert ret["comment"].splitlines() == [
        "swap has been restored",
        f"left: {root}/etc/fstab: the line {QUBES!r} is neither as it was nor as ramboot left it",
        f"left: {root}/etc/systemd/system/own.swap is not the mask that ramboot put there; its own"
        f" is {root}/var/lib/ramboot/swap-units/own.swap",
        f"left: {root}/etc/systemd/system/packaged.swap is not what ramboot put there",
    ]
    assert fstab.read_text() == FSTAB.replace(QUBES, "/dev/new none swap sw 0 0\n")
    assert text(dom0, "/etc/systemd/system/own.swap") == "[Swap]\nWhat=/a\n"
    assert text(dom0, "/etc/systemd/system/packaged.swap") == "[Swap]\n"
    assert text(dom0, "/var/lib/ramboot/swap-units/own.swap") == UNIT
    assert state.restored(NAME)["changes"] == {}


def test_lines_added_by_the_user_survive(state, dom0):
    state.off(NAME)
    fstab = dom0.root / "etc/fstab"
    fstab.write_text(fstab.read_text() + "\n/dev/x /x ext4 defaults 0 0\n")
    state.restored(NAME)
    assert fstab.read_text() == FSTAB + "\n/dev/x /x ext4 defaults 0 0\n"


# what users write with ramboot's mark: a line that they switched off themselves, a note
OF_THE_USERS = (
    "#ramboot: /dev/sdb1 /data ext4 defaults 0 2\n"
    "#ramboot: leave no swap lines active\n"
    "#ramboot: \n"
)


def test_lines_of_the_users_that_begin_with_the_mark_stay(state, dom0, test_mode):
    path = dom0.write("/etc/fstab", OF_THE_USERS + QUBES)
    dom0.opts["test"] = False
    before = tree(dom0)
    # `swap: session`, on every apply
    assert state.restored(NAME)["changes"] == {}
    assert tree(dom0) == before
    state.off(NAME)
    assert path.read_text() == f"{OF_THE_USERS}#ramboot: {QUBES}"
    off = tree(dom0)
    dom0.opts["test"] = test_mode
    ret = state.restored(NAME)
    assert [key for key in ret["changes"] if key.startswith("fstab")] == [f"fstab: {QUBES.strip()}"]
    assert "left" not in ret["comment"]
    assert tree(dom0) == (off if test_mode else before)


def test_with_a_record_only_lines_of_its_devices_come_back(state, dom0):
    state.off(NAME)
    fstab = dom0.root / "etc/fstab"
    mine = "\n#ramboot: /dev/mine none swap sw 0 0\n"
    fstab.write_text(fstab.read_text() + mine)
    state.restored(NAME)
    assert fstab.read_text() == FSTAB + mine


@pytest.mark.usefixtures("swap")
def test_without_its_record_a_swap_line_with_the_mark_comes_back(state, dom0):
    path = dom0.write("/etc/fstab", f"{OF_THE_USERS}#ramboot: {QUBES}#ramboot: UUID=5 none swap\n")
    changes = state.restored(NAME)["changes"]
    assert list(changes) == [f"fstab: {QUBES.strip()}", "fstab: UUID=5 none swap"]
    assert path.read_text() == f"{OF_THE_USERS}{QUBES}UUID=5 none swap\n"


def test_a_marked_line_that_the_user_edited_comes_back_as_edited_and_is_named(state, dom0):
    state.off(NAME)
    fstab = dom0.root / "etc/fstab"
    edited = QUBES.replace("defaults", "pri=5")
    fstab.write_text(fstab.read_text().replace(QUBES, edited))
    ret = state.restored(NAME)
    assert ret["comment"].splitlines()[1:] == [
        f"left: {fstab}: the line {QUBES!r} is neither as it was nor as ramboot left it"
    ]
    assert fstab.read_text() == FSTAB.replace(QUBES, edited)
    assert state.restored(NAME)["changes"] == {}


@pytest.mark.parametrize("cut", ["fstab", "swap-units/own.swap", "system/own.swap"])
def test_what_a_cut_in_a_write_left_goes_with_the_undo(
    swap, state, dom0, monkeypatch, cut, test_mode
):
    """Before the rename, when power goes: nobody deletes the temporary file."""
    before = tree(dom0)
    real = os.rename

    def power_goes(temporary, path):
        if path.endswith(cut):
            os.link(temporary, f"{temporary[:-8]}abcd_123")
            raise KeyboardInterrupt
        real(temporary, path)

    def there_and_back():
        swap.switch_off()
        swap.switch_on()

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", power_goes)
        with pytest.raises(KeyboardInterrupt):
            there_and_back()
    left = [f"{dom0.root}{path}" for path in tree(dom0) if ".ramboot-" in path]
    assert len(left) == 1
    broken = tree(dom0)
    ret = state.restored(NAME)
    assert ret["changes"][left[0]] == {"old": "present", "new": "absent"}
    assert tree(dom0) == (broken if test_mode else before)
    if not test_mode:
        assert state.restored(NAME)["changes"] == {}


def test_a_leftover_that_cannot_be_deleted_fails_the_undo(state, dom0, monkeypatch):
    left = str(dom0.write("/etc/.ramboot-fstab.abcd_123"))

    real = os.unlink

    def immutable(path, **options):
        if path == left:
            raise PermissionError(1, "Operation not permitted", path)
        real(path, **options)

    monkeypatch.setattr(os, "unlink", immutable)
    ret = state.restored(NAME)
    assert (ret["result"], ret["changes"]) == (False, {})
    assert ret["comment"].startswith(f"swap is not restored: {{'{left}'")


@pytest.mark.parametrize("step", ["_write_fstab", "_mask", "_run", "_rename"])
def test_an_off_that_was_cut_short_can_be_undone(swap, state, dom0, monkeypatch, step):
    """Also when a second try completes it first."""
    before = tree(dom0)

    def cut(*_args):
        raise KeyboardInterrupt

    for tries in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(swap, step, cut)
            with pytest.raises(KeyboardInterrupt):
                swap.switch_off()
        if tries:
            assert state.off(NAME)["result"] is True
        assert state.restored(NAME)["result"] is True
        assert tree(dom0) == before


@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize("then", ["off", "restored"])
@pytest.mark.parametrize("way", ["switch_off", "switch_on"])
def test_a_move_that_is_cut_between_the_copy_and_the_deletion(
    swap, state, dom0, monkeypatch, link, then, way
):
    own = dom0.root / "etc/systemd/system/own.swap"
    if link:
        own.unlink()
        dom0.write("/srv/own.swap", UNIT)
        own.symlink_to("/srv/own.swap")
    before = tree(dom0)
    source = own
    if way == "switch_on":
        swap.switch_off()
        source = dom0.root / "var/lib/ramboot/swap-units/own.swap"
    real = os.unlink

    def cut(path, *rest, **named):
        if str(path) == str(source):
            raise KeyboardInterrupt
        real(path, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(swap.os, "unlink", cut)
        with pytest.raises(KeyboardInterrupt):
            getattr(swap, way)()
    assert own.exists() == source.exists()
    if then == "off":
        assert state.off(NAME)["result"] is True
    answer = state.restored(NAME)
    assert (answer["result"], "left" in answer["comment"]) == (True, False)
    assert tree(dom0) == before


def test_a_mask_without_the_moved_file_yet_is_completed_by_the_next_run(swap, state, dom0):
    """Power cut between the move and the mask."""
    before = tree(dom0)
    real = os.symlink

    def cut(target, path):
        if str(path).endswith("own.swap"):
            raise KeyboardInterrupt
        real(target, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swap.os, "symlink", cut)
        with pytest.raises(KeyboardInterrupt):
            swap.switch_off()
    # a packaged unit of that name would be seen now; it must not be moved away
    dom0.write("/usr/lib/systemd/system/own.swap", "[Swap]\n")
    state.off(NAME)
    assert text(dom0, "/usr/lib/systemd/system/own.swap") == "[Swap]\n"
    (dom0.root / "usr/lib/systemd/system/own.swap").unlink()
    state.restored(NAME)
    assert tree(dom0) == before


def test_a_write_that_fails_leaves_fstab_whole(swap, dom0, monkeypatch):
    def full(_fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(swap.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        swap._write_fstab(["x"])
    assert text(dom0, "/etc/fstab") == FSTAB
    assert sorted(os.listdir(dom0.root / "etc")) == ["fstab", "systemd"]


def test_swap_of_a_generator_stays_off_too(swap, state, world):
    """A drop-in of zram-generator outranks its main file; GPT's types need no file at all."""
    for unit in ("generator/dev-zram0.swap", "generator.late/dev-sda2.swap"):
        world.write(f"/run/systemd/{unit}", "[Swap]\nWhat=/dev/x\n")
    world.write("/run/systemd/generator/dev-sda3.swap", "[Swap]\nWhat=/dev/sda3\n")  # of fstab
    world.write("/usr/local/lib/systemd/system/local.swap", UNIT)
    before = tree(world)
    assert state.off(NAME)["result"] is True
    own = world.root / "etc/systemd/system"
    assert {path.name: os.readlink(path) for path in own.iterdir()} == dict.fromkeys(
        ("dev-zram0.swap", "dev-sda2.swap", "local.swap"), "/dev/null"
    )
    assert state.restored(NAME)["result"] is True
    assert tree(world) == before


def test_a_damaged_record_is_named(swap, dom0):
    path = dom0.write("/var/lib/ramboot/swap.json", "{")
    with pytest.raises(CommandExecutionError) as damaged:
        swap.recorded()
    assert str(damaged.value).startswith(f"{path} is damaged: ")


def test_a_damaged_record_fails_the_states_in_one_sentence(state, dom0):
    path = dom0.write("/var/lib/ramboot/swap.json", "{")
    for ret in (state.off(NAME), state.restored(NAME)):
        assert (ret["result"], ret["changes"]) == (False, {})
        assert ret["comment"].startswith(f"{path} is damaged: ")


def test_an_fstab_that_cannot_be_written_fails_the_states_in_one_sentence(state, dom0, monkeypatch):
    write = dom0.salt["ramboot_record.replace"]

    def immutable(path, *_arguments, **_options):
        raise PermissionError(1, "Operation not permitted", path)

    monkeypatch.setitem(dom0.salt, "ramboot_record.replace", immutable)
    ret = state.off(NAME)
    said = f"[Errno 1] Operation not permitted: '{dom0.root}/etc/fstab'"
    assert (ret["result"], ret["changes"], ret["comment"]) == (False, {}, said)
    assert text(dom0, "/etc/fstab") == FSTAB

    monkeypatch.setitem(dom0.salt, "ramboot_record.replace", write)
    assert state.off(NAME)["result"] is True
    monkeypatch.setitem(dom0.salt, "ramboot_record.replace", immutable)
    ret = state.restored(NAME)
    assert (ret["result"], ret["changes"], ret["comment"]) == (False, {}, said)


def test_a_kernel_without_swap_has_none(swap, state, world):
    (world.root / "proc/swaps").unlink()
    assert swap.active() == []
    assert state.off(NAME)["result"] is True


def test_the_record_is_written_before_the_first_change(swap, dom0, monkeypatch):
    monkeypatch.setattr(swap, "_write_fstab", lambda lines: seen.append(swap._record()))
    seen = []
    swap.switch_off()
    assert seen == [
        {
            "fstab": [QUBES, "  UUID=5eed\tnone\tswap\tsw,noauto\t0\t0"],
            "units": {
                "own.swap": f"{dom0.root}/var/lib/ramboot/swap-units/own.swap",
                "packaged.swap": "",
            },
            "active": ["/dev/dm-1", "/var/swapfile"],
        }
    ]
    record = dom0.root / "var/lib/ramboot/swap.json"
    assert record.stat().st_mode & 0o777 == 0o600
    assert json.loads(record.read_text()) == seen[0]


def test_the_type_makes_a_swap_line_not_what_stands_in_the_other_fields(state, world):
    other = "/swap none ext4 swap 0 0\nswap swap tmpfs size=1m 0 0\nLABEL=swap /swap xfs defaults\n"
    path = world.write("/etc/fstab", f"{other}/dev/a swap swap\n/dev/b none swap sw 0 0\nx y\n")
    state.off(NAME)
    assert path.read_text() == (
        f"{other}#ramboot: /dev/a swap swap\n#ramboot: /dev/b none swap sw 0 0\nx y\n"
    )
