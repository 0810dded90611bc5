# SPDX-License-Identifier: GPL-2.0-or-later
# Takes everything back that ramboot did; the mirror of init.sls. No pillar needed.
#   qubesctl state.apply ramboot.absent

include:
  - ramboot.image.absent
  - ramboot.session.absent
  - ramboot.qubes.absent
  - ramboot.swap.absent
  - ramboot.grub.absent
  - ramboot.initramfs.absent

# In a RAM session only /boot would see the undo, and the rest would be back at the next boot.
ramboot-absent-preflight:
{%- if 'ramboot_preflight.session_fault' not in salt %}
  # the remedy twice: under test=True Salt writes a comment of its own
  test.fail_without_changes:
    - name: run `qubesctl saltutil.clear_cache` then `qubesctl saltutil.sync_all`
    - comment: run `qubesctl saltutil.clear_cache` then `qubesctl saltutil.sync_all`
{%- else %}
  ramboot_preflight.on_disk:
    - name: the disk's root is what runs
{%- endif %}
    - require_in:
      - sls: ramboot.image.absent
      - sls: ramboot.session.absent
      - sls: ramboot.qubes.absent
      - sls: ramboot.swap.absent
      - sls: ramboot.grub.absent
      - sls: ramboot.initramfs.absent
