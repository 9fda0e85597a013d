"""The test zoo of pruning is what it says; every family is pruned, loaded and exported."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, exact, masked, same, task_for
from standing import at_rest
from torch import nn
from torch.nn.modules.conv import _ConvNd

from compressor import Artifact, StageError, Task
from compressor.loading import torchfile
from compressor.loading.task import tensors
from compressor.measure import counting
from compressor.stages import export, prune
from compressor.stages.prune.rounding import kept

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_sizes_worked_by_hand(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    examples = tuple(x.synthetic(1, 0) for x in family.inputs)
    assert counting.params(model) == family.params
    assert counting.macs(model, examples) == family.macs


@every_family
def test_any_batch_gives_finite_outputs(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    assert not model.training
    examples = [x.synthetic(7, seed) for seed, x in enumerate(family.inputs)]
    with torch.inference_mode():
        whole = tensors(model(*map(torch.from_numpy, examples)))
        for size in (1, 2, 7):
            part = tensors(model(*(torch.from_numpy(x[:size]) for x in examples)))
            assert len(part) == len(whole) > 0
            for ours, all_seven in zip(part, whole, strict=True):
                assert torch.isfinite(ours).all()
                torch.testing.assert_close(ours, all_seven[:size], rtol=1e-4, atol=1e-5)
    assert all(each.std() > 0 for each in whole), "a flat output would hide a wrong cut"


@every_family
def test_outputs_have_gradients(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    examples = (torch.from_numpy(x.synthetic(2, 0)) for x in family.inputs)
    torch.stack([each.square().sum() for each in tensors(model(*examples))]).sum().backward()  # type: ignore[no-untyped-call]
    seen = [each.grad for each in model.parameters() if each.grad is not None]
    assert seen
    assert all(torch.isfinite(each).all() for each in seen)


@every_family
def test_the_same_weights_at_every_build(name: str) -> None:
    first, second = FAMILIES[name].build().state_dict(), FAMILIES[name].build().state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_building_does_not_touch_the_callers_randomness() -> None:
    before = torch.random.get_rng_state()
    FAMILIES["bert"].build()
    assert torch.equal(torch.random.get_rng_state(), before)


@every_family
def test_layers_that_are_cut_or_left_are_there(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    assert family.cut
    assert family.left
    assert not {*family.cut} & {*family.left}
    for layer in (*family.cut, *family.left):
        assert list(model.get_submodule(layer).parameters()), f"{layer} makes nothing"


@every_family
def test_both_ratios_remove_something_of_every_layer_to_cut(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    for layer in family.cut:
        width = units(model.get_submodule(layer))
        assert kept(width, 0.5) < kept(width, 0.3) < width


def units(layer: nn.Module) -> int:
    """Channels, hidden units or heads that the layer makes."""
    names = ("out_channels", "out_features", "hidden_size", "num_heads", "embedding_dim")
    return next(int(getattr(layer, name)) for name in names if hasattr(layer, name))


def channels(model: nn.Module, layer: str) -> int:
    """What the layer gives, in the unit of a report: attention and recurrent layers too."""
    module: Any = model.get_submodule(layer)
    if hasattr(module, "num_heads"):
        return int(module.out_proj.weight.shape[1])  # all heads together
    if isinstance(module, nn.RNNBase):
        return module.proj_size or module.hidden_size
    return units(module)


def test_vectors_differ_between_channels() -> None:
    """Equal biases or scales would hide a cut that takes them from the wrong place."""
    for name, family in FAMILIES.items():
        for key, parameter in family.build().named_parameters():
            if parameter.ndim == 1 and len(parameter) > 1:
                assert len(np.unique(parameter.detach())) == len(parameter), (name, key)


# --- pruned

QUICK = (
    "constant view",
    "residual",
    "inverted residual",
    "grouped",
    "unet",
    "squeeze-excite, chunks",
    "channel shuffle",
    "mlp, prelu",
    "lstm, two layers, both ways",
    "gru",
    "multihead attention",
    "many heads",
)
"""Cheap and unlike each other: these are cut at both ratios in every run."""

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def pruned(name: str, folder: Path, **given: Any) -> tuple[Task, Artifact, dict[str, Any]]:
    """The task, the artifact and the facts."""
    task = task_for(name)
    made = prune(at_rest(task, folder), task, folder / "pruned", **given)
    return task, made, dict(made.steps[-1]["facts"])


def counted(module: nn.Module) -> dict[str, int]:
    """The sizes that a layer's attributes should have, read off its weight."""
    if isinstance(module, _ConvNd):
        ours, theirs = module.weight.shape[:2]
        if module.transposed:
            return {"in_channels": ours, "out_channels": theirs * module.groups}
        return {"in_channels": theirs * module.groups, "out_channels": ours}
    if isinstance(module, nn.Linear):
        return {"in_features": module.weight.shape[1], "out_features": module.weight.shape[0]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": module.weight.shape[1]}
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return {"num_features": len(module.weight)}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": len(module.weight)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": len(module.weight)}
    if isinstance(module, nn.RNNBase):
        return {"hidden_size": module.get_parameter("weight_ih_l0").shape[0] // GATES[module.mode]}
    return {}


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        *((name, 0.5) for name in FAMILIES),
        *((name, 0.3) for name in QUICK),
        *(
            pytest.param(name, 0.3, marks=pytest.mark.slow)
            for name in FAMILIES
            if name not in QUICK
        ),
    ],
)
def test_what_is_cut_is_right(name: str, ratio: float, tmp_path: Path) -> None:
    family = FAMILIES[name]
    task, made, facts = pruned(name, tmp_path, ratio=ratio)
    assert set(family.cut) <= set(facts["layers"])
    assert not set(family.left) & set(facts["layers"])
    assert not set(facts["layers"]) & set(facts["left_alone"])
    assert all(facts["left_alone"].values())
    assert all(0 < has < had for had, has in facts["layers"].values())

    dense = task.model()
    model, edits = torchfile.open_model(made, task)
    for layer in family.left:
        assert units(model.get_submodule(layer)) == units(dense.get_submodule(layer))
    gone: dict[str, int] = defaultdict(int)
    for part, (had, has) in facts["layers"].items():
        if not part.endswith(" (cells)"):  # behind a projection, beside what it gives
            gone[part.partition(" (")[0]] += had - has  # "conv (2)" is a part of "conv"
    for layer, count in gone.items():
        assert count == channels(dense, layer) - channels(model, layer), layer
    for layer, module in model.named_modules():
        said = {size: getattr(module, size) for size in counted(module)}
        assert said == counted(module), layer

    same(masked(dense, edits), model, task)
    # Had nothing been zeroed, the check would hold for any model.
    assert any(
        not torch.allclose(one, other, rtol=1e-3, atol=1e-4)
        for one, other in zip(exact(dense, task, 7), exact(model, task, 7), strict=True)
    )

    examples = map(torch.from_numpy, task.examples(2))
    torch.stack([each.square().sum() for each in tensors(model(*examples))]).sum().backward()  # type: ignore[no-untyped-call]
    seen = [each.grad for each in model.parameters() if each.grad is not None]
    assert seen
    assert all(torch.isfinite(each).all() for each in seen)

    again, _ = torchfile.open_model(made, task)
    assert torchfile.state_digest(again.state_dict()) == torchfile.state_digest(model.state_dict())
    assert counting.params(model) < family.params
    assert counting.macs(model, task.examples(1)) < family.macs


# --- exported

UNEXPORTED = ("lstm, projected",)
"""torch's exporter forgets the projection: onnxruntime refuses even the uncut model."""


@pytest.mark.parametrize(
    "name",
    [
        "constant view",
        "channel shuffle",
        "lstm, two layers, both ways",
        "multihead attention",
        "many heads",
    ],
)
def test_onnxruntime_gives_the_same(name: str, tmp_path: Path) -> None:
    task, made, _ = pruned(name, tmp_path, ratio=0.5)
    (step,) = export(made, task, tmp_path / "exported").steps[1:]
    assert list(step["facts"]["parity"]) == ["1", "2", "7"]


@pytest.mark.slow
@every_family
def test_onnxruntime_gives_the_same_for_every_family(name: str, tmp_path: Path) -> None:
    task, made, _ = pruned(name, tmp_path, ratio=0.3)
    if name in UNEXPORTED:
        with pytest.raises(StageError, match="Input initial_c must have shape"):
            export(made, task, tmp_path / "exported")
    else:
        export(made, task, tmp_path / "exported")


# --- in a process that has never seen it

FRESH = (
    "constant view",
    "multihead attention",
    "lstm, two layers, both ways",
    "bert",
    "grouped",
)

SCRIPT = """
import hashlib
import sys

import numpy as np, torch
import compressor
from compressor.loading.task import tensors

torch.set_num_threads(1)
for at, name in enumerate(sys.argv[1:]):
    model = compressor.load(f"pruned{at}.safetensors", arch=f"factories.py:make{at}")
    assert not model.training
    held = np.load(f"inputs{at}.npz")
    total = hashlib.sha256()
    with torch.inference_mode():
        for each in tensors(model(*(torch.from_numpy(held[key]) for key in held.files))):
            total.update(each.contiguous().numpy().tobytes())
    print(total.hexdigest())
"""


def test_pruned_files_load_in_a_fresh_process(tmp_path: Path) -> None:
    wanted = []
    factories = "from families import FAMILIES\n"
    for at, name in enumerate(FRESH):
        task, made, _ = pruned(name, tmp_path, ratio=0.5)
        model, _ = torchfile.open_model(made, task)
        examples = task.examples(3)
        total = hashlib.sha256()
        with torch.inference_mode():
            for each in tensors(model(*map(torch.from_numpy, examples))):
                total.update(each.contiguous().numpy().tobytes())
        wanted.append(total.hexdigest())
        made.path.rename(tmp_path / f"pruned{at}.safetensors")
        np.savez(tmp_path / f"inputs{at}.npz", *examples)
        factories += f"\n\ndef make{at}():\n    return FAMILIES[{name!r}].build()\n"
    (tmp_path / "factories.py").write_text(factories)
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, *FRESH],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == wanted
