# SPDX-License-Identifier: GPL-2.0-or-later
# ramboot: dom0 that can boot into RAM. Pillar: ramboot (pillar.example). Undo: ramboot.absent.
#   qubesctl state.apply ramboot

{%- from "ramboot/map.jinja" import checked with context %}
{#- the image takes minutes, and is of use to this backend alone #}
{%- set image = checked and salt['ramboot_image.asked']() %}
{%- set parts = ['initramfs', 'grub', 'swap', 'session', 'image' if image else 'image.unused'] %}

include:
  - ramboot.preflight
  - ramboot.qubes
{%- for part in parts %}
  - ramboot.{{ part }}
{%- endfor %}

# What stands in the way of one part is told before the first change of any.
extend:
  ramboot-qubes-checked:
    ramboot_qubes:
      - require_in:
{%- for part in parts %}
        - sls: ramboot.{{ part }}
{%- endfor %}
  ramboot-initramfs-room:
    ramboot:
      - require_in:
        - ramboot_qubes: ramboot-qubes-pools
        - ramboot: ramboot-qubes-aliases
{%- for part in parts[1:] %}
        - sls: ramboot.{{ part }}
{%- endfor %}
