from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]

from model.vae import LatentVAE, VAEConfig, load_vae
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.vae_folder(tmp_path_factory.mktemp("vae") / "vae")


def stock(folder) -> Any:
    return AutoencoderKL.from_pretrained(folder).eval()


def test_facts_come_from_the_loaded_model(folder):
    vae = load_vae(VAEConfig(str(folder)))
    assert (vae.latent_channels, vae.factor) == (4, 2)
    assert not vae.autoencoder.training
    assert not any(parameter.requires_grad for parameter in vae.autoencoder.parameters())


def test_latents_are_the_normalised_posterior_mean(folder):
    vae, pixels = load_vae(VAEConfig(str(folder))), torch.rand(2, 3, 16, 16) * 2 - 1
    raw = stock(folder).encode(pixels).latent_dist.mean
    mean = torch.tensor([0.1, -0.2, 0.0, 0.3]).reshape(1, 4, 1, 1)
    std = torch.tensor([0.5, 1.0, 2.0, 0.8]).reshape(1, 4, 1, 1)
    torch.testing.assert_close(vae.encode(pixels), (raw - mean) / std)
    assert vae.encode(pixels).shape == (2, 4, 8, 8)
    assert not vae.encode(pixels).requires_grad


def test_decode_undoes_the_normalisation(folder):
    vae, pixels = load_vae(VAEConfig(str(folder))), torch.rand(2, 3, 16, 16) * 2 - 1
    raw = vae.autoencoder.encode(pixels).latent_dist.mean
    expected = vae.autoencoder.decode(raw).sample.clamp(-1, 1)
    decoded = vae.decode(vae.encode(pixels))
    torch.testing.assert_close(decoded, expected)
    assert decoded.abs().max() <= 1


def test_scaling_and_shift_factors_serve_where_there_are_no_statistics(folder):
    autoencoder = stock(folder)
    autoencoder.register_to_config(latents_mean=None, latents_std=None, scaling_factor=0.25, shift_factor=0.5)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    raw = autoencoder.encode(pixels).latent_dist.mean
    torch.testing.assert_close(LatentVAE(autoencoder).encode(pixels), (raw - 0.5) * 0.25)


def test_a_missing_autoencoder_is_named(tmp_path):
    for path in ("assets/nowhere/vae", str(tmp_path)):
        with pytest.raises(ValueError, match="make assets"):
            load_vae(VAEConfig(path))
