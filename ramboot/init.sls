# SPDX-License-Identifier: GPL-2.0-or-later
# ramboot: dom0 that can boot into RAM. Pillar: ramboot (pillar.example). Undo: ramboot.absent.
#   qubesctl state.apply ramboot

{%- from "ramboot/map.jinja" import settings with context %}
{#- takes minutes, and is of use to this backend alone #}
{%- set image = 'image' in [settings.boot.mode, settings.boot.backend] + settings.grub.entries | list %}

include:
  - ramboot.preflight
  - ramboot.initramfs
  - ramboot.grub
  - ramboot.swap
  - ramboot.qubes
  - ramboot.session
{%- if image %}
  - ramboot.image
{%- else %}
  - ramboot.image.unused
{%- endif %}

# The faults of qubes, too, before the first change.
extend:
  ramboot-qubes-checked:
    ramboot_qubes:
      - require_in:
        - sls: ramboot.initramfs
        - sls: ramboot.grub
        - sls: ramboot.swap
        - sls: ramboot.session
{%- if image %}
        - sls: ramboot.image
{%- endif %}
