# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Which state of the system a root holds. ramboot.image runs this over what it makes an image of,
# the boot over the disk's root: where a part differs, the image is stale. A root is written in each
# boot, so only what makes it another system counts: not logs, nor what lies in /home.
# Names, sizes and times (ctime too, which no program can set back) stand for contents.

STATE_PARTS='packages configuration programs qubes'

# root_state DIRECTORY FILE: a line "PART SHA256" for each part; FILE is for its own use.
# 1: something could not be read.
root_state() {
    local part
    for part in $STATE_PARTS; do
        (cd "$1" && "state_$part") > "$2" || return 1
        printf '%s %s\n' "$part" "$(tr '\n' '\0' < "$2" | LC_ALL=C sort -z | sha256sum | cut -c 1-64)"
    done
}

# state_text PART: what a user calls it.
state_text() {
    case $1 in
        packages) printf 'packages or kernels' ;;
        configuration) printf 'configuration (/etc)' ;;
        programs) printf 'programs (/usr, /opt)' ;;
        qubes) printf "qubes, their settings or templates" ;;
    esac
}

# state_entries PATH: each entry there that $STATE_PRUNE does not leave out. A directory's times
# change with any temporary file.
state_entries() {
    [ -e "$1" ] || return 0
    # shellcheck disable=SC2086 # words of an expression
    find "$1" -ignore_readdir_race -xdev \( $STATE_PRUNE \) -prune \
        -o -type d -printf '%y %m %U %G %p\0' -o -printf '%y %m %U %G %s %T@ %C@ %p %l\0'
}

# state_file PATH
state_file() {
    [ ! -f "$1" ] || find "$1" -printf '%s %T@ %p\0'
}

# Fedora's databases, then Debian's.
state_packages() {
    local path
    for path in usr/lib/sysimage/rpm/rpmdb.sqlite var/lib/rpm/rpmdb.sqlite var/lib/rpm/Packages \
        var/lib/rpm/Packages.db var/lib/dpkg/status; do
        state_file "$path" || return 1
    done
    ls usr/lib/modules
}

# Without what a boot or the start of a qube writes there: LVM's copies of its metadata, libvirt's
# definitions of running domains, the clock's drift, addresses; what the first boot after an update
# makes anew (systemd's ldconfig.service, systemd-hwdb-update.service and systemd-update-done.service), in a
# RAM session too.
state_configuration() {
    STATE_PRUNE='-path etc/lvm/archive -o -path etc/lvm/backup -o -path etc/lvm/cache
        -o -path etc/lvm/devices/backup -o -path etc/libvirt -o -path etc/adjtime -o -path etc/resolv.conf
        -o -path etc/.updated -o -path etc/ld.so.cache -o -path etc/udev/hwdb.bin'
    state_entries etc
}

# A directory's time changes when a file in it is made, replaced or deleted. Not where there are many
# that hold no programs: packages change those, and packages are seen.
state_programs() {
    STATE_PRUNE='-name __pycache__'
    find usr -ignore_readdir_race -xdev \( -name __pycache__ -o -path usr/local -o -path usr/src \
        -o -path usr/share/doc -o -path usr/share/icons -o -path usr/share/locale -o -path usr/share/man \) \
        -prune -o -type d -printf '%T@ %p\0' && state_entries usr/local && state_entries opt
}

# Not the volumes themselves. Of a template in the file driver's pool root-cow.img is made anew whenever
# qubesd starts (core-admin, qubes/storage/file.py, stop), and root.img is written when it ran.
state_qubes() {
    local path
    [ ! -f var/lib/qubes/qubes.xml ] || state_settings var/lib/qubes/qubes.xml || return 1
    for path in var/lib/qubes/*/*/firewall.xml var/lib/qubes/vm-templates/*/root.img; do
        state_file "$path" || return 1
    done
}

# state_settings QUBES.XML: its lines, those of a qube with the qube's own first line before each, for
# the order of some (tags) is any. Without disposables, which come and go, and what qubesd itself
# notes there: updates (qubes/api/misc.py), backups, disposables made in advance (qubes/vm/dispvm.py).
state_settings() {
    awk '
        /<feature name="(last-updates?(-check)?|updates-available|preload-dispvm(-completed|-in-progress)?)"/ { next }
        /<property name="backup_timestamp"/ { next }
        /<domain / { qube = $0; lines = ""; passing = 0 }
        qube == "" { print; next }
        /<property name="name">disp[0-9]+</ { passing = 1 }
        { lines = lines qube $0 "\n" }
        /<\/domain>/ {
            if (!passing) printf "%s", lines
            qube = ""
        }
    ' "$1"
}
