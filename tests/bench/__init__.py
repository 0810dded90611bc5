# SPDX-License-Identifier: GPL-2.0-or-later
"""Our way into RAM beside that of the forum's guide."""
