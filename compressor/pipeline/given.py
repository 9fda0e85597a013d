"""The model of a run as it is given: layers of PyTorch, or a graph that no layers come from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from compressor.artifact import Artifact
from compressor.data import Data
from compressor.errors import InputError
from compressor.loading import onnxfile, onnxtask
from compressor.loading import task as tasks
from compressor.loading.checkpoint import inputs_like
from compressor.loading.opaque import Opaque, converted
from compressor.measure.counting import vetted
from compressor.measure.process import WorkerFailed
from compressor.pipeline.entries import Runner, known, read_data
from compressor.recipe import Recipe
from compressor.stages import STAGES, form_taken
from compressor.stages.export import adopt
from compressor.task import Kind, Task

TOGETHER = 32
"""Examples that an ONNX file answers at a time where nothing is measured: as many as the judge of
quantization gives to a graph."""


@contextmanager
def original(
    path: Path,
    *,
    data: Any = None,
    inputs: Sequence[str] = (),
    domains: Collection[str] = (),
    metric: str | None = None,
    kind: Kind | None = None,
    seed: int = 0,
    functions: Mapping[str, Callable[..., Any]] = {},
) -> Iterator[tuple[Task, Artifact]]:
    """The task of the ONNX file at ``path``, and the file as it is measured while the block lasts.

    That is the file itself or, made by :func:`compressor.stages.export.adopt`, one that takes any
    batch. Raises :class:`InputError` where the file does not run, or the data does not fit it.
    """
    file = onnxfile.read(path, domains)
    asked, given = onnxfile.asked(inputs), read_data(data)
    known(asked, [slot.name for slot in file.slots])
    given = onnxtask.suited(given, file) if given else None
    like = inputs_like(given.splits.train.head(64)[0]) if given else ()
    fed = onnxfile.inputs(file, asked, like=like, batch=(file.batch or 1,))
    vetted(path, fed)
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        try:
            # In a worker first: what follows opens the file in this process.
            once = file.batch or 2
            examples = (one.synthetic(once, seed + at) for at, one in enumerate(fed))
            Runner(path, once)(*map(torch.from_numpy, examples))
            adopted = adopt(file, fed, Path(folder) / path.stem)
            runner = Runner(adopted.path, TOGETHER)
            task = onnxtask.task(
                file, runner, fed, data=given, metric=metric, kind=kind, seed=seed,
                functions=functions,
            )  # fmt: skip
        except WorkerFailed as error:
            raise InputError(f"{path} does not run: {error}") from None
        yield task, adopted


class TorchOnly(NamedTuple):
    """What is asked of a PyTorch model alone."""

    arch: Any = None
    teacher: Sequence[Any] = ()
    teacher_arch: Any = None
    student: Any = None
    weights: str | None = None


def graph_path(
    model: object,
    steps: Recipe,
    only: TorchOnly,
    inputs: Sequence[str],
    domains: Sequence[str],
    *,
    trusted: bool,
) -> Path | None:
    """The path of a model that is an ONNX file. Raises :class:`InputError`, from the arguments
    alone, for what such a model cannot do, or only such a one."""
    if isinstance(model, str | Path) and Path(model).suffix == onnxfile.SUFFIX:
        _measurable(f"{Path(model).name} is ONNX: {onnxtask.NEEDED}", steps, only)
        return Path(model)
    if not trusted:  # a program that is trusted may turn out to be a graph
        _unasked(inputs, domains)
    return None


@contextmanager
def opened(
    model: Any,
    graph: Path | None,
    steps: Recipe,
    only: TorchOnly,
    inputs: Sequence[str],
    domains: Sequence[str],
    *,
    trusted: bool,
    data: Any,
    **judged: Any,
) -> Iterator[tuple[Task, Artifact | None]]:
    """The task of a run and, where the model is a graph, the file as it is measured while the block
    lasts: that at ``graph``, or what a trusted program was exported to."""
    with ExitStack() as stack:
        task: Task | None = None
        if graph is None:
            data = read_data(data) if trusted else data
            try:
                task = tasks(
                    model,
                    data=data,
                    arch=only.arch,
                    teachers=only.teacher,
                    teacher_arch=only.teacher_arch,
                    student=only.student,
                    weights=only.weights,
                    trusted=trusted,
                    **judged,
                )
            except Opaque as error:
                _measurable(str(error), steps, only)
                graph = stack.enter_context(program(error, data))
        if graph is not None:
            yield stack.enter_context(
                original(graph, data=data, inputs=inputs, domains=domains, **judged)
            )
        else:
            assert task is not None
            _unasked(inputs, domains)
            yield task, None


def _unasked(inputs: Sequence[str], domains: Sequence[str]) -> None:
    """Raises :class:`InputError` where a PyTorch model is asked what only a graph is."""
    if inputs or domains:
        flag = f"--input {inputs[0]!r}" if inputs else f"--domain {domains[0]!r}"
        raise InputError(f"{flag}: only ONNX files are asked for that; this is a PyTorch model")


def _measurable(why: str, steps: Recipe, only: TorchOnly) -> None:
    """Raises :class:`InputError` for a step or an argument that a graph without layers has no use
    for; ``why`` there are none."""
    for step in steps:
        if form_taken(STAGES[step.stage]) == "torch":
            raise InputError(f"step {step.name!r}: {step.stage} changes a PyTorch model, and {why}")
    for name, value in only._asdict().items():
        if value:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is for PyTorch models, and {why}")


@contextmanager
def program(why: Opaque, data: Data | None) -> Iterator[Path]:
    """The ONNX file, while the block lasts, of a trusted program that no layers come from."""
    example = data.splits.train.head(2)[0] if data else None
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        made = converted(why, Path(folder), example)
        try:
            yield made
        except InputError as error:
            raise InputError(str(error).replace(str(made), str(why.path))) from None
