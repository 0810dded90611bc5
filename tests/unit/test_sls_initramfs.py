# SPDX-License-Identifier: GPL-2.0-or-later
"""ramboot.initramfs and ramboot.session through a real salt-call, there and back again.

dracut and lsinitrd are scripts of the test: an image is a tar file that they write and read.
"""

from __future__ import annotations

import io
import os
import pwd
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_sls import Minion  # noqa: E402

pytestmark = [
    pytest.mark.salt,
    pytest.mark.skipif(os.geteuid() != 0, reason="files become root's: run as root"),
]

UNDO = "ramboot.session.absent,ramboot.initramfs.absent,ramboot.swap.absent"
KERNELS = ("6.1.0", "6.12.0")

DRACUT = r"""#!/usr/bin/python3
import hashlib, io, sys, tarfile
from pathlib import Path
root, log = Path("@ROOT@"), Path("@LOG@")
assert sys.argv[1:3] == ["--force", "--kver"], sys.argv
kernel, target = sys.argv[3:]
log.open("a").write(f"dracut {kernel}\n")
module = root / "usr/lib/dracut/modules.d/50ramboot"
asked = (root / "etc/dracut.conf.d/50-ramboot.conf").exists()
if asked and not (module / "module-setup.sh").exists():
    sys.exit("Module 'ramboot' cannot be found.")
files = {"usr/lib/dracut/modules.txt": (b"base\n" + asked * b"ramboot\n", 0o644),
         f"usr/lib/modules/{kernel}/modules.dep": (b"", 0o644)}
if asked:
    ours = {}
    for line in (module / "manifest").read_text().splitlines():
        if line[0] != "#" and line.split()[3] != "-":
            _, mode, path, inside = line.split()
            source = module / path.partition("50ramboot/")[2]
            ours[inside[1:]] = (source.read_bytes(), int(mode, 8))
    ours["etc/ramboot/ramboot.conf"] = ((root / "etc/ramboot/ramboot.conf").read_bytes(), 0o644)
    stamp = "".join(f"{hashlib.sha256(v[0]).hexdigest()}  {k}\n" for k, v in ours.items())
    files |= ours | {"usr/lib/ramboot/stamp": (stamp.encode(), 0o644)}
with tarfile.open(target, "w") as image:
    for name, (content, mode) in files.items():
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), mode
        image.addfile(info, io.BytesIO(content))
"""

LSINITRD = r"""#!/usr/bin/python3
import fnmatch, sys, tarfile
if sys.argv[1] == "-f":
    with tarfile.open(sys.argv[3]) as image:
        if sys.argv[2] in image.getnames():
            sys.stdout.write(image.extractfile(sys.argv[2]).read().decode())
else:
    assert sys.argv[1] == "--unpack", sys.argv
    with tarfile.open(sys.argv[2]) as image:
        for item in image:
            if any(fnmatch.fnmatchcase(item.name, pattern) for pattern in sys.argv[3:]):
                image.extract(item)
"""


@pytest.fixture(scope="module")
def synced(tmp_path_factory):
    """Salt's cache after saltutil.sync_all; nothing in it knows where the minion's root is."""
    top = tmp_path_factory.mktemp("synced")
    Minion(top).call("saltutil.sync_all")
    return top / "salt"


@pytest.fixture
def minion(tmp_path, synced):
    minion = Minion(tmp_path)
    shutil.copytree(synced, tmp_path / "salt")
    minion.log = tmp_path / "dracut.log"
    for name, text in (("dracut", DRACUT), ("lsinitrd", LSINITRD)):
        path = minion.bin / name
        text = text.replace("@ROOT@", str(minion.root)).replace("@LOG@", str(minion.log))
        path.write_text(text)
        path.chmod(0o755)
    (minion.root / "var/lib").mkdir(parents=True, exist_ok=True)
    (minion.root / "usr/lib/dracut/modules.d/99base").mkdir(parents=True)
    for kernel in KERNELS:
        minion.write(f"usr/lib/modules/{kernel}/modules.dep", "")
        minion.write(f"boot/vmlinuz-{kernel}", "")
        image = minion.root / f"boot/initramfs-{kernel}.img"
        with tarfile.open(image, "w") as stock:
            for name in ("usr/lib/dracut/modules.txt", f"usr/lib/modules/{kernel}/modules.dep"):
                text = b"base\n" if name.endswith("txt") else b""
                info = tarfile.TarInfo(name)
                info.size = len(text)
                stock.addfile(info, io.BytesIO(text))
        image.chmod(0o600)
    return minion


def tree(minion):
    """Every path below the root with its content, mode and owner, but for /run: it is in RAM."""
    found = {}
    for path in sorted(minion.root.rglob("*")):
        if path.is_relative_to(minion.root / "run"):
            continue
        info = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(minion.root))] = (
            content,
            info.st_mode,
            info.st_uid,
            info.st_gid,
        )
    return found


def failed(states):
    return {key: value["comment"] for key, value in states.items() if value["result"] is False}


def changed(states):
    return sorted(key for key, value in states.items() if value["changes"])


def runs(minion):
    return minion.log.read_text().split("\n")[:-1] if minion.log.exists() else []


def test_apply_and_absent_and_the_tree_is_what_it_was(minion):
    before = tree(minion)

    planned = minion.apply("ramboot.initramfs,ramboot.session", "test=True")
    assert failed(planned) == {}
    assert tree(minion) == before, "test=True changes nothing"
    assert runs(minion) == []

    done = minion.apply("ramboot.initramfs,ramboot.session")
    assert failed(done) == {}
    assert changed(done) == changed(planned), "what was planned is what was done"
    files = [key for key in changed(done) if not key.endswith("-current")]
    for key in files:
        assert done[key]["changes"] == planned[key]["changes"]
    images = {str(minion.root / f"boot/initramfs-{kernel}.img") for kernel in KERNELS}
    assert set(done["ramboot-initramfs-current"]["changes"]) == images
    assert set(planned["ramboot-initramfs-current"]["changes"]) == images
    assert runs(minion) == ["dracut 6.1.0", "dracut 6.12.0"]
    assert minion.call("ramboot.verify")["faults"] == []
    assert {item["state"] for item in minion.call("ramboot.initramfs").values()} == {"current"}
    owner = pwd.getpwuid((minion.root / "usr/bin/ramboot").stat().st_uid).pw_name
    assert owner == "root"
    modes = {
        path: f"{(minion.root / path).stat().st_mode & 0o777:o}"
        for path in (
            "usr/bin/ramboot",
            "usr/libexec/ramboot-watch",
            "usr/lib/systemd/system/ramboot-watch.service",
            "usr/lib/systemd/system/multi-user.target.d/50-ramboot.conf",
        )
    }
    assert list(modes.values()) == ["755", "755", "644", "644"]

    applied = tree(minion)
    again = minion.apply("ramboot.initramfs,ramboot.session")
    assert (failed(again), changed(again)) == ({}, [])
    assert tree(minion) == applied
    assert len(runs(minion)) == 2

    planned = minion.apply(UNDO, "test=True")
    assert failed(planned) == {}
    assert tree(minion) == applied
    # the last one alone, and not those of others that come after it
    assert [key for key in changed(planned) if key.endswith("closed")] == [
        "ramboot-initramfs-record-closed"
    ]
    # a pillar that is not valid is no obstacle to going back
    gone = minion.apply(UNDO, pillar={"bad": 1})
    assert failed(gone) == {}
    assert changed(gone) == changed(planned), "what was planned is what was done"
    assert tree(minion) == before
    again = minion.apply("ramboot.session.absent,ramboot.initramfs.absent")
    assert (failed(again), changed(again)) == ({}, [])
    assert tree(minion) == before


def test_absent_on_a_machine_that_never_had_it(minion):
    before = tree(minion)
    done = minion.apply("ramboot.initramfs.absent")
    assert (failed(done), changed(done)) == ({}, [])
    assert tree(minion) == before
    assert runs(minion) == []


def test_a_changed_pillar_makes_every_image_stale_already_in_the_dry_run(minion):
    minion.apply("ramboot.initramfs")
    planned = minion.apply("ramboot.initramfs", "test=True", pillar={"boot": {"timeout_s": 7}})
    conf = str(minion.root / "etc/ramboot/ramboot.conf")
    assert changed(planned) == ["ramboot-initramfs-boot-conf", "ramboot-initramfs-current"]
    assert planned["ramboot-initramfs-current"]["changes"] == {
        str(minion.root / f"boot/initramfs-{kernel}.img"): {
            "old": f"stale: {conf} would be changed",
            "new": "current",
        }
        for kernel in KERNELS
    }
    done = minion.apply("ramboot.initramfs", pillar={"boot": {"timeout_s": 7}})
    assert changed(done) == changed(planned)
    assert len(runs(minion)) == 4


def test_a_failed_build_stops_red_and_the_next_run_repeats_it(minion):
    script = (minion.bin / "dracut").read_text()
    minion.script("dracut", "echo 'no space' >&2; exit 1")
    before = (minion.root / "boot/initramfs-6.1.0.img").read_bytes()
    done = minion.apply("ramboot.initramfs")
    image = minion.root / "boot/initramfs-6.1.0.img"
    assert failed(done) == {
        "ramboot-initramfs-current": "kernel 6.1.0: dracut failed: exit status 1: no space;"
        f" {image} is as it was; nothing was rebuilt before"
    }
    assert image.read_bytes() == before
    (minion.bin / "dracut").write_text(script)
    done = minion.apply("ramboot.initramfs")
    assert (failed(done), changed(done)) == ({}, ["ramboot-initramfs-current"])


def test_without_the_module_in_each_initramfs_there_are_no_menu_entries(minion):
    minion.script("dracut", "echo 'no space' >&2; exit 1")
    done = minion.apply("ramboot.grub", pillar={"grub": {"dom0_mem_scope": "all"}})
    assert {state for state in failed(done) if "grub" in state} == {
        "ramboot-grub-conf",
        "ramboot-grub-wrapper",
        "ramboot-grub-dom0-mem",
        "ramboot-grub-config",
    }
    assert not (minion.root / "etc/grub.d/21_ramboot").exists()


def test_without_room_in_boot_nothing_is_changed(minion):
    # a hole, larger than what is free
    os.truncate(minion.root / "boot/initramfs-6.1.0.img", 1 << 43)
    done = minion.apply("ramboot", pillar={"swap": "off", "qubes": {"aliases": "always"}})
    assert "\nkernel 6.1.0: " in failed(done)["ramboot-initramfs-room"]
    assert changed(done) == []
    assert not (minion.root / "etc/ramboot").exists()


@pytest.mark.parametrize("test", ["test=True", "test=False"])
def test_without_room_for_what_the_pillar_makes_stale_nothing_is_changed(minion, test):
    assert failed(minion.apply("ramboot.initramfs")) == {}
    os.truncate(minion.root / "boot/initramfs-6.1.0.img", 1 << 43)
    pillar = {"boot": {"timeout_s": 7}, "qubes": {"aliases": "always"}}
    done = minion.apply("ramboot", test, pillar=pillar)
    assert "\nkernel 6.1.0: " in failed(done)["ramboot-initramfs-room"]
    assert changed(done) == []


@pytest.mark.parametrize("sls", ["ramboot.absent", "ramboot.initramfs.absent"])
@pytest.mark.parametrize("test", ["test=True", "test=False"])
def test_without_room_for_the_undo_nothing_is_changed(minion, sls, test):
    assert failed(minion.apply("ramboot.initramfs,ramboot.session")) == {}
    # newer packages: the images have to be built
    minion.write("usr/lib/sysimage/rpm/rpmdb.sqlite", "newer")
    module = minion.formula / "_modules/ramboot_initramfs.py"
    spare = "SPARE_BYTES = 16 << 20"
    assert spare in module.read_text()
    module.write_text(module.read_text().replace(spare, "SPARE_BYTES = 1 << 43"))
    minion.call("saltutil.sync_modules")
    before = tree(minion)
    done = minion.apply(sls, test)
    assert "\nkernel 6.1.0: " in failed(done)["ramboot-initramfs-undo-room"]
    assert changed(done) == []
    assert tree(minion) == before


@pytest.mark.parametrize("cut", ["files", "one image"])
def test_absent_after_a_half_done_apply(minion, cut):
    before = tree(minion)
    script = (minion.bin / "dracut").read_text()
    kernel = "6.1.0" if cut == "files" else "6.12.0"
    text = script.replace("kernel, target =", "import os\nkernel, target =").replace(
        'log.open("a")', f'kernel == "{kernel}" and sys.exit("cut")\nlog.open("a")'
    )
    (minion.bin / "dracut").write_text(text)
    assert list(failed(minion.apply("ramboot.initramfs"))) == ["ramboot-initramfs-current"]
    done = minion.apply("ramboot.initramfs.absent")
    assert failed(done) == {}
    assert tree(minion) == before


def test_the_module_stays_while_the_users_configuration_asks_for_it(minion):
    minion.apply("ramboot.initramfs")
    conf = minion.root / "etc/dracut.conf.d/50-ramboot.conf"
    conf.write_text(conf.read_text() + "# mine\n")
    done = minion.apply("ramboot.initramfs.absent")
    assert "ramboot-initramfs-module-not-asked-for" in failed(done)
    assert conf.read_text().endswith("# mine\n")
    assert (minion.root / "usr/lib/dracut/modules.d/50ramboot/module-setup.sh").exists()
    conf.unlink()
    assert failed(minion.apply("ramboot.initramfs.absent")) == {}
    assert not (minion.root / "usr/lib/dracut/modules.d/50ramboot").exists()


def test_a_file_of_an_earlier_version_goes(minion):
    minion.apply("ramboot.initramfs")
    old = str(minion.root / "usr/lib/dracut/modules.d/50ramboot/ramboot-old.sh")
    minion.call("ramboot_record.keep", old)
    minion.write("usr/lib/dracut/modules.d/50ramboot/ramboot-old.sh", "old\n")
    minion.call("ramboot_record.seal", old)
    done = minion.apply("ramboot.initramfs")
    assert changed(done) == ["ramboot-initramfs-module-outdated-1"]
    assert not Path(old).exists()
