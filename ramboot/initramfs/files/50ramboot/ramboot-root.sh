# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Makes the copy a root that leaves the disk alone: no root, swap or /boot from fstab, no
# second unlocking, nothing that writes grubenv. All paths are inside the copy, $1.

# Units that write /boot, the ESP or grubenv. grub2's on Fedora (grub2 spec: the timer belongs
# to the user manager), grub-common's on Debian, systemd's own.
SYSTEM_MASKS='grub-boot-indeterminate.service grub-common.service grub-initrd-fallback.service
grub2-systemd-integration.service systemd-boot-random-seed.service systemd-boot-update.service
systemd-bless-boot.service boot.mount boot-efi.mount'
USER_MASKS='grub-boot-success.timer grub-boot-success.service'
# qmemman takes all tmpfs for free memory and would balloon dom0 away under its own root
# (core-admin qmemman/algo.py, linux-utils meminfo-writer.c). Without the reporter dom0 is
# neither donor nor receiver.
BALLOON_MASKS='qubes-meminfo-writer-dom0.service'
# Directories of which a part on another volume would go on being written.
SYSTEM_DIRS='/usr /etc /var /home /root /opt /srv /tmp /lib /lib64 /bin /sbin'

# root_check DIRECTORY: refuses a system of which a part lies on another volume of the disk.
root_check() {
    local spec target type options apart=' '
    mounts_of "$1" > "$RUN/work/mounts"
    while read -r spec target type options; do
        case $options in
            # of a directory that is on another volume, which may be named before or after it
            bind | bind,* | *,bind | *,bind,* | rbind | rbind,* | *,rbind | *,rbind,*) continue ;;
        esac
        on_disk "$spec" "$type" || continue
        [ "$target" = / ] || same_btrfs "$spec" "$type" || apart="$apart$target "
        root_has "$spec" "$target" "$type" || return 1
    done < "$RUN/work/mounts"
    while read -r spec target type options; do
        case $spec in
            /dev/*) ;;
            /*)
                lies_in "$spec" "$apart" || continue
                apart="$apart$target "
                root_has "$spec" "$target" "$type" || return 1
                ;;
        esac
    done < "$RUN/work/mounts"
    root_links "$1" "$apart"
}

# root_links DIRECTORY TARGETS: refuses a system directory there, or what lies in one, that is a link to
# one of these mounts. What is in /boot a session does without.
root_links() {
    local directory link place
    for directory in $SYSTEM_DIRS; do
        for link in "$1$directory" "$1$directory"/*; do
            # the files of /bin where it is /usr/bin are no part of a disk by themselves
            [ -L "$link" ] && { [ "$link" = "$1$directory" ] || [ ! -L "$1$directory" ]; } || continue
            place=$(followed "$1" "${link#"$1"}")
            lies_in "$place" "$2" && ! lies_in "$place" '/boot /efi' || continue
            reason="${link#"$1"} leads to $place, on a volume of its own, which a RAM session would go on writing"
            return 1
        done
    done
}

# followed DIRECTORY PATH: where PATH of the system there leads, each link in it followed.
followed() {
    local rest="$2" path='' part link hops=0
    while [ -n "$rest" ]; do
        rest=${rest#/}
        part=${rest%%/*}
        rest=${rest#"$part"}
        case $part in
            '' | .) ;;
            ..) path=${path%/*} ;;
            *)
                path=$path/$part
                [ -L "$1$path" ] && [ "$hops" -lt 40 ] || continue
                hops=$((hops + 1))
                link=$(readlink "$1$path")
                rest=/$link$rest
                path=${path%/*}
                case $link in /*) path= ;; esac
                ;;
        esac
    done
    printf '%s' "${path:-/}"
}

# mounts_of DIRECTORY: each mount of fstab and of systemd's own units there, as a line of fstab.
mounts_of() {
    local unit
    [ ! -f "$1/etc/fstab" ] || grep -v '^[[:space:]]*\(#\|$\)' "$1/etc/fstab"
    for unit in "$1"/etc/systemd/system/*.mount; do
        [ ! -f "$unit" ] || awk -F= '
            $1 == "What" || $1 == "Where" || $1 == "Type" || $1 == "Options" { value[$1] = substr($0, length($1) + 2) }
            END { print value["What"], value["Where"], value["Type"] ? value["Type"] : "auto", value["Options"] ? value["Options"] : "defaults" }' "$unit"
    done
}

# lies_in PATH DIRECTORIES: whether it is one of them or below one.
lies_in() {
    local directory
    for directory in $2; do
        case $1/ in
            "$directory"/*) return 0 ;;
        esac
    done
    return 1
}

# root_has SPEC TARGET TYPE: whether a RAM session may have there what is on another volume.
root_has() {
    case $2 in
        /var/lib/qubes | /var/lib/qubes/*)
            [ "$ST_BACKEND" = snapshot ] && ! on_layer "$1" || return 0
            reason="$2 is on $1, which is not seen to lie on ramboot's layer (a volume of LVM is, by its name): qubes would go on writing there"
            return 1
            ;;
    esac
    lies_in "$2" "$SYSTEM_DIRS" && ! same_btrfs "$1" "$3" || return 0
    reason="$2 is on a volume of its own, which a RAM session would go on writing"
    return 1
}

# on_disk SPEC TYPE: whether a line of fstab names a block device.
on_disk() {
    case $2 in
        swap) return 1 ;;
    esac
    case $1 in
        UUID=* | LABEL=* | PARTUUID=* | PARTLABEL=* | /dev/*) return 0 ;;
    esac
    return 1
}

# on_layer SPEC: whether what fstab or crypttab names lies on the layer. What is not there yet may be
# anything, a disk that wakes up late or is still encrypted, but for a volume of the root's group.
on_layer() {
    local device group
    ! root_on_layer "$1" || return 0
    device=$(root_device "$1")
    if [ -e "$device" ]; then
        device=$(kernel_name "$device")
        [ "$device" = "$(kernel_name "/dev/mapper/$LAYER")" ] \
            || depends_on "$device" "$(kernel_name "/dev/mapper/$LAYER")"
        return
    fi
    [ "$ROOT_KIND" = lvm ] || return 1
    group=${ROOT_SPEC%%/*}
    case $1 in
        "/dev/mapper/$(dm_name "$group/")-"*) return 1 ;;
        "/dev/$group/"* | "/dev/mapper/$(dm_name "$group/")"*) return 0 ;;
    esac
    return 1
}

same_btrfs() {
    [ "$2" = btrfs ] && [ "$ST_FSTYPE" = btrfs ] && root_uuid && names_root "$1"
}

# root_prepare DIRECTORY
root_prepare() {
    hidden_rules "$1" > "$RUN/hidden.rules" && rewrite_fstab "$1" && rewrite_crypttab "$1" && mask_units "$1" && mask_disk_units "$1" && {
        [ "$CONF_swap" = keep ] || no_swap "$1"
    } && case $ST_DISK in
        readonly) layer_lvm_config "$1" "$SEAL" ;;
        # without LUKS the disk can't be closed, and LVM must not take it up again
        detached) mapping_name > /dev/null || layer_lvm_config "$1" ramboot-detached ;;
    esac || {
        reason="${reason:-the copy could not be prepared}"
        return 1
    }
}

# replace_file FILE: stdin takes the place of FILE, which keeps its owner and mode.
replace_file() {
    cat > "$RUN/work/new" && cat "$RUN/work/new" > "$1"
}

# rewrite_fstab: root (but for snapshot, which starts from it) and swap go, /boot and the ESP stay
# unmounted, qubes' volumes may lack. Nothing is mounted of a disk that is sealed or gone, with
# snapshot nothing that the layer does not cover; /boot by hand is read-only then, and its journal is
# not replayed.
rewrite_fstab() {
    local spec target type own=' ' beside=' ' covered=' ' lost='' boot=''
    [ -f "$1/etc/fstab" ] || return 0
    while read -r spec target type _ || [ -n "$spec" ]; do
        if [ "$ST_BACKEND" != snapshot ]; then
            ! same_btrfs "$spec" "$type" || own="$own$spec "
        elif root_on_layer "$spec" || [ "$ROOT_KIND$target" = device/ ]; then
            covered="$covered$spec "
        elif on_disk "$spec" "" && ! on_layer "$spec"; then
            beside="$beside$spec "
        fi
    done < "$1/etc/fstab"
    if [ "$ST_BACKEND" = snapshot ]; then
        boot=,ro
    elif one_of "$ST_DISK" readonly detached; then
        boot=,ro
        lost=,noauto
    fi
    OWN=$own BESIDE=$beside COVERED=$covered LAYER_DEVICE=/dev/mapper/$LAYER awk -v keep="$CONF_swap" -v backend="$ST_BACKEND" \
        -v lost="$lost" -v boot="$boot" '
        # systemd mounts such a line all the same, at boot or when somebody looks there
        function unasked(options) {
            gsub(/,x-systemd\.(automount|wanted-by=[^,]*|required-by=[^,]*)/, "", options)
            return options
        }
        /^[ \t]*(#|$)/ { print; next }
        { beside = index(ENVIRON["BESIDE"], " " $1 " ") }
        index(ENVIRON["COVERED"], " " $1 " ") { $1 = ENVIRON["LAYER_DEVICE"]; $6 = 0; print; next }
        $2 == "/" && backend == "snapshot" { print; next }
        $2 == "/" || ($3 == "swap" && (keep != "keep" || beside)) || ($3 == "btrfs" && index(ENVIRON["OWN"], " " $1 " ")) {
            print "# RAM session: " $0; next
        }
        $2 == "/boot" || $2 ~ /^\/boot\// || $2 == "/efi" {
            if (boot != "") boot_only = boot ($3 ~ /^(ext[34]|xfs)$/ ? ",norecovery" : "")
            $4 = unasked("," $4) boot_only ",noauto,nofail"; sub(/^,/, "", $4); $6 = 0; print; next
        }
        $1 ~ /^(UUID|LABEL|PARTUUID|PARTLABEL)=|^\/dev\// {
            out = beside ? ",noauto" : lost
            if (out != "") $4 = unasked("," $4)
            $4 = $4 ",nofail" out; sub(/^,/, "", $4); $6 = 0; print; next
        }
        { print }' "$1/etc/fstab" | replace_file "$1/etc/fstab"
}

# hidden_rules DIRECTORY: of a disk that nobody uses in the session. Qubes offers each such device to
# qubes (linux-utils, udev/udev-qubes-block.rules), udisks to dom0's file manager, writable: the disk's
# root, swap, /boot and the ESP, or all of the disk. Both leave alone what has these two flags. Not
# QUBES_EXPORT_BLOCK_DEVICE=0: udev-block-add-change, run for what lies below another device, would
# heed the first flag no more. What the session mounts, or gives to LVM, has to keep its links.
hidden_rules() {
    local source device spec all=''
    source=$(kernel_name "$SOURCE_DISK")
    [ "$ST_DISK" = attached ] || all=all
    printf '%s\n' 'SUBSYSTEM!="block", GOTO="ramboot_hidden_end"' 'IMPORT{db}="RAMBOOT_HIDDEN"'
    {
        [ "$ST_BACKEND,$ROOT_KIND" = snapshot,lvm ] || [ "$ROOT_KIND" = device ] \
            || hidden 'ENV{DM_NAME}' "$(dm_name "$ROOT_SPEC")"
        case $ST_DISK,$ROOT_KIND in
            # a mapping is closed
            detached,*) mapping_name > /dev/null || hidden_device "$source" all ;;
            readonly,* | *,device) hidden_device "$source" "$all" ;;
        esac
        for device in $(disks_below "$source"); do
            hidden_device "$device" "$all"
        done
        unused_specs "$1" | while read -r spec; do
            hidden_spec "$spec"
            device=$(kernel_name "$(root_device "$spec")") || continue
            # what LVM has of a disk stays in use
            case $(cat "$P/sys/class/block/$device/dm/uuid" 2> /dev/null) in
                LVM-*) continue ;;
            esac
            # all of the disk would be offered, for none of its partitions is in use
            for device in $(disks_below "$device"); do
                hidden_device "$device"
            done
        done
    } | awk '!seen[$0]++'
    # of later events only the first flag is kept by lvm2's rules; an opened LUKS device without an
    # ID_FS_USAGE is none for systemd (99-systemd.rules)
    printf '%s\n' 'ENV{RAMBOOT_HIDDEN}!="1", GOTO="ramboot_hidden_end"' \
        'ENV{DM_UDEV_DISABLE_DISK_RULES_FLAG}="1", ENV{UDISKS_IGNORE}="1"' \
        'ENV{DM_UUID}=="CRYPT-*", ENV{ID_FS_USAGE}=="", ENV{ID_FS_USAGE}="other"'
    # another volume group on a disk that is to be pulled: lvm2's rules would activate it
    [ "$ST_DISK" != detached ] || printf '%s\n' 'ENV{ID_FS_TYPE}=="LVM2_member", ENV{ID_FS_TYPE}=""'
    printf '%s\n' 'LABEL="ramboot_hidden_end"'
}
HIDDEN_RULES=$P/run/udev/rules.d/63-ramboot-hidden.rules

# unused_specs DIRECTORY: what fstab, crypttab and units there name and the session does not use.
unused_specs() {
    local spec target type options
    {
        mounts_of "$1"
        swaps_off "$1"
    } | while read -r spec target type options; do
        on_disk "$spec" '' || continue
        case $type,$target,$options in
            swap,*) [ "$CONF_swap" != keep ] || ! may_use "$spec" || continue ;;
            *,/boot,* | *,/boot/*,* | *,/efi,*) ;;
            # somebody else's on a disk of its own
            *,/,* | *noauto*) continue ;;
            *) ! may_use "$spec" || continue ;;
        esac
        printf '%s\n' "$spec"
    done
    closed_specs "$1"
}

# swaps_off DIRECTORY: as lines of fstab, the swap that the formula took out of it (swap: off), and that
# of units.
swaps_off() {
    local unit
    [ ! -f "$1/etc/fstab" ] || sed -n 's/^#ramboot: //p' "$1/etc/fstab"
    for unit in "$1"/etc/systemd/system/*.swap "$1"/usr/lib/systemd/system/*.swap \
        "$1"/var/lib/ramboot/swap-units/*.swap; do
        [ ! -f "$unit" ] || sed -n 's/^What=\(.*\)/\1 none swap defaults/p' "$unit"
    done
}

# closed_specs DIRECTORY: what crypttab there names and the session does not open. Encrypted swap is swap.
closed_specs() {
    local name source key options swap
    [ -f "$1/etc/crypttab" ] || return 0
    while read -r name source key options || [ -n "$name" ]; do
        case $name in '' | '#'*) continue ;; esac
        on_disk "$source" '' || continue
        case ,$options, in
            *,swap,*) swap=$CONF_swap ;;
            *) swap=keep ;;
        esac
        [ "$swap" != keep ] || ! may_use "$source" || continue
        printf '%s\n' "$source"
    done < "$1/etc/crypttab"
}

# hidden_device NAME [all]: one that is there now. A disk, and with `all` its partitions too, by its
# partition table, which they have from it (60-persistent-storage.rules): when it is pulled its kernel
# names will be those of the next one.
hidden_device() {
    local dir="$P/sys/class/block/$1" key='ENV{DEVTYPE}=="disk", ENV{ID_PART_TABLE_UUID}' number
    number=$(cat "$dir/dev" 2> /dev/null)
    ! [ -r "$dir/dm/name" ] || ! hidden 'ENV{DM_NAME}' "$(cat "$dir/dm/name")" || return 0
    [ "${2:-}" != all ] || key='ENV{ID_PART_TABLE_UUID}'
    [ "${2:-}" != all ] && [ -e "$dir/partition" ] || ! hidden "$key" \
        "$(sed -n 's/^E:ID_PART_TABLE_UUID=//p' "$P/run/udev/data/b$number" 2> /dev/null)" || return 0
    hidden KERNEL "$1"
}

# hidden KEY VALUE: one device, by a name without characters of patterns; 1 if it has none.
hidden() {
    case $2 in
        '' | *[!A-Za-z0-9._:/+-]*) return 1 ;;
    esac
    printf '%s=="%s", ENV{RAMBOOT_HIDDEN}="1"\n' "$1" "$2"
}

# hidden_spec SPEC: as fstab has it.
hidden_spec() {
    case $1 in
        UUID=*) hidden 'ENV{ID_FS_UUID}' "${1#*=}" ;;
        LABEL=*) hidden 'ENV{ID_FS_LABEL}' "${1#*=}" ;;
        PARTUUID=*) hidden 'ENV{ID_PART_ENTRY_UUID}' "${1#*=}" ;;
        PARTLABEL=*) hidden 'ENV{ID_PART_ENTRY_NAME}' "${1#*=}" ;;
        /dev/*/*) hidden SYMLINK "${1#/dev/}" ;;
        /dev/*) hidden KERNEL "${1#/dev/}" ;;
    esac
}

# hide_disk: in the session, whose udev reads it first.
hide_disk() {
    mkdir -p "${HIDDEN_RULES%/*}" && mv "$RUN/hidden.rules" "$HIDDEN_RULES" \
        || alert 'udev could not be told to hide the disk: it is offered to qubes'
}

# rewrite_crypttab: the disk is open already; a second systemd-cryptsetup would ask again. Nothing is
# opened of a disk that is sealed or gone, nor beside the layer of snapshot: swap and tmp would even be
# formatted.
rewrite_crypttab() {
    local disk
    [ -f "$1/etc/crypttab" ] || return 0
    disk=$(mapping_name)
    CLOSED=" $(closed_specs "$1" | tr '\n' ' ')" awk -v disk="$disk" -v keep="$CONF_swap" '
        /^[ \t]*(#|$)/ { print; next }
        (disk != "" && $1 == disk) || index(ENVIRON["CLOSED"], " " $2 " ") || (keep != "keep" && $4 ~ /(^|,)swap(,|$)/) {
            print "# RAM session: " $0; next
        }
        { print }' "$1/etc/crypttab" | replace_file "$1/etc/crypttab"
}

# may_use SPEC: whether the session may use that disk.
may_use() {
    case $ST_BACKEND,$ST_DISK in
        snapshot,*) on_layer "$1" ;;
        *,readonly | *,detached) return 1 ;;
    esac
}

# mask_disk_units DIRECTORY: mounts and swap that are in no fstab.
mask_disk_units() {
    local unit source
    for unit in "$1"/etc/systemd/system/*.mount "$1"/etc/systemd/system/*.swap; do
        [ -f "$unit" ] || continue
        source=$(sed -n 's/^What=//p' "$unit" | tail -n 1)
        ! on_disk "$source" '' || may_use "$source" \
            || mask "$1/etc/systemd/system" "${unit##*/}" || return 1
    done
}

# mask DIRECTORY UNIT...: a link to /dev/null, which is what systemctl mask makes.
mask() {
    local dir="$1" unit
    shift
    mkdir -p "$dir" || return 1
    for unit; do
        rm -f "$dir/$unit" && ln -s /dev/null "$dir/$unit" || return 1
    done
}

mask_units() {
    # shellcheck disable=SC2086 # lists of names
    mask "$1/etc/systemd/system" $SYSTEM_MASKS && mask "$1/etc/systemd/user" $USER_MASKS || return 1
    ! one_of "$ST_BACKEND" tmpfs overlay image || mask "$1/etc/systemd/system" $BALLOON_MASKS
}

# no_swap: the units, wherever they come from. fstab and crypttab are done.
no_swap() {
    local unit
    mask "$1/etc/systemd/system" swap.target 'systemd-zram-setup@.service' zramswap.service || return 1
    for unit in "$1"/etc/systemd/system/*.swap "$1"/usr/lib/systemd/system/*.swap "$1"/lib/systemd/system/*.swap; do
        [ -e "$unit" ] || [ -L "$unit" ] || continue
        mask "$1/etc/systemd/system" "${unit##*/}" || return 1
    done
    # zram-generator makes no device without a section (zram-generator.conf(5)); R4.3 has one
    mkdir -p "$1/etc/systemd" && printf '# RAM session: no swap\n' > "$1/etc/systemd/zram-generator.conf" || return 1
    # drop-ins would bring it back
    for unit in "$1"/etc/systemd/zram-generator.conf.d "$1"/usr/lib/systemd/zram-generator.conf.d; do
        [ ! -d "$unit" ] || rm -rf "$unit" || return 1
    done
}
