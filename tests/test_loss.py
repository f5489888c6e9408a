"""Losses against torch's own and against numbers counted by hand."""

import pytest
import torch
import torch.nn.functional as F

from train.loss import gaussian_kl, squared_error


def test_squared_error_is_per_sample_and_float32():
    a, b = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    each = squared_error(a.bfloat16(), b)
    assert each.dtype == torch.float32
    assert each.shape == (3,)
    torch.testing.assert_close(each.mean(), F.mse_loss(a.bfloat16().float(), b))


def test_squared_error_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"predicts \(2, 3\) for a target of \(2, 1\)"):
        squared_error(torch.zeros(2, 3), torch.zeros(2, 1))


def test_gaussian_kl_equals_torch_distributions():
    mean, logvar = torch.randn(5), torch.randn(5)
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(torch.zeros(5), torch.ones(5)))
    torch.testing.assert_close(gaussian_kl(mean, logvar), expected)
