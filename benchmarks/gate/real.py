"""The gate on real files: identical models, and one with a layer doubled.

    python benchmarks/gate/real.py --same 50 --doubled 20 --out FILE.json
    python benchmarks/gate/real.py --same 50 --doubled 20 --busy --out FILE.json

The model is four 3 x 3 convolutions of 32 channels on 28 x 28; the slower one runs one of them
twice. Identical models differ in a comment, or the gate would see the same file. Both are benched,
then judged again and again by ``compare --remeasure``'s own function, quick, at latency=5%.
``--busy`` keeps another process multiplying matrices meanwhile, which the system puts on the other
core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from compressor.artifact import write_text
from compressor.pipeline.bench import bench
from compressor.pipeline.remeasure import remeasure
from compressor.report import Report

LIMIT = 0.05
LAYERS, CHANNELS, SIDE = 4, 32, 28

NEIGHBOUR = "import numpy as np\na = np.ones((400, 400), np.float32)\nwhile True: a @ a"


def main() -> None:
    """Prints how often each verdict fell."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--same", type=int, default=50, help="times that identical models meet")
    parser.add_argument("--doubled", type=int, default=20)
    parser.add_argument("--busy", action="store_true", help="beside a busy process")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, neighbour(given.busy):
        folder = Path(name)
        old = benched(folder / "old", LAYERS)
        others = {
            "identical": (benched(folder / "same", LAYERS), given.same),
            "one layer of four doubled": (benched(folder / "doubled", LAYERS + 1), given.doubled),
        }
        found = {what: judged(old, new, times) for what, (new, times) in others.items()}
    if given.out:
        write_text(given.out, json.dumps({"busy": given.busy, **found}, indent=1) + "\n")
    rows = []
    for what, verdicts in found.items():
        said = Counter(one["verdict"] for one in verdicts)
        seconds = [one["seconds"] for one in verdicts]
        values = [one["value"] for one in verdicts]
        rows.append(
            [
                what,
                len(verdicts),
                *(said[one] for one in ("fails", "inconclusive", "ok")),
                f"{np.median(values):.3f}x",
                f"{min(values):.3f}x to {max(values):.3f}x",
                f"{np.median(seconds):.0f}",
            ]
        )
    header = ["new file", "times", "fails", "inconclusive", "ok", "its time", "range", "seconds"]
    print(tabulate(rows, headers=header, tablefmt="pipe", disable_numparse=True))


def judged(old: Report, new: Report, times: int) -> list[dict[str, Any]]:
    """Every verdict, and the seconds that it took."""
    found = []
    for trial in range(times):
        began = time.monotonic()
        (said,) = remeasure(old, new, LIMIT, seed=1000 * trial).values()
        taken = time.monotonic() - began
        found.append({**said, "seconds": taken})
        print(f"{trial + 1} of {times}: {said['verdict']}, {said['why']}", file=sys.stderr)
    return found


def benched(folder: Path, layers: int) -> Report:
    """The report of a model of so many layers; its comment is the folder's name."""
    folder.mkdir()
    path = folder / "model.onnx"
    write(path, layers, folder.name)
    return bench([path], provider="cpu", threads=(1,), out=folder / "bench")


def write(path: Path, layers: int, comment: str) -> None:
    """Convolutions with ReLU, seeded weights."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    shape = ["batch", CHANNELS, SIDE, SIDE]
    nodes, weights, last = [], [], "x"
    for at in range(layers):
        kernel = rng.normal(0, 0.08, (CHANNELS, CHANNELS, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"w{at}"))
        nodes.append(helper.make_node("Conv", [last, f"w{at}"], [f"c{at}"], pads=[1, 1, 1, 1]))
        last = f"y{at}" if at < layers - 1 else "y"
        nodes.append(helper.make_node("Relu", [f"c{at}"], [last]))
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
        doc_string=comment,
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """A process that keeps a core busy, where one is wanted."""
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR], env={"OMP_NUM_THREADS": "1"})
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
