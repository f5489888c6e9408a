"""Noisy latents, a time and conditioning -> the prediction: diffusion decoders behind one call.

Letters: B batch, L conditioning tokens, C conditioning width, c h w latent channels, height, width."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from model.assets import locate
from model.diffusers_decoder import DiffusersDecoder, DiffusersDecoderConfig, load_diffusers_decoder
from model.files import (
    atomic_folder,
    check_match,
    dump_config,
    parse_config,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from model.noise import FlowConfig, NoiseConfig
from model.sit import SiT, SiTConfig, SiTOutput

NOISE_FILE = "noise.json"
"""Beside a trained SiT: the schedule that it was trained by."""


@dataclass(frozen=True)
class SiTDecoderConfig:
    """Our SiT: `path` names a trained one (the folder that `save_sit` wrote), `sit` the shape of a fresh one."""

    path: str | None = None
    sit: SiTConfig | None = None


DecoderConfig = SiTDecoderConfig | DiffusersDecoderConfig


def build_decoder(config: DecoderConfig, weights: bool = True, noise: NoiseConfig | None = None) -> "Decoder":
    """The decoder that `config` describes, trained where it names one; without `weights` a fresh one of its shape. `noise`
    is the schedule that it will be used with; None: its own."""
    if isinstance(config, DiffusersDecoderConfig):
        return load_diffusers_decoder(config, weights, noise)
    if (config.path is None) == (config.sit is None):
        raise ValueError("decoder.path and decoder.sit: give one, a trained SiT's folder or the shape of a fresh one")
    if config.sit is not None:
        return SiTDecoder(SiT(config.sit))
    assert config.path is not None
    return SiTDecoder(load_sit(config.path, weights), noise or load_noise(config.path))


class SiTDecoder(nn.Module):
    """SiT takes the conditioning as it is; trained on unit-scale tokens, it expects an RMS of 1."""

    condition_gain = 1.0
    trains: tuple[str, ...] = ()

    def __init__(self, sit: SiT, noise: NoiseConfig = FlowConfig()):
        super().__init__()
        self.sit, self.noise = sit, noise
        self.condition_width = sit.config.condition_width
        self.condition_tokens: int | None = sit.config.condition_tokens
        self.patch, self.one_shape = sit.config.patch, sit.config.positions == "stored"
        self.latent_shape = (sit.config.latent_channels, sit.config.latent_size, sit.config.latent_size)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.sit(x_t, t, condition).prediction

    def aligned(self, x_t: Tensor, t: Tensor, condition: Tensor) -> SiTOutput:
        """The prediction with the hidden layer that an alignment loss looks at."""
        return self.sit(x_t, t, condition, hidden_at=self.sit.config.align_depth)


Decoder = SiTDecoder | DiffusersDecoder
"""What both offer: `condition_width`, `condition_tokens` and `condition_gain` tell a connector what to make; `noise` is the
schedule it was made for, unless a config gives another; parameters that match `trains` train whatever the config says;
sides of latents are multiples of `patch`, and with `one_shape` those of `latent_shape`."""


def save_sit(
    folder: Path, sit: SiT, noise: NoiseConfig = FlowConfig(), beside: Mapping[str, Mapping[str, Tensor]] | None = None
) -> None:
    """Write config.json, model.safetensors in the dtype of the weights and the schedule, complete or not at all; `beside`
    are further files of tensors by name."""
    with atomic_folder(folder) as draft:
        write_json(draft / NOISE_FILE, dump_config(noise))
        write_json(draft / "config.json", dump_config(sit.config))
        write_tensors(draft / "model.safetensors", sit.state_dict())
        for name, tensors in (beside or {}).items():
            write_tensors(draft / name, tensors)


def load_sit(path: str, weights: bool = True) -> SiT:
    """The SiT that `save_sit` wrote, or without `weights` a fresh one of its shape; ValueError when it is missing or does
    not fit its config."""
    folder = _folder(path)
    sit = SiT(parse_config(SiTConfig, read_json(folder / "config.json"), folder / "config.json"))
    if not weights:
        return sit
    tensors = read_tensors(folder / "model.safetensors")
    check_match(tensors, sit.state_dict(), folder / "model.safetensors")
    sit.load_state_dict(tensors)
    return sit


def load_noise(path: str) -> NoiseConfig:
    """The schedule that the SiT of a folder was trained by; ValueError where nothing says it."""
    folder = _folder(path)
    file = next((each for each in (folder / NOISE_FILE, folder.parent / NOISE_FILE) if each.is_file()), None)  # older: above
    if file is None:
        raise ValueError(f"{folder} has no {NOISE_FILE}; name the release of a decoder that this program trained")
    return parse_config(NoiseConfig, read_json(file), file)  # type: ignore[arg-type]


def _folder(path: str) -> Path:
    folder = locate(path)
    if folder is None:
        raise ValueError(f"decoder.path {path!r} does not exist; name a trained SiT's folder, or run make assets")
    return folder
