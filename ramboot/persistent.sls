# SPDX-License-Identifier: GPL-2.0-or-later
# Checks only: synced modules, and that an undo reaches the disk. Every absent requires it.
#   qubesctl state.apply ramboot.persistent

{%- from "ramboot/modules.jinja" import unsynced, remedy, told with context %}

# In a RAM session only /boot would see the undo, and the rest would be back at the next boot.
ramboot-absent-preflight:
{%- if unsynced %}
  # the remedy twice: under test=True Salt writes a comment of its own
  test.fail_without_changes:
    - name: {{ remedy }}
    - comment: {{ told | json }}
{%- else %}
  ramboot_preflight.on_disk:
    - name: an undo reaches the disk
{%- endif %}
