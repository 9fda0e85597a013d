"""What onnxruntime's CPU provider computes in 8 bits, and in which codes it is fast there."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

from compressor.measure.environment import cpu

WEIGHTED = ("Conv", "Gemm", "MatMul")
"""Operators with weights and an 8-bit kernel: what quantization is for. ConvTranspose has none."""

COMPUTING = ("Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat", "Sigmoid", "LeakyRelu")
"""Operators without weights that have an 8-bit kernel. QLinearSoftmax is slower than Softmax."""

PASSING = (
    "Expand",
    "Flatten",
    "Identity",
    "MaxPool",
    "Reshape",
    "Resize",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
"""Operators that only move or choose among numbers, which keep their codes. Not SpaceToDepth: codes
would be turned into floats for it."""

CLAMPING = ("Relu", "Clip")
"""Operators that the range of the codes behind them already does."""


@dataclass(frozen=True)
class Codes:
    """Which 8-bit numbers stand for activations and weights.

    ``signed`` activations are int8, others uint8; weights are signed and use ``bits`` bits.
    """

    signed: bool
    bits: int

    @property
    def least(self) -> int:
        """The smallest code of an activation."""
        return -128 if self.signed else 0

    @property
    def largest(self) -> int:
        """The largest code of a weight; the smallest is its negative."""
        return int(2 ** (self.bits - 1)) - 1


def codes(features: Sequence[str] | None = None) -> Codes:
    """The codes that are fast and sound on a CPU with these features, by default on this one.

    x86 multiplies unsigned by signed: with 8-bit dot products (VNNI, AMX) all 8 bits can be used,
    without them pairs of products are added in 16 bits, which 7-bit weights cannot overflow. ARM
    multiplies signed by signed. Where the system names no features (they are read on Linux), its
    architecture decides, and x86 gets 7 bits.
    """
    has = set(cpu()["features"] if features is None else features)
    arm = not has and platform.machine().lower() in ("arm64", "aarch64")
    if {"asimddp", "i8mm"} & has or arm:
        return Codes(signed=True, bits=8)
    return Codes(signed=False, bits=8 if {"avx_vnni", "avx512_vnni", "amx_int8"} & has else 7)
