# SPDX-License-Identifier: GPL-2.0-or-later
"""What stood in each place before ramboot changed it, so that absent can put it back.

The record is a directory of root's (0700): `record.json` says for each path what was there
(bytes, mode, owner, or nothing), what we meant to write and what we wrote; `originals/` holds the
bytes; `left/` holds originals of files that the user changed afterwards and that therefore stay.

A change goes: keep, intend, write, seal. Each step is on the disk before the next begins, so after
a power cut at any moment the path holds either the original, or what was intended, or what was
sealed before; content that is none of these is somebody else's work and is never touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, BinaryIO

from salt.exceptions import CommandExecutionError

# Salt's loader sets it
__salt__: dict[str, Any]

__virtualname__ = "ramboot_record"

SCHEMA = 1


def __virtual__() -> str:
    return __virtualname__


# Questions


def entries() -> dict[str, dict[str, Any]]:
    """
    Every recorded path.

    Returns {path: {"original": {"sha256": str, "mode": "0644", "uid": int, "gid": int,
    "store": file name below originals/, "remark": text, if `keep` got one} or None when nothing
    was there, "intended": SHA-256 of a write that was begun and not sealed, or None, "sealed":
    SHA-256 of what we wrote, or None}}.

    Raises CommandExecutionError when record.json can't be understood.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.entries
    """
    return _load()["paths"]


def verdict(path: str) -> str:
    """
    Whose content is at `path` now.

    path
        absolute path of a file.

    Returns one of
    `not-recorded` (we never changed it),
    `original` (as it was before us: same bytes, mode and owner, or absent as before),
    `ours` (what we wrote, or were about to write when we were interrupted),
    `missing` (there was a file before us and there is none now),
    `changed-by-user` (none of these).

    Raises CommandExecutionError when record.json can't be understood, or a recorded path
    has become something else than a regular file.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.verdict /etc/dracut.conf.d/50-ramboot.conf
    """
    entry = entries().get(path)
    if entry is None:
        return "not-recorded"
    original = entry["original"]
    now = _look(path)
    if now is None:
        return "original" if original is None else "missing"
    if original is not None and _same(now, original):
        return "original"
    if now["sha256"] in (entry["sealed"], entry["intended"]):
        return "ours"
    # file.managed makes a new file empty before it writes it (salt/modules/file.py, manage_file)
    if original is None and entry["intended"] and now["sha256"] == hashlib.sha256().hexdigest():
        return "ours"
    if original is not None and now["sha256"] == original["sha256"]:
        return "original"
    return "changed-by-user"


def outcome(path: str) -> dict[str, str]:
    """
    What `restore` would do with `path`, and why. Changes nothing.

    path
        absolute path of a file.

    Returns {"verdict": as above, "action": "restored" | "deleted" | "nothing" | "left",
    "comment": one sentence}. `left` means that the file stays for the user to decide.

    Raises CommandExecutionError as `verdict` does.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.outcome /usr/bin/ramboot
    """
    entry = entries().get(path)
    found = verdict(path)
    if entry is None:
        if os.path.lexists(path):
            comment = f"{path} is not recorded as ours and is left as it is"
            return {"verdict": found, "action": "left", "comment": comment}
        comment = f"{path} is not there and is not recorded: nothing to undo"
        return {"verdict": found, "action": "nothing", "comment": comment}
    original = entry["original"]
    if found == "ours" and original is None:
        return {"verdict": found, "action": "deleted", "comment": f"{path}: ours, deleted"}
    if found == "ours":
        return {"verdict": found, "action": "restored", "comment": f"{path}: original put back"}
    if found == "original":
        return {"verdict": found, "action": "nothing", "comment": f"{path} is as it was before"}
    what = "was deleted" if found == "missing" else "was changed"
    comment = f"{path} {what} after ramboot wrote it and is left as it is"
    if original is not None:
        comment += f"; its original is kept as {_left(original)}"
    return {"verdict": found, "action": "left", "comment": comment}


def look(path: str) -> dict[str, Any] | None:
    """
    Hash, mode and owner of a file, recorded or not.

    path
        absolute path.

    Returns {"sha256": str, "mode": "0644", "uid": int, "gid": int}; None when there is no regular
    file (a symbolic link is none).

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.look /usr/bin/ramboot
    """
    try:
        info = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(info.st_mode):
        return None
    return {
        "sha256": _hash(path),
        "mode": f"{stat.S_IMODE(info.st_mode):04o}",
        "uid": info.st_uid,
        "gid": info.st_gid,
    }


def judge(
    found: dict[str, Any] | None, sha256: str | None, mode: str | None = None
) -> dict[str, Any]:
    """
    Whether a file is as it was shipped, and root's alone to change.

    found
        as `look` returns it.
    sha256
        what it should have; None: it should not be there.
    mode
        likewise. Default: any in which nobody but root can change it.

    Returns {"expected": sha256, "actual": SHA-256 or None, "mode": "0644" or None, "owner":
    "root:root" or "UID:GID" or None, "verdict": "good" | "changed" | "missing" | "unexpected" |
    "wrong mode" | "wrong owner"}.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.judge null 9f86d081884c7d65...
    """
    if found is None:
        told = {"actual": None, "mode": None, "owner": None}
        return {"expected": sha256, **told, "verdict": "missing"}
    ids = (found["uid"], found["gid"])
    owner = "root:root" if ids == (0, 0) else "{}:{}".format(*ids)
    if sha256 is None:
        verdict = "unexpected"
    elif found["sha256"] != sha256:
        verdict = "changed"
    elif int(found["mode"], 8) & 0o022 if mode is None else found["mode"] != mode:
        verdict = "wrong mode"
    elif owner != "root:root":
        verdict = "wrong owner"
    else:
        verdict = "good"
    return {
        "expected": sha256,
        "actual": found["sha256"],
        "mode": found["mode"],
        "owner": owner,
        "verdict": verdict,
    }


def original_fault(path: str) -> str | None:
    """
    Why the original of `path` can't be put back; None when it can, or nothing was there.

    path
        absolute path of a file.

    Raises CommandExecutionError when record.json can't be understood.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.original_fault /boot/initramfs-6.12.1.img
    """
    kept = _kept(path)
    if not kept:
        return None
    stored = _stored(kept)
    if os.path.isfile(stored) and _hash(stored) == kept["sha256"]:
        return None
    return f"the stored original of {path} ({stored}) is missing or damaged"


def original(path: str) -> str | None:
    """
    Where the original of `path` is stored; None when it is not recorded or nothing was there.

    path
        absolute path of a file.

    Raises CommandExecutionError when record.json can't be understood.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.original /boot/initramfs-6.12.1.img
    """
    kept = _kept(path)
    return _stored(kept) if kept else None


def leftovers(place: str) -> list[str]:
    """
    Temporary files of ours that a run which was cut off left. Changes nothing.

    place
        absolute path of a file: those beside it that were to take its place. Of a directory: all in
        it, whatever they were to become.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.leftovers /etc/fstab
    """
    if os.path.isdir(place):
        return sorted(glob.glob(os.path.join(glob.escape(place), ".ramboot-*")))
    # as mkstemp names them
    prefix = os.path.join(os.path.dirname(place), _prefix(place))
    return sorted(glob.glob(glob.escape(prefix) + 8 * "[a-z0-9_]"))


# Actions


def keep(path: str, remark: str | None = None) -> dict[str, Any]:
    """
    Record what is at `path` before our first change; later calls change nothing.

    path
        absolute path of a regular file, or of nothing (its missing parent directories are noted
        as well, to be removed with it).
    remark
        what the caller has to know of the original later. Default: nothing.

    Returns the path's entry as in `entries`. Raises CommandExecutionError when `path` is
    relative, a directory, a symbolic link or a device, or when the original can't be stored.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.keep /etc/default/grub
    """
    if not os.path.isabs(path):
        raise CommandExecutionError(f"{path} can't be recorded: not an absolute path")
    record = _load()
    if path in record["paths"]:
        return record["paths"][path]
    original = _look(path)
    if original is not None:
        original["store"] = _store_name(path)
        if remark is not None:
            original["remark"] = remark
        _store(path, original)
    parent = os.path.dirname(path)
    while not os.path.isdir(parent) and parent not in record["directories"]:
        record["directories"].append(parent)
        parent = os.path.dirname(parent)
    record["paths"][path] = {"original": original, "intended": None, "sealed": None}
    write(_file(), record)
    return record["paths"][path]


def intend(path: str, sha256: str) -> None:
    """
    Note the hash of what is about to be written to `path`, before the write.

    path
        absolute path of a file that was kept.
    sha256
        hexadecimal SHA-256 of the new content.

    Raises CommandExecutionError when `path` was not kept first or the hash is not one.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.intend /usr/bin/ramboot 9f86d081884c7d65...
    """
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise CommandExecutionError(f"{path}: {sha256!r} is not a SHA-256 in lower-case hex")
    record = _load()
    entry = _entry(record, path)
    if entry["intended"] not in (None, entry["sealed"], sha256):
        # a write that was cut off before its seal may be what is there; this note must not hide it
        now = _look(path)
        if now is not None and now["sha256"] == entry["intended"]:
            entry["sealed"] = entry["intended"]
    entry["intended"] = sha256
    write(_file(), record)


def seal(path: str) -> str:
    """
    Note the hash of what we have just written to `path`, once it is on the disk.

    path
        absolute path of a file that was kept.

    Returns the SHA-256. Raises CommandExecutionError when `path` was not kept first, is not
    there, or does not hold what was intended.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.seal /usr/bin/ramboot
    """
    record = _load()
    entry = _entry(record, path)
    now = _look(path)
    if now is None:
        raise CommandExecutionError(f"{path} is not there although it was just written")
    if entry["intended"] not in (None, now["sha256"]):
        raise CommandExecutionError(
            f"{path} holds SHA-256 {now['sha256']}; {entry['intended']} was to be written"
        )
    if (entry["sealed"], entry["intended"]) != (now["sha256"], None):
        # file.managed leaves that to the kernel
        _sync(path)
        _sync(os.path.dirname(path))
        entry["sealed"], entry["intended"] = now["sha256"], None
        write(_file(), record)
    return now["sha256"]


def restore(path: str) -> dict[str, str]:
    """
    Put the original of `path` back, or delete what we made, if it still is what we wrote.

    A file that somebody changed or deleted since stays as it is and leaves the record; its
    original moves to `left/`. Directories that we made are removed when they are empty.

    path
        absolute path of a file; of one that is not recorded nothing is changed.

    Returns what was done, as `outcome`. Raises CommandExecutionError when the stored original is
    missing or damaged; nothing is changed then.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.restore /usr/bin/ramboot
    """
    done = outcome(path)
    entry = entries().get(path)
    if entry is None:
        return done
    original = entry["original"]
    if done["action"] == "restored":
        _put_back(path, original)
    elif done["action"] == "deleted":
        os.unlink(path)
        _sync(os.path.dirname(path))
    elif done["action"] == "left" and original is not None:
        _keep_left(original)
    sweep(path)
    forget(path)
    return done


def forget(path: str) -> bool:
    """
    Drop `path` from the record together with its stored original; the file itself stays.

    Also removes those of the directories we made that are empty by now.

    path
        absolute path of a file.

    Returns whether anything was recorded.

    Raises CommandExecutionError when record.json can't be understood, OSError when it can't be
    written.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.forget /boot/initramfs-6.12.1.img
    """
    record = _load()
    entry = record["paths"].pop(path, None)
    if entry is None:
        return False
    if entry["original"] is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_stored(entry["original"]))
    kept = []
    for directory in sorted(record["directories"], key=len, reverse=True):
        if os.path.lexists(directory) and not _remove_if_empty(directory):
            kept.append(directory)
    record["directories"] = kept
    write(_file(), record)
    return True


def closable() -> bool:
    """
    Whether nothing is recorded any more and `close` would remove something.

    Raises CommandExecutionError when record.json can't be understood.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.closable
    """
    if not os.path.isdir(_directory()) or entries():
        return False
    ours = (_file(), _originals(), *leftovers(_directory()))
    return any(os.path.lexists(path) for path in ours) or not os.listdir(_directory())


def close() -> dict[str, list[str]]:
    """
    Remove the record's directory when nothing is recorded any more.

    Returns {"removed": [paths removed], "left": [files still there, with a reason to be: paths
    still recorded, or originals in left/]}.

    Raises CommandExecutionError when record.json can't be understood, OSError when what is left
    over can't be deleted.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.close
    """
    top = _directory()
    if not os.path.isdir(top):
        return {"removed": [], "left": []}
    recorded = sorted(entries())
    if recorded:
        return {"removed": [], "left": recorded}
    # nothing in these is referred to any more: unfinished copies of an interrupted keep
    originals = _originals()
    removed = []
    if os.path.isdir(originals):
        for name in os.listdir(originals):
            os.unlink(os.path.join(originals, name))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_file())
    sweep(top)
    for directory in (originals, os.path.join(top, "left"), top):
        if os.path.isdir(directory) and _remove_if_empty(directory):
            removed.append(directory)
    left = [os.path.join(root, name) for root, _, names in os.walk(top) for name in names]
    return {"removed": removed, "left": sorted(left)}


# Files, whole or not at all


def write(path: str, content: dict[str, Any]) -> None:
    """
    Replace a file of our own state, whole or not at all, also when power goes; root's alone.

    path
        absolute path; its directory is made when it is missing.
    content
        what becomes JSON.

    Raises OSError when it can't be written; what was there is untouched then.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.write /var/lib/ramboot/mine.json '{"schema": 1}'
    """
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    _make_directory(os.path.dirname(path))
    _write_beside(path, [text.encode()], mode=0o600)


def remove(path: str) -> None:
    """
    Delete a file of our own state, as `write` makes it, and its directory if that is empty then.

    path
        absolute path; nothing happens where there is no such file.

    Gone from the disk when this returns.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.remove /var/lib/ramboot/mine.json
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sweep(path)
    directory = os.path.dirname(path)
    if os.path.isdir(directory):
        # other parts may keep theirs here
        _sync(os.path.dirname(directory) if _remove_if_empty(directory) else directory)


def sweep(place: str) -> None:
    """
    Delete what `leftovers` names; one that can't be deleted stays, and stands in nobody's way.

    place
        as for `leftovers`.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.sweep /etc/fstab
    """
    for path in leftovers(place):
        with contextlib.suppress(OSError):
            os.unlink(path)


def replace(
    path: str,
    content: bytes | str,
    like: str | None = None,
    check: Callable[[str], None] | None = None,
) -> None:
    """
    Replace a file of the system, whole or not at all, also when power goes.

    path
        absolute path, symbolic links resolved: a link would be replaced by the file.
    content
        the new bytes, or text that becomes UTF-8.
    like
        path of the file whose mode and owner the new one gets; default: what is at `path`. Where
        there is none, it is 0600 and ours.
    check
        called with the path of the written file before it takes the place; what it raises passes
        through. For callers in Python.

    Access lists and other extended attributes are not kept. Raises OSError when it can't be
    written; what was there is untouched then.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.replace /etc/fstab '# nothing'
    """
    mode, owner = _mode_and_owner(like or path)
    data = content if isinstance(content, bytes) else content.encode()
    _write_beside(path, [data], mode=mode, owner=owner, check=check)


def settle(temporary: str, path: str, mode: str | None = None) -> None:
    """
    Put a file that a program has finished in the place of `path`, also when power goes.

    temporary
        path in the same directory; gone afterwards, still there when this fails.
    path
        as for `replace`.
    mode
        octal, as "0600", with the owner that the file has; default: mode and owner of what is at
        `path`.

    On the disk when this returns. Raises OSError; what was at `path` is untouched then.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_record.settle /boot/grub2/new.cfg /boot/grub2/grub.cfg
    """
    if mode is not None:
        _settle(temporary, path, int(mode, 8), None)
    else:
        _settle(temporary, path, *_mode_and_owner(path))


# Runs side by side


def lock(path: str, refusal: str) -> IO[str]:
    """
    Take the lock of a file, made where it is missing. For callers in Python.

    path
        absolute path in a directory that is there; nobody may delete the file while it is in use.
    refusal
        why not, when another holds it: one in this process as well.

    Returns the open file: the lock is held until it is closed or the process ends.

    Raises CommandExecutionError with `refusal`. Salt refuses a state run beside another, but no
    function of a module beside one.
    """
    handle = open(path, "w", encoding="ascii")  # noqa: SIM115 -- the caller closes it
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise CommandExecutionError(refusal) from error
    return handle


# The record on disk


def _paths() -> dict[str, Any]:
    return __salt__["ramboot_config.paths"]()


def _directory() -> str:
    return _paths()["record"]


def _file() -> str:
    return os.path.join(_directory(), "record.json")


def _originals() -> str:
    return os.path.join(_directory(), "originals")


def _load() -> dict[str, Any]:
    try:
        with open(_file(), encoding="utf-8") as source:
            record = json.load(source)
    except FileNotFoundError:
        return {"schema": SCHEMA, "paths": {}, "directories": []}
    except ValueError as error:
        raise CommandExecutionError(
            f"{_file()} is damaged ({error}): without it nobody can tell what ramboot changed; "
            f"nothing was touched"
        ) from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise CommandExecutionError(f"{_file()} has another format than this version's; left alone")
    return record


def _entry(record: dict[str, Any], path: str) -> dict[str, Any]:
    if path not in record["paths"]:
        raise CommandExecutionError(f"{path} must be kept in the record before it is changed")
    return record["paths"][path]


# Originals


def _look(path: str) -> dict[str, Any] | None:
    """As `look`, but what is no regular file is an error."""
    found = look(path)
    if found is None and os.path.lexists(path):
        raise CommandExecutionError(f"{path} is not a regular file and is left alone")
    return found


def _same(now: dict[str, Any], original: dict[str, Any]) -> bool:
    return all(now[key] == original[key] for key in now)


def _hash(path: str) -> str:
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _blocks(source: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: source.read(1 << 20), b"")


def _store_name(path: str) -> str:
    return f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-{os.path.basename(path)}"


def _kept(path: str) -> dict[str, Any] | None:
    """What is recorded of the original of path; None too where nothing was there."""
    entry = entries().get(path)
    return entry["original"] if entry else None


def _stored(original: dict[str, Any]) -> str:
    return os.path.join(_originals(), original["store"])


def _left(original: dict[str, Any]) -> str:
    # by content as well: a later original of the same path must not replace an earlier one
    return os.path.join(_directory(), "left", f"{original['store']}.{original['sha256'][:16]}")


def _store(path: str, original: dict[str, Any]) -> None:
    target = _stored(original)
    try:
        _make_directory(_directory())
        _make_directory(os.path.dirname(target))
        with open(path, "rb") as source:
            _write_beside(target, _blocks(source), mode=0o600)
    except OSError as error:
        raise CommandExecutionError(f"the original of {path} can't be stored: {error}") from error
    if _hash(target) != original["sha256"]:
        os.unlink(target)
        raise CommandExecutionError(f"{path} changed while its original was being stored")


def _keep_left(original: dict[str, Any]) -> None:
    kept = _left(original)
    _make_directory(os.path.dirname(kept))
    # a second name and no move: if this is cut off before `forget`, the path is still recorded and
    # may be changed again. The name is there when an earlier run was; the stored one may be gone.
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        os.link(_stored(original), kept)
    _sync(os.path.dirname(kept))


def _put_back(path: str, original: dict[str, Any]) -> None:
    fault = original_fault(path)
    if fault:
        raise CommandExecutionError(f"{fault}; {path} is left alone")
    try:
        with open(_stored(original), "rb") as source:
            _write_beside(
                path,
                _blocks(source),
                mode=int(original["mode"], 8),
                owner=(original["uid"], original["gid"]),
            )
    except OSError as error:
        raise CommandExecutionError(f"the original of {path} can't be put back: {error}") from error


# Files


def _write_beside(
    path: str,
    blocks: Iterable[bytes],
    *,
    mode: int,
    owner: tuple[int, int] | None = None,
    check: Callable[[str], None] | None = None,
) -> None:
    """Write to a temporary file in the same directory, check it, put it in the place of path."""
    sweep(path)
    handle, temporary = tempfile.mkstemp(prefix=_prefix(path), dir=os.path.dirname(path))
    try:
        with os.fdopen(handle, "wb") as target:
            for block in blocks:
                target.write(block)
        if check:
            check(temporary)
        _settle(temporary, path, mode, owner)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _prefix(path: str) -> str:
    return f".ramboot-{os.path.basename(path)}."


def _settle(temporary: str, path: str, mode: int, owner: tuple[int, int] | None) -> None:
    """Sync, rename, sync the directory; owner None: whoever made the temporary file."""
    handle = os.open(temporary, os.O_RDONLY)
    try:
        now = os.fstat(handle)
        # owner first: a change of owner clears set-id bits; vfat has no owners to change
        if owner not in (None, (now.st_uid, now.st_gid)):
            os.fchown(handle, *owner)
        os.fchmod(handle, mode)
        os.fsync(handle)
    finally:
        os.close(handle)
    os.rename(temporary, path)
    _sync(os.path.dirname(path))


def _mode_and_owner(path: str) -> tuple[int, tuple[int, int] | None]:
    """Those of the file at path; without one 0600, and the owner is left as it comes."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        return 0o600, None
    return stat.S_IMODE(info.st_mode), (info.st_uid, info.st_gid)


def _sync(path: str) -> None:
    """A file, or a directory's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_directory(directory: str) -> None:
    if not os.path.isdir(directory):
        os.makedirs(directory, mode=0o700)
        _sync(os.path.dirname(directory))


def _remove_if_empty(directory: str) -> bool:
    try:
        os.rmdir(directory)
    except OSError:
        return False
    return True
