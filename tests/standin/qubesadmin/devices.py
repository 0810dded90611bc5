# SPDX-License-Identifier: GPL-2.0-or-later
"""client v4.2: qubesadmin/devices.py, devices and their assignment; v4.3 has both elsewhere."""

from qubesadmin import WORLD


class DeviceAssignment42:
    def __init__(self, backend_domain, ident, options=None, persistent=False):
        self.backend_domain, self.ident = backend_domain, ident
        self.options, self.persistent = options or {}, persistent


class DeviceInfo42:
    def __init__(self, backend_domain, devclass, ident, description=None, **data):
        self.backend_domain, self.devclass, self.ident = backend_domain, devclass, ident
        self.description, self.data = description, data


if WORLD.release == "4.2":
    DeviceInfo = DeviceInfo42
    DeviceAssignment = DeviceAssignment42
