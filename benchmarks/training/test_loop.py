"""What the training loop costs beside one that is written by hand: ratios of one run, in turns."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from compressor import zoo
from compressor.data import read
from compressor.measure.threads import threads_for
from compressor.metrics import METRICS
from compressor.task import Split, Splits
from compressor.training.loop import fit
from compressor.training.recovery import from_labels
from compressor.training.settings import Training

BATCH, EPOCHS, TURNS = 64, 8, 5
RATE = 3e-3


def held(source: str) -> Splits:
    """The data in memory: what reading costs is in benchmarks/data."""

    def arrays(split: Split) -> Split:
        inputs, targets = split.head(len(split))
        return Split.arrays(inputs, targets)

    whole = read(source).splits
    return Splits(*map(arrays, (whole.train, whole.validate, whole.calibrate, whole.test)))


def ours(model: nn.Module, splits: Splits) -> None:
    """Every default of the loop, and evaluation after every epoch."""
    fit(
        model,
        splits,
        from_labels("classification"),
        Training(epochs=EPOCHS, learning_rate=RATE, batch_size=BATCH),
        metric=("accuracy", METRICS["classification"]["accuracy"]),
        seed=0,
    )


def bare(model: nn.Module, splits: Splits, *, fused: bool = False) -> None:
    """The same steps and evaluations, with nothing around them; Adam as one writes it, or
    ``fused`` as ours is."""
    (inputs,), labels = splits.train.head(len(splits.train))
    (others,), wanted = splits.validate.head(len(splits.validate))
    x, y, seen, known = map(torch.from_numpy, (inputs, labels, others, wanted))
    steps = math.ceil(len(x) / BATCH)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE, fused=fused or None)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, RATE, total_steps=EPOCHS * steps, pct_start=0.2
    )

    def judged() -> float:
        model.eval()
        with torch.no_grad():
            parts = zip(seen.split(256), known.split(256), strict=True)
            return sum(float((model(a).argmax(1) == b).sum()) for a, b in parts)

    best, kept = judged(), copy.deepcopy(model.state_dict())
    for _ in range(EPOCHS):
        model.train()
        total = 0.0
        for at in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(model(x[at]), y[at])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(at)
        if (reached := judged()) > best:
            best, kept = reached, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)


@pytest.mark.parametrize(
    ("name", "source"), [("cnn", "digits?size=28"), ("lstm", "digits-rows"), ("mlp", "digits-rows")]
)
def test_beside_a_bare_loop(benchmark: BenchmarkFixture, name: str, source: str) -> None:
    """Examples a second of ours, as a share of the bare loop's; medians of turns."""
    splits = held(source)
    shape = splits.train.head(1)[0][0].shape[1:]
    if name == "mlp":
        start: nn.Module = nn.Sequential(
            nn.Flatten(), zoo.build("mlp", {"features": 64, "outputs": 10})
        )
    else:
        start = zoo.build(name, zoo.arguments_for(name, shape, 10))
    ways: dict[str, Callable[[nn.Module, Splits], None]] = {
        "bare": bare,
        "fused": partial(bare, fused=True),
        "ours": ours,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}

    def turn() -> None:
        for way, trained in ways.items():
            torch.manual_seed(0)
            model = copy.deepcopy(start)
            began = time.perf_counter()
            trained(model, splits)
            seconds[way].append(time.perf_counter() - began)

    steps = EPOCHS * math.ceil(len(splits.train) / BATCH)
    with threads_for(start, splits.train.head(1)[0], BATCH):
        benchmark.pedantic(turn, rounds=TURNS, warmup_rounds=1)
    medians = {way: statistics.median(found[1:]) for way, found in seconds.items()}
    facts: dict[str, Any] = {
        f"{way}, examples a second": round(EPOCHS * len(splits.train) / took)
        for way, took in medians.items()
    }
    for way in ("bare", "fused"):
        pairs = np.divide(seconds[way][1:], seconds["ours"][1:])
        facts[f"ours, times {way}, median of pairs"] = round(float(np.median(pairs)), 3)
        more = 1e6 * (medians["ours"] - medians[way]) / steps
        facts[f"microseconds more a step than {way}"] = round(more, 1)
    benchmark.extra_info.update(facts)
    print(f"\n{name}: {facts}")
