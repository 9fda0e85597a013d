"""From steps to artifacts: each stage runs once, and what an earlier run finished is reused."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.artifact import Artifact, Onnx, copy
from compressor.errors import CompressorError, InputError, StageError, Unsuitable, one_line
from compressor.interrupt import heard
from compressor.loading import torchfile
from compressor.measure.environment import cpu, versions
from compressor.measure.worker import peak_rss_bytes
from compressor.pipeline.folder import Folder, key_of
from compressor.recipe import BASELINE, Recipe, Step
from compressor.stages import STAGES, form_taken, perform
from compressor.stages.export import IMPORT, SUFFIX
from compressor.task import Task
from compressor.training.world import ALONE, Lost, World, staged

NO_DATA = (
    "no data: nothing was fine-tuned and no accuracy was measured; fidelity is on made-up inputs "
    "(add --data SPEC)"
)

NOTHING = {"seconds": 0.0, "peak_rss_bytes": None, "cached": False}


class Maker:
    """Runs the steps of a recipe for one task, in one folder.

    ``original`` is the model where it is an ONNX file: the baseline is a copy of it then, and there
    are no torch artifacts.
    ``torch`` and ``onnx`` hold what was made, by name; ``skipped`` why a step made nothing, and
    ``failed`` those of them that should have; ``missed`` the targets that were out of reach;
    ``resolved`` the steps with the settings that they really used; ``stages`` and ``warnings`` what
    the report says of it all. ``say`` is called with what begins.
    """

    def __init__(
        self,
        task: Task,
        folder: Folder,
        reads: str,
        say: Callable[[str], None],
        around: World = ALONE,
        original: Artifact | None = None,
    ) -> None:
        self.around = around
        self.original = original
        self.folder = folder
        self.say = say
        self.torch: dict[str, Artifact] = {}
        self.onnx: dict[str, Artifact] = {}
        self.skipped: dict[str, str] = {}
        self.failed: list[str] = []
        self.missed: list[str] = []
        self.resolved: list[Step] = []
        self.stages: list[dict[str, Any]] = []
        self.warnings: list[str] = [*([] if task.splits else [NO_DATA]), *task.notes]
        self._common = {
            "reads": reads,
            "seed": task.seed,
            "target": task.target.to_json(),
            "budget": task.budget,
            "limited": task.until is not None,  # what a search finds then is not for later runs
            "versions": versions(),
            "cpu": cpu()["features"],  # they decide how int8 is made
        }
        self.task = replace(task, reads=key_of(**self._common))

    def execute(self, steps: Recipe) -> None:
        """Writes the baseline, then runs the steps in order; torch results are exported as well.

        A step that fails and that no other starts from is a row with the reason. Otherwise raises
        :class:`StageError`; what was made before it stays remembered.
        """
        if self.original is None:
            self.say(f"{BASELINE}: export")
            baseline = self.folder.artifacts / f"{BASELINE}{torchfile.SUFFIX}"
            torchfile.write(baseline, self.task.model(), self.task.source)
            self.torch[BASELINE] = Artifact.of(baseline, "torch")
            self._export(BASELINE)
        else:
            self.say(f"{BASELINE}: {IMPORT}")
            copied = self._make(Step(IMPORT, {}, BASELINE, BASELINE), self.original)
            assert copied is not None
            self.onnx[BASELINE] = copied
            for record in copied.steps:
                said = "; ".join(record["facts"]["changes"])
                self.warnings.append(f"{BASELINE} is not the file byte for byte: {said}")
        sources = {step.source for step in steps}
        for step in steps:
            self.say(f"{step.name}: {step.stage}")
            try:
                self._run(step)
            except StageError as error:
                if step.name in sources or isinstance(error, Lost):
                    raise
                self._fail(step, str(error))

    def float_of(self, name: str) -> Artifact:
        """The torch artifact that ``name`` is, or was exported or quantized from.

        Raises :class:`InputError` where that is an ONNX file.
        """
        if self.original is not None:
            raise InputError(f"{self.task.name} was given as ONNX, which has no gradients")
        while name not in self.torch:
            name = self._origin(name)
        return self.torch[name]

    def _origin(self, name: str) -> str:
        """What ``name`` was made from: the first in its line that was not skipped."""
        source = next(step.source for step in self.resolved if step.name == name)
        return self._origin(source) if source in self.skipped else source

    def _run(self, step: Step) -> None:
        form = form_taken(STAGES[step.stage])
        source = step.source
        if source in self.skipped:
            if form == "torch":
                reason = f"{source} was skipped"
                self.stages.append(
                    {**NOTHING, "stage": step.stage, "artifact": step.name, "skipped": reason}
                )
                self._skip(step, reason)
                return
            # What is quantized is the last float model: where a cut or its recovery had nothing
            # to do, that is the one before it.
            source = self._origin(source)
        held = self.torch if form == "torch" else self.onnx
        made = self._make(step, held[source])
        if made is None:
            return
        self.resolved.append(replace(step, settings=made.steps[-1]["settings"]))
        facts = made.steps[-1].get("facts", {})
        if note := facts.get("note"):
            self.warnings.append(f"{step.name}: {note}")
        if unreached := facts.get("unreached"):
            self.missed.append(f"{step.name}: {unreached}")
            self.warnings.append(self.missed[-1])
        (self.torch if made.form == "torch" else self.onnx)[step.name] = made
        if made.form == "torch":
            self._export(step.name)

    def _fail(self, step: Step, reason: str) -> None:
        self.failed.append(step.name)
        self.warnings.append(reason)
        self.torch.pop(step.name, None)  # made, but not exported
        self._skip(step, reason)

    def _skip(self, step: Step, reason: str) -> None:
        self.skipped[step.name] = reason
        self.resolved.append(step)

    def _export(self, name: str) -> None:
        made = self._make(Step("export", {}, name, name), self.torch[name])
        assert made is not None
        self.onnx[name] = made

    def _make(self, step: Step, source: Artifact) -> Artifact | None:
        """Runs one stage, or takes what an earlier run of the same stage left.

        ``None`` when the stage has nothing to do on this model.
        """
        slot = f"{step.name}:{step.stage}"
        key = key_of(source=source.digest, stage=step.stage, settings=step.settings, **self._common)
        ready = self.folder.finished(slot, key)
        made, seen = ready or self._made(step, source)
        if ready is None:
            self.folder.remember(slot, key, made, seen)
        self.stages.append(
            {"stage": step.stage, "artifact": step.name, "cached": ready is not None, **seen}
        )
        if made is None:
            self._skip(step, seen["skipped"])
        return made

    def _performed(self, step: Step, source: Artifact, into: Path) -> Artifact:
        """The stage's work, with the other processes of the run where it trains."""
        if step.stage == IMPORT:
            return taken(source, into)
        if step.stage not in SHARED or self.around.size == 1:
            return perform(STAGES[step.stage], source, self.task, into, **step.settings)
        self.around.told((step, source))
        with staged(self.around, step.name):
            return perform(STAGES[step.stage], source, self.task, into, **step.settings)

    def _made(self, step: Step, source: Artifact) -> tuple[Artifact | None, dict[str, Any]]:
        made = reason = None
        before = _changed(self.folder.artifacts / f"{step.name}.onnx")
        with watched() as seen:
            try:
                into = self.folder.artifacts / step.name
                with heard():
                    made = self._performed(step, source, into)
            except Unsuitable as error:
                reason = str(error)
            except KeyboardInterrupt:
                best = self.folder.artifacts / f"{step.name}.onnx"
                if step.stage == "quantize" and _changed(best) != before:
                    raise KeyboardInterrupt(f"the best of {step.name} so far is {best}") from None
                raise
            except (InputError, Lost):
                raise
            except CompressorError as error:
                raise StageError(f"step {step.name!r}: {error}") from error
            except Exception as error:
                raise StageError(
                    f"step {step.name!r}: {step.stage} failed: {type(error).__name__}: "
                    f"{one_line(error)}"
                ) from error
        source.checked()
        return made, {**seen, "skipped": reason}


def taken(given: Onnx, into: Path) -> Onnx:
    """The ONNX file that was given, byte for byte, with the files that belong to it."""
    path = into.with_name(into.name + SUFFIX)
    copy(given, path)
    companions = [path.with_name(beside.name) for beside in given.companions]
    return Artifact.of(path, "onnx", companions=companions, steps=given.steps)


SHARED = ("distill", "sparsify", "qat")
"""Stages that several processes do together: those that train a whole model."""


def follow(task: Task, around: World) -> Any:
    """What all processes but the leader do: their part of every stage that trains.

    Ends with what the leader hands out at the end. What a stage writes here is thrown away.
    """
    while isinstance(order := around.told(None), tuple):
        step, source = order
        with tempfile.TemporaryDirectory(prefix="compressor-follow-") as scratch:
            try:
                with staged(around, step.name):
                    into = Path(scratch) / step.name
                    perform(STAGES[step.stage], source, task, into, **step.settings)
            except Lost:
                raise
            except Exception:
                continue  # the leader met the same, and says so
    if not order:
        raise StageError("the first process of this run stopped: its own messages say why")
    return order


def _changed(path: Path) -> int | None:
    """When a file was last written; ``None`` where there is none."""
    return path.stat().st_mtime_ns if path.is_file() else None


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Fills in ``seconds`` and ``peak_rss_bytes`` of the block, as the kernel counted them.

    The peak is of this process, ``None`` where the high-water mark cannot be set back (not Linux).
    """
    seen: dict[str, Any] = {"seconds": 0.0, "peak_rss_bytes": None}
    began = time.monotonic()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        reset = True
    except OSError:
        reset = False
    try:
        yield seen
    finally:
        seen["seconds"] = round(time.monotonic() - began, 3)
        seen["peak_rss_bytes"] = peak_rss_bytes() if reset else None
