# SPDX-License-Identifier: GPL-2.0-or-later
"""The boot scripts' part of the backend image: which image is used, and that no damaged byte is."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
import yaml

# the fixture, and what it is made of
from test_boot_scripts import COPY, MODULE, Shell, config, shell  # noqa: F401

MIB = 1 << 20
KERNEL = "6.12.1-1.qubes.fc41.x86_64"
CHOOSE = (
    "read_config; ST_DEVICE=/dev/root ST_BACKEND=image\n"
    'alert() { printf "warned: %s\\n" "$1"; }\n'
    'image_manifest && image_choose && printf "%s|%s" "$ST_BACKEND" "$ST_NOTE" \\\n'
    '    || printf "no|%s" "$reason"'
)
# As qubesd writes it (core-admin, qubes/app.py, save).
QUBES_XML = """<?xml version='1.0' encoding='utf-8'?>
<qubes>
  <properties>
    <property name="default_netvm" ref="name">sys-firewall</property>
  </properties>
  <domains>
    <domain id="domain-1" class="AppVM">
      <properties>
        <property name="backup_timestamp">1764000000</property>
        <property name="name">work</property>
        <property name="netvm" ref="name">sys-firewall</property>
      </properties>
      <features>
        <feature name="last-update">2026-11-01</feature>
        <feature name="updates-available">1</feature>
        <feature name="preload-dispvm">disp1 disp2</feature>
      </features>
      <tags>
        <tag name="one"/>
        <tag name="two"/>
      </tags>
    </domain>
    <domain id="domain-2" class="AppVM">
      <properties>
        <property name="name">vault</property>
      </properties>
    </domain>
    <domain id="domain-3" class="DispVM">
      <properties>
        <property name="name">disp1234</property>
        <property name="netvm" ref="name">sys-firewall</property>
      </properties>
    </domain>
  </domains>
</qubes>
"""
READ = COPY + (
    "read_config; ST_DEVICE=/dev/root; mkdir -p $RUN/root/image\n"
    "IMAGE_COPY=$RUN/root/image/copy\n"
    'image_manifest && image_read && image_arrived && printf "whole" || printf "%s" "$reason"'
)


def root_state(root: Path, work: Path) -> dict[str, str]:
    done = subprocess.run(
        ["sh", "-c", f'. {MODULE}/ramboot-state.sh && root_state "$1" "$2"', "sh", root, work],
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(line.split() for line in done.stdout.splitlines())


class Image:
    """A root on the disk with an image of it; `manifest` can be changed before `write`."""

    def __init__(self, top: Path):
        self.top = top
        self.root = top / "run/ramboot/source"
        self.directory = self.root / "var/lib/ramboot/image"
        self.directory.mkdir(parents=True)
        for path, text in {
            f"usr/lib/modules/{KERNEL}/modules.dep": "",
            "usr/bin/tool": "x",
            "usr/local/bin/mine": "x",
            "var/lib/rpm/rpmdb.sqlite": "packages",
            "var/lib/qubes/qubes.xml": QUBES_XML,
            "var/lib/qubes/appvms/work/firewall.xml": "<firewall/>",
            "var/lib/qubes/vm-templates/debian/root.img": "x",
            "var/lib/qubes/vm-templates/debian/root-cow.img": "x",
            "var/log/messages": "",
            "home/user/note": "",
            "etc/fstab": "1",
            "etc/lvm/backup/qubes_dom0": "",
            "etc/udev/hwdb.bin": "",
        }.items():
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_text(text)
        (top / "proc/sys/kernel").mkdir(parents=True)
        (top / "proc/sys/kernel/osrelease").write_text(f"{KERNEL}\n")
        (top / "proc/cpuinfo").write_text("processor : 0\nprocessor : 1\n")
        # five and a half chunks
        self.content = os.urandom(11 * MIB // 2)
        self.file = self.directory / "root-0123456789abcdef.squashfs"
        self.file.write_bytes(self.content)
        chunks = [self.content[at : at + MIB] for at in range(0, len(self.content), MIB)]
        self.chunks = [hashlib.sha256(chunk).hexdigest() for chunk in chunks]
        self.manifest = {
            "version": "1",
            "made": "2026-11-25T01:00:00Z",
            "kernels": f"6.6.1 {KERNEL}",
            **root_state(self.root, top / "listing"),
            "bytes": str(len(self.content)),
            "sha256": hashlib.sha256(self.content).hexdigest(),
            "chunk_mib": "1",
            "source_bytes": "99",
            "file": self.file.name,
        }

    def write(self, *extra: str) -> None:
        lines = [f"{key}={value}" for key, value in self.manifest.items() if value]
        lines += [f"chunk={sha256}" for sha256 in self.chunks]
        (self.directory / "manifest").write_text("\n".join([*lines, *extra]) + "\n")


@pytest.fixture
def image(shell: Shell, tmp_path: Path) -> Image:  # noqa: F811
    config(tmp_path)
    image = Image(tmp_path)
    image.write()
    return image


def test_an_image_of_the_root_as_it_is_is_used(shell: Shell, image: Image) -> None:  # noqa: F811
    assert shell(CHOOSE).stdout == "image|"


STALE = "the image of 2026-11-25T01:00:00Z is stale: changed since: "
PACKAGES, CONFIGURATION = "packages or kernels", "configuration (/etc)"
PROGRAMS, QUBES = "programs (/usr, /opt)", "qubes, their settings or templates"


def test_the_boot_and_the_undo_know_the_same_package_databases(
    shell: Shell,  # noqa: F811
) -> None:
    known = yaml.safe_load((MODULE / "../../../defaults.yaml").read_text())["paths"]
    read = shell('state_file() { printf "/%s\\n" "$1"; }; ls() { :; }; state_packages').stdout
    assert read.split() == known["package_databases"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("echo more >> var/lib/rpm/rpmdb.sqlite", PACKAGES),
        ("touch -d 2001-01-01 var/lib/rpm/rpmdb.sqlite", PACKAGES),
        ("mkdir usr/lib/modules/6.18.0", f"{PACKAGES}, {PROGRAMS}"),
        ("echo new > etc/new", CONFIGURATION),
        ("chmod 600 etc/fstab", CONFIGURATION),
        # as long as before, and the old time put back
        ('t=$(stat -c %y etc/fstab); printf 2 > etc/fstab; touch -d "$t" etc/fstab', CONFIGURATION),
        ("cp usr/bin/tool usr/bin/tool2", PROGRAMS),
        ("echo y >> usr/local/bin/mine", PROGRAMS),
        ("sed -i s/work/play/ var/lib/qubes/qubes.xml", QUBES),
        ("sed -i '0,/>sys-firewall</s//></' var/lib/qubes/qubes.xml", QUBES),
        ("sed -i '/one/d' var/lib/qubes/qubes.xml", QUBES),
        ("sed -i '/domain-2/,/domain>/{h;d}' var/lib/qubes/qubes.xml", QUBES),
        # between two qubes
        ("sed -i '/two/d; s/.*>vault<.*/&<tag name=\"two\"\\/>/' var/lib/qubes/qubes.xml", QUBES),
        ("echo more >> var/lib/qubes/appvms/work/firewall.xml", QUBES),
        ("echo more >> var/lib/qubes/vm-templates/debian/root.img", QUBES),
        ("cd var/lib/qubes; mkdir -p vm-templates/d; echo x > vm-templates/d/root.img", QUBES),
        ("rm etc/fstab && rm usr/local/bin/mine", f"{CONFIGURATION}, {PROGRAMS}"),
        # what every boot and every qube writes
        ("echo x | tee var/log/messages home/user/note etc/lvm/backup/qubes_dom0", None),
        ("touch etc/adjtime etc/x && rm etc/x; mkdir -p etc/libvirt/libxl", None),
        ("echo anew > etc/ld.so.cache && touch etc/.updated", None),
        ("echo anew > etc/udev/hwdb.new && mv etc/udev/hwdb.new etc/udev/hwdb.bin", None),
        # qubesd at its start, and as it works
        ("cd var/lib/qubes/vm-templates/debian; rm root-cow.img; touch root-cow.img", None),
        ("sed -i 's/1764/1765/; s/-01</-02</; s/>1</></' var/lib/qubes/qubes.xml", None),
        ("sed -i 's/disp1/disp9/' var/lib/qubes/qubes.xml", None),
        ("sed -i '/one/{h;d}; /two/G' var/lib/qubes/qubes.xml", None),
        ("sed -i '/domain-3/,/domain>/d' var/lib/qubes/qubes.xml", None),
    ],
)  # fmt: skip
def test_what_makes_an_image_stale(
    shell: Shell,  # noqa: F811
    image: Image,
    change: str,
    told: str | None,
) -> None:
    subprocess.run(["sh", "-ec", change], cwd=image.root, check=True)
    assert shell(CHOOSE).stdout == (
        "image|"
        if told is None
        else f"no|{STALE}{told}; it has to be built anew (state ramboot.image)"
    )


@pytest.mark.parametrize(
    ("policy", "result"),
    [
        ("copy", "zram|{}; the root was copied (zram) instead"),
        ("use-and-say", "image|{}"),
        ("rebuild-first", "no|{}; it has to be built anew (state ramboot.image)"),
    ],
)
def test_a_stale_image_is_never_used_in_silence(
    shell: Shell,  # noqa: F811
    image: Image,
    policy: str,
    result: str,
) -> None:
    config(image.top, image_stale=policy)
    (image.root / "etc/new").touch()
    lines = shell(CHOOSE).stdout.splitlines()
    assert lines[-1] == result.format(f"{STALE}{CONFIGURATION}")
    assert (len(lines) == 2) == (policy != "rebuild-first")


@pytest.mark.parametrize(
    ("policy", "used"), [("copy", "zram"), ("use-and-say", "no"), ("rebuild-first", "no")]
)
def test_an_image_without_modules_for_this_kernel_is_never_used(
    shell: Shell,  # noqa: F811
    image: Image,
    policy: str,
    used: str,
) -> None:
    config(image.top, image_stale=policy)
    (image.top / "proc/sys/kernel/osrelease").write_text("6.18.2\n")
    said = shell(CHOOSE).stdout.splitlines()[-1]
    told = "the image of 2026-11-25T01:00:00Z is stale: it has no modules for the running kernel"
    assert said.startswith(f"{used}|{told} 6.18.2")


def test_the_images_device_is_offered_to_no_qube(shell: Shell, tmp_path: Path) -> None:  # noqa: F811
    shell(COPY + "image_keep_from_qubes loop3")
    assert (tmp_path / "run/udev/rules.d/63-ramboot-image.rules").read_text() == (
        'SUBSYSTEM=="block", KERNEL=="loop3",'
        ' ENV{DM_UDEV_DISABLE_DISK_RULES_FLAG}="1", ENV{QUBES_EXPORT_BLOCK_DEVICE}="0"\n'
    )


def test_a_state_that_cannot_be_told_is_no_fresh_one(shell: Shell, image: Image) -> None:  # noqa: F811
    config(image.top, image_stale="use-and-say")
    done = shell("find() { return 1; }\n" + CHOOSE)
    assert done.stdout == "no|whether the image of 2026-11-25T01:00:00Z is stale could not be told"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("version", "2", "has a line that is not understood: version=2"),
        ("file", "../../../etc/shadow", "not understood: file=../../../etc/shadow"),
        ("file", "$(touch pwned)", "not understood: file=$(touch pwned)"),
        ("file", ".hidden", "not understood: file=.hidden"),
        ("bytes", "1k", "not understood: bytes=1k"),
        ("bytes", "0", "not understood: bytes=0"),
        ("bytes", "5767169", "has 5767168 bytes instead of 5767169"),
        ("chunk_mib", "2", "lacks hashes: there must be 3"),
        ("etc", "x", "not understood: etc=x"),
        ("packages", "xyz", "not understood: packages=xyz"),
        ("kernels", "", "has no line kernels="),
        ("configuration", "", "has no line configuration="),
        ("file", "root-none.squashfs", "root-none.squashfs is missing on /dev/root"),
    ],
)
def test_a_manifest_is_not_guessed_at(
    shell: Shell,  # noqa: F811
    image: Image,
    key: str,
    value: str,
    reason: str,
) -> None:
    image.manifest[key] = value
    image.write()
    said = shell(f'cd "$P"; {CHOOSE}').stdout
    assert said.startswith("no|")
    assert reason in said
    assert not (image.top / "pwned").exists()


def test_garbage_after_the_manifest_is_an_error(shell: Shell, image: Image) -> None:  # noqa: F811
    image.write("\x00\x1b[2J")
    assert "not understood" in shell(CHOOSE).stdout


def test_no_image_yet_says_how_to_get_one(shell: Shell, image: Image) -> None:  # noqa: F811
    (image.directory / "manifest").unlink()
    assert shell(CHOOSE).stdout == (
        "no|there is no image on /dev/root yet: the state ramboot.image builds it"
    )


def test_an_image_is_read_and_every_chunk_compared(shell: Shell, image: Image) -> None:  # noqa: F811
    done = shell(READ)
    assert done.stdout.endswith("whole"), done.stdout + done.stderr
    assert (image.top / "run/ramboot/root/image/copy").read_bytes() == image.content


@pytest.mark.parametrize("at", [0, 3 * MIB - 1, 11 * MIB // 2 - 1])
def test_one_flipped_bit_anywhere_is_found(shell: Shell, image: Image, at: int) -> None:  # noqa: F811
    damaged = bytearray(image.content)
    damaged[at] ^= 4
    image.file.write_bytes(damaged)
    begin = at // MIB
    assert shell(READ).stdout.endswith(
        f"the copy failed: the image is damaged between {begin} and {begin + 1} MiB"
    )


def test_a_truncated_image_is_found(shell: Shell, image: Image) -> None:  # noqa: F811
    image.file.write_bytes(image.content[:-1])
    assert shell(READ).stdout.endswith("has 5767167 bytes instead of 5767168")


def test_a_wrong_hash_is_found(shell: Shell, image: Image) -> None:  # noqa: F811
    image.chunks[4] = "0" * 64
    image.write()
    assert shell(READ).stdout.endswith("the image is damaged between 4 and 5 MiB")


# Reads the disk well, and writes one byte less to RAM; says nothing of it.
LOSING = """
dd() {
    command dd "$@" || return 1
    case $* in *of=*) truncate -s -1 "$IMAGE_COPY" ;; esac
}
"""


def test_what_is_hashed_is_what_lies_in_ram(shell: Shell, image: Image) -> None:  # noqa: F811
    assert "the image is damaged between" in shell(LOSING + READ).stdout


# Who goes on reading holds stdout, for whose end the test waits.
BOTH = COPY + (
    "read_config; ST_DEVICE=/dev/root ST_BACKEND=image; mkdir -p $RUN/root\n"
    "dd() { exec sleep 1000; }\n"
    "mount_noswap() { mkdir -p $2; }\n"
    "say() { :; }\n"
    "alert() { :; }\n"
    'umount() { echo "$1" > "$P/unmounted"; }\n'
    'timeout() { shift 3; "$@"; }\n'
    'make_image && printf "%s;" "$ST_BACKEND" || printf "no;"\n'
    'printf "%s" "$WORKERS"'
)


@pytest.mark.parametrize(
    ("policy", "end", "unmounted"), [("copy", "zram;", True), ("rebuild-first", "no;", False)]
)
def test_nobody_reads_an_image_on_that_is_not_used(
    shell: Shell,  # noqa: F811
    image: Image,
    policy: str,
    end: str,
    unmounted: bool,
) -> None:
    config(image.top, image_stale=policy)
    (image.root / "etc/new").touch()
    done = shell(BOTH)
    assert done.stdout == end, done.stdout + done.stderr
    assert (image.top / "unmounted").exists() == unmounted


def test_a_read_error_is_told(shell: Shell, image: Image) -> None:  # noqa: F811
    failing = "dd() { echo 'dd: error reading: Input/output error' >&2; return 1; }\n"
    assert "the copy failed: dd: error reading: Input/output error" in shell(failing + READ).stdout


def test_no_copy_has_the_image(shell: Shell, image: Image) -> None:  # noqa: F811
    shell("read_config; source_exclude")
    assert list(image.directory.iterdir()) == []
    assert (image.root / "etc/fstab").exists()


def test_ram_that_an_image_needs(shell: Shell, tmp_path: Path) -> None:  # noqa: F811
    assert shell("need_bytes image 1000000000").stdout == str(500_000_000 + 16 * MIB)
    assert shell("IMAGE_bytes=7; need_bytes image 1000000000").stdout == str(7 + 16 * MIB)
