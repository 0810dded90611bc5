# SPDX-License-Identifier: GPL-2.0-or-later
"""Where each volume of each qube lies, and what is left of qubes that are no more.

A part of `ramboot.audit` and `ramboot.orphans`. What can't be determined counts as a trace: a pool
of a driver that is not known here, a device that does not show, a qubesd that does not answer.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import xml.etree.ElementTree
from collections.abc import Callable, Iterable
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError

# Salt's loader sets it
__salt__: dict[str, Any]

__virtualname__ = "ramboot_qubes_audit"

COPIES = ("zram", "tmpfs", "image")
CLOCK_SLACK_S = 60
SEALED = "on the sealed disk, which refuses every write"
OUT_OF_REACH = "out of reach"
# What qubesd appends to a logical volume of a qube (QubesOS/qubes-core-admin:
# qubes/storage/lvm.py, the class's docstring): a running qube's snapshot, an import, revisions.
_LV = re.compile(r"(?P<base>vm-.+-(?:root|private|volatile))(?:-snap|-import|-\d+-back|-back)?")
# And what it makes of a volume in a pool of files, revisions and the like included.
_FILE = re.compile(r"(root|private|volatile)(?:-[a-z]+)?\.img")
# Of a qube (qubes/vm/__init__.py, validate_name).
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_.-]{0,30}")
# What the boot notes of it (ramboot-image.sh, image_stale).
_STALE = re.compile(r"the image of (?P<made>\S+) is stale")


def __virtual__() -> str:
    return __virtualname__


def places(mounts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    The rows of `ramboot.audit` about qubes.

    mounts
        what is visible where: mappings with `target`, `source` and `fstype`.

    Returns rows as `ramboot.audit` does: of each qube its volumes (but those that nobody writes to,
    such as the kernel), what it is, whether it is stateless, disposables elsewhere that it opens
    and, in a RAM session, whether it was made in it; of each pool, the pool that new qubes go to,
    preloaded disposables, qubes that were removed in this RAM session, what is left of qubes that
    are no more, or bears the name of one that does not have it; last a verdict over all of them.
    Nothing where there is no Qubes. The row of a volume has `qube`, `volume`, `pool`, `device` (a
    file, or the pool's name for it) and `ephemeral` (bool) as well.

    Raises CommandExecutionError when qubesd can't be asked.

    CLI Example:

    .. code-block:: bash

        qubesctl ramboot_qubes_audit.places '[{target: /, source: /dev/dm-1, fstype: ext4}]'
    """
    if not __salt__["ramboot_qubesadmin.available"]():
        if not os.path.lexists(__salt__["ramboot_config.paths"]()["qubes_xml"]):
            return []
        raise CommandExecutionError("this is Qubes, and its Python API (qubesadmin) is missing")
    pools = __salt__["ramboot_qubesadmin.pools"]()
    lies = {name: _where(name, config, mounts) for name, config in pools.items()}
    qubes = __salt__["ramboot_qubesadmin.qubes"]()
    # a qube of another machine has no volume here (core-admin: qubes/vm/remotevm.py)
    asked = {key for key, qube in qubes.items() if qube["class"] not in ("AdminVM", "RemoteVM")}
    of_qubes = _of_each(
        [name for name in qubes if name in asked],
        lambda name: _qube(name, qubes[name], pools, lies, mounts),
    )
    rows: list[dict[str, Any]] = []
    removed, since = _since(set(qubes) - (asked - set(of_qubes)))
    rows += removed
    stateless = others = 0
    for name, told in _opened_elsewhere(of_qubes).items():
        finding = f"{of_qubes[name][0]['finding']} but {told}"
        of_qubes[name][0] |= {"finding": finding, "verdict": "trace"}
    for name, found in of_qubes.items():
        if since is not None:
            # it is the first row that is about the qube as a whole
            found[0]["finding"] += _told_of_session(name, qubes[name], since, found)
        rows += found
        if found[0]["verdict"] == "ram":
            stateless += 1
        else:
            others += 1
    rows += [
        _row(f"pool {name}", f"{config['driver']}, {lies[name][1]}", lies[name][0])
        for name, config in pools.items()
        if config["driver"] != "linux-kernel"
    ]
    rows += _new_qubes(lies)
    left, named = _left_over(pools, strict=False)
    image = _stale_image(mounts)
    for item in [*left, *named]:
        verdict = _left_verdict(item, mounts)
        # what is in RAM came with the image
        known = image is None or verdict == "ram"
        if item in left:
            told = (
                "which is no more" if known else f"not known to {image}; may be a qube made since"
            )
            told = f"of {item['qube']}, {told}"
        else:
            told = f"bears the name of qube {item['qube']}, which does not have it"
            told += "" if known else f" in {image}; may have it since"
        rows.append(_row(f"left over {item['what']}", told, verdict if known else "unknown"))
    worst = __salt__["ramboot_audit.worst"]([row["verdict"] for row in rows], of_none="ram")
    told = f"{stateless} of {stateless + others} keep nothing outside of RAM"
    return [*rows, _row("qubes", told, worst)]


def orphans() -> dict[str, Any]:
    """
    What is left of qubes that qubesd does not know.

    They come from RAM sessions: dom0 forgets a qube that was made there, its volumes on the disk do
    not go, and a new qube of that name can't be made over them.

    Returns {"orphans": [{"what": "VG/LV" or a directory, "kind": "volume" | "directory", "qube":
    its name, "bytes": int, "made": LVM's time, or when a directory was last changed in ns since
    1970, both as text}], "token": text that `remove_orphans` wants, or None where there are none}.
    In a session on a stale image there is no token, and `note` says that some may be of qubes that
    were made since.

    Raises CommandExecutionError when qubesd or LVM can't be asked.

    CLI Example:

    .. code-block:: bash

        qubesctl ramboot_qubes_audit.orphans
    """
    found = _orphans(__salt__["ramboot_qubesadmin.pools"]())
    listed = {"orphans": found, "token": _token(found) if found else None}
    if found and __salt__["ramboot_preflight.session_fault"]():
        image = _stale_image(__salt__["ramboot_preflight.root_layout"]()["mounts"])
        if image:
            note = f"their qubes are not known to {image}; may be qubes made since"
            return {**listed, "token": None, "note": note}
    return listed


def remove_orphans(token: str) -> list[str]:
    """
    Delete what `orphans` listed, if that is still the very same list.

    token
        from that listing.

    Returns what was deleted, as in `what`.

    Raises CommandExecutionError in a RAM session, where qubesd does not know the disk's qubes; when
    the list is another one by now; and when something can't be deleted, with what was before it.

    CLI Example:

    .. code-block:: bash

        qubesctl ramboot_qubes_audit.remove_orphans TOKEN
    """
    fault = __salt__["ramboot_preflight.session_fault"]()
    if fault:
        raise CommandExecutionError(
            f"{fault}: in it every qube made since, and none made before, would look left over"
        )
    pools = __salt__["ramboot_qubesadmin.pools"]()
    found = _orphans(pools)
    if not found or token != _token(found):
        raise CommandExecutionError(
            "nothing was deleted: what is left over is not what the token was given for; list it"
            " again with ramboot.orphans"
        )
    kept = _kept(pools, _known(pools, _volumes_of(__salt__["ramboot_qubesadmin.qubes"]())))
    done: list[str] = []
    for item in found:
        try:
            _delete(item, pools, kept)
        except (CommandExecutionError, OSError) as error:
            before = f"; deleted before: {', '.join(done)}" if done else ""
            raise CommandExecutionError(
                f"{item['what']} can't be deleted: {error}{before}"
            ) from error
        done.append(item["what"])
    return done


# Where things lie: (verdict, words)


def _where(name: str, config: dict[str, str], mounts: list[dict[str, Any]]) -> tuple[str, str]:
    driver = config.get("driver")
    of_files = bool(__salt__["ramboot_qubes_pools.folders_of"](config))
    if of_files and not _is_there(config):
        # a stick that is not mounted: what lies on it does not lie on what shows its path now
        return "unknown", f"{config['dir_path']}, where the pool's directories are not there"
    if of_files or driver == "linux-kernel":
        return _where_file(config["dir_path"], mounts)
    if driver == "lvm_thin":
        return _where_lvm(config, mounts)
    return "unknown", f"a driver whose place ramboot does not know ({name})"


def _is_there(config: dict[str, str]) -> bool:
    """Whether a pool of files shows: both drivers make these directories when it is added, and
    never again (QubesOS/qubes-core-admin: qubes/storage/file.py and reflink.py, setup).
    """
    return any(map(os.path.isdir, __salt__["ramboot_qubes_pools.folders_of"](config)))


def _lacks_file(volume: dict[str, Any], file: str) -> bool:
    """Whether a volume is without the file that it has since it was made. Others get theirs at the
    start; while a qube runs without snapshots, file-reflink gives it another name
    (QubesOS/qubes-core-admin: qubes/storage/file.py and reflink.py, create and start).
    """
    names = (file, f"{file.removesuffix('.img')}-dirty.img")
    kept = volume["save_on_stop"] and not volume["snap_on_start"]
    return kept and not any(os.path.exists(name) for name in names)


def _where_file(path: str, mounts: list[dict[str, Any]]) -> tuple[str, str]:
    real = os.path.realpath(path)
    mount = __salt__["ramboot_qubes_pools.mount_of"](real, mounts)
    kind = __salt__["ramboot.backing"](mount["source"])
    words = f"{real} on {mount['source']}"
    if kind == "sealed":
        words += f", {SEALED}"
    if mount["target"] == "/" and kind == "disk":
        # a persistent boot: say what a RAM session would make of it
        words += ", with the root in RAM in a RAM session"
    return __salt__["ramboot_audit.of_backing"](kind), words


def _left_verdict(item: dict[str, Any], mounts: list[dict[str, Any]]) -> str:
    """What is a file is as good as where it lies; a volume is in LVM's metadata too."""
    in_ram = item["kind"] != "volume" and _where_file(item["what"], mounts)[0] == "ram"
    return "ram" if in_ram else "trace"


def _where_lvm(config: dict[str, str], mounts: list[dict[str, Any]]) -> tuple[str, str]:
    group, pool = config.get("volume_group", ""), config.get("thin_pool", "")
    # device-mapper doubles the hyphens of either name (lvm2: libdm, dm_build_dm_name)
    names = {
        f"{group.replace('-', '--')}-{pool.replace('-', '--')}{end}"
        for end in ("", "-tpool", "_tdata")
    }
    kinds = {
        __salt__["ramboot.backing"](f"/dev/{device}")
        for device, name in _device_mapper().items()
        if name in names
    }
    words = f"thin pool {group}/{pool}"
    if not kinds and _is_detached(group, mounts):
        return "ram", f"{words}, on the disk that was detached; {OUT_OF_REACH}"
    if not kinds:
        return "unknown", f"{words}, which is not active"
    if "sealed" in kinds and kinds <= {"ram", "sealed"}:
        return "ram", f"{words}, {SEALED}"
    return __salt__["ramboot_audit.worst"](kinds), words


def _session(mounts: list[dict[str, Any]]) -> dict[str, Any]:
    """What this boot noted of its RAM session; nothing where that can't be told."""
    path = __salt__["ramboot_config.paths"]()["status"]
    try:
        with open(path, encoding="utf-8") as source:
            noted = json.load(source)
    except (OSError, ValueError):
        return {}
    # what is on a tmpfs is of this boot
    mount = __salt__["ramboot_qubes_pools.mount_of"](os.path.realpath(path), mounts)
    good = isinstance(noted, dict) and mount["fstype"] == "tmpfs"
    return noted if good and (noted.get("schema"), noted.get("session")) == (1, "ram") else {}


def _stale_image(mounts: list[dict[str, Any]]) -> str | None:
    """The image of this session, in words, if the system had changed since it was built: qubesd
    knows the qubes of that day.
    """
    noted = _session(mounts)
    match = noted.get("backend") == "image" and _STALE.search(str(noted.get("reason")))
    return f"this image (built {match['made']})" if match else None


def _was_left_behind(file: str, mounts: list[dict[str, Any]]) -> bool:
    """Whether a file of a pool that shows is not there because no copy of the root has it."""
    if _session(mounts).get("backend") not in COPIES:
        return False
    mount = __salt__["ramboot_qubes_pools.mount_of"](os.path.realpath(file), mounts)
    try:
        return mount["target"] == "/" and __salt__["ramboot_qubes_pools.is_excluded"](file)
    except SaltInvocationError:
        return False


def _is_detached(group: str, mounts: list[dict[str, Any]]) -> bool:
    """Whether this boot closed the disk of the group before dom0 started, and nothing has shown it
    since: no mapping, and to LVM no volume.
    """
    noted = _session(mounts)
    if noted.get("disk") != "detached":
        return False
    root = str((noted.get("source") or {}).get("device"))
    # another disk's group may come at any time
    ours = re.compile(rf"{re.escape(group.replace('-', '--'))}-(?!-)")
    if not root.startswith(f"/dev/{group}/") and not ours.match(root.removeprefix("/dev/mapper/")):
        return False
    if any(ours.match(name) for name in _device_mapper().values()):
        return False
    return all(volume["vg_name"] != group for volume in __salt__["ramboot_audit.volumes"]())


def _device_mapper() -> dict[str, str]:
    """{dm-0: name} of every device-mapper device."""
    top = os.path.join(__salt__["ramboot_config.paths"]()["sys"], "block")
    found = {}
    for device in sorted(os.listdir(top)) if os.path.isdir(top) else []:
        path = os.path.join(top, device, "dm", "name")
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as source:
                found[device] = source.read().strip()
    return found


# Qubes


def _of_each(names: Iterable[str], ask: Callable[[str], Any]) -> dict[str, Any]:
    """What `ask` answers about each of these qubes; without those that ended since they were
    listed, as a disposable may at any time.
    """
    found = {}
    for name in names:
        try:
            found[name] = ask(name)
        except CommandExecutionError:
            if name in __salt__["ramboot_qubesadmin.qubes"]():
                raise
    return found


def _qube(
    name: str,
    qube: dict[str, Any],
    pools: dict[str, dict[str, str]],
    lies: dict[str, tuple[str, str]],
    mounts: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """First a row about the qube as a whole, then one for each volume that is written to."""
    rows: list[dict[str, Any]] = []
    volumes = __salt__["ramboot_qubesadmin.volumes"](name)
    for key, volume in volumes.items():
        if not volume["rw"] and not volume["snap_on_start"] and not volume["save_on_stop"]:
            # read alone: the kernel
            continue
        verdict, words = lies.get(volume["pool"], ("unknown", "a pool that is not there"))
        file = __salt__["ramboot_qubes_pools.file_of"](pools.get(volume["pool"]), volume)
        if file and _is_there(pools[volume["pool"]]):
            # also one that is made at the start: a link or a mount above it leads elsewhere
            verdict, words = _where_file(file, mounts)
            if _lacks_file(volume, file) and _was_left_behind(file, mounts):
                words += f"; left behind by copy:exclude, {OUT_OF_REACH}"
            elif _lacks_file(volume, file):
                verdict, words = "unknown", f"{file}; its file is not there"
        words = f"pool {volume['pool']}, {words}"
        encrypted = volume["ephemeral"]
        if encrypted and qube["running"] and not _encrypted(name, key, volume, pools):
            encrypted = False
            words += "; not encrypted: ephemeral was set while it ran, and counts from a start on"
        if verdict == "disk" and encrypted:
            verdict = "trace"
            words += "; encrypted with a key that goes with the qube"
        elif verdict == "disk" and not volume["rw"]:
            verdict = "trace"
            thin = pools.get(volume["pool"], {}).get("driver") == "lvm_thin"
            reached = "LVM's metadata" if thin else "the disk"
            words += f"; read-only, but its name reaches {reached}"
        rows.append(
            {
                **_row(f"qube {name} {key}", words, verdict),
                "qube": name,
                "volume": key,
                "pool": volume["pool"],
                "device": file or volume["vid"],
                "ephemeral": encrypted,
            }
        )
    if not rows:
        rows.append(_row(f"qube {name} volumes", "qubesd lists none", "unknown"))
    worst = __salt__["ramboot_audit.worst"]([row["verdict"] for row in rows])
    told = [qube["class"], "running" if qube["running"] else "halted"]
    if qube["template"]:
        told.insert(1, f"on {qube['template']}")
    holder = __salt__["ramboot_qubesadmin.preload_holder"](name)
    preloads = __salt__["ramboot_qubesadmin.features"](holder)
    if preloads.get("preload-dispvm-max", "0") not in ("", "0"):
        told.append("its disposables are started before anybody asks")
    if worst == "ram" and any(row["finding"].endswith(OUT_OF_REACH) for row in rows):
        told.append(OUT_OF_REACH)
    else:
        told.append("stateless" if worst == "ram" else "not stateless")
    return [_row(f"qube {name}", ", ".join(told), worst), *rows]


def _opened_elsewhere(of_qubes: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """What is told of qubes that are in RAM themselves, and whose disposables are not: these lie
    where the volumes of their template lie (core-admin: qubes/vm/dispvm.py).
    """
    verdicts = {name: rows[0]["verdict"] for name, rows in of_qubes.items()}
    # one that is out of reach is not started
    asked = [
        name
        for name, rows in of_qubes.items()
        if verdicts[name] == "ram" and not rows[0]["finding"].endswith(OUT_OF_REACH)
    ]
    words = {"disk": "on the disk", "trace": "not in RAM alone"}
    found = {}
    for name, dispvm in _of_each(asked, _opened_in).items():
        if dispvm and (verdict := verdicts.get(dispvm, "unknown")) != "ram":
            where = words.get(verdict, "not known to be in RAM")
            found[name] = f"opens disposables of {dispvm}, which are {where}"
    return found


def _opened_in(name: str) -> str | None:
    """The template of the disposables that a qube opens."""
    if __salt__["ramboot_qubesadmin.features"](name).get("prohibit-start"):
        # qubesd never starts it
        return None
    found = __salt__["ramboot_qubesadmin.properties"](name, ["default_dispvm"])
    return found["default_dispvm"]["value"]


def _encrypted(
    name: str, key: str, volume: dict[str, Any], pools: dict[str, dict[str, str]]
) -> bool:
    """Whether a volume of a running qube was encrypted when it was started: its device is there
    (QubesOS/qubes-core-admin: qubes/storage/__init__.py and lvm.py, encrypted_volume_path).
    """
    if pools.get(volume["pool"], {}).get("driver") == "lvm_thin":
        group, _, lv = volume["vid"].partition("/")
        device = f"{group.replace('-', '--')}-{lv.replace('-', '--')}@crypt"
    else:
        escaped = name.replace("_", "_u").replace("-", "_d")
        device = f"vm-volatile-{escaped}-crypt@{key}"
    return device in _device_mapper().values()


def _since(qubes: set[str]) -> tuple[list[dict[str, str]], set[str] | None]:
    """In a RAM session, rows about qubes that it removed or can't tell about, and the names of
    those that were there when it began; None in a persistent one, or where they can't be told.
    """
    if __salt__["ramboot_preflight.session_fault"]() is None:
        return [], None
    place = "qubes at the start of this session"
    try:
        before = _at_start()
    except (CommandExecutionError, OSError) as error:
        return [_row(place, f"could not be determined: {error}", "unknown")], None
    rows = [
        _row(
            f"qube {name}",
            "removed in this session: its volumes are gone, and dom0 lists it again at the next"
            " boot",
            "trace",
        )
        for name in sorted(before - qubes)
    ]
    return rows, before


def _at_start() -> set[str]:
    """Names in the copy of qubes.xml that qubes-core.service makes at each boot
    (QubesOS/qubes-core-admin: linux/aux-tools/startup-misc.sh); in a RAM session qubes.xml itself
    was that of the disk until then.
    """
    folder = __salt__["ramboot_config.paths"]()["qubes_xml_backups"]
    # a clock that was set meanwhile moves the boot's time as well, but for what it drifted
    began = __salt__["ramboot_audit.booted"]() - CLOCK_SLACK_S
    copies = [
        (os.stat(path).st_mtime, path) for path in glob.glob(os.path.join(folder, "qubes-*.xml"))
    ]
    copies = [copy for copy in copies if copy[0] >= began]
    if not copies:
        raise CommandExecutionError(f"{folder} has no copy of qubes.xml of this boot")
    try:
        top = xml.etree.ElementTree.parse(min(copies)[1])
    except xml.etree.ElementTree.ParseError as error:
        raise CommandExecutionError(f"{min(copies)[1]}: {error}") from error
    names = top.iterfind("./domains/domain/properties/property[@name='name']")
    return {item.text for item in names if item.text}


def _told_of_session(
    name: str, qube: dict[str, Any], before: set[str], rows: list[dict[str, Any]]
) -> str:
    if name not in before:
        return ", made in this session: dom0 forgets it at power-off"
    in_ram = any(row.get("volume") == "root" and row["verdict"] == "ram" for row in rows)
    if qube["class"] in ("TemplateVM", "StandaloneVM") and qube["running"] and in_ram:
        return ", an update now is forgotten at power-off: update in a persistent boot"
    return ""


def _new_qubes(lies: dict[str, tuple[str, str]]) -> list[dict[str, str]]:
    """Where a qube goes that is made without a pool."""
    names = [f"default_pool_{volume}" for volume in ("root", "private", "volatile")]
    values = __salt__["ramboot_qubesadmin.properties"](None, names)
    found = []
    for name in names:
        pool = values[name]["value"] or ""
        verdict = lies.get(pool, ("unknown", ""))[0]
        found.append(_row(name, f"new qubes go to pool {pool}", verdict))
    return found


def _row(place: str, finding: str, verdict: str) -> dict[str, str]:
    return {"place": place, "finding": finding, "verdict": verdict}


# What is left over


def _orphans(pools: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    return _left_over(pools)[0]


def _left_over(
    pools: dict[str, dict[str, str]], strict: bool = True
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Two lists: what bears the name of a qube that is no more, and may be deleted; and what bears
    the name of one that is there, though that does not have it.

    strict: a qube that ends meanwhile is an error, for what may be deleted must be told by one list
    of qubes. Else such a qube is one that is no more.
    """
    listed = __salt__["ramboot_qubesadmin.qubes"]()
    volumes = _volumes_of(listed, strict)
    qubes = {name for name, qube in listed.items() if name in volumes or qube["class"] == "AdminVM"}
    known = _known(pools, volumes)
    found = _left_volumes(pools, {vid for vid, _file in known})
    files = {os.path.realpath(file) for _vid, file in known if file}
    kept = _kept(pools, known)
    for config in pools.values():
        for folder in __salt__["ramboot_qubes_pools.folders_of"](config):
            found += _left_directories(folder, qubes, kept)
            found += _left_files(folder, qubes, files)
    items = sorted({item["what"]: item for item in found}.values(), key=lambda item: item["what"])
    return (
        [item for item in items if item["qube"] not in qubes],
        [item for item in items if item["qube"] in qubes],
    )


def _volumes_of(
    qubes: dict[str, dict[str, Any]], strict: bool = True
) -> dict[str, dict[str, dict[str, Any]]]:
    """{qube: its volumes}; unless strict, without qubes that ended meanwhile."""
    ask = __salt__["ramboot_qubesadmin.volumes"]
    names = [name for name, qube in qubes.items() if qube["class"] != "AdminVM"]
    return {name: ask(name) for name in names} if strict else _of_each(names, ask)


def _known(
    pools: dict[str, dict[str, str]], volumes: dict[str, dict[str, dict[str, Any]]]
) -> set[tuple[str, str | None]]:
    """(vid, its file in a pool of files) of each volume that qubesd knows."""
    return {
        (vid, __salt__["ramboot_qubes_pools.file_of"](pools.get(volume["pool"]), {"vid": vid}))
        for of_one in volumes.values()
        for volume in of_one.values()
        for vid in (volume["vid"], volume["source"])
        if vid
    }


def _kept(pools: dict[str, dict[str, str]], known: set[tuple[str, str | None]]) -> set[str]:
    """Directories of pools, files of volumes: each as it is called and as links have it."""
    paths = {config["dir_path"] for config in pools.values() if config.get("dir_path")}
    paths |= {file for _vid, file in known if file}
    return {form for path in paths for form in (os.path.normpath(path), os.path.realpath(path))}


def _holds(path: str, kept: set[str]) -> bool:
    """Whether one of them is it or lies below: a pool may be laid where another has its qubes."""
    return any(
        f"{one}/".startswith(f"{form}/")
        for form in (os.path.normpath(path), os.path.realpath(path))
        for one in kept
    )


def _left_volumes(pools: dict[str, dict[str, str]], known: set[str]) -> list[dict[str, Any]]:
    ours = {
        (config.get("volume_group"), config.get("thin_pool"))
        for config in pools.values()
        if config.get("driver") == "lvm_thin"
    }
    if not ours:
        return []
    found = []
    for volume in __salt__["ramboot_audit.volumes"]():
        match = _LV.fullmatch(volume["lv_name"])
        group = volume["vg_name"]
        if match is None or (group, volume["pool_lv"]) not in ours:
            continue
        base = match["base"]
        if f"{group}/{base}" in known:
            continue
        found.append(
            {
                "what": f"{group}/{volume['lv_name']}",
                "kind": "volume",
                "qube": base.removeprefix("vm-").rpartition("-")[0],
                "bytes": int(volume["lv_size"]),
                "made": volume["lv_time"],
            }
        )
    return found


def _left_directories(folder: str, qubes: set[str], kept: set[str]) -> list[dict[str, Any]]:
    found = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        # lost+found is nobody's
        if name in qubes or not _NAME.fullmatch(name) or not os.path.isdir(path):
            continue
        if _holds(path, kept):
            continue
        info = os.lstat(path)
        found.append(
            {
                "what": path,
                "kind": "directory",
                "qube": name,
                "bytes": 0 if os.path.islink(path) else _allocated(path),
                "made": str(info.st_mtime_ns),
            }
        )
    return found


def _left_files(folder: str, qubes: set[str], known: set[str]) -> list[dict[str, Any]]:
    """Volumes in the directory of a qube that is there, each of qubes in /var/lib/qubes has one."""
    return [
        {"what": path, "kind": "file", "qube": name}
        for name in sorted(qubes)
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), name, "*.img*")))
        if (match := _FILE.match(os.path.basename(path)))
        and os.path.realpath(os.path.join(os.path.dirname(path), f"{match[1]}.img")) not in known
    ]


def _allocated(top: str) -> int:
    return sum(
        os.lstat(os.path.join(folder, name)).st_blocks * 512
        for folder, _folders, names in os.walk(top)
        for name in names
    )


def _token(found: list[dict[str, Any]]) -> str:
    """Of what, how much and since when: a volume made anew meanwhile is another one."""
    text = json.dumps(found, sort_keys=True)
    # a letter first: Salt's command line takes 12 and 1e5 for numbers
    return f"t{hashlib.sha256(text.encode()).hexdigest()[:15]}"


def _delete(item: dict[str, Any], pools: dict[str, dict[str, str]], kept: set[str]) -> None:
    if item["kind"] == "directory":
        parent = os.path.dirname(item["what"])
        allowed = {
            folder
            for config in pools.values()
            for folder in __salt__["ramboot_qubes_pools.folders_of"](config)
        }
        if parent not in allowed:
            raise CommandExecutionError("it is no directory of a qube")
        if _holds(item["what"], kept):
            raise CommandExecutionError("a pool or a qube's volume lies there")
        if os.path.islink(item["what"]):
            # what it leads to is not ours to delete
            os.unlink(item["what"])
        else:
            # rmtree would empty what is mounted there
            for mount in __salt__["ramboot_preflight.root_layout"]()["mounts"]:
                if _holds(item["what"], {mount["target"]}):
                    raise CommandExecutionError(f"a file system is mounted at {mount['target']}")
            shutil.rmtree(item["what"])
        return
    # without --force LVM refuses one that is in use
    command = ["lvremove", "--yes", item["what"]]
    done = __salt__["cmd.run_all"](command, python_shell=False, env={"LC_ALL": "C"})
    if done["retcode"] != 0:
        raise CommandExecutionError(done["stderr"] or done["stdout"])
