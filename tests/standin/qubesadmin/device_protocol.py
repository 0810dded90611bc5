# SPDX-License-Identifier: GPL-2.0-or-later
"""client v4.3: qubesadmin/device_protocol.py; there is no such module in v4.2."""

from dataclasses import dataclass, field

from qubesadmin import WORLD

if WORLD.release == "4.2":
    raise ImportError("no module named qubesadmin.device_protocol")


@dataclass(frozen=True)
class Port:
    backend_domain: object
    port_id: str
    devclass: str


@dataclass(frozen=True)
class VirtualDevice:
    port: Port
    # any device in that place
    device_id: str = "*"


@dataclass(frozen=True)
class DeviceInfo(VirtualDevice):
    data: dict = field(default_factory=dict)

    @property
    def port_id(self):
        return self.port.port_id


@dataclass
class DeviceAssignment:
    virtual_device: VirtualDevice
    frontend_domain: object = None
    options: dict = field(default_factory=dict)
    # "manual" is the default, and assign() of a PCI device wants "required"
    mode: str = "manual"

    @property
    def port_id(self):
        return self.virtual_device.port.port_id

    @property
    def backend_domain(self):
        return self.virtual_device.port.backend_domain
