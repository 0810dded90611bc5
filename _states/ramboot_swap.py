# SPDX-License-Identifier: GPL-2.0-or-later
"""Swap of the persistent system: all of it off, and all of it back as it was."""

from __future__ import annotations

from typing import Any

from salt.exceptions import CommandExecutionError

# Salt's loader sets these
__salt__: dict[str, Any]
__opts__: dict[str, Any]


def off(name: str) -> dict[str, Any]:
    """Switch all swap off, now and at each later boot.

    Swap lines of fstab are commented out, swap units masked, active swaps switched off.

    name
        Any text; shown in the output.

    .. code-block:: yaml

        ramboot-swap-off:
          ramboot_swap.off:
            - name: swap
    """
    changes: dict[str, Any] = {}
    try:
        changes = _changes(__salt__["ramboot_swap.pending"](), off=True)
        if not changes:
            return _result(name, True, {}, "swap is off")
        if __opts__["test"]:
            return _result(name, None, changes, "swap would be switched off")
        __salt__["ramboot_swap.switch_off"]()
        left = _changes(__salt__["ramboot_swap.pending"](), off=True)
    except (CommandExecutionError, OSError) as err:
        return _result(name, False, _done("pending", changes, off=True), str(err))
    if left:
        return _result(name, False, _without(changes, left), f"swap is still there: {left}")
    return _result(name, True, changes, "swap has been switched off")


def restored(name: str) -> dict[str, Any]:
    """Undo `off`: exactly what it did, to the byte; what the user changed since is left and named.

    name
        Any text; shown in the output.

    .. code-block:: yaml

        ramboot-swap-restored:
          ramboot_swap.restored:
            - name: swap
    """
    changes: dict[str, Any] = {}
    try:
        todo = __salt__["ramboot_swap.recorded"]()
        changes = _changes(todo, off=False)
        if not changes:
            return _result(name, True, {}, "swap is as ramboot found it")
        if __opts__["test"]:
            comment = _sentences("swap would be restored", todo["changed"])
            return _result(name, None, changes, comment)
        done = __salt__["ramboot_swap.switch_on"]()
        after = __salt__["ramboot_swap.recorded"]()
    except (CommandExecutionError, OSError) as err:
        return _result(name, False, _done("recorded", changes, off=False), str(err))
    left = _changes(
        {key: after[key] for key in ("fstab", "units", "record", "leftovers")}, off=False
    )
    if left:
        return _result(name, False, _without(changes, left), f"swap is not restored: {left}")
    changes = _changes(done, off=False)
    return _result(name, True, changes, _sentences("swap has been restored", done["changed"]))


def _changes(todo: dict[str, list[str]], off: bool) -> dict[str, dict[str, str]]:
    """What goes from old to new, by line, unit and device."""
    found = {}
    mark = __salt__["ramboot_config.defaults"]()["swap"]["mark"]
    for line in todo.get("fstab", []):
        # Salt's outputters cannot print what is no UTF-8
        shown = line.strip().encode("utf-8", "replace").decode()
        found[f"fstab: {shown}"] = _pair(shown, f"{mark}{shown}", off)
    for path in todo.get("units", []):
        found[path] = _pair("not masked", "masked", off)
    for device in todo.get("active", []):
        found[device] = _pair("on", "off", off)
    for path in todo.get("record", []) + todo.get("leftovers", []):
        found[path] = {"old": "present", "new": "absent"}
    return found


def _pair(before: str, after: str, off: bool) -> dict[str, str]:
    return {"old": before, "new": after} if off else {"old": after, "new": before}


def _done(question: str, changes: dict[str, Any], off: bool) -> dict[str, Any]:
    """Of what was to be changed, what is; nothing where that can't be told."""
    if not changes:
        return {}
    try:
        left = _changes(__salt__[f"ramboot_swap.{question}"](), off=off)
    except (CommandExecutionError, OSError):
        return {}
    return _without(changes, left)


def _without(changes: dict[str, Any], left: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if key not in left}


def _sentences(first: str, more: list[str]) -> str:
    return "\n".join([first, *(f"left: {sentence}" for sentence in more)])


def _result(name: str, result: bool | None, changes: dict, comment: str) -> dict[str, Any]:
    return {"name": name, "result": result, "changes": changes, "comment": comment}
