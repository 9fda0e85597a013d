"""Weights set to zero by magnitude, for studies of accuracy: the shapes stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from compressor.artifact import Artifact, Torch
from compressor.errors import InputError, Unsuitable
from compressor.loading import torchfile
from compressor.task import Task

NOTE = "onnxruntime computes zeros like any other number: time, memory and file size do not change."

LAYERS = (_ConvNd, nn.Linear, nn.RNNBase, nn.MultiheadAttention)
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def mask(
    artifact: Torch,
    task: Task,
    into: Path,
    *,
    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None,
    pattern: Literal["unstructured", "2:4", "1:4", "4:8"] = "unstructured",
    scope: Literal["layer", "global"] = "layer",
) -> Torch:
    """Sets the weights of least magnitude to zero, in convolution, linear and recurrent layers.

    ``unstructured``: the fraction ``sparsity`` of every weight tensor, or with ``scope`` ``global``
    of all of them together (Han et al. 2015). Nothing keeps a global cut from emptying a layer.
    ``N:M``: of every M consecutive inputs of an output the N largest stay (Mishra et al. 2021), at
    every kernel position on its own; a tensor whose inputs are no multiple of M stays dense and is
    named. Of equal magnitudes the first stays.

    Biases, normalisation and embeddings stay, and so does a weight that one of them shares or that
    is computed from others; the output layer is masked too. Frozen weights are masked like others.
    The facts count zeros by tensor, those that were there before included. :func:`held` keeps them
    while the model is trained.

    Raises :class:`InputError` for settings that do not go together (:func:`fraction`),
    :class:`Unsuitable` when no weight becomes zero.
    """
    share = fraction(sparsity=sparsity, pattern=pattern, scope=scope)
    model, edits = torchfile.open_model(artifact, task)
    found, left = weights(model)
    before = _zeros(found)
    if pattern == "unstructured":
        apart = [found] if scope == "global" else [{name: one} for name, one in found.items()]
        gone = {name: least for part in apart for name, least in _least(part, share).items()}
    else:
        n, m = map(int, pattern.split(":"))
        for name, one in found.items():
            if one.inputs % m:
                left[name] = f"its {one.inputs} inputs are no multiple of {m}"
        gone = {name: _beyond(one, n, m) for name, one in found.items() if name not in left}
    with torch.no_grad():
        for name, where in gone.items():
            found[name].parameter.masked_fill_(where, 0)
    after = _zeros(found)
    if after == before:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
        raise Unsuitable(f"no weight becomes zero ({why or 'no layer has as many left to mask'})")
    path = into.with_name(into.name + torchfile.SUFFIX)
    torchfile.write(path, model, torchfile.origin(artifact), edits)
    sizes = {name: one.parameter.numel() for name, one in found.items()}
    zeros, size = sum(after.values()), sum(sizes.values())
    return artifact.then(
        path,
        "torch",
        "mask",
        {"sparsity": sparsity, "pattern": pattern, "scope": scope},
        note=NOTE,
        zeros=zeros,
        weights=size,
        reached=zeros / size,
        layers={
            name: {"zeros": after[name], "weights": sizes[name], "sparsity": zero / sizes[name]}
            for name, zero in after.items()
        },
        left_alone=left,
    )


def fraction(**settings: Any) -> float:
    """The fraction of zeros that the settings of :func:`mask` ask for.

    Raises :class:`InputError` where ``sparsity`` is missing, and where ``sparsity`` or a global
    ``scope`` stands beside a pattern that decides both.
    """
    sparsity, pattern, scope = (settings.get(name) for name in ("sparsity", "pattern", "scope"))
    if pattern == "unstructured":
        if sparsity is None:
            raise InputError(
                "mask needs the fraction of zeros: sparsity = 0.5, or a pattern such as 2:4"
            )
        return float(sparsity)
    n, m = map(int, str(pattern).split(":"))
    if sparsity is not None:
        raise InputError(
            f"sparsity = {sparsity:g}: pattern {pattern} decides it ({1 - n / m:g}): "
            "remove sparsity, or the pattern"
        )
    if scope == "global":
        raise InputError(f"scope = 'global': pattern {pattern} is the same everywhere: remove it")
    return 1 - n / m


class Weight(NamedTuple):
    """A weight that may be masked; its inputs are on ``axis``."""

    parameter: nn.Parameter
    axis: int

    @property
    def inputs(self) -> int:
        """How many inputs each output is computed from (of one group, where there are groups)."""
        return self.parameter.shape[self.axis]


def weights(model: nn.Module) -> tuple[dict[str, Weight], dict[str, str]]:
    """The weights of convolution, linear and recurrent layers by name, each tensor once.

    Beside them those that have to stay as they are, with the reason. The projections of
    :class:`torch.nn.MultiheadAttention` are linear layers.
    """
    others = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, LAYERS)
        for parameter in module.parameters(recurse=False)
    }
    found: dict[str, Weight] = {}
    left: dict[str, str] = {}
    seen: set[int] = set()
    for place, module in model.named_modules():
        if not isinstance(module, LAYERS):
            continue
        for tensor in _tensors(module):
            name = f"{place}.{tensor}".removeprefix(".")
            parameter = module._parameters.get(tensor)
            if parameter is None:
                left[name] = "it is computed from other parameters"
            elif id(parameter) in others:
                left[name] = "it is shared with a layer of another kind"
            elif id(parameter) not in seen:
                seen.add(id(parameter))
                # A transposed convolution's weight is (inputs, outputs / groups, ...); blocks of
                # inputs stay within a group when the group's share is a multiple of them.
                found[name] = Weight(parameter, 0 if isinstance(module, _ConvTransposeNd) else 1)
    return found, left


def _tensors(module: nn.Module) -> list[str]:
    """The names that a layer's code has for its weights."""
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name.startswith("weight")]
    if isinstance(module, nn.MultiheadAttention):
        return [name for name in PROJECTIONS if getattr(module, name) is not None]
    return ["weight"]


def _zeros(found: Mapping[str, Weight]) -> dict[str, int]:
    return {name: int((one.parameter == 0).sum()) for name, one in found.items()}


def _least(found: Mapping[str, Weight], share: float) -> dict[str, Tensor]:
    """Where the ``share`` of all these weights is that is least in magnitude, by name."""
    if not found:
        return {}
    flat = torch.cat([one.parameter.detach().abs().flatten() for one in found.values()])
    gone = torch.ones(len(flat), dtype=torch.bool)
    kept = len(flat) - round(share * len(flat))
    gone[flat.argsort(descending=True, stable=True)[:kept]] = False
    parts = torch.split(gone, [one.parameter.numel() for one in found.values()])
    return {
        name: part.view(one.parameter.shape)
        for (name, one), part in zip(found.items(), parts, strict=True)
    }


def _beyond(weight: Weight, n: int, m: int) -> Tensor:
    """Where all but the ``n`` largest of every ``m`` consecutive inputs are."""
    rows = weight.parameter.detach().abs().movedim(weight.axis, -1)
    blocks = rows.reshape(*rows.shape[:-1], -1, m)
    largest = blocks.argsort(dim=-1, descending=True, stable=True)[..., :n]
    gone = torch.ones_like(blocks, dtype=torch.bool).scatter(-1, largest, False)
    return gone.flatten(-2).movedim(-1, weight.axis)


@contextmanager
def held(model: nn.Module, artifact: Artifact, shard: bool = False) -> Iterator[None]:
    """While this is open training leaves the zeros of a mask where they are, bit for bit.

    Their gradients become zero, and what never had another gradient is not moved by Adam, nor by
    any optimiser that treats each weight on its own. ``artifact`` is what ``model`` was loaded
    from; where none of its steps is a mask nothing is held.
    """
    masked = any(step["stage"] == "mask" for step in artifact.steps)
    if masked and shard:
        raise InputError("shard = true: the zeros of sharded weights are not held: remove it")
    hooks = [
        one.parameter.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient, gone=gone: gradient.masked_fill(gone, 0)
        )
        for one in (weights(model)[0].values() if masked else ())
        if one.parameter.requires_grad and (gone := one.parameter.detach() == 0).any()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
