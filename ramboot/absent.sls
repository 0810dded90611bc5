# SPDX-License-Identifier: GPL-2.0-or-later
# Takes everything back that ramboot did; the mirror of init.sls. No pillar needed.
#   qubesctl state.apply ramboot.absent

include:
  - ramboot.image.absent
  - ramboot.session.absent
  - ramboot.qubes.absent
  - ramboot.swap.absent
  - ramboot.grub.absent
  - ramboot.initramfs.absent
