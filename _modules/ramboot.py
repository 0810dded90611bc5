# SPDX-License-Identifier: GPL-2.0-or-later
"""Boot dom0 into RAM: what runs, what would fit, what is installed, what can leave traces.

Questions: status, plan, audit, initramfs, verify, orphans. Actions: rebuild, orphans with a token.
Failures raise.
"""

from __future__ import annotations

import calendar
import fcntl
import glob
import json
import os
import re
import stat
import struct
import time
from pathlib import PurePath
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError

# Salt's loader sets these
__salt__: dict[str, Any]
__context__: dict[str, Any]

__virtualname__ = "ramboot"

# rows of a part of the audit, and whether it could be determined
Part = tuple[list[dict[str, str]], bool]

ROOT = "/"
MIB = 1 << 20

# What a root takes in RAM, as the boot scripts reckon it (ramboot-copy.sh, ratio_percent and
# need_bytes): percent of the used bytes. Measured roots took 56 to 63 with lzo-rle; the rest is
# margin, for a root that does not fit is worse than a warning.
ZRAM_PERCENT = {"zstd": 55}
ZRAM_PERCENT_OTHER = 68
# zram's table has this part of the device's size; a store is at most so many times the RAM for it
# (ramboot-copy.sh, need_bytes; ramboot-snapshot.sh).
ZRAM_TABLE = 256
SNAPSHOT_STORE_FACTOR = 8
TMPFS_PERCENT = 104
# A new ext4 has this part of its size for inodes: 256 bytes for each 16 KiB (mke2fs.conf).
INODES_OF_EXT4 = 64
TMPFS_EXTRA_BYTES = 16 * MIB
# What the same measurements lead one to expect, in percent.
EXPECTED_PERCENT = {
    "lz4": 62,
    "lzo-rle": 60,
    "lzo": 60,
    "zstd": 48,
    "tmpfs": 102,
    "image": 45,
}
# Before there is an image, and what lies beside one in RAM (ramboot-image.sh).
IMAGE_PERCENT = 50
IMAGE_EXTRA_BYTES = 16 * MIB
# What ramboot-image.sh calls the overlay over an image.
IMAGE_ROOT = "ramboot-image"
# Backends in whose sessions dom0 gives no memory back (ramboot-root.sh, BALLOON_MASKS).
OUTSIDE_BALANCING = ("tmpfs", "image", "overlay")
# Of dom0's maximum, what is available at the prompt: the kernel's page tables and the unpacked
# initramfs take the rest. An estimate; the boot measures.
AT_PROMPT_PERCENT = 95

# File systems without a device: what they hold is in the kernel's memory or nowhere.
WITHOUT_DEVICE = {
    "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts",
    "devtmpfs", "efivarfs", "fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "ramfs",
    "rpc_pipefs", "securityfs", "selinuxfs", "sysfs", "tmpfs", "tracefs", "xenfs",
}  # fmt: skip
# EFI variables are in the board's flash: not memory that power-off clears.
ON_FLASH = {"efivarfs", "pstore"}

# The copy-on-write layer of the backend snapshot (ramboot-layer.sh): all writes go to its store in
# RAM, though a disk lies below it.
LAYER = "ramboot-layer"
# The root of the backend overlay, and where its writes go (ramboot-overlay.sh).
OVERLAY = "ramboot-root"
OVERLAY_UPPER = "/run/ramboot/root/rw/upper"
# The device of the disk policy readonly (ramboot-seal.sh): a read-only loop device under LVM.
SEAL = "ramboot-seal"
SEALED = "the disk is sealed and refuses every write"
# linux include/uapi/linux/loop.h: LOOP_GET_STATUS64 fills a struct loop_info64, in which lo_flags
# follows five numbers of 64 bits and three of 32.
LOOP_GET_STATUS64 = 0x4C05
LOOP_INFO64_BYTES = 232
LO_FLAGS_AT = 52
LO_FLAGS_READ_ONLY = 1

# In __context__ while the audit says what a RAM session would be.
PRETEND = "ramboot.pretend"

# Older than this, and nobody watches how full the session is.
FILLED_OLD_S = 60

# What GRUB itself writes there at each boot, whichever entry is chosen.
SAVES_BOOT = re.compile(r"^\s*save_env\b.*\bboot_success\b", re.MULTILINE)
# Units that write /boot's grubenv (grub2: grub-boot-success.timer is a user unit).
GRUBENV_UNITS = {
    "grub-boot-success.timer": "user",
    "grub-boot-indeterminate.service": "system",
    "grub2-systemd-integration.service": "system",
}


def __virtual__() -> str:
    return __virtualname__


def initramfs() -> dict[str, dict[str, Any]]:
    """
    The initramfs of each installed kernel: has it our module, is it current, if not why.

    Returns {kernel: {"image": path, "module": bool, "state": "current" | "stale" | "ignored",
    "reason": sentence or None}}. `ignored` are rescue images, which stay as they are.

    Raises CommandExecutionError when lsinitrd can't be run or /boot has no kernel.

    CLI Example:

    .. code-block:: bash

        qubesctl ramboot.initramfs
    """
    return __salt__["ramboot_initramfs.states"]()


def rebuild(kernel: str | None = None, force: bool = False) -> dict[str, dict[str, Any]]:
    """
    Rebuild the initramfs of every kernel whose image is stale, and of no other.

    Each is built beside the old image, checked (the kernel's modules, our files by their hashes,
    every dracut module and LUKS or LVM program of the old image), synced and renamed.

    kernel
        only this one. Default: all.
    force
        those that are current as well. Default: False.

    Returns {kernel: {"image": path, "action": "rebuilt" | "kept", "reason": sentence or None}}.

    Raises CommandExecutionError with the kernel, what failed and what had changed before; the old
    image of the kernel that failed stays. Also while another run rebuilds or undoes.

    CLI Example:

    .. code-block:: bash

        qubesctl ramboot.rebuild
        qubesctl ramboot.rebuild kernel=6.12.1-1.qubes.fc41.x86_64 force=True
    """
    return __salt__["ramboot_initramfs.rebuild"](kernel=kernel, force=force)


def verify() -> dict[str, Any]:
    """
    Each file of ours, on disk and in each kernel's initramfs, against what was shipped.

    Returns {"disk": {path: FILE}, "initramfs": {image: {path: FILE}}, "faults": [sentences]};
    FILE: {"expected", "actual": SHA-256 or None, "mode": "0644", "owner": "root:root",
    "verdict": "good" | "changed" | "missing" | "unexpected" | "wrong mode" | "wrong owner"}.
    `faults` is empty when all is well. The image of the backend image is among them where there is
    one; reading it whole takes some seconds.

    Raises CommandExecutionError when ramboot is not installed or an image can't be read.

    CLI Example:

    .. code-block:: bash

        qubesctl ramboot.verify
    """
    report = __salt__["ramboot_initramfs.verify"]()
    for path, file in __salt__["ramboot_image.verify"]().items():
        report["disk"][path] = file
        if file["verdict"] != "good":
            report["faults"].append(f"{path}: {file['verdict']}")
    return report


def status() -> dict[str, Any]:
    """
    What this session is, as the initramfs noted it, and live figures.

    Returns the keys of /run/ramboot/status.json (schema, session, requested, backend, disk, reason,
    source, ram, seconds) and `live`: {"ram": {"total_bytes", "available_bytes"}, "root":
    {"device", "fstype", "size_bytes", "used_bytes"}, "zram": {"device", "algorithm", "data_bytes",
    "compressed_bytes", "memory_bytes"} or None (is / on one), "filled": {"percent", "what"
    (fullest: the store, the root file system or RAM), "left_bytes", "warn_percent": [int],
    "pause_percent", "paused": [qube], "lost": bool, ...} or None (nobody watches), "swap":
    [{"name", "type", "size_bytes", "used_bytes"}], "initramfs": {"image", "age_s"} or None (of the
    running kernel), "image": {"made" (UTC), "age_s", "bytes"} or None (the prebuilt image that / is
    made of, or else that on the disk)}.

    Where our module did not run at boot, `session` is `persistent` when / is on a disk, else
    `unknown`, and `reason` says so.

    Raises CommandExecutionError when status.json can't be understood.

    CLI Example:

    .. code-block:: bash

        qubesctl ramboot.status
    """
    return {**_noted(), "live": _live()}


def plan() -> dict[str, dict[str, Any]]:
    """
    Whether a RAM session would fit, for each backend. Nothing is changed.

    The same arithmetic as at boot: what a copy of / without the excludes holds, times the room that
    the backend takes, plus reserve and headroom of the pillar. Stateless qubes that the pillar asks
    for and that are not there yet are reckoned as if they were.

    Returns {"zram" | "tmpfs" | "image" | "snapshot" | "overlay": {"needed_bytes", "root_bytes" (of
    them the root), "expected_bytes" (what the root most likely takes), "available_bytes" (at the
    start of a RAM boot: of grub:dom0_mem_max_mib, or of the machine's RAM if that is less, for a
    backend with a menu entry, or for all with dom0_mem_scope `all`; else of dom0's memory now),
    "fits": bool, "fits_ordinary": bool (from the ordinary menu entry, where the question is and
    where a backend as boot:mode starts: that has dom0's memory now, unless dom0_mem_scope is
    `all`), "available_now_bytes" (if this boot's memory were all there is), "fits_now": bool,
    "source_bytes", "excluded_bytes", "qubes_bytes" (of source_bytes, stateless qubes that are
    there), "qubes_pending_bytes" (of source_bytes, those that are not), "algorithm": name or None,
    "says": one sentence, with what boot:disk means for that backend}}.

    Raises SaltInvocationError when the pillar is wrong; CommandExecutionError when it asks for
    qubes and qubesd can't be asked, and in a session whose / does not show what the disk's holds
    (image, overlay).

    CLI Example:

    .. code-block:: bash

        qubesctl ramboot.plan
    """
    settings = __salt__["ramboot_config.load"]()
    session = _ram_session()
    if session in ("image", "overlay"):
        raise CommandExecutionError(
            f"this is a RAM session ({session}), where / does not show what the disk's root holds;"
            " ask in a persistent boot"
        )
    used, excluded = source_bytes(settings["copy"]["exclude"])
    qubes = __salt__["ramboot_qubes.budget"]()
    used += qubes["pending_bytes"]
    spare = (settings["memory"]["reserve_mib"] + settings["memory"]["headroom_mib"]) * MIB
    machine = _machine_bytes()
    granted = _granted(settings["grub"], machine)
    memory = {where: size * AT_PROMPT_PERCENT // 100 for where, size in granted.items()}
    chosen = settings["zram"]["algorithm"]
    algorithm = "lz4" if chosen == "auto" else chosen
    zram_root = used * ZRAM_PERCENT.get(algorithm, ZRAM_PERCENT_OTHER) // 100
    zram_root += _zram_size(settings, used) // ZRAM_TABLE
    tmpfs_root = used * TMPFS_PERCENT // 100 + TMPFS_EXTRA_BYTES
    image_root, image_expected = _image_bytes(used, qubes["pending_bytes"])
    expected = {
        "zram": used * EXPECTED_PERCENT[algorithm] // 100,
        "tmpfs": used * EXPECTED_PERCENT["tmpfs"] // 100,
        "image": image_expected,
    }
    found = {}
    for backend in ("zram", "tmpfs", "image", "snapshot", "overlay"):
        place = "entry" if backend in settings["grub"]["entries"] else "ordinary"
        roots = {
            where: {
                "zram": zram_root,
                "tmpfs": tmpfs_root,
                "image": image_root,
                # copies nothing: what it takes is what the session writes
                "snapshot": _store_size(settings, size) // ZRAM_TABLE,
                "overlay": 0,
            }[backend]
            for where, size in memory.items()
        }
        small = _too_small(settings, backend, used)
        fits = {where: not small and roots[where] + spare <= size for where, size in memory.items()}
        root = roots[place]
        found[backend] = {
            "needed_bytes": root + spare,
            "root_bytes": root,
            "expected_bytes": expected.get(backend, root),
            "available_bytes": memory[place],
            "fits": fits[place],
            "fits_ordinary": fits["ordinary"],
            "available_now_bytes": memory["now"],
            "fits_now": fits["now"],
            "source_bytes": used,
            "excluded_bytes": excluded,
            "qubes_bytes": qubes["present_bytes"],
            "qubes_pending_bytes": qubes["pending_bytes"],
            "algorithm": algorithm if backend in ("zram", "snapshot") else None,
            "says": f"{_mib(root + spare)} of RAM needed, "
            + _fits_says(settings, backend, memory, fits)
            + small
            + _kept_says(backend, granted[place], machine)
            + _policy_says(settings["boot"]["disk"], backend)
            + (f"; {_image_says()}" if backend == "image" else ""),
        }
    return found


def audit(table: bool = False) -> list[dict[str, Any]] | str:
    """
    Every place known to us where this session can leave traces.

    table
        lines to read, the worst first, instead of data. Default: False.

    Returns [{"place", "finding", "verdict"}] with `ram` (goes with the power), `disk` (is written
    to a disk), `trace` (can reach a disk though nothing writes there on purpose) or `unknown`
    (could not be told; count it as a trace). Covers the root and what lies below it, mounts, /boot,
    swap, zram's backing devices, active logical volumes, the seal of the disk policy readonly,
    names in LVM's metadata, block devices, writers of grubenv, logs and files of ours; each volume
    of each qube, pools, qubes that were made or removed in this session, what is left of qubes that
    are no more. Of the qubes the row "qubes" has the verdict over all; the last row, "all", that
    over everything. Rows of volumes have `qube`, `volume`, `pool`, `device` and `ephemeral`
    (ramboot_qubes_audit.places).

    In a persistent session each row has `would` too: the verdict that it would get in a RAM session
    with the backend, disk policy and swap of the pillar (`ram` for what would not be there,
    `unknown` where that could not be told).

    CLI Example:

    .. code-block:: bash

        qubesctl ramboot.audit
        qubesctl ramboot.audit table=True
    """
    found = _audit_parts()
    rows = [row for part, _ in found for row in part]
    if _persistent():
        __context__[PRETEND] = _session_of_the_pillar()
        try:
            pretended = _audit_parts()
        finally:
            del __context__[PRETEND]
        then = {row["place"]: row["verdict"] for part, _ in pretended for row in part}
        rows = [
            # what a part that failed does not name need not be gone
            {**row, "would": then.get(row["place"], "ram" if now_told and told else "unknown")}
            for (part, now_told), (_, told) in zip(found, pretended, strict=True)
            for row in part
        ]
    return __salt__["ramboot_audit.table"](rows) if table else rows


def orphans(remove: str | None = None) -> dict[str, Any]:
    """
    List what is left of qubes that are no more, or delete what was listed.

    A qube that was made in a RAM session is forgotten with it; its volumes on the disk stay, and
    its name with them.

    remove
        the token of a listing: deletes all that it had, if it is still the same. Only in a
        persistent session. Default: list.

    Returns {"orphans": [{"what": "VG/LV" or a directory, "kind": "volume" | "directory", "qube":
    name, "bytes": int, "made": text}], "token": text or None} or, after a deletion, {"removed":
    [what]}. In a session on a stale image there is no token, and `note` says why.

    Raises CommandExecutionError when qubesd or LVM can't be asked, in a RAM session, with another
    token than the listing's, and when something can't be deleted.

    CLI Example:

    .. code-block:: bash

        qubesctl ramboot.orphans
        qubesctl ramboot.orphans remove=t0123456789abcde
    """
    if remove is None:
        return __salt__["ramboot_qubes_audit.orphans"]()
    return {"removed": __salt__["ramboot_qubes_audit.remove_orphans"](remove)}


def backing(device: str) -> str:
    """
    What a device's data lies on, down to the last device below it.

    device
        as in mountinfo or /proc/swaps: /dev/..., or the name of a file system without one.

    Returns `ram`, `disk` (any disk below makes it one), `sealed` (the disk of the policy readonly,
    through the device that refuses every write: the kernel is asked whether the loop device below
    it is read-only, and what it does not say counts as no) or `unknown`.

    CLI Example:

    .. code-block:: bash

        qubesctl ramboot.backing /dev/zram1
    """
    if device in ("tmpfs", "ramfs"):
        return "ram"
    if device == OVERLAY:
        return "ram" if _is_our_overlay() else "unknown"
    if device == IMAGE_ROOT and os.path.exists(_paths()["image_noted"]):
        # a file in a tmpfs, and a tmpfs above it; made before the root was there
        return "ram"
    if not device.startswith("/dev/"):
        return "unknown"
    kinds = _leaves(os.path.basename(os.path.realpath(device)))
    if "disk" in kinds:
        return "disk"
    if kinds == {"ram"}:
        return "ram"
    return "sealed" if "sealed" in kinds and kinds <= {"ram", "sealed"} else "unknown"


def source_bytes(exclude: list[str]) -> tuple[int, int]:
    """
    What a copy of / would hold, as the boot scripts reckon it (ramboot-copy.sh).

    exclude
        patterns of what stays behind.

    Returns bytes of the copy, and of what stays behind: on the file system of /, or of its btrfs in
    what fstab mounts. What is excluded on another one is in no copy anyway.

    Raises CommandExecutionError when no mount shows /, OSError when a directory can't be read.

    CLI Example:

    .. code-block:: bash

        qubesctl ramboot.source_bytes "['/tmp/*']"
    """
    room = os.statvfs(ROOT)
    apart = _apart()
    found = {
        # as a link above it has it
        os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        for pattern in [*exclude, f"{_paths()['image_directory']}/*"]
        for path in glob.glob(os.path.join(ROOT, pattern.lstrip("/")))
    }
    stays = {path for path in found if apart.isdisjoint(map(str, [path, *PurePath(path).parents]))}
    # what lies below another of them is counted with it
    tops = [path for path in stays if stays.isdisjoint(map(str, PurePath(path).parents))]
    excluded = sum(_tree_bytes(path, apart) for path in tops)
    used = (room.f_blocks - room.f_bfree) * room.f_frsize
    fstype = _root_mount()["fstype"]
    if fstype == "btrfs":
        # it holds what is not mounted as well, and shares and compresses blocks; the copy does not
        used = _tree_bytes(os.path.realpath(ROOT), apart, across=True)
    elif fstype == "xfs":
        # of blocks that files share each file's copy has its own
        used = max(used, _tree_bytes(os.path.realpath(ROOT), apart))
    return max(0, used - excluded), excluded


# Status


def _noted() -> dict[str, Any]:
    path = _paths()["status"]
    try:
        with open(path, encoding="utf-8") as source:
            noted = json.load(source)
    except FileNotFoundError:
        noted = _unnoted(path)
    except (OSError, ValueError) as error:
        raise CommandExecutionError(f"{path} can't be understood: {error}") from error
    if not isinstance(noted, dict) or noted.get("schema") != 1:
        raise CommandExecutionError(f"{path} has another format than this version's")
    return noted


def _ram_session() -> str | None:
    """The backend of this session; None in a persistent one."""
    noted = _noted()
    return noted["backend"] if noted["session"] == "ram" else None


def _unnoted(path: str) -> dict[str, Any]:
    """What stands for status.json when our module did not run."""
    root = _root_mount()
    on_disk = backing(root["source"]) == "disk"
    return {
        "schema": 1,
        "session": "persistent" if on_disk else "unknown",
        "requested": None,
        "backend": None,
        "disk": None,
        "reason": f"the ramboot module did not run at this boot: there is no {path}",
        "source": None,
        "ram": None,
        "seconds": {},
    }


def _live() -> dict[str, Any]:
    memory = _meminfo()
    root = _root_mount()
    room = os.statvfs(ROOT)
    return {
        "ram": {"total_bytes": memory["MemTotal"], "available_bytes": memory["MemAvailable"]},
        "root": {
            "device": root["source"],
            "fstype": root["fstype"],
            "size_bytes": room.f_blocks * room.f_frsize,
            "used_bytes": (room.f_blocks - room.f_bfree) * room.f_frsize,
        },
        "zram": _zram(root["source"]),
        "filled": _filled(),
        "swap": __salt__["ramboot_swap.active"](),
        "initramfs": _running_image(),
        "image": _prebuilt(),
    }


def _zram(device: str) -> dict[str, Any] | None:
    """Figures of the root's zram device, or of the store that a snapshot session writes into
    (Documentation/admin-guide/blockdev/zram.rst, mm_stat).
    """
    name = os.path.basename(os.path.realpath(device))
    if not name.startswith("zram") and os.path.exists(store := _paths()["layer_store"]):
        name = f"zram{_read(store).strip()}"
    folder = f"{_sys()}/block/{name}"
    if not name.startswith("zram") or not os.path.isdir(folder):
        return None
    data, compressed, memory = [int(field) for field in _read(f"{folder}/mm_stat").split()[:3]]
    algorithms = _read(f"{folder}/comp_algorithm")
    return {
        "device": f"/dev/{name}",
        "algorithm": algorithms.partition("[")[2].partition("]")[0] or algorithms.strip(),
        "data_bytes": data,
        "compressed_bytes": compressed,
        "memory_bytes": memory,
    }


def _filled() -> dict[str, Any] | None:
    """What ramboot-watch found last. It looks every two seconds until the session is lost."""
    path = _paths()["filled"]
    try:
        age = time.time() - os.stat(path).st_mtime
        noted = json.loads(_read(path))
    except (OSError, ValueError):
        return None
    if not isinstance(noted, dict):
        return None
    return noted if age < FILLED_OLD_S or noted.get("lost") else None


def _running_image() -> dict[str, Any] | None:
    kernel = os.uname().release
    for pattern in _paths()["images"]:
        image = pattern.format(kernel=kernel)
        if os.path.isfile(image):
            return {"image": image, "age_s": max(0, int(time.time() - os.stat(image).st_mtime))}
    return None


def _prebuilt() -> dict[str, Any] | None:
    found = __salt__["ramboot_image.manifest_or_none"]
    image = found(_paths()["image_noted"]) or found()
    if image is None:
        return None
    made = calendar.timegm(time.strptime(image["made"], "%Y-%m-%dT%H:%M:%SZ"))
    age = max(0, int(time.time() - made))
    return {"made": image["made"], "age_s": age, "bytes": image["bytes"]}


# Plan


def _granted(grub: dict[str, Any], machine: int | None) -> dict[str, int]:
    """What Xen gives dom0: in a menu entry of ours, in the ordinary one, and in this boot."""
    now = entry = _meminfo()["MemTotal"]
    if grub["dom0_mem_max_mib"] != "keep":
        wanted = grub["dom0_mem_max_mib"] * MIB
        entry = min(wanted, machine or wanted)
    return {
        "entry": entry,
        "ordinary": entry if grub["dom0_mem_scope"] == "all" else now,
        "now": now,
    }


def _fits_says(
    settings: dict[str, Any], backend: str, memory: dict[str, int], fits: dict[str, bool]
) -> str:
    """Whether it fits in the way that the pillar offers, and in the other where that differs."""
    grub, boot = settings["grub"], settings["boot"]
    verdicts = {where: "fits" if good else "does not fit" for where, good in fits.items()}
    listed = backend in grub["entries"]
    place = "entry" if listed else "ordinary"
    differs = fits["entry"] != fits["ordinary"]
    other = in_it = ""
    asked = boot["mode"] == "ask"
    if listed and differs and backend == (boot["backend"] if asked else boot["mode"]):
        in_it = " in its menu entry"
        other = "at the question of the ordinary entry" if asked else "in the ordinary entry"
        other = f"; {other}, with {_mib(memory['ordinary'])}: {verdicts['ordinary']}"
    elif not listed and differs:
        other = f"; in a menu entry (grub:entries), with {_mib(memory['entry'])}: "
        other += verdicts["entry"]
    wanted = grub["dom0_mem_max_mib"]
    granted = listed or grub["dom0_mem_scope"] == "all"
    if granted and wanted != "keep" and memory[place] < wanted * MIB * AT_PROMPT_PERCENT // 100:
        in_it += " with all that the machine has"
    return f"{_mib(memory[place])} available{in_it}: {verdicts[place]}{other}"


def _image_bytes(used: int, pending: int) -> tuple[int, int]:
    """What an image takes in RAM, as the boot reckons it and as is likely; of one that is built,
    with what is pending and not in it.
    """
    image = __salt__["ramboot_image.manifest_or_none"]()
    if image is None:
        size, expected = used * IMAGE_PERCENT // 100, used * EXPECTED_PERCENT["image"] // 100
    else:
        # the next is reckoned so too (ramboot_image.room)
        more = pending * image["bytes"] // max(image["source_bytes"], 1)
        size = expected = image["bytes"] + more
    return size + IMAGE_EXTRA_BYTES, expected


def _too_small(settings: dict[str, Any], backend: str, used: int) -> str:
    """What to say of a RAM root whose size in the pillar does not hold the copy; else nothing. A
    boot looks at that of tmpfs first (make_tmpfs_root), of zram it finds out when it is full.
    """
    size = settings.get(backend, {}).get("size_mib", "auto")
    if size == "auto":
        return ""
    room = size * MIB
    if backend == "zram":
        # as blocks, all that there is (plan_zram); else as files onto a new ext4
        if _root_mount()["fstype"] == "ext4" and room >= _root_size():
            return ""
        room -= room // INODES_OF_EXT4
    if used < room:
        return ""
    return f": {backend}:size_mib is too small for the {_mib(used)} to be copied"


def _machine_bytes() -> int | None:
    """The machine's RAM, which no dom0_mem can exceed: `total_memory` of `xl info`, in MiB (Xen,
    tools/xl/xl_info.c). None where that can't be told, as without Xen.
    """
    xl = __salt__["ramboot_config.command"](["xl"])
    if not xl:
        return None
    done = __salt__["cmd.run_all"]([xl, "info"], python_shell=False, env={"LC_ALL": "C"})
    found = re.search(r"^total_memory\s*:\s*([0-9]+)$", done["stdout"], re.MULTILINE)
    return int(found[1]) * MIB if done["retcode"] == 0 and found else None


def _zram_size(settings: dict[str, Any], used: int) -> int:
    """How large the RAM root is made (ramboot-initramfs.sh, plan_zram)."""
    size = settings["zram"]["size_mib"]
    if size != "auto":
        return size * MIB
    if _root_mount()["fstype"] == "ext4":
        return _root_size()
    return used * 115 // 100 + settings["memory"]["headroom_mib"] * 2 * MIB


def _root_size() -> int:
    room = os.statvfs(ROOT)
    return room.f_blocks * room.f_frsize


def _store_size(settings: dict[str, Any], available: int) -> int:
    """How large the store of a snapshot is made, on a disk that is larger than that."""
    size = settings["snapshot"]["store_mib"]
    if size != "auto":
        return size * MIB
    room = available - settings["memory"]["reserve_mib"] * MIB
    return max(0, room) * SNAPSHOT_STORE_FACTOR


def _image_says() -> str:
    image = __salt__["ramboot_image.manifest_or_none"]()
    # no copy of the root has it
    if image is None and _ram_session() in ("zram", "tmpfs"):
        return "whether there is an image can't be told in this session"
    if image is None:
        return "no image is built yet"
    try:
        reason = __salt__["ramboot_image.stale"]()
    except CommandExecutionError as error:
        reason = f"could not be told: {error}"
    return f"the image is stale: {reason}" if reason else f"the image of {image['made']} is current"


def _copied(mounts: list[dict[str, Any]]) -> set[str]:
    """Where that is mounted of which a copy of / is made: /, and of its btrfs what fstab mounts
    (ramboot-copy.sh, fstab_subvolumes).
    """
    root = _root_of(mounts)
    if root["fstype"] != "btrfs" or not os.path.isfile(_paths()["fstab"]):
        return {"/"}
    lines = [line.split() for line in _read(_paths()["fstab"]).splitlines()]
    named = {
        os.path.normpath(fields[1])
        for fields in lines
        if len(fields) > 2 and not fields[0].startswith("#") and fields[2] == "btrfs"
    }
    return {"/"} | {
        mount["target"]
        for mount in mounts
        if mount["target"] in named
        and (mount["fstype"], mount["source"]) == (root["fstype"], root["source"])
    }


def _apart() -> set[str]:
    """Places below / of which a copy has nothing but the directory."""
    mounts = _mounts()
    top, copied = os.path.realpath(ROOT), _copied(mounts)
    return {
        os.path.join(top, mount["target"].lstrip("/"))
        for mount in mounts
        if mount["target"] not in copied
    }


def _tree_bytes(top: str, apart: set[str], across: bool = False) -> int:
    """Allocated bytes at and below top, a hard-linked file once, without what is apart; on top's
    device alone, as rm at boot, or across devices, of which each subvolume of a btrfs is one.
    """
    total, seen, todo, device = 0, set(), [top], None
    while todo:
        path = todo.pop()
        try:
            info = os.lstat(path)
            device = info.st_dev if device is None else device
            if path in apart or (not across and info.st_dev != device):
                continue
            if stat.S_ISDIR(info.st_mode):
                todo += [os.path.join(path, name) for name in os.listdir(path)]
            elif info.st_nlink > 1:
                if (info.st_dev, info.st_ino) in seen:
                    continue
                seen.add((info.st_dev, info.st_ino))
        except FileNotFoundError:
            # deleted meanwhile
            continue
        total += info.st_blocks * 512
    return total


def _kept_says(backend: str, granted: int, machine: int | None) -> str:
    """What is left for qubes where dom0 gives no memory back."""
    if backend not in OUTSIDE_BALANCING:
        return ""
    left = "" if machine is None else f" and leaves {_mib(max(0, machine - granted))} for qubes"
    return f"; dom0 keeps {_mib(granted)} for the whole session{left}"


def _policy_says(disk: str, backend: str) -> str:
    if disk == "attached":
        return ""
    if backend in __salt__["ramboot_config.defaults"]()["need_the_disk"]:
        return f"; not with boot:disk {disk}, which the pillar asks for"
    return f"; with boot:disk {disk} no qube on the disk will start"


def _mib(size: int) -> str:
    return f"{size // MIB} MiB"


# Audit


def _audit_parts() -> list[Part]:
    parts = (
        _audit_mounts,
        _audit_lower,
        _audit_swap,
        _audit_zram,
        _audit_volumes,
        _audit_seal,
        _audit_names,
        _audit_disks,
        _audit_grub,
        _audit_grubenv,
        _audit_files,
        _audit_image,
        _audit_qubes,
    )
    found = [_tried(part) for part in parts]
    over_all = __salt__["ramboot_audit.verdict"]([row for rows, _ in found for row in rows])
    return [*found, ([over_all], True)]


def _persistent() -> bool:
    try:
        return backing(_root_mount()["source"]) == "disk"
    except (CommandExecutionError, OSError, ValueError):
        return False


def _session_of_the_pillar() -> dict[str, Any]:
    """What the next RAM session would be; with a wrong pillar, that of the defaults."""
    try:
        settings = __salt__["ramboot_config.load"]()
    except SaltInvocationError:
        settings = __salt__["ramboot_config.load"]({})
    boot = settings["boot"]
    backend = boot["backend"] if boot["mode"] in ("ask", "off") else boot["mode"]
    return {
        "lvm": backend != "snapshot" and boot["disk"] == "attached",
        "swap": settings["swap"] == "keep",
        "mounts": boot["disk"] == "attached",
        # nothing beside the layer is mounted or used for swap (ramboot-root.sh, on_layer)
        "layer": backend == "snapshot",
    }


def _pretended() -> dict[str, Any] | None:
    return __context__.get(PRETEND)


def _tried(part: Any) -> Part:
    """What can't be determined is a finding of its own."""
    try:
        return part(), True
    except (CommandExecutionError, OSError, ValueError, KeyError) as error:
        place = part.__name__.removeprefix("_audit_")
        return [_place(place, f"could not be determined: {error}", "unknown")], False


def _place(place: str, finding: str, verdict: str) -> dict[str, str]:
    return {"place": place, "finding": finding, "verdict": verdict}


def _audit_mounts() -> list[dict[str, str]]:
    places = []
    for mount in _mounts():
        where, what = mount["target"], f"{mount['fstype']} from {mount['source']}"
        mode = "writable" if mount["writable"] else "read-only"
        if mount["fstype"] in ON_FLASH:
            places.append(_place(where, f"{mount['fstype']}, {mode}: the board's flash", "trace"))
        elif mount["fstype"] in WITHOUT_DEVICE:
            # the many of /proc and /sys would hide what matters
            if mount["target"] == "/":
                places.append(_place(where, what, "ram"))
        else:
            below = backing(mount["source"])
            verdict = __salt__["ramboot_audit.of_backing"](below)
            if below == "disk" and not mount["writable"]:
                # mounting alone can write: journal, thin pool
                verdict = "trace"
            if below == "sealed":
                mode += f"; {SEALED}"
            places.append(_place(where, f"{what}, {mode}", verdict))
    return places


def _audit_lower() -> list[dict[str, str]]:
    """The disk's root below the backend overlay; the boot scripts hide its mount."""
    if _root_mount()["source"] != OVERLAY:
        return []
    below = _noted()["source"] or {}
    return [
        _place(
            "below /",
            f"{below.get('fstype')} from {below.get('device')}, mounted read-only and without its"
            " journal",
            "trace",
        )
    ]


def _audit_swap() -> list[dict[str, str]]:
    found = __salt__["ramboot_swap.active"]()
    pretended = _pretended()
    if pretended and not pretended["swap"]:
        found = []
    elif pretended and pretended["layer"]:
        found = [swap for swap in found if not _beside_layer(swap["name"])]
    if not found:
        return [_place("swap", "none is active", "ram")]
    return [
        _place(
            f"swap {swap['name']}",
            f"{swap['type']}, {_mib(swap['used_bytes'])} used",
            __salt__["ramboot_audit.of_backing"](_swap_lies_on(swap)),
        )
        for swap in found
    ]


def _swap_lies_on(swap: dict[str, Any]) -> str:
    device = swap["name"]
    if swap["type"] == "file":
        device = __salt__["ramboot_qubes_pools.mount_of"](device, _mounts())["source"]
    return backing(device)


def _audit_zram() -> list[dict[str, str]]:
    places = []
    for folder in sorted(glob.glob(f"{_sys()}/block/zram*")):
        # absent where the kernel has no write-back
        path = f"{folder}/backing_dev"
        device = _read(path).strip() if os.path.exists(path) else "none"
        verdict = "ram" if device == "none" else "disk"
        places.append(_place(os.path.basename(folder), f"backing device: {device}", verdict))
    return places


def _audit_volumes() -> list[dict[str, str]]:
    places = []
    for folder in sorted(glob.glob(f"{_sys()}/block/dm-*")):
        if not _read(f"{folder}/dm/uuid").startswith("LVM-"):
            continue
        name = _read(f"{folder}/dm/name").strip()
        below = backing(f"/dev/{os.path.basename(folder)}")
        if below == "sealed":
            places.append(_place(f"volume {name}", f"active; {SEALED}", "ram"))
        elif below != "ram":
            verdict = "trace" if below == "disk" else "unknown"
            places.append(_place(f"volume {name}", f"active, on {below}", verdict))
    return places


def _audit_seal() -> list[dict[str, str]]:
    """Whether a disk that was to be sealed is, and nothing goes around the seal."""
    try:
        with open(_paths()["status"], encoding="utf-8") as source:
            policy = json.load(source)["disk"]
    except FileNotFoundError:
        return []
    if policy != "readonly":
        return []
    for folder in glob.glob(f"{_sys()}/class/block/dm-*"):
        loop = _sealed_by(os.path.basename(folder))
        if loop:
            # a path of the initramfs, the device's own name at its end
            below = _read(f"{_sys()}/class/block/{loop}/loop/backing_file").strip()
            device = os.path.basename(below)
            users = sorted(os.listdir(f"{_sys()}/class/block/{device}/holders"))
            if users:
                finding = f"/dev/{device} is used beside the seal, by {' and '.join(users)}"
                return [_place("seal", finding, "trace")]
            return [_place("seal", f"/dev/{device}, through {loop}, which is read-only", "ram")]
    return [_place("seal", "the disk was to be sealed, and no seal was found", "unknown")]


def _audit_grub() -> list[dict[str, str]]:
    """Fedora's GRUB, which is Qubes', notes each boot before it shows its menu (qubes-grub2, patch
    0113: 10_reset_boot_success).
    """
    paths = _paths()
    for path in (paths["grub_cfg"], paths["grub_cfg_fallback"], paths["grub_cfg_efi"]):
        if os.path.isfile(path) and SAVES_BOOT.search(_read(path)):
            finding = f"GRUB writes boot_success beside {path} at each boot, before Linux"
            return [_place("grubenv", finding, "trace")]
    return []


def _audit_grubenv() -> list[dict[str, str]]:
    places = []
    for unit, kind in GRUBENV_UNITS.items():
        folders = _paths()["units"]
        if kind == "user":
            folders = [os.path.join(os.path.dirname(folder), "user") for folder in folders]
        found = [path for folder in folders if os.path.lexists(path := os.path.join(folder, unit))]
        if not found:
            continue
        masked = os.path.realpath(found[0]) == "/dev/null" or _pretended() is not None
        finding = "masked" if masked else "can write grubenv in /boot"
        places.append(_place(unit, finding, "ram" if masked else "trace"))
    return places


def _audit_names() -> list[dict[str, str]]:
    return __salt__["ramboot_audit.names"]()


def _audit_disks() -> list[dict[str, str]]:
    return __salt__["ramboot_audit.disks"](_mounts())


def _audit_files() -> list[dict[str, str]]:
    return __salt__["ramboot_audit.files"](_mounts())


def _audit_image() -> list[dict[str, str]]:
    image = __salt__["ramboot_image.manifest"]()
    if image is None:
        return []
    finding = f"the image of {image['made']}: what / held then, also what was deleted since"
    return [_place(_paths()["image_directory"], finding, "disk")]


def _audit_qubes() -> list[dict[str, str]]:
    shown = _mounts()
    targets = {mount["target"] for mount in shown}
    # what lies on a mount that the session to be lacks does not lie on the root for that
    gone = [
        {**mount, "source": "nothing that is mounted then"}
        for mount in _all_mounts()
        if mount["target"] not in targets
    ]
    return __salt__["ramboot_qubes_audit.places"]([*shown, *gone])


# The system


def _paths() -> dict[str, Any]:
    return __salt__["ramboot_config.paths"]()


def _sys() -> str:
    return _paths()["sys"]


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as source:
        return source.read().replace("\0", "")


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    lines = _read(_paths()["proc_meminfo"]).splitlines()
    fields = [line.split() for line in lines]
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields if len(field) >= 2}


def _mounts() -> list[dict[str, Any]]:
    """What is visible where; while the audit pretends, in the RAM session to be."""
    return _as_pretended(_all_mounts())


def _all_mounts() -> list[dict[str, Any]]:
    """What is visible where (proc(5), mountinfo): the last mount at each place."""
    found: dict[str, dict[str, Any]] = {}
    for line in _read(_paths()["proc_mountinfo"]).splitlines():
        before, _, after = line.partition(" - ")
        target = _unescape(before.split()[4])
        fstype, source, super_options = after.split()[:3]
        options = before.split()[5].split(",") + super_options.split(",")
        found[target] = {
            "target": target,
            "fstype": fstype,
            "source": _unescape(source),
            "writable": "ro" not in options,
            "options": super_options.split(","),
        }
    return list(found.values())


def _as_pretended(mounts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mounts that a RAM session would have: its root, no /boot (ramboot-root.sh)."""
    pretended = _pretended()
    if pretended is None:
        return mounts
    kept = []
    copied = _copied(mounts)
    root = _root_of(mounts)["source"]
    for mount in mounts:
        # the layer covers the whole file system; a copy has what fstab mounts of it as directories
        if mount["target"] in copied or (pretended["layer"] and mount["source"] == root):
            mount = {**mount, "fstype": "tmpfs", "source": "tmpfs", "writable": True}
        elif mount["source"].startswith("/dev/") and (
            not pretended["mounts"]
            or (pretended["layer"] and _beside_layer(mount["source"]))
            or mount["target"] in ("/boot", "/efi")
            or mount["target"].startswith("/boot/")
        ):
            continue
        kept.append(mount)
    return kept


def _beside_layer(device: str) -> bool:
    """Whether a snapshot session would leave it alone: it is no mapping, so no volume below the
    layer (nor a file of /). Another disk's mapping, of LUKS, is not opened there; it is counted,
    for from here it can't be told from a volume.
    """
    name = os.path.basename(os.path.realpath(device))
    return device.startswith("/dev/") and not name.startswith("dm-")


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _root_mount() -> dict[str, Any]:
    return _root_of(_mounts())


def _root_of(mounts: list[dict[str, Any]]) -> dict[str, Any]:
    for mount in mounts:
        if mount["target"] == "/":
            return mount
    raise CommandExecutionError(f"{_paths()['proc_mountinfo']} has no line for /")


def _is_our_overlay() -> bool:
    """Whether / is the overlay of the boot scripts, which write into a tmpfs that nobody sees any
    more (ramboot-overlay.sh); their own note is the witness.
    """
    root = _root_mount()
    # without the note _noted would ask what / lies on, which is the question
    noted = _noted() if os.path.exists(_paths()["status"]) else {"session": None, "backend": None}
    return (
        (root["source"], root["fstype"]) == (OVERLAY, "overlay")
        and f"upperdir={OVERLAY_UPPER}" in root["options"]
        and (noted["session"], noted["backend"]) == ("ram", "overlay")
    )


def _sealed_by(name: str) -> str | None:
    """The read-only loop device that seals the disk below this device; None where it does not."""
    folder = f"{_sys()}/class/block/{name}"
    if not os.path.exists(f"{folder}/dm/name") or _read(f"{folder}/dm/name").strip() != SEAL:
        return None
    below = os.listdir(f"{folder}/slaves") if os.path.isdir(f"{folder}/slaves") else []
    if len(below) == 1 and below[0].startswith("loop") and _read_only_loop(below[0]):
        return below[0]
    return None


def _read_only_loop(name: str) -> bool:
    """Whether the loop driver itself refuses writes; sysfs shows a mere flag of the device too."""
    try:
        with open(f"/dev/{name}", "rb", buffering=0) as device:
            info = fcntl.ioctl(device, LOOP_GET_STATUS64, bytes(LOOP_INFO64_BYTES))
    except OSError:
        return False
    return bool(struct.unpack_from("=I", info, LO_FLAGS_AT)[0] & LO_FLAGS_READ_ONLY)


def _leaves(name: str) -> set[str]:
    folder = f"{_sys()}/class/block/{name}"
    if not os.path.isdir(folder):
        return {"unknown"}
    pretended = _pretended()
    if pretended and not pretended["lvm"] and _uuid(folder).startswith("LVM-"):
        return {"ram"}
    if os.path.exists(f"{folder}/dm/name") and _read(f"{folder}/dm/name").strip() == LAYER:
        return {"ram"}
    if _sealed_by(name):
        return {"sealed"}
    slaves = os.listdir(f"{folder}/slaves") if os.path.isdir(f"{folder}/slaves") else []
    if slaves:
        return set().union(*(_leaves(slave) for slave in slaves))
    if name.rstrip("0123456789") in ("zram", "ram"):
        # absent where the kernel has no write-back
        path = f"{folder}/backing_dev"
        return {"ram"} if not os.path.exists(path) or _read(path).strip() == "none" else {"disk"}
    if name.startswith("loop"):
        return _loop_leaves(folder)
    # a network device, a device-mapper target without devices
    if name.startswith(("nbd", "dm-")):
        return {"unknown"}
    return {"disk"}


def _loop_leaves(folder: str) -> set[str]:
    """Where what a loop device shows lies; a deleted file has another path than its own."""
    path = f"{folder}/loop/backing_file"
    file = _read(path).rstrip("\n") if os.path.exists(path) else ""
    if file.startswith("/dev/"):
        return _leaves(os.path.basename(os.path.realpath(file)))
    if not os.path.isfile(file):
        return {"unknown"}
    mount = __salt__["ramboot_qubes_pools.mount_of"](os.path.realpath(file), _mounts())
    return {backing(mount["source"])}


def _uuid(folder: str) -> str:
    path = f"{folder}/dm/uuid"
    return _read(path) if os.path.exists(path) else ""
