# SPDX-License-Identifier: GPL-2.0-or-later
# ramboot: dom0 that can boot into RAM. Pillar: ramboot (pillar.example). Undo: ramboot.absent.
#   qubesctl state.apply ramboot

include:
  - ramboot.preflight
  - ramboot.initramfs
  - ramboot.grub
  - ramboot.swap
  - ramboot.qubes
  - ramboot.session
