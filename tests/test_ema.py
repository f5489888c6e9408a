"""The half-life is one, in images, whatever the batch size."""

import pytest
import torch

from train.ema import EmaConfig, decay, follow


@pytest.mark.parametrize("batch", [1, 10, 100])
def test_a_weight_counts_half_after_the_halflife(batch):
    config = EmaConfig(halflife_images=1000, rampup=0.05)
    average, weight = [torch.zeros(3, dtype=torch.float64)], [torch.ones(3, dtype=torch.float64)]
    for step in range(1000 // batch):
        follow(average, weight, decay(config, 10**6 + step * batch, batch))
    torch.testing.assert_close(average[0], torch.full((3,), 0.5, dtype=torch.float64))


def test_early_averages_forget_the_start():
    config = EmaConfig(halflife_images=10**6, rampup=0.05)
    assert decay(config, images_seen=1000, images=50) == pytest.approx(0.5)
    assert decay(config, images_seen=10**9, images=50) > 0.9999


def test_no_halflife_means_the_weights_themselves():
    average, weight = [torch.zeros(3)], [torch.randn(3)]
    follow(average, weight, decay(EmaConfig(halflife_images=0), 100, 10))
    assert torch.equal(average[0], weight[0])


@pytest.mark.parametrize(("field", "value"), [("halflife_images", -1), ("rampup", 0.0)])
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"ema.{field}"):
        EmaConfig(**{field: value})
