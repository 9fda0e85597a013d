"""Our pruning against bare torch-pruning: accuracy after the same recovery, and time to prune.

``python benchmarks/pruning/accuracy.py --mnist DIR --out FILE.json``: the zoo's cnn is trained on
10,000 MNIST digits, once for each seed. Our stage cuts it at ``--ratio``, with its rounding, and
torch-pruning cuts it at the ratio whose MACs are nearest to ours, both by group L2 norm. At equal
widths the two keep the same channels, and there is nothing to compare: so it is at 0.45 and 0.5,
where rounding leaves half of every layer. The table says where it happened. Both are trained on the
same labels by the same loop, and judged on the same test digits, in pairs.

The time of our stage is that from file to file. It stands beside that of torch-pruning alone at the
same ratio, and beside that of torch-pruning between ``torch.load`` and ``torch.save``. They take
turns, in one thread.

What is finished stays in ``--work``, and the same call again continues there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from tabulate import tabulate
from torch import nn

from compressor.loading import torchfile
from compressor.measure.counting import macs
from compressor.measure.statistics import drop, speedup
from compressor.measure.threads import one_thread
from compressor.stages.distill import distill
from compressor.stages.prune import prune
from compressor.task import Task
from compressor.training import recovery
from compressor.training.settings import Training

TIMED = ("cnn", "resnet18", "mobilenet_v2")
"""Models whose pruning is timed: the first seed's cnn, the others untrained, of 224x224 images."""

CUTS = ("ours", "theirs")

INCLUDED = "Ours includes reading, tracing, scoring, the proof of the cut, and writing."


def main() -> None:
    """Trains, cuts and times what is missing, writes ``--out`` and prints its tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mnist", required=True, help="the folder of the IDX files")
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, JSON")
    parser.add_argument(
        "--work", type=Path, default=Path("build/accuracy"), help="what is finished"
    )
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--seeds", type=int, default=5, help="2 or more")
    parser.add_argument("--train", type=int, default=10_000, help="examples to train on")
    parser.add_argument("--base", type=int, default=4, help="epochs of the dense model")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of recovery")
    parser.add_argument("--calls", type=int, default=7, help="of pruning, timed")
    parser.add_argument("--timed", nargs="*", default=TIMED, choices=TIMED)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    data = f"mnist:{asked.mnist}?train={asked.train}"
    bases = [
        peers.trained("cnn", seed, data, asked.base, asked.work) for seed in range(asked.seeds)
    ]
    pairs = [pair(task, asked.ratio, asked.epochs, asked.work) for task in bases]
    found = {"accuracy": judged(pairs), "time": {}}
    for name in asked.timed:
        task = bases[0] if name == "cnn" else peers.task_of(peers.MODELS[name]())
        found["time"][name] = compared(timed(name, task, asked.ratio, asked.calls, asked.work))
    peers.write(asked.out, found)
    print(shown(found))


def pair(task: Task, ratio: float, epochs: int, work: Path) -> dict[str, Any]:
    """Both cuts of one model: scores of every test example before and after recovery."""
    assert task.splits is not None
    test = task.splits.test

    def made() -> dict[str, Any]:
        print(f"cutting {task.name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="compressor-") as name:
            folder = Path(name)
            dense = peers.at_rest(task, folder / "dense.safetensors")
            pruned = prune(dense, task, folder / "pruned", ratio=ratio)
            ours, _ = torchfile.open_model(pruned, task)
            with one_thread():
                theirs, matched = peers.matched(task, macs(ours, task.examples(1)))
            cuts = {"ours": ours, "theirs": theirs}
            same = alike(ours, theirs)
            counts = {cut: macs(model, task.examples(1)) for cut, model in cuts.items()}
            before = {cut: peers.scores(model, task, test) for cut, model in cuts.items()}
            recovered = distill(
                pruned, task, folder / "recovered", training=Training(epochs=epochs), loss="labels"
            )
            cuts["ours"], _ = torchfile.open_model(recovered, task)
            recover(theirs, task, recovered.steps[-1]["settings"])
        return {
            "dense": float(np.mean(peers.scores(task.model(), task, test))),
            "ratios": {"ours": ratio, "theirs": matched},
            "macs": counts,
            "same_channels": same,
            "before": before,
            "after": {cut: peers.scores(model, task, test) for cut, model in cuts.items()},
        }

    asked = peers.known(task) | {"data": task.data, "ratio": ratio, "epochs": epochs}
    found: dict[str, Any] = peers.cell(work / f"pair-{task.seed}.json", asked, made)
    return found


def alike(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether both cuts kept the very same channels: then their recovery is the same, too."""
    state = theirs.state_dict()
    return all(
        tensor.shape == state[name].shape and torch.equal(tensor, state[name])
        for name, tensor in ours.state_dict().items()
    )


def recover(model: nn.Module, task: Task, settings: dict[str, Any]) -> None:
    """What ``distill`` does with ``loss="labels"``, to a live module."""
    how = Training(**{key: settings[key] for key in ("epochs", "learning_rate", "batch_size")})
    recovery.recover(model, task, how, recovery.aimed(task, "labels"))


def judged(pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies of every seed, and ours minus theirs with two intervals of 95 %.

    ``over_seeds`` is Student's t of the seeds' differences: would another training say the same?
    ``over_examples`` pairs the test examples, scores averaged over these seeds' models: would other
    digits?
    """
    after = {cut: np.array([one["after"][cut] for one in pairs]) for cut in CUTS}
    differences = (after["ours"] - after["theirs"]).mean(axis=1)
    won = drop(after["ours"].mean(axis=0), after["theirs"].mean(axis=0), higher_is_better=True)
    return {
        "seeds": [
            {
                "dense": one["dense"],
                "before": {cut: float(np.mean(one["before"][cut])) for cut in CUTS},
                "after": {cut: float(np.mean(one["after"][cut])) for cut in CUTS},
                "ratios": one["ratios"],
                "macs": one["macs"],
                "same_channels": one["same_channels"],
            }
            for one in pairs
        ],
        "over_seeds": peers.paired(differences.tolist()),
        "over_examples": won,  # what theirs lost against ours
    }


def timed(name: str, task: Task, ratio: float, calls: int, work: Path) -> dict[str, list[float]]:
    """Seconds of every call, the three in turns after one of each."""

    def made() -> dict[str, list[float]]:
        print(f"timing {name}", file=sys.stderr, flush=True)
        with one_thread(), tempfile.TemporaryDirectory(prefix="compressor-") as place:
            folder = Path(place)
            dense = peers.at_rest(task, folder / "dense.safetensors")
            torch.save(task.model(), folder / "dense.pt")
            examples = task.examples(1)

            def bare(model: nn.Module) -> nn.Module:
                return peers.cut(model, examples, ratio)

            def filed(model: nn.Module) -> None:
                loaded = torch.load(folder / "dense.pt", weights_only=False)
                torch.save(bare(loaded), folder / "pruned.pt")

            turns: dict[str, Callable[[nn.Module], object]] = {
                "ours": lambda model: prune(dense, task, folder / "pruned", ratio=ratio),
                "theirs": bare,
                "theirs, file to file": filed,
            }
            taken: dict[str, list[float]] = {cut: [] for cut in turns}
            for _ in range(1 + calls):
                for cut, turn in turns.items():
                    model = task.model()
                    began = time.perf_counter()
                    turn(model)
                    taken[cut].append(time.perf_counter() - began)
        return {cut: seconds[1:] for cut, seconds in taken.items()}

    asked = peers.known(task) | {"ratio": ratio, "calls": calls}
    found: dict[str, list[float]] = peers.cell(work / f"time-{name}.json", asked, made)
    return found


def compared(taken: dict[str, list[float]]) -> dict[str, Any]:
    """Median seconds of each, and how many times theirs ours takes."""
    blocks = {cut: [[one] for one in seconds] for cut, seconds in taken.items()}
    return {
        cut: {"seconds": float(np.median(seconds)), "times": speedup(blocks["ours"], blocks[cut])}
        for cut, seconds in taken.items()
    }


def shown(found: dict[str, Any]) -> str:
    """The figures as markdown."""
    accuracy = found["accuracy"]
    seeds = [
        [
            str(seed),
            f"{one['dense']:.2%}",
            *(f"{one[when][cut]:.2%}" for when in ("before", "after") for cut in CUTS),
            f"{(one['after']['ours'] - one['after']['theirs']) * 100:+.2f}",
            *(f"{one['macs'][cut] / 1e6:.2f}" for cut in CUTS),
            f"{one['ratios']['theirs']:.3f}",
            "yes" if one["same_channels"] else "no",
        ]
        for seed, one in enumerate(accuracy["seeds"])
    ]
    heads = ["seed", "dense", "ours, cut", "theirs, cut", "ours, recovered", "theirs, recovered"]
    points = {
        over: {key: 100 * value for key, value in accuracy[over].items()}
        for over in ("over_seeds", "over_examples")
    }
    times = [
        [name, *(f"{one[cut]['seconds']:.3f}" for cut in one)]
        + [peers.interval(one[cut]["times"], ".2f") for cut in one if cut != "ours"]
        for name, one in found["time"].items()
    ]
    return "\n\n".join(
        [
            tabulate(
                seeds,
                [
                    *heads,
                    "points apart",
                    *(f"MACs {cut}, M" for cut in CUTS),
                    "their ratio",
                    "same channels",
                ],
                tablefmt="github",
                disable_numparse=True,
            ),
            "Ours minus theirs, points: "
            f"{peers.interval(points['over_seeds'], '+.3f')} over seeds, "
            f"{peers.interval(points['over_examples'], '+.3f')} over examples.",
            INCLUDED,
            tabulate(
                times,
                [
                    *("model", "ours, s", "theirs, s", "theirs file to file, s"),
                    *("ours / theirs", "ours / theirs file to file"),
                ],
                tablefmt="github",
                disable_numparse=True,
            ),
        ]
    )


if __name__ == "__main__":
    main()
