# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# A second volume group with the name of the root's: a clone, an old system's disk, or one that
# somebody put there. LVM goes by the name. A bare disk is seen before the passphrase is typed, and
# LVM's scan in the initramfs would activate its volumes as the root's; once it sees both groups it
# activates neither. So that scan waits for the disk that the kernel line has opened, and the
# volumes are then activated from there alone, for a persistent boot.

TWIN_ROOT=

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

# twin_found VG DEVICE...: which is the root's, if that can be told: TWIN_ROOT.
twin_found() {
    local vg="$1" device own='' others=''
    shift
    for device; do
        if on_named_luks "$device"; then
            own="$own $device"
        else
            others="$others $device"
        fi
    done
    # shellcheck disable=SC2086 # lists of devices
    case ${own# } in
        '' | *' '*)
            reason="there is more than one volume group $vg, on$(enumerate "$@"), and nothing tells which is the root's"
            ;;
        *)
            TWIN_ROOT=${own# }
            reason="there is more than one volume group $vg: the root's on $(own_name "$TWIN_ROOT"), another on$(enumerate $others)"
            lvm_hold $others
            rm -f "$RUN/held"/.lvm_scan-*
            ;;
    esac
}

# enumerate WORD...: " A, B"
enumerate() {
    printf ' %s' "$1"
    shift
    [ $# -eq 0 ] || printf ', %s' "$@"
}

# twin_boot: the root's volumes for a persistent boot, with the other group out of LVM's sight.
twin_boot() {
    local lv told="$reason"
    [ -n "$TWIN_ROOT" ] || return 0
    for lv in $(getargs rd.lvm.lv); do
        [ "${lv%%/*}" = "${ROOT_SPEC%%/*}" ] || continue
        try "$LVM_LIMIT_S" lvm lvchange -ay -K --yes --sysinit "$lv" \
            --config "$(lvm_devices "$(readlink -f "$TWIN_ROOT")") activation{monitoring=0}" \
            || warn "the volume $lv could not be activated: $reason"
    done
    reason=$told
    udevadm settle --timeout=30
}
