# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The disk's root as a source that is never written: a device-mapper snapshot over the opened
# disk whose store is a zram device. Volumes are activated, journals replayed and excluded
# files removed in that layer alone, and it is thrown away after the copy.
# Read-only flags would not do: a thin pool writes through them (kernel commit a32e236eb93e).

LAYER=ramboot-layer
# Room for what the copy changes in the layer: a journal replayed, metadata. When it is full the
# layer fails every read, so the copy fails and the disk boots.
LAYER_STORE_MIB=2048
# Chunk in sectors: 64 KiB, the smallest chunk of a thin pool.
LAYER_CHUNK=128
# More arguments for dm-snapshot, their number first.
LAYER_OPTIONS=
LAYER_ALGORITHM=
# A thin pool is checked whenever it is activated or deactivated, which takes minutes with a large one.
LVM_LIMIT_S=1800
# For a root that lies on no LVM: keep udev off the disk below the layer, here and in the session.
# Both between lvm2's 10-dm.rules and 13-dm-disk.rules, which Debian calls 55-dm.rules and
# 60-persistent-storage-dm.rules, for the disk may be a LUKS mapping.
LAYER_RULES="$P/run/udev/rules.d/11-ramboot-layer.rules $P/run/udev/rules.d/59-ramboot-layer.rules"

# --- zram -----------------------------------------------------------------------------------

# zram_new VARIABLE DISKSIZE ALGORITHM: a device of our own from hot_add (zram0 may be the
# swap of zram-generator); VARIABLE gets its number. No mem_limit: at the limit, buffered
# writes are lost in silence.
zram_new() {
    local number sys
    [ -r "$P/sys/class/zram-control/hot_add" ] || modprobe -q zram 2> /dev/null
    number=$(cat "$P/sys/class/zram-control/hot_add" 2> /dev/null)
    is_number "$number" || {
        reason='the kernel module zram is not there'
        return 1
    }
    eval "$1=\$number"
    sys=$P/sys/block/zram$number
    if [ -n "$3" ] && ! printf '%s' "$3" > "$sys/comp_algorithm" 2> /dev/null; then
        reason="the kernel has no zram algorithm $3 (it has: $(tr -d '[]' < "$sys/comp_algorithm"))"
        return 1
    fi
    case $(cat "$sys/backing_dev" 2> /dev/null) in
        '' | none) ;;
        *)
            reason="zram$number has a backing device"
            return 1
            ;;
    esac
    printf '%s' "$2" > "$sys/disksize" 2> /dev/null || {
        reason="zram$number could not be made $(human "$2") large"
        return 1
    }
}

# zram_drop NUMBER
zram_drop() {
    is_number "$1" && [ -e "$P/sys/block/zram$1" ] || return 0
    printf 1 > "$P/sys/block/zram$1/reset" 2> /dev/null \
        && printf '%s' "$1" > "$P/sys/class/zram-control/hot_remove" 2> /dev/null
}

# --- the layer ------------------------------------------------------------------------------

# layer_up: /dev/mapper/ramboot-layer over SOURCE_DISK, and SOURCE_ROOT, the root's device in it.
layer_up() {
    local sectors
    modprobe -q dm_snapshot 2> /dev/null
    sectors=$(blockdev --getsz "$SOURCE_DISK" 2> /dev/null)
    is_number "$sectors" && [ "$sectors" -gt 0 ] || {
        reason="the size of $SOURCE_DISK can't be read"
        return 1
    }
    # a volume that is active already would stay on the disk: LVM goes by its UUID
    set -- "$P/sys/class/block/$(kernel_name "$SOURCE_DISK")/holders"/*
    [ ! -e "$1" ] || {
        reason="something else than ramboot's layer uses $SOURCE_DISK already"
        return 1
    }
    mkdir -p "$RUN"
    : > "$RUN/layer"
    layer_store || return 1
    try 60 dmsetup create "$LAYER" --table \
        "0 $sectors snapshot $SOURCE_DISK $LAYER_STORE N $LAYER_CHUNK${LAYER_OPTIONS:+ $LAYER_OPTIONS}" || return 1
    udevadm settle --timeout=30
    case $ROOT_KIND in
        device) SOURCE_ROOT=/dev/mapper/$LAYER ;;
        lvm)
            layer_lvm lvchange -ay -K --yes --sysinit "$ROOT_SPEC" || return 1
            SOURCE_ROOT=/dev/mapper/$(dm_name "$ROOT_SPEC")
            ;;
    esac
    [ -b "$SOURCE_ROOT" ] || {
        reason="$SOURCE_ROOT did not appear in the layer"
        return 1
    }
    layer_holds_root
}

# layer_store: sets LAYER_STORE to a zram device, or a loop device over it with the sector size of
# the disk. zram's sectors have 4096 bytes and device-mapper takes the larger: on a disk with 512,
# xfs would not mount, and a qube would not find the partitions of its root volume.
layer_store() {
    local sector
    sector=$(blockdev --getss "$SOURCE_DISK")
    zram_new LAYER_ZRAM $((LAYER_STORE_MIB * MIB)) "$LAYER_ALGORITHM" || return 1
    printf '%s' "$LAYER_ZRAM" > "$RUN/layer-zram"
    LAYER_STORE=/dev/zram$LAYER_ZRAM
    [ "$sector" -lt 4096 ] || return 0
    modprobe -q loop 2> /dev/null
    LAYER_STORE=$(losetup --find --show --sector-size "$sector" "/dev/zram$LAYER_ZRAM" 2> /dev/null)
    [ -b "$LAYER_STORE" ] || {
        reason="the layer's store could not be given the disk's sector size"
        return 1
    }
    printf '%s' "$LAYER_STORE" > "$RUN/layer-loop"
}

# layer_lvm COMMAND...: LVM that sees the layer and nothing else; the disk has the same
# physical volume. A devices file would make it ignore the filter.
layer_lvm() {
    try "$LVM_LIMIT_S" lvm "$@" --config "$(layer_lvm_devices) activation{monitoring=0}"
}

# layer_lvm_devices [NAME]: LVM configuration with the layer, or NAME, as the only device there is.
layer_lvm_devices() {
    lvm_devices "/dev/mapper/${1:-$LAYER}"
}

# lvm_devices DEVICE: a name without characters of regular expressions.
lvm_devices() {
    printf 'devices{global_filter=["a|^%s$|","r|.*|"] filter=["a|.*|"] use_devicesfile=0}' "$1"
}

# layer_volumes: what the kernel line asks dracut to activate, which LVM's own scan leaves
# alone once the layer is in use (64-lvm.rules).
layer_volumes() {
    local lv
    for lv in $(getargs rd.lvm.lv); do
        [ "${lv%%/*}" != "${ROOT_SPEC%%/*}" ] || [ "$lv" = "$ROOT_SPEC" ] \
            || layer_lvm lvchange -ay -K --yes --sysinit "$lv" || return 1
    done
}

# layer_lvm_config ROOT [NAME]: for the LVM there. lvmlocal.conf comes last (lvm.conf(5)), and in it
# the value that comes last (lvm2: libdm/libdm-config.c, _section); what else it holds, such as a
# system ID, stays in force.
layer_lvm_config() {
    local conf="$1/etc/lvm/lvmlocal.conf" own=/dev/null
    [ ! -f "$conf" ] || own=$conf
    {
        # the initramfs gets its own back (layer_gives_back)
        [ "$1" != "$P" ] || [ -e "$RUN/lvmlocal" ] || cat "$own" > "$RUN/lvmlocal"
    } && mkdir -p "$1/etc/lvm" && {
        cat "$own" && printf '\n# RAM session: the disk is reached through this device alone\n%s\n' \
            "$(layer_lvm_devices "${2:-}")"
    } > "$conf.ramboot" && mv -f "$conf.ramboot" "$conf" || {
        reason='LVM could not be told of the layer'
        return 1
    }
}

# lvm_sees_alone ROOT [NAME]: asks the system's own LVM, before it starts. Without NAME there must be
# no physical volume for it at all.
lvm_sees_alone() {
    local dir seen wanted="${2:+/dev/mapper/$2}"
    for dir in dev proc sys run; do
        try 10 mount --bind "/$dir" "$1/$dir" || return 1
    done
    seen=$(timeout -k 5 60 chroot "$1" lvm pvs --nolocking --noheadings -o pv_name 2> /dev/null < /dev/null)
    for dir in run sys proc dev; do
        umount "$1/$dir" || return 1
    done
    # shellcheck disable=SC2086 # the words
    set -- $seen
    [ "$*" = "$wanted" ] || {
        reason="LVM of the system would use other devices than ramboot's: $(printable "$*")"
        return 1
    }
}

# layer_stays: the layer is the root's from here on, no longer ours alone.
layer_stays() {
    local device
    layer_volumes && layer_lvm_config "$P" || return 1
    mv "$RUN/layer" "$RUN/layer-kept"
    [ "$ROOT_KIND" = lvm ] || {
        layer_takes_links
        return
    }
    for device in "/dev/mapper/$LAYER" /dev/mapper/"$(dm_name "${ROOT_SPEC%%/*}/")"*; do
        [ ! -b "$device" ] || udevadm trigger --action=change "$(readlink -f "$device")" 2> /dev/null || :
    done
    udevadm settle --timeout=30
}

# layer_takes_links: the file system is on the disk and in the layer with the same UUID. Only the
# layer may be found by it: by systemd, mount, and btrfs, which looks for its devices itself. What
# nobody may use is not offered to qubes either (linux-utils, udev/udev-qubes-block.rules).
layer_takes_links() {
    local device
    layer_rules 1 || return 1
    # first the one that gives them up: systemd knows a link by the device that had it first
    for device in "$SOURCE_DISK" "/dev/mapper/$LAYER"; do
        udevadm trigger --action=change "$(readlink -f "$device")" 2> /dev/null || :
        udevadm settle --timeout=30
    done
    layer_has_links
}

# layer_has_links: that they lead to the layer, and what root= names, for which dracut and systemd
# wait, is still there: no layer has a link by PARTUUID.
layer_has_links() {
    local link
    link=$P/dev/disk/by-uuid/$(blkid -p -o value -s UUID "/dev/mapper/$LAYER")
    [ "$(kernel_name "$link")" = "$(kernel_name "/dev/mapper/$LAYER")" ] || {
        reason="$link does not lead to ramboot's layer"
        return 1
    }
    [ -e "$(root_device "$ROOT_SPEC")" ] || {
        reason="root=$ROOT_SPEC can't be found on ramboot's layer; root= by UUID can"
        return 1
    }
}

# layer_rules VALUE: of the flags that keep udev off the disk below the layer. With some ID_FS_USAGE an
# opened LUKS device stays ready for systemd, which may wait for it by its name (99-systemd.rules).
layer_rules() {
    local file
    for file in $LAYER_RULES; do
        mkdir -p "${file%/*}" && printf '%s, ENV{%s}="%s", ENV{%s}="%s"%s\n' \
            "SUBSYSTEM==\"block\", KERNEL==\"$(kernel_name "$SOURCE_DISK")\"" \
            DM_UDEV_DISABLE_DISK_RULES_FLAG "$1" UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG "$1" \
            "${1:+, ENV{ID_FS_USAGE\}=\"other\"}" > "$file" || {
            reason="udev could not be told of ramboot's layer"
            return 1
        }
    done
    udevadm control --reload
}

# layer_gives_back: from the next event on links and LVM are the disk's again. 10-dm.rules takes the
# flags of the last event over; they have to be emptied.
layer_gives_back() {
    if [ -e "$RUN/lvmlocal" ]; then
        rm -f "$P/etc/lvm/lvmlocal.conf"
        [ ! -s "$RUN/lvmlocal" ] || cat "$RUN/lvmlocal" > "$P/etc/lvm/lvmlocal.conf"
        rm -f "$RUN/lvmlocal"
    fi
    [ ! -e "${LAYER_RULES%% *}" ] || layer_rules ''
}

# layer_holds_root: no volume of the disk may be reached except through the layer.
layer_holds_root() {
    set -- "$P/sys/class/block/$(kernel_name "$SOURCE_DISK")/holders"/*
    if [ $# -ne 1 ] || [ "${1##*/}" != "$(kernel_name "/dev/mapper/$LAYER")" ]; then
        reason="something else than ramboot's layer uses $SOURCE_DISK"
        return 1
    fi
}

# layer_healthy: a full store invalidates the snapshot.
layer_healthy() {
    case $(dmsetup status "$LAYER" 2> /dev/null) in
        *Invalid* | *Overflow* | '')
            reason="ramboot's layer over $SOURCE_DISK became invalid while copying"
            return 1
            ;;
    esac
}

# disk_read_only: beside what keeps LVM off the disk below a layer that stays, its flag keeps off others.
disk_read_only() {
    [ "$(blockdev --getro "$SOURCE_DISK" 2> /dev/null)" = 0 ] || return 0
    : > "$RUN/read-only"
    try 10 blockdev --setro "$SOURCE_DISK"
}

# disk_writable: as it was before disk_read_only.
disk_writable() {
    [ -e "$RUN/read-only" ] || return 0
    try 10 blockdev --setrw "$SOURCE_DISK" && rm -f "$RUN/read-only"
}

# layer_down: everything of the layer away again; safe to repeat, and from any state.
layer_down() {
    local tries=0 failed=0 before="$reason"
    while [ "$tries" -lt 5 ]; do
        umount_below "$RUN/source"
        if [ -e "/dev/mapper/$LAYER" ] && [ "$ROOT_KIND" = lvm ]; then
            layer_lvm vgchange -an "${ROOT_SPEC%%/*}" || :
        fi
        layer_remove_children
        dmsetup info "$LAYER" > /dev/null 2>&1 || break
        dmsetup remove --retry "$LAYER" 2> /dev/null && break
        tries=$((tries + 1))
        sleep 1
    done
    reason=$before
    if dmsetup info "$LAYER" > /dev/null 2>&1; then
        reason="${before:+$before; }ramboot's layer over $SOURCE_DISK could not be removed"
        return 1
    fi
    disk_writable || {
        reason="${before:+$before; }$reason"
        failed=1
    }
    [ ! -e "$RUN/layer-loop" ] || losetup -d "$(cat "$RUN/layer-loop")" 2> /dev/null || :
    udevadm settle --timeout=30
    zram_drop "$(cat "$RUN/layer-zram" 2> /dev/null)" || :
    # the kernel keeps the device with the latest generation, which was the layer's
    # (linux fs/btrfs/volumes.c, device_list_add)
    [ "$ST_FSTYPE" != btrfs ] || timeout -k 5 30 btrfs device scan --forget > /dev/null 2>&1 || :
    rm -f "$RUN/layer" "$RUN/layer-zram" "$RUN/layer-loop"
    udevadm settle --timeout=30
    return "$failed"
}

# layer_remove_children: what LVM left active on the layer, the top first.
layer_remove_children() {
    local layer round child name
    layer=$(kernel_name "/dev/mapper/$LAYER") || return 0
    for round in 1 2 3 4 5; do
        for child in "$P/sys/class/block"/dm-*; do
            name=$(cat "$child/dm/name" 2> /dev/null) || continue
            depends_on "${child##*/}" "$layer" || continue
            set -- "$child/holders"/*
            [ -e "$1" ] || dmsetup remove --retry "$name" 2> /dev/null || :
        done
    done
}

# umount_below DIRECTORY: all mounts at and under it, the deepest first.
umount_below() {
    local target
    awk -v d="$1" '$2 == d || index($2, d "/") == 1 { print $2 }' "$P/proc/self/mounts" | sort -r \
        | while IFS= read -r target; do
            umount "$target" 2> /dev/null || umount -l "$target" 2> /dev/null
        done
    return 0
}
