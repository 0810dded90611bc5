# SPDX-License-Identifier: GPL-2.0-or-later
"""Exceptions by the names and parents of client: qubesadmin/exc.py; only those that are raised."""


class QubesException(Exception):
    pass


class _Named(QubesException, KeyError):
    # a KeyError that shows its text without quotes, since client v4.3
    def __str__(self):
        return QubesException.__str__(self)


class QubesVMNotFoundError(_Named):
    pass


class QubesVMError(QubesException):
    pass


class QubesVMInUseError(QubesVMError):
    pass


class QubesVMNotHaltedError(QubesVMError):
    pass


class QubesVMNotStartedError(QubesVMError):
    pass


class QubesVMNotRunningError(QubesVMNotStartedError):
    pass


class QubesVMNotPausedError(QubesVMNotStartedError):
    pass


class QubesPoolInUseError(QubesException):
    pass


class QubesValueError(QubesException, ValueError):
    pass


class QubesPropertyValueError(QubesValueError):
    pass


class QubesNoSuchPropertyError(QubesException, AttributeError):
    pass


class QubesFeatureNotFoundError(_Named):
    pass


class QubesTagNotFoundError(_Named):
    pass


class QubesLabelNotFoundError(_Named):
    pass


class DeviceNotAssigned(QubesException, KeyError):
    pass


class DeviceAlreadyAssigned(QubesException, KeyError):
    pass


class StoragePoolException(QubesException):
    pass


class QubesDaemonCommunicationError(QubesException):
    pass


class QubesDaemonAccessError(QubesDaemonCommunicationError):
    def __init__(
        self, message="Got empty response from qubesd. See journalctl in dom0 for details."
    ):
        super().__init__(message)


class QubesPropertyAccessError(QubesDaemonAccessError, AttributeError):
    def __init__(self, prop):
        super().__init__(f"Failed to access '{prop}' property")


class PermissionDenied(Exception):
    # no QubesException, like the next one; raised since client v4.4
    pass


class ProtocolError(AssertionError):
    pass
