"""A program that ``torch.export.save`` wrote, parsed from its JSON; see PyTorch's own
``torch/_export/serde/schema.py`` (schema version 8)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.loading.graph.archive import BUDGET, Archive, flat, strided
from compressor.loading.graph.functions import Ref

VERSION = 8

SCALARS: dict[int, torch.dtype] = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}

EAGER = "export it again after model.eval()"
SAVE = "export it again with torch.export.save"

AS_IT_IS = "--trust-pickle to quantize and measure it as it is"

HERE: Any = object()
"""Stands for a device, a layout or an order in memory: everything computes here, as it lies."""


class Argument(NamedTuple):
    """An argument of a step; ``named`` is one that only goes by its name."""

    value: Any
    named: bool


class Step(NamedTuple):
    """One call: of ``target``, an operator such as ``aten.add.Tensor``.

    ``outputs`` are the names of what it gives, ``None`` for what nobody reads; it gives one value
    where there is one name alone, and a tuple or list of them where ``several``.
    """

    target: str
    name: str
    arguments: dict[str, Argument]
    outputs: tuple[str | None, ...]
    several: bool


class Weight(NamedTuple):
    """A parameter or buffer of the model, by its path there."""

    path: str
    parameter: bool
    tensor: Tensor


class Given(NamedTuple):
    """An input: ``sizes`` as they were at export, and which of them may vary."""

    name: str
    sizes: tuple[int, ...]
    varies: tuple[str | None, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Program:
    """What an archive holds: names of values to weights, shapes as they were at export."""

    given: tuple[Given, ...]
    weights: Mapping[str, Weight]
    stored: Mapping[str, Tensor]
    """All tensors by their paths, those that no step reads too: the batches that a normalisation
    counted."""
    steps: tuple[Step, ...]
    outputs: tuple[Any, ...]
    shapes: Mapping[str, tuple[int, ...]]
    varying: Mapping[str, tuple[int, ...]]
    """Which axes of a value vary, of those that have any."""


def program(archive: Archive) -> Program:
    """The program in ``archive``, without reading any pickle in it.

    Raises :class:`InputError`, :class:`ValueError` and their like for what is no program, or one
    that does more than compute outputs from inputs.
    """
    models = [name for name in archive.entries if name.startswith("models/")]
    if len(models) != 1 or not models[0].endswith(".json"):
        raise InputError(f"{archive.path} holds {len(models)} exported models, not one: {SAVE}")
    model = models[0].removeprefix("models/").removesuffix(".json")
    said = archive.json(models[0])
    version = said["schema_version"]["major"]
    if version != VERSION:
        raise InputError(
            f"{archive.path} has version {version!r:.20} of PyTorch's form; this release reads "
            f"{VERSION}: {SAVE} of PyTorch 2.10 or later"
        )
    graph, signature = said["graph_module"]["graph"], said["graph_module"]["signature"]
    shapes = {
        name: tuple(_size(size)[0] for size in meta["sizes"])
        for name, meta in graph["tensor_values"].items()
    }
    varying = {
        name: tuple(at for at, size in enumerate(meta["sizes"]) if _size(size)[1] is not None)
        for name, meta in graph["tensor_values"].items()
    }
    stored = {**_stored(archive, "weights", model), **_stored(archive, "constants", model)}
    _check_outputs(archive, signature)
    given, weights = _inputs(archive, graph, signature, stored)
    if sum(each.tensor.numel() * each.tensor.element_size() for each in weights.values()) > (
        BUDGET * archive.size
    ):
        raise archive.broken("its tensors are larger than the file")
    return Program(
        given,
        weights,
        stored,
        tuple(_step(archive, entry) for entry in graph["nodes"]),
        tuple(_argument(archive, one["user_output"]["arg"]) for one in signature["output_specs"]),
        shapes,
        {name: axes for name, axes in varying.items() if axes},
    )


def _check_outputs(archive: Archive, signature: Any) -> None:
    kinds = {next(iter(spec)) for spec in signature["output_specs"]}
    if "buffer_mutation" in kinds:
        raise InputError(f"{archive.path} changes its buffers when it runs: {EAGER}")
    if kinds != {"user_output"}:
        raise InputError(
            f"{archive.path} does more than give outputs ({', '.join(sorted(kinds))}): export the "
            "model for inference"
        )


def _inputs(
    archive: Archive, graph: Any, signature: Any, stored: Mapping[str, Tensor]
) -> tuple[tuple[Given, ...], dict[str, Weight]]:
    given, weights = [], {}
    for spec in signature["input_specs"]:
        ((kind, one),) = spec.items()
        if kind == "user_input":
            if "as_tensor" not in one["arg"]:
                continue  # a plain value: it is fixed in the graph
            name = one["arg"]["as_tensor"]["name"]
            meta = graph["tensor_values"][name]
            sizes, varies = (
                zip(*map(_size, meta["sizes"]), strict=True) if meta["sizes"] else ((), ())
            )
            given.append(Given(name, sizes, varies, SCALARS[meta["dtype"]]))
        elif kind in ("parameter", "buffer", "tensor_constant"):
            path = one[f"{kind}_name"]
            weights[one["arg"]["name"]] = Weight(path, kind == "parameter", stored[path])
        elif kind != "constant_input":
            raise InputError(
                f"{archive.path} carries a {kind.replace('_', ' ')}, which is code: export a model "
                "of tensors only"
            )
    return tuple(given), weights


def _size(said: Mapping[str, Any]) -> tuple[int, str | None]:
    """A size as it was at export, and the expression that it follows if it may vary."""
    found, expression = said.get("as_int"), None
    if found is None:
        expression = str(said["as_expr"]["expr_str"])
        found = said["as_expr"]["hint"]["as_int"]
    if type(found) is not int or not 0 <= found < 2**48:
        raise ValueError(f"a size is {found!r:.60}")
    return found, expression


def _stored(archive: Archive, kind: str, model: str) -> dict[str, Tensor]:
    listed = f"data/{kind}/{model}_{kind}_config.json"
    if listed not in archive.entries:
        raise InputError(f"{archive.path} was written by an older PyTorch: {SAVE} of 2.10 or later")
    found, raw = {}, {}
    for path, said in archive.json(listed)["config"].items():
        meta, own = said["tensor_meta"], said["path_name"]
        if said["use_pickle"] is not False or meta is None:
            raise InputError(
                f"{archive.path} pickles {path!r:.60}, which could run code: export a model of "
                "plain tensors only"
            )
        dtype = SCALARS[meta["dtype"]]
        if (own, dtype) not in raw:
            raw[own, dtype] = flat(archive.read(f"data/{kind}/{own}"), dtype)
        sizes, strides = ([_size(size)[0] for size in meta[each]] for each in ("sizes", "strides"))
        offset, _ = _size(meta["storage_offset"])
        found[path] = strided(raw[own, dtype], offset, sizes, strides)
    return found


def _step(archive: Archive, said: Mapping[str, Any]) -> Step:
    outputs = list(_names(said["outputs"]))
    target = str(said["target"]).removeprefix("torch.ops.")
    several = len(said["outputs"]) != 1 or "as_tensors" in said["outputs"][0]
    return Step(
        target,
        str(said.get("name") or next((each for each in outputs if each), "step")),
        {
            each["name"]: Argument(_argument(archive, each["arg"]), each.get("kind") == 2)
            for each in said["inputs"]
        },
        tuple(outputs),
        several,
    )


def _names(outputs: Any) -> Iterator[str | None]:
    for one in outputs:
        ((kind, value),) = one.items()
        if kind == "as_tensor":
            yield value["name"] or None
        elif kind == "as_tensors":
            yield from (each["name"] or None for each in value)
        elif kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            yield value["as_name"]
        elif kind == "as_none":
            yield None
        else:
            raise ValueError(f"a step gives {kind}")


def _argument(archive: Archive, said: Mapping[str, Any]) -> Any:
    ((kind, value),) = said.items()
    match kind:
        case "as_none":
            return None
        case "as_tensor":
            return Ref(value["name"])
        case "as_tensors":
            return [Ref(each["name"]) for each in value]
        case "as_optional_tensors" | "as_sym_ints" | "as_sym_floats" | "as_sym_bools":
            return [_argument(archive, each) for each in value]
        case "as_optional_tensor" | "as_sym_int" | "as_sym_float" | "as_sym_bool":
            return _argument(archive, value)
        case "as_name":
            return Ref(value)
        case "as_float":
            return float(value)  # infinity is a string in JSON
        case "as_floats":
            return [float(each) for each in value]
        case "as_int" | "as_bool" | "as_string" | "as_ints" | "as_bools" | "as_strings":
            return value
        case "as_scalar_type":
            return SCALARS[value]
        case "as_device" | "as_layout" | "as_memory_format":
            return HERE
    raise InputError(
        f"{archive.path} has a step with {kind.removeprefix('as_').replace('_', ' ')!r:.40} in it, "
        "which cannot be rebuilt: export the model without nested graphs and objects, or, if you "
        f"trust the file, {AS_IT_IS}"
    )
