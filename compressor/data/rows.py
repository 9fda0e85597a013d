"""Rows of columns that pyarrow holds, in memory or mapped, read by their positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compressor.data.columns import Asked, arrow, reading, targets
from compressor.data.live import Data, checked
from compressor.data.splitting import completed
from compressor.errors import InputError
from compressor.task import UNLABELLED, Array, Split


class Rows:
    """Batches of pyarrow one after the other. ``path`` is where they are from."""

    def __init__(self, path: Path, batches: Sequence[Any]) -> None:
        self.path, self.batches = path, [batch for batch in batches if batch.num_rows]
        self.ends = np.cumsum([batch.num_rows for batch in self.batches], dtype=np.int64)
        self._valid: set[tuple[int, str]] = set()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def column(self, name: str) -> Any:
        """A column as a whole."""
        chunks = [self._chunk(at, name) for at in range(len(self.batches))]
        return arrow().chunked_array(chunks)

    def values(self, name: str, at: Array) -> list[Any]:
        """Python's values of a column at these positions."""
        found = []
        for place, position in zip(np.searchsorted(self.ends, at, "right"), at, strict=True):
            chunk = self._chunk(int(place), name)
            found.append(chunk[int(position - self.ends[place]) + len(chunk)].as_py())
        return found

    def _chunk(self, place: int, name: str) -> Any:
        """A column of one batch; what a file says of its own memory is not believed."""
        chunk = self.batches[place].column(name)
        if (place, name) not in self._valid:
            with reading(self.path):
                chunk.validate(full=True)
            self._valid.add((place, name))
        return chunk


def labelled(
    name: str,
    parts: Mapping[str, Rows],
    split: Callable[[Rows, Array], Split],
    target: str | None,
    kind: Asked | None,
    seed: int,
    classes: tuple[int, ...] | None = None,
) -> Data:
    """The data of ``train`` and other parts, whose targets are the column ``target``.

    ``split`` makes a part of its rows and targets; the other arguments are those of
    :func:`~compressor.data.columns.targets`. Regression targets, float32 ``(n, 1)``, are as in the
    file: a model of text or pictures was trained with them so. Without ``target`` no example has a
    label.
    """
    for part, rows in parts.items():
        if not len(rows):
            raise InputError(f"{rows.path} holds no rows for {part}: remove it, or add some")
    if target is None:
        made = {part: split(rows, np.full(len(rows), UNLABELLED)) for part, rows in parts.items()}
        bare = completed(made.pop("train"), seed, labels=None, **made)
        return Data(name, checked(bare, bare=tuple(bare.sizes())), labelled=False)
    train = parts["train"]
    told = targets(train.column(target), target, train.path, kind, classes, "classification")
    asked: Asked | None = "regression" if told.classes is None else None
    made = {}
    for part, rows in parts.items():
        found = told
        if part != "train":
            found = targets(rows.column(target), target, rows.path, asked, told.classes)
        floats = told.classes is None
        made[part] = split(rows, found.values.astype(np.float32 if floats else np.int64))
    learn, labels = made.pop("train"), None if told.classes is None else told.values
    splits = checked(completed(learn, seed, labels=labels, **made))
    return Data(name, splits, told.kind, told.outputs)
