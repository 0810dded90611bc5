# SPDX-License-Identifier: GPL-2.0-or-later
# Swap of the persistent system comes back as ramboot found it.
#   qubesctl state.apply ramboot.swap.absent

{%- from "ramboot/map.jinja" import paths with context %}

include:
  - ramboot.persistent

ramboot-swap-zram-generator-absent:
  ramboot.restored:
    - name: {{ paths.zram_generator_conf }}
    - require:
      - sls: ramboot.persistent

ramboot-swap-absent:
  ramboot_swap.restored:
    - name: swap of the persistent system
    - require:
      - ramboot: ramboot-swap-zram-generator-absent

ramboot-swap-record-closed:
  ramboot.record_closed:
    - name: the record of originals
    - require:
      - ramboot_swap: ramboot-swap-absent
