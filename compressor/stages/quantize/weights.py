"""Weight-only quantization: weights become int4 or int8 in blocks, what runs through stays float.

The operators are onnxruntime's own, ``com.microsoft.MatMulNBits`` and ``GatherBlockQuantized``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from hashlib import sha256
from typing import TYPE_CHECKING, Literal

import numpy as np

from compressor.stages.graph import DOMAIN, constant, new_constant, swept
from compressor.task import Array

if TYPE_CHECKING:
    import onnx_ir as ir

Bits = Literal[4, 8]
Block = Literal[16, 32, 64, 128, 256]
Level = Literal[1, 4]

BLOCKS: dict[Bits, Block] = {4: 32, 8: 128}
"""Weights that share a scale. On MiniLM's matrices 4 bits keep 22.2 dB in blocks of 32 and 20.2 dB
in blocks of 128; 8 bits keep 44.4 dB in blocks of 128, which multiply 128 rows 1.3 to 1.5 times as
fast as blocks of 32. The whole MiniLM, fidelity and time at 128 tokens beside 31 ms in fp32: 4 bits
8.4 dB and 41 ms (31 ms at level 1), 8 bits 22.7 dB and 28 ms, in blocks of 32 28.5 dB and 36 ms."""

STRETCHES = (1.0, 1.1, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Ranges tried for each block, relative to that from its minimum to its maximum. On MiniLM's
matrices in 4 bits: 21.7 dB with 1.0 alone, 22.2 with all and the scales refitted."""

SLAB = 2**20
"""Weights looked at together; it bounds the memory of the search."""

Packed = tuple["ir.Value", "ir.Value", "ir.Value"]
"""Codes, scales and zero points, as the operators take them."""


def weights(
    model: ir.Model,
    *,
    bits: Bits,
    block: Block | None = None,
    level: Level = 4,
    left: Collection[str] = (),
) -> int:
    """Stores float32 weights as ``bits``-bit integers, in place; returns how many nodes changed.

    MatMul and Gemm with a constant matrix become MatMulNBits, the latter with its alpha, beta and
    bias unless it transposes its first input; Gather of rows of a constant table becomes
    GatherBlockQuantized. ``block`` weights that are summed together (that stand side by side in a
    row of a table) share a float32 scale and an integer zero point, those of the least squared
    error found; ``None`` takes that of :data:`BLOCKS`.

    ``level`` is MatMulNBits' ``accuracy_level``: at 4 what runs through it becomes int8 inside,
    block by block; at 1 it stays float. On one core with AVX512-VNNI, K 384, N 1536, blocks of 32,
    one row takes 88 us in fp32, 27 (4 bits) and 41 (8 bits) at level 4, 56 and 755 below it; 128
    rows take 0.90 ms in fp32, 1.33 and 1.22 at level 4, 1.06 and 1.75 below it. So 1 is only for
    4 bits and many rows.

    Nodes named in ``left`` stay float, and so do recurrent layers, convolutions, weights that are
    not finite and those that would not get smaller.
    """
    size = block or BLOCKS[bits]
    made: dict[tuple[object, ...], Packed] = {}  # equal weights are stored once
    changed = 0
    for node in list(model.graph):
        rows = None if node.name in left else _matrix(node, bits, size)
        if rows is None:
            continue
        value = node.inputs[0 if node.op_type == "Gather" else 1]
        assert value is not None
        rewrite = REWRITES[node.op_type]
        key = (node.op_type, rows.shape, sha256(rows.data).digest())
        if key not in made:
            made[key] = _stored(model, f"{value.name}_{bits}bit", node.op_type, rows, bits, size)
        _replace(node, rewrite(model, node, made[key], rows.shape, bits, size, level))
        changed += 1
    if changed:
        swept(model)
        model.graph.opset_imports[DOMAIN] = 1
    return changed


def matrices(model: ir.Model, *, bits: Bits, block: Block | None = None) -> list[str]:
    """Names of the nodes that :func:`weights` would change, in order."""
    size = block or BLOCKS[bits]
    return [str(node.name) for node in model.graph if _matrix(node, bits, size) is not None]


def coded(rows: Array, bits: int, block: int) -> tuple[Array, Array, Array]:
    """Codes uint8 ``(n, blocks, block)``, float32 scales and uint8 zero points ``(n, blocks)``.

    ``rows`` is finite float32 ``(n, k)``; the last block is filled up with zeros. A code stands for
    ``(code - zero) * scale``. Each range of :data:`STRETCHES` gives codes, those give the scale of
    least squares, and the best is kept.
    """
    count = -(-rows.shape[1] // block)
    step = max(1, SLAB // (count * block))
    parts = [
        _searched(
            np.pad(slab, ((0, 0), (0, count * block - slab.shape[1]))).reshape(-1, count, block),
            2**bits - 1,
        )
        for slab in (rows[at : at + step] for at in range(0, len(rows), step))
    ]
    codes, scales, zeros = map(np.concatenate, zip(*parts, strict=True))
    return codes, scales, zeros


def _searched(blocks: Array, top: int) -> tuple[Array, Array, Array]:
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    span = np.where(high > low, high.astype(np.float64) - low, 1)  # all zeros fit any scale
    zeros = np.rint(-low * (top / span)).astype(np.float32)[..., None]
    unit = (blocks / span[..., None]).astype(np.float32)  # squares of these do not overflow
    best = np.full(low.shape, np.inf, np.float32)
    codes, scales = np.zeros(blocks.shape, np.uint8), np.zeros(low.shape, np.float32)
    for stretch in STRETCHES:
        steps = np.clip(np.rint(unit * np.float32(top / stretch)), -zeros, top - zeros)
        scale = (steps * unit).sum(-1) / np.maximum(np.square(steps).sum(-1), 1)
        errors = np.square(steps * scale[..., None] - unit).sum(-1)
        better = errors < best
        best[better], scales[better] = errors[better], scale[better]
        codes[better] = (steps + zeros)[better].astype(np.uint8)
    return codes, (scales * span).astype(np.float32), zeros[..., 0].astype(np.uint8)


def packed(codes: Array, bits: int) -> Array:
    """uint8, the codes of the last axis side by side in as few bytes as hold them, low bits first.

    >>> packed(np.array([1, 2, 3], np.uint8), 4).tolist()
    [33, 3]
    """
    if bits == 8:
        return codes
    even = np.pad(codes, [*[(0, 0)] * (codes.ndim - 1), (0, codes.shape[-1] % 2)])
    pairs: Array = even[..., 0::2] | even[..., 1::2] << 4
    return pairs


def _matrix(node: ir.Node, bits: Bits, block: int) -> Array | None:
    """The node's matrix as rows of what is summed together; ``None`` where it stays float."""
    if node.domain or node.op_type not in REWRITES:
        return None
    rows = _rows(node, constant(node.inputs[0 if node.op_type == "Gather" else 1]), bits)
    return rows if rows is not None and _shrinks(rows, bits, block) else None


def _shrinks(rows: Array, bits: int, block: int) -> bool:
    count = -(-int(rows.shape[1]) // block)
    return bool(count * (block * bits / 8 + 4 + bits / 8) < 4 * rows.shape[1])


def _rows(node: ir.Node, matrix: Array | None, bits: int) -> Array | None:
    """Finite float32 ``(n, k)``: what is summed together, or one entry of a table, is a row."""
    if matrix is None or matrix.ndim != 2 or matrix.dtype != np.float32:
        return None
    given = node.attributes
    if node.op_type == "Gather":
        # Two 4-bit codes share a byte: a row of odd length would come out longer.
        odd = bits == 4 and matrix.shape[1] % 2
        rows = None if odd or given.get_int("axis", 0) not in (0, -2) else matrix
    elif given.get_int("transA", 0):
        rows = None
    else:
        rows = matrix if given.get_int("transB", 0) else matrix.T
        rows = rows * np.float32(given.get_float("alpha", 1.0))
    return None if rows is None or not np.isfinite(rows).all() else np.ascontiguousarray(rows)


def _stored(
    model: ir.Model, name: str, operator: str, rows: Array, bits: int, block: int
) -> Packed:
    codes, scales, zeros = coded(rows, bits, block)
    if operator == "Gather":  # whose rows are not filled up
        codes = codes.reshape(len(rows), -1)[:, : rows.shape[1]]
    return (
        new_constant(model, f"{name}_codes", packed(codes, bits)),
        new_constant(model, f"{name}_scales", scales),
        new_constant(model, f"{name}_zeros", packed(zeros, bits)),
    )


def _replace(node: ir.Node, made: list[ir.Node]) -> None:
    """Puts nodes in place of one; the last of them makes what it made, under its name."""
    import onnx_ir as ir

    for new in made[:-1]:
        new.outputs[0].name = f"{new.name}_value"
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], made, node.outputs, made[-1].outputs
    )


def _gather(
    model: ir.Model,
    node: ir.Node,
    held: Packed,
    shape: tuple[int, ...],
    bits: int,
    block: int,
    level: int,
) -> list[ir.Node]:
    import onnx_ir as ir

    codes, scales, zeros = held
    given = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": bits}
    inputs = [codes, node.inputs[1], scales, zeros]
    return [ir.node("GatherBlockQuantized", inputs, given, domain=DOMAIN, name=node.name)]


def _multiply(
    model: ir.Model,
    node: ir.Node,
    held: Packed,
    shape: tuple[int, ...],
    bits: int,
    block: int,
    level: int,
) -> list[ir.Node]:
    import onnx_ir as ir

    width, depth = shape
    given = {"N": width, "K": depth, "bits": bits, "block_size": block, "accuracy_level": level}
    inputs: list[ir.Value | None] = [node.inputs[0], *held]
    beta = node.attributes.get_float("beta", 1.0)
    added = node.inputs[2] if len(node.inputs) > 2 and beta else None
    bias = constant(added)
    if bias is not None and (bias.size == 1 or bias.size == width == bias.shape[-1]):
        whole = np.broadcast_to(bias.reshape(-1) * np.float32(beta), (width,))
        inputs += [None, new_constant(model, f"{node.name}_bias", whole)]  # None is a g_idx
        added = None
    made = [ir.node("MatMulNBits", inputs, given, domain=DOMAIN, name=node.name)]
    if added is not None:
        if beta != 1:
            factor = new_constant(model, f"{node.name}_beta", np.array(beta, np.float32))
            made.append(ir.node("Mul", [added, factor], name=f"{node.name}_scaled"))
            added = made[-1].outputs[0]
        made.append(ir.node("Add", [made[0].outputs[0], added], name=f"{node.name}_added"))
    return made


REWRITES: dict[str, Callable[..., list[ir.Node]]] = {
    "Gather": _gather,
    "Gemm": _multiply,
    "MatMul": _multiply,
}
"""Per operator, the nodes for one: ``(model, node, held, (n, k), bits, block, level)``."""
