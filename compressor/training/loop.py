"""The training loop: one function that reads from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.errors import StageError
from compressor.measure.threads import threads_for
from compressor.metrics import Metric
from compressor.task import Splits
from compressor.training import saved
from compressor.training.augment import augmentation, span
from compressor.training.average import Average
from compressor.training.evaluation import evaluate
from compressor.training.loader import automatic, batches, resident
from compressor.training.mixing import mix
from compressor.training.optimisers import OPTIMISERS, scheduled
from compressor.training.placing import Placed, clipped, compiling, undisturbed
from compressor.training.saved import Stand
from compressor.training.settings import Training
from compressor.training.world import World, here, reduced

Epoch = dict[str, float]

Positions = NDArray[np.intp]

RESIDENT = 1 << 30
"""Bytes of a training split that is read once and then held; a larger one is read every epoch."""

LOOKS = 32
"""Steps after which losses are looked at where looking waits for a device or another process."""

KEPT = ("history", "best", "found", "spent")
"""What the loop itself keeps beside what training moves."""

SAVED = 1.0
"""Seconds that are lost at most when training is killed, beside the epoch that was under way: what
the state of a small network costs to write is more than its epoch."""

SHOWN = 1.0
"""Seconds between two looks at an epoch's progress."""


class Batch(NamedTuple):
    """What one step sees, on the device: ``inputs``, shapes ``(n, ...)``, and ``targets``.

    ``at`` are the positions of the examples in the training split. Where examples were mixed,
    example ``i`` is ``share`` of itself and the rest of ``partner[i]``.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor
    at: Positions
    partner: Tensor | None = None
    share: float = 1.0


Objective = Callable[[nn.Module, Batch], Tensor]
"""``objective(net, batch)`` runs the network and gives the mean loss of the batch's examples."""


class Fitted(NamedTuple):
    """What training gave: the ``history``, an entry for each epoch, and ``facts`` of the whole."""

    history: list[Epoch]
    facts: dict[str, Any]


class Watch(NamedTuple):
    """Who is told how training goes.

    ``shown(facts, epochs, seconds)`` gets the facts so far, ``facts["epoch"]`` whole at the end of
    an epoch and in between before that, and the seconds since training began; ``wrote(epoch,
    facts)`` every finished epoch; ``stepped()`` every step.
    """

    shown: Callable[[Epoch, int, float], None] = lambda facts, epochs, seconds: None
    wrote: Callable[[int, Epoch], None] = lambda epoch, facts: None
    stepped: Callable[[], None] = lambda: None


Watching = Callable[[int], AbstractContextManager[Watch]]
"""Opened once training begins, with the number of epochs that were finished before."""


def unwatched(resumed: int) -> AbstractContextManager[Watch]:
    """Nobody is told."""
    return nullcontext(Watch())


def fit(
    model: nn.Module,
    splits: Splits,
    objective: Objective,
    training: Training,
    *,
    metric: tuple[str, Metric],
    seed: int,
    functions: Mapping[str, Callable[..., Any]] = {},
    beside: Sequence[nn.Module] = (),
    keep: Literal["best", "last"] = "best",
    resume: tuple[Path, str] | None = None,
    watching: Watching = unwatched,
) -> Fitted:
    """Trains ``model`` in place, as ``training`` says, which names the epochs.

    ``objective`` is minimised over ``splits.train``. After every epoch the ``metric`` (its name,
    and how it is computed) is taken on ``splits.validate``; the ``best`` weights seen, those before
    training included, are the ones that stay, or the ``last``. ``functions`` are the user's own,
    by name; the parameters of the modules ``beside`` train along. ``resume`` names a file where
    training stands after every epoch and a key of what is trained: with the same key it goes on
    from there.

    The same seed gives the same weights on the same machine and threads, resumed or not. With
    several processes (:mod:`compressor.training.world`) each takes its share of every batch, and
    gradients are averaged: the same steps as one process takes, but for the statistics of batch
    normalisation on the CPU, which each process takes of its own share.

    Raises :class:`StageError` when the loss or the metric becomes NaN or infinite; the model then
    holds its best weights.
    """
    assert training.epochs is not None
    train, epochs = resident(splits.train, RESIDENT), training.epochs
    if len(train) < _least(model):
        raise StageError("one example is too few for batch normalisation: add some")
    world, name, how = here(), *metric
    with ExitStack() as open_:
        open_.enter_context(threads_for(model, train.head(1)[0], training.batch_size, world.local))
        # Dropout draws from the global generator, whose state is the caller's.
        open_.enter_context(torch.random.fork_rng())
        open_.enter_context(torch.enable_grad())
        open_.enter_context(undisturbed())
        open_.enter_context(compiling(training))
        placed = Placed(model, training, world)
        device = placed.device
        aside = [parameter for one in beside for parameter in one.parameters()]
        moved = [one for one in placed.inner.parameters() if one.requires_grad]
        optimiser = OPTIMISERS[training.optimizer]([*moved, *aside], training)
        scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "fp16")
        average = Average(placed.inner, training.ema) if training.ema else None
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.precision)
        changed = _changed(training, splits, functions)
        workers = automatic(train) if training.workers is None else training.workers
        order = np.random.default_rng(seed)
        least = _least(model)
        count = len(_steps(np.arange(len(train)), training.batch_size, least))
        schedule = scheduled(optimiser, training, epochs * math.ceil(count / training.accumulate))
        looks = 1 if device.type == "cpu" and world.size == 1 else LOOKS

        def minimised(net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            value = objective(net, batch)
            if not training.l1:
                return value.detach(), value
            return value.detach(), value + training.l1 * sum(one.abs().sum() for one in moved)

        stepped = placed.joint(minimised, beside)
        stand = Stand(placed, optimiser, schedule, scaler, average, beside)
        best, kept, found = evaluate(placed.inner, splits.validate, how), placed.state(), 0
        never = math.isnan(best)
        history: list[Epoch] = []
        spent, stopped = 0.0, None
        if resume and (stood := world.told(saved.read(*resume) if world.leader else None)):
            kept = stand.restore(*stood)
            history, best, found, spent = (stood[1][key] for key in KEPT)
            for _ in history:
                order.permutation(len(train))

        def check(title: str, value: float, where: str) -> None:
            if not math.isfinite(value):
                placed.put(kept)
                if never and title.endswith("on validate"):
                    raise StageError(
                        f"the {title} is not defined on its {len(splits.validate)} examples, "
                        "before training or after: a class may be missing there; choose another "
                        "--metric, or give more of them"
                    )
                raise StageError(
                    f"the {title} became {value} in {where}; the best weights were put back: "
                    f"lower learning_rate ({training.learning_rate:g}), or clip the gradient"
                )

        watch = open_.enter_context(watching(len(history)))
        written = time.monotonic()
        began = written - spent
        for epoch in range(len(history) + 1, epochs + 1):
            if training.patience and epoch - 1 - found >= training.patience:
                stopped = f"no better {name} in {training.patience} epochs"
                break
            # Each epoch from a seed of its own: one that is resumed draws what it would have drawn.
            _reseed(_seed(seed, epoch, world.rank), device)
            placed.inner.train()
            steps = _steps(order.permutation(len(train)), training.batch_size, least)
            # A step too small to share is everybody's.
            shares = [world.mine(at) if len(at) >= least * world.size else at for at in steps]
            fed = batches(train, shares, workers=workers, pin=device.type == "cuda")
            open_.callback(fed.close)
            unseen: list[Tensor] = []
            total, seen = 0.0, 0
            started = shown = time.monotonic()
            for number, (given, step, share) in enumerate(zip(fed, steps, shares, strict=True)):
                batch = changed(_laid(given, share, device, training.channels_last))
                window = _window(steps, number, training.accumulate)
                last = step is window[-1]
                own = len(share) if len(share) < len(step) else len(step) / world.size
                part = own * world.size / sum(map(len, window))
                with placed.quiet(last):
                    with torch.autocast(device.type, half) if half else nullcontext():
                        mean, value = stepped(batch)
                    unseen.append(mean if world.size == 1 else mean * (own / len(step)))
                    if len(unseen) == looks or step is steps[-1]:
                        first = number + 1 - len(unseen)
                        for at, one in enumerate(_looked(unseen, world), first):
                            check("loss", one, f"epoch {epoch}, step {at + 1}")
                            total, seen = total + one * len(steps[at]), seen + len(steps[at])
                        unseen.clear()
                    scaler.scale(value if part == 1 else value * part).backward()
                watch.stepped()
                if not last:
                    continue
                if training.shard:
                    reduced([one.grad for one in aside], world)
                if training.clip:
                    scaler.unscale_(optimiser)
                    clipped([*moved, *aside], training.clip)
                scaler.step(optimiser)
                scaler.update()
                optimiser.zero_grad(set_to_none=True)
                rate = float(schedule.get_last_lr()[0])
                schedule.step()
                if average:
                    average.update()
                if (now := time.monotonic()) - shown >= SHOWN and seen:
                    shown, done = now, epoch - 1 + (number + 1) / len(steps)
                    so_far = {"loss": total / seen, "examples_per_s": seen / (now - started)}
                    watch.shown({"epoch": done, **so_far}, epochs, now - began)
            trained = time.monotonic() - started
            # NaN is a class like any other to an accuracy.
            sound = all(bool(one.isfinite().all()) for one in moved)
            check("weights", 0.0 if sound else math.nan, f"epoch {epoch}")
            with average.worn() if average else nullcontext():
                world.alike(placed.inner.buffers())  # batch statistics are each process's own
                reached = evaluate(placed.inner, splits.validate, how)
                judged = placed.state()
            # Not while the average is worn: taking it off would undo what is put back.
            check(f"{name} on validate", reached, f"epoch {epoch}")
            better = reached > best if how.higher_is_better else reached < best
            if better or math.isnan(best):
                best, found, better = reached, epoch, True
            if better or keep == "last":
                kept = judged
            history.append({"epoch": epoch, "loss": total / seen, name: reached})
            history[-1] |= {
                "rate": rate,
                "seconds": round(trained, 3),
                "examples_per_s": round(seen / trained, 1),
            }
            spent = time.monotonic() - began
            watch.wrote(epoch, history[-1])  # first: what is written again is dropped before
            due = time.monotonic() - written >= SAVED
            if resume and due and world.leader and not training.shard:
                written = time.monotonic()
                stands = zip(KEPT, (history, best, found, spent), strict=True)
                stand.write(*resume, kept, dict(stands))
            watch.shown(history[-1], epochs, spent)
        placed.put(kept)
        placed.back(model)
        return Fitted(
            history,
            {
                "epochs": len(history),
                "best_epoch": found if keep == "best" else len(history),
                "stopped": stopped,
                "seconds": round(spent, 3),
                "examples_per_s": _rate(history),
                "device": str(device),
                "precision": training.precision,
                "processes": world.size,
                "optimizer": training.optimizer,
                "parameters": sum(one.numel() for one in model.parameters() if one.requires_grad),
            },
        )


def _steps(order: Positions, size: int, least: int) -> list[Positions]:
    """The positions of each step; a last one that is too small is left out, unless it is all."""
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return [part for part in parts if len(part) >= least] or parts


def _least(model: nn.Module) -> int:
    """Examples that a process needs for a step: two where statistics are taken of them."""
    return 2 if any(isinstance(module, _BatchNorm) for module in model.modules()) else 1


def _window(steps: list[Positions], number: int, accumulate: int) -> list[Positions]:
    """The steps whose gradients are added to those of step ``number``."""
    first = number - number % accumulate
    return steps[first : first + accumulate]


def _laid(
    given: tuple[tuple[Tensor, ...], Tensor], at: Positions, device: torch.device, last: bool
) -> Batch:
    """The batch on its device, pictures with their channels ``last`` if asked."""
    inputs = tuple(part.to(device, non_blocking=True) for part in given[0])
    if last:
        inputs = tuple(
            part.contiguous(memory_format=torch.channels_last) if part.ndim == 4 else part
            for part in inputs
        )
    return Batch(inputs, given[1].to(device, non_blocking=True), at)


def _looked(losses: list[Tensor], world: World) -> list[float]:
    """The values of losses, each summed over the processes."""
    if len(losses) == 1 and world.size == 1:
        return [losses[0].item()]  # a stack of one costs a small network a percent
    values = torch.stack(losses).float()
    world.sums(values)
    return values.tolist()


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _reseed(seed: int, device: torch.device) -> None:
    # ``torch.manual_seed`` notes who called it, for every kind of device: in 0.25 ms.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _rate(history: list[Epoch]) -> float | None:
    """Examples per second over all epochs, evaluation left out."""
    seconds = sum(one["seconds"] for one in history)
    seen = sum(one["examples_per_s"] * one["seconds"] for one in history)
    return round(seen / seconds, 1) if seconds else None


def _changed(
    training: Training, splits: Splits, functions: Mapping[str, Callable[..., Any]]
) -> Callable[[Batch], Batch]:
    """What augments and mixes a batch, as asked."""
    augment: Callable[[Tensor], Tensor] = lambda pictures: pictures  # noqa: E731
    if training.augment:
        example = torch.from_numpy(splits.train.head(2)[0][0])
        low, high = span(splits.train)
        augment = augmentation(training.augment, example, low, high, functions)

    def changed(batch: Batch) -> Batch:
        pictures, *others = batch.inputs
        inputs = (augment(pictures), *others)
        if not (training.mixup or training.cutmix):
            return batch._replace(inputs=inputs)
        mixed, partner, share = mix(inputs, training.mixup, training.cutmix)
        return batch._replace(inputs=mixed, partner=partner, share=share)

    return changed
