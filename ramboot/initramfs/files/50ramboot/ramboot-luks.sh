# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The LUKS devices of the kernel line: waiting until they are open, and closing what is open of the
# root's disk.

# mapping_name: that of the opened disk; 1 when it is no mapping, as without LUKS.
mapping_name() {
    cat "$P/sys/class/block/$(kernel_name "$SOURCE_DISK")/dm/name" 2> /dev/null
}

# --- until they are open --------------------------------------------------------------------

# on_named_luks DEVICE: whether it is a LUKS mapping that the kernel line asks for.
on_named_luks() {
    local uuid id
    uuid=$(cat "$P/sys/class/block/$(kernel_name "$1")/dm/uuid" 2> /dev/null)
    for id in $(luks_ids); do
        case $uuid in
            CRYPT-LUKS?-*"$(printf '%s' "$id" | tr -d -)"*) return 0 ;;
        esac
    done
    return 1
}

# luks_ids: dracut takes a part of a UUID too.
luks_ids() {
    local id
    for id in $(getargs rd.luks.uuid) $(getargs rd.luks.name); do
        id=${id%%=*}
        id=${id#keysource:}
        id=${id#luks-}
        [ -z "$id" ] || printf '%s\n' "$id"
    done
}

# How many of dracut's turns a LUKS device of the kernel line may take to appear: ten seconds.
LUKS_TURNS=20

# luks_to_come: whether a LUKS device of the kernel line is closed, and dracut waits for it to be
# opened (90-crypt.sh), so that waiting for it as well holds up nothing. One that is not there comes
# late, or lies in the very volume group, as its key may.
luks_to_come() {
    local id
    [ -e "$hookdir/initqueue/finished/90-crypt.sh" ] && [ -z "$(getargs rd.luks.key)" ] || return 1
    for id in $(luks_ids); do
        set -- "$P"/dev/disk/by-uuid/*"$id"*
        [ -e "$1" ] || may_appear || continue
        set -- "$P"/dev/disk/by-id/dm-uuid-CRYPT-LUKS?-*"$(printf '%s' "$id" | tr -d -)"*
        [ -e "$1" ] || return 0
    done
    return 1
}

may_appear() {
    is_number "${main_loop:-}" && [ "$main_loop" -lt "$LUKS_TURNS" ]
}

# may_wait: dracut counts its turns while it neither asks for a passphrase nor has anything to do;
# after two thirds of them it tries LVM for the last time (RDRETRY), and must find it as it was.
may_wait() {
    is_number "${main_loop:-}" && [ $((main_loop * 3)) -lt "${RDRETRY:-360}" ]
}

# lvm_hold [DEVICE...]: dracut's lvm_scan leaves them alone, and is put off. It sees what 64-lvm.rules
# noted in /tmp, or everything where lvm.conf has a filter.
lvm_hold() {
    local device note
    mkdir -p "$RUN/held"
    for device; do
        note=.lvm_scan-$(kernel_name "$device")
        [ ! -e "$P/tmp/$note" ] || mv -f "$P/tmp/$note" "$RUN/held/"
    done
    rm -f "$hookdir/initqueue/settled/lvm_scan.sh"
}

# lvm_release: as if it had not been held.
lvm_release() {
    local note
    [ -d "$RUN/held" ] || return 0
    for note in "$RUN/held"/.lvm_scan-*; do
        [ ! -e "$note" ] || mv -f "$note" "$P/tmp/"
    done
    rmdir "$RUN/held"
    initqueue --settled --onetime --unique /sbin/lvm_scan
}

# --- the disk goes --------------------------------------------------------------------------

# detach_disk: the passphrase, the volume group and the layer go, then the LUKS mappings, and with
# them their keys.
detach_disk() {
    local name
    others_idle && forget_passphrase && layer_down && close_others || return 1
    ! name=$(mapping_name) || remove_mapping "$name" || return 1
    rm -f "$RUN/layer-kept"
}

# forget_passphrase: systemd leaves it in root's keyring for two and a half minutes, for the next LUKS
# device (systemd src/shared/ask-password-api.c, KEYRING_TIMEOUT_USEC).
forget_passphrase() {
    local end hint='' tries=0
    if keyctl clear @u > /dev/null 2>&1; then
        # the kernel takes it away a moment later
        while [ "$tries" -lt 20 ] && passphrase_kept; do
            tries=$((tries + 1))
            sleep 0.1
        done
    else
        hint=' (with keyctl, of the package keyutils, it would at once)'
    fi
    passphrase_kept || return 0
    say "waiting until the kernel forgets the passphrase, $PASSPHRASE_S s at most$hint"
    end=$(($(now_cs) + PASSPHRASE_S * 100))
    while passphrase_kept; do
        [ "$(now_cs)" -lt "$end" ] || {
            reason='the kernel did not forget the passphrase of the disk'
            return 1
        }
        sleep 1
    done
}
PASSPHRASE_S=160

# passphrase_kept: whether root's keyring still gives it away; see proc_keys(5).
passphrase_kept() {
    [ -n "$(awk '$4 != "expd" && $8 == "user" && $9 ~ /^cryptsetup/' "$P/proc/keys" 2> /dev/null)" ]
}

# others_idle: what dracut opened beside the root's on the same disk, LUKS devices for swap or data and
# volumes of other groups, can be closed. Asked before anything is.
others_idle() {
    local device number
    for device in $(others_on_disk); do
        number=$(cat "$P/sys/class/block/$device/dev")
        [ -z "$(awk -v n="$number" '$3 == n' "$P/proc/self/mountinfo")" ] || {
            other_in_use "$device"
            return 1
        }
    done
}

other_in_use() {
    reason="the disk can't be $ST_DISK: $(cat "$P/sys/class/block/$1/dm/name") is on it and in use"
}

# close_others: the top first.
close_others() {
    local round device name
    for round in 1 2 3 4 5; do
        for device in $(others_on_disk); do
            set -- "$P/sys/class/block/$device/holders"/*
            [ ! -e "$1" ] || continue
            name=$(cat "$P/sys/class/block/$device/dm/name")
            remove_mapping "$name" || {
                other_in_use "$device"
                return 1
            }
            # a persistent boot would take it for open
            timeout 30 systemctl stop "systemd-cryptsetup@$(printf '%s' "$name" | sed 's/-/\\x2d/g').service" \
                > /dev/null 2>&1 || :
        done
    done
    for device in $(others_on_disk); do
        other_in_use "$device"
        return 1
    done
}

# others_on_disk: the mappings, by kernel name, that share a partition or the whole disk with the root's.
others_on_disk() {
    local source parts device
    source=$(kernel_name "$SOURCE_DISK")
    parts=$(disks_below "$source")
    for device in "$P"/sys/class/block/dm-*; do
        device=${device##*/}
        # shellcheck disable=SC2143 # with -q the shell tells, on the console, of a pipe that nobody reads
        [ "$device" = "$source" ] || [ -z "$(disks_below "$device" | grep -xF "$parts")" ] || printf '%s\n' "$device"
    done
}

# remove_mapping NAME
remove_mapping() {
    # it may wait for udev in vain when it is done
    try 30 dmsetup remove --retry "$1" || ! dmsetup info "$1" > /dev/null 2>&1
}
