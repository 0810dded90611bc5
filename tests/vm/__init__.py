# SPDX-License-Identifier: GPL-2.0-or-later
"""A dom0-like machine in QEMU, and the words to tell a story about it."""
