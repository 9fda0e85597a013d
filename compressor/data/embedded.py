"""The real data sets that scikit-learn ships (no network), and a made-up line.

Digits: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
Breast cancer: W. Wolberg et al., "Breast Cancer Wisconsin (Diagnostic)", UCI, 1995.
Wine: S. Aeberhard and M. Forina, "Wine", UCI, 1991.
Diabetes: B. Efron et al., "Least Angle Regression", Annals of Statistics, 2004.

The sets themselves are the same for every seed: the seed only says how they are split.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from compressor.data.images import enlarged
from compressor.data.live import Data
from compressor.data.splitting import completed, partly, refetched
from compressor.task import Array, Batch, Kind, Split


def digits(
    seed: int,
    *,
    size: Annotated[int, Field(ge=8, le=256)] = 8,
    labelled: Annotated[float, Field(gt=0, le=1)] = 1,
) -> Data:
    """1,797 handwritten digits, float32 in [0, 1], shape ``(1, size, size)``; 10 classes.

    ``labelled`` is the fraction of the train examples that keep their label.
    """
    images, labels = _digits()

    def fetch(at: Array) -> Batch:
        return (enlarged(images[at], size),), labels[at]

    splits = completed(Split(fetch, np.arange(len(labels))), seed, labels=labels)
    return Data("digits", partly(splits, labels, labelled, seed), "classification", 10)


def digits_rows(seed: int) -> Data:
    """The digits as sequences: 8 steps, from the top row down, of 8 pixels; shape ``(8, 8)``."""
    images, labels = _digits()
    splits = completed(Split.arrays(images, labels), seed, labels=labels)
    return Data("digits-rows", splits, "classification", 10)


def digits_masks(seed: int, *, size: Annotated[int, Field(ge=8, le=64)] = 8) -> Data:
    """Find the ink in a noisy digit: inputs ``(1, size, size)``, int64 targets ``(size, size)``.

    A pixel is ink (1) where the digit, in [0, 1], is above 0.5, else ground (0). The input is the
    digit and normal noise of deviation 0.3.
    """
    images = enlarged(_digits()[0], size)
    noise = np.random.default_rng(0).standard_normal(images.shape, dtype=np.float32)
    whole = Split.arrays(images + np.float32(0.3) * noise, (images[:, 0] > 0.5).astype(np.int64))
    return Data("digits-masks", completed(whole, seed), "segmentation", 2)


def breast_cancer(seed: int) -> Data:
    """569 biopsies, 30 features, float32, standardised; 1 is benign, 0 malignant."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return _table("breast-cancer", x, y, seed, "binary", 1)


def wine(seed: int) -> Data:
    """178 wines, 13 features, float32, standardised; 3 classes (cultivars)."""
    from sklearn.datasets import load_wine

    x, y = load_wine(return_X_y=True)
    return _table("wine", x, y, seed, "classification", 3)


def diabetes(seed: int) -> Data:
    """442 patients, 10 features, float32; targets ``(1,)``: how far the illness went in a year.

    Features and targets are standardised: an error of 1 is one deviation of the train targets.
    """
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return _table("diabetes", x, y[:, np.newaxis], seed, "regression", 1)


def line(seed: int) -> Data:
    """Made up: 512 points of ``y = 2 x + 1``, x uniform in [-1, 1]; both float32 ``(1,)``."""
    x = np.random.default_rng(0).uniform(-1, 1, (512, 1)).astype(np.float32)
    return Data("line", completed(Split.arrays(x, 2 * x + 1), seed), "regression", 1)


def _digits() -> tuple[Array, Array]:
    """Images ``(1797, 8, 8)``, float32 in [0, 1], and int64 labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return (pixels / 16).astype(np.float32).reshape(-1, 8, 8), labels.astype(np.int64)


def _table(name: str, x: Array, y: Array, seed: int, kind: Kind, outputs: int) -> Data:
    """Rows with every column, and regression targets, at mean 0 and deviation 1 in train.

    Only train is asked for mean and deviation: validate and test must not be known beforehand.
    """
    labels = None if kind == "regression" else y.astype(np.int64)
    splits = completed(Split.arrays(x, y), seed, labels=labels)
    train = splits.train.indices
    targets = _standardised(y, train) if labels is None else labels
    splits = refetched(splits, Split.arrays(_standardised(x, train), targets))
    return Data(name, splits, kind, outputs)


def _standardised(values: Array, train: Array) -> Array:
    mean, deviation = values[train].mean(axis=0), values[train].std(axis=0)
    return np.asarray((values - mean) / deviation, dtype=np.float32)
