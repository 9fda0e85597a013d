"""The choice, case by case: validate chooses, test judges, slower is never chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compressor.measurement import Target
from compressor.pipeline.verdict import best_on, choose, within
from compressor.task import Input, Split, Splits, Task

SPLIT = Split.arrays(np.zeros((2, 1)), np.zeros(2, dtype=np.int64))
DATA = Splits(SPLIT, SPLIT, SPLIT, SPLIT)


def task(splits: Splits | None = DATA) -> Task:
    return Task("net", "classification", lambda: None, {}, (Input("x", (1,)),), "accuracy", splits)  # type: ignore[arg-type, return-value]


def row(name: str, p50: float, verdict: str = "faster") -> dict[str, Any]:
    """A measured row: ``verdict`` against a baseline of 10 ms."""
    speedup = {"value": 10 / p50, "low": 10 / p50, "high": 10 / p50, "verdict": verdict}
    return {"artifact": name, **Target().to_json(), "latency_ms": {"p50": p50}, "speedup": speedup}


def drops(**values: float) -> dict[str, Any]:
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
        ([row("a", 5), row("b", 3)], drops(a=0, b=0.009), None, "b", True, "b is recommended"),
        # Exactly at the budget is within it.
        ([row("a", 5)], drops(a=0.01), None, "a", True, "not proven"),
        ([row("a", 5)], drops(a=0.004), None, "a", True, "the whole interval holds"),
        # Over the budget on validate, however fast.
        ([row("a", 5), row("b", 1)], drops(a=0, b=0.011), None, "a", True, "a is recommended"),
        ([row("a", 5)], drops(a=0.2), None, "baseline", False, "a drops 0.2000 on validate"),
        # Slower is never chosen.
        ([row("a", 20, "slower")], drops(a=0), None, "baseline", False, "a is slower (0.50x)"),
        # Something else qualifies, but nothing is faster: the budget holds all the same.
        (
            [row("a", 10.001, "same")],
            drops(a=0),
            None,
            "baseline",
            True,
            "a holds the budget on validate but",
        ),
        # Chosen on validate, failed on test: judged once, nothing else is tried.
        (
            [row("a", 3), row("b", 5)],
            drops(a=0, b=0),
            drops(a=0.02, b=0),
            "baseline",
            False,
            "b holds the budget on validate but was not chosen: a was faster",
        ),
        ([], drops(), None, "baseline", True, "no steps"),
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
    choice = choose(task(), ["baseline", "a"], rows, drops(a=0), drops(a=0), 0.01, narrowed)
    assert (choice.best, choice.held) == (best, held)
    assert said in choice.sentence


def test_a_narrowed_one_that_is_not_faster_leaves_the_choice_to_the_others() -> None:
    rows = [BASELINE, row("a", 9, "inconclusive"), row("b", 9.5, "same")]
    none = drops(a=0, b=0)
    for narrowed, best in (((), "a"), (("a",), "b"), (("a", "b"), "baseline")):
        choice = choose(task(), ["baseline", "a", "b"], rows, none, none, 0.01, narrowed)
        assert choice.best == best


def test_what_was_not_measured_is_not_chosen() -> None:
    skipped = {"artifact": "a", **Target().to_json(), "skipped": "it crashed"}
    assert chosen([BASELINE, skipped], drops(a=0))[:2] == ("baseline", False)
    nothing = {**skipped, "artifact": "baseline"}
    assert chosen([nothing, row("a", 1)], drops(a=0))[:2] == ("baseline", False)


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
