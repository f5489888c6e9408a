"""The fast vision tower against transformers' own."""

from typing import Any

import pytest
import tiny
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from model.vision import batch_equal_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.mllm_folder(tmp_path_factory.mktemp("vision") / "mllm")


def tower(folder):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.model.visual.requires_grad_(True)


def run(visual, side: int, pictures: int):
    config: Any = visual.config
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    patches = torch.randn(pictures * side * side, values, generator=torch.Generator().manual_seed(1))
    grids = torch.tensor([[1, side, side]] * pictures)
    states = visual(patches, grid_thw=grids).pooler_output
    visual.zero_grad()
    states.square().sum().backward()
    return states.detach(), {name: p.grad.clone() for name, p in visual.named_parameters()}


@pytest.mark.parametrize("side", [4, 8])
def test_states_and_gradients_are_those_of_transformers(folder, side):
    stock, fast = tower(folder), tower(folder)
    batch_equal_pictures(fast)
    states, gradients = run(stock, side, pictures=3)
    fast_states, fast_gradients = run(fast, side, pictures=3)
    torch.testing.assert_close(fast_states, states, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fast_gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_pictures_of_two_sizes_are_read_as_before(folder):
    visual, stock = tower(folder), tower(folder)
    batch_equal_pictures(visual)
    config: Any = visual.config
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    patches, grids = torch.randn(16 + 64, values), torch.tensor([[1, 4, 4], [1, 8, 8]])
    seen, expected = (each(patches, grid_thw=grids).pooler_output for each in (visual, stock))
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
