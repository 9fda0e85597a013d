"""What a child hands back: one safetensors file in memory, which the parent believes nothing of.

Its header has JSON that names the tensors; their bytes are aligned, and those of a tensor that has
several names are there once.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compressor.errors import InputError, one_line
from compressor.guard import server

LARGEST_HEADER = 8 << 20
"""Bytes of names, shapes and descriptions: as Python's own objects they take some 20 times that."""

ALIGNED = 64


def most(memory: int) -> int:
    """Bytes of a result whose tensors may take ``memory``."""
    return 8 + LARGEST_HEADER + memory


DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not re.search("q|bits|complex32", str(dtype))
}
"""What tensors may be of: neither quantized, which has scales beside, nor experimental."""


class Result:
    """Where a child writes: a file in memory, or one in a folder of its own."""

    def __enter__(self) -> Result:
        self.folder = None
        if server.FORKING:
            self.descriptor = os.memfd_create("result", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self.path = f"/proc/self/fd/{self.descriptor}"
        else:
            self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            self.path = str(Path(self.folder.name) / "result.safetensors")
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is None:
            os.close(self.descriptor)
        else:
            self.folder.cleanup()

    def emptied(self) -> None:
        """Without what a child has written."""
        os.ftruncate(self.descriptor, 0)

    def taken(self, most: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The JSON and the tensors of the file, each checked against the other."""
        from safetensors import safe_open

        if self.folder is None:
            import fcntl

            # Nobody may change it any more: this fails where somebody still could.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
        with Path(self.path).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER or Path(self.path).stat().st_size > most:
            raise ValueError("more than it may")
        with safe_open(self.path, framework="pt") as file:
            said = json.loads(file.metadata()["compressor"])
            blobs = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if "error" in said:
            return {"error": str(said["error"])}, {}
        if self.folder is not None:  # the file goes, and with it what it maps
            blobs = {key: blob.clone() for key, blob in blobs.items()}
        made: dict[tuple[str, str, tuple[int, ...]], torch.Tensor] = {}
        state = {}
        for name, key, dtype, shape in said["tensors"]:
            which = (key, dtype, tuple(shape))
            if which not in made:
                made[which] = _tensor(blobs[key], DTYPES[dtype], which[2])
            state[str(name)] = made[which]
        if len(state) != len(said["tensors"]) or type(said["said"]) is not dict:
            raise ValueError("names that stand twice, or no names")
        return {"said": said["said"]}, state


def _tensor(blob: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The bytes ``blob`` as a tensor, which they have to fill up to the alignment."""
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise ValueError("a shape that is none")
    taken = math.prod(shape) * dtype.itemsize
    if blob.dtype is not torch.uint8 or blob.numel() != _round(taken):
        raise ValueError(f"{blob.numel()} bytes for {taken}")
    return blob[:taken].view(dtype).reshape(shape) if taken else torch.empty(shape, dtype=dtype)


def _round(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


# What a child does.


def write(
    descriptor: int, path: Path, said: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> None:
    keys: dict[tuple[Any, ...], str] = {}
    listed, blobs = [], []
    for name, tensor in state.items():
        _check(path, name, tensor)
        which = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(),
                 tensor.is_neg())  # fmt: skip
        if which not in keys:
            keys[which] = str(len(keys))
            blobs.append(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        listed.append((name, keys[which], dtype, tuple(tensor.shape)))
    sizes = [tensor.numel() * tensor.dtype.itemsize for tensor in blobs]
    try:
        head = header({"said": dict(said), "tensors": listed}, sizes)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} describes itself in values that are not plain ({one_line(error, 80)}): save "
            "it with numbers, texts, lists and dicts"
        ) from None
    if len(head) > LARGEST_HEADER:
        raise InputError(
            f"{path} describes itself in {len(head):,} bytes: {LARGEST_HEADER:,} are allowed"
        )
    put(descriptor, head)
    for tensor, size in zip(blobs, sizes, strict=True):
        if size:
            dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
            put(descriptor, dense.reshape(-1).view(torch.uint8).numpy())
            put(descriptor, bytes(_round(size) - size))


def _check(path: Path, name: Any, tensor: Any) -> None:
    if type(name) is not str or not isinstance(tensor, torch.Tensor):
        raise InputError(
            f"{path} holds {name!r:.60}, a {type(tensor).__name__}: save tensors by their names"
        )
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_nested or str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        kind = f"{tensor.layout} {tensor.dtype} on {tensor.device}".replace("torch.", "")
        raise InputError(f"{path}: {name!r:.60} is {kind}: save dense tensors of numbers")


def header(said: Mapping[str, Any], sizes: Sequence[int]) -> bytes:
    """The start of a safetensors file: ``said``, and a blob for each of ``sizes``, numbered."""
    ends = [0, *itertools.accumulate(map(_round, sizes))]
    entries = {
        str(at): {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for at, (start, end) in enumerate(itertools.pairwise(ends))
    }
    text = json.dumps({"__metadata__": {"compressor": json.dumps(said)}, **entries}).encode()
    text += b" " * (_round(8 + len(text)) - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


def put(descriptor: int, data: Any) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]  # one call writes 2 GB at most
