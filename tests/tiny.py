"""Tiny real models for tests: the classes that users run, with random weights and a few thousand
parameters."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from model.connector import ConnectorConfig
from model.decoder import SiTDecoderConfig
from model.metaquery import MetaQueryConfig
from model.mllm import MLLMConfig
from model.prefix import Turn
from model.sit import SiTConfig
from model.tokenizer import IMAGE, PAD, TURN_END, VIDEO, VISION_END, VISION_START, train_tokenizer
from model.vae import VAEConfig

TEXT = (
    "a the red green blue yellow small large circle square triangle star left right of above below and "
    "is there how many what colour shape does it have on white black background one two three yes no ? ."
)


def sentences(count: int = 500, seed: int = 0) -> list[str]:
    """Random strings of the world's words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(TEXT.split(), k=draw.randint(1, 12))) for _ in range(count)]


def near(picture: Any, other: Any) -> bool:
    """Whether pictures are the same but for rounding: a batch may be summed in another order, by a machine's own kernels."""
    picture, other = np.asarray(picture, int), np.asarray(other, int)
    return picture.shape == other.shape and int(np.abs(picture - other).max()) <= 1


def image(size: tuple[int, int] = (16, 16), seed: int = 0) -> Image.Image:
    """Noise; size is (width, height) in pixels."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def conversations() -> list[list[Turn]]:
    """Mixed lengths, with no, one and two images of different sizes."""
    return [
        [Turn("user", "a red circle")],
        [Turn("system", "draw"), Turn("user", "how many ?", (image(), image((24, 16), seed=1)))],
        [
            Turn("user", "what colour is the large star left of it ?", (image((16, 32), seed=2),)),
            Turn("assistant", "red"),
            Turn("user", "is there a blue square ?"),
        ],
    ]


def mllm_folder(folder: Path, seed: int = 0) -> Path:
    """A Qwen2.5-VL of 2 layers and width 32 in the hub's layout; an image of 16x16 pixels is 4 tokens."""
    train_tokenizer(sentences(), folder, vocab_size=360)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in (PAD, TURN_END, IMAGE, VIDEO)}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4),
            bos_token_id=None,
            eos_token_id=ids[TURN_END],
            pad_token_id=ids[PAD],
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=16,
            intermediate_size=32,
            num_heads=2,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=16,
            fullatt_block_indexes=[1],
            out_hidden_size=32,
        ),
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=tokenizer.convert_tokens_to_ids(VISION_START),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(VISION_END),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at birth, so that tests see what differs
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    processor.save_pretrained(folder)
    return folder


def vae_folder(folder: Path, seed: int = 0) -> Path:
    """An AutoencoderKL of 4 latent channels: 16x16 pixels <-> 8x8 latents."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[0.5, 1.0, 2.0, 0.8],
    )
    AutoencoderKL(**settings).save_pretrained(folder)
    return folder


def sit_config(**changes) -> SiTConfig:
    """2 blocks of width 32 over 4 x 8 x 8 latents."""
    shape: dict[str, Any] = dict(
        latent_channels=4,
        latent_size=8,
        patch=2,
        width=32,
        depth=2,
        heads=2,
        condition_width=24,
        align_depth=1,
    )
    return SiTConfig(**(shape | changes))


def metaquery_config(folder: Path, **changes) -> MetaQueryConfig:
    """A whole bridge of 4 queries; makes its MLLM and VAE below `folder` unless they are there."""
    for name, make in (("mllm", mllm_folder), ("vae", vae_folder)):
        if not (folder / name).exists():
            make(folder / name)
    parts: dict[str, Any] = dict(
        mllm=MLLMConfig(str(folder / "mllm"), dtype="float32"),
        decoder=SiTDecoderConfig(sit=sit_config()),
        vae=VAEConfig(str(folder / "vae")),
        queries=4,
        connector=ConnectorConfig(layers=1),
        trainable=("*",),
    )
    return MetaQueryConfig(**(parts | changes))
