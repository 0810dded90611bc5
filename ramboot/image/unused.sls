# SPDX-License-Identifier: GPL-2.0-or-later
# Stands for ramboot.image in ramboot where the pillar does not name the backend: what built the image
# anew goes, and the image itself stays until ramboot.image.absent.

{%- from "ramboot/map.jinja" import paths with context %}

include:
  - ramboot.preflight

{%- for unit, path in paths.image_units.items() | reverse %}
ramboot-image-{{ unit }}:
  ramboot.restored:
    - name: {{ path }}
    - require:
      - sls: ramboot.preflight
{%- endfor %}

ramboot-image-unused:
  ramboot_image.unused:
    - name: {{ paths.image_directory }}
    - require:
      - sls: ramboot.preflight
