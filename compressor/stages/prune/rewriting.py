"""What has to be rewritten before channels can go: attention layers, and views to a constant."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from compressor.loading.rewrites import suits, view_shape
from compressor.task import Inputs

Edits = list[dict[str, Any]]


def attentions(dense: nn.Module) -> Edits:
    """Edits that rewrite every attention layer of PyTorch into one whose heads can go."""
    return [
        {"edit": "rewrite", "module": name, "as": "attention"}
        for name, module in dense.named_modules()
        if suits(module)
    ]


def views(dense: nn.Module, examples: Inputs) -> Edits:
    """Edits for every view or reshape that merges axes to a size which may be a constant.

    ``view(-1, 3136)`` and ``reshape(b, 3136)`` break once there are fewer channels. Whether the
    code computes the size or says it cannot be seen; who needs no rewriting is left out later.
    """
    model = copy.deepcopy(dense).eval()
    stack = [""]
    found: dict[tuple[str, int], None] = {}

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            shape = view_shape(func, args, kwargs)
            output = func(*args, **(kwargs or {}))
            if shape and type(shape[-1]) is int and shape[-1] > 1:
                merged = args[0].shape[: len(shape) - 1] + output.shape[-1:]
                if output.shape == merged:
                    found[stack[-1], shape[-1]] = None
            return output

    def leave(*_: Any) -> None:
        stack.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: stack.append(name))
        module.register_forward_hook(leave, always_call=True)
    with torch.no_grad(), Watch():
        model(*map(torch.from_numpy, examples))
    return [
        {"edit": "rewrite", "module": name, "as": "flatten", "size": size} for name, size in found
    ]
