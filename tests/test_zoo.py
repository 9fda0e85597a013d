"""Every reference model: shapes, gradients, export, published sizes, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import zoo
from compressor.errors import InputError

SHAPES = {
    "digits": (1, 8, 8),
    "digits?size=16": (1, 16, 16),
    "digits?size=32": (1, 32, 32),
    "digits-rows": (8, 8),
    "digits-masks": (1, 8, 8),
    "breast-cancer": (30,),
}
OUTPUTS = {"breast-cancer": 1, "digits-masks": 2}

every_model = pytest.mark.parametrize("name", zoo.MODELS)


def natural(name: str) -> tuple[tuple[int, ...], int]:
    data = zoo.MODELS[name].data
    return SHAPES[data], OUTPUTS.get(data, 10)


def fresh(name: str) -> nn.Module:
    torch.manual_seed(0)
    return zoo.build(name, zoo.arguments_for(name, *natural(name)))


def examples(name: str, count: int, seed: int = 0) -> Tensor:
    shape, _ = natural(name)
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


@every_model
def test_output_has_the_task_s_shape(name: str) -> None:
    shape, outputs = natural(name)
    rest = shape[1:] if name == "unet" else ()
    model = fresh(name).eval()
    for batch in (1, 2, 7):
        with torch.no_grad():
            output = model(examples(name, batch))
        assert output.shape == (batch, outputs, *rest)
        assert output.dtype == torch.float32
        assert torch.isfinite(output).all()


@every_model
def test_backward_reaches_every_parameter(name: str) -> None:
    model = fresh(name).train()
    model(examples(name, 7)).square().sum().backward()
    lacking = [key for key, value in model.named_parameters() if value.grad is None]
    assert lacking == []
    assert all(torch.isfinite(value.grad).all() for value in model.parameters())  # type: ignore[arg-type]


@every_model
def test_same_arguments_give_the_same_structure(name: str) -> None:
    one, two = fresh(name), fresh(name)
    assert repr(one) == repr(two)
    assert {k: v.shape for k, v in one.state_dict().items()} == {
        k: v.shape for k, v in two.state_dict().items()
    }


@every_model
def test_training_mode_matters_only_with_dropout_or_batch_norm(name: str) -> None:
    model, x = fresh(name), examples(name, 7)
    switched = any(isinstance(module, (nn.Dropout, nn.BatchNorm2d)) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model.eval()(x), model.train()(x)) is not switched


@every_model
def test_no_module_is_used_twice(name: str) -> None:
    model, calls = fresh(name).eval(), dict[str, int]()
    for path, module in model.named_modules():
        module.register_forward_hook(
            lambda *_, path=path: calls.update({path: calls.get(path, 0) + 1})
        )
    with torch.no_grad():
        model(examples(name, 2))
    assert set(calls) == {path for path, _ in model.named_modules()}
    assert set(calls.values()) == {1}


@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [
        # (30+1)*64 + (64+1)*64 + (64+1)*1
        ("mlp", {"features": 30, "outputs": 1}, 6209),
        # 1*32*9+32 + 32*64*9+64 + (64*12*12+1)*128 + (128+1)*10: the MNIST example
        ("cnn", {}, 1_199_882),
        # 14,710,464 of 3x3 kernels + 3 * 4,224 (bias, scale, shift) + (512+1)*10
        ("vgg16", {}, 14_728_266),
        # Option A has 269,722; the projections add 16*32+2*32 + 32*64+2*64
        ("resnet20", {}, 272_474),
        # Option A has 853,018, and the same projections
        ("resnet56", {}, 855_770),
        # The next three are torchvision's counts
        ("resnet18", {}, 11_689_512),
        ("resnet50", {}, 25_557_032),
        ("mobilenet_v2", {}, 3_504_872),
        # 4*((8+64)*64 + 2*64) + (64+1)*10; a GRU has three gates in place of four
        ("lstm", {"features": 8, "classes": 10}, 19_594),
        ("gru", {"features": 8, "classes": 10}, 14_858),
        # (4+1)*64 + 16*64 + 2*(12*64*64 + 13*64) + 2*64 + (64+1)*10
        ("vit", {"image_size": 8}, 102_090),
    ],
)
def test_size_is_the_published_one(name: str, arguments: dict[str, Any], count: int) -> None:
    model = zoo.build(name, arguments)
    assert sum(value.numel() for value in model.parameters()) == count


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_parameters_have_torchvision_s_names(name: str) -> None:
    names = dict(fresh(name).named_parameters())
    assert {"conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "fc.bias"} <= set(names)
    assert "layer2.0.downsample.0.weight" in names
    assert "layer2.1.downsample.0.weight" not in names


def test_mobilenet_parameters_have_torchvision_s_names() -> None:
    names = dict(fresh("mobilenet_v2").named_parameters())
    assert names["features.1.conv.0.0.weight"].shape == (32, 1, 3, 3)
    assert names["features.2.conv.1.0.weight"].shape == (96, 1, 3, 3)
    assert names["features.18.0.weight"].shape == (1280, 320, 1, 1)
    assert names["classifier.1.weight"].shape == (10, 1280)


@pytest.mark.parametrize(("image_size", "stride"), [(32, 1), (63, 1), (64, 2), (224, 2)])
def test_mobilenet_stem_follows_the_image(image_size: int, stride: int) -> None:
    names = zoo.build("mobilenet_v2", {"image_size": image_size})
    assert names.get_submodule("features.0.0").stride == (stride, stride)


@pytest.mark.parametrize(("image_size", "patch"), [(8, 2), (28, 4), (32, 8), (224, 32), (11, 11)])
def test_vit_patches_follow_the_image(image_size: int, patch: int) -> None:
    model = zoo.build("vit", {"image_size": image_size})
    assert model.get_submodule("patch_embed").kernel_size == (patch, patch)


def test_arguments_may_come_from_json() -> None:
    model = zoo.build("mlp", {"features": 3, "outputs": 2, "hidden": [5, 4]})
    widths = [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert widths == [5, 4, 2]
    assert len(list(zoo.build("mlp", {"features": 3, "outputs": 2, "hidden": []}))) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "shape", "outputs", "arguments"),
    [
        ("cnn", (3, 28, 28), 10, {"in_channels": 3, "image_size": 28, "classes": 10}),
        ("resnet50", (3, 224, 224), 1000, {"in_channels": 3, "classes": 1000}),
        ("gru", (8, 4), 10, {"features": 4, "classes": 10}),
        ("mlp", (10,), 1, {"features": 10, "outputs": 1}),
    ],
)
def test_arguments_follow_from_the_data(
    name: str, shape: tuple[int, ...], outputs: int, arguments: dict[str, Any]
) -> None:
    assert zoo.arguments_for(name, shape, outputs) == arguments


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("cnn", (28, 28), "(28, 28): it takes square images (channels, size, size)"),
        ("unet", (1, 8, 12), "(1, 8, 12): it takes square images"),
        ("lstm", (30,), "(30,): it takes sequences (steps, features)"),
        ("mlp", (1, 8, 8), "(1, 8, 8): it takes rows (features,)"),
    ],
)
def test_shape_that_does_not_fit_is_refused(
    name: str, shape: tuple[int, ...], expected: str
) -> None:
    with pytest.raises(InputError) as caught:
        zoo.arguments_for(name, shape, 10)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("cnn", {"image_size": 5}, "'cnn' needs images of at least 6x6 pixels, not 5x5"),
        ("vgg16", {"image_size": 8}, "'vgg16' needs images of at least 32x32 pixels, not 8x8"),
        ("unet", {"image_size": 10}, "a multiple of 4, not 10"),
        ("vit", {"image_size": 10, "patch_size": 3}, "patch_size 3 does not divide 10"),
        ("vit", {"dim": 10}, "dim 10 is not a multiple of heads 4"),
        ("cnn", {"depth": 3}, "argument 'depth'"),
        ("cnn", {"classes": 0}, "argument 'classes': Input should be greater than or equal to 1"),
        ("cnn", {"classes": "10"}, "argument 'classes'"),
        ("cnn", {"classes": True}, "argument 'classes'"),
        ("mlp", {"features": 3}, "argument 'outputs'"),
        ("mlp", {"features": 3, "outputs": 1, "hidden": [4, -1]}, "argument 'hidden.1'"),
        ("mlp", {"features": 3, "outputs": 1, "hidden": "ab"}, "argument 'hidden"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    name: str, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError) as caught:
        zoo.build(name, arguments)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["os:system", "cnn:cnn", "", "cnn.cnn", ["cnn"], None])
def test_only_listed_names_resolve(name: Any) -> None:
    with pytest.raises(InputError, match="is unknown: choose from mlp, cnn, ") as caught:
        zoo.build(name, {})
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is unknown"):
        zoo.arguments_for(name, (1, 8, 8), 10)


def test_the_registry_reads_without_torch() -> None:
    script = "import sys, compressor.zoo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
