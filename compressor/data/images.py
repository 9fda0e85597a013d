"""Small images made larger, for models that want more pixels than the data has."""

from __future__ import annotations

import numpy as np

from compressor.task import Array


def enlarged(images: Array, size: int) -> Array:
    """float32 images ``(n, s, s)`` as ``(n, 1, size, size)``, ``size >= s``.

    Pixels are repeated where ``size`` is a multiple of ``s``, otherwise interpolated bilinearly.
    """
    times, rest = divmod(size, images.shape[-1])
    if rest == 0:
        return images.repeat(times, axis=1).repeat(times, axis=2)[:, np.newaxis]
    import torch
    from torch.nn.functional import interpolate

    pixels = torch.from_numpy(images)[:, None]
    larger: Array = interpolate(pixels, (size, size), mode="bilinear").numpy()
    return larger
