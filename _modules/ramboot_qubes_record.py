# SPDX-License-Identifier: GPL-2.0-or-later
"""What ramboot made of qubes and changed on others, so that absent can undo just that.

A file of root's in the record's directory. Each change is on the disk before what it announces is
done; a qube that is `begun` and not `whole` is half-made and will be made anew.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from salt.exceptions import CommandExecutionError

# Salt's loader sets it
__salt__: dict[str, Any]

__virtualname__ = "ramboot_qubes_record"

SCHEMA = 1


def __virtual__() -> str:
    return __virtualname__


def read() -> dict[str, Any]:
    """
    Everything that is recorded.

    Returns {"made": {qube: {"kind": pillar key below ramboot:qubes, "whole": bool, "volumes":
    {volume: its state when it was made, None while it is being copied}, "intent": until it is
    marked, what qubesd was asked for, {"class", "label", "template", "pools": {volume: pool},
    "time": seconds since 1970}}},
    "settings": [{"qube": name or None for the system, "group": "property" | "feature" | "tag" |
    "pci" | "firewall", "key", "old", "new", "uuid": the qube's, which one that was made anew under
    its name does not have (none in notes of earlier versions), "given": true where the pillar gives
    it to a qube of ours (none in notes of earlier versions), "was": [what it was to become
    before, while "new" may not have been reached]}], "pools": [names that we added], "folders":
    {pool: [directories that were not there before]}}; all empty when there is no record.

    Raises CommandExecutionError when the file can't be understood.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes_record.read
    """
    try:
        with open(_file(), encoding="utf-8") as source:
            found = json.load(source)
    except FileNotFoundError:
        return {"made": {}, "settings": [], "pools": [], "folders": {}}
    except ValueError as error:
        raise CommandExecutionError(
            f"{_file()} is damaged ({error}): without it nobody can tell what ramboot changed on"
            " qubes; nothing was touched"
        ) from error
    if not isinstance(found, dict) or found.pop("schema", None) != SCHEMA:
        raise CommandExecutionError(f"{_file()} has another format than this version's; left alone")
    # one that was written before they were noted
    return {"folders": {}, **found}


def exists() -> bool:
    """
    Whether anything is recorded.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes_record.exists
    """
    return os.path.lexists(_file())


def made(
    qube: str,
    kind: str | None,
    whole: bool = False,
    volumes: Mapping[str, str | None] | None = None,
    intent: dict[str, Any] | None = None,
) -> None:
    """
    Note that a qube is about to be made, or is whole, or (kind None) is gone.

    qube, kind, whole, volumes, intent
        as in `read`; to the intent goes the time. With an intent the notes of settings of a qube of
        that name are dropped, for it is no more; of one that is gone those that are `given`.

    Raises CommandExecutionError when the record can't be understood, OSError when it can't be
    written.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes_record.made mine templates
    """
    record = read()
    if kind is None:
        record["made"].pop(qube, None)
        record["settings"] = [
            item for item in record["settings"] if not (item["qube"] == qube and item.get("given"))
        ]
    else:
        record["made"][qube] = {"kind": kind, "whole": whole, "volumes": volumes or {}}
        if intent is not None:
            record["made"][qube]["intent"] = {**intent, "time": time.time()}
            record["settings"] = [item for item in record["settings"] if item["qube"] != qube]
    _write(record)


def changed(
    qube: str | None,
    group: str,
    key: str,
    old: Any,
    new: Any,
    uuid: str | None = None,
    given: bool = False,
) -> None:
    """
    Note the value that a setting has before our first change of it, and what it is to become.

    qube, group, key, old, new, uuid, given
        as in `read`; the old value of an earlier note stays.

    Raises CommandExecutionError when the record can't be understood, OSError when it can't be
    written.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes_record.changed sys-net tag mine False True
    """
    record = read()
    item = _item(record, qube, group, key)
    if item is None:
        item = {"qube": qube, "group": group, "key": key, "old": old, "new": new}
        item |= {"uuid": uuid} if uuid else {}
        record["settings"].append(item | ({"given": True} if given else {}))
    else:
        # until it is done the system may have what was to be set before
        if item["new"] not in (new, *item.get("was", [])):
            item["was"] = [*item.get("was", []), item["new"]]
        item["new"] = new
    _write(record)


def done(qube: str | None, group: str, key: str) -> None:
    """
    Note that a setting has the value that it was to become.

    qube, group, key
        as in `read`.

    Raises CommandExecutionError when the record can't be understood, OSError when it can't be
    written.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes_record.done sys-net tag mine
    """
    record = read()
    item = _item(record, qube, group, key)
    if item is not None and "was" in item:
        del item["was"]
        _write(record)


def forget(qube: str | None, group: str, key: str) -> None:
    """
    Drop the note of a setting.

    qube, group, key
        as in `read`.

    Raises CommandExecutionError when the record can't be understood, OSError when it can't be
    written.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes_record.forget sys-net tag mine
    """
    record = read()
    item = _item(record, qube, group, key)
    if item is not None:
        record["settings"].remove(item)
    _write(record)


def pool(name: str, present: bool = True, folders: list[str] | None = None) -> None:
    """
    Note that a pool is ours, or is gone.

    name, present
        which, and which of both.
    folders
        as in `read`.

    Raises CommandExecutionError when the record can't be understood, OSError when it can't be
    written.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes_record.pool usb
    """
    record = read()
    record["pools"] = sorted({*record["pools"], name} if present else {*record["pools"]} - {name})
    record["folders"].pop(name, None)
    if folders:
        record["folders"][name] = folders
    _write(record)


def _item(record: dict[str, Any], qube: str | None, group: str, key: str) -> dict[str, Any] | None:
    """The note of a setting."""
    wanted = (qube, group, key)
    found = (
        item for item in record["settings"] if (item["qube"], item["group"], item["key"]) == wanted
    )
    return next(found, None)


def _file() -> str:
    return __salt__["ramboot_config.paths"]()["qubes_record"]


def _write(record: dict[str, Any]) -> None:
    """A record of nothing goes, with its directory if that is empty."""
    if not any(record.values()):
        __salt__["ramboot_record.remove"](_file())
    else:
        __salt__["ramboot_record.write"](_file(), {"schema": SCHEMA, **record})
