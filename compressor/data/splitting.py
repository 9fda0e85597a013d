"""One set of examples cut into the four parts: seeded, disjoint, every class in its share.

And examples without a label: only ``train``, and ``calibrate``, which is part of it, may hold them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from compressor.data.demand import At, OnDemand, targets_at
from compressor.errors import InputError
from compressor.task import UNLABELLED, Array, Batch, Inputs, Split, Splits

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
    unlabelled: Split | None = None,
) -> Splits:
    """The four parts; those not given are carved out of ``train``, which keeps the rest.

    ``test`` takes a quarter, then ``validate`` a fifth of what is left (5,000 at most), both at
    least two examples. ``calibrate`` is up to 512 examples of ``train``, which keeps them.
    Raises :class:`InputError` when there are too few for that.
    ``labels``, shape ``(n,)``, are the classes of the examples that ``train.indices`` names: with
    them a cut holds every class in its share, to within one example.
    ``unlabelled`` are examples that ``train`` gets after the cuts, see :func:`joined`.
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
    if unlabelled is not None:
        train = joined(train, unlabelled)
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


def fewer(splits: Splits, count: int, seed: int) -> Splits:
    """The same, where ``train`` keeps ``count`` of its examples; ``calibrate`` is of those.

    Raises :class:`InputError` where there are not so many.
    """
    if count > len(splits.train):
        raise InputError(f"option train={count}: there are only {len(splits.train)} examples")
    some = splits.train.take(np.arange(count))  # which is in random order already
    return completed(some, seed, validate=splits.validate, test=splits.test)


def refetched(splits: Splits, source: Split) -> Splits:
    """The same positions, read from ``source``: for arrays that were changed after the cut."""
    return Splits(
        train=replace(splits.train, fetch=source.fetch),
        validate=replace(splits.validate, fetch=source.fetch),
        calibrate=replace(splits.calibrate, fetch=source.fetch),
        test=replace(splits.test, fetch=source.fetch),
    )


def joined(labelled: Split, bare: Split) -> Split:
    """The examples of both, in this order; those of ``bare`` have no label, whatever it gives.

    No label is :data:`UNLABELLED` in every integer of the target, NaN in every float. Raises
    :class:`InputError` where the inputs of the two are not of the same shapes and dtypes.
    """
    (inputs, targets), (others, _) = labelled.head(1), bare.head(1)
    seen, wanted = _forms(others), _forms(inputs)
    if seen != wanted:
        raise InputError(
            f"split unlabelled: its inputs are {seen}, those of train {wanted}: make them alike"
        )
    start = int(labelled.indices.max()) + 1

    def nothing(count: int) -> Array:
        none = np.nan if targets.dtype.kind == "f" else UNLABELLED
        return np.full((count, *targets.shape[1:]), none, targets.dtype)

    def fetch(at: At) -> Batch:
        known = at < start
        if known.all():
            return labelled.fetch(at)
        theirs, _ = bare.fetch(at[~known] - start)
        if not known.any():
            return theirs, nothing(len(at))
        ours, told = labelled.fetch(at[known])
        mixed = (_mixed(known, *pair) for pair in zip(ours, theirs, strict=True))
        return tuple(mixed), _mixed(known, told, nothing(len(at) - len(told)))

    def read_targets(at: At) -> Array:
        known, found = at < start, nothing(len(at))
        if known.any():
            found[known] = targets_at(labelled, at[known])
        return found

    indices = np.concatenate([labelled.indices, bare.indices + start])
    slow = [part.fetch for part in (labelled, bare) if isinstance(part.fetch, OnDemand)]
    if not slow:
        return Split(fetch, indices)
    return Split(OnDemand(fetch, read_targets, all(each.parallel for each in slow)), indices)


def partly(splits: Splits, labels: Array, fraction: float, seed: int) -> Splits:
    """The same splits, where ``train`` keeps the labels of ``fraction`` of its examples.

    The others keep their place and lose their label (:data:`UNLABELLED`), in ``calibrate``, which
    must be part of ``train``, too. Every class keeps its share, to within one label; ``labels`` are
    as in :func:`completed`. Raises :class:`InputError` where a class would have no label left.
    """
    if fraction == 1:
        return splits
    count = round(fraction * len(splits.train))
    _, kept = cut(splits.train, count, np.random.default_rng((seed, 3)), labels)
    without = np.setdiff1d(labels[splits.train.indices], labels[kept.indices])
    if len(without):
        raise InputError(
            f"option labelled={fraction:g} keeps {count} of {len(splits.train)} labels, none of "
            f"class {without[0]}: keep more"
        )
    told = np.zeros(len(labels), dtype=bool)
    told[kept.indices] = True
    train = splits.train

    def fetch(at: At) -> Batch:
        inputs, targets = train.fetch(at)
        return inputs, np.where(told[at], targets, UNLABELLED)

    return replace(
        splits,
        train=replace(train, fetch=fetch),
        calibrate=replace(splits.calibrate, fetch=fetch),
    )


def _forms(inputs: Inputs) -> str:
    return ", ".join(f"{part.dtype} {part.shape[1:]}" for part in inputs)


def _mixed(first: Array, ours: Array, theirs: Array) -> Array:
    """``ours`` where ``first`` is true, ``theirs`` where it is not, each in its order."""
    whole = np.empty((len(first), *ours.shape[1:]), ours.dtype)
    whole[first], whole[~first] = ours, theirs
    return whole
