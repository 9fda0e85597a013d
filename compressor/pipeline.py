"""The run: a recipe's steps turn one artifact into the next, and every one is measured."""

from __future__ import annotations

import datetime
import gzip
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor import recipe as recipes
from compressor import verdict
from compressor.artifact import Artifact, digest, replacing, write_text
from compressor.errors import CompressorError, InputError, StageError, Unsuitable, one_line
from compressor.folder import Folder, key_of
from compressor.loading import task as tasks
from compressor.loading import torchfile
from compressor.loading.checkpoint import state_digest
from compressor.measure import counting, protocol
from compressor.measure.environment import cores, environment, versions
from compressor.measure.process import Worker
from compressor.measure.protocol import SECONDS, Observed, observe
from compressor.measure.runtime import SETTINGS
from compressor.measure.worker import peak_rss_bytes
from compressor.measurement import PROVIDERS, Measurement, Target
from compressor.metrics import METRICS
from compressor.recipe import BASELINE, Recipe, Step
from compressor.report import Report
from compressor.stages import STAGES, bind, form_taken
from compressor.stages.export import export
from compressor.task import Inputs, Kind, Splits, Task

if TYPE_CHECKING:
    from torch import nn

MAX_DROP = 0.01
SYNTHETIC = 256
"""Made-up examples on which fidelity is measured where there is no data."""

Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, text: str) -> None:
    """A progress that shows nothing."""


def run(
    model: str | Path | nn.Module,
    *,
    data: Any = None,
    arch: Any = None,
    recipe: str | Path | Sequence[Step] | None = None,
    prune: float | None = None,
    keep: Sequence[str] = (),
    epochs: int | None = None,
    distill: bool = True,
    quantize: str | None = None,
    max_drop: float | None = None,
    metric: str | None = None,
    kind: Kind | None = None,
    provider: Sequence[str] = ("cpu", "cuda"),
    batch: Sequence[int] = (1,),
    threads: Sequence[int] | None = None,
    bench_time: str = "quick",
    out: str | Path | None = None,
    fresh: bool = False,
    seed: int = 0,
    command: str = "",
    progress: Progress = silent,
) -> Report:
    """Compresses ``model``, measures every artifact of the way and gives the report.

    ``model`` is a path or a live ``nn.Module`` (which is copied, never changed). ``data`` is a data
    spec, ``(train, test)`` DataLoaders, datasets or arrays, or a dict of splits. The other
    arguments are the flags of ``compressor run``; see its ``--help``. The report and all artifacts
    lie in ``out``, by default ``reports/<name>``.

    Raises :class:`InputError` before any work when an argument is wrong, :class:`StageError` when a
    stage fails (artifacts finished before it are kept and reused by the next run).
    """
    began = time.monotonic()
    targets = targets_of(provider, batch, threads)
    if bench_time not in SECONDS:
        raise InputError(f"--bench-time {bench_time!r}: choose from {', '.join(SECONDS)}")
    if max_drop is not None and not 0 <= max_drop < float("inf"):
        raise InputError(f"--max-drop {max_drop!r}: give a number of 0 or more, such as 0.01")
    steps = plan(recipe, prune=prune, keep=keep, epochs=epochs, distill=distill, quantize=quantize)
    task = tasks(model, data=data, arch=arch, metric=metric, kind=kind, seed=seed)
    state = state_digest(task.model().state_dict())
    data_digest = _data_digest(task.splits)
    fingerprint = key_of(
        model=state,
        source=task.source,
        data=data_digest,
        recipe=[step.to_json() for step in steps],
        targets=[target.to_json() for target in targets],
        bench_time=bench_time,
        max_drop=max_drop,
        metric=task.metric,
        seed=seed,
    )
    path = Path(out) if out is not None else Path("reports") / task.name
    folder, stored = Folder.open(path, fingerprint, command, fresh=fresh)
    if stored is not None:
        return replace(stored, stored=True)
    job = Job(task, folder, data_digest, progress, total=len(steps) + 2 + len(targets))
    job.note("load", None, time.monotonic() - began, None)
    job.execute(steps)
    document = {
        "schema": 1,
        "name": task.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command or f"compressor.run({task.name}, ...)",
        "fingerprint": fingerprint,
        "model": {
            "path": None if not isinstance(model, str | Path) else Path(model).name,
            "sha256": digest(Path(model)) if isinstance(model, str | Path) else state,
        },
        "recipe": [step.to_json() for step in job.resolved],
    }
    document |= job.measure(targets, SECONDS[bench_time], max_drop)
    write_text(folder.path / "recipe.toml", recipes.write(job.resolved, document["command"]))
    report = Report(document, folder.path)
    report.save()
    return report


def plan(
    recipe: str | Path | Sequence[Step] | None = None,
    *,
    prune: float | None = None,
    keep: Sequence[str] = (),
    epochs: int | None = None,
    distill: bool = True,
    quantize: str | None = None,
) -> Recipe:
    """The steps of a recipe after the flags, named and bound: what ``--dry-run`` prints."""
    if epochs is not None and epochs < 0:
        raise InputError(f"--epochs {epochs}: give 0 (no recovery) or more")
    given = recipes.read(Path(recipe)) if isinstance(recipe, str | Path) else list(recipe or ())
    edited = recipes.edited(
        given, prune=prune, keep=keep, epochs=epochs, distill=distill, quantize=quantize
    )
    return bind(recipes.named(edited))


def targets_of(
    provider: Sequence[str], batch: Sequence[int], threads: Sequence[int] | None
) -> list[Target]:
    """Every combination, the primary target first. Threads default to 1 and all cores."""
    chosen = list(dict.fromkeys(threads if threads is not None else (1, cores())))
    for name in provider:
        if name not in PROVIDERS:
            raise InputError(f"--provider {name!r} is unknown: choose from {', '.join(PROVIDERS)}")
    for flag, values in (("--batch", batch), ("--threads", chosen)):
        for value in values:
            if value < 1:
                raise InputError(f"{flag} {value}: give 1 or more")
    if not (provider and batch and chosen):
        raise InputError("--provider, --batch and --threads each need at least one value")
    found = []
    for name in dict.fromkeys(provider):
        # Threads are CPU threads: a GPU is measured with the first count only.
        counts = chosen if name == "cpu" else chosen[:1]
        found += [
            Target("onnxruntime", name, size, count)
            for size in dict.fromkeys(batch)
            for count in counts
        ]
    return found


class Job:
    """One run under way: what was made, from what, and how long it took."""

    def __init__(
        self, task: Task, folder: Folder, data_digest: str, progress: Progress, total: int
    ) -> None:
        self.task = task
        self.folder = folder
        self.progress = progress
        self.done, self.total = 0, total
        self.torch: dict[str, Artifact] = {}
        self.onnx: dict[str, Artifact] = {}
        self.skipped: dict[str, str] = {}
        self.instead: dict[str, str] = {}
        self.resolved: list[Step] = []
        self.stages: list[dict[str, Any]] = []
        self.warnings: list[str] = list(task.notes)
        self._common = {"data": data_digest, "seed": task.seed, "versions": versions()}

    def note(
        self, stage: str, artifact: str | None, seconds: float, peak: int | None, **facts: Any
    ) -> None:
        """Adds a line to the report's ``stages``."""
        line = {"stage": stage, "artifact": artifact, "seconds": round(seconds, 3)}
        self.stages.append({**line, "peak_rss_bytes": peak, "cached": False, **facts})

    def step(self, text: str) -> None:
        """One unit of the progress is done; ``text`` says what comes next."""
        self.progress(self.done, self.total, text)
        self.done += 1

    def execute(self, steps: Recipe) -> None:
        """Writes the baseline, then runs the steps in order; each result is exported."""
        self.step("baseline: export")
        baseline = self.folder.artifacts / f"{BASELINE}{torchfile.SUFFIX}"
        torchfile.write(baseline, self.task.model(), self.task.source)
        self.torch[BASELINE] = Artifact.of(baseline, "torch")
        self._export(BASELINE)
        if self.task.splits is None:
            self.warnings.append(
                "no data: nothing was fine-tuned and no accuracy was measured; fidelity is on "
                "made-up inputs (add --data SPEC)"
            )
        for step in steps:
            self.step(f"{step.name}: {step.stage}")
            self._run(step)

    def _run(self, step: Step) -> None:
        stage = STAGES[step.stage]
        form = form_taken(stage)
        source = step.source
        if source in self.skipped and form == "onnx":
            # What is quantized is the last float model: where a cut or its recovery had nothing
            # to do, that is the one before it.
            source = self.instead[source]
        if source in self.skipped:
            self._skip(step, f"{source} was skipped")
            return
        held = self.torch if form == "torch" else self.onnx
        if source not in held:
            raise StageError(
                f"step {step.name!r}: {step.stage} takes a {form} model, and {source!r} is not one"
            )
        made = self._make(step, held[source], stage)
        if made is None:
            return
        settings = {**step.settings, **made.steps[-1]["settings"]}
        self.resolved.append(replace(step, settings=settings))
        (self.torch if made.form == "torch" else self.onnx)[step.name] = made
        if made.form == "torch":
            self._export(step.name)

    def _skip(self, step: Step, reason: str) -> None:
        self.skipped[step.name] = reason
        self.instead[step.name] = self.instead.get(step.source, step.source)
        self.resolved.append(step)
        self.warnings.append(f"{step.name} was skipped: {reason}")

    def _export(self, name: str) -> None:
        step = Step("export", {}, name, name)
        self.onnx[name] = self._make(step, self.torch[name], export)  # type: ignore[assignment]

    def _make(
        self, step: Step, source: Artifact, stage: Callable[..., Artifact]
    ) -> Artifact | None:
        """Runs one stage, or takes what an earlier run of the same stage left."""
        slot = f"{step.name}:{step.stage}"
        key = key_of(source=source.digest, stage=step.stage, settings=step.settings, **self._common)
        ready = self.folder.finished(slot, key)
        if ready is not None:
            artifact, record = ready
            facts = {"cached": True, "skipped": record.get("skipped")}
            self.note(step.stage, step.name, record["seconds"], record["peak_rss_bytes"], **facts)
            if artifact is None:
                self._skip(step, str(record["skipped"]))
            return artifact
        into, reason, made = self.folder.artifacts / step.name, None, None
        with watched() as seen:
            try:
                made = stage(source, self.task, into, **step.settings)
            except Unsuitable as error:
                reason = str(error)
            except CompressorError:
                raise
            except Exception as error:
                raise StageError(
                    f"step {step.name!r}: {step.stage} failed: {type(error).__name__}: "
                    f"{one_line(error)}"
                ) from error
        source.checked()
        self.note(step.stage, step.name, seen.seconds, seen.peak, skipped=reason)
        self.folder.remember(
            slot, key, made, seconds=seen.seconds, peak_rss_bytes=seen.peak, skipped=reason
        )
        if reason is not None:
            self._skip(step, reason)
        return made

    def measure(
        self, targets: Sequence[Target], seconds: float, max_drop: float | None
    ) -> dict[str, Any]:
        """Everything of the report that comes from measuring."""
        present, load = providers(), environment()["load"]
        artifacts = list(self.onnx.values())
        judge_on = "test" if self.task.splits else "synthetic"
        rows: list[dict[str, Any]] = []
        raw: list[Measurement] = []
        outputs: dict[str, dict[str, dict[str, Any]]] = {}
        floors: dict[Target, tuple[float, int]] = {}
        for target in targets:
            self.step(f"measure on {target}")
            primary = target == targets[0]
            with watched() as seen:
                observed = self._observe(artifacts, target, present, outputs, seconds)
            self.note("measure", None, seen.seconds, seen.peak, target=str(target))
            raw += observed.measurements
            found = verdict.rows(observed, target, self.task, primary)
            floor = _floor(observed)
            if floor is not None:
                floors[target] = floor
            for row in found:
                if "skipped" not in row:
                    row["accuracy"], row["fidelity"] = self._judged(
                        outputs[target.provider], row["artifact"], judge_on
                    )
            rows += found
            rows += [
                {"artifact": name, **target.to_json(), "primary": primary, "skipped": why}
                for name, why in self.skipped.items()
            ]
        self.step("report")
        return self._document(
            targets, rows, raw, outputs.get(targets[0].provider, {}), judge_on, max_drop
        ) | {
            "environment": {
                **environment(),
                "load": load,
                "providers": present,
                "threads": {"spinning": SETTINGS["session.intra_op.allow_spinning"] == "1"},
                "noise_floor": _floor_json(floors.get(targets[0])),
            }
        }

    def _observe(
        self,
        artifacts: Sequence[Artifact],
        target: Target,
        present: Sequence[str],
        outputs: dict[str, Any],
        seconds: float,
    ) -> Observed:
        """Measures one target; outputs are taken on the first target of each provider."""
        wanted = PROVIDERS[target.provider]
        if wanted not in present:
            reason = f"onnxruntime here has no {wanted}"
            observed = Observed()
            for artifact in artifacts:
                protocol.skip(observed, artifact.name, target, reason)
            return observed
        predict: dict[str, Inputs] = {}
        if target.provider not in outputs:
            predict = self._splits()
        observed = observe(
            [artifact.checked() for artifact in artifacts],
            target,
            self._feed(target.batch),
            predict=predict,
            seconds=seconds,
            seed=self.task.seed,
            progress=lambda text: self.progress(self.done - 1, self.total, text),
        )
        if predict:
            outputs[target.provider] = observed.outputs
        return observed

    def _feed(self, batch: int) -> Inputs:
        if self.task.splits is None:
            return self.task.examples(batch)
        return self.task.splits.calibrate.head(batch)[0]

    def _splits(self) -> dict[str, Inputs]:
        """The inputs on which outputs are wanted: whole splits, or made-up examples."""
        if self.task.splits is None:
            return {"synthetic": self.task.examples(SYNTHETIC)}
        whole = {}
        for name in ("validate", "test"):
            parts = zip(
                *(inputs for inputs, _ in getattr(self.task.splits, name).batches(4096)),
                strict=True,
            )
            whole[name] = tuple(np.concatenate(part) for part in parts)
        return whole

    def _judged(self, outputs: Any, name: str, split: str) -> tuple[Any, Any]:
        accuracy, fidelity = verdict.accuracy_and_fidelity(self.task, outputs, name, split)
        if "skipped" in accuracy:
            return None, fidelity
        return {key: value for key, value in accuracy.items() if key != "drop"}, fidelity

    def _document(
        self,
        targets: Sequence[Target],
        rows: list[dict[str, Any]],
        raw: Sequence[Measurement],
        outputs: dict[str, dict[str, Any]],
        judge_on: str,
        max_drop: float | None,
    ) -> dict[str, Any]:
        task, budget = self.task, MAX_DROP if max_drop is None else max_drop
        fields = {
            name: verdict.accuracy_and_fidelity(task, outputs, name, judge_on) for name in self.onnx
        }
        tested = {name: accuracy for name, (accuracy, _) in fields.items()}
        validated = {
            name: verdict.accuracy_and_fidelity(task, outputs, name, "validate")[0]
            for name in self.onnx
            if task.splits is not None
        }
        choice = verdict.choose(
            task,
            list(self.onnx),
            [row for row in rows if row["primary"]],
            validated,
            tested,
            budget,
        )
        if not choice.held and self.onnx.keys() != {BASELINE}:
            self.warnings.append(
                f"the budget of {budget:g} is not met by anything but the baseline"
            )
        self._write_best(choice.best, targets[0])
        allowed = [name for name in self.onnx if _within(validated.get(name), budget)] or [BASELINE]
        samples = self._write_samples(raw)
        how = METRICS[task.kind][task.metric]
        return {
            "task": {
                "name": task.name,
                "kind": task.kind,
                "data": task.data,
                "splits": task.splits.sizes() if task.splits else None,
                "metric": task.metric,
                "higher_is_better": how.higher_is_better,
            },
            "artifacts": [
                self._row(name, choice.best, *fields[name], budget) for name in self.onnx
            ],
            "measurements": rows,
            "best_per_target": [
                {**target.to_json(), "artifact": found}
                for target in targets
                if (found := verdict.best_on(_on(rows, target), allowed))
            ],
            "primary": targets[0].to_json(),
            "max_drop": budget,
            "budget_held": choice.held,
            "recommendation": choice.sentence,
            "warnings": self.warnings,
            "stages": self.stages,
            "samples": samples,
            "finished": True,
        }

    def _row(
        self, name: str, best: str, accuracy: Any, fidelity: Any, budget: float
    ) -> dict[str, Any]:
        """One entry of the report's ``artifacts``."""
        artifact = self.onnx[name]
        params, macs = self._counts(name)
        lost = accuracy.get("drop")
        return {
            "name": name,
            "path": self._relative(artifact.path),
            "sha256": artifact.digest,
            "form": artifact.form,
            "source": self._relative(artifact.source) if artifact.source else None,
            "steps": list(artifact.steps),
            "size_bytes": artifact.size_bytes,
            "params": params,
            "macs": macs,
            "best": name == best,
            "within_budget": None if lost is None else lost["value"] <= budget,
            "proven": None if lost is None else lost["high"] <= budget,
            "accuracy": accuracy,
            "fidelity": fidelity,
        }

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder.path).as_posix()

    def _counts(self, name: str) -> tuple[int, int]:
        """Parameters and MACs of the torch model that the artifact is, or was quantized from."""
        made_from = {step.name: step.source for step in self.resolved}
        while name not in self.torch:
            name = self.instead.get(made_from[name], made_from[name])
        model, _ = torchfile.open_model(self.torch[name], self.task)
        return counting.params(model), counting.macs(model, self.task.examples(1))

    def _write_best(self, best: str, primary: Target) -> None:
        path = self.folder.path / "best.onnx"
        with replacing(path) as beside:
            shutil.copyfile(self.onnx[best].path, beside)
        said = {
            "artifact": best,
            "sha256": self.onnx[best].digest,
            "provider": primary.provider,
            "threads": primary.threads,
            "settings": SETTINGS,
        }
        write_text(path.with_suffix(".json"), json.dumps(said, indent=1) + "\n")

    def _write_samples(self, raw: Sequence[Measurement]) -> str:
        """Raw values of everything that was measured, beside the report."""
        name = "samples.json.gz"
        lines = [
            {
                "artifact": one.artifact,
                **one.target.to_json(),
                "quantity": one.quantity,
                "unit": one.unit,
                "warmup": one.warmup,
                "values": one.values,
                "skipped": one.skipped,
            }
            for one in raw
        ]
        with replacing(self.folder.path / name) as beside:
            beside.write_bytes(gzip.compress(json.dumps(lines).encode(), mtime=0))
        return name


class Seen:
    """Seconds and peak resident bytes of a block; ``peak`` is ``None`` where not known."""

    seconds: float = 0.0
    peak: int | None = None


@contextmanager
def watched() -> Iterator[Seen]:
    """Times a block and reads the kernel's memory high-water mark for it."""
    seen, began, reset = Seen(), time.monotonic(), _reset_peak()
    try:
        yield seen
    finally:
        seen.seconds = round(time.monotonic() - began, 3)
        seen.peak = peak_rss_bytes() if reset else None


def _reset_peak() -> bool:
    """Sets the high-water mark of this process back; false where the system cannot (not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def providers() -> list[str]:
    """Execution providers of the onnxruntime that workers use, asked in a fresh process."""
    with Worker() as worker:
        return list(worker.ask("providers")["providers"])


def _data_digest(splits: Splits | None) -> str:
    if splits is None:
        return ""
    parts = (splits.train, splits.validate, splits.calibrate, splits.test)
    return key_of(parts=[part.digest() for part in parts])


def _floor(observed: Observed) -> tuple[float, int] | None:
    by_artifact: dict[str, dict[str, Measurement]] = {}
    for one in observed.measurements:
        by_artifact.setdefault(one.artifact, {})[one.quantity] = one
    value = verdict.floor_of(by_artifact)
    if value is None:
        return None
    return value, len(by_artifact[protocol.CONTROL]["latency_ms"].values)


def _floor_json(floor: tuple[float, int] | None) -> dict[str, Any] | None:
    return None if floor is None else {"value": floor[0], "n": floor[1]}


def _within(accuracy: dict[str, Any] | None, budget: float) -> bool:
    lost = (accuracy or {}).get("drop")
    return lost is not None and lost["value"] <= budget


def _on(rows: Sequence[dict[str, Any]], target: Target) -> list[dict[str, Any]]:
    return [
        row for row in rows if all(row[key] == value for key, value in target.to_json().items())
    ]
