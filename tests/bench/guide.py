# SPDX-License-Identifier: GPL-2.0-or-later
"""The guide of the forum thread "Qubes in tmpfs": its script, character by character, and a hook
that answers it.
"""

from __future__ import annotations

import re

# The thread publishes this for tmpfs.sh.
PUBLISHED_SHA256 = "d9e85c06c3478cc0cf65a4e017af1a4f9f9dd4ad87c71375e8d4604399f5217d"
_ZRAM_STEPS = """\
modprobe zram
echo 10G > /sys/block/zram0/disksize
/mnt/usr/sbin/mkfs.ext2 /dev/zram0
mount /dev/zram0 /sysroot
"""
_TMPFS_STEPS = "mount -t tmpfs -o size=100% none /sysroot\n"
_ZRAM = f"""\
#!/usr/bin/bash
read line
case "${{line:-Nn}}" in
[Yy]* )
mkdir /mnt
umount /sysroot
mount /dev/mapper/qubes_dom0-root /mnt
{_ZRAM_STEPS}cp -a /mnt/* /sysroot
exit 0
;;
[Nn]* )
exit 0
;;
* )
exit 1
;;
esac
"""
# The zram lines took the place of the tmpfs line (thread, post 28).
SCRIPTS = {"zram": _ZRAM, "tmpfs": _ZRAM.replace(_ZRAM_STEPS, _TMPFS_STEPS)}

# dracut-ng's own hooks lie here; a directory of another name would hide them.
HOOK = "var/lib/dracut/hooks/cleanup/00-pass.sh"
MARK = "bench: the guide's question"
TRACE = "/run/bench.trace"
_FIRST_STEP = re.compile(r"modprobe zram|mount -t tmpfs ")
_TRACED = re.compile(r"^\++ (\d+\.\d+) \d+\.\d+ (.*)$")


def files(backend: str, answer: str) -> dict[str, str]:
    """What the guide's dracut module puts into the initramfs, its question answered at once."""
    return {
        HOOK: f"""\
#!/bin/sh
printf '\\n%s\\n' "{MARK}" > /dev/console
echo {answer} | /usr/bin/bash /usr/bin/bench-traced > /run/bench.log 2> {TRACE}
""",
        # each command after the seconds since power-on; bash takes no PS4 from root's environment
        "usr/bin/bench-traced": "PS4='+ $(</proc/uptime) '; set -x; . /usr/bin/tmpfs\n",
        "usr/bin/tmpfs": SCRIPTS[backend],
    }


def copy_seconds(trace: str) -> float:
    """From making the file system in RAM to the end of `cp`, as the trace tells."""
    steps = [(float(m[1]), m[2]) for m in map(_TRACED.match, trace.splitlines()) if m]
    begin = next((at for at, step in steps if _FIRST_STEP.match(step)), None)
    copy = next((at for at, step in steps if step.startswith("cp -a ")), None)
    end = next((at for at, step in steps if step == "exit 0"), None)
    if begin is None or copy is None or end is None:
        raise ValueError(f"the guide's script did not come to its end:\n{trace}")
    return end - begin
