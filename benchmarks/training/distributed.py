"""Two processes against one on the same cores: examples per second of training, by turns.

    python -m benchmarks.training.distributed [--models cnn,resnet20] [--batch 128] [--turns 5]

Every turn starts one process and then ``torchrun --nproc-per-node 2``, or the other way round; each
trains the same model on the same made-up pictures (28x28 grey for cnn, 32x32 in colour for
resnet20) with the same batch over all processes together. The first epoch warms up; the
figure of a start is the median of the others, evaluation left out. One process computes with as
many threads as the loop gives it, two share the cores. The ratio is two against one, with the
least and the largest of the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from compressor import zoo
from compressor.artifact import write_text
from compressor.measure.environment import cores
from compressor.metrics import METRICS
from compressor.task import Split, Splits
from compressor.training.loop import fit
from compressor.training.recovery import from_labels
from compressor.training.settings import Training
from compressor.training.world import joined, together

SHAPES = {"cnn": (1, 28, 28), "resnet20": (3, 32, 32)}
CLASSES = 10
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
HERE = ("-m", "benchmarks.training.distributed")


def main() -> None:
    """Prints the table; started with ``--into``, is one of the processes instead."""
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("--models", default="cnn,resnet20", help=f"some of {', '.join(SHAPES)}")
    asked.add_argument("--batch", type=int, default=128, help="of a step, over all processes")
    asked.add_argument("--steps", type=int, default=20, help="of an epoch")
    asked.add_argument("--epochs", type=int, default=4, help="the first of which warms up")
    asked.add_argument("--turns", type=int, default=5)
    asked.add_argument("--out", type=Path, help="the figures as JSON")
    asked.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.into:
        train(given)
        return
    found = {name: turns(given, name) for name in given.models.split(",")}
    if given.out:
        said = {"cores": cores(), "batch": given.batch, "turns": given.turns, "models": found}
        write_text(given.out, json.dumps(said, indent=1) + "\n")
    print(shown(found))


def train(given: argparse.Namespace) -> None:
    """Trains one model, alone or with the others that torchrun started; writes the rates."""
    import torch

    name, size = given.models, given.batch * given.steps
    shape = SHAPES[name]
    draw = np.random.default_rng(0)
    pictures = draw.standard_normal((size, *shape)).astype(np.float32)
    whole = Split.arrays(pictures, draw.integers(0, CLASSES, size))
    few = whole.take(np.arange(CLASSES))
    torch.manual_seed(0)
    model = zoo.build(name, zoo.arguments_for(name, shape, CLASSES))
    how = Training(epochs=given.epochs, batch_size=given.batch)
    metric = ("accuracy", METRICS["classification"]["accuracy"])
    with joined() as around, together(around):
        fitted = fit(
            model,
            Splits(whole, few, few, few),
            from_labels("classification"),
            how,
            metric=metric,
            seed=0,
        )
        if around.leader:
            rates = [epoch["examples_per_s"] for epoch in fitted.history[1:]]
            write_text(given.into, json.dumps(rates))


def turns(given: argparse.Namespace, name: str) -> dict[str, list[float]]:
    """Examples per second of every start, of ``one`` process and of ``two``."""
    found: dict[str, list[float]] = {"one": [], "two": []}
    for turn in range(given.turns):
        for which in ("one", "two") if turn % 2 == 0 else ("two", "one"):
            print(f"{name}, turn {turn + 1}: {which}", file=sys.stderr, flush=True)
            found[which].append(started(given, name, which))
    return found


def started(given: argparse.Namespace, name: str, which: str) -> float:
    """The median rate of one start."""
    with tempfile.TemporaryDirectory(prefix="compressor-") as place:
        into = Path(place) / "rates.json"
        asked = {"models": name, "batch": given.batch, "steps": given.steps,
                 "epochs": given.epochs, "into": into}  # fmt: skip
        flags = [part for key, value in asked.items() for part in (f"--{key}", str(value))]
        done = subprocess.run(
            [sys.executable, *(LAUNCHER if which == "two" else ()), *HERE, *flags],
            env={**os.environ, "OMP_NUM_THREADS": str(cores())},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{name}, {which}: {done.stderr[-2000:]}")
        return statistics.median(json.loads(into.read_text(encoding="utf-8")))


def shown(found: dict[str, dict[str, list[float]]]) -> str:
    """The figures as markdown: medians over the turns, and the ratios of each."""
    rows: list[list[Any]] = []
    for name, rates in found.items():
        ratios = [two / one for one, two in zip(rates["one"], rates["two"], strict=True)]
        row = [f"{statistics.median(rates[which]):.0f}" for which in ("one", "two")]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        rows.append([name, *row, spread])
    headers = ["model", "one, examples/s", "two, examples/s", "ratio [least, largest]"]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


if __name__ == "__main__":
    main()
