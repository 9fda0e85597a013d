"""Several runs in one comparison: models, machines or providers side by side.

Nothing is derived across runs. Each was timed at its own time of day, so a speed-up stands against
the reference of its own run only; what else differs between the runs is said below the tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from compressor.artifact import replacing, write_text
from compressor.errors import InputError
from compressor.measurement import Target
from compressor.report import table as tables
from compressor.report.drawing import HUES, INK, LONGEST, dress, paper, png
from compressor.report.markdown import recommendation
from compressor.report.table import MISSING, Document, Text, escaped, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from compressor.report import Report

LEGEND = "hollow: its reference · star: recommended · line: its front · up and left is better"


class Fact(NamedTuple):
    """Something that runs may differ in, and what does not compare then."""

    spoils: str
    of: Callable[[Document], object]


FACTS: dict[str, Fact] = {
    "target": Fact("times do", lambda run: tables.primary(run)),
    "CPU": Fact("times do", lambda run: run["environment"]["cpu"]["model"]),
    "CPU features": Fact("times do", lambda run: ", ".join(run["environment"]["cpu"]["features"])),
    "cores": Fact("times do", lambda run: run["environment"]["cpu"]["cores"]),
    "system": Fact("times do", lambda run: run["environment"]["os"]),
    "session settings": Fact(
        "times do", lambda run: _pairs(run["environment"].get("session_settings"))
    ),
    "metric": Fact("drops do", lambda run: run["task"]["metric"]),
    "data": Fact("accuracy does", lambda run: run["task"]["data"]),
    "examples in each split": Fact("accuracy does", lambda run: _pairs(run["task"]["splits"])),
    "budget": Fact("what is recommended does", lambda run: run.get("max_drop")),
}


@dataclass(frozen=True)
class Runs:
    """Reports with the names that tell them apart, in the order they were given."""

    names: tuple[str, ...]
    documents: tuple[Document, ...]

    def table(self) -> str:
        """The comparison for a terminal."""
        return "\n\n".join(
            [
                _runs(self, plain),
                _variants(self, plain),
                *filter(None, [_everywhere(self, plain)]),
                f"Best of each run:\n\n{_best(self, plain)}",
                "\n".join(plain(note) for note in notes(self)),
            ]
        )

    def markdown(self, picture: str = "comparison.png") -> str:
        """The comparison as a page; ``picture`` is the name of the file beside it."""
        blocks = [
            f"# Comparison of {len(self.names)} runs",
            _runs(self, escaped),
            "## Best of each run",
            _best(self, escaped),
            "\n".join(
                f"- {escaped(name)}: {escaped(recommendation(document))}" for name, document in self
            ),
            f"![What each variant kept against its latency]({quote(picture)})",
            "## All variants",
            _variants(self, escaped),
        ]
        if everywhere := _everywhere(self, escaped):
            blocks += ["## On every target", everywhere]
        said = "\n".join(f"- {escaped(note)}" for note in notes(self))
        blocks += ["## What to know", said or "Nothing differs and nothing is doubtful."]
        return "\n\n".join(blocks) + "\n"

    def picture(self) -> bytes:
        """A PNG of each metric against p50 on each run's primary target, one colour a run."""
        return _picture(self)

    def write(self, file: Path) -> None:
        """Writes the page to ``file``, and the picture beside it under the same stem.

        Raises :class:`InputError` for a name that does not end in ``.md`` and for a place that
        cannot be written to.
        """
        if file.suffix != ".md":
            raise InputError(f"--out {file}: name a markdown file, such as comparison.md")
        beside = file.with_suffix(".png")
        text, drawn = self.markdown(beside.name), self.picture()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(beside) as part:
                part.write_bytes(drawn)
            write_text(file, text)
        except OSError as error:
            raise InputError(f"--out {file} cannot be written: {error.strerror}") from None

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        return zip(self.names, self.documents, strict=True)

    def __str__(self) -> str:
        return self.table()


def several(reports: Sequence[Report]) -> Runs:
    """The comparison of these reports, named as they name themselves.

    Runs of one name are told apart by as much of their folders as that takes. Raises
    :class:`InputError` where there is none, and for a report that is given twice.
    """
    if not reports:
        raise InputError("no reports to compare: name run folders or report.json files")
    for at, report in enumerate(reports):
        same = (
            other for other in reports[:at] if other.folder.resolve() == report.folder.resolve()
        )
        if any(other.document == report.document for other in same):
            raise InputError(f"the report in {report.folder} is given twice: name each run once")
    return Runs(_named(reports), tuple(report.document for report in reports))


def _named(reports: Sequence[Report]) -> tuple[str, ...]:
    names = tuple(plain(report.document["name"]) or "run" for report in reports)
    shared = {name for name, times in Counter(names).items() if times > 1}
    parts = [report.folder.resolve().parts for report in reports]
    found = names
    for depth in range(max(map(len, parts)) + 1):
        found = tuple(
            f"{name} ({plain('/'.join(of[-depth:]))})" if depth and name in shared else name
            for name, of in zip(names, parts, strict=True)
        )
        if len(set(found)) == len(found):
            return found
    # Two files of one folder: nothing but their order tells them apart.
    return tuple(f"{at}: {name}" for at, name in enumerate(names, 1))


# Tables.


def _runs(runs: Runs, show: Text) -> str:
    rows = []
    for name, document in runs:
        cpu, floor = document["environment"]["cpu"], document["environment"]["noise_floor"]
        model = (document.get("model") or {}).get("path") or document["task"]["name"]
        cores = f"{cpu['cores']} {'core' if cpu['cores'] == 1 else 'cores'}"
        target = tables.primary(document)
        rows.append(
            [
                show(name),
                show(model),
                show(document["task"]["data"] or "none"),
                show(f"{cpu['model'] or 'unknown'}, {cores}"),
                show(tables.label(target)) if target else MISSING,
                f"±{floor['value']:.1%}" if floor else MISSING,
                show(document["created"][:10]),
            ]
        )
    header = ["run", "model", "data", "machine", "target", "noise floor", "date"]
    return tables.render(header, rows, markdown=show is escaped, left=5)


def _variants(runs: Runs, show: Text) -> str:
    """Every artifact of every run, with its costs on its run's primary target."""
    metrics, rows = dict.fromkeys(map(tables.metric_of, runs.documents)), []
    for name, document in runs:
        found = tables.measured(document, tables.primary(document))
        for artifact in document["artifacts"]:
            row = found.get(artifact["name"], {})
            rows.append(
                [
                    show(name),
                    tables.variant(artifact, markdown=show is escaped),
                    *(tables.score(artifact["accuracy"].get(metric)) for metric in metrics),
                    tables.drop(artifact["accuracy"]),
                    tables.size(artifact["size_bytes"]),
                    tables.count(artifact["params"]),
                    tables.count(artifact["macs"]),
                    tables.milliseconds(row.get("latency_ms", {}).get("p50")),
                    tables.count(row.get("throughput_per_s")),
                    tables.size(row.get("peak_rss_bytes")),
                    tables.ratio(row.get("speedup"), artifact["name"]),
                ]
            )
    header = ["run", "variant", *map(show, metrics), "drop [95 %]", "size", "params", "MACs"]
    header += ["p50 ms", "inferences/s", "peak memory", "speed-up in its run"]
    return tables.render(header, rows, markdown=show is escaped, left=2)


def _everywhere(runs: Runs, show: Text) -> str:
    """p50 in ms on every target that any run measured, with the speed-up within that run; empty
    where there is one target only."""
    columns = [
        target
        for target in dict.fromkeys(each for _, run in runs for each in tables.targets(run))
        if any(tables.measured(document, target) for _, document in runs)
    ]
    if len(columns) < 2:
        return ""

    def cell(document: Document, target: Target, artifact: str) -> str:
        row = tables.measured(document, target).get(artifact)
        if row is None:
            return MISSING
        gain = row["speedup"]
        own = gain is None or gain["versus"] == artifact
        return tables.milliseconds(row["latency_ms"]["p50"]) + (
            "" if own else f" ({gain['value']:.2f}x {gain['verdict']})"
        )

    rows = [
        [show(name), tables.variant(artifact, markdown=show is escaped)]
        + [cell(document, target, artifact["name"]) for target in columns]
        for name, document in runs
        for artifact in document["artifacts"]
    ]
    header = ["run", "p50 ms", *(show(tables.label(target)) for target in columns)]
    return tables.render(header, rows, markdown=show is escaped, left=2)


def _best(runs: Runs, show: Text) -> str:
    """What each run recommends, and what that is of its own reference."""
    rows = []
    for name, document in runs:
        artifacts, metric = document["artifacts"], tables.metric_of(document)
        best = next((one for one in artifacts if one["best"]), None)
        if best is None:
            rows.append([show(name), MISSING, *[MISSING] * 6])
            continue
        row = tables.measured(document, tables.primary(document)).get(best["name"], {})
        whole = artifacts[0]["size_bytes"]
        share = f" ({best['size_bytes'] / whole:.0%})" if whole else ""
        rows.append(
            [
                show(name),
                show(best["name"]),
                f"{show(metric)} {tables.score(best['accuracy'].get(metric))}",
                tables.drop(best["accuracy"]),
                tables.size(best["size_bytes"]) + share,
                tables.milliseconds(row.get("latency_ms", {}).get("p50")),
                tables.count(row.get("throughput_per_s")),
                tables.ratio(row.get("speedup"), best["name"]),
            ]
        )
    header = ["run", "best", "kept", "drop [95 %]", "size (of its reference)"]
    header += ["p50 ms", "inferences/s", "speed-up in its run"]
    return tables.render(header, rows, markdown=show is escaped, left=2)


# What has to be known beside the figures.


def notes(runs: Runs) -> list[str]:
    """What does not compare and why, and what each run could not do; not yet escaped."""
    return [*_differences(runs), *_remarks(runs)]


def _differences(runs: Runs) -> Iterator[str]:
    if len(runs.names) > 1:
        yield (
            "Speed-ups are each run's own. None is given from run to run, which were timed at "
            "different times of day: compressor bench times files in turns."
        )
    for what, fact in FACTS.items():
        if said := _apart(runs, [fact.of(document) for document in runs.documents]):
            yield f"{what}: {fact.spoils} not compare: {said}"
    versions = [document["environment"]["versions"] for document in runs.documents]
    for package in sorted(set().union(*versions)):
        if said := _apart(runs, [found.get(package) or "absent" for found in versions]):
            yield f"version of {package}: times and accuracy may differ for that: {said}"
    for name, document in runs:
        if document.get("finished") is False:
            yield f"{name}: this run did not finish"


def _apart(runs: Runs, values: Sequence[object]) -> str:
    """``VALUE in run, run; VALUE in run``, or nothing where all are the same."""
    among: dict[str, list[str]] = {}
    for name, value in zip(runs.names, values, strict=True):
        among.setdefault("none" if value in (None, "") else str(value), []).append(name)
    if len(among) < 2:
        return ""
    return "; ".join(f"{value} in {', '.join(names)}" for value, names in among.items())


def _remarks(runs: Runs) -> Iterator[str]:
    """The footnotes of each run, those of several once."""
    among: dict[str, list[str]] = {}
    for name, document in runs:
        for note in tables.footnotes(document):
            among.setdefault(note, []).append(name)
    for note, names in among.items():
        every = len(names) > 1 and len(names) == len(runs.names)
        yield f"{'every run' if every else ', '.join(names)}: {note}"


def _pairs(found: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in (found or {}).items())


# The picture.


def _picture(runs: Runs) -> bytes:
    drawn = [at for at, document in enumerate(runs.documents) if _points(document)]
    metrics = list(dict.fromkeys(_quantity(runs.documents[at]) for at in drawn)) or [""]
    figure = paper(max(8, 5.5 * len(metrics)), 4.8 + 0.22 * len(drawn))
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        dress(axes)
        axes.set_ylabel(metric, color=INK, parse_math=False)
        shown = {at: run for at in drawn if _quantity(run := runs.documents[at]) == metric}
        if not shown:
            axes.set(xticks=[], yticks=[])
            nothing = "nothing was both judged and measured"
            axes.text(0.5, 0.5, nothing, ha="center", color=INK, transform=axes.transAxes)
        for at, document in shown.items():
            _draw(axes, document, HUES[at % len(HUES)], runs.names[at])
        _scale(axes, [x for document in shown.values() for x, *_ in _points(document)])
        if any(document["task"]["higher_is_better"] is False for document in shown.values()):
            axes.invert_yaxis()
    targets = {tables.primary(runs.documents[at]) for at in drawn}
    where = plain(*targets) if len(targets) == 1 else "each run on its own target"
    below = figure.supxlabel(f"p50 latency, ms ({where})\n{LEGEND}", fontsize=10, color=INK)
    below.set(parse_math=False)
    if drawn:
        legend = figure.legend(loc="outside upper left", frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set(parse_math=False, color=INK)
    return png(figure)


def _quantity(document: Document) -> str:
    lower = document["task"]["higher_is_better"] is False
    return plain(tables.metric_of(document)) + (" (lower is better)" if lower else "")


def _points(document: Document) -> list[tuple[float, float, bool, bool]]:
    """(p50 in ms, the metric, recommended, reference) of each artifact that has both figures."""
    found, metric = tables.measured(document, tables.primary(document)), tables.metric_of(document)
    return [
        (
            found[artifact["name"]]["latency_ms"]["p50"],
            artifact["accuracy"][metric],
            artifact["best"],
            at == 0,
        )
        for at, artifact in enumerate(document["artifacts"])
        if artifact["name"] in found and metric in artifact["accuracy"]
    ]


def _draw(axes: Axes, document: Document, color: str, name: str) -> None:
    """One run: its points, and the front of those that none of its own beats in both."""
    sign = -1 if document["task"]["higher_is_better"] is False else 1
    points, front = _points(document), list[tuple[float, float]]()
    for x, y, *_ in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    axes.plot(*zip(*front, strict=True), drawstyle="steps-post", color=color, lw=1.1, alpha=0.6)
    best = next((one["name"] for one in document["artifacts"] if one["best"]), None)
    label = name if best is None else f"{name[:LONGEST]}: {plain(best)[:LONGEST]}"
    axes.plot([], [], "o", color=color, label=label)
    for x, y, recommended, reference in points:
        axes.plot(
            x,
            y,
            "*" if recommended else "o",
            markersize=16 if recommended else 7,
            color=color,
            markerfacecolor="white" if reference else color,
            markeredgecolor=color if reference else "white",
            zorder=3 if recommended else 2,
        )


def _scale(axes: Axes, times: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator

    axes.margins(x=0.1, y=0.1)
    if times and 0 < 10 * min(times) < max(times):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
