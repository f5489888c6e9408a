"""Distances between sets of pictures, where the answer is known."""

from typing import Any

import pytest
import torch
from skimage.metrics import structural_similarity

from sample.fidelity import frechet, kernel_distance, precision_recall, psnr, spatial_variance, ssim


def test_the_distance_of_two_gaussians_is_known():
    """|m1 - m2|^2 + sum (s1 - s2)^2 for independent channels; zero of a set from itself; the same both ways."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 3, generator=generator) * torch.tensor([1.0, 2.0, 0.5])
    b = torch.randn(200_000, 3, generator=generator) * torch.tensor([1.5, 1.0, 0.5]) + torch.tensor([0.0, 3.0, 0.0])
    assert frechet(a, b) == pytest.approx(9 + 0.25 + 1, rel=0.02)
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
    assert frechet(a @ turn, b @ turn) == pytest.approx(frechet(a, b), rel=1e-3)
    with pytest.raises(ValueError, match="at least two pictures"):
        frechet(a[:1], b)


def test_a_broken_model_has_no_distance():
    with pytest.raises(ValueError, match="not finite"):
        frechet(torch.full((4, 2), float("nan")), torch.randn(4, 2))


def test_the_kernel_distance_is_unbiased():
    """Around zero for two samples of one gaussian, and by hand for two points each."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3000, 4, generator=generator).unbind(0)
    assert abs(kernel_distance(a, b, size=500)) < 0.01
    assert kernel_distance(a, b + 1) > 1
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [3.0]])
    within = ((1 * 2 + 1) ** 3 * 2 + (0 * 3 + 1) ** 3 * 2) / 2
    between = sum((p * q + 1) ** 3 for p in (1, 2) for q in (0, 3)) / 4
    assert kernel_distance(x, y, subsets=3) == pytest.approx(within - 2 * between, abs=1e-9)


def test_precision_falls_with_strangers_and_recall_with_what_is_missing():
    generator = torch.Generator().manual_seed(0)
    here, there = torch.randn(500, 4, generator=generator), torch.randn(500, 4, generator=generator) + 50
    assert precision_recall(here, here) == (1, 1)
    precision, recall = precision_recall(here, torch.cat([here[:250], there[:250]]))
    assert precision == pytest.approx(0.5, abs=0.02)
    assert recall > 0.9
    precision, recall = precision_recall(torch.cat([here, there]), here)
    assert precision == 1
    assert recall == pytest.approx(0.5, abs=0.02)


def test_psnr_of_a_known_error():
    pictures = torch.zeros(2, 3, 4, 4)
    assert psnr(pictures + 0.2, pictures).tolist() == pytest.approx([20.0, 20.0], rel=1e-5)  # 0.1 of the range


def test_structural_similarity_is_that_of_scikit_image():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, 20, 24, generator=generator) * 2 - 1
    rebuilt = (pictures + 0.3 * torch.randn(pictures.shape, generator=generator)).clamp(-1, 1)
    options: dict[str, Any] = dict(channel_axis=0, data_range=1.0, gaussian_weights=True)
    options |= dict(sigma=1.5, use_sample_covariance=False)
    expected = [
        structural_similarity((a.double().numpy() + 1) / 2, (b.double().numpy() + 1) / 2, **options)
        for a, b in zip(rebuilt, pictures, strict=True)
    ]
    assert ssim(rebuilt, pictures).tolist() == pytest.approx(expected, abs=1e-5)
    assert ssim(pictures, pictures).tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(pictures[..., :9], pictures[..., :9])


def test_latents_that_are_alike_everywhere_have_no_spatial_variance():
    latents = torch.randn(2, 3, 1, 1).expand(2, 3, 4, 4)
    assert spatial_variance(latents).tolist() == [0.0, 0.0]
    assert spatial_variance(torch.randn(2, 3, 32, 32)).tolist() == pytest.approx([1, 1], rel=0.1)
