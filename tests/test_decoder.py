import json

import pytest
import torch

from model.decoder import SiTDecoderConfig, build_decoder, load_sit, save_sit
from model.noise import DiffusionConfig, FlowConfig
from model.sit import SiT
from tests import tiny


def test_a_saved_sit_is_the_same_again(tmp_path):
    sit = SiT(tiny.sit_config(conditioning="cross_attention"))
    torch.nn.init.normal_(sit.unembed.weight)
    save_sit(tmp_path / "decoder", sit)
    again = load_sit(str(tmp_path / "decoder"))
    assert again.config == sit.config
    x_t, t, condition = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 3, 24)
    decoder = build_decoder(SiTDecoderConfig(path=str(tmp_path / "decoder")))
    assert torch.equal(decoder(x_t, t, condition), sit(x_t, t, condition).prediction)
    assert (decoder.condition_width, decoder.latent_shape) == (24, (4, 8, 8))
    assert oct((tmp_path / "decoder" / "model.safetensors").stat().st_mode & 0o777) == oct(
        (tmp_path / "decoder" / "config.json").stat().st_mode & 0o777
    )


def test_a_trained_sit_brings_its_schedule(tmp_path):
    schedule, folder = FlowConfig(shift=3.0, time="logit_normal"), tmp_path / "decoder"
    save_sit(folder, SiT(tiny.sit_config()), schedule)
    config = SiTDecoderConfig(path=str(folder))
    for weights in (True, False):
        assert build_decoder(config, weights).noise == schedule
    assert build_decoder(config, noise=DiffusionConfig()).noise == DiffusionConfig()
    (folder / "noise.json").rename(tmp_path / "noise.json")  # where it was once
    assert build_decoder(config).noise == schedule
    (tmp_path / "noise.json").unlink()
    with pytest.raises(ValueError, match=r"decoder has no noise\.json; name the release"):
        build_decoder(config)
    assert build_decoder(config, noise=schedule).noise == schedule


def test_a_fresh_and_a_trained_one_exclude_each_other():
    for config in (SiTDecoderConfig(), SiTDecoderConfig(path="x", sit=tiny.sit_config())):
        with pytest.raises(ValueError, match="give one"):
            build_decoder(config)


def test_weights_of_another_config_are_refused(tmp_path):
    folder = tmp_path / "decoder"
    save_sit(folder, SiT(tiny.sit_config()))
    config = json.loads((folder / "config.json").read_text())
    for change, message in (({"depth": 3}, "lacks"), ({"depth": 1}, "unknown"), ({"width": 64}, "shape")):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_sit(str(folder))


def test_a_missing_decoder_is_named():
    with pytest.raises(ValueError, match="make assets"):
        load_sit("assets/nowhere/decoder")
