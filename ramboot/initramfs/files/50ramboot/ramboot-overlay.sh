# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The backend overlay: the disk's root stays below, read-only, and dom0 writes into a tmpfs above
# it. Nothing is copied. The volume group is the disk's own, so qubes on it work and keep their
# data, and activating a thin pool writes a few KiB of its metadata.

# make_overlay: the root at $RUN/root/root, from the activated root device.
make_overlay() {
    local size
    overlay_source && budget || return 1
    size=$((ST_LIMIT / MIB))
    mkdir "$RUN/root/lower" "$RUN/root/rw"
    # noload: a bare read-only mount replays the journal onto the disk. The device itself stays
    # writable, for the persistent boot that a later failure ends in.
    try 60 mount -t ext4 -o ro,noload "$SOURCE_ROOT" "$RUN/root/lower" || return 1
    ST_BYTES=$(used_bytes "$RUN/root/lower")
    mount_noswap "size=${size}m,nr_inodes=0,mode=0755" "$RUN/root/rw" || return 1
    # upper's mode is that of /
    mkdir -m 0755 "$RUN/root/rw/upper" "$RUN/root/rw/work"
    modprobe -q overlay 2> /dev/null
    try 30 mount -t overlay -o "lowerdir=$RUN/root/lower,upperdir=$RUN/root/rw/upper,workdir=$RUN/root/rw/work" \
        ramboot-root "$RUN/root/root" || return 1
    # the overlay has its own hold of both; nobody else needs to reach them
    umount "$RUN/root/lower" && umount "$RUN/root/rw" || {
        reason='the layers of the overlay are busy'
        return 1
    }
    root_check "$RUN/root/root" && root_prepare "$RUN/root/root"
}

# overlay_source: the root device, if its file system can be read without being repaired.
overlay_source() {
    case $ROOT_KIND in
        lvm) SOURCE_ROOT=/dev/mapper/$(dm_name "$ROOT_SPEC") ;;
        *) SOURCE_ROOT=$ROOT_SPEC ;;
    esac
    [ -b "$SOURCE_ROOT" ] || {
        reason="the root device $SOURCE_ROOT did not appear"
        return 1
    }
    ST_DEVICE=$SOURCE_ROOT
    ST_FSTYPE=$(blkid -p -o value -s TYPE "$SOURCE_ROOT" 2> /dev/null)
    [ "$ST_FSTYPE" = ext4 ] || {
        reason="the backend overlay needs ext4, the root file system is ${ST_FSTYPE:-of unknown type}"
        return 1
    }
    case $(LC_ALL=C dumpe2fs -h "$SOURCE_ROOT" 2> /dev/null) in
        *needs_recovery*)
            reason='the disk was not left in good order, and its journal would have to be replayed; boot from it once'
            return 1
            ;;
        *'Filesystem state:'*clean*) ;;
        *)
            reason='the file system on the disk needs a check; boot from it once'
            return 1
            ;;
    esac
}
