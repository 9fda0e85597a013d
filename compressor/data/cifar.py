"""CIFAR-10 and CIFAR-100 (A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images",
2009), in the binary and the Python version of https://www.cs.toronto.edu/~kriz/cifar.html

The binary version is records of one label byte (two in CIFAR-100, coarse and fine) and 3072 bytes
of pixels. The Python version is pickles, which are programs: here they run on a machine that knows
values, containers and how NumPy stores an array of bytes, and calls nothing.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from compressor.data.live import Data, checked
from compressor.data.splitting import completed, fewer, partly
from compressor.errors import InputError, one_line
from compressor.task import Array, Batch, Split, Splits

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32

MEAN_10, DEVIATION_10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of red, green and blue in CIFAR-10's 50,000 training images, in [0, 1]."""

MEAN_100, DEVIATION_100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
"""The same of CIFAR-100."""

BYTES_AT_MOST = 1 << 30
"""Bytes of one file; the largest of the originals has 155 MB."""

CALLS_AT_MOST = 2_000_000
"""Instructions of a pickle, each of which may make an object; the originals have 250,000."""

Train = Annotated[int, Field(ge=2)]
Labelled = Annotated[float, Field(gt=0, le=1)]


def cifar10(
    location: str, seed: int, *, train: Train | None = None, labelled: Labelled = 1
) -> Data:
    """CIFAR-10, from the folder of its files, binary (``*.bin``) or Python (``data_batch_1``).

    Inputs are float32 ``(3, 32, 32)``: ``(pixel / 255 - mean) / deviation`` of each channel, with
    :data:`MEAN_10` and :data:`DEVIATION_10`; 10 classes. ``train`` keeps that many random examples
    of what ``validate`` leaves; ``labelled`` is the fraction of those that keep their label. Pixels
    stay bytes in memory until they are asked for.

    Raises :class:`InputError` for a missing or broken file, and a pickle that would call anything.
    """
    parts = {"train": [f"data_batch_{at}" for at in range(1, 6)], "test": ["test_batch"]}
    read = _parts(location, "cifar-10-batches", parts, (("labels", 10),), 0)
    splits = _splits(read, MEAN_10, DEVIATION_10, seed, train, labelled)
    return Data("cifar10", splits, "classification", 10)


def cifar100(
    location: str,
    seed: int,
    *,
    labels: Literal["fine", "coarse"] = "fine",
    train: Train | None = None,
    labelled: Labelled = 1,
) -> Data:
    """CIFAR-100: as :func:`cifar10`, with :data:`MEAN_100` and :data:`DEVIATION_100`.

    The classes are the 100 ``fine`` ones, or the 20 ``coarse`` ones that they belong to.
    """
    parts = {"train": ["train"], "test": ["test"]}
    columns = (("coarse_labels", 20), ("fine_labels", 100))
    which = 1 if labels == "fine" else 0
    read = _parts(location, "cifar-100", parts, columns, which)
    splits = _splits(read, MEAN_100, DEVIATION_100, seed, train, labelled)
    return Data("cifar100", splits, "classification", columns[which][1])


Part = tuple[Array, Array]
"""uint8 images ``(n, 3, 32, 32)`` and int64 labels ``(n,)``."""


def _splits(
    parts: dict[str, Part],
    mean: tuple[float, ...],
    deviation: tuple[float, ...],
    seed: int,
    train: int | None,
    labelled: float,
) -> Splits:
    # One multiplication and one addition a pixel, in float32.
    scale = (1 / (255 * np.array(deviation))).astype(np.float32)[:, None, None]
    shift = (-np.array(mean) / np.array(deviation)).astype(np.float32)[:, None, None]

    def split(images: Array, labels: Array) -> Split:
        def fetch(at: Array) -> Batch:
            pixels = images[at].astype(np.float32)
            pixels *= scale
            pixels += shift
            return (pixels,), labels[at]

        return Split(fetch, np.arange(len(labels)))

    learn, labels = split(*parts["train"]), parts["train"][1]
    splits = completed(learn, seed, labels=labels, test=split(*parts["test"]))
    if train is not None:
        splits = fewer(splits, train, seed)
    return partly(checked(splits), labels, labelled, seed)


def _parts(
    location: str,
    inner: str,
    parts: Mapping[str, list[str]],
    columns: tuple[tuple[str, int], ...],
    which: int,
) -> dict[str, Part]:
    """``train`` and ``test``, each of the files of its names; ``columns`` are the labels' names."""
    folder = Path(location).expanduser()
    names = [name for listed in parts.values() for name in listed]
    homes = [
        (home, end)
        for end, mark in ((".bin", "bin"), ("", "py"))
        for home in (folder, folder / f"{inner}-{mark}", folder / f"{inner}-binary")
        if (home / f"{names[0]}{end}").is_file()
    ]
    if not homes:
        raise InputError(
            f"{folder} has neither {names[0]}.bin nor {names[0]}: give the folder of the files of "
            "the binary or the Python version"
        )
    home, end = homes[0]
    for name in names:
        if not (home / f"{name}{end}").is_file():
            raise InputError(f"{home} has no {name}{end}: get the files again")
    found: dict[str, Part] = {}
    for part, listed in parts.items():
        files = [home / f"{name}{end}" for name in listed]
        read = [(_records if end else _pickled)(file, columns, which) for file in files]
        images, labels = (np.concatenate(each) for each in zip(*read, strict=True))
        found[part] = images, labels.astype(np.int64)
    return found


def _content(path: Path) -> bytes:
    size = path.stat().st_size
    if not 0 < size <= BYTES_AT_MOST:
        raise InputError(
            f"{path} has {size:,} bytes; more than 0, at most {BYTES_AT_MOST:,} can be"
        )
    return path.read_bytes()


def _records(path: Path, columns: tuple[tuple[str, int], ...], which: int) -> Part:
    content, size = _content(path), len(columns) + PIXELS
    if len(content) % size:
        raise InputError(
            f"{path} has {len(content):,} bytes, no multiple of {size}, which is one record: get "
            "the file again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = _within(records[:, which], columns[which], path)
    return records[:, len(columns) :].reshape(-1, *SHAPE), labels


def _within(labels: Array, column: tuple[str, int], path: Path) -> Array:
    name, classes = column
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        raise InputError(f"{path} holds the label {wrong}, {name} are 0 to {classes - 1}")
    return labels


# --- the Python version


RECONSTRUCT = re.compile(r"numpy\.(_core|core)\.multiarray _reconstruct")
CLASSES = ("numpy ndarray", "numpy dtype")


class Name(str):
    """A name that a pickle asks for."""


class Bytes:
    """An array of bytes, in the making."""

    values: Array | None = None


class Dtype:
    """The type uint8, the only one that these arrays have."""


def _pickled(path: Path, columns: tuple[tuple[str, int], ...], which: int) -> Part:
    try:
        said = unpickled(_content(path))
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    except Exception as error:  # a broken pickle: pickletools raises half a dozen types
        raise InputError(f"{path} is no pickle of CIFAR: {one_line(error, 120)}") from None
    # Strings of Python 2 are bytes in Python 3, unless somebody wrote the file again.
    content = {_text(key): value for key, value in said.items()} if type(said) is dict else {}
    name, _ = columns[which]
    images, labels = content.get("data"), content.get(name)
    if type(images) is not Bytes or images.values is None or type(labels) is not list:
        raise InputError(f"{path} holds no array 'data' and list {name!r}: it is no file of CIFAR")
    pixels = images.values
    if pixels.shape != (len(labels), PIXELS) or not labels:
        raise InputError(
            f"{path} holds data of shape {pixels.shape} and {len(labels)} {name}: expected "
            f"(n, {PIXELS}) and n"
        )
    wrong = [label for label in labels if type(label) is not int or abs(label) > 1 << 31]
    if wrong:
        raise InputError(f"{path} holds the label {wrong[0]!r:.40}: labels are integers")
    return pixels.reshape(-1, *SHAPE), _within(np.array(labels, np.int64), columns[which], path)


def unpickled(content: bytes) -> Any:
    """What a pickle of dicts, lists, tuples, strings, bytes, integers and byte arrays holds.

    Arrays are :class:`Bytes`. No name is imported and nothing called. Raises :class:`InputError`
    with the name, for any other class, and whatever goes wrong in a broken pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    def top(kind: type) -> Any:
        if type(stack[-1]) is not kind:
            raise InputError(f"fills a {type(stack[-1]).__name__} as a {kind.__name__}: broken")
        return stack[-1]

    code: pickletools.OpcodeInfo
    argument: Any
    for count, (code, argument, _) in enumerate(pickletools.genops(io.BytesIO(content))):
        if count == CALLS_AT_MOST:
            raise InputError(f"has more than {CALLS_AT_MOST:,} instructions: it is no CIFAR")
        name = code.name
        if name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name in VALUES:
            # Strings of Python 2 come from pickletools as Latin-1 text.
            stack.append(argument.encode("latin1") if name in BYTE_STRINGS else argument)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name in ("LIST", "TUPLE"):
            stack.append(since() if name == "LIST" else tuple(since()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            values = tuple(stack[-size:])
            del stack[-size:]
            stack.append(values)
        elif name in ("APPEND", "APPENDS"):
            more = [stack.pop()] if name == "APPEND" else since()
            top(list).extend(more)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            pairs = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since()
            if name == "DICT":
                stack.append({})
            top(dict).update(zip(pairs[::2], pairs[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            asked = argument if name == "GLOBAL" else " ".join((stack.pop(-2), stack.pop()))
            if asked not in (*CLASSES, ENCODE) and not RECONSTRUCT.fullmatch(asked):
                raise InputError(
                    f"asks for {asked.replace(' ', '.')!r:.80}, which no file of CIFAR needs, and "
                    "which could run code: get the file again"
                )
            stack.append(Name(asked))
        elif name == "REDUCE":
            given = stack.pop()
            stack.append(_made(stack.pop(), given))
        elif name == "BUILD":
            _filled(stack[-2], stack.pop())
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise InputError(f"has the instruction {name}, which no file of CIFAR needs")
    raise InputError("ends too early: get the file again")


VALUES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("BINSTRING", "SHORT_BINSTRING", "STRING"),
}
"""Instructions that hold their value."""

BYTE_STRINGS = {"BINSTRING", "SHORT_BINSTRING", "STRING"}

CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


ENCODE = "_codecs encode"
"""How Python 3 writes bytes for Python 2: as text, with the codec that makes bytes of it again."""


def _made(name: Any, given: Any) -> Bytes | Dtype | bytes:
    """What NumPy's ``_reconstruct`` or ``dtype`` would make of these arguments, or bytes."""
    if type(name) is Name and type(given) is tuple and given:
        if name == ENCODE and given[1:] == ("latin1",) and type(given[0]) is str:
            return given[0].encode("latin1")
        if RECONSTRUCT.fullmatch(name) and given[0] == "numpy ndarray":
            return Bytes()
        if name == "numpy dtype":
            if _text(given[0]) not in ("u1", "|u1"):
                raise InputError(f"holds an array of {given[0]!r:.40}: pixels are bytes (u1)")
            return Dtype()
    raise InputError("calls what is no array: it is no file of CIFAR")


def _filled(made: Any, state: Any) -> None:
    """An array gets its values; a type its byte order, which bytes do not have."""
    if type(made) is Dtype:
        return
    if type(made) is not Bytes or type(state) is not tuple or len(state) != 5:
        raise InputError("fills what is no array: it is no file of CIFAR")
    _, shape, dtype, fortran, raw = state
    sizes = type(shape) is tuple and all(type(size) is int and size >= 0 for size in shape)
    if not sizes or len(shape) != 2 or type(dtype) is not Dtype or type(raw) is not bytes:
        raise InputError(f"holds an array of shape {shape!r:.60}: pixels are (n, {PIXELS}) bytes")
    if shape[0] * shape[1] != len(raw):
        raise InputError(f"holds {len(raw):,} bytes of an array of shape {shape}: get it again")
    made.values = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


def _text(value: Any) -> Any:
    return value.decode("latin1") if type(value) is bytes else value
