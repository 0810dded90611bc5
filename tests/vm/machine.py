# SPDX-License-Identifier: GPL-2.0-or-later
"""One dom0-like machine, told in the words of a person at it.

    with Machine(base(), "story", results) as dom0:
        dom0.start()
        dom0.unlock()
        dom0.at_prompt()
        dom0.answer("y")
        dom0.shell()
        assert "zram" in dom0.succeed("findmnt -no SOURCE /")
        dom0.poweroff()

Every wait has a limit in seconds; what was on the console instead is part of the error.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import pexpect

from . import build, cpio, grubcfg, phases, toolbox
from .console import Console, ConsoleError, Transcript
from .disk import PASSPHRASE, BootFiles, Disk
from .qmp import Qmp

# Limits in seconds, generous: emulation may take four times as long from one day to another.
FIRMWARE_S, PASSPHRASE_S, PROMPT_S, SHELL_S, COMMAND_S, POWEROFF_S = 180, 600, 300, 900, 300, 300
_SHELL_PROMPT = r"root@dom0:[^\n]{0,20}# ?"
_EDITOR_HEAD = 2  # GRUB's editor puts "setparams TITLE" and an empty line before the entry's own
_CHUNK = 180  # this serial line loses characters of long lines
_BEGIN_S = 60  # a shell that has read a command says so sooner
_LONG, _ATTEMPTS = "/run/vm-command", 4  # where longer commands are put together


class CommandError(AssertionError):
    """A command in the machine ended differently from what the story says."""


class Machine:
    """A machine with a throw-away copy of `disk`; it can be started again and again until it is
    closed.
    """

    def __init__(
        self,
        disk: Disk,
        name: str,
        results: Path,
        *,
        memory_mib: int = 4096,
        processors: int = 1,
        payload: Path | None = None,
        payload_writable: bool = False,
        read_only: bool = False,
        graphics: bool = False,
        clock: str | None = None,
        read_error: int | None = None,
    ) -> None:
        """`processors`: of the machine; the host emulates each by one of its own. `payload`: a file
        that becomes a second drive, read-only unless `payload_writable`. `graphics`: a screen for
        `screenshot`. `clock`: what the hardware's clock says at each power-on. `read_error`: the
        disk's 512-byte sector that can't be read.
        """
        self.name = name
        self.results = results
        self.memory_mib = memory_mib
        self._processors = processors
        self.base = disk
        self._payload = payload
        self._payload_writable = payload_writable
        self._read_only = read_only
        self._graphics = graphics
        self._clock = clock
        self._read_error = read_error
        results.mkdir(parents=True, exist_ok=True)
        # a socket's path has room for 107 bytes, and tests have long names
        self._work = Path(tempfile.mkdtemp(dir=results, prefix="."))
        self.disk = disk.overlay(self._work / "disk.qcow2")
        self._boots = 0
        self._commands = 0
        self._console: Console | None = None
        self._qmp: Qmp | None = None
        self._mark = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- power ----------------------------------------------------------------------------------

    def start(self, entry: str | None = None, arguments: str = "") -> None:
        """Switch on and boot through GRUB and Xen.

        `entry` picks a menu entry by id or title; `arguments` are added to dom0's kernel line in
        GRUB's editor, as a person would for one boot. Without either GRUB boots its default.
        """
        menu = self.disk.grub_cfg() if entry or arguments else ""
        self._power_on([])
        if menu:
            self._grub(menu, entry, arguments)

    def start_direct(
        self,
        arguments: str = "",
        *,
        xen: bool = False,
        files: Mapping[str, bytes | str | Path] | None = None,
        entry: str | None = None,
        kernel: Path | None = None,
        initrd: Path | None = None,
    ) -> None:
        """Switch on without GRUB: kernel and initramfs come from the disk's /boot as it is now.

        Quicker, and the way to try a hook: `files` (path to content) are laid over the initramfs.
        Without `xen` there is no Xen either. `kernel` and `initrd` take the place of the disk's.
        `arguments` are added to those of the menu entry (default: the first).
        """
        boot = self.boot_files()
        found = (
            grubcfg.find(boot.grub_cfg, entry)[1] if entry else grubcfg.entries(boot.grub_cfg)[0]
        )
        line = [word for word in found.linux_arguments if not word.startswith("console=")]
        # without Xen there is no hvc0, and systemd would wait 90 s for it
        line += (
            ["console=hvc0"] if xen else ["console=ttyS0", "systemd.mask=serial-getty@hvc0.service"]
        )
        line += arguments.split()
        image = self._work / "initrd"
        content = (initrd or boot.initrd).read_bytes()
        image.write_bytes(cpio.laid_over(content, files) if files else content)
        if xen:
            unpacked = self._work / "xen"
            build.gunzip(boot.xen, unpacked)
            modules = f"{boot.kernel} {' '.join(line)},{image}"
            self._power_on(
                [
                    "-kernel",
                    str(unpacked),
                    "-append",
                    " ".join(found.xen_arguments),
                    "-initrd",
                    modules,
                ]
            )
        else:
            self._power_on(
                [
                    "-kernel",
                    str(kernel or boot.kernel),
                    "-initrd",
                    str(image),
                    "-append",
                    " ".join(line),
                ]
            )

    def boot_files(self) -> BootFiles:
        """Kernel, initramfs, Xen and grub.cfg as they lie in /boot now. The machine must be off."""
        self._power_off()
        return self.disk.boot_files(self._work / "boot")

    def poweroff(self, timeout_s: float = POWEROFF_S) -> None:
        """Shut down in good order. Afterwards `written_bytes` still answers, the last write
        included.
        """
        begin = time.monotonic()
        self.console.enter("systemctl poweroff")
        self.switches_off(timeout_s)
        phases.add("power off", time.monotonic() - begin)

    def switches_off(self, timeout_s: float = POWEROFF_S) -> None:
        """Wait until the machine has switched itself off or reset itself."""
        limit = time.monotonic() + timeout_s
        while not self.qmp.wait_for_shutdown(0.2):
            self.console.drain(0.1)  # nobody else reads it, and a full line would stop the machine
            if time.monotonic() > limit:
                raise ConsoleError(
                    f"the machine did not switch off within {timeout_s:.0f} s; "
                    "the console's last lines:\n" + self.console.transcript.last_lines()
                )
        self.console.drain(0.1)

    def crash(self) -> None:
        """Cut the power: what the guest had not written yet is lost."""
        self._power_off()

    def close(self) -> None:
        """Switch off and throw the copy of the disk away; the console's text stays in `results`."""
        self._power_off()
        shutil.rmtree(self._work, ignore_errors=True)

    # --- at the console -------------------------------------------------------------------------

    @property
    def console(self) -> Console:
        """The console of the running machine."""
        if self._console is None:
            raise ConsoleError(f"the machine {self.name} is switched off")
        return self._console

    def wait_for(
        self, text: str, timeout_s: float = PROMPT_S, *, regex: bool = False
    ) -> re.Match[str]:
        """Wait until `text` is on the console, after what was waited for last."""
        return self.console.wait_for(text, timeout_s, regex=regex)

    def unlock(self, passphrase: str = PASSPHRASE, timeout_s: float = PASSPHRASE_S) -> None:
        """Wait for the passphrase prompt and type it; nothing to do where the disk is not
        encrypted.
        """
        if not self.base.encrypted:
            return
        # on a line of its own: plymouth draws the same one anew for each character that is typed
        self.wait_for(r"(?i)\n[^\n]*passphrase[^\n]*:", timeout_s, regex=True)
        self._phase("power-on to passphrase prompt")
        time.sleep(0.5)
        self.console.enter(passphrase)

    def at_prompt(self, timeout_s: float = PROMPT_S) -> str:
        """Wait for `Boot to RAM?`; returns the rest of its line as far as it has come."""
        self.wait_for("Boot to RAM?", timeout_s)
        self._phase("passphrase to Boot to RAM?")
        self.console.drain()
        return self.console.transcript.text().rsplit("Boot to RAM?", 1)[-1].splitlines()[0]

    def answer(self, text: str) -> None:
        """Type an answer and Enter."""
        self.console.enter(text)

    def shell(self, timeout_s: float = SHELL_S) -> None:
        """Wait for root's shell and make it ready for commands."""
        self.wait_for(_SHELL_PROMPT, timeout_s, regex=True)
        self._phase("last answer to root shell")
        self.console.enter(
            "dmesg -n 2; stty -echo; PS1= PS2=; export TERM=dumb PAGER=cat SYSTEMD_PAGER=cat"
        )
        self._run("export LC_ALL=C.UTF-8", COMMAND_S)

    def succeed(self, command: str, timeout_s: float = COMMAND_S) -> str:
        """Run a command in the root shell; returns what it said (both streams)."""
        code, output = self._run(command, timeout_s)
        if code != 0:
            raise CommandError(f"this should succeed but ended with {code}: {command}\n{output}")
        return output

    def fail(self, command: str, timeout_s: float = COMMAND_S) -> str:
        """Run a command that must fail; returns what it said."""
        code, output = self._run(command, timeout_s)
        if code == 0:
            raise CommandError(f"this should fail but succeeded: {command}\n{output}")
        return output

    def install_payload(self) -> None:
        """Unpack the payload drive, a tar file, from the machine's / on."""
        self.succeed("tar -xf /dev/vdb -C / && sync")

    # --- screen and keyboard --------------------------------------------------------------------

    def screenshot(self, png: Path) -> Path:
        """Save what the screen shows (a machine with `graphics`)."""
        self.qmp.command("screendump", filename=str(png.resolve()), format="png")
        return png

    def send_key(self, *keys: str) -> None:
        """Press keys on the keyboard, one after the other, in QEMU's names: "y", "ret",
        "shift-a".
        """
        for key in keys:
            pressed = [{"type": "qcode", "data": part} for part in key.split("-")]
            self.qmp.command("send-key", keys=pressed)
            time.sleep(0.15)

    # --- disk -----------------------------------------------------------------------------------

    @property
    def qmp(self) -> Qmp:
        """QEMU's control socket."""
        if self._qmp is None:
            raise ConsoleError(f"the machine {self.name} is switched off")
        return self._qmp

    def written_bytes(self) -> int:
        """Bytes written to the disk since it was switched on; after `poweroff`, to the very end."""
        stats = self.qmp.command("query-blockstats")
        return int(next(s["stats"]["wr_bytes"] for s in stats if s.get("device") == "disk"))

    def pull_disk(self) -> None:
        """Pull the disk out of the running machine."""
        self.qmp.command("device_del", id="disk-device")

    def disk_unchanged(self) -> bool:
        """Whether the whole disk still holds the bytes that it had when the machine was made. The
        machine must be off.
        """
        self._power_off()
        with phases.phase("whole disk compared"):
            return self.disk.same_as(self.base)

    def root_image(self, image: Path | None = None) -> Path:
        """The root volume, decrypted, as a raw file on the host. The machine must be off; its
        disk is not written.
        """
        self._power_off()
        return build.export_root(self.disk, image or self._work / "root.img")

    def root_checksum(self) -> str:
        """SHA-256 of the root volume. The machine must be off."""
        with self.root_image().open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    # --- inside ---------------------------------------------------------------------------------

    def _phase(self, name: str) -> None:
        now = time.monotonic()
        phases.add(name, now - self._mark)
        self._mark = now

    def _power_on(self, extra: list[str]) -> None:
        self._power_off()
        self._boots += 1
        socket = self._work / "qmp"
        socket.unlink(missing_ok=True)
        options = "if=none,id=disk,cache=unsafe,discard=unmap,"
        if self._read_error is None:
            options += f"file={self.disk.path},format=qcow2"
        else:
            options += f"driver=blkdebug,image.driver=qcow2,image.file.filename={self.disk.path}"
            options += ",inject-error.0.event=none,inject-error.0.iotype=read"
            options += f",inject-error.0.sector={self._read_error}"
        if self._read_only:
            options += ",readonly=on"
        command = [
            *(
                "-accel",
                toolbox.ACCELERATOR,
                "-cpu",
                toolbox.CPU,
                "-m",
                str(self.memory_mib),
                "-smp",
                str(self._processors),
            ),
            # without a network card, CD and floppy drives, whose drivers every boot would load
            "-nodefaults",
            *("-display", "none", "-vga", "std" if self._graphics else "none", "-serial", "stdio"),
            # Stays, stopped, when the guest switches off or resets, so that its counters can still
            # be read.
            *("-action", "reboot=shutdown,shutdown=pause"),
            *("-qmp", f"unix:{socket},server=on,wait=off"),
            *("-drive", options, "-device", "virtio-blk-pci,drive=disk,id=disk-device,bootindex=1"),
            *extra,
        ]
        if self._payload:
            options = f"file={self._payload},if=virtio,format=raw"
            options += ",cache=unsafe" if self._payload_writable else ",readonly=on"
            command += ["-drive", options]
        if self._clock:
            command += ["-rtc", f"base={self._clock}"]
        process = pexpect.spawn(
            "qemu-system-x86_64",
            command,
            encoding="utf-8",
            codec_errors="replace",
            dimensions=(50, 400),
            echo=False,
            timeout=FIRMWARE_S,
        )
        process.delaybeforesend = None
        self._console = Console(
            process, Transcript(self.results / f"{self.name}-{self._boots}.console.log")
        )
        try:
            self._qmp = Qmp(socket)
        except Exception:
            self._console.drain()
            print(self._console.transcript.last_lines())
            raise
        self._mark = time.monotonic()

    def _power_off(self) -> None:
        if self._qmp is not None:
            self._qmp.quit()
            self._qmp = None
        if self._console is not None:
            self._console.drain(1)
            self._console.process.close(force=True)
            self._console.transcript.close()
            self._console = None

    def _grub(self, menu: str, entry: str | None, arguments: str) -> None:
        position, found = grubcfg.find(menu, entry) if entry else (0, grubcfg.entries(menu)[0])
        self.wait_for("GNU GRUB", FIRMWARE_S)
        self.wait_for("executed automatically in", FIRMWARE_S)
        # ^A: first entry; ^N: next line. A new key only when the last one is drawn: the serial line
        # holds few.
        for key in ("\x01", *["\x0e"] * position):
            self.console.type(key)
            self.console.drain(0.3)
        if not arguments:
            self.console.type("\r")
            return
        self.console.type("e")
        self.wait_for("Minimum Emacs-like", FIRMWARE_S)
        self.console.drain(1)
        for key in (*["\x0e"] * (_EDITOR_HEAD + found.linux_line), "\x05", *(" " + arguments)):
            self.console.type(key)
            self.wait_for("\x1b[?25h", FIRMWARE_S)  # the cursor is shown again
        self.console.type("\x18")  # ^X: boot

    def _run(self, command: str, timeout_s: float) -> tuple[int, str]:
        self._commands += 1
        tag = f"{self._commands:04d}"
        if "\n" in command or len(command) > _CHUNK:
            self._type_in(base64.b64encode(command.encode()).decode())
            command = f'eval "$(base64 -d {_LONG})"'
        # The quotes keep the markers from matching what the terminal echoes.
        line = f"echo VM-''BEGIN-{tag}; {{ {command}; }} 2>&1 </dev/null; echo VM-''END-{tag}-$?"
        self.console.enter(line)
        try:
            self.wait_for(f"VM-BEGIN-{tag}", min(_BEGIN_S, timeout_s))
        except ConsoleError:
            if not self.console.process.isalive():
                raise
            # it has not begun: characters were lost on the way, and the shell waits for the rest
            self.console.type("\x03")
            self.console.enter(line)
            self.wait_for(f"VM-BEGIN-{tag}", timeout_s)
        match = self.wait_for(rf"VM-END-{tag}-(\d+)", timeout_s, regex=True)
        return int(match[1]), self.console.before.strip("\n")

    def _type_in(self, coded: str) -> None:
        """Make `coded` the content of the file _LONG; again, where characters were lost."""
        wanted = hashlib.md5(coded.encode(), usedforsecurity=False).hexdigest()
        for _ in range(_ATTEMPTS):
            self.console.enter(f": >{_LONG}")
            for start in range(0, len(coded), _CHUNK):
                self.console.enter(f"printf %s '{coded[start : start + _CHUNK]}' >>{_LONG}")
            if self._run(f"md5sum <{_LONG}", COMMAND_S)[1].split()[:1] == [wanted]:
                return
        raise ConsoleError(f"{_ATTEMPTS} times characters were lost of a long command")
