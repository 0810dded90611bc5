# SPDX-License-Identifier: GPL-2.0-or-later
"""The audit of qubes, and what is left of qubes that are no more, on the stand-in for qubesd."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError
from test_qubes import CLONE, DVM, EXAMPLE, Formula, ends_when

from conftest import REPO

LV = {"vg_name": "qubes_dom0", "pool_lv": "vm-pool", "lv_size": "2147483648", "lv_time": "then"}


class Dom0(Formula):
    """A dom0 whose root is on /dev/dm-1, as in a persistent boot, until `in_ram` is called."""

    def __init__(self, world, qubesd):
        super().__init__(world, qubesd)
        self.mounts = [
            {"target": "/", "source": "/dev/dm-1", "fstype": "ext4"},
            {"target": "/boot", "source": "/dev/sda2", "fstype": "ext4"},
        ]
        self.devices = {"/dev/dm-1": "disk", "/dev/dm-7": "disk", "/dev/zram3": "ram"}
        world.salt["ramboot.backing"] = lambda device: self.devices.get(device, "unknown")
        world.salt["ramboot_preflight.session_fault"] = lambda: None
        layout = world.salt["ramboot_preflight.root_layout"]
        world.salt["ramboot_preflight.root_layout"] = lambda: {**layout(), "mounts": self.mounts}
        world.module("ramboot_audit")
        self.audit = world.module("ramboot_qubes_audit")
        self.mapper("dm-7", "qubes_dom0-vm--pool-tpool")
        self.volumes = []
        self.run = []
        world.salt["cmd.run_all"] = self.command

    def mapper(self, device, name):
        self.world.write(f"/sys/block/{device}/dm/name", f"{name}\n")

    def in_ram(self):
        self.mounts[0] = {"target": "/", "source": "/dev/zram3", "fstype": "ext4"}

    def lv(self, name, **other):
        self.volumes.append({**LV, "lv_name": name, **other})

    def command(self, command, python_shell=None, env=None, ignore_retcode=False):
        self.run.append(command)
        if command[0] == "lvs":
            answer = json.dumps({"report": [{"lv": self.volumes}]})
            return {"retcode": 0, "stdout": answer, "stderr": ""}
        if command[0] == "lvremove":
            self.volumes = [v for v in self.volumes if f"qubes_dom0/{v['lv_name']}" != command[-1]]
        return {"retcode": 0, "stdout": "", "stderr": ""}

    def rows(self):
        return {row["place"]: (row["verdict"], row["finding"]) for row in self.places()}

    def places(self):
        return self.audit.places(self.mounts)

    def verdicts(self):
        return {place: verdict for place, (verdict, _finding) in self.rows().items()}


@pytest.fixture
def dom0(world, qubesd):
    return Dom0(world, qubesd)


def test_in_a_ram_session_the_example_is_stateless_and_the_rest_is_not(dom0):
    dom0.good(EXAMPLE)
    dom0.in_ram()
    found = dom0.rows()
    for name in (CLONE, DVM):
        assert found[f"qube {name}"][0] == "ram"
        assert found[f"qube {name}"][1].endswith(", halted, stateless")
        for volume in ("root", "private", "volatile"):
            assert found[f"qube {name} {volume}"][0] == "ram"
    assert found["qube sys-net"] == ("disk", "AppVM, on debian-12-xfce, halted, not stateless")
    assert found["qube sys-net private"] == (
        "disk",
        "pool vm-pool, thin pool qubes_dom0/vm-pool",
    )
    assert found["pool varlibqubes"][0] == "ram"
    assert found["default_pool_private"] == ("disk", "new qubes go to pool vm-pool")
    assert found["qubes"] == ("disk", "2 of 5 keep nothing outside of RAM")
    # nobody writes to the kernel
    assert not [place for place in found if place.endswith("kernel")]


def test_a_qube_in_ram_that_opens_disposables_on_the_disk_leaves_traces(dom0, qubesd):
    low = {"low": {"template": "debian-12-xfce"}}
    opens = {"a": "default-dvm", "b": DVM, "c": "none", "d": "low"}
    apps = {name: {"template": CLONE, "default_dispvm": dispvm} for name, dispvm in opens.items()}
    dom0.good({**EXAMPLE, "low_ram": low, "app_qubes": apps})
    told = "AppVM, on debian-12-xfce-stateless, halted, stateless"
    persistent = dom0.rows()
    assert not [finding for _verdict, finding in persistent.values() if "but opens" in finding]
    dom0.in_ram()
    found = dom0.rows()
    elsewhere = f"{told} but opens disposables of default-dvm, which are on the disk"
    assert found["qube a"] == ("trace", elsewhere)
    assert found["qube a root"][0] == found["qube a private"][0] == "ram"
    assert found["qube b"] == found["qube c"] == ("ram", told)
    assert found["qube d"] == (
        "trace",
        f"{told} but opens disposables of low, which are not in RAM alone",
    )
    # what can't be started opens nothing
    assert found[f"qube {CLONE}"][0] == "ram"
    assert found["qubes"][1] == "4 of 10 keep nothing outside of RAM"
    # with snapshot the disk is covered
    dom0.devices["/dev/dm-7"] = "ram"
    assert dom0.rows()["qube a"] == ("ram", told)


def test_a_disposable_that_ends_when_it_is_asked_what_it_opens_is_passed_over(dom0, qubesd):
    dom0.good(EXAMPLE)
    dom0.in_ram()
    sys.modules["qubesadmin"].Qubes().add_new_vm("DispVM", "disp7", "red", template=DVM)
    ends_when(dom0, qubesd, "disp7", "properties")
    assert dom0.rows()[f"qube {DVM}"][0] == "ram"
    assert "disp7" not in qubesd.qubes


def test_the_leak_of_the_threads_recipe_is_named(dom0):
    """An AppVM with -P varlibqubes on an ordinary template: its root is on the disk."""
    sys.modules["qubesadmin"].Qubes().add_new_vm(
        "AppVM", "mine", "red", template="debian-12-xfce", pool="varlibqubes"
    )
    dom0.in_ram()
    found = dom0.verdicts()
    assert (found["qube mine private"], found["qube mine volatile"]) == ("ram", "ram")
    assert found["qube mine root"] == found["qube mine"] == "disk"


def test_disposables_alive_and_preloaded_are_told(dom0, qubesd):
    dom0.good(EXAMPLE)
    dom0.in_ram()
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("DispVM", "disp1", "red", template=DVM)
    app.add_new_vm("DispVM", "disp2", "red", template="default-dvm")
    qubesd.run("disp1")
    qubesd.qubes["default-dvm"]["features"]["preload-dispvm-max"] = "2"
    found = dom0.rows()
    assert found["qube disp1"] == ("ram", f"DispVM, on {DVM}, running, stateless")
    assert found["qube disp2"][0] == "disk"
    assert found["qube default-dvm"][1] == (
        "AppVM, on debian-12-xfce, halted, its disposables are started before anybody asks, not"
        " stateless"
    )


def test_preloaded_disposables_of_the_systems_default_are_told(dom0, qubesd):
    dom0.good(EXAMPLE)
    told = "its disposables are started before anybody asks"
    qubesd.system["default_dispvm"] = DVM
    assert told not in dom0.rows()[f"qube {DVM}"][1]
    qubesd.features["preload-dispvm-max"] = "1"
    found = dom0.rows()
    assert told in found[f"qube {DVM}"][1]
    assert told not in found["qube default-dvm"][1]


@pytest.mark.parametrize("question", ["volumes", "preload_holder", "features"])
def test_a_disposable_that_ends_during_the_audit_needs_no_row(dom0, qubesd, question):
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("DispVM", "disp7", "red", template="default-dvm")
    before = dom0.rows()
    ends_when(dom0, qubesd, "disp7", question)
    found = dom0.rows()
    assert "disp7" not in qubesd.qubes
    told = [place for place in before if place.split()[:2] == ["qube", "disp7"]]
    assert told
    assert set(found) == set(before) - set(told)
    assert found["qubes"][1] == "0 of 3 keep nothing outside of RAM"


def test_a_disposable_that_ends_late_in_the_audit_costs_no_other_row(dom0, qubesd):
    """When what is left over is looked for."""
    sys.modules["qubesadmin"].Qubes().add_new_vm("DispVM", "disp7", "red", template="default-dvm")
    before = dom0.rows()
    volumes, asked = dom0.world.salt["ramboot_qubesadmin.volumes"], []

    def ask(name):
        asked.append(name)
        if asked.count("disp7") == 2 and "disp7" in qubesd.qubes:
            del sys.modules["qubesadmin"].Qubes().domains["disp7"]
        return volumes(name)

    dom0.world.salt["ramboot_qubesadmin.volumes"] = ask
    assert dom0.rows() == before
    assert "disp7" not in qubesd.qubes


def test_a_qube_of_before_that_ends_during_the_audit_was_removed_in_the_session(dom0, qubesd):
    dom0.in_ram()
    dom0.world.salt["ramboot_preflight.session_fault"] = lambda: "a session"
    dom0.audit._at_start = lambda: {"debian-12-xfce", "sys-net", "default-dvm", "old"}
    sys.modules["qubesadmin"].Qubes().add_new_vm("AppVM", "old", "red", template="debian-12-xfce")
    ends_when(dom0, qubesd, "old", "volumes")
    assert dom0.rows()["qube old"][1].startswith("removed in this session")


def test_a_qube_that_is_still_there_and_can_not_be_asked_stops_the_audit_of_qubes(dom0, qubesd):
    sys.modules["qubesadmin"].Qubes().add_new_vm("DispVM", "disp7", "red", template="default-dvm")
    dom0.fail("admin.vm.volume.List", "disp7", OSError("no answer"))
    with pytest.raises(CommandExecutionError, match="the volumes of disp7"):
        dom0.rows()


@pytest.mark.parametrize("action", ["orphans", "remove_orphans"])
def test_what_is_left_over_is_not_told_while_a_qube_ends(dom0, qubesd, action):
    sys.modules["qubesadmin"].Qubes().add_new_vm("DispVM", "disp7", "red", template="default-dvm")
    ends_when(dom0, qubesd, "disp7", "volumes")
    with pytest.raises(CommandExecutionError, match="there is no qube disp7"):
        dom0.audit.orphans() if action == "orphans" else dom0.audit.remove_orphans("t0")


def test_a_qube_of_another_machine_is_none_of_this_ones(dom0, qubesd):
    qubesd.qubes["remote"] = {**qubesd.qubes["sys-net"], "class": "RemoteVM", "volumes": {}}
    assert "qube remote" not in dom0.rows()


def test_a_low_ram_template_leaves_its_name_at_most(dom0):
    dom0.good(
        {
            "low_ram": {
                "low": {"template": "debian-12-xfce"},
                "key": {"template": "debian-12-xfce", "volatile": "ephemeral"},
            }
        }
    )
    dom0.in_ram()
    found = dom0.rows()
    assert found["qube low root"] == (
        "trace",
        "pool vm-pool, thin pool qubes_dom0/vm-pool; read-only, but its name reaches LVM's"
        " metadata",
    )
    assert found["qube low volatile"][0] == "ram"
    assert found["qube low"][0] == "trace"
    assert found["qube key volatile"] == (
        "trace",
        "pool vm-pool, thin pool qubes_dom0/vm-pool; encrypted with a key that goes with the qube",
    )


@pytest.mark.parametrize(
    ("pool", "device"),
    [
        ("vm-pool", "qubes_dom0-vm--my--key_1--volatile@crypt"),
        ("usb", "vm-volatile-my_dkey_u1-crypt@volatile"),
    ],
)
def test_a_running_qube_is_encrypted_only_if_it_was_started_so(dom0, qubesd, pool, device):
    qubesd.add_pool("usb", "file", dir_path=f"{dom0.world.root}/mnt/usb")
    app = sys.modules["qubesadmin"].Qubes()
    made = {"template": "debian-12-xfce", "pools": {"volatile": pool}}
    app.add_new_vm("AppVM", "my-key_1", "red", **made).volumes["volatile"].ephemeral = True
    dom0.in_ram()
    dom0.mounts.append({"target": f"{dom0.world.root}/mnt", "source": "/dev/dm-1", "fstype": "x"})
    place = "qube my-key_1 volatile"
    assert dom0.verdicts()[place] == "trace"
    # qubesd sets it of one that runs too, and decides at the start
    qubesd.run("my-key_1")
    verdict, words = dom0.rows()[place]
    assert verdict == "disk"
    assert words.endswith(
        "; not encrypted: ephemeral was set while it ran, and counts from a start on"
    )
    assert [row["ephemeral"] for row in dom0.places() if row["place"] == place] == [False]
    dom0.mapper("dm-9", device)
    assert dom0.verdicts()[place] == "trace"


# What README's table says of a cell, and what the audit finds.
FORGOTTEN = {"ram": "forgotten", "disk": "**"}
LOW_RAM = {"ram": "RAM", "trace": "on the disk, the key in RAM"}


def all_kinds(dom0):
    """{row of README's table: its qubes}."""
    dom0.good(
        {
            **EXAMPLE,
            "app_qubes": {"work": {"template": CLONE}},
            "standalones": {"alone": {"source": "debian-12-xfce"}},
            "disposables": {"sys-ram": {"template": DVM}},
            "low_ram": {
                "low": {"template": "debian-12-xfce"},
                "key": {"template": "debian-12-xfce", "volatile": "ephemeral"},
            },
            "save": {"save": {"template": "debian-12-xfce"}},
        }
    )
    add = sys.modules["qubesadmin"].Qubes().add_new_vm
    for name, template in (("1", DVM), ("2", "low"), ("3", "key"), ("4", "default-dvm")):
        add("DispVM", f"disp{name}", "red", template=template)
    add("AppVM", "new", "red", template=CLONE, pool="varlibqubes")
    add("AppVM", "leak", "red", template="debian-12-xfce", pool="varlibqubes")
    add("StandaloneVM", "made", "red")
    return {
        "`templates`, `standalones`, `app_qubes`, `disposable_templates`, `disposables`": (
            CLONE, "alone", "work", DVM, "sys-ram",
        ),
        "disposables of `disposable_templates`; a qube made in the session, in `varlibqubes`, on"
        " one of `templates`": ("disp1", "new"),
        "app qube in `varlibqubes` on an ordinary template": ("leak",),
        "disposables of `low_ram`, `volatile: pool`": ("disp2",),
        "disposables of `low_ram`, `volatile: ephemeral`": ("disp3",),
        "disposables of `default-dvm`": ("disp4",),
        "app qube on the disk": ("sys-net",),
        "`save`": ("save",),
        "a qube made in the session in `vm-pool`": ("made",),
    }  # fmt: skip


def test_the_table_of_what_forgets_what_is_what_the_audit_finds(dom0):
    text = (REPO / "README.md").read_text()
    table = text[text.index("| | root | private | its name | |") :].partition("\n\n")[0]
    cells = {
        row[0]: row[1:]
        for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        if row[0] not in ("", "---", "dom0")
    }
    kinds = all_kinds(dom0)
    assert set(cells) == set(kinds)
    dom0.in_ram()
    found = dom0.verdicts()
    for kind, names in kinds.items():
        root, private, named = cells[kind][:3]
        for name in names:
            if "`low_ram`" in kind:
                assert found[f"qube {name} root"] == "trace", name
                assert root.startswith("read-only; what is written ")
                assert root.endswith(LOW_RAM[found[f"qube {name} volatile"]]), name
            else:
                assert root.startswith(FORGOTTEN[found[f"qube {name} root"]]), name
            assert private.startswith(FORGOTTEN[found[f"qube {name} private"]]), name
            in_metadata = any(
                row["pool"] == "vm-pool" for row in dom0.places() if row.get("qube") == name
            )
            assert not in_metadata or named.startswith("**kept**"), name
    # the backend snapshot
    dom0.devices["/dev/dm-7"] = "ram"
    assert set(dom0.verdicts().values()) == {"ram"}


def test_in_a_persistent_boot_the_finding_says_what_a_ram_session_would_keep(dom0, qubesd):
    dom0.good(EXAMPLE)
    found = dom0.rows()
    top = qubesd.pools["varlibqubes"]["dir_path"]
    file = f"{top}/vm-templates/{CLONE}/root.img"
    assert found[f"qube {CLONE} root"] == (
        "disk",
        f"pool varlibqubes, {file} on /dev/dm-1, with the root in RAM in a RAM session",
    )
    assert found["qube sys-net private"][1] == "pool vm-pool, thin pool qubes_dom0/vm-pool"


def test_a_volume_is_told_by_its_parts_too(dom0, qubesd):
    dom0.good(EXAMPLE)
    dom0.in_ram()
    parts = ("qube", "volume", "pool", "device", "ephemeral")
    found = {
        row["place"]: tuple(row[key] for key in parts) for row in dom0.places() if "qube" in row
    }
    below = dom0.world.root / "var/lib/qubes"
    assert found[f"qube {CLONE} root"] == (
        CLONE,
        "root",
        "varlibqubes",
        f"{below}/vm-templates/{CLONE}/root.img",
        False,
    )
    assert found["qube sys-net private"][2:] == ("vm-pool", "qubes_dom0/vm-sys-net-private", False)


def test_a_disk_mounted_inside_the_ram_pool_is_found_before_the_qube_runs(dom0):
    dom0.good(EXAMPLE)
    sys.modules["qubesadmin"].Qubes().add_new_vm("DispVM", "disp1", "red", template=DVM)
    dom0.in_ram()
    below = dom0.world.root / "var/lib/qubes/appvms/disp1"
    dom0.mounts.append({"target": str(below), "source": "/dev/dm-1", "fstype": "ext4"})
    # a snapshot's own file is made at the start
    assert not (below / "root.img").exists()
    assert dom0.verdicts()["qube disp1 root"] == "disk"
    assert dom0.verdicts()[f"qube {DVM} root"] == "ram"


@pytest.mark.parametrize("place", ["/mnt/usb", "/mnt/usb/qubes"])
def test_a_pool_that_is_not_mounted_is_not_known(dom0, qubesd, place):
    """Its path would be on the root, which goes with the power; its volumes are not."""
    top = Path(f"{dom0.world.root}{place}")
    top.mkdir(parents=True)
    app = sys.modules["qubesadmin"].Qubes()
    app.add_pool("usb", "file", dir_path=str(top))
    app.add_new_vm("AppVM", "mine", "red", template="debian-12-xfce", pool="usb")
    qubesd.system["default_pool_private"] = "usb"
    dom0.in_ram()
    found = dom0.verdicts()
    assert {found[f"qube mine {volume}"] for volume in ("private", "volatile")} == {"ram"}
    stick = dom0.world.root / "mnt/usb"
    stick.rename(dom0.world.root / "stick")
    stick.mkdir()
    found = dom0.rows()
    told = ("unknown", f"{top}, where the pool's directories are not there")
    assert found["pool usb"] == ("unknown", f"file, {told[1]}")
    for volume in ("private", "volatile"):
        assert found[f"qube mine {volume}"] == ("unknown", f"pool usb, {told[1]}")
    assert found["default_pool_private"][0] == "unknown"
    assert found["qube mine"][1].endswith("not stateless")


@pytest.mark.parametrize(("name", "verdict"), [(None, "unknown"), ("private-dirty.img", "ram")])
def test_a_volume_without_its_file_is_not_known(dom0, qubesd, name, verdict):
    """file-reflink calls it so while a qube runs without snapshots."""
    dom0.good(EXAMPLE)
    sys.modules["qubesadmin"].Qubes().add_new_vm("DispVM", "disp1", "red", template=DVM)
    dom0.in_ram()
    file = dom0.world.root / f"var/lib/qubes/appvms/{DVM}/private.img"
    file.rename(file.with_name(name or "elsewhere"))
    found = dom0.rows()
    assert found[f"qube {DVM} private"][0] == verdict
    assert found[f"qube {DVM} private"][1].endswith("its file is not there") == (name is None)
    # what is made at the start is not missed
    assert found["qube disp1 private"][0] == "ram"
    told = f"stateless but opens disposables of {DVM}, which are not known to be in RAM"
    assert found["qube disp1"][1].endswith("halted, stateless" if name else f"halted, {told}")


def session(dom0, copies):
    """A RAM session that began with these qubes, and copies of earlier boots."""
    dom0.in_ram()
    dom0.world.salt["ramboot_preflight.session_fault"] = lambda: "this is a RAM session"
    dom0.world.write("/proc/stat", "btime 1790000000\n")
    for name, (when, text) in copies.items():
        os.utime(dom0.world.write(f"/var/lib/qubes/backup/{name}", text), (when, when))


def qubes_xml(*names):
    """As core: qubes/app.py and qubes/__init__.py write it."""
    domains = "".join(
        f'<domain id="domain-{number}" class="AppVM"><properties><property name="qid">{number}'
        f'</property><property name="name">{name}</property></properties><tags><tag name="x"/>'
        "</tags></domain>"
        for number, name in enumerate(names)
    )
    return f"<qubes><labels/><pools/><properties/><domains>{domains}</domains></qubes>"


THERE = ("debian-12-xfce", "sys-net", "default-dvm")
START, BOOT = "qubes at the start of this session", 1790000000


def test_qubes_made_and_removed_in_a_ram_session_are_told(dom0, qubesd):
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("AppVM", "new", "red", template="debian-12-xfce")
    qubesd.run("debian-12-xfce")
    session(
        dom0,
        {
            "qubes-2026-09-20-10:00:00.xml": (BOOT - 90000, qubes_xml("older")),
            "qubes-2026-09-21-16:14:00.xml": (BOOT + 40, qubes_xml(*THERE, "gone")),
            "qubes-2026-09-21-17:00:00.xml": (BOOT + 3000, qubes_xml(*THERE, "new")),
        },
    )
    found = dom0.rows()
    assert found["qube new"] == (
        "disk",
        "AppVM, on debian-12-xfce, halted, not stateless, made in this session: dom0 forgets it at"
        " power-off",
    )
    assert found["qube gone"] == (
        "trace",
        "removed in this session: its volumes are gone, and dom0 lists it again at the next boot",
    )
    assert "made in this session" not in found["qube sys-net"][1]
    assert "qube older" not in found
    assert START not in found


@pytest.mark.parametrize("backend", ["zram", "snapshot"])
def test_an_update_that_will_be_forgotten_is_told_of_who_runs(dom0, qubesd, backend):
    dom0.good({**EXAMPLE, "standalones": {"alone": {"source": "debian-12-xfce"}}})
    for name in ("debian-12-xfce", CLONE, "alone", "sys-net"):
        qubesd.run(name)
    session(dom0, {"qubes-1.xml": (BOOT, qubes_xml(*THERE, CLONE, "alone"))})
    if backend == "snapshot":
        dom0.devices |= {"/dev/dm-1": "ram", "/dev/dm-7": "ram"}
    end = ", an update now is forgotten at power-off: update in a persistent boot"
    told = {place for place, (_verdict, finding) in dom0.rows().items() if finding.endswith(end)}
    on_disk = {"qube debian-12-xfce"} if backend == "snapshot" else set()
    assert told == {f"qube {CLONE}", "qube alone"} | on_disk


@pytest.mark.parametrize(
    ("copies", "told"),
    [
        ({}, "has no copy of qubes.xml of this boot"),
        ({"qubes-x.xml": (BOOT - 90000, qubes_xml())}, "has no copy of qubes.xml of this boot"),
        ({"qubes-x.xml": (BOOT + 9, "<qubes>")}, "no element found"),
    ],
    ids=["none", "of another boot", "cut off"],
)
def test_a_session_whose_start_can_not_be_told_is_not_known(dom0, copies, told):
    session(dom0, copies)
    verdict, finding = dom0.rows()[START]
    assert verdict == "unknown"
    assert told in finding
    # the rest is told all the same
    assert dom0.rows()["qube sys-net"][0] == "disk"


def test_a_link_to_the_disk_below_the_ram_pool_is_found(dom0, qubesd, tmp_path):
    """The thread's secondary storage: directories of qubes that are links to a disk."""
    dom0.good(EXAMPLE)
    dom0.in_ram()
    qube = Path(qubesd.pools["varlibqubes"]["dir_path"], "appvms", DVM)
    disk = tmp_path / "disk"
    qube.rename(disk)
    qube.symlink_to(disk)
    dom0.mounts.append({"target": str(disk), "source": "/dev/dm-1", "fstype": "ext4"})
    assert dom0.verdicts()[f"qube {DVM} private"] == "disk"


def test_volumes_on_a_sealed_disk_take_no_traces(dom0):
    dom0.in_ram()
    dom0.devices["/dev/dm-7"] = "sealed"
    found = dom0.rows()
    sealed = "thin pool qubes_dom0/vm-pool, on the sealed disk, which refuses every write"
    assert found["pool vm-pool"] == ("ram", f"lvm_thin, {sealed}")
    assert found["qube default-dvm private"] == ("ram", f"pool vm-pool, {sealed}")


# Fail closed


def test_a_pool_beside_the_seal_is_on_the_disk(dom0):
    dom0.in_ram()
    dom0.mapper("dm-8", "qubes_dom0-vm--pool_tdata")
    dom0.devices |= {"/dev/dm-7": "sealed", "/dev/dm-8": "disk"}
    assert dom0.rows()["pool vm-pool"][0] == "disk"


def test_a_pool_that_is_not_known_or_not_there_is_unknown(dom0, qubesd):
    dom0.in_ram()
    qubesd.add_pool("zp", "zfs", container="x")
    qubesd.qubes["sys-net"]["volumes"]["private"]["pool"] = "zp"
    qubesd.qubes["default-dvm"]["volumes"]["private"]["pool"] = "gone"
    found = dom0.rows()
    assert found["pool zp"][0] == found["qube sys-net private"][0] == "unknown"
    assert found["qube default-dvm private"] == (
        "unknown",
        "pool gone, a pool that is not there",
    )


def test_a_thin_pool_that_is_not_active_is_unknown(dom0):
    (dom0.world.root / "sys/block/dm-7/dm/name").unlink()
    assert dom0.rows()["pool vm-pool"] == (
        "unknown",
        "lvm_thin, thin pool qubes_dom0/vm-pool, which is not active",
    )


def test_a_device_that_can_not_be_told_makes_its_qubes_unknown(dom0):
    dom0.good(EXAMPLE)
    dom0.mounts[0]["source"] = "/dev/loop9"
    assert dom0.verdicts()[f"qube {CLONE}"] == "unknown"


def test_a_qube_without_volumes_is_unknown(dom0, qubesd):
    qubesd.qubes["sys-net"]["volumes"] = {}
    assert dom0.rows()["qube sys-net"] == (
        "unknown",
        "AppVM, on debian-12-xfce, halted, not stateless",
    )


def test_qubes_without_its_api_is_a_fault_and_no_qubes_is_none(dom0):
    dom0.world.salt["ramboot_qubesadmin.available"] = lambda: False
    assert dom0.places() == []
    dom0.world.write("/var/lib/qubes/qubes.xml")
    with pytest.raises(CommandExecutionError, match="its Python API"):
        dom0.places()


@pytest.mark.parametrize("method", ["admin.vm.List", "admin.vm.volume.Info", "admin.pool.Info"])
def test_a_qubesd_that_does_not_answer_is_a_row_that_counts_as_a_trace(dom0, method):
    """Through ramboot.audit, which tells what could not be determined."""
    exc = sys.modules["qubesadmin.exc"]
    dom0.fail(method, error=exc.QubesDaemonCommunicationError("gone"))
    ramboot = dom0.world.module("ramboot")
    ramboot._all_mounts = lambda: dom0.mounts
    ((row,), told) = ramboot._tried(ramboot._audit_qubes)
    assert (row["place"], row["verdict"], told) == ("qubes", "unknown", False)
    assert "qubesd can't be reached: gone" in row["finding"]


def test_lvm_that_does_not_answer_is_told(dom0):
    dom0.world.salt["cmd.run_all"] = lambda *_a, **_k: {
        "retcode": 5,
        "stdout": "",
        "stderr": "no lock",
    }
    with pytest.raises(CommandExecutionError, match="no lock"):
        dom0.places()


def test_a_pool_on_a_mount_that_the_session_lacks_would_not_be_known(dom0, qubesd):
    top = dom0.world.root / "mnt/usb"
    top.mkdir(parents=True)
    app = sys.modules["qubesadmin"].Qubes()
    app.add_pool("usb", "file", dir_path=str(top))
    ramboot = dom0.world.module("ramboot")
    ramboot._all_mounts = lambda: [
        *dom0.mounts,
        {"target": str(top), "source": "/dev/sdb1", "fstype": "ext4"},
    ]
    dom0.devices |= {"/dev/sdb1": "disk", "tmpfs": "ram"}
    dom0.world.salt["ramboot.backing"] = lambda device: dom0.devices.get(device, "unknown")
    told = {"mounts": True, "layer": False, "lvm": True, "swap": False}
    for mounts, verdict in ((True, "disk"), (False, "unknown")):
        dom0.world.context[ramboot.PRETEND] = {**told, "mounts": mounts}
        found = {row["place"]: row["verdict"] for row in ramboot._audit_qubes()}
        assert (found["pool usb"], found["pool varlibqubes"]) == (verdict, "ram")


NOTED = {
    "schema": 1,
    "session": "ram",
    "backend": "zram",
    "disk": "detached",
    "source": {"device": "/dev/qubes_dom0/root"},
}


def noted_in_ram(dom0, **noted):
    dom0.in_ram()
    dom0.world.write("/run/ramboot/status.json", json.dumps({**NOTED, **noted}))
    run = {"target": f"{dom0.world.root}/run", "source": "tmpfs", "fstype": "tmpfs"}
    dom0.mounts.append(run)


def detached(dom0, **noted):
    """A RAM session with the disk closed: neither the pool nor a volume of its group shows."""
    dom0.good(EXAMPLE)
    noted_in_ram(dom0, **noted)
    (dom0.world.root / "sys/block/dm-7/dm/name").unlink()


@pytest.mark.parametrize(
    "case",
    [
        {"session": "persistent"},
        {"backend": "overlay"},
        "not excluded",
        "on a mount of its own",
        "wrong pillar",
        None,
    ],
    ids=str,
)
def test_what_no_copy_took_along_is_out_of_reach(dom0, qubesd, case):
    """As README has it of a root that holds every qube."""
    add = sys.modules["qubesadmin"].Qubes().add_new_vm
    add("StandaloneVM", "mine", "red", pool="varlibqubes")
    noted_in_ram(dom0, **(case if isinstance(case, dict) else {"disk": "attached"}))
    top = dom0.world.root / "var/lib/qubes/appvms/mine"
    exclude = str(top / "*").replace(str(dom0.world.root), "")
    for file in top.glob("*.img"):
        file.unlink()
    covered = str(top.parent / "*")
    dom0.world.pillar["ramboot"] = {"copy": {"exclude": [covered]}}
    if case == "not excluded":
        dom0.world.pillar["ramboot"] = {"copy": {"exclude": [exclude]}}
    elif case == "on a mount of its own":
        dom0.mounts.append({"target": str(top), "source": "/dev/zram3", "fstype": "ext4"})
    elif case == "wrong pillar":
        dom0.world.pillar["ramboot"] = {"copy": 1}
    verdict, finding = dom0.rows()["qube mine private"]
    if case is None:
        assert verdict == "ram"
        assert finding.endswith("; left behind by copy:exclude, out of reach")
        assert dom0.rows()["qube mine"] == ("ram", "StandaloneVM, halted, out of reach")
    else:
        assert verdict == "unknown"
        assert finding.endswith("; its file is not there")


def test_with_the_disk_detached_what_is_on_it_is_out_of_reach(dom0):
    detached(dom0)
    # another group
    dom0.mapper("dm-9", "qubes_dom0--old-root")
    dom0.lv("root", vg_name="qubes_dom0-old", pool_lv="")
    found = dom0.rows()
    reached = "thin pool qubes_dom0/vm-pool, on the disk that was detached; out of reach"
    assert found["qube sys-net private"] == ("ram", f"pool vm-pool, {reached}")
    assert found["qube sys-net"] == ("ram", "AppVM, on debian-12-xfce, halted, out of reach")
    assert found[f"qube {CLONE}"][1].endswith(", halted, stateless")
    assert found["pool vm-pool"] == ("ram", f"lvm_thin, {reached}")
    assert {verdict for verdict, _finding in found.values()} == {"ram"}


@pytest.mark.parametrize(
    "case",
    [
        {"disk": "attached"},
        {"session": "persistent"},
        {"schema": 2},
        {"source": None},
        {"source": {"device": "/dev/sda2"}},
        {"source": {"device": "/dev/mapper/qubes_dom0--old-root"}},
        "a mapping",
        "a volume",
        "not of this boot",
        "no note",
        "no json",
    ],
    ids=str,
)
def test_a_disk_that_may_be_in_reach_is_not_known(dom0, case):
    detached(dom0, **(case if isinstance(case, dict) else {}))
    note = dom0.world.root / "run/ramboot/status.json"
    if case == "a mapping":
        dom0.mapper("dm-9", "qubes_dom0-swap")
    elif case == "a volume":
        dom0.lv("root", pool_lv="")
    elif case == "not of this boot":
        dom0.mounts.pop()
    elif case == "no note":
        note.unlink()
    elif case == "no json":
        note.write_text("[]")
    found = dom0.rows()
    assert found["qube sys-net private"] == (
        "unknown",
        "pool vm-pool, thin pool qubes_dom0/vm-pool, which is not active",
    )
    assert found["qube sys-net"][1].endswith("not stateless")


@pytest.mark.parametrize("device", ["/dev/qubes-x/root", "/dev/mapper/qubes--x-root"])
def test_a_group_with_a_hyphen_is_the_one_that_was_detached(dom0, qubesd, device):
    detached(dom0, source={"device": device})
    qubesd.pools["vm-pool"]["volume_group"] = "qubes-x"
    assert dom0.verdicts()["pool vm-pool"] == "ram"
    qubesd.pools["vm-pool"]["volume_group"] = "qubes"
    assert dom0.verdicts()["pool vm-pool"] == "unknown"


# What is left over


def leave(dom0, qubesd):
    """What a RAM session leaves: volumes and a directory of a qube that qubesd does not know."""
    for name in ("vm-gone-private", "vm-gone-volatile-snap", "vm-a-b-root-1700000000-back"):
        dom0.lv(name)
    # of qubes that are there, of nobody, of another pool
    for name in ("vm-sys-net-private", "vm-sys-net-private-snap", "root", "swap"):
        dom0.lv(name)
    dom0.lv("vm-other-private", pool_lv="root-pool")
    top = Path(qubesd.pools["varlibqubes"]["dir_path"])
    for name in ("gone-too", "lost+found", ".hidden"):
        (top / "appvms" / name).mkdir()
    assert (top / "appvms/sys-net").is_dir()
    (top / "appvms/gone-too/private.img").write_bytes(b"x" * 8192)
    return top


def test_what_is_left_over_is_listed_and_nothing_else(dom0, qubesd):
    top = leave(dom0, qubesd)
    found = dom0.audit.orphans()
    assert [(item["what"], item["kind"], item["qube"]) for item in found["orphans"]] == [
        (f"{top}/appvms/gone-too", "directory", "gone-too"),
        ("qubes_dom0/vm-a-b-root-1700000000-back", "volume", "a-b"),
        ("qubes_dom0/vm-gone-private", "volume", "gone"),
        ("qubes_dom0/vm-gone-volatile-snap", "volume", "gone"),
    ]
    assert found["orphans"][0]["bytes"] == 8192
    assert found["token"][0] == "t"
    assert dom0.rows()["left over qubes_dom0/vm-gone-private"] == (
        "trace",
        "of gone, which is no more",
    )


STALE = "the image of 2026-05-01T10:00:00Z is stale: changed since: packages or kernels"
BUILT = "this image (built 2026-05-01T10:00:00Z)"


@pytest.mark.parametrize(
    "noted",
    [
        {"backend": "image", "reason": f"the disk is write-protected; {STALE}"},
        {"backend": "image", "reason": None},
        # it was copied instead
        {"backend": "zram", "reason": f"{STALE}; the root was copied (zram) instead"},
        None,
    ],
    ids=str,
)
def test_what_a_stale_image_does_not_know_may_be_of_qubes_made_since(dom0, qubesd, noted):
    top = leave(dom0, qubesd)
    dom0.lv("vm-default-dvm-private", pool_lv="vm-pool")
    qubesd.qubes["default-dvm"]["volumes"]["private"]["vid"] = "qubes_dom0/other"
    token = dom0.audit.orphans()["token"]
    if noted:
        noted_in_ram(dom0, disk="attached", **noted)
        dom0.world.salt["ramboot_preflight.session_fault"] = lambda: "this is a RAM session"
        # as those of the boot are
        dom0.world.salt["ramboot_audit.booted"] = lambda: 0
    found, listed = dom0.rows(), dom0.audit.orphans()
    gone = found["left over qubes_dom0/vm-gone-private"]
    other = found["left over qubes_dom0/vm-default-dvm-private"]
    assert [item["qube"] for item in listed["orphans"]] == ["gone-too", "a-b", "gone", "gone"]
    if noted and noted["backend"] == "image" and noted["reason"]:
        assert gone == ("unknown", f"of gone, not known to {BUILT}; may be a qube made since")
        words = "bears the name of qube default-dvm, which does not have it in"
        assert other == ("unknown", f"{words} {BUILT}; may have it since")
        # this is the image's own
        assert found[f"left over {top}/appvms/gone-too"] == ("ram", "of gone-too, which is no more")
        note = f"their qubes are not known to {BUILT}; may be qubes made since"
        assert (listed["token"], listed["note"]) == (None, note)
    else:
        assert gone == ("trace", "of gone, which is no more")
        assert other == ("trace", "bears the name of qube default-dvm, which does not have it")
        assert (listed["token"], "note" in listed) == (token, False)


def test_what_bears_the_name_of_a_qube_that_does_not_have_it_is_told_and_kept(dom0, qubesd):
    """Made in a RAM session in vm-pool, and anew in a persistent boot in another pool."""
    add = sys.modules["qubesadmin"].Qubes().add_new_vm
    add("AppVM", "mine", "red", template="debian-12-xfce", pool="varlibqubes")
    qubesd.add_pool("other", "file", dir_path=f"{dom0.world.root}/srv/other")
    other = dom0.world.write("/srv/other/appvms/sys-net/private.img")
    cow = dom0.world.write("/srv/other/appvms/sys-net/private-cow.img.old")
    dom0.world.write("/srv/other/appvms/sys-net/notes.img")
    below = dom0.world.root / "var/lib/qubes/appvms/mine"
    # of volumes that are there: a revision in either pool, what an import makes
    for name in ("vm-sys-net-private-1700000000-back", "vm-debian-12-xfce-root-import"):
        dom0.lv(name)
    # its root is a snapshot of the template's, in vm-pool
    dom0.lv("vm-mine-root-snap")
    dom0.world.write("/var/lib/qubes/appvms/mine/private-cow.img.old")
    assert not [place for place in dom0.rows() if place.startswith(f"left over {below}")]
    for name in ("vm-mine-private", "vm-mine-private-snap"):
        dom0.lv(name)
    found = dom0.rows()
    told = {place for place in found if place.startswith("left over ")}
    assert told == {
        "left over qubes_dom0/vm-mine-private",
        "left over qubes_dom0/vm-mine-private-snap",
        f"left over {other}",
        f"left over {cow}",
    }
    finding = "bears the name of qube {}, which does not have it"
    assert found["left over qubes_dom0/vm-mine-private"] == ("trace", finding.format("mine"))
    assert found[f"left over {other}"] == ("trace", finding.format("sys-net"))
    assert dom0.audit.orphans() == {"orphans": [], "token": None}
    dom0.in_ram()
    assert dom0.verdicts()[f"left over {other}"] == "ram"


def test_a_directory_that_is_left_over_in_ram_is_no_trace(dom0, qubesd):
    left = dom0.world.root / "var/lib/qubes/appvms/gone"
    left.mkdir()
    assert dom0.verdicts()[f"left over {left}"] == "trace"
    dom0.in_ram()
    assert dom0.rows()[f"left over {left}"] == ("ram", "of gone, which is no more")


def test_with_nothing_left_over_there_is_no_token(dom0):
    assert dom0.audit.orphans() == {"orphans": [], "token": None}
    with pytest.raises(CommandExecutionError, match="nothing was deleted"):
        dom0.audit.remove_orphans("t0")


def test_the_token_of_the_listing_deletes_it_and_nothing_else(dom0, qubesd):
    top = leave(dom0, qubesd)
    token = dom0.audit.orphans()["token"]
    assert dom0.audit.remove_orphans(token) == [
        f"{top}/appvms/gone-too",
        "qubes_dom0/vm-a-b-root-1700000000-back",
        "qubes_dom0/vm-gone-private",
        "qubes_dom0/vm-gone-volatile-snap",
    ]
    assert dom0.audit.orphans()["orphans"] == []
    assert (top / "appvms/sys-net").is_dir()
    assert {volume["lv_name"] for volume in dom0.volumes} == {
        "vm-sys-net-private",
        "vm-sys-net-private-snap",
        "root",
        "swap",
        "vm-other-private",
    }
    assert not any("--force" in word or word == "-f" for command in dom0.run for word in command)


@pytest.mark.parametrize("change", ["more", "bigger", "again"])
def test_another_list_wants_another_token(dom0, qubesd, change):
    top = leave(dom0, qubesd)
    token = dom0.audit.orphans()["token"]
    if change == "more":
        dom0.lv("vm-new-private")
    elif change == "bigger":
        (top / "appvms/gone-too/private.img").write_bytes(b"x" * 65536)
    else:
        dom0.volumes[0]["lv_time"] = "now"
    with pytest.raises(CommandExecutionError, match="is not what the token was given for"):
        dom0.audit.remove_orphans(token)
    assert (top / "appvms/gone-too").is_dir()
    assert not [command for command in dom0.run if command[0] == "lvremove"]


def test_in_a_ram_session_nothing_is_deleted(dom0, qubesd):
    leave(dom0, qubesd)
    token = dom0.audit.orphans()["token"]
    dom0.world.salt["ramboot_preflight.session_fault"] = lambda: "this is a RAM session (zram)"
    with pytest.raises(CommandExecutionError, match=r"this is a RAM session \(zram\): in it"):
        dom0.audit.remove_orphans(token)
    assert not [command for command in dom0.run if command[0] == "lvremove"]


def test_a_deletion_that_fails_says_what_was_deleted_before(dom0, qubesd):
    top = leave(dom0, qubesd)
    token = dom0.audit.orphans()["token"]
    run = dom0.command

    def busy(command, **options):
        if command[-1].endswith("vm-gone-private"):
            return {"retcode": 5, "stdout": "", "stderr": "in use"}
        return run(command, **options)

    dom0.world.salt["cmd.run_all"] = busy
    with pytest.raises(CommandExecutionError) as told:
        dom0.audit.remove_orphans(token)
    assert str(told.value) == (
        "qubes_dom0/vm-gone-private can't be deleted: in use; deleted before:"
        f" {top}/appvms/gone-too, qubes_dom0/vm-a-b-root-1700000000-back"
    )


def test_what_is_mounted_in_it_is_not_deleted(dom0, qubesd):
    top = leave(dom0, qubesd)
    disk = top / "appvms/gone-too/disk"
    disk.mkdir()
    (disk / "file").write_text("x")
    dom0.mounts.append({"target": str(disk), "fstype": "ext4", "source": "/dev/sdb1"})
    with pytest.raises(CommandExecutionError, match=f"a file system is mounted at {disk}$"):
        dom0.audit.remove_orphans(dom0.audit.orphans()["token"])
    assert (disk / "file").exists()
    assert (top / "appvms/gone-too/private.img").exists()


def test_a_link_is_not_followed_when_deleting(dom0, qubesd, tmp_path):
    top = leave(dom0, qubesd)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    (top / "appvms/linked").symlink_to(kept)
    dom0.audit.remove_orphans(dom0.audit.orphans()["token"])
    assert not (top / "appvms/linked").is_symlink()
    assert (kept / "file").exists()


@pytest.mark.parametrize("below", ["", "/deep", "/linked"])
def test_a_pool_within_another_is_not_left_over(dom0, qubesd, tmp_path, below):
    """Of its own, where another pool has its qubes; made by hand, for ramboot refuses it."""
    within = dom0.world.root / f"var/lib/qubes/appvms/nested{below}"
    within.mkdir(parents=True)
    if below == "/linked":
        within.rmdir()
        (tmp_path / "apart").mkdir()
        within.symlink_to(tmp_path / "apart")
    app = sys.modules["qubesadmin"].Qubes()
    app.add_pool("nested", "file", dir_path=str(within))
    app.add_new_vm("AppVM", "mine", "red", template="debian-12-xfce", pool="nested")
    assert dom0.audit.orphans()["orphans"] == []
    # nor if the list had it
    pools = dom0.world.salt["ramboot_qubesadmin.pools"]()
    item = {"what": f"{dom0.world.root}/var/lib/qubes/appvms/nested", "kind": "directory"}
    qubes = dom0.world.salt["ramboot_qubesadmin.qubes"]()
    kept = dom0.audit._kept(pools, dom0.audit._known(pools, dom0.audit._volumes_of(qubes)))
    with pytest.raises(CommandExecutionError, match="a pool or a qube's volume lies there"):
        dom0.audit._delete(item, pools, kept)
    assert (within / "appvms/mine/private.img").exists()


def test_a_link_to_the_files_of_a_pool_is_not_left_over(dom0, qubesd):
    top = dom0.world.root / "var/lib/qubes"
    (top / "appvms/linked").symlink_to(top / "vm-templates/debian-12-xfce")
    (top / "appvms/gone").mkdir()
    sys.modules["qubesadmin"].Qubes().add_new_vm("TemplateVM", "x", "red", pool="varlibqubes")
    (top / "appvms/to-x").symlink_to(top / "vm-templates/x")
    found = [item["qube"] for item in dom0.audit.orphans()["orphans"]]
    # what is linked holds no volume there: that of debian-12-xfce is in vm-pool
    assert found == ["gone", "linked"]


def test_orphans_lists_and_with_a_token_deletes(dom0, qubesd):
    leave(dom0, qubesd)
    ramboot = dom0.world.module("ramboot")
    token = ramboot.orphans()["token"]
    assert len(ramboot.orphans(remove=token)["removed"]) == 4
