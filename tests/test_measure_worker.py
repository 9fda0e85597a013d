"""The real worker: what it holds, what it writes, and how it fails. Each test starts processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, save_model

from compressor.artifact import Artifact
from compressor.measure.process import Worker, WorkerFailed
from compressor.measure.protocol import observe
from compressor.measurement import SETTINGS, Target

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")

FEED = (np.array([[1.0, 4.0], [-1.0, 2.0]], dtype=np.float32),)


def onnx_model(
    path: Path, operator: str, inputs: tuple[str, ...] = ("x",), batch: str | int = "n"
) -> Path:
    """``y = operator(inputs)`` over float32 of shape (n, 2)."""
    of = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 2]) for name in inputs]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 2])
    graph = helper.make_graph([helper.make_node(operator, list(inputs), ["y"])], "tiny", of, [y])
    opset = [helper.make_opsetid("", 17)]
    save_model(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    return onnx_model(tmp_path / "relu.onnx", "Relu")


def stored(tmp_path: Path, *arrays: Any) -> list[str]:
    paths = [tmp_path / f"input-{position}.npy" for position in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array)
    return [str(path) for path in paths]


def loaded(worker: Worker, path: Path) -> dict[str, Any]:
    return worker.ask("load", path=str(path), provider="cpu", threads=1)


def fed(worker: Worker, inputs: list[str]) -> dict[str, Any]:
    worker.ask("take", inputs=inputs, batch=1)
    return worker.ask("time", calls=1)


def children() -> set[str]:
    """Processes whose parent is this one, dead ones that nobody waited for included."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if after[1] == str(os.getpid()):
            found.add(stat.parent.name)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = children(), len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert (children(), len(list(Path("/proc/self/fd").iterdir()))) == before


# --- what it answers ---


def test_a_worker_loads_times_and_predicts(relu: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    inputs = stored(tmp_path, np.arange(-7, 7, dtype=np.float32).reshape(7, 2))
    with Worker() as worker:
        assert "CPUExecutionProvider" in worker.ask("providers")["providers"]
        assert loaded(worker, relu)["load_ms"] > 0
        worker.ask("take", inputs=inputs, batch=3)
        block = worker.ask("time", calls=5)
        assert len(block["ns"]) == 5
        assert 0 < sum(block["ns"]) <= block["elapsed_ns"]
        assert worker.ask("predict", inputs=inputs, start=2, stop=99, out=str(out)) == {"n": 5}
        assert worker.ask("memory")["peak_rss_bytes"] > 10e6
    assert np.load(out).tolist() == [[0, 0], [0, 0], [1, 2], [3, 4], [5, 6]]


def test_the_first_examples_are_taken_and_repeated_to_fill_the_batch(tmp_path: Path) -> None:
    """In the process itself: what ``take`` keeps is what is timed."""
    from compressor.measure.worker import Holder

    holder = Holder()
    holder.load(str(onnx_model(tmp_path / "add.onnx", "Add", ("a", "b"))), "cpu", 1)
    holder.take(stored(tmp_path, FEED[0], 2 * FEED[0]), batch=3)
    assert holder.feed["a"].tolist() == [[1, 4], [-1, 2], [1, 4]]
    assert holder.feed["b"].tolist() == [[2, 8], [-2, 4], [2, 8]]
    holder.take(stored(tmp_path, FEED[0], FEED[0]), batch=1)
    assert holder.feed["a"].tolist() == [[1, 4]]


def test_calls_are_timed_by_the_clock(relu: Path, tmp_path: Path) -> None:
    from compressor.measure.worker import Holder

    ticks = iter(range(0, 1000, 10))
    holder = Holder(clock=lambda: next(ticks))
    session = {"settings": SETTINGS, "disabled": ["ReluQuantFusion"]}
    loaded = holder.load(str(relu), "cpu", 1, disabled=["ReluQuantFusion"])
    assert (loaded["load_ms"], loaded["session"]) == (10 / 1e6, session)
    holder.take(stored(tmp_path, *FEED), batch=1)
    block = holder.time(3)
    assert (block["ns"], block["elapsed_ns"]) == ([10, 10, 10], 70)
    assert block["cpu_ns"] > 0
    assert block["switches"] >= 0


def test_calls_with_bound_outputs_are_timed_by_the_clock(relu: Path, tmp_path: Path) -> None:
    """On the CPU, whose memory is the host's: on a GPU nothing would be copied either."""
    from compressor.measure.worker import Holder

    ticks = iter(range(0, 1000, 10))
    holder = Holder(clock=lambda: next(ticks))
    holder.load(str(relu), "cpu", 1)
    holder.take(stored(tmp_path, *FEED), batch=2)
    assert holder.bound(3) == {"ns": [10, 10, 10]}
    holder.feed["x"] = holder.feed["x"] * np.float32("nan")
    with pytest.raises(ValueError, match="not finite"):
        holder.bound(1)


def test_memory_after_loading_is_counted_apart(tmp_path: Path) -> None:
    """100 MB that are taken and given back before loading are not part of running."""
    from compressor.measure.worker import peak_rss_bytes

    code = (
        "from compressor.measure.worker import Holder\n"
        f"import numpy\nholder = Holder()\nwaste = numpy.ones(100_000_000, 'u1')\ndel waste\n"
        f"loaded = holder.load({str(onnx_model(tmp_path / 'relu.onnx', 'Relu'))!r}, 'cpu', 1)\n"
        "print(json.dumps([loaded['peak_rss_bytes'], holder.memory()]), file=sys.stderr)"
    )
    loading, memory = in_fresh_python(code)
    assert memory["peak_rss_bytes"] >= loading > 100e6
    assert memory["run_rss_bytes"] is None or memory["run_rss_bytes"] < loading - 50e6
    assert peak_rss_bytes() > 0


class Server:
    """A model whose calls take ``service`` on a clock that only it and sleeping move."""

    def __init__(self, service: int) -> None:
        self.now, self.service, self.slept = 0, service, 0

    def clock(self) -> int:
        self.now += 100
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)
        self.slept += 1

    def run(self, names: None, feed: dict[str, Any]) -> list[Any]:
        self.now += self.service
        return [np.zeros(1)]


@pytest.mark.parametrize(("rate", "waits"), [(1.0, False), (900.0, True)])
def test_answers_are_late_by_the_queue_before_them(
    monkeypatch: pytest.MonkeyPatch, rate: float, waits: bool
) -> None:
    """Calls of 1 ms that arrive at 1 a second never wait; at 900 a second most do."""
    from compressor.measure import worker

    model = Server(1_000_000)
    monkeypatch.setattr(worker.time, "sleep", model.sleep)
    holder = worker.Holder(clock=model.clock)
    holder.opened = model
    served = holder.offer(rate, 300, seed=3)
    late = np.array(served["ns"])
    assert len(late) == 300
    assert late.min() >= 1_000_000
    assert bool(np.median(late) > 1_400_000) is waits
    assert served["elapsed_ns"] == pytest.approx(300e9 / rate, rel=0.25)
    # A queue of one server, by hand: who comes while another is served waits for its end.
    arrivals = np.cumsum(np.random.default_rng(3).exponential(1e9 / rate, 300))
    end, expected = 0.0, []
    for arrival in arrivals:
        end = max(end, arrival) + 1e6
        expected.append(end - arrival)
    np.testing.assert_allclose(late, expected, rtol=0.01, atol=5e4)


def test_examples_are_predicted_in_the_batches_that_are_timed(tmp_path: Path) -> None:
    """The largest of a batch decides dynamic quantization, so the batch must be the target's."""
    from compressor.measure.worker import Holder

    class Session:
        seen: list[int] = []  # noqa: RUF012

        def get_inputs(self) -> list[Any]:
            return [type("Input", (), {"name": "x"})]

        def run(self, names: None, feed: dict[str, Any]) -> list[Any]:
            self.seen.append(len(feed["x"]))
            return [feed["x"]]

    holder = Holder()
    holder.opened = Session()
    inputs = stored(tmp_path, np.zeros((8, 2), dtype=np.float32))
    holder.take(inputs, batch=3)
    holder.predict(inputs, 0, 8, str(tmp_path / "out.npy"))
    assert Session.seen == [3, 3, 2]


def test_a_file_of_whole_batches_gets_them_and_answers_for_the_examples(tmp_path: Path) -> None:
    from compressor.measure.worker import Holder

    path = onnx_model(tmp_path / "relu.onnx", "Relu", batch=3)
    holder = Holder()
    holder.load(str(path), "cpu", 1)
    x = np.arange(16, dtype=np.float32).reshape(8, 2)
    inputs = stored(tmp_path, x)
    holder.take(inputs, batch=3)
    assert holder.predict(inputs, 0, 8, str(tmp_path / "out.npy")) == {"n": 8}
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), x)


# --- what it holds ---


def in_fresh_python(code: str, *requests: dict[str, Any]) -> Any:
    """What the worker's module prints as JSON on standard error after these requests."""
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys, os, json\n{code}"],
        input=lines,
        capture_output=True,
        text=True,
        check=True,
        env={key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"},
    )
    return json.loads(done.stderr)


def test_it_imports_onnxruntime_and_numpy_and_little_else(relu: Path, tmp_path: Path) -> None:
    load = {"do": "load", "path": str(relu), "provider": "cpu", "threads": 1}
    take = {"do": "take", "inputs": stored(tmp_path, *FEED), "batch": 1}
    modules = in_fresh_python(
        "from compressor.measure import worker\nworker.serve()\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)",
        load,
        take,
        {"do": "time", "calls": 2},
    )
    assert {name for name in modules if name.startswith("compressor")} == {
        "compressor",
        "compressor.errors",
        "compressor.measure",
        "compressor.measure.device",
        "compressor.measure.runtime",
        "compressor.measure.worker",
        "compressor.measurement",
    }
    tops = {name.partition(".")[0] for name in modules}
    assert {"onnxruntime", "numpy"} <= tops
    assert not {"torch", "onnx", "sklearn", "scipy", "pydantic", "typer", "matplotlib"} & tops


def test_importing_the_runtime_is_not_part_of_loading(relu: Path) -> None:
    """It takes 30 ms, loading a small model 1."""
    assert in_fresh_python(
        "from compressor.measure.worker import Holder\nseen = []\n"
        "def clock():\n    seen.append('onnxruntime' in sys.modules)\n    return 0\n"
        f"Holder(clock).load({str(relu)!r}, 'cpu', 1)\n"
        "print(json.dumps(seen), file=sys.stderr)"
    ) == [True, True]


def test_a_file_of_the_users_does_not_stand_in_for_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not yours')")
    monkeypatch.chdir(tmp_path)
    with Worker() as worker:
        worker.ask("memory")


# --- telemetry ---


def test_the_worker_itself_turns_telemetry_off() -> None:
    assert (
        in_fresh_python(
            "import compressor.measure.worker\n"
            "print(json.dumps(os.environ['ORT_DISABLE_TELEMETRY']), file=sys.stderr)"
        )
        == "1"
    )


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    for variable in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(variable, str(home))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads are none of ours
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    monkeypatch.delenv("CI", raising=False)  # onnxruntime keeps quiet there by itself
    return home


def test_a_worker_writes_nothing_at_home_and_starts_no_thread(
    relu: Path, tmp_path: Path, empty_home: Path
) -> None:
    with Worker() as worker:
        loaded(worker, relu)
        worker.ask("take", inputs=stored(tmp_path, *FEED), batch=2)
        worker.ask("time", calls=10)
        assert worker.ask("memory")["peak_rss_bytes"]
        threads = list(Path(f"/proc/{worker.pid}/task").iterdir())
    assert len(threads) == 1
    assert list(empty_home.rglob("*")) == []


def test_without_the_variable_this_onnxruntime_does_both(empty_home: Path) -> None:
    """The control of the test above, in a network of its own, so that nothing can be sent."""
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 29):
        pytest.skip("telemetry came with onnxruntime 1.29")
    alone = ["unshare", "--map-root-user", "--net"]
    try:
        subprocess.run([*alone, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine gives no network of one's own, and a test must not send anything")
    code = "import onnxruntime, os; print(len(os.listdir('/proc/self/task')))"
    done = subprocess.run(
        [*alone, sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) > 1
    assert [path.name for path in empty_home.rglob("deviceid")] == ["deviceid"]


# --- how it fails ---


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "doesn't exist"),
        (b"", "failed"),
        (b"not a model at all" * 9, "Protobuf parsing failed"),
    ],
)
def test_a_file_that_is_no_model_is_one_line(
    tmp_path: Path, content: bytes | None, line: str
) -> None:
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    with Worker() as worker:
        with pytest.raises(WorkerFailed, match=line) as failed:
            loaded(worker, path)
        assert "\n" not in str(failed.value)
        assert worker.ask("memory"), "it lives on"


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ((), r"takes 1 inputs \(x\), 0 were given"),
        ((FEED[0], FEED[0]), r"takes 1 inputs \(x\), 2 were given"),
        ((FEED[0].astype(np.float64),), "Unexpected input data type"),
        ((FEED[0][:, :1],), "Got invalid dimensions"),
        ((np.full((2, 2), np.nan, dtype=np.float32),), "not finite"),
    ],
)
def test_inputs_that_do_not_fit_are_one_line(
    relu: Path, tmp_path: Path, arrays: tuple[Any, ...], line: str
) -> None:
    with Worker() as worker:
        loaded(worker, relu)
        with pytest.raises(WorkerFailed, match=line) as failed:
            fed(worker, stored(tmp_path, *arrays))
    assert "\n" not in str(failed.value)


def test_an_output_that_is_not_a_number_is_neither_timed_nor_kept(tmp_path: Path) -> None:
    """Log of the second example is NaN: timing at batch 1 does not meet it, the outputs do."""
    log = Artifact.of(onnx_model(tmp_path / "log.onnx", "Log"), "onnx")
    observed = observe([log], Target(batch=1), FEED, predict={"test": FEED}, seconds=0)
    assert observed.failed == {"log": "the model's output is not finite (NaN or infinity)"}
    absent = {m.quantity for m in observed.measurements if not m.values}
    assert absent <= {"energy_mj", "vram_bytes", "device_ms", "peak_run_bytes"}
    timed = observe([log], Target(batch=2), FEED, seconds=0)
    assert {m.skipped for m in timed.measurements} == {observed.failed["log"]}


def test_an_unknown_request_is_an_error() -> None:
    with Worker() as worker, pytest.raises(WorkerFailed, match="unknown request '__init__'"):
        worker.ask("__init__")


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts another onnxruntime into the worker, which runs ``code`` when a model is opened."""

    def install(code: str) -> None:
        opening = "".join(f"        {line}\n" for line in code.splitlines())
        (tmp_path / "onnxruntime.py").write_text(
            "import os, time\n"
            "def get_available_providers(): return ['CPUExecutionProvider']\n"
            "class SessionOptions:\n"
            "    def add_session_config_entry(self, key, value): pass\n"
            "class InferenceSession:\n"
            f"    def __init__(self, *given, providers):\n{opening}"
            "    def get_providers(self): return ['CPUExecutionProvider']\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return install


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("os._exit(7)", "the worker ended with exit code 7"),
        ("os._exit(0)", "the worker ended with exit code 0"),
        (f"os.kill(os.getpid(), {int(signal.SIGSEGV)})", "the worker was killed by SIGSEGV"),
        ("os.kill(os.getpid(), 9)", "the worker was killed by SIGKILL (out of memory?)"),
        (
            "os.write(2, b'GPU on fire\\n\\n')\nos.abort()",
            "the worker was killed by SIGABRT: GPU on fire",
        ),
        ("raise SystemExit('no licence')", "the worker ended with exit code 1: no licence"),
    ],
)
def test_a_worker_that_dies_says_how(runtime: Any, tmp_path: Path, code: str, line: str) -> None:
    runtime(code)
    with Worker() as worker, pytest.raises(WorkerFailed) as failed:
        loaded(worker, tmp_path)
    assert str(failed.value) == line


def test_a_worker_that_died_between_requests_says_so() -> None:
    with Worker() as worker:
        worker.ask("memory")
        os.kill(worker.pid, signal.SIGTERM)
        with pytest.raises(WorkerFailed, match="the worker was killed by SIGTERM"):
            worker.ask("memory")


HALF_A_LINE = """
for fd in map(int, os.listdir('/proc/self/fd')):
    if fd > 2 and os.path.exists(f'/proc/self/fd/{fd}'):
        if os.readlink(f'/proc/self/fd/{fd}').startswith('pipe:'):
            os.write(fd, b'{"ok"')
time.sleep(3600)
"""


@pytest.mark.parametrize("code", ["time.sleep(3600)", HALF_A_LINE])
def test_a_worker_that_hangs_is_given_up_while_the_parent_sleeps(
    runtime: Any, tmp_path: Path, code: str
) -> None:
    runtime(code)
    spent = time.process_time()
    with Worker(timeout=1) as worker, pytest.raises(WorkerFailed, match="no answer within 1 s"):
        loaded(worker, tmp_path)
    assert time.process_time() - spent < 0.5, "waiting takes no processor from what is timed"


def test_what_the_runtime_prints_is_no_answer(runtime: Any, tmp_path: Path) -> None:
    runtime("print('hello', flush=True)\nos.write(1, b'{\"ok\": 1}\\n')")
    with Worker() as worker:
        assert loaded(worker, tmp_path)["load_ms"] >= 0


def test_a_worker_that_never_started_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('numpy is broken here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Worker() as worker, pytest.raises(WorkerFailed, match=r"exit code 1: .*broken here"):
        worker.ask("memory")


def test_an_interruption_ends_the_processes(relu: Path) -> None:
    ticks = iter([0.0])

    def clock() -> float:
        try:
            return next(ticks)
        except StopIteration:
            assert len(children()) >= 2, "the model and its control are alive"
            raise KeyboardInterrupt from None

    with pytest.raises(KeyboardInterrupt):
        observe([Artifact.of(relu, "onnx")], Target(batch=2), FEED, clock=clock)


def test_closing_twice_is_closing_once() -> None:
    worker = Worker()
    worker.close()
    worker.close()
