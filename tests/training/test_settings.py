"""Settings of training: what goes together, and the same through a recipe as it was given."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from compressor import recipe
from compressor.errors import InputError
from compressor.recipe import Step
from compressor.stages import STAGES, TRAINING, bound, settings_of
from compressor.training.settings import DEFAULT, Training, together

STAGES_THAT_TRAIN = tuple(
    name for name, stage in STAGES.items() if {*TRAINING} <= settings_of(stage).keys()
)
NUMBERS = st.floats(0, 1e6)
SHARES = st.floats(0, 1, exclude_max=True)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "epochs": st.none() | st.integers(1, 10**6),
    "learning_rate": st.floats(0, 1e6, exclude_min=True),
    "batch_size": st.integers(2, 10**6),
    "momentum": SHARES,
    "weight_decay": NUMBERS,
    "l1": NUMBERS,
    "warmup": SHARES,
    "patience": st.none() | st.integers(1, 10**6),
    "smoothing": SHARES,
    "mixup": NUMBERS,
    "cutmix": NUMBERS,
    "clip": st.none() | st.floats(0, 1e6, exclude_min=True),
    "accumulate": st.integers(1, 10**6),
    "ema": SHARES,
    "augment": st.sampled_from(((), ("flip",), ("flip", "crop=4", "noise=0.1"), ("./a.py:b",))),
    "channels_last": st.booleans(),
    "compile": st.booleans(),
    "shard": st.booleans(),
    "workers": st.none() | st.integers(0, 64),
    **{
        name: st.sampled_from(get_args(get_type_hints(Training)[name]))
        for name in ("optimizer", "schedule", "precision", "device")
    },
}
TRAININGS = st.fixed_dictionaries({}, optional=VALUES)


def fitting(given: dict[str, Any]) -> bool:
    try:
        together(**given)
    except InputError:
        return False
    return True


FIT = TRAININGS.filter(fitting)


def test_every_setting_is_drawn_here() -> None:
    assert VALUES.keys() == {field.name for field in fields(Training)} == {*TRAINING}
    assert {"distill", "qat", "sparsify"} <= {*STAGES_THAT_TRAIN}


@given(given=FIT)
@examples(max_examples=40)
def test_plain_values_are_the_settings(given: dict[str, Any]) -> None:
    training = Training(**given)
    plain = json.loads(json.dumps(training.to_json(), allow_nan=False))
    assert list(plain) == list(TRAINING)
    again = Training(**{**plain, "augment": tuple(plain["augment"])})
    assert again == training
    assert hash(again) == hash(training)


@pytest.mark.parametrize("stage", STAGES_THAT_TRAIN)
@given(given=FIT)
@examples(max_examples=40)
def test_a_recipe_binds_what_was_given(stage: str, given: dict[str, Any]) -> None:
    assume(stage == "distill" or not given.get("shard"))  # the others refuse it
    whole = bound(Step(stage, given, name="mine"))
    found = {name: whole.settings[name] for name in TRAINING}
    base = {name: default for name, (_, default) in settings_of(STAGES[stage]).items()}
    wanted = {name: given.get(name, base[name]) for name in TRAINING}
    assert found == wanted
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in wanted.items()
    }


@given(given=FIT)
@examples(max_examples=40)
def test_a_recipe_on_disk_gives_the_same(
    tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any]
) -> None:
    first = bound(Step("distill", Training(**given).to_json(), name="mine", source="baseline"))
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    plain = json.loads(json.dumps(dict(first.settings)))  # as a report has them
    path.write_text(recipe.write([replace(first, settings=plain)], "a comment"), encoding="utf-8")
    (step,) = recipe.read(path)
    again = bound(step)
    assert again.settings == first.settings
    assert Training(**{name: again.settings[name] for name in TRAINING}) == Training(**given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("learning_rate", 0),
        ("learning_rate", -1e-3),
        ("learning_rate", float("inf")),
        ("batch_size", 1),
        ("optimizer", "lion"),
        ("momentum", 1),
        ("weight_decay", -1),
        ("l1", -1e-9),
        ("schedule", "linear"),
        ("warmup", 1.0),
        ("patience", 0),
        ("smoothing", 1),
        ("mixup", -0.1),
        ("cutmix", "much"),
        ("clip", 0),
        ("accumulate", 0),
        ("ema", 1),
        ("augment", "flip"),
        ("augment", [3]),
        ("precision", "fp8"),
        ("device", "tpu"),
        ("channels_last", 1),
        ("compile", "yes"),
        ("shard", None),
        ("workers", -1),
        ("workers", 65),
    ],
)
def test_a_value_out_of_bounds_is_one_line(name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        bound(Step("distill", {name: value}, name="mine"))
    said = str(caught.value)
    assert said.startswith(f"step 'mine': {name} = {value!r}")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("given", "cuda", "said"),
    [
        ({"device": "cuda"}, False, "device = 'cuda': PyTorch sees no CUDA device here"),
        ({"precision": "fp16"}, False, "precision = 'fp16' needs CUDA to train: use 'bf16'"),
        ({"precision": "fp16", "device": "cpu"}, True, "precision = 'fp16' needs CUDA to train"),
        ({"shard": True, "ema": 0.9}, True, "ema = 0.9: no average of sharded weights is kept"),
        ({"shard": True, "compile": True}, True, "compile = true: sharded weights are not"),
        ({"optimizer": "nesterov", "momentum": 0.0}, False, "momentum = 0: nesterov is nothing"),
        ({"optimizer": "adam", "momentum": 0.5}, False, "momentum = 0.5: adam has its own"),
        ({"optimizer": "adamw", "momentum": 0.0}, False, "momentum = 0: adamw has its own"),
        ({"augment": ("flop",)}, False, "augment 'flop': known are "),
        ({"augment": ("noise", "noise=0.2")}, False, "augment 'noise=0.2': noise stands twice"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], cuda: bool, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with pytest.raises(InputError) as caught:
        together(**given)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
    plain = {name: list(one) if name == "augment" else one for name, one in given.items()}
    for stage in ("distill", "qat", "sparsify"):
        with pytest.raises(InputError) as caught:
            bound(Step(stage, plain, name="mine"))
        assert str(caught.value).startswith(f"step 'mine': {said}")


@pytest.mark.parametrize(
    ("given", "cuda"),
    [
        ({}, False),
        ({"device": "cuda", "precision": "fp16"}, True),
        ({"precision": "fp16"}, True),
        ({"precision": "bf16", "device": "cpu"}, False),
        ({"shard": True}, False),
        ({"optimizer": "sgd", "momentum": 0.0}, False),
        ({"optimizer": "rmsprop", "momentum": 0.0}, False),
        ({"optimizer": "nesterov", "momentum": 0.5}, False),
        ({"optimizer": "adam", "momentum": 0.9}, False),
        ({"loss": "kd", "weight": 0.3, "ema": 0.5, "compile": True}, False),
    ],
)
def test_what_goes_together_is_let_pass(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], cuda: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    together(**given)


def test_reading_settings_does_not_import_torch() -> None:
    code = "import sys, compressor.training.settings as s; print('torch' in sys.modules, s.DEFAULT)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"False {DEFAULT}")
