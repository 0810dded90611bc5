# shellcheck shell=sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The question "Boot to RAM?". On the splash, keys come through plymouth watch-keystroke: it is
# the one request that leaves nothing queued in plymouthd when it is ended (its ask-question has
# no time limit and swallows the next input: plymouth src/main.c). It reports one key and ends,
# so there y or n decides at once and the Enter after it falls into the void. Without a splash:
# a line from the console.

# A wrong answer asks again, this often at most.
ASK_TRIES=10
# How often the line with the seconds left is shown anew.
ASK_REFRESH_S=10

# ask: sets `answer` to y or n, and `answered` to what decided (key, time-out, tries).
# Uses CONF_default, CONF_timeout_s, ST_BACKEND, ASK_NEEDED and ASK_AVAILABLE (texts).
ask() {
    answer=$CONF_default
    answered=time-out
    # Open all the time: what is typed while nobody has the terminal open is lost.
    if (: < "$P/dev/console") 2> /dev/null; then
        ask_repeatedly 3< "$P/dev/console"
    else
        ask_repeatedly 3< /dev/null
    fi
}

ask_repeatedly() {
    local end tries=0
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

# read_answer END: one line, or on the splash one key, in ANSWER_LINE; 1 when the time is over.
read_answer() {
    local left slice
    ANSWER_LINE=
    if splash_running; then
        read_key "$1"
        case $? in
            0) return 0 ;;
            1) return 1 ;;
        esac
    fi
    while :; do
        left=$(seconds_left "$1")
        [ "$left" -gt 0 ] || return 1
        slice=$left
        [ "$slice" -le "$ASK_REFRESH_S" ] || slice=$ASK_REFRESH_S
        printf '\r%s ' "$(question "$left")" > "$P/dev/console" 2> /dev/null || :
        read_console "$slice" && return 0
    done
}

# read_console SECONDS: a line from the console on descriptor 3. An unfinished one stays with the
# terminal for the next call. A console that can't be read is nobody's Enter.
read_console() {
    local line
    line=$(
        timeout "$1" head -n 1 <&3 2> /dev/null
        printf '.%s' $?
    )
    case $line in
        *"
.0") ;;
        *.124) return 1 ;;
        *)
            if [ "$CONF_timeout_s" -eq 0 ]; then
                alert 'nobody can answer: the console cannot be read'
                ANSWER_LINE=n
                return 0
            fi
            sleep 1
            return 1
            ;;
    esac
    # what is no text is no Enter either
    ANSWER_LINE=$(printf '%s' "${line%.0}" | tr -d '\r\n' | LC_ALL=C tr -c ' -~' '?' \
        | sed 's/^ *//; s/ *$//' | cut -c 1-20)
}

# read_key END: 0: a key; 1: the time is over; 2: no splash any more.
# One watcher for the whole time: no key is lost while the line is shown anew.
read_key() {
    local watcher left shown=-1
    mkdir -p "$RUN"
    rm -f "$RUN/key"
    # the dot tells Enter, whose newline $(...) drops, from nothing
    (plymouth watch-keystroke --keys="$ASK_KEYS" > "$RUN/key" 2> /dev/null && printf . >> "$RUN/key") &
    watcher=$!
    # the watcher has reached the daemon before this has, so the question comes after it
    splash_running
    while :; do
        left=$(seconds_left "$1")
        kill -0 "$watcher" 2> /dev/null && [ "$left" -gt 0 ] || break
        if [ "$shown" -lt 0 ] || [ $((shown - $(now_cs) / 100)) -le 0 ]; then
            splash_replace "$(question "$left")"
            printf '\r%s ' "$(question "$left")" > "$P/dev/console" 2> /dev/null || :
            shown=$(($(now_cs) / 100 + ASK_REFRESH_S))
        fi
        sleep 0.5
    done
    if kill -0 "$watcher" 2> /dev/null; then
        kill_tree "$watcher"
        wait "$watcher" 2> /dev/null
        timeout 2 plymouth ignore-keystroke --keys="$ASK_KEYS" 2> /dev/null || :
        rm -f "$RUN/key"
        return 1
    fi
    ANSWER_LINE=$(cat "$RUN/key" 2> /dev/null)
    rm -f "$RUN/key"
    case $ANSWER_LINE in
        *.) ;;
        *) return 2 ;;
    esac
    ANSWER_LINE=$(printf '%s' "${ANSWER_LINE%.}" | tr -dc 'a-zA-Z')
}
ASK_KEYS='abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ
'
