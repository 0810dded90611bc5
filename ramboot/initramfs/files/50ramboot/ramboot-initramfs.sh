#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# ramboot in the initramfs: decide, layer, build, prove, hand over, report.
#
#   before      the disk is open (LUKS), its volume group inactive, nothing mounted
#   open-disk   decides; on yes copies the root through a throw-away layer into RAM and proves
#               the copy. After it the layer is gone and the disk untouched; the RAM root waits
#               at /run/ramboot/root/root. LVM's own scan follows.
#               With snapshot nothing is copied: the layer stays, and LVM's scan sees it alone;
#               a root that is on no LVM waits at /run/ramboot/root/root too.
#               With image a compressed root made earlier is read instead.
#   pre-mount   moves the RAM root to /sysroot in place of the disk's
#   cleanup     removes what only the initramfs needed
#   recover     after a phase that died: takes everything back
#
# Whatever fails ends in the ordinary persistent boot: nothing is taken from the disk's root
# before the copy is proven, and recover leaves the machine as if we had not been there.

. /lib/dracut-lib.sh
for part in lib ask source luks twin layer copy root snapshot overlay seal state image; do
    # shellcheck disable=SC1090 # the parts beside this file
    . "/usr/lib/ramboot/ramboot-$part.sh"
done
# The tools speak English to our filters; names are bytes.
export LC_ALL=C LVM_SUPPRESS_FD_WARNINGS=1
# How long the reason for a persistent boot that was not asked for stays readable.
REASON_PAUSE_S=4
# How long the screen says that the disk is gone, before the machine switches off.
GONE_PAUSE_S=60
ALGORITHM=

# --- decide ---------------------------------------------------------------------------------

# decide: sets ST_REQUESTED, ST_BACKEND and ST_DISK. 0: RAM. 1: persistent, `reason` tells why
# (empty when that was asked for).
decide() {
    local mode disk timeout
    mode=$(getarg ramboot=)
    disk=$(getarg ramboot.disk=)
    timeout=$(getarg ramboot.timeout=)
    [ "$mode" != off ] || {
        ST_REQUESTED=off
        return 1
    }
    # a bad configuration must not hide what the kernel line asked for
    ST_REQUESTED=$(printable "${mode:-ask}")
    arguments_known && read_config || return 1
    ST_REQUESTED=${mode:-$CONF_mode}
    case $ST_REQUESTED in
        off) return 1 ;;
        ask) ST_BACKEND=$CONF_backend ;;
        *)
            ST_BACKEND=$ST_REQUESTED
            # shellcheck disable=SC2086 # a list
            one_of "$ST_BACKEND" $BACKENDS || {
                ST_REQUESTED=$(printable "$ST_REQUESTED")
                reason="ramboot=$ST_REQUESTED is unknown (known: ask off $BACKENDS)"
                return 1
            }
            ;;
    esac
    ST_DISK=${disk:-$CONF_disk}
    case $ST_DISK,$ST_BACKEND in
        attached,*) ;;
        detached,zram | detached,tmpfs | detached,image) ;;
        readonly,zram | readonly,tmpfs | readonly,image)
            [ "$ROOT_KIND" = lvm ] || {
                reason='ramboot.disk=readonly needs a root on LVM; ramboot.disk=detached does not'
                return 1
            }
            ;;
        detached,*)
            reason="the backend $ST_BACKEND needs the disk: it can't be detached"
            return 1
            ;;
        readonly,*)
            reason="the backend $ST_BACKEND needs the disk's volume group: it can't be sealed (readonly)"
            return 1
            ;;
        *)
            reason="ramboot.disk=$(printable "$ST_DISK") is not known to this version of ramboot (known: attached, readonly, detached)"
            return 1
            ;;
    esac
    write_protected
    [ "$ST_BACKEND" != snapshot ] && [ "$ST_DISK" = attached ] || volumes_known || return 1
    if [ -n "$timeout" ]; then
        is_number "$timeout" && [ "$timeout" -le 86400 ] || {
            reason="ramboot.timeout=$(printable "$timeout") is not a number of seconds"
            return 1
        }
        CONF_timeout_s=$timeout
    fi
    [ "$ST_REQUESTED" = ask ] || return 0
    ask_user
}

# arguments_known: with one that is mistyped, or has no value, the configuration would decide in silence.
arguments_known() {
    local word
    # words in quotes are another argument's
    word=$(getcmdline | sed 's/="[^"]*[[:blank:]][^"]*"//g' | tr -s ' \t' '\n' | grep -E '^"?ramboot($|=|\.)' \
        | grep -vE '^"?ramboot(|\.disk|\.timeout)="?[^"]' | head -n 1)
    [ -z "$word" ] || {
        reason="the kernel argument $(printable "$word") is unknown or has no value (known: ramboot=, ramboot.disk=, ramboot.timeout=)"
        return 1
    }
}

# write_protected: LVM would activate no thin pool on such a disk, and dracut wait for the root's volume in
# vain; below the seal it does. With overlay nothing is below.
write_protected() {
    case $ST_DISK,$ROOT_KIND,$ST_BACKEND in
        attached,lvm,zram | attached,lvm,tmpfs | attached,lvm,image) ;;
        *) return 0 ;;
    esac
    [ "$(blockdev --getro "$SOURCE_DISK" 2> /dev/null)" = 1 ] || return 0
    ST_DISK='readonly'
    ST_NOTE='the disk is write-protected: it is sealed (readonly)'
}

# volumes_known: dracut waits for each volume that the kernel line names. One of another group that is
# not there yet would never come, for LVM sees one device alone from here on.
volumes_known() {
    local group volume
    [ "$ROOT_KIND" = lvm ] || return 0
    group=${ROOT_SPEC%%/*}
    for volume in $(getargs rd.lvm.lv) $(getargs rd.lvm.vg); do
        [ "${volume%%/*}" = "$group" ] || [ -e "$P/dev/$volume" ] || {
            reason="the kernel line asks for $(printable "$volume"), which is not in the root's volume group and not there yet: only the disk policy attached without snapshot could wait for it"
            return 1
        }
    done
}

ask_user() {
    local estimate
    ALGORITHM=$CONF_zram_algorithm
    ASK_NEEDED='an unknown amount'
    estimate=$(cat /usr/lib/ramboot/estimate 2> /dev/null)
    ! is_number "$estimate" \
        || ASK_NEEDED=$(human $(($(need_bytes "$ST_BACKEND" "$estimate") + (CONF_reserve_mib + CONF_headroom_mib) * MIB)))
    ASK_AVAILABLE=$(human "$(meminfo_bytes MemAvailable)")
    phase ask
    [ "$ST_DISK" = attached ] || screen "$(disk_notice)"
    ask
    say "Boot to RAM? $answer ($answered)"
    [ "$answer" = y ] || {
        [ "$answered" != tries ] || reason='the question was not answered with y or n'
        return 1
    }
}

# disk_notice: what will not work without a disk that can be written.
disk_notice() {
    printf 'Disk policy %s: no qube on the disk will start, network and USB qubes included.' "$ST_DISK"
}

# --- build and prove ------------------------------------------------------------------------

# make_root: the proven RAM root at $RUN/root/root.
make_root() {
    mkdir -p "$RUN/root" "$RUN/work"
    [ "$ST_DISK" = attached ] || others_idle || return 1
    [ "$ST_BACKEND" != snapshot ] || {
        make_snapshot
        return
    }
    root_place || return 1
    [ "$ST_BACKEND" != overlay ] || {
        phase overlay
        make_overlay
        return
    }
    phase layer
    layer_up || return 1
    phase measure
    source_mount || return 1
    [ "$ST_BACKEND" != image ] || make_image || return 1
    # a stale image can have made it zram
    [ "$ST_BACKEND" != image ] || return 0
    root_check "$RUN/source" && source_exclude && measure || return 1
    case $ST_BACKEND in
        zram) make_zram_root ;;
        tmpfs) make_tmpfs_root ;;
    esac || return 1
    root_prepare "$RUN/root/root" || return 1
    sync
}

# root_place: $RUN/root/root. Private, for a mount below a shared one can't be moved to /sysroot.
root_place() {
    try 10 mount -t tmpfs -o mode=0700,size=1m ramboot "$RUN/root" \
        && try 10 mount --make-private "$RUN/root" && mkdir "$RUN/root/root"
}

make_zram_root() {
    plan_zram || return 1
    budget || return 1
    zram_new ROOT_ZRAM "$ROOT_SIZE" "$ALGORITHM" || return 1
    printf '%s' "$ROOT_ZRAM" > "$RUN/root-zram"
    phase copy
    if [ "$COPY" = blocks ]; then
        try 60 umount "$RUN/source" && build_blocks || return 1
        phase prove
        prove_blocks && mount_zram_root || return 1
        drop_unwritten
    else
        try 120 mkfs.ext4 -q -O ^has_journal -m 0 -E nodiscard "/dev/zram$ROOT_ZRAM" || return 1
        mount_zram_root && rmdir "$RUN/root/root/lost+found" && build_files || return 1
        phase prove
        sync
        prove_files || return 1
    fi
    # holes that were copied along, and what was excluded
    timeout 120 fstrim "$RUN/root/root" 2> /dev/null || :
    # and the gaps that this left between compressed pages
    printf 1 > "/sys/block/zram$ROOT_ZRAM/compact" 2> /dev/null || :
}

mount_zram_root() {
    # discard: what is deleted in the session gives its RAM back
    try 60 mount -t ext4 -o discard "/dev/zram$ROOT_ZRAM" "$RUN/root/root"
}

# plan_zram: sets ROOT_SIZE (bytes), COPY (blocks, or files where blocks can't be copied or
# would not fit) and ALGORITHM.
plan_zram() {
    local disk
    COPY=files
    ROOT_SIZE=$((ST_BYTES * 115 / 100 + CONF_headroom_mib * 2 * MIB))
    if [ "$ST_FSTYPE" = ext4 ] && command -v dumpe2fs > /dev/null && command -v tune2fs > /dev/null; then
        disk=$(blockdev --getsize64 "$SOURCE_ROOT")
        if [ "$CONF_zram_size_mib" = auto ] || [ $((CONF_zram_size_mib * MIB)) -ge "$disk" ]; then
            COPY=blocks
            ROOT_SIZE=$disk
        fi
    fi
    [ "$CONF_zram_size_mib" = auto ] || ROOT_SIZE=$((CONF_zram_size_mib * MIB))
    choose_algorithm "$LAYER_ZRAM"
}

make_tmpfs_root() {
    local size
    budget || return 1
    size=$CONF_tmpfs_size_mib
    [ "$size" != auto ] || size=$((ST_BYTES * 104 / 100 / MIB + 16 + CONF_headroom_mib))
    [ $((size * MIB)) -gt "$ST_BYTES" ] || {
        reason="tmpfs_size_mib=$size is too small for $(human "$ST_BYTES")"
        return 1
    }
    mount_noswap "size=${size}m,nr_inodes=0,mode=0755" "$RUN/root/root" || return 1
    phase copy
    build_files || return 1
    phase prove
    prove_files
}

# mount_noswap OPTIONS DIRECTORY: a tmpfs. noswap is new in Linux 6.4; without it, no swap may be there.
mount_noswap() {
    ! try 10 mount -t tmpfs -o "$1,noswap" tmpfs "$2" || return 0
    [ "$CONF_swap" != keep ] || {
        reason="with swap: keep this kernel could swap $ST_BACKEND to the disk (tmpfs has noswap since Linux 6.4)"
        return 1
    }
    try 10 mount -t tmpfs -o "$1" tmpfs "$2" && reason=
}

# --- phases that the hooks call -------------------------------------------------------------

# requested: what the kernel line asks for, else the configuration, which nobody has checked yet.
requested() {
    local mode
    mode=$(getarg ramboot=)
    mode=${mode:-$(sed -n 's/^mode=//p' "$CONF" 2> /dev/null)}
    printable "${mode:-ask}"
}

open_disk() {
    [ ! -e "$RUN/decided" ] || return 0
    # off stays on the disk, whatever is found there
    if [ "$(requested)" != off ]; then
        find_root
        case $? in
            1) return 0 ;;
            2) ST_REQUESTED=$(requested) ;;
        esac
    fi
    mkdir -p "$RUN"
    : > "$RUN/decided"
    console_flows
    phase decide
    if [ -n "$reason" ] || ! decide; then
        twin_boot
        persistent
        return 0
    fi
    save_state
    # the overlay lies over the root that LVM is about to activate
    [ "$ST_BACKEND" != overlay ] || return 0
    build || {
        take_back
        persistent
    }
}

# build: make_root in a child, so that a signal or a bug there comes back here; 1: see reason.
build() {
    phase ''
    (
        make_root
        rc=$?
        phase drop
        save_state
        exit "$rc"
    ) &
    wait $!
    rc=$?
    load_state
    umount_below "$RUN/source"
    if [ "$rc" -eq 0 ] && finish_build; then
        reason=
        save_state
        rm -rf "$RUN/work"
        : > "$RUN/ready"
        return 0
    fi
    reason=${reason:-the build of the RAM root ended by a signal}
    return 1
}

# finish_build: a copy needs the disk no more, and the real volume group comes back.
finish_build() {
    case $ST_BACKEND,$ST_DISK,$ROOT_KIND in
        overlay,*) ;;
        # detached: dracut and systemd wait for the root's device; they get the layer's until hand_over
        snapshot,* | *,detached,lvm) layer_stays || return 1 ;;
        *,readonly,*) seal_up "$RUN/root/root" && layer_stays || return 1 ;;
        *)
            layer_down || return 1
            rescan
            ;;
    esac
    case $ST_BACKEND in
        snapshot) say 'all of the disk is behind a copy-on-write layer in RAM (snapshot)' ;;
        *) say "the root file system is in RAM ($ST_BACKEND)" ;;
    esac
    [ "$ST_DISK" = attached ] || say "$(disk_notice)"
}

# save_state, load_state: what a later phase, another process, needs to know.
STATE='reason ST_REQUESTED ST_BACKEND ST_DISK ST_DEVICE ST_FSTYPE ST_BYTES ST_NEEDED ST_AVAILABLE
ST_LIMIT ST_NOTE ROOT_KIND ROOT_SPEC SOURCE_DISK SOURCE_ROOT CONF_swap CONF_reserve_mib
CONF_headroom_mib'
save_state() {
    local name value
    for name in $STATE; do
        eval "value=\${$name:-}"
        printf '%s=%s\n' "$name" "$(printf '%s' "$value" | tr '\n' ' ')"
    done > "$RUN/state.new" && mv "$RUN/state.new" "$RUN/state"
}
load_state() {
    local line name
    [ -f "$RUN/state" ] || return 0
    while IFS= read -r line; do
        for name in $STATE; do
            [ "${line%%=*}" = "$name" ] && eval "$name=\${line#*=}"
        done
    done < "$RUN/state"
}

# rescan: LVM's scan was queued for the disk before our layer, or is queued by this.
rescan() {
    udevadm trigger --action=change "$(readlink -f "$SOURCE_DISK")" 2> /dev/null || :
    udevadm settle --timeout=30
}

# take_back: everything of the RAM root away, the disk free again.
take_back() {
    # of a build that was killed: they hold what is to go
    WORKERS=$(cat "$RUN/workers" 2> /dev/null)
    [ -z "$WORKERS" ] || stop_workers
    give_back_sysroot
    umount_below "$RUN/source"
    umount_below "$RUN/root"
    zram_drop "$(cat "$RUN/root-zram" 2> /dev/null)" || :
    seal_down
    if [ -e "$RUN/layer" ] || [ -e "$RUN/layer-kept" ]; then
        layer_gives_back || alert "$reason"
        layer_down || alert "$reason"
        rescan
    fi
    rm -rf "$RUN/root-zram" "$RUN/ready" "$RUN/work" "$RUN/layer-kept" "$RUN/image" "$RUN/hidden.rules" \
        "$IMAGE_RULES"
    # shellcheck disable=SC2086 # a list
    rm -f $LAYER_RULES
}

# volumes_back: at pre-mount nobody scans for volumes any more. Without a limit, as systemd waits for
# the root's.
volumes_back() {
    local lv
    [ "$ROOT_KIND" = lvm ] || return 0
    for lv in $(getargs rd.lvm.lv); do
        [ -b "/dev/mapper/$(dm_name "$lv")" ] \
            || lvm lvchange -ay -K --yes --sysinit "$lv" > /dev/null 2>&1 \
            || alert "the volume $lv could not be activated"
    done
    udevadm settle --timeout=30
}

# persistent: reports a boot from the disk.
persistent() {
    ST_BACKEND=
    ST_DISK=
    phase end
    save_state
    write_status persistent
    [ -n "$reason" ] || return 0
    if disk_gone; then
        without_disk
        return 0
    fi
    ! dmsetup info "$LAYER" > /dev/null 2>&1 || behind_layer
    alert "persistent boot: $reason"
    sleep "$REASON_PAUSE_S"
}

# without_disk: there is nothing left to boot. dracut would look for the disk for minutes and end
# in a shell that nobody has a password for.
without_disk() {
    alert "the disk is gone: $SOURCE_DISK can't be read ($reason)"
    screen "ramboot wrote nothing to it. The machine switches off in $GONE_PAUSE_S s."
    sleep "$GONE_PAUSE_S"
    # the same with and without systemd
    printf o > "$P/proc/sysrq-trigger"
    sleep 30
}

# behind_layer: the disk's volumes are in use through the throw-away layer still. What is called a
# boot from the disk would lose all that is saved in it, if it went on at all.
behind_layer() {
    alert "the disk can't be freed for a persistent boot: $reason"
    screen "Nothing was written to it. The machine restarts in $GONE_PAUSE_S s; answer n then, or boot with ramboot=off."
    sleep "$GONE_PAUSE_S"
    printf b > "$P/proc/sysrq-trigger"
    sleep 30
}

pre_mount() {
    local late=
    # there was no quiet moment in the initqueue
    [ -e "$RUN/decided" ] || late=yes
    open_disk
    load_state
    [ "$ST_BACKEND" != overlay ] || [ -e "$RUN/ready" ] || [ -e "$RUN/status.json" ] || build || {
        take_back
        volumes_back
        persistent
        return 0
    }
    [ -e "$RUN/ready" ] || {
        [ -e "$RUN/status.json" ] || {
            reason='ramboot did not find the device of the root file system'
            ST_REQUESTED=$(requested)
            persistent
        }
        [ -z "$late" ] || volumes_back
        return 0
    }
    phase handover
    take_place && {
        # the shutdown initramfs would be read from /boot, only to take down a disk that nobody wrote
        rm -f /run/initramfs/.need_shutdown
        reason=$ST_NOTE
        phase end
        write_status ram
        hide_disk
        return 0
    }
    take_back
    volumes_back
    persistent
}

take_place() {
    case $ST_BACKEND in
        snapshot) snapshot_ready && { [ "$ROOT_KIND" = lvm ] || hand_over; } ;;
        *) hand_over ;;
    esac
}

# hand_over: systemd's units for the disk's root make way first. They require its device, and
# systemd would unmount whatever is on /sysroot with it (drop-ins can't take a Requires= away).
hand_over() {
    if [ -n "${DRACUT_SYSTEMD:-}" ] || [ -d /run/systemd/system ]; then
        mkdir -p /run/systemd/system
        printf '[Unit]\nDescription=RAM root (nothing to check)\nDefaultDependencies=no\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n' \
            > /run/systemd/system/systemd-fsck-root.service
        printf '[Unit]\nDescription=RAM root\nDefaultDependencies=no\nBefore=initrd-root-fs.target\n[Mount]\nWhat=%s\nWhere=/sysroot\n' \
            "$(awk -v m="$RUN/root/root" '$2 == m { print $1 }' /proc/self/mounts)" > /run/systemd/system/sysroot.mount
        try 60 systemctl daemon-reload || return 1
    fi
    try 10 mount --move "$RUN/root/root" "${NEWROOT:-/sysroot}" || return 1
    umount "$RUN/root" 2> /dev/null || :
    case $ST_DISK in
        detached) detach_disk ;;
        readonly) others_idle && layer_down && close_others && rm -f "$RUN/layer-kept" ;;
    esac
}

# give_back_sysroot: systemd's own units for the disk's root again.
give_back_sysroot() {
    umount "${NEWROOT:-/sysroot}" 2> /dev/null || :
    remove_units || return 0
    systemctl daemon-reload
}

# remove_units: those that hand_over wrote; 1 if there were none.
remove_units() {
    [ -e /run/systemd/system/sysroot.mount ] || [ -e /run/systemd/system/systemd-fsck-root.service ] || return 1
    rm -f /run/systemd/system/systemd-fsck-root.service /run/systemd/system/sysroot.mount
}

cleanup() {
    remove_units || :
    rm -f "$RUN/decided" "$RUN/state" "$RUN/seconds" "$RUN/pvs-seen" "$RUN/pvs" "$RUN/exclude" \
        "$RUN/lvmlocal"
    rmdir "$RUN/source" "$RUN/root" 2> /dev/null || :
}

recover() {
    [ ! -e "$RUN/status.json" ] || return 0
    load_state
    reason=${reason:-ramboot ended unexpectedly}
    take_back
    [ "${1:-}" != pre-mount ] || volumes_back
    : > "$RUN/decided"
    persistent
}

case ${1:-} in
    open-disk) open_disk ;;
    pre-mount) pre_mount ;;
    cleanup) cleanup ;;
    recover) recover "${2:-}" ;;
    *)
        printf 'usage: ramboot-initramfs open-disk|pre-mount|cleanup|recover [pre-mount]\n' >&2
        exit 2
        ;;
esac
