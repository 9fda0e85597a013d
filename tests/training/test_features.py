"""Hidden layers: which are paired, what is held of them, and that nothing stays behind."""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compressor import InputError, zoo
from compressor.training.features import Features, axis, outputs, pairs, spaced
from compressor.training.losses import Pair, Seen, total


def net(width: int, *, inplace: bool = False) -> nn.Sequential:
    """Pictures of 8x8, 4x4 and 2x2, a hidden linear layer and a head."""
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(2 * width, 8, 3, padding=1, stride=2),
        nn.ReLU(inplace=inplace),
        nn.Flatten(),
        nn.Linear(32, 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, 10),
    )


X = (torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)
NAMES = [("1", "1"), ("4", "4"), ("6", "6"), ("9", "9")]


def hooks(*models: nn.Module) -> int:
    return sum(len(module._forward_hooks) for model in models for module in model.modules())


def same(one: nn.Module, two: nn.Module) -> bool:
    others = two.state_dict()
    return all(torch.equal(value, others[name]) for name, value in one.state_dict().items())


def test_the_last_layer_of_each_size_is_paired() -> None:
    student, teacher = net(3), net(4)
    assert pairs(student, teacher, X) == NAMES
    assert pairs(student, teacher, X, most=2) == [NAMES[1], NAMES[3]]
    assert pairs(student, teacher, X, most=1) == [NAMES[3]]


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("resnet20", (1, 16, 16), ["layer1", "layer2", "layer3"]),
        # layer2.0.bn1 is of the size of layer1 and works after it.
        ("resnet50", (3, 32, 32), ["bn1", "layer1", "layer2", "layer4"]),
        ("cnn", (1, 8, 8), ["conv1", "conv2", "fc1"]),
        ("vit", (1, 8, 8), ["patch_embed", "blocks.0", "blocks.1", "norm"]),
        ("mlp", (30,), ["fc1", "fc2"]),
        ("lstm", (8, 8), ["rnn"]),
        ("unet", (1, 8, 8), ["down2", "bottom", "up2", "up1"]),
        ("mobilenet_v2", (3, 32, 32), ["features.1", "features.3", "features.6", "features"]),
    ],
)
def test_every_family_has_pairs(name: str, shape: tuple[int, ...], wanted: list[str]) -> None:
    torch.manual_seed(0)
    teacher = zoo.build(name, zoo.arguments_for(name, shape, 4)).eval()
    student = copy.deepcopy(teacher)
    example = (torch.randn(2, *shape),)
    found = pairs(student, teacher, example)
    assert found == [(each, each) for each in wanted]
    with Features(student, teacher, found, example, 0) as features:
        student(*example)
        with torch.no_grad():
            teacher(*example)
        for pair in features.take():
            assert torch.equal(pair.student, pair.teacher)
            assert pair.adapted is pair.student


def test_blocks_of_a_transformer_are_evenly_spaced() -> None:
    """All are of one size: its last layer, and blocks between."""

    class Encoder(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 8)
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(8, 2, width, batch_first=True) for _ in range(6)
            )
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            logits: Tensor = self.head(x.mean(1))
            return logits

    example = (torch.randint(0, 7, (2, 5)),)
    student, teacher = Encoder(4), Encoder(16)
    found = pairs(student, teacher, example)
    assert [mine for mine, _ in found] == ["blocks.0", "blocks.2", "blocks.4", "blocks.5"]
    with Features(student, teacher, found, example, 0) as features:
        student(*example), teacher(*example)
        for pair in features.take():
            assert pair.student.shape == (2, 8, 5)  # channels on axis 1, then steps


def test_no_mode_and_no_weight_changes() -> None:
    student, teacher = net(3).train(), net(4).eval()
    student.get_submodule("4").eval()
    before = copy.deepcopy(student), copy.deepcopy(teacher)
    modes = [module.training for module in student.modules()]
    state = torch.random.get_rng_state()
    names = pairs(student, teacher, X)
    Features(student, teacher, names, X, seed=3)
    assert [module.training for module in student.modules()] == modes
    assert same(student, before[0])
    assert same(teacher, before[1])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert hooks(student, teacher) == 0


@pytest.mark.parametrize("inplace", [False, True])
def test_what_a_model_returns_is_no_hidden_layer(inplace: bool) -> None:
    """Neither under another shape nor changed in place on its way out."""

    class Headless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
            self.last = nn.ReLU(inplace=inplace)

        def forward(self, x: Tensor) -> Tensor:
            flat: Tensor = self.last(self.two(self.one(x))).flatten(1)
            return flat

    model = Headless()
    found = pairs(model, copy.deepcopy(model), X)
    assert found == ([("one", "one")] if inplace else [("one", "one"), ("two", "two")])


def test_layers_are_named_by_hand() -> None:
    student, teacher = net(3), net(4)
    assert pairs(student, teacher, X, ["2", "5=3"]) == [("2", "2"), ("5", "3")]
    assert pairs(student, teacher, X, []) == []
    wider = nn.Sequential(nn.Conv2d(1, 7, 3, padding=1), nn.Flatten(), nn.Linear(7 * 64, 10))
    assert pairs(wider, teacher, X, ["0=1"]) == [("0", "1")]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (["nope"], "the student has no layer 'nope': choose from 0, 1, 2, 3, 4, 5, 6, 7, ..."),
        (["1=nope"], "the teacher has no layer 'nope': choose from 0"),
        (["=1"], "the student has no layer '': choose from 0"),
        (["1=4"], "the outputs of '1' (5, 3, 8, 8) and '4' (5, 8, 4, 4) differ in more than"),
        (["9=6"], "the outputs of '9' (5, 12) and '6' (5, 8, 2, 2) differ in more than channels"),
        (["idle"], "layer 'idle' of the student gave no tensor: choose one that runs"),
    ],
)
def test_layers_that_cannot_be_paired(layers: list[str], said: str) -> None:
    student, teacher = net(3), net(4)
    student.add_module("idle", nn.ModuleDict({"a": nn.Linear(1, 1)}))
    student.forward = lambda x: nn.Sequential(*list(student)[:-1])(x)  # type: ignore[method-assign]
    with pytest.raises(InputError) as caught:
        pairs(student, teacher, X, layers)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_nothing_to_pair() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(InputError, match="no hidden layer of student and teacher has the same"):
        pairs(model, copy.deepcopy(model), X)


@given(st.integers(1, 30), st.integers(1, 10))
def test_spaced_ends_with_the_last(count: int, most: int) -> None:
    names = [str(at) for at in range(count)]
    found = [int(name) for name in spaced(names, most)]
    assert len(found) == min(count, most)
    assert found[-1] == count - 1
    assert found == sorted(set(found))
    gaps = {two - one for one, two in zip([-1, *found], found, strict=False)}
    assert max(gaps) - min(gaps) <= 1


def test_channels_lie_where_they_differ_or_where_the_layer_has_them() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(2, 2, 1), "linear": nn.Linear(2, 2)})
    at = {
        (name, ours, theirs): axis(model, name, ours, model, name, theirs)
        for name in ("conv", "linear")
        for ours, theirs in (((2, 3, 5), (2, 3, 7)), ((2, 3, 5), (2, 4, 5)), ((2, 3, 5), (2, 3, 5)))
    }
    assert list(at.values()) == [2, 1, 1, 2, 1, 2]


def test_features_are_what_the_layers_gave() -> None:
    student, teacher = net(3), net(4)
    with Features(student, teacher, NAMES, X, seed=0) as features:
        student(*X)
        with torch.no_grad():
            teacher(*X)
        found = features.take()
        for (name, _), pair, adapter in zip(NAMES, found, features.adapters, strict=True):
            until = int(name) + 1
            student.eval(), teacher.eval()
            assert pair.teacher.shape == pair.adapted.shape
            assert not pair.teacher.requires_grad
            assert pair.student.requires_grad
            assert pair.adapted.shape[1] == teacher[:until](*X).shape[1]
            if isinstance(adapter, nn.Conv1d):
                weight, bias = adapter.weight[:, :, 0], adapter.bias
                assert bias is not None
                by_hand = torch.einsum("oc,nc...->no...", weight, pair.student)
                by_hand = by_hand + bias.reshape(1, -1, *[1] * (by_hand.ndim - 2))
                torch.testing.assert_close(pair.adapted, by_hand)
            else:
                assert pair.adapted is pair.student
    kinds = [type(adapter) for adapter in features.adapters]
    assert kinds == [nn.Conv1d, nn.Conv1d, nn.Identity, nn.Conv1d]


def test_adapters_follow_from_the_seed_and_learn() -> None:
    student, teacher = net(3), net(4)
    one, two, other = (Features(student, teacher, NAMES, X, seed).adapters for seed in (0, 0, 1))
    assert same(one, two)
    assert not same(one, other)
    with Features(student, teacher, NAMES, X, 0) as features:
        optimiser = torch.optim.Adam([*student.parameters(), *features.adapters.parameters()], 1e-2)
        values = []
        for _ in range(30):
            last = student(*X)
            with torch.no_grad():
                teacher(*X)
            targets = torch.zeros(5, dtype=torch.int64)
            seen = Seen("classification", last, targets, last, features=features.take())
            value = total({"hint": 1.0}, seen)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            values.append(value.item())
    assert not same(features.adapters, one)
    assert values[-1] < 0.5 * values[0]
    assert {name.split(".")[0] for name in features.adapters.state_dict()} == {"0", "1", "3"}


@pytest.mark.parametrize("error", [None, ValueError])
def test_nothing_stays_behind(error: type[Exception] | None) -> None:
    student, teacher = net(3), net(4)
    features = Features(student, teacher, NAMES, X, seed=0)
    try:
        with features:
            assert hooks(student, teacher) == 8
            student(*X), teacher(*X)
            if error:
                raise error
    except ValueError:
        assert error
    assert hooks(student, teacher) == 0
    with pytest.raises(InputError, match="layer '1' of the student did not run in this step"):
        features.take()


def test_a_failing_probe_leaves_no_hooks() -> None:
    student, teacher = net(3).train(), net(4)
    with pytest.raises(RuntimeError):
        outputs(student, (torch.zeros(2, 3),))
    assert hooks(student, teacher) == 0
    assert student.training


def test_features_are_taken_once() -> None:
    student, teacher = net(3), net(4)
    with Features(student, teacher, NAMES[:1], X, seed=0) as features:
        student(*X)
        with pytest.raises(InputError, match="layer '1' of the teacher did not run"):
            features.take()
        teacher(*X)
        (pair,) = features.take()
        assert pair.student.requires_grad
        assert not pair.teacher.requires_grad  # though it was not called under no_grad
        with pytest.raises(InputError, match="did not run in this step: pair layers that run in"):
            features.take()


def test_one_teacher_layer_may_serve_several() -> None:
    student, teacher = net(3), net(4)
    names = [("1", "1"), ("2", "1")]
    with Features(student, teacher, names, X, seed=0) as features:
        assert hooks(student, teacher) == 3
        student(*X), teacher(*X)
        one, two = features.take()
    assert torch.equal(one.teacher, two.teacher)
    assert not torch.equal(one.student, two.student)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("inplace", [False, True])
def test_sixteen_bits_train(inside: bool, inplace: bool) -> None:
    """Taken inside of autocast or after it, and where the next layer works in place."""
    student, teacher = net(3, inplace=inplace), net(4, inplace=inplace)
    with Features(student, teacher, NAMES, X, seed=0) as features:
        taken: tuple[Pair, ...] = ()
        with torch.autocast("cpu", torch.bfloat16):
            last = student(*X)
            with torch.no_grad():
                teacher(*X)
            if inside:
                taken = features.take()
        taken = taken or features.take()
        seen = Seen("classification", last, torch.zeros(5), last, features=taken)
        value = total({"hint": 1.0, "attention": 1.0}, seen)
        value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    first = student.get_parameter("0.weight").grad
    assert first is not None
    assert first.any()
    assert all(each.grad is not None for each in features.adapters.parameters())


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where: Any = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_wrapped_student_is_hooked_inside() -> None:
    student, teacher = net(3), net(4)
    wrapped = DistributedDataParallel(student)
    names = pairs(wrapped, teacher, X)
    assert names == NAMES
    with Features(wrapped, teacher, names, X, seed=0) as features:
        last = wrapped(*X)
        with torch.no_grad():
            teacher(*X)
        seen = Seen("classification", last, torch.zeros(5), last, features=features.take())
        (total({"hint": 1.0}, seen) + last.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert hooks(student, teacher) == 0
