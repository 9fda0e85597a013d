"""``model.pt``: what is written comes back bit for bit, and what is not ours is refused."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressor import load, save, zoo
from compressor.errors import InputError
from compressor.loading import checkpoint
from compressor.task import Input

SHAPES = {
    "mlp": (30,),
    "cnn": (1, 8, 8),
    "vit": (1, 8, 8),
    "unet": (1, 8, 8),
    "lstm": (8, 8),
    "gru": (8, 8),
    "resnet20": (1, 16, 16),
    "resnet56": (1, 16, 16),
}


def fresh(name: str) -> tuple[nn.Module, dict[str, Any], torch.Tensor]:
    """A zoo model with weights and statistics unlike those that its factory gives."""
    shape = SHAPES.get(name, (1, 32, 32))
    arguments = zoo.arguments_for(name, shape, 10)
    torch.manual_seed(0)
    model = zoo.build(name, arguments)
    x = torch.rand(4, *shape)
    with torch.no_grad():
        model.train()(x)
    return model.eval(), arguments, x


@cache
def small() -> nn.Module:
    torch.manual_seed(0)
    return zoo.build("mlp", {"features": 2, "outputs": 1, "hidden": [3]}).eval()


def saved(path: Path, **changes: Any) -> Path:
    said: dict[str, Any] = {
        "factory": "compressor.zoo:mlp",
        "arguments": {"features": 2, "outputs": 1, "hidden": [3]},
        "inputs": torch.zeros(1, 2),
    }
    return save(small(), path, **{**said, **changes})


def refused(path: Path, arch: Any = None) -> str:
    """The one line that loading ``path`` ends in."""
    with pytest.raises(InputError) as caught:
        load(path, arch)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 600
    return said


def test_every_zoo_model_comes_back_bit_for_bit_in_a_fresh_process(tmp_path: Path) -> None:
    for name in zoo.MODELS:
        model, arguments, x = fresh(name)
        path = tmp_path / f"{name}.pt"
        save(model, path, factory=f"compressor.zoo:{name}", arguments=arguments, inputs=x)
        with torch.no_grad():
            np.savez(tmp_path / f"{name}.npz", x=x.numpy(), y=model(x).numpy())
    script = f"""
import numpy as np, torch, compressor
torch.set_num_threads(1)
for name in {list(zoo.MODELS)}:
    model = compressor.load(f"{{name}}.pt")
    given = np.load(f"{{name}}.npz")
    assert not model.training
    with torch.no_grad():
        assert np.array_equal(model(torch.from_numpy(given["x"])).numpy(), given["y"]), name
    torch.load(f"{{name}}.pt", weights_only=True)
print("same")
"""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.stdout, ran.returncode) == ("same\n", 0), ran.stderr


def test_what_the_file_says_comes_back(tmp_path: Path) -> None:
    said = checkpoint.read(
        saved(
            tmp_path / "m.pt",
            inputs=(torch.zeros(4, 2), torch.tensor([[3], [9]])),
            kind="binary",
            data="breast-cancer",
            about={"epochs": 3, "value": np.float64(0.5)},
        )
    )
    assert said.source == {
        "factory": "compressor.zoo:mlp",
        "arguments": {"features": 2, "outputs": 1, "hidden": [3]},
    }
    assert said.inputs == (Input("input_0", (2,)), Input("input_1", (1,), "int64", 10))
    assert (said.kind, said.data) == ("binary", "breast-cancer")
    assert said.about == {"epochs": 3, "value": 0.5}


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = saved(tmp_path / "a" / "m.pt"), saved(tmp_path / "b" / "m.pt")
    assert one.read_bytes() == two.read_bytes()


def test_saving_leaves_the_model_alone(tmp_path: Path) -> None:
    model = copy.deepcopy(small()).train()
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    arguments = {"features": 2, "outputs": 1, "hidden": [3]}
    x = torch.zeros(1, 2)
    path = tmp_path / "m.pt"
    save(model, path, factory="compressor.zoo:mlp", arguments=arguments, inputs=x)
    load(path)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"arguments": {"features": 2, "outputs": 1, "hidden": [4]}},
            "'fc1.weight' has shape (3, 2)",
        ),
        ({"arguments": {"features": 2, "outputs": 1}}, "'fc1.weight' has shape"),
        ({"arguments": {"features": 2}}, "argument 'outputs'"),
        ({"factory": "compressor.zoo:nothing"}, "'nothing' is unknown: choose from mlp"),
        ({"factory": "nothing"}, "write compressor.zoo:NAME or PKG.MOD:FACTORY"),
        ({"factory": "a:b", "arguments": {"x": object()}}, "must be plain JSON values"),
        ({"about": {"model": nn.ReLU()}}, "must be plain JSON values"),
        ({"kind": "clustering"}, "task kind 'clustering', which is unknown"),
        ({"data": 3}, "the data 3, which is no data spec"),
        ({"inputs": torch.tensor(3.0)}, "input is no batch"),
        ({"inputs": 3}, "input is no batch but 3: give tensors"),
        ({"inputs": torch.zeros(1, 2, dtype=torch.bfloat16)}, "dtype 'bfloat16': convert it to"),
        ({"inputs": torch.zeros(1, 2, dtype=torch.complex64)}, "dtype 'complex64'"),
        ({"inputs": torch.zeros(1, 0)}, "has the shape [0]"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        saved(tmp_path / "m.pt", **changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@cache
def small_bytes(folder: Path) -> bytes:
    return saved(folder / "m.pt").read_bytes()


@settings(max_examples=100)
@given(data=st.data())
def test_a_flipped_byte_is_refused_or_changes_nothing(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = small_bytes(tmp_path_factory.getbasetemp())
    position = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.pt"
    path.write_bytes(flipped)
    try:
        model = load(path)
    except InputError:
        return
    state = small().state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_every_byte_of_the_weights_is_watched(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt")
    whole = path.read_bytes()
    for name, tensor in small().state_dict().items():
        start = whole.index(tensor.numpy().tobytes())
        for position in range(start, start + tensor.nbytes):
            flipped = bytearray(whole)
            flipped[position] ^= 1
            path.write_bytes(flipped)
            assert "damaged: it does not match its digest" in refused(path), name


@given(cut=st.floats(0, 1, exclude_max=True))
def test_half_a_file_is_refused(cut: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = small_bytes(tmp_path_factory.getbasetemp())
    path = tmp_path_factory.getbasetemp() / "half.pt"
    path.write_bytes(whole[: int(cut * len(whole))])
    refused(path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
@pytest.mark.parametrize("inside", ["alone", "state_dict"])
def test_a_pickle_that_runs_a_command_does_not_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, inside: str
) -> None:
    monkeypatch.chdir(tmp_path)
    value: Any = Evil() if inside == "alone" else {"state_dict": {"w": Evil()}}
    path = tmp_path / "model.pt"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=writer == "torch")
    said = refused(path)
    assert "save model.state_dict()" in said
    if writer == "torch":
        assert "posix.system" in said
    refused(path, arch=small)
    assert not (tmp_path / "ran").exists()
    # The bait is real: read as pickles usually are, it bites.
    torch.load(path, weights_only=False) if writer != "pickle" else pickle.loads(path.read_bytes())
    assert (tmp_path / "ran").exists()


def script_module(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(small(), torch.zeros(1, 2)), path)


class Foreign(nn.Module):
    """A class of somebody's own."""


def program(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.export.save(torch.export.export(small(), (torch.zeros(1, 2),)), path)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: None, "does not exist: give a model file"),
        (lambda path: path.mkdir(), "is a folder: give a model file"),
        (lambda path: path.write_text("weights: none\n"), "is not a PyTorch checkpoint: save"),
        (lambda path: path.write_bytes(b""), "is not a PyTorch checkpoint: save"),
        (lambda path: path.write_bytes(b"PK\x03\x04 nothing"), "is not a PyTorch checkpoint ("),
        (lambda path: path.write_bytes(b"\x80\x02}."), "is not a PyTorch checkpoint ("),
        (lambda path: zipfile.ZipFile(path, "w").close(), "is not a PyTorch checkpoint ("),
        (
            lambda path: torch.save(Foreign(), path),
            "pickles classes (test_checkpoint.Foreign), which could run code",
        ),
        (script_module, "is a TorchScript program, which is code: add --trust-pickle if you"),
        (lambda path: torch.save([torch.zeros(1)], path), "holds a list, not weights"),
        (lambda path: torch.save(torch.zeros(1), path), "holds a Tensor, not weights"),
        (lambda path: torch.save({"a": 1, "b": "c"}, path), "no state dict (keys: 'a', 'b')"),
        (lambda path: torch.save({}, path), "no state dict (keys: nothing)"),
        (lambda path: torch.save({"state_dict": {}}, path), "no state dict (keys: nothing)"),
        (lambda path: torch.save({"w": torch.zeros(1)}, path), "holds weights only: add --arch"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path, write: Any, said: str) -> None:
    path = tmp_path / "model.pt"
    write(path)
    assert said in refused(path)


def rewritten(path: Path, **changes: Any) -> Path:
    """A file of ours with fields changed and a digest that fits: made on purpose, not damaged."""
    from compressor.loading.torchfile import digest_of

    document = {**torch.load(saved(path), weights_only=True), **changes}
    said = {key: document[key] for key in document if key not in ("digest", "state_dict")}
    torch.save({**document, "digest": digest_of(said, document["state_dict"])}, path)
    return path


def factory(name: str, **arguments: Any) -> dict[str, Any]:
    return {"source": {"factory": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (factory("os:system"), "'os:system', which is not in the zoo and could run any code: add --"
         "arch os:system"),
        (factory("compressor.cli:main"), "add --arch compressor.cli:main"),
        (factory("compressor.zoo.cnn:nn"), "add --arch compressor.zoo.cnn:nn"),
        (factory("compressor.zoo:nothing"), "'nothing' is unknown: choose from mlp, cnn"),
        (factory("compressor.zoo:cnn:cnn"), "'cnn:cnn' is unknown"),
        (factory("live:__main__.Net"), "made from a live __main__.Net: give the function that"),
        ({"source": {"factory": ["compressor.zoo:mlp"], "arguments": {}}}, "broken"),
        ({"source": {"factory": "compressor.zoo:mlp"}}, "broken"),
        ({"source": {"factory": "compressor.zoo:mlp", "arguments": {1: 2}}}, "broken"),
        (factory("compressor.zoo:mlp", features=2, outputs=1, hidden=[4]), "'fc1.weight' has sha"),
        (factory("compressor.zoo:mlp", features=2, outputs=1, hidden=[3, 1]), "no tensor 'fc2.we"),
        (factory("compressor.zoo:mlp", features=2, outputs=1, hidden=[]), "'head.weight' has sh"),
        (factory("compressor.zoo:mlp", features="2", outputs=1), "argument 'features'"),
        ({"version": 2}, "has version 2; this release reads 1"),
        ({"kind": "clustering"}, "'clustering'"),
        ({"data": ["digits"]}, "no data spec"),
        ({"inputs": [{"name": "x", "shape": [1, 2**40], "dtype": "float32", "high": 2}]}, "shape"),
        ({"inputs": [{"name": "x", "shape": [1, "2"], "dtype": "float32", "high": 2}]}, "shape"),
        ({"inputs": [{"name": "x", "shape": [1, 2], "dtype": "object", "high": 2}]}, "'object'"),
        ({"inputs": [{"name": "x", "shape": [1, 2], "dtype": "float32"}]}, "broken ('high')"),
        ({"inputs": [{"name": "x", "shape": [1, 2], "dtype": "int64", "high": -1}]}, "below -1"),
        ({"inputs": 3}, "broken"),
        ({"about": 3}, "broken"),
    ],
)  # fmt: skip
def test_a_file_that_lies_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refused(rewritten(tmp_path / "m.pt", **changes))


@pytest.mark.parametrize(
    "source",
    [
        factory("compressor.zoo:cnn", in_channels=2**40),
        factory("compressor.zoo:cnn", in_channels=2**31 - 1),
        factory("compressor.zoo:cnn", image_size=2**31 - 1),
        factory("compressor.zoo:cnn", classes=2**31 - 1),
        factory("compressor.zoo:mlp", features=2**31 - 1, outputs=2**31 - 1),
        factory("compressor.zoo:mlp", features=2, outputs=1, hidden=[3] * 100_000),
        factory("compressor.zoo:vit", depth=2**31 - 1),
        factory("compressor.zoo:vit", dim=2**30),
        factory("compressor.zoo:lstm", features=2, classes=2, layers=2**31 - 1),
        factory("compressor.zoo:gru", features=2, classes=2, hidden=2**31 - 1),
        factory("compressor.zoo:unet", width=2**31 - 1),
        factory("compressor.zoo:resnet50", classes=2**31 - 1),
    ],
    ids=lambda source: str(source)[:90],
)
def test_absurd_sizes_cost_no_memory_and_no_time(tmp_path: Path, source: dict[str, Any]) -> None:
    path = rewritten(tmp_path / "m.pt", **source)
    before = os.times()
    peak = peak_rss()
    tracemalloc.start()
    refused(path)
    assert torch.is_grad_enabled()
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert peak_rss() - peak < 200e6
    assert os.times().user - before.user < 5


def peak_rss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.zeros(1).expand(2**40)}, path)
    assert "'w' has the shape (1099511627776,), more than the file's" in refused(path, small)
    state = {**small().state_dict(), "fc1.bias": torch.zeros(1).expand(2**40)}
    document = {**torch.load(saved(path), weights_only=True), "state_dict": state}
    torch.save(document, path)
    assert "more than the file's" in refused(path)


def make(width: int = 3) -> nn.Module:
    return zoo.build("mlp", {"features": 2, "outputs": 1, "hidden": [width]})


MAKE = """
from compressor import zoo
def make():
    return zoo.build("mlp", {"features": 2, "outputs": 1, "hidden": [3]})
def wide():
    return zoo.build("mlp", {"features": 2, "outputs": 1, "hidden": [5]})
def text():
    return "model"
def fails():
    raise ValueError("two\\nlines")
"""


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: OrderedDict(state),
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 1e-3}},
        lambda state: {"model_state_dict": state, "loss": 0.5},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    ],
)
def test_weights_alone_load_into_the_factory_s_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(MAKE)
    torch.save(wrap(small().state_dict()), "w.pt")
    for arch in ("./net.py:make", make, lambda: make()):
        model = load("w.pt", arch)
        assert not model.training
        assert torch.equal(model(torch.ones(1, 2)), small()(torch.ones(1, 2)))


def test_a_safetensors_file_of_somebody_else_loads_with_a_factory(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    save_file(small().state_dict(), path)
    assert torch.equal(load(path, make)(torch.ones(1, 2)), small()(torch.ones(1, 2)))
    assert "holds weights only: add --arch" in refused(path)
    path.write_text("weights: none")
    assert "is not a safetensors model" in refused(path, make)


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("./net.py:wide", "'fc1.weight' has shape (3, 2), the factory's model has (5, 2)"),
        (lambda: nn.Linear(2, 3), "has no tensor 'weight', which the factory's model needs"),
        (lambda: make()[:1], "holds 'head.weight', which the factory's model does not have"),
        ("./net.py:text", "gave a str: it must return an nn.Module"),
        ("./net.py:fails", "it raised ValueError: two lines"),
        ("./net.py:absent", "has no function 'absent'"),
        ("net", "write PKG.MOD:FUNCTION"),
    ],
)
def test_a_factory_that_does_not_fit_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(MAKE)
    torch.save(small().state_dict(), "w.pt")
    assert said in refused(Path("w.pt"), arch)


def test_the_file_s_arguments_go_to_the_factory_that_was_named(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    model = make(width=7)
    save(model, path, factory="my.net:make", arguments={"width": 7}, inputs=torch.zeros(1, 2))
    assert "add --arch my.net:make" in refused(path)
    x = torch.ones(1, 2)
    assert torch.equal(load(path, make)(x), model(x))
    # One that takes none of them is called without.
    assert torch.equal(load(path, lambda: make(7))(x), model(x))


def test_tied_and_frozen_weights_come_back(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.a.bias.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))  # type: ignore[no-any-return]

    model = Tied()
    path = save(model, tmp_path / "m.pt", factory="a:b", inputs=torch.zeros(1, 3))
    found = load(path, Tied)
    assert isinstance(found, Tied)
    assert found.a.weight is found.b.weight
    assert not found.a.bias.requires_grad
    assert torch.equal(found(torch.ones(1, 3)), model(torch.ones(1, 3)))


def test_half_precision_weights_become_what_the_factory_builds(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({name: value.half() for name, value in small().state_dict().items()}, path)
    found = load(path, make)
    assert {value.dtype for value in found.state_dict().values()} == {torch.float32}


def test_sparse_weights_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    state = small().state_dict()
    torch.save({**state, "fc1.weight": state["fc1.weight"].to_sparse()}, path)
    with pytest.raises(InputError) as caught:
        load(path, make)
    assert "\n" not in str(caught.value)
