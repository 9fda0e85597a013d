"""What a restart changes: the same comparison in many processes, and what the interval covers.

    python benchmarks/measuring/restarts.py A.onnx B.onnx --shape 1,28,28 --starts 40

Every start times A (twice: the control) and B in new workers, in turns. The spread of the starts'
log ratios, less what the rounds within one explain, is what ``statistics.RESTART`` stands for. The
coverage is the share of starts, and of groups of three, whose 95 % interval holds the ratio of all
starts together.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import numpy as np
from tabulate import tabulate

from compressor.artifact import Artifact, write_text
from compressor.measure.protocol import SECONDS, observe
from compressor.measure.statistics import Blocks, reach, speedup
from compressor.measure.turns import CONTROL
from compressor.measurement import Target
from compressor.task import Input

Start = dict[str, Blocks]


def main() -> None:
    """Prints the table of both ratios: B against A, and A against itself."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs=2, type=Path)
    parser.add_argument("--shape", required=True, help="of one example, such as 3,224,224")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--inputs", type=int, default=1, help="how many alike")
    parser.add_argument("--starts", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=SECONDS["quick"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    both = [Artifact.of(path, "onnx") for path in given.files]
    shape = tuple(map(int, given.shape.split(",")))
    feed = tuple(
        Input("x", shape, given.dtype, 1000 if at == 0 else 2).synthetic(1, at)
        for at in range(given.inputs)
    )
    starts: list[Start] = []
    for seed in range(given.starts):
        seen = observe(both, Target(), feed, seconds=given.seconds, seed=seed)
        if seen.failed:
            raise SystemExit(f"not timed: {seen.failed}")
        starts.append({name: blocks for (name, _), blocks in seen.times().items()})
    reference, other = (one.name for one in both)
    found = {
        "files": [path.name for path in given.files],
        "starts": len(starts),
        "ratio": judged(starts, reference, other),
        "control": judged(starts, reference, CONTROL),
    }
    if given.out:
        write_text(given.out, json.dumps(found, indent=1) + "\n")
    rows = [
        [name, *(f"{value:.4f}" for value in found[name].values())] for name in ("ratio", "control")
    ]
    print(tabulate(rows, headers=["", *found["ratio"]], tablefmt="pipe", disable_numparse=True))


def judged(starts: list[Start], reference: str, other: str) -> dict[str, float]:
    """Spread of the starts, and the coverage of one start's interval and of three starts'."""
    logs = [math.log(speedup(one[reference], one[other])["value"]) for one in starts]
    truth = math.exp(statistics.fmean(logs))
    inside = statistics.fmean(reach(one[reference], one[other]) ** 2 for one in starts)
    between = max(0.0, statistics.variance(logs) - inside)

    def covered(size: int, bare: bool = False) -> float:
        hits = []
        for at in range(0, len(starts) - size + 1, size):
            group = starts[at : at + size]
            rounds = tuple(len(one[reference]) for one in group)
            ours, theirs = (
                [block for one in group for block in one[name]] for name in (reference, other)
            )
            found = speedup(ours, theirs, at, () if bare else rounds)
            hits.append(found["low"] <= truth <= found["high"])
        return float(np.mean(hits))

    return {
        "ratio": truth,
        "sd of starts": statistics.stdev(logs),
        "sd within": math.sqrt(inside),
        "sd of restarting": math.sqrt(between),
        "coverage, rounds only": covered(1, bare=True),
        "coverage, 1 start": covered(1),
        "coverage, 3 starts": covered(3),
    }


if __name__ == "__main__":
    main()
