"""A model that computes as its int8 export will, and can still be trained.

:func:`install` makes every call of the model's forward run under a :class:`TorchFunctionMode` that
follows the tensors. A *point* is a place where a tensor is put on a grid of 256 values
``(q - zero_point) * scale``; points are numbered in the order of the calls, which must be the same
every time. What a convolution or linear layer reads is on a grid, and what leaves a convolution is
put on one before anything else reads it - save a ReLU or a clamp, which onnxruntime takes into the
convolution. Weights are signed and symmetric, with a scale for each output channel; biases have the
scale of the sums (Jacob et al. 2018, arXiv:1712.05877).

The state has, beside the model's own, ``quantization_log_scale`` (float32) and
``quantization_zero_point`` (int32), both ``(points,)``. Weights stay float32 and keep their names;
their scales follow from them. In an export the weights are int8 and the biases int32 constants.
"""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

Edit = Mapping[str, Any]

NAME = "quantization"
"""Attribute of the model that is its :class:`Grids`; their tensors' names begin so."""

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
LAYERS = (*CONVOLUTIONS, "linear")
PRODUCTS = ("matmul", "__matmul__", "bmm")
JOINS = ("add", "__add__", "__radd__", "mul", "__mul__", "__rmul__", "cat", "concat")
POOLS = ("avg_pool1d", "avg_pool2d", "avg_pool3d")
PASSING = ("relu", "relu6", "hardtanh", "clamp", "clip", "clamp_min")
"""What onnxruntime takes into the layer before, so that the grid comes after it."""

MOVING = (
    *("max_pool1d", "max_pool2d", "max_pool3d", "flatten", "view", "reshape", "permute"),
    *("transpose", "contiguous", "squeeze", "unsqueeze", "chunk", "split", "unbind", "movedim"),
    *("__getitem__", "pixel_shuffle", "channel_shuffle", "narrow", "expand", "repeat", "flip"),
    *("roll", "to", "float", "clone", "detach"),
)
"""What gives only values that it was given: the grid stays."""

DROPPING = ("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout")
"""Dropout is off: what it scales up would leave the grid that evaluation needs."""

ASKING = ("__get__", "size", "dim", "numel", "stride", "__len__", "is_floating_point")

LEVELS = 255
SMALLEST = 2.0**-60
"""Scale of a channel, or a point, that only ever held zeros."""

LARGEST_BIAS = 2.0**30
"""Steps of a bias, so that the sum still fits 32 bits."""

At = Callable[[int, Tensor], Tensor]
With = Callable[[int, Tensor, Tensor | None, int], tuple[Tensor, Tensor | None] | None]


class Following(TorchFunctionMode):
    """One call of the model. ``at(number, tensor)`` gives the tensor on the grid of a point.

    ``weights(number, weight, bias, point)`` gives what the layer's ``number``-th call computes
    with, or ``None`` for a layer that stays float.
    """

    def __init__(self, at: At, weights: With) -> None:
        super().__init__()
        self.at, self.weights = at, weights
        self.points = self.layers = 0
        # Tensor -> its point and its form on the grid (None: the tensor itself is on it).
        self.held = WeakTensorKeyDictionary()
        # Tensors that int8 kernels made: nothing but PASSING reads them as they are.
        self.made = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in ASKING:
            return func(*args, **kwargs)
        if name in DROPPING:
            return args[0]
        if self._inside(args[0] if args else None):
            name, func = _out_of_place(name, func)
            if kwargs.get("inplace"):
                kwargs["inplace"] = False
        if name in LAYERS:
            return self._layer(name, func, args, kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if _floats(each)]
        ours = any(map(self._inside, given))
        if name in PRODUCTS or (ours and (name in POOLS or (name in JOINS and len(given) > 1))):
            found = func(*tree_map(self._gridded, args), **tree_map(self._gridded, kwargs))
            if name not in PRODUCTS:
                self.made[found] = True
            return found
        moving = name in MOVING or (name == "pad" and _with_zeros(args, kwargs))
        if moving and args and self._inside(args[0]):
            return self._moved(func, args, kwargs)
        if name in PASSING and args and args[0] in self.made and args[0] not in self.held:
            found = func(*args, **kwargs)
            self.made[found] = True
            return found
        return func(*tree_map(self.read, args), **tree_map(self.read, kwargs))

    def outputs(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``forward`` gives; the last convolution's output is on a grid too."""
        with self:
            found = forward(*args, **kwargs)
        return tree_map(self.read, found)

    def read(self, value: Any) -> Any:
        """What everything else sees of a tensor: its form on the grid, where it has one."""
        return self._gridded(value) if self._inside(value) else value

    def _inside(self, value: Any) -> bool:
        return isinstance(value, Tensor) and (value in self.made or value in self.held)

    def _gridded(self, value: Any) -> Any:
        return self._point(value)[1] if _floats(value) else value

    def _point(self, tensor: Tensor) -> tuple[int, Tensor]:
        if tensor not in self.held:
            number, self.points = self.points, self.points + 1
            on = self.at(number, tensor)
            self.held[tensor] = number, on
            self.held[on] = number, None
        number, found = self.held[tensor]
        return number, tensor if found is None else found

    def _layer(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        number, self.layers = self.layers, self.layers + 1
        # The point is the next one, or the one that the input has.
        point = self.held[x][0] if x in self.held else self.points
        taken = self.weights(number, weight, bias, point)
        if taken is None:
            x, weight, bias = map(self.read, (x, weight, bias))
        else:
            x, (weight, bias) = self._point(x)[1], taken
        found: Tensor = func(
            x, weight, bias, *args[3:], **{k: given[k] for k in kwargs if k in given}
        )
        if taken is not None and name in CONVOLUTIONS:
            self.made[found] = True
        return found

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        number, x = self._point(args[0])

        def again(value: Any) -> Any:
            if not _floats(value):
                return value
            on = self.at(number, value)
            self.held[on] = number, None
            return on

        return tree_map(again, func(x, *args[1:], **kwargs))


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _out_of_place(name: str, func: Any) -> tuple[str, Any]:
    """``relu_`` becomes ``relu``: a tensor that is followed keeps its values."""
    if name.startswith("__i") and hasattr(Tensor, other := "__" + name[3:]):
        return other, getattr(Tensor, other)
    if name.endswith("_") and not name.endswith("__"):
        for owner in (torch, Tensor):
            if hasattr(owner, name[:-1]):
                return name[:-1], getattr(owner, name[:-1])
    return name, func


def _with_zeros(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``pad(input, pad, mode, value)`` pads with zeros."""
    given = {**dict(zip(("input", "pad", "mode", "value"), args, strict=False)), **kwargs}
    return given.get("mode", "constant") == "constant" and not given.get("value")


class Layer(NamedTuple):
    """A layer as the file names it: its parameters and the point that it reads."""

    weight: str
    bias: str | None
    point: int


class Grids:
    """The scales and zero points of all points, and what the edit says of the layers.

    ``bits`` of a weight are 8, or 7 where a CPU without 8-bit dot products would saturate. The
    tensors are the model's own, without a submodule: a :class:`torch.nn.Sequential` would run it.
    """

    def __init__(
        self, model: nn.Module, points: int, layers: tuple[Layer | None, ...], bits: int
    ) -> None:
        self.model, self.layers, self.most = model, layers, 2 ** (bits - 1) - 1
        self.points = points
        self.frozen: list[tuple[float, int]] = []
        self.forward = model.forward  # it may be rewritten already
        device = next(model.parameters()).device
        scale = nn.Parameter(torch.zeros(points, device=device))
        zero = torch.zeros(points, dtype=torch.int32, device=device)
        model.register_parameter(f"{NAME}_log_scale", scale)
        model.register_buffer(f"{NAME}_zero_point", zero)

    @property
    def log_scale(self) -> Tensor:
        """Natural logarithm of every point's scale: a step of Adam is a fraction of the scale."""
        return self.held("log_scale")

    @property
    def zero_point(self) -> Tensor:
        """The integer that stands for 0 at every point."""
        return self.held("zero_point")

    def held(self, name: str) -> Tensor:
        """A tensor of the model by the name that it has here."""
        found: Tensor = getattr(self.model, f"{NAME}_{name}")
        return found

    def at(self, number: int, x: Tensor) -> Tensor:
        """``x`` on the grid of a point; gradients go straight through, those of the scale are
        LSQ's (Esser et al. 2020, arXiv:1902.08153)."""
        scale, zero = self.log_scale[number].exp(), self.zero_point[number]
        q = (_rounded(x / scale) + zero).clamp(0, LEVELS)
        on: Tensor = (q - zero) * scale
        return on

    def weights(
        self, number: int, weight: Tensor, bias: Tensor | None, point: int
    ) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of a call as the export will have them; gradients go straight through."""
        if self.layers[number] is None:
            return None
        fine = self.log_scale[point].detach().exp()
        scale = self.steps(weight, bias, fine)
        column = scale.view(-1, *[1] * (weight.ndim - 1))
        weight = _rounded(weight / column) * column
        return weight, None if bias is None else _rounded(bias / (fine * scale)) * (fine * scale)

    def steps(self, weight: Tensor, bias: Tensor | None, fine: Tensor) -> Tensor:
        """The scale of every output channel, ``(outputs,)``; ``fine`` is that of the input."""
        scale: Tensor = weight.detach().flatten(1).abs().amax(1) / self.most
        if bias is not None:
            scale = scale.maximum(bias.detach().abs() / (fine * LARGEST_BIAS))
        return scale.clamp(min=SMALLEST)

    def constants(
        self, number: int, weight: Tensor, bias: Tensor | None, point: int
    ) -> tuple[Tensor, Tensor | None] | None:
        """As :meth:`weights`, from int8 and int32 constants through dequantize operators."""
        layer = self.layers[number]
        if layer is None:
            return None
        weight = self._constant("weight", number, torch.int8)
        return weight, None if layer.bias is None else self._constant("bias", number, torch.int32)

    def _constant(self, kind: str, number: int, dtype: torch.dtype) -> Tensor:
        values, scale, zero = (
            self.held(f"{kind}{what}_{number}") for what in ("", "_scale", "_zero")
        )
        limits = torch.iinfo(dtype)
        found: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(
            values, scale, zero, 0, limits.min, limits.max, dtype
        )
        return found

    def put(self, number: int, x: Tensor) -> Tensor:
        """As :meth:`at`, by a quantize and a dequantize operator."""
        way = (*self.frozen[number], 0, LEVELS, torch.uint8)
        ops = torch.ops.quantized_decomposed
        found: Tensor = ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *way), *way)
        return found


def _rounded(x: Tensor) -> Tensor:
    """To the nearest integer, ties to even; the gradient of the identity."""
    return x + (x.round() - x).detach()


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    grids: Grids = getattr(self, NAME)
    export = torch.compiler.is_exporting()
    mode = Following(*((grids.put, grids.constants) if export else (grids.at, grids.weights)))
    found = mode.outputs(grids.forward, *args, **kwargs)
    if (mode.points, mode.layers) != (grids.points, len(grids.layers)):
        raise IndexError("the model does not make the calls that its grids are for")
    return found


def install(model: nn.Module, edit: Edit) -> None:
    """The edit ``fake_quantize``, in place.

    ``{"edit": "fake_quantize", "points": 3, "bits": 8, "layers": [{"weight": "conv.weight", "bias":
    "conv.bias", "point": 0}, null]}``: one of ``layers`` for every call of a convolution or linear
    layer, in order; ``null`` stays float.
    """
    points, bits = edit["points"], edit["bits"]
    if type(points) is not int or points < 1 or type(bits) is not int or bits not in (7, 8):
        raise ValueError("points is a positive integer, bits 7 or 8")
    if hasattr(model, NAME):
        raise ValueError(f"the model has {NAME!r} already")
    layers = tuple(None if each is None else Layer(**each) for each in edit["layers"])
    for layer in layers:
        if layer is not None:
            model.get_parameter(layer.weight)
            if layer.bias is not None:
                model.get_parameter(layer.bias)
            if type(layer.point) is not int or not 0 <= layer.point < points:
                raise ValueError("no such point")
    model.__dict__[NAME] = Grids(model, points, layers, bits)
    model.forward = types.MethodType(_forward, model)
    model.register_load_state_dict_post_hook(freeze)  # type: ignore[no-untyped-call]


def freeze(model: nn.Module, *_: Any) -> None:
    """Makes the constants that an export has from the weights as they are now, in place.

    It also happens whenever a state is loaded.
    """
    # Registers the operators.
    from torch.ao.quantization.fx import _decomposed  # noqa: F401

    grids: Grids = getattr(model, NAME)
    scales = grids.log_scale.detach().exp()
    grids.frozen = list(zip(scales.tolist(), grids.zero_point.tolist(), strict=True))
    with torch.no_grad():
        for number, layer in enumerate(grids.layers):
            if layer is None:
                continue
            weight = model.get_parameter(layer.weight)
            bias = None if layer.bias is None else model.get_parameter(layer.bias)
            fine = scales[layer.point]
            scale = grids.steps(weight, bias, fine)
            column = scale.view(-1, *[1] * (weight.ndim - 1))
            held = {"weight": ((weight / column).round().to(torch.int8), scale)}
            if bias is not None:
                sums = fine * scale
                held["bias"] = (bias / sums).round().to(torch.int32), sums
            for kind, (values, step) in held.items():
                for name, tensor in (
                    (f"{kind}_{number}", values),
                    (f"{kind}_scale_{number}", step),
                    (f"{kind}_zero_{number}", torch.zeros(len(step), dtype=values.dtype)),
                ):
                    model.register_buffer(f"{NAME}_{name}", tensor, persistent=False)


def survey(model: nn.Module, batches: Iterable[tuple[Tensor, ...]], bits: int) -> dict[str, Any]:
    """Installs fake quantization in ``model``, with ranges from ``batches``; gives the edit.

    A range is the mean over the batches of their least and their largest value, zero included
    (Krishnamoorthi 2018, arXiv:1806.08342, uses a moving mean). Raises :class:`ValueError` for a
    model without convolution or linear layers or with infinite activations, for one whose calls are
    not the same every time, in training too, and for one that changes a tensor in place in a way
    that cannot be followed. The model is then of no more use.
    """
    names = {id(tensor): name for name, tensor in model.named_parameters(remove_duplicate=False)}
    ranges: list[list[tuple[float, float]]] = []
    layers: list[dict[str, Any] | None] = []

    def at(number: int, x: Tensor) -> Tensor:
        if number == len(ranges):
            ranges.append([])
        ranges[number].append((x.min().item(), x.max().item()))
        return x.clone()

    def weights(number: int, weight: Tensor, bias: Tensor | None, point: int) -> Any:
        own = id(weight) in names and (bias is None or id(bias) in names)
        said = {"weight": names[id(weight)], "bias": None, "point": point} if own else None
        if said and bias is not None:
            said["bias"] = names[id(bias)]
        found.append(said)
        return (weight, bias) if own else None

    with torch.no_grad():
        for batch in batches:
            found: list[dict[str, Any] | None] = []
            mode = Following(at, weights)
            got = tree_leaves(mode.outputs(model.forward, *batch))
            wanted = tree_leaves(model(*batch))
            layers = layers or found
            if found != layers or mode.points != len(ranges):
                raise ValueError("it does not make the same calls for every input")
            if not all(map(_alike, got, wanted)):
                raise ValueError("it changes a tensor in place that int8 kernels share")
    if not all(math.isfinite(end) for seen in ranges for pair in seen for end in pair):
        raise ValueError("its activations are NaN or infinite")
    if not any(layers):
        raise ValueError("it has no convolution and no linear layer with weights of its own")
    edit = {"edit": "fake_quantize", "points": len(ranges), "bits": bits, "layers": layers}
    install(model, edit)
    grids: Grids = getattr(model, NAME)
    with torch.no_grad():
        for number, seen in enumerate(ranges):
            low = min(0.0, sum(low for low, _ in seen) / len(seen))
            high = max(0.0, sum(high for _, high in seen) / len(seen))
            scale = max((high - low) / LEVELS, SMALLEST)
            grids.log_scale[number] = math.log(scale)
            grids.zero_point[number] = min(max(round(-low / scale), 0), LEVELS)
    freeze(model)
    try:  # on a copy: batch normalisation that was not folded gathers statistics
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(model).train()(*batch)
    except IndexError:
        raise ValueError("it makes other calls in training") from None
    return edit


def _alike(one: Any, two: Any) -> bool:
    return not isinstance(one, Tensor) or torch.allclose(one, two, 1e-4, 1e-4, equal_nan=True)
