"""PyTorch as a runtime: the model's own numbers, and each refusal in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor import loading, zoo
from compressor.artifact import Artifact
from compressor.errors import InputError
from compressor.loading import torchfile
from compressor.loading.formats import LIVE
from compressor.measure.process import Worker, WorkerFailed
from compressor.measure.runtime import ProviderAbsent, Session, open_session
from compressor.measure.torchrun import Torch
from compressor.stages.export import export

SHAPES: dict[str, tuple[int, ...]] = {"mlp": (6,), "cnn": (1, 8, 8), "lstm": (5, 4)}

FACTORY = """
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(2, 2, bias=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, a, b=None, *others):
        a.relu_()
        b = a if b is None else b
        return {"first": self.drop(self.scale(a)) - b, "rest": [self.scale.weight, *others]}

def build():
    print("a factory may print")
    return Model()
"""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def zoo_file(folder: Path, name: str) -> Path:
    torch.manual_seed(1)
    arguments = zoo.arguments_for(name, SHAPES[name], 3)
    path = folder / f"{name}.safetensors"
    source = {"factory": f"compressor.zoo:{name}", "arguments": arguments}
    torchfile.write(path, zoo.build(name, arguments), source)
    return path


@pytest.fixture(scope="module")
def zoo_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("zoo")
    return {name: zoo_file(folder, name) for name in SHAPES}


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, str]:
    """A model of the user's, and what ``--arch`` says."""
    script = tmp_path / "own.py"
    script.write_text(FACTORY)
    scope: dict[str, Any] = {"__name__": "own"}
    exec(FACTORY, scope)
    path = tmp_path / "own.safetensors"
    torchfile.write(path, scope["build"](), {"factory": "own:build", "arguments": {}})
    return path, f"{script}:build"


def stored(folder: Path, *arrays: Any) -> list[str]:
    paths = [folder / f"input-{at}.npy" for at in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array)
    return [str(path) for path in paths]


def predicted(path: Path, runtime: str, x: Any, folder: Path) -> Any:
    """What a worker answers to the examples ``x`` in batches of 2, after it timed a block."""
    out = folder / "out.npy"
    inputs = stored(folder, x)
    with Worker() as worker:
        worker.ask("load", path=str(path), provider="cpu", threads=1, runtime=runtime)
        worker.ask("take", inputs=inputs, batch=2)
        assert len(worker.ask("time", calls=3)["ns"]) == 3
        assert worker.ask("predict", inputs=inputs, start=0, stop=len(x), out=str(out))
        if Path("/proc").exists():
            mapped = Path(f"/proc/{worker.pid}/maps").read_text()
            assert "libtorch" in mapped
            assert "onnxruntime" not in mapped
    return np.load(out)


# --- its numbers ---


@settings(max_examples=30)
@given(st.sampled_from(list(SHAPES)), st.integers(1, 5), st.integers(0, 99))
def test_the_outputs_are_the_models_own_bit_for_bit(
    zoo_files: dict[str, Path], name: str, batch: int, seed: int
) -> None:
    x = np.random.default_rng(seed).standard_normal((batch, *SHAPES[name])).astype(np.float32)
    found = Session(open_session(zoo_files[name], runtime="torch"))(x)
    with torch.inference_mode():
        wanted = loading.load(zoo_files[name])(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(found, wanted)


def test_they_are_those_of_the_onnx_file(tmp_path: Path) -> None:
    path = zoo_file(tmp_path, "mlp")
    example = torch.zeros(2, *SHAPES["mlp"])
    described = loading.save(
        loading.load(path),
        tmp_path / "model.pt",
        factory="compressor.zoo:mlp",
        arguments=torchfile.header(path)["source"]["arguments"],  # type: ignore[index]
        inputs=example,
    )
    task = loading.task(described)
    onnx = export(Artifact.of(path, "torch"), task, tmp_path / "baseline")
    assert onnx.source is not None
    (x,) = task.examples(7)
    ours = Session(open_session(onnx.source, runtime="torch"))(x)
    np.testing.assert_allclose(ours, Session(open_session(onnx.path))(x), rtol=1e-5, atol=1e-6)


def test_a_model_of_the_users_takes_its_inputs_in_order(own: tuple[Path, str]) -> None:
    path, arch = own
    a, b, c = (np.full((1, 2), value, dtype=np.float32) for value in (1, 2, 3))
    opened = Torch(path, arch=arch, inputs=3)
    first, weight, third = Session(opened)(a, b, c)
    assert [each.name for each in opened.get_inputs()] == ["input_0", "input_1", "input_2"]
    np.testing.assert_allclose(first, a @ weight.T - b, rtol=1e-6)
    assert third.tolist() == c.tolist()
    alone, _ = Session(Torch(path, arch=arch))(a)
    np.testing.assert_allclose(alone, a @ weight.T - a, rtol=1e-6)


def test_an_input_that_only_may_be_read_is_not_written_to(own: tuple[Path, str]) -> None:
    path, arch = own
    x = np.array([[-1, 2]], dtype=np.float32)
    x.flags.writeable = False
    first, weight = Session(Torch(path, arch=arch))(x)
    assert x.tolist() == [[-1, 2]]
    np.testing.assert_allclose(first, [[0, 2]] @ weight.T - [[0, 2]], rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_threads_are_those_that_were_asked_for(
    zoo_files: dict[str, Path], threads: int
) -> None:
    opened = open_session(zoo_files["mlp"], threads=threads, runtime="torch")
    assert torch.get_num_threads() == threads
    assert opened.settings["mode"] == "eager"


def test_a_worker_runs_it_without_onnxruntime(zoo_files: dict[str, Path], tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, *SHAPES["cnn"])).astype(np.float32)
    found = predicted(zoo_files["cnn"], "torch", x, tmp_path)
    wanted = Session(open_session(zoo_files["cnn"], runtime="torch"))(x)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


# --- its refusals ---


def test_a_model_that_was_an_object_is_refused(tmp_path: Path, own: tuple[Path, str]) -> None:
    path, arch = own
    live = tmp_path / "live.safetensors"
    source = {"factory": f"{LIVE}own.Model", "arguments": {}}
    torchfile.write(live, loading.load(path, arch), source)
    with pytest.raises(ProviderAbsent, match=r"handed in as an object.* --arch PKG\.MOD:FACTORY"):
        open_session(live, runtime="torch")
    assert open_session(live, runtime="torch", arch=arch).get_inputs()


def test_a_factory_that_only_the_file_names_is_refused(own: tuple[Path, str]) -> None:
    with pytest.raises(InputError, match="not in the zoo and could run any code"):
        open_session(own[0], runtime="torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
@pytest.mark.parametrize("runtime", ["torch", "torch-compile"])
def test_a_gpu_that_is_not_there_is_named(zoo_files: dict[str, Path], runtime: str) -> None:
    with pytest.raises(ProviderAbsent, match="PyTorch finds no GPU of CUDA here"):
        open_session(zoo_files["mlp"], "cuda", runtime=runtime)


def test_another_provider_is_named(zoo_files: dict[str, Path]) -> None:
    with pytest.raises(ProviderAbsent, match="provider 'coreml' of PyTorch: only cpu and cuda"):
        open_session(zoo_files["mlp"], "coreml", runtime="torch")


def test_what_pytorch_refuses_is_one_line(zoo_files: dict[str, Path]) -> None:
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot") as refused:
        Session(open_session(zoo_files["mlp"], runtime="torch"))(np.zeros((1, 5), np.float32))
    assert "\n" not in str(refused.value)


# --- torch.compile ---


def compilers(folder: Path, code: str) -> str:
    """A stand-in for a C++ compiler."""
    script = folder / "c++"
    script.write_text(f"#!/bin/sh\n{code}\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.slow
def test_without_a_compiler_the_line_says_what_to_do(
    zoo_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compilers(tmp_path, "exit 1"))
    with pytest.raises(WorkerFailed, match=r"^torch\.compile needs a C\+\+ compiler and finds"):
        predicted(zoo_files["mlp"], "torch-compile", np.zeros((1, 6), np.float32), tmp_path)


@pytest.mark.slow
def test_a_compiler_that_fails_is_one_line_without_its_command(
    zoo_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compilers(tmp_path, "[ $1 = --version ] && echo 12 || exit 1"))
    with pytest.raises(WorkerFailed, match=r"C\+\+ compile error$"):
        predicted(zoo_files["mlp"], "torch-compile", np.zeros((1, 6), np.float32), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_the_compiled_model_gives_the_same_numbers_and_leaves_nothing_behind(
    zoo_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three examples in batches of 2: the last batch is compiled anew."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    x = np.random.default_rng(0).standard_normal((3, *SHAPES["mlp"])).astype(np.float32)
    found = predicted(zoo_files["mlp"], "torch-compile", x, tmp_path)
    wanted = Session(open_session(zoo_files["mlp"], runtime="torch"))(x)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert [path for path in scratch.rglob("*") if path.is_file()] == []


def test_importing_it_starts_no_other_runtime() -> None:
    code = (
        "import sys; from compressor.measure.runtime import import_torch; import_torch();"
        "print({'onnx', 'onnxruntime', 'openvino', 'sklearn', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
