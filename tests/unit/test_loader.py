# SPDX-License-Identifier: GPL-2.0-or-later
"""What Salt's loader publishes of each module."""

from __future__ import annotations

import functools
from types import FunctionType

import pytest

from conftest import REPO

MODULES = sorted(
    str(path.relative_to(REPO))
    for folder in ("_modules", "_states")
    for path in REPO.glob(f"{folder}/*.py")
)


@pytest.mark.parametrize("path", MODULES)
def test_no_imported_function_is_published_as_one_of_ours(load, path):
    """The loader takes each function that a module names (salt/loader/lazy.py, _load_module)."""
    module = load(path)
    published = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, (FunctionType, functools.partial))
    }
    assert published
    assert [
        name
        for name, value in published.items()
        if getattr(value, "__module__", None) != module.__name__
    ] == []
