"""IDX files, the format of the original MNIST (Y. LeCun, C. Cortes, C. Burges, 1998).

Two zero bytes, a byte for the type, a byte for the number of dimensions, each dimension as a
big-endian uint32, then the values, big-endian: http://yann.lecun.com/exdb/mnist/
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, Annotated

import numpy as np
from pydantic import Field

from compressor.data.images import enlarged
from compressor.data.live import Data, checked
from compressor.data.splitting import completed, fewer, partly
from compressor.errors import InputError, one_line
from compressor.task import Array, Batch, Split

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
BYTES_AT_MOST = 4 << 30
DIMENSIONS_AT_MOST = 64  # of a NumPy array

MEAN, DEVIATION = np.float32(0.1307), np.float32(0.3081)
"""Of the pixels of MNIST's 60,000 training images, in [0, 1]."""


def mnist(
    location: str,
    seed: int,
    *,
    train: Annotated[int, Field(ge=2)] | None = None,
    size: Annotated[int, Field(ge=28, le=256)] = 28,
    labelled: Annotated[float, Field(gt=0, le=1)] = 1,
) -> Data:
    """MNIST, or a set in its format, from a folder of the four files, gzipped or not.

    Inputs are float32 ``(1, size, size)``: ``(pixel / 255 - 0.1307) / 0.3081``. Classes are as
    many as the highest train label says. ``train`` keeps that many random examples of what
    ``validate`` leaves; ``labelled`` is the fraction of those that keep their label. Pixels stay
    bytes in memory until they are asked for.

    Raises :class:`InputError` for a missing or broken file.
    """
    folder = Path(location).expanduser()
    learn, labels = _pair(folder, "train", size)
    test, _ = _pair(folder, "t10k", size)
    splits = completed(learn, seed, labels=labels, test=test)
    if train is not None:
        splits = fewer(splits, train, seed)
    splits = partly(checked(splits), labels, labelled, seed)
    return Data("mnist", splits, "classification", int(labels.max()) + 1)


def read_idx(path: Path) -> Array:
    """The array in an IDX file, gzipped or not, in the machine's byte order.

    Raises :class:`InputError` when the file is no IDX file, holds fewer or more bytes than its
    header says, or announces more than 4 GiB. No more is read than the header announces.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not zipped:
                return _parsed(file, path)
            with gzip.open(file) as content:
                return _parsed(content, path)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from None


def _parsed(file: IO[bytes] | gzip.GzipFile, path: Path) -> Array:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in TYPES:
        raise InputError(f"{path} is no IDX file: it begins with {magic.hex(' ') or 'nothing'}")
    dtype, dimensions = np.dtype(TYPES[magic[2]]), magic[3]
    if not 1 <= dimensions <= DIMENSIONS_AT_MOST:
        raise InputError(f"{path} announces {dimensions} dimensions, not 1..{DIMENSIONS_AT_MOST}")
    header = file.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        raise InputError(f"{path} ends within its header: get the file again")
    shape = struct.unpack(f">{dimensions}I", header)
    announced = math.prod(shape) * dtype.itemsize
    if not 0 < announced <= BYTES_AT_MOST:
        raise InputError(
            f"{path} announces the shape {shape}, {announced} bytes; "
            f"more than 0 and at most {BYTES_AT_MOST} can be read"
        )
    content = bytearray()
    # By and by: a header may lie, and a small gzip file may hold a great many bytes.
    while chunk := file.read(min(1 << 20, announced + 1 - len(content))):
        content += chunk
    if len(content) != announced:
        held = f"more than {announced}" if len(content) > announced else f"only {len(content)}"
        raise InputError(
            f"{path} holds {held} bytes where its header says {announced}: get the file again"
        )
    values = np.frombuffer(content, dtype).reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=False)


def _pair(folder: Path, part: str, size: int) -> tuple[Split, Array]:
    """The images of ``train`` or ``t10k`` as a split, and their labels."""
    images, labels = read_idx(_file(folder, part, "images", 3)), _labels(folder, part)
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28):
        raise InputError(
            f"{part} images in {folder} are {images.dtype} of shape {images.shape}; "
            "expected uint8 of shape (n, 28, 28)"
        )
    if len(images) != len(labels):
        raise InputError(f"{folder} holds {len(images)} {part} images and {len(labels)} labels")

    def fetch(at: Array) -> Batch:
        pixels = images[at].astype(np.float32) / np.float32(255)
        return (enlarged((pixels - MEAN) / DEVIATION, size),), labels[at]

    return Split(fetch, np.arange(len(labels))), labels


def _labels(folder: Path, part: str) -> Array:
    """int64 class labels, shape ``(n,)``."""
    labels = read_idx(_file(folder, part, "labels", 1))
    if labels.dtype != np.uint8 or labels.ndim != 1:
        raise InputError(
            f"{part} labels in {folder} are {labels.dtype} of shape {labels.shape}; "
            "expected uint8 of shape (n,)"
        )
    return labels.astype(np.int64)


def _file(folder: Path, part: str, what: str, dimensions: int) -> Path:
    names = [
        f"{part}-{what}{mark}idx{dimensions}-ubyte{end}" for mark in "-." for end in ("", ".gz")
    ]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder} has none of {', '.join(names)}: give the folder of the MNIST files")
