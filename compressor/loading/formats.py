"""From what a user names to a module: every format that a model may have, and how it is read.

=========================  ==============================  ========================================
what                       read by                         its structure
=========================  ==============================  ========================================
``.safetensors`` of ours   :mod:`.torchfile`               the source and the edits in its header
``.pt``, ``.pth``          :mod:`.checkpoint`, in a child  the file's own source, or ``--arch``
a pickled module           :mod:`.pickled`, in a child     its layers, if all are PyTorch's own
TorchScript                PyTorch, if it is trusted       rebuilt from its graph, or ONNX alone
``.pt2``                   :mod:`.pt2`, in a child         the same; ONNX alone if it is trusted
a folder                   :mod:`.hub`                     ``config.json``, by transformers
``timm:NAME[=FILE]``       :mod:`.hub`                     timm, torchvision
=========================  ==============================  ========================================

Nothing in a file is executed, unless the user trusts it on that very command line.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from compressor import names
from compressor.artifact import digest
from compressor.errors import InputError, one_line
from compressor.loading import checkpoint, embedded, hub, onnxfile, pickled, readers, torchfile
from compressor.loading.checkpoint import ZOO, Described
from compressor.loading.opaque import Opaque
from compressor.loading.sketch import sketch
from compressor.loading.torchfile import Source, State
from compressor.quiet import quiet
from compressor.task import Inputs

Factory = Callable[[], nn.Module]
Arch = str | Factory | None

LIVE = "live:"
"""Starts the factory's name of a model that was handed in as an object."""

PICKLED = "pickle:"
"""Starts the factory's name of a model whose class stands in a pickle that the user trusts."""


def file_digest(model: Any) -> str | None:
    """SHA-256 of a model's file; ``None`` for a folder, a name and a live module."""
    if not isinstance(model, str | Path) or not Path(model).is_file():
        return None
    return digest(Path(model))


class Loaded(NamedTuple):
    """A module in eval mode, its source, and what the file says of inputs and data."""

    model: nn.Module
    source: Source
    said: Described


def opened(
    model: str | Path,
    arch: Arch = None,
    *,
    weights: str | None = None,
    trusted: bool = False,
    example: Inputs | None = None,
) -> Loaded:
    """The model that ``model`` names: a path, a folder or ``timm:NAME``.

    ``weights`` is the key of a checkpoint's weights, such as ``ema``; ``trusted`` lets a pickle
    execute what it carries. ``example`` is a batch of the data, which TorchScript needs to become
    a graph. Raises :class:`InputError`, one line, for what cannot be read; that is an
    :class:`Opaque` where PyTorch may still export a trusted program.
    """
    path = Path(model)
    if weights is not None:
        _several(model, path)
    if str(model).partition(":")[0] in hub.PACKAGES:
        built, said_by, inputs = hub.named(str(model))
        return Loaded(built.eval(), said_by, Described({}, usual=inputs))
    if (path / "config.json").is_file():
        built, said_by, inputs, kind = hub.folder(path)
        return Loaded(built.eval(), said_by, Described({}, usual=inputs, kind=kind))
    checkpoint.there(path)
    if path.suffix == onnxfile.SUFFIX:
        raise InputError(
            f"{path} is ONNX, which has no layers to load: compressor run and bench take it as it "
            "is"
        )
    program = path.suffix == ".pt2" or checkpoint.entries(path, checkpoint.GRAPH)
    if trusted and not program:
        built = pickled.trusted(path, weights).cpu().eval()
        if isinstance(built, torch.jit.ScriptModule):
            return _scripted(path, built, example)
        named = f"{PICKLED}{type(built).__module__}.{type(built).__qualname__}"
        return Loaded(built, {"factory": named, "arguments": {}}, Described({}))
    if program:
        try:
            description, state, inputs = readers.read_pt2(path)
        except InputError as error:
            raise (Opaque(path, str(error), scripted=False) if trusted else error) from None
        return _embedded(path, description, state, Described({}, inputs=inputs))
    if path.suffix == torchfile.SUFFIX and torchfile.header(path):
        built, source = torchfile.rebuild(
            path, lambda source, state: _built(source, state, arch, path)
        )
        return Loaded(built, source, Described({}))
    if arch is None and _whole(path):
        description, state = readers.guarded("pickled", path, weights=weights)
        return _embedded(path, description, state, Described({}))
    said = readers.read(path, weights)
    if said.source is None and arch is None:
        raise InputError(
            f"{path} holds weights only: add --arch PKG.MOD:FACTORY, the function that builds "
            "its model"
        )
    source = said.source or {"factory": arch_name(arch), "arguments": {}}
    built = _built(source, said.state, arch, path)
    inner = checkpoint.unwrapped(said.state, built.state_dict())
    return Loaded(torchfile.load_state(built, inner, path).eval(), source, said)


def _several(model: str | Path, path: Path) -> None:
    """Raises :class:`InputError` for what has one set of weights, of which none can be chosen."""
    one = "a folder" if path.is_dir() else ""
    if str(model).partition(":")[0] in hub.PACKAGES:
        one = "a model of a package"
    elif path.suffix in (onnxfile.SUFFIX, ".pt2", torchfile.SUFFIX):
        one = f"a {path.suffix} file"
    elif path.is_file() and checkpoint.entries(path, checkpoint.GRAPH):
        one = "a program"
    if one:
        raise InputError(f"--weights: {model} is {one}, which has one set of weights: leave it out")


def _whole(path: Path) -> bool:
    """Whether a pickle asks for layers of PyTorch, which a state dict has none of."""
    try:
        asked = readers.guarded("listed", path)[0]["classes"]
        return any(name.startswith(pickled.LAYERS) for name in asked)
    except InputError:
        return False  # reading it says what is wrong


def _scripted(path: Path, program: torch.jit.ScriptModule, example: Inputs | None) -> Loaded:
    """A TorchScript program, turned into a graph and rebuilt from that."""
    if example is None:
        raise InputError(
            f"{path} is TorchScript, which does not say what it takes: add --data SPEC"
        )
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        graph = Path(folder) / f"{path.stem}.pt2"
        try:
            from torch._export.converter import TS2EPConverter

            with quiet():
                batch = tuple(map(torch.from_numpy, example))
                torch.export.save(TS2EPConverter(program, batch).convert(), graph)
        except Exception as error:
            raise Opaque(
                path,
                f"{path} does not become a graph ({one_line(error, 120)}): save it with "
                "torch.export or as ONNX where it was made",
                scripted=True,
            ) from None
        try:
            description, state, inputs = readers.read_pt2(graph)
        except InputError as error:
            said = str(error).replace(str(graph), str(path))
            raise Opaque(path, said, scripted=True) from None
    return _embedded(path, description, state, Described({}, inputs=inputs))


def _embedded(path: Path, description: Mapping[str, Any], state: State, said: Described) -> Loaded:
    built = torchfile.load_state(embedded.build(description), state, path).eval()
    return Loaded(built, {"factory": embedded.FACTORY, "arguments": description}, said)


def _built(source: Source, state: State, arch: Arch, path: Path) -> nn.Module:
    """The untrained model, a sketch where a file describes it.

    A name out of a file resolves to the zoo; any other must be given. The file's arguments go to
    the factory that was given if it takes them.
    """
    name, arguments = source["factory"], source["arguments"]
    if arch is None and name.startswith(ZOO):
        return sketch(name.removeprefix(ZOO), arguments, state)
    if arch is None and name == embedded.FACTORY:
        return embedded.build(arguments)
    if arch is None and name == hub.FACTORY:
        return hub.build(arguments, state)
    if arch is None and name.startswith((LIVE, PICKLED)):
        how, _, what = name.partition(":")
        raise InputError(
            f"{path} was made from a {how} {what}: give the function that builds it, "
            "--arch PKG.MOD:FACTORY"
        )
    if arch is None:
        raise InputError(
            f"{path} names the factory {name!r:.200}, which is not in the zoo and could run any "
            f"code: add --arch {name:.200} to the command line if you trust it"
        )
    found = names.function(arch, "--arch") if isinstance(arch, str) else arch
    factory = partial(found, **arguments) if _takes(found, arguments) else found
    built = names.call(factory, arch_name(arch), "--arch")
    if not isinstance(built, nn.Module):
        raise InputError(
            f"--arch {arch_name(arch)} gave a {type(built).__name__}: it must return an nn.Module"
        )
    return built.cpu()


def _takes(factory: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(factory).bind(**arguments)
    except (TypeError, ValueError):
        return False
    return True


def arch_name(arch: Arch) -> str:
    """The name of a factory, given as a name or as a function."""
    return arch or "" if arch is None or isinstance(arch, str) else live(arch)


def live(thing: Any) -> str:
    """The name of a class or function that no file can give back."""
    return f"{LIVE}{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', 'factory')}"
