"""Two runtimes for the recommended artifact: who is timed, what is said, what best.json names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor import pipeline
from compressor.artifact import Artifact
from compressor.errors import InputError
from compressor.measure import protocol
from compressor.measure.protocol import DUEL, Observed
from compressor.measurement import PLACES, Measurement, Target
from compressor.pipeline import measuring, targets_of, verdict
from compressor.pipeline.document import GPU
from compressor.pipeline.measuring import Measured, leave, race, rival
from compressor.report import problem
from compressor.task import Input, Split, Splits, Task

HERE, THERE = Target(), Target("openvino")
LABELS = np.arange(40) % 2
SPLIT = Split.arrays(np.zeros((40, 1), np.float32), LABELS)
RIGHT = np.eye(2)[LABELS]
TASK = Task("net", "classification", lambda: None, {}, (Input("x", (1,)),), "accuracy",
            Splits(SPLIT, SPLIT, SPLIT, SPLIT))  # type: ignore[arg-type, return-value]  # fmt: skip


# --- targets are data ---


@pytest.mark.parametrize("name", PLACES)
def test_every_name_is_a_target(name: str) -> None:
    *_, target = targets_of(["directml", name], (1,), (2,))
    assert (target.runtime, target.provider) == PLACES[name]


@pytest.mark.parametrize("name", ["torch", "torch-compile", "torch-cuda"])
def test_pytorch_is_compared_with_and_never_served_with(name: str) -> None:
    with pytest.raises(InputError, match=f"--provider {name} first: .* such as cpu,{name}$"):
        targets_of([name, "cpu"], (1,), (1,))
    there = Target(*PLACES[name])
    here = Target(provider=there.provider)
    assert rival([row(here), row(there)], "int8", here) is None


def test_more_time_brings_pytorch() -> None:
    def runtimes(bench_time: str) -> set[str]:
        found = targets_of(None, (1,), (1,), bench_time)
        return {one.runtime for one in found if one.runtime.startswith("torch")}

    assert runtimes("quick") == set()
    assert runtimes("normal") == {"torch"}
    assert runtimes("full") == {"torch", "torch-compile"}


def test_threads_are_the_cpus() -> None:
    found = targets_of("openvino,tensorrt", (1, 8), (1, 4))
    assert {(one.provider, one.threads) for one in found} == {
        ("cpu", 1),
        ("cpu", 4),
        ("tensorrt", 1),
    }


@pytest.mark.parametrize("here", [False, True])
def test_openvino_is_measured_where_it_is_installed(
    here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "installed", lambda package: here)
    found = [(one.runtime, one.provider) for one in targets_of(None, (1,), (1,))]
    both = [("onnxruntime", "cpu"), ("onnxruntime", "cuda")]
    assert found == both + [("openvino", "cpu")] * here


def test_an_unknown_provider_is_named() -> None:
    with pytest.raises(InputError, match=f"'tpu' is unknown: choose from {', '.join(PLACES)}"):
        targets_of("tpu", (1,), (1,))


def test_a_runtime_is_named_where_it_is_not_the_usual_one() -> None:
    assert str(HERE) == "cpu, batch 1, 1 thread"
    assert str(THERE) == "cpu, batch 1, 1 thread, openvino"


# --- the rival ---


def row(target: Target, **more: Any) -> dict[str, Any]:
    return {"artifact": "int8", **target.to_json(), **more}


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([row(HERE), row(THERE)], THERE),
        ([row(HERE)], None),
        ([row(HERE), row(THERE, skipped="unsupported")], None),
        ([row(HERE), {**row(THERE), "artifact": "other"}], None),
        ([row(HERE), row(Target("openvino", batch=8))], None),
        ([row(HERE), row(Target("openvino", threads=2))], None),
        ([row(HERE), row(Target(provider="cuda"))], None),
    ],
)
def test_a_rival_is_another_runtime_of_the_same_kind(rows: Any, found: Target | None) -> None:
    assert rival(rows, "int8", HERE) == found


# --- the race ---


def observed(ours: float, theirs: float) -> Observed:
    blocks = {HERE: ((ours,),) * 8, THERE: ((theirs,),) * 8}
    return Observed([Measurement(DUEL, t, "latency_ms", "ms", v) for t, v in blocks.items()])


def raced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Observed, **wrong: int
) -> tuple[Any, Measured]:
    (tmp_path / "int8.onnx").write_bytes(b"no duel reads it")
    artifact = Artifact.of(tmp_path / "int8.onnx", "onnx")
    theirs = {split: RIGHT.copy() for split in wrong}
    for split, count in wrong.items():
        theirs[split][:count] = 1 - theirs[split][:count]
    ours = dict.fromkeys(("validate", "test"), RIGHT)
    outputs = {
        measuring.place(HERE): {"baseline": ours, "int8": ours},
        measuring.place(THERE): {"baseline": theirs, "int8": theirs},
    }
    targets = {"validate": LABELS, "test": LABELS}
    measured = Measured([], None, targets, outputs=outputs)  # type: ignore[arg-type]
    monkeypatch.setattr(protocol, "duel", lambda *given, **more: seen)
    return race(TASK, artifact, HERE, THERE, measured, "quick", 0.01), measured


@pytest.mark.parametrize(
    ("theirs", "wrong", "said"),
    [
        (1.0, 0, "openvino is the faster: openvino runs at 2.00x"),
        (1.0, 20, "[2.00, 2.00] the speed of onnxruntime, but its outputs do not hold the budget."),
        (4.0, 0, "onnxruntime is the faster: openvino runs at 0.50x"),
        (2.0, 0, "both are as fast"),
    ],
)
def test_a_race_says_who_is_faster_and_whether_its_own_outputs_hold(
    theirs: float, wrong: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drop is against the baseline of the primary runtime, not against its own baseline."""
    seen = observed(2.0, theirs)
    found, measured = raced(tmp_path, monkeypatch, seen, validate=wrong, test=wrong)
    assert found["drop"]["value"] == wrong / 40
    assert found["within_budget"] is (wrong == 0)
    assert said in verdict.runtimes(found)
    assert [one.artifact for one in measured.raw] == [DUEL, DUEL]


@pytest.mark.parametrize(
    ("wrong", "lost", "holds", "said"),
    [
        ({"validate": 0, "test": 0}, 0.0, True, ", for a drop of 0.0000 ["),
        ({"validate": 20, "test": 0}, 0.0, False, ", but its outputs do not hold the budget."),
        ({"validate": 0, "test": 20}, 0.5, False, ", but its outputs do not hold the budget."),
        ({"validate": 0}, None, False, ", but its outputs could not be judged."),
    ],
)
def test_both_splits_have_to_hold_and_the_drop_is_that_on_test(
    wrong: dict[str, int],
    lost: float | None,
    holds: bool,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, _ = raced(tmp_path, monkeypatch, observed(2.0, 1.0), **wrong)
    assert (found["drop"] and found["drop"]["value"]) == lost
    assert found["within_budget"] is holds
    assert said in verdict.runtimes(found)


def test_the_sentence_names_the_drop_that_speed_costs() -> None:
    won = {
        "artifact": "int8", "runtime": "openvino", "versus": "onnxruntime", "value": 2.0,
        "low": 1.9, "high": 2.1, "verdict": "faster", "within_budget": True,
        "drop": {"value": 0.004, "low": -0.001, "high": 0.009},
    }  # fmt: skip
    assert verdict.runtimes(won).endswith(", for a drop of 0.0040 [-0.0010, 0.0090].")
    slower = {**won, "verdict": "slower"}  # nobody is handed on with it
    assert "drop" not in verdict.runtimes(slower)


def test_a_race_that_one_did_not_finish_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = observed(2.0, 1.0)
    seen.measurements[1] = Measurement(DUEL, THERE, "latency_ms", "ms", skipped="crashed")
    assert raced(tmp_path, monkeypatch, seen, validate=0, test=0)[0] is None


# --- what leaving PyTorch brings ---

TORCH_HERE = Target("torch")


def left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: Observed, *rows: Any) -> Any:
    both = []
    for name in ("baseline", "int8"):
        (tmp_path / f"{name}.onnx").write_bytes(b"no duel reads it")
        both.append(Artifact.of(tmp_path / f"{name}.onnx", "onnx"))
    measured = Measured([], None, {}, rows=list(rows))
    asked: list[Any] = []

    def duel(entrants: Any, *given: Any, **more: Any) -> Observed:
        asked.extend((name, target) for name, _, target in entrants)
        return seen

    monkeypatch.setattr(protocol, "duel", duel)
    return leave(TASK, *both, [HERE, TORCH_HERE], measured, "quick"), asked


def timed(**ms: float) -> Observed:
    targets = {"baseline": HERE, "int8": HERE, "torch": TORCH_HERE}
    return Observed(
        [
            Measurement(
                f"{'baseline' if name == 'torch' else name} (duel)",
                targets[name],
                "latency_ms",
                "ms",
                ((value,),) * 8,
            )
            for name, value in ms.items()
        ],
        (8,),
    )


def test_leaving_pytorch_is_a_ratio_for_the_baseline_and_the_best(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = {**row(TORCH_HERE), "artifact": "baseline"}
    ((found,), asked) = left(monkeypatch, tmp_path, timed(baseline=2, int8=1, torch=4), ran)
    first, best = "baseline (duel)", "int8 (duel)"
    assert asked == [(first, HERE), (best, HERE), (first, TORCH_HERE)]
    assert (found["runtime"], found["artifact"], found["p50"]) == ("torch", "int8", 4)
    assert found["baseline"]["value"] == pytest.approx(2)
    assert found["best"]["value"] == pytest.approx(4)
    assert found["best"]["verdict"] == "faster"
    said = verdict.left(found)
    assert said.startswith("Against the model in PyTorch eager, the baseline runs at 2.00x [")
    assert "and int8 runs at 4.00x [" in said


def test_where_pytorch_did_not_run_nothing_is_said_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = timed(baseline=2, int8=1, torch=4)
    assert left(monkeypatch, tmp_path, seen) == ([], [])
    skipped = {**row(TORCH_HERE, skipped="cannot be built"), "artifact": "baseline"}
    assert left(monkeypatch, tmp_path, seen, skipped) == ([], [])
    ran = {**row(TORCH_HERE), "artifact": "baseline"}
    assert left(monkeypatch, tmp_path, timed(baseline=2, int8=1), ran)[0] == []


# --- the run ---


@pytest.mark.parametrize(
    ("said", "target"),
    [
        ({"verdict": "faster", "within_budget": True}, THERE),
        ({"verdict": "faster", "within_budget": False}, HERE),
        ({"verdict": "slower", "within_budget": True}, HERE),
        ({"verdict": "inconclusive", "within_budget": True}, HERE),
        (None, HERE),
    ],
)
def test_only_a_runtime_that_is_proven_faster_and_good_enough_is_handed_on(
    said: dict[str, Any] | None, target: Target
) -> None:
    rows = [row(HERE), row(Target("openvino", threads=2)), row(THERE)]
    raced = said and {**said, "runtime": "openvino"}
    assert pipeline.home(rows, HERE, raced) == row(target)


def test_where_nothing_ran_the_primary_target_is_handed_on() -> None:
    assert pipeline.home([row(HERE, skipped="no")], HERE, None) == HERE.to_json()


def test_best_json_and_the_sentence_follow_the_race(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO may be absent: its race is made up."""
    won = {
        "artifact": "baseline", "runtime": "openvino", "versus": "onnxruntime", "value": 2.0,
        "low": 1.9, "high": 2.1, "verdict": "faster", "drop": None, "within_budget": True,
    }  # fmt: skip
    monkeypatch.setattr(pipeline, "rival", lambda *given: THERE)
    monkeypatch.setattr(pipeline, "race", lambda *given: won)
    x, y = np.random.default_rng(0).random((60, 8), np.float32), np.arange(60) % 3
    torch.manual_seed(0)
    report = pipeline.run(
        torch.nn.Linear(8, 3), data=(x, y), provider="cpu,openvino", threads=(1,),
        out=tmp_path / "run",
    )  # fmt: skip
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert (best["runtime"], best["provider"], best["threads"]) == ("openvino", "cpu", 1)
    assert {"artifact", "sha256", "settings", "disabled"} <= set(best)
    assert problem(json.loads(json.dumps(report.document))) is None
    assert report.document["recommendation"].endswith(verdict.runtimes(won))


def test_a_run_with_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    x, y = np.random.default_rng(0).random((60, 8), np.float32), np.arange(60) % 3
    torch.manual_seed(0)
    report = pipeline.run(
        torch.nn.Linear(8, 3), data=(x, y), provider=("cpu", "openvino"), threads=(1,),
        out=tmp_path / "run",
    )  # fmt: skip
    rows = {row["runtime"]: row for row in report.document["measurements"]}
    assert rows["openvino"]["session"]["settings"]["INFERENCE_PRECISION_HINT"] == "f32"
    assert rows["openvino"]["accuracy"] == rows["onnxruntime"]["accuracy"]
    assert rows["openvino"]["placement"]["share"] == {"CPU": 1}
    assert report.document["runtimes"]["within_budget"]


# --- int8 on CUDA ---


@pytest.mark.parametrize(
    ("scheme", "provider", "present", "warned"),
    [
        ("static", "cuda", True, True),
        ("dynamic", "cuda", True, True),
        ("fp16", "cuda", True, False),
        ("static", "cpu", True, False),
        ("static", "cuda", False, False),
    ],
)
def test_fp16_is_offered_for_int8_on_cuda(
    scheme: str, provider: str, present: bool, warned: bool
) -> None:
    from types import SimpleNamespace

    from compressor.pipeline.document import _on_gpu
    from compressor.recipe import Step

    maker: Any = SimpleNamespace(resolved=[Step("quantize", {"scheme": scheme}, name="q")])
    measured = Measured(["CUDAExecutionProvider"] if present else [], None, {})
    assert _on_gpu(maker, measured, [Target(provider=provider)]) == [GPU] * warned


def test_outputs_that_are_not_finite_fail_on_every_target_of_their_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Outputs are taken on one thread; on two they would be as bad."""
    (tmp_path / "int8.onnx").write_bytes(b"nothing reads it")
    artifact = Artifact.of(tmp_path / "int8.onnx", "onnx")

    def observe(artifacts: Any, target: Target, feed: Any, *, predict: Any, **more: Any) -> Any:
        seen = Observed([Measurement("int8", target, "latency_ms", "ms", ((1.0,),) * 8)], (8,))
        if predict and target.runtime == "onnxruntime":
            seen.outputs["other"] = {"test": RIGHT}
            seen.failed["int8"] = "not finite"
        return seen

    monkeypatch.setattr(measuring, "observe", observe)
    measured = Measured(["CPUExecutionProvider"], None, {})
    for target in (HERE, Target(threads=2), Target(batch=2)):
        seen = measuring._observe(
            TASK, [artifact], target, HERE, measured, {"test": (LABELS,)}, "quick", None, print
        )
        assert seen.failed == {"int8": "not finite"}
    elsewhere = Target("torch")
    seen = measuring._observe(TASK, [artifact], elsewhere, HERE, measured, {}, "quick", None, print)
    assert seen.failed == {}
    assert measured.outputs.keys() == {measuring.place(HERE), measuring.place(Target(batch=2))}
