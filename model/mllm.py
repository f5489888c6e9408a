"""A config -> a frozen multimodal LLM: the families we know and how to load one. The interface is model/frozen.py.

A new family of one position axis that transformers can process needs nothing; one that does not is a class beside those of
model/families.py, and a line in the table below."""

from typing import cast

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from model.families import Idefics, ImageTextToText, LlavaOnevision, TextLLM
from model.frozen import FrozenMLLM, MLLMConfig, Prefilled
from model.hub import from_pretrained
from model.prefix import PrefixBuilder
from model.qwen import Qwen2_5_VL, Qwen3_VL

__all__ = ["FrozenMLLM", "MLLMConfig", "Prefilled", "load", "load_builder"]

Family = type[Qwen2_5_VL] | type[ImageTextToText] | type[TextLLM]
_FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Qwen2_5_VL,
    "qwen3_vl": Qwen3_VL,
    "llava_onevision": LlavaOnevision,
    "idefics3": Idefics,
    "smolvlm": Idefics,
    "internvl": ImageTextToText,
    "qwen2": TextLLM,
    "qwen3": TextLLM,
    "llama": TextLLM,
}


def load(config: MLLMConfig) -> FrozenMLLM:
    """The model that `config` names, frozen, on CPU. ValueError when it is missing or of a family we do not know."""
    family = _family(config)
    model = from_pretrained(family.model_class, config, dtype=getattr(torch, config.dtype))
    return family(config, model, family.make_builder(config))


def outline(config: MLLMConfig) -> FrozenMLLM:
    """A fresh model of the shape that `config` names, on torch's default device; it reads prefixes, and makes none."""
    family = _family(config)
    model = family.model_class.from_config(from_pretrained(AutoConfig, config), dtype=getattr(torch, config.dtype))
    return family(config, model, cast(PrefixBuilder, _NoBuilder))


class _NoBuilder:
    image_id = None

    class tokenizer:
        eos_token_id = None


def load_builder(config: MLLMConfig) -> PrefixBuilder:
    """Only what makes prefixes for the model: tokenizer, image processor, positions; no weights are read."""
    return _family(config).make_builder(config)


def _family(config: MLLMConfig) -> Family:
    model_type = from_pretrained(AutoConfig, config).model_type
    if model_type in _FAMILIES:
        return _FAMILIES[model_type]
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return ImageTextToText  # untried: its prefixes may be refused, never misread
    raise ValueError(f"mllm.path {config.path!r} is a {model_type}; supported are {', '.join(_FAMILIES)}")
