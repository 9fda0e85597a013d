"""Opening a model's file in a runtime: the one place where session settings are decided.

Imports nothing but that runtime and numpy, so that a worker measures what is shipped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compressor.errors import InputError, one_line
from compressor.measurement import OPENVINO, PROVIDERS, SETTINGS

if TYPE_CHECKING:
    from compressor.measure.torchrun import Torch


class ProviderAbsent(InputError):
    """The runtime or its provider is not here, or did not start."""


def open_session(
    path: Path,
    provider: str = "cpu",
    threads: int = 1,
    settings: Mapping[str, str] | None = None,
    disabled: Sequence[str] = (),
    runtime: str = "onnxruntime",
    arch: str | None = None,
    inputs: int = 1,
) -> Any:
    """A session of ``runtime`` on ``provider`` with ``threads``: ``get_inputs`` and ``run``.

    It is an ``onnxruntime.InferenceSession``, an :class:`OpenVino` or a
    :class:`~compressor.measure.torchrun.Torch`. ``settings`` are the runtime's own, by default
    those that every row is measured with; ``disabled`` names graph optimizers of onnxruntime that
    are left out. ``arch`` and ``inputs`` are what a torch file does not say: the factory that was
    given for a model that is not in the zoo, and how many arrays the model takes. Raises
    :class:`ProviderAbsent` rather than falling back to another runtime or provider.
    """
    if runtime not in RUNTIMES:
        raise ProviderAbsent(f"runtime {runtime!r}: choose from {', '.join(RUNTIMES)}")
    asked = Asked(path, provider, threads, settings, disabled, arch, inputs)
    return RUNTIMES[runtime].open(asked)


class Asked(NamedTuple):
    """What :func:`open_session` was asked for."""

    path: Path
    provider: str
    threads: int
    settings: Mapping[str, str] | None
    disabled: Sequence[str]
    arch: str | None
    inputs: int


def _onnxruntime(asked: Asked) -> Any:
    import onnxruntime

    provider, settings, disabled = asked.provider, asked.settings, asked.disabled
    if provider not in PROVIDERS:
        raise ProviderAbsent(f"provider {provider!r}: choose from {', '.join(PROVIDERS)}")
    wanted = PROVIDERS[provider]
    present = onnxruntime.get_available_providers()
    if wanted not in present:
        raise ProviderAbsent(f"onnxruntime here has no {wanted}, only {', '.join(present)}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = asked.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in (SETTINGS if settings is None else settings).items():
        options.add_session_config_entry(key, value)
    chain = [wanted] if wanted == PROVIDERS["cpu"] else [wanted, PROVIDERS["cpu"]]
    without = {"disabled_optimizers": list(disabled)} if disabled else {}
    opened = onnxruntime.InferenceSession(str(asked.path), options, providers=chain, **without)
    first = opened.get_providers()[0]
    if first != wanted:
        raise ProviderAbsent(f"{wanted} did not start; onnxruntime fell back to {first}")
    return opened


class Input(NamedTuple):
    """An input of a model as onnxruntime describes it, as far as we ask."""

    name: str


class OpenVino:
    """An ONNX file compiled by OpenVINO, with the two calls of onnxruntime's session that we use.

    ``settings`` are those that it was compiled with, ``threads`` apart. ``profile`` makes it count
    the time of each node; :attr:`request` has the counts.
    """

    def __init__(
        self,
        path: Path,
        threads: int = 1,
        settings: Mapping[str, str] | None = None,
        profile: bool = False,
    ) -> None:
        core = import_openvino().Core()
        model = core.read_model(str(path))
        if settings is None:
            # By itself it takes bf16 where the CPU has it: other numbers than the file's.
            outputs = (output for node in model.get_ops() for output in node.outputs())
            types = {output.get_element_type().get_type_name() for output in outputs}
            precision = next((half for half in ("f16", "bf16") if half in types), "f32")
            settings = {**OPENVINO, "INFERENCE_PRECISION_HINT": precision}
        self.settings = dict(settings)
        asked: dict[str, Any] = {**settings, "INFERENCE_NUM_THREADS": threads}
        if profile:
            asked["PERF_COUNT"] = True
        compiled = core.compile_model(model, "CPU", asked)
        self.request = compiled.create_infer_request()
        self._inputs = [Input(given.any_name) for given in compiled.inputs]

    def get_inputs(self) -> list[Input]:
        """The inputs, in the file's order."""
        return self._inputs

    def run(self, names: None, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """All outputs for one batch, each a copy of its own."""
        return list(self.request.infer([feed[given.name] for given in self._inputs]).to_tuple())


def _openvino(asked: Asked) -> OpenVino:
    if asked.provider != "cpu":
        raise ProviderAbsent(f"provider {asked.provider!r} of OpenVINO: only cpu is supported")
    return OpenVino(asked.path, asked.threads, asked.settings)


def _eager(asked: Asked) -> Torch:
    from compressor.measure.torchrun import Torch

    return Torch(asked.path, asked.provider, asked.threads, "eager", asked.arch, asked.inputs)


def _compile(asked: Asked) -> Torch:
    from compressor.measure.torchrun import Torch

    return Torch(asked.path, asked.provider, asked.threads, "compile", asked.arch, asked.inputs)


def import_onnxruntime() -> Any:
    """The module."""
    import onnxruntime

    return onnxruntime


def import_openvino() -> Any:
    """The module, which finds no telemetry to start: without that package it uses a stub.

    Raises :class:`ProviderAbsent` where OpenVINO is not installed.
    """
    telemetry = "openvino_telemetry"
    hidden = telemetry not in sys.modules
    if hidden:
        sys.modules[telemetry] = None  # type: ignore[assignment]  # an import of it fails
    try:
        import openvino
    except ModuleNotFoundError as error:
        from compressor.measure.environment import NO_OPENVINO

        raise ProviderAbsent(NO_OPENVINO) from error
    finally:
        if hidden:
            del sys.modules[telemetry]
    return openvino


def import_torch() -> Any:
    """The module that opens torch files, and PyTorch with it."""
    from compressor.measure import torchrun

    return torchrun


def import_compiler() -> Any:
    """The same with what compiles: two seconds that are not the model's."""
    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401

    return import_torch()


class Runtime(NamedTuple):
    """How a runtime is imported, and how it opens a file."""

    module: Callable[[], Any]
    open: Callable[[Asked], Any]


RUNTIMES = {
    "onnxruntime": Runtime(import_onnxruntime, _onnxruntime),
    "openvino": Runtime(import_openvino, _openvino),
    "torch": Runtime(import_torch, _eager),
    "torch-compile": Runtime(import_compiler, _compile),
}


class Session:
    """A model that predicts: call it with one array per input, batch axis first.

    Returns the output array, or a tuple of them where the model has several.
    """

    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self._names = [given.name for given in opened.get_inputs()]

    def __call__(self, *inputs: NDArray[Any]) -> Any:
        if len(inputs) != len(self._names):
            raise InputError(
                f"the model takes {len(self._names)} inputs ({', '.join(self._names)}), "
                f"{len(inputs)} were given"
            )
        feed = {name: np.asarray(x) for name, x in zip(self._names, inputs, strict=True)}
        outputs = self._opened.run(None, feed)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def session(path: str | Path) -> Session:
    """Loads ``best.onnx`` of a run folder, or any ONNX file, ready to predict.

    Beside ``best.onnx`` the settings of ``best.json`` are used: the runtime, provider, threads and
    session settings under which the recommendation was measured. Any other file gets onnxruntime on
    the CPU with its own settings, and a thread for each core that this process may use. Raises
    :class:`InputError` when there is no model at ``path`` or it cannot be opened.
    """
    from compressor.measure.environment import cores  # here: a worker has no use for it

    path = Path(path)
    model = path / "best.onnx" if path.is_dir() else path
    if not model.is_file():
        raise InputError(f"{model} does not exist: give a run folder or an ONNX file")
    said = _best(model.with_suffix(".json")) if model.name == "best.onnx" else {}
    try:
        opened = open_session(
            model,
            said.get("provider", "cpu"),
            said.get("threads", cores()),
            said.get("settings", {}),
            said.get("disabled", ()),
            said.get("runtime", "onnxruntime"),
        )
    except InputError:
        raise
    except Exception as error:  # onnxruntime's own have no base of their own
        raise InputError(f"{model} cannot be opened: {one_line(error)}") from error
    return Session(opened)


def _best(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} does not hold a run's settings: {one_line(error)}") from error
