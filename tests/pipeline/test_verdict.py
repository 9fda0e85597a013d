"""The choice, case by case: validate chooses, test judges, slower is never chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compressor.measure.statistics import drop, drops, mcnemar
from compressor.measurement import Target
from compressor.metrics import METRICS, own, scores, value
from compressor.pipeline.verdict import as_run, best_on, choose, judged, within
from compressor.task import Array, Input, Kind, Split, Splits, Task

SPLIT = Split.arrays(np.zeros((2, 1)), np.zeros(2, dtype=np.int64))
DATA = Splits(SPLIT, SPLIT, SPLIT, SPLIT)


def task(splits: Splits | None = DATA) -> Task:
    return Task("net", "classification", lambda: None, {}, (Input("x", (1,)),), "accuracy", splits)  # type: ignore[arg-type, return-value]


def row(name: str, p50: float, verdict: str = "faster") -> dict[str, Any]:
    """A measured row: ``verdict`` against a baseline of 10 ms."""
    speedup = {"value": 10 / p50, "low": 10 / p50, "high": 10 / p50, "verdict": verdict}
    return {"artifact": name, **Target().to_json(), "latency_ms": {"p50": p50}, "speedup": speedup}


def drops_of(**values: float) -> dict[str, Any]:
    """Accuracy fields whose interval is 0.005 on either side of the drop."""
    given = {"baseline": 0.0, **values}
    return {
        name: {"drop": {"value": value, "low": value - 0.005, "high": value + 0.005}}
        for name, value in given.items()
    }


BASELINE = row("baseline", 10, "same")


def chosen(rows: list[dict[str, Any]], validated: Any, tested: Any = None) -> tuple[str, bool, str]:
    names = [one["artifact"] for one in rows]
    choice = choose(task(), names, rows, validated, tested or validated, 0.01)
    return choice.best, choice.held, choice.sentence


@pytest.mark.parametrize(
    ("rows", "validated", "tested", "best", "held", "said"),
    [
        # The fastest within the budget.
        ([row("a", 5), row("b", 3)], drops_of(a=0, b=0.009), None, "b", True, "b is recommended"),
        # Exactly at the budget is within it.
        ([row("a", 5)], drops_of(a=0.01), None, "a", True, "not proven"),
        ([row("a", 5)], drops_of(a=0.004), None, "a", True, "the whole interval holds"),
        # Over the budget on validate, however fast.
        ([row("a", 5), row("b", 1)], drops_of(a=0, b=0.011), None, "a", True, "a is recommended"),
        ([row("a", 5)], drops_of(a=0.2), None, "baseline", False, "a drops 0.2000 on validate"),
        # Slower is never chosen.
        ([row("a", 20, "slower")], drops_of(a=0), None, "baseline", False, "a is slower (0.50x)"),
        # Something else qualifies, but nothing is faster: the budget holds all the same.
        (
            [row("a", 10.001, "same")],
            drops_of(a=0),
            None,
            "baseline",
            True,
            "a holds the budget on validate but",
        ),
        # Chosen on validate, failed on test: judged once, nothing else is tried.
        (
            [row("a", 3), row("b", 5)],
            drops_of(a=0, b=0),
            drops_of(a=0.02, b=0),
            "baseline",
            False,
            "b holds the budget on validate but was not chosen: a was faster",
        ),
        ([], drops_of(), None, "baseline", True, "no steps"),
    ],
)
def test_the_choice(
    rows: Any, validated: Any, tested: Any, best: str, held: bool, said: str
) -> None:
    found = chosen([BASELINE, *rows], validated, tested)
    assert found[:2] == (best, held)
    assert said in found[2]


@pytest.mark.parametrize(
    ("verdict", "narrowed", "best", "held", "said"),
    [
        # Fewer bits are a risk that only proven speed pays for.
        ("same", ("a",), "baseline", False, "a is not faster beyond noise (1.00x)"),
        ("inconclusive", ("a",), "baseline", False, "a is not faster beyond noise (1.00x)"),
        ("faster", ("a",), "a", True, "a is recommended: 1.00x"),
        ("slower", ("a",), "baseline", False, "a is slower (1.00x)"),
        # What has all of its bits may be as fast.
        ("same", (), "a", True, "the same speed as the baseline"),
        ("inconclusive", (), "a", True, "which is inconclusive"),
        ("same", ("b",), "a", True, "the same speed as the baseline"),
    ],
)
def test_fewer_bits_have_to_be_faster(
    verdict: str, narrowed: tuple[str, ...], best: str, held: bool, said: str
) -> None:
    rows = [BASELINE, row("a", 9.99, verdict)]
    choice = choose(task(), ["baseline", "a"], rows, drops_of(a=0), drops_of(a=0), 0.01, narrowed)
    assert (choice.best, choice.held) == (best, held)
    assert said in choice.sentence


def test_a_narrowed_one_that_is_not_faster_leaves_the_choice_to_the_others() -> None:
    rows = [BASELINE, row("a", 9, "inconclusive"), row("b", 9.5, "same")]
    none = drops_of(a=0, b=0)
    for narrowed, best in (((), "a"), (("a",), "b"), (("a", "b"), "baseline")):
        choice = choose(task(), ["baseline", "a", "b"], rows, none, none, 0.01, narrowed)
        assert choice.best == best


def test_what_was_not_measured_is_not_chosen() -> None:
    skipped = {"artifact": "a", **Target().to_json(), "skipped": "it crashed"}
    assert chosen([BASELINE, skipped], drops_of(a=0))[:2] == ("baseline", False)
    nothing = {**skipped, "artifact": "baseline"}
    assert chosen([nothing, row("a", 1)], drops_of(a=0))[:2] == ("baseline", False)


def test_without_data_nothing_is_recommended() -> None:
    choice = choose(task(None), ["baseline", "a"], [BASELINE, row("a", 1)], {}, {}, 0.01)
    assert (choice.best, choice.held) == ("baseline", False)
    assert "--data" in choice.sentence


def test_the_best_of_a_target() -> None:
    rows = [BASELINE, row("a", 5), row("b", 3, "slower"), row("c", 4)]
    assert best_on(rows, Target(), ["baseline", "a", "b"]) == "a"
    assert best_on(rows, Target(threads=8), ["a"]) is None
    assert within({"drop": {"value": 0.01}}, 0.01)
    assert not within({"drop": None}, 0.01)
    assert not within({"skipped": "no data"}, 0.01)


def test_what_was_not_judged_on_test_is_not_recommended() -> None:
    for accuracy in ({"drop": None}, {"skipped": "its outputs have another shape"}):
        tested = {**drops_of(a=0), "a": accuracy}
        best, held, said = chosen([BASELINE, row("a", 5)], drops_of(a=0), tested)
        assert (best, held) == ("baseline", False)
        assert "a held the budget on validate but was not judged on test" in said


# --- the accuracy field ---


def outputs(kind: Kind, seed: int = 0, count: int = 50) -> tuple[dict[str, Any], dict[str, Array]]:
    """Outputs of the baseline and of two others on both splits, and the targets."""
    rng = np.random.default_rng(seed)
    shape = (count, 1) if kind == "binary" else (count, 3)
    whole = {split: rng.standard_normal(shape) for split in ("validate", "test")}
    targets = {
        split: {
            "classification": values.argmax(axis=1),
            "binary": (values > 0).astype(np.int64),
            "multilabel": (values > 0).astype(np.int64),
            "regression": values,
        }[kind]
        for split, values in whole.items()
    }
    found = {
        name: {split: x + noise * rng.standard_normal(shape) for split, x in whole.items()}
        for name, noise in (("baseline", 0.5), ("a", 0.9), ("b", 1.5))
    }
    return found, targets


def of(kind: Kind, metric: str | None = None) -> Task:
    return replace(task(), kind=kind, metric=metric or next(iter(METRICS[kind])))


@pytest.mark.parametrize("kind", ["classification", "binary", "multilabel", "regression"])
def test_final_rows_have_every_metric_and_its_drop(kind: Kind) -> None:
    made, targets = outputs(kind)
    accuracy, _ = judged(of(kind), targets, made, "a", "test")
    given = made["baseline"]["test"], made["a"]["test"], targets["test"]
    assert accuracy["drops"] == drops(METRICS[kind], *given)
    assert list(accuracy["drops"]) == list(METRICS[kind])
    for name, how in METRICS[kind].items():
        assert accuracy[name] == value(how, *given[1:])
    assert accuracy["drop"] == accuracy["drops"][next(iter(METRICS[kind]))]
    assert accuracy["n"] == 50
    assert ("mcnemar" in accuracy) == (kind in ("classification", "binary"))
    if "mcnemar" in accuracy:
        right = [scores(METRICS[kind]["accuracy"], one, given[2]) for one in given[:2]]
        assert accuracy["mcnemar"] == mcnemar(*right)  # type: ignore[arg-type]
        lost = accuracy["mcnemar"]["worse"] - accuracy["mcnemar"]["better"]
        assert accuracy["drop"]["value"] == pytest.approx(lost / 50)
    json.dumps(accuracy, allow_nan=False)


def test_the_reference_has_lost_nothing_and_is_not_tested_against_itself() -> None:
    made, targets = outputs("classification")
    accuracy, _ = judged(of("classification"), targets, made, "baseline", "test")
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert accuracy["drops"] == dict.fromkeys(METRICS["classification"], nothing)
    assert accuracy["drop"] == nothing
    assert "mcnemar" not in accuracy


@pytest.mark.parametrize("metric", ["f1", "roc_auc", "cross_entropy", "top5"])
def test_the_budget_is_that_of_the_tasks_metric(metric: str) -> None:
    made, targets = outputs("classification")
    for split in ("validate", "test"):
        accuracy, _ = judged(of("classification", metric), targets, made, "b", split)
        given = made["baseline"][split], made["b"][split], targets[split]
        how = METRICS["classification"][metric]
        assert accuracy["drop"] == drops({metric: how}, *given)[metric]
        assert ("drops" in accuracy) == (split == "test")
    if how.score is not None:
        each = (how.score(one, given[2]) for one in given[:2])
        assert accuracy["drop"] == drop(*each, higher_is_better=how.higher_is_better)


def test_a_metric_that_is_not_defined_is_left_out() -> None:
    made, targets = outputs("classification")
    targets = {split: np.minimum(known, 1) for split, known in targets.items()}
    accuracy, _ = judged(of("classification", "roc_auc"), targets, made, "a", "test")
    assert "roc_auc" not in accuracy
    assert "roc_auc" not in accuracy["drops"]
    assert accuracy["drop"] is None
    assert not within(accuracy, 1.0)
    assert "f1" in accuracy
    assert "f1" in accuracy["drops"]


@pytest.mark.parametrize("kind", ["classification", "binary", "multilabel", "regression"])
def test_outputs_that_are_no_numbers_fit_into_json(kind: Kind) -> None:
    made, targets = outputs(kind)
    made["a"] = {split: np.full_like(x, np.nan) for split, x in made["a"].items()}
    for split in ("validate", "test"):
        accuracy, _ = judged(of(kind), targets, made, "a", split)
        json.dumps(accuracy, allow_nan=False)
        assert not within(accuracy, 0.01)


def test_a_metric_of_the_users_own_is_judged_like_the_others() -> None:
    def apart(outputs: Array, targets: Array) -> Any:
        return float(np.quantile(np.abs(outputs - targets), 0.9))

    apart.higher_is_better = False  # type: ignore[attr-defined]
    made, targets = outputs("regression")
    mine = {**METRICS["regression"], "apart": own("apart", apart)}
    judge = replace(of("regression"), metric="apart", metrics=mine)
    accuracy, _ = judged(judge, targets, made, "b", "test")
    was, now = (apart(made[name]["test"], targets["test"]) for name in ("baseline", "b"))
    assert accuracy["apart"] == now
    assert accuracy["drop"]["value"] == pytest.approx((now - was) / was)
    assert as_run(judge, targets, made, "b", "test")["accuracy"]["apart"] == now
