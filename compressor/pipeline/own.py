"""Functions of the user's own, under the names by which recipes and reports know them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from compressor import names, recipe
from compressor.errors import InputError

Functions = dict[str, Callable[..., Any]]

LIVE = "live:"
"""Starts the name of a function that was handed in as an object."""


def called(given: Any, flag: str, functions: Functions) -> str:
    """The name of what ``given`` is or names; a function of the user's goes into ``functions``."""
    if callable(given):
        module, name = (getattr(given, key, "") for key in ("__module__", "__qualname__"))
        name = f"{LIVE}{module}.{name or type(given).__qualname__}"
        known = [other for other in functions if other.partition("#")[0] == name]
        if all(functions[other] is not given for other in known) and known:
            name += f"#{len(known) + 1}"  # two lambdas of one function are two functions
        functions[name] = given
        return name
    if not isinstance(given, str):
        raise InputError(f"{flag} {given!r:.80}: give a name or a function")
    if ":" in given:
        functions[given] = names.function(given, flag)
    return given


def training(
    loss: Any, augment: Any, folds: int | None, train: Mapping[str, Any], functions: Functions
) -> dict[str, Any]:
    """The settings of recovery that the arguments of a run stand for."""
    found = dict(train)
    if loss is not None:
        asked = recipe.losses(loss) if isinstance(loss, str) else loss
        found["loss"] = (
            {called(name, "--loss", functions): weight for name, weight in asked.items()}
            if isinstance(asked, Mapping)
            else called(asked, "--loss", functions)
        )
    parts = augment.split(",") if isinstance(augment, str) else augment
    parts = parts if isinstance(parts, Sequence) else (parts,)
    if parts:
        found["augment"] = [
            called(part.strip() if isinstance(part, str) else part, "--augment", functions)
            for part in parts
        ]
    if folds is not None:
        found["folds"] = folds
    return found


def codes(functions: Mapping[str, Callable[..., Any]]) -> dict[str, str]:
    """A digest of the text of each function: another text, another run."""
    found = {}
    for name, function in functions.items():
        try:
            text = inspect.getsource(function)
        except (OSError, TypeError):
            text = repr(type(function))  # typed at a prompt, or an object
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found
