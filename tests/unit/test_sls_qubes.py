# SPDX-License-Identifier: GPL-2.0-or-later
"""ramboot.qubes through a real salt-call, there and back again, on the stand-in for qubesd."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import STANDIN, import_standin, populate

sys.path.insert(0, str(Path(__file__).parent))
from test_sls import Minion  # noqa: E402

pytestmark = [
    pytest.mark.salt,
    pytest.mark.skipif(os.geteuid() != 0, reason="files become root's: run as root"),
]

REPO = Path(__file__).resolve().parents[2]
MIB = 1 << 20
CLONE, DVM = "debian-12-xfce-stateless", "debian-12-xfce-stateless-dvm"
FIREWALL = ["action=accept proto=tcp dsthost=example.com dstports=443", "action=drop"]


def example():
    """The pillar that README shows, word for word."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```\n(ramboot:\n  qubes:\n.*?)^```$", text, re.DOTALL | re.MULTILINE)[1]
    return yaml.safe_load(block)["ramboot"]


# README's example, and settings of somebody else's qube; the fake root lies in /tmp, which the
# default leaves behind
PILLAR = {
    "copy": {"exclude": []},
    "qubes": {
        **example()["qubes"],
        "settings": {"sys-net": {"properties": {"memory": 300}, "firewall": FIREWALL}},
        "aliases": "session",
    },
}


@pytest.fixture(scope="module")
def dom0(tmp_path_factory):
    """A minion with what a fresh Qubes has."""
    top = tmp_path_factory.mktemp("qubes")
    minion = Minion(top)
    minion.standin = top / "qubesd.json"
    with pytest.MonkeyPatch.context() as patch:
        module = import_standin(patch)
        populate(module.WORLD, minion.root)
        module.WORLD.path = minion.standin
        module.WORLD.save()
    minion.write("proc/self/mountinfo", "21 1 253:1 / / rw shared:1 - ext4 /dev/dm-1 rw\n")
    for device in ("zram3", "sda", "dm-1/slaves/sda"):
        minion.write(f"sys/class/block/{device}/dev", "")
    minion.write("proc/meminfo", "MemTotal: 4194304 kB\nMemAvailable: 3145728 kB\n")
    # none of the host's users is asked for menus
    minion.script("runuser", "exit 1")
    minion.script("lvs", """echo '{"report": [{"lv": []}]}'""")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(STANDIN))
        patch.setenv("RAMBOOT_STANDIN", str(minion.standin))
        minion.call("saltutil.sync_all")
        yield minion


def world(dom0):
    return json.loads(dom0.standin.read_text())


def tree(dom0):
    """But for /run, which is in RAM."""
    return {
        str(path.relative_to(dom0.root)): path.read_bytes() if path.stat().st_size < MIB else None
        for path in sorted(dom0.root.rglob("*"))
        if path.is_file() and not path.is_relative_to(dom0.root / "run")
    }


def qubes_states(states):
    return {key: value for key, value in states.items() if key.startswith("ramboot-qubes")}


def audit(dom0):
    """The rows about the two that README's example makes: each as a whole, then its volumes."""
    found = dom0.call("ramboot.audit")
    names = (f"qube {CLONE}", f"qube {DVM}")
    rows = [row for row in found if row["place"].rpartition(" ")[0] in names]
    return [row for row in found if row["place"] in names] + rows


@contextlib.contextmanager
def ram_session(dom0):
    """/ is on zram."""
    mounts = dom0.root / "proc/self/mountinfo"
    before = mounts.read_text()
    dom0.write("proc/self/mountinfo", "21 1 252:3 / / rw shared:1 - ext4 /dev/zram3 rw\n")
    yield
    mounts.write_text(before)


def test_the_example_there_and_back_again(dom0):
    before = world(dom0), tree(dom0)

    dry = dom0.apply("ramboot.qubes", "test=True", pillar=PILLAR)
    assert (world(dom0), tree(dom0)) == before
    assert {key: value["result"] for key, value in dry.items()} == {
        "ramboot-preflight": True,
        "ramboot-qubes-checked": True,
        "ramboot-qubes-pools": True,
        "ramboot-qubes-made": None,
        "ramboot-qubes-settings": None,
        "ramboot-qubes-aliases": None,
    }

    real = dom0.apply("ramboot.qubes", pillar=PILLAR)
    assert all(value["result"] is True for value in real.values()), real
    for part in ("pools", "made", "settings"):
        name = f"ramboot-qubes-{part}"
        assert real[name]["changes"] == dry[name]["changes"]
    made = world(dom0)["qubes"]
    for name in (CLONE, DVM):
        pools = {key: volume["pool"] for key, volume in made[name]["volumes"].items()}
        assert pools == {
            "root": "varlibqubes",
            "private": "varlibqubes",
            "volatile": "varlibqubes",
            "kernel": "linux-kernel",
        }
    assert made["sys-net"]["properties"]["memory"] == 300
    assert made["sys-net"]["firewall"][-1] == "action=drop"

    there = world(dom0), tree(dom0)
    again = dom0.apply("ramboot.qubes", pillar=PILLAR)
    assert all(value["result"] is True and not value["changes"] for value in again.values()), again
    assert (world(dom0), tree(dom0)) == there

    # a persistent boot says what a RAM session would make of them, and that says the same
    both = [{key: row.get(key) for key in ("verdict", "would")} for row in audit(dom0)]
    assert both == [{"verdict": "disk", "would": "ram"}] * 8
    with ram_session(dom0):
        assert [row["verdict"] for row in audit(dom0)] == ["ram"] * 8
    assert tree(dom0) == there[1]

    # the whole undo, without a pillar
    gone = qubes_states(dom0.apply("ramboot.absent"))
    assert all(value["result"] is True for value in gone.values()), gone
    assert list(gone["ramboot-qubes-absent"]["changes"]) == [
        "sys-net: firewall rules",
        "sys-net: memory",
        DVM,
        CLONE,
    ]
    # qubesd has no way to forget rules: those of a qube that never had any are put back by words
    assert world(dom0)["qubes"]["sys-net"]["firewall"] == ["action=accept"]
    after = world(dom0)
    del after["qubes"]["sys-net"]["firewall"]
    assert after == before[0]
    assert tree(dom0) == before[1]


def test_a_fault_stops_the_rest_and_nothing_is_changed(dom0):
    before = world(dom0)
    pillar = {**PILLAR, "qubes": {"templates": {CLONE: {"source": "fedora-99"}}}}
    states = qubes_states(dom0.apply("ramboot.qubes", pillar=pillar))
    assert states["ramboot-qubes-checked"]["comment"].splitlines() == [
        "nothing was changed:",
        f"templates:{CLONE}:source: there is no qube fedora-99",
    ]
    assert states["ramboot-qubes-made"]["result"] is False
    assert "requisite failed" in states["ramboot-qubes-made"]["comment"]
    assert world(dom0) == before


# Aliases


@pytest.fixture
def aliases(tmp_path):
    """`aliases(when, session)`: what an interactive shell makes of the file."""
    import jinja2

    source = (REPO / "ramboot/qubes/files/ramboot.sh.j2").read_text()
    status = tmp_path / "status.json"

    def shell(when, session):
        text = jinja2.Environment(keep_trailing_newline=True).from_string(source)
        script = tmp_path / "ramboot.sh"
        script.write_text(text.render(aliases=when, pool="ram", status=status))
        status.unlink(missing_ok=True)
        if session:
            status.write_text(f'{{"schema":1,"session":"{session}","requested":null}}\n')
        done = subprocess.run(
            ["bash", "--norc", "-ec", f"shopt -s expand_aliases; . {script}; alias; echo end"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout.splitlines()[:-1]

    return shell


BOTH = ["alias qvm-clone='qvm-clone -P ram'", "alias qvm-create='qvm-create -P ram'"]


@pytest.mark.parametrize(
    ("when", "session", "wanted"),
    [
        ("session", "ram", BOTH),
        ("session", "persistent", []),
        ("session", None, []),
        ("always", "persistent", BOTH),
        ("always", None, BOTH),
    ],
)
def test_aliases_are_there_when_they_should(aliases, when, session, wanted):
    assert aliases(when, session) == wanted
