"""The guard: what a child is given comes back bit for bit, and what it does stays with it.

The readers in this file stand for a reader that a hostile file has taken over.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import compressor
from compressor import guard, zoo
from compressor.data import arrays
from compressor.errors import CompressorError, InputError
from compressor.guard.child import found
from compressor.guard.confine import OPEN, RESULT, off_the_network
from compressor.guard.result import DTYPES, LARGEST_HEADER, Result, most, write
from compressor.guard.server import ENVIRONMENT, FORKING, SERVERS, SINGLE, UNCONFINED
from compressor.loading import checkpoint, pickled, pt2, readers, torchfile

pytestmark = pytest.mark.skipif(not FORKING, reason="the server is Linux's")

HERE = Path(__file__)
Said = tuple[dict[str, Any], dict[str, torch.Tensor]]


@pytest.fixture(scope="module", autouse=True)
def hostile() -> Iterator[None]:
    """The readers of this file, in a server that can import them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE.parent))
        patch.setenv("TOKEN", "secret")
        for name, value in list(globals().items()):
            if getattr(value, "reader", False):
                patch.setitem(readers.READERS, name, f"{HERE.stem}:{name}")
        guard.close()
        yield
        guard.close()


def reader(function: Callable[[Path], Said]) -> Callable[[Path], Said]:
    function.reader = True  # type: ignore[attr-defined]
    return function


def refused(name: str, path: Path = HERE, **limits: Any) -> str:
    """The one line that reading ends in."""
    with pytest.raises(InputError) as caught:
        readers.guarded(name, path, **limits)
    line = str(caught.value)
    assert line.isprintable()
    assert line.startswith(str(path))
    assert len(line) <= guard.LONGEST
    return line


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return tensor.dtype, tuple(tensor.shape), dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(bits(one[name]) == bits(other[name]) for name in one)


@reader
def npz(path: Path) -> Said:
    given = arrays._zipped(path)
    texts = {name: str(value) for name, value in given.items() if value.dtype.kind == "U"}
    return {"texts": texts}, {
        # PyTorch takes numbers in this machine's order of bytes only.
        name: torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))
        for name, value in given.items()
        if name not in texts
    }


# Bit for bit


@reader
def every(_: Path) -> Said:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, dtype in DTYPES.items():
        count = 24 * dtype.itemsize
        raw = torch.randint(0, 2 if name == "bool" else 256, (count,), generator=generator)
        whole = raw.to(torch.uint8).view(dtype).reshape(2, 3, 4)
        state[name] = whole
        if not re.fullmatch("u?int[1-7]", name):  # PyTorch can hold these, and nothing else
            state[f"{name} turned"] = whole.transpose(0, 2)
            state[f"{name} in steps"] = whole[:, :, 1::2]
        state[f"{name} single"] = whole[1, 2, 3]
        state[f"{name} empty"] = whole[:0]
    pair = torch.complex(torch.rand(3), torch.rand(3)) * 0 + torch.tensor([1 + 2j, -3j, 4])
    state["conjugate"], state["negative"] = pair.conj(), pair.conj().imag
    state["repeated"] = torch.tensor([7.0]).expand(3, 5)
    state["parameter"] = torch.nn.Parameter(torch.ones(2))
    state["tied"] = state["float32"]
    state["a name \N{SNOWMAN} \ud800\n"] = torch.full((1,), float("nan"))
    return {"said": [1, 0.5, None, {"text": "\N{SNOWMAN}"}], "large": 1 << 80}, state


def test_tensors_of_every_kind_come_back_bit_for_bit() -> None:
    said, state = readers.guarded("every", HERE)
    expected, tensors = every(HERE)
    assert said == expected
    assert same(state, tensors)
    assert len(state) > 30 * 5
    assert state["tied"] is state["float32"]
    assert not any(tensor.requires_grad for tensor in state.values())


def test_what_comes_back_can_be_changed_without_changing_its_neighbours() -> None:
    _, state = readers.guarded("every", HERE)
    before = {name: bits(tensor) for name, tensor in state.items()}
    state["float64"].fill_(1)
    assert bool((state["float64"] == 1).all())
    assert [name for name in state if bits(state[name]) != before[name]] == ["float64"]


@pytest.mark.parametrize("name", ["cnn", "mobilenet_v2", "lstm"])
def test_a_model_is_what_it_is_without_the_guard(tmp_path: Path, name: str) -> None:
    shape = {"cnn": (1, 8, 8), "lstm": (8, 8)}.get(name, (1, 32, 32))
    arguments = zoo.arguments_for(name, shape, 10)
    path = compressor.save(
        zoo.build(name, arguments),
        tmp_path / "model.pt",
        factory=f"compressor.zoo:{name}",
        arguments=arguments,
        inputs=torch.zeros(1, *shape),
        kind="classification",
        data="digits",
        about={"epochs": 3, "a": [None, 0.5]},
    )
    bare, guarded = checkpoint.read(path), readers.read(path)
    assert same(dict(bare.state), dict(guarded.state))
    for field in ("source", "inputs", "kind", "data", "about"):
        assert getattr(bare, field) == getattr(guarded, field), field


def deflated(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in entries:
            archive.writestr(entry.filename, content)


@pytest.mark.parametrize("form", ["zip", "legacy", "deflated", "safetensors"])
def test_state_dicts_of_every_form_come_back(tmp_path: Path, form: str) -> None:
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pt")
    state = {"weight": torch.arange(12.0).reshape(3, 4), "half": torch.ones(3).bfloat16()}
    if form == "safetensors":
        save_file(state, path)
        assert readers.guarded("safetensors", path)[0] == {"header": None}
        state = dict(sorted(state.items()))
    else:
        tied = {**state, "turned": state["weight"].T, "tied": state["half"]}
        torch.save(tied, path, _use_new_zipfile_serialization=form != "legacy")
        state = tied
    if form == "deflated":
        deflated(path)
    found = readers.read(path)
    assert same(dict(sorted(found.state.items())), dict(sorted(state.items())))
    assert found.source is found.kind is None


def test_a_torch_form_artifact_and_arrays_come_back(tmp_path: Path) -> None:
    model, path = torch.nn.Linear(2, 3), tmp_path / "model.safetensors"
    torchfile.write(path, model, {"factory": "a:b", "arguments": {}})
    said, state = readers.guarded("safetensors", path)
    assert said["header"] == torchfile.header(path)
    assert same(dict(sorted(state.items())), dict(sorted(model.state_dict().items())))
    path = tmp_path / "data.npz"
    np.savez(path, x=np.arange(6, dtype=">f4").reshape(2, 3), y=np.array([1, 2]), kind="binary")
    said, state = readers.guarded("npz", path)
    assert said == {"texts": {"kind": "binary"}}
    assert same(state, {"x": torch.arange(6.0).reshape(2, 3), "y": torch.tensor([1, 2])})


def test_whole_models_and_programs_come_back(tmp_path: Path) -> None:
    model = zoo.build("mlp", {"features": 2, "outputs": 1, "hidden": [3]}).eval()
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()), path)
    description, state = pickled.read(path)
    said, found = readers.guarded("pickled", path)
    assert said == json.loads(json.dumps(description))
    assert same(found, state)
    path = tmp_path / "model.pt2"
    batch = {0: torch.export.Dim("batch", min=1)}
    with warnings.catch_warnings(action="ignore"):  # of torch.export
        program = torch.export.export(model, (torch.rand(3, 2),), dynamic_shapes=(batch,))
        torch.export.save(program, path)
    description, state, inputs = pt2.read(path)
    said, found, taken = readers.read_pt2(path)
    assert said == json.loads(json.dumps(description))
    assert taken == inputs
    assert same(found, state)
    server = SERVERS[os.getpid()].process.pid
    assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1  # it can still be forked safely


def test_readers_are_asked_by_name_only() -> None:
    with pytest.raises(KeyError):
        readers.guarded("os:system", HERE)


def test_a_path_may_be_relative_or_strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("a \N{SNOWMAN}\nb.pt")
    torch.save({"w": torch.ones(1)}, path)
    assert list(readers.read(path).state) == ["w"]
    with pytest.raises(InputError, match=re.escape("a \N{SNOWMAN} b.pt took longer")):
        readers.guarded("looping", path, seconds=0.1)
    assert "missing.pt does not exist" in refused("checkpoint", Path("missing.pt"))
    assert str(tmp_path) not in refused("checkpoint", Path("missing.pt"))


# Limits


@reader
def taking(_: Path) -> Said:
    return {"n": len(bytearray(1 << 40))}, {}


@reader
def growing(_: Path) -> Said:
    held = []
    while True:
        held.append(torch.ones(1 << 20))


@reader
def disguising(_: Path) -> Said:
    try:
        return growing(HERE)
    except Exception:
        raise InputError("it is broken: save it again") from None


@reader
def repeating(_: Path) -> Said:
    return {}, {"w": torch.zeros(1).expand(1 << 40)}


@reader
def laughing(_: Path) -> Said:
    said: list[Any] = []
    for _ in range(60):
        said = [said, said]
    return {"said": said}, {}


@pytest.mark.parametrize("name", ["taking", "growing", "disguising", "repeating", "laughing"])
def test_memory_is_limited_and_the_parents_stays(name: str) -> None:
    guard.holding()  # starts the server
    with peak() as grown:
        assert "needs more than 40 MB to read" in refused(name, memory=40_000_000)
    assert grown() < 16 << 20


class peak:  # noqa: N801 - reads as a verb where it stands
    """How far the largest resident set of this process grows inside the block, in bytes."""

    def __enter__(self) -> Callable[[], int]:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.before = self.now()
        return lambda: self.after - self.before

    def __exit__(self, *_: object) -> None:
        self.after = self.now()

    def now(self) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def test_the_measure_of_memory_sees_what_it_should() -> None:
    with peak() as grown:
        torch.ones(16 << 20).sum()
    assert grown() > 48 << 20


@reader
def looping(_: Path) -> Said:
    while True:
        pass


@reader
def sleeping(_: Path) -> Said:
    time.sleep(1000)
    return {}, {}


@pytest.mark.parametrize("name", ["looping", "sleeping"])
def test_time_is_limited(name: str) -> None:
    assert "took longer than 0.2 s" in refused(name, seconds=0.2)
    assert not children()


def children() -> list[int]:
    """The server's children, those that are dead and not yet buried among them."""
    server = SERVERS[os.getpid()].process.pid
    said = Path(f"/proc/{server}/task/{server}/children").read_text(encoding="ascii")
    return [int(child) for child in said.split()]


@reader
def looking(_: Path) -> Said:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    names = ("NoNewPrivs", "Seccomp")
    return {
        "descriptors": sorted(int(each.name) for each in Path("/proc/self/fd").iterdir())[:-1],
        "environment": sorted(os.environ),
        "status": {
            line.split(":")[0]: int(line.split()[1])
            for line in status.splitlines()
            if line.split(":")[0] in names
        },
        "limits": Path("/proc/self/limits").read_text(encoding="utf-8").splitlines(),
        "folder": str(Path.cwd()),
    }, {}


def test_a_child_has_little(tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        said, _ = readers.guarded("looking", HERE, seconds=7, memory=1 << 30)
    assert said["descriptors"] == [0, 1, 2, RESULT]
    # Set by Python where the language is C, by our package, by PyTorch's compiler.
    added = {"LC_CTYPE", "ORT_DISABLE_TELEMETRY", "TORCHINDUCTOR_CACHE_DIR", "TORCH_CPP_LOG_LEVEL"}
    assert {*said["environment"]} <= {*ENVIRONMENT, *SINGLE, *added}
    assert said["status"]["NoNewPrivs"] == 1
    assert (said["status"]["Seccomp"] == 2) == guard.holding()["files"]
    limits = {line[:25].strip(): line[25:].split()[0] for line in said["limits"]}
    assert limits["Max cpu time"] == "7"
    assert limits["Max core file size"] == "0"
    assert limits["Max open files"] == str(OPEN)
    assert 1 << 30 < int(limits["Max address space"]) < 20 << 30
    assert limits["Max file size"] == str(most(1 << 30))
    assert said["folder"] == SERVERS[os.getpid()].folder


@reader
def trying(path: Path) -> Said:
    """What each forbidden thing ends in; ``path`` is a folder to do damage in."""
    import fcntl
    import resource

    libc = ctypes.CDLL(None, use_errno=True)
    held, core = path / "held", resource.RLIMIT_CORE

    def called(name: str, *values: Any) -> None:
        if getattr(libc, name)(*values) < 0:
            raise OSError(ctypes.get_errno(), name)

    def forked() -> None:
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)

    attempts: dict[str, Callable[[], Any]] = {
        "network": lambda: socket.socket().close(),
        "socket of files": lambda: socket.socket(socket.AF_UNIX).close(),
        "pair": lambda: [each.close() for each in socket.socketpair()],
        "write": lambda: (path / "new").write_text("x"),
        "change": lambda: held.open("r+").close(),
        "append": lambda: held.open("a").close(),
        "empty": lambda: os.truncate(held, 0),
        "rename": lambda: held.rename(path / "moved"),
        "link": lambda: (path / "link").symlink_to(held),
        "folder": (path / "folder").mkdir,
        "rights": lambda: path.chmod(0o700),
        "delete": (path / "doomed").unlink,
        "program": lambda: subprocess.run(["true"], check=True),
        "shell": lambda: called("system", b"exit 0") if os.system("exit 0") else None,
        "fork": forked,
        "signal": lambda: os.kill(os.getppid(), 0),
        "limits": lambda: resource.setrlimit(core, resource.getrlimit(core)),
        "other memory": lambda: called("process_vm_readv", os.getppid(), None, 0, None, 0, 0),
        "own space": lambda: called("unshare", 0),
        "nice": lambda: os.nice(0),
        "memory file": lambda: os.close(os.memfd_create("x")),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "done"
        except (OSError, ValueError) as error:  # of limits, Python says ValueError
            found[name] = type(error).__name__
    assert fcntl.fcntl(0, fcntl.F_GETFD) >= 0
    return found, {}


def prepared(folder: Path) -> Path:
    for name in ("held", "doomed"):
        (folder / name).write_text("data", encoding="utf-8")
    return folder


def test_a_child_reaches_nothing(tmp_path: Path) -> None:
    if not guard.holding()["files"]:
        pytest.skip("system calls cannot be filtered here")
    said, _ = readers.guarded("trying", prepared(tmp_path))
    allowed = {name for name, outcome in said.items() if outcome == "done"}
    assert allowed <= {"shell"}, said  # the shell is not there: its exit code says so
    assert sorted(each.name for each in tmp_path.iterdir()) == ["doomed", "held"]
    assert (tmp_path / "held").read_text(encoding="utf-8") == "data"
    # The attempts are real: without a guard each of them does what it says.
    before = tmp_path / "before"
    before.mkdir()
    assert set(trying(prepared(before))[0].values()) == {"done"}


@reader
def lonely(path: Path) -> Said:
    with socket.create_connection(("127.0.0.1", int(path.name))):
        connected = True
    moved = off_the_network()
    try:
        with socket.create_connection(("127.0.0.1", int(path.name))):
            return {"moved": moved, "connected": connected, "again": True}, {}
    except OSError:
        return {"moved": moved, "connected": connected, "again": False}, {}


def test_a_server_leaves_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the filter, in a fresh process that has none; also how other systems read."""
    kept = guard.holding()["network"]
    monkeypatch.setattr(guard.server, "FORKING", False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        said, _ = readers.guarded("lonely", Path("/") / str(listening.getsockname()[1]))
    assert said == {"moved": kept, "connected": True, "again": not kept}
    assert guard.holding() == {"memory": False, "network": False, "files": False}


def test_other_systems_read_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard.server, "FORKING", False)
    said, state = readers.guarded("every", HERE)
    assert said == every(HERE)[0]
    assert same(state, every(HERE)[1])
    assert "took longer than 0.5 s" in refused("looping", seconds=0.5)


# Crashes and lies


@reader
def aborting(_: Path) -> Said:
    os.abort()


@reader
def faulting(_: Path) -> Said:
    ctypes.string_at(0)
    return {}, {}


@reader
def killed(_: Path) -> Said:
    signal.raise_signal(signal.SIGKILL)
    return {}, {}


@reader
def leaving(_: Path) -> Said:
    os._exit(3)


@reader
def unlimited(_: Path) -> Said:
    os._exit(UNCONFINED)


@reader
def failing(_: Path) -> Said:
    raise ValueError("bad\x1b[2J\N{RIGHT-TO-LEFT OVERRIDE}\n" + "x" * 10_000)


@reader
def refusing(path: Path) -> Said:
    raise InputError(f"{path} is\x1b[2J\n\N{RIGHT-TO-LEFT OVERRIDE}bad: " + "x" * 10_000)


@reader
def describing(_: Path) -> Said:
    return {"layer": torch.nn.ReLU()}, {}


@reader
def chattering(_: Path) -> Said:
    return {"text": "x" * (LARGEST_HEADER + 1)}, {}


@reader
def sparse(_: Path) -> Said:
    return {}, {"w": torch.eye(3).to_sparse()}


@reader
def elsewhere(_: Path) -> Said:
    return {}, {"w": torch.zeros(3, device="meta")}


@reader
def quantized(_: Path) -> Said:
    with_scale = torch.zeros(3, dtype=torch.float32)
    return {}, {"w": torch.quantize_per_tensor(with_scale, 1.0, 0, torch.qint8)}


@reader
def numbered(_: Path) -> Said:
    return {}, {3: torch.zeros(1)}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("aborting", "is damaged, or made to do this: its reader crashed (SIGABRT); save it again"),
        ("faulting", "is damaged, or made to do this: its reader crashed (SIGSEGV); save it again"),
        ("killed", "its reader crashed (SIGKILL (out of memory?))"),
        ("leaving", "its reader ended with exit code 3"),
        ("unlimited", "was not read: this machine lets no limits be set"),
        ("failing", "cannot be read (ValueError: bad [2J xxx"),
        ("refusing", "is [2J bad: xxx"),
        ("describing", "describes itself in values that are not plain ("),
        ("chattering", "bytes: 8,388,608 are allowed"),
        ("sparse", "'w' is sparse_coo float32 on cpu: save dense tensors"),
        ("elsewhere", "'w' is strided float32 on meta: save dense tensors"),
        ("quantized", "'w' is strided qint8 on cpu: save dense tensors"),
        ("numbered", "holds 3, a Tensor: save tensors by their names"),
    ],
)
def test_what_goes_wrong_in_a_child_is_one_line(name: str, said: str) -> None:
    assert said in refused(name)


def lie(said: Any, entries: dict[str, Any] | None = None, data: bytes = b"") -> bytes:
    """A result that nobody's reader wrote."""
    plain = said if isinstance(said, str) else json.dumps(said)
    text = json.dumps({"__metadata__": {"compressor": plain}, **(entries or {})}).encode()
    return len(text).to_bytes(8, "little") + text + data


def blob(size: int, dtype: str = "U8") -> dict[str, Any]:
    return {"0": {"dtype": dtype, "shape": [size], "data_offsets": [0, size]}}


def one(dtype: Any = "float32", shape: Any = (2,), said: Any = None, key: Any = "0") -> Any:
    return {"said": {} if said is None else said, "tensors": [["w", key, dtype, shape]]}


LIES = {
    "nothing": b"",
    "noise": bytes(range(256)) * 9,
    "a header without end": b"\xff" * 8,
    "a header longer than the file": (1 << 20).to_bytes(8, "little") + b"{}",
    "no metadata": lie("")[:8] + b"{}" + b" " * 80,
    "no JSON": lie("{"),
    "a number": lie(3),
    "a deep list": lie("[" * 100_000),
    "no tensors": lie({"said": {}}),
    "tensors that are none": lie({"said": {}, "tensors": [3]}),
    "no description": lie(one(said=[1]), blob(64), bytes(64)),
    "less data": lie(one(), blob(64), bytes(63)),
    "more data": lie(one(), blob(64), bytes(65)),
    "a smaller blob": lie(one(shape=(17,)), blob(64), bytes(64)),
    "a larger blob": lie(one(), blob(128), bytes(128)),
    "no such blob": lie(one(key="1"), blob(64), bytes(64)),
    "a blob of other numbers": lie(one(), blob(64, "I8"), bytes(64)),
    "an unknown dtype": lie(one(dtype="float31"), blob(64), bytes(64)),
    "no dtype": lie(one(dtype=None), blob(64), bytes(64)),
    "a negative size": lie(one(shape=(-2, -1)), blob(64), bytes(64)),
    "a broken size": lie(one(shape=(0.5,)), blob(64), bytes(64)),
    "a size of 2^63": lie(one(shape=(1 << 63, 0)), blob(0)),
    "sizes of 2^124 with none": lie(one(shape=(1 << 62, 1 << 62, 0)), blob(0)),
    "a name twice": lie({"said": {}, "tensors": 2 * one()["tensors"]}, blob(64), bytes(64)),
    "a hole": lie(one(), {"0": {"dtype": "U8", "shape": [64], "data_offsets": [8, 72]}}, bytes(72)),
}


@reader
def lying(path: Path) -> Said:
    os.write(RESULT, LIES[path.name])
    os._exit(0)


@pytest.mark.parametrize("what", LIES)
def test_a_child_is_not_believed(what: str) -> None:
    assert "handed back what it cannot have read" in refused("lying", Path("/") / what)


def test_the_lies_differ_from_the_truth_in_what_they_say() -> None:
    LIES["truth"] = lie(one(), blob(64), bytes(64))
    result = Result()
    with result:
        os.write(result.descriptor, LIES.pop("truth"))
        said, state = result.taken(1 << 20)
    assert said == {"said": {}}
    assert torch.equal(state["w"], torch.zeros(2))


@reader
def sealing(_: Path) -> Said:
    import fcntl

    os.write(RESULT, lie(one(), blob(64), bytes(64)))
    fcntl.fcntl(RESULT, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    os._exit(0)


def test_a_result_that_can_still_change_is_refused(tmp_path: Path) -> None:
    assert "handed back what it cannot have read" in refused("sealing")
    with Result() as result:
        os.write(result.descriptor, lie(one(), blob(64), bytes(64)))
        with mmap.mmap(result.descriptor, 0), pytest.raises(OSError, match="busy"):
            result.taken(1 << 20)  # somebody can write to it
        result.taken(1 << 20)
        with pytest.raises(OSError, match="not permitted"):
            os.write(result.descriptor, b"x")


@given(
    edits=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=4),
    cut=st.floats(0.5, 1),
)
def test_a_changed_result_is_an_error_or_tensors(edits: list[tuple[int, int]], cut: float) -> None:
    with Result() as result:
        write(result.descriptor, HERE, *every(HERE))
        whole = bytearray(os.pread(result.descriptor, 1 << 20, 0))
        header = 8 + int.from_bytes(whole[:8], "little")
        for place, value in edits:
            whole[place % header] = value
        whole = whole[: round(len(whole) * cut)]
        os.lseek(result.descriptor, 0, os.SEEK_SET)
        os.ftruncate(result.descriptor, 0)
        os.write(result.descriptor, whole)
        try:
            said, state = result.taken(1 << 20)
        except Exception:
            return
    assert type(said) is dict
    assert sum(tensor.nbytes for tensor in state.values()) <= 2 * len(whole)  # one is tied


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in ("kind", "data", "source", "inputs", "about")
        for value in (3, "x", ["x"], {"x": 1})
        if (field, value) not in (("data", "x"), ("about", {"x": 1}))  # these may stand there
    ],
)
def test_what_a_file_says_of_itself_is_checked_again(
    monkeypatch: pytest.MonkeyPatch, field: str, value: Any
) -> None:
    said = {"source": None, "inputs": [], "kind": None, "data": None, "about": {}, field: value}
    monkeypatch.setattr(readers, "guarded", lambda *_, **__: (said, {}))
    with pytest.raises(InputError, match="cannot have read"):
        readers.read(HERE)


# The server


def test_a_server_that_was_killed_is_replaced() -> None:
    guard.holding()
    before = SERVERS[os.getpid()].process.pid
    os.kill(before, signal.SIGKILL)
    assert readers.guarded("looking", HERE)[0]["status"]["NoNewPrivs"] == 1
    assert SERVERS[os.getpid()].process.pid != before


def test_a_server_that_is_killed_again_and_again_is_given_up() -> None:
    guard.holding()
    done = threading.Event()

    def kill() -> None:
        while not done.wait(0.01):
            if children():
                os.kill(SERVERS[os.getpid()].process.pid, signal.SIGKILL)

    thread = threading.Thread(target=lambda: _ignoring(kill, done))
    thread.start()
    try:
        with pytest.raises(CompressorError, match="ended twice"):
            readers.guarded("sleeping", HERE)
    finally:
        done.set()
        thread.join()


def _ignoring(work: Callable[[], None], done: threading.Event) -> None:
    """Until ``done``: between two servers there is none to look at."""
    while not done.is_set():
        try:
            work()
        except (KeyError, OSError, ValueError):
            continue


def test_an_interrupted_read_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    guard.holding()
    server = SERVERS[os.getpid()]

    def interrupted(seconds: float) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "_answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        readers.guarded("aborting", HERE)
    assert readers.guarded("looking", HERE)[0]["status"]["NoNewPrivs"] == 1
    assert server.process.returncode is not None


def test_threads_wait_for_each_other(tmp_path: Path) -> None:
    found: dict[int, float] = {}

    def work(at: int) -> None:
        path = tmp_path / f"{at}.pt"
        torch.save({"w": torch.full((3,), float(at))}, path)
        for _ in range(3):
            found[at] = float(readers.read(path).state["w"].mean())

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {at: float(at) for at in range(4)}
    assert not children()


def test_server_and_child_end_with_their_parent(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from compressor import guard
from compressor.guard.server import SERVERS
from compressor.loading import readers
readers.READERS["sleeping"] = "{HERE.stem}:sleeping"
guard.holding()
server, = SERVERS.values()
print(server.process.pid, server.folder, flush=True)
readers.guarded("sleeping", Path("x"))
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        server, folder = parent.stdout.readline().split()
        listed = Path(f"/proc/{server}/task/{server}/children")
        while not (child := listed.read_text(encoding="ascii").strip()):
            time.sleep(0.01)
        parent.kill()
    while any(alive(process) for process in (server, child)) or Path(folder).exists():
        time.sleep(0.01)  # for ever, where they live on


def alive(process: str) -> bool:
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return False


def test_nothing_is_left_when_it_is_closed() -> None:
    guard.holding()
    server = SERVERS[os.getpid()]
    opened = len(list(Path("/proc/self/fd").iterdir()))
    readers.guarded("looking", HERE)
    for name, what in (("aborting", "crashed"), ("lying", "handed back")):
        assert what in refused(name, Path("/noise"))
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
    guard.close()
    assert not Path(server.folder).exists()
    assert not alive(str(server.process.pid))
    guard.close()  # twice is once


# Hostile files


def crafted(path: Path, value: Any) -> None:
    """A file whose pickle calls what ``value`` says, as ``(function, arguments)``."""

    class Calling:
        def __reduce__(self) -> Any:
            return value

    torch.save({"w": Calling()}, path)


def storage() -> Any:
    return torch.zeros(4)._typed_storage()


def laughs() -> Any:
    said: Any = ["ha"]
    for _ in range(60):
        said = [said, said]
    return said


def bomb(path: Path) -> None:
    """200 MB of zeros under the name of an array, deflated a thousandfold."""
    said = {"descr": "<f4", "fortran_order": False, "shape": (50_000_000,)}
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.npy", "w") as file,
    ):
        np.lib.format.write_array_header_2_0(file, said)
        for _ in range(50):
            file.write(bytes(4_000_000))


def wide(path: Path) -> None:
    """A checkpoint with a deflated entry of 200 MB."""
    torch.save({"w": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in entries:
            archive.writestr(name, bytes(200_000_000) if name.endswith("data.pkl") else content)


def described(path: Path) -> None:
    said = {"format": checkpoint.FORMAT, "version": 1, "about": {"x": laughs()}}
    torch.save({**said, "digest": "", "state_dict": {"w": torch.zeros(1)}}, path)


REBUILD = torch._utils._rebuild_tensor_v2
HOSTILE: dict[str, Callable[[Path], Any]] = {
    "4 TiB of one number": lambda path: torch.save({"w": torch.zeros(1).expand(1 << 40)}, path),
    "2^63 elements": lambda path: crafted(
        path, (REBUILD, (storage(), 0, (1 << 62, 2), (0, 0), False, OrderedDict()))
    ),
    "a dimension of 2^63": lambda path: crafted(
        path, (REBUILD, (storage(), 0, (1 << 63,), (0,), False, OrderedDict()))
    ),
    "beyond its storage": lambda path: crafted(
        path, (REBUILD, (storage(), 3, (4,), (1,), False, OrderedDict()))
    ),
    "sparse, out of bounds": lambda path: crafted(
        path,
        (
            torch._utils._rebuild_sparse_tensor,
            (
                torch.sparse_coo,
                (torch.tensor([[1 << 40]]), torch.ones(1), torch.Size([3]), False),
            ),
        ),
    ),
    "sparse": lambda path: torch.save({"w": torch.eye(3).to_sparse()}, path),
    "laughs": described,
    "a deflated pickle": wide,
    "deep": lambda path: path.write_bytes(b"\x80\x02" + b"]" * 2_000_000 + b"a" * 1_999_999 + b"."),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "model.pt"
    HOSTILE[what](path)
    guard.holding()
    with peak() as grown:
        refused("checkpoint", path, memory=50 << 20, seconds=20)
    assert grown() < 16 << 20


def test_a_deflate_bomb_of_arrays_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    bomb(path)
    assert path.stat().st_size < 2_000_000
    guard.holding()
    with peak() as grown:
        assert "needs more than" in refused("npz", path, memory=50 << 20)
    assert grown() < 16 << 20
    assert readers.guarded("npz", path, memory=1 << 30)[1]["x"].shape == (50_000_000,)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_file_cut_anywhere_is_one_line(tmp_path: Path, name: str) -> None:
    state = {f"w{at}": torch.rand(9, 9) for at in range(5)}
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    whole = path.read_bytes()
    assert same(dict(sorted(readers.read(path).state.items())), state)
    for part in range(0, 100, 5):
        path.write_bytes(whole[: len(whole) * part // 100])
        refused("checkpoint", path)


@reader
def trusting(path: Path) -> Said:
    return {}, torch.load(path, weights_only=False)


def test_a_pickle_that_runs_a_command_does_not_run_it(tmp_path: Path) -> None:
    path, canary = tmp_path / "model.pt", tmp_path / "ran"
    for function, arguments in (
        (os.system, (f"touch {canary}",)),
        (os.mkdir, (str(canary),)),
        (eval, (f"__import__('pathlib').Path({str(canary)!r}).touch()",)),
    ):
        crafted(path, (function, arguments))
        assert "which could run code" in refused("checkpoint", path)
        assert not canary.exists()
        if guard.holding()["files"]:  # a reader that falls for it is held all the same
            refused("trusting", path)
            assert not canary.exists()
    # The bait is real: read as pickles usually are, it bites.
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        pickle.loads(archive.read("model/data.pkl"))
    assert canary.exists()


# Fuzzing


def mutated(whole: bytes, seed: int) -> bytes:
    """``whole`` with a few bytes changed, or a piece removed, repeated or cut off."""
    draw = np.random.default_rng(seed)
    changed = bytearray(whole)
    for _ in range(draw.integers(1, 4)):
        at, length = int(draw.integers(len(changed))), int(draw.integers(1, 40))
        match draw.integers(16):
            case 0:
                del changed[at : at + length]
            case 1:
                changed[at:at] = changed[at : at + length]
            case 2:
                changed = changed[: max(at, 1)]
            case 3:
                changed[at : at + 8] = draw.choice([b"\xff" * 8, bytes(8), bytes(7) + b"\x80"])
            case _:
                changed[at] = int(draw.integers(256))
        changed = changed or bytearray(b"P")
    return bytes(changed)


KINDS = {
    ".pt": "checkpoint",
    ".pth": "pickled",
    ".safetensors": "safetensors",
    ".npz": "npz",
}
"""The reader of a file, by its suffix."""


def watched(folder: Path) -> list[Path]:
    """Files that carry a digest: a ``model.pt`` and a torch-form artifact."""
    arguments = {"features": 2, "outputs": 1, "hidden": [3]}
    model = zoo.build("mlp", arguments)
    artifact = folder / "artifact.safetensors"
    torchfile.write(artifact, model, {"factory": "compressor.zoo:mlp", "arguments": arguments})
    ours = compressor.save(
        model,
        folder / "ours.pt",
        factory="compressor.zoo:mlp",
        arguments=arguments,
        inputs=torch.zeros(1, 2),
    )
    return [ours, artifact]


def plain(folder: Path) -> list[Path]:
    """Files without one: a checkpoint, a state dict of the older form, arrays, a whole model."""
    state = {"a": torch.rand(50, 20), "b": torch.rand(300).bfloat16(), "c": torch.zeros(())}
    torch.save({"state_dict": state, "epoch": 3}, folder / "plain.pt")
    torch.save(state, folder / "older.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "plain.safetensors")
    np.savez(folder / "data.npz", x=np.random.default_rng(0).random((99, 3)), y=np.arange(99))
    torch.save(torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU()), folder / "whole.pth")
    names = ("plain.pt", "older.pt", "plain.safetensors", "data.npz", "whole.pth")
    return [folder / name for name in names]


def test_200_mutated_files_through_the_guard_are_the_same_or_one_line(tmp_path: Path) -> None:
    outcomes = {"same": 0, "refused": 0}
    for source in watched(tmp_path):
        kind, path = KINDS[source.suffix], tmp_path / f"mutated{source.suffix}"
        _, expected = readers.guarded(kind, source)
        for seed in range(100):
            path.write_bytes(mutated(source.read_bytes(), seed))
            state = outcome(kind, path)
            assert isinstance(state, str) or same(state, expected), seed
            outcomes["refused" if isinstance(state, str) else "same"] += 1
    assert outcomes["refused"] > 100
    assert not children()


def outcome(kind: str, path: Path) -> str | dict[str, torch.Tensor]:
    """The tensors, or the one line."""
    try:
        return readers.guarded(kind, path)[1]
    except InputError as error:
        line = str(error)
    assert line.isprintable()
    return line


@reader
def reading(path: Path) -> Said:
    """How many files of the folder ``path`` were refused or read, and what else became of them."""
    said: dict[str, Any] = {"refused": 0, "read": 0, "failed": []}
    for file in sorted(path.iterdir()):
        try:
            kind = KINDS[file.suffix]
            (npz if kind == "npz" else found(readers.READERS[kind]))(file)
            said["read"] += 1
        except (InputError, MemoryError):
            said["refused"] += 1
        except Exception as error:
            said["failed"].append([file.name, repr(error)[:200]])
    return said, {}


def fuzzed(folder: Path, count: int, first: int) -> dict[str, int]:
    """Outcomes of ``count`` mutated files, each 250 of them read in one limited child.

    Where that child was stopped, each of its files is read in a child of its own.
    """
    contents = [(file, file.read_bytes()) for file in [*watched(folder), *plain(folder)]]
    outcomes = {"refused": 0, "read": 0, "stopped": 0}
    for start in range(first, first + count, 250):
        batch = folder / str(start)
        batch.mkdir()
        for seed in range(start, start + 250):
            source, whole = contents[seed % len(contents)]
            (batch / f"{seed}{source.suffix}").write_bytes(mutated(whole, seed))
        try:
            said, _ = readers.guarded("reading", batch)
        except InputError:
            lines = [outcome(KINDS[file.suffix], file) for file in sorted(batch.iterdir())]
            outcomes["read"] += sum(not isinstance(line, str) for line in lines)
            outcomes["stopped"] += sum(isinstance(line, str) for line in lines)
            continue
        assert said["failed"] == []
        outcomes["refused"] += said["refused"]
        outcomes["read"] += said["read"]
    return outcomes


def test_500_mutated_files_are_read_or_one_line(tmp_path: Path) -> None:
    outcomes = fuzzed(tmp_path, 500, 0)
    assert sum(outcomes.values()) == 500
    assert min(outcomes["refused"], outcomes["read"]) > 50, outcomes


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_20000_mutated_files_are_read_or_one_line(tmp_path: Path) -> None:
    outcomes = fuzzed(tmp_path, 20_000, 1000)
    assert sum(outcomes.values()) == 20_000
    assert min(outcomes["refused"], outcomes["read"]) > 2000, outcomes
