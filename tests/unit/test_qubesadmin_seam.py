# SPDX-License-Identifier: GPL-2.0-or-later
"""What of the seam to qubesd can't be shown on a real one: its absence, its faults, 4.2's API."""

from __future__ import annotations

import sys

import pytest
from salt.exceptions import CommandExecutionError

from conftest import import_standin, populate


def test_without_qubesadmin_each_question_says_so(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "qubesadmin", None)
    seam = world.module("ramboot_qubesadmin")
    assert seam.available() is False
    assert seam.__virtual__() == "ramboot_qubesadmin"
    with pytest.raises(CommandExecutionError) as told:
        seam.qubes()
    assert str(told.value) == (
        "the list of qubes: Qubes' Python API (qubesadmin) is not installed here"
    )


@pytest.mark.parametrize("method", ["connect", "admin.vm.List", "admin.vm.CurrentState"])
def test_a_qubesd_that_is_gone_is_one_sentence(world, qubesd, method):
    exc = sys.modules["qubesadmin.exc"]

    def gone(called, _subject):
        if called == method:
            raise exc.QubesDaemonCommunicationError("Failed to connect to qubesd service")

    qubesd.fault = gone
    with pytest.raises(CommandExecutionError) as told:
        world.salt["ramboot_qubesadmin.qubes"]()
    assert str(told.value) == (
        "the list of qubes: qubesd can't be reached: Failed to connect to qubesd service"
    )


def test_a_socket_that_refuses_is_the_same(world, qubesd):
    def refuse(called, _subject):
        raise ConnectionRefusedError(111, "Connection refused")

    qubesd.fault = refuse
    with pytest.raises(CommandExecutionError, match=r"qubesd can't be reached: \[Errno 111\]"):
        world.salt["ramboot_qubesadmin.pools"]()


@pytest.mark.parametrize("kind", ["PermissionDenied", "ProtocolError"])
def test_a_refusal_as_client_44_words_it_is_a_sentence_too(world, qubesd, kind):
    exc = sys.modules["qubesadmin.exc"]

    def deny(called, _subject):
        raise getattr(exc, kind)("Argument not in 'pools'")

    qubesd.fault = deny
    with pytest.raises(CommandExecutionError) as told:
        world.salt["ramboot_qubesadmin.pools"]()
    assert str(told.value) == (
        "the storage pools: refused without a reason: Argument not in 'pools'"
    )


def test_a_running_qube_is_told(world, qubesd):
    qubesd.run("sys-net")
    assert world.salt["ramboot_qubesadmin.qubes"]()["sys-net"]["running"] is True
    assert world.salt["ramboot_qubesadmin.qubes"]()["default-dvm"]["running"] is False


def test_devices_by_the_api_of_42(world, monkeypatch):
    module = import_standin(monkeypatch)
    module.WORLD.release = "4.2"
    populate(module.WORLD, world.root)
    seam = world.module("ramboot_qubesadmin")
    assert seam.pci_devices() == {"00_14.0": None, "00_1f.6": None, "01_00.0": None}
    with pytest.raises(CommandExecutionError, match="to VM in pvh mode"):
        seam.set_device("sys-net", "00_14.0", {})
    seam.set_property("sys-net", "virt_mode", "hvm")
    seam.set_device("sys-net", "00_14.0", {"no-strict-reset": "True"})
    assert module.WORLD.qubes["sys-net"]["pci"] == {"00_14.0": {"no-strict-reset": "True"}}
    assert seam.devices("sys-net") == {"00_14.0": {"no-strict-reset": "True"}}
    seam.set_device("sys-net", "00_14.0", None)
    assert seam.devices("sys-net") == {}


@pytest.fixture
def menu(world, qubesd, monkeypatch):
    calls = []

    def run(command, python_shell, ignore_retcode):
        assert python_shell is False
        calls.append(command)
        return {"retcode": 0, "stdout": "", "stderr": ""}

    world.salt["cmd.run_all"] = run
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    return calls


def test_menu_entries_of_a_clone_come_from_its_source(world, menu):
    assert world.salt["ramboot_qubesadmin.update_menu"]("mine", "debian-12-xfce") is None
    assert menu == [
        ["qvm-appmenus", "--init", "--update", "--source", "debian-12-xfce", "mine"],
    ]


def test_menu_entries_that_fail_are_told_and_no_more(world, menu):
    world.salt["cmd.run_all"] = lambda *_command, **_options: {
        "retcode": 1,
        "stdout": "",
        "stderr": "no display\n",
    }
    told = world.salt["ramboot_qubesadmin.update_menu"]("mine")
    assert told == "mine has no menu entries: no display"


def test_root_makes_menu_entries_as_the_user(world, menu, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("grp.getgrnam", lambda name: type("G", (), {"gr_mem": ["user"]}))
    world.salt["ramboot_qubesadmin.update_menu"]("mine")
    assert menu == [
        ["runuser", "-u", "user", "--", "qvm-appmenus", "--init", "--update", "mine"],
    ]
    monkeypatch.setattr("grp.getgrnam", lambda name: type("G", (), {"gr_mem": []}))
    told = world.salt["ramboot_qubesadmin.update_menu"]("mine")
    assert told == "mine has no menu entries: nobody is in the group qubes"


def test_running_disposables_of_the_source_are_not_claimed_by_its_clone(world, qubesd):
    world.salt["ramboot_qubesadmin.create"]("mine", "TemplateVM", "black")
    # qubesd alone sets it (core: qubes/ext/admin.py)
    qubesd.qubes["debian-12-xfce"]["features"] = {"preload-dispvm": "disp1", "gui": "1"}
    world.salt["ramboot_qubesadmin.clone_settings"]("debian-12-xfce", "mine")
    assert world.salt["ramboot_qubesadmin.features"]("mine") == {"gui": "1"}
