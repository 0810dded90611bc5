#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# cleanup: what was needed only until switch root.
/usr/bin/ramboot-initramfs cleanup < /dev/null || :
