"""The waterfall: whose chain it is, and that its changes add up."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import document

from compressor.report.table import subject
from compressor.report.waterfall import FIRST, difference, picture, signed, stages, waterfall


def recommend(name: str) -> dict[str, Any]:
    """The document with another artifact recommended."""
    changed = document()
    for artifact in changed["artifacts"]:
        artifact["best"] = artifact["name"] == name
    return changed


def test_the_chain() -> None:
    found = waterfall(document())
    assert [tuple(one.values()) for one in found] == [
        ("baseline", FIRST, 0.9778, 0.261, 88_312),
        ("pruned", "prune", 0.8139, 0.108, 27_004),
        ("recovered", "distill", 0.9756, 0.1082, 27_004),
        ("int8-static", "quantize", 0.9744, 0.0731, 14_233),
    ]
    assert list(found[0]) == ["artifact", "stage", "accuracy", "ms", "bytes"]


def test_the_chain_of_another() -> None:
    assert [one["artifact"] for one in waterfall(recommend("pruned"))] == ["baseline", "pruned"]
    changed = recommend("int8-static")
    del changed["artifacts"][2]
    assert [one["stage"] for one in waterfall(changed)] == [FIRST, "prune", "distill + quantize"]


def test_where_the_baseline_is_recommended() -> None:
    """The fastest other within the budget, or the one that lost least."""
    changed = recommend("baseline")
    assert subject(changed)["name"] == "int8-static"  # type: ignore[index]
    for artifact in changed["artifacts"]:
        artifact["within_budget"] = artifact["name"] in ("baseline", "int8-dynamic")
    assert subject(changed)["name"] == "int8-dynamic"  # type: ignore[index]
    for artifact in changed["artifacts"][1:]:
        artifact["within_budget"] = False
    assert subject(changed)["name"] == "recovered"  # type: ignore[index]
    assert subject(document(artifacts=changed["artifacts"][:1])) is None
    assert waterfall(document(artifacts=changed["artifacts"][:1])) == []


def test_files_side_by_side_have_no_chain() -> None:
    changed = document()
    for artifact in changed["artifacts"]:
        artifact["steps"] = []
    assert waterfall(changed) == []
    assert stages(changed) == ""


steps = st.lists(st.sampled_from(["prune", "distill", "qat", "quantize"]), min_size=1, max_size=4)


@given(st.lists(steps, min_size=1, max_size=6), st.integers(0, 5), st.randoms())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_chains_of_any_tree(made: list[list[str]], best: int, order: random.Random) -> None:
    changed, first = document(), document()["artifacts"][0]
    # A stage at another place in the recipe is another step.
    others = [
        {
            **first,
            "name": f"{at}",
            "best": at == best % len(made),
            "steps": [{"stage": stage, "settings": {}} for stage in stages]
            + ([{"stage": "export", "settings": {}}] if at % 2 else []),
            "size_bytes": 10 * at,
        }
        for at, stages in enumerate(made)
    ]
    changed["artifacts"] = [first, *others]
    chain = waterfall(changed)
    assert chain[0]["artifact"] == "baseline"
    assert chain[-1]["artifact"] == str(best % len(made))
    whole = made[best % len(made)]
    on_the_way = [made[int(one["artifact"])] for one in chain[1:]]
    assert all(len(a) < len(b) and b[: len(a)] == a for a, b in pairwise(on_the_way))
    assert [stage for one in chain[1:] for stage in one["stage"].split(" + ")] == whole
    # None that the recommended one was made from is left out.
    lengths = {len(one) for one in made if one == whole[: len(one)]}
    assert lengths == {len(one) for one in on_the_way}
    order.shuffle(others)
    changed["artifacts"] = [first, *others]
    assert [one["stage"] for one in waterfall(changed)] == [one["stage"] for one in chain]


def test_the_table_adds_up() -> None:
    _, _, *rows = stages(document()).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0] == ["baseline", FIRST, "0.9778", "0.261", "88.3 KB", "1.00x"]
    assert cells[1] == ["pruned", "prune", "-0.1639", "-0.153", "-61.3 KB", "2.42x"]
    assert cells[2] == ["recovered", "distill", "+0.1617", "+0.000200", "+0 B", "2.41x"]
    assert cells[4] == ["in all", "", "-0.0034", "-0.188", "-74.1 KB", "3.57x"]
    for column in (2, 3):
        total = sum(float(row[column]) for row in cells[1:4])
        assert total == pytest.approx(float(cells[4][column]), abs=1e-3)


def test_what_was_not_measured_is_said() -> None:
    changed = document(measurements=[])
    for artifact in changed["artifacts"]:
        artifact["accuracy"] = {"skipped": "no data"}
    assert [one["ms"] for one in waterfall(changed)] == [None] * 4
    assert stages(changed).count("n/a") == 3 * 5
    assert len(picture(changed)) < len(picture(document()))  # one panel of three


@given(st.floats(-1e6, 1e6), st.none() | st.floats(-1e6, 1e6))
def test_signs(before: float, after: float | None) -> None:
    apart = difference(before, after)
    assert (apart is None) == (after is None)
    if apart is not None:
        assert signed(apart)[0] == ("+" if apart >= 0 else "-")
        assert float(signed(apart)) == pytest.approx(apart, rel=0.01)


def test_a_gap_in_the_middle_is_bridged() -> None:
    changed = document()
    changed["artifacts"][1]["accuracy"] = {"skipped": "its outputs could not be taken"}
    found = waterfall(changed)
    assert found[1]["accuracy"] is None
    assert picture(changed) == picture(changed)
    assert picture(changed) != picture(document())
