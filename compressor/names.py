"""Functions that a command line or an API call names: ``PKG.MOD:NAME`` or ``./file.py:NAME``.

Names that stand inside a file never come here: they resolve to the zoo and the built-in data only.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from compressor.errors import InputError, one_line


def function(name: str, flag: str) -> Callable[..., Any]:
    """The callable that ``name`` stands for; ``flag`` is what the user gave it with.

    Raises :class:`InputError` when it cannot be imported, is missing or cannot be called.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute.isidentifier():
        raise InputError(f"{flag} {name!r}: write PKG.MOD:FUNCTION or ./file.py:function")
    try:
        if place.endswith(".py") and not Path(place).is_file():
            raise FileNotFoundError("there is no such file")
        module = _file(Path(place)) if place.endswith(".py") else _module(place)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{flag} {name!r}: importing {place} failed: {type(error).__name__}: {one_line(error)}"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise InputError(f"{flag} {name!r}: {place} has no function {attribute!r}")
    return found  # type: ignore[no-any-return]


def call(given: Callable[..., Any], name: str, flag: str) -> Any:
    """Calls the user's function without arguments; what it raises becomes one line."""
    try:
        inspect.signature(given).bind()
    except TypeError as error:
        raise InputError(f"{flag} {name}: it is called without arguments: {error}") from None
    except ValueError:
        pass  # a builtin that hides its signature: calling it will tell
    try:
        return given()
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{flag} {name}: it raised {type(error).__name__}: {one_line(error)}"
        ) from error


def _module(place: str) -> ModuleType:
    # The console script does not look beside the user, `python -m` does: make both the same.
    _look_in(Path.cwd())
    return importlib.import_module(place)


def _file(path: Path) -> ModuleType:
    _look_in(path.resolve().parent)  # a script may import its neighbours
    # A name of our own: the user's random.py must not stand in for Python's.
    name = f"compressor_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _look_in(folder: Path) -> None:
    # At the end: what is installed goes first.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
