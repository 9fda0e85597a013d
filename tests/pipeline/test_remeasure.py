"""Who is slower: the decision on made-up looks, and files that are timed again."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from compressor.artifact import digest
from compressor.errors import InputError
from compressor.measure.process import Worker
from compressor.measure.protocol import Observed
from compressor.measure.turns import disabled
from compressor.measurement import Measurement, Target
from compressor.pipeline.remeasure import (
    MORE,
    PROCESSES,
    Look,
    Verdict,
    remeasure,
    slowdown,
    slower,
)
from compressor.report import Report

LIMIT = 0.05
MODULE = sys.modules["compressor.pipeline.remeasure"]


def look(ratio: float, noise: float = 0.0, seed: int = 0, rounds: int = 8) -> Look:
    """Three starts of blocks of 4 calls; the new file takes ``ratio`` times as long."""
    rng = np.random.default_rng(seed)
    old = np.exp(noise * rng.standard_normal((PROCESSES * rounds, 4)))
    new = ratio * np.exp(noise * rng.standard_normal(old.shape))
    return Look(old.tolist(), new.tolist(), (rounds,) * PROCESSES)


def told(first: Look, *later: Look) -> tuple[Verdict, int]:
    """The verdict where every further look is the next of ``later``, and how many were taken."""
    left = list(later)
    verdict = slower(first, lambda: left.pop(0), LIMIT)
    return verdict, len(later) - len(left)


SECOND = 1 + MORE


@pytest.mark.parametrize(
    ("first", "later", "said", "taken"),
    [
        # Clear at once: nothing more is asked.
        (1.0, (), "ok", 0),
        (0.5, (), "ok", 0),
        # Slower twice.
        (1.2, (1.2,) * SECOND, "slower", SECOND),
        # A slow day: the second round does not confirm it.
        (1.2, (1.0,) * SECOND, "ok", SECOND),
        (1.2, (1.05,) * SECOND, "inconclusive", SECOND),
        # In doubt: more looks, once; what stays in doubt does not fail.
        (1.05, (1.05,) * MORE, "inconclusive", MORE),
        (1.05, (1.0,) * MORE, "ok", MORE),
        (1.06, (1.2,) * (MORE + SECOND), "slower", MORE + SECOND),
    ],
)
def test_only_what_is_slower_twice_fails(
    first: float, later: tuple[float, ...], said: str, taken: int
) -> None:
    verdict, looks = told(look(first), *map(look, later))
    assert (verdict.said, looks) == (said, taken)


@given(st.floats(0.2, 5), st.floats(0, 0.3), st.integers(0, 99))
def test_the_bound_and_what_a_failure_means(ratio: float, noise: float, seed: int) -> None:
    seeds = iter(range(seed + 1, seed + 1000))
    taken: list[Look] = []

    def again() -> Look:
        taken.append(look(ratio, noise, next(seeds), rounds=2))
        return taken[-1]

    verdict = slower(look(ratio, noise, seed, rounds=2), again, LIMIT)
    assert len(taken) <= MORE + SECOND
    above = [one["low"] > 1 + LIMIT for one in verdict.rounds]
    assert (verdict.said == "slower") == (above == [True, True])
    assert (verdict.said == "ok") == (verdict.rounds[-1]["high"] <= 1 + LIMIT)


@given(st.floats(0.1, 10), st.integers(0, 50))
def test_what_slows_both_down_is_no_slow_down(ratio: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    machine = np.exp(rng.uniform(-2, 2, PROCESSES * 8))
    old = [[each] * 3 for each in machine]
    new = [[ratio * each] * 3 for each in machine]
    found = slowdown([Look(old, new, (8,) * PROCESSES)])
    assert found["value"] == pytest.approx(ratio)
    assert found["high"] / found["low"] < 1.15  # what another start may change, and no more


def test_two_speeds_of_single_rounds_do_not_move_the_ratio() -> None:
    """The ratio of the overall medians would be 2 here: most old rounds are fast, new ones slow."""
    old = [[1.0], [1.0], [1.0], [2.0], [2.0]] * 8
    new = [[1.0], [1.0], [2.0], [2.0], [2.0]] * 8
    assert slowdown([Look(old, new, (40,))])["value"] == 1.0


# Files.

HEAD = '<ir_version: 10, opset_import: ["": 20]> g '
GRAPH = "(float[N,4] x) => (float[N,4] y) { y = Mul(x, w) }"


def written(path: Path, text: str = GRAPH, weight: float = 1.0) -> Path:
    model = onnx.parser.parse_model(HEAD + text)
    held = np.full(4, weight, dtype=np.float32)
    model.graph.initializer.append(numpy_helper.from_array(held, "w"))
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path)
    return path


def report(folder: Path, **paths: Path) -> Report:
    artifacts: list[dict[str, Any]] = [
        {
            "name": name,
            "path": path.relative_to(folder).as_posix(),
            "sha256": digest(path),
            "steps": [],
            "source": None,
        }
        for name, path in paths.items()
    ]
    rows = [{"artifact": name, **Target().to_json(), "primary": True} for name in paths]
    return Report({"artifacts": artifacts, "measurements": rows}, folder)


def both(tmp_path: Path, **texts: str) -> tuple[Report, Report]:
    """Two reports whose files differ in a weight only."""
    made = []
    for weight, side in ((1.0, "old"), (2.0, "new")):
        paths = {
            name: written(tmp_path / side / f"{name}.onnx", text, weight)
            for name, text in texts.items()
        }
        made.append(report(tmp_path / side, **paths))
    return made[0], made[1]


Duel = Callable[..., Observed]


class Here(Worker):
    """A worker of a machine that has onnxruntime's CPU provider and nothing else."""

    def __init__(self) -> None:
        """Starts nothing."""

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert do == "providers"
        return {"providers": ["CPUExecutionProvider"]}

    def close(self) -> None:
        """Nothing was started."""


def again(old: Report, new: Report, **settings: Any) -> dict[str, dict[str, Any]]:
    return remeasure(old, new, LIMIT, **{"start": Here, **settings})


@pytest.fixture
def duels(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Duels that take no time, and what each was asked: every call takes 1 ms, but 1.3 ms in the
    new file of ``slow``; the new file of ``broken`` does not run, nor either of ``both``, nor the
    old one of ``fixed``; that of ``late`` ran once."""
    asked: list[dict[str, Any]] = []

    def duel(entrants: Any, feed: Any, **settings: Any) -> Observed:
        names = [name for name, *_ in entrants]
        files = [artifact for _, artifact, _ in entrants]
        asked.append({"entrants": names, "files": files, "feed": feed, **settings})
        observed = Observed(processes=(8,) * settings["processes"])
        for name, _, target in entrants:
            late = len(asked) > 1 and name == "late (old)"
            if late or name in ("broken (new)", "both (old)", "both (new)", "fixed (old)"):
                observed.failed[name] = "the worker was killed"
                continue
            ms = 1.3 if name in ("slow (new)", "late (new)") else 1.0
            blocks = ((ms,),) * sum(observed.processes)
            observed.measurements.append(Measurement(name, target, "latency_ms", "ms", blocks))
        return observed

    monkeypatch.setattr(MODULE, "duel", duel)
    return asked


def test_all_variants_take_turns_and_only_the_slow_one_is_asked_again(
    tmp_path: Path, duels: list[dict[str, Any]]
) -> None:
    old, new = both(tmp_path, fine=GRAPH, slow=GRAPH, broken=GRAPH)
    found = again(old, new, seconds=1.0, processes=1)
    assert {name: row["verdict"] for name, row in found.items()} == {
        "fine": "ok",
        "slow": "fails",
        "broken": "fails",
    }
    assert found["broken"]["why"] == "cannot be timed again: NEW's file: the worker was killed"
    assert found["slow"]["value"] == pytest.approx(1.3)
    assert len(found["slow"]["rounds"]) == 2
    assert found["broken"]["value"] is None
    first, *later = duels
    assert first["entrants"] == [
        f"{name} ({side})" for name in ("fine", "slow", "broken") for side in ("old", "new")
    ]
    assert [one["entrants"] for one in later] == [["slow (old)", "slow (new)"]] * SECOND
    # One start alone is never enough, and no two looks take turns in the same order.
    assert {one["processes"] for one in duels} == {PROCESSES}
    assert len({one["seed"] for one in duels}) == len(duels)


def test_the_same_file_is_not_timed(tmp_path: Path, duels: list[dict[str, Any]]) -> None:
    old, new = (
        report(tmp_path / side, same=written(tmp_path / side / "same.onnx"))
        for side in ("old", "new")
    )
    found = again(old, new)
    assert (found["same"]["verdict"], found["same"]["why"]) == ("ok", "the same file")
    assert not duels


def test_variants_of_one_report_alone_are_left_to_the_gate(
    tmp_path: Path, duels: list[dict[str, Any]]
) -> None:
    old, new = both(tmp_path, a=GRAPH, b=GRAPH)
    del old.document["artifacts"][0], new.document["artifacts"][1]
    assert again(old, new) == {}
    assert not duels


def changed(old: Report, new: Report) -> None:
    written(new.folder / "a.onnx", weight=3.0)


def gone(old: Report, new: Report) -> None:
    (new.folder / "a.onnx").unlink()


def named(path: str) -> Callable[[Report, Report], None]:
    def change(old: Report, new: Report) -> None:
        new.document["artifacts"][0]["path"] = path.format(old=old.folder)

    return change


def unnamed(old: Report, new: Report) -> None:
    del new.document["artifacts"][0]["path"]


def linked(old: Report, new: Report) -> None:
    gone(old, new)
    (new.folder / "a.onnx").symlink_to(old.folder / "a.onnx")


def circle(old: Report, new: Report) -> None:
    gone(old, new)
    (new.folder / "a.onnx").symlink_to(new.folder / "a.onnx")


def other(text: str) -> Callable[[Report, Report], None]:
    def change(old: Report, new: Report) -> None:
        made = new.document["artifacts"][0]
        made["sha256"] = digest(written(new.folder / "a.onnx", text))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed, "NEW's a.onnx is not the file that was measured"),
        (gone, "does not exist"),
        (named("../old/a.onnx"), "NEW names no file of its folder"),
        (named("{old}/a.onnx"), "NEW names no file of its folder"),
        (named("a\0.onnx"), "NEW names no file of its folder"),
        (linked, "NEW names no file of its folder"),
        (circle, "NEW names no file of its folder"),
        (unnamed, "NEW names no file of its folder"),
        (other("(float[N,5] x) => (float[N,5] y) { y = Relu(x) }"), "cannot be given the same"),
        (other("(float[N,4] z) => (float[N,4] y) { y = Relu(z) }"), "cannot be given the same"),
        (other("(float[N,4,2] x) => (float[N,4,2] y) { y = Relu(x) }"), "cannot be given the same"),
        (other("(float[N,4] x, float[N,4] z) => (float[N,4] y) { y = Add(x, z) }"), "the same"),
        (other("(float[7,4] x) => (float[7,4] y) { y = Relu(x) }"), "takes batches of 7 only"),
    ],
)
def test_files_that_cannot_be_timed_fail_with_the_reason(
    tmp_path: Path,
    duels: list[dict[str, Any]],
    change: Callable[[Report, Report], None],
    said: str,
) -> None:
    old, new = both(tmp_path, a=GRAPH, b=GRAPH)
    change(old, new)
    found = again(old, new)
    assert found["a"]["verdict"] == "fails"
    assert said in found["a"]["why"]
    assert found["b"]["verdict"] == "ok"  # the others are finished


def test_what_fails_on_olds_own_file_is_no_fault_of_new(
    tmp_path: Path, duels: list[dict[str, Any]]
) -> None:
    old, new = both(
        tmp_path, **dict.fromkeys(("gone", "changed", "batch", "fixed", "late", "both"), GRAPH)
    )
    (old.folder / "gone.onnx").unlink()
    written(old.folder / "changed.onnx", weight=9.0)
    batches = "(float[7,4] x) => (float[7,4] y) { y = Relu(x) }"
    old.document["artifacts"][2]["sha256"] = digest(written(old.folder / "batch.onnx", batches))
    found = again(old, new)
    said = {name: (row["verdict"], row["why"]) for name, row in found.items()}
    assert {verdict for name, (verdict, _) in said.items() if name != "both"} == {"n/a"}
    assert "does not exist" in said["gone"][1]
    assert "is not the file that was measured" in said["changed"][1]
    assert "takes batches of 7 only" in said["batch"][1]
    killed = "cannot be timed again: OLD's file: the worker was killed"
    assert said["fixed"][1] == said["late"][1] == killed
    # NEW does not run: whatever OLD does.
    assert said["both"][0] == "fails"
    (new.folder / "gone.onnx").unlink()
    assert again(old, new)["gone"]["verdict"] == "fails"


OPEN = "(float[N,M] x) => (float[N,M] y) { y = Relu(x) }"
HALF = "(float[N,M,4] x) => (float[N,M,4] y) { y = Relu(x) }"
IDS = "(int64[N,S] ids) => (int64[N,S] y) { y = Identity(ids) }"


@pytest.mark.parametrize(("one", "two"), [(GRAPH, OPEN), (OPEN, GRAPH)])
def test_an_open_axis_is_as_long_as_in_the_other_file(
    tmp_path: Path, duels: list[dict[str, Any]], one: str, two: str
) -> None:
    old, new = both(tmp_path, a=one)
    other(two)(old, new)
    # What was fed does not matter where a file says it.
    new.document["inputs"] = [{"name": "x", "shape": [9], "dtype": "float32", "high": 2}]
    assert again(old, new)["a"]["verdict"] == "ok"
    assert [array.shape for array in duels[0]["feed"]] == [(1, 4)]


def test_axes_of_both_files_make_one_shape(tmp_path: Path, duels: list[dict[str, Any]]) -> None:
    old, new = both(tmp_path, a=HALF)
    other("(float[N,3,K] x) => (float[N,3,K] y) { y = Relu(x) }")(old, new)
    assert again(old, new)["a"]["verdict"] == "ok"
    assert [array.shape for array in duels[0]["feed"]] == [(1, 3, 4)]


def record(*shape: int, dtype: str = "int64", high: int = 50) -> list[dict[str, Any]]:
    return [{"name": "tokens", "shape": list(shape), "dtype": dtype, "high": high}]


@pytest.mark.parametrize(
    ("fed", "asked", "shape", "high"),
    [
        # NEW's, then OLD's, whatever the input is called there; the flag before either.
        ((record(5), record(7)), (), (1, 7), 50),
        ((record(5), None), (), (1, 5), 50),
        ((record(5), record(7, 7)), (), (1, 5), 50),
        ((record(5), record(7, dtype="int32")), (), (1, 5), 50),
        ((record(5), record(7) * 2), (), (1, 5), 50),
        ((record(5), record(7)), ("ids=600",), (1, 600), 2),
        ((None, None), ("ids=600:int64<9",), (1, 600), 9),
    ],
)
def test_where_both_leave_an_axis_open_it_is_as_it_was_fed(
    tmp_path: Path,
    duels: list[dict[str, Any]],
    fed: tuple[Any, Any],
    asked: tuple[str, ...],
    shape: tuple[int, ...],
    high: int,
) -> None:
    old, new = both(tmp_path, a=IDS)
    for one, inputs in zip((old, new), fed, strict=True):
        one.document["inputs"] = inputs
    assert again(old, new, inputs=asked)["a"]["verdict"] == "ok"
    (array,) = duels[0]["feed"]
    assert (array.shape, str(array.dtype)) == (shape, "int64")
    assert array.max() < high
    assert high <= 9 or array.max() > 1


@pytest.mark.parametrize(
    ("graph", "asked", "said"),
    [
        (OPEN, (), r"cannot be guessed, add --input x=M"),
        (OPEN, ("z=4",), r"--input z: no file has such an input; known: x"),
        (OPEN, ("x=4x4",), r"an example of --input or --data is 4x4"),
        (GRAPH, ("x=5",), r"an example of --input or --data is 5"),
        (GRAPH, ("x",), r"write NAME=SHAPE"),
    ],
)
def test_inputs_that_are_missing_or_wrong_are_refused_before_timing(
    tmp_path: Path, duels: list[dict[str, Any]], graph: str, asked: tuple[str, ...], said: str
) -> None:
    old, new = both(tmp_path, a=graph, b=GRAPH)
    with pytest.raises(InputError, match=said):
        again(old, new, inputs=asked)
    assert not duels


def test_an_unchanged_file_needs_no_inputs(tmp_path: Path, duels: list[dict[str, Any]]) -> None:
    old, new = (
        report(tmp_path / side, same=written(tmp_path / side / "same.onnx", OPEN))
        for side in ("old", "new")
    )
    assert again(old, new)["same"]["verdict"] == "ok"
    assert again(old, new, inputs=("x=4",))["same"]["verdict"] == "ok"


@pytest.mark.parametrize(
    ("facts", "kept"),
    [
        ({"disabled": ["ConstantFolding"]}, ["ConstantFolding"]),
        ({"disabled": "ConstantFolding"}, []),
        ({"disabled": [1]}, []),
        ({"disabled": {"a": 1}}, []),
        ({}, []),
        (None, []),
    ],
)
def test_of_how_a_file_was_made_only_disabled_optimizers_are_taken(
    tmp_path: Path, duels: list[dict[str, Any]], facts: Any, kept: list[str]
) -> None:
    old, new = both(tmp_path, a=GRAPH)
    step = {"stage": "quantize", "settings": {}, **({} if facts is None else {"facts": facts})}
    new.document["artifacts"][0] |= {"steps": [step], "source": "../../secret.pt"}
    again(old, new)
    was, now = duels[0]["files"]
    assert (disabled(was), disabled(now)) == ([], kept)
    assert now.source is None


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"runtime": "torch"}, "only ONNX files are timed again"),
        ({"runtime": "torch-compile", "provider": "cuda"}, "only ONNX files are timed again"),
        ({"runtime": "pickle"}, "only ONNX files are timed again"),
        ({"provider": "quantum"}, "only ONNX files are timed again"),
        ({"provider": "cuda"}, "onnxruntime here has no CUDAExecutionProvider: compare on"),
    ],
)
def test_a_target_that_is_not_to_be_had_is_refused(
    tmp_path: Path, duels: list[dict[str, Any]], place: dict[str, str], said: str
) -> None:
    old, new = both(tmp_path, a=GRAPH)
    new.document["measurements"][0] |= place
    with pytest.raises(InputError, match=said):
        again(old, new)
    assert not duels


@pytest.mark.parametrize("side", [0, 1])
def test_benchmarks_hold_no_models(tmp_path: Path, side: int) -> None:
    reports = both(tmp_path, a=GRAPH)
    reports[side].document["benchmarks"] = ["test_a"]
    with pytest.raises(InputError, match=f"{('OLD', 'NEW')[side]} is the JSON of benchmarks"):
        again(*reports)


def test_variants_with_other_inputs_take_turns_apart(
    tmp_path: Path, duels: list[dict[str, Any]]
) -> None:
    old, new = both(tmp_path, a=GRAPH, b="(float[N,2] x) => (float[N,2] y) { y = Relu(x) }")
    assert set(again(old, new)) == {"a", "b"}
    assert [array.shape for one in duels for array in one["feed"]] == [(1, 4), (1, 2)]


def test_a_report_without_measurements_is_refused(tmp_path: Path) -> None:
    old, new = both(tmp_path, a=GRAPH)
    new.document["measurements"] = []
    with pytest.raises(InputError, match="no measurement"):
        again(old, new)


def test_real_files_in_real_workers(tmp_path: Path) -> None:
    """What is slower is not asserted, only that both were timed and that NaN is no fast result."""
    broken = "(float[N,4] x) => (float[N,4] y) { z = Sub(x, x) y = Div(z, z) }"
    old, new = both(tmp_path, fine=GRAPH, nan=GRAPH)
    made = new.document["artifacts"][1]
    made["sha256"] = digest(written(new.folder / "nan.onnx", broken))
    before = copy.deepcopy(new.document)
    found = remeasure(old, new, 1e9, seconds=0.01)
    assert found["fine"]["verdict"] == "ok"
    assert 0 < found["fine"]["low"] <= found["fine"]["value"] <= found["fine"]["high"]
    assert found["nan"]["verdict"] == "fails"
    assert "not finite" in found["nan"]["why"]
    assert new.document == before
