"""Texts in CSV, TSV and Parquet files, as the tokens that a model's folder makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from compressor.data.columns import Asked, Names, arrow, is_text, read, shown
from compressor.data.demand import At, OnDemand
from compressor.data.live import Data
from compressor.data.rows import Rows, labelled
from compressor.data.tokens import Texts, Tokens, reader
from compressor.errors import InputError
from compressor.task import Array, Batch, Split

Length = Annotated[int, Field(ge=1)]


def text(
    location: str,
    seed: int,
    *,
    text: Names,
    tokenizer: str,
    target: str | None = None,
    length: Length | None = None,
    kind: Asked | None = None,
    test: str | None = None,
    separator: Annotated[str, Field(min_length=1, max_length=1)] | None = None,
) -> Data:
    """A ``.csv``, ``.tsv`` (or either with ``.gz``) or ``.parquet`` file, a text in each row.

    ``text`` names its column, or two (``text=question,answer``), whose texts go together.
    ``tokenizer`` is the folder of the model, as Hugging Face's ``save_pretrained`` writes it.
    Inputs are those that the model takes: int64 ``(length,)`` each, cut and padded to ``length``
    tokens, by default 128 or as many as it takes. A text that is missing is empty.

    ``target`` is the column to predict: strings, booleans and whole numbers are classes, numbered
    in sorted order, floats a regression, as they are; ``kind`` says otherwise. Without ``target``
    no example has a label. ``test`` is a second file with the same columns. Texts stay in memory,
    1 GiB at most (of Parquet 4); tokens are made when they are asked for.

    Raises :class:`InputError` for broken files, rows without a target and a tokenizer that is not
    the model's. Needs ``compressor[tables]`` and ``compressor[transformers]``.
    """
    tokens = reader(Path(tokenizer).expanduser(), length)
    wanted = [*text, *([] if target is None else [target])]
    parts = {}
    for part, place in (("train", location), ("test", test)):
        if place is None:
            continue
        path = Path(place).expanduser()
        types = dict.fromkeys(text, arrow().string())
        held = read(path, only=wanted, separator=separator, types=types, missing=("",))
        parts[part] = Rows(path, held.to_batches())
    check(text, parts["train"].batches, parts["train"].path)
    return labelled(
        "text", parts, lambda rows, labels: texts(rows, text, tokens, labels), target, kind, seed
    )


def check(names: Sequence[str], batches: Sequence[Any], path: Path) -> None:
    """Refuses columns of text that are none, and more than a pair."""
    if len(names) > 2:
        raise InputError(f"option text={','.join(names)} names {len(names)} columns: give 1 or 2")
    for name in names:
        for batch in batches[:1]:
            kind = batch.schema.field(name).type
            if not is_text(kind):
                raise InputError(
                    f"{path}: column {shown(name)} is of type {kind!s:.40}: text is strings"
                )


def texts(
    rows: Rows, names: Sequence[str], tokens: Callable[[Texts], Tokens], labels: Array
) -> Split:
    """The texts or pairs in these columns as a split."""

    def read(at: At) -> Batch:
        columns = [[each or "" for each in rows.values(name, at)] for name in names]
        given = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
        return tokens(given), labels[at]

    return Split(OnDemand(read, labels.__getitem__, parallel=True), np.arange(len(rows)))
