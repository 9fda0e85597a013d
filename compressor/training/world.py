"""Several processes that train together, as ``torchrun`` starts them; one alone is a world of 1.

Every process runs the same command. The *leader* (rank 0) does the run; the others *follow*: they
wait until it trains, and then run the same stage on the same artifact, with their share of every
batch. Outside of that :func:`here` is a world of one, so that whatever the leader does on its own
never waits for anybody.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from compressor.errors import InputError, StageError, one_line
from compressor.interrupt import stop

MEETING = timedelta(minutes=1)
"""How long processes look for each other when they start."""

WORD = timedelta(seconds=10)
"""How long one that failed waits to hear whether the others did too, which then come to it within
the same step."""

PATIENCE = timedelta(days=7)
"""How long a process waits for another: the leader may measure for hours. One that died is noticed
at once, since its connections close."""


@dataclass(frozen=True)
class World:
    """``size`` processes, of which this one is ``rank``; ``local`` counts those of this machine
    and ``place`` is this one's number among them. ``store`` holds what they say without waiting."""

    rank: int = 0
    size: int = 1
    local: int = 1
    place: int = 0
    store: Any = None

    @property
    def leader(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def mine(self, positions: Any) -> Any:
        """This process's share of a sequence: every ``size``-th of it."""
        return positions[self.rank :: self.size]

    def sums(self, *values: Tensor) -> None:
        """Adds up tensors of all processes, in place."""
        if self.size > 1:
            for value in values:
                dist.all_reduce(value)

    def alike(self, values: Iterable[Tensor]) -> None:
        """Makes tensors what the leader has, in place."""
        if self.size > 1:
            for value in values:
                dist.broadcast(value, 0)

    def gathered(self, mine: Tensor, count: int) -> Tensor:
        """The ``count`` rows of which every process computed :meth:`mine`, in their own order."""
        if self.size == 1:
            return mine
        longest = -(-count // self.size)
        padded = mine.new_zeros((longest, *mine.shape[1:]))
        padded[: len(mine)] = mine
        raw = padded.view(torch.uint8)  # gloo knows no 16-bit integers
        parts = [torch.empty_like(raw) for _ in range(self.size)]
        dist.all_gather(parts, raw)
        whole = [part.view(mine.dtype) for part in parts]
        return torch.stack(whole, dim=1).flatten(0, 1)[:count]

    def met(self, name: str, *, failed: bool = False) -> None:
        """Waits for all processes to come to ``name``. One that ``failed`` waits for the others'
        word first, and not long: those that still train wait for it in what it does no more."""
        if self.size == 1:
            return
        self.store.set(f"met/{name}/{self.rank}", "")
        if failed:
            self.store.wait([f"met/{name}/{rank}" for rank in range(self.size)], WORD)
        self.sums(torch.zeros(1))

    def told(self, given: Any) -> Any:
        """What the leader gave, in every process."""
        if self.size == 1:
            return given
        held = [given]
        try:
            dist.broadcast_object_list(held, src=0)
        except RuntimeError as error:
            raise Lost(GONE) from error
        return held[0]


ALONE = World()
_CURRENT: ContextVar[World] = ContextVar("world", default=ALONE)


def here() -> World:
    """The processes that work on what is being done now."""
    return _CURRENT.get()


GONE = (
    "another process of this run is gone: its own messages say why; the same command goes on from "
    "the last epoch"
)


class Lost(StageError):
    """Another process of the run died: nothing can be trained on without it."""


@contextmanager
def staged(world: World, name: str) -> Iterator[None]:
    """:func:`together` for the whole stage ``name``, at whose end all meet, failed or not.

    One that failed alone ends, and so do the others: they would wait for it for ever.
    """
    try:
        with together(world):
            yield
    except Lost:
        raise
    except Exception as error:
        try:
            world.met(name, failed=True)
        except RuntimeError:
            raise Lost(f"process {world.rank} failed alone: {one_line(error)}") from error
        raise
    with together(world):
        world.met(name)


@contextmanager
def together(world: World) -> Iterator[None]:
    """Inside, :func:`here` is ``world``; one of the others that dies is one clear line."""
    token = _CURRENT.set(world)
    try:
        yield
    except RuntimeError as error:  # of gloo or NCCL, whose types are no others
        if world.size > 1 and _lost(error):
            raise Lost(GONE) from error
        raise
    finally:
        _CURRENT.reset(token)


def _lost(error: RuntimeError) -> bool:
    said = str(error).lower()
    signs = ("gloo", "nccl", "connection", "socket", "closed by peer", "reset by peer")
    return isinstance(error, dist.DistError) or any(sign in said for sign in signs)


@contextmanager
def joined(asked: int | None = None) -> Iterator[World]:
    """Joins the processes that ``torchrun`` started; a world of one where it started none.

    ``asked`` is how many the user wants. Raises :class:`InputError` where there are others: a
    launcher that silently starts one process leaves every other core or machine idle.
    """
    try:
        size = int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise InputError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: give a number, or unset it"
        ) from None
    if asked is not None and asked != size:
        raise InputError(
            f"--processes {asked}: {size} run{'s' if size == 1 else ''} here; start them with "
            f"torchrun --nproc-per-node {asked} -m compressor run ..."
        )
    if size == 1:
        yield ALONE
        return
    place = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(place % torch.cuda.device_count())
    try:
        # What is said goes over gloo; what is computed over the backend of its device.
        store, rank, size = next(rendezvous("env://", timeout=MEETING))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the {size} processes that WORLD_SIZE names do not find each other "
            f"({one_line(error, 160)}): start them with torchrun"
        ) from None
    before = signal.signal(signal.SIGTERM, _ended)
    try:
        yield World(
            dist.get_rank(),
            dist.get_world_size(),
            int(os.environ.get("LOCAL_WORLD_SIZE", size)),
            place,
            store,
        )
    except (Lost, KeyboardInterrupt):
        before = signal.SIG_IGN  # the launcher ends this one as well, and it has something to say
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()
        # What still holds the group goes now: its threads abort where they meet the interpreter's
        # end, as one start in thirty did.
        gc.collect()


def _ended(number: int, frame: Any) -> None:
    # The launcher ends all processes when one has died. No ``except Exception`` on the way may
    # take this for an error of its own.
    stop("torchrun ended it")


def reduced(gradients: Sequence[Tensor | None], world: World) -> None:
    """Means over the processes, in place, of gradients that no wrapper takes care of."""
    for gradient in gradients:
        if gradient is not None and world.size > 1:
            dist.all_reduce(gradient)
            gradient /= world.size
