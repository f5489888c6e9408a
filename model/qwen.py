"""Qwen's vision-language models as frozen MLLMs: images as patches of any number, positions on three axes."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLModel,
    Qwen2VLImageProcessorPil,
    Qwen3VLModel,
)

from model.frozen import FrozenMLLM, MLLMConfig
from model.hub import chat_template, from_pretrained, image_processor
from model.prefix import Prefix, PrefixBuilder, Seen


class Qwen2_5_VL(FrozenMLLM):
    """Qwen2.5-VL (Bai et al. 2025) of any size."""

    model_class: Any = AutoModelForImageTextToText
    position_axes = 3
    base_class: Any = Qwen2_5_VLModel

    @classmethod
    def make_builder(cls, config: MLLMConfig) -> PrefixBuilder:
        """Tokenizer, image processor and positions of the model that `config` names."""
        parts = from_pretrained(AutoTokenizer, config), _processor(config), from_pretrained(AutoConfig, config)
        return cls.builder_of(*parts, template=chat_template(config))

    @classmethod
    def builder_of(cls, tokenizer: Any, processor: Any, model_config: Any, template: str | None = None) -> PrefixBuilder:
        """The same of parts that are there; `template` None: the tokenizer's own."""
        return PrefixBuilder(
            tokenizer, QwenImages(tokenizer, processor), QwenPositions(cls.base_class, model_config), template
        )

    def arguments(self, prefix: Prefix) -> dict[str, Tensor]:
        """Neighbouring images of one size as frames of one: no layer of the vision tower looks from frame to frame, and a
        frame costs it no Python as an image does."""
        given = prefix.arguments()
        if "image_grid_thw" in given:
            grids, counts = given["image_grid_thw"].unique_consecutive(dim=0, return_counts=True)
            given["image_grid_thw"] = torch.cat([grids[:, :1] * counts[:, None], grids[:, 1:]], dim=1)
        return given


class Qwen3_VL(Qwen2_5_VL):
    """Qwen3-VL (2025): what its vision tower sees enters several layers, all of them during the prefill."""

    base_class = Qwen3VLModel


class QwenImages:
    """An image -> patches, and as many tokens as there are squares of `merge_size` x `merge_size` patches."""

    single_differs = False

    def __init__(self, tokenizer: Any, processor: Qwen2VLImageProcessorPil):
        self.processor = processor
        self.image_id: int = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def __call__(self, image: Image.Image, alone: bool) -> Seen:
        """See `ImageReader`."""
        processed = self.processor(images=[image], return_tensors="pt")
        grid = processed["image_grid_thw"]  # [1, 3]: patches along time, height, width
        count = int(grid.prod()) // self.processor.merge_size**2
        return Seen([self.image_id] * count, {"pixel_values": processed["pixel_values"], "image_grid_thw": grid})


class QwenPositions:
    """Multimodal rotary positions by transformers' own rule, without a model: the rule reads only the config."""

    def __init__(self, base_class: Any, config: Any):
        self.base_class, self.config = base_class, config
        self.image_id: int = config.image_token_id

    def __call__(self, ids: Tensor, mask: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        """See `Positions`; [3, B, P]: time, height, width."""
        return self.base_class.get_rope_index(
            self,
            ids,
            mm_token_type_ids=(ids == self.image_id).int(),  # without them images would silently get 1-D positions
            image_grid_thw=images.get("image_grid_thw"),
            attention_mask=mask,
        )[0]

    def get_vision_position_ids(self, *args: Any, **options: Any) -> Tensor:
        """What the rule asks its model for."""
        return self.base_class.get_vision_position_ids(self, *args, **options)


def _processor(config: MLLMConfig) -> Qwen2VLImageProcessorPil:
    processor = cast(Qwen2VLImageProcessorPil, image_processor(config))
    size: Any = processor.size
    low = config.min_pixels if config.min_pixels is not None else size["shortest_edge"]
    high = config.max_pixels if config.max_pixels is not None else size["longest_edge"]
    cell = (processor.patch_size * processor.merge_size) ** 2
    if not 0 < low <= high or high < cell:
        raise ValueError(
            f"mllm.min_pixels {low} and mllm.max_pixels {high}: give a range that reaches {cell}, the pixels of a token"
        )
    processor.size = type(size)(shortest_edge=low, longest_edge=high)
    return processor
