"""What calibration costs: EfficientNet-lite0's activations on crops of pictures.

``python benchmarks/quantization/calibration.py --out FILE.json`` takes the ranges of every
activation by each method from 512 examples, and again from 64 and 2,048 (the 512 crops four times
over), each in a process of its own; onnxruntime's own calibrators get ``--theirs`` examples, since
they hold every activation. Seconds are without imports, memory is the kernel's high-water mark.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from compressor.measure.worker import peak_rss_bytes

MODEL = "efficientnet-lite0"

METHODS = ("minmax", "entropy", "percentile", "mse")

BATCH = {"ours": 32, "theirs": 8}
"""Examples fed at once: ours divides them as memory allows, theirs runs them together."""

SAMPLES = (512, 64, 2048)

MB = 1e6


def main() -> None:
    """Runs what is asked, writes ``--out`` and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="where the figures go, JSON")
    parser.add_argument("--work", type=Path, default=Path("build/quantization"))
    parser.add_argument("--samples", nargs="+", type=int, default=SAMPLES)
    parser.add_argument("--theirs", type=int, default=32, help="examples of onnxruntime's; 0: none")
    parser.add_argument("--one", nargs=2, metavar=("WHOSE", "METHOD"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        whose, method = asked.one
        print(json.dumps(RANGES[whose](asked.work / MODEL, method, asked.samples[0])))
        return
    import models
    import peers

    models.folder_of(MODEL, asked.work, None)
    wanted = [("ours", method, count) for count in asked.samples for method in METHODS]
    wanted += [("theirs", method, asked.theirs) for method in METHODS[:3] if asked.theirs]
    rows = []
    for whose, method, count in wanted:
        print(f"{whose}, {method}, {count}", file=sys.stderr, flush=True)
        rows.append({"whose": whose, "method": method, "samples": count})
        rows[-1] |= _alone(asked.work, whose, method, count)
    grown = {
        method: _peak(rows, method, max(asked.samples)) / _peak(rows, method, min(asked.samples))
        for method in METHODS
    }
    peers.write(asked.out, {"rows": rows, "memory_most_against_least": grown})
    heads = ["whose", "method", "samples", "s", "peak memory, MB", "of it imports", "tensors"]
    table = [
        [
            *(row[key] for key in ("whose", "method", "samples")),
            f"{row['seconds']:.1f}",
            f"{row['peak_bytes'] / MB:.0f}",
            f"{row['imported_bytes'] / MB:.0f}",
            row["tensors"],
        ]
        for row in rows
    ]
    print(tabulate(table, heads, tablefmt="github", disable_numparse=True))
    said = ", ".join(f"{method} {ratio:.2f}" for method, ratio in grown.items())
    print(f"\nMemory of {max(asked.samples)} examples against {min(asked.samples)}: {said}.")


def _peak(rows: list[dict[str, Any]], method: str, samples: int) -> float:
    key = ("ours", method, samples)
    found = (row for row in rows if (row["whose"], row["method"], row["samples"]) == key)
    return float(next(found)["peak_bytes"])


def _alone(work: Path, whose: str, method: str, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--work", str(work), "--one", whose, method]
    ran = subprocess.run(
        [*command, "--samples", str(count)], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(ran.stdout.strip().rpartition("\n")[2])
    return found


def _batches(folder: Path, samples: int, size: int) -> Iterator[dict[str, Any]]:
    path = folder / "calibrate-0.npy"
    whole = len(np.load(path, mmap_mode="r"))
    for start in range(0, samples, size):
        at = np.arange(start, min(start + size, samples)) % whole
        # Mapped anew each time, or the pages would stay counted.
        yield {"input": np.load(path, mmap_mode="r")[at]}


def _ours(folder: Path, method: str, samples: int) -> dict[str, Any]:
    from compressor.stages import graph
    from compressor.stages.quantize import histogram
    from compressor.stages.quantize.calibrate import calibrate
    from compressor.stages.quantize.plan import plan
    from compressor.stages.quantize.prepare import prepare

    def work() -> int:
        model = graph.read(folder / "fp32.onnx")
        prepare(model, static=True)
        feeds = _batches(folder, samples, BATCH["ours"])
        found = calibrate(model, plan(model).ranged, feeds)
        return len([histogram.METHODS[method](one) for one in found.values()])

    return _timed(work)


def _theirs(folder: Path, method: str, samples: int) -> dict[str, Any]:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, calibrate

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self.batches = _batches(folder, samples, BATCH["theirs"])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    def work() -> int:
        how = CalibrationMethod[{"minmax": "MinMax"}.get(method, method.capitalize())]
        augmented = str(folder / "calibrating.onnx")
        calibrator = calibrate.create_calibrator(
            folder / "fp32.onnx", augmented_model_path=augmented, calibrate_method=how
        )
        calibrator.collect_data(Reader())
        found = len(calibrator.compute_data().data)
        Path(augmented).unlink(missing_ok=True)
        return found

    return _timed(work)


RANGES: dict[str, Callable[[Path, str, int], dict[str, Any]]] = {"ours": _ours, "theirs": _theirs}
"""Ways to the ranges of all activations."""


def _timed(work: Callable[[], int]) -> dict[str, Any]:
    before, start = peak_rss_bytes(), time.perf_counter()
    tensors = work()
    return {
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_rss_bytes(),
        "imported_bytes": before,
        "tensors": tensors,
    }


if __name__ == "__main__":
    main()
