"""Who is timed when, what is kept, and what becomes of an artifact that fails. No real time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.artifact import Artifact
from compressor.measure import protocol, turns
from compressor.measure.outputs import PART
from compressor.measure.process import Worker, WorkerFailed
from compressor.measure.protocol import Observed, observe
from compressor.measure.quantities import QUANTITIES
from compressor.measure.turns import CONTROL, ROUNDS
from compressor.measurement import Measurement, Target
from compressor.pipeline import verdict
from compressor.task import Input, Task

STANDIN = Path(__file__).parent / "standin"
NAMES = ("baseline", "pruned", "int8")
TARGET = Target(batch=2)
FEED = (np.zeros((2, 3), dtype=np.float32),)
TASK = Task("toy", "classification", lambda: None, {}, (Input("x", (3,)),), "accuracy")  # type: ignore


class Lab:
    """Scripted workers on one clock. Requests and their answers stand in ``log``.

    ``ns`` is what one call of an artifact takes; ``fails`` maps (artifact, verb, how often it was
    asked before) to the reason. Of two workers of the baseline that are open at once the second is
    the control.
    """

    def __init__(self, ns: dict[str, int] | None = None, fails: Any = None) -> None:
        self.ns = {**dict.fromkeys(NAMES, 4_000_000), **(ns or {})}
        self.fails: dict[tuple[str, str, int], str] = fails or {}
        self.now = 0
        self.log: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = []
        self.opened = self.closed = 0
        self.alive: list[str] = []

    def clock(self) -> float:
        return self.now / 1e9

    def start(self) -> Any:
        return Scripted(self)

    def asked(self, verb: str, name: str | None = None) -> list[Any]:
        return [one for one in self.log if one[1] == verb and name in (None, one[0])]

    def rounds(self) -> list[str]:
        """Who was timed, in order, without the warm-up."""
        seen: dict[str, int] = {}
        timed = []
        for name, *_ in self.asked("time"):
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > 3:
                timed.append(name)
        return timed


class Scripted:
    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.name = "?"

    def __enter__(self) -> Scripted:
        self.lab.opened += 1
        return self

    def __exit__(self, *error: object) -> None:
        self.lab.closed += 1
        if self.name in self.lab.alive:  # it may have failed before it was told its name
            self.lab.alive.remove(self.name)

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        lab = self.lab
        if do == "load":
            self.name = Path(request["path"]).stem
            if self.name in lab.alive:
                self.name = CONTROL
            lab.alive.append(self.name)
        before = len(lab.asked(do, self.name))
        answer = getattr(self, do)(before, **request)
        lab.log.append((self.name, do, request, answer))
        if reason := lab.fails.get((self.name, do, before)):
            raise WorkerFailed(reason)
        return answer

    def load(self, before: int, **request: Any) -> dict[str, Any]:
        session = {"settings": {}, "disabled": request["disabled"]}
        return {"load_ms": 1.5, "session": session, "peak_rss_bytes": 1 << 19}

    def take(self, before: int, **request: Any) -> dict[str, Any]:
        return {}

    def time(self, before: int, calls: int) -> dict[str, Any]:
        one = self.lab.ns.get(self.name, self.lab.ns["baseline"])
        ns = [one + before * 10 + at for at in range(calls)]
        self.lab.now += sum(ns)
        return {
            "ns": ns,
            "elapsed_ns": sum(ns),
            "cpu_ns": sum(ns) // 2,
            "switches": 0,
        }

    def draw(self, before: int, ms: float) -> dict[str, Any]:
        return {"energy_mj": None}

    def offer(self, before: int, rate: float, count: int, seed: int) -> dict[str, Any]:
        return {"ns": [5_000_000] * count, "elapsed_ns": round(count / rate * 1e9)}

    def memory(self, before: int) -> dict[str, Any]:
        return {"peak_rss_bytes": 1 << 20, "run_rss_bytes": None}

    def placement(self, before: int, **request: Any) -> dict[str, Any]:
        kernel = {"name": "add", "op": "Add", "provider": "CPU", "us": [3.0, 1.0, 1.0]}
        return {"kernels": [kernel], "assigned": {"CPU": 2}, "graph": None}

    def predict(self, before: int, inputs: list[str], start: int, stop: int, out: str) -> Any:
        np.save(out, np.load(inputs[0])[start:stop] * 2)
        return {}


def artifacts(*names: str) -> list[Artifact]:
    return [Artifact(name, Path(f"{name}.onnx"), "onnx", "0" * 64) for name in names or NAMES]


def seen(lab: Lab, **given: Any) -> Observed:
    return observe(artifacts(), TARGET, FEED, start=lab.start, clock=lab.clock, **given)


def of(observed: Observed, name: str, quantity: str = "latency_ms") -> Measurement:
    found = [m for m in observed.measurements if (m.artifact, m.quantity) == (name, quantity)]
    assert len(found) == 1, f"{name}: each quantity is measured once or skipped once"
    return found[0]


def chunks(names: list[str], size: int) -> Iterator[list[str]]:
    assert len(names) % size == 0
    return (names[at : at + size] for at in range(0, len(names), size))


def test_every_round_times_each_once_in_an_order_of_its_own() -> None:
    lab = Lab()
    seen(lab, seconds=1.0)
    rounds = list(chunks(lab.rounds(), 4))
    assert all(sorted(one) == sorted([*NAMES, CONTROL]) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 8, "not one order again and again"
    assert {one[0] for one in rounds} == {*NAMES, CONTROL}, "each goes first at times"


def test_every_start_has_workers_of_its_own_and_its_share_of_the_time() -> None:
    lab = Lab()
    observed = seen(lab, seconds=3.0, processes=3, predict={"test": FEED}, load=True)
    assert lab.opened == lab.closed == 12
    assert len(lab.asked("load", "pruned")) == 3
    assert len(observed.processes) == 3
    assert all(abs(taken - 125) <= 1 for taken in observed.processes), "a second each"
    for name in NAMES:
        assert len(of(observed, name).values) == sum(observed.processes)
        assert of(observed, name).processes == observed.processes
        assert of(observed, name, "load_ms").values == ((1.5,),) * 3
        assert of(observed, name, "load_ms").processes == (1, 1, 1)
        for verb in ("predict", "placement"):
            assert len(lab.asked(verb, name)) == 1, "once is enough"


def test_starts_narrow_the_interval() -> None:
    def row(processes: int) -> Any:
        observed = seen(Lab(), seconds=0, processes=processes)
        return verdict.rows(observed, TARGET, TASK, True)[1]

    one, nine = row(1), row(9)
    assert (one["processes"], nine["processes"]) == (1, 9)
    assert one["speedup"]["verdict"] == "inconclusive"
    assert nine["speedup"]["verdict"] == "same"


def test_an_artifact_that_fails_in_a_later_start_is_a_reason() -> None:
    """It is timed 3 + 8 times in each start."""
    lab = Lab(fails={("int8", "time", 15): "out of memory"})
    observed = seen(lab, seconds=0, processes=2)
    assert observed.failed == {"int8": "out of memory"}
    assert of(observed, "int8").skipped == "out of memory"
    assert len(of(observed, "pruned").values) == 2 * ROUNDS
    assert lab.opened == lab.closed == 8


def test_rounds_end_when_all_is_known_well_enough() -> None:
    """Steady times of 100 us: 80 calls a block, and after 16 rounds there are 662 of each."""
    lab = Lab(dict.fromkeys(NAMES, 100_000))
    assert seen(lab, seconds=60.0).processes == (16,)
    rough = Lab(dict.fromkeys(NAMES, 100_000))
    wide = iter(range(10**9))

    class Rough(Scripted):
        def time(self, before: int, calls: int) -> dict[str, Any]:
            answer = super().time(before, calls)
            factor = 1 + next(wide) % 3
            return {**answer, "ns": [ns * factor for ns in answer["ns"]]}

    observed = observe(
        artifacts(), TARGET, FEED, start=lambda: Rough(rough), clock=rough.clock, seconds=1.0
    )  # type: ignore[arg-type, return-value]
    assert observed.processes[0] > 100, "until time is up"


def test_a_load_curve_offers_shares_of_what_a_closed_loop_serves() -> None:
    lab = Lab()
    observed = seen(lab, seconds=2.0, load=True)
    curve = observed.loads["pruned"]
    assert [point["offered_per_s"] / curve[0]["offered_per_s"] for point in curve] == (
        pytest.approx([share / protocol.OFFERED[0] for share in protocol.OFFERED])
    )
    (served,) = {m.unit: m for m in [of(observed, "pruned", "throughput_per_s")]}.values()
    fastest = float(np.median(served.values))
    assert curve[-1]["offered_per_s"] == pytest.approx(0.9 * fastest)
    rates = [request["rate"] * TARGET.batch for _, _, request, _ in lab.asked("offer", "pruned")]
    assert rates == pytest.approx([point["offered_per_s"] for point in curve])
    assert {point["p50"] for point in curve} == {5.0}
    assert all(point["p99"] is None for point in curve), "too few calls of 4 ms in 0.4 s"
    assert not lab.asked("offer", CONTROL)
    assert seen(Lab(), seconds=0).loads == {}


def test_a_slow_model_has_no_load_curve() -> None:
    lab = Lab(dict.fromkeys(NAMES, 500_000_000))
    assert seen(lab, seconds=2.0, load=True).loads == {}
    assert not lab.asked("offer")


def test_a_worker_that_dies_under_load_is_a_reason_and_asked_no_more() -> None:
    lab = Lab(fails={("pruned", "offer", 1): "the worker was killed"})
    observed = seen(lab, seconds=2.0, load=True, predict={"test": FEED})
    assert observed.failed == {"pruned": "the worker was killed"}
    assert [one[1] for one in lab.log if one[0] == "pruned"][-1] == "offer"
    assert set(observed.outputs) == set(observed.loads) == {"baseline", "int8"}


def test_outputs_that_cannot_be_put_together_are_a_reason() -> None:
    class Uneven(Scripted):
        def predict(self, before: int, inputs: list[str], start: int, stop: int, out: str) -> Any:
            np.save(out, np.zeros((1, start + 1)))
            return {}

    lab = Lab()
    split = (np.zeros((2 * PART, 3), dtype=np.float32),)
    observed = observe(
        artifacts("baseline"),
        Target(batch=PART),
        FEED,
        predict={"test": split},
        seconds=0,
        start=lambda: Uneven(lab),  # type: ignore[arg-type, return-value]
        clock=lab.clock,
    )
    assert "must match exactly" in observed.failed["baseline"]


def test_the_order_is_the_seeds() -> None:
    one, same, other = Lab(), Lab(), Lab()
    for lab, seed in ((one, 1), (same, 1), (other, 2)):
        seen(lab, seed=seed)
    assert one.rounds() == same.rounds() != other.rounds()


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, ROUNDS), (1.0, 125), (2.0, 250)])
def test_rounds_are_taken_until_time_is_up_and_never_fewer_than_eight(
    seconds: float, rounds: int
) -> None:
    """Blocks of two calls of 4 ms: 8 ms each, so 125 of each fill its second."""
    lab = Lab()
    taken = len(of(seen(lab, seconds=seconds), "pruned").values)
    assert abs(taken - rounds) <= 1, "the stand-in's calls take a few nanoseconds more"


def test_calls_are_grouped_into_blocks_of_eight_milliseconds() -> None:
    lab = Lab({"baseline": 1_000_000, "pruned": 30_000_000, "int8": 100})
    observed = seen(lab, seconds=0)
    sizes = {name: {len(block) for block in of(observed, name).values} for name in NAMES}
    assert sizes == {"baseline": {8}, "pruned": {1}, "int8": {1000}}
    assert {name: of(observed, name).warmup for name in NAMES} == {
        "baseline": 10,
        "pruned": 3,
        "int8": 1002,
    }
    calls = [request["calls"] for _, _, request, _ in lab.asked("time", "baseline")]
    assert calls == [1, 1, 8] + [8] * ROUNDS


def test_a_slow_model_is_called_eleven_times_whatever_the_time() -> None:
    lab = Lab(dict.fromkeys(NAMES, 60_000_000_000))
    seen(lab, seconds=0.8)
    assert {len(lab.asked("time", name)) for name in (*NAMES, CONTROL)} == {3 + ROUNDS}


def test_a_fast_model_is_not_called_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "CALLS", 20_000)
    monkeypatch.setattr(turns, "PRECISE", -1.0)
    lab = Lab(dict.fromkeys(NAMES, 5_000))
    assert len(of(seen(lab, seconds=1e9), "int8").values) == 20


def test_raw_values_are_kept_in_order() -> None:
    lab = Lab()
    observed = seen(lab, seconds=0)
    answers = [answer for *_, answer in lab.asked("time", "pruned")][3:]
    assert of(observed, "pruned").values == tuple(
        tuple(ns / 1e6 for ns in answer["ns"]) for answer in answers
    )
    assert of(observed, "pruned", "throughput_per_s").values == tuple(
        (TARGET.batch * 2 / (answer["elapsed_ns"] / 1e9),) for answer in answers
    )
    assert of(observed, "pruned", "peak_rss_bytes").values == ((float(1 << 20),),)
    assert of(observed, "pruned", "load_ms").values == ((1.5,),)


def test_the_worker_is_told_the_target_and_takes_the_batch_once() -> None:
    lab = Lab()
    target = Target(batch=5, threads=3)
    observe(artifacts(), target, FEED, seconds=0, start=lab.start, clock=lab.clock)
    assert {
        (name, request["provider"], request["threads"]) for name, _, request, _ in lab.asked("load")
    } == {(name, "cpu", 3) for name in (*NAMES, CONTROL)}
    assert [request["batch"] for _, _, request, _ in lab.asked("take")] == [5] * 4


def test_memory_is_asked_before_outputs() -> None:
    lab = Lab()
    seen(lab, seconds=0, predict={"test": FEED})
    verbs = [verb for name, verb, *_ in lab.log if name == "pruned"]
    assert verbs.index("memory") < verbs.index("predict")


def test_the_control_measures_the_noise_and_is_no_row() -> None:
    lab = Lab({CONTROL: 4_400_000})
    observed = seen(lab, seconds=0, predict={"test": FEED})
    assert of(observed, CONTROL).values
    assert not lab.asked("predict", CONTROL)
    floor = verdict.floor_of(observed)
    assert floor is not None
    assert floor["value"] == pytest.approx(0.1, abs=1e-3)
    rows = verdict.rows(observed, TARGET, TASK, primary=True)
    assert [row["artifact"] for row in rows] == [*NAMES]
    assert not any("control" in flag for row in rows for flag in row["noise"])


def test_outputs_come_whole_in_order_and_in_parts() -> None:
    """In whole batches: what dynamic quantization answers depends on the batch."""
    lab = Lab()
    split = (np.arange(3 * PART + 5, dtype=np.float32)[:, None],)
    target = Target(batch=PART // 2 + 1)
    observed = observe(
        artifacts(),
        target,
        FEED,
        predict={"test": split},
        seconds=0,
        start=lab.start,
        clock=lab.clock,
    )
    assert set(observed.outputs) == set(NAMES)
    np.testing.assert_array_equal(observed.outputs["int8"]["test"], split[0] * 2)
    spans = [(r["start"], r["stop"]) for _, _, r, _ in lab.asked("predict", "int8")]
    assert all((stop - start) % target.batch == 0 for start, stop in spans)
    assert len(spans) == 3


@pytest.mark.parametrize(
    ("verb", "before"),
    [("load", 0), ("take", 0), ("time", 0), ("time", 2), ("time", 6), ("memory", 0)],
)
def test_an_artifact_that_fails_is_a_reason_and_the_others_are_whole(
    verb: str, before: int
) -> None:
    lab = Lab(fails={("pruned", verb, before): "no luck"})
    observed = seen(lab, seconds=0.1, predict={"test": FEED})
    assert {of(observed, "pruned", quantity).skipped for quantity in QUANTITIES} == {"no luck"}
    assert observed.failed == {"pruned": "no luck"}
    assert set(observed.outputs) == {"baseline", "int8"}
    rows = {row["artifact"]: row for row in verdict.rows(observed, TARGET, TASK, True)}
    assert rows["pruned"]["skipped"] == "no luck"
    assert rows["int8"]["speedup"]["verdict"] == "inconclusive", "one start proves little"
    lengths = {len(of(observed, name).values) for name in ("baseline", "int8", CONTROL)}
    assert len(lengths) == 1, "the same rounds for all that lived"
    assert lengths.pop() >= ROUNDS
    assert [one[1] for one in lab.log if one[0] == "pruned"][-1] == verb, "asked no more"
    assert lab.opened == lab.closed


def test_an_artifact_without_outputs_keeps_its_times() -> None:
    lab = Lab(fails={("pruned", "predict", 0): "not finite"})
    observed = seen(lab, seconds=0, predict={"test": FEED})
    assert len(of(observed, "pruned").values) == ROUNDS
    assert observed.failed == {"pruned": "not finite"}
    rows = {row["artifact"]: row for row in verdict.rows(observed, TARGET, TASK, True)}
    assert rows["pruned"]["skipped"] == "not finite"


@pytest.mark.parametrize(("verb", "before"), [("load", 0), ("time", 5), ("memory", 0)])
def test_without_the_reference_the_others_are_measured_and_nothing_is_compared(
    verb: str, before: int
) -> None:
    lab = Lab(fails={("baseline", verb, before): "no luck"})
    observed = seen(lab, seconds=0, predict={"test": FEED})
    rows = {row["artifact"]: row for row in verdict.rows(observed, TARGET, TASK, True)}
    assert rows["baseline"]["skipped"] == "no luck"
    for name in ("pruned", "int8"):
        assert len(of(observed, name).values) == ROUNDS
        assert rows[name]["speedup"] is None
    assert verdict.floor_of(observed) is None
    assert set(observed.outputs) == {"pruned", "int8"}


@pytest.mark.parametrize(("verb", "before"), [("load", 0), ("time", 5), ("memory", 0)])
def test_without_the_control_only_the_noise_floor_is_missing(verb: str, before: int) -> None:
    lab = Lab(fails={(CONTROL, verb, before): "no memory left"})
    observed = seen(lab, seconds=0)
    assert observed.failed == {}
    assert verdict.floor_of(observed) is None
    rows = verdict.rows(observed, TARGET, TASK, True)
    assert [row["speedup"]["value"] for row in rows] == pytest.approx([1, 1, 1], rel=1e-3)
    for row in rows:
        assert any("no control: " in flag and "no memory left" in flag for flag in row["noise"])


def test_optimizers_that_hurt_an_artifact_reach_its_worker_and_its_row() -> None:
    lab = Lab()
    given = artifacts()
    given[2] = replace(given[2], steps=({"stage": "quantize", "facts": {"disabled": ["Gelu"]}},))
    target = Target("openvino", batch=2)
    observed = observe(given, target, FEED, seconds=0, start=lab.start, clock=lab.clock)
    asked = {name: (r["runtime"], r["disabled"]) for name, _, r, _ in lab.asked("load")}
    assert asked == {
        **dict.fromkeys(("baseline", "pruned", CONTROL), ("openvino", [])),
        "int8": ("openvino", ["Gelu"]),
    }
    rows = {row["artifact"]: row for row in verdict.rows(observed, target, TASK, True)}
    assert rows["int8"]["session"] == {"settings": {}, "disabled": ["Gelu"]}


def test_placement_is_asked_last_and_costs_no_row_when_it_fails() -> None:
    lab = Lab(fails={("pruned", "placement", 0): "no profile"})
    observed = seen(lab, seconds=0, predict={"test": FEED})
    rows = {row["artifact"]: row for row in verdict.rows(observed, TARGET, TASK, True)}
    assert rows["pruned"]["placement"] is None
    assert rows["pruned"]["latency_ms"]["n"]
    assert rows["int8"]["placement"]["nodes"] == {"CPU": 1}
    assert rows["int8"]["placement"]["operators"] == [{"op": "Add", "nodes": 1, "ms": 0.001}]
    assert [verb for name, verb, *_ in lab.log if name == "int8"][-1] == "placement"
    assert not lab.asked("placement", CONTROL)


def test_a_duel_takes_turns_between_targets() -> None:
    """The stand-in takes the second worker of an artifact for the control: here, the other
    runtime's."""
    lab = Lab({"baseline": 4_000_000, CONTROL: 2_000_000})
    both = Target(batch=2), Target("openvino", batch=2)
    observed = protocol.duel(
        [(protocol.DUEL, artifacts()[0], target) for target in both],
        FEED,
        seconds=0,
        start=lab.start,
        clock=lab.clock,
    )
    assert all(sorted(one) == ["baseline", CONTROL] for one in chunks(lab.rounds(), 2))
    assert {one.artifact for one in observed.measurements} == {protocol.DUEL}
    found = verdict.between(observed, *both, 0.0, seed=0)
    assert found is not None
    assert found["value"] == pytest.approx(2, abs=1e-3)
    assert found["verdict"] == "faster"
    assert verdict.between(observed, both[1], both[0], 0.0, seed=0)["verdict"] == "slower"  # type: ignore[index]
    assert lab.opened == lab.closed == 2


def test_a_duel_that_one_cannot_fight_has_no_ratio() -> None:
    lab = Lab(fails={(CONTROL, "load", 0): "unsupported operator"})
    both = Target(batch=2), Target("openvino", batch=2)
    observed = protocol.duel(
        [(protocol.DUEL, artifacts()[0], target) for target in both],
        FEED,
        seconds=0,
        start=lab.start,
        clock=lab.clock,
    )
    assert verdict.between(observed, *both, 0.0, seed=0) is None
    assert {m.skipped for m in observed.measurements if m.target == both[1]} == {
        "unsupported operator"
    }


def test_where_nothing_loads_there_are_only_reasons() -> None:
    lab = Lab(fails={(name, "load", 0): "broken" for name in NAMES})
    observed = seen(lab, predict={"test": FEED})
    assert [m.skipped for m in observed.measurements] == ["broken"] * 3 * len(QUANTITIES)
    assert observed.outputs == {}
    assert lab.opened == lab.closed == 3


def test_an_interruption_closes_every_worker() -> None:
    lab = Lab()

    def interrupted() -> float:
        if lab.rounds():
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        observe(artifacts(), TARGET, FEED, start=lab.start, clock=interrupted)
    assert lab.opened == lab.closed == 4


# --- CUDA, by a stand-in in real workers: nothing here ran on hardware ---


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setenv("PYTHONPATH", str(STANDIN))
    return Target(provider="cuda", batch=2)


def model(tmp_path: Path, name: str) -> Artifact:
    (tmp_path / f"{name}.onnx").write_bytes(b"the stand-in reads nothing")
    return Artifact.of(tmp_path / f"{name}.onnx", "onnx")


def test_cuda_rows_are_measured(cuda: Target, tmp_path: Path) -> None:
    both = [model(tmp_path, "baseline"), model(tmp_path, "fp16")]
    split = (np.arange(12, dtype=np.float32).reshape(4, 3),)
    observed = observe(both, cuda, FEED, predict={"test": split}, seconds=0)
    assert observed.failed == {}
    for row in verdict.rows(observed, cuda, TASK, primary=False):
        assert row["provider"] == "cuda"
        assert row["latency_ms"]["min"] > 0
        assert row["speedup"]["low"] > 0
    assert observed.outputs["fp16"]["test"].tolist() == [[3], [12], [21], [30]]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (
            "fallback",
            "CUDAExecutionProvider did not start; onnxruntime fell back to CPUExecutionProvider",
        ),
        ("broken", "CUDA failure 999: unknown error ; GPU=0"),
    ],
)
def test_cuda_that_does_not_start_is_a_reason(
    cuda: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, reason: str
) -> None:
    monkeypatch.setenv("STANDIN_CUDA", how)
    observed = observe([model(tmp_path, "baseline"), model(tmp_path, "fp16")], cuda, FEED)
    assert observed.failed == {"baseline": reason, "fp16": reason}
    assert {m.skipped for m in observed.measurements} == {reason}


def test_the_cpu_works_where_cuda_is_broken(
    cuda: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_CUDA", "broken")
    assert not observe([model(tmp_path, "baseline")], TARGET, FEED, seconds=0).failed


def test_a_worker_is_what_observe_starts_when_told_nothing() -> None:
    assert observe.__kwdefaults__["start"] is Worker
