"""Whether pruned channels pay in time: our cut against torch-pruning's defaults.

``python benchmarks/pruning/widths.py --out FILE.json`` cuts EfficientNet-lite0 and ResNet-18 at
every ratio three times: with our stage, with torch-pruning at the same ratio, and with
torch-pruning at the ratio whose MACs are nearest to ours. All variants of a model, fp32 and int8,
take turns in one run of onnxruntime, batch 1, one thread. The int8 files are calibrated on made-up
inputs: they serve for their time, not for their accuracy.

What is finished stays in ``--work``, and the same call again continues there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peers
import torch
from tabulate import tabulate
from torch import nn

from compressor.artifact import Artifact
from compressor.loading import torchfile
from compressor.measure.counting import macs, params
from compressor.measure.protocol import CONTROL, SECONDS, observe
from compressor.measure.statistics import Blocks, noise_floor, speedup, summary, verdict
from compressor.measurement import Target
from compressor.stages.export import export
from compressor.stages.prune import prune
from compressor.stages.quantize import quantize
from compressor.task import Task

MODELS = ("efficientnet-lite0", "resnet18")
RATIOS = (0.3, 0.45, 0.6)
RIVALS = ("theirs", "theirs-matched")
PRECISIONS = ("fp32", "int8")

SAMPLES = 8
"""Calibration examples: the ranges decide no time."""

Variant = dict[str, Any]
"""``name, cut, ratio`` (asked), ``reached``, ``macs, params`` and ``files`` by precision."""

Cut = Callable[[Task], tuple[nn.Module, float]]
"""From the task of the dense model to the cut one and the ratio that it stands for."""


def main() -> None:
    """Makes and times what is missing, writes ``--out`` and prints its tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, JSON")
    parser.add_argument("--work", type=Path, default=Path("build/widths"), help="what is finished")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=peers.MODELS)
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--seconds", type=float, default=SECONDS["full"], help="for each variant")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.work.mkdir(parents=True, exist_ok=True)
    models = {}
    for name in asked.models:
        variants = made(name, sorted(asked.ratios), asked.work)
        models[name] = judged(variants, timed(name, variants, asked.seconds, asked.work))
        peers.write(asked.out, {"models": models})
        print(f"\n## {name}\n\n{shown(models[name])}", flush=True)


def made(name: str, ratios: Sequence[float], work: Path) -> list[Variant]:
    """The dense model, and for every ratio our cut and its two rivals."""
    dense = peers.MODELS[name]()
    made = functools.partial(variant, dense, work, name)
    variants = [made("dense", 0.0, lambda task: (task.model(), 0.0))]
    for ratio in ratios:
        ours = made("ours", ratio, functools.partial(our_cut, ratio=ratio))
        equal = made("theirs", ratio, functools.partial(their_cut, ratio=ratio))
        goal = ours["macs"]
        matched = made("theirs-matched", ratio, functools.partial(peers.matched, goal=goal), goal)
        variants += [ours, equal, matched]
    return variants


def variant(
    dense: nn.Module, work: Path, model: str, cut: str, ratio: float, make: Cut, goal: int = 0
) -> Variant:
    """One variant, made now or before."""
    name = f"{model}-{cut}-{ratio:g}"

    def made() -> Variant:
        print(f"making {name}", file=sys.stderr, flush=True)
        task = peers.task_of(dense)
        found, reached = make(task)
        return {
            "reached": reached,
            "macs": macs(found, task.examples(1)),
            "params": params(found),
            "files": files(peers.task_of(found), work / name),
        }

    asked = {"code": peers.code(), "samples": SAMPLES, "goal": goal}
    found: Variant = peers.cell(work / f"{name}.json", asked, made)
    return {"name": name, "cut": cut, "ratio": ratio} | found


def our_cut(task: Task, ratio: float) -> tuple[nn.Module, float]:
    """The cut of our stage, and the share of channels that it removed."""
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        dense = peers.at_rest(task, Path(folder) / "dense.safetensors")
        pruned = prune(dense, task, Path(folder) / "pruned", ratio=ratio)
        return torchfile.open_model(pruned, task)[0], pruned.steps[-1]["facts"]["reached"]


def their_cut(task: Task, ratio: float) -> tuple[nn.Module, float]:
    """torch-pruning's cut, and the ratio that it was asked for."""
    return peers.cut(task.model(), task.examples(1), ratio), ratio


def files(task: Task, into: Path) -> dict[str, str]:
    """The task's model exported and quantized beside ``into``: file names by precision."""
    beside = {precision: into.with_name(f"{into.name}-{precision}") for precision in PRECISIONS}
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        exported = export(
            peers.at_rest(task, Path(folder) / "cut.safetensors"), task, beside["fp32"]
        )
    quantized = quantize(
        exported,
        task,
        beside["int8"],
        scheme="static",
        samples=SAMPLES,
        ranges="minmax",
        repair=(),
        left=(),
        disabled=(),
        synthetic=True,
    )
    return {"fp32": exported.path.name, "int8": quantized.path.name}


def timed(
    model: str, variants: Sequence[Variant], seconds: float, work: Path
) -> Mapping[str, Blocks]:
    """Milliseconds of every call by file, block by block; all files take turns in one run."""
    artifacts = [
        Artifact.of(work / one["files"][precision], "onnx")
        for one in variants
        for precision in PRECISIONS
    ]

    def made() -> dict[str, Blocks]:
        print(f"timing {model}", file=sys.stderr, flush=True)
        examples = peers.task_of(nn.Identity()).examples(1)
        observed = observe(artifacts, Target(), examples, seconds=seconds)
        if observed.failed:
            raise SystemExit(f"not timed: {observed.failed}")
        return {name: blocks for (name, _), blocks in observed.times().items()}

    asked = {"seconds": seconds, "files": {one.name: one.digest for one in artifacts}}
    found: dict[str, Blocks] = peers.cell(work / f"{model}-times.json", asked, made)
    return found


def judged(variants: Sequence[Variant], times: Mapping[str, Blocks]) -> dict[str, Any]:
    """The figures of one model: each variant against dense fp32, ours against each rival at every
    ratio, and each step of our ratio against the one before. A ratio above 1 is faster."""
    floor = noise_floor(times[_file(variants[0], "fp32")], times[CONTROL])

    def against(before: Variant, after: Variant, precision: str) -> dict[str, Any]:
        ratio = speedup(times[_file(before, precision)], times[_file(after, precision)])
        said = verdict(ratio["low"], ratio["high"], floor)
        return {"precision": precision, "speedup": ratio, "verdict": said}

    rows = []
    for one in variants:
        row = {key: one[key] for key in ("cut", "ratio", "reached", "macs", "params")}
        for precision in PRECISIONS:
            blocks = times[_file(one, precision)]
            dense = times[_file(variants[0], "fp32")]
            row[precision] = {"ms": summary(blocks), "speedup": speedup(dense, blocks)}
        rows.append(row)
    steps = [variants[0], *(one for one in variants if one["cut"] == "ours")]
    return {
        "noise_floor": floor,
        "variants": rows,
        "rivals": [
            {"ratio": ours["ratio"], "rival": rival["cut"]} | against(rival, ours, precision)
            for ours in steps[1:]
            for rival in variants
            if rival["cut"] in RIVALS and rival["ratio"] == ours["ratio"]
            for precision in PRECISIONS
        ],
        "steps": [
            {"from": before["ratio"], "to": after["ratio"]} | against(before, after, precision)
            for before, after in itertools.pairwise(steps)
            for precision in PRECISIONS
        ],
    }


def _file(one: Variant, precision: str) -> str:
    return Path(one["files"][precision]).stem


def shown(found: dict[str, Any]) -> str:
    """The figures as markdown."""
    rows = [
        [
            row["cut"],
            f"{row['ratio']:g}",
            f"{row['reached']:.3f}",
            f"{row['macs'] / 1e6:.0f}",
            f"{row['params'] / 1e6:.2f}",
            *(
                text
                for precision in PRECISIONS
                for text in (
                    f"{row[precision]['ms']['p50']:.2f}",
                    peers.interval(row[precision]["speedup"], ".2f"),
                )
            ),
        ]
        for row in found["variants"]
    ]
    heads = ["cut", "ratio", "reached", "MACs, M", "params, M"]
    for precision in PRECISIONS:
        heads += [f"{precision}, ms", "times as fast as dense fp32"]
    rivals = [
        [f"{row['ratio']:g}", row["rival"], row["precision"], *_verdict(row)]
        for row in found["rivals"]
    ]
    steps = [
        [f"{row['from']:g} to {row['to']:g}", row["precision"], *_verdict(row)]
        for row in found["steps"]
    ]
    slower = sum(row["verdict"] == "slower" for row in found["rivals"])
    falls = sum(row["verdict"] == "faster" for row in found["steps"])
    last = ["times as fast", "verdict"]
    return "\n\n".join(
        [
            tabulate(rows, heads, tablefmt="github", disable_numparse=True),
            "Ours against each rival:",
            tabulate(
                rivals,
                ["ratio", "rival", "precision", *last],
                tablefmt="github",
                disable_numparse=True,
            ),
            "Each step of our ratio:",
            tabulate(steps, ["step", "precision", *last], tablefmt="github", disable_numparse=True),
            f"Ours is slower in {slower} of {len(rivals)} comparisons; time falls in {falls} of "
            f"{len(steps)} steps. Noise floor {found['noise_floor']:.1%}.",
        ]
    )


def _verdict(row: dict[str, Any]) -> list[str]:
    return [peers.interval(row["speedup"], ".2f"), row["verdict"]]


if __name__ == "__main__":
    main()
