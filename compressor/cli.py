"""The command line: thin commands that build a recipe and hand it on.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from compressor import __version__, guard
from compressor.errors import BudgetError, CompressorError, InputError, StageError, one_line
from compressor.interrupt import listening
from compressor.measurement import PLACES
from compressor.recipe import LOGS, QUANTIZE

if TYPE_CHECKING:
    from compressor.pipeline import Progress
    from compressor.report import Report

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make a trained PyTorch model smaller and faster, and know what it cost.",
)

INTERRUPTED = 130

# Flags of several commands: each is declared once.

Arch = Annotated[
    str | None, typer.Option(help="PKG.MOD:FACTORY or ./file.py:factory that builds the model")
]
Provider = Annotated[
    str | None,
    typer.Option(
        help=f"where to measure, first is primary: {', '.join(PLACES)} (default: cpu, cuda, and "
        "openvino where it is installed; with more time torch)"
    ),
]
Batch = Annotated[str, typer.Option(help="batch sizes to measure")]
Threads = Annotated[
    str | None, typer.Option(help="thread counts to measure (default: 1 and all cores)")
]
BenchTime = Annotated[str, typer.Option(help="quick | normal | full")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="NAME=SHAPE[:DTYPE[<HIGH]] of an ONNX input with open axes, such as ids=128:int64, "
        "without the batch (repeatable)",
    ),
]
Domains = Annotated[
    list[str] | None,
    typer.Option(
        "--domain",
        help="operators of this domain are allowed in ONNX files; your onnxruntime must have them "
        "(repeatable)",
    ),
]
TrustPickle = Annotated[
    bool,
    typer.Option("--trust-pickle", help="let a pickled MODEL execute the code that it carries"),
]
Weights = Annotated[
    str | None, typer.Option(help="key of a checkpoint's weights, such as ema (default: its own)")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="start over in a folder in use")]
Debug = Annotated[bool, typer.Option("--debug", help="tracebacks")]


@app.command()
def run(
    model: Annotated[
        str,
        typer.Argument(
            help="model.pt, weights with --arch, .safetensors, .pt2, .onnx, a folder, timm:NAME"
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, mnist:DIR, images:DIR, table:FILE.csv?target=COLUMN, arrays:FILE.npz, "
            "PKG.MOD:FUNCTION, ./file.py:function"
        ),
    ] = None,
    arch: Arch = None,
    recipe: Annotated[Path | None, typer.Option(help="steps from a TOML file")] = None,
    prune: Annotated[
        str | None,
        typer.Option(
            help="fraction of each layer's channels to remove, such as 0.5; or macs=R, params=R, "
            "size=R, latency=R: the fraction to keep"
        ),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="layers that are not pruned (pattern, repeatable)")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="epochs of recovery; 0 skips it")] = None,
    distill: Annotated[
        bool | None,
        typer.Option(
            "--distill/--no-distill",
            help="recover with the original as teacher, or on labels alone (default: on labels "
            "where all examples have one)",
        ),
    ] = None,
    quantize: Annotated[str | None, typer.Option(help=" | ".join(QUANTIZE))] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="a model to learn from instead of MODEL (repeatable: their mean)"),
    ] = None,
    teacher_arch: Annotated[
        str | None, typer.Option(help="as --arch, for teachers that are weights only")
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(help="PKG.MOD:FACTORY of another architecture that learns from MODEL"),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="what recovery minimises: kd, dkd, dist, hint, attention, mse, labels, "
            "PKG.MOD:FUNCTION, or several: labels=0.3,hint=0.7"
        ),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(
            help="such as flip,crop=4: flip, crop, rotate, color, noise, erase, randaugment, "
            "augmix, PKG.MOD:FUNCTION"
        ),
    ] = None,
    folds: Annotated[
        int | None, typer.Option(help="cross-validate the recovery in so many parts")
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE, a further setting of the recovery (repeatable)"),
    ] = None,
    log: Annotated[
        list[str] | None,
        typer.Option(help=f"of training (repeatable): {', '.join(LOGS)}"),
    ] = None,
    weights: Weights = None,
    trust_pickle: TrustPickle = False,
    inputs: Inputs = None,
    domains: Domains = None,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="judge under noise, blur and attacks, too")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(help="fail unless torchrun started so many")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="budget: accuracy that may be lost (default 0.01)")
    ] = None,
    time_budget: Annotated[
        float | None,
        typer.Option(help="seconds after which searches end with the best that they have"),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="the metric that the budget uses, or PKG.MOD:FUNCTION")
    ] = None,
    provider: Provider = None,
    batch: Batch = "1",
    threads: Threads = None,
    bench_time: BenchTime = "quick",
    out: Annotated[Path | None, typer.Option(help="folder (default reports/MODEL)")] = None,
    fresh: Fresh = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the steps and stop")] = False,
    seed: Annotated[int, typer.Option(help="of splits, training and sampling")] = 0,
    debug: Debug = False,
) -> None:
    """Prune, recover, quantize, export and measure a model; write the report."""
    with guarded(debug):
        _ahead(model, trust_pickle or dry_run)
        flags: dict[str, Any] = {
            "recipe": recipe,
            "prune": prune,
            "keep": keep or (),
            "epochs": epochs,
            "distill": distill,
            "quantize": quantize,
        }
        from compressor import pipeline
        from compressor import recipe as recipes

        settings = recipes.training(train or ())
        if dry_run:
            own: dict[str, Any] = {}
            asked = pipeline.own.training(loss, augment or (), folds, settings, own)
            planned = pipeline.plan(**flags, student=student, train=asked)
            print(recipes.write(planned, _command()), end="")
            return
        with progress() as shown:
            report = pipeline.run(
                model,
                data=data,
                arch=arch,
                **flags,
                teacher=teacher or (),
                teacher_arch=teacher_arch,
                student=student,
                loss=loss,
                augment=augment or (),
                folds=folds,
                train=settings,
                log=log or (),
                weights=weights,
                trust_pickle=trust_pickle,
                inputs=inputs or (),
                domains=domains or (),
                robustness=robustness,
                processes=processes,
                max_drop=max_drop,
                time_budget=time_budget,
                metric=metric,
                provider=provider,
                batch=_whole("--batch", batch),
                threads=None if threads is None else _whole("--threads", threads),
                bench_time=bench_time,
                out=out,
                fresh=fresh,
                seed=seed,
                command=_command(),
                progress=shown,
            )
        if int(os.environ.get("RANK", "0")):
            return  # the first process of several has said it
        _show(report)
        if missed := report.document.get("missed"):
            raise BudgetError(f"--prune: out of reach: {'; '.join(missed)}")
        if max_drop is not None and not report.document["budget_held"]:
            raise BudgetError(f"--max-drop {max_drop:g}: {report.document['recommendation']}")


@app.command()
def bench(
    models: Annotated[
        list[str], typer.Argument(help="ONNX files or models; the first is the reference")
    ],
    data: Annotated[
        str | None, typer.Option(help="as for run; without it, what the first file names")
    ] = None,
    arch: Arch = None,
    inputs: Inputs = None,
    domains: Domains = None,
    metric: Annotated[str | None, typer.Option(help="the metric to judge by")] = None,
    provider: Provider = None,
    batch: Batch = "1",
    threads: Threads = None,
    bench_time: BenchTime = "quick",
    out: Annotated[Path | None, typer.Option(help="folder (default reports/bench)")] = None,
    fresh: Fresh = False,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    debug: Debug = False,
) -> None:
    """Measure files side by side; the first is the reference."""
    with guarded(debug):
        from compressor.pipeline.bench import bench as measured

        with progress() as shown:
            report = measured(
                models,
                data=data,
                arch=arch,
                metric=metric,
                inputs=inputs or (),
                domains=domains or (),
                provider=provider,
                batch=_whole("--batch", batch),
                threads=None if threads is None else _whole("--threads", threads),
                bench_time=bench_time,
                out=out,
                fresh=fresh,
                seed=seed,
                command=_command(),
                progress=shown,
            )
        _show(report)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="run folder, report.json or a benchmark's JSON")],
    new: Annotated[Path, typer.Argument(help="the same, of what is to be judged")],
    fail_on: Annotated[
        str | None,
        typer.Option(help="limits, such as latency=5%,accuracy=0.005,size=1%,memory=10%"),
    ] = None,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="time both again, by turns: only that judges time")
    ] = False,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="NAME=SHAPE[:DTYPE[<HIGH]] for --remeasure, as for bench (default: as before)",
        ),
    ] = None,
    bench_time: BenchTime = "quick",
    seed: Annotated[int, typer.Option(help="of inputs and sampling")] = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="the table for a page")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the same as JSON")] = False,
    debug: Debug = False,
) -> None:
    """The gate: fail where NEW is worse than OLD by more than the limits."""
    with guarded(debug):
        from compressor.measure.protocol import PROCESSES, SECONDS, check
        from compressor.report import gate

        allowed = gate.limits(fail_on, remeasure=remeasure)
        check(bench_time, seed)
        if inputs and not remeasure:
            raise InputError(f"--input {inputs[0]!r}: nothing is fed without --remeasure: add it")
        before, after = gate.read(old), gate.read(new)
        # Refuses what cannot be compared before anything is timed.
        found = gate.compare(before.document, after.document, allowed)
        if remeasure:
            from compressor.pipeline.remeasure import remeasure as again

            with progress() as shown:
                timed = again(
                    before,
                    after,
                    allowed["latency"].value,
                    inputs=inputs or (),
                    seconds=SECONDS[bench_time],
                    seed=seed,
                    processes=PROCESSES[bench_time],
                    progress=lambda text: shown(0, 1, text),
                )
            found = gate.compare(before.document, after.document, allowed, timed)
        if as_json:
            print(json.dumps(found.to_json(), indent=1))
        else:
            print(found.table(markdown=markdown))
        found.check()


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="a zoo model; see the README")] = "cnn",
    data: Annotated[str | None, typer.Option(help="such as digits or mnist:DIR")] = None,
    epochs: Annotated[int | None, typer.Option(help="default: what the model needs")] = None,
    out: Annotated[Path, typer.Option(help="the file to write")] = Path("model.pt"),
    seed: Annotated[int, typer.Option()] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="train again over an old file")] = False,
    debug: Debug = False,
) -> None:
    """Train a zoo model on real data and write a model.pt that describes itself."""
    with guarded(debug):
        from compressor import demo as training
        from compressor.training.logs import line

        with progress() as shown:
            trained = training.demo(
                model,
                data=data,
                epochs=epochs,
                out=out,
                seed=seed,
                fresh=fresh,
                shown=lambda facts, of, seconds: shown(
                    int(facts["epoch"]), of, f"training {model}: {line(facts, of, seconds)}"
                ),
            )
        if trained.existed:
            _say(f"{trained.path} was trained by this very command; --fresh trains it again")
        print(
            f"{trained.path}: {model}, {trained.metric} {trained.value:.4f} "
            f"on {trained.examples} test examples"
        )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="model.pt, weights with --arch, or .safetensors")],
    data: Annotated[
        str | None, typer.Option(help="as for run; without it, what the file names")
    ] = None,
    arch: Arch = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="what zeroing a part of each group alone costs")
    ] = False,
    attention: Annotated[str, typer.Option(help="what is cut: heads | dimensions")] = "heads",
    weights: Weights = None,
    trust_pickle: TrustPickle = False,
    as_json: Annotated[bool, typer.Option("--json", help="the same as JSON")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="folder of the curves (default reports/MODEL-sensitivity)"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Say what a model is, what can be pruned and quantized, and (--sensitivity) what hurts."""
    with guarded(debug):
        _ahead(model, trust_pickle)
        from compressor import inspection

        with progress() as shown:
            found = inspection.inspect(
                model,
                data=data,
                arch=arch,
                attention=attention,  # type: ignore[arg-type]  # it says what it takes
                sensitivity=sensitivity,
                weights=weights,
                trust_pickle=trust_pickle,
                out=out,
                progress=shown,
            )
        print(json.dumps(found.document, indent=1) if as_json else found)
        if found.curves:
            _say(f"wrote {inspection.CURVES} and {inspection.PLOT} in {found.curves.parent}")


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="run folders or report.json files; several are compared")
    ],
    out: Annotated[
        Path | None, typer.Option(help="FILE.md for a comparison; its picture lies beside it")
    ] = None,
    debug: Debug = False,
) -> None:
    """Render a report again from report.json, or put several runs into one comparison."""
    with guarded(debug):
        from compressor.report import FILE, Report

        found = [Report.read(folder) for folder in folders]
        if len(found) == 1:
            if out is not None:
                raise InputError(f"--out {out}: a comparison needs several reports: name another")
            if not folders[0].is_dir() and folders[0].name != FILE:
                raise InputError(
                    f"{folders[0]} would be rendered over the {FILE} and the pictures beside it: "
                    f"copy it into a folder of its own, as {FILE}"
                )
            found[0].save()
            print(found[0])
            return
        from compressor.report.several import several

        runs = several(found)
        if out is not None:
            runs.write(out)
        print(runs)


@app.command()
def doctor() -> None:
    """Print versions, the CPU features that decide int8 speed, runtimes and providers."""
    with guarded(False):
        from compressor.measure.environment import absent, environment
        from compressor.measure.process import Worker
        from compressor.measurement import PROVIDERS, Target

        facts = environment()
        cpu = facts["cpu"]
        for name, version in facts["versions"].items():
            print(f"{name:14} {version}")
        print(f"{'cpu':14} {cpu['model']}, {cpu['cores']} cores")
        print(f"{'features':14} {' '.join(cpu['features']) or 'none of those that matter'}")
        held = [name for name, holds in guard.holding().items() if holds]
        print(f"{'guard':14} files are read with limits on {', '.join(held) or 'time alone'}")
        with Worker() as worker:
            present = worker.ask("providers")["providers"]
        for name, (runtime, provider) in PLACES.items():
            why = absent(Target(runtime, provider), present)
            what = PROVIDERS[provider] if runtime == Target.runtime else f"{runtime} on {provider}"
            # A runtime that is a package of ours to install says how; a provider is another build.
            how = f": {why}" if why and runtime != Target.runtime else ""
            print(f"{name:14} {'absent' if why else 'present'} ({what}){how}")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """What stands before a command."""
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """The console script and ``python -m compressor``."""
    app(prog_name="compressor")


@contextmanager
def guarded(debug: bool) -> Iterator[None]:
    """Turns errors into one line on standard error and an exit code; see ``errors``."""
    try:
        with listening():
            yield
    except CompressorError as error:
        if debug:
            raise
        _end(str(error), error.exit_code)
    except KeyboardInterrupt as stopped:
        kept = f"{stopped}, " if str(stopped) else ""
        _end(f"interrupted; {kept}what was finished is kept, the same command goes on", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except OSError as error:
        if debug:
            raise
        _end(f"{error.filename or ''}: {error.strerror or one_line(error)}".lstrip(": "), 3)
    except Exception as error:
        if debug:
            raise
        _end(f"{type(error).__name__}: {one_line(error)} (a fault of ours: --debug shows where)", 3)


def _ahead(model: str, unread: bool) -> None:
    """The process that will read the file comes up while PyTorch is imported here."""
    path = Path(model)
    if not unread and path.is_file() and path.suffix != ".safetensors":
        guard.start("compressor.loading.readers")


def _show(report: Report) -> None:
    """The table of a run; raises where something of it failed."""
    if report.stored:
        _say(f"already run on {report.document['created']}; --fresh runs it again")
    print(report)
    if report.document.get("failed"):
        failed = ", ".join(report.document["failed"])
        raise StageError(f"{failed} failed; the report has the reason and everything else")


def _end(text: str, code: int) -> NoReturn:
    _say(f"error: {text}")
    raise typer.Exit(code) from None


def _say(text: str) -> None:
    from compressor.report.table import plain  # names of files and layers may hold escapes

    print(f"compressor: {plain(text)}", file=sys.stderr)


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar on standard error when it is a terminal, nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda done, total, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from compressor.report.table import plain  # names of files and layers may hold escapes

    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), BarColumn(), text, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task("starting")
        yield lambda done, total, text: bar.update(
            line, completed=done, total=total, description=plain(text)
        )


def _whole(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{flag} {text!r}: give whole numbers, such as 1,32") from None


def _command() -> str:
    return shlex.join(["compressor", *sys.argv[1:]])
