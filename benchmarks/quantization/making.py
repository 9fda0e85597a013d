"""Makes one quantized file of one model in a process of its own, so that its memory is counted.

``python making.py FOLDER FILE`` prints ``{"path", "companions", "seconds", "peak_bytes", ...}`` as
its last line. Seconds are those of the quantization with its calibration, without imports. Only
what a maker needs is imported: the peers' memory does not hold PyTorch.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import Unsuitable
from compressor.measure.worker import peak_rss_bytes
from compressor.measurement import Target

BATCH = 8
"""Calibration examples that onnxruntime is fed at once."""

Found = dict[str, Any]


@dataclass(frozen=True)
class Given:
    """What a maker gets: the float file, files of calibration data by input, where to write."""

    folder: Path
    into: Path
    feeds: Mapping[str, Path]
    samples: int

    @property
    def source(self) -> str:
        """The float file."""
        return str(self.folder / "fp32.onnx")

    def batches(self, size: int) -> Iterator[dict[str, Any]]:
        """The calibration examples, ``size`` at a time."""
        for start in range(0, self.samples, size):
            yield self.examples(start, min(start + size, self.samples))

    def examples(self, start: int, stop: int) -> dict[str, Any]:
        """Some of them; the files are mapped anew each time, or their pages would stay counted."""
        return {
            name: np.array(np.load(path, mmap_mode="r")[start:stop])
            for name, path in self.feeds.items()
        }


@dataclass(frozen=True)
class File:
    """``make(given)`` writes the file and gives what is worth knowing of it; ``imports`` are the
    modules that it needs, ``versions`` the packages on which it rests, ``models`` those it is for.
    """

    make: Callable[[Given], Found]
    imports: tuple[str, ...]
    versions: tuple[str, ...]
    models: tuple[str, ...] = ()
    batch: int = 0
    """Ours is made for a batch size; 0 stands for any."""


# --- onnxruntime


def _static(given: Given, best: bool) -> Found:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self.batches = given.batches(BATCH)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    flags: dict[str, Any] = {}
    source = given.source
    if best:
        source = _prepared(given)
        flags = {
            "per_channel": True,
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
        }
        if given.folder.name == "minilm":  # the mask's -3e38 would be the range of what it joins
            flags["op_types_to_quantize"] = ["MatMul", "Gemm"]
    quantize_static(source, str(given.into.with_suffix(".onnx")), Reader(), **flags)
    return {}


def _dynamic(given: Given, source: str | None = None) -> Found:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source or _prepared(given),
        str(given.into.with_suffix(".onnx")),
        op_types_to_quantize=["MatMul", "Gemm", "LSTM", "Attention"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        # Types are not inferred through onnxruntime's own operators.
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    return {}


def _prepared(given: Given) -> str:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = given.into.with_suffix(".prepared")
    quant_pre_process(given.source, str(path), skip_symbolic_shape=True)
    return str(path)


def _fused(given: Given) -> Found:
    """Attention is fused only in a graph of the TorchScript exporter."""
    import torch
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    model = torch.load(given.folder / "model.pt", weights_only=False).eval()
    model.encoder.set_attn_implementation("eager")
    path = given.into.with_suffix(".prepared")
    names = list(given.feeds)
    with torch.no_grad():
        torch.onnx.export(
            model,
            tuple(map(torch.from_numpy, given.examples(0, 2).values())),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=["embedding"],
            dynamic_axes={name: {0: "batch"} for name in [*names, "embedding"]},
        )
    options = FusionOptions("bert")
    options.enable_skip_layer_norm = False
    config = model.encoder.config
    fused = optimizer.optimize_model(
        str(path),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        optimization_options=options,
        opt_level=0,
    )
    fused.save_model_to_file(str(path))
    _dynamic(given, str(path))
    return {"fused": fused.get_fused_operator_statistics()}


# --- NNCF


def _nncf(given: Given, preset: str, openvino: bool) -> Found:
    """Post-training quantization with fast bias correction, NNCF's default."""
    import nncf  # type: ignore[import-not-found]

    transformer = nncf.ModelType.TRANSFORMER if given.folder.name == "minilm" else None
    quantized = partial(
        nncf.quantize,
        calibration_dataset=nncf.Dataset(
            range(given.samples), lambda at: given.examples(at, at + 1)
        ),
        preset=nncf.QuantizationPreset(preset),
        subset_size=given.samples,
        model_type=transformer,
    )
    if openvino:
        import openvino as runtime

        path = given.into.with_suffix(".xml")
        model = quantized(runtime.Core().read_model(given.source))
        runtime.save_model(model, str(path), compress_to_fp16=False)
        return {"path": path.name, "companions": [path.with_suffix(".bin").name]}
    import onnx

    onnx.save(quantized(onnx.load(given.source)), str(given.into.with_suffix(".onnx")))
    return {}


# --- ours


def _ours(given: Given, scheme: Any, target: Target, budget: float = math.inf) -> Found:
    import models

    from compressor.stages.quantize import quantize

    task = replace(models.task_of(given.folder), target=target, budget=budget)
    made = quantize(
        models.source(given.folder),
        task,
        given.into,
        scheme=scheme,
        samples=given.samples,
        synthetic=task.splits is None,
    )
    return {"step": made.steps[-1], "companions": [path.name for path in made.companions]}


ORT = ("onnxruntime",)
NNCF = ("nncf", "openvino")

FILES: dict[str, File] = {
    "ort-static": File(partial(_static, best=False), ("onnxruntime.quantization",), ORT),
    "ort-static-best": File(partial(_static, best=True), ("onnxruntime.quantization",), ORT),
    "ort-dynamic": File(_dynamic, ("onnxruntime.quantization",), ORT),
    "ort-fused": File(
        _fused,
        (
            "onnxruntime.quantization",
            "onnxruntime.transformers.optimizer",
            "transformers",
            "models",
        ),
        (*ORT, "torch", "transformers"),
        ("minilm",),
    ),
    **{
        f"nncf{'' if preset == 'performance' else '-mixed'}{'-openvino' if openvino else ''}": File(
            partial(_nncf, preset=preset, openvino=openvino), ("nncf", "onnx", "openvino"), NNCF
        )
        for preset in ("performance", "mixed")
        for openvino in (False, True)
    },
    **{
        f"ours-{scheme}{'' if runtime == 'onnxruntime' else '-openvino'}-{batch}": File(
            partial(_ours, scheme=scheme, target=Target(runtime=runtime, batch=batch)),
            ("models", "compressor.stages.quantize"),
            ("torch", "onnxruntime", "onnx", "onnx_ir"),
            batch=batch,
        )
        for scheme, runtime in (
            ("dynamic", "onnxruntime"),
            ("static", "onnxruntime"),
            ("static", "openvino"),
        )
        for batch in (1, 32)
    },
    "ours-budget-1": File(
        partial(_ours, scheme="static", target=Target(), budget=0.01),
        ("models", "compressor.stages.quantize"),
        ("torch", "onnxruntime", "onnx", "onnx_ir"),
        ("cnn", "efficientnet-lite0"),
        batch=1,
    ),
}
"""What can be made of a model, by name."""


def main() -> None:
    """Makes ``FOLDER/FILE`` and prints what came of it."""
    # Both NNCF and OpenVINO report to their makers where this package can be imported.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    folder, name = Path(sys.argv[1]), sys.argv[2]
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    feeds = {
        given["name"]: folder / f"calibrate-{at}.npy" for at, given in enumerate(about["inputs"])
    }
    file = FILES[name]
    for module in file.imports:
        importlib.import_module(module)
    before = peak_rss_bytes()
    into = folder / name
    start = time.perf_counter()
    try:
        found = file.make(Given(folder, into, feeds, about["samples"]))
    except Unsuitable as error:
        print(json.dumps({"failed": str(error)}))
        return
    seconds = time.perf_counter() - start
    into.with_suffix(".prepared").unlink(missing_ok=True)
    found = {"path": f"{name}.onnx", "companions": []} | found
    peak = {"seconds": seconds, "peak_bytes": peak_rss_bytes(), "imported_bytes": before}
    print(json.dumps(found | peak, default=str))


if __name__ == "__main__":
    main()
