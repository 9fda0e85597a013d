"""What a file is that gives no model as it stands: an inspection that builds and executes nothing.

An ONNX file, weights alone, a pickle of foreign classes, a program with steps of its own. Such an
inspection says in ``needs`` what is missing; what it cannot know without executing is ``None``. The
file is read in the guard's child.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor import guard
from compressor.artifact import digest, zipped
from compressor.errors import InputError
from compressor.loading import checkpoint, listed, onnxfile, onnxtask, torchfile
from compressor.loading.graph.archive import Archive
from compressor.loading.graph.program import program
from compressor.measure.counting import counted

Document = dict[str, Any]

TRUSTED = "(--trust-pickle)"

BUILT = "compressor."
"""What the factories begin with that a file may name."""


def glance(path: Path, why: InputError) -> Document | None:
    """The inspection of the file at ``path``, from which no model could be made because of ``why``.

    ``None`` where that is all there is to say: the file is damaged, or of no known form. Raises
    :class:`InputError` for an ONNX file that is.
    """
    if not path.is_file():
        return None
    try:
        found, _ = guard.guarded(f"{__name__}:look", path, imports=("onnxscript",))
    except InputError:
        if path.suffix == onnxfile.SUFFIX:
            raise
        return None
    return {
        "name": path.stem,
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


def look(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """What there is to say of ``path``, by the form that it has. For a child of the guard: a file
    may be made to take long, or much memory. Raises :class:`InputError` for one of no known form.
    """
    if path.suffix == onnxfile.SUFFIX:
        return _onnx(path), {}
    if path.suffix == torchfile.SUFFIX:
        return _weights(path, "safetensors"), {}
    foreign = listed.read(path)[0]["foreign"]
    # Of TorchScript's classes the code is its own.
    executes = [f"{name} {TRUSTED}" for name in foreign if not name.startswith("__torch__.")]
    if checkpoint.entries(path, checkpoint.GRAPH):
        return {**_program(path), "executes": executes}, {}
    code = checkpoint.entries(path, "/code/")
    if code or foreign:
        held = Archive(path).entries if zipped(path) else {}
        # Of numbers beside a pickle; a file of the older form has all in one.
        numbers = [
            one.file_size for name, one in held.items() if name.startswith(("data/", "constants/"))
        ]
        return {
            "format": "TorchScript program" if code else "pickled objects of foreign classes",
            "executes": [*([f"its own code {TRUSTED}"] if code else []), *executes],
            "state_bytes": sum(numbers) if held else None,
        }, {}
    return _weights(path, "PyTorch checkpoint"), {}


def _onnx(path: Path) -> Document:
    import onnx

    found = onnxfile.read(path)
    model = onnx.load(path, load_external_data=False)
    costs = None
    with suppress(InputError):  # an axis is open whose size nobody said
        costs = counted(path, onnxfile.inputs(found, {}, batch=(found.batch or 1,)))
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
    """What an exported program takes and which steps it has, also where it cannot be rebuilt."""
    archive = Archive(path)
    model = next(name for name in archive.entries if name.startswith("models/"))
    steps = Counter(
        str(node["target"]).removeprefix("torch.ops.")
        for node in archive.json(model)["graph_module"]["graph"]["nodes"]
    )
    said: Document = {
        "format": "exported program with steps that cannot be rebuilt",
        "operators": dict(steps.most_common()),
    }
    with suppress(InputError):  # of steps with graphs in them
        found = program(archive)
        said["inputs"] = [
            {
                "name": one.name,
                "shape": [
                    size if name is None else "batch" if at == 0 else "?"
                    for at, (name, size) in enumerate(zip(one.varies, one.sizes, strict=True))
                ],
                "dtype": str(one.dtype).removeprefix("torch."),
            }
            for one in found.given
        ]
        # Tied weights are one tensor.
        weights = {
            (one.tensor.data_ptr(), tuple(one.tensor.shape)): one for one in found.weights.values()
        }.values()
        said["params"] = sum(one.tensor.numel() for one in weights if one.parameter)
        said["state_bytes"] = sum(one.tensor.nbytes for one in weights)
    return said


def _weights(path: Path, form: str) -> Document:
    """Tensors, of a file that may name the function that builds their model."""
    head = torchfile.header(path) if path.suffix == torchfile.SUFFIX else None
    if head is not None:
        source, state = head["source"], torchfile.tensors_in(path, head)
    else:
        found = checkpoint.read(path)
        source, state = found.source, found.state
    if source and source["factory"].startswith(BUILT):
        raise InputError(f"{path} names what builds its model")  # so something else is missing
    return {
        "format": f"{form} that describes itself" if source else f"{form}, weights only",
        "factory": source["factory"] if source else None,
        "executes": [f"{source['factory']} (--arch)"] if source else [],
        "state_bytes": sum(tensor.nbytes for tensor in state.values()),
        "tensors": {
            name: f"{str(tensor.dtype).removeprefix('torch.')} "
            f"{' x '.join(map(str, tensor.shape)) or 'scalar'}"
            for name, tensor in state.items()
        },
    }
