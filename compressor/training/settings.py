"""How to train: the settings that every stage that trains has."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from compressor.errors import InputError

Share = Annotated[float, Field(ge=0, lt=1)]
Amount = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Training:
    """How to train. A stage that trains has these among its settings, by the same names.

    - ``epochs`` of ``None``: as many as show about 60,000 examples.
    - ``batch_size`` is that of a step, over all processes together; ``accumulate`` adds up the
      gradients of so many steps before the weights move.
    - ``momentum`` is of sgd, nesterov and rmsprop. ``weight_decay`` is L2 (decoupled with adamw).
    - ``warmup`` is the share of training in which the rate rises.
    - ``patience`` ends training after so many epochs without a better metric on validate.
    - ``smoothing`` is of labels (Szegedy et al. 2016); ``mixup`` and ``cutmix`` are the alphas of
      their Beta distributions, 0 for none.
    - ``clip`` bounds the norm of the gradient.
    - ``ema`` is the decay of averaged weights, which then are those that are judged and stay
      (Polyak and Juditsky 1992); 0 for none.
    - ``augment`` names what :mod:`compressor.training.augment` has, or functions of the user's own
      that stand on the command line.
    - ``precision`` is that of autocast: ``bf16`` anywhere, ``fp16`` with a loss scale on CUDA
      (Micikevicius et al. 2018).
    - ``device`` ``auto`` is CUDA where there is one.
    - ``shard`` spreads weights and optimiser over the processes (FSDP) instead of giving each a
      copy.
    - ``workers`` read data ahead; ``None``: none for data in memory.
    """

    epochs: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    batch_size: Annotated[int, Field(ge=2)] = 64
    optimizer: Literal["adam", "adamw", "sgd", "nesterov", "rmsprop"] = "adam"
    momentum: Share = 0.9
    weight_decay: Amount = 0.0
    l1: Amount = 0.0
    schedule: Literal["one-cycle", "cosine", "step", "exponential", "constant"] = "one-cycle"
    warmup: Share = 0.2
    patience: Annotated[int, Field(ge=1)] | None = None
    smoothing: Share = 0.0
    mixup: Amount = 0.0
    cutmix: Amount = 0.0
    clip: Annotated[float, Field(gt=0)] | None = None
    accumulate: Annotated[int, Field(ge=1)] = 1
    ema: Share = 0.0
    augment: tuple[str, ...] = ()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    channels_last: bool = False
    compile: bool = False
    shard: bool = False
    workers: Annotated[int, Field(ge=0, le=64)] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values by name, as a recipe has them."""
        return {**asdict(self), "augment": list(self.augment)}


DEFAULT = Training()


def unsharded(**settings: Any) -> None:
    """As :func:`together`, of a stage that looks at whole weights at every step."""
    together(**settings)
    if settings["shard"]:
        raise InputError("shard = true: whole weights are looked at in every step: remove it")


def together(**settings: Any) -> None:
    """Raises :class:`InputError` for settings that do not go together, or do not run here; those of
    a stage's own may be among them."""
    import torch

    from compressor.training.augment import checked

    training = Training(**{key: settings[key] for key in DEFAULT.to_json() if key in settings})
    checked(training.augment)
    cuda = torch.cuda.is_available()
    if training.device == "cuda" and not cuda:
        raise InputError("device = 'cuda': PyTorch sees no CUDA device here: use 'auto' or 'cpu'")
    if training.precision == "fp16" and (training.device == "cpu" or not cuda):
        raise InputError("precision = 'fp16' needs CUDA to train: use 'bf16', which the CPU has")
    if training.shard and training.ema:
        raise InputError(f"ema = {training.ema:g}: no average of sharded weights is kept: remove "
                         "ema, or shard")  # fmt: skip
    if training.shard and training.l1:
        raise InputError(f"l1 = {training.l1:g}: the sum of sharded weights is not taken: remove "
                         "l1, or shard")  # fmt: skip
    if training.shard and training.compile:
        raise InputError("compile = true: sharded weights are not compiled: remove one of both")
    if training.optimizer == "nesterov" and not training.momentum:
        raise InputError("momentum = 0: nesterov is nothing without it: use sgd")
    if training.optimizer in ("adam", "adamw") and training.momentum != Training.momentum:
        raise InputError(
            f"momentum = {training.momentum:g}: {training.optimizer} has its own: remove it, or "
            "use sgd, nesterov or rmsprop"
        )
