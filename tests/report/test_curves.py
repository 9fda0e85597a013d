"""Learning curves, throughput by batch, delay by load, further costs, noise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from test_report import document

from compressor.report import curves


def cells(table: str) -> list[list[str]]:
    """The rows of a markdown table, header first."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    del lines[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_step_that_trained_is_told_once() -> None:
    (one,) = curves.histories(document())
    assert (one["artifact"], one["stage"], one["best"]) == ("recovered", "distill", True)
    assert [epoch["epoch"] for epoch in one["epochs"]] == [1, 2]
    for best, trained in (("pruned", False), ("recovered", True)):
        changed = document()
        for artifact in changed["artifacts"]:
            artifact["best"] = artifact["name"] == best
        assert [one["best"] for one in curves.histories(changed)] == [trained]


@pytest.mark.parametrize(
    "history", [None, [], "long", {"epoch": 1}, [3], [{"epoch": 1}], [{"epoch": 1, "loss": "low"}]]
)
def test_a_fact_of_another_kind_is_no_history(history: Any) -> None:
    changed = document()
    for artifact in changed["artifacts"]:
        for step in artifact["steps"]:
            step["facts"]["history"] = history
    assert curves.histories(changed) == []


def test_two_ways_of_training_are_two_lines() -> None:
    changed = document()
    steps = changed["artifacts"][3]["steps"] = copy.deepcopy(changed["artifacts"][3]["steps"])
    steps[1] |= {"stage": "_qat$"}
    steps[1]["facts"]["history"] = [{"epoch": 1, "loss": 2.0}]
    assert [one["stage"] for one in curves.histories(changed)] == ["distill", "_qat$"]
    assert curves.learning(changed) != curves.learning(document())


def _distilled(document: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """The document with ``facts`` in its step that trained, wherever that stands."""
    for artifact in document["artifacts"]:
        for step in artifact["steps"]:
            if step["stage"] == "distill":
                step["facts"] |= copy.deepcopy(facts)
    return document


BESIDE = {"rate": 3e-3, "seconds": 2.5, "examples_per_s": 570.0, "stopped": "patience", "ema": None}


def test_what_else_is_known_of_an_epoch_is_no_curve() -> None:
    history = [
        {"epoch": 1, "loss": 1.21, "accuracy": 0.9402, **BESIDE},
        {"epoch": 2, "loss": 0.73, "accuracy": 0.9741, **BESIDE},
    ]
    changed = _distilled(document(), history=history)
    assert curves.histories(changed) == curves.histories(document())
    assert curves.learning(changed) == curves.learning(document())


def test_the_metric_is_a_curve_where_it_was_taken() -> None:
    history: list[dict[str, Any]] = [
        {"epoch": 1, "loss": 1.21, "train_accuracy": 0.9, **BESIDE},
        {"epoch": 2, "loss": 0.73, "accuracy": 0.9741, "train_accuracy": 0.99, **BESIDE},
        {"epoch": 3, "loss": 0.5, "accuracy": None, "train_accuracy": 1.0, **BESIDE},
    ]
    changed = _distilled(document(), history=history)
    (one,) = curves.histories(changed)
    assert one["epochs"] == [
        {"epoch": 1, "loss": 1.21, "train_accuracy": 0.9},
        {"epoch": 2, "loss": 0.73, "accuracy": 0.9741, "train_accuracy": 0.99},
        {"epoch": 3, "loss": 0.5, "train_accuracy": 1.0},
    ]
    with_train = curves.learning(changed)
    for epoch in history:
        del epoch["train_accuracy"]
    without = curves.learning(_distilled(changed, history=history))
    for epoch in history:
        epoch.pop("accuracy", None)
    bare = curves.learning(_distilled(changed, history=history))
    assert len({with_train, without, bare}) == 3


def test_the_training_split_is_dashed(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(curves, "png", lambda figure: figures.append(figure) or b"")
    history = [{"epoch": at, "loss": 1 / at, "train_accuracy": 1 - 0.5 / at} for at in (1, 2, 3)]
    curves.learning(_distilled(document(), history=[{**one, "accuracy": 0.9} for one in history]))
    curves.learning(_distilled(document(), history=history))
    both, alone = figures
    loss, metric = both.axes
    assert [line.get_linestyle() for line in loss.get_lines()] == ["-"]
    seen, train = metric.get_lines()
    assert (seen.get_linestyle(), train.get_linestyle()) == ("-", "--")
    assert seen.get_color() == train.get_color()
    assert list(train.get_ydata()) == [0.5, 0.75, 1 - 0.5 / 3]
    assert metric.get_ylabel() == "accuracy on validate\n(dashed: on train)"
    assert [list(line.get_xdata()) for line in alone.axes[1].get_lines()] == [[], [1, 2, 3]]


TRAINED = {
    "epochs": 12, "best_epoch": 9, "stopped": "no better for 3 epochs", "seconds": 185.4,
    "examples_per_s": 4310.2, "device": "cuda", "precision": "bf16", "processes": 2,
    "optimizer": "adamw", "parameters": 21_840, "teacher": None,
}  # fmt: skip


def test_how_long_and_how_fast_it_trained() -> None:
    changed = _distilled(document(), training=TRAINED)
    header, row = cells(curves.training(changed, markdown=True))
    assert dict(zip(header, row, strict=True)) == {
        "variant": "recovered", "stage": "distill", "epochs": "12", "best epoch": "9",
        "stopped early": "no better for 3 epochs", "time": "3 min 05 s", "examples/s": "4.31k",
        "device": "cuda", "precision": "bf16", "processes": "2", "optimizer": "adamw",
        "parameters": "21.8k", "teacher": "none",
    }  # fmt: skip
    lines = curves.training(changed).splitlines()
    assert len(lines) == 3
    assert lines[2].split()[:3] == ["recovered", "distill", "12"]


def test_what_cross_validation_reached_stands_beside_it() -> None:
    odd: Any
    for odd in (None, 7, {}, {"mean": "0.9", "deviation": 0.1, "folds": 5}):
        changed = _distilled(document(), training=TRAINED, folds=odd)
        assert "in folds" not in cells(curves.training(changed, markdown=True))[0]
    found = {"folds": 5, "metric": "a|b", "mean": 0.9, "deviation": 0.0125}
    changed = _distilled(document(), training=TRAINED, folds=found)
    header, row = cells(curves.training(changed, markdown=True))
    assert header[-1] == "in folds"
    assert row[-1].replace("\\", "") == "a&#124;b 0.9000 ± 0.0125, 5 folds"


def test_what_is_not_known_of_training_is_not_made_up() -> None:
    header, row = cells(curves.training(_distilled(document(), training={}), markdown=True))
    assert row == ["recovered", "distill", *["n/a"] * (len(header) - 2)]
    null = dict.fromkeys(TRAINED)
    header, row = cells(curves.training(_distilled(document(), training=null), markdown=True))
    told = {head: cell for head, cell in zip(header[2:], row[2:], strict=True) if cell != "n/a"}
    assert told == {"stopped early": "no", "teacher": "none"}
    odd = {"seconds": "long", "parameters": [1], "teacher": "a|b", "device": True}
    row = cells(curves.training(_distilled(document(), training=odd), markdown=True))[1]
    assert {"long", "[1]", "a&#124;b", "True"} <= {cell.replace("\\", "") for cell in row}


@pytest.mark.parametrize("training", [None, "long", [3], 7])
def test_a_fact_of_another_kind_is_no_training(training: Any) -> None:
    assert curves.training(_distilled(document(), training=training)) == ""
    assert curves.training(document()) == ""
    assert curves.training(document(artifacts=[])) == ""


def test_two_steps_that_trained_are_two_rows() -> None:
    changed = _distilled(document(), training=TRAINED)
    steps = changed["artifacts"][4]["steps"] = copy.deepcopy(changed["artifacts"][4]["steps"])
    steps[-1] |= {"stage": "qat", "facts": {"training": {**TRAINED, "stopped": None}}}
    _, *rows = cells(curves.training(changed, markdown=True))
    assert [row[:2] for row in rows] == [["recovered", "distill"], ["**int8-static** ★", "qat"]]
    assert [row[4] for row in rows] == ["no better for 3 epochs", "no"]


def test_throughput_needs_two_batches() -> None:
    changed = document()
    assert curves.throughput(changed) == {}
    first = changed["measurements"][0]
    more = {**first, "batch": 32, "primary": False, "throughput_per_s": 20_000.0}
    changed["measurements"].append(more)
    found = curves.throughput(changed)
    assert list(found) == ["cpu, 1 thread"]
    header, *rows = cells(found["cpu, 1 thread"])
    assert header == ["inferences/s", "batch 1", "batch 32"]
    assert rows[0] == ["baseline", "3.83k", "20.0k"]
    assert rows[1] == ["pruned", "9.26k", "n/a"]


def test_delay_by_load() -> None:
    header, *rows = cells(curves.delays(document()))
    assert header == ["p99 ms", "50% load", "75% load", "90% load"]
    assert rows[0] == ["baseline", "n/a at 1.92k/s", "4.18 at 2.87k/s", "10.4 at 3.45k/s"]
    assert rows[-1][0] == "**int8-static** ★"


def test_few_samples_give_a_lower_percentile() -> None:
    changed = document()
    for row in curves.loads(changed).values():
        for point in row["load_curve"]:
            point["p99"] = None
    assert cells(curves.delays(changed))[0][0] == "p90 ms"
    for row in curves.loads(changed).values():
        for point in row["load_curve"]:
            del point["p90"]
    assert cells(curves.delays(changed))[0][0] == "p50 ms"
    assert curves.load(changed) != curves.load(document())


def test_curves_of_different_lengths() -> None:
    changed = document()
    del changed["measurements"][0]["load_curve"][2]
    assert cells(curves.delays(changed))[1][-1] == "n/a"
    for row in changed["measurements"]:
        row["load_curve"] = []
    assert curves.loads(changed) == {}
    assert curves.delays(changed) == ""


def test_only_the_primary_target_has_a_load_curve() -> None:
    changed = document()
    for row in changed["measurements"]:
        if row.get("primary"):
            row["load_curve"] = None
    assert curves.loads(changed) == {}


def test_costs_leave_out_what_nobody_knows() -> None:
    said = curves.costs(document())
    header, *rows = cells(said)
    assert header == [
        "variant", "load ms", "first call ms", "CPU ms", "memory to load", "memory to run",
    ]  # fmt: skip
    assert rows[0] == ["baseline", "11.5", "1.04", "0.256", "41.0 MB", "45.0 MB"]
    assert said.endswith("\n\nNot known here: VRAM, energy mJ, device ms.")
    changed = document()
    changed["measurements"][0]["energy_mj"] = 1.25
    assert [row[-1] for row in cells(curves.costs(changed))[:3]] == ["energy mJ", "1.25", "n/a"]
    # What an older report never asked for is not said to be unknown.
    for row in changed["measurements"]:
        for field in ("vram_bytes", "energy_mj", "device_ms"):
            row.pop(field, None)
    assert "Not known" not in curves.costs(changed)
    assert curves.costs(document(measurements=[])) == ""


def test_noise() -> None:
    header, first, *rows = cells(curves.noise(document()))
    assert header == [
        "variant", "on", "IQR / median", "drift", "CPU / wall", "switches/s", "steal", "load",
        "governor",
    ]  # fmt: skip
    assert first == [
        "baseline", "cpu, batch 1, 1 thread", "12.0%", "-1.3%", "99%", "3.20", "0.0%", "0.310",
        "performance",
    ]  # fmt: skip
    assert len(rows) == 9  # five artifacts on two targets, and none on the third
