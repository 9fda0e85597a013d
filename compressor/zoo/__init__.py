"""Reference models of every family, small enough to train here, each with a task of its own.

This module reads fast and does not import torch; a model's own module is imported when it is built.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from compressor.errors import InputError

if TYPE_CHECKING:
    from torch import nn

Form = Literal["image", "sequence", "table"]


@dataclass(frozen=True)
class Entry:
    """A reference model.

    ``factory`` is ``module:function`` in this package, ``form`` says how its arguments follow from
    the data, ``data`` is the spec of its natural small task, ``epochs`` and ``learning_rate`` (of
    Adam, batches of 64) train it well on that data. ``slow``: minutes instead of seconds on 2
    cores.
    """

    factory: str
    form: Form
    data: str
    epochs: int
    learning_rate: float = 1e-3
    slow: bool = False


# Slow ones, seconds per epoch on 2 shared cores: vgg16 16, resnet18 14, resnet50 12,
# mobilenet_v2 11, resnet56 2 to 3; several times that where others use the cores. Only one epoch
# of vgg16 and resnet50 was tried: their epochs are estimates. The statistics of the many
# BatchNorms settle late: after one or two epochs the loss is low and the accuracy still chance.
MODELS: dict[str, Entry] = {
    "mlp": Entry("mlp:mlp", "table", "breast-cancer", epochs=10),
    "cnn": Entry("cnn:cnn", "image", "digits", epochs=20),
    "vgg16": Entry("vgg:vgg16", "image", "digits?size=32", epochs=5, slow=True),
    "resnet20": Entry("resnet:resnet20", "image", "digits?size=16", epochs=5),
    "resnet56": Entry("resnet:resnet56", "image", "digits?size=16", epochs=8, slow=True),
    "resnet18": Entry("resnet:resnet18", "image", "digits?size=32", epochs=5, slow=True),
    "resnet50": Entry("resnet:resnet50", "image", "digits?size=32", epochs=8, slow=True),
    "mobilenet_v2": Entry("mobilenet:mobilenet_v2", "image", "digits?size=32", 8, slow=True),
    "lstm": Entry("recurrent:lstm", "sequence", "digits-rows", epochs=25, learning_rate=5e-3),
    "gru": Entry("recurrent:gru", "sequence", "digits-rows", epochs=25, learning_rate=5e-3),
    "vit": Entry("transformer:vit", "image", "digits", epochs=30, learning_rate=5e-4),
    "unet": Entry("unet:unet", "image", "digits-masks", epochs=8),
}


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The untrained model ``name``; ``arguments`` are plain JSON values for its factory.

    Raises :class:`InputError` for a name that is not in ``MODELS`` and for arguments that the
    factory does not have, lacks or cannot use. Nothing but ``MODELS`` decides what is imported.
    """
    from pydantic import ConfigDict, ValidationError, validate_call

    checked = validate_call(config=ConfigDict(strict=True))(_factory(name))
    try:
        return checked(**arguments)
    except ValidationError as error:
        first = error.errors()[0]
        argument = ".".join(str(part) for part in first["loc"])
        raise InputError(f"zoo model {name!r}, argument {argument!r}: {first['msg']}") from None


def arguments_for(name: str, shape: tuple[int, ...], outputs: int) -> dict[str, Any]:
    """What the factory of ``name`` needs for examples of ``shape`` and ``outputs`` classes.

    ``shape`` is one example's, without the batch axis: ``(channels, size, size)`` for an image
    model, ``(steps, features)`` for a sequence model, ``(features,)`` for a table model.
    ``outputs`` is the width of the target: classes, or 1 for a regression or a single logit.

    >>> arguments_for("lstm", (8, 4), 10)
    {'features': 4, 'classes': 10}

    Raises :class:`InputError` for an unknown name and for a shape that does not fit.
    """
    parameters = inspect.signature(_factory(name)).parameters
    known: dict[str, Any]
    match MODELS[name].form, shape:
        case "image", (channels, height, width) if height == width:
            known = {"in_channels": channels, "image_size": height, "classes": outputs}
        case "sequence", (_, features):
            known = {"features": features, "classes": outputs}
        case "table", (features,):
            known = {"features": features, "outputs": outputs}
        case form, _:
            expected = {
                "image": "square images (channels, size, size)",
                "sequence": "sequences (steps, features)",
                "table": "rows (features,)",
            }[form]
            raise InputError(
                f"zoo model {name!r} cannot take examples of shape {shape}: it takes {expected}"
            )
    return {key: int(value) for key, value in known.items() if key in parameters}


def _factory(name: str) -> Callable[..., nn.Module]:
    # A name may come from a file's header and need not even be hashable.
    if not isinstance(name, str) or name not in MODELS:
        raise InputError(f"zoo model {name!r} is unknown: choose from {', '.join(MODELS)}")
    module, function = MODELS[name].factory.split(":")
    found = getattr(importlib.import_module(f"compressor.zoo.{module}"), function)
    return cast("Callable[..., nn.Module]", found)
