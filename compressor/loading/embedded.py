"""A model as plain JSON: the source of one that no factory gives back.

A torch-form file names a model's factory; ``compressor.embedded`` is the one whose arguments are
the model's own description::

    {"class": "Sequential", "modules": {"0": {"class": "Linear", "arguments": {...}}, ...}}

Of a layer it has the ``class``, one of :data:`~compressor.loading.graph.classes.CLASSES`, the
``arguments`` of its constructor and the ``modules`` in it; where they are not the usual, also
``training``, the ``frozen`` parameters and the ``dtypes`` of its tensors. ``{"same": PATH}`` is a
layer that stands at an earlier place too; the root's ``tied`` says which parameters are one.

A model whose forward is that of no such class is a graph::

    {"class": "graph", "modules": {"conv1": {...}}, "parameters": {"pos_embed": {...}},
     "buffers": {}, "nodes": [{"name": "x", "op": "placeholder"}, ...]}

Names resolve to the closed sets of :mod:`compressor.loading.graph`, and nothing but the arguments
of constructors is ever set: reading a description executes nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressor.errors import InputError, one_line
from compressor.loading.graph.classes import ACTIVATIONS, CLASSES, LARGEST, Known, flag, shown
from compressor.loading.graph.functions import DTYPES, PATH, Graph, parsed
from compressor.task import Input

FACTORY = "compressor.embedded"

MOST = 50_000
"""Layers of a model, one that is used twice counted twice."""

TENSORS = 8
"""What a recurrent layer of both directions may have, for each of its own layers."""

DEEPEST = 60
"""Layers in layers."""

LARGEST_VALUE = 1 << 32
"""Bytes of one value that a model computes from two examples."""

Description = dict[str, Any]


class Recorded(NamedTuple):
    """A layer as a file holds it: the name of its class and its attributes, never executed."""

    name: str
    attributes: dict[str, Any]


def describe(module: nn.Module | Recorded) -> Description:
    """The description of a model that is made of PyTorch's own layers only.

    Raises :class:`InputError` naming the classes that are not, and for a layer that behaves unlike
    its class: hooks, methods of its own, tensors or attributes that its arguments do not give.
    """
    foreign = strangers(module)
    if foreign:
        raise InputError(
            f"the model has layers that are not PyTorch's own ({', '.join(foreign[:8])}): give the "
            "function that builds it, --arch PKG.MOD:FACTORY"
        )
    said = _describe(module, "", _Walk())
    built = build(said)
    for path, given in walk(module):
        _compare(path, *look(given), built.get_submodule(path))
    return said


def strangers(module: nn.Module | Recorded) -> list[str]:
    """The classes in a model that are none of PyTorch's own layers, sorted."""
    if isinstance(module, Recorded):
        return []
    kinds = {type(part) for part in module.modules()}
    return sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds if not known(kind))


def known(kind: type) -> bool:
    """Whether a class is one of PyTorch's own layers, and not just called so."""
    return kind.__name__ in CLASSES and CLASSES[kind.__name__].kind is kind


def look(module: nn.Module | Recorded) -> tuple[str, Mapping[str, Any]]:
    """The name of a layer's class and its attributes."""
    if isinstance(module, Recorded):
        return module.name, module.attributes
    return type(module).__name__, vars(module)


def walk(module: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every layer by its path, the model itself first; one in two places comes twice."""
    found = [(path, module)]
    for name, child in _children(look(module)[1]).items():
        found += walk(child, f"{path}.{name}" if path else name)
    return found


def state_of(module: Recorded) -> dict[str, Tensor]:
    """The tensors of a recorded model, named as its ``state_dict`` would name them."""
    return {
        f"{path}.{name}" if path else name: tensor.detach()
        for path, part in walk(module)
        for name, tensor in _tensors(part.attributes).items()
    }


@dataclass
class _Walk:
    """What was met on the way: layers and parameters by identity, and how much of the bounds."""

    seen: dict[int, tuple[str, int]] = field(default_factory=dict)
    named: dict[int, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    open: set[int] = field(default_factory=set)
    count: int = 0


def _describe(module: nn.Module | Recorded, path: str, way: _Walk) -> Description:
    where = path or "the model"
    if id(module) in way.open or path.count(".") > DEEPEST:
        raise InputError(f"{where:.80} lies in itself or too deep: the model is broken")
    if id(module) in way.seen:
        first, size = way.seen[id(module)]
        way.count += size
        if way.count > MOST:
            raise InputError(f"the model has more than {MOST:,} layers: it cannot be meant")
        return {"same": first}
    before = way.count
    way.count += 1
    way.open.add(id(module))
    name, attributes = look(module)
    _check_own(where, name, attributes)
    said: Description = {"class": name, "arguments": _arguments(where, CLASSES[name], attributes)}
    children = {
        key: _describe(child, f"{path}.{key}" if path else key, way)
        for key, child in _children(attributes).items()
    }
    if children:
        said["modules"] = children
    if not attributes.get("training", True):
        said["training"] = False
    frozen, dtypes = [], {}
    for key, tensor in _tensors(attributes).items():
        full = f"{path}.{key}" if path else key
        if way.named.setdefault(id(tensor), full) != full:
            way.tied[full] = way.named[id(tensor)]
        if key in attributes["_parameters"] and not tensor.requires_grad:
            frozen.append(key)
        usual = torch.int64 if key == "num_batches_tracked" else torch.float32
        if tensor.dtype is not usual:
            dtypes[key] = str(tensor.dtype).removeprefix("torch.")
    said.update({k: v for k, v in (("frozen", frozen), ("dtypes", dtypes)) if v})
    way.open.discard(id(module))
    way.seen[id(module)] = (path, way.count - before)
    if not path and way.tied:
        said["tied"] = way.tied
    return said


def _children(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: child
        for name, child in attributes["_modules"].items()
        if isinstance(child, nn.Module | Recorded)
    }


def _tensors(attributes: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: tensor
        for kind in ("_parameters", "_buffers")
        for name, tensor in attributes[kind].items()
        if tensor is not None
    }


def _check_own(where: str, name: str, attributes: Mapping[str, Any]) -> None:
    for kind in ("_parameters", "_buffers", "_modules"):
        if not isinstance(attributes.get(kind), dict):
            raise InputError(f"{where:.80} is no whole {name}: save the model again")
        for key, value in attributes[kind].items():
            wanted = (nn.Module, Recorded) if kind == "_modules" else Tensor
            if type(key) is not str or not (value is None or isinstance(value, wanted)):
                raise InputError(f"{where:.80} holds {key!r:.60}, which a {name} does not have")
    for key, value in attributes.items():
        if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and value:
            raise InputError(f"{where:.80} has hooks ({key}), which are code: remove them")


def _arguments(where: str, known: Known, attributes: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    value: Any
    for name, check in known.arguments.items():
        stored = known.stored.get(name, name)
        if name == "activation" and name in attributes["_modules"]:
            value = None
        elif stored in attributes["_parameters"]:
            value = attributes["_parameters"][stored] is not None
        elif stored in attributes:
            value = _plain(attributes[stored])
            if check is flag and value is None:  # there is no such tensor
                value = False
        else:
            continue  # a model of an older PyTorch, before there was this argument
        if name == "activation":
            value = next((key for key, made in ACTIVATIONS.items() if made is value), value)
        if not check(value):
            raise InputError(
                f"{where:.80}: {name} of a {known.kind.__name__} is {shown(value)}: it cannot be "
                "meant"
            )
        found[name] = value
    # Norms take a bias of their own since PyTorch 2.13 only.
    if "affine" in known.arguments and (not found.get("affine") or found.get("bias")):
        found.pop("bias", None)
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _compare(path: str, name: str, attributes: Mapping[str, Any], built: nn.Module) -> None:
    """Raises :class:`InputError` where a layer is not what its description gives back."""
    where, fresh = path or "the model", vars(built)
    for key in attributes:
        if key not in fresh and hasattr(type(built), key):
            raise InputError(
                f"{where:.80} replaces {key!r:.60} of {name}, which is code: give the function "
                "that builds the model, --arch PKG.MOD:FACTORY"
            )
    for key, value in fresh.items():
        private = key in ("_parameters", "_buffers", "_modules", "num_layers")
        if private or key not in attributes or not _comparable(_plain(value)):
            continue
        if not _comparable(_plain(attributes[key])) or _plain(attributes[key]) != _plain(value):
            raise InputError(
                f"{where:.80}: {key} is {shown(attributes[key])}, a {name} of these arguments has "
                f"{shown(value)}: the model was changed by hand; give --arch PKG.MOD:FACTORY"
            )
    wanted, given = _tensors(fresh), _tensors(attributes)
    for key in {**wanted, **given}:
        shapes = [tuple(each[key].shape) if key in each else None for each in (given, wanted)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{where:.80}: {key} has shape {shapes[0]}, a {name} of these arguments has "
                f"{shapes[1]}: the model was changed by hand; give --arch PKG.MOD:FACTORY"
            )


def _comparable(value: Any) -> bool:
    scalar = (bool, int, float, str, type(None))
    return isinstance(value, scalar) or (
        type(value) is list and len(value) <= 64 and all(isinstance(each, scalar) for each in value)
    )


def build(description: Mapping[str, Any]) -> nn.Module:
    """The model of a description, untrained: its tensors are on the ``meta`` device.

    :func:`~compressor.loading.torchfile.load_state` turns it into a real one, once the shapes were
    found to be those of a state. Raises :class:`InputError` for a description that names what is
    not in the closed sets, or gives no model.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            if description.get("class") == "graph":
                return _graph(description)
            made: dict[str, tuple[nn.Module, int]] = {}
            rest = {key: value for key, value in description.items() if key != "tied"}
            root, _ = _build(rest, "", made, _Left(MOST))
            for name, first in dict(description.get("tied", {})).items():
                place, _, own = name.rpartition(".")
                owner, shared = root.get_submodule(place), root.get_parameter(first)
                if owner._parameters[own].shape != shared.shape:  # type: ignore[union-attr]
                    raise ValueError(f"{name!r:.60} cannot be {first!r:.60}")
                owner._parameters[own] = shared
            return root
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the description of the model in the file is broken ({one_line(error, 160)}): make "
            "the file again"
        ) from None


@dataclass
class _Left:
    """How many layers may still be built."""

    count: int

    def take(self, number: int) -> None:
        self.count -= number
        if self.count < 0:
            raise ValueError(f"it has more than {MOST:,} layers")


def _build(
    said: Mapping[str, Any], path: str, made: dict[str, tuple[nn.Module, int]], left: _Left
) -> tuple[nn.Module, int]:
    if "same" in said:
        found, size = made[said["same"]]
        left.take(size)
        return found, size
    before = left.count
    entry = CLASSES[said["class"]]
    words = {"class", "arguments", "modules", "training", "frozen", "dtypes"}
    if not set(said) <= words or path.count(".") > DEEPEST:
        raise ValueError(f"layer {path!r:.60} says more than a layer has")
    arguments = _checked(entry, said.get("arguments", {}))
    left.take(1 + TENSORS * arguments.get("num_layers", 0))
    children = {
        name: _build(child, f"{path}.{name}" if path else name, made, left)[0]
        for name, child in said.get("modules", {}).items()
    }
    module = entry.make(arguments, children) if entry.make else entry.kind(**arguments)
    if not entry.free and set(children) != set(_children(vars(module))):
        raise ValueError(f"a {said['class']} has other layers in it than {list(children)!r:.60}")
    for name, child in children.items():
        if name in module._modules:
            module._modules[name] = child
        else:
            module.add_module(name, child)
    own = _tensors(vars(module))
    for name, dtype in said.get("dtypes", {}).items():
        kind = module._parameters if name in module._parameters else module._buffers
        _put(kind, name, torch.empty_like(own[name], dtype=DTYPES[dtype]))
    for name in said.get("frozen", ()):
        module.get_parameter(name).requires_grad_(False)
    if type(training := said.get("training", True)) is not bool:
        raise ValueError(f"training is {training!r:.60}")
    module.training = training
    made[path] = module, before - left.count
    return made[path]


def _put(kind: dict[str, Any], name: str, tensor: Tensor) -> None:
    kind[name] = nn.Parameter(tensor) if isinstance(kind[name], nn.Parameter) else tensor


def _checked(entry: Known, arguments: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in arguments.items():
        if not entry.arguments[name](value):
            raise ValueError(f"{name} of a {entry.kind.__name__} is {value!r:.60}")
        found[name] = tuple(value) if type(value) is list else value
    if math.prod(found.get("kernel_size", ()) if "in_channels" in found else ()) > LARGEST:
        raise ValueError(f"kernel_size of a {entry.kind.__name__} is {found['kernel_size']!r:.60}")
    return found


def _graph(said: Mapping[str, Any]) -> nn.Module:
    if not set(said) <= {"class", "modules", "parameters", "buffers", "nodes", "training"}:
        raise ValueError("the graph says more than a graph has")
    modules, parameters, buffers = (
        dict(said.get(kind, {})) for kind in ("modules", "parameters", "buffers")
    )
    owned = dict.fromkeys(modules, "call_module")
    owned |= dict.fromkeys([*parameters, *buffers], "get_attr")
    root = Graph(parsed(said["nodes"], owned))
    left = _Left(MOST)
    for path, entry in modules.items():
        owner, name = _place(root, path)
        owner.add_module(name, _build(entry, "", {}, left)[0])
    for path, entry in {**parameters, **buffers}.items():
        owner, name = _place(root, path)
        if not set(entry) <= {"shape", "dtype", "frozen"}:
            raise ValueError(f"{path!r:.60} says more than a tensor has")
        tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        if path in parameters:
            trained = tensor.is_floating_point() and not entry.get("frozen", False)
            owner.register_parameter(name, nn.Parameter(tensor, requires_grad=trained))
        else:
            owner.register_buffer(name, tensor)
    return root.train(said.get("training", True) is True)


def _place(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Where a path leads: its owner, made where there is none yet, and the name there."""
    if not PATH.fullmatch(path) or path.count(".") > DEEPEST:
        raise ValueError(f"{path!r:.60} is no name")
    *places, name = path.split(".")
    for place in places:
        if place not in root._modules:
            root.add_module(place, nn.Module())
        root = root.get_submodule(place)
    return root, name


class _Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor) and each.numel() * each.element_size() > LARGEST_VALUE:
                raise InputError(
                    f"the model computes a tensor of shape {tuple(each.shape)} from two examples: "
                    "it cannot be meant"
                )
        return found


def check(model: nn.Module, inputs: tuple[Input, ...], batch: int = 2) -> None:
    """Follows ``batch`` examples through the shapes of ``model``, without memory for any of it.

    A file may ask for a padding or an enlargement that no memory holds. Raises
    :class:`InputError` for a value above :data:`LARGEST_VALUE`, for a model that does not run and
    for one that writes into its own tensors.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # Modes of the layers' own code take tensors that they make from here.
        with torch.no_grad(), torch.device("meta"), _Watched():  # type: ignore[no-untyped-call]
            given = tuple(
                torch.empty((batch, *one.shape), dtype=DTYPES[one.dtype]) for one in inputs
            )
            torch.func.functional_call(model, shapes, given)
        written = [name for name, tensor in shapes.items() if tensor._version]
        if written:
            raise InputError(
                f"the model changes its own {written[0]!r:.60} whenever it runs: export it for "
                "inference, after model.eval()"
            )
    except InputError:
        raise
    except Exception as error:
        shown = ", ".join(f"{one.dtype} {(batch, *one.shape)}" for one in inputs)
        raise InputError(f"the model cannot take {shown}: {one_line(error, 160)}") from None
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
