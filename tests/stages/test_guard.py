"""The latency guard: whose time is whose, who is a suspect, and what a timing proves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from graphs import drawn, floats
from hypothesis import given
from hypothesis import strategies as st
from standing import splits_of, task_of
from test_plan import CONSTANTS, IMAGE, SAME
from torch import nn

from compressor import StageError, Target
from compressor.stages.graph import new_constant
from compressor.stages.quantize import guard
from compressor.task import Task

TASK = task_of(nn.Identity(), (4, 8, 8))

W, V = floats(3, (4, 4), (4, 4))


def chain() -> ir.Model:
    """Two convolutions, each with what onnxruntime fuses into it."""
    return drawn(
        f"{IMAGE} => (float[n, 4, 8, 8] y) {{ a = Conv {SAME} (x, w) r = Relu(a)"
        f" c = Conv {SAME} (r, v) s = Add(c, c) y = Tanh(s) }}",
        **CONSTANTS,
    )


NAMES = ("Conv_a", "Conv_c")


# --- whose time is whose


@pytest.mark.parametrize(
    "end", ["", "_nchwc", "_token_3", "_integer", "_token_12_nchwc", "/MatMulScaleFusion/"]
)
@pytest.mark.parametrize("head", ["", "fused "])
@pytest.mark.parametrize("name", ["Conv_a", "a", "r"])
def test_kernels_are_found_whatever_onnxruntime_calls_them(head: str, name: str, end: str) -> None:
    found = guard.costs(chain(), NAMES, {f"{head}{name}{end}": 2.0, "else": 5.0})
    assert found == {"Conv_a": 2.0, "Conv_c": 0.0}


def test_kernels_of_one_node_add_up() -> None:
    times = {
        "Conv_a": 1.0,
        "fused Conv_a": 0.25,
        "Conv_c_token_1": 3.0,
        "s_nchwc": 0.5,
        "Tanh_y": 9.0,
    }
    assert guard.costs(chain(), NAMES, times) == {"Conv_a": 1.25, "Conv_c": 3.5}


def test_what_others_read_too_is_nobodys() -> None:
    model = drawn(
        f"{IMAGE} => (float[n, 4, 8, 8] y, float[n, 4, 8, 8] z) {{ a = Conv {SAME} (x, w)"
        " y = Relu(a) z = Tanh(a) }",
        **CONSTANTS,
    )
    times = {"Conv_a": 1.0, "Relu_y": 1.0, "y": 1.0, "z": 1.0}
    assert guard.costs(model, ["Conv_a"], times) == {"Conv_a": 1.0}


def test_the_next_wanted_node_is_not_its_neighbours() -> None:
    found = guard.costs(chain(), [*NAMES, "Relu_r"], {"r": 1.0, "a": 2.0})
    assert found == {"Conv_a": 2.0, "Conv_c": 0.0, "Relu_r": 1.0}


# --- suspects


def test_suspects_are_those_that_gain_nothing_worst_first() -> None:
    def suspects(before: list[float], after: list[float]) -> list[str]:
        profiles = [dict(zip(NAMES, ms, strict=True)) for ms in (before, after)]
        return guard.suspects(chain(), NAMES, *profiles)

    assert suspects([2.0, 2.0], [1.0, 1.5]) == []
    assert suspects([2.0, 2.0], [1.0, 2.0]) == ["Conv_c"]
    assert suspects([2.0, 2.0], [2.5, 3.0]) == ["Conv_c", "Conv_a"]
    assert suspects([0.0, 2.0], [2.5, 0.0]) == []  # a node without a time is nobody's suspect


@given(
    st.lists(st.integers(1, 100), min_size=2, max_size=2),
    st.lists(st.integers(1, 100), min_size=2, max_size=2),
    st.integers(0, 50),
    st.integers(0, 50),
)
def test_an_island_saves_what_is_left_after_its_ends(
    before: list[int], after: list[int], way_in: int, way_out: int
) -> None:
    floating = dict(zip(NAMES, map(float, before), strict=True))
    eight = dict(zip(NAMES, map(float, after), strict=True))
    eight |= {"x_QuantizeLinear": float(way_in), "y_DequantizeLinear": float(way_out)}
    eight |= {"elsewhere_QuantizeLinear": 1000.0}
    island = (NAMES, ("x", "y"))
    gained = sum(before) - sum(after) - way_in - way_out
    assert guard.saved(chain(), island, floating, eight) == gained
    assert guard.saved(chain(), island, {}, eight) > 0  # nothing is known: nothing is said
    assert guard.saved(chain(), island, floating, {}) > 0


# --- what a timing proves


@pytest.mark.parametrize(
    ("ratio", "proven"), [(1.0, False), (1.005, False), (1.02, True), (2.0, True), (0.5, False)]
)
def test_faster_is_more_than_a_percent(ratio: float, proven: bool) -> None:
    times = {"one": [[1.0] * 5] * 9, "other": [[ratio] * 5] * 9}
    assert guard.faster(times, "one", "other") is proven
    assert guard.faster(times, "one", "one") is False


def test_a_median_alone_proves_nothing() -> None:
    rng = np.random.default_rng(0)
    noisy = [rng.uniform(0.5, 1.6, 5).tolist() for _ in range(8)]
    assert not guard.faster({"one": noisy, "other": [[1.1] * 5] * 8}, "one", "other")


# --- why nothing is gained


@pytest.mark.parametrize(
    ("ms", "bits", "converting", "said"),
    [
        (5.0, 7, 0.5, "no 8-bit dot products"),
        (5.0, 8, 0.5, "50% of the time goes into conversions"),
        (0.05, 8, 0.1, "too small, 0.05 ms in float"),
        (5.0, 8, 0.1, "float kernels keep up"),
    ],
)
def test_the_reason_is_the_first_that_explains_it(
    ms: float, bits: int, converting: float, said: str
) -> None:
    after = {"Conv_a": 1 - converting, "x_QuantizeLinear": converting}
    reason = guard.reason([[ms] * 5] * 8, {"Conv_a": 1.0}, after, bits)
    assert said in reason
    assert "\n" not in reason


def test_conversions_are_a_share_of_the_time() -> None:
    times = {"a": 2.0, "x_QuantizeLinear": 1.0, "y_DequantizeLinear": 0.5, "z_Dynamic": 0.5}
    assert guard.edges(times) == 0.5
    assert guard.edges({}) == 0


# --- for real


def test_two_graphs_race_on_the_target() -> None:
    models = {"one": chain(), "other": chain()}
    times = guard.race(models, TASK, {"other": ["NchwcTransformer"]}, seconds=0.02)
    assert list(times) == ["one", "other"]
    assert len(times["one"]) == len(times["other"]) >= 8
    assert all(value > 0 for blocks in times.values() for block in blocks for value in block)


def test_every_node_has_its_time() -> None:
    found = guard.profile(chain(), TASK)
    assert all(guard.costs(chain(), NAMES, found).values())
    assert all(ms >= 0 for ms in found.values())


def test_a_graph_that_does_not_run_is_one_line() -> None:
    model = chain()
    model.graph[0].replace_input_with(1, new_constant(model, "odd", np.ones((3, 9, 9), np.float32)))
    with pytest.raises(StageError, match="timing on cpu") as caught:
        guard.race({"one": model}, TASK, seconds=0.02)
    assert "\n" not in str(caught.value)
    assert guard.profile(model, TASK) == {}  # no suspects


def test_examples_are_those_of_the_target() -> None:
    x = np.arange(10 * 4, dtype=np.float32).reshape(10, 4)
    with_data: Task = replace(
        task_of(nn.Identity(), (4,), splits=splits_of(x, np.zeros(10, int))),
        target=Target(batch=3),
    )
    (seen,) = guard.feed_of(with_data)
    assert np.array_equal(seen, x[:3])
    (made,) = guard.feed_of(replace(with_data, splits=None))
    assert made.shape == (3, 4)


def test_only_fusions_that_apply_are_tried() -> None:
    assert tuple(guard.fusions(chain())) == ()
    model = drawn(
        "(float[n, 4] x) => (float[n, 4] y) { y = LayerNormalization(x, g) }",
        g=np.ones(4, np.float32),
    )
    assert tuple(guard.fusions(model)) == guard.HURTING
