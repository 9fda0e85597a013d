"""Sparsity-inducing training: the penalty is what it says, and a cut after it costs less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from standing import at_rest, small_cnn, splits_of, task_of
from torch import Tensor, nn

from compressor import Artifact, Task, Unsuitable, data
from compressor.loading import torchfile
from compressor.metrics import METRICS
from compressor.stages import distill, perform, prune
from compressor.stages.mask import mask
from compressor.stages.prune import Sound
from compressor.stages.sparsify import SMALL, scales_of, sparsify, units_of
from compressor.training.evaluation import evaluate
from compressor.training.loop import fit
from compressor.training.recovery import from_labels
from compressor.training.settings import Training

IMAGE = (1, 8, 8)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, *IMAGE)).astype(np.float32)
Y = RNG.integers(0, 5, 60)


def images(reference: nn.Module | None = None, **changes: Any) -> Task:
    given = {"splits": splits_of(X, Y), **changes}
    return task_of(reference or small_cnn(4), IMAGE, **given)


def sparse(task: Task, folder: Path, **given: Any) -> tuple[nn.Module, dict[str, Any], Artifact]:
    """The trained model, the facts, and the artifact."""
    asked = {"epochs": 2, "batch_size": 16, **given}
    made = perform(sparsify, at_rest(task, folder), task, folder / "sparse", **asked)
    return torchfile.open_model(made, task)[0], dict(made.steps[-1]["facts"]), made


class Recurrent(nn.Module):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(4, 6, batch_first=True, **given)
        self.head = nn.Linear(2 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn": (lambda: small_cnn(4), IMAGE),
    "lstm": (lambda: Recurrent(num_layers=2, bidirectional=True), (5, 4)),
    "attention": (Attentive, (5, 8)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_group_penalty_is_the_slow_sum_over_units(name: str, frozen: bool) -> None:
    build, shape = MODELS[name]
    task = task_of(build(), shape)
    sound = Sound(task.model().eval(), task, "heads")
    assert sound.groups
    model = sound.model.double()
    if frozen:
        part = sound.groups[0].strands[0][0][0].parameter
        model.get_parameter(part).requires_grad_(False)
    named = dict(model.named_parameters())
    wanted = torch.zeros((), dtype=torch.float64)
    for group in sound.groups:
        for unit in (unit for strand in group.strands for unit in strand):
            parts = [
                named[each.parameter].select(each.dim, at).flatten()
                for each in unit
                if each.parameter in named and named[each.parameter].requires_grad
                for at in each.at
            ]
            if parts:
                elements = torch.cat(parts)
                wanted = wanted + len(elements) ** 0.5 * elements.norm()
    units = units_of(model, sound.groups)
    found = units.penalty()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    assert sum(units.shares(units.norms().detach()).values()) == pytest.approx(1, rel=1e-5)
    trained = [parameter for parameter in named.values() if parameter.requires_grad]
    slow = torch.autograd.grad(wanted, trained, allow_unused=True, materialize_grads=True)
    fast = torch.autograd.grad(found, trained, allow_unused=True, materialize_grads=True)
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_bn_penalty_is_the_sum_of_absolute_scales() -> None:
    model = small_cnn(4)
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(torch.tensor([1.0, -2.0, 0.0, 0.5]))
        model.get_parameter("4.weight").fill_(-0.25)
    units = scales_of(model)
    assert units.layers == (("1", 4), ("4", 8))
    assert units.penalty().item() == 5.5
    units.penalty().backward()  # type: ignore[no-untyped-call]
    gradient = model.get_parameter("1.weight").grad
    assert gradient is not None
    assert gradient.tolist() == [1, -1, 0, 1]
    model.get_parameter("1.weight").requires_grad_(False)
    assert scales_of(model).layers == (("4", 8),)


def test_units_that_are_zero_have_no_gradient_and_are_counted() -> None:
    task = images()
    model = task.model()
    sound = Sound(model, task, "heads")
    units = units_of(model, sound.groups)
    with torch.no_grad():
        before = units.norms()
        for each in sound.groups[0].strands[0][2]:
            if each.parameter in dict(model.named_parameters()):
                model.get_parameter(each.parameter).index_fill_(each.dim, torch.tensor(each.at), 0)
        after = units.norms()
    assert [int((norms < 1e-12).sum()) for norms in (before, after)] == [0, 1]
    assert [units.small(norms, before) for norms in (before, after)] == [0, 1]
    assert units.small(before * SMALL * 0.5, before) > 6
    units.penalty().backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize("penalty", ["bn", "group"])
def test_more_strength_leaves_less_and_the_last_epoch_stays(tmp_path: Path, penalty: Any) -> None:
    task = images()
    after = []
    for strength in (1e-6, 0.3):
        model, facts, made = sparse(task, tmp_path, penalty=penalty, strength=strength, epochs=3)
        units = (
            scales_of(model) if penalty == "bn" else units_of(model, Sound(model, task, "x").groups)
        )
        now = strength * units.penalty().item()
        assert facts["penalty"][1] == pytest.approx(now, rel=1e-5)
        assert facts["units"] == len(units.scale)
        assert task.splits is not None
        on_validate = evaluate(model, task.splits.validate, METRICS[task.kind][task.metric])
        assert facts["history"][-1]["accuracy"] == on_validate
        assert [epoch["epoch"] for epoch in facts["history"]] == [1, 2, 3]
        for when in (0, 1):
            assert sum(pair[when] for pair in facts["shares"].values()) == pytest.approx(1)
        assert set(facts["shares"]) == ({"1", "4"} if penalty == "bn" else {"0", "3"})
        assert made.steps[-1]["settings"] == {
            "penalty": penalty,
            "strength": strength,
            **Training(epochs=3, batch_size=16).to_json(),
        }
        after.append(facts["penalty"][1] / strength)
    assert after[1] < after[0]


@pytest.mark.parametrize("penalty", ["bn", "group"])
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, penalty: Any) -> None:
    task = images()
    source = at_rest(task, tmp_path)
    one = perform(
        sparsify, source, task, tmp_path / "one", penalty=penalty, epochs=1
    ).path.read_bytes()
    torch.rand(3)
    two = perform(
        sparsify, source, task, tmp_path / "two", penalty=penalty, epochs=1
    ).path.read_bytes()
    assert one == two
    assert source.checked() is source


def test_attention_is_rewritten_and_can_be_cut_after(tmp_path: Path) -> None:
    x = RNG.standard_normal((60, 5, 8)).astype(np.float32)
    task = task_of(Attentive(), (5, 8), splits=splits_of(x, Y % 3))
    _, facts, made = sparse(task, tmp_path)
    assert [edit["as"] for edit in torchfile.open_model(made, task)[1]] == ["attention"]
    assert set(facts["shares"]) == {"layer.self_attn", "layer.linear1"}
    cut = prune(made, task, tmp_path / "cut", ratio=0.5)
    assert cut.steps[-1]["facts"]["reached"] > 0


def test_a_mask_before_it_stays(tmp_path: Path) -> None:
    task = images()
    masked = mask(at_rest(task, tmp_path), task, tmp_path / "masked", sparsity=0.5)
    made = perform(sparsify, masked, task, tmp_path / "sparse", epochs=2, strength=1e-2)
    before = torchfile.open_model(masked, task)[0].state_dict()
    for name, tensor in torchfile.open_model(made, task)[0].state_dict().items():
        if tensor.ndim > 1:
            assert not torch.equal(tensor, before[name])
            assert (tensor[before[name] == 0] == 0).all()


def test_nothing_to_do(tmp_path: Path) -> None:
    with pytest.raises(Unsuitable, match="no data to train on: add --data SPEC"):
        sparse(images(splits=None), tmp_path)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(Unsuitable, match="no BatchNorm with scales to train"):
        sparse(images(plain), tmp_path, penalty="bn")
    with pytest.raises(Unsuitable, match="no units that can be cut and trained"):
        sparse(images(plain), tmp_path)
    frozen = small_cnn(4).requires_grad_(False)
    for penalty in ("bn", "group"):
        with pytest.raises(Unsuitable, match="train"):
            sparse(images(frozen), tmp_path, penalty=penalty)


def test_a_cut_after_it_costs_less(tmp_path: Path) -> None:
    """On the digits, right after a cut of half of all channels, against as much plain recovery.

    Three seeds gave 0.94, 0.96 and 0.89 after this training, 0.74, 0.53 and 0.30 after recovery.
    """
    splits = data.read("digits", 0).splits
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    shared: dict[str, Any] = {"epochs": 14, "learning_rate": 1e-2}
    fit(
        net,
        splits,
        from_labels("classification"),
        Training(**{**shared, "epochs": 6}),
        metric=("accuracy", METRICS["classification"]["accuracy"]),
        seed=1,
    )
    task = task_of(net, IMAGE, splits=splits)
    source = at_rest(task, tmp_path)

    def accuracy(made: Artifact) -> float:
        model, _ = torchfile.open_model(made, task)
        return evaluate(model, splits.test, METRICS[task.kind][task.metric])

    def after_cut(made: Artifact) -> float:
        return accuracy(prune(made, task, tmp_path / "cut", ratio=0.5, ranking="global"))

    recovered = perform(distill, source, task, tmp_path / "recovered", **shared)
    made = perform(sparsify, source, task, tmp_path / "sparse", strength=5e-3, **shared)
    assert accuracy(made) > accuracy(recovered) - 0.05
    assert after_cut(made) > after_cut(recovered) + 0.1
