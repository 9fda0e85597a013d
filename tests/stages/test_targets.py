"""Targets: predicted costs are those of the really cut model; the search lands where it says."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from standing import at_rest, settled, small_cnn, splits_of, task_of
from torch import Tensor, nn

from compressor import Artifact, Splits, Task, zoo
from compressor.errors import InputError
from compressor.loading import torchfile
from compressor.loading.edits import apply
from compressor.measure import counting
from compressor.measure.costs import Dtype
from compressor.measure.shapes import Layer
from compressor.measurement import Target
from compressor.recipe import Step
from compressor.stages import bound
from compressor.stages.export import export
from compressor.stages.prune import Sound, prune, search, targets
from compressor.stages.prune.group import Group
from compressor.stages.prune.ranking import chosen, least
from compressor.stages.prune.rounding import RUNGS, kept, ladder
from compressor.stages.prune.sensitivity import Damage
from compressor.stages.prune.targets import (
    QUANTITIES,
    Call,
    Costs,
    Counts,
    Price,
    Quantity,
    price_of,
    real_of,
)
from compressor.stages.prune.way import NEAR, RATIOS, TRIES, Walk, closer, land, walk
from compressor.task import Array

SHAPE = (1, 8, 8)

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")


# --- ladders ---


@given(st.integers(1, 600), st.data(), st.integers(1, 64))
def test_a_ladder_goes_down_in_steps_that_kernels_like(
    width: int, data: st.DataObject, each: int
) -> None:
    lowest = data.draw(st.integers(0, width))
    steps = ladder(width, lowest, each)
    assert steps[0] == width
    assert all(here > there for here, there in pairwise(steps))
    assert all(count >= max(1, lowest) for count in steps)
    multiple = max((m for m in (16, 8, 4, 1) if 8 * m <= width * each), default=1)
    assert all(count * each % multiple == 0 for count in steps[1:])
    # All steps are equal but the first, which is no longer, and the next would be too low.
    gaps = [here - there for here, there in pairwise(steps)]
    if len(gaps) > 1:
        assert set(gaps[1:]) == {gaps[-1]}
        assert gaps[0] <= gaps[-1]
        assert steps[-1] - gaps[-1] < max(1, lowest)
    if each == 1:
        assert all(gap <= max(width / 8, 1) for gap in gaps)


@given(st.integers(1, 5000), st.integers(1, 64))
def test_a_ladder_has_few_rungs(width: int, each: int) -> None:
    """Steps are rounded to whole ones, so that it may be half as many again."""
    assert len(ladder(width, 1, each)) <= 1.5 * RUNGS


# --- what is predicted is what is cut ---


class Judged:
    """A family, the groups that hold, and its costs."""

    def __init__(self, name: str) -> None:
        family = FAMILIES[name]
        self.dense = family.build()
        self.task = task_of(self.dense, kind=family.kind, inputs=family.inputs)
        self.sound = Sound(self.dense, self.task, "heads")
        groups = self.sound.groups
        lowest = [ladder(group.width, least(group, 0.1), group.each)[-1] for group in groups]
        held = self.sound.most(self.cuts(groups, lowest), {}).cuts
        self.groups = [cut.group for cut in held]
        self.ladders = [ladder(group.width, 1, group.each) for group in self.groups]

    def cuts(self, groups: Sequence[Group], counts: Sequence[int]) -> list[Any]:
        return [
            chosen(group, [torch.arange(group.width) for _ in group.strands], count)
            for group, count in zip(groups, counts, strict=True)
            if count < group.width
        ]

    def costs(self, quantity: Quantity) -> Costs:
        with price_of(quantity, self.task, "fp32") as price:
            return Costs(self.sound.model, self.groups, self.task, price)

    def counted(self, quantity: Quantity, counts: Counts) -> int:
        edits = self.sound.edits(self.cuts(self.groups, counts))
        model = apply(copy.deepcopy(self.dense), edits)
        if quantity == "params":
            return counting.params(model)
        return counting.macs(model, self.task.examples(1))


judged = cache(Judged)


CONVOLUTIONAL = [
    "constant view",
    "residual",
    "inverted residual",
    "depthwise, two each",
    "grouped",
    "dense",
    "unet",
    "conv1d",
    "squeeze-excite, chunks",
    "split",
    "shared",
    "transposed, depthwise",
    "transposed, grouped",
    "group norm",
]
SEQUENCES = [
    "lstm",
    "lstm, two layers",
    "lstm, both ways",
    "lstm, projected",
    "gru",
    "gru, two layers, both ways",
    "rnn, both ways",
    "cnn, lstm",
]
OTHERS = [
    "multihead attention",
    "vit, fused",
    "bert",
    "text",
    "convnext",
    "layer scale",
    "csp",
    "tied",
    "tied head",
]


@pytest.mark.parametrize("name", [*CONVOLUTIONAL, *SEQUENCES, *OTHERS])
@settings(max_examples=6, phases=[Phase.generate])
@given(st.data())
def test_predicted_parameters_are_those_of_the_cut_model(name: str, data: st.DataObject) -> None:
    model = judged(name)
    counts = tuple(data.draw(st.sampled_from(steps)) for steps in model.ladders)
    assert model.costs("params").whole(counts) == model.counted("params", counts)


# A projection as wide as its cells is no LSTM of PyTorch, so counts cannot be drawn freely there.
RUNNING = [name for name in SEQUENCES if name != "lstm, projected"]


@pytest.mark.parametrize("name", [*CONVOLUTIONAL, *RUNNING, "mlp, layer norm", "subclass"])
@settings(max_examples=6, phases=[Phase.generate])
@given(st.data())
def test_predicted_products_are_those_of_the_cut_model(name: str, data: st.DataObject) -> None:
    model = judged(name)
    counts = tuple(data.draw(st.sampled_from(steps)) for steps in model.ladders)
    assert model.costs("macs").whole(counts) == model.counted("macs", counts)


@settings(max_examples=10)
@given(st.data())
def test_several_counts_at_once_cost_what_each_costs(data: st.DataObject) -> None:
    model = judged("residual")
    one = st.tuples(*(st.sampled_from(steps) for steps in model.ladders))
    many = data.draw(st.lists(one, min_size=1, max_size=4))
    costs = model.costs("macs")
    names = [name for name, _ in model.sound.model.named_modules()]
    assert costs.cost(names, many) == [costs.whole(counts) for counts in many]
    assert costs.cost([], many) == [0] * len(many)


# --- the way down ---


def stepped(calls: Sequence[Call]) -> list[float]:
    """Kernels take whole blocks of eight channels: some rungs save nothing."""
    return [
        float(
            sum(math.ceil(shape.inputs / 8) * math.ceil(shape.outputs / 8) for shape in each.shapes)
        )
        for each in calls
    ]


def macs_of(calls: Sequence[Call]) -> list[float]:
    return [float(sum(shape.macs() for shape in each.shapes)) for each in calls]


@pytest.mark.parametrize("name", ["residual", "unet", "lstm, both ways", "bert"])
@pytest.mark.parametrize("price", [macs_of, stepped])
@settings(max_examples=5)
@given(st.data())
def test_the_way_down(name: str, price: Price, data: st.DataObject) -> None:
    model = judged(name)
    goal, floor = data.draw(st.floats(0.05, 0.99)), data.draw(st.floats(0, 1))
    damage = [Damage(data.draw(st.floats(0, 10))) for _ in model.groups]
    costs = Costs(model.sound.model, model.groups, model.task, price)
    way = walk(costs, damage, floor, goal)
    dense = tuple(group.width for group in model.groups)
    whole = costs.whole(dense)

    def total(counts: Counts) -> float:
        return sum(
            each(1 - count / width)
            for each, count, width in zip(damage, counts, dense, strict=True)
        )

    assert way.states[0] == dense or total(way.states[0]) == 0
    assert len(way.states) == len(way.predicted)
    for counts, predicted in zip(way.states, way.predicted, strict=True):
        assert predicted == pytest.approx(costs.whole(counts) / whole)
        for group, count in zip(model.groups, counts, strict=True):
            assert least(group, floor) <= count <= group.width
    for here, there in pairwise(way.predicted):
        assert here > there
    for before, after in pairwise(way.states):
        assert total(before) < total(after)
    # No plain ratio is better than the way: somewhere on it costs no more and damages no more.
    for ratio in RATIOS:
        plain = tuple(
            max(least(group, floor), kept(group.width, ratio, group.each)) for group in model.groups
        )
        assert any(
            predicted <= costs.whole(plain) / whole + 1e-9
            and total(counts) <= total(plain) * (1 + 1e-9)
            for counts, predicted in zip(way.states, way.predicted, strict=True)
        )


def test_what_hurts_goes_last() -> None:
    model = judged("residual")
    for harmful, group in enumerate(model.groups):
        damage = [Damage(1e6 if at == harmful else 1.0) for at in range(len(model.groups))]
        way = walk(model.costs("macs"), damage, 0.25, 0.01)
        whole = [counts[harmful] == group.width for counts in way.states]
        first = whole.index(False)
        assert first > 1, "others go first"
        assert not any(whole[first:])
        spared = way.states[first - 1]
        others = [at for at in range(len(model.groups)) if at != harmful]
        assert all(spared[at] < model.groups[at].width for at in others)


def test_equal_damage_goes_where_the_cost_is() -> None:
    model = judged("cnn")
    damage = [Damage(1.0)] * len(model.groups)
    for dear, group in enumerate(model.groups):

        def price(calls: Sequence[Call], width: int = group.width) -> list[float]:
            # A unit of the dear group costs a hundred times one of the other.
            return [
                float(
                    sum(
                        each.outputs * (100 if width // 2 < each.outputs <= width else 1)
                        for each in call.shapes
                    )
                )
                for call in calls
            ]

        costs = Costs(model.sound.model, model.groups, model.task, price)
        way = walk(costs, damage, 0.5, 0.7)
        assert way.states[1][dear] < group.width


@settings(max_examples=20)
@given(st.data(), st.floats(0.1, 0.95), st.sampled_from([0.1, 0.5]))
def test_one_rung_that_comes_closer(data: st.DataObject, goal: float, floor: float) -> None:
    model = judged("cnn")
    ladders = [ladder(group.width, least(group, floor), group.each) for group in model.groups]
    above = tuple(data.draw(st.sampled_from(steps)) for steps in ladders)
    costs = model.costs("macs")
    whole = costs.whole(tuple(group.width for group in model.groups))
    shares = {}
    for at, steps in enumerate(ladders):
        for count in steps:
            counts = (*above[:at], count, *above[at + 1 :])
            if count < above[at] and costs.whole(counts) / whole <= goal:
                shares[counts] = costs.whole(counts) / whole
    found = closer(costs, above, floor, goal)
    if found is None:
        assert not shares
    else:
        assert shares[found] == max(shares.values())


# --- landing ---


class Real:
    """What each state really costs; counts how often it was asked."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = values
        self.asked: list[int] = []

    def __call__(self, counts: Counts) -> float:
        self.asked.append(counts[0])
        return self.values[counts[0]]


def way_of(predicted: Sequence[float]) -> Walk:
    return Walk([(at,) for at in range(len(predicted))], list(predicted))


falling = st.lists(st.floats(0.8, 0.999), max_size=60).map(
    lambda factors: [1.0, *np.cumprod(factors).tolist()]
)
goals = st.floats(0.01, 0.999)


def seen_by(way: Walk, real: Real, found: Any) -> None:
    """What holds of any landing."""
    assert found.reached == real.values[found.counts[0]]
    assert sorted(real.asked) == sorted(set(real.asked)), "nothing is measured twice"
    assert 0 not in real.asked, "the dense model costs 1"
    looked = sorted({0, *real.asked})
    assert found.tried == [(way.predicted[at], real.values[at]) for at in looked]
    assert found.counts[0] in looked


@given(falling, falling, goals)
def test_an_exact_quantity_lands_on_the_first_that_is_at_most_the_goal(
    predicted: list[float], values: list[float], goal: float
) -> None:
    count = min(len(predicted), len(values))
    way, real = way_of(predicted[:count]), Real(values[:count])
    found = land(way, real, goal, exact=True)
    seen_by(way, real, found)
    wanted = next((at for at in range(count) if real.values[at] <= goal), None)
    assert found.counts == ((count - 1 if wanted is None else wanted),)
    assert bool(found.unreached) == (wanted is None)
    assert len(real.asked) <= (1 + math.ceil(math.log2(count - 1)) if count > 2 else 1)
    if found.unreached:
        said = f"{found.reached:.3f} of the original is the least that was reached"
        assert found.unreached == said


fine = st.integers(20, 120).map(lambda count: np.geomspace(1, 0.2, count).tolist())
"""Steps of at most 8 %; most are smaller than what is near enough."""


@given(fine, st.floats(0, 0.25), st.floats(0.5, 2), st.floats(0, 0.01), st.randoms(), goals)
def test_a_measured_quantity_lands_near_the_goal(
    predicted: list[float], offset: float, bend: float, noise: float, random: Any, goal: float
) -> None:
    """The prediction is off by a part that does not shrink, by a bend, and what is measured by
    noise."""
    values = [
        (offset + (1 - offset) * each**bend) * random.uniform(1 - noise, 1 + noise)
        for each in predicted
    ]
    way, real = way_of(predicted), Real([1.0, *values[1:]])
    found = land(way, real, goal, exact=False)
    seen_by(way, real, found)
    assert len(real.asked) <= TRIES + 2
    # The dense model is no answer where another was looked at.
    others = found.tried[1:] or found.tried
    assert abs(found.reached - goal) == min(abs(each - goal) for _, each in others)
    low, high = min(real.values), max(real.values)
    widest = max(abs(a - b) for a, b in pairwise(real.values))
    if low <= goal <= high:
        assert abs(found.reached - goal) <= max(NEAR * goal, widest)
        assert not found.unreached
    elif found.unreached:
        assert goal < low


@given(fine, goals)
def test_a_right_prediction_takes_one_try_where_states_are_dense(
    predicted: list[float], goal: float
) -> None:
    way, real = way_of(predicted), Real(predicted)
    found = land(way, real, goal, exact=False)
    seen_by(way, real, found)
    if len(predicted) >= 80 and goal > 0.2:
        assert len(real.asked) == 1
        assert abs(found.reached - goal) <= NEAR * goal


@given(fine, st.floats(0.5, 0.9), st.floats(0.05, 0.45))
def test_what_cannot_reach_the_goal_is_said(
    predicted: list[float], offset: float, goal: float
) -> None:
    for exact in (True, False):
        values = [offset + (1 - offset) * each for each in predicted]
        way, real = way_of(predicted), Real(values)
        found = land(way, real, goal, exact=exact)
        seen_by(way, real, found)
        assert found.counts == way.states[-1]
        assert found.unreached == (
            f"{values[-1]:.3f} of the original is the least that was reached"
        )


@pytest.mark.parametrize("values", [[1, 0.9, 0.85, 0.80, 0.82], [1, 0.7, 0.6, 0.55, 0.56]])
def test_noise_does_not_hide_that_the_goal_is_out_of_reach(values: list[float]) -> None:
    found = land(way_of([1, 0.8, 0.6, 0.4, 0.3]), Real(values), 0.5, exact=False)
    assert found.reached == min(values)
    assert found.unreached


def test_the_nearest_of_states_that_lie_apart() -> None:
    values = [1, 0.97, 0.94, 0.79]
    assert land(way_of(values), Real(values), 0.9, exact=False).reached == 0.94


@pytest.mark.parametrize(
    ("goal", "exact", "reached", "unreached"),
    [
        (0.5, True, 1.0, True),
        (0.999, True, 1.0, True),
        (0.5, False, 1.0, True),
        (0.999, False, 1.0, False),  # as near as can be measured
    ],
)
def test_one_state_only(goal: float, exact: bool, reached: float, unreached: bool) -> None:
    real = Real([1.0])
    found = land(way_of([1.0]), real, goal, exact=exact)
    assert (found.counts, found.reached, bool(found.unreached)) == ((0,), reached, unreached)
    assert not real.asked
    assert found.tried == [(1.0, 1.0)]


@pytest.mark.parametrize("exact", [True, False])
def test_a_goal_of_almost_everything(exact: bool) -> None:
    real = Real([1.0, 0.98, 0.9, 0.5])
    found = land(way_of(real.values), real, 0.999, exact=exact)
    assert found.reached == 0.98, "the dense model is nearer, and no answer"
    assert not found.unreached


# --- prices ---


def test_one_table_prices_a_whole_search(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    @contextmanager
    def fake(target: Target, *, dtype: Dtype) -> Iterator[Callable[..., dict[Layer, float]]]:
        events.append((target, dtype))
        yield lambda layers: {layer: float(layer.macs()) for layer in layers}
        events.append("closed")

    monkeypatch.setattr(targets, "table", fake)
    model = judged("residual")
    damage = [Damage(1.0)] * len(model.groups)
    with price_of("latency", model.task, "int8") as price:
        way = walk(Costs(model.sound.model, model.groups, model.task, price), damage, 0.1, 0.5)
        assert price([Call((), 7), Call((Layer("linear", 3, 5),) * 2, 7)]) == [0, 30]
        assert price([Call((Layer("linear", 3, 5),), 0)]) == [15]
        assert price([]) == []
        assert events == [(model.task.target, "int8")]
    assert events[1:] == ["closed"]
    assert way == walk(model.costs("macs"), damage, 0.1, 0.5)


@pytest.mark.parametrize("quantity", ["macs", "params", "size"])
def test_what_is_counted_needs_no_table(
    quantity: Quantity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "table", None)
    with price_of(quantity, judged("cnn").task, "fp32") as price:
        assert price([]) == []


@pytest.mark.parametrize("quantity", ["params", "size"])
def test_parameters_are_the_price_of_size(quantity: Quantity) -> None:
    with price_of(quantity, judged("cnn").task, "fp32") as price:
        assert price([Call((Layer("linear", 3, 5),), 20), Call((), 0)]) == [20, 0]


# --- real quantities ---


def cut_of(task: Task, count: int = 8) -> tuple[Sound, list[Any]]:
    sound = Sound(task.model(), task, "heads")
    cuts = [
        chosen(group, [torch.arange(group.width)], count)
        for group in sound.groups
        if group.width > count
    ]
    return sound, sound.edits(cuts)


@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_counts_are_fractions_of_what_the_model_is_now(quantity: Quantity) -> None:
    task = task_of(small_cnn(), SHAPE)
    _, before = cut_of(task, 12)
    now = apply(task.model(), before)
    half = task_of(now, SHAPE)
    _, edits = cut_of(half, 4)

    def count(model: nn.Module) -> int:
        if quantity == "params":
            return counting.params(model)
        return counting.macs(model, task.examples(1))

    kept = copy.deepcopy(now.state_dict())
    with real_of(quantity, now, before, task, "fp32") as real:
        assert real([]) == 1
        assert real(edits) == count(apply(copy.deepcopy(now), edits)) / count(now)
    assert all(torch.equal(value, kept[key]) for key, value in now.state_dict().items())


def test_size_is_that_of_the_exported_files() -> None:
    task = task_of(small_cnn(), SHAPE)
    sound, edits = cut_of(task)
    with real_of("size", sound.dense, (), task, "fp32") as real:
        assert 0 < real(edits) < 1


def data(count: int = 60) -> Splits:
    rng = np.random.default_rng(0)
    x: Array = rng.normal(size=(count, *SHAPE)).astype(np.float32)
    return splits_of(x, rng.integers(0, 5, count))


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "int8"])
def test_latency_is_measured(dtype: Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "SECONDS", 0.02)
    task = task_of(small_cnn(), SHAPE, splits=data())
    sound, edits = cut_of(task)
    with real_of("latency", sound.dense, (), task, dtype) as real:
        assert 0 < real(edits) < math.inf


# --- the stage ---


def zoo_lstm() -> Task:
    torch.manual_seed(0)
    model = zoo.build("lstm", zoo.arguments_for("lstm", (8, 8), 10))
    return task_of(settled(model, torch.rand(16, 8, 8)), (8, 8))


TASKS: dict[str, Callable[[], Task]] = {
    "small cnn": lambda: task_of(small_cnn(32), SHAPE),
    "zoo lstm": zoo_lstm,
}


def made(task: Task, into: Path, **given: Any) -> tuple[nn.Module, dict[str, Any], Artifact]:
    artifact = prune(at_rest(task, into), task, into / "pruned", **given)
    model, _ = torchfile.open_model(artifact, task)
    return model, dict(artifact.steps[-1]["facts"]), artifact


@pytest.mark.parametrize(
    ("name", "quantity", "goal"),
    [
        *((name, *target) for name in TASKS for target in (("macs", 0.5), ("params", 0.3))),
        # Every look at a size is an export.
        *(pytest.param(name, "size", 0.5, marks=pytest.mark.slow) for name in TASKS),
    ],
)
def test_the_stage_lands_on_its_target(
    name: str, quantity: Quantity, goal: float, tmp_path: Path
) -> None:
    task = TASKS[name]()
    model, facts, artifact = made(task, tmp_path, **{quantity: goal})
    reached = facts[f"{quantity}_reached"]
    assert facts["unreached"] is None
    assert facts["asked"] == goal
    assert 0 < reached <= goal
    assert reached > goal - 0.15, "and no more is cut than the next rung takes"
    assert {"predicted": 1.0, "real": 1.0} in facts["tried"]
    assert reached >= max(one["real"] for one in facts["tried"] if one["real"] <= goal)
    if quantity == "params":
        assert reached == counting.params(model) / counting.params(task.model())
    elif quantity == "macs":
        whole = counting.macs(task.model(), task.examples(1))
        assert reached == counting.macs(model, task.examples(1)) / whole
    else:
        had = export(at_rest(task, tmp_path), task, tmp_path / "had").size_bytes
        assert reached == export(artifact, task, tmp_path / "has").size_bytes / had
    assert artifact.steps[-1]["settings"][quantity] == goal


def test_what_is_out_of_reach_is_said_and_the_best_is_made(tmp_path: Path) -> None:
    task = TASKS["small cnn"]()
    model, facts, _ = made(task, tmp_path, macs=0.1, floor=0.5)
    assert facts["macs_reached"] > 0.1
    assert facts["unreached"] == (
        f"macs=0.1: {facts['macs_reached']:.3f} of the original is the least that was reached"
    )
    whole = counting.macs(task.model(), task.examples(1))
    assert facts["macs_reached"] == counting.macs(model, task.examples(1)) / whole


class Unread(nn.Module):
    """Attention whose output is not added to its input: its heads and its outputs can both go."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.fc, self.head = nn.Linear(32, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.attention(x, x, x, need_weights=False)[0].mean(1)
        return self.head(self.fc(y).relu())


SAID = (
    "residual, padded shortcut",
    "lstm, two layers",
    "cnn, lstm",
    "multihead attention",
    "shared",
    "subclass",
    "split",
    "tied",
    "tied head",
    "attention, unread",
    "csp",
)
COUNTED = ("tied", "tied head", "csp", "lstm, two layers")
"""Families whose parameters are not simply those of one layer after the other."""


@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        *((name, "macs") for name in SAID),
        *((name, "params") for name in COUNTED),
        *(
            pytest.param(name, "params", marks=pytest.mark.slow)
            for name in SAID
            if name not in COUNTED
        ),
    ],
)
def test_what_is_said_is_what_the_model_costs(
    name: str, quantity: Quantity, tmp_path: Path
) -> None:
    if name in FAMILIES:
        family = FAMILIES[name]
        task = task_of(family.build(), kind=family.kind, inputs=family.inputs)
    else:
        torch.manual_seed(0)
        task = task_of(Unread(), (6, 32))
    model, facts, _ = made(task, tmp_path, **{quantity: 0.4})
    pair = (model, task.model())
    if quantity == "params":
        had = [counting.params(each) for each in pair]
    else:
        had = [counting.macs(each, task.examples(1)) for each in pair]
    assert facts[f"{quantity}_reached"] == had[0] / had[1]


def never(*_: Any) -> Any:
    raise AssertionError("a replay measures nothing")


def test_a_latency_target_replays_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Macs stand for milliseconds here, so that every run of the test decides the same."""

    @contextmanager
    def price(quantity: Quantity, task: Task, dtype: Dtype) -> Iterator[Price]:
        if quantity == "latency":
            assert dtype == "int8"
            yield macs_of
            return
        with price_of(quantity, task, dtype) as counted:
            yield counted

    @contextmanager
    def real(quantity: Quantity, dense: nn.Module, before: Any, task: Task, dtype: Dtype) -> Any:
        assert (quantity, dtype) == ("latency", "int8")
        with real_of("macs", dense, before, task, dtype) as counted:
            yield lambda edits: 0.05 + 0.95 * counted(edits)

    task = task_of(small_cnn(32), SHAPE)
    (tmp_path / "again").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(search, "price_of", price)
        patch.setattr(search, "real_of", real)
        _, facts, artifact = made(task, tmp_path, latency=0.5, dtype="int8")
    tried = [one["real"] for one in facts["tried"]]
    assert facts["latency_reached"] == min(tried, key=lambda reached: abs(reached - 0.5))
    said = dict(artifact.steps[-1]["settings"])
    cut = {root: has for root, (_, has) in facts["layers"].items()}
    assert said["widths"] == {"0": 32, "3": 64} | cut
    assert (said["latency"], said["dtype"]) == (0.5, "int8")
    for name in ("price_of", "real_of", "curves"):
        monkeypatch.setattr(search, name, never)
    again = bound(Step("prune", said)).settings
    _, replayed, second = made(task, tmp_path / "again", **again)
    assert second.path.read_bytes() == artifact.path.read_bytes()
    assert replayed["layers"] == facts["layers"]
    assert dict(second.steps[-1]["settings"]) == said


@pytest.mark.parametrize("given", [{"macs": 0.5}, {"ratio": 0.5}])
def test_widths_that_decided_are_among_the_settings(
    given: dict[str, float], tmp_path: Path
) -> None:
    widths = {"0": 4, "3": 30}
    _, facts, artifact = made(task_of(small_cnn(), SHAPE), tmp_path, **given, widths=widths)
    assert {root: has for root, (_, has) in facts["layers"].items()} == widths
    assert artifact.steps[-1]["settings"]["widths"] == widths


# --- bad input ---

ONES = ("ratio", *QUANTITIES)


@pytest.mark.parametrize("first", ONES)
def test_one_target_is_taken(first: str) -> None:
    settings = bound(Step("prune", {first: 0.5})).settings
    assert [name for name in ONES if settings[name] is not None] == [first]
    for second in ONES:
        if second != first:
            with pytest.raises(InputError) as caught:
                bound(Step("prune", {first: 0.5, second: 0.25}, name="mine"))
            said = str(caught.value)
            assert said.startswith("step 'mine': ")
            assert f"{first} = 0.5" in said
            assert f"{second} = 0.25" in said
            assert "\n" not in said


@pytest.mark.parametrize("given", [{}, {"ratio": None}, {"widths": {"0": 4}}, {"macs": None}])
def test_no_target_is_refused_with_those_that_there_are(given: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        bound(Step("prune", given, name="mine"))
    assert all(name in str(caught.value) for name in ONES)
    assert "none of them" in str(caught.value)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("value", [0, 1, 1.5, -0.5, "half", True])
def test_a_fraction_lies_between(quantity: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"step 'mine': {quantity} = "):
        bound(Step("prune", {quantity: value}, name="mine"))


@pytest.mark.parametrize(
    ("widths", "said"),
    [
        ({"nothing": 4}, "widths: 'nothing' is no layer that can be cut: 0, 3"),
        ({"8": 4}, "widths: '8' is no layer that can be cut"),
        ({"0": 17}, "widths: '0' has 16 units, so it cannot keep 17"),
        ({"0": 4, "3": 33}, "widths: '3' has 32 units"),
    ],
)
def test_widths_of_another_model_are_refused(
    widths: dict[str, int], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        made(task_of(small_cnn(), SHAPE), tmp_path, latency=0.5, widths=widths)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [0, -1, 2.5, "4"])
def test_widths_are_whole_and_at_least_one(count: Any) -> None:
    with pytest.raises(InputError, match="step 'mine': widths = "):
        bound(Step("prune", {"latency": 0.5, "widths": {"0": count}}, name="mine"))
