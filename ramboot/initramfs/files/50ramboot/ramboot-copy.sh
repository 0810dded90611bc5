# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# From the layer into RAM, and the proof that all of it arrived.
#   blocks: ext4 onto zram, used ranges only, direct I/O in parallel (the compression runs in
#           the writer, so each worker is a core's worth of it)
#   files:  anything onto tmpfs, or onto a new ext4 on zram: trees by parallel cp (a third of the
#           work of two tars and a pipe), what ties the trees together by tar

# Unused gaps up to this are copied along: a process for each small hole costs more. fstrim
# gives their RAM back afterwards.
MERGE_GAP_BYTES=1048576
# Pieces of work are at most this large, so that the workers end together.
PIECE_BYTES=67108864
# A directory with more than this below it is shared among several cp.
SHARED_BYTES=16777216
# No progress for so long ends the copy.
STALL_S=120
# What was killed is waited for so long.
STOP_S=10
# How often it is looked how far the copy is. Its end is noticed at once.
WATCH_S=1

# Compressed size in percent of what is used: dom0 roots took 56 to 63 with lzo-rle
# (1.3 and 5.3 GB of Fedora and Debian), lz4 a little more, zstd less.
ratio_percent() {
    case $1 in
        zstd) printf 55 ;;
        *) printf 68 ;;
    esac
}

worker_count() {
    local count
    count=$(grep -c '^processor' "$P/proc/cpuinfo")
    is_number "$count" && [ "$count" -ge 1 ] || count=1
    [ "$count" -le 8 ] || count=8
    printf '%s' "$count"
}

# --- measuring ------------------------------------------------------------------------------

# source_mount: the root in the layer, writable there, at $RUN/source. The journal is replayed
# into the layer.
source_mount() {
    local options=rw
    mkdir -p "$RUN/source"
    ST_FSTYPE=$(blkid -p -o value -s TYPE "$SOURCE_ROOT" 2> /dev/null)
    ST_DEVICE=$SOURCE_DISK
    [ "$ROOT_KIND" = device ] || ST_DEVICE=/dev/${ROOT_SPEC}
    case $ST_FSTYPE in
        ext4)
            journal_inside "$SOURCE_ROOT" || return 1
            # what a persistent boot does too; 1: repaired
            timeout -k 5 600 e2fsck -p "$SOURCE_ROOT" > /dev/null 2>&1 < /dev/null
            [ $? -le 1 ] || {
                reason="the file system on $ST_DEVICE needs a check that ramboot can't make"
                return 1
            }
            ;;
        # the disk has the same UUID, which xfs refuses to mount twice
        xfs) options=rw,nouuid ;;
        btrfs)
            btrfs_alone "$SOURCE_ROOT" || return 1
            options=rw$(root_subvolume)
            ;;
        *)
            reason="the root file system ${ST_FSTYPE:-of unknown type} on $ST_DEVICE is not supported"
            return 1
            ;;
    esac
    try 120 mount -t "$ST_FSTYPE" -o "$options" "$SOURCE_ROOT" "$RUN/source" || return 1
    [ -d "$RUN/source/etc" ] && { [ -x "$RUN/source/sbin/init" ] || [ -L "$RUN/source/sbin/init" ]; } || {
        reason="there is no system on $ST_DEVICE"
        return 1
    }
    source_mount_subvolumes
}

# root_subvolume: the mount option for the subvolume with /, after a comma.
root_subvolume() {
    subvolume_option "$(getarg rootflags=)"
}

# subvolume_option OPTIONS: that of them which names a subvolume, after a comma.
subvolume_option() {
    printf '%s' ",$1," | sed -n 's/.*\(,subvol\(id\)\{0,1\}=[^,]*\),.*/\1/p'
}

# btrfs_number DEVICE OFFSET: 8 bytes of its superblock, least first, 0 and 1 as digits
# (linux include/uapi/linux/btrfs_tree.h, struct btrfs_super_block).
btrfs_number() {
    dd if="$1" bs=1 skip=$((65536 + $2)) count=8 2> /dev/null | LC_ALL=C tr '\000\001\060\061' '01xy'
}

# btrfs_alone DEVICE: that it is the only one. Another would be written past the layer.
btrfs_alone() {
    [ "$(btrfs_number "$1" 136)" = 10000000 ] || {
        reason="the btrfs on $ST_DEVICE has more devices than this one"
        return 1
    }
}

# journal_inside DEVICE: that its ext4 has no journal elsewhere, which would be written past the layer.
journal_inside() {
    case $(dumpe2fs -h "$1" 2> /dev/null) in
        *'Journal UUID:'* | *'Journal device:'*)
            reason="the journal of the file system on $ST_DEVICE is on another device"
            return 1
            ;;
    esac
}

# source_mount_subvolumes: what fstab mounts of the same btrfs (home, var) belongs to the root.
source_mount_subvolumes() {
    local target option
    fstab_subvolumes "$RUN/source" > "$RUN/work/subvolumes" || return 1
    while read -r target option; do
        try 60 mount -t btrfs -o "rw$option" "$SOURCE_ROOT" "$RUN/source$target" || return 1
    done < "$RUN/work/subvolumes"
}

# fstab_subvolumes ROOT: "TARGET ,OPTION" for each other subvolume of the root's btrfs.
fstab_subvolumes() {
    local spec target type options
    [ "$ST_FSTYPE" = btrfs ] && [ -f "$1/etc/fstab" ] || return 0
    root_uuid || return 1
    while read -r spec target type options _ || [ -n "$spec" ]; do
        [ "$type" = btrfs ] && [ "$target" != / ] && names_root "$spec" || continue
        printf '%s %s\n' "$target" "$(subvolume_option "$options")"
    done < "$1/etc/fstab"
}

# source_exclude: removes what the configuration excludes and the backend image's file, in the layer.
# The directories stay.
source_exclude() {
    local pattern
    printf '%s/*\n%s' "$IMAGE_DIR" "$CONF_EXCLUDE" > "$RUN/exclude"
    while IFS= read -r pattern; do
        (
            cd -P "$RUN/source" || exit 1
            # shellcheck disable=SC2086 # the pattern is meant to be expanded, by the shell alone
            set -- .$pattern
            directory=
            for path; do
                [ -e "$path" ] || [ -L "$path" ] || continue
                # a link may lead out of the root, into this initramfs
                [ "$directory" = "${path%/*}" ] || {
                    directory=${path%/*}
                    real=$(readlink -f "$directory")
                }
                case $real/ in
                    "$PWD"/*) ;;
                    *) continue ;;
                esac
                rm -rf --one-file-system -- "$path" || exit 1
            done
        ) || {
            reason="$(printable "$pattern") could not be left out of the copy"
            return 1
        }
    done < "$RUN/exclude"
}

# measure: what is left to copy. On xfs and btrfs files can share blocks, of which each file's copy
# has its own; a btrfs holds other subvolumes as well, and may be compressed.
measure() {
    local apart
    ST_BYTES=$(used_bytes "$RUN/source")
    case $ST_BACKEND,$ST_FSTYPE in
        zram,btrfs | tmpfs,btrfs) ST_BYTES=$(tree_bytes "$RUN/source") ;;
        zram,xfs | tmpfs,xfs)
            apart=$(tree_bytes "$RUN/source")
            is_number "$ST_BYTES" && is_number "$apart" && [ "$apart" -le "$ST_BYTES" ] || ST_BYTES=$apart
            ;;
    esac
    is_number "$ST_BYTES" || {
        reason='the size of the root file system could not be measured'
        return 1
    }
}

# used_bytes DIRECTORY
used_bytes() {
    df -B1 --output=used "$1" | tail -n 1 | tr -dc '0-9'
}

# tree_bytes DIRECTORY: what its files and those below have allocated, each apart.
tree_bytes() {
    du -s -B1 "$1" > "$RUN/work/tree-bytes" && cut -f 1 "$RUN/work/tree-bytes"
}

# need_bytes BACKEND SOURCE_BYTES: what the RAM root takes, without dom0's floor and headroom.
need_bytes() {
    case $1 in
        # and 16 bytes of its table for each page (drivers/block/zram/zram_drv.h)
        zram) printf '%s' "$(($2 * $(ratio_percent "$ALGORITHM") / 100 + ${ROOT_SIZE:-0} / 256))" ;;
        # page and inode overhead
        tmpfs) printf '%s' "$(($2 * 104 / 100 + 16 * MIB))" ;;
        # only the table; what is written is the headroom
        snapshot) printf '%s' "$((${ROOT_SIZE:-0} / 256))" ;;
        overlay) printf 0 ;;
        image) printf '%s' "$((${IMAGE_bytes:-$(($2 * IMAGE_PERCENT / 100))} + IMAGE_EXTRA_BYTES))" ;;
    esac
}

# budget: whether RAM suffices, before anything is copied.
budget() {
    local root
    root=$(need_bytes "$ST_BACKEND" "$ST_BYTES")
    ST_NEEDED=$((root + (CONF_reserve_mib + CONF_headroom_mib) * MIB))
    ST_AVAILABLE=$(meminfo_bytes MemAvailable)
    ST_LIMIT=$((ST_AVAILABLE - CONF_reserve_mib * MIB))
    [ "$ST_NEEDED" -le "$ST_AVAILABLE" ] || {
        reason="not enough RAM for $ST_BACKEND: $(human "$ST_NEEDED") needed ($(human "$root") root, $(human $((CONF_reserve_mib * MIB))) reserve, $(human $((CONF_headroom_mib * MIB))) headroom), $(human "$ST_AVAILABLE") available"
        return 1
    }
    one_of "$ST_BACKEND" snapshot overlay image || say "copying $(human "$ST_BYTES") to $ST_BACKEND: $(human "$ST_NEEDED") of RAM needed, $(human "$ST_AVAILABLE") available"
}

# choose_algorithm: sets ALGORITHM; auto is the fastest that the kernel has.
choose_algorithm() {
    local listed
    ALGORITHM=$CONF_zram_algorithm
    [ "$ALGORITHM" = auto ] || return 0
    listed=" $(tr -d '[]' < "$P/sys/block/zram$1/comp_algorithm" 2> /dev/null) "
    for ALGORITHM in lz4 lzo-rle lzo zstd; do
        case $listed in
            *" $ALGORITHM "*) return 0 ;;
        esac
    done
    ALGORITHM=
}

# --- watching a copy ------------------------------------------------------------------------

# work COMMAND...: runs it in the background, as one of $WORKERS. All that it starts holds the writing
# end of a pipe (9): that nobody does any more tells watch_copy, at the other (8), that the last has
# ended. A mark tells it that one failed.
work() {
    if [ -z "$WORKERS" ]; then
        rm -f "$RUN/work/ended" "$RUN/work/failed"
        mkfifo "$RUN/work/ended" || return 1
        exec 9<> "$RUN/work/ended"
        exec 8< "$RUN/work/ended"
    fi
    { "$@" || { : > "$RUN/work/failed" && false; }; } &
    WORKERS="$WORKERS $!"
    # for whoever comes after a shell that was killed
    printf '%s\n' "$!" >> "$RUN/workers"
}

# work_lists BASE COMMAND: one worker for each of the lists $RUN/work/BASE.0, BASE.1, ...
work_lists() {
    local list
    for list in "$RUN/work/$1".[0-9]; do
        work "$2" "$list" || return 1
    done
}

# watch_copy TOTAL_BYTES DONE_COMMAND: shows progress until all of $WORKERS ended. Ends
# the copy early when RAM runs out, nothing moves, or the time is over.
watch_copy() {
    local start now done=0 last=0 moved pid running rate percent left mem shown
    start=$(now_cs)
    moved=$start
    shown=0
    exec 9>&-
    while :; do
        running=
        for pid in $WORKERS; do
            kill -0 "$pid" 2> /dev/null && running=1
        done
        [ -n "$running" ] || break
        ! timeout "$WATCH_S" cat <&8 || break
        [ ! -e "$RUN/work/failed" ] || {
            stop_workers
            copy_error
            return 1
        }
        now=$(now_cs)
        done=$($2)
        is_number "$done" || done=$last
        [ "$done" -le "$1" ] || done=$1
        if [ "$done" -gt "$last" ]; then
            moved=$now
            last=$done
        fi
        mem=$(meminfo_bytes MemAvailable)
        if [ "$mem" -lt $((CONF_reserve_mib * MIB)) ]; then
            stop_workers
            reason="RAM ran out while copying: only $(human "$mem") available after $(human "$done"), the reserve is $CONF_reserve_mib MiB"
            return 1
        elif [ $((now - moved)) -gt $((STALL_S * 100)) ]; then
            stop_workers
            reason="the copy stood still for $STALL_S s after $(human "$done")"
            return 1
        elif [ $((now - start)) -gt $((CONF_copy_timeout_s * 100)) ]; then
            stop_workers
            reason="the copy did not end within $CONF_copy_timeout_s s"
            return 1
        fi
        [ $((now - shown)) -ge 180 ] || continue
        shown=$now
        percent=$((done / ($1 / 100 + 1)))
        rate=$((done * 100 / (now - start + 1)))
        left=$(((($1 - done) / (rate / 16 + 1) + 15) / 16))
        show_progress "Copying to RAM: $percent %, $((rate / MIB)) MiB/s, $left s left" "$percent"
    done
}

# show_progress TEXT PERCENT: each time on the console and the splash; never in the log. On the
# splash each line takes new room in Qubes' theme, so after 20 only each tenth percent.
show_progress() {
    printf '\r%s   ' "$1" > "$P/dev/console" 2> /dev/null || :
    PROGRESS_LINES=$((PROGRESS_LINES + 1))
    [ "$PROGRESS_LINES" -le 20 ] || [ $(($2 / 10)) -gt "$PROGRESS_TENTH" ] || return 0
    PROGRESS_TENTH=$(($2 / 10))
    splash_replace "$1"
}
PROGRESS_LINES=0
PROGRESS_TENTH=0
WORKERS=

# stop_workers: kills them, and returns when nothing of theirs runs: a read that has begun holds what it
# reads until it has ended.
stop_workers() {
    local pid end
    KILLED=
    for pid in $WORKERS; do
        kill_tree "$pid"
    done
    # shellcheck disable=SC2086 # a list of PIDs
    wait $WORKERS 2> /dev/null
    no_workers
    end=$(($(now_cs) + STOP_S * 100))
    for pid in $KILLED; do
        while runs "$pid" && [ "$(now_cs)" -lt "$end" ]; do
            sleep 0.1
        done
    done
}

no_workers() {
    WORKERS=
    rm -f "$RUN/workers"
}

# runs PID: what waits for its parent alone holds nothing any more.
runs() {
    local state
    process_state "$1" && [ "$state" != Z ]
}

# process_state PID: sets $state to the kernel's letter for it; 1 without such a process.
process_state() {
    read -r _ _ state _ 2> /dev/null < "$P/proc/$1/stat"
}

# kill_tree PID: kills it and its children (dd, tar), which would go on; adds their PIDs to $KILLED.
kill_tree() {
    local stat child parent
    # meanwhile it would start the next
    kill -STOP "$1" 2> /dev/null || return 0
    await_stop "$1"
    for stat in "$P"/proc/[0-9]*/stat; do
        read -r child _ _ parent _ 2> /dev/null < "$stat" || continue
        [ "$parent" = "$1" ] && kill_tree "$child"
    done
    kill -KILL "$1" 2> /dev/null || :
    KILLED="$KILLED $1"
}
KILLED=

# await_stop PID: a fork that has begun ends before its process stops. What reads from a disk that does not
# answer stops when the read has ended: it starts nothing, and is not waited for longer than a second.
await_stop() {
    local state end
    end=$(($(now_cs) + 100))
    while process_state "$1" && [ "$state" != T ] && [ "$state" != Z ]; do
        [ "$(now_cs)" -lt "$end" ] || return 0
        sleep 0.01
    done
}

# collect_workers: the end of each; 1 if one failed, with the first message of its log.
collect_workers() {
    local pid failed=
    for pid in $WORKERS; do
        wait "$pid" || failed=1
    done
    no_workers
    [ -z "$failed" ] || {
        copy_error
        return 1
    }
}

# copy_error: the first thing that a worker had to say, what was wrong at its end.
copy_error() {
    reason="the copy failed: $(printable "$(cat "$RUN"/work/err.* 2> /dev/null | head -n 1)" 200)"
}

# --- blocks ---------------------------------------------------------------------------------

# plan_blocks: $RUN/work/pieces with "START LENGTH" in bytes of what the file system uses.
plan_blocks() {
    LC_ALL=C timeout -k 5 120 dumpe2fs "$SOURCE_ROOT" 2> /dev/null < /dev/null | awk -v gap="$MERGE_GAP_BYTES" -v piece="$PIECE_BYTES" '
        /^Block count:/ { blocks = $3 }
        /^Block size:/ { size = $3 }
        /^  Free blocks: / {
            sub(/^  Free blocks: /, "")
            n = split($0, ranges, /, */)
            for (i = 1; i <= n; i++) {
                if (ranges[i] !~ /^[0-9]/) continue
                m = split(ranges[i], ends, "-")
                first = ends[1] + 0; last = ends[m] + 0
                # two groups can share one hole
                if (holes && first == to[holes] + 1) to[holes] = last
                else { holes++; from[holes] = first; to[holes] = last }
            }
            seen = 1
        }
        function emit(start, end,   length_) {
            while (start < end) {
                length_ = end - start
                if (length_ > piece) length_ = piece
                printf "%.0f %.0f\n", start, length_
                start += length_
            }
        }
        END {
            if (!blocks || !size || !seen) exit 1
            start = 0
            for (i = 1; i <= holes; i++) {
                if ((to[i] - from[i] + 1) * size <= gap) continue
                emit(start * size, from[i] * size)
                start = to[i] + 1
            }
            emit(start * size, blocks * size)
        }' > "$RUN/work/pieces" && [ -s "$RUN/work/pieces" ] || {
        reason="the used blocks of $ST_DEVICE could not be listed"
        return 1
    }
}

# dd_error FILE: what dd had to say there but for its figures.
dd_error() {
    sed '/ records in$/d; / records out$/d; / copied, /d' "$1"
}

# copy_piece_list LIST: one worker.
copy_piece_list() {
    local start length
    while read -r start length; do
        dd if="$SOURCE_ROOT" of="$P/dev/zram$ROOT_ZRAM" bs=1M iflag=direct,skip_bytes,count_bytes \
            oflag=direct,seek_bytes conv=notrunc skip="$start" seek="$start" count="$length" \
            2> "$1.dd" || {
            dd_error "$1.dd"
            return 1
        }
        awk '/bytes/ { print $1 }' "$1.dd" >> "$1.done"
    done < "$1" 2> "$RUN/work/err.${1##*.}" >&2
}

zram_copied() {
    local stat
    # 7th value of Documentation/block/stat.rst: sectors written
    read -r stat < "$P/sys/block/zram$ROOT_ZRAM/stat" || return 1
    # shellcheck disable=SC2086 # fields
    set -- $stat
    printf '%s' "$(($7 * 512))"
}

# build_blocks: SOURCE_ROOT onto /dev/zram$ROOT_ZRAM.
build_blocks() {
    local total known features=^has_journal
    # Not in the copy: the journal (useless in RAM) and the UUID, by which udev and mount would
    # take the copy for the disk. Both change the layer only. tune2fs wants a whole check since
    # the last mount.
    timeout -k 5 600 e2fsck -fp "$SOURCE_ROOT" > /dev/null 2>&1 < /dev/null
    [ $? -le 1 ] || {
        reason="the file system on $ST_DEVICE did not pass its check"
        return 1
    }
    known=$(LC_ALL=C dumpe2fs -h "$SOURCE_ROOT" 2> /dev/null | sed -n 's/^Filesystem features://p')
    # shellcheck disable=SC2086 # the words
    set -- $known
    # the orphan file (e2fsprogs 1.47) is an error without a journal
    ! one_of orphan_file "$@" || features=$features,^orphan_file
    # with a seed of their own the checksums of all metadata outlive the UUID's change (tune2fs.c)
    ! one_of metadata_csum "$@" || features=$features,metadata_csum_seed
    try 120 tune2fs -O "$features" -U random -f "$SOURCE_ROOT" || return 1
    plan_blocks || return 1
    total=$(awk '{ sum += $2 } END { printf "%.0f", sum }' "$RUN/work/pieces")
    awk -v n="$(worker_count)" -v base="$RUN/work/list" '{ print > (base "." NR % n) }' "$RUN/work/pieces"
    work_lists list copy_piece_list && watch_copy "$total" zram_copied && collect_workers || return 1
    [ "$(cat "$RUN"/work/list.*.done | awk '{ sum += $1 } END { printf "%.0f", sum }')" = "$total" ] || {
        reason="not all of the $total bytes of $ST_DEVICE arrived"
        return 1
    }
}

# prove_blocks: the copy is a sound file system with as many blocks and inodes in use as the source.
prove_blocks() {
    local fields='^(Inode count|Block count|Free blocks|Free inodes|Filesystem UUID|Block size):'
    layer_healthy || return 1
    blockdev --flushbufs "/dev/zram$ROOT_ZRAM" 2> /dev/null
    try 600 e2fsck -fn "/dev/zram$ROOT_ZRAM" || return 1
    LC_ALL=C dumpe2fs -h "$SOURCE_ROOT" 2> /dev/null | grep -E "$fields" > "$RUN/work/source.sb"
    LC_ALL=C dumpe2fs -h "/dev/zram$ROOT_ZRAM" 2> /dev/null | grep -E "$fields" > "$RUN/work/copy.sb"
    [ -s "$RUN/work/source.sb" ] && cmp -s "$RUN/work/source.sb" "$RUN/work/copy.sb" || {
        reason='the copy has other block or inode counts than its source'
        return 1
    }
}

# drop_unwritten: what the journal allocated ahead, up to 8 MiB a file (journal-file.c,
# FILE_SIZE_INCREASE). On the disk that holds what was deleted there, which came along with the
# blocks though nobody can read it, and does not compress.
drop_unwritten() {
    local file first last
    command -v filefrag > /dev/null && command -v fallocate > /dev/null || return 0
    for file in "$RUN"/root/root/var/log/journal/*/*.journal; do
        # a line for each extent: number, first and last byte in the file, ..., flags
        timeout -k 5 60 filefrag -v -b1 "$file" 2> /dev/null \
            | sed -n '/unwritten/s/^ *[0-9]*: *\([0-9]*\)\.\. *\([0-9]*\):.*/\1 \2/p' \
            | while read -r first last; do
                fallocate -p -o "$first" -l $((last - first + 1)) "$file" 2> /dev/null || :
            done
    done
}

# --- files ----------------------------------------------------------------------------------

# plan_files: lists, relative and NUL-separated: shared, the directories that are too large for
# one cp, parents first; links, the files with several links; late, the directories that get
# entries after they were copied. Here as below, no sockets: they mean nothing without their process.
plan_files() {
    (
        cd "$RUN/source" || exit 1
        du -0 -t "$SHARED_BYTES" . > "$RUN/work/sizes" || exit 1
        { printf '.\0' && cut -z -f 2- "$RUN/work/sizes"; } | sort -z -u > "$RUN/work/shared" || exit 1
        find . ! -type d ! -type s -links +1 -print0 -fprintf "$RUN/work/parents" '%h\0' > "$RUN/work/links" || exit 1
        sort -z -u "$RUN/work/shared" "$RUN/work/parents" > "$RUN/work/late"
    ) || {
        reason="the files of $ST_DEVICE could not be listed"
        return 1
    }
}

# cp_files: what shared directories hold but for other shared ones, a cp for each, two at once for
# each processor, as reading waits. cp makes whole trees: with a list of files and --parents it
# takes three times as long.
cp_files() {
    # shellcheck disable=SC2016 # for the inner shell; not cp -a, which keeps silent about an
    # attribute that it could not keep
    (cd "$RUN/source" && xargs -0 -P "$(($(worker_count) * 2))" -I '{}' sh -c '
        find "$1" -mindepth 1 -maxdepth 1 ! -type s -print0 | sort -z | comm -z -23 - "$2/work/shared" \
            | xargs -0 -r cp -dR --preserve=mode,ownership,timestamps,links,xattr --reflink=never \
                --sparse=auto -t "$2/root/root/$1"' cp_files '{}' "$RUN" < "$RUN/work/shared") \
        2> "$RUN/work/err.cp" >&2 || return 1
    [ ! -s "$RUN/work/err.cp" ]
}

# tar_files LIST. --sparse: what has holes keeps them.
tar_files() {
    [ -s "$RUN/work/$1" ] || return 0
    # the pax format, which --xattrs implies, keeps times whole; btrfs.* are that file system's own
    set -- "$1" --xattrs --xattrs-include='*' --xattrs-exclude='btrfs.*' --acls --numeric-owner
    {
        tar -cf - "$2" "$3" "$4" "$5" "$6" --sparse -C "$RUN/source" --null --no-recursion -T "$RUN/work/$1" \
            || printf 'tar could not read\n' >&2
    } 2> "$RUN/work/err.r-$1" \
        | tar -xpf - "$2" "$3" "$4" "$5" "$6" --same-owner --warning=no-timestamp \
            -C "$RUN/root/root" 2> "$RUN/work/err.w-$1" || return 1
    # anything that tar had to say is a difference
    [ ! -s "$RUN/work/err.r-$1" ] && [ ! -s "$RUN/work/err.w-$1" ]
}

tree_copied() {
    used_bytes "$RUN/root/root"
}

# build_files: $RUN/source into $RUN/root/root.
build_files() {
    plan_files || return 1
    tar_files shared || {
        copy_error
        return 1
    }
    work cp_files && watch_copy "$ST_BYTES" tree_copied || return 1
    collect_workers || return 1
    # links among the trees, in place of the files that cp made of them; directories for their times
    tar_files links && tar_files late || {
        copy_error
        return 1
    }
}

# tree_list DIRECTORY: type, mode, owner, links, size, time and target of each entry. A
# directory's size and a mount point's links are the file system's own affair.
tree_list() {
    (
        cd "$1" || exit 1
        find . ! -type d ! -type s -printf '%y %m %U %G %n %s %T@ %p -> %l\0' \
            -o -type d -printf 'd %m %U %G - - %T@ %p\0' | LC_ALL=C sort -z
    )
}

# prove_files: each entry is there, with everything that find can tell. Both are listed at once.
prove_files() {
    local lister listed
    layer_healthy || return 1
    tree_list "$RUN/source" > "$RUN/work/source.tree" &
    lister=$!
    tree_list "$RUN/root/root" > "$RUN/work/copy.tree"
    listed=$?
    wait "$lister" && [ "$listed" -eq 0 ] || {
        reason='source and copy could not be compared'
        return 1
    }
    [ -s "$RUN/work/source.tree" ] && cmp -s "$RUN/work/source.tree" "$RUN/work/copy.tree" || {
        reason="the copy differs from its source, first at $(first_difference)"
        return 1
    }
}

first_difference() {
    tr '\0' '\n' < "$RUN/work/source.tree" > "$RUN/work/source.lines"
    tr '\0' '\n' < "$RUN/work/copy.tree" > "$RUN/work/copy.lines"
    printable "$(awk 'NR == FNR { seen[$0] = 1; next } !($0 in seen) { print; exit }' \
        "$RUN/work/copy.lines" "$RUN/work/source.lines")"
}
