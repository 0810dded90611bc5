# SPDX-License-Identifier: GPL-2.0-or-later
"""Files and initramfs images of ramboot, and their undo from recorded originals.

Each function reads, compares, fills `changes`, stops for `test=True`, acts, reads back, reports.
"""

from __future__ import annotations

import difflib
import grp
import hashlib
import os
import pwd
import stat
from collections.abc import Iterable
from typing import Any

from salt.exceptions import CommandExecutionError

# Salt's loader sets these
__salt__: dict[str, Any]
__opts__: dict[str, Any]
__states__: dict[str, Any]
__env__: str

__virtualname__ = "ramboot"

# which paths these states take out of the record
UNDO = {
    "ramboot.initramfs_restored": "ramboot_initramfs.undo_plan",
    "ramboot_grub.config_restored": "ramboot_grub.undo_actions",
}


def __virtual__() -> str:
    return __virtualname__


def installed(
    name: str,
    source: str,
    mode: str = "0644",
    user: str = "root",
    group: str = "root",
    template: str | None = None,
    context: dict[str, Any] | None = None,
    makedirs: bool = True,
) -> dict[str, Any]:
    """
    Lay down a file of ours after recording what was there before.

    A file of ours that somebody edited is put back, and the comment says so.

    name
        absolute path of the file.
    source
        salt:// URL of a text file.
    mode, user, group
        as for file.managed.
    template, context
        template engine (`jinja`) and its variables. Default: the source as it is.
    makedirs
        make missing directories, mode 0755.

    .. code-block:: yaml

        ramboot-command:
          ramboot.installed:
            - name: /usr/bin/ramboot
            - source: salt://ramboot/session/files/ramboot
            - mode: '0755'
    """
    ret = _ret(name)
    try:
        wanted = _content(source, template, context)
        sha256 = hashlib.sha256(wanted.encode()).hexdigest()
        current = _current(name)
        changes = _changes(current, wanted, mode, user, group)
        verdict = __salt__["ramboot_record.verdict"](name)
        note = ", over a change that was not ours" if verdict == "changed-by-user" else ""
        if not changes:
            # an earlier run may have been cut off between its write and its seal
            if verdict == "ours" and not __opts__["test"]:
                _seal(name, sha256)
            return _done(ret, f"{name} is as it should be")
        ret["changes"] = changes
        if __opts__["test"]:
            return _would(ret, f"{name} would be written{note}")
        __salt__["ramboot_record.keep"](name)
        __salt__["ramboot_record.intend"](name, sha256)
        # backup "none": dom0's minion has backup_mode minion, and the record holds the original
        written = __states__["file.managed"](
            name=name,
            contents=wanted,
            mode=mode,
            user=user,
            group=group,
            makedirs=makedirs,
            backup="none",
        )
        if not written["result"]:
            raise CommandExecutionError(written["comment"])
        __salt__["ramboot_record.seal"](name)
        if _changes(_current(name), wanted, mode, user, group):
            raise CommandExecutionError(
                f"{name} was written without an error and is still not right"
            )
    except (CommandExecutionError, OSError) as error:
        return _failed(ret, error)
    return _done(ret, f"{name} has been written{note}")


def restored(name: str) -> dict[str, Any]:
    """
    Put back what was at `name` before us, or delete our file where nothing was.

    A file that was changed or deleted since stays as it is, and the comment says so.

    name
        absolute path of the file.

    .. code-block:: yaml

        ramboot-command-absent:
          ramboot.restored:
            - name: /usr/bin/ramboot
    """
    ret = _ret(name)
    try:
        planned = __salt__["ramboot_record.outcome"](name)
        if planned["action"] in ("restored", "deleted"):
            ret["changes"] = {name: {"old": "ramboot's", "new": planned["action"]}}
        if __opts__["test"]:
            return _would(ret, planned["comment"])
        __salt__["ramboot_record.restore"](name)
        after = __salt__["ramboot_record.verdict"](name)
        if after != "not-recorded":
            raise CommandExecutionError(
                f"{name} was restored without an error and is still {after}"
            )
    except (CommandExecutionError, OSError) as error:
        return _failed(ret, error)
    return _done(ret, planned["comment"])


def initramfs_room(
    name: str, files: list[dict[str, str]] | None = None, undo: bool = False
) -> dict[str, Any]:
    """
    Fail where /boot has no room for rebuilding what is stale, or will be; never change anything.

    To be required by what makes them stale, or takes back what they were made from.

    name
        any text; shown in the output.
    files
        What each image holds and this run may change: {"name", "source", "template"}, as of
        `installed`.
    undo
        Whether it is room for `initramfs_restored` that is wanted. Default: False.

    .. code-block:: yaml

        ramboot-initramfs-room:
          ramboot.initramfs_room:
            - name: room in /boot
            - files:
              - name: /etc/ramboot/ramboot.conf
                source: salt://ramboot/initramfs/files/ramboot.conf.j2
                template: jinja
    """
    ret = _ret(name)
    try:
        if undo:
            faults = __salt__["ramboot_initramfs.undo_room_faults"]()
        else:
            changing = any(_differs(**file) for file in files or [])
            faults = __salt__["ramboot_initramfs.room_faults"](changing)
    except (CommandExecutionError, OSError) as error:
        return _failed(ret, error)
    if not faults:
        return _done(ret, "there is room")
    return _failed(ret, "\n".join(["nothing was changed:", *faults]))


def initramfs_current(name: str) -> dict[str, Any]:
    """
    Rebuild the initramfs of each installed kernel whose image lacks our module or has an older one.

    name
        any text; shown in the output.

    .. code-block:: yaml

        ramboot-initramfs-current:
          ramboot.initramfs_current:
            - name: initramfs of each kernel
    """
    ret = _ret(name)
    changes: dict[str, Any] = {}
    try:
        before = __salt__["ramboot.initramfs"]()
        stale = {
            state["image"]: state["reason"]
            for state in before.values()
            if state["state"] == "stale"
        }
        if __opts__["test"]:
            # the files that this run would write make each image stale that is current now
            for path in _pending():
                for state in before.values():
                    if state["state"] == "current":
                        stale.setdefault(state["image"], f"{path} would be changed")
        if not stale:
            return _done(ret, f"every initramfs is current{_ignored(before)}")
        changes = {
            image: {"old": f"stale: {reason}", "new": "current"} for image, reason in stale.items()
        }
        if __opts__["test"]:
            told = f"would be rebuilt: {', '.join(stale)}{_ignored(before)}"
            return _would({**ret, "changes": changes}, told)
        __salt__["ramboot.rebuild"]()
        still = _to_rebuild(changes)
        if still:
            raise CommandExecutionError(
                f"rebuilt without an error and still stale: {', '.join(still)}"
            )
    except (CommandExecutionError, OSError) as error:
        return _failed(ret, error, _rebuilt(changes))
    return _done({**ret, "changes": changes}, f"rebuilt: {', '.join(stale)}{_ignored(before)}")


def module_not_asked_for(name: str) -> dict[str, Any]:
    """
    Fail while dracut's configuration asks for our module: without it dracut would make no image.

    To be required by whatever removes the module. Never changes anything.

    name
        any text; shown in the output.

    .. code-block:: yaml

        ramboot-initramfs-not-asked-for:
          ramboot.module_not_asked_for:
            - name: dracut's configuration
    """
    ret = _ret(name)
    try:
        lines = __salt__["ramboot_initramfs.asked_for"]()
    except (CommandExecutionError, OSError) as error:
        return _failed(ret, error)
    if not lines:
        return _done(ret, "no other file asks dracut for the module ramboot")
    told = "the module ramboot stays, for dracut would fail without it: take it out of these lines"
    return _failed(ret, "\n".join([told, *lines]))


def initramfs_restored(name: str) -> dict[str, Any]:
    """
    Take our module out of each kernel's image: the original's bytes if the image is still the one
    we built and would not be made from anything newer, else a new image from dracut. Images that
    others made without our module stay.

    name
        any text; shown in the output.

    .. code-block:: yaml

        ramboot-initramfs-restored:
          ramboot.initramfs_restored:
            - name: initramfs of each kernel
    """
    ret = _ret(name)
    changes: dict[str, Any] = {}
    try:
        plan = __salt__["ramboot_initramfs.undo_plan"]()
        changes = _to_restore(plan)
        told = _told(plan, changes)
        if __opts__["test"]:
            return _would({**ret, "changes": changes}, told)
        __salt__["ramboot_initramfs.undo"]()
        still = _to_restore(__salt__["ramboot_initramfs.undo_plan"]())
        if still:
            raise CommandExecutionError(
                f"restored without an error and still with ramboot: {', '.join(still)}"
            )
    except (CommandExecutionError, OSError) as error:
        return _failed(ret, error, _restored(changes))
    ret["changes"] = changes
    return _done(ret, told)


def record_closed(name: str) -> dict[str, Any]:
    """
    Remove the record of originals when nothing is recorded any more.

    What another component still has recorded stays, and the comment names it.

    name
        any text; shown in the output.

    .. code-block:: yaml

        ramboot-record-closed:
          ramboot.record_closed:
            - name: record of originals
    """
    ret = _ret(name)
    try:
        recorded = sorted(__salt__["ramboot_record.entries"]())
        undone = _undone() if __opts__["test"] else set()
        left = [path for path in recorded if path not in undone]
        closing = bool(recorded) or __salt__["ramboot_record.closable"]()
        # in test mode an earlier state of this run may have said so already
        if left or not closing or "record" in undone:
            told = f"still recorded: {', '.join(left)}" if left else "there is no record"
            return _done(ret, told)
        ret["changes"] = {"record": {"old": "empty", "new": "removed"}}
        if __opts__["test"]:
            return _would(ret, "the empty record would be removed")
        left = __salt__["ramboot_record.close"]()["left"]
    except (CommandExecutionError, OSError) as error:
        return _failed(ret, error)
    told = f"the record was removed but for {', '.join(left)}" if left else "the record was removed"
    return _done(ret, told)


# Shared


def _ret(name: str) -> dict[str, Any]:
    return {"name": name, "result": True, "changes": {}, "comment": ""}


def _done(ret: dict[str, Any], comment: str) -> dict[str, Any]:
    return {**ret, "result": True, "comment": comment}


def _would(ret: dict[str, Any], comment: str) -> dict[str, Any]:
    return {**ret, "result": None if ret["changes"] else True, "comment": comment}


def _failed(
    ret: dict[str, Any], error: Any, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {**ret, "result": False, "changes": changes or {}, "comment": str(error)}


def _content(source: str, template: str | None, context: dict[str, Any] | None) -> str:
    """The text that is to be written."""
    cached = __salt__["cp.cache_file"](source, saltenv=__env__)
    if not cached:
        raise CommandExecutionError(f"{source} is not in file_roots of env {__env__}")
    with open(cached, encoding="utf-8") as handle:
        text = handle.read()
    if template is None:
        return text
    rendered = __salt__["file.apply_template_on_contents"](
        text, template=template, context=context or {}, defaults={}, saltenv=__env__
    )
    if not isinstance(rendered, str):
        raise CommandExecutionError(f"{source} can't be rendered: {rendered['comment']}")
    # file.managed ends a file with a line end
    return rendered if rendered.endswith("\n") else f"{rendered}\n"


def _differs(name: str, source: str, template: str | None = None) -> bool:
    now = _current(name)
    return now is None or now["content"] != _content(source, template, None).encode()


def _current(path: str) -> dict[str, Any] | None:
    try:
        info = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(info.st_mode):
        raise CommandExecutionError(f"{path} is not a regular file and is left alone")
    with open(path, "rb") as handle:
        content = handle.read()
    return {
        "content": content,
        "mode": f"{stat.S_IMODE(info.st_mode):04o}",
        "user": _named(pwd.getpwuid, info.st_uid),
        "group": _named(grp.getgrgid, info.st_gid),
    }


def _named(database: Any, number: int) -> str:
    try:
        return database(number)[0]
    except KeyError:
        return str(number)


def _changes(
    current: dict[str, Any] | None, wanted: str, mode: str, user: str, group: str
) -> dict[str, Any]:
    """What distinguishes the file from what it should be; empty when nothing does."""
    if current is None:
        return {"diff": "New file", "mode": mode}
    changes: dict[str, Any] = {}
    if current["content"] != wanted.encode():
        text = current["content"].decode(errors="backslashreplace")
        lines = difflib.unified_diff(
            text.splitlines(keepends=True), wanted.splitlines(keepends=True)
        )
        changes["diff"] = "".join(lines)
    for key, value in (("mode", mode), ("user", user), ("group", group)):
        if current[key] != value:
            changes[key] = value
    return changes


def _seal(path: str, sha256: str) -> None:
    """Seal what is there already, also where a write of something else was begun and cut off."""
    if __salt__["ramboot_record.entries"]()[path]["intended"] not in (None, sha256):
        __salt__["ramboot_record.intend"](path, sha256)
    __salt__["ramboot_record.seal"](path)


def _pending() -> list[str]:
    """Files in images whose content states of this run, in test mode, said they would change."""
    paths = []
    for tag, result in globals().get("__running__", {}).items():
        state, _, rest = tag.partition("_|-")
        if state == "ramboot" and rest.endswith("_|-installed") and "diff" in result["changes"]:
            paths.append(result["name"])
    return list(filter(_is_stamped, paths))


def _is_stamped(path: str) -> bool:
    """Whether the stamp of an image has the file's hash."""
    paths = __salt__["ramboot_config.paths"]()
    if path == paths["dracut_manifest"]:
        return False
    return path == paths["boot_conf"] or path.startswith(f"{paths['dracut_module']}/")


def _undone() -> set[str]:
    """What states of this run, in test mode, would take out of the record; `record` for all."""
    paths: set[str] = set()
    for tag, result in globals().get("__running__", {}).items():
        state, *_, function = tag.split("_|-")
        if not state.startswith("ramboot") or result["result"] is False:
            continue
        paths.update(result["changes"])
        # what is left or as it was is no longer recorded either
        if function == "restored":
            paths.add(result["name"])
        elif f"{state}.{function}" in UNDO:
            paths.update(__salt__[UNDO[f"{state}.{function}"]]())
    return paths


def _to_rebuild(images: Iterable[str]) -> list[str]:
    """Those of the images that are not current."""
    now = {state["image"]: state["state"] for state in __salt__["ramboot.initramfs"]().values()}
    return sorted(image for image in images if now.get(image) != "current")


def _rebuilt(changes: dict[str, Any]) -> dict[str, Any]:
    """Of what was to be changed, what is; nothing where that can't be told."""
    try:
        left = _to_rebuild(changes)
    except (CommandExecutionError, OSError):
        return {}
    return {image: change for image, change in changes.items() if image not in left}


def _to_restore(plan: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What undoing the plan changes."""
    says = {
        "restore": "the original",
        "delete": "no image, as before",
        "rebuild": "rebuilt without ramboot",
        "remove": "absent",
    }
    return {
        image: {
            "old": f"{'unfinished' if action == 'remove' else 'with ramboot'}: {step['reason']}",
            "new": says[action],
        }
        for image, step in plan.items()
        if (action := step["action"]) in says
    }


def _told(plan: dict[str, dict[str, Any]], changes: dict[str, Any]) -> str:
    would = "would be " if __opts__["test"] else ""
    removed = [path for path in changes if plan[path]["action"] == "remove"]
    restored = ", ".join(path for path in changes if path not in removed)
    parts = [f"{would}restored: {restored}" if restored else "no initramfs to restore"]
    parts += [f"{would}removed: {path}" for path in removed]
    parts += [step["reason"] for step in plan.values() if step["action"] == "leave"]
    return "; ".join(parts)


def _restored(changes: dict[str, Any]) -> dict[str, Any]:
    """Of what was to be changed, what is; nothing where that can't be told."""
    try:
        left = _to_restore(__salt__["ramboot_initramfs.undo_plan"]())
    except (CommandExecutionError, OSError):
        return {}
    return {image: change for image, change in changes.items() if image not in left}


def _ignored(states: dict[str, Any]) -> str:
    images = [state["image"] for state in states.values() if state["state"] == "ignored"]
    return f"; left as it is: {', '.join(images)}" if images else ""
