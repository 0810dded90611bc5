#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# pre-mount: the last moment before the disk's root would be checked and mounted.
/usr/bin/ramboot-initramfs pre-mount < /dev/null || /usr/bin/ramboot-initramfs recover pre-mount < /dev/null
