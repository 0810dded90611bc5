# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's memory for every entry, and grub.cfg: as the pillar wants them, or as they were.

Each function reads, compares, fills `changes`, stops for `test=True`, acts, reads back, reports.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from salt.exceptions import CommandExecutionError

# Salt's loader sets these
__salt__: dict[str, Any]
__opts__: dict[str, Any]

__virtualname__ = "ramboot_grub"

_NONE = "no grub.cfg to restore"


def __virtual__() -> str:
    return __virtualname__


def dom0_mem_all(name: str, max_mib: int) -> dict[str, Any]:
    """Raise dom0's maximum in every menu entry, by a block at the end of /etc/default/grub.

    name
        /etc/default/grub.
    max_mib
        MiB, a whole number.

    .. code-block:: yaml

        ramboot-grub-dom0-mem:
          ramboot_grub.dom0_mem_all:
            - name: /etc/default/grub
            - max_mib: 10240
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

    Temporary files beside it, of a run that was cut off, go as well.

    name
        /etc/default/grub.

    .. code-block:: yaml

        ramboot-grub-dom0-mem:
          ramboot_grub.dom0_mem_restored:
            - name: /etc/default/grub
    """
    changes: dict[str, Any] = {}
    test = __opts__["test"]
    try:
        now = __salt__["ramboot_grub.dom0_mem"]()
        told = [f"{'would be ' if test else ''}removed: {path}" for path in now["leftovers"]]
        for path in now["leftovers"]:
            if not test:
                os.unlink(path)
            changes[path] = {"old": "present", "new": "absent"}
        if now["verdict"] == "absent":
            told.append(f"{name} has nothing of ramboot")
        elif now["verdict"] == "edited":
            told.append(now["fault"])
        else:
            told.append(f"{_token(now)} {'would be' if test else 'has been'} taken out of {name}")
            if not test:
                _unset(name, now)
            changes[name] = {"old": _token(now), "new": None}
    except (CommandExecutionError, OSError) as error:
        return _result(name, False, changes, str(error))
    return _result(name, None if test and changes else True, changes, "; ".join(told))


def config_current(name: str) -> dict[str, Any]:
    """Generate anew each grub.cfg that does not hold what the pillar asks for, and no other.

    Before the first time its bytes are recorded.

    name
        any text; shown in the output.

    .. code-block:: yaml

        ramboot-grub-config:
          ramboot_grub.config_current:
            - name: grub.cfg
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

    .. code-block:: yaml

        ramboot-grub-config-restored:
          ramboot_grub.config_restored:
            - name: grub.cfg
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
        unfinished = _unfinished(actions)
        if __opts__["test"]:
            told = _told(todo, unfinished, "would be ")
            return _result(name, None if told else True, {**planned, **unfinished}, told or _NONE)
        for path in actions:
            done = __salt__["ramboot_grub.undo"](path)
            if done in says:
                changes[path] = {"old": before.get(path), "new": says[done]}
        again = __salt__["ramboot_grub.undo_actions"]()
        left = [path for path, action in again.items() if action in says]
        left += _unfinished(again)
        if left:
            raise CommandExecutionError(f"restored without an error and still ours: {left}")
    except (CommandExecutionError, OSError) as error:
        return _result(name, False, changes, str(error))
    told = _told(changes, unfinished)
    return _result(name, True, {**changes, **unfinished}, told or _NONE)


def _unset(name: str, now: dict[str, Any]) -> None:
    __salt__["ramboot_grub.unset_dom0_mem"]()
    if __salt__["ramboot_grub.dom0_mem"]()["verdict"] != "absent":
        raise CommandExecutionError(f"{_token(now)} was taken out of {name} and is still there")


def _unfinished(paths: Iterable[str]) -> dict[str, Any]:
    """What runs that were cut off left beside each grub.cfg, as changes."""
    return {
        leftover: {"old": "present", "new": "absent"}
        for path in paths
        for leftover in __salt__["ramboot_record.leftovers"](os.path.dirname(path))
    }


def _told(restored: dict[str, Any], removed: dict[str, Any], would: str = "") -> str:
    parts = [f"{would}restored: {', '.join(restored)}"] if restored else []
    return "; ".join([*parts, *(f"{would}removed: {path}" for path in removed)])


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
