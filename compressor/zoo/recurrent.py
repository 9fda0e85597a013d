"""Recurrent classifiers: LSTM (Hochreiter and Schmidhuber 1997) and GRU (Cho et al. 2014)."""

from __future__ import annotations

from torch import Tensor, nn

from compressor.zoo.argument import Size


class Recurrent(nn.Module):
    """Reads ``(batch, steps, features)`` and classifies from the last step's hidden state."""

    def __init__(self, cell: nn.LSTM | nn.GRU, classes: int) -> None:
        super().__init__()
        self.rnn = cell
        self.head = nn.Linear(cell.hidden_size, classes)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.rnn(x)[0]
        logits: Tensor = self.head(states[:, -1])
        return logits


def lstm(features: Size, classes: Size, hidden: Size = 64, layers: Size = 1) -> nn.Module:
    """LSTM classifier: float32 ``(batch, steps, features)`` to logits ``(batch, classes)``."""
    return Recurrent(nn.LSTM(features, hidden, layers, batch_first=True), classes)


def gru(features: Size, classes: Size, hidden: Size = 64, layers: Size = 1) -> nn.Module:
    """GRU classifier: float32 ``(batch, steps, features)`` to logits ``(batch, classes)``."""
    return Recurrent(nn.GRU(features, hidden, layers, batch_first=True), classes)
