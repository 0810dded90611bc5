# SPDX-License-Identifier: GPL-2.0-or-later
# Checks only: pillar, synced modules, tools, layout of the root. Everything else requires it.
#   qubesctl state.apply ramboot.preflight

{%- from "ramboot/modules.jinja" import unsynced, remedy, told with context %}

{%- if unsynced %}
ramboot-preflight-modules:
  # the remedy twice: under test=True Salt writes a comment of its own
  test.fail_without_changes:
    - name: {{ remedy }}
    - comment: {{ told | json }}
{%- else %}
ramboot-preflight:
  ramboot_preflight.passed:
    - name: this system can be given RAM sessions
{%- endif %}
