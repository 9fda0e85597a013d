"""What pruning does to every family of the test zoo, at one ratio.

``python benchmarks/pruning/families.py --out FILE.json [--ratio 0.5]`` prunes the small models of
``tests/stages/families.py``, exports them before and after, and times each pair in turns in one run
of onnxruntime, batch 1, one thread.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peers
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "stages"))

from families import FAMILIES, task_for

from compressor.errors import CompressorError, one_line
from compressor.loading import torchfile
from compressor.measure.counting import macs, params
from compressor.measure.protocol import observe
from compressor.measure.statistics import speedup, summary
from compressor.measurement import Target
from compressor.stages.export import export
from compressor.stages.prune import prune


def main() -> None:
    """Makes and times every pair, writes ``--out`` and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, JSON")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing each model")
    asked = parser.parse_args()
    rows = []
    for name in FAMILIES:
        with warnings.catch_warnings(action="ignore"):
            rows.append(row(name, asked.ratio, asked.seconds))
        print(name, file=sys.stderr)
    peers.write(asked.out, {"ratio": asked.ratio, "families": rows})
    heads = {key: key for key in rows[0]}
    print(tabulate([shown(one) for one in rows], heads, tablefmt="github"))


def row(name: str, ratio: float, seconds: float) -> dict[str, Any]:
    """One family: what was cut and left, the proof, and everything before and after."""
    task = task_for(name)
    with tempfile.TemporaryDirectory() as folder:
        whole = peers.at_rest(task, Path(folder) / "dense.safetensors")
        cut = prune(whole, task, Path(folder) / "pruned", ratio=ratio)
        facts = cut.steps[-1]["facts"]
        before, after = (torchfile.open_model(one, task)[0] for one in (whole, cut))
        found: dict[str, Any] = {
            "family": name,
            "cut": sum(had - has for had, has in facts["layers"].values()),
            "of": sum(had for had, _ in facts["layers"].values()),
            "proof": facts["proof"]["max_abs_diff"],
            "params": [params(before), params(after)],
            "MACs": [macs(before, task.examples(1)), macs(after, task.examples(1))],
        }
        try:
            found |= timed(task, whole, cut, Path(folder), seconds)
        except CompressorError as error:
            found |= {"ms": None, "faster": one_line(error, 60)}
        return {**found, "left alone": facts["left_alone"]}


def timed(task: Any, whole: Any, cut: Any, folder: Path, seconds: float) -> dict[str, Any]:
    """Median milliseconds before and after, and their ratio with its interval."""
    pair = [export(one, task, folder / one.name) for one in (whole, cut)]
    seen = observe(pair, Target(), task.examples(1), seconds=seconds)
    blocks = {name: taken for (name, _), taken in seen.times().items()}
    dense, pruned = (blocks[one.name] for one in pair)
    ratio = speedup(dense, pruned)
    return {"ms": [summary(dense)["p50"], summary(pruned)["p50"]], "faster": ratio}


def shown(one: dict[str, Any]) -> dict[str, Any]:
    """The row as the table has it."""
    ms, faster = one["ms"], one["faster"]
    return {
        **one,
        "proof": f"{one['proof']:.0e}",
        "params": "{:,} to {:,}".format(*one["params"]),
        "MACs": "{:,} to {:,}".format(*one["MACs"]),
        "ms": "{:.4f} to {:.4f}".format(*ms) if ms else "n/a",
        "faster": peers.interval(faster, ".2f") if ms else faster,
        "left alone": "; ".join(f"{layer}: {why}" for layer, why in one["left alone"].items()),
    }


if __name__ == "__main__":
    main()
