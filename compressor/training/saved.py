"""Where training stands after an epoch, on disk, so that a killed one goes on: no pickle.

A safetensors file of every tensor that training moves (weights, best weights, averages, adapters,
the optimiser's state) whose header has the rest as JSON, and a digest over
all of it. Law: training that was killed and went on ends bit for bit as if it had not been.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from compressor.artifact import replacing
from compressor.loading.torchfile import digest_of
from compressor.training.average import Average
from compressor.training.placing import Placed

SUFFIX = ".training"

Tensors = dict[str, Tensor]
Facts = dict[str, Any]


def write(path: Path, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes ``tensors`` (any device) and plain ``facts``; ``key`` says what is being trained."""
    from safetensors.torch import save_file

    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    said = {"key": key, "facts": dict(facts)}
    header = json.dumps({**said, "digest": digest_of(said, held)}, sort_keys=True)
    with replacing(path) as beside:
        save_file(held, beside, metadata={"training": header})


def read(path: Path, key: str) -> tuple[Tensors, Facts] | None:
    """What :func:`write` left under this ``key``; ``None`` where there is nothing that holds.

    A file that is damaged, of another training or of another version is no state to go on from.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {})["training"])
            if said["key"] != key:
                return None
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    digest = said.pop("digest", None)
    return (held, dict(said["facts"])) if digest == digest_of(said, held) else None


def of(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors under names that begin with ``prefix``."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """What :func:`of` put under ``prefix``."""
    start = f"{prefix}/"
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


def moments(optimiser: Optimizer) -> tuple[Tensors, Facts]:
    """An optimiser's state: its tensors, and the plain values beside them."""
    state = optimiser.state_dict()
    tensors: Tensors = {}
    plain: Facts = {}
    for at, entries in state["state"].items():
        for name, value in entries.items():
            (tensors if isinstance(value, Tensor) else plain)[f"{at}/{name}"] = value
    return tensors, {"groups": state["param_groups"], "plain": plain}


def restore(optimiser: Optimizer, tensors: Mapping[str, Tensor], facts: Facts) -> None:
    """Puts back what :func:`moments` gave."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *facts["plain"].items()]:
        at, _, entry = name.partition("/")
        state.setdefault(int(at), {})[entry] = value
    groups = facts["groups"]
    for group in groups:
        # JSON has no tuples.
        if "betas" in group:
            group["betas"] = tuple(group["betas"])
    optimiser.load_state_dict({"state": state, "param_groups": groups})


class Stand(NamedTuple):
    """All that training moves."""

    placed: Placed
    optimiser: Optimizer
    schedule: LRScheduler
    scaler: GradScaler
    average: Average | None
    beside: Sequence[nn.Module]

    def write(
        self, path: Path, key: str, best: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Writes where training stands, the ``best`` weights so far and plain ``facts``."""
        tensors, plain = moments(self.optimiser)
        held = {**of("model", self.placed.inner.state_dict()), **of("best", best)}
        held |= of("optimiser", tensors)
        held |= of("average", self.average.state if self.average else {})
        for at, one in enumerate(self.beside):
            held |= of(f"beside{at}", one.state_dict())
        said = {
            "optimiser": plain,
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "updates": self.average.updates if self.average else 0,
        }
        write(path, key, held, {**said, **facts})

    def restore(self, tensors: Tensors, facts: Facts) -> Tensors:
        """Puts everything back as :meth:`write` found it; gives the best weights."""
        self.placed.put(under("model", tensors))
        for at, one in enumerate(self.beside):
            one.load_state_dict(under(f"beside{at}", tensors))
        restore(self.optimiser, under("optimiser", tensors), facts["optimiser"])
        self.schedule.load_state_dict(facts["schedule"])
        self.scaler.load_state_dict(facts["scaler"])
        if self.average:
            self.average.restore(under("average", tensors), facts["updates"])
        return under("best", tensors)
