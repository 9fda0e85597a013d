"""Hidden layers of a student beside those of its teacher: which go together, and what they gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from compressor.errors import InputError
from compressor.loading.task import tensors
from compressor.training.losses import Pair

LEFT = (_ConvNd, _BatchNorm, _InstanceNorm, nn.GroupNorm)
"""Layers whose channels are on axis 1; those of all others are on the last."""

Examples = tuple[Tensor, ...]


class Output(NamedTuple):
    """What a layer gave: the shape of its first tensor and whether the model returned it."""

    shape: tuple[int, ...]
    last: bool


def pairs(
    student: nn.Module,
    teacher: nn.Module,
    example: Examples,
    layers: Sequence[str] | None = None,
    most: int = 4,
) -> list[tuple[str, str]]:
    """Names of the layers of ``student`` and of ``teacher`` whose outputs a loss can compare.

    ``example`` is a batch of inputs, on the models' device. ``layers`` are ``STUDENT=TEACHER``, or
    one name for both. Without them: layers of the same name with weights of their own or inside,
    whose outputs differ in the number of channels only, in the order of their work. These are the
    last one of each size (of pictures, or of sequences), and between them members of the largest
    row of alike siblings, the blocks of a transformer or the linear layers of a perceptron; at most
    ``most``, evenly spaced. What the model returns is none of them.

    The models keep their modes; nothing in them changes. Raises :class:`InputError` for a layer
    that does not exist or does not run, for two whose outputs cannot be compared, and where nothing
    can be paired.
    """
    student, teacher = inner(student), inner(teacher)
    ours, theirs = outputs(student, example), outputs(teacher, example)
    if layers is not None:
        named = [_named(layer) for layer in layers]
        for mine, goal in named:
            axis(student, mine, _shape(ours, student, mine, "student"),
                 teacher, goal, _shape(theirs, teacher, goal, "teacher"))  # fmt: skip
        return named
    sizes = {
        name: size
        for name, given in ours.items()
        if not given.last
        and name in theirs
        and (size := _size(student, teacher, name, given.shape, theirs[name].shape)) is not None
    }
    if not sizes:
        raise InputError(
            "no hidden layer of student and teacher has the same name and size: name the layers, "
            "STUDENT=TEACHER"
        )
    # The next block may begin with a layer of the size of the one before: whole ones come first.
    whole = [name for name in sizes if not _begins(student, name, sizes)]
    ends = {sizes[name]: name for name in (*sizes, *whole)}
    chosen = spaced([name for name, size in sizes.items() if ends[size] == name], most)
    between = [name for name in _row(student, list(sizes)) if name not in chosen]
    chosen += spaced(between, most - len(chosen))
    return [(name, name) for name in sizes if name in chosen]


def outputs(model: nn.Module, example: Examples) -> dict[str, Output]:
    """What each layer of ``model`` gives for ``example``, by name, in the order in which they end.

    Layers that give no tensor, or do not run, are left out; the last of several runs counts.
    """
    found: dict[str, Tensor] = {}

    def holds(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hold(module: nn.Module, inputs: Any, output: Any) -> None:
            found.pop(name, None)
            if parts := tensors(output):
                found[name] = parts[0]

        return hold

    named = [(name, module) for name, module in model.named_modules() if name]
    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(holds(name)) for name, module in named]
    try:
        model.eval()
        with torch.no_grad():
            returned = {part.untyped_storage().data_ptr() for part in tensors(model(*example))}
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return {
        name: Output(tuple(tensor.shape), tensor.untyped_storage().data_ptr() in returned)
        for name, tensor in found.items()
    }


def axis(
    student: nn.Module,
    mine: str,
    ours: tuple[int, ...],
    teacher: nn.Module,
    goal: str,
    theirs: tuple[int, ...],
) -> int:
    """The axis of the channels in the outputs of two layers, shapes ``ours`` and ``theirs``: where
    they differ, or where layers of their kind have it.

    Raises :class:`InputError` where they differ in more.
    """
    differing = [at for at, (one, two) in enumerate(zip(ours, theirs, strict=False)) if one != two]
    if len(ours) < 2 or len(ours) != len(theirs) or len(differing) > 1 or 0 in differing:
        raise InputError(
            f"the outputs of {mine!r} {ours} and {goal!r} {theirs} differ in more than channels: "
            "pair layers of the same size"
        )
    if differing:
        return differing[0]
    inside = [
        module
        for module in student.get_submodule(mine).modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    left = isinstance(inside[-1], LEFT) if inside else len(ours) > 3
    return 1 if left else len(ours) - 1


def spaced(names: Sequence[str], most: int) -> list[str]:
    """At most ``most`` of ``names``, evenly spaced, the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[(at + 1) * len(names) // most - 1] for at in range(most)]


def inner(model: nn.Module) -> nn.Module:
    """The model itself, where it is wrapped to be trained by several processes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _size(
    student: nn.Module,
    teacher: nn.Module,
    name: str,
    ours: tuple[int, ...],
    theirs: tuple[int, ...],
) -> tuple[int, ...] | None:
    """The output's shape without examples and channels; ``None`` where it is no feature."""
    layer = student.get_submodule(name)
    if next(layer.parameters(), None) is None:
        return None
    if len(ours) < 3 and not isinstance(layer, nn.Linear):
        return None
    try:
        channels = axis(student, name, ours, teacher, name, theirs)
    except InputError:
        return None
    return ours[1:channels] + ours[channels + 1 :]


def _begins(student: nn.Module, name: str, sizes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the layer is part of a block that ends in another size; a chain is no block."""
    parts = name.split(".")
    around = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any(
        sizes.get(outer, sizes[name]) != sizes[name]
        and not isinstance(student.get_submodule(outer), nn.Sequential)
        for outer in around
    )


def _row(student: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are siblings of one type and hold the most parameters together."""
    rows: dict[tuple[str, type[nn.Module]], list[str]] = {}
    for name in names:
        parent = name.rpartition(".")[0]
        rows.setdefault((parent, type(student.get_submodule(name))), []).append(name)

    def held(row: list[str]) -> int:
        return sum(
            parameter.numel()
            for name in row
            for parameter in student.get_submodule(name).parameters()
        )

    # One container of everything is no row.
    return max((row for row in rows.values() if len(row) > 1), key=held, default=[])


def _named(layer: str) -> tuple[str, str]:
    mine, _, goal = layer.partition("=")
    return mine, goal or mine


def _shape(found: dict[str, Output], model: nn.Module, name: str, whose: str) -> tuple[int, ...]:
    if name in found:
        return found[name].shape
    if name and name in dict(model.named_modules()):
        raise InputError(f"layer {name!r} of the {whose} gave no tensor: choose one that runs")
    known = list(found)
    some = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    raise InputError(f"the {whose} has no layer {name!r}: choose from {some}")


class Features:
    """Holds what paired layers gave in the last forward passes of student and teacher.

    ::

        with Features(student, teacher, names, example, seed=0) as features:
            outputs = student(inputs)
            with torch.no_grad():
                goal = teacher(inputs)
            seen = Seen(..., features=features.take())

    ``names`` are from :func:`pairs`; ``example`` is a batch of inputs on the models' device.
    ``adapters`` holds for every pair a linear map of the student's channels to as many as the
    teacher has (a regressor of FitNets, Romero et al. 2015), or the identity where it has as many.
    Their start follows from ``seed``. They are trained along with the student and then no longer
    needed. Hooks are on the modules between ``with`` and its end, errors included.

    Raises :class:`InputError` as :func:`pairs` does.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        names: Sequence[tuple[str, str]],
        example: Examples,
        seed: int,
    ) -> None:
        self._models = inner(student), inner(teacher)
        self._names = tuple(names)
        self._held: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        self._handles: list[RemovableHandle] = []
        self._axes: list[int] = []
        self.adapters = nn.ModuleList()
        pupil, master = self._models
        ours, theirs = outputs(pupil, example), outputs(master, example)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for mine, goal in self._names:
                one = _shape(ours, pupil, mine, "student")
                two = _shape(theirs, master, goal, "teacher")
                at = axis(pupil, mine, one, master, goal, two)
                same = one[at] == two[at]
                self._axes.append(at)
                self.adapters.append(nn.Identity() if same else nn.Conv1d(one[at], two[at], 1))
        self.adapters.to(example[0].device)

    def __enter__(self) -> Features:
        for model, held, names in zip(
            self._models, self._held, zip(*self._names, strict=True), strict=True
        ):
            for name in dict.fromkeys(names):
                layer = model.get_submodule(name)
                self._handles.append(layer.register_forward_hook(_holding(held, name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        for held in self._held:
            held.clear()

    def take(self) -> tuple[Pair, ...]:
        """The features of the last forward passes, channels on axis 1, and forgets them.

        The teacher's have no gradient. Raises :class:`InputError` where a layer did not run since
        they were last taken.
        """
        ours, theirs = self._held
        found = []
        for (mine, goal), at, adapter in zip(self._names, self._axes, self.adapters, strict=True):
            for name, held, whose in ((mine, ours, "student"), (goal, theirs, "teacher")):
                if name not in held:
                    raise InputError(
                        f"layer {name!r} of the {whose} did not run in this step: pair layers that "
                        "run in each"
                    )
            feature = ours[mine].movedim(at, 1)
            adapted = feature
            if isinstance(adapter, nn.Conv1d):
                flat = feature.reshape(*feature.shape[:2], -1)
                # What autocast made in 16 bits may be taken outside of it.
                flat = adapter(flat.to(adapter.weight.dtype))
                adapted = flat.reshape(len(feature), -1, *feature.shape[2:])
            found.append(Pair(feature, theirs[goal].detach().movedim(at, 1), adapted))
        ours.clear()
        theirs.clear()
        return tuple(found)


def _holding(held: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hold(module: nn.Module, inputs: Any, output: Any) -> None:
        held[name] = tensors(output)[0]

    return hold
