"""Torch-form artifacts: safetensors whose header says how to build the model. No pickle.

The header's ``compressor`` entry is JSON: ``{"format": 1, "source": {...}, "edits": [...],
"digest": "..."}`` with the model's own source (a factory and its arguments), the ordered edits of
:mod:`compressor.loading.edits` and a digest over all of it and the tensors. Law: loading what was
saved gives the same tensors, bit for bit, in a process that has never seen the run; a file that
was damaged since is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressor.artifact import Artifact, replacing
from compressor.errors import InputError, one_line
from compressor.loading.edits import Edit, apply

if TYPE_CHECKING:
    from compressor.task import Task

SUFFIX = ".safetensors"
Source = Mapping[str, Any]
State = Mapping[str, torch.Tensor]


def write(path: Path, model: nn.Module, source: Source, edits: Sequence[Edit] = ()) -> None:
    """Writes ``model``: its state, and the ``source`` and ``edits`` that rebuild its structure."""
    from safetensors.torch import save_file

    # Tied tensors share memory, which safetensors refuses: each name gets its own copy.
    state = {
        name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()
    }
    said = {"format": 1, "source": dict(source), "edits": [dict(edit) for edit in edits]}
    text = json.dumps({**said, "digest": digest_of(said, state)}, sort_keys=True)
    with replacing(path, lambda file: tensors_in(file, header(file) or {})) as beside:
        save_file(state, beside, metadata={"compressor": text})


def state_digest(state: State) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        total.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def digest_of(said: Mapping[str, Any], state: State) -> str:
    """SHA-256 over plain JSON values and tensors: no file format here notices a flipped bit.

    It finds damage, not malice: who changes a file on purpose can change its digest too.
    """
    text = json.dumps(said, sort_keys=True) + state_digest(state)
    return hashlib.sha256(text.encode()).hexdigest()


def header(path: Path) -> dict[str, Any] | None:
    """The header of a torch-form artifact; ``None`` for a safetensors file of somebody else.

    Raises :class:`InputError` when the file is not safetensors or its header is broken.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get("compressor")
        if said is None:
            return None
        found = dict(json.loads(said))
        if found["format"] != 1:
            raise InputError(f"{path} has format {found['format']!r}; this version reads format 1")
        return {**found, "source": source_of(found), "edits": [dict(at) for at in found["edits"]]}
    except (InputError, MemoryError):
        raise
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or one_line(error)}: make it readable"
        ) from None
    except Exception as error:
        raise InputError(f"{path} is not a safetensors model: {one_line(error)}") from None


def source_of(said: Mapping[str, Any]) -> Source:
    """The factory, its arguments and earlier edits that a file names, or :class:`ValueError`."""
    source = said["source"]
    arguments, edits = source["arguments"], source.get("edits", [])
    named = type(arguments) is dict and all(type(name) is str for name in arguments)
    listed = type(edits) is list and all(type(edit) is dict for edit in edits)
    if type(source["factory"]) is not str or not named or not listed:
        raise ValueError("its source is not a factory and named arguments")
    return dict(source)


def tensors_in(path: Path, said: Mapping[str, Any]) -> State:
    """The tensors of the safetensors file ``path``, compared with the digest in its header."""
    from safetensors.torch import load_file

    state = load_file(path)
    rest = {key: value for key, value in said.items() if key != "digest"}
    if digest_of(rest, state) != said.get("digest"):
        raise InputError(f"{path} is damaged: it does not match its digest; make it again")
    return state


def fits(model: nn.Module, state: State, path: Path) -> None:
    """Raises :class:`InputError` naming the first tensor whose name or shape ``model`` lacks."""
    wanted = model.state_dict()
    for name in wanted:
        if name not in state:
            raise InputError(f"{path} has no tensor {name!r}, which the factory's model needs")
        if state[name].shape != wanted[name].shape:
            raise InputError(
                f"{path}: {name!r} has shape {tuple(state[name].shape)}, "
                f"the factory's model has {tuple(wanted[name].shape)}"
            )
    for name in state:
        if name not in wanted:
            raise InputError(f"{path} holds {name!r}, which the factory's model does not have")


def load_state(model: nn.Module, state: State, path: Path) -> nn.Module:
    """Copies ``state`` into ``model``, which it has to fit; a sketch gets its memory first."""
    fits(model, state, path)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        _given_memory(model)
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:  # for example sparse tensors
        raise InputError(f"{path} does not load into its model: {one_line(error, 160)}") from None
    return model


def _given_memory(model: nn.Module) -> None:
    """Memory for the tensors of a sketch; those that are one stay one, as ``to_empty`` has not."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is None or not old.is_meta:
                    continue
                new = torch.empty_like(old, device="cpu")
                if isinstance(old, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=old.requires_grad)
                store[name] = made.setdefault(id(old), new)  # type: ignore[assignment]
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


def origin(artifact: Artifact) -> Source:
    """The source of a torch-form artifact: the task's own model, or a student beside it."""
    return _header(artifact)["source"]  # type: ignore[no-any-return]


def _header(artifact: Artifact) -> dict[str, Any]:
    found = header(artifact.path)
    if artifact.form != "torch" or found is None:
        raise InputError(f"{artifact.path} is not a torch-form artifact")
    return found


def open_model(artifact: Artifact, task: Task) -> tuple[nn.Module, list[Edit]]:
    """A fresh copy of the model at rest, in eval mode, and the edits that shaped it."""
    found = _header(artifact)
    state = tensors_in(artifact.path, found)
    source = found["source"]
    build = task.students[source["factory"]] if source.get("student") else task.model
    model = apply(build(), found["edits"])
    return load_state(model, state, artifact.path).eval(), found["edits"]


def rebuild(path: Path, build: Callable[[Source, State], nn.Module]) -> tuple[nn.Module, Source]:
    """The model of a torch-form file, its source turned into a module by ``build``.

    ``build(source, state)`` also sees the tensors that the model will hold. The source that comes
    back has the file's edits in it: it is the source of the model as it is now.
    """
    found = header(path)
    if found is None:
        raise InputError(f"{path} does not say how to build its model: add --arch PKG.MOD:FACTORY")
    state = tensors_in(path, found)
    source, edits = found["source"], [*found["source"].get("edits", ()), *found["edits"]]
    model = apply(build(source, state), edits)
    return load_state(model, state, path).eval(), {**source, "edits": edits}
