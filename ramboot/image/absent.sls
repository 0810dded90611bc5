# SPDX-License-Identifier: GPL-2.0-or-later
# The image goes, and what built it anew. No pillar needed.   qubesctl state.apply ramboot.image.absent

{%- from "ramboot/map.jinja" import paths with context %}

include:
  - ramboot.persistent

{%- for unit, path in paths.image_units.items() | reverse %}
ramboot-image-{{ unit }}-absent:
  ramboot.restored:
    - name: {{ path }}
    - require:
      - sls: ramboot.persistent
    - require_in:
      - ramboot_image: ramboot-image-absent
{%- endfor %}

ramboot-image-absent:
  ramboot_image.absent:
    - name: {{ paths.image_directory }}

ramboot-image-record-closed:
  ramboot.record_closed:
    - name: the record of originals
    - require:
      - ramboot_image: ramboot-image-absent
