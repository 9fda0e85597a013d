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
