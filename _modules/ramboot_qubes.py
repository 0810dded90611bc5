# SPDX-License-Identifier: GPL-2.0-or-later
"""Qubes whose every volume lies in the RAM root's pool, and settings of others.

Questions: is there anything to do (`wanted`), what stands in the way (`faults`) or is worth knowing
(`warnings`), what is not as the pillar wants it (`pending`), what it takes in RAM (`budget`), what
an undo would do (`undo_pending`). Actions: `apply` does what `pending` lists, `undo` what
`undo_pending` lists. Everything is asked of qubesd (ramboot_qubesadmin), nothing is guessed from
names.

A qube of ours has the feature `ramboot-made`, which holds its kind *and its own name*: disposables
and clones inherit features (QubesOS/qubes-core-admin: qubes/vm/dispvm.py), and are not ours for
that. It is set right after the qube is made, as "begun", and becomes whole last of all, after the
record of it. Before it is set, the record has the intent: a qube without a mark that is just what
qubesd was asked for, was made in that moment and never touched since is what a crash between both
left (`_Look.unlike`).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import ipaddress
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from salt.exceptions import CommandExecutionError, SaltInvocationError

# Salt's loader sets it
__salt__: dict[str, Any]

__virtualname__ = "ramboot_qubes"

MADE, SOURCE = "ramboot-made", "ramboot-source"
# qubesd says it to who starts the copy
PROHIBIT = "prohibit-start"
REASON = "ramboot: a copy of {source}; update that and apply ramboot.qubes in a persistent boot"
# In the order in which one builds on the other.
KINDS = {
    "templates": "TemplateVM",
    "standalones": "StandaloneVM",
    "disposable_templates": "AppVM",
    "low_ram": "AppVM",
    "app_qubes": "AppVM",
    "save": "AppVM",
    "disposables": "DispVM",
}
CLONES = ("templates", "standalones")
# Volumes with contents of their own, by what a qube is.
OWN = {"TemplateVM": ("root", "private"), "StandaloneVM": ("root", "private")}
# Properties whose value is a qube (core-admin: qubes/vm/qubesvm.py, mix/net.py, remotevm.py).
QUBE_VALUED = ("netvm", "default_dispvm", "management_dispvm", "audiovm", "guivm", "relayvm")
# That which a preloaded disposable has of its template, in 4.3 it alone (core-admin: qubes/app.py,
# on_domain_pre_deleted; get_qube_prop_deps of 4.4 has more).
OF_PRELOADED = {"default_dispvm"}
# How long qubesd may take for an empty qube: one that was made later somebody else made.
MAKING_S = 120
# Properties that are never at their default, even in a qube to which nobody gave anything (core:
# qubes/vm/*.py).
GIVEN = ("name", "label", "template", "klass", "qid", "uuid", "dispid")
# Tags that qubesd itself sets in a new qube (core: qubes/ext/admin.py, gui.py, audio.py).
TAGS_OF_QUBESD = ("created-by-", "guivm-", "audiovm-")
# Features that qubesd itself sets in a new qube, with the value; None: any value
# (QubesOS/qubes-desktop-linux-common: qubesappmenus/__init__.py, appmenus_init). check-updates only
# in a system without updates of qubes (core: qubes/vm/qubesvm.py).
OF_QUBESD = {"menu-items": None, "check-updates": ""}
BOOLS = {"True": ("true", "yes", "on", "1"), "False": ("false", "no", "off", "0")}
# What a step does that sets something.
SETTING = ("set", "give", "change", "put_back")
HALTED = (("property", "template"), ("volume", "root rw"))
# What a qube has to be before another may name it (core-admin: qubes/vm/mix/net.py, _setter_netvm;
# qubes/vm/__init__.py, setter_disposable_template, of 4.4; qubes/vm/dispvm.py).
ENABLING = ("provides_network", "template_for_dispvms")
NEEDS = {"netvm": "provides_network", "default_dispvm": "template_for_dispvms"}
# Instead of a name, of the kinds that have the key.
DISPVM_WORDS = ("auto", "self", "none")
# Setting it starts disposables at once (core-admin: qubes/vm/mix/dvmtemplate.py,
# on_feature_set_preload_dispvm_max). They keep what they were given of their template when they
# were made, these groups (qubes/vm/dispvm.py, __init__): only of its volumes and properties qubesd
# notices a change (is_preload_outdated).
PRELOADS = "preload-dispvm-max"
KEPT_BY_PRELOADED = ("feature", "tag", "firewall")
# Features that say what is in a template's root: copied again with it. Others of like names, such
# as gui-videoram-min, are settings. (core-admin: qubes/ext/core_features.py, services.py,
# supported_features.py, windows.py, qubes/api/misc.py; client: qubesadmin/tools/qvm_template.py,
# qvm_template_postprocess.py)
OF_THE_ROOT = ("os", "os-distribution", "os-distribution-like", "os-version", "os-eol", "qrexec",
               "gui", "gui-emulated", "vmexec", "apparmor", "qubes-firewall", "qubes-agent-version",
               "last-update", "last-updates-check", "updates-available", "default-menu-items",
               "netvm-menu-items")  # fmt: skip
# And what begins so.
OF_THE_ROOT_TOO = ("supported-service.", "supported-feature.", "supported-rpc.", "boot-mode.",
                   "template-")  # fmt: skip


def __virtual__() -> str:
    return __virtualname__


# Questions


def wanted() -> bool:
    """
    Whether the pillar asks for anything, or something of an earlier one is recorded.

    Without either no other function here asks qubesd, so that the formula runs where there is none.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes.wanted
    """
    settings = _settings()
    asked = [*KINDS, "settings", "file_pools", "default_pools"]
    # whose pool has to be the RAM root's
    aliases = settings["aliases"] != "off" and __salt__["ramboot_qubesadmin.available"]()
    return (
        aliases or any(settings[key] for key in asked) or __salt__["ramboot_qubes_record.exists"]()
    )


def faults() -> list[str]:
    """
    Everything that stands in the way of what the pillar asks for, a sentence each.

    Nothing is changed. Covers the pool and the storage layout, what qubes are built on, names in
    use, classes, templates and pools of what exists, labels, properties, running qubes that would
    have to be halted, room in the pool.

    Raises CommandExecutionError when qubesd can't be asked.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes.faults
    """
    if not wanted():
        return []
    if not __salt__["ramboot_qubesadmin.available"]():
        return ["ramboot:qubes is set, and Qubes' Python API (qubesadmin) is not installed here"]
    look = _Look(_settings())
    found = _pool_faults(look)
    for kind, name, entry in look.entries():
        found += _qube_faults(look, kind, name, entry)
    for name, entry in look.settings["settings"].items():
        if name not in look.qubes:
            found.append(f"settings:{name}: there is no such qube")
            continue
        found += _value_faults(look, "settings", name, entry, look.qubes[name]["class"])
    steps = [*_qube_steps(look), *_settings_steps(look)] if not found else []
    for step in steps:
        found += _halt_faults(look, step)
        refused = f"{step['what']} can't become {step['new']}"
        if users := _needed_by(look, step, steps):
            found.append(f"{refused}: it is needed by {', '.join(users.values())}")
        # one that is put back; what the pillar asks for is looked at above
        if loop := _step_loop(step, functools.partial(_netvm_will_be, look)):
            found.append(f"{refused}: the network would go round: {loop}")
    return found + _room_faults(look)


def warnings() -> list[str]:
    """
    What is worth knowing and no reason to stop, a sentence each.

    Clones whose source was updated since and that are not copied anew by themselves, qubes of ours
    that the pillar no longer has, a pool that takes more RAM than it need, and a RAM session that
    would not fit with what is asked for.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes.warnings
    """
    if not wanted() or not __salt__["ramboot_qubesadmin.available"]():
        return []
    look = _Look(_settings())
    found = [told for name, told in _freshness(look).items() if told]
    asked = {name for _kind, name, _entry in look.entries()}
    for name in sorted(look.record["made"]):
        if name not in asked and name in look.qubes:
            left = f"{name} was made by ramboot, is no longer in the pillar, and stays"
            if look.features(name).get(PROHIBIT, "").startswith(REASON.split(":")[0]):
                left += (
                    "; it is no longer copied anew, and gets no updates of its own until its"
                    f" features skip-update and {PROHIBIT} are taken away"
                )
            found.append(left)
    if look.pools.get(look.pool, {}).get("driver") == "file-reflink":
        # core-admin: qubes/storage/reflink.py, _copy_file
        found.append(
            f"pool {look.pool} is file-reflink, and a copied root can't share blocks between files:"
            " in a RAM session each start of a qube in it copies whole volumes; with the driver"
            " file none does"
        )
    if look.settings["save"] and "snapshot" in __salt__["ramboot_config.backends"]():
        kept = ", ".join(sorted(look.settings["save"]))
        found.append(
            f"what is put into {kept} in a RAM session on snapshot is forgotten, as all is there"
        )
    if any(budget().values()):
        found += [
            f"with these qubes a RAM session on {backend} needs more RAM than dom0 gets:"
            f" {plan['says']}"
            for backend, plan in __salt__["ramboot.plan"]().items()
            if _lacks_ram(backend, plan)
        ]
    return found


def _lacks_ram(backend: str, plan: dict[str, Any]) -> bool:
    """Whether the pillar starts sessions on it that do not fit. A question with too little RAM for
    what the menu entry takes is none: the entry is there for that.
    """
    settings = __salt__["ramboot_config.load"]()
    boot = settings["boot"]
    asked = [boot["backend"]] if boot["mode"] == "ask" else []
    if backend in (*asked, *settings["grub"]["entries"]) and not plan["fits"]:
        return True
    return backend == boot["mode"] and not plan["fits_ordinary"]


def pending(part: str) -> list[dict[str, Any]]:
    """
    What is not as the pillar wants it, in the order in which it would be changed.

    part
        "pools" (file pools), "qubes" (those to be made, and their settings; before them that others
        provide network or disposables, and the network of those that theirs will go through) or
        "settings" (else of other qubes and of the system; what an earlier pillar set and this one
        does not; that ours provide network or disposables no more).

    Returns [{"what": text, unique, "old": value, "new": value, ...}]; what else a step has is for
    `apply`.

    Raises CommandExecutionError when qubesd can't be asked.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes.pending qubes
    """
    if not wanted():
        return []
    look = _Look(_settings())
    parts = {"pools": _pool_steps, "qubes": _qube_steps, "settings": _settings_steps}
    return _around_preloaded(look, parts[part](look))


def left(part: str, drop: bool = False) -> list[str]:
    """
    What an earlier pillar set, this one does not, and stays as it is, a sentence each.

    part
        as in `pending`; there is nothing but in "settings".
    drop
        whether the notes of it are dropped, so that it is told once; `apply` drops them too.
        Default: False, nothing is changed.

    Raises CommandExecutionError when qubesd can't be asked, OSError when the record can't be
    written.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes.left settings
    """
    _steps, found, forget = _put_back_of(part)
    if drop:
        _forget(forget)
    return found


def budget() -> dict[str, int]:
    """
    What qubes of ours add to the root that a RAM session copies.

    Returns {"present_bytes": allocated by those that are there, a part of what / holds already,
    "pending_bytes": what those that the pillar asks for and that are not there will allocate, and
    what a new copy of an updated source will more}, in a RAM root, where no file shares blocks with
    another, before compression; both 0 where the pillar asks for none.

    Raises CommandExecutionError when qubesd can't be asked.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes.budget
    """
    found = {"present_bytes": 0, "pending_bytes": 0}
    if not wanted() or not __salt__["ramboot_qubesadmin.available"]():
        return found
    look = _Look(_settings())
    refresh = _to_refresh(look)
    for kind, name, entry in look.entries():
        if look.standing(name) == "whole":
            volumes = look.volumes(name)
            found["present_bytes"] += sum(
                volume["usage"] * _files_of(look, volume)
                for volume in volumes.values()
                if volume["pool"] == look.pool
            )
            if name in refresh:
                root = look.volumes(entry["source"])["root"]
                more = max(0, root["usage"] - volumes["root"]["usage"])
                found["pending_bytes"] += more * _files_of(look, volumes["root"])
        elif kind in CLONES and entry["source"] in look.qubes:
            kept = {"pool": look.pool, "save_on_stop": True}
            found["pending_bytes"] += _clone_bytes(look, entry["source"]) * _files_of(look, kept)
    return found


def _files_of(look: _Look, volume: dict[str, Any]) -> int:
    """How many files in RAM hold a volume: file-reflink keeps a second one of it for the next
    start, which shares its blocks on the disk alone (core-admin: qubes/storage/reflink.py,
    _update_precache).
    """
    # one that the same run adds first
    config = look.pools.get(volume["pool"]) or look.settings["file_pools"].get(volume["pool"], {})
    return 2 if config.get("driver") == "file-reflink" and volume["save_on_stop"] else 1


def undo_pending() -> dict[str, Any]:
    """
    What `undo` would do.

    Returns {"faults": [sentences; nothing is done while there is one], "steps": as in `pending`,
    "left": [sentences: what stays, and why]}.

    Raises CommandExecutionError when qubesd can't be asked.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes.undo_pending
    """
    empty: dict[str, Any] = {"faults": [], "steps": [], "left": []}
    if not __salt__["ramboot_qubesadmin.available"]():
        if __salt__["ramboot_qubes_record.exists"]():
            told = "qubes of ours are recorded, and Qubes' Python API (qubesadmin) is missing"
            return {**empty, "faults": [told]}
        return empty
    try:
        settings = _settings()
    except SaltInvocationError:
        # an undo needs no pillar, so a bad one is no obstacle
        settings = None
    found = _undo(_Look(settings))
    session = __salt__["ramboot_preflight.session_fault"]()
    if session and found["steps"]:
        # qubesd would delete volumes on the disk, and at the next boot list their qubes again
        found["faults"].insert(0, session)
    return found


# Actions


def apply(part: str) -> list[str]:
    """
    Change what `pending` lists, in its order; networks, and disposables that are preloaded, after
    all qubes are made.

    part
        as in `pending`.

    Returns sentences about what was done otherwise than one may expect.

    Raises CommandExecutionError at the first step that fails. A qube that was being made is deleted
    again or, where that fails too, stays marked as half-made; the next run makes it anew.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes.apply qubes
    """
    notes: list[str] = []
    _steps, _left, forget = _put_back_of(part)
    # Twice: a qube may name one that is made after it.
    for _pass in range(2):
        steps = pending(part)
        making = any(step["do"][0] == "make" for step in steps)
        for step in steps:
            # what is made just now may still have another network than it will have
            late = _sets_netvm(step) or _sets_preloads(step) and step["new"] != "0"
            if not (making and late):
                notes += _do(step)
    _forget(forget)
    return notes


def undo() -> list[str]:
    """
    Do what `undo_pending` lists.

    Returns its `left`.

    Raises CommandExecutionError when something stands in the way, or a step fails.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubes.undo
    """
    todo = undo_pending()
    if todo["faults"]:
        raise CommandExecutionError("\n".join(todo["faults"]))
    for step in todo["steps"]:
        _do(step)
    for item in todo.get("forget", []):
        __salt__["ramboot_qubes_record.forget"](*item)
    return todo["left"]


# What there is


class _Look:
    """One look at the system: each question to qubesd is asked once."""

    def __init__(self, settings: dict[str, Any] | None) -> None:
        self.settings = settings or {"remove_data": [], **{kind: {} for kind in KINDS}}
        self.pool = self.settings.get("pool")
        self.qubes = __salt__["ramboot_qubesadmin.qubes"]()
        self.pools = __salt__["ramboot_qubesadmin.pools"]()
        self.record = __salt__["ramboot_qubes_record.read"]()
        self._cache: dict[tuple, Any] = {}

    def entries(self) -> list[tuple[str, str, dict[str, Any]]]:
        """(kind, name, entry) of each qube to be made, what others build on first."""
        return [
            (kind, name, entry)
            for kind in KINDS
            for name, entry in sorted(
                self.settings.get(kind, {}).items(),
                # one that names another disposable template after those that name none
                key=lambda item: item[1].get("default_dispvm", "self") not in DISPVM_WORDS,
            )
        ]

    def running_on(self, name: str) -> list[str]:
        """The qube itself and whatever is based on it, as far as it runs."""
        return [
            other
            for other, qube in self.qubes.items()
            if qube["running"] and (other == name or name in self.bases(other))
        ]

    def told_running_on(self, name: str) -> str:
        told = []
        for other in self.running_on(name):
            template = self.qubes[other]["template"]
            if other in self.preloaded(template):
                # one that is halted comes back
                holder = self.preload_holder(template)
                other += f" (preloaded: set preload-dispvm-max of {holder} to 0)"
            told.append(other)
        return ", ".join(told)

    def disposables_running(self, name: str) -> list[str]:
        """Those on it that qubesd does not halt by itself."""
        return [
            other
            for other, qube in self.qubes.items()
            if qube["running"]
            and (qube["class"], qube["template"]) == ("DispVM", name)
            and other not in self.preloaded(name)
        ]

    def preloaded(self, name: str | None) -> list[str]:
        """Disposables that qubesd started before anybody asked, and takes away by itself (core:
        qubes/vm/dispvm.py, is_preload).
        """
        return self.features(name).get("preload-dispvm", "").split(" ") if name else []

    def preload_holder(self, template: str) -> str:
        return self._once("preload_holder", template)

    def bases(self, name: str) -> list[str]:
        """The qube's template, that one's template, and so on."""
        found: list[str] = []
        above = self.qubes[name]["template"]
        while above and above in self.qubes and above not in found:
            found.append(above)
            above = self.qubes[above]["template"]
        return found

    def kind_of(self, name: str) -> str | None:
        return next((kind for kind in KINDS if name in self.settings.get(kind, {})), None)

    @contextlib.contextmanager
    def unless_gone(self, name: str) -> Iterator[None]:
        """Around questions about one of all qubes: one that ended since they were listed, as a
        disposable may at any time, is passed over, and listed no longer.
        """
        try:
            yield
        except CommandExecutionError:
            if name in __salt__["ramboot_qubesadmin.qubes"]():
                raise
            self.qubes.pop(name, None)

    def _once(self, function: str, *arguments: Any) -> Any:
        key = (function, *map(str, arguments))
        if key not in self._cache:
            self._cache[key] = __salt__[f"ramboot_qubesadmin.{function}"](*arguments)
        return self._cache[key]

    def volumes(self, name: str) -> dict[str, dict[str, Any]]:
        return self._once("volumes", name)

    def features(self, name: str) -> dict[str, str]:
        return self._once("features", name)

    def tags(self, name: str) -> list[str]:
        return self._once("tags", name)

    def firewall(self, name: str) -> list[str]:
        return self._once("firewall", name)

    def devices(self, name: str) -> dict[str, dict[str, str]]:
        return self._once("devices", name)

    def pci_devices(self) -> dict[str, str | None]:
        """Those of dom0; none where qubesd can't tell, which is no reason to refuse any."""
        try:
            return self._once("pci_devices")
        except CommandExecutionError:
            return {}

    def backends(self, name: str) -> list[str]:
        return self._once("backends", name)

    def pci_while_running(self) -> bool:
        return self._once("pci_while_running")

    def labels(self) -> list[str]:
        return self._once("labels")

    def property_names(self, name: str | None) -> list[str]:
        return self._once("property_names", name)

    def value(self, name: str | None, key: str) -> dict[str, Any]:
        return self._once("properties", name, [key])[key]

    def uuid(self, name: str) -> str | None:
        """What tells a qube from an earlier one of its name (core-admin: qubes/vm/__init__.py)."""
        return self.value(name, "uuid")["value"]

    def value_type(self, name: str, key: str) -> str | None:
        return self._once("property_type", name, key)

    def standing(self, name: str) -> str:
        """`absent`, `half` (ours, not whole), `whole` (ours) or `foreign`."""
        if name not in self.qubes:
            return "absent"
        mark = self.features(name).get(MADE, "").split(" ")
        if len(mark) == 3 and mark[0] in ("begun", "whole") and mark[2] == name:
            return "whole" if mark[0] == "whole" else "half"
        return "foreign" if self.unlike(name) else "half"

    def unlike(self, name: str) -> str | None:
        """Why a qube without a mark is not what a run of ours left that was cut off before it could
        set one; None: it is. Whatever somebody may have done to it or with it speaks against it.
        """
        intent = self.record["made"].get(name, {}).get("intent")
        if intent is None:
            return "no run of ramboot was making it"
        qube = self.qubes[name]
        for key in ("class", "template", "label"):
            if qube[key] != intent[key]:
                return f"its {key} is {qube[key]}, not {intent[key]}"
        if qube["running"]:
            return "it is running"
        try:
            made = _born(_folder(name, qube["class"]))
        except CommandExecutionError as error:
            return f"when it was made can't be told: {error}"
        # timestamps of files lag behind the clock by a tick
        if not intent["time"] - 1 <= made <= intent["time"] + MAKING_S:
            return "it was not made when that run was cut off"
        for key, volume in self.volumes(name).items():
            pool = intent["pools"].get(key, volume["pool"])
            if volume["pool"] != pool:
                return f"its {key} volume lies in pool {volume['pool']}, not in {pool}"
            if volume["save_on_stop"] and (volume["usage"] or self.revised(volume)):
                return f"its {key} volume holds data"
        # a disposable has what its template has from the start (core-admin: qubes/vm/dispvm.py)
        model = qube["template"] if qube["class"] == "DispVM" else None
        kept = self.features(model) if model else {}
        given = {
            key: value
            for key, value in self.features(name).items()
            if OF_QUBESD.get(key, ...) not in (None, value)
        }
        if any(kept.get(key) != value for key, value in given.items()):
            return "it was given features"
        tags = set(self.tags(name)) - set(self.tags(model) if model else [])
        if any(not tag.startswith(TAGS_OF_QUBESD) for tag in tags):
            return "it was given tags"
        rules = self.firewall(model) if model else ["action=accept"]
        if self.firewall(name) != rules or self.devices(name):
            return "it was given firewall rules or devices"
        shared = self.property_names(model) if model else []
        for key in set(self.property_names(name)) - set(GIVEN):
            now = self.value(name, key)
            if not now["default"] and (key not in shared or now != self.value(model, key)):
                return f"its {key} was set"
        return None

    def state(self, name: str, volume: str) -> str:
        """See ramboot_qubes_pools.state_of."""
        info = self.volumes(name)[volume]
        return __salt__["ramboot_qubes_pools.state_of"](self.pools.get(info["pool"]), info)

    def states(self, name: str, without: str | None = None) -> dict[str, str]:
        """The state of each volume that keeps what is written to it."""
        return {
            volume: self.state(name, volume)
            for volume, info in self.volumes(name).items()
            if info["save_on_stop"] and volume != without
        }

    def unfinished(self, name: str) -> str | None:
        """The volume of a qube of ours that a new copy of it was cut off from: half of it may be
        there, or none, and it is nobody's data.
        """
        again = self.kind_made(name) == "templates" and self.standing(name) == "whole"
        return "root" if again and SOURCE not in self.features(name) else None

    def kind_made(self, name: str) -> str | None:
        return self.record["made"].get(name, {}).get("kind")

    def revised(self, info: dict[str, Any]) -> bool:
        """Whether a volume holds an older state of it. With the driver file two starts of qubesd
        leave an empty one of an empty volume (core-admin: qubes/tools/qubesd.py, stop_storage;
        qubes/storage/file.py, commit).
        """
        driver = self.pools.get(info["pool"], {}).get("driver")
        return bool(info["revisions"]) and bool(driver != "file" or info["usage"])

    def used_since(self, name: str) -> bool:
        """Whether a qube of ours has been written to since it was made; true when unknown."""
        noted = self.record["made"].get(name, {})
        try:
            if not noted.get("whole"):
                return True
            without = self.unfinished(name)
            then = {key: state for key, state in noted["volumes"].items() if key != without}
            return self.states(name, without) != then
        except CommandExecutionError:
            return True

    def in_the_way(self, name: str) -> bool:
        """Whether a half-made qube holds data that no copy of ours put there, and that nobody gave
        up; true when unknown.
        """
        if name in self.settings["remove_data"]:
            return False
        copied = self.record["made"].get(name, {}).get("volumes", {})
        try:
            return any(
                # nothing of ours leaves one that holds anything (_make_empty)
                self.revised(info)
                or info["usage"]
                and (volume not in copied or copied[volume] not in (None, self.state(name, volume)))
                for volume, info in self.volumes(name).items()
                if info["save_on_stop"]
            )
        except CommandExecutionError:
            return True


def _folder(name: str, cls: str) -> str:
    """The directory that qubesd makes of each qube, wherever its volumes lie (core-admin:
    qubes/vm/qubesvm.py, dir_path; qubes/vm/templatevm.py).
    """
    top = os.path.dirname(__salt__["ramboot_config.paths"]()["qubes_xml"])
    return os.path.join(top, "vm-templates" if cls == "TemplateVM" else "appvms", name)


def _born(folder: str) -> float:
    """When a directory was made. qubesd changes what is in it, so that its mtime is another one."""
    command = ["stat", "--format=%.3W", folder]
    done = __salt__["cmd.run_all"](command, python_shell=False, env={"LC_ALL": "C"})
    try:
        born = float(done["stdout"]) if done["retcode"] == 0 else 0
    except ValueError:
        born = 0
    if not born:
        # a file system may know none
        raise CommandExecutionError(f"{folder}: {done['stderr'] or 'no time of birth'}")
    return born


def _settings() -> dict[str, Any]:
    return __salt__["ramboot_config.load"]()["qubes"]


# What stands in the way


def _pool_faults(look: _Look) -> list[str]:
    found = []
    in_pool = [kind for kind in KINDS if kind != "save" and look.settings[kind]]
    if in_pool or look.settings["aliases"] != "off":
        # one that the same run adds first is as good
        config = look.pools.get(look.pool) or look.settings["file_pools"].get(look.pool)
        fault = __salt__["ramboot_qubes_pools.ram_fault"](look.pool, config)
        fault = fault or _crowd_fault(look)
        found += [fault] if fault else []
    for name, entry in look.settings["file_pools"].items():
        there = look.pools.get(name)
        if there is not None:
            for key in ("driver", "dir_path"):
                if there.get(key) != entry[key]:
                    found.append(
                        f"file_pools:{name}: there is a pool of that name with {key}"
                        f" {there.get(key)}, not {entry[key]}"
                    )
        elif fstype := __salt__["ramboot_qubes_pools.in_memory"](entry["dir_path"]):
            found.append(
                f"file_pools:{name}: {entry['dir_path']} is on {fstype}, which no boot keeps;"
                " choose a directory on a disk (on_root: true for one that a RAM session forgets)"
            )
        elif __salt__["ramboot_qubes_pools.on_root"](entry["dir_path"]) and not entry["on_root"]:
            found.append(
                f"file_pools:{name}: {entry['dir_path']} is on /, which a RAM session copies and"
                " forgets; set on_root: true if that is meant, or mount something there first"
            )
        elif over := _overlapping(look, name, entry["dir_path"]):
            found.append(
                f"file_pools:{name}: {entry['dir_path']} {over}; choose a directory apart from"
                " those of other pools"
            )
        elif not os.path.isdir(os.path.dirname(entry["dir_path"])):
            # qubesd makes the last directory alone (core-admin: qubes/storage/file.py, setup)
            found.append(
                f"file_pools:{name}: there is no directory {os.path.dirname(entry['dir_path'])}"
            )
    for key, name in look.settings["default_pools"].items():
        if name not in look.pools and name not in look.settings["file_pools"]:
            found.append(f"default_pools:{key}: there is no pool {name}")
    return found


def _overlapping(look: _Look, name: str, path: str) -> str | None:
    """How this directory and that of another pool lie one in the other; None where none does. A
    qube's directory in one may be a pool's in the other.
    """
    others = {**look.settings["file_pools"], **look.pools}
    for other, config in others.items():
        if other == name or not config.get("dir_path"):
            continue
        ours, theirs = (f"{os.path.realpath(p)}/" for p in (path, config["dir_path"]))
        if ours.startswith(theirs) or theirs.startswith(ours):
            how = "lies in" if ours.startswith(theirs) else "holds"
            return f"{how} {config['dir_path']} of pool {other}"
    return None


def _crowd_fault(look: _Look) -> str | None:
    """Where / is on no thin pool, Qubes itself puts every qube into varlibqubes on it
    (core-admin: qubes/app.py, _default_pool).
    """
    others: set[str] = set()
    for name, qube in [*look.qubes.items()]:
        with look.unless_gone(name):
            if qube["class"] != "AdminVM" and look.standing(name) == "foreign":
                volumes = look.volumes(name)
                others |= {info["pool"] for key, info in volumes.items() if key != "kernel"}
    if others != {look.pool}:
        return None
    return (
        f"pool {look.pool} holds every qube: a RAM session takes all of them along if they fit, and"
        " forgets them all without ramboot:qubes; wanted: a pool of its own on / (file_pools with"
        " on_root: true, and its name as pool), and the others left behind by copy:exclude"
    )


def _qube_faults(look: _Look, kind: str, name: str, entry: dict[str, Any]) -> list[str]:
    """What speaks against one qube that is to be made or is there."""
    where, standing = f"{kind}:{name}", look.standing(name)
    if standing == "foreign" and "intent" in look.record["made"].get(name, {}):
        return [
            f"{where}: a run that was making it was cut off, and the qube of that name"
            f" ({look.qubes[name]['class']}) may be yours: {look.unlike(name)}; delete it if nobody"
            " needs it, or choose another name"
        ]
    if standing == "foreign":
        return [
            f"{where}: a qube of that name is there ({look.qubes[name]['class']}) and was not made"
            " by ramboot; rename or delete it, or choose another name"
        ]
    found = _base_faults(look, kind, name, entry)
    if standing == "half" and look.qubes[name]["running"]:
        found.append(f"{where}: it is half-made and running; halt it, it has to be made anew")
    if standing == "half" and look.in_the_way(name):
        found.append(
            f"{where}: it is half-made and has to be made anew, but was used since and may hold"
            " data; add it to remove_data, or delete it yourself"
        )
    if standing == "half" and (users := _users(look, name, [])):
        found.append(
            f"{where}: it is half-made and has to be made anew, but is in use by"
            f" {', '.join(users.values())}"
        )
    if standing == "whole":
        found += _shape_faults(look, kind, name, entry)
        if kind == "templates" and name in _to_refresh(look) and look.running_on(name):
            found.append(
                f"{where}: it is to be copied anew, and {look.told_running_on(name)} is running;"
                " halt that first"
            )
    return found + _value_faults(look, kind, name, entry, KINDS[kind])


def _base_faults(look: _Look, kind: str, name: str, entry: dict[str, Any]) -> list[str]:
    """What the qube builds on: there, of the right class, in the right pool, halted if need be."""
    key = "source" if kind in CLONES else "template"
    base, where = entry[key], f"{kind}:{name}:{key}"
    classes = {
        "templates": ("TemplateVM",),
        "standalones": ("TemplateVM", "StandaloneVM"),
        "disposables": ("AppVM",),
    }.get(kind, ("TemplateVM",))
    planned = look.kind_of(base)
    if base == name:
        return [f"{where}: a qube can't be made from itself"]
    if planned in KINDS and look.standing(base) != "foreign":
        there = {"class": KINDS[planned], "running": False}
        if kind in CLONES:
            return [f"{where}: {base} is made by ramboot itself; name what that is a copy of"]
    elif base in look.qubes:
        there = look.qubes[base]
    else:
        return [f"{where}: there is no qube {base}"]
    if there["class"] not in classes:
        return [f"{where}: {base} is a {there['class']}; wanted: {' or '.join(classes)}"]
    if kind in CLONES:
        needed = look.standing(name) != "whole" or name in _to_refresh(look)
        if needed and there["running"]:
            return [f"{where}: {base} is running; halt it, a volume in use can't be copied whole"]
        return []
    if kind == "disposables" and planned == "low_ram":
        return [f"{where}: the root of {base} stays on the disk; name a disposable template"]
    if kind == "disposables":
        key = "template_for_dispvms"
        asked = look.settings["settings"].get(base, {"properties": {}})["properties"]
        good = planned == "disposable_templates" or (
            base in look.qubes
            and key in look.property_names(base)
            and _spelt(key, _text(asked.get(key, look.value(base, key)["value"])), "False")
            == "True"
        )
        if not good:
            return [f"{where}: {base} is no template of disposables"]
    if kind in ("disposable_templates", "app_qubes", "disposables") and planned not in (
        "templates",
        "disposable_templates",
    ):
        root = look.volumes(base)["root"]["pool"]
        if root != look.pool:
            return [
                f"{where}: the root of {base} lies in pool {root}, and so would that of {name}"
                f" (a snapshot lies where its origin lies); put a copy of {base} under templates"
            ]
    return []


def _shape_faults(look: _Look, kind: str, name: str, entry: dict[str, Any]) -> list[str]:
    """Whether a qube of ours still is what it was made as."""
    where, qube = f"{kind}:{name}", look.qubes[name]
    if qube["class"] != KINDS[kind]:
        return [f"{where}: it is a {qube['class']}, not a {KINDS[kind]}; delete it to have it anew"]
    mark = look.features(name)[MADE].split(" ")[1]
    if mark != kind:
        return [f"{where}: it was made under {mark}; delete it to have it anew"]
    found = []
    if kind == "disposables" and qube["template"] != entry["template"]:
        found.append(
            f"{where}: its template is {qube['template']}; delete it to have it anew on"
            f" {entry['template']} (the volatile volume would stay where it is)"
        )
    for volume, pool in _pools_wanted(look, kind, entry).items():
        real = look.volumes(name)[volume]["pool"]
        based = kind not in (*CLONES, "disposables")
        if volume == "root" and based and qube["template"] != entry["template"]:
            # a snapshot, which follows the template when that is set back
            continue
        if kind == "save" and not entry["pool"] and real != look.pool:
            # the default may be another one since
            continue
        if real != pool:
            found.append(
                f"{where}: its {volume} volume lies in pool {real}, not in {pool}; delete it to"
                " have it anew"
            )
    if not found:
        try:
            look.states(name, look.unfinished(name))
        except CommandExecutionError as error:
            # its deletion was cut off, such as by the power
            found.append(f"{where}: {error}; delete it to have it anew")
    return found


def _pools_wanted(look: _Look, kind: str, entry: dict[str, Any]) -> dict[str, str | None]:
    """Where each volume that we care for has to lie."""
    if kind == "save":
        return {"private": entry["pool"] or _default_pool(look, "default_pool_private")}
    if kind == "low_ram":
        return {"private": look.pool} | (
            {"volatile": look.pool} if entry["volatile"] == "pool" else {}
        )
    return dict.fromkeys(("root", "private", "volatile"), look.pool)


def _forgotten(look: _Look, pool: str | None) -> str | None:
    """Where a pool of files has its app qubes, if that goes with a RAM session or with any."""
    config = {**look.settings["file_pools"], **look.pools}[pool]
    folders = __salt__["ramboot_qubes_pools.folders_of"](config)
    if not folders:
        return None
    path = folders[0]
    if fstype := __salt__["ramboot_qubes_pools.in_memory"](path):
        return fstype
    return "the RAM root" if __salt__["ramboot_qubes_pools.on_root"](path) else None


def _default_pool(look: _Look, key: str) -> str | None:
    """As the same run will have set it; each follows default_pool until it is set itself."""
    asked = look.settings["default_pools"]
    if key in asked:
        return asked[key]
    now = look.value(None, key)
    return asked.get("default_pool", now["value"]) if now["default"] else now["value"]


def _value_faults(look: _Look, kind: str, name: str, entry: dict[str, Any], cls: str) -> list[str]:
    """Labels, properties and qubes that are named and are not there."""
    where, found = f"{kind}:{name}", []
    if entry["label"] is not None and entry["label"] not in look.labels():
        found.append(
            f"{where}:label: there is no label {entry['label']}; known: {', '.join(look.labels())}"
        )
    names = _property_names(look, name, cls)
    known = {*look.qubes, *(key for _kind, key, _entry in look.entries())}
    for key, value in entry["properties"].items():
        if names and key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            found.append(f"{where}:properties:{key}: {cls} has no such property{hint}")
        elif key in QUBE_VALUED and isinstance(value, int):
            # to YAML `no` is false
            found.append(
                f"{where}:properties:{key}: {value} is not allowed; allowed: the name of a qube, or"
                " nothing (null) for none"
            )
        elif key in QUBE_VALUED and value and value not in known:
            found.append(f"{where}:properties:{key}: there is no qube {value}")
        elif told := _type_fault(look, name, cls, key, value):
            found.append(f"{where}:properties:{key}: {told}")
        elif value and key in NEEDS and value != name and not _will_be(look, value, NEEDS[key]):
            found.append(f"{where}:properties:{key}: {value} has no {NEEDS[key]}")
        elif key == "netvm" and (
            loop := _network_loop(name, functools.partial(_netvm_will_be, look))
        ):
            found.append(f"{where}:properties:netvm: the network would go round: {loop}")
    dispvm, words = entry.get("default_dispvm", "none"), _dispvm_words(look, kind, name)
    if dispvm not in (*words, *words.values()):
        if dispvm not in known:
            found.append(f"{where}:default_dispvm: there is no qube {dispvm}")
        elif not _will_be(look, dispvm, NEEDS["default_dispvm"]):
            found.append(f"{where}:default_dispvm: {dispvm} has no {NEEDS['default_dispvm']}")
    if cls == "AdminVM" and entry["firewall"] is not None:
        found.append(f"{where}:firewall: {name} has no network and no firewall")
    found += _pci_faults(look, kind, name, entry)
    if kind == "save":
        if entry["properties"].get("netvm"):
            found.append(f"{where}:properties:netvm: a save qube has no network")
        pool = _pools_wanted(look, kind, entry)["private"]
        if pool == look.pool:
            found.append(
                f"{where}: pool {pool} is that of the RAM root, which forgets; name another"
            )
        elif pool not in look.pools and pool not in look.settings["file_pools"]:
            found.append(f"{where}:pool: there is no pool {pool}")
        elif lies := _forgotten(look, pool):
            found.append(
                f"{where}: pool {pool} is on {lies}, which is not kept; name one that is elsewhere"
            )
    if kind == "settings" and entry["template"] and entry["template"] not in known:
        found.append(f"{where}:template: there is no qube {entry['template']}")
    return found


def _pci_faults(look: _Look, kind: str, name: str, entry: dict[str, Any]) -> list[str]:
    """What speaks against devices that it does not have yet. 4.3 assigns any, and refuses the start
    of a qube that lacks one (core-admin: qubes/vm/qubesvm.py, start); 4.2 assigns none to a qube in
    pvh mode (release4.2: qubes/ext/pci.py, on_device_pre_attached_pci).
    """
    where = f"{kind}:{name}:pci"
    made = look.standing(name) not in ("absent", "half")
    there = look.devices(name) if entry.get("pci") and made else {}
    new = [port for port in entry.get("pci", {}) if port not in there]
    known = look.pci_devices() if new else {}
    found = []
    for port in new:
        if known and port not in known:
            # by its place on the bus, as 4.2 calls it
            near = [key for key, place in known.items() if place == _place(port)]
            near = near or difflib.get_close_matches(port, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "qvm-pci lists those it has"
            found.append(f"{where}:{port}: dom0 has no such PCI device; {hint}")
    if new and not look.pci_while_running() and _virt_mode(look, name) == "pvh":
        found.append(f"{where}: a qube in pvh mode gets no PCI device; set virt_mode: hvm as well")
    return found


def _place(port: str) -> str:
    return f"0000:{port.replace('_', ':')}"


def _virt_mode(look: _Look, name: str, above: tuple[str, ...] = ()) -> str:
    """In which its first device finds it, once its properties are set (core-admin:
    qubes/vm/qubesvm.py, _default_virt_mode); "" where that can't be told. `above` are based on it:
    they may have their device before settings of others are set.
    """
    kinds = (*KINDS,) if above else (*KINDS, "settings")
    entries = [entry for kind in kinds if (entry := look.settings[kind].get(name))]
    for entry in entries:
        if asked := entry["properties"].get("virt_mode"):
            return str(asked).lower()
    there = name in look.qubes and look.standing(name) != "half"
    if there and "virt_mode" not in look.property_names(name):
        return ""
    if there and look.value(name, "virt_mode") != {"value": "pvh", "default": True}:
        return look.value(name, "virt_mode")["value"] or ""
    source = None if there else next((e["source"] for e in entries if "source" in e), None)
    if source in look.qubes:
        # what follows the default there does here
        now = look.value(source, "virt_mode")
        return "pvh" if now["default"] else now["value"]
    base = next((entry["template"] for entry in entries if entry.get("template")), None)
    base = base or (look.qubes[name]["template"] if there else None)
    if base is None or base in above or not (there or entries):
        return "pvh" if there else ""
    return _virt_mode(look, base, (*above, name))


def _models(look: _Look, name: str, cls: str) -> list[str]:
    """Qubes that tell of the properties of one that is there or will be, the best first: itself,
    those of its class, others.
    """
    return sorted(look.qubes, key=lambda key: (key != name, look.qubes[key]["class"] != cls))


@contextlib.contextmanager
def _asking_model(look: _Look, model: str, name: str) -> Iterator[None]:
    """Around questions about a model: of what another one can't tell the next may."""
    try:
        with look.unless_gone(model):
            yield
    except CommandExecutionError:
        if model == name:
            raise


def _property_names(look: _Look, name: str, cls: str) -> list[str]:
    """Which properties it has or will have; none where that can't be told."""
    for model in _models(look, name, cls):
        if model == name or look.qubes[model]["class"] == cls:
            with _asking_model(look, model, name):
                return look.property_names(model)
    return []


def _property_type(look: _Look, name: str, cls: str, key: str) -> str | None:
    """As ramboot_qubesadmin.property_type. It is the same in each class that has the property
    (core-admin: qubes/vm/*.py).
    """
    for model in _models(look, name, cls):
        with _asking_model(look, model, name):
            if key in look.property_names(model) and (found := look.value_type(model, key)):
                return found
    return None


def _type_fault(look: _Look, name: str, cls: str, key: str, value: Any) -> str | None:
    """Why qubesd would refuse a value for its type alone (core-admin: qubes/__init__.py,
    property.sanitize and bool), as far as that can be told.
    """
    wanted, text = _property_type(look, name, cls, key), _text(value)
    if wanted == "bool" and not any(text.lower() in words for words in BOOLS.values()):
        allowed = "true or false"
    elif wanted == "int" and not _is_whole(text):
        allowed = "a whole number"
    else:
        return None
    shown = "nothing" if value is None else repr(value)
    return f"{shown} is not allowed; allowed: {allowed}"


def _way(name: str, will_be: Callable[[str], str | None]) -> list[str]:
    """The qubes that a network goes through, itself first, to its end or until one comes again."""
    way, netvm = [name], will_be(name)
    while netvm and netvm not in way:
        way.append(netvm)
        netvm = will_be(netvm)
    return [*way, netvm] if netvm else way


def _network_loop(name: str, will_be: Callable[[str], str | None]) -> str | None:
    """The way of its network back to itself; None where it ends (core-admin: qubes/vm/mix/net.py,
    _setter_netvm).
    """
    way = _way(name, will_be)
    return " > ".join(way) if way[-1] == name and way[1:] else None


def _step_loop(step: dict[str, Any], will_be: Callable[[str], str | None]) -> str | None:
    return _network_loop(step["do"][1], will_be) if _sets_netvm(step) else None


def _netvm_will_be(look: _Look, name: str, above: tuple[str, ...] = ()) -> str | None:
    """Once the pillar is applied. `above` are made of it."""
    for kind in (*KINDS, "settings"):
        entry = look.settings[kind].get(name)
        if entry is None:
            continue
        asked = {k: v for g, k, v in _values(look, kind, name, entry) if g == "property"}
        if "netvm" in asked:
            return asked["netvm"] or None
        if name not in (*look.qubes, *above) and kind in (*CLONES, "disposables"):
            base = entry["source" if kind in CLONES else "template"]
            if base not in look.qubes:
                return _netvm_will_be(look, base, (*above, name))
            # what that has when the copy is made
            now = _netvm_now(look, base)
            return _default_netvm(look, KINDS[kind]) if now["default"] else now["value"]
    if name not in look.qubes:
        return _default_netvm(look)
    now = _netvm_now(look, name)
    kept = _kept(look)
    item = _comes_back(look, name, "netvm", now, kept)
    if item and not _impossible(look, item, kept):
        return _end_netvm(look, name, item["old"])
    return now["value"]


def _netvm_now(look: _Look, name: str) -> dict[str, Any]:
    if "netvm" in look.property_names(name):
        return look.value(name, "netvm")
    return {"value": None, "default": False}


def _default_netvm(look: _Look, cls: str = "AppVM") -> str:
    # that of a template is none (core-admin: qubes/vm/templatevm.py)
    return "" if cls == "TemplateVM" else look.value(None, "default_netvm")["value"] or ""


def _end_netvm(look: _Look, name: str, value: Any) -> str:
    """That which a step gives it; `value` as in `_do_set`."""
    if not isinstance(value, dict):
        return value
    if value["default"]:
        return _default_netvm(look, look.qubes[name]["class"])
    return value["value"] or ""


def _is_whole(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def _will_be(look: _Look, name: str, key: str, above: tuple[str, ...] = ()) -> bool:
    """Whether a property of a qube is true once the pillar is applied. `above` have what it has."""
    for kind in (*KINDS, "settings"):
        entry = look.settings[kind].get(name)
        if entry is None:
            continue
        asked = {k: v for g, k, v in _values(look, kind, name, entry) if g == "property"}
        if key in asked:
            return _spelt(key, asked[key], "False") == "True"
        if name not in (*look.qubes, *above) and kind in (*CLONES, "disposables"):
            base = entry["source" if kind in CLONES else "template"]
            return _will_be(look, base, key, (*above, name))
    return (
        name in look.qubes
        and key in look.property_names(name)
        and look.value(name, key)["value"] == "True"
    )


def _halt_faults(look: _Look, step: dict[str, Any]) -> list[str]:
    """What qubesd changes in a halted qube alone (core-admin: qubes/vm/appvm.py, template;
    qubes/api/admin.py, rw; qubes/vm/mix/net.py, on_property_pre_set_netvm; release4.2:
    qubes/devices.py, detach), or while no disposable of it runs (qubes/vm/mix/dvmtemplate.py).
    """
    action, *about = step["do"]
    if action not in SETTING:
        return []
    name, group, key = about[:3]
    if (group, key) == ("property", "template") and (above := look.disposables_running(name)):
        return [
            f"{name}: its template can't be changed while {', '.join(above)} is running; halt it"
        ]
    if name not in look.qubes or not look.qubes[name]["running"]:
        return []
    taken = group == "pci" and key in look.devices(name) and not look.pci_while_running()
    if (group, key) in HALTED or taken:
        key = _shown(group, key)
        return [f"{name}: its {key} can't be changed while it is running; halt it"]
    netvm = _next_netvm(look, name, about[-1]) if (group, key) == ("property", "netvm") else ""
    if netvm and not (netvm in look.qubes and look.qubes[netvm]["running"]):
        return [
            f"{name}: its netvm can't become {netvm}, which is halted, while {name} is running;"
            f" halt {name} or start {netvm}"
        ]
    return []


def _needed_by(look: _Look, step: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, str]:
    """Who names a qube that a step would take from what that needs (core-admin:
    qubes/vm/mix/dvmtemplate.py, __on_pre_set_dvmtemplate; net.py, _setter_provides_network); as in
    `_users`.
    """
    if _enables(step) is not False:
        return {}
    name, key = step["do"][1], step["do"][3]
    if key == "template_for_dispvms":
        return _users(look, name, steps, ("template", "default_dispvm", "management_dispvm"))
    changed = {other["what"] for other in steps}
    found = {}
    for other in [*look.qubes]:
        with look.unless_gone(other):
            if (
                "netvm" in look.property_names(other)
                and look.value(other, "netvm")["value"] == name
                and f"{other}: netvm" not in changed
            ):
                found[other] = f"{other} (netvm)"
    return found


def _next_netvm(look: _Look, name: str, value: Any) -> str:
    """Of a step; "" where qubesd connects nothing."""
    netvm = _end_netvm(look, name, value)
    same = netvm == look.value(name, "netvm")["value"]
    return "" if same and isinstance(value, dict) and value["default"] else netvm


def _room_faults(look: _Look) -> list[str]:
    """Whether the pool has room for every copy, before the first of them is begun."""
    needed = sum(
        _clone_bytes(look, entry["source"])
        for kind, name, entry in look.entries()
        if kind in CLONES and entry["source"] in look.qubes and look.standing(name) != "whole"
    )
    config = look.pools.get(look.pool) or _pool_to_come(look)
    for name in _to_refresh(look):
        # the driver file deletes the old root first (core-admin: qubes/storage/file.py,
        # import_volume); file-reflink makes the new one beside it
        old = look.volumes(name)["root"]["usage"] if config.get("driver") == "file" else 0
        source = look.settings["templates"][name]["source"]
        needed += max(0, look.volumes(source)["root"]["usage"] - old)
    if not needed or "size" not in config or "usage" not in config:
        return []
    margin = __salt__["ramboot_config.defaults"]()["image_build"]["margin_mib"] << 20
    # dom0 lives in the same file system, and what it keeps for root counts as free for qubesd
    # (core-admin: qubes/storage/file.py, usage)
    free = int(config["size"]) - int(config["usage"]) - margin - _reserved(config)
    if needed <= free:
        return []
    left = max(0, free) >> 20
    return [f"pool {look.pool} has {left} MiB left, and the copies need {needed >> 20} MiB"]


def _reserved(config: dict[str, Any]) -> int:
    """Bytes of the file system of a pool of files that only root gets."""
    try:
        there = os.statvfs(_nearest(config["dir_path"]))
    except (KeyError, OSError):
        return 0
    return there.f_frsize * (there.f_bfree - there.f_bavail)


def _nearest(place: str) -> str:
    """A directory that is to be made stands for the one that it will be in."""
    return place if os.path.isdir(place) else os.path.dirname(place)


def _pool_to_come(look: _Look) -> dict[str, Any]:
    """A pool that the same run adds first, with the room where it will be (core-admin:
    qubes/storage/file.py, size, usage).
    """
    entry = look.settings["file_pools"].get(look.pool)
    if entry is None:
        return {}
    place = entry["dir_path"]
    try:
        there = os.statvfs(_nearest(place))
    except OSError:
        return {}
    used = there.f_blocks - there.f_bfree
    sizes = {"size": there.f_frsize * there.f_blocks, "usage": there.f_frsize * used}
    return {"driver": entry["driver"], "dir_path": place, **sizes}


def _clone_bytes(look: _Look, source: str) -> int:
    volumes = look.volumes(source)
    return sum(volumes[key]["usage"] for key in OWN["TemplateVM"] if key in volumes)


# Freshness


def _freshness(look: _Look) -> dict[str, str | None]:
    """Clones whose source was updated since: what is told about each; None: it is copied anew."""
    found: dict[str, str | None] = {}
    for name, entry in look.settings["templates"].items():
        if look.standing(name) != "whole" or entry["source"] not in look.qubes:
            continue
        noted = look.features(name).get(SOURCE)
        if noted == look.state(entry["source"], "root"):
            continue
        told = f"{name}: {entry['source']} was updated since it was copied"
        if noted is None:
            # its root may be half of the old and half of the new
            found[name] = None
        elif entry["refresh"] == "manual":
            found[name] = f"{told}; refresh: manual keeps the old copy"
        elif look.used_since(name) and name not in look.settings["remove_data"]:
            found[name] = (
                f"{told}, but {name} itself was changed as well, which a new copy would undo;"
                f" add {name} to remove_data to have it copied anew"
            )
        else:
            found[name] = None
    return found


def _to_refresh(look: _Look) -> list[str]:
    return [name for name, told in _freshness(look).items() if told is None]


# Steps


def _pool_steps(look: _Look) -> list[dict[str, Any]]:
    return [
        _step(
            f"pool {name}",
            None,
            {"driver": entry["driver"], "dir_path": entry["dir_path"]},
            ["add_pool", name, entry],
        )
        for name, entry in look.settings["file_pools"].items()
        if name not in look.pools
    ]


def _qube_steps(look: _Look) -> list[dict[str, Any]]:
    steps = [step for step in _steps_of_ours(look) if _enables(step) is not False]
    will_be = functools.partial(_netvm_will_be, look)
    steps = sorted(steps + _networks_above(look, steps), key=lambda step: _turn(step, will_be))
    return _asked_of_others(look, True) + steps


def _steps_of_ours(look: _Look) -> list[dict[str, Any]]:
    steps = []
    refresh = _to_refresh(look)
    for kind, name, entry in look.entries():
        values = _values(look, kind, name, entry)
        if look.standing(name) != "whole":
            shown: dict[str, Any] = {
                key: entry[key] for key in ("source", "template") if key in entry
            }
            shown |= {"kind": kind, "class": KINDS[kind]}
            shown |= {_shown(group, key): value for group, key, value in values}
            shown |= {f"pool of {key}": v for key, v in _pools_wanted(look, kind, entry).items()}
            old = "half-made" if look.standing(name) == "half" else None
            steps.append(_step(name, old, shown, ["make", kind, name, entry, values, look.pool]))
            continue
        if name in refresh:
            old = look.features(name).get(SOURCE, "not known to be whole")
            new = look.state(entry["source"], "root")
            steps.append(
                _step(
                    f"{name}: root of {entry['source']}",
                    old,
                    new,
                    ["refresh", name, entry["source"]],
                )
            )
        for _, group, key, now, value in _unequal(look, [(name, *one) for one in values]):
            what = f"{name}: {_shown(group, key)}"
            action = ["give", name, group, key, now, value]
            steps.append(_step(what, _plain(group, now), value, action))
    return steps


def _turn(step: dict[str, Any], will_be: Callable[[str], str | None]) -> tuple[int, int]:
    """To sort by. What names a qube comes late: that may be made, or given what it needs for it, in
    the same run; and only when nobody names it any more can that be taken from it. Each network
    comes after those that it will go through: by then they end, and qubesd refuses every step that
    closes a loop, be it for a moment. Disposables are preloaded when all else is set.
    """
    if _sets_preloads(step):
        return 4, 0
    depth = len(_way(step["do"][1], will_be)) if _sets_netvm(step) else 0
    if (enables := _enables(step)) is not None:
        return 0 if enables else 3, 0
    return 2 if _names_a_qube(step) else 1, depth


def _setting(step: dict[str, Any]) -> tuple[Any, ...]:
    """What a step sets: qube, group, key, value; each None of a step that sets nothing."""
    action, *about = step["do"]
    return (*about[:3], about[-1]) if action in SETTING else (None,) * 4


def _enables(step: dict[str, Any]) -> bool | None:
    """Whether a step gives a qube what others need to name it, or takes it; None of any other."""
    _name, group, key, value = _setting(step)
    if group != "property" or key not in ENABLING:
        return None
    return (value["value"] if isinstance(value, dict) else value) == "True"


def _names_a_qube(step: dict[str, Any]) -> bool:
    return _setting(step)[2] in QUBE_VALUED


def _sets_netvm(step: dict[str, Any]) -> bool:
    return _setting(step)[1:3] == ("property", "netvm")


def _sets_preloads(step: dict[str, Any]) -> bool:
    return _setting(step)[1:3] == ("feature", PRELOADS)


def _around_preloaded(look: _Look, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With a first step that takes disposables away which were made before what they keep of their
    template changes, and a last one that has them started again.
    """
    gone = {step["do"][1] for step in steps if step["do"][0] == "remove"}
    counts: dict[str, str] = {}
    for step in steps:
        changed, group, _key, _value = _setting(step)
        keeps = group in KEPT_BY_PRELOADED
        # no disposable is made of dom0, and some end meanwhile
        template = keeps and look.qubes.get(changed, {"class": "AdminVM"})["class"] != "AdminVM"
        if not template or _sets_preloads(step):
            continue
        holder = look.preload_holder(changed)
        count = look.features(holder).get(PRELOADS, "")
        if holder not in gone and count.strip("0"):
            counts[holder] = count
    first, last = [], []
    for name, count in counts.items():
        ours = look.settings.get(look.kind_of(name) or "", {}).get(name, {"features": {}})
        new = next((step for step in steps if _sets_preloads(step) and step["do"][1] == name), None)
        about = [name, "feature", PRELOADS]
        if PRELOADS in ours["features"]:
            # a run that is cut off between both leaves nothing that the next would not set
            off, on = ["set", *about, "0"], ["set", *about, count]
        elif new is not None:
            off, on = ["change", *about, count, "0"], []
        else:
            off, on = ["hold", name, count], ["release", name, count]
        first.append(_step(f"{name}: preloaded disposables", count, "0", off))
        if new is None:
            last.append(_step(f"{name}: preloaded disposables again", "0", count, on))
    return [*first, *steps, *last]


def _networks_above(look: _Look, ours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps of other qubes whose network those of ours will go through."""
    others = {step["do"][1]: step for step in _steps_of_others(look) if _sets_netvm(step)}
    found = {}
    for step in ours:
        action, *about = step["do"]
        if action == "make":
            name = about[1]
            # what is not ours it is given when it is made, and nobody's network goes through it yet
            if not look.kind_of(_netvm_will_be(look, name) or ""):
                continue
        elif _sets_netvm(step):
            name = about[0]
        else:
            continue
        way = _way(name, functools.partial(_netvm_will_be, look))
        found.update({above: others[above] for above in way if above in others})
    return list(found.values())


def _unequal(look: _Look, asked: list[tuple]) -> list[tuple]:
    """Of (qube or None, group, key, value) those that are not so, with what is there put in."""
    found = []
    for name, group, key, value in asked:
        now = _now(look, name, group, key)
        value = _as_told(group, key, value, now)
        if not _same(group, now, value):
            found.append((name, group, key, now, value))
    return found


def _as_told(group: str, key: str, value: Any, now: Any) -> Any:
    if group == "property" and now["value"] is not None:
        return _spelt(key, value, now["value"])
    return value


def _spelt(key: str, value: str, now: str) -> str:
    """A value as qubesd will give it back, told from what is there: yes is True, 0400 is 400
    (core-admin: qubes/__init__.py, property.bool; qubes/vm/mix/net.py, ip, ip6, _setter_mac;
    qubes/vm/qubesvm.py, _setter_virt_mode, _setter_denied_list).
    """
    if key in ("mac", "virt_mode"):
        return value.lower()
    if key in ("ip", "ip6"):
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(value))
    if key == "devices_denied":
        # each interface is of seven letters
        return "".join(sorted({value[at : at + 7] for at in range(0, len(value), 7)}))
    if now in BOOLS:
        return next((key for key, words in BOOLS.items() if value.lower() in words), value)
    whole = re.compile(r"\s*[+-]?\d+\s*", re.ASCII)
    return str(int(value)) if whole.fullmatch(value) and whole.fullmatch(now) else value


def _settings_steps(look: _Look) -> list[dict[str, Any]]:
    """Settings of other qubes and of the system, those that are no longer asked for too; last what
    ours are to provide no more.
    """
    early = {step["what"] for step in _qube_steps(look)}
    return [
        *(step for step in _steps_of_others(look) if step["what"] not in early),
        *(step for step in _steps_of_ours(look) if _enables(step) is False),
    ]


def _steps_of_others(look: _Look) -> list[dict[str, Any]]:
    """All but those that enable."""
    asked, back = _asked_of_others(look, False), _put_back(look, _kept(look))[0]
    will_be = functools.partial(_netvm_will_be, look)
    return sorted(asked + back, key=lambda step: _turn(step, will_be))


def _asked(look: _Look) -> list[tuple]:
    asked = [
        (name, *value)
        for name, entry in look.settings["settings"].items()
        for value in _values(look, "settings", name, entry)
    ]
    return asked + [
        (None, "property", key, pool) for key, pool in look.settings["default_pools"].items()
    ]


def _kept(look: _Look) -> set[tuple[str | None, str, str]]:
    """What the pillar asks for, also of qubes of ours: it is not put back."""
    ours = [
        (name, *value)
        for kind, name, entry in look.entries()
        for value in _values(look, kind, name, entry)
    ]
    return {(name, group, key) for name, group, key, _value in _asked(look) + ours}


def _asked_of_others(look: _Look, enabling: bool) -> list[dict[str, Any]]:
    """Settings without which a qube of ours can't name another, or all but those."""
    steps = []
    for name, group, key, now, value in _unequal(look, _asked(look)):
        if ((group, value) == ("property", "True") and key in ENABLING) != enabling:
            continue
        what = f"{name or 'system'}: {_shown(group, key)}"
        steps.append(
            _step(what, _plain(group, now), value, ["change", name, group, key, now, value])
        )
    return steps


def _forget(notes: list[tuple]) -> None:
    for note in notes:
        __salt__["ramboot_qubes_record.forget"](*note)


def _put_back_of(part: str) -> tuple[list[dict[str, Any]], list[str], list[tuple]]:
    if part != "settings" or not wanted():
        return [], [], []
    look = _Look(_settings())
    return _put_back(look, _kept(look))


def _put_back(
    look: _Look, kept: set[tuple[str | None, str, str]] | None
) -> tuple[list[dict[str, Any]], list[str], list[tuple]]:
    """Steps that undo recorded settings, what is left as it is, notes to drop without a step; all
    but what is kept, or in an undo (None) all but what is given to qubes of ours.
    """
    steps, left, forget = [], [], []
    # such as devices before the mode that they need
    for item in reversed(_notes(look, kept)):
        name, group, key = item["qube"], item["group"], item["key"]
        what = f"{name or 'system'}: {_shown(group, key)}"
        if (name, group, key) in (kept or ()):
            continue
        if not _is_there(look, item):
            forget.append((name, group, key))
            continue
        now = _now(look, name, group, key)
        if now == item["old"]:
            forget.append((name, group, key))
        elif not _as_set(now, item):
            left.append(f"{what} was changed to {_plain(group, now)!r} since and is left as it is")
            forget.append((name, group, key))
        elif why := _impossible(look, item, kept):
            left.append(
                f"{what} can't become {item['old']['value']} again, which {why}; it stays"
                f" {_plain(group, now)!r}"
            )
            forget.append((name, group, key))
        else:
            old, new = _plain(group, now), _plain(group, item["old"])
            steps.append(_step(what, old, new, ["put_back", name, group, key, item["old"]]))
    return steps, left, forget


def _notes(look: _Look, kept: set[tuple[str | None, str, str]] | None) -> list[dict[str, Any]]:
    """Of the record; of qubes of ours those that are in the pillar alone, and none in an undo: what
    stays of ours stays as it is.
    """
    return [
        item
        for item in look.record["settings"]
        if not item.get("given") or kept is not None and look.kind_of(item["qube"])
    ]


def _impossible(
    look: _Look, item: dict[str, Any], kept: set[tuple[str | None, str, str]] | None
) -> str | None:
    """Why what a setting was can't be set any more; None where it can, as far as that is known."""
    name, key, old = item["qube"], item["key"], item["old"]
    if item["group"] != "property" or old["default"] or not old["value"]:
        return None
    there: dict[str, Any] | list[str] = [old["value"]]
    if name is None:
        there = look.pools
    elif key == "label":
        there = look.labels()
    elif key in ("template", *QUBE_VALUED):
        there = look.qubes
    if old["value"] not in there:
        return "is no more"
    needed = NEEDS.get(key)
    if needed and old["value"] != name and not _will_have(look, old["value"], needed, kept):
        return f"has no {needed}"
    return None


def _will_have(
    look: _Look, name: str, key: str, kept: set[tuple[str | None, str, str]] | None
) -> bool:
    """Whether a property of a qube that is there is true once what is not kept is put back."""
    if (name, "property", key) in (kept or ()):
        return _will_be(look, name, key)
    if key not in look.property_names(name):
        return False
    now = look.value(name, key)
    item = _comes_back(look, name, key, now, kept)
    return (item["old"] if item else now)["value"] == "True"


def _comes_back(
    look: _Look, name: str, key: str, now: Any, kept: set[tuple[str | None, str, str]] | None
) -> dict[str, Any] | None:
    """The note of a property of a qube that is as we set it: it is put back if it can be."""
    about = (name, "property", key)
    notes = (i for i in _notes(look, kept) if (i["qube"], i["group"], i["key"]) == about)
    return next((i for i in notes if _is_there(look, i) and _as_set(now, i)), None)


def _is_there(look: _Look, item: dict[str, Any]) -> bool:
    """Whether what a note is about is there, and not another qube of that name since."""
    name = item["qube"]
    return name is None or name in look.qubes and item.get("uuid") in (None, look.uuid(name))


def _as_set(now: Any, item: dict[str, Any]) -> bool:
    """Whether a setting is as we set it, or were to before; `item` of the record."""
    return any(_same(item["group"], now, one) for one in (item["new"], *item.get("was", [])))


def _undo(look: _Look) -> dict[str, Any]:
    steps, left, forget = _put_back(look, None)
    steps = _undo_order(look, steps, left)
    found: list[str] = []
    gone: set[str] = set()
    for name in sorted(look.qubes):
        standing = ""
        with look.unless_gone(name):
            standing = look.standing(name)
        if (
            standing == "half"
            and not look.in_the_way(name)
            or standing == "whole"
            and (name in look.settings["remove_data"] or not look.used_since(name))
        ):
            gone.add(name)
        elif standing == "whole":
            left.append(
                f"{name} was used since it was made and may hold data: it is left as it is; add it"
                " to remove_data, or delete it yourself"
            )
        elif standing == "half":
            left.append(
                f"{name} is half-made, was used since and may hold data: it is left as it is; add"
                " it to remove_data, or delete it yourself"
            )
    # whoever stays keeps what it needs, and so on
    users = {name: _users(look, name, steps) for name in gone}
    for using in users.values():
        # a question for another one's may have told that it ended
        for other in using.keys() - {"", *look.qubes}:
            del using[other]
    while blocked := sorted(name for name in gone if users[name].keys() - gone):
        for name in blocked:
            stays = [told for other, told in users[name].items() if other not in gone]
            left.append(f"{name} is in use by {', '.join(stays)} and is left as it is")
        gone -= set(blocked)
    for name in sorted(look.qubes):
        # what is no more copied anew has to be updated itself
        held: dict[str, str] = {}
        with look.unless_gone(name):
            held = look.features(name) if look.standing(name) == "whole" else {}
        held = {} if name in gone else held
        if held.get(PROHIBIT, "").startswith("ramboot: "):
            steps += [
                _step(
                    f"{name}: feature {key}", held[key], None, ["set", name, "feature", key, None]
                )
                for key in ("skip-update", PROHIBIT)
                if key in held
            ]
    late = []
    for step in [*steps]:
        if needing := _needed_by(look, step, steps):
            steps.remove(step)
            if stays := [told for other, told in needing.items() if other not in gone]:
                left.append(f"{step['what']} is needed by {', '.join(stays)} and is left as it is")
            else:
                late.append(step)
    # each question above may have found that one ended
    gone &= set(look.qubes)
    found += [
        f"{name} is running: halt it, then undo again"
        for name in sorted(gone)
        if look.qubes[name]["running"]
    ]
    for step in steps:
        found += _halt_faults(look, step)
    todo = sorted(gone)
    while todo:
        # what nobody left in the list needs; in a circle qubesd decides
        name = next((name for name in todo if not users[name].keys() & set(todo)), todo[0])
        todo.remove(name)
        old = "half-made" if look.standing(name) == "half" else "present"
        steps.append(_step(name, old, None, ["remove", name]))
    steps += late
    for name in look.record["pools"]:
        named = [
            key
            for key in look.property_names(None)
            if key.startswith("default_pool")
            and look.value(None, key) == {"value": name, "default": False}
            and f"system: {_shown('property', key)}" not in {step["what"] for step in steps}
        ]
        inside = []
        for key in sorted(look.qubes):
            if key in gone or any(key in look.preloaded(base) for base in gone):
                continue
            with look.unless_gone(key):
                if any(info["pool"] == name for info in look.volumes(key).values()):
                    inside.append(key)
        if name not in look.pools:
            steps.append(_step(f"pool {name}", "recorded", None, ["remove_pool", name]))
        elif inside or named:
            left.append(
                f"pool {name} is in use by {', '.join([*inside, *named])} and is left as it is"
            )
        else:
            steps.append(_step(f"pool {name}", "present", None, ["remove_pool", name]))
    # notes of qubes that somebody else deleted, or made
    for name in look.record["made"]:
        if name in look.qubes and look.standing(name) == "foreign":
            left.append(f"{name} has no mark of ramboot, may be yours, and is left as it is")
        if look.standing(name) in ("absent", "foreign"):
            steps.append(_step(f"record of {name}", "present", None, ["forget_made", name]))
    steps = _around_preloaded(look, steps)
    return {"faults": found, "steps": steps, "left": left, "forget": forget}


def _undo_order(look: _Look, steps: list[dict[str, Any]], left: list[str]) -> list[dict[str, Any]]:
    """As `_steps_of_others`; without those that would close a loop with what others set since,
    which go to `left`.
    """
    while True:
        ends = {
            step["do"][1]: _end_netvm(look, step["do"][1], step["do"][-1])
            for step in steps
            if _sets_netvm(step)
        }

        def will_be(name: str, ends: dict[str, str] = ends) -> str | None:
            if name in ends or name not in look.qubes:
                return ends.get(name)
            return _netvm_now(look, name)["value"]

        round_ = next((step for step in steps if _step_loop(step, will_be)), None)
        if round_ is None:
            break
        steps.remove(round_)
        left.append(
            f"{round_['what']} is left as it is: with {round_['new']} the network would go round:"
            f" {_step_loop(round_, will_be)}"
        )
    return sorted(steps, key=lambda step: _turn(step, will_be))


def _users(
    look: _Look, name: str, steps: list[dict[str, Any]], keys: tuple[str, ...] = ()
) -> dict[str, str]:
    """Who makes qubesd refuse to delete it, and how (core-admin: qubes/app.py,
    on_domain_pre_deleted); "" stands for the system. A step of the same undo that sets the property
    to something else counts as done. With `keys`, by these properties alone.
    """
    changed = {step["what"] for step in steps}
    found: dict[str, str] = {}
    for other in [*look.qubes]:
        if other == name:
            continue
        with look.unless_gone(other):
            if how := _use(look, name, other, changed, keys):
                found[other] = how
    for key in [key for key in look.property_names(None) if not keys or key in keys]:
        pool = key.startswith("default_pool")
        if not pool and look.value(None, key)["value"] == name and f"system: {key}" not in changed:
            found[""] = f"the system ({key})"
    return found


def _use(
    look: _Look, name: str, other: str, changed: set[str], keys: tuple[str, ...]
) -> str | None:
    """Of `_users` one, as it is told; None where it does not use it."""
    qube, how = look.qubes[other], None
    # it goes with its template
    preloaded = OF_PRELOADED if other in look.preloaded(name) else set()
    if qube["template"] == name and f"{other}: template" not in changed and not preloaded:
        return other
    named = {*(keys or QUBE_VALUED)} - {"template"} - preloaded
    for key in named & set(look.property_names(other)):
        value = look.value(other, key)
        if value["value"] == name and not value["default"] and f"{other}: {key}" not in changed:
            how = f"{other} ({key})"
    # core-admin: qubes/vm/__init__.py, get_provided_assignments
    if not keys and qube["class"] != "RemoteVM" and name in look.backends(other):
        how = f"{other} (a device)"
    return how


def _step(what: str, old: Any, new: Any, do: list[Any]) -> dict[str, Any]:
    return {"what": what, "old": old, "new": new, "do": do}


# Settings: (group, key, value)


def _values(look: _Look, kind: str, name: str, entry: dict[str, Any]) -> list[tuple]:
    """What the pillar wants of a qube, with what its kind needs; values as qubesd spells them."""
    found: list[tuple[str, str, Any]] = []
    starts = kind in ("disposable_templates", "low_ram")
    if starts:
        found.append(("property", "template_for_dispvms", "True"))
    if "default_dispvm" in entry and "default_dispvm" not in entry["properties"]:
        dispvm = entry["default_dispvm"]
        dispvm = _dispvm_words(look, kind, name).get(dispvm, dispvm)
        found.append(("property", "default_dispvm", dispvm))
    if starts and "appmenus-dispvm" not in entry["features"]:
        # its own place in the menu: entries that start disposables
        # (QubesOS/qubes-desktop-linux-common: qubesappmenus)
        found.append(("feature", "appmenus-dispvm", "1"))
    if kind == "low_ram":
        found.append(("volume", "root rw", False))
        if entry["volatile"] == "ephemeral":
            found.append(("volume", "volatile ephemeral", True))
    if kind == "templates":
        # An update of the copy would be undone by the next copy, in a RAM session by its end. The
        # updater leaves it out (QubesOS/qubes-core-admin-linux: vmupdate/vmupdate.py), and qubesd
        # starts no template with the other, but what is based on it (core-admin:
        # qubes/vm/qubesvm.py, start). R4.2 knows neither.
        kept = {"skip-update": "1", PROHIBIT: REASON.format(source=entry["source"])}
        found += [
            ("feature", key, value) for key, value in kept.items() if key not in entry["features"]
        ]
    if kind == "save":
        found.append(("property", "netvm", ""))
    if kind not in (*CLONES, "disposables") and entry.get("template"):
        found.append(("property", "template", entry["template"]))
    if entry["label"] is not None:
        found.append(("property", "label", entry["label"]))
    found += [("property", key, _text(value)) for key, value in entry["properties"].items()]
    found += [("feature", key, _feature(value)) for key, value in entry["features"].items()]
    found += [
        ("feature", f"service.{key}", "1" if value else "")
        for key, value in entry["services"].items()
    ]
    found += [("tag", key, True) for key in entry["tags"]]
    found += [
        ("pci", port, dict.fromkeys(options, "True"))
        for port, options in entry.get("pci", {}).items()
    ]
    if entry["firewall"] is not None:
        found.append(("firewall", "rules", entry["firewall"]))
    return found


def _dispvm_words(look: _Look, kind: str, name: str) -> dict[str, str]:
    """What a word stands for under `default_dispvm` of a kind."""
    if kind in ("disposable_templates", "low_ram"):
        return {"self": name, "none": ""}
    # the default of Qubes is on the disk: rather none than that
    ours = [*look.settings["disposable_templates"]]
    return {"auto": ours[0] if len(ours) == 1 else "", "none": ""}


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _feature(value: Any) -> str | None:
    """Qubes writes an enabled feature as 1 and a disabled one as nothing (client: features.py)."""
    if isinstance(value, bool):
        return "1" if value else ""
    return None if value is None else str(value)


def _shown(group: str, key: str) -> str:
    return key if group in ("property", "volume") else f"{group} {key}"


def _now(look: _Look, name: str | None, group: str, key: str) -> Any:
    """The value as it is, with all that is needed to put it back."""
    if group == "property":
        return look.value(name, key)
    assert name is not None
    if group == "feature":
        return look.features(name).get(key)
    if group == "tag":
        return key in look.tags(name)
    if group == "volume":
        volume, option = key.split(" ")
        return look.volumes(name)[volume][option]
    if group == "firewall":
        return look.firewall(name)
    return look.devices(name).get(key)


def _same(group: str, now: Any, value: Any) -> bool:
    return now["value"] == value if group == "property" else now == value


def _plain(group: str, now: Any) -> Any:
    if group == "property" and isinstance(now, dict):
        return "default" if now["default"] else now["value"]
    return now


# What steps do


def _do(step: dict[str, Any]) -> list[str]:
    action, *arguments = step["do"]
    return globals()[f"_do_{action}"](*arguments) or []


def _do_add_pool(name: str, entry: dict[str, Any]) -> None:
    # what the pool makes of it (core-admin: qubes/storage/file.py and reflink.py, setup)
    folders = [entry["dir_path"], *__salt__["ramboot_qubes_pools.folders_of"](entry)]
    made = [folder for folder in folders if not os.path.lexists(folder)]
    __salt__["ramboot_qubes_record.pool"](name, True, made)
    try:
        __salt__["ramboot_qubesadmin.add_pool"](
            name, entry["driver"], {"dir_path": entry["dir_path"]}
        )
    except CommandExecutionError:
        if name not in __salt__["ramboot_qubesadmin.pools"]():
            __salt__["ramboot_qubes_record.pool"](name, False)
        raise


def _do_remove_pool(name: str) -> None:
    if name in __salt__["ramboot_qubesadmin.pools"]():
        __salt__["ramboot_qubesadmin.remove_pool"](name)
    _remove_empty(__salt__["ramboot_qubes_record.read"]()["folders"].get(name, []))
    __salt__["ramboot_qubes_record.pool"](name, False)


def _remove_empty(folders: list[str]) -> None:
    """What is below others comes last in the list; what somebody uses stays."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def _remove(name: str) -> None:
    """With the directory of its name, which the driver file leaves (core-admin:
    qubes/storage/file.py, remove).
    """
    pools = __salt__["ramboot_qubesadmin.pools"]()
    files = [
        __salt__["ramboot_qubes_pools.file_of"](pools.get(volume["pool"]), volume)
        for volume in __salt__["ramboot_qubesadmin.volumes"](name).values()
    ]
    __salt__["ramboot_qubesadmin.remove"](name)
    _remove_empty([os.path.dirname(file) for file in files if file])


def _do_remove(name: str) -> None:
    _remove(name)
    if name in __salt__["ramboot_qubesadmin.qubes"]():
        raise CommandExecutionError(f"{name} was deleted without an error and is still there")
    __salt__["ramboot_qubes_record.made"](name, None)


def _do_forget_made(name: str) -> None:
    __salt__["ramboot_qubes_record.made"](name, None)


def _do_set(name: str | None, group: str, key: str, value: Any) -> None:
    """`value` as in `_values`, or as `_now` gave it."""
    if group == "property":
        if isinstance(value, dict) and value["default"]:
            __salt__["ramboot_qubesadmin.reset_property"](name, key)
        else:
            value = value["value"] or "" if isinstance(value, dict) else value
            _set_property(name, key, value)
    elif group == "feature":
        __salt__["ramboot_qubesadmin.set_feature"](name, key, value)
    elif group == "tag":
        __salt__["ramboot_qubesadmin.set_tag"](name, key, value)
    elif group == "volume":
        __salt__["ramboot_qubesadmin.set_volume"](name, *key.split(" "), value)
    elif group == "firewall":
        __salt__["ramboot_qubesadmin.set_firewall"](name, value)
    else:
        __salt__["ramboot_qubesadmin.set_device"](name, key, value)


def _set_property(name: str | None, key: str, value: str) -> None:
    if name is None or key != "template":
        __salt__["ramboot_qubesadmin.set_property"](name, key, value)
        return
    # a new template makes the root writable (core-admin: qubes/vm/appvm.py,
    # template_changed_update_storage)
    before = __salt__["ramboot_qubesadmin.volumes"](name)["root"]["rw"]
    __salt__["ramboot_qubesadmin.set_property"](name, key, value)
    if __salt__["ramboot_qubesadmin.volumes"](name)["root"]["rw"] != before:
        __salt__["ramboot_qubesadmin.set_volume"](name, "root", "rw", before)


def _do_give(name: str, group: str, key: str, now: Any, value: Any) -> None:
    """To a qube of ours; what it has without is noted, whatever somebody sets meanwhile."""
    _note_and_set(name, group, key, now, value, _uuid(name), True)


def _do_change(name: str | None, group: str, key: str, now: Any, value: Any) -> None:
    uuid = _uuid(name) if name is not None else None
    noted = _noted(name, group, key)
    if noted and not (noted.get("uuid") in (None, uuid) and _as_set(now, noted)):
        # of an earlier qube of that name, or the value is somebody else's since
        __salt__["ramboot_qubes_record.forget"](name, group, key)
    _note_and_set(name, group, key, now, value, uuid)


def _uuid(name: str) -> str | None:
    return __salt__["ramboot_qubesadmin.properties"](name, ["uuid"])["uuid"]["value"]


def _note_and_set(
    name: str | None,
    group: str,
    key: str,
    now: Any,
    value: Any,
    uuid: str | None,
    given: bool = False,
) -> None:
    __salt__["ramboot_qubes_record.changed"](name, group, key, now, value, uuid, given)
    _do_set(name, group, key, value)
    __salt__["ramboot_qubes_record.done"](name, group, key)


def _do_hold(name: str, count: str) -> None:
    """Preload none for now; the record has what to put back after a run that is cut off."""
    _do_change(name, "feature", PRELOADS, count, "0")


def _do_release(name: str, count: str) -> None:
    _do_change(name, "feature", PRELOADS, "0", count)
    noted = _noted(name, "feature", PRELOADS)
    if noted and noted["old"] == count:
        __salt__["ramboot_qubes_record.forget"](name, "feature", PRELOADS)


def _noted(name: str | None, group: str, key: str) -> dict[str, Any] | None:
    settings = __salt__["ramboot_qubes_record.read"]()["settings"]
    about = (name, group, key)
    return next((i for i in settings if (i["qube"], i["group"], i["key"]) == about), None)


def _do_put_back(name: str | None, group: str, key: str, old: Any) -> None:
    _do_set(name, group, key, old)
    __salt__["ramboot_qubes_record.forget"](name, group, key)


def _do_make(
    kind: str, name: str, entry: dict[str, Any], values: list[tuple], pool: str
) -> list[str]:
    """From nothing, or from a half-made one, to whole; or nothing again."""
    look = _Look(_settings())
    standing = look.standing(name)
    if standing == "half" and look.in_the_way(name):
        raise CommandExecutionError(f"{name} is half-made and was used meanwhile; left as it is")
    if standing == "half":
        _do_remove(name)
    elif standing != "absent":
        # somebody was faster than the copies before it
        raise CommandExecutionError(f"a qube {name} was made meanwhile; it was not touched")
    try:
        _make_empty(kind, name, entry, pool)
        if kind in CLONES:
            _fill(kind, name, entry["source"])
        look = _Look(_settings())
        for group, key, value in values:
            # the template is given at creation, and another qube of ours is named last of all
            later = key in QUBE_VALUED and value != name and look.kind_of(value)
            # preloaded are disposables of what is whole
            later = later or (group, key) == ("feature", PRELOADS)
            if (group, key) != ("property", "template") and not later:
                now = _now(look, name, group, key)
                _do_give(name, group, key, now, _as_told(group, key, value, now))
        look = _Look(_settings())
        for volume, wanted_pool in _pools_wanted(look, kind, entry).items():
            real = look.volumes(name)[volume]["pool"]
            if real != wanted_pool:
                raise CommandExecutionError(
                    f"the {volume} volume of {name} was made in pool {real}, not in {wanted_pool}"
                )
        source = entry["source"] if kind in CLONES else None
        told = __salt__["ramboot_qubesadmin.update_menu"](name, source)
        # in this order: what is cut off between the two is half-made, and made anew; with the mark
        # alone it would count as used for ever
        __salt__["ramboot_qubes_record.made"](name, kind, True, look.states(name))
        __salt__["ramboot_qubesadmin.set_feature"](name, MADE, f"whole {kind} {name}")
    except CommandExecutionError as error:
        raise CommandExecutionError(f"{error}; {_unmake(name)}") from error
    return [told] if told else []


def _unmake(name: str) -> str:
    """After a failure: a half-made qube takes room and helps nobody."""
    try:
        if name in __salt__["ramboot_qubesadmin.qubes"]():
            look = _Look(_settings())
            if look.standing(name) == "foreign":
                __salt__["ramboot_qubes_record.made"](name, None)
                return f"{name} itself is not marked as ours and was not touched"
            if look.in_the_way(name):
                return f"{name} is half-made, was used meanwhile and is left as it is"
            _remove(name)
        __salt__["ramboot_qubes_record.made"](name, None)
    except CommandExecutionError as error:
        return f"{name} is half-made and will be made anew ({error})"
    return f"nothing of {name} was kept"


def _make_empty(kind: str, name: str, entry: dict[str, Any], pool: str) -> None:
    look = _Look(_settings())
    base = entry["source"] if kind in CLONES else entry["template"]
    # its own comes with the other values, so that this is noted
    label = look.qubes[base]["label"]
    where: dict[str, Any] = {"pool": pool}
    if kind in ("save", "low_ram"):
        where = {"pools": _pools_wanted(look, kind, entry)}
    elif kind == "disposables":
        # all volumes follow the disposable template
        where = {}
    template = None if kind in CLONES else base
    intent = {"class": KINDS[kind], "label": label, "template": template}
    intent["pools"] = _pools_wanted(look, kind, entry)
    __salt__["ramboot_qubes_record.made"](name, kind, intent=intent)
    try:
        __salt__["ramboot_qubesadmin.create"](name, KINDS[kind], label, template, **where)
    except CommandExecutionError as error:
        if not getattr(error, "unanswered", False):
            # what is there by now is somebody else's
            __salt__["ramboot_qubes_record.made"](name, None)
        raise
    __salt__["ramboot_qubesadmin.set_feature"](name, MADE, f"begun {kind} {name}")
    __salt__["ramboot_qubes_record.made"](name, kind)
    for volume, info in __salt__["ramboot_qubesadmin.volumes"](name).items():
        # what an older revision holds would be RAM for nothing
        if info["pool"] == pool and info["save_on_stop"] and info["revisions_to_keep"] > 0:
            __salt__["ramboot_qubesadmin.set_volume"](name, volume, "revisions_to_keep", 0)


def _fill(kind: str, name: str, source: str) -> None:
    """Settings and volumes of the source; it must not change meanwhile."""
    before = _Look(_settings()).states(source)
    __salt__["ramboot_qubesadmin.clone_settings"](source, name)
    copied: dict[str, str | None] = {}
    for volume in OWN["TemplateVM"]:
        # what a copy that is cut off leaves is nobody's data
        copied[volume] = None
        __salt__["ramboot_qubes_record.made"](name, kind, volumes=copied)
        __salt__["ramboot_qubesadmin.clone_volume"](source, name, volume)
        copied[volume] = _Look(_settings()).state(name, volume)
        __salt__["ramboot_qubes_record.made"](name, kind, volumes=copied)
    _check_copy(name, source, before)
    __salt__["ramboot_qubesadmin.set_feature"](name, SOURCE, before["root"])


def _check_copy(name: str, source: str, before: dict[str, str]) -> None:
    look = _Look(_settings())
    if look.qubes[source]["running"] or look.states(source) != before:
        raise CommandExecutionError(f"{source} was started while it was being copied to {name}")
    mine, theirs = look.volumes(name)["root"], look.volumes(source)["root"]
    if mine["size"] != theirs["size"] or (theirs["usage"] and not mine["usage"]):
        raise CommandExecutionError(f"the root of {name} did not become that of {source}")


def _do_refresh(name: str, source: str) -> list[str]:
    """Copy the root again; private volumes, of the clone and of what is based on it, stay."""
    look = _Look(_settings())
    if look.running_on(name):
        raise CommandExecutionError(
            f"{name} can't be copied anew while {look.told_running_on(name)} is running; halt that"
            " first"
        )
    before = look.states(source)
    # without it the copy counts as unfinished
    __salt__["ramboot_qubesadmin.set_feature"](name, SOURCE, None)
    __salt__["ramboot_qubesadmin.clone_volume"](source, name, "root")
    _check_copy(name, source, before)
    theirs = look.features(source)
    for key in {*theirs, *look.features(name)}:
        if key in OF_THE_ROOT or key.startswith(OF_THE_ROOT_TOO):
            __salt__["ramboot_qubesadmin.set_feature"](name, key, theirs.get(key))
    # in this order: what is cut off between the two is copied once more
    __salt__["ramboot_qubes_record.made"](name, "templates", True, _Look(_settings()).states(name))
    __salt__["ramboot_qubesadmin.set_feature"](name, SOURCE, before["root"])
    told = __salt__["ramboot_qubesadmin.update_menu"](name, source)
    return [told] if told else []
