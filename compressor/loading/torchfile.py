"""Torch-form artifacts: safetensors whose header says how to build the model. No pickle.

The header's ``compressor`` entry is JSON: ``{"format": 1, "source": {...}, "edits": [...]}`` with
the model's own source (a factory and its arguments) and the ordered edits of
:mod:`compressor.loading.edits`. Law: loading what was saved gives the same tensors, bit for bit,
in a process that has never seen the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from compressor.artifact import Artifact, replacing
from compressor.errors import InputError, one_line
from compressor.loading.edits import Edit, apply

if TYPE_CHECKING:
    from compressor.task import Task

SUFFIX = ".safetensors"
Source = Mapping[str, Any]


def write(path: Path, model: nn.Module, source: Source, edits: Sequence[Edit] = ()) -> None:
    """Writes ``model``: its state, and the ``source`` and ``edits`` that rebuild its structure."""
    from safetensors.torch import save_file

    # Tied tensors share memory, which safetensors refuses: each name gets its own copy.
    state = {
        name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()
    }
    header = json.dumps(
        {"format": 1, "source": dict(source), "edits": [dict(edit) for edit in edits]},
        sort_keys=True,
    )
    with replacing(path) as beside:
        save_file(state, beside, metadata={"compressor": header})


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
        found = json.loads(said)
        if found["format"] != 1:
            raise InputError(f"{path} has format {found['format']!r}; this version reads format 1")
        return {"source": dict(found["source"]), "edits": list(found["edits"])}
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} is not a safetensors model: {one_line(error)}") from None


def fill(path: Path, model: nn.Module) -> nn.Module:
    """Copies the tensors of the safetensors file ``path`` into ``model``, names and shapes alike.

    Raises :class:`InputError` naming the first tensor that does not fit.
    """
    from safetensors.torch import load_file

    return load_state(model, load_file(path), path)


def load_state(model: nn.Module, state: Mapping[str, Any], path: Path) -> nn.Module:
    """``model.load_state_dict`` whose refusal is one line."""
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
    model.load_state_dict(dict(state))
    return model


def open_model(artifact: Artifact, task: Task) -> tuple[nn.Module, list[Edit]]:
    """A fresh copy of the model at rest, in eval mode, and the edits that shaped it."""
    found = header(artifact.path)
    if artifact.form != "torch" or found is None:
        raise InputError(f"{artifact.path} is not a torch-form artifact")
    model = apply(task.model(), found["edits"])
    return fill(artifact.path, model).eval(), found["edits"]


def rebuild(path: Path, build: Callable[[Source], nn.Module]) -> tuple[nn.Module, Source]:
    """The model of a torch-form file, its source turned into a module by ``build``."""
    found = header(path)
    if found is None:
        raise InputError(f"{path} does not say how to build its model: add --arch PKG.MOD:FACTORY")
    return fill(path, apply(build(found["source"]), found["edits"])).eval(), found["source"]
