"""What a file is that gives no model as it stands: an inspection that builds and executes nothing.

An ONNX file, weights alone, a pickle of foreign classes, a program with steps of its own. Such an
inspection says in ``needs`` what is missing; what it cannot know without executing is ``None``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from compressor.artifact import digest, zipped
from compressor.errors import InputError
from compressor.loading import checkpoint, onnxfile, onnxtask, pickled, readers, torchfile
from compressor.loading.graph.archive import Archive
from compressor.measure.counting import counted
from compressor.report.table import plain

Document = dict[str, Any]

TRUSTED = "(--trust-pickle)"


def glance(path: Path, why: InputError) -> Document | None:
    """The inspection of the file at ``path``, from which no model could be made because of ``why``.

    ``None`` where that is all there is to say: the file is damaged, or of no known form.
    """
    if not path.is_file():
        return None
    try:
        found = _form(path)
    except InputError:
        return None
    return found and {
        "name": plain(path.stem),
        "file": path.name,
        "sha256": digest(path),
        "executes": [],
        "params": None,
        "macs": None,
        "state_bytes": None,
        "inputs": [],
        "outputs": [],
        "needs": str(why),
        **found,
    }


def _form(path: Path) -> Document | None:
    if path.suffix == onnxfile.SUFFIX:
        return _onnx(path)
    if path.suffix == torchfile.SUFFIX:
        return None if torchfile.header(path) else _weights(path, "safetensors, weights only")
    if checkpoint.entries(path, checkpoint.GRAPH):
        return _program(path)
    held = Archive(path).entries if zipped(path) else {}
    # Of numbers beside a pickle; a file of the older form has all in one.
    numbers = sum(
        one.file_size for name, one in held.items() if name.startswith(("data/", "constants/"))
    )
    if code := [name for name in held if name.startswith("code/") and name.endswith(".py")]:
        return {
            "format": f"TorchScript program, {len(code)} files of code",
            "executes": [f"its own code {TRUSTED}"],
            "state_bytes": numbers,
        }
    if foreign := pickled.foreign(path):
        return {
            "format": "pickled objects of foreign classes",
            "executes": [f"{name} {TRUSTED}" for name in foreign],
            "state_bytes": numbers if held else None,
        }
    return _weights(path, "PyTorch checkpoint, weights only")


def _onnx(path: Path) -> Document:
    import onnx

    found = onnxfile.read(path)
    model = onnx.load(path, load_external_data=False)
    try:
        costs = counted(path, onnxfile.inputs(found, {}, batch=(found.batch or 1,)))
    except InputError:  # an axis is open whose size nobody said
        costs = None
    opsets = {one.domain or "ai.onnx": one.version for one in model.opset_import}
    said = ", ".join(f"{domain} {version}" for domain, version in opsets.items())
    return {
        "format": f"ONNX, opset {said}",
        "params": found.params,
        "macs": costs.macs if costs else None,
        "state_bytes": path.stat().st_size + sum(one.stat().st_size for one in found.companions),
        "inputs": [
            {"name": slot.name, "shape": list(slot.axes or ()), "dtype": slot.dtype}
            for slot in found.slots
        ],
        "operators": dict(
            Counter(node.op_type for node in onnxfile.nodes_of(model.graph, path)).most_common()
        ),
        "needs": f"it can be quantized and measured; to prune and train it, {onnxtask.NEEDED}",
    }


def _program(path: Path) -> Document:
    said, _ = readers.guarded("program", path)
    return {"format": "exported program with steps that cannot be rebuilt", **said}


def _weights(path: Path, form: str) -> Document | None:
    found = readers.read(path)
    if found.source is not None:
        return None
    return {
        "format": form,
        "state_bytes": sum(tensor.nbytes for tensor in found.state.values()),
        "tensors": {
            name: f"{str(tensor.dtype).removeprefix('torch.')} "
            f"{' x '.join(map(str, tensor.shape)) or 'scalar'}"
            for name, tensor in found.state.items()
        },
    }
