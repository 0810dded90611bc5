# SPDX-License-Identifier: GPL-2.0-or-later
# The watch and the command `ramboot` go. No pillar needed.
#   qubesctl state.apply ramboot.session.absent

{%- from "ramboot/map.jinja" import paths with context %}

include:
  - ramboot.persistent

# First, so that no boot asks for a unit that is not there.
ramboot-session-watch-wanted-absent:
  ramboot.restored:
    - name: {{ paths.watch_wanted }}
    - require:
      - sls: ramboot.persistent

ramboot-session-watch-unit-absent:
  ramboot.restored:
    - name: {{ paths.watch_unit }}
    - require:
      - ramboot: ramboot-session-watch-wanted-absent

ramboot-session-watch-absent:
  ramboot.restored:
    - name: {{ paths.watch }}
    - require:
      - ramboot: ramboot-session-watch-unit-absent

ramboot-session-command-absent:
  ramboot.restored:
    - name: {{ paths.command }}
    - require:
      - sls: ramboot.persistent

ramboot-session-record-closed:
  ramboot.record_closed:
    - name: the record of originals
    - require:
      - ramboot: ramboot-session-watch-absent
      - ramboot: ramboot-session-command-absent
