# SPDX-License-Identifier: GPL-2.0-or-later
"""The RPM, built: it brings the formula as it is here, and does not go while ramboot is applied."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conftest import REPO

PLACE = "srv/formulas/base/ramboot-formula"
SHIPPED = ("ramboot", "_modules", "_states", "pillar.example", "FORMULA")


def run(*command: str | Path, **options) -> str:
    return subprocess.run(
        [str(word) for word in command],
        check=True,
        stdout=subprocess.PIPE,
        timeout=300,
        **options,
    ).stdout.decode()


def files(below: Path, base: Path) -> Iterator[tuple[str, bytes]]:
    for path in [below, *below.rglob("*")]:
        if path.is_file() and "__pycache__" not in path.parts:
            yield str(path.relative_to(base)), path.read_bytes()


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The RPM of a copy of this tree, for rpmbuild leaves things there."""
    top = tmp_path_factory.mktemp("package")
    tree = shutil.copytree(REPO, top / "tree", ignore=shutil.ignore_patterns(".*", "__pycache__"))
    # without .git
    defines = (f"_topdir {top}/build", f"_rpmdir {top}", "commit_time 1700000000")
    where = [word for define in defines for word in ("--define", define)]
    run(
        "rpmbuild", "-bb", "--build-in-place", "--quiet", *where, "packaging/ramboot.spec", cwd=tree
    )
    return next(top.glob("noarch/ramboot-formula-*.noarch.rpm"))


def test_it_brings_the_formula_byte_for_byte(package, tmp_path) -> None:
    with (tmp_path / "cpio").open("wb") as archive:
        subprocess.run(["rpm2cpio", package], stdout=archive, check=True)
    with (tmp_path / "cpio").open("rb") as archive:
        run("cpio", "-id", "--quiet", stdin=archive, cwd=tmp_path)
    expected = {path: data for name in SHIPPED for path, data in files(REPO / name, REPO)}
    assert dict(files(tmp_path / PLACE, tmp_path / PLACE)) == expected
    roots = yaml.safe_load((tmp_path / "etc/salt/minion.d/formula-ramboot.conf").read_text())
    assert roots == {"file_roots": {"base": [f"/{PLACE}"]}}


def test_its_version_is_the_formulas(package) -> None:
    formula = yaml.safe_load((REPO / "FORMULA").read_text())
    version = run("rpm", "-qp", "--qf", "%{VERSION}", package)
    assert version == str(formula["version"])


RELEASE = ("rpmspec", "--query", "--queryformat", "%{RELEASE}", "packaging/ramboot.spec")
GIT = ("git", "-c", "user.name=a", "-c", "user.email=b")


@pytest.fixture
def clone(tmp_path) -> Path:
    tree = shutil.copytree(REPO / "packaging", tmp_path / "clone" / "packaging").parent
    run(*GIT, "init", "--quiet", tree)
    run(*GIT, "-C", tree, "add", ".")
    return tree


def commit(tree: Path, seconds: int) -> None:
    when = {**os.environ, "GIT_COMMITTER_DATE": f"{seconds} +0000"}
    run(*GIT, "-C", tree, "commit", "--quiet", "--allow-empty", "--message", "x", env=when)


def test_a_later_commit_is_a_newer_package_from_a_shallow_clone_too(clone, tmp_path) -> None:
    released = []
    # the next digit
    for seconds in (999999999, 1000000000, 1700000000):
        commit(clone, seconds)
        released.append(run(*RELEASE, cwd=clone))
    shallow = tmp_path / "shallow"
    run(*GIT, "clone", "--quiet", "--depth", "1", f"file://{clone}", shallow)
    assert run(*RELEASE, cwd=shallow) == released[-1]
    # the numbers of releases before
    for older, newer in itertools.pairwise(["1", "800", *released]):
        compared = f'%{{lua: print(rpm.vercmp("{older}", "{newer}"))}}'
        assert run("rpm", "--eval", compared).strip() == "-1", (older, newer)


@pytest.mark.parametrize("within", [False, True], ids=["alone", "within another clone"])
def test_without_the_time_of_its_commit_it_is_not_built(clone, within) -> None:
    tree = shutil.copytree(clone / "packaging", clone / "tree" / "packaging").parent
    commit(clone, 1700000000)
    if not within:
        shutil.rmtree(clone / ".git")
    where = ("--define", f"_topdir {clone}/build")
    build = ("rpmbuild", "-bb", "--build-in-place", *where, "packaging/ramboot.spec")
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "error: git tells no time of the commit" in done.stderr
    assert not list(clone.rglob("*.rpm"))
    assert run(*RELEASE, "--define", "commit_time 77", cwd=tree).startswith("77")


def test_it_brings_what_the_image_is_built_with(package) -> None:
    needed = {line.split()[0] for line in run("rpm", "-qpR", package).splitlines()}
    assert {"squashfs-tools", "qubes-mgmt-salt", "qubes-mgmt-salt-dom0"} <= needed


@pytest.mark.parametrize(
    "applied",
    [
        "usr/lib/dracut/modules.d/50ramboot",
        "var/lib/ramboot/image",
        # menu entries, swap or the command alone
        "var/lib/ramboot/record.json",
        "var/lib/ramboot/swap.json",
        None,
    ],
)
@pytest.mark.parametrize("left", [0, 1])
def test_it_does_not_go_while_ramboot_is_applied(package, tmp_path, applied, left) -> None:
    """`left`: how many versions of the package stay; an update is no removal."""
    # what absent leaves of a file that the user changed
    (tmp_path / "var/lib/ramboot/left").mkdir(parents=True)
    if applied:
        (tmp_path / applied).mkdir(parents=True)
    script = run("rpm", "-qp", "--qf", "%{PREUN}", package)
    for path in ("/usr/lib/dracut", "/var/lib/ramboot"):
        assert path in script
        script = script.replace(path, f"{tmp_path}{path}")
    done = subprocess.run(["sh", "-c", script, "preun", str(left)], capture_output=True, text=True)
    refused = bool(applied) and left == 0
    assert done.returncode == int(refused)
    assert ("state.apply ramboot.absent" in done.stderr) == refused


@pytest.mark.parametrize("left", [0, 1])
def test_without_it_the_modules_of_other_formulas_are_there(package, tmp_path, left) -> None:
    """Cleared is what is synced of all of them."""
    program = tmp_path / "qubesctl"
    program.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/log\nexit 1\n')
    program.chmod(0o755)
    script = run("rpm", "-qp", "--qf", "%{POSTUN}", package)
    path = f"{tmp_path}:{os.environ['PATH']}"
    run("sh", "-c", script, "postun", str(left), env={**os.environ, "PATH": path})
    log = tmp_path / "log"
    calls = [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []
    assert calls == (["saltutil.clear_cache", "saltutil.sync_all"] if left == 0 else [])
