"""A model that runs a list of nodes, each a layer or one of a closed set of PyTorch's functions.

``torch.fx`` would write Python out of such a list and execute it; what a file says must not get
that far.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}")
PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}

DEEPEST = 4
"""Lists in lists in an argument."""


def _slice(
    given: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Tensor:
    # Written as an index, which other code recognises as one.
    return given[(*(slice(None),) * (dim % given.ndim), slice(start, end, step))]


def _index(given: Tensor, places: Sequence[Tensor | None]) -> Tensor:
    return given[tuple(slice(None) if place is None else place for place in places)]


def _to(given: Tensor, dtype: torch.dtype | None = None, *_: Any, **__: Any) -> Tensor:
    return given if dtype is None else given.to(dtype)


def _index_put(
    given: Tensor, places: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> Tensor:
    # PyTorch's own function takes no axis that is left out.
    found: Tensor = torch.ops.aten.index_put(given, list(places), values, accumulate)
    return found


def _grid_sampler(given: Tensor, grid: Tensor, mode: int, padding: int, aligned: bool) -> Tensor:
    # Of a mode that is none, PyTorch gives memory as it was found.
    if mode not in (0, 1, 2) or padding not in (0, 1, 2):
        raise ValueError(f"a grid sampler of mode {mode!r:.20} and padding {padding!r:.20}")
    return torch.grid_sampler(given, grid, mode, padding, aligned)


def _integer(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of sizes only: Python repeats a list, and knows no largest integer."""

    def compute(*given: Any) -> Any:
        if not all(isinstance(one, int | torch.SymInt) for one in given):
            raise TypeError(f"{function.__name__} is of sizes only")
        found = function(*given)
        if isinstance(found, int) and abs(found) >= 2**63:
            raise OverflowError(f"{function.__name__} of sizes gives no integer of 64 bits")
        return found

    return compute


SPELLED: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "int_add": _integer(operator.add),
    "int_sub": _integer(operator.sub),
    "int_mul": _integer(operator.mul),
    "int_floordiv": _integer(operator.floordiv),
    "int_mod": _integer(operator.mod),
    "int_neg": _integer(operator.neg),
    "size": Tensor.size,
    "slice": _slice,
    "index": _index,
    "index_put": _index_put,
    "grid_sampler": _grid_sampler,
    "grid_sampler_2d": _grid_sampler,
    "to": _to,
    "unflatten": torch.unflatten,
    "one_hot": torch.nn.functional.one_hot,
}
"""Those that go by another name in PyTorch, or take their arguments in another way."""

# Nothing that reads or writes files, gives memory as it was found, leaves bounds unchecked, changes
# what a tensor is, or whose result has a size that its values decide.
NAMES = (
    *("abs", "acos", "acosh", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "add", "add_", "addbmm"),
    *("addcdiv", "addcmul", "addmm", "addmv", "all", "alpha_dropout", "amax", "amin", "any"),
    *("arange", "argmax", "argmin", "argsort", "asin", "asinh", "atan", "atan2", "atanh"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "baddbmm", "batch_norm", "bernoulli", "bilinear"),
    *("bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor", "bmm", "broadcast_to", "cat"),
    *("cdist", "ceil", "celu", "channel_shuffle", "chunk", "clamp", "clamp_", "clamp_max"),
    *("clamp_min", "clone", "constant_pad_nd", "contiguous", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "copysign", "cos"),
    *("cosh", "cosine_similarity", "count_nonzero", "cross", "cummax", "cummin", "cumprod"),
    *("cumsum", "deg2rad", "detach", "diag_embed", "diagonal", "diff", "div", "div_", "dot"),
    *("dropout", "einsum", "elu", "elu_", "embedding", "embedding_bag", "eq", "erf", "erfc"),
    *("erfinv", "exp", "exp2", "expand", "expand_as", "expm1", "eye", "feature_dropout", "flatten"),
    *("flip", "floor", "floor_divide", "fill", "fmod", "frac", "full", "full_like", "gather", "ge"),
    *("gelu", "glu", "group_norm", "gru", "gru_cell", "gt", "hardshrink", "hardsigmoid"),
    *("hardsigmoid_", "hardswish", "hardswish_", "hardtanh", "hardtanh_", "heaviside", "hypot"),
    *("im2col", "col2im", "index_add", "index_fill", "index_select", "instance_norm", "isfinite"),
    *("isinf", "isnan", "kron", "layer_norm", "le", "leaky_relu", "leaky_relu_", "lerp", "linear"),
    *("linalg_vector_norm", "log", "log10", "log1p", "log2", "log_sigmoid", "log_softmax"),
    *("logaddexp", "logical_and", "logical_not", "logical_or", "logical_xor", "logit", "logsumexp"),
    *("lstm", "lstm_cell", "lt", "masked_fill", "masked_fill_", "matmul", "max", "max_pool1d"),
    *("max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "maximum"),
    *("mean", "median", "meshgrid", "min", "minimum", "mish", "mish_", "mm", "movedim", "mul"),
    *("mul_", "mv", "nan_to_num", "narrow", "native_group_norm", "native_layer_norm", "ne", "neg"),
    *("norm", "ones", "ones_like", "outer", "pad", "permute", "pixel_shuffle", "pixel_unshuffle"),
    *("pow", "prelu", "prod", "rad2deg", "reciprocal", "reflection_pad1d", "reflection_pad2d"),
    *("reflection_pad3d", "relu", "relu6", "relu_", "remainder", "repeat", "repeat_interleave"),
    *("replication_pad1d", "replication_pad2d", "replication_pad3d", "reshape", "rms_norm"),
    *("rnn_relu", "rnn_tanh", "roll", "rot90", "round", "rsqrt", "rsub", "scalar_tensor"),
    *("scaled_dot_product_attention", "scatter", "scatter_add", "scatter_reduce", "select"),
    *("select_scatter", "selu", "selu_", "sigmoid", "sign", "silu", "silu_", "sin", "sinc", "sinh"),
    *("slice_scatter", "softmax", "softplus", "softshrink", "sort", "split", "split_with_sizes"),
    *("sqrt", "square", "squeeze", "stack", "std", "sub", "sub_", "sum", "t", "take_along_dim"),
    *("tan", "tanh", "tanh_", "threshold", "tile", "topk", "transpose", "tril", "triu"),
    *("true_divide", "trunc", "type_as", "unbind", "unfold", "unsqueeze", "upsample_bicubic2d"),
    *("upsample_bilinear2d", "upsample_linear1d", "upsample_nearest1d", "upsample_nearest2d"),
    *("upsample_nearest3d", "upsample_trilinear3d", "var", "var_mean", "vdot", "view_as", "where"),
    *("xlogy", "zeros", "zeros_like"),
)


def _found(name: str) -> Callable[..., Any]:
    """PyTorch's own function: unlike an operator it goes by a name that other code looks for."""
    for place in (torch, torch._C._nn, Tensor, torch.ops.aten):
        if hasattr(place, name):
            found: Callable[..., Any] = getattr(place, name)
            return found
    raise AttributeError(f"PyTorch has no {name}")


FUNCTIONS: dict[str, Callable[..., Any]] = {**{name: _found(name) for name in NAMES}, **SPELLED}


class Ref(NamedTuple):
    """The value of an earlier node."""

    name: str


class Node(NamedTuple):
    """One step; ``last`` are the values that nobody reads after it."""

    name: str
    op: str
    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    last: tuple[str, ...]


class Graph(nn.Module):
    """Runs ``nodes`` in order; layers, parameters and buffers are its own, under ordinary names."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        super().__init__()
        self._nodes = tuple(nodes)

    def forward(self, *inputs: Any) -> Any:
        """What the output node gives; ``inputs`` are the placeholders' values in their order."""
        values: dict[str, Any] = {}
        given = iter(inputs)
        for name, op, target, args, kwargs, last in self._nodes:
            found = [_filled(arg, values) for arg in args]
            if op == "placeholder":
                values[name] = next(given)
            elif op == "call_module":
                values[name] = self.get_submodule(target)(*found)
            elif op == "call_function":
                named = {key: _filled(arg, values) for key, arg in kwargs.items()}
                values[name] = FUNCTIONS[target](*found, **named)
            elif op == "get_attr":
                place, _, own = target.rpartition(".")
                values[name] = getattr(self.get_submodule(place), own)
            else:
                return found[0]
            for gone in last:
                del values[gone]
        raise RuntimeError("the graph has no output")


def _filled(arg: Any, values: Mapping[str, Any]) -> Any:
    if type(arg) is Ref:
        return values[arg.name]
    if type(arg) is tuple:
        return tuple(_filled(part, values) for part in arg)
    if type(arg) is list:
        return [_filled(part, values) for part in arg]
    return arg


def parsed(said: Sequence[Mapping[str, Any]], owned: Mapping[str, str]) -> list[Node]:
    """The nodes that a file describes; ``owned`` says of every path the operation that reads it.

    Raises :class:`ValueError` for what is no node, names what is not there or not allowed.
    """
    nodes: list[Node] = []
    known: set[str] = set()
    for entry in said:
        name, op, target = entry["name"], entry["op"], entry.get("target", "")
        args, kwargs = entry.get("args", []), entry.get("kwargs", {})
        if not set(entry) <= {"name", "op", "target", "args", "kwargs"}:
            raise ValueError(f"node {name!r:.60} says more than a node has")
        if type(name) is not str or not NAME.fullmatch(name) or keyword.iskeyword(name):
            raise ValueError(f"{name!r:.60} is no name for a node")
        if name in known:
            raise ValueError(f"two nodes are called {name!r:.60}")
        if nodes and nodes[-1].op == "output":
            raise ValueError("its output is not its last node")
        if op == "call_function" and (type(target) is not str or target not in FUNCTIONS):
            raise ValueError(f"{target!r:.60} is none of the functions that a graph may call")
        if op in ("call_module", "get_attr") and owned.get(target) != op:
            raise ValueError(f"node {name!r:.60} names {target!r:.60}, which is not there")
        if op not in ("placeholder", "call_module", "call_function", "get_attr", "output"):
            raise ValueError(f"{op!r:.60} is nothing that a node can do")
        if (op != "call_function" and kwargs) or (op in ("placeholder", "get_attr") and args):
            raise ValueError(f"node {name!r:.60} has arguments that it cannot have")
        if type(args) is not list or type(kwargs) is not dict or "out" in kwargs:
            raise ValueError(f"node {name!r:.60} has arguments of no known form")
        if op == "output" and len(args) != 1:
            raise ValueError("its output is not one value")
        read = tuple(_argument(arg, known) for arg in args)
        named = {str(key): _argument(arg, known) for key, arg in kwargs.items()}
        nodes.append(Node(name, op, target, read, named, ()))
        known.add(name)
    if not nodes or nodes[-1].op != "output":
        raise ValueError("its graph has no output")
    return _released(nodes)


def _argument(said: Any, known: set[str], depth: int = 0) -> Any:
    if said is None or type(said) in (bool, int, float, str):
        return said
    if type(said) is list and depth < DEEPEST:
        return [_argument(part, known, depth + 1) for part in said]
    match said:
        case {"node": str(name), **rest} if not rest and name in known:
            return Ref(name)
        case {"dtype": str(name), **rest} if not rest and name in DTYPES:
            return DTYPES[name]
        case {"tuple": list(parts), **rest} if not rest and depth < DEEPEST:
            return tuple(_argument(part, known, depth + 1) for part in parts)
    raise ValueError(f"{said!r:.80} is no argument that a node can have")


def _released(nodes: Sequence[Node]) -> list[Node]:
    """The same nodes with what each is the last to read: values do not outlive their use."""
    read: set[str] = set()
    found = []
    for node in reversed(nodes):
        here = refs((*node.args, *node.kwargs.values()))
        gone = [name for name in here if name not in read]
        read.update(here)
        if node.name not in read and node.op != "output":
            gone.append(node.name)
        found.append(node._replace(last=tuple(gone)))
    return found[::-1]


def refs(args: Any) -> dict[str, None]:
    """The nodes that arguments name, each once."""
    if type(args) is Ref:
        return {args.name: None}
    if type(args) in (tuple, list):
        return {name: None for arg in args for name in refs(arg)}
    return {}
