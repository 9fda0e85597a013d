"""The CNN against its own 8-bit form, side by side: what ``variants`` stores for the gate."""

from __future__ import annotations

from pathlib import Path

from compressor.artifact import Artifact
from compressor.plugin import Variants
from compressor.stages import STAGES
from compressor.task import Task


def test_dynamic(variants: Variants, task: Task, onnx_form: Artifact, into: Path) -> None:
    """Batch 1, one thread; the row has the calls of the 8-bit model."""
    int8 = STAGES["quantize"](onnx_form, task, into, scheme="dynamic")
    rows = variants({"fp32": onnx_form, "int8-dynamic": int8}, task.examples(1))
    assert not rows or set(rows) == {"fp32", "int8-dynamic"}
