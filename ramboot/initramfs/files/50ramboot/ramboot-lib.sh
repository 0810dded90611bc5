# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# What all phases share: messages, time, configuration, status. Sourced by ramboot-initramfs
# and by the script tests, which point RAMBOOT_PREFIX at a tree with their own /proc and /sys.

P=${RAMBOOT_PREFIX:-}
RUN=$P/run/ramboot
CONF=$P/etc/ramboot/ramboot.conf
MIB=1048576
BACKENDS='zram tmpfs image snapshot overlay'

# --- messages -------------------------------------------------------------------------------

# say TEXT: on the screen (console and splash) and in the journal.
say() {
    tell 5 "$*"
}

# alert TEXT: as say, marked as a warning in the journal.
alert() {
    tell 4 "$*"
}

# tell LEVEL TEXT: LEVEL as in syslog(3).
tell() {
    printf '<%s>ramboot: %s\n' "$1" "$2" > "$P/dev/kmsg" 2> /dev/null || :
    screen "ramboot: $2"
}

# screen TEXT: one line on the console and on the splash, in no log.
screen() {
    printf '\r%s\n' "$*" > "$P/dev/console" 2> /dev/null || :
    splash_say "$*"
}

# console_flows: Ctrl-S there would stop whoever writes to it, and with us the boot.
console_flows() {
    stty -ixon 2> /dev/null < "$P/dev/console" || :
}

splash_running() {
    command -v plymouth > /dev/null 2>&1 && timeout 2 plymouth --ping 2> /dev/null
}

splash_say() {
    splash_running || return 0
    timeout 2 plymouth display-message --text="$1" 2> /dev/null || :
}

# splash_replace TEXT: instead of the last text given here. Qubes' theme gives a hidden
# message's line not back (qubes-artwork qubes-dark.script), so this is for few lines.
splash_replace() {
    splash_running || return 0
    [ -z "$SPLASH_LAST" ] || timeout 2 plymouth hide-message --text="$SPLASH_LAST" 2> /dev/null || :
    timeout 2 plymouth display-message --text="$1" 2> /dev/null || :
    SPLASH_LAST=$1
}
SPLASH_LAST=

# --- time and sizes -------------------------------------------------------------------------

# Hundredths of a second since the kernel started.
now_cs() {
    local up
    read -r up _ < "$P/proc/uptime" || return 1
    printf '%s' "${up%.*}${up#*.}" | sed 's/^0*\([0-9]\)/\1/'
}

# phase NAME: notes how long the phase that ends here took, and begins the next.
phase() {
    local now
    now=$(now_cs) || return 0
    [ -z "$PHASE" ] || printf '%s %s\n' "$PHASE" "$((now - PHASE_START))" >> "$RUN/seconds"
    PHASE=$1
    PHASE_START=$now
}
PHASE=
PHASE_START=0

# meminfo_bytes FIELD: a value of /proc/meminfo in bytes.
meminfo_bytes() {
    local key kib
    while read -r key kib _; do
        [ "$key" = "$1:" ] && printf '%s' "$((kib * 1024))" && return 0
    done < "$P/proc/meminfo"
    return 1
}

# human BYTES: "3.4 GiB" or "512 MiB".
human() {
    local mib=$(($1 / MIB))
    if [ "$mib" -ge 1024 ]; then
        printf '%s.%s GiB' "$((mib / 1024))" "$((mib % 1024 * 10 / 1024))"
    else
        printf '%s MiB' "$mib"
    fi
}

is_number() {
    case $1 in
        # the shell takes 010 for 8
        '' | *[!0-9]* | 0?* | ????????????????*) return 1 ;;
    esac
}

# --- configuration --------------------------------------------------------------------------

# read_config: sets CONF_* from the one rendered file. Nothing is evaluated. Any line that is
# not understood is an error: a boot that wipes all data at power-off is not guessed at.
read_config() {
    local line key value
    CONF_EXCLUDE=
    [ -f "$CONF" ] || {
        reason="the configuration $CONF is missing in the initramfs"
        return 1
    }
    for key in $CONF_KEYS; do
        unset "CONF_$key"
    done
    while IFS= read -r line || [ -n "$line" ]; do
        case $line in
            '' | '#'*) continue ;;
            *=*) ;;
            *)
                bad_config "$line"
                return 1
                ;;
        esac
        key=${line%%=*}
        value=${line#*=}
        # shellcheck disable=SC2086 # a list
        case $key in
            version) one_of "$value" 1 ;;
            mode) one_of "$value" ask off $BACKENDS ;;
            backend) one_of "$value" $BACKENDS ;;
            default) one_of "$value" y n ;;
            disk) one_of "$value" attached readonly detached ;;
            swap) one_of "$value" session off keep ;;
            zram_algorithm) one_of "$value" auto lz4 lzo-rle lzo zstd ;;
            zram_size_mib | tmpfs_size_mib | snapshot_store_mib) [ "$value" = auto ] || is_number "$value" ;;
            image_stale) one_of "$value" rebuild-first use-and-say copy ;;
            timeout_s | reserve_mib | headroom_mib | copy_timeout_s) is_number "$value" ;;
            exclude)
                case $value in
                    /?*) CONF_EXCLUDE="$CONF_EXCLUDE$value
" ;;
                    *) false ;;
                esac
                ;;
            *) false ;;
        esac || {
            bad_config "$line"
            return 1
        }
        [ "$key" = exclude ] || eval "CONF_$key=\$value"
    done < "$CONF"
    for key in $CONF_KEYS; do
        eval "value=\${CONF_$key:-}"
        [ -n "$value" ] || {
            reason="the configuration $CONF has no line $key="
            return 1
        }
    done
}

# Each must be there; exclude may be, and more than once.
CONF_KEYS='version mode backend default timeout_s disk swap zram_algorithm zram_size_mib
tmpfs_size_mib snapshot_store_mib image_stale reserve_mib headroom_mib copy_timeout_s'

bad_config() {
    reason="the configuration $CONF has a line that is not understood: $(printable "$1")"
}

# one_of VALUE CHOICE...
one_of() {
    local value="$1" choice
    shift
    for choice; do
        [ "$value" = "$choice" ] && return 0
    done
    return 1
}

# printable TEXT [LENGTH]: without control characters and not longer than a line of the screen.
printable() {
    printf '%s' "$1" | LC_ALL=C tr -c ' -~' '?' | cut -c "1-${2:-60}"
}

# --- status.json ----------------------------------------------------------------------------

# json_string TEXT, or null for an empty one.
json_string() {
    [ -n "$1" ] || {
        printf 'null'
        return
    }
    printf '"%s"' "$(printf '%s' "$1" | LC_ALL=C tr -c ' -~' '?' | sed 's/[\\"]/\\&/g')"
}

# write_status: /run/ramboot/status.json from the ST_* variables, in one rename.
write_status() {
    local source=null ram=null seconds='' name cs
    if [ -n "$ST_DEVICE" ]; then
        source="{\"device\":$(json_string "$ST_DEVICE"),\"fstype\":$(json_string "$ST_FSTYPE"),\"bytes\":${ST_BYTES:-0}}"
    fi
    if [ -n "$ST_NEEDED" ]; then
        ram="{\"needed_bytes\":$ST_NEEDED,\"available_bytes\":${ST_AVAILABLE:-0},\"limit_bytes\":${ST_LIMIT:-0}}"
    fi
    if [ -f "$RUN/seconds" ]; then
        while read -r name cs; do
            seconds="$seconds${seconds:+,}\"$name\":$((cs / 100)).$((cs / 10 % 10))$((cs % 10))"
        done < "$RUN/seconds"
    fi
    mkdir -p "$RUN" && printf '{"schema":1,"session":"%s","requested":%s,"backend":%s,"disk":%s,"reason":%s,"source":%s,"ram":%s,"seconds":{%s}}\n' \
        "$1" "$(json_string "${ST_REQUESTED:-none}")" "$(json_string "$ST_BACKEND")" \
        "$(json_string "$ST_DISK")" "$(json_string "$reason")" "$source" "$ram" "$seconds" \
        > "$RUN/status.json.new" \
        && chmod 0644 "$RUN/status.json.new" && mv "$RUN/status.json.new" "$RUN/status.json"
}
reason=
ST_REQUESTED='' ST_BACKEND='' ST_DISK='' ST_DEVICE='' ST_FSTYPE='' ST_BYTES=''
ST_NEEDED='' ST_AVAILABLE='' ST_LIMIT='' ST_NOTE=''

# --- commands with a limit ------------------------------------------------------------------

# try SECONDS COMMAND...: runs it with a time limit; on failure sets `reason` to what it said.
try() {
    local limit="$1" out rc
    shift
    out=$(timeout -k 5 "$limit" "$@" 2>&1 < /dev/null)
    rc=$?
    [ "$rc" -eq 0 ] && return 0
    case $rc in
        124 | 137) reason="$1 did not end within $limit s" ;;
        # mount's hint to look into dmesg is indented
        *) reason="$1 failed ($rc): $(printable "$(printf '%s' "$out" | grep -v '^[[:space:]]' | tail -n 1)")" ;;
    esac
    return 1
}
