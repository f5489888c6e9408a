"""A config -> a frozen multimodal LLM: the families we know and how to load one. The interface is model/frozen.py.

A new family is a line in the table below: `ImageTextToText` if its positions have one axis, its attention is causal, and
transformers' processor gives image tensors that can be joined on their first axis; else a class beside those of
model/families.py. tests/test_families.py holds it against transformers' own class, once tests/tiny_families.py makes one."""

from typing import Any, cast

import torch
from transformers import AutoConfig

from model.families import Idefics, ImageTextToText, LlavaOnevision, TextLLM
from model.frozen import FrozenMLLM, MLLMConfig
from model.hub import Source, from_pretrained, weights
from model.prefilled import Prefilled
from model.prefix import PrefixBuilder
from model.qwen import Qwen2_5_VL, Qwen3_VL

__all__ = ["FrozenMLLM", "MLLMConfig", "NoBuilder", "Prefilled", "load", "load_builder"]

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


def load(config: MLLMConfig, device: torch.device | None = None) -> FrozenMLLM:
    """The model that `config` names, frozen, its files read straight onto `device` (None: CPU). ValueError when it is
    missing or of a family we do not know."""
    family = _family(config)
    source, dtype = Source("mllm.path", config.path, config.revision), getattr(torch, config.dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if device is not None and device.type != "cpu":
        options["device_map"] = {"": device}  # and not `with device`: rotary frequencies would be others in their last bits
    if config.vision_attention is not None:
        options["attn_implementation"] = {"vision_config": config.vision_attention}
    model = weights(source, family.model_class, **options)
    return family(config, model, family.make_builder(config))


def outline(config: MLLMConfig) -> FrozenMLLM:
    """A fresh model of the shape that `config` names, on torch's default device; it reads prefixes, and makes none."""
    family = _family(config)
    model = family.model_class.from_config(from_pretrained(AutoConfig, config), dtype=getattr(torch, config.dtype))
    return family(config, model, cast(PrefixBuilder, NoBuilder))


def adopt(model: Any, tokenizer: Any, image_processor: Any | None) -> FrozenMLLM:
    """A model of transformers that is loaded already, with what makes its prefixes, frozen. ValueError for a family whose
    image processor alone does not make them."""
    kind = model.config.model_type
    family, config = _FAMILIES.get(kind), MLLMConfig(model.name_or_path or kind)
    if family is TextLLM:
        return TextLLM(config, model, PrefixBuilder(tokenizer, images=None))
    if family is None or not issubclass(family, Qwen2_5_VL) or image_processor is None:
        whole = [name for name, each in _FAMILIES.items() if issubclass(each, Qwen2_5_VL | TextLLM)]
        raise ValueError(f"mllm: a {kind} cannot be put together from parts; {', '.join(whole)} can, with all their parts")
    return family(config, model, family.builder_of(tokenizer, image_processor, model.config))


class NoBuilder:
    """Stands where a model is only read prefixes that were made of numbers: nothing is tokenized, nothing is said."""

    image_id = None

    class tokenizer:
        eos_token_id = None


def load_builder(config: MLLMConfig) -> PrefixBuilder:
    """Only what makes prefixes for the model: tokenizer, image processor, positions; no weights are read."""
    return _family(config).make_builder(config)


def _family(config: MLLMConfig) -> Family:
    model_type = from_pretrained(AutoConfig, config).model_type
    if model_type not in _FAMILIES:
        raise ValueError(f"mllm.path {config.path!r} is a {model_type}; supported are {', '.join(_FAMILIES)}")
    return _FAMILIES[model_type]
