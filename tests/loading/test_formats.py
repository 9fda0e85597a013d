"""Every format that a model may have, from the file to a run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import compressor
from compressor import InputError, pipeline
from compressor.loading import embedded, formats
from compressor.loading import task as tasks
from compressor.loading.torchfile import state_digest


class Own(nn.Module):
    """A class that only this file knows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(288, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def seeded(model: type[nn.Module] = Own) -> nn.Module:
    torch.manual_seed(0)
    net = model().train()
    net(torch.randn(16, 1, 8, 8))  # statistics that are not those of a new layer
    return net.eval()


def sequential() -> nn.Module:
    own = seeded()
    return nn.Sequential(own.body, own.head).eval()  # type: ignore[arg-type]


def pickled(path: Path) -> nn.Module:
    torch.save(net := sequential(), path)
    return net


def foreign(path: Path) -> nn.Module:
    torch.save(net := seeded(), path)
    return net


def exported(path: Path) -> nn.Module:
    net, batch = seeded(), torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    with path.open("wb") as file:
        torch.export.save(program, file)
    return net


def scripted(path: Path) -> nn.Module:
    net = seeded()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(net, torch.zeros(2, 1, 8, 8)), path)
    return net


FILES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "pickled": ("model.pt", pickled, {}),
    "exported": ("model.pt2", exported, {}),
    "exported, by another name": ("model.pt", exported, {}),
    "trusted": ("model.pt", foreign, {"trusted": True}),
    "scripted": ("model.pt", scripted, {"trusted": True}),
}


@pytest.fixture(params=FILES)
def file(request: Any, tmp_path: Path) -> tuple[Path, nn.Module, dict[str, Any]]:
    name, write, how = FILES[request.param]
    return tmp_path / name, write(tmp_path / name), how


def test_the_module_is_the_one_that_was_saved(
    file: tuple[Path, nn.Module, dict[str, Any]],
) -> None:
    path, net, how = file
    task = tasks(path, data="digits", **how)
    assert task.splits is not None
    (x,), _ = task.splits.test.head(8)
    batch = torch.from_numpy(x)
    with torch.no_grad():
        torch.testing.assert_close(task.model()(batch), net(batch), rtol=0, atol=1e-6)
    assert {type(one) for one in task.model().modules()} >= {nn.Conv2d, nn.Linear}
    assert not task.model().training


def test_it_is_pruned_trained_and_measured(
    file: tuple[Path, nn.Module, dict[str, Any]], tmp_path: Path
) -> None:
    path, net, how = file
    report = pipeline.run(
        path, data="digits", prune=0.5, epochs=1, provider=("cpu",), threads=(1,),
        trust_pickle=how.get("trusted", False), out=tmp_path / "run",
    )  # fmt: skip
    rows = {one["name"]: one for one in report.document["artifacts"]}
    assert rows["recovered"]["params"] < rows["baseline"]["params"]
    assert rows["baseline"]["params"] == sum(one.numel() for one in net.parameters())
    assert report.document["model"]["trusted"] is how.get("trusted", False)
    kept = tmp_path / "run" / "artifacts" / "recovered.safetensors"
    if how.get("trusted") and "pickle:" in str(formats.torchfile.header(kept)):
        with pytest.raises(InputError, match=r"was made from a pickle .*: give the function"):
            compressor.load(kept)
        return
    again = compressor.load(kept)  # no file of the user's, no code
    assert sum(one.numel() for one in again.parameters()) == rows["recovered"]["params"]


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (foreign, "Own: add --trust-pickle if you trust it"),
        (scripted, "is a TorchScript program, which is code: add --trust-pickle"),
    ],
)
def test_code_needs_trust_on_that_very_call(
    tmp_path: Path, write: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    write(path)
    for name in ("COMPRESSOR_TRUST_PICKLE", "TRUST_PICKLE", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "1")
    for read in (compressor.load, lambda path: tasks(path, data="digits")):
        with pytest.raises(InputError) as caught:
            read(path)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_archive_in_several_parts_is_one_line(tmp_path: Path) -> None:
    """Python's own test for zip files raises on these."""
    torch.save(seeded().state_dict(), path := tmp_path / "model.pt")
    whole = bytearray(path.read_bytes())
    whole[whole.rindex(b"PK\x06\x07") + 16] ^= 1  # how many parts there are
    path.write_bytes(whole)
    for read in (compressor.load, compressor.inspect):
        with pytest.raises(InputError, match="is not a PyTorch checkpoint") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_torchscript_needs_data_to_become_a_graph(tmp_path: Path) -> None:
    scripted(tmp_path / "model.pt")
    with pytest.raises(InputError, match="is TorchScript, which does not say what it takes: add"):
        compressor.load(tmp_path / "model.pt", trust_pickle=True)


def test_weights_of_a_checkpoint_by_their_key(tmp_path: Path) -> None:
    net, average = seeded(), seeded()
    with torch.no_grad():
        average.get_parameter("head.bias").add_(1)
    path = tmp_path / "checkpoint.pt"
    state, ema = net.state_dict(), average.state_dict()
    torch.save({"epoch": 3, "state_dict": state, "ema": ema}, path)
    found = [
        formats.opened(path, Own, weights=weights).model for weights in (None, "state_dict", "ema")
    ]
    digests = [state_digest(one.state_dict()) for one in (net, net, average)]
    assert [state_digest(one.state_dict()) for one in found] == digests
    with pytest.raises(InputError, match="no weights under --weights 'best': it has state_dict, "):
        formats.opened(path, Own, weights="best")


def test_a_source_in_a_file_builds_what_is_allowed_only(tmp_path: Path) -> None:
    description = embedded.describe(sequential())
    text = str(description)
    assert "torch.nn" not in text or "os" not in text
    for name in ("os.system", "builtins.eval", "torch.load", "Own"):
        broken = {**description, "class": name}
        with pytest.raises(InputError):
            embedded.build(broken)


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    first = nn.Linear(4, 4)
    second = nn.Linear(4, 4)
    second.weight = first.weight
    torch.save(nn.Sequential(first, nn.ReLU(), second), tmp_path / "model.pt")
    again = compressor.load(tmp_path / "model.pt")
    assert again[0].weight is again[2].weight  # type: ignore[index]
    x = torch.from_numpy(np.ones((2, 4), np.float32))
    assert torch.equal(again(x), nn.Sequential(first, nn.ReLU(), second)(x))
