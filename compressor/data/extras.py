"""Packages that not everybody needs."""

from __future__ import annotations

import importlib
from typing import Any

from compressor.errors import InputError, one_line


def package(name: str, extra: str) -> Any:
    """The module ``name``, imported; :class:`InputError` with the line that installs it.

    ``extra`` is the extra of ``compressor`` that brings it.
    """
    line = f"pip install 'compressor[{extra}]'"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        missing = error.name == top
        why = "is not installed" if missing else f"cannot be imported ({one_line(error, 120)})"
        raise InputError(f"{top} {why}: {line}") from None
