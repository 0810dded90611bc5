# SPDX-License-Identifier: GPL-2.0-or-later
"""The initramfs of each installed kernel: what is in it, is it current, build it, undo it.

An image is current when the hashes that our dracut module wrote into it (its stamp) are those of
the files on disk now. Images are built beside the old one, looked into, synced and renamed: at
every moment the boot loader finds a complete image, the old one or the new one.

What lsinitrd can do was read in dracut 059, 102 and 106 (lsinitrd.sh): `-f PATH` of one file
decompresses once, and an absent file is empty output with exit status 0; `--unpack` with several
patterns decompresses once for all of them; a `*` in a pattern matches `/` too (cpio).
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from salt.exceptions import CommandExecutionError

# Salt's loader sets it
__salt__: dict[str, Any]

__virtualname__ = "ramboot_initramfs"

MODULE = "ramboot"

# a build takes 30 s to 2 min on a slow machine; software emulation needs ten times that
DRACUT_TIMEOUT_S = 1800
LSINITRD_TIMEOUT_S = 600

# room on /boot: a rebuilt image is a little larger than the old one (our module, newer firmware)
GROWTH = 1.25
SPARE_BYTES = 16 << 20
_BUILD = "to build beside the old image"
_PUT_BACK = "to put the original beside the image"
# where there is no image to compare with: more than Fedora's generic image
UNKNOWN_IMAGE_BYTES = 128 << 20

# What opens the disk. Compared by name, as /usr/sbin and /usr/bin merge between releases.
PROGRAMS = {
    "cryptroot-ask",
    "cryptsetup",
    "dmsetup",
    "lvm",
    "systemd-cryptsetup",
    "systemd-cryptsetup-generator",
}
SHELLS = {"bash", "busybox", "dash", "mksh"}

# dracut modules without which dom0 would not find, open or take over its root (or would lose what
# Qubes puts before it). Others come and go: an installer's image is generic, a rebuilt one is not.
# Names of dracut 059 to 106 and of core-admin-linux (dracut/modules.d).
ESSENTIAL = {
    "base",
    "bash",
    "busybox",
    "crypt",
    "dash",
    "dm",
    "dracut-systemd",
    "fs-lib",
    "kernel-modules",
    "lvm",
    "mdraid",
    "plymouth",
    "qubes-pciback",
    "qubes-udev",
    "rootfs-block",
    "systemd",
    "systemd-cryptsetup",
    "systemd-initrd",
    "systemd-udevd",
    "udev-rules",
}
# ours, dracut's list of modules, and anything that may be one of PROGRAMS
PATTERNS = [
    "*ramboot*",
    "*dracut/modules.txt",
    "*bin/lvm",
    "*bin/dmsetup",
    "*cryptsetup*",
    "*cryptroot-ask",
]

# SHA-256 and mode that a file should have, as far as they are known
Expected = tuple[str | None, str | None]
UNKNOWN: Expected = (None, None)

# what `undo` does that changes an image
CHANGING = ("restore", "delete", "rebuild", "remove")

# the rendered configuration's path in an image
CONF_INSIDE = "etc/ramboot/ramboot.conf"

# a line of dracut's configuration that puts our module into images
ASKS = re.compile(r"\s*(force_)?(add_)?dracutmodules\s*\+?=.*\bramboot\b")

# inside /usr/lib/ramboot of an image, made while the image is built: not of the manifest
GENERATED = {"usr/lib/ramboot/stamp", "usr/lib/ramboot/estimate"}


def __virtual__() -> str:
    return __virtualname__


# Questions


def states(kernel: str | None = None) -> dict[str, dict[str, Any]]:
    """
    The initramfs of each installed kernel.

    kernel
        A version: that kernel's alone.

    Returns {kernel: {"image": path, "module": bool (our dracut module is in it), "state":
    "current" | "stale" | "ignored", "reason": sentence or None}}. Rescue images are `ignored`:
    they stay as the distribution made them. One `lsinitrd -f` per image.

    Raises CommandExecutionError when lsinitrd can't be run at all or /boot has no kernel.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_initramfs.states
    """
    _check_boot()
    wanted, lacking = _wanted()
    found = {}
    for version in _kernels():
        if kernel in (None, version):
            image = _image(version)
            found[version] = {"image": image, **_state(image, wanted, lacking)}
    for version, image in _rescue().items():
        if kernel in (None, version):
            reason = "a rescue image, left as the distribution made it"
            found[version] = {"image": image, "module": False, "state": "ignored", "reason": reason}
    return found


def boot_fault() -> str | None:
    """
    Why nothing can be said of the images in /boot, as when it is not mounted; None when it can.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_initramfs.boot_fault
    """
    paths = _paths()
    if _kernels() or not (_recorded() or glob.glob(f"{glob.escape(paths['kernels'])}/*/")):
        return None
    return f"{paths['boot']} has no kernel of those in {paths['kernels']}: is it mounted?"


def room_faults(changing: bool = False) -> list[str]:
    """
    Stale images for whose rebuild /boot has no room, a sentence each. Changes nothing.

    changing
        Files that images hold are about to change: each image becomes stale.

    Raises CommandExecutionError when /boot has no kernel though there are modules or images.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_initramfs.room_faults
    """
    _check_boot()
    short = {kernel: _room_fault(kernel, _image(kernel)) for kernel in _kernels()}
    if changing or not any(short.values()):
        return [fault for fault in short.values() if fault]
    # reading images takes seconds
    found = states()
    return [fault for kernel, fault in short.items() if fault and found[kernel]["state"] == "stale"]


def undo_room_faults() -> list[str]:
    """
    Images for whose undo (`undo_plan`) /boot has no room, a sentence each. Changes nothing.

    Raises CommandExecutionError when /boot has no kernel though there are modules or images, or the
    record can't be understood.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_initramfs.undo_room_faults
    """
    free = _free_bytes(_paths()["boot"])
    found = []
    for image, step in undo_plan().items():
        have = os.path.getsize(image) if os.path.isfile(image) else 0
        if step["action"] == "rebuild":
            found.append(_short(step["kernel"], image, _building_bytes(image), free, _BUILD))
        elif step["action"] == "restore":
            need = os.path.getsize(__salt__["ramboot_record.original"](image))
            found.append(_short(step["kernel"], image, need, free, _PUT_BACK))
            free -= need - have
        elif step["action"] == "delete":
            free += have
    return [fault for fault in found if fault]


def verify() -> dict[str, Any]:
    """
    Each file of ours on disk and inside each kernel's image, against what was shipped.

    Expected hashes come from the manifest (static files) and from the record (rendered ones).

    Returns {"disk": {path: FILE}, "initramfs": {image: {path: FILE}}, "faults": [sentences]}; FILE
    as `ramboot_record.judge` has it. Image paths are without a leading slash. One
    `lsinitrd --unpack` per image.

    Raises CommandExecutionError when the module isn't installed or an image can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_initramfs.verify
    """
    disk, inside = _expected()
    report: dict[str, Any] = {"disk": {}, "initramfs": {}, "faults": []}
    look, judge = __salt__["ramboot_record.look"], __salt__["ramboot_record.judge"]
    for path, wanted in sorted(disk.items()):
        report["disk"][path] = judge(look(path), *wanted)
    # as in a RAM session: an image that was not looked at is not good
    if fault := boot_fault():
        report["faults"].append(f"no initramfs was looked at: {fault}")
    for kernel in _kernels():
        image = _image(kernel)
        if not os.path.isfile(image):
            report["faults"].append(f"kernel {kernel} has no image {image}")
            continue
        found = look_inside(image, kernel)["files"]
        ours = {path for path in found if path.startswith("usr/lib/ramboot/")} - GENERATED
        report["initramfs"][image] = {
            path: judge(found.get(path), *inside.get(path, UNKNOWN))
            for path in sorted(set(inside) | ours)
        }
    for place in [report["disk"], *report["initramfs"].values()]:
        where = "" if place is report["disk"] else " in " + _key_of(report["initramfs"], place)
        report["faults"] += [
            f"{path}{where}: {file['verdict']}"
            for path, file in place.items()
            if file["verdict"] != "good"
        ]
    return report


def look_inside(image: str, kernel: str) -> dict[str, Any]:
    """
    What matters in one image. Unpacks a part of it into a temporary directory.

    image
        path of the image.
    kernel
        the version whose modules it should hold.

    Returns {"files": {path: as `ramboot_record.look` has it} (each file of ours), "modules":
    [dracut modules], "programs": [those of LUKS and LVM, by name], "kernel": bool}.

    Raises CommandExecutionError when it can't be unpacked or no dracut made it.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_initramfs.look_inside /boot/initramfs-6.12.1.img 6.12.1
    """
    with tempfile.TemporaryDirectory(prefix="ramboot-") as scratch:
        patterns = [*PATTERNS, f"*lib/modules/{kernel}/modules.dep"]
        done = _run(["lsinitrd", "--unpack", image, *patterns], LSINITRD_TIMEOUT_S, cwd=scratch)
        if done["retcode"] != 0:
            raise CommandExecutionError(f"{image} can't be unpacked: {_why(done)}")
        paths = [
            os.path.relpath(os.path.join(top, name), scratch)
            for top, _, names in os.walk(scratch)
            for name in names
        ]
        lists = fnmatch.filter(paths, "*dracut/modules.txt")
        if not lists:
            raise CommandExecutionError(
                f"{image} is damaged or not made by dracut: it has no list of modules"
            )
        with open(os.path.join(scratch, lists[0]), encoding="utf-8") as source:
            modules = source.read().split()
        look = __salt__["ramboot_record.look"]
        return {
            "files": {
                path: found
                for path in paths
                if "ramboot" in path and (found := look(os.path.join(scratch, path)))
            },
            "modules": sorted(modules),
            "programs": sorted({os.path.basename(path) for path in paths} & PROGRAMS),
            "kernel": bool(fnmatch.filter(paths, f"*lib/modules/{kernel}/modules.dep")),
        }


def undo_plan() -> dict[str, dict[str, Any]]:
    """
    What has to be done to each image so that nothing of ours is in it, and to each unfinished one
    that a run which was cut off left. Changes nothing.

    Returns {image: {"kernel", "action": "restore" (the original's bytes) | "delete" (there was no
    image before) | "rebuild" (made or replaced since, with our module in it; the original is lost;
    or what images are made from has changed since) | "leave" (somebody replaced it, without our
    module; or it can't be read) | "forget" (its kernel is gone) | "remove" (unfinished; "kernel" is
    None), "reason": sentence, one that names the image if it is left}}. Images that were never ours
    are not listed.

    Raises CommandExecutionError when /boot has no kernel though there are modules or images.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_initramfs.undo_plan
    """
    _check_boot()
    recorded = _recorded()
    images = {_image(kernel): kernel for kernel in _kernels()}
    # first: a build needs the room
    plan: dict[str, dict[str, Any]] = {
        path: {"kernel": None, "action": "remove", "reason": "a run that was cut off left it"}
        for path in _leftovers()
    }
    action: tuple[str, str] | None
    for image in sorted({*recorded, *images}):
        kernel = images.get(image) or str(_kernel_of(image))
        verdict = __salt__["ramboot_record.verdict"](image)
        lost = verdict == "ours" and __salt__["ramboot_record.original_fault"](image)
        if verdict == "ours" and not lost:
            action = _undo_ours(image, kernel)
        elif _is_gone(kernel):
            action = ("forget", "its kernel is no longer installed")
        elif lost:
            action = ("rebuild", lost)
        else:
            action = _undo_foreign(image, verdict)
        if action is not None:
            plan[image] = {"kernel": kernel, "action": action[0], "reason": action[1]}
    return plan


def asked_for() -> list[str]:
    """
    Lines of dracut's configuration, but for our own file as we wrote it, that want our module.

    dracut ends without an image when a module is asked for and missing (read in dracut-init.sh of
    059 to 106): our module may only be removed when this is empty.

    Returns ["FILE:NUMBER: LINE"].

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_initramfs.asked_for
    """
    paths = _paths()
    ours = paths["dracut_conf"]
    folders = (
        os.path.dirname(ours),
        os.path.join(os.path.dirname(os.path.dirname(paths["dracut_module"])), "dracut.conf.d"),
    )
    files = [os.path.join(os.path.dirname(folders[0]), "dracut.conf")]
    for folder in folders:
        files += sorted(glob.glob(os.path.join(glob.escape(folder), "*.conf")))
    found = []
    for path in files:
        goes = path == ours and __salt__["ramboot_record.outcome"](path)["action"] == "deleted"
        if goes or not os.path.isfile(path):
            continue
        with open(path, encoding="utf-8", errors="replace") as source:
            found += [
                f"{path}:{number}: {line.strip()}"
                for number, line in enumerate(source, 1)
                if ASKS.match(line)
            ]
    return found


def _undo_ours(image: str, kernel: str) -> tuple[str, str]:
    """What undo does with an image that we built and whose original can be put back."""
    original = __salt__["ramboot_record.entries"]()[image]["original"]
    if original is None:
        return ("delete", "ramboot built it and there was none before")
    # Earlier versions noted nothing. A new image is never wrong; an old one may have a keymap or a
    # crypttab that refuse the passphrase. One of a kernel that is gone can't be built.
    if original.get("remark") == _sources() or _is_gone(kernel):
        return ("restore", "ramboot built it")
    what = "the configuration or the packages that images are made from"
    return ("rebuild", f"{what} may be others than those of its original")


def _sources() -> str:
    """Hash of the times of what images are made from but for us: configuration and packages. Not of
    contents, for there may be keys.
    """
    paths = _paths()
    digest = hashlib.sha256()
    patterns = [*paths["image_sources"], *paths["package_databases"]]
    for path in sorted(path for pattern in patterns for path in glob.glob(pattern)):
        if path != paths["dracut_conf"] and os.path.isfile(path):
            info = os.stat(path)
            digest.update(f"{path}\0{info.st_size}\0{info.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _undo_foreign(image: str, verdict: str) -> tuple[str, str] | None:
    """What undo does with an image that is not the one we built."""
    left = __salt__["ramboot_record.outcome"](image)["comment"]
    # without lsinitrd there is no dracut, so nothing that could have put our module in
    if not os.path.isfile(image) or not __salt__["ramboot_config.command"](["lsinitrd"]):
        stamp = None
    else:
        try:
            stamp = _stamp(image)
        except CommandExecutionError as error:
            return ("leave", f"{error}; {left}")
    if stamp is not None:
        return ("rebuild", "it holds the ramboot module but is not the image that ramboot built")
    if verdict == "not-recorded":
        return None
    return ("leave", left)


# Actions


def rebuild(kernel: str | None = None, force: bool = False) -> dict[str, dict[str, Any]]:
    """
    Build the initramfs of every kernel whose image is stale, and of no other.

    kernel
        only this one. Default: all installed ones.
    force
        build images that are current as well.

    Returns {kernel: {"image": path, "action": "rebuilt" | "kept", "reason": sentence or None}}.

    Raises CommandExecutionError naming kernel, failure, the end of dracut's messages and what had
    been rebuilt before; the image of the failed kernel is untouched. Also while another run
    rebuilds or undoes.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_initramfs.rebuild
        salt-call --local ramboot_initramfs.rebuild kernel=6.12.1 force=True
    """
    fault = __salt__["ramboot_preflight.session_fault"]()
    if fault:
        raise CommandExecutionError(f"nothing was rebuilt: {fault}")
    with _locked():
        return _rebuild(kernel, force)


def _rebuild(kernel: str | None, force: bool) -> dict[str, dict[str, Any]]:
    wanted, lacking = _wanted()
    if lacking:
        raise CommandExecutionError(
            f"nothing was rebuilt: {lacking}; apply the state ramboot.initramfs first"
        )
    found = states()
    installed = [name for name, state in found.items() if state["state"] != "ignored"]
    if kernel is not None and kernel not in installed:
        known = ", ".join(installed) or "none"
        raise CommandExecutionError(
            f"nothing was rebuilt: there is no kernel {kernel!r}; installed: {known}"
        )
    __salt__["ramboot_record.sweep"](_paths()["boot"])
    _forget_gone_kernels()
    done: dict[str, dict[str, Any]] = {}
    for name in installed if kernel is None else [kernel]:
        state = found[name]
        if state["state"] == "current" and not force:
            done[name] = {"image": state["image"], "action": "kept", "reason": None}
            continue
        with _naming(done):
            _build(name, state["image"], wanted)
        reason = state["reason"] or "asked for"
        done[name] = {"image": state["image"], "action": "rebuilt", "reason": reason}
    return done


def undo() -> dict[str, dict[str, Any]]:
    """
    Do what `undo_plan` says, then look whether any image still holds our module.

    Returns what was done, as `undo_plan`. Raises CommandExecutionError naming the images that
    failed, after having tried each; also while another run rebuilds or undoes.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_initramfs.undo
    """
    with _locked():
        return _undo()


def _undo() -> dict[str, dict[str, Any]]:
    plan = undo_plan()
    failed: dict[str, str] = {}
    for image, step in plan.items():
        try:
            _undo_one(image, step)
        except (CommandExecutionError, OSError) as error:
            failed[image] = str(error)
    if failed:
        done = [
            image
            for image, step in plan.items()
            if image not in failed and step["action"] in CHANGING
        ]
        raise CommandExecutionError(
            f"{'; '.join(failed.values())}; done before: {', '.join(done) or 'none'}"
        )
    return plan


def _locked() -> contextlib.AbstractContextManager[Any]:
    """Two runs at once would have dracut write into the file that the other has checked."""
    path = _paths()["initramfs_lock"]
    # made by the boot, but for the first one
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return __salt__["ramboot_record.lock"](
        path, "another run is rebuilding the initramfs; wait until it has ended"
    )


def _undo_one(image: str, step: dict[str, Any]) -> None:
    if step["action"] == "remove":
        os.unlink(image)
        return
    if step["action"] == "rebuild":
        _build(step["kernel"], image, None)
    # one that is left: its original moves to where the reason says
    if step["action"] in ("restore", "delete", "leave"):
        __salt__["ramboot_record.restore"](image)
    else:
        __salt__["ramboot_record.forget"](image)
    if step["action"] == "rebuild" and _stamp(image):
        raise CommandExecutionError(f"{image} still holds the ramboot module")


# Kernels and images


def _paths() -> dict[str, Any]:
    return __salt__["ramboot_config.paths"]()


def _kernels() -> list[str]:
    """Versions with modules and a bootable file, oldest first."""
    paths = _paths()
    try:
        names = os.listdir(paths["kernels"])
    except FileNotFoundError:
        return []
    return sorted(
        (
            name
            for name in names
            if os.path.isdir(os.path.join(paths["kernels"], name))
            and os.path.isfile(os.path.join(paths["boot"], f"vmlinuz-{name}"))
        ),
        key=lambda name: [int(part) if part.isdigit() else -1 for part in re.split(r"(\d+)", name)],
    )


def _is_gone(kernel: str) -> bool:
    # what /boot has of it may be gone by mistake; its modules go with its package
    return not os.path.isdir(os.path.join(_paths()["kernels"], kernel))


def _check_boot() -> None:
    fault = boot_fault()
    if fault:
        raise CommandExecutionError(fault)


def _recorded() -> list[str]:
    return [path for path in __salt__["ramboot_record.entries"]() if _is_image(path)]


def _image(kernel: str) -> str:
    """The kernel's image, or where it would be: there where the other kernels have theirs."""
    patterns = _paths()["images"]
    candidates = [pattern.format(kernel=kernel) for pattern in patterns]
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    for pattern, candidate in zip(patterns, candidates, strict=True):
        if any(os.path.isfile(pattern.format(kernel=other)) for other in _kernels()):
            return candidate
    return candidates[0]


def _rescue() -> dict[str, str]:
    found = {}
    for pattern in _paths()["images"]:
        for image in sorted(glob.glob(pattern.format(kernel="0-rescue-*"))):
            found[str(_kernel_of(image))] = image
    return found


def _is_image(path: str) -> bool:
    return _kernel_of(path) is not None


def _kernel_of(image: str) -> str | None:
    for pattern in _paths()["images"]:
        before, after = pattern.split("{kernel}")
        if image.startswith(before) and image.endswith(after):
            return image[len(before) : len(image) - len(after)]
    return None


# Stamps


def _wanted() -> tuple[dict[str, str], str | None]:
    """The stamp that the files on disk would give: {image path: SHA-256}; and what lacks for it."""
    try:
        manifest = _manifest()
    except FileNotFoundError:
        return {}, f"the dracut module is not installed: {_paths()['dracut_manifest']} is missing"
    wanted = {}
    for line in [*manifest, (None, None, _paths()["boot_conf"], CONF_INSIDE)]:
        found = __salt__["ramboot_record.look"](line[2])
        if found is None:
            return {}, f"{line[2]} is missing on disk"
        if line[3] is not None:
            wanted[line[3]] = found["sha256"]
    return wanted, None


def _manifest() -> list[tuple[str, str, str, str | None]]:
    """Lines of the manifest: SHA-256, mode, path on disk, path in the image or None."""
    lines = []
    with open(_paths()["dracut_manifest"], encoding="utf-8") as source:
        for number, line in enumerate(source, 1):
            fields = line.split()
            if not fields or fields[0].startswith("#"):
                continue
            if len(fields) != 4:
                raise CommandExecutionError(
                    f"{_paths()['dracut_manifest']} line {number} is not "
                    f"SHA256 MODE PATH IMAGE_PATH: {line.strip()!r}"
                )
            inside = None if fields[3] == "-" else fields[3].lstrip("/")
            lines.append((fields[0], fields[1], _on_disk(fields[2]), inside))
    return lines


def _on_disk(path: str) -> str:
    # the manifest names dom0's directories; the module's own may lie elsewhere (paths)
    module = "/usr/lib/dracut/modules.d/50ramboot/"
    if path.startswith(module):
        return os.path.join(_paths()["dracut_module"], path[len(module) :])
    return _paths()["dracut_conf"] if path == "/etc/dracut.conf.d/50-ramboot.conf" else path


def _stamp(image: str) -> dict[str, str] | None:
    """{image path: SHA-256} as written when the image was built; None without our module."""
    done = _run(["lsinitrd", "-f", _paths()["image_stamp"], image], LSINITRD_TIMEOUT_S)
    if done["retcode"] != 0:
        raise CommandExecutionError(f"{image} can't be read: {_why(done)}")
    fields = [line.split() for line in done["stdout"].splitlines()]
    return {pair[1].lstrip("/"): pair[0] for pair in fields if len(pair) == 2} or None


def _state(image: str, wanted: dict[str, str], lacking: str | None) -> dict[str, Any]:
    if not os.path.isfile(image):
        return {"module": False, "state": "stale", "reason": "there is no image"}
    try:
        stamp = _stamp(image)
    except CommandExecutionError as error:
        return {"module": False, "state": "stale", "reason": str(error)}
    reason = lacking or _difference(stamp, wanted)
    return {
        "module": stamp is not None,
        "state": "stale" if reason else "current",
        "reason": reason,
    }


def _difference(stamp: dict[str, str] | None, wanted: dict[str, str]) -> str | None:
    if stamp is None:
        return "the ramboot module is not in it"
    for path in sorted(set(wanted) | set(stamp)):
        if path not in stamp:
            return f"{path} is not in it"
        if path not in wanted:
            return f"{path} is in it but no longer on disk"
        if stamp[path] != wanted[path]:
            return f"{path} differs from the one on disk"
    return None


# Building


def _build(kernel: str, image: str, wanted: dict[str, str] | None) -> None:
    """Replace image by a new one with the files `wanted` in it, or without our module (None)."""
    old = None
    if os.path.isfile(image):
        # an image that can't be read is no measure for the new one
        with contextlib.suppress(CommandExecutionError):
            old = look_inside(image, kernel)
    fault = _room_fault(kernel, image)
    if fault:
        raise CommandExecutionError(f"{fault}; {image} is as it was")
    # a leading dot: no boot loader's generator takes it for an image
    new = os.path.join(os.path.dirname(image), f".ramboot-{kernel}.tmp")
    try:
        done = _run(["dracut", "--force", "--kver", kernel, new], DRACUT_TIMEOUT_S)
        if done["retcode"] != 0:
            raise CommandExecutionError(f"dracut failed: {_why(done)}")
        if not os.path.isfile(new) or not os.path.getsize(new):
            raise CommandExecutionError(f"dracut made no image: {_why(done)}")
        faults = _faults(look_inside(new, kernel), old, wanted)
        if faults:
            raise CommandExecutionError(f"the new image is not good: {'; '.join(faults)}")
        _replace(new, image, old, record=wanted is not None)
    except (CommandExecutionError, OSError) as error:
        raise CommandExecutionError(f"kernel {kernel}: {error}; {image} is as it was") from error
    finally:
        # its own failure (a read-only /boot) must not hide the reason
        with contextlib.suppress(OSError):
            os.unlink(new)


def _faults(
    new: dict[str, Any], old: dict[str, Any] | None, wanted: dict[str, str] | None
) -> list[str]:
    """Everything that speaks against putting the new image in the old one's place."""
    faults = []
    if not new["kernel"]:
        faults.append("it has no modules of this kernel")
    if wanted is None and MODULE in new["modules"]:
        faults.append("the dracut module ramboot is still in it")
    if wanted is not None and MODULE not in new["modules"]:
        faults.append("the dracut module ramboot is not in it")
    for path, sha256 in sorted((wanted or {}).items()):
        if path not in new["files"]:
            faults.append(f"{path} is not in it")
        elif new["files"][path]["sha256"] != sha256:
            faults.append(
                f"{path} in it has SHA-256 {new['files'][path]['sha256']} instead of {sha256}"
            )
    if old is not None:
        modules, programs = _kept(old, new, ours_goes=wanted is None)
        faults += [f"the dracut module {name} of the old image is not in it" for name in modules]
        if modules:
            # somebody may have left it out on purpose since; only they can know
            faults.append("if that is meant, build the image with dracut once and apply again")
        faults += [f"the program {name} of the old image is not in it" for name in programs]
    return faults


def _kept(
    old: dict[str, Any], new: dict[str, Any], *, ours_goes: bool
) -> tuple[list[str], list[str]]:
    """Modules and programs of the old image that the new one lacks and should have."""
    modules = (set(old["modules"]) - set(new["modules"])) & ESSENTIAL
    # a module that dracut itself no longer has is an update's doing
    modules &= _offered_modules()
    # the shell in the image is whichever the other modules agree on
    if SHELLS & set(new["modules"]):
        modules -= SHELLS
    programs = set(old["programs"]) - set(new["programs"])
    if ours_goes:
        # what only our module had brought (module-setup.sh) goes with it
        modules -= {"dm"}
        programs -= {"lvm"} - set(old["modules"])
        if not {"crypt", "lvm"} & set(old["modules"]):
            programs -= {"dmsetup"}
    return sorted(modules), sorted(programs)


def _offered_modules() -> set[str]:
    modules = os.path.dirname(_paths()["dracut_module"])
    return {name.lstrip("0123456789") for name in os.listdir(modules)}


def _replace(new: str, image: str, old: dict[str, Any] | None, *, record: bool) -> None:
    """Record, replace, seal. old: what is in the image that goes; None: none that can be read."""
    recorded = record and _record(new, image, old)
    __salt__["ramboot_record.settle"](new, image, mode="0600")
    if recorded:
        __salt__["ramboot_record.seal"](image)


def _record(new: str, image: str, old: dict[str, Any] | None) -> bool:
    """Keep the image's original and note what comes; False: there is none to go back to."""
    if old is not None and __salt__["ramboot_record.verdict"](image) == "changed-by-user":
        # somebody replaced the image since: what we kept is no longer what to go back to, but for
        # a damaged or deleted one
        __salt__["ramboot_record.forget"](image)
    had_module = old is not None and MODULE in old["modules"]
    if had_module and __salt__["ramboot_record.verdict"](image) == "not-recorded":
        # kernel-install built it, our module included: undo rebuilds it without
        return False
    __salt__["ramboot_record.keep"](image, remark=_sources())
    __salt__["ramboot_record.intend"](image, __salt__["ramboot_record.look"](new)["sha256"])
    return True


def _room_fault(kernel: str, image: str) -> str | None:
    free = _free_bytes(os.path.dirname(image))
    return _short(kernel, image, _building_bytes(image), free, _BUILD)


def _building_bytes(image: str) -> int:
    sizes = [os.path.getsize(path) for path in map(_image, _kernels()) if os.path.isfile(path)]
    size = (
        os.path.getsize(image) if os.path.isfile(image) else max(sizes, default=UNKNOWN_IMAGE_BYTES)
    )
    return int(size * GROWTH) + SPARE_BYTES


def _short(kernel: str, image: str, need: int, free: int, what: str) -> str | None:
    if free >= need:
        return None
    return (
        f"kernel {kernel}: {need >> 20} MiB are needed in {os.path.dirname(image)} {what} and"
        f" {free >> 20} MiB are free"
    )


def _free_bytes(directory: str) -> int:
    found = os.statvfs(directory)
    # a run begins with deleting them
    left = sum(os.lstat(path).st_blocks * 512 for path in _leftovers())
    return found.f_bavail * found.f_frsize + left


def _leftovers() -> list[str]:
    """Unfinished images of a run that was killed or cut off, also of kernels that are gone."""
    return __salt__["ramboot_record.leftovers"](_paths()["boot"])


def _forget_gone_kernels() -> None:
    """Drop the originals of images that went with their kernel."""
    for path in _recorded():
        if _is_gone(str(_kernel_of(path))) and not os.path.lexists(path):
            __salt__["ramboot_record.forget"](path)


@contextlib.contextmanager
def _naming(done: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Add to a failure what had been changed before it."""
    try:
        yield
    except CommandExecutionError as error:
        before = [name for name, step in done.items() if step["action"] == "rebuilt"]
        said = f"rebuilt before: {', '.join(before)}" if before else "nothing was rebuilt before"
        raise CommandExecutionError(f"{error}; {said}") from error


# Verifying


def _expected() -> tuple[dict[str, Expected], dict[str, Expected]]:
    """{path: (SHA-256, mode)} on disk, and the same inside an image."""
    try:
        manifest = _manifest()
    except FileNotFoundError as error:
        raise CommandExecutionError(
            f"the dracut module is not installed: {error.filename} is missing"
        ) from error
    disk: dict[str, Expected] = {path: (sha256, mode) for sha256, mode, path, _ in manifest}
    inside: dict[str, Expected] = {
        path: (sha256, mode) for sha256, mode, _, path in manifest if path
    }
    conf = _paths()["boot_conf"]
    disk[conf] = UNKNOWN
    for path, entry in __salt__["ramboot_record.entries"]().items():
        # what existed before us is not a file of ours, though we changed it
        ours = path == conf or (entry["original"] is None and not _is_image(path))
        if ours and disk.get(path, UNKNOWN) == UNKNOWN:
            disk[path] = (entry["sealed"] or entry["intended"], None)
    inside[CONF_INSIDE] = disk[conf]
    return disk, inside


def _key_of(places: dict[str, Any], wanted: Any) -> str:
    return next(key for key, value in places.items() if value is wanted)


# The one place where commands are run


def _run(command: list[str], timeout_s: int, cwd: str | None = None) -> dict[str, Any]:
    return __salt__["cmd.run_all"](
        command,
        cwd=cwd,
        python_shell=False,
        timeout=timeout_s,
        ignore_retcode=True,
        output_loglevel="debug",
    )


def _why(done: dict[str, Any]) -> str:
    """Exit status and the last lines of what a command said."""
    said = (done.get("stderr") or done.get("stdout") or "").strip().splitlines()[-5:]
    status = f"exit status {done['retcode']}"
    if isinstance(done["retcode"], int) and done["retcode"] < 0:
        status = f"killed by signal {-done['retcode']}"
    return f"{status}: {' | '.join(said)}" if said else status
