"""Weights as others wrap them, and models that do not answer as they are judged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compressor import InputError, load
from compressor.loading import formats
from compressor.loading import task as tasks

RNG = np.random.default_rng(0)
X = RNG.standard_normal((300, 4)).astype(np.float32)
CLASSES = (X[:, 0] > 0).astype(np.int64) + (X[:, 1] > 0)


def net(outputs: int = 3, *last: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs), *last)


def moved(by: float) -> nn.Sequential:
    other = net()
    with torch.no_grad():
        for one in other.parameters():
            one += by
    return other


def same(one: nn.Module, two: nn.Module) -> bool:
    others = two.state_dict()
    return all(torch.equal(value, others[name]) for name, value in one.state_dict().items())


def averaged(model: nn.Module) -> Any:
    return torch.optim.swa_utils.AveragedModel(model).state_dict()


def before(model: nn.Module, prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "wrapped",
    [
        averaged,
        lambda model: before(model, "module."),
        lambda model: before(model, "_orig_mod."),
        lambda model: before(model, "module._orig_mod."),
        lambda model: {"state_dict": before(model, "model."), "epoch": 3},
        lambda model: {"model": {"state_dict": model.state_dict()}, "epoch": 3},
    ],
)
def test_what_a_wrapper_puts_in_front_is_taken_off(tmp_path: Path, wrapped: Any) -> None:
    torch.save(wrapped(moved(1.0)), tmp_path / "net.pt")
    assert same(load(tmp_path / "net.pt", net), moved(1.0))


def test_so_it_is_in_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(before(moved(1.0), "module."), tmp_path / "net.safetensors")
    assert same(load(tmp_path / "net.safetensors", net), moved(1.0))


@pytest.mark.parametrize("name", ["model", "module"])
def test_a_name_that_the_model_has_stays(tmp_path: Path, name: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, net())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return getattr(self, name)(x)  # type: ignore[no-any-return]

    torch.save(Outer().state_dict(), tmp_path / "net.pt")
    assert same(load(tmp_path / "net.pt", Outer), Outer())


def test_the_key_that_helps_is_named(tmp_path: Path) -> None:
    torch.save({"net": moved(1.0).state_dict(), "epoch": 1}, tmp_path / "net.pt")
    with pytest.raises(InputError, match="add --weights net, or save"):
        load(tmp_path / "net.pt", net)
    opened = formats.opened(tmp_path / "net.pt", net, weights="net")
    assert same(opened.model, moved(1.0))


def test_a_checkpoint_that_holds_itself_ends(tmp_path: Path) -> None:
    held: dict[str, Any] = {}
    held["model"] = held
    torch.save(held, tmp_path / "net.pt")
    with pytest.raises(InputError, match=r"holds no state dict|cannot be read"):
        load(tmp_path / "net.pt", net)


@pytest.mark.parametrize("trusted", [False, True])
def test_the_weights_that_were_asked_for_among_whole_models(tmp_path: Path, trusted: bool) -> None:
    torch.save({"model": moved(1.0), "ema": moved(2.0), "epoch": 1}, path := tmp_path / "net.pt")
    for weights, wanted in ((None, 1.0), ("model", 1.0), ("ema", 2.0)):
        found = formats.opened(path, weights=weights, trusted=trusted)
        assert same(found.model, nn.Sequential(*moved(wanted)))
    with pytest.raises(InputError, match=r"--weights 'nope': it has model, ema") as caught:
        formats.opened(path, weights="nope", trusted=trusted)
    assert "\n" not in str(caught.value)


def test_one_set_of_weights_leaves_no_choice(tmp_path: Path) -> None:
    torch.save(net(), whole := tmp_path / "whole.pt")
    with pytest.raises(InputError, match="none to choose from"):
        formats.opened(whole, weights="ema")
    program = torch.export.export(net(), (torch.zeros(2, 4),))
    with (tmp_path / "net.pt2").open("wb") as file:
        torch.export.save(program, file)
    for name in ("net.pt2", "timm:resnet18"):
        given = tmp_path / name if name.endswith("2") else name
        with pytest.raises(InputError, match="has one set of weights: leave it out"):
            formats.opened(given, weights="ema")


# What the outputs are


def arrays(targets: Any, **kind: str) -> dict[str, Any]:
    return {"train": (X[:200], targets[:200]), "test": (X[200:], targets[200:]), **kind}


@pytest.mark.parametrize("form", ["whole", "column", "labels"])
def test_probabilities_of_yes_are_no_logits(form: str) -> None:
    yes = (X[:, 0] > 0).astype(np.int64)
    targets, outputs = yes, 1
    if form == "column":
        targets = yes.astype(np.float32)[:, None]
    if form == "labels":
        targets, outputs = np.stack([yes, 1 - (X[:, 1] > 0), X[:, 2] > 0], axis=1).astype(int), 3
    with pytest.raises(InputError, match=r"as after a sigmoid.*give the model without") as caught:
        tasks(net(outputs, nn.Sigmoid()), data=arrays(targets))
    assert "\n" not in str(caught.value)
    assert tasks(net(outputs), data=arrays(targets)).notes == ()
    own = {"f:m": lambda outputs, targets: np.ones(len(targets))}
    tasks(net(outputs, nn.Sigmoid()), data=arrays(targets), metric="f:m", functions=own)


def test_a_softmax_is_said() -> None:
    (note,) = tasks(net(3, nn.Softmax(1)), data=arrays(CLASSES)).notes
    assert "ends in a softmax" in note
    assert tasks(net(), data=arrays(CLASSES)).notes == ()


def test_one_hot_targets_are_no_labels_of_their_own() -> None:
    hot = np.eye(3, dtype=np.float32)[CLASSES]
    with pytest.raises(InputError, match=r"give the number of the class instead, y\.argmax"):
        tasks(net(), data=arrays(hot))
    assert tasks(net(), data=arrays(hot, kind="multilabel")).kind == "multilabel"


def test_further_outputs_are_said_to_be_nobody_s() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.other = net(), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.body(x)
            return y, self.other(y)

    (note,) = tasks(copy.deepcopy(Two()), data=arrays(CLASSES)).notes
    assert note.startswith("the model has 2 outputs: only the first is judged")


def test_a_wrong_dtype_says_which_is_right() -> None:
    parts = {name: ((x * 50).astype(np.uint8), y) for name, (x, y) in arrays(CLASSES).items()}
    with pytest.raises(InputError, match="its weights are float32; convert the data"):
        tasks(net(), data=parts)
    with pytest.raises(InputError, match=r"give labels as y\[:, 0\]"):
        tasks(net(), data=arrays(CLASSES[:, None]))
