"""What makes times doubtful, and that each doubt comes with its remedy."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.measure.noise import SIGNS, SLOW_GOVERNORS, conditions, flags

STEADY = [[1.0] * 10] * 8
QUIET = {
    "iqr": 0.01,
    "drift": 0.0,
    "cpu_share": 0.99,
    "switches_per_s": 3.0,
    "steal": 0.0,
    "load": 0.4,
    "governor": "performance",
}


def said(blocks: Any, **others: Any) -> list[str]:
    found = {**conditions(blocks), **others}
    return [flag.split(":")[0] for flag in flags(found, sum(map(len, blocks)))]


def test_spread_and_drift_come_from_the_times() -> None:
    assert said(STEADY) == []
    assert said([[1.0, 2.0] * 5] * 8) == ["spread"]
    assert said([[1.0] * 10] * 4 + [[1.2] * 10] * 4) == ["drift"]
    assert flags(conditions([[1.0]] * 8), 8) == [
        "few samples; give it longer with --bench-time normal or full"
    ]


def test_another_start_at_another_speed_is_no_drift() -> None:
    blocks = [[1.0] * 10] * 4 + [[1.2] * 10] * 4
    assert conditions(blocks, (4, 4))["drift"] == 0
    assert conditions(blocks, (8,))["drift"] == pytest.approx(0.2)
    assert conditions(blocks + blocks, (8, 8))["drift"] == pytest.approx(0.2)


@given(st.lists(st.lists(st.floats(1e-3, 1e3), min_size=1), min_size=1), st.floats(1e-2, 1e2))
def test_conditions_do_not_depend_on_the_unit(blocks: list[list[float]], unit: float) -> None:
    scaled = [[value * unit for value in block] for block in blocks]
    assert conditions(scaled)["iqr"] == pytest.approx(conditions(blocks)["iqr"], abs=1e-9)
    assert conditions(scaled)["drift"] == pytest.approx(conditions(blocks)["drift"], abs=1e-9)


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("iqr", 0.3, "spread"),
        ("drift", -0.2, "drift"),
        ("cpu_share", 0.5, "waiting"),
        ("switches_per_s", 1000.0, "interrupted"),
        ("steal", 0.1, "steal"),
        ("governor", "powersave", "governor"),
    ],
)
def test_each_condition_has_a_flag_with_a_remedy(name: str, value: Any, word: str) -> None:
    assert flags(QUIET, 1000) == []
    (flag,) = flags({**QUIET, name: value}, 1000)
    assert flag.startswith(f"{word}: ")
    assert "; " in flag, "what to do about it"
    assert flags({**QUIET, name: None}, 1000) == [], "what a machine does not say is no fault"


def test_every_sign_is_a_condition() -> None:
    assert set(SIGNS) < set(QUIET)
    assert QUIET["governor"] not in SLOW_GOVERNORS
