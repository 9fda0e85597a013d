"""The accuracy budget: that it holds, with how many layers in float, and after how many looks."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.stages.quantize.budget import ranked, returned

Left = frozenset[str]


@dataclass
class Net:
    """Layers that each cost accuracy in 8 bits; what they cost adds up."""

    costs: dict[str, float]
    asked: list[Left] = field(default_factory=list)
    kept: list[tuple[Left, float]] = field(default_factory=list)

    def drop(self, left: Left) -> float:
        self.asked.append(left)
        return self.of(left)

    def of(self, left: Left) -> float:
        return sum(cost for name, cost in self.costs.items() if name not in left)

    def keep(self, left: Left, lost: float) -> None:
        self.kept.append((left, lost))


@st.composite
def nets(draw: st.DrawFn) -> tuple[Net, list[str], float]:
    """A net, a ranking that may be wrong, and a budget. Drops are whole numbers: sums are exact."""
    costs = draw(st.lists(st.integers(0, 100), min_size=0, max_size=40))
    named = {f"layer{at}": float(cost) for at, cost in enumerate(costs)}
    order = sorted(named, key=lambda name: -named[name])
    if draw(st.booleans()):
        order = draw(st.permutations(order))
    return Net(named), list(order), float(draw(st.integers(0, max(1, sum(costs)))))


def prefix(net: Net, order: list[str], budget: float) -> int:
    """The fewest layers, in this order, that have to go."""
    return next(size for size in range(len(order) + 1) if net.of(frozenset(order[:size])) <= budget)


@given(nets())
def test_the_budget_holds_with_no_more_than_the_shortest_prefix(
    given: tuple[Net, list[str], float],
) -> None:
    net, order, budget = given
    left, lost = returned(order, net.drop, budget, net.keep)
    assert lost == net.of(left) <= budget
    assert len(left) <= prefix(net, order, budget)


@given(nets())
def test_what_is_kept_gets_better_and_ends_with_the_answer(
    given: tuple[Net, list[str], float],
) -> None:
    net, order, budget = given
    answer = returned(order, net.drop, budget, net.keep)
    assert net.kept[0][0] == frozenset()
    assert net.kept[-1] == answer
    for (before, lost), (after, now) in zip(net.kept, net.kept[1:], strict=False):
        if lost > budget:
            assert now < lost
        else:
            assert now <= budget
            assert len(after) < len(before)


@given(nets())
def test_drops_are_few_where_few_layers_have_to_go(
    given: tuple[Net, list[str], float],
) -> None:
    net, order, budget = given
    returned(order, net.drop, budget, net.keep)
    needed = prefix(net, order, budget)
    assert len(net.asked) <= 1 + 2 * log2(max(len(order), 2)) + 3 * needed


@given(nets(), st.integers(0, 8))
def test_it_stops_when_it_is_late(given: tuple[Net, list[str], float], looks: int) -> None:
    net, order, budget = given
    left, lost = returned(order, net.drop, budget, net.keep, late=lambda: len(net.asked) >= looks)
    assert len(net.asked) <= max(1, looks)
    assert (left, lost) == net.kept[-1]
    assert lost == net.of(left)


@given(nets())
def test_a_budget_that_cannot_be_held_gets_the_best_there_is(
    given: tuple[Net, list[str], float],
) -> None:
    net, order, _ = given
    left, lost = returned(order, lambda left: net.drop(left) + 1.0, 0.5, net.keep)
    assert lost == 1.0  # whatever is lost in float as well
    assert (left, lost) == net.kept[-1]
    assert net.of(left) == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=64), st.integers(1, 6))
def test_drops_that_jump_about_give_the_best_that_was_seen(drops: list[float], size: int) -> None:
    """No law says that more layers in float lose less."""
    order = [f"layer{at}" for at in range(size)]
    seen: dict[Left, float] = {}

    def drop(left: Left) -> float:
        at = sum(1 << order.index(name) for name in left)
        seen[left] = drops[at % len(drops)]
        return seen[left]

    left, lost = returned(order, drop, 0.25, lambda left, lost: None)
    assert seen[left] == lost
    if min(seen.values()) <= 0.25:
        assert lost <= 0.25
        assert len(left) == min(len(one) for one, value in seen.items() if value <= 0.25)
    else:
        assert lost == min(seen.values())


def test_an_answer_beyond_all_measure_is_bettered() -> None:
    net = Net({"a": inf, "b": 0.0})
    assert returned(["b", "a"], net.drop, 0.1, net.keep) == (frozenset({"a"}), 0.0)


# --- the ranking


def test_noise_for_each_millisecond_decides() -> None:
    noise = {"a": 1.0, "b": 4.0, "c": 4.0, "d": 0.0}
    assert ranked(noise, {"a": 1.0, "b": 8.0, "c": 2.0, "d": 1.0}) == ["c", "a", "b", "d"]
    assert ranked(noise, {}) == ["b", "c", "a", "d"]  # nothing is known of costs: noise alone


@pytest.mark.parametrize("free", [0.0, -3.0])
def test_what_float_makes_no_slower_comes_first(free: float) -> None:
    noise = {"a": 100.0, "b": 1.0, "c": 2.0}
    assert ranked(noise, {"a": 1.0, "b": free, "c": free}) == ["c", "b", "a"]


@given(
    st.dictionaries(st.text(max_size=3), st.floats(0, 1e6), max_size=8),
    st.floats(1e-3, 1e3),
)
def test_units_of_time_do_not_matter(noise: dict[str, float], unit: float) -> None:
    cost = {name: 1.0 + at for at, name in enumerate(noise)}
    order = ranked(noise, cost)
    assert sorted(order) == sorted(noise)
    worth = [noise[name] / cost[name] for name in order]
    assert worth == sorted(worth, reverse=True)
    scaled = ranked(noise, {name: ms * unit for name, ms in cost.items()})
    again = [noise[name] / cost[name] for name in scaled]
    assert again == pytest.approx(worth)
