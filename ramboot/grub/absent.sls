# SPDX-License-Identifier: GPL-2.0-or-later
# GRUB's menu and settings as they were before ramboot. grub.cfg comes last: if it has to be
# generated anew, the wrapper must be gone.
#   qubesctl state.apply ramboot.grub.absent

{%- from "ramboot/map.jinja" import paths with context %}

include:
  - ramboot.persistent

ramboot-grub-dom0-mem-absent:
  ramboot_grub.dom0_mem_restored:
    - name: {{ paths.grub_default }}
    - require:
      - sls: ramboot.persistent

ramboot-grub-wrapper-absent:
  ramboot.restored:
    - name: {{ paths.grub_wrapper }}
    - require:
      - sls: ramboot.persistent

ramboot-grub-conf-absent:
  ramboot.restored:
    - name: {{ paths.grub_conf }}
    - require:
      - ramboot: ramboot-grub-wrapper-absent

ramboot-grub-config-absent:
  ramboot_grub.config_restored:
    - name: grub.cfg
    - require:
      - ramboot_grub: ramboot-grub-dom0-mem-absent
      - ramboot: ramboot-grub-wrapper-absent

ramboot-grub-record-closed:
  ramboot.record_closed:
    - name: the record of originals
    - require:
      - ramboot: ramboot-grub-conf-absent
      - ramboot_grub: ramboot-grub-config-absent
