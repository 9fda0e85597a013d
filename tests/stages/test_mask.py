"""Masks: exact zeros, in the right places, that survive training and change nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from standing import at_rest, small_cnn, splits_of, task_of
from torch import nn

from compressor import Artifact, InputError, Task, Unsuitable, session
from compressor.loading import torchfile
from compressor.stages import export, prune
from compressor.stages.mask import NOTE, Weight, fraction, held, mask, weights
from compressor.training.recovery import aimed, recover
from compressor.training.settings import Training

IMAGE = (1, 8, 8)


def masked(task: Task, folder: Path, **given: Any) -> tuple[nn.Module, dict[str, Any], Artifact]:
    """The masked model, the facts, and the artifact."""
    made = mask(at_rest(task, folder), task, folder / "masked", **given)
    model, _ = torchfile.open_model(made, task)
    return model, dict(made.steps[-1]["facts"]), made


def linear(rows: list[list[float]]) -> Task:
    """A task around one linear layer, with a bias of small values."""
    layer = nn.Linear(len(rows[0]), len(rows))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
        layer.bias.fill_(1e-6)
    return task_of(nn.Sequential(layer), (len(rows[0]),))


def test_the_least_of_a_layer_go(tmp_path: Path) -> None:
    task = linear([[1.0, -2.0, 3.0, 0.5], [-0.25, 4.0, -5.0, 0.75]])
    model, facts, made = masked(task, tmp_path, sparsity=0.5)
    wanted = torch.tensor([[0.0, -2.0, 3.0, 0.0], [0.0, 4.0, -5.0, 0.0]])
    assert torch.equal(model.get_parameter("0.weight"), wanted)
    assert (model.get_parameter("0.bias") == 1e-6).all()
    assert facts == {
        "note": NOTE,
        "zeros": 4,
        "weights": 8,
        "reached": 0.5,
        "layers": {"0.weight": {"zeros": 4, "weights": 8, "sparsity": 0.5}},
        "left_alone": {},
    }
    assert made.steps[-1]["settings"] == {
        "sparsity": 0.5,
        "pattern": "unstructured",
        "scope": "layer",
    }


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("2:4", [[0, 0, 3, -4, 8, -7, 0, 0]]),
        ("1:4", [[0, 0, 0, -4, 8, 0, 0, 0]]),
        ("4:8", [[0, 0, 0, 0, 8, -7, 6, 5]]),
    ],
)
def test_the_largest_of_every_few_inputs_stay(
    tmp_path: Path, pattern: Any, wanted: list[list[float]]
) -> None:
    task = linear([[1.0, 2, 3, -4, 8, -7, 6, 5]])
    model, facts, _ = masked(task, tmp_path, pattern=pattern)
    assert torch.equal(model.get_parameter("0.weight"), torch.tensor(wanted, dtype=torch.float32))
    assert facts["reached"] == fraction(sparsity=None, pattern=pattern, scope="layer")


def test_equal_magnitudes_the_first_stays(tmp_path: Path) -> None:
    task = linear([[1.0, -1.0, 1.0, 1.0]])
    for asked in ({"sparsity": 0.5}, {"pattern": "2:4"}):
        model, _, _ = masked(task, tmp_path, **asked)
        assert model.get_parameter("0.weight").tolist() == [[1, -1, 0, 0]]


def test_global_is_one_threshold(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        # Between -0.5 and 0.5 they were: all are larger now than those of the first layer.
        net.get_parameter("2.weight").add_(50)
    task = task_of(net, (4,))
    _, facts, _ = masked(task, tmp_path, sparsity=0.5, scope="global")
    assert [each["zeros"] for each in facts["layers"].values()] == [16, 0]
    _, facts, _ = masked(task, tmp_path, sparsity=0.5)
    assert [each["zeros"] for each in facts["layers"].values()] == [8, 8]


class Mixed(nn.Module):
    """Every kind of layer that is masked, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 8)
        self.up = nn.ConvTranspose2d(8, 4, 3, groups=2)
        self.conv = nn.Conv2d(8, 8, 3, groups=2)
        self.depth = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.lstm = nn.LSTM(8, 12, num_layers=2, bidirectional=True, proj_size=4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.again = nn.Linear(8, 8)
        self.shared = nn.Linear(8, 8)
        self.shared.weight = self.again.weight
        self.tied = nn.Linear(8, 5)
        self.tied.weight = self.table.weight
        self.odd = nn.Linear(6, 8)
        self.made = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(x)  # type: ignore[no-any-return]


LEFT = {
    "tied.weight": "it is shared with a layer of another kind",
    "made.weight": "it is computed from other parameters",
}


def test_which_weights(tmp_path: Path) -> None:
    task = task_of(Mixed(), (8,))
    before = dict(task.model().state_dict())
    model, facts, _ = masked(task, tmp_path, sparsity=0.75)
    assert facts["left_alone"] == LEFT
    ends = [f"l{layer}{side}" for layer in range(2) for side in ("", "_reverse")]
    assert set(facts["layers"]) == {
        *(f"{layer}.weight" for layer in ("up", "conv", "depth", "again", "odd")),
        *(f"lstm.weight_{kind}_{end}" for kind in ("ih", "hh", "hr") for end in ends),
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    for name, tensor in model.state_dict().items():
        name = "again.weight" if name == "shared.weight" else name
        if name in facts["layers"]:
            zeros, size = int((tensor == 0).sum()), tensor.numel()
            wanted = {"zeros": zeros, "weights": size, "sparsity": zeros / size}
            assert facts["layers"][name] == wanted
            assert zeros == round(0.75 * size)
        else:
            assert torch.equal(tensor, before[name])


def test_what_is_no_multiple_stays_dense_and_is_named(tmp_path: Path) -> None:
    task = task_of(Mixed(), (8,))
    _, facts, _ = masked(task, tmp_path, pattern="2:4")
    assert facts["left_alone"] == LEFT | {
        "depth.weight": "its 1 inputs are no multiple of 4",
        "odd.weight": "its 6 inputs are no multiple of 4",
    }
    for name, each in facts["layers"].items():
        assert each["sparsity"] == (0 if name in facts["left_alone"] else 0.5), name
    _, facts, _ = masked(task, tmp_path, pattern="4:8")
    assert "conv.weight" in facts["left_alone"]  # 4 inputs in each of its groups


def tensors(model: nn.Module) -> dict[str, Weight]:
    return weights(model)[0]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    sparsity=st.integers(5, 95).map(lambda part: part / 100),
    scope=st.sampled_from(["layer", "global"]),
)
def test_any_sparsity_is_reached_exactly(
    tmp_path_factory: pytest.TempPathFactory, seed: int, sparsity: float, scope: Any
) -> None:
    torch.manual_seed(seed)
    task = task_of(nn.Sequential(nn.Conv1d(3, 5, 3), nn.ReLU(), nn.Conv1d(5, 7, 1)), (3, 9))
    dense = tensors(task.model())
    model, facts, _ = masked(task, tmp_path_factory.mktemp("m"), sparsity=sparsity, scope=scope)
    parts = [tuple(dense)] if scope == "global" else [(name,) for name in dense]
    for part in parts:
        was = torch.cat([dense[name].parameter.detach().flatten() for name in part])
        now = torch.cat([tensors(model)[name].parameter.detach().flatten() for name in part])
        gone = now == 0
        assert int(gone.sum()) == round(sparsity * len(was))
        assert torch.equal(now[~gone], was[~gone])
        if gone.any():
            assert was[gone].abs().max() <= was[~gone].abs().min()
    assert facts["zeros"] == sum(each["zeros"] for each in facts["layers"].values())


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), pattern=st.sampled_from(["2:4", "1:4", "4:8"]))
def test_any_pattern_holds_along_the_inputs(
    tmp_path_factory: pytest.TempPathFactory, seed: int, pattern: Any
) -> None:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(16, 16, 3, groups=2), nn.ConvTranspose2d(16, 3, 2))
    task = task_of(layers, (16, 5, 5))
    dense = tensors(task.model())
    model, _, _ = masked(task, tmp_path_factory.mktemp("m"), pattern=pattern)
    n, m = map(int, pattern.split(":"))
    for name, (parameter, axis) in tensors(model).items():
        pairs = zip(
            dense[name].parameter.detach().movedim(axis, -1).reshape(-1, m),
            parameter.detach().movedim(axis, -1).reshape(-1, m),
            strict=True,
        )
        for was, now in pairs:
            largest = sorted(was.abs().tolist(), reverse=True)[:n]
            assert sorted(now[now != 0].abs().tolist(), reverse=True) == largest
            assert torch.equal(now[now != 0], was[now != 0])


@pytest.mark.parametrize("given", [{"sparsity": 0.6}, {"pattern": "2:4"}])
def test_the_file_is_as_large_and_loads_bit_for_bit(tmp_path: Path, given: dict[str, Any]) -> None:
    task = task_of(small_cnn(), IMAGE)
    source = at_rest(task, tmp_path)
    cut = prune(source, task, tmp_path / "cut", ratio=0.5)
    for start in (source, cut):
        made = mask(start, task, tmp_path / "masked", **given)
        again = mask(start, task, tmp_path / "again", **given)
        assert made.size_bytes == start.size_bytes
        assert made.path.read_bytes() == again.path.read_bytes()
        assert start.checked() is start
        model, edits = torchfile.open_model(made, task)
        assert edits == torchfile.open_model(start, task)[1]
        before = torchfile.open_model(start, task)[0].state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name].where(tensor != 0, tensor))


def test_it_exports(tmp_path: Path) -> None:
    task = task_of(small_cnn(), IMAGE)
    model, _, made = masked(task, tmp_path, sparsity=0.8)
    (x,) = task.examples(7)
    with torch.inference_mode():
        wanted = model(torch.from_numpy(x)).numpy()
    sparse = export(made, task, tmp_path / "sparse")
    np.testing.assert_allclose(session(sparse.path)(x), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "mask needs the fraction of zeros"),
        ({"pattern": "2:4", "sparsity": 0.5}, "sparsity = 0.5: pattern 2:4 decides it (0.5)"),
        ({"pattern": "1:4", "scope": "global"}, "scope = 'global': pattern 1:4 is the same"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        masked(linear([[1.0, 2.0, 3.0, 4.0]]), tmp_path, **given)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "masked.safetensors").exists()


def test_nothing_to_mask(tmp_path: Path) -> None:
    task = linear([[1.0, 2.0, 3.0]])
    with pytest.raises(Unsuitable, match="its 3 inputs are no multiple of 4"):
        masked(task, tmp_path, pattern="2:4")
    with pytest.raises(Unsuitable, match="no weight becomes zero"):
        masked(task, tmp_path, sparsity=0.1)
    with pytest.raises(Unsuitable, match="no weight becomes zero"):
        masked(task_of(nn.Sequential(nn.BatchNorm1d(4)), (4,)), tmp_path, sparsity=0.5)


@pytest.mark.parametrize("given", [{"sparsity": 0.7}, {"pattern": "2:4"}])
def test_training_keeps_the_zeros_that_are_held(tmp_path: Path, given: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, *IMAGE)).astype(np.float32)
    task = task_of(small_cnn(4), IMAGE, splits=splits_of(x, rng.integers(0, 5, 60)))
    start = task.model()
    start.get_submodule("3").requires_grad_(False)
    task = task_of(start, IMAGE, splits=task.splits)
    model, _, made = masked(task, tmp_path, **given)
    before = copy.deepcopy(tensors(model))
    with held(model, made):
        how = Training(epochs=3, learning_rate=3e-2)
        fitted = recover(model, task, how, aimed(task, "labels"))
    assert len(fitted.history) == 3
    for name, (parameter, _) in tensors(model).items():
        gone = before[name].parameter == 0
        assert torch.equal(parameter[gone], torch.zeros_like(parameter[gone]))
        assert parameter._backward_hooks is None or not parameter._backward_hooks
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):  # whatever fit would have kept: these steps are taken
        with held(model, made):
            optimiser.zero_grad()
            model(torch.from_numpy(x)).square().mean().backward()
        optimiser.step()
    moved = {
        name: not torch.equal(parameter, before[name].parameter)
        for name, (parameter, _) in tensors(model).items()
    }
    assert moved == {"0.weight": True, "3.weight": False, "8.weight": True}
    for name, (parameter, _) in tensors(model).items():
        assert (parameter[before[name].parameter == 0] == 0).all()


def test_what_was_never_masked_is_not_held(tmp_path: Path) -> None:
    task = linear([[0.0, 2.0, 3.0, 4.0]])
    model = task.model()
    with held(model, at_rest(task, tmp_path)):
        model(torch.ones(1, 4)).sum().backward()
    gradient = model.get_parameter("0.weight").grad
    assert gradient is not None
    assert (gradient == 1).all()
