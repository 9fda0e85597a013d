"""PyTorch computes with one thread here: beside busy neighbours two take minutes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    from compressor.measure.threads import one_thread

    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _every_epoch_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.training import loop

    monkeypatch.setattr(loop, "SAVED", 0.0)
