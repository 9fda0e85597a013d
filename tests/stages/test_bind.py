"""A stage's signature is the schema of its settings."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from compressor.artifact import Artifact, Torch
from compressor.errors import InputError
from compressor.recipe import Step
from compressor.stages import CHECKS, STAGES, bind, bound, form_taken, perform
from compressor.stages.qat import GENTLE
from compressor.stages.quantize import fitted
from compressor.task import Task
from compressor.training.settings import Training


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_the_one_shape(name: str) -> None:
    parameters = inspect.signature(STAGES[name]).parameters
    positional = [at for at in parameters.values() if at.kind is at.POSITIONAL_OR_KEYWORD]
    assert [at.name for at in positional] == ["artifact", "task", "into"]
    hints = get_type_hints(STAGES[name])
    assert (hints["artifact"], hints["task"], hints["into"]) == (Artifact, Task, Path)
    assert hints["return"] is Artifact
    assert form_taken(STAGES[name]) in ("torch", "onnx")
    assert {at.kind for at in parameters.values()} <= {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    }
    assert inspect.getdoc(STAGES[name])


@pytest.mark.parametrize("name", STAGES)
def test_the_settings_are_the_keyword_only_parameters(name: str) -> None:
    needed = {
        "prune": {"ratio": 0.5},
        "mask": {"pattern": "2:4"},
        "quantize": {"scheme": "static"},
        "student": {"factory": "shop:small"},
    }.get(name, {})
    settings = bound(Step(name, needed, name="s")).settings
    keywords: dict[str, Any] = {}
    for at in inspect.signature(STAGES[name]).parameters.values():
        if isinstance(at.default, Training):  # stands for its fields
            keywords |= {one.name: getattr(at.default, one.name) for one in fields(Training)}
        elif at.kind is at.KEYWORD_ONLY:
            keywords[at.name] = at.default
    assert list(settings) == list(keywords)
    for key, value in settings.items():
        assert value == needed.get(key, keywords[key])
    # Bound settings bind again to themselves: a resolved recipe replays.
    assert bound(Step(name, settings, name="s")).settings == settings


@pytest.mark.parametrize("name", STAGES)
def test_an_unknown_setting_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(InputError) as caught:
        bound(Step(name, {"nothing": 1}, name="mine"))
    said = str(caught.value)
    assert said.startswith(f"step 'mine': {name} has no setting 'nothing'; it has ")
    parameters = inspect.signature(STAGES[name]).parameters.values()
    own = [at.name for at in parameters if at.kind is at.KEYWORD_ONLY and at.name != "training"]
    assert all(setting in said for setting in own)
    trains = name in ("distill", "sparsify", "qat")
    assert all((one.name in said) is trains for one in fields(Training) if one.name not in own)


def test_training_s_settings_are_flat_and_come_together(tmp_path: Path) -> None:
    def stage(
        artifact: Torch, task: Task, into: Path, *, training: Training = GENTLE, weight: int = 1
    ) -> Torch:
        return replace(artifact, name=f"{training.learning_rate} {training.epochs} {weight}")

    artifact = Artifact("a", tmp_path, "torch", "")
    made = perform(stage, artifact, None, tmp_path, epochs=3, weight=2)  # type: ignore[arg-type]
    assert made.name == f"{GENTLE.learning_rate} 3 2"
    made = perform(stage, artifact, None, tmp_path)  # type: ignore[arg-type]
    assert made.name == f"{GENTLE.learning_rate} None 1"


def test_an_unknown_stage_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match="stage 'shrink' is unknown: choose from student, prune, "):
        bound(Step("shrink"))


@pytest.mark.parametrize(
    ("stage", "setting", "value", "said"),
    [
        ("prune", "ratio", 1.5, "less than 1"),
        ("prune", "ratio", 1, "less than 1"),
        ("prune", "ratio", -0.1, "greater than or equal to 0"),
        ("prune", "ratio", "0.5", "valid number"),
        ("prune", "ratio", True, "valid number"),
        ("prune", "macs", 0, "greater than 0"),
        ("prune", "latency", 1.0, "less than 1"),
        ("prune", "steps", 0, "greater than or equal to 1"),
        ("prune", "floor", 1.5, "less than or equal to 1"),
        ("prune", "widths", {"conv": 0}, "greater than or equal to 1"),
        ("prune", "ratio", math.nan, "no plain value"),
        ("prune", "ratio", Path("x"), "no plain value"),
        ("prune", "criterion", "l3", "'l1', 'l2'"),
        ("prune", "ranking", "random", "'local', 'global' or 'isomorphic'"),
        ("prune", "dtype", "fp16", "'fp32' or 'int8'"),
        ("prune", "keep", "conv1", "valid array"),
        ("prune", "keep", [3], "valid string"),
        ("distill", "epochs", 0, "greater than or equal to 1"),
        ("distill", "epochs", 2.5, "valid integer"),
        ("distill", "epochs", True, "valid integer"),
        ("distill", "learning_rate", 0, "greater than 0"),
        ("distill", "learning_rate", math.inf, "no plain value"),
        ("distill", "batch_size", 1, "greater than or equal to 2"),
        ("distill", "loss", {"kd": -1.0}, "greater than or equal to 0"),
        ("distill", "optimizer", "lion", "'adam', 'adamw', 'sgd', 'nesterov' or 'rmsprop'"),
        ("distill", "schedule", "cyclic", "'one-cycle', 'cosine', 'step'"),
        ("distill", "ema", 1, "less than 1"),
        ("distill", "folds", 1, "greater than or equal to 2"),
        ("qat", "clip", 0, "greater than 0"),
        ("sparsify", "augment", "flip", "valid array"),
        ("distill", "temperature", 0, "greater than 0"),
        ("distill", "weight", 1.1, "less than or equal to 1"),
        ("export", "opset", 17, "greater than or equal to 18"),
        ("export", "opset", 24, "less than or equal to 23"),
        ("quantize", "scheme", "int7", "'dynamic', 'static', 'weights', 'int4', 'fp16' or"),
        ("quantize", "scheme", ["static"], "'dynamic', 'static', 'weights', 'int4', 'fp16' or"),
        ("quantize", "samples", 0, "greater than or equal to 1"),
        ("quantize", "samples", "many", "valid integer"),
        ("quantize", "ranges", "widest", "'auto', 'minmax', 'each'"),
        ("quantize", "repair", ["polish"], "'equalize', 'smooth', 'rounding' or 'bias'"),
        ("quantize", "left", "conv", "valid array"),
    ],
)
def test_a_wrong_value_is_one_line(stage: str, setting: str, value: Any, said: str) -> None:
    others = {"prune": {"ratio": 0.5}, "quantize": {"scheme": "static"}}.get(stage, {})
    with pytest.raises(InputError) as caught:
        bound(Step(stage, {**others, setting: value}, name="mine"))
    seen = str(caught.value)
    assert seen.startswith(f"step 'mine': {setting} = {value!r}")
    assert said in seen
    assert "\n" not in seen


def test_a_setting_without_default_is_needed() -> None:
    with pytest.raises(InputError, match="step 'mine': quantize needs the setting 'scheme'"):
        bound(Step("quantize", name="mine"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "it has none of them"),
        ({"ratio": None}, "it has none of them"),
        ({"ratio": 0.5, "latency": 0.25}, "it has ratio = 0.5, latency = 0.25"),
    ],
)
def test_pruning_has_one_target(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match="step 'mine': prune takes one of ratio, macs, ") as caught:
        bound(Step("prune", given, name="mine"))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "setting", "value", "said"),
    [
        ("fp16", "left", ["conv"], "left = ('conv',): fp16 has no such choice"),
        ("bf16", "disabled", [], "disabled = (): bf16 has no such choice"),
        ("dynamic", "ranges", "mse", "ranges = 'mse': dynamic has no such choice"),
        ("dynamic", "repair", ["bias"], "repair 'bias': dynamic has smooth, rounding"),
        ("dynamic", "repair", ["smooth", "equalize"], "repair 'equalize': dynamic has smooth, "),
        ("weights", "ranges", "minmax", "ranges = 'minmax': weights has no such choice"),
        ("int4", "repair", ["rounding"], "repair = ('rounding',): int4 has no such choice"),
    ],
)
def test_what_a_scheme_has_no_use_for_is_one_line(
    scheme: str, setting: str, value: Any, said: str
) -> None:
    assert CHECKS["quantize"] is fitted
    with pytest.raises(InputError) as caught:
        bound(Step("quantize", {"scheme": scheme, setting: value}, name="mine"))
    seen = str(caught.value)
    assert seen.startswith(f"step 'mine': {said}")
    assert "\n" not in seen


@pytest.mark.parametrize(
    ("scheme", "given"),
    [
        ("static", {"ranges": "mse", "repair": ["bias", "smooth"], "left": ["conv"]}),
        ("dynamic", {"repair": ["smooth", "rounding"], "left": [], "disabled": ["Fusion"]}),
        ("weights", {"left": ["conv"], "disabled": []}),
        ("int4", {"left": []}),
        ("fp16", {"ranges": "auto", "samples": 9}),
    ],
)
def test_what_a_scheme_has_a_use_for_is_bound(scheme: str, given: dict[str, Any]) -> None:
    settings = bound(Step("quantize", {"scheme": scheme, **given})).settings
    plain = {at: tuple(value) if isinstance(value, list) else value for at, value in given.items()}
    assert {name: settings[name] for name in given} == plain


def test_what_toml_has_becomes_what_the_signature_says() -> None:
    settings = bound(Step("prune", {"ratio": 0, "keep": ["a", "b*"]})).settings
    assert {name: settings[name] for name in ("ratio", "macs", "criterion", "keep")} == {
        "ratio": 0.0,
        "macs": None,
        "criterion": "l2",
        "keep": ("a", "b*"),
    }
    assert bound(Step("distill", {"learning_rate": 1})).settings["learning_rate"] == 1.0


def test_all_steps_are_bound_before_any_runs() -> None:
    steps = (Step("prune", {"ratio": 0.5}, "a", "baseline"), Step("export", {"opset": 3}, "b", "a"))
    with pytest.raises(InputError, match="step 'b': opset = 3"):
        bind(steps)
    (first,) = bind(steps[:1])
    assert (first.name, first.source, first.settings["criterion"]) == ("a", "baseline", "l2")
