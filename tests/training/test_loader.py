"""Batches are the same however they are read, and nothing that reads them outlives them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from compressor.data import adopt, read
from compressor.data.demand import OnDemand
from compressor.errors import InputError
from compressor.task import Array, Batch, Split
from compressor.training import loader
from compressor.training.loader import automatic, batches, resident, steady

Positions = NDArray[np.intp]


def on_demand(count: int, read_one: Callable[[int], Any] = float, parallel: bool = True) -> Split:
    """Examples that say who they are, in an order of their own."""

    def fetch(at: Positions) -> Batch:
        x = np.array([[read_one(int(position))] for position in at], np.float32)
        return (x, -x), at * 2

    return Split(OnDemand(fetch, parallel=parallel), np.arange(count)[::-1])


def steps_of(count: int, size: int) -> list[Positions]:
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


def loaders() -> set[str]:
    return {each.name for each in threading.enumerate() if each.name.startswith("batches")}


@given(
    st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=7), max_size=12),
    st.integers(0, 5),
)
def test_the_same_batches_for_any_number_of_workers(steps: list[list[int]], workers: int) -> None:
    split = on_demand(30, lambda at: time.sleep(1e-4 * (at % 3)) or at / 7)
    wanted = [split.fetch(split.indices[np.array(step)]) for step in steps]
    fed = list(batches(split, [np.array(step) for step in steps], workers=workers, pin=False))
    assert len(fed) == len(wanted)
    for (inputs, targets), (ours, told) in zip(fed, wanted, strict=True):
        assert [part.numpy().tobytes() for part in inputs] == [part.tobytes() for part in ours]
        assert targets.numpy().tobytes() == told.tobytes()
        assert {part.dtype for part in inputs} == {torch.float32}
    assert not loaders()


def test_positions_are_those_of_the_split() -> None:
    split = read("digits").splits.train
    at = np.array([5, 0, 700])
    ((x,), y), *_ = batches(split, [at], workers=0, pin=False)
    (wanted, *_), told = split.take(at).head(3)
    np.testing.assert_array_equal(x.numpy(), wanted)
    np.testing.assert_array_equal(y.numpy(), told)


def test_arrays_in_memory_are_not_copied_again() -> None:
    given_out = []

    def fetch(at: Positions) -> Batch:
        given_out.append(np.ones((len(at), 2), np.float32))
        return (given_out[-1],), at

    ((x,), _), *_ = batches(Split(fetch, np.arange(9)), [np.arange(9)], workers=0, pin=False)
    x[3, 1] = 7
    assert given_out[0][3, 1] == 7


def test_what_must_not_be_written_to_is_copied() -> None:
    fixed = np.broadcast_to(np.float32(3), (9, 2))
    split = Split(lambda at: ((fixed[: len(at)],), at), np.arange(9))
    ((x,), _), *_ = batches(split, [np.arange(9)], workers=0, pin=False)
    x[0, 0] = 5
    assert fixed[0, 0] == 3


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_at_its_step(workers: int) -> None:
    def one(at: int) -> float:
        if at == 29 - 11:
            raise InputError("picture 11 is broken")
        return at

    fed = batches(on_demand(30, one), steps_of(30, 3), workers=workers, pin=False)
    for _ in range(3):
        next(fed)
    with pytest.raises(InputError, match="picture 11 is broken"):
        next(fed)
    assert not loaders()
    assert next(fed, None) is None


@pytest.mark.parametrize("error", [GeneratorExit, KeyboardInterrupt])
def test_threads_end_when_the_loop_does(error: type[BaseException]) -> None:
    fed = batches(on_demand(300), steps_of(300, 3), workers=2, pin=False)
    next(fed)
    assert loaders()
    with contextlib.suppress(KeyboardInterrupt):
        if error is GeneratorExit:
            fed.close()  # type: ignore[attr-defined]
        else:
            fed.throw(error)  # type: ignore[attr-defined]
    assert not loaders()


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_is_read_ahead_than_is_said(workers: int) -> None:
    asked: list[int] = []
    split = on_demand(300, lambda at: asked.append(at) or at)
    fed = batches(split, steps_of(300, 1), workers=workers, pin=False)
    for taken in range(1, 20):
        next(fed)
        time.sleep(2e-3)
        assert taken <= len(asked) <= taken + 2 * workers
    fed.close()  # type: ignore[attr-defined]
    assert len(asked) < 30


def test_several_threads_read_at_once() -> None:
    both = threading.Barrier(2, timeout=60)
    split = on_demand(2, lambda at: both.wait() * 0 + at)
    assert len(list(batches(split, steps_of(2, 1), workers=2, pin=False))) == 2


def test_how_many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = threading.Lock(), []

    class Seeking:
        """A data set that goes wrong when it is asked twice at once."""

        def __len__(self) -> int:
            return 60

        def __getitem__(self, at: int) -> tuple[Array, int]:
            outside.append(inside.acquire(blocking=False))
            time.sleep(1e-4)
            inside.release()
            return np.array([at], np.float32), at % 3

    assert automatic(read("digits").splits.train) == 0
    assert automatic(adopt((np.zeros((9, 1)), np.arange(9) % 3)).splits.train) == 0
    train = adopt(Seeking()).splits.train
    for cores, pictures in ((1, 1), (3, 3), (64, 4)):
        monkeypatch.setattr(loader, "cores", lambda cores=cores: cores)
        assert automatic(on_demand(9)) == pictures
        assert automatic(train) == 1
    steps = steps_of(len(train), 4)
    assert sum(1 for _ in batches(train, steps, workers=automatic(train), pin=False)) == len(steps)
    assert all(outside)


@given(st.integers(1, 200), st.integers(0, 2))
def test_what_fits_is_read_once(count: int, spare: int) -> None:
    reads: list[int] = []
    split = on_demand(count, lambda at: reads.append(at) or at / 3)
    needs = count * (4 + 4 + 8)
    assert resident(split, needs - 1) is split
    held = resident(split, needs + spare)
    assert held.digest() == split.digest()
    reads.clear()
    at = np.arange(count)[::-2]
    (x, y), told = held.take(at).head(count)
    np.testing.assert_array_equal(x, -y)
    np.testing.assert_array_equal(told, split.take(at).head(count)[1])
    assert len(reads) == len(at)  # those of the comparison
    assert automatic(held) == 0


def test_what_is_in_memory_or_changes_stays_as_it_is() -> None:
    digits = read("digits").splits.train
    assert resident(digits, 1 << 30) is digits
    # A flip is seen in half of the looks at one example.
    draw = np.random.default_rng(0)
    for _ in range(8):
        flips = on_demand(90, lambda at: at + draw.integers(0, 2))
        assert resident(flips, 1 << 30) is flips


@pytest.mark.parametrize("later", [np.zeros((1, 1), np.float32), np.zeros((1, 4), np.float64)])
def test_examples_of_several_forms_are_not_squeezed_into_one(later: Array) -> None:
    def fetch(at: Positions) -> Batch:
        one = later if at.min() >= 64 else np.zeros((1, 4), np.float32)
        return (np.repeat(one, len(at), axis=0),), at

    split = Split(OnDemand(fetch), np.arange(128))
    assert resident(split, 1 << 30) is split


def test_pinning_asks_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: asked.append(self) or self)
    for there, workers, count in ((False, 0, 0), (False, 2, 0), (True, 0, 9), (True, 2, 9)):
        asked.clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert len(list(batches(on_demand(9), steps_of(9, 3), workers=workers, pin=True))) == 3
        assert len(asked) == count


def test_what_differs_when_it_is_read_again_is_not_steady() -> None:
    x, y = np.arange(40, dtype=np.float32)[:, None], np.arange(40) % 2
    still = Split.arrays(x, y)
    rng = np.random.default_rng(0)

    def shaken(at: Any) -> Any:
        (inputs,), targets = still.fetch(at)
        return (inputs + rng.random(),), targets

    assert steady(still)
    assert not steady(Split(shaken, np.arange(40)))
