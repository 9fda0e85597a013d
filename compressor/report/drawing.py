"""What all pictures share: colours, paper, axes, the PNG."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

from compressor.report.table import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, POINT, BEST = "#24292f", "#8c959f", "#4078c0", "#d1495b"
WORSE = "#e3a857"
HUES = (POINT, "#e3a857", "#4f9d69", "#7a5195", QUIET, "#1f4273", "#b07d62", "#4fb0ae")
"""Of lines that are told apart; the recommended one is drawn in ``BEST``."""

LONGEST = 40
"""Characters of a name that a picture has room for."""


def paper(width: float, height: float) -> Figure:
    """An empty figure of so many inches, without a screen and without global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, grid: Any = "both") -> None:
    """The look of every plot; ``grid`` says along which axis lines run."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(QUIET)
    axes.tick_params(colors=INK)
    axes.set_axisbelow(True)
    axes.grid(color=QUIET, alpha=0.2, axis=grid)


def title(axes: Axes, text: object) -> None:
    """A name above the plot, as far as there is room."""
    axes.set_title(plain(text)[:LONGEST], loc="left", color=INK, weight="bold", parse_math=False)


def png(figure: Figure) -> bytes:
    """The figure as a PNG: the same bytes for the same figure."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A name may hold letters that the font lacks; boxes in a picture are no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
