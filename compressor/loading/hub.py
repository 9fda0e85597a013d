"""Models of other packages: a Hugging Face folder, ``timm:NAME`` and ``torchvision:NAME``.

Only local files are read, none of them a pickle, and no code that a folder brings is run. What
stands in ``config.json`` may come from anywhere: it is checked before transformers sees it, and
built without memory until its sizes were found to be those of the weights.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.data.tokens import (
    CONFIG,
    LARGEST,
    LENGTH,
    WEIGHTS,
    inputs_of,
    read_config,
    read_json,
    read_object,
    tokens_at_most,
)
from compressor.data.tokens import tokens as tokens
from compressor.errors import InputError, one_line
from compressor.loading import checkpoint, torchfile
from compressor.loading.sketch import CALLS, _Bounded
from compressor.loading.torchfile import State
from compressor.task import Input, Kind, unseen

FACTORY = "compressor.hub"
"""The factory in the source of a model that :func:`build` builds."""

INDEX = "model.safetensors.index.json"

PRETRAINING = re.compile(r"(ForMaskedLM|ForPreTraining)$")
"""Architectures of which the body is taken: their head was for pretraining."""

KINDS: dict[str, Kind] = {
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
    "regression": "regression",
}
"""The ``problem_type`` of a config.json; without one the data says what kind of task it is."""

REFUSED = {
    "auto_map": "names code of its own, which is never run",
    "quantization_config": "has quantized weights: give the float model",
}
DROPPED = re.compile(
    r"_.*|.*_implementation|name_or_path|torch_dtype|dtype|(fusion|kernel|distributed)_config"
)
"""Keys that say where a model came from, or which code computes it (which may be fetched)."""


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "cls": lambda states, mask: states[:, 0],
}
"""From states ``(batch, tokens, width)`` and a mask ``(batch, tokens)`` to ``(batch, width)``."""


class Text(nn.Module):
    """A transformer that takes integer tensors by position and gives the one tensor that counts.

    Without ``pooling`` that is what its head gives (logits). With it the states of the last layer
    are averaged over the mask, or the first is taken, and scaled to length 1 for ``normalize``:
    sentence embeddings (Reimers and Gurevych 2019).
    """

    def __init__(self, body: nn.Module, pooling: str | None, normalize: bool) -> None:
        super().__init__()
        self.body, self.pooling, self.normalize = body, pooling, normalize

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """float32 ``(batch, labels or width)`` of int64 tensors ``(batch, tokens)``."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        found: Tensor = self.body(input_ids=input_ids, attention_mask=attention_mask, **types)[0]
        if self.pooling is not None:
            found = POOLINGS[self.pooling](found, attention_mask)
        return nn.functional.normalize(found, dim=1) if self.normalize else found


def folder(
    path: str | Path,
) -> tuple[nn.Module, dict[str, Any], tuple[Input, ...], Kind | None]:
    """The model of a folder, its source, its inputs and the kind of its task where it is known.

    The folder holds ``config.json`` and ``model.safetensors``, or ``model.safetensors.index.json``
    and its shards. ``*ForSequenceClassification`` gives logits; any other gives embeddings, pooled
    and normalised as ``modules.json`` of sentence-transformers says, by default the mean over the
    mask. Inputs are ``input_ids``, ``attention_mask`` and, where the model knows more than one
    type of token, ``token_type_ids``: int64 ``(tokens,)``, 128 or as many as the model takes.

    The source holds the config: :func:`build` needs no folder. Raises :class:`InputError` for
    models of other tasks, code, pickles, and weights that are missing or left over.
    """
    path = Path(path)
    config = read_config(path)
    head = _has_head(config, path)
    pooling, normalize = (None, False) if head else _pooling(path)
    state = _weights(path)
    arguments = {"config": _plain(config, path), "pooling": pooling, "normalize": normalize}
    model = _sketch(arguments, state, str(path))
    with _quiet():
        loaded = _loaded(arguments, model, state, path)
    torchfile.load_state(model, loaded.state_dict(), path).eval()
    length = min(LENGTH, tokens_at_most(path, config))
    inputs = tuple(
        Input(name, (length,), "int64", high) for name, high in inputs_of(config).items()
    )
    kind = KINDS.get(str(config.get("problem_type"))) if head else "regression"
    return model, {"factory": FACTORY, "arguments": arguments}, inputs, kind


def build(arguments: Mapping[str, Any], state: State) -> nn.Module:
    """The untrained model of a source that :func:`folder` or :func:`named` gave.

    ``arguments`` may come from a file. A model of transformers is a sketch on the ``meta`` device,
    made in time that ``state`` allows; a size in it takes no memory until
    :func:`~compressor.loading.torchfile.load_state` found it in ``state``. Raises
    :class:`InputError` for arguments that give no model.
    """
    if set(arguments) == {"package", "name", "classes"}:
        classes = arguments["classes"]
        if classes is not None and not (
            type(classes) is int and any(each.shape[:1] == (classes,) for each in state.values())
        ):
            raise InputError(
                f"a model of {classes!r:.40} classes: no tensor in its file is so wide"
            )
        return _built(arguments["package"], arguments["name"], classes)
    if set(arguments) != {"config", "pooling", "normalize"}:
        raise InputError(f"the source {dict(arguments)!r:.100} describes no model: make it again")
    return _sketch(arguments, state, "the source in the file")


def named(
    name: str, say: Callable[[str], None] = unseen
) -> tuple[nn.Module, dict[str, Any], tuple[Input, ...]]:
    """The model ``timm:NAME`` or ``torchvision:NAME``, its source, and its usual input.

    Nothing is downloaded: weights come from ``timm:NAME=FILE``, a state dict in ``.safetensors``
    or ``.pth``, whose head says the number of classes. Without a file they are random, and ``say``
    is told. The input is float32 ``(3, size, size)``; models of images take other sizes as well.

    Raises :class:`InputError` when the package is missing, or has no such model.
    """
    spec, given, file = name.partition("=")
    package, _, entry = spec.partition(":")
    if given and not file:
        raise InputError(f"{name!r} names no file: write {spec}=FILE.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _built(package, entry, None)
        classes = None
        if given:
            state = checkpoint.read(Path(file)).state
            classes = _classes(model.state_dict(), state)
            model = model if classes is None else _built(package, entry, classes)
            torchfile.load_state(model, state, Path(file))
    if not given:
        say(f"{name} has random weights: write {name}=FILE.safetensors to load trained ones")
    size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    arguments = {"package": package, "name": entry, "classes": classes}
    return (
        model.eval(),
        {"factory": FACTORY, "arguments": arguments},
        (Input("input", tuple(size)),),
    )


# --- what lies in a folder


def _architecture(config: Mapping[str, Any]) -> str:
    listed = config.get("architectures") or ["Model"]
    return str(listed[0]) if isinstance(listed, list) else repr(listed)


def _has_head(config: Mapping[str, Any], path: Path) -> bool:
    """Whether the head of the model is kept: it classifies sequences."""
    name = _architecture(config)
    if name.endswith("ForSequenceClassification"):
        return True
    if not name.endswith("Model") and not PRETRAINING.search(name):
        raise InputError(
            f"{path} holds a {name:.60}: give a model that classifies sequences or gives "
            "embeddings (*ForSequenceClassification, *Model)"
        )
    return False


def _pooling(path: Path) -> tuple[str, bool]:
    """How sentence-transformers pools, and whether it normalises."""
    pooling, normalize = "mean", False
    listed = read_json(path / "modules.json") if (path / "modules.json").is_file() else []
    try:
        for entry in listed:
            kind, place = str(entry["type"]).rpartition(".")[2], str(entry["path"])
            if kind == "Pooling":
                _inside(place, path / "modules.json")
                pooling = _mode(read_object(path / place / CONFIG), path)
            elif kind not in ("Transformer", "Normalize"):
                raise InputError(
                    f"{path}: modules.json has a {kind:.40}; known are Transformer, Pooling and "
                    "Normalize"
                )
            normalize |= kind == "Normalize"
    except (TypeError, KeyError):
        raise InputError(f"{path}: modules.json is no list of modules: save it again") from None
    return pooling, normalize


def _mode(said: Mapping[str, Any], path: Path) -> str:
    """The pooling that a config of sentence-transformers asks for, of its older or newer form."""
    flag = "pooling_mode"
    on = sorted(key.removeprefix(f"{flag}_") for key, value in said.items() if value is True)
    asked = str(said.get(flag) or ", ".join(key for key in on if f"{flag}_{key}" in said))
    known = {"mean_tokens": "mean", "cls_token": "cls", **{name: name for name in POOLINGS}}
    if asked not in known:
        raise InputError(f"{path} pools by {asked!r:.60}; known are {', '.join(POOLINGS)}")
    return known[asked]


def _inside(name: Any, path: Path) -> None:
    """Refuses a name in ``path`` that could lead out of its folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
        raise InputError(f"{path} names the file {name!r:.80}: only names in its folder are read")


def _weights(path: Path) -> State:
    if (path / WEIGHTS).is_file():
        return checkpoint.read(path / WEIGHTS).state
    if not (path / INDEX).is_file():
        pickled = sorted(at.name for at in path.iterdir() if at.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise InputError(
                f"{path} has its weights in {pickled[0]}, a pickle, which could run code: load it "
                "where you trust it and write it again with save_pretrained"
            )
        raise InputError(f"{path} has no {WEIGHTS}: give a folder that save_pretrained wrote")
    shards = read_object(path / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{path / INDEX} has no weight_map: save the model again")
    state: dict[str, Tensor] = {}
    for shard in shards.values():
        _inside(shard, path / INDEX)
    for shard in sorted(set(shards.values())):
        if not shard.endswith(torchfile.SUFFIX):
            raise InputError(f"{path / INDEX} names {shard:.80}: only .safetensors are read")
        state.update(checkpoint.read(path / shard).state)
    return state


# --- transformers


def _plain(config: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """What of a config describes the model; refused where it brings code or absurd numbers."""

    def clean(value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            for key, why in REFUSED.items():
                if value.get(key):
                    raise InputError(f"{where}: config.json {why} ({key})")
            if depth and "model_type" in value:
                raise InputError(f"{where}: config.json describes several models in one: give one")
            return {
                key: clean(each, depth + 1)
                for key, each in value.items()
                if key not in REFUSED and not DROPPED.fullmatch(key)
            }
        if isinstance(value, list):
            return [clean(each, depth + 1) for each in value]
        absurd = isinstance(value, int) and abs(value) > LARGEST
        if absurd or (isinstance(value, float) and not math.isfinite(value)):
            raise InputError(f"{where}: config.json has the number {value!r:.40}: too large")
        return value

    if config.get("is_encoder_decoder"):
        raise InputError(
            f"{where}: config.json describes an encoder with a decoder: give an encoder"
        )
    found: dict[str, Any] = clean(dict(config), 0)
    return found


def _class_of(arguments: Mapping[str, Any], where: str) -> tuple[Any, Any, dict[str, bool]]:
    """transformers' own class for a source, its config, and what to pass besides."""
    transformers = _package("transformers")
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    words = importlib.import_module("transformers.models.auto.tokenization_auto")
    config, pooling = _plain(arguments["config"], where), arguments["pooling"]
    kind = config.pop("model_type", None)
    known = auto.MODEL_MAPPING_NAMES
    if pooling is None:
        known = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if type(kind) is not str or kind not in known or kind not in words.TOKENIZER_MAPPING_NAMES:
        raise InputError(
            f"{where}: config.json has the model_type {kind!r:.60}, which is no text model of "
            f"transformers {transformers.__version__}"
        )
    said = transformers.AutoConfig.for_model(kind, **config, attn_implementation="eager")
    said.use_cache = False  # the keys and values of a text that goes on
    mapping = auto.MODEL_MAPPING if pooling else auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    found = mapping[type(said)]
    unused = "add_pooling_layer"  # a layer behind the states that are pooled here
    takes = pooling is not None and unused in inspect.signature(found).parameters
    return found, said, {unused: False} if takes else {}


def _sketch(arguments: Mapping[str, Any], state: State, where: str) -> Text:
    """The model on the ``meta`` device."""
    pooling, normalize = arguments["pooling"], arguments["normalize"]
    fine = pooling is None or (type(pooling) is str and pooling in POOLINGS)
    if not fine or type(normalize) is not bool or not isinstance(arguments["config"], dict):
        raise InputError(f"{where} pools by {pooling!r:.40}, which is unknown: make it again")
    try:
        with _quiet(), torch.device("meta"), _Bounded(CALLS * (len(state) + 10)):
            kind, config, extra = _class_of(arguments, where)
            body = kind(config, **extra)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{where}: transformers cannot build the model of config.json: "
            f"{type(error).__name__}: {one_line(error, 120)}"
        ) from None
    wanted = set(inputs_of(arguments["config"]))
    if not wanted <= set(inspect.signature(body.forward).parameters):
        raise InputError(f"{where}: a {kind.__name__} does not take {', '.join(sorted(wanted))}")
    _keep_buffers(body)
    for name, module in body.named_modules():
        beside = [key for key, value in vars(module).items() if isinstance(value, Tensor)]
        if beside:
            raise InputError(
                f"{where}: {name}.{beside[0]} of a {kind.__name__} is a tensor beside its weights, "
                "which no file of ours would hold"
            )
    return Text(body, pooling, normalize)


def _keep_buffers(body: nn.Module) -> None:
    """Makes all buffers part of the state: one that is computed again would be lost at rest."""
    for module in body.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer)


def _loaded(arguments: Mapping[str, Any], model: Text, state: State, path: Path) -> Text:
    """The same model as transformers loads it: it knows the names that older files use."""
    kind, config, extra = _class_of(arguments, str(path))
    said = _architecture(arguments["config"])
    if said not in ("Model", kind.__name__) and not PRETRAINING.search(said):
        raise InputError(
            f"{path} holds a {said:.60}; for its model_type transformers has {kind.__name__}: "
            "give a folder that it can load by itself"
        )
    wanted = sum(each.numel() for each in model.parameters())
    held = sum(each.numel() for each in state.values())
    if wanted > held:
        raise InputError(
            f"{path}: config.json asks for {wanted:,} weights, its files hold {held:,}"
        )
    try:
        body, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            **extra,
        )
    except Exception as error:
        raise InputError(
            f"{path}: its weights are not those of a {kind.__name__} with this config.json: "
            f"{one_line(error, 120)}"
        ) from None
    for name in sorted(found["missing_keys"]):
        raise InputError(f"{path} has no tensor {name!r}, which a {kind.__name__} needs")
    parts = set(dict(body.named_children()))
    for name in sorted(found["unexpected_keys"]):
        short = name.removeprefix(f"{body.base_model_prefix}.")
        # A head for pretraining is no part of the body; older files have a pooler that nobody uses.
        own = {name.partition(".")[0], short.partition(".")[0]} & parts
        if own and "pooler" not in name.split("."):
            raise InputError(
                f"{path} holds {name!r:.100}, which its config.json leaves out of a {kind.__name__}"
            )
    _keep_buffers(body)
    return Text(body, model.pooling, model.normalize)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers keeps its progress bars and reports to itself."""
    _package("transformers")
    logs = importlib.import_module("transformers.utils.logging")
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity(logs.CRITICAL)
    logs.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


# --- timm and torchvision


def _built(package: str, name: str, classes: int | None) -> nn.Module:
    """The untrained model, with as many classes as ImageNet where nobody says."""
    if type(package) is not str or package not in PACKAGES:
        raise InputError(
            f"models of {package!r:.40} are unknown: write timm:NAME, torchvision:NAME"
        )
    # Other names of timm fetch a model or read a folder: hf-hub:..., local-dir:...
    if type(name) is not str or not re.fullmatch(r"\w[\w.]*", name):
        raise InputError(f"{package}:{name!s:.60} is no name of a model: write {package}:resnet18")
    found = _package(package)
    try:
        model = PACKAGES[package](found, name, {} if classes is None else {"num_classes": classes})
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{package}:{name} cannot be built: {one_line(error, 120)}") from None
    if not isinstance(model, nn.Module):
        raise InputError(f"{package}:{name} gave a {type(model).__name__}, no nn.Module")
    return model


def _timm(timm: Any, name: str, options: dict[str, int]) -> Any:
    if not timm.is_model(name):
        raise InputError(f"timm {timm.__version__} has no model {name}: see timm.list_models()")
    return timm.create_model(name, pretrained=False, **options)


def _torchvision(torchvision: Any, name: str, options: dict[str, int]) -> Any:
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise InputError(
            f"torchvision {torchvision.__version__} has no model {name}: see "
            "torchvision.models.list_models()"
        )
    # By default the body of a segmentation model is fetched, whatever its weights are.
    body = "weights_backbone"
    takes = inspect.signature(models.get_model_builder(name)).parameters
    return models.get_model(
        name, weights=None, **({body: None} if body in takes else {}), **options
    )


PACKAGES: dict[str, Callable[[Any, str, dict[str, int]], Any]] = {
    "timm": _timm,
    "torchvision": _torchvision,
}


def _classes(wanted: State, state: State) -> int | None:
    """How many classes the head in a file has, where that is all that differs from the model."""
    sizes = {
        int(state[name].shape[0])
        for name, tensor in wanted.items()
        if name in state
        and state[name].ndim
        and state[name].shape != tensor.shape
        and state[name].shape[1:] == tensor.shape[1:]
    }
    return sizes.pop() if len(sizes) == 1 else None


def _package(name: str) -> Any:
    """An optional package, imported; :class:`InputError` with the line that installs it."""
    line = name if name in PACKAGES else "'compressor[transformers]'"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        why = "is not installed" if error.name == name else f"cannot be imported ({error})"
        raise InputError(f"{name} {why:.200}: pip install {line}") from None
    except Exception as error:  # one that was built for another PyTorch
        raise InputError(
            f"{name} cannot be imported ({one_line(error, 120)}): pip install {line} for PyTorch "
            f"{torch.__version__}"
        ) from None
