"""What lies in a file that ``torch.save`` or ``torch.export.save`` wrote, and its tensors.

PyTorch stores everything as it is. What is compressed, overlaps or repeats itself is a file that
would take more memory than it is long, and is refused.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import InputError, one_line
from compressor.loading.graph.classes import shown

MOST = 200_000
"""Entries of an archive."""

LONGEST = 1 << 26
"""Bytes of an entry that is parsed: a pickle or JSON."""

BUDGET = 4
"""Bytes of tensors for each byte of their file: views and tied weights may share what is stored."""


class Archive:
    """The entries of a zip file, or of one in another as ``data``, by their names below its folder.

    Raises :class:`InputError` for a file that is no such archive or could need more memory than it
    is long.
    """

    def __init__(self, path: Path, data: bytes | None = None) -> None:
        self.path, self.data = path, data
        try:
            with self._open() as file:
                found = file.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
            raise InputError(f"{path} is damaged ({one_line(error, 80)}): save it again") from None
        self.size = path.stat().st_size if data is None else len(data)
        self.entries: dict[str, zipfile.ZipInfo] = {}
        for entry in found:
            _, _, name = entry.filename.partition("/")
            parts = entry.filename.split("/")
            if not name or ".." in parts or "" in parts or "\\" in entry.filename:
                raise self.broken(f"it has an entry {entry.filename!r:.60}")
            if name in self.entries:
                raise self.broken(f"it has two entries {name!r:.60}")
            self.entries[name] = entry
        if len({entry.filename.partition("/")[0] for entry in found}) > 1:
            raise self.broken("it has more than one folder")
        if len(found) > MOST or sum(entry.compress_size for entry in found) > self.size:
            raise self.broken("it claims to hold more than its bytes")
        if "byteorder" in self.entries and self.read("byteorder") != b"little":
            raise self.broken("its numbers are big-endian")

    def _open(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path if self.data is None else io.BytesIO(self.data))

    def broken(self, why: str) -> InputError:
        """The error for a file that PyTorch did not write so."""
        return InputError(f"{self.path} is not as PyTorch saves a file ({why}): save it again")

    def read(self, name: str, longest: int | None = None) -> bytes:
        """The bytes of an entry, whose checksum they match."""
        if name not in self.entries:
            raise self.broken(f"it has no {name!r:.60}")
        entry = self.entries[name]
        # PyTorch compresses the source of TorchScript programs only, which is not read here.
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise self.broken(f"its entry {name!r:.60} is compressed")
        if longest is not None and entry.file_size > longest:
            raise self.broken(f"its {name!r:.60} is longer than {longest:,} bytes")
        try:
            with self._open() as file:
                return file.read(entry)
        except (zipfile.BadZipFile, ValueError, RuntimeError, OSError, EOFError) as error:
            raise self.broken(one_line(error, 80)) from None

    def json(self, name: str) -> Any:
        """An entry that is JSON."""
        try:
            return json.loads(self.read(name, LONGEST))
        except (ValueError, RecursionError) as error:
            raise self.broken(f"{name}: {one_line(error, 80)}") from None


def flat(data: bytes, dtype: torch.dtype) -> Tensor:
    """Raw little-endian bytes as a tensor of one axis."""
    if not data:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype)


def strided(stored: Tensor, offset: Any, sizes: Any, strides: Any) -> Tensor:
    """A view of stored numbers, checked: it lies inside them and shows none of them twice.

    Raises :class:`ValueError` for another: PyTorch would read on, or fill the memory.
    """
    numbers = [offset, *_numbers(sizes), *_numbers(strides)]
    if not all(type(at) is int and 0 <= at < 2**48 for at in numbers) or len(sizes) != len(strides):
        raise ValueError(f"a tensor has the shape {shown(sizes)}")
    if not math.prod(sizes):
        if any(n > stored.numel() + 2**20 for n in sizes):
            raise ValueError(f"a tensor has the shape {shown(sizes)}")
        return torch.empty(tuple(sizes), dtype=stored.dtype)
    reach, twice = 0, False
    for step, n in sorted(zip(strides, sizes, strict=True)):
        if n > 1:
            twice |= step <= reach
            reach += (n - 1) * step
    if twice or offset + reach >= stored.numel():
        raise ValueError(
            f"a tensor of shape {shown(tuple(sizes))} is not made of the {stored.numel():,} "
            "numbers that are stored: save contiguous tensors"
        )
    return stored.as_strided(tuple(sizes), tuple(strides), offset)


def _numbers(given: Any) -> Sequence[Any]:
    if type(given) not in (list, tuple, torch.Size):
        raise ValueError(f"{shown(given)} is no shape")
    return given  # type: ignore[no-any-return]
