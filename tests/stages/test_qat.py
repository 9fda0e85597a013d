"""Quantization-aware training: int8 in onnxruntime, better than ranges alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from standing import at_rest, settled, small_cnn, splits_of, task_of
from torch import Tensor, nn

from compressor import Artifact, Task, Unsuitable, loading
from compressor.loading import torchfile
from compressor.loading.edits import apply
from compressor.measure.runtime import Session, open_session
from compressor.metrics import METRICS
from compressor.stages import graph, perform
from compressor.stages.distill import distill
from compressor.stages.export import export, exported
from compressor.stages.prune import prune
from compressor.stages.qat import folded, qat
from compressor.stages.quantize import quantize
from compressor.training.evaluation import evaluate
from compressor.training.loop import fit
from compressor.training.recovery import from_labels
from compressor.training.settings import Training
from compressor.zoo.mobilenet import InvertedResidual, unit

RNG = np.random.default_rng(0)
X = RNG.standard_normal((200, 1, 8, 8)).astype(np.float32)
Y = np.arange(200) % 5


def pictures(model: nn.Module | None = None, **changes: Any) -> Task:
    given = {"splits": splits_of(X, Y), **changes}
    return task_of(model or small_cnn(), (1, 8, 8), **given)


def trained(task: Task, folder: Path, **given: Any) -> Artifact:
    settings = {"epochs": 1, "samples": 64, **given}
    return perform(qat, at_rest(task, folder), task, folder / "q", **settings)


def operators(model: nn.Module, task: Task, folder: Path) -> tuple[Any, Counter[str], Path]:
    """The exported graph, what onnxruntime makes of it, and where it is."""
    path = folder / "q.onnx"
    graph.write(exported(model, task, 20), path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    made = onnx.load(folder / "optimized.onnx")
    return onnx.load(path), Counter(node.op_type for node in made.graph.node), path


def mobile(width: int, activation: type[nn.Module] = nn.ReLU6) -> nn.Module:
    """A narrow MobileNetV2 of three blocks."""
    model = nn.Sequential(
        unit(1, width, 3),
        InvertedResidual(width, width, 2, 1),
        InvertedResidual(width, 2 * width, 2, 2),
        InvertedResidual(2 * width, 2 * width, 2, 1),
        unit(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU6):
            model.set_submodule(name, activation())
    return model


def test_the_export_is_int8_throughout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = pictures(settled(mobile(4), torch.from_numpy(X[:32])))
    model, _ = torchfile.open_model(trained(task, tmp_path), task)
    proto, made, path = operators(model, task, tmp_path)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert made["QLinearConv"] == convolutions == 11
    assert made["QLinearAdd"] == 2
    assert made["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "BatchNormalization", "Clip"} & set(made)
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    assert Counter(tensor.data_type for tensor in held.values() if len(tensor.dims) > 1) == {
        onnx.TensorProto.INT8: convolutions + 1
    }
    for node in proto.graph.node:
        if node.op_type == "Conv":
            assert len(node.input) == 3  # weight, and the bias of the folded normalisation
    session = Session(open_session(path))
    with torch.no_grad():
        wanted = model(torch.from_numpy(X)).numpy()
    apart = np.abs(session(X) - wanted).max(1) / (1 + np.abs(wanted).max())
    # A sum on the border between two steps may go either way: not in most examples.
    assert np.median(apart) < 1e-6
    assert apart.max() < 0.05


def test_the_state_comes_back_and_says_what_was_done(tmp_path: Path) -> None:
    task = pictures()
    made = trained(task, tmp_path)
    model, edits = torchfile.open_model(made, task)
    again, _ = torchfile.open_model(made, task)
    x = torch.from_numpy(X)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
    assert [edit["edit"] for edit in edits] == ["rewrite", "rewrite", "fake_quantize"]
    step = made.steps[-1]
    assert step["stage"] == "qat"
    assert step["settings"]["epochs"] == 1
    assert task.splits is not None
    reached = evaluate(model, task.splits.validate, METRICS[task.kind][task.metric])
    assert reached >= step["facts"]["validate"]["ranges"]
    assert len(step["facts"]["history"]) == 1


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    task = pictures()
    one = trained(task, tmp_path).path.read_bytes()
    torch.rand(3)
    assert trained(task, tmp_path).path.read_bytes() == one


def test_a_pruned_model_stays_pruned(tmp_path: Path) -> None:
    task = pictures()
    cut = prune(at_rest(task, tmp_path), task, tmp_path / "cut", ratio=0.5)
    made = perform(qat, cut, task, tmp_path / "q", epochs=1)
    before, edits = torchfile.open_model(cut, task)
    after, more = torchfile.open_model(made, task)
    assert more[: len(edits)] == edits
    for name, parameter in before.named_parameters():
        if name in dict(after.named_parameters()):
            assert after.get_parameter(name).shape == parameter.shape
    assert [step["stage"] for step in made.steps] == ["prune", "qat"]


def test_it_can_be_recovered_further_but_not_trained_twice(tmp_path: Path) -> None:
    task = pictures()
    made = trained(task, tmp_path)
    with pytest.raises(Unsuitable, match="trained for int8 already"):
        qat(made, task, tmp_path / "again")
    more = perform(distill, made, task, tmp_path / "more", epochs=1)
    assert torchfile.open_model(more, task)[1] == torchfile.open_model(made, task)[1]


def test_what_it_does_not_suit(tmp_path: Path) -> None:
    with pytest.raises(Unsuitable, match="no data to train on: add --data SPEC"):
        trained(pictures(splits=None), tmp_path)
    bare = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
    with pytest.raises(Unsuitable, match="no convolution and no linear layer"):
        trained(pictures(bare), tmp_path)


def test_choices_do_not_read_test(tmp_path: Path) -> None:
    task = pictures()
    assert task.splits is not None
    nobody = dataclasses.replace(task.splits.test, fetch=None)
    trained(pictures(splits=dataclasses.replace(task.splits, test=nobody)), tmp_path)


class Shared(nn.Module):
    """The second convolution is read twice; the third is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))
        self.a, self.b, self.c = (nn.BatchNorm2d(1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.one(x))
        y = self.two(x)
        x = self.b(y) + y
        return self.three(self.c(self.three(x)))  # type: ignore[no-any-return]


def test_only_what_one_normalisation_reads_is_folded() -> None:
    x = torch.from_numpy(X)
    model = settled(Shared(), x)
    with torch.no_grad():
        wanted = model(x)
        edits = folded(model, x)
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert edits == [{"edit": "rewrite", "module": "a", "as": "fold", "into": "one"}]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_folding_computes_the_same(affine: bool, bias: bool) -> None:
    torch.manual_seed(0)
    for layer, norm, shape in (
        (nn.Conv1d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm1d(6, affine=affine), (8, 4, 9)),
        (nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6, affine=affine), (8, 3, 5, 5)),
        (nn.Conv3d(1, 6, 2, bias=bias), nn.BatchNorm3d(6, affine=affine), (8, 1, 3, 3, 3)),
        (nn.Linear(5, 6, bias=bias), nn.BatchNorm1d(6, affine=affine), (8, 5)),
    ):
        x = 3 * torch.randn(shape) + 1
        model = settled(nn.Sequential(layer, norm), x)
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 2)
        with torch.no_grad():
            wanted = model(x)
            apply(model, [{"edit": "rewrite", "module": "1", "as": "fold", "into": "0"}])
            torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
        assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]


STREAMS = (
    (("0.1", "1.conv.3"), ("1.conv.0.0", "2.conv.0.0")),
    (("2.conv.3", "3.conv.3"), ("3.conv.0.0", "4.0")),
)
"""What writes to each residual stream of :func:`mobile` and what reads it."""


def uneven(seed: int) -> Task:
    """A trained narrow MobileNetV2 on digits whose residual streams have channels that differ in
    range up to 1,100 times, and so has every tensor that is added up. It computes the same with
    and without: ReLU does not mind a factor, and the next weights take it back. Equalisation cannot
    undo it, since a stream has several writers and readers."""
    torch.manual_seed(seed)
    model = mobile(8, nn.ReLU)
    splits = loading.task(model, data="digits").splits
    assert splits is not None
    fit(
        model,
        splits,
        from_labels("classification"),
        Training(epochs=15, learning_rate=2e-2),
        metric=("accuracy", METRICS["classification"]["accuracy"]),
        seed=seed,
    )
    draw = torch.Generator().manual_seed(seed)
    for writers, readers in STREAMS:
        factor = (
            7 * torch.rand(len(model.get_parameter(f"{writers[0]}.weight")), generator=draw)
        ).exp()
        with torch.no_grad():
            for name in writers:
                model.get_parameter(f"{name}.weight").mul_(factor)
                model.get_parameter(f"{name}.bias").mul_(factor)
            for name in readers:
                model.get_parameter(f"{name}.weight").div_(factor.view(1, -1, 1, 1))
    return loading.task(model, data="digits")


@pytest.mark.slow
def test_it_beats_static_int8_where_that_loses(tmp_path: Path) -> None:
    """Judged on the test split."""
    task = uneven(2)
    assert task.splits is not None
    x, y = task.splits.test.head(len(task.splits.test))
    source = export(at_rest(task, tmp_path), task, tmp_path / "float")
    for name, settings in (("ranges", {"repair": ()}), ("repaired", {})):
        quantize(source, task, tmp_path / name, scheme="static", left=(), disabled=(), **settings)
    made = qat(at_rest(task, tmp_path), task, tmp_path / "q")
    _, kernels, _ = operators(torchfile.open_model(made, task)[0], task, tmp_path)
    assert kernels["QLinearConv"] == 11
    right = {
        name: float((Session(open_session(tmp_path / f"{name}.onnx"))(*x).argmax(1) == y).mean())
        for name in ("float", "ranges", "repaired", "q")
    }
    assert right["ranges"] < right["repaired"] < right["float"] - 0.05, right
    assert right["q"] > right["repaired"] + 0.05, right
