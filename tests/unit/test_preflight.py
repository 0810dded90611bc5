# SPDX-License-Identifier: GPL-2.0-or-later
"""What preflight refuses, on fake systems; lsblk and findmnt answer in their own JSON."""

import json
from pathlib import Path

import pytest
import yaml

LAYOUTS = sorted((Path(__file__).parents[1] / "fixtures" / "layout").glob("*.yaml"))
SUPPORTED = (
    "supported: ext4 on lvm-thin, lvm, partition; xfs on lvm, partition; btrfs on lvm, partition;"
    " each with LUKS or without, btrfs with a subvolume for /"
)
WAY_OUT = "restart with ramboot=off (the ordinary menu entry, answer n) and apply it there"
NAME = "this system can be given RAM sessions"


class Tools:
    """cmd.run_all for findmnt and lsblk, told what the system looks like."""

    def __init__(self):
        self.mounts = [mount("/", "/dev/mapper/q-root", "ext4")]
        self.devices = [
            device(
                "/dev/mapper/q-root",
                "lvm",
                device(
                    "/dev/mapper/luks-1",
                    "crypt",
                    device("/dev/sda3", "part", device("/dev/sda", "disk"), fstype="crypto_LUKS"),
                ),
            )
        ]
        self.fails = None

    def run_all(self, cmd, python_shell=None, env=None):
        assert (python_shell, env) == (False, {"LC_ALL": "C"})
        if cmd[0] == self.fails:
            return {"retcode": 1, "stdout": "", "stderr": "no such thing"}
        if cmd[0] == "findmnt":
            answer = {"filesystems": self.mounts}
            assert cmd[1:] == [
                "--json",
                "--list",
                "--nofsroot",
                "--output",
                "TARGET,SOURCE,FSTYPE,FSROOT,UUID",
            ]
        else:
            assert cmd[:-1] == [
                "lsblk",
                "--json",
                "--inverse",
                "--paths",
                "--output",
                "NAME,TYPE,FSTYPE",
            ]
            assert cmd[-1] == self.mounts[-1]["source"] or cmd[-1] == self.mounts[0]["source"]
            answer = {"blockdevices": self.devices}
        return {"retcode": 0, "stdout": json.dumps(answer), "stderr": ""}


def mount(target, source, fstype="ext4", fsroot="/", uuid=None):
    return {"target": target, "source": source, "fstype": fstype, "fsroot": fsroot, "uuid": uuid}


def device(name, kind, *below, fstype=None):
    found = {"name": name, "type": kind, "fstype": fstype}
    return {**found, "children": list(below)} if below else found


@pytest.fixture
def tools(world):
    tools = Tools()
    world.salt["cmd.run_all"] = tools.run_all
    return tools


@pytest.fixture
def dom0(world, tools):
    """A system with everything that is needed."""
    for name in ("dracut", "lsinitrd", "grub2-mkconfig", "grub2-script-check"):
        world.write(f"/usr/bin/{name}", mode=0o755)
    world.write("/etc/grub.d/20_linux_xen", mode=0o755)
    world.write("/boot/xen-4.19.gz")
    return world


@pytest.fixture
def preflight(world, tools):
    for name in ("config", "image"):
        world.module(f"ramboot_{name}")
    world.salt["ramboot_grub.faults"] = lambda _settings: []
    return world.module("ramboot_preflight")


# The state


@pytest.fixture
def state(world, preflight):
    return world.state("ramboot_preflight")


def test_a_menu_that_can_take_no_entries_is_told(world, preflight, dom0):
    world.salt["ramboot_grub.faults"] = lambda settings: [f"not {settings['grub']['entries']}"]
    assert preflight.faults() == ["not ['zram']"]
    # that they are wrong is said, and not asked about
    world.salt["config.get"] = lambda *_args, **_kwargs: {}
    world.pillar["ramboot"] = {"grub": {"entries": ["floppy"]}}
    assert not [fault for fault in preflight.faults() if fault.startswith("not ")]


def test_a_good_system_passes_without_changes(state, dom0, test_mode):
    assert state.passed(NAME) == {
        "name": NAME,
        "result": True,
        "changes": {},
        "comment": "nothing stands in the way",
    }


def test_all_faults_come_in_one_failure_in_both_modes(state, dom0, tools, test_mode):
    dom0.pillar["ramboot"] = {"swap": "never", "boot": {"timeout_s": -3}}
    (dom0.root / "usr/bin/dracut").unlink()
    tools.mounts.append(mount("/home", "/dev/sdb1"))
    assert state.passed(NAME) == {
        "name": NAME,
        "result": False,
        "changes": {},
        "comment": "nothing was changed:\n"
        "ramboot:boot:timeout_s: -3 is not allowed; allowed: a whole number of seconds from 0 to"
        " 3600\n"
        "ramboot:swap: 'never' is not allowed; allowed: session, off or keep\n"
        "dracut is not installed\n"
        "/home is on /dev/sdb1, not on the device of /: a RAM session would go on writing to it;"
        " move it to /",
    }


def test_the_undo_is_refused_in_a_ram_session_and_without_boot(state, world, test_mode):
    boot = None
    world.salt["ramboot_initramfs.boot_fault"] = lambda: boot
    world.write("/run/ramboot/status.json", '{"session": "persistent"}')
    assert state.on_disk(NAME) == {
        "name": NAME,
        "result": True,
        "changes": {},
        "comment": "nothing stands in the way",
    }
    boot = "/boot has no kernel"
    assert state.on_disk(NAME)["comment"] == f"nothing was changed:\n{boot}"
    world.write("/run/ramboot/status.json", '{"session": "ram", "backend": "zram"}')
    assert state.on_disk(NAME) == {
        "name": NAME,
        "result": False,
        "changes": {},
        "comment": f"nothing was changed:\nthis is a RAM session (zram); {WAY_OUT}",
    }


# Programs and files


def test_a_bare_system_lacks_all_of_it(preflight, world):
    boot, grub = f"{world.root}/boot", f"{world.root}/etc/grub.d/20_linux_xen"
    assert preflight.faults() == [
        "dracut is not installed",
        "lsinitrd is not installed",
        "grub2-mkconfig or grub-mkconfig is not installed",
        "grub2-script-check or grub-script-check is not installed",
        f"no Xen hypervisor in /boot: nothing like {boot}/xen*.gz or {boot}/xen*.efi",
        f"{grub} is missing or not executable: no Xen menu entries",
    ]


def test_debians_names_and_places_do_as_well(preflight, dom0):
    for name in ("grub2-mkconfig", "grub2-script-check"):
        (dom0.root / "usr/bin" / name).unlink()
    dom0.write("/usr/sbin/grub-mkconfig", mode=0o755)
    dom0.write("/usr/bin/grub-script-check", mode=0o755)
    (dom0.root / "boot/xen-4.19.gz").rename(dom0.root / "boot/xen-4.20-amd64.gz")
    assert preflight.faults() == []


def test_an_efi_hypervisor_does_as_well(preflight, dom0):
    (dom0.root / "boot/xen-4.19.gz").rename(dom0.root / "boot/xen-4.19.efi")
    assert preflight.faults() == []


def test_programs_and_scripts_must_be_executable(preflight, dom0):
    (dom0.root / "usr/bin/lsinitrd").chmod(0o644)
    (dom0.root / "etc/grub.d/20_linux_xen").chmod(0o644)
    assert preflight.faults() == [
        "lsinitrd is not installed",
        f"{dom0.root}/etc/grub.d/20_linux_xen is missing or not executable: no Xen menu entries",
    ]


def test_xen_started_without_grub_is_refused(preflight, dom0):
    old = dom0.write("/boot/efi/EFI/qubes/xen.cfg")
    assert preflight.faults() == [
        f"{old} exists: xen.efi is started without GRUB (an old R4.0), which has no menu;"
        " supported: GRUB. If GRUB starts this system, remove that file"
    ]


# The session


def test_a_ram_session_is_refused_before_its_layout_is_looked_at(preflight, dom0, tools):
    dom0.write("/run/ramboot/status.json", '{"session": "ram", "backend": "tmpfs"}')
    tools.fails = "lsblk"
    assert preflight.faults() == [f"this is a RAM session (tmpfs); {WAY_OUT}"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"session": "persistent"}'])
def test_a_status_that_says_nothing_of_ram_does_not_count(preflight, dom0, text):
    dom0.write("/run/ramboot/status.json", text)
    assert preflight.session_fault() is None


@pytest.mark.parametrize("fstype", ["tmpfs", "overlay", "rootfs", "squashfs"])
def test_a_root_in_ram_is_refused_without_a_status_too(preflight, dom0, tools, fstype):
    tools.mounts = [mount("/", fstype, fstype)]
    assert preflight.faults() == [f"/ is {fstype}, not the disk's root; {WAY_OUT}"]


@pytest.mark.parametrize("disk", ["/dev/zram0", "/dev/zram12", "/dev/ram0"])
def test_a_root_on_a_ram_disk_is_refused(preflight, dom0, tools, disk):
    tools.mounts = [mount("/", disk)]
    assert preflight.faults() == [f"/ is on {disk}, a RAM disk, not the disk's root; {WAY_OUT}"]


def test_the_upper_one_of_two_roots_counts(preflight, dom0, tools):
    tools.mounts = [mount("/", "rootfs", "rootfs"), *tools.mounts]
    assert preflight.session_fault() is None
    tools.mounts.append(mount("/", "tmpfs", "tmpfs"))
    assert preflight.session_fault() == f"/ is tmpfs, not the disk's root; {WAY_OUT}"


def test_a_volume_named_like_a_ram_disk_is_none(preflight, dom0, tools):
    tools.mounts = [mount("/", "/dev/mapper/ramvg-root")]
    assert preflight.session_fault() is None


# The layout


@pytest.mark.parametrize("path", LAYOUTS, ids=lambda path: path.stem)
def test_recorded_layout(preflight, dom0, tools, path):
    case = yaml.safe_load(path.read_text())
    tools.mounts = case["findmnt"]["filesystems"]
    tools.devices = case["lsblk"]["blockdevices"]
    layout = preflight.root_layout()
    assert {key: layout[key] for key in case["layout"]} == case["layout"]
    assert preflight.faults() == (
        [] if case["fault"] is None else [f"{case['fault']}; {SUPPORTED}"]
    )


def test_a_seal_needs_lvm(preflight, dom0, tools):
    dom0.pillar["ramboot"] = {"boot": {"disk": "readonly"}}
    assert preflight.faults() == []
    tools.devices = tools.devices[0]["children"]
    tools.mounts[0]["source"] = "/dev/mapper/luks-1"
    assert preflight.faults() == [
        "ramboot:boot:disk: 'readonly' seals the disk under LVM, and / is ext4 on partition;"
        " allowed: attached or detached"
    ]


def test_an_overlay_covers_no_other_subvolume(preflight, dom0, tools):
    tools.mounts = [mount("/", "/dev/sda2", "btrfs", "/root", "5eed")]
    tools.devices = [device("/dev/sda2", "part", device("/dev/sda", "disk"))]
    tools.mounts.append(mount("/mnt/backup", "/dev/sdc1", "btrfs", "/", "0ther"))
    tools.mounts.append(mount("/home", "/dev/sda2", "btrfs", "/home", "5eed"))
    assert preflight.faults() == []
    for settings in ({"boot": {"backend": "overlay"}}, {"grub": {"entries": ["overlay"]}}):
        dom0.pillar["ramboot"] = settings
        assert preflight.faults() == [
            "the backend overlay needs all of / in one btrfs subvolume, and /home is /home of it"
        ]
    tools.mounts.pop()
    assert preflight.faults() == []


@pytest.mark.parametrize(
    ("root", "covered", "beside"),
    [
        ("/dev/mapper/my--vg-root", "/dev/mapper/my--vg-pool", "/dev/mapper/my--vg--2-pool"),
        ("/dev/mapper/q-root", "/dev/mapper/q-pool", "/dev/sda2"),
        ("/dev/mapper/luks-1", "/dev/mapper/luks-1", "/dev/mapper/luks-2"),
    ],
)
def test_a_snapshot_covers_the_disk_of_the_root_alone(
    preflight, dom0, tools, root, covered, beside
):
    tools.mounts = [mount("/", root), mount("/var/lib/qubes", covered)]
    if root == "/dev/mapper/luks-1":
        tools.devices = tools.devices[0]["children"]
    dom0.pillar["ramboot"] = {"boot": {"mode": "snapshot"}}
    assert preflight.faults() == []
    tools.mounts[1]["source"] = beside
    assert preflight.faults() == [
        f"the backend snapshot would not cover /var/lib/qubes, which is on {beside}: qubes would go"
        " on writing to it"
    ]
    dom0.pillar["ramboot"] = {}
    assert preflight.faults() == []


def test_btrfs_over_two_disks_is_refused(preflight, dom0, tools):
    tools.mounts = [mount("/", "/dev/sda2", "btrfs", "/root", "5eed")]
    tools.devices = [device("/dev/sda2", "part", device("/dev/sda", "disk"))]
    dom0.write("/sys/fs/btrfs/5eed/devices/sda2")
    assert preflight.faults() == []
    dom0.write("/sys/fs/btrfs/5eed/devices/sdb")
    assert preflight.faults() == [f"/ is on btrfs over sda2 and sdb; {SUPPORTED}"]


@pytest.mark.parametrize("tool", ["findmnt", "lsblk"])
def test_a_tool_that_fails_is_a_fault_not_a_crash(preflight, dom0, tools, tool):
    tools.fails = tool
    (fault,) = preflight.faults()
    assert fault.endswith(": exit 1: no such thing")


def test_an_answer_that_is_no_json_is_a_fault(preflight, dom0, tools):
    dom0.salt["cmd.run_all"] = lambda *_a, **_k: {"retcode": 0, "stdout": "x", "stderr": ""}
    (fault,) = preflight.faults()
    assert fault.startswith("what / is cannot be read: findmnt ")


# Other devices


@pytest.mark.parametrize(
    "target",
    ["/home", "/usr", "/var", "/etc", "/var/log", "/home/user", "/usr/local", "/srv", "/tmp"],
)
def test_a_system_directory_on_another_device_is_refused(preflight, dom0, tools, target):
    tools.mounts.append(mount(target, "/dev/mapper/q-home"))
    assert preflight.faults() == [
        f"{target} is on /dev/mapper/q-home, not on the device of /: a RAM session would go on"
        " writing to it; move it to /"
    ]


@pytest.mark.parametrize(
    ("links", "refused"),
    [
        ({"home": "data/user"}, ["home leads to data/user"]),
        ({"home": "more", "more": "data"}, ["home leads to data"]),
        ({"var/log": "../data/log"}, ["var/log leads to data/log"]),
        ({"home": "srv", "bin": "usr/bin", "usr/bin/tool": "../../data/tool"}, []),
        ({"etc/grub2.cfg": "../boot/grub.cfg", "var": "database"}, []),
    ],
)
def test_a_system_directory_that_is_a_link_to_another_device_is_refused(
    preflight, dom0, tools, tmp_path, links, refused
):
    top = tmp_path / "top"
    for link, target in links.items():
        (top / link).parent.mkdir(parents=True, exist_ok=True)
        (top / link).symlink_to(target)
    known = dom0.salt["ramboot_config.defaults"]()
    system = [str(top / name) for name in ("bin", "etc", "home", "usr", "var", "none")]
    rule = {"system": system, "apart": [str(top / "boot")]}
    dom0.salt["ramboot_config.defaults"] = lambda: {**known, "mounts": rule}
    tools.mounts += [mount(str(top / "data"), "/dev/sdb1"), mount(str(top / "boot"), "/dev/sda1")]
    assert preflight.faults() == [
        f"{top}/{told.replace('leads to ', f'leads to {top}/')} on /dev/sdb1, not on the device"
        " of /: a RAM session would go on writing to it; move it to /"
        for told in refused
    ]


def test_a_zfs_dataset_is_another_device(preflight, dom0, tools):
    tools.mounts.append(mount("/home", "pool/home", "zfs"))
    assert len(preflight.faults()) == 1


@pytest.mark.parametrize(
    "other",
    [
        mount("/boot", "/dev/sda2"),
        mount("/boot/efi", "/dev/sda1", "vfat"),
        mount("/var/lib/qubes", "/dev/sdb1", "xfs"),
        mount("/var/lib/qubes/vm-templates", "/dev/sdb1", "xfs"),
        mount("/mnt/backup", "/dev/sdc1"),
        mount("/homework", "/dev/sdc1"),
        mount("/tmp", "tmpfs", "tmpfs"),
        mount("/var/spool", "/dev/mapper/q-root", fsroot="/srv/spool"),
        mount("/proc/sys/fs/binfmt_misc", None, "autofs"),
    ],
    ids=lambda item: item["target"],
)
def test_these_mounts_are_no_fault(preflight, dom0, tools, other):
    tools.mounts.append(other)
    assert preflight.faults() == []
