# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The question "Boot to RAM?". On the splash, keys come through plymouth watch-keystroke: it is
# the one request that leaves nothing queued in plymouthd when it is ended (its ask-question has
# no time limit and swallows the next input: plymouth src/main.c). Without a splash: a line from
# the console.

# A wrong answer asks again, this often at most.
ASK_TRIES=10
# How often the line with the seconds left is shown anew.
ASK_REFRESH_S=10

# ask: sets `answer` to y or n, and `answered` to what decided (key, time-out, tries).
# Uses CONF_default, CONF_timeout_s, ST_BACKEND, ASK_NEEDED and ASK_AVAILABLE (texts).
ask() {
    local end tries=0 line
    answer=$CONF_default
    answered=time-out
    end=$(($(now_cs) / 100 + CONF_timeout_s))
    while [ "$tries" -lt "$ASK_TRIES" ]; do
        read_answer "$end" || return 0
        case $ANSWER_LINE in
            '') answered=key ;;
            [yY] | [yY][eE][sS]) answer=y answered=key ;;
            [nN] | [nN][oO]) answer=n answered=key ;;
            *)
                tries=$((tries + 1))
                screen "Please answer y or n (or Enter for $CONF_default)."
                continue
                ;;
        esac
        return 0
    done
    answered=tries
    answer=n
}

# seconds_left END: 0 when it is over; with timeout_s 0 it never is.
seconds_left() {
    local left
    [ "$CONF_timeout_s" -gt 0 ] || {
        printf '%s' "$ASK_REFRESH_S"
        return
    }
    left=$(($1 - $(now_cs) / 100))
    [ "$left" -gt 0 ] || left=0
    printf '%s' "$left"
}

# question LEFT: the whole line, as the interface fixes it.
question() {
    local wait="$1 s left"
    [ "$CONF_timeout_s" -gt 0 ] || wait='waits for your answer'
    printf 'Boot to RAM? y/n + Enter [%s]  (%s: needs about %s of RAM, %s available; %s)' \
        "$CONF_default" "$ST_BACKEND" "$ASK_NEEDED" "$ASK_AVAILABLE" "$wait"
}

# read_answer END: one line in ANSWER_LINE; 1 when the time is over.
read_answer() {
    local left slice
    ANSWER_LINE=
    while :; do
        left=$(seconds_left "$1")
        [ "$left" -gt 0 ] || return 1
        slice=$left
        [ "$slice" -le "$ASK_REFRESH_S" ] || slice=$ASK_REFRESH_S
        if splash_running; then
            read_keys "$left" "$slice" && return 0
        else
            printf '\r%s ' "$(question "$left")" > "$P/dev/console"
            read_console "$slice" && return 0
        fi
    done
}

# read_console SECONDS: a line from the console. An unfinished one stays with the terminal
# for the next call.
read_console() {
    ANSWER_LINE=$(timeout "$1" head -n 1 < "$P/dev/console" 2> /dev/null)
    [ $? -ne 124 ] || return 1
    ANSWER_LINE=$(printf '%s' "$ANSWER_LINE" | LC_ALL=C tr -dc ' -~' | sed 's/^ *//; s/ *$//' | cut -c 1-20)
}

# read_keys LEFT SECONDS: key by key from the splash until Enter; TYPED keeps what is there so far.
read_keys() {
    local end key before
    splash_replace "$(question "$1")${TYPED:+ $TYPED}"
    printf '\r%s %s' "$(question "$1")" "$TYPED" > "$P/dev/console" 2> /dev/null || :
    end=$(($(now_cs) + $2 * 100))
    while :; do
        before=$(now_cs)
        [ "$before" -lt "$end" ] || return 1
        key=$(timeout "$(((end - before + 99) / 100))" plymouth watch-keystroke --keys="$ASK_KEYS" 2> /dev/null && printf .)
        case $key in
            '')
                timeout 2 plymouth ignore-keystroke --keys="$ASK_KEYS" 2> /dev/null || :
                # the daemon is gone: do not spin until the time is over
                [ $(($(now_cs) - before)) -gt 20 ] || sleep 1
                splash_running || return 1
                ;;
            "$ENTER"* | .) # Enter: the newline itself, or nothing before our dot
                ANSWER_LINE=$TYPED
                TYPED=
                return 0
                ;;
            *)
                TYPED=$(printf '%s%s' "$TYPED" "${key%%[!a-zA-Z]*}" | cut -c 1-20)
                splash_replace "$(question "$(((end - $(now_cs)) / 100 + $1 - $2))") $TYPED"
                ;;
        esac
    done
}
ASK_KEYS='abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ
'
ENTER='
'
TYPED=
