"""PyTorch as a runtime: a torch-form artifact in eager mode, or after ``torch.compile``.

So that a report shows what leaving PyTorch brings. Importing this imports torch, which a worker
does for these rows only.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from compressor.loading import load, torchfile
from compressor.loading.formats import LIVE, PICKLED
from compressor.loading.task import tensors
from compressor.measure.runtime import Input, ProviderAbsent

Mode = Literal["eager", "compile"]


class Torch:
    """A model in PyTorch, with the two calls of onnxruntime's session that we use.

    ``path`` is a torch-form artifact or any other file that :func:`compressor.load` reads, ``arch``
    the factory that was given for a model that is not in the zoo, ``inputs`` how many arrays the
    model is called with, in the order of its arguments. ``provider`` is ``cpu`` or ``cuda``.

    With ``compile`` the first call of each shape compiles, in default mode and from nothing: no
    cache of an earlier process shortens it. :attr:`settings` are for the report.

    Threads wait busily for a few milliseconds after a call, as PyTorch does by itself: made to
    sleep (``OMP_WAIT_POLICY=PASSIVE``) ResNet-20 took four times as long with two threads.

    Raises :class:`ProviderAbsent` where PyTorch has no such device or no compiler, and for a model
    that no other process can build.
    """

    def __init__(
        self,
        path: Path,
        provider: str = "cpu",
        threads: int = 1,
        mode: Mode = "eager",
        arch: str | None = None,
        inputs: int = 1,
    ) -> None:
        _check_device(provider)
        if mode == "compile" and provider == "cpu":
            _check_compiler()
        if arch is None:
            _check_source(path)
        torch.set_num_threads(threads)
        with suppress(RuntimeError):  # can be said once in a process, before any work
            torch.set_num_interop_threads(1)
        self.settings = {"mode": mode, "interop_threads": str(torch.get_num_interop_threads())}
        names = ["input"] if inputs == 1 else [f"input_{at}" for at in range(inputs)]
        self._inputs = [Input(name) for name in names]
        self._device = torch.device(provider)
        model = load(path, arch).requires_grad_(False).to(self._device)
        self._model = torch.compile(model, backend=inductor) if mode == "compile" else model

    def get_inputs(self) -> list[Input]:
        """The inputs, in the order of the model's arguments."""
        return self._inputs

    @torch.inference_mode()
    def run(self, names: None, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """All output tensors for one batch, once they are on the host."""
        given = (self._tensor(feed[one.name]) for one in self._inputs)
        try:
            outputs = tensors(self._model(*given))
        except RuntimeError as error:
            # A C++ compiler's goes on with its whole command line, which says where things lie.
            raise RuntimeError(" ".join(str(error).splitlines()[:2]).strip()) from error
        return [output.cpu().numpy() for output in outputs]

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        # A model may change its input in place, which must not reach a file that is only mapped.
        here = torch.from_numpy(array if array.flags.writeable else array.copy())
        return here.to(self._device)


def _check_device(provider: str) -> None:
    if provider not in ("cpu", "cuda"):
        raise ProviderAbsent(f"provider {provider!r} of PyTorch: only cpu and cuda are supported")
    if provider == "cuda" and not torch.cuda.is_available():
        raise ProviderAbsent("PyTorch finds no GPU of CUDA here")


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ProviderAbsent(
            "torch.compile needs a C++ compiler and finds none: install g++ or set CXX"
        ) from None


def _check_source(path: Path) -> None:
    said = torchfile.header(path) if path.suffix == torchfile.SUFFIX else None
    if said is not None and said["source"]["factory"].startswith((LIVE, PICKLED)):
        raise ProviderAbsent(
            "the model was handed in as an object, which no other process can build: hand in its "
            "file and --arch PKG.MOD:FACTORY"
        )


def inductor(graph: Any, examples: Any) -> Any:
    """Inductor as it is by default, its cache empty and gone afterwards, no headers kept."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        # The headers' cache lies elsewhere. Without it the first call took no longer.
        return compile_fx(graph, examples, config_patches={"cpp_cache_precompile_headers": False})
