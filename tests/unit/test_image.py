# SPDX-License-Identifier: GPL-2.0-or-later
"""The prebuilt image, built with the real mksquashfs from a directory in the snapshot's place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from salt.exceptions import CommandExecutionError

MIB = 1 << 20
TOOL = (
    "the backend image needs mksquashfs, which is not installed; in dom0:"
    " sudo qubes-dom0-update squashfs-tools"
)


class Lvm:
    """cmd.run_all: LVM and mount are imitated, everything else runs."""

    def __init__(self, world, top: Path):
        self.world, self.top = world, top
        self.calls: list[list[str]] = []
        self.snapshots: list[str] = []
        self.pool = (str(40 << 30), "25.00")
        self.fails: str | None = None
        self.source: str | None = None
        self.rules = ""

    def run_all(self, command, python_shell=None, env=None):
        assert python_shell is False
        self.calls.append(command)
        name = next(word for word in ("mksquashfs", command[0]) if word in command)
        if name == self.fails:
            return {"retcode": 1, "stdout": "", "stderr": f"{name}: no space left"}
        fake = getattr(self, name, None)
        if fake:
            return {"retcode": 0, "stdout": fake(*command[1:]) or "", "stderr": ""}
        done = subprocess.run(
            command, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
        )
        return {"retcode": done.returncode, "stdout": done.stdout, "stderr": done.stderr}

    def lvs(self, *arguments):
        if arguments[-1].startswith("@"):
            return "\n".join(f"  qubes_dom0 {name}" for name in self.snapshots)
        if "json" in arguments:
            volume = {"vg_name": "qubes_dom0", "lv_name": "root", "pool_lv": "root-pool"}
            return json.dumps({"report": [{"lv": [volume]}]})
        return f"  {self.pool[0]} {self.pool[1]}\n"

    def udevadm(self, *arguments):
        assert arguments == ("control", "--reload")
        self.rules = Path(self.world.paths["image_rules"]).read_text()

    def lvcreate(self, *arguments):
        assert arguments[-1] == "qubes_dom0/root"
        # now, and at no boot after a power cut
        skip = arguments.index("--setactivationskip")
        assert arguments[skip + 1 : skip + 5] == ("y", "--ignoreactivationskip", "--activate", "y")
        self.snapshots.append(arguments[arguments.index("--name") + 1])

    def lvremove(self, *arguments):
        self.snapshots.remove(arguments[-1].split("/")[1])

    def mount(self, *arguments):
        device, target = arguments[-2:]
        if device.startswith("/dev/"):
            # a copy would have other times
            os.rmdir(target)
            os.rename(self.top, target)
            self.source = target
        else:
            os.rmdir(target)
            subprocess.run(["unsquashfs", "-q", "-n", "-d", target, device], check=True)

    def umount(self, *arguments):
        # what is mounted below it goes too
        assert arguments[:-1] == ("--recursive",)
        target = arguments[-1]
        if target == self.source:
            os.rename(target, self.top)
            self.source = None
        else:
            shutil.rmtree(target)
        os.mkdir(target)


@pytest.fixture
def lvm(world, tmp_path, monkeypatch):
    top = tmp_path / "top"
    for path, text in {
        "usr/lib/modules/6.12.0/modules.dep": "",
        "usr/bin/tool": "tool" * 5000,
        "usr/local/bin/mine": "mine",
        "etc/fstab": "fstab",
        "etc/shadow": "secret",
        "var/lib/rpm/rpmdb.sqlite": "packages",
        "var/log/messages": "log",
        "tmp/left behind": "x",
        "tmp/plain": "x",
        "tmp/.hidden": "x",
    }.items():
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_text(text)
    (top / "etc/shadow").chmod(0o600)
    (top / "etc/link").symlink_to("/nowhere")
    os.mkfifo(top / "var/fifo")
    os.utime(top / "etc/fstab", ns=(1_000_000_001, 1_500_000_000_123_456_789))
    lvm = Lvm(world, top)
    world.salt["cmd.run_all"] = lvm.run_all
    world.salt["ramboot_preflight.session_fault"] = lambda: None
    world.salt["ramboot_preflight.root_layout"] = lambda: {
        "source": "/dev/mapper/qubes_dom0-root",
        "fstype": "ext4",
        "kind": "lvm-thin",
    }
    world.write("/usr/bin/mksquashfs", mode=0o755)
    world.pillar["ramboot"] = {"image": {"level": 1, "block_kib": 64}}
    world.module("ramboot_config")
    world.module("ramboot_record")
    module = world.module("ramboot_image")
    monkeypatch.setattr(module, "ROOT", str(top))
    monkeypatch.setattr(module.os.path, "ismount", lambda _path: False)
    usage = SimpleNamespace(f_blocks=20 << 18, f_bfree=15 << 18, f_bavail=15 << 18, f_frsize=4096)
    monkeypatch.setattr(module.os, "statvfs", lambda _path: usage)
    lvm.module, lvm.usage = module, usage
    return lvm


@pytest.fixture
def image(lvm):
    return lvm.module


def contents(directory):
    return sorted(path.name for path in Path(directory).iterdir())


def unpacked(world, tmp_path):
    directory = Path(world.paths["image_directory"])
    (file,) = directory.glob("root-*.squashfs")
    subprocess.run(["unsquashfs", "-q", "-n", "-d", tmp_path / "out", file], check=True)
    return tmp_path / "out"


# Building


def test_an_image_holds_the_root_without_what_is_left_behind(world, lvm, image, tmp_path):
    built = image.build()
    out = unpacked(world, tmp_path)
    assert contents(out / "tmp") == [".hidden"]
    assert (out / "etc/shadow").stat().st_mode & 0o7777 == 0o600
    assert os.readlink(out / "etc/link") == "/nowhere"
    assert built["without_acl"] == []
    # nothing is left of the snapshot, and nobody else can read the image
    assert lvm.snapshots == []
    directory = Path(world.paths["image_directory"])
    assert contents(directory) == sorted(["lock", "manifest", built["file"]])
    assert (directory / built["file"]).stat().st_mode & 0o7777 == 0o600
    for place in (directory, directory.parent):
        assert place.stat().st_mode & 0o7777 == 0o700
    assert image.verify()[str(directory / built["file"])]["verdict"] == "good"


def test_an_image_is_not_in_the_next_one(world, image, tmp_path, monkeypatch):
    monkeypatch.setattr(image, "ROOT", str(world.root))
    inside = tmp_path / "snapshot/var/lib/ramboot/image"
    inside.mkdir(parents=True)
    for name in ("root-0123.squashfs", "manifest", ".x"):
        (inside / name).touch()
    assert image._excluded(str(tmp_path / "snapshot"), []) == sorted(map(str, inside.iterdir()))


ODD = (
    "[ab]",
    "a*",
    "?",
    "back\\slash",
    " space ",
    "#",
    "\nline",
    "é",
    "!(x)",
    "-e",
    "...",
    "x\udcff",
)


@pytest.mark.parametrize("name", ["plain", *ODD])
def test_what_is_excluded_takes_no_hard_link_elsewhere_and_nothing_alike_with_it(
    world, lvm, image, name, tmp_path
):
    """As qubes that run hold their template's root.img (core-admin, qubes/storage/reflink.py)."""
    world.pillar["ramboot"]["copy"] = {"exclude": ["/var/out/*"]}
    for folder in ("var/out", "var/in"):
        (lvm.top / folder).mkdir()
    out = lvm.top / "var/out" / name
    out.write_text("x")
    for inside in ("a", "ab", "x", "y"):
        (lvm.top / "var/in" / inside).hardlink_to(out)
    image.build()
    built = unpacked(world, tmp_path)
    assert contents(built / "var/in") == ["a", "ab", "x", "y"]
    # as the shell's, the star matches no dot at the beginning
    assert contents(built / "var/out") == ([name] if name.startswith(".") else [])


def test_the_snapshot_is_offered_to_no_qube_and_gets_no_link(world, lvm, image):
    image.build()
    assert lvm.rules == (
        'ENV{DM_NAME}=="qubes_dom0-ramboot--image", ENV{DM_UDEV_DISABLE_DISK_RULES_FLAG}="1"\n'
    )
    names = [call[0] for call in lvm.calls]
    assert names.index("udevadm") < names.index("lvcreate")
    assert not Path(world.paths["image_rules"]).exists()


def test_mksquashfs_runs_at_idle_priority_and_can_write_no_more_than_there_is_room(lvm, image):
    image.build()
    (command,) = (call for call in lvm.calls if "mksquashfs" in call)
    assert command[:7] == [
        "prlimit", f"--fsize={15 * 1024 * MIB - 512 * MIB}", "nice", "-n", "19", "ionice", "-c",
    ]  # fmt: skip
    assert command[command.index("-Xcompression-level") + 1] == "1"
    assert command[command.index("-b") + 1] == "64K"


def test_the_manifest_has_a_hash_of_every_chunk(world, lvm, image):
    (lvm.top / "usr/bin/random").write_bytes(os.urandom(20 * MIB))
    built = image.build()
    found = image.manifest()
    assert len(found["chunks"]) == 2
    assert found["sha256"] == built["sha256"]
    assert (found["kernels"], found["chunk_mib"], found["version"]) == (["6.12.0"], 16, 1)
    assert image._hashes(str(Path(world.paths["image_directory"]) / found["file"]), 16 * MIB) == (
        found["sha256"],
        found["chunks"],
    )


def test_access_control_lists_that_squashfs_drops_are_named(lvm, image):
    subprocess.run(["setfacl", "-m", "u:7:r", lvm.top / "var/log/messages"], check=True)
    os.setxattr(lvm.top / "usr/bin/tool", "user.colour", b"blue")
    assert image.build()["without_acl"] == ["/var/log/messages"]


def test_a_new_image_takes_the_old_ones_place(world, lvm, image):
    old = image.build()
    (lvm.top / "etc/new").write_text("new")
    new = image.build()
    assert old["file"] != new["file"]
    directory = Path(world.paths["image_directory"])
    assert contents(directory) == sorted(["lock", "manifest", new["file"]])


# Each leaves the old image and nothing else.
def _flipped(path):
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)


def _too_full(lvm):
    lvm.pool = (str(40 << 30), "99.00")


def _too_little(lvm):
    lvm.usage.f_bavail = 0


def _not_whole(lvm):
    real = lvm.mount

    def mount(*arguments):
        real(*arguments)
        if not arguments[-2].startswith("/dev/"):
            (Path(arguments[-1]) / "etc/shadow").chmod(0o644)

    lvm.mount = mount


def _too_much(lvm):
    real = lvm.mount

    def mount(*arguments):
        real(*arguments)
        if not arguments[-2].startswith("/dev/"):
            times = os.stat(arguments[-1])
            (Path(arguments[-1]) / "zzz").touch()
            os.utime(arguments[-1], ns=(times.st_atime_ns, times.st_mtime_ns))

    lvm.mount = mount


def _other_bytes(lvm):
    real = lvm.module._hashes

    def hashes(path, chunk):
        found = real(path, chunk)
        _flipped(Path(path))
        return found

    lvm.module._hashes = hashes


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda lvm: setattr(lvm, "fails", "lvcreate"), "lvcreate failed (1): lvcreate: no space"),
        (lambda lvm: setattr(lvm, "fails", "mount"), "mount failed (1)"),
        (lambda lvm: setattr(lvm, "fails", "mksquashfs"), "mksquashfs failed (1)"),
        (_too_full, "no image was built: about"),
        (_too_little, "no image was built: about"),
        (_not_whole, "it differs from the root at '/etc/shadow'"),
        (_too_much, "'/zzz' is too much"),
        (_other_bytes, "the disk gives other bytes back"),
    ],
    ids=["snapshot", "mount", "mksquashfs", "pool", "room", "differs", "more", "disk"],
)  # fmt: skip
def test_a_build_that_fails_leaves_the_old_image(world, lvm, image, fault, told):
    old = image.build()
    (lvm.top / "etc/new").write_text("new")
    before = (Path(world.paths["image_directory"]) / "manifest").read_bytes()
    lvm.usage.f_blocks = 100 << 18
    fault(lvm)
    with pytest.raises(CommandExecutionError) as failed:
        image.build()
    assert told in str(failed.value)
    directory = Path(world.paths["image_directory"])
    assert (directory / "manifest").read_bytes() == before
    assert contents(directory) == sorted(["lock", "manifest", old["file"]])
    assert lvm.snapshots == []


@pytest.fixture
def dnf(world):
    """Start what holds rpm's lock, as a transaction does; it ends with the test."""
    running = []
    program = (
        "import fcntl, sys; lock = open(sys.argv[1], 'r+'); fcntl.lockf(lock, fcntl.LOCK_EX);"
        " print(flush=True); sys.stdin.read()"
    )

    def start(path):
        command = [sys.executable, "-c", program, path]
        running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        running[-1].stdout.readline()

    yield start
    for process in running:
        process.communicate()


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("begun", ["before", "during"])
def test_no_image_is_built_in_the_middle_of_a_transaction(world, lvm, image, dnf, place, begun):
    path = world.paths["package_locks"][place]
    # what nobody holds stands in nobody's way
    world.write(path.removeprefix(str(world.root)))
    old = image.build()
    (lvm.top / "etc/new").write_text("new")
    if begun == "before":
        dnf(path)
    else:
        make = lvm.lvcreate
        lvm.lvcreate = lambda *arguments: (make(*arguments), dnf(path))[2:]
    with pytest.raises(CommandExecutionError) as failed:
        image.build()
    assert str(failed.value) == (
        f"no image was built: packages are being changed; {path} is locked until that has ended"
    )
    assert image.manifest()["sha256"] == old["sha256"]
    assert contents(world.paths["image_directory"]) == sorted(["lock", "manifest", old["file"]])
    assert lvm.snapshots == []


def test_a_file_that_would_grow_too_large_is_stopped(world, lvm, image):
    (lvm.top / "usr/bin/random").write_bytes(os.urandom(8 * MIB))
    lvm.usage.f_bavail = (512 << 8) + (4 << 8)
    image.room = lambda: {"expected_bytes": 1, "limit_bytes": 4 * MIB, "source_bytes": 1}
    with pytest.raises(CommandExecutionError) as failed:
        image.build()
    assert "mksquashfs failed" in str(failed.value)
    assert contents(world.paths["image_directory"]) == ["lock"]


def test_what_a_build_that_was_cut_off_left_is_cleared(world, lvm, image):
    lvm.snapshots.append("ramboot-image")
    directory = Path(world.paths["image_directory"])
    directory.mkdir(parents=True)
    for name in ("building.squashfs", "root-0123.squashfs", "manifest.new"):
        (directory / name).touch()
    built = image.build()
    assert lvm.snapshots == []
    assert contents(directory) == sorted(["lock", "manifest", built["file"]])


def test_two_builds_at_once_are_refused(world, image):
    Path(world.paths["image_directory"]).mkdir(parents=True)
    with (
        image._locked(world.paths["image_directory"]),
        pytest.raises(CommandExecutionError) as refused,
    ):
        image.build()
    assert str(refused.value) == "an image is being built by another process"


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ({"fstype": "ext4", "kind": "partition"}, "/ is ext4 on partition"),
        ({"fstype": "xfs", "kind": "lvm"}, "/ is xfs on lvm"),
    ],
)
def test_a_root_that_has_no_snapshots_is_refused(world, image, layout, told):
    world.salt["ramboot_preflight.root_layout"] = lambda: layout
    with pytest.raises(CommandExecutionError) as refused:
        image.build()
    assert str(refused.value) == (
        "no image was built: the backend image needs a root on LVM thin or btrfs, to build from a"
        f" snapshot of it; {told}"
    )


def test_no_image_is_built_in_a_ram_session(world, lvm, image):
    world.salt["ramboot_preflight.session_fault"] = lambda: "this is a RAM session (zram)"
    with pytest.raises(CommandExecutionError):
        image.build()
    assert image.refresh() == {"action": "nothing", "reason": "this is a RAM session (zram)"}
    assert lvm.calls == []


def test_room_is_what_is_free_for_what_the_root_uses_without_images(world, lvm, image):
    file = world.write("/var/lib/ramboot/image/root-0.squashfs", os.urandom(MIB))
    assert image.room()["source_bytes"] == 5 * 1024 * MIB - file.stat().st_blocks * 512


# On btrfs


class Btrfs(Lvm):
    """The root in a subvolume. A snapshot has empty directories where other subvolumes lie, until
    something is mounted there.
    """

    # The first is mounted by fstab; of the last three there is nothing to keep, of the very last
    # for it was lost in a snapshot of the user's.
    PLACES = ("/home", "/srv/nested", "/srv/nested/deep", "/srv/excluded", "/srv/swap", "/srv/lost")

    def __init__(self, world, top: Path, mounts: str):
        super().__init__(world, top)
        self.mounts = mounts
        self.within = {place: top.parent / place.strip("/").replace("/", "-")
                       for place in self.PLACES[:-3]}  # fmt: skip
        self.mounted: list[str] = []
        # snapshots are the last two words of their lines, which others are not
        self.snapshots = []
        self.others = [
            "ID 300 gen 9 cgen 9 top level 256 otime 2026-11-25 15:17:19 path ramboot-image-1",
            "ID 301 gen 9 cgen 9 top level 5 otime 2026-11-25 15:17:19 path mine/ramboot-image-1",
            "ID 302 gen 9 cgen 9 top level 5 otime 2026-11-25 15:17:19 path ramboot-image-1.mine",
        ]
        self.real_lstat = os.lstat

    def lstat(self, path, **how):
        kind, _, place = str(path).removeprefix(f"{self.mounts}/").partition("/")
        place = f"/{place}"
        info = self.real_lstat(path, **how)
        # but for what lies elsewhere and is mounted on a directory of the root
        if kind == "source" and place in self.PLACES[1:] and place not in self.mounted:
            return SimpleNamespace(st_ino=2, st_mode=info.st_mode)
        return info

    def btrfs(self, *arguments):
        root = str(self.top)
        if arguments[:2] == ("subvolume", "snapshot"):
            name = Path(arguments[-1])
            assert (arguments[2], str(name.parent)) == ("-r", f"{self.mounts}/top")
            self.snapshots.append(name.name)
            return ""
        if arguments[:2] == ("subvolume", "list"):
            assert arguments[2:] == ("-r", "-s", root)
            line = "ID {} gen 8 cgen 8 top level 5 otime 2026-11-25 15:17:19 path {}"
            ours = [line.format(name[-1], name) for name in self.snapshots]
            return "\n".join([*self.others, *ours])
        delete = ("subvolume", "delete", "--commit-after", "--subvolid")
        assert (arguments[:-2], arguments[-1]) == (delete, root)
        self.snapshots.remove(f"ramboot-image-{arguments[-2]}")
        return ""

    def mount(self, *arguments):
        *_, options, device, target = arguments
        kind, _, place = target.removeprefix(f"{self.mounts}/").partition("/")
        if kind == "proof":
            super().mount(*arguments)
        elif kind == "live":
            assert options.startswith("ro,nodev,nosuid,noexec,subvol=")
            if not place:
                (Path(target) / "etc").mkdir()
                shutil.copy(self.top / "etc/fstab", Path(target) / "etc")
                for place in self.PLACES:
                    (Path(target) / place[1:]).mkdir(parents=True)
                    if place != "/srv/lost":
                        (Path(target) / place[1:] / "note").touch()
                (Path(target) / "srv/swap").chmod(0o700)
        elif kind == "top":
            assert options == "rw,nodev,nosuid,noexec,subvolid=5"
        elif device == "tmpfs":
            self.mounted.append(f"/{place}")
            mode = "700" if place == "srv/swap" else "755"
            assert options == f"ro,nodev,nosuid,noexec,mode={mode},uid=0,gid=0"
        else:
            assert options.endswith(f",subvol=/{self.snapshots[-1]}")
            os.rmdir(target)
            os.rename(self.within[f"/{place}"] if place else self.top, target)
            if place:
                self.mounted.append(f"/{place}")
            else:
                self.source = target

    def umount(self, *arguments):
        target = arguments[-1]
        if target == self.source:
            while self.mounted:
                place = self.mounted.pop()
                if place in self.within:
                    os.rename(target + place, self.within[place])
                    os.mkdir(target + place)
        super().umount(*arguments)


@pytest.fixture
def btrfs(world, lvm, image, monkeypatch):
    btrfs = Btrfs(world, lvm.top, world.paths["image_mounts"])
    for place in btrfs.PLACES:
        (lvm.top / place[1:]).mkdir(parents=True, exist_ok=True)
        if place in btrfs.within:
            btrfs.within[place].mkdir()
            (btrfs.within[place] / "note").write_text(place)
    # in what is mounted, as a snapshot of it has it
    os.rmdir(lvm.top / "srv/nested/deep")
    (btrfs.within["/srv/nested"] / "deep").mkdir()
    (lvm.top / "etc/fstab").write_text(
        "UUID=root / btrfs subvol=root 0 0\nUUID=root /home btrfs subvol=home 0 0\n"
    )
    blkid = world.write("bin/blkid", '#!/bin/sh\n[ "$6" = /dev/dm-0 ] && echo root\n', mode=0o755)
    monkeypatch.setenv("PATH", f"{blkid.parent}:{os.environ['PATH']}")
    world.write("/usr/bin/btrfs", mode=0o755)
    world.salt["cmd.run_all"] = btrfs.run_all
    world.salt["ramboot_preflight.root_layout"] = lambda: {
        "source": "/dev/dm-0",
        "fstype": "btrfs",
        "fsroot": "/root",
        "kind": "partition",
    }
    world.salt["ramboot.source_bytes"] = lambda _exclude: (2048 * MIB, 0)
    world.pillar["ramboot"]["copy"] = {"exclude": ["/srv/excluded", "/srv/swap/*", "/tmp/*"]}
    monkeypatch.setattr(os, "lstat", btrfs.lstat)
    btrfs.module, btrfs.usage = image, lvm.usage
    return btrfs


def test_an_image_of_btrfs_holds_each_subvolume_that_a_copy_would(world, btrfs, image, tmp_path):
    assert image.build()["source_bytes"] == 2048 * MIB
    out = unpacked(world, tmp_path)
    for place in ("home", "srv/nested", "srv/nested/deep"):
        assert (out / place / "note").read_text() == f"/{place}"
    assert contents(out / "srv") == ["lost", "nested", "swap"]
    assert contents(out / "srv/lost") == contents(out / "srv/swap") == []
    live, top = f"{btrfs.mounts}/live", f"{btrfs.mounts}/top"
    # of the disk's subvolumes, as the boot mounts them; not of what is mounted now
    mounts = [call[-3:] for call in btrfs.calls if call[0] == "mount"]
    options = "ro,nodev,nosuid,noexec,subvol"
    assert mounts[1:3] == [
        [f"{options}=/root", "/dev/dm-0", live],
        [f"{options}=home", "/dev/dm-0", f"{live}/home"],
    ]
    taken = [call[-2:] for call in btrfs.calls if call[:3] == ["btrfs", "subvolume", "snapshot"]]
    places = ("", "/home", "/srv/nested", "/srv/nested/deep")
    assert taken == [
        [live + place, f"{top}/ramboot-image-{number}"] for number, place in enumerate(places, 1)
    ]
    assert btrfs.snapshots == []
    assert image.stale() is None
    assert not {call[0] for call in btrfs.calls} & {"lvs", "lvcreate", "lvremove"}


@pytest.mark.parametrize("name", ["btrfs", "mount", "mksquashfs"])
def test_a_build_from_btrfs_that_fails_leaves_the_old_image(world, btrfs, image, name):
    old = image.build()
    real = btrfs.run_all

    def fails(command, **how):
        """The second of several, for the first to be removed."""
        second = name == "mksquashfs" or any("ramboot-image-2" in word for word in command)
        btrfs.fails = name if second else None
        return real(command, **how)

    world.salt["cmd.run_all"] = fails
    with pytest.raises(CommandExecutionError, match=f"^{name} failed \\(1\\)"):
        image.build()
    assert image.manifest()["sha256"] == old["sha256"]
    assert btrfs.snapshots == []
    assert contents(world.paths["image_directory"]) == sorted(["lock", "manifest", old["file"]])


def test_a_btrfs_whose_subvolumes_cant_be_told_is_not_built_from(world, btrfs, image):
    world.write("bin/blkid", "#!/bin/sh\nexit 2\n", mode=0o755)
    with pytest.raises(CommandExecutionError, match="the UUID of .* can't be read"):
        image.build()
    assert btrfs.snapshots == []


def test_what_a_killed_build_left_mounted_goes_first(world, btrfs, image, monkeypatch):
    world.salt["cmd.run_all"] = lambda command, **_how: (
        btrfs.calls.append(command) or {"retcode": 0, "stdout": "", "stderr": ""}
    )
    directory = Path(world.paths["image_directory"])
    directory.mkdir(parents=True)
    monkeypatch.setattr(image.os.path, "ismount", lambda _path: True)
    image._clear(str(directory))
    left = [f"{btrfs.mounts}/{name}" for name in ("proof", "source", "live", "top")]
    assert btrfs.calls[:4] == [["umount", "--recursive", path] for path in left]
    assert btrfs.calls[4][:3] == ["btrfs", "subvolume", "list"]


def test_what_a_cut_off_build_left_on_btrfs_is_told_and_removed(world, btrfs, image, state):
    btrfs.snapshots += ["ramboot-image-1", "ramboot-image-2"]
    assert image.remains() == ["subvolume ramboot-image-1", "subvolume ramboot-image-2"]
    image.build()
    assert btrfs.snapshots == []
    btrfs.snapshots.append("ramboot-image-3")
    ret = state.absent("image")
    assert ret["comment"] == (
        f"deleted: {world.paths['image_directory']}, subvolume ramboot-image-3"
    )
    assert ret["result"] is True
    assert btrfs.snapshots == []


def test_btrfs_without_its_program_has_no_snapshots_and_is_not_built_from(world, btrfs, image):
    (world.root / "usr/bin/btrfs").unlink()
    assert image.remains() == []
    with pytest.raises(CommandExecutionError) as refused:
        image.build()
    assert str(refused.value) == (
        "no image was built: the backend image needs btrfs, which is not installed; in dom0:"
        " sudo qubes-dom0-update btrfs-progs"
    )
    assert btrfs.calls == []


def test_room_on_btrfs_is_what_is_free_there_for_what_a_copy_would_hold(btrfs, image):
    assert image.room() == {
        "limit_bytes": 15 * 1024 * MIB - 512 * MIB,
        "expected_bytes": 1024 * MIB,
        "source_bytes": 2048 * MIB,
    }
    btrfs.usage.f_bavail = 1024 << 8
    with pytest.raises(CommandExecutionError) as refused:
        image.build()
    assert str(refused.value) == (
        "no image was built: about 1024 MiB are needed, 512 MiB may be used on /"
    )


# Who waits


@pytest.fixture
def splash(world, monkeypatch):
    """A plymouth that notes what it is asked for, first in PATH."""
    noted = world.write("splash")
    program = world.write("bin/plymouth", f'#!/bin/sh\necho "$*" >> {noted}\n', mode=0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return noted


def test_how_far_a_build_is_is_told_on_stderr_and_on_a_splash(
    lvm, image, monkeypatch, capsys, splash
):
    real, told = subprocess.run, []

    def mksquashfs(command, **how):
        """Half of what is expected, then all of it and more, each until it was seen."""
        if "mksquashfs" in command:
            target = command[command.index("mksquashfs") + 2]
            for size, wanted in ((4, "50 %"), (9, "99 %")):
                with open(target, "wb") as file:
                    file.truncate(size * MIB)
                limit = time.monotonic() + 10
                while wanted not in "".join(told) and time.monotonic() < limit:
                    time.sleep(0.01)
                    told.append(capsys.readouterr().err)
        return real(command, **how)

    monkeypatch.setattr(subprocess, "run", mksquashfs)
    monkeypatch.setattr(image, "_LOOK_S", 0.01)
    space = {"expected_bytes": 8 * MIB, "limit_bytes": 64 * MIB, "source_bytes": 16 * MIB}
    image.room = lambda: space
    image.build()
    told.append(capsys.readouterr().err)
    half = "ramboot: building the image: 50 %, 4 MiB of about 8 MiB"
    full = "ramboot: building the image: 99 %, 9 MiB of about 8 MiB"
    proof = "ramboot: proving the image: 0 MiB are read back, each entry is compared with the root"
    assert "".join(told).splitlines() == [half, full, proof]
    assert splash.read_text().splitlines() == [
        f"display-message --text={half}",
        f"hide-message --text={half}",
        f"display-message --text={full}",
        f"display-message --text={proof}",
    ]


def test_nobody_who_listens_does_not_end_a_build(world, image, monkeypatch):
    with open(os.devnull, encoding="ascii") as read_only:
        monkeypatch.setattr(sys, "stderr", read_only)
        monkeypatch.setenv("PATH", "/nowhere")
        assert image._say("text") == "ramboot: text"


# At shutdown


@pytest.fixture
def unit(world):
    path = Path(world.paths["image_units"]["shutdown"])
    path.parent.mkdir(parents=True)
    path.touch()
    world.pillar["ramboot"]["image"]["rebuild"] = "shutdown"
    return path


def test_at_shutdown_a_stale_image_is_built_anew_and_a_current_one_is_left(
    world, lvm, image, unit, capsys
):
    made = image.build()["made"]
    assert image.at_shutdown() == {"action": "nothing", "reason": "the image is current"}
    (lvm.top / "etc/new").write_text("new")
    capsys.readouterr()
    reason = f"changed since {made}: configuration (/etc)"
    assert image.at_shutdown() == {"action": "built", "reason": reason}
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"ramboot: the image is built anew: {reason}"
    assert told[-1] == "ramboot: the image has been built anew"
    assert image.stale() is None


@pytest.mark.parametrize("rebuild", ["shutdown", "background"])
@pytest.mark.parametrize("gone", ["unit", "image", "pillar"])
def test_a_unit_that_runs_still_builds_nothing_of_what_was_taken_away(
    world, lvm, image, unit, rebuild, gone
):
    if rebuild == "background":
        unit = unit.rename(world.paths["image_units"]["service"])
        world.pillar["ramboot"]["image"]["rebuild"] = "background"
    run = image.in_background if rebuild == "background" else image.at_shutdown
    image.build()
    assert run() == {"action": "nothing", "reason": "the image is current"}
    (lvm.top / "etc/new").write_text("new")
    path = unit if gone == "unit" else Path(world.paths["image_directory"]) / "manifest"
    reason = f"{path} is not there any more"
    if gone == "pillar":
        world.pillar["ramboot"]["image"]["rebuild"] = "manual"
        reason = "image:rebuild is manual in the pillar"
    else:
        path.unlink()
    before = len(lvm.calls)
    assert run() == {"action": "nothing", "reason": reason}
    assert len(lvm.calls) == before
    # by hand it is built all the same
    assert image.refresh()["action"] == "built"


def test_at_shutdown_of_a_ram_session_nothing_is_built(world, lvm, image, unit):
    image.build()
    (lvm.top / "etc/new").write_text("new")
    world.salt["ramboot_preflight.session_fault"] = lambda: "this is a RAM session (overlay)"
    assert image.at_shutdown()["reason"] == "this is a RAM session (overlay)"


def test_at_shutdown_the_old_image_survives_a_build_that_fails(world, lvm, image, unit, capsys):
    old = image.build()
    (lvm.top / "etc/new").write_text("new")
    lvm.fails = "mksquashfs"
    with pytest.raises(CommandExecutionError):
        image.at_shutdown()
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "ramboot: the image could not be built anew, the old one stays"
    assert image.manifest()["sha256"] == old["sha256"]
    assert image.verify()[str(Path(world.paths["image_directory"]) / old["file"])]["verdict"] == (
        "good"
    )
    assert lvm.snapshots == []


# Freshness


def test_an_image_is_stale_when_the_system_changed(lvm, image):
    assert image.stale() == "there is no image"
    built = image.build()
    assert image.stale() is None
    (lvm.top / "var/log/messages").write_text("more")
    assert image.stale() is None
    (lvm.top / "etc/fstab").write_text("other")
    (lvm.top / "var/lib/rpm/rpmdb.sqlite").write_text("other")
    assert image.stale() == (
        f"changed since {built['made']}: packages or kernels, configuration (/etc)"
    )
    assert image.refresh()["action"] == "built"
    assert image.refresh() == {"action": "nothing", "reason": "the image is current"}


def test_a_damaged_image_is_stale(world, image):
    built = image.build()
    file = Path(world.paths["image_directory"]) / built["file"]
    os.truncate(file, built["bytes"] - 1)
    assert image.stale() == f"{file} has {built['bytes'] - 1} bytes instead of {built['bytes']}"
    assert image.verify()[str(file)]["verdict"] == "changed"
    file.unlink()
    assert image.stale() == f"{file} is missing"
    assert image.verify()[str(file)]["verdict"] == "missing"
    (file.parent / "manifest").write_text("version=1\n")
    assert image.stale().endswith("manifest can't be understood: no line bytes=")
    assert image.manifest_or_none() is None


def test_a_link_to_a_good_image_is_none(world, image):
    file = Path(world.paths["image_directory"]) / image.build()["file"]
    file.rename(world.root / "elsewhere")
    file.symlink_to(world.root / "elsewhere")
    assert image.verify()[str(file)]["verdict"] == "missing"


def test_pythons_and_the_boots_parts_are_the_same(image):
    script = Path(__file__).parents[2] / "ramboot/initramfs/files/50ramboot/ramboot-state.sh"
    said = subprocess.run(
        ["sh", "-c", f". {script}; for p in $STATE_PARTS; do echo \"$p=$(state_text $p)\"; done"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert dict(line.split("=") for line in said.splitlines()) == image.PARTS


# The states


@pytest.fixture
def state(world, image):
    return world.state("ramboot_image")


def test_current_builds_once(world, lvm, image, state, test_mode):
    ret = state.current("image")
    if test_mode:
        assert ret == {
            "name": "image",
            "result": None,
            "changes": {"image": {"old": "there is no image", "new": "current"}},
            "comment": "the image would be built: there is no image",
        }
        assert not Path(world.paths["image_directory"]).exists()
        return
    made = image.manifest()
    assert ret == {
        "name": "image",
        "result": True,
        "changes": {
            "image": {
                "old": "there is no image",
                "new": f"of {made['made']}, {made['bytes']} bytes",
            }
        },
        "comment": "the image has been built: there is no image",
    }
    assert state.current("image") == {
        "name": "image",
        "result": True,
        "changes": {},
        "comment": f"the image of {made['made']} holds the root as it is",
    }


def test_current_fails_without_the_tool_in_both_modes(world, image, state, test_mode):
    (world.root / "usr/bin/mksquashfs").unlink()
    ret = state.current("image")
    assert (ret["result"], ret["changes"]) == (False, {})
    assert TOOL in ret["comment"]


def test_current_fails_without_room_in_both_modes(world, lvm, image, state, test_mode):
    lvm.usage.f_bavail = 1024 << 8
    ret = state.current("image")
    assert (ret["result"], ret["changes"]) == (False, {})
    assert ret["comment"] == (
        f"no image {'would be' if test_mode else 'was'} built: about 2560 MiB are needed, 512 MiB"
        " may be used on / and in its thin pool"
    )
    assert Path(world.paths["image_directory"]).exists() is not test_mode


def test_a_dry_run_counts_what_the_build_deletes_first(world, lvm, image, state):
    directory = world.paths["image_directory"]
    file = world.write("/var/lib/ramboot/image/building.squashfs", os.urandom(2 * MIB))
    assert str(file.parent) == directory
    lvm.usage.f_bavail = (512 + 2558) << 8
    world.opts["test"] = True
    assert state.current("image")["result"] is None
    file.unlink()
    assert state.current("image")["result"] is False


FSTAB = {"fstab: /dev/a none swap sw 0 0": {"old": "on", "new": "off"}}
MASK = {"/run/systemd/generator/dev-zram0.swap": {"old": "not masked", "new": "masked"}}


@pytest.mark.parametrize(
    ("function", "name", "changes", "stale"),
    [
        ("ramboot.installed", "/etc/x", {"diff": "x"}, True),
        ("ramboot.installed", "/usr/bin/ramboot", {"diff": "x"}, True),
        ("ramboot.restored", "/etc/x", {"/etc/x": {"old": "ramboot's", "new": "deleted"}}, True),
        ("ramboot.installed", "/etc/y", {}, False),
        ("ramboot.initramfs_current", "every initramfs", {"/boot/initramfs-6.img": {}}, False),
        ("ramboot_grub.config_current", "grub.cfg", {"/boot/grub2/grub.cfg": {}}, False),
        ("ramboot_grub.dom0_mem_all", "/etc/default/grub", {"/etc/default/grub": {}}, True),
        ("ramboot_swap.off", "swap", FSTAB, True),
        ("ramboot_swap.off", "swap", MASK, True),
        ("ramboot_swap.off", "swap", {"/dev/dm-1": {"old": "on", "new": "off"}}, False),
        ("ramboot_swap.restored", "swap", {"/var/lib/ramboot/swap.json": {"old": "x"}}, False),
        ("ramboot_qubes.present", "pools", {"pool ram": {"old": None}}, True),
        ("ramboot_qubes.present", "qubes", {"debian-stateless": {"old": None}}, True),
        ("ramboot_qubes.present", "qubes", {"debian: root of debian-12": {"old": "1"}}, True),
        ("ramboot_qubes.present", "qubes", {"work: label": {"old": "red"}}, True),
        ("ramboot_qubes.present", "settings", {"system: default_netvm": {"old": "x"}}, True),
        ("ramboot_qubes.present", "settings", {}, False),
        ("file.managed", "/etc/x", {"diff": "x"}, False),
    ],
)
def test_a_dry_run_knows_what_of_the_run_itself_makes_the_image_stale(
    world, image, state, function, name, changes, stale
):
    image.build()
    world.opts["test"] = True
    module, _, what = function.partition(".")
    state.__running__ = {
        f"{module}_|-id_|-{name}_|-{what}": {"name": name, "changes": changes},
        "ramboot_|-same_|-/etc/same_|-installed": {"name": "/etc/same", "changes": {}},
        # Salt's own of a state whose requisite failed
        "ramboot_|-unmet_|-/etc/unmet_|-installed": {"result": False, "changes": {}},
    }
    ret = state.current("image")
    assert ret["result"] is (None if stale else True)
    if stale:
        assert ret["comment"] == f"the image would be built: this run would change the root: {name}"


def test_absent_leaves_nothing(world, lvm, image, state, test_mode):
    world.opts["test"] = False
    image.build()
    world.opts["test"] = test_mode
    lvm.snapshots.append("ramboot-image")
    directory = world.paths["image_directory"]
    ret = state.absent("image")
    assert ret["changes"] == {
        directory: {"old": "present", "new": "absent"},
        "volume qubes_dom0/ramboot-image": {"old": "present", "new": "absent"},
    }
    if test_mode:
        assert ret["result"] is None
        assert image.stale() is None
        assert lvm.snapshots == ["ramboot-image"]
        return
    assert ret["result"] is True
    assert not Path(directory).exists()
    assert lvm.snapshots == []
    assert state.absent("image") == {
        "name": "image",
        "result": True,
        "changes": {},
        "comment": "there is no image",
    }


def test_unused_names_what_stays_and_changes_nothing(world, image, state, test_mode):
    ret = state.unused("image")
    told = "the pillar does not name the backend image; there is no image"
    assert ret == {"name": "image", "result": True, "changes": {}, "comment": told}
    image.build()
    directory = world.paths["image_directory"]
    ret = state.unused("image")
    assert (ret["result"], ret["changes"]) == (True, {})
    assert ret["comment"].endswith(
        f"stays until `qubesctl state.apply ramboot.image.absent`: {directory}"
    )
    assert image.stale() is None


# Preflight, and the pillar


@pytest.mark.parametrize(
    ("pillar", "asked"),
    [
        ({}, False),
        ({"boot": {"mode": "image"}}, True),
        ({"boot": {"backend": "image"}}, True),
        ({"grub": {"entries": ["zram", "image"]}}, True),
        ({"image": {"stale": "copy"}}, False),
    ],
)
def test_who_asks_for_an_image(world, image, pillar, asked):
    world.pillar["ramboot"] = pillar
    assert image.asked() is asked
