"""The training loop: what it does is what a bare loop does, and being killed changes nothing."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor import zoo
from compressor.data import read
from compressor.errors import InputError, StageError
from compressor.metrics import METRICS, Metric
from compressor.task import Input, Split, Splits, Task
from compressor.training import loop
from compressor.training.evaluation import evaluate
from compressor.training.loader import batches
from compressor.training.loop import Batch, Epoch, Fitted, Watch, fit
from compressor.training.placing import Placed
from compressor.training.recovery import Aim, recover
from compressor.training.settings import Training
from compressor.training.world import World

State = dict[str, Tensor]
ACCURACY = METRICS["classification"]["accuracy"]
ENTROPY = METRICS["classification"]["cross_entropy"]
OPTIMISERS = get_args(get_type_hints(Training)["optimizer"])
SCHEDULES = get_args(get_type_hints(Training)["schedule"])
TIMES = ("seconds", "examples_per_s")
STEADY = Training(optimizer="sgd", momentum=0.0, schedule="constant", warmup=0.0, learning_rate=0.1)


class Killed(Exception):
    """What ends training from outside."""


def part(source: str, train: int, validate: int = 60) -> Splits:
    whole = read(source).splits
    return Splits(
        whole.train.take(np.arange(train)),
        whole.validate.take(np.arange(validate)),
        whole.calibrate,
        whole.test,
    )


DIGITS, ROWS = part("digits", 110), part("digits-rows", 110)


def mlp(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *extra, nn.ReLU(), nn.Linear(16, 10))


def normal() -> nn.Module:
    return mlp(nn.BatchNorm1d(16), nn.Dropout(0.2))


def pictures() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10)
    )


def recurrent(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return zoo.build(name, {"features": 8, "classes": 10, "hidden": 12})

    return build


def labels(net: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(net(*batch.inputs), batch.targets)


def state_of(*modules: nn.Module) -> State:
    return {
        f"{at}.{name}": value.clone()
        for at, module in enumerate(modules)
        for name, value in module.state_dict().items()
    }


def same(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def timeless(fitted: Fitted) -> tuple[list[Epoch], dict[str, Any]]:
    """What must not depend on the clock."""
    return (
        [{key: value for key, value in one.items() if key not in TIMES} for one in fitted.history],
        {key: value for key, value in fitted.facts.items() if key not in TIMES},
    )


def watched(**given: Callable[..., None]) -> Callable[[int], AbstractContextManager[Watch]]:
    return lambda resumed: nullcontext(Watch(**given))


# Killed and gone on.


def trained(
    build: Callable[[], nn.Module],
    splits: Splits,
    training: Training,
    *,
    keep: Literal["best", "last"] = "best",
    resume: tuple[Path, str] | None = None,
    wrote: int | None = None,
    step: int | None = None,
) -> tuple[State, Any]:
    """All that is trained and told of it; killed once epoch ``wrote`` is, or in step ``step``."""
    model = build()
    torch.manual_seed(1)
    adapter = nn.Linear(10, 10)

    def objective(net: nn.Module, batch: Batch) -> Tensor:
        outputs = net(*batch.inputs)

        def lost(targets: Tensor) -> Tensor:
            own = F.cross_entropy(outputs, targets, label_smoothing=training.smoothing)
            return own + F.cross_entropy(adapter(outputs.float()), targets)

        value = lost(batch.targets)
        if batch.partner is None:
            return value
        return batch.share * value + (1 - batch.share) * lost(batch.targets[batch.partner])

    def end(facts: Epoch, epochs: int, seconds: float) -> None:
        if facts["epoch"] == wrote:  # whole once it is over and where it stands is on disk
            raise Killed

    steps = itertools.count(1)

    def stepped() -> None:
        if next(steps) == step:
            raise KeyboardInterrupt

    fitted = fit(
        model,
        splits,
        objective,
        training,
        metric=("cross_entropy", ENTROPY),
        seed=3,
        beside=[adapter],
        keep=keep,
        resume=resume,
        watching=watched(shown=end, stepped=stepped),
    )
    return state_of(model, adapter), timeless(fitted)


OTHERS = st.fixed_dictionaries(
    {
        "ema": st.sampled_from((0.0, 0.9)),
        "accumulate": st.sampled_from((1, 3)),
        "precision": st.sampled_from(("fp32", "bf16")),
        "smoothing": st.sampled_from((0.0, 0.1)),
        "mixup": st.sampled_from((0.0, 0.4)),
        "augment": st.sampled_from(((), ("noise",))),
        "patience": st.sampled_from((None, 1)),
        "clip": st.sampled_from((None, 1.0)),
        "l1": st.sampled_from((0.0, 1e-4)),
        "weight_decay": st.sampled_from((0.0, 1e-2)),
        "batch_size": st.sampled_from((16, 27)),
        "warmup": st.sampled_from((0.0, 0.2)),
        "learning_rate": st.sampled_from((1e-3, 0.1)),
        "channels_last": st.booleans(),
    }
)


@pytest.mark.parametrize("optimizer", OPTIMISERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@given(
    others=OTHERS,
    build=st.sampled_from((normal, pictures)),
    keep=st.sampled_from(("best", "last")),
    draw=st.data(),
)
@settings(max_examples=4)
def test_what_was_killed_ends_as_if_it_had_not_been(
    tmp_path_factory: pytest.TempPathFactory,
    optimizer: Any,
    schedule: Any,
    others: dict[str, Any],
    build: Callable[[], nn.Module],
    keep: Any,
    draw: st.DataObject,
) -> None:
    training = Training(epochs=3, optimizer=optimizer, schedule=schedule, **others)
    wanted = trained(build, DIGITS, training, keep=keep)
    epochs = len(wanted[1][0])
    stand = tmp_path_factory.mktemp("stand") / "model.training"
    with pytest.raises(Killed):
        trained(
            build,
            DIGITS,
            training,
            keep=keep,
            resume=(stand, "key"),
            wrote=draw.draw(st.integers(1, epochs)),
        )
    torch.rand(draw.draw(st.integers(1, 3)))
    state, told = trained(build, DIGITS, training, keep=keep, resume=(stand, "key"))
    assert told == wanted[1]
    assert same(state, wanted[0])


@pytest.mark.parametrize(
    ("build", "splits"),
    [(normal, DIGITS), (recurrent("lstm"), ROWS), (recurrent("gru"), ROWS)],
    ids=["batchnorm", "lstm", "gru"],
)
def test_killed_again_and_again_in_the_middle_of_an_epoch(
    tmp_path: Path, build: Callable[[], nn.Module], splits: Splits
) -> None:
    training = Training(epochs=3, batch_size=16, ema=0.5)  # 7 steps an epoch
    wanted = trained(build, splits, training)
    resume = (tmp_path / "stand", "key")
    for step in (4, 7, 10, 5, 9):  # counted anew each time
        with pytest.raises(KeyboardInterrupt):
            trained(build, splits, training, resume=resume, step=step)
    state, told = trained(build, splits, training, resume=resume)
    assert told == wanted[1]
    assert same(state, wanted[0])
    # What is finished is not trained again.
    again, told = trained(build, splits, training, resume=resume, step=1)
    assert told == wanted[1]
    assert same(again, wanted[0])


@pytest.mark.parametrize("harm", ["foreign", "cut", "flipped", "empty", "text", "folder"])
def test_what_is_no_state_of_this_training_is_ignored(tmp_path: Path, harm: str) -> None:
    training = Training(epochs=2, batch_size=32)
    wanted = trained(normal, DIGITS, training)
    stand = tmp_path / "stand"
    with pytest.raises(Killed):
        trained(normal, DIGITS, training, resume=(stand, "key"), wrote=1)
    held = stand.read_bytes()
    middle = len(held) - 100
    harmed = {
        "cut": held[:middle],
        "flipped": held[:middle] + bytes([held[middle] ^ 1]) + held[middle + 1 :],
        "empty": b"",
        "text": b"not a state of anything",
    }
    if harm in harmed:
        stand.write_bytes(harmed[harm])
    if harm == "folder":
        stand = tmp_path / "nothing"
    key = "another" if harm == "foreign" else "key"
    seen: list[int] = []
    model = normal()
    fit(
        model,
        DIGITS,
        labels,
        replace(training, epochs=1),
        metric=("cross_entropy", ENTROPY),
        seed=3,
        resume=(stand, key),
        watching=lambda resumed: seen.append(resumed) or nullcontext(Watch()),  # type: ignore[func-returns-value]
    )
    assert seen == [0]
    stand.unlink()
    state, told = trained(normal, DIGITS, training, resume=(stand, key))
    assert told == wanted[1]
    assert same(state, wanted[0])


def test_the_watch_is_told_where_it_goes_on(tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []

    def watching(resumed: int) -> AbstractContextManager[Watch]:
        told.append(("resumed", resumed))

        def wrote(epoch: int, facts: Epoch) -> None:
            assert facts["epoch"] == epoch
            told.append(("wrote", epoch))

        def shown(facts: Epoch, epochs: int, seconds: float) -> None:
            if facts["epoch"] == 2 and resumed == 0:
                raise Killed

        return nullcontext(Watch(shown, wrote))

    def go() -> Fitted:
        return fit(
            mlp(),
            DIGITS,
            labels,
            Training(epochs=4),
            metric=("accuracy", ACCURACY),
            seed=0,
            resume=(tmp_path / "stand", "key"),
            watching=watching,
        )

    with pytest.raises(Killed):
        go()
    history = go().history
    assert [one["epoch"] for one in history] == [1, 2, 3, 4]
    assert told == [
        ("resumed", 0), ("wrote", 1), ("wrote", 2), ("resumed", 2), ("wrote", 3), ("wrote", 4)
    ]  # fmt: skip


def test_recovery_towards_hidden_layers_goes_on_with_its_adapters(tmp_path: Path) -> None:
    reference = mlp().eval()
    lines: list[str] = []

    def killed(text: str) -> None:
        lines.append(text)
        if len(lines) == 2:
            raise Killed

    task = Task(
        "model",
        "classification",
        lambda: copy.deepcopy(reference),
        {},
        (Input("input", (1, 8, 8)),),
        "accuracy",
        splits=DIGITS,
    )
    aim = Aim({"labels": 0.5, "hint": 0.5, "kd": 0.5}, layers=("1=1",))

    def recovered(into: Path | None, task: Task) -> tuple[State, Any]:
        torch.manual_seed(5)
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))
        training = Training(epochs=3, optimizer="adamw", smoothing=0.1, mixup=0.2)
        fitted = recover(student, task, training, aim, into=into, key="key")
        return state_of(student), timeless(fitted)

    wanted = recovered(None, task)
    with pytest.raises(Killed):
        recovered(tmp_path / "student", replace(task, watch=killed))
    state, told = recovered(tmp_path / "student", task)
    assert told == wanted[1]
    assert same(state, wanted[0])


# What a bare loop does.


def bare(
    model: nn.Module,
    splits: Splits,
    training: Training,
    optimiser: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
    *,
    seed: int,
    cycle: bool = False,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = lambda net, x, y: F.cross_entropy(
        net(x), y
    ),
    stepped: Callable[[], None] = lambda: None,
) -> State:
    """A loop as people write it; the weights that do best on validate."""
    assert training.epochs is not None
    size, train = training.batch_size, splits.train
    given = optimiser(model.parameters())
    total = training.epochs * math.ceil(len(train) / size)
    schedule = (
        torch.optim.lr_scheduler.OneCycleLR(
            given, max_lr=training.learning_rate, total_steps=total, pct_start=0.2
        )
        if cycle
        else None
    )
    order = np.random.default_rng(seed)

    def judged() -> float:
        model.eval()
        (inputs,), targets = splits.validate.head(len(splits.validate))
        with torch.no_grad():
            outputs = model(torch.from_numpy(inputs))
        return float((outputs.argmax(1).numpy() == targets).mean())

    best, kept = judged(), copy.deepcopy(model.state_dict())
    for _ in range(training.epochs):
        model.train()
        at = order.permutation(len(train))
        for start in range(0, len(train), size):
            (inputs,), targets = train.take(at[start : start + size]).head(size)
            given.zero_grad()
            loss(model, torch.from_numpy(inputs), torch.from_numpy(targets)).backward()
            given.step()
            if schedule:
                schedule.step()
            stepped()
        if (reached := judged()) > best:
            best, kept = reached, copy.deepcopy(model.state_dict())
    return kept


def fitted(model: nn.Module, training: Training, splits: Splits = DIGITS, **given: Any) -> Fitted:
    objective = given.pop("objective", labels)
    how = {"metric": ("accuracy", ACCURACY), "seed": 0, **given}
    return fit(model, splits, objective, training, **how)


@pytest.mark.parametrize(
    ("build", "splits"),
    [
        (mlp, part("digits", 601, 250)),
        (pictures, part("digits", 202, 150)),
        (recurrent("lstm"), part("digits-rows", 601, 250)),
    ],
    ids=["mlp", "batchnorm", "lstm"],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_by_default_it_is_adam_under_one_cycle(
    build: Callable[[], nn.Module], splits: Splits, seed: int
) -> None:
    ours, theirs = build(), build()
    training = Training(epochs=12)
    found = fitted(ours, training, splits, seed=seed)
    kept = bare(
        theirs,
        splits,
        training,
        lambda own: torch.optim.Adam(own, lr=3e-3, fused=True),
        seed=seed,
        cycle=True,
    )
    assert same(ours.state_dict(), kept)
    assert found.history[-1]["loss"] < found.history[0]["loss"]
    assert found.facts["best_epoch"] > 0
    assert not ours.training


PEERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda own: torch.optim.Adam(own, 0.02, weight_decay=0.3, fused=True),
    "adamw": lambda own: torch.optim.AdamW(own, 0.02, weight_decay=0.3, fused=True),
    "sgd": lambda own: torch.optim.SGD(own, 0.02, 0.8, weight_decay=0.3),
    "nesterov": lambda own: torch.optim.SGD(own, 0.02, 0.8, weight_decay=0.3, nesterov=True),
    "rmsprop": lambda own: torch.optim.RMSprop(own, 0.02, momentum=0.8, weight_decay=0.3),
}


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_every_optimiser_is_torch_s(optimizer: Any) -> None:
    ours, theirs = mlp(), mlp()
    training = Training(
        epochs=2,
        learning_rate=0.02,
        optimizer=optimizer,
        schedule="constant",
        warmup=0.0,
        momentum=0.8,
        weight_decay=0.3,
        batch_size=32,
    )
    fitted(ours, training)
    assert same(ours.state_dict(), bare(theirs, DIGITS, training, PEERS[optimizer], seed=0))


@given(
    count=st.integers(5, 70),
    size=st.integers(2, 9),
    accumulate=st.integers(2, 5),
    decay=st.sampled_from((0.0, 0.1)),
    l1=st.sampled_from((0.0, 0.01)),
    clip=st.sampled_from((None, 0.05)),
    schedule=st.sampled_from(SCHEDULES),
)
@settings(max_examples=15)
def test_small_steps_add_up_to_large_ones(
    count: int,
    size: int,
    accumulate: int,
    decay: float,
    l1: float,
    clip: float | None,
    schedule: Any,
) -> None:
    splits = replace(DIGITS, train=DIGITS.train.take(np.arange(count)))
    states = []
    for batch_size, times in ((size, accumulate), (size * accumulate, 1)):
        model = mlp()
        training = replace(
            STEADY,
            epochs=2,
            batch_size=batch_size,
            accumulate=times,
            weight_decay=decay,
            l1=l1,
            clip=clip,
            schedule=schedule,
            warmup=0.2,
        )
        history = fitted(model, training, splits, keep="last").history
        states.append((state_of(model), [one["loss"] for one in history]))
    (one, lost), (two, also) = states
    assert lost == pytest.approx(also, rel=1e-5)
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=1e-6)


@given(clip=st.floats(1e-2, 10), rate=st.floats(0.1, 1))
@settings(max_examples=10)
def test_a_clipped_step_is_no_longer_than_its_rate_allows(clip: float, rate: float) -> None:
    model = mlp()
    seen = [nn.utils.parameters_to_vector(model.parameters()).detach()]
    training = replace(STEADY, epochs=2, learning_rate=rate, clip=clip, batch_size=16)

    def look() -> None:  # before the step of the optimiser
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach())

    fitted(model, training, keep="last", watching=watched(stepped=look))
    look()
    lengths = [float((b - a).norm()) for a, b in itertools.pairwise(seen[1:])]
    assert len(lengths) == 14
    assert max(lengths) <= rate * clip + 1e-6  # what rounding of the weights may add
    if clip < 0.1:  # the gradient is longer than that: every step is cut
        assert min(lengths) == pytest.approx(rate * clip, abs=1e-6)


def test_l1_adds_the_sum_of_the_sizes_of_all_weights() -> None:
    ours, theirs = mlp(), mlp()
    training = replace(STEADY, epochs=2, l1=0.003, batch_size=32)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        sizes = sum(one.abs().sum() for one in net.parameters())
        return F.cross_entropy(net(x), y) + 0.003 * sizes

    kept = bare(theirs, DIGITS, training, lambda own: torch.optim.SGD(own, 0.1), seed=0, loss=loss)
    fitted(ours, training)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, kept[name], rtol=0, atol=1e-6)
    other = mlp()
    fitted(other, replace(training, l1=0.0))
    assert not same(ours.state_dict(), other.state_dict())


def test_l1_leaves_frozen_weights_alone() -> None:
    model = mlp()
    model.get_submodule("1").requires_grad_(False)
    before = state_of(model)
    fitted(model, replace(STEADY, epochs=1, l1=0.5, weight_decay=0.5), keep="last")
    after = state_of(model)
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        "0.1.weight",
        "0.1.bias",
    }


def test_averaged_weights_are_those_that_are_judged_and_stay() -> None:
    ours, theirs = mlp(), mlp()
    training = replace(STEADY, epochs=3, ema=0.8, batch_size=32)
    steps: list[State] = [state_of(theirs)]
    bare(
        theirs,
        DIGITS,
        training,
        lambda own: torch.optim.SGD(own, 0.1),
        seed=0,
        stepped=lambda: steps.append(state_of(theirs)),
    )
    found = fitted(ours, training, metric=("cross_entropy", ENTROPY))
    averages = {name: value.double().numpy() for name, value in steps[0].items()}
    judged: list[tuple[float, dict[str, Any]]] = []
    for at, state in enumerate(steps[1:]):
        decay = min(0.8, (1 + at) / (10 + at))
        averages = {
            name: decay * value + (1 - decay) * state[name].double().numpy()
            for name, value in averages.items()
        }
        if (at + 1) % 4 == 0:  # an epoch
            one = mlp()
            one.load_state_dict(
                {name[2:]: torch.from_numpy(value) for name, value in averages.items()}
            )
            judged.append((evaluate(one, DIGITS.validate, ENTROPY), averages))
    assert [one["cross_entropy"] for one in found.history] == pytest.approx(
        [value for value, _ in judged], rel=1e-5
    )
    _, best = min(judged, key=lambda each: each[0])
    for name, value in state_of(ours).items():
        np.testing.assert_allclose(value.numpy(), best[name], rtol=0, atol=1e-6)


def test_half_precision_computes_in_half_and_keeps_whole_weights() -> None:
    seen: set[torch.dtype] = set()

    def objective(net: nn.Module, batch: Batch) -> Tensor:
        outputs = net(*batch.inputs)
        seen.add(outputs.dtype)
        return F.cross_entropy(outputs.float(), batch.targets)

    model = mlp()
    history = fitted(model, Training(epochs=3, precision="bf16"), objective=objective).history
    assert seen == {torch.bfloat16}
    assert {one.dtype for one in model.state_dict().values()} == {torch.float32}
    whole = fitted(mlp(), Training(epochs=3)).history
    assert [one["loss"] for one in history] == pytest.approx(
        [one["loss"] for one in whole], rel=2e-2
    )


def test_every_example_is_seen_once_an_epoch_with_its_position() -> None:
    seen: list[int] = []
    train = replace(DIGITS, train=Split.arrays(DIGITS.train.head(50)[0], np.arange(50)))

    def objective(net: nn.Module, batch: Batch) -> Tensor:
        assert batch.targets.tolist() == batch.at.tolist()
        seen.extend(batch.at.tolist())
        return net(*batch.inputs).square().mean()

    fitted(mlp(), Training(epochs=2, batch_size=7), train, objective=objective)
    assert sorted(seen[:50]) == sorted(seen[50:]) == list(range(50))
    assert seen[:50] != seen[50:]


@pytest.mark.parametrize("count", [17, 33])
def test_one_example_left_over_counts_where_no_statistics_are_taken_of_it(count: int) -> None:
    splits = replace(DIGITS, train=DIGITS.train.take(np.arange(count)))
    for build, seen in ((mlp, count), (normal, count - 1)):
        given: list[int] = []

        def objective(net: nn.Module, batch: Batch, given: list[int] = given) -> Tensor:
            given.extend(batch.at.tolist())
            return labels(net, batch)

        fitted(build(), Training(epochs=1, batch_size=16), splits, objective=objective)
        assert len(given) == seen


# When it ends, and with which weights.


def scripted(values: list[float], higher: bool = True) -> Metric:
    """A metric that is told what it will be."""
    coming = iter(values)
    return Metric(lambda outputs, targets: np.full(len(outputs), next(coming)), higher)


@given(
    values=st.lists(st.sampled_from((0.125, 0.25, 0.5, 0.75)), min_size=7, max_size=7),
    patience=st.none() | st.integers(1, 4),
    higher=st.booleans(),
    keep=st.sampled_from(("best", "last")),
    ema=st.sampled_from((0.0, 0.5)),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_patience_and_the_weights_that_stay(
    values: list[float], patience: int | None, higher: bool, keep: Any, ema: float
) -> None:
    epochs = len(values) - 1
    sign = 1 if higher else -1
    best, found, last = sign * values[0], 0, epochs
    for epoch, value in enumerate(values[1:], 1):
        if sign * value > best:
            best, found = sign * value, epoch
        if patience and epoch - found >= patience and epoch < epochs:
            last = epoch
            break
    model = mlp()
    at = {0: state_of(model)}
    judged = scripted(values, higher)
    assert judged.score is not None
    score, seen = judged.score, itertools.count()

    def look(outputs: Any, targets: Any) -> Any:  # the weights as they are judged
        at[next(seen)] = state_of(model)
        return score(outputs, targets)

    training = replace(STEADY, epochs=epochs, patience=patience, ema=ema)
    small = replace(DIGITS, train=DIGITS.train.take(np.arange(16)))
    result = fitted(model, training, small, metric=("mine", Metric(look, higher)), keep=keep)
    assert [one["mine"] for one in result.history] == values[1 : last + 1]
    stays = found if keep == "best" else last
    assert result.facts["best_epoch"] == stays
    assert result.facts["epochs"] == last
    why = f"no better mine in {patience} epochs" if last < epochs else None
    assert result.facts["stopped"] == why
    assert same(state_of(model), at[stays])


@pytest.fixture(params=[1, 2, 5, 32], ids=lambda looks: f"looks-{looks}")
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Losses are looked at every so many steps, as where looking waits for a device."""
    count: int = request.param

    class Several(int):
        """One process that is not taken for a world of one."""

        def __eq__(self, other: object) -> bool:
            return False

        __hash__ = int.__hash__

    if count > 1:
        monkeypatch.setattr(loop, "LOOKS", count)
        monkeypatch.setattr(loop, "here", lambda: World(size=Several(1)))
        monkeypatch.setattr(loop, "Placed", lambda model, how, world: Placed(model, how, World()))
    return count


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 4, 7, 8, 11])
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_loss_that_is_no_number_is_named_and_the_best_weights_stay(
    looks: int, at: int, bad: float, ema: float
) -> None:
    model, steps = mlp(), itertools.count(1)
    judged: list[State] = []

    def objective(net: nn.Module, batch: Batch) -> Tensor:
        return labels(net, batch) * (bad if next(steps) >= at else 1.0)

    def score(outputs: Any, targets: Any) -> Any:
        judged.append(state_of(model))
        return np.full(len(outputs), float(len(judged)))

    training = replace(STEADY, epochs=3, batch_size=16, ema=ema)
    with pytest.raises(StageError) as caught:
        fitted(model, training, objective=objective, metric=("mine", Metric(score)))
    epoch, step = divmod(at - 1, 7)
    said = str(caught.value)
    assert said.startswith(f"the loss became {bad} in epoch {epoch + 1}, step {step + 1}; ")
    assert "lower learning_rate (0.1)" in said
    assert "\n" not in said
    assert len(judged) == epoch + 1
    assert same(state_of(model), judged[-1])


def test_how_often_losses_are_looked_at_changes_nothing(looks: int) -> None:
    model = mlp()
    seen: list[float] = []

    def objective(net: nn.Module, batch: Batch) -> Tensor:
        value = labels(net, batch)
        seen.extend([value.item()] * len(batch.at))
        return value

    history = fitted(model, Training(epochs=2, batch_size=16), objective=objective).history
    means = np.array(seen).reshape(2, -1).mean(axis=1)
    assert [one["loss"] for one in history] == pytest.approx(means.tolist(), rel=1e-6)
    if looks == 1:
        return
    plain = mlp()
    kept = bare(
        plain,
        DIGITS,
        Training(epochs=2, batch_size=16),
        lambda own: torch.optim.Adam(own, lr=3e-3, fused=True),
        seed=0,
        cycle=True,
    )
    assert same(model.state_dict(), kept)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_metric_that_is_no_number_is_named_and_the_best_weights_stay(
    bad: float, keep: Any, ema: float
) -> None:
    model = mlp()
    judged: list[State] = []
    coming = scripted([0.1, 0.3, bad])
    assert coming.score is not None
    score = coming.score

    def look(outputs: Any, targets: Any) -> Any:
        judged.append(state_of(model))
        return score(outputs, targets)

    with pytest.raises(StageError, match=r"^the mine on validate became -?(nan|inf) in epoch 2; "):
        fitted(model, replace(STEADY, epochs=3, ema=ema), metric=("mine", Metric(look)), keep=keep)
    assert same(state_of(model), judged[1])


@pytest.mark.parametrize("keep", ["best", "last"])
def test_weights_that_are_no_numbers_never_stay(keep: Any) -> None:
    """Every number is as large as NaN to ``argmax``: its first class may be right by chance."""
    model = mlp()
    with torch.no_grad():
        list(model.parameters())[-1].copy_(torch.eye(10)[9] * 50)  # says 9 to everything
    zeros = Split.arrays(DIGITS.validate.head(40)[0], np.zeros(40, np.int64))
    splits = replace(DIGITS, train=DIGITS.train.take(np.arange(20)), validate=zeros)

    def objective(net: nn.Module, batch: Batch) -> Tensor:
        return labels(net, batch) * 1e30

    with pytest.raises(StageError, match="epoch 1"):
        fitted(
            model,
            replace(STEADY, epochs=1, learning_rate=1e30, batch_size=32),
            splits,
            objective=objective,
            keep=keep,
        )
    assert all(torch.isfinite(one).all() for one in model.state_dict().values())


def test_what_could_not_be_judged_before_is_judged_after() -> None:
    """NaN before training is no mark that later epochs have to pass."""
    model = mlp()
    result = fitted(
        model, replace(STEADY, epochs=2), metric=("mine", scripted([math.nan, 0.5, 0.4]))
    )
    assert result.facts["best_epoch"] == 1
    assert not same(state_of(model), state_of(mlp()))


def test_readers_end_with_training_however_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []

    def kept(*given: Any, **named: Any) -> Any:
        held.append(batches(*given, **named))
        return held[-1]

    monkeypatch.setattr(loop, "batches", kept)
    steps = itertools.count(1)

    def stepped() -> None:
        if next(steps) == 3:
            raise KeyboardInterrupt

    training = Training(epochs=1, batch_size=16, workers=2)
    with pytest.raises(KeyboardInterrupt):
        fitted(mlp(), training, watching=watched(stepped=stepped))
    assert held[0].gi_frame is None  # closed, its threads with it


def test_the_rate_of_an_epoch_is_that_of_its_last_step() -> None:
    for schedule in SCHEDULES:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
        training = replace(STEADY, epochs=4, batch_size=32, schedule=schedule, warmup=0.2)
        seen = [float(next(iter(model[1].parameters())).detach()[0, 0])]

        def objective(net: nn.Module, batch: Batch) -> Tensor:
            # A gradient of 1: a step is its rate.
            return net[1].weight.sum() + 0 * net(*batch.inputs).sum()  # type: ignore[index]

        def look(seen: list[float] = seen, model: nn.Module = model) -> None:
            seen.append(float(model[1].weight.detach()[0, 0]))  # type: ignore[index]

        # Four steps an epoch; looked at before each step of the optimiser and at the end.
        result = fitted(
            model,
            training,
            objective=objective,
            keep="last",
            watching=watched(stepped=look),
            metric=("mine", scripted([0.0] * 5)),
        )
        look()
        steps = [a - b for a, b in itertools.pairwise(seen[1:])]
        rates = [one["rate"] for one in result.history]
        assert rates == pytest.approx(steps[3::4], abs=1e-6), schedule


# What it leaves as it was, and what it says.


def test_the_caller_s_random_numbers_threads_and_gradients_stay() -> None:
    model = normal()
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():
        result = fitted(model, Training(epochs=1, augment=("noise",), mixup=0.2))
        assert not torch.is_grad_enabled()
    assert result.history[0]["loss"] > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_dropout_differs_between_epochs() -> None:
    masks: list[Tensor] = []
    drop = nn.Dropout(0.5)
    drop.register_forward_hook(
        lambda module, given, made: masks.append(made.detach() == 0) if module.training else None
    )
    small = replace(DIGITS, train=DIGITS.train.take(np.arange(30)))
    fitted(mlp(drop), Training(epochs=3, batch_size=32), small)
    assert len(masks) == 3
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_facts_say_what_was_done() -> None:
    model = mlp()
    model.get_submodule("1").requires_grad_(False)
    result = fitted(model, Training(epochs=2, optimizer="sgd", device="cpu"))
    assert result.facts["parameters"] == 16 * 10 + 10
    told = {key: result.facts[key] for key in ("epochs", "device", "precision", "processes")}
    assert told == {"epochs": 2, "device": "cpu", "precision": "fp32", "processes": 1}
    assert result.facts["optimizer"] == "sgd"


def test_examples_are_counted_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # a second passes at every look at it
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    result = fitted(mlp(), Training(epochs=2, batch_size=32))
    for one in result.history:
        # A look at the end of each of four steps, another at the end of the epoch.
        assert (one["seconds"], one["examples_per_s"]) == (5.0, 22.0)
    assert result.facts["examples_per_s"] == 22.0


def test_progress_is_told_within_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # a second passes at every look at it
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    shown: list[tuple[float, int]] = []
    fitted(
        mlp(),
        Training(epochs=2, batch_size=32),
        watching=watched(
            shown=lambda facts, epochs, seconds: shown.append((facts["epoch"], epochs))
        ),
    )
    assert shown == [(at, 2) for at in (0.25, 0.5, 0.75, 1.0, 1, 1.25, 1.5, 1.75, 2.0, 2)]


def test_a_user_s_augmentation_that_fails_is_one_line() -> None:
    def broken(batch: Tensor) -> Tensor:
        raise ValueError("no\nluck")

    with pytest.raises(InputError, match="mine:broken") as caught:
        fitted(
            mlp(), Training(epochs=1, augment=("mine:broken",)), functions={"mine:broken": broken}
        )
    assert "\n" not in str(caught.value)
