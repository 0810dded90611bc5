# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The backend overlay: the disk's root stays below, read-only, and dom0 writes into a tmpfs above
# it. Nothing is copied. The volume group is the disk's own, so qubes on it work and keep their
# data, and activating a thin pool writes a few KiB of its metadata.
# A bare read-only mount replays the journal onto the disk. A root whose journal holds something is
# refused, for without it the file system may be in any state.

# make_overlay: the root at $RUN/root/root, from the activated root device.
make_overlay() {
    local size
    overlay_source && budget || return 1
    size=$((ST_LIMIT / MIB))
    mkdir "$RUN/root/lower" "$RUN/root/rw"
    # the device itself stays writable, for the persistent boot that a later failure ends in
    try 60 mount -t "$ST_FSTYPE" -o "$LOWER_OPTIONS" "$SOURCE_ROOT" "$RUN/root/lower" || return 1
    ST_BYTES=$(used_bytes "$RUN/root/lower")
    overlay_mount ramboot-root "$size" || return 1
    # the overlay has its own hold of both; nobody else needs to reach them
    umount "$RUN/root/lower" && umount "$RUN/root/rw" || {
        reason='the layers of the overlay are busy'
        return 1
    }
    overlay_is_whole "$RUN/root/root" && root_check "$RUN/root/root" && root_prepare "$RUN/root/root"
}

# overlay_mount NAME MIB: the root, $RUN/root/lower below a tmpfs of that size.
overlay_mount() {
    modprobe -q overlay 2> /dev/null
    mount_noswap "size=${2}m,nr_inodes=0,mode=0755" "$RUN/root/rw" || return 1
    # owner and mode of / are those of upper
    mkdir "$RUN/root/rw/upper" "$RUN/root/rw/work" \
        && chown --reference="$RUN/root/lower" "$RUN/root/rw/upper" \
        && chmod --reference="$RUN/root/lower" "$RUN/root/rw/upper" || return 1
    try 30 mount -t overlay -o "lowerdir=$RUN/root/lower,upperdir=$RUN/root/rw/upper,workdir=$RUN/root/rw/work" \
        "$1" "$RUN/root/root"
}

# overlay_source: the root device, if its file system can be read without being repaired.
overlay_source() {
    case $ROOT_KIND in
        lvm) SOURCE_ROOT=/dev/mapper/$(dm_name "$ROOT_SPEC") ;;
        *) SOURCE_ROOT=$SOURCE_DISK ;;
    esac
    [ -b "$SOURCE_ROOT" ] || {
        reason="the root device $SOURCE_ROOT did not appear"
        return 1
    }
    ST_DEVICE=$SOURCE_ROOT
    ST_FSTYPE=$(blkid -p -o value -s TYPE "$SOURCE_ROOT" 2> /dev/null)
    case $ST_FSTYPE in
        ext4) overlay_ext4 ;;
        xfs) overlay_xfs ;;
        btrfs) overlay_btrfs ;;
        *)
            reason="the backend overlay needs ext4, xfs or btrfs, the root file system is ${ST_FSTYPE:-of unknown type}"
            return 1
            ;;
    esac
}

DIRTY='the disk was not left in good order, and its journal would have to be replayed; boot from it once'

overlay_ext4() {
    local head
    LOWER_OPTIONS=ro,noload
    head=$(dumpe2fs -h "$SOURCE_ROOT" 2> /dev/null)
    case $head in
        *needs_recovery*)
            reason=$DIRTY
            return 1
            ;;
    esac
    # not so "not clean", "clean with errors"; and files deleted while they were open are removed from
    # the disk even by a mount that is read-only (linux fs/ext4/orphan.c, ext4_orphan_cleanup)
    case $(printf '%s\n' "$head" | sed -n 's/^Filesystem state: *//p'),$head in
        *orphan_present* | *'First orphan inode:'*) ;;
        clean,*) return 0 ;;
    esac
    reason='the file system on the disk needs a check; boot from it once'
    return 1
}

# overlay_xfs: the kernel knows whether the log holds something, and mounts it then from no device
# that is read-only (linux fs/xfs/xfs_log_recover.c, xlog_recover).
overlay_xfs() {
    local loop
    LOWER_OPTIONS=ro,norecovery
    modprobe -q loop 2> /dev/null
    loop=$(losetup --read-only --find --show "$SOURCE_ROOT" 2> /dev/null)
    [ -n "$loop" ] || {
        reason='whether the journal of the disk would have to be replayed could not be told: no loop device'
        return 1
    }
    try 60 mount -t xfs -o ro "$loop" "$RUN/root/root" || {
        losetup -d "$loop" 2> /dev/null || :
        reason="$DIRTY ($reason)"
        return 1
    }
    # a device that is still mounted goes with its mount
    losetup -d "$loop" 2> /dev/null && try 30 umount "$RUN/root/root"
}

# overlay_btrfs: it is always in good order, but may have a log of what was asked for by fsync(2).
overlay_btrfs() {
    LOWER_OPTIONS=ro,rescue=nologreplay$(root_subvolume)
    btrfs_alone "$SOURCE_ROOT" || return 1
    [ "$(btrfs_number "$SOURCE_ROOT" 96)" = 00000000 ] || {
        reason=$DIRTY
        return 1
    }
}

# overlay_is_whole ROOT: an overlay covers no other mount.
overlay_is_whole() {
    local target
    fstab_subvolumes "$1" > "$RUN/work/subvolumes" || return 1
    ! read -r target _ < "$RUN/work/subvolumes" || {
        reason="the backend overlay needs all of the root in one btrfs subvolume, and $target is another"
        return 1
    }
}
