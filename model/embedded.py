"""Sizes and sentences -> a fresh multimodal LLM as a folder in the hub's layout: the small one that this repository trains.

It is a Qwen2.5-VL like any other, with a tokenizer and an image processor of its own, so that `model/mllm.py` loads it as it
loads the published ones. What is trained from it is saved by `save`, in bfloat16.
"""

import copy
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from model.files import atomic_folder
from model.tokenizer import IMAGE, PAD, SPECIALS, TURN_END, VIDEO, VISION_END, VISION_START, train_tokenizer

MERGE = 2  # patches a side that become one visual token, as in every published Qwen2.5-VL
WEIGHTS = (".safetensors", ".bin", ".index.json")  # endings of files that hold weights or list them


@dataclass(frozen=True)
class EmbeddedConfig:
    """Sizes of the embedded MLLM; 5.2 million parameters as they stand, half of them in the vision tower."""

    vocabulary: int = 1536
    """Tokens, with 256 bytes and the marks of the conversation."""
    width: int = 192
    mlp_width: int = 512
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    vision_width: int = 192
    vision_mlp_width: int = 512
    vision_layers: int = 4
    vision_heads: int = 6
    patch: int = 8
    """Pixels a side."""
    image_size: int = 64
    """Pixels a side; other pictures are scaled to this area. 64 in patches of 8 are 16 visual tokens."""
    seed: int = 0
    """Decides the first weights."""

    def __post_init__(self) -> None:
        for width, heads in (("width", "heads"), ("vision_width", "vision_heads")):
            size, count = getattr(self, width), getattr(self, heads)
            if size % count or size // count % 4:
                raise ValueError(f"{width} {size} with {heads} {count}: give a multiple of {4 * count}, four times {heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} do not divide over kv_heads {self.kv_heads}; give a divisor of it")
        if self.image_size % (MERGE * self.patch):
            raise ValueError(f"image_size {self.image_size} is no multiple of {MERGE} x patch {self.patch}; give one")


def make(folder: Path, config: EmbeddedConfig, sentences: Iterable[str]) -> None:
    """Write the untrained model, its tokenizer trained on `sentences` and its image processor: whole or not at all.

    The same arguments give the same weights. Raises ValueError when the sentences are too few for the vocabulary.
    """
    with atomic_folder(folder) as draft:
        train_tokenizer(sentences, draft, config.vocabulary)
        tokenizer = AutoTokenizer.from_pretrained(draft)
        ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in SPECIALS}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            Qwen2_5_VLForConditionalGeneration(_qwen(config, ids)).save_pretrained(draft)
        area = config.image_size**2  # one number for both bounds: every picture has as many tokens
        Qwen2VLImageProcessorPil(
            patch_size=config.patch,
            merge_size=MERGE,
            temporal_patch_size=2,
            size={"shortest_edge": area, "longest_edge": area},
        ).save_pretrained(draft)


def save(folder: Path, model: Qwen2_5_VLForConditionalGeneration, like: Path) -> None:
    """Write a trained model in bfloat16; tokenizer, image processor and whatever else is no weight come from `like`."""
    # A copy, so that only weights are rounded: rotary frequencies stay float32, as in a model that is loaded.
    rounded = Qwen2_5_VLForConditionalGeneration._from_config(copy.deepcopy(model.config), dtype=torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = model.generation_config
    with atomic_folder(folder) as draft:
        for file in like.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHTS):
                shutil.copyfile(file, draft / file.name)
        rounded.save_pretrained(draft)


def _qwen(config: EmbeddedConfig, ids: dict[str, int]) -> Qwen2_5_VLConfig:
    half = config.width // config.heads // 2  # rotary pairs of a head
    side = 3 * half // 8  # of them for height and for width each; the rest for time: 16, 24, 24 in the published models
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=2048,
            rope_parameters=dict(rope_type="default", mrope_section=[half - 2 * side, side, side], rope_theta=1e4),
            tie_word_embeddings=True,
            pad_token_id=ids[PAD],
            eos_token_id=ids[TURN_END],
            bos_token_id=None,
        ),
        vision_config=dict(
            depth=config.vision_layers,
            hidden_size=config.vision_width,
            intermediate_size=config.vision_mlp_width,
            num_heads=config.vision_heads,
            patch_size=config.patch,
            spatial_merge_size=MERGE,
            temporal_patch_size=2,
            window_size=config.image_size,
            fullatt_block_indexes=list(range((config.vision_layers - 1) % 2, config.vision_layers, 2)),
            out_hidden_size=config.width,
            tokens_per_second=1,
        ),
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )
