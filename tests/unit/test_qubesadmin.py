# SPDX-License-Identifier: GPL-2.0-or-later
"""The contract with qubesd, by way of _modules/ramboot_qubesadmin.py.

It holds for the stand-in in tests/standin, and unchanged for the real one. In dom0, as root:

    RAMBOOT_REAL_QUBESD=1 python3 -m pytest tests/unit/test_qubesadmin.py

That makes and deletes qubes named ramboot-test-*, a pool of that name, and nothing else.
RAMBOOT_TEST_POOL (default varlibqubes), RAMBOOT_TEST_TEMPLATE (default: the default template) and
RAMBOOT_TEST_NETVM (default: sys-net) say with what.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError

REAL = os.environ.get("RAMBOOT_REAL_QUBESD") == "1"
POOL = os.environ.get("RAMBOOT_TEST_POOL", "varlibqubes")
NETVM = os.environ.get("RAMBOOT_TEST_NETVM", "sys-net")
CLONE, APP, DISP, SECOND = (f"ramboot-test-{kind}" for kind in ("clone", "app", "disp", "second"))
TEST_POOL = "ramboot-test-pool"
# where dom0 has screen and sound
OF_A_NEW_QUBE = ["audiovm-dom0", "created-by-dom0", "guivm-dom0"]


def clear(seam):
    for name in (DISP, APP, SECOND, CLONE):
        with contextlib.suppress(CommandExecutionError):
            seam.remove(name)
    with contextlib.suppress(CommandExecutionError):
        seam.remove_pool(TEST_POOL)


@pytest.fixture
def seam(request, world):
    """The functions of the seam, over the real qubesd or the stand-in."""
    if REAL:
        import qubesadmin

        assert not hasattr(qubesadmin, "WORLD"), "this is the stand-in"
        world.salt["cmd.run_all"] = lambda command, **options: (
            lambda done: {"retcode": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        )(subprocess.run(command, capture_output=True, text=True, check=False))
        module = world.module("ramboot_qubesadmin")
    else:
        request.getfixturevalue("qubesd")
        module = world.module("ramboot_qubesadmin")
    clear(module)
    yield module
    clear(module)


@pytest.fixture
def template(seam):
    given = os.environ.get("RAMBOOT_TEST_TEMPLATE")
    return given or seam.properties(None, ["default_template"])["default_template"]["value"]


@pytest.fixture
def clone(seam, template):
    seam.create(CLONE, "TemplateVM", "black", pool=POOL)
    return CLONE


@pytest.fixture
def app(seam, template):
    seam.create(APP, "AppVM", "blue", template=template, pool=POOL)
    return APP


def refused(words, function, *arguments, **options):
    with pytest.raises(CommandExecutionError) as told:
        function(*arguments, **options)
    assert words in str(told.value)


# Questions


def test_qubes_are_listed_with_class_state_template_and_label(seam, template, app):
    found = seam.qubes()
    assert found[app] == {
        "class": "AppVM",
        "running": False,
        "template": template,
        "label": "blue",
    }
    assert found[template]["class"] == "TemplateVM"
    assert found[template]["template"] is None
    assert found["dom0"]["class"] == "AdminVM"
    assert found["dom0"]["running"] is True


def test_a_qube_made_anew_under_its_name_has_another_uuid(seam, template, app):
    before = seam.properties(app, ["uuid"])["uuid"]
    assert before["default"] is False
    refused(f"setting uuid of {app}", seam.set_property, app, "uuid", "")
    seam.remove(app)
    seam.create(APP, "AppVM", "blue", template=template, pool=POOL)
    assert seam.properties(app, ["uuid"])["uuid"]["value"] not in (None, "", before["value"])
    assert set(seam.properties("dom0", ["uuid"])["uuid"]["value"]) == {"0", "-"}


def test_the_eight_labels_are_there(seam):
    assert {"red", "black", "yellow"} <= set(seam.labels())


def test_property_names_depend_on_the_class(seam, clone, app):
    assert "template_for_dispvms" in seam.property_names(app)
    assert "template_for_dispvms" not in seam.property_names(clone)
    assert "template" not in seam.property_names(clone)
    assert {"default_pool", "default_pool_root", "default_dispvm"} <= set(seam.property_names())


def test_a_property_has_its_text_and_says_whether_it_is_the_default(seam, app):
    found = seam.properties(app, ["memory", "autostart", "label"])
    assert found["memory"]["default"] is True
    assert found["memory"]["value"].isdigit()
    assert found["autostart"] == {"value": "False", "default": True}
    assert found["label"]["value"] == "blue"


def test_a_property_without_a_value_is_none(seam, app):
    assert seam.properties(app, ["stubdom_xid"])["stubdom_xid"]["value"] in (None, "-1")


def test_a_property_tells_its_type_if_it_has_a_value(seam, app):
    types = {"memory": "int", "maxmem": "int", "autostart": "bool", "provides_network": "bool"}
    types |= dict.fromkeys(("default_user", "kernel", "virt_mode", "mac"), "str")
    assert {key: seam.property_type(app, key) for key in types} == types
    for netvm in (NETVM, ""):
        seam.set_property(app, "netvm", netvm)
        assert seam.property_type(app, "netvm") not in (None, "bool", "int")
    assert seam.property_type(app, "label") not in (None, "bool", "int")
    assert seam.property_type(app, "stubdom_xid") in (None, "int")
    refused("there is no qube ramboot-test-none", seam.property_type, "ramboot-test-none", "memory")


def test_an_unknown_property_and_an_unknown_qube_are_named(seam, app):
    refused(f"{app} has no property nosuch", seam.properties, app, ["nosuch"])
    refused("there is no qube ramboot-test-none", seam.properties, "ramboot-test-none", ["memory"])
    for question in (seam.features, seam.tags, seam.volumes, seam.devices):
        refused("there is no qube ramboot-test-none", question, "ramboot-test-none")


def test_pools_have_a_driver_and_where_they_are(seam):
    config = seam.pools()[POOL]
    assert config["driver"] in ("file", "file-reflink")
    assert config["dir_path"].startswith("/")


# Volumes: where each lies (the leak that the formula is for)


def test_an_app_qubes_root_stays_in_the_pool_of_its_template(seam, template, app):
    mine, theirs = seam.volumes(app), seam.volumes(template)
    assert mine["root"]["pool"] == theirs["root"]["pool"]
    assert mine["root"]["source"] == theirs["root"]["vid"]
    assert (mine["root"]["snap_on_start"], mine["root"]["save_on_stop"]) == (True, False)
    assert mine["private"]["pool"] == mine["volatile"]["pool"] == POOL
    assert (mine["private"]["save_on_stop"], mine["volatile"]["save_on_stop"]) == (True, False)


def test_the_root_of_an_app_qube_can_not_be_put_elsewhere(seam, template, tmp_path):
    seam.add_pool(TEST_POOL, "file", {"dir_path": str(tmp_path / "pool")})
    refused("same pool as its origin", seam.create, APP, "AppVM", "red", template, None,
            {"root": TEST_POOL})  # fmt: skip
    assert APP not in seam.qubes()


def test_all_volumes_of_a_disposable_lie_where_template_and_dvm_lie(seam, clone):
    seam.create(APP, "AppVM", "red", template=clone, pool=POOL)
    seam.set_property(APP, "template_for_dispvms", "True")
    seam.create(DISP, "DispVM", "red", template=APP)
    found = seam.volumes(DISP)
    assert {key: found[key]["pool"] for key in ("root", "private", "volatile")} == {
        "root": POOL,
        "private": POOL,
        "volatile": POOL,
    }
    assert found["private"]["source"] == seam.volumes(APP)["private"]["vid"]


def test_a_disposable_inherits_a_read_only_root_an_encrypted_volatile_and_features(seam, app):
    seam.set_property(app, "template_for_dispvms", "True")
    seam.set_volume(app, "volatile", "ephemeral", True)
    seam.set_volume(app, "root", "rw", False)
    seam.set_feature(app, "ramboot-made", "x")
    seam.create(DISP, "DispVM", "red", template=app)
    found = seam.volumes(DISP)
    assert (found["root"]["rw"], found["volatile"]["ephemeral"]) == (False, True)
    # so a feature alone does not tell what we made
    assert seam.features(DISP)["ramboot-made"] == "x"


def test_a_disposable_inherits_what_its_template_was_given(seam, app):
    seam.set_property(app, "template_for_dispvms", "True")
    seam.set_property(app, "default_dispvm", app)
    seam.set_property(app, "memory", "512")
    seam.set_tag(app, "mine")
    seam.set_firewall(app, ["action=drop"])
    seam.create(DISP, "DispVM", "red", template=app)
    found = seam.properties(DISP, ["default_dispvm", "memory", "vcpus"])
    assert found["default_dispvm"] == {"value": app, "default": False}
    assert found["memory"] == {"value": "512", "default": False}
    assert found["vcpus"]["default"] is True
    assert seam.tags(DISP) == [*OF_A_NEW_QUBE, "mine"]
    assert seam.firewall(DISP) == ["action=drop"]


def test_only_the_volatile_volume_can_be_ephemeral(seam, app):
    refused("Cannot enable ephemeral", seam.set_volume, app, "root", "ephemeral", True)
    seam.set_volume(app, "volatile", "ephemeral", True)
    assert seam.volumes(app)["volatile"]["ephemeral"] is True


def test_revisions_can_be_switched_off_for_a_volume(seam, clone):
    for volume in ("root", "private"):
        seam.set_volume(clone, volume, "revisions_to_keep", 0)
    found = seam.volumes(clone)
    assert [found[key]["revisions_to_keep"] for key in ("root", "private")] == [0, 0]


def test_another_option_of_a_volume_is_not_touched(seam, app):
    refused("nothing that can be set", seam.set_volume, app, "root", "size", 1)
    refused("has no volume data", seam.set_volume, app, "data", "rw", False)


def test_a_volume_is_copied_across_pools_with_its_size_and_sparsely(seam, template, clone):
    seam.clone_volume(template, clone, "root")
    mine, theirs = seam.volumes(clone)["root"], seam.volumes(template)["root"]
    assert mine["pool"] == POOL
    assert mine["size"] == theirs["size"]
    assert 0 < mine["usage"] <= theirs["usage"] * 1.1 + (1 << 20)
    # once more over what is there
    seam.clone_volume(template, clone, "root")
    assert seam.volumes(clone)["root"]["usage"] == mine["usage"]


def test_a_snapshot_can_not_be_copied_from(seam, clone, app):
    refused("snapshot volume", seam.clone_volume, app, clone, "root")


# Making and deleting


@pytest.mark.parametrize("kind", ["TemplateVM", "AppVM", "StandaloneVM", "DispVM"])
def test_a_new_qube_has_nothing_but_what_it_was_given_and_a_directory_of_its_own(
    seam, world, template, app, kind
):
    """What tells one that nobody touched yet."""
    based = {"AppVM": template, "DispVM": app}.get(kind)
    seam.set_property(app, "template_for_dispvms", "True")
    seam.create(SECOND, kind, "green", template=based, pool=None if kind == "DispVM" else POOL)
    assert set(seam.features(SECOND)) <= {"menu-items"}
    assert seam.tags(SECOND) == OF_A_NEW_QUBE
    assert seam.firewall(SECOND) == ["action=accept"]
    assert seam.devices(SECOND) == {}
    given = {"name", "label", "template", "klass", "qid", "uuid", "dispid"}
    others = [key for key in seam.property_names(SECOND) if key not in given]
    assert not [k for k, v in seam.properties(SECOND, others).items() if not v["default"]]
    kept = {key: info for key, info in seam.volumes(SECOND).items() if info["save_on_stop"]}
    assert set(kept) == {"AppVM": {"private"}, "DispVM": set()}.get(kind, {"root", "private"})
    assert [(info["usage"], info["revisions"]) for info in kept.values()] == [(0, [])] * len(kept)
    top = Path("/" if REAL else world.root, "var/lib/qubes")
    folder = top / ("vm-templates" if kind == "TemplateVM" else "appvms") / SECOND
    done = world.salt["cmd.run_all"](["stat", "--format=%.3W", str(folder)])
    assert abs(float(done["stdout"]) - time.time()) < 60
    seam.remove(SECOND)
    assert not folder.exists()


def test_what_can_not_be_made_is_refused_in_words_and_leaves_nothing(seam, template, clone):
    before = set(seam.qubes())
    refused("already exists", seam.create, clone, "TemplateVM", "red")
    refused("No such domain", seam.create, APP, "AppVM", "red", "ramboot-test-none")
    refused("Unknown storage pool", seam.create, APP, "AppVM", "red", template, "no-such-pool")
    refused("Label does not exist", seam.create, APP, "AppVM", "no-color", template)
    refused("cannot be based on template", seam.create, APP, "TemplateVM", "red", template)
    refused("template_for_dispvms", seam.create, DISP, "DispVM", "red", template)
    assert set(seam.qubes()) == before


def test_settings_of_a_clone_are_those_of_its_source_but_for_its_identity(seam, template, clone):
    seam.create(SECOND, "TemplateVM", "green", pool=POOL)
    seam.set_property(clone, "memory", "512")
    seam.set_feature(clone, "gui", "1")
    seam.set_tag(clone, "mine")
    seam.clone_settings(clone, SECOND)
    assert seam.properties(SECOND, ["memory"])["memory"] == {"value": "512", "default": False}
    assert seam.properties(SECOND, ["vcpus"])["vcpus"]["default"] is True
    # our own mark stays behind
    assert seam.features(SECOND) == {"gui": "1"}
    assert "mine" in seam.tags(SECOND)
    assert seam.qubes()[SECOND]["label"] == "green"


def test_what_is_in_use_is_not_deleted(seam, clone):
    seam.create(APP, "AppVM", "red", template=clone, pool=POOL)
    refused("in use", seam.remove, clone)
    seam.remove(APP)
    seam.remove(clone)
    assert not {APP, clone} & set(seam.qubes())
    refused(f"there is no qube {clone}", seam.remove, clone)


def test_a_qube_may_name_itself_and_is_deleted_all_the_same(seam, app):
    seam.set_property(app, "template_for_dispvms", "True")
    seam.set_property(app, "default_dispvm", app)
    seam.remove(app)
    assert app not in seam.qubes()


# Properties, features, tags, devices


def test_a_property_is_set_to_none_and_reset(seam, app):
    seam.set_property(app, "netvm", NETVM)
    assert seam.properties(app, ["netvm"])["netvm"] == {"value": NETVM, "default": False}
    seam.set_property(app, "netvm", "")
    assert seam.properties(app, ["netvm"])["netvm"] == {"value": "", "default": False}
    seam.reset_property(app, "netvm")
    assert seam.properties(app, ["netvm"])["netvm"]["default"] is True


def test_values_that_qubesd_refuses_are_told_with_what_was_tried(seam, app):
    refused(f"setting memory of {app}: ", seam.set_property, app, "memory", "much")
    key = "include_in_backups"
    refused(f"setting {key} of {app}: Invalid literal", seam.set_property, app, key, "maybe")
    seam.set_property(app, key, "no")
    assert seam.properties(app, [key])[key] == {"value": "False", "default": False}
    refused("non-existing qube", seam.set_property, app, "netvm", "ramboot-test-none")
    refused("does not provide network", seam.set_property, app, "netvm", app)
    refused("Label does not exist", seam.set_property, app, "label", "no-color")
    refused("Invalid property", seam.set_property, app, "nosuch", "1")


def test_a_network_comes_before_who_uses_it_and_goes_after(seam, app, template):
    seam.create(SECOND, "AppVM", "red", template=template, pool=POOL)
    refused("does not provide network", seam.set_property, app, "netvm", SECOND)
    seam.set_property(SECOND, "provides_network", "True")
    seam.set_property(app, "netvm", SECOND)
    refused("still used by other qubes", seam.set_property, SECOND, "provides_network", "False")
    seam.set_property(app, "netvm", "")
    seam.set_property(SECOND, "provides_network", "False")


def test_no_step_may_close_a_loop_in_the_network(seam, app, template):
    seam.create(SECOND, "AppVM", "red", template=template, pool=POOL)
    seam.create(DISP, "AppVM", "red", template=template, pool=POOL)
    for name in (app, SECOND, DISP):
        seam.set_property(name, "provides_network", "True")
    seam.set_property(app, "netvm", NETVM)
    seam.set_property(SECOND, "netvm", app)
    seam.set_property(DISP, "netvm", SECOND)
    for name in (app, SECOND, DISP):
        refused("Loops in network are unsupported", seam.set_property, app, "netvm", name)
    assert seam.properties(app, ["netvm"])["netvm"]["value"] == NETVM
    seam.set_property(SECOND, "netvm", NETVM)
    seam.set_property(app, "netvm", SECOND)
    seam.set_property(DISP, "netvm", "")
    seam.set_property(SECOND, "netvm", DISP)
    # who is in use is not deleted
    for name in (app, SECOND):
        seam.set_property(name, "netvm", "")


def test_a_new_template_makes_the_root_writable(seam, app, template):
    seam.set_volume(app, "root", "rw", False)
    seam.set_property(app, "template", template)
    assert seam.volumes(app)["root"]["rw"] is True


def test_features_are_text_and_can_be_taken_away(seam, app):
    seam.set_feature(app, "service.cups", "")
    seam.set_feature(app, "gui", "1")
    assert seam.features(app) == {"service.cups": "", "gui": "1"}
    seam.set_feature(app, "gui", None)
    seam.set_feature(app, "not-there", None)
    assert seam.features(app) == {"service.cups": ""}
    if importlib.util.find_spec("qubesadmin.device_protocol"):
        # 4.2 takes anything; ramboot_config lets nothing of it pass
        refused("illegal characters", seam.set_feature, app, "a:b", "1")
        refused("illegal characters", seam.set_feature, app, "a", "1\n")


def test_qubesd_does_not_start_what_has_the_feature_prohibit_start(seam, clone):
    # core 4.2 has none of it
    pytest.importorskip("qubesadmin.device_protocol")
    import qubesadmin
    import qubesadmin.exc

    seam.set_feature(clone, "prohibit-start", "ramboot: a reason")
    with pytest.raises(qubesadmin.exc.QubesException, match="ramboot: a reason"):
        qubesadmin.Qubes().domains[clone].start()
    assert seam.qubes()[clone]["running"] is False


def test_tags_come_and_go(seam, app):
    seam.set_tag(app, "mine")
    seam.set_tag(app, "mine")
    assert "mine" in seam.tags(app)
    seam.set_tag(app, "mine", present=False)
    seam.set_tag(app, "mine", present=False)
    assert "mine" not in seam.tags(app)


def test_firewall_rules_are_text_in_one_order_and_a_new_qube_lets_all_pass(seam, app):
    assert seam.firewall(app) == ["action=accept"]
    rules = [
        "action=accept proto=tcp dst4=10.0.0.0/8 dstports=80-443 comment=so be it",
        "action=accept proto=udp dsthost=example.com specialtarget=dns",
        "action=drop proto=icmp dst6=fe80::1/128 icmptype=8",
        "action=drop",
    ]
    given = ["proto=tcp action=accept dsthost=10.0.0.0/8 dstports=80-443 comment=so be it"]
    if REAL:
        # the stand-in takes what ramboot_config has put in order already
        seam.set_firewall(app, [*given, *rules[1:]])
    else:
        seam.set_firewall(app, rules)
    assert seam.firewall(app) == rules
    seam.set_firewall(app, ["action=accept"])
    assert seam.firewall(app) == ["action=accept"]


def test_a_firewall_rule_that_can_not_be_is_refused_in_words(seam, app):
    refused(f"setting the firewall rules of {app}", seam.set_firewall, app, ["proto=tcp"])
    refused("dstports valid only", seam.set_firewall, app, ["action=drop dstports=1-1"])
    assert seam.firewall(app) == ["action=accept"]


def test_a_clone_has_the_firewall_of_its_source(seam, clone):
    seam.create(SECOND, "TemplateVM", "green", pool=POOL)
    seam.set_firewall(clone, ["action=drop"])
    seam.clone_settings(clone, SECOND)
    assert seam.firewall(SECOND) == ["action=drop"]


def test_a_pci_device_is_assigned_changed_and_taken_away(seam, app):
    # a port that no machine has: nothing is taken from anybody
    told = ""
    try:
        seam.set_device(app, "00_1f.7", {"no-strict-reset": "True"})
    except CommandExecutionError as error:
        told = str(error)
    if told:
        # 4.2 wants one that is there
        assert "Invalid PCI device" in told
        assert seam.devices(app) == {}
        return
    assert seam.devices(app) == {"00_1f.7": {"no-strict-reset": "True"}}
    seam.set_device(app, "00_1f.7", {})
    assert seam.devices(app) == {"00_1f.7": {}}
    seam.set_device(app, "00_1f.7", None)
    assert seam.devices(app) == {}


def test_the_pci_devices_of_dom0_are_called_as_those_that_a_qube_has(seam, template, app):
    found = seam.pci_devices()
    assert found
    assert "fe_1f.7" not in found
    assert {port for name in seam.qubes() for port in seam.devices(name)} <= {*found}
    for place in found.values():
        assert place is None or re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", place)
    first = next(iter(found))
    if not (found[first] is None or first in seam.devices(NETVM)):
        seam.set_device(app, first, {})
        assert list(seam.devices(app)) == [first]
        seam.set_device(app, first, None)


def test_a_pci_device_that_was_named_stays_the_one_that_it_was(seam, app):
    import qubesadmin

    protocol = pytest.importorskip("qubesadmin.device_protocol", exc_type=ImportError)
    qubes = qubesadmin.Qubes()
    # qubesd compares a named one with what is in its place (core: qubes/api/admin.py,
    # load_device_info), and gives no answer where nothing is
    place = next(iter(seam.pci_devices()))
    port = protocol.Port(qubes.domains["dom0"], place, "pci")
    device = protocol.VirtualDevice(port, "0x8086:0x9d71::p040300")
    given = protocol.DeviceAssignment(device, mode="required")
    qubes.domains[app].devices["pci"].assign(given)
    seam.set_device(app, place, {"no-strict-reset": "True"})
    (found,) = qubesadmin.Qubes().domains[app].devices["pci"].get_assigned_devices()
    assert found.virtual_device.device_id == "0x8086:0x9d71::p040300"
    assert seam.devices(app) == {place: {"no-strict-reset": "True"}}


# Pools and the system


def test_a_file_pool_comes_and_goes_and_its_directory_stays(seam, tmp_path):
    folder = tmp_path / "pool"
    seam.add_pool(TEST_POOL, "file", {"dir_path": str(folder)})
    assert seam.pools()[TEST_POOL]["dir_path"] == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["appvms", "vm-templates"]
    seam.remove_pool(TEST_POOL)
    assert TEST_POOL not in seam.pools()
    assert folder.is_dir()


def test_a_pool_in_use_stays(seam, template, tmp_path):
    seam.add_pool(TEST_POOL, "file", {"dir_path": str(tmp_path / "pool")})
    seam.create(APP, "AppVM", "red", template=template, pool=TEST_POOL)
    refused("in use", seam.remove_pool, TEST_POOL)
    assert TEST_POOL in seam.pools()


def test_a_pool_that_can_not_be_is_refused_in_words(seam, tmp_path):
    refused("unexpected driver name", seam.add_pool, TEST_POOL, "nosuch", {"dir_path": "/x"})
    options = {"dir_path": str(tmp_path / "pool"), "nosuch": "1"}
    refused("unexpected driver options: nosuch", seam.add_pool, TEST_POOL, "file", options)
    # one directory is made, not a path
    options = {"dir_path": str(tmp_path / "a/b")}
    refused("refused without a reason", seam.add_pool, TEST_POOL, "file", options)
    assert TEST_POOL not in seam.pools()


def test_the_default_pools_follow_each_other_until_they_are_set(seam, tmp_path):
    names = ["default_pool", "default_pool_root", "default_pool_private"]
    before = seam.properties(None, names)
    seam.add_pool(TEST_POOL, "file", {"dir_path": str(tmp_path / "pool")})
    try:
        seam.set_property(None, "default_pool_root", TEST_POOL)
        found = seam.properties(None, names)
        assert found["default_pool_root"] == {"value": TEST_POOL, "default": False}
        assert found["default_pool_private"] == before["default_pool_private"]
        refused("in use", seam.remove_pool, TEST_POOL)
        refused("No such storage pool", seam.set_property, None, "default_pool_root", "nosuch")
    finally:
        old = before["default_pool_root"]
        if old["default"]:
            seam.reset_property(None, "default_pool_root")
        else:
            seam.set_property(None, "default_pool_root", old["value"])
    assert seam.properties(None, names) == before
