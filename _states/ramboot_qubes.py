# SPDX-License-Identifier: GPL-2.0-or-later
"""Qubes in the RAM root's pool, and settings of others: as the pillar wants them, or as they were.

Each function reads, compares, fills `changes`, stops for `test=True`, acts, reads back, reports.
"""

from __future__ import annotations

from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError

# Salt's loader sets these
__salt__: dict[str, Any]
__opts__: dict[str, Any]

__virtualname__ = "ramboot_qubes"


def __virtual__() -> str:
    return __virtualname__


def checked(name: str) -> dict[str, Any]:
    """Fail with every reason why the qubes of the pillar can't be made; never change anything.

    name
        any text; shown in the output.

    .. code-block:: yaml

        ramboot-qubes-checked:
          ramboot_qubes.checked:
            - name: qubes of the pillar
    """
    try:
        found = __salt__["ramboot_qubes.faults"]()
        told = [] if found else __salt__["ramboot_qubes.warnings"]()
    except (CommandExecutionError, SaltInvocationError, OSError) as error:
        return _result(name, False, {}, str(error))
    if found:
        return _result(name, False, {}, "\n".join(["nothing was changed:", *found]))
    if not __salt__["ramboot_qubes.wanted"]():
        return _result(name, True, {}, "the pillar asks for no qubes")
    return _result(name, True, {}, "\n".join(["nothing stands in the way", *told]))


def present(name: str, part: str) -> dict[str, Any]:
    """Make what the pillar wants and is not there, and set what is set otherwise.

    name
        any text; shown in the output.
    part
        "pools", "qubes" or "settings" (ramboot_qubes.pending).

    .. code-block:: yaml

        ramboot-qubes-settings:
          ramboot_qubes.present:
            - name: settings of other qubes
            - part: settings
    """
    changes: dict[str, Any] = {}
    try:
        changes = _changes(__salt__["ramboot_qubes.pending"](part))
        # without changes too what is no longer ours is forgotten
        left = __salt__["ramboot_qubes.left"](part, drop=not (changes or __opts__["test"]))
        if not changes:
            return _result(name, True, {}, _lines(f"{name}: as the pillar wants them", left))
        if __opts__["test"]:
            told = f"would be changed: {', '.join(changes)}"
            return _result(name, None, changes, _lines(told, left))
        notes = __salt__["ramboot_qubes.apply"](part)
        still = _changes(__salt__["ramboot_qubes.pending"](part))
        if still:
            raise CommandExecutionError(f"changed without an error and still not so: {still}")
    except (CommandExecutionError, SaltInvocationError, OSError) as error:
        return _result(name, False, _done(changes, part), str(error))
    told = "\n".join([f"changed: {', '.join(changes)}", *notes])
    return _result(name, True, changes, _lines(told, left))


def absent(name: str) -> dict[str, Any]:
    """Take back what ramboot made and set; what holds data or was changed since stays and is named.

    name
        any text; shown in the output.

    .. code-block:: yaml

        ramboot-qubes-absent:
          ramboot_qubes.absent:
            - name: qubes of ramboot
    """
    changes: dict[str, Any] = {}
    try:
        todo = __salt__["ramboot_qubes.undo_pending"]()
        changes = _changes(todo["steps"])
        if todo["faults"]:
            told = "\n".join(["nothing was changed:", *todo["faults"]])
            return _result(name, False, {}, told)
        if __opts__["test"]:
            told = f"would be undone: {', '.join(changes)}" if changes else "nothing to undo"
            return _result(name, None if changes else True, changes, _lines(told, todo["left"]))
        left = __salt__["ramboot_qubes.undo"]()
        again = _changes(__salt__["ramboot_qubes.undo_pending"]()["steps"])
        if still := {key: value for key, value in again.items() if key in changes}:
            raise CommandExecutionError(f"undone without an error and still there: {still}")
        # such as what a disposable needed that ended meanwhile
        left = [*left, *(f"{key} can be undone by now: apply this again" for key in again)]
    except (CommandExecutionError, OSError) as error:
        return _result(name, False, _done(changes, None), str(error))
    told = f"undone: {', '.join(changes)}" if changes else "nothing to undo"
    return _result(name, True, changes, _lines(told, left))


def _changes(steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {step["what"]: {"old": step["old"], "new": step["new"]} for step in steps}


def _done(changes: dict[str, Any], part: str | None) -> dict[str, Any]:
    """Of what was to be changed, what is; nothing where that can't be told."""
    if not changes or __opts__["test"]:
        return {}
    try:
        if part is None:
            left = __salt__["ramboot_qubes.undo_pending"]()["steps"]
        else:
            left = __salt__["ramboot_qubes.pending"](part)
    except (CommandExecutionError, SaltInvocationError, OSError):
        return {}
    return {key: value for key, value in changes.items() if key not in _changes(left)}


def _lines(first: str, left: list[str]) -> str:
    return "\n".join([first, *(f"left: {sentence}" for sentence in left)])


def _result(name: str, result: bool | None, changes: dict, comment: str) -> dict[str, Any]:
    return {"name": name, "result": result, "changes": changes, "comment": comment}
