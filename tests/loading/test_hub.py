"""Models of other packages compute what they did there, and nothing in a folder is run."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.errors import InputError
from compressor.loading import hub, torchfile
from compressor.task import Input

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForSequenceClassification": ("BertConfig", {**SIZES, "num_labels": 3}),
    "BertForMaskedLM": ("BertConfig", SIZES),
    "RobertaForSequenceClassification": (
        "RobertaConfig",
        {**SIZES, "pad_token_id": 1, "type_vocab_size": 1},
    ),
    "DistilBertModel": (
        "DistilBertConfig",
        {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    ),
    "ModernBertModel": (
        "ModernBertConfig",
        {**SIZES, **dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 0)},
    ),
}
"""Architectures of transformers, their config and its sizes: absolute and rotary positions."""

PLAIN = {"architectures": ["BertModel"], "model_type": "bert", **SIZES}
WEIGHTS = {"embeddings.word_embeddings.weight": torch.zeros(50, 16)}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for a host fails."""

    def refuse(*given: Any, **more: Any) -> None:
        raise AssertionError(f"looked for {given}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="needs the extra compressor[transformers]")


@pytest.fixture(scope="module")
def folders(
    transformers: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, nn.Module]]:
    """The folder of a small model of FAMILIES, and that model."""
    made: dict[str, tuple[Path, nn.Module]] = {}

    def make(name: str) -> tuple[Path, nn.Module]:
        if name not in made:
            config, sizes = FAMILIES[name]
            torch.manual_seed(0)
            model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.3)
            path = tmp_path_factory.mktemp("hub") / name
            with hub._quiet():
                model.save_pretrained(path)
            made[name] = path, model
        return made[name]

    return make


def written(path: Path, config: Any = PLAIN, weights: Any = WEIGHTS, **files: Any) -> Path:
    """A folder of a config, weights and other JSON files."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if weights is not None:
        save_file(weights, path / "model.safetensors")
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def refused(call: Callable[..., Any], *given: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*given)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 600
    return said


def ids(inputs: tuple[Input, ...], count: int = 3) -> tuple[Tensor, ...]:
    """Tokens, a mask that leaves the ends out, and types."""
    found = {
        each.name: torch.from_numpy(each.synthetic(count, at)) for at, each in enumerate(inputs)
    }
    found["attention_mask"] = (torch.arange(inputs[0].shape[0]) < 9).long().repeat(count, 1)
    found["input_ids"].clamp_(min=2)
    return tuple(found.values())


# --- with transformers


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_computes_what_transformers_does_and_needs_no_folder_later(
    name: str, folders: Callable[[str], tuple[Path, nn.Module]], tmp_path: Path
) -> None:
    path, theirs = folders(name)
    moved = shutil.copytree(path, tmp_path / "folder")
    model, source, inputs, kind = hub.folder(moved)
    assert not model.training
    batch = ids(inputs)
    named = dict(zip((each.name for each in inputs), batch, strict=True))
    assert list(named) == ["input_ids", "attention_mask", "token_type_ids"][: len(batch)]
    assert len(batch) == (3 if name.startswith("Bert") else 2)
    with torch.inference_mode():
        if name.endswith("ForSequenceClassification"):
            wanted = theirs(**named).logits
            assert kind is None
        else:
            states = theirs.base_model(**named).last_hidden_state[:, :9]  # type: ignore[operator]
            wanted = states.mean(1)
            assert kind == "regression"
        found = model(*batch)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max() + 1))
        torchfile.write(tmp_path / "model.safetensors", model, json.loads(json.dumps(source)))
        shutil.rmtree(moved)
        again, _ = torchfile.rebuild(
            tmp_path / "model.safetensors", lambda said, state: hub.build(said["arguments"], state)
        )
        assert torch.equal(again(*batch), found)


def test_shards_are_one_model(
    folders: Callable[[str], tuple[Path, nn.Module]], tmp_path: Path
) -> None:
    path, _ = folders("DistilBertModel")
    state = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    index = {"weight_map": {name: part for part, of in parts.items() for name in of}}
    sharded = written(tmp_path / "sharded", config, None, **{"model.safetensors.index": index})
    for part, of in parts.items():
        save_file({name: state[name] for name in of}, sharded / part)
    one, two = hub.folder(path), hub.folder(sharded)
    assert one[1:] == two[1:]
    for name, tensor in one[0].state_dict().items():
        assert torch.equal(two[0].state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 1}, "leaves out of a BertForSequenceClassification"),
        ({"num_hidden_layers": 3}, "has no tensor|asks for"),
        ({"num_hidden_layers": 1 << 20}, "more layers than the file has tensors"),
        ({"vocab_size": 1 << 20, "hidden_size": 1 << 20}, "asks for|cannot build"),
        ({"num_labels": 1 << 40}, "too large"),
        ({"intermediate_size": 16}, "weights are not those"),
        ({"hidden_act": "os.system"}, "cannot build"),
        ({"model_type": "roberta"}, "RobertaForSequenceClassification"),
        ({"model_type": "vit"}, "no text model"),
        ({"model_type": "../bert"}, "no text model"),
        ({"model_type": None}, "no text model"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(
    change: dict[str, Any],
    said: str,
    folders: Callable[[str], tuple[Path, nn.Module]],
    tmp_path: Path,
) -> None:
    path, _ = folders("BertForSequenceClassification")
    config = json.loads((path / "config.json").read_text())
    state = load_file(path / "model.safetensors")
    with pytest.raises(InputError, match=said):
        hub.folder(written(tmp_path / "changed", {**config, **change}, state))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)


@settings(max_examples=40)
@given(data=st.data())
def test_whatever_stands_in_a_config_is_a_model_or_one_line(
    data: st.DataObject,
    folders: Callable[[str], tuple[Path, nn.Module]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path, _ = folders("BertForSequenceClassification")
    config = json.loads((path / "config.json").read_text())
    key = data.draw(st.sampled_from([*sorted(config), "is_decoder", "return_dict", "to_dict"]))
    config[key] = data.draw(JSON)
    changed = written(
        tmp_path_factory.mktemp("drawn"), config, load_file(path / "model.safetensors")
    )
    found: list[Any] = []
    try:
        found += hub.folder(changed)
    except InputError as error:
        found.append(str(error))
    if len(found) == 1:
        assert "\n" not in found[0]
        return
    model, source, *_ = found
    again = hub.build(json.loads(json.dumps(source["arguments"])), model.state_dict())
    torchfile.fits(again, model.state_dict(), changed)


def test_pooling_and_kind_are_those_of_the_folder(
    folders: Callable[[str], tuple[Path, nn.Module]], tmp_path: Path
) -> None:
    path = shutil.copytree(folders("DistilBertModel")[0], tmp_path / "sentences")
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"type": f"sentence_transformers.models.{name}", "path": place}
        for name, place in places.items()
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    asked = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "prompt": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(asked))
    model, source, inputs, _ = hub.folder(path)
    assert (source["arguments"]["pooling"], source["arguments"]["normalize"]) == ("cls", True)
    with torch.inference_mode():
        torch.testing.assert_close(model(*ids(inputs)).norm(dim=1), torch.ones(3))

    path = shutil.copytree(folders("BertForSequenceClassification")[0], tmp_path / "labels")
    config = json.loads((path / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    (path / "config.json").write_text(json.dumps(config))
    assert hub.folder(path)[3] == "multilabel"


def test_where_a_model_came_from_and_what_computes_it_is_not_kept(
    folders: Callable[[str], tuple[Path, nn.Module]], tmp_path: Path
) -> None:
    path = shutil.copytree(folders("DistilBertModel")[0], tmp_path / "folder")
    config = json.loads((path / "config.json").read_text())
    named = {
        "_name_or_path": "/home/somebody",
        "_attn_implementation": "org/kernel",
        "attn_implementation": "org/kernel",
        "dtype": "float16",
    }
    (path / "config.json").write_text(json.dumps({**config, **named}))
    model, source, *_ = hub.folder(path)
    assert not named.keys() & source["arguments"]["config"].keys()
    assert model.body.config._attn_implementation == "eager"  # type: ignore[union-attr]
    assert {each.dtype for each in model.parameters()} == {torch.float32}


# --- tokens


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A folder whose tokenizer knows a few words, and puts [C] and [S] around them."""
    tokenizers = pytest.importorskip(
        "tokenizers", reason="needs the extra compressor[transformers]"
    )
    known = {word: at for at, word in enumerate(["[P]", "[C]", "[S]", "[U]", "a", "b", "c"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[U]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[C] $A [S]",
        pair="[C] $A [S] $B:1 [S]:1",
        special_tokens=[("[C]", 1), ("[S]", 2)],
    )
    path = written(tmp_path / "words", {**PLAIN, "type_vocab_size": 2, "pad_token_id": 0})
    made.save(str(path / "tokenizer.json"))
    return path


def test_texts_become_the_tokens_that_the_tokenizer_defines(words: Path) -> None:
    one, mask, types = hub.tokens(words, ["a b", "", "a b c a b c x"], 6)
    assert one.tolist() == [[1, 4, 5, 2, 0, 0], [1, 2, 0, 0, 0, 0], [1, 4, 5, 6, 4, 2]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6]
    assert types.tolist() == [[0] * 6] * 3
    assert {each.dtype for each in (one, mask, types)} == {np.dtype(np.int64)}
    one, mask, types = hub.tokens(words, [("a", "x b")], 7)
    assert one.tolist() == [[1, 4, 2, 3, 5, 2, 0]]
    assert types.tolist() == [[0, 0, 0, 1, 1, 1, 0]]
    assert hub.tokens(words, [])[0].shape == (0, 20)  # as many as the model takes


def test_many_texts_are_the_same_as_one_at_a_time(words: Path) -> None:
    texts = ["a " * (at % 7) for at in range(1030)]
    found = hub.tokens(words, texts, 9)
    for at in (0, 6, 1023, 1024, 1029):
        for all_of, one in zip(found, hub.tokens(words, [texts[at]], 9), strict=True):
            assert np.array_equal(all_of[at], one[0])


def test_a_tokenizer_that_is_not_the_models_is_refused(words: Path) -> None:
    assert "takes from 4 to 20" in refused(hub.tokens, words, ["a"], 21)
    assert "takes from 4 to 20" in refused(hub.tokens, words, ["a"], 1)
    (words / "config.json").write_text(json.dumps({**PLAIN, "vocab_size": 5, "pad_token_id": 0}))
    assert "not of one model" in refused(hub.tokens, words, ["c"], 8)
    (words / "config.json").write_text(json.dumps(PLAIN))
    assert "add pad_token_id" in refused(hub.tokens, words, ["c"], 8)
    (words / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in refused(hub.tokens, words, ["c"], 8)
    (words / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(hub.tokens, words, ["c"], 8)


# --- without it


class Body(nn.Module):
    """Gives the states that it was made with."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, **given: Tensor) -> tuple[Tensor]:
        assert list(given) == ["input_ids", "attention_mask"]
        return (self.states,)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_the_mean_is_that_of_the_real_tokens(
    batch: int, length: int, seed: int, normalize: bool
) -> None:
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((batch, length, 5)).astype(np.float32)
    counts = rng.integers(1, length + 1, batch)
    mask = torch.from_numpy((np.arange(length) < counts[:, None]).astype(np.int64))
    wanted = np.stack([each[:count].mean(0) for each, count in zip(states, counts, strict=True)])
    for pooling, each in (("mean", wanted), ("cls", states[:, 0])):
        length_one = each / np.linalg.norm(each, axis=1, keepdims=True)
        found = hub.Text(Body(torch.from_numpy(states)), pooling, normalize)(mask, mask).numpy()
        np.testing.assert_allclose(found, length_one if normalize else each, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "must be a JSON object"),
        ({**PLAIN, "auto_map": {"AutoModel": "model.Model"}}, "never run"),
        ({**PLAIN, "text_config": {"auto_map": {"AutoModel": "m.M"}}}, "never run"),
        ({**PLAIN, "quantization_config": {"bits": 4}}, "quantized weights"),
        ({**PLAIN, "is_encoder_decoder": True}, "give an encoder"),
        ({**PLAIN, "text_config": {"model_type": "bert"}}, "several models"),
        ({**PLAIN, "hidden_size": 1 << 50}, "too large"),
        ({**PLAIN, "layer_norm_eps": float("nan")}, "too large"),
        ({**PLAIN, "architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering"),
        ({**PLAIN, "architectures": "BertModelX"}, "BertModelX"),
    ],
)
def test_a_config_with_code_or_nonsense_is_refused(config: Any, said: str, tmp_path: Path) -> None:
    assert said in refused(hub.folder, written(tmp_path / "folder", config))


def test_pickles_and_files_elsewhere_are_not_read(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    path = written(tmp_path / "folder", weights=None)
    assert "has no model.safetensors" in refused(hub.folder, path)
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    assert "pytorch_model.bin, a pickle" in refused(hub.folder, path)
    save_file(WEIGHTS, tmp_path / "secret.safetensors")
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "..", "", 3, ["a"]):
        written(path, weights=None, **{"model.safetensors.index": {"weight_map": {"a": name}}})
        assert "only names in its folder" in refused(hub.folder, path)
    for shards, said in (
        ({"weight_map": {"a": "pytorch_model.bin"}}, "only .safetensors"),
        ({"weight_map": {"a": "gone.safetensors"}}, "does not exist"),
        ({"weight_map": []}, "no weight_map"),
    ):
        written(path, weights=None, **{"model.safetensors.index": shards})
        assert said in refused(hub.folder, path)
    assert not (tmp_path / "ran").exists()
    assert "is no folder" in refused(hub.folder, tmp_path / "gone")
    assert "has no config.json" in refused(hub.folder, tmp_path)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ([{"type": "models.Dense", "path": "2_Dense"}], "has a Dense"),
        ([{"type": "models.Pooling", "path": "../elsewhere"}], "only names in its folder"),
        ([{"type": "models.Pooling", "path": "gone"}], "pools by ''"),
        ([{"path": ""}], "no list of modules"),
        (["Pooling"], "no list of modules"),
        (3, "no list of modules"),
    ],
)
def test_other_pooling_is_refused(modules: Any, said: str, tmp_path: Path) -> None:
    assert said in refused(hub.folder, written(tmp_path / "folder", modules=modules))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"config": PLAIN, "pooling": "max", "normalize": False},
        {"config": PLAIN, "pooling": ["mean"], "normalize": False},
        {"config": PLAIN, "pooling": "mean", "normalize": 1},
        {"config": [], "pooling": "mean", "normalize": False},
        {"config": PLAIN, "pooling": "mean", "normalize": False, "code": "x"},
        {"package": "os", "name": "system", "classes": None},
        {"package": ["timm"], "name": "resnet18", "classes": None},
        {"package": "timm", "name": "hf-hub:somebody/model", "classes": None},
        {"package": "timm", "name": "resnet18", "classes": 1 << 40},
        {"package": "timm", "name": "resnet18", "classes": "10"},
    ],
)
def test_a_file_can_ask_for_nothing_else(arguments: dict[str, Any]) -> None:
    refused(hub.build, arguments, WEIGHTS)


def test_a_package_that_is_missing_or_broken_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("transformers", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    said = refused(hub.folder, written(tmp_path / "folder"))
    assert said.endswith("pip install 'compressor[transformers]'")
    assert refused(hub.named, "timm:resnet18").endswith("pip install timm")
    (tmp_path / "torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    said = refused(hub.named, "torchvision:resnet18")
    assert "nms does not exist" in said
    assert f"for PyTorch {torch.__version__}" in said


# --- timm and torchvision, played


class Net(nn.Module):
    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Both packages as far as they are called, and the calls."""
    calls: list[Any] = []

    def create_model(name: str, **options: Any) -> nn.Module:
        calls.append((name, options))
        model = Net(options.get("num_classes", 1000))
        model.default_cfg = {"input_size": (3, 20, 20)}  # type: ignore[assignment]
        return model

    def segmenter(*, weights: Any = None, weights_backbone: Any = "fetched") -> nn.Module:
        calls.append(("segmenter", weights_backbone))
        return Net()

    def get_model(name: str, **options: Any) -> nn.Module:
        calls.append((name, options))
        return builders[name](**options)

    builders: dict[str, Any] = {
        "resnet18": lambda weights=None, num_classes=1000: Net(num_classes),
        "segmenter": segmenter,
    }
    timm, torchvision, models = (
        ModuleType(name) for name in ("timm", "torchvision", "torchvision.models")
    )
    played: tuple[tuple[ModuleType, dict[str, Any]], ...] = (
        (timm, {"is_model": {"net"}.__contains__, "create_model": create_model}),
        (torchvision, {"models": models}),
        (
            models,
            {
                "list_models": lambda: list(builders),
                "get_model_builder": builders.__getitem__,
                "get_model": get_model,
            },
        ),
    )
    for module, content in played:
        for key, value in {"__version__": "1.0", **content}.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_a_name_builds_a_model_without_weights_and_says_so(packages: list[Any]) -> None:
    said: list[str] = []
    model, source, inputs = hub.named("timm:net", said.append)
    assert len(said) == 1
    assert "random weights" in said[0]
    assert packages == [("net", {"pretrained": False})]
    assert inputs == (Input("input", (3, 20, 20)),)
    assert not model.training
    again, *_ = hub.named("timm:net")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    torchfile.fits(hub.build(source["arguments"], {}), model.state_dict(), Path("x"))


@pytest.mark.parametrize("spec", ["timm:net", "torchvision:resnet18"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_brings_the_weights_and_the_number_of_classes(
    spec: str, suffix: str, packages: list[Any], tmp_path: Path
) -> None:
    trained, file, said = Net(7), tmp_path / f"w.{suffix}", list[str]()
    if suffix == "pth":
        torch.save({"state_dict": trained.state_dict()}, file)
    else:
        save_file(trained.state_dict(), file)
    model, source, _ = hub.named(f"{spec}={file}", said.append)
    assert said == []
    assert source["arguments"]["classes"] == 7
    for each in (
        model,
        torchfile.load_state(
            hub.build(source["arguments"], trained.state_dict()), trained.state_dict(), file
        ),
    ):
        x = torch.rand(2, 3, 8, 8)
        assert torch.equal(each(x), trained(x))
    other = nn.Linear(2, 2)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    assert "no tensor" in refused(hub.named, f"{spec}={tmp_path / 'other.safetensors'}")


def test_nothing_is_fetched_for_torchvision(packages: list[Any]) -> None:
    hub.named("torchvision:segmenter")
    assert packages == [
        ("segmenter", {"weights": None, "weights_backbone": None}),
        ("segmenter", None),
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm:hf-hub:timm/resnet18", "no name of a model"),
        ("timm:local-dir:/tmp", "no name of a model"),
        ("timm:", "no name of a model"),
        ("timm:nothing", "has no model nothing"),
        ("torchvision:nothing", "has no model nothing"),
        ("timm:net=", "names no file"),
        ("timm:net=gone.pth", "does not exist"),
        ("hub:net", "write timm:NAME, torchvision:NAME"),
    ],
)
def test_other_names_are_refused(name: str, said: str, packages: list[Any]) -> None:
    assert said in refused(hub.named, name)
