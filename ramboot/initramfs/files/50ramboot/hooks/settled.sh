#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# initqueue/settled: runs at each quiet moment until the disk is open, and before LVM's scan.
# dracut sources hooks in its own shell: all work is done in a child, whatever its end.
/usr/bin/ramboot-initramfs open-disk < /dev/null || /usr/bin/ramboot-initramfs recover < /dev/null
