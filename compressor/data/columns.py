"""Columns of CSV, TSV and Parquet files, read by pyarrow, and targets made of one."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BeforeValidator

from compressor.data.extras import package
from compressor.errors import InputError, one_line
from compressor.task import Array, Kind

TEXT_AT_MOST = 1 << 30
"""Bytes of a CSV file, unpacked. It is parsed at once: ``1,`` becomes 8 bytes."""

HELD_AT_MOST = 4 << 30
"""Bytes of the columns of a Parquet file that are held in memory."""

BLOCK = 1 << 23
"""Bytes of a CSV file that are parsed at once; a row cannot be longer."""

COLUMNS_AT_MOST = 20_000
HEADER_AT_MOST = 1 << 20
"""Columns, and bytes of the first line, of a CSV file."""

CLASSES_AT_MOST = 100
"""Classes of a target where nobody says that they are classes: whole numbers may be amounts."""

NAMED_AT_MOST = 1 << 16
"""Classes of a target whose kind was said."""

SEPARATORS = {".csv": ",", ".tsv": "\t"}

MISSING = ("", "NA", "N/A", "n/a", "NaN", "nan", "-nan", "NULL", "null", "#N/A", "None", "?")
"""What stands for a value that is not there; ``?`` is that of the UCI's tables."""


def listed(text: object) -> object:
    return tuple(text.split(",")) if isinstance(text, str) else text


Names = Annotated[tuple[str, ...], BeforeValidator(listed)]
"""Names of columns: ``a,b``."""

Asked = Literal["classification", "binary", "regression"]


class Targets(NamedTuple):
    """Targets of every row: int64 ``(n,)`` or, of a regression, float64 ``(n, 1)``.

    ``classes`` are the values that the labels stand for, sorted.
    """

    values: Array
    kind: Kind
    outputs: int
    classes: tuple[Any, ...] | None


def shown(text: object, limit: int = 60) -> str:
    """A name out of a file, quoted, without what a terminal would obey."""
    return f"{text!r:.{limit}}"


def told(error: BaseException) -> str:
    """An error that may quote a file, as one line without what a terminal would obey."""
    return "".join(each if each.isprintable() else "?" for each in one_line(error, 200))


def arrow(part: str = "") -> Any:
    """pyarrow, or a part of it."""
    return package(f"pyarrow{part}", "tables")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside becomes one :class:`InputError` that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # pyarrow raises a dozen types on a broken file
        raise InputError(f"{path} cannot be read: {told(error)}") from None


def read(
    path: Path,
    *,
    only: Sequence[str] | None = None,
    leave: Sequence[str] = (),
    separator: str | None = None,
    types: Mapping[str, Any] = MappingProxyType({}),
    missing: Sequence[str] = MISSING,
) -> Any:
    """The ``pyarrow.Table`` in a ``.csv``, ``.tsv`` (``.gz``) or ``.parquet`` file.

    With ``only`` these columns in this order, else all but ``leave``. ``types`` are those that
    columns of text must have. Raises :class:`InputError` for a broken file, columns that are not
    there or twice, and more than memory should hold.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    arrow()
    packed = path.suffix == ".gz"
    ending = Path(path.stem).suffix if packed else path.suffix
    with reading(path):
        if ending == ".parquet" and not packed:
            return _parquet(path, only, leave)
        if ending in SEPARATORS:
            between = separator or SEPARATORS[ending]
            content = _unpacked(path) if packed else None
            return _csv(path, content, only, leave, between, types, missing)
    raise InputError(f"{path} is no table: give a .csv, .tsv, .csv.gz, .tsv.gz or .parquet file")


def _unpacked(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            content = file.read(TEXT_AT_MOST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {told(error)}") from None
    return content


def _csv(
    path: Path,
    content: bytes | None,
    only: Sequence[str] | None,
    leave: Sequence[str],
    separator: str,
    types: Mapping[str, Any],
    missing: Sequence[str],
) -> Any:
    pa, reader = arrow(), arrow(".csv")
    size = path.stat().st_size if content is None else len(content)
    if size > TEXT_AT_MOST:
        raise InputError(
            f"{path} holds more than {TEXT_AT_MOST:,} bytes of text: write it as .parquet"
        )
    names = _header(path, content, separator)
    if len(names) == 1 and (other := [each for each in ";\t|" if each in names[0]]):
        said = "call it .tsv" if other[0] == "\t" else f"say separator={other[0]}"
        raise InputError(f"{path} has one column {shown(names[0])}: {said}")
    wanted = chosen(names, only, leave, path)
    table = reader.read_csv(
        pa.OSFile(str(path)) if content is None else pa.BufferReader(content),
        reader.ReadOptions(block_size=BLOCK),
        reader.ParseOptions(delimiter=separator, newlines_in_values=True),
        reader.ConvertOptions(
            include_columns=wanted,
            column_types={name: types[name] for name in wanted if name in types},
            null_values=list(missing),
            strings_can_be_null=True,
        ),
    )
    for name in wanted:
        if pa.types.is_binary(table.schema.field(name).type):
            raise InputError(f"{path}: column {shown(name)} is not UTF-8: save the file as UTF-8")
    return table


def _header(path: Path, content: bytes | None, separator: str) -> list[str]:
    """The names in the first line; not by pyarrow, which would make millions of columns first."""
    if content is None:
        with path.open("rb") as file:
            start = file.read(HEADER_AT_MOST)
    else:
        start = content[:HEADER_AT_MOST]
    # What is cut off in the middle of a letter is no part of the first line.
    text = start.decode("utf-8-sig", errors="ignore" if len(start) == HEADER_AT_MOST else "replace")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    names = next((line for line in lines if line), [])
    if not names:
        raise InputError(f"{path} is empty: its first line names the columns")
    if len(names) > COLUMNS_AT_MOST or lines.line_num > 100:
        raise InputError(
            f"{path} begins with {len(names):,} names of columns; at most {COLUMNS_AT_MOST:,} can "
            "be: give a smaller table"
        )
    if any("\ufffd" in name for name in names):
        raise InputError(f"{path}: its first line is not UTF-8: save the file as UTF-8")
    return names


def _parquet(path: Path, only: Sequence[str] | None, leave: Sequence[str]) -> Any:
    pa, reader = arrow(), arrow(".parquet")
    with reader.ParquetFile(
        str(path), thrift_string_size_limit=1 << 24, thrift_container_size_limit=1 << 20
    ) as file:
        schema = file.schema_arrow
        wanted = chosen(schema.names, only, leave, path)
        batches, held = [], 0
        for batch in file.iter_batches(1 << 16, columns=wanted):
            batch.validate(full=True)
            held += batch.nbytes
            if held > HELD_AT_MOST:
                raise InputError(
                    f"{path}: its columns take more than {HELD_AT_MOST:,} bytes of memory: leave "
                    "some out, or write x.npy and y.npy, which arrays:DIR reads where they lie"
                )
            batches.append(batch)
        picked = pa.schema([schema.field(name) for name in wanted])
    return pa.Table.from_batches(batches, picked if not batches else None).select(wanted)


def chosen(
    names: Sequence[str], only: Sequence[str] | None, leave: Sequence[str], path: Path
) -> list[str]:
    """The columns that are read."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{path} has the column {shown(name)} twice: rename one")
        seen.add(name)
    asked = [*(only or ()), *leave]
    for name in asked:
        if asked.count(name) > 1:
            raise InputError(f"column {shown(name)} is asked for twice: name it once")
        if name not in seen:
            known = ", ".join(shown(each, 30) for each in names[:8])
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            hint = ": say separator=" if len(names) == 1 else ""
            raise InputError(f"{path} has no column {shown(name)}, only {known}{more}{hint}")
    return list(only) if only is not None else [name for name in names if name not in {*leave}]


# --- columns


def is_number(kind: Any) -> bool:
    """Whether a type of pyarrow is one of numbers, or of false and true."""
    types = arrow().types
    return bool(
        types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_decimal(kind)
        or types.is_boolean(kind)
    )


def is_text(kind: Any) -> bool:
    """Whether a type of pyarrow is one of strings, or a dictionary of strings."""
    types = arrow().types
    if types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def numbers(column: Any) -> Array:
    """float64 ``(n,)``; NaN where there is no value."""
    pa, compute = arrow(), arrow(".compute")
    if pa.types.is_boolean(column.type):
        column = compute.cast(column, pa.uint8())
    values: Array = compute.cast(column, pa.float64(), safe=False).to_numpy()
    return values


def codes(column: Any) -> tuple[Array, list[Any]]:
    """The different values of a column, and for each row which, int32 ``(n,)``; -1 for none."""
    compute = arrow(".compute")
    if arrow().types.is_dictionary(column.type):
        # A dictionary may hold a value twice.
        column = compute.cast(column, column.type.value_type)
    encoded = column.dictionary_encode().unify_dictionaries()
    chunks = [
        compute.fill_null(chunk.indices, -1).to_numpy(zero_copy_only=False)
        for chunk in encoded.chunks
    ]
    found = np.concatenate([np.empty(0, np.int32), *chunks])
    return found, encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []


NUMBER = re.compile(r"\s*[-+]?(\d+([.,]\d+)?|\d{1,3}([,.' ]\d{3})+([.,]\d+)?)\s*%?\s*")
DATE = re.compile(r"\s*(\d{4}[./-]\d\d?[./-]\d\d?|\d\d?[./-]\d\d?[./-](\d{4}|\d\d))\b.*")
FEW = 12
"""So many different values may be categories, whatever they look like."""


def words(values: Sequence[Any], where: str) -> None:
    """Raises :class:`InputError` for numbers and dates that a CSV reader took for text: as
    categories they would say nothing."""
    for pattern, what, remedy in (
        (DATE, "dates", "make numbers of them (a year, a weekday, days since)"),
        (NUMBER, "numbers", "write them with a point and nothing else, and missing ones empty"),
    ):
        like = [value for value in values if isinstance(value, str) and pattern.fullmatch(value)]
        if len(like) > FEW and 2 * len(like) >= len(values):
            known = {*like}
            other = next((value for value in values if value not in known), like[-1])
            raise InputError(
                f"{where} holds {what} as text ({some(like[:2])} ... {some([other])}): {remedy}, "
                "or drop the column"
            )


def some(values: Iterable[object]) -> str:
    """A few values, quoted."""
    return ", ".join(shown(value, 24) for value in list(values)[:4])


def targets(
    column: Any,
    name: str,
    path: Path,
    asked: Asked | None = None,
    classes: tuple[Any, ...] | None = None,
    two: Kind = "binary",
) -> Targets:
    """The targets in a column: classes of strings, booleans and whole numbers, amounts of floats.

    Classes are the different values, sorted, or ``classes``; of two the kind is ``two``; ``binary``
    has one output. ``asked`` says otherwise. Raises :class:`InputError` for rows without a target,
    for other types, one class, values that are none of ``classes``, and for more than 100 whole
    numbers or strings that nobody called classes.
    """
    where, pa = f"{path}: target {shown(name)}", arrow()
    nothing = column.is_null(nan_is_null=True).to_numpy()
    if nothing.any():
        raise InputError(
            f"{where} is missing in {nothing.sum():,} of {len(column):,} rows, first in row "
            f"{nothing.argmax() + 1}: remove those rows"
        )
    if is_number(column.type):
        amounts = numbers(column)
        wild = ~np.isfinite(amounts)
        if wild.any():
            raise InputError(
                f"{where} is {amounts[wild.argmax()]} in row {wild.argmax() + 1}: remove that row"
            )
        whole = not (pa.types.is_floating(column.type) or pa.types.is_decimal(column.type))
        if asked == "regression" or (asked is None and not whole and classes is None):
            return Targets(amounts[:, np.newaxis], "regression", 1, None)
        if not whole and (amounts != np.round(amounts)).any():
            wrong = amounts[(amounts != np.round(amounts)).argmax()]
            raise InputError(f"{where} holds {wrong}, no class: say kind=regression")
        if not whole:
            column = arrow(".compute").cast(column, pa.int64(), safe=False)
    elif not is_text(column.type):
        raise InputError(f"{where} is of type {column.type!s:.40}: give strings or numbers")
    elif asked == "regression":
        raise InputError(f"{where} holds strings, no amounts: remove kind=regression")
    found, values = codes(column)
    if classes is None:
        most = CLASSES_AT_MOST if asked is None else NAMED_AT_MOST
        if len(values) > most:
            also = " or kind=regression" if is_number(column.type) else ""
            remedy = f"say kind=classification{also}" if asked is None else "give fewer"
            raise InputError(
                f"{where} has {len(values):,} different values ({some(values)}, ...), more than "
                f"{most:,}: {remedy}"
            )
        classes = tuple(sorted(values))
    if len(classes) < 2 or (asked == "binary" and len(classes) != 2):
        raise InputError(
            f"{where} has {len(classes)} different values ({some(classes)}): "
            f"{'two are needed' if asked == 'binary' else 'at least two are needed'}"
        )
    places = {value: at for at, value in enumerate(classes)}
    strange = [value for value in values if value not in places]
    if strange:
        raise InputError(
            f"{where} holds {some(strange)}, none of train's classes ({some(classes)}): remove "
            "those rows"
        )
    order = np.array([places[value] for value in values], np.int64)
    kind: Kind = asked or (two if len(classes) == 2 else "classification")
    return Targets(order[found], kind, 1 if kind == "binary" else len(classes), classes)
