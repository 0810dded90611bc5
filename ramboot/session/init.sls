# SPDX-License-Identifier: GPL-2.0-or-later
# The command `ramboot` in dom0: shows what the session is, boots once into RAM.
# No pillar keys.   qubesctl state.apply ramboot.session

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
