"""Sentences -> a tokenizer folder (`tokenizer.model`, `tokenizer_config.json`) that `AutoTokenizer` loads.

The vocabulary is a SentencePiece BPE model with byte fallback: every text has ids, and they decode to the same text.
The marks of the conversation are user-defined symbols, so that SentencePiece itself and transformers agree."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, IMAGE, VISION_END, VIDEO = (
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|video_pad|>",
)
SPECIALS = (PAD, TURN_START, TURN_END, VISION_START, IMAGE, VISION_END, VIDEO)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(sentences: Iterable[str], folder: Path, vocab_size: int) -> None:
    """Train BPE on `sentences` and write the two files of the tokenizer into `folder`.

    `vocab_size` counts everything: `<unk>`, 256 bytes, the special marks, characters and merges. When the text is too
    small for it, ValueError says how large it can be."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",  # the class transformers loads it with (Llama) assumes merges
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            split_digits=True,
            normalization_rule_name="identity",  # decode(encode(text)) == text, as transformers' class does
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=list(SPECIALS),
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,  # the same text gives the same file
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size {vocab_size} does not fit the sentences: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(_config(), indent=2) + "\n")


def _config() -> dict:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "unk_token": "<unk>",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": PAD,
        "padding_side": "left",
        "extra_special_tokens": [mark for mark in SPECIALS if mark not in (PAD, TURN_END)],
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
