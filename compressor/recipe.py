"""The steps that a run takes: from flags, from a TOML file, and back to one."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compressor.errors import InputError, one_line

QUANTIZE: dict[str, tuple[str, ...]] = {
    "none": (),
    "fp16": ("fp16",),
    "bf16": ("bf16",),
    "int8": ("dynamic", "static"),
    "int8-dynamic": ("dynamic",),
    "int8-static": ("static",),
    "int8-qat": ("qat",),
    "int8-weights": ("weights",),
    "int4": ("int4",),
}
"""What ``--quantize`` may say, and what it tries, each its own step: schemes of the stage
``quantize``, or the stage ``qat``, which trains."""

LOGS = ("csv", "json", "tensorboard", "wandb", "mlflow", "trace")
"""What ``--log`` may say: what training is written to. ``trace`` is a profiler's of a few steps."""

PRUNE = ("ratio", "macs", "params", "size", "latency", "widths")
"""Settings of pruning that say how much; ``--prune`` replaces all of them."""

NAMES = {
    "student": "student",
    "prune": "pruned",
    "distill": "recovered",
    "sparsify": "sparsified",
    "mask": "masked",
    "export": "exported",
    "qat": "int8-qat",
}
SCHEMES = {
    "dynamic": "int8-dynamic",
    "static": "int8-static",
    "weights": "int8-weights",
    "int4": "int4",
    "fp16": "fp16",
    "bf16": "bf16",
}
BASELINE = "baseline"

LONGEST = 100
"""Bytes of a step's name: files of its artifacts are named after it, with endings of ours."""


@dataclass(frozen=True)
class Step:
    """One stage of a recipe.

    ``name`` names the artifact that the step makes; ``source`` the step or artifact that it starts
    from (``from`` in TOML), by default the one before it.
    """

    stage: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        """``{"stage", "settings", "name", "from"}``, as the report has it."""
        return {
            "stage": self.stage,
            "settings": dict(self.settings),
            "name": self.name,
            "from": self.source,
        }


Recipe = tuple[Step, ...]


def named(steps: Sequence[Step]) -> Recipe:
    """The steps with every name and source filled in.

    >>> [f"{s.source}>{s.name}" for s in named([Step("prune"), Step("distill")])]
    ['baseline>pruned', 'pruned>recovered']

    Raises :class:`InputError` for a name used twice and for a source that no earlier step makes.
    """
    before, known, whole = BASELINE, [BASELINE], []
    for step in steps:
        scheme = str(step.settings.get("scheme", ""))
        name = step.name or SCHEMES.get(scheme) or NAMES.get(step.stage, step.stage)
        source = step.source or before
        if name in known:
            raise InputError(f"step {name!r} stands twice in the recipe: give one another name")
        plain = name.replace("-", "").replace("_", "").replace(".", "").isalnum()
        if not plain or name[0] in ".-" or len(name.encode()) > LONGEST:
            raise InputError(
                f"step name {name!r:.60} cannot be a file name: use letters, digits, '-', '_' and "
                f"'.', {LONGEST} bytes at most"
            )
        if source not in known:
            raise InputError(
                f"step {name!r} starts from {source!r}, which no earlier step makes; "
                f"known here: {', '.join(known)}"
            )
        whole.append(replace(step, name=name, source=source))
        known.append(name)
        before = name
    return tuple(whole)


def edited(
    steps: Sequence[Step],
    *,
    prune: float | str | None = None,
    keep: Sequence[str] = (),
    epochs: int | None = None,
    distill: bool | None = None,
    quantize: str | None = None,
    student: str | None = None,
    train: Mapping[str, Any] = {},
) -> list[Step]:
    """The steps after the flags: a flag changes the steps it speaks of, or adds the one it needs.

    ``epochs`` of 0 drops the recovery; ``train`` holds other settings of it. Without steps this is
    the recipe of the flags alone.
    """
    if quantize is not None and quantize not in QUANTIZE:
        raise InputError(f"--quantize {quantize!r} is unknown: choose from {', '.join(QUANTIZE)}")
    changed = list(named(steps))
    if keep and prune is None and not any(step.stage == "prune" for step in steps):
        raise InputError(f"--keep {keep[0]!r} has no pruning to keep it from: add --prune R")
    if prune is not None and not any(step.stage == "prune" for step in changed):
        changed = _inserted(changed, 0, Step("prune", name=NAMES["prune"], source=BASELINE))
    if student is not None:
        changed = _without(changed, "student")
        changed = _inserted(changed, 0, Step("student", {"factory": student}, "student", BASELINE))
    if prune is not None and not steps and epochs is None:
        changed.append(Step("distill"))
    trains = bool(epochs or (epochs is None and (train or student or distill)))
    if train and epochs == 0:
        raise InputError(f"--epochs 0: nothing is trained, so {next(iter(train))} has no use")
    if trains and not any(step.stage == "distill" for step in changed):
        after = [at for at, step in enumerate(changed) if step.stage in ("student", "prune")]
        source = changed[after[-1]].name if after else BASELINE
        made = Step("distill", name=NAMES["distill"], source=source)
        changed = _inserted(changed, after[-1] + 1 if after else 0, made)
    if epochs == 0:
        changed = _without(changed, "distill")
    flags: dict[str, dict[str, Any]] = {"prune": {}, "distill": dict(train)}
    if prune is not None:
        # Another target than the recipe's, not a second one.
        asked = pruning(prune)
        changed = [
            replace(
                step,
                settings={k: v for k, v in step.settings.items() if k not in PRUNE or k in asked},
            )
            if step.stage == "prune"
            else step
            for step in changed
        ]
        flags["prune"] |= asked
    if keep:
        flags["prune"]["keep"] = list(keep)
    if epochs:
        flags["distill"]["epochs"] = epochs
    if distill is not None and train.get("loss") is not None:
        raise InputError("--loss says what is learnt, and so does --distill or --no-distill: leave "
                         "one out")  # fmt: skip
    if distill is not None:
        flags["distill"].setdefault("loss", "distill" if distill else "labels")
    changed = [
        replace(step, settings={**step.settings, **flags.get(step.stage, {})}) for step in changed
    ]
    if quantize is not None:
        changed = _without(_without(changed, "quantize"), "qat")
        source = named(changed)[-1].name if changed else BASELINE
        changed += [
            Step("qat", source=source)
            if scheme == "qat"
            else Step("quantize", {"scheme": scheme}, source=source)
            for scheme in QUANTIZE[quantize]
        ]
    return changed


def losses(text: str) -> str | dict[str, float]:
    """The setting that ``--loss`` names: a loss, or several with their weights.

    >>> losses("dkd"), losses("labels=0.3,kd=0.7")
    ('dkd', {'labels': 0.3, 'kd': 0.7})
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1 and "=" not in text:
        return text
    found = {}
    for part in parts:
        name, _, amount = part.rpartition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            name = ""
        if not name:
            raise InputError(f"--loss {text!r}: give one name, or NAME=WEIGHT,NAME=WEIGHT")
    return found


def training(given: Sequence[str]) -> dict[str, Any]:
    """The settings that ``--train KEY=VALUE`` names, values as TOML has them or plain words.

    >>> training(["optimizer=sgd", "clip=1.0", "ema=0.99"])
    {'optimizer': 'sgd', 'clip': 1.0, 'ema': 0.99}
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name.isidentifier() or name in found:
            raise InputError(f"--train {text!r}: give each setting once, as KEY=VALUE")
        try:
            found[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = value
    return found


def pruning(text: float | str) -> dict[str, float]:
    """The setting that ``--prune`` names: ``0.5`` is a ratio, ``latency=0.5`` says of what.

    >>> pruning("0.5"), pruning("macs=0.3")
    ({'ratio': 0.5}, {'macs': 0.3})
    """
    name, found, amount = str(text).rpartition("=")
    name = name.strip() if found else "ratio"
    try:
        value = float(amount)
    except ValueError:
        value = float("nan")
    if name not in PRUNE[:-1] or (name == "ratio" and found):
        raise InputError(
            f"--prune {text!r}: give a ratio such as 0.5, or one of "
            f"{', '.join(f'{name}=0.5' for name in PRUNE[1:-1])}"
        )
    if name == "ratio" and not 0 <= value < 1:
        raise InputError(
            f"--prune {text!r}: give the fraction of channels to remove, 0 to below 1, such as 0.5"
        )
    if name != "ratio" and not 0 < value < 1:
        raise InputError(
            f"--prune {text!r}: give the fraction of {name} to keep, between 0 and 1, such as 0.5"
        )
    return {name: value}


def _inserted(steps: Sequence[Step], at: int, new: Step) -> list[Step]:
    """``new`` at position ``at``; what started from its source now starts from it."""
    later = [
        replace(step, source=new.name) if step.source == new.source else step for step in steps[at:]
    ]
    return [*steps[:at], new, *later]


def _without(steps: Sequence[Step], stage: str) -> list[Step]:
    """The steps but for those of ``stage``; what started from one starts from its source."""
    kept: list[Step] = []
    instead: dict[str, str] = {}
    for step in steps:
        source = instead.get(step.source, step.source)
        if step.stage == stage:
            instead[step.name] = source
        else:
            kept.append(replace(step, source=source))
    return kept


def read(path: Path) -> list[Step]:
    """The ``[[step]]`` tables of a TOML file, in order; every key that is not a field is a setting.

    Raises :class:`InputError` naming the file when it is missing, is not TOML or holds other keys.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also of integers of thousands of digits
        raise InputError(f"recipe {path} is not TOML: {one_line(error)}") from None
    tables = document.pop("step", [])
    if document:
        raise InputError(f"recipe {path}: unknown key {next(iter(document))!r}; use [[step]] only")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"recipe {path}: steps are [[step]] tables")
    steps = []
    for number, table in enumerate(tables, 1):
        fields = {key: table.pop(key, "") for key in ("stage", "name", "from")}
        if not all(isinstance(value, str) for value in fields.values()) or not fields["stage"]:
            raise InputError(f"recipe {path}, step {number}: stage, name and from are strings")
        steps.append(Step(fields["stage"], table, fields["name"], fields["from"]))
    return steps


def write(steps: Sequence[Step], comment: str) -> str:
    """TOML that :func:`read` reads back to the same steps, under a comment line."""
    import tomli_w

    blocks = []
    for step in steps:
        given = {key: value for key, value in step.settings.items() if value is not None}
        tables = {key: value for key, value in given.items() if isinstance(value, Mapping)}
        plain = {key: value for key, value in given.items() if key not in tables}
        table = {"stage": step.stage, **plain, "name": step.name, "from": step.source}
        block = f"[[step]]\n{tomli_w.dumps(table)}"
        for key, value in tables.items():
            block += f"\n[step.{key}]\n{tomli_w.dumps(value)}"
        blocks.append(block)
    heading = "".join(f"# {line}\n" for line in comment.splitlines())
    return _shown(heading + "\n".join(blocks))


def _shown(text: str) -> str:
    """TOML with everything that a terminal would obey, or hide, as an escape."""
    return "".join(
        char if char.isprintable() or char == "\n" else f"\\U{ord(char):08x}" for char in text
    )
