"""Pruning: what is cut is proven right, what cannot be is left alone and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import exact, masked, same, task_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standing import at_rest, settled, small_cnn, splits_of, task_of
from torch import Tensor, nn

from compressor import Artifact, InputError, StageError, Task, Unsuitable, zoo
from compressor.loading import torchfile
from compressor.stages import prune
from compressor.stages.prune.criteria import CRITERIA
from compressor.stages.prune.cutting import edits_of
from compressor.stages.prune.group import Cut, Group, Slice
from compressor.stages.prune.groups import groups_of
from compressor.stages.prune.proof import disproof, shaken
from compressor.stages.prune.ranking import RANKINGS, least
from compressor.stages.prune.rounding import kept
from compressor.stages.prune.sound import Sound

IMAGE = (1, 8, 8)


def pruned(task: Task, folder: Path, **given: Any) -> tuple[nn.Module, dict[str, Any], Artifact]:
    """The pruned model, the facts, and the artifact."""
    made = prune(at_rest(task, folder), task, folder / "pruned", **{"ratio": 0.5, **given})
    model, _ = torchfile.open_model(made, task)
    return model, dict(made.steps[-1]["facts"]), made


def check(task: Task, model: nn.Module, made: Artifact) -> None:
    """The law: the cut model is the masked dense one, at any batch, with all its outputs."""
    _, edits = torchfile.open_model(made, task)
    same(masked(task.model(), edits), model, task)
    for ours, theirs in zip(exact(model, task, 7), exact(task.model(), task, 7), strict=True):
        assert ours.shape == theirs.shape


# --- how many stay


@pytest.mark.parametrize(
    ("width", "ratio", "count"),
    [
        (64, 0.5, 32),
        (32, 0.5, 16),
        (24, 0.5, 12),  # 16 moves by 1/6, 8 too; 12 is a multiple of 4
        (10, 0.5, 4),  # 4 moves by exactly 0.1
        (40, 0.5, 16),  # 16 moves by exactly 0.1
        (16, 0.1, 16),  # 14 or 15 wanted: 16 moves by 0.1, so nothing is cut
        (96, 0.5, 48),
        (100, 0.37, 64),
        (10, 0.1, 8),  # 9 wanted: 16 are not there, 8 moves by 0.1
        (3, 0.5, 2),
        (2, 0.5, 1),
        (1, 0.9, 1),
        (1, 0.0, 1),
        (10, 0.99, 1),
        (48, 0.25, 32),  # 36 wanted: 32 moves by 0.083
        (20, 0.3, 16),  # 14 wanted: 16 moves by exactly 0.1
        (160, 0.5, 80),
        (64, 0.25, 48),
    ],
)  # fmt: skip
def test_channels_that_stay(width: int, ratio: float, count: int) -> None:
    assert kept(width, ratio) == count


def rule(width: int, ratio: float) -> int:
    """DESIGN's sentence, by trying every count: the largest of 16, 8, 4, 1 that moves the ratio by
    at most 0.1, ties keep more."""
    wanted = width * (1 - ratio)
    for multiple in (16, 8, 4, 1):
        fits = [
            (abs(count - wanted), -count)
            for count in range(multiple, width + 1, multiple)
            if abs(count - wanted) <= 0.1 * width + 1e-9
        ]
        if fits:
            nearest = min(distance for distance, _ in fits)
            return max(-count for distance, count in fits if distance <= nearest + 1e-9)
    return max(1, int(wanted + 0.5))


@settings(max_examples=500)
@given(width=st.integers(1, 600), ratio=st.integers(0, 99).map(lambda part: part / 100))
def test_the_rule_of_rounding(width: int, ratio: float) -> None:
    count = kept(width, ratio)
    assert count == rule(width, ratio)
    assert 1 <= count <= width
    assert abs(count - width * (1 - ratio)) <= max(0.1 * width, 1) + 1e-9


# --- what is cut


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ratio=st.floats(0.15, 0.95), criterion=st.sampled_from(["l1", "l2"]))
def test_any_ratio_is_reached_and_right(ratio: float, criterion: str, tmp_path: Path) -> None:
    task = task_of(small_cnn(), IMAGE)
    model, facts, made = pruned(task, tmp_path, ratio=ratio, criterion=criterion)
    assert facts["layers"] == {
        "0": [16, kept(16, ratio)],
        "3": [32, kept(32, ratio)],
    }
    cut_away = 48 - kept(16, ratio) - kept(32, ratio)
    assert facts["reached"] == pytest.approx(cut_away / 48)
    assert abs(facts["reached"] - ratio) <= 0.1 + 1e-9
    assert facts["left_alone"] == {"8": "its channels are the model's output"}
    assert facts["proof"]["dtype"] == "float64"
    assert facts["proof"]["max_abs_diff"] < 1e-12
    check(task, model, made)


def test_the_weakest_channels_go_and_the_rest_stay_in_place(tmp_path: Path) -> None:
    dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for at in (1, 2, 5, 7):
            dense.get_parameter("0.weight")[at] *= 1e-3
            dense.get_parameter("2.weight")[:, at] *= 1e-3
    task = task_of(dense, (4,))
    model, _, _ = pruned(task, tmp_path)
    assert torch.equal(
        model.get_parameter("0.weight"), dense.get_parameter("0.weight")[[0, 3, 4, 6]]
    )
    assert torch.equal(
        model.get_parameter("2.weight"), dense.get_parameter("2.weight")[:, [0, 3, 4, 6]]
    )


def test_twice_gives_the_same_bytes_and_the_input_stays(tmp_path: Path) -> None:
    task = task_of(small_cnn(), IMAGE)
    source = at_rest(task, tmp_path)
    state = torch.random.get_rng_state()
    one = prune(source, task, tmp_path / "one", ratio=0.5).path.read_bytes()
    torch.rand(3)
    two = prune(source, task, tmp_path / "two", ratio=0.5).path.read_bytes()
    assert one == two
    assert source.checked() is source
    torch.random.set_rng_state(state)


def test_no_grad_around_it_does_not_matter(tmp_path: Path) -> None:
    with torch.no_grad():
        _, facts, _ = pruned(task_of(small_cnn(), IMAGE), tmp_path)
    assert len(facts["layers"]) == 2


def test_a_second_cut_builds_on_the_first(tmp_path: Path) -> None:
    task = task_of(small_cnn(), IMAGE)
    once = prune(at_rest(task, tmp_path), task, tmp_path / "once", ratio=0.5)
    twice = prune(once, task, tmp_path / "twice", ratio=0.5)
    assert twice.steps[-1]["facts"]["layers"] == {"0": [8, 4], "3": [16, 8]}
    assert [step["stage"] for step in twice.steps] == ["prune", "prune"]
    between, before = torchfile.open_model(once, task)
    model, edits = torchfile.open_model(twice, task)
    assert edits[: len(before)] == before
    same(masked(between, edits[len(before) :]), model, task)


class Moved(nn.Module):
    """Channels that change places in a way that NaN does not show: sorted by their own values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        # The order is that of the clean values, whatever is dyed.
        order = y.detach().nan_to_num(0.0).abs().argsort(1)
        return self.head(self.b(y.gather(1, order)).relu())  # type: ignore[no-any-return]


def test_what_the_dye_gets_wrong_the_proof_finds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = task_of(Moved(), (4,))
    model, facts, made = pruned(task, tmp_path)
    assert set(facts["layers"]) == {"b"}
    assert "a" in facts["left_alone"]
    check(task, model, made)


def test_a_wrong_cut_is_disproven() -> None:
    """A channel too much on the reading side: it runs, and it is wrong."""
    task = task_of(small_cnn(), IMAGE)
    dense = task.model()
    groups, _ = groups_of(dense, task.examples(2))
    (group,) = (group for group in groups if group.root == "0")
    edits = edits_of(dense, [Cut(group, ((0, 1),))])
    difference, why = disproof(dense, edits, task.examples(7), torch.float64)
    assert not why
    assert difference < 1e-12
    (reads,) = (edit for edit in edits if edit.get("parameter") == "3.weight")
    reads["indices"] = [1, *reads["indices"][1:]]
    # The masked model keeps its own idea of what goes: the columns do not fit the rows any more.
    _, why = disproof(dense, edits, task.examples(7), torch.float64)
    assert "the cut is not equivalent: outputs differ by" in why


class Branch(nn.Module):
    """A residual block as training begins it: the last scale of the branch is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.up, self.first = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.down, self.last = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.last(self.down(self.first(self.up(x)).relu()))
        return self.head((x + y).relu().mean((2, 3)))  # type: ignore[no-any-return]


def constant() -> nn.Module:
    """Whatever it is given it says the same: the last weights are zero."""
    model = small_cnn()
    nn.init.zeros_(model.get_parameter("8.weight"))
    return model


@pytest.mark.parametrize(
    ("build", "root", "reads"),
    [(Branch, "up", "down.weight"), (constant, "0", "3.weight")],
    ids=["branch", "constant"],
)
def test_a_wrong_cut_of_a_dead_model_is_disproven(
    build: Callable[[], nn.Module], root: str, reads: str
) -> None:
    """Its own weights would let any cut pass: random ones do not."""
    torch.manual_seed(0)
    dense = build().eval()
    task = task_of(dense, IMAGE)
    groups, _ = groups_of(dense, task.examples(2))
    (group,) = (group for group in groups if group.root == root)
    edits = edits_of(dense, [Cut(group, ((0, 1),))])
    assert disproof(dense, edits, task.examples(7), torch.float64)[1] == ""
    (wrong,) = (edit for edit in edits if edit.get("parameter") == reads)
    wrong["indices"] = [1, *wrong["indices"][1:]]
    _, why = disproof(dense, edits, task.examples(7), torch.float64)
    assert "the cut is not equivalent: outputs differ by" in why


class Overflowing(nn.Module):
    """Small weights keep it finite; weights of the usual size make it overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        for layer in (self.a, self.b):
            nn.init.uniform_(layer.weight, -1e-3, 1e-3)
            nn.init.constant_(layer.bias, 1e-2)  # so that no unit is silent

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        return self.head(y * (1e4 * y.square().sum(1, keepdim=True)).exp())  # type: ignore[no-any-return]


def test_where_random_weights_overflow_the_model_s_own_decide() -> None:
    torch.manual_seed(0)
    dense = Overflowing().eval()
    task = task_of(dense, (4,))
    (x,) = (torch.from_numpy(part) for part in task.examples(7))
    with torch.no_grad():
        assert dense(x).isfinite().all()
        assert not shaken(dense).double()(x[:2].double()).isfinite().all()
    sound = Sound(dense, task, "heads")
    (group,) = (group for group in sound.groups if group.root == "a")
    made = sound.edits([Cut(group, ((0, 1),))])
    assert disproof(dense, made, task.examples(7), torch.float64)[1] == ""
    (wrong,) = (edit for edit in made if edit.get("parameter") == "b.weight")
    wrong["indices"] = [1, *wrong["indices"][1:]]
    _, why = disproof(dense, made, task.examples(7), torch.float64)
    assert "the cut is not equivalent: outputs differ by" in why


@settings(max_examples=10)
@given(st.integers(0, 2**31))
def test_random_weights_depend_on_shapes_only(seed: int) -> None:
    torch.manual_seed(seed)
    dense = Branch().eval()
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    first, again = shaken(dense).state_dict(), shaken(Branch()).state_dict()
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    for key, value in first.items():
        assert torch.equal(value, again[key])
        assert value.isfinite().all()
        if key.endswith("running_var") or key in ("first.weight", "last.weight"):
            assert (value > 0).all()


class Heads(nn.Module):
    """Two heads: the second is what a proof of the first output alone would not see."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.box = nn.Linear(4, 32), nn.Linear(32, 16)
        self.logits, self.shift = nn.Linear(16, 5), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Any:
        y = self.body(x).relu()
        z = self.box(y).relu()
        return {
            "logits": self.logits(z),
            # Sizes that are right only before the cut, on the way to the second output only.
            "other": [self.shift(torch.cat(y.split([8, 24], 1)[::-1], 1))],
            "name": None,
        }


def test_every_output_is_proven_and_keeps_its_shape(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = task_of(Heads(), (4,))
    model, facts, made = pruned(task, tmp_path)
    assert set(facts["layers"]) == {"box"}
    left = facts["left_alone"]
    assert left["logits"] == left["shift"] == "its channels are the model's output"
    assert "the cut model does not run" in left["body"]
    check(task, model, made)


def test_an_output_in_the_middle_is_kept(tmp_path: Path) -> None:
    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Any:
            features = self.b(self.a(x).relu())
            return self.c(features.relu()), features

    task = task_of(Middle(), (4,))
    model, facts, made = pruned(task, tmp_path)
    assert set(facts["layers"]) == {"a"}
    assert set(facts["left_alone"]) == {"b", "c"}
    check(task, model, made)


@pytest.mark.parametrize("which", ["all", "first"])
def test_frozen_parameters_are_cut_and_stay_frozen(tmp_path: Path, which: str) -> None:
    dense = small_cnn()
    for parameter in (
        dense.parameters() if which == "all" else dense.get_submodule("0").parameters()
    ):
        parameter.requires_grad_(False)
    task = task_of(dense, IMAGE)
    model, facts, made = pruned(task, tmp_path)
    assert facts["layers"] == {"0": [16, 8], "3": [32, 16]}
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in dense.parameters()
    ]
    check(task, model, made)


def test_a_view_to_a_constant_is_rewritten_only_where_it_is_needed(tmp_path: Path) -> None:
    task = task_for("constant view")
    _, facts, made = pruned(task, tmp_path)
    _, edits = torchfile.open_model(made, task)
    assert edits[0] == {"edit": "rewrite", "module": "", "as": "flatten", "size": 512}
    assert facts["layers"]["second.conv"] == [32, 16]
    _, facts, made = pruned(task, tmp_path, keep=("second*",))
    _, edits = torchfile.open_model(made, task)
    assert not any(edit["edit"] == "rewrite" for edit in edits)


def test_tied_weights_are_left_alone(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight
            self.c, self.head = nn.Linear(16, 32), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.c(self.b(self.a(x).relu()).relu()).relu())  # type: ignore[no-any-return]

    task = task_of(Tied(), (16,))
    model, facts, made = pruned(task, tmp_path)
    assert set(facts["layers"]) == {"c"}
    assert facts["left_alone"]["a"] == "shares its weights with another layer"
    assert model.get_submodule("a").weight is model.get_submodule("b").weight
    check(task, model, made)


def test_a_layer_used_twice_is_right_or_left_alone(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(self.a(x).relu()).relu()).relu())  # type: ignore[no-any-return]

    task = task_of(Twice(), (16,))
    model, facts, made = pruned(task, tmp_path)
    assert "b" in facts["layers"]
    check(task, model, made)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(1, 16, 3), norm, nn.Conv2d(16, 32, 3)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.norm(self.a(x)).relu()).relu()
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (nn.GroupNorm(1, 16), "GroupNorm over the cut channels would change its statistics"),
        (nn.LayerNorm([16, 6, 6]), "LayerNorm over the cut channels would change its statistics"),
    ],
)
def test_statistics_over_channels_are_left_alone(tmp_path: Path, norm: nn.Module, why: str) -> None:
    task = task_of(Normed(norm), IMAGE)
    model, facts, made = pruned(task, tmp_path)
    assert set(facts["layers"]) == {"b"}
    assert facts["left_alone"]["a"] == why
    check(task, model, made)


def test_groups_of_a_group_norm_go_as_a_whole(tmp_path: Path) -> None:
    task = task_of(Normed(nn.GroupNorm(4, 16)), IMAGE)
    model, facts, made = pruned(task, tmp_path)
    assert facts["layers"]["a"] == [16, 8]
    assert model.get_submodule("norm").num_groups == 2
    check(task, model, made)


@pytest.mark.parametrize("groups", [4, 16])
def test_a_grouped_and_a_depthwise_convolution_follow(tmp_path: Path, groups: int) -> None:
    task = task_of(Normed(nn.Conv2d(16, 16, 3, padding=1, groups=groups)), IMAGE)
    model, facts, made = pruned(task, tmp_path)
    assert facts["layers"]["a"] == [16, 8]
    assert model.get_submodule("norm").groups == min(groups, 8)
    check(task, model, made)


def test_a_model_that_insists_on_float32_is_proven_in_it(tmp_path: Path) -> None:
    class Insists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.rnn = nn.Linear(4, 16), nn.LSTM(8, 8, batch_first=True)
            self.b, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            zero = torch.zeros(1, x.shape[0], 8)
            y, _ = self.rnn(self.b(self.a(x).relu()), (zero, zero))
            return self.head(y[:, -1])  # type: ignore[no-any-return]

    task = task_of(Insists(), (5, 4))
    model, facts, _ = pruned(task, tmp_path)
    assert set(facts["layers"]) == {"a", "b"}
    assert facts["proof"]["dtype"] == "float32"
    assert facts["proof"]["max_abs_diff"] < 1e-6
    assert set(facts["left_alone"]) == {"rnn", "head"}
    assert model(torch.zeros(2, 5, 4)).shape == (2, 3)


# --- keep, and nothing to do


@pytest.mark.parametrize(
    ("keep", "layers"),
    [
        (("0",), {"3"}),
        (("3",), set()),  # cutting 0 would take inputs of 3
        (("8",), {"0"}),
        (("[08]",), set()),
        (("nothing*", "0"), None),
    ],
)
def test_what_is_kept(tmp_path: Path, keep: tuple[str, ...], layers: set[str] | None) -> None:
    task = task_of(small_cnn(), IMAGE)
    if layers is None:
        with pytest.raises(InputError, match=r"--keep 'nothing\*' matches no layer: layers are"):
            pruned(task, tmp_path, keep=keep)
    elif not layers:
        with pytest.raises(Unsuitable, match="asked for with keep"):
            pruned(task, tmp_path, keep=keep)
    else:
        _, facts, _ = pruned(task, tmp_path, keep=keep)
        assert set(facts["layers"]) == layers
        assert "asked for with keep" in facts["left_alone"].values()


def test_a_container_s_name_keeps_what_is_inside(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.body = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
    model.rest = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    model.head = nn.Linear(16, 3)
    _, facts, _ = pruned(task_of(model, (4,)), tmp_path, keep=("body",))
    assert facts["left_alone"]["body.0"] == "asked for with keep"
    assert set(facts["layers"]) == {"rest.0", "rest.2"}


@pytest.mark.parametrize(
    ("model", "shape", "given", "said"),
    [
        (nn.Linear(4, 3), (4,), {}, "nothing could be pruned"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), (4,), {}, "the model's output"),
        (nn.Sequential(nn.Flatten()), (4,), {}, "no layer with channels to cut"),
        (small_cnn(), IMAGE, {"ratio": 0.0}, "a ratio of 0 removes nothing"),
        (small_cnn(2), IMAGE, {"ratio": 0.01}, "0.01 of 2 channels rounds to none"),
    ],
)
def test_nothing_to_prune_is_said(
    tmp_path: Path, model: nn.Module, shape: tuple[int, ...], given: dict[str, Any], said: str
) -> None:
    with pytest.raises((Unsuitable, StageError)) as caught:
        pruned(task_of(model, shape), tmp_path, **given)
    assert any(part in str(caught.value) for part in said.split("|"))
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_be_traced_is_one_line(tmp_path: Path) -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            if not x.isfinite().all():
                raise ValueError("not\nfinite")
            return self.b(x)  # type: ignore[no-any-return]

    with pytest.raises(StageError, match="channels cannot be followed") as caught:
        pruned(task_of(Strict(), (4,)), tmp_path)
    assert "\n" not in str(caught.value)


def uneven() -> nn.Module:
    """A third and two thirds of one layer's channels are read apart, by sizes that follow it."""

    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.p, self.q = nn.Linear(4, 48), nn.Linear(16, 8), nn.Linear(32, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.a(x).relu()
            third = y.shape[1] // 3
            return self.head((self.p(y[:, :third]) + self.q(y[:, third:])).relu())

    torch.manual_seed(0)
    return Uneven()


def test_two_groups_of_one_layer_are_both_cut(tmp_path: Path) -> None:
    task = task_of(uneven(), (4,))
    model, facts, made = pruned(task, tmp_path)
    check(task, model, made)
    assert facts["layers"] == {"a": [16, 8], "a (2)": [32, 16], "p": [8, 4]}


def test_parts_of_one_layer_have_names_of_their_own() -> None:
    sound = Sound(uneven(), task_of(uneven(), (4,)), "heads")
    assert [(group.root, group.width) for group in sound.groups] == [
        ("a", 16),
        ("a (2)", 32),
        ("p", 8),
    ]


class Parts(nn.Module):
    """The channels of ``a`` go two ways; ``apart`` tells where the second begins."""

    def __init__(self, apart: Callable[[Tensor], int]) -> None:
        super().__init__()
        self.apart = apart
        self.a, self.p, self.q = nn.Linear(4, 32), nn.Linear(16, 8), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).relu()
        at = self.apart(y)
        return self.head((self.p(y[:, :at]) + self.q(y[:, at:])).relu())


@pytest.mark.parametrize(
    "apart",
    [
        lambda y: (y.shape[1] + 1) // 2,  # as chunk does
        lambda y: y.shape[1] // 2,
    ],
    ids=["up", "down"],
)
def test_halves_that_must_lose_equally_many_are_one_group(
    apart: Callable[[Tensor], int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    task = task_of(Parts(apart), (4,))
    halves = Sound(task.model(), task, "heads").groups[0]
    assert (halves.root, halves.width, len(halves.strands), halves.each) == ("a", 16, 2, 2)
    assert halves.layers == ("a", "p", "q")
    model, facts, made = pruned(task, tmp_path)
    check(task, model, made)
    assert facts["layers"] == {"a": [32, 16], "p": [8, 4]}
    assert [model.get_parameter(f"{layer}.weight").shape[1] for layer in "pq"] == [8, 8]


def test_a_part_that_may_not_go_does_not_keep_the_other(tmp_path: Path) -> None:
    """The first half is found by a number in the code, so that only the second can be cut."""
    torch.manual_seed(0)
    task = task_of(Parts(lambda y: 16), (4,))
    model, facts, made = pruned(task, tmp_path)
    check(task, model, made)
    assert facts["layers"] == {"a (2)": [16, 8], "p": [8, 4]}
    assert set(facts["left_alone"]) == {"a", "head"}


def test_units_of_a_grouped_transposed_convolution_are_of_many_channels(tmp_path: Path) -> None:
    _, facts, _ = pruned(task_for("transposed, grouped"), tmp_path)
    assert facts["layers"]["up"] == [64, 32]


# --- criteria, rankings, steps


def with_data(**changes: Any) -> Task:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, *IMAGE)).astype(np.float32)
    return task_of(small_cnn(), IMAGE, splits=splits_of(x, rng.integers(0, 5, 40)), **changes)


@pytest.mark.parametrize("ranking", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_and_ranking_through_the_stage(
    tmp_path: Path, criterion: str, ranking: str
) -> None:
    task = with_data()
    model, facts, made = pruned(task, tmp_path, criterion=criterion, ranking=ranking)
    assert facts["layers"]
    if ranking == "local":
        assert facts["layers"] == {"0": [16, 8], "3": [32, 16]}
    elif criterion != "bn":  # here all its scales are 1
        assert facts["reached"] == pytest.approx(0.5, abs=0.15)
    check(task, model, made)
    settings = made.steps[-1]["settings"]
    assert (settings["criterion"], settings["ranking"]) == (criterion, ranking)


@pytest.mark.parametrize("criterion", ["taylor", "hessian", "activation"])
def test_a_criterion_that_reads_data_needs_some(tmp_path: Path, criterion: str) -> None:
    with pytest.raises(InputError, match=criterion):
        pruned(task_of(small_cnn(), IMAGE), tmp_path, criterion=criterion)


def test_data_trains_between_steps_and_the_file_is_the_model(tmp_path: Path) -> None:
    task = with_data()
    once, _, _ = pruned(task, tmp_path)
    model, facts, made = pruned(task, tmp_path, steps=3)
    # After the last cut nothing is trained: three steps are three cuts and two recoveries.
    assert facts["layers"] == {"0": [16, 8], "3": [32, 16]}
    assert [each.shape for each in model.parameters()] == [each.shape for each in once.parameters()]
    kept_rows = {tuple(row.flatten().tolist()) for row in small_cnn().get_parameter("3.weight")}
    ours = {tuple(row.flatten().tolist()) for row in model.get_parameter("3.weight")}
    assert not ours & kept_rows, "the weights were trained"
    again, edits = torchfile.open_model(made, task)
    assert torchfile.state_digest(again.state_dict()) == torchfile.state_digest(model.state_dict())
    assert torchfile.state_digest(again.state_dict()) == torchfile.state_digest(
        torchfile.tensors_in(made.path, torchfile.header(made.path) or {})
    )
    assert sum(edit.get("parameter") == "0.weight" for edit in edits) == 3
    twice = prune(at_rest(task, tmp_path), task, tmp_path / "twice", ratio=0.5, steps=3)
    assert twice.path.read_bytes() == made.path.read_bytes()


def test_steps_without_data_have_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(Unsuitable, match="no data to train on between the steps"):
        pruned(task_of(small_cnn(), IMAGE), tmp_path, steps=3)


def groups_for(widths: list[int]) -> list[Group]:
    """A chain of linear layers of these widths."""
    return [
        Group(
            str(at),
            (str(at),),
            (tuple((Slice(f"{at}.weight", 0, (k,)),) for k in range(width)),),
        )
        for at, width in enumerate(widths)
    ]


@given(
    widths=st.lists(st.integers(2, 40), min_size=1, max_size=5),
    ratio=st.floats(0.01, 0.99),
    floor=st.floats(0, 1),
    ranking=st.sampled_from(["global", "isomorphic"]),
    kinds=st.lists(st.booleans(), min_size=5, max_size=5),
    data=st.data(),
)
def test_no_ranking_goes_below_the_floor(
    widths: list[int],
    ratio: float,
    floor: float,
    ranking: str,
    kinds: list[bool],
    data: st.DataObject,
) -> None:
    groups = groups_for(widths)
    model = nn.Sequential(*(nn.Linear(2, 2) if kind else nn.Conv1d(2, 2, 1) for kind in kinds))
    level = st.floats(0, 1e6) | st.sampled_from([0.0, 1.0])
    scores = [
        (
            torch.tensor(
                data.draw(st.lists(level, min_size=group.width, max_size=group.width)),
                dtype=torch.float64,
            ),
        )
        for group in groups
    ]
    counts = RANKINGS[ranking](model, groups, ratio, floor, lambda _: scores)
    for group, count in zip(groups, counts, strict=True):
        assert least(group, floor) <= count <= group.width
        assert count >= max(1, floor * group.width - 1e-9)


@given(
    widths=st.lists(st.integers(16, 64), min_size=1, max_size=4),
    ratio=st.floats(0.05, 0.9),
    seed=st.integers(0, 99),
)
def test_a_global_ranking_reaches_the_ratio(widths: list[int], ratio: float, seed: int) -> None:
    groups = groups_for(widths)
    generator = torch.Generator().manual_seed(seed)
    scores = [(torch.rand(width, dtype=torch.float64, generator=generator),) for width in widths]
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in widths))
    counts = RANKINGS["global"](model, groups, ratio, 0.0, lambda _: scores)
    # Rounding moves a layer by at most a tenth of its width or one unit; one unit always stays.
    slack = sum(max(0.1 * width, 1) for width in widths) + 1 + len(widths)
    assert abs(sum(counts) - (1 - ratio) * sum(widths)) <= slack


@pytest.mark.parametrize("ranking", ["global", "isomorphic"])
def test_units_that_are_all_alike_do_not_go_all_together(ranking: str) -> None:
    groups = groups_for([64, 64])
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ones = [(torch.ones(64, dtype=torch.float64),)] * 2
    assert sum(RANKINGS[ranking](model, groups, 0.5, 0.1, lambda _: ones)) >= 56


def test_a_global_ranking_takes_from_the_layer_that_matters_least(tmp_path: Path) -> None:
    groups = groups_for([32, 32])
    low, high = torch.linspace(1, 2, 32).double(), torch.linspace(3, 4, 32).double()
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    counts = RANKINGS["global"](model, groups, 0.25, 0.1, lambda _: [(low,), (high,)])
    assert counts == [16, 32]
    counts = RANKINGS["isomorphic"](model, groups, 0.25, 0.1, lambda _: [(low,), (high,)])
    assert counts == [16, 32]  # both are linear layers along their outputs: one family
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1))
    counts = RANKINGS["isomorphic"](mixed, groups, 0.25, 0.1, lambda _: [(low,), (high,)])
    assert counts == [24, 24]


# --- the zoo


def zoo_task(name: str, shape: tuple[int, ...]) -> Task:
    torch.manual_seed(0)
    model = zoo.build(name, zoo.arguments_for(name, shape, 10))
    return task_of(settled(model, torch.rand(16, *shape)), shape)


@pytest.mark.parametrize(
    ("name", "shape", "layers", "left"),
    [
        ("mlp", (30,), 2, {"head"}),
        ("cnn", IMAGE, 3, {"fc2"}),
        ("resnet20", (1, 16, 16), 12, {"fc"}),
        ("unet", IMAGE, 12, {"head"}),
        ("vit", IMAGE, 4, {"head", "patch_embed"}),
        pytest.param("vgg16", (1, 32, 32), 13, {"45"}, marks=pytest.mark.slow),
        pytest.param("resnet56", (1, 16, 16), 30, {"fc"}, marks=pytest.mark.slow),
        pytest.param("resnet18", (1, 32, 32), 12, {"fc"}, marks=pytest.mark.slow),
        pytest.param("resnet50", (1, 32, 32), 37, {"fc"}, marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", (1, 32, 32), 25, {"classifier.1"}, marks=pytest.mark.slow),
    ],
)
def test_the_zoo(
    tmp_path: Path, name: str, shape: tuple[int, ...], layers: int, left: set[str]
) -> None:
    task = zoo_task(name, shape)
    model, facts, made = pruned(task, tmp_path)
    assert len(facts["layers"]) == layers
    assert set(facts["left_alone"]) == left
    assert facts["reached"] == pytest.approx(0.5, abs=0.01)
    check(task, model, made)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_nets_lose_hidden_units(tmp_path: Path, name: str) -> None:
    task = zoo_task(name, (8, 8))
    model, facts, made = pruned(task, tmp_path)
    assert "rnn" in facts["layers"]
    check(task, model, made)


@pytest.mark.slow
def test_bad_groups_among_many_do_not_take_minutes(tmp_path: Path) -> None:
    """Halving: one unsound group among 37 is found in about 2 log2(37) attempts."""

    class Swapped(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            y = self.body.get_submodule("maxpool")(
                self.body.get_submodule("relu")(
                    self.body.get_submodule("bn1")(self.body.get_submodule("conv1")(x))
                )
            )
            for name in ("layer1", "layer2", "layer3", "layer4"):
                y = self.body.get_submodule(name)(y)
                if name == "layer3":
                    y = torch.cat(y.split([256, 768], 1)[::-1], 1)
            return self.body.get_submodule("fc")(y.mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    dense = zoo.build("resnet50", {"in_channels": 1, "classes": 10})
    task = task_of(settled(Swapped(dense), torch.rand(16, 1, 32, 32)), (1, 32, 32))
    model, facts, made = pruned(task, tmp_path)
    assert len(facts["layers"]) >= 34
    assert any("does not run" in why for why in facts["left_alone"].values())
    check(task, model, made)
