# SPDX-License-Identifier: GPL-2.0-or-later
"""Parts of `ramboot.audit` that look at devices, volume groups and files; and its table.

What can't be determined counts as a trace.
"""

from __future__ import annotations

import datetime
import glob
import json
import os
from collections.abc import Iterable
from typing import Any

from salt.exceptions import CommandExecutionError

# Salt's loader sets it
__salt__: dict[str, Any]

__virtualname__ = "ramboot_audit"

# The worst first.
VERDICTS = ("disk", "unknown", "trace", "ram")
# What ramboot.backing may say of a device to which nothing is written that stays.
HARMLESS = ("ram", "sealed")
# Names of devices that are memory (Linux: Documentation/admin-guide/devices.txt).
IN_MEMORY = ("zram", "ram")
_LV_FIELDS = ("vg_name", "lv_name", "pool_lv", "lv_size", "lv_time")
_LVS = ["lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "--options",
        ",".join(_LV_FIELDS)]  # fmt: skip


def __virtual__() -> str:
    return __virtualname__


def disks(mounts: list[dict[str, Any]]) -> list[dict[str, str]]:
    """
    Every block device that is no memory and has none below it: whether it can be written, who is
    on it.

    mounts
        what is visible where: mappings with `target` and `source`.

    Returns rows as `ramboot.audit` does. A disk that is marked read-only and that nobody uses is
    `ram`; every other one is `trace`, also one that is marked and used: device-mapper writes to it
    all the same (Linux: bio_check_ro in block/blk-core.c only warns).

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_audit.disks '[]'
    """
    top = f"{_sys()}/class/block"
    rows = []
    for name in sorted(os.listdir(top)) if os.path.isdir(top) else []:
        folder = f"{top}/{name}"
        kind = name.rstrip("0123456789")
        if (
            kind in IN_MEMORY
            or os.path.exists(f"{folder}/partition")
            or _listdir(f"{folder}/slaves")
        ):
            continue
        size = int(_read(f"{folder}/size") or 0) * 512
        if not size:
            # a drive without a medium, a loop device without a file
            continue
        if kind in ("loop", "dm-") and __salt__["ramboot.backing"](f"/dev/{name}") in HARMLESS:
            continue
        if _read(f"{folder}/loop/backing_file").startswith("/dev/"):
            # another name of a device that has a row of its own
            continue
        users = _users(top, name, mounts)
        told = [_shown_size(size)]
        if model := _read(f"{folder}/device/model"):
            told.insert(0, model)
        if _read(f"{folder}/removable") == "1":
            told.append("removable")
        marked = _read(f"{folder}/ro") == "1"
        told.append("marked read-only" if marked else "writable")
        told.append(f"in use: {', '.join(users)}" if users else "not in use")
        verdict = "ram" if marked and not users else "trace"
        rows.append(_row(f"device {name}", ", ".join(told), verdict))
    return rows


def names() -> list[dict[str, str]]:
    """
    What LVM's metadata on a disk keeps of this session: names of volumes, and when each was made.

    Names that were removed again stay readable in the metadata area until it comes round to them
    (lvm2: lib/format_text/format-text.c); they can't be listed.

    Returns rows as `ramboot.audit` does, one for each volume group that is active on a disk.

    Raises CommandExecutionError as `volumes` and `booted` do, ValueError when a time can't be
    understood.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_audit.names
    """
    if not _lvm_on_disk():
        return []
    began = booted()
    made: dict[str, list[str]] = {}
    for volume in volumes():
        group = made.setdefault(volume["vg_name"], [])
        when = datetime.datetime.strptime(volume["lv_time"], "%Y-%m-%d %H:%M:%S %z")
        if when.timestamp() >= began:
            group.append(volume["lv_name"])
    return [
        _row(
            f"names in {group}", f"{_made(found)}; each start of a qube in it leaves some", "trace"
        )
        for group, found in sorted(made.items())
    ]


def volumes() -> list[dict[str, str]]:
    """
    Every logical volume that LVM sees.

    Returns for each {"vg_name", "lv_name", "pool_lv" (empty where it is not thin), "lv_size" (in
    bytes), "lv_time" (when it was made, as 2026-11-25 01:00:00 +0000)}, all text.

    Raises CommandExecutionError when LVM does not answer or can't be understood.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_audit.volumes
    """
    done = __salt__["cmd.run_all"](_LVS, python_shell=False, env={"LC_ALL": "C"})
    if done["retcode"] != 0:
        raise CommandExecutionError(f"{' '.join(_LVS)}: {done['stderr']}")
    try:
        listed = json.loads(done["stdout"])["report"][0]["lv"]
        found = [{field: volume[field] for field in _LV_FIELDS} for volume in listed]
        if not all(isinstance(value, str) for volume in found for value in volume.values()):
            raise TypeError("a value that is no text")
        return found
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CommandExecutionError(f"{' '.join(_LVS)}: not understood: {error!r}") from error


def files(mounts: list[dict[str, Any]]) -> list[dict[str, str]]:
    """
    Where logs, the files of ramboot and dom0's own data lie.

    mounts
        as in `disks`.

    Returns rows as `ramboot.audit` does, one for each directory that is there.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_audit.files '[{target: /, source: /dev/zram0}]'
    """
    rows = []
    for path in __salt__["ramboot_config.paths"]()["written"]:
        if not os.path.isdir(path):
            continue
        mount = __salt__["ramboot_qubes_pools.mount_of"](os.path.realpath(path), mounts)
        kind = of_backing(__salt__["ramboot.backing"](mount["source"]))
        rows.append(_row(f"files in {path}", f"on {mount['source']} ({mount['target']})", kind))
    return rows


def of_backing(kind: str) -> str:
    """
    The verdict on what is written to a device.

    kind
        as `ramboot.backing` returns it.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_audit.of_backing sealed
    """
    if kind in HARMLESS:
        return "ram"
    return kind if kind == "disk" else "unknown"


def worst(verdicts: Iterable[str], of_none: str = "unknown") -> str:
    """
    The worst of some verdicts.

    verdicts
        as rows of `ramboot.audit` have them.
    of_none
        what to return where there is none. Default: unknown.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_audit.worst '[ram, trace]'
    """
    found = set(verdicts)
    return next((kind for kind in VERDICTS if kind in found), of_none)


def verdict(rows: list[dict[str, str]]) -> dict[str, str]:
    """
    The row over all rows.

    rows
        as `ramboot.audit` returns them.

    Returns one more: "all", how many of each verdict, and the worst of them; `unknown` of none.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_audit.verdict '[{place: /, finding: x, verdict: ram}]'
    """
    count = {kind: sum(row["verdict"] == kind for row in rows) for kind in VERDICTS}
    told = f"{count['disk']} on a disk, {count['trace']} can leave a trace, {count['unknown']}"
    return _row(
        "all", f"{told} not known, {count['ram']} in RAM", worst(row["verdict"] for row in rows)
    )


def table(rows: list[dict[str, str]]) -> str:
    """
    Rows of an audit for reading, the worst first.

    rows
        as `ramboot.audit` returns them.

    Returns lines: verdict, what a RAM session would make of it where that is known, place, finding.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_audit.table '[{place: /, finding: x, verdict: ram}]'
    """
    last = [row for row in rows if row["place"] == "all"]
    order = sorted(
        (row for row in rows if row["place"] != "all"),
        key=lambda row: VERDICTS.index(row["verdict"]),
    )
    would = any("would" in row for row in rows)
    heads = ["now", *(["in RAM"] if would else []), "place", "finding"]
    lines = [
        [row["verdict"], *([row.get("would", "")] if would else []), row["place"], row["finding"]]
        for row in [*order, *last]
    ]
    widths = [max(len(line[number]) for line in [heads, *lines]) for number in range(len(heads))]
    return "\n".join(
        "  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip()
        for line in [heads, *lines]
    )


def booted() -> float:
    """Return when this boot began, in seconds since 1970 by the clock as it is now (proc(5), stat).

    Raises CommandExecutionError when the kernel does not tell.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_audit.booted
    """
    path = __salt__["ramboot_config.paths"]()["proc_stat"]
    with open(path, encoding="utf-8") as source:
        for line in source:
            if line.startswith("btime "):
                return float(line.split()[1])
    raise CommandExecutionError(f"{path} has no btime")


def _made(found: list[str]) -> str:
    return f"made since this boot: {', '.join(sorted(found)) or 'none that is still there'}"


def _users(top: str, disk: str, mounts: list[dict[str, Any]]) -> list[str]:
    """What holds a disk or a partition of it: mounts, and the devices made of it by their names."""
    parts = [disk]
    parts += sorted(
        os.path.basename(os.path.dirname(path)) for path in glob.glob(f"{top}/{disk}/*/partition")
    )
    found = []
    for part in parts:
        found += [
            mount["target"]
            for mount in mounts
            if mount["source"].startswith("/dev/")
            and os.path.basename(os.path.realpath(mount["source"])) == part
        ]
        found += [
            _read(f"{top}/{holder}/dm/name") or holder
            for holder in _listdir(f"{top}/{part}/holders")
        ]
    return found


def _lvm_on_disk() -> bool:
    return any(
        _read(f"{folder}/dm/uuid").startswith("LVM-")
        and __salt__["ramboot.backing"](f"/dev/{os.path.basename(folder)}") not in HARMLESS
        for folder in glob.glob(f"{_sys()}/block/dm-*")
    )


def _listdir(folder: str) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _read(path: str) -> str:
    """Nothing where there is none."""
    if not os.path.isfile(path):
        return ""
    with open(path, encoding="utf-8", errors="replace") as source:
        return " ".join(source.read().split())


def _sys() -> str:
    return __salt__["ramboot_config.paths"]()["sys"]


def _shown_size(size: int) -> str:
    for unit, step in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size >> 10} KiB"


def _row(place: str, finding: str, verdict: str) -> dict[str, str]:
    return {"place": place, "finding": finding, "verdict": verdict}
