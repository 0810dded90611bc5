#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# dracut module: asks "Boot to RAM?" when the disk is open and, on yes, replaces the
# root file system by a copy in RAM. Number 50: third-party range of dracut's
# developer/modules.adoc, and before 98dracut-systemd whose services run the hooks.

# On request only (dracut.conf.d/50-ramboot.conf asks). It refuses nothing: a module that is
# asked for and refuses makes dracut end without an image, after which Qubes' kernel-grub2.install
# would write a menu entry without an initramfs. What lacks is found, and said, at boot.
check() {
    return 255
}

depends() {
    echo base dm
    # a module of its own since dracut 108
    ! compgen -G "$dracutbasedir/modules.d/*initqueue" > /dev/null || echo initqueue
}

installkernel() {
    # dm_snapshot: the throw-away layer; zram: its store and the zram root. lz4, lzo-rle and
    # zstd are modules of their own before kernel 6.12.
    hostonly='' instmods dm_snapshot zram lz4 lz4_compress lzo lzo_rle zstd
    hostonly='' instmods ext4 overlay loop squashfs
}

install() {
    local name

    inst_multiple awk blkid blockdev cat chmod chown chroot cmp comm cp cut date dd df dmsetup du \
        find grep head id ln losetup ls mkdir mkfifo mknod mount mountpoint mv readlink rm rmdir sed \
        sha256sum sleep sort sync tail tar timeout touch tr udevadm umount \
        wc xargs
    # what only one kind of root needs; the boot scripts probe for them and say what lacks
    inst_multiple -o dumpe2fs e2fsck fallocate filefrag fstrim keyctl mkfs.ext4 tune2fs lvm xfs_repair \
        btrfs modprobe plymouth stty systemctl

    for name in lib ask source luks twin layer copy root snapshot overlay seal state image; do
        inst_simple "$moddir/ramboot-$name.sh" "/usr/lib/ramboot/ramboot-$name.sh"
    done
    inst_simple "$moddir/ramboot-initramfs.sh" /usr/bin/ramboot-initramfs
    # for its hash: an image that an earlier one made is stale
    inst_simple "$moddir/module-setup.sh" /usr/lib/ramboot/module-setup.sh
    inst_rules "$moddir/63-ramboot.rules"
    [[ -f $dracutsysrootdir/etc/ramboot/ramboot.conf ]] \
        && inst_simple /etc/ramboot/ramboot.conf

    # before lvm_scan.sh, which sorts after digits: nothing has opened the volume group yet
    ramboot_hook initqueue/settled 05 settled
    # last of pre-mount: nothing but us may come between the proof and the mount
    ramboot_hook pre-mount 95 pre-mount
    ramboot_hook cleanup 90 cleanup
    # without it nothing waits for a root that lies on neither LUKS nor LVM
    dracut_need_initqueue

    # what the root file system holds today, for the figure at the prompt; the real
    # measurement is made after the answer
    ramboot_estimate > "$initdir/usr/lib/ramboot/estimate"
    ramboot_stamp > "$initdir/usr/lib/ramboot/stamp"
}

# Used bytes of the root without the backend image's file, which no copy has.
ramboot_estimate() {
    local root=${dracutsysrootdir:-/} used apart image
    used=$(df -B1 --output=used "$root" 2> /dev/null | tail -n 1 | tr -dc '0-9')
    if [[ $(stat -f -c %T "$root") == xfs ]]; then
        # as measure of ramboot-copy.sh
        apart=$(du -s -x -B1 "$root" 2> /dev/null | cut -f 1)
        ((${apart:-0} <= ${used:-0})) || used=$apart
    fi
    image=$(du -s -B1 "$dracutsysrootdir/var/lib/ramboot/image" 2> /dev/null | cut -f 1)
    [[ -z $used ]] || printf '%s' $((used - ${image:-0}))
}

# ramboot_hook STAGE NUMBER NAME: installs hooks/NAME.sh where the manifest looks for it and
# links it into STAGE. inst_hook's own directory differs between dracut versions (102 moved
# it), so the link is made at whatever file inst_hook wrote.
ramboot_hook() {
    local hook
    inst_simple "$moddir/hooks/$3.sh" "/usr/lib/ramboot/hooks/$3.sh"
    inst_hook "$1" "$2" "$moddir/hooks/$3.sh"
    for hook in "$initdir"/{var/lib,usr/lib,lib}/dracut/hooks/"$1/$2-$3".sh; do
        [[ -f $hook ]] && ln -sfn "/usr/lib/ramboot/hooks/$3.sh" "$hook"
    done
    return 0
}

# One line "SHA256  PATH" for each of our files in the image: what tells a stale image.
ramboot_stamp() {
    (
        cd "$initdir" || exit
        for file in usr/bin/ramboot-initramfs usr/lib/ramboot/*.sh usr/lib/ramboot/hooks/*.sh \
            etc/udev/rules.d/63-ramboot.rules etc/ramboot/ramboot.conf; do
            [[ -f $file ]] && sha256sum "$file"
        done
    )
}
