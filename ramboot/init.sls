# SPDX-License-Identifier: GPL-2.0-or-later
# ramboot: dom0 that can boot into RAM. Pillar: ramboot (pillar.example). Undo: ramboot.absent.
#   qubesctl state.apply ramboot

{%- from "ramboot/map.jinja" import settings with context %}

include:
  - ramboot.preflight
  - ramboot.initramfs
  - ramboot.grub
  - ramboot.swap
  - ramboot.qubes
  - ramboot.session
{#- takes minutes, and is of use to this backend alone #}
{%- if 'image' in [settings.boot.mode, settings.boot.backend] + settings.grub.entries | list %}
  - ramboot.image
{%- endif %}
