"""From an exported program to a graph of layers: the description of a model that can be changed.

Operators that read weights become the layers that own them, under the weights' names. An export
fixes shapes in numbers; what splits or merges axes is written as just that, so that it holds for
any batch and for fewer channels.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError, one_line
from compressor.loading import embedded
from compressor.loading.embedded import Description
from compressor.loading.graph.functions import DTYPES, FUNCTIONS, NAME, Ref, refs
from compressor.loading.graph.layers import DROPOUTS, LAYERS, Call, Layer, Shape
from compressor.loading.graph.program import HERE, Argument, Program, Step

PRIMES = (3, 5, 7, 11, 13, 17, 19)

RENAMED = {
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "_adaptive_avg_pool3d": "adaptive_avg_pool3d",
    "_log_softmax": "log_softmax",
    "_softmax": "softmax",
    "_to_copy": "to",
    "_unsafe_view": "reshape",
    "alias": "detach",
    "detach_": "detach",
    "grid_sampler_3d": "grid_sampler",
    "lift_fresh_copy": "clone",
    "sym_size": "size",
    "view": "reshape",
    "_operator.getitem": "getitem",
    **{
        f"_operator.{name}": f"int_{name}"
        for name in ("add", "sub", "mul", "floordiv", "mod", "neg")
    },
}
"""Operators that are one of :data:`~compressor.loading.graph.functions.FUNCTIONS` in effect."""

DROPPED = ("_assert", "sym_constrain", "_operator.eq", "_operator.ge", "_operator.le")
"""Beginnings of steps that only check: shapes are checked anew here."""

COUNTED = {"_softmax": 2, "_log_softmax": 2}
"""How many arguments count; the rest says how a device would compute."""


TRANSPOSES = ("aten.t.default", "aten.permute.default")
"""What stands between a weight and the product that a linear layer was taken apart into."""


class Stuck(Exception):
    """A step that no allowed function or layer computes, or that does not run at another batch."""


def batch_of(program: Program) -> tuple[int, bool]:
    """The batch that a program was exported with, and whether it takes any other.

    Raises :class:`ValueError` where there is no common first axis.
    """
    given = program.given
    if not given or any(not one.sizes for one in given):
        raise ValueError("it has an input without a batch axis")
    sizes = {one.sizes[0] for one in given}
    if len(sizes) != 1:
        raise ValueError(f"its inputs have the batches {sorted(sizes)}")
    varies = {one.varies[0] for one in given}
    return sizes.pop(), len(varies) == 1 and None not in varies


def other_batch(program: Program) -> int:
    """A prime that divides no size in the program: where it shows up, the batch is."""
    sizes = {size for shape in program.shapes.values() for size in shape}
    return next((at for at in PRIMES if all(size % at for size in sizes if size)), PRIMES[-1])


class Rebuilding:
    """The translation of one program, step by step, run along on shapes of another batch.

    With ``regroup`` numbers that stand for sizes are written as what they do to axes; without, the
    steps stay as they were exported.
    """

    def __init__(self, program: Program, regroup: bool) -> None:
        self.program, self.regroup = program, regroup
        self.old_batch, _ = batch_of(program)
        self.batch = other_batch(program) if regroup else self.old_batch
        self.nodes: list[dict[str, Any]] = []
        self.modules: dict[str, Description] = {}
        self.parameters: dict[str, Any] = {}
        self.buffers: dict[str, Any] = {}
        self.state: dict[str, Tensor] = {}
        self.raw: dict[str, Tensor] = {}
        # Of every node what it gives at the other batch: shapes without memory, or integers.
        self.values: dict[str, Any] = {}
        # The nodes by the program's names of their values.
        self.names: dict[str, Ref] = {}
        self.owners: dict[str, Layer] = {}
        self.makers = {
            name: step for step in program.steps for name in step.outputs if name is not None
        }
        self.readers: dict[str, list[Step]] = {name: [] for name in program.weights}
        for step in program.steps:
            for name in refs([one.value for one in step.arguments.values()]):
                if name in self.readers:
                    self.readers[name].append(step)
        self.used: set[str] = set()

    def description(self) -> Description:
        """The graph; raises :class:`Stuck` naming the first step that could not be rebuilt."""
        for given in self.program.given:
            self._place(given.name)
            name = self.names[given.name].name
            sizes = (self.batch, *given.sizes[1:])
            self.values[name] = torch.empty(sizes, dtype=given.dtype, device="meta")
            self.nodes.append({"name": name, "op": "placeholder"})
        needed = self._needed()
        for step in self.program.steps:
            if step in needed:
                try:
                    with torch.no_grad(), torch.device("meta"):
                        self._take(step)
                except (Stuck, InputError):
                    raise
                except Exception as error:
                    raise Stuck(
                        f"{step.target} ({type(error).__name__}: {one_line(error, 100)})"
                    ) from None
        outputs = [self._resolved(value) for value in self.program.outputs]
        kept = [value for value in outputs if value is not None]
        result = kept[0] if len(kept) == 1 else tuple(kept)
        self.nodes.append({"name": self._fresh("output"), "op": "output", "args": [result]})
        self._sweep()
        return {
            "class": "graph",
            "modules": self.modules,
            "parameters": self.parameters,
            "buffers": self.buffers,
            "nodes": [_encoded(node) for node in self.nodes],
            "training": False,
        }

    def _needed(self) -> list[Step]:
        """Steps whose values reach an output, and those that write into a value."""
        wanted = refs(list(self.program.outputs))
        found: list[Step] = []
        for step in reversed(self.program.steps):
            given = refs([one.value for one in step.arguments.values()])
            # What it writes into may be a view of a value that is read later.
            writes = _base(step.target).endswith("_")
            checks = step.target.removeprefix("aten.").startswith(DROPPED)
            if not checks and (writes or any(name in wanted for name in step.outputs)):
                wanted |= given
                found.append(step)
        return found[::-1]

    # -- one step -----------------------------------------------------------------------------

    def _take(self, step: Step) -> None:
        base, overload = _base(step.target), step.target.rpartition(".")[2]
        arguments = {name: one for name, one in step.arguments.items() if one.value is not HERE}
        plain = {name: one.value for name, one in arguments.items()}
        if base in DROPOUTS and not plain.get("train"):
            said = {"p": plain.get("p", 0.5)}
            layer = Layer(DROPOUTS[base], said, {}, [plain["input"]])
            self._give(step, self._layer(step, layer), layer.picks)
            return
        owner = self._layer_of(base, overload, plain)
        if owner is not None and self._suits(step, owner):
            self._give(step, self._layer(step, owner), owner.picks)
            return
        if plain.get("train") is True or plain.get("training") is True:
            raise InputError(
                "it computes as in training, from its batch: export it again after model.eval()"
            )
        self._give(step, self._function(step, base, overload, arguments))

    def _layer_of(self, base: str, overload: str, plain: Mapping[str, Any]) -> Layer | None:
        if base in ("addmm", "mm"):
            return self._product(plain)
        if base not in LAYERS:
            return None
        shapes = {**self.program.shapes}
        shapes |= {name: tuple(one.tensor.shape) for name, one in self.program.weights.items()}
        return LAYERS[base](Call(plain, shapes, overload))

    def _product(self, plain: Mapping[str, Any]) -> Layer | None:
        """A linear layer that was taken apart: a product with a transposed weight."""
        given, second = plain.get("mat1", plain.get("self")), plain["mat2"]
        maker = self.makers.get(second.name)
        if maker is None or maker.target not in TRANSPOSES:
            return None
        if {"alpha", "beta"} & set(plain):
            return None
        weight, bias = maker.arguments["self"].value, plain["self"] if "mat1" in plain else None
        if weight.name not in self.program.weights:
            return None
        outputs, inputs = self.program.weights[weight.name].tensor.shape
        said = {"in_features": inputs, "out_features": outputs, "bias": bias is not None}
        tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
        return Layer("Linear", said, tensors, [given])

    def _suits(self, step: Step, layer: Layer) -> bool:
        """Whether the layer may own its weights: nobody else reads them in another way."""
        if any(name.name not in self.program.weights for name in layer.tensors.values()):
            return False
        key = self._path(step, layer)
        if key in self.owners:
            known = self.owners[key]
            return known[:3] == layer[:3]
        taken = {*self.modules, *self.parameters, *self.buffers}
        alone = all(self._alone(step, layer, one.name) for one in layer.tensors.values())
        return alone and key not in taken and len(set(layer.tensors.values())) == len(layer.tensors)

    def _alone(self, step: Step, layer: Layer, name: str) -> bool:
        """Whether every step that reads a weight reads it just as this one does."""
        for other in self.readers[name]:
            if other.target in TRANSPOSES:
                if step.target not in ("aten.addmm.default", "aten.mm.default"):
                    return False
                continue
            plain = {key: one.value for key, one in other.arguments.items()}
            overload = other.target.rpartition(".")[2]
            found = self._layer_of(_base(other.target), overload, plain)
            if found is None or found[:3] != layer[:3]:
                return False
        return True

    def _path(self, step: Step, layer: Layer) -> str:
        """What the layer is called: as its weights are."""
        if not layer.tensors:
            return self._fresh(step.name)
        own, first = next(iter(layer.tensors.items()))
        path = _clean(self.program.weights[first.name].path)
        place, _, name = path.rpartition(".")
        if name != own:
            return path.removesuffix("_weight")
        return place or layer.kind.lower()

    def _layer(self, step: Step, layer: Layer) -> Ref:
        path = self._path(step, layer)
        if path not in self.owners:
            self.owners[path] = layer
            said: Description = {"class": layer.kind, "arguments": layer.arguments}
            tensors = {
                name: self.program.weights[one.name].tensor for name, one in layer.tensors.items()
            }
            if "track_running_stats" in layer.arguments and "running_mean" in tensors:
                counted = {_clean(at): tensor for at, tensor in self.program.stored.items()}.get(
                    f"{path}.num_batches_tracked", torch.tensor(0, device="cpu")
                )
                tensors["num_batches_tracked"] = counted
            dtypes = {
                name: str(tensor.dtype).removeprefix("torch.")
                for name, tensor in tensors.items()
                if tensor.dtype not in (torch.float32, torch.int64)
            }
            said |= {"training": False, **({"dtypes": dtypes} if dtypes else {})}
            self.modules[path] = said
            self.state |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
        given = [self._resolved(value) for value in self._initial(layer)]
        module = embedded.build(self.modules[path])
        found = module(*_evaluated(given, self.values))
        name = self._fresh(step.name)
        node = {"name": name, "op": "call_module", "target": path, "args": given}
        return self._emit(node, found)

    def _initial(self, layer: Layer) -> list[Any]:
        """What a layer is called with; a recurrent one starts from zeros of itself."""
        if layer.kind not in ("LSTM", "GRU", "RNN"):
            return layer.inputs
        states = refs(layer.inputs[1])
        makers = [self.makers.get(name) for name in states]
        zero = all(maker is not None and _base(maker.target) == "zeros" for maker in makers)
        return layer.inputs[:1] if zero else layer.inputs

    def _function(
        self, step: Step, base: str, overload: str, arguments: Mapping[str, Argument]
    ) -> Ref:
        name = RENAMED.get(base if step.target.startswith("aten.") else step.target, base)
        if name not in FUNCTIONS or not step.target.startswith(("aten.", "_operator.")):
            raise Stuck(step.target)
        if overload == "dtype" and base == "view":
            raise Stuck(step.target)
        plain = {key: one.value for key, one in arguments.items()}
        if name == "to":
            args = [self._resolved(next(iter(plain.values()))), plain.get("dtype")]
            return self._call(step.name, name, args)
        plain.pop("pin_memory", None)
        plain.pop("memory_format", None)
        positional = [
            self._resolved(value) for key, value in plain.items() if not arguments[key].named
        ]
        named = {key: self._resolved(value) for key, value in plain.items() if arguments[key].named}
        positional = positional[: COUNTED.get(base, len(positional))]
        if self.regroup and name in ("reshape", "unflatten", "expand"):
            return self._grouped(step, name, positional)
        return self._call(step.name, name, positional, named)

    def _call(
        self, wish: str, target: str, args: list[Any], kwargs: Mapping[str, Any] | None = None
    ) -> Ref:
        named = dict(kwargs or {})
        found = FUNCTIONS[target](
            *_evaluated(args, self.values),
            **{key: _evaluated(value, self.values) for key, value in named.items()},
        )
        name = self._fresh(wish)
        node = {"name": name, "op": "call_function", "target": target, "args": args}
        return self._emit(node | ({"kwargs": named} if named else {}), found)

    def _emit(self, node: dict[str, Any], value: Any) -> Ref:
        self.nodes.append(node)
        self.used.add(node["name"])
        self.values[node["name"]] = value
        return Ref(node["name"])

    def _give(self, step: Step, found: Ref, picks: tuple[tuple[int, ...], ...] = ()) -> None:
        """Names what a step gave, or the parts of it."""
        outputs = step.outputs
        for at, name in enumerate(outputs):
            if name is None:
                continue
            if picks:
                way = picks[at] if at < len(picks) else None
            else:
                way = (at,) if step.several else ()
            if way is None:
                continue  # statistics that a layer keeps to itself
            part = found
            for index in way:
                part = self._call(name, "getitem", [part, index])
            self.names[name] = part

    # -- shapes -------------------------------------------------------------------------------

    def _grouped(self, step: Step, name: str, args: list[Any]) -> Ref:
        given, sizes = args[0], args[1]
        source = step.arguments["self"].value.name
        old = self.program.shapes.get(source) or tuple(self.program.weights[source].tensor.shape)
        made = next(each for each in step.outputs if each)
        new = self.program.shapes[made]
        if name == "expand":
            return self._call(step.name, name, [given, self._expanded(old, sizes)])
        varying = self.program.varying.get(made, ())
        found = self._regrouped(step.name, name, given, old, new, varying)
        return self._call(step.name, name, args) if found is None else found

    def _expanded(self, old: Shape, sizes: list[Any]) -> list[Any]:
        added = len(sizes) - len(old)
        wide = [
            -1 if at >= added and size == old[at - added] and type(size) is int else size
            for at, size in enumerate(sizes)
        ]
        lone = not added and old[0] == 1 and sizes[0] in (self.old_batch, -1)
        if lone and type(sizes[0]) is int and sizes[0] == self.old_batch:
            wide[0] = self._now()
        return wide

    def _now(self) -> Ref:
        """The batch that the model is called with."""
        return self._call("batch", "size", [self.names[self.program.given[0].name], 0])

    def _regrouped(
        self,
        wish: str,
        target: str,
        given: Ref,
        old: Shape,
        new: Shape,
        varying: tuple[int, ...],
    ) -> Ref | None:
        """A reshape as splits and merges of axes; ``None`` where it is not made of them."""
        here = tuple(self.values[given.name].shape)
        changed = [at for at, size in enumerate(old) if here[at] != size]
        there: Shape | None = new
        if changed:
            axis = _batch_axis(old, changed[0], new, self.old_batch, varying)
            there = None
            if axis is not None and len(changed) == 1:
                there = (
                    *new[:axis],
                    new[axis] // self.old_batch * self.batch,
                    *new[axis + 1 :],
                )
        if there is None or math.prod(here) != math.prod(there) or not math.prod(here):
            return None
        ends = sorted({*accumulate(here, operator.mul), *accumulate(there, operator.mul), 1})
        if any(large % small for small, large in pairwise(ends)):
            return None
        found, shape = given, list(here)
        lone = [at for at, size in enumerate(shape) if size == 1]
        if here == there:
            return given
        if lone:
            found = self._call(wish, "squeeze", [found, lone])
            shape = [size for size in shape if size != 1]
        # From the last axis on, so that the numbers of those before it stay.
        starts = [1, *accumulate(shape, operator.mul)]
        for at in reversed(range(len(shape))):
            inside = [end for end in ends if starts[at] <= end <= starts[at + 1]]
            parts = [large // small for small, large in pairwise(inside)]
            if len(parts) > 1:
                free = self._free(parts, at, shape, target)
                split: list[Any] = [-1 if k == free else part for k, part in enumerate(parts)]
                if free == 0 and parts[0] == self.batch and len(parts) == 2:
                    # Heads lie beside the batch here, and may become fewer.
                    split = [self._now(), -1]
                found = self._call(wish, "unflatten", [found, at, split])
                shape[at : at + 1] = parts
        wide = [size for size in there if size != 1]
        starts = [1, *accumulate(shape, operator.mul)]
        stops = [1, *accumulate(wide, operator.mul)]
        for at in reversed(range(len(wide))):
            first, last = starts.index(stops[at]), starts.index(stops[at + 1]) - 1
            if last > first:
                found = self._call(wish, "flatten", [found, first, last])
        for at, size in enumerate(there):
            if size == 1:
                found = self._call(wish, "unsqueeze", [found, at])
        return found

    def _free(self, parts: list[int], axis: int, shape: list[int], target: str) -> int:
        """Which part of an axis that is split has the size that is left."""
        varies = [k for k, part in enumerate(parts) if part % self.batch == 0]
        if varies:
            return varies[0]
        # Groups of channels get narrower; of an attention layer heads go, of a picture channels.
        if axis < len(shape) - 1 or target == "unflatten":
            return len(parts) - 1
        return len(parts) - 2 if len(shape) > 2 else 0

    # -- names --------------------------------------------------------------------------------

    def _resolved(self, value: Any) -> Any:
        """The program's names of values as nodes; weights are read when they are first named."""
        if isinstance(value, Ref):
            if value.name in self.program.weights and value.name not in self.names:
                self._read(value.name)
            if value.name not in self.names:
                raise Stuck(f"a step that reads {value.name!r:.60}")
            return self.names[value.name]
        if isinstance(value, list | tuple):
            return type(value)(self._resolved(each) for each in value)
        return value

    def _read(self, name: str) -> None:
        weight = self.program.weights[name]
        path = _clean(weight.path)
        if path in self.modules or any(one.startswith(f"{path}.") for one in self.modules):
            path = self._fresh(path.replace(".", "_"))
        said = {
            "shape": list(weight.tensor.shape),
            "dtype": str(weight.tensor.dtype).removeprefix("torch."),
        }
        (self.parameters if weight.parameter else self.buffers)[path] = said
        self.raw[path] = weight.tensor
        self._place(name)
        own = self.names[name].name
        # A weight may be named late, inside what was made on the way: it is read at the start.
        self.nodes.insert(0, {"name": own, "op": "get_attr", "target": path})
        self.values[own] = torch.empty_like(weight.tensor, device="meta")

    def _place(self, name: str) -> None:
        self.names[name] = Ref(self._fresh(name))
        self.used.add(self.names[name].name)

    def _fresh(self, wish: str) -> str:
        """A name for a node that no other has."""
        name = re.sub(r"\W", "_", wish)[:100]
        if not NAME.fullmatch(name):
            name = f"v_{name}"
        found, count = name, 0
        while found in self.used or found in self.modules:
            count += 1
            found = f"{name}_{count}"
        return found

    def _sweep(self) -> None:
        """Drops nodes and weights that the rewriting left without a reader."""
        read: set[str] = set()
        kept = []
        for node in reversed(self.nodes):
            writes = node.get("target", "").endswith("_") and node["op"] == "call_function"
            if node["op"] in ("output", "placeholder") or writes or node["name"] in read:
                read |= set(refs([*node.get("args", ()), *node.get("kwargs", {}).values()]))
                kept.append(node)
        self.nodes = kept[::-1]
        targets = {node.get("target") for node in self.nodes if node["op"] == "get_attr"}
        for own in (self.parameters, self.buffers):
            for path in [path for path in own if path not in targets]:
                del own[path], self.raw[path]
        self.state |= self.raw


def _base(target: str) -> str:
    """``add`` of ``aten.add.Tensor``."""
    parts = target.split(".")
    return parts[1] if parts[0] == "aten" and len(parts) > 1 else target


def _clean(path: str) -> str:
    return ".".join(re.sub(r"\W", "_", part) or "_" for part in path.split("."))


def _evaluated(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, Ref):
        return values[value.name]
    if isinstance(value, list | tuple):
        return type(value)(_evaluated(each, values) for each in value)
    return value


def _encoded(node: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(node)
    if "args" in node:
        found["args"] = [_plain(value) for value in node["args"]]
    if "kwargs" in node:
        found["kwargs"] = {key: _plain(value) for key, value in node["kwargs"].items()}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": next(name for name, dtype in DTYPES.items() if dtype is value)}
    if isinstance(value, tuple):
        return {"tuple": [_plain(each) for each in value]}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value


def _batch_axis(
    old: Shape, axis: int, new: Shape, batch: int, varying: tuple[int, ...]
) -> int | None:
    """Which axis of a reshape to ``new`` holds the batch that ``axis`` of ``old`` holds.

    An export for any batch says it. One for a fixed batch does not: then it is what the reshapes of
    attention layers mean, and the model is compared with the export later.
    """
    able = [at for at, size in enumerate(new) if size % batch == 0]
    if varying:
        return next((at for at in varying if at in able), None)
    starts = [1, *accumulate(new, operator.mul)]
    ahead = math.prod(old[:axis])
    inside = [at for at in able if ahead <= starts[at] and starts[at + 1] <= ahead * old[axis]]
    alone = [at for at in inside if new[at] == batch]
    if alone:
        return alone[0]
    begins = [at for at in able if starts[at] == ahead and new[at] > 1]
    around = [at for at in able if starts[at] < ahead and starts[at + 1] >= ahead * batch]
    following = next((size for size in old[axis + 1 :] if size > 1), 1)
    split = bool(begins) and new[begins[0]] < batch * following
    found = begins if batch > 1 or split or not around else around
    return next(iter(found or around), None)
