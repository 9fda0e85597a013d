"""Rounding weights by what the layer does to its data, column by column.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", after Hassibi & Stork's optimal brain surgeon: the error of a rounded column is
made good by the columns that are still to be rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from compressor.stages.quantize.qdq import nearest
from compressor.task import Array

if TYPE_CHECKING:
    import onnx_ir as ir

    from compressor.stages.quantize.kernels import Codes

DAMPING = 0.01
"""Of the mean of the Hessian's diagonal, added to it: inputs that never vary have no inverse."""

WIDTH = 1024
"""Columns that make good for each other: time grows with its square."""

BLOCK = 128
"""Columns after which the rest of the weight is updated at once."""


def columns(node: ir.Node, inputs: Array, rows: int, seed: int = 0) -> Array:
    """Samples of what every output of a layer sums over: ``(groups, rows, inputs of one)``.

    ``inputs`` is what the layer reads, its first axis examples: ``(n, channels, *space)`` for a
    Conv, of which patches are cut as its attributes say, ``(..., channels)`` for Gemm and MatMul.
    At most ``rows`` of them, drawn with ``seed``.
    """
    rng = np.random.default_rng(seed)
    if node.op_type != "Conv":
        flat = inputs.reshape(-1, inputs.shape[-1])
        return _drawn(flat, rows, rng)[None]
    kernel = node.inputs[1].shape  # type: ignore[union-attr]
    assert kernel is not None
    sizes, space = [int(size) for size in kernel[2:]], inputs.ndim - 2  # type: ignore[arg-type]

    def given(name: str, default: list[int]) -> list[int]:
        return list(node.attributes[name].as_ints()) if name in node.attributes else default

    dilations, strides = given("dilations", [1] * space), given("strides", [1] * space)
    wide = [(size - 1) * step + 1 for size, step in zip(sizes, dilations, strict=True)]
    pads = given("pads", [0] * 2 * space)
    if "auto_pad" in node.attributes and "SAME" in node.attributes["auto_pad"].as_string():
        pads = _same(inputs.shape[2:], wide, strides, node.attributes["auto_pad"].as_string())
    around = [(0, 0), (0, 0), *zip(pads[:space], pads[space:], strict=True)]
    padded = np.pad(inputs, around)
    steps = tuple(
        [slice(None)] * 2
        + [slice(None, None, step) for step in strides]
        + [slice(None, None, step) for step in dilations]
    )
    axes = tuple(range(2, 2 + space))
    seen = np.lib.stride_tricks.sliding_window_view(padded, wide, axes)[steps]
    places = np.moveaxis(seen, 1, 1 + space)  # examples, space, channels, kernel
    many = int(np.prod(places.shape[: 1 + space]))
    drawn = rng.choice(many, min(rows, many), replace=False)
    patches = places[np.unravel_index(np.sort(drawn), places.shape[: 1 + space])]
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    return np.ascontiguousarray(
        np.moveaxis(patches.reshape(len(patches), groups, -1), 1, 0), dtype=np.float32
    )


def rounded(weight: Array, scale: Array, axis: int, samples: Array, codes: Codes) -> Array:
    """``weight`` as int8 codes, so that ``samples @ weight`` changes least.

    ``scale`` has the step of every output channel, which are ``axis`` of ``weight``; a Conv's
    weight is ``(outputs, inputs of a group, *kernel)``, of axis 0. ``samples`` are
    ``(groups, rows, inputs)`` from :func:`columns`, best as the quantized network sees them. Half
    of the rows (every other one) fit the rounding, the other half judge it: an output channel for
    which it is not better than nearest rounding is rounded to the nearest.

    AdaRound (Nagel et al. 2020) lowers the same error by gradient descent between the two nearest
    codes; this is one elimination, has no step size and no seed, and may go to further codes.
    """
    plain = nearest(weight, scale, axis, codes)
    front = np.moveaxis(weight, axis, 0)
    groups = len(samples)
    rows = front.reshape(groups, len(scale) // groups, -1).astype(np.float64)
    steps = scale.astype(np.float64).reshape(groups, -1, 1)
    fit, judge = samples[:, ::2].astype(np.float64), samples[:, 1::2].astype(np.float64)
    if not fit.any() or not judge.size:
        return plain
    found = np.empty_like(rows)
    for start in range(0, rows.shape[-1], WIDTH):
        part = slice(start, start + WIDTH)
        found[:, :, part] = _compensated(rows[:, :, part], steps, fit[:, :, part], codes.largest)
    near = np.moveaxis(plain, axis, 0).reshape(rows.shape)

    def error(integers: Array) -> Array:
        away = (integers * steps - rows) @ np.swapaxes(judge, 1, 2)
        return np.asarray(np.square(away).sum(-1, keepdims=True))

    chosen = np.where(error(found) < error(near), found, near).astype(np.int8)
    return np.ascontiguousarray(np.moveaxis(chosen.reshape(front.shape), 0, axis))


def _compensated(rows: Array, steps: Array, samples: Array, largest: int) -> Array:
    """Integers for ``rows`` ``(groups, outputs, inputs)``, column after column."""
    width = rows.shape[-1]
    hessian = np.swapaxes(samples, 1, 2) @ samples
    power = np.einsum("gii->gi", hessian)
    # Columns of much power come first, while there are many left to make their error good.
    order = np.argsort(-power, axis=1, kind="stable")
    back = np.argsort(order, axis=1, kind="stable")
    hessian = np.take_along_axis(hessian, order[:, :, None], 1)
    hessian = np.take_along_axis(hessian, order[:, None, :], 2)
    damping = np.maximum(DAMPING * power.mean(1), np.finfo(np.float64).tiny)
    hessian += damping[:, None, None] * np.eye(width)
    upper = np.swapaxes(np.linalg.cholesky(np.linalg.inv(hessian)), 1, 2)
    left = np.take_along_axis(rows, order[:, None, :], 2)
    found = np.empty_like(left)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        wrong = np.empty_like(left[:, :, start:stop])
        for at in range(start, stop):
            column = left[:, :, at : at + 1]
            integers = np.clip(np.rint(column / steps), -largest, largest)
            found[:, :, at : at + 1] = integers
            error = (column - integers * steps) / upper[:, at : at + 1, at : at + 1]
            left[:, :, at:stop] -= error * upper[:, at : at + 1, at:stop]
            wrong[:, :, at - start : at - start + 1] = error
        left[:, :, stop:] -= wrong @ upper[:, start:stop, stop:]
    return np.take_along_axis(found, back[:, None, :], 2)


def _drawn(rows: Array, count: int, rng: np.random.Generator) -> Array:
    if len(rows) <= count:
        return rows.astype(np.float32)
    return rows[np.sort(rng.choice(len(rows), count, replace=False))].astype(np.float32)


def _same(sizes: tuple[int, ...], wide: list[int], strides: list[int], kind: str) -> list[int]:
    """Pads of ``auto_pad``: all those before, then all those after."""
    many = [
        max((-(-size // step) - 1) * step + width - size, 0)
        for size, width, step in zip(sizes, wide, strides, strict=True)
    ]
    less, more = [pad // 2 for pad in many], [pad - pad // 2 for pad in many]
    return less + more if kind == "SAME_UPPER" else more + less
