"""The files of a bench as they are given, each under its name."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor import data as sources
from compressor.artifact import Artifact, digest, replacing
from compressor.data import Data
from compressor.errors import CompressorError, InputError
from compressor.loading import onnxfile, onnxtask, torchfile
from compressor.loading import task as tasks
from compressor.loading.checkpoint import inputs_like
from compressor.loading.onnxfile import Asked, OnnxFile
from compressor.loading.task import SPLIT_SEED, tensors
from compressor.loading.torchfile import state_digest
from compressor.measure.counting import vetted
from compressor.measure.environment import cores
from compressor.measure.process import Worker, WorkerFailed
from compressor.measure.threads import one_thread
from compressor.measure.turns import CONTROL
from compressor.metrics import metric_of
from compressor.pipeline.folder import key_of
from compressor.pipeline.making import watched
from compressor.pipeline.verdict import Row
from compressor.stages import STAGES
from compressor.task import Input, Kind, Task


@dataclass(frozen=True)
class Entry:
    """One file under its name in the report. ``read`` is what it says of itself: of a torch model
    the whole task. ``why`` is the reason that it cannot be measured."""

    name: str
    path: Path
    read: OnnxFile | Task | None = None
    inputs: tuple[Input, ...] = ()
    why: str | None = None


def named(paths: Sequence[Path]) -> list[str]:
    """A name for each file, no two alike: its stem, and only where two have the same one with the
    folder's name in front, or else with the suffix, or else with a number. None has the name of
    the reference's second worker.

    >>> named([Path("a/model.onnx"), Path("b/model.onnx"), Path("b/tiny.onnx")])
    ['a-model', 'b-model', 'tiny']
    """
    names = [path.stem for path in paths]
    forms: list[Callable[[Path], str]] = [
        lambda path: f"{path.resolve().parent.name}-{path.stem}",
        lambda path: path.name,
    ]
    for form in forms:
        alike = {name for name, count in Counter(names).items() if count > 1}
        others = Counter(map(form, paths))
        names = [
            form(path) if name in alike and others[form(path)] == 1 else name
            for name, path in zip(names, paths, strict=True)
        ]
    found: list[str] = []
    for at, name in enumerate(names):
        number, unique = 1, name
        while unique in (*found, CONTROL) or (unique != name and unique in names[at:]):
            number += 1
            unique = f"{name}-{number}"
        found.append(unique)
    return found


# What the files say.


def read(
    models: Sequence[str | Path],
    data: Any,
    arch: Any,
    metric: str | None,
    kind: Kind | None,
    asked: Mapping[str, Asked],
    domains: Collection[str],
    batch: Sequence[int],
    seed: int,
) -> tuple[list[Entry], Data | None]:
    """Every file, and the data that they are judged on."""
    paths = [Path(model) for model in models]
    if not paths:
        raise InputError("there is no file to measure: give one or more, the reference first")
    for path in paths:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise InputError(f"{path} {what}: give ONNX files or models")
    given = read_data(data)
    entries: list[Entry] = []
    for name, path in zip(named(paths), paths, strict=True):
        if path.suffix == onnxfile.SUFFIX:
            entry = _onnx(name, path, given, asked, domains, batch)
        else:
            entry = _torch(name, path, given, arch, metric, kind, seed)
        bare = given is None or not given.labelled
        if not entries and bare and isinstance(entry.read, Task) and entry.read.splits:
            # All are judged by what the first names, or answers where nothing has a label.
            given = Data(entry.read.data or "", entry.read.splits, entry.read.kind)
        entries.append(entry)
    known(asked, [one.name for entry in entries for one in getattr(entry.read, "slots", ())])
    fed = first(entries)
    return [entry if entry.why else _alike(entry, fed) for entry in entries], given


def read_data(data: Any) -> Data | None:
    """The data of a spec or of a live object; what was read before is that."""
    if data is None or isinstance(data, Data):
        return data
    read_ = sources.read if isinstance(data, str) else sources.adopt
    return read_(data, SPLIT_SEED)


def known(asked: Mapping[str, Asked], slots: Sequence[str]) -> None:
    for name in asked:
        if name not in slots:
            raise InputError(
                f"--input {name}: no file has such an input; known: "
                f"{', '.join(dict.fromkeys(slots)) or 'none'}"
            )


def _onnx(
    name: str,
    path: Path,
    given: Data | None,
    asked: Mapping[str, Asked],
    domains: Collection[str],
    batch: Sequence[int],
) -> Entry:
    found = None
    try:
        found = onnxfile.read(path, domains)
        like = inputs_like(given.splits.train.head(64)[0]) if given else ()
        fed = onnxfile.inputs(found, asked, like=like, batch=batch)
        vetted(path, fed)
        return Entry(name, path, found, fed)
    except InputError as error:
        return Entry(name, path, found, why=_why(path, error))


def _torch(
    name: str,
    path: Path,
    given: Data | None,
    arch: Any,
    metric: str | None,
    kind: Kind | None,
    seed: int,
) -> Entry:
    try:
        task = tasks(path, data=given, arch=arch, metric=metric, kind=kind, seed=seed)
    except InputError as error:
        return Entry(name, path, why=_why(path, error))
    return Entry(name, path, task, task.inputs)


def _why(path: Path, error: InputError) -> str:
    """The reason for a report, which names no folders of this machine."""
    return str(error).replace(str(path), path.name)


def first(entries: Sequence[Entry]) -> Entry:
    """The first file that can be fed: what all are fed with. Raises :class:`InputError`."""
    for entry in entries:
        if entry.why is None:
            return entry
    raise InputError(str(entries[0].why))


def _alike(entry: Entry, fed: Entry) -> Entry:
    """The entry, with the reason where it does not take the inputs of ``fed``."""
    both = entry.inputs, fed.inputs
    ours, theirs = ([(one.shape, one.dtype) for one in side] for side in both)
    names, others = ([one.name for one in side] for side in both)
    if ours == theirs and (names == others or set(names) != set(others)):
        return entry
    said, wanted = (
        ", ".join(f"{one.name} {Asked(one.shape, one.dtype)}" for one in side) for side in both
    )
    return replace(entry, why=f"it takes {said}; {fed.name} takes {wanted}")


def facts(entry: Entry) -> str:
    """Of all that the file computes; a torch model's code shows in what it answers alone."""
    if isinstance(entry.read, Task):
        return key_of(
            model=state_digest(entry.read.model().state_dict()), does=behaviour(entry.read)
        )
    return digest(entry.path, *(entry.read.companions if entry.read else ()))


def behaviour(task: Task) -> str:
    """A digest of what the model answers to made-up examples."""
    with one_thread(), torch.inference_mode():
        outputs = tensors(task.model()(*map(torch.from_numpy, task.examples(2))))
    return state_digest({str(at): output for at, output in enumerate(outputs)})


# What is measured.


def make(
    entries: Sequence[Entry], into: Path, say: Callable[[str], None]
) -> tuple[dict[str, Artifact], dict[str, str], list[Row]]:
    """The artifacts by name, why others are none, and what the report says of making them."""
    made: dict[str, Artifact] = {}
    skipped, stages = {}, []
    for entry in entries:
        say(entry.name)
        if entry.why:
            skipped[entry.name] = entry.why
            continue
        stage = "export" if isinstance(entry.read, Task) else "copy"
        with watched() as seen:
            try:
                made[entry.name] = (
                    _exported(entry, into) if stage == "export" else _copied(entry, into)
                )
            except CompressorError as error:
                skipped[entry.name] = str(error)
        stages.append({"stage": stage, "artifact": entry.name, "cached": False, **seen})
    return made, skipped, stages


def _exported(entry: Entry, into: Path) -> Artifact:
    assert isinstance(entry.read, Task)
    path = into / f"{entry.name}{torchfile.SUFFIX}"
    torchfile.write(path, entry.read.model(), entry.read.source)
    return STAGES["export"](Artifact.of(path, "torch"), entry.read, into / entry.name)


def _copied(entry: Entry, into: Path) -> Artifact:
    """The file under its name in the report, byte for byte: a link would follow what happens to
    the original."""
    assert isinstance(entry.read, OnnxFile)
    # A file names its external data by their place beside it: two may use the same name.
    home = into / entry.name if entry.read.companions else into
    path = home / f"{entry.name}{onnxfile.SUFFIX}"
    beside = {one: home / one.relative_to(entry.path.parent) for one in entry.read.companions}
    for old, new in {entry.path: path, **beside}.items():
        new.parent.mkdir(parents=True, exist_ok=True)
        with replacing(new) as part:
            shutil.copyfile(old, part)
    return replace(Artifact.of(path, "onnx", companions=beside.values()), name=entry.name)


class Runner(nn.Module):
    """An ONNX file that PyTorch can call; it runs on the CPU in a worker, which may die of it.

    The worker lives as long as this object, or until it fails; a copy starts its own.
    """

    def __init__(self, path: Path, batch: int) -> None:
        super().__init__()
        self.path, self.batch = path, batch
        self._worker: Worker | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Runner:
        return Runner(self.path, self.batch)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The first output for a whole number of examples, first axis the example."""
        with tempfile.TemporaryDirectory(prefix="compressor-") as name:
            paths = [f"{name}/{at}.npy" for at in range(len(inputs))]
            for path, given in zip(paths, inputs, strict=True):
                np.save(path, given.numpy())
            out = f"{name}/output.npy"
            try:
                self._started(paths).ask(
                    "predict", inputs=paths, start=0, stop=len(inputs[0]), out=out
                )
            except WorkerFailed:
                self._worker = None  # it may be gone
                raise
            return torch.from_numpy(np.load(out))

    def _started(self, inputs: list[str]) -> Worker:
        if self._worker is None:
            worker = Worker()
            weakref.finalize(self, worker.close)
            where = str(self.path.resolve())
            worker.ask("load", path=where, provider="cpu", threads=cores())
            worker.ask("take", inputs=inputs, batch=self.batch)
            self._worker = worker
        return self._worker


def judge(
    entries: Sequence[Entry],
    made: Mapping[str, Artifact],
    given: Data | None,
    metric: str | None,
    kind: Kind | None,
    batch: int,
    seed: int,
) -> Task:
    """What all are judged by, which the first that runs decides; its model is that one.

    Raises :class:`InputError` where none can take the data, or the metric is unknown.
    """
    name = ", ".join(entry.name for entry in entries)
    wrong: list[InputError] = []
    for entry in entries:
        if isinstance(entry.read, Task) and entry.name in made:
            splits, spec = (given.splits, given.name) if given else (None, None)
            return replace(entry.read, name=name, splits=splits, data=spec)
        if entry.name in made:
            runner = Runner(made[entry.name].path, batch)
            try:
                if given is None:
                    return onnxtask.unjudged(
                        name, runner, entry.inputs, metric=metric, kind=kind, seed=seed, batch=batch
                    )
                # A file that breaks is a row; only one that runs can be wrong for the data.
                runner(*map(torch.from_numpy, given.splits.train.head(batch)[0]))
                found = tasks(runner, data=given, metric=metric, kind=kind, seed=seed)
                return replace(found, name=name, inputs=entry.inputs)
            except WorkerFailed:
                continue  # its row will say why
            except InputError as error:
                wrong.append(error)
    if wrong:
        raise wrong[0]
    known = kind or "regression"
    source = {"factory": name, "arguments": {}}
    fed = first(entries).inputs
    return Task(name, known, nn.Identity, source, fed, metric_of(known, metric), seed=seed)
