# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The backend image: a compressed root that ramboot.image made in a persistent boot is read from the
# disk, through the layer, into RAM and lies below a tmpfs that takes what dom0 writes. It is read in
# chunks, in parallel; each is compared with its recorded hash where it lies then, in RAM.
#
#   $RUN/root/image   tmpfs with the image's file
#   $RUN/root/lower   the image (squashfs, read-only)
#   $RUN/root/rw      tmpfs: upper and work directory
#   $RUN/root/root    the overlay of both, the root. It holds the others, which nobody else can reach

# Where ramboot.image puts it (ramboot/defaults.yaml, image_directory).
IMAGE_DIR=/var/lib/ramboot/image
IMAGE_KEYS='version file bytes chunk_mib sha256 made kernels packages configuration programs qubes'
# What an image takes of the bytes that the root uses, before it is known: two Debian roots took 42 and 44.
IMAGE_PERCENT=50
IMAGE_RULES=$P/run/udev/rules.d/63-ramboot-image.rules
# Pages of the file system that are not the image's.
IMAGE_EXTRA_BYTES=$((16 * MIB))

# --- which image ----------------------------------------------------------------------------

# image_choose: whether the image of the manifest may be used. Where the configuration says copy, a
# stale one makes ST_BACKEND zram.
image_choose() {
    local stale
    image_compare || return 1
    [ -n "$stale" ] || return 0
    stale="the image of $IMAGE_made is stale: $stale"
    case $CONF_image_stale,$IMAGE_fits in
        copy,*)
            ST_BACKEND=zram
            ST_NOTE="${ST_NOTE:+$ST_NOTE; }$stale; the root was copied (zram) instead"
            alert "$stale; copying the root (zram) instead"
            ;;
        use-and-say,yes)
            ST_NOTE="${ST_NOTE:+$ST_NOTE; }$stale"
            alert "$stale; it is used all the same (image:stale: use-and-say)"
            ;;
        *)
            reason="$stale; it has to be built anew (state ramboot.image)"
            return 1
            ;;
    esac
}

# image_manifest: sets IMAGE_* from the manifest, and $RUN/work/chunks with the hashes. As with the
# configuration, any line that is not understood is an error.
image_manifest() {
    local key value line dir="$RUN/source$IMAGE_DIR"
    for key in $IMAGE_KEYS; do
        unset "IMAGE_$key"
    done
    : > "$RUN/work/chunks"
    [ -f "$dir/manifest" ] || {
        reason="there is no image on $ST_DEVICE yet: the state ramboot.image builds it"
        return 1
    }
    while IFS= read -r line || [ -n "$line" ]; do
        key=${line%%=*}
        value=${line#*=}
        case $key in
            version) [ "$value" = 1 ] ;;
            file) image_word "$value" 'a-z0-9.-' ;;
            made) image_word "$value" '0-9TZ:-' ;;
            kernels) image_word "$value" 'A-Za-z0-9 ._+~-' ;;
            bytes | chunk_mib | source_bytes) is_number "$value" && [ "$value" -gt 0 ] ;;
            sha256 | packages | configuration | programs | qubes | chunk) is_sha256 "$value" ;;
            *) false ;;
        esac || {
            reason="the image's manifest has a line that is not understood: $(printable "$line")"
            return 1
        }
        case $key in
            chunk) printf '%s\n' "$value" >> "$RUN/work/chunks" ;;
            *) eval "IMAGE_$key=\$value" ;;
        esac
    done < "$dir/manifest"
    for key in $IMAGE_KEYS; do
        eval "value=\${IMAGE_$key:-}"
        [ -n "$value" ] || {
            reason="the image's manifest has no line $key="
            return 1
        }
    done
    IMAGE_CHUNKS=$(((IMAGE_bytes + IMAGE_chunk_mib * MIB - 1) / (IMAGE_chunk_mib * MIB)))
    [ "$(wc -l < "$RUN/work/chunks")" -eq "$IMAGE_CHUNKS" ] || {
        reason="the image's manifest lacks hashes: there must be $IMAGE_CHUNKS"
        return 1
    }
    IMAGE_FILE=$dir/$IMAGE_file
    [ -f "$IMAGE_FILE" ] || {
        reason="the image $IMAGE_DIR/$IMAGE_file is missing on $ST_DEVICE"
        return 1
    }
    [ "$(wc -c < "$IMAGE_FILE")" -eq "$IMAGE_bytes" ] || {
        reason="the image of $IMAGE_made has $(wc -c < "$IMAGE_FILE") bytes instead of $IMAGE_bytes"
        return 1
    }
}

# image_word VALUE CHARACTERS: of these characters alone (for tr), and not a path upwards.
image_word() {
    [ -n "$1" ] && [ "${1#.}" = "$1" ] && [ -z "$(printf '%s' "$1" | LC_ALL=C tr -d "$2")" ]
}

is_sha256() {
    case $1 in
        *[!0-9a-f]*) return 1 ;;
    esac
    [ ${#1} -eq 64 ]
}

# image_compare: sets `stale` to what the image lacks, empty for nothing, and IMAGE_fits to whether
# this kernel could run it.
image_compare() {
    local kernel part sum recorded
    stale=
    IMAGE_fits=yes
    read -r kernel < "$P/proc/sys/kernel/osrelease" || kernel=unknown
    case " $IMAGE_kernels " in
        *" $kernel "*) ;;
        *)
            IMAGE_fits=no
            stale="it has no modules for the running kernel $kernel"
            return 0
            ;;
    esac
    root_state "$RUN/source" "$RUN/work/listing" > "$RUN/work/state" || {
        reason="whether the image of $IMAGE_made is stale could not be told"
        return 1
    }
    while read -r part sum; do
        eval "recorded=\$IMAGE_$part"
        [ "$sum" = "$recorded" ] || stale="$stale${stale:+, }$(state_text "$part")"
    done < "$RUN/work/state"
    [ -z "$stale" ] || stale="changed since: $stale"
}

# --- read, prove, mount ---------------------------------------------------------------------

# make_image: the proven root at $RUN/root/root, from IMAGE_FILE. Without one when image_choose decides
# for another backend.
make_image() {
    image_manifest || return 1
    ST_BYTES=$IMAGE_bytes
    budget || return 1
    say "reading the image of $IMAGE_made ($(human "$IMAGE_bytes")): $(human "$ST_NEEDED") of RAM needed, $(human "$ST_AVAILABLE") available"
    mkdir "$RUN/root/image" "$RUN/root/lower" "$RUN/root/rw"
    mount_noswap "size=$((IMAGE_bytes + MIB)),mode=0700" "$RUN/root/image" || return 1
    IMAGE_COPY=$RUN/root/image/root.squashfs
    phase copy
    image_read || return 1
    # meanwhile: looking at thousands of small things is waiting for the disk
    image_choose || {
        stop_workers
        return 1
    }
    [ "$ST_BACKEND" = image ] || {
        stop_workers
        try 30 umount "$RUN/root/image"
        return
    }
    image_arrived || return 1
    phase prove
    image_mount || return 1
    layer_healthy && root_check "$RUN/root/root" && root_prepare "$RUN/root/root" || return 1
    # for ramboot status, in the session
    grep -v '^chunk=' "$RUN/source$IMAGE_DIR/manifest" > "$RUN/image"
}

# image_read: begins to read IMAGE_FILE into IMAGE_COPY, each chunk compared with its hash.
image_read() {
    awk -v n="$(worker_count)" -v base="$RUN/work/image" '{ print NR - 1, $1 > (base "." NR % n) }' "$RUN/work/chunks"
    : > "$IMAGE_COPY"
    work_lists image image_read_chunks
}

# image_arrived: waits until all of it is there.
image_arrived() {
    watch_copy "$IMAGE_bytes" image_copied && collect_workers || return 1
    [ "$(cat "$RUN"/work/image.*.done | wc -l)" -eq "$IMAGE_CHUNKS" ] \
        && [ "$(wc -c < "$IMAGE_COPY")" -eq "$IMAGE_bytes" ] || {
        reason="not all of the $IMAGE_bytes bytes of the image arrived"
        return 1
    }
}

# image_read_chunks LIST: one worker; lines "NUMBER SHA256".
image_read_chunks() {
    local number sum size="$IMAGE_chunk_mib"
    while read -r number sum; do
        # past the page cache, which nobody would read again
        dd if="$IMAGE_FILE" of="$IMAGE_COPY" bs="${size}M" iflag=direct conv=notrunc \
            skip="$number" seek="$number" count=1 2> "$1.dd" || {
            dd_error "$1.dd"
            return 1
        }
        [ "$(dd if="$IMAGE_COPY" bs=1M skip=$((number * size)) count="$size" 2> /dev/null | sha256sum)" = "$sum  -" ] || {
            printf 'the image is damaged between %s and %s MiB\n' $((number * size)) $(((number + 1) * size))
            return 1
        }
        printf '%s\n' "$number" >> "$1.done"
    done < "$1" > "$RUN/work/err.${1##*.}" 2>&1
}

image_copied() {
    used_bytes "$RUN/root/image"
}

# image_mount: the overlay. Lazily unmounted, the file systems live as long as it does.
image_mount() {
    local kernel size loop
    modprobe -qa loop squashfs 2> /dev/null
    try 60 mount -t squashfs -o ro,nodev,loop "$IMAGE_COPY" "$RUN/root/lower" || return 1
    read -r kernel < "$P/proc/sys/kernel/osrelease"
    [ -d "$RUN/root/lower/usr/lib/modules/$kernel" ] && [ -d "$RUN/root/lower/etc" ] || {
        reason="the image of $IMAGE_made holds no system with modules for the kernel $kernel"
        return 1
    }
    size=$(((ST_LIMIT - IMAGE_bytes - IMAGE_EXTRA_BYTES) / MIB))
    overlay_mount ramboot-image "$size" || return 1
    loop=$(awk -v d="$RUN/root/lower" '$2 == d { print $1 }' "$P/proc/self/mounts")
    umount "$RUN/root/rw" && umount "$RUN/root/lower" && umount -l "$RUN/root/image" || {
        reason='the layers of the image are busy'
        return 1
    }
    image_keep_from_qubes "${loop##*/}"
}

# image_keep_from_qubes LOOP: a device that nobody seems to use would be offered to qubes
# (linux-utils, udev/udev-qubes-block.rules), a loop device in spite of the flag
# (core-admin-linux, system-config/00-qubes-ignore-devices.rules).
image_keep_from_qubes() {
    mkdir -p "${IMAGE_RULES%/*}"
    printf 'SUBSYSTEM=="block", KERNEL=="%s", ENV{%s}="1", ENV{%s}="0"\n' \
        "$1" DM_UDEV_DISABLE_DISK_RULES_FLAG QUBES_EXPORT_BLOCK_DEVICE > "$IMAGE_RULES" || :
}
