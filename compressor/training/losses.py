"""What training minimises: the error on labels, the distance to a teacher, or a user's function.

``LABELS`` and ``SOFT`` have one function for every kind of task; ``LOSSES`` has what recipes name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from compressor.errors import InputError, one_line
from compressor.task import KINDS, UNLABELLED, Kind
from compressor.training.world import here

TARGET, OTHERS = 1.0, 8.0
"""Weights of the two parts of decoupled distillation (Zhao et al. 2022, table 4): alpha, beta."""

BETWEEN, WITHIN = 2.0, 2.0
"""Weights of DIST's relations between and within classes (Huang et al. 2022, section 4): beta,
gamma."""

FAINT = 1e-4
"""DIST leaves out what varies less than this: rows of an untrained head and columns of classes that
are never likely have no direction, only rounding."""

SURE = 1e4
"""A logit so large that the error of the label 1 is exactly 0."""


class Pair(NamedTuple):
    """One feature of the student and the teacher's, floats ``(n, channels, ...)``.

    ``adapted`` is the student's with as many channels as the teacher's.
    """

    student: Tensor
    teacher: Tensor
    adapted: Tensor


class Seen(NamedTuple):
    """What a loss sees of one batch.

    ``outputs`` and ``teacher`` are the first tensors that student and teacher returned, ``raw`` and
    ``raw_teacher`` all that they returned. Examples without a label have the target
    :data:`~compressor.task.UNLABELLED`, or NaN where targets are floats.
    """

    kind: Kind
    outputs: Tensor
    targets: Tensor
    teacher: Tensor | None = None
    features: tuple[Pair, ...] = ()
    temperature: float = 4.0
    smoothing: float = 0.0
    inputs: tuple[Tensor, ...] = ()
    model: nn.Module | None = None
    raw: Any = None
    raw_teacher: Any = None


class Loss(NamedTuple):
    """A function of what is seen, what of it must be there, and the kinds of task that have it.

    ``needs`` holds some of ``labels``, ``teacher`` and ``features``.
    """

    function: Callable[[Seen], Tensor]
    needs: frozenset[str]
    kinds: frozenset[Kind] = frozenset(KINDS)

    def __call__(self, seen: Seen) -> Tensor:
        return self.function(seen)


def labelled(outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits, classes on axis 1, and integer labels.

    The sum over those that have a label, divided by the number of all. ``smoothing`` of the label
    goes to all classes alike (Szegedy et al. 2016, section 7).
    """
    labels = targets.long()
    if targets.is_floating_point():
        labels = labels.masked_fill(targets.isnan(), UNLABELLED)
    total = F.cross_entropy(
        outputs,
        labels,
        ignore_index=UNLABELLED,
        reduction="sum",
        label_smoothing=smoothing,
    )
    return total / targets.numel()


def bits(outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy of logits, shapes alike up to axes of length 1; see :func:`labelled`.

    ``smoothing`` moves targets toward 0.5.
    """
    wanted = targets.reshape(outputs.shape)
    absent = missing(wanted)
    goal = wanted.to(outputs.dtype) * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(
        outputs.masked_fill(absent, SURE), goal.masked_fill(absent, 1.0)
    )


def squared(outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean squared error, shapes alike up to axes of length 1; see :func:`labelled`.

    NaN stands for a value that is missing, and no other number. A regression has no labels to
    smooth: :func:`checked` refuses that.
    """
    goal = targets.reshape(outputs.shape).to(outputs.dtype)
    return F.mse_loss(outputs, torch.where(goal.isnan(), outputs.detach(), goal))


def missing(targets: Tensor) -> Tensor:
    """Where targets hold no label: bool, shape of ``targets``."""
    # Long before it is compared: 255 equals -1 in eight bits.
    return targets.isnan() if targets.is_floating_point() else targets.long() == UNLABELLED


LABELS: dict[Kind, Callable[..., Tensor]] = {
    "classification": labelled,
    "segmentation": labelled,
    "binary": bits,
    "multilabel": bits,
    "regression": squared,
}
"""``labels(outputs, targets, smoothing=0.0)``: the mean error over the examples of a batch."""


def softened(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Divergence of softened distributions, classes on axis 1 (Hinton et al. 2015, section 2).

    Scaled by the temperature squared, so that gradients keep their size.
    """
    ours = F.log_softmax(outputs / temperature, dim=1)
    theirs = F.log_softmax(teacher / temperature, dim=1)
    apart = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1).mean()
    return apart * temperature**2


def softened_bits(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The same for independent sigmoid logits: cross-entropy of softened probabilities."""
    goal = torch.sigmoid(teacher / temperature)
    apart = F.binary_cross_entropy_with_logits(outputs / temperature, goal)
    return apart * temperature**2


def matched(outputs: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean squared error to the teacher's outputs, which no temperature softens."""
    return F.mse_loss(outputs, teacher)


SOFT: dict[Kind, Callable[[Tensor, Tensor, float], Tensor]] = {
    "classification": softened,
    "segmentation": softened,
    "binary": softened_bits,
    "multilabel": softened_bits,
    "regression": matched,
}
"""``soft(outputs, teacher, temperature)``: the distance to the teacher's softened outputs."""


def decoupled(outputs: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Decoupled distillation of logits ``(n, classes)`` (Zhao et al. 2022, equation 7).

    The divergence of the odds of the target class, and that of the distributions over all others,
    which :func:`softened` weighs by the teacher's doubt. The target of an example without a label
    is the teacher's.
    """
    target = torch.where(missing(targets), teacher.argmax(dim=1), targets.long())[:, None]
    others = torch.ones_like(outputs, dtype=torch.bool).scatter_(1, target, False)

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        logs = F.log_softmax(logits / temperature, dim=1)
        rest = logs[others].reshape(len(logs), -1)
        odds = torch.cat([logs.gather(1, target), rest.logsumexp(dim=1, keepdim=True)], dim=1)
        return odds, F.log_softmax(rest, dim=1)

    weighed = (
        weight * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        for weight, ours, theirs in zip(
            (TARGET, OTHERS), parts(outputs), parts(teacher), strict=True
        )
    )
    return torch.stack(list(weighed)).sum() * temperature**2


def related(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """DIST: how far softened probabilities are from correlated (Huang et al. 2022, equation 10).

    Classes on axis 1; every pixel is an example. One minus Pearson's correlation, mean over rows
    (what classes are to one example) and over columns (what examples are to one class). As in the
    authors' code it is scaled by the temperature squared.
    """

    def rows(logits: Tensor) -> Tensor:
        return (logits / temperature).softmax(dim=1).movedim(1, -1).reshape(-1, logits.shape[1])

    ours, theirs = rows(outputs), rows(teacher)
    apart = BETWEEN * uncorrelated(ours, theirs) + WITHIN * uncorrelated(ours.T, theirs.T)
    return apart * temperature**2


def uncorrelated(ours: Tensor, theirs: Tensor) -> Tensor:
    """The mean over rows of one minus Pearson's correlation; 0 for equal rows, constant or not."""

    def unit(values: Tensor) -> Tensor:
        values = values - values.mean(dim=1, keepdim=True)
        return values / (values.square().sum(dim=1, keepdim=True) + FAINT**2).sqrt()

    # Half the squared distance of unit vectors is one minus their product, without cancellation.
    return (unit(ours) - unit(theirs)).square().sum(dim=1).mean() / 2


def hinted(features: tuple[Pair, ...]) -> Tensor:
    """Squared error of adapted features as a share of the teacher's power, mean over the pairs
    (FitNets, Romero et al. 2015, equation 3)."""
    shares = []
    for pair in features:
        goal = _full(pair.teacher)
        power = torch.stack([goal.square().sum(), goal.new_tensor(goal.numel())])
        here().sums(power)  # of the whole batch: a share's own would weigh examples by their share
        power = power[0] / power[1]
        power = power.where(power > 0, torch.inf)  # a dead layer teaches nothing
        shares.append(F.mse_loss(_full(pair.adapted), goal) / power)
    return torch.stack(shares).mean()


def attended(features: tuple[Pair, ...]) -> Tensor:
    """Squared distance of normalised attention maps, mean over examples and pairs (attention
    transfer, Zagoruyko and Komodakis 2017, section 3.1): 0 to 2.

    The map of a feature ``(n, channels, ...)`` is its mean square over channels. Raises
    :class:`InputError` where no feature has an axis besides its channels.
    """

    def normal(feature: Tensor) -> Tensor:
        values = _full(feature)
        # The largest becomes 1 first: squares of squares leave float32.
        largest = values.detach().abs().flatten(1).amax(dim=1).clamp_min(1e-12)
        values = values / largest.reshape(-1, *[1] * (values.ndim - 1))
        return F.normalize(values.square().mean(dim=1).flatten(1), dim=1)

    apart = [
        (normal(pair.student) - normal(pair.teacher)).square().sum(dim=1).mean()
        for pair in features
        if pair.student.ndim > 2
    ]
    if not apart:
        raise InputError(
            f"loss attention: none of {len(features)} features has a map: use hint instead"
        )
    return torch.stack(apart).mean()


def _full(values: Tensor) -> Tensor:
    """In float32 where a tensor has 16 bits: their squares overflow, their sums lose the small."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _taught(seen: Seen) -> tuple[Tensor, Tensor]:
    assert seen.teacher is not None
    return _full(seen.outputs), _full(seen.teacher)


def _labels(seen: Seen) -> Tensor:
    return LABELS[seen.kind](_full(seen.outputs), seen.targets, seen.smoothing)


LOSSES: dict[str, Loss] = {
    "labels": Loss(_labels, frozenset({"labels"}), frozenset(LABELS)),
    "kd": Loss(
        lambda seen: SOFT[seen.kind](*_taught(seen), seen.temperature),
        frozenset({"teacher"}),
        frozenset(SOFT),
    ),
    "dkd": Loss(
        lambda seen: decoupled(*_taught(seen), seen.targets, seen.temperature),
        frozenset({"teacher"}),
        frozenset({"classification"}),
    ),
    "dist": Loss(
        lambda seen: related(*_taught(seen), seen.temperature),
        frozenset({"teacher"}),
        frozenset({"classification", "segmentation"}),
    ),
    "hint": Loss(lambda seen: hinted(seen.features), frozenset({"teacher", "features"})),
    "attention": Loss(lambda seen: attended(seen.features), frozenset({"teacher", "features"})),
    "mse": Loss(lambda seen: matched(*_taught(seen)), frozenset({"teacher"})),
}
"""What a recipe names. A name with a colon is a user's own function: see :func:`own`."""


def checked(weights: Mapping[str, float], kind: Kind, smoothing: float = 0.0) -> dict[str, float]:
    """The weights above 0.

    Raises :class:`InputError` for a name that is not in ``LOSSES`` and has no colon, a loss that
    ``kind`` does not have, a negative or infinite weight, when all are 0, and where labels are to
    be smoothed that are none.
    """
    for name, weight in weights.items():
        if ":" not in name and name not in LOSSES:
            raise InputError(
                f"loss {name!r} is unknown: choose from {', '.join(LOSSES)}, or name a function of "
                "your own, PKG.MOD:FUNCTION"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"loss {name}: the weight is {weight:g}: give 0 or more")
        if name in LOSSES and kind not in LOSSES[name].kinds:
            fitting = ", ".join(other for other, loss in LOSSES.items() if kind in loss.kinds)
            raise InputError(f"loss {name!r} is none for {kind}: choose from {fitting}")
    if not any(weights.values()):
        raise InputError(f"no loss has a weight above 0 ({dict(weights)}): give one")
    if smoothing and kind == "regression":
        raise InputError(
            f"smoothing {smoothing:g}: a regression has no labels to smooth: remove it"
        )
    return {name: weight for name, weight in weights.items() if weight}


def total(
    weights: Mapping[str, float],
    seen: Seen,
    functions: Mapping[str, Loss] = {},
) -> Tensor:
    """The weighted sum of the named losses: a scalar. ``functions`` has those with a colon, made by
    :func:`own`."""
    known = {**LOSSES, **functions}
    value, *others = (weight * known[name](seen) for name, weight in weights.items() if weight)
    for other in others:
        value = value + other
    return value


OWN: dict[str, tuple[Callable[[Seen], Any], str | None]] = {
    "outputs": (lambda seen: seen.outputs if seen.raw is None else seen.raw, None),
    "targets": (lambda seen: seen.targets, "labels"),
    "teacher": (
        lambda seen: seen.teacher if seen.raw_teacher is None else seen.raw_teacher,
        "teacher",
    ),
    "inputs": (lambda seen: seen.inputs, None),
    "model": (lambda seen: seen.model, None),
    "features": (lambda seen: seen.features, "features"),
}
"""What a user's function may ask for by the name of a parameter, and what that needs."""


def own(name: str, function: Callable[..., Any]) -> Loss:
    """A user's function as a loss: the names of its parameters choose what it is given.

    ``outputs`` and ``teacher`` are what the models returned, unchanged; ``inputs`` a tuple of
    tensors; ``features`` a tuple of :class:`Pair`. Raises :class:`InputError` for a parameter with
    another name; when called, for what is not a scalar of floats with a gradient.
    """
    choices = ", ".join(OWN)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise InputError(
            f"loss {name}: its parameters cannot be read: write a function with some of {choices}"
        ) from None
    for parameter in parameters.values():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if not named or parameter.name not in OWN:
            raise InputError(
                f"loss {name}: it asks for {str(parameter).split(':')[0]!r}: name its parameters "
                f"among {choices}"
            )

    def loss(seen: Seen) -> Tensor:
        given = {parameter: OWN[parameter][0](seen) for parameter in parameters}
        try:
            value = function(**given)
        except Exception as error:
            raise InputError(
                f"loss {name}: it raised {type(error).__name__}: {one_line(error)}"
            ) from error
        if not isinstance(value, Tensor):
            raise InputError(f"loss {name} gave a {type(value).__name__}: return a scalar tensor")
        if value.ndim or not value.is_floating_point():
            raise InputError(
                f"loss {name} gave {value.dtype}, shape {tuple(value.shape)}: return one float, "
                "such as a mean"
            )
        if torch.is_grad_enabled() and not value.requires_grad:
            raise InputError(
                f"loss {name} has no gradient: compute it from outputs, with PyTorch only"
            )
        return value

    needs = {need for parameter in parameters if (need := OWN[parameter][1])}
    return Loss(loss, frozenset(needs | {"teacher"} if "features" in needs else needs))
