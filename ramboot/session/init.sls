# SPDX-License-Identifier: GPL-2.0-or-later
# In dom0: the command `ramboot` (shows what the session is, boots once into RAM), and in RAM sessions
# the watch that warns before what they write fills RAM. No pillar keys.
#   qubesctl state.apply ramboot.session

{%- from "ramboot/map.jinja" import paths with context %}

include:
  - ramboot.preflight

ramboot-session-command:
  ramboot.installed:
    - name: {{ paths.command }}
    - source: salt://ramboot/session/files/ramboot
    - mode: '0755'
    - require:
      - sls: ramboot.preflight

ramboot-session-watch:
  ramboot.installed:
    - name: {{ paths.watch }}
    - source: salt://ramboot/session/files/ramboot-watch
    - mode: '0755'
    - require:
      - sls: ramboot.preflight

ramboot-session-watch-unit:
  ramboot.installed:
    - name: {{ paths.watch_unit }}
    - source: salt://ramboot/session/files/ramboot-watch.service
    - require:
      - ramboot: ramboot-session-watch

# From the next boot on; this one is persistent, and the watch has no part in it.
ramboot-session-watch-wanted:
  ramboot.installed:
    - name: {{ paths.watch_wanted }}
    - source: salt://ramboot/session/files/50-ramboot.conf
    - require:
      - ramboot: ramboot-session-watch-unit
