"""What a model is, by the command and by the function behind it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import call, refused
from torch import nn

import compressor
from compressor.errors import InputError, StageError
from compressor.inspection import INT8, Inspection, inspect
from compressor.stages.prune import Sound
from compressor.stages.prune.group import Cut
from compressor.stages.prune.sensitivity import Curve
from compressor.stages.quantize.dynamic import PRODUCTS
from compressor.stages.quantize.kernels import WEIGHTED


def saved(model: nn.Module, path: Path, example: torch.Tensor) -> Path:
    """A file that describes ``model``; its factory has to be given."""
    compressor.save(model.eval(), path, factory="mine:net", inputs=example)
    return path


def factory(folder: Path, body: str) -> str:
    """The spec of a user's function in a file of his own."""
    (folder / "mine.py").write_text(f"from torch import nn\ndef net():\n    return {body}\n")
    return f"{folder / 'mine.py'}:net"


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    folder = tmp_path / "nowhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_a_zoo_file_on_the_terminal(trained: Path, nowhere: Path) -> None:
    result = call("inspect", trained)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    text = " ".join(result.stdout.split())
    for said in (
        "file model.pt",
        "factory compressor.zoo:cnn",
        "loading runs nothing",
        "parameters 53.0k (53,002)",
        "input input: float32 batch x 1 x 8 x 8",
        "output float32 batch x 10",
        "classification, accuracy on digits",
        "conv1 channels conv2 32",
        "fc2 its channels are the model's output",
        "dynamic fc1, fc2",
        "static 4 layers",
    ):
        assert said in text
    assert list(nowhere.iterdir()) == []


def test_json_is_the_same(trained: Path) -> None:
    document = json.loads(call("inspect", trained, "--json").stdout)
    assert document == inspect(trained).document
    assert document["sha256"] == compressor.artifact.digest(trained)
    assert document["state_bytes"] == 4 * document["params"]
    assert document["executes"] == []
    assert document["failed"] is None
    by_layer = {group["layer"]: group for group in document["groups"]}
    assert list(by_layer) == ["conv1", "conv2", "fc1"]
    conv1 = by_layer["conv1"]
    assert (conv1["kind"], conv1["units"], conv1["layers"]) == ("channels", 32, ["conv1", "conv2"])


@settings(max_examples=15)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(2, 9), st.integers(2, 9))
def test_shares_are_what_the_channels_carry(a: int, b: int, c: int, d: int) -> None:
    data = (np.zeros((20, a), np.float32), np.arange(20) % d)
    document = inspect(mlp(a, b, c, d), data=data).document
    first, second = document["groups"]
    whole = a * b + b * c + c * d
    assert document["macs"] == whole
    assert first["macs_share"] == pytest.approx((a * b + b * c) / whole)
    assert second["macs_share"] == pytest.approx((b * c + c * d) / whole)
    assert first["params_share"] == pytest.approx((a * b + b + b * c) / (whole + b + c + d))
    assert first["layers"] == ["0", "2"]


def test_a_live_model_executes_nothing_and_is_not_changed() -> None:
    model = mlp(4, 6, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = inspect(model, data=(np.zeros((20, 4), np.float32), np.arange(20) % 2))
    assert found.document["file"] is None
    assert found.document["factory"] is None
    assert "loading runs" not in str(found)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_factory_that_is_run_is_named(tmp_path: Path, nowhere: Path) -> None:
    path = saved(mlp(4, 6, 2), tmp_path / "model.pt", torch.zeros(3, 4))
    seen = json.loads(call("inspect", path, "--json").stdout)
    assert seen["executes"] == ["mine:net (--arch)"]
    assert list(seen["tensors"]) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert "add --arch mine:net" in seen["needs"]
    arch = factory(tmp_path, "nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))")
    document = json.loads(call("inspect", path, "--arch", arch, "--json").stdout)
    assert document["executes"] == [f"{arch} (--arch)"]
    assert document["factory"] == "mine:net"
    assert document["data"] is None
    assert "no data" in call("inspect", path, "--arch", arch).stdout


def test_weights_only_with_data(tmp_path: Path) -> None:
    torch.save(mlp(64, 6, 10).state_dict(), tmp_path / "model.pt")
    arch = factory(tmp_path, "nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))")
    words = ("inspect", tmp_path / "model.pt", "--arch", arch)
    assert "input shape of model is unknown" in refused(*words)
    np.savez(tmp_path / "rows.npz", x=np.zeros((40, 64), np.float32), y=np.arange(40) % 10)
    data = f"arrays:{tmp_path / 'rows.npz'}"
    document = json.loads(call(*words, "--data", data, "--json").stdout)
    assert document["format"] == "PyTorch checkpoint, weights only"
    assert document["inputs"][0]["shape"] == ["batch", 64]


class Attentive(nn.Module):
    """One layer of attention of PyTorch and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.lstm = nn.LSTM(16, 6, batch_first=True)
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.attention(x, x, x)
        x, _ = self.gru(self.lstm(x)[0])
        return self.head(x.mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("attention", "kind", "units"), [("heads", "heads", 4), ("dimensions", "head dimensions", 4)]
)
def test_attention_and_hidden_units(attention: str, kind: str, units: int) -> None:
    data = (np.random.default_rng(0).standard_normal((40, 5, 16)).astype("f4"), np.arange(40) % 3)
    document = inspect(Attentive(), data=data, attention=attention).document  # type: ignore[arg-type]
    groups = document["groups"]
    seen = {(group["layer"], group["kind"], group["units"]) for group in groups}
    # What attention puts out goes to the LSTM only: the layer has a second group.
    assert seen == {
        ("attention", kind, units),
        ("attention.out_proj", "channels", 16),
        ("lstm", "hidden units", 6),
        ("gru", "hidden units", 5),
    }
    assert all(group["layers"] == sorted(set(group["layers"])) for group in groups)
    names = {name for name, _ in Attentive().named_modules()}
    assert names >= {layer for group in groups for layer in group["layers"]}
    assert document["int8"] == {
        "dynamic": ["attention", "lstm", "head"],
        "static": ["attention", "lstm", "head"],
        "float": ["gru"],
    }


def test_int8_is_what_the_quantizer_does() -> None:
    becomes: list[tuple[set[str], tuple[type[nn.Module], ...]]] = [
        ({"MatMul", "Gemm"}, (nn.Linear, nn.MultiheadAttention)),
        ({"Conv"}, (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
        ({"ConvTranspose"}, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
        ({"LSTM"}, (nn.LSTM,)),
        ({"GRU"}, (nn.GRU,)),
        ({"RNN"}, (nn.RNN,)),
    ]
    for scheme, known in (("dynamic", {*PRODUCTS, "LSTM"}), ("static", {*WEIGHTED, "LSTM"})):
        assert set(INT8[scheme]) == {
            kind for made, kinds in becomes if made <= known for kind in kinds
        }


def test_what_cannot_be_followed_is_a_row(
    monkeypatch: pytest.MonkeyPatch, trained: Path, nowhere: Path
) -> None:
    def lost(*_: object) -> None:
        raise StageError("the channels are gone") from ValueError("no \x1b[31mway\x1b[0m")

    monkeypatch.setattr("compressor.inspection.Sound", lost)
    result = call("inspect", trained)
    assert result.exit_code == 0
    assert "pruning: cannot be followed: no way\n" in result.stdout
    assert "53,002" in result.stdout
    assert "dynamic" in result.stdout
    assert "nothing in model can be cut" in refused("inspect", trained, "--sensitivity")


def test_a_group_that_fails_its_proof_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    honest = Sound.disproof

    def strict(self: Sound, cuts: list[Cut]) -> tuple[float, str]:
        if any(cut.group.root == "conv2" for cut in cuts):
            return 0.0, "it is not so"
        return honest(self, cuts)

    monkeypatch.setattr(Sound, "disproof", strict)
    document = inspect(trained).document
    assert [group["layer"] for group in document["groups"]] == ["conv1", "fc1"]
    assert {"layer": "conv2", "reason": "it is not so"} in document["left_alone"]


# Sensitivity.


def test_curves_are_printed_worst_first_and_written(trained: Path, nowhere: Path) -> None:
    result = call("inspect", trained, "--sensitivity", "--json")
    assert result.exit_code == 0, result.output
    assert "sensitivity.json and sensitivity.png" in result.stderr
    folder = nowhere / "reports" / "model-sensitivity"
    assert sorted(path.name for path in folder.iterdir()) == ["sensitivity.json", "sensitivity.png"]
    assert (folder / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(result.stdout)["sensitivity"]
    assert json.loads((folder / "sensitivity.json").read_text())["sensitivity"] == found
    assert (found["on"], found["metric"]) == ("calibrate", "accuracy")
    curves = [
        Curve(each["layer"], each["shares"], each["loss"], each["metric"])
        for each in found["curves"]
    ]
    damage = [curve.at_half() for curve in curves]
    assert damage == sorted(damage, reverse=True)
    again = call("inspect", trained, "--sensitivity")  # our own file of this model
    assert again.exit_code == 0
    assert "accuracy of the whole model" in again.stdout
    assert [line.split()[0] for line in again.stdout.splitlines()[-4:-1]] == [
        curve.root for curve in curves
    ]


def test_without_data_it_says_so(tmp_path: Path) -> None:
    path = saved(mlp(4, 3, 2), tmp_path / "model.pt", torch.zeros(3, 4))
    found = inspect(path, arch=lambda: mlp(4, 3, 2), sensitivity=True, out=tmp_path / "out")
    assert found.document["sensitivity"]["on"] == "synthetic"
    assert found.document["sensitivity"]["curves"][0]["metric"] == [None] * 4
    assert "made-up inputs" in str(found)
    assert "(33% cut)" in str(found)  # three units have no quarter
    assert found.plot is not None
    assert found.plot.parent == tmp_path / "out"


@pytest.mark.parametrize("name", ["sensitivity.json", "sensitivity.png"])
def test_foreign_files_stay(trained: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"format": "another"}')
    line = refused("inspect", trained, "--sensitivity", "--out", tmp_path)
    assert f"holds a {name} that is not of this model" in line
    assert (tmp_path / name).read_text() == '{"format": "another"}'
    assert len(list(tmp_path.iterdir())) == 1


# Bad input.


def test_nothing_to_cut(tmp_path: Path, nowhere: Path) -> None:
    path = saved(nn.Linear(4, 2), tmp_path / "model.pt", torch.zeros(3, 4))
    arch = factory(tmp_path, "nn.Linear(4, 2)")
    line = refused("inspect", path, "--arch", arch, "--sensitivity")
    assert "nothing in model can be cut" in line
    assert "the model's output" in line
    assert call("inspect", path, "--arch", arch).exit_code == 0
    assert list(nowhere.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--attention", "all"), "choose from heads, dimensions"),
        (("--out", "here"), "only --sensitivity writes files"),
        (("--data", "no-such"), "no such source"),
    ],
)
def test_bad_words(trained: Path, nowhere: Path, words: tuple[str, ...], said: str) -> None:
    assert said in refused("inspect", trained, *words)
    assert list(nowhere.iterdir()) == []


def test_out_is_a_file(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refused("inspect", trained, "--sensitivity", "--out", tmp_path / "file")
    assert "is a file: name a folder" in line


def test_a_missing_file_with_escapes_in_its_name() -> None:
    line = refused("inspect", "no\x1b[31mne\x07.pt")
    assert "none.pt does not exist" in line
    assert line.isprintable()


NASTY = "a\x1b[31m<b>|`x`\x07\n$x_1$"


def nasty() -> nn.Sequential:
    model = nn.Sequential()
    model.add_module(NASTY, nn.Linear(4, 3))
    model.add_module("head", nn.Linear(3, 2))
    return model


def test_names_are_harmless(tmp_path: Path) -> None:
    path = saved(nasty(), tmp_path / "m\x1b[2J<i>.pt", torch.zeros(3, 4))
    found = inspect(path, arch=nasty, sensitivity=True, out=tmp_path / "out")
    for text in (str(found), json.dumps(found.document)):
        assert all(line.isprintable() for line in text.splitlines())
    assert "a<b>|`x` $x_1$" in str(found)
    assert found.document["groups"][0]["layer"] == NASTY


def test_escapes_in_the_name_of_the_folder(trained: Path, tmp_path: Path) -> None:
    result = call("inspect", trained, "--sensitivity", "--out", tmp_path / "o\x1b[2Jut")
    assert result.exit_code == 0
    assert all(line.isprintable() for line in result.stderr.splitlines())


@pytest.mark.parametrize("build", [lambda: nn.Flatten(), lambda: nn.Sequential(nn.ReLU())])
def test_a_model_without_weights(build: Callable[[], nn.Module]) -> None:
    data = (np.zeros((20, 4), np.float32), np.arange(20) % 4)
    found = inspect(build(), data=data)
    assert isinstance(found, Inspection)
    assert found.document["groups"] == []
    with pytest.raises(InputError, match="can be cut"):
        inspect(build(), data=data, sensitivity=True)
