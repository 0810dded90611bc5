# SPDX-License-Identifier: GPL-2.0-or-later
"""The prebuilt image of the backend `image`: what it holds, whether it is stale, building it.

The image is a squashfs of the root beside a manifest, in a directory of the root itself that no
copy and no image has. A build makes it from temporary snapshots (LVM thin, or btrfs) under a name
of its own, proves it, and then renames a new manifest over the old one: until that moment the old
image is the one that counts.

What makes it stale is said by ramboot-state.sh, which the boot runs too.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import itertools
import json
import os
import re
import stat as stat_module
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from salt.exceptions import CommandExecutionError

# Salt's loader sets it
__salt__: dict[str, Any]

__virtualname__ = "ramboot_image"

ROOT = "/"
MIB = 1 << 20
MADE = "%Y-%m-%dT%H:%M:%SZ"
# it has all that / has, what only root may read as well
IMAGE_MODE = "0600"
BOOT_SCRIPTS = "salt://ramboot/initramfs/files/50ramboot"
# The parts of ramboot-state.sh, and what it calls them to a user.
PARTS = {
    "packages": "packages or kernels",
    "configuration": "configuration (/etc)",
    "programs": "programs (/usr, /opt)",
    "qubes": "qubes, their settings or templates",
}
_NUMBERS = ("version", "bytes", "chunk_mib", "source_bytes")
_WORDS = ("file", "sha256", "made", "kernels", *PARTS)
# Extended attributes that squashfs keeps (squashfs-tools, xattr.c); of others only ACLs are usual.
_KEPT_XATTRS = ("user.", "trusted.", "security.")
_ACL = "system.posix_acl_"
# How often the growing image is looked at, and the steps in which that is told.
_LOOK_S, _STEP_PERCENT = 1.0, 10
# Inode of the empty directory that a snapshot of a btrfs has in the place of another subvolume
# (linux include/uapi/linux/btrfs_tree.h, BTRFS_EMPTY_SUBVOL_DIR_OBJECTID).
_NO_SUBVOLUME = 2
# How the root and its snapshots are mounted beside /.
_HARMLESS = "nodev,nosuid,noexec"
# What a pattern has to escape, and one that mksquashfs's file of excludes gives back as it is.
_NO_LETTER = re.compile(r"[^\w/]", re.ASCII)
_PLAIN_LINE = re.compile(r"\w[\w/.,:=~%-]*", re.ASCII)


def __virtual__() -> str:
    return __virtualname__


# Questions


def asked() -> bool:
    """
    Whether the pillar asks for the backend: as mode, at the prompt, or in the menu.

    Raises SaltInvocationError when the pillar is wrong.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_image.asked
    """
    return "image" in __salt__["ramboot_config.backends"]()


def manifest(path: str | None = None) -> dict[str, Any] | None:
    """
    What is recorded of the image.

    path
        a manifest. Default: that of the image on the disk.

    Returns None when there is none, else {"version": 1, "file": name beside the manifest, "bytes":
    int, "sha256": of the whole file, "chunk_mib": MiB that each of "chunks" ([SHA-256]) stands for,
    "made": UTC as 2026-11-25T01:00:00Z, "kernels": [release], "source_bytes": what the root used,
    and for each part of the root's state its SHA-256: "packages", "configuration", "programs",
    "qubes"}.

    Raises CommandExecutionError when it can't be understood.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_image.manifest
    """
    path = path or _manifest_path()
    found: dict[str, Any] = {"chunks": []}
    try:
        with open(path, encoding="ascii") as lines:
            for line in lines.read().splitlines():
                key, _, value = line.partition("=")
                if key == "chunk":
                    found["chunks"].append(value)
                elif key in _NUMBERS:
                    found[key] = int(value)
                elif key in _WORDS:
                    found[key] = value
                else:
                    raise ValueError(f"unknown line {line!r}")
        if lacking := [key for key in (*_NUMBERS, *_WORDS) if not found.get(key)]:
            raise ValueError(f"no line {lacking[0]}=")
        if found["version"] != 1 or "/" in found["file"]:
            raise ValueError("of another version")
        time.strptime(found["made"], MADE)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CommandExecutionError(f"{path} can't be understood: {error}") from error
    return {**found, "kernels": found["kernels"].split()}


def state(root: str | None = None) -> dict[str, str]:
    """
    Which state of the system a root holds: what makes an image of another state stale.

    root
        its directory. Default: /.

    Returns {"packages" (databases of packages, kernels), "configuration" (each entry of /etc but
    what a boot or the start of a qube writes), "programs" (directories of /usr, each entry of
    /usr/local and /opt), "qubes" (lines of qubes.xml without disposables and what qubesd notes by
    itself, firewall.xml of each qube, root.img of templates on the root): SHA-256 of the lines, and
    of each file's and directory's name, size and times}.

    Raises CommandExecutionError when something can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_image.state
    """
    with tempfile.TemporaryDirectory(prefix="ramboot-image-") as work:
        script = ['. "$1" && root_state "$2" "$3"', "sh", _boot_script("ramboot-state.sh")]
        said = _run(["sh", "-c", *script, root or ROOT, f"{work}/list"])
    found = dict(line.split() for line in said.splitlines())
    if list(found) != list(PARTS):
        raise CommandExecutionError(f"the state of {root or ROOT} could not be told: {said}")
    return found


def stale() -> str | None:
    """
    Why the image has to be built anew; None when it holds the root as it is.

    Raises CommandExecutionError when that can't be told.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_image.stale
    """
    try:
        recorded = manifest()
    except CommandExecutionError as error:
        return str(error)
    if recorded is None:
        return "there is no image"
    path = os.path.join(_directory(), recorded["file"])
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return f"{path} is missing"
    if size != recorded["bytes"]:
        return f"{path} has {size} bytes instead of {recorded['bytes']}"
    now = state()
    changed = [text for part, text in PARTS.items() if now[part] != recorded[part]]
    return f"changed since {recorded['made']}: {', '.join(changed)}" if changed else None


def impediments(layout: dict[str, Any] | None = None) -> list[str]:
    """
    Why no image can be built on this system, a sentence each; room on the disk apart.

    layout
        as `ramboot_preflight.root_layout` returns it. Default: looked up.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_image.impediments
    """
    layout = layout or __salt__["ramboot_preflight.root_layout"]()
    # squashfs-tools is in Fedora's repositories and not in comps-dom0.xml (qubes-qubes-release)
    needed = {"mksquashfs": "squashfs-tools"}
    if _on_btrfs(layout):
        needed["btrfs"] = "btrfs-progs"
    found = [
        f"the backend image needs {program}, which is not installed; in dom0:"
        f" sudo qubes-dom0-update {package}"
        for program, package in needed.items()
        if not __salt__["ramboot_config.command"]([program])
    ]
    if not _on_btrfs(layout) and layout["kind"] != "lvm-thin":
        found.append(
            "the backend image needs a root on LVM thin or btrfs, to build from a snapshot of it;"
            f" / is {layout['fstype']} on {layout['kind']}"
        )
    return found


def room() -> dict[str, int]:
    """
    Bytes that a build may write, and that it most likely will.

    Returns {"limit_bytes": what is free on / and in its thin pool, less a margin that stays free,
    "expected_bytes": of the image, "source_bytes": what the root uses}.

    Raises CommandExecutionError when LVM can't be asked, SaltInvocationError when the pillar is
    wrong.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_image.room
    """
    known = _known()
    usage = os.statvfs(ROOT)
    # of a btrfs nothing when there is no room for its metadata
    free = usage.f_bavail * usage.f_frsize
    # a build begins with deleting it
    free += _bytes(_left(_directory()))
    if _on_btrfs():
        # it holds what no image will have: what other mounts show, and what is excluded
        exclude = __salt__["ramboot_config.load"]()["copy"]["exclude"]
        used = __salt__["ramboot.source_bytes"](exclude)[0]
    else:
        free = min(free, _pool_bytes())
        used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
        used -= _bytes(glob.glob(f"{_directory()}/*"))
    expected = used * known["expected_percent"] // 100
    if last := manifest_or_none():
        expected = last["bytes"] * max(used, 1) // max(last["source_bytes"], 1)
    return {
        "limit_bytes": max(0, free - known["margin_mib"] * MIB),
        "expected_bytes": expected,
        "source_bytes": used,
    }


def room_fault(space: dict[str, int] | None = None) -> str | None:
    """
    Why a build has no room; None when it most likely has.

    space
        as `room` returns it. Default: looked up.

    Raises as `room` does.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_image.room_fault
    """
    space = space or room()
    if space["expected_bytes"] <= space["limit_bytes"]:
        return None
    return (
        f"about {_mib(space['expected_bytes'])} are needed, {_mib(space['limit_bytes'])} may be"
        f" used on /{'' if _on_btrfs() else ' and in its thin pool'}"
    )


def manifest_or_none(path: str | None = None) -> dict[str, Any] | None:
    """
    `manifest`, where one that can't be understood or read counts as none.

    path
        as there.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_image.manifest_or_none
    """
    with contextlib.suppress(CommandExecutionError, OSError):
        return manifest(path)
    return None


def verify() -> dict[str, dict[str, Any]]:
    """
    The image against its recorded hash.

    Returns {path: as `ramboot_record.judge` has it}, empty where there is no image.

    Raises CommandExecutionError when the manifest can't be understood.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_image.verify
    """
    recorded = manifest()
    if recorded is None:
        return {}
    path = os.path.join(_directory(), recorded["file"])
    found = __salt__["ramboot_record.look"](path)
    return {path: __salt__["ramboot_record.judge"](found, recorded["sha256"], IMAGE_MODE)}


def remains() -> list[str]:
    """
    What is there of images and of builds that were cut off: paths, "volume VG/LV", and
    "subvolume NAME".

    Raises CommandExecutionError when the layout of / or the subvolumes of its btrfs can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_image.remains
    """
    directory = _directory()
    found = [directory] if os.path.lexists(directory) else []
    return [*found, *_snapshots()]


# Actions


def build() -> dict[str, Any]:
    """
    Build the image from a snapshot of the root, prove it, put it in the old one's place.

    At idle priority; how far it is, is told on stderr and on a splash. The proof: the file read
    back from the disk has the hash that was written, the running kernel mounts it, and each entry
    of the snapshot is in it with type, mode, owner, size, time and extended attributes.

    Returns the manifest without "chunks", and "without_acl": [path] of what lost its access control
    list, which squashfs does not keep.

    Raises CommandExecutionError, the old image being left, when a session or the layout does not
    allow it, room does not suffice, another build runs, packages are being changed, or the image is
    not proven.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_image.build
    """
    settings = __salt__["ramboot_config.load"]()
    session = __salt__["ramboot_preflight.session_fault"]()
    if problems := [session] if session else impediments():
        raise CommandExecutionError("no image was built: " + "; ".join(problems))
    directory = _directory()
    # the record's directory above it is root's alone as well
    for place in (os.path.dirname(directory), directory):
        os.makedirs(place, mode=0o700, exist_ok=True)
    with _locked(directory):
        _clear(directory)
        space = room()
        if fault := room_fault(space):
            raise CommandExecutionError(f"no image was built: {fault}")
        partial = os.path.join(directory, "building.squashfs")
        try:
            _check_packages()
            with _snapshot(settings["copy"]["exclude"]) as source:
                # a transaction may have begun in the meantime
                _check_packages()
                recorded = _made_of(source, partial, space, settings)
            without_acl = recorded.pop("without_acl")
            recorded["file"] = f"root-{recorded['sha256'][:16]}.squashfs"
            image = os.path.join(directory, recorded["file"])
            __salt__["ramboot_record.settle"](partial, image, IMAGE_MODE)
            _write_manifest(recorded)
        finally:
            _clear(directory)
    recorded.pop("chunks")
    return {**recorded, "without_acl": without_acl}


def refresh() -> dict[str, Any]:
    """
    Build the image anew if it is stale; in a RAM session nothing.

    Returns {"action": "built" | "nothing", "reason": sentence}.

    Raises CommandExecutionError as `build` and `stale` do.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_image.refresh
    """
    if session := __salt__["ramboot_preflight.session_fault"]():
        return {"action": "nothing", "reason": session}
    reason = stale()
    if reason is None:
        return {"action": "nothing", "reason": "the image is current"}
    _say(f"the image is built anew: {reason}")
    build()
    _say("the image has been built anew")
    return {"action": "built", "reason": reason}


def in_background() -> dict[str, Any]:
    """
    What ramboot-image.service runs: `refresh`, while that unit, an image and the pillar ask for it.
    systemd runs what it had loaded, whatever was deleted in the meantime.

    Returns and raises as `refresh` does; SaltInvocationError when the pillar is wrong.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_image.in_background
    """
    if reason := _unwanted("service", "background"):
        return {"action": "nothing", "reason": reason}
    return refresh()


def at_shutdown() -> dict[str, Any]:
    """
    What ramboot-image-shutdown.service runs when it is stopped: as `in_background`.

    Returns as that does. Raises what it raises, and SystemExit when the unit's time ends, after it
    was said that the old image stays.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_image.at_shutdown
    """
    try:
        if reason := _unwanted("shutdown", "shutdown"):
            return {"action": "nothing", "reason": reason}
        return refresh()
    except BaseException:  # the unit's time ends with SystemExit
        _say("the image could not be built anew, the old one stays")
        raise


def remove() -> list[str]:
    """
    Delete the image, its manifest, and what a build that was cut off left.

    Returns what was there, as `remains` does. Raises CommandExecutionError while a build runs.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_image.remove
    """
    found = remains()
    directory = _directory()
    if os.path.isdir(directory):
        with _locked(directory):
            _clear(directory)
            # the manifest first: an image without one is none
            names = sorted(os.listdir(directory), key=lambda name: name != "manifest")
            for name in names:
                os.unlink(os.path.join(directory, name))
        os.rmdir(directory)
    elif found:
        _drop_snapshots()
    return found


def _unwanted(unit: str, rebuild: str) -> str | None:
    """Why a unit is not to build, though it runs; None when it is. Not whether the pillar names the
    backend: ramboot.image applied by itself does not ask either, and ramboot takes the units away.
    """
    for path in (_paths()["image_units"][unit], _manifest_path()):
        if not os.path.exists(path):
            return f"{path} is not there any more"
    wanted = __salt__["ramboot_config.load"]()["image"]["rebuild"]
    return None if wanted == rebuild else f"image:rebuild is {wanted} in the pillar"


# Building


def _check_packages() -> None:
    """In the middle of a transaction half of the packages are new. rpm holds a POSIX lock for the
    whole of it (rpm, lib/rpmts.c, rpmtsAcquireLock, and lib/rpmlock.c).
    """
    for path in _paths()["package_locks"]:
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CommandExecutionError(
                    f"no image was built: packages are being changed; {path} is locked until that"
                    " has ended"
                ) from error


def _made_of(
    source: str, partial: str, space: dict[str, int], settings: dict[str, Any]
) -> dict[str, Any]:
    """The image of `source` at `partial`, proven; what the manifest says of it but its name."""
    known = _known()
    recorded: dict[str, Any] = {
        "version": 1,
        "made": time.strftime(MADE, time.gmtime()),
        "kernels": sorted(os.listdir(f"{source}/usr/lib/modules")),
        **state(source),
    }
    excluded = _excluded(source, settings["copy"]["exclude"])
    with _progress(partial, space["expected_bytes"]):
        _squash(source, partial, excluded, space["limit_bytes"], settings["image"])
    size = os.stat(partial).st_size
    _say(f"proving the image: {_mib(size)} are read back, each entry is compared with the root")
    sha256, chunks = _hashes(partial, known["chunk_mib"] * MIB)
    without_acl = _prove(partial, source, set(excluded), sha256)
    return {
        **recorded,
        "bytes": size,
        "sha256": sha256,
        "chunk_mib": known["chunk_mib"],
        "chunks": chunks,
        "source_bytes": space["source_bytes"],
        "without_acl": without_acl,
    }


def _excluded(source: str, patterns: list[str]) -> list[str]:
    """What the copies of other backends leave behind too, and images."""
    inside = os.path.relpath(_directory(), ROOT)
    return sorted(
        {
            path
            for pattern in [f"/{inside}/*", f"/{inside}/.*", *patterns]
            for path in glob.glob(f"{glob.escape(source)}{pattern}")
        }
    )


def _squash(source: str, target: str, excluded: list[str], limit: int, how: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile("w", prefix="ramboot-image-", encoding="ascii") as listing:
        # As patterns: a path without -wildcards stands for its inode, every hard link of it.
        # Lines are trimmed, and more; arguments are not.
        paths = [os.path.relpath(path, source) for path in excluded]
        plain = [path for path in paths if _PLAIN_LINE.fullmatch(path)]
        listing.write("".join(f"{path}\n" for path in plain))
        listing.flush()
        others = [path for path in paths if not _PLAIN_LINE.fullmatch(path)]
        # no file larger than what may be written: a full root, or thin pool, would stop dom0
        _run(
            [
                *("prlimit", f"--fsize={limit}", "nice", "-n", "19", "ionice", "-c", "3"),
                *("mksquashfs", source, target, "-comp", "zstd", "-noappend", "-exit-on-error"),
                *("-Xcompression-level", str(how["level"]), "-b", f"{how['block_kib']}K"),
                *("-no-progress", "-mem", "512M", "-wildcards", "-ef", listing.name),
                *(("-e", *(_NO_LETTER.sub(r"\\\g<0>", path) for path in others)) if others else ()),
            ]
        )


@contextlib.contextmanager
def _progress(path: str, expected: int) -> Iterator[None]:
    """Tell how far `path` has grown: of what mksquashfs says, Salt shows nothing before its end."""
    ended = threading.Event()

    def watch() -> None:
        told, line = 0, ""
        while not ended.wait(_LOOK_S):
            with contextlib.suppress(OSError):
                size = os.stat(path).st_size
                # what is expected is no more than that
                percent = min(size * 100 // max(expected, 1), 99)
                if percent >= told + _STEP_PERCENT:
                    told = percent
                    text = f"{percent} %, {_mib(size)} of about {_mib(expected)}"
                    line = _say(f"building the image: {text}", instead=line)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _say(text: str, instead: str = "") -> str:
    """To whoever waits: a terminal, the journal or the console (as the unit says), the splash.

    Returns the line. `instead`: a line that the splash need not show any more.
    """
    line = f"ramboot: {text}"
    # a terminal that was closed is no reason to end a build
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
    # not cmd.run_all: Salt's functions belong to its own thread
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        for command, shown in (("hide-message", instead), ("display-message", line)):
            if shown:
                plymouth = ["plymouth", command, f"--text={shown}"]
                subprocess.run(plymouth, capture_output=True, timeout=2, check=False)
    return line


def _hashes(path: str, chunk: int) -> tuple[str, list[str]]:
    whole, chunks = hashlib.sha256(), []
    with open(path, "rb") as source:
        while data := source.read(chunk):
            whole.update(data)
            chunks.append(hashlib.sha256(data).hexdigest())
    return whole.hexdigest(), chunks


def _prove(path: str, source: str, excluded: set[str], sha256: str) -> list[str]:
    """That the image arrived on the disk and holds what the snapshot holds; files with ACLs."""
    with open(path, "rb") as image:
        os.fsync(image.fileno())
        os.posix_fadvise(image.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        again = hashlib.sha256()
        while data := image.read(MIB):
            again.update(data)
    if again.hexdigest() != sha256:
        raise CommandExecutionError("the image was not kept: the disk gives other bytes back")
    without_acl: list[str] = []
    with _mounted(["-t", "squashfs", "-o", "ro,nodev,nosuid,noexec,loop", path], "proof") as proof:
        inside = _entries(proof, set(), [])
        for wanted in _entries(source, excluded, without_acl):
            found = next(inside, None)
            if found != wanted:
                raise CommandExecutionError(
                    "the image was not kept: it differs from the root at"
                    f" {_shown(wanted[0])}: {_shown(found)} instead of {_shown(wanted)}"
                )
        if found := next(inside, None):
            raise CommandExecutionError(f"the image was not kept: {_shown(found[0])} is too much")
    return without_acl


def _entries(top: str, excluded: set[str], acls: list[str]) -> Iterator[tuple]:
    """Each entry below top in a fixed order, with what squashfs keeps of it."""
    todo = [top]
    while todo:
        path = todo.pop()
        info = os.lstat(path)
        kind = stat_module.S_IFMT(info.st_mode)
        names = os.listxattr(path, follow_symlinks=False)
        if any(name.startswith(_ACL) for name in names):
            acls.append(path[len(top) :] or "/")
        yield (
            path[len(top) :],
            f"{info.st_mode:o}",
            info.st_uid,
            info.st_gid,
            info.st_size if kind in (stat_module.S_IFREG, stat_module.S_IFLNK) else None,
            info.st_rdev if kind in (stat_module.S_IFBLK, stat_module.S_IFCHR) else None,
            # 32 bits of seconds
            max(0, min(info.st_mtime_ns // 10**9, 0xFFFFFFFF)),
            os.readlink(path) if kind == stat_module.S_IFLNK else None,
            tuple(
                (name, os.getxattr(path, name, follow_symlinks=False))
                for name in sorted(names)
                if name.startswith(_KEPT_XATTRS)
            ),
        )
        if kind == stat_module.S_IFDIR:
            below = (os.path.join(path, name) for name in os.listdir(path))
            todo += sorted((item for item in below if item not in excluded), reverse=True)


def _write_manifest(recorded: dict[str, Any]) -> None:
    """In one rename; from here on the new image is the one that counts."""
    path = _manifest_path()
    lines = [
        f"{key}={' '.join(value) if isinstance(value, list) else value}"
        for key, value in recorded.items()
        if key != "chunks"
    ]
    lines += [f"chunk={sha256}" for sha256 in recorded["chunks"]]
    __salt__["ramboot_record.replace"](path, "\n".join(lines) + "\n", check=manifest)


def _clear(directory: str) -> None:
    """Delete all but the image that the manifest names; where that can't be told, no image."""
    for name in ("proof", "source", "live", "top"):
        path = os.path.join(_paths()["image_mounts"], name)
        if os.path.ismount(path):
            _run(["umount", "--recursive", path])
    _drop_snapshots()
    for path in _left(directory):
        os.unlink(path)


def _left(directory: str) -> list[str]:
    """What is there besides the image that the manifest names."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    kept = {"manifest", "lock"}
    try:
        recorded = manifest()
    except CommandExecutionError:
        kept.update(name for name in names if name.startswith("root-"))
    else:
        kept |= {recorded["file"]} if recorded else set()
    return [os.path.join(directory, name) for name in names if name not in kept]


def _locked(directory: str) -> contextlib.AbstractContextManager[Any]:
    return __salt__["ramboot_record.lock"](
        os.path.join(directory, "lock"), "an image is being built by another process"
    )


# The snapshot


def _snapshot(exclude: list[str]) -> contextlib.AbstractContextManager[str]:
    """The root as it is now, mounted meanwhile; _drop_snapshots removes it."""
    layout = __salt__["ramboot_preflight.root_layout"]()
    return _btrfs_snapshots(layout, exclude) if _on_btrfs(layout) else _thin_snapshot()


def _on_btrfs(layout: dict[str, Any] | None = None) -> bool:
    """Whether snapshots of the root are btrfs's own; else they are LVM's."""
    layout = layout or __salt__["ramboot_preflight.root_layout"]()
    return layout["fstype"] == "btrfs"


def _snapshots() -> dict[str, list[str]]:
    """Those that a build made and did not remove, and what removes each. LVM's are told by their
    tag, those of btrfs by name and place and by being read-only snapshots.
    """
    name = _known()["snapshot"]
    if _on_btrfs():
        # without its program there can be none
        if not __salt__["ramboot_config.command"](["btrfs"]):
            return {}
        listed = _run(["btrfs", "subvolume", "list", "-r", "-s", ROOT])
        line = re.compile(rf"^ID (\d+) .* top level 5 .* path ({re.escape(name)}-\d+)$", re.M)
        # before it is committed, a power cut would bring it back
        delete = ["btrfs", "subvolume", "delete", "--commit-after", "--subvolid"]
        return {
            f"subvolume {made}": [*delete, number, ROOT] for number, made in line.findall(listed)
        }
    try:
        listed = _run(["lvs", "--noheadings", "-o", "vg_name,lv_name", f"@{name}"])
    except CommandExecutionError:
        # no LVM: there can be none
        return {}
    volumes = ["/".join(line.split()) for line in listed.splitlines() if line.strip()]
    return {f"volume {made}": ["lvremove", "--quiet", "--yes", made] for made in volumes}


def _drop_snapshots() -> None:
    for command in _snapshots().values():
        _run(command)


# ... of LVM


def _root_volume() -> dict[str, str]:
    source = __salt__["ramboot_preflight.root_layout"]()["source"]
    answer = _run(["lvs", "--reportformat", "json", "-o", "vg_name,lv_name,pool_lv", source])
    volume = json.loads(answer)["report"][0]["lv"][0]
    return {"vg": volume["vg_name"], "lv": volume["lv_name"], "pool": volume["pool_lv"]}


def _pool_bytes() -> int:
    """What is free in the root's thin pool."""
    volume = _root_volume()
    size, percent = _run(
        ["lvs", "--noheadings", "--units", "b", "--nosuffix", "-o", "lv_size,data_percent",
         f"{volume['vg']}/{volume['pool']}"]
    ).split()  # fmt: skip
    return int(int(size) * (100 - float(percent)) / 100)


@contextlib.contextmanager
def _thin_snapshot() -> Iterator[str]:
    """LVM freezes the file system meanwhile: the snapshot is whole. One that a power cut leaves is
    activated by no boot (lvmthin(7), activation skip), for it has the root's UUID.
    """
    volume, name = _root_volume(), _known()["snapshot"]
    with _unseen(volume["vg"], name):
        _run(
            ["lvcreate", "--quiet", "--snapshot", "--setactivationskip", "y",
             "--ignoreactivationskip", "--activate", "y", "--addtag", name, "--name", name,
             f"{volume['vg']}/{volume['lv']}"]
        )  # fmt: skip
        with _mounted(["-o", f"ro,{_HARMLESS}", f"/dev/{volume['vg']}/{name}"], "source") as source:
            yield source


@contextlib.contextmanager
def _unseen(vg: str, lv: str) -> Iterator[None]:
    """Keep the snapshot from qubes, which are offered what nobody seems to use (linux-utils,
    udev/udev-qubes-block.rules), and from the links by UUID, which are the root's.
    """
    path = _paths()["image_rules"]
    device = "-".join(part.replace("-", "--") for part in (vg, lv))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as rules:
        rules.write(f'ENV{{DM_NAME}}=="{device}", ENV{{DM_UDEV_DISABLE_DISK_RULES_FLAG}}="1"\n')
    try:
        _run(["udevadm", "control", "--reload"])
        yield
    finally:
        os.unlink(path)


# ... of btrfs


@contextlib.contextmanager
def _btrfs_snapshots(layout: dict[str, Any], exclude: list[str]) -> Iterator[str]:
    """One of each subvolume that a copy at boot would hold: /, those that fstab mounts, and those
    that lie in these and are not excluded. Each is whole, for btrfs writes out first what it has in
    RAM; some milliseconds pass from one to the next. They are made at the top of the file system,
    where no copy of / finds one that was left.
    """
    numbers = itertools.count(1)

    def of(option: str, mode: str = "ro") -> list[str]:
        return ["-t", "btrfs", "-o", f"{mode},{_HARMLESS}{option}", layout["source"]]

    def taken(place: str) -> list[str]:
        if {os.path.join(live + place, name) for name in os.listdir(live + place)} <= excluded:
            # Nothing in it is kept. With a swap file in use no snapshot can be made; and all that
            # is lost in snapshots of the user's has one inode between them, and any time.
            info = os.lstat(live + place)
            how = f"mode={stat_module.S_IMODE(info.st_mode):o},uid={info.st_uid},gid={info.st_gid}"
            return ["-t", "tmpfs", "-o", f"ro,{_HARMLESS},{how}", "tmpfs"]
        name = f"{_known()['snapshot']}-{next(numbers)}"
        _run(["btrfs", "subvolume", "snapshot", "-r", live + place, os.path.join(top, name)])
        return of(f",subvol=/{name}")

    def cover(places: list[str]) -> None:
        for place in places:
            _run(["mount", *taken(place), source + place])

    with contextlib.ExitStack() as mounts:
        top = mounts.enter_context(_mounted(of(",subvolid=5", "rw"), "top"))
        # the root as the boot mounts it, without what is mounted over it now
        live = mounts.enter_context(_mounted(of(f",subvol={layout['fsroot']}"), "live"))
        fstab = _fstab_subvolumes(live, layout["source"])
        for place, option in fstab:
            _run(["mount", *of(option), live + place])
        excluded = set(_excluded(live, exclude))
        source = mounts.enter_context(_mounted(taken(""), "source"))
        cover([place for place, _ in fstab])
        while lost := _lost(source, set(_excluded(source, exclude))):
            cover(lost)
        yield source


def _fstab_subvolumes(root: str, device: str) -> list[tuple[str, str]]:
    """What the boot mounts of the same btrfs: each place, and its mount option after a comma."""
    script = (
        '. "$1"; . "$2"; ST_FSTYPE=btrfs ROOT_KIND=device SOURCE_DISK=$3 SOURCE_ROOT=$3\n'
        'getarg() { tr " " "\\n" < /proc/cmdline | sed -n "s/^$1//p" | tail -n 1; }\n'
        'fstab_subvolumes "$4" || { echo "$reason" >&2; exit 1; }'
    )
    scripts = map(_boot_script, ("ramboot-source.sh", "ramboot-copy.sh"))
    said = _run(["sh", "-ec", script, "sh", *scripts, device, root])
    found = (line.partition(" ") for line in said.splitlines())
    return [(place, option) for place, _, option in found]


def _lost(top: str, excluded: set[str]) -> list[str]:
    """Where snapshots have an empty directory in the place of a subvolume."""
    found = []
    for folder, names, _files in os.walk(top):
        names[:] = [name for name in names if os.path.join(folder, name) not in excluded]
        paths = [os.path.join(folder, name) for name in names]
        found += [path for path in paths if os.lstat(path).st_ino == _NO_SUBVOLUME]
    return [path[len(top) :] for path in found]


@contextlib.contextmanager
def _mounted(arguments: list[str], name: str) -> Iterator[str]:
    path = os.path.join(_paths()["image_mounts"], name)
    os.makedirs(path, mode=0o700, exist_ok=True)
    _run(["mount", *arguments, path])
    try:
        yield path
    finally:
        _run(["umount", "--recursive", path])
        os.rmdir(path)


# The system


def _run(command: list[str]) -> str:
    done = __salt__["cmd.run_all"](command, python_shell=False, env={"LC_ALL": "C"})
    if done["retcode"] != 0:
        said = (done["stderr"] or done["stdout"]).strip().splitlines()
        name = "mksquashfs" if "mksquashfs" in command else command[0]
        raise CommandExecutionError(f"{name} failed ({done['retcode']}): {' '.join(said[-3:])}")
    return done["stdout"]


def _boot_script(name: str) -> str:
    """Where Salt keeps its copy of a script that the boot runs too."""
    path = __salt__["cp.cache_file"](f"{BOOT_SCRIPTS}/{name}", saltenv="base")
    if not path:
        raise CommandExecutionError(f"{BOOT_SCRIPTS}/{name} is not in file_roots of env base")
    return path


def _known() -> dict[str, Any]:
    return __salt__["ramboot_config.defaults"]()["image_build"]


def _paths() -> dict[str, Any]:
    return __salt__["ramboot_config.paths"]()


def _directory() -> str:
    return _paths()["image_directory"]


def _manifest_path() -> str:
    return os.path.join(_directory(), "manifest")


def _bytes(paths: list[str]) -> int:
    """What they take on /."""
    return sum(os.lstat(path).st_blocks * 512 for path in paths)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _mib(size: int) -> str:
    return f"{size // MIB} MiB"
