"""Opening an ONNX file in onnxruntime: the one place where session settings are decided.

Imports nothing but onnxruntime and numpy, so that a worker measures what is shipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.errors import InputError, one_line
from compressor.measurement import PROVIDERS, SETTINGS


class ProviderAbsent(InputError):
    """The execution provider is not in this onnxruntime, or did not start."""


def open_session(
    path: Path,
    provider: str = "cpu",
    threads: int = 1,
    settings: Mapping[str, str] = SETTINGS,
) -> Any:
    """An ``onnxruntime.InferenceSession`` that runs on ``provider`` with ``threads``.

    Raises :class:`ProviderAbsent` rather than falling back to another provider.
    """
    import onnxruntime

    if provider not in PROVIDERS:
        raise ProviderAbsent(f"provider {provider!r}: choose from {', '.join(PROVIDERS)}")
    wanted = PROVIDERS[provider]
    present = onnxruntime.get_available_providers()
    if wanted not in present:
        raise ProviderAbsent(f"onnxruntime here has no {wanted}, only {', '.join(present)}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    chain = [wanted] if wanted == PROVIDERS["cpu"] else [wanted, PROVIDERS["cpu"]]
    opened = onnxruntime.InferenceSession(str(path), options, providers=chain)
    first = opened.get_providers()[0]
    if first != wanted:
        raise ProviderAbsent(f"{wanted} did not start; onnxruntime fell back to {first}")
    return opened


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

    Beside ``best.onnx`` the settings of ``best.json`` are used: the provider, threads and session
    settings under which the recommendation was measured. Any other file gets the CPU, a thread for
    each core that this process may use, and onnxruntime's own settings. Raises :class:`InputError`
    when there is no model at ``path`` or it cannot be opened.
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
