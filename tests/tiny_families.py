"""Tiny random checkpoints of every MLLM family, in the hub's own layout: weights, config, tokenizer, processor, template."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaOnevisionConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3VLConfig,
    SmolVLMConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from model.tokenizer import train_tokenizer
from tests import tiny

WIDTH, SIDE = 32, 16  # of the language model; pixels of the smallest picture that each sees whole

TEMPLATE = (  # as the families write theirs: marks of their own, parts or plain text
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def qwen3_vl(folder: Path) -> Path:
    """Qwen3-VL, whose vision tower feeds the first language layer too."""
    tokenizer = _tokenizer(folder, [], "<|vision_start|><|image_pad|><|vision_end|>")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    config = Qwen3VLConfig(
        text_config=_text(
            tokenizer,
            head_dim=8,
            rope_parameters=dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=1e4, mrope_interleaved=True),
        ),
        vision_config=dict(
            depth=2,
            hidden_size=16,
            intermediate_size=32,
            num_heads=2,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=WIDTH,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    size = {"shortest_edge": 64, "longest_edge": 4096}
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size).save_pretrained(folder)
    return _weights(folder, AutoModelForImageTextToText, config)


def llava_onevision(folder: Path) -> Path:
    """LLaVA-OneVision over Qwen2, with up to four tiles."""
    tokenizer = _tokenizer(folder, ["<image>", "<video>"], "<image>")
    pinpoints = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    settings: dict[str, Any] = dict(
        vision_config=dict(model_type="siglip_vision_model", vision_use_head=False, **_vision()),
        text_config=dict(model_type="qwen2", **_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    config = LlavaOnevisionConfig(**settings)
    _processor(folder, "LlavaOnevisionProcessor", num_image_tokens=16, vision_feature_select_strategy="full")
    LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints).save_pretrained(
        folder
    )
    return _weights(folder, AutoModelForImageTextToText, config)


def internvl(folder: Path) -> Path:
    """InternVL over Qwen2: nothing is written for it, the generic adapter reads it."""
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = _tokenizer(folder, {**marks, "video_token": "<video>"}, "<IMG_CONTEXT>")
    config = InternVLConfig(
        vision_config=_vision() | dict(image_size=[SIDE, SIDE], patch_size=[4, 4]),
        text_config=dict(model_type="qwen2", **_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
    )
    _processor(folder, "InternVLProcessor", image_seq_length=4)
    size = {"height": SIDE, "width": SIDE}
    GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=4).save_pretrained(folder)
    return _weights(folder, AutoModelForImageTextToText, config)


def idefics3(folder: Path) -> Path:
    """Idefics3 over Llama, with tiles in rows and columns."""
    return _idefics(folder, Idefics3Config, "Idefics3Processor", Idefics3ImageProcessorPil)


def smolvlm(folder: Path) -> Path:
    """SmolVLM, of the same shape."""
    return _idefics(folder, SmolVLMConfig, "SmolVLMProcessor", SmolVLMImageProcessorPil)


def qwen3(folder: Path) -> Path:
    """A language model that sees nothing."""
    return _weights(folder, AutoModelForCausalLM, Qwen3Config(**_text(_tokenizer(folder, [], ""), head_dim=8)))


def qwen2(folder: Path) -> Path:
    """Another."""
    return _weights(folder, AutoModelForCausalLM, Qwen2Config(**_text(_tokenizer(folder, [], ""))))


def llama(folder: Path) -> Path:
    """And another."""
    return _weights(folder, AutoModelForCausalLM, LlamaConfig(**_text(_tokenizer(folder, [], ""))))


SEEING: dict[str, Callable[[Path], Path]] = {
    "qwen2_5_vl": tiny.mllm_folder,
    "qwen3_vl": qwen3_vl,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
}
BLIND: dict[str, Callable[[Path], Path]] = {"qwen2": qwen2, "qwen3": qwen3, "llama": llama}


IDEFICS_TEMPLATE = (  # as published, but for the line breaks
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def _idefics(folder: Path, config_class: Any, processor: str, image_processor: Any) -> Path:
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    marks = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", *tiles]
    tokenizer = _tokenizer(folder, marks, IDEFICS_TEMPLATE)
    config = config_class(
        vision_config=_vision(),
        text_config=dict(model_type="llama", **_text(tokenizer)),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )
    _processor(folder, processor, image_seq_len=4)
    image_processor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}).save_pretrained(folder)
    return _weights(folder, AutoModelForImageTextToText, config)


def _tokenizer(folder: Path, marks: list[str] | dict[str, str], image: str) -> Any:
    """A trained tokenizer with more marks (named ones become attributes); and its own template, or ours with this mark for
    an image."""
    train_tokenizer(tiny.sentences(), folder, vocab_size=360)
    named = {"extra_special_tokens": marks} if marks else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **named)
    tokenizer.chat_template = image if "{%" in image else TEMPLATE.replace("IMAGE", image)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        **more,
    )


def _vision() -> dict[str, Any]:
    return dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=4
    )


def _processor(folder: Path, name: str, **settings: Any) -> None:
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": name, **settings}))


def _weights(folder: Path, kind: Any, config: Any) -> Path:
    torch.manual_seed(0)
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at birth, so that tests see what differs
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder
