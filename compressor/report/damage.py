"""Where it hurts: what each class lost, and the examples that lost most."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from compressor.report.drawing import BEST, INK, QUIET, paper, png
from compressor.report.table import (
    Document,
    drop,
    escaped,
    figures,
    metric_of,
    plain,
    render,
    score,
    subject,
)

Record = Mapping[str, Any]


def classes(document: Document) -> list[Record]:
    """What each class of the subject lost, the surest loss first; may be empty."""
    chosen = subject(document)
    return list((chosen and chosen.get("classes")) or [])


def worst(document: Document) -> list[Record]:
    """The subject's examples that lost most, the worst first; may be empty."""
    chosen = subject(document)
    return list((chosen and chosen.get("worst")) or [])


def pictured(document: Document) -> list[Record]:
    """Those of :func:`worst` that have a picture."""
    return [one for one in worst(document) if one["picture"] and _is_small(one["picture"])]


def _is_small(picture: str) -> bool:
    """Whether it is a PNG of at most 64 x 64 pixels: a few bytes may unfold to gigabytes."""
    try:
        start = base64.b64decode(picture)[:24]
    except ValueError:
        return False
    sizes = (int.from_bytes(start[16:20], "big"), int.from_bytes(start[20:24], "big"))
    return start[:16] == PNG and min(sizes) > 0 and max(sizes) <= 64


PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


def lost(document: Document) -> str:
    """How many classes lost beyond noise, in a sentence; may be empty."""
    rows = classes(document)
    single = [row for row in rows if "classes" not in row]
    if not single:
        return ""
    metric = single[0].get("metric", metric_of(document))
    by = "" if metric == metric_of(document) else f" {escaped(metric)}"
    beyond = sum(row["drop"]["low"] > 0 for row in single)
    every = len(single) + sum(row.get("classes", 0) for row in rows)
    if not beyond:
        return f"None of {every} classes lost{by} beyond noise: every interval reaches 0."
    # Sorted by the interval's lower end, so that only one that did can hide among the others.
    least = "At least " if beyond == len(single) < every else ""
    return (
        f"{least}{beyond} of {every} classes lost{by} beyond noise: the whole interval lies above "
        "0. By chance alone that of 1 in 40 does."
    )


def by_class(document: Document) -> str:
    """The classes as a table in markdown; may be empty."""
    rows = [
        [
            escaped(row["class"] if "classes" not in row else f"{row['classes']} others"),
            str(row["n"]),
            score(row["baseline"]),
            score(row["value"]),
            drop(row),
        ]
        for row in classes(document)
    ]
    header = ["class", "n", "baseline", "this", "drop [95 %]"]
    return render(header, rows, markdown=True) if rows else ""


def examples(document: Document) -> str:
    """The worst examples as a table in markdown; may be empty."""
    rows = [
        [
            str(one["example"]),
            escaped(one["target"]),
            escaped(one["baseline"]),
            escaped(one["output"]),
            figures(one["lost"]),
        ]
        for one in worst(document)
    ]
    header = ["example", "target", "baseline", "this", "lost"]
    return render(header, rows, markdown=True) if rows else ""


COLUMNS = 6
"""Pictures in a row."""

SHORT = 16
"""Characters of an output that stand below a picture."""


def picture(document: Document) -> bytes:
    """A PNG of the inputs that lost most, each with what it is and what the two models said."""
    from matplotlib.image import imread

    shown, chosen = pictured(document), subject(document)
    name = plain(chosen["name"])[:SHORT] if chosen else ""
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = paper(0.4 + 1.5 * columns, 0.25 + 2.0 * rows)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in every:
        axes.set_axis_off()
    for axes, one in zip(every, shown, strict=False):
        with suppress(Exception):  # of a broken one the words stand there all the same
            image = imread(io.BytesIO(base64.b64decode(one["picture"])), format="png")
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        said = [
            (f"target: {plain(one['target'])[:SHORT]}", INK, "bold"),
            (f"baseline: {plain(one['baseline'])[:SHORT]}", QUIET, "normal"),
            (f"{name}: {plain(one['output'])[:SHORT]}", BEST, "normal"),
        ]
        for line, (words, color, weight) in enumerate(said):
            axes.annotate(
                words,
                (0.5, 0.0),
                xycoords="axes fraction",
                xytext=(0, -4 - 11 * line),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=8,
                color=color,
                weight=weight,
                parse_math=False,
            )
    return png(figure)
