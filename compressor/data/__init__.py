"""What a user hands in, as the four splits: built-in sources, files, functions, live objects.

A spec is ``NAME[:LOCATION][?key=value&key=value]``: ``digits``, ``digits?size=32``,
``mnist:DIR?train=10000``, ``images:DIR?size=224``, ``arrays:FILE.npz``,
``table:FILE.csv?target=COLUMN``; or a function of the user's own that is called without arguments:
``PKG.MOD:FUNCTION``, ``./file.py:function``. In the value of an option ``%26`` stands for ``&``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_type_hints

from compressor import names
from compressor.data.live import Data, adopt
from compressor.errors import InputError

__all__ = ["SOURCES", "Data", "adopt", "read"]

SOURCES = {
    "digits": "embedded:digits",
    "digits-rows": "embedded:digits_rows",
    "digits-masks": "embedded:digits_masks",
    "breast-cancer": "embedded:breast_cancer",
    "wine": "embedded:wine",
    "diabetes": "embedded:diabetes",
    "line": "embedded:line",
    "mnist": "idx:mnist",
    "arrays": "arrays:arrays",
    "images": "folder:images",
    "cifar10": "cifar:cifar10",
    "cifar100": "cifar:cifar100",
    "table": "tables:table",
    "text": "text:text",
    "dataset": "datasets:dataset",
}
"""Name of a source, and the module of this package and the function that read it.

A source is a function ``source([location,] seed, *, options...) -> Data``; its signature is the
schema of its options. It is imported at first use, since scikit-learn takes a second.
"""


def read(spec: str, seed: int = 0, *, trusted: bool = True) -> Data:
    """The data that ``spec`` names, split with ``seed``.

    A name in :data:`SOURCES` goes before a module of that name. ``trusted`` is false for a spec
    that was read from a file: then a function, which is code to run, is refused.

    Raises :class:`InputError`, one line that begins with the spec.
    """
    head, asked, query = spec.partition("?")
    name, colon, location = head.partition(":")
    with _naming(spec):
        if name in SOURCES:
            source = _source(name)
            options = _options(source, query) if asked else {}
            place = _place(source, name, location if colon else None)
            _complete(source, options)
            return replace(source(*place, seed, **options), name=spec)
        if not colon:
            raise InputError(f"no such source; use {', '.join(SOURCES)} or PKG.MOD:FUNCTION")
        if not trusted:
            raise InputError(
                "a file names this function as its data, and it would be run: "
                f"add --data {head} to the command line if you trust it"
            )
        if asked:
            raise InputError(f"a function takes no options: remove ?{query}")
    given = names.call(names.function(head, "data"), head, "data")
    with _naming(spec):
        return replace(adopt(given, seed), name=spec)


@contextmanager
def _naming(spec: str) -> Iterator[None]:
    """Errors inside begin with the spec."""
    try:
        yield
    except InputError as error:
        raise InputError(f"data {spec!r}: {error}") from error.__cause__


def _source(name: str) -> Callable[..., Data]:
    module, _, function = SOURCES[name].partition(":")
    found: Callable[..., Data] = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    return found


def _place(source: Callable[..., Data], name: str, location: str | None) -> tuple[str, ...]:
    """The location as the source takes it: one or none."""
    takes = "location" in inspect.signature(source).parameters
    if takes and not location:
        raise InputError(f"{name} needs a place to read from: write {name}:PATH")
    if not takes and location is not None:
        raise InputError(f"{name} is built in and takes no location: remove :{location}")
    return (location,) if takes and location else ()


def _options(source: Callable[..., Data], query: str) -> dict[str, Any]:
    """``key=value&key=value`` bound to the keyword-only parameters of a source."""
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(source, include_extras=True)
    known = [
        parameter.name
        for parameter in inspect.signature(source).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    options: dict[str, Any] = {}
    for item in query.split("&"):
        key, _, value = item.partition("=")
        value = value.replace("%26", "&")
        if key not in known:
            raise InputError(f"unknown option {key!r}; known: {', '.join(known) or 'none'}")
        if key in options:
            raise InputError(f"option {key!r} stands twice: keep one")
        try:
            options[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            raise InputError(f"option {key}={value!r}: {error.errors()[0]['msg']}") from None
    return options


def _complete(source: Callable[..., Data], options: Mapping[str, Any]) -> None:
    """Refuses a spec that leaves out an option without a default."""
    for parameter in inspect.signature(source).parameters.values():
        keyword = parameter.kind is parameter.KEYWORD_ONLY
        if keyword and parameter.default is parameter.empty and parameter.name not in options:
            raise InputError(f"option {parameter.name} is missing: add ?{parameter.name}=...")
