"""Recovery after ``--prune 0.75``: fine-tuning against every distillation loss, paired by seed.

    python -m benchmarks.training.losses MNIST [--model resnet20] [--labelled 0.01] [--losses kd]

``MNIST`` is the folder of the four IDX files. Every seed trains its own teacher on 10,000 examples
and prunes it; all losses start from that same cut, with the same batches in the same order, for
the same number of epochs. What is judged is the test split, 10,000 examples; the best epoch is
chosen on validate, 5,000 examples that keep their labels with ``--labelled`` too, for all losses
alike.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks.pruning import peers
from compressor.loading import task as tasks
from compressor.loading import torchfile
from compressor.measure.counting import macs, params
from compressor.measure.statistics import drop
from compressor.metrics import METRICS
from compressor.stages import perform
from compressor.stages.distill import distill
from compressor.stages.prune import prune
from compressor.training.evaluation import scored

LOSSES = ("labels", "kd", "dkd", "dist", "hint", "attention", "mse")
TRAIN = 10_000


def main() -> None:
    """Trains what is not there yet, and prints the table."""
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("mnist", type=Path)
    asked.add_argument("--model", default="cnn")
    asked.add_argument("--losses", default=",".join(LOSSES))
    asked.add_argument("--labelled", type=float, default=1.0)
    asked.add_argument("--ratio", type=float, default=0.75)
    asked.add_argument("--seeds", type=int, default=5)
    asked.add_argument("--teacher-epochs", type=int, default=6)
    asked.add_argument("--epochs", type=int, default=6)
    asked.add_argument("--work", type=Path, default=Path("build/training"))
    given = asked.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    names = ["labels", *(name for name in given.losses.split(",") if name != "labels")]
    runs = [{name: cell(given, seed, name) for name in names} for seed in range(given.seeds)]
    found = {"asked": {**vars(given), "mnist": "MNIST", "work": ""}, "losses": judged(runs, names)}
    kind = f"{given.model}-{given.labelled:g}"
    peers.write(given.work / f"losses-{kind}.json", found | {"cost": runs[0]["labels"]["cost"]})
    print(shown(found["losses"], runs))


def cell(given: argparse.Namespace, seed: int, name: str) -> dict[str, Any]:
    """Scores on test of the teacher, the cut and the recovered model, one seed and one loss."""
    teacher = peers.trained(
        given.model, seed, f"mnist:{given.mnist}?train={TRAIN}", given.teacher_epochs, given.work
    )
    data = f"mnist:{given.mnist}?train={TRAIN}"
    if given.labelled < 1:
        data += f"&labelled={given.labelled:g}"

    def made() -> dict[str, Any]:
        print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
        path = given.work / f"{given.model}-{seed}.pt"
        task = tasks(path, data=data, seed=seed)
        assert task.splits is not None
        how = METRICS[task.kind][task.metric]
        with tempfile.TemporaryDirectory(prefix="compressor-") as place:
            folder = Path(place)
            dense = peers.at_rest(task, folder / "dense.safetensors")
            pruned = perform(prune, dense, task, folder / "pruned", ratio=given.ratio)
            settings = {"epochs": given.epochs, "loss": name}
            made = perform(distill, pruned, task, folder / "recovered", **settings)
            after, _ = torchfile.open_model(made, task)
            before, _ = torchfile.open_model(pruned, task)
        facts = made.steps[-1]["facts"]
        return {
            "teacher": scored(task.model(), task.splits.test, how).tolist(),  # type: ignore[union-attr]
            "pruned": scored(before, task.splits.test, how).tolist(),  # type: ignore[union-attr]
            "recovered": scored(after, task.splits.test, how).tolist(),  # type: ignore[union-attr]
            "seconds": facts["training"]["seconds"],
            "cost": {
                "macs": [macs(one, task.examples(1)) for one in (task.model(), after)],
                "params": [params(one) for one in (task.model(), after)],
            },
        }

    asked = peers.known(teacher) | {
        "data": f"{TRAIN} {given.labelled}",
        "ratio": given.ratio,
        "epochs": given.epochs,
        "training": peers.digest_of_folder("training"),
    }
    path = given.work / f"{given.model}-{given.labelled:g}-{given.ratio:g}-{seed}-{name}.json"
    found: dict[str, Any] = peers.cell(path, asked, made)
    return found


def judged(runs: list[dict[str, dict[str, Any]]], names: list[str]) -> dict[str, Any]:
    """Of each loss: accuracy, and what it is better than fine-tuning and worse than the teacher."""

    def mean(run: dict[str, Any], of: str = "recovered") -> float:
        return float(np.mean(run[of]))

    found = {}
    for name in names:
        apart = [mean(run[name]) - mean(run["labels"]) for run in runs]
        pooled = [
            np.concatenate([run[one]["recovered"] for run in runs]) for one in ("labels", name)
        ]
        found[name] = {
            "accuracy": [mean(run[name]) for run in runs],
            "over_labels": peers.paired(apart) if name != "labels" else None,
            # Negative is better than labels: the drop from labels to this loss, over examples.
            "over_examples": None
            if name == "labels"
            else drop(pooled[1], pooled[0], higher_is_better=True),
            "under_teacher": peers.paired(
                [mean(run[name], "teacher") - mean(run[name]) for run in runs]
            ),
            "seconds": float(np.median([run[name]["seconds"] for run in runs])),
        }
    return found


def shown(found: dict[str, Any], runs: list[dict[str, dict[str, Any]]]) -> str:
    """The figures as markdown, in points of accuracy."""

    def points(one: dict[str, float] | None) -> str:
        if one is None:
            return "-"
        return peers.interval({key: 100 * value for key, value in one.items()}, "+.2f")

    rows = [
        [
            name,
            f"{np.mean(one['accuracy']):.2%}",
            points(one["over_labels"]),
            points(one["over_examples"]),
            points(one["under_teacher"]),
            f"{one['seconds']:.1f}",
        ]
        for name, one in found.items()
    ]
    first = runs[0]["labels"]
    dense, cut = (
        np.mean([np.mean(run["labels"][of]) for run in runs]) for of in ("teacher", "pruned")
    )
    fewer = first["cost"]["macs"][0] / first["cost"]["macs"][1]
    heads = ["loss", "accuracy", "over fine-tuning, points, over seeds", "the same, over examples",
             "below the teacher, points", "seconds"]  # fmt: skip
    return (
        f"Teacher {dense:.2%}, pruned {cut:.2%}, {fewer:.1f} times fewer MACs, "
        f"{len(runs)} seeds.\n\n" + tabulate(rows, heads, tablefmt="github", disable_numparse=True)
    )


if __name__ == "__main__":
    main()
