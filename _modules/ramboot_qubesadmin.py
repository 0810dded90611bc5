# SPDX-License-Identifier: GPL-2.0-or-later
"""The one place that talks to qubesd: plain values in, plain values out.

It uses `qubesadmin`, the Python API of dom0 (QubesOS/qubes-core-admin-client), and nothing of it
gets any further: a qube is its name, and every value of a property or feature is text as qubesd
spells it ("True", "400", "" for none). Each function asks anew; nothing is cached between calls.

Facts about Qubes name the file that shows them: "client" is qubes-core-admin-client, "core" is
qubes-core-admin. Read at client v4.2.18 and v4.3.34, core v4.3.50.
"""

from __future__ import annotations

import contextlib
import grp
import os
from collections.abc import Iterator
from typing import Any

from salt.exceptions import CommandExecutionError

# Salt's loader sets it
__salt__: dict[str, Any]

try:
    import qubesadmin
    import qubesadmin.exc
    import qubesadmin.firewall

    HAS_QUBESADMIN = True
except ImportError:
    HAS_QUBESADMIN = False

__virtualname__ = "ramboot_qubesadmin"

# What a clone does not take from its source: given at creation, or not the user's to set
# (client: qubesadmin/app.py, clone_vm).
NOT_CLONED = {"name", "qid", "template", "label", "uuid", "installed_by_rpm"}
# A clone that copied the first would claim its source's running disposables (client: clone_vm); the
# other qubesd alone may set (core: qubes/ext/admin.py).
NOT_CLONED_FEATURES = ("preload-dispvm", "deferred-netvm-original")
# Features of ours say whose state they are: they do not travel to a clone.
OURS = "ramboot-"
# Nor do these, if we set them: a copy of a copy is not copied anew (ramboot_qubes, _values).
OF_A_COPY = ("prohibit-start", "skip-update")


def __virtual__() -> str:
    # Loads without qubesadmin too: the audit must be able to say that qubesd was not asked.
    return __virtualname__


# Questions


def available() -> bool:
    """
    Whether Qubes' Python API is here. It says nothing about qubesd.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.available
    """
    return HAS_QUBESADMIN


def qubes() -> dict[str, dict[str, Any]]:
    """
    Every qube that qubesd knows, dom0 included.

    Returns {name: {"class": "AppVM" | "TemplateVM" | "StandaloneVM" | "DispVM" | "AdminVM" | ...,
    "running": bool, "template": name or None, "label": name or None}}. `running` is true for
    whatever is not halted, so also for one that is paused or about to stop; always for dom0, whose
    state qubesadmin gives as NA (client: qubesadmin/vm/__init__.py, is_running).

    Raises CommandExecutionError when qubesd can't be asked.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.qubes
    """
    found = {}
    with _asking("the list of qubes"):
        for vm in _app().domains:
            found[vm.name] = {
                "class": vm.klass,
                "running": vm.klass == "AdminVM" or vm.get_power_state() != "Halted",
                "template": _text(getattr(vm, "template", None)) or None,
                "label": _text(getattr(vm, "label", None)) or None,
            }
    return found


def labels() -> list[str]:
    """
    The names of the labels (colours).

    Raises CommandExecutionError when qubesd can't be asked.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.labels
    """
    with _asking("the list of labels"):
        return list(_app().labels.keys())


def property_names(name: str | None = None) -> list[str]:
    """
    The properties that a qube has.

    name
        a qube. Default: the properties of the whole system (what qubes-prefs shows).

    Raises CommandExecutionError when qubesd can't be asked, or has no such qube.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.property_names sys-net
    """
    with _asking(f"the properties of {_whose(name)}"):
        return list(_holder(_app(), name).property_list())


def properties(name: str | None, names: list[str]) -> dict[str, dict[str, Any]]:
    """
    The values of some properties.

    name
        a qube, or None for those of the whole system.
    names
        properties, as in `property_names`.

    Returns {property: {"value": text, "" for none, or None where it has no value, "default": bool,
    true when the value follows the default}}.

    Raises CommandExecutionError on a property or qube that is not there.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.properties sys-net '[netvm, memory]'
    """
    found = {}
    with _asking(f"the properties of {_whose(name)}"):
        holder = _holder(_app(), name)
        known = holder.property_list()
        for key in names:
            if key not in known:
                raise CommandExecutionError(f"{_whose(name)} has no property {key}")
            # a bool or int without a value is an AttributeError (client: qubesadmin/base.py)
            value = getattr(holder, key, None)
            has_value = value is not None or hasattr(holder, key)
            found[key] = {
                "value": _text(value) if has_value else None,
                "default": holder.property_is_default(key),
            }
    return found


def property_type(name: str, key: str) -> str | None:
    """
    Of which type a property is, as qubesd tells it with the value.

    name, key
        a qube, and a property of it.

    Returns the name that Python has for the type, such as "bool", "int" or "str" ("NoneType" where
    a qube or a label is none); None where it has no value.

    Raises CommandExecutionError when qubesd can't be asked, or has no such qube.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.property_type sys-net memory
    """
    with _asking(f"the properties of {name}"):
        vm, nothing = _qube(_app(), name), object()
        value = getattr(vm, key, nothing)
        return None if value is nothing else type(value).__name__


def features(name: str) -> dict[str, str]:
    """
    The features of a qube, its own alone, not those of its template.

    name
        a qube.

    Raises CommandExecutionError when qubesd can't be asked, or has no such qube.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.features sys-net
    """
    with _asking(f"the features of {name}"):
        return dict(_qube(_app(), name).features.items())


def preload_holder(template: str) -> str:
    """
    Whose feature `preload-dispvm-max` says how many disposables are started before anybody asks:
    for those of the system's default that of dom0, if it is set (core-admin:
    qubes/vm/mix/dvmtemplate.py, get_feat_preload_max).

    template
        a disposable template.

    Returns a qube's name, `dom0` or the template's own.

    Raises CommandExecutionError when qubesd can't be asked.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.preload_holder default-dvm
    """
    default = properties(None, ["default_dispvm"])["default_dispvm"]["value"]
    return "dom0" if default == template and "preload-dispvm-max" in features("dom0") else template


def tags(name: str) -> list[str]:
    """
    The tags of a qube.

    name
        a qube.

    Raises CommandExecutionError when qubesd can't be asked, or has no such qube.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.tags sys-net
    """
    with _asking(f"the tags of {name}"):
        return list(_qube(_app(), name).tags)


def firewall(name: str) -> list[str]:
    """
    The firewall rules of a qube, in the order in which they count; what none allows is dropped.

    name
        a qube, not dom0.

    Returns rules as qubesadmin spells them, such as "action=accept proto=tcp dst4=1.2.3.4/32
    dstports=443-443" (client: qubesadmin/firewall.py, Rule.rule). A qube that was never given any
    has "action=accept" alone (core: qubes/firewall.py, load_defaults).

    Raises CommandExecutionError when qubesd can't be asked.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.firewall work
    """
    with _asking(f"the firewall rules of {name}"):
        return [rule.rule for rule in _qube(_app(), name).firewall.rules]


def volumes(name: str) -> dict[str, dict[str, Any]]:
    """
    The volumes of a qube, those that do not exist while it is halted included.

    name
        a qube.

    Returns {"root" | "private" | "volatile" | "kernel": {"pool": name, "vid": the pool's name for
    it, "size", "usage": bytes (apparent, allocated), "rw", "ephemeral", "snap_on_start",
    "save_on_stop": bool, "source": vid or None, "revisions_to_keep": int, "revisions": names,
    oldest first as qubesd lists them}}. A root with `snap_on_start` is a snapshot that lies in the
    pool named here, that of its template (core: qubes/storage/__init__.py, "must be in the same
    pool as its origin").

    Raises CommandExecutionError when qubesd can't be asked.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.volumes sys-net
    """
    with _asking(f"the volumes of {name}"):
        return {
            key: {
                "pool": volume.pool,
                "vid": volume.vid,
                "size": volume.size,
                "usage": volume.usage,
                "rw": volume.rw,
                "ephemeral": volume.ephemeral,
                "snap_on_start": volume.snap_on_start,
                "save_on_stop": volume.save_on_stop,
                "source": volume.source,
                "revisions_to_keep": volume.revisions_to_keep,
                "revisions": list(volume.revisions) if volume.save_on_stop else [],
            }
            for key, volume in _qube(_app(), name).volumes.items()
        }


def devices(name: str) -> dict[str, dict[str, str]]:
    """
    The PCI devices that a qube gets at each start.

    name
        a qube.

    Returns {port as in 00_14.0: {option: text}}. Covers devices of dom0 alone; no other qube has
    any to give.

    Raises CommandExecutionError when qubesd can't be asked, or has no such qube.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.devices sys-usb
    """
    with _asking(f"the PCI devices of {name}"):
        found = {}
        for item in _assigned(_qube(_app(), name)):
            # 4.3 calls the place on the bus port_id, 4.2 ident
            port = getattr(item, "port_id", None) or item.ident
            found[port] = {key: str(value) for key, value in (item.options or {}).items()}
        return found


def pci_devices() -> dict[str, str | None]:
    """
    The PCI devices that dom0 has for qubes, those that one has already too.

    Returns {port, as in `devices`: its place on the bus, as in 0000:01:00.0, or None where that is
    not told}. 4.3 calls a device behind a bridge by the way to it, 4.2 by its place.

    Raises CommandExecutionError when qubesd can't be asked.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.pci_devices
    """
    with _asking("the PCI devices of dom0"):
        collection = _qube(_app(), "dom0").devices["pci"]
        # 4.3: get_exposed_devices (client: qubesadmin/devices.py)
        listed = getattr(collection, "get_exposed_devices", None) or collection.available
        return {
            getattr(item, "port_id", None) or item.ident: item.data.get("sbdf") for item in listed()
        }


def backends(name: str) -> list[str]:
    """
    The qubes whose devices, of whatever class, a qube was assigned.

    name
        a qube.

    Raises CommandExecutionError when qubesd can't be asked, or has no such qube.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.backends work
    """
    with _asking(f"the devices of {name}"):
        vm = _qube(_app(), name)
        given = [item.backend_domain for kind in vm.devices for item in _assigned(vm, kind)]
        # of one that any qube may have, none
        return sorted({_text(backend) for backend in given if backend})


def pci_while_running() -> bool:
    """
    Whether qubesd takes a PCI device away from a qube that runs, for its next start; 4.2 does not.

    Raises CommandExecutionError when qubesd can't be asked.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.pci_while_running
    """
    with _asking("the devices of dom0"):
        return hasattr(_qube(_app(), "dom0").devices["pci"], "unassign")


def pools() -> dict[str, dict[str, str]]:
    """
    The storage pools.

    Returns {name: config}; the config always has `driver` ("file", "lvm_thin", ...) and, by driver,
    `dir_path`, or `volume_group` and `thin_pool` (core: qubes/storage/*.py, config).

    Raises CommandExecutionError when qubesd can't be asked.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.pools
    """
    with _asking("the storage pools"):
        return {pool.name: dict(pool.config) for pool in _app().pools.values()}


# Actions on qubes


def create(
    name: str,
    cls: str,
    label: str,
    template: str | None = None,
    pool: str | None = None,
    pools: dict[str, str] | None = None,
) -> None:
    """
    Make an empty qube; qubesd makes it whole, or not at all (core: qubes/api/admin.py, _vm_create).

    name, cls, label, template
        what it is; a class without templates takes None.
    pool
        where every volume goes that may go anywhere; or
    pools
        {volume: pool}. Default: the default pools.

    Raises CommandExecutionError when qubesd refuses; its attribute `unanswered` is true when qubesd
    did not say whether it did.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.create save AppVM yellow template=debian-12-xfce
    """
    with _asking(f"making {name}"):
        _app().add_new_vm(cls, name, label, template=template, pool=pool, pools=pools)


def clone_settings(source: str, name: str) -> None:
    """
    Give a qube the properties, tags, features, notes and firewall rules of another.

    What clone_vm of qubesadmin copies (client: qubesadmin/app.py); done by ourselves so that the
    clone is marked as unfinished before the first of it. Devices are not copied: two qubes that
    claim one device can't both start.

    source, name
        the qube to copy from, and to.

    Raises CommandExecutionError when qubesd refuses.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.clone_settings debian-12-xfce mine
    """
    with _asking(f"copying the settings of {source} to {name}"):
        app = _app()
        old, new = _qube(app, source), _qube(app, name)
        for key in old.property_list():
            if key in NOT_CLONED or old.property_is_default(key):
                continue
            # some can be read only, some have no value
            with contextlib.suppress(AttributeError):
                setattr(new, key, getattr(old, key))
        for tag in old.tags:
            if not tag.startswith("created-by-"):
                new.tags.add(tag)
        features = dict(old.features.items())
        held = features.get("prohibit-start", "").startswith("ramboot: ")
        for key, value in features.items():
            if not key.startswith((*NOT_CLONED_FEATURES, OURS)) and not (held and key in OF_A_COPY):
                new.features[key] = value
        # not in 4.2
        if hasattr(old, "get_notes") and old.get_notes():
            new.set_notes(old.get_notes())
        new.firewall.save_rules(old.firewall.rules)


def clone_volume(source: str, name: str, volume: str) -> None:
    """
    Overwrite a volume of one qube with that of another, across pools.

    source, name
        the qube to copy from, and to; both have to be halted.
    volume
        "root" or "private".

    Raises CommandExecutionError when qubesd refuses, such as for want of room.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.clone_volume debian-12-xfce mine root
    """
    with _asking(f"copying the {volume} volume of {source} to {name}"):
        app = _app()
        _volume(app, name, volume).clone(_volume(app, source, volume))


def set_volume(name: str, volume: str, option: str, value: Any) -> None:
    """
    Change an option of a volume.

    name, volume
        whose, and which.
    option
        "rw", "ephemeral" (bool, the volatile volume alone; core: qubes/storage/__init__.py) or
        "revisions_to_keep" (0 or 1 in a file pool; core: qubes/storage/file.py).
    value
        bool or int.

    Raises CommandExecutionError on any other option, when qubesd refuses, or has no such qube.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.set_volume mine root revisions_to_keep 0
    """
    if option not in ("rw", "ephemeral", "revisions_to_keep"):
        raise CommandExecutionError(f"{option} of a volume is nothing that can be set")
    with _asking(f"setting {option} of the {volume} volume of {name}"):
        setattr(_volume(_app(), name, volume), option, value)


def remove(name: str) -> None:
    """
    Delete a qube with all its volumes.

    name
        a qube that is halted and that no other one needs.

    Raises CommandExecutionError when qubesd refuses; what uses the qube is in the message as far
    as qubesd tells (core: qubes/app.py, on_domain_pre_deleted, tells the log alone).

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.remove mine
    """
    with _asking(f"deleting {name}"):
        app = _app()
        _qube(app, name)
        del app.domains[name]


def set_property(name: str | None, key: str, value: str) -> None:
    """
    Set a property.

    name
        a qube, or None for one of the whole system.
    key, value
        which, and its text; "" is none. Of a bool qubesd reads yes, on, 1 and the like too, and
        answers True or False ever after (core: qubes/__init__.py).

    Raises CommandExecutionError when qubesd refuses, or has no such qube.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.set_property mine memory 500
    """
    with _asking(f"setting {key} of {_whose(name)}"):
        setattr(_holder(_app(), name), key, value)


def reset_property(name: str | None, key: str) -> None:
    """
    Let a property follow its default again.

    name, key
        as in `set_property`.

    Raises CommandExecutionError when qubesd refuses, or has no such qube.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.reset_property mine memory
    """
    with _asking(f"resetting {key} of {_whose(name)}"):
        delattr(_holder(_app(), name), key)


def set_feature(name: str, key: str, value: str | None) -> None:
    """
    Set a feature, or take it away.

    name, key
        whose, and which: letters, digits, `_`, `.` and `-`.
    value
        printable ASCII ("" is how Qubes writes "off"), or None to remove it.

    Raises CommandExecutionError when qubesd refuses, or has no such qube.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.set_feature mine service.cups ''
    """
    with _asking(f"setting feature {key} of {name}"):
        vm = _qube(_app(), name)
        if value is None:
            if key in list(vm.features):
                del vm.features[key]
        else:
            vm.features[key] = value


def set_tag(name: str, tag: str, present: bool = True) -> None:
    """
    Add a tag to a qube, or take it away.

    name, tag, present
        whose, which, and whether it shall be there.

    Raises CommandExecutionError when qubesd refuses, or has no such qube.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.set_tag mine stateless
    """
    with _asking(f"setting tag {tag} of {name}"):
        vm = _qube(_app(), name)
        if present:
            vm.tags.add(tag)
        else:
            vm.tags.discard(tag)


def set_firewall(name: str, rules: list[str]) -> None:
    """
    Replace the firewall rules of a qube.

    name
        a qube, not dom0.
    rules
        as `firewall` returns them.

    Raises CommandExecutionError when qubesadmin or qubesd refuses one.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.set_firewall work '[action=drop]'
    """
    with _asking(f"setting the firewall rules of {name}"):
        made = [qubesadmin.firewall.Rule(rule) for rule in rules]
        _qube(_app(), name).firewall.save_rules(made)


def set_device(name: str, port: str, options: dict[str, str] | None) -> None:
    """
    Assign a PCI device of dom0 to a qube for each of its starts, or take it away.

    name, port
        whose, and which, as in 00_14.0.
    options
        {option: "True"}, or None to take the device away. What was assigned with other options is
        assigned anew, as the very device that it was (4.3 can name one beside its place).

    Raises CommandExecutionError when qubesd refuses, or has no such qube.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.set_device sys-usb 00_14.0 '{no-strict-reset: "True"}'
    """
    with _asking(f"assigning PCI device {port} to {name}"):
        app = _app()
        vm = _qube(app, name)
        collection, device = vm.devices["pci"], None
        # a list first: taking one away while qubesadmin reads them would skip others
        for item in list(_assigned(vm)):
            if (getattr(item, "port_id", None) or item.ident) == port:
                device = getattr(item, "virtual_device", None)
                # 4.3: unassign; in 4.2 detach of a persistent one (client: qubesadmin/devices.py)
                getattr(collection, "unassign", collection.detach)(item)
        if options is not None:
            new = _assignment(app.domains["dom0"], port, options, device)
            getattr(collection, "assign", collection.attach)(new)


def update_menu(name: str, source: str | None = None) -> str | None:
    """
    Make the entries of a qube in the application menu.

    A clone made through qubesd's API gets none by itself: clone_vm of qubesadmin calls this
    program too (client: qubesadmin/app.py).

    name
        a qube.
    source
        the qube that it is a clone of, if it is one.

    Returns None, or why there are no entries: a menu is no reason to fail.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.update_menu mine source=debian-12-xfce
    """
    command = ["qvm-appmenus", "--init", "--update"]
    command += ["--source", source, name] if source else [name]
    if os.geteuid() == 0:
        try:
            user = grp.getgrnam("qubes").gr_mem[0]
        except (KeyError, IndexError):
            return f"{name} has no menu entries: nobody is in the group qubes"
        command = ["runuser", "-u", user, "--", *command]
    try:
        done = __salt__["cmd.run_all"](command, python_shell=False, ignore_retcode=True)
    except CommandExecutionError as error:
        return f"{name} has no menu entries: {error}"
    if done["retcode"] != 0:
        return f"{name} has no menu entries: {(done['stderr'] or done['stdout']).strip()}"
    return None


# Actions on pools


def add_pool(name: str, driver: str, options: dict[str, str]) -> None:
    """
    Add a storage pool.

    name, driver
        as qvm-pool shows them; the drivers "file" and "file-reflink" make the directories that
        they lack (core: qubes/storage/file.py, reflink.py, setup).
    options
        what the driver takes, such as {"dir_path": path, "revisions_to_keep": "0"}.

    Raises CommandExecutionError when qubesd refuses.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.add_pool usb file '{dir_path: /mnt/usb/qubes}'
    """
    with _asking(f"adding the pool {name}"):
        _app().add_pool(name, driver, **options)


def remove_pool(name: str) -> None:
    """
    Forget a storage pool; what is in its directory stays (core: qubes/storage/file.py, destroy).

    name
        a pool that no volume and no default names.

    Raises CommandExecutionError when qubesd refuses.

    CLI Example:

    .. code-block:: bash

        salt-call --local ramboot_qubesadmin.remove_pool usb
    """
    with _asking(f"removing the pool {name}"):
        _app().remove_pool(name)


# qubesadmin


@contextlib.contextmanager
def _asking(what: str) -> Iterator[None]:
    """Turn whatever qubesadmin raises into one sentence that says what was being done."""
    if not HAS_QUBESADMIN:
        raise CommandExecutionError(f"{what}: Qubes' Python API (qubesadmin) is not installed here")
    try:
        yield
    except CommandExecutionError:
        raise
    except _refusals() as error:
        # What qubesd does not explain: a value that the API does not take, or a bug; for properties
        # it is an AttributeError as well (client: qubesadmin/exc.py).
        told = CommandExecutionError(f"{what}: refused without a reason: {error}")
        # of a qubesd that died at its work there is no answer either (client: qubesadmin/base.py,
        # _parse_qubesd_response)
        told.unanswered = isinstance(error, qubesadmin.exc.QubesDaemonAccessError)
        raise told from error
    except qubesadmin.exc.QubesDaemonCommunicationError as error:
        raise _unanswered(what, error) from error
    except (qubesadmin.exc.QubesException, ValueError) as error:
        raise CommandExecutionError(f"{what}: {_unquoted(error)}") from error
    except OSError as error:
        raise _unanswered(what, error) from error
    except AttributeError as error:
        raise CommandExecutionError(f"{what}: {error}") from error


def _unanswered(what: str, error: Exception) -> CommandExecutionError:
    told = CommandExecutionError(f"{what}: qubesd can't be reached: {error}")
    told.unanswered = True
    return told


def _refusals() -> tuple[type[BaseException], ...]:
    """By the name that client v4.2 and v4.3 have for all of these, and by those of v4.4."""
    names = ("QubesDaemonAccessError", "PermissionDenied", "ProtocolError")
    return tuple(getattr(qubesadmin.exc, key) for key in names if hasattr(qubesadmin.exc, key))


def _unquoted(error: BaseException) -> str:
    """Exceptions of qubesadmin that are a KeyError too show their text in quotes in 4.2."""
    return str(error.args[0]) if error.args else str(error)


def _app() -> Any:
    # A new one for each question: it caches the list of qubes and never notices a change.
    return qubesadmin.Qubes()


def _qube(app: Any, name: str) -> Any:
    try:
        return app.domains[name]
    except KeyError:
        raise CommandExecutionError(f"there is no qube {name}") from None


def _volume(app: Any, name: str, volume: str) -> Any:
    try:
        return _qube(app, name).volumes[volume]
    except KeyError:
        raise CommandExecutionError(f"{name} has no volume {volume}") from None


def _holder(app: Any, name: str | None) -> Any:
    return app if name is None else _qube(app, name)


def _whose(name: str | None) -> str:
    return "the system" if name is None else name


def _text(value: Any) -> str:
    """A value as qubesd spells it; an object of qubesadmin is its name."""
    return "" if value is None else str(value)


def _assigned(vm: Any, kind: str = "pci") -> Iterator[Any]:
    """What the qube gets at each start; 4.3 calls it assigned, 4.2 persistent."""
    collection = vm.devices[kind]
    if hasattr(collection, "get_assigned_devices"):
        return collection.get_assigned_devices()
    return collection.assignments(persistent=True)


def _assignment(backend: Any, port: str, options: dict[str, str], device: Any) -> Any:
    """What to assign; the two releases build it differently (client: devices, device_protocol)."""
    try:
        from qubesadmin import device_protocol
    except ImportError:
        from qubesadmin import devices as devices_42

        return devices_42.DeviceAssignment(backend, port, options=options, persistent=True)
    device = device or device_protocol.VirtualDevice(device_protocol.Port(backend, port, "pci"))
    return device_protocol.DeviceAssignment(device, mode="required", options=options)
