"""``.pt`` files: the self-describing one that :func:`save` writes, state dicts and checkpoints.

Everything is read with ``torch.load(weights_only=True)``: tensors and plain values, no code.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import nn

from compressor.artifact import replacing
from compressor.errors import InputError, one_line
from compressor.loading import torchfile
from compressor.loading.sketch import sketch
from compressor.loading.torchfile import State
from compressor.task import Input, Kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = "compressor.model"
ZOO = "compressor.zoo:"
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the weights in a checkpoint."""

LARGEST_EXAMPLE = 1 << 28
"""Elements of one example that a file may ask to be made up: 1 GiB of float32."""


@dataclass(frozen=True)
class Described:
    """What a file says of itself; everything but ``state`` may be missing.

    ``usual`` inputs are those that such a model is mostly given: data of other shapes is as good.
    """

    state: State
    source: Mapping[str, Any] | None = None
    inputs: tuple[Input, ...] = ()
    kind: Kind | None = None
    data: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    usual: tuple[Input, ...] = ()


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

    Raises :class:`InputError` when a zoo factory with these arguments does not give this model, or
    when a value could not be read back.
    """
    path = Path(path)
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    if factory.startswith(ZOO):
        torchfile.fits(sketch(factory.removeprefix(ZOO), arguments or {}, state), state, path)
    elif factory.count(":") != 1:
        raise InputError(f"factory {factory!r}: write compressor.zoo:NAME or PKG.MOD:FACTORY")
    examples = inputs if isinstance(inputs, tuple | list) else (inputs,)
    said = {
        "format": FORMAT,
        "version": 1,
        "source": {"factory": factory, "arguments": dict(arguments or {})},
        "inputs": [
            {**asdict(given), "shape": [1, *given.shape]} for given in inputs_like(examples)
        ],
        "kind": kind,
        "data": data,
        "about": dict(about or {}),
    }
    try:
        plain = json.loads(json.dumps(said))  # a NumPy number would be pickled as a class
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}: arguments and about must be plain JSON values: {one_line(error)}"
        ) from None
    document = {**plain, "digest": torchfile.digest_of(plain, state), "state_dict": state}
    _own(path, document)  # what is written can be read
    # Given a name, torch.save would write it into the archive: the same model, other bytes.
    with replacing(path) as beside, beside.open("wb") as file:
        torch.save(document, file)
    return path


def inputs_like(examples: Sequence[torch.Tensor | NDArray[np.generic]]) -> tuple[Input, ...]:
    """What inputs a model takes, read off a batch of them, batch axis first.

    Raises :class:`InputError` for what is no batch and for a dtype that NumPy does not have.
    """
    names = ["input"] if len(examples) == 1 else [f"input_{at}" for at in range(len(examples))]
    found = []
    for name, example in zip(names, examples, strict=True):
        if not isinstance(example, torch.Tensor | np.ndarray) or example.ndim == 0:
            raise InputError(f"{name} is no batch but {example!r:.40}: give tensors, batch first")
        said = {
            "name": name,
            "shape": [1, *(int(size) for size in example.shape[1:])],
            "dtype": str(example.dtype).removeprefix("torch."),
        }
        found.append(_input({**said, "high": _high(example)}))
    return tuple(found)


def _input(said: Mapping[str, Any]) -> Input:
    """The input that a file describes, its ``shape`` with a batch axis, checked."""
    name, shape, dtype, high = said["name"], tuple(said["shape"][1:]), said["dtype"], said["high"]
    sizes = all(type(size) is int and size >= 1 for size in shape)
    if not sizes or math.prod(shape) > LARGEST_EXAMPLE:
        raise InputError(f"input {name!r} has the shape {list(shape)!r:.60}: it cannot be meant")
    if dtype not in ("float16", "float32", "float64", "bool") and not re.fullmatch(
        "u?int(8|16|32|64)", str(dtype)
    ):
        raise InputError(f"input {name!r} is of dtype {dtype!r:.40}: convert it to float32")
    if type(high) is not int or high < 1:
        raise InputError(
            f"input {name!r} is drawn below {high!r:.40}: it must be an integer above 0"
        )
    return Input(str(name), shape, dtype, high)


def _high(example: Any) -> int:
    """One more than the largest integer seen: made-up token ids stay inside the vocabulary."""
    whole = not str(example.dtype).removeprefix("torch.").startswith(("float", "bfloat", "complex"))
    return max(int(example.max()) + 1, 1) if whole and math.prod(example.shape) else 2


def read(path: Path, weights: str | None = None) -> Described:
    """Reads ``path`` without executing anything in it.

    ``weights`` is the key of the weights in a checkpoint that has several, such as ``ema``; by
    default one of :data:`WRAPPERS`.

    Raises :class:`InputError`, one line that says what to do, for everything that is not a
    self-describing model, a state dict or a checkpoint that holds one.
    """
    there(path)
    if path.suffix == torchfile.SUFFIX:
        return Described(_safetensors(path))
    with warnings.catch_warnings(action="ignore"):  # what PyTorch thinks of a foreign file
        given = _unpickled(path)
    if not isinstance(given, dict):
        raise InputError(
            f"{path} holds a {type(given).__name__}, not weights: save model.state_dict()"
        )
    _check_memory(path, given)
    if given.get("format") == FORMAT:
        if weights is not None:
            raise InputError(f"--weights: {path} has one set of weights: leave it out")
        return _own(path, given)
    if weights is not None and not isinstance(given.get(weights), dict):
        kept = [str(key) for key, value in given.items() if isinstance(value, dict)]
        raise InputError(
            f"{path} has no weights under --weights {weights!r}: it has {', '.join(kept) or 'none'}"
        )
    keys = WRAPPERS if weights is None else (weights,)
    for _ in range(DEEPEST):
        inner = next((given[key] for key in keys if isinstance(given.get(key), dict)), None)
        if inner is None:
            break
        given, keys = inner, WRAPPERS  # a model's own checkpoint may lie in that of a run
    wrong = [key for key, value in given.items() if not isinstance(value, torch.Tensor)]
    if not given or wrong:
        seen = ", ".join(map(repr, list(given)[:5])) or "nothing"
        held = [key for key, value in given.items() if isinstance(value, dict) and _tensors(value)]
        advice = f"add --weights {held[0]}, or save" if held else "save"
        raise InputError(
            f"{path} holds no state dict (keys: {seen}): {advice} model.state_dict() or use "
            "compressor.save"
        )
    return Described({str(key): value for key, value in given.items()})


def _tensors(held: Mapping[Any, Any]) -> bool:
    return bool(held) and all(isinstance(value, torch.Tensor) for value in held.values())


DEEPEST = 4
"""Checkpoints inside each other: a file of bad intent may hold itself."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""In front of all names: of ``DataParallel`` and averaged models, ``torch.compile``, Lightning."""

BESIDE = "n_averaged"
"""What ``torch.optim.swa_utils.AveragedModel`` keeps beside its weights."""


def unwrapped(state: State, wanted: Mapping[str, Any]) -> State:
    """``state`` without what wrappers put in front of its names, where it then has those that are
    ``wanted``; otherwise as it is."""
    inner = dict(state)
    while inner and inner.keys() != wanted.keys():
        if BESIDE not in wanted:
            inner.pop(BESIDE, None)
        prefix = next((one for one in PREFIXES if all(key.startswith(one) for key in inner)), None)
        if prefix is None:
            break
        inner = {key.removeprefix(prefix): value for key, value in inner.items()}
    return inner if inner.keys() == wanted.keys() else state


def there(path: Path) -> None:
    """Raises :class:`InputError` where ``path`` is no file."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}: give a model file such as model.pt")


def _check_memory(path: Path, given: Mapping[Any, Any]) -> None:
    """Refuses tensors that repeat a few stored numbers until they fill the memory (stride 0)."""
    size = path.stat().st_size
    for name, value in given.items():
        if isinstance(value, Mapping):
            _check_memory(path, value)
        elif isinstance(value, torch.Tensor) and value.numel() * value.element_size() > size:
            raise InputError(
                f"{path}: {name!r} has the shape {tuple(value.shape)}, more than the file's "
                f"{size:,} bytes can hold: save contiguous tensors"
            )


def _safetensors(path: Path) -> State:
    from safetensors.torch import load_file

    torchfile.header(path)  # what is wrong with the file becomes one line
    state: State = load_file(path)
    return state


def _unpickled(path: Path) -> Any:
    advice = "save model.state_dict() and give --arch PKG.MOD:FACTORY, or use compressor.save"
    with path.open("rb") as file:
        start = file.read(2)
    if start[:1] != b"\x80" and start != b"PK":
        raise InputError(f"{path} is not a PyTorch checkpoint: {advice}")
    if start == b"PK" and entries(path, "/code/"):
        raise InputError(
            f"{path} is a TorchScript program, which is code: add --trust-pickle if you trust it, "
            f"or {advice}"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        classes = _foreign(path)
        if classes:
            raise InputError(
                f"{path} pickles classes ({', '.join(classes[:4])}), which could run code when "
                f"loaded: add --trust-pickle if you trust it, or {advice}"
            ) from None
        raise InputError(
            f"{path} is not a PyTorch checkpoint ({one_line(error, 80)}): {advice}"
        ) from None


GRAPH = "models/model.json"
"""In the name of an entry of what ``torch.export`` saves; ``/code/`` in those of TorchScript."""


def entries(path: Path, part: str) -> bool:
    """Whether ``path`` is an archive with ``part`` in the name of an entry."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(part in name for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return False  # no archive, or a damaged one: loading it will say so


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
        said = {key: given[key] for key in given if key not in ("digest", "state_dict")}
        if torchfile.digest_of(said, state) != given["digest"]:
            raise InputError(f"{path} is damaged: it does not match its digest; save it again")
        kind, data = given["kind"], given["data"]
        if kind is not None and kind not in get_args(Kind):
            raise InputError(f"{path} names the task kind {kind!r}, which is unknown")
        if data is not None and not isinstance(data, str):
            raise InputError(f"{path} names the data {data!r:.60}, which is no data spec")
        inputs = tuple(_input(said) for said in given["inputs"])
        return Described(
            state, torchfile.source_of(given), inputs, kind, data, dict(given["about"])
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise InputError(
            f"{path} says it is a {FORMAT} but is broken ({one_line(error, 60)}): save it again"
        ) from None
