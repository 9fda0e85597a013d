"""The search: what goes back to float because 8 bits are slower there, or too far off."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest
from graphs import drawn, floats
from standing import task_of
from test_plan import CONSTANTS, IMAGE, SAME
from torch import nn

from compressor import Target
from compressor.stages.quantize import guard, search
from compressor.stages.quantize.kernels import Codes
from compressor.task import Task

TASK = task_of(nn.Identity(), (4, 8, 8))
DENSE, TURNED, LAST = floats(1, (256, 6), (6, 6), (6, 3))


def two() -> ir.Model:
    """Convolutions, float in the middle, and matrix products."""
    return drawn(
        f"{IMAGE} => (float[n, 3] y) {{ a = Conv {SAME} (x, w) r = Relu(a)"
        f" c = Conv {SAME} (r, v) s = Softmax <axis = 1> (c) f = Flatten(s) d = Gemm(f, dense)"
        " e = Relu(d) g = MatMul(e, turned) h = Tanh(g) y = MatMul(h, last) }",
        **CONSTANTS,
        dense=DENSE,
        turned=TURNED,
        last=LAST,
    )


NAMES = ("Conv_a", "Conv_c", "Gemm_d", "MatMul_g", "MatMul_y")

Profile = Mapping[str, float]


class Made:
    """Stands for a graph: which nodes it has in float."""

    def __init__(self, left: Collection[str]) -> None:
        self.left = frozenset(left)


def write(left: Collection[str]) -> Any:
    return Made(left)


# --- islands


def test_what_hangs_together_in_8_bits_is_an_island() -> None:
    assert search.islands(two(), NAMES) == [
        (["Conv_a", "Conv_c"], ["c", "r", "x"]),
        (["Gemm_d", "MatMul_g"], ["e", "s"]),
        (["MatMul_y"], ["h"]),
    ]


def test_branches_that_meet_are_one_island() -> None:
    model = drawn(
        f"{IMAGE} => (float[n, 4, 8, 8] y) {{ t = Tanh(x) a = Conv {SAME} (x, w)"
        f" c = Conv {SAME} (t, v) s = Add(a, c) y = Conv {SAME} (s, w) }}",
        **CONSTANTS,
    )
    names = ["Conv_a", "Conv_c", "Conv_y"]
    assert search.islands(model, names) == [(names, ["a", "c", "s", "t", "x", "y"])]


# --- what is slower in 8 bits


def timing(
    patch: pytest.MonkeyPatch, before: Profile, after: Profile, **ms: float
) -> list[dict[str, Any]]:
    """Profiles and races with these times; the races that were run."""
    races: list[dict[str, Any]] = []

    def profile(model: Any, task: Task) -> Profile:
        return after if isinstance(model, Made) else before

    def race(models: dict[str, Any], task: Task) -> dict[str, list[list[float]]]:
        races.append(models)
        return {name: [[ms[name]] * 5] * 8 for name in models}

    patch.setattr(guard, "profile", profile)
    patch.setattr(guard, "race", race)
    return races


def slow(source: Any = None) -> tuple[frozenset[str], str]:
    given = two()
    return search.slow(source or given, given, write, NAMES, TASK)


EVEN = dict.fromkeys(NAMES, 4.0)
GAIN = dict.fromkeys(NAMES, 1.0)


REASON = "8 bits are not faster than float here: "


@pytest.mark.parametrize(("whole", "why"), [(2.0, False), (4.0, True), (9.0, True)])
@pytest.mark.parametrize("profiles", [(EVEN, GAIN), ({}, {})], ids=["all gain", "no profiles"])
def test_without_suspects_8_bits_are_raced_against_float_all_the_same(
    monkeypatch: pytest.MonkeyPatch, profiles: tuple[Profile, Profile], whole: float, why: bool
) -> None:
    """Single nodes may gain, or say nothing, where the whole graph does not gain."""
    races = timing(monkeypatch, *profiles, float=4.0, whole=whole)
    exact = two()
    found, reason = slow(exact)
    assert found == frozenset()
    assert reason.startswith(REASON) if why else reason == ""
    (raced,) = races
    assert list(raced) == ["float", "whole"]
    assert raced["float"] is exact
    assert raced["whole"].left == frozenset()


def test_the_reason_follows_from_the_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "codes", lambda: Codes(signed=False, bits=8))
    timing(monkeypatch, EVEN, {**GAIN, "x_QuantizeLinear": 5.0}, float=4.0, whole=4.0)
    assert slow() == (frozenset(), f"{REASON}50% of the time goes into conversions")
    monkeypatch.setattr(guard, "codes", lambda: Codes(signed=False, bits=7))
    assert "8-bit dot products (VNNI)" in slow()[1]


@pytest.mark.parametrize(
    ("whole", "without", "left", "why"),
    [
        (3.0, 2.0, {"Conv_c"}, False),
        (2.0, 2.0, set(), False),  # it makes no difference
        (9.0, 5.0, set(), True),  # better than all in 8 bits, but not than float
        (5.0, 9.0, set(), True),
    ],
)
def test_suspects_go_where_the_race_proves_them_slower(
    monkeypatch: pytest.MonkeyPatch, whole: float, without: float, left: set[str], why: bool
) -> None:
    after = {**GAIN, "Conv_c": 5.0}
    races = timing(monkeypatch, EVEN, after, float=4.0, whole=whole, without=without)
    found, reason = slow()
    assert found == left
    assert bool(reason) is why
    (raced,) = races
    assert list(raced) == ["float", "whole", "without"]
    assert raced["whole"].left == frozenset()
    assert raced["without"].left == {"Conv_c"}


def test_an_island_that_costs_more_than_it_saves_goes_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Both products are quicker in 8 bits, but not by what it takes to get there.
    after = {**GAIN, "Gemm_d": 3.0, "MatMul_g": 3.5, "s_QuantizeLinear": 2.0}
    timing(monkeypatch, EVEN, after, float=4.0, whole=3.0, without=2.0)
    assert slow()[0] == {"Gemm_d", "MatMul_g"}


@pytest.mark.parametrize(("whole", "why"), [(9.0, True), (2.0, False)])
def test_where_all_are_suspects_none_is_named(
    monkeypatch: pytest.MonkeyPatch, whole: float, why: bool
) -> None:
    races = timing(monkeypatch, EVEN, dict.fromkeys(NAMES, 9.0), float=4.0, whole=whole)
    exact = two()
    found, reason = slow(exact)
    assert found == frozenset()
    assert bool(reason) is why
    assert list(races[0]) == ["float", "whole"]
    assert races[0]["float"] is exact


@pytest.mark.parametrize(
    ("target", "here"),
    [
        (Target(), True),
        (Target(threads=2), True),
        (Target(threads=3), False),
        (Target("openvino"), False),
        (Target(provider="cuda"), False),
    ],
)
def test_only_this_machine_and_this_runtime_are_timed(
    monkeypatch: pytest.MonkeyPatch, target: Target, here: bool
) -> None:
    monkeypatch.setattr(search, "cores", lambda: 2)
    assert search.timed(replace(TASK, target=target)) is here


# --- fusions that hurt


@pytest.mark.parametrize(("gain", "found"), [(1.2, guard.HURTING), (1.0, ())])
def test_a_fusion_is_switched_off_where_that_is_proven_to_help(
    monkeypatch: pytest.MonkeyPatch, gain: float, found: tuple[str, ...]
) -> None:
    asked: list[Any] = []

    def race(models: Any, task: Task, disabled: Any) -> dict[str, list[list[float]]]:
        asked.append(disabled)
        return {"with": [[gain] * 5] * 8, "without": [[1.0] * 5] * 8}

    monkeypatch.setattr(guard, "race", race)
    monkeypatch.setattr(guard, "fusions", lambda model: guard.HURTING)
    assert search.hurting(two(), TASK) == found
    assert asked == [{"with": [], "without": list(guard.HURTING)}]


# --- what the budget needs


class Fake:
    """A judge for whom each node in 8 bits costs accuracy and adds noise."""

    def __init__(self, lost: Mapping[str, float], base: float = 0.0) -> None:
        self.lost = lost
        self.base = base
        self.looks = 0

    def drop(self, model: Any) -> float | None:
        self.looks += 1
        if not isinstance(model, Made):  # the float graph
            return self.base
        return self.base + sum(self.lost[name] for name in self.lost if name not in model.left)

    def sqnr(self, model: Any) -> float:
        return 40.0 - 100 * sum(self.lost[name] for name in NAMES if name not in model.left)


def within(
    judge: Any, budget: float, **more: Any
) -> tuple[frozenset[str], dict[str, Any], list[Any]]:
    kept: list[Any] = []
    given: dict[str, Any] = {"left": frozenset(), "late": lambda: False, **more}
    task = replace(TASK, budget=budget, target=Target(threads=99))  # no profiles
    left, facts = search.within(
        two(), write, NAMES, given["left"], task, judge, given["late"], kept.append
    )
    return left, facts, kept


LOST = {"Conv_a": 0.0, "Conv_c": 0.05, "Gemm_d": 0.2, "MatMul_g": 0.01, "MatMul_y": 0.0}


def test_a_budget_that_holds_costs_one_look() -> None:
    judge = Fake(LOST)
    assert within(judge, 0.5) == (frozenset(), {"drop": pytest.approx(0.26)}, [])
    assert judge.looks == 1


@pytest.mark.parametrize(
    ("budget", "left"),
    [(0.1, {"Gemm_d"}), (0.02, {"Gemm_d", "Conv_c"}), (0.0, {"Gemm_d", "Conv_c", "MatMul_g"})],
)
def test_the_noisiest_go_back_until_it_holds(budget: float, left: set[str]) -> None:
    found, facts, kept = within(Fake(LOST), budget)
    assert found == left
    assert facts["drop"] <= budget
    assert facts["returned"] == len(left)
    assert "note" not in facts
    assert kept[-1].left == left  # it is on disk


def test_what_is_left_already_stays_left() -> None:
    found, facts, kept = within(Fake(LOST), 0.02, left=frozenset({"MatMul_y"}))
    assert found == {"MatMul_y", "Gemm_d", "Conv_c"}
    assert facts["returned"] == 2
    assert all("MatMul_y" in one.left for one in kept)


def test_without_data_nothing_is_judged() -> None:
    judge = Fake(LOST)
    judge.drop = lambda model: None  # type: ignore[method-assign]
    assert within(judge, 0.0) == (frozenset(), {}, [])


def test_a_float_model_over_the_budget_is_no_reason_to_leave_8_bits() -> None:
    left, facts, kept = within(Fake(LOST, base=0.3), 0.1)
    assert left == frozenset()
    assert "the float model it was made from drops 0.3000" in facts["note"]
    assert not kept


def test_what_cannot_be_held_says_so() -> None:
    class Uneven(Fake):
        def drop(self, model: Any) -> float | None:
            whole = super().drop(model)
            assert whole is not None
            return max(whole, 0.04) if isinstance(model, Made) else whole

    left, facts, kept = within(Uneven(LOST), 0.02)
    assert facts["drop"] == 0.04
    assert "drops less than 0.0400" in facts["note"]
    assert kept[-1].left == left


def test_a_late_search_keeps_what_it_has() -> None:
    judge = Fake(LOST)
    left, facts, kept = within(judge, 0.02, late=lambda: True)
    assert left == frozenset()
    assert facts["drop"] == pytest.approx(0.26)
    assert [one.left for one in kept] == [frozenset()]
