"""A checkpoint of the official REPA-E code -> a release: vae/ and sit/, as a run of configs/repae.py leaves.

    python -m sample.convert 0400000.pt --out releases/xl-f8d4

The checkpoint is one file of End2End-Diffusion/REPA-E's training: a dict with `model`, `ema`, `vae` and the parser's `args`.
Nothing in it is executed, and a tensor that has no place is an error. What draws is the averaged SiT, with the statistics
that went along with it, and the VAE, of which that code keeps no average.
"""

import argparse
import pickle
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from model.decoder import save_sit
from model.files import atomic_folder, check_match, check_new
from model.labels import LABELS_FILE
from model.sit import SIZES, SiT, SiTConfig
from sample.cli import run

Tensors = Mapping[str, Tensor]

_SIT = (  # official names -> ours
    (r"^x_embedder\.proj\.", "embed."),
    (r"^t_embedder\.", "embed_time."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
    (r"^final_layer\.adaLN_modulation\.1\.", "final_modulation.project."),
    (r"\.adaLN_modulation\.1\.", ".modulation.project."),
    (r"^final_layer\.linear\.", "unembed."),
)
_VAE = (  # the names of latent diffusion -> those of diffusers
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Convert a checkpoint of the official REPA-E code."""

    checkpoint: tyro.conf.Positional[Path]
    """Its .pt file."""
    out: Path
    """The release folder to write."""


def main(argv: list[str] | None = None) -> None:
    """Reads one file, writes one folder."""
    args = tyro.cli(Args, args=argv, description=Args.__doc__)
    convert(args.checkpoint, args.out)
    print(f"{args.out}: python -m sample.classes --release {args.out} draws from it")


def convert(checkpoint: Path, release: Path) -> None:
    """Raises ValueError where the checkpoint is none, or holds what we do not know."""
    check_new(release)
    found = _read(checkpoint)
    for name in ("ema", "vae"):
        if not isinstance(found.get(name), Mapping):
            raise ValueError(f"{checkpoint} has no {name!r}; give a checkpoint that REPA-E's training saved")
    settings = vars(found["args"]) if isinstance(found.get("args"), argparse.Namespace) else {}
    if settings.get("path_type", "linear") != "linear":
        raise ValueError(f"{checkpoint}: path_type is {settings['path_type']}; only linear can be converted")
    try:
        sit, labels, (mean, variance) = _sit(found["ema"], settings, checkpoint)
        vae = _vae(found["vae"], checkpoint)
    except KeyError as error:
        raise ValueError(f"{checkpoint} lacks {error.args[0]}; give a checkpoint that REPA-E's training saved") from error
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=variance.sqrt().tolist())
    with atomic_folder(release) as draft:
        vae.save_pretrained(draft / "vae")
        save_sit(draft / "sit", sit, beside={LABELS_FILE: {"embed_word.weight": labels}})


def _read(checkpoint: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)  # it holds three optimizers too
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{checkpoint} is no checkpoint of tensors ({reason}); download or save it again") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{checkpoint} holds a {type(found).__name__}, no dict; give a checkpoint that REPA-E's training saved"
        )
    return found


def _sit(ema: Tensors, settings: Mapping[str, Any], path: Path) -> tuple[SiT, Tensor, tuple[Tensor, Tensor]]:
    """The SiT, the embedding of classes (ours says nothing in row 0, theirs in the last), mean and variance of latents."""
    rest = {name: t for name, t in ema.items() if not name.startswith("projectors.") and name != "bn.num_batches_tracked"}
    position, classes = rest.pop("pos_embed")[0], rest.pop("y_embedder.embedding_table.weight")
    mean, variance = rest.pop("bn.running_mean"), rest.pop("bn.running_var")
    width, channels, patch, _ = rest["x_embedder.proj.weight"].shape
    if settings.get("cfg_prob", 0.1) == 0 or len(classes) != settings.get("num_classes", len(classes) - 1) + 1:
        raise ValueError(f"{path}: its {len(classes)} classes have no row for none of them (cfg_prob 0); train it with one")
    tensors = {_renamed(name, _SIT): tensor for name, tensor in rest.items()}
    depth = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")), default=-1)
    size = next((size for size in SIZES.values() if size[:2] == (depth, width)), None)
    if size is None:
        raise ValueError(
            f"{path}: a SiT of depth {depth} and width {width} is of no published size, so its heads are unknown"
        )
    config = SiTConfig(
        latent_channels=channels,
        latent_size=patch * round(len(position) ** 0.5),
        patch=patch,
        width=width,
        depth=depth,
        heads=size[2],
        condition_width=width,
        condition_tokens=1,
        conditioning="modulation",
        shared_modulation=False,
        align_depth=settings.get("encoder_depth", 0),
        positions="stored",
        qk_norm=False,
        time_scale=1.0,
    )
    tensors["embed.weight"] = tensors["embed.weight"].flatten(1)
    if missing := {"unembed.weight", "unembed.bias"} - tensors.keys():
        raise KeyError(f"final_layer.linear ({min(missing)} here)")
    for name in ("unembed.weight", "unembed.bias"):  # theirs are ordered by place and then channel
        tensors[name] = tensors[name].unflatten(0, (patch * patch, channels)).transpose(0, 1).flatten(0, 1)
    tensors["position"] = position
    sit = SiT(config)
    check_match(tensors, sit.state_dict(), path)
    sit.load_state_dict(tensors)
    return sit, classes.roll(1, 0), (mean, variance)


def _vae(official: Tensors, path: Path) -> Any:
    """An AutoencoderKL of diffusers; its shape is read off the tensors."""
    levels = 1 + max((int(n.split(".")[2]) for n in official if n.startswith("encoder.down.")), default=-1)
    if not levels:
        raise ValueError(f"{path}: vae has no encoder.down; give a checkpoint that REPA-E's training saved")
    attends = [any(n.startswith(f"encoder.down.{level}.attn.") for n in official) for level in range(levels)]
    widths = [official[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    blocks = sum(n.startswith("encoder.down.0.block.") and n.endswith(".conv1.weight") for n in official)
    options: dict[str, Any] = {
        "down_block_types": tuple("AttnDownEncoderBlock2D" if attend else "DownEncoderBlock2D" for attend in attends),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if attend else "UpDecoderBlock2D" for attend in reversed(attends)),
        "block_out_channels": tuple(widths),
        "layers_per_block": blocks,
        "latent_channels": official["post_quant_conv.weight"].shape[0],
    }
    vae: Any = AutoencoderKL(**options)
    tensors = {}
    for name, tensor in official.items():
        new = _renamed(name, _VAE)
        if new.startswith("decoder.up_blocks."):  # counted from the finest there, from the coarsest here
            parts = new.split(".")
            new = ".".join([*parts[:2], str(levels - 1 - int(parts[2])), *parts[3:]])
        attention = ".attentions." in new and tensor.ndim == 4
        tensors[new] = tensor.flatten(1) if attention else tensor
    check_match(tensors, vae.state_dict(), path)
    vae.load_state_dict(tensors)
    return vae


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        name = re.sub(old, new, name)
    return name


if __name__ == "__main__":
    sys.exit(run(main))
