# SPDX-License-Identifier: GPL-2.0-or-later
"""A stand-in for qubesadmin and the qubesd behind it: strict, small, and the only one.

No public package gives qubesadmin outside of Qubes. What is here behaves as the real thing does,
each behaviour with the file that shows it ("client": QubesOS/qubes-core-admin-client v4.3.34,
"core": QubesOS/qubes-core-admin v4.3.50; seen by running both, without Xen), and whatever
is not here is an AttributeError. tests/unit/test_qubesadmin.py holds it against the real ones.

`WORLD` is what qubesd knows. With RAMBOOT_STANDIN=FILE it is read from that file and written back
after each change, so that a program of its own (salt-call) can be given qubes.
"""

import ipaddress
import json
import os
import re
import shutil
import time
import uuid
from pathlib import Path

from qubesadmin import exc, firewall

DEFAULT = object()

CLASSES = ("AppVM", "DispVM", "StandaloneVM", "TemplateVM")
TAGS = ("audiovm-dom0", "created-by-dom0", "guivm-dom0")
LABELS = ("red", "orange", "yellow", "green", "gray", "blue", "purple", "black")
# name: (type, default). core: qubes/vm/qubesvm.py, qubes/vm/mix/{net,dvmtemplate}.py
PROPERTIES = {
    "autostart": ("bool", False),
    "debug": ("bool", False),
    "default_dispvm": ("vm", "@default_dispvm"),
    "default_user": ("str", "user"),
    "include_in_backups": ("bool", True),
    "devices_denied": ("str", ""),
    "installed_by_rpm": ("bool", False),
    "ip": ("str", "10.137.0.5"),
    "ip6": ("str", ""),
    "kernel": ("str", "1.0"),
    "klass": ("str", None),
    "label": ("label", None),
    "mac": ("str", "00:16:3e:5e:6c:00"),
    "management_dispvm": ("vm", "@management_dispvm"),
    "maxmem": ("int", 4000),
    "memory": ("int", 400),
    "name": ("str", None),
    "netvm": ("vm", "@default_netvm"),
    "provides_network": ("bool", False),
    "qid": ("int", None),
    # no value while the qube is halted
    "stubdom_xid": ("int", None),
    "uuid": ("str", None),
    "vcpus": ("int", 2),
    "virt_mode": ("str", "pvh"),
}
# core: qubes/vm/adminvm.py
OF_DOM0 = ("default_dispvm", "include_in_backups", "klass", "label", "name", "qid", "uuid")
READ_ONLY = ("klass", "qid", "stubdom_xid", "uuid")
# core: qubes/app.py; the default_pool_* follow default_pool until they are set
SYSTEM = {
    "default_dispvm": "vm",
    "default_netvm": "vm",
    "default_pool": "pool",
    "default_pool_kernel": "pool",
    "default_pool_private": "pool",
    "default_pool_root": "pool",
    "default_pool_volatile": "pool",
    "default_template": "vm",
    "management_dispvm": "vm",
    "updatevm": "vm",
}
DRIVERS = {
    "file": ("dir_path", "revisions_to_keep", "ephemeral_volatile"),
    "file-reflink": ("dir_path", "revisions_to_keep", "ephemeral_volatile", "setup_check"),
    "lvm_thin": ("volume_group", "thin_pool", "revisions_to_keep", "ephemeral_volatile"),
    "linux-kernel": ("dir_path",),
}
# PCI devices that the machine has, with their place on the bus, by which 4.2 calls them; 4.3
# assigns others too, for they may come later
HARDWARE = {
    "00_14.0": "0000:00:14.0",
    "00_1f.6": "0000:00:1f.6",
    "00_1c.0-00_00.0": "0000:01:00.0",
}
SIZES = {"root": 10 << 30, "private": 2 << 30, "volatile": 10 << 30}


class World:
    """What qubesd knows. `fault(method, subject)`, when set, may raise before a call is served."""

    def __init__(self, path=None):
        self.path = path
        self.release = "4.3"
        # where each qube has a directory, wherever its volumes lie; None: they have none
        self.base = None
        # when each was made; not every file system can tell
        self.born = {}
        self.pools = {}
        self.qubes = {}
        self.system = {}
        # of dom0
        self.features = {}
        self.dom0 = {}
        self.hardware = dict(HARDWARE)
        self.fault = None
        self.calls = []
        # apparent pool volume contents of pools without files: {"pool vid": bytes allocated}
        self.usage = {}
        self.revisions = {}
        if path and Path(path).exists():
            vars(self).update(json.loads(Path(path).read_text()))

    def save(self):
        if self.path:
            kept = ("release", "base", "pools", "qubes", "system", "features", "dom0", "usage")
            kept += ("revisions",)
            Path(self.path).write_text(json.dumps({key: vars(self)[key] for key in kept}))

    def call(self, method, subject):
        """Every question and every action comes through here."""
        self.calls.append((method, subject))
        if self.fault:
            self.fault(method, subject)

    # for tests

    def add_pool(self, name, driver, **options):
        self.pools[name] = {"name": name, "driver": driver, **options}
        self.save()

    def run(self, name, running=True):
        self.qubes[name]["running"] = running
        self.save()

    def update(self, name, size=1 << 20):
        """A template was started, changed and halted: its root is another, with a revision more."""
        vid = self.qubes[name]["volumes"]["root"]["vid"]
        key = f"{self.qubes[name]['volumes']['root']['pool']} {vid}"
        old = self.revisions.setdefault(key, [])
        old.append(f"{len(old) + 1}-back")
        self.fill(name, "root", size)

    def fill(self, name, volume, size):
        """Write to a volume: `size` bytes more are allocated."""
        info = self.qubes[name]["volumes"][volume]
        file = self.file(info)
        if file:
            with open(file, "r+b") as image:
                image.seek(file.stat().st_blocks * 512)
                image.write(b"x" * size)
        else:
            key = f"{info['pool']} {info['vid']}"
            self.usage[key] = self.usage.get(key, 0) + size
        self.save()

    # storage

    def file(self, info):
        """Where a volume is, in a pool of files (core: qubes/storage/file.py, path)."""
        pool = self.pools.get(info["pool"], {})
        if pool.get("driver") not in ("file", "file-reflink"):
            return None
        return Path(pool["dir_path"], f"{info['vid']}.img")

    def allocated(self, info):
        if info["snap_on_start"]:
            return 0
        file = self.file(info)
        if file:
            return file.stat().st_blocks * 512 if file.exists() else 0
        return self.usage.get(f"{info['pool']} {info['vid']}", 0)

    def folder(self, name):
        """core: qubes/vm/qubesvm.py, dir_path"""
        kind = "vm-templates" if self.qubes[name]["class"] == "TemplateVM" else "appvms"
        return Path(self.base, kind, name)

    def make_volumes(self, name, pool, pools):
        """core: qubes/vm/*vm.py (volume_config), qubes/storage/{__init__,file}.py"""
        qube = self.qubes[name]
        based = self.qubes.get(qube["template"] or "", None)
        folder = "vm-templates" if qube["class"] == "TemplateVM" else "appvms"
        made = {}
        for volume, size in SIZES.items():
            snap = based is not None and (
                volume == "root" or (volume == "private" and qube["class"] == "DispVM")
            )
            wanted = pools.get(volume, pool)
            if snap:
                source = based["volumes"][volume]
                if volume in pools and wanted != source["pool"]:
                    raise exc.QubesException(
                        f"Snapshot volume {volume} must be in the same pool as its origin"
                        f" ({volume} volume of template),cannot move to pool {wanted} "
                    )
                wanted = source["pool"]
            elif volume == "volatile" and qube["class"] == "DispVM" and wanted is None:
                # core: qubes/vm/dispvm.py, volatile as that of the disposable template
                wanted = based["volumes"][volume]["pool"]
            wanted = wanted or self.default_pool(f"default_pool_{volume}")
            config = self.pools[wanted]
            vid = f"{folder}/{name}/{volume}"
            if config["driver"] == "lvm_thin":
                vid = f"{config['volume_group']}/vm-{name}-{volume}"
            save = not snap and volume != "volatile"
            made[volume] = {
                "pool": wanted,
                "vid": vid,
                "size": size,
                "rw": based["volumes"]["root"]["rw"]
                if volume == "root" and qube["class"] == "DispVM"
                else True,
                "ephemeral": volume == "volatile"
                and (
                    qube["class"] == "DispVM"
                    and based["volumes"]["volatile"]["ephemeral"]
                    or str(config.get("ephemeral_volatile")) == "True"
                ),
                "snap_on_start": snap,
                "save_on_stop": save,
                "source": based["volumes"][volume]["source"] or based["volumes"][volume]["vid"]
                if snap
                else None,
                "revisions_to_keep": int(config.get("revisions_to_keep", 1)) if save else 0,
            }
            file = self.file(made[volume])
            # core: qubes/storage/file.py, create: all but snapshots, the volatile one too
            if file and not snap:
                file.parent.mkdir(parents=True, exist_ok=True)
                with open(file, "a+b") as image:
                    image.truncate(size)
        made["kernel"] = {
            "pool": "linux-kernel",
            "vid": "1.0",
            "size": 0,
            "rw": False,
            "ephemeral": False,
            "snap_on_start": False,
            "save_on_stop": False,
            "source": None,
            "revisions_to_keep": 0,
        }
        qube["volumes"] = made

    def default_pool(self, key):
        return self.system.get(key) or self.system.get("default_pool") or "varlibqubes"


WORLD = World(os.environ.get("RAMBOOT_STANDIN"))


class Qubes:
    """client: qubesadmin/app.py, QubesBase."""

    def __init__(self):
        WORLD.call("connect", None)
        self.__dict__["domains"] = _Domains(self)
        self.__dict__["pools"] = _Collection(lambda: WORLD.pools, Pool)
        self.__dict__["labels"] = _Collection(lambda: dict.fromkeys(LABELS), str)

    def property_list(self):
        WORLD.call("admin.property.List", None)
        return sorted(SYSTEM)

    def property_is_default(self, key):
        if key not in SYSTEM:
            raise exc.QubesNoSuchPropertyError(f"Invalid property '{key}' of app")
        return WORLD.system.get(key) is None

    def __getattr__(self, key):
        if key.startswith("_"):
            raise AttributeError(key)
        WORLD.call("admin.property.Get", key)
        if key not in SYSTEM:
            raise exc.QubesNoSuchPropertyError(f"Invalid property '{key}' of app")
        if SYSTEM[key] == "pool":
            # a pool is plain text here (client: qubesadmin/base.py, type str)
            return WORLD.default_pool(key)
        name = WORLD.system.get(key)
        return self.domains.get_blind(name) if name else None

    def __setattr__(self, key, value):
        WORLD.call("admin.property.Set", key)
        if key not in SYSTEM:
            raise exc.QubesNoSuchPropertyError(f"Invalid property '{key}' of app")
        if value is DEFAULT:
            return self.__delattr__(key)
        value = "" if value is None else str(value)
        if SYSTEM[key] == "pool" and value not in WORLD.pools:
            raise exc.QubesPropertyValueError("No such storage pool")
        if SYSTEM[key] == "vm" and value and value not in WORLD.qubes:
            raise exc.QubesPropertyValueError(f"Can't set {key} to non-existing qube {value}")
        if key == "default_netvm" and value:
            # core: qubes/app.py, _setter_default_netvm
            for vm in (self.domains[name] for name in WORLD.qubes):
                followed = "netvm" in vm._types() and vm.property_is_default("netvm")
                if followed and vm._loops(value):
                    raise exc.QubesPropertyValueError(f"Network loop on '{vm}'")
        WORLD.system[key] = value
        WORLD.save()
        return None

    def __delattr__(self, key):
        WORLD.call("admin.property.Reset", key)
        WORLD.system.pop(key, None)
        WORLD.save()

    def add_pool(self, name, driver, **options):
        # core: qubes/api/admin.py, pool_add
        WORLD.call("admin.pool.Add", name)
        if driver not in DRIVERS:
            raise exc.QubesException(f"unexpected driver name: {driver}")
        if name in WORLD.pools:
            raise exc.QubesDaemonAccessError
        unknown = [key for key in options if key not in DRIVERS[driver]]
        if unknown:
            raise exc.QubesException(f"unexpected driver options: {' '.join(unknown)}")
        top = Path(options["dir_path"])
        if not top.parent.is_dir():
            # one directory is made, not a path (core: qubes/storage/file.py, setup)
            raise exc.QubesDaemonAccessError
        for folder in (top, top / "appvms", top / "vm-templates"):
            folder.mkdir(exist_ok=True)
        WORLD.add_pool(name, driver, **{key: str(value) for key, value in options.items()})

    def remove_pool(self, name):
        # core: qubes/app.py, remove_pool; the directory stays (qubes/storage/file.py, destroy)
        WORLD.call("admin.pool.Remove", name)
        if name not in WORLD.pools:
            raise exc.QubesDaemonAccessError
        used = any(
            volume["pool"] == name
            for qube in WORLD.qubes.values()
            for volume in qube.get("volumes", {}).values()
        )
        if used or name in WORLD.system.values():
            raise exc.QubesPoolInUseError(f"Storage pool is in use: '{name}'")
        del WORLD.pools[name]
        WORLD.save()

    def add_new_vm(self, cls, name, label, template=None, pool=None, pools=None):
        # client: qubesadmin/app.py, add_new_vm; core: qubes/api/admin.py, _vm_create
        if " " in name:
            raise ValueError(f"Qube name could not contain space: {name}")
        if pool and pools:
            raise ValueError("only one of pool= and pools= can be used")
        WORLD.call(f"admin.vm.Create.{cls}", name)
        if cls not in CLASSES:
            raise exc.QubesDaemonAccessError
        based = cls in ("AppVM", "DispVM")
        if template and not based:
            raise exc.QubesValueError(f"{cls} cannot be based on template")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,30}", name):
            raise exc.QubesValueError(
                "VM name cannot start with hyphen, underscore, dot or numbers"
            )
        if label not in LABELS:
            raise exc.QubesLabelNotFoundError(f"Label does not exist: {label}")
        if based:
            template = template or WORLD.system.get(
                "default_dispvm" if cls == "DispVM" else "default_template"
            )
            if template not in WORLD.qubes:
                raise exc.QubesVMNotFoundError(f"No such domain: '{template}'")
        for used in [pool] if pool else (pools or {}).values():
            if used not in WORLD.pools:
                raise exc.QubesException(f"Unknown storage pool {used}")
        if name in WORLD.qubes:
            raise exc.QubesValueError(f"VM {name} already exists")
        kind = WORLD.qubes[template] if based else None
        if cls == "DispVM" and not (
            kind["class"] == "AppVM" and kind["properties"].get("template_for_dispvms") is True
        ):
            raise exc.QubesValueError(
                f"template for disposable ({template}) needs to be an AppVM with"
                " template_for_dispvms=True"
            )
        # a disposable has the features, tags, properties and rules of its template (core:
        # qubes/vm/dispvm.py)
        inherited = dict(kind["features"]) if cls == "DispVM" else {}
        given = dict(kind["properties"]) if cls == "DispVM" else {}
        given.pop("template_for_dispvms", None)
        WORLD.qubes[name] = {
            "class": cls,
            "label": label,
            "template": template,
            "properties": given,
            "features": {k: v for k, v in inherited.items() if not k.startswith("preload-dispvm")},
            # core: qubes/ext/admin.py, gui.py, audio.py
            "tags": sorted({*TAGS, *(kind["tags"] if cls == "DispVM" else [])}),
            "running": False,
            "pci": {},
            # core: qubes/vm/__init__.py
            "uuid": str(uuid.uuid4()),
        }
        if cls == "DispVM" and "firewall" in kind:
            WORLD.qubes[name]["firewall"] = list(kind["firewall"])
        if kind and "default-menu-items" in kind["features"]:
            # QubesOS/qubes-desktop-linux-common: qubesappmenus/__init__.py, appmenus_init
            items = kind["features"]["default-menu-items"]
            WORLD.qubes[name]["features"].setdefault("menu-items", items)
        # core: qubes/vm/qubesvm.py, create_on_disk
        if WORLD.base:
            WORLD.folder(name).mkdir(parents=True, exist_ok=True)
            WORLD.born[str(WORLD.folder(name))] = time.time()
        try:
            WORLD.make_volumes(name, pool, pools or {})
        except exc.QubesException:
            if WORLD.base:
                WORLD.folder(name).rmdir()
            del WORLD.qubes[name]
            raise
        WORLD.save()
        return self.domains[name]


class _Collection:
    """client: qubesadmin/base.py, WrapperObjectsCollection."""

    def __init__(self, content, wrapper):
        self._content, self._wrapper = content, wrapper

    def keys(self):
        return list(self._content())

    def values(self):
        return [self._wrapper(key) for key in self._content()]

    def __contains__(self, key):
        return key in self._content()

    def __getitem__(self, key):
        if key not in self:
            raise KeyError(key)
        return self._wrapper(key)


class Pool:
    """client: qubesadmin/storage.py; every value of the configuration is text."""

    def __init__(self, name):
        self.name = name

    @property
    def config(self):
        WORLD.call("admin.pool.Info", self.name)
        return {key: str(value) for key, value in WORLD.pools[self.name].items()}


class _Domains:
    """client: qubesadmin/app.py, VMCollection; sorted by name when iterated."""

    def __init__(self, app):
        self._app = app

    def __iter__(self):
        WORLD.call("admin.vm.List", None)
        return iter([QubesVM(self._app, name) for name in sorted([*WORLD.qubes, "dom0"])])

    def __contains__(self, name):
        return name == "dom0" or name in WORLD.qubes

    def __getitem__(self, name):
        if name not in self:
            raise KeyError(name)
        return self.get_blind(name)

    def get_blind(self, name):
        return QubesVM(self._app, name)

    def __delitem__(self, name):
        # core: qubes/api/admin.py (vm_remove), qubes/app.py (on_domain_pre_deleted)
        WORLD.call("admin.vm.Remove", name)
        if WORLD.qubes[name]["running"]:
            raise exc.QubesVMNotHaltedError(f"Domain is not powered off: '{name}'")
        in_use = exc.QubesVMInUseError(
            f"Domain is in use: '{name}';  see 'journalctl -u qubesd -e' in dom0 for details"
        )
        if name in WORLD.system.values():
            raise in_use
        # core: qubes/app.py, on_domain_pre_deleted, and qubes/vm/mix/dvmtemplate.py,
        # on_dvmtemplate_remove_from_disk
        preloaded = WORLD.qubes[name]["features"].get("preload-dispvm", "").split()
        for other, qube in WORLD.qubes.items():
            # a qube may name itself
            of_the_template = () if other in preloaded else ("template", "default_dispvm")
            named = {"template": qube["template"], **qube["properties"]}
            if other != name and name in (
                named.get(key)
                for key in (*of_the_template, "netvm", "management_dispvm", "relayvm")
            ):
                raise in_use
        if WORLD.dom0.get("default_dispvm") == name:
            raise in_use
        given = [
            port
            for other, qube in WORLD.qubes.items()
            for port, backend in qube.get("block", {}).items()
            if backend == name != other
        ]
        if given:
            raise exc.QubesVMInUseError(f"VM has devices assigned to other VMs: {', '.join(given)}")
        for volume in WORLD.qubes[name]["volumes"].values():
            file = WORLD.file(volume)
            if file and file.exists():
                file.unlink()
                # the driver file leaves it (core: qubes/storage/{file,reflink}.py, remove)
                reflink = WORLD.pools[volume["pool"]]["driver"] == "file-reflink"
                if reflink and not any(file.parent.iterdir()):
                    file.parent.rmdir()
        # core: qubes/vm/qubesvm.py, remove_from_disk
        if WORLD.base:
            shutil.rmtree(WORLD.folder(name), ignore_errors=True)
        del WORLD.qubes[name]
        for other in preloaded:
            WORLD.qubes[other]["running"] = False
            del self[other]
        WORLD.save()


class QubesVM:
    """client: qubesadmin/vm/__init__.py. Attributes that are not of Python are qubesd's."""

    def __init__(self, app, name):
        self.__dict__["app"] = app
        self.__dict__["name"] = name
        self.__dict__["features"] = _Features(name)
        self.__dict__["tags"] = _Tags(name)
        self.__dict__["devices"] = {"pci": _devices(name), "block": _block(name)}
        self.__dict__["firewall"] = _Firewall(name)

    def __str__(self):
        return self.name

    @property
    def klass(self):
        return "AdminVM" if self.name == "dom0" else self._qube()["class"]

    def _qube(self):
        if self.name == "dom0":
            return {"properties": WORLD.dom0, "running": True}
        if self.name not in WORLD.qubes:
            raise exc.QubesPropertyAccessError(self.name)
        return WORLD.qubes[self.name]

    def get_power_state(self):
        WORLD.call("admin.vm.CurrentState", self.name)
        if self.name == "dom0":
            return "NA"
        if not self._qube()["running"]:
            return "Halted"
        return "Paused" if self._qube().get("paused") else "Running"

    def start(self):
        """core: qubes/vm/qubesvm.py; its own feature counts, not that of its template."""
        WORLD.call("admin.vm.Start", self.name)
        rationale = self._qube()["features"].get("prohibit-start", "")
        if rationale and WORLD.release != "4.2":
            raise exc.QubesException(f"Qube start is prohibited. Rationale: {rationale}")
        WORLD.run(self.name)

    def pause(self):
        """core: qubes/vm/qubesvm.py"""
        WORLD.call("admin.vm.Pause", self.name)
        if not self._qube()["running"]:
            raise exc.QubesVMNotRunningError(
                f"Domain not running (either powered off or paused): '{self.name}'"
            )
        self._qube()["paused"] = True
        WORLD.save()

    def unpause(self):
        WORLD.call("admin.vm.Unpause", self.name)
        if not self._qube().get("paused"):
            raise exc.QubesVMNotPausedError(f"Domain is not paused: '{self.name}'")
        self._qube()["paused"] = False
        WORLD.save()

    @property
    def volumes(self):
        WORLD.call("admin.vm.volume.List", self.name)
        if self.name == "dom0":
            return {}
        return {key: Volume(self.name, key) for key in self._qube()["volumes"]}

    def _types(self):
        if self.klass == "AdminVM":
            return {key: PROPERTIES[key] for key in OF_DOM0}
        types = dict(PROPERTIES)
        if self.klass == "TemplateVM":
            # core: qubes/vm/templatevm.py
            types["netvm"] = ("vm", None)
        if self.klass == "RemoteVM":
            # core: qubes/vm/remotevm.py
            return {key: types[key] for key in ("klass", "label", "name", "qid", "uuid")} | {
                "relayvm": ("vm", None)
            }
        if self.klass in ("AppVM", "DispVM"):
            types["template"] = ("vm", None)
        if self.klass == "AppVM":
            types["template_for_dispvms"] = ("bool", False)
        if self.klass == "DispVM":
            types["auto_cleanup"] = ("bool", False)
            types["dispid"] = ("int", 1234)
        return types

    def property_list(self):
        WORLD.call("admin.vm.property.List", self.name)
        return list(self._types())

    def property_is_default(self, key):
        self._known(key)
        if key in ("name", "label", "template", "klass", "qid", "uuid", "dispid"):
            # of dom0 its uuid too is a default (core: qubes/vm/adminvm.py)
            return (self.name, key) == ("dom0", "uuid")
        return key not in self._qube()["properties"]

    def _known(self, key):
        if key not in self._types():
            raise exc.QubesNoSuchPropertyError(f"Invalid property '{key}' of {self.name}")

    def __getattr__(self, key):
        if key.startswith("_"):
            raise AttributeError(key)
        WORLD.call("admin.vm.property.Get", f"{self.name} {key}")
        if self.name == "dom0" and key == "label":
            return "black"
        if (self.name, key) == ("dom0", "uuid"):
            return str(uuid.UUID(int=0))
        self._known(key)
        kind, default = self._types()[key]
        qube = self._qube()
        value = (
            qube[key]
            if key in ("label", "template", "uuid")
            else qube["properties"].get(key, default)
        )
        if kind == "vm":
            if isinstance(value, str) and value.startswith("@"):
                value = WORLD.system.get(value[1:])
            return self.app.domains.get_blind(value) if value else None
        if value is None and kind in ("int", "bool"):
            raise AttributeError(key)
        if key == "virt_mode" and self.property_is_default(key):
            # core: qubes/vm/qubesvm.py, _default_virt_mode
            template = self.app.domains[qube["template"]] if qube["template"] else None
            return "hvm" if qube["pci"] else template.virt_mode if template else value
        return value

    def __setattr__(self, key, value):
        WORLD.call("admin.vm.property.Set", f"{self.name} {key}")
        # properties of the Python class are not sent to qubesd (client: qubesadmin/base.py)
        if key in ("klass", "volumes"):
            raise AttributeError(f"property '{key}' of 'QubesVM' object has no setter")
        self._known(key)
        if value is DEFAULT:
            return self.__delattr__(key)
        if key in READ_ONLY:
            raise exc.QubesPropertyAccessError(key)
        kind = self._types()[key][0]
        value = "" if value is None else str(value)
        if kind == "int":
            if not re.fullmatch(r"-?\d+", value):
                raise exc.QubesValueError("Failed to parse property value as int")
            value = int(value)
        elif kind == "bool":
            # core: qubes/__init__.py, property.bool
            words = {"1": True, "yes": True, "true": True, "on": True}
            words |= {"0": False, "no": False, "false": False, "off": False}
            if value.lower() not in words:
                raise exc.QubesValueError(f"Invalid literal for boolean property: {value!r}")
            value = words[value.lower()]
        elif kind == "vm" and value and value not in WORLD.qubes:
            raise exc.QubesPropertyValueError(f"Can't set {key} to non-existing qube {value}")
        elif kind == "label" and value not in LABELS:
            raise exc.QubesLabelNotFoundError(f"Label does not exist: {value}")
        if key == "netvm":
            self._network(value)
            self._startable_network(value)
        if key == "default_dispvm" and value and not self._disposables(value):
            # core: qubes/vm/__init__.py, validate_disposable_template, of 4.4: stricter than 4.3
            raise exc.QubesPropertyValueError(
                f"Cannot set invalid property to qube {self.name!r}, {key} {value!r} has"
                " template_for_dispvms set to False"
            )
        if key == "provides_network" and value is False:
            self._unused_network()
        if key == "template_for_dispvms" and value is False:
            self._unused_disposables()
        if key in ("ip", "ip6"):
            # core: qubes/vm/mix/net.py
            value = str(ipaddress.ip_address(value))
        if key == "mac":
            # core: qubes/vm/mix/net.py, _setter_mac
            value = value.lower()
        if key == "devices_denied":
            # core: qubes/vm/qubesvm.py, _setter_denied_list
            value = "".join(sorted({value[at : at + 7] for at in range(0, len(value), 7)}))
        if key == "virt_mode":
            # core: qubes/vm/qubesvm.py, _setter_virt_mode
            value = value.lower()
            if value == "pvh" and self._qube()["pci"]:
                raise exc.QubesPropertyValueError(
                    "pvh mode can't be set if pci devices are assigned"
                )
        qube = self._qube()
        if key == "template":
            if qube["running"]:
                raise exc.QubesVMNotHaltedError(f"Domain is not powered off: '{self.name}'")
            preloaded = qube["features"].get("preload-dispvm", "").split(" ")
            if any(
                other["running"] and other["template"] == self.name and name not in preloaded
                for name, other in WORLD.qubes.items()
            ):
                # core: qubes/vm/mix/dvmtemplate.py
                raise exc.QubesVMInUseError(
                    "Cannot change template while there are running disposables based on this"
                    " disposable template"
                )
            qube["template"] = value
            root, source = qube["volumes"]["root"], WORLD.qubes[value]["volumes"]["root"]
            # core: qubes/vm/appvm.py, template_changed_update_storage
            root.update(pool=source["pool"], source=source["vid"], rw=True)
        elif key == "label":
            qube["label"] = value
        else:
            qube["properties"][key] = value
        WORLD.save()
        return None

    def __delattr__(self, key):
        WORLD.call("admin.vm.property.Reset", f"{self.name} {key}")
        self._known(key)
        default = WORLD.system.get("default_netvm") if self.klass != "TemplateVM" else None
        if key == "netvm":
            # core: qubes/vm/mix/net.py, on_property_pre_reset_netvm
            self._network(default)
            if default != str(self.netvm or ""):
                self._startable_network(default)
        if key == "template_for_dispvms":
            self._unused_disposables()
        self._qube()["properties"].pop(key, None)
        WORLD.save()

    def _unused_disposables(self):
        """core: qubes/vm/mix/dvmtemplate.py, __on_pre_set_dvmtemplate"""
        if not self._disposables(self.name):
            return
        named = [WORLD.system.get("default_dispvm"), WORLD.dom0.get("default_dispvm")]
        for name, qube in WORLD.qubes.items():
            if name != self.name:
                named += [qube["template"], qube["properties"].get("default_dispvm")]
        if self.name in named:
            raise exc.QubesVMInUseError(
                "Cannot change template_for_dispvms to False while it is in use"
            )

    def _disposables(self, name):
        return WORLD.qubes[name]["properties"].get("template_for_dispvms", False)

    def _network(self, netvm):
        """core: qubes/vm/mix/net.py, _setter_netvm"""
        if netvm and not QubesVM(self.app, netvm).provides_network:
            raise exc.QubesValueError(f"The {netvm} qube does not provide network")
        if netvm and self._loops(netvm):
            raise exc.QubesValueError("Loops in network are unsupported")

    def _loops(self, netvm):
        """core: qubes/app.py, get_vms_connected_to"""
        connected, new = set(), {self.name}
        while new:
            above = new.pop()
            for name in WORLD.qubes:
                if name not in connected and self.app.domains[name]._netvm() == above:
                    connected.add(name)
                    new.add(name)
        return netvm == self.name or netvm in connected

    def _netvm(self):
        """Not a question to qubesd."""
        default = self._types().get("netvm", ("vm", None))[1]
        value = self._qube()["properties"].get("netvm", default)
        return WORLD.system.get("default_netvm") if value == "@default_netvm" else value

    def _startable_network(self, netvm):
        """core: qubes/vm/mix/net.py, on_property_pre_set_netvm, on_property_pre_reset_netvm"""
        if netvm and self._qube()["running"] and not WORLD.qubes[netvm]["running"]:
            raise exc.QubesVMNotStartedError(f"Cannot dynamically attach to stopped qube {netvm}")

    def _unused_network(self):
        """core: qubes/vm/mix/net.py, _setter_provides_network (a reset does not ask)"""
        if any(str(QubesVM(self.app, name).netvm) == self.name for name in WORLD.qubes):
            raise exc.QubesValueError(
                "The qube is still used by other qubes, change theirs 'netvm' first"
            )

    def __dir__(self):
        return [*super().__dir__(), *self._types()]


class _Features:
    """client: qubesadmin/features.py; core: qubes/api/admin.py, vm_feature_set."""

    def __init__(self, name):
        self._name = name

    def _all(self):
        WORLD.call("admin.vm.feature", self._name)
        if self._name == "dom0":
            return WORLD.features
        return WORLD.qubes[self._name]["features"]

    def __iter__(self):
        return iter(list(self._all()))

    def items(self):
        return ((key, self[key]) for key in self)

    def __getitem__(self, key):
        if key not in self._all():
            raise exc.QubesFeatureNotFoundError(f"Feature not set for domain {self._name}: {key}")
        return self._all()[key]

    def __setitem__(self, key, value):
        if isinstance(value, bool):
            value = "1" if value else ""
        value = str(value)
        if not re.fullmatch(r"[a-zA-Z0-9_.-]+", key):
            raise exc.QubesValueError("feature name contains illegal characters")
        if not re.fullmatch(r"[\x20-\x7E]*", value):
            raise exc.QubesValueError(f"{key} value contains illegal characters")
        if key == "preload-dispvm":
            # qubesd's own (core: qubes/ext/admin.py)
            raise exc.QubesDaemonAccessError
        self._all()[key] = value
        WORLD.save()

    def __delitem__(self, key):
        self[key]
        del self._all()[key]
        WORLD.save()


class _Tags:
    """client: qubesadmin/tags.py."""

    def __init__(self, name):
        self._name = name

    def _all(self):
        WORLD.call("admin.vm.tag", self._name)
        return WORLD.qubes[self._name]["tags"]

    def __iter__(self):
        return iter(sorted(self._all()))

    def add(self, tag):
        if not re.fullmatch(r"[a-zA-Z0-9_-]+", tag):
            raise exc.QubesDaemonAccessError
        if tag not in self._all():
            self._all().append(tag)
        WORLD.save()

    def discard(self, tag):
        if tag in self._all():
            self._all().remove(tag)
        WORLD.save()


class _Firewall:
    """client: qubesadmin/firewall.py; core: qubes/firewall.py, load_defaults."""

    def __init__(self, name):
        self._name = name

    @property
    def rules(self):
        WORLD.call("admin.vm.firewall.Get", self._name)
        kept = WORLD.qubes[self._name].get("firewall", ["action=accept"])
        return [firewall.Rule(rule) for rule in kept]

    def save_rules(self, rules):
        WORLD.call("admin.vm.firewall.Set", self._name)
        WORLD.qubes[self._name]["firewall"] = [rule.rule for rule in rules]
        WORLD.save()


def _devices(name):
    return (_Devices42 if WORLD.release == "4.2" else _Devices43)(name)


class _DevicesBase:
    def __init__(self, name):
        self._name = name

    def _pci(self):
        WORLD.call("admin.vm.device.pci", self._name)
        return WORLD.qubes[self._name]["pci"] if self._name != "dom0" else {}

    def _put(self, port, options):
        if port in self._pci():
            raise exc.DeviceAlreadyAssigned(f"pci device dom0:{port}:* already assigned")
        self._pci()[port] = dict(options)
        WORLD.save()

    def _take(self, port):
        if port not in self._pci():
            raise exc.DeviceNotAssigned(f"pci device dom0:{port}:* not assigned")
        del self._pci()[port]
        WORLD.qubes[self._name].get("pci_ids", {}).pop(port, None)
        WORLD.save()


class _Devices43(_DevicesBase):
    """client v4.3: qubesadmin/devices.py, DeviceCollection."""

    def get_exposed_devices(self):
        from qubesadmin.device_protocol import DeviceInfo, Port

        WORLD.call("admin.vm.device.pci.Available", self._name)
        for port, place in WORLD.hardware.items() if self._name == "dom0" else ():
            info = DeviceInfo(Port(Qubes().domains["dom0"], port, "pci"), "0x8086:0x9d2f::p0c0330")
            info.data["sbdf"] = place
            yield info

    def get_assigned_devices(self):
        from qubesadmin.device_protocol import DeviceAssignment, Port, VirtualDevice

        dom0 = Qubes().domains["dom0"]
        named = WORLD.qubes.get(self._name, {}).get("pci_ids", {})
        for port, options in self._pci().items():
            device = VirtualDevice(Port(dom0, port, "pci"), named.get(port, "*"))
            yield DeviceAssignment(device, self._name, options, "required")

    def assign(self, assignment):
        if assignment.mode != "required":
            raise exc.QubesValueError("PCI devices cannot be assigned as not required.")
        self._compared(assignment)
        self._put(assignment.port_id, assignment.options)
        if assignment.virtual_device.device_id != "*":
            named = WORLD.qubes[self._name].setdefault("pci_ids", {})
            named[assignment.port_id] = assignment.virtual_device.device_id

    def unassign(self, assignment):
        self._compared(assignment)
        self._take(assignment.port_id)

    @staticmethod
    def _compared(assignment):
        """core: qubes/api/admin.py, load_device_info, and qubes/ext/pci.py, _load_desc: what is not
        there is an error that nobody expects.
        """
        named = assignment.virtual_device.device_id != "*"
        if named and assignment.port_id not in WORLD.hardware:
            raise exc.QubesDaemonAccessError

    def attach(self, _assignment):
        raise exc.QubesValueError("PCI devices cannot be attached manually")

    def detach(self, _assignment):
        raise exc.QubesValueError("PCI devices cannot be detached manually")


class _Devices42(_DevicesBase):
    """client v4.2: qubesadmin/devices.py, DeviceCollection."""

    def assignments(self, persistent=None):
        from qubesadmin.devices import DeviceAssignment

        assert persistent is True
        dom0 = Qubes().domains["dom0"]
        for port, options in self._pci().items():
            yield DeviceAssignment(dom0, port, options, persistent=True)

    def available(self):
        from qubesadmin.devices import DeviceInfo

        WORLD.call("admin.vm.device.pci.Available", self._name)
        for place in WORLD.hardware.values() if self._name == "dom0" else ():
            ident = place.removeprefix("0000:").replace(":", "_")
            yield DeviceInfo(Qubes().domains["dom0"], "pci", ident)

    def attach(self, assignment):
        assert assignment.persistent
        # core v4.2: qubes/ext/pci.py, on_device_pre_attached_pci
        if f"0000:{assignment.ident.replace('_', ':')}" not in WORLD.hardware.values():
            raise exc.QubesException(f"Invalid PCI device: {assignment.ident}")
        if Qubes().domains[self._name].virt_mode == "pvh":
            raise exc.QubesException("Can't attach PCI device to VM in pvh mode")
        self._put(assignment.ident, assignment.options)

    def detach(self, assignment):
        # core v4.2: qubes/devices.py
        if WORLD.qubes[self._name]["running"]:
            raise exc.QubesVMNotHaltedError(
                "Can not remove a persistent attachment from a non halted vm"
            )
        self._take(assignment.ident)


def _block(name):
    return (_Block42 if WORLD.release == "4.2" else _Block43)(name)


class _Block43(_DevicesBase):
    """Devices of other qubes, which tests alone assign: {port: the qube whose it is}."""

    def get_assigned_devices(self):
        from qubesadmin.device_protocol import DeviceAssignment, Port, VirtualDevice

        domains = Qubes().domains
        for port, backend in WORLD.qubes.get(self._name, {}).get("block", {}).items():
            device = VirtualDevice(Port(domains[backend], port, "block"), "*")
            yield DeviceAssignment(device, self._name, {}, "required")


class _Block42(_DevicesBase):
    def assignments(self, persistent=None):
        from qubesadmin.devices import DeviceAssignment

        assert persistent is True
        domains = Qubes().domains
        for port, backend in WORLD.qubes.get(self._name, {}).get("block", {}).items():
            yield DeviceAssignment(domains[backend], port, {}, persistent=True)


class Volume:
    """client: qubesadmin/storage.py."""

    def __init__(self, vm, name):
        self.__dict__["vm"] = vm
        self.__dict__["name"] = name

    def _info(self):
        WORLD.call("admin.vm.volume.Info", f"{self.vm} {self.name}")
        return WORLD.qubes[self.vm]["volumes"][self.name]

    def __getattr__(self, key):
        if key.startswith("_"):
            raise AttributeError(key)
        info = self._info()
        if key == "usage":
            return WORLD.allocated(info)
        return info[key] if key in info else object.__getattribute__(self, key)

    def __setattr__(self, key, value):
        WORLD.call(f"admin.vm.volume.Set.{key}", f"{self.vm} {self.name}")
        info = self._info()
        if key == "rw":
            if WORLD.qubes[self.vm]["running"]:
                raise exc.QubesVMNotHaltedError(f"Domain is not powered off: '{self.vm}'")
        elif key == "ephemeral":
            # core: qubes/storage/__init__.py, ephemeral
            if value and (info["snap_on_start"] or info["save_on_stop"] or not info["rw"]):
                raise exc.QubesValueError(
                    "Cannot enable ephemeral on snap_on_start or save_on_stop or non-dom0 or not"
                    " writable volume"
                )
        elif key == "revisions_to_keep":
            # core: qubes/storage/file.py
            if WORLD.file(info) and not -1 <= value <= 1:
                raise exc.QubesDaemonAccessError
        else:
            raise AttributeError(key)
        info[key] = value
        WORLD.save()

    @property
    def revisions(self):
        WORLD.call("admin.vm.volume.ListSnapshots", f"{self.vm} {self.name}")
        info = WORLD.qubes[self.vm]["volumes"][self.name]
        return WORLD.revisions.get(f"{info['pool']} {info['vid']}", [])

    def clone(self, source):
        # core: qubes/api/admin.py (vm_volume_clone_to), qubes/storage/file.py (import_volume)
        WORLD.call("admin.vm.volume.CloneFrom", f"{source.vm} {source.name}")
        WORLD.call("admin.vm.volume.CloneTo", f"{self.vm} {self.name}")
        old, new = source._info(), self._info()
        if old["snap_on_start"]:
            raise exc.StoragePoolException(
                f"Can not import snapshot volume {old['vid']} in to pool {new['vid']} "
            )
        if new["save_on_stop"]:
            file = WORLD.file(new)
            if file:
                # what was there goes first
                file.unlink(missing_ok=True)
                with open(file, "a+b") as image:
                    image.truncate(old["size"])
                    image.seek(0)
                with open(file, "r+b") as image:
                    image.write(b"r" * WORLD.allocated(old))
            else:
                WORLD.usage[f"{new['pool']} {new['vid']}"] = WORLD.allocated(old)
            new["size"] = old["size"]
        WORLD.save()
