# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The backend snapshot: the layer over the opened disk stays, and the system starts from it as
# from the disk. dom0 and every qube write into its store in RAM; the disk gets nothing.
# LVM must know the layer alone, here and in the running system: it takes a device merely put
# beside the physical volume for a duplicate, or under a devices file goes on writing to the disk.
# A root on LVM is then mounted as ever. Any other lies on the layer itself: it is mounted here, and
# handed over as a copy is; of what else is on that disk nothing is used.

# The store is as large as the disk, so that it can't run out of addresses, but for this many
# times the RAM that it may take: zram needs 1/256 of its size for a table, whatever it holds
# (16 bytes a page, drivers/block/zram/zram_drv.h).
SNAPSHOT_STORE_FACTOR=8

make_snapshot() {
    local physical="$LAYER"
    if [ "$ROOT_KIND" = device ]; then
        physical=
        # swap would be beside the layer
        CONF_swap=session
    fi
    phase layer
    snapshot_plan && budget && layer_up && disk_read_only || return 1
    phase prepare
    source_mount && root_check "$RUN/source" && measure && root_prepare "$RUN/source" \
        && layer_lvm_config "$RUN/source" && lvm_sees_alone "$RUN/source" "$physical" && layer_healthy || return 1
    if [ "$ROOT_KIND" = device ]; then
        # without the other subvolumes, which fstab mounts
        root_place && try 10 mount --bind "$RUN/source" "$RUN/root/root" || return 1
    fi
    umount_below "$RUN/source"
    ! mountpoint -q "$RUN/source" || {
        reason="the root in ramboot's layer is busy"
        return 1
    }
}

# snapshot_plan: size of the store and its chunk. The chunk is not smaller than that of any thin
# pool, for else the pool passes no discard down, and what is deleted keeps its RAM.
snapshot_plan() {
    local disk room chunk=
    if [ "$ROOT_KIND" = device ] && [ -n "$(getargs rd.lvm.lv)" ]; then
        reason='the kernel line asks for LVM volumes (rd.lvm.lv) beside the root, which the backend snapshot would not cover'
        return 1
    fi
    disk=$(($(blockdev --getsize64 "$SOURCE_DISK") / MIB + 1))
    room=$(($(meminfo_bytes MemAvailable) / MIB - CONF_reserve_mib))
    [ "$room" -gt 0 ] || room=0
    LAYER_STORE_MIB=$CONF_snapshot_store_mib
    if [ "$LAYER_STORE_MIB" = auto ]; then
        LAYER_STORE_MIB=$((room * SNAPSHOT_STORE_FACTOR))
        [ "$LAYER_STORE_MIB" -le "$disk" ] || LAYER_STORE_MIB=$disk
    fi
    ROOT_SIZE=$((LAYER_STORE_MIB * MIB))
    [ "$ROOT_KIND" = device ] || chunk=$(timeout -k 5 60 lvm lvs --nolocking --noheadings --nosuffix --units s -S 'segtype=thin-pool' \
        -o chunk_size "${ROOT_SPEC%%/*}" 2> /dev/null) || {
        reason="LVM did not tell the chunk size of the thin pools of ${ROOT_SPEC%%/*}"
        return 1
    }
    chunk=$(printf '%s\n' "$chunk" | sort -n | tail -n 1 | tr -dc '0-9')
    # without a thin pool
    is_number "$chunk" || chunk=0
    # a power of two
    while [ "$LAYER_CHUNK" -lt "$chunk" ]; do
        LAYER_CHUNK=$((LAYER_CHUNK * 2))
    done
    LAYER_OPTIONS='1 discard_zeroes_cow'
    LAYER_ALGORITHM=$CONF_zram_algorithm
    [ "$LAYER_ALGORITHM" != auto ] || LAYER_ALGORITHM=
    ST_BYTES=0
}

# snapshot_ready: the last look before the root is mounted.
snapshot_ready() {
    layer_healthy && layer_holds_root || return 1
    [ "$ROOT_KIND" = lvm ] || {
        layer_has_links
        return
    }
    depends_on "$(kernel_name "/dev/mapper/$(dm_name "$ROOT_SPEC")")" "$(kernel_name "/dev/mapper/$LAYER")" || {
        reason="the root volume does not lie on ramboot's layer"
        return 1
    }
}
