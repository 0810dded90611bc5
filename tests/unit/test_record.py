# SPDX-License-Identifier: GPL-2.0-or-later
"""The record of originals: what absent may touch, and what it must leave."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError


@pytest.fixture
def record(world):
    (world.root / "var/lib").mkdir(parents=True)
    world.module("ramboot_config")
    return world.module("ramboot_record")


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def change(record, path, text):
    """One change of ours, in the order that the record asks for."""
    record.keep(str(path))
    record.intend(str(path), sha(text))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return record.seal(str(path))


def facts(path):
    info = path.stat()
    return path.read_bytes(), stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid


def tree(world):
    return {
        str(path.relative_to(world.root)): facts(path) if path.is_file() else None
        for path in world.root.rglob("*")
    }


def test_look_sees_regular_files_alone(world, record):
    path = world.write("/etc/ours", "x", mode=0o640)
    link = path.with_name("link")
    link.symlink_to(path)
    info = path.stat()
    assert record.look(str(path)) == {
        "sha256": sha("x"),
        "mode": "0640",
        "uid": info.st_uid,
        "gid": info.st_gid,
    }
    for other in (link, path.parent, path / "below", path.with_name("none")):
        assert record.look(str(other)) is None
    with pytest.raises(CommandExecutionError, match="is not a regular file and is left alone"):
        record.keep(str(link))


def test_a_changed_file_comes_back_with_bytes_mode_and_owner(world, record):
    path = world.write("/etc/default/grub", b"old\xff\r\n", mode=0o640)
    if os.geteuid() == 0:
        os.chown(path, 12, 34)
    before = tree(world)
    assert change(record, path, "ours\n") == sha("ours\n")
    path.chmod(0o600)
    assert record.verdict(str(path)) == "ours"
    assert record.restore(str(path)) == {
        "verdict": "ours",
        "action": "restored",
        "comment": f"{path}: original put back",
    }
    record.close()
    assert tree(world) == before


def test_a_file_that_was_not_there_goes_with_the_directories_made_for_it(world, record):
    (world.root / "etc").mkdir()
    before = tree(world)
    first, second = world.root / "etc/ramboot/deep/a.conf", world.root / "etc/ramboot/b.conf"
    change(record, first, "a")
    change(record, second, "b")
    assert record.restore(str(second))["action"] == "deleted"
    assert first.exists()
    assert record.restore(str(first))["action"] == "deleted"
    assert record.close() == {
        "removed": [world.paths["record"]],
        "left": [],
    }
    assert tree(world) == before


def test_a_directory_of_ours_with_a_file_of_the_users_stays(world, record):
    path = world.root / "etc/ramboot/a.conf"
    change(record, path, "a")
    (path.parent / "notes").write_text("mine")
    record.restore(str(path))
    assert not path.exists()
    assert (path.parent / "notes").read_text() == "mine"


def test_what_the_user_changed_since_stays_and_the_original_is_kept_beside(world, record):
    path = world.write("/etc/default/grub", "old")
    change(record, path, "ours")
    path.write_text("the user's")
    kept = f"{world.paths['record']}/left/"
    done = record.restore(str(path))
    assert (done["verdict"], done["action"]) == ("changed-by-user", "left")
    assert path.read_text() == "the user's"
    (left,) = os.listdir(kept)
    assert done["comment"] == (
        f"{path} was changed after ramboot wrote it and is left as it is; "
        f"its original is kept as {kept}{left}"
    )
    assert Path(kept + left).read_text() == "old"
    assert record.verdict(str(path)) == "not-recorded"
    assert record.close()["left"] == [kept + left]


@pytest.mark.parametrize("follows", ["apply", "absent"])
def test_an_undo_cut_off_before_it_forgets_a_changed_file_loses_no_original(
    world, record, monkeypatch, follows
):
    path = world.write("/etc/default/grub", "old")
    change(record, path, "ours")
    path.write_text("the user's")
    with monkeypatch.context() as patch:
        patch.setattr(record, "forget", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            record.restore(str(path))
    if follows == "apply":
        change(record, path, "ours again")
        assert record.original_fault(str(path)) is None
        assert record.restore(str(path))["action"] == "restored"
        assert path.read_text() == "old"
    else:
        assert record.restore(str(path))["action"] == "left"
        assert path.read_text() == "the user's"
    (left,) = record.close()["left"]
    assert Path(left).read_text() == "old"


def test_what_the_user_changed_becomes_the_original_of_a_later_apply(world, record):
    path = world.write("/etc/default/grub", "old")
    change(record, path, "ours")
    path.write_text("the user's")
    record.restore(str(path))
    change(record, path, "ours again")
    assert record.restore(str(path))["action"] == "restored"
    assert path.read_text() == "the user's"


def test_a_file_that_the_user_deleted_stays_deleted(world, record):
    path = world.write("/etc/default/grub", "old")
    change(record, path, "ours")
    path.unlink()
    done = record.restore(str(path))
    assert (done["verdict"], done["action"]) == ("missing", "left")
    assert not path.exists()


def test_our_new_file_that_the_user_deleted_is_as_before(world, record):
    path = world.root / "usr/bin/ramboot"
    change(record, path, "ours")
    path.unlink()
    assert record.restore(str(path)) == {
        "verdict": "original",
        "action": "nothing",
        "comment": f"{path} is as it was before",
    }
    assert record.entries() == {}


def test_never_recorded_and_not_there_is_nothing_to_undo(world, record):
    path = f"{world.root}/usr/bin/ramboot"
    assert record.restore(path) == {
        "verdict": "not-recorded",
        "action": "nothing",
        "comment": f"{path} is not there and is not recorded: nothing to undo",
    }
    assert tree(world) == {"var": None, "var/lib": None}


def test_never_recorded_but_there_is_somebody_elses(world, record):
    path = world.write("/usr/bin/ramboot", "another program")
    assert record.restore(str(path)) == {
        "verdict": "not-recorded",
        "action": "left",
        "comment": f"{path} is not recorded as ours and is left as it is",
    }
    assert path.read_text() == "another program"


def test_the_original_is_kept_once(world, record):
    path = world.write("/etc/default/grub", "old")
    change(record, path, "first")
    change(record, path, "second")
    record.restore(str(path))
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("cut", "found", "verdict", "after"),
    [
        ("kept", "old", "original", "old"),
        ("intended", "old", "original", "old"),
        ("written", "ours", "ours", "old"),
        ("half", "ou", "changed-by-user", "ou"),
    ],
)
def test_a_power_cut_at_any_step_can_be_undone(world, record, cut, found, verdict, after):
    path = world.write("/etc/default/grub", "old")
    record.keep(str(path))
    if cut != "kept":
        record.intend(str(path), sha("ours"))
    path.write_text(found)
    assert record.verdict(str(path)) == verdict
    record.restore(str(path))
    assert path.read_text() == after


@pytest.mark.parametrize("found", ["first", "second"])
def test_a_power_cut_in_a_second_apply_leaves_ours_the_old_or_the_new(world, record, found):
    path = world.write("/etc/default/grub", "old")
    change(record, path, "first")
    record.intend(str(path), sha("second"))
    path.write_text(found)
    assert record.verdict(str(path)) == "ours"
    record.restore(str(path))
    assert path.read_text() == "old"


def test_a_second_cut_before_the_write_does_not_hide_what_the_first_left(world, record):
    path = world.root / "etc/ours"
    path.parent.mkdir()
    record.keep(str(path))
    record.intend(str(path), sha("first"))
    path.write_text("first")
    record.intend(str(path), sha("second"))
    assert record.verdict(str(path)) == "ours"
    path.write_text("second")
    assert record.verdict(str(path)) == "ours"
    path.write_text("third")
    assert record.verdict(str(path)) == "changed-by-user"


@pytest.mark.parametrize("there", [True, False])
def test_a_new_file_that_is_empty_still_is_ours(world, record, there):
    """Salt makes it so before it writes (salt/modules/file.py, manage_file)."""
    path = world.root / "etc/ours"
    path.parent.mkdir()
    if there:
        path.write_text("the user's")
    record.keep(str(path))
    record.intend(str(path), sha("ours"))
    path.write_text("")
    assert record.verdict(str(path)) == ("changed-by-user" if there else "ours")


def test_an_undo_that_was_cut_off_can_be_repeated(world, record, monkeypatch):
    path = world.write("/etc/default/grub", "old")
    change(record, path, "ours")

    def power_cut(_path):
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "forget", power_cut)
    with pytest.raises(KeyboardInterrupt):
        record.restore(str(path))
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert record.restore(str(path))["verdict"] == "original"
    assert record.entries() == {}


def test_a_damaged_original_is_never_put_back(world, record):
    path = world.write("/etc/default/grub", "old")
    entry = record.keep(str(path))
    record.intend(str(path), sha("ours"))
    path.write_text("ours")
    stored = f"{world.paths['record']}/originals/{entry['original']['store']}"
    with open(stored, "w") as damaged:
        damaged.write("0ld")
    with pytest.raises(CommandExecutionError) as failure:
        record.restore(str(path))
    assert str(failure.value) == (
        f"the stored original of {path} ({stored}) is missing or damaged; {path} is left alone"
    )
    assert path.read_text() == "ours"


def test_a_damaged_record_is_an_error_and_not_an_empty_one(world, record):
    path = world.write("/etc/default/grub", "old")
    change(record, path, "ours")
    with open(f"{world.paths['record']}/record.json", "w") as damaged:
        damaged.write("{")
    with pytest.raises(CommandExecutionError) as failure:
        record.restore(str(path))
    assert str(failure.value).startswith(f"{world.paths['record']}/record.json is damaged (")
    assert path.read_text() == "ours"


def test_a_record_of_another_format_is_left_alone(world, record):
    world.write("/var/lib/ramboot/record.json", '{"schema": 99}')
    with pytest.raises(CommandExecutionError) as failure:
        record.entries()
    assert str(failure.value) == (
        f"{world.paths['record']}/record.json has another format than this version's; left alone"
    )


def test_a_seal_that_does_not_hold_what_was_intended_is_refused(world, record):
    path = world.write("/etc/default/grub", "old")
    record.keep(str(path))
    record.intend(str(path), sha("ours"))
    path.write_text("not ours")
    with pytest.raises(CommandExecutionError) as failure:
        record.seal(str(path))
    assert str(failure.value) == (
        f"{path} holds SHA-256 {sha('not ours')}; {sha('ours')} was to be written"
    )


def test_a_file_is_on_the_disk_before_its_seal_is(world, record, monkeypatch):
    path = world.write("/etc/default/grub", "old")
    record.keep(str(path))
    record.intend(str(path), sha("ours"))
    path.write_text("ours")
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    record.seal(str(path))
    assert synced[:2] == [str(path), str(path.parent)]
    assert synced[2].startswith(f"{world.paths['record']}/.ramboot-record.json.")
    synced.clear()
    record.seal(str(path))
    assert synced == [], "nothing is new"


def test_nothing_is_intended_or_sealed_before_it_was_kept(world, record):
    path = world.write("/etc/default/grub", "old")
    wanted = f"{path} must be kept in the record before it is changed"
    with pytest.raises(CommandExecutionError) as failure:
        record.intend(str(path), sha("ours"))
    assert str(failure.value) == wanted
    with pytest.raises(CommandExecutionError) as failure:
        record.seal(str(path))
    assert str(failure.value) == wanted


@pytest.mark.parametrize("bad", ["", "x" * 64, sha("a").upper(), sha("a")[:-1]])
def test_an_intended_hash_must_be_one(world, record, bad):
    path = str(world.write("/etc/default/grub", "old"))
    record.keep(path)
    with pytest.raises(CommandExecutionError) as failure:
        record.intend(path, bad)
    assert str(failure.value) == f"{path}: {bad!r} is not a SHA-256 in lower-case hex"


def test_links_directories_and_relative_paths_are_not_recorded(world, record):
    target = world.write("/etc/target", "old")
    link = world.root / "etc/link"
    link.symlink_to(target)
    for path, wanted in (
        (str(link), f"{link} is not a regular file and is left alone"),
        (str(target.parent), f"{target.parent} is not a regular file and is left alone"),
        ("etc/target", "etc/target can't be recorded: not an absolute path"),
    ):
        with pytest.raises(CommandExecutionError) as failure:
            record.keep(path)
        assert str(failure.value) == wanted
    assert record.entries() == {}


def test_the_record_is_for_root_only(world, record):
    record.keep(str(world.write("/etc/default/grub", "secret")))
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in (world.root / "var/lib/ramboot").rglob("*")
    }
    assert stat.S_IMODE(os.stat(world.paths["record"]).st_mode) == 0o700
    assert set(modes.values()) == {0o700, 0o600}
    assert modes["record.json"] == 0o600


def test_forget_drops_entry_and_original_and_touches_nothing_else(world, record):
    path = world.write("/boot/initramfs-1.img", "image")
    change(record, path, "new image")
    assert record.forget(str(path)) is True
    assert record.forget(str(path)) is False
    assert path.read_text() == "new image"
    assert os.listdir(f"{world.paths['record']}/originals") == []


def test_a_full_disk_while_the_original_is_stored_leaves_no_trace(world, record, monkeypatch):
    path = world.write("/etc/default/grub", "old")

    real = os.fsync

    def full(handle):
        if stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(record.os, "fsync", full)
    with pytest.raises(CommandExecutionError) as failure:
        record.keep(str(path))
    assert str(failure.value) == (
        f"the original of {path} can't be stored: [Errno 28] No space left on device"
    )
    monkeypatch.undo()
    assert record.entries() == {}
    assert not any(path.is_file() for path in (world.root / "var").rglob("*"))


def test_close_keeps_the_directory_while_something_is_recorded(world, record):
    path = world.write("/etc/default/grub", "old")
    record.keep(str(path))
    assert record.closable() is False
    assert record.close() == {"removed": [], "left": [str(path)]}
    record.forget(str(path))
    assert record.closable() is True


def test_close_leaves_what_other_parts_have_in_the_directory(world, record):
    other = world.write("/var/lib/ramboot/swap.json", "{}")
    record.keep(str(world.write("/etc/default/grub", "old")))
    record.forget(f"{world.root}/etc/default/grub")
    assert record.close() == {
        "removed": [f"{world.paths['record']}/originals"],
        "left": [str(other)],
    }
    # so that a second absent has nothing to report
    assert record.closable() is False


def test_close_sweeps_up_an_original_that_was_never_recorded(world, record):
    world.write("/var/lib/ramboot/originals/0123-grub", "half")
    world.write("/var/lib/ramboot/.ramboot-record.json.abcd_123", "half")
    assert record.closable() is True
    record.close()
    assert not os.path.exists(world.paths["record"])


def test_close_removes_what_a_cut_in_the_first_write_of_each_part_left(world, record):
    for name in ("record", "swap", "grub"):
        world.write(f"/var/lib/ramboot/.ramboot-{name}.json.abcd_123", "half")
    assert record.closable() is True
    assert record.close() == {"removed": [world.paths["record"]], "left": []}
    assert record.closable() is False


# Files, whole or not at all


def writers(world, record):
    """Each way in which the formula replaces a file, as a function of the path."""

    def settle(path):
        new = path.with_name("new")
        new.write_text("new")
        record.settle(str(new), str(path))

    return {
        "replace": lambda path: record.replace(str(path), b"new"),
        "settle": settle,
        "write": lambda path: record.write(str(path), {"new": 1}),
        "restore": lambda path: record.restore(str(path)),
    }


@pytest.fixture(params=["replace", "settle", "write", "restore"])
def writer(request, world, record):
    return writers(world, record)[request.param]


@pytest.fixture
def target(world, record):
    """A file that we changed, so that each of the writers has something to do."""
    path = world.write("/etc/file", "old", mode=0o640)
    change(record, path, "ours")
    return path


def test_a_file_is_synced_before_its_name_is_and_its_directory_after(target, writer, monkeypatch):
    events = []
    real = {name: getattr(os, name) for name in ("fchown", "fchmod", "fsync", "rename")}

    def noted(name, first, *rest):
        shown = (first, *rest) if name == "rename" else (os.readlink(f"/proc/self/fd/{first}"),)
        real[name](first, *rest)
        events.append((name, *shown))

    for name in real:
        monkeypatch.setattr(os, name, lambda *args, name=name: noted(name, *args))
    writer(target)
    new = events[0][1]
    assert os.path.dirname(new) == str(target.parent)
    # restoring goes on to write the record
    assert events[:4] == [
        ("fchmod", new),
        ("fsync", new),
        ("rename", new, str(target)),
        ("fsync", str(target.parent)),
    ]


def test_a_file_of_ours_is_gone_from_the_disk_with_its_empty_directory(world, record, monkeypatch):
    mine, other = world.write("/var/lib/ramboot/mine.json"), world.write("/var/lib/ramboot/other")
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    record.remove(str(mine))
    assert not mine.exists()
    assert other.exists()
    assert synced == [str(mine.parent)]
    record.remove(str(other))
    assert not mine.parent.exists()
    assert synced[1:] == [str(mine.parent.parent)]
    record.remove(str(mine))
    assert len(synced) == 2


@pytest.mark.parametrize("fails", ["fsync", "fchmod", "rename"])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(target, writer, monkeypatch, fails):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    old = (target.read_bytes(), target.stat().st_ino, target.stat().st_mtime_ns)
    monkeypatch.setattr(os, fails, full)
    with pytest.raises((OSError, CommandExecutionError), match="No space left"):
        writer(target)
    monkeypatch.undo()
    assert (target.read_bytes(), target.stat().st_ino, target.stat().st_mtime_ns) == old
    # settle's caller made that one, and it is its to delete
    assert {path.name for path in target.parent.iterdir()} <= {"file", "new"}


@pytest.mark.parametrize("name", ["file", "file[ab]*"])
@pytest.mark.parametrize("how", ["replace", "write", "restore", "leave", "remove"])
def test_what_a_power_cut_left_beside_a_file_goes_and_nothing_else(world, record, how, name):
    path = world.write(f"/etc/x/{name}", "old")
    change(record, path, "ours")
    others = {
        world.write(f"/etc/x/.ramboot-{other}")
        for other in (
            f"{name}.abcd_12", f"{name}.abcd_1234", f"{name}.ABCDEFGH", f"{name}.conf.abcd_123",
            "filea.abcd_123", "other.abcd_123",
        )
    }  # fmt: skip
    world.write(f"/etc/x/.ramboot-{name}.abcd_123", "half")
    if how == "remove":
        record.remove(str(path))
    elif how == "leave":
        path.write_text("the user's")
        record.restore(str(path))
    else:
        writers(world, record)[how](path)
    assert set(path.parent.iterdir()) - {path} == others


@pytest.mark.parametrize("writer", ["replace", "settle"], indirect=True)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_mode_and_owner_stay_set_id_bits_too(target, writer):
    os.chown(target, 12, 34)
    target.chmod(0o6750)
    writer(target)
    info = target.stat()
    assert target.read_text() == "new"
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o6750, 12, 34)


def test_replace_takes_mode_and_owner_of_another_file(world, record):
    source = world.write("/etc/source", "x", mode=0o604)
    target = world.root / "etc/target"
    record.replace(str(target), "caf\xe9", like=str(source))
    assert (target.read_bytes(), stat.S_IMODE(target.stat().st_mode)) == (b"caf\xc3\xa9", 0o604)


def test_a_new_file_is_roots_alone(world, record):
    target = world.write("/etc/beside").with_name("target")
    record.replace(str(target), b"new")
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_settle_gives_the_mode_that_is_asked_for(target, record):
    new = target.with_name("new")
    new.write_text("new")
    record.settle(str(new), str(target), mode="0600")
    assert (target.read_text(), stat.S_IMODE(target.stat().st_mode)) == ("new", 0o600)
    assert not new.exists()


def test_what_the_check_refuses_does_not_take_the_place(target, record):
    def refuse(path):
        with open(path, encoding="utf-8") as written:
            raise CommandExecutionError(f"{written.read()} is refused")

    with pytest.raises(CommandExecutionError, match="new is refused"):
        record.replace(str(target), b"new", check=refuse)
    assert target.read_text() == "ours"
    assert os.listdir(target.parent) == ["file"]
