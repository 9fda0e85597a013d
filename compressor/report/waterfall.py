"""The waterfall: what each stage on the way to the recommended artifact gave and cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from compressor.report.drawing import (
    BEST,
    INK,
    LONGEST,
    POINT,
    QUIET,
    WORSE,
    dress,
    paper,
    png,
    title,
)
from compressor.report.table import (
    MISSING,
    Document,
    escaped,
    figures,
    measured,
    metric_of,
    milliseconds,
    plain,
    primary,
    render,
    score,
    size,
    subject,
    variant,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIRST = "as given"


def waterfall(document: Document) -> list[dict[str, Any]]:
    """``{"artifact", "stage", "accuracy", "ms", "bytes"}`` from the baseline to the subject.

    ``stage`` names what made the artifact from the one before it, ``accuracy`` is the metric on the
    test split, ``ms`` the p50 on the primary target; ``None`` where it was not measured. Empty
    where no stage lies between two artifacts. See :func:`compressor.report.table.subject` for whose
    chain it is.
    """
    last = subject(document)
    if last is None:
        return []
    steps = list(last["steps"])
    chain: dict[int, Mapping[str, Any]] = {}
    for artifact in document["artifacts"]:
        own = _own(artifact)
        if len(own) < len(_own(last)) and steps[: len(own)] == own:
            chain.setdefault(len(own), artifact)  # of two made alike, the first
    if not chain:
        return []
    found, before, rows = [], 0, measured(document, primary(document))
    for length, artifact in [*sorted(chain.items()), (len(steps), last)]:
        made = [step["stage"] for step in steps[before:length] if step["stage"] != "export"]
        row = rows.get(artifact["name"])
        found.append(
            {
                "artifact": artifact["name"],
                "stage": " + ".join(made) or FIRST,
                "accuracy": artifact["accuracy"].get(metric_of(document)),
                "ms": row["latency_ms"]["p50"] if row else None,
                "bytes": artifact["size_bytes"],
            }
        )
        before = length
    return found


def _own(artifact: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Its steps without the last export: what others can be made from."""
    steps = list(artifact["steps"])
    return steps[:-1] if steps and steps[-1]["stage"] == "export" else steps


def stages(document: Document) -> str:
    """The waterfall as a table in markdown: what changed from row to row; may be empty."""
    chain, metric = waterfall(document), metric_of(document)
    if not chain:
        return ""
    found = measured(document, primary(document))
    artifacts = {artifact["name"]: artifact for artifact in document["artifacts"]}
    rows = []
    for before, one in zip([None, *chain], chain, strict=False):
        gain = found.get(one["artifact"], {}).get("speedup")
        rows.append(
            [
                variant(artifacts[one["artifact"]], markdown=True),
                escaped(one["stage"]),
                *_changes(before, one),
                f"{gain['value']:.2f}x" if gain else MISSING,
            ]
        )
    if len(chain) > 2:
        rows.append(["in all", "", *_changes(chain[0], chain[-1]), rows[-1][-1]])
    header = ["variant", "stage", escaped(metric), "p50 ms", "size", "speed-up so far"]
    return render(header, rows, markdown=True, left=2)


def _changes(before: Mapping[str, Any] | None, one: Mapping[str, Any]) -> Sequence[str]:
    """The three figures of the first row, and of any other how they differ from ``before``."""
    if before is None:
        return [score(one["accuracy"]), milliseconds(one["ms"]), size(one["bytes"])]
    apart = {key: difference(before[key], one[key]) for key in ("accuracy", "ms", "bytes")}
    lost = apart["bytes"] or 0
    return [
        MISSING if apart["accuracy"] is None else f"{apart['accuracy']:+.4f}",
        MISSING if apart["ms"] is None else signed(apart["ms"]),
        f"{'+' if lost >= 0 else '-'}{size(abs(lost))}",
    ]


def difference(before: float | None, after: float | None) -> float | None:
    """``after - before``, where both are known."""
    return None if before is None or after is None else after - before


def signed(value: float) -> str:
    """:func:`figures` with a sign: ``-0.289``, ``+0.0102``."""
    return ("+" if value >= 0 else "-") + figures(abs(value))


LEGEND = "each bar begins where the one above it ends · blue is better, amber worse"


def picture(document: Document) -> bytes:
    """A PNG of the waterfall: a row for each stage; accuracy, ms and MB where they are known.

    Accuracy is drawn as the change since the baseline: bars of itself would have to begin far from
    0 to show anything.
    """
    chain = waterfall(document)
    first, last = chain[0], chain[-1]
    up, metric = document["task"]["higher_is_better"] is not False, plain(metric_of(document))
    panels = [
        Panel("accuracy", f"{metric[:LONGEST]}, change", up, score, "{:+.4f}".format),
        Panel("ms", "p50 latency, ms", False, figures, signed),
        Panel("bytes", "size, MB", False, figures, signed),
    ]
    panels = [panel for panel in panels if None not in (first[panel.key], last[panel.key])]
    names = [first["artifact"], *(f"{one['stage']} → {one['artifact']}" for one in chain[1:])]
    names = [plain(name)[:LONGEST] for name in (*names, last["artifact"])]
    figure = paper(1.6 + 2.3 * max(2, len(panels)), 1.4 + 0.36 * len(names))
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    best = any(one["best"] and one["name"] == last["artifact"] for one in document["artifacts"])
    for axes, panel in zip(every, panels, strict=True):
        unit = 1e-6 if panel.key == "bytes" else 1.0
        levels = [
            (row, one[panel.key] * unit)
            for row, one in enumerate(chain)
            if one[panel.key] is not None
        ]
        _fall(axes, panel, levels, len(chain), BEST if best else QUIET)
        axes.set_xlabel(panel.words, color=INK, parse_math=False)
    every[0].set_yticks(range(len(names)), names, parse_math=False)
    every[0].set_ylim(len(names) - 0.4, -0.6)
    title(every[0], document["name"])
    figure.supxlabel(LEGEND, fontsize=8, color=QUIET)
    return png(figure)


@dataclass(frozen=True)
class Panel:
    """One quantity of the chain: how its levels and its changes are written."""

    key: str
    words: str
    up: bool
    level: Callable[[float], str]
    change: Callable[[float], str]


def _fall(
    axes: Axes, panel: Panel, levels: Sequence[tuple[int, float]], end: int, total: str
) -> None:
    """The bars of one panel: the first level, each change, the last level in row ``end``."""
    from matplotlib.ticker import MaxNLocator

    start = levels[0][1] if panel.key == "accuracy" else 0.0
    bars = [(0, start, levels[0][1], QUIET, panel.level(levels[0][1]))]
    for (_, before), (row, after) in pairwise(levels):
        color = POINT if (after > before) == panel.up else WORSE
        bars.append((row, before, after, color, panel.change(after - before)))
    bars.append((end, start, levels[-1][1], total, panel.level(levels[-1][1])))
    for row, before, after, color, said in bars:
        axes.barh(row, after - before, left=before - start, height=0.62, color=color, zorder=2)
        axes.annotate(
            said,
            (max(before, after) - start, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK,
        )
    for (row, _, level, *_), (following, *_) in pairwise(bars):
        axes.plot([level - start] * 2, [row, following], color=QUIET, lw=0.8, zorder=1)
    axes.axvline(0.0, color=QUIET, lw=0.8, zorder=1)
    ends = [0.0, *(level - start for _, level in levels)]
    reach = (max(ends) - min(ends)) or 1.0
    # The room on the right is for the figures beside the bars.
    axes.set_xlim(min(ends) - 0.06 * reach * (min(ends) < 0), max(ends) + 0.45 * reach)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    dress(axes, "x")
    axes.tick_params(axis="y", length=0)
