"""Tiny random text-to-image pipelines in diffusers' own layout: a network, an autoencoder and a scheduler each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# pyright: reportPrivateImportUsage=false
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SanaTransformer2DModel,
    UNet2DConditionModel,
)

from tests import tiny


def sana(folder: Path, scheduler: Any = None) -> Path:
    """Sana over 4 x 4 x 4 latents of 16 x 16 pixels; its scheduler shifts times by 3, as the published ones do."""
    torch.manual_seed(0)
    network = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=4,
    )
    blocks: dict[str, Any] = {}
    for half in ("encoder", "decoder"):
        blocks |= {
            f"{half}_block_out_channels": (8, 8, 16),
            f"{half}_layers_per_block": (1, 1, 1),
            f"{half}_block_types": ("ResBlock", "ResBlock", "ResBlock"),
            f"{half}_qkv_multiscales": ((), (), ()),
        }
    AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.41407, **blocks).save_pretrained(folder / "vae")
    flow = DPMSolverMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    return _pipeline(folder, "SanaPipeline", "transformer", network, scheduler or flow)


def stable_diffusion(folder: Path, prediction: Any = "epsilon") -> Path:
    """A U-Net of two levels over 4 x 8 x 8 latents of 16 x 16 pixels."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    tiny.vae_folder(folder / "vae")
    betas = PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction, skip_prk_steps=True
    )
    return _pipeline(folder, "StableDiffusionPipeline", "unet", network, betas)


def auraflow(folder: Path) -> Path:
    """AuraFlow over 4 x 8 x 8 latents of 16 x 16 pixels."""
    torch.manual_seed(0)
    network = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    tiny.vae_folder(folder / "vae")
    return _pipeline(folder, "AuraFlowPipeline", "transformer", network, FlowMatchEulerDiscreteScheduler(shift=1.73))


PIPELINES: dict[str, Callable[[Path], Path]] = {"sana": sana, "stable_diffusion": stable_diffusion, "auraflow": auraflow}


def _pipeline(folder: Path, name: str, component: str, network: Any, scheduler: Any) -> Path:
    with torch.no_grad():  # fresh networks end in zeros; a trained one says something
        for parameter in network.parameters():
            if parameter.abs().sum() == 0:
                parameter.normal_(std=0.1)
    network.save_pretrained(folder / component)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": name,
        component: ["diffusers", type(network).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "vae": ["diffusers", json.loads((folder / "vae" / "config.json").read_text())["_class_name"]],
        "text_encoder": ["transformers", "GemmaModel"],
        "tokenizer": ["transformers", "GemmaTokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
