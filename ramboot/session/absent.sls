# SPDX-License-Identifier: GPL-2.0-or-later
# The command `ramboot` goes. No pillar needed.   qubesctl state.apply ramboot.session.absent

{%- from "ramboot/map.jinja" import paths with context %}

ramboot-session-command-absent:
  ramboot.restored:
    - name: {{ paths.command }}

ramboot-session-record-closed:
  ramboot.record_closed:
    - name: the record of originals
    - require:
      - ramboot: ramboot-session-command-absent
