"""What must be preserved: a trained model, its inputs, its data and the metric that judges it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from compressor.measurement import Target

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["classification", "binary", "multilabel", "regression", "segmentation", "custom"]
"""``custom`` has targets of any shape, a loss and a metric of the user's own."""

KINDS: tuple[Kind, ...] = get_args(Kind)

UNLABELLED = -1
"""Stands for the label of a training example that has none; NaN where targets are floats."""

Array = NDArray[Any]
Inputs = tuple[Array, ...]
Batch = tuple[Inputs, Array]


def labelled(targets: Array) -> NDArray[np.bool_]:
    """Which examples have a label, or some of several, shape ``(n,)``: see :data:`UNLABELLED`."""
    has = ~np.isnan(targets) if targets.dtype.kind == "f" else targets != UNLABELLED
    return np.asarray(has.reshape(len(targets), -1).any(axis=1))


@dataclass(frozen=True)
class Input:
    """One input of a model: ``shape`` of one example (no batch axis) and NumPy ``dtype`` name.

    Integer inputs are drawn below ``high`` where examples have to be made up.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    high: int = 2

    def synthetic(self, count: int, seed: int) -> Array:
        """``count`` made-up examples, shape ``(count, *shape)``: normal floats or uniform ints."""
        rng = np.random.default_rng(seed)
        size = (count, *self.shape)
        if np.issubdtype(np.dtype(self.dtype), np.floating):
            return rng.standard_normal(size).astype(self.dtype)
        return rng.integers(0, self.high, size).astype(self.dtype)


@dataclass(frozen=True)
class Split:
    """A part of the data. ``fetch`` turns an array of positions into one batch.

    A batch is ``((input, ...), targets)``: arrays whose first axis is the example. Data in memory
    and data that is read on demand look the same from here.
    """

    fetch: Callable[[NDArray[np.intp]], Batch]
    indices: NDArray[np.intp]

    @classmethod
    def arrays(cls, inputs: Array | Inputs, targets: Array) -> Split:
        """A split of arrays in memory, shapes ``(n, ...)``."""
        parts = inputs if isinstance(inputs, tuple) else (inputs,)
        return cls(
            lambda at: (tuple(part[at] for part in parts), targets[at]),
            np.arange(len(targets)),
        )

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, positions: NDArray[np.intp]) -> Split:
        """The examples at these positions of this split."""
        return Split(self.fetch, self.indices[positions])

    def head(self, count: int) -> Batch:
        """The first ``count`` examples as one batch."""
        return self.fetch(self.indices[:count])

    def batches(self, size: int, order: np.random.Generator | None = None) -> Iterator[Batch]:
        """All examples once, ``size`` at a time; shuffled when ``order`` is given."""
        indices = self.indices if order is None else order.permutation(self.indices)
        for start in range(0, len(indices), size):
            yield self.fetch(indices[start : start + size])

    def digest(self) -> str:
        """SHA-256 over every example of the split, in order."""
        total = hashlib.sha256()
        for inputs, targets in self.batches(1024):
            for part in (*inputs, targets):
                total.update(f"{part.dtype}{part.shape}".encode())
                total.update(np.ascontiguousarray(part).tobytes())
        return total.hexdigest()


@dataclass(frozen=True)
class Splits:
    """The four parts. All choices read ``validate`` and ``calibrate``; ``test`` judges final rows.

    ``train``, ``validate`` and ``test`` are disjoint; ``calibrate`` may be part of ``train``.
    Examples of ``train`` and ``calibrate`` may have no label.
    """

    train: Split
    validate: Split
    calibrate: Split
    test: Split

    def sizes(self) -> dict[str, int]:
        """Examples in each split."""
        return {
            "train": len(self.train),
            "validate": len(self.validate),
            "calibrate": len(self.calibrate),
            "test": len(self.test),
        }


HERE = Target()


def unseen(text: str) -> None:
    """A watch that nobody looks at."""


@dataclass(frozen=True)
class Task:
    """What must be preserved.

    ``model`` gives a fresh copy of the trained reference (also the teacher) at every call.
    ``source`` says in plain values how a file can name that model again. ``data`` is the spec that
    the splits came from; without data ``splits`` is ``None`` and nothing is trained or judged.
    ``target`` is where the model will run: stages that look at latency measure there. ``budget`` is
    the accuracy that may be lost (absolute for bounded metrics, relative for errors); ``until`` the
    time of :func:`time.monotonic` at which searches end with the best that they have.

    Without ``labelled`` examples the model's own answers stand for labels, and training examples
    have none. ``teachers`` give what is imitated, the reference where there are none; ``students``
    build other models to teach and ``functions`` are the user's own, both by the names that stand
    on the command line. ``logs`` are kept of training, ``watch`` is told how it goes, ``reads``
    stands for everything that a stage's result depends on beside its artifact and settings, and
    ``notes`` are warnings for the report.
    """

    name: str
    kind: Kind
    model: Callable[[], nn.Module]
    source: Mapping[str, Any]
    inputs: tuple[Input, ...]
    metric: str
    splits: Splits | None = None
    data: str | None = None
    seed: int = 0
    target: Target = HERE
    budget: float = 0.01
    until: float | None = None
    labelled: bool = True
    teachers: tuple[Callable[[], nn.Module], ...] = ()
    students: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    logs: tuple[str, ...] = ()
    watch: Callable[[str], None] = unseen
    reads: str = ""
    notes: tuple[str, ...] = ()

    def examples(self, count: int) -> Inputs:
        """``count`` seeded synthetic inputs, each of shape ``(count, *shape)``."""
        return tuple(
            given.synthetic(count, self.seed + position)
            for position, given in enumerate(self.inputs)
        )
