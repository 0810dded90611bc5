# SPDX-License-Identifier: GPL-2.0-or-later
"""packaging/manifest: hashes of what is shipped, and where it goes in the image."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import unchanged

REPO = Path(__file__).resolve().parents[2]
FILES = "ramboot/initramfs/files/50ramboot"


@pytest.fixture
def run(tmp_path):
    """A small formula and the command to run on it."""
    for name, text in {
        f"{FILES}/module-setup.sh": "setup",
        f"{FILES}/ramboot-lib.sh": "lib",
        f"{FILES}/ramboot-initramfs.sh": "run",
        f"{FILES}/hooks/pre-mount.sh": "hook",
        f"{FILES}/63-ramboot.rules": "rules",
        "ramboot/initramfs/files/50-ramboot.conf": "conf",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def command(*arguments):
        return subprocess.run(
            [sys.executable, REPO / "packaging/manifest", "--repo", tmp_path, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )

    return command


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_each_file_has_its_hash_mode_and_places(run, tmp_path):
    assert run().returncode == 0
    module = "/usr/lib/dracut/modules.d/50ramboot"
    assert (tmp_path / FILES / "manifest").read_text().splitlines() == [
        "# Made by packaging/manifest. SHA256  MODE  PATH_ON_DISK  PATH_IN_IMAGE",
        f"{sha('rules')}  0644  {module}/63-ramboot.rules  /etc/udev/rules.d/63-ramboot.rules",
        f"{sha('hook')}  0755  {module}/hooks/pre-mount.sh  /usr/lib/ramboot/hooks/pre-mount.sh",
        f"{sha('setup')}  0755  {module}/module-setup.sh  /usr/lib/ramboot/module-setup.sh",
        f"{sha('run')}  0755  {module}/ramboot-initramfs.sh  /usr/bin/ramboot-initramfs",
        f"{sha('lib')}  0644  {module}/ramboot-lib.sh  /usr/lib/ramboot/ramboot-lib.sh",
        f"{sha('conf')}  0644  /etc/dracut.conf.d/50-ramboot.conf  -",
    ]


def test_check_is_quiet_when_it_matches_and_writes_nothing(run, tmp_path):
    run()
    before = unchanged(tmp_path / FILES / "manifest")
    done = run("--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert unchanged(tmp_path / FILES / "manifest") == before


@pytest.mark.parametrize("change", ["changed", "added", "removed", "no manifest"])
def test_check_fails_when_it_does_not(run, tmp_path, change):
    run()
    if change == "no manifest":
        (tmp_path / FILES / "manifest").unlink()
    elif change == "removed":
        (tmp_path / FILES / "ramboot-lib.sh").unlink()
    else:
        name = "ramboot-lib.sh" if change == "changed" else "ramboot-new.sh"
        (tmp_path / FILES / name).write_text("new")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    done = run("--check")
    assert done.returncode == 1
    assert done.stderr.endswith(
        f"manifest: {FILES}/manifest is out of date; run packaging/manifest\n"
    )
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_file_that_is_no_script_is_refused(run, tmp_path):
    stray = tmp_path / FILES / "ramboot-lib.sh.orig"
    stray.write_text("x")
    done = run()
    assert (done.returncode, done.stderr) == (
        1,
        f"manifest: {stray} is neither a script nor a udev rule: not shipped\n",
    )


def test_the_shipped_manifest_is_up_to_date():
    done = subprocess.run(
        [sys.executable, REPO / "packaging/manifest", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# dracut's functions, as far as they put files into the image
DRACUT = r"""
inst_simple() { command install -D "$1" "$initdir${2-$1}"; }
inst_rules() { inst_simple "$1" "/etc/udev/rules.d/${1##*/}"; }
inst_multiple() { :; }
inst_hook() { :; }
dracut_need_initqueue() { echo waits; }
. "$moddir/module-setup.sh"
"""


@pytest.fixture
def dracut(tmp_path):
    """Runs functions of module-setup.sh; returns the words that they print."""

    def run(functions: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", DRACUT + functions],
            env={
                "PATH": os.environ["PATH"],
                "moddir": str(REPO / FILES),
                "initdir": str(tmp_path),
                "dracutsysrootdir": str(tmp_path),
                "dracutbasedir": str(tmp_path),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        return done.stdout.split()

    return run


def test_what_module_setup_stamps_is_what_the_manifest_expects(tmp_path, dracut):
    dracut("install")
    stamp = (tmp_path / "usr/lib/ramboot/stamp").read_text().splitlines()
    lines = (REPO / FILES / "manifest").read_text().splitlines()
    fields = [line.split() for line in lines if "/50ramboot/" in line]
    assert sorted(stamp) == sorted(f"{line[0]}  {line[3].lstrip('/')}" for line in fields)


@pytest.mark.parametrize(
    ("module", "depends"), [("99base", "base dm"), ("77initqueue", "base dm initqueue")]
)
def test_dracut_waits_for_a_root_that_lies_on_neither_luks_nor_lvm(
    tmp_path, dracut, module, depends
):
    (tmp_path / "modules.d" / module).mkdir(parents=True)
    assert dracut("depends; install") == [*depends.split(), "waits"]
