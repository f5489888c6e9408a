import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

from model.upsample import UpsampledConv, merge_upsampling, split_upsampling


@pytest.fixture
def plain():
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        latent_channels=4,
        norm_num_groups=4,
    )
    return AutoencoderKL(**shape).double()


def test_one_transposed_convolution_is_upsampling_and_a_convolution():
    torch.manual_seed(0)
    conv: Any = nn.Conv2d(6, 5, 3, padding=1).double()
    x = torch.randn(2, 6, 4, 7, dtype=torch.float64, requires_grad=True)
    expected = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    gradients = torch.autograd.grad(expected.square().sum(), [x, conv.weight, conv.bias])
    conv.__class__ = UpsampledConv
    found = conv(x)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found.square().sum(), [x, conv.weight, conv.bias]), gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_autoencoder_rebuilds_the_same_and_is_saved_the_same(plain, tmp_path):
    merged = copy.deepcopy(plain)
    assert merge_upsampling(merged) == 2
    assert merge_upsampling(merged) == 0  # once is enough
    latents = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(merged.decode(latents).sample, plain.decode(latents).sample)
    merged.save_pretrained(tmp_path)
    loaded: Any = AutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in plain.state_dict().items())
    torch.testing.assert_close(loaded.decode(latents).sample, plain.decode(latents).sample)
    split_upsampling(merged)
    assert torch.equal(merged.decode(latents).sample, plain.decode(latents).sample)


def test_in_half_precision_it_is_as_near(plain):
    """Sums of weights are rounded once more: the error against float32 is that of two steps, and more in some kernels."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1)
    x = torch.randn(4, 16, 8, 8)
    upsampled = F.interpolate(x, scale_factor=2, mode="nearest")
    expected, half = conv(upsampled), copy.deepcopy(conv).bfloat16()
    apart = (half(upsampled.bfloat16()).float() - expected).square().mean()
    half.__class__ = UpsampledConv
    assert (half(x.bfloat16()).float() - expected).square().mean() < 4 * apart
