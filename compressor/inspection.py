"""What a model is before anything is done to it: its costs, what can be pruned, what hurts."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.artifact import replacing, write_text
from compressor.data import SOURCES
from compressor.errors import InputError, StageError, one_line
from compressor.glance import glance
from compressor.loading import checkpoint, embedded, formats, hub, readers, torchfile
from compressor.loading import task as tasks
from compressor.loading.opaque import Opaque
from compressor.loading.task import tensors
from compressor.loading.torchfile import state_digest
from compressor.measure.counting import macs, params
from compressor.measure.shapes import layers_of
from compressor.measure.threads import one_thread
from compressor.report import inspected, plots
from compressor.report.inspected import FEW
from compressor.report.table import plain
from compressor.stages.prune import Sound, sensitivities
from compressor.stages.prune.group import Cut, Group
from compressor.stages.prune.sensitivity import SHARES, Curve
from compressor.task import Task

Document = dict[str, Any]
Progress = Callable[[int, int, str], None]

CURVES, PLOT = "sensitivity.json", "sensitivity.png"
FORMAT = "compressor.sensitivity"

INT8: dict[str, tuple[type[nn.Module], ...]] = {
    "dynamic": (nn.Linear, nn.LSTM, nn.MultiheadAttention),
    "static": (
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.Linear,
        nn.LSTM,
        nn.MultiheadAttention,
    ),
}
"""Layers whose weights become 8-bit, by scheme: those that export to an operator which
:mod:`compressor.stages.quantize` gives 8 bits."""


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found, as plain values; ``str`` is the text for a terminal.

    ``curves`` and ``plot`` are the files that were written, if any were.
    """

    document: Document
    curves: Path | None = None
    plot: Path | None = None

    def __str__(self) -> str:
        return "\n\n".join(inspected.parts(self.document))


def inspect(
    model: str | Path | nn.Module,
    *,
    data: Any = None,
    arch: Any = None,
    attention: Literal["heads", "dimensions"] = "heads",
    sensitivity: bool = False,
    weights: str | None = None,
    trust_pickle: bool = False,
    out: str | Path | None = None,
    progress: Progress = lambda done, total, text: None,
) -> Inspection:
    """What ``model`` is, what it costs, what can be pruned in it and what would become int8.

    ``model``, ``data`` and ``arch`` are those of :func:`compressor.run`. A group counts as one that
    can be pruned when cutting half of its units passes the proof. With ``sensitivity`` the curves
    of :func:`compressor.stages.prune.sensitivities` are added, the group that hurts most first, and
    written with their plot to ``out`` (default ``reports/<name>-sensitivity``); otherwise nothing
    is written.

    A file that gives no model as it stands (ONNX, weights alone, foreign classes) is described as
    far as that goes without executing it; ``document["needs"]`` says what is missing.

    Raises :class:`InputError`, before any work where that is possible, for what cannot be read, for
    a folder that holds somebody else's curves, and for ``sensitivity`` where nothing can be cut.
    """
    if attention not in ("heads", "dimensions"):
        raise InputError(f"--attention {attention!r}: choose from heads, dimensions")
    if out is not None and not sensitivity:
        raise InputError(f"--out {out}: only --sensitivity writes files")
    steps = 3 if sensitivity else 2
    progress(0, steps, "loading")
    try:
        task = tasks(model, data=data, arch=arch, weights=weights, trusted=trust_pickle)
    except InputError as missing:
        asked = arch or weights or sensitivity
        asked = asked or ((data or trust_pickle) and not isinstance(missing, Opaque))
        seen = None if asked or isinstance(model, nn.Module) else glance(Path(model), missing)
        if seen is None:
            raise
        return Inspection(seen)
    dense = task.model()
    about = _about(model, dense, task, arch, data)
    folder = Path(out) if out is not None else Path("reports") / f"{task.name}-sensitivity"
    if sensitivity:
        _check_folder(folder, about["sha256"])
    progress(1, steps, "following channels")
    with one_thread(), torch.enable_grad():
        able, pruning = _prunable(dense, task, attention)
        document = {**about, **_costs(dense, task), **pruning}
    document["int8"] = _int8(dense, task)
    if not sensitivity:
        return Inspection(document)
    if not document["groups"]:
        why = document["failed"] or "; ".join(
            f"{row['layer']}: {row['reason']}" for row in document["left_alone"][:FEW]
        )
        raise InputError(
            f"--sensitivity: nothing in {plain(task.name)} can be cut ({why or 'no such layer'})"
        )
    progress(2, steps, "zeroing one group after the other")
    # Two groups may have one name (the heads of attention and what it puts out): order decides.
    every = zip(sensitivities(task, attention=attention), able, strict=True)
    found = [(curve, group.kind) for curve, group in every if group is not None]
    found.sort(key=lambda pair: pair[0].at_half(), reverse=True)
    document["sensitivity"] = {
        "on": "synthetic" if task.splits is None else "calibrate",
        "metric": None if task.splits is None else task.metric,
        "asked": list(SHARES),
        "curves": [_curve(curve, kind) for curve, kind in found],
    }
    return Inspection(document, *_written(folder, document))


# What it is.


def _about(
    model: str | Path | nn.Module, dense: nn.Module, task: Task, arch: Any, data: Any
) -> Document:
    factory = task.source["factory"]
    live = isinstance(model, nn.Module)
    executed = []
    if task.source["factory"].startswith(formats.PICKLED):
        asked, _ = readers.guarded("listed", Path(str(model)))
        executed += [f"{name} (--trust-pickle)" for name in asked["classes"]]
    if arch is not None:
        executed.append(f"{arch if isinstance(arch, str) else factory} (--arch)")
    if isinstance(data, str) and data.partition("?")[0].partition(":")[0] not in SOURCES:
        executed.append(f"{data} (--data)")
    return {
        "name": task.name,
        "file": None if isinstance(model, nn.Module) else Path(model).name,
        "format": "live module" if live else _format(str(model), task),
        "sha256": state_digest(dense.state_dict())
        if isinstance(model, nn.Module)
        else formats.file_digest(model) or state_digest(dense.state_dict()),
        "factory": None if live else factory,
        "executes": executed,
        "kind": task.kind,
        "metric": task.metric,
        "data": task.data,
    }


def _format(model: str, task: Task) -> str:
    """The form of what was loaded before."""
    path, factory = Path(model), task.source["factory"]
    if model.partition(":")[0] in hub.PACKAGES:
        return f"{model.partition(':')[0]}, by its name"
    if path.is_dir():
        return "model folder, built by transformers"
    if path.suffix == ".pt2":
        return "exported program, rebuilt from its graph"
    if factory == embedded.FACTORY and path.suffix != torchfile.SUFFIX:
        return "pickled module of PyTorch's own layers, rebuilt"
    if factory.startswith(formats.PICKLED):
        return "pickled module, executed because it was trusted"
    if path.suffix == torchfile.SUFFIX:
        found = torchfile.header(path)
        if found is None:
            return "safetensors, weights only"
        edits = len(found["edits"]) + len(found["source"].get("edits", ()))
        return f"safetensors of compressor, {edits} edits"
    if checkpoint.read(path).source is None:
        return "PyTorch checkpoint, weights only"
    return "PyTorch file that describes itself"


def _costs(dense: nn.Module, task: Task) -> Document:
    examples = task.examples(2)
    with torch.inference_mode():
        outputs = tensors(dense.eval()(*map(torch.from_numpy, examples)))
    return {
        "params": params(dense),
        "macs": macs(dense, task.examples(1)),
        "state_bytes": sum(tensor.nbytes for tensor in dense.state_dict().values()),
        "inputs": [
            {"name": each.name, "shape": ["batch", *each.shape], "dtype": each.dtype}
            for each in task.inputs
        ],
        "outputs": [
            {"shape": _shape(output), "dtype": str(output.dtype).removeprefix("torch.")}
            for output in outputs
        ],
    }


def _shape(output: Tensor) -> list[str | int]:
    """The shape of an output for two examples; an axis that is not the batch stays a number."""
    sizes = list(output.shape)
    return ["batch", *sizes[1:]] if sizes[:1] == [2] else [*sizes]


# What can be pruned.


def _prunable(dense: nn.Module, task: Task, attention: str) -> tuple[list[Group | None], Document]:
    """All groups of the model, ``None`` for those that fail their proof, and what to say of it."""
    try:
        sound = Sound(dense, task, attention)
    except StageError as error:
        reason = one_line(error.__cause__ or error)
        return [], {"groups": [], "left_alone": [], "failed": reason}
    left = dict(sound.left)
    halves = [
        Cut(group, tuple(tuple(range(group.width // 2)) for _ in group.strands))
        for group in sound.groups
    ]
    proven = {id(cut.group) for cut in sound.most(halves, left).cuts}
    able = [group if id(group) in proven else None for group in sound.groups]
    named = dict(dense.named_modules())
    share = _Shares(sound.model, task)
    return able, {
        "groups": [
            {
                "layer": group.root,
                "kind": group.kind,
                "units": group.width,
                "channels_per_unit": group.each,
                "layers": sorted({_given(layer, named) for layer in group.layers}),
                "params_share": share.params(group),
                "macs_share": share.macs(group),
            }
            for group in able
            if group is not None
        ],
        "left_alone": [{"layer": layer, "reason": reason} for layer, reason in left.items()],
        "failed": None,
    }


def _given(layer: str, named: Mapping[str, nn.Module]) -> str:
    """The layer, or the one of the model as given that was rewritten to contain it."""
    while layer not in named:
        layer = layer.rpartition(".")[0]
    return layer


class _Shares:
    """Which part of a model is there for one group's channels.

    Weights between two groups count for both. Products without weights (attention's scores) are in
    the model's MACs but in no group's.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        self._tensors = dict(model.named_parameters())
        self._total = params(model), max(1, macs(model, task.examples(1)))
        self._macs = {
            name: sum(layer.macs() for layer in layers)
            for name, layers in layers_of(model, task.examples(1)).items()
        }

    def params(self, group: Group) -> float:
        """Of all parameters, those that go when all units of ``group`` do."""
        return sum(self._gone(group).values()) / self._total[0]

    def macs(self, group: Group) -> float:
        """The same of all multiply-accumulates: a layer's are shared out evenly to its weights."""
        gone: Counter[str] = Counter()
        for name, elements in self._gone(group).items():
            if self._tensors[name].ndim > 1:
                gone[name.rpartition(".")[0]] += elements
        spent = 0.0
        for layer, elements in gone.items():
            held = sum(
                tensor.numel()
                for name, tensor in self._tensors.items()
                if name.rpartition(".")[0] == layer and tensor.ndim > 1
            )
            spent += self._macs.get(layer, 0) * elements / held
        return spent / self._total[1]

    def _gone(self, group: Group) -> dict[str, int]:
        """Elements of each parameter that belong to any unit of ``group``."""
        positions: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        for strand in group.strands:
            for unit in strand:
                for part in unit:
                    if part.parameter in self._tensors:
                        positions[part.parameter][part.dim].update(part.at)
        found = {}
        for name, dims in positions.items():
            shape = self._tensors[name].shape
            left = math.prod(each - len(dims.get(dim, ())) for dim, each in enumerate(shape))
            found[name] = math.prod(shape) - left
        return found


def _int8(dense: nn.Module, task: Task) -> dict[str, list[str]]:
    """By scheme the layers that it makes 8-bit; ``float`` are the heavy ones that none does."""
    called = {name: dense.get_submodule(name) for name in layers_of(dense, task.examples(1))}
    found = {
        scheme: [name for name, layer in called.items() if isinstance(layer, kinds)]
        for scheme, kinds in INT8.items()
    }
    touched = {name for names in found.values() for name in names}
    return {**found, "float": [name for name in called if name not in touched]}


# What hurts.


def _curve(curve: Curve, kind: str) -> Document:
    def finite(values: Sequence[float]) -> list[float | None]:
        return [value if math.isfinite(value) else None for value in values]

    return {
        "layer": curve.root,
        "kind": kind,
        "shares": list(curve.shares),
        "loss": finite(curve.loss),
        "metric": finite(curve.metric),
    }


def _check_folder(folder: Path, sha256: str) -> None:
    """Raises :class:`InputError` where a file of ours would replace one that is not."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: name a folder")
    there = [name for name in (CURVES, PLOT) if (folder / name).exists()]
    if not there:
        return
    try:
        said = json.loads((folder / CURVES).read_text(encoding="utf-8"))
        ours = said["format"] == FORMAT and said["sha256"] == sha256
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise InputError(
            f"--out {folder} holds a {there[0]} that is not of this model: name another folder"
        )


def _written(folder: Path, document: Document) -> tuple[Path, Path]:
    said = {
        "format": FORMAT,
        **{key: document[key] for key in ("name", "file", "sha256", "data", "sensitivity")},
    }
    curves, plot = folder / CURVES, folder / PLOT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(curves, json.dumps(said, indent=1) + "\n")
        with replacing(plot) as beside:
            beside.write_bytes(plots.sensitivity(said))
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written: {error.strerror}") from None
    return curves, plot
