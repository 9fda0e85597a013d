"""Ways to 8 bits: ranges and repairs are those asked for, or those that gain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import answers, drawn, floats, sqnr
from hypothesis import given, settings
from hypothesis import strategies as st
from standing import task_of
from test_plan import LEARNED
from test_repair import convolutions
from torch import nn

from compressor.stages.quantize import ways
from compressor.stages.quantize.judge import Judge
from compressor.stages.quantize.kernels import Codes
from compressor.stages.quantize.plan import plan
from compressor.stages.quantize.ways import ENOUGH, FAIR, MARGIN, METHOD, Dynamic, Static, settled
from compressor.task import Array

CODES = Codes(signed=False, bits=8)
REPAIRS = ("equalize", "smooth", "rounding", "bias")


def never() -> bool:
    return False


# --- what is settled, with a way that only says what was done to it


class Fake(Static):
    """Its graph is ``(method, repairs)``."""

    def __init__(self, missing: tuple[str, ...] = (), found: tuple[str, ...] = ("layer",)) -> None:
        self.model: Any = object()
        self.missing = missing
        self.found = found
        self.state: tuple[str, ...] = ()
        self.looks = 0

    @property
    def names(self) -> list[str]:
        return list(self.found)

    def calibrate(self, samples: int | None = None) -> None:
        self.looks += 1

    def written(self, left: Any = ()) -> Any:
        return self.method, self.state

    def by(self, method: str) -> Fake:
        other = copy.copy(self)
        other.method = method
        return other

    def repaired(self, name: str) -> Fake | None:
        if name in self.missing:
            return None
        other = copy.copy(self)
        other.state = (*self.state, name)
        if name in ("equalize", "smooth"):  # another graph
            other.model = object()
        return other


class Listing:
    """A judge with a list of what methods and repairs are worth."""

    def __init__(self, methods: Mapping[str, float], gains: Mapping[str, float]) -> None:
        self.methods = methods
        self.gains = gains
        self.looks = 0

    def sqnr(self, model: Any) -> float:
        self.looks += 1
        method, state = model
        return self.methods[method] + sum(self.gains[name] for name in state)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, real in list(ways.REPAIRS.items()):

        def repair(way: Any, name: str = name, real: Any = real) -> Any:
            return way.repaired(name) if isinstance(way, Fake) else real(way)

        monkeypatch.setitem(ways.REPAIRS, name, repair)


def settle(way: Any, judge: Any, ranges: Any, repair: Any, late: Any = never) -> tuple[Any, Any]:
    return settled(way, judge, ranges, repair, late)


EVEN = dict.fromkeys(METHOD, 10.0)
GAINS = dict.fromkeys(REPAIRS, 0.0)


@given(st.sampled_from(sorted(METHOD)), st.lists(st.sampled_from(REPAIRS), unique=True))
def test_what_is_told_is_done_unseen(method: str, repair: list[str]) -> None:
    judge = Listing(EVEN, dict.fromkeys(REPAIRS, -9.0))
    way, done = settle(Fake(), judge, method, repair)
    ordered = [name for name in Static.repairs if name in repair]  # whatever order was asked for
    assert (way.method, way.state, done) == (method, tuple(ordered), ordered)
    assert judge.looks == 0


@given(st.sampled_from(["auto", *METHOD]), st.permutations(REPAIRS))
def test_no_order_that_is_asked_for_makes_another_way(ranges: str, repair: list[str]) -> None:
    way, done = settle(Fake(), Listing(EVEN, dict.fromkeys(REPAIRS, 1.0)), ranges, repair)
    assert list(way.state) == done == list(REPAIRS) == list(Static.repairs)


@given(st.permutations([1.0, 2.0, 3.0, 4.0, 5.0]))
def test_auto_takes_the_ranges_nearest_to_float(values: list[float]) -> None:
    methods = dict(zip(METHOD, values, strict=True))
    way, done = settle(Fake(), Listing(methods, GAINS), "auto", ())
    assert way.method == max(methods, key=lambda name: methods[name])
    assert done == []


def test_enough_is_enough() -> None:
    judge = Listing({**EVEN, "minmax": ENOUGH, "each": ENOUGH + 9}, dict.fromkeys(REPAIRS, 9.0))
    way, done = settle(Fake(), judge, "auto", None)
    assert (way.method, done) == ("minmax", [])


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.floats(0, FAIR - 9))
def test_a_repair_is_kept_where_it_gains(gains: list[float], start: float) -> None:
    listed = dict(zip(REPAIRS, gains, strict=True))
    methods = dict.fromkeys(METHOD, start)
    way, done = settle(Fake(), Listing(methods, listed), "minmax", None)
    assert list(way.state) == done
    kept = [name for name in REPAIRS if listed[name] >= MARGIN + 1e-6]
    assert [name for name in done if abs(listed[name] - MARGIN) > 1e-6] == kept


def test_repairs_end_where_it_is_enough() -> None:
    judge = Listing(EVEN, {**GAINS, "equalize": ENOUGH, "rounding": 9.0, "bias": 9.0})
    assert settle(Fake(), judge, "minmax", None)[1] == ["equalize"]


@pytest.mark.parametrize("repair", [None, REPAIRS])
def test_a_repair_with_nothing_to_do_is_not_said(repair: Any) -> None:
    judge = Listing(EVEN, dict.fromkeys(REPAIRS, 1.0))
    way, done = settle(Fake(missing=("equalize", "bias")), judge, "minmax", repair)
    assert done == ["smooth", "rounding"]
    assert list(way.state) == done


def test_a_late_search_takes_what_comes_first() -> None:
    judge = Listing({**EVEN, "mse": 20.0}, dict.fromkeys(REPAIRS, 1.0))
    way, done = settle(Fake(), judge, "auto", None, late=lambda: True)
    assert (way.method, way.state, done) == ("minmax", (), [])
    assert judge.looks == 1


def test_nothing_to_quantize_looks_at_no_data() -> None:
    way = Fake(found=())
    assert settle(way, None, "auto", None) == (way, [])
    assert way.looks == 0


# --- real graphs


def feeds(x: Array) -> Any:
    def given(count: int) -> Iterator[Mapping[str, Array]]:
        for at in range(0, min(count, len(x)), 8):
            yield {"x": x[at : min(at + 8, count)]}

    return given


def static(model: ir.Model, x: Array) -> Static:
    return Static(model, feeds(x), len(x), CODES)


def judged(model: ir.Model, x: Array) -> Judge:
    return Judge(model, task_of(nn.Identity(), x.shape[1:]), [(x,)])


def outliers() -> tuple[ir.Model, Array]:
    """What two layers read after a normalisation has channels a hundred times larger."""
    x, w, v = floats(0, (64, 16), (16, 12), (12, 5))
    scale = np.ones(16, np.float32)
    scale[[3, 7]] = 100
    w[[3, 7]] /= 100
    model = drawn(
        "(float[n, 16] x) => (float[n, 5] y) { m = LayerNormalization <axis = -1> (x, scale, shift)"
        " a = MatMul(m, w) b = Add(a, row) r = Relu(b) y = MatMul(r, v) }",
        scale=scale,
        shift=np.zeros(16, np.float32),
        w=w,
        v=v,
        row=np.ones(12, np.float32),
    )
    return model, x


NETS: dict[str, Callable[[], tuple[ir.Model, Array]]] = {
    "equalize": lambda: convolutions(0, 2.0),
    "smooth": outliers,
    "rounding": lambda: convolutions(1, 0.3),
    "bias": lambda: convolutions(2, 0.3),
}


@pytest.mark.parametrize("name", NETS)
def test_each_repair_does_its_work(name: Any) -> None:
    model, x = NETS[name]()
    exact = answers(model, x=x)["y"]
    plain, nothing = settle(static(model, x), None, "minmax", ())
    repaired, done = settle(static(model, x), None, "minmax", [name])
    assert (nothing, done) == ([], [name])
    # In float it is the same function, and the graph that was handed in stays as it is.
    assert np.allclose(answers(repaired.model, x=x)["y"], exact, rtol=1e-3, atol=1e-3)
    assert np.array_equal(answers(model, x=x)["y"], exact)
    before, after = (answers(way.written(), x=x)["y"] for way in (plain, repaired))
    assert not np.array_equal(before, after)
    if name in ("equalize", "smooth"):
        assert sqnr(exact, after) > sqnr(exact, before) + 5
    if name == "bias":  # channel by channel the mean is that of the float graph
        axes = (0, 2, 3)
        off = [np.abs(y.mean(axes) - exact.mean(axes)).max() for y in (before, after)]
        assert off[1] < off[0] / 2


def test_the_search_finds_the_repair_that_helps() -> None:
    model, x = convolutions(0, 2.0)
    judge = judged(model, x)
    way, done = settle(static(model, x), judge, "minmax", None)
    assert done[0] == "equalize"
    plain, _ = settle(static(model, x), judge, "minmax", ())
    assert judge.sqnr(way.written()) > judge.sqnr(plain.written()) + 5


@pytest.mark.parametrize("kind", [Static, Dynamic])
def test_samples_that_do_not_fit_are_taken_in_parts(
    monkeypatch: pytest.MonkeyPatch, kind: type[ways.Way]
) -> None:
    model, x = outliers()
    way = kind(model, feeds(x), len(x), CODES)
    whole = way.rounded()
    monkeypatch.setattr(ways, "SAMPLED", 1)
    looked: list[list[str]] = []
    real = ways.observed  # type: ignore[attr-defined]

    def observed(model: Any, names: list[str], feeds: Any) -> Any:
        looked.append(names)
        return real(model, names, feeds)

    monkeypatch.setattr(ways, "observed", observed)
    parts = way.rounded()
    assert whole is not None
    assert parts is not None
    assert looked == [["m"], ["r"]]  # one layer at a time
    assert list(parts.held) == list(whole.held) == way.weighted
    for name, (scales, held) in whole.held.items():
        assert np.array_equal(parts.held[name][0], scales)
        assert np.array_equal(parts.held[name][1], held)
    assert not way.held


@settings(max_examples=20)
@given(st.integers(0, 2**16))
def test_chosen_codes_are_for_their_scales_alone(seed: int) -> None:
    model, x = outliers()
    way = Dynamic(model, feeds(x), len(x), CODES).rounded()
    assert way is not None
    node = next(node for node in model.graph if node.name == "MatMul_a")
    scales, held = way.held["MatMul_a"]
    (weight,) = floats(seed, held.shape)
    assert way.rounding(node, weight, scales, 1) is held
    other = scales * np.float32(1.5)
    assert np.abs(way.rounding(node, weight, other, 1) * other - weight).max() <= max(
        other.max() / 2 * 1.001, np.abs(weight).max() - 127 * other.min()
    )


def test_what_is_left_may_need_ranges_of_its_own() -> None:
    model, x = convolutions(0, 0.3)
    way, _ = settle(static(model, x), None, "minmax", ())
    seen = set(way.histograms)
    for name in way.names:
        made = way.written([name])
        wanted = set(plan(model, [name]).ranged)
        assert wanted <= set(way.histograms)
        stay = [node for node in made.graph if node.name == name]
        (weight,) = [value for value in stay[0].inputs[1:2] if value is not None]
        assert weight.producer() is None  # no Q/DQ in front of it
    assert seen <= set(way.histograms)


def test_calibration_looks_at_so_many_examples() -> None:
    model, x = convolutions(0, 0.3)
    asked: list[int] = []
    real = feeds(x)

    def counted(count: int) -> Any:
        asked.append(count)
        return real(count)

    way = Static(model, counted, 12, CODES)
    way.calibrate()
    assert asked == [12]
    whole = way.histograms["x"]
    assert (whole.low, whole.high) == (x[:12].min(), x[:12].max())
    way.calibrate(3)
    assert asked == [12, 3]
    assert way.histograms["x"].high == x[:3].max()


@pytest.mark.parametrize("repair", [(), REPAIRS])
@pytest.mark.parametrize("kind", [Static, Dynamic])
@pytest.mark.parametrize(
    ("moved", "source"), [("", "q"), ("u = Transpose <perm = [0, 1, 2]> (q)", "u")]
)
def test_a_learned_query_is_quantized(
    moved: str, source: str, kind: type[ways.Way], repair: Any
) -> None:
    x, q, w, v = floats(0, (24, 16), (1, 3, 8), (8, 6), (16, 8))
    text = LEARNED.replace("MOVED", moved).replace("SOURCE", source)
    model = drawn(text, q=q, w=w, v=v, rest=np.array([3, 8]))
    asked = [name for name in repair if name in kind.repairs]
    way, _ = settle(kind(model, feeds(x), len(x), CODES), None, "minmax", asked)
    assert way.names == ["MatMul_h", "MatMul_y"]
    exact, seen = (answers(made, x=x)["y"] for made in (model, way.written()))
    assert not np.array_equal(exact, seen)
    assert sqnr(exact, seen) > 35


@pytest.mark.parametrize("repair", [(), ("smooth", "rounding", "bias")])
@pytest.mark.parametrize("kind", [Static, Dynamic])
@pytest.mark.parametrize(("biases", "taken"), [(("c", "row"), "Gemm_y"), (("wide", "c"), "Gemm_a")])
def test_a_gemm_with_one_number_for_a_bias_stays_float(
    biases: tuple[str, str], taken: str, kind: type[ways.Way], repair: Any
) -> None:
    x, w, v, row, wide = floats(3, (24, 16), (16, 12), (12, 6), (6,), (12,))
    first, second = biases
    model = drawn(
        f"(float[n, 16] x) => (float[n, 6] y) {{ a = Gemm(x, w, {first}) r = Relu(a)"
        f" y = Gemm(r, v, {second}) }}",
        w=w,
        v=v,
        row=row,
        wide=wide,
        c=np.float32(1.5),
    )
    asked = [name for name in repair if name in kind.repairs]
    way, _ = settle(kind(model, feeds(x), len(x), CODES), None, "minmax", asked)
    assert way.names == [taken]
    (other,) = {"Gemm_a", "Gemm_y"} - {taken}
    made = way.written()
    kept = next(node for node in made.graph if node.name == other)
    assert kept.op_type == "Gemm"
    assert kept.inputs[1] is made.graph.initializers["w" if other == "Gemm_a" else "v"]
    assert sqnr(answers(model, x=x)["y"], answers(made, x=x)["y"]) > 35


def test_cells_of_a_static_graph_are_dynamic() -> None:
    x, w, r, v = floats(0, (7, 5, 6), (1, 32, 6), (1, 32, 8), (8, 3))
    model = drawn(
        "(float[n, 5, 6] x) => (float[t, n, 3] y) { a = LSTM <hidden_size = 8> (x, w, r)"
        " b = Squeeze(a, one) y = MatMul(b, v) }",
        w=w,
        r=r,
        v=v,
        one=np.array([1]),
    )
    way, _ = settle(static(model, x), None, "minmax", ())
    assert way.names == ["MatMul_y", "LSTM_a"]
    kinds = [node.op_type for node in way.written().graph]
    assert kinds.count("DynamicQuantizeLSTM") == 1
    kinds = [node.op_type for node in way.written(["LSTM_a"]).graph]
    assert kinds.count("LSTM") == 1
    assert sqnr(answers(model, x=x)["y"], answers(way.written(), x=x)["y"]) > 25
