"""What is imitated: the mean output of one model or several, kept on disk where it can be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.artifact import replacing
from compressor.errors import StageError, one_line
from compressor.loading.task import first
from compressor.task import Split
from compressor.training.evaluation import EVALUATED
from compressor.training.loop import Batch
from compressor.training.world import here

HELD = 2 << 30
"""Bytes of outputs that are kept on disk at most; a larger set is asked again at every batch."""


SEEN = 32
"""Examples that it is asked about to know whether what is kept is its own."""


class Teacher:
    """The ``models``, frozen and in eval mode. Several are averaged: of logits, that is the
    geometric mean of their distributions."""

    def __init__(self, models: Sequence[nn.Module], device: torch.device) -> None:
        self.models = [model.to(device).eval().requires_grad_(False) for model in models]
        self.device = device
        self._kept: NDArray[Any] | None = None

    def returned(self, batch: Batch) -> Any:
        """What it says to a batch, without a gradient: all that a single model returned, but the
        first output, shape ``(n, ...)``, of several together and of what was kept."""
        if self._kept is not None:
            return torch.from_numpy(self._kept[batch.at]).to(self.device, non_blocking=True)
        return self._asked(batch.inputs)

    def _asked(self, inputs: tuple[Tensor, ...]) -> Any:
        with torch.no_grad():
            if len(self.models) == 1:
                return self.models[0](*inputs)
            return torch.stack([first(model(*inputs)) for model in self.models]).mean(dim=0)

    def keep(self, split: Split, path: Path) -> bool:
        """Reads the whole split once and keeps the outputs in ``path``, a ``.npy`` file; takes what
        is there already. Afterwards batches are looked up by position, which holds for examples as
        they are in the split only. Gives whether it is so: false beyond :data:`HELD` bytes."""
        spread = np.linspace(0, len(split) - 1, min(len(split), SEEN)).astype(np.intp)
        one = self._on(split, spread)
        if one[:1].nbytes * len(split) > HELD:
            return False
        world = here()
        shape = (len(split), *one.shape[1:])
        fits = world.gathered(torch.tensor([_fits(path, one, spread, shape)]), world.size)
        if not fits.all():  # a follower's went with its process
            size = max(1, EVALUATED // max(sum(part.nbytes for part in split.head(1)[0]), 1))
            size = min(size, 256) * world.size
            try:
                with replacing(path) as beside:
                    _write(self, split, beside, shape, one.dtype, size)
            except OSError as error:
                raise StageError(
                    f"the teacher's outputs ({np.prod(shape) * one.itemsize:,} bytes) cannot be "
                    f"kept in {path.parent}: {one_line(error)}"
                ) from error
        self._kept = np.load(path, mmap_mode="r", allow_pickle=False)
        return True

    def _on(self, split: Split, at: slice | NDArray[np.intp]) -> NDArray[Any]:
        inputs, _ = split.fetch(split.indices[at])
        asked = self._asked(tuple(torch.from_numpy(part).to(self.device) for part in inputs))
        return first(asked).cpu().numpy()


def _write(
    teacher: Teacher, split: Split, path: Path, shape: tuple[int, ...], dtype: Any, size: int
) -> None:
    """All outputs into a new file, ``size`` at a time over all processes."""
    world = here()
    head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    # Not through a mapped file: a full disk is a bus error there, which nothing can catch.
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, head)
        for start in range(0, len(split), size):
            count = min(size, len(split) - start)
            mine = world.mine(np.arange(start, start + count))
            own = teacher._on(split, mine) if len(mine) else np.zeros((0, *shape[1:]), dtype)
            file.write(world.gathered(torch.from_numpy(own), count).numpy().tobytes())


def _fits(path: Path, said: NDArray[Any], at: NDArray[np.intp], shape: tuple[int, ...]) -> bool:
    """Whether ``path`` holds an array of this shape that has ``said`` at these positions."""
    try:
        kept = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    # Batches of another size round otherwise.
    near = 1e-3 * float(np.abs(said).max(initial=0))
    return bool(kept.shape == shape and np.allclose(kept[at], said, rtol=1e-3, atol=near))
