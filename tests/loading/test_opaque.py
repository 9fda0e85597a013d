"""Programs that no layers come from: what is trusted is still quantized and measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor import InputError, pipeline
from compressor.inspection import inspect


class Spectral(nn.Module):
    """Has a Fourier transform, which is none of the functions that a graph may call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 128), nn.Linear(65, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.fft.rfft(self.first(x.flatten(1))).abs())  # type: ignore[no-any-return]


class Branching(nn.Module):
    """Decides by a value what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        if bool(hidden.sum() > 0):
            hidden = hidden.relu()
        return self.last(hidden)  # type: ignore[no-any-return]


class Nested(Branching):
    """The same as a graph with graphs in it."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        hidden = torch.cond(hidden.sum() > 0, torch.relu, torch.clone, (hidden,))
        return self.last(hidden)  # type: ignore[no-any-return]


def program(kind: type[nn.Module], path: Path) -> Path:
    torch.manual_seed(0)
    batch = ({0: torch.export.Dim("batch")},)
    example = (torch.zeros(2, 1, 8, 8),)
    with warnings.catch_warnings(action="ignore"):
        torch.export.save(torch.export.export(kind().eval(), example, dynamic_shapes=batch), path)
    return path


def spectral(folder: Path) -> Path:
    return program(Spectral, folder / "net.pt2")


def nested(folder: Path) -> Path:
    return program(Nested, folder / "net.pt2")


def branching(folder: Path) -> Path:
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(Branching().eval()).save(folder / "net.pt")
    return folder / "net.pt"


FILES = [spectral, nested, branching]


def ran(path: Path, out: Path, **more: Any) -> compressor.Report:
    return pipeline.run(
        path, data="digits", provider=("cpu",), threads=(1,), out=out, trust_pickle=True, **more
    )


@pytest.mark.parametrize("make", FILES)
def test_it_is_quantized_and_measured(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    report = ran(path, tmp_path / "run", quantize="int8-dynamic")
    rows = {one["name"]: one for one in report.document["artifacts"]}
    assert set(rows) == {"baseline", "int8-dynamic"}
    assert rows["baseline"]["accuracy"] is not None
    assert rows["int8-dynamic"]["size_bytes"] < rows["baseline"]["size_bytes"] / 2
    assert rows["int8-dynamic"]["fidelity"]["top1_agreement"] > 0.9
    assert report.document["model"]["trusted"] is True
    assert report.document["model"]["path"] == path.name
    # What is measured computes what the program does.
    x = torch.rand(5, 1, 8, 8)
    got = compressor.session(tmp_path / "run" / "artifacts" / "baseline.onnx")(x.numpy())
    with warnings.catch_warnings(action="ignore"):
        net: Any = (
            torch.jit.load(path) if path.suffix == ".pt" else torch.export.load(path).module()
        )
        torch.testing.assert_close(torch.from_numpy(got), net(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [spectral, nested])
def test_without_trust_it_is_refused_and_says_how(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    for call in (compressor.load, lambda path: pipeline.run(path, out=tmp_path / "run")):
        with pytest.raises(InputError, match="if you trust the file, --trust-pickle to quantize"):
            call(make(tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [{"prune": 0.5}, {"teacher": "other.pt"}])
def test_what_needs_layers_says_why_there_are_none(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"PyTorch model.*cannot be rebuilt: aten\.fft_rfft"):
        ran(spectral(tmp_path), tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_what_pytorch_cannot_export_either_says_both(tmp_path: Path) -> None:
    path = spectral(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"net\.pt2.*; nor does it become ONNX") as caught:
        ran(path, tmp_path / "run")
    assert "\n" not in str(caught.value)


# What is said of a file that gives no model


def onnx_file(folder: Path) -> Path:
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            Branching().first.eval(), (torch.zeros(2, 64),), folder / "net.onnx", dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False, external_data=False,
        )  # fmt: skip
    return folder / "net.onnx"


def weights(folder: Path) -> Path:
    torch.save(Branching().state_dict(), folder / "net.pt")
    return folder / "net.pt"


def foreign(folder: Path) -> Path:
    torch.save(Branching(), folder / "net.pt")
    return folder / "net.pt"


PARAMS = 64 * 128 + 128

SEEN: dict[Callable[[Path], Path], dict[str, Any]] = {
    spectral: {
        "format": "exported program with steps that cannot be rebuilt",
        "executes": [],
        "params": PARAMS + 65 * 10 + 10,
        "inputs": [{"name": "x", "shape": ["batch", 1, 8, 8], "dtype": "float32"}],
    },
    nested: {"executes": [], "params": None},
    branching: {"executes": ["its own code (--trust-pickle)"], "params": None},
    onnx_file: {
        "format": "ONNX, opset ai.onnx 20",
        "executes": [],
        "params": PARAMS,
        "macs": 64 * 128,
        "operators": {"Gemm": 1},
    },
    weights: {
        "format": "PyTorch checkpoint, weights only",
        "executes": [],
        "state_bytes": 4 * (PARAMS + 128 * 10 + 10),
        "tensors": {
            "first.weight": "float32 128 x 64",
            "first.bias": "float32 128",
            "last.weight": "float32 10 x 128",
            "last.bias": "float32 10",
        },
    },
    foreign: {
        "format": "pickled objects of foreign classes",
        "executes": [f"{__name__}.Branching (--trust-pickle)"],
        "state_bytes": 4 * (PARAMS + 128 * 10 + 10),
    },
}


@pytest.mark.parametrize("make", SEEN)
def test_inspection_says_what_there_is(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    found = inspect(path)
    wanted = SEEN[make]
    assert {key: found.document[key] for key in wanted} == wanted
    text = " ".join(str(found).split())
    assert f"file {path.name}" in text
    assert f"format {found.document['format']}" in text
    assert "as it stands: " in text
    for flag in found.document["executes"]:
        assert flag in text


@pytest.mark.parametrize("make", SEEN)
def test_a_damaged_file_is_an_error(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError):
        inspect(path)


def test_the_graph_of_an_onnx_file_is_never_run(tmp_path: Path) -> None:
    path = onnx_file(tmp_path)
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    assert inspect(path).document["operators"] == {"NoSuchOperator": 1}
