"""report.md: the report as a page that reads well on a code host."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from compressor.report import curves, damage, judged, robust, waterfall
from compressor.report.plots import shown
from compressor.report.table import (
    MISSING,
    Document,
    escaped,
    figures,
    footnotes,
    further,
    label,
    nodes,
    operators,
    placement,
    primary,
    printable,
    render,
    score,
    size,
    subject,
    table,
    target_of,
)

LISTED = 8
"""Entries of a list that are written out; a network may have hundreds of layers to name."""


ELSEWHERE = ("training", "history")
"""Facts that have a table or a picture of their own."""


def best(document: Document) -> str:
    """The name of the recommended artifact; the first, the reference, where none is marked."""
    artifacts = document["artifacts"]
    marked = (artifact["name"] for artifact in artifacts if artifact["best"])
    return str(next(marked, artifacts[0]["name"] if artifacts else ""))


def recommendation(document: Document) -> str:
    """The sentence that a reader needs first."""
    unfinished = document.get("finished") is False
    otherwise = "This run did not finish." if unfinished else f"Recommended: {best(document)}."
    return document.get("recommendation") or otherwise


def markdown(document: Document) -> str:
    """The whole page."""
    return "\n\n".join(block for block in _blocks(document) if block) + "\n"


def _blocks(document: Document) -> Iterator[str]:
    target = primary(document)
    yield f"# {escaped(document['name'])}"
    yield escaped(recommendation(document))
    if target is not None:
        yield f"On {escaped(label(target))}:"
    yield table(document, target, markdown=True)
    yield _image(document, "Accuracy against latency", "pareto.png")
    yield escaped(placement(document, target))
    yield _bullets(escaped(note) for note in footnotes(document))
    yield from _judged(document)
    yield from _stage_by_stage(document)
    yield from _damage(document)
    yield from _robustness(document)
    if others := further(document, markdown=True):
        yield "## Further targets"
        yield others
    if document["best_per_target"]:
        yield "Best on each target:"
        yield _bullets(
            f"{escaped(label(target_of(entry)))}: **{escaped(entry['artifact'])}**"
            for entry in document["best_per_target"]
        )
    if target is not None and (beside := curves.costs(document)):
        yield "## Measured further"
        yield f"On {escaped(label(target))}:"
        yield beside
    if batches := curves.throughput(document):
        yield "## Throughput against batch"
        for where, rates in batches.items():
            yield f"On {escaped(where)}:"
            yield rates
    if delays := curves.delays(document):
        yield "## Load"
        yield (
            "One stretch of requests that come at random and wait their turn: the time from "
            "arrival to answer, by the rate offered as a share of the throughput without pauses."
        )
        yield _image(document, "Latency against the rate offered", "load.png")
        yield delays
    if kinds := operators(document, target):
        yield "## Where the time goes"
        yield kinds
        yield nodes(document, target)
    if trained := curves.training(document, markdown=True):
        yield "## Training"
        yield trained
    if learned := _image(document, "Loss and accuracy by epoch", "curves.png"):
        yield "## Learning curves"
        yield learned
    if document.get("warnings"):
        yield "## Warnings"
        yield _bullets(escaped(warning) for warning in document["warnings"])
    if document["artifacts"]:
        yield "## How each was made"
        yield from _made(document)
    if document["stages"]:
        yield "## Stages"
        yield _stages(document)
    yield "## Environment"
    yield _bullets(_environment(document))
    if conditions := curves.noise(document):
        yield "## Noise"
        yield conditions
    yield "## Reproduce"
    yield from _reproduce(document)


def _image(document: Document, words: str, name: str) -> str:
    return f"![{words}]({name})" if name in shown(document) else ""


def _judged(document: Document) -> Iterator[str]:
    """Every metric, and what the recommended artifact takes each class for."""
    every, taken = judged.metrics(document), judged.confusion(document)
    if every or taken:
        yield "## Metrics"
    if every:
        yield judged.legend(document)
        yield every
    if taken:
        yield f"Test examples of {escaped(best(document))} by true class (rows) and predicted:"
        yield taken


def _stage_by_stage(document: Document) -> Iterator[str]:
    """The waterfall of the recommended artifact, or of the next best."""
    if not (gave := waterfall.stages(document)):
        return
    yield "## What each stage gave and cost"
    yield _instead(document)
    if floor := document["environment"]["noise_floor"]:
        yield f"A change of p50 by less than the noise floor, {floor['value']:.1%}, is none."
    yield gave
    yield _image(document, "Accuracy, latency and size after each stage", "waterfall.png")


def _damage(document: Document) -> Iterator[str]:
    """What the recommended artifact lost by class and by example, or the next best."""
    chosen = subject(document)
    classes, examples = damage.by_class(document), damage.examples(document)
    if chosen is None or not (classes or examples):
        return
    yield "## Where it hurts"
    yield _instead(document)
    if classes:
        yield damage.lost(document)
        yield classes
    if examples:
        yield f"The test examples on which {escaped(chosen['name'])} lost most:"
        yield _image(document, "The worst examples", "worst.png") or examples


def _robustness(document: Document) -> Iterator[str]:
    """What corruptions and attacks cost, where that was asked for."""
    if held := robust.table(document, markdown=True):
        yield "## Robustness"
        yield escaped(robust.lost(document))
        yield _image(document, "The metric under corruptions and attacks", "robustness.png")
        yield held
    if robust.rows(document):
        yield _bullets(escaped(note) for note in robust.notes(document))


def _instead(document: Document) -> str:
    """Says whose figures these are where the recommended artifact has none."""
    chosen = subject(document)
    if chosen is None or chosen["best"] or not any(one["best"] for one in document["artifacts"]):
        return ""
    return f"{escaped(best(document))} is recommended; this is {escaped(chosen['name'])}."


def _bullets(lines: Iterator[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _code(line: str) -> str:
    """A fenced block whose fence is longer than any run of backticks in it."""
    text = printable(line)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"


def _value(value: Any) -> str:
    """A setting or fact in words: lists are cut, nested tables keep their names."""
    if isinstance(value, Mapping):
        return "; ".join(f"{escaped(key)}: {_value(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        shown = [_value(entry) for entry in value[:LISTED]]
        more = [f"and {len(value) - LISTED} more"] if len(value) > LISTED else []
        apart = "; " if any(isinstance(entry, Mapping) for entry in value) else ", "
        return apart.join(shown + more) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: MISSING}[value]
    return f"{value:.6g}" if isinstance(value, float) else escaped(value)


def _fact(key: str, value: Any) -> list[str]:
    """A fact as a bullet under its step; what was said of each layer as bullets under that."""
    name = escaped(key).replace("\\_", " ")
    if isinstance(value, Mapping) and value and all(isinstance(v, str) for v in value.values()):
        # Reasons: all of them, each with all that it is true of.
        why: dict[str, list[str]] = {}
        for of, said in value.items():
            why.setdefault(said, []).append(escaped(of))
        return [
            f"  - {name}:",
            *(f"    - {escaped(said)}: {', '.join(of)}" for said, of in why.items()),
        ]
    if isinstance(value, Mapping) and any(isinstance(entry, str) for entry in value.values()):
        entries = [f"{escaped(of)}: {_value(said)}" for of, said in value.items()]
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        entries = [_value(entry) for entry in value]
    else:
        return [f"  - {name}: {_value(value)}"]
    if len(entries) > LISTED:
        entries[LISTED:] = [f"and {len(entries) - LISTED} more"]
    return [f"  - {name}:", *(f"    - {entry}" for entry in entries)]


def _made(document: Document) -> Iterator[str]:
    """For each artifact its file, its steps that no artifact before it has shown, its fidelity."""
    shown: list[Mapping[str, Any]] = []
    for artifact in document["artifacts"]:
        steps = artifact["steps"]
        yield f"### {escaped(artifact['name'])}"
        chain = " → ".join(escaped(step["stage"]) for step in steps) or "as given"
        lines = [f"- {chain} → {escaped(artifact['path'])} (SHA-256 {artifact['sha256'][:12]}…)"]
        for step in steps:
            if step in shown:
                continue
            shown.append(step)
            settings = ", ".join(
                f"{escaped(key)} = {_value(value)}"
                for key, value in step["settings"].items()
                if value not in (None, False, [])  # most of what a stage can do is left out
            )
            lines.append(f"- **{escaped(step['stage'])}** {settings}".rstrip())
            for key, value in step.get("facts", {}).items():
                if key not in ELSEWHERE:
                    lines += _fact(key, value)
        if artifact["fidelity"]:
            lines.append(f"- {_fidelity(artifact['fidelity'])}")
        if artifact["within_budget"] is not None:
            lines.append(f"- {_budget(artifact)}")
        yield "\n".join(lines)


def _fidelity(fidelity: Mapping[str, Any]) -> str:
    decibels = fidelity["sqnr_db"]
    parts = ["exact" if decibels is None else f"SQNR {decibels:.1f} dB"]
    if fidelity["top1_agreement"] is not None:
        parts.append(f"top-1 agreement {score(fidelity['top1_agreement'])}")
    if fidelity["max_abs_diff"] is not None:
        parts.append(f"largest difference {fidelity['max_abs_diff']:.3g}")
    return f"outputs against the model as given: {', '.join(parts)} (n = {fidelity['n']})"


def _budget(artifact: Mapping[str, Any]) -> str:
    if not artifact["within_budget"]:
        return "outside the budget"
    return "within the budget" + (", proven by the whole interval" * bool(artifact["proven"]))


def _stages(document: Document) -> str:
    rows = []
    for stage in document["stages"]:
        notes = ["cached"] if stage["cached"] else []
        if stage.get("target"):
            notes.append(escaped(stage["target"]))
        if stage.get("skipped"):
            notes.append(f"skipped: {escaped(stage['skipped'])}")
        rows.append(
            [
                escaped(stage["stage"]),
                escaped(stage.get("artifact") or ""),
                "; ".join(notes),
                figures(stage["seconds"]),
                size(stage["peak_rss_bytes"]),
            ]
        )
    header = ["stage", "variant", "note", "seconds", "peak memory"]
    return render(header, rows, markdown=True, left=3)


def _environment(document: Document) -> Iterator[str]:
    there, task = document["environment"], document["task"]
    cpu, floor = there["cpu"], there["noise_floor"]
    splits = task["splits"] or {}
    yield f"data: {escaped(task['data'] or 'none')}" + (f" ({_value(splits)})" * bool(splits))
    if document.get("model"):
        model = document["model"]
        digest = f" (SHA-256 {model['sha256'][:12]}…)" if model["sha256"] else ""
        yield f"model: {escaped(model['path'] or 'a live object')}{digest}"
    yield f"versions: {_value({k: v or 'absent' for k, v in there['versions'].items()})}"
    yield f"system: {escaped(there['os'])}"
    cores = f"{cpu['cores']} {'core' if cpu['cores'] == 1 else 'cores'}"
    yield f"CPU: {escaped(cpu['model'] or 'unknown')}, {cores}"
    yield f"features that decide speed: {_value(cpu['features'])}"
    if there["threads"]:
        yield f"threads: {_value(there['threads'])}"
    if there.get("session_settings"):
        yield f"session settings: {_value(there['session_settings'])}"
    yield f"providers: {_value(there['providers'])}"
    yield f"load before measuring: {MISSING if there['load'] is None else figures(there['load'])}"
    if floor is not None:
        yield f"noise floor: ±{floor['value']:.1%} (reference against itself, n = {floor['n']})"
    yield f"created: {escaped(document['created'])}"
    if document["samples"]:
        yield f"raw values: {escaped(document['samples'])}"


def _reproduce(document: Document) -> Iterator[str]:
    yield "This report was made by"
    yield _code(document["command"])
    if not document["recipe"]:
        return
    yield "and its recipe replays with"
    yield _code(replay(document["command"]))


STEP_FLAGS = {"--prune": 1, "--keep": 1, "--epochs": 1, "--quantize": 1, "--recipe": 1, "--out": 1}
STEP_FLAGS |= {"--distill": 0, "--no-distill": 0, "--fresh": 0}
"""Flags that the recipe stands for, or that name the folder, and the words that follow each."""


def replay(command: str) -> str:
    """The command with its resolved recipe in place of the flags that made it.

    >>> replay("compressor run m.pt --prune 0.5 --seed 3 --out=x")
    'compressor run m.pt --seed 3 --recipe recipe.toml --out replayed'
    """
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    if words[:2] != ["compressor", "run"]:
        return "compressor run MODEL --recipe recipe.toml --out replayed"
    kept, skip = [], 0
    for word in words:
        flag, equals, _ = word.partition("=")
        if skip:
            skip -= 1
        elif flag in STEP_FLAGS:
            skip = 0 if equals else STEP_FLAGS[flag]
        else:
            kept.append(word)
    return shlex.join([*kept, "--recipe", "recipe.toml", "--out", "replayed"])
