"""Torch-form artifacts: source and edits rebuild the same model anywhere, and nothing else does."""

from __future__ import annotations

import copy
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compressor import Task, load, zoo
from compressor.artifact import Artifact
from compressor.errors import InputError
from compressor.loading import torchfile
from compressor.loading.edits import ATTRIBUTES, EDITS, apply
from compressor.loading.task import task
from compressor.stages import prune
from compressor.task import Input

FAMILIES = {
    "mlp": (30,),
    "cnn": (1, 8, 8),
    "vgg16": (1, 32, 32),
    "resnet20": (1, 16, 16),
    "resnet18": (1, 32, 32),
    "resnet50": (1, 32, 32),
    "mobilenet_v2": (1, 32, 32),
    "vit": (1, 8, 8),
    "unet": (1, 8, 8),
}
"""Of the zoo's families these have channels that can be cut; recurrent nets have not."""


def zoo_task(name: str, shape: tuple[int, ...]) -> Task:
    torch.manual_seed(0)
    arguments = zoo.arguments_for(name, shape, 10)
    model = zoo.build(name, arguments)
    with torch.no_grad():
        model.train()(torch.rand(4, *shape))
    model.eval()
    return Task(
        name,
        "classification",
        lambda: copy.deepcopy(model),
        {"factory": f"compressor.zoo:{name}", "arguments": arguments},
        (Input("input", shape),),
        "accuracy",
    )


def at_rest(given: Task, folder: Path) -> Artifact:
    path = folder / f"{given.name}.safetensors"
    torchfile.write(path, given.model(), given.source)
    return Artifact.of(path, "torch")


@pytest.mark.parametrize(
    "names",
    [
        ["mlp", "cnn", "resnet20", "vit", "unet"],
        pytest.param(["vgg16", "resnet18", "resnet50", "mobilenet_v2"], marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_pruned_models_come_back_in_a_fresh_process(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        given = zoo_task(name, FAMILIES[name])
        made = prune(at_rest(given, tmp_path), given, tmp_path / f"{name}-pruned", ratio=0.5)
        model, edits = torchfile.open_model(made, given)
        assert edits
        (x,) = given.examples(3)
        with torch.no_grad():
            np.savez(tmp_path / f"{name}.npz", x=x, y=model(torch.from_numpy(x)).numpy())
    script = f"""
import numpy as np, torch, compressor
torch.set_num_threads(1)
for name in {names}:
    model = compressor.load(f"{{name}}-pruned.safetensors")
    given = np.load(f"{{name}}.npz")
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert np.array_equal(model(torch.from_numpy(given["x"])).numpy(), given["y"]), name
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


@pytest.fixture
def pruned(tmp_path: Path) -> Artifact:
    given = zoo_task("mlp", (4,))
    return prune(at_rest(given, tmp_path), given, tmp_path / "pruned", ratio=0.5)


def test_a_pruned_file_can_be_pruned_again(tmp_path: Path, pruned: Artifact) -> None:
    """Its task names the edits as well, so that what is made from it is again a file that loads."""
    again = task(pruned.path, data=(np.zeros((20, 4), np.float32), np.arange(20) % 10))
    assert again.source["edits"]
    twice = prune(at_rest(again, tmp_path), again, tmp_path / "twice", ratio=0.5)
    x = torch.ones(2, 4)
    model, _ = torchfile.open_model(twice, again)
    assert model.get_submodule("fc1").out_features == 16  # type: ignore[comparison-overlap]
    assert torch.equal(load(twice.path)(x), model(x))
    assert torch.equal(load(tmp_path / "pruned.safetensors")(x), again.model()(x))


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    given = zoo_task("cnn", (1, 8, 8))
    one = at_rest(given, tmp_path).path.read_bytes()
    assert at_rest(given, tmp_path).path.read_bytes() == one


def test_every_byte_is_watched(pruned: Artifact) -> None:
    whole = pruned.path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    wanted = load(pruned.path).state_dict()
    for position in [*range(0, 8 + header, 7), *range(8 + header, len(whole), 97)]:
        flipped = bytearray(whole)
        flipped[position] ^= 1
        pruned.path.write_bytes(flipped)
        try:
            found = load(pruned.path).state_dict()
        except InputError:
            continue
        assert position < 8 + header  # white space between the fields of the header
        assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def tampered(path: Path, change: Any, *, digest: bool = True) -> str:
    """What loading says after ``change(said)`` edited the header, by default with its digest."""
    from safetensors.torch import load_file, save_file

    state, said = load_file(path), torchfile.header(path)
    assert said is not None
    change(said)
    if digest:
        rest = {key: value for key, value in said.items() if key != "digest"}
        said["digest"] = torchfile.digest_of(rest, state)
    save_file(state, path, metadata={"compressor": json.dumps(said)})
    with pytest.raises(InputError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def keep(**changes: Any) -> dict[str, Any]:
    return {"edit": "keep", "parameter": "fc1.weight", "dim": 0, "indices": [0, 1], **changes}


def attribute(**changes: Any) -> dict[str, Any]:
    said = {"edit": "set_attribute", "module": "fc1", "name": "out_features", "value": 2}
    return {**said, **changes}


BAD_EDITS = [
    {"edit": "run", "code": "import os"},
    {"edit": "__class__"},
    {"edit": ["keep"]},
    {},
    keep(parameter="absent.weight"),
    keep(parameter="fc1.absent"),
    keep(parameter="fc1.forward"),
    keep(parameter="fc1"),
    keep(dim=2),
    keep(dim=-1),
    keep(dim="0"),
    keep(dim=True),
    keep(indices=[]),
    keep(indices=[64]),
    keep(indices=[-1]),
    keep(indices=[0.5]),
    keep(indices=["0"]),
    keep(indices=[True]),
    keep(indices=[[0, 1]]),
    keep(indices=3),
    keep(indices=None),
    attribute(name="forward"),
    attribute(name="__class__"),
    attribute(name="training"),
    attribute(name="in_channels"),  # a linear layer has none
    attribute(name=["out_features"]),
    attribute(module="absent"),
    attribute(module=3),
    attribute(value=0),
    attribute(value=-1),
    attribute(value=2.0),
    attribute(value="2"),
    attribute(value=True),
    attribute(value=None),
]


@pytest.mark.parametrize("edit", BAD_EDITS, ids=str)
def test_edits_are_a_closed_set(pruned: Artifact, edit: dict[str, Any]) -> None:
    said = tampered(pruned.path, lambda said: said["edits"].append(edit))
    assert "an edit in the file does not fit its model" in said


@pytest.mark.parametrize("edit", BAD_EDITS, ids=str)
def test_edits_are_checked_on_a_real_model_too(edit: dict[str, Any]) -> None:
    model = zoo.build("mlp", {"features": 4, "outputs": 2})
    with pytest.raises(InputError, match="an edit in the file does not fit its model"):
        apply(model, [edit])


def test_the_set_of_edits_is_the_documented_one() -> None:
    assert set(EDITS) == {"fake_quantize", "keep", "rewrite", "scale", "set_attribute"}
    assert all(name.islower() and not name.startswith("_") for name in ATTRIBUTES)


def test_keep_selects_and_keeps_what_was_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(6.0).reshape(3, 2))
    apply(
        model,
        [keep(parameter="0.weight", indices=[0, 2]), keep(parameter="1.running_var", indices=[1])],
    )
    assert model[0].weight.tolist() == [[0, 1], [4, 5]]
    assert not model[0].weight.requires_grad
    assert model[1].running_var.shape == (1,)
    assert "running_var" in dict(model[1].named_buffers())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda said: said.update(format=2), "has format 2; this version reads format 1"),
        (lambda said: said.pop("format"), "is not a safetensors model"),
        (lambda said: said.pop("source"), "is not a safetensors model"),
        (lambda said: said.pop("edits"), "is not a safetensors model"),
        (lambda said: said.update(edits=["keep"]), "is not a safetensors model"),
        (lambda said: said.update(edits={"edit": "keep"}), "is not a safetensors model"),
        (lambda said: said.update(source="os:system"), "is not a safetensors model"),
        (lambda said: said["source"].update(factory=3), "not a factory and named arguments"),
        (lambda said: said["source"].update(arguments=[1]), "not a factory and named arguments"),
        (lambda said: said["source"].update(factory="os:system"), "add --arch os:system"),
        (lambda said: said["source"].update(factory="live:a.Net"), "made from a live a.Net"),
        (lambda said: said["source"].update(factory="compressor.zoo:cnn"), "argument 'features'"),
        (lambda said: said["source"]["arguments"].update(features=5), "'fc1.weight' has shape"),
        (lambda said: said["source"]["arguments"].update(features=2**40), "argument 'features'"),
        (lambda said: said["source"].update(edits=3), "is not a safetensors model"),
        (lambda said: said["edits"].pop(0), "has shape"),
        (lambda said: said["edits"].clear(), "'fc1.weight' has shape (32, 4), the factory's model"),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(pruned: Artifact, change: Any, said: str) -> None:
    assert said in tampered(pruned.path, change)


def test_a_changed_header_does_not_match_its_digest(pruned: Artifact) -> None:
    def other(said: dict[str, Any]) -> None:
        said["edits"][0]["indices"][0] += 1

    assert "damaged" in tampered(pruned.path, other, digest=False)
    assert "damaged" in tampered(pruned.path, lambda said: said.pop("digest"), digest=False)


def test_a_header_that_is_no_json_is_refused(pruned: Artifact) -> None:
    from safetensors.torch import save_file

    for text in ("{", "[]", "3", "null", '{"format": 1}'):
        save_file({"w": torch.zeros(1)}, pruned.path, metadata={"compressor": text})
        with pytest.raises(InputError, match="is not a safetensors model"):
            load(pruned.path)


def test_absurd_sizes_that_edits_cut_back_cost_no_memory(pruned: Artifact) -> None:
    """The model before its edits is never made, however wide."""

    def wide(said: dict[str, Any]) -> None:
        said["source"]["arguments"]["features"] = 2**31 - 1
        said["edits"].insert(0, keep(dim=1, indices=[0, 1, 2, 3]))

    from safetensors.torch import load_file, save_file

    state, said = load_file(pruned.path), torchfile.header(pruned.path)
    assert said is not None
    wide(said)
    rest = {key: value for key, value in said.items() if key != "digest"}
    said["digest"] = torchfile.digest_of(rest, state)
    save_file(state, pruned.path, metadata={"compressor": json.dumps(said)})
    assert load(pruned.path)(torch.ones(1, 4)).shape == (1, 10)


def test_a_live_model_s_file_needs_its_factory(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))

    given = task(build(), data=(np.zeros((20, 4), np.float32), np.arange(20) % 3))
    made = prune(at_rest(given, tmp_path), given, tmp_path / "pruned", ratio=0.5)
    with pytest.raises(
        InputError, match=r"made from a live torch\.nn\.modules\.container\.Sequential"
    ):
        load(made.path)
    x = torch.ones(1, 4)
    assert torch.equal(load(made.path, build)(x), torchfile.open_model(made, given)[0](x))


def test_an_onnx_artifact_is_no_torch_form(tmp_path: Path) -> None:
    given = zoo_task("mlp", (4,))
    (tmp_path / "m.onnx").write_bytes(b"onnx")
    with pytest.raises(InputError, match="is not a"):
        torchfile.open_model(Artifact.of(tmp_path / "m.onnx", "onnx"), given)
