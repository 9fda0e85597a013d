"""Flags and TOML are one thing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import InputError
from compressor.recipe import QUANTIZE, Step, edited, named, read, write

NAMES = st.from_regex(r"[a-z][a-z0-9_-]{0,10}", fullmatch=True)
VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20).filter(lambda text: "\r" not in text),
    st.lists(st.text(alphabet="abc.*", max_size=5), max_size=3),
)

SETTINGS = st.dictionaries(
    NAMES.filter(lambda key: key not in ("stage", "name", "from")), VALUES, max_size=4
)


@given(
    st.lists(
        st.tuples(NAMES, SETTINGS, NAMES),
        max_size=5,
        unique_by=lambda step: step[2],
    )
)  # fmt: skip
def test_toml_reads_back(tmp_path_factory: pytest.TempPathFactory, given_steps: list) -> None:
    steps = [Step(stage, settings, name, "baseline") for stage, settings, name in given_steps]
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(write(steps, "compressor run x\nwith two lines"), encoding="utf-8")
    assert read(path) == steps


def test_flags_alone() -> None:
    steps = named(edited([], prune=0.5, epochs=2, quantize="int8"))
    assert [(step.source, step.stage, step.name) for step in steps] == [
        ("baseline", "prune", "pruned"),
        ("pruned", "distill", "recovered"),
        ("recovered", "quantize", "int8-dynamic"),
        ("recovered", "quantize", "int8-static"),
    ]
    assert steps[1].settings == {"epochs": 2}


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({}, []),
        ({"prune": 0.5, "epochs": 0}, ["pruned"]),
        ({"epochs": 3}, ["recovered"]),
        ({"quantize": "none"}, []),
        ({"quantize": "fp16"}, ["fp16"]),
        ({"quantize": "int8-static"}, ["int8-static"]),
        ({"prune": 0.5, "quantize": "int8-dynamic"}, ["pruned", "recovered", "int8-dynamic"]),
    ],
)
def test_which_steps_flags_make(flags: dict, names: list[str]) -> None:
    assert [step.name for step in named(edited([], **flags))] == names


def test_flags_edit_a_recipe() -> None:
    recipe = [
        Step("prune", {"ratio": 0.3}),
        Step("distill"),
        Step("quantize", {"scheme": "static"}),
    ]
    changed = edited(recipe, prune=0.6, keep=["head*"], epochs=4, distill=False, quantize="fp16")
    assert [dict(step.settings) for step in changed] == [
        {"ratio": 0.6, "keep": ["head*"]},
        {"epochs": 4, "loss": "labels"},
        {"scheme": "fp16"},
    ]
    assert edited(recipe) == list(named(recipe))
    dropped = edited(recipe, epochs=0)
    assert [(step.source, step.name) for step in dropped] == [
        ("baseline", "pruned"),
        ("pruned", "int8-static"),
    ]
    # What was to be quantized is now the pruned model, recovered.
    only = [Step("quantize", {"scheme": "static"}, source="baseline")]
    assert [(step.source, step.name) for step in edited(only, prune=0.5, epochs=1)] == [
        ("baseline", "pruned"),
        ("pruned", "recovered"),
        ("recovered", "int8-static"),
    ]


@pytest.mark.parametrize("scheme", QUANTIZE)
def test_every_quantize_flag_makes_distinct_names(scheme: str) -> None:
    steps = named(edited([], quantize=scheme))
    assert len({step.name for step in steps}) == len(steps)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[step]]\nratio = 0.5", "step 1: stage, name and from are strings"),
        ("[[step]]\nstage = 3", "step 1: stage, name and from are strings"),
        ("step = 3", "steps are [[step]] tables"),
        ("[run]\nx = 1", "unknown key 'run'"),
        ("[[step", "is not TOML"),
        ("\x00", "is not TOML"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
