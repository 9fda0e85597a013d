"""How it was judged, as it is told: every metric, the gap, the confusion matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import document

from compressor.report import Report, damage, judged, problem
from compressor.report.markdown import markdown

REPORTS = sorted((Path(__file__).parents[2] / "reports").glob("*/report.json"))


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def told(classes: int = 3) -> dict[str, Any]:
    """A document with two more metrics, one of them an error, gaps and confusion matrices."""
    changed = document()
    changed["task"]["metrics"] = {"accuracy": True, "f1_weighted": True, "cross_entropy": False}
    for at, artifact in enumerate(changed["artifacts"]):
        lost = {"f1_weighted": interval(0.02 * at), "cross_entropy": interval(0.5 * at)}
        if not at:
            lost = {name: dict.fromkeys(("value", "low", "high"), 0.0) for name in lost}
        artifact["accuracy"] |= {
            "f1_weighted": 0.97 - 0.02 * at,
            "cross_entropy": 0.08 * (1 + 0.5 * at),
            "drops": {"accuracy": artifact["accuracy"]["drop"], **lost},
        }
        if at:
            artifact["accuracy"]["mcnemar"] = {"better": 2, "worse": 2 + at, "p": 0.5 / 10**at}
        artifact["gap"] = (
            {"train": 0.99, "test": 0.97, "value": 0.02, "n": 1077} if at < 3 else None
        )
        artifact["confusion"] = [[at] * classes for _ in range(classes)]
    return changed


def cells(table: str) -> dict[str, list[str]]:
    """The first cell of each row to the others."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    return {row[0]: row[1:] for row in rows if not row[0].startswith(":-")}


def test_the_document_holds_the_schema_and_so_does_one_without() -> None:
    assert problem(told()) is None
    assert problem(document()) is None


@pytest.mark.parametrize(
    "broken",
    [
        lambda one: one["accuracy"].update(drops={"f1_weighted": {"value": 1.0}}),
        lambda one: one["accuracy"].update(drops=0.5),
        lambda one: one["accuracy"].update(mcnemar={"better": 1, "worse": 1, "p": 1.5}),
        lambda one: one.update(gap={"train": 1.0, "test": 0.9, "value": 0.1}),
        lambda one: one.update(confusion=[[1, -1], [0, 1]]),
        lambda one: one.update(confusion=[[0]] * 51),
    ],
)
def test_the_schema_refuses(broken: Any) -> None:
    changed = told()
    broken(changed["artifacts"][1])
    assert "artifacts[1]" in str(problem(changed))


def test_every_metric_of_every_artifact() -> None:
    changed = told()
    found = cells(judged.metrics(changed))
    assert list(found) == [
        "test", "accuracy", "f1\\_weighted", "cross\\_entropy (lower is better)",
        "McNemar's p of accuracy", "gap from train to test, accuracy",
    ]  # fmt: skip
    assert {len(row) for row in found.values()} == {len(changed["artifacts"])}
    assert found["f1\\_weighted"][:2] == ["0.9700", "0.9500 (+0.0200 [0.0100, 0.0300])"]
    assert found["cross\\_entropy (lower is better)"][2].endswith("(+1.0000 [0.9900, 1.0100])")
    assert found["accuracy"][4] == "0.9744 (+0.0034 [-0.0036, 0.0103])"
    assert found["McNemar's p of accuracy"] == [
        "n/a",
        "0.0500 (better on 2, worse on 3)",
        "0.00500 (better on 2, worse on 4)",
        "0.000500 (better on 2, worse on 5)",
        "< 0.0001 (better on 2, worse on 6)",
    ]
    gaps = found["gap from train to test, accuracy"]
    assert gaps == ["+0.0200 (train 0.9900)"] * 3 + ["n/a"] * 2


def test_the_page_tells_what_the_figures_are() -> None:
    page = markdown(told())
    section = page.split("## Metrics\n")[1].split("\n## ")[0]
    assert "relative for errors (cross\\_entropy)" in section
    assert "1077 training examples" in section
    assert "Test examples of int8-static by true class (rows) and predicted:" in section
    assert page.index("## Metrics") > page.index("| variant")
    # The first table is as it was.
    assert page.split("## Metrics")[0] == markdown(document()).split("\n## ")[0] + "\n"


def test_what_is_absent_is_not_told() -> None:
    changed = told()
    for artifact in changed["artifacts"]:
        artifact["gap"] = artifact["confusion"] = None
        artifact["accuracy"].pop("mcnemar", None)
    changed["task"]["metrics"] = {"accuracy": True}
    page = markdown(changed)
    section = page.split("## Metrics\n")[1].split("\n## ")[0]
    for word in ("McNemar", "gap", "relative", "Test examples"):
        assert word not in section
    assert "## Metrics" not in markdown(document())


def test_a_metric_that_one_artifact_does_not_define() -> None:
    changed = told()
    accuracy = changed["artifacts"][3]["accuracy"]
    del accuracy["f1_weighted"], accuracy["drops"]["f1_weighted"]
    assert problem(changed) is None
    assert cells(judged.metrics(changed))["f1\\_weighted"][3] == "n/a"
    changed["artifacts"][2]["accuracy"] = {"skipped": "its outputs have another shape"}
    found = cells(judged.metrics(changed))
    assert {row[2] for name, row in found.items() if not name.startswith(("test", "gap"))} == {
        "n/a"
    }


@given(st.integers(2, 25))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_confusion_matrix_that_fits(classes: int) -> None:
    changed = told(classes)
    found = judged.confusion(changed)
    assert bool(found) == (classes <= judged.SHOWN)
    if found:
        rows = cells(found)
        assert rows.pop("true, predicted") == [str(at) for at in range(classes)]
        assert rows == {str(at): ["4"] * classes for at in range(classes)}


def test_it_is_the_recommended_artifacts() -> None:
    changed = told()
    for at, artifact in enumerate(changed["artifacts"]):
        artifact["best"] = at == 0
    assert cells(judged.confusion(changed))["0"] == ["0"] * 3
    assert "Test examples of baseline by" in markdown(changed)
    for artifact in changed["artifacts"]:
        artifact["best"] = False
    assert judged.confusion(changed) == ""


def test_classes_judged_by_another_metric_say_so() -> None:
    changed = document()
    assert "lost beyond noise" in damage.lost(changed)
    for row in changed["artifacts"][4]["classes"]:
        row["metric"] = "accuracy"
    assert "lost beyond noise" in damage.lost(changed)
    changed["task"]["metric"] = "roc_auc"
    assert "classes lost accuracy beyond noise" in damage.lost(changed)


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.parent.name)
def test_reports_of_before_still_hold(path: Path) -> None:
    assert problem(json.loads(path.read_text())) is None
    assert markdown(Report.read(path).document)


def test_there_are_reports_of_before() -> None:
    assert REPORTS
