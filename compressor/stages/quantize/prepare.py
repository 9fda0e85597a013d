"""Graph preparation: rewrites that leave what a model computes and make it quick to quantize."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from compressor.stages import graph
from compressor.stages.quantize.preparing import attention, folding, layout, recurrent, shapes

if TYPE_CHECKING:
    import onnx_ir as ir

PASSES: dict[str, Callable[[ir.Model], int]] = {
    "needless": folding.needless,
    "constants": folding.constants,
    "shapes": shapes.shapes,
    "norms": folding.norms,
    "pools": folding.pools,
    "reshapes": shapes.reshapes,
    "selections": shapes.selections,
    "states": recurrent.states,
    "attention": attention.attention,
    "stem": layout.stem,
    "flatten": layout.flatten,
}
"""Rewrites in the order in which they help each other: in place, the count of what they did."""

STATIC = ("stem", "flatten")
"""Rewrites that pay in static 8-bit graphs only."""


def prepare(model: ir.Model, *, static: bool = False, without: Collection[str] = ()) -> list[str]:
    """Rewrites a float graph in place; the names of the rewrites that found something to do.

    The model computes what it did, up to the rounding of float32: a pattern that is not fully
    understood (a weight that is computed, a size that is dynamic, a value read elsewhere) is left
    alone. ``static`` adds the rewrites for static 8-bit graphs, ``without`` names some to leave
    out. Types and shapes of all values are inferred on the way.
    """
    done = []
    for name, rewrite in PASSES.items():
        if name in without or (name in STATIC and not static):
            continue
        if rewrite(model):
            graph.swept(model)
            done.append(name)
    return done
