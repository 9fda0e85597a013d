"""Models that were pickled whole (``torch.save(model, path)``), read without unpickling.

A pickle is a program. Here it runs on a machine that knows values, containers and names, and calls
nothing: an instance of a class is a record of its attributes, of a function that a pickle calls
only those of :data:`REBUILT` are carried out, which make tensors and containers. What was recorded
becomes a description (:mod:`compressor.loading.embedded`) if every class in it is a layer of
PyTorch; the model is built anew from that.
"""

from __future__ import annotations

import io
import pickletools
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from compressor.artifact import zipped
from compressor.errors import InputError, one_line
from compressor.loading import embedded
from compressor.loading.checkpoint import WRAPPERS
from compressor.loading.embedded import Description, Recorded
from compressor.loading.graph.archive import BUDGET, LONGEST, Archive, flat, strided
from compressor.loading.graph.classes import ACTIVATIONS, CLASSES, shown

LAYERS = "torch.nn.modules."
MOST = 5_000_000
"""Instructions of a pickle: each may make an object."""

LEGACY = (0x1950A86A20F9469CFC6C, 1001)
"""What files from before PyTorch 1.6 begin with: a number and the version of their form."""

DTYPES: dict[str, torch.dtype] = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}


class Global(NamedTuple):
    """A name that a pickle asks for."""

    module: str
    name: str


class Foreign(NamedTuple):
    """What calling or making something of that name would have given."""

    name: Global


class Stored(NamedTuple):
    """The numbers under a key, of one axis."""

    numbers: Tensor


def _tensor(stored: Stored, offset: Any, sizes: Any, strides: Any, *rest: Any) -> Tensor:
    if len(rest) > 1 and rest[1]:
        raise ValueError("a tensor has hooks, which are code")
    return strided(stored.numbers, offset, sizes, strides)


def _typed(
    stored: Stored,
    offset: Any,
    sizes: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    *_: Any,
) -> Tensor:
    if type(dtype) is not torch.dtype:
        raise ValueError(f"{shown(dtype)} is no dtype")
    return _tensor(Stored(stored.numbers.view(dtype)), offset, sizes, strides, grad, hooks)


def _parameter(data: Any, grad: Any, hooks: Any, *_: Any) -> nn.Parameter:
    if not isinstance(data, Tensor) or hooks:
        raise ValueError("a parameter has hooks, which are code")
    return nn.Parameter(data, requires_grad=bool(grad) and data.is_floating_point())


def _ordered(*args: Any) -> dict[Any, Any]:
    return OrderedDict([(key, value) for key, value in args[0]] if args else [])


TORCH = Global("torch._C", "_VariableFunctionsClass")


def _attribute(owner: Any, name: Any) -> Any:
    # ``torch.relu`` pickles as an attribute of PyTorch's table of functions.
    if owner == TORCH and name == "relu":
        return ACTIVATIONS["torch.relu"]
    raise ValueError(f"it asks for the attribute {shown(name)}, which could be code")


REBUILT: dict[Global, Callable[..., Any]] = {
    Global("torch._utils", "_rebuild_tensor"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _typed,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    Global("torch", "Size"): tuple,
    Global("collections", "OrderedDict"): _ordered,
    Global("builtins", "set"): lambda values: set(values),
    Global("builtins", "getattr"): _attribute,
}
"""The functions that a pickled model calls, and what stands for each."""

CONSTANTS: dict[Global, Any] = {
    Global("torch.nn.functional", "relu"): ACTIVATIONS["relu"],
    Global("torch._C._nn", "gelu"): ACTIVATIONS["gelu"],
    **{Global("torch", str(dtype).removeprefix("torch.")): dtype for dtype in DTYPES.values()},
}


def is_known(name: Global) -> bool:
    """Whether it is of PyTorch's layers and tensors, or of what they are kept in."""
    return (
        name in REBUILT
        or name in CONSTANTS
        or name == TORCH
        or (name.module in ("torch", "torch.storage") and name.name in DTYPES)
        or (name.module.startswith(LAYERS) and name.name in CLASSES)
    )


Persistent = Callable[[Any], Any]


class Machine:
    """Runs a pickle without calling anything that it names; ``names`` are all that it asked for."""

    def __init__(self, persistent: Persistent) -> None:
        self.persistent = persistent
        self.names: dict[Global, None] = {}

    def run(self, stream: BinaryIO) -> Any:
        """The value of the next pickle in ``stream``. Raises :class:`ValueError` and its like."""
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[Any, Any] = {}
        arg: Any
        for count, (op, arg, _) in enumerate(pickletools.genops(stream)):
            name = op.name
            if count > MOST:
                raise ValueError(f"it has more than {MOST:,} instructions")
            if name == "STOP":
                return stack.pop()
            if name == "MARK":
                marks.append(stack)
                stack = []
            elif name in VALUES:
                stack.append(VALUES[name](arg))
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[arg] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[arg])
            elif name in ("TUPLE", "LIST", "DICT", "FROZENSET", "POP_MARK"):
                items, stack = stack, marks.pop()
                if name != "POP_MARK":
                    stack.append(GATHERED[name](items))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                width = int(name[-1])
                stack[-width:] = [tuple(stack[-width:])]
            elif name in ("APPENDS", "SETITEMS", "ADDITEMS"):
                items, stack = stack, marks.pop()
                _filled(stack[-1], name, items)
            elif name == "APPEND":
                item = stack.pop()
                _filled(stack[-1], "APPENDS", [item])
            elif name == "SETITEM":
                value, key = stack.pop(), stack.pop()
                _filled(stack[-1], "SETITEMS", [key, value])
            elif name == "POP":
                stack.pop()
            elif name == "DUP":
                stack.append(stack[-1])
            elif name == "GLOBAL":
                stack.append(self._named(*arg.split(" ", 1)))
            elif name == "STACK_GLOBAL":
                own, module = stack.pop(), stack.pop()
                stack.append(self._named(module, own))
            elif name in ("NEWOBJ", "REDUCE"):
                args, made = stack.pop(), stack.pop()
                stack.append(_made(made, args) if name == "NEWOBJ" else _called(made, args))
            elif name == "BUILD":
                state = stack.pop()
                _state(stack[-1], state)
            elif name == "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            elif name in ("INST", "OBJ", "NEWOBJ_EX"):
                raise self._unread(name, arg, stack)
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"it has the instruction {name}")
        raise ValueError("it has no end")

    def _named(self, module: Any, name: Any) -> Any:
        # Python 2 had another name for the module.
        found = Global(str(module).replace("__builtin__", "builtins"), str(name))
        self.names[found] = None
        return CONSTANTS.get(found, found)

    def _unread(self, instruction: str, arg: Any, stack: list[Any]) -> ValueError:
        if instruction == "INST":
            self._named(*arg.split(" ", 1))
        return ValueError(f"it has the instruction {instruction}, which makes an object")


VALUES: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_SET": lambda _: set(),
    **dict.fromkeys(
        [
            *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
            *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "BINUNICODE8"),
            *("SHORT_BINUNICODE", "BINBYTES", "BINBYTES8", "SHORT_BINBYTES", "BYTEARRAY8"),
        ],
        lambda arg: arg,
    ),
}
GATHERED: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple,
    "LIST": list,
    "DICT": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
    "FROZENSET": frozenset,
}


def _filled(owner: Any, how: str, items: list[Any]) -> None:
    if isinstance(owner, list) and how == "APPENDS":
        owner.extend(items)
    elif isinstance(owner, dict) and how == "SETITEMS":
        owner.update(zip(items[::2], items[1::2], strict=True))
    elif isinstance(owner, set) and how == "ADDITEMS":
        owner.update(items)
    elif not isinstance(owner, Foreign):
        raise ValueError(f"it puts items into a {type(owner).__name__}")


def _made(kind: Any, args: Any) -> Any:
    if not isinstance(kind, Global):
        raise ValueError(f"it makes an instance of a {type(kind).__name__}")
    if kind.module.startswith(LAYERS) and kind.name in CLASSES and args == ():
        return Recorded(kind.name, {})
    return Foreign(kind)


def _called(function: Any, args: Any) -> Any:
    if not isinstance(function, Global) or type(args) is not tuple:
        raise ValueError(f"it calls a {type(function).__name__}")
    if function not in REBUILT or any(type(arg) is Foreign for arg in args):
        return Foreign(function)
    return REBUILT[function](*args)


def _state(owner: Any, state: Any) -> None:
    if isinstance(owner, Recorded):
        if type(state) is not dict or not all(type(key) is str for key in state):
            raise ValueError(f"a {owner.name} has a state of no known form")
        owner.attributes.update(state)
    elif not isinstance(owner, Foreign | OrderedDict):  # an OrderedDict's is its metadata
        raise ValueError(f"it sets attributes of a {type(owner).__name__}")


def read(path: Path, weights: str | None = None) -> tuple[Description, dict[str, Tensor]]:
    """The description of the model that was pickled to ``path``, and its tensors.

    Executes nothing. The model is the file's value, or stands under ``weights``, by default one of
    :data:`~compressor.loading.checkpoint.WRAPPERS`. Raises :class:`InputError` for a model with
    classes that are none of PyTorch's layers, naming them, for one whose layers were changed by
    hand, and for a file that is damaged or could take more memory than it is long.
    """
    numbers = _Numbers(path)
    machine = Machine(numbers.find)
    try:
        found = numbers.run(machine)
    except InputError:
        raise
    except Exception as error:
        _check_names(path, machine.names)
        raise InputError(
            f"{path} is not a model that PyTorch saved ({type(error).__name__}: "
            f"{one_line(error, 120)}): save it again"
        ) from None
    _check_names(path, machine.names)
    found = _chosen(path, found, weights, Recorded)
    if not isinstance(found, Recorded):
        raise InputError(
            f"{path} holds a {type(found).__name__}, not a whole model: give --arch "
            "PKG.MOD:FACTORY, the function that builds it"
        )
    try:
        description, state = embedded.describe(found), embedded.state_of(found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if size > BUDGET * path.stat().st_size:
        raise InputError(
            f"{path}: its tensors take {size:,} bytes, more than the file holds: save contiguous "
            "tensors"
        )
    return description, state


def _check_names(path: Path, names: dict[Global, None]) -> None:
    strangers = sorted(".".join(name) for name in names if not is_known(name))
    if strangers:
        named = ", ".join(f"{' '.join(name.split()):.80}" for name in strangers[:8])
        more = f" and {len(strangers) - 8} more" if len(strangers) > 8 else ""
        raise InputError(
            f"{path} holds classes that are code: {named}{more}: add --trust-pickle if you trust it"
        )


class _Numbers:
    """The tensors' numbers of a file, in its present form (a zip) or that before PyTorch 1.6."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.zipped = file.read(2) == b"PK"
        self.archive = Archive(path) if self.zipped else None
        self.left = path.stat().st_size
        self.known: dict[str, tuple[str, int, Tensor]] = {}

    def run(self, machine: Machine) -> Any:
        if self.archive is None:
            return self._legacy(machine)
        if any(name.startswith("code/") for name in self.archive.entries):
            raise InputError(
                f"{self.path} is a TorchScript program, which is code: add --trust-pickle if you "
                "trust it"
            )
        return machine.run(io.BytesIO(self.archive.read("data.pkl", LONGEST)))

    def find(self, said: Any) -> Any:
        match said:
            case ("module", kind, *_):  # the old form kept the source of a class beside it
                return kind
            case ("storage", Global(_, str(kind)), key, _, int(count), *view) if kind in DTYPES:
                if any(part is not None for part in view):
                    raise ValueError("a storage is a view of another: save it with PyTorch 1.6")
                return Stored(self._stored(str(key), kind, count))
        raise ValueError(f"{shown(said)} is no storage")

    def _stored(self, key: str, kind: str, count: int) -> Tensor:
        if key in self.known:
            known, size, numbers = self.known[key]
            if (known, size) != (kind, count):
                raise ValueError(f"storage {key!r:.40} has two sizes")
        elif self.archive is not None:
            data = self.archive.read(f"data/{key}")
            if len(data) != count * DTYPES[kind].itemsize:
                raise ValueError(
                    f"storage {key!r:.40} has {len(data):,} bytes, not {count:,} numbers"
                )
            numbers = flat(data, DTYPES[kind])
        else:
            # What is stored comes after the pickle that names it.
            self.left -= count * DTYPES[kind].itemsize
            if count < 0 or self.left < 0:
                raise ValueError(f"storage {key!r:.40} of {count:,} numbers is not in the file")
            numbers = torch.zeros(count, dtype=DTYPES[kind])
        self.known[key] = kind, count, numbers
        return numbers

    def _legacy(self, machine: Machine) -> Any:
        with self.path.open("rb") as file:
            try:
                start = (machine.run(file), machine.run(file))
                system = machine.run(file)
            except Exception:
                start, system = (None, None), {}
            if start != LEGACY or not system.get("little_endian", True):
                raise InputError(
                    f"{self.path} is not a PyTorch checkpoint: save the model with torch.save"
                )
            found = machine.run(file)
            for key in machine.run(file):
                kind, count, numbers = self.known[key]
                size = int.from_bytes(file.read(8), "little")
                data = file.read(count * DTYPES[kind].itemsize)
                if size != count or len(data) != count * DTYPES[kind].itemsize:
                    raise ValueError(f"storage {key!r:.40} is cut short")
                numbers.copy_(flat(data, DTYPES[kind]))
        return found


def _chosen(path: Path, found: Any, weights: str | None, kind: type) -> Any:
    """The model of a checkpoint: that under ``weights``, or the first under a usual key."""
    held = found if isinstance(found, dict) else {}
    models = {str(key): value for key, value in held.items() if isinstance(value, kind)}
    if weights is None:
        return next((models[key] for key in WRAPPERS if key in models), found)
    if weights not in models:
        raise InputError(
            f"{path} has no model under --weights {weights!r}: it has "
            f"{', '.join(models) or 'none to choose from'}"
        )
    return models[weights]


def trusted(path: Path, weights: str | None = None) -> nn.Module:
    """The model in ``path``, unpickled: this runs whatever code the file holds.

    ``weights`` is its key in a file that has several.

    For a caller who was told to trust the file. TorchScript programs load too. Raises
    :class:`InputError` where that fails or gives no model.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            if zipped(path) and any(name.startswith("code/") for name in Archive(path).entries):
                found: Any = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
            else:
                found = torch.load(path, map_location="cpu", weights_only=False)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path} does not unpickle ({type(error).__name__}: {one_line(error, 120)}): run where "
            "its classes can be imported, or give its state dict and --arch PKG.MOD:FACTORY"
        ) from None
    found = _chosen(path, found, weights, nn.Module)
    if not isinstance(found, nn.Module):
        raise InputError(
            f"{path} holds a {type(found).__name__}, not a whole model: give --arch "
            "PKG.MOD:FACTORY, the function that builds it"
        )
    return found.cpu()
