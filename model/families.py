"""Frozen MLLMs that are read through transformers' own processors: LLaVA-OneVision, Idefics3, SmolVLM and
InternVL; and language models that see nothing."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from model.frozen import FrozenMLLM, MLLMConfig
from model.hub import assemble_processor, from_pretrained
from model.prefix import Prefix, PrefixBuilder, Seen

_OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}  # what a processor says of text


class ProcessorImages:
    """Images through the processor that transformers has for the model."""

    single_differs = False

    def __init__(self, processor: Any, max_pixels: int | None = None):
        self.processor, self.max_pixels = processor, max_pixels
        self.image_id: int = processor.image_token_id

    def __call__(self, image: Image.Image, alone: bool) -> Seen:
        """See `ImageReader`."""
        return self.look(_within(image, self.max_pixels), alone)

    def look(self, image: Image.Image, alone: bool) -> Seen:
        """The same of an image that is small enough."""
        processed = self.processor(
            text=[self.processor.image_token], images=[image], add_special_tokens=False, return_tensors="pt"
        )
        tensors = self.tensors({k: v for k, v in processed.items() if k not in _OF_TEXT})
        return Seen(processed["input_ids"][0].tolist(), tensors)

    def tensors(self, processed: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the processor says of one image -> tensors whose first axes can be joined."""
        return processed


class ImageTextToText(FrozenMLLM):
    """Any family of AutoModelForImageTextToText whose `model` takes tokens, positions of one axis, and image tensors
    that are joined on their first axis."""

    model_class: Any = AutoModelForImageTextToText
    images_class: type[ProcessorImages] = ProcessorImages
    unsupported: tuple[str, ...] = ("min_pixels",)
    """Settings of MLLMConfig that the family refuses: its processor would not heed them."""

    @classmethod
    def make_builder(cls, config: MLLMConfig) -> PrefixBuilder:
        """Tokenizer, image processor and chat template of the model that `config` names."""
        _refuse(config, *cls.unsupported)
        processor = assemble_processor(config)
        template = processor.chat_template or processor.tokenizer.chat_template
        return PrefixBuilder(processor.tokenizer, cls.images_class(processor, config.max_pixels), template=template)


class LlavaOnevisionImages(ProcessorImages):
    """A conversation's only image is seen whole and in tiles; several are seen whole, padded to squares."""

    single_differs = True

    def look(self, image: Image.Image, alone: bool) -> Seen:
        """See `ProcessorImages`."""
        together = [image] if alone else [image, image]  # a second one, whatever it shows, has it padded to a square
        processed = self.processor.image_processor([together], return_tensors="pt")
        tokens = self.processor.tokenizer.encode(self.processor.replace_image_token(processed, 0), add_special_tokens=False)
        tensors = {
            "pixel_values": processed["pixel_values"][0],  # [tiles, 3, H, W]
            "image_sizes": processed["image_sizes"][:1],  # [1, 2]
            "batch_num_images": processed["batch_num_images"],  # [1]: 1 if alone, else 2; see `LlavaOnevision.arguments`
        }
        return Seen(tokens, tensors)


class LlavaOnevision(ImageTextToText):
    """LLaVA-OneVision (Li et al. 2024) of any size."""

    images_class = LlavaOnevisionImages

    def arguments(self, prefix: Prefix) -> dict[str, Tensor]:
        """The model wants for each conversation with images how many there are, and asks only whether it is one."""
        given = prefix.arguments()
        if prefix.images:
            rows = prefix.images["batch_num_images"].split(prefix.image_splits["batch_num_images"])
            counts = [torch.where(row[:1] == 1, 1, max(2, len(row))) for row in rows]
            given["batch_num_images"] = torch.cat(counts)
        return given


class IdeficsImages(ProcessorImages):
    """Tiles of all images side by side; the model wants them below an axis of its own (`Idefics.arguments`)."""

    def tensors(self, processed: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in processed.items()}


class Idefics(ImageTextToText):
    """Idefics3 (Laurençon et al. 2024) and SmolVLM, which shares its shape."""

    images_class = IdeficsImages
    unsupported = ("min_pixels", "max_pixels")  # its processor enlarges every picture to one length first

    def arguments(self, prefix: Prefix) -> dict[str, Tensor]:
        images = {name: tensor[None] for name, tensor in prefix.images.items()}
        return prefix.arguments() | images


class TextLLM(FrozenMLLM):
    """A language model that sees nothing: queries read its prompts all the same."""

    model_class: Any = AutoModelForCausalLM

    @classmethod
    def make_builder(cls, config: MLLMConfig) -> PrefixBuilder:
        """The tokenizer of the model that `config` names."""
        _refuse(config, "min_pixels", "max_pixels", "vision_attention")
        tokenizer = from_pretrained(AutoTokenizer, config)
        if not tokenizer.chat_template:
            raise ValueError(f"mllm.path {config.path!r} has no chat template; name a model that was tuned to converse")
        return PrefixBuilder(tokenizer, images=None)


def _within(image: Image.Image, pixels: int | None) -> Image.Image:
    """The image, scaled down to no more than so many pixels."""
    if pixels is None or image.width * image.height <= pixels:
        return image
    scale = (pixels / (image.width * image.height)) ** 0.5
    return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))), Image.Resampling.BICUBIC)


def _refuse(config: MLLMConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) is not None:
            raise ValueError(f"mllm.{name}: the model at {config.path!r} has no such setting; leave it out")
