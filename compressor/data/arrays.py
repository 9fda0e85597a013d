"""Arrays in a NumPy ``.npz`` file, or in ``.npy`` files that are read where they lie."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from compressor.artifact import zipped
from compressor.data.live import BARE, NAMES, Data, adopt
from compressor.errors import InputError, one_line

KEY = re.compile(rf"(x\d*|y)(_({'|'.join(NAMES)}))?|x\d*_{BARE}")

UNPACKED, PACKED = 1 << 30, 50
"""Bytes that an ``.npz`` may unpack to, whatever it holds, and for each byte of it: a bomb of zeros
is a thousandfold."""


def arrays(location: str, seed: int) -> Data:
    """Data from a file that ``numpy.savez`` wrote, or from files of ``numpy.save``.

    The keys of the file are ``x`` and ``y``, to be split, or ``x_train``, ``y_train`` and the like
    for ``validate``, ``calibrate`` and ``test``. Several inputs are ``x0``, ``x1``, ...
    (``x0_train``). ``x_unlabelled`` are further examples for ``train``, without a label; ``x``
    without ``y`` is data without any. ``kind`` may say the kind of task. Pickled objects are
    refused. See :func:`adopt` for dtypes.

    A folder holds one ``.npy`` file for each key (``x_train.npy``); a single such file is taken
    together with the ``y`` beside it. They are memory-mapped: of inputs, and of targets of more
    than one number, only the rows that are asked for are read and checked. They can be larger than
    memory, and an ``.npz``, which is read at once, cannot.

    Raises :class:`InputError` for a file that is missing or broken, and for other keys.
    """
    path = Path(location).expanduser()
    if path.is_dir() or (path.suffix == ".npy" and KEY.fullmatch(path.stem)):
        content = _mapped(path)
    else:
        content = _zipped(path)
    given: dict[str, Any] = {}
    if "kind" in content:
        given["kind"] = str(content.pop("kind"))
    parts = _parts(content, path)
    if content and all(re.fullmatch(r"x\d*", key) for key in content):
        return adopt({"x": tuple(parts["train"].values()), **given}, seed)
    for part, values in parts.items():
        inputs = [value for what, value in values.items() if what != "y"]
        if part == BARE:
            given[part] = tuple(inputs)
            continue
        if "y" not in values or not inputs:
            raise InputError(f"{path} needs x and y for {part}; it holds {', '.join(content)}")
        given[part] = (tuple(inputs), values["y"])
    return adopt(given, seed)


def _zipped(path: Path) -> dict[str, Any]:
    """The arrays of an ``.npz`` file, in memory."""
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if not zipped(path):
        raise InputError(
            f"{path} is no npz file: write one with numpy.savez, or x.npy and y.npy into a folder"
        )
    try:
        # Opened here because NumPy leaves a broken file open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            # One changed byte makes a key and its array the comment of the key before it.
            if any(entry.comment for entry in file.zip.infolist()):
                raise ValueError("its list of keys is damaged")
            whole, packed = (
                sum(getattr(entry, size) for entry in file.zip.infolist())
                for size in ("file_size", "compress_size")
            )
            if whole > max(UNPACKED, PACKED * packed):
                raise InputError(
                    f"{path} would unpack {packed / 1e6:,.0f} MB to {whole / 1e9:,.1f} GB of "
                    "memory: write .npy files into a folder, which are read where they lie"
                )
            return {key: file[key] for key in file.files}
    except InputError:
        raise
    except Exception as error:  # NumPy, zipfile and zlib raise a dozen types on a broken file
        raise InputError(f"{path} cannot be read: {one_line(error)}") from None


def _mapped(path: Path) -> dict[str, Any]:
    """The ``.npy`` files of a folder, or one and its targets, by name; nothing is read yet."""
    if path.is_dir():
        files = sorted(path.glob("*.npy"))
        if not files:
            raise InputError(f"{path} holds no .npy file: write x.npy and y.npy with numpy.save")
    elif path.is_file():
        beside = path.with_name(re.sub(r"^x\d*", "y", path.name))
        files = sorted({path, beside} if beside.is_file() else {path})
    else:
        raise InputError(f"there is no file {path}")
    content = {}
    for file in files:
        try:
            content[file.stem] = np.load(file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy raises half a dozen types on a broken header
            raise InputError(f"{file} cannot be read: {one_line(error)}") from None
    return content


def _parts(content: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The arrays of each part, inputs by number."""
    found = []
    for key, value in content.items():
        match = KEY.fullmatch(key)
        if not match:
            raise InputError(f"{path} holds {key!r}; known: x, y, x0, x1, x_train, y_train, kind")
        what, _, part = key.partition("_")
        found.append((int(what[1:] or 0), NAMES.get(part or "train", BARE), what, value))
    parts: dict[str, dict[str, Any]] = {"train": {}}
    for _, part, what, value in sorted(found, key=lambda entry: entry[0]):
        if what in parts.setdefault(part, {}):
            raise InputError(f"{path} holds {what} of {part} twice")
        parts[part][what] = value
    return parts
