"""A config -> a frozen multimodal LLM: the families we know and how to load one. The interface is model/frozen.py."""

import torch
from transformers import AutoConfig

from model.frozen import FrozenMLLM, MLLMConfig, Prefilled
from model.hub import from_pretrained
from model.prefix import PrefixBuilder
from model.qwen import Qwen2_5_VL

__all__ = ["FrozenMLLM", "MLLMConfig", "Prefilled", "load", "load_builder"]

_FAMILIES = {"qwen2_5_vl": Qwen2_5_VL}


def load(config: MLLMConfig) -> FrozenMLLM:
    """The model that `config` names, frozen, on CPU. ValueError when it is missing or of a family we do not know."""
    family = _family(config)
    model = from_pretrained(family.model_class, config, dtype=getattr(torch, config.dtype))
    return family(config, model, family.make_builder(config))


def load_builder(config: MLLMConfig) -> PrefixBuilder:
    """Only what makes prefixes for the model: tokenizer, image processor, positions; no weights are read."""
    return _family(config).make_builder(config)


def _family(config: MLLMConfig) -> type[Qwen2_5_VL]:
    model_type = from_pretrained(AutoConfig, config).model_type
    if model_type not in _FAMILIES:
        raise ValueError(f"mllm.path {config.path!r} is a {model_type}; supported are {', '.join(_FAMILIES)}")
    return _FAMILIES[model_type]
