"""Our quantization against onnxruntime's own and NNCF's, in onnxruntime and in OpenVINO.

``python benchmarks/quantization/compare.py --mnist DIR --out FILE.json`` makes every quantized file
of every model (each in a process of its own), compares its outputs with the float ones in every
runtime, and times all of them by turns in one run, one thread. ``--only files`` stops before the
timing.

What is finished stays in ``--work``, and the same call again continues there: ours is made again
when the code of the stages has changed.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import models
import numpy as np
import peers
import torch
from making import FILES, File
from tabulate import tabulate

from compressor.artifact import Artifact, digest
from compressor.measure import protocol
from compressor.measure.fidelity import fidelity
from compressor.measure.protocol import CONTROL, SECONDS
from compressor.measure.runtime import Session, import_openvino, open_session
from compressor.measure.statistics import Blocks, noise_floor, speedup, summary
from compressor.measurement import Target
from compressor.metrics import METRICS, value
from compressor.task import Inputs

MAKING = Path(__file__).with_name("making.py")

FP32 = "fp32"

FUSION = "SkipLayerNormFusion"
"""Of onnxruntime: it slows MiniLM down, so every file of it also runs without."""

AS_EXACT = 0.1
"""Decibels by which a file may be further from float than another and still count as near."""

MEMORY_MB = 1e6

PEERS = ("onnxruntime", "nncf", "openvino", "transformers", "torch", "onnx")

SCOPES = {"onnxruntime": ("onnxruntime",), "all runtimes": ("onnxruntime", "openvino")}


@dataclass(frozen=True)
class Run:
    """A file, float or one of :data:`making.FILES`, where it runs, and fusions that are off."""

    file: str
    runtime: str = "onnxruntime"
    disabled: tuple[str, ...] = ()

    def __str__(self) -> str:
        off = f" without {FUSION}" if self.disabled else ""
        return f"{self.file} in {self.runtime}{off}"

    @property
    def ours(self) -> bool:
        """Whether our stage made the file."""
        return self.file.startswith("ours-")


def main() -> None:
    """Makes, compares and times what is missing, writes ``--out`` and prints its tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, JSON")
    parser.add_argument("--mnist", help="the folder of the IDX files, for the cnn")
    parser.add_argument("--work", type=Path, default=Path("build/quantization"))
    parser.add_argument("--models", nargs="+", default=models.MODELS, choices=models.MODELS)
    parser.add_argument("--seconds", type=float, default=SECONDS["full"], help="for each run")
    parser.add_argument("--only", choices=("files", "outputs"), help="stop after this")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in asked.models:
        folder = models.folder_of(name, asked.work, asked.mnist)
        files = {
            key: made(folder, key, file)
            for key, file in FILES.items()
            if name in (file.models or (name,)) and file.batch in (0, *models.MODELS[name].batches)
        }
        found[name] = {"files": files}
        if asked.only != "files":
            for batch in models.MODELS[name].batches:
                runs = runs_of(name, files, batch)
                near = {str(run): compared(folder, run, files, batch) for run in runs}
                found[name][f"batch {batch}"] = {"outputs": near}
                if asked.only is None:
                    times = timed(folder, runs, files, batch, asked.seconds)
                    found[name][f"batch {batch}"] |= judged(runs, near, times)
        versions = {peer: _version(peer) for peer in PEERS}
        peers.write(asked.out, {"peers": versions, "models": found})
        print(f"\n## {name}\n\n{shown(found[name])}", flush=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# --- files


def made(folder: Path, name: str, file: File) -> dict[str, Any]:
    """One file, made now or before, or why it is not there."""

    def make() -> dict[str, Any]:
        print(f"making {folder.name}, {name}", file=sys.stderr, flush=True)
        command = [sys.executable, str(MAKING), str(folder), name]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        (folder / f"{name}.log").write_text(ran.stdout + ran.stderr, encoding="utf-8")
        last = (ran.stderr if ran.returncode else ran.stdout).strip().rpartition("\n")[2]
        if ran.returncode:
            raise ChildProcessError(last[:200] or f"exit code {ran.returncode}")
        said: dict[str, Any] = json.loads(last)
        if "failed" not in said:
            paths = _paths(folder, said)
            said["digest"] = digest(*paths)
            said["size_bytes"] = sum(path.stat().st_size for path in paths)
        return said

    asked = {
        "source": digest(folder / "fp32.onnx"),
        "maker": digest(MAKING),
        "versions": {package: _version(package) for package in file.versions},
        "code": peers.code() if name.startswith("ours-") else None,
    }
    found: dict[str, Any]
    try:
        found = peers.cell(folder / f"{name}.json", asked, make)
    except ChildProcessError as error:  # not kept: the next call tries again
        found = {"failed": str(error)}
    return found


def _paths(folder: Path, file: Mapping[str, Any]) -> list[Path]:
    return [folder / name for name in (file["path"], *file["companions"])]


def runs_of(name: str, files: Mapping[str, Any], batch: int) -> list[Run]:
    """What takes turns: float first, then what could be made, each where it is of use."""
    there = {
        key
        for key, found in files.items()
        if "failed" not in found and FILES[key].batch in (0, batch)
    }
    runs = [Run(FP32), Run(FP32, "openvino")]
    for key in sorted(there):
        runs += [] if "openvino" in key else [Run(key)]
        # onnxruntime's dynamic files and its defaults are nothing that one would run in OpenVINO.
        runs += [Run(key, "openvino")] if "ort-" not in key or key == "ort-static-best" else []
    if name == "minilm":
        whole = [Run(FP32), *(run for run in runs if "ort-" in run.file)]
        runs += [
            Run(run.file, run.runtime, (FUSION,)) for run in whole if run.runtime == "onnxruntime"
        ]
    return runs


def artifact_of(folder: Path, run: Run, files: Mapping[str, Any]) -> Artifact:
    """The run's file as the protocol takes it, with the fusions that it does without."""
    plain: dict[str, Any] = {"path": f"{FP32}.onnx", "companions": []}
    file = plain if run.file == FP32 else files[run.file]
    path, *companions = _paths(folder, file)
    own = file.get("step", {}).get("facts", {}).get("disabled", ())
    step = {"stage": "quantize", "settings": {}, "facts": {"disabled": [*own, *run.disabled]}}
    return Artifact.of(path, "onnx", companions=companions, steps=(step,))


# --- outputs


def compared(folder: Path, run: Run, files: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """How near the run's outputs on the test part are to those of float, or why there are none."""
    artifact = artifact_of(folder, run, files)
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    inputs, targets = models.arrays(folder, "test")

    def make() -> dict[str, Any]:
        print(f"comparing {folder.name}, batch {batch}, {run}", file=sys.stderr, flush=True)
        try:
            got = _outputs(artifact, run, inputs, batch)
        except Exception as error:  # runtimes raise what they like
            return {"failed": str(error).strip().partition("\n")[0][:200]}
        float_file = folder / f"outputs-{batch}.npy"
        if run == Run(FP32):
            np.save(float_file, got)
        wanted = np.load(float_file)
        found = fidelity(about["kind"], wanted, got)
        norms = np.linalg.norm(wanted, axis=1) * np.linalg.norm(got, axis=1)
        found["cosine"] = float(((wanted * got).sum(axis=1) / norms).min())
        if about["labelled"]:
            found["accuracy"] = value(METRICS[about["kind"]][about["metric"]], got, targets)
        return found

    asked = {
        "digest": artifact.digest,
        "float": digest(folder / "fp32.onnx"),
        "disabled": protocol.disabled(artifact),
        "versions": {package: _version(package) for package in ("onnxruntime", "openvino")},
    }
    name = f"{run.file}@{run.runtime}{'-without' if run.disabled else ''}-outputs-{batch}.json"
    found: dict[str, Any] = peers.cell(folder / name, asked, make)
    return found


def _outputs(artifact: Artifact, run: Run, inputs: Inputs, batch: int) -> Any:
    session = Session(
        open_session(
            artifact.path, disabled=protocol.disabled(artifact), runtime=run.runtime, threads=1
        )
    )
    parts = []
    for start in range(0, len(inputs[0]), batch):
        given = (np.ascontiguousarray(part[start : start + batch]) for part in inputs)
        parts.append(session(*given))
    return np.concatenate(parts)


# --- times


def timed(
    folder: Path, runs: list[Run], files: Mapping[str, Any], batch: int, seconds: float
) -> dict[str, Blocks]:
    """Milliseconds of every call by run, block by block; all runs take turns, whatever their
    runtime. Float runs in a second worker as well."""
    entrants = {str(run): (artifact_of(folder, run, files), run.runtime) for run in runs}
    entrants[CONTROL] = entrants[str(Run(FP32))]

    def make() -> dict[str, Blocks]:
        print(f"timing {folder.name}, batch {batch}", file=sys.stderr, flush=True)
        inputs, _ = models.arrays(folder, "test")
        observed = protocol.duel(
            [
                (entrant, artifact, Target(runtime=runtime, batch=batch))
                for entrant, (artifact, runtime) in entrants.items()
            ],
            tuple(part[:batch] for part in inputs),
            seconds=seconds,
        )
        for entrant, why in observed.failed.items():
            print(f"{entrant}: {why}", file=sys.stderr, flush=True)
        return {name: blocks for (name, _), blocks in observed.times().items()}

    asked = {
        "seconds": seconds,
        "files": {name: artifact.digest for name, (artifact, _) in entrants.items()},
        "versions": {package: _version(package) for package in ("onnxruntime", "openvino")},
    }
    found: dict[str, Blocks] = peers.cell(folder / f"times-{batch}.json", asked, make)
    return found


def judged(runs: list[Run], near: Mapping[str, Any], times: Mapping[str, Blocks]) -> dict[str, Any]:
    """Every run against float, and ours against every peer, within onnxruntime and anywhere.

    A peer is met by the fastest of ours whose outputs are as near to float as the peer's. Where
    none is, the fastest of ours stands there as ``less exact``. A ratio above 1 is faster.
    """
    reference = times[str(Run(FP32))]
    rows = {
        str(run): {"ms": summary(times[str(run)]), "speedup": speedup(reference, times[str(run)])}
        for run in runs
        if str(run) in times
    }
    there = [run for run in runs if str(run) in rows and "failed" not in near[str(run)]]

    def middle(run: Run) -> float:
        return float(rows[str(run)]["ms"]["p50"])

    def decibels(run: Run) -> float:
        found = near[str(run)]["sqnr_db"]
        return math.inf if found is None else float(found)

    rivals = []
    for scope, runtimes in SCOPES.items():
        inside = [run for run in there if run.runtime in runtimes]
        ours = sorted((run for run in inside if run.ours), key=middle)
        for peer in sorted((run for run in inside if not run.ours), key=middle):
            exact = [run for run in ours if decibels(run) >= decibels(peer) - AS_EXACT]
            chosen = next(iter(exact or ours), None)
            if chosen is None or peer.file == FP32:
                continue
            ratio = speedup(times[str(peer)], times[str(chosen)])
            standing = "above" if ratio["low"] > 1 else "below" if ratio["high"] < 1 else "at"
            rivals.append(
                {
                    "scope": scope,
                    "peer": str(peer),
                    "ours": str(chosen),
                    "speedup": ratio,
                    "standing": standing if exact else f"{standing}, less exact",
                }
            )
    return {"runs": rows, "rivals": rivals, "noise_floor": noise_floor(reference, times[CONTROL])}


# --- tables


def shown(found: Mapping[str, Any]) -> str:
    """The figures of one model as markdown."""
    parts = [_files(found["files"])]
    for batch, part in found.items():
        if batch != "files":
            parts += [f"### {batch}", _runs(part)]
            if "rivals" in part:
                parts += ["Ours against each peer:", _rivals(part["rivals"], part["outputs"])]
                parts.append(f"Noise floor {part['noise_floor']:.1%}.")
    return "\n\n".join(parts)


table = functools.partial(tabulate, tablefmt="github", disable_numparse=True)


def _files(files: Mapping[str, Any]) -> str:
    heads = ["file", "size, MB", "made in, s", "peak memory, MB", "of it imports", "settings"]
    rows = []
    for name, file in files.items():
        if "failed" in file:
            rows.append([name, *["-"] * 4, file["failed"]])
            continue
        step = file.get("step", {"settings": {}, "facts": {}})
        settings = {
            key: step["settings"][key]
            for key in ("ranges", "repair", "left", "disabled")
            if step["settings"].get(key)
        }
        rows.append(
            [
                name,
                f"{file['size_bytes'] / MEMORY_MB:.2f}",
                f"{file['seconds']:.1f}",
                f"{file['peak_bytes'] / MEMORY_MB:.0f}",
                f"{file['imported_bytes'] / MEMORY_MB:.0f}",
                "; ".join(f"{key} {_plain(value)}" for key, value in settings.items()),
            ]
        )
    return table(rows, heads)


def _plain(value: Any) -> str:
    return str(value) if isinstance(value, str) else " ".join(map(str, value))


def _runs(part: Mapping[str, Any]) -> str:
    heads = ["run", "ms", "times as fast as fp32", "SQNR, dB", "agreement", "cosine", "accuracy"]
    rows = []
    for name, near in part["outputs"].items():
        row = part.get("runs", {}).get(name)
        fast = (
            [f"{row['ms']['p50']:.3f}", peers.interval(row["speedup"], ".2f")] if row else ["-"] * 2
        )
        rows.append([name, *fast, *_near(near)])
    return table(rows, heads)


def _near(near: Mapping[str, Any]) -> list[str]:
    if "failed" in near:
        return [near["failed"], "-", "-", "-"]
    return [
        "exact" if near["sqnr_db"] is None else f"{near['sqnr_db']:.1f}",
        "-" if near["top1_agreement"] is None else f"{near['top1_agreement']:.2%}",
        f"{near['cosine']:.4f}",
        f"{near['accuracy']:.2%}" if "accuracy" in near else "-",
    ]


def _rivals(rivals: list[dict[str, Any]], near: Mapping[str, Any]) -> str:
    heads = ["scope", "peer", "dB", "ours", "dB", "times as fast", "standing"]
    rows = [
        [
            row["scope"],
            row["peer"],
            _near(near[row["peer"]])[0],
            row["ours"],
            _near(near[row["ours"]])[0],
            peers.interval(row["speedup"], ".2f"),
            row["standing"],
        ]
        for row in rivals
    ]
    return table(rows, heads)


if __name__ == "__main__":
    import_openvino()  # here, where its telemetry is kept from starting
    main()
