# SPDX-License-Identifier: GPL-2.0-or-later
# Swap of the persistent system. Pillar: ramboot:swap. `session` and `keep` leave it as it is (what
# a RAM session does with it is decided at boot); `off` takes all of it away; back again undoes that.
#   qubesctl state.apply ramboot.swap

{%- from "ramboot/map.jinja" import settings, paths with context %}

include:
  - ramboot.preflight

{%- if settings.swap == 'off' %}
ramboot-swap-zram-generator:
  ramboot.installed:
    - name: {{ paths.zram_generator_conf }}
    - source: salt://ramboot/swap/files/zram-generator.conf
    - require:
      - sls: ramboot.preflight

ramboot-swap-off:
  ramboot_swap.off:
    - name: swap of the persistent system
    - require:
      - ramboot: ramboot-swap-zram-generator
{%- else %}
ramboot-swap-zram-generator:
  ramboot.restored:
    - name: {{ paths.zram_generator_conf }}
    - require:
      - sls: ramboot.preflight

ramboot-swap-on:
  ramboot_swap.restored:
    - name: swap of the persistent system
    - require:
      - ramboot: ramboot-swap-zram-generator
{%- endif %}
