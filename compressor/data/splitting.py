"""One set of examples cut into the four parts: seeded, disjoint, every class in its share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from compressor.errors import InputError
from compressor.task import Array, Split, Splits

VALIDATE_AT_MOST = 5000
CALIBRATE_AT_MOST = 512


def completed(
    train: Split,
    seed: int,
    *,
    labels: Array | None = None,
    validate: Split | None = None,
    calibrate: Split | None = None,
    test: Split | None = None,
) -> Splits:
    """The four parts; those not given are carved out of ``train``, which keeps the rest.

    ``test`` takes a quarter, then ``validate`` a fifth of what is left (5,000 at most), both at
    least two examples. ``calibrate`` is up to 512 examples of ``train``, which keeps them.
    Raises :class:`InputError` when there are too few for that.
    ``labels``, shape ``(n,)``, are the classes of the examples that ``train.indices`` names: with
    them a cut holds every class in its share, to within one example.
    """
    needed = 2 + 2 * (test is None) + 2 * (validate is None)
    if 0 < len(train) < needed:
        raise InputError(
            f"too few examples to split: {len(train)}; at least {needed} are needed: give more data"
        )
    to_test, to_validate, to_calibrate = (np.random.default_rng((seed, draw)) for draw in range(3))
    if test is None:
        train, test = cut(train, max(2, len(train) // 4), to_test, labels)
    if validate is None:
        count = max(2, min(len(train) // 5, VALIDATE_AT_MOST))
        train, validate = cut(train, count, to_validate, labels)
    if calibrate is None:
        calibrate = train.take(to_calibrate.permutation(len(train))[:CALIBRATE_AT_MOST])
    return Splits(train, validate, calibrate, test)


def cut(
    split: Split, count: int, draw: np.random.Generator, labels: Array | None
) -> tuple[Split, Split]:
    """The split without ``count`` of its examples, and those examples; both in random order."""
    total = len(split)
    count = min(count, total)
    order = draw.permutation(total)
    if labels is not None:
        order = order[np.argsort(labels[split.indices[order]], kind="stable")]
    # Evenly spaced picks from a shuffled list are a random sample; from a list that is shuffled
    # and then sorted by class they are a stratified one.
    chosen = np.zeros(total, dtype=bool)
    chosen[(np.arange(count) * total + total // 2) // max(count, 1)] = True
    rest, taken = draw.permutation(order[~chosen]), draw.permutation(order[chosen])
    return split.take(rest), split.take(taken)


def refetched(splits: Splits, source: Split) -> Splits:
    """The same positions, read from ``source``: for arrays that were changed after the cut."""
    return Splits(
        train=replace(splits.train, fetch=source.fetch),
        validate=replace(splits.validate, fetch=source.fetch),
        calibrate=replace(splits.calibrate, fetch=source.fetch),
        test=replace(splits.test, fetch=source.fetch),
    )
