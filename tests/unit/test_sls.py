# SPDX-License-Identifier: GPL-2.0-or-later
"""The states through a real salt-call, on a fake root: `paths` of defaults.yaml lead below it.

findmnt, lsblk and what would act on the machine are scripts of the test, first in PATH.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
SYNC = "run `qubesctl saltutil.clear_cache` then `qubesctl saltutil.sync_all`"
SWAP_LINE = "/dev/mapper/qubes_dom0-swap none swap defaults 0 0\n"

pytestmark = pytest.mark.salt


class Minion:
    """A masterless minion with the formula in env base."""

    def __init__(self, top: Path):
        self.root, self.formula, self.bin = top / "root", top / "formula", top / "bin"
        self.conf = top / "conf"
        for folder in (self.root, self.conf, self.bin, top / "pillar"):
            folder.mkdir(parents=True)
        for part in ("_modules", "_states", "ramboot"):
            shutil.copytree(
                REPO / part, self.formula / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        self._move_paths()
        settings = {
            "id": "dom0",
            "file_client": "local",
            "root_dir": str(top / "salt"),
            "file_roots": {"base": [str(self.formula)]},
            "pillar_roots": {"base": [str(top / "pillar")]},
            "log_level_logfile": "quiet",
            "fips_mode": False,
        }
        (self.conf / "minion").write_text(yaml.safe_dump(settings))
        self._machine()

    def _move_paths(self):
        """A path of defaults.yaml leads below our root; the file stays otherwise as it is."""
        path = self.formula / "ramboot" / "defaults.yaml"
        before, paths, after = re.fullmatch(
            r"(.*^paths:\n)(.*?)(^\S.*)", path.read_text(), re.DOTALL | re.MULTILINE
        ).groups()
        # the first one after a blank, a bracket or a quote, so that none is moved twice
        moved = re.sub(r"(?<=[ \[',])/(?=[a-z])", f"{self.root}/", paths)
        # of an image nothing is expected: the host's disk may be full
        before = before.replace("expected_percent: 50", "expected_percent: 0")
        path.write_text(before + re.sub(r"#.*", "", moved) + after)

    def _machine(self):
        """Qubes' default layout and the programs that preflight looks for."""
        layout = yaml.safe_load((REPO / "tests/fixtures/layout/qubes-default.yaml").read_text())
        for name in ("findmnt", "lsblk"):
            (self.bin / f"{name}.json").write_text(json.dumps(layout[name]))
            self.script(name, f"cat {self.bin}/{name}.json")
        self.script("systemctl", f'echo "systemctl $*" >> {self.bin}/log')
        for name in ("dracut", "lsinitrd"):
            self.write(f"usr/bin/{name}", "", 0o755)
        # a menu that has never an entry of ours
        menu = "menuentry 'Qubes' --id 'qubes' {\n multiboot2 /xen-4.19.gz\n}"
        self.write("usr/bin/grub2-mkconfig", f'#!/bin/sh\ncat > "$2" <<"END"\n{menu}\nEND\n', 0o755)
        self.write("usr/bin/grub2-script-check", "#!/bin/sh\n", 0o755)
        self.write("etc/grub.d/20_linux_xen", "", 0o755)
        self.write("boot/xen-4.19.gz", "")
        self.write("boot/grub2/grub.cfg", "")
        self.write("proc/swaps", "Filename Type Size Used Priority\n")
        self.write("etc/fstab", SWAP_LINE)

    def script(self, name: str, line: str):
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def write(self, path: str, text: str, mode: int = 0o644):
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)

    def pillar(self, text: str):
        (self.conf.parent / "pillar/top.sls").write_text("base: {'*': [ramboot]}")
        (self.conf.parent / "pillar/ramboot.sls").write_text(f"ramboot: {{{text}}}")

    def call(self, *arguments: str, pillar=None):
        command = [Path(sys.executable).with_name("salt-call"), "--local", "--out", "json"]
        command += ["-c", self.conf, *arguments]
        if pillar is not None:
            command.append(f"pillar={json.dumps({'ramboot': pillar})}")
        env = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.stdout, done.stderr
        return json.loads(done.stdout)["local"]

    def apply(self, sls: str, *arguments: str, pillar=None):
        """The states' results, by ID."""
        answer = self.call("state.apply", sls, *arguments, pillar=pillar)
        assert isinstance(answer, dict), answer
        return {value["__id__"]: value for value in answer.values()}

    def tree(self):
        """Each file below the root, but for /run: it is in RAM."""
        return {
            str(path.relative_to(self.root)): path.read_text()
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and not path.is_relative_to(self.root / "run")
        }


@pytest.fixture(scope="module")
def unsynced(tmp_path_factory):
    return Minion(tmp_path_factory.mktemp("unsynced"))


@pytest.fixture(scope="module")
def minion(tmp_path_factory):
    minion = Minion(tmp_path_factory.mktemp("synced"))
    minion.call("saltutil.sync_all")
    return minion


def others(states):
    return {key: value for key, value in states.items() if "preflight" not in key}


def unmet(states):
    """IDs of states that ran although what they require failed."""
    return [
        key
        for key, value in others(states).items()
        if value["result"] is not False
        or "One or more requisite failed" not in value["comment"]
        or value["changes"]
    ]


ABSENT = sorted(f"ramboot.{path.parent.name}.absent" for path in REPO.glob("ramboot/*/absent.sls"))


@pytest.mark.parametrize("sls", ["ramboot", "ramboot.absent"])
@pytest.mark.parametrize("test", ["test=True", "test=False"])
def test_modules_that_are_not_synced_stop_everything_with_the_remedy(unsynced, sls, test):
    before = unsynced.tree()
    states = unsynced.apply(sls, test)
    (told,) = (value for key, value in states.items() if "preflight" in key)
    assert (told["result"], told["name"], told["changes"]) == (False, SYNC, {})
    # under test=True Salt writes a comment of its own
    assert test == "test=True" or told["comment"] == SYNC
    assert len(states) > 5
    assert unmet(states) == []
    assert unsynced.tree() == before


@pytest.fixture
def outdated(minion):
    """After an update of the formula: an old module that can't read the new defaults, an old state,
    and one that the minion has not got at all.
    """
    copies = Path(minion.call("config.get", "extension_modules"))
    config, state = copies / "modules/ramboot_config.py", copies / "states/ramboot_grub.py"
    config.write_text(config.read_text() + "\ndef faults():\n    raise ValueError('what is new')\n")
    state.write_text(f"{state.read_text()}\n")
    (copies / "states/ramboot_swap.py").unlink()
    yield minion
    minion.call("saltutil.sync_all")


def test_modules_older_than_the_states_stop_everything_with_the_remedy(outdated):
    before = outdated.tree()
    for sls, test in (
        ("ramboot", "test=False"),
        ("ramboot.absent", "test=False"),
        ("ramboot", "test=True"),
    ):
        states = outdated.apply(sls, test)
        (told,) = (value for key, value in states.items() if "preflight" in key)
        assert (told["result"], told["name"], told["changes"]) == (False, SYNC, {})
        assert test == "test=True" or told["comment"] == (
            f"{SYNC}; not as the formula has them: _modules/ramboot_config.py,"
            " _states/ramboot_grub.py, _states/ramboot_swap.py"
        )
        assert unmet(states) == []
    assert outdated.tree() == before


def test_modules_that_the_file_server_does_not_have_are_taken_as_they_are(minion):
    aside = minion.conf.parent / "aside"
    aside.mkdir(exist_ok=True)
    for part in ("_modules", "_states"):
        (minion.formula / part).rename(aside / part)
    try:
        states = minion.apply("ramboot.preflight")
    finally:
        for part in ("_modules", "_states"):
            (aside / part).rename(minion.formula / part)
    assert states["ramboot-preflight"]["result"] is True


@pytest.mark.parametrize("test", ["test=True", "test=False"])
def test_a_bad_pillar_stops_everything_and_is_told_whole(minion, test):
    before = minion.tree()
    pillar = {"swap": "never", "boot": {"mode": "sometimes"}, "zran": 1}
    states = minion.apply("ramboot", test, pillar=pillar)
    told = states["ramboot-preflight"]
    assert told["result"] is False
    assert told["comment"].splitlines() == [
        "nothing was changed:",
        "ramboot:zran is not a known key; did you mean zram? known: boot, zram, tmpfs, snapshot,"
        " image, memory, copy, grub, swap, qubes",
        "ramboot:boot:mode: 'sometimes' is not allowed; allowed: ask, off, zram, tmpfs, image,"
        " snapshot or overlay",
        "ramboot:swap: 'never' is not allowed; allowed: session, off or keep",
    ]
    assert unmet(states) == []
    assert minion.tree() == before


def test_in_a_ram_session_neither_apply_nor_undo_runs(minion):
    before = minion.tree()
    minion.write("run/ramboot/status.json", '{"session": "ram", "backend": "zram"}')
    try:
        for sls in ("ramboot", "ramboot.absent", *ABSENT):
            states = minion.apply(sls)
            assert len(states) > 2
            (told,) = (value for key, value in states.items() if "preflight" in key)
            assert told["comment"].splitlines()[1].startswith("this is a RAM session (zram); ")
            assert unmet(states) == []
    finally:
        (minion.root / "run/ramboot/status.json").unlink()
    assert minion.tree() == before


def test_a_good_pillar_passes_preflight_and_reaches_every_component(minion):
    states = minion.apply("ramboot", "test=True", pillar={"boot": {"timeout_s": 7}})
    assert states["ramboot-preflight"]["result"] is True
    assert {key.split("-")[1] for key in states} == {
        "preflight",
        "initramfs",
        "grub",
        "swap",
        "qubes",
        "session",
        "image",
    }
    assert list(states)[-1] == "ramboot-image-unused"
    assert states["ramboot-initramfs-boot-conf"]["result"] is None


@pytest.mark.parametrize("pillar", [{}, {"boot": {"mode": "image"}}])
def test_a_fault_of_a_qube_stops_everything_and_one_component_only_if_it_is_that(minion, pillar):
    pillar = {**pillar, "qubes": {"save": {"vault-2": {"template": "none"}}}}
    minion.write("usr/bin/mksquashfs", "", 0o755)
    before = minion.tree()
    try:
        states = minion.apply("ramboot", pillar=pillar)
        assert minion.tree() == before
        swap = minion.apply("ramboot.swap", "test=True", pillar=pillar)
    finally:
        (minion.root / "usr/bin/mksquashfs").unlink()
    told = states.pop("ramboot-qubes-checked")
    assert told["comment"].startswith("nothing was changed:\nramboot:qubes is set, and ")
    assert unmet(states) == []
    assert all(value["result"] is not False for value in swap.values()), swap


def test_a_pillar_that_names_the_backend_image_builds_one_when_it_can(minion):
    pillar = {"boot": {"backend": "image"}, "image": {"rebuild": "background"}}
    states = minion.apply("ramboot", "test=True", pillar=pillar)
    assert states["ramboot-preflight"]["comment"].splitlines()[1:] == [
        "the backend image needs mksquashfs, which is not installed; in dom0:"
        " sudo qubes-dom0-update squashfs-tools"
    ]
    minion.write("usr/bin/mksquashfs", "", 0o755)
    volume = '{"report": [{"lv": [{"vg_name": "q", "lv_name": "root", "pool_lv": "pool"}]}]}'
    minion.script("lvs", f"case $* in *json*) echo '{volume}' ;; *) echo 1073741824 25.00 ;; esac")
    try:
        states = minion.apply("ramboot", "test=True", pillar=pillar)
    finally:
        (minion.root / "usr/bin/mksquashfs").unlink()
        (minion.bin / "lvs").unlink()
    assert states["ramboot-preflight"]["result"] is True
    # last, for it holds what the others did
    assert list(states)[-1] == "ramboot-image-current"
    told = states["ramboot-image-current"]
    assert (told["result"], told["comment"]) == (
        None,
        "the image would be built: there is no image",
    )
    assert states["ramboot-image-timer"]["result"] is None


def test_the_units_that_keep_an_image_current_come_and_go(minion):
    before = minion.tree()
    minion.write("usr/bin/mksquashfs", "", 0o755)
    try:
        # the machine's own LVM knows no such volume: the build fails, and nothing of it stays
        states = minion.apply("ramboot.image", pillar={"image": {"rebuild": "background"}})
    finally:
        (minion.root / "usr/bin/mksquashfs").unlink()
    assert states["ramboot-image-current"]["result"] is False
    manifest = minion.root / "var/lib/ramboot/image/manifest"
    service = minion.tree()["etc/systemd/system/ramboot-image.service"]
    assert f"ConditionPathExists={manifest}\n" in service
    wanted = minion.tree()["etc/systemd/system/timers.target.d/ramboot-image.conf"]
    assert "Wants=ramboot-image.timer\n" in wanted
    states = minion.apply("ramboot.image.absent")
    assert all(value["result"] is True for value in states.values()), states
    assert minion.tree() == before


def test_what_builds_an_image_anew_goes_when_the_pillar_names_the_backend_no_more(minion):
    before = minion.tree()
    minion.write("usr/bin/mksquashfs", "", 0o755)
    pillar = {"boot": {"backend": "image"}, "image": {"rebuild": "background"}}
    try:
        minion.apply("ramboot.image", pillar=pillar)
    finally:
        (minion.root / "usr/bin/mksquashfs").unlink()
    del pillar["boot"]
    states = minion.apply("ramboot", "test=True", pillar=pillar)
    units = ("wanted", "timer", "service")
    for unit in units:
        assert states[f"ramboot-image-{unit}"]["result"] is None, states
    assert "ramboot-image-current" not in states
    states = minion.apply("ramboot.image.unused", pillar=pillar)
    for unit in units:
        (change,) = states[f"ramboot-image-{unit}"]["changes"].values()
        assert change["new"] == "deleted"
    # the build failed, as above
    left = str(minion.root / "var/lib/ramboot/image")
    assert states["ramboot-image-unused"]["comment"].endswith(f"ramboot.image.absent`: {left}")
    again = minion.apply("ramboot.image.unused", pillar=pillar)
    assert all(value["result"] is True and not value["changes"] for value in again.values()), again
    minion.apply("ramboot.image.absent")
    assert minion.tree() == before


def test_the_unit_that_builds_at_shutdown_comes_and_goes(minion):
    before = minion.tree()
    minion.write("usr/bin/mksquashfs", "", 0o755)
    try:
        # no unit is active in a fake machine
        asked, systemctl = minion.bin / "asked", (minion.bin / "systemctl").read_text()
        minion.script("systemctl", f'echo "$*" >> {asked}; [ "$1" != is-active ]')
        # the build fails, as above
        states = minion.apply("ramboot.image", pillar={"image": {"rebuild": "shutdown"}})
    finally:
        (minion.bin / "systemctl").write_text(systemctl)
        (minion.root / "usr/bin/mksquashfs").unlink()
    # after the image, whose absence keeps the unit from starting
    assert list(states)[-2:] == ["ramboot-image-current", "ramboot-image-shutdown-active"]
    assert asked.read_text().splitlines()[-3:] == [
        "is-active --quiet ramboot-image-shutdown.service",
        "daemon-reload",
        "start ramboot-image-shutdown.service",
    ]
    units = "etc/systemd/system"
    lines = minion.tree()[f"{units}/ramboot-image-shutdown.service"].splitlines()
    manifest = minion.root / "var/lib/ramboot/image/manifest"
    assert f"ConditionPathExists={manifest}" in lines
    (stop,) = (line for line in lines if line.startswith("ExecStop="))
    assert stop.startswith("ExecStop=/usr/bin/timeout --kill-after=10s 20m salt-call --local ")
    # systemd's own end of a shutdown is at 30 min (poweroff.target, JobTimeoutSec)
    assert "TimeoutStopSec=21min" in lines
    wanted = minion.tree()[f"{units}/multi-user.target.d/ramboot-image.conf"]
    assert "Wants=ramboot-image-shutdown.service\n" in wanted
    assert f"{units}/ramboot-image.service" not in minion.tree()
    states = minion.apply("ramboot.image.absent")
    assert all(value["result"] is True for value in states.values()), states
    assert minion.tree() == before


def test_a_setting_reaches_the_boot_config_through_the_map(minion):
    minion.pillar("boot: {timeout_s: 7}")
    target = minion.root / "rendered"
    minion.call(
        "cp.get_template",
        "salt://ramboot/initramfs/files/ramboot.conf.j2",
        str(target),
    )
    text = target.read_text()
    target.unlink()
    minion.pillar("")
    assert text.splitlines()[1:6] == [
        "version=1",
        "mode=ask",
        "backend=zram",
        "default=n",
        "timeout_s=7",
    ]


def test_map_yields_the_defaults_where_the_pillar_is_bad(minion):
    found = minion.call("state.show_sls", "ramboot.swap", pillar={"swap": ["off"]})
    assert "ramboot-swap-on" in found
    assert "ramboot-swap-off" not in found


def test_swap_off_again_and_back_by_the_pillar(minion):
    before = minion.tree()
    off = minion.apply("ramboot.swap", pillar={"swap": "off"})
    assert all(value["result"] is True for value in off.values()), off
    assert {key: bool(value["changes"]) for key, value in off.items()} == {
        "ramboot-preflight": False,
        "ramboot-swap-zram-generator": True,
        "ramboot-swap-off": True,
    }
    assert minion.tree()["etc/fstab"] == f"#ramboot: {SWAP_LINE}"
    assert "etc/systemd/zram-generator.conf" in minion.tree()

    changed = minion.tree()
    again = minion.apply("ramboot.swap", pillar={"swap": False})
    assert all(value["result"] is True and not value["changes"] for value in again.values()), again
    assert minion.tree() == changed

    back = minion.apply("ramboot.swap", pillar={"swap": "session"})
    assert all(value["result"] is True for value in back.values()), back
    left = {path: text for path, text in minion.tree().items() if path != RECORD}
    assert left == before

    gone = minion.apply("ramboot.swap.absent")
    assert all(value["result"] is True for value in gone.values()), gone
    assert minion.tree() == before


RECORD = "var/lib/ramboot/record.json"


@pytest.mark.skipif(os.geteuid() != 0, reason="files become root's: run as root")
def test_menu_entries_alone_come_and_go_with_their_record(minion):
    before = minion.tree()
    nothing = {"grub": {"entries": [], "dom0_mem_max_mib": "keep"}}
    made = minion.apply("ramboot.grub", pillar=nothing)
    assert all(value["result"] is True for value in made.values()), made
    assert {"etc/grub.d/21_ramboot", RECORD} <= set(minion.tree())
    # they need the module, and go with it
    gone = minion.apply("ramboot.initramfs.absent")
    assert all(value["result"] is True for value in gone.values()), gone
    assert minion.tree() == before
