# SPDX-License-Identifier: GPL-2.0-or-later
"""A stand-in for dracut and lsinitrd at the module's one seam, `cmd.run_all`.

An image is JSON: {path: [mode, text]}. dracut builds one from what is on disk, as the real module
does; lsinitrd reads it with cpio's patterns. A command that is none of these fails the test.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
from pathlib import Path
from unittest.mock import create_autospec

FILES = {
    "module-setup.sh": ("0755", "/usr/lib/ramboot/module-setup.sh", "setup\n"),
    "ramboot-lib.sh": ("0644", "/usr/lib/ramboot/ramboot-lib.sh", "lib\n"),
    "ramboot-initramfs.sh": ("0755", "/usr/bin/ramboot-initramfs", "run\n"),
    "hooks/pre-mount.sh": ("0755", "/usr/lib/ramboot/hooks/pre-mount.sh", "hook\n"),
}
CONF = "etc/ramboot/ramboot.conf"
PROGRAMS = ("usr/bin/lvm", "usr/bin/dmsetup", "usr/lib/systemd/systemd-cryptsetup")


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def run_all(
    cmd, cwd=None, python_shell=None, timeout=None, ignore_retcode=None, output_loglevel=""
):
    """The part of Salt's cmd.run_all that may be used."""


class Machine:
    """dom0 with kernels 6.1.0 and 6.12.0, whose images have LUKS and LVM but not our module."""

    kernels = ("6.1.0", "6.12.0")

    def __init__(self, world):
        self.world = world
        self.commands: list[list[str]] = []
        self.run_all = create_autospec(run_all, side_effect=self._run)
        # how the next runs of dracut go wrong: called with the image (dict), the target, may return
        # what cmd.run_all returns
        self.dracut_fault = None
        for kernel in self.kernels:
            world.write(f"/usr/lib/modules/{kernel}/modules.dep")
            world.write(f"/boot/vmlinuz-{kernel}", "kernel")
            self.put(kernel, self.stock(kernel))
        for name in ("90crypt", "90lvm", "99base"):
            world.write(f"/usr/lib/dracut/modules.d/{name}/module-setup.sh")
        world.write("/usr/bin/lsinitrd", mode=0o755)
        (world.root / "var/lib").mkdir(parents=True, exist_ok=True)

    # what is on the machine

    def image(self, kernel) -> Path:
        return Path(f"{self.world.root}/boot/initramfs-{kernel}.img")

    def put(self, kernel, content):
        self.world.write(f"/boot/initramfs-{kernel}.img", json.dumps(content), mode=0o600)

    def inside(self, kernel):
        return json.loads(self.image(kernel).read_text())

    def stock(self, kernel):
        found = {path: ["0755", "elf"] for path in PROGRAMS}
        found["usr/lib/dracut/modules.txt"] = ["0644", "base\ncrypt\nlvm\n"]
        found[f"usr/lib/modules/{kernel}/modules.dep"] = ["0644", ""]
        return found

    def module(self, conf="version=1\n", **texts):
        """Our module and configuration on disk, with their manifest; texts: other content."""
        lines = []
        for name, (mode, inside, text) in FILES.items():
            text = texts.get(name, text)
            path = f"/usr/lib/dracut/modules.d/50ramboot/{name}"
            self.world.write(path, text, mode=int(mode, 8))
            lines.append(f"{sha(text)}  {mode}  {path}  {inside}")
        conf_path = "/etc/dracut.conf.d/50-ramboot.conf"
        self.world.write(conf_path, "add\n")
        lines.append(f"{sha('add' + chr(10))}  0644  {conf_path}  -")
        self.world.write(
            "/usr/lib/dracut/modules.d/50ramboot/manifest", "# comment\n" + "\n".join(lines) + "\n"
        )
        self.world.write(f"/{CONF}", conf)

    def no_module(self):
        for path in (self.world.root / "usr/lib/dracut/modules.d/50ramboot").rglob("*"):
            if path.is_file():
                path.unlink()
        (self.world.root / CONF).unlink(missing_ok=True)

    def remove_kernel(self, kernel):
        """As its package does."""
        self.image(kernel).unlink()
        (self.world.root / f"boot/vmlinuz-{kernel}").unlink()
        shutil.rmtree(self.world.root / f"usr/lib/modules/{kernel}")

    def unmount_boot(self):
        (self.world.root / "boot").rename(self.world.root / "its-boot")
        (self.world.root / "boot").mkdir()

    def mount_boot(self):
        (self.world.root / "boot").rmdir()
        (self.world.root / "its-boot").rename(self.world.root / "boot")

    def built(self, kernel):
        """The image that dracut makes from what is on disk now."""
        content = self.stock(kernel)
        module = self.world.root / "usr/lib/dracut/modules.d/50ramboot"
        if not (module / "module-setup.sh").exists():
            return content
        content["usr/lib/dracut/modules.txt"][1] += "ramboot\n"
        for name, (mode, inside, _text) in FILES.items():
            if inside != "-":
                content[inside.lstrip("/")] = [mode, (module / name).read_text()]
        conf = self.world.root / CONF
        if conf.exists():
            content[CONF] = ["0644", conf.read_text()]
        self.stamp(content)
        content["usr/lib/ramboot/estimate"] = ["0644", "1"]
        return content

    def stamp(self, content):
        ours = [path for path in content if "ramboot" in path and not path.endswith("estimate")]
        text = "".join(f"{sha(content[path][1])}  {path}\n" for path in sorted(ours))
        content["usr/lib/ramboot/stamp"] = ["0644", text]

    # the commands

    def _run(self, cmd, cwd=None, python_shell=None, timeout=None, **_options):
        assert python_shell is False
        assert timeout
        self.commands.append([os.path.basename(part) if part[0] == "/" else part for part in cmd])
        if cmd[:3] == ["dracut", "--force", "--kver"]:
            return self._dracut(*cmd[3:])
        if cmd[:2] == ["lsinitrd", "-f"]:
            return self._read(*cmd[2:])
        if cmd[:2] == ["lsinitrd", "--unpack"]:
            return self._unpack(cmd[2], cmd[3:], Path(cwd))
        raise AssertionError(f"not expected: {cmd}")

    def _dracut(self, kernel, target):
        assert os.path.basename(target).startswith("."), "a boot loader would find it"
        content = self.built(kernel)
        if self.dracut_fault:
            done = self.dracut_fault(content, Path(target))
            if done is not None:
                return done
        Path(target).write_text(json.dumps(content))
        return answer()

    def _read(self, path, image):
        try:
            content = json.loads(Path(image).read_text())
        except ValueError:
            return answer(1, stderr="cpio: premature end of archive")
        return answer(stdout=content.get(path, ["", ""])[1])

    def _unpack(self, image, patterns, target):
        try:
            content = json.loads(Path(image).read_text())
        except ValueError:
            return answer(2, stderr="cpio: premature end of archive")
        for path, (mode, text) in content.items():
            if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
                file = target / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
                file.chmod(int(mode, 8))
        return answer()

    def runs_of(self, name):
        return [command for command in self.commands if command[0] == name]


def answer(retcode=0, stdout="", stderr=""):
    return {"pid": 1, "retcode": retcode, "stdout": stdout, "stderr": stderr}
