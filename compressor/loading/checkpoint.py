"""``.pt`` files: the self-describing one that :func:`save` writes, state dicts and checkpoints.

Everything is read with ``torch.load(weights_only=True)``: tensors and plain values, no code.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import nn

from compressor import zoo
from compressor.artifact import replacing
from compressor.errors import InputError, one_line
from compressor.loading import torchfile
from compressor.task import Input, Kind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT = "compressor.model"
ZOO = "compressor.zoo:"
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the weights in a checkpoint."""


@dataclass(frozen=True)
class Described:
    """What a file says of itself; everything but ``state`` may be missing."""

    state: Mapping[str, torch.Tensor]
    source: Mapping[str, Any] | None = None
    inputs: tuple[Input, ...] = ()
    kind: Kind | None = None
    data: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    factory: str,
    arguments: Mapping[str, Any] | None = None,
    inputs: Any,
    kind: Kind | None = None,
    data: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a ``model.pt`` that describes itself, in plain data.

    ``factory`` is ``compressor.zoo:NAME`` or your own ``PKG.MOD:FACTORY`` (which then has to stand
    on the command line as ``--arch``); ``arguments`` are plain JSON values for it. ``inputs`` is an
    example batch: a tensor, or a tuple of tensors, batch axis first; only shapes and dtypes are
    kept. ``data`` is a data spec such as ``digits``. ``about`` is kept as it is.

    Raises :class:`InputError` when a zoo factory with these arguments does not give this model.
    """
    path = Path(path)
    given = dict(arguments or {})
    if factory.startswith(ZOO):
        rebuilt = zoo.build(factory.removeprefix(ZOO), given)
        torchfile.load_state(rebuilt, model.state_dict(), path)
    elif factory.count(":") != 1:
        raise InputError(f"factory {factory!r}: write compressor.zoo:NAME or PKG.MOD:FACTORY")
    examples = inputs if isinstance(inputs, tuple) else (inputs,)
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    document = {
        "format": FORMAT,
        "version": 1,
        "factory": factory,
        "arguments": given,
        "inputs": [
            {**asdict(given), "shape": [1, *given.shape]} for given in inputs_like(examples)
        ],
        "kind": kind,
        "data": data,
        "about": dict(about or {}),
        "state_dict": state,
        "digest": state_digest(state),
    }
    with replacing(path) as beside:
        torch.save(document, beside)
    return path


def inputs_like(examples: Sequence[torch.Tensor | NDArray[np.generic]]) -> tuple[Input, ...]:
    """What inputs a model takes, read off a batch of them, batch axis first."""
    names = ["input"] if len(examples) == 1 else [f"input_{at}" for at in range(len(examples))]
    return tuple(
        Input(
            name,
            tuple(int(size) for size in example.shape[1:]),
            str(example.dtype).removeprefix("torch."),
            high=_high(example),
        )
        for name, example in zip(names, examples, strict=True)
    )


def _high(example: Any) -> int:
    """One more than the largest integer seen: made-up token ids stay inside the vocabulary."""
    whole = not str(example.dtype).removeprefix("torch.").startswith(("float", "bfloat"))
    return int(example.max()) + 1 if whole and example.shape[0] else 2


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: a flipped bit in a zip goes unnoticed."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        total.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def read(path: Path) -> Described:
    """Reads ``path`` without executing anything in it.

    Raises :class:`InputError`, one line that says what to do, for everything that is not a
    self-describing model, a state dict or a checkpoint that holds one.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}: give a model file such as model.pt")
    if path.suffix == torchfile.SUFFIX:
        return Described(_safetensors(path))
    given = _unpickled(path)
    if not isinstance(given, dict):
        raise InputError(
            f"{path} holds a {type(given).__name__}, not weights: save model.state_dict()"
        )
    if given.get("format") == FORMAT:
        return _own(path, given)
    for key in WRAPPERS:
        if isinstance(given.get(key), dict):
            given = given[key]
            break
    wrong = [key for key, value in given.items() if not isinstance(value, torch.Tensor)]
    if not given or wrong:
        seen = ", ".join(map(repr, list(given)[:5])) or "nothing"
        raise InputError(
            f"{path} holds no state dict (keys: {seen}): save model.state_dict() or use "
            "compressor.save"
        )
    prefix = "module." if all(str(key).startswith("module.") for key in given) else ""
    return Described({str(key).removeprefix(prefix): value for key, value in given.items()})


def _safetensors(path: Path) -> Mapping[str, torch.Tensor]:
    from safetensors.torch import load_file

    torchfile.header(path)
    return cast("Mapping[str, torch.Tensor]", load_file(path))


def _unpickled(path: Path) -> Any:
    advice = "save model.state_dict() and give --arch PKG.MOD:FACTORY, or use compressor.save"
    with path.open("rb") as file:
        start = file.read(2)
    if start[:1] != b"\x80" and start != b"PK":
        raise InputError(f"{path} is not a PyTorch checkpoint: {advice}")
    if start == b"PK" and _is_program(path):
        raise InputError(f"{path} is a TorchScript or exported program: {advice}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        classes = _foreign(path)
        if classes:
            raise InputError(
                f"{path} pickles classes ({', '.join(classes[:4])}), which could run code when "
                f"loaded: {advice}"
            ) from None
        raise InputError(
            f"{path} is not a PyTorch checkpoint ({one_line(error, 80)}): {advice}"
        ) from None


def _is_program(path: Path) -> bool:
    """Whether the archive carries code or a graph (TorchScript, ``torch.export``)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any("/code/" in name or name.endswith("models/model.json") for name in names)


def _foreign(path: Path) -> list[str]:
    """The classes that the pickle in ``path`` names and that weights-only loading refuses."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return []


def _own(path: Path, given: Mapping[str, Any]) -> Described:
    try:
        if given["version"] != 1:
            raise InputError(f"{path} has version {given['version']!r}; this release reads 1")
        state = given["state_dict"]
        if state_digest(state) != given["digest"]:
            raise InputError(f"{path} is damaged: its weights do not match their digest")
        kind = given["kind"]
        if kind is not None and kind not in get_args(Kind):
            raise InputError(f"{path} names the task kind {kind!r}, which is unknown")
        return Described(
            state,
            {"factory": str(given["factory"]), "arguments": dict(given["arguments"])},
            tuple(
                Input(
                    str(said["name"]),
                    tuple(said["shape"][1:]),
                    str(said["dtype"]),
                    int(said["high"]),
                )
                for said in given["inputs"]
            ),
            kind,
            given["data"],
            dict(given["about"]),
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"{path} says it is a {FORMAT} but is broken ({one_line(error, 60)}): save it again"
        ) from None
