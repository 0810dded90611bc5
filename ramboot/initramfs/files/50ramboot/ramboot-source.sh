# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Which device is the root's, which disk it lies on, and what lies on what.

# find_root: sets ROOT_KIND to lvm or device and SOURCE_DISK to the opened disk (the physical
# volume, or the device with the file system). 1: not there yet. 2: never will be, see reason.
find_root() {
    local root lv device
    # Asked once, before anything that udev tells is read: a disk that is opened meanwhile is the
    # next turn's, and one that is open by now has all its events behind it.
    LUKS_CLOSED=
    if luks_to_come; then
        LUKS_CLOSED=yes
    else
        udevadm settle --timeout=30
    fi
    root=$(getarg root=)
    root=${root#block:}
    [ -n "$root" ] || {
        reason='the kernel line has no root='
        return 2
    }
    for lv in $(getargs rd.lvm.lv); do
        case $root in
            "/dev/$lv" | "/dev/mapper/$(dm_name "$lv")")
                find_lvm_root "$lv"
                return
                ;;
        esac
    done
    device=$(root_device "$root")
    if [ -n "$device" ] && [ -b "$device" ]; then
        case $(cat "$P/sys/class/block/$(kernel_name "$device")/dm/uuid" 2> /dev/null) in
            LVM-*)
                reason="the root volume $root was activated before ramboot could put its layer under it"
                return 2
                ;;
        esac
        [ -z "$LUKS_CLOSED" ] || ! may_wait || return 1
        ROOT_KIND=device
        ROOT_SPEC=$root
        SOURCE_DISK=$(own_name "$device")
        return 0
    fi
    # root= by UUID or label on LVM: the volume that the kernel line asks to be activated
    # shellcheck disable=SC2046 # a list
    set -- $(getargs rd.lvm.lv)
    case $root in
        UUID=* | LABEL=*)
            [ $# -eq 0 ] || {
                find_lvm_root "$1"
                return
            }
            ;;
    esac
    return 1
}

# dm_name VG/LV: the device-mapper name, in which "-" is doubled.
dm_name() {
    printf '%s-%s' "$(printf '%s' "${1%%/*}" | sed 's/-/--/g')" "$(printf '%s' "${1#*/}" | sed 's/-/--/g')"
}

root_device() {
    case $1 in
        UUID=*) printf '%s' "$P/dev/disk/by-uuid/${1#UUID=}" ;;
        LABEL=*) printf '%s' "$P/dev/disk/by-label/${1#LABEL=}" ;;
        PARTUUID=*) printf '%s' "$P/dev/disk/by-partuuid/${1#PARTUUID=}" ;;
        PARTLABEL=*) printf '%s' "$P/dev/disk/by-partlabel/${1#PARTLABEL=}" ;;
        /dev/*) printf '%s' "$P$1" ;;
    esac
}

kernel_name() {
    local path
    path=$(readlink -f "$1") && printf '%s' "${path##*/}"
}

# root_uuid: sets ROOT_UUID, that of the root's file system.
root_uuid() {
    [ -n "$ROOT_UUID" ] || ROOT_UUID=$(blkid -p -o value -s UUID "$SOURCE_ROOT") || {
        reason="the UUID of $SOURCE_ROOT can't be read"
        return 1
    }
}
ROOT_UUID=

# names_root SPEC: whether fstab means the root's file system by it. After root_uuid.
names_root() {
    case $1 in
        "$(getarg root=)" | "UUID=$ROOT_UUID") return 0 ;;
    esac
    if [ "$ROOT_KIND" = device ]; then
        root_on_layer "$1"
    else
        case $1 in
            "/dev/$ROOT_SPEC" | "/dev/mapper/$(dm_name "$ROOT_SPEC")") return 0 ;;
        esac
        return 1
    fi
}

# root_on_layer SPEC: whether it names the file system that is on the layer itself.
root_on_layer() {
    [ "$ROOT_KIND" = device ] \
        && [ "$(kernel_name "$(root_device "$1")")" = "$(kernel_name "$SOURCE_DISK")" ]
}

# own_name DEVICE: its path that no other device can take, as the layer takes the links by UUID. Of a
# mapping the one by name, though LVM may call it dm-0.
own_name() {
    local name
    name=$(kernel_name "$1")
    if [ -r "$P/sys/class/block/$name/dm/name" ]; then
        printf '/dev/mapper/%s' "$(cat "$P/sys/class/block/$name/dm/name")"
    else
        printf '/dev/%s' "$name"
    fi
}

# volumes_seen: what udev knows as physical volumes.
volumes_seen() {
    grep -l '^E:ID_FS_TYPE=LVM2_member' "$P"/run/udev/data/b* 2> /dev/null
}

# find_lvm_root VG/LV: the physical volume under it. LVM is asked only when udev has seen a
# physical volume that it had not seen before, for each call takes a while.
find_lvm_root() {
    local seen pvs devices device named=''
    seen=$(volumes_seen)
    [ -n "$seen" ] || return 1
    mkdir -p "$RUN"
    if [ "$seen" != "$(cat "$RUN/pvs-seen" 2> /dev/null)" ]; then
        # -a: with copies of a physical volume, of which LVM would use one. No answer: asked again.
        if timeout -k 5 60 lvm pvs -a --nolocking --noheadings --separator ' ' \
            -o pv_name,vg_missing_pv_count,vg_name,vg_uuid,pv_duplicate > "$RUN/pvs" 2> /dev/null \
            || [ -s "$RUN/pvs" ]; then
            printf '%s' "$seen" > "$RUN/pvs-seen"
        fi
    fi
    pvs=$(awk -v vg="${1%%/*}" '$3 == vg { print $1, $2, $4 $5 }' "$RUN/pvs")
    [ -n "$pvs" ] || {
        # dracut's scan would take the root's, which a LUKS device holds or which came meanwhile
        if { [ -n "$LUKS_CLOSED" ] && may_wait; } || [ "$seen" != "$(volumes_seen)" ]; then
            lvm_hold
        else
            lvm_release
        fi
        return 1
    }
    devices=$(printf '%s\n' "$pvs" | cut -d ' ' -f 1)
    for device in $devices; do
        ! on_named_luks "$device" || named=$device
    done
    # shellcheck disable=SC2086 # lists of devices
    if [ -n "$LUKS_CLOSED" ] && may_wait; then
        # not while a passphrase is asked for: two questions would take each other's keys
        lvm_hold $devices
        return 1
    elif [ -z "$named" ] && [ -n "$LUKS_CLOSED" ]; then
        lvm_release
        reason="a LUKS device of the kernel line is still closed: it may hold the root, not$(enumerate $devices)"
        return 2
    elif [ "$(printf '%s\n' "$pvs" | cut -d ' ' -f 3 | sort -u | wc -l)" -gt 1 ]; then
        ROOT_SPEC=$1
        twin_found "${1%%/*}" $devices
        lvm_release
        return 2
    fi
    lvm_release
    case $pvs in
        *' 0 '*) ;;
        *) return 1 ;;
    esac
    [ "$device" = "$devices" ] || {
        reason="the volume group ${1%%/*} lies on $(printf '%s\n' "$devices" | wc -l) devices; ramboot supports one"
        return 2
    }
    SOURCE_DISK=$device
    ROOT_KIND=lvm
    ROOT_SPEC=$1
}

# disk_gone: whether the opened disk can't be read any more, however often one tries.
disk_gone() {
    local turn
    [ -n "$SOURCE_DISK" ] || return 1
    for turn in 1 2 3; do
        # what the page cache holds proves nothing
        timeout -k 5 20 blockdev --flushbufs "$SOURCE_DISK" > /dev/null 2>&1 || :
        [ -z "$(timeout -k 5 20 head -c 1 "$SOURCE_DISK" 2> /dev/null | tr '\0\n' x)" ] || return 1
        sleep 1
    done
}
SOURCE_DISK=

# depends_on DEVICE BASE: whether DEVICE lies on BASE, at whatever depth.
depends_on() {
    local slave
    for slave in "$P/sys/class/block/$1/slaves"/*; do
        [ -e "$slave" ] || continue
        [ "${slave##*/}" = "$2" ] && return 0
        depends_on "${slave##*/}" "$2" && return 0
    done
    return 1
}

# disks_below NAME: what a block device lies on, down to the whole disk, by kernel names.
disks_below() {
    local path
    for path in "$P/sys/class/block/$1/slaves/"*; do
        [ -e "$path" ] || continue
        printf '%s\n' "${path##*/}"
        disks_below "${path##*/}"
    done
    [ -e "$P/sys/class/block/$1/partition" ] || return 0
    path=$(readlink -f "$P/sys/class/block/$1")
    path=${path%/*}
    printf '%s\n' "${path##*/}"
}
