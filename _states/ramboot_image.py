# SPDX-License-Identifier: GPL-2.0-or-later
"""The prebuilt image of the backend `image`."""

from __future__ import annotations

from typing import Any

from salt.exceptions import CommandExecutionError

# Salt's loader sets these
__salt__: dict[str, Any]
__opts__: dict[str, Any]

__virtualname__ = "ramboot_image"

# What ramboot-state.sh compares of the files that states of ours write.
_LOOKED_AT = ("/etc/", "/usr/", "/opt/")


def __virtual__() -> str:
    return __virtualname__


def current(name: str) -> dict[str, Any]:
    """
    Build the image where there is none or it is stale; at idle priority, for some minutes.

    name
        any text; shown in the output.

    .. code-block:: yaml

        ramboot-image-current:
          ramboot_image.current:
            - name: prebuilt image
    """
    ret: dict[str, Any] = {"name": name, "result": True, "changes": {}, "comment": ""}
    try:
        reason = __salt__["ramboot_image.stale"]()
        if reason is None and __opts__["test"] and (changing := _changing()):
            reason = f"this run would change the root: {changing}"
        if reason is None:
            made = __salt__["ramboot_image.manifest"]()["made"]
            return {**ret, "comment": f"the image of {made} holds the root as it is"}
        if __opts__["test"]:
            if problems := __salt__["ramboot_image.impediments"]():
                return {**ret, "result": False, "comment": "; ".join(problems)}
            if fault := __salt__["ramboot_image.room_fault"]():
                return {**ret, "result": False, "comment": f"no image would be built: {fault}"}
            changes = {"image": {"old": reason, "new": "current"}}
            comment = f"the image would be built: {reason}"
            return {**ret, "result": None, "changes": changes, "comment": comment}
        built = __salt__["ramboot_image.build"]()
        changes = {"image": {"old": reason, "new": f"of {built['made']}, {built['bytes']} bytes"}}
        if again := __salt__["ramboot_image.stale"]():
            comment = f"the image was built without an error and is stale again: {again}"
            return {**ret, "result": False, "changes": changes, "comment": comment}
    except (CommandExecutionError, OSError) as error:
        return {**ret, "result": False, "comment": str(error)}
    comment = f"the image has been built: {reason}"
    if lost := built["without_acl"]:
        comment += (
            f"; squashfs keeps no access control lists, so {len(lost)} files and directories in it"
            f" have none: {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}"
        )
    return {**ret, "changes": changes, "comment": comment}


def unused(name: str) -> dict[str, Any]:
    """
    Tell of an image that stays though the pillar does not name the backend; never change anything.

    name
        any text; shown in the output.

    .. code-block:: yaml

        ramboot-image-unused:
          ramboot_image.unused:
            - name: prebuilt image
    """
    ret: dict[str, Any] = {"name": name, "result": True, "changes": {}, "comment": ""}
    try:
        found = __salt__["ramboot_image.remains"]()
    except (CommandExecutionError, OSError) as error:
        return {**ret, "result": False, "comment": str(error)}
    if not found:
        return {**ret, "comment": "the pillar does not name the backend image; there is no image"}
    comment = (
        "the pillar does not name the backend image; what there is of it stays until"
        f" `qubesctl state.apply ramboot.image.absent`: {', '.join(found)}"
    )
    return {**ret, "comment": comment}


def absent(name: str) -> dict[str, Any]:
    """
    Delete the image and what builds left.

    name
        any text; shown in the output.

    .. code-block:: yaml

        ramboot-image-absent:
          ramboot_image.absent:
            - name: prebuilt image
    """
    ret: dict[str, Any] = {"name": name, "result": True, "changes": {}, "comment": ""}
    try:
        found = __salt__["ramboot_image.remains"]()
        if not found:
            return {**ret, "comment": "there is no image"}
        changes = {what: {"old": "present", "new": "absent"} for what in found}
        listed = ", ".join(found)
        if __opts__["test"]:
            comment = f"would be deleted: {listed}"
            return {**ret, "result": None, "changes": changes, "comment": comment}
        __salt__["ramboot_image.remove"]()
        if left := __salt__["ramboot_image.remains"]():
            comment = f"deleted without an error and still there: {', '.join(left)}"
            return {**ret, "result": False, "changes": changes, "comment": comment}
    except (CommandExecutionError, OSError) as error:
        return {**ret, "result": False, "comment": str(error)}
    return {**ret, "changes": changes, "comment": f"deleted: {listed}"}


def _changing() -> str:
    """States of ours that said in this run, in test mode, that they would change what makes an
    image stale.
    """
    return ", ".join(
        result["name"]
        for tag, result in globals().get("__running__", {}).items()
        if result.get("changes")
        and _makes_stale(tag.partition("_|-")[0], result["name"], result["changes"])
    )


def _makes_stale(module: str, name: str, changes: dict[str, Any]) -> bool:
    """Whether ramboot-state.sh would see it; of a file `name` is the path, of several the keys."""
    if module == "ramboot_qubes":
        return True
    if module == "ramboot_swap":
        # masks lie in /etc, wherever the unit does
        return any(
            what.startswith("fstab: ") or "masked" in change.values()
            for what, change in changes.items()
        )
    return module.startswith("ramboot") and any(
        path.startswith(_LOOKED_AT) for path in (name, *changes)
    )
