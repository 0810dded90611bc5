# SPDX-License-Identifier: GPL-2.0-or-later
"""What each kind of session promises, seen from inside."""

from __future__ import annotations

import json
from typing import Any

from . import build, phases
from .machine import Machine

FAILED_UNITS = "systemctl list-units --failed --plain --no-legend"


def status(dom0: Machine) -> dict[str, Any]:
    """What the initramfs wrote for everybody to read."""
    return json.loads(dom0.succeed("cat /run/ramboot/status.json"))


def settled(dom0: Machine) -> str:
    """The system's state once nothing is starting any more.

    A unit that lost a race because everything is slow here gets a second chance, and a line in the
    table of times; one that can't start in this session fails again.
    """
    if (state := _state(dom0)) != "degraded":
        return state
    for unit in (line.split()[0] for line in dom0.succeed(FAILED_UNITS).splitlines() if line):
        print(dom0.succeed(f"journalctl -b -u {unit} -o short-monotonic --no-pager"))
        phases.add(f"failed once: {unit}", 0)
        dom0.succeed(f"systemctl restart {unit} || true")
    return _state(dom0)


def _state(dom0: Machine) -> str:
    return dom0.succeed("systemctl is-system-running --wait || true").split()[-1]


def filled(dom0: Machine) -> dict[str, Any]:
    """What the watch of a RAM session found last; waits for its first look."""
    return json.loads(
        dom0.succeed("until cat /run/ramboot/filled.json 2>/dev/null; do sleep 1; done")
    )


def assert_ram_session(dom0: Machine, backend: str, root: str, disk: str = "attached") -> None:
    """All that a RAM session promises, seen from inside."""
    assert dom0.succeed("findmnt -no FSTYPE /") == root
    told = status(dom0)
    assert (told["session"], told["backend"], told["disk"]) == ("ram", backend, disk)
    assert told["reason"] is None
    # reserve and headroom at the least
    assert 2 << 30 <= told["ram"]["needed_bytes"] <= told["ram"]["available_bytes"]
    copied = {"copy", "prove"} if backend in ("zram", "tmpfs") else set()
    assert {"handover", *copied} <= told["seconds"].keys()
    assert settled(dom0) == "running", dom0.succeed(FAILED_UNITS)
    assert dom0.succeed("swapon --show --noheadings") == ""
    # nothing of the disk is mounted, in any name space
    mounted = dom0.succeed(
        "cat /proc/[0-9]*/mounts 2>/dev/null | grep -E '^/dev/' | sort -u || true"
    )
    assert "qubes_dom0" not in mounted
    assert "/dev/vda" not in mounted
    assert "luks-" not in mounted
    assert_disk_is_hidden(dom0)


def assert_snapshot_session(dom0: Machine) -> None:
    """dom0 and the volume group are on the layer, and LVM knows nothing else."""
    told = status(dom0)
    assert (told["session"], told["backend"], told["disk"]) == ("ram", "snapshot", "attached")
    assert told["reason"] is None
    assert settled(dom0) == "running"
    assert_disk_is_hidden(dom0)
    assert dom0.succeed("findmnt -no SOURCE /") == "/dev/mapper/qubes_dom0-root"
    assert dom0.succeed("pvs --noheadings -o pv_name").split() == ["/dev/mapper/ramboot-layer"]
    assert dom0.succeed("swapon --show --noheadings") == ""
    dom0.fail("mountpoint -q /boot")
    # the layer alone holds the disk
    assert dom0.succeed("ls /sys/block/dm-0/holders | wc -l") == "1"
    assert dom0.succeed("cat /sys/block/dm-0/ro") == "1"


# Block devices that dom0 would offer to qubes, by the rules of linux-utils
# (udev/udev-qubes-block.rules, udev-block-add-change) and those of core-admin-linux for qubes' own
# volumes (system-config/12-qubes-ignore-lvm-devices.rules).
OFFERED = """
used() {
    lsblk -dnro MOUNTPOINT "/dev/${1##*/}" | grep -q . && return
    [ -z "$(ls "$1/holders" 2>/dev/null)" ] || return 0
    [ -e "$1/dm/name" ] || return
    [ "$(dmsetup info -c --noheadings -o open "$(cat "$1/dm/name")")" != 0 ]
}
for path in /sys/class/block/*; do
    name=${path##*/} shown=${path##*/} busy=
    case $name in
        zram*) continue ;;
        loop*) [ -d "$path/loop" ] || continue ;;
        dm-*) shown=$(cat "$path/dm/name") ;;
    esac
    case $shown in snapshot-* | origin-* | qubes_dom0-vm--*) continue ;; esac
    known=$(udevadm info --query=property --path="$path")
    case $known in *DM_UDEV_DISABLE_DISK_RULES_FLAG=1*) continue ;; esac
    # a partition with nothing in it
    case $known in *ID_FS_TYPE=*) ;; *) [ ! -e "$path/partition" ] || continue ;; esac
    for part in "$path" "$path/$name"*; do
        [ ! -d "$part" ] || ! used "$part" || busy=yes
    done
    [ -n "$busy" ] || echo "$shown"
done
"""
HIDDEN_RULES = "/run/udev/rules.d/63-ramboot-hidden.rules"


def offered(dom0: Machine) -> set[str]:
    """Names of the devices that dom0 would offer to qubes, but for the payload's drive."""
    dom0.succeed(f"cat > /run/offered <<'E'\n{OFFERED}E\nudevadm settle")
    return set(dom0.succeed("sh /run/offered").split()) - {"vdb"}


def assert_disk_is_hidden(dom0: Machine) -> None:
    """No part of the disk is offered to qubes, not after later events either."""
    dom0.succeed(f"udevadm verify --no-summary {HIDDEN_RULES}")
    assert offered(dom0) == set()
    # as Qubes does once QubesDB runs (core-admin, linux/aux-tools/startup-misc.sh)
    dom0.succeed("udevadm trigger --action=change --subsystem-match=block")
    assert offered(dom0) == set()
    assert settled(dom0) == "running", dom0.succeed(FAILED_UNITS)


def assert_disk_is_closed(dom0: Machine) -> None:
    """No mapping of the disk is left in the kernel, nor what would open it again."""
    assert dom0.succeed("dmsetup ls") == "No devices found"
    dom0.fail("grep -E ' user +cryptsetup' /proc/keys")


def assert_persistent(
    dom0: Machine, reason: str | None, root: str = "/dev/mapper/qubes_dom0-root"
) -> None:
    """An ordinary boot from the disk, which says why it is none from RAM."""
    assert dom0.succeed("findmnt -vno SOURCE /") == root
    told = status(dom0)
    assert (told["session"], told["backend"]) == ("persistent", None)
    if reason is None:
        assert told["reason"] is None
    else:
        assert reason in told["reason"]
        assert reason in dom0.succeed("journalctl -b -t ramboot -o cat")
    # nothing of ours is left behind
    assert "ramboot" not in dom0.succeed("dmsetup ls")
    # and all that the root lies on takes writes
    assert dom0.succeed("lsblk -sno RO $(findmnt -vno SOURCE /) | sort -u").split() == ["0"]
    assert settled(dom0) == "running", dom0.succeed(FAILED_UNITS)


def assert_fault_ends_on_disk(
    dom0: Machine,
    arguments: str,
    files: dict[str, str],
    root: str = "/dev/mapper/qubes_dom0-root",
    said: str = "injected fault",
) -> None:
    """A boot with `build.with_fault` is an ordinary one that says so."""
    dom0.start_direct(arguments, initrd=build.initramfs(), files=files)
    dom0.unlock()
    dom0.shell()
    assert_persistent(dom0, said, root)
