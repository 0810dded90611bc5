# SPDX-License-Identifier: GPL-2.0-or-later
# Checks only: pillar, synced modules, tools, layout of the root. Everything else requires it.
#   qubesctl state.apply ramboot.preflight

{%- set needed = ['ramboot.status', 'ramboot_audit.verdict', 'ramboot_config.load', 'ramboot_grub.configs',
    'ramboot_image.asked', 'ramboot_initramfs.states', 'ramboot_preflight.faults', 'ramboot_qubes.wanted',
    'ramboot_qubes_audit.places', 'ramboot_qubes_pools.ram_fault', 'ramboot_qubes_record.read',
    'ramboot_qubesadmin.available', 'ramboot_record.entries', 'ramboot_swap.active'] %}
{%- set unknown = needed | reject('in', salt) | list %}

{%- if unknown %}
ramboot-preflight-modules:
  # the remedy twice: under test=True Salt writes a comment of its own
  test.fail_without_changes:
    - name: run `qubesctl saltutil.clear_cache` then `qubesctl saltutil.sync_all`
    - comment: run `qubesctl saltutil.clear_cache` then `qubesctl saltutil.sync_all`
{%- else %}
ramboot-preflight:
  ramboot_preflight.passed:
    - name: this system can be given RAM sessions
{%- endif %}
