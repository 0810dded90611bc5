# SPDX-License-Identifier: GPL-2.0-or-later
"""Images: what is current, how they are rebuilt, what a failure leaves, how they come back."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from salt.exceptions import CommandExecutionError

from conftest import unchanged

sys.path.insert(0, str(Path(__file__).parent))
from images import CONF, Machine, answer, sha  # noqa: E402

MODULE = "/usr/lib/dracut/modules.d/50ramboot"


@pytest.fixture
def machine(world):
    found = Machine(world)
    world.salt["cmd.run_all"] = found.run_all
    world.salt["ramboot_preflight.session_fault"] = lambda: None
    world.module("ramboot_config")
    world.module("ramboot_record")
    return found


@pytest.fixture
def initramfs(world, machine):
    module = world.module("ramboot_initramfs")
    if os.geteuid() != 0:
        real = world.salt["ramboot_record.look"]

        def as_root(path):
            found = real(path)
            return found and {**found, "uid": 0, "gid": 0}

        world.salt["ramboot_record.look"] = as_root
    return module


def state(machine, kernel, state, reason, module):
    image = str(machine.image(kernel))
    return {kernel: {"image": image, "module": module, "state": state, "reason": reason}}


def temporaries(machine):
    return sorted(path.name for path in (machine.world.root / "boot").glob(".*"))


# which images are current


def test_an_image_without_our_module_is_stale(machine, initramfs):
    machine.module()
    reason = "the ramboot module is not in it"
    assert initramfs.states() == {
        **state(machine, "6.1.0", "stale", reason, False),
        **state(machine, "6.12.0", "stale", reason, False),
    }


def test_an_image_built_from_what_is_on_disk_is_current(machine, initramfs):
    machine.module()
    machine.put("6.12.0", machine.built("6.12.0"))
    assert initramfs.states()["6.12.0"] == {
        "image": str(machine.image("6.12.0")),
        "module": True,
        "state": "current",
        "reason": None,
    }
    assert len(machine.commands) == 2, "one call of lsinitrd for each image"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.module(conf="version=2\n"), f"{CONF} differs from the one on disk"),
        (
            lambda m: m.module(**{"ramboot-lib.sh": "new\n"}),
            "usr/lib/ramboot/ramboot-lib.sh differs from the one on disk",
        ),
        (
            lambda m: m.module(**{"module-setup.sh": "new\n"}),
            "usr/lib/ramboot/module-setup.sh differs from the one on disk",
        ),
        (
            lambda m: (m.world.root / CONF).unlink(),
            "{root}/etc/ramboot/ramboot.conf is missing on disk",
        ),
        (
            lambda m: (m.world.root / MODULE[1:] / "manifest").unlink(),
            "the dracut module is not installed: {root}" + MODULE + "/manifest is missing",
        ),
        (
            lambda m: m.image("6.12.0").write_text("not cpio"),
            "{root}/boot/initramfs-6.12.0.img"
            " can't be read: exit status 1: cpio: premature end of archive",
        ),
        (lambda m: m.image("6.12.0").unlink(), "there is no image"),
    ],
    ids=["conf", "file", "setup", "no conf", "no module", "unreadable", "no image"],
)
def test_stale_says_why(machine, initramfs, change, reason):
    machine.module()
    machine.put("6.12.0", machine.built("6.12.0"))
    change(machine)
    found = initramfs.states()["6.12.0"]
    assert (found["state"], found["reason"]) == (
        "stale",
        reason.replace("{root}", str(machine.world.root)),
    )


@pytest.mark.parametrize("missing", [True, False])
def test_a_file_too_many_or_too_few_makes_an_image_stale(machine, initramfs, missing):
    machine.module()
    content = machine.built("6.12.0")
    if missing:
        del content["usr/lib/ramboot/ramboot-lib.sh"]
        reason = "usr/lib/ramboot/ramboot-lib.sh is not in it"
    else:
        content["usr/lib/ramboot/ramboot-old.sh"] = ["0644", ""]
        reason = "usr/lib/ramboot/ramboot-old.sh is in it but no longer on disk"
    machine.stamp(content)
    machine.put("6.12.0", content)
    assert initramfs.states()["6.12.0"]["reason"] == reason


def test_rescue_images_are_named_and_ignored(machine, initramfs):
    machine.module()
    rescue = machine.world.write("/boot/initramfs-0-rescue-abc.img", "{}")
    assert initramfs.states()["0-rescue-abc"] == {
        "image": str(rescue),
        "module": False,
        "state": "ignored",
        "reason": "a rescue image, left as the distribution made it",
    }
    initramfs.rebuild()
    assert rescue.read_text() == "{}"


def test_a_kernel_counts_with_modules_and_a_bootable_file(machine, initramfs):
    machine.module()
    machine.world.write("/usr/lib/modules/5.0.0/modules.dep")
    machine.world.write("/boot/vmlinuz-5.1.0")
    assert list(initramfs.states()) == ["6.1.0", "6.12.0"]
    assert list(initramfs.states("6.12.0")) == ["6.12.0"]
    assert initramfs.states("5.1.0") == {}


def test_debians_image_name_is_found_and_used_for_a_kernel_without_image(machine, initramfs):
    boot = machine.world.root / "boot"
    for kernel in machine.kernels:
        machine.image(kernel).rename(boot / f"initrd.img-{kernel}")
    machine.world.write("/usr/lib/modules/6.13.0/modules.dep")
    machine.world.write("/boot/vmlinuz-6.13.0")
    machine.module()
    assert [found["image"] for found in initramfs.states().values()] == [
        f"{boot}/initrd.img-{kernel}" for kernel in ("6.1.0", "6.12.0", "6.13.0")
    ]


# rebuild


def test_rebuild_makes_every_stale_image_current_and_touches_no_other(machine, initramfs):
    machine.module()
    machine.put("6.1.0", machine.built("6.1.0"))
    before = unchanged(machine.image("6.1.0"))
    done = initramfs.rebuild()
    assert done == {
        "6.1.0": {"image": str(machine.image("6.1.0")), "action": "kept", "reason": None},
        "6.12.0": {
            "image": str(machine.image("6.12.0")),
            "action": "rebuilt",
            "reason": "the ramboot module is not in it",
        },
    }
    assert unchanged(machine.image("6.1.0")) == before
    assert {found["state"] for found in initramfs.states().values()} == {"current"}
    assert machine.runs_of("dracut") == [
        ["dracut", "--force", "--kver", "6.12.0", ".ramboot-6.12.0.tmp"]
    ]
    assert stat.S_IMODE(machine.image("6.12.0").stat().st_mode) == 0o600
    assert temporaries(machine) == []


def test_rebuild_of_current_images_runs_no_dracut(machine, initramfs):
    machine.module()
    initramfs.rebuild()
    machine.commands.clear()
    assert {step["action"] for step in initramfs.rebuild().values()} == {"kept"}
    assert machine.runs_of("dracut") == []


def test_rebuild_of_one_kernel_by_force(machine, initramfs):
    machine.module()
    initramfs.rebuild()
    machine.commands.clear()
    done = initramfs.rebuild(kernel="6.1.0", force=True)
    assert done == {
        "6.1.0": {
            "image": str(machine.image("6.1.0")),
            "action": "rebuilt",
            "reason": "asked for",
        }
    }
    assert [command[3] for command in machine.runs_of("dracut")] == ["6.1.0"]


def test_a_kernel_without_an_image_gets_one(machine, initramfs):
    machine.module()
    machine.image("6.12.0").unlink()
    initramfs.rebuild()
    assert machine.inside("6.12.0") == machine.built("6.12.0")


def fails(_content, _target):
    return answer(1, stderr="dracut: line one\ndracut: Module 'x' cannot be found")


def killed(_content, target):
    target.write_text("half an im")
    return answer(-9)


def silent(_content, _target):
    return answer(0)


def truncated(_content, target):
    target.write_text("{")
    return answer(0)


def without(path):
    def fault(content, _target):
        del content[path]

    return fault


def other_text(path, text):
    def fault(content, _target):
        content[path][1] = text

    return fault


LIB = "usr/lib/ramboot/ramboot-lib.sh"
FAULTS = {
    "dracut fails": (
        fails,
        "dracut failed: exit status 1: dracut: line one | dracut: Module 'x' cannot be found",
    ),
    "dracut killed": (killed, "dracut failed: killed by signal 9"),
    "no image made": (silent, "dracut made no image: exit status 0"),
    "truncated": (
        truncated,
        "{new} can't be unpacked: exit status 2: cpio: premature end of archive",
    ),
    "no list of modules": (
        without("usr/lib/dracut/modules.txt"),
        "{new} is damaged or not made by dracut: it has no list of modules",
    ),
    "without LUKS module": (
        other_text("usr/lib/dracut/modules.txt", "base lvm ramboot"),
        "the new image is not good: the dracut module crypt of the old image is not in it; if that"
        " is meant, build the image with dracut once and apply again",
    ),
    "without LUKS program": (
        without("usr/lib/systemd/systemd-cryptsetup"),
        "the new image is not good: the program systemd-cryptsetup of the old image is not in it",
    ),
    "without LVM": (
        without("usr/bin/lvm"),
        "the new image is not good: the program lvm of the old image is not in it",
    ),
    "other kernel": (
        without("usr/lib/modules/6.12.0/modules.dep"),
        "the new image is not good: it has no modules of this kernel",
    ),
    "without our module": (
        other_text("usr/lib/dracut/modules.txt", "base crypt lvm"),
        "the new image is not good: the dracut module ramboot is not in it",
    ),
    "file of ours missing": (without(LIB), f"the new image is not good: {LIB} is not in it"),
    # the stamp would be right: it is the file itself that counts
    "wrong hash inside": (
        other_text(LIB, "bad\n"),
        f"the new image is not good: {LIB} in it has SHA-256 {sha('bad' + chr(10))}"
        f" instead of {sha('lib' + chr(10))}",
    ),
}


@pytest.mark.parametrize(("fault", "wanted"), FAULTS.values(), ids=FAULTS.keys())
def test_a_failed_build_leaves_the_old_image_and_says_why(machine, initramfs, fault, wanted):
    machine.module()
    before = machine.image("6.12.0").read_bytes()
    machine.dracut_fault = fault
    with pytest.raises(CommandExecutionError) as failure:
        initramfs.rebuild(kernel="6.12.0")
    image = machine.image("6.12.0")
    wanted = wanted.replace("{new}", str(image.parent / ".ramboot-6.12.0.tmp"))
    assert str(failure.value) == (
        f"kernel 6.12.0: {wanted}; {image} is as it was; nothing was rebuilt before"
    )
    assert image.read_bytes() == before
    assert temporaries(machine) == []
    assert machine.world.salt["ramboot_record.entries"]() == {}


def test_a_boot_that_is_read_only_does_not_hide_what_failed(machine, initramfs, monkeypatch):
    machine.module()
    machine.dracut_fault = fails
    unlink = os.unlink

    def read_only(path, **options):
        if str(path).endswith(".tmp"):
            raise OSError(30, "Read-only file system", path)
        unlink(path, **options)

    monkeypatch.setattr(initramfs.os, "unlink", read_only)
    with pytest.raises(CommandExecutionError, match=r"^kernel 6\.12\.0: .*; .* is as it was; "):
        initramfs.rebuild(kernel="6.12.0")


def test_a_failure_names_what_had_been_rebuilt_before_it(machine, initramfs):
    machine.module()
    machine.dracut_fault = lambda _content, target: fails(0, 0) if "6.12" in target.name else None
    with pytest.raises(CommandExecutionError) as failure:
        initramfs.rebuild()
    assert str(failure.value).endswith("is as it was; rebuilt before: 6.1.0")
    assert initramfs.states()["6.1.0"]["state"] == "current"


def test_a_module_that_only_a_generic_image_has_is_not_missed(machine, initramfs):
    machine.module()
    (machine.world.root / "usr/lib/dracut/modules.d/90btrfs").mkdir()
    content = machine.stock("6.12.0")
    content["usr/lib/dracut/modules.txt"][1] += "btrfs\n"
    machine.put("6.12.0", content)
    initramfs.rebuild()
    assert initramfs.states()["6.12.0"]["state"] == "current"


def test_a_module_that_dracut_no_longer_has_is_not_missed(machine, initramfs):
    machine.module()
    content = machine.stock("6.12.0")
    content["usr/lib/dracut/modules.txt"][1] += "retired\n"
    machine.put("6.12.0", content)
    initramfs.rebuild()
    assert initramfs.states()["6.12.0"]["state"] == "current"


@pytest.mark.parametrize(("shell", "good"), [("bash", True), ("", False)])
def test_another_shell_will_do(machine, initramfs, shell, good):
    for name in ("00bash", "00dash"):
        machine.world.write(f"/usr/lib/dracut/modules.d/{name}/module-setup.sh")
    machine.module()
    content = machine.stock("6.12.0")
    content["usr/lib/dracut/modules.txt"][1] += "dash\n"
    machine.put("6.12.0", content)

    def with_shell(built, _target):
        built["usr/lib/dracut/modules.txt"][1] += shell

    machine.dracut_fault = with_shell
    if good:
        initramfs.rebuild(kernel="6.12.0")
    else:
        with pytest.raises(CommandExecutionError, match="the dracut module dash of the old image"):
            initramfs.rebuild(kernel="6.12.0")


def test_a_full_boot_is_found_before_dracut_runs(machine, initramfs, monkeypatch):
    machine.module()
    image = machine.image("6.12.0")
    with image.open("ab") as large:
        large.write(b" " * (40 << 20))
    before = image.read_bytes()
    monkeypatch.setattr(
        initramfs.os, "statvfs", lambda _path: SimpleNamespace(f_bavail=65 << 8, f_frsize=4096)
    )
    with pytest.raises(CommandExecutionError) as failure:
        initramfs.rebuild(kernel="6.12.0")
    assert str(failure.value) == (
        f"kernel 6.12.0: 66 MiB are needed in {image.parent} to build beside the old image and"
        f" 65 MiB are free; {image} is as it was; nothing was rebuilt before"
    )
    assert machine.runs_of("dracut") == []
    assert image.read_bytes() == before


def test_room_is_wanted_for_stale_images_alone_and_costs_no_look_where_there_is_enough(
    machine, initramfs, monkeypatch
):
    machine.module()
    machine.put("6.1.0", machine.built("6.1.0"))
    assert initramfs.room_faults() == []
    assert machine.commands == []
    monkeypatch.setattr(
        initramfs.os, "statvfs", lambda _path: SimpleNamespace(f_bavail=15 << 8, f_frsize=4096)
    )
    assert initramfs.room_faults() == [
        f"kernel 6.12.0: 16 MiB are needed in {machine.world.root}/boot to build beside the old"
        " image and 15 MiB are free"
    ]


def test_a_power_cut_leaves_a_temporary_file_that_the_next_run_removes(machine, initramfs):
    machine.module()

    def cut(_content, target):
        target.write_text("half an im")
        raise KeyboardInterrupt

    left = machine.world.write("/boot/.ramboot-6.9.0.tmp", "half an im")
    machine.dracut_fault = cut
    with pytest.raises(KeyboardInterrupt):
        initramfs.rebuild()
    assert not left.exists()
    machine.dracut_fault = None
    initramfs.rebuild()
    assert temporaries(machine) == []


def test_a_power_cut_between_rename_and_seal_can_be_undone(machine, initramfs, monkeypatch):
    machine.module()
    machine.put("6.12.0", {**machine.stock("6.12.0"), "etc/firmware": ["0644", "as it was"]})
    before = machine.image("6.12.0").read_bytes()

    def cut(_path):
        raise KeyboardInterrupt

    monkeypatch.setitem(machine.world.salt, "ramboot_record.seal", cut)
    with pytest.raises(KeyboardInterrupt):
        initramfs.rebuild(kernel="6.12.0")
    assert initramfs.states()["6.12.0"]["state"] == "current"
    machine.no_module()
    initramfs.undo()
    assert machine.image("6.12.0").read_bytes() == before


def test_the_old_image_is_in_place_until_the_new_one_is_synced(machine, initramfs, monkeypatch):
    machine.module()
    events = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)

        def noted(*arguments, name=name, real=real):
            what = (
                arguments[0] if name == "rename" else os.readlink(f"/proc/self/fd/{arguments[0]}")
            )
            events.append((name, os.path.basename(what)))
            return real(*arguments)

        monkeypatch.setattr(initramfs.os, name, noted)
    initramfs.rebuild(kernel="6.12.0")
    new = ".ramboot-6.12.0.tmp"
    ours = [event for event in events if event[1] in (new, "boot")]
    # the seal syncs once more
    assert ours[:3] == [("fsync", new), ("rename", new), ("fsync", "boot")]


@pytest.mark.parametrize("name", ["rebuild", "undo"])
def test_two_runs_at_once_are_refused(machine, initramfs, name):
    machine.module()
    busy = "another run is rebuilding the initramfs; wait until it has ended"

    def meanwhile(_content, target):
        target.write_text("half an im")
        for again in (initramfs.rebuild, initramfs.undo):
            with pytest.raises(CommandExecutionError) as refused:
                again()
            assert str(refused.value) == busy
        assert target.read_text() == "half an im"

    if name == "undo":
        # of others, with our module: it is rebuilt without
        machine.put("6.12.0", machine.built("6.12.0"))
        machine.no_module()
    machine.dracut_fault = meanwhile
    getattr(initramfs, name)()
    assert machine.runs_of("dracut")
    assert temporaries(machine) == []


def test_a_run_that_ended_holds_up_no_other(machine, initramfs):
    """Whether it failed or not, and in the same process."""
    machine.module()
    machine.dracut_fault = fails
    with pytest.raises(CommandExecutionError):
        initramfs.rebuild()
    machine.dracut_fault = None
    initramfs.rebuild()
    machine.no_module()
    initramfs.undo()
    assert machine.world.salt["ramboot_record.entries"]() == {}


def test_rebuild_refuses_in_a_ram_session(machine, initramfs, monkeypatch):
    machine.module()
    monkeypatch.setitem(
        machine.world.salt, "ramboot_preflight.session_fault", lambda: "/ is on zram"
    )
    with pytest.raises(CommandExecutionError) as failure:
        initramfs.rebuild()
    assert str(failure.value) == "nothing was rebuilt: / is on zram"
    assert machine.commands == []


def test_rebuild_refuses_when_files_of_ours_lack(machine, initramfs):
    with pytest.raises(CommandExecutionError) as failure:
        initramfs.rebuild()
    assert str(failure.value) == (
        "nothing was rebuilt: the dracut module is not installed: "
        f"{machine.world.root}{MODULE}/manifest is missing; apply the state ramboot.initramfs first"
    )
    assert machine.commands == []


def test_rebuild_refuses_an_unknown_kernel(machine, initramfs):
    machine.module()
    with pytest.raises(CommandExecutionError) as failure:
        initramfs.rebuild(kernel="6.99.0")
    assert str(failure.value) == (
        "nothing was rebuilt: there is no kernel '6.99.0'; installed: 6.1.0, 6.12.0"
    )
    assert machine.runs_of("dracut") == []


def test_a_manifest_that_is_not_one_is_refused(machine, initramfs):
    machine.module()
    machine.world.write(f"{MODULE}/manifest", "abc\n")
    with pytest.raises(CommandExecutionError) as failure:
        initramfs.states()
    assert str(failure.value) == (
        f"{machine.world.root}{MODULE}/manifest line 1 is not SHA256 MODE PATH IMAGE_PATH: 'abc'"
    )


def test_originals_go_with_their_kernel(machine, initramfs):
    machine.module()
    initramfs.rebuild()
    machine.remove_kernel("6.1.0")
    initramfs.rebuild(force=True)
    assert list(machine.world.salt["ramboot_record.entries"]()) == [str(machine.image("6.12.0"))]


def test_originals_of_a_kernel_whose_modules_are_there_stay(machine, initramfs):
    machine.module()
    initramfs.rebuild()
    machine.image("6.1.0").unlink()
    (machine.world.root / "boot/vmlinuz-6.1.0").unlink()
    initramfs.rebuild(force=True)
    assert len(machine.world.salt["ramboot_record.entries"]()) == 2


def test_what_a_cut_off_run_left_in_boot_takes_no_room(machine, initramfs, monkeypatch):
    machine.module()
    boot = Path(f"{machine.world.root}/boot")
    machine.world.write("/boot/.ramboot-6.9.0.tmp", "x" * (4 << 20))

    def room(_path):
        used = sum(path.stat().st_size for path in boot.iterdir())
        return SimpleNamespace(f_bavail=(18 << 20) - used, f_frsize=1)

    monkeypatch.setattr(initramfs.os, "statvfs", room)
    assert initramfs.room_faults() == []
    initramfs.rebuild()


def test_two_runs_that_are_cut_off_leave_the_original_known(machine, initramfs, monkeypatch):
    """The first before it vouched for its image, the second, of another pillar, before it wrote."""
    machine.module()
    machine.put("6.12.0", {**machine.stock("6.12.0"), "etc/firmware": ["0644", "as it was"]})
    before = machine.image("6.12.0").read_bytes()

    def cut(*_arguments, **_named):
        raise KeyboardInterrupt

    for function, conf in (("seal", "version=1\n"), ("settle", "version=1\nother=1\n")):
        machine.module(conf=conf)
        with monkeypatch.context() as cutting:
            cutting.setitem(machine.world.salt, f"ramboot_record.{function}", cut)
            with pytest.raises(KeyboardInterrupt):
                initramfs.rebuild(kernel="6.12.0")
    initramfs.rebuild(kernel="6.12.0")
    machine.no_module()
    initramfs.undo()
    assert machine.image("6.12.0").read_bytes() == before


@pytest.mark.parametrize(
    "name", ["states", "room_faults", "rebuild", "undo_plan", "undo_room_faults", "undo"]
)
def test_a_boot_that_is_not_mounted_is_told_and_costs_no_original(machine, initramfs, name):
    before = machine.image("6.12.0").read_bytes()
    machine.module()
    initramfs.rebuild()
    machine.unmount_boot()
    with pytest.raises(CommandExecutionError) as failure:
        getattr(initramfs, name)()
    root = machine.world.root
    assert str(failure.value) == (
        f"{root}/boot has no kernel of those in {root}/usr/lib/modules: is it mounted?"
    )
    machine.mount_boot()
    machine.no_module()
    initramfs.undo()
    assert machine.image("6.12.0").read_bytes() == before


# undo


def test_what_a_cut_off_first_build_left_in_boot_goes_with_the_undo(machine, initramfs):
    left = str(machine.world.write("/boot/.ramboot-6.9.0.tmp", "half an im"))
    step = {"kernel": None, "action": "remove", "reason": "a run that was cut off left it"}
    assert initramfs.undo_plan() == {left: step}
    assert os.path.exists(left)
    assert initramfs.undo() == {left: step}
    assert temporaries(machine) == []
    assert initramfs.undo() == {}


def applied(machine, initramfs):
    machine.module()
    initramfs.rebuild()
    machine.commands.clear()


def test_an_image_that_we_built_gets_its_original_bytes_back(machine, initramfs):
    before = {kernel: machine.image(kernel).read_bytes() for kernel in machine.kernels}
    applied(machine, initramfs)
    machine.no_module()
    plan = initramfs.undo()
    assert plan == {
        str(machine.image(kernel)): {
            "kernel": kernel,
            "action": "restore",
            "reason": "ramboot built it",
        }
        for kernel in machine.kernels
    }
    assert {kernel: machine.image(kernel).read_bytes() for kernel in machine.kernels} == before
    assert machine.runs_of("dracut") == []
    assert initramfs.undo_plan() == {}


def test_after_two_rebuilds_the_first_original_comes_back(machine, initramfs):
    before = machine.image("6.12.0").read_bytes()
    applied(machine, initramfs)
    machine.module(conf="version=2\n")
    initramfs.rebuild()
    machine.no_module()
    initramfs.undo()
    assert machine.image("6.12.0").read_bytes() == before


@pytest.mark.parametrize(
    "path",
    [
        "/etc/crypttab",
        "/etc/vconsole.conf",
        "/etc/dracut.conf.d/mine.conf",
        "/usr/lib/sysimage/rpm/rpmdb.sqlite",
    ],
)
@pytest.mark.parametrize("there", [True, False], ids=["changed", "new"])
def test_an_original_older_than_what_images_are_made_from_does_not_come_back(
    machine, initramfs, path, there
):
    """A forced rebuild took up a new keymap; the original would refuse the passphrase."""
    if there:
        machine.world.write(path, "old")
    applied(machine, initramfs)
    machine.world.write(path, "newer")
    initramfs.rebuild(force=True)
    machine.no_module()
    image = str(machine.image("6.12.0"))
    before = machine.image("6.12.0").read_bytes()
    assert initramfs.undo_plan()[image] == {
        "kernel": "6.12.0",
        "action": "rebuild",
        "reason": "the configuration or the packages that images are made from may be others than"
        " those of its original",
    }
    assert machine.image("6.12.0").read_bytes() == before
    machine.commands.clear()
    initramfs.undo()
    assert machine.inside("6.12.0") == machine.stock("6.12.0")
    assert len(machine.runs_of("dracut")) == 2
    assert machine.world.salt["ramboot_record.entries"]() == {}
    assert initramfs.undo_plan() == {}


def grow(image, size):
    with image.open("ab") as large:
        large.write(b" " * (size << 20))


def free(initramfs, monkeypatch, size):
    """That many MiB in /boot."""
    found = SimpleNamespace(f_bavail=size << 8, f_frsize=4096)
    monkeypatch.setattr(initramfs.os, "statvfs", lambda _path: found)


def test_room_is_wanted_for_what_the_undo_writes_beside_each_image(machine, initramfs, monkeypatch):
    boot = machine.world.root / "boot"
    # the first original leaves less room to the second
    for kernel in machine.kernels:
        grow(machine.image(kernel), 40)
    applied(machine, initramfs)
    machine.no_module()
    free(initramfs, monkeypatch, 82)
    assert initramfs.undo_room_faults() == []
    free(initramfs, monkeypatch, 79)
    assert initramfs.undo_room_faults() == [
        f"kernel 6.12.0: 40 MiB are needed in {boot} to put the original beside the image and"
        " 39 MiB are free"
    ]
    # with newer packages both are built
    machine.world.write("/usr/lib/sysimage/rpm/rpmdb.sqlite", "newer")
    free(initramfs, monkeypatch, 15)
    assert initramfs.undo_room_faults() == [
        f"kernel {kernel}: 16 MiB are needed in {boot} to build beside the old image and"
        " 15 MiB are free"
        for kernel in machine.kernels
    ]
    free(initramfs, monkeypatch, 17)
    assert initramfs.undo_room_faults() == []
    initramfs.undo()
    assert initramfs.undo_room_faults() == []


def test_what_the_undo_deletes_makes_room(machine, initramfs, monkeypatch):
    machine.image("6.1.0").unlink()
    grow(machine.image("6.12.0"), 40)
    applied(machine, initramfs)
    machine.no_module()
    size = machine.image("6.1.0").stat().st_size
    original = len(json.dumps(machine.stock("6.12.0"))) + (40 << 20)
    found = SimpleNamespace(f_bavail=original - size, f_frsize=1)
    monkeypatch.setattr(initramfs.os, "statvfs", lambda _path: found)
    assert initramfs.undo_room_faults() == []
    found.f_bavail -= 1
    assert len(initramfs.undo_room_faults()) == 1


def test_an_original_of_which_an_earlier_version_noted_nothing_does_not_come_back(
    machine, initramfs
):
    applied(machine, initramfs)
    record = machine.world.root / "var/lib/ramboot/record.json"
    found = json.loads(record.read_text())
    for entry in found["paths"].values():
        entry["original"].pop("remark", None)
    record.write_text(json.dumps(found))
    machine.no_module()
    assert {step["action"] for step in initramfs.undo().values()} == {"rebuild"}
    assert machine.inside("6.12.0") == machine.stock("6.12.0")


def test_our_own_files_are_no_newer_configuration(machine, initramfs):
    machine.world.write("/etc/crypttab", "luks-1")
    before = machine.image("6.12.0").read_bytes()
    applied(machine, initramfs)
    (machine.world.root / "etc/dracut.conf.d/50-ramboot.conf").unlink()
    machine.no_module()
    initramfs.undo()
    assert machine.runs_of("dracut") == []
    assert machine.image("6.12.0").read_bytes() == before


def test_an_image_built_by_others_with_our_module_is_rebuilt_without(machine, initramfs):
    applied(machine, initramfs)
    content = machine.built("6.12.0")
    content["etc/new-firmware"] = ["0644", "x"]
    machine.put("6.12.0", content)
    machine.no_module()
    plan = initramfs.undo()
    assert plan[str(machine.image("6.12.0"))] == {
        "kernel": "6.12.0",
        "action": "rebuild",
        "reason": "it holds the ramboot module but is not the image that ramboot built",
    }
    assert machine.inside("6.12.0") == machine.stock("6.12.0")
    assert [command[3] for command in machine.runs_of("dracut")] == ["6.12.0"]
    assert machine.world.salt["ramboot_record.entries"]() == {}


def test_an_original_that_others_replaced_since_is_not_brought_back_later(machine, initramfs):
    applied(machine, initramfs)
    # the distribution rebuilds the image, our module included, and a later apply rebuilds again
    content = machine.built("6.12.0")
    content["etc/new-firmware"] = ["0644", "x"]
    machine.put("6.12.0", content)
    machine.module(conf="version=2\n")
    initramfs.rebuild()
    machine.no_module()
    assert initramfs.undo()[str(machine.image("6.12.0"))]["action"] == "rebuild"
    assert machine.inside("6.12.0") == machine.stock("6.12.0")


def test_an_image_replaced_without_our_module_is_the_original_of_a_later_apply(machine, initramfs):
    applied(machine, initramfs)
    content = machine.stock("6.12.0")
    content["etc/new-firmware"] = ["0644", "x"]
    machine.put("6.12.0", content)
    initramfs.rebuild()
    machine.no_module()
    initramfs.undo()
    assert machine.inside("6.12.0") == content


def test_an_image_replaced_without_our_module_stays(machine, initramfs):
    applied(machine, initramfs)
    content = machine.stock("6.12.0")
    content["etc/new-firmware"] = ["0644", "x"]
    machine.put("6.12.0", content)
    machine.no_module()
    image = str(machine.image("6.12.0"))
    wanted = machine.world.salt["ramboot_record.outcome"](image)["comment"]
    assert initramfs.undo()[image] == {"kernel": "6.12.0", "action": "leave", "reason": wanted}
    assert machine.inside("6.12.0") == content
    assert machine.world.salt["ramboot_record.entries"]() == {}


def damaged(image):
    image.write_bytes(image.read_bytes()[:-9])


def deleted(image):
    image.unlink()


@pytest.mark.parametrize("spoil", [damaged, deleted])
def test_an_image_that_is_damaged_or_deleted_is_left_and_its_original_kept(
    machine, initramfs, spoil
):
    image = machine.image("6.12.0")
    before = image.read_bytes()
    applied(machine, initramfs)
    spoil(image)
    found = image.read_bytes() if image.exists() else None
    machine.no_module()
    step = initramfs.undo()[str(image)]
    assert step["action"] == "leave"
    told, _, kept = step["reason"].rpartition("; its original is kept as ")
    assert Path(kept).read_bytes() == before
    assert told.endswith(
        f"{image} was {'changed' if found else 'deleted'} after ramboot wrote it and is left as it"
        " is"
    )
    assert (image.read_bytes() if image.exists() else None) == found
    assert machine.world.salt["ramboot_record.entries"]() == {}


@pytest.mark.parametrize("spoil", [damaged, deleted])
def test_an_image_that_is_damaged_or_deleted_is_no_original_of_a_later_apply(
    machine, initramfs, spoil
):
    image = machine.image("6.12.0")
    before = image.read_bytes()
    applied(machine, initramfs)
    spoil(image)
    initramfs.rebuild()
    assert initramfs.states()["6.12.0"]["state"] == "current"
    machine.no_module()
    assert initramfs.undo()[str(image)]["action"] == "restore"
    assert image.read_bytes() == before


def test_an_image_of_a_kernel_installed_later_is_rebuilt_without(machine, initramfs):
    applied(machine, initramfs)
    machine.world.write("/usr/lib/modules/6.13.0/modules.dep")
    machine.world.write("/boot/vmlinuz-6.13.0")
    machine.put("6.13.0", machine.built("6.13.0"))
    machine.no_module()
    initramfs.undo()
    assert machine.inside("6.13.0") == machine.stock("6.13.0")


@pytest.mark.parametrize("spoil", [damaged, deleted])
def test_an_image_whose_original_is_lost_is_rebuilt_without(machine, initramfs, spoil):
    applied(machine, initramfs)
    image = str(machine.image("6.12.0"))
    name = machine.world.salt["ramboot_record.entries"]()[image]["original"]["store"]
    stored = machine.world.root / "var/lib/ramboot/originals" / name
    spoil(stored)
    machine.no_module()
    assert initramfs.undo()[image] == {
        "kernel": "6.12.0",
        "action": "rebuild",
        "reason": f"the stored original of {image} ({stored}) is missing or damaged",
    }
    assert machine.inside("6.12.0") == machine.stock("6.12.0")
    assert initramfs.undo_plan() == {}


def test_what_only_our_module_had_brought_may_go_with_it(machine, initramfs):
    """On a disk without LUKS and LVM, dm and its programs are there for us alone."""
    plain = {
        "usr/lib/dracut/modules.txt": ["0644", "base\n"],
        "usr/lib/modules/6.12.0/modules.dep": ["0644", ""],
    }
    with_us = {**machine.stock("6.12.0"), "usr/lib/ramboot/stamp": ["0644", "0  usr/x\n"]}
    del with_us["usr/lib/systemd/systemd-cryptsetup"]
    with_us["usr/lib/dracut/modules.txt"] = ["0644", "base\ndm\nramboot\n"]
    machine.world.write("/usr/lib/dracut/modules.d/90dm/module-setup.sh")
    machine.put("6.12.0", with_us)
    machine.dracut_fault = lambda built, _target: (built.clear(), built.update(plain))[2:] or None
    initramfs.undo()
    assert machine.inside("6.12.0") == plain


def test_an_undo_does_not_lose_luks_and_lvm(machine, initramfs):
    machine.put("6.12.0", {**machine.stock("6.12.0"), "usr/lib/ramboot/stamp": ["0644", "0  x\n"]})
    before = machine.image("6.12.0").read_bytes()

    def fault(built, _target):
        built["usr/lib/dracut/modules.txt"][1] = "base\ncrypt\nlvm\n"
        del built["usr/bin/lvm"], built["usr/bin/dmsetup"]

    machine.dracut_fault = fault
    with pytest.raises(CommandExecutionError) as failure:
        initramfs.undo()
    assert (
        "the program dmsetup of the old image is not in it; "
        "the program lvm of the old image is not in it" in str(failure.value)
    )
    assert machine.image("6.12.0").read_bytes() == before


def test_where_there_was_no_image_there_is_none_again(machine, initramfs):
    machine.image("6.12.0").unlink()
    applied(machine, initramfs)
    machine.no_module()
    assert initramfs.undo()[str(machine.image("6.12.0"))]["action"] == "delete"
    assert not machine.image("6.12.0").exists()


def test_the_image_of_a_removed_kernel_does_not_come_back(machine, initramfs):
    applied(machine, initramfs)
    machine.remove_kernel("6.1.0")
    machine.no_module()
    assert initramfs.undo()[str(machine.image("6.1.0"))] == {
        "kernel": "6.1.0",
        "action": "forget",
        "reason": "its kernel is no longer installed",
    }
    assert not machine.image("6.1.0").exists()
    assert machine.world.salt["ramboot_record.entries"]() == {}


def test_an_image_that_its_kernel_left_behind_gets_its_original_bytes_back(machine, initramfs):
    before = machine.image("6.1.0").read_bytes()
    applied(machine, initramfs)
    content = machine.image("6.1.0").read_bytes()
    machine.remove_kernel("6.1.0")
    machine.world.write("/usr/lib/sysimage/rpm/rpmdb.sqlite", "without it")
    machine.image("6.1.0").write_bytes(content)
    machine.no_module()
    initramfs.undo()
    assert machine.image("6.1.0").read_bytes() == before


def test_a_machine_that_never_had_us_is_not_touched(machine, initramfs):
    assert initramfs.undo() == {}
    assert machine.runs_of("dracut") == []


def test_a_machine_without_lsinitrd_is_not_touched(machine, initramfs):
    (machine.world.root / "usr/bin/lsinitrd").unlink()
    assert initramfs.undo() == {}
    assert machine.commands == []


def test_an_image_that_cannot_be_read_is_left_and_named(machine, initramfs):
    machine.image("6.12.0").write_text("not cpio")
    image = str(machine.image("6.12.0"))
    assert initramfs.undo() == {
        image: {
            "kernel": "6.12.0",
            "action": "leave",
            "reason": f"{image} can't be read: exit status 1: cpio: premature end of archive;"
            f" {image} is not recorded as ours and is left as it is",
        }
    }
    assert machine.image("6.12.0").read_text() == "not cpio"


def test_undo_goes_on_after_a_failure_and_names_both(machine, initramfs):
    before = machine.image("6.1.0").read_bytes()
    applied(machine, initramfs)
    content = machine.built("6.12.0")
    content["etc/new-firmware"] = ["0644", "x"]
    machine.put("6.12.0", content)
    machine.no_module()
    machine.dracut_fault = fails
    with pytest.raises(CommandExecutionError) as failure:
        initramfs.undo()
    image = machine.image("6.12.0")
    assert str(failure.value) == (
        "kernel 6.12.0: dracut failed: exit status 1: dracut: line one | dracut: Module 'x' cannot"
        f" be found; {image} is as it was; done before: {machine.image('6.1.0')}"
    )
    assert machine.inside("6.12.0") == content
    assert machine.image("6.1.0").read_bytes() == before
    machine.dracut_fault = None
    initramfs.undo()
    assert machine.inside("6.12.0") == machine.stock("6.12.0")


def test_undo_does_not_take_an_image_that_still_has_the_module(machine, initramfs):
    applied(machine, initramfs)
    content = machine.built("6.12.0")
    content["etc/new-firmware"] = ["0644", "x"]
    machine.put("6.12.0", content)
    # the module is still on disk
    with pytest.raises(CommandExecutionError) as failure:
        initramfs.undo()
    assert "the dracut module ramboot is still in it" in str(failure.value)
    assert machine.inside("6.12.0") == content


def test_undo_looks_into_the_image_that_it_built(machine, initramfs):
    machine.put("6.12.0", {**machine.stock("6.12.0"), "usr/lib/ramboot/stamp": ["0644", "0  x\n"]})

    def fault(built, _target):
        built["usr/lib/ramboot/stamp"] = ["0644", "0  x\n"]

    machine.dracut_fault = fault
    with pytest.raises(CommandExecutionError) as failure:
        initramfs.undo()
    assert str(failure.value) == (
        f"{machine.image('6.12.0')} still holds the ramboot module; done before: none"
    )


@pytest.mark.parametrize(
    ("path", "line", "found"),
    [
        ("/etc/dracut.conf", 'add_dracutmodules+=" ramboot "', True),
        ("/etc/dracut.conf.d/mine.conf", 'force_add_dracutmodules+=" a ramboot b "', True),
        ("/usr/lib/dracut/dracut.conf.d/x.conf", '  dracutmodules+="ramboot"', True),
        ("/etc/dracut.conf.d/mine.conf", 'omit_dracutmodules+=" ramboot "', False),
        ("/etc/dracut.conf.d/mine.conf", '# add_dracutmodules+=" ramboot "', False),
        ("/etc/dracut.conf.d/mine.txt", 'add_dracutmodules+=" ramboot "', False),
        ("/etc/dracut.conf.d/mine.conf", 'add_dracutmodules+=" myramboots "', False),
    ],
)
def test_who_else_asks_dracut_for_our_module(machine, initramfs, path, line, found):
    machine.world.write(path, f"# comment\n{line}\n")
    wanted = [f"{machine.world.root}{path}:2: {line.strip()}"] if found else []
    assert initramfs.asked_for() == wanted


def test_our_own_configuration_counts_only_when_it_will_stay(world, machine, initramfs):
    record = world.salt
    path = f"{world.root}/etc/dracut.conf.d/50-ramboot.conf"
    text = 'add_dracutmodules+=" ramboot "\n'
    record["ramboot_record.keep"](path)
    record["ramboot_record.intend"](path, sha(text))
    world.write("/etc/dracut.conf.d/50-ramboot.conf", text)
    assert initramfs.asked_for() == []
    world.write("/etc/dracut.conf.d/50-ramboot.conf", text + "# mine\n")
    assert initramfs.asked_for() == [f"{path}:1: {text.strip()}"]


# verify


def sealed(world, path, text):
    """As ramboot.installed leaves it."""
    world.salt["ramboot_record.keep"](f"{world.root}{path}")
    world.write(path, text)
    world.salt["ramboot_record.seal"](f"{world.root}{path}")


def test_verify_of_a_sound_installation_has_no_faults(world, machine, initramfs):
    sealed(world, f"/{CONF}", "version=1\n")
    sealed(world, "/usr/bin/ramboot", "command\n")
    applied(machine, initramfs)
    found = initramfs.verify()
    assert found["faults"] == []
    lib = {
        "expected": sha("lib\n"),
        "actual": sha("lib\n"),
        "mode": "0644",
        "owner": "root:root",
        "verdict": "good",
    }
    assert found["disk"][f"{world.root}{MODULE}/ramboot-lib.sh"] == lib
    assert set(found["disk"]) == {
        f"{world.root}{path}"
        for path in (
            f"{MODULE}/module-setup.sh",
            f"{MODULE}/ramboot-lib.sh",
            f"{MODULE}/ramboot-initramfs.sh",
            f"{MODULE}/hooks/pre-mount.sh",
            "/etc/dracut.conf.d/50-ramboot.conf",
            f"/{CONF}",
            "/usr/bin/ramboot",
        )
    }
    inside = found["initramfs"][str(machine.image("6.12.0"))]
    assert inside[LIB] == lib
    assert set(inside) == {
        LIB,
        "usr/bin/ramboot-initramfs",
        "usr/lib/ramboot/module-setup.sh",
        "usr/lib/ramboot/hooks/pre-mount.sh",
        CONF,
    }
    assert len(machine.commands) == 2, "one call of lsinitrd for each image"


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda w: w.write(f"{MODULE}/ramboot-lib.sh", "x"), "{root}{m}/ramboot-lib.sh: changed"),
        (
            lambda w: (w.root / MODULE[1:] / "module-setup.sh").unlink(),
            "{root}{m}/module-setup.sh: missing",
        ),
        (
            lambda w: (w.root / MODULE[1:] / "module-setup.sh").chmod(0o644),
            "{root}{m}/module-setup.sh: wrong mode",
        ),
        (lambda w: w.write(f"/{CONF}", "mode=zram\n"), "{root}/" + CONF + ": changed"),
        (lambda w: (w.root / CONF).chmod(0o664), "{root}/" + CONF + ": wrong mode"),
    ],
    ids=["changed", "missing", "mode", "conf", "conf's mode"],
)
def test_verify_finds_what_was_changed_on_disk(world, machine, initramfs, spoil, fault):
    sealed(world, f"/{CONF}", "version=1\n")
    applied(machine, initramfs)
    spoil(world)
    root = str(world.root)
    assert initramfs.verify()["faults"] == [fault.replace("{root}", root).replace("{m}", MODULE)]


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda c: c[LIB].__setitem__(1, "bad"), f"{LIB} in {{image}}: changed"),
        (lambda c: c.pop(CONF), f"{CONF} in {{image}}: missing"),
        (lambda c: c[LIB].__setitem__(0, "0755"), f"{LIB} in {{image}}: wrong mode"),
        (
            lambda c: c.update({"usr/lib/ramboot/evil.sh": ["0755", ""]}),
            "usr/lib/ramboot/evil.sh in {image}: unexpected",
        ),
    ],
    ids=["changed", "missing", "mode", "unexpected"],
)
def test_verify_looks_at_the_files_in_the_image_not_at_its_stamp(
    world, machine, initramfs, spoil, fault
):
    sealed(world, f"/{CONF}", "version=1\n")
    applied(machine, initramfs)
    content = machine.inside("6.12.0")
    spoil(content)
    machine.put("6.12.0", content)
    image = str(machine.image("6.12.0"))
    assert initramfs.verify()["faults"] == [fault.replace("{image}", image)]


def test_verify_names_a_wrong_owner(world, machine, initramfs):
    sealed(world, f"/{CONF}", "version=1\n")
    applied(machine, initramfs)
    real = world.salt["ramboot_record.look"]

    def of_a_user(path):
        found = real(path)
        if path.endswith("50ramboot/ramboot-lib.sh"):
            found["uid"] = found["gid"] = 1000
        return found

    world.salt["ramboot_record.look"] = of_a_user
    assert initramfs.verify()["faults"] == [f"{world.root}{MODULE}/ramboot-lib.sh: wrong owner"]


def test_verify_without_an_installation_is_an_error(machine, initramfs):
    with pytest.raises(CommandExecutionError) as failure:
        initramfs.verify()
    assert str(failure.value) == (
        f"the dracut module is not installed: {machine.world.root}{MODULE}/manifest is missing"
    )


def test_verify_does_not_call_images_good_that_it_can_not_see(world, machine, initramfs):
    """As in a RAM session, where /boot is not mounted."""
    sealed(world, f"/{CONF}", "version=1\n")
    applied(machine, initramfs)
    (world.root / "boot").rename(world.root / "disks-boot")
    report = initramfs.verify()
    assert report["initramfs"] == {}
    (fault,) = report["faults"]
    assert fault.startswith("no initramfs was looked at: ")
    assert fault.endswith("is it mounted?")


def test_verify_names_a_kernel_without_an_image(world, machine, initramfs):
    sealed(world, f"/{CONF}", "version=1\n")
    applied(machine, initramfs)
    machine.image("6.1.0").unlink()
    assert initramfs.verify()["faults"] == [f"kernel 6.1.0 has no image {machine.image('6.1.0')}"]
