# SPDX-License-Identifier: GPL-2.0-or-later
"""grub.cfg and /etc/default/grub on a fake machine: real scripts, stand-ins for GRUB's commands."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from salt.exceptions import CommandExecutionError

REPO = Path(__file__).resolve().parents[2]
FAKES = REPO / "tests" / "fixtures" / "grub"
WRAPPER = REPO / "ramboot" / "grub" / "files" / "21_ramboot"

CFG = "/boot/grub2/grub.cfg"
EFI = "/boot/efi/EFI/qubes/grub.cfg"
DEFAULT = (
    'GRUB_DISTRIBUTOR="Qubes"\n'
    'GRUB_CMDLINE_LINUX="rd.luks.uuid=luks-1 resume=/dev/swap"\n'
    'GRUB_CMDLINE_XEN_DEFAULT="console=none dom0_mem=min:1024M dom0_mem=max:4096M"\n'
    'GRUB_CMDLINE_XEN_DEFAULT="$GRUB_CMDLINE_XEN_DEFAULT smt=off"\n'
)
BLOCK = (
    "# ramboot: begin: dom0's maximum in every entry; the state ramboot.grub.absent removes it\n"
    'GRUB_CMDLINE_XEN_DEFAULT="$GRUB_CMDLINE_XEN_DEFAULT dom0_mem=max:10240M"\n'
    "# ramboot: end\n"
)
JOINED = BLOCK.replace(
    "absent removes it\n", "absent removes it (the line above had no line end)\n"
)
GRUBENV = "# GRUB Environment Block\n"
TOKENS = "+dom0_mem=max:10240M +noresume +ramboot={} +systemd.zram=0 -resume=/dev/swap"


class Machine:
    """A dom0 with GRUB; the formula's modules loaded, the pillar in `settings`."""

    def __init__(self, world):
        self.world = world
        self.commands: list[str] = []
        self.settings = {
            "grub": {"entries": ["zram"], "dom0_mem_max_mib": 10240, "dom0_mem_scope": "entries"},
            "swap": "session",
        }
        world.salt["cmd.run_all"] = self.run_all
        world.module("ramboot_config")
        world.salt["ramboot_config.load"] = lambda: self.settings
        world.module("ramboot_record")
        # kernels whose initramfs lacks the module
        self.lacking: set[str] = set()
        world.salt["ramboot_initramfs.states"] = lambda kernel: {
            kernel: {"module": kernel not in self.lacking}
        }
        self.module = world.module("ramboot_grub")
        self.state = world.state("ramboot_grub")
        world.write("/etc/default/grub", DEFAULT)
        world.write("/boot/vmlinuz-6.12.1")
        world.write("/boot/vmlinuz-6.6.9")
        world.write("/boot/grub2/grubenv", GRUBENV.ljust(1024, "#"))
        for name in ("00_header", "20_linux_xen"):
            self.script(name, FAKES / name)
        self.command("grub2-mkconfig", (FAKES / "grub-mkconfig").read_text())
        self.command("grub2-script-check", "#!/bin/sh\nexit 0\n")
        self.command(
            "grub2-editenv",
            '#!/bin/sh\n[ "$2 $3" = "unset next_entry" ] && exec sed -i /^next_entry=/d "$1"\n',
        )
        self.command(
            "grub2-reboot",
            '#!/bin/sh\nroot=$(cd "$(dirname "$0")/../.." && pwd)\n'
            'printf "# GRUB\\nnext_entry=%s\\n" "$1" >"$root/boot/grub2/grubenv"\n',
        )
        world.write(CFG, mode=0o600)
        self.mkconfig()

    def path(self, path: str) -> Path:
        return Path(f"{self.world.root}{path}")

    def read(self, path: str) -> str:
        return self.path(path).read_text()

    def command(self, name: str, text: str) -> None:
        self.world.write(f"/usr/sbin/{name}", text, mode=0o755)

    def script(self, name: str, source: Path) -> None:
        self.world.write(f"/etc/grub.d/{name}", source.read_bytes(), mode=0o755)

    def install(self) -> None:
        """What the states before config_current lay down."""
        grub = self.settings["grub"]
        memory = "" if grub["dom0_mem_max_mib"] == "keep" else grub["dom0_mem_max_mib"]
        self.world.write(
            "/etc/ramboot/grub.conf",
            f"version=1\nentries={' '.join(grub['entries'])}\ndom0_mem_max_mib={memory}\n"
            f"swap={self.settings['swap']}\n",
        )
        self.script("21_ramboot", WRAPPER)

    def uninstall(self) -> None:
        self.path("/etc/grub.d/21_ramboot").unlink()

    def mkconfig(self, path: str = CFG) -> None:
        """As a kernel update does it."""
        subprocess.run(
            [self.path("/usr/sbin/grub2-mkconfig"), "-o", self.path(path)],
            check=True,
            capture_output=True,
        )
        self.path("/mkconfig-runs").unlink()

    @property
    def mkconfig_runs(self) -> int:
        runs = self.path("/mkconfig-runs")
        return len(runs.read_text().splitlines()) if runs.exists() else 0

    def run_all(self, cmd, python_shell, reset_system_locale, ignore_retcode):
        assert (python_shell, reset_system_locale, ignore_retcode) == (False, False, True)
        self.commands.append(os.path.basename(cmd[0]))
        done = subprocess.run(cmd, capture_output=True, text=True, check=False, timeout=60)
        return {"retcode": done.returncode, "stdout": done.stdout, "stderr": done.stderr}

    def tree(self) -> dict[str, tuple]:
        """Every file of the machine: bytes, mode, owner."""
        found = {}
        for path in sorted(self.world.root.rglob("*")):
            info = path.lstat()
            content = path.read_bytes() if path.is_file() else None
            if path.name != "mkconfig-runs":
                name = str(path).removeprefix(str(self.world.root))
                found[name] = (content, stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid)
        return found

    def ids(self, path: str = CFG) -> list[str]:
        return [entry["id"] for entry in self.module.entries(str(self.path(path)))]


@pytest.fixture
def machine(world):
    return Machine(world)


def applied(machine):
    machine.install()
    ret = machine.state.config_current("grub.cfg")
    assert ret["result"] is True, ret
    return ret


def everywhere(machine) -> None:
    machine.settings["grub"]["dom0_mem_scope"] = "all"


# /etc/default/grub


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (DEFAULT, DEFAULT + BLOCK),
        (DEFAULT.rstrip("\n"), DEFAULT + JOINED),
        ("", BLOCK),
        ("\n\n", "\n\n" + BLOCK),
        (DEFAULT + "# caf\xe9 \x85 \x0c here\n", DEFAULT + "# caf\xe9 \x85 \x0c here\n" + BLOCK),
    ],
    ids=["plain", "no line end", "empty", "blank lines", "odd bytes"],
)
def test_block_goes_to_the_end_and_comes_off_to_the_byte(machine, before, after):
    machine.world.write("/etc/default/grub", before.encode("latin-1"), mode=0o640)
    machine.path("/var/lib").mkdir(parents=True)
    was = machine.tree()
    assert machine.module.set_dom0_mem(10240) is True
    assert machine.path("/etc/default/grub").read_bytes() == after.encode("latin-1")
    assert machine.tree()["/etc/default/grub"][1:] == was["/etc/default/grub"][1:]
    assert machine.module.set_dom0_mem(10240) is False
    assert machine.module.unset_dom0_mem() is True
    assert machine.module.unset_dom0_mem() is False
    machine.module.undo(str(machine.path(CFG)))
    machine.world.salt["ramboot_record.close"]()
    assert machine.tree() == was


def test_block_takes_another_figure_in_place_of_the_old(machine):
    machine.module.set_dom0_mem(6144)
    machine.module.set_dom0_mem(10240)
    assert machine.read("/etc/default/grub") == DEFAULT + BLOCK


def test_lines_that_others_append_later_stay(machine):
    machine.world.write("/etc/default/grub", DEFAULT.rstrip("\n"))
    machine.module.set_dom0_mem(10240)
    with machine.path("/etc/default/grub").open("a") as file:
        file.write("GRUB_TIMEOUT=9\n")
    assert machine.module.set_dom0_mem(10240) is False
    machine.module.unset_dom0_mem()
    assert machine.read("/etc/default/grub") == DEFAULT + "GRUB_TIMEOUT=9\n"


@pytest.mark.parametrize(
    "line", ['GRUB_CMDLINE_XEN_DEFAULT="dom0_mem=max:1G"\n', ". /etc/default/grub.qubes\n"]
)
def test_block_moves_behind_a_later_line_that_could_undo_it(machine, line):
    line = line.replace("/etc/default/grub.qubes", "/dev/null")
    machine.world.write("/etc/default/grub", DEFAULT + BLOCK + line)
    assert machine.module.dom0_mem()["verdict"] == "shadowed"
    assert machine.module.set_dom0_mem(10240) is True
    assert machine.read("/etc/default/grub") == DEFAULT + line + BLOCK


@pytest.mark.parametrize(
    "block",
    [
        BLOCK.replace("10240M", "10240M loglvl=all"),
        BLOCK.replace("# ramboot: end", "GRUB_TIMEOUT=3\n# ramboot: end"),
        BLOCK.replace("# ramboot: end\n", ""),
        BLOCK + BLOCK,
        BLOCK.split("\n", 1)[1],
        BLOCK.replace("# ramboot: begin", "# ramboot: begin mine"),
    ],
    ids=["token added", "line added", "end gone", "twice", "begin gone", "mark changed"],
)
def test_an_edited_block_is_left_alone_and_named(machine, block):
    machine.world.write("/etc/default/grub", DEFAULT + block)
    was = machine.tree()
    assert machine.module.dom0_mem()["verdict"] == "edited"
    for action in (lambda: machine.module.set_dom0_mem(10240), machine.module.unset_dom0_mem):
        with pytest.raises(CommandExecutionError, match="not as ramboot wrote them"):
            action()
    ret = machine.state.dom0_mem_restored("/etc/default/grub")
    assert (ret["result"], ret["changes"]) == (True, {})
    assert "not as ramboot wrote them and are left alone" in ret["comment"]
    assert machine.tree() == was


def test_crlf_is_refused(machine):
    machine.world.write("/etc/default/grub", DEFAULT.replace("\n", "\r\n"))
    was = machine.tree()
    with pytest.raises(CommandExecutionError, match="has CRLF line ends"):
        machine.module.set_dom0_mem(10240)
    assert machine.tree() == was


def test_crlf_is_named_where_it_spoils_the_entries(machine):
    machine.world.write("/etc/default/grub", DEFAULT.replace("\n", "\r\n"))
    machine.install()
    was = machine.tree()
    ret = machine.state.config_current("grub.cfg")
    assert (ret["result"], ret["changes"]) == (False, {})
    assert "/etc/default/grub has CRLF line ends; " in ret["comment"]
    assert machine.tree()[CFG] == was[CFG]


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ("exit 0\n", "GRUB_CMDLINE_XEN_DEFAULT would be"),
        ('GRUB_X="open\n', "a shell fails to read it"),
        ("cat <<END\n", "GRUB_CMDLINE_XEN_DEFAULT would be"),
        ("readonly GRUB_CMDLINE_XEN_DEFAULT\n", "was left as it is"),
    ],
    ids=["exit", "open quote", "open here document", "readonly"],
)
def test_a_file_in_which_the_block_would_have_no_effect_stays(machine, last, reason):
    machine.world.write("/etc/default/grub", DEFAULT + last)
    was = machine.tree()
    with pytest.raises(CommandExecutionError, match=reason):
        machine.module.set_dom0_mem(10240)
    assert machine.tree() == was


def test_a_missing_file_is_named(machine):
    machine.path("/etc/default/grub").unlink()
    ret = machine.state.dom0_mem_all("/etc/default/grub", 10240)
    assert ret["result"] is False
    assert ret["comment"].endswith("/etc/default/grub is missing: dom0_mem can't be set there")
    assert machine.state.dom0_mem_restored("/etc/default/grub")["result"] is True


def test_a_symbolic_link_stays_one(machine):
    machine.path("/etc/default/grub").rename(machine.path("/etc/default/real"))
    machine.path("/etc/default/grub").symlink_to("real")
    machine.module.set_dom0_mem(10240)
    assert machine.path("/etc/default/grub").is_symlink()
    assert machine.read("/etc/default/real") == DEFAULT + BLOCK


def test_state_dom0_mem_all(world, test_mode):
    machine, name = Machine(world), "/etc/default/grub"
    assert machine.state.dom0_mem_all(name, 10240) == {
        "name": name,
        "result": None if test_mode else True,
        "changes": {name: {"old": None, "new": "dom0_mem=max:10240M"}},
        "comment": f"dom0_mem=max:10240M {'would be' if test_mode else 'has been'} "
        f"appended to {name}",
    }
    assert machine.read(name) == (DEFAULT if test_mode else DEFAULT + BLOCK)
    if not test_mode:
        again = machine.state.dom0_mem_all(name, 10240)
        assert (again["result"], again["changes"]) == (True, {})


def test_state_dom0_mem_restored(world, test_mode):
    machine, name = Machine(world), "/etc/default/grub"
    assert machine.state.dom0_mem_restored(name)["changes"] == {}
    machine.world.write(name, DEFAULT + BLOCK)
    assert machine.state.dom0_mem_restored(name) == {
        "name": name,
        "result": None if test_mode else True,
        "changes": {name: {"old": "dom0_mem=max:10240M", "new": None}},
        "comment": f"dom0_mem=max:10240M {'would be' if test_mode else 'has been'} "
        f"taken out of {name}",
    }
    assert machine.read(name) == (DEFAULT + BLOCK if test_mode else DEFAULT)


@pytest.mark.parametrize("verdict", ["absent", "present", "edited"])
def test_what_a_cut_in_a_write_of_default_grub_left_goes(world, test_mode, verdict):
    machine, name = Machine(world), "/etc/default/grub"
    block = {"absent": "", "present": BLOCK, "edited": BLOCK.replace("10240M", "10240M loglvl=all")}
    machine.world.write(name, DEFAULT + block[verdict])
    left = str(machine.world.write("/etc/default/.ramboot-grub.abcd_123", "half"))
    ret = machine.state.dom0_mem_restored(name)
    assert ret["result"] is (None if test_mode else True)
    assert ret["changes"][left] == {"old": "present", "new": "absent"}
    assert set(ret["changes"]) == ({left, name} if verdict == "present" else {left})
    assert ("left alone" in ret["comment"]) is (verdict == "edited")
    assert os.path.exists(left) is test_mode
    if not test_mode:
        assert machine.state.dom0_mem_restored(name)["changes"] == {}


# Which grub.cfg


def test_only_the_legacy_grub_cfg(machine):
    assert machine.module.configs() == [str(machine.path(CFG))]


def test_a_stub_on_the_esp_is_not_one(machine):
    machine.world.write(EFI, "configfile $prefix/grub.cfg\n")
    assert machine.module.configs() == [str(machine.path(CFG))]


def test_r41_has_two(machine):
    machine.world.write(EFI, machine.read(CFG))
    assert machine.module.configs() == [str(machine.path(CFG)), str(machine.path(EFI))]


def test_a_link_to_the_same_file_counts_once(machine):
    machine.path(EFI).parent.mkdir(parents=True)
    machine.path(EFI).symlink_to(machine.path(CFG))
    assert machine.module.configs() == [str(machine.path(CFG))]


def test_debian_is_the_fallback(machine):
    machine.path(CFG).rename(machine.world.write("/boot/grub/grub.cfg"))
    assert machine.module.configs() == [str(machine.path("/boot/grub/grub.cfg"))]


def test_no_grub_cfg_is_an_error(machine):
    machine.path(CFG).unlink()
    with pytest.raises(CommandExecutionError, match="no grub.cfg"):
        machine.module.configs()


# grub.cfg as the pillar wants it


def test_state_config_current(world, test_mode):
    machine = Machine(world)
    was, path = machine.tree(), str(machine.path(CFG))
    if not test_mode:
        machine.install()
    assert machine.state.config_current("grub.cfg") == {
        "name": "grub.cfg",
        "result": None if test_mode else True,
        "changes": {
            path: {
                "old": [],
                "new": [
                    f"zram, Linux 6.12.1: {TOKENS.format('zram')}",
                    f"zram, Linux 6.6.9: {TOKENS.format('zram')}",
                ],
            }
        },
        "comment": f"{'would be generated' if test_mode else 'generated'} anew: {path}",
    }
    if test_mode:
        assert machine.tree() == was
        assert machine.commands == []
    else:
        assert machine.tree()[CFG][1:] == was[CFG][1:]


@pytest.mark.parametrize(
    ("swap", "zram"), [("session", ""), ("keep", ""), ("keep", " systemd.zram=0")]
)
@pytest.mark.parametrize("scope", ["entries", "all"])
@pytest.mark.parametrize("memory", [10240, "keep"])
@pytest.mark.parametrize("backends", [["zram"], ["zram", "tmpfs"], []])
def test_the_dry_run_foretells_what_the_run_does(machine, backends, memory, scope, swap, zram):
    machine.world.write("/etc/default/grub", DEFAULT.replace("luks-1", f"luks-1{zram}"))
    machine.mkconfig()
    machine.settings["swap"] = swap
    machine.settings["grub"].update(entries=backends, dom0_mem_max_mib=memory, dom0_mem_scope=scope)
    machine.world.opts["test"] = True
    foretold = machine.state.config_current("grub.cfg")["changes"]
    machine.world.opts["test"] = False
    machine.install()
    if scope == "all" and memory != "keep":
        machine.module.set_dom0_mem(memory)
    done = machine.state.config_current("grub.cfg")
    assert done["result"] is True, done
    assert done["changes"] == foretold
    assert machine.mkconfig_runs == (1 if foretold else 0)
    assert machine.state.config_current("grub.cfg")["changes"] == {}


def test_the_dry_run_foretells_a_change_of_scope_back(machine):
    everywhere(machine)
    machine.module.set_dom0_mem(10240)
    applied(machine)
    machine.settings["grub"]["dom0_mem_scope"] = "entries"
    machine.world.opts["test"] = True
    foretold = machine.state.config_current("grub.cfg")
    machine.world.opts["test"] = False
    machine.module.unset_dom0_mem()
    done = applied(machine)
    assert done["changes"] == foretold["changes"]
    change = done["changes"][str(machine.path(CFG))]
    assert "ordinary entries: dom0_mem=max:10240M" in change["old"]
    assert "ordinary entries: dom0_mem=max:4096M" in change["new"]


def test_a_boot_that_is_read_only_is_told_with_the_file_that_stays(machine, monkeypatch):
    def read_only(**_options):
        raise OSError(30, "Read-only file system", "/boot/grub2/x")

    machine.install()
    monkeypatch.setattr(machine.module.tempfile, "mkstemp", read_only)
    # the record is on the root, which can be written
    machine.world.salt["ramboot_record.keep"] = lambda _path: {}
    monkeypatch.setitem(machine.world.salt, "ramboot_record.write", lambda _path, _content: None)
    ret = machine.state.config_current("grub.cfg")
    said = (
        f"{machine.path(CFG)} was left as it is: [Errno 30] Read-only file system: '/boot/grub2/x'"
    )
    assert (ret["result"], ret["changes"], ret["comment"]) == (False, {}, said)


def test_a_second_run_changes_nothing_and_runs_nothing(machine):
    applied(machine)
    machine.commands.clear()
    was = machine.tree()
    assert machine.state.config_current("grub.cfg") == {
        "name": "grub.cfg",
        "result": True,
        "changes": {},
        "comment": "every grub.cfg is current",
    }
    assert machine.tree() == was
    assert machine.commands == []


def test_a_kernel_update_leaves_nothing_to_do(machine):
    applied(machine)
    machine.world.write("/boot/vmlinuz-6.12.7")
    machine.mkconfig()
    assert machine.module.pending() == {}
    assert {entry["kernel"] for entry in machine.module.entries() if entry["backend"]} == {
        "6.12.7",
        "6.12.1",
        "6.6.9",
    }


def test_a_new_wrapper_makes_grub_cfg_stale(machine, monkeypatch, tmp_path):
    applied(machine)
    newer = tmp_path / "newer"
    newer.write_bytes(WRAPPER.read_bytes() + b"# newer\n")
    cached = machine.world.cache_file
    machine.world.salt["cp.cache_file"] = lambda path, saltenv="base": (
        str(newer) if path.endswith("21_ramboot") else cached(path, saltenv)
    )
    reason = "generated from other settings or another version of the wrapper"
    assert machine.module.pending() == {str(machine.path(CFG)): [reason]}
    done = applied(machine)
    assert done["changes"] == {str(machine.path(CFG)): {"old": reason, "new": "generated anew"}}


def test_entries_that_went_missing_come_back(machine):
    applied(machine)
    machine.uninstall()
    machine.mkconfig()
    assert machine.module.pending() == {str(machine.path(CFG)): ["no entry for zram"]}
    applied(machine)
    assert machine.module.pending() == {}


def test_an_entry_whose_kernel_is_not_known_does_not_hide_one_that_lacks(machine):
    applied(machine)
    with machine.path(CFG).open("a") as cfg:
        for kernel in ("own-build", "vmlinuz-6.12.7"):
            cfg.write(
                f"menuentry 'Xen' --id 'xen-gnulinux-{kernel}' {{\n"
                f"\tmultiboot2 /xen.gz\n\tmodule2 /{kernel}\n}}\n"
            )
    assert machine.module.pending() == {str(machine.path(CFG)): ["no entry for zram, Linux 6.12.7"]}


def test_both_of_r41_are_generated(machine):
    machine.world.write(EFI, machine.read(CFG), mode=0o700)
    assert set(applied(machine)["changes"]) == {str(machine.path(CFG)), str(machine.path(EFI))}
    assert machine.ids(EFI) == machine.ids(CFG)
    assert stat.S_IMODE(machine.path(EFI).stat().st_mode) == 0o700


def test_the_default_entry_stays_first(machine):
    before = machine.ids()
    applied(machine)
    ours = [id_ for id_ in machine.ids() if id_.startswith("ramboot-")]
    assert machine.ids() == [*before, *ours]
    assert len(ours) == 2


def test_entries_name_title_backend_kernel_and_path(machine):
    applied(machine)
    assert [entry for entry in machine.module.entries() if entry["backend"]] == [
        {
            "id": "ramboot-zram-xen-gnulinux-simple-abc",
            "title": "Qubes, with Xen hypervisor, in RAM (zram)",
            "backend": "zram",
            "kernel": "6.12.1",
            "path": "ramboot-zram-xen-gnulinux-simple-abc",
        },
        {
            "id": "ramboot-zram-xen-gnulinux-6.6.9-advanced-abc",
            "title": "Qubes, with Xen 4.19 and Linux 6.6.9, in RAM (zram)",
            "backend": "zram",
            "kernel": "6.6.9",
            "path": "ramboot-other>ramboot-zram-xen-gnulinux-6.6.9-advanced-abc",
        },
    ]
    ordinary = machine.module.entries()[1]
    assert ordinary["path"] == (
        "gnulinux-advanced-abc>xen-hypervisor-4.19-abc>xen-gnulinux-6.12.1-advanced-abc"
    )


# What keeps the old grub.cfg


def refused(machine, reason):
    """The state is red for that reason; grub.cfg is the old one, nothing else lies in /boot."""
    was = {path: what for path, what in machine.tree().items() if path.startswith("/boot")}
    ret = machine.state.config_current("grub.cfg")
    assert (ret["result"], ret["changes"]) == (False, {})
    assert ret["comment"].startswith(f"{machine.path(CFG)} was left as it is: "), ret
    assert reason in ret["comment"], ret
    assert was == {p: what for p, what in machine.tree().items() if p.startswith("/boot")}
    assert machine.module.pending() != {}


def test_mkconfig_fails(machine):
    machine.install()
    machine.world.write("/fail-mkconfig")
    refused(machine, "grub-mkconfig failed (exit 1): cannot write: no space left")


def test_script_check_fails(machine):
    machine.install()
    machine.command("grub2-script-check", "#!/bin/sh\necho 'line 7: bad' >&2\nexit 1\n")
    refused(machine, "grub-script-check failed (exit 1): line 7: bad")


def test_script_check_sees_the_new_file(machine):
    machine.install()
    machine.command("grub2-script-check", '#!/bin/sh\ngrep -q ramboot=zram "$1"\n')
    applied(machine)


def test_commands_are_missing(machine):
    machine.install()
    machine.path("/usr/sbin/grub2-mkconfig").unlink()
    ret = machine.state.config_current("grub.cfg")
    assert ret["result"] is False
    assert ret["comment"] == "not installed: grub2-mkconfig or grub-mkconfig"


def test_mkconfig_writes_nothing(machine):
    machine.install()
    machine.command("grub2-mkconfig", "#!/bin/sh\nexit 0\n")
    refused(machine, "no ordinary entry boots Xen")


def test_our_wrapper_refuses(machine):
    machine.install()
    machine.world.write("/etc/ramboot/grub.conf", "garbage\n")
    refused(
        machine,
        "no entry for zram; ramboot: no menu entries for RAM: "
        f"{machine.world.root}/etc/ramboot/grub.conf: not understood: garbage",
    )


def test_dom0_mem_does_not_arrive(machine):
    everywhere(machine)
    machine.install()  # but no block in /etc/default/grub
    refused(machine, "not dom0_mem=max:10240M in the ordinary entries")


def test_the_default_entry_would_change(machine):
    machine.install()
    machine.script("19_other", FAKES / "20_linux_xen")
    text = machine.read("/etc/grub.d/19_other").replace("xen-gnulinux-$2-abc", "intruder-$2")
    machine.world.write("/etc/grub.d/19_other", text, mode=0o755)
    refused(
        machine,
        "the default entry would change from 'xen-gnulinux-simple-abc' to 'intruder-simple'",
    )


def counted(machine, number):
    """A user's entry behind ours, chosen by its number."""
    machine.world.write("/etc/default/grub", f"{DEFAULT}GRUB_DEFAULT={number}\n")
    machine.world.write(
        "/etc/grub.d/40_custom",
        "#!/bin/sh\necho \"menuentry 'Windows' { chainloader +1 }\"\n",
        0o755,
    )
    machine.mkconfig()
    machine.install()


def test_a_default_that_counts_entries_is_not_moved(machine):
    counted(machine, "2")
    refused(
        machine, "GRUB_DEFAULT counts entries, and ours would move it from 'Windows' to 'ramboot"
    )


@pytest.mark.parametrize("number", ["2", "'${saved_entry}'"])
def test_a_default_that_counts_entries_is_told_before_anything_is_installed(machine, number):
    counted(machine, number)
    machine.uninstall()
    with machine.path("/boot/grub2/grubenv").open("a") as environment:
        environment.write("\nsaved_entry=2\n")
    was = machine.tree()
    (fault,) = machine.module.faults()
    assert fault == (
        f"{machine.path(CFG)}: GRUB_DEFAULT counts entries, and ours would move it from 'Windows' "
        "to 'ramboot-entry'; set GRUB_DEFAULT to an id"
    )
    assert (machine.tree(), machine.mkconfig_runs) == (was, 1)
    machine.settings["grub"]["entries"] = []
    assert machine.module.faults() == []


@pytest.mark.parametrize("line", ["set default=2", "set default='2'", 'set default="2"'])
def test_a_default_that_the_user_sets_last_is_the_one_that_counts(machine, line):
    counted(machine, "0")
    with machine.path("/etc/grub.d/40_custom").open("a") as script:
        script.write(f"cat <<'END'\n{line}\nEND\n")
    machine.uninstall()
    machine.mkconfig()
    assert "would move it from 'Windows'" in machine.module.faults()[0]
    machine.install()
    refused(machine, "would move it from 'Windows'")


def test_where_entries_can_be_made_there_is_no_fault(machine):
    assert machine.module.faults() == []
    applied(machine)
    machine.settings["grub"]["entries"] = ["zram", "tmpfs"]
    assert machine.module.faults() == []


def by_hand(machine):
    # the second is what our block will add to every entry
    text = machine.read(CFG).replace(" ro ", " ro nomodeset ")
    machine.world.write(CFG, text.replace("smt=off", "smt=off dom0_mem=max:10240M"))
    everywhere(machine)
    return "ordinary entries would lose nomodeset; "


def another_default(machine):
    machine.script("19_other", FAKES / "20_linux_xen")
    text = machine.read("/etc/grub.d/19_other").replace("xen-gnulinux-$2-abc", "intruder-$2")
    machine.world.write("/etc/grub.d/19_other", text, mode=0o755)
    return "the default entry would change from 'xen-gnulinux-simple-abc' to 'intruder-simple'"


def failing(machine):
    machine.world.write("/fail-mkconfig")
    return "grub-mkconfig failed (exit 1): cannot write: no space left"


@pytest.mark.parametrize("spoil", [by_hand, another_default, failing])
def test_what_refuses_a_new_grub_cfg_is_told_before_anything_is_installed(machine, spoil):
    reason = spoil(machine)
    was = machine.tree()
    (fault,) = machine.module.faults()
    assert fault.startswith(f"{machine.path(CFG)} was left as it is: {reason}")
    assert machine.tree() == was
    machine.settings["grub"] |= {"entries": [], "dom0_mem_scope": "entries"}
    assert machine.module.faults() == []
    assert machine.mkconfig_runs == 1


def test_a_trial_runs_once_for_all_and_where_something_is_to_be_generated(machine):
    machine.world.write(EFI, machine.read(CFG))
    assert machine.module.faults() == machine.module.faults() == []
    assert machine.commands == ["grub2-mkconfig", "grub2-script-check"]
    applied(machine)
    machine.commands.clear()
    assert machine.module.faults() == []
    # one that we made has nothing to lose
    machine.settings["grub"]["entries"] = ["zram", "tmpfs"]
    assert machine.module.faults() == []
    assert machine.commands == []
    # after a kernel update, with another pillar
    machine.world.write("/boot/vmlinuz-6.13.0")
    machine.install()
    machine.mkconfig()
    machine.settings["grub"]["entries"] = ["zram"]
    assert machine.module.faults() == []
    assert machine.commands == ["grub2-mkconfig", "grub2-script-check"]


def test_a_missing_grub_cfg_is_a_fault(machine):
    machine.path(CFG).unlink()
    assert machine.module.faults()[0].startswith("no grub.cfg: ")


def recorded(machine):
    """As ramboot.installed lays them down."""
    paths = [machine.path(path) for path in ("/etc/ramboot/grub.conf", "/etc/grub.d/21_ramboot")]
    for path in paths:
        machine.world.salt["ramboot_record.keep"](str(path))
    machine.install()
    for path in paths:
        machine.world.salt["ramboot_record.seal"](str(path))


def test_a_refusal_takes_back_what_would_make_the_entries_at_the_next_kernel_update(machine):
    counted(machine, "2")
    machine.uninstall()
    shutil.rmtree(machine.path("/etc/ramboot"))
    everywhere(machine)
    was = machine.tree()
    recorded(machine)
    machine.module.set_dom0_mem(10240)
    ret = machine.state.config_current("grub.cfg")
    assert (ret["result"], ret["changes"]) == (False, {})
    wrapper, conf, default = (
        machine.path(path)
        for path in ("/etc/grub.d/21_ramboot", "/etc/ramboot/grub.conf", "/etc/default/grub")
    )
    assert ret["comment"].endswith(f"; taken back: {wrapper}, {conf}, {default}"), ret
    now = {path: what for path, what in machine.tree().items() if not path.startswith("/var")}
    assert now == was
    machine.mkconfig()
    assert machine.ids()[-1] == "Windows"


def test_a_refusal_takes_nothing_back_from_a_menu_that_has_entries_of_ours(machine):
    recorded(machine)
    applied(machine)
    machine.settings["grub"]["entries"] = ["tmpfs"]  # but the wrapper's settings stay as they are
    ret = machine.state.config_current("grub.cfg")
    assert ret["result"] is False
    assert "taken back" not in ret["comment"]
    assert machine.path("/etc/grub.d/21_ramboot").exists()


def test_what_was_set_in_grub_cfg_by_hand_is_not_lost(machine):
    def edit(word):
        text = machine.read(CFG)
        machine.world.write(CFG, text.replace(" ro ", f" ro {word} ").replace("smt=off", "smt=0"))

    edit("nomodeset")
    machine.install()
    said = (
        f"ordinary entries would lose nomodeset smt=0; set that in "
        f"{machine.path('/etc/default/grub')}, or run grub-mkconfig once yourself"
    )
    refused(machine, said)
    machine.mkconfig()
    applied(machine)
    edit("pci=noaer")
    machine.uninstall()
    machine.world.write("/boot/vmlinuz-6.12.7")
    was = machine.read(CFG)
    ret = machine.state.config_restored("grub.cfg")
    assert ret["result"] is False
    assert "would lose pci=noaer smt=0" in ret["comment"]
    assert machine.read(CFG) == was


def test_what_we_set_in_every_entry_is_not_taken_for_the_users(machine):
    everywhere(machine)
    machine.module.set_dom0_mem(10240)
    applied(machine)
    machine.settings["grub"]["dom0_mem_max_mib"] = 6144
    machine.module.set_dom0_mem(6144)
    applied(machine)
    machine.settings["grub"]["dom0_mem_scope"] = "entries"
    machine.module.unset_dom0_mem()
    applied(machine)
    assert "dom0_mem=max:4096M" in machine.module.describe(str(machine.path(CFG)))[0]


def test_a_default_by_title_may_stand_behind_ours(machine):
    counted(machine, "Windows")
    applied(machine)


def test_a_default_inside_a_submenu_may_be_counted(machine):
    counted(machine, "'1>0>2'")
    applied(machine)


def test_a_saved_default_is_looked_up(machine):
    counted(machine, "'${saved_entry}'")
    machine.world.write("/boot/grub2/grubenv", f"{GRUBENV}saved_entry=2\n")
    refused(machine, "GRUB_DEFAULT counts entries")


def test_one_of_ours_may_be_the_default_by_the_users_choice(machine):
    applied(machine)
    machine.world.write(
        "/etc/default/grub", f"{DEFAULT}GRUB_DEFAULT=ramboot-zram-xen-gnulinux-simple-abc\n"
    )
    machine.mkconfig()
    machine.settings["grub"]["entries"] = ["zram", "tmpfs"]
    applied(machine)


def test_a_full_disk_at_the_rename(machine, monkeypatch):
    machine.install()

    def full(source, target):
        if str(target) == str(machine.path(CFG)):
            raise OSError(28, "No space left on device")
        real(source, target)

    real = os.rename
    monkeypatch.setattr(os, "rename", full)
    refused(machine, "No space left on device")


def cut_off_before_the_seal(machine) -> None:
    machine.install()
    seal = machine.world.salt["ramboot_record.seal"]

    def cut(path):
        raise CommandExecutionError("cut off")

    machine.world.salt["ramboot_record.seal"] = cut
    assert machine.state.config_current("grub.cfg")["result"] is False
    machine.world.salt["ramboot_record.seal"] = seal


def test_a_run_cut_off_before_the_seal_is_finished_by_the_next(machine):
    cut_off_before_the_seal(machine)
    was = machine.read(CFG)
    assert "ramboot=zram" in was
    assert machine.state.config_current("grub.cfg")["result"] is True
    assert machine.module.pending() == {}


@pytest.mark.parametrize("then", [None, 6144])
def test_what_a_run_cut_off_set_in_every_entry_is_not_taken_for_the_users(machine, then):
    everywhere(machine)
    machine.module.set_dom0_mem(10240)
    cut_off_before_the_seal(machine)
    assert "dom0_mem=max:10240M" in machine.module.describe(str(machine.path(CFG)))[0]
    if then:
        machine.settings["grub"]["dom0_mem_max_mib"] = then
        machine.module.set_dom0_mem(then)
    else:
        machine.settings["grub"]["dom0_mem_scope"] = "entries"
        machine.module.unset_dom0_mem()
    applied(machine)
    assert f"dom0_mem=max:{then or 4096}M" in machine.module.describe(str(machine.path(CFG)))[0]


@pytest.mark.parametrize("then", ["absent", "entries"])
def test_a_block_that_a_kernel_update_took_up_before_grub_cfg_was_made_is_ours(machine, then):
    """The run that wrote it was cut off."""
    everywhere(machine)
    machine.module.set_dom0_mem(10240)
    machine.mkconfig()
    assert "dom0_mem=max:10240M" in machine.read(CFG)
    machine.module.unset_dom0_mem()
    if then == "absent":
        assert machine.state.config_restored("grub.cfg")["result"] is True
    else:
        machine.settings["grub"]["dom0_mem_scope"] = "entries"
        applied(machine)
    assert "dom0_mem=max:4096M" in machine.module.describe(str(machine.path(CFG)))[0]


@pytest.mark.parametrize("then", ["absent", "other entries"])
def test_what_the_user_took_out_of_default_grub_is_not_lost_with_a_grub_cfg_of_ours(machine, then):
    """grub-mkconfig was not run since."""
    applied(machine)
    text = machine.read("/etc/default/grub")
    machine.world.write("/etc/default/grub", text.replace(" resume=/dev/swap", ""))
    assert machine.read("/etc/default/grub") != text
    if then == "absent":
        machine.uninstall()
        assert machine.state.config_restored("grub.cfg")["result"] is True
    else:
        machine.settings["grub"]["entries"] = ["zram", "tmpfs"]
        applied(machine)
    assert "resume=/dev/swap" not in machine.read(CFG)


# Undo


def test_state_config_restored(world, test_mode):
    machine = Machine(world)
    was, path = machine.tree(), str(machine.path(CFG))
    machine.world.opts["test"] = False
    applied(machine)
    before = machine.module.describe(path)
    machine.uninstall()
    shutil.rmtree(machine.path("/etc/ramboot"))
    machine.world.opts["test"] = test_mode
    assert machine.state.config_restored("grub.cfg") == {
        "name": "grub.cfg",
        "result": None if test_mode else True,
        "changes": {path: {"old": before, "new": "the original"}},
        "comment": f"{'would be restored' if test_mode else 'restored'}: {path}",
    }
    if not test_mode:
        assert machine.mkconfig_runs == 1
        machine.world.salt["ramboot_record.close"]()
        now = {name: what for name, what in machine.tree().items() if not name.startswith("/var")}
        assert now == was
        assert not machine.path("/var/lib/ramboot").exists()
        assert machine.state.config_restored("grub.cfg")["changes"] == {}


def test_a_machine_that_never_had_us(world, test_mode):
    machine = Machine(world)
    was = machine.tree()
    assert machine.state.config_restored("grub.cfg") == {
        "name": "grub.cfg",
        "result": True,
        "changes": {},
        "comment": "no grub.cfg to restore",
    }
    assert (machine.tree(), machine.commands) == (was, [])


def test_a_machine_without_grub(machine):
    machine.path(CFG).unlink()
    assert machine.state.config_restored("grub.cfg")["result"] is True


def test_after_a_kernel_update_grub_cfg_is_generated_not_taken_from_the_past(machine):
    applied(machine)
    machine.world.write("/boot/vmlinuz-6.12.7")
    machine.path("/boot/vmlinuz-6.6.9").unlink()
    machine.mkconfig()
    machine.uninstall()
    path = str(machine.path(CFG))
    done = machine.state.config_restored("grub.cfg")
    assert done["changes"][path]["new"] == "generated anew without ramboot"
    assert {entry["kernel"] for entry in machine.module.entries()} == {"6.12.7", "6.12.1"}
    assert "ramboot" not in re.sub(r"### (BEGIN|END) .* ###", "", machine.read(CFG))


@pytest.mark.parametrize(
    "what", ["/etc/default/grub", "/boot/vmlinuz-7.1", "/etc/grub.d/40_custom"]
)
def test_changed_surroundings_forbid_the_old_bytes(machine, what):
    applied(machine)
    machine.world.write(what, f"{DEFAULT}GRUB_TIMEOUT=3\n" if "default" in what else "#!/bin/sh\n")
    machine.uninstall()
    assert machine.module.undo_actions() == {str(machine.path(CFG)): "generated"}
    assert machine.state.config_restored("grub.cfg")["result"] is True
    assert machine.mkconfig_runs == 2


def test_a_second_apply_after_a_kernel_update_does_not_bring_the_first_original_back(machine):
    applied(machine)
    machine.world.write("/boot/vmlinuz-6.12.7")
    machine.mkconfig()
    machine.settings["grub"]["entries"] = ["tmpfs"]
    applied(machine)
    machine.uninstall()
    assert machine.module.undo_actions() == {str(machine.path(CFG)): "generated"}


def test_a_grub_cfg_with_our_entries_is_no_original(machine):
    machine.install()
    machine.mkconfig()  # a kernel update between the wrapper's arrival and our own run
    machine.settings["grub"]["entries"] = ["tmpfs"]
    applied(machine)
    machine.uninstall()
    assert machine.state.config_restored("grub.cfg")["result"] is True
    assert not [id_ for id_ in machine.ids() if id_.startswith("ramboot-")]


def test_a_half_done_apply_is_undone(machine):
    machine.install()
    machine.mkconfig()  # our entries arrived, nothing is recorded
    machine.uninstall()
    assert machine.state.config_restored("grub.cfg")["result"] is True
    assert not [id_ for id_ in machine.ids() if id_.startswith("ramboot-")]


def test_generating_needs_the_wrapper_gone(machine):
    applied(machine)
    machine.mkconfig()
    machine.world.write("/boot/vmlinuz-6.12.7")
    was = machine.tree()
    ret = machine.state.config_restored("grub.cfg")
    assert (ret["result"], ret["changes"]) == (False, {})
    wrapper = machine.path("/etc/grub.d/21_ramboot")
    assert ret["comment"] == f"{machine.path(CFG)} was left as it is: {wrapper} is still there"
    assert machine.tree() == was


def test_dom0_mem_for_all_leaves_grub_cfg_too(machine):
    everywhere(machine)
    machine.settings["grub"]["entries"] = []
    machine.module.set_dom0_mem(10240)
    applied(machine)
    assert machine.read(CFG).count("dom0_mem=max:10240M") == 3
    machine.mkconfig()
    machine.world.write("/boot/vmlinuz-7.1")
    machine.uninstall()
    machine.module.unset_dom0_mem()
    assert machine.state.config_restored("grub.cfg")["result"] is True
    assert "dom0_mem=max:10240M" not in machine.read(CFG)


@pytest.mark.parametrize("leftover", [".ramboot-grub.x1_z.tmp", ".ramboot-grub.x1_z.tmp.new"])
def test_what_a_power_cut_left_of_the_first_grub_mkconfig_is_named(world, test_mode, leftover):
    machine = Machine(world)
    left = str(machine.world.write(f"/boot/grub2/{leftover}", "half"))
    assert machine.state.config_restored("grub.cfg") == {
        "name": "grub.cfg",
        "result": None if test_mode else True,
        "changes": {left: {"old": "present", "new": "absent"}},
        "comment": f"{'would be ' if test_mode else ''}removed: {left}",
    }
    assert os.path.exists(left) is test_mode


@pytest.mark.parametrize("leftover", [".ramboot-grub.x1_z.tmp", ".ramboot-grub.x1_z.tmp.new"])
def test_what_a_power_cut_left_of_grub_mkconfig_goes(machine, leftover):
    machine.world.write(f"/boot/grub2/{leftover}", "half")
    applied(machine)
    assert not machine.path(f"/boot/grub2/{leftover}").exists()
    machine.world.write(f"/boot/grub2/{leftover}", "half")
    machine.uninstall()
    assert machine.state.config_restored("grub.cfg")["result"] is True
    assert not machine.path(f"/boot/grub2/{leftover}").exists()


def test_a_choice_for_the_next_boot_goes_with_its_entry(machine):
    machine.settings["grub"]["entries"] = ["zram", "tmpfs"]
    applied(machine)
    machine.module.once("tmpfs")
    machine.settings["grub"]["entries"] = ["tmpfs"]
    applied(machine)
    assert "next_entry=ramboot-tmpfs" in machine.read("/boot/grub2/grubenv")
    machine.settings["grub"]["entries"] = ["zram"]
    applied(machine)
    assert "next_entry" not in machine.read("/boot/grub2/grubenv")
    machine.world.write("/boot/grub2/grubenv", GRUBENV.ljust(1024, "#"))
    machine.module.once("zram")
    machine.uninstall()
    assert machine.state.config_restored("grub.cfg")["result"] is True
    assert "next_entry" not in machine.read("/boot/grub2/grubenv")


def test_a_choice_goes_where_the_entries_have_gone_already(world, test_mode):
    machine = Machine(world)
    path = str(machine.path(CFG))
    machine.world.write("/boot/grub2/grubenv", f"{GRUBENV}next_entry=other>ramboot-zram-x\n")
    ret = machine.state.config_restored("grub.cfg")
    assert ret["result"] is (None if test_mode else True)
    assert ret["changes"][path]["new"] == "without the choice of the next boot"
    assert ("next_entry" in machine.read("/boot/grub2/grubenv")) is test_mode
    machine.world.write("/boot/grub2/grubenv", f"{GRUBENV}next_entry=Windows\n")
    assert machine.state.config_restored("grub.cfg")["changes"] == {}
    assert "next_entry=Windows" in machine.read("/boot/grub2/grubenv")


# One-shot boot


def test_once_takes_the_newest_entry_of_the_backend(machine):
    machine.settings["grub"]["entries"] = ["zram", "tmpfs"]
    applied(machine)
    entry = machine.module.once("tmpfs")
    assert (entry["id"], entry["kernel"]) == ("ramboot-tmpfs-xen-gnulinux-simple-abc", "6.12.1")
    assert "next_entry=ramboot-tmpfs-xen-gnulinux-simple-abc\n" in machine.read(
        "/boot/grub2/grubenv"
    )


def refuses_once(machine, backend, reason):
    was = machine.tree()
    with pytest.raises(CommandExecutionError, match=reason):
        machine.module.once(backend)
    assert machine.tree() == was
    assert "grub2-reboot" not in machine.commands


def test_once_without_such_an_entry(machine):
    refuses_once(machine, "zram", "no menu entry for zram; backends that have one: none")
    applied(machine)
    refuses_once(machine, "tmpfs", "no menu entry for tmpfs; backends that have one: zram")


def test_once_with_a_kernel_whose_initramfs_would_ask_nothing(machine):
    applied(machine)
    machine.lacking = {"6.12.1"}
    refuses_once(machine, "zram", "the initramfs of Linux 6.12.1 has no ramboot in it")


def test_once_with_a_grub_cfg_that_ignores_next_entry(machine):
    applied(machine)
    machine.world.write(CFG, machine.read(CFG).replace("next_entry", "other_entry"))
    refuses_once(machine, "zram", "does not look at next_entry")


def test_once_without_an_environment_block(machine):
    applied(machine)
    machine.path("/boot/grub2/grubenv").unlink()
    machine.command("grub2-editenv", "#!/bin/sh\n")
    refuses_once(machine, "zram", "grubenv is missing or not 1024 bytes long; create it with: ")


@pytest.mark.parametrize("name", ["kexec.sig", "kexec_default.1.txt", "kexec_default_hashes.txt"])
def test_once_where_the_firmware_runs_no_grub(machine, name):
    applied(machine)
    machine.world.write(f"/boot/{name}")
    refuses_once(machine, "zram", f"/boot/{name} is of the firmware Heads, which runs no GRUB: ")


def test_once_where_grub_cannot_write(machine):
    applied(machine)
    machine.command(
        "grub2-probe", '#!/bin/sh\n[ "$1" = --target=abstraction ] && echo lvm || echo ext2\n'
    )
    refuses_once(machine, "zram", "is on lvm, where GRUB cannot write")


def test_once_where_grub_can_write(machine):
    applied(machine)
    machine.command("grub2-probe", '#!/bin/sh\n[ "$1" = --target=fs ] && echo ext2 || echo\n')
    assert machine.module.once("zram")["backend"] == "zram"


def test_once_that_had_no_effect_is_an_error(machine):
    applied(machine)
    machine.command("grub2-reboot", "#!/bin/sh\nexit 0\n")
    with pytest.raises(CommandExecutionError, match="does not hold next_entry=ramboot-zram"):
        machine.module.once("zram")


def test_once_with_two_grub_cfg_needs_both_environments(machine):
    machine.world.write(EFI, machine.read(CFG))
    applied(machine)
    machine.world.write("/boot/efi/EFI/qubes/grubenv", GRUBENV.ljust(1024, "#"))
    machine.command("grub2-editenv", '#!/bin/sh\n[ "$2 $3" = "unset next_entry" ] && : >"$1"\n')
    with pytest.raises(CommandExecutionError, match="EFI/qubes/grubenv does not hold next_entry"):
        machine.module.once("zram")
    # the next boot stays as it was, whichever of them starts the machine
    assert "next_entry" not in machine.read("/boot/grub2/grubenv")
