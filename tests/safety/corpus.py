"""Hostile files, made when a test asks for them: each would write a canary, hide, or never end.

A maker is ``make(folder, canary) -> what the user would name``. It writes into ``folder`` alone;
``canary`` is the path that appears where anything in the file is executed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

import compressor
from compressor import InputError, zoo
from compressor.loading import torchfile
from compressor.loading.checkpoint import FORMAT

Make = Callable[[Path, Path], str]

ARGUMENTS = {"features": 30, "outputs": 1, "hidden": [8]}
"""Of the zoo's mlp, as breast-cancer is answered by it."""


class Calling:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def touching(canary: Path) -> str:
    """Python that writes the canary."""
    return f"__import__('pathlib').Path({str(canary)!r}).write_text('ran')"


def poison(canary: Path) -> Calling:
    return Calling(os.system, f"echo ran > '{canary}'")


def model() -> nn.Module:
    torch.manual_seed(0)
    return zoo.build("mlp", ARGUMENTS).eval()


def module(folder: Path, canary: Path) -> Path:
    """A Python file that writes the canary when it is imported."""
    path = folder / "evil.py"
    path.write_text(
        f"{touching(canary)}\n\ndef make():\n    {touching(canary)}\n", encoding="utf-8"
    )
    return path


# Models


def described(path: Path, **changes: Any) -> str:
    """A self-describing file of the mlp with these entries instead, and the digest of all that."""
    state = dict(model().state_dict())
    said = {
        "format": FORMAT,
        "version": 1,
        "source": {"factory": "compressor.zoo:mlp", "arguments": ARGUMENTS},
        "inputs": [{"name": "input", "shape": [1, 30], "dtype": "float32", "high": 2}],
        "kind": "binary",
        "data": "breast-cancer",
        "about": {},
    } | changes
    torch.save({**said, "digest": torchfile.digest_of(said, state), "state_dict": state}, path)
    return str(path)


def sourced(factory: str, **arguments: Any) -> Make:
    """A self-describing file that names this factory; ``{evil}`` is :func:`module`."""

    def make(folder: Path, canary: Path) -> str:
        name = factory.format(evil=module(folder, canary))
        source = {"factory": name, "arguments": json.loads(json.dumps(arguments, default=str))}
        if arguments.get("command") == "{canary}":
            source["arguments"] = {"command": f"echo ran > '{canary}'"}
        return described(folder / "model.pt", source=source)

    return make


def torchform(factory: str, edits: Any = (), **more: Any) -> Make:
    """A torch-form artifact that names this factory and has these edits."""

    def make(folder: Path, canary: Path) -> str:
        name = factory.format(evil=module(folder, canary))
        source = {"factory": name, "arguments": ARGUMENTS, **more}
        torchfile.write(folder / "model.safetensors", model(), source, edits)
        return str(folder / "model.safetensors")

    return make


def pickled(protocol: int | None = None, *, key: str = "", legacy: bool = False) -> Make:
    """A pickle that runs a command: bare, as ``torch.save`` writes it, or among weights."""

    def make(folder: Path, canary: Path) -> str:
        path, bait = folder / "model.pt", poison(canary)
        if protocol is not None:
            path.write_bytes(pickle.dumps(bait, protocol))
            return str(path)
        held: Any = {**model().state_dict(), key: bait} if key else bait
        torch.save(held, path, _use_new_zipfile_serialization=not legacy)
        return str(path)

    return make


def evaluated(folder: Path, canary: Path) -> str:
    torch.save({"w": Calling(eval, touching(canary))}, folder / "model.pt")
    return str(folder / "model.pt")


def layered(folder: Path, canary: Path) -> str:
    """A module of PyTorch's own layers, one of which has a hook that is a call."""
    net = nn.Sequential(nn.Linear(30, 1))
    net[0]._forward_hooks = OrderedDict({0: poison(canary)})  # type: ignore[assignment]
    torch.save(net, folder / "model.pt")
    return str(folder / "model.pt")


def scripted(folder: Path, canary: Path) -> str:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(model(), torch.zeros(2, 30)), folder / "model.pt")
    return str(folder / "model.pt")


def repacked(path: Path, changed: Callable[[str, bytes], bytes], *more: tuple[str, bytes]) -> None:
    """Writes a zip again, its entries through ``changed``, with ``more`` at the end."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            archive.writestr(name, changed(name, content))
        for name, content in more:
            archive.writestr(name, content)


def packed(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def exported(folder: Path) -> Path:
    path, batch = folder / "model.pt2", torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(action="ignore"):
        program = torch.export.export(model(), (torch.rand(3, 30),), dynamic_shapes=({0: batch},))
        torch.export.save(program, path)
    return path


def poisoned_samples(folder: Path, canary: Path) -> str:
    path = exported(folder)
    bait = packed(poison(canary))
    repacked(path, lambda name, content: bait if "sample_inputs" in name else content)
    return str(path)


def poisoned_weights(folder: Path, canary: Path) -> str:
    path = exported(folder)
    bait = packed(poison(canary))
    held = ("/data/weights/", "/data/constants/")
    repacked(path, lambda name, content: bait if any(one in name for one in held) else content)
    return str(path)


def doubled(suffix: str) -> Make:
    """An archive in which one name stands twice: readers that differ see different files."""

    def make(folder: Path, canary: Path) -> str:
        path = exported(folder) if suffix == ".pt2" else folder / "model.pt"
        if suffix == ".pt":
            torch.save(model().state_dict(), path)
        with zipfile.ZipFile(path) as archive:
            part = "model.json" if suffix == ".pt2" else "data.pkl"
            name = next(name for name in archive.namelist() if name.endswith(part))
        bait = pickle.dumps(poison(canary), 2)
        repacked(path, lambda _, content: content, (name, bait))
        return str(path)

    return make


def escaping(suffix: str, name: str) -> Make:
    """An archive with a name that leads out of the folder it would be unpacked to."""

    def make(folder: Path, canary: Path) -> str:
        path = exported(folder) if suffix == ".pt2" else folder / "model.pt"
        if suffix == ".pt":
            torch.save(model(), path)  # a whole module is read entry by entry
        repacked(path, lambda _, content: content, (name.format(canary=canary), b"ran"))
        return str(path)

    return make


def hub(folder: Path, canary: Path) -> str:
    """A model folder that brings code."""
    module(folder, canary).rename(folder / "modeling_evil.py")
    config = {
        "model_type": "bert",
        "architectures": ["EvilModel"],
        "auto_map": {"AutoConfig": "modeling_evil.make", "AutoModel": "modeling_evil.make"},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    return str(folder)


def hub_pickle(folder: Path, canary: Path) -> str:
    """A model folder with its weights in a pickle."""
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(poison(canary), folder / "pytorch_model.bin")
    return str(folder)


def graph(target: str) -> dict[str, Any]:
    """The description of a model whose one step calls ``target``."""
    call = {
        "name": "y",
        "op": "call_function",
        "target": target,
        "args": [{"node": "x"}],
        "kwargs": {},
    }
    nodes = [{"name": "x", "op": "placeholder"}, call]
    return {
        "class": "graph",
        "modules": {},
        "parameters": {},
        "buffers": {},
        "nodes": [*nodes, {"name": "out", "op": "output", "args": [{"node": "y"}]}],
    }


def embedded(description: dict[str, Any]) -> Make:
    def make(folder: Path, canary: Path) -> str:
        source = {"factory": "compressor.embedded", "arguments": description}
        return described(folder / "model.pt", source=source)

    return make


def edit(**said: Any) -> list[dict[str, Any]]:
    return [said]


MODELS: dict[str, Make] = {
    "a pickle": pickled(),
    "a pickle of the older form": pickled(legacy=True),
    "a bare pickle": pickled(4),
    "a bare pickle, protocol 0": pickled(0),
    "a pickle among weights": pickled(key="fc1.weight "),
    "a pickle that evaluates": evaluated,
    "a layer with a hook": layered,
    "TorchScript": scripted,
    "factory os:system": sourced("os:system", command="{canary}"),
    "factory subprocess:run": sourced("subprocess:run", args=["true"]),
    "factory in a file": sourced("{evil}:make"),
    "factory beside the zoo": sourced("compressor.zoo:__init__"),
    "factory above the zoo": sourced("compressor.zoo:..names:function"),
    "factory in the zoo's modules": sourced("compressor.zoo:importlib.import_module"),
    "factory live": sourced("live:os.system"),
    "factory pickle": sourced("pickle:os.system"),
    "factory compressor.hub": sourced("compressor.hub", package="os", name="system", classes=None),
    "arguments for the class": sourced("compressor.zoo:mlp", **ARGUMENTS, __class__="os.system"),
    "layer os.system": embedded({"class": "os.system", "arguments": {"command": "true"}}),
    "layer by its path": embedded({"class": "torch.nn.Linear.__init__", "arguments": {}}),
    "step os.system": embedded(graph("os.system")),
    "step torch.load": embedded(graph("torch.load")),
    "torch-form os:system": torchform("os:system"),
    "torch-form in a file": torchform("{evil}:make"),
    "torch-form student": torchform("os:system", student=True),
    "attribute forward": torchform(
        "compressor.zoo:mlp",
        edit(edit="set_attribute", module="", name="forward", value=1),
    ),
    "attribute __class__": torchform(
        "compressor.zoo:mlp",
        edit(edit="set_attribute", module="fc1", name="__class__", value="os.system"),
    ),
    "attribute of a class": torchform(
        "compressor.zoo:mlp",
        edit(edit="set_attribute", module="__class__.__init__", name="in_features", value=1),
    ),
    "a parameter that is a method": torchform(
        "compressor.zoo:mlp",
        edit(edit="keep", parameter="fc1.forward", dim=0, indices=[0]),
    ),
    "edit os.system": torchform("compressor.zoo:mlp", edit(edit="os.system", command="true")),
    "rewrite as eval": torchform(
        "compressor.zoo:mlp",
        edit(**{"edit": "rewrite", "module": "", "as": "eval"}),
    ),
    "poisoned sample input": poisoned_samples,
    "poisoned weights": poisoned_weights,
    "a name twice, .pt": doubled(".pt"),
    "a name twice, .pt2": doubled(".pt2"),
    "a name that escapes, .pt": escaping(".pt", "model/../../../escaped"),
    "a name that escapes, .pt2": escaping(".pt2", "model/../../../escaped"),
    "an absolute name, .pt2": escaping(".pt2", "{canary}"),
    "a folder that brings code": hub,
    "a folder with a pickle": hub_pickle,
}  # fmt: skip
"""Models, refused in one line."""

SILENT = ("a name twice, .pt", "poisoned sample input")
"""Those that load as what is good in them: PyTorch's zip reader takes the first of two entries, and
sample inputs are not read."""


# Data


def data(spec: str) -> Make:
    """A sound model whose file names this data."""

    def make(folder: Path, canary: Path) -> str:
        named = spec.format(evil=module(folder, canary), folder=folder)
        return described(folder / "model.pt", data=named)

    return make


def objects(suffix: str) -> Make:
    """NumPy arrays of pickled objects, as ``--data`` names them."""

    def make(folder: Path, canary: Path) -> str:
        values = np.array([poison(canary)], object)
        if suffix == ".npz":
            np.savez(folder / "data.npz", x=values, y=np.zeros(1))
            return f"arrays:{folder / 'data.npz'}"
        np.save(folder / "x.npy", values)
        np.save(folder / "y.npy", np.zeros(1))
        return f"arrays:{folder}"

    return make


EPS = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
"""A picture that is a program: Pillow hands it to Ghostscript, if there is one."""


def postscript(folder: Path, canary: Path) -> str:
    """Pictures that are programs, under the names of others; ``gs`` is found in ``folder``."""
    interpreter = folder / "gs"
    interpreter.write_text(f"#!/bin/sh\necho ran > '{canary}'\n", encoding="utf-8")
    interpreter.chmod(0o755)
    for name in ("a", "b"):
        (folder / "pictures" / name).mkdir(parents=True)
        for at in range(8):
            (folder / "pictures" / name / f"{at}.png").write_text(EPS, encoding="utf-8")
    return f"images:{folder / 'pictures'}?size=8"


def circular(folder: Path, canary: Path) -> str:
    """A folder with links to itself: what follows them all finds 2 ** 40 folders."""
    for name in ("a", "b"):
        (folder / "pictures" / name).mkdir(parents=True)
        for link in ("l", "r"):
            (folder / "pictures" / name / link).symlink_to(folder / "pictures" / name)
    return f"images:{folder / 'pictures'}?size=8"


FILE_DATA: dict[str, Make] = {
    "data os:system": data("os:system"),
    "data in a file": data("{evil}:make"),
    "data with options": data("{evil}:make?size=8"),
    "data that is no source": data("__import__('os').system"),
    "data of an option that is code": data("digits?size=__import__('os')"),
}
"""Models whose data is refused in one line; they load."""

SPECS: dict[str, Make] = {
    "objects in .npz": objects(".npz"),
    "objects in .npy": objects(".npy"),
    "pictures that are programs": postscript,
    "pictures without end": circular,
}
"""Data for ``--data``, refused in one line."""


# Recipes


def step(**settings: Any) -> Make:
    def make(folder: Path, canary: Path) -> str:
        evil = str(module(folder, canary))
        lines = [
            f"{key} = {json.dumps(value)}".replace("{evil}", evil)
            for key, value in settings.items()
        ]
        path = folder / "recipe.toml"
        path.write_text("[[step]]\n" + "\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return make


def nested(text: str) -> Make:
    def make(folder: Path, canary: Path) -> str:
        (folder / "recipe.toml").write_text(text, encoding="utf-8")
        return str(folder / "recipe.toml")

    return make


RECIPES: dict[str, Make] = {
    "student os:system": step(stage="student", factory="os:system"),
    "student in a file": step(stage="student", factory="{evil}:make"),
    "loss os:system": step(stage="distill", epochs=1, loss="os:system"),
    "loss in a file": step(stage="distill", epochs=1, loss="{evil}:make"),
    "augmentation in a file": step(stage="distill", epochs=1, augment=["{evil}:make"]),
    "stage os.system": step(stage="os.system"),
    "stage __class__": step(stage="__class__"),
    "setting into": step(stage="export", into="/tmp/elsewhere"),
    "a name that escapes": step(stage="prune", ratio=0.5, name="../../escaped"),
    "an absolute name": step(stage="prune", ratio=0.5, name="/tmp/escaped"),
    "a name with an escape": step(stage="prune", ratio=0.5, name="a\x1b[2Jb"),
    "a name too long for a file": step(stage="prune", ratio=0.5, name="n" * 400),
    "a number of thousands of digits": nested(f"[[step]]\nstage = 'prune'\nratio = {'1' * 5000}\n"),
    "a deep list": nested(f"[[step]]\nstage = 'prune'\nkeep = {'[' * 4000}{']' * 4000}\n"),
    "a terminal's command": nested("a = \x1b[2J"),
}
"""Recipes, refused in one line before any work starts."""


# ONNX


def linear(path: Path) -> onnx.ModelProto:
    """``y = x @ w`` for 3 inputs and 2 outputs, as a file and as a message."""
    weights = np.arange(6, dtype=np.float32).reshape(3, 2)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(weights, "w")],
    )
    opset = helper.make_opsetid("", 21)
    made = helper.make_model(graph, ir_version=10, opset_imports=[opset])
    path.write_bytes(made.SerializeToString())
    return made


def external(location: str, offset: str = "0") -> Make:
    """A model whose weights lie in ``location``; ``secret`` beside the folder is long enough."""

    def make(folder: Path, canary: Path) -> str:
        path = folder / "onnx" / "model.onnx"
        path.parent.mkdir()
        (folder / "secret").write_bytes(bytes(64))
        made = linear(path)
        tensor = made.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        named = location.format(secret=folder / "secret")
        for key, value in {"location": named, "offset": offset, "length": "24"}.items():
            tensor.external_data.add(key=key, value=value)
        path.write_bytes(made.SerializeToString())
        (path.parent / "link").symlink_to(folder / "secret")
        (path.parent / "hard").hardlink_to(folder / "secret")
        (path.parent / "inner").symlink_to(folder, target_is_directory=True)
        return str(path)

    return make


def strange(folder: Path, canary: Path) -> str:
    made = linear(folder / "model.onnx")
    made.graph.node[0].op_type, made.graph.node[0].domain = "System", "evil"
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    return str(folder / "model.onnx")


ONNX: dict[str, Make] = {
    "weights above": external("../secret"),
    "weights above, hidden": external("a/../../secret"),
    "weights at a root": external("{secret}"),
    "weights at a drive": external("C:\\secret"),
    "weights by backslashes": external("..\\secret"),
    "weights that are a link": external("link"),
    "weights that are a hard link": external("hard"),
    "weights below a link": external("inner/secret"),
    "weights before their file": external("link", "-8"),
    "an operator of nobody's": strange,
}
"""ONNX files, refused in one line."""


def outcome(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call gives and no line, or nothing and the one line of its error."""
    try:
        return call(), ""
    except InputError as error:
        line = str(error)
    assert line.strip()
    assert len(line.splitlines()) == 1
    return None, line


# Names

EVIL = (
    "<script>alert(1)</script>", "<!--", "<img src=x onerror=alert(1)>", "&lt;b&gt;",
    "a|b", "`code`", "```", "**bold**", "__under__", "~~gone~~", "$x$", "\\", "# heading",
    "![x](http://evil.example/x.png)", "[a](javascript:alert(1))", "[a]: http://evil.example",
    "<http://evil.example>", "\n# heading\n", "\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n", "- item",
    "\x1b[2J\x1b[31mred", "\x1b]0;title\x07", "\x1b]8;;http://evil.example\x1b\\link", "\x9b2J",
    "\x00", "\r", "\x08\x08\x08", "\u202egnp.exe", "\u2066x", "\u2028", "\ufeff", "[/red]", "[red]",
    "{title}", "%s", "= 1", "pareto.png",
)  # fmt: skip
"""What names of layers, columns, tensors, steps and files may hold."""

HARMLESS = "harmless"

CONTROLS = frozenset(
    chr(code)
    for code in (
        *range(0x20), *range(0x7F, 0xA0), 0x061C, *range(0x200B, 0x2010), *range(0x2028, 0x202F),
        *range(0x2060, 0x2070), 0xFEFF, *range(0xD800, 0xE000),
    )
) - {"\n"}  # fmt: skip
"""Characters that a terminal or a page obeys, or shows nothing for, but for the end of a line."""


def titled(path: Path, name: str) -> nn.Module:
    """A pickled module of PyTorch's own layers, which are called ``name``."""
    torch.manual_seed(0)
    first, last = name.replace(".", "·"), f"{name.replace('.', '·')} out"
    layers = {first: nn.Linear(30, 32), "relu": nn.ReLU(), last: nn.Linear(32, 1)}
    net = nn.Sequential(OrderedDict(layers)).eval()
    torch.save(net, path)
    return net


def saved(path: Path) -> Path:
    """A sound self-describing file."""
    return compressor.save(
        model(),
        path,
        factory="compressor.zoo:mlp",
        arguments=ARGUMENTS,
        inputs=torch.zeros(1, 30),
        data="breast-cancer",
        kind="binary",
    )
