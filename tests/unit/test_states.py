# SPDX-License-Identifier: GPL-2.0-or-later
"""The states of ramboot, each run for real and with test=True."""

from __future__ import annotations

import fcntl
import grp
import os
import pwd
import stat
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest
from salt.exceptions import CommandExecutionError

sys.path.insert(0, str(Path(__file__).parent))
from images import Machine, answer, sha  # noqa: E402

MODULE = "/usr/lib/dracut/modules.d/50ramboot"
ME = pwd.getpwuid(os.geteuid()).pw_name
MY_GROUP = grp.getgrgid(os.getegid()).gr_name


def managed(name, contents, mode, user, group, makedirs, backup):
    """The part of Salt's file.managed that may be used."""


@pytest.fixture
def states(world, tmp_path):
    """_states/ramboot.py with the real record and a file.managed that writes."""
    world.module("ramboot_config")
    world.module("ramboot_record")
    (world.root / "var/lib").mkdir(parents=True)

    def write(name, contents, mode, user, group, makedirs, backup):
        assert (user, group, backup) == (ME, MY_GROUP, "none")
        path = Path(name)
        if not makedirs and not path.parent.is_dir():
            return {"result": False, "comment": f"no directory {path.parent}", "changes": {}}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents)
        path.chmod(int(mode, 8))
        return {"result": True, "comment": "", "changes": {}}

    def cache_file(path, saltenv):
        assert saltenv == "base"
        return str(tmp_path / path.removeprefix("salt://")) if path != "salt://none" else False

    def render(contents, template, context, defaults, saltenv):
        assert (template, defaults, saltenv) == ("jinja", {}, "base")
        if "{{ broken }}" in contents:
            return {"result": False, "comment": "Unable to render", "name": ""}
        return contents.replace("{{ mode }}", context.get("mode", "")).removesuffix("\n")

    world.states["file.managed"] = create_autospec(managed, side_effect=write)
    world.salt["file.apply_template_on_contents"] = render
    (tmp_path / "src").write_text("ours\n")
    (tmp_path / "template").write_text("mode={{ mode }}\n")
    found = world.state("ramboot")
    defaults_file = world.cache_file
    world.salt["cp.cache_file"] = lambda path, saltenv="base": (
        defaults_file(path, saltenv)
        if path.endswith("defaults.yaml")
        else cache_file(path, saltenv)
    )
    return found


def install(states, path, source="salt://src", **options):
    return states.installed(str(path), source, user=ME, group=MY_GROUP, **options)


@pytest.fixture
def real(world, test_mode):
    class Real:
        def __enter__(self):
            world.opts["test"] = False

        def __exit__(self, *_exception):
            world.opts["test"] = test_mode

    return Real()


def tree(world):
    """But for /run, which is in RAM."""
    return {
        str(path.relative_to(world.root)): (path.read_bytes(), stat.S_IMODE(path.stat().st_mode))
        if path.is_file()
        else None
        for path in world.root.rglob("*")
        if not path.is_relative_to(world.root / "run")
    }


# installed


def test_a_new_file_is_written_and_recorded(world, states, test_mode):
    path = world.root / "usr/bin/ramboot"
    before = tree(world)
    assert install(states, path, mode="0755") == {
        "name": str(path),
        "result": None if test_mode else True,
        "changes": {"diff": "New file", "mode": "0755"},
        "comment": f"{path} {'would be' if test_mode else 'has been'} written",
    }
    if test_mode:
        assert tree(world) == before
    else:
        assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("ours\n", 0o755)
        entry = world.salt["ramboot_record.entries"]()[str(path)]
        assert entry == {"original": None, "intended": None, "sealed": sha("ours\n")}


def test_a_second_run_changes_nothing(world, states, test_mode, real):
    path = world.root / "usr/bin/ramboot"
    with real:
        install(states, path)
    before = tree(world)
    assert install(states, path) == {
        "name": str(path),
        "result": True,
        "changes": {},
        "comment": f"{path} is as it should be",
    }
    assert tree(world) == before
    assert world.states["file.managed"].call_count == 1


def test_a_file_that_was_there_is_kept_as_original(world, states, test_mode):
    path = world.write("/etc/dracut.conf.d/50-ramboot.conf", "the user's\n", mode=0o600)
    ret = install(states, path)
    assert ret["changes"] == {
        "diff": "--- \n+++ \n@@ -1 +1 @@\n-the user's\n+ours\n",
        "mode": "0644",
    }
    if not test_mode:
        assert world.salt["ramboot_record.verdict"](str(path)) == "ours"
        world.salt["ramboot_record.restore"](str(path))
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("the user's\n", 0o600)


def test_our_file_that_was_edited_is_put_back_and_it_says_so(world, states, test_mode, real):
    path = world.root / "usr/bin/ramboot"
    with real:
        install(states, path)
    path.write_text("edited\n")
    assert install(states, path) == {
        "name": str(path),
        "result": None if test_mode else True,
        "changes": {"diff": "--- \n+++ \n@@ -1 +1 @@\n-edited\n+ours\n"},
        "comment": f"{path} {'would be' if test_mode else 'has been'} written,"
        " over a change that was not ours",
    }
    assert path.read_text() == ("edited\n" if test_mode else "ours\n")


def test_a_changed_mode_alone_is_put_back(world, states, test_mode, real):
    path = world.root / "usr/bin/ramboot"
    with real:
        install(states, path)
    path.chmod(0o600)
    assert install(states, path)["changes"] == {"mode": "0644"}
    assert stat.S_IMODE(path.stat().st_mode) == (0o600 if test_mode else 0o644)


def test_line_ends_count(world, states, test_mode):
    path = world.write("/usr/bin/ramboot", "ours\r\n")
    assert install(states, path)["changes"] == {"diff": "--- \n+++ \n@@ -1 +1 @@\n-ours\r\n+ours\n"}


def test_a_write_that_was_cut_off_before_its_seal_is_sealed(world, states, test_mode):
    path = world.root / "usr/bin/ramboot"
    world.salt["ramboot_record.keep"](str(path))
    world.salt["ramboot_record.intend"](str(path), sha("ours\n"))
    world.write("/usr/bin/ramboot", "ours\n")
    ret = install(states, path)
    assert (ret["result"], ret["changes"]) == (True, {})
    entry = world.salt["ramboot_record.entries"]()[str(path)]
    assert entry["sealed"] == (None if test_mode else sha("ours\n"))


def test_a_write_that_was_cut_off_and_is_no_longer_wanted_is_forgotten(
    world, states, test_mode, real
):
    path = world.root / "usr/bin/ramboot"
    with real:
        install(states, path)
    world.salt["ramboot_record.intend"](str(path), sha("another\n"))
    ret = install(states, path)
    assert (ret["result"], ret["changes"]) == (True, {})
    entry = world.salt["ramboot_record.entries"]()[str(path)]
    assert entry["sealed"] == sha("ours\n")
    assert entry["intended"] == (sha("another\n") if test_mode else None)


def test_a_template_is_rendered_and_ends_with_a_line_end(world, states, test_mode):
    path = world.root / "etc/ramboot/ramboot.conf"
    ret = install(states, path, "salt://template", template="jinja", context={"mode": "ask"})
    assert ret["changes"] == {"diff": "New file", "mode": "0644"}
    if not test_mode:
        assert path.read_text() == "mode=ask\n"


@pytest.mark.usefixtures("test_mode")
def test_a_template_that_cannot_be_rendered_fails(world, states, tmp_path):
    (tmp_path / "template").write_text("{{ broken }}\n")
    path = world.root / "etc/ramboot/ramboot.conf"
    before = tree(world)
    assert install(states, path, "salt://template", template="jinja") == {
        "name": str(path),
        "result": False,
        "changes": {},
        "comment": "salt://template can't be rendered: Unable to render",
    }
    assert tree(world) == before


@pytest.mark.usefixtures("test_mode")
def test_a_source_that_is_not_there_fails(world, states):
    ret = install(states, world.root / "usr/bin/ramboot", "salt://none")
    assert (ret["result"], ret["comment"]) == (
        False,
        "salt://none is not in file_roots of env base",
    )


@pytest.mark.usefixtures("test_mode")
def test_a_link_in_the_files_place_is_left_alone(world, states):
    target = world.write("/etc/target", "the user's")
    link = world.root / "etc/link"
    link.symlink_to(target)
    ret = install(states, link)
    assert (ret["result"], ret["changes"]) == (False, {})
    assert ret["comment"] == f"{link} is not a regular file and is left alone"
    assert target.read_text() == "the user's"


def test_a_failed_write_fails_without_changes(world, states, test_mode):
    path = world.root / "usr/bin/ramboot"
    ret = install(states, path, makedirs=False)
    if test_mode:
        assert ret["result"] is None
    else:
        assert ret == {
            "name": str(path),
            "result": False,
            "changes": {},
            "comment": f"no directory {path.parent}",
        }


def test_a_write_that_left_something_else_fails(world, states):
    path = world.root / "usr/bin/ramboot"

    def wrong(name, contents, mode, user, group, makedirs, backup):
        world.write("/usr/bin/ramboot", "not ours")
        return {"result": True, "comment": ""}

    world.states["file.managed"].side_effect = wrong
    ret = install(states, path)
    assert (ret["result"], ret["changes"]) == (False, {})
    assert ret["comment"] == (
        f"{path} holds SHA-256 {sha('not ours')}; {sha('ours' + chr(10))} was to be written"
    )


def test_a_write_with_the_wrong_mode_fails(world, states):
    path = world.root / "usr/bin/ramboot"

    def wrong(name, contents, mode, user, group, makedirs, backup):
        world.write("/usr/bin/ramboot", contents, mode=0o777)
        return {"result": True, "comment": ""}

    world.states["file.managed"].side_effect = wrong
    ret = install(states, path)
    assert ret["comment"] == f"{path} was written without an error and is still not right"
    assert ret["result"] is False


# restored


def test_our_file_goes_and_comes_back_by_the_record(world, states, test_mode, real):
    before = tree(world)
    path = world.root / "etc/ramboot/ramboot.conf"
    with real:
        install(states, path)
    applied = tree(world)
    assert states.restored(str(path)) == {
        "name": str(path),
        "result": None if test_mode else True,
        "changes": {str(path): {"old": "ramboot's", "new": "deleted"}},
        "comment": f"{path}: ours, deleted",
    }
    if test_mode:
        assert tree(world) == applied
    else:
        world.salt["ramboot_record.close"]()
        assert tree(world) == {name: found for name, found in before.items() if name != "etc"}


def test_an_original_comes_back(world, states, test_mode, real):
    path = world.write("/etc/x.conf", "the user's\n", mode=0o640)
    with real:
        install(states, path)
    ret = states.restored(str(path))
    assert ret["changes"] == {str(path): {"old": "ramboot's", "new": "restored"}}
    assert path.read_text() == ("ours\n" if test_mode else "the user's\n")


def test_what_the_user_changed_is_left_and_named(world, states, test_mode, real):
    path = world.root / "usr/bin/ramboot"
    with real:
        install(states, path)
    path.write_text("edited\n")
    assert states.restored(str(path)) == {
        "name": str(path),
        "result": True,
        "changes": {},
        "comment": f"{path} was changed after ramboot wrote it and is left as it is",
    }
    assert path.read_text() == "edited\n"


@pytest.mark.usefixtures("test_mode")
def test_restored_on_a_machine_that_never_had_it_does_nothing(world, states):
    path = world.root / "usr/bin/ramboot"
    before = tree(world)
    assert states.restored(str(path)) == {
        "name": str(path),
        "result": True,
        "changes": {},
        "comment": f"{path} is not there and is not recorded: nothing to undo",
    }
    assert tree(world) == before


def test_restored_twice_does_nothing_the_second_time(world, states, test_mode, real):
    path = world.root / "usr/bin/ramboot"
    with real:
        install(states, path)
        states.restored(str(path))
    ret = states.restored(str(path))
    assert (ret["result"], ret["changes"]) == (True, {})


@pytest.mark.usefixtures("test_mode")
def test_a_damaged_record_fails_instead_of_guessing(world, states):
    world.write("/var/lib/ramboot/record.json", "{")
    path = str(world.write("/usr/bin/ramboot", "something"))
    ret = states.restored(path)
    assert (ret["result"], ret["changes"]) == (False, {})
    assert ret["comment"].startswith(f"{world.paths['record']}/record.json is damaged (")


def test_an_undo_that_left_the_entry_is_a_failure(world, states):
    path = world.root / "usr/bin/ramboot"
    install(states, path)
    world.salt["ramboot_record.restore"] = lambda _path: None
    ret = states.restored(str(path))
    assert (ret["result"], ret["changes"]) == (False, {})
    assert ret["comment"] == f"{path} was restored without an error and is still ours"


# initramfs_current


@pytest.fixture
def machine(world, states, monkeypatch):
    found = Machine(world)
    world.salt["cmd.run_all"] = found.run_all
    world.salt["ramboot_preflight.session_fault"] = lambda: None
    world.module("ramboot_initramfs")
    world.module("ramboot")
    return found


def test_stale_images_become_current(world, states, machine, test_mode):
    machine.module()
    before = tree(world)
    images = [str(machine.image(kernel)) for kernel in machine.kernels]
    assert states.initramfs_current("images") == {
        "name": "images",
        "result": None if test_mode else True,
        "changes": {
            image: {"old": "stale: the ramboot module is not in it", "new": "current"}
            for image in images
        },
        "comment": f"{'would be rebuilt' if test_mode else 'rebuilt'}: {', '.join(images)}",
    }
    if test_mode:
        assert tree(world) == before
        assert machine.runs_of("dracut") == []
    else:
        assert len(machine.runs_of("dracut")) == 2


@pytest.mark.usefixtures("test_mode")
@pytest.mark.parametrize("faults", [[], ["kernel 1: no", "kernel 2: no"]])
def test_room_in_boot_is_there_or_every_lack_is_told(world, states, faults):
    world.salt["ramboot_initramfs.room_faults"] = lambda changing: faults
    told = "\n".join(["nothing was changed:", *faults]) if faults else "there is room"
    world.salt["ramboot_initramfs.undo_room_faults"] = lambda: [f"undo of {x}" for x in faults]
    answer = {"name": "room", "result": not faults, "changes": {}}
    assert states.initramfs_room("room") == {**answer, "comment": told}
    told = told.replace("kernel", "undo of kernel")
    assert states.initramfs_room("room", undo=True) == {**answer, "comment": told}


def test_current_images_need_no_dracut(world, states, machine, test_mode, real):
    machine.module()
    with real:
        states.initramfs_current("images")
    machine.commands.clear()
    assert states.initramfs_current("images") == {
        "name": "images",
        "result": True,
        "changes": {},
        "comment": "every initramfs is current",
    }
    assert machine.runs_of("dracut") == []


def test_rescue_images_are_named(world, states, machine, test_mode):
    machine.module()
    rescue = world.write("/boot/initramfs-0-rescue-abc.img", "{}")
    assert states.initramfs_current("images")["comment"].endswith(f"; left as it is: {rescue}")


def test_a_failed_build_fails_and_shows_what_was_rebuilt(world, states, machine, test_mode):
    machine.module()
    machine.dracut_fault = lambda _content, target: (
        answer(1, stderr="no") if "6.12" in target.name else None
    )
    ret = states.initramfs_current("images")
    first, second = (str(machine.image(kernel)) for kernel in machine.kernels)
    if test_mode:
        assert (ret["result"], set(ret["changes"])) == (None, {first, second})
        return
    assert ret == {
        "name": "images",
        "result": False,
        "changes": {first: {"old": "stale: the ramboot module is not in it", "new": "current"}},
        "comment": f"kernel 6.12.0: dracut failed: exit status 1: no; {second} is as it was;"
        " rebuilt before: 6.1.0",
    }


@pytest.mark.usefixtures("test_mode")
@pytest.mark.parametrize("name", ["initramfs_room", "initramfs_current", "initramfs_restored"])
def test_a_boot_that_is_not_mounted_fails(states, machine, name):
    machine.module()
    machine.unmount_boot()
    ret = getattr(states, name)("images")
    assert (ret["result"], ret["changes"]) == (False, {})
    assert ret["comment"].endswith(": is it mounted?")


@pytest.mark.parametrize("fails", [True, False])
def test_images_that_can_not_be_read_after_a_rebuild_hide_nothing(world, states, fails):
    answers = [{"6.1.0": {"image": "/boot/i", "state": "stale", "reason": "old"}}]

    def initramfs():
        if not answers:
            raise CommandExecutionError("lsinitrd is gone")
        return answers.pop()

    def rebuild():
        if fails:
            raise CommandExecutionError("no room")

    world.salt.update({"ramboot.initramfs": initramfs, "ramboot.rebuild": rebuild})
    assert states.initramfs_current("images") == {
        "name": "images",
        "result": False,
        "changes": {},
        "comment": "no room" if fails else "lsinitrd is gone",
    }


def test_a_rebuild_that_changes_nothing_is_a_failure(world, states, machine):
    machine.module()
    world.salt["ramboot.rebuild"] = dict
    ret = states.initramfs_current("images")
    images = ", ".join(str(machine.image(kernel)) for kernel in machine.kernels)
    assert (ret["result"], ret["changes"]) == (False, {})
    assert ret["comment"] == f"rebuilt without an error and still stale: {images}"


@pytest.mark.parametrize("file", ["/etc/ramboot/ramboot.conf", f"{MODULE}/hooks/cleanup.sh"])
def test_files_that_this_run_would_write_make_images_stale(
    world, states, machine, test_mode, real, file
):
    machine.module()
    with real:
        states.initramfs_current("images")
    path = f"{world.root}{file}"
    states.__running__ = {"ramboot_|-x_|-x_|-installed": {"name": path, "changes": {"diff": "x"}}}
    ret = states.initramfs_current("images")
    if not test_mode:
        # the files are what they are by now
        assert ret["changes"] == {}
        return
    assert ret["result"] is None
    assert ret["changes"] == {
        str(machine.image(kernel)): {"old": f"stale: {path} would be changed", "new": "current"}
        for kernel in machine.kernels
    }


@pytest.mark.usefixtures("test_mode")
@pytest.mark.parametrize(
    ("tag", "file", "change"),
    [
        ("ramboot_|-x_|-x_|-installed", f"{MODULE}/ramboot-lib.sh", {"mode": "0644"}),
        ("ramboot_|-x_|-x_|-installed", f"{MODULE}/ramboot-lib.sh", {}),
        ("ramboot_|-x_|-x_|-installed", f"{MODULE}/manifest", {"diff": "x"}),
        ("ramboot_|-x_|-x_|-installed", "/usr/bin/ramboot", {"diff": "x"}),
        ("file_|-x_|-x_|-managed", "/etc/ramboot/ramboot.conf", {"diff": "x"}),
    ],
)
def test_what_is_in_no_image_makes_none_stale(
    world, states, machine, test_mode, real, tag, file, change
):
    machine.module()
    with real:
        states.initramfs_current("images")
    states.__running__ = {tag: {"name": f"{world.root}{file}", "changes": change}}
    assert states.initramfs_current("images")["changes"] == {}


@pytest.mark.parametrize("name", ["initramfs_current", "initramfs_restored"])
def test_beside_another_run_images_are_left_and_a_dry_run_asks_nobody(
    world, states, machine, test_mode, real, name
):
    machine.module()
    if name == "initramfs_restored":
        with real:
            states.initramfs_current("images")
        machine.no_module()
    Path(world.paths["initramfs_lock"]).parent.mkdir(parents=True, exist_ok=True)
    before = tree(world)
    with open(world.paths["initramfs_lock"], "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        ret = getattr(states, name)("images")
    if test_mode:
        assert (ret["result"], len(ret["changes"])) == (None, 2)
    else:
        assert (ret["result"], ret["changes"], ret["comment"]) == (
            False,
            {},
            "another run is rebuilding the initramfs; wait until it has ended",
        )
    assert tree(world) == before


# initramfs_restored


def test_images_are_restored(world, states, machine, test_mode, real):
    before = {kernel: machine.image(kernel).read_bytes() for kernel in machine.kernels}
    machine.module()
    with real:
        states.initramfs_current("images")
    machine.no_module()
    applied = tree(world)
    images = [str(machine.image(kernel)) for kernel in machine.kernels]
    assert states.initramfs_restored("images") == {
        "name": "images",
        "result": None if test_mode else True,
        "changes": {
            image: {"old": "with ramboot: ramboot built it", "new": "the original"}
            for image in images
        },
        "comment": f"{'would be restored' if test_mode else 'restored'}: {', '.join(images)}",
    }
    if test_mode:
        assert tree(world) == applied
    else:
        assert {kernel: machine.image(kernel).read_bytes() for kernel in before} == before


def test_what_a_cut_off_first_build_left_in_boot_is_removed_and_named(
    world, states, machine, test_mode
):
    before = tree(world)
    left = str(world.write("/boot/.ramboot-6.12.0.tmp", "half an im"))
    assert states.initramfs_restored("images") == {
        "name": "images",
        "result": None if test_mode else True,
        "changes": {left: {"old": "unfinished: a run that was cut off left it", "new": "absent"}},
        "comment": f"no initramfs to restore; {'would be ' if test_mode else ''}removed: {left}",
    }
    assert os.path.exists(left) is test_mode
    if not test_mode:
        assert tree(world) == before
        assert states.initramfs_restored("images")["changes"] == {}


@pytest.mark.usefixtures("test_mode")
def test_a_machine_that_never_had_us_has_no_image_to_restore(world, states, machine):
    before = tree(world)
    assert states.initramfs_restored("images") == {
        "name": "images",
        "result": True,
        "changes": {},
        "comment": "no initramfs to restore",
    }
    assert tree(world) == before


def test_an_image_that_others_replaced_is_left_and_named(world, states, machine, test_mode, real):
    machine.module()
    with real:
        states.initramfs_current("images")
    content = machine.stock("6.12.0")
    content["etc/new-firmware"] = ["0644", "x"]
    machine.put("6.12.0", content)
    machine.no_module()
    first, second = (str(machine.image(kernel)) for kernel in machine.kernels)
    left = world.salt["ramboot_record.outcome"](second)["comment"]
    ret = states.initramfs_restored("images")
    assert list(ret["changes"]) == [first]
    assert ret["comment"] == (
        f"{'would be restored' if test_mode else 'restored'}: {first}; {left}"
    )
    assert machine.inside("6.12.0") == content


def test_an_undo_that_changes_nothing_is_a_failure(world, states, machine):
    machine.module()
    states.initramfs_current("images")
    machine.no_module()
    world.salt["ramboot_initramfs.undo"] = dict
    ret = states.initramfs_restored("images")
    images = ", ".join(str(machine.image(kernel)) for kernel in machine.kernels)
    assert (ret["result"], ret["changes"]) == (False, {})
    assert ret["comment"] == f"restored without an error and still with ramboot: {images}"


def test_a_failed_undo_fails_with_the_reason(world, states, machine):
    def undo():
        raise CommandExecutionError("no room")

    machine.module()
    states.initramfs_current("images")
    world.salt["ramboot_initramfs.undo"] = undo
    assert states.initramfs_restored("images") == {
        "name": "images",
        "result": False,
        "changes": {},
        "comment": "no room",
    }


def test_a_failed_undo_shows_what_was_restored_before(world, states, machine):
    machine.module()
    states.initramfs_current("images")
    first, second = (str(machine.image(kernel)) for kernel in machine.kernels)
    # made by others, with our module: it has to be rebuilt
    machine.put("6.12.0", {**machine.built("6.12.0"), "etc/new-firmware": ["0644", "x"]})
    machine.no_module()
    machine.dracut_fault = lambda _content, _target: answer(1, stderr="no")
    assert states.initramfs_restored("images") == {
        "name": "images",
        "result": False,
        "changes": {first: {"old": "with ramboot: ramboot built it", "new": "the original"}},
        "comment": f"kernel 6.12.0: dracut failed: exit status 1: no; {second} is as it was;"
        f" done before: {first}",
    }


# module_not_asked_for


@pytest.mark.usefixtures("test_mode")
def test_the_module_may_go_when_nobody_asks_for_it(world, states, machine):
    assert states.module_not_asked_for("dracut") == {
        "name": "dracut",
        "result": True,
        "changes": {},
        "comment": "no other file asks dracut for the module ramboot",
    }


@pytest.mark.usefixtures("test_mode")
def test_the_module_stays_while_somebody_asks_for_it(world, states, machine):
    path = world.write("/etc/dracut.conf.d/mine.conf", 'add_dracutmodules+=" ramboot "\n')
    assert states.module_not_asked_for("dracut") == {
        "name": "dracut",
        "result": False,
        "changes": {},
        "comment": "the module ramboot stays, for dracut would fail without it: take it out of"
        f' these lines\n{path}:1: add_dracutmodules+=" ramboot "',
    }


# record_closed


def test_an_empty_record_is_removed(world, states, test_mode):
    path = world.write("/etc/x.conf", "x")
    world.salt["ramboot_record.keep"](str(path))
    world.salt["ramboot_record.forget"](str(path))
    assert states.record_closed("record") == {
        "name": "record",
        "result": None if test_mode else True,
        "changes": {"record": {"old": "empty", "new": "removed"}},
        "comment": f"the {'empty record would be' if test_mode else 'record was'} removed",
    }
    assert os.path.isdir(world.paths["record"]) is test_mode


@pytest.mark.usefixtures("test_mode")
def test_what_is_still_recorded_is_named(world, states):
    path = world.write("/etc/x.conf", "x")
    world.salt["ramboot_record.keep"](str(path))
    ret = states.record_closed("record")
    assert (ret["result"], ret["changes"]) == (True, {})
    assert ret["comment"] == f"still recorded: {path}"


def running(state, function, name, **result):
    tag = f"{state}_|-{name}_|-{name}_|-{function}"
    return {tag: {"name": str(name), "result": True, "changes": {}, **result}}


@pytest.mark.parametrize("failed", [False, True])
def test_what_this_run_would_leave_or_find_as_it_was_is_not_still_recorded(world, states, failed):
    left, same, image, menu = (
        str(world.write(path, "x")) for path in ("/etc/left", "/etc/same", "/boot/i", "/boot/g")
    )
    for path in (left, same, image, menu):
        world.salt["ramboot_record.keep"](path)
    world.write("/etc/left", "the user's")
    world.salt["ramboot_initramfs.undo_plan"] = lambda: {image: {"action": "leave"}}
    world.salt["ramboot_grub.undo_actions"] = lambda: {menu: "nothing"}
    world.opts["test"] = True
    states.__running__ = {
        **running("ramboot", "restored", left, result=not failed),
        **running("ramboot", "restored", same),
        **running("ramboot", "initramfs_restored", "images"),
        **running("ramboot_grub", "config_restored", "grub.cfg"),
        **running("test", "restored", "other"),
    }
    ret = states.record_closed("record")
    if failed:
        assert (ret["result"], ret["comment"]) == (True, f"still recorded: {left}")
    else:
        assert (ret["result"], ret["comment"]) == (None, "the empty record would be removed")


@pytest.mark.usefixtures("test_mode")
def test_without_a_record_there_is_nothing_to_close(world, states):
    assert states.record_closed("record") == {
        "name": "record",
        "result": True,
        "changes": {},
        "comment": "there is no record",
    }


def test_an_original_that_was_left_is_named_once(world, states, test_mode, real):
    path = world.write("/etc/x.conf", "the user's\n")
    with real:
        install(states, path)
    path.write_text("edited\n")
    with real:
        states.restored(str(path))
        ret = states.record_closed("record")
    (left,) = os.listdir(f"{world.paths['record']}/left")
    assert ret["comment"] == (f"the record was removed but for {world.paths['record']}/left/{left}")
    assert states.record_closed("record")["changes"] == {}
