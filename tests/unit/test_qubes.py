# SPDX-License-Identifier: GPL-2.0-or-later
"""Stateless qubes through the states, on the stand-in for qubesd."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
import yaml

from conftest import FIXTURES, REPO

MIB = 1 << 20
EXAMPLE = {
    "templates": {"debian-12-xfce-stateless": {"source": "debian-12-xfce"}},
    "disposable_templates": {
        "debian-12-xfce-stateless-dvm": {"template": "debian-12-xfce-stateless"}
    },
}
CLONE, DVM = "debian-12-xfce-stateless", "debian-12-xfce-stateless-dvm"


class Formula:
    """The states in the order of ramboot/qubes/init.sls and absent.sls."""

    def __init__(self, world, qubesd):
        self.world, self.qubesd = world, qubesd
        for name in ("config", "preflight", "record", "qubes_record", "qubes_pools", "qubes"):
            self.qubes = world.module(f"ramboot_{name}")
        # of the host's file system
        self.reserved, self.qubes._reserved = self.qubes._reserved, lambda _config: 0
        self.states = world.state("ramboot_qubes")
        self.layout = yaml.safe_load((FIXTURES / "layout/qubes-default.yaml").read_text())
        world.salt["ramboot_preflight.root_layout"] = lambda: {
            "fstype": self.layout["findmnt"]["filesystems"][0]["fstype"],
            "mounts": self.layout["findmnt"]["filesystems"],
        }
        world.salt["ramboot_preflight.session_fault"] = lambda: None
        world.salt["ramboot.plan"] = dict

    def pillar(self, qubes, **others):
        # the fake root lies in /tmp, which the default leaves behind
        self.world.pillar["ramboot"] = {"qubes": qubes, "copy": {"exclude": []}, **others}

    def apply(self, qubes=None, test=False):
        """{part: the state's answer}; stops after one that fails."""
        if qubes is not None:
            self.pillar(qubes)
        self.world.opts["test"] = test
        answers = {"checked": self.states.checked("check")}
        for part in ("pools", "qubes", "settings"):
            if not all(answer["result"] is not False for answer in answers.values()):
                break
            answers[part] = self.states.present(part, part)
        return answers

    def good(self, qubes=None):
        answers = self.apply(qubes)
        assert [a["result"] for a in answers.values()] == [True] * 4, answers
        return answers

    def absent(self, test=False):
        self.world.opts["test"] = test
        return self.states.absent("qubes")

    def snapshot(self):
        """All that qubesd knows, and what is recorded."""
        record = self.world.root / "var/lib/ramboot/qubes.json"
        kept = ("pools", "qubes", "system", "features", "dom0", "usage", "revisions")
        world = {key: vars(self.qubesd)[key] for key in kept}
        return json.dumps(world, sort_keys=True), record.read_text() if record.exists() else None

    def fail(self, method, subject=None, error=None):
        """qubesd refuses this call from now on."""
        exc = sys.modules["qubesadmin.exc"]

        def fault(called, about):
            if called == method and (subject is None or subject == about):
                raise error or exc.StoragePoolException("No space left on device")

        self.qubesd.fault = fault


@pytest.fixture
def formula(world, qubesd):
    return Formula(world, qubesd)


def pools(qubesd, name):
    return {
        key: volume["pool"]
        for key, volume in qubesd.qubes[name]["volumes"].items()
        if key != "kernel"
    }


IN_RAM = dict.fromkeys(("root", "private", "volatile"), "varlibqubes")


# Nothing asked for


def test_an_empty_pillar_never_asks_qubesd(formula, qubesd, monkeypatch):
    monkeypatch.setitem(formula.world.salt, "ramboot_qubesadmin.available", None)
    answers = formula.good({})
    assert answers["checked"]["comment"] == "the pillar asks for no qubes"
    assert all(not answer["changes"] for answer in answers.values())
    assert qubesd.calls == []


def test_where_there_is_no_qubesadmin_nothing_is_to_undo(formula):
    formula.world.salt["ramboot_qubesadmin.available"] = lambda: False
    formula.pillar({})
    assert formula.absent() == {
        "name": "qubes",
        "result": True,
        "changes": {},
        "comment": "nothing to undo",
    }


def test_where_there_is_no_qubesadmin_a_wish_is_refused(formula):
    formula.world.salt["ramboot_qubesadmin.available"] = lambda: False
    answer = formula.apply(EXAMPLE)["checked"]
    assert (answer["result"], answer["comment"].splitlines()[1:]) == (
        False,
        ["ramboot:qubes is set, and Qubes' Python API (qubesadmin) is not installed here"],
    )


# The example of the thread


def test_the_readme_shows_this_example():
    text = (REPO / "README.md").read_text()
    block = text[text.index("ramboot:\n  qubes:") :].partition("```")[0]
    assert yaml.safe_load(block) == {"ramboot": {"qubes": EXAMPLE}}


def test_the_example_makes_both_qubes_with_every_volume_in_the_pool(formula, qubesd):
    answers = formula.good(EXAMPLE)
    assert set(answers["qubes"]["changes"]) == {CLONE, DVM}
    assert pools(qubesd, CLONE) == pools(qubesd, DVM) == IN_RAM
    assert qubesd.qubes[CLONE]["class"] == "TemplateVM"
    dvm = qubesd.qubes[DVM]
    assert (dvm["class"], dvm["template"]) == ("AppVM", CLONE)
    assert dvm["properties"] == {"template_for_dispvms": True, "default_dispvm": DVM}
    assert dvm["features"]["appmenus-dispvm"] == "1"
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("DispVM", "disp1", "red", template=DVM)
    assert pools(qubesd, "disp1") == IN_RAM


def test_the_clone_holds_what_its_source_holds_without_revisions(formula, qubesd):
    formula.good(EXAMPLE)
    source, clone = (
        formula.world.salt["ramboot_qubesadmin.volumes"](name) for name in ("debian-12-xfce", CLONE)
    )
    for volume in ("root", "private"):
        assert clone[volume]["size"] == source[volume]["size"]
        assert clone[volume]["usage"] == source[volume]["usage"] > 0
        assert clone[volume]["revisions_to_keep"] == 0


def test_no_volume_in_the_pool_keeps_revisions_and_those_elsewhere_do(formula, qubesd):
    names = {"low_ram": "low", "save": "save"}
    asked = {kind: {name: {"template": "debian-12-xfce"}} for kind, name in names.items()}
    formula.good({**EXAMPLE, **asked})
    kept = {
        name: qubesd.qubes[name]["volumes"]["private"]["revisions_to_keep"]
        for name in (CLONE, DVM, "low", "save")
    }
    assert kept == {CLONE: 0, DVM: 0, "low": 0, "save": 1}


def test_a_dry_run_says_what_a_real_one_does_and_changes_nothing(formula):
    formula.pillar({})
    before = formula.snapshot()
    dry = formula.apply(EXAMPLE, test=True)
    assert formula.snapshot() == before
    assert [dry[key]["result"] for key in dry] == [True, True, None, True]
    real = formula.good()
    assert {key: value["changes"] for key, value in dry.items()} == {
        key: value["changes"] for key, value in real.items()
    }


def test_a_second_apply_changes_nothing_at_all(formula, qubesd):
    formula.good(EXAMPLE)
    before = formula.snapshot()
    answers = formula.good()
    assert [answer["changes"] for answer in answers.values()] == [{}, {}, {}, {}]
    assert formula.snapshot() == before
    assert not any(".Set" in method or "Create" in method for method, _ in qubesd.calls[-300:])


def test_absent_takes_both_away_again(formula, qubesd):
    formula.pillar({})
    before = formula.snapshot()
    formula.good(EXAMPLE)
    dry = formula.absent(test=True)
    answer = formula.absent()
    assert (dry["result"], answer["result"]) == (None, True)
    assert dry["changes"] == answer["changes"]
    # what builds on the other goes first
    assert list(answer["changes"]) == [DVM, CLONE]
    assert formula.snapshot() == before
    again = formula.absent()
    assert (again["changes"], again["comment"]) == ({}, "nothing to undo")


# Every kind


EVERYTHING = {
    **EXAMPLE,
    "app_qubes": {
        "work": {
            "template": CLONE,
            "label": "green",
            "properties": {"memory": 600, "netvm": "sys-ram", "autostart": True},
            "features": {"gui": True, "x": None},
            "services": {"cups": False},
            "tags": ["mine"],
            "pci": {"00_14.0": ["no-strict-reset"]},
        }
    },
    "standalones": {"alone": {"source": "debian-12-xfce"}},
    "disposables": {"sys-ram": {"template": DVM, "properties": {"provides_network": True}}},
    "low_ram": {"low": {"template": "debian-12-xfce"}},
    "save": {"save": {"template": "debian-12-xfce", "label": "yellow"}},
    "settings": {
        "sys-net": {
            "properties": {"memory": 300},
            "features": {"gui": False},
            "tags": ["kept"],
            "pci": {"00_1f.6": []},
        },
        "dom0": {"features": {"service.x-not": None, "gui": True}},
    },
    "file_pools": {"usb": {"dir_path": "@/mnt/usb", "on_root": True}},
    "default_pools": {"default_pool_private": "usb"},
}


@pytest.fixture
def everything(formula):
    text = json.dumps(EVERYTHING).replace("@", str(formula.world.root))
    wanted = json.loads(text.replace('"service.x-not": null, ', ""))
    (formula.world.root / "mnt").mkdir()
    wanted["save"]["save"]["pool"] = "vm-pool"
    return wanted


def test_every_kind_lies_where_it_should(formula, qubesd, everything):
    formula.good(everything)
    for name in (CLONE, DVM, "work", "alone", "sys-ram"):
        assert pools(qubesd, name) == IN_RAM, name
    assert pools(qubesd, "low") == {**IN_RAM, "root": "vm-pool"}
    assert qubesd.qubes["low"]["volumes"]["root"]["rw"] is False
    assert pools(qubesd, "save")["private"] == "vm-pool"
    assert qubesd.qubes["save"]["properties"]["netvm"] == ""
    work = qubesd.qubes["work"]
    assert work["label"] == "green"
    assert work["properties"] == {
        "memory": 600,
        "netvm": "sys-ram",
        "autostart": True,
        "default_dispvm": DVM,
    }
    assert work["features"] == {
        "gui": "1",
        "service.cups": "",
        "ramboot-made": "whole app_qubes work",
    }
    assert work["pci"] == {"00_14.0": {"no-strict-reset": "True"}}
    assert "mine" in work["tags"]
    net = {"provides_network": True, "netvm": "", "memory": 300}
    assert qubesd.qubes["sys-net"]["properties"] == net
    assert qubesd.system["default_pool_private"] == "usb"


def test_everything_twice_changes_nothing_and_absent_undoes_it_all(formula, everything):
    formula.pillar({})
    before = formula.snapshot()
    formula.good(everything)
    made = formula.snapshot()
    assert all(not answer["changes"] for answer in formula.good().values())
    assert formula.snapshot() == made
    answer = formula.absent()
    assert answer["result"] is True, answer
    assert "left:" not in answer["comment"]
    after = formula.snapshot()
    assert json.loads(after[0]) == json.loads(before[0])
    assert after[1] is None


def test_a_disposable_template_starts_itself_none_or_another(formula, qubesd):
    formula.good(
        {
            **EXAMPLE,
            "disposable_templates": {
                "a": {"template": CLONE, "default_dispvm": "none"},
                "b": {"template": CLONE, "default_dispvm": "c"},
                "c": {"template": CLONE},
            },
        }
    )
    named = {name: qubesd.qubes[name]["properties"]["default_dispvm"] for name in "abc"}
    assert named == {"a": "", "b": "c", "c": "c"}


@pytest.mark.parametrize("kind", ["app_qubes", "standalones"])
def test_what_a_qube_of_ours_opens_in_a_disposable_stays_in_ram(formula, qubesd, kind):
    base = {"app_qubes": {"template": CLONE}, "standalones": {"source": "debian-12-xfce"}}[kind]
    given = {
        "auto": base,
        "nothing": {**base, "default_dispvm": "none"},
        "named": {**base, "default_dispvm": "default-dvm"},
        "own": {**base, "properties": {"default_dispvm": "default-dvm"}},
        "both": {**base, "default_dispvm": "none", "properties": {"default_dispvm": DVM}},
    }

    def opened():
        return {name: qubesd.qubes[name]["properties"]["default_dispvm"] for name in given}

    named = {"nothing": "", "named": "default-dvm", "own": "default-dvm", "both": DVM}
    pillar = {**EXAMPLE, kind: given}
    dry = formula.apply(pillar, test=True)
    real = formula.good()
    assert {part: answer["changes"] for part, answer in dry.items()} == {
        part: answer["changes"] for part, answer in real.items()
    }
    assert opened() == {"auto": DVM, **named}
    assert not any(answer["changes"] for answer in formula.good().values())
    # with two there is no telling which is meant
    formula.good(
        {**pillar, "disposable_templates": {DVM: {"template": CLONE}, "b": {"template": CLONE}}}
    )
    assert opened() == {"auto": "", **named}


def test_a_qube_of_ours_without_a_disposable_template_opens_none(formula, qubesd):
    formula.good({"standalones": {"alone": {"source": "debian-12-xfce"}}})
    assert qubesd.qubes["alone"]["properties"]["default_dispvm"] == ""


@pytest.mark.parametrize(
    ("dispvm", "told"),
    [
        ("self", "there is no qube self"),
        ("work", "work has no template_for_dispvms"),
        ("sys-net", "sys-net has no template_for_dispvms"),
        ("gone", "there is no qube gone"),
    ],
)
def test_what_is_no_template_of_disposables_is_told_before(formula, dispvm, told):
    entry = {"template": CLONE, "default_dispvm": dispvm}
    answers = formula.apply({**EXAMPLE, "app_qubes": {"work": entry}})
    assert answers["checked"]["comment"].splitlines() == [
        "nothing was changed:",
        f"app_qubes:work:default_dispvm: {told}",
    ]


def test_a_low_ram_template_can_have_an_encrypted_volatile_volume_on_the_disk(formula, qubesd):
    formula.good({"low_ram": {"low": {"template": "debian-12-xfce", "volatile": "ephemeral"}}})
    assert pools(qubesd, "low") == {
        "root": "vm-pool",
        "private": "varlibqubes",
        "volatile": "vm-pool",
    }
    assert qubesd.qubes["low"]["volumes"]["volatile"]["ephemeral"] is True


def test_a_new_template_of_an_app_qube_is_followed_by_what_it_resets(formula, qubesd):
    low = {"template": "debian-12-xfce"}
    formula.good({"low_ram": {"low": low}})
    sys.modules["qubesadmin"].Qubes().add_new_vm("TemplateVM", "fedora-41", "black")
    answers = formula.good({"low_ram": {"low": {"template": "fedora-41"}}})
    assert answers["qubes"]["changes"] == {
        "low: template": {"old": "debian-12-xfce", "new": "fedora-41"}
    }
    assert qubesd.qubes["low"]["volumes"]["root"]["rw"] is False


def test_menu_entries_that_could_not_be_made_are_told(formula, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    formula.world.salt["cmd.run_all"] = lambda *_a, **_k: {
        "retcode": 1,
        "stdout": "",
        "stderr": "no",
    }
    answer = formula.good(EXAMPLE)["qubes"]
    assert f"{CLONE} has no menu entries: no" in answer["comment"].splitlines()


def test_a_copy_made_anew_gets_the_menu_entries_of_what_is_in_it(formula, qubesd, monkeypatch):
    """What was installed in its source since; none that could not be made is passed over."""
    formula.good(EXAMPLE)
    qubesd.update("debian-12-xfce", MIB)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    asked = []

    def menus(command, **_options):
        asked.append(command)
        return {"retcode": 1, "stdout": "", "stderr": "no"}

    formula.world.salt["cmd.run_all"] = menus
    answer = formula.good()["qubes"]
    assert asked == [["qvm-appmenus", "--init", "--update", "--source", "debian-12-xfce", CLONE]]
    assert f"{CLONE} has no menu entries: no" in answer["comment"].splitlines()


# Settings are put back, and what the user changed is left


def test_settings_that_the_pillar_drops_are_put_back(formula, qubesd):
    formula.good({"settings": {"sys-net": {"properties": {"memory": 300, "vcpus": 1}}}})
    answers = formula.good({"settings": {"sys-net": {"properties": {"vcpus": 1}}}})
    assert answers["settings"]["changes"] == {"sys-net: memory": {"old": "300", "new": "default"}}
    net = {"provides_network": True, "netvm": "", "vcpus": 1}
    assert qubesd.qubes["sys-net"]["properties"] == net


def test_the_first_value_is_put_back_not_the_last(formula, qubesd):
    qubesd.qubes["sys-net"]["properties"]["memory"] = 500
    for memory in (300, 350):
        formula.good({"settings": {"sys-net": {"properties": {"memory": memory}}}})
    formula.absent()
    assert qubesd.qubes["sys-net"]["properties"]["memory"] == 500


def test_values_may_be_written_as_qubesd_reads_them(formula, qubesd):
    formula.pillar({})
    before = json.loads(formula.snapshot()[0])["qubes"]
    given = {"autostart": "yes", "debug": 1, "include_in_backups": "Off", "memory": "+0300"}
    answer = formula.good({"settings": {"sys-net": {"properties": given}}})["settings"]
    assert [(key, change["new"]) for key, change in answer["changes"].items()] == [
        ("sys-net: autostart", "True"),
        ("sys-net: debug", "True"),
        ("sys-net: include_in_backups", "False"),
        ("sys-net: memory", "300"),
    ]
    assert not any(answer["changes"] for answer in formula.good().values())
    assert formula.absent()["result"] is True
    assert json.loads(formula.snapshot()[0])["qubes"] == before


def test_values_that_qubesd_rewrites_are_not_set_again(formula, qubesd):
    formula.pillar({})
    before = json.loads(formula.snapshot()[0])["qubes"]
    given = {
        "devices_denied": "u03****b******u03****",
        "mac": "00:16:3E:5E:6C:01",
        "virt_mode": "HVM",
        "ip6": "fd09:24ef:4179:0:0:0:a89:1",
    }
    formula.good({"settings": {"sys-net": {"properties": given}}})
    assert qubesd.qubes["sys-net"]["properties"] == {
        "provides_network": True,
        "netvm": "",
        "devices_denied": "b******u03****",
        "mac": "00:16:3e:5e:6c:01",
        "virt_mode": "hvm",
        "ip6": "fd09:24ef:4179::a89:1",
    }
    assert not any(answer["changes"] for answer in formula.good().values())
    assert formula.absent()["result"] is True
    assert json.loads(formula.snapshot()[0])["qubes"] == before


@pytest.mark.parametrize("way", ["absent", "dropped", "third"])
def test_a_second_value_that_is_refused_leaves_the_first_and_the_original_known(
    formula, qubesd, way
):
    def asked(memory):
        return {"settings": {"sys-net": {"properties": {"memory": memory}}}}

    formula.good(asked(300))
    refused = sys.modules["qubesadmin.exc"].QubesValueError("refused")
    formula.fail("admin.vm.property.Set", "sys-net memory", refused)
    for memory in (350, 350, 360):
        formula.apply(asked(memory))
    qubesd.fault = None
    assert qubesd.qubes["sys-net"]["properties"]["memory"] == 300
    if way == "third":
        formula.good(asked(400))
        # from here on a 300 would be the user's
        qubesd.qubes["sys-net"]["properties"]["memory"] = 300
        assert "memory was changed to '300' since" in formula.absent()["comment"]
    else:
        formula.good({"settings": {}}) if way == "dropped" else formula.absent()
        assert "memory" not in qubesd.qubes["sys-net"]["properties"]


def test_a_disposable_templates_own_default_dispvm_may_be_a_property(formula, qubesd):
    asked = json.loads(json.dumps(EXAMPLE))
    asked["disposable_templates"][DVM]["properties"] = {"default_dispvm": None}
    formula.good(asked)
    assert qubesd.qubes[DVM]["properties"]["default_dispvm"] == ""
    assert not any(answer["changes"] for answer in formula.good(asked).values())


def test_values_of_ours_too(formula):
    pillar = {"low_ram": {"low": {"template": "debian-12-xfce", "properties": {"autostart": 1}}}}
    formula.good(pillar)
    assert not any(answer["changes"] for answer in formula.good().values())


def test_a_network_may_become_one_in_the_run_that_names_it_and_goes_the_same_way(formula, qubesd):
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("AppVM", "a", "red", template="debian-12-xfce")
    # written out, so that qubesd asks who uses it
    app.add_new_vm("AppVM", "b", "red", template="debian-12-xfce").provides_network = False
    formula.pillar({})
    before = json.loads(formula.snapshot()[0])["qubes"]
    formula.good(
        {
            "settings": {
                "a": {"properties": {"netvm": "b"}},
                "b": {"properties": {"provides_network": True}},
            }
        }
    )
    assert qubesd.qubes["a"]["properties"]["netvm"] == "b"
    assert formula.absent()["result"] is True
    assert json.loads(formula.snapshot()[0])["qubes"] == before


def test_a_qube_of_ours_may_become_a_network_in_the_run_that_names_it(formula, qubesd):
    pillar = {
        **EXAMPLE,
        "app_qubes": {"work": {"template": CLONE}},
        "disposables": {"sys-ram": {"template": DVM}},
    }
    formula.good(pillar)
    pillar["disposables"]["sys-ram"]["properties"] = {"provides_network": True}
    for name in ("work", "more"):
        pillar["app_qubes"][name] = {"template": CLONE, "properties": {"netvm": "sys-ram"}}
    formula.good(pillar)
    for name in ("work", "more"):
        assert qubesd.qubes[name]["properties"]["netvm"] == "sys-ram"
    assert not any(answer["changes"] for answer in formula.good().values())


def test_what_a_qube_of_ours_names_may_become_what_it_needs_in_the_same_run(formula, qubesd):
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("TemplateVM", "mine", "black", pool="varlibqubes")
    for name in ("sys-vpn", "dvm"):
        app.add_new_vm("AppVM", name, "red", template="mine", pool="varlibqubes")
    formula.pillar({})
    before = formula.snapshot()
    asked = {
        **EXAMPLE,
        "app_qubes": {
            "work": {"template": CLONE, "properties": {"netvm": "sys-vpn", "default_dispvm": "dvm"}}
        },
        "disposables": {"sys-ram": {"template": "dvm"}},
        "settings": {
            "sys-vpn": {"properties": {"provides_network": "yes", "memory": 300}},
            "dvm": {"properties": {"template_for_dispvms": True}},
        },
    }
    dry = formula.apply(asked, test=True)
    real = formula.good()
    assert {part: answer["changes"] for part, answer in dry.items()} == {
        part: answer["changes"] for part, answer in real.items()
    }
    assert list(real["settings"]["changes"]) == ["sys-vpn: memory"]
    assert qubesd.qubes["work"]["properties"] == {"netvm": "sys-vpn", "default_dispvm": "dvm"}
    assert qubesd.qubes["sys-ram"]["template"] == "dvm"
    assert not any(answer["changes"] for answer in formula.good().values())
    assert formula.absent()["result"] is True
    assert formula.snapshot() == before


def test_a_read_only_root_survives_another_template_and_the_way_back(formula, qubesd):
    root = qubesd.qubes["default-dvm"]["volumes"]["root"]
    root["rw"] = False
    formula.good({**EXAMPLE, "settings": {"default-dvm": {"template": CLONE}}})
    assert (root["pool"], root["rw"]) == ("varlibqubes", False)
    formula.absent()
    assert (root["pool"], root["rw"]) == ("vm-pool", False)


def test_what_the_user_changed_since_is_left_and_named(formula, qubesd):
    formula.good({"settings": {"sys-net": {"properties": {"memory": 300}, "tags": ["kept"]}}})
    qubesd.qubes["sys-net"]["properties"]["memory"] = 777
    answer = formula.absent()
    assert answer["changes"] == {"sys-net: tag kept": {"old": True, "new": False}}
    assert (
        "left: sys-net: memory was changed to '777' since and is left as it is"
        in answer["comment"].splitlines()
    )
    assert qubesd.qubes["sys-net"]["properties"]["memory"] == 777
    # told once
    assert formula.absent()["comment"] == "nothing to undo"


def test_a_qube_that_is_gone_is_no_obstacle(formula):
    formula.good({"settings": {"sys-net": {"tags": ["kept"]}}})
    app = sys.modules["qubesadmin"].Qubes()
    app.default_netvm = None
    del app.domains["sys-net"]
    assert formula.absent()["result"] is True
    assert not formula.world.salt["ramboot_qubes_record.exists"]()


def delete(name):
    app = sys.modules["qubesadmin"].Qubes()
    if str(app.default_netvm or "") == name:
        app.default_netvm = None
    del app.domains[name]


def memory_of_net(memory, **others):
    return {"settings": {"sys-net": {"properties": {"memory": memory}, **others}}}


def test_settings_of_a_qube_that_is_gone_are_not_put_back_onto_one_of_ours(formula, qubesd):
    given = {
        "properties": {"memory": 300, "autostart": True, "virt_mode": "hvm"},
        "pci": {"00_1f.6": []},
        "tags": ["kept"],
    }
    formula.good({**EXAMPLE, "settings": {"sys-net": given}})
    delete("sys-net")
    moved = {**EXAMPLE, "disposables": {"sys-net": {"template": DVM, **given}}}
    answers = formula.good(moved)
    assert set(answers["qubes"]["changes"]) == {"sys-net"}
    assert answers["settings"]["changes"] == {}
    assert qubesd.qubes["sys-net"]["pci"] == {"00_1f.6": {}}
    assert not any(answer["changes"] for answer in formula.good(moved).values())
    noted = formula.world.salt["ramboot_qubes_record.read"]()["settings"]
    assert all(item.get("given") for item in noted)


def test_what_the_pillar_asks_of_a_qube_of_ours_is_not_put_back(formula, qubesd):
    entry = {"template": CLONE}
    formula.good({**EXAMPLE, "app_qubes": {"work": entry}})
    formula.good({**EXAMPLE, "settings": {"work": {"properties": {"memory": 300}}}})
    moved = {**EXAMPLE, "app_qubes": {"work": {**entry, "properties": {"memory": 300}}}}
    assert not any(answer["changes"] for answer in formula.good(moved).values())
    assert qubesd.qubes["work"]["properties"]["memory"] == 300


@pytest.mark.parametrize("then", ["absent", "dropped"])
def test_what_a_user_gives_a_qube_of_that_name_that_he_made_is_his(formula, qubesd, then):
    formula.good(memory_of_net(300, pci={"00_1f.6": []}))
    delete("sys-net")
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("AppVM", "sys-net", "red", template="debian-12-xfce").memory = 300
    qubesd.qubes["sys-net"]["pci"] = {"00_1f.6": {}}
    answer = formula.absent() if then == "absent" else formula.good({})["settings"]
    assert answer["changes"] == {}
    assert qubesd.qubes["sys-net"]["pci"] == {"00_1f.6": {}}
    assert qubesd.qubes["sys-net"]["properties"]["memory"] == 300
    assert not formula.world.salt["ramboot_qubes_record.exists"]()


@pytest.mark.parametrize("memory", [700, 300])
def test_of_a_qube_made_anew_the_value_that_it_had_is_put_back(formula, qubesd, memory):
    formula.good(memory_of_net(300))
    delete("sys-net")
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("AppVM", "sys-net", "red", template="debian-12-xfce").memory = memory
    formula.good(memory_of_net(350))
    assert qubesd.qubes["sys-net"]["properties"]["memory"] == 350
    formula.absent()
    assert qubesd.qubes["sys-net"]["properties"]["memory"] == memory


def test_what_is_no_longer_asked_for_and_is_the_users_is_told_and_forgotten(formula, qubesd):
    formula.good(memory_of_net(300))
    qubesd.qubes["sys-net"]["properties"]["memory"] = 350
    told = "left: sys-net: memory was changed to '350' since and is left as it is"
    dry = formula.apply({}, test=True)["settings"]
    real = formula.good({})["settings"]
    assert dry == real
    assert (dry["result"], dry["changes"]) == (True, {})
    assert dry["comment"].splitlines()[1:] == [told]
    assert formula.good({})["settings"]["comment"] == "settings: as the pillar wants them"
    # from here on it is the user's
    qubesd.qubes["sys-net"]["properties"]["memory"] = 300
    assert formula.good({})["settings"]["changes"] == {}
    assert formula.absent()["changes"] == {}


def test_what_the_user_put_back_himself_is_forgotten(formula, qubesd):
    formula.good(memory_of_net(300))
    del qubesd.qubes["sys-net"]["properties"]["memory"]
    formula.good({})
    qubesd.qubes["sys-net"]["properties"]["memory"] = 300
    assert formula.good({})["settings"]["changes"] == {}
    assert formula.absent()["changes"] == {}


@pytest.mark.parametrize("dropped", [True, False])
def test_a_value_of_the_users_is_what_is_put_back(formula, qubesd, dropped):
    formula.good(memory_of_net(300))
    qubesd.qubes["sys-net"]["properties"]["memory"] = 500
    if dropped:
        formula.good({})
    formula.good(memory_of_net(200))
    formula.absent()
    assert qubesd.qubes["sys-net"]["properties"]["memory"] == 500


def test_notes_of_earlier_versions_have_no_uuid_and_count(formula, qubesd):
    formula.good(memory_of_net(300))
    record = formula.world.root / "var/lib/ramboot/qubes.json"
    noted = json.loads(record.read_text())
    noted["settings"][0].pop("uuid", None)
    record.write_text(json.dumps(noted))
    formula.good(memory_of_net(350))
    formula.absent()
    assert "memory" not in qubesd.qubes["sys-net"]["properties"]


def test_dom0_too_is_known_by_its_uuid(formula, qubesd):
    formula.good({"settings": {"dom0": {"features": {"gui-default-secure-copy-sequence": "x"}}}})
    assert formula.absent()["result"] is True
    assert qubesd.features == {}


GIVEN = {
    "label": "green",
    "properties": {"memory": 600, "netvm": None, "autostart": "yes"},
    "features": {"gui": True, "x": "mine"},
    "services": {"cups": False},
    "tags": ["mine", "shared"],
    "pci": {"00_14.0": []},
    "firewall": ["action=drop"],
}
OF_OURS = {
    "app_qubes": {"template": CLONE},
    "standalones": {"source": "debian-12-xfce"},
    "disposables": {"template": DVM},
}


def rest_of(qubesd, name):
    """All that a qube has, but for its volumes and what tells one of its name from another."""
    kept = {k: v for k, v in qubesd.qubes[name].items() if k not in ("volumes", "uuid")}
    return json.loads(json.dumps({"firewall": ["action=accept"], **kept}))


@pytest.mark.parametrize("when", ["made", "later"])
@pytest.mark.parametrize("kind", OF_OURS)
def test_what_the_pillar_drops_of_a_qube_of_ours_is_what_it_would_be_without(
    formula, qubesd, kind, when
):
    source = sys.modules["qubesadmin"].Qubes().domains["debian-12-xfce"]
    source.memory = 700
    source.tags.add("shared")
    source.features["x"] = "of the source"
    bare = {**EXAMPLE, kind: {"bare": OF_OURS[kind], "ours": OF_OURS[kind]}}
    if when == "later":
        formula.good(bare)
    formula.good({**EXAMPLE, kind: {"bare": OF_OURS[kind], "ours": {**OF_OURS[kind], **GIVEN}}})
    assert rest_of(qubesd, "ours")["properties"]["memory"] == 600
    dry = formula.apply(bare, test=True)
    real = formula.good()
    assert {part: answer["changes"] for part, answer in dry.items()} == {
        part: answer["changes"] for part, answer in real.items()
    }
    found, wanted = rest_of(qubesd, "ours"), rest_of(qubesd, "bare")
    assert found["features"].pop("ramboot-made") != wanted["features"].pop("ramboot-made")
    assert found == wanted
    assert not any(answer["changes"] for answer in formula.good().values())


def test_what_the_user_changed_since_of_a_qube_of_ours_is_left_and_told_once(formula, qubesd):
    pillar = {**EXAMPLE, "app_qubes": {"work": {"template": CLONE, "properties": {"memory": 600}}}}
    bare = {**EXAMPLE, "app_qubes": {"work": {"template": CLONE}}}
    formula.good(pillar)
    qubesd.qubes["work"]["properties"]["memory"] = 500
    answer = formula.good(bare)["settings"]
    told = "left: work: memory was changed to '500' since and is left as it is"
    assert answer["comment"].splitlines()[1:] == [told]
    assert told not in formula.good()["settings"]["comment"]
    # as for a value of ours that somebody changed and the pillar set again
    formula.good(pillar)
    assert qubesd.qubes["work"]["properties"]["memory"] == 600


def test_a_value_that_was_set_again_is_taken_back_to_what_it_is_without(formula, qubesd):
    pillar = {**EXAMPLE, "app_qubes": {"work": {"template": CLONE, "properties": {"memory": 600}}}}
    formula.good(pillar)
    qubesd.qubes["work"]["properties"]["memory"] = 500
    formula.good()
    formula.good({**EXAMPLE, "app_qubes": {"work": {"template": CLONE}}})
    assert "memory" not in qubesd.qubes["work"]["properties"]


@pytest.mark.parametrize("earlier", [True, False], ids=["an earlier version", "left the pillar"])
def test_of_what_nothing_is_asked_nothing_is_taken_back(formula, qubesd, everything, earlier):
    formula.good(everything)
    before = rest_of(qubesd, "work"), rest_of(qubesd, CLONE), rest_of(qubesd, DVM)
    kept = ("settings", "file_pools", "default_pools")
    bare = {key: value for key, value in everything.items() if key in kept}
    if earlier:
        record = formula.world.root / "var/lib/ramboot/qubes.json"
        noted = json.loads(record.read_text())
        noted["settings"] = [item for item in noted["settings"] if item["qube"] != "work"]
        record.write_text(json.dumps(noted))
        bare = {**everything, "app_qubes": {"work": {"template": CLONE, "label": "green"}}}
    assert not any(answer["changes"] for answer in formula.good(bare).values())
    assert (rest_of(qubesd, "work"), rest_of(qubesd, CLONE), rest_of(qubesd, DVM)) == before


def test_what_stays_of_ours_keeps_what_it_was_given_in_an_undo(formula, qubesd, everything):
    formula.good(everything)
    use(qubesd, "work")
    before = rest_of(qubesd, "work")
    assert not [what for what in formula.absent()["changes"] if what.startswith("work: ")]
    assert rest_of(qubesd, "work") == before


IMPOSSIBLE = {
    "netvm": "netvm can't become old again, which is no more; it stays 'sys-net'",
    "network": "netvm can't become old again, which has no provides_network; it stays 'sys-net'",
    "default_dispvm": "default_dispvm can't become old again, which is no more; it stays"
    " 'default-dvm'",
    "disposables": "default_dispvm can't become old again, which has no template_for_dispvms; it"
    " stays 'default-dvm'",
    "template": "template can't become old again, which is no more; it stays 'debian-12-xfce'",
    "label": "label can't become old again, which is no more; it stays 'red'",
    "pool": "default_pool can't become old again, which is no more; it stays 'vm-pool'",
}


def make_impossible(qubesd, what):
    """What of the pillar, after which a value of the user's can't be set again; and how."""
    module = sys.modules["qubesadmin"]
    app = module.Qubes()
    if what == "pool":
        qubesd.add_pool("old", "lvm_thin", volume_group="other", thin_pool="old")
        app.default_pool = "old"
        asked = {"default_pools": {"default_pool": "vm-pool"}}
        return asked, lambda: app.remove_pool("old")
    work = app.add_new_vm("AppVM", "work", "red", template="debian-12-xfce")
    entry = {"tags": ["mine"]}
    asked = {"settings": {"work": entry}}
    if what == "label":
        module.LABELS = (*module.LABELS, "old")
        work.label, entry["label"] = "old", "red"
        return asked, lambda: setattr(module, "LABELS", module.LABELS[:-1])
    if what == "template":
        app.add_new_vm("TemplateVM", "old", "black")
        work.template, entry["template"] = "old", "debian-12-xfce"
        return asked, lambda: delete("old")
    key, needed, new = {
        "n": ("netvm", "provides_network", "sys-net"),
        "d": ("default_dispvm", "template_for_dispvms", "default-dvm"),
    }[what[0]]
    old = app.add_new_vm("AppVM", "old", "red", template="debian-12-xfce")
    setattr(old, needed, True)
    setattr(work, key, "old")
    entry["properties"] = {key: new}
    if what in ("netvm", "default_dispvm"):
        return asked, lambda: delete("old")
    return asked, lambda: setattr(old, needed, False)


@pytest.mark.parametrize("then", ["absent", "dropped"])
@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_what_can_not_be_put_back_any_more_is_told_and_forgotten(formula, qubesd, what, then):
    asked, spoil = make_impossible(qubesd, what)
    formula.good(asked)
    spoil()
    formula.pillar({})
    whose = "system" if what == "pool" else "work"
    dry = formula.absent(True) if then == "absent" else formula.apply({}, True)["settings"]
    real = formula.absent() if then == "absent" else formula.good({})["settings"]
    for answer in (dry, real):
        assert set(answer["changes"]) == ({"work: tag mine"} if whose == "work" else set())
        assert answer["comment"].splitlines()[1:] == [f"left: {whose}: {IMPOSSIBLE[what]}"]
    assert real["result"] is True
    assert not formula.world.salt["ramboot_qubes_record.exists"]()


def test_what_is_made_possible_by_what_is_put_back_is_put_back(formula, qubesd):
    app = sys.modules["qubesadmin"].Qubes()
    old = app.add_new_vm("AppVM", "old", "red", template="debian-12-xfce")
    old.provides_network = True
    app.add_new_vm("AppVM", "work", "red", template="debian-12-xfce").netvm = "old"
    formula.pillar({})
    before = json.loads(formula.snapshot()[0])["qubes"]
    net = {"work": {"properties": {"netvm": "sys-net"}}}
    formula.good({"settings": net})
    formula.good({"settings": {**net, "old": {"properties": {"provides_network": False}}}})
    assert formula.absent()["result"] is True
    assert json.loads(formula.snapshot()[0])["qubes"] == before


def test_a_network_that_can_not_be_put_back_closes_no_loop(formula, qubesd):
    """Of `old` it is not asked what its network was."""
    app = sys.modules["qubesadmin"].Qubes()
    for name in ("old", "work"):
        vm = app.add_new_vm("AppVM", name, "red", template="debian-12-xfce")
        vm.provides_network = True
    app.domains["work"].netvm = "old"
    formula.good({"settings": {"work": {"properties": {"netvm": "sys-net"}}}})
    app.domains["old"].provides_network = False
    formula.good({"settings": {"old": {"properties": {"netvm": "work"}}}})
    assert qubesd.qubes["old"]["properties"]["netvm"] == "work"


# A copy is not to be updated itself


def test_qubesd_is_told_to_refuse_the_start_of_a_copy_and_of_nothing_else(
    formula, qubesd, everything
):
    """What is based on it starts (core: qubes/vm/qubesvm.py, start: the qube's own feature)."""
    formula.good(everything)
    assert qubesd.qubes[CLONE]["features"]["prohibit-start"] == (
        "ramboot: a copy of debian-12-xfce; update that and apply ramboot.qubes in a persistent"
        " boot"
    )
    assert qubesd.qubes[CLONE]["features"]["skip-update"] == "1"
    app, exc = sys.modules["qubesadmin"].Qubes(), sys.modules["qubesadmin.exc"]
    with pytest.raises(exc.QubesException, match="update that and apply"):
        app.domains[CLONE].start()
    for name in set(qubesd.qubes) - {CLONE}:
        app.domains[name].start()
        assert qubesd.qubes[name]["running"] is True, name


@pytest.mark.parametrize(("value", "kept"), [("", ""), (False, ""), ("mine", "mine"), (None, None)])
def test_the_pillar_can_let_a_copy_start(formula, qubesd, value, kept):
    formula.good(EXAMPLE)
    entry = {"source": "debian-12-xfce", "features": {"prohibit-start": value}}
    formula.good({**EXAMPLE, "templates": {CLONE: entry}})
    assert qubesd.qubes[CLONE]["features"].get("prohibit-start") == kept
    assert formula.good()["qubes"]["changes"] == {}


def test_a_copy_that_stays_can_be_updated_again(formula, qubesd):
    formula.good(EXAMPLE)
    use(qubesd, CLONE, "root")
    dry = formula.absent(test=True)
    answer = formula.absent()
    assert dry["changes"] == answer["changes"]
    assert {f"{CLONE}: feature skip-update", f"{CLONE}: feature prohibit-start"} < set(
        answer["changes"]
    )
    assert not {"skip-update", "prohibit-start"} & set(qubesd.qubes[CLONE]["features"])
    assert formula.absent()["changes"] == {}


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "the user's"])
def test_what_is_made_of_a_users_clone_of_a_copy_can_be_started(formula, qubesd, ours):
    formula.good(EXAMPLE)
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("TemplateVM", "mine", "black")
    # as qvm-clone does
    for key, value in app.domains[CLONE].features.items():
        app.domains["mine"].features[key] = value
    if not ours:
        app.domains["mine"].features["prohibit-start"] = "broken"
    formula.good({**EXAMPLE, "standalones": {"bench": {"source": "mine"}}})
    kept = {"prohibit-start", "skip-update"} & set(qubesd.qubes["bench"]["features"])
    assert kept == (set() if ours else {"prohibit-start", "skip-update"})


# Data is never deleted without being asked


def use(qubesd, name, volume="private"):
    qubesd.fill(name, volume, 1 << 16)


@pytest.mark.parametrize(
    ("kind", "name"), [("save", "save"), ("app_qubes", "work"), ("templates", CLONE)]
)
def test_a_qube_that_was_used_stays_and_is_named(formula, qubesd, everything, kind, name):
    formula.good(everything)
    use(qubesd, name, "root" if kind == "templates" else "private")
    answer = formula.absent()
    assert answer["result"] is True
    assert name in qubesd.qubes
    assert (
        f"left: {name} was used since it was made and may hold data: it is left as it is; add it"
        " to remove_data, or delete it yourself" in answer["comment"].splitlines()
    )
    formula.pillar({"remove_data": [name]})
    assert formula.absent()["result"] is True
    assert name not in qubesd.qubes


def test_what_a_staying_qube_needs_stays_too(formula, qubesd, everything):
    everything["app_qubes"]["work"]["default_dispvm"] = "none"
    formula.good(everything)
    use(qubesd, "work")
    answer = formula.absent()
    assert answer["result"] is True
    lines = answer["comment"].splitlines()
    assert f"left: {CLONE} is in use by work and is left as it is" in lines
    assert "left: sys-ram is in use by work (netvm) and is left as it is" in lines
    assert f"left: {DVM} is in use by sys-ram and is left as it is" in lines
    assert {"work", CLONE, "sys-ram", DVM} <= set(qubesd.qubes)
    assert "alone" not in qubesd.qubes


def test_a_users_qube_on_our_template_is_named_and_both_stay(formula, qubesd):
    formula.good(EXAMPLE)
    sys.modules["qubesadmin"].Qubes().add_new_vm("AppVM", "theirs", "red", template=CLONE)
    answer = formula.absent()
    assert f"left: {CLONE} is in use by theirs and is left as it is" in answer["comment"]
    assert CLONE in qubesd.qubes
    assert DVM not in qubesd.qubes


def test_a_default_of_the_system_that_names_ours_is_told(formula, qubesd):
    formula.good(EXAMPLE)
    qubesd.system["default_dispvm"] = DVM
    answer = formula.absent()
    assert f"left: {DVM} is in use by the system (default_dispvm)" in answer["comment"]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("dom0", "dom0 (default_dispvm)"),
        ("relay", "far (relayvm)"),
        ("device", "mine (a device)"),
    ],
)
@pytest.mark.parametrize("release", ["4.2", "4.3"])
def test_whoever_else_makes_qubesd_keep_one_of_ours_is_named(formula, qubesd, release, how, told):
    qubesd.release = release
    formula.good(EXAMPLE)
    app = sys.modules["qubesadmin"].Qubes()
    if how == "dom0":
        app.domains["dom0"].default_dispvm = DVM
    elif how == "relay":
        remote = {"class": "RemoteVM", "label": "red", "template": None, "running": False}
        remote |= {"properties": {"relayvm": DVM}, "features": {}, "tags": [], "volumes": {}}
        qubesd.qubes["far"] = remote | {"pci": {}}
    else:
        app.add_new_vm("AppVM", "mine", "red", template="debian-12-xfce")
        qubesd.qubes["mine"]["block"] = {"sda": DVM}
    answer = formula.absent()
    assert answer["result"] is True, answer
    assert f"left: {DVM} is in use by {told} and is left as it is" in answer["comment"].splitlines()
    assert DVM in qubesd.qubes


def test_preloaded_disposables_go_with_ours(formula, qubesd):
    (formula.world.root / "srv").mkdir()
    pool = {"dir_path": f"{formula.world.root}/srv/ram", "on_root": True}
    formula.pillar({})
    before = formula.snapshot()
    formula.good({**EXAMPLE, "pool": "ram", "file_pools": {"ram": pool}})
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("DispVM", "disp1", "red", template=DVM)
    qubesd.run("disp1")
    qubesd.qubes[DVM]["features"]["preload-dispvm"] = "disp1"
    dry = formula.absent(test=True)
    answer = formula.absent()
    assert (answer["result"], answer["changes"]) == (True, dry["changes"]), answer
    assert "left:" not in answer["comment"]
    assert formula.snapshot() == before


@pytest.mark.parametrize(
    ("netvms", "way"),
    [
        ({"a": "a"}, "a > a"),
        ({"a": "b", "b": "a"}, "a > b > a"),
        ({"a": "b", "b": "sys-net"}, None),
        # one that is there, in settings
        ({"a": "sys-net", "sys-net": "a"}, "a > sys-net > a"),
    ],
)
def test_a_network_that_goes_round_is_told_before_anything_is_made(formula, qubesd, netvms, way):
    properties = {
        name: {"properties": {"netvm": netvm, "provides_network": True}}
        for name, netvm in netvms.items()
    }
    settings = {name: asked for name, asked in properties.items() if name in qubesd.qubes}
    ours = {
        name: {"template": CLONE, **asked}
        for name, asked in properties.items()
        if name not in settings
    }
    asked = {"templates": EXAMPLE["templates"], "app_qubes": ours, "settings": settings}
    if way is None:
        formula.good(asked)
        return
    before = formula.snapshot()
    formula.pillar(asked)
    told = formula.apply()["checked"]["comment"]
    assert f"app_qubes:a:properties:netvm: the network would go round: {way}" in told
    assert formula.snapshot() == before


def networks(**netvms):
    """Qubes that provide network, each made after the one that its own network goes through."""
    app = sys.modules["qubesadmin"].Qubes()
    for name, netvm in netvms.items():
        qube = app.add_new_vm("AppVM", name, "red", template="debian-12-xfce", pool="varlibqubes")
        qube.provides_network, qube.netvm = True, netvm


def netvms(qubesd, *names):
    return [qubesd.qubes[name]["properties"].get("netvm", "default") for name in names]


def through(netvm):
    return {"properties": {"netvm": netvm}}


def undone(formula, before):
    """absent, as its dry run said."""
    dry = formula.absent(test=True)["changes"]
    answer = formula.absent()
    assert (answer["result"], answer["changes"]) == (True, dry), answer
    assert json.loads(formula.snapshot()[0])["qubes"] == before, answer


@pytest.mark.parametrize("order", [("fw", "vpn"), ("vpn", "fw")], ids=" ".join)
def test_a_network_is_turned_round_in_whatever_order_it_is_asked_for(formula, qubesd, order):
    networks(fw="sys-net", vpn="fw")
    formula.pillar({})
    before = json.loads(formula.snapshot()[0])["qubes"]
    wanted = {"fw": through("vpn"), "vpn": through("sys-net")}
    formula.good({"settings": {name: wanted[name] for name in order}})
    assert netvms(qubesd, "fw", "vpn") == ["vpn", "sys-net"]
    undone(formula, before)


def test_networks_that_were_set_one_by_one_are_put_back_in_their_turn(formula, qubesd):
    networks(other="sys-net", fw="sys-net", vpn="fw")
    formula.pillar({})
    before = json.loads(formula.snapshot()[0])["qubes"]
    formula.good({"settings": {"fw": through("other")}})
    formula.good({"settings": {"fw": through("vpn"), "vpn": through("sys-net")}})
    undone(formula, before)


def test_a_setting_that_the_pillar_drops_is_put_back_in_its_turn(formula, qubesd):
    networks(other="sys-net", fw="sys-net", vpn="fw")
    formula.good({"settings": {"vpn": through("other"), "fw": through("vpn")}})
    # fw goes back to sys-net before vpn goes through it
    formula.good({"settings": {"vpn": through("fw")}})
    assert netvms(qubesd, "fw", "vpn") == ["sys-net", "fw"]


@pytest.mark.parametrize("given", [True, False], ids=["asked for", "dropped"])
def test_the_way_through_a_qube_of_ours_is_turned_round(formula, qubesd, given):
    networks(fw="sys-net")
    formula.pillar({})
    before = json.loads(formula.snapshot()[0])["qubes"]
    vpn = {"template": CLONE, "properties": {"provides_network": True, "netvm": "sys-net"}}
    asked = {"templates": EXAMPLE["templates"], "app_qubes": {"vpn": vpn}}
    formula.good({**asked, "settings": {"fw": through("vpn")}})
    vpn["properties"]["netvm"] = "fw"
    pillar = {**asked, "settings": {"fw": through("sys-net")} if given else {}}
    dry = formula.apply(pillar, test=True)
    real = formula.good(pillar)
    assert {part: answer["changes"] for part, answer in dry.items()} == {
        part: answer["changes"] for part, answer in real.items()
    }
    assert list(real["qubes"]["changes"]) == ["fw: netvm", "vpn: netvm"]
    assert netvms(qubesd, "fw", "vpn") == ["sys-net", "fw"]
    assert not any(answer["changes"] for answer in formula.good().values())
    undone(formula, before)


def test_a_qube_of_ours_that_stays_is_no_obstacle_to_the_undo(formula, qubesd):
    networks(fw="sys-net")
    vpn = {"template": CLONE, "properties": {"provides_network": True, "netvm": "fw"}}
    asked = {"templates": EXAMPLE["templates"], "app_qubes": {"vpn": vpn}}
    formula.good(asked)
    vpn["properties"]["netvm"] = "sys-net"
    formula.good({**asked, "settings": {"fw": through("vpn")}})
    use(qubesd, "vpn")
    answer = formula.absent()
    assert (answer["result"], list(answer["changes"])[:1]) == (True, ["fw: netvm"])
    assert netvms(qubesd, "fw", "vpn") == ["sys-net", "sys-net"]


def test_what_is_made_has_its_network_before_others_go_through_it(formula, qubesd):
    networks(fw="sys-net")
    vpn = {"template": CLONE, "properties": {"provides_network": True, "netvm": "sys-net"}}
    asked = {"templates": EXAMPLE["templates"], "app_qubes": {"vpn": vpn}}
    formula.good({**asked, "settings": {"fw": through("vpn")}})
    # a new one begins behind vpn
    sys.modules["qubesadmin"].Qubes().default_netvm = "fw"
    new = {"template": CLONE, "properties": {"provides_network": True}}
    asked["app_qubes"] |= {
        "first": {**new, "properties": {"provides_network": True, "netvm": "second"}},
        "second": {**new, "properties": {"provides_network": True, "netvm": "sys-net"}},
    }
    vpn["properties"]["netvm"] = "first"
    formula.good({**asked, "settings": {"fw": through("vpn")}})
    assert netvms(qubesd, "fw", "vpn", "first", "second") == ["vpn", "first", "second", "sys-net"]


def test_what_provides_network_no_more_is_left_first(formula, qubesd):
    """Of the user's qubes, and put back for those who go back to it."""
    networks(a="sys-net", b="a")
    formula.pillar({})
    before = json.loads(formula.snapshot()[0])["qubes"]
    formula.good({"settings": {"b": through("sys-net")}})
    none = {"properties": {"provides_network": False}}
    formula.good({"settings": {"a": none, "b": through("sys-net")}})
    assert formula.absent()["result"] is True
    assert json.loads(formula.snapshot()[0])["qubes"] == before
    # in one run
    formula.good({"settings": {"a": none, "b": through("sys-net")}})


def test_what_provides_network_no_more_of_ours_is_left_first(formula, qubesd):
    networks(b="sys-net")
    vpn = {"template": CLONE, "properties": {"provides_network": True, "netvm": "sys-net"}}
    asked = {"templates": EXAMPLE["templates"], "app_qubes": {"vpn": vpn}}
    formula.good({**asked, "settings": {"b": through("vpn")}})
    vpn["properties"]["provides_network"] = False
    formula.good({**asked, "settings": {"b": through("sys-net")}})
    assert qubesd.qubes["vpn"]["properties"]["provides_network"] is False


def test_a_loop_that_would_come_with_what_is_put_back_is_told_before(formula, qubesd):
    networks(vpn="sys-net", fw="vpn")
    formula.good({"settings": {"fw": through("sys-net")}})
    sys.modules["qubesadmin"].Qubes().domains["vpn"].netvm = "fw"
    before = formula.snapshot()
    assert check(formula, {"settings": {"sys-net": {"tags": ["x"]}}}) == [
        "fw: netvm can't become vpn: the network would go round: fw > vpn > fw"
    ]
    answer = formula.absent()
    assert (answer["result"], answer["comment"].splitlines()) == (
        True,
        [
            "nothing to undo",
            "left: fw: netvm is left as it is: with vpn the network would go round: fw > vpn > fw",
        ],
    )
    assert formula.snapshot() == before
    sys.modules["qubesadmin"].Qubes().domains["vpn"].netvm = "sys-net"
    assert list(formula.absent()["changes"]) == ["fw: netvm"]


def test_a_new_disposable_has_the_network_of_its_template(formula, qubesd):
    networks(fw="sys-net")
    dvm = {"template": CLONE, "properties": {"netvm": "fw"}}
    asked = {**EXAMPLE, "disposable_templates": {DVM: dvm}}
    asked["disposables"] = {"vpn": {"template": DVM, "properties": {"provides_network": True}}}
    asked["settings"] = {"fw": through("vpn")}
    assert check(formula, asked) == [
        "settings:fw:properties:netvm: the network would go round: fw > vpn > fw"
    ]


def test_what_a_preloaded_disposable_has_beside_its_template_is_in_the_way(formula, qubesd):
    """As its management_dispvm, which it takes over from its template."""
    ours = {DVM: {"template": CLONE, "properties": {"management_dispvm": DVM}}}
    formula.good({**EXAMPLE, "disposable_templates": ours})
    sys.modules["qubesadmin"].Qubes().add_new_vm("DispVM", "disp1", "red", template=DVM)
    qubesd.qubes["disp1"]["properties"]["management_dispvm"] = DVM
    qubesd.run("disp1")
    qubesd.qubes[DVM]["features"]["preload-dispvm"] = "disp1"
    dry, answer = formula.absent(test=True), formula.absent()
    for said in (dry["comment"], answer["comment"]):
        assert f"{DVM} is in use by disp1 (management_dispvm)" in said
    assert DVM in qubesd.qubes


def test_with_the_record_lost_what_we_made_may_hold_data(formula, qubesd):
    formula.good(EXAMPLE)
    (formula.world.root / "var/lib/ramboot/qubes.json").unlink()
    formula.absent()
    assert {CLONE, DVM} <= set(qubesd.qubes)


def test_a_running_qube_stops_the_undo_before_it_begins(formula, qubesd):
    formula.good(EXAMPLE)
    qubesd.run(DVM)
    before = formula.snapshot()
    answer = formula.absent()
    assert (answer["result"], answer["comment"].splitlines()) == (
        False,
        ["nothing was changed:", f"{DVM} is running: halt it, then undo again"],
    )
    assert formula.snapshot() == before


def test_in_a_ram_session_nothing_is_undone(formula):
    formula.good(EXAMPLE)
    before = formula.snapshot()
    formula.world.salt["ramboot_preflight.session_fault"] = lambda: "this is a RAM session (zram)"
    answer = formula.absent()
    assert (answer["result"], answer["comment"].splitlines()) == (
        False,
        ["nothing was changed:", "this is a RAM session (zram)"],
    )
    assert formula.snapshot() == before


def test_clones_and_disposables_of_ours_are_not_taken_for_ours(formula, qubesd):
    formula.good(EXAMPLE)
    # both have our feature from where they come
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("TemplateVM", "their-clone", "red")
    qubesd.qubes["their-clone"]["features"] = dict(qubesd.qubes[CLONE]["features"])
    app.add_new_vm("DispVM", "disp7", "red", template=DVM)
    assert qubesd.qubes["disp7"]["features"]["ramboot-made"].endswith(DVM)
    answer = formula.absent()
    assert {"their-clone", "disp7"} <= set(qubesd.qubes)
    assert answer["comment"].splitlines()[1:] == [
        f"left: {DVM} is in use by disp7 and is left as it is",
        f"left: {CLONE} is in use by {DVM} and is left as it is",
    ]


def test_a_file_pool_with_volumes_in_it_stays(formula, qubesd, everything):
    formula.good({"file_pools": everything["file_pools"]})
    sys.modules["qubesadmin"].Qubes().add_new_vm(
        "AppVM", "theirs", "red", template="debian-12-xfce", pool="usb"
    )
    answer = formula.absent()
    assert answer["comment"].splitlines()[1:] == [
        "left: pool usb is in use by theirs and is left as it is"
    ]
    assert "usb" in qubesd.pools


# Half-made is never kept as good

STEPS = [
    ("admin.vm.volume.CloneTo", f"{CLONE} root"),
    ("admin.vm.volume.CloneTo", f"{CLONE} private"),
    ("admin.vm.firewall.Set", CLONE),
    ("admin.vm.volume.Set.revisions_to_keep", f"{CLONE} root"),
]


@pytest.mark.parametrize(("method", "subject"), STEPS)
def test_a_copy_that_fails_midway_leaves_nothing_and_the_next_run_completes(
    formula, qubesd, method, subject
):
    formula.pillar({})
    before = formula.snapshot()
    formula.fail(method, subject)
    answer = formula.apply(EXAMPLE)["qubes"]
    assert answer["result"] is False
    assert answer["comment"].endswith(f"No space left on device; nothing of {CLONE} was kept"), (
        answer
    )
    qubesd.fault = None
    assert json.loads(formula.snapshot()[0]) == json.loads(before[0])
    formula.good(EXAMPLE)
    assert pools(qubesd, CLONE) == IN_RAM


def test_a_qubesd_that_dies_midway_leaves_a_marked_half_that_is_made_anew(formula, qubesd):
    exc = sys.modules["qubesadmin.exc"]
    gone = []

    def fault(method, subject):
        if method == "admin.vm.volume.CloneTo":
            gone.append(method)
        if gone:
            raise exc.QubesDaemonCommunicationError("Failed to connect to qubesd service")

    qubesd.fault = fault
    answer = formula.apply(EXAMPLE)["qubes"]
    assert answer["result"] is False
    assert answer["changes"] == {}
    assert "qubesd can't be reached" in answer["comment"]
    assert f"{CLONE} is half-made and will be made anew" in answer["comment"]
    qubesd.fault = None
    assert "intent" not in formula.world.salt["ramboot_qubes_record.read"]()["made"][CLONE]
    # it is there, in the right pool, with an empty root: what upstream's qvm.clone takes for good
    assert pools(qubesd, CLONE) == IN_RAM
    assert qubesd.allocated(qubesd.qubes[CLONE]["volumes"]["root"]) == 0
    dry = formula.apply(test=True)["qubes"]
    assert dry["changes"][CLONE]["old"] == "half-made"
    formula.good()
    assert qubesd.allocated(qubesd.qubes[CLONE]["volumes"]["root"]) == 3 * MIB


def test_a_qube_that_somebody_made_meanwhile_is_not_touched(formula, qubesd):
    """While the copy before it takes its minutes."""
    app = sys.modules["qubesadmin"].Qubes()

    def fault(method, subject):
        if method == "admin.vm.volume.CloneTo" and DVM not in qubesd.qubes:
            app.add_new_vm("AppVM", DVM, "red", template="debian-12-xfce")
            qubesd.fill(DVM, "private", 1 << 16)

    qubesd.fault = fault
    answer = formula.apply(EXAMPLE)["qubes"]
    assert (answer["result"], answer["comment"]) == (
        False,
        f"a qube {DVM} was made meanwhile; it was not touched",
    )
    assert set(answer["changes"]) == {CLONE}
    assert qubesd.qubes[DVM]["template"] == "debian-12-xfce"
    record = formula.world.salt["ramboot_qubes_record.read"]()
    assert set(record["made"]) == {CLONE}


def test_a_name_that_is_taken_just_when_it_is_made_is_not_ours(formula, qubesd):
    exc = sys.modules["qubesadmin.exc"]

    def fault(method, subject):
        if (method, subject) == ("admin.vm.Create.AppVM", DVM):
            qubesd.fault = None
            sys.modules["qubesadmin"].Qubes().add_new_vm(
                "AppVM", DVM, "red", template="debian-12-xfce"
            )
            raise exc.QubesValueError(f"VM {DVM} already exists")

    qubesd.fault = fault
    answer = formula.apply(EXAMPLE)["qubes"]
    assert answer["comment"] == (
        f"making {DVM}: VM {DVM} already exists; {DVM} itself is not marked as ours and was not"
        " touched"
    )
    assert DVM in qubesd.qubes
    assert set(formula.world.salt["ramboot_qubes_record.read"]()["made"]) == {CLONE}


def test_a_half_made_qube_that_somebody_uses_is_told_before_anything_is_changed(formula, qubesd):
    formula.fail("admin.vm.volume.CloneTo", error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        formula.apply(EXAMPLE)
    qubesd.fault = None
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("AppVM", "mine", "red", template=CLONE)
    app.default_template = CLONE
    assert check(formula, EXAMPLE) == [
        f"templates:{CLONE}: it is half-made and has to be made anew, but is in use by mine, the"
        " system (default_template)"
    ]


def cut_off(formula, qubesd, method, subject, pillar=EXAMPLE):
    """The power goes at this call; the qube has the mark of one that is begun."""
    formula.fail(method, subject, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        formula.apply(pillar)
    qubesd.fault = None


CUT_OFF = [
    ("admin.vm.property.Set", f"{DVM} default_dispvm", DVM, "private"),
    ("admin.vm.volume.CloneTo", f"{CLONE} root", CLONE, "private"),
    ("admin.vm.volume.CloneTo", f"{CLONE} private", CLONE, "root"),
]


@pytest.mark.parametrize(("method", "subject", "name", "volume"), CUT_OFF)
@pytest.mark.parametrize("how", ["usage", "revision"])
def test_a_half_made_qube_that_was_used_is_not_deleted_unasked(
    formula, qubesd, method, subject, name, volume, how
):
    if how == "revision":
        qubesd.pools["varlibqubes"]["driver"] = "file-reflink"
    cut_off(formula, qubesd, method, subject)
    if how == "usage":
        qubesd.fill(name, volume, 1 << 16)
    else:
        info = qubesd.qubes[name]["volumes"][volume]
        qubesd.revisions[f"{info['pool']} {info['vid']}"] = ["1-back"]
    kind = "templates" if name == CLONE else "disposable_templates"
    assert check(formula, EXAMPLE) == [
        f"{kind}:{name}: it is half-made and has to be made anew, but was used since and may hold"
        " data; add it to remove_data, or delete it yourself"
    ]
    answer = formula.absent()
    assert answer["result"] is True
    assert (
        f"left: {name} is half-made, was used since and may hold data: it is left as it is; add it"
        " to remove_data, or delete it yourself"
    ) in answer["comment"].splitlines()
    assert name in qubesd.qubes
    formula.good({**EXAMPLE, "remove_data": [name]})
    assert qubesd.qubes[name]["features"]["ramboot-made"] == f"whole {kind} {name}"


@pytest.mark.parametrize(
    ("method", "subject", "volume"),
    [
        ("admin.vm.volume.CloneTo", f"{CLONE} root", "root"),
        ("admin.vm.volume.CloneTo", f"{CLONE} private", "private"),
        ("admin.vm.property.Set", f"{CLONE} memory", None),
    ],
)
def test_what_a_copy_that_was_cut_off_left_is_no_data(formula, qubesd, method, subject, volume):
    pillar = {"templates": {CLONE: {"source": "debian-12-xfce", "properties": {"memory": 500}}}}
    cut_off(formula, qubesd, method, subject, pillar)
    if volume:
        qubesd.fill(CLONE, volume, 1 << 16)
    assert formula.apply(test=True)["qubes"]["changes"][CLONE]["old"] == "half-made"
    formula.good()
    assert not any(answer["changes"] for answer in formula.good().values())


def test_a_qube_that_was_used_while_it_was_made_is_not_deleted_when_that_fails(formula, qubesd):
    exc = sys.modules["qubesadmin.exc"]

    def fault(method, subject):
        if (method, subject) == ("admin.vm.property.Set", f"{DVM} default_dispvm"):
            qubesd.fault = None
            qubesd.fill(DVM, "private", 1 << 16)
            raise exc.QubesException("no")

    qubesd.fault = fault
    answer = formula.apply(EXAMPLE)["qubes"]
    assert answer["comment"].endswith(
        f"{DVM} is half-made, was used meanwhile and is left as it is"
    )
    assert DVM in qubesd.qubes


# Between the making of a qube and our mark on it


KIND_OF = {
    CLONE: "templates",
    DVM: "disposable_templates",
    "work": "app_qubes",
    "alone": "standalones",
    "sys-ram": "disposables",
    "low": "low_ram",
    "save": "save",
}


def crash(formula, qubesd, name, error=None, pillar=EXAMPLE):
    """The power goes, or qubesd alone with an error, when the qube is made and has no mark yet."""
    gone = []

    def fault(method, subject):
        if (method, subject) == ("admin.vm.feature", name):
            gone.append(method)
        if gone:
            raise error or KeyboardInterrupt

    qubesd.fault = fault
    answers = None
    if error:
        answers = formula.apply(pillar)
    else:
        with pytest.raises(KeyboardInterrupt):
            formula.apply(pillar)
    qubesd.fault = None
    assert not qubesd.qubes[name]["features"].get("ramboot-made", "").endswith(f" {name}")
    return answers


def test_what_qubesd_does_to_a_qube_that_a_crash_left_is_not_taken_for_the_users(formula, qubesd):
    """In a system without updates of qubes, and at the second start since then."""
    crash(formula, qubesd, DVM)
    qubesd.qubes[DVM]["features"]["check-updates"] = ""
    info = qubesd.qubes[DVM]["volumes"]["private"]
    qubesd.revisions[f"{info['pool']} {info['vid']}"] = ["old"]
    formula.good()
    crash(formula, qubesd, "other", pillar={"app_qubes": {"other": {"template": CLONE}}})
    qubesd.qubes["other"]["features"]["check-updates"] = "1"
    assert "it was given features" in formula.apply(test=True)["checked"]["comment"]


@pytest.mark.parametrize("name", KIND_OF)
def test_a_qube_that_a_crash_left_without_a_mark_is_made_anew(formula, qubesd, everything, name):
    inherited = {"tags": ["inherited"], "firewall": ["action=drop"], "properties": {"memory": 500}}
    everything["disposable_templates"][DVM] |= inherited
    crash(formula, qubesd, name, pillar=everything)
    dry = formula.apply(test=True)["qubes"]
    assert dry["changes"][name]["old"] == "half-made"
    formula.good()
    assert qubesd.qubes[name]["features"]["ramboot-made"] == f"whole {KIND_OF[name]} {name}"
    assert "intent" not in json.dumps(formula.world.salt["ramboot_qubes_record.read"]())
    assert not any(answer["changes"] for answer in formula.good().values())


def cut_at_note(formula, number, when, whole=None):
    """Apply, and the power goes before or after the nth note about what is made; of a qube, if
    named, that it is whole. Whether it came to that.
    """
    made, seen = formula.world.salt["ramboot_qubes_record.made"], []

    def note(name, kind, *rest, **named):
        if whole is None or (name == whole and rest[:1] == (True,)):
            seen.append(name)
        now = len(seen) == number
        if now and when == "before":
            raise KeyboardInterrupt
        made(name, kind, *rest, **named)
        if now:
            raise KeyboardInterrupt

    formula.world.salt["ramboot_qubes_record.made"] = note
    try:
        formula.apply()
    except KeyboardInterrupt:
        return True
    finally:
        formula.world.salt["ramboot_qubes_record.made"] = made
    return False


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_power_cut_at_any_note_leaves_nothing_that_absent_would_keep(formula, when):
    formula.pillar(EXAMPLE)
    before = formula.snapshot()
    number = 1
    while cut_at_note(formula, number, when):
        formula.good()
        answer = formula.absent()
        assert answer["result"] is True, (number, answer)
        assert formula.snapshot() == before, number
        number += 1
    assert number > 10


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_power_cut_between_the_note_and_the_mark_of_any_kind_heals(formula, everything, when):
    formula.pillar({})
    before = json.loads(formula.snapshot()[0])
    formula.pillar(everything)
    for name in sorted(KIND_OF, key=lambda name: [*formula.qubes.KINDS].index(KIND_OF[name])):
        assert cut_at_note(formula, 1, when, whole=name)
        assert formula.apply(test=True)["qubes"]["changes"][name]["old"] == "half-made"
    formula.good()
    answer = formula.absent()
    assert answer["result"] is True, answer
    assert "left:" not in answer["comment"]
    assert json.loads(formula.snapshot()[0]) == before


def test_what_qubesd_itself_gives_a_qube_does_not_make_it_somebodys(formula, qubesd):
    qubesd.qubes["debian-12-xfce"]["features"]["default-menu-items"] = "firefox.desktop"
    crash(formula, qubesd, DVM)
    assert set(qubesd.qubes[DVM]["tags"]) == {"created-by-dom0", "guivm-dom0", "audiovm-dom0"}
    assert qubesd.qubes[DVM]["features"] == {"menu-items": "firefox.desktop"}
    # qubesd was started anew since
    os.utime(qubesd.folder(DVM), (0, 0))
    assert formula.apply(test=True)["qubes"]["changes"][DVM]["old"] == "half-made"
    formula.good()


def test_where_no_time_of_birth_is_known_a_qube_without_a_mark_is_somebodys(formula, qubesd):
    crash(formula, qubesd, DVM)
    qubesd.born[str(qubesd.folder(DVM))] = 0
    (told,) = check(formula, EXAMPLE)
    assert f"when it was made can't be told: {qubesd.folder(DVM)}: no time of birth" in told


def test_a_qubesd_that_dies_before_the_mark_is_the_same(formula, qubesd):
    exc = sys.modules["qubesadmin.exc"]
    error = exc.QubesDaemonCommunicationError("Failed to connect to qubesd service")
    answer = crash(formula, qubesd, CLONE, error)["qubes"]
    assert answer["comment"].startswith(f"setting feature ramboot-made of {CLONE}: qubesd can't be")
    assert f"{CLONE} is half-made and will be made anew" in answer["comment"]
    formula.good()


@pytest.mark.parametrize("kind", ["QubesDaemonCommunicationError", "QubesDaemonAccessError"])
def test_a_qubesd_that_made_it_and_died_before_it_said_so_is_the_same(formula, qubesd, kind):
    exc = sys.modules["qubesadmin.exc"]
    gone = []

    def fault(method, subject):
        if (method, subject) == ("admin.vm.Create.AppVM", DVM) and not gone:
            gone.append(None)
            app = sys.modules["qubesadmin"].Qubes()
            app.add_new_vm("AppVM", DVM, "black", template=CLONE, pool="varlibqubes")
            gone.append(method)
            # the one question that was open gets no answer, those after it reach nobody
            raise getattr(exc, kind)("Got empty response from qubesd")
        if gone and gone[-1]:
            raise exc.QubesDaemonCommunicationError("Failed to connect to qubesd service")

    qubesd.fault = fault
    assert "Got empty response" in formula.apply(EXAMPLE)["qubes"]["comment"]
    qubesd.fault = None
    assert formula.apply(test=True)["qubes"]["changes"][DVM]["old"] == "half-made"
    formula.good()


def test_what_a_crash_left_without_a_mark_is_taken_away_by_absent(formula, qubesd):
    formula.pillar({})
    before = formula.snapshot()
    crash(formula, qubesd, DVM)
    assert formula.absent()["result"] is True
    assert formula.snapshot() == before


def touch(formula, qubesd, what):
    """Somebody works with the qube that the crash left, or made one of that name since."""
    app = sys.modules["qubesadmin"].Qubes()
    vm, held = app.domains[DVM], qubesd.qubes[DVM]
    if what == "template":
        vm.template = "debian-12-xfce"
    elif what == "label":
        vm.label = "orange"
    elif what == "running":
        qubesd.run(DVM)
    elif what == "data":
        qubesd.fill(DVM, "private", 1 << 12)
    elif what == "revision":
        qubesd.revisions[f"varlibqubes appvms/{DVM}/private"] = ["1-back"]
    elif what == "feature":
        vm.features["x"] = "1"
    elif what == "tag":
        vm.tags.add("mine")
    elif what == "firewall":
        formula.world.salt["ramboot_qubesadmin.set_firewall"](DVM, ["action=drop"])
    elif what == "device":
        held["pci"]["00_14.0"] = {}
    elif what == "property":
        vm.memory = 500
    elif what == "pool":
        held["volumes"]["private"]["pool"] = "vm-pool"
    elif what == "class":
        del app.domains[DVM]
        app.add_new_vm("StandaloneVM", DVM, "black", pool="varlibqubes")
    elif what in ("later", "earlier"):
        qubesd.born[str(qubesd.folder(DVM))] += 125 if what == "later" else -5
    else:
        assert what == "directory"
        shutil.rmtree(qubesd.folder(DVM))


TOUCHED = {
    "class": "its class is StandaloneVM, not AppVM",
    "template": f"its template is debian-12-xfce, not {CLONE}",
    "label": "its label is orange, not black",
    "running": "it is running",
    "later": "it was not made when that run was cut off",
    "earlier": "it was not made when that run was cut off",
    "directory": "when it was made can't be told: ",
    "pool": "its private volume lies in pool vm-pool, not in varlibqubes",
    "data": "its private volume holds data",
    "revision": "its private volume holds data",
    "feature": "it was given features",
    "tag": "it was given tags",
    "firewall": "it was given firewall rules or devices",
    "device": "it was given firewall rules or devices",
    "property": "its memory was set",
}


@pytest.mark.parametrize("what", TOUCHED)
def test_what_somebody_made_or_touched_meanwhile_is_never_removed(formula, qubesd, what):
    if what == "revision":
        qubesd.pools["varlibqubes"]["driver"] = "file-reflink"
    crash(formula, qubesd, DVM)
    touch(formula, qubesd, what)
    before = formula.snapshot()[0]
    (told,) = check(formula, EXAMPLE)
    assert TOUCHED[what] in told, told
    assert told.startswith(
        f"disposable_templates:{DVM}: a run that was making it was cut off, and the qube of that"
        f" name ({qubesd.qubes[DVM]['class']}) may be yours: "
    )
    assert told.endswith("; delete it if nobody needs it, or choose another name")
    assert formula.apply()["checked"]["result"] is False
    assert formula.snapshot()[0] == before
    answer = formula.absent()
    assert answer["result"] is True
    assert (
        f"left: {DVM} has no mark of ramboot, may be yours, and is left as it is"
        in answer["comment"].splitlines()
    )
    assert DVM in qubesd.qubes
    assert DVM not in formula.world.salt["ramboot_qubes_record.read"]()["made"]
    assert "has no mark" not in formula.absent()["comment"]


def test_a_twin_of_ours_that_was_faster_is_not_ours(formula, qubesd):
    """Just as we would have made it, and qubesd says that we did not."""
    exc = sys.modules["qubesadmin.exc"]

    def fault(method, subject):
        if (method, subject) == ("admin.vm.Create.AppVM", DVM):
            qubesd.fault = None
            app = sys.modules["qubesadmin"].Qubes()
            app.add_new_vm("AppVM", DVM, "black", template=CLONE, pool="varlibqubes")
            raise exc.QubesValueError(f"VM {DVM} already exists")

    qubesd.fault = fault
    answer = formula.apply(EXAMPLE)["qubes"]
    assert answer["comment"].endswith(f"{DVM} itself is not marked as ours and was not touched")
    (told,) = check(formula, EXAMPLE)
    assert "was not made by ramboot" in told
    assert DVM in qubesd.qubes


def test_a_half_made_qube_is_taken_away_by_absent(formula, qubesd):
    formula.fail("admin.vm.volume.CloneTo", error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        formula.apply(EXAMPLE)
    qubesd.fault = None
    assert CLONE in qubesd.qubes
    answer = formula.absent()
    assert answer["changes"] == {CLONE: {"old": "half-made", "new": None}}
    assert CLONE not in qubesd.qubes


def test_what_was_done_before_the_failure_is_told(formula):
    formula.fail("admin.vm.Create.AppVM", DVM)
    answer = formula.apply(EXAMPLE)["qubes"]
    assert (answer["result"], list(answer["changes"])) == (False, [CLONE])


def test_a_source_that_is_started_while_it_is_copied_spoils_the_copy(formula, qubesd):
    def fault(method, subject):
        if (method, subject) == ("admin.vm.volume.CloneTo", f"{CLONE} private"):
            qubesd.update("debian-12-xfce")

    qubesd.fault = fault
    answer = formula.apply(EXAMPLE)["qubes"]
    assert f"debian-12-xfce was started while it was being copied to {CLONE}" in answer["comment"]
    assert CLONE not in qubesd.qubes


# Freshness


def test_a_source_that_was_updated_is_told_by_a_dry_run_and_copied_by_a_real_one(formula, qubesd):
    formula.good(EXAMPLE)
    use(qubesd, DVM)
    private = dict(qubesd.qubes[DVM]["volumes"]["private"])
    size = qubesd.allocated(private)
    qubesd.update("debian-12-xfce", 2 * MIB)
    dry = formula.apply(test=True)["qubes"]
    assert dry["result"] is None
    assert list(dry["changes"]) == [f"{CLONE}: root of debian-12-xfce"]
    real = formula.good()["qubes"]
    assert real["changes"] == dry["changes"]
    assert qubesd.allocated(qubesd.qubes[CLONE]["volumes"]["root"]) == 5 * MIB
    # the disposable template's own data is as it was
    assert qubesd.qubes[DVM]["volumes"]["private"] == private
    assert qubesd.allocated(private) == size
    assert all(not answer["changes"] for answer in formula.good().values())


def test_refresh_brings_the_features_that_describe_the_root(formula, qubesd):
    source = qubesd.qubes["debian-12-xfce"]
    source["features"] = {"os-version": "12", "mine": "1", "updates-available": "1"}
    formula.good(EXAMPLE)
    source["features"] = {"os-version": "13", "mine": "2", "qubes-agent-version": "4.3"}
    qubesd.update("debian-12-xfce")
    formula.good()
    features = qubesd.qubes[CLONE]["features"]
    assert (features["os-version"], features["mine"]) == ("13", "1")
    assert features["qubes-agent-version"] == "4.3"
    assert "updates-available" not in features


def test_refresh_takes_no_setting_of_the_users_from_the_copy(formula, qubesd):
    """Each is named like one that says what is in the root."""
    formula.good(EXAMPLE)
    mine = {
        "gui-videoram-min": "100000",
        "gui-videoram-overhead": "1",
        "gui-seamless": "1",
        "os-mine": "1",
        "qubes-mine": "1",
        "vmexec-mine": "1",
        "last-updates-mine": "1",
        "supported-mine": "1",
        "internal": "1",
    }
    derived = {
        "gui": "1",
        "gui-emulated": "1",
        "os": "Linux",
        "os-eol": "2030-01-01",
        "last-updates-check": "then",
        "supported-service.cups": "1",
        "supported-feature.x": "1",
        "supported-rpc.qubes.Filecopy": "1",
        "boot-mode.kernelopts.x": "y",
        "template-release": "1",
    }
    qubesd.qubes[CLONE]["features"] |= {**mine, **derived}
    qubesd.update("debian-12-xfce")
    formula.good()
    features = qubesd.qubes[CLONE]["features"]
    assert {key: features.get(key) for key in mine} == mine
    assert not features.keys() & derived.keys()


def test_refresh_manual_tells_and_keeps(formula, qubesd):
    wanted = {"templates": {CLONE: {"source": "debian-12-xfce", "refresh": "manual"}}}
    formula.good(wanted)
    qubesd.update("debian-12-xfce")
    answers = formula.good()
    assert answers["checked"]["comment"].splitlines() == [
        "nothing stands in the way",
        f"{CLONE}: debian-12-xfce was updated since it was copied; refresh: manual keeps the old"
        " copy",
    ]
    assert answers["qubes"]["changes"] == {}


def test_a_copy_that_was_changed_itself_is_not_overwritten_unasked(formula, qubesd):
    formula.good(EXAMPLE)
    use(qubesd, CLONE, "root")
    qubesd.update("debian-12-xfce")
    answers = formula.good()
    assert answers["qubes"]["changes"] == {}
    assert "itself was changed as well" in answers["checked"]["comment"]
    answers = formula.good({**EXAMPLE, "remove_data": [CLONE]})
    assert list(answers["qubes"]["changes"]) == [f"{CLONE}: root of debian-12-xfce"]


def test_a_source_that_writes_in_place_counts_as_updated_while_it_runs(formula, qubesd):
    """core: qubes/storage/reflink.py, start: the image is renamed where snapshots are off."""
    image = formula.world.root / "var/lib/qubes/vm-templates/mine/root.img"
    dirty = image.with_name("root-dirty.img")
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("TemplateVM", "mine", "black", pool="varlibqubes")
    formula.good({"templates": {CLONE: {"source": "mine"}}})
    image.rename(dirty)
    qubesd.run("mine")
    assert formula.good()["qubes"]["changes"] == {}
    dirty.write_bytes(b"update")
    assert check(formula, {"templates": {CLONE: {"source": "mine"}}}) == [
        f"templates:{CLONE}:source: mine is running; halt it, a volume in use can't be copied whole"
    ]
    dirty.rename(image)
    qubesd.run("mine", False)
    assert set(formula.good()["qubes"]["changes"]) == {f"{CLONE}: root of mine"}


def test_a_volume_that_is_missing_is_named(formula):
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("TemplateVM", "mine", "black", pool="varlibqubes")
    formula.good({"templates": {CLONE: {"source": "mine"}}})
    image = formula.world.root / "var/lib/qubes/vm-templates/mine/root.img"
    image.unlink()
    assert formula.apply()["checked"]["comment"] == (
        "volume vm-templates/mine/root of pool varlibqubes is missing: there is no " + str(image)
    )


@pytest.mark.parametrize("volume", ["root", "private"])
def test_ours_without_one_of_its_volumes_is_not_taken_for_good(formula, qubesd, volume):
    """As the power leaves one whose deletion had begun."""
    formula.good(EXAMPLE)
    image = formula.world.root / f"var/lib/qubes/vm-templates/{CLONE}/{volume}.img"
    image.unlink()
    assert check(formula, EXAMPLE) == [
        f"templates:{CLONE}: volume vm-templates/{CLONE}/{volume} of pool varlibqubes is missing:"
        f" there is no {image}; delete it to have it anew"
    ]
    answer = formula.absent()
    assert answer["result"] is True
    assert DVM not in qubesd.qubes
    assert f"left: {CLONE} was used since it was made and may hold data" in answer["comment"]
    formula.pillar({"remove_data": [CLONE]})
    assert list(formula.absent()["changes"]) == [CLONE]
    assert CLONE not in qubesd.qubes


def test_a_refresh_that_failed_midway_is_done_again(formula, qubesd):
    formula.good(EXAMPLE)
    qubesd.update("debian-12-xfce")
    formula.fail("admin.vm.volume.CloneTo")
    answer = formula.apply()["qubes"]
    assert answer["result"] is False
    qubesd.fault = None
    assert "ramboot-source" not in qubesd.qubes[CLONE]["features"]
    answers = formula.good()
    assert list(answers["qubes"]["changes"]) == [f"{CLONE}: root of debian-12-xfce"]
    assert qubesd.qubes[CLONE]["features"]["ramboot-source"]


def test_a_refresh_waits_until_whoever_uses_the_copy_is_halted(formula, qubesd):
    formula.good(EXAMPLE)
    sys.modules["qubesadmin"].Qubes().add_new_vm("DispVM", "disp1", "red", template=DVM)
    qubesd.run("disp1")
    assert formula.apply()["checked"]["result"] is True
    qubesd.update("debian-12-xfce")
    answer = formula.apply()["checked"]
    assert answer["comment"].splitlines()[1:] == [
        f"templates:{CLONE}: it is to be copied anew, and disp1 is running; halt that first"
    ]


@pytest.mark.parametrize("holder", [DVM, "dom0"])
def test_a_refresh_tells_how_to_be_rid_of_preloaded_disposables(formula, qubesd, holder):
    formula.good(EXAMPLE)
    if holder == "dom0":
        qubesd.system["default_dispvm"] = DVM
        qubesd.features["preload-dispvm-max"] = "1"
    sys.modules["qubesadmin"].Qubes().add_new_vm("DispVM", "disp1", "red", template=DVM)
    qubesd.run("disp1")
    qubesd.qubes[DVM]["features"]["preload-dispvm"] = "disp1"
    qubesd.update("debian-12-xfce")
    assert check(formula, EXAMPLE) == [
        f"templates:{CLONE}: it is to be copied anew, and disp1 (preloaded: set preload-dispvm-max"
        f" of {holder} to 0) is running; halt that first"
    ]


# Preloaded disposables

MAX = "preload-dispvm-max"


@pytest.fixture
def given(formula, qubesd, monkeypatch):
    """(qube, what it was given, value) in this order; features alone have a value."""
    found = []

    def watch(function):
        real = formula.world.salt[f"ramboot_qubesadmin.{function}"]

        def call(name, *about):
            real(name, *about)
            found.append((name, *about) if function == "set_feature" else (name, function))

        monkeypatch.setitem(formula.world.salt, f"ramboot_qubesadmin.{function}", call)

    for function in ("set_feature", "set_tag", "set_firewall", "set_property"):
        watch(function)
    return found


def test_disposables_are_preloaded_when_all_else_of_their_template_is_set(formula, qubesd, given):
    asked = {kind: dict(entries) for kind, entries in EXAMPLE.items()}
    asked["disposable_templates"][DVM] = {
        "template": CLONE,
        # set in the second pass
        "properties": {"netvm": "sys-ram"},
        "features": {MAX: 2},
        "services": {"cups": False},
        "tags": ["mine"],
        "firewall": FIREWALL,
    }
    asked["app_qubes"] = {
        "sys-ram": {"template": CLONE, "properties": {"provides_network": True}},
    }
    formula.good(asked)
    of_it = [about[1:] for about in given if about[0] == DVM]
    assert of_it[-1] == (MAX, "2")
    assert of_it.count((MAX, "2")) == 1
    whole = of_it.index(("ramboot-made", f"whole disposable_templates {DVM}"))
    assert of_it.index(("set_firewall",)) < whole < len(of_it) - 2
    before = formula.snapshot()
    assert not any(answer["changes"] for answer in formula.good().values())
    assert formula.snapshot() == before
    # one that is there, while another is made
    asked["disposable_templates"][DVM] |= {"firewall": ["action=drop"], "features": {MAX: 3}}
    asked["app_qubes"]["work"] = {"template": CLONE}
    asked["disposable_templates"][DVM]["properties"] = {"netvm": "work"}
    asked["app_qubes"]["work"]["properties"] = {"provides_network": True}
    given.clear()
    formula.good(asked)
    of_it = [about[1:] for about in given if about[0] == DVM]
    assert of_it == [(MAX, "0"), ("set_firewall",), ("set_property",), (MAX, "3")]


def notes_of(formula, key):
    settings = formula.world.salt["ramboot_qubes_record.read"]()["settings"]
    return [item for item in settings if item["key"] == key]


@pytest.mark.parametrize("holder", [DVM, "dom0"])
def test_preloaded_disposables_are_made_anew_when_what_they_keep_changes(
    formula, qubesd, given, holder
):
    asked = {kind: dict(entries) for kind, entries in EXAMPLE.items()}
    formula.good(asked)
    if holder == "dom0":
        qubesd.system["default_dispvm"] = DVM
        qubesd.features[MAX] = "2"
    else:
        qubesd.qubes[DVM]["features"][MAX] = "2"
    for more in ({"services": {"cups": True}}, {"tags": ["x"]}, {"firewall": ["action=drop"]}):
        asked["disposable_templates"][DVM] = {**asked["disposable_templates"][DVM], **more}
        given.clear()
        changes = formula.good(asked)["qubes"]["changes"]
        assert [about for about in given if MAX in about] == [given[0], given[-1]]
        assert (given[0], given[-1]) == ((holder, MAX, "0"), (holder, MAX, "2"))
        assert len(given) == 3
        assert list(changes)[0] == f"{holder}: preloaded disposables"
        assert list(changes)[-1] == f"{holder}: preloaded disposables again"
        # the number is nothing of ours
        assert notes_of(formula, MAX) == []
    # nor do they keep what is taken back
    del asked["disposable_templates"][DVM]["tags"]
    given.clear()
    formula.good(asked)
    assert given == [(holder, MAX, "0"), (DVM, "set_tag"), (holder, MAX, "2")]
    assert notes_of(formula, MAX) == []
    # qubesd itself notices other properties
    asked["disposable_templates"][DVM] |= {"properties": {"memory": 500}}
    given.clear()
    formula.good(asked)
    assert given == [(DVM, "set_property")]


def test_a_number_of_the_pillars_is_the_same_after(formula, given):
    asked = {kind: dict(entries) for kind, entries in EXAMPLE.items()}
    asked["disposable_templates"][DVM] = {"template": CLONE, "features": {MAX: 2}}
    formula.good(asked)
    noted = notes_of(formula, MAX)
    asked["disposable_templates"][DVM]["tags"] = ["x"]
    given.clear()
    formula.good(asked)
    assert given == [(DVM, MAX, "0"), (DVM, "set_tag"), (DVM, MAX, "2")]
    assert notes_of(formula, MAX) == noted
    # given up, it is none again, also where another setting goes with it
    asked["disposable_templates"][DVM] = {"template": CLONE}
    formula.good(asked)
    assert notes_of(formula, MAX) == []
    assert MAX not in formula.qubesd.qubes[DVM]["features"]


THEIRS = "default-dvm"


@pytest.mark.parametrize("before", [None, "1", "2"])
@pytest.mark.parametrize("after", [None, 2, 3])
def test_preloaded_disposables_of_somebody_elses_template(formula, qubesd, given, before, after):
    features = qubesd.qubes[THEIRS]["features"]
    if before:
        features[MAX] = before
    original = dict(features)
    asked = {"firewall": FIREWALL, "tags": ["x"], "services": {"cups": False}}
    asked["features"] = {MAX: after} if after else {}
    formula.good({"settings": {THEIRS: asked}})
    numbers = [about[2] for about in given if about[1] == MAX]
    assert numbers == ["0"] * bool(before) + [str(after or before)] * bool(after or before)
    if before:
        assert given[0] == (THEIRS, MAX, "0")
    if numbers:
        assert given[-1] == (THEIRS, MAX, str(after or before))
    assert not any(answer["changes"] for answer in formula.good().values())
    given.clear()
    dry = formula.absent(test=True)
    answer = formula.absent()
    assert (answer["result"], answer["changes"]) == (True, dry["changes"])
    assert qubesd.qubes[THEIRS]["features"] == original
    assert formula.snapshot()[1] is None
    if before or after:
        assert given[0] == (THEIRS, MAX, "0")
        assert given[-1] == (THEIRS, MAX, before)


def test_a_number_that_somebody_set_since_is_theirs(formula, qubesd):
    asked = {"features": {MAX: 2}}
    formula.good({"settings": {THEIRS: asked}})
    qubesd.qubes[THEIRS]["features"][MAX] = "5"
    formula.good({"settings": {THEIRS: {"tags": ["x"]}}})
    assert qubesd.qubes[THEIRS]["features"][MAX] == "5"
    assert formula.absent()["result"] is True
    assert qubesd.qubes[THEIRS]["features"][MAX] == "5"


@pytest.mark.parametrize("whose", [THEIRS, DVM, "dom0"])
@pytest.mark.parametrize("then", ["apply", "absent"])
def test_a_run_that_is_cut_off_while_none_are_preloaded(formula, qubesd, whose, then):
    asked = {kind: dict(entries) for kind, entries in EXAMPLE.items()}
    formula.good(asked)
    template = THEIRS if whose == "dom0" else whose
    kept = qubesd.features if whose == "dom0" else qubesd.qubes[whose]["features"]
    kept[MAX] = "2"
    if whose == DVM:
        asked["disposable_templates"][DVM] = {"template": CLONE, "firewall": FIREWALL}
    else:
        asked["settings"] = {template: {"firewall": FIREWALL}}
    formula.fail("admin.vm.firewall.Set", template)
    assert not all(answer["result"] for answer in formula.apply(asked).values())
    assert kept[MAX] == "0"
    qubesd.fault = None
    if then == "apply":
        formula.good()
        assert kept[MAX] == "2"
        assert not any(answer["changes"] for answer in formula.good().values())
    answer = formula.absent()
    assert answer["result"] is True, answer
    assert whose == DVM or kept[MAX] == "2"
    assert formula.snapshot()[1] is None


@pytest.mark.parametrize("left", ["half of it", "nothing"])
@pytest.mark.parametrize("then", ["apply", "absent"])
def test_a_refresh_that_is_cut_off_leaves_nobodys_data(formula, qubesd, left, then):
    """The driver file deletes the root before it copies (core: qubes/storage/file.py)."""
    formula.good(EXAMPLE)
    qubesd.update("debian-12-xfce")
    root = qubesd.file(qubesd.qubes[CLONE]["volumes"]["root"])

    def fault(method, _subject):
        if method == "admin.vm.volume.CloneTo":
            root.unlink()
            if left != "nothing":
                root.write_bytes(b"half")
            raise sys.modules["qubesadmin.exc"].StoragePoolException("No space left on device")

    qubesd.fault = fault
    assert not all(answer["result"] for answer in formula.apply().values())
    qubesd.fault = None
    if then == "apply":
        formula.good()
        assert root.exists()
        assert root.read_bytes() != b"half"
        assert not any(answer["changes"] for answer in formula.good().values())
    else:
        assert formula.absent()["result"] is True
        assert not {CLONE, DVM} & set(qubesd.qubes)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_power_cut_at_the_last_note_of_a_refresh_does_not_make_the_copy_used(
    formula, qubesd, when
):
    formula.good(EXAMPLE)
    qubesd.update("debian-12-xfce")
    assert cut_at_note(formula, 1, when, whole=CLONE)
    formula.good()
    assert formula.absent()["result"] is True
    assert not {CLONE, DVM} & set(qubesd.qubes)


def test_a_refresh_that_is_cut_off_at_its_last_note_is_done_again(formula, qubesd):
    formula.good(EXAMPLE)
    qubesd.update("debian-12-xfce")
    made = formula.world.salt["ramboot_qubes_record.made"]

    def cut_off(name, kind, *rest, **named):
        raise KeyboardInterrupt

    formula.world.salt["ramboot_qubes_record.made"] = cut_off
    with pytest.raises(KeyboardInterrupt):
        formula.apply()
    formula.world.salt["ramboot_qubes_record.made"] = made
    assert CLONE in str(formula.apply(test=True))
    formula.good()
    assert not any(answer["changes"] for answer in formula.good().values())
    assert formula.absent()["result"] is True
    assert CLONE not in qubesd.qubes


# Disposables end at any time


def ends_when(formula, qubesd, name, question, about=None):
    """A qube is no more as soon as this is asked about it, or about another."""
    asked = formula.world.salt[f"ramboot_qubesadmin.{question}"]

    def ask(*arguments):
        if arguments[0] == (about or name) and name in qubesd.qubes:
            del sys.modules["qubesadmin"].Qubes().domains[name]
        return asked(*arguments)

    formula.world.salt[f"ramboot_qubesadmin.{question}"] = ask


@pytest.fixture
def disp7(formula, qubesd):
    sys.modules["qubesadmin"].Qubes().add_new_vm("DispVM", "disp7", "red", template="default-dvm")
    return "disp7"


QUESTIONS = ("features", "property_names", "properties", "backends", "volumes")


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_disposable_that_ends_during_an_undo_is_passed_over(formula, qubesd, disp7, question):
    pool = {"usb": {"dir_path": f"{formula.world.root}/usb", "on_root": True}}
    formula.good({**EXAMPLE, "file_pools": pool})
    ends_when(formula, qubesd, disp7, question)
    answer = formula.absent()
    assert disp7 not in qubesd.qubes
    assert (answer["result"], set(answer["changes"])) == (True, {CLONE, DVM, "pool usb"}), answer


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_disposable_that_ends_during_the_check_is_passed_over(formula, qubesd, disp7, question):
    named = {"template": DVM, "properties": {"memory": 300}}
    # who names it is asked when it is to provide no network
    sys.modules["qubesadmin"].Qubes().add_new_vm(
        "AppVM", "net", "red", template="debian-12-xfce"
    ).provides_network = True
    off = {"net": {"properties": {"provides_network": False}}}
    ends_when(formula, qubesd, disp7, question)
    formula.good({**EXAMPLE, "disposables": {"named": named}, "settings": off})
    assert (disp7 in qubesd.qubes) == (question == "backends")


def test_a_user_that_ended_keeps_nothing_from_being_undone(formula, qubesd):
    """Found when another qube's users are looked for."""
    formula.good({**EXAMPLE, "app_qubes": {"work": {"template": CLONE}}})
    sys.modules["qubesadmin"].Qubes().add_new_vm("DispVM", "disp7", "red", template=DVM)
    ends_when(formula, qubesd, "disp7", "property_names")
    assert {CLONE, DVM, "work"} <= set(formula.absent()["changes"])
    assert "work" not in qubesd.qubes


def test_a_qube_that_is_still_there_and_can_not_be_asked_stops_an_undo(formula, qubesd, disp7):
    formula.good(EXAMPLE)
    exc = sys.modules["qubesadmin.exc"]
    formula.fail("admin.vm.feature", disp7, exc.QubesDaemonCommunicationError("no answer"))
    qubesd.calls.clear()
    answer = formula.absent()
    assert answer["result"] is False
    assert answer["comment"] == f"the features of {disp7}: qubesd can't be reached: no answer"
    assert {CLONE, DVM} <= set(qubesd.qubes)


def test_what_can_be_undone_when_a_disposable_ended_at_last_is_told(formula, qubesd):
    formula.good(EXAMPLE)
    sys.modules["qubesadmin"].Qubes().add_new_vm("DispVM", "disp7", "red", template=DVM)
    undo = formula.world.salt["ramboot_qubes.undo"]

    def and_then_it_ends():
        left = undo()
        del qubesd.qubes["disp7"]
        return left

    formula.world.salt["ramboot_qubes.undo"] = and_then_it_ends
    answer = formula.absent()
    assert answer["result"] is True, answer
    assert not {CLONE, DVM} & set(answer["changes"])
    assert f"left: {DVM} can be undone by now: apply this again" in answer["comment"].splitlines()
    formula.world.salt["ramboot_qubes.undo"] = undo
    assert list(formula.absent()["changes"]) == [DVM, CLONE]


# Faults: all at once, before anything is changed


def check(formula, qubes):
    before = formula.snapshot()
    answers = formula.apply(qubes)
    assert list(answers) == ["checked"]
    assert answers["checked"]["result"] is False
    assert formula.snapshot() == before
    lines = answers["checked"]["comment"].splitlines()
    assert lines[0] == "nothing was changed:"
    return lines[1:]


def test_faults_are_told_all_at_once(formula, qubesd):
    qubesd.run("debian-12-xfce")
    found = check(
        formula,
        {
            "templates": {
                CLONE: {"source": "debian-12-xfce", "label": "pink"},
                "b": {"source": "none"},
                "c": {"source": "sys-net"},
            },
            "app_qubes": {
                "sys-net": {"template": CLONE},
                "d": {"template": "debian-12-xfce", "properties": {"memry": 1, "netvm": "nobody"}},
            },
            "disposables": {"e": {"template": "sys-net"}},
            "settings": {"nobody": {"tags": ["a"]}},
            "default_pools": {"default_pool": "nowhere"},
        },
    )
    colors = "red, orange, yellow, green, gray, blue, purple, black"
    assert found == [
        "default_pools:default_pool: there is no pool nowhere",
        f"templates:{CLONE}:source: debian-12-xfce is running; halt it, a volume in use can't be"
        " copied whole",
        f"templates:{CLONE}:label: there is no label pink; known: {colors}",
        "templates:b:source: there is no qube none",
        "templates:c:source: sys-net is a AppVM; wanted: TemplateVM",
        "app_qubes:sys-net: a qube of that name is there (AppVM) and was not made by ramboot;"
        " rename or delete it, or choose another name",
        "app_qubes:d:template: the root of debian-12-xfce lies in pool vm-pool, and so would that"
        " of d (a snapshot lies where its origin lies); put a copy of debian-12-xfce under"
        " templates",
        "app_qubes:d:properties:memry: AppVM has no such property; did you mean memory?",
        "app_qubes:d:properties:netvm: there is no qube nobody",
        "disposables:e:template: sys-net is no template of disposables",
        "settings:nobody: there is no such qube",
    ]


@pytest.mark.parametrize("value", [False, 0, True, 7], ids=str)
@pytest.mark.parametrize("key", ["netvm", "default_dispvm"])
def test_a_property_that_is_a_qube_takes_no_number_and_no_switch(formula, key, value):
    """`netvm: no` in YAML."""
    new = {"template": CLONE, "properties": {key: value}}
    there = {"tags": ["mine"], "properties": {key: value}}
    found = check(formula, {**EXAMPLE, "app_qubes": {"w": new}, "settings": {"sys-net": there}})
    told = f"{value} is not allowed; allowed: the name of a qube, or nothing (null) for none"
    assert found == [
        f"{where}:properties:{key}: {told}" for where in ("app_qubes:w", "settings:sys-net")
    ]


def test_values_of_another_type_than_the_property_is_are_told(formula):
    """Also of a qube whose class has none yet: any that has the property tells its type."""
    given = {"memory": "lots", "vcpus": True, "autostart": "maybe", "debug": None, "maxmem": None}
    told = [
        "memory: 'lots' is not allowed; allowed: a whole number",
        "vcpus: True is not allowed; allowed: a whole number",
        "autostart: 'maybe' is not allowed; allowed: true or false",
        "debug: nothing is not allowed; allowed: true or false",
        "maxmem: nothing is not allowed; allowed: a whole number",
    ]
    wanted = {
        "templates": {CLONE: {"source": "debian-12-xfce", "properties": given}},
        "standalones": {"alone": {"source": "debian-12-xfce", "properties": given}},
        "settings": {
            "sys-net": {"properties": given, "tags": ["mine"]},
            "dom0": {"properties": {"include_in_backups": 2}},
        },
    }
    places = (f"templates:{CLONE}", "standalones:alone", "settings:sys-net")
    assert check(formula, wanted) == [
        *(f"{place}:properties:{one}" for place in places for one in told),
        "settings:dom0:properties:include_in_backups: 2 is not allowed; allowed: true or false",
    ]


TEXTS = {"default_user": "me", "virt_mode": "hvm", "kernel": "", "mac": "00:16:3e:5e:6c:01"}


def test_the_type_of_a_value_is_asked_of_one_qube(formula, qubesd):
    networks(vpn=None, more="sys-net")
    new = {"template": CLONE, "properties": {**TEXTS, "netvm": None, "memory": 300}}
    there = {"properties": {**TEXTS, "default_dispvm": None}}
    formula.pillar({**EXAMPLE, "app_qubes": {"w": new}, "settings": {"sys-net": there}})
    asked = []
    question = formula.world.salt["ramboot_qubesadmin.property_type"]

    def counted(name, key):
        asked.append((name, key))
        return question(name, key)

    formula.world.salt["ramboot_qubesadmin.property_type"] = counted
    assert formula.world.salt["ramboot_qubes.faults"]() == []
    # of the new one its class
    assert sorted(asked) == sorted(
        [("default-dvm", key) for key in new["properties"]]
        + [("sys-net", key) for key in there["properties"]]
    )


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "refused"])
@pytest.mark.parametrize(
    "question",
    [
        ("admin.vm.property.List", "another"),
        ("admin.vm.property.Get", "another default_user"),
        ("admin.vm.property.Get", "another memory"),
    ],
    ids=" ".join,
)
def test_an_unrelated_qube_that_can_not_tell_a_type_does_not_end_the_check(
    formula, qubesd, question, gone
):
    networks(another=None)
    exc = sys.modules["qubesadmin.exc"]

    def fault(*called):
        if called == question:
            if gone:
                qubesd.qubes.pop("another", None)
            raise exc.QubesException("of no use")

    app = {"template": CLONE, "properties": {"default_user": "me", "memory": "lots"}}
    formula.pillar({"templates": EXAMPLE["templates"], "app_qubes": {"w": app}})
    qubesd.fault = fault
    told = "app_qubes:w:properties:memory: 'lots' is not allowed; allowed: a whole number"
    assert formula.world.salt["ramboot_qubes.faults"]() == [told]


def test_what_qubesd_takes_is_not_refused_for_its_type(formula, qubesd):
    # text that looks like another type
    qubesd.qubes["sys-net"]["properties"] |= {"default_user": "1000", "kernel": "True"}
    given = {
        "maxmem": 0,
        "memory": "0300",
        "vcpus": "+3",
        "kernel": None,
        "default_user": "somebody",
        "netvm": None,
        "default_dispvm": "",
        "autostart": 1,
        "debug": "On",
        "include_in_backups": False,
    }
    formula.pillar({"settings": {"sys-net": {"properties": given}}})
    assert formula.world.salt["ramboot_qubes.faults"]() == []


def mounted(formula, fstype, name, uuid=None):
    """A file system of its own in a directory of the root."""
    place = formula.world.root / name
    place.mkdir()
    mount = {"source": "/dev/sdz1", "fstype": fstype, "fsroot": "/", "uuid": uuid}
    formula.layout["findmnt"]["filesystems"].append({"target": str(place), **mount})


def all_on_root(formula, qubesd, fstype):
    """As Qubes is installed where / is on no thin pool and can share blocks between files."""
    formula.layout["findmnt"]["filesystems"][0]["fstype"] = fstype
    qubesd.pools["varlibqubes"]["driver"] = "file-reflink"
    qubesd.system["default_pool"] = "varlibqubes"
    del qubesd.pools["vm-pool"]
    for name in qubesd.qubes:
        if name != "dom0":
            qubesd.make_volumes(name, None, {})
    qubesd.fill("debian-12-xfce", "root", 1 << 20)


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ("btrfs", "pool varlibqubes: / is btrfs, on which Qubes keeps every qube"),
        ("plain", "is on /dev/mapper/qubes_dom0-varlibqubes"),
    ],
)
def test_storage_layouts_that_a_ram_session_does_not_take_along_are_refused(
    formula, qubesd, layout, told
):
    mounts = formula.layout["findmnt"]["filesystems"]
    if layout == "btrfs":
        all_on_root(formula, qubesd, "btrfs")
    else:
        target = qubesd.pools["varlibqubes"]["dir_path"]
        mounts.append(
            {
                "target": target,
                "source": "/dev/mapper/qubes_dom0-varlibqubes",
                "fstype": "xfs",
            }
        )
    (found,) = check(formula, EXAMPLE)
    assert told in found


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_where_the_pool_on_the_root_holds_every_qube_one_of_its_own_is_wanted(
    formula, qubesd, fstype
):
    all_on_root(formula, qubesd, fstype)
    assert check(formula, EXAMPLE) == [
        "pool varlibqubes holds every qube: a RAM session takes all of them along if they fit, and"
        " forgets them all without ramboot:qubes; wanted: a pool of its own on / (file_pools with"
        " on_root: true, and its name as pool), and the others left behind by copy:exclude"
    ]


def test_of_a_dom0_without_qubes_it_is_not_said(formula, qubesd):
    qubesd.qubes.clear()
    qubesd.system.clear()
    told = "templates:debian-12-xfce-stateless:source: there is no qube debian-12-xfce"
    assert check(formula, EXAMPLE) == [told]


def test_nor_of_one_with_none_but_ours(formula, qubesd):
    formula.good(EXAMPLE)
    for name in ("default-dvm", "sys-net", "debian-12-xfce"):
        del qubesd.qubes[name]
    qubesd.system.clear()
    assert not [told for told in check(formula, EXAMPLE) if "every qube" in told]


def test_beside_it_a_pool_of_its_own_serves(formula, qubesd):
    all_on_root(formula, qubesd, "xfs")
    (formula.world.root / "srv").mkdir()
    path = f"{formula.world.root}/srv/ram"
    own = {"pool": "ram", "file_pools": {"ram": {"dir_path": path, "on_root": True}}}
    formula.good({**EXAMPLE, **own})
    for name in (CLONE, DVM):
        assert pools(qubesd, name) == dict.fromkeys(("root", "private", "volatile"), "ram")


def test_a_pool_that_a_copied_root_makes_dear_is_warned_of(formula, qubesd):
    qubesd.pools["varlibqubes"]["driver"] = "file-reflink"
    told = (
        "pool varlibqubes is file-reflink, and a copied root can't share blocks between files: in a"
        " RAM session each start of a qube in it copies whole volumes; with the driver file none"
        " does"
    )
    assert told in formula.good(EXAMPLE)["checked"]["comment"].splitlines()
    qubesd.pools["varlibqubes"]["driver"] = "file"
    assert formula.good()["checked"]["comment"] == "nothing stands in the way"


def test_with_varlibqubes_off_the_root_a_pool_on_the_root_serves_there_and_back_again(
    formula, qubesd
):
    formula.layout["findmnt"]["filesystems"].append(
        {
            "target": qubesd.pools["varlibqubes"]["dir_path"],
            "source": "/dev/mapper/qubes_dom0-varlibqubes",
            "fstype": "xfs",
        }
    )
    (found,) = check(formula, EXAMPLE)
    assert found.endswith("serves (file_pools with on_root: true, and its name as pool)")
    (formula.world.root / "srv").mkdir()
    path = f"{formula.world.root}/srv/ram"
    asked = {
        **EXAMPLE,
        "pool": "ram",
        "file_pools": {"ram": {"dir_path": path, "on_root": True}},
    }
    before = formula.snapshot()
    dry = formula.apply(asked, test=True)
    assert formula.snapshot() == before
    answers = formula.good(asked)
    assert {part: answer["changes"] for part, answer in answers.items()} == {
        part: answer["changes"] for part, answer in dry.items()
    }
    for name in (CLONE, DVM):
        assert pools(qubesd, name) == dict.fromkeys(("root", "private", "volatile"), "ram")
    assert not any(answer["changes"] for answer in formula.good(asked).values())
    assert formula.absent()["result"] is True
    assert formula.snapshot() == before


@pytest.mark.parametrize("driver", ["file", "file-reflink"])
def test_absent_leaves_no_directories_of_a_pool_of_ours(formula, qubesd, driver):
    (formula.world.root / "srv").mkdir()
    top = formula.world.root / "srv/ram"
    pool = {"dir_path": str(top), "on_root": True, "driver": driver}
    asked = {**EXAMPLE, "pool": "ram", "file_pools": {"ram": pool}}
    formula.good(asked)
    assert (top / "appvms" / DVM).is_dir()
    assert formula.absent()["result"] is True
    assert not top.exists()
    # what was there before, or is in use, stays
    (top / "appvms").mkdir(parents=True)
    formula.good(asked)
    assert formula.absent()["result"] is True
    assert [path.name for path in top.iterdir()] == ["appvms"]
    formula.good(asked)
    (top / "appvms" / DVM / "mine").write_text("")
    (top / "vm-templates/mine").mkdir()
    assert formula.absent()["result"] is True
    found = sorted(str(path.relative_to(top)) for path in top.rglob("*"))
    assert found == [
        "appvms",
        f"appvms/{DVM}",
        f"appvms/{DVM}/mine",
        "vm-templates",
        "vm-templates/mine",
    ]
    assert formula.snapshot()[1] is None


def test_what_fails_leaves_no_directory_of_its_name_in_a_pool_of_ours(formula, qubesd):
    (formula.world.root / "srv").mkdir()
    top = formula.world.root / "srv/ram"
    pool = {"dir_path": str(top), "on_root": True}
    formula.fail("admin.vm.volume.CloneTo")
    formula.apply({**EXAMPLE, "pool": "ram", "file_pools": {"ram": pool}})
    assert list((top / "vm-templates").iterdir()) == []


def test_a_pool_on_lvm_is_no_pool_of_the_ram_root(formula):
    (found,) = check(formula, {**EXAMPLE, "pool": "vm-pool"})
    assert found.startswith("pool vm-pool is lvm_thin, which a RAM session does not copy")


def test_a_pool_that_is_excluded_from_the_copy_is_refused(formula, qubesd):
    top = qubesd.pools["varlibqubes"]["dir_path"]
    formula.pillar(EXAMPLE, copy={"exclude": [f"{top}/appvms"]})
    (found,) = check(formula, None)
    assert found == (
        f"copy:exclude has {top}/appvms: pool varlibqubes ({top}) would not be in a RAM session"
    )


def test_a_pool_directory_that_is_a_link_is_refused(formula, qubesd):
    top = formula.world.root / "var/lib/qubes"
    (top / "vm-templates").rename(top / "old")
    (top / "vm-templates").symlink_to("/mnt")
    (found,) = check(formula, EXAMPLE)
    assert found.startswith(f"{top}/vm-templates of pool varlibqubes is a link")


def test_nor_has_a_pool_that_the_same_run_adds_more_than_its_place(formula, qubesd, monkeypatch):
    path = formula.world.root / "srv/ram"
    path.parent.mkdir()
    there = os.statvfs_result((4096, 4096, 256000, 131328, 131328, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda place: {str(path.parent): there}[place])
    asked = {"pool": "ram", "file_pools": {"ram": {"dir_path": str(path), "on_root": True}}}
    assert check(formula, {**EXAMPLE, **asked}) == [
        "pool ram has 1 MiB left, and the copies need 3 MiB"
    ]


def test_a_network_or_a_disposable_template_that_is_none_is_told_first(formula, qubesd):
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("AppVM", "personal", "red", template="debian-12-xfce")
    asked = {
        "app_qubes": {
            "work": {"template": CLONE, "properties": {"netvm": "personal"}},
            "vpn": {
                "template": CLONE,
                "properties": {"provides_network": "yes", "default_dispvm": DVM},
            },
            "mail": {"template": CLONE, "properties": {"netvm": "vpn", "default_dispvm": "work"}},
        },
        "disposable_templates": {
            DVM: {"template": CLONE},
            "other": {"template": CLONE, "default_dispvm": "personal"},
            "third": {"template": CLONE, "default_dispvm": "other"},
        },
        "settings": {"personal": {"properties": {"provides_network": False}}},
    }
    assert check(formula, {**EXAMPLE, **asked}) == [
        "disposable_templates:other:default_dispvm: personal has no template_for_dispvms",
        "app_qubes:work:properties:netvm: personal has no provides_network",
        "app_qubes:mail:properties:default_dispvm: work has no template_for_dispvms",
    ]


def test_qubes_that_are_based_on_each_other_are_told_and_no_endless_question(formula):
    asked = {
        "disposables": {"a": {"template": "b"}, "b": {"template": "a"}},
        "app_qubes": {"work": {"template": "debian-12-xfce", "properties": {"netvm": "a"}}},
    }
    assert "app_qubes:work:properties:netvm: a has no provides_network" in check(formula, asked)


def test_a_pool_without_room_is_told_before_anything_is_copied(formula, qubesd):
    # of the last 512 MiB dom0 lives
    qubesd.pools["varlibqubes"].update(size=1000 * MIB, usage=486 * MIB)
    assert check(formula, EXAMPLE) == ["pool varlibqubes has 2 MiB left, and the copies need 3 MiB"]
    qubesd.pools["varlibqubes"].update(usage=484 * MIB)
    formula.good(EXAMPLE)


def test_what_the_file_system_keeps_for_root_is_no_room(formula, qubesd, monkeypatch):
    qubesd.pools["varlibqubes"].update(size=1000 * MIB, usage=400 * MIB)
    there = os.statvfs_result((4096, 4096, 256000, 153600, 131584, 0, 0, 0, 0, 255))
    monkeypatch.setattr(formula.qubes.os, "statvfs", lambda place: there)
    formula.qubes._reserved = formula.reserved
    assert check(formula, EXAMPLE) == ["pool varlibqubes has 2 MiB left, and the copies need 3 MiB"]


@pytest.mark.parametrize(("driver", "needed"), [("file", 4), ("file-reflink", 7)])
def test_nor_is_a_root_copied_anew_where_it_would_not_fit(formula, qubesd, driver, needed):
    """Half of it would be all that qubes on it have."""
    qubesd.pools["varlibqubes"]["driver"] = driver
    formula.good(EXAMPLE)
    qubesd.update("debian-12-xfce", 4 * MIB)
    qubesd.pools["varlibqubes"].update(size=1000 * MIB, usage=485 * MIB)
    assert check(formula, EXAMPLE) == [
        f"pool varlibqubes has 3 MiB left, and the copies need {needed} MiB"
    ]
    qubesd.pools["varlibqubes"].update(usage=481 * MIB)
    formula.good()


def test_a_file_pool_on_the_root_is_refused_unless_it_is_meant(formula):
    path = f"{formula.world.root}/srv/pool"
    assert check(formula, {"file_pools": {"p": {"dir_path": path}}}) == [
        f"file_pools:p: {path} is on /, which a RAM session copies and forgets; set on_root: true"
        " if that is meant, or mount something there first"
    ]
    meant = {"file_pools": {"p": {"dir_path": path, "on_root": True}}}
    assert check(formula, meant) == [
        f"file_pools:p: there is no directory {formula.world.root}/srv"
    ]
    (formula.world.root / "srv").mkdir()
    formula.good(meant)


@pytest.mark.parametrize(
    ("path", "how"),
    [
        ("/var/lib/qubes/appvms/ram", "lies in {}/var/lib/qubes of pool varlibqubes"),
        ("/srv/linked/ram", "lies in {}/var/lib/qubes of pool varlibqubes"),
        ("/var/lib", "holds {}/var/lib/qubes of pool varlibqubes"),
        ("/srv/other/ram", "lies in {}/srv/other of pool other"),
    ],
)
def test_a_pool_within_another_is_refused(formula, path, how):
    root = formula.world.root
    (root / "srv").mkdir()
    (root / "srv/linked").symlink_to(root / "var/lib/qubes")
    other = {"other": {"dir_path": f"{root}/srv/other", "on_root": True}}
    asked = {"p": {"dir_path": f"{root}{path}", "on_root": True}, **other}
    told = f"file_pools:p: {root}{path} {how.format(root)}; choose a directory apart from those of"
    assert f"{told} other pools" in check(formula, {"file_pools": asked})


def test_a_pool_of_that_name_elsewhere_is_refused(formula):
    found = check(formula, {"file_pools": {"varlibqubes": {"dir_path": "/mnt/usb"}}})
    assert found[0].startswith("file_pools:varlibqubes: there is a pool of that name with dir_path")


def test_a_save_qube_has_no_network_and_is_not_in_the_ram_pool(formula, qubesd):
    found = check(
        formula,
        {
            "save": {
                "save": {
                    "template": "debian-12-xfce",
                    "pool": "varlibqubes",
                    "properties": {"netvm": "sys-net"},
                }
            }
        },
    )
    assert found == [
        "save:save:properties:netvm: a save qube has no network",
        "save:save: pool varlibqubes is that of the RAM root, which forgets; name another",
    ]


@pytest.mark.parametrize("key", ["default_pool", "default_pool_private"])
def test_a_save_qube_lies_in_the_default_pool_of_the_same_pillar_and_stays_there(
    formula, qubesd, key
):
    mounted(formula, "ext4", "mnt")
    pool = {"dir_path": f"{formula.world.root}/mnt/usb"}
    pillar = {
        "file_pools": {"usb": pool},
        "default_pools": {key: "usb"},
        "save": {"save": {"template": "debian-12-xfce"}},
    }
    formula.good(pillar)
    assert pools(qubesd, "save")["private"] == "usb"
    assert not any(answer["changes"] for answer in formula.good().values())
    # the default may become another one: where it is, it is on the disk
    del pillar["default_pools"]
    assert set(formula.good(pillar)["settings"]["changes"]) == {f"system: {key}"}
    assert not any(answer["changes"] for answer in formula.good().values())


@pytest.mark.parametrize(
    ("pillar", "pool", "lies"),
    [
        ({"default_pools": {"default_pool_private": "varlibqubes"}}, "varlibqubes", "ram"),
        ({"save": {"pool": "varlibqubes"}}, "varlibqubes", "ram"),
        ({"save": {"pool": "own"}}, "own", "vm-pool"),
    ],
)
def test_a_save_qube_on_the_ram_root_is_refused(formula, pillar, pool, lies):
    """Whichever pool is that of the others."""
    own = {"own": {"dir_path": f"{formula.world.root}/srv/own", "on_root": True}}
    (formula.world.root / "srv").mkdir()
    ram = {"ram": {"dir_path": f"{formula.world.root}/srv/ram", "on_root": True}}
    asked = {
        "file_pools": {**own, **ram},
        **pillar,
        "save": {"save": {"template": "debian-12-xfce", **pillar.get("save", {})}},
        "pool": lies,
    }
    assert check(formula, asked) == [
        f"save:save: pool {pool} is on the RAM root, which is not kept; name one that is elsewhere"
    ]


def test_a_save_qube_lies_where_a_link_in_its_pool_leads(formula):
    mounted(formula, "ext4", "mnt")
    (formula.world.root / "mnt/usb").mkdir()
    (formula.world.root / "mnt/usb/appvms").symlink_to(formula.world.root)
    pool = {"usb": {"dir_path": f"{formula.world.root}/mnt/usb"}}
    asked = {"file_pools": pool, "save": {"save": {"template": "debian-12-xfce", "pool": "usb"}}}
    (found,) = check(formula, asked)
    assert found.startswith("save:save: pool usb is on the RAM root")


@pytest.mark.parametrize(("entries", "told"), [(["snapshot"], True), (["zram"], False)])
def test_sessions_that_forget_the_save_qube_too_are_named(formula, entries, told):
    formula.pillar({"save": {"save": {"template": "debian-12-xfce"}}}, grub={"entries": entries})
    comment = formula.apply(test=True)["checked"]["comment"]
    forgotten = "what is put into save in a RAM session on snapshot is forgotten, as all is there"
    assert (forgotten in comment) == told


@pytest.mark.parametrize(
    ("fstype", "uuid", "said"),
    [
        ("btrfs", "same", "is on /, which a RAM session copies and forgets; set on_root: true"),
        ("btrfs", "other", None),
        ("ext4", None, None),
        ("tmpfs", None, "is on tmpfs, which no boot keeps; choose a directory on a disk"),
    ],
)
def test_a_pool_of_files_where_nothing_stays_is_refused(formula, fstype, uuid, said):
    formula.layout["findmnt"]["filesystems"][0]["uuid"] = "same"
    mounted(formula, fstype, "home", uuid)
    path = f"{formula.world.root}/home/qubes"
    asked = {"file_pools": {"p": {"dir_path": path}}}
    if said is None:
        formula.good(asked)
    else:
        (found,) = check(formula, asked)
        assert found.startswith(f"file_pools:p: {path} {said}")


@pytest.mark.parametrize("pool", ["vm-pool", "nonesuch"])
@pytest.mark.parametrize("when", ["session", "always"])
def test_aliases_for_a_pool_that_no_session_has_in_ram_are_refused(formula, pool, when):
    (found,) = check(formula, {"pool": pool, "aliases": when})
    assert pool in found
    formula.good({"aliases": when})


def test_a_save_qube_in_the_ram_pool_is_not_taken_for_good(formula, qubesd):
    formula.good({"save": {"save": {"template": "debian-12-xfce"}}})
    qubesd.qubes["save"]["volumes"]["private"]["pool"] = "varlibqubes"
    assert check(formula, {"save": {"save": {"template": "debian-12-xfce"}}}) == [
        "save:save: its private volume lies in pool varlibqubes, not in vm-pool; delete it to have"
        " it anew"
    ]


FIREWALL = ["action=accept proto=tcp dsthost=example.com dstports=443", "action=drop"]
IN_ORDER = ["action=accept proto=tcp dsthost=example.com dstports=443-443", "action=drop"]


def test_a_clones_firewall_is_its_sources_unless_the_pillar_says_so(formula, qubesd):
    qubesd.qubes["debian-12-xfce"]["firewall"] = ["action=drop"]
    formula.good(EXAMPLE)
    assert qubesd.qubes[CLONE]["firewall"] == ["action=drop"]
    asked = {kind: dict(entries) for kind, entries in EXAMPLE.items()}
    asked["templates"][CLONE] = {"source": "debian-12-xfce", "firewall": FIREWALL}
    asked["disposable_templates"][DVM] = {"template": CLONE, "firewall": ["action=drop"]}
    changes = formula.good(asked)["qubes"]["changes"]
    assert changes == {
        f"{CLONE}: firewall rules": {"old": ["action=drop"], "new": IN_ORDER},
        f"{DVM}: firewall rules": {"old": ["action=accept"], "new": ["action=drop"]},
    }
    assert qubesd.qubes[CLONE]["firewall"] == IN_ORDER
    assert qubesd.qubes["debian-12-xfce"]["firewall"] == ["action=drop"]
    before = formula.snapshot()
    assert not any(answer["changes"] for answer in formula.good(asked).values())
    assert formula.snapshot() == before


def test_the_firewall_of_somebody_elses_qube_comes_back(formula, qubesd):
    theirs = ["action=accept dst4=1.2.3.4/32", "action=drop"]
    qubesd.qubes["sys-net"]["firewall"] = theirs
    formula.good({"settings": {"sys-net": {"firewall": FIREWALL}}})
    assert qubesd.qubes["sys-net"]["firewall"] == IN_ORDER
    dry = formula.absent(test=True)
    assert dry["changes"] == {"sys-net: firewall rules": {"old": IN_ORDER, "new": theirs}}
    assert qubesd.qubes["sys-net"]["firewall"] == IN_ORDER
    assert formula.absent()["result"] is True
    assert qubesd.qubes["sys-net"]["firewall"] == theirs
    assert formula.snapshot()[1] is None


def test_a_firewall_that_somebody_changed_since_stays(formula, qubesd):
    formula.good({"settings": {"sys-net": {"firewall": FIREWALL}}})
    qubesd.qubes["sys-net"]["firewall"] = ["action=accept"] * 2
    assert "sys-net: firewall rules was changed" in formula.absent()["comment"]
    assert qubesd.qubes["sys-net"]["firewall"] == ["action=accept"] * 2


def test_dom0_has_no_firewall(formula):
    told = formula.apply({"settings": {"dom0": {"firewall": FIREWALL}}})["checked"]["comment"]
    assert "settings:dom0:firewall: dom0 has no network and no firewall" in told


def test_what_a_running_qube_can_not_be_given_is_told_before_anything_is_changed(
    formula, qubesd, everything
):
    formula.good(everything)
    for name in ("sys-net", "low", "work"):
        qubesd.run(name)
    qubesd.qubes["low"]["volumes"]["root"]["rw"] = True
    everything["settings"]["sys-net"] |= {"template": CLONE, "tags": ["kept", "more"]}
    everything["app_qubes"]["work"]["properties"]["memory"] = 700
    assert check(formula, everything) == [
        "low: its root rw can't be changed while it is running; halt it",
        "sys-net: its template can't be changed while it is running; halt it",
    ]
    for name in ("sys-net", "low"):
        qubesd.run(name, False)
    formula.good(everything)
    # on the way back too
    for name in ("work", "low"):
        qubesd.run(name, False)
    qubesd.run("sys-net")
    assert formula.absent()["comment"].splitlines() == [
        "nothing was changed:",
        "sys-net: its template can't be changed while it is running; halt it",
    ]
    qubesd.run("sys-net", False)
    assert formula.absent()["result"] is True
    assert qubesd.qubes["sys-net"]["template"] == "debian-12-xfce"


def test_a_running_qube_can_not_be_connected_to_a_halted_one(formula, qubesd):
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("AppVM", "mine", "red", template="debian-12-xfce")
    app.add_new_vm("AppVM", "sys-vpn", "red", template="debian-12-xfce").provides_network = True
    asked = {"settings": {"mine": {"properties": {"netvm": "sys-vpn"}, "tags": ["x"]}}}
    qubesd.run("mine")
    told = (
        "mine: its netvm can't become {0}, which is halted, while mine is running; halt mine or"
        " start {0}"
    )
    assert check(formula, asked) == [told.format("sys-vpn")]
    qubesd.run("sys-vpn")
    formula.good(asked)
    # on the way back too
    assert formula.absent()["comment"].splitlines() == [
        "nothing was changed:",
        told.format("sys-net"),
    ]
    assert qubesd.qubes["mine"]["properties"]["netvm"] == "sys-vpn"
    qubesd.run("sys-net")
    assert formula.absent()["result"] is True
    assert "netvm" not in qubesd.qubes["mine"]["properties"]


def test_the_template_of_running_disposables_is_not_changed(formula, qubesd):
    sys.modules["qubesadmin"].Qubes().add_new_vm("DispVM", "disp1", "red", template="default-dvm")
    asked = {**EXAMPLE, "settings": {"default-dvm": {"template": CLONE}}}
    qubesd.run("disp1")
    assert check(formula, asked) == [
        "default-dvm: its template can't be changed while disp1 is running; halt it"
    ]
    # qubesd takes those away by itself
    qubesd.qubes["default-dvm"]["features"]["preload-dispvm"] = "disp1"
    formula.good(asked)


def test_what_others_need_is_not_taken_from_a_qube(formula, qubesd):
    app = sys.modules["qubesadmin"].Qubes()
    for name in ("net", "dvm", "mine"):
        app.add_new_vm("AppVM", name, "red", template="debian-12-xfce")
    # written out, so that qubesd asks who uses it
    app.domains["net"].provides_network = False
    given = {
        "net": {"properties": {"provides_network": True}},
        "dvm": {"properties": {"template_for_dispvms": True}},
    }
    formula.good({"settings": given})
    app.domains["mine"].netvm = "net"
    app.domains["mine"].default_dispvm = "dvm"
    assert check(formula, {"aliases": "off"}) == [
        "dvm: template_for_dispvms can't become default: it is needed by mine (default_dispvm)",
        "net: provides_network can't become False: it is needed by mine (netvm)",
    ]
    answer = formula.absent()
    assert (answer["result"], answer["changes"]) == (True, {})
    assert answer["comment"].splitlines() == [
        "nothing to undo",
        "left: dvm: template_for_dispvms is needed by mine (default_dispvm) and is left as it is",
        "left: net: provides_network is needed by mine (netvm) and is left as it is",
    ]
    del app.domains["mine"]
    assert set(formula.absent()["changes"]) == {
        "dvm: template_for_dispvms",
        "net: provides_network",
    }


def test_devices_go_before_the_mode_that_they_need(formula, qubesd):
    app = sys.modules["qubesadmin"].Qubes()
    app.domains["sys-net"].virt_mode = "pvh"
    given = {"properties": {"virt_mode": "hvm"}, "pci": {"00_14.0": []}}
    formula.good({"settings": {"sys-net": given}})
    assert formula.absent()["result"] is True
    assert qubesd.qubes["sys-net"]["properties"]["virt_mode"] == "pvh"


@pytest.mark.parametrize(
    ("release", "port", "hint"),
    [
        ("4.3", "00_15.0", "did you mean 00_14.0 or 00_1f.6?"),
        # what 4.2 calls it
        ("4.3", "01_00.0", "did you mean 00_1c.0-00_00.0?"),
        ("4.2", "00_1f.3", "did you mean 00_1f.6 or 00_14.0?"),
        ("4.3", "c3_ea.7", "qvm-pci lists those it has"),
    ],
)
@pytest.mark.parametrize("kind", ["settings", "app_qubes"])
def test_a_pci_device_that_dom0_does_not_have_is_told(formula, qubesd, kind, release, port, hint):
    qubesd.release = release
    name = "sys-net" if kind == "settings" else "sys-usb"
    entry = {"pci": {port: [], "00_14.0": []}, "properties": {"virt_mode": "hvm"}}
    given = entry if kind == "settings" else {"template": CLONE, **entry}
    asked = {**EXAMPLE, kind: {name: given}}
    formula.pillar(asked)
    before = formula.snapshot()
    assert check(formula, asked) == [
        f"{kind}:{name}:pci:{port}: dom0 has no such PCI device; {hint}"
    ]
    assert formula.snapshot() == before


def test_a_pci_device_that_a_qube_has_may_be_gone_by_now(formula, qubesd):
    asked = {"settings": {"sys-net": {"pci": {"00_14.0": []}}}}
    formula.good(asked)
    del qubesd.hardware["00_14.0"]
    formula.good(asked)


@pytest.mark.parametrize("how", ["none", "refused"])
def test_where_no_pci_devices_are_listed_none_is_refused(formula, qubesd, how):
    if how == "none":
        qubesd.hardware.clear()
    else:
        formula.fail("admin.vm.device.pci.Available")
    formula.good({"settings": {"sys-net": {"pci": {"00_15.0": []}}}})


PVH = "pci: a qube in pvh mode gets no PCI device; set virt_mode: hvm as well"


def test_42_gives_a_qube_that_stays_in_pvh_mode_no_device(formula, qubesd):
    qubesd.release = "4.2"
    device, hvm = {"pci": {"00_14.0": []}}, {"properties": {"virt_mode": "HVM"}}
    based = {
        "app_qubes": {"sys-usb": {"template": CLONE, **device}},
        "disposables": {"disp-usb": {"template": DVM, "pci": {"00_1f.6": []}}},
    }
    told = [f"app_qubes:sys-usb:{PVH}", f"disposables:disp-usb:{PVH}"]
    asked = {**EXAMPLE, **based, "settings": {"sys-net": device}}
    assert check(formula, asked) == [*told, f"settings:sys-net:{PVH}"]
    asked["settings"]["sys-net"] = device | hvm
    assert check(formula, asked) == told
    # they have that of what they are based on
    asked["templates"] = {CLONE: {**EXAMPLE["templates"][CLONE], **hvm}}
    formula.good(asked)
    assert not any(answer["changes"] for answer in formula.good(asked).values())
    # of a qube that is there too
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("AppVM", "mine", "red", template="debian-12-xfce")
    for more in ({}, {"debian-12-xfce": hvm}):
        both = {**asked, "settings": {"mine": device, **more}}
        assert check(formula, both) == [f"settings:mine:{PVH}"]
    # the source is in that mode for its devices, which a clone does not get
    qubesd.qubes["debian-12-xfce"]["pci"]["00_1f.6"] = {}
    alone = {"alone": {"source": "debian-12-xfce", **device}}
    assert check(formula, {**asked, "standalones": alone}) == [f"standalones:alone:{PVH}"]
    qubesd.qubes["debian-12-xfce"]["properties"]["virt_mode"] = "hvm"
    formula.good({**asked, "standalones": alone})


def test_43_gives_a_qube_in_pvh_mode_a_device(formula):
    formula.good({"settings": {"sys-net": {"pci": {"00_14.0": []}}}})


def test_42_takes_no_device_from_a_running_qube(formula, qubesd):
    qubesd.release = "4.2"
    qubesd.qubes["sys-net"]["properties"]["virt_mode"] = "hvm"
    formula.good({"settings": {"sys-net": {"pci": {"00_14.0": []}}}})
    qubesd.run("sys-net")
    assert formula.absent()["comment"].splitlines() == [
        "nothing was changed:",
        "sys-net: its pci 00_14.0 can't be changed while it is running; halt it",
    ]
    qubesd.release = "4.3"
    assert formula.absent()["result"] is True


def test_a_running_template_is_cut_off_its_network_again(formula, qubesd):
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("AppVM", "sys-vpn", "red", template="debian-12-xfce").provides_network = True
    formula.good({"settings": {"debian-12-xfce": {"properties": {"netvm": "sys-vpn"}}}})
    # what is the default of others is halted
    qubesd.run("debian-12-xfce")
    assert formula.absent()["result"] is True
    assert "netvm" not in qubesd.qubes["debian-12-xfce"]["properties"]


def test_a_running_qube_can_be_cut_off_its_network(formula, qubesd):
    qubesd.run("default-dvm")
    formula.good({"settings": {"default-dvm": {"properties": {"netvm": None}}}})
    qubesd.system["default_netvm"] = ""
    assert formula.absent()["result"] is True


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mark": "app_qubes"}, "it was made under app_qubes; delete it to have it anew"),
        (
            {"template": "debian-12-xfce-stateless-dvm2"},
            "its template is debian-12-xfce-stateless-dvm2; delete it to have it anew on"
            f" {DVM} (the volatile volume would stay where it is)",
        ),
    ],
)
def test_a_disposable_of_another_kind_or_template_is_not_taken_for_good(
    formula, qubesd, change, told
):
    wanted = {**EXAMPLE, "disposables": {"sys-ram": {"template": DVM}}}
    wanted["disposable_templates"] = {**EXAMPLE["disposable_templates"]}
    wanted["disposable_templates"]["debian-12-xfce-stateless-dvm2"] = {"template": CLONE}
    formula.good(wanted)
    qube = qubesd.qubes["sys-ram"]
    if "mark" in change:
        qube["features"]["ramboot-made"] = "whole app_qubes sys-ram"
    else:
        qube["template"] = change["template"]
    assert check(formula, wanted) == [f"disposables:sys-ram: {told}"]


def test_what_ours_became_since_is_told_when_it_can_not_be_set_back(formula, qubesd):
    formula.good(EXAMPLE)
    qubesd.qubes[DVM]["volumes"]["private"]["pool"] = "vm-pool"
    qubesd.qubes[CLONE]["class"] = "StandaloneVM"
    assert check(formula, None) == [
        f"templates:{CLONE}: it is a StandaloneVM, not a TemplateVM; delete it to have it anew",
        f"disposable_templates:{DVM}: its private volume lies in pool vm-pool, not in varlibqubes;"
        " delete it to have it anew",
    ]


def test_another_template_of_an_app_qube_of_ours_is_set_back(formula, qubesd):
    pillar = {**EXAMPLE, "app_qubes": {"work": {"template": CLONE}}}
    formula.good(pillar)
    sys.modules["qubesadmin"].Qubes().domains["work"].template = "debian-12-xfce"
    assert pools(qubesd, "work")["root"] == "vm-pool"
    assert list(formula.good()["qubes"]["changes"]) == ["work: template"]
    assert pools(qubesd, "work") == IN_RAM


def test_a_disposable_on_a_low_ram_template_would_not_be_in_ram(formula):
    found = check(
        formula,
        {
            "low_ram": {"low": {"template": "debian-12-xfce"}},
            "disposables": {"d": {"template": "low"}},
        },
    )
    assert found == [
        "disposables:d:template: the root of low stays on the disk; name a disposable template"
    ]


# Room in RAM


def test_the_budget_counts_what_is_there_and_what_will_be(formula):
    formula.pillar(EXAMPLE)
    budget = formula.world.salt["ramboot_qubes.budget"]
    assert budget() == {"present_bytes": 0, "pending_bytes": 3 * MIB + (1 << 16)}
    formula.good()
    assert budget() == {"present_bytes": 3 * MIB + (1 << 16), "pending_bytes": 0}
    formula.pillar({"aliases": "always"})
    assert budget()["pending_bytes"] == 0


def test_of_a_reflink_pool_the_budget_counts_both_files_of_a_volume(formula, qubesd):
    qubesd.pools["varlibqubes"]["driver"] = "file-reflink"
    formula.pillar(EXAMPLE)
    budget = formula.world.salt["ramboot_qubes.budget"]
    both = 2 * (3 * MIB + (1 << 16))
    assert budget() == {"present_bytes": 0, "pending_bytes": both}
    formula.good()
    assert budget() == {"present_bytes": both, "pending_bytes": 0}


def test_the_budget_counts_by_how_much_a_new_copy_is_larger(formula, qubesd):
    formula.good(EXAMPLE)
    qubesd.update("debian-12-xfce", 2 * MIB)
    budget = formula.world.salt["ramboot_qubes.budget"]
    assert budget()["pending_bytes"] == 2 * MIB
    formula.good()
    assert budget()["pending_bytes"] == 0


@pytest.mark.parametrize(
    ("boot", "entry", "ordinary", "told"),
    [
        ({}, False, False, True),
        # the entry is there for that
        ({}, True, False, False),
        ({"mode": "zram"}, True, False, True),
        ({"mode": "zram"}, False, True, True),
        ({"mode": "off"}, False, False, True),
        ({"mode": "off", "backend": "tmpfs"}, True, False, False),
        # its entry is in the menu all the same
        ({"backend": "image"}, False, False, True),
        ({"mode": "image"}, False, False, True),
    ],
)
def test_a_ram_session_that_would_not_fit_is_told_before(formula, boot, entry, ordinary, told):
    says = "9 MiB of RAM needed, 8 MiB available: does not fit"
    other = {"fits": False, "fits_ordinary": False, "says": "x"}
    formula.world.salt["ramboot.plan"] = lambda: {
        "zram": {"fits": entry, "fits_ordinary": ordinary, "says": says},
        "image": {**other, "fits": True, "fits_ordinary": True},
        "tmpfs": other,
    }
    formula.pillar(EXAMPLE, boot=boot)
    text = f"with these qubes a RAM session on zram needs more RAM than dom0 gets: {says}"
    # before and after
    for test in (True, False, True):
        comment = formula.apply(test=test)["checked"]["comment"].splitlines()
        assert comment[1:] == ([text] if told else [])


def test_a_qube_that_left_the_pillar_is_named(formula):
    formula.good(EXAMPLE)
    answer = formula.good({"aliases": "off"})["checked"]
    stays = "was made by ramboot, is no longer in the pillar, and stays"
    assert answer["comment"].splitlines()[1:] == [
        f"{CLONE} {stays}; it is no longer copied anew, and gets no updates of its own until its"
        " features skip-update and prohibit-start are taken away",
        f"{DVM} {stays}",
    ]
