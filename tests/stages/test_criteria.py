"""Criteria: values by hand, torch-pruning's own where it is right, and what must always hold."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from standing import settled, task_of
from torch import Tensor, nn

from compressor.errors import InputError, StageError
from compressor.stages.prune.criteria import CRITERIA, scored
from compressor.stages.prune.group import Group, Slice, Unit
from compressor.task import Array, Kind, Split, Splits, Task
from compressor.training.losses import LABELS

NEED_DATA = ("taylor", "hessian", "activation")


def group(root: str, *strands: tuple[Unit, ...]) -> Group:
    return Group(root, (root,), strands)


def units(count: int, *where: tuple[str, int, int]) -> tuple[Unit, ...]:
    """Unit ``i`` has positions ``i * each ... (i + 1) * each`` of each (parameter, dim, each)."""
    return tuple(
        tuple(
            Slice(name, dim, tuple(range(unit * each, (unit + 1) * each)))
            for name, dim, each in where
        )
        for unit in range(count)
    )


def only(x: Array, y: Array) -> Splits:
    """Splits of which only ``calibrate`` may be read."""

    def forbidden(at: Any) -> Any:
        raise AssertionError("a criterion read another split than calibrate")

    other = Split(forbidden, np.arange(len(y)))
    return Splits(other, other, Split.arrays(x, y), other)


def values(model: nn.Module, groups: Group, task: Task, criterion: str) -> list[float]:
    ((found,),) = scored(model, [groups], task, criterion)
    assert found.dtype == torch.float64
    assert found.shape == (groups.width,)
    return found.tolist()


def put(model: nn.Module, **weights: object) -> None:
    """Writes values over parameters, whose names have ``_`` for the dot."""
    with torch.no_grad():
        for name, value in weights.items():
            parameter = model.get_parameter(name.strip("_").replace("_", "."))
            parameter.copy_(torch.as_tensor(value))


def two_layers() -> tuple[nn.Module, Group]:
    """Three hidden units without activation: rows [3, 4], [0, 1], [2, 0]; columns 1, 2, 0."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    put(model, _0_weight=[[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]], _0_bias=100.0)
    put(model, _1_weight=[[1.0, -2.0, 0.0]], _1_bias=0.0)
    cut = units(3, ("0.weight", 0, 1), ("0.bias", 0, 1), ("1.weight", 1, 1))
    return model.eval(), group("0", cut)


def conv_net(pooled: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.AdaptiveAvgPool2d(1 if pooled else 2),
        nn.Flatten(),
        nn.Linear(4 if pooled else 16, 3),
    )
    put(model, _1_weight=torch.randn(6))
    return settled(model, torch.randn(8, 2, 4, 4))


CONV_GROUPS = (
    group(
        "0",
        units(
            6,
            ("0.weight", 0, 1),
            ("0.bias", 0, 1),
            *((f"1.{name}", 0, 1) for name in ("weight", "bias", "running_mean", "running_var")),
            ("3.weight", 1, 1),
        ),
    ),
    group("3", units(4, ("3.weight", 0, 1), ("3.bias", 0, 1), ("6.weight", 1, 4))),
)


def conv_task(model: nn.Module, count: int = 12, **changes: Any) -> Task:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, 2, 4, 4)).astype(np.float32)
    task: Task = task_of(model, (2, 4, 4), splits=only(x, rng.integers(0, 3, count)), **changes)
    return task


def test_l1_l2_and_lamp_by_hand() -> None:
    model, hidden = two_layers()
    task = task_of(model, (2,), kind="regression")
    l1, l2 = np.array([8.0, 3.0, 2.0]), np.array([26.0, 5.0, 4.0])
    assert values(model, hidden, task, "l1") == pytest.approx(l1 / l1.mean())
    assert values(model, hidden, task, "l2") == pytest.approx(l2 / l2.mean())
    assert values(model, hidden, task, "lamp") == pytest.approx([26 / 26, 5 / 31, 4 / 35])


def test_fpgm_by_hand() -> None:
    model = nn.Sequential(nn.Linear(1, 3, bias=False)).eval()
    put(model, _0_weight=[[1.0], [2.0], [3.0]])
    task = task_of(model, (1,), kind="regression")
    found = values(model, group("0", units(3, ("0.weight", 0, 1))), task, "fpgm")
    distances = np.array([3.0 + 8, 3 + 5, 5 + 8])  # between the squares 1, 4 and 9
    assert found == pytest.approx(distances / distances.mean())


def test_bn_is_the_scale_and_l2_where_there_is_none() -> None:
    model = conv_net()
    task = conv_task(model)
    scales = model.get_parameter("1.weight").detach().abs().double()
    first, second = (found for (found,) in scored(model, CONV_GROUPS, task, "bn"))
    torch.testing.assert_close(first, scales / scales.mean(), rtol=1e-5, atol=0)
    ((l2,),) = scored(model, CONV_GROUPS[1:], task, "l2")
    torch.testing.assert_close(second, l2.sqrt() / l2.sqrt().mean(), rtol=1e-5, atol=0)


def test_activation_by_hand() -> None:
    model, hidden = two_layers()
    put(model, _0_bias=0.0)
    x = np.array([[1.0, 0.0], [-1.0, 2.0]], dtype=np.float32)
    task = task_of(model, (2,), kind="regression", splits=only(x, np.zeros(2, np.float32)))
    mean = np.array([(3 + 5) / 2, (0 + 2) / 2, (2 + 2) / 2])
    assert values(model, hidden, task, "activation") == pytest.approx(mean / mean.mean())


def test_activation_reads_flattened_grouped_and_transposed_inputs() -> None:
    """The mean over the positions, the parts of a grouped convolution, and the consumers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(1, 4, 1), nn.Conv1d(4, 2, 1, groups=2), nn.ConvTranspose1d(2, 1, 1), nn.Flatten()
    ).eval()
    x = np.random.default_rng(0).standard_normal((40, 1, 3)).astype(np.float32)
    y = np.zeros((40, 3), np.float32)
    task = task_of(model, (1, 3), kind="regression", splits=only(x, y))
    # Unit i: channels i and i + 2 of the first layer, position i of both parts of the second.
    parts = tuple((Slice("0.weight", 0, (i, i + 2)), Slice("1.weight", 1, (i,))) for i in range(2))
    ends = units(2, ("1.weight", 0, 1), ("2.weight", 0, 1))
    (first,), (second,) = scored(model, [group("0", parts), group("1", ends)], task, "activation")
    with torch.no_grad():
        middle = model.get_submodule("0")(torch.from_numpy(x))
        late = model.get_submodule("1")(middle).abs().mean((0, 2)).double()
    early = middle.abs().mean((0, 2)).reshape(2, 2).mean(0).double()
    torch.testing.assert_close(first, early / early.mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(second, late / late.mean(), rtol=1e-5, atol=0)


def test_activation_falls_back_to_l2_where_nothing_can_be_watched() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(2, 3, batch_first=True).eval()
    gates = tuple(
        (
            Slice("weight_ih_l0", 0, (i, i + 3, i + 6, i + 9)),
            Slice("weight_hh_l0", 0, (i, i + 3, i + 6, i + 9)),
            Slice("weight_hh_l0", 1, (i,)),
        )
        for i in range(3)
    )
    x = np.zeros((4, 5, 2), np.float32)
    splits = only(x, np.zeros((4, 5, 3), np.float32))
    task = task_of(lstm, (5, 2), kind="regression", splits=splits)
    found = values(lstm, group("", gates), task, "activation")
    # Rows and columns of the recurrent weight both count.
    rows = lstm.get_parameter("weight_ih_l0").detach().double() ** 2
    square = lstm.get_parameter("weight_hh_l0").detach().double() ** 2
    l2 = (rows.sum(1) + square.sum(1)).reshape(4, 3).sum(0) + square.sum(0)
    assert found == pytest.approx((l2 / l2.mean()).tolist())


def linear(weights: list[float]) -> tuple[nn.Module, Group]:
    model = nn.Sequential(nn.Linear(len(weights), 1, bias=False)).eval()
    put(model, _0_weight=[weights])
    return model, group("0", units(len(weights), ("0.weight", 1, 1)))


def test_taylor_by_hand() -> None:
    """Loss (w.x - y)^2: the gradient is 2 (w.x - y) x. Batches of 32 count by their examples."""
    model, inputs = linear([1.0, -2.0])
    x = np.array([[1.0, 1.0]] * 32 + [[3.0, 0.5]] * 8, dtype=np.float32)
    y = np.zeros((40, 1), np.float32)
    task = task_of(model, (2,), kind="regression", splits=only(x, y))
    big, small = np.abs([1 * -2 * 1, -2 * -2 * 1]), np.abs([1 * 4 * 3, -2 * 4 * 0.5])
    assert values(model, inputs, task, "taylor") == pytest.approx((32 * big + 8 * small) / 40)


def test_hessian_is_the_loss_lost_in_least_squares() -> None:
    """Residuals +-sqrt(1/2), so that E[g^2] is the second derivative; each x with both signs, so
    that the gradient is zero: cutting a weight then costs w^2 H / 2 exactly."""
    model, inputs = linear([1.0, -2.0, 0.5])
    x = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    x = np.concatenate([x, x])
    fitted = model(torch.from_numpy(x)).detach().numpy()
    y = fitted + np.repeat([[0.5**0.5], [-(0.5**0.5)]], 20, axis=0).astype(np.float32)
    task = task_of(model, (3,), kind="regression", splits=only(x, y))
    assert values(model, inputs, task, "hessian") == pytest.approx(
        losses_without(model, inputs, task), rel=1e-4
    )


def losses_without(model: nn.Module, cut: Group, task: Task) -> list[float]:
    """How the label loss on calibrate changes when one unit after the other is zero."""
    assert task.splits
    (x,), y = task.splits.calibrate.head(len(task.splits.calibrate))

    def loss(of: nn.Module) -> float:
        with torch.no_grad():
            return float(LABELS[task.kind](of(torch.from_numpy(x)), torch.from_numpy(y)))

    changes = []
    for unit in cut.strands[0]:
        trial = copy.deepcopy(model)
        for name, dim, at in unit:
            trial.state_dict()[name].index_fill_(dim, torch.tensor(at), 0)
        changes.append(loss(trial) - loss(model))
    return changes


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_saliency_ranks_as_the_loss_does_and_a_dead_unit_is_zero(criterion: str) -> None:
    """One unit is dead (it never fires), the others matter ever more."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)).eval()
    put(model, _0_weight=torch.eye(4), _0_bias=[1.0, 1.0, -1e3, 1.0])
    put(model, _2_weight=[[0.02, 0.1, 5.0, 0.004]])
    hidden = group("0", units(4, ("0.weight", 0, 1), ("0.bias", 0, 1), ("2.weight", 1, 1)))
    x = np.random.default_rng(0).uniform(0, 1, (64, 4)).astype(np.float32)
    task = task_of(model, (4,), kind="regression", splits=only(x, np.full((64, 1), 3, np.float32)))
    found = values(model, hidden, task, criterion)
    lost = np.abs(losses_without(model, hidden, task))
    assert found[2] == lost[2] == 0
    assert np.argsort(found).tolist() == np.argsort(lost).tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "flattened"])
@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm", "lamp"])
def test_plain_networks_are_ranked_as_by_torch_pruning(criterion: str, pooled: bool) -> None:
    import torch_pruning

    theirs = {
        "l1": torch_pruning.importance.GroupMagnitudeImportance(p=1),
        "l2": torch_pruning.importance.GroupMagnitudeImportance(p=2),
        "fpgm": torch_pruning.importance.FPGMImportance(),
        "lamp": torch_pruning.importance.LAMPImportance(),
    }
    model = conv_net(pooled)
    last = units(4, ("3.weight", 0, 1), ("3.bias", 0, 1), ("6.weight", 1, 1 if pooled else 4))
    groups = [CONV_GROUPS[0], group("3", last)]
    if criterion == "fpgm" and not pooled:
        groups.pop()  # theirs takes distances of single features there, ours of whole channels
    ours = scored(model, groups, conv_task(model), criterion)
    graph = torch_pruning.DependencyGraph().build_dependency(model, torch.randn(1, 2, 4, 4))
    for (found,), one in zip(ours, groups, strict=True):
        whole = graph.get_pruning_group(
            model.get_submodule(one.root),
            torch_pruning.prune_conv_out_channels,
            idxs=list(range(one.width)),
        )
        torch.testing.assert_close(found, theirs[criterion](whole).double(), rtol=1e-5, atol=1e-7)


def shuffled(found: Group, order: list[int]) -> Group:
    return dataclasses.replace(found, strands=(tuple(found.strands[0][i] for i in order),))


@settings(max_examples=10)
@given(order=st.permutations(range(6)), criterion=st.sampled_from(sorted({*CRITERIA} - {"random"})))
def test_permuted_units_have_permuted_scores(order: list[int], criterion: str) -> None:
    model = conv_net()
    task = conv_task(model)
    ((plain,),) = scored(model, CONV_GROUPS[:1], task, criterion)
    ((found,),) = scored(model, [shuffled(CONV_GROUPS[0], order)], task, criterion)
    torch.testing.assert_close(found, plain[order], rtol=1e-5, atol=1e-9)


@settings(max_examples=20)
@given(exponent=st.integers(-30, 15), criterion=st.sampled_from(["l1", "l2", "lamp", "fpgm", "bn"]))
def test_relative_criteria_do_not_see_the_scale_of_the_weights(
    exponent: int, criterion: str
) -> None:
    model = conv_net()
    task = conv_task(model)
    before = scored(model, CONV_GROUPS, task, criterion)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0**exponent)
    for (old,), (new,) in zip(before, scored(model, CONV_GROUPS, task, criterion), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-9)


def test_taylor_keeps_the_unit_of_the_loss() -> None:
    """A loss a million times smaller gives scores a million times smaller, not the same."""
    model, inputs = linear([1.0, -2.0])
    x = np.ones((4, 2), np.float32)
    task = task_of(model, (2,), kind="regression", splits=only(x, np.zeros((4, 1), np.float32)))
    tiny = dataclasses.replace(task, splits=only(1e-3 * x, np.zeros((4, 1), np.float32)))
    big = values(model, inputs, task, "taylor")
    assert values(model, inputs, tiny, "taylor") == pytest.approx([1e-6 * each for each in big])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_weights_of_zero_have_finite_scores(criterion: str) -> None:
    model = conv_net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for (found,) in scored(model, CONV_GROUPS, conv_task(model), criterion):
        assert torch.isfinite(found).all()
        assert criterion == "random" or not found.any()


def test_units_that_are_all_alike_have_the_distance_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False)).eval()
    put(model, _0_weight=1.0)
    task = task_of(model, (2,), kind="regression")
    assert values(model, group("0", units(3, ("0.weight", 0, 1))), task, "fpgm") == [0, 0, 0]


@pytest.mark.parametrize("name", ["_0_weight", "_1_weight"])
@pytest.mark.parametrize("criterion", ["l2", "fpgm", "lamp", "bn", "taylor", "hessian"])
def test_weights_that_are_not_finite_are_refused(criterion: str, name: str) -> None:
    model, hidden = two_layers()
    put(model, **{name: float("nan")})
    x, y = np.ones((4, 2), np.float32), np.zeros((4, 1), np.float32)
    task = task_of(model, (2,), kind="regression", splits=only(x, y))
    with pytest.raises(StageError, match="not finite"):
        scored(model, [hidden], task, criterion)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_frozen_parameters_are_scored_and_the_model_stays_as_it_was(criterion: str) -> None:
    model = conv_net()
    task = conv_task(model)
    free = scored(model, CONV_GROUPS, task, criterion)
    model.requires_grad_(False)
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        frozen = scored(model, CONV_GROUPS, task, criterion)
    for (ours,), (theirs,) in zip(frozen, free, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.any()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for parameter in model.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
    for module in model.modules():
        assert not module.training
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_random_is_the_seeds() -> None:
    model = conv_net()

    def drawn(seed: int) -> list[Tensor]:
        task = conv_task(model, seed=seed)
        return [found for (found,) in scored(model, CONV_GROUPS, task, "random")]

    assert all(map(torch.equal, drawn(1), drawn(1)))
    assert not torch.equal(drawn(1)[0], drawn(2)[0])


@pytest.mark.parametrize("criterion", NEED_DATA)
def test_without_data_it_says_what_to_do(criterion: str) -> None:
    model = conv_net()
    with pytest.raises(InputError) as raised:
        scored(model, CONV_GROUPS, task_of(model, (2, 4, 4)), criterion)
    assert str(raised.value) == (f"criterion {criterion!r} needs data: add --data SPEC, or use l2")


def test_an_unknown_criterion_lists_the_known() -> None:
    model = conv_net()
    with pytest.raises(InputError, match="'l3' is unknown: use one of l1, l2"):
        scored(model, CONV_GROUPS, task_of(model, (2, 4, 4)), "l3")


@pytest.mark.parametrize("criterion", NEED_DATA)
def test_at_most_256_examples_are_read(criterion: str) -> None:
    model, inputs = linear([1.0, -2.0])
    read: list[int] = []

    def fetch(at: Any) -> Any:
        read.extend(at.tolist())
        return (np.ones((len(at), 2), np.float32),), np.zeros((len(at), 1), np.float32)

    calibrate = Split(fetch, np.arange(300))
    splits = dataclasses.replace(only(np.zeros((1, 2)), np.zeros(1)), calibrate=calibrate)
    scored(model, [inputs], task_of(model, (2,), kind="regression", splits=splits), criterion)
    assert read == list(range(256))


def test_strands_are_scored_each_for_itself() -> None:
    model = conv_net()
    task = conv_task(model)
    both = [strand for found in CONV_GROUPS for strand in found.strands]
    together = dataclasses.replace(CONV_GROUPS[0], strands=(both[0][:4], both[1]))
    ((first, second),) = scored(model, [together], task, "l2")
    ((alone,),) = scored(model, CONV_GROUPS[1:], task, "l2")
    assert first.shape == (4,)
    assert torch.equal(second, alone)


def test_tensors_that_hold_a_part_of_the_units_count_for_those() -> None:
    """Half of the channels goes one way after a split, half another."""
    model = nn.ModuleDict({"a": nn.Linear(1, 4), "b": nn.Linear(2, 1), "c": nn.Linear(2, 1)}).eval()
    put(model, a_weight=1.0, b_weight=1.0, c_weight=2.0)
    halves = tuple(
        (Slice("a.weight", 0, (i,)), Slice("bc"[i // 2] + ".weight", 1, (i % 2,))) for i in range(4)
    )
    task = task_of(model, (1,), kind="regression")
    l2 = np.array([2.0, 2, 5, 5])
    assert values(model, group("a", halves), task, "l2") == pytest.approx(l2 / l2.mean())
    assert values(model, group("a", halves[::-1]), task, "l2") == pytest.approx(
        l2[::-1] / l2.mean()
    )


@pytest.mark.parametrize("criterion", ["l2", "fpgm"])
def test_the_order_of_slices_does_not_matter(criterion: str) -> None:
    """Also where the first tensor holds only a part of the units."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(2, 5), "c": nn.Linear(2, 1)}).eval()
    task = task_of(model, (3,), kind="regression")
    found = []
    for turn in (1, -1):
        halves = tuple(
            (Slice("a.weight", 0, (i,)), Slice("bc"[i // 2] + ".weight", 1, (i % 2,)))[::turn]
            for i in range(4)
        )
        found.append(values(model, group("a", halves), task, criterion))
    assert found[0] == pytest.approx(found[1])


def test_activation_weighs_consumers_alike_however_much_they_read() -> None:
    """A unit that one consumer reads flattened, at two positions, and another as one channel."""
    model = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(2, 1)}).eval()
    read_twice, read_once = np.array([[1.0, 3, 6, 8]]), np.array([[5.0, 1]])

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = model

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            total: Tensor = self.of["a"](x) + self.of["b"](y)
            return total

    both = Both().eval()
    x = (read_twice.astype(np.float32), read_once.astype(np.float32))
    splits = Splits(*[Split.arrays(x, np.zeros((1, 1), np.float32))] * 4)
    task = task_of(both, (4,), (2,), kind="regression", splits=splits)
    cut = group("of.a", units(2, ("of.a.weight", 1, 2), ("of.b.weight", 1, 1)))
    mean = np.array([(2 + 5) / 2, (7 + 1) / 2])
    assert values(both, cut, task, "activation") == pytest.approx(mean / mean.mean())


KINDS: dict[Kind, tuple[int, Array]] = {
    "binary": (1, np.array([0, 1, 1, 0])),
    "multilabel": (2, np.array([[0, 1], [1, 1], [0, 0], [1, 0]])),
    "classification": (2, np.array([0, 1, 1, 0])),
    "regression": (1, np.array([0.5, 1.0, -1.0, 2.0])),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_every_kind_has_its_loss(kind: Kind, criterion: str) -> None:
    width, y = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, width)).eval()
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    task = task_of(model, (3,), kind=kind, splits=only(x, y))
    hidden = group("0", units(4, ("0.weight", 0, 1), ("2.weight", 1, 1)))
    assert min(values(model, hidden, task, criterion)) > 0
