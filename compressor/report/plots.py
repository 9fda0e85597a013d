"""Pictures: which a report has, and those of what was kept and of what cutting a layer hurts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from compressor.report import curves, damage, robust, waterfall
from compressor.report.drawing import BEST, INK, LONGEST, POINT, QUIET, dress, paper, png, title
from compressor.report.table import Document, label, measured, metric_of, plain, primary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

LEGEND = "bars: 95 % intervals · line: the pareto front · up and left is better"
Place = tuple[int, int, str, str]
PLACES: list[Place] = [
    (10, 6, "left", "bottom"),
    (10, -6, "left", "top"),
    (-10, 6, "right", "bottom"),
    (-10, -6, "right", "top"),
    (0, 14, "center", "bottom"),
    (0, -14, "center", "top"),
    (10, 22, "left", "bottom"),
    (10, -22, "left", "top"),
    (10, 40, "left", "bottom"),
    (10, -40, "left", "top"),
    (-10, 22, "right", "bottom"),
    (-10, -22, "right", "top"),
]
"""Where a label may stand beside its point, in points and alignments, best first."""


@dataclass(frozen=True)
class Point:
    """One artifact: ``x`` is p50 in ms, ``y`` what it kept; ``exact`` has no finite height.

    ``left``, ``right``, ``below`` and ``above`` are the lengths of the error bars.
    """

    name: str
    best: bool
    x: float
    y: float
    exact: bool = False
    left: float = 0.0
    right: float = 0.0
    below: float = 0.0
    above: float = 0.0


def pareto(document: Document) -> bytes:
    """A PNG of accuracy against p50 on the primary target, the pareto front as a line.

    Where nothing has an accuracy the outputs' SQNR stands for it. Up and left is better.
    """
    figure = paper(8, 5)
    axes = figure.add_subplot()
    judged = any("skipped" not in artifact["accuracy"] for artifact in document["artifacts"])
    points = _lifted(list(_points(document, judged)))
    target = primary(document)
    where = plain(label(target)) if target else "any target"
    axes.set_xlabel(f"p50 latency, ms ({where})\n{LEGEND}", color=INK, parse_math=False)
    axes.set_ylabel(_quantity(document, judged), color=INK, parse_math=False)
    title(axes, document["name"])
    dress(axes)
    with warnings.catch_warnings():
        # A name may hold letters that the font lacks; boxes in a picture are no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        if points:
            _draw(axes, points, up=not judged or document["task"]["higher_is_better"] is not False)
            figure.draw_without_rendering()
            _name(axes, points)
        else:
            axes.set(xticks=[], yticks=[])
            axes.text(
                0.5, 0.5, f"nothing measured on {where}",
                ha="center", color=INK, transform=axes.transAxes, parse_math=False,
            )  # fmt: skip
    return png(figure)


PICTURES: dict[str, tuple[Callable[[Document], object], Callable[[Document], bytes]]] = {
    "pareto.png": (lambda _: True, pareto),
    "waterfall.png": (waterfall.waterfall, waterfall.picture),
    "worst.png": (damage.pictured, damage.picture),
    "load.png": (curves.loads, curves.load),
    "robustness.png": (robust.pictured, robust.picture),
    "curves.png": (curves.histories, curves.learning),
}
"""Name of a picture: what it shows, nothing where it has nothing to show, and how it is drawn."""


def shown(document: Document) -> list[str]:
    """The names of the pictures that the document has something for; draws nothing."""
    return [name for name, (holds, _) in PICTURES.items() if holds(document)]


def pictures(document: Document) -> dict[str, bytes]:
    """Those pictures as PNG, by file name."""
    return {name: PICTURES[name][1](document) for name in shown(document)}


ROWS = 40
"""Groups that the picture of sensitivities has room for."""

SHADES = ("#a9c3e6", POINT, "#1f4273")


def sensitivity(document: Document) -> bytes:
    """A PNG of what is lost when a share of one group's units is zeroed, a row for each group.

    ``document`` has the ``name`` of the model and ``sensitivity``: the ``metric`` (``None`` without
    data, then only the loss is drawn) and the ``curves``, the worst first.
    """
    found = document["sensitivity"]
    curves, metric = found["curves"][:ROWS], found["metric"]
    what = "rise of the loss" if metric else "change of the output on made-up inputs"
    panels = [("loss", what)] + ([("metric", plain(metric))] if metric else [])
    figure = paper(8, 1.6 + 0.26 * len(curves))
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = [f"{plain(curve['layer'])[:LONGEST]} ({curve['kind']})" for curve in curves]
    for axes, (key, words) in zip(every, panels, strict=True):
        _rows(axes, curves, key)
        axes.set_xlabel(words, color=INK, parse_math=False)
        dress(axes)
    every[0].set_yticks(range(len(names)), names, parse_math=False)
    every[0].invert_yaxis()
    title(every[0], document["name"])
    dots, shares = every[0].get_legend_handles_labels()
    labels = [f"{share} of its units zeroed" for share in shares]
    figure.legend(dots, labels, loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    if more := len(found["curves"]) - len(curves):
        figure.supxlabel(f"and {more} more that hurt less", fontsize=8, color=QUIET)
    return png(figure)


def _rows(axes: Axes, curves: Sequence[Document], key: str) -> None:
    """A dot for each share, joined from the whole model on; the metric's whole value as a line."""
    for at, curve in enumerate(curves):
        drawn = [value for value in curve[key] if value is not None]
        axes.plot(drawn, [at] * len(drawn), color=QUIET, lw=1.0, zorder=1)
    for point, shade in enumerate(SHADES, 1):
        seen = [(curve[key][point], at) for at, curve in enumerate(curves)]
        dots = [(value, at) for value, at in seen if value is not None]
        axes.scatter(
            [value for value, _ in dots],
            [at for _, at in dots],
            s=26,
            color=shade,
            zorder=2,
            label=f"{point / 4:.0%}",
        )
    axes.axvline(curves[0][key][0] or 0.0, color=BEST, lw=0.9, ls="--", zorder=0)


def _quantity(document: Document, judged: bool) -> str:
    if not judged:
        return "fidelity to the model as given: SQNR, dB"
    lower = document["task"]["higher_is_better"] is False
    return plain(metric_of(document)) + (" (lower is better)" if lower else "")


def _points(document: Document, judged: bool) -> Iterator[Point]:
    """The artifacts that have both a latency on the primary target and a height."""
    found, metric = measured(document, primary(document)), metric_of(document)
    higher = document["task"]["higher_is_better"] is not False
    # A drop is absolute where higher is better, and relative to the reference for errors.
    scale = 1.0 if higher else _reference(document, metric)
    for artifact in document["artifacts"]:
        row, accuracy = found.get(artifact["name"]), artifact["accuracy"]
        if row is None:
            continue
        bars: dict[str, float] = {}
        exact = False
        if judged and metric in accuracy:
            y = accuracy[metric]
            if lost := accuracy["drop"]:
                less = max(0.0, lost["high"] - lost["value"]) * scale
                more = max(0.0, lost["value"] - lost["low"]) * scale
                bars["below"], bars["above"] = (less, more) if higher else (more, less)
        elif not judged and artifact["fidelity"]:
            decibels = artifact["fidelity"]["sqnr_db"]
            exact, y = decibels is None, decibels or 0.0
        else:
            continue
        x, gain = row["latency_ms"]["p50"], row["speedup"]
        if gain and gain["low"] and gain["high"]:
            bars["left"] = max(0.0, x - x * gain["value"] / gain["high"])
            bars["right"] = max(0.0, x * gain["value"] / gain["low"] - x)
        yield Point(plain(artifact["name"])[:LONGEST], artifact["best"], x, y, exact, **bars)


def _reference(document: Document, metric: str) -> float:
    """The metric of the first artifact, which the others are compared with."""
    return abs(float(document["artifacts"][0]["accuracy"].get(metric) or 1.0))


def _front(points: Sequence[Point], *, up: bool) -> list[Point]:
    """The points that no other beats in both, by rising latency."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y if up else p.y)):
        if not front or (point.y > front[-1].y if up else point.y < front[-1].y):
            front.append(point)
    return front


def _lifted(points: Sequence[Point]) -> list[Point]:
    """The points with exact matches, infinitely high, set above all others."""
    heights = [point.y for point in points if not point.exact] or [0.0]
    span = (max(heights) - min(heights)) or abs(max(heights)) * 0.1 or 1.0
    ceiling = max(heights) + 0.25 * span
    return [replace(point, y=ceiling) if point.exact else point for point in points]


def _draw(axes: Axes, points: Sequence[Point], *, up: bool) -> None:
    from matplotlib.ticker import LogLocator

    xs = [point.x for point in points]
    if min(xs) > 0 and max(xs) > 10 * min(xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    front = [(point.x, point.y) for point in _front(points, up=up)]
    axes.plot(*zip(*front, strict=True), drawstyle="steps-post", color=QUIET, lw=1.2, zorder=1)
    for point in points:
        color = BEST if point.best else POINT
        axes.errorbar(
            point.x,
            point.y,
            xerr=[[point.left], [point.right]],
            yerr=[[point.below], [point.above]],
            fmt="^" if point.exact else "o",
            markersize=11 if point.best else 7,
            markeredgecolor="white",
            color=color,
            ecolor=color,
            elinewidth=1.1,
            capsize=2.5,
            zorder=3 if point.best else 2,
        )
    axes.margins(x=0.14, y=0.14)
    if not up:
        axes.invert_yaxis()


def _name(axes: Axes, points: Sequence[Point]) -> None:
    """Writes each name beside its point, where it hides least; the recommended one first."""
    from matplotlib.transforms import Bbox

    frame = axes.get_window_extent()
    centres = axes.transData.transform([(point.x, point.y) for point in points])
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in centres]

    def put(note: Annotation, place: Place) -> Bbox:
        note.set(position=place[:2], ha=place[2], va=place[3])
        return note.get_window_extent()

    def hidden(note: Annotation, place: Place) -> float:
        """Square pixels that a label there would share with others, or lose at the frame."""
        box = put(note, place)
        inside = Bbox.intersection(box, frame)
        lost = box.width * box.height - (inside.width * inside.height if inside else 0.0)
        shared = (Bbox.intersection(box, other) for other in taken)
        return lost + sum(part.width * part.height for part in shared if part)

    for point in sorted(points, key=lambda p: not p.best):
        note = axes.annotate(
            f"{point.name} (exact)" if point.exact else point.name,
            (point.x, point.y),
            xytext=PLACES[0][:2],
            textcoords="offset points",
            fontsize=9.5,
            color=BEST if point.best else INK,
            weight="bold" if point.best else "normal",
            parse_math=False,
        )
        place = min(PLACES, key=partial(hidden, note))
        taken.append(put(note, place))
        # In a crowd only a line tells which point a name belongs to.
        axes.annotate(
            "",
            (point.x, point.y),
            xytext=place[:2],
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": QUIET, "shrinkA": 0, "shrinkB": 3},
        )
