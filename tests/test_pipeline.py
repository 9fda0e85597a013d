"""The whole pipeline on a real model and real data."""

from __future__ import annotations

import functools
import gzip
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import compressor
from compressor import data, loading, pipeline
from compressor.artifact import digest
from compressor.errors import InputError, StageError
from compressor.recipe import Step
from compressor.report import Report, problem
from compressor.report.markdown import replay
from compressor.stages import STAGES
from compressor.stages.quantize import search
from compressor.task import Split, Splits


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a search times decides what it makes: two runs here have to make the same."""
    monkeypatch.setattr(search, "timed", lambda task: False)


ROWS = ["baseline", "pruned", "recovered", "int8-dynamic", "int8-static"]


def shas(report: Report) -> dict[str, str]:
    return {artifact["name"]: artifact["sha256"] for artifact in report.document["artifacts"]}


def quick(model: Any, out: Path, **settings: Any) -> Report:
    """A run on one thread of the CPU."""
    return pipeline.run(model, out=out, provider=("cpu",), threads=(1,), **settings)


def test_every_artifact_of_the_way_is_a_row(finished: Report) -> None:
    document = finished.document
    assert problem(json.loads(json.dumps(document))) is None
    assert [artifact["name"] for artifact in document["artifacts"]] == ROWS
    for artifact in document["artifacts"]:
        path = finished.folder / artifact["path"]
        assert artifact["sha256"] == digest(path)
        assert artifact["size_bytes"] == path.stat().st_size
        assert artifact["accuracy"]["n"] == document["task"]["splits"]["test"]
    sources = {artifact["name"]: artifact["source"] for artifact in document["artifacts"]}
    assert sources["recovered"] == "artifacts/recovered.safetensors"
    assert sources["int8-static"] is None
    measured = {row["artifact"] for row in document["measurements"] if row["provider"] == "cpu"}
    assert measured == set(ROWS)


def test_an_absent_provider_is_a_row_with_the_reason(finished: Report) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    rows = [row for row in finished.document["measurements"] if row["provider"] == "cuda"]
    assert {row["artifact"] for row in rows} == set(ROWS)
    assert all(row["skipped"] == "onnxruntime here has no CUDAExecutionProvider" for row in rows)


def test_accuracy_is_that_of_the_file(finished: Report) -> None:
    """The reported figures are what anybody gets who runs the files on the test split."""
    splits = data.read("digits").splits
    (images,), labels = splits.test.fetch(splits.test.indices)
    for artifact in finished.document["artifacts"]:
        path = finished.folder / artifact["path"]
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (outputs,) = session.run(None, {"input": images})
        right = float((outputs.argmax(axis=1) == labels).mean())
        assert artifact["accuracy"]["accuracy"] == pytest.approx(right, abs=2 / len(labels))


def test_pruning_and_quantization_make_it_smaller(finished: Report) -> None:
    by_name = {artifact["name"]: artifact for artifact in finished.document["artifacts"]}
    assert by_name["pruned"]["macs"] < 0.4 * by_name["baseline"]["macs"]
    assert by_name["recovered"]["params"] == by_name["pruned"]["params"]
    sizes = [by_name[name]["size_bytes"] for name in ROWS]
    assert sizes == sorted(sizes, reverse=True)
    drops = {name: by_name[name]["accuracy"]["drop"]["value"] for name in ROWS}
    assert drops["baseline"] == 0
    assert drops["recovered"] < drops["pruned"]


def test_the_best_is_ready_to_use(finished: Report) -> None:
    best = next(one for one in finished.document["artifacts"] if one["best"])
    assert digest(finished.folder / "best.onnx") == best["sha256"]
    said = json.loads((finished.folder / "best.json").read_text())
    assert said["artifact"] == best["name"] == finished.best
    splits = data.read("digits").splits
    (images,), labels = splits.test.head(64)
    outputs = compressor.session(finished.folder)(images)
    assert outputs.shape == (64, 10)
    assert (outputs.argmax(axis=1) == labels).mean() > 0.8


def test_raw_values_are_kept(finished: Report) -> None:
    packed = (finished.folder / finished.document["samples"]).read_bytes()
    lines = json.loads(gzip.decompress(packed))
    latencies = {
        (line["artifact"], line["runtime"]): line
        for line in lines
        if line["quantity"] == "latency_ms" and line["provider"] == "cpu"
    }
    for row in finished.document["measurements"]:
        if row["provider"] == "cpu":  # in onnxruntime, and in OpenVINO where that is installed
            values = np.concatenate(latencies[row["artifact"], row["runtime"]]["values"])
            assert row["latency_ms"]["n"] == len(values)
            assert row["latency_ms"]["p50"] == np.median(values)


def test_replaying_the_recipe_gives_the_same_bytes(
    finished: Report, trained: Path, tmp_path: Path
) -> None:
    again = quick(trained, tmp_path / "again", recipe=finished.folder / "recipe.toml")
    assert shas(again) == shas(finished)
    assert again.document["recipe"] == finished.document["recipe"]


def test_artifacts_carry_no_paths(finished: Report) -> None:
    for path in (finished.folder / "artifacts").iterdir():
        text = path.read_bytes()
        assert str(finished.folder).encode() not in text
        assert b"site-packages" not in text
        assert not re.search(rb"\.py\b(?!torch)", text.replace(b"org.pytorch", b"")), path.name


def test_the_same_run_again_shows_the_stored_report(finished: Report, trained: Path) -> None:
    again = pipeline.run(
        trained, prune=0.5, epochs=6, quantize="int8", threads=(1,), out=finished.folder
    )
    assert again.stored
    assert again.document == finished.document


def test_another_run_is_refused_and_nothing_is_touched(finished: Report, trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}
    with pytest.raises(InputError, match=r"holds another run.*--fresh"):
        quick(trained, finished.folder, prune=0.25)
    assert {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")} == before


def test_a_folder_of_other_files_is_never_used(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        quick(trained, tmp_path, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_test_labels_decide_nothing(trained: Path, tmp_path: Path) -> None:
    """Other test labels change what is reported, never what is made."""
    splits = data.read("digits").splits
    (images,), labels = splits.test.fetch(splits.test.indices)
    parts = {
        name: (part.fetch(part.indices)[0][0], part.fetch(part.indices)[1])
        for name, part in (("train", splits.train), ("validate", splits.validate))
    }
    made = []
    for name, given in (("right", labels), ("wrong", (labels + 1) % 10)):
        report = quick(
            trained,
            tmp_path / name,
            data={**parts, "test": (images, given)},
            prune=0.5,
            epochs=1,
            quantize="int8-static",
        )
        made.append(report)
    assert shas(made[0]) == shas(made[1])
    assert made[1].document["artifacts"][0]["accuracy"]["accuracy"] < 0.1


def test_a_failed_stage_keeps_finished_work(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @functools.wraps(STAGES["quantize"])
    def broken(artifact: Any, task: Any, into: Path, **settings: Any) -> Any:
        raise RuntimeError("the disk is on fire")

    @functools.wraps(STAGES["prune"])
    def torn(artifact: Any, task: Any, into: Path, **settings: Any) -> Any:
        raise RuntimeError("the disk is on fire")

    wanted = {"prune": 0.5, "epochs": 0, "quantize": "int8"}
    with monkeypatch.context() as patched:
        patched.setitem(STAGES, "quantize", broken)
        report = quick(trained, tmp_path / "run", **wanted)
        # The others are measured all the same.
        assert list(shas(report)) == ["baseline", "pruned"]
        assert report.document["failed"] == ["int8-dynamic", "int8-static"]
        assert "the disk is on fire" in str(report)
        # What others start from has to work.
        patched.setitem(STAGES, "prune", torn)
        with pytest.raises(StageError, match=r"'pruned'.*the disk is on fire"):
            quick(trained, tmp_path / "other", **{**wanted, "prune": 0.25})
    assert (tmp_path / "other" / "artifacts" / "baseline.onnx").is_file()
    assert not (tmp_path / "other" / "report.json").exists()
    # The same run tries again what had failed, and only that.
    again = quick(trained, tmp_path / "run", **wanted)
    assert list(shas(again)) == ["baseline", "pruned", "int8-dynamic", "int8-static"]
    cached = {stage.get("artifact"): stage["cached"] for stage in again.document["stages"]}
    assert cached["pruned"]
    assert not cached["int8-static"]


def test_an_unfinished_run_goes_on_where_it_was(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"prune": 0.5, "epochs": 1, "quantize": "int8-static"}

    def interrupted(*given: Any, **settings: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quick(trained, tmp_path / "run", **wanted)
    (tmp_path / "run" / "artifacts" / "int8-static.onnx").write_bytes(b"torn")
    report = quick(trained, tmp_path / "run", **wanted)
    cached = {
        (stage["stage"], stage.get("artifact")): stage["cached"]
        for stage in report.document["stages"]
    }
    assert cached["prune", "pruned"]
    assert cached["distill", "recovered"]
    assert not cached["quantize", "int8-static"], "a damaged file is made again"
    assert not cached["measure", None], "timings are never reused"


def test_other_code_with_the_same_weights_is_another_run(tmp_path: Path) -> None:
    linear = [torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)]
    x, y = np.random.default_rng(0).random((60, 8), np.float32), np.arange(60) % 3
    for middle in (torch.nn.ReLU(), torch.nn.Tanh()):
        model = torch.nn.Sequential(linear[0], middle, linear[1])
        if isinstance(middle, torch.nn.ReLU):
            quick(model, tmp_path / "run", data=(x, y))
        else:
            with pytest.raises(InputError, match="holds another run"):
                quick(model, tmp_path / "run", data=(x, y))


def test_the_printed_replay_gives_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    """With the flags that are no steps: here the seed, which training draws from."""
    command = f"compressor run {trained} --epochs 1 --seed 3 --provider cpu"
    first = quick(trained, tmp_path / "run", epochs=1, seed=3, command=command)
    words = shlex.split(replay(command))
    assert words == ["compressor", "run", str(trained), "--seed", "3", "--provider", "cpu",
                     "--recipe", "recipe.toml", "--out", "replayed"]  # fmt: skip
    assert replay(command) in first.markdown()
    recipe = tmp_path / "run" / "recipe.toml"
    assert shas(quick(trained, tmp_path / "again", recipe=recipe, seed=3)) == shas(first)


def test_a_primary_target_that_is_absent(trained: Path, tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    report = pipeline.run(
        trained, prune=0.5, epochs=0, provider="cuda, cpu", threads=(1,), out=tmp_path / "run"
    )
    assert report.best == "baseline"
    assert not report.document["budget_held"]
    images = data.read("digits").splits.test.head(3)[0][0]
    assert compressor.session(tmp_path / "run")(images).shape == (3, 10)


def test_each_split_is_read_a_few_times_only(trained: Path, tmp_path: Path) -> None:
    """Data on demand may be slow: nothing reads a split once for every row."""
    splits = data.read("digits").splits
    read = {"validate": 0, "test": 0}

    def counted(name: str) -> Split:
        part = getattr(splits, name)

        def fetch(at: Any) -> Any:
            read[name] += len(at)
            return part.fetch(at)

        return Split(fetch, part.indices)

    watched = Splits(splits.train, counted("validate"), splits.calibrate, counted("test"))
    pipeline.run(
        trained, data=watched, prune=0.5, epochs=0, quantize="int8", provider=("cpu",),
        threads=(1, 2), out=tmp_path / "run",
    )  # fmt: skip
    # Labels are checked, contents digested, outputs taken.
    assert read["test"] <= 3 * len(splits.test) + 64  # and a look at the first few


def test_a_notebook_gives_the_same_report(trained: Path, tmp_path: Path) -> None:
    splits = data.read("digits").splits
    loaders = []
    for part in (splits.train, splits.test):
        (images,), labels = part.fetch(part.indices)
        pairs = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
        loaders.append(DataLoader(pairs, batch_size=32))
    model = loading.load(trained)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = compressor.run(
        model,
        data=tuple(loaders),
        prune=0.5,
        epochs=1,
        quantize="int8",
        provider=("cpu",),
        threads=(1,),
        out=tmp_path / "run",
    )
    assert [artifact["name"] for artifact in report.document["artifacts"]] == ROWS
    assert report.document["task"]["kind"] == "classification"
    assert report.document["task"]["splits"]["test"] == len(splits.test)
    assert model.training
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert "int8-static" in str(report)
    # A torch file of a live model is rebuilt by whoever has its factory.
    with pytest.raises(InputError, match="--arch"):
        compressor.load(tmp_path / "run" / "artifacts" / "pruned.safetensors")
    pruned = compressor.load(
        tmp_path / "run" / "artifacts" / "pruned.safetensors", arch=lambda: loading.load(trained)
    )
    assert (
        sum(part.numel() for part in pruned.parameters())
        == (report.document["artifacts"][1]["params"])
    )


def test_without_data_nothing_is_trained_or_judged(tmp_path: Path) -> None:
    model = compressor.save(
        torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)),
        tmp_path / "model.pt",
        factory="shop:net",
        inputs=torch.zeros(2, 8),
    )
    report = quick(
        model,
        tmp_path / "run",
        arch=lambda: torch.nn.Sequential(
            torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)
        ),
        prune=0.5,
        quantize="int8",
    )
    names = [artifact["name"] for artifact in report.document["artifacts"]]
    assert names == ["baseline", "pruned", "int8-dynamic"]
    rows = report.document["measurements"]
    assert {row["skipped"] for row in rows if row["artifact"] == "int8-static"} == {
        "no data to calibrate with: add --data SPEC"
    }
    for artifact in report.document["artifacts"]:
        assert artifact["accuracy"] == {"skipped": "no data"}
        assert artifact["fidelity"]["n"] > 0
        assert artifact["within_budget"] is None
    assert report.best == "baseline"
    assert any("no data" in warning for warning in report.document["warnings"])
    assert "fine-tuned" in str(report)


def test_a_chain_of_steps_in_any_order(trained: Path, tmp_path: Path) -> None:
    """No order is hard-wired: twice pruned, recovered in between, quantized from the middle."""
    steps = [
        Step("prune", {"ratio": 0.25}, "lean"),
        Step("distill", {"epochs": 1, "loss": "labels"}, "fit"),
        Step("prune", {"ratio": 0.5}, "leaner"),
        Step("quantize", {"scheme": "dynamic"}, "small", "fit"),
    ]
    report = quick(trained, tmp_path / "run", recipe=steps)
    params = {one["name"]: one["params"] for one in report.document["artifacts"]}
    assert params["baseline"] > params["lean"] == params["fit"] > params["leaner"]
    assert params["small"] == params["fit"]
    stages = [step["stage"] for step in report.document["artifacts"][-1]["steps"]]
    assert stages == ["prune", "distill", "export", "quantize"]
    loaded = compressor.load(tmp_path / "run" / "artifacts" / "leaner.safetensors")
    assert sum(part.numel() for part in loaded.parameters()) == params["leaner"]


def test_a_model_is_quantized_though_nothing_is_cut(tmp_path: Path) -> None:
    from compressor.demo import demo

    model = demo("lstm", epochs=1, out=tmp_path / "lstm.pt").path
    report = quick(
        model, tmp_path / "run", prune=0.5, keep=["rnn"], epochs=1, quantize="int8-dynamic"
    )
    assert [one["name"] for one in report.document["artifacts"]] == ["baseline", "int8-dynamic"]
    reasons = {
        row["artifact"]: row["skipped"]
        for row in report.document["measurements"]
        if "skipped" in row
    }
    assert "rnn: asked for with keep" in reasons["pruned"]
    assert reasons["recovered"] == "pruned was skipped"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"provider": ("tpu",)}, "--provider 'tpu' is unknown: choose from cpu, cuda"),
        ({"batch": (0,)}, "--batch 0: give 1 or more"),
        ({"threads": ()}, "at least one value"),
        ({"bench_time": "long"}, "--bench-time 'long'"),
        ({"max_drop": float("nan")}, "--max-drop nan"),
        ({"max_drop": -1}, "--max-drop -1"),
        ({"time_budget": 0}, "--time-budget 0: give seconds, more than 0, such as 600"),
        ({"time_budget": float("inf")}, "--time-budget inf"),
        ({"epochs": -1}, "--epochs -1"),
        ({"prune": 1.0}, "--prune 1.0: give the fraction of channels to remove"),
        ({"quantize": "int7"}, "--quantize 'int7' is unknown"),
        ({"metric": "bleu"}, "--metric 'bleu' is unknown for classification: choose from accuracy"),
        ({"keep": ("conv1",)}, "add --prune"),
        ({"prune": 0.5, "keep": ("nothing*",)}, "matches no layer"),
        ({"recipe": Path("none.toml")}, "recipe none.toml cannot be read"),
        ({"recipe": [Step("shrink")]}, "stage 'shrink' is unknown: choose from student, prune"),
        ({"recipe": [Step("prune", {"ration": 0.5})]}, "prune has no setting 'ration'"),
        ({"recipe": [Step("prune")]}, "prune takes one of ratio, macs"),
        ({"prune": "speed=0.5"}, "--prune 'speed=0.5': give a ratio such as 0.5, or one of macs"),
        ({"prune": "latency=1.5"}, "give the fraction of latency to keep"),
        ({"prune": 0.5, "keep": ["nothing*"]}, "--keep 'nothing*' matches no layer"),
        ({"recipe": [Step("prune", {"ratio": 0.5}, source="x")]}, "no earlier step makes"),
        (
            {"recipe": [Step("quantize", {"scheme": "fp16"}), Step("prune", {"ratio": 0.5})]},
            "'pruned': prune takes a PyTorch model, and 'fp16' is already ONNX",
        ),
        ({"seed": -1}, "--seed -1"),
        ({"recipe": [Step("prune", {"ratio": 0.5}, "../x")]}, "cannot be a file name"),
    ],
)
def test_wrong_arguments_are_one_line(
    trained: Path, tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as error:
        pipeline.run(trained, **{"out": tmp_path / "run", "threads": (1,), **wrong})
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "report.json").exists()
