"""Texts as the numbers that a Hugging Face folder's model takes, by the tokenizer beside it.

The folder may come from anywhere: only JSON is read, of bounded size, and no code of it is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.data.extras import package
from compressor.errors import InputError, one_line

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"

LENGTH = 128
"""Tokens of an example where nobody asks for another number."""

SHIFTED = re.compile(
    r"(xlm-)?roberta(-xl|-prelayernorm)?|camembert|mpnet|longformer|data2vec-text|xmod"
)
"""Model types that count positions from behind the padding token's id: that many fewer tokens."""

LARGEST = 1 << 20
"""Largest integer in a config.json: labels are listed in memory before anything can be compared."""

LONGEST = 1 << 24
"""Bytes of a config.json; 21,000 named labels take 1 MiB."""

Texts = Sequence[str] | Sequence[tuple[str, str]]
Tokens = tuple[NDArray[np.int64], ...]


def tokens(path: str | Path, texts: Texts, length: int | None = None) -> Tokens:
    """What the model of a folder takes for these texts or pairs: int64 ``(texts, length)`` each.

    In the order of the model's inputs, padded and cut to ``length`` tokens with the folder's own
    ``tokenizer.json``; ``length`` is by default 128 or as many as the model takes. Raises
    :class:`InputError` where the tokenizer is missing or broken, or is not the model's.
    """
    return reader(path, length)(texts)


def reader(path: str | Path, length: int | None = None) -> Callable[[Texts], Tokens]:
    """:func:`tokens` of a folder that is opened once; several threads may call it at a time."""
    path = Path(path)
    config = read_config(path)
    limit = tokens_at_most(path, config)
    length = min(LENGTH, limit) if length is None else length
    tokenizer = _tokenizer(path)
    least = tokenizer.num_special_tokens_to_add(True) + 1
    if not least <= length <= limit:
        raise InputError(f"texts of {length} tokens: {path} takes from {least} to {limit}")
    tokenizer.enable_truncation(max_length=length)
    tokenizer.enable_padding(**_padding(tokenizer, path, config), length=length)
    highs = inputs_of(config)
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}

    def read(texts: Texts) -> Tokens:
        found = {name: np.empty((len(texts), length), np.int64) for name in highs}
        for start in range(0, len(texts), 1024):  # an encoding holds much more than its numbers
            encoded = tokenizer.encode_batch(list(texts[start : start + 1024]))
            for name, rows in found.items():
                rows[start : start + 1024] = [getattr(at, fields[name]) for at in encoded]
        for name, high in highs.items():
            most = int(found[name].max(initial=0))
            if most >= high:
                raise InputError(
                    f"the tokenizer of {path} gives {name} up to {most}, the model knows {high}: "
                    "they are not of one model"
                )
        return tuple(found.values())

    return read


def read_json(path: Path) -> Any:
    if path.stat().st_size > LONGEST:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes: it cannot be meant")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {one_line(error, 100)}") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}: it must be a JSON object")
    return found


def read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise InputError(f"{path} is no folder: give one with {CONFIG} and {WEIGHTS}")
    if not (path / CONFIG).is_file():
        raise InputError(f"{path} has no {CONFIG}: give a folder that save_pretrained wrote")
    return read_object(path / CONFIG)


def tokens_at_most(path: Path, config: Mapping[str, Any]) -> int:
    """Most tokens that the model takes, of all that the folder says about it."""
    positions, pad = config.get("max_position_embeddings"), config.get("pad_token_id", 1)
    if SHIFTED.fullmatch(str(config.get("model_type"))) and type(positions) is type(pad) is int:
        positions -= pad + 1
    said = (
        positions,
        config.get("n_positions"),
        read_object(path / "tokenizer_config.json").get("model_max_length"),
        read_object(path / "sentence_bert_config.json").get("max_seq_length"),
    )
    return min((most for most in said if type(most) is int and most > 0), default=LARGEST)


def inputs_of(config: Mapping[str, Any]) -> dict[str, int]:
    """The model's inputs by name, and how many values each has."""
    types = config.get("type_vocab_size")
    found = {"input_ids": config.get("vocab_size"), "attention_mask": 2}
    if type(types) is int and types > 1:
        found["token_type_ids"] = types
    if not all(type(high) is int and 1 < high <= LARGEST for high in found.values()):
        raise InputError(
            f"config.json has the vocab_size {found['input_ids']!r:.40}: no text model"
        )
    return {name: int(high) for name, high in found.items() if high}


def _tokenizer(path: Path) -> Any:
    if not (path / TOKENIZER).is_file():
        raise InputError(
            f"{path} has no {TOKENIZER}: write one with AutoTokenizer.from_pretrained(DIR)"
            ".save_pretrained(DIR)"
        )
    tokenizers = package("tokenizers", "transformers")
    try:
        return tokenizers.Tokenizer.from_file(str(path / TOKENIZER))
    except Exception as error:
        raise InputError(f"{path / TOKENIZER} cannot be read: {one_line(error, 120)}") from None


def _padding(tokenizer: Any, path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """How the tokenizer pads: as it was saved, or with the token that the folder names."""
    if tokenizer.padding:
        kept = ("direction", "pad_id", "pad_type_id", "pad_token")
        return {key: tokenizer.padding[key] for key in kept}
    token = read_object(path / "tokenizer_config.json").get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    number = tokenizer.token_to_id(token) if isinstance(token, str) else None
    number = config.get("pad_token_id") if number is None else number
    if type(number) is not int or number < 0:
        raise InputError(f"{path} names no token to pad with: add pad_token_id to its {CONFIG}")
    return {"pad_id": number}
