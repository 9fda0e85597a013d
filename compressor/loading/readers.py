"""What reads files in a child, and what the parent makes of it."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from compressor import guard
from compressor.loading import checkpoint, pt2, torchfile
from compressor.loading.checkpoint import Described
from compressor.task import Input, Kind

Said = tuple[Mapping[str, Any], Mapping[str, Tensor]]

READERS = {
    "checkpoint": "compressor.loading.readers:_checkpoint",
    "listed": "compressor.loading.listed:read",
    "pickled": "compressor.loading.pickled:read",
    "pt2": "compressor.loading.readers:_pt2",
    "safetensors": "compressor.loading.readers:_safetensors",
}
"""What may read in a child: ``read(path) -> (plain JSON values, tensors by name)``."""

IMPORTS = {"pt2": ("torch._dynamo",)}


def guarded(kind: str, path: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``READERS[kind]`` reads from ``path``; see :func:`compressor.guard.guarded`."""
    return guard.guarded(READERS[kind], path, imports=IMPORTS.get(kind, ()), **options)


def read(path: Path, weights: str | None = None) -> Described:
    """What :func:`compressor.loading.checkpoint.read` says of ``path``, read by a child.

    Raises :class:`InputError`, one line, for all that it refuses and that the guard stops.
    """
    said, state = guarded("checkpoint", path, weights=weights)
    try:
        kind, data, source = said["kind"], said["data"], said["source"]
        if kind not in (None, *get_args(Kind)) or not isinstance(data, str | None):
            raise ValueError("its kind or data")
        return Described(
            state,
            None if source is None else torchfile.source_of(said),
            _inputs(said),
            kind,
            data,
            dict(said["about"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise guard.unsound(path, error) from None


def read_pt2(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], tuple[Input, ...]]:
    """What :func:`compressor.loading.pt2.read` says of ``path``, read by a child; errors as
    :func:`read`."""
    said, state = guarded("pt2", path)
    try:
        return dict(said["model"]), state, _inputs(said)
    except (KeyError, TypeError, ValueError) as error:
        raise guard.unsound(path, error) from None


def _inputs(said: Mapping[str, Any]) -> tuple[Input, ...]:
    return tuple(
        checkpoint._input({**given, "shape": [1, *given["shape"]]}) for given in said["inputs"]
    )


def _checkpoint(path: Path, weights: str | None = None) -> Said:
    from torch.utils.serialization import config

    # Mapped, the file is copied once, into the result: 100 MB in two thirds of the time.
    with config.patch("load.mmap", _stored(path)):  # type: ignore[attr-defined]
        found = checkpoint.read(path, weights)
    return {
        "source": found.source,
        "inputs": [asdict(given) for given in found.inputs],
        "kind": found.kind,
        "data": found.data,
        "about": found.about,
    }, found.state


def _stored(path: Path) -> bool:
    """Whether the bytes of tensors lie in ``path`` as they are: an archive without compression."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return False  # an older format, or a damaged file, which loading will find


def _safetensors(path: Path) -> Said:
    found = torchfile.header(path)
    state = checkpoint._safetensors(path) if found is None else torchfile.tensors_in(path, found)
    return {"header": found}, state


def _pt2(path: Path) -> Said:
    description, state, inputs = pt2.read(path)
    return {"model": description, "inputs": [asdict(given) for given in inputs]}, state
