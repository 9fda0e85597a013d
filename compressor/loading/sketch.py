"""A zoo model that a file names, as shapes without memory: what the file asks for may be absurd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from compressor import zoo
from compressor.errors import InputError, one_line
from compressor.loading.torchfile import State

CALLS = 10
"""Tensors that building may compute for each one that the model keeps; the zoo needs up to 2.2."""


class _Bounded(TorchFunctionMode):
    """Stops after ``most`` tensors: a file may ask for a million layers as well as for wide ones.

    Only calls that give a tensor are counted, and so can fail: ``no_grad`` has to find its way out.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.left -= isinstance(found, torch.Tensor)
        if self.left < 0 and isinstance(found, torch.Tensor):
            raise InputError("it has more layers than the file has tensors for")
        return found


def sketch(name: str, arguments: Mapping[str, Any], state: State) -> nn.Module:
    """The zoo's ``name``, its tensors on the ``meta`` device, in time that ``state`` allows.

    :func:`~compressor.loading.torchfile.load_state` turns it into a real model, once the shapes
    were found to be those of ``state``. Raises :class:`InputError` for arguments that give no
    model.
    """
    try:
        with torch.device("meta"), _Bounded(CALLS * (len(state) + 10)):
            return zoo.build(name, arguments)
    except InputError:
        raise
    except Exception as error:  # sizes whose product is no integer of 64 bits, for example
        raise InputError(
            f"zoo model {name!r} cannot be built with {dict(arguments)!r:.100}: "
            f"{one_line(error, 100)}"
        ) from None
