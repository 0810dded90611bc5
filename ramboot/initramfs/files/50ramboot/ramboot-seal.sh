# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The disk policy readonly: LVM gets the opened disk back through a device that refuses every write.
# Below it is a read-only loop device: the kernel's loop driver answers each write, discard and
# zeroing with an error, whatever opened it and however (linux drivers/block/loop.c, loop_handle_cmd;
# no ioctl takes its LO_FLAGS_READ_ONLY away). A read-only flag of the disk, a read-only LUKS mapping
# or a mount would not do: a thin pool writes through them (see ramboot-layer.sh).

SEAL=ramboot-seal

# seal_up ROOT: the sealed disk beside the layer, proven, and the only one that the LVM of the system
# in ROOT sees. Nothing but the layer holds the disk; it goes in hand_over.
seal_up() {
    local sectors sector
    modprobe -q loop 2> /dev/null
    sectors=$(blockdev --getsz "$SOURCE_DISK" 2> /dev/null)
    sector=$(blockdev --getss "$SOURCE_DISK" 2> /dev/null)
    is_number "$sectors" && is_number "$sector" || {
        reason="the size of $SOURCE_DISK can't be read"
        return 1
    }
    # direct: the disk's data is not kept in RAM twice
    SEAL_LOOP=$(timeout -k 5 30 losetup --read-only --direct-io=on --sector-size "$sector" --find --show \
        "$SOURCE_DISK" 2> /dev/null)
    [ -b "$SEAL_LOOP" ] || {
        reason="the disk $SOURCE_DISK could not be sealed: no read-only loop device"
        return 1
    }
    printf '%s' "$SEAL_LOOP" > "$RUN/seal-loop"
    try 60 dmsetup create "$SEAL" --table "0 $sectors linear $SEAL_LOOP 0" || return 1
    udevadm settle --timeout=30
    seal_holds && lvm_sees_alone "$1" "$SEAL"
}

# seal_holds: writes back what is there. A seal that takes it is none, and the disk is as before.
seal_holds() {
    local first="$RUN/work/first"
    mkdir -p "$RUN/work"
    try 30 dd if="/dev/mapper/$SEAL" of="$first" bs=4096 count=1 iflag=direct || return 1
    timeout -k 5 30 dd if="$first" of="/dev/mapper/$SEAL" bs=4096 count=1 oflag=direct conv=notrunc 2> /dev/null
    case $? in
        1) return 0 ;;
        0) reason="the seal of $SOURCE_DISK takes writes" ;;
        *) reason="the seal of $SOURCE_DISK does not refuse a write at once" ;;
    esac
    return 1
}

# seal_down: away again, for a persistent boot.
seal_down() {
    [ -e "$RUN/seal-loop" ] || return 0
    ! dmsetup info "$SEAL" > /dev/null 2>&1 || dmsetup remove --retry "$SEAL" 2> /dev/null || :
    losetup -d "$(cat "$RUN/seal-loop")" 2> /dev/null || :
    rm -f "$RUN/seal-loop"
}
