"""Hugging Face data sets in a folder: the Arrow files of ``save_to_disk``, or Parquet files.

Only those files are read, and JSON beside them; nothing is fetched and no script is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from compressor.data import columns
from compressor.data.columns import HELD_AT_MOST, Asked, Names, arrow, reading, shown
from compressor.data.demand import At, OnDemand
from compressor.data.folder import Channels, decoder
from compressor.data.live import PARTS, Data
from compressor.data.rows import Rows, labelled
from compressor.data.text import Length, check, texts
from compressor.data.tokens import read_object, reader
from compressor.errors import InputError
from compressor.task import Array, Batch, Split

"""What a part of a data set may be called, and what it is called here; others are passed over."""

ENDINGS = (".arrow", ".parquet")


def dataset(
    location: str,
    seed: int,
    *,
    text: Names = (),
    image: str | None = None,
    target: str | None = None,
    tokenizer: str | None = None,
    length: Length | None = None,
    size: Annotated[int, Field(ge=1, le=4096)] = 224,
    gray: bool = False,
    mean: Channels = (0.0,),
    std: Channels = (1.0,),
    kind: Asked | None = None,
    test: str | None = None,
) -> Data:
    """A data set of texts or pictures in a folder: of ``save_to_disk``, or of Parquet files.

    Parts are ``train``, ``validation`` (``valid``, ``val``, ``dev``) and ``test``: folders, or
    words in the files' names (``data/train-00000-of-00001.parquet``); files without such a word are
    ``train``. ``test=validation`` judges by that part, where ``test`` has no labels.

    Either ``text`` names a column, or two, and ``tokenizer`` the model's folder, as in ``text:``;
    or ``image`` names a column of encoded pictures, which ``size``, ``gray``, ``mean`` and ``std``
    are for, as in ``images:``. ``target`` is the column to predict: where the data set names its
    classes they keep their numbers; otherwise as in ``text:``.

    Arrow files are memory-mapped and can be larger than memory: rows are read and checked when they
    are asked for. Of Parquet files the columns are held, 4 GiB at most.

    Raises :class:`InputError` for folders of another form, broken files, columns that are not
    there, and pictures that cannot be decoded. Needs ``compressor[tables]``, for text
    ``compressor[transformers]``, too.
    """
    root = Path(location).expanduser()
    if bool(text) == (image is not None):
        raise InputError("give one of text=COLUMN and image=COLUMN")
    if text and tokenizer is None:
        raise InputError("option tokenizer is missing: add tokenizer=FOLDER, that of the model")
    files = _parts(root, test)
    wanted = [*text, *([image] if image else []), *([target] if target else [])]
    parts = {part: _rows(paths, wanted) for part, paths in files.items()}
    if text:
        check(text, parts["train"].batches, parts["train"].path)
        tokens = reader(Path(tokenizer or "").expanduser(), length)

        def split(rows: Rows, labels: Array) -> Split:
            return texts(rows, text, tokens, labels)
    else:
        decode = decoder(size, gray, mean, std)

        def split(rows: Rows, labels: Array) -> Split:
            def read(at: At) -> Batch:
                found = zip(at, rows.values(str(image), at), strict=True)
                pictures = [_picture(rows.path, image, row, value) for row, value in found]
                return (decode(pictures),), labels[at]

            return Split(OnDemand(read, labels.__getitem__, parallel=True), np.arange(len(rows)))

    classes = _classes(root, files["train"][0], parts["train"], target)
    for part, rows in parts.items():
        if target and classes and len(rows) and part != "train":
            _, values = columns.codes(rows.column(target))
            if values == [-1]:
                raise InputError(
                    f"{rows.path} has no labels (all are -1): name a part that has, "
                    f"{part}=validation"
                    if part == "test"
                    else f"{rows.path} has no labels (all are -1): remove it"
                )
    return labelled("dataset", parts, split, target, kind, seed, classes)


def _picture(path: Path, column: str | None, row: int, value: Any) -> tuple[str, bytes]:
    """The content of a picture's file: bytes, or a record with ``bytes``."""
    title = f"{path}: {shown(column)} of row {row + 1}"
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        where = "is the path of a file" if isinstance(value, dict | str) else "is missing"
        raise InputError(f"{title} {where}, no picture: save the data set with its pictures")
    return title, content


# --- files


def _parts(root: Path, test: str | None) -> dict[str, list[Path]]:
    """The files of each part."""
    if not root.is_dir():
        raise InputError(f"there is no folder {root}")
    found = _named(root)
    if test is not None and test not in found:
        raise InputError(f"option test={test}: {root} has {', '.join(sorted(found)) or 'no parts'}")
    parts: dict[str, list[Path]] = {}
    for name, paths in found.items():
        part = "test" if name == test else PARTS.get(name)
        if part is None or (part == "test" and test is not None and name != test):
            continue
        if part in parts:
            raise InputError(f"{root} holds the part {part!r} twice: remove {name!r}")
        parts[part] = paths
    if "train" not in parts:
        said = f"only {', '.join(map(shown, sorted(found)))}" if found else "no .arrow or .parquet"
        raise InputError(
            f"{root} holds no train, {said}: give a folder of save_to_disk or of Parquet files"
        )
    return parts


def _named(root: Path) -> dict[str, list[Path]]:
    """The files of each part, by its own name."""
    listed = read_object(root / "dataset_dict.json").get("splits")
    if listed is not None:
        if not isinstance(listed, list):
            raise InputError(f"{root / 'dataset_dict.json'} lists no splits: save the set again")
        return {_plain(name, root): _files(root / name) for name in listed}
    folders = {name: root / name for name in PARTS if (root / name).is_dir()}
    if folders:
        return {name: _files(folder) for name, folder in folders.items()}
    found: dict[str, list[Path]] = {}
    for path in _files(root) or _files(root / "data"):
        words = [word for word in re.split(r"[-_.]", path.stem) if word in PARTS]
        found.setdefault(words[-1] if words else "train", []).append(path)
    return found


def _files(folder: Path) -> list[Path]:
    """The files with the rows of one folder, in their order."""
    state = read_object(folder / "state.json")
    if state.get("_indices_files"):
        raise InputError(f"{folder} is a choice of rows: call flatten_indices() and save it again")
    listed = state.get("_data_files")
    if listed is None:
        return sorted(path for path in folder.glob("*") if path.suffix in ENDINGS)
    try:
        paths = [folder / _plain(each["filename"], folder) for each in listed]
    except (TypeError, KeyError):
        raise InputError(f"{folder / 'state.json'} lists no files: save the set again") from None
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} is not there, and state.json lists it: save the set again")
    return paths


def _plain(name: Any, folder: Path) -> str:
    """A name that leads nowhere but into its folder."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"{folder} names {name!r:.80}: only names in its folder are read")
    return name


def _rows(paths: list[Path], wanted: list[str]) -> Rows:
    batches: list[Any] = []
    held = 0
    for path in paths:
        if path.suffix == ".arrow":
            found = _mapped(path, wanted)
        else:
            found = columns.read(path, only=wanted).to_batches()
            held += sum(batch.nbytes for batch in found)
        if held > HELD_AT_MOST:
            raise InputError(
                f"{path.parent}: its columns take more than {HELD_AT_MOST:,} bytes of memory: "
                "save the set with save_to_disk, whose files are read where they lie"
            )
        kinds = {str(batch.schema.types) for batch in (*batches[:1], *found[:1])}
        if len(kinds) > 1:
            raise InputError(f"{path} has columns of other types than {paths[0]}: make them alike")
        batches += found
    return Rows(paths[0], batches)


def _mapped(path: Path, wanted: list[str]) -> list[Any]:
    """The batches of an Arrow stream, which is what ``save_to_disk`` writes, where they lie."""
    pa, ipc = arrow(), arrow(".ipc")
    with reading(path), pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            raise InputError(f"{path} is of Feather's form: save the data set with save_to_disk")
        source.seek(0)
        messages = ipc.MessageReader.open_stream(source)
        if any(_compressed(message) for message in messages):
            raise InputError(f"{path} is compressed, which cannot be mapped: save it without")
        source.seek(0)
        names = ipc.open_stream(source).schema.names
        columns.chosen(names, wanted, (), path)
        source.seek(0)
        places = sorted(names.index(name) for name in wanted)
        options = ipc.IpcReadOptions(included_fields=places)
        return [batch.select(wanted) for batch in ipc.open_stream(source, options=options)]


def _compressed(message: Any) -> bool:
    """Whether the buffers of a batch are packed; pyarrow would unpack them, of any size, unasked.

    Field 3 of a RecordBatch says so (Message.fbs of the Arrow project): a batch is field 2 of its
    message, of a dictionary it is field 1 of that.
    """
    if message.type not in ("record batch", "dictionary"):
        return False
    data = message.metadata.to_pybytes()

    def field(table: int, number: int) -> int:
        """Where a field of a FlatBuffers table is; 0 where it is not."""
        about = table - int.from_bytes(data[table : table + 4], "little", signed=True)
        entry = about + 4 + 2 * number
        size = int.from_bytes(data[about : about + 2], "little")
        offset = int.from_bytes(data[entry : entry + 2], "little") if entry < about + size else 0
        return table + offset if offset else 0

    def follow(place: int) -> int:
        return place + int.from_bytes(data[place : place + 4], "little")

    batch = follow(field(follow(0), 2))
    if message.type == "dictionary":
        batch = follow(field(batch, 1))
    return field(batch, 3) != 0


def _classes(root: Path, path: Path, rows: Rows, target: str | None) -> tuple[int, ...] | None:
    """The numbers of the classes, where the data set has names for them."""
    if target is None or not rows.batches:
        return None
    infos: list[Mapping[str, Any]] = [
        read_object(folder / "dataset_info.json") for folder in (path.parent, root)
    ]
    about = (rows.batches[0].schema.metadata or {}).get(b"huggingface")
    if about is not None:
        try:
            infos.append(json.loads(about)["info"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{path} has a broken description: save the set again") from None
    for info in infos:
        features = info.get("features") if isinstance(info, dict) else None
        said = features.get(target) if isinstance(features, dict) else None
        if isinstance(said, dict) and isinstance(said.get("names"), list):
            return tuple(range(len(said["names"])))
    return None
