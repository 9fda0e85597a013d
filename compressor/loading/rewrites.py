"""Layers whose code insists on the sizes that they were built with, rewritten to follow them.

A rewritten layer computes the same from the same weights. It is only used where channels were cut
that the original could not do without, and where batch normalisation is in the way of int8.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name that the field uses)
from torch.overrides import TorchFunctionMode


class Attention(nn.Module):
    """:class:`torch.nn.MultiheadAttention` with a projection each for queries, keys and values.

    The width of a head follows from the projections, so heads can be cut. Takes and gives what the
    original does; ``bias_k``, ``bias_v`` and ``add_zero_attn`` are not supported.
    """

    # What TransformerEncoder looks at before it takes its fused path, which is not ours.
    _qkv_same_embed_dim = False
    in_proj_weight = None
    in_proj_bias = None

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = original.num_heads
        self.batch_first = original.batch_first
        self.dropout = original.dropout
        self.embed_dim = original.embed_dim
        biases: tuple[Tensor | None, ...] = (None, None, None)
        own = original._parameters
        if (bias := own["in_proj_bias"]) is not None:
            biases = bias.detach().chunk(3)
        if (packed := own["in_proj_weight"]) is not None:
            weights = packed.detach().chunk(3)
        else:
            weights = tuple(
                original.get_parameter(f"{name}_proj_weight").detach() for name in "qkv"
            )
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(original.out_proj.weight.detach(), original.out_proj.bias)
        self.requires_grad_(original.out_proj.weight.requires_grad)
        self.train(original.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Shapes as in :class:`torch.nn.MultiheadAttention`."""
        if query.ndim == 2:
            mask = None if key_padding_mask is None else key_padding_mask[None]
            axis = 0 if self.batch_first else 1
            given = (part.unsqueeze(axis) for part in (query, key, value))
            output, weights = self(
                *given, mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return output.squeeze(axis), None if weights is None else weights.squeeze(0)
        if not self.batch_first:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        q, k, v = (
            projection(part).reshape(*part.shape[:2], self.num_heads, -1).transpose(1, 2)
            for projection, part in (
                (self.q_proj, query),
                (self.k_proj, key),
                (self.v_proj, value),
            )
        )
        mask = _added(_float(attn_mask, q), _float(key_padding_mask, q), self.num_heads)
        rate = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            mixed = F.dropout(weights, rate) @ v
        else:
            weights = None
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not self.batch_first:
            output = output.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return output, weights


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _float(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask to add to scores: True becomes minus infinity."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _added(scores: Tensor | None, keys: Tensor | None, heads: int) -> Tensor | None:
    """Both masks as one of shape ``(batch or 1, heads or 1, queries or 1, keys)``."""
    if scores is not None and scores.ndim == 3:
        scores = scores.reshape(-1, heads, *scores.shape[1:])
    if keys is not None:
        keys = keys[:, None, None]
        return keys if scores is None else scores + keys
    return scores


def suits(module: nn.Module) -> bool:
    """Whether :class:`Attention` can stand for this layer."""
    return (
        type(module) is nn.MultiheadAttention
        and module.bias_k is None
        and module.bias_v is None
        and not module.add_zero_attn
        and not nn.utils.parametrize.is_parametrized(module)
    )


class _Flattening(TorchFunctionMode):
    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shape = view_shape(func, args, kwargs)
        if shape and type(shape[-1]) is int and shape[-1] in self.sizes:
            return args[0].flatten(len(shape) - 1)
        return func(*args, **(kwargs or {}))


def view_shape(func: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The shape that a call of view or reshape asks for, where it merges axes; else empty."""
    if func not in (torch.Tensor.view, torch.Tensor.reshape, torch.reshape) or len(args) < 2:
        return ()
    shape = tuple(args[1]) if isinstance(args[1], tuple | list) else tuple(args[1:])
    return shape if 2 <= len(shape) < args[0].ndim else ()


def _flattened(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with _Flattening(self.flattened):  # type: ignore[arg-type]
        return type(self).forward(self, *args, **kwargs)


def _flatten(model: nn.Module, module: nn.Module, edit: Any) -> None:
    size = edit["size"]
    if type(size) is not int or size < 1:
        raise ValueError("a size is a positive integer")
    module.__dict__["flattened"] = (*getattr(module, "flattened", ()), size)
    module.forward = types.MethodType(_flattened, module)


def _attention(model: nn.Module, module: nn.Module, edit: Any) -> None:
    if not suits(module):
        raise ValueError("not an attention layer that can be rewritten")
    model.set_submodule(edit["module"], Attention(module))  # type: ignore[arg-type]
    for name, owner in model.named_modules():
        inside = not name or edit["module"].startswith(f"{name}.")
        if isinstance(owner, nn.TransformerEncoder) and inside:
            # Padded examples would come as nested tensors, which only the original takes.
            owner.enable_nested_tensor = owner.use_nested_tensor = False


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def folds(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether the statistics of ``norm`` can go into the weights of ``layer`` before it."""
    return (
        type(layer) in FOLDABLE
        and type(norm) in NORMS
        and norm.running_mean is not None
        and len(layer.weight) == len(norm.running_mean)  # type: ignore[arg-type]
        and not any(map(nn.utils.parametrize.is_parametrized, (layer, norm)))
    )


def _fold(model: nn.Module, module: nn.Module, edit: Any) -> None:
    layer = model.get_submodule(edit["into"])
    if not folds(layer, module):
        raise ValueError("not a batch normalisation that folds into that layer")
    own, norm = layer._parameters, module._parameters
    weight, mean, variance = own["weight"], module.running_mean, module.running_var
    assert isinstance(weight, Tensor)
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    with torch.no_grad():
        factor, offset = (variance + module.eps).rsqrt(), -mean  # type: ignore[operator]
        if (gain := norm["weight"]) is not None:
            factor *= gain
        if (bias := own["bias"]) is not None:
            offset += bias
        offset *= factor
        if (shift := norm["bias"]) is not None:
            offset += shift
        folded = weight * factor.view(-1, *[1] * (weight.ndim - 1))
    layer.weight = nn.Parameter(folded, requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(offset, requires_grad=weight.requires_grad)
    model.set_submodule(edit["module"], nn.Identity())


REWRITES: dict[str, Callable[[nn.Module, nn.Module, Any], None]] = {
    "attention": _attention,
    "flatten": _flatten,
    "fold": _fold,
}
"""``attention``: heads of nn.MultiheadAttention may go. ``flatten``: a view or reshape to
``(..., size)`` in the layer's forward flattens what there is instead. ``fold``: a batch
normalisation goes into the weights of the layer ``into`` before it, and no longer learns."""
