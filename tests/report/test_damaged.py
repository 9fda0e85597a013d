"""Where it hurts, as it is told: the classes, the sentence, the examples."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import document

from compressor.report import damage
from compressor.report.markdown import markdown


def classed(lows: list[float], rest: int = 0) -> dict[str, Any]:
    """The document whose recommended artifact lost at least so much in its classes."""
    changed = document()
    rows = [
        {"class": str(at), "n": 9, "baseline": 1.0, "value": 0.9,
         "drop": {"value": low + 0.1, "low": low, "high": low + 0.2}}
        for at, low in enumerate(sorted(lows, reverse=True))
    ]  # fmt: skip
    if rest:
        rows.append({**rows[-1], "class": "others", "classes": rest})
    changed["artifacts"][4]["classes"] = rows
    return changed


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.integers(0, 5))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_sentence_counts(lows: list[float], rest: int) -> None:
    said = damage.lost(classed(lows, rest))
    beyond, every = sum(low > 0 for low in lows), len(lows) + rest
    if not beyond:
        assert said.startswith(f"None of {every} classes")
    else:
        least = "At least " if rest and beyond == len(lows) else ""
        assert said.startswith(f"{least}{beyond} of {every} classes lost beyond noise")


def test_the_table() -> None:
    changed = document()
    *_, first, _, last = damage.by_class(changed).splitlines()
    assert [cell.strip() for cell in first.strip("|").split("|")] == [
        "7", "40", "0.9500", "0.8466", "+0.1034 [0.0734, 0.1334]",
    ]  # fmt: skip
    assert last.startswith("| 8 others")


def test_examples_with_and_without_pictures() -> None:
    changed = document()
    assert "![The worst examples](worst.png)" in markdown(changed)
    assert "| example" not in markdown(changed)
    changed["artifacts"][4]["worst"][0]["picture"] = None
    page = markdown(changed)
    assert "worst.png" not in page
    assert "| 17 " in page
    assert damage.pictured(changed) == []


@pytest.mark.parametrize("nothing", [None, []])
def test_nothing_lost_is_no_section(nothing: Any) -> None:
    changed = document()
    changed["artifacts"][4] |= {"classes": nothing, "worst": nothing}
    assert "Where it hurts" not in markdown(changed)
    assert (damage.lost(changed), damage.by_class(changed), damage.examples(changed)) == ("",) * 3


def test_whose_damage_it_is_where_the_baseline_is_recommended() -> None:
    changed = document()
    for artifact in changed["artifacts"]:
        artifact["best"] = artifact["name"] == "baseline"
    assert markdown(changed).count("baseline is recommended; this is int8-static.") == 2
    assert "baseline is recommended; this" not in markdown(document())


def test_the_picture_grows_with_its_examples() -> None:
    changed = document()
    one = damage.picture(changed)
    changed["artifacts"][4]["worst"] *= 7  # a second row
    many = damage.picture(changed)
    assert [int.from_bytes(png[20:24], "big") for png in (one, many)] == [337, 637]
    assert many == damage.picture(changed)
