"""Whether ``latency=0.5`` beats plain ratio pruning: time at equal accuracy, and the reverse.

``python benchmarks/pruning/latency.py --mnist DIR --out FILE.json``: every model is trained once
for each seed. The first seed's is cut by our search for half its latency, and by plain ratio
pruning (every layer alike, the same criterion and rounding) at every ratio; all are trained on by
the same stage with the same settings, exported, and timed in turns in one run, batch 1, one thread.
Two of the ratios are then compared with the search over all seeds, in pairs: the one whose accuracy
after recovery is nearest, chosen on the first seed's validation split, and the one whose time is
nearest. Other seeds take the widths that the first seed's search found: networks of one shape,
which take the same time.

Test examples judge only what was chosen without them. What is finished stays in ``--work``, and the
same call again continues there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peers
from tabulate import tabulate

from compressor.artifact import Artifact
from compressor.loading import torchfile
from compressor.measure.protocol import CONTROL, SECONDS, observe
from compressor.measure.statistics import Blocks, noise_floor, speedup, summary, verdict
from compressor.measurement import Target
from compressor.stages.distill import distill
from compressor.stages.export import export
from compressor.stages.prune import prune
from compressor.task import Task

GOAL = 0.5
NEAR = 0.05
"""A latency this near to the goal, relative to it, is there."""

EQUAL = 0.003
"""Accuracies are equal where the whole paired interval lies within this."""


class Study(NamedTuple):
    """A model's data, epochs of the dense model and of recovery, and the ratios it is cut at.

    Few epochs, so that five seeds are affordable on two cores. MobileNetV2 has the zoo's eight: the
    statistics of its BatchNorms settle late, and after three its accuracy was still chance.
    """

    data: str
    base: int
    epochs: int
    ratios: tuple[float, ...]


STUDIES = {
    "cnn": Study("mnist:{mnist}?train=10000", base=2, epochs=1, ratios=(0.2, 0.3, 0.4, 0.5, 0.6)),
    "resnet20": Study("digits?size=16", base=5, epochs=3, ratios=(0.4, 0.5, 0.6, 0.7, 0.8)),
    "resnet56": Study("digits?size=16", base=8, epochs=3, ratios=(0.4, 0.5, 0.6, 0.7, 0.8)),
    "mobilenet_v2": Study("digits?size=32", base=8, epochs=2, ratios=(0.2, 0.3, 0.4, 0.5, 0.6)),
}

Found = dict[str, Any]
"""Of one cut: ``prune`` (facts and settings), ``validate`` and ``test`` (scores), ``file``."""


def main() -> None:
    """Trains, cuts and times what is missing, writes ``--out`` and prints its tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, JSON")
    parser.add_argument("--work", type=Path, default=Path("build/latency"), help="what is finished")
    parser.add_argument("--mnist", default="data/mnist", help="the folder of the IDX files")
    parser.add_argument("--seeds", type=int, default=5, help="2 or more")
    parser.add_argument(
        "--models",
        type=lambda text: text.split(","),
        default=["cnn", "resnet20", "mobilenet_v2"],
        help=f"of {', '.join(STUDIES)}; commas between them",
    )
    parser.add_argument("--ratios", nargs="+", type=float, help="of plain pruning")
    parser.add_argument("--base", type=int, help="epochs of the dense model")
    parser.add_argument("--epochs", type=int, help="epochs of recovery")
    parser.add_argument("--seconds", type=float, default=SECONDS["normal"], help="for each file")
    asked = parser.parse_args()
    if asked.seeds < 2 or not set(asked.models) <= set(STUDIES):
        parser.error(f"--seeds 2 or more, --models of {', '.join(STUDIES)}")
    asked.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name in asked.models:
        study = STUDIES[name]
        data = study.data.format(mnist=asked.mnist)
        base, epochs = asked.base or study.base, asked.epochs or study.epochs
        tasks = [peers.trained(name, seed, data, base, asked.work) for seed in range(asked.seeds)]
        found[name] = {"data": data, "base": base, "epochs": epochs} | studied(
            name, tasks, sorted(asked.ratios or study.ratios), epochs, asked.seconds, asked.work
        )
        peers.write(asked.out, {"models": found})
        print(f"\n## {name}\n\n{shown(found[name])}", flush=True)


def studied(
    name: str,
    tasks: Sequence[Task],
    ratios: Sequence[float],
    epochs: int,
    seconds: float,
    work: Path,
) -> dict[str, Any]:
    """The figures of one model, from its tasks by seed."""
    ours = cut(tasks[0], {"latency": GOAL}, epochs, work)
    plain = {ratio: cut(tasks[0], {"ratio": ratio}, epochs, work) for ratio in ratios}
    times = timed(name, tasks[0], [ours, *plain.values()], seconds, work)
    pace = {ratio: summary(times[stem(one)])["p50"] for ratio, one in plain.items()}
    our_pace = summary(times[stem(ours)])["p50"]
    accuracy = {ratio: float(np.mean(one["validate"])) for ratio, one in plain.items()}
    our_accuracy = float(np.mean(ours["validate"]))
    chosen = {
        # Where two are equally near, the faster is the harder rival.
        "accuracy": min(ratios, key=lambda at: (abs(accuracy[at] - our_accuracy), pace[at])),
        "latency": min(ratios, key=lambda at: abs(pace[at] - our_pace)),
    }
    widths = {"latency": GOAL, "widths": ours["prune"]["settings"]["widths"]}
    all_ours = [ours, *(cut(task, widths, epochs, work) for task in tasks[1:])]
    comparisons = {}
    floor = noise_floor(times["dense"], times[CONTROL])
    for what, ratio in chosen.items():
        theirs = [plain[ratio]]
        theirs += [cut(task, {"ratio": ratio}, epochs, work) for task in tasks[1:]]
        for mine, one in zip(all_ours, theirs, strict=True):
            # One file stands for the time of all seeds: that holds for equal shapes only.
            if any(layers(one) != layers(first) for one, first in ((mine, ours), (one, theirs[0]))):
                raise SystemExit(f"{name}: the seeds' cuts differ in shape")
        comparisons[what] = {"ratio": ratio} | compared(
            all_ours, theirs, times[stem(ours)], times[stem(theirs[0])], floor
        )
    facts = ours["prune"]["facts"]
    took = speedup(times[stem(ours)], times["dense"])
    return {
        "noise_floor": floor,
        "dense": {
            "ms": summary(times["dense"]),
            "test": [float(np.mean(of_dense(task, work))) for task in tasks],
        },
        "search": {
            "goal": GOAL,
            "reached": facts["latency_reached"],
            "again": took,  # in this run
            "near": abs(facts["latency_reached"] - GOAL) <= NEAR * GOAL,
            "tried": facts["tried"],
            "unreached": facts["unreached"],
            "layers": facts["layers"],
        },
        "cuts": [
            {
                "cut": label,
                "validate": float(np.mean(one["validate"])),
                "test": float(np.mean(one["test"])),
                "ms": summary(times[stem(one)]),
                "of_dense": speedup(times[stem(one)], times["dense"]),
            }
            for label, one in [
                (f"latency={GOAL:g}", ours),
                *((f"ratio={ratio:g}", one) for ratio, one in plain.items()),
            ]
        ],
        "comparisons": comparisons,
    }


def cut(task: Task, settings: Mapping[str, Any], epochs: int, work: Path) -> Found:
    """The task's model pruned with ``settings``, recovered and, for the first seed, exported."""
    assert task.splits is not None
    splits = task.splits
    (quantity, amount), *_ = settings.items()
    name = f"{task.name}-{quantity}-{amount:g}"

    def made() -> Found:
        print(f"cutting {name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="compressor-") as place:
            folder = Path(place)
            dense = peers.at_rest(task, folder / "dense.safetensors")
            pruned = prune(dense, task, folder / "pruned", **settings)
            recovered = distill(pruned, task, folder / "recovered", epochs=epochs)
            model, _ = torchfile.open_model(recovered, task)
            exported = export(recovered, task, work / name) if task.seed == 0 else None
        return {
            "prune": pruned.steps[-1],
            "validate": peers.scores(model, task, splits.validate),
            "test": peers.scores(model, task, splits.test),
            "file": exported.path.name if exported else None,
        }

    asked = peers.known(task) | {"settings": dict(settings), "data": task.data, "epochs": epochs}
    found: Found = peers.cell(work / f"{name}.json", asked, made)
    return found


def of_dense(task: Task, work: Path) -> list[float]:
    """Scores of the dense model on the test split."""
    assert task.splits is not None
    split = task.splits.test
    found: list[float] = peers.cell(
        work / f"{task.name}-dense.json",
        peers.known(task) | {"data": task.data},
        lambda: peers.scores(task.model(), task, split),
    )
    return found


def stem(one: Found) -> str:
    """What the timing calls it."""
    return Path(one["file"]).stem


def layers(one: Found) -> dict[str, list[int]]:
    """Channels that each layer had and kept."""
    found: dict[str, list[int]] = one["prune"]["facts"]["layers"]
    return found


def timed(
    name: str, task: Task, cuts: Sequence[Found], seconds: float, work: Path
) -> Mapping[str, Blocks]:
    """Milliseconds of every call by file, block by block; the dense model is ``dense``."""
    files = [Artifact.of(work / one["file"], "onnx") for one in cuts]

    def made() -> dict[str, Blocks]:
        print(f"timing {name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="compressor-") as place:
            at_rest = peers.at_rest(task, Path(place) / "dense.safetensors")
            dense = export(at_rest, task, Path(place) / "dense")
            observed = observe(
                [Artifact.of(dense.path, "onnx"), *files],
                Target(),
                task.examples(1),
                seconds=seconds,
            )
        if observed.failed:
            raise SystemExit(f"not timed: {observed.failed}")
        return {name: blocks for (name, _), blocks in observed.times().items()}

    asked = {
        "dense": peers.known(task),
        "seconds": seconds,
        "files": {one.name: one.digest for one in files},
    }
    found: dict[str, Blocks] = peers.cell(work / f"{name}-times.json", asked, made)
    return found


def compared(
    ours: Sequence[Found],
    theirs: Sequence[Found],
    our_time: Blocks,
    their_time: Blocks,
    floor: float,
) -> dict[str, Any]:
    """Test accuracy of ours minus theirs over the seeds, and their time over ours."""
    apart = [
        float(np.mean(mine["test"]) - np.mean(one["test"]))
        for mine, one in zip(ours, theirs, strict=True)
    ]
    accuracy = peers.paired(apart)
    faster = speedup(their_time, our_time)
    return {
        "points": {key: 100 * value for key, value in accuracy.items()},
        "by_seed": [100 * value for value in apart],
        "equal": accuracy["low"] >= -EQUAL and accuracy["high"] <= EQUAL,
        "speedup": faster,
        "verdict": verdict(faster["low"], faster["high"], floor),
        # 1 - 1 / x turns the interval around only once: more speed is more saved.
        "saved": {key: 1 - 1 / value for key, value in faster.items()},
    }


def shown(found: dict[str, Any]) -> str:
    """The figures as markdown."""
    search = found["search"]
    dense = found["dense"]
    cuts = [["dense", "", f"{dense['test'][0]:.2%}", f"{dense['ms']['p50']:.3f}", ""]] + [
        [
            row["cut"],
            f"{row['validate']:.2%}",
            f"{row['test']:.2%}",
            f"{row['ms']['p50']:.3f}",
            peers.interval(row["of_dense"], ".3f"),
        ]
        for row in found["cuts"]
    ]
    rivals = [
        [
            f"nearest {what}",
            f"{row['ratio']:g}",
            peers.interval(row["points"], "+.2f"),
            "yes" if row["equal"] else "no",
            peers.interval(row["saved"], ".1%"),
            row["verdict"],
        ]
        for what, row in found["comparisons"].items()
    ]
    reached = (
        f"The search reached {search['reached']:.3f} of the dense time for {search['goal']:g}; in "
        f"this run it is {peers.interval(search['again'], '.3f')}."
    )
    if not search["near"]:
        tried = ", ".join(f"{one['predicted']:.3f}: {one['real']:.3f}" for one in search["tried"])
        reached += f" Not within {NEAR:.0%}; tried (predicted: real) {tried}."
    if search["unreached"]:
        reached += f" {search['unreached']}."
    return "\n\n".join(
        [
            tabulate(
                cuts,
                ["first seed", "validate", "test", "ms", "of dense"],
                tablefmt="github",
                disable_numparse=True,
            ),
            reached,
            tabulate(
                rivals,
                ["against", "ratio", "points apart", "within 0.3", "time saved", "verdict"],
                tablefmt="github",
                disable_numparse=True,
            ),
            f"Noise floor {found['noise_floor']:.1%}.",
        ]
    )


if __name__ == "__main__":
    main()
