# SPDX-License-Identifier: GPL-2.0-or-later
"""Can this system be given RAM sessions? Questions only; nothing here changes anything."""

from __future__ import annotations

import glob
import json
import os
import re
from pathlib import Path
from typing import Any

from salt.exceptions import CommandExecutionError

# Salt's loader sets it
__salt__: dict[str, Any]

_FINDMNT = ["findmnt", "--json", "--list", "--nofsroot", "--output"]
_FINDMNT_COLUMNS = "TARGET,SOURCE,FSTYPE,FSROOT,UUID"
_LSBLK = ["lsblk", "--json", "--inverse", "--paths", "--output", "NAME,TYPE,FSTYPE"]

# lsblk's TYPE of layers that we can tell apart; anything else is refused under its own name.
_DISK = {"disk", "part"}
# All of Qubes' pools in dom0's file system are here by default.
QUBES = "/var/lib/qubes"
# device-mapper doubles the hyphens of either name (lvm2: libdm, dm_build_dm_name).
_VOLUME = re.compile(r"/dev/mapper/((?:[^-]|--)+)-(?!-)")
_RAM_DISK = re.compile(r"z?ram\d+")
_KEPT = ", not on the device of /: a RAM session would go on writing to it; move it to /"


def faults() -> list[str]:
    """Return every reason why the formula cannot be applied here, a sentence each.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_preflight.faults
    """
    known = __salt__["ramboot_config.defaults"]()
    in_pillar = __salt__["ramboot_config.faults"]()
    found = [*in_pillar, *_missing(known["paths"])]
    session = session_fault()
    if session:
        # The layout of a RAM root says nothing about the disk's.
        return [*found, session]
    try:
        layout = root_layout()
    except CommandExecutionError as err:
        return [*found, f"the layout of / cannot be read: {err}"]
    found += filter(None, [_root_fault(layout, known["roots"])])
    if not in_pillar:
        settings = __salt__["ramboot_config.load"]()
        found += filter(None, [_policy_fault(layout, settings["boot"]["disk"])])
        found += _backend_faults(layout, settings)
        found += __salt__["ramboot_grub.faults"](settings)
    found += _elsewhere(layout, known["mounts"])
    if not in_pillar and __salt__["ramboot_image.asked"]():
        found += __salt__["ramboot_image.impediments"](layout)
    return found


def session_fault() -> str | None:
    """Return why this is no persistent session of the disk's root; None when it is one.

    In a RAM session /boot is still the disk's: what is done there would stay, the rest vanish.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_preflight.session_fault
    """
    known = __salt__["ramboot_config.defaults"]()
    way_out = "restart with ramboot=off (the ordinary menu entry, answer n) and apply it there"
    try:
        status = json.loads(Path(known["paths"]["status"]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        status = None
    if isinstance(status, dict) and status.get("session") == "ram":
        return f"this is a RAM session ({status.get('backend')}); {way_out}"
    try:
        root = _root(_mounts())
    except CommandExecutionError as err:
        return f"what / is cannot be read: {err}"
    if root["fstype"] in known["ram_filesystems"]:
        return f"/ is {root['fstype']}, not the disk's root; {way_out}"
    if _RAM_DISK.fullmatch(os.path.basename(root["source"])):
        return f"/ is on {root['source']}, a RAM disk, not the disk's root; {way_out}"
    return None


def root_layout() -> dict[str, Any]:
    """Return what / is made of.

    Keys: `source`, `fstype`, `fsroot` (the subvolume of btrfs, else `/`), `uuid`, `kind`
    (partition, lvm, lvm-thin), `luks` (bool), `unknown` (what makes it a layout of its own kind, or
    None), `mounts` (all mounts: target, source, fstype, fsroot, uuid).
    Raises CommandExecutionError when findmnt or lsblk fails.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_preflight.root_layout
    """
    mounts = _mounts()
    root = _root(mounts)
    layout = {**root, "kind": None, "luks": False, "unknown": None, "mounts": mounts}
    if not root["source"].startswith("/dev/"):
        layout["unknown"] = f"{root['fstype']} from {root['source']}"
        return layout
    tree = _json([*_LSBLK, root["source"]])["blockdevices"]
    layers, layout["unknown"] = _layers(tree[0] if tree else {})
    layout["luks"] = "crypt" in layers
    if layout["unknown"] is None:
        layout["kind"] = next((name for name in ("lvm-thin", "lvm") if name in layers), "partition")
    if root["fstype"] == "btrfs" and layout["unknown"] is None:
        layout["unknown"] = _many_devices(root["uuid"])
    return layout


def _json(command: list[str]) -> dict[str, Any]:
    """The one seam to the system's tools."""
    # An absolute C locale: the keys are fixed, messages in an error need not be translated.
    result = __salt__["cmd.run_all"](command, python_shell=False, env={"LC_ALL": "C"})
    if result["retcode"] != 0:
        raise CommandExecutionError(
            f"{' '.join(command)}: exit {result['retcode']}: {result['stderr']}"
        )
    try:
        return json.loads(result["stdout"])
    except ValueError as err:
        raise CommandExecutionError(f"{' '.join(command)}: no JSON: {err}") from err


def _mounts() -> list[dict[str, Any]]:
    return _json([*_FINDMNT, _FINDMNT_COLUMNS])["filesystems"]


def _root(mounts: list[dict[str, Any]]) -> dict[str, Any]:
    """The mount that is seen at /: the last one there."""
    at_root = [mount for mount in mounts if mount["target"] == "/"]
    if not at_root:
        raise CommandExecutionError("findmnt shows nothing mounted at /")
    return {**at_root[-1], "source": at_root[-1]["source"] or "nothing"}


def _layers(device: dict[str, Any]) -> tuple[list[str], str | None]:
    """The kinds of layer from the file system down to the disk, and what is strange in them."""
    layers: list[str] = []
    name = ""
    while device:
        kind, name = device.get("type"), device.get("name", "")
        below = device.get("children", [])
        thin = kind == "lvm" and bool(below) and below[0]["name"].endswith("-tpool")
        if thin:
            # tpool, then its metadata and data; all three must come to the same device
            layers.append("lvm-thin")
            below = _common(below[0].get("children", []))
        elif kind == "lvm" and any(child["type"] == "lvm" for child in below):
            return layers, f"{name}, a logical volume made of others (snapshot, cache, RAID, VDO)"
        elif kind == "lvm":
            layers.append("lvm")
        elif kind == "crypt":
            if below and below[0].get("fstype") not in (None, "crypto_LUKS"):
                return layers, f"{name}, encrypted with {below[0]['fstype']} instead of LUKS"
            if any(child["type"] == "lvm" for child in below):
                return layers, f"{name}, LUKS on a logical volume (LVM on LUKS is supported)"
            if "crypt" in layers:
                return layers, f"{name}, LUKS on LUKS, or with integrity"
            layers.append("crypt")
        elif _RAM_DISK.fullmatch(os.path.basename(name)):
            return layers, f"{name}, a RAM disk"
        elif kind in _DISK:
            layers.append("disk")
        else:
            return layers, f"{name}, a block device of type {kind}"
        if len(below) > 1:
            return layers, f"{name}, spread over {' and '.join(item['name'] for item in below)}"
        device = below[0] if below else {}
    if layers and layers[-1] == "disk":
        return layers, None
    return layers, f"{name or 'a device'}, below which lsblk shows no disk"


def _common(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The devices below a thin pool's metadata and data, each once."""
    found = {below["name"]: below for part in parts for below in part.get("children", [])}
    return list(found.values())


def _many_devices(uuid: str | None) -> str | None:
    """Btrfs over several disks shows only one of them to lsblk."""
    base = __salt__["ramboot_config.defaults"]()["paths"]["btrfs"]
    devices = sorted(os.path.basename(path) for path in glob.glob(f"{base}/{uuid}/devices/*"))
    return f"btrfs over {' and '.join(devices)}" if len(devices) > 1 else None


def _root_fault(layout: dict[str, Any], supported: list[dict[str, Any]]) -> str | None:
    roots = "; ".join(f"{item['fstype']} on {', '.join(item['on'])}" for item in supported)
    wanted = f"supported: {roots}; each with LUKS or without, btrfs with a subvolume for /"
    if layout["unknown"]:
        return f"/ is on {layout['unknown']}; {wanted}"
    for item in supported:
        if layout["fstype"] == item["fstype"] and layout["kind"] in item["on"]:
            if item.get("subvolume") and layout["fsroot"] == "/":
                return f"/ is {layout['fstype']} without a subvolume; {wanted}"
            return None
    return f"/ is {layout['fstype']} on {layout['kind']}; {wanted}"


def _policy_fault(layout: dict[str, Any], disk: str) -> str | None:
    if disk != "readonly" or layout["unknown"] or layout["kind"] != "partition":
        return None
    return (
        "ramboot:boot:disk: 'readonly' seals the disk under LVM, and / is"
        f" {layout['fstype']} on {layout['kind']}; allowed: attached or detached"
    )


def _backend_faults(layout: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What a backend that the pillar names can't do with this layout, though others can."""
    asked = __salt__["ramboot_config.backends"](settings)
    found = []
    for mount in layout["mounts"]:
        target, source = mount["target"], mount["source"] or ""
        if target == "/" or not source.startswith("/dev/"):
            continue
        if "overlay" in asked and layout["fstype"] == "btrfs" and source == layout["source"]:
            found.append(
                "the backend overlay needs all of / in one btrfs subvolume, and"
                f" {target} is {mount['fsroot']} of it"
            )
        if "snapshot" in asked and _below(target, QUBES) and not _with_root(layout, source):
            found.append(
                f"the backend snapshot would not cover {target}, which is on {source}: qubes would"
                " go on writing to it"
            )
    return found


def _with_root(layout: dict[str, Any], source: str) -> bool:
    """Whether a device lies on the same opened disk as /: as itself, or in its volume group."""
    if source == layout["source"] or layout["kind"] == "partition":
        return source == layout["source"]
    group, other = _VOLUME.match(layout["source"]), _VOLUME.match(source)
    return group is not None and other is not None and group[1] == other[1]


def _elsewhere(layout: dict[str, Any], rule: dict[str, list[str]]) -> list[str]:
    """System directories that a RAM session would go on writing to the disk."""
    found = []
    others = {}
    for mount in layout["mounts"]:
        target, source = mount["target"], mount["source"] or ""
        on_disk = source.startswith("/dev/") or mount["fstype"] == "zfs"
        if not on_disk or target == "/" or source == layout["source"]:
            continue
        if any(_below(target, apart) for apart in rule["apart"]):
            continue
        if any(_below(target, system) for system in rule["system"]):
            found.append(f"{target} is on {source}{_KEPT}")
        else:
            others[target] = source
    for link in _links(rule["system"]):
        place = os.path.realpath(link)
        for target, source in others.items():
            if _below(place, target):
                found.append(f"{link} leads to {place} on {source}{_KEPT}")
    return found


def _links(directories: list[str]) -> list[str]:
    """Those of these directories that are links; of the others what lies in them and is one."""
    found = []
    for directory in directories:
        if os.path.islink(directory):
            found.append(directory)
        elif os.path.isdir(directory):
            with os.scandir(directory) as entries:
                found += sorted(entry.path for entry in entries if entry.is_symlink())
    return found


def _below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")


def _missing(paths: dict[str, Any]) -> list[str]:
    """Programs and files that the formula builds on."""
    found = []
    for names in (["dracut"], ["lsinitrd"], paths["mkconfig"], paths["script_check"]):
        if not __salt__["ramboot_config.command"](names):
            found.append(f"{' or '.join(names)} is not installed")
    if not any(glob.glob(pattern) for pattern in paths["xen"]):
        found.append(f"no Xen hypervisor in /boot: nothing like {' or '.join(paths['xen'])}")
    if not os.access(paths["grub_linux_xen"], os.X_OK):
        found.append(f"{paths['grub_linux_xen']} is missing or not executable: no Xen menu entries")
    for old in paths["xen_cfg"]:
        if os.path.exists(old):
            found.append(
                f"{old} exists: xen.efi is started without GRUB (an old R4.0), which has no menu;"
                " supported: GRUB. If GRUB starts this system, remove that file"
            )
    return found
