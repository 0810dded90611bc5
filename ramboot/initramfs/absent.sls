# SPDX-License-Identifier: GPL-2.0-or-later
# The dracut module goes, then every kernel's initramfs becomes what it was, then the record closes.
# The menu entries go first: without the module they would boot from the disk, and ask nothing.
# No pillar needed.   qubesctl state.apply ramboot.initramfs.absent

{%- from "ramboot/map.jinja" import paths with context %}
{%- import_text "ramboot/initramfs/files/50ramboot/manifest" as manifest %}
{%- set module = '/' ~ (paths.dracut_module.split('/') | last) ~ '/' %}
{%- set files = [paths.dracut_manifest] %}
{%- for line in manifest.splitlines() if line and not line.startswith('#') %}
{%- set path = line.split()[2] %}
{%- if module in path %}
{%- do files.append(paths.dracut_module ~ '/' ~ (path.split(module) | last)) %}
{%- endif %}
{%- endfor %}
{#- files of an earlier version of ours #}
{%- for path in (salt['ramboot_record.entries']() if 'ramboot_record.entries' in salt else {}) | sort
    if path.startswith(paths.dracut_module ~ '/') and path not in files %}
{%- do files.append(path) %}
{%- endfor %}

include:
  - ramboot.persistent
  - ramboot.grub.absent

# Before the first change: images may have to be built anew.
ramboot-initramfs-undo-room:
  ramboot.initramfs_room:
    - name: room in /boot
    - undo: true
    - require:
      - sls: ramboot.persistent
    - require_in:
      - sls: ramboot.grub.absent

# First: dracut fails when a module is asked for that is not there.
ramboot-initramfs-dracut-conf-absent:
  ramboot.restored:
    - name: {{ paths.dracut_conf }}
    - require:
      - ramboot: ramboot-initramfs-undo-room
      - ramboot_grub: ramboot-grub-config-absent

ramboot-initramfs-module-not-asked-for:
  ramboot.module_not_asked_for:
    - name: dracut's configuration
    - require:
      - ramboot: ramboot-initramfs-dracut-conf-absent

{%- for path in files %}
ramboot-initramfs-module-{{ path.replace(paths.dracut_module ~ '/', '') | replace('/', '-') }}-absent:
  ramboot.restored:
    - name: {{ path }}
    - require:
      - ramboot: ramboot-initramfs-module-not-asked-for
    - require_in:
      - ramboot: ramboot-initramfs-restored
{%- endfor %}

ramboot-initramfs-boot-conf-absent:
  ramboot.restored:
    - name: {{ paths.boot_conf }}
    - require:
      - ramboot: ramboot-initramfs-dracut-conf-absent

ramboot-initramfs-restored:
  ramboot.initramfs_restored:
    - name: every installed kernel's initramfs
    - require:
      - ramboot: ramboot-initramfs-boot-conf-absent

ramboot-initramfs-record-closed:
  ramboot.record_closed:
    - name: the record of originals
    - require:
      - ramboot: ramboot-initramfs-restored
