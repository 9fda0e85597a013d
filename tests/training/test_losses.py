"""Losses are what the papers say, are least where student and teacher agree, and stay finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor import InputError
from compressor.task import KINDS, UNLABELLED, Kind
from compressor.training.losses import (
    LABELS,
    LOSSES,
    SOFT,
    Pair,
    Seen,
    attended,
    checked,
    decoupled,
    hinted,
    labelled,
    own,
    related,
    softened,
    total,
    uncorrelated,
)

JUDGED = [kind for kind in KINDS if kind != "custom"]  # that one has no metric or loss of ours

Floats = NDArray[np.float64]
SEEDS = st.integers(0, 2**16)
WARM = st.floats(0.5, 10)
TAUGHT = ("kd", "dkd", "dist", "mse")
EVERY = [(name, kind) for name, loss in LOSSES.items() for kind in JUDGED if kind in loss.kinds]


def normal(seed: int, *shape: int, scale: float = 2.0, count: int = 2) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(count)]


def classes(seed: int, number: int, *shape: int) -> Tensor:
    return torch.randint(0, number, shape, generator=torch.Generator().manual_seed(seed))


def shapes(kind: Kind) -> tuple[tuple[int, ...], Tensor]:
    """Outputs' shape and targets that fit."""
    return {
        "classification": ((6, 4), classes(1, 4, 6)),
        "segmentation": ((6, 4, 3, 2), classes(1, 4, 6, 3, 2)),
        "binary": ((6, 1), classes(1, 2, 6)),
        "multilabel": ((6, 4), classes(1, 2, 6, 4)),
        "regression": ((6, 4), normal(1, 6, 4)[0].float()),
    }[kind]


def seen(kind: Kind, outputs: Tensor, teacher: Tensor, **given: Any) -> Seen:
    return Seen(kind, outputs, given.pop("targets", shapes(kind)[1]), teacher, **given)


def softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def divergence(theirs: Floats, ours: Floats) -> float:
    """Kullback and Leibler's, mean over rows."""
    return float((theirs * np.log(theirs / ours)).sum(1).mean())


# What today's functions gave for a batch in which every example has a label.
BEFORE: dict[Kind, Callable[[Tensor, Tensor], Tensor]] = {
    "classification": lambda o, t: F.cross_entropy(o, t.long()),
    "segmentation": lambda o, t: F.cross_entropy(o, t.long()),
    "binary": lambda o, t: F.binary_cross_entropy_with_logits(o, t.reshape(o.shape).float()),
    "multilabel": lambda o, t: F.binary_cross_entropy_with_logits(o, t.reshape(o.shape).float()),
    "regression": lambda o, t: F.mse_loss(o, t.reshape(o.shape).to(o.dtype)),
}


@pytest.mark.parametrize("kind", JUDGED)
@given(seed=SEEDS)
def test_where_all_are_labelled_nothing_is_divided_otherwise(kind: Kind, seed: int) -> None:
    shape, targets = shapes(kind)
    outputs = normal(seed, *shape, count=1)[0].float().requires_grad_()
    values = LABELS[kind](outputs, targets), BEFORE[kind](outputs, targets)
    assert torch.equal(*values)
    one, two = (torch.autograd.grad(value, outputs)[0] for value in values)
    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", JUDGED)
@given(seed=SEEDS, floating=st.booleans())
def test_what_has_no_label_counts_nothing(kind: Kind, seed: int, floating: bool) -> None:
    shape, targets = shapes(kind)
    floating = floating or kind == "regression"
    outputs = normal(seed, *shape, count=1)[0].requires_grad_()
    absent = torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    holed = (targets.double() if floating else targets).masked_fill(
        absent, torch.nan if floating else UNLABELLED
    )
    value = LABELS[kind](outputs, holed)
    each = {
        "classification": lambda: F.cross_entropy(outputs, targets, reduction="none"),
        "segmentation": lambda: F.cross_entropy(outputs, targets, reduction="none"),
        "regression": lambda: (outputs - targets).square(),
    }.get(
        kind,
        lambda: F.binary_cross_entropy_with_logits(
            outputs, targets.reshape(outputs.shape).double(), reduction="none"
        ),
    )()
    there = ~absent.reshape(each.shape)
    torch.testing.assert_close(value, (each * there).sum() / each.numel())
    (gradient,) = torch.autograd.grad(value, outputs)
    assert torch.isfinite(gradient).all()
    if kind != "segmentation" and kind != "classification":
        assert not gradient[~there].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", JUDGED)
def test_no_labels_at_all_are_nothing_to_learn(kind: Kind, dtype: torch.dtype) -> None:
    shape, targets = shapes(kind)
    outputs = normal(0, *shape, count=1)[0].to(dtype).requires_grad_()
    none = torch.full_like(targets, torch.nan if targets.is_floating_point() else UNLABELLED)
    value = LOSSES["labels"](Seen(kind, outputs, none))
    assert value.item() == 0
    value.backward()
    assert outputs.grad is not None
    assert not outputs.grad.any()


def test_a_byte_is_a_label() -> None:
    """In eight bits 255 equals -1: a mask of 256 classes has it as its last."""
    outputs = normal(0, 3, 256, count=1)[0]
    last = torch.full((3,), 255, dtype=torch.uint8)
    torch.testing.assert_close(labelled(outputs, last), -outputs.log_softmax(1)[:, 255].mean())
    assert torch.equal(
        decoupled(outputs, 2 * outputs, last, 1.0),
        decoupled(outputs, 2 * outputs, last.long(), 1.0),
    )


def test_a_whole_number_is_a_number() -> None:
    found = LABELS["regression"](torch.zeros(2), torch.tensor([UNLABELLED, 0]))
    assert found.item() == 0.5


@given(seed=SEEDS, smoothing=st.floats(0, 0.9))
def test_smoothing_moves_targets_toward_doubt(seed: int, smoothing: float) -> None:
    for kind in JUDGED:
        shape, targets = shapes(kind)
        outputs = normal(seed, *shape, count=1)[0]
        value = total({"labels": 1}, Seen(kind, outputs, targets, smoothing=smoothing))
        if kind in ("classification", "segmentation"):
            hot = F.one_hot(targets, 4).movedim(-1, 1)
            goal = hot * (1 - smoothing) + smoothing / 4
            wanted = -(goal * outputs.log_softmax(1)).sum(1).mean()
        elif kind == "regression":
            wanted = LABELS[kind](outputs, targets)
        else:
            goal = targets.reshape(shape) * (1 - smoothing) + smoothing * 0.5
            sure = F.logsigmoid(outputs), F.logsigmoid(-outputs)
            wanted = -(goal * sure[0] + (1 - goal) * sure[1]).mean()
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)


@given(seed=SEEDS, temperature=WARM)
def test_softened_is_the_divergence_of_probabilities(seed: int, temperature: float) -> None:
    ours, theirs = normal(seed, 5, 4)
    wanted = temperature**2 * divergence(
        softmax(theirs.numpy() / temperature), softmax(ours.numpy() / temperature)
    )
    assert float(softened(ours, theirs, temperature)) == pytest.approx(wanted, rel=1e-8, abs=1e-10)


@given(seed=SEEDS, temperature=WARM)
def test_softened_bits_are_a_cross_entropy(seed: int, temperature: float) -> None:
    ours, theirs = (each.numpy() / temperature for each in normal(seed, 5, 4))
    goal, seen_as = (1 / (1 + np.exp(-each)) for each in (theirs, ours))
    wanted = -(goal * np.log(seen_as) + (1 - goal) * np.log(1 - seen_as)).mean()
    found = SOFT["multilabel"](*normal(seed, 5, 4), temperature)
    assert float(found) == pytest.approx(temperature**2 * wanted, rel=1e-8)


@given(seed=SEEDS, temperature=WARM)
def test_decoupled_is_two_divergences(seed: int, temperature: float) -> None:
    """By hand, example for example: the odds of the target, and the rest among themselves."""
    ours, theirs = normal(seed, 5, 4)
    targets = classes(seed, 4, 5)
    targets[1] = UNLABELLED
    wanted = 0.0
    for row, label in enumerate(targets.tolist()):
        target = int(theirs[row].argmax()) if label == UNLABELLED else label
        p, q = (softmax(each[row : row + 1].numpy() / temperature) for each in (theirs, ours))
        odds = [np.array([[each[0, target], 1 - each[0, target]]]) for each in (p, q)]
        rest = [np.delete(each, target, 1) for each in (p, q)]
        rest = [each / each.sum() for each in rest]
        wanted += 1.0 * divergence(*odds) + 8.0 * divergence(*rest)
    found = float(decoupled(ours, theirs, targets, temperature))
    assert found == pytest.approx(wanted / 5 * temperature**2, rel=1e-6, abs=1e-9)


@given(seed=SEEDS, temperature=WARM)
def test_decoupled_with_the_teacher_s_doubt_is_softened(seed: int, temperature: float) -> None:
    """Equation 5 of the paper: the second part weighed by 1 - p(target) gives the plain loss."""
    ours, theirs = normal(seed, 1, 4)
    target = classes(seed, 4, 1)
    doubt = 1 - float((theirs / temperature).softmax(1)[0, int(target)])
    whole = float(decoupled(ours, theirs, target, temperature)) / temperature**2
    p, q = ((each / temperature).softmax(1)[0, int(target)].item() for each in (theirs, ours))
    first = divergence(np.array([[p, 1 - p]]), np.array([[q, 1 - q]]))
    again = first + doubt * (whole - first) / 8
    wanted = float(softened(ours, theirs, temperature)) / temperature**2
    assert again == pytest.approx(wanted, rel=1e-6, abs=1e-8)


@given(seed=SEEDS, temperature=st.floats(1, 4))
def test_related_is_one_minus_correlation(seed: int, temperature: float) -> None:
    ours, theirs = normal(seed, 6, 4)
    p, q = (softmax(each.numpy() / temperature) for each in (theirs, ours))

    def correlation(one: Floats, two: Floats) -> float:
        each = [np.corrcoef(a, b)[0, 1] for a, b in zip(one, two, strict=True)]
        return float(np.mean(each))

    wanted = 2 * (1 - correlation(p, q)) + 2 * (1 - correlation(p.T, q.T))
    found = float(related(ours, theirs, temperature))
    assert found == pytest.approx(wanted * temperature**2, rel=1e-3, abs=1e-3)


@given(
    seed=SEEDS,
    scale=st.lists(st.floats(0.5, 20), min_size=5, max_size=5),
    shift=st.lists(st.floats(-5, 5), min_size=5, max_size=5),
)
def test_correlation_is_blind_to_scale_and_shift_of_a_row(
    seed: int, scale: list[float], shift: list[float]
) -> None:
    ours, theirs = normal(seed, 5, 6)
    moved = ours * torch.tensor(scale)[:, None] + torch.tensor(shift)[:, None]
    torch.testing.assert_close(
        uncorrelated(moved, theirs), uncorrelated(ours, theirs), rtol=1e-5, atol=1e-6
    )
    assert uncorrelated(-theirs, theirs).item() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("name", ["kd", "dkd", "dist"])
@given(seed=SEEDS, shift=st.lists(st.floats(-20, 20), min_size=6, max_size=6))
def test_a_shift_of_a_row_of_logits_changes_nothing(
    name: str, seed: int, shift: list[float]
) -> None:
    ours, theirs = normal(seed, 6, 4)
    moved = ours + torch.tensor(shift, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        LOSSES[name](seen("classification", moved, theirs)),
        LOSSES[name](seen("classification", ours, theirs)),
        rtol=1e-6,
        atol=1e-8,
    )


def test_pixels_are_examples() -> None:
    ours, theirs = normal(0, 6, 4, 3, 2)
    rows = [each.permute(0, 2, 3, 1).reshape(-1, 4) for each in (ours, theirs)]
    for name in ("kd", "dist"):
        torch.testing.assert_close(
            LOSSES[name](seen("segmentation", ours, theirs)),
            LOSSES[name](seen("classification", *rows)),
        )


def features(seed: int, **changes: Tensor) -> tuple[Pair, ...]:
    """Two pairs, pictures of 3 and 5 channels and a table; equal widths where adapted."""
    maps, rows = normal(seed, 4, 5, 3, 2), normal(seed + 1, 4, 7)
    narrow = normal(seed + 2, 4, 3, 3, 2)[0]
    return (
        Pair(narrow, maps[1], maps[0])._replace(**changes),
        Pair(rows[0], rows[1], rows[0]),
    )


@given(seed=SEEDS)
def test_a_hint_is_an_error_beside_the_power(seed: int) -> None:
    given = features(seed)
    wanted = np.mean(
        [
            ((pair.adapted.numpy() - pair.teacher.numpy()) ** 2).sum()
            / (pair.teacher.numpy() ** 2).sum()
            for pair in given
        ]
    )
    assert float(hinted(given)) == pytest.approx(wanted, rel=1e-9)
    louder = tuple(Pair(p.student, 100 * p.teacher, 100 * p.adapted) for p in given)
    torch.testing.assert_close(hinted(louder), hinted(given))
    silent = tuple(Pair(p.student, p.teacher, torch.zeros_like(p.adapted)) for p in given)
    assert float(hinted(silent)) == pytest.approx(1)


@given(seed=SEEDS, loud=st.floats(0.01, 1e4))
def test_attention_is_a_distance_of_maps(seed: int, loud: float) -> None:
    given = features(seed)
    pair = given[0]

    def maps(feature: Tensor) -> Floats:
        flat: Floats = (feature.numpy() ** 2).mean(1).reshape(4, -1)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    wanted = ((maps(pair.student) - maps(pair.teacher)) ** 2).sum(1).mean()
    assert float(attended(given)) == pytest.approx(wanted, rel=1e-9)
    louder = (pair._replace(student=loud * pair.student),)
    assert float(attended(louder)) == pytest.approx(wanted, rel=1e-6)
    assert 0 <= wanted <= 2


def test_rows_have_no_map() -> None:
    with pytest.raises(InputError, match="none of 1 features has a map: use hint instead"):
        attended(features(0)[1:])


def test_a_dead_layer_teaches_nothing() -> None:
    for dead in ("teacher", "student", "adapted"):
        given = features(0)[0]
        shape = getattr(given, dead).shape
        student = given.student.clone().requires_grad_()
        pair = Pair(student, given.teacher, student.mean(1, keepdim=True).expand(4, 5, 3, 2))
        if dead != "adapted":
            pair = pair._replace(**{dead: torch.zeros(shape, dtype=torch.float64)})
        for function in (hinted, attended):
            value = function((pair,))
            assert torch.isfinite(value)
            if value.requires_grad and value.grad_fn is not None:
                grads = torch.autograd.grad(value, student, allow_unused=True)[0]
                assert grads is None or torch.isfinite(grads).all()
        if dead == "teacher":
            assert hinted((pair,)).item() == 0


@pytest.mark.parametrize("kind", JUDGED)
@given(seed=SEEDS, temperature=WARM)
def test_no_outputs_are_better_than_the_teacher_s(
    kind: Kind, seed: int, temperature: float
) -> None:
    ours, theirs = normal(seed, *shapes(kind)[0])
    for name, loss in LOSSES.items():
        if kind in loss.kinds and name in TAUGHT:
            best, other = (
                loss(seen(kind, each, theirs, temperature=temperature)) for each in (theirs, ours)
            )
            assert best <= other + 1e-9
            assert other >= -1e-9
            if not (name == "kd" and kind in ("binary", "multilabel")):  # a cross-entropy
                assert best.item() == pytest.approx(0, abs=1e-9)


@given(seed=SEEDS)
def test_features_like_the_teacher_s_are_no_error(seed: int) -> None:
    alike = tuple(Pair(pair.teacher, pair.teacher, pair.teacher) for pair in features(seed))
    assert hinted(alike).item() == 0
    assert attended(alike).item() == 0
    assert hinted(features(seed)) > 0
    assert attended(features(seed)) > 0


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_gradients_are_those_of_the_values(name: str, kind: Kind) -> None:
    shape, targets = shapes(kind)
    outputs, teacher = (each[:3] for each in normal(0, *shape))

    def loss(outputs: Tensor, student: Tensor, adapted: Tensor) -> Tensor:
        pair = features(0)[0]._replace(student=student, adapted=adapted)
        what = seen(kind, outputs, teacher, targets=targets[:3], features=(pair,))
        return LOSSES[name](what)

    pair = features(0)[0]
    points = [each.clone().requires_grad_() for each in (outputs, pair.student, pair.adapted)]
    # FAINT makes DIST curve within 1e-4: smaller steps see the slope.
    assert torch.autograd.gradcheck(loss, points, eps=1e-7, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_extreme_outputs_stay_finite(name: str, kind: Kind, dtype: torch.dtype) -> None:
    shape, targets = shapes(kind)
    for at in range(4):
        random = torch.Generator().manual_seed(at)
        signs = [torch.randint(0, 2, shape, generator=random) * 2 - 1 for _ in range(2)]
        scales = (1e4, 1e4 if at % 2 else 0.0)
        outputs, teacher = (
            (scale * sign).to(dtype) for scale, sign in zip(scales, signs, strict=True)
        )
        outputs.requires_grad_()
        pair = Pair(*((5e3 * each).to(dtype) for each in features(at)[0]))
        pair.student.requires_grad_()
        pair.adapted.requires_grad_()
        value = LOSSES[name](
            seen(kind, outputs, teacher, targets=targets, features=(pair,), temperature=1.0)
        )
        assert torch.isfinite(value), (name, kind, at)
        value.backward()
        for point in (outputs, pair.student, pair.adapted):
            assert point.grad is None or torch.isfinite(point.grad).all()


@pytest.mark.parametrize("name", TAUGHT)
def test_sixteen_bits_are_computed_in_thirty_two(name: str) -> None:
    ours, theirs = (each.bfloat16() for each in normal(3, 6, 4))
    short = LOSSES[name](seen("classification", ours, theirs))
    exact = LOSSES[name](seen("classification", ours.double(), theirs.double()))
    assert short.dtype == torch.float32
    assert short.item() == pytest.approx(exact.item(), rel=1e-4)


def test_an_untrained_head_gets_no_wild_gradient() -> None:
    """All classes alike: a row without a direction, where correlation's slope is infinite."""
    outputs = torch.zeros(6, 4, requires_grad=True)
    related(outputs, normal(0, 6, 4)[0].float(), 4.0).backward()
    assert outputs.grad is not None
    assert torch.isfinite(outputs.grad).all()
    alike = torch.zeros(6, 4)
    assert related(alike, alike, 4.0).item() == 0


def test_the_total_is_the_weighted_sum() -> None:
    ours, theirs = normal(0, 6, 4)
    what = seen("classification", ours.requires_grad_(), theirs)
    mine = own("mine.py:loss", lambda outputs: outputs.square().mean())
    weights = {"labels": 0.25, "kd": 0.5, "mine.py:loss": 2.0, "hint": 0.0}
    wanted = 0.25 * LOSSES["labels"](what) + 0.5 * LOSSES["kd"](what) + 2 * ours.square().mean()
    torch.testing.assert_close(total(weights, what, {"mine.py:loss": mine}), wanted)
    assert torch.equal(total({"labels": 1.0}, what), LOSSES["labels"](what))


def test_weights_are_checked() -> None:
    assert checked({"labels": 0.5, "kd": 0.0, "a.b:c": 1}, "binary") == {"labels": 0.5, "a.b:c": 1}
    assert checked({"labels": 1}, "binary", smoothing=0.1) == {"labels": 1}


@pytest.mark.parametrize(
    ("weights", "kind", "said"),
    [
        ({"kl": 1.0}, "classification", "loss 'kl' is unknown: choose from labels, kd, dkd, dist"),
        ({"labels": -1.0}, "classification", "loss labels: the weight is -1: give 0 or more"),
        ({"a:b": float("nan")}, "classification", "loss a:b: the weight is nan: give 0 or more"),
        ({"kd": float("inf")}, "classification", "loss kd: the weight is inf"),
        ({"labels": 0.0}, "classification", "no loss has a weight above 0 ({'labels': 0.0})"),
        ({}, "classification", "no loss has a weight above 0 ({})"),
        ({"dkd": 1.0}, "regression", "loss 'dkd' is none for regression: choose from labels, kd, "),
        ({"dist": 1.0}, "binary", "loss 'dist' is none for binary: choose from labels, kd, hint"),
    ],
)
def test_wrong_weights_are_refused(weights: dict[str, float], kind: Kind, said: str) -> None:
    with pytest.raises(InputError) as caught:
        checked(weights, kind)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_regression_cannot_be_smoothed() -> None:
    with pytest.raises(InputError, match=r"smoothing 0\.1: a regression has no labels to smooth"):
        checked({"labels": 1.0}, "regression", smoothing=0.1)


def test_a_user_s_function_gets_what_it_names() -> None:
    model = nn.Linear(4, 4)
    outputs, teacher = normal(0, 6, 4)
    outputs.requires_grad_()
    raw, raw_teacher = {"boxes": outputs, "scores": outputs}, {"boxes": teacher}
    what = seen(
        "classification", outputs, teacher, features=features(0), inputs=(teacher,), model=model
    )
    got: dict[str, Any] = {}

    def all_of_it(*, features: Any, model: Any, inputs: Any, teacher: Any, targets: Any,
                  outputs: Any) -> Tensor:  # fmt: skip
        got.update(locals())
        got.pop("got")
        loss: Tensor = (outputs if isinstance(outputs, Tensor) else outputs["boxes"]).mean()
        return loss

    loss = own("mine.py:all_of_it", all_of_it)
    assert loss.needs == {"labels", "teacher", "features"}
    value = loss(what._replace(raw=raw, raw_teacher=raw_teacher))
    assert value.item() == outputs.mean().item()
    assert got.pop("outputs") is raw
    assert got.pop("teacher") is raw_teacher
    assert got.pop("model") is model
    assert got.pop("targets") is what.targets
    assert got.pop("inputs") is what.inputs
    assert got.pop("features") is what.features
    assert not [key for key in got if key != "loss"]
    loss(what)
    assert got["outputs"] is outputs
    assert got["teacher"] is teacher
    assert own("a:b", lambda outputs, targets: outputs).needs == {"labels"}
    assert own("a:b", lambda features: features[0]).needs == {"teacher", "features"}


def _extra(outputs: Tensor, gamma: float = 2.0) -> Tensor:
    return outputs.mean()


@pytest.mark.parametrize(
    ("function", "asked"),
    [
        (lambda outputs, labels: outputs, "'labels'"),
        (_extra, "'gamma"),
        (lambda *outputs: outputs, "'*outputs'"),
        (lambda **given: given, "'**given'"),
    ],
)
def test_a_user_s_function_cannot_ask_for_more(function: Callable[..., Any], asked: str) -> None:
    with pytest.raises(InputError) as caught:
        own("mine.py:loss", function)
    said = str(caught.value)
    assert said.startswith(f"loss mine.py:loss: it asks for {asked}")
    assert said.endswith("among outputs, targets, teacher, inputs, model, features")
    with pytest.raises(InputError, match="its parameters cannot be read"):
        own("builtins:x", type("Hidden", (), {"__call__": 3})())


def _raises(outputs: Tensor) -> Tensor:
    raise ValueError("no\nboxes")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda outputs: outputs, "gave torch.float64, shape (6, 4): return one float"),
        (lambda outputs: outputs.argmax(), "gave torch.int64, shape (): return one float"),
        (lambda outputs: 3.0, "gave a float: return a scalar tensor"),
        (lambda outputs: outputs.detach().mean(), "has no gradient: compute it from outputs"),
        (_raises, ": it raised ValueError: no boxes"),
    ],
)
def test_a_user_s_function_gives_one_number_to_minimise(
    function: Callable[..., Any], said: str
) -> None:
    outputs, teacher = normal(0, 6, 4)
    loss = own("mine.py:loss", function)
    with pytest.raises(InputError) as caught:
        loss(seen("classification", outputs.requires_grad_(), teacher))
    assert str(caught.value).startswith(f"loss mine.py:loss{'' if said[0] == ':' else ' '}{said}")
    assert "\n" not in str(caught.value)


def test_without_gradients_none_is_asked_for() -> None:
    outputs, teacher = normal(0, 6, 4)
    with torch.no_grad():
        value = own("a:b", lambda outputs: outputs.mean())(seen("classification", outputs, teacher))
    assert not value.requires_grad
