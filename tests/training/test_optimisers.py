"""Rates follow their closed formulas, warm-up included, for any number of steps."""

from __future__ import annotations

import math
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from compressor.training.optimisers import LAST, OPTIMISERS, SCHEDULES, scheduled
from compressor.training.settings import Training

NAMES = get_args(get_type_hints(Training)["schedule"])
SHARES = st.floats(0, 0.99) | st.integers(1, 60).map(lambda steps: 1 / steps % 1)


def rates(steps: int, momenta: list[float] | None = None, **given: Any) -> list[float]:
    """The rate of each step, and the momentum or first beta."""
    training = Training(**given)
    optimiser = OPTIMISERS[training.optimizer]([nn.Parameter(torch.zeros(1))], training)
    schedule = scheduled(optimiser, training, steps)
    found = []
    for _ in range(steps):
        group = optimiser.param_groups[0]
        found.append(group["lr"])
        if momenta is not None:
            momenta.append(group["betas"][0] if "betas" in group else group["momentum"])
        optimiser.step()
        schedule.step()
    return found


def cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def one_cycle(steps: int, warmup: float, low: float, high: float, least: float) -> list[float]:
    """From ``low`` to ``high`` in the first steps and to ``least`` in the others."""
    top = warmup * steps - 1
    return [
        cosine(low, high, at / top)
        if at <= top
        else cosine(high, least, (at - top) / (steps - 1 - top))
        for at in range(steps)
    ]


def test_every_name_has_its_function() -> None:
    assert set(OPTIMISERS) == set(get_args(get_type_hints(Training)["optimizer"]))
    assert {*SCHEDULES, "one-cycle"} == set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "one-cycle"])
@given(steps=st.integers(1, 60), warmup=SHARES, peak=st.floats(1e-5, 10))
def test_rates_rise_in_a_line_and_fall_by_their_formula(
    name: str, steps: int, warmup: float, peak: float
) -> None:
    rising = round(warmup * steps)
    falling = max(steps - rising, 1)
    shares = {
        "constant": lambda at: 1.0,
        "step": lambda at: 0.1 ** (at // math.ceil(falling / 3)),
        "exponential": lambda at: LAST ** (at / falling),
        "cosine": lambda at: cosine(1, 0, at / falling),
    }
    wanted = [(at + 1) / (rising + 1) for at in range(rising)]
    wanted += [shares[name](at) for at in range(steps - rising)]
    found = rates(steps, schedule=name, warmup=warmup, learning_rate=peak, optimizer="sgd")
    assert found == pytest.approx([peak * share for share in wanted], rel=1e-6, abs=peak * 1e-9)


@given(steps=st.integers(2, 60), warmup=SHARES, peak=st.floats(1e-5, 10))
@example(5, 0.2, 1.0)
@example(10, 0.1, 1.0)
@example(49, 1 / 49, 1.0)
def test_one_cycle_is_smith_s(steps: int, warmup: float, peak: float) -> None:
    momenta: list[float] = []
    found = rates(steps, momenta, warmup=warmup, learning_rate=peak)
    if warmup * steps == 1:  # a rise of one step begins at the top
        warmup = 0.0
    wanted = one_cycle(steps, warmup, peak / 25, peak, peak / 25 / 1e4)
    assert found == pytest.approx(wanted, rel=1e-6, abs=peak * 1e-9)
    assert momenta == pytest.approx(one_cycle(steps, warmup, 0.95, 0.85, 0.95), rel=1e-6)
    assert max(found) <= peak * (1 + 1e-9)


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "rmsprop"])
def test_a_momentum_that_was_asked_for_stays(schedule: Any, optimizer: Any) -> None:
    momenta: list[float] = []
    rates(20, momenta, schedule=schedule, optimizer=optimizer, momentum=0.7)
    assert momenta == [0.7] * 20


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("warmup", [0, 0.0, 0.2, 0.99])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_every_number_of_steps_has_rates(schedule: Any, warmup: float, steps: int) -> None:
    found = rates(steps, schedule=schedule, warmup=warmup)
    assert len(found) == steps
    assert all(0 < rate <= 3e-3 * (1 + 1e-9) for rate in found)


@pytest.mark.parametrize("schedule", NAMES)
def test_a_single_step_moves_the_weights(schedule: Any) -> None:
    (rate,) = rates(1, schedule=schedule, learning_rate=1.0)
    assert rate > 0.01


@given(name=st.sampled_from(NAMES), warmup=SHARES, steps=st.integers(1, 40), draw=st.data())
def test_a_state_goes_on_where_it_was(
    name: Any, warmup: float, steps: int, draw: st.DataObject
) -> None:
    training = Training(schedule=name, warmup=warmup, learning_rate=0.5)
    whole = rates(steps, schedule=name, warmup=warmup, learning_rate=0.5)
    at = draw.draw(st.integers(0, steps))
    pairs = []
    for _ in range(2):
        optimiser = OPTIMISERS["adam"]([nn.Parameter(torch.zeros(1))], training)
        pairs.append((optimiser, scheduled(optimiser, training, steps)))
    (optimiser, schedule), (other, later) = pairs
    for _ in range(at):
        optimiser.step()
        schedule.step()
    other.load_state_dict(optimiser.state_dict())
    later.load_state_dict(schedule.state_dict())
    found = []
    for _ in range(at, steps):
        found.append(other.param_groups[0]["lr"])
        other.step()
        later.step()
    assert found == whole[at:]
