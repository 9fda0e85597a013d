"""A stand-in for onnxruntime on a machine with CUDA: it claims the provider and adds up in NumPy.

Put this folder's parent in a worker's ``PYTHONPATH``. ``STANDIN_CUDA`` says how CUDA ends:
``fallback`` opens the session on the CPU, as onnxruntime does where a library is missing;
``broken`` raises at the start; anything else works. Nothing here ran on hardware.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def get_available_providers() -> list[str]:
    return [CUDA, CPU]


class SessionOptions:
    intra_op_num_threads = inter_op_num_threads = log_severity_level = 0

    def add_session_config_entry(self, key: str, value: str) -> None:
        pass


class Input(NamedTuple):
    name: str


class OrtValue(NamedTuple):
    array: Any
    device: str

    @staticmethod
    def ortvalue_from_numpy(array: Any, device: str, number: int) -> OrtValue:
        return OrtValue(array, device)


class Binding:
    """Inputs and outputs on the device; the host sees them when it asks for a copy."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.places: dict[str, str] = {}
        self.results: list[Any] = []

    def bind_ortvalue_input(self, name: str, value: OrtValue) -> None:
        self.inputs[name], self.places[name] = value

    def bind_output(self, name: str, device: str) -> None:
        self.places[name] = device

    def synchronize_inputs(self) -> None:
        pass

    def synchronize_outputs(self) -> None:
        pass

    def copy_outputs_to_cpu(self) -> list[Any]:
        return self.results


class InferenceSession:
    """Any file is the model ``x -> [sum of x]``; what it was asked for is what it claims."""

    def __init__(self, path: str, options: SessionOptions, providers: list[str]) -> None:
        self.providers = providers
        if CUDA in providers:
            if os.environ.get("STANDIN_CUDA") == "broken":
                raise RuntimeError("CUDA failure 999: unknown error ; GPU=0")
            if os.environ.get("STANDIN_CUDA") == "fallback":
                self.providers = [CPU]

    def get_providers(self) -> list[str]:
        return self.providers

    def get_inputs(self) -> list[Input]:
        return [Input("x")]

    def get_outputs(self) -> list[Input]:
        return [Input("sum")]

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding) -> None:
        assert binding.places == {"x": "cuda", "sum": "cuda"}, "nothing stays on the host"
        binding.results = self.run(None, binding.inputs)

    def run(self, names: None, feed: dict[str, Any]) -> list[Any]:
        x = feed["x"]
        return [x.reshape(len(x), -1).sum(axis=1, keepdims=True)]
