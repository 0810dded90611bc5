# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a storage pool's bytes lie, and whether a RAM session takes them along. Questions only."""

from __future__ import annotations

import fnmatch
import os
from typing import Any

from salt.exceptions import CommandExecutionError

# Salt's loader sets it
__salt__: dict[str, Any]

__virtualname__ = "ramboot_qubes_pools"

# Pools that are files in a directory (QubesOS/qubes-core-admin: qubes/storage/file.py, reflink.py).
FILE_DRIVERS = ("file", "file-reflink")
# Where both put volumes, below dir_path (qubes/storage/file.py, _vid_prefix).
FOLDERS = ("appvms", "vm-templates")


def __virtual__() -> str:
    return __virtualname__


def ram_fault(name: str, config: dict[str, str] | None) -> str | None:
    """
    Why a RAM session would not take this pool along whole; None when it would.

    It would when each of its directories is a part of the root file system that is copied. On the
    installer's "plain" layout /var/lib/qubes is a file system of its own, and on btrfs every qube
    there is lies on /: neither is served.

    name, config
        a pool, as in ramboot_qubesadmin.pools; None when there is none of that name.

    Raises CommandExecutionError when the layout of / can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes_pools.ram_fault varlibqubes \
            '{driver: file, dir_path: /var/lib/qubes}'
    """
    if config is None:
        return f"there is no pool {name}"
    if config.get("driver") not in FILE_DRIVERS:
        return (
            f"pool {name} is {config.get('driver')}, which a RAM session does not copy; wanted: a"
            f" pool of files ({' or '.join(FILE_DRIVERS)}) on /"
        )
    layout = __salt__["ramboot_preflight.root_layout"]()
    if layout["fstype"] == "btrfs":
        return (
            f"pool {name}: / is btrfs, on which Qubes keeps every qube: all of them would have to"
            " fit into RAM; stateless qubes need a root on ext4 or xfs with its qubes elsewhere"
        )
    top = os.path.realpath(config["dir_path"])
    for path in (top, *(os.path.join(top, folder) for folder in FOLDERS)):
        if os.path.islink(path):
            return (
                f"{path} of pool {name} is a link, which may lead to the disk; ramboot wants none"
            )
        mount = mount_of(path, layout["mounts"])
        if mount["target"] != "/":
            return (
                f"{path} of pool {name} is on {mount['source']} ({mount['target']}), not on the"
                " root: it would stay on the disk; a pool of files on / serves (file_pools with"
                " on_root: true, and its name as pool)"
            )
    for pattern in __salt__["ramboot_config.load"]()["copy"]["exclude"]:
        if _covers(pattern, top):
            return f"copy:exclude has {pattern}: pool {name} ({top}) would not be in a RAM session"
    return None


def on_root(path: str) -> bool:
    """
    Whether a path, there or not yet, belongs to the file system at /, btrfs in any subvolume.

    path
        absolute.

    Raises CommandExecutionError when the mounts can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes_pools.on_root /mnt/usb/qubes
    """
    mounts = __salt__["ramboot_preflight.root_layout"]()["mounts"]
    root, mount = (mount_of(place, mounts) for place in ("/", os.path.realpath(path)))
    same = mount["fstype"] == "btrfs" and mount["uuid"] and mount["uuid"] == root["uuid"]
    return mount["target"] == "/" or bool(same)


def in_memory(path: str) -> str | None:
    """
    The type of the file system that a path, there or not yet, lies on, if that is in RAM.

    path
        absolute.

    Raises CommandExecutionError when the mounts can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes_pools.in_memory /tmp/qubes
    """
    mounts = __salt__["ramboot_preflight.root_layout"]()["mounts"]
    fstype = mount_of(os.path.realpath(path), mounts)["fstype"]
    return fstype if fstype in ("tmpfs", "ramfs") else None


def is_excluded(path: str) -> bool:
    """
    Whether the pillar's copy:exclude leaves a path, or all that it holds, out of a copied root.

    path
        absolute.

    Raises SaltInvocationError when the pillar is wrong.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes_pools.is_excluded /var/lib/qubes/appvms/work
    """
    patterns = __salt__["ramboot_config.load"]()["copy"]["exclude"]
    return any(_covers(pattern, os.path.realpath(path)) for pattern in patterns)


def mount_of(path: str, mounts: list[dict[str, Any]]) -> dict[str, Any]:
    """
    The mount that a path lies on: of the longest target above it the last one.

    path
        absolute, without links.
    mounts
        mappings with `target` at least.

    Raises CommandExecutionError when there is none, not even /.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes_pools.mount_of /boot '[{target: /}, {target: /boot}]'
    """
    best: dict[str, Any] | None = None
    for mount in mounts:
        target = mount["target"].rstrip("/")
        inside = path == target or path.startswith(f"{target}/")
        if inside and (best is None or len(mount["target"]) >= len(best["target"])):
            best = mount
    if best is None:
        raise CommandExecutionError(f"no mount shows {path}")
    return best


def folders_of(config: dict[str, str]) -> list[str]:
    """
    The directories below which a pool of files has those of its qubes; none for another pool.

    config
        as in ramboot_qubesadmin.pools.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes_pools.folders_of '{driver: file, dir_path: /x}'
    """
    if config.get("driver") not in FILE_DRIVERS:
        return []
    return [os.path.join(config["dir_path"], folder) for folder in FOLDERS]


def file_of(config: dict[str, str] | None, volume: dict[str, Any]) -> str | None:
    """
    The file of a volume; None in a pool that is not of files.

    config, volume
        as in ramboot_qubesadmin.pools and volumes.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes_pools.file_of '{driver: file, dir_path: /x}' '{vid: a/b}'
    """
    if not config or config.get("driver") not in FILE_DRIVERS:
        return None
    # qubes/storage/file.py, FileVolume.path; the same in reflink.py
    return os.path.join(config["dir_path"], f"{volume['vid']}.img")


def state_of(config: dict[str, str] | None, volume: dict[str, Any]) -> str:
    """
    A text that is another one as soon as a volume's contents were committed anew.

    Of a file its size and time; else size, allocated bytes and the newest revision, of which every
    halt of a qube makes one unless revisions are switched off. While a qube runs whose snapshots
    are switched off (revisions_to_keep -1), file-reflink renames what it writes to: that counts
    then, and is another one with each write (qubes/storage/reflink.py, start).

    config, volume
        as in ramboot_qubesadmin.pools and volumes.

    Raises CommandExecutionError when the volume's file is missing or can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes_pools.state_of '{driver: lvm_thin}' \
            '{size: 1, usage: 1, revisions: []}'
    """
    path = file_of(config, volume)
    if path is not None:
        for file in (path, f"{path.removesuffix('.img')}-dirty.img"):
            try:
                return f"{volume['size']} {os.stat(file).st_mtime_ns}"
            except FileNotFoundError:
                continue
            except OSError as error:
                raise CommandExecutionError(f"{file} can't be read: {error}") from error
        raise CommandExecutionError(
            f"volume {volume['vid']} of pool {volume['pool']} is missing: there is no {path}"
        )
    newest = max(volume["revisions"], default="-")
    return f"{volume['size']} {volume['usage']} {newest}"


def _covers(pattern: str, path: str) -> bool:
    """Whether a pattern of copy:exclude takes the path, something above it or all that is in it."""
    parts, glob = path.strip("/").split("/"), pattern.strip("/").split("/")
    if len(glob) == len(parts) + 1 and glob[-1] in ("*", *FOLDERS):
        glob = glob[:-1]
    return len(glob) <= len(parts) and all(
        fnmatch.fnmatchcase(part, piece) for part, piece in zip(parts, glob, strict=False)
    )
