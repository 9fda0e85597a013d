"""Runs a model on calibration data and counts its activations, in memory that does not grow."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compressor.errors import StageError, one_line
from compressor.measure.environment import cores
from compressor.measure.runtime import open_session
from compressor.stages.graph import copied, write
from compressor.stages.quantize.histogram import Histogram
from compressor.task import Array

if TYPE_CHECKING:
    import onnx_ir as ir

RUN_BYTES = 32 << 20
"""What the tensors asked of one run may hold together, unless one example holds more.
EfficientNet-lite0 (60 tensors, 28 MB an example) took 11.6 ms an example and 263 MB one by one,
14.7 ms and 458 MB in threes."""

SAMPLE = 8192
"""Elements of a tensor's bulk that are counted, for each example of a run. On seven distributions
(normal to Student's t with 3 degrees of freedom; 4 x 200,000 to 64 x 50,000 elements) the range of
least squared error lost at most 0.05 dB by it; with sampled tails it lost up to 3.7 dB."""

FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")


def observed(
    model: ir.Model, names: Sequence[str], batches: Iterable[Mapping[str, Array]]
) -> Iterator[dict[str, Array]]:
    """What the tensors called ``names`` hold while onnxruntime runs ``model``, run by run.

    ``names`` are values of the main graph, its inputs included; integers and truth values are left
    out. ``batches`` map the model's inputs to arrays, examples first, and are divided so that what
    is asked of one run stays below ``RUN_BYTES``. ``model`` stays as it is.

    Raises :class:`StageError` for a name that the graph does not have, or when onnxruntime cannot
    run the model.
    """
    given = {value.name for value in model.graph.inputs}
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        path = Path(folder) / "observed.onnx"
        write(_asking(model, [name for name in names if name not in given]), path)
        try:
            session = open_session(path, threads=cores())
        except Exception as error:  # onnxruntime's own have no base of their own
            raise StageError(f"onnxruntime cannot calibrate: {one_line(error, 200)}") from error
    kinds = {value.name: value.type for value in session.get_outputs()}
    asked = [name for name in names if kinds.get(name) in FLOATS]
    size = 0
    for batch in batches:
        start, count = 0, len(next(iter(batch.values())))
        while start < count:
            feed = {name: x[start : start + max(size, 1)] for name, x in batch.items()}
            start += max(size, 1)
            try:
                found = dict(zip(asked, session.run(asked, feed), strict=True)) if asked else {}
            except Exception as error:
                raise StageError(f"onnxruntime cannot calibrate: {one_line(error, 200)}") from error
            fed = {name: feed[name] for name in names if name in given}
            found |= {name: x for name, x in fed.items() if np.issubdtype(x.dtype, np.floating)}
            # The first example runs alone and tells how many fit.
            size = size or max(1, RUN_BYTES // max(1, sum(x.nbytes for x in found.values())))
            yield found
            del found  # before the next run makes its own


def calibrate(
    model: ir.Model,
    names: Sequence[str],
    batches: Iterable[Mapping[str, Array]],
    *,
    seed: int = 0,
) -> dict[str, Histogram]:
    """A histogram of each of the tensors that :func:`observed` gives, by name.

    Smallest and largest value and the tails are those of all elements. From the bulk of a large
    tensor ``SAMPLE`` elements an example are counted: one from each of so many equal parts, at a
    place drawn from ``seed``.

    Raises :class:`StageError` when there is no example, and for NaN or infinity.
    """
    rng = np.random.default_rng(seed)
    histograms: dict[str, Histogram] = {}
    strides: dict[str, float] = {}
    ran = False
    for found in observed(model, names, batches):
        ran = True
        for name in list(found):
            values = found.pop(name)  # gone before the next run makes its own
            if name not in histograms:
                # One example, counted whole: it tells where the tails are.
                histograms[name], at = Histogram(name), None
                strides[name] = max(1.0, values.size / SAMPLE)
            else:
                at = _places(values.size, strides[name], rng)
            histograms[name].add(values, at)
    if not ran:
        raise StageError("there are no examples to calibrate with")
    return histograms


def _places(size: int, stride: float, rng: np.random.Generator) -> NDArray[np.int64] | None:
    """Positions below ``size``, one in each of equal parts ``stride`` long; ``None`` for all."""
    if stride == 1:
        return None
    count = math.ceil(size / stride)
    at = (np.arange(count) + rng.random(count)) * (size / count)
    return np.minimum(at.astype(np.int64), size - 1)


def _asking(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of ``model`` that gives ``names`` as outputs too."""
    copy = copied(model)
    values = {value.name: value for node in copy.graph for value in node.outputs}
    for name in names:
        if name not in values:
            raise StageError(f"the graph has no tensor {name}")
        if not values[name].is_graph_output():
            copy.graph.outputs.append(values[name])
    return copy
