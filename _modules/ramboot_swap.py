# SPDX-License-Identifier: GPL-2.0-or-later
"""Swap of the persistent system: what is configured, what is active, all of it off, all of it back.

Off leaves three traces, each reversible to the byte: a mark before each swap line of fstab, a mask
for each .swap unit, and a record of the units masked and of what was active. The record is written
before the first change, so that an interrupted run can be undone as well.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
from pathlib import Path
from typing import Any

from salt.exceptions import CommandExecutionError

# Salt's loader sets it
__salt__: dict[str, Any]

_MASK = "/dev/null"


# Questions


def active() -> list[dict[str, Any]]:
    """Return the kernel's list of swaps: `name`, `type`, `size_bytes`, `used_bytes` of each.

    Empty as well where the kernel knows no swap.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_swap.active
    """
    try:
        lines = Path(_paths()["proc_swaps"]).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines[1:]:
        name, kind, size_kib, used_kib, _priority = line.rsplit(maxsplit=4)
        found.append(
            {
                "name": _unescape(name),
                "type": kind,
                "size_bytes": int(size_kib) * 1024,
                "used_bytes": int(used_kib) * 1024,
            }
        )
    return found


def pending() -> dict[str, list[str]]:
    """Return what `switch_off` would do: lines of `fstab`, paths of `units`, names in `active`.

    All three empty: swap is off.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_swap.pending
    """
    return {
        "fstab": _fstab_swaps(),
        "units": list(_units().values()),
        "active": [swap["name"] for swap in active()],
    }


def recorded() -> dict[str, list[str]]:
    """Return what `switch_on` would undo.

    Keys: marked lines of `fstab`, masked `units`, devices that would be switched on again in
    `active`, the path of our `record` (a list, empty without one), temporary files of a run that
    was cut off in `leftovers`, and in `changed` a sentence for each thing that is not as ramboot
    left it and will stay as it is.

    Raises CommandExecutionError when our record is damaged.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_swap.recorded
    """
    paths, record = _paths(), _record()
    lines = _fstab_lines()
    ours = list(_marked(lines, record).values())
    changed = [
        f"{paths['fstab']}: the line {line!r} is neither as it was nor as ramboot left it"
        for line in record["fstab"]
        if line not in ours and line not in lines
    ]
    units = []
    for unit, moved in record["units"].items():
        path = os.path.join(paths["units_own"], unit)
        kept = bool(moved) and os.path.lexists(moved)
        if (_masked(path) and kept == bool(moved)) or (kept and not os.path.lexists(path)):
            units.append(path)
        elif kept and _same(path, moved):
            # moving it was cut off between the copy and the deletion
            units.append(path)
        elif kept:
            changed.append(f"{path} is not the mask that ramboot put there; its own is {moved}")
        elif os.path.lexists(path) and (_masked(path) or not moved):
            changed.append(f"{path} is not what ramboot put there")
    again = list(_to_switch_on(ours)) if record["active"] else []
    kept_record = [path for path in [paths["swap_record"]] if os.path.exists(path)]
    return {
        "fstab": ours,
        "units": units,
        "active": again,
        "record": kept_record,
        "leftovers": [
            path
            for place in _written(record)
            for path in __salt__["ramboot_record.leftovers"](place)
        ],
        "changed": changed,
    }


# Actions


def switch_off() -> dict[str, list[str]]:
    """Mark swap lines in fstab, mask swap units, switch active swaps off; return what was done.

    Raises CommandExecutionError when a swap cannot be switched off; what was done until then is
    recorded and in the message.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_swap.switch_off
    """
    todo, paths, record = pending(), _paths(), _record()
    if not any(todo.values()):
        return todo
    record["fstab"] += [line for line in todo["fstab"] if line not in record["fstab"]]
    record["active"] += [name for name in todo["active"] if name not in record["active"]]
    for path in todo["units"]:
        unit = os.path.basename(path)
        own = os.path.dirname(path) == paths["units_own"]
        # setdefault: after an interrupted run the first entry still says where the file is
        record["units"].setdefault(unit, os.path.join(paths["swap_units"], unit) if own else "")
    _write_record(record)
    if todo["fstab"]:
        mark = _mark()
        swaps = set(todo["fstab"])
        _write_fstab([mark + line if line in swaps else line for line in _fstab_lines()])
    for path in todo["units"]:
        _mask(path)
    if todo["fstab"] or todo["units"]:
        _run(["systemctl", "daemon-reload"])
    for swap in active():
        try:
            _run(["swapoff", swap["name"]])
        except CommandExecutionError as err:
            done = [*todo["fstab"], *todo["units"]]
            raise CommandExecutionError(
                f"{swap['name']} is still on ({err}); it is off from the next boot."
                f" Done until then: {', '.join(line.strip() for line in done) or 'nothing'}"
            ) from err
    return todo


def switch_on() -> dict[str, list[str]]:
    """Undo `switch_off`, remove the record and return what was undone, as `recorded` does.

    Swaps of fstab are switched on again if some were on before. One that does not come on is named
    in `changed`: the next boot brings it, as it does those of units and of zram-generator.

    Raises CommandExecutionError when our record is damaged or systemd does not reload its units,
    OSError when fstab or a unit can't be written; the record stays then.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_swap.switch_on
    """
    todo, record = recorded(), _record()
    for place in _written(record):
        __salt__["ramboot_record.sweep"](place)
    if todo["fstab"]:
        lines = _fstab_lines()
        ours = _marked(lines, record)
        _write_fstab([ours.get(line, line) for line in lines])
    for path in todo["units"]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        moved = record["units"][os.path.basename(path)]
        if moved:
            _rename(moved, path)
    if todo["fstab"] or todo["units"]:
        _run(["systemctl", "daemon-reload"])
    options = _to_switch_on(todo["fstab"])
    for name in list(todo["active"]):
        try:
            # of a device that it is told, swapon reads no options in fstab
            _run(["swapon", "-o", options[name], name])
        except CommandExecutionError as err:
            todo["active"].remove(name)
            todo["changed"].append(f"{name} is not on yet, the next boot brings it: {err}")
    _forget_record()
    return todo


# fstab


def _fstab_lines() -> list[str]:
    """All lines with their ends; bytes that are no UTF-8 survive the round trip."""
    try:
        data = Path(_paths()["fstab"]).read_bytes()
    except FileNotFoundError:
        return []
    # not splitlines: it knows more line ends than fstab does
    return re.findall(r"[^\n]*\n|[^\n]+", data.decode("utf-8", "surrogateescape"))


def _fstab_swaps() -> list[str]:
    return [line for line in _fstab_lines() if _is_swap(line)]


def _is_swap(line: str) -> bool:
    """Whether its type is swap; by the field, since the device is written in many ways."""
    return not line.lstrip().startswith("#") and (line.split() + [""] * 3)[2] == "swap"


def _marked(lines: list[str], record: dict[str, Any]) -> dict[str, str]:
    """The lines that we marked, each with what it was: others may begin with the mark as well.

    By the device: the user may have edited the rest. Without a record, which may be lost, by what
    looks like one.
    """
    mark, lost = _mark(), not os.path.exists(_paths()["swap_record"])
    devices = {line.split()[0] for line in record["fstab"]}
    found = {}
    for line in lines:
        was = line.removeprefix(mark)
        if was != line and _is_swap(was):
            device = was.split()[0]
            if device in devices or (lost and re.match(r"/|[A-Z]+=", device)):
                found[line] = was
    return found


def _write_fstab(lines: list[str]) -> None:
    data = "".join(lines).encode("utf-8", "surrogateescape")
    __salt__["ramboot_record.replace"](_real_fstab(), data)


def _real_fstab() -> str:
    # a link stays a link
    return os.path.realpath(_paths()["fstab"])


def _to_switch_on(lines: list[str]) -> dict[str, str]:
    """The devices of these swap lines that are there, off, and not noauto, with their options."""
    on = {os.path.realpath(swap["name"]) for swap in active()}
    found: dict[str, str] = {}
    for line in lines:
        fields = line.split()
        device = _device(_unescape(fields[0]))
        options = (fields[3:4] or ["defaults"])[0]
        if "noauto" in options.split(","):
            continue
        if os.path.exists(device) and os.path.realpath(device) not in on:
            found.setdefault(device, options)
    return found


def _device(spec: str) -> str:
    """The path behind UUID=, LABEL= and the like."""
    tag, _, value = spec.partition("=")
    if tag in ("UUID", "LABEL", "PARTUUID", "PARTLABEL"):
        folder = os.path.join(_paths()["disks"], f"by-{tag.lower()}")
        return os.path.join(folder, value.strip('"'))
    return spec


# Units


def _units() -> dict[str, str]:
    """The swap units that count, name to path: not masked, the first place wins."""
    found: dict[str, str] = {}
    paths = _paths()
    # those of fstab are not among the generated ones: their lines are marked
    for pattern in [*(f"{folder}/*.swap" for folder in paths["units"]), *paths["units_generated"]]:
        for path in sorted(glob.glob(pattern)):
            found.setdefault(os.path.basename(path), path)
    return {name: path for name, path in found.items() if not _masked(path)}


def _masked(path: str) -> bool:
    return os.path.islink(path) and os.readlink(path) == _MASK


def _mask(path: str) -> None:
    """Mask one unit. systemctl refuses where the administrator's own file is: that one moves."""
    paths, unit = _paths(), os.path.basename(path)
    own = os.path.join(paths["units_own"], unit)
    if path == own:
        _rename(path, os.path.join(paths["swap_units"], unit))
    os.makedirs(os.path.dirname(own), exist_ok=True)
    os.symlink(_MASK, own)


def _rename(source: str, target: str) -> None:
    """Move a file, also between file systems, so that it is never half there."""
    os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
    if os.path.islink(source):
        # of a move that was cut off
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        os.symlink(os.readlink(source), target)
    else:
        __salt__["ramboot_record.replace"](target, Path(source).read_bytes(), like=source)
    os.unlink(source)


def _same(one: str, other: str) -> bool:
    if os.path.islink(one) or os.path.islink(other):
        return (
            os.path.islink(one) and os.path.islink(other) and os.readlink(one) == os.readlink(other)
        )
    return os.path.isfile(one) and Path(one).read_bytes() == Path(other).read_bytes()


# The record


def _record() -> dict[str, Any]:
    """`fstab`: lines marked; `units`: name to where the file was moved, or ''; `active`: names."""
    path = _paths()["swap_record"]
    try:
        with open(path, encoding="utf-8") as handle:
            return json.load(handle)
    except FileNotFoundError:
        return {"fstab": [], "units": {}, "active": []}
    except ValueError as err:
        raise CommandExecutionError(f"{path} is damaged: {err}") from err


def _write_record(record: dict[str, Any]) -> None:
    __salt__["ramboot_record.write"](_paths()["swap_record"], record)


def _forget_record() -> None:
    paths = _paths()
    with contextlib.suppress(OSError):
        os.rmdir(paths["swap_units"])
    __salt__["ramboot_record.remove"](paths["swap_record"])


def _written(record: dict[str, Any]) -> list[str]:
    """Where a run that was cut off may have left a temporary file."""
    paths = _paths()
    units = [os.path.join(paths["units_own"], unit) for unit in record["units"]]
    return [_real_fstab(), paths["swap_units"], *units]


# Seams


def _paths() -> dict[str, Any]:
    return __salt__["ramboot_config.paths"]()


def _mark() -> str:
    return __salt__["ramboot_config.defaults"]()["swap"]["mark"]


def _unescape(name: str) -> str:
    r"""Undo the octal escapes of /proc and fstab (\040 is a blank)."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), name)


def _run(command: list[str]) -> None:
    result = __salt__["cmd.run_all"](command, python_shell=False)
    if result["retcode"] != 0:
        raise CommandExecutionError(
            f"{' '.join(command)}: exit {result['retcode']}: {result['stderr']}"
        )
