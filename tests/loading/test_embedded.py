"""Descriptions: every layer comes back bit for bit, and JSON cannot say anything else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from compressor.errors import InputError
from compressor.loading import embedded
from compressor.loading.graph.classes import CLASSES
from compressor.loading.graph.functions import FUNCTIONS
from compressor.loading.torchfile import load_state
from compressor.task import Input

HERE = Path("given")

LINE, IMAGE, VOLUME = (2, 4, 8), (2, 4, 8, 8), (2, 4, 4, 4, 4)
POOLED = {"1d": (2, 4, 4), "2d": (2, 4, 4, 4), "3d": (2, 4, 2, 2, 2)}
SHAPES = {"1d": LINE, "2d": IMAGE, "3d": VOLUME}


def by_axes(*names: str, **arguments: Any) -> dict[str, tuple[nn.Module, ...]]:
    """The 1d, 2d and 3d layers of these names, all with the same arguments."""
    return {
        f"{name}{axes}": (getattr(nn, f"{name}{axes}")(**arguments), SHAPES[axes])
        for name in names
        for axes in ("1d", "2d", "3d")
    }


def padded(name: str, **arguments: Any) -> dict[str, Any]:
    return {
        f"{name}{axes}": (
            getattr(nn, f"{name}{axes}")(tuple(range(1, 3)) * int(axes[0]), **arguments),
            SHAPES[axes],
        )
        for axes in ("1d", "2d", "3d")
    }


def pointwise(*layers: nn.Module) -> dict[str, Any]:
    return {type(layer).__name__: (layer, IMAGE) for layer in layers}


def unpooled() -> dict[str, Any]:
    found = {}
    for axes, shape in POOLED.items():
        where = torch.zeros(shape, dtype=torch.int64) + torch.arange(shape[-1])
        found[f"MaxUnpool{axes}"] = (
            getattr(nn, f"MaxUnpool{axes}")(2, 2),
            (torch.rand(shape), where),
        )
    return found


def encoder_layer(**arguments: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, **arguments)


SEQUENCE = (3, 2, 8)
EXAMPLES: dict[str, tuple[nn.Module, Any]] = {
    "Sequential": (nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.Tanh())), (2, 8)),
    "ModuleList": (nn.ModuleList([nn.Linear(8, 4), nn.ReLU()]), None),
    "ModuleDict": (nn.ModuleDict({"first": nn.Linear(8, 4)}), None),
    "Identity": (nn.Identity(), IMAGE),
    "Linear": (nn.Linear(8, 3, bias=False), IMAGE),
    "NonDynamicallyQuantizableLinear": (NonDynamicallyQuantizableLinear(8, 3), IMAGE),
    "Bilinear": (nn.Bilinear(3, 4, 5), (torch.rand(2, 3), torch.rand(2, 4))),
    **by_axes("Conv", in_channels=4, out_channels=6, kernel_size=3, padding=1, groups=2, stride=2),
    **by_axes(
        "ConvTranspose", in_channels=4, out_channels=6, kernel_size=3, stride=2, output_padding=1
    ),
    **by_axes("BatchNorm", num_features=4, momentum=None),
    **by_axes("InstanceNorm", num_features=4, affine=True, track_running_stats=True),
    "SyncBatchNorm": (nn.SyncBatchNorm(4).eval(), IMAGE),
    "GroupNorm": (nn.GroupNorm(2, 4, eps=1e-3), IMAGE),
    "LayerNorm": (nn.LayerNorm((8, 8), bias=False), IMAGE),
    "RMSNorm": (nn.RMSNorm(8), IMAGE),
    "LocalResponseNorm": (nn.LocalResponseNorm(2, k=2.0), IMAGE),
    "CrossMapLRN2d": (nn.CrossMapLRN2d(2, alpha=0.5), IMAGE),
    **pointwise(
        *(nn.ReLU(inplace=True), nn.ReLU6(), nn.SELU(), nn.SiLU(), nn.Mish(), nn.Hardswish()),
        *(nn.Hardsigmoid(), nn.ELU(0.5), nn.CELU(0.5), nn.LeakyReLU(0.3), nn.Hardtanh(-2, 0.5)),
        *(nn.RReLU(0.1, 0.2), nn.Threshold(0.2, -1.0), nn.PReLU(4), nn.GELU("tanh"), nn.GLU(1)),
        *(nn.Softplus(2.0, 3.0), nn.Softshrink(0.1), nn.Hardshrink(0.1), nn.Sigmoid()),
        *(nn.LogSigmoid(), nn.Tanh(), nn.Tanhshrink(), nn.Softsign(), nn.Softmax(1)),
        *(nn.LogSoftmax(1), nn.Softmin(1), nn.Softmax2d(), nn.Dropout(0.3), nn.AlphaDropout(0.3)),
        *(nn.FeatureAlphaDropout(0.3), nn.Flatten(2), nn.Unflatten(1, (2, -1))),
        nn.Unfold(3, padding=1),
        *(nn.Upsample(scale_factor=1.5, mode="bilinear", align_corners=True),),
        *(nn.UpsamplingNearest2d(scale_factor=2), nn.UpsamplingBilinear2d((5, 6))),
        *(nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ChannelShuffle(2)),
    ),
    "Fold": (nn.Fold((4, 5), (2, 2)), (2, 12, 12)),
    **by_axes("MaxPool", kernel_size=2, stride=1, ceil_mode=True),
    **by_axes("AvgPool", kernel_size=3, padding=1, count_include_pad=False),
    **by_axes("LPPool", norm_type=2, kernel_size=2),
    **by_axes("AdaptiveAvgPool", output_size=3),
    **by_axes("AdaptiveMaxPool", output_size=3, return_indices=True),
    "FractionalMaxPool2d": (nn.FractionalMaxPool2d(2, output_ratio=(0.5, 0.6)), IMAGE),
    "FractionalMaxPool3d": (nn.FractionalMaxPool3d(2, output_size=2), VOLUME),
    **unpooled(),
    **padded("ConstantPad", value=0.5),
    **padded("ZeroPad"),
    **padded("ReflectionPad"),
    **padded("ReplicationPad"),
    **padded("CircularPad"),
    **by_axes("Dropout", p=0.4),
    "Embedding": (nn.Embedding(9, 4, padding_idx=-1), torch.arange(8)),
    "EmbeddingBag": (nn.EmbeddingBag(9, 4, mode="sum"), torch.arange(8).reshape(2, 4)),
    "RNN": (nn.RNN(8, 5, 2, nonlinearity="relu", bias=False), SEQUENCE),
    "GRU": (nn.GRU(8, 5, bidirectional=True, batch_first=True), SEQUENCE),
    "LSTM": (nn.LSTM(8, 5, 2, dropout=0.2, proj_size=3), SEQUENCE),
    "RNNCell": (nn.RNNCell(8, 5, nonlinearity="relu"), (2, 8)),
    "GRUCell": (nn.GRUCell(8, 5, bias=False), (2, 8)),
    "LSTMCell": (nn.LSTMCell(8, 5), (2, 8)),
    "MultiheadAttention": (
        nn.MultiheadAttention(8, 2, dropout=0.1, add_bias_kv=True, kdim=4, vdim=4),
        (torch.rand(3, 2, 8), torch.rand(5, 2, 4), torch.rand(5, 2, 4)),
    ),
    "TransformerEncoderLayer": (encoder_layer(activation="gelu", norm_first=True), SEQUENCE),
    "TransformerDecoderLayer": (
        nn.TransformerDecoderLayer(8, 2, 16, activation="gelu"),
        (torch.rand(SEQUENCE), torch.rand(SEQUENCE)),
    ),
    "TransformerEncoder": (
        nn.TransformerEncoder(encoder_layer(batch_first=True), 2, nn.LayerNorm(8)),
        SEQUENCE,
    ),
    "TransformerDecoder": (
        nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, activation=torch.relu), 2),
        (torch.rand(SEQUENCE), torch.rand(SEQUENCE)),
    ),
    "Transformer": (
        nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        (torch.rand(SEQUENCE), torch.rand(SEQUENCE)),
    ),
    "CosineSimilarity": (nn.CosineSimilarity(2), (torch.rand(LINE), torch.rand(LINE))),
    "PairwiseDistance": (
        nn.PairwiseDistance(3.0, keepdim=True),
        (torch.rand(LINE), torch.rand(LINE)),
    ),
}


def back(module: nn.Module) -> nn.Module:
    """The module as it comes out of JSON and its own state."""
    said = json.loads(json.dumps(embedded.describe(module)))
    return load_state(embedded.build(said), module.state_dict(), HERE)


def given_to(wanted: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    if isinstance(wanted, Tensor):
        return (wanted,)
    if isinstance(wanted[0], Tensor):
        return tuple(wanted)
    return (torch.randn(wanted),)


def outputs(module: nn.Module, wanted: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    torch.manual_seed(2)
    with torch.no_grad():
        found = module(*(each.clone() for each in given_to(wanted)))
    return [each for each in tree_leaves(found) if isinstance(each, Tensor)]


def flags(module: nn.Module) -> list[Any]:
    return [
        [(name, part.training) for name, part in module.named_modules()],
        [(name, each.requires_grad, each.dtype) for name, each in module.named_parameters()],
        [(name, each.dtype) for name, each in module.named_buffers()],
    ]


def test_every_class_has_an_example() -> None:
    assert set(EXAMPLES) == set(CLASSES)
    assert all(type(module).__name__ == name for name, (module, _) in EXAMPLES.items())


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:LSTM with projections")
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_class_comes_back(name: str) -> None:
    module, wanted = copy.deepcopy(EXAMPLES[name])
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.1, 1.0)
    for at, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(at % 2 == 1)
    modes = (False,) if name == "SyncBatchNorm" else (True, False)
    for mode in modes:
        module.train(mode)
        rebuilt = back(module)
        assert type(rebuilt) is type(module)
        assert flags(rebuilt) == flags(module)
        assert repr(rebuilt) == repr(module)
        if wanted is not None:
            for ours, theirs in zip(
                outputs(copy.deepcopy(module), wanted), outputs(rebuilt, wanted), strict=True
            ):
                assert torch.equal(ours, theirs)


def test_a_double_model_keeps_its_precision() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.LSTM(6, 3)).double()
    rebuilt = back(module)
    assert flags(rebuilt) == flags(module)
    for name, tensor in module.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], tensor)


def test_what_is_shared_stays_shared() -> None:
    act, layer = nn.ReLU(), nn.Linear(4, 4)
    module = nn.Sequential(layer, act, layer, act)
    rebuilt = back(module)
    assert rebuilt[0] is rebuilt[2]
    assert len(list(rebuilt.parameters())) == 2
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    sketch = embedded.build(embedded.describe(tied))
    assert sketch[1].weight is sketch[0].weight
    assert sketch[1].bias is not sketch[0].bias


class Own(nn.Linear):
    pass


def replaced_forward(module: nn.Module) -> None:
    module[0].forward = lambda x: x


def hooked(module: nn.Module) -> None:
    module[0].register_forward_hook(lambda *_: None)


def other_class(module: nn.Module) -> None:
    module[0] = Own(4, 4)


def wrong_size(module: nn.Module) -> None:
    module[0].weight = nn.Parameter(torch.zeros(4, 5))


def more_tensors(module: nn.Module) -> None:
    module[0].register_parameter("extra", nn.Parameter(torch.zeros(1)))


def other_derived(module: nn.Module) -> None:
    module[1]._reversed_padding_repeated_twice = [7, 7]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (replaced_forward, "replaces 'forward'"),
        (hooked, "hooks"),
        (other_class, "test_embedded.Own"),
        (wrong_size, r"weight has shape \(4, 5\)"),
        (more_tensors, "extra has shape"),
        (other_derived, "_reversed_padding_repeated_twice"),
    ],
)
def test_what_a_description_cannot_say_is_refused(
    damage: Callable[[nn.Module], None], why: str
) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3))
    embedded.describe(module)
    damage(module)
    with pytest.raises(InputError, match=why):
        embedded.describe(module)


def test_a_decoder_that_pytorch_cannot_copy_is_refused() -> None:
    """In torch 2.13 its activation is ReLU in every copy (``__setstate__`` of that layer)."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.SiLU())
    assert type(back(encoder).activation) is nn.SiLU
    decoder = nn.TransformerDecoderLayer(8, 2, 16, activation=nn.SiLU())
    with pytest.raises(InputError, match="activation"):
        embedded.describe(decoder)
    with pytest.raises(InputError, match="activation"):
        embedded.describe(copy.deepcopy(decoder))


def test_a_note_on_a_layer_is_no_change() -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    plain = embedded.describe(module)
    module[0].note = "from the paper"
    assert embedded.describe(module) == plain


LINEAR = {"class": "Linear", "arguments": {"in_features": 4, "out_features": 4}}
GRAPH: dict[str, Any] = {
    "class": "graph",
    "modules": {"fc.one": LINEAR},
    "parameters": {"scale": {"shape": [4], "dtype": "float32"}},
    "buffers": {"shift": {"shape": [4], "dtype": "float32"}},
    "nodes": [
        {"name": "x", "op": "placeholder"},
        {"name": "y", "op": "call_module", "target": "fc.one", "args": [{"node": "x"}]},
        {"name": "s", "op": "get_attr", "target": "scale"},
        {"name": "t", "op": "get_attr", "target": "shift"},
        {
            "name": "z",
            "op": "call_function",
            "target": "add",
            "args": [{"node": "y"}, {"node": "s"}],
            "kwargs": {"alpha": 2},
        },
        {
            "name": "w",
            "op": "call_function",
            "target": "mul",
            "args": [{"node": "z"}, {"node": "t"}],
        },
        {"name": "output", "op": "output", "args": [{"node": "w"}]},
    ],
}


def test_a_graph_computes_what_its_nodes_say() -> None:
    torch.manual_seed(0)
    names = embedded.build(GRAPH).state_dict()
    assert list(names) == ["scale", "shift", "fc.one.weight", "fc.one.bias"]
    state = {name: torch.randn(tensor.shape) for name, tensor in names.items()}
    model = load_state(embedded.build(GRAPH), state, HERE)
    x = torch.randn(3, 4)
    fc = torch.nn.functional.linear(x, state["fc.one.weight"], state["fc.one.bias"])
    assert torch.equal(model(x), (fc + 2 * state["scale"]) * state["shift"])
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def changed(at: tuple[Any, ...], value: Any) -> dict[str, Any]:
    said = copy.deepcopy(GRAPH)
    inner: Any = said
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return said


HOSTILE: list[Any] = [
    {"class": "os.system"},
    {"class": "Linear", "arguments": {"in_features": 4}},
    {"class": "Linear", "arguments": {"in_features": 2**63, "out_features": 1}},
    {"class": "Linear", "arguments": {"in_features": True, "out_features": 1}},
    {"class": "Linear", "arguments": {"in_features": 2**31 - 1, "out_features": 2**31 - 1}} | {
        "frozen": ["forward"]
    },
    {"class": "Linear", "arguments": {**LINEAR["arguments"], "device": "cuda"}},
    {**LINEAR, "forward": "os.system"},
    {**LINEAR, "training": 1},
    {**LINEAR, "dtypes": {"weight": "int8"}},
    {**LINEAR, "modules": {"child": LINEAR}},
    {**LINEAR, "frozen": ["weight.data"]},
    {"class": "Sequential", "modules": {"forward": LINEAR}},
    {"class": "Sequential", "modules": {"a.b": LINEAR}},
    {"class": "Sequential", "modules": {"0": {"same": "1"}, "1": LINEAR}},
    {"class": "Sequential", "modules": {"0": {"same": ""}}},
    {"class": "LSTM", "arguments": {"input_size": 1, "hidden_size": 1, "num_layers": 10**9}},
    {"class": "Conv2d", "arguments": {"in_channels": 1, "out_channels": 1,
                                      "kernel_size": [2**31 - 1] * 8}},
    {"class": "TransformerEncoderLayer", "arguments": {"activation": "exec"}},
    {"class": "TransformerEncoder", "modules": {}},
    {"class": "Upsample", "arguments": {"mode": "__class__"}},
    [],
    changed(("nodes", 1, "target"), "forward"),
    changed(("nodes", 4, "target"), "os.system"),
    changed(("nodes", 4, "target"), "from_file"),
    changed(("nodes", 4, "args"), [{"node": "w"}]),
    changed(("nodes", 4, "args"), [{"node": "x", "extra": 1}]),
    changed(("nodes", 4, "args"), [[[[[[1]]]]]]),
    changed(("nodes", 4, "kwargs"), {"out": {"node": "y"}}),
    changed(("nodes", 4, "name"), "x"),
    changed(("nodes", 4, "name"), "z; import os"),
    changed(("nodes", 2, "target"), "__class__"),
    changed(("nodes", 6, "op"), "call_method"),
    changed(("nodes",), []),
    changed(("modules", "forward"), LINEAR),
    changed(("modules", "a'b"), LINEAR),
    changed(("parameters", "_nodes"), {"shape": [1], "dtype": "float32"}),
    changed(("parameters", "scale", "shape"), [-1]),
    changed(("parameters", "scale", "dtype"), "object"),
    changed(("hooks",), []),
]  # fmt: skip


@pytest.mark.parametrize("said", HOSTILE, ids=lambda said: str(said)[:40])
def test_hostile_json_is_one_line(said: Any) -> None:
    with pytest.raises(InputError) as caught:
        embedded.build(said)
    assert "\n" not in str(caught.value)


def test_deep_wide_and_repeated_layers_are_bounded() -> None:
    deep: Any = LINEAR
    for _ in range(200):
        deep = {"class": "Sequential", "modules": {"0": deep}}

    def twice(depth: int, path: str) -> dict[str, Any]:
        inner = f"{path}.0" if path else "0"
        first = twice(depth - 1, inner) if depth else {"class": "ReLU"}
        return {"class": "Sequential", "modules": {"0": first, "1": {"same": inner}}}

    assert embedded.build(twice(3, ""))[1][1][1] is not None
    many = {
        "class": "Sequential",
        "modules": {
            str(at): {
                "class": "LSTM",
                "arguments": {"input_size": 1, "hidden_size": 1, "num_layers": 1000},
            }
            for at in range(100)
        },
    }
    for said in (deep, twice(40, ""), many):
        with pytest.raises(InputError):
            embedded.build(said)


def test_a_model_whose_values_fill_the_memory_is_refused() -> None:
    inputs = (Input("x", (4, 8, 8)),)
    embedded.check(nn.Sequential(nn.ZeroPad2d(8)), inputs)
    with pytest.raises(InputError, match="cannot be meant"):
        embedded.check(nn.Sequential(nn.ZeroPad2d(50_000)), inputs)
    with pytest.raises(InputError, match="cannot be meant"):
        embedded.check(nn.Upsample(scale_factor=100_000.0), inputs)
    with pytest.raises(InputError, match="cannot take"):
        embedded.check(nn.Linear(3, 3), inputs)


def test_sizes_cannot_become_lists_or_endless() -> None:
    multiply = FUNCTIONS["int_mul"]
    assert multiply(3, 4) == 12
    with pytest.raises(TypeError):
        multiply([0], 2**40)
    with pytest.raises(OverflowError):
        multiply(2**40, 2**40)


KINDS = st.sampled_from(
    [
        lambda n: nn.Linear(n, n),
        lambda n: nn.Conv1d(n, n, 3, padding=1),
        lambda n: nn.ReLU(),
        lambda n: nn.LayerNorm(n),
        lambda n: nn.Dropout(0.1),
    ]
)


@settings(max_examples=25)
@given(st.recursive(KINDS, lambda inner: st.lists(inner, max_size=4), max_leaves=12), st.data())
def test_any_tree_comes_back(tree: Any, data: st.DataObject) -> None:
    def grow(part: Any) -> nn.Module:
        if callable(part):
            made: nn.Module = part(data.draw(st.integers(1, 5)))
        else:
            made = nn.Sequential(*map(grow, part))
        made.training = data.draw(st.booleans())
        return made

    module = grow(tree)
    rebuilt = back(module)
    assert flags(rebuilt) == flags(module)
    assert embedded.describe(rebuilt) == embedded.describe(module)
    for name, tensor in module.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], tensor)
