"""The one type that the factories' arguments share, and the check of an image's size."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compressor.errors import InputError

Size = Annotated[int, Field(ge=1, lt=2**31)]
"""A count or a width: a dimension of some tensor."""


def at_least(least: int, image_size: int, model: str) -> None:
    """Raises :class:`InputError` where ``model`` would pool the image away."""
    if image_size < least:
        raise InputError(
            f"zoo model {model!r} needs images of at least {least}x{least} pixels, "
            f"not {image_size}x{image_size}"
        )
