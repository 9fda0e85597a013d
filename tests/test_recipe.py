"""Flags and TOML are one thing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import InputError
from compressor.recipe import PRUNE, QUANTIZE, Step, edited, named, pruning, read, write

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


LAYERS = st.from_regex(r"[a-z0-9_]{1,6}(\.[a-z0-9_]{1,6}){0,3}( \([2-9]\))?", fullmatch=True)


@given(st.lists(st.dictionaries(LAYERS, st.integers(1, 4096), max_size=4), min_size=1, max_size=3))
def test_widths_read_back(
    tmp_path_factory: pytest.TempPathFactory, many: list[dict[str, int]]
) -> None:
    """A table of its own ends a step; the next begins anew, and dots in a name are no tables."""
    steps = [
        step
        for at, widths in enumerate(many)
        for step in (
            Step(
                "prune", {"latency": 0.5, "widths": widths, "keep": ["h.*"]}, f"p{at}", "baseline"
            ),
            Step("distill", {"epochs": 2}, f"d{at}", f"p{at}"),
        )
    ]
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(write(steps, "compressor run x"), encoding="utf-8")
    assert read(path) == steps


def test_widths_are_a_table_of_their_step() -> None:
    steps = [Step("prune", {"widths": {"layer1.0.conv1": 8}, "macs": 0.5}), Step("distill")]
    prune, distill = write(steps, "x").split("[[step]]")[1:]
    assert '[step.widths]\n"layer1.0.conv1" = 8\n' in prune
    assert prune.index("from =") < prune.index("[step.widths]")
    assert "widths" not in distill


@given(st.sampled_from(["macs", "params", "size", "latency"]), st.floats(1e-6, 0.999))
def test_prune_names_what_is_to_shrink(name: str, value: float) -> None:
    assert pruning(f"{name}={value}") == {name: value}
    assert pruning(f" {name} = {value} ") == {name: value}
    assert pruning(value) == pruning(str(value)) == {"ratio": value}


def test_a_ratio_of_nothing_is_one() -> None:
    assert pruning("0") == pruning(0.0) == {"ratio": 0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((f"{name}={wrong}", f"give the fraction of {name} to keep")
          for name in ("macs", "latency") for wrong in ("0", "1", "-1", "nan", "inf", "", "half")),
        *((wrong, "give the fraction of channels to remove")
          for wrong in ("1", "-0.1", "nan", "", "half", "inf")),
        *((wrong, "give a ratio such as 0.5, or one of macs=0.5")
          for wrong in ("ratio=0.5", "widths=0.5", "speed=0.5", "=0.5", "macs=size=0.5",
                        "MACS=0.5")),
    ],
)  # fmt: skip
def test_what_prune_may_not_say_is_one_line(text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        pruning(text)
    assert str(error.value).startswith(f"--prune {text!r}: {said}")
    assert "\n" not in str(error.value)


def test_another_target_replaces_the_recipe_s_own() -> None:
    recipe = [Step("prune", {"latency": 0.5, "widths": {"a.b": 3}, "keep": ["head"]})]
    (changed,) = edited(recipe, prune="macs=0.3")
    assert changed.settings == {"macs": 0.3, "keep": ["head"]}
    assert set(recipe[0].settings) & set(PRUNE) == {"latency", "widths"}, "it is as it was"
