"""Tables: rows of numbers and categories, from CSV, TSV and Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from compressor.data.columns import (
    Asked,
    Names,
    Targets,
    arrow,
    codes,
    is_number,
    is_text,
    numbers,
    read,
    reading,
    shown,
    some,
    targets,
    words,
)
from compressor.data.live import Data, checked
from compressor.data.splitting import completed, refetched
from compressor.errors import InputError
from compressor.task import Array, Split

CATEGORIES_AT_MOST = 256
"""Categories of a column, each an input of the model."""

BYTES_AT_MOST = 2 << 30
"""Bytes of all inputs, float32."""


def table(
    location: str,
    seed: int,
    *,
    target: str,
    kind: Asked | None = None,
    drop: Names = (),
    test: str | None = None,
    scale: bool = True,
    separator: Annotated[str, Field(min_length=1, max_length=1)] | None = None,
) -> Data:
    """A ``.csv``, ``.tsv`` (or either with ``.gz``) or ``.parquet`` file, a row for each example.

    ``target`` names the column to predict: strings, booleans and whole numbers are classes,
    numbered in sorted order (two are ``binary``), other numbers a regression; ``kind`` says
    otherwise. All other columns but those of ``drop`` are inputs, float32 ``(columns,)``, in the
    order of the file:

    - numbers, booleans too, at mean 0 and deviation 1 of train. One that is missing becomes train's
      median; if train lacks any, a column of 0 and 1 beside it says where;
    - strings as a column of 0 and 1 for each category of train, sorted, 256 at most. A category
      that train has not is all 0, and so is a missing one; if train lacks any, a column says where.

    Only train is asked for means, medians and categories: they follow the seed. Regression targets,
    ``(1,)``, are standardised, too: an error of 1 is one deviation of train's. ``scale=0`` leaves
    inputs and targets as they are, for a model that was trained so. ``test`` is a second file with
    the same columns. :attr:`Data.columns` says what the inputs are.

    Files are read at once: text of 1 GiB, Parquet columns of 4 GiB and inputs of 2 GiB at most.
    Raises :class:`InputError` for broken files, rows without a target, dates and other types,
    infinity, and columns without any value in train. Needs ``compressor[tables]``.
    """
    path = Path(location).expanduser()
    held = read(path, leave=drop, separator=separator)
    if target in drop:
        raise InputError(f"option drop={','.join(drop)} holds the target: keep it")
    if target not in held.column_names:  # which says what there is
        read(path, only=[target], separator=separator)
    if not len(held):
        raise InputError(f"{path} has no rows: add some below the names of the columns")
    names = [name for name in held.column_names if name != target]
    if not names:
        raise InputError(f"{path} has no columns but the target {shown(target)}: add some")
    for name in names:
        _refuse(name, held.schema.field(name).type, path)
    if path.suffix != ".parquet":
        for name in names if kind in ("classification", "binary") else [*names, target]:
            if is_text(held.schema.field(name).type):
                words(codes(held[name])[1], f"{path}: column {shown(name)}")
    told = targets(held[target], target, path, kind)
    answers, count, other = told.values, len(held), None
    if test is not None:
        beside = Path(test).expanduser()
        held = _wide(held, target)
        more = _alike(beside, held, target, separator)
        answers = np.concatenate([answers, _answers(more[target], target, beside, told)])
        other = np.arange(count, len(answers))
        held = arrow().concat_tables([held.drop_columns([target]), more.drop_columns([target])])
    places = Split.arrays(np.empty((len(answers), 0), np.float32), answers)
    labels = None if told.kind == "regression" else answers
    splits = completed(
        places.take(np.arange(count)),
        seed,
        labels=labels,
        test=None if other is None else places.take(other),
    )
    train = splits.train.indices
    inputs, columns = _inputs(held, names, train, scale, path)
    if labels is None:
        answers = _scaled(answers, train, scale, f"{path}: target {shown(target)}")
    splits = checked(refetched(splits, Split.arrays(inputs, answers)))
    return Data("table", splits, told.kind, told.outputs, columns=columns)


def _refuse(name: str, kind: Any, path: Path) -> None:
    """Types that are neither numbers nor categories."""
    types = arrow().types
    if is_number(kind) or is_text(kind):
        return
    where = f"{path}: column {shown(name)}"
    if types.is_null(kind):
        raise InputError(f"{where} has no value at all: add drop={name!r:.60}")
    if types.is_temporal(kind):
        raise InputError(
            f"{where} holds times ({kind}): make numbers of them (a year, a weekday, days since), "
            "or drop it"
        )
    raise InputError(f"{where} is of type {kind!s:.40}: give numbers or strings, or drop it")


def _alike(path: Path, held: Any, target: str, separator: str | None) -> Any:
    """The columns of a second file, the inputs of the types that :func:`_wide` made of the first.

    The target keeps its own: what is not among the classes must be noticed.
    """
    types = {field.name: field.type for field in held.schema}
    more = read(path, only=held.column_names, separator=separator, types=types)
    boolean = arrow().types.is_boolean
    for name, kind in types.items():
        seen = more.schema.field(name).type
        both_numbers = is_number(kind) and is_number(seen) and boolean(kind) == boolean(seen)
        if not both_numbers and not (is_text(kind) and is_text(seen)):
            raise InputError(
                f"{path}: column {shown(name)} is of type {seen!s:.40}, in train of {kind!s:.40}: "
                "make them alike"
            )
    fields = [more.schema.field(target) if field.name == target else field for field in held.schema]
    with reading(path):
        return more.cast(arrow().schema(fields), safe=False)


def _wide(held: Any, target: str) -> Any:
    """The table with whole numbers as others: in a second file the column may hold such."""
    pa = arrow()
    fields = [
        field.with_type(pa.float64())
        if pa.types.is_integer(field.type) and field.name != target
        else field
        for field in held.schema
    ]
    return held.cast(pa.schema(fields), safe=False)


def _answers(column: Any, name: str, path: Path, told: Targets) -> Array:
    """The targets of a second file, of the kind and the classes of the first."""
    asked: Asked | None = "regression" if told.classes is None else None
    return targets(column, name, path, asked, told.classes).values


def _inputs(
    held: Any, names: list[str], train: Array, scale: bool, path: Path
) -> tuple[Array, tuple[str, ...]]:
    """All columns as float32 ``(n, inputs)``, and what each is."""
    blocks: list[Array] = []
    titles: list[str] = []
    for name in names:
        where = f"{path}: column {shown(name)}"
        column = held[name]
        make = _numeric if is_number(column.type) else _categorical
        made, more = make(column, train, scale, where)
        blocks += made
        titles += [shown(name)[1:-1] + title for title in more]
        if len(blocks) * made[0].nbytes > BYTES_AT_MOST:
            raise InputError(
                f"{path}: its inputs take more than {BYTES_AT_MOST:,} bytes of memory: drop some, "
                "or write x.npy and y.npy, which arrays:DIR reads where they lie"
            )
    inputs = np.empty((len(held), len(blocks)), np.float32)
    for at, block in enumerate(blocks):
        inputs[:, at] = block
    return inputs, tuple(titles)


def _numeric(column: Any, train: Array, scale: bool, where: str) -> tuple[list[Array], list[str]]:
    values = numbers(column)
    wild = np.isinf(values)
    if wild.any():
        raise InputError(
            f"{where} is {values[wild.argmax()]} in row {wild.argmax() + 1}: replace it, or drop "
            "the column"
        )
    missing = np.isnan(values)
    if missing[train].all():
        raise InputError(f"{where} has no value in train: drop it")
    if missing.any():
        values = np.where(missing, np.median(values[train][~missing[train]]), values)
    made = [_scaled(values, train, scale, where)]
    if not missing[train].any():
        return made, [""]
    return [*made, missing.astype(np.float32)], ["", " is missing"]


def _categorical(column: Any, train: Array, _: bool, where: str) -> tuple[list[Array], list[str]]:
    found, values = codes(column)
    known = sorted((values[at], at) for at in np.unique(found[train]).tolist() if at >= 0)
    if not known:
        raise InputError(f"{where} has no value in train: drop it")
    if len(known) > CATEGORIES_AT_MOST:
        raise InputError(
            f"{where} has {len(known):,} different values in train "
            f"({some(value for value, _ in known)}, ...), more than {CATEGORIES_AT_MOST}: drop it, "
            "or make numbers of it"
        )
    made = [(found == at).astype(np.float32) for _, at in known]
    titles = [f"={shown(value, 40)[1:-1]}" for value, _ in known]
    if (found[train] < 0).any():
        made.append((found < 0).astype(np.float32))
        titles.append(" is missing")
    return made, titles


def _scaled(values: Array, train: Array, scale: bool, where: str) -> Array:
    """float32, at mean 0 and deviation 1 in train; what never changes there only moves."""
    seen = values[train]
    with np.errstate(over="ignore", invalid="ignore"):
        mean, deviation = (seen.mean(axis=0), seen.std(axis=0)) if scale else (0.0, 1.0)
        if scale and (seen == seen[0]).all():
            mean, deviation = seen[0], 1.0
        scaled = np.asarray((values - mean) / deviation, np.float32)
    if not np.isfinite(scaled).all():
        raise InputError(
            f"{where} holds numbers up to {np.abs(values).max():g}, too large for float32: divide "
            "them"
        )
    return scaled
