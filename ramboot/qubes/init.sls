# SPDX-License-Identifier: GPL-2.0-or-later
# Qubes whose every volume is in the RAM root's pool, settings of others, pools of files, aliases.
# Pillar: ramboot:qubes; with an empty one qubesd is not asked.   qubesctl state.apply ramboot.qubes

{%- from "ramboot/map.jinja" import settings, paths with context %}
{%- set qubes = settings.qubes %}

include:
  - ramboot.preflight

# Every fault of all qubes before the first change.
ramboot-qubes-checked:
  ramboot_qubes.checked:
    - name: qubes of the pillar
    - require:
      - sls: ramboot.preflight

ramboot-qubes-pools:
  ramboot_qubes.present:
    - name: pools of files
    - part: pools
    - require:
      - ramboot_qubes: ramboot-qubes-checked

ramboot-qubes-made:
  ramboot_qubes.present:
    - name: qubes in the RAM root's pool
    - part: qubes
    - require:
      - ramboot_qubes: ramboot-qubes-pools

ramboot-qubes-settings:
  ramboot_qubes.present:
    - name: settings of other qubes
    - part: settings
    - require:
      - ramboot_qubes: ramboot-qubes-made

ramboot-qubes-aliases:
{%- if qubes.aliases == 'off' %}
  ramboot.restored:
    - name: {{ paths.aliases }}
{%- else %}
  ramboot.installed:
    - name: {{ paths.aliases }}
    - source: salt://ramboot/qubes/files/ramboot.sh.j2
    - template: jinja
    - context:
        aliases: {{ qubes.aliases | json }}
        pool: {{ qubes.pool | json }}
        status: {{ paths.status | json }}
{%- endif %}
    - require:
      - ramboot_qubes: ramboot-qubes-checked
