"""Convolutions and flattenings in the layout that onnxruntime's 8-bit kernels are quick in.

Only for static 8-bit graphs: in float these make a model slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from compressor.stages import graph
from compressor.stages.quantize.preparing.edit import attribute, emit, only, replace, sizes
from compressor.task import Array

if TYPE_CHECKING:
    import onnx_ir as ir

CHANNELS = 4
"""The 8-bit convolution reads so many input channels at once; with fewer it is several times
slower for its operations."""

BETWEEN = {"AveragePool", "Clip", "HardSwish", "LeakyRelu", "MaxPool", "Relu", "Sigmoid"}
"""Operators through which the layout of a convolution is kept."""


def stem(model: ir.Model) -> int:
    """Gives convolutions of 1 to 4 channels at least 4 of them. Counts the convolutions.

    With stride n the pixels of n x n blocks become channels (SpaceToDepth) and the stride 1:
    kernel 7 of stride 2 becomes 4 on 12 channels for 3. Otherwise 1 to 3 channels are repeated up
    to 4 with zero weights. On AVX512-VNNI the first two layers of ResNet-18 in 8 bits went from
    1.58 to 1.20 ms, those of EfficientNet-lite0's shape from 1.02 to 0.81, MNIST's from 55 to
    47 us. SpaceToDepth is not worth quantizing: onnxruntime drops no Q/DQ around it.
    """
    done = 0
    for node in list(model.graph):
        if node.op_type == "Conv" and not node.domain:
            done += _blocked(model, node) or _widened(model, node)
    return done


def _plain(node: ir.Node) -> tuple[Array, list[int]] | None:
    """Weights and pads of a convolution of few channels over images."""
    weight, shape = graph.constant(node.inputs[1]), sizes(node.inputs[0])
    if weight is None or weight.ndim != 4 or shape is None or len(shape) != 4:
        return None
    if shape[1] != weight.shape[1] or attribute(node, "group", 1) != 1:
        return None
    if any(step != 1 for step in attribute(node, "dilations", (1, 1))):
        return None
    if attribute(node, "auto_pad", "NOTSET") not in {"NOTSET", "VALID"}:
        return None
    return weight, list(attribute(node, "pads", (0, 0, 0, 0)))


def _convolved(
    model: ir.Model,
    node: ir.Node,
    source: ir.Value,
    weight: Array,
    strides: list[int],
    p: list[int],
) -> None:
    """Puts a convolution of other weights and another input in the place of ``node``."""
    assert node.inputs[1] is not None
    held = graph.new_constant(model, f"{node.inputs[1].name}_stem", weight)
    made = emit(
        node,
        "Conv",
        [source, held, *node.inputs[2:]],
        sizes(node.outputs[0]),
        kernel_shape=weight.shape[2:],
        strides=strides,
        pads=p,
    )
    replace(node.outputs[0], made)


def _blocked(model: ir.Model, node: ir.Node) -> bool:
    plain, shape = _plain(node), sizes(node.inputs[0])
    strides = set(attribute(node, "strides", (1, 1)))
    if plain is None or shape is None or len(strides) > 1 or strides == {1}:
        return False
    weight, pads = plain
    (step,) = strides
    batch, channels, *image = shape
    if not isinstance(channels, int) or channels > CHANNELS:
        return False
    widths, ends = [(0, 0), (0, 0)], list[tuple[int, int]]()
    for at, size in enumerate(image):
        if not isinstance(size, int) or size % step:
            return False
        begin, kernel = pads[at], weight.shape[2 + at]
        out = (size + begin + pads[at + 2] - kernel) // step + 1
        # Zero taps before and after, so that the kernel starts and ends with whole blocks.
        before = -begin % step
        after = -(kernel + before) % step
        widths.append((before, after))
        begin = (begin + before) // step
        taps = (kernel + before + after) // step
        ends.append((begin, out - 1 + taps - size // step - begin))
    weight = np.pad(weight, widths)
    outputs, _, *taken = weight.shape
    high, wide = (size // step for size in taken)
    weight = weight.reshape(outputs, channels, high, step, wide, step)
    weight = weight.transpose(0, 3, 5, 1, 2, 4).reshape(outputs, -1, high, wide)
    blocks = [size // step for size in image if isinstance(size, int)]
    assert node.inputs[0] is not None
    source = emit(
        node,
        "SpaceToDepth",
        [node.inputs[0]],
        (batch, step * step * channels, *blocks),
        like=node.inputs[0],
        blocksize=step,
    )
    begins, pasts = zip(*ends, strict=True)
    _convolved(model, node, source, weight, [1, 1], [*begins, *pasts])
    return True


def _widened(model: ir.Model, node: ir.Node) -> bool:
    plain, shape = _plain(node), sizes(node.inputs[0])
    if plain is None or shape is None:
        return False
    weight, pads = plain
    channels = weight.shape[1]
    if channels >= CHANNELS:
        return False
    source = node.inputs[0]
    assert source is not None
    # Which channels are repeated does not matter: their weights are zero.
    index = np.arange(CHANNELS) % channels
    indices = graph.new_constant(model, f"{source.name}_channels", index)
    wide = (shape[0], CHANNELS, *shape[2:])
    more = emit(node, "Gather", [source, indices], wide, like=source, axis=1)
    weight = np.pad(weight, ((0, 0), (0, CHANNELS - channels), (0, 0), (0, 0)))
    _convolved(model, node, more, weight, list(attribute(node, "strides", (1, 1))), pads)
    return True


def flatten(model: ir.Model) -> int:
    """Flattens the image of a convolution channels last, and permutes the weights that follow.

    8-bit convolutions run channels last and are transposed back before a flattening; with the
    same Transpose written here, onnxruntime cancels the two. Counts the flattenings.
    """
    done = 0
    for node in list(model.graph):
        if node.op_type not in {"Flatten", "Reshape"} or node.domain:
            continue
        source, flat = node.inputs[0], node.outputs[0]
        shape, wanted, reader = sizes(source), sizes(flat), only(flat)
        if source is None or shape is None or len(shape) != 4 or reader is None:
            continue
        batch, *image = shape
        if not all(isinstance(size, int) for size in image) or not _convolution(source):
            continue
        channels, high, wide = (int(size) for size in image if isinstance(size, int))
        count = channels * high * wide
        if 1 in {channels, high * wide} or wanted != (batch, count) or reader.inputs[0] is not flat:
            continue
        rows = reader.op_type == "Gemm" and attribute(reader, "transB", 0) == 1
        if reader.op_type not in {"Gemm", "MatMul"} or attribute(reader, "transA", 0):
            continue
        weight = graph.constant(reader.inputs[1])
        if weight is None or weight.ndim != 2 or weight.shape[1 if rows else 0] != count:
            continue
        order = np.arange(count).reshape(channels, high, wide).transpose(1, 2, 0).reshape(-1)
        permuted = weight[:, order] if rows else weight[order]
        assert reader.inputs[1] is not None
        held = graph.new_constant(model, f"{reader.inputs[1].name}_last", permuted)
        last = (batch, high, wide, channels)
        turned = emit(node, "Transpose", [source], last, like=source, perm=(0, 2, 3, 1))
        numbers = graph.new_constant(model, f"{flat.name}_numbers", np.array([-1, count]))
        replace(flat, emit(node, "Reshape", [turned, numbers], wanted))
        reader.replace_input_with(1, held)
        done += 1
    return done


def _convolution(value: ir.Value) -> bool:
    """Whether an image comes out of a convolution, with nothing after it that mixes channels."""
    node = value.producer()
    while node is not None and node.op_type in BETWEEN:
        source = node.inputs[0]
        node = None if source is None else source.producer()
    return node is not None and node.op_type == "Conv"
