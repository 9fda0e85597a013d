"""Live objects (arrays, tensors, datasets, loaders) become the four splits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np

from compressor.data.splitting import completed
from compressor.errors import InputError, one_line
from compressor.task import KINDS, Array, Batch, Inputs, Kind, Split, Splits

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

FORMS = "(x, y) arrays, (train, test), a dict of train, validate, ... test, Dataset or DataLoader"

Part = tuple[Split, Array | None]
"""A split, and its targets where they are class labels in memory (to stratify by)."""


@dataclass(frozen=True)
class Data:
    """What a user hands in, as splits.

    ``name`` is the spec as given, for example ``"digits?size=16"``. ``kind`` is ``None`` where
    nobody said it: the model's outputs tell. ``outputs`` is the width that a model of this data
    gives (classes, 1 for binary, the width of regression targets), ``None`` where unknown.
    """

    name: str
    splits: Splits
    kind: Kind | None = None
    outputs: int | None = None


def adopt(given: object, seed: int = 0, name: str = "live") -> Data:
    """The splits of a live object; parts that it lacks are carved out of its training part.

    ``given`` is one of

    - ``(x, y)``: arrays or tensors, shapes ``(n, ...)``; ``x`` may be a tuple of several inputs;
    - a map-style ``Dataset`` (length and ``[index]``, a list of examples too) of ``(x, y)``
      examples, or a ``DataLoader``, which gives its dataset, its sampler's choice and its
      ``collate_fn``. Examples are read when they are asked for, those of a plain ``TensorDataset``
      are taken as arrays;
    - any other iterable of ``(x, y)`` batches: read once, at most 2 GiB;
    - ``(train, test)``, each one of the above;
    - a dict of ``train``, ``validate``, ``calibrate``, ``test``, each one of the above or a
      :class:`Split`, and optionally ``kind``;
    - :class:`Splits` or :class:`Data`, which pass through.

    Where an example has more than two parts the last one is the target. Inputs keep their dtype,
    but float64 becomes float32; targets become int64 (bool, integers) or float32.

    Raises :class:`InputError` for anything else and, naming the split, for fewer than two
    examples, lengths that differ, values that are no numbers, NaN, infinity and negative class
    labels. Examples that are read on demand are checked as they are read.
    """
    if isinstance(given, Data):
        checked(given.splits)
        return given
    if isinstance(given, Splits):
        return Data(name, checked(given))
    kind = None
    if isinstance(given, Mapping):
        named = _named(given)
        kind = _kind(given.get("kind"))
    elif isinstance(given, tuple | list) and len(given) == 2 and not _is_pair(given):
        named = {"train": given[0], "test": given[1]}
    else:
        named = {"train": given}
    parts = {part: _read(value, part) for part, value in named.items()}
    train, labels = parts.pop("train")
    others = {part: split for part, (split, _) in parts.items()}
    return Data(name, checked(completed(train, seed, labels=labels, **others)), kind)


def checked(splits: Splits) -> Splits:
    """The splits, after their sizes and the first batch of each were looked at.

    Raises :class:`InputError` naming the split.
    """
    for name, count in splits.sizes().items():
        with _naming(name):
            if count < 2:
                seen = "it is empty" if count == 0 else "it has 1 example"
                raise InputError(f"{seen}; at least 2 are needed: give more data")
            _batch(*getattr(splits, name).head(8))
    return splits


def _named(given: Mapping[Any, object]) -> dict[str, object]:
    """The parts of a dict under their own names."""
    parts: dict[str, object] = {}
    for key, value in given.items():
        if key == "kind":
            continue
        if key not in NAMES:
            raise InputError(f"unknown part {key!r}; known: {', '.join(NAMES)}, kind")
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


def _read(given: object, name: str) -> Part:
    """One part of the data, whose errors name it, now and whenever it is read."""
    with _naming(name):
        split, labels = _part(given)

    def fetch(at: Array) -> Batch:
        with _naming(name):
            return split.fetch(at)

    return replace(split, fetch=fetch), labels


def _part(given: object) -> Part:
    """One part of the data, whatever it was given as."""
    # An object of torch can only be here when torch has been imported.
    torch_data = sys.modules.get("torch.utils.data")
    if isinstance(given, Split):
        return given, None
    if _is_pair(given):
        return _in_memory(given[0], given[1])
    if torch_data and isinstance(given, torch_data.DataLoader):
        return _loader(given, torch_data)
    if torch_data and isinstance(given, torch_data.IterableDataset):
        return _stream(torch_data.DataLoader(given, batch_size=64))
    if not isinstance(given, tuple | str | bytes | Mapping) and not _is_array(given):
        if hasattr(given, "__len__") and hasattr(given, "__getitem__"):
            return _dataset(given, torch_data)
        if isinstance(given, Iterable):
            return _stream(given)
    raise InputError(f"this {type(given).__name__} is no data; give {FORMS}")


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


def _loader(loader: Any, torch_data: Any) -> Part:
    """The dataset of a loader, without the examples that its sampler never gives."""
    dataset, batches = loader.dataset, loader.batch_sampler
    if isinstance(dataset, torch_data.IterableDataset) or batches is None:
        return _stream(loader)
    plain = type(batches) is torch_data.BatchSampler
    all_of_it = (torch_data.SequentialSampler, torch_data.RandomSampler)
    if not plain or type(batches.sampler) not in all_of_it:
        # Train and test loaders over one dataset differ in nothing but their samplers.
        given = batches.sampler if plain else (at for batch in batches for at in batch)
        dataset = torch_data.Subset(dataset, sorted({int(at) for at in given}))
    if loader.collate_fn is torch_data.default_collate:
        return _dataset(dataset, torch_data)
    return _on_demand(dataset, loader.collate_fn)


def _dataset(dataset: Any, torch_data: Any) -> Part:
    """A map-style dataset; subsets of a plain ``TensorDataset`` are arrays at once."""
    positions: Any = slice(None)
    inner = dataset
    while torch_data and type(inner) is torch_data.Subset:
        positions = np.asarray(inner.indices, dtype=np.intp)[positions]
        inner = inner.dataset
    if torch_data and type(inner) is torch_data.TensorDataset:
        return _in_memory(*_halves(tuple(_array(part)[positions] for part in inner.tensors)))
    return _on_demand(dataset, _stacked)


def _on_demand(dataset: Any, collate: Callable[[list[Any]], Any]) -> Part:
    """A split that reads its examples by index, when they are asked for."""
    split = Split(
        lambda at: _batch(*_halves(collate([dataset[int(position)] for position in at]))),
        np.arange(len(dataset)),
    )
    return split, None


def _stream(batches: Iterable[Any]) -> Part:
    """All batches of an iterable, read once into memory."""
    read: list[Batch] = []
    held = 0
    for given in batches:
        inputs, targets = _batch(*_halves(given))
        held += targets.nbytes + sum(part.nbytes for part in inputs)
        if held > STREAM_AT_MOST:
            raise InputError(
                f"this {type(batches).__name__} is read into memory and gives more than "
                f"{STREAM_AT_MOST:,} bytes: give a Dataset that is read by index"
            )
        read.append((inputs, targets))
    if not read:
        raise InputError(f"it is empty: the {type(batches).__name__} gave no batch")
    columns = zip(*(inputs for inputs, _ in read), strict=True)
    return _in_memory(
        tuple(np.concatenate(column) for column in columns),
        np.concatenate([targets for _, targets in read]),
    )


def _in_memory(x: object, y: object) -> Part:
    inputs, targets = _batch(x, y)
    labels = targets if targets.ndim == 1 and targets.dtype == np.int64 else None
    return Split.arrays(inputs, targets), labels


def _halves(given: Any) -> tuple[Any, Any]:
    """Inputs and target of an example or a batch; the target is the last of its parts."""
    if not isinstance(given, tuple | list) or len(given) < 2:
        raise InputError(f"an example or batch is a {type(given).__name__}; give (x, y)")
    *inputs, target = given
    return (inputs[0] if len(inputs) == 1 else inputs), target


def _stacked(examples: list[Any]) -> tuple[Any, Array]:
    """Examples ``(x, y)`` as one batch of arrays with a new first axis."""
    xs, ys = zip(*map(_halves, examples), strict=True)
    targets = np.stack([_array(y) for y in ys])
    if _is_arrays(xs[0]):
        columns = zip(*xs, strict=True)
        return tuple(np.stack([_array(x) for x in column]) for column in columns), targets
    return np.stack([_array(x) for x in xs]), targets


def _batch(x: object, y: object) -> Batch:
    """Inputs and targets as checked arrays of the dtypes that :func:`adopt` promises."""
    parts = x if _is_arrays(x) else (x,)
    targets = np.atleast_1d(_array(y))
    inputs: Inputs = ()
    for at, part in enumerate(parts):
        title = f"x{at}" if len(parts) > 1 else "x"
        inputs += (_examples(np.atleast_1d(_array(part)), title, len(targets)),)
    targets = _examples(targets, "y", len(targets))
    targets = targets.astype(np.float32 if targets.dtype.kind == "f" else np.int64, copy=False)
    if targets.ndim == 1 and targets.dtype == np.int64 and (targets < 0).any():
        raise InputError(
            f"y holds the class label {targets.min()}; labels start at 0: renumber them "
            "(or make regression targets floats)"
        )
    return inputs, targets


def _examples(values: Array, title: str, count: int) -> Array:
    """``count`` finite values of a shape; float64 becomes float32."""
    if values.dtype.kind not in "biuf":
        raise InputError(f"{title} is of dtype {values.dtype}; give numbers")
    if len(values) != count:
        raise InputError(
            f"{title} has {len(values)} examples and y has {count}; give every example one target"
        )
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


def _array(given: Any) -> Array:
    """``given`` as an array in the machine's byte order, a tensor without its graph."""
    values = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    return values.astype(values.dtype.newbyteorder("="), copy=False)
