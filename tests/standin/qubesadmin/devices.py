# SPDX-License-Identifier: GPL-2.0-or-later
"""client v4.2: qubesadmin/devices.py, the assignment of a device; v4.3 has it elsewhere."""

from qubesadmin import WORLD


class DeviceAssignment42:
    def __init__(self, backend_domain, ident, options=None, persistent=False):
        self.backend_domain, self.ident = backend_domain, ident
        self.options, self.persistent = options or {}, persistent


if WORLD.release == "4.2":
    DeviceAssignment = DeviceAssignment42
