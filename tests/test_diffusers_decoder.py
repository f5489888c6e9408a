# pyright: reportPrivateImportUsage=false
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaTransformer2DModel,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from model.decoder import DiffusersDecoderConfig, build_decoder
from model.diffusers_decoder import DiffusersDecoder, LoraConfig, adopt_network, scheduler_noise
from model.hub import Source
from model.metaquery import build
from model.noise import DiffusionConfig, FlowConfig
from model.vae import VAEConfig, load_vae
from tests import tiny_decoders
from tests.test_pairs import a_run, parts
from train.engine import EngineConfig
from train.metaquery import MetaQueryTaskConfig
from train.ranks import start

__all__ = ["parts"]


@pytest.fixture(scope="module")
def sana(tmp_path_factory):
    return tiny_decoders.sana(tmp_path_factory.mktemp("sana") / "pipeline")


def test_sana_is_asked_as_its_pipeline_asks_it(sana):
    decoder = build_decoder(DiffusersDecoderConfig(str(sana)))
    stock: Any = SanaTransformer2DModel.from_pretrained(sana / "transformer")
    x_t, condition = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 24)
    with torch.no_grad():
        ours = decoder(x_t, torch.tensor([0.25, 1.0]), condition)
        theirs = stock(x_t, condition, torch.tensor([250.0, 1000.0]), encoder_attention_mask=torch.ones(2, 5)).sample
    torch.testing.assert_close(ours, theirs)
    assert (decoder.condition_width, decoder.condition_tokens, decoder.latent_shape) == (24, None, (4, 4, 4))


def test_a_u_net_is_asked_at_the_step_that_the_time_stands_for(tmp_path):
    folder = tiny_decoders.stable_diffusion(tmp_path / "sd")
    decoder = build_decoder(DiffusersDecoderConfig(str(folder)))
    stock: Any = UNet2DConditionModel.from_pretrained(folder / "unet")
    x_t, condition = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 24)
    steps = torch.tensor([0, 399, 999])  # of 1000
    with torch.no_grad():
        ours = decoder(x_t, (steps + 1) / 1000, condition)
        theirs = stock(x_t, steps, condition).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # a time in float32 is within 1e-4 of its step


def test_the_deep_autoencoder_is_scaled_by_its_factor(sana):
    vae, pixels = load_vae(VAEConfig(str(sana))), torch.rand(2, 3, 16, 16) * 2 - 1
    stock: Any = AutoencoderDC.from_pretrained(sana / "vae")
    with torch.no_grad():
        latents = stock.encode(pixels).latent
        rebuilt = stock.decode(latents).sample.clamp(-1, 1)
    torch.testing.assert_close(vae.encode(pixels), latents * 0.41407)
    torch.testing.assert_close(vae.decode(vae.encode(pixels)), rebuilt)
    assert (vae.latent_channels, vae.factor) == (4, 4)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (DPMSolverMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"), 3.0),
        (FlowMatchEulerDiscreteScheduler(shift=1.73), 1.73),
    ],
)
def test_the_shift_of_a_scheduler_is_read_under_its_own_name(tmp_path, scheduler, expected):
    scheduler.save_pretrained(tmp_path / "scheduler")
    assert scheduler_noise(Source("decoder.path", str(tmp_path))) == FlowConfig(shift=expected)


@pytest.mark.parametrize(("prediction", "ours"), [("epsilon", "epsilon"), ("v_prediction", "v")])
def test_the_betas_of_stable_diffusion_are_read(tmp_path, prediction, ours):
    folder = tiny_decoders.stable_diffusion(tmp_path / "sd", prediction)
    noise = scheduler_noise(Source("decoder.path", str(folder)))
    assert noise == DiffusionConfig(prediction=ours, beta_start=0.00085, beta_end=0.012)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(prediction_type="sample", beta_schedule="scaled_linear"), "is neither a flow nor Stable Diffusion's betas"),
        (dict(beta_schedule="linear"), "is neither a flow nor"),
    ],
)
def test_a_schedule_that_is_not_one_of_ours_is_refused(tmp_path, settings, message):
    DPMSolverMultistepScheduler(**settings).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=message):
        scheduler_noise(Source("decoder.path", str(tmp_path)))


def test_noise_levels_trained_and_sampled_are_those_of_the_loaded_scheduler(parts, tmp_path):
    """Those that reach the network itself. Declared is t = 3 u / (1 + 2 u) of uniform u, whose distribution function is
    F(t) = t / (3 - 2 t); without the shift the distance from it would be 0.27."""
    config = a_run(parts, "qwen2", "sana", tmp_path)
    config = type(config)(**{**vars(config), "schedule": type(config.schedule)(steps=8, batch_size=64)})
    assert isinstance(config.task, MetaQueryTaskConfig)
    task = config.task.build(config, start(60))
    asked: list[torch.Tensor] = []
    network: Any = task.model.decoder.model
    network.register_forward_pre_hook(
        lambda module, args, options: asked.append(options["timestep"] / 1000), with_kwargs=True
    )
    batches = task.batches(0)
    for _ in range(8):
        task.step(next(batches))
    trained = torch.cat(asked).sort().values  # [512]
    share = torch.arange(1, 513) / 512
    distance = (trained / (3 - 2 * trained) - share).abs().max()
    assert distance < 1.63 / 512**0.5  # Kolmogorov and Smirnov, at 1 %

    stock: Any = DPMSolverMultistepScheduler.from_pretrained(parts / "sana", subfolder="scheduler")
    stock.set_timesteps(20)
    torch.testing.assert_close(task.model.noising.grid(20)[:-1], stock.sigmas[:-1], atol=2e-3, rtol=0)


def test_what_is_no_pipeline_of_ours_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"decoder.path 'nobody/nothing' cannot be loaded"):
        build_decoder(DiffusersDecoderConfig("nobody/nothing"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}')
    with pytest.raises(ValueError, match="is a FluxPipeline; supported are SanaTransformer2DModel, UNet2D"):
        build_decoder(DiffusersDecoderConfig(str(tmp_path)))


def test_adapters_that_fit_nothing_are_refused(sana):
    with pytest.raises(ValueError, match=r"decoder.lora.targets nowhere fit no layer"):
        build_decoder(DiffusersDecoderConfig(str(sana), lora=LoraConfig(targets=("nowhere",))))


def test_the_noise_of_a_config_wins_over_the_scheduler_s(parts, tmp_path):
    def noise_of(**changes):
        config = a_run(parts, "qwen2", "sana", tmp_path, **changes).task
        assert isinstance(config, MetaQueryTaskConfig)
        return build(config.model).config.noise

    assert noise_of() == FlowConfig(shift=3.0)
    assert noise_of(noise=FlowConfig(shift=2.0, time="logit_normal")) == FlowConfig(shift=2.0, time="logit_normal")


def test_a_schedule_of_one_s_own_stands_in_for_one_that_is_refused(tmp_path):
    folder = tiny_decoders.stable_diffusion(tmp_path / "sd")
    DPMSolverMultistepScheduler(beta_schedule="linear").save_pretrained(folder / "scheduler")
    config = DiffusersDecoderConfig(str(folder))
    with pytest.raises(ValueError, match="give noise a schedule of its own"):
        build_decoder(config)
    decoder = build_decoder(config, noise=DiffusionConfig(train_steps=500))
    asked: list[torch.Tensor] = []
    network: Any = decoder.model
    network.register_forward_pre_hook(lambda module, args, options: asked.append(options["timestep"]), with_kwargs=True)
    decoder(torch.randn(1, 4, 8, 8), torch.tensor([0.5]), torch.randn(1, 3, 24))
    assert asked[0].tolist() == [249.0]  # the 250th of 500 steps
    with pytest.raises(ValueError, match="give a DiffusionConfig or none"):
        build_decoder(config, noise=FlowConfig())


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_weights_that_are_missing_are_not_made_up(tmp_path, part):
    folder = tiny_decoders.sana(tmp_path / "sana")
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of a"):
        load_vae(VAEConfig(str(folder))) if part == "vae" else build_decoder(DiffusersDecoderConfig(str(folder)))


def test_weights_of_16_bits_are_not_updated_in_place(parts, tmp_path):
    home = DiffusersDecoderConfig(str(parts / "sana"), dtype="bfloat16")
    config = a_run(parts, "qwen2", "sana", tmp_path, home=home)
    config = type(config)(**{**vars(config), "engine": EngineConfig(zero=0, precision="fp32")})
    with pytest.raises(ValueError, match=r"engine.zero is 0, .* has 16 bits"):
        config.task.build(config, start(60))


def test_another_size_than_the_files_say_stays_with_the_network(tmp_path):
    folder = tiny_decoders.auraflow(tmp_path / "aura")
    assert build_decoder(DiffusersDecoderConfig(str(folder))).latent_shape[1:] == (8, 8)
    wide = build_decoder(DiffusersDecoderConfig(str(folder), sample_size=12))
    assert (wide.latent_shape[1:], wide.patch) == ((12, 12), 2)
    assert isinstance(wide, DiffusersDecoder)
    assert adopt_network(wide.model, FlowConfig()).latent_shape[1:] == (12, 12)
