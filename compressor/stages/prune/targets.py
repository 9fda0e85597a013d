"""What a model costs after a cut: MACs, params, size or latency, predicted and real.

Predicted is the sum over layers of any widths: multiply-accumulates, parameters, or the
milliseconds that onnxruntime takes for a layer of that shape on the target. Real is that of the
whole model, exported and measured where it has to be.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from torch import nn

from compressor.artifact import Artifact
from compressor.errors import StageError
from compressor.loading import torchfile
from compressor.loading.edits import Edit, apply
from compressor.measure import counting
from compressor.measure.costs import Dtype, table
from compressor.measure.protocol import observe
from compressor.measure.shapes import Layer, layers_of
from compressor.measure.statistics import summary
from compressor.stages.export import export
from compressor.stages.prune.cutting import shapes_of
from compressor.stages.prune.group import Group
from compressor.stages.quantize import quantize
from compressor.task import Task

Quantity = Literal["macs", "params", "size", "latency"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

SECONDS = 1.0
"""Of timing for each try."""

Counts = tuple[int, ...]
"""Units kept, for each group."""


class Call(NamedTuple):
    """A layer as it is priced: the shapes of its calls, and its parameters."""

    shapes: tuple[Layer, ...]
    params: int


Price = Callable[[Sequence[Call]], list[float]]
"""What each layer costs; asked for many at once, since some are measured."""


class Costs:
    """What a model costs layer by layer, for any counts of units kept."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], task: Task, price: Price) -> None:
        self.groups = groups
        self._price = price
        self._layers = layers_of(model, task.examples(1))
        self._modules = dict(model.named_modules())
        self._dense = shapes_of(model)
        # A tied parameter counts where it stands first.
        self._counted = {name for name, _ in model.named_parameters()}
        # What one unit of each group takes from each axis of each tensor.
        self._each: list[dict[tuple[str, int], int]] = []
        self._owners: dict[str, list[int]] = defaultdict(list)
        for at, group in enumerate(groups):
            taken: dict[tuple[str, int], int] = defaultdict(int)
            for strand in group.strands:
                for part in strand[0]:
                    taken[part.parameter, part.dim] += len(part.at)
            self._each.append(dict(taken))
            for layer in group.layers:
                self._owners[layer].append(at)

    def shape(self, layer: str, tensor: str, counts: Counts) -> list[int]:
        """The shape of a tensor once only ``counts`` are kept."""
        name = f"{layer}.{tensor}" if layer else tensor
        shape = list(self._dense[name])
        for at in self._owners.get(layer, ()):
            for dim in range(len(shape)):
                gone = self.groups[at].width - counts[at]
                shape[dim] -= gone * self._each[at].get((name, dim), 0)
        return shape

    def layers(self, name: str, counts: Counts) -> list[Layer]:
        """The calls of a layer, resized."""
        found = self._layers.get(name, [])
        module = self._modules[name]
        if not found or name not in self._owners:
            return found
        if isinstance(module, nn.RNNBase):
            hidden = self.shape(name, "weight_hh_l0", counts)
            state = self.shape(name, "weight_ih_l0", counts)
            gates = self._dense[f"{name}.weight_hh_l0"][0] // module.hidden_size
            return [
                replace(
                    layer,
                    inputs=state[1],
                    outputs=hidden[0] // gates,
                    projection=hidden[1] if layer.projection else 0,
                )
                for layer in found
            ]
        weight = self.shape(name, "weight", counts)
        return [_resized(layer, weight) for layer in found]

    def cost(self, names: Iterable[str], counts: Sequence[Counts]) -> list[float]:
        """What these layers cost together, for each of several counts."""
        names = list(names)
        calls = [
            Call(tuple(self.layers(name, each)), self._numel(name, each))
            for each in counts
            for name in names
        ]
        prices = iter(self._price(calls))
        return [sum(next(prices) for _ in names) for _ in counts]

    def _numel(self, name: str, counts: Counts) -> int:
        return sum(
            math.prod(self.shape(name, tensor, counts))
            for tensor, _ in self._modules[name].named_parameters(recurse=False)
            if (f"{name}.{tensor}" if name else tensor) in self._counted
        )

    def whole(self, counts: Counts) -> float:
        """What the model costs."""
        return self.cost(self._modules, [counts])[0]


def _resized(layer: Layer, weight: Sequence[int]) -> Layer:
    """A convolution or linear layer with the channels of its cut weight."""
    first, second = weight[0], weight[1]
    if layer.op == "linear":
        return layer.resized(inputs=second, outputs=first)
    if layer.op == "deconv":
        groups = first if 1 < layer.groups == layer.inputs else layer.groups
        return layer.resized(inputs=first, outputs=second * groups, groups=groups)
    if 1 < layer.groups == layer.inputs:
        groups = first * layer.groups // layer.outputs
        return layer.resized(inputs=groups, outputs=first, groups=groups)
    return layer.resized(inputs=second * layer.groups, outputs=first)


@contextmanager
def price_of(quantity: Quantity, task: Task, dtype: Dtype) -> Iterator[Price]:
    """The price by which the search walks."""
    if quantity in ("params", "size"):
        yield lambda calls: [float(call.params) for call in calls]
        return
    if quantity == "macs":
        yield lambda calls: [float(sum(shape.macs() for shape in call.shapes)) for call in calls]
        return
    with table(task.target, dtype=dtype) as price:

        def milliseconds(calls: Sequence[Call]) -> list[float]:
            found = price(shape for call in calls for shape in call.shapes)
            return [sum(found[shape] for shape in call.shapes) for call in calls]

        yield milliseconds


@contextmanager
def real_of(
    quantity: Quantity, dense: nn.Module, before: Sequence[Edit], task: Task, dtype: Dtype
) -> Iterator[Callable[[Sequence[Edit]], float]]:
    """The real quantity of the model after more edits, as a fraction of what it is now.

    ``before`` are the edits that made ``dense`` from the task's model. Size is that of the ONNX
    file; latency the ratio of median times in onnxruntime on the task's target, interleaved, of the
    exported models or, for ``int8``, of their static quantizations.
    """
    if quantity in ("macs", "params"):

        def count(model: nn.Module) -> int:
            if quantity == "params":
                return counting.params(model)
            return counting.macs(model, task.examples(1))

        whole = count(dense)
        yield lambda edits: count(apply(copy.deepcopy(dense), edits)) / whole
        return
    with tempfile.TemporaryDirectory(prefix="compressor-prune-") as folder:

        def made(name: str, edits: Sequence[Edit]) -> Artifact:
            path = Path(folder) / f"{name}{torchfile.SUFFIX}"
            model = apply(copy.deepcopy(dense), edits)
            torchfile.write(path, model, task.source, [*before, *edits])
            onnx = export(Artifact.of(path, "torch"), task, Path(folder) / name)
            if dtype == "int8" and quantity == "latency":
                # The speed does not depend on how good the ranges are.
                return quantize(
                    onnx,
                    task,
                    Path(folder) / f"{name}-int8",
                    scheme="static",
                    samples=32,
                    ranges="minmax",
                    repair=(),
                    left=(),
                    disabled=(),
                    synthetic=True,
                )
            return onnx

        whole_model = made("original", ())

        def size(edits: Sequence[Edit]) -> float:
            return made("cut", edits).size_bytes / whole_model.size_bytes

        def latency(edits: Sequence[Edit]) -> float:
            cut = made("cut", edits)
            feed = task.examples(task.target.batch)
            seen = observe([whole_model, cut], task.target, feed, seconds=SECONDS, seed=task.seed)
            medians = {name: summary(blocks)["p50"] for (name, _), blocks in seen.times().items()}
            if cut.name not in medians or whole_model.name not in medians:
                raise StageError(f"latency on {task.target}: {next(iter(seen.failed.values()))}")
            return float(medians[cut.name] / medians[whole_model.name])

        yield size if quantity == "size" else latency
