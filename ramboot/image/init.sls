# SPDX-License-Identifier: GPL-2.0-or-later
# The prebuilt image of the backend `image`: built where there is none or it is stale, and kept so
# with image:rebuild `background` or `shutdown`. Last of all states, for it holds what they did.
# Pillar: ramboot:image, copy.   qubesctl state.apply ramboot.image

{%- from "ramboot/map.jinja" import settings, defaults, paths with context %}
{%- set units = {
  'service': 'background',
  'timer': 'background',
  'wanted': 'background',
  'shutdown': 'shutdown',
  'shutdown-wanted': 'shutdown',
} %}

include:
  - ramboot.preflight

{%- for unit, rebuild in units.items() %}
ramboot-image-{{ unit }}:
{%- if settings.image.rebuild == rebuild %}
  ramboot.installed:
    - name: {{ paths.image_units[unit] }}
    - source: salt://ramboot/image/files/{{ unit }}.j2
    - template: jinja
    - context:
        manifest: {{ paths.image_directory }}/manifest
        minutes: {{ defaults.image_build.shutdown_minutes }}
{%- else %}
  ramboot.restored:
    - name: {{ paths.image_units[unit] }}
{%- endif %}
    - require:
      - sls: ramboot.preflight
{%- if not loop.first %}
      - ramboot: ramboot-image-{{ loop.previtem[0] }}
{%- endif %}
    - require_in:
      - ramboot_image: ramboot-image-current
{%- endfor %}

ramboot-image-current:
  ramboot_image.current:
    - name: {{ paths.image_directory }}
    - require:
      - sls: ramboot.preflight

{%- if settings.image.rebuild == 'shutdown' %}
# The end of this boot counts, too. Here, for it starts only where there is an image.
ramboot-image-shutdown-active:
  cmd.run:
    - name: systemctl daemon-reload && systemctl start ramboot-image-shutdown.service
    - unless: systemctl is-active --quiet ramboot-image-shutdown.service
    - require:
      - ramboot: ramboot-image-shutdown-wanted
{%- endif %}
