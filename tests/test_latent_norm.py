"""The latents' normaliser against torch's batch norm; that ranks share its statistics is in test_repae.py."""

import pytest
import torch

from model.latent_norm import LatentNorm


def test_it_is_a_batch_norm_without_gain():
    latents = torch.empty(0)
    ours, theirs = LatentNorm([0.0] * 3, [1.0] * 3), torch.nn.BatchNorm2d(3, eps=1e-4, affine=False)
    for seed in range(4):
        latents = 2 * torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(seed)) + 1
        torch.testing.assert_close(ours(latents, update=True), theirs(latents), rtol=1e-5, atol=1e-5)
        ours.settle(True, keep=0.0)
    torch.testing.assert_close(ours.mean, theirs.running_mean)
    torch.testing.assert_close(ours.variance, theirs.running_var, rtol=1e-4, atol=1e-4)
    theirs.eval()
    torch.testing.assert_close(ours(latents), theirs(latents), rtol=1e-4, atol=1e-4)


def test_it_starts_as_the_vae_says_and_reading_moves_nothing():
    norm = LatentNorm([1.0, -2.0], [0.5, 3.0])
    assert norm.statistics() == (pytest.approx([1.0, -2.0]), pytest.approx([0.5, 3.0]))
    norm(torch.randn(4, 2, 3, 3))
    assert norm.statistics() == (pytest.approx([1.0, -2.0]), pytest.approx([0.5, 3.0]))
    normal = norm(torch.tensor([1.5, 1.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(normal.flatten(), torch.ones(2))


def test_the_statistics_move_with_a_step_that_is_taken():
    """Once for all batches of a step, each moving them on; a step that is refused leaves no trace, whatever it saw."""
    norm, sequence = LatentNorm([0.0], [1.0]), LatentNorm([0.0], [1.0])
    norm(torch.full((8, 1, 4, 4), float("nan")), update=True)
    norm.settle(False, keep=0.75)
    for seed in range(2):
        latents = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) + 5
        norm(latents, update=True)
        assert norm.mean.tolist() == [0.0]
        sequence(latents, update=True)
        sequence.settle(True, keep=0.0)
    norm.settle(True, keep=0.75)
    torch.testing.assert_close(norm.mean, sequence.mean)
    torch.testing.assert_close(norm.variance, sequence.variance)
    torch.testing.assert_close(torch.tensor(norm.statistics()[0]), 0.25 * norm.mean)


def test_no_gradient_goes_through_the_statistics():
    latents = torch.randn(4, 2, 3, 3, requires_grad=True)
    norm = LatentNorm([0.0, 0.0], [1.0, 1.0])
    norm(latents, update=True).sum().backward()
    assert latents.grad is not None
    assert (latents.grad > 0).all()  # through torch's own it would be zero: what is taken off a sum is its mean
