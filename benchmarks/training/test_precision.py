"""Training in bf16 beside float32 on this CPU: ratios of examples a second in one run, in turns."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from compressor import zoo
from compressor.metrics import METRICS
from compressor.task import Split, Splits
from compressor.training.loop import fit
from compressor.training.recovery import from_labels
from compressor.training.settings import Training

BATCH, EXAMPLES, TURNS, CLASSES = 64, 1024, 4, 10
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, channels last": {"channels_last": True},
    "bf16": {"precision": "bf16"},
    "bf16, channels last": {"precision": "bf16", "channels_last": True},
}


@pytest.mark.parametrize(
    ("name", "shape"), [("cnn", (1, 28, 28)), ("resnet20", (3, 32, 32)), ("vit", (3, 32, 32))]
)
def test_beside_float32(benchmark: BenchmarkFixture, name: str, shape: tuple[int, ...]) -> None:
    """Medians of turns; evaluation left out."""
    draw = np.random.default_rng(0)
    pictures = draw.standard_normal((EXAMPLES, *shape)).astype(np.float32)
    whole = Split.arrays(pictures, draw.integers(0, CLASSES, EXAMPLES))
    splits = Splits(whole, *[whole.take(np.arange(CLASSES))] * 3)
    start = zoo.build(name, zoo.arguments_for(name, shape, CLASSES))
    rates: dict[str, list[float]] = {way: [] for way in WAYS}

    def turn() -> None:
        for way, settings in WAYS.items():
            torch.manual_seed(0)
            fitted = fit(
                copy.deepcopy(start),
                splits,
                from_labels("classification"),
                Training(epochs=1, batch_size=BATCH, **settings),
                metric=("accuracy", METRICS["classification"]["accuracy"]),
                seed=0,
            )
            rates[way].append(fitted.facts["examples_per_s"])

    benchmark.pedantic(turn, rounds=TURNS, warmup_rounds=1)
    medians = {way: statistics.median(found[1:]) for way, found in rates.items()}
    facts: dict[str, Any] = {
        f"{way}, examples a second": round(rate) for way, rate in medians.items()
    }
    for way in list(WAYS)[1:]:
        ratios = np.divide(rates[way][1:], rates["fp32"][1:])
        facts[f"{way}, times fp32"] = round(float(np.median(ratios)), 3)
    benchmark.extra_info.update(facts)
    print(f"\n{name}: {facts}")
