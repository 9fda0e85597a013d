"""The public surface, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import compressor


def test_all_names_exist_and_are_sorted() -> None:
    assert compressor.__all__ == sorted(compressor.__all__)
    for name in compressor.__all__:
        assert getattr(compressor, name) is not None


def test_importing_is_light() -> None:
    code = (
        "import sys, compressor, compressor.cli, compressor.report\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'torch_pruning', 'matplotlib', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
