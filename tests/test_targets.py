"""Frozen encoders of every family, from checkpoints in the hub's layout, against transformers' own classes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    BitImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTMAEConfig,
    ViTMAEModel,
)

from model.alignment import ProjectorConfig, alignment, build_projector
from model.targets import TargetConfig, load_target, regrid
from tests import tiny

SHAPE: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
WIDE: dict[str, Any] = dict(intermediate_size=32)
MAKERS: dict[str, tuple[Any, int]] = {
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SHAPE)), 1),
    "registers": (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=3)), 4),
    "dinov3": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**SHAPE, **WIDE, num_register_tokens=2)), 3),
    "siglip": (lambda: SiglipVisionModel(SiglipVisionConfig(**SHAPE, **WIDE)), 0),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**SHAPE, **WIDE)), 1),
    "aimv2": (lambda: Aimv2VisionModel(Aimv2VisionConfig(**SHAPE, **WIDE)), 0),
    "mae": (lambda: ViTMAEModel(ViTMAEConfig(**SHAPE, **WIDE)), 1),
    "ijepa": (lambda: IJepaModel(IJepaConfig(**SHAPE, **WIDE)), 0),
}


@pytest.fixture(scope="module", params=MAKERS)
def family(request, tmp_path_factory):
    """A checkpoint, ours and the stock model, and its tokens that stand for no place."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    make, leading = MAKERS[request.param]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    BitImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]).save_pretrained(folder)
    return folder, load_target(TargetConfig(str(folder), dtype="float32")), model, leading


def pictures(size: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_features_are_those_of_the_stock_class(family):
    _, target, stock, leading = family
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))
    given: dict[str, Any] = dict(pixel_values=(pictures() / 2 + 0.5 - mean) / std)
    if isinstance(stock, ViTMAEModel):  # nothing hidden, in the order of the picture
        stock.config.mask_ratio = 0.0
        stock.embeddings.config.mask_ratio = 0.0
        given["noise"] = torch.arange(16.0).expand(2, -1)
    with torch.no_grad():
        expected = stock(**given).last_hidden_state[:, leading:]
    found = target(pictures(), (4, 4))
    assert found.shape == (2, 16, target.width)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_any_picture_fits_any_grid(family):
    _, target, _, _ = family
    for size, grid in ((32, (4, 4)), (16, (6, 6)), (24, (3, 5))):
        assert target(pictures(size), grid).shape == (2, grid[0] * grid[1], target.width)


def test_it_is_frozen_and_passes_gradients_to_pixels(family):
    _, target, _, _ = family
    assert not any(parameter.requires_grad for parameter in target.encoder.parameters())
    pixels = pictures().requires_grad_()
    target(pixels, (4, 4)).square().sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().max() > 0


def test_the_mllm_s_own_tower_sees_what_its_language_model_reads(tmp_path):
    folder = tiny.mllm_folder(tmp_path / "mllm")
    target = load_target(TargetConfig(str(folder), dtype="float32"))
    stock = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    image = tiny.image((16, 16))
    seen = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[image], return_tensors="pt")
    with torch.no_grad():
        expected = stock.model.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output
    from data.transforms import to_tensor

    found = target(to_tensor(image)[None], (4, 4))  # 4 x 4 patches are 2 x 2 tokens of the language model
    torch.testing.assert_close(found[0], regrid(expected[None], (2, 2), (4, 4))[0], rtol=1e-4, atol=1e-5)


def test_an_unknown_family_is_refused(tmp_path):
    tiny.vae_folder(tmp_path / "vae")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    BitImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"target.path .* is a bert; supported are dinov2"):
        load_target(TargetConfig(str(tmp_path)))


def test_alignment_is_minus_one_where_they_agree():
    target = torch.randn(2, 9, 5)
    assert float(alignment([3 * target], [target])) == pytest.approx(-1)
    assert float(alignment([3 * target, -target], [target, target])) == pytest.approx(0, abs=1e-6)
    loop = [
        -torch.dot(a, b) / (a.norm() * b.norm())
        for a, b in zip(target.flatten(0, 1), target.flip(0).flatten(0, 1), strict=True)
    ]
    assert float(alignment([target], [target.flip(0)])) == pytest.approx(float(torch.stack(loop).mean()), abs=1e-6)


def test_a_conv_projector_looks_at_neighbours_and_an_mlp_does_not():
    hidden = torch.randn(1, 12, 8)
    changed = hidden.clone()
    changed[:, 0] += 1
    for config, moved in ((ProjectorConfig("mlp", 16), {0}), (ProjectorConfig("conv"), {0, 1, 4, 5})):
        project = build_projector(config, 8, 6)
        off = (project(changed, (3, 4)) - project(hidden, (3, 4))).abs().sum(-1)[0]
        assert set(off.gt(1e-6).nonzero().flatten().tolist()) == moved
    spread = build_projector(ProjectorConfig("conv"), 8, 6).prepare(torch.randn(2, 12, 6) + 3)
    torch.testing.assert_close(spread.std(1), torch.ones(2, 6), rtol=1e-4, atol=1e-4)
