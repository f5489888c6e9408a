"""Sizes -> a MetaQuery of random weights that stands in for a real one where its speed is measured on a small machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from model.connector import ConnectorConfig
from model.decoder import SiTDecoder, SiTDecoderConfig
from model.metaquery import MetaQuery, MetaQueryConfig, assemble
from model.mllm import MLLMConfig, NoBuilder
from model.prefix import PrefixBuilder
from model.qwen import Qwen2_5_VL
from model.sit import SiT, SiTConfig
from model.vae import LatentVAE, VAEConfig


@dataclass(frozen=True)
class Small:
    """A Qwen2.5-VL, a connector and a SiT of one width; latents of 16 x 16."""

    queries: int = 64
    width: int = 256
    layers: int = 8
    connector_layers: int = 2
    decoder_layers: int = 2
    vocabulary: int = 32_000
    """Tokens of the language model, whose embeddings the plain path trains with the queries."""

    def __post_init__(self) -> None:
        if min(self.queries, self.layers, self.vocabulary, self.decoder_layers) < 1 or self.width % 64:
            raise ValueError("small: give sizes of at least 1, and a width that is a multiple of 64")


def build(sizes: Small, device: torch.device | str) -> MetaQuery:
    """The model on a device, fresh; on the meta device, its shapes."""
    heads = sizes.width // 64
    text: dict[str, Any] = dict(
        vocab_size=sizes.vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rope_parameters=dict(rope_type="default", mrope_section=[8, 12, 12], rope_theta=1e4),
    )
    vision: dict[str, Any] = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=sizes.width)
    sit = SiTConfig(
        latent_channels=4,
        latent_size=16,
        patch=2,
        width=sizes.width,
        depth=sizes.decoder_layers,
        heads=heads,
        condition_width=sizes.width,
        condition_tokens=sizes.queries,
        align_depth=1,
    )
    config = MetaQueryConfig(
        mllm=MLLMConfig("stand-in", dtype="float32"),
        decoder=SiTDecoderConfig(sit=sit),
        vae=VAEConfig("stand-in"),
        queries=sizes.queries,
        connector=ConnectorConfig(layers=sizes.connector_layers),
        trainable=("*",),
    )
    blocks: dict[str, Any] = dict(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    with torch.device(device):
        stock = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
        mllm = Qwen2_5_VL(config.mllm, stock, cast(PrefixBuilder, NoBuilder))
        vae = AutoencoderKL(norm_num_groups=4, **blocks)
        return assemble(config, mllm, LatentVAE(vae), SiTDecoder(SiT(sit)), embedding_std=0.02)
