"""Parameters and multiply-accumulates of a PyTorch model."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compressor.task import Inputs


def params(model: nn.Module) -> int:
    """Elements of all parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, examples: Inputs) -> int:
    """Multiply-accumulates of one forward pass over ``examples`` (half of torch's FLOPs).

    Counts convolutions, matrix products and attention; elementwise work is not counted. Leaves
    ``model`` in evaluation mode.
    """
    # Fused kernels hide their products from the counter: recurrent layers in oneDNN, the fast
    # path of TransformerEncoderLayer, attention on the CPU. Convolutions keep oneDNN: without it
    # depthwise ones took up to a minute on a busy machine.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # it warns of Intel GPUs that are not there
            torch.backends.mkldnn.flags(enabled=not recurrent),
            sdpa_kernel(SDPBackend.MATH),
            torch.no_grad(),
            FlopCounterMode(display=False) as counter,
        ):
            model.eval()(*map(torch.from_numpy, examples))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2
