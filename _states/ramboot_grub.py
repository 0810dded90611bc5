# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's memory for every entry, and grub.cfg: as the pillar wants them, or as they were.

Each function reads, compares, fills `changes`, stops for `test=True`, acts, reads back, reports.
"""

from __future__ import annotations

from typing import Any

from salt.exceptions import CommandExecutionError

# Salt's loader sets these
__salt__: dict[str, Any]
__opts__: dict[str, Any]

__virtualname__ = "ramboot_grub"


def __virtual__() -> str:
    return __virtualname__


def dom0_mem_all(name: str, max_mib: int) -> dict[str, Any]:
    """Raise dom0's maximum in every menu entry, by a block at the end of /etc/default/grub.

    name
        /etc/default/grub.
    max_mib
        MiB, a whole number.
    """
    try:
        now = __salt__["ramboot_grub.dom0_mem"]()
        if now["fault"]:
            raise CommandExecutionError(now["fault"])
        token = f"dom0_mem=max:{max_mib}M"
        if (now["verdict"], now["max_mib"]) == ("present", max_mib):
            return _result(name, True, {}, f"{name} has {token} at its end")
        changes = {name: {"old": _token(now), "new": token}}
        if __opts__["test"]:
            return _result(name, None, changes, f"{token} would be appended to {name}")
        __salt__["ramboot_grub.set_dom0_mem"](max_mib)
        after = __salt__["ramboot_grub.dom0_mem"]()
        if (after["verdict"], after["max_mib"]) != ("present", max_mib):
            raise CommandExecutionError(f"{token} was appended to {name} and is not at its end")
    except (CommandExecutionError, OSError) as error:
        return _result(name, False, {}, str(error))
    return _result(name, True, changes, f"{token} has been appended to {name}")


def dom0_mem_restored(name: str) -> dict[str, Any]:
    """Take our block out of /etc/default/grub; one that was edited by hand stays and is named.

    name
        /etc/default/grub.
    """
    try:
        now = __salt__["ramboot_grub.dom0_mem"]()
        if now["verdict"] == "absent":
            return _result(name, True, {}, f"{name} has nothing of ramboot")
        if now["verdict"] == "edited":
            return _result(name, True, {}, now["fault"])
        changes = {name: {"old": _token(now), "new": None}}
        if __opts__["test"]:
            return _result(name, None, changes, f"{_token(now)} would be taken out of {name}")
        __salt__["ramboot_grub.unset_dom0_mem"]()
        if __salt__["ramboot_grub.dom0_mem"]()["verdict"] != "absent":
            raise CommandExecutionError(f"{_token(now)} was taken out of {name} and is still there")
    except (CommandExecutionError, OSError) as error:
        return _result(name, False, {}, str(error))
    return _result(name, True, changes, f"{_token(now)} has been taken out of {name}")


def config_current(name: str) -> dict[str, Any]:
    """Generate anew each grub.cfg that does not hold what the pillar asks for, and no other.

    Before the first time its bytes are recorded.

    name
        any text; shown in the output.
    """
    changes: dict[str, Any] = {}
    try:
        stale = __salt__["ramboot_grub.pending"]()
        if not stale:
            return _result(name, True, {}, "every grub.cfg is current")
        before = {path: __salt__["ramboot_grub.describe"](path) for path in stale}
        if __opts__["test"]:
            for path, reasons in stale.items():
                after = __salt__["ramboot_grub.forecast"](path)
                changes[path] = _difference(before[path], after, reasons)
            return _result(name, None, changes, f"would be generated anew: {', '.join(stale)}")
        for path, reasons in stale.items():
            __salt__["ramboot_grub.mkconfig"](path)
            after = __salt__["ramboot_grub.describe"](path)
            changes[path] = _difference(before[path], after, reasons)
        left = __salt__["ramboot_grub.pending"]()
        if left:
            raise CommandExecutionError(f"generated anew without an error and still stale: {left}")
    except (CommandExecutionError, OSError) as error:
        return _result(name, False, changes, f"{error}{_withdrawn()}")
    return _result(name, True, changes, f"generated anew: {', '.join(stale)}")


def config_restored(name: str) -> dict[str, Any]:
    """Take our entries out of each grub.cfg: the original's bytes if nothing else changed since.

    Otherwise it is generated anew; for that the wrapper in /etc/grub.d must be gone.

    name
        any text; shown in the output.
    """
    changes: dict[str, Any] = {}
    says = {
        "restored": "the original",
        "generated": "generated anew without ramboot",
        "cleared": "without the choice of the next boot",
    }
    try:
        actions = __salt__["ramboot_grub.undo_actions"]()
        todo = {path: says[action] for path, action in actions.items() if action in says}
        before = {path: __salt__["ramboot_grub.describe"](path) for path in todo}
        planned = {path: {"old": before[path], "new": new} for path, new in todo.items()}
        if __opts__["test"]:
            told = f"would be restored: {', '.join(todo)}" if todo else "no grub.cfg to restore"
            return _result(name, None if todo else True, planned, told)
        for path in actions:
            done = __salt__["ramboot_grub.undo"](path)
            if done in says:
                changes[path] = {"old": before.get(path), "new": says[done]}
        again = __salt__["ramboot_grub.undo_actions"]()
        left = [path for path, action in again.items() if action in says]
        if left:
            raise CommandExecutionError(f"restored without an error and still ours: {left}")
    except (CommandExecutionError, OSError) as error:
        return _result(name, False, changes, str(error))
    told = f"restored: {', '.join(changes)}" if changes else "no grub.cfg to restore"
    return _result(name, True, changes, told)


def _withdrawn() -> str:
    """Take back what other states of this run installed for the entries that did not come."""
    if __opts__["test"]:
        return ""
    try:
        taken = __salt__["ramboot_grub.withdraw"]()
    except (CommandExecutionError, OSError) as error:
        return f"; what makes the entries could not be taken back: {error}"
    return f"; taken back: {', '.join(taken)}" if taken else ""


def _token(found: dict[str, Any]) -> str | None:
    return None if found["max_mib"] is None else f"dom0_mem=max:{found['max_mib']}M"


def _difference(old: list[str], new: list[str], reasons: list[str]) -> dict[str, Any]:
    """The lines that go and come; the reasons where all lines stay."""
    if old == new:
        return {"old": "; ".join(reasons), "new": "generated anew"}
    return {
        "old": [line for line in old if line not in new],
        "new": [line for line in new if line not in old],
    }


def _result(name: str, result: bool | None, changes: dict, comment: str) -> dict[str, Any]:
    return {"name": name, "result": result, "changes": changes, "comment": comment}
