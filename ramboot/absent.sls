# SPDX-License-Identifier: GPL-2.0-or-later
# Takes everything back that ramboot did; the mirror of init.sls. No pillar needed.
#   qubesctl state.apply ramboot.absent

{%- set parts = ['image', 'session', 'qubes', 'swap'] %}

include:
{%- for part in parts %}
  - ramboot.{{ part }}.absent
{%- endfor %}
  - ramboot.grub.absent
  - ramboot.initramfs.absent

# What stands in the way of the last part is told before the first change of any.
extend:
  ramboot-initramfs-undo-room:
    ramboot:
      - require_in:
{%- for part in parts %}
        - sls: ramboot.{{ part }}.absent
{%- endfor %}
