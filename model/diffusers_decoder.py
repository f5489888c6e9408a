"""Text-to-image networks of diffusers as decoders: Sana, the U-Net of Stable Diffusion 1 and 2, AuraFlow.

A decoder is named by its pipeline, a folder in diffusers' layout or a hub id: `model_index.json` says which class it is, and
its scheduler which noise it knows. Letters: B batch, L conditioning tokens, C conditioning width, c h w latent channels,
height, width."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

# pyright: reportPrivateImportUsage=false
from diffusers import (
    AuraFlowTransformer2DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SanaTransformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from model.hub import Source, fetched
from model.hub import weights as read_weights
from model.noise import DiffusionConfig, FlowConfig, NoiseConfig

LORA = "model.*.lora_*"
"""The names of what an adapter trains."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021) through peft: W + alpha / rank B A, of which A and B train."""

    rank: int = 16
    alpha: int = 16
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Endings of the names of the linear maps that get one."""


@dataclass(frozen=True)
class DiffusersDecoderConfig:
    """Which network: `path` names a pipeline, of which the transformer or U-Net and the scheduler are read."""

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoraConfig | None = None
    """Adapters to train over a network that is frozen but for `trainable`."""
    activation_checkpointing: bool = False
    sample_size: int | None = None
    """Side of the latents that it draws; None: as its files say; AuraFlow's say 64, and it draws well at 128."""


class DiffusersDecoder(nn.Module):
    """A network of diffusers whose conditioning is one sequence of tokens of any length."""

    condition_gain = 1.0
    condition_tokens: int | None = None
    """The most that a call may bring; None: as many as one likes."""
    one_shape = False

    def __init__(self, config: DiffusersDecoderConfig, model: Any, noise: NoiseConfig):
        super().__init__()
        self.model, self.noise = model, noise
        self.trains: tuple[str, ...] = ()
        self.condition_width: int = self._condition_width()
        side: int = config.sample_size or model.config.sample_size
        self.latent_shape: tuple[int, int, int] = (model.config.in_channels, side, side)
        self.patch: int = getattr(model.config, "patch_size", None) or 1
        if config.sample_size is not None:
            model.register_to_config(sample_size=side)  # it goes along where the network is saved
        if config.activation_checkpointing:
            model.enable_gradient_checkpointing()
        if config.lora is not None:
            _adapt(model, config.lora)
            self.trains = (LORA,)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x_t [B, c, h, w], t [B] in [0, 1], condition [B, L, C] -> float32 prediction [B, c, h, w]."""
        dtype = self.model.dtype
        # Autocast would put into 16 bits what a network of 16 bits does in float32 on purpose, and it would draw otherwise.
        apart = dtype != torch.float32 and not x_t.is_meta
        with torch.autocast(x_t.device.type, enabled=False) if apart else nullcontext():
            return self.model(
                x_t.to(dtype),
                encoder_hidden_states=condition.to(dtype),  # every token is real: no mask, which costs the fast attention
                timestep=self._timestep(t.float()),
            ).sample.float()

    def aligned(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Any:
        """Only our SiT has a layer to align."""
        raise ValueError(f"a {type(self.model).__name__} has no layer to align; set task.align to 0")

    def _condition_width(self) -> int:
        raise NotImplementedError

    def _timestep(self, t: Tensor) -> Tensor:
        raise NotImplementedError


class Sana(DiffusersDecoder):
    """Sana (Xie et al. 2024): linear attention over the 32 channels of a deep autoencoder. Its own text states come with an
    RMS of about sqrt(5.5)."""

    condition_gain = 5.5**0.5

    def _condition_width(self) -> int:
        return self.model.config.caption_channels

    def _timestep(self, t: Tensor) -> Tensor:
        return 1000 * t * self.model.config.timestep_scale


class StableDiffusion(DiffusersDecoder):
    """The U-Net of Stable Diffusion 1 and 2 (Rombach et al. 2022), predicting noise or v."""

    def __init__(self, config: DiffusersDecoderConfig, model: Any, noise: NoiseConfig):
        super().__init__(config, model, noise)
        if model.config.addition_embed_type is not None:
            raise ValueError(
                f"decoder.path {config.path!r} wants {model.config.addition_embed_type} beside the tokens; "
                "choose one that tokens alone condition, such as Stable Diffusion 1.5"
            )
        if not isinstance(noise, DiffusionConfig):
            raise ValueError(f"noise: {config.path!r} is asked by the steps of a diffusion; give a DiffusionConfig or none")
        self.train_steps = noise.train_steps

    def _condition_width(self) -> int:
        return self.model.config.cross_attention_dim

    def _timestep(self, t: Tensor) -> Tensor:
        return (t * self.train_steps - 1).clamp(min=0)  # step k of K is t = (k + 1) / K


class AuraFlow(DiffusersDecoder):
    """AuraFlow (2024): a flow-matching transformer that reads tokens and latents in one sequence."""

    def _condition_width(self) -> int:
        return self.model.config.joint_attention_dim

    def _timestep(self, t: Tensor) -> Tensor:
        return t


_FAMILIES: dict[str, tuple[type[DiffusersDecoder], Any]] = {
    "SanaTransformer2DModel": (Sana, SanaTransformer2DModel),
    "UNet2DConditionModel": (StableDiffusion, UNet2DConditionModel),
    "AuraFlowTransformer2DModel": (AuraFlow, AuraFlowTransformer2DModel),
}


def load_diffusers_decoder(
    config: DiffusersDecoderConfig, weights: bool = True, noise: NoiseConfig | None = None
) -> DiffusersDecoder:
    """The trained network of the pipeline that `config` names, on CPU; without `weights` a fresh one of its shape, on
    torch's default device. `noise` None: its scheduler's. ValueError when it is missing or of a class we do not know."""
    source = Source("decoder.path", config.path, config.revision)
    index = fetched(source, DiffusionPipeline.load_config)
    classes = {part[1]: name for name, part in index.items() if isinstance(part, list | tuple) and len(part) == 2}
    known = sorted(classes.keys() & _FAMILIES.keys())
    if not known:
        raise ValueError(
            f"decoder.path {config.path!r} is a {index.get('_class_name')}; supported are {', '.join(_FAMILIES)}"
        )
    family, network = _FAMILIES[known[0]]
    dtype, part = getattr(torch, config.dtype), {"subfolder": classes[known[0]]}
    if weights:
        model = read_weights(source, network, torch_dtype=dtype, **part)
    else:
        model = nn.Module.to(network.from_config(fetched(source, network.load_config, **part)), dtype)
    return family(config, model, noise or scheduler_noise(source))


def adopt_network(model: Any, noise: NoiseConfig) -> DiffusersDecoder:
    """The decoder over a network of diffusers that is loaded already. ValueError for a class we do not know."""
    name = type(model).__name__
    if name not in _FAMILIES:
        raise ValueError(f"transformer: a {name} is no decoder here; supported are {', '.join(_FAMILIES)}")
    return _FAMILIES[name][0](DiffusersDecoderConfig("transformer"), model, noise)


def scheduler_noise(source: Source) -> NoiseConfig:
    """The noise that a pipeline's scheduler stands for: what its network was trained with, and is sampled with.

    Raises ValueError for a schedule that is not one of ours."""
    config = fetched(source, FlowMatchEulerDiscreteScheduler.load_config, subfolder="scheduler")
    return noise_of_scheduler(
        config["_class_name"], config, f"{source.field} {source.path!r}", "give noise a schedule of its own"
    )


def noise_of_scheduler(name: str, scheduler: Mapping[str, Any], whose: str, own: str) -> NoiseConfig:
    """What the config of a scheduler of class `name` stands for; `own` is the remedy where it is not one of ours.

    The shift of times is read under whichever name the class has for it: diffusers drops `flow_shift` in silence where a
    scheduler of another class is made from the same file."""
    if scheduler.get("use_dynamic_shifting"):
        raise ValueError(f"{whose}: its {name} shifts times by the picture's size; {own}")
    if name.startswith("FlowMatch"):
        return FlowConfig(shift=scheduler.get("shift", 1.0))
    if scheduler.get("prediction_type") == "flow_prediction":
        return FlowConfig(shift=scheduler.get("flow_shift", 1.0))
    predictions: dict[Any, Literal["epsilon", "v"]] = {"epsilon": "epsilon", "v_prediction": "v"}
    prediction = predictions.get(scheduler.get("prediction_type", "epsilon"))
    if prediction is None or scheduler.get("beta_schedule") != "scaled_linear" or scheduler.get("rescale_betas_zero_snr"):
        raise ValueError(f"{whose}: its {name} is neither a flow nor Stable Diffusion's betas; {own}")
    return DiffusionConfig(
        prediction=prediction,
        train_steps=scheduler["num_train_timesteps"],
        beta_start=scheduler["beta_start"],
        beta_end=scheduler["beta_end"],
    )


def _adapt(model: Any, config: LoraConfig) -> None:
    try:
        from peft import LoraConfig as PeftConfig
    except ImportError as error:
        raise ValueError("decoder.lora needs peft; pip install 'querybridge[lora]'") from error
    try:
        model.add_adapter(PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets)))
    except ValueError as error:
        raise ValueError(f"decoder.lora.targets {', '.join(config.targets)} fit no layer ({error})") from error
