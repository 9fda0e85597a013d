"""Arrays in a NumPy ``.npz`` file."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from compressor.data.live import NAMES, Data, adopt
from compressor.errors import InputError, one_line

KEY = re.compile(rf"(?P<what>x(?P<at>\d*)|y)(_(?P<part>{'|'.join(NAMES)}))?")


def arrays(location: str, seed: int) -> Data:
    """Data from a file that ``numpy.savez`` wrote.

    Its keys are ``x`` and ``y``, to be split, or ``x_train``, ``y_train`` and the like for
    ``validate``, ``calibrate`` and ``test``. Several inputs are ``x0``, ``x1``, ... (``x0_train``).
    ``kind`` may say the kind of task. Pickled objects are refused. See :func:`adopt` for dtypes.

    Raises :class:`InputError` for a file that is missing or no such archive, and for other keys.
    """
    path = Path(location).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is no npz file: write one with numpy.savez")
    try:
        # Opened here because NumPy leaves a broken file open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            content = {key: file[key] for key in file.files}
    except Exception as error:  # NumPy, zipfile and zlib raise a dozen types on a broken file
        raise InputError(f"{path} cannot be read: {one_line(error)}") from None

    given: dict[str, Any] = {}
    if "kind" in content:
        given["kind"] = str(content.pop("kind"))
    for part, values in _parts(content, path).items():
        inputs = [value for what, value in values.items() if what != "y"]
        if "y" not in values or not inputs:
            raise InputError(f"{path} needs x and y for {part}; it holds {', '.join(content)}")
        given[part] = (tuple(inputs), values["y"])
    return adopt(given, seed)


def _parts(content: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The arrays of each part, inputs by number."""
    found = []
    for key, value in content.items():
        match = KEY.fullmatch(key)
        if not match:
            raise InputError(f"{path} holds {key!r}; known: x, y, x0, x1, x_train, y_train, kind")
        found.append((int(match["at"] or 0), match["part"] or "train", match["what"], value))
    parts: dict[str, dict[str, Any]] = {"train": {}}
    for _, part, what, value in sorted(found, key=lambda entry: entry[0]):
        if what in parts.setdefault(NAMES[part], {}):
            raise InputError(f"{path} holds {what} of {NAMES[part]} twice")
        parts[NAMES[part]][what] = value
    return parts
