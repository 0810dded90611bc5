# SPDX-License-Identifier: GPL-2.0-or-later
# dracut module and its configuration; then every kernel's initramfs that lacks them is rebuilt.
# Pillar: ramboot:boot, zram, tmpfs, snapshot, image, memory, copy, swap.
#   qubesctl state.apply ramboot.initramfs

{%- from "ramboot/map.jinja" import paths with context %}
{%- import_text "ramboot/initramfs/files/50ramboot/manifest" as manifest %}
{%- set module = '/' ~ (paths.dracut_module.split('/') | last) ~ '/' %}
{%- set shipped = [paths.dracut_manifest] %}

include:
  - ramboot.preflight

# Before the first change.
ramboot-initramfs-room:
  ramboot.initramfs_room:
    - name: room in /boot
    - files:
      - name: {{ paths.boot_conf }}
        source: salt://ramboot/initramfs/files/ramboot.conf.j2
        template: jinja
      - name: {{ paths.dracut_manifest }}
        source: salt://ramboot/initramfs/files/50ramboot/manifest
    - require:
      - sls: ramboot.preflight

{#- lines: SHA256 MODE PATH IMAGE_PATH (packaging/manifest) #}
{%- for line in manifest.splitlines() if line and not line.startswith('#') %}
{%- set mode, path = line.split()[1:3] %}
{%- if module in path %}
{%- set name = path.split(module) | last %}
{%- do shipped.append(paths.dracut_module ~ '/' ~ name) %}
ramboot-initramfs-module-{{ name | replace('/', '-') }}:
  ramboot.installed:
    - name: {{ paths.dracut_module }}/{{ name }}
    - source: salt://ramboot/initramfs/files/50ramboot/{{ name }}
    - mode: '{{ mode }}'
    - require:
      - ramboot: ramboot-initramfs-room
    - require_in:
      - ramboot: ramboot-initramfs-module-manifest
{%- endif %}
{%- endfor %}

ramboot-initramfs-module-manifest:
  ramboot.installed:
    - name: {{ paths.dracut_manifest }}
    - source: salt://ramboot/initramfs/files/50ramboot/manifest
    - require:
      - ramboot: ramboot-initramfs-room

{#- files of an earlier version of ours #}
{%- for path in (salt['ramboot_record.entries']() if 'ramboot_record.entries' in salt else {}) | sort
    if path.startswith(paths.dracut_module ~ '/') and path not in shipped %}
ramboot-initramfs-module-outdated-{{ loop.index }}:
  ramboot.restored:
    - name: {{ path }}
    - require:
      - ramboot: ramboot-initramfs-room
    - require_in:
      - ramboot: ramboot-initramfs-current
{%- endfor %}

ramboot-initramfs-boot-conf:
  ramboot.installed:
    - name: {{ paths.boot_conf }}
    - source: salt://ramboot/initramfs/files/ramboot.conf.j2
    - template: jinja
    - require:
      - ramboot: ramboot-initramfs-room

# Last: dracut fails when a module is asked for that is not there.
ramboot-initramfs-dracut-conf:
  ramboot.installed:
    - name: {{ paths.dracut_conf }}
    - source: salt://ramboot/initramfs/files/50-ramboot.conf
    - require:
      - ramboot: ramboot-initramfs-module-manifest
      - ramboot: ramboot-initramfs-boot-conf

ramboot-initramfs-current:
  ramboot.initramfs_current:
    - name: every installed kernel's initramfs
    - require:
      - ramboot: ramboot-initramfs-dracut-conf
