# SPDX-License-Identifier: GPL-2.0-or-later
# Menu entries that boot dom0 into RAM, and dom0's memory in them. Pillar: ramboot:grub. After the
# initramfs: without its module an entry "in RAM" would boot from the disk, and ask nothing.
#   qubesctl state.apply ramboot.grub

{%- from "ramboot/map.jinja" import settings, paths with context %}
{%- set grub = settings.grub %}

include:
  - ramboot.preflight
  - ramboot.initramfs

ramboot-grub-conf:
  ramboot.installed:
    - name: {{ paths.grub_conf }}
    - source: salt://ramboot/grub/files/grub.conf.j2
    - template: jinja
    - context:
        entries: {{ grub.entries | json }}
        dom0_mem_max_mib: {{ grub.dom0_mem_max_mib | json }}
        swap: {{ settings.swap | json }}
    - require:
      - ramboot: ramboot-initramfs-current

ramboot-grub-wrapper:
  ramboot.installed:
    - name: {{ paths.grub_wrapper }}
    - source: salt://ramboot/grub/files/21_ramboot
    - mode: '0755'
    - require:
      - ramboot: ramboot-grub-conf

ramboot-grub-dom0-mem:
{%- if grub.dom0_mem_scope == 'all' and grub.dom0_mem_max_mib != 'keep' %}
  ramboot_grub.dom0_mem_all:
    - name: {{ paths.grub_default }}
    - max_mib: {{ grub.dom0_mem_max_mib }}
{%- else %}
  ramboot_grub.dom0_mem_restored:
    - name: {{ paths.grub_default }}
{%- endif %}
    - require:
      - ramboot: ramboot-initramfs-current

ramboot-grub-config:
  ramboot_grub.config_current:
    - name: grub.cfg
    - require:
      - ramboot: ramboot-grub-wrapper
      - ramboot_grub: ramboot-grub-dom0-mem
