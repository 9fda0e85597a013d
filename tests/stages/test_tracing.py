"""Where channels go: units of models made by hand, and of random ones, are exactly these."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, masked, same
from hypothesis import given, settings
from hypothesis import strategies as st
from standing import at_rest, settled, task_of
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name that the field uses)

from compressor import StageError, Unsuitable
from compressor.loading import torchfile
from compressor.loading.edits import apply
from compressor.stages import prune
from compressor.stages.prune.cutting import edits_of
from compressor.stages.prune.group import Cut, Group
from compressor.stages.prune.groups import OUTPUT, TIED, UNREAD, groups_of
from compressor.stages.prune.tracing import traced

Places = dict[tuple[str, int], tuple[int, ...]]


class Model(nn.Module):
    """Layers by name and a forward that reads them."""

    def __init__(self, forward: Any, **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def found(model: nn.Module, *shape: int) -> tuple[list[Group], dict[str, str]]:
    return groups_of(model.eval(), task_of(model, shape).examples(2))


def units(model: nn.Module, *shape: int) -> dict[str, list[Places]]:
    """By root the units of its (only) strand: positions by tensor and axis."""
    groups, _ = found(model, *shape)
    assert all(len(group.strands) == 1 for group in groups)
    return {
        group.root: [
            {(part.parameter, part.dim): part.at for part in unit} for unit in group.strands[0]
        ]
        for group in groups
    }


def row(name: str, *at: int) -> Places:
    """These output channels of a layer with a bias."""
    return {(f"{name}.weight", 0): at, (f"{name}.bias", 0): at}


def column(name: str, *at: int) -> Places:
    """These input channels of a layer."""
    return {(f"{name}.weight", 1): at}


def test_a_chain() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert units(model, 4) == {"0": [row("0", k) | column("2", k) for k in range(3)]}


def test_concatenation_shifts_positions() -> None:
    model = Model(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)),
        a=nn.Linear(4, 3),
        b=nn.Linear(4, 2),
        c=nn.Linear(5, 2),
    )
    assert units(model, 4) == {
        "a": [row("a", k) | column("c", k) for k in range(3)],
        "b": [row("b", k) | column("c", 3 + k) for k in range(2)],
    }


def test_concatenation_with_itself() -> None:
    model = Model(
        lambda m, x: m.c(torch.cat([m.a(x), m.a(x).relu()], 1)),
        a=nn.Linear(4, 3),
        c=nn.Linear(6, 2),
    )
    assert units(model, 4) == {"a": [row("a", k) | column("c", k, 3 + k) for k in range(3)]}


def test_halves_that_gate_each_other_go_in_pairs() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        a, b = m.a(x).chunk(2, 1)
        return m.c(a * b.sigmoid())

    model = Model(forward, a=nn.Linear(4, 6), c=nn.Linear(3, 2))
    assert units(model, 4) == {"a": [row("a", k, 3 + k) | column("c", k) for k in range(3)]}
    model = Model(lambda m, x: m.c(F.glu(m.a(x), 1)), a=nn.Linear(4, 6), c=nn.Linear(3, 2))
    assert units(model, 4) == {"a": [row("a", k, 3 + k) | column("c", k) for k in range(3)]}


def test_halves_that_are_read_apart_are_units_apart() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        a, b = m.a(x).chunk(2, 1)
        return m.p(a) + m.q(b)

    groups, _ = found(Model(forward, a=nn.Linear(4, 6), p=nn.Linear(3, 2), q=nn.Linear(3, 2)), 4)
    assert [group.root for group in groups] == ["a", "a"]
    halves = [
        [{(part.parameter, part.dim): part.at for part in unit} for unit in group.strands[0]]
        for group in groups
    ]
    assert halves == [
        [row("a", k) | column("p", k) for k in range(3)],
        [row("a", 3 + k) | column("q", k) for k in range(3)],
    ]


def test_a_flattened_channel_has_a_stretch_of_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    assert units(model, 1, 2, 2) == {
        "0": [row("0", k) | column("2", *range(4 * k, 4 * k + 4)) for k in range(3)]
    }
    last = Model(
        lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1).flatten(1)),
        a=nn.Conv2d(1, 3, 1),
        b=nn.Linear(12, 2),
    )
    assert units(last, 1, 2, 2) == {
        "a": [row("a", k) | column("b", k, 3 + k, 6 + k, 9 + k) for k in range(3)]
    }


def test_a_channel_shuffle_is_followed() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        b, _, h, w = y.shape
        return m.b(y.view(b, 2, -1, h, w).transpose(1, 2).reshape(b, -1, h, w))

    model = Model(forward, a=nn.Conv2d(1, 6, 1), b=nn.Conv2d(6, 2, 1))
    # 0 1 2 | 3 4 5 becomes 0 3 | 1 4 | 2 5
    to = [0, 2, 4, 1, 3, 5]
    assert units(model, 1, 2, 2) == {"a": [row("a", k) | column("b", to[k]) for k in range(6)]}


def test_pixel_shuffle_takes_four_channels_for_one() -> None:
    model = nn.Sequential(nn.Conv2d(1, 12, 1), nn.PixelShuffle(2), nn.Conv2d(3, 2, 1))
    assert units(model, 1, 2, 2) == {
        "0": [row("0", *range(4 * k, 4 * k + 4)) | column("2", k) for k in range(3)]
    }


def test_what_is_added_is_coupled() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        return m.c(x + m.b(x.relu()))

    model = Model(forward, a=nn.Linear(4, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 2))
    assert units(model, 4) == {
        "a": [row("a", k) | row("b", k) | column("b", k) | column("c", k) for k in range(3)]
    }


def test_groups_of_a_convolution_lose_the_same_positions() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    assert units(model, 1, 2, 2) == {
        "0": [row("0", k, 2 + k) | column("2", k) for k in range(2)],
        "2": [row("2", k, 4 + k) | column("4", k, 4 + k) for k in range(4)],
    }


def test_a_depthwise_convolution_follows_its_input() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Conv2d(6, 2, 1)
    )
    assert units(model, 1, 2, 2) == {
        "0": [
            row("0", k) | row("1", 2 * k, 2 * k + 1) | column("2", 2 * k, 2 * k + 1)
            for k in range(3)
        ]
    }


def test_a_transposed_convolution_has_its_axes_the_other_way() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 2, 1))
    assert units(model, 1, 2, 2) == {
        "0": [row("0", k) | {("1.weight", 0): (k,)} for k in range(3)],
        "1": [{("1.weight", 1): (k,), ("1.bias", 0): (k,)} | column("2", k) for k in range(4)],
    }


def test_a_batch_norm_goes_along_with_its_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    norm = ("weight", "bias", "running_mean", "running_var")
    assert units(model, 1, 2, 2) == {
        "0": [
            row("0", k) | {(f"1.{name}", 0): (k,) for name in norm} | column("2", k)
            for k in range(3)
        ]
    }


def test_a_layer_that_is_called_twice_is_coupled_to_itself() -> None:
    model = Model(
        lambda m, x: m.last(m.shared(m.shared(m.stem(x)).relu())),
        stem=nn.Linear(4, 3),
        shared=nn.Linear(3, 3),
        last=nn.Linear(3, 2),
    )
    assert units(model, 4) == {
        "stem": [
            row("stem", k) | row("shared", k) | column("shared", k) | column("last", k)
            for k in range(3)
        ]
    }


def test_tied_layers_are_left_alone() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    groups, left = found(nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), nn.Linear(4, 2)), 4)
    assert not groups
    assert left == {"0": TIED, "2": TIED, "4": OUTPUT}


def test_a_scale_for_every_channel_follows() -> None:
    model = Model(
        lambda m, x: m.b(m.gamma * m.a(x)),
        a=nn.Conv2d(1, 3, 1),
        gamma=nn.Parameter(torch.randn(3, 1, 1)),
        b=nn.Conv2d(3, 2, 1),
    )
    assert units(model, 1, 2, 2) == {
        "a": [row("a", k) | {("gamma", 0): (k,)} | column("b", k) for k in range(3)]
    }


def test_a_bias_for_every_pixel_does_not_follow() -> None:
    model = Model(
        lambda m, x: m.b(m.bias + m.a(x)),
        a=nn.Conv2d(1, 3, 1),
        bias=nn.Parameter(torch.randn(1, 1, 3, 3)),
        b=nn.Conv2d(3, 2, 1),
    )
    assert units(model, 1, 3, 3) == {"a": [row("a", k) | column("b", k) for k in range(3)]}


def test_a_position_embedding_follows_along_its_channels() -> None:
    model = Model(
        lambda m, x: m.b(m.position + m.a(x)),
        a=nn.Linear(4, 3),
        position=nn.Parameter(torch.randn(1, 5, 3)),
        b=nn.Linear(3, 2),
    )
    assert units(model, 5, 4) == {
        "a": [row("a", k) | {("position", 2): (k,)} | column("b", k) for k in range(3)]
    }


def test_an_output_that_is_also_a_feature_stays_whole() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        features = m.b(m.a(x).relu())
        return {"logits": m.c(features.relu()), "features": [features]}

    model = Model(forward, a=nn.Linear(4, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 2))
    groups, left = found(model, 4)
    assert [group.root for group in groups] == ["a"]
    assert left == {"b": OUTPUT, "c": OUTPUT}


@pytest.mark.parametrize(
    "mixing",
    [
        nn.Softmax(1),
        nn.LayerNorm(6),
        nn.RMSNorm(6),
        nn.GroupNorm(1, 6),
        nn.GLU(1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_channels_that_meet_are_not_cut_apart(mixing: nn.Module) -> None:
    """Whatever is left to be cut, the dense model with it zeroed is the cut model."""
    torch.manual_seed(0)
    width = 3 if isinstance(mixing, nn.GLU) else 6
    model = nn.Sequential(nn.Linear(4, 6), mixing, nn.Linear(width, 2)).eval()
    groups, left = found(model, 4)
    if isinstance(mixing, nn.GLU):
        assert [len(unit) for group in groups for unit in group.strands[0]] == [3, 3, 3]
    else:
        assert not groups
        assert set(left) == {"0", "2"}


def test_a_dye_that_the_model_washes_out_is_no_way() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    washed = Model(lambda m, x: m.b(torch.nan_to_num(m.a(x))), a=model[0], b=model[2])
    groups, left = found(washed, 4)
    assert not groups
    assert left == {"a": UNREAD, "b": OUTPUT}


# --- the model


@pytest.mark.parametrize("name", ["cnn", "lstm, both ways", "bert", "layer scale", "tied"])
def test_the_dense_model_is_as_it_was(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    before = torchfile.state_digest(model.state_dict())
    random = torch.random.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    kept = [(name, each.requires_grad, id(each)) for name, each in model.named_parameters()]
    traced(model, tuple(x.synthetic(2, 0) for x in family.inputs))
    assert torchfile.state_digest(model.state_dict()) == before
    assert [(name, each.requires_grad, id(each)) for name, each in model.named_parameters()] == kept
    assert all(each.grad is None for each in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_twice_finds_the_same() -> None:
    model = FAMILIES["channel shuffle"].build()
    assert found(model, 3, 8, 8) == found(model, 3, 8, 8)


def test_a_model_that_does_not_run_with_nan_is_one_line() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        if x.isnan().any():
            raise ValueError("no NaN\nhere")
        return m.b(x)

    model = Model(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    with pytest.raises(StageError) as caught:
        found(model, 4)
    assert "channels cannot be followed" in str(caught.value)
    assert str(caught.value).endswith("(ValueError: no NaN here)")
    assert not isinstance(caught.value, Unsuitable)


class Standardised(nn.Conv2d):
    """Weights of mean 0 and deviation 1 over what they read (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Any:
        axes = (1, 2, 3)
        w = self.weight - self.weight.mean(axes, keepdim=True)
        return self._conv_forward(x, w / w.std(axes, keepdim=True), self.bias)


class UnitLength(nn.Conv2d):
    """Weights of length 1. A weight of zeros does not change a length: the proof is fooled."""

    def forward(self, x: Tensor) -> Any:
        return self._conv_forward(x, F.normalize(self.weight.flatten(1)).view_as(self.weight), None)


class ByColumn(nn.Conv2d):
    """Weights of length 1 over the outputs: those of a cut output are missing from it."""

    def forward(self, x: Tensor) -> Any:
        return self._conv_forward(x, F.normalize(self.weight, dim=0), None)


@pytest.mark.parametrize("kind", [Standardised, UnitLength, ByColumn])
def test_a_convolution_that_rescales_its_weights_is_not_cut_there(
    kind: type[nn.Conv2d], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.ReLU(),
        kind(16, 16, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    task = task_of(model, (1, 8, 8))
    made = prune(at_rest(task, tmp_path), task, tmp_path / "pruned", ratio=0.5)
    pruned, edits = torchfile.open_model(made, task)
    assert not any(
        edit["edit"] == "keep" and (edit["parameter"], edit["dim"]) == ("2.weight", 1)
        for edit in edits
    )
    # Not the weights but the channels are zeroed here.
    wanted = copy.deepcopy(model)
    for edit in edits:
        if edit["edit"] == "keep" and edit["dim"] == 0:
            mask = torch.zeros(1, 16, 1, 1).index_fill_(1, torch.tensor(edit["indices"]), 1)
            layer = wanted.get_submodule(edit["parameter"].removesuffix(".weight"))
            layer.register_forward_hook(lambda *given, mask=mask: given[-1] * mask)
    same(wanted, pruned, task)


# --- random models


class Random(nn.Module):
    """A stem, blocks and a head, as drawn; images of one channel."""

    def __init__(self, stem: int, blocks: list[tuple[str, int]], flat: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, stem, 3, padding=1)
        self.kinds = [kind for kind, _ in blocks]
        self.blocks = nn.ModuleList()
        width = stem
        for kind, size in blocks:
            made, width = self.block(kind, width, size)
            self.blocks.append(made)
        self.flat = flat
        self.hidden = nn.Linear(width * (9 if flat else 1), 5)
        self.head = nn.Linear(5, 3)

    @staticmethod
    def block(kind: str, width: int, size: int) -> tuple[nn.Module, int]:
        conv = nn.Conv2d(width, size, 3, padding=1)
        back = nn.Conv2d(size, width, 1, bias=False)
        made: dict[str, tuple[list[nn.Module], int]] = {
            "plain": ([conv, nn.ReLU()], size),
            "norm": ([nn.BatchNorm2d(width), nn.ReLU()], width),
            "residual": ([conv, nn.BatchNorm2d(size), nn.ReLU(), back], width),
            "dense": ([conv, nn.ReLU()], width + size),
            "depthwise": ([nn.Conv2d(width, 2 * width, 3, padding=1, groups=width)], 2 * width),
            "gate": ([conv, nn.ReLU(), back, nn.Sigmoid()], width),
        }
        layers, after = made[kind]
        return nn.Sequential(*layers), after

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu()
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            y = block(x)
            if kind == "residual":
                y = x + y
            elif kind == "dense":
                y = torch.cat([x, y], 1)
            elif kind == "gate":
                y = x * y
            x = y
        x = x.flatten(1) if self.flat else x.mean((2, 3))
        return self.head(self.hidden(x).relu())


KINDS = ("plain", "norm", "residual", "dense", "depthwise", "gate")


@settings(max_examples=40)
@given(
    stem=st.integers(1, 6),
    blocks=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 6)), max_size=4),
    flat=st.booleans(),
    data=st.data(),
)
def test_random_models_are_cut_right_wherever_they_are_cut(
    stem: int, blocks: list[tuple[str, int]], flat: bool, data: st.DataObject
) -> None:
    torch.manual_seed(0)
    model = settled(Random(stem, blocks, flat), torch.randn(4, 1, 3, 3))
    task = task_of(model, (1, 3, 3))
    groups, left = groups_of(model, task.examples(2))

    # No position of a tensor's axis is in two units, and of a layer that is cut all are in one.
    seen: dict[tuple[str, int], list[int]] = defaultdict(list)
    for group in groups:
        assert all(len(strand) == group.width for strand in group.strands)
        assert group.width > 1
        for strand in group.strands:
            for unit in strand:
                for part in unit:
                    seen[part.parameter, part.dim] += part.at
    for place, positions in seen.items():
        assert len(set(positions)) == len(positions), place
    for group in groups:
        whole = range(len(model.get_submodule(group.root).get_parameter("weight")))
        assert sorted(seen[f"{group.root}.weight", 0]) == list(whole)
        assert group.root not in left

    cuts = []
    for group in groups:
        gone = data.draw(st.sets(st.integers(0, group.width - 1), max_size=group.width - 1))
        if gone:
            cuts.append(Cut(group, (tuple(sorted(gone)),)))
    edits = edits_of(model, cuts)
    same(masked(model, edits), apply(copy.deepcopy(model), edits), task)
