"""How often the gate fails on made-up streams of calls: false alarms, and slow-downs it finds.

``python benchmarks/gate/simulation.py --trials 200 --out simulation.json``

The decision and its bootstrap are the real ones (``pipeline.remeasure.slower``); only the workers
are replaced. Streams have the structure that ``measure.protocol`` gives in quick mode for a model
of 1 ms: blocks of 8 calls, rounds of one block of each file in random order, 3 starts of the
workers in a look. For comparison, gates as people write them look at the same kinds of streams, but
at one file after the other.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.pipeline import remeasure
from compressor.pipeline.remeasure import PROCESSES, Look, slowdown, slower
from compressor.report.table import render

CALLS, ROUNDS = 8, 32
"""Calls in a block and rounds in each start of the workers: 8 ms, and 0.8 s of each file."""

LIMIT = 0.05
SLOWDOWNS = (1.0, 1.03, 1.05, 1.10, 1.20)

Random = np.random.Generator
Times = NDArray[np.float64]
Stream = Callable[[Random], Times]
"""Milliseconds of a look, shape ``(2, PROCESSES, ROUNDS, CALLS)``: two files that are the same."""


def calls(rng: Random, spread: float = 0.05) -> Times:
    """Log-normal noise of each call around 1 ms; the spread is the standard deviation."""
    return np.exp(spread * rng.standard_normal((2, PROCESSES, ROUNDS, CALLS)))


def machine(rng: Random, factors: Times) -> Times:
    """What the machine does as time passes, ``(2 * PROCESSES * ROUNDS,)`` by block, as each file
    meets it: in every round one of the two comes first."""
    rounds = factors.reshape(-1, 2)
    order = rng.permuted(np.tile([0, 1], (len(rounds), 1)), axis=1)
    return np.take_along_axis(rounds, order, axis=1).T.reshape(2, PROCESSES, ROUNDS, 1)


def spells(rng: Random, blocks: int, length: float, share: float) -> NDArray[np.bool_]:
    """On and off in turns: on for ``length`` blocks on average, and for ``share`` of the time."""
    state = bool(rng.random() < share)
    found: list[bool] = []
    while len(found) < blocks:
        mean = length if state else length * (1 - share) / share
        found += [state] * int(rng.geometric(1 / mean))
        state = not state
    return np.array(found[:blocks])


BLOCKS = 2 * PROCESSES * ROUNDS


def normal(rng: Random) -> Times:
    """Normal noise of 5 %."""
    return 1 + 0.05 * rng.standard_normal((2, PROCESSES, ROUNDS, CALLS)).clip(-4, 4)


def tails(rng: Random) -> Times:
    """Log-normal noise of 20 %, and 3 % of the calls take far longer (Pareto, no variance)."""
    times = calls(rng, 0.2)
    late = rng.random(times.shape) < 0.03
    return np.where(late, times * (1 + rng.pareto(1.2, times.shape)), times)


def drift(rng: Random) -> Times:
    """The machine becomes up to 30 % faster or 50 % slower, and sways by 10 %."""
    at = np.linspace(0, 1, BLOCKS)
    sway = 0.1 * np.sin(2 * np.pi * (rng.uniform(1, 5) * at + rng.random()))
    return calls(rng) * machine(rng, 1 + rng.uniform(-0.3, 0.5) * at + sway)


def starts(by: float) -> Stream:
    """Two modes: every second start of a process is slower by this share, each file's its own."""

    def stream(rng: Random) -> Times:
        slow = rng.random((2, PROCESSES, 1, 1)) < 0.5
        return calls(rng) * np.where(slow, 1 + by, 1.0)

    return stream


def periods(by: float) -> Stream:
    """Two modes: each file is slower by this share half the time, for 10 blocks on average."""

    def stream(rng: Random) -> Times:
        own = [spells(rng, PROCESSES * ROUNDS, 10, 0.5) for _ in range(2)]
        slow = np.stack(own).reshape(2, PROCESSES, ROUNDS, 1)
        return calls(rng) * np.where(slow, 1 + by, 1.0)

    return stream


def neighbour(rng: Random) -> Times:
    """A neighbour that takes 60 % more time from both, 30 % of the time, for 20 blocks."""
    return calls(rng) * machine(rng, np.where(spells(rng, BLOCKS, 20, 0.3), 1.6, 1.0))


def bursts(rng: Random) -> Times:
    """A neighbour's bursts that hit one block alone, every fifth, by 80 %."""
    return calls(rng) * machine(rng, np.where(rng.random(BLOCKS) < 0.2, 1.8, 1.0))


STREAMS: dict[str, Stream] = {
    "normal noise": normal,
    "heavy tails": tails,
    "drift": drift,
    "two modes by start, 10 %": starts(0.1),
    "two modes by start, 20 %": starts(0.2),
    "two modes by period, 30 %": periods(0.3),
    "two modes by period, 60 %": periods(0.6),
    "neighbour, both": neighbour,
    "neighbour, one": bursts,
}


def look(stream: Stream, rng: Random, true: float) -> Look:
    """A look at two files of which the new one takes ``true`` times as long."""
    old, new = stream(rng).reshape(2, -1, CALLS)
    return Look(old.tolist(), (true * new).tolist(), (ROUNDS,) * PROCESSES)


def gate(stream: Stream, rng: Random, true: float) -> str:
    """Ours."""
    first = look(stream, rng, true)
    return slower(first, lambda: look(stream, rng, true), LIMIT).said


def once(stream: Stream, rng: Random, true: float) -> str:
    """Ours without its second round, and without more time for what is in doubt."""
    found = slowdown([look(stream, rng, true)])
    return "slower" if found["low"] > 1 + LIMIT else "ok"


def apart(figure: Callable[[Times], np.floating[Any]], count: int) -> Callable[..., str]:
    """A gate that compares one figure of ``count`` calls in a row, old in one job, new in another.

    It fails where the new one is more than the limit above the old one.
    """

    def decide(stream: Stream, rng: Random, true: float) -> str:
        old, new = (stream(rng)[0, 0].reshape(-1)[:count] for _ in range(2))
        return "slower" if figure(true * new) > (1 + LIMIT) * figure(old) else "ok"

    return decide


# The last two are what --benchmark-compare-fail=mean:5% and min:5% of pytest-benchmark decide by.
GATES: dict[str, Callable[[Stream, Random, float], str]] = {
    "compressor": gate,
    "compressor, first look alone": once,
    "mean of 20 calls": apart(np.mean, 20),
    "mean of 256 calls": apart(np.mean, ROUNDS * CALLS),
    "minimum of 256 calls": apart(np.min, ROUNDS * CALLS),
}


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    z = 1.959964
    middle, share = 1 + z * z / trials, hits / trials
    reach = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    low, high = (share + z * z / (2 * trials) + sign * reach for sign in (-1, 1))
    return max(0.0, low / middle), min(1.0, high / middle)


def cell(name: str, kind: str, true: float, trials: int, seed: int) -> dict[str, Any]:
    """How often one gate failed on one kind of stream with one true slow-down."""
    seeds = np.random.SeedSequence([seed, *map(ord, f"{name}{kind}{true}")]).spawn(trials)
    said = [GATES[name](STREAMS[kind], np.random.default_rng(each), true) for each in seeds]
    low, high = wilson(said.count("slower"), trials)
    return {
        "gate": name,
        "stream": kind,
        "slowdown": true,
        "trials": trials,
        "failed": said.count("slower"),
        "inconclusive": said.count("inconclusive"),
        "low": low,
        "high": high,
    }


def table(cells: list[dict[str, Any]], name: str) -> str:
    """Share that failed in per cent, with its interval, by stream and true slow-down."""
    found = {(one["stream"], one["slowdown"]): one for one in cells if one["gate"] == name}
    rows = [
        [kind, *(_share(found[kind, true]) for true in SLOWDOWNS)]
        for kind in STREAMS
        if (kind, SLOWDOWNS[0]) in found
    ]
    return render([name, *(f"{true:.2f}x" for true in SLOWDOWNS)], rows, markdown=True)


def _share(one: dict[str, Any]) -> str:
    share = 100 * one["failed"] / one["trials"]
    return f"{share:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"


def main() -> None:
    """Runs every cell, prints the tables, and writes the counts."""
    asks = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    asks.add_argument("--trials", type=int, default=200, help="of each cell (default 200)")
    asks.add_argument("--gates", nargs="+", choices=list(GATES), default=list(GATES))
    asks.add_argument("--streams", nargs="+", choices=list(STREAMS), default=list(STREAMS))
    asks.add_argument("--more", type=int, default=remeasure.MORE, help="looks added in doubt")
    asks.add_argument("--seed", type=int, default=0)
    asks.add_argument("--out", type=Path, help="JSON of the counts")
    given = asks.parse_args()
    remeasure.MORE = given.more
    began, cells = time.monotonic(), []
    print(f"% of {given.trials} trials that failed at a limit of {LIMIT:.0%}, [95 % interval]\n")
    for name in given.gates:
        cells += [
            cell(name, kind, true, given.trials, given.seed)
            for kind in given.streams
            for true in SLOWDOWNS
        ]
        print(table(cells, name), end="\n\n", flush=True)
    print(f"{time.monotonic() - began:.0f} s")
    if given.out:
        given.out.write_text(json.dumps({"limit": LIMIT, "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
