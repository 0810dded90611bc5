# SPDX-License-Identifier: GPL-2.0-or-later
# Settings come back as ramboot found them, then what it made of qubes and pools goes; what was used
# since or is in use by others stays and is named. No pillar needed; remove_data counts if it is set.
#   qubesctl state.apply ramboot.qubes.absent

{%- from "ramboot/map.jinja" import paths with context %}

include:
  - ramboot.persistent

ramboot-qubes-aliases-absent:
  ramboot.restored:
    - name: {{ paths.aliases }}
    - require:
      - sls: ramboot.persistent

ramboot-qubes-absent:
  ramboot_qubes.absent:
    - name: qubes, their settings, pools of files
    - require:
      - ramboot: ramboot-qubes-aliases-absent

ramboot-qubes-record-closed:
  ramboot.record_closed:
    - name: the record of originals
    - require:
      - ramboot_qubes: ramboot-qubes-absent
