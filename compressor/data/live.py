"""Live objects (arrays, tensors, datasets, loaders) become the four splits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np

from compressor.data.demand import OnDemand
from compressor.data.splitting import completed
from compressor.errors import InputError, one_line
from compressor.task import KINDS, UNLABELLED, Array, Batch, Inputs, Kind, Split, Splits

STREAM_AT_MOST = 2 << 30
"""Bytes of an iterable that are held in memory."""

NAMES = {
    "train": "train",
    "validate": "validate",
    "valid": "validate",
    "val": "validate",
    "calibrate": "calibrate",
    "test": "test",
}
"""What a part may be called, and what it is called here."""

PARTS = {
    **NAMES,
    "training": "train",
    "validation": "validate",
    "dev": "validate",
    "testing": "test",
}
"""The same, and what others call the folders and files of parts."""

BARE = "unlabelled"
"""The part whose examples have no label; they end up in ``train``."""

LEARNT = ("train", "calibrate")
"""The splits that may hold examples without a label."""

FORMS = "(x, y) arrays, (train, test), a dict of train, validate, ... test, Dataset or DataLoader"

Part = tuple[Split, Array | None]
"""A split, and its targets where they are class labels in memory (to stratify by)."""

Halves = Callable[[Any], tuple[Any, Any]]
"""Takes an example or a batch apart: its inputs, and its target, ``None`` where it has no label."""


@dataclass(frozen=True)
class Data:
    """What a user hands in, as splits.

    ``name`` is the spec as given, for example ``"digits?size=16"``. ``kind`` is ``None`` where
    nobody said it: the model's outputs tell. ``outputs`` is the width that a model of this data
    gives (classes, 1 for binary, the width of regression targets), ``None`` where unknown.

    ``train`` and ``calibrate`` may hold examples without a label: their target is
    :data:`UNLABELLED`, NaN where targets are floats. ``labelled`` is false where no example of any
    split has one; all targets are then :data:`UNLABELLED`, int64, shape ``(n,)``.
    """

    name: str
    splits: Splits
    kind: Kind | None = None
    outputs: int | None = None
    labelled: bool = True
    columns: tuple[str, ...] = ()


def adopt(given: object, seed: int = 0, name: str = "live") -> Data:
    """The splits of a live object; parts that it lacks are carved out of its training part.

    ``given`` is one of

    - ``(x, y)``: arrays or tensors, shapes ``(n, ...)``; ``x`` may be a tuple of several inputs.
      What is memory-mapped (``np.memmap``) is read when it is asked for;
    - a map-style ``Dataset`` (length and ``[index]``, a list of examples too) of ``(x, y)``
      examples, or a ``DataLoader``, which gives its dataset, its sampler's choice and its
      ``collate_fn``. Examples are read when they are asked for, those of a plain ``TensorDataset``
      are taken as arrays;
    - any other iterable of ``(x, y)`` batches: read once, at most 2 GiB;
    - ``(train, test)``, each one of the above;
    - a dict of ``train``, ``validate``, ``calibrate``, ``test``, each one of the above or a
      :class:`Split`, and optionally ``kind``. ``unlabelled`` holds further examples for ``train``
      that have no label: arrays or a data set of inputs alone, joined to it after the cuts;
    - a dict of ``x`` alone, inputs without any label, and optionally ``kind``;
    - :class:`Splits` or :class:`Data`, which pass through.

    Where an example has more than two parts the last one is the target. Inputs keep their dtype,
    but float64 becomes float32; targets become int64 (bool, integers) or float32.

    Raises :class:`InputError` for anything else and, naming the split, for fewer than two
    examples, lengths that differ, values that are no numbers, NaN, infinity and negative class
    labels. Examples that are read on demand are checked as they are read.
    """
    if isinstance(given, Data):
        # Only data that passed through here before can hold examples without a label.
        checked(given.splits, bare=LEARNT if given.labelled else tuple(given.splits.sizes()))
        return given
    if isinstance(given, Splits):
        return Data(name, checked(given))
    kind, bare = None, None
    if isinstance(given, Mapping) and "x" in given and set(given) <= {"x", "kind"}:
        kind = _kind(given.get("kind"))
        splits = completed(_read(given["x"], "train", _alone)[0], seed)
        return Data(name, checked(splits, bare=tuple(splits.sizes())), kind, labelled=False)
    if isinstance(given, Mapping):
        named = _named(given)
        kind = _kind(given.get("kind"))
    elif isinstance(given, tuple | list) and len(given) == 2 and not _is_pair(given):
        named = {"train": given[0], "test": given[1]}
    else:
        named = {"train": given}
    if BARE in named:
        bare, _ = _read(named.pop(BARE), BARE, _alone)
        if not len(bare):
            raise InputError(f"split {BARE}: it is empty: leave it out")
    parts = {part: _read(value, part, _halves) for part, value in named.items()}
    train, labels = parts.pop("train")
    others = {part: split for part, (split, _) in parts.items()}
    # What the user gave is looked at before examples without a label stand among it.
    splits = checked(completed(train, seed, labels=labels, **others))
    if bare is not None:
        splits = completed(train, seed, labels=labels, **others, unlabelled=bare)
    return Data(name, splits, kind)


def checked(splits: Splits, *, bare: Sequence[str] = ()) -> Splits:
    """The splits, after their sizes and the first batch of each were looked at.

    Those named in ``bare`` may hold examples without a label. Raises :class:`InputError` naming the
    split.
    """
    for name, count in splits.sizes().items():
        with _naming(name):
            if count < 2:
                seen = "it is empty" if count == 0 else "it has 1 example"
                raise InputError(f"{seen}; at least 2 are needed: give more data")
            inputs, targets = getattr(splits, name).head(8)
            if name in bare:
                targets = _array(targets)
                none = np.isnan(targets) if targets.dtype.kind == "f" else targets == UNLABELLED
                targets = np.where(none, 0, targets)
            _batch(inputs, targets)
    return splits


def _named(given: Mapping[Any, object]) -> dict[str, object]:
    """The parts of a dict under their own names."""
    parts: dict[str, object] = {}
    for key, value in given.items():
        if key == "kind":
            continue
        if key == BARE:
            parts[BARE] = value
            continue
        if key not in NAMES:
            raise InputError(f"unknown part {key!r}; known: {', '.join(NAMES)}, {BARE}, kind")
        if NAMES[key] in parts:
            raise InputError(f"the part {NAMES[key]!r} stands twice: remove {key!r}")
        parts[NAMES[key]] = value
    if "train" not in parts:
        raise InputError(f"there is no part 'train', only {list(given)}: add it")
    return parts


def _kind(given: object) -> Kind | None:
    if given is None:
        return None
    for kind in KINDS:
        if kind == given:
            return kind
    raise InputError(f"kind {given!r} is unknown; choose from {', '.join(KINDS)}")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes one :class:`InputError` that names the split."""
    try:
        yield
    except InputError as error:
        # A part that was carved out has its errors named by the part that was handed in.
        told = str(error) if str(error).startswith("split ") else f"split {name}: {error}"
        raise InputError(told) from error.__cause__
    except Exception as error:  # the user's datasets may raise anything
        raise InputError(
            f"split {name} cannot be read: {type(error).__name__}: {one_line(error)}"
        ) from error


def _read(given: object, name: str, halves: Halves) -> Part:
    """One part of the data, whose errors name it, now and whenever it is read."""
    with _naming(name):
        split, labels = _part(given, halves)

    def fetch(at: Array) -> Batch:
        with _naming(name):
            return split.fetch(at)

    if isinstance(split.fetch, OnDemand):
        return replace(split, fetch=replace(split.fetch, read=fetch)), labels
    return replace(split, fetch=fetch), labels


def _part(given: object, halves: Halves) -> Part:
    """One part of the data, whatever it was given as."""
    # An object of torch can only be here when torch has been imported.
    torch_data = sys.modules.get("torch.utils.data")
    if isinstance(given, Split):
        return given, None
    if halves is _alone and (_is_array(given) or _is_arrays(given)):
        return _arrays(given, None)
    if halves is not _alone and _is_pair(given):
        return _arrays(given[0], given[1])
    if torch_data and isinstance(given, torch_data.DataLoader):
        return _loader(given, torch_data, halves)
    if torch_data and isinstance(given, torch_data.IterableDataset):
        return _stream(torch_data.DataLoader(given, batch_size=64), halves)
    if not isinstance(given, tuple | str | bytes | Mapping) and not _is_array(given):
        if hasattr(given, "__len__") and hasattr(given, "__getitem__"):
            return _dataset(given, torch_data, halves)
        if isinstance(given, Iterable):
            return _stream(given, halves)
    forms = FORMS if halves is not _alone else "an array or a Dataset of inputs alone"
    raise InputError(f"this {type(given).__name__} is no data; give {forms}")


def _is_array(given: object) -> TypeGuard[Any]:
    """A NumPy array, a tensor, a table column: anything that calls itself an array."""
    return hasattr(given, "__array__") and getattr(given, "ndim", 0) >= 1


def _is_arrays(given: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(given, tuple | list) and bool(given) and all(map(_is_array, given))


def _is_pair(given: object) -> TypeGuard[Sequence[Any]]:
    """Whether this is ``(x, y)``, all arrays, where ``x`` may be several."""
    return (
        isinstance(given, tuple | list)
        and len(given) == 2
        and (_is_array(given[0]) or _is_arrays(given[0]))
        and _is_array(given[1])
    )


def _loader(loader: Any, torch_data: Any, halves: Halves) -> Part:
    """The dataset of a loader, without the examples that its sampler never gives."""
    dataset, batches = loader.dataset, loader.batch_sampler
    if isinstance(dataset, torch_data.IterableDataset) or batches is None:
        return _stream(loader, halves)
    plain = type(batches) is torch_data.BatchSampler
    all_of_it = (torch_data.SequentialSampler, torch_data.RandomSampler)
    if not plain or type(batches.sampler) not in all_of_it:
        # Train and test loaders over one dataset differ in nothing but their samplers.
        given = batches.sampler if plain else (at for batch in batches for at in batch)
        dataset = torch_data.Subset(dataset, sorted({int(at) for at in given}))
    if loader.collate_fn is torch_data.default_collate:
        return _dataset(dataset, torch_data, halves)
    return _on_demand(dataset, lambda examples: halves(loader.collate_fn(examples)))


def _dataset(dataset: Any, torch_data: Any, halves: Halves) -> Part:
    """A map-style dataset; subsets of a plain ``TensorDataset`` are arrays at once."""
    positions: Any = slice(None)
    inner = dataset
    while torch_data and type(inner) is torch_data.Subset:
        positions = np.asarray(inner.indices, dtype=np.intp)[positions]
        inner = inner.dataset
    if torch_data and type(inner) is torch_data.TensorDataset:
        return _in_memory(*halves(tuple(_array(part)[positions] for part in inner.tensors)))
    return _on_demand(dataset, lambda examples: _stacked(examples, halves))


def _on_demand(dataset: Any, together: Callable[[list[Any]], tuple[Any, Any]]) -> Part:
    """A split that reads its examples by index, when they are asked for."""
    split = Split(
        OnDemand(lambda at: _batch(*together([dataset[int(position)] for position in at]))),
        np.arange(len(dataset)),
    )
    return split, None


def _stream(batches: Iterable[Any], halves: Halves) -> Part:
    """All batches of an iterable, read once into memory."""
    read: list[Batch] = []
    held = 0
    for given in batches:
        inputs, targets = _batch(*halves(given))
        held += targets.nbytes + sum(part.nbytes for part in inputs)
        if held > STREAM_AT_MOST:
            raise InputError(
                f"this {type(batches).__name__} is read into memory and gives more than "
                f"{STREAM_AT_MOST:,} bytes: give a Dataset that is read by index"
            )
        read.append((inputs, targets))
    if not read:
        raise InputError(f"it is empty: the {type(batches).__name__} gave no batch")
    columns = tuple(
        np.concatenate(column) for column in zip(*(inputs for inputs, _ in read), strict=True)
    )
    whole = None if halves is _alone else np.concatenate([targets for _, targets in read])
    return _in_memory(columns, whole)


def _arrays(x: Any, y: Any) -> Part:
    """Arrays in memory, or on disk where one is memory-mapped."""
    parts = (*(x if _is_arrays(x) else (x,)), y)
    mapped = any(isinstance(part, np.memmap) for part in parts)
    return _mapped(parts[:-1], y) if mapped else _in_memory(x, y)


def _in_memory(x: object, y: object) -> Part:
    inputs, targets = _batch(x, y)
    return Split.arrays(inputs, targets), _classes(targets) if y is not None else None


def _mapped(inputs: tuple[Any, ...], y: Any) -> Part:
    """Arrays on disk: of each only the rows that are asked for, checked as they are read.

    Targets of one number are the exception: all are looked at at once, since splits go by them.
    """
    count = len(inputs[0] if y is None else y)
    for at, part in enumerate(inputs):
        title = f"x{at}" if len(inputs) > 1 else "x"
        _count(part, title, count, "x0" if y is None else "y")
    known = None
    if y is None:
        known = np.full(count, UNLABELLED)
    elif y.ndim == 1:
        _, known = _batch(np.zeros(count, dtype=np.int8), y)

    def read(at: Array) -> Batch:
        told = None if y is None else (y if known is None else known)[at]
        return _batch(tuple(part[at] for part in inputs), told)

    labels = None if known is None or y is None else _classes(known)
    targets = None if known is None else known.__getitem__
    return Split(OnDemand(read, targets, parallel=True), np.arange(count)), labels


def _classes(targets: Array) -> Array | None:
    """The targets where they are class labels."""
    return targets if targets.ndim == 1 and targets.dtype == np.int64 else None


def _halves(given: Any) -> tuple[Any, Any]:
    """Inputs and target of an example or a batch; the target is the last of its parts."""
    if not isinstance(given, tuple | list) or len(given) < 2:
        raise InputError(f"an example or batch is a {type(given).__name__}; give (x, y)")
    *inputs, target = given
    return (inputs[0] if len(inputs) == 1 else inputs), target


def _alone(given: Any) -> tuple[Any, None]:
    """An example or a batch that is all inputs."""
    if isinstance(given, tuple) and len(given) == 1:
        return given[0], None
    if isinstance(given, tuple | list) and any(map(_is_array, given)) and not _is_arrays(given):
        raise InputError(
            f"an example without a label is a {type(given).__name__} of "
            f"{', '.join(type(part).__name__ for part in given)}; give its inputs alone"
        )
    return given, None


def _stacked(examples: list[Any], halves: Halves) -> tuple[Any, Array | None]:
    """Examples ``(x, y)`` as one batch of arrays with a new first axis."""
    xs, ys = zip(*map(halves, examples), strict=True)
    targets = None if halves is _alone else np.stack([_array(y) for y in ys])
    if _is_arrays(xs[0]):
        columns = zip(*xs, strict=True)
        return tuple(np.stack([_array(x) for x in column]) for column in columns), targets
    return np.stack([_array(x) for x in xs]), targets


def _batch(x: object, y: object) -> Batch:
    """Inputs and targets as checked arrays of the dtypes that :func:`adopt` promises.

    Without ``y`` no example has a label.
    """
    parts = [np.atleast_1d(_array(part)) for part in (x if _is_arrays(x) else (x,))]
    targets = np.full(len(parts[0]), UNLABELLED) if y is None else np.atleast_1d(_array(y))
    inputs: Inputs = ()
    for at, part in enumerate(parts):
        title = f"x{at}" if len(parts) > 1 else "x"
        _count(part, title, len(targets), "x0" if y is None else "y")
        inputs += (_numbers(part, title),)
    if y is None:
        return inputs, targets
    targets = _numbers(targets, "y")
    targets = targets.astype(np.float32 if targets.dtype.kind == "f" else np.int64, copy=False)
    if targets.ndim == 1 and targets.dtype == np.int64 and (targets < 0).any():
        raise InputError(
            f"y holds the class label {targets.min()}; labels start at 0: renumber them "
            "(or make regression targets floats)"
        )
    return inputs, targets


def _numbers(values: Array, title: str) -> Array:
    """Finite values; float64 becomes float32."""
    if values.dtype.kind not in "biuf":
        raise InputError(f"{title} is of dtype {values.dtype}; give numbers")
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):  # too large for float32 is infinite, and said so below
            narrow = values.astype(np.float32) if values.dtype.itemsize > 4 else values
        wrong = ~np.isfinite(narrow)
        if wrong.any():
            raise InputError(
                f"{title} holds {values[wrong][0]} ({wrong.sum()} of {values.size} values are "
                "not finite in float32): remove or replace them"
            )
        return narrow
    return values


def _count(values: Array, title: str, count: int, beside: str) -> None:
    if len(values) != count:
        remedy = "give every example " + ("one target" if beside == "y" else "every input")
        raise InputError(f"{title} has {len(values)} examples and {beside} has {count}; {remedy}")


def _array(given: Any) -> Array:
    """``given`` as an array in the machine's byte order, a tensor without its graph."""
    values = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    return values.astype(values.dtype.newbyteorder("="), copy=False)
