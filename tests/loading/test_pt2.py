"""Exported programs: rebuilt layers compute the same, can be pruned, and no pickle is opened."""

from __future__ import annotations

import copy
import json
import os
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._pytree import tree_leaves

from compressor import zoo
from compressor.artifact import Artifact
from compressor.errors import InputError
from compressor.loading import embedded, pt2, torchfile
from compressor.stages import export, prune
from compressor.task import Input, Task

ANY = {0: torch.export.Dim.DYNAMIC}


def saved(path: Path, model: nn.Module, *examples: Tensor, fixed: bool = False) -> Path:
    """``model`` as ``torch.export.save`` writes it, for any batch unless ``fixed``."""
    shapes = None if fixed else (ANY,) * len(examples)
    with warnings.catch_warnings(action="ignore"):
        program = torch.export.export(model, examples, dynamic_shapes=shapes)
        torch.export.save(program, path)
    return path


def rebuilt(path: Path) -> tuple[nn.Module, tuple[Input, ...]]:
    description, state, inputs = pt2.read(path)
    plain = json.loads(json.dumps(description))
    return torchfile.load_state(embedded.build(plain), state, path).eval(), inputs


def apart(model: nn.Module, other: nn.Module, *given: Tensor) -> float:
    with torch.no_grad():
        ours, theirs = tree_leaves(model(*given)), tree_leaves(other(*given))
    assert len(ours) == len(theirs)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def trained(name: str, shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    model = zoo.build(name, zoo.arguments_for(name, shape, 10))
    with torch.no_grad():
        model.train()(torch.rand(4, *shape))
    return model.eval()


FAMILIES = {
    "mlp": (30,),
    "cnn": (1, 8, 8),
    "vit": (1, 8, 8),
    "unet": (1, 8, 8),
    "lstm": (8, 4),
    "gru": (8, 4),
    "resnet20": (1, 8, 8),
    "mobilenet_v2": (1, 16, 16),
}


@pytest.mark.parametrize(
    ("name", "fixed"),
    [
        *((name, True) for name in ("mlp", "cnn", "vit", "unet", "lstm", "gru")),
        ("vit", False),
        *(
            pytest.param(name, fixed, marks=pytest.mark.slow)
            for name in FAMILIES
            for fixed in (False, True)
        ),
    ],
)
def test_every_family_computes_the_same(tmp_path: Path, name: str, fixed: bool) -> None:
    model, shape = trained(name, FAMILIES[name]), FAMILIES[name]
    path = saved(tmp_path / "model.pt2", model, torch.rand(2, *shape), fixed=fixed)
    found, inputs = rebuilt(path)
    assert [(one.shape, one.dtype) for one in inputs] == [(shape, "float32")]
    torch.manual_seed(1)
    for batch in (1, 5):
        assert apart(model, found, torch.randn(batch, *shape)) <= 1e-6
    assert set(found.state_dict()) == set(model.state_dict())
    for key, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor)
    kinds = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.RNNBase)
    for key, layer in model.named_modules():
        if isinstance(layer, kinds):
            assert type(found.get_submodule(key)) is type(layer)


def test_the_program_itself_agrees(tmp_path: Path) -> None:
    """Not with the model that was exported, but with what PyTorch reads from the file."""
    path = saved(tmp_path / "model.pt2", trained("vit", (1, 8, 8)), torch.rand(2, 1, 8, 8))
    assert apart(torch.export.load(path).module(), rebuilt(path)[0], torch.rand(3, 1, 8, 8)) <= 1e-6


class Shuffled(nn.Module):
    """Channel shuffle, and a view to a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.first(x)))
        batch, channels, height, width = y.shape
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        y = self.grouped(y.reshape(batch, channels, height, width))
        found: Tensor = self.head(y.view(-1, 128))
        return found


class Attentive(nn.Module):
    """PyTorch's own attention, with a class token: heads lie beside the batch."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.embed = nn.Linear(6, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.place = nn.Parameter(torch.randn(1, 6, 16))
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1)
        found: Tensor = self.head(self.encoder(tokens + self.place)[:, 0])
        return found


class Tied(nn.Module):
    """A language model whose output layer is its embedding, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.places = nn.Embedding(6, 16)
        self.register_buffer("order", torch.arange(6), persistent=False)
        self.out = nn.Linear(16, 50, bias=False)
        self.out.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.out(self.words(tokens) + self.places(self.order)).mean(1)
        return found


class Written(nn.Module):
    """It writes into a view of what it reads later, and computes in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x.to(torch.bfloat16))
        first = y[:, 0]
        y.mul_(2)
        found: Tensor = first.float() + y.relu_().sum(1)
        return found


class Many(nn.Module):
    """One of each other layer, two inputs, several outputs, a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding="same")
        self.norm, self.slope = nn.GroupNorm(2, 8), nn.PReLU(8)
        self.instance = nn.InstanceNorm1d(8, affine=True)
        self.both = nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True, dropout=0.1)
        self.plain = nn.RNN(12, 5, nonlinearity="relu")
        self.twice = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.ones(5))
        self.up = nn.ConvTranspose1d(8, 4, 2, stride=2)

    def forward(self, x: Tensor, more: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.instance(self.slope(self.norm(self.conv(x))))
        up = self.up(y)
        y, _ = self.both(y.transpose(1, 2))
        y, last = self.plain(y.transpose(0, 1))
        y = F.layer_norm(self.twice(F.silu(self.twice(y[-1]))) * self.scale, (5,))
        return y + more, {"last": last[0], "up": torch.sigmoid(up)}


OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "shuffled": (Shuffled, (torch.rand(2, 3, 6, 6),)),
    "attentive": (Attentive, (torch.rand(2, 5, 6),)),
    "tied": (Tied, (torch.randint(0, 50, (2, 6)),)),
    "many": (Many, (torch.rand(2, 4, 7), torch.rand(2, 5))),
    "written": (Written, (torch.rand(2, 4),)),
    "root": (lambda: nn.Linear(4, 3), (torch.rand(2, 4),)),
}


@pytest.mark.parametrize("batch", [0, 1, 2], ids=["any-batch", "batch-1", "batch-2"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_forms_take_any_batch(tmp_path: Path, name: str, batch: int) -> None:
    make, examples = OTHERS[name]
    torch.manual_seed(0)
    model = make().eval()
    given = tuple(one[: batch or 2] for one in examples)
    found, inputs = rebuilt(saved(tmp_path / "model.pt2", model, *given, fixed=bool(batch)))
    assert len(inputs) == len(examples)
    for size in (1, 3):
        more = tuple(torch.cat([one, one])[:size] for one in examples)
        assert apart(model, found, *more) <= 1e-6


def test_an_embedding_says_how_many_words_there_are(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt2", Tied().eval(), torch.zeros(2, 6, dtype=torch.int64))
    assert pt2.read(path)[2] == (Input("tokens", (6,), "int64", 50),)


def test_a_program_in_core_operators_gets_its_layers_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3))
    model.eval()
    x = torch.rand(2, 2, 6)
    with warnings.catch_warnings(action="ignore"):
        program = torch.export.export(model, (x,), dynamic_shapes=(ANY,)).run_decompositions()
        torch.export.save(program, tmp_path / "model.pt2")
    found, _ = rebuilt(tmp_path / "model.pt2")
    assert apart(model, found, torch.rand(3, 2, 6)) <= 1e-6
    assert [type(found.get_submodule(at)) for at in "013"] == [type(model[at]) for at in (0, 1, 3)]


def as_task(path: Path) -> tuple[Task, Artifact]:
    description, state, inputs = pt2.read(path)
    model = torchfile.load_state(embedded.build(description), state, path).eval()
    source = {"factory": embedded.FACTORY, "arguments": description}
    given = Task(
        "given", "classification", lambda: copy.deepcopy(model), source, inputs, "accuracy"
    )
    at_rest = path.with_suffix(".safetensors")
    torchfile.write(at_rest, model, source)
    return given, Artifact.of(at_rest, "torch")


@pytest.mark.parametrize(
    ("make", "example", "cut"),
    [
        (Shuffled, torch.rand(2, 3, 6, 6), ["grouped"]),
        (Attentive, torch.rand(1, 5, 6), ["self_attn.in_proj", "linear1"]),
        (lambda: trained("lstm", (8, 4)), torch.rand(2, 8, 4), ["rnn"]),
    ],
    ids=["shuffled", "attentive", "lstm"],
)
def test_it_can_be_pruned_and_comes_back_from_its_source(
    tmp_path: Path, make: Callable[[], nn.Module], example: Tensor, cut: list[str]
) -> None:
    torch.manual_seed(0)
    given, whole = as_task(saved(tmp_path / "model.pt2", make().eval(), example, fixed=True))
    pruned = prune(whole, given, tmp_path / "pruned", ratio=0.5)
    layers = pruned.steps[-1]["facts"]["layers"]
    assert [next(name for name in layers if name.endswith(each)) for each in cut]
    assert all(after <= before // 2 for before, after in layers.values())
    model, _ = torchfile.open_model(pruned, given)
    again, source = torchfile.rebuild(
        pruned.path, lambda source, state: embedded.build(source["arguments"])
    )
    assert source["factory"] == embedded.FACTORY
    x = torch.rand(3, *example.shape[1:])
    assert apart(model, again, x) == 0
    assert sum(each.numel() for each in model.parameters()) < 0.75 * sum(
        each.numel() for each in given.model().parameters()
    )


def test_a_pruned_program_exports(tmp_path: Path) -> None:
    model = trained("cnn", (1, 8, 8))
    given, whole = as_task(saved(tmp_path / "model.pt2", model, torch.rand(2, 1, 8, 8), fixed=True))
    pruned = prune(whole, given, tmp_path / "pruned", ratio=0.5)
    exported = export(pruned, given, tmp_path / "exported")
    assert max(exported.steps[-1]["facts"]["parity"].values()) < 1e-5


class Fixed(nn.Module):
    """Its code insists on the batch it was exported with."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0)


class Listed(nn.Module):
    """An operator outside the closed set."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


class Chosen(nn.Module):
    """A nested graph."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
        return found


class Counting(nn.Module):
    """It changes a buffer as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count


@pytest.mark.parametrize(
    ("model", "fixed", "why"),
    [
        (Fixed().eval(), True, "exported for a batch of 2 .* dynamic_shapes"),
        (Listed().eval(), False, "cannot be rebuilt: .*svdvals"),
        (Chosen().eval(), False, "nested graphs"),
        (Counting().eval(), False, "changes its own 'count'"),
        (nn.BatchNorm1d(3).train(), False, r"after model.eval\(\)"),
        (nn.Sequential(nn.Linear(3, 3), nn.Dropout()).train(), False, r"after model.eval\(\)"),
    ],
    ids=["batch", "operator", "nested", "counting", "training", "dropout"],
)
def test_what_cannot_be_rebuilt_says_why(
    tmp_path: Path, model: nn.Module, fixed: bool, why: str
) -> None:
    path = saved(tmp_path / "model.pt2", model, torch.rand(2, 3, 3), fixed=fixed)
    with pytest.raises(InputError, match=why) as caught:
        pt2.read(path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    path = tmp_path_factory.mktemp("whole") / "model.pt2"
    return saved(path, model, torch.rand(2, 4))


def edited(whole: Path, path: Path, name: str, change: Callable[[Any], Any]) -> Path:
    """A copy whose entry ``name`` went through ``change``: bytes, or JSON as values."""
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            data: Any = old.read(entry)
            if entry.filename.endswith(name):
                if name.endswith(".json"):
                    said = json.loads(data)
                    data = json.dumps(change(said) or said)
                else:
                    data = change(data)
            new.writestr(entry.filename, data)
    return path


MODEL, WEIGHTS = "models/model.json", "model_weights_config.json"


def test_an_unchanged_copy_reads(whole: Path, tmp_path: Path) -> None:
    copied = edited(whole, tmp_path / "model.pt2", MODEL, lambda said: None)
    assert apart(rebuilt(copied)[0], rebuilt(whole)[0], torch.rand(3, 4)) == 0


def test_its_pickles_are_never_opened(whole: Path, tmp_path: Path) -> None:
    """``torch.export.load`` would run the sample inputs."""
    mark = tmp_path / "mark"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(mark),)

    torch.save(Evil(), tmp_path / "evil.pt")
    evil = (tmp_path / "evil.pt").read_bytes()
    path = edited(whole, tmp_path / "model.pt2", "sample_inputs/model.pt", lambda data: evil)
    assert apart(rebuilt(path)[0], rebuilt(whole)[0], torch.rand(3, 4)) == 0
    assert not mark.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert mark.exists()


def nodes(said: Any) -> Any:
    return said["graph_module"]["graph"]["nodes"]


def first(said: Any) -> Any:
    return said["config"]["0.weight"]


def put(reach: Callable[[Any], Any], key: Any, value: Any) -> Callable[[Any], None]:
    def change(said: Any) -> None:
        reach(said)[key] = value

    return change


HOSTILE: list[tuple[str, Callable[[Any], Any]]] = [
    (MODEL, put(lambda said: nodes(said)[0], "target", "os.system")),
    (MODEL, put(lambda said: nodes(said)[0], "target", "torch.ops.aten.from_file.default")),
    (MODEL, put(lambda said: nodes(said)[0], "target", "_operator.attrgetter")),
    (MODEL, put(lambda said: nodes(said)[1]["inputs"][0], "arg", {"as_graph": {"name": "g"}})),
    (MODEL, put(lambda said: nodes(said)[1]["inputs"][0], "arg", {"as_tensor": {"name": "no"}})),
    (MODEL, put(lambda said: nodes(said)[1]["inputs"][0], "arg", {"as_custom_obj": {}})),
    (MODEL, put(lambda said: said["schema_version"], "major", 9)),
    (MODEL, put(lambda said: said["graph_module"]["signature"], "output_specs", [])),
    (MODEL, put(lambda said: said["graph_module"]["graph"], "nodes", [])),
    (MODEL, lambda said: ["["]),
    (MODEL, lambda said: {"a": 1}),
    (WEIGHTS, put(first, "use_pickle", True)),
    (WEIGHTS, put(first, "path_name", "../../../etc/passwd")),
    (WEIGHTS, put(lambda said: first(said)["tensor_meta"], "sizes", [{"as_int": 2**63}] * 2)),
    (WEIGHTS, put(lambda said: first(said)["tensor_meta"], "sizes", [{"as_int": 2**20}] * 2)),
    (WEIGHTS, put(lambda said: first(said)["tensor_meta"], "strides", [{"as_int": 0}] * 2)),
    (WEIGHTS, put(lambda said: first(said)["tensor_meta"], "strides", [{"as_int": 9}] * 2)),
    (WEIGHTS, put(lambda said: first(said)["tensor_meta"], "storage_offset", {"as_int": -1})),
    (WEIGHTS, put(lambda said: first(said)["tensor_meta"], "dtype", 99)),
    (WEIGHTS, put(lambda said: said, "config", {})),
    ("weights/weight_0", lambda data: data[:-4]),
    ("byteorder", lambda data: b"big"),
]


@pytest.mark.parametrize(("name", "change"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_archives_are_one_line_in_little_memory(
    whole: Path, tmp_path: Path, name: str, change: Callable[[Any], Any]
) -> None:
    path = edited(whole, tmp_path / "model.pt2", name, change)
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            pt2.read(path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_value_that_fills_the_memory_is_refused(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x, (0, 4)).sum(-1)

    path = saved(tmp_path / "model.pt2", Wide().eval(), torch.rand(2, 4))

    def wider(said: Any) -> None:
        pad = next(each for each in nodes(said) if ".pad." in each["target"])
        pad["inputs"][1]["arg"]["as_ints"] = [0, 2**40]

    rebuilt(path)
    with pytest.raises(InputError, match="cannot be meant"):
        pt2.read(edited(path, tmp_path / "wide.pt2", MODEL, wider))


def test_other_files_say_what_they_are(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(InputError, match="0 exported models"):
        pt2.read(tmp_path / "model.pt")
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(InputError, match="damaged"):
        pt2.read(tmp_path / "text.pt2")
