# SPDX-License-Identifier: GPL-2.0-or-later
# The prebuilt image of the backend `image`: built where there is none or it is stale, and kept so
# with image:rebuild `background`. Last of all states, for it holds what they did.
# Pillar: ramboot:image, copy.   qubesctl state.apply ramboot.image

{%- from "ramboot/map.jinja" import settings, paths with context %}

include:
  - ramboot.preflight

{%- for unit in ('service', 'timer', 'wanted') %}
ramboot-image-{{ unit }}:
{%- if settings.image.rebuild == 'background' %}
  ramboot.installed:
    - name: {{ paths.image_units[unit] }}
    - source: salt://ramboot/image/files/{{ unit }}.j2
    - template: jinja
    - context:
        manifest: {{ paths.image_directory }}/manifest
{%- else %}
  ramboot.restored:
    - name: {{ paths.image_units[unit] }}
{%- endif %}
    - require:
      - sls: ramboot.preflight
    - require_in:
      - ramboot_image: ramboot-image-current
{%- endfor %}

ramboot-image-current:
  ramboot_image.current:
    - name: {{ paths.image_directory }}
    - require:
      - sls: ramboot.preflight
