# SPDX-License-Identifier: GPL-2.0-or-later
"""The pillar `ramboot`, checked once and handed on as plain values.

What is allowed stands in `ramboot/defaults.yaml`; this module only knows how to check. Values end
up in files that a shell reads at boot, so whatever is not plainly allowed is refused.
"""

# No `from __future__ import annotations`: dataclass would look the module up in sys.modules, where
# Salt's loader does not put it before it has run.
import copy
import dataclasses
import difflib
import fnmatch
import ipaddress
import os
import re
from collections.abc import Iterable
from typing import Any

import yaml
from salt.exceptions import CommandExecutionError, SaltInvocationError

# Salt's loader sets these
__salt__: dict[str, Any]
__context__: dict[str, Any]
__pillar__: dict[str, Any]

# libyaml's where it is built in, which is much faster
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

DEFAULTS = "salt://ramboot/defaults.yaml"

# No quotes, backslash, dollar, blanks or line ends: what is left is safe in a key=value line.
_GLOB = re.compile(r"/[A-Za-z0-9/._+@:,=~%^!*?\[\]-]+")
# What qubesd takes (core-admin: qubes/vm/__init__.py, validate_name; qubes/api/admin.py, pool_add,
# vm_feature_set; qubes/tags.py); pools and labels get the same rule.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,30}")
_NEW_NAME = re.compile(r"(?!(?:dom0|Domain-0|none|default)$)(?!.*-dm$)[A-Za-z][A-Za-z0-9_.-]{0,30}")
_KEY = {"properties": re.compile(r"[a-z][a-z0-9_]*"), "features": re.compile(r"[A-Za-z0-9_.-]+")}
_VALUE = re.compile(r"[\x20-\x7e]{0,1024}")
_TAG = re.compile(r"[A-Za-z0-9_-]+")
_SERVICE = re.compile(r"[A-Za-z0-9_.-]+")
_PORT = re.compile(r"[0-9a-f]{2}_[0-9a-f]{2}\.[0-7](-[0-9a-f]{2}_[0-9a-f]{2}\.[0-7])*")
_PATH = re.compile(r"(/[A-Za-z0-9._+@:,=-]+)+")
# core-admin: qubes/firewall.py, DstHost and Comment
_HOST = re.compile(r"[a-z0-9._-]{1,253}")
_COMMENT = re.compile(r"[A-Za-z0-9:;,./\[\]_ -]{1,255}")
# Below ramboot:qubes: a name stands for one qube.
_MADE = (
    "templates", "disposable_templates", "app_qubes", "standalones", "disposables", "low_ram",
    "save", "settings",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Boot:
    """What happens at boot; timeout in seconds, 0 waits for ever."""

    mode: str
    backend: str
    default: str
    timeout_s: int
    disk: str


@dataclasses.dataclass(frozen=True)
class Zram:
    """The compressed RAM root; size in MiB or `auto`."""

    algorithm: str
    size_mib: int | str


@dataclasses.dataclass(frozen=True)
class Tmpfs:
    """The tmpfs root; size in MiB or `auto`."""

    size_mib: int | str


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The store that the whole machine writes into; size in MiB or `auto`."""

    store_mib: int | str


@dataclasses.dataclass(frozen=True)
class Image:
    """The prebuilt image: what a boot does with a stale one, when it is built anew, and how."""

    stale: str
    rebuild: str
    level: int
    block_kib: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """RAM in MiB that stays free of the root: for dom0 itself, and for what the session writes."""

    reserve_mib: int
    headroom_mib: int


@dataclasses.dataclass(frozen=True)
class Copy:
    """What stays behind on the disk, and the seconds that a copy may take."""

    exclude: tuple[str, ...]
    timeout_s: int


@dataclasses.dataclass(frozen=True)
class Grub:
    """Menu entries, and dom0's maximum in MiB (or `keep`)."""

    entries: tuple[str, ...]
    dom0_mem_max_mib: int | str
    dom0_mem_scope: str


@dataclasses.dataclass(frozen=True)
class Qubes:
    """Qubes to make and to set up: by kind, then by name; each with every key that it can have.

    The mappings are plain; ramboot_qubes reads them and changes none.
    """

    pool: str
    templates: dict[str, dict[str, Any]]
    disposable_templates: dict[str, dict[str, Any]]
    app_qubes: dict[str, dict[str, Any]]
    standalones: dict[str, dict[str, Any]]
    disposables: dict[str, dict[str, Any]]
    low_ram: dict[str, dict[str, Any]]
    save: dict[str, dict[str, Any]]
    settings: dict[str, dict[str, Any]]
    file_pools: dict[str, dict[str, Any]]
    default_pools: dict[str, str]
    aliases: str
    remove_data: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The whole pillar. Whoever holds one need not check again."""

    boot: Boot
    zram: Zram
    tmpfs: Tmpfs
    snapshot: Snapshot
    image: Image
    memory: Memory
    copy: Copy
    grub: Grub
    swap: str
    qubes: Qubes


_SECTIONS = {
    "boot": Boot,
    "zram": Zram,
    "tmpfs": Tmpfs,
    "snapshot": Snapshot,
    "image": Image,
    "memory": Memory,
    "copy": Copy,
    "grub": Grub,
    "qubes": Qubes,
}


def defaults() -> dict[str, Any]:
    """Return the whole of `ramboot/defaults.yaml`: `ramboot`, `allowed`, `paths` and the rest.

    Raises CommandExecutionError when the formula's files are not in env `base`.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_config.defaults
    """
    return copy.deepcopy(_defaults())


def paths() -> dict[str, Any]:
    """Return `paths` of `ramboot/defaults.yaml`.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_config.paths
    """
    return copy.deepcopy(_defaults()["paths"])


def command(names: Iterable[str]) -> str | None:
    """Return where a program is, whatever PATH Salt was started with; None where it is not.

    names
        those that it may have, the better one first.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_config.command '[grub2-mkconfig, grub-mkconfig]'
    """
    folders = _defaults()["paths"]["commands"]
    places = (os.path.join(folder, name) for name in names for folder in folders)
    return next((path for path in places if os.access(path, os.X_OK)), None)


def faults(pillar: dict[str, Any] | None = None) -> list[str]:
    """Return everything that is wrong with the pillar, a sentence each; empty when it is good.

    pillar
        The value of the key `ramboot`. Default: the minion's.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_config.faults
    """
    return _parse(pillar)[1]


def load(pillar: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the settings: the pillar over the defaults, every key present, every value checked.

    Words are str, sizes and times int (or the word that stands for one), lists are lists of str.
    Raises SaltInvocationError with all faults when there is one.

    pillar
        The value of the key `ramboot`. Default: the minion's.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_config.load
    """
    settings, found = _parse(pillar)
    if settings is None:
        raise SaltInvocationError("\n".join(found))
    plain = dataclasses.asdict(settings)
    plain["copy"]["exclude"] = list(settings.copy.exclude)
    plain["grub"]["entries"] = list(settings.grub.entries)
    plain["qubes"]["remove_data"] = list(settings.qubes.remove_data)
    return plain


def backends(settings: dict[str, Any] | None = None) -> list[str]:
    """Return the backends that the pillar names: as mode, at the prompt, or in the menu.

    settings
        as `load` returns them. Default: the minion's, with the errors of `load`.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_config.backends
    """
    settings = settings or load()
    boot = settings["boot"]
    named = _naming(boot["mode"], boot["backend"], settings["grub"]["entries"])
    return sorted({backend for _where, backend in named})


def _defaults() -> dict[str, Any]:
    """Parsed once a run, and not to be changed."""
    if DEFAULTS not in __context__:
        # The file server, not __file__: synced modules live in Salt's cache, away from the formula.
        cached = __salt__["cp.cache_file"](DEFAULTS, saltenv="base")
        if not cached:
            raise CommandExecutionError(f"{DEFAULTS} is not in file_roots of env base")
        with open(cached, encoding="utf-8") as handle:
            __context__[DEFAULTS] = yaml.load(handle, Loader=_YAML)
    return __context__[DEFAULTS]


def _parse(pillar: Any) -> tuple[Settings | None, list[str]]:
    """Check each key on its own, so that one run tells all."""
    known = _defaults()
    if pillar is None:
        pillar = __pillar__.get("ramboot")
    found: list[str] = []
    given = _mapping("ramboot", pillar, known["allowed"], found)
    values: dict[str, Any] = {}
    for section, allowed in known["allowed"].items():
        where = f"ramboot:{section}"
        if section not in _SECTIONS:
            value = given.get(section, known["ramboot"][section])
            values[section] = _check(where, value, allowed, known, found)
            continue
        inside = _mapping(where, given.get(section), allowed, found)
        checked = {
            key: _check(
                f"{where}:{key}",
                inside.get(key, known["ramboot"][section][key]),
                rule,
                known,
                found,
            )
            for key, rule in allowed.items()
        }
        values[section] = _SECTIONS[section](**checked)
    _once(values["qubes"], found)
    if not found:
        found += _contradictions(values["boot"], values["grub"], known["need_the_disk"])
    return (None if found else Settings(**values)), found


def _contradictions(boot: Boot, grub: Grub, need_the_disk: list[str]) -> list[str]:
    """Backends that can't run with the disk policy; each value on its own is allowed."""
    if boot.disk == "attached":
        return []
    return [
        f"{where}: '{backend}' needs the disk; with ramboot:boot:disk '{boot.disk}' allowed: zram,"
        " tmpfs or image"
        for where, backend in _naming(boot.mode, boot.backend, grub.entries)
        if backend in need_the_disk
    ]


def _naming(mode: str, backend: str, entries: Iterable[str]) -> list[tuple[str, str]]:
    """Each key of the pillar that names a backend, and which."""
    return [
        *([] if mode in ("ask", "off") else [("ramboot:boot:mode", mode)]),
        ("ramboot:boot:backend", backend),
        *(("ramboot:grub:entries", entry) for entry in entries),
    ]


def _mapping(where: str, given: Any, allowed: dict[str, Any], found: list[str]) -> dict[str, Any]:
    """The keys given at `where`; unknown ones are named with the nearest known one."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        found.append(
            f"{where}: {_show(given)} is not allowed; allowed: a mapping of {', '.join(allowed)}"
        )
        return {}
    for key in given:
        if key in allowed:
            continue
        near = difflib.get_close_matches(str(key), allowed, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        found.append(
            f"{where}:{_key_shown(key)} is not a known key; {hint}known: {', '.join(allowed)}"
        )
    return given


def _check(where: str, value: Any, rule: dict[str, Any], known: dict, found: list[str]) -> Any:
    """The value in its normal form; a sentence in `found` when it is not allowed."""
    kind = rule["kind"]
    if kind == "globs":
        return _globs(where, value, known["exclude"], found)
    if kind == "choices":
        return _choices(where, value, rule, found)
    if kind in _KINDS:
        return _KINDS[kind](where, value, rule, known, found)
    value = _word(value, rule.get("of", []))
    if kind == "choice":
        good, wanted = _is_one_of(value, rule["of"]), _one_of(rule["of"])
    else:
        good, wanted = _is_whole(value, rule), _whole(rule)
    if not good:
        found.append(f"{where}: {_show(value)} is not allowed; allowed: {wanted}")
    return value


def _word(value: Any, words: list[str]) -> Any:
    """Undo what YAML 1.1 makes of a bare off, no or yes where such a word is allowed."""
    if value is False:
        return next((word for word in ("off", "n") if word in words), value)
    if value is True:
        return next((word for word in ("y",) if word in words), value)
    return value


def _is_one_of(value: Any, words: list[str]) -> bool:
    return isinstance(value, str) and value in words


def _is_whole(value: Any, rule: dict[str, Any]) -> bool:
    if _is_one_of(value, rule.get("or", [])):
        return True
    # True is an int for Python, not for a reader of the pillar.
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return rule["min"] <= value <= rule["max"]


def _one_of(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _whole(rule: dict[str, Any]) -> str:
    number = f"a whole number of {rule['unit']} from {rule['min']} to {rule['max']}"
    return _one_of([*rule.get("or", []), number])


def _choices(where: str, value: Any, rule: dict[str, Any], found: list[str]) -> tuple[str, ...]:
    wanted = f"a list of any of {', '.join(rule['of'])}, each once"
    if not isinstance(value, list):
        found.append(f"{where}: {_show(value)} is not allowed; allowed: {wanted}")
        return ()
    for item in value:
        if not _is_one_of(item, rule["of"]):
            found.append(f"{where}: {_show(item)} is not allowed; allowed: {wanted}")
        elif value.count(item) > 1 and f"{where}: {_show(item)} is listed twice" not in found:
            found.append(f"{where}: {_show(item)} is listed twice")
    return tuple(item for item in value if isinstance(item, str))


def _globs(where: str, value: Any, rule: dict[str, Any], found: list[str]) -> tuple[str, ...]:
    if not isinstance(value, list):
        found.append(
            f"{where}: {_show(value)} is not allowed; allowed: a list of absolute patterns"
            " such as /var/tmp/*"
        )
        return ()
    if len(value) > rule["max_patterns"]:
        found.append(
            f"{where}: {len(value)} patterns are not allowed; allowed: {rule['max_patterns']}"
        )
    for item in value:
        wanted = _glob_fault(item, rule)
        if wanted:
            found.append(f"{where}: {_show(item)} is not allowed; {wanted}")
    return tuple(item for item in value if isinstance(item, str))


def _glob_fault(item: Any, rule: dict[str, Any]) -> str | None:
    """Why the pattern may not be used; None when it may."""
    if not isinstance(item, str) or len(item) > rule["max_length"] or not _GLOB.fullmatch(item):
        return (
            "allowed: an absolute path or pattern of at most"
            f" {rule['max_length']} letters, digits and / . _ + @ : , = ~ % ^ ! * ? [ ] -"
        )
    parts = item[1:].split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "allowed: a path without empty parts, '.' and '..'"
    if any(part.count("[") != part.count("]") for part in parts):
        return "allowed: a pattern whose brackets are closed"
    # the boot's shell reads them otherwise than fnmatch
    if re.search(r"\[[\^:.=]", item):
        return "allowed: a pattern without [^ [: [. and [="
    if re.search(r"[*?\[]", parts[0]):
        return "allowed: a pattern whose first directory is written out"
    for needed in rule["needed"]:
        if _meets(parts, needed[1:].split("/")):
            return f"a session does not start without {needed}"
    for partly in rule["partly"]:
        whole = partly[1:].split("/")
        if _meets(parts, whole) and len(parts) <= len(whole):
            return f"a session needs part of {partly}: name what is to stay behind"
        if _meets(parts, whole) and len(parts) == len(whole) + 1 and _is_any(parts[-1]):
            return f"a session needs part of {partly}: name what is to stay behind"
    return None


def _is_any(glob: str) -> bool:
    """Whether nothing in it is written out: it may match every name."""
    rest = re.sub(r"\[[^]]+\]", "", glob)
    return set(rest) <= {"*", "?"} and (rest == glob or "*" in rest)


def _meets(pattern: list[str], path: list[str]) -> bool:
    """Whether the pattern can match the path, something above it or something below it."""
    # zip: the shorter one decides, which is what "above" and "below" mean here
    return all(fnmatch.fnmatchcase(part, glob) for glob, part in zip(pattern, path, strict=False))


# Kinds of ramboot:qubes; each takes the place, the value, its rule, the defaults and the faults


def _name(where: str, value: Any, rule: dict, known: dict, found: list[str]) -> Any:
    if value is None and "default" in rule and rule["default"] is None:
        return None
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        found.append(
            f"{where}: {_show(value)} is not allowed; allowed: a name of at most 31 letters,"
            " digits and _ . - that begins with a letter"
        )
    return value


def _names(where: str, value: Any, rule: dict, known: dict, found: list[str]) -> tuple[str, ...]:
    if not isinstance(value, list):
        found.append(f"{where}: {_show(value)} is not allowed; allowed: a list of names, each once")
        return ()
    for item in value:
        if rule.get("of") != "tags":
            _name(where, item, {}, known, found)
        elif not isinstance(item, str) or not _TAG.fullmatch(item):
            found.append(
                f"{where}: {_show(item)} is not allowed; allowed: letters, digits, _ and -"
            )
    for item in sorted({item for item in value if isinstance(item, str)}):
        if value.count(item) > 1:
            found.append(f"{where}: {_show(item)} is listed twice")
    return tuple(item for item in value if isinstance(item, str))


def _path(where: str, value: Any, rule: dict, known: dict, found: list[str]) -> Any:
    good = isinstance(value, str) and len(value) <= 255 and _PATH.fullmatch(value)
    if not good or {".", ".."} & set(value.split("/")):
        found.append(
            f"{where}: {_show(value)} is not allowed; allowed: an absolute path of letters, digits"
            " and . _ + @ : , = - without '.', '..' and a slash at its end"
        )
    return value


def _flag(where: str, value: Any, rule: dict, known: dict, found: list[str]) -> Any:
    if not isinstance(value, bool):
        found.append(f"{where}: {_show(value)} is not allowed; allowed: true or false")
    return value


def _number(where: str, value: Any, rule: dict, known: dict, found: list[str]) -> Any:
    if not isinstance(value, int) or isinstance(value, bool) or value not in rule["of"]:
        wanted = f"{_one_of([str(number) for number in rule['of']])} {rule['unit']}"
        found.append(f"{where}: {_show(value)} is not allowed; allowed: {wanted}")
    return value


def _pairs(where: str, value: Any, wanted: str, found: list[str]) -> dict[Any, Any]:
    if not isinstance(value, dict):
        found.append(f"{where}: {_show(value)} is not allowed; allowed: {wanted}")
        return {}
    return value


def _entries(where: str, value: Any, rule: dict, known: dict, found: list[str]) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for name, given in _pairs(where, value, "a mapping of names", found).items():
        place = f"{where}:{_key_shown(name)}"
        # dom0 can be given settings, not be made
        pattern = _NAME if where.endswith(":settings") else _NEW_NAME
        if not isinstance(name, str) or not pattern.fullmatch(name):
            found.append(
                f"{where}: {_show(name)} is not allowed; allowed: a name of at most 31 letters,"
                " digits and _ . - that begins with a letter, but dom0, Domain-0, none, default"
                " and what ends with -dm"
            )
            continue
        inside = _mapping(place, given, rule["keys"], found)
        checked[name] = {}
        for key, inner in rule["keys"].items():
            if inner.get("needed") and inside.get(key) is None:
                found.append(f"{place}:{key} is needed")
                continue
            given_value = inside.get(key, inner.get("default"))
            checked[name][key] = _check(f"{place}:{key}", given_value, inner, known, found)
        for key, kept in checked[name].items():
            if isinstance(kept, tuple):
                checked[name][key] = list(kept)
    return checked


def _values(where: str, value: Any, rule: dict, known: dict, found: list[str]) -> dict[str, Any]:
    pattern, checked = _KEY[rule["of"]], {}
    for key, item in _pairs(where, value, f"a mapping of {rule['of']}", found).items():
        place = f"{where}:{_key_shown(key)}"
        if not isinstance(key, str) or not pattern.fullmatch(key):
            found.append(f"{where}: {_show(key)} is not a name of {rule['of']}")
        elif key in rule["refused"] or (rule["of"] == "features" and key.startswith("service.")):
            found.append(f"{place} can't be set here")
        elif key in rule.get("told", ()):
            found.append(f"{place} is told by qubesd and can't be set")
        elif isinstance(item, float) or not isinstance(item, (str, int, type(None))):
            found.append(
                f"{place}: {_show(item)} is not allowed; allowed: text, a whole number, true, false"
                " or nothing"
            )
        elif isinstance(item, str) and not _VALUE.fullmatch(item):
            found.append(
                f"{place}: {_show(item)} is not allowed; allowed: at most 1024 printable ASCII"
                " characters"
            )
        checked[key] = item
    return checked


def _switches(where: str, value: Any, rule: dict, known: dict, found: list[str]) -> dict[str, Any]:
    checked = {}
    for key, item in _pairs(where, value, "a mapping of names to true or false", found).items():
        if not isinstance(key, str) or not _SERVICE.fullmatch(key):
            found.append(f"{where}: {_show(key)} is not a name of a service")
            continue
        if key == "meminfo-writer":
            # qubesd keeps none (QubesOS/qubes-core-admin: qubes/ext/services.py)
            found.append(f"{where}:{key} follows maxmem; set properties: {{maxmem: 0}} for off")
        checked[key] = _flag(f"{where}:{key}", item, rule, known, found)
    return checked


def _choice_of(where: str, value: Any, rule: dict, known: dict, found: list[str]) -> dict[str, Any]:
    wanted = f"a mapping of {', '.join(rule['of'])}"
    given = _pairs(where, value, wanted, found)
    _mapping(where, given, dict.fromkeys(rule["of"]), found)
    return {
        key: _name(f"{where}:{key}", item, rule, known, found)
        for key, item in given.items()
        if key in rule["of"]
    }


def _ports(where: str, value: Any, rule: dict, known: dict, found: list[str]) -> dict[str, Any]:
    checked = {}
    for port, options in _pairs(where, value, "a mapping of PCI devices", found).items():
        if not isinstance(port, str) or not _PORT.fullmatch(port):
            found.append(
                f"{where}: {_show(port)} is not allowed; allowed: a PCI device as qvm-pci shows it,"
                " in quotes (YAML takes it for a number): '00_14.0'"
            )
            continue
        given = [] if options is None else options
        checked[port] = list(_choices(f"{where}:{port}", given, {"of": rule["options"]}, found))
    return checked


def _rules(where: str, value: Any, rule: dict, known: dict, found: list[str]) -> Any:
    """Firewall rules as qubesadmin spells them (core-admin-client: qubesadmin/firewall.py)."""
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        found.append(
            f"{where}: {_show(value)} is not allowed; allowed: a list of rules such as"
            " action=accept proto=tcp dsthost=example.com dstports=443; nothing else passes"
        )
        return None
    checked: list[str] = []
    for item in value:
        try:
            checked.append(_one_rule(item))
        except ValueError as error:
            found.append(f"{where}: {_show(item)} is not allowed; {error}")
    return checked


def _one_rule(given: Any) -> str:
    """Raises ValueError that says what is allowed."""
    text, _, comment = given.partition("comment=") if isinstance(given, str) else ("", "", "")
    pairs = [part.partition("=")[::2] for part in text.split()]
    parts = dict(pairs)
    known = ("action", "proto", "dsthost", "dstports", "icmptype", "specialtarget")
    if len(parts) != len(pairs) or not set(parts) <= set(known):
        raise ValueError(f"allowed: each once of {', '.join(known)}, comment, as KEY=VALUE")
    allowed = {
        "action": ("accept", "drop"),
        "proto": ("tcp", "udp", "icmp", None),
        "specialtarget": ("dns", None),
    }
    for key, words in allowed.items():
        if parts.get(key) not in words:
            raise ValueError(f"allowed: {key}={_one_of([word for word in words if word])}")
    if "dstports" in parts and parts.get("proto") not in ("tcp", "udp"):
        raise ValueError("dstports goes with proto=tcp or proto=udp")
    if "icmptype" in parts and parts.get("proto") != "icmp":
        raise ValueError("icmptype goes with proto=icmp")
    if comment and not _COMMENT.fullmatch(comment):
        raise ValueError("allowed in a comment: letters, digits, blanks and : ; , . / [ ] _ -")
    found = [f"{key}={parts[key]}" for key in ("action", "proto") if key in parts]
    if "dsthost" in parts:
        found.append(_rule_host(parts["dsthost"]))
    if "dstports" in parts:
        ends = [_rule_number(end, 65535, "dstports") for end in parts["dstports"].split("-")]
        if len(ends) > 2 or ends[0] > ends[-1]:
            raise ValueError("allowed: dstports=PORT or dstports=FIRST-LAST")
        found.append(f"dstports={ends[0]}-{ends[-1]}")
    if "icmptype" in parts:
        found.append(f"icmptype={_rule_number(parts['icmptype'], 255, 'icmptype')}")
    if "specialtarget" in parts:
        found.append("specialtarget=dns")
    return " ".join([*found, *([f"comment={comment}"] if comment else [])])


def _rule_host(host: str) -> str:
    try:
        address = ipaddress.ip_interface(host)
    except ValueError:
        if not _HOST.fullmatch(host):
            raise ValueError(
                "allowed: dsthost= with an address, a network or a name in small letters"
            ) from None
        return f"dsthost={host}"
    length = address.network.prefixlen
    if "%" in host:
        raise ValueError("an address has no interface here")
    if length == 0:
        # qubesadmin drops it, and what is set would never be what is read
        raise ValueError("a network of /0 is every host: leave dsthost out")
    return f"dst{address.version}={address.ip}/{length}"


def _rule_number(text: str, most: int, key: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > most:
        raise ValueError(f"allowed: {key} with whole numbers from 0 to {most}")
    return int(text)


_KINDS = {
    "rules": _rules,
    "name": _name,
    "names": _names,
    "path": _path,
    "flag": _flag,
    "number": _number,
    "entries": _entries,
    "values": _values,
    "switches": _switches,
    "choice_of": _choice_of,
    "ports": _ports,
}


def _once(qubes: Qubes, found: list[str]) -> None:
    """A qube stands in one place."""
    seen: dict[str, str] = {}
    for kind in _MADE:
        for name in getattr(qubes, kind):
            if name in seen:
                found.append(
                    f"ramboot:qubes:{kind}:{name} is also in ramboot:qubes:{seen[name]}; a qube"
                    " stands in one place"
                )
            seen.setdefault(name, kind)


def _key_shown(key: Any) -> str:
    return key if isinstance(key, str) and key.isprintable() else repr(key)


def _show(value: Any) -> str:
    """The value as the user may have typed it, on one line and not too long."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
