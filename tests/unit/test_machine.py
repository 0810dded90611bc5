# SPDX-License-Identifier: GPL-2.0-or-later
"""The VM harness itself, as far as it needs no VM."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pexpect
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vm import build, conftest, cpio, grubcfg, phases, toolbox
from vm.console import Console, ConsoleError, EmulatorError, Transcript, plain
from vm.disk import Disk
from vm.machine import CommandError, Machine

GRUB_CFG = """
set default="${saved_entry}"
menuentry 'Qubes, with Xen hypervisor' --class xen $menuentry_id_option 'xen-gnulinux-simple-1' {
	insmod part_msdos
	multiboot2	/xen-4.20-amd64.gz placeholder console=com1 dom0_mem=max:4096M  ${xen_rm_opts}
	echo	'Loading Linux ...'
	module2	/vmlinuz-6.12 placeholder root=/dev/mapper/qubes_dom0-root ro console=hvc0
	module2	--nounzip   /initrd.img-6.12
}
menuentry "Qubes in RAM (zram)" --id ramboot-zram {
	multiboot2 /xen-4.20-amd64.gz placeholder
	module2 /vmlinuz-6.12 placeholder ro ramboot=zram
}
"""


def talk(tmp_path: Path, script: str) -> Console:
    """A console with a shell script at its other end."""
    process = pexpect.spawn("/bin/sh", ["-c", script], encoding="utf-8", echo=False)
    process.delaybeforesend = None
    return Console(process, Transcript(tmp_path / "console.log"))


def machine_at(console: Console) -> Machine:
    """A machine that is already on, as far as its console goes."""
    machine = object.__new__(Machine)
    machine.name, machine._console, machine._commands, machine._mark = (
        "fake",
        console,
        0,
        time.monotonic(),
    )
    machine.base = Disk(Path("none"), "luks-thin")
    return machine


def test_a_kernel_that_stops_ends_the_wait_at_once(tmp_path: Path) -> None:
    begin = time.monotonic()
    console = talk(tmp_path, "echo 'Kernel panic - not syncing: VFS'; sleep 30")
    with pytest.raises(ConsoleError, match="kernel stopped") as caught:
        console.wait_for("login:", 25)
    assert not isinstance(caught.value, EmulatorError)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    "said",
    [
        "Oops: int3: 0000 [#1]'; echo 'Kernel panic - not syncing",
        "BUG: unable to handle page fault'; echo 'Oops: 0002 [#1] SMP",
        # all that shows once the console is quiet
        "Kernel panic - not syncing: Fatal exception in interrupt",
    ],
)
def test_an_exception_in_the_kernel_is_the_emulators(tmp_path: Path, said: str) -> None:
    console = talk(tmp_path, f"echo '{said}'")
    with pytest.raises(EmulatorError, match="kernel stopped"):
        console.wait_for("login:", 60)


EMULATED = """
import sys
sys.path[:0] = [{tests!r}]
from vm.conftest import machine, pytest_pyfunc_call
from vm.console import ConsoleError, EmulatorError
runs = []
def test_recovers():
    runs.append(1)
    if len(runs) == 1:
        raise EmulatorError("int3")
def test_does_not():
    runs.append(1)
    raise EmulatorError("int3")
def test_is_not_repeated():
    runs.append(1)
    raise ConsoleError("no")
def test_count():
    assert len(runs) == 2 + 3 + 1
"""


def test_a_test_begins_again_after_an_emulator_fault(tmp_path: Path) -> None:
    tests = str(Path(__file__).resolve().parents[1])
    head, _, body = EMULATED.format(tests=tests).partition("runs = []")
    (tmp_path / "conftest.py").write_text(head, encoding="utf-8")
    (tmp_path / "test_it.py").write_text(
        "from vm.console import ConsoleError, EmulatorError\nruns = []" + body, encoding="utf-8"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert "2 failed, 2 passed" in ran.stdout, ran.stdout + ran.stderr


def test_a_wait_that_ends_in_time_returns_the_match(tmp_path: Path) -> None:
    console = talk(tmp_path, "echo one; echo two=22")
    assert console.wait_for(r"two=(\d+)", 60, regex=True)[1] == "22"


def test_text_is_waited_for_as_it_stands(tmp_path: Path) -> None:
    console = talk(tmp_path, "echo 'Boot to RAM, yes'; echo 'Boot to RAM?'")
    console.wait_for("Boot to RAM?", 60)
    assert "yes" in console.before


def test_a_wait_without_success_says_what_was_there_instead(tmp_path: Path) -> None:
    console = talk(tmp_path, "seq 1 60; sleep 30")
    console.wait_for("60", 60)
    with pytest.raises(ConsoleError) as error:
        console.wait_for("never", 0)
    lines = str(error.value).splitlines()
    assert lines[0] == "'never' did not appear within 0 s; the console's last 40 lines:"
    assert lines[1:] == [f"    | {n}" for n in range(21, 61)]


def test_a_wait_notices_that_the_machine_stopped(tmp_path: Path) -> None:
    with pytest.raises(ConsoleError, match="'never' did not appear, the machine stopped"):
        talk(tmp_path, "echo last words").wait_for("never", 30)


def test_the_transcript_is_kept_in_a_file(tmp_path: Path) -> None:
    talk(tmp_path, "echo kept").wait_for("kept", 60)
    assert "kept" in (tmp_path / "console.log").read_text(encoding="utf-8")


def test_escape_sequences_are_not_shown() -> None:
    assert plain("\x1b[1;32mgreen\x1b[0m\x1b[2J\r\nnext") == "green\nnext"


@pytest.fixture
def shell_machine(tmp_path: Path) -> Machine:
    """A machine whose root shell is this host's."""
    if shutil.which("bash") is None:
        pytest.fail("bash is needed")
    # the real one would turn down the console of this host
    dmesg = tmp_path / "bin/dmesg"
    dmesg.parent.mkdir()
    dmesg.symlink_to("/bin/true")
    script = f"PATH={dmesg.parent}:$PATH; printf 'root@dom0:~# '; exec bash --norc --noediting -i"
    machine = machine_at(talk(tmp_path, script))
    machine.console.process.setecho(True)
    return machine


def test_commands_return_what_they_said(shell_machine: Machine) -> None:
    shell_machine.shell(60)
    assert shell_machine.succeed("echo out; echo err >&2", 60).split() == ["out", "err"]
    assert shell_machine.succeed("true", 60) == ""


def test_a_command_that_was_lost_on_the_way_is_typed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vm.machine._BEGIN_S", 1)
    # the ^C may come before bash is there
    script = "trap '' INT; read -r lost; exec bash --norc --noediting -i"
    machine = machine_at(talk(tmp_path, script))
    assert machine.succeed("echo here", 60) == "here"


@pytest.mark.parametrize("lost", ["S0", "'"])
def test_a_long_command_of_which_characters_were_lost_is_typed_again(
    shell_machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.setattr("vm.machine._BEGIN_S", 3)
    monkeypatch.setattr("vm.console.PAUSE_S", 0.02)
    monkeypatch.setattr("vm.machine._LONG", str(tmp_path / "command"))
    shell_machine.shell(60)
    send = shell_machine.console.process.send
    losses = iter([lost])

    def lossy(text: str) -> int:
        if text.startswith("printf") and (some := next(losses, "")):
            text = text.replace(some, "", 1)
        return send(text)

    shell_machine.console.process.send = lossy
    words = [f"KKK{number}" for number in range(50)]
    assert shell_machine.succeed(f"echo {' '.join(words)}", 60).split() == words
    assert next(losses, None) is None


def test_a_long_line_is_typed_in_pieces_that_fit_xens_buffer(tmp_path: Path) -> None:
    console = talk(tmp_path, "read -r line; echo got=$line")
    sent: list[str] = []
    send = console.process.send
    console.process.send = lambda text: sent.append(text) or send(text)
    console.enter("x" * 150)
    console.wait_for("got=" + "x" * 150, 60)
    assert max(map(len, sent)) <= 64
    assert "".join(sent) == "x" * 150 + "\r"


def test_a_command_that_fails_is_an_error_with_its_code_and_words(shell_machine: Machine) -> None:
    shell_machine.shell(60)
    with pytest.raises(CommandError, match=r"ended with 3: \(echo why; exit 3\)\nwhy"):
        shell_machine.succeed("(echo why; exit 3)", 60)
    assert shell_machine.fail("(echo why; exit 3)", 60) == "why"
    with pytest.raises(CommandError, match="should fail but succeeded"):
        shell_machine.fail("true", 60)


def test_a_passphrase_is_typed_at_its_prompt(tmp_path: Path) -> None:
    script = "printf '\\nPlease enter passphrase for disk luks: '; read -r p; echo \"got $p\""
    machine = machine_at(talk(tmp_path, script))
    machine.unlock(timeout_s=60)
    machine.wait_for("got labpass", 60)


def test_the_ram_question_is_read_and_answered(tmp_path: Path) -> None:
    machine = machine_at(
        talk(
            tmp_path, "printf 'Boot to RAM? zram, needs 900 MiB [y/N] '; read -r a; echo \"got $a\""
        )
    )
    assert "needs 900 MiB" in machine.at_prompt(60)
    machine.answer("y")
    machine.wait_for("got y", 60)


def test_a_machine_that_is_off_says_so(tmp_path: Path) -> None:
    machine = machine_at(talk(tmp_path, "true"))
    machine._console = None
    with pytest.raises(ConsoleError, match="the machine fake is switched off"):
        machine.succeed("true")


def test_the_menu_is_read_from_grub_cfg() -> None:
    menu = grubcfg.entries(GRUB_CFG)
    assert [(e.title, e.id) for e in menu] == [
        ("Qubes, with Xen hypervisor", "xen-gnulinux-simple-1"),
        ("Qubes in RAM (zram)", "ramboot-zram"),
    ]
    assert menu[0].linux_line == 3
    assert menu[0].linux_arguments == ["root=/dev/mapper/qubes_dom0-root", "ro", "console=hvc0"]
    assert menu[0].xen_arguments[:2] == ["console=com1", "dom0_mem=max:4096M"]


# As plymouth asks: each character that is typed draws the line anew.
ASKED_TWICE = r"""
ask() { printf 'booting\n\r\r\nPlease enter passphrase for disk luks-1::'; }
ask; read -r first
for stars in '*' '**' '***'; do
    printf '\033[2K\rPlease enter passphrase for disk luks-1::%s' "$stars"
done
sleep 2
ask; read -r second
echo "got $first and $second"
"""


def test_a_second_passphrase_waits_for_the_second_prompt(tmp_path: Path) -> None:
    console = talk(tmp_path, ASKED_TWICE)
    machine = machine_at(console)
    machine.unlock("wrong", timeout_s=60)
    machine.unlock("right", timeout_s=60)
    assert console.transcript.text().count("Please enter passphrase") == 5
    console.wait_for("got wrong and right", 60)


@pytest.mark.parametrize("wanted", ["ramboot-zram", "Qubes in RAM (zram)", "in RAM"])
def test_a_menu_entry_is_found_by_id_title_or_part_of_it(wanted: str) -> None:
    position, entry = grubcfg.find(GRUB_CFG, wanted)
    assert (position, entry.id) == (1, "ramboot-zram")


def test_a_missing_menu_entry_is_an_error_that_lists_the_menu() -> None:
    with pytest.raises(LookupError, match="no menu entry 'tmpfs'; the menu has: Qubes, with Xen"):
        grubcfg.find(GRUB_CFG, "tmpfs")


def test_an_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    if shutil.which("cpio") is None:
        pytest.fail("cpio is needed")
    (tmp_path / "file").write_bytes(b"from a file")
    data = cpio.archive({"/var/lib/hooks/one": "#!/bin/sh\n", "var/lib/two": tmp_path / "file"})
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["cpio", "-id", "--quiet"], input=data, cwd=out, check=True)
    assert (out / "var/lib/hooks/one").read_text(encoding="ascii") == "#!/bin/sh\n"
    assert (out / "var/lib/hooks/one").stat().st_mode & 0o777 == 0o755
    assert (out / "var/lib/two").read_bytes() == b"from a file"
    assert len(data) % 512 == 0


def test_a_fingerprint_follows_names_contents_and_modes(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("1", encoding="ascii")
    first = build.fingerprint(tmp_path)
    assert build.fingerprint(tmp_path) == first
    file.chmod(0o755)
    second = build.fingerprint(tmp_path)
    file.write_text("2", encoding="ascii")
    assert (
        len({first, second, build.fingerprint(tmp_path), build.fingerprint(tmp_path, extra="x")})
        == 4
    )


def test_comments_and_layout_are_no_part_of_what_a_function_does() -> None:
    class Before:
        def made(self) -> list[str]:
            return ["a", "b"]

    class Commented:
        # fmt: off
        def made(self) -> list[str]:
            # why
            return [
                "a", "b"
            ]
        # fmt: on

    class Changed:
        def made(self) -> list[str]:
            return ["a", "c"]

    assert build.code_of(Commented.made) == build.code_of(Before.made)
    assert build.code_of(Changed.made) != build.code_of(Before.made)


def _other(*_args: object, **_options: object) -> None:
    """In the place of a function whose code was changed."""


@pytest.mark.parametrize(
    ("where", "name", "value", "anew"),
    [
        (build, "_debian", _other, {"root", "tree", "initramfs", "base", "applied"}),
        (build, "_salt", _other, {"root", "initramfs", "base", "applied"}),
        (build, "SALT", "salt==3006.0", {"root", "initramfs", "base", "applied"}),
        (toolbox, "drive", _other, {"base", "applied"}),
        (cpio, "archive", _other, {"base", "applied"}),
        (build, "PASSPHRASE", "another", {"base", "applied"}),
        (build, "formula_payload", _other, {"applied"}),
        (Machine, "install_payload", _other, {"applied"}),
        (build, "_mirror", _other, set()),
        (build, "export_root", _other, set()),
        (Machine, "screenshot", _other, set()),
    ],
)
def test_a_disk_is_made_anew_when_what_makes_it_changes(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    where: object,
    name: str,
    value: object,
    anew: set[str],
) -> None:
    @contextlib.contextmanager
    def there_already(_target: Path, uses: Path | None = None) -> Iterator[None]:
        yield None

    def kept() -> dict[str, str]:
        return {
            "root": str(build.root().image),
            "tree": str(build.tree("4.2")),
            "initramfs": str(build.initramfs()),
            "base": str(build.base().path),
            "applied": str(build.applied().path),
        }

    monkeypatch.setattr(build, "_made_once", there_already)
    monkeypatch.setattr(build, "cache_dir", lambda: tmp_path)
    before = kept()
    assert kept() == before
    monkeypatch.setattr(where, name, value)
    after = kept()
    assert {disk for disk in before if after[disk] != before[disk]} == anew


def test_phases_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_SECONDS", {})
    assert phases.table() == ""
    phases.add("boot", 2.0)
    phases.add("boot", 3.5)
    phases.take({"boot": [1.0], "power off": [4.0]})
    assert [line.split() for line in phases.table().splitlines()[1:]] == [
        ["boot", "3", "6.5", "3.5"],
        ["power", "off", "1", "4.0", "4.0"],
    ]


class Item(NamedTuple):
    """What the order goes by of pytest's own."""

    path: Path
    name: str
    fixturenames: tuple[str, ...]


def test_the_files_take_turns_and_the_applied_disk_is_made_beside_what_can_do_without() -> None:
    items = [
        Item(Path(f"{file}.py"), name, fixtures)
        for file, name, fixtures in (
            ("test_new", "n1", ()),
            ("test_roots", "r1", ()),
            ("test_roots", "r2", ()),
            ("test_faults", "f1", ()),
            ("test_faults", "f2", ("applied_disk",)),
            ("test_snapshot", "s1", ("applied_disk",)),
            ("test_ram_session", "a1", ("applied_disk",)),
            ("test_ram_session", "a2", ("applied_disk",)),
        )
    ]
    conftest.pytest_collection_modifyitems(items)  # type: ignore[arg-type]
    assert [item.name for item in items] == ["a1", "f1", "r1", "n1", "s1", "r2", "a2", "f2"]


PHASES_CONFTEST = """
import sys
sys.path.insert(0, {tests!r})
from vm.conftest import pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown
"""
PHASES_TESTS = """
from vm import phases
def test_one(): phases.add("boot", 2.0)
def test_two(): phases.add("boot", 3.5)
"""


@pytest.mark.parametrize("processes", [(), ("-n", "1"), ("-n", "2")])
def test_where_the_minutes_of_all_processes_went(
    tmp_path: Path, processes: tuple[str, ...]
) -> None:
    tests = str(Path(__file__).parents[1])
    (tmp_path / "conftest.py").write_text(PHASES_CONFTEST.format(tests=tests))
    (tmp_path / "test_it.py").write_text(PHASES_TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *processes],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("boot "))
    assert row.split() == ["boot", "2", "5.5", "3.5"]


LATE = """
import sys, time
sys.path.insert(0, {tests!r})
from vm.deadline import Deadline
deadline = Deadline(time.time() + 3600)
"""
LATE_CONFTEST = """
import late
def pytest_configure(config):
    config.pluginmanager.register(late.deadline)
"""
LATE_TESTS = """
import os, signal
import late
def test_in_time(): pass
def test_fails(): assert False
def test_cut_off():
    late.deadline._at = 0
    try:
        os.kill(os.getpid(), signal.SIGALRM)
    except Exception:
        pass
def test_not_begun(): assert False
"""


@pytest.mark.parametrize("processes", [(), ("-n", "1")])
@pytest.mark.parametrize(("failing", "code"), [(False, 0), (True, 1)])
def test_after_the_deadline_nothing_begins_and_what_was_left_is_named(
    tmp_path: Path, failing: bool, code: int, processes: tuple[str, ...]
) -> None:
    (tmp_path / "late.py").write_text(LATE.format(tests=str(Path(__file__).parents[1])))
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path / "conftest.py")
    inner = tmp_path / "vm"
    inner.mkdir()
    (inner / "conftest.py").write_text(LATE_CONFTEST)
    tests = LATE_TESTS if failing else LATE_TESTS.replace("def test_fails(): assert False\n", "")
    (inner / "test_it.py").write_text(tests)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--rootdir", "."),
            *processes,
            "vm",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "RAMBOOT_NO_SKIP": "yes"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    counted = f"{'1 failed, ' if failing else ''}1 passed, 2 out of time"
    assert counted in done.stdout
    told = done.stdout.split("NOT ALL WAS RUN")[1]
    assert "vm/test_it.py::test_cut_off\nvm/test_it.py::test_not_begun\n" in told
