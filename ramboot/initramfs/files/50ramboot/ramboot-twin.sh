# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# A second volume group with the name of the root's: a clone, an old system's disk, or one that
# somebody put there. LVM goes by the name. A bare disk is seen before the passphrase is typed, and
# LVM's scan in the initramfs would activate its volumes as the root's; once it sees both groups it
# activates neither. So that scan waits for the disk that the kernel line has opened, and the
# volumes are then activated from there alone, for a persistent boot.

TWIN_ROOT=

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
            || alert "the volume $lv could not be activated: $reason"
    done
    reason=$told
    udevadm settle --timeout=30
}
