# SPDX-License-Identifier: GPL-2.0-or-later
"""21_ramboot under a real sh, beside a stand-in for 20_linux_xen in two dialects."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
WRAPPER = REPO / "ramboot" / "grub" / "files" / "21_ramboot"
FAKE = REPO / "tests" / "fixtures" / "grub" / "20_linux_xen"
CONFIG = "version=1\nentries=zram tmpfs\ndom0_mem_max_mib=10240\nswap=session\n"
XEN_DEFAULT = "console=none dom0_mem=min:1024M dom0_mem=max:4096M ucode=scan smt=off"


class Grub:
    """A directory of scripts, a configuration, and the environment that grub-mkconfig exports."""

    def __init__(self, root: Path, dialect: str):
        self.root = root
        self.scripts = root / "grub.d"
        self.scripts.mkdir()
        shutil.copy(FAKE, self.scripts / "20_linux_xen")
        shutil.copy(WRAPPER, self.scripts / "21_ramboot")
        self.bin = root / "bin"
        self.bin.mkdir()
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "RAMBOOT_PREFIX": str(root),
            "FAKE_GRUB": dialect,
            "GRUB_CMDLINE_LINUX": "rd.luks.uuid=luks-1 rhgb",
            "GRUB_CMDLINE_LINUX_DEFAULT": "quiet",
            "GRUB_CMDLINE_XEN_DEFAULT": XEN_DEFAULT,
        }
        self.configure(CONFIG)

    def configure(self, text: str) -> None:
        path = self.root / "etc/ramboot/grub.conf"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(self, script="21_ramboot", **environment) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["/bin/sh", str(self.scripts / script)],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def entries(self, **environment) -> list[Entry]:
        done = self.run(**environment)
        assert done.returncode == 0
        assert done.stderr == ""
        return parse(done.stdout)

    def refuses(self, reason: str, **environment) -> None:
        """Nothing on stdout, the reason on stderr, exit 0: what keeps grub-mkconfig going."""
        done = self.run(**environment)
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr == f"ramboot: no menu entries for RAM: {reason}\n"


class Entry:
    def __init__(self, line: str, submenu: str | None):
        words = shlex.split(line)
        self.title, self.id = words[1], words[words.index("$menuentry_id_option") + 1]
        self.submenu = submenu
        self.lines: list[str] = []

    def words(self, first: str, part: str) -> list[str]:
        (line,) = [
            line.split() for line in self.lines if line.split()[:1] == [first] and part in line
        ]
        return line[3:]

    @property
    def linux(self) -> list[str]:
        return self.words("module2", "/vmlinuz-")

    @property
    def xen(self) -> list[str]:
        return self.words("multiboot2", "/xen-")


def parse(text: str) -> list[Entry]:
    found: list[Entry] = []
    submenu = inside = None
    for line in text.splitlines():
        if line.strip() == "}":
            if inside:
                inside = None
            else:
                assert submenu, "a brace too many"
                submenu = None
        elif line.strip().startswith("submenu "):
            assert not submenu
            assert not inside
            submenu = shlex.split(line)[1]
        elif line.strip().startswith("menuentry "):
            assert not inside
            inside = Entry(line, submenu)
            found.append(inside)
        else:
            assert inside, f"outside of any entry: {line}"
            inside.lines.append(line)
    assert not inside
    assert not submenu
    return found


@pytest.fixture(params=["2.06", "2.12"])
def grub(request, tmp_path):
    return Grub(tmp_path, request.param)


def test_newest_kernel_is_at_the_top_and_the_others_share_one_submenu(grub):
    assert [(entry.id, entry.title, entry.submenu) for entry in grub.entries()] == [
        ("ramboot-zram-xen-gnulinux-simple-abc", "Qubes, with Xen hypervisor, in RAM (zram)", None),
        (
            "ramboot-tmpfs-xen-gnulinux-simple-abc",
            "Qubes, with Xen hypervisor, in RAM (tmpfs)",
            None,
        ),
        (
            "ramboot-zram-xen-gnulinux-6.6.9-advanced-abc",
            "Qubes, with Xen 4.19 and Linux 6.6.9, in RAM (zram)",
            "Other kernels, in RAM",
        ),
        (
            "ramboot-tmpfs-xen-gnulinux-6.6.9-advanced-abc",
            "Qubes, with Xen 4.19 and Linux 6.6.9, in RAM (tmpfs)",
            "Other kernels, in RAM",
        ),
    ]


def test_one_kernel_needs_no_submenu(grub):
    assert [entry.submenu for entry in grub.entries(FAKE_KERNELS="6.12.1")] == [None, None]


def test_linux_gets_its_backend_and_neither_resume_nor_swap(grub):
    given = "rd.luks.uuid=luks-1 resume=/dev/mapper/swap resume_offset=7 ramboot=off noresume x=y"
    found = grub.entries(GRUB_CMDLINE_LINUX=given, GRUB_CMDLINE_LINUX_DEFAULT="quiet ramboot=ask")
    assert len(found) == 4
    for entry in found:
        backend = entry.id.split("-")[1]
        assert entry.linux == [
            "root=/dev/mapper/qubes_dom0-root",
            "ro",
            "rd.luks.uuid=luks-1",
            "x=y",
            "noresume",
            "systemd.zram=0",
            f"ramboot={backend}",
            "quiet",
        ]


def test_other_arguments_keep_their_bytes(grub):
    given = 'dyndbg="file  a +p"  ramboot.disk=attached xresume=1 noresumes'
    (line,) = {
        next(line for line in entry.lines if "/vmlinuz-6.12.1" in line).replace(f"={backend}", "=B")
        for entry in grub.entries(GRUB_CMDLINE_LINUX=given, FAKE_KERNELS="6.12.1")
        for backend in [entry.id.split("-")[1]]
    }
    assert f" ro {given} noresume systemd.zram=0 ramboot=B quiet" in line


def test_swap_policy_keep_leaves_swap_on_zram(grub):
    grub.configure(CONFIG.replace("swap=session", "swap=keep"))
    assert all("systemd.zram=0" not in entry.linux for entry in grub.entries())


def test_swap_policy_keep_leaves_it_off_where_the_user_switched_it_off(grub):
    grub.configure(CONFIG.replace("swap=session", "swap=keep"))
    entry = grub.entries(GRUB_CMDLINE_LINUX="systemd.zram=0 noresume a")[0]
    assert entry.linux[2:] == ["systemd.zram=0", "a", "noresume", "ramboot=zram", "quiet"]


def test_arguments_of_ours_are_there_once_however_they_stand(grub):
    same = "noresume noresume systemd.zram=0 systemd.zram=0 resume=a noresume"
    entry = grub.entries(GRUB_CMDLINE_LINUX=same, GRUB_CMDLINE_LINUX_DEFAULT=same)[0]
    assert entry.linux[2:] == ["noresume", "systemd.zram=0", "ramboot=zram"]


def test_arguments_reach_linux_when_the_user_replaces_them_for_xen(grub):
    entries = grub.entries(
        GRUB_CMDLINE_LINUX_XEN_REPLACE="replaced resume=x",
        GRUB_CMDLINE_LINUX_XEN_REPLACE_DEFAULT="late ramboot=off",
    )
    assert entries[0].linux[2:] == [
        "replaced",
        "noresume",
        "systemd.zram=0",
        "ramboot=zram",
        "late",
    ]


def test_what_20_linux_xen_itself_adds_stays(grub):
    assert grub.entries(FAKE_SUBVOLUME="root")[0].linux[2] == "rootflags=subvol=root"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (XEN_DEFAULT, f"{XEN_DEFAULT} dom0_mem=max:10240M"),
        (
            "dom0_mem=max:2048M dom0_mem=max:4G x",
            "dom0_mem=max:2048M dom0_mem=max:4G x dom0_mem=max:10240M",
        ),
        ("a dom0_mem=max:10240M b", "a dom0_mem=max:10240M b"),
        (
            "dom0_mem=max:10240M dom0_mem=max:1G",
            "dom0_mem=max:10240M dom0_mem=max:1G dom0_mem=max:10240M",
        ),
        ("", "dom0_mem=max:10240M"),
    ],
)
def test_dom0_mem_comes_last_and_every_other_token_stays(grub, given, expected):
    found = grub.entries(GRUB_CMDLINE_XEN_DEFAULT=given)
    assert len(found) == 4
    for entry in found:
        assert entry.xen == [*expected.split(), "${xen_rm_opts}"]


def test_dom0_mem_is_left_alone_when_no_figure_is_set(grub):
    grub.configure("version=1\nentries=zram\ndom0_mem_max_mib=\nswap=off\n")
    assert grub.entries()[0].xen == [*XEN_DEFAULT.split(), "${xen_rm_opts}"]


@pytest.mark.parametrize("value", ["true", "y", "yes", "false", ""])
def test_the_users_submenu_setting_does_not_change_ours(grub, value):
    with_setting = grub.run(GRUB_DISABLE_SUBMENU=value).stdout
    assert with_setting == grub.run().stdout != ""


def test_our_entries_never_become_the_saved_default(grub):
    assert "savedefault" in grub.run("20_linux_xen", GRUB_SAVEDEFAULT="true").stdout
    assert "savedefault" not in grub.run(GRUB_SAVEDEFAULT="true").stdout


def test_a_20_linux_xen_that_always_saves_is_stripped_too(grub):
    script = grub.scripts / "20_linux_xen"
    script.write_text(script.read_text().replace('[ "$GRUB_SAVEDEFAULT" != true ] ||', ""))
    assert "savedefault" in grub.run("20_linux_xen").stdout
    done = grub.run()
    assert done.stdout.count("menuentry ") == 4
    assert "savedefault" not in done.stdout


def test_recovery_entries_and_corrections_of_old_titles_are_not_repeated(grub):
    output = grub.run(GRUB_ACTUAL_DEFAULT="Xen 4.19>old").stdout
    assert "recovery" not in output
    assert "default=" not in output


def test_ids_are_unique_where_20_linux_xen_repeats_its_own(grub):
    entries = grub.entries(FAKE_XSM="yes")
    mine = [(entry.id, "flask=enforcing" in entry.xen) for entry in entries if "zram" in entry.id]
    assert mine == [
        ("ramboot-zram-xen-gnulinux-simple-abc", False),
        ("ramboot-zram-xen-gnulinux-6.12.1-advanced-abc", True),
        ("ramboot-zram-xen-gnulinux-6.6.9-advanced-abc", False),
        ("ramboot-zram-xen-gnulinux-6.6.9-advanced-abc-2", True),
    ]


def test_titles_with_quotes_survive(grub):
    entries = grub.entries(GRUB_DISTRIBUTOR="Ada'\\''s Qubes")
    assert entries[0].title == "Ada's Qubes, with Xen hypervisor, in RAM (zram)"


def test_no_entries_asked_for_prints_nothing_and_says_nothing(grub):
    grub.configure("version=1\nentries=\ndom0_mem_max_mib=\nswap=session\n")
    assert (grub.run().stdout, grub.run().stderr) == ("", "")


def test_20_linux_xen_moved_forward_is_found(grub):
    (grub.scripts / "20_linux_xen").rename(grub.scripts / "08_linux_xen")
    assert len(grub.entries()) == 4


# Each refusal


def test_refuses_without_configuration(grub):
    (grub.root / "etc/ramboot/grub.conf").unlink()
    grub.refuses(f"{grub.root}/etc/ramboot/grub.conf cannot be read")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\x7fELF garbage\n", "not understood: \x7fELF garbage"),
        ("", "version is '', allowed: 1"),
        (CONFIG.replace("version=1", "version=2"), "version is '2', allowed: 1"),
        (
            CONFIG.replace("zram tmpfs", "zram floppy"),
            "entries has 'floppy', allowed: zram, tmpfs, image, snapshot, overlay",
        ),
        (
            CONFIG.replace("zram tmpfs", "*"),
            "entries has '*', allowed: zram, tmpfs, image, snapshot, overlay",
        ),
        (CONFIG.replace("10240", "10240M"), "dom0_mem_max_mib is '10240M', allowed: MiB"),
        (CONFIG.replace("10240", "1;reboot"), "dom0_mem_max_mib is '1;reboot', allowed: MiB"),
        (CONFIG.replace("10240", "99999999"), "dom0_mem_max_mib is '99999999', allowed: MiB"),
        (CONFIG.replace("swap=session", "swap=x"), "swap is 'x', allowed: session, off, keep"),
        (f"{CONFIG}colour=red\n", "not understood: colour=red"),
    ],
)
def test_refuses_a_configuration_that_is_not_understood(grub, text, reason):
    grub.configure(text)
    grub.refuses(f"{grub.root}/etc/ramboot/grub.conf: {reason}")


def test_refuses_when_20_linux_xen_fails_midway(grub):
    assert grub.run("20_linux_xen", FAKE_BREAK="midway").stdout != ""
    grub.refuses(f"{grub.scripts}/20_linux_xen failed: no space left", FAKE_BREAK="midway")


def test_refuses_when_20_linux_xen_prints_nothing(grub):
    grub.refuses("20_linux_xen has no entry", FAKE_BREAK="empty")


def test_refuses_an_open_brace(grub):
    grub.refuses("20_linux_xen leaves a brace open", FAKE_BREAK="unbalanced")


def test_refuses_a_surplus_brace(grub):
    grub.refuses("20_linux_xen closes more braces than it opens", FAKE_BREAK="surplus")


def test_refuses_without_20_linux_xen(grub):
    (grub.scripts / "20_linux_xen").unlink()
    grub.refuses(f"{grub.scripts} has no executable 20_linux_xen")


def test_refuses_a_20_linux_xen_that_was_switched_off(grub):
    (grub.scripts / "20_linux_xen").chmod(0o644)
    grub.refuses(f"{grub.scripts} has no executable 20_linux_xen")


def test_refuses_a_20_linux_xen_that_runs_after_it(grub):
    (grub.scripts / "20_linux_xen").rename(grub.scripts / "25_linux_xen")
    grub.refuses(f"{grub.scripts}/25_linux_xen runs after {grub.scripts}/21_ramboot")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        # a 20_linux_xen that knows none of the variables that we set
        ("ro $4", "ro fixed", "an entry of 20_linux_xen lacks ramboot=zram"),
        (
            "placeholder $5",
            "placeholder fixed",
            "an entry of 20_linux_xen lacks dom0_mem=max:10240M",
        ),
        ("ro $4", "ro $4 ramboot=off", "a foreign argument ramboot=off in"),
        ("ro $4", "ro $4 ramboot=zram", "an entry of 20_linux_xen lacks ramboot=zram"),
        (
            "/xen-4.19.gz placeholder $5",
            "/xen placeholder $5 dom0_mem=max:1G",
            "an entry of 20_linux_xen lacks dom0",
        ),
        ("\tmultiboot2\t", "\tlinux\t", "an entry of 20_linux_xen lacks a line that loads Xen"),
        ("\\$menuentry_id_option", "--unknown", "an entry of 20_linux_xen lacks an id"),
        ("menuentry '$1'", "menuentry $1", "an entry of 20_linux_xen lacks a quoted title"),
        ('$3.img" "}"', '$3.img"', "20_linux_xen leaves an entry open"),
    ],
)
def test_refuses_entries_that_are_not_what_they_are_taken_for(grub, old, new, reason):
    script = grub.scripts / "20_linux_xen"
    old = old.replace("\t", "\\t") if old.startswith("\\t") else old
    text = script.read_text()
    assert old in text
    script.write_text(text.replace(old, new))
    done = grub.run(GRUB_DISTRIBUTOR="Qubes")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith(f"ramboot: no menu entries for RAM: {reason}"), done.stderr


def test_refuses_what_grubs_own_check_refuses(grub):
    checker = grub.bin / "grub2-script-check"
    checker.write_text("#!/bin/sh\ncat >/dev/null\nexit 1\n")
    checker.chmod(0o755)
    grub.refuses("GRUB's own syntax check refuses the result")


@pytest.mark.parametrize("tool", ["awk", "sed", "mktemp"])
def test_refuses_when_a_tool_fails(grub, tool):
    broken = grub.bin / tool
    broken.write_text("#!/bin/sh\nexit 7\n")
    broken.chmod(0o755)
    done = grub.run()
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("ramboot: no menu entries for RAM: ")


def test_leaves_no_temporary_files(grub, tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    grub.run(TMPDIR=str(temporary))
    grub.run(TMPDIR=str(temporary), FAKE_BREAK="midway")
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(not shutil.which("grub-script-check"), reason="no GRUB here")
def test_grub_itself_reads_the_result(grub):
    done = subprocess.run(
        ["grub-script-check"], input=grub.run().stdout, text=True, check=False, timeout=60
    )
    assert done.returncode == 0


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox sh"])
def test_the_shell_makes_no_difference(grub, shell):
    command = shell.split()
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(
        [*command, str(grub.scripts / "21_ramboot")],
        env=grub.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == (grub.run().stdout, "")


@pytest.mark.parametrize("script", [WRAPPER, FAKE], ids=lambda path: path.name)
@pytest.mark.parametrize("command", [["shellcheck"], ["shfmt", "-d"]], ids=lambda c: c[0])
def test_scripts_are_clean(script, command):
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
