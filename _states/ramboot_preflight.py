# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks that stop a run before its first change. The same with and without `test=True`."""

from __future__ import annotations

from typing import Any

# Salt's loader sets it
__salt__: dict[str, Any]


def passed(name: str) -> dict[str, Any]:
    """Fail with every reason why the formula cannot be applied; never change anything.

    name
        Any text; shown in the output.

    .. code-block:: yaml

        ramboot-preflight:
          ramboot_preflight.passed:
            - name: this system
    """
    return _verdict(name, __salt__["ramboot_preflight.faults"]())


def on_disk(name: str) -> dict[str, Any]:
    """Fail inside a RAM session, where an undo would reach /boot only, and without the disk's
    /boot; never change anything.

    name
        Any text; shown in the output.

    .. code-block:: yaml

        ramboot-on-disk:
          ramboot_preflight.on_disk:
            - name: this session
    """
    # a RAM session has no /boot, and need not be told so
    session = __salt__["ramboot_preflight.session_fault"]()
    fault = session or __salt__["ramboot_initramfs.boot_fault"]()
    return _verdict(name, [fault] if fault else [])


def _verdict(name: str, faults: list[str]) -> dict[str, Any]:
    good = "nothing stands in the way"
    comment = good if not faults else "\n".join(["nothing was changed:", *faults])
    return {"name": name, "result": not faults, "changes": {}, "comment": comment}
