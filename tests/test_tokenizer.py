import sentencepiece
from transformers import AutoTokenizer

from model.tokenizer import SPECIALS, train_tokenizer
from tests import tiny


def test_transformers_and_sentencepiece_agree(tmp_path):
    train_tokenizer(tiny.sentences(2000), tmp_path, vocab_size=400)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    unusual = [
        "",
        " ",
        "  two  spaces ",
        "Émile ☃ 你好\n\ttab",
        "<|im_start|>user\nhi<|im_end|>\n",
        "x" * 300,
    ]
    for text in tiny.sentences(10_000, seed=1) + unusual:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == text == theirs.decode(ids)


def test_special_marks_are_single_ids_and_plain_in_user_text(tmp_path):
    train_tokenizer(tiny.sentences(), tmp_path, vocab_size=360)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 360
    for mark in SPECIALS:
        (special,) = tokenizer.encode(mark, add_special_tokens=False)
        plain = tokenizer.encode(mark, add_special_tokens=False, split_special_tokens=True)
        assert special in tokenizer.all_special_ids
        assert not set(plain) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(plain) == mark


def test_the_same_text_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        train_tokenizer(tiny.sentences(), tmp_path / name, vocab_size=360)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_chat_template(tmp_path):
    train_tokenizer(tiny.sentences(), tmp_path, vocab_size=360)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many ?"}]},
        {"role": "assistant", "content": "two"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>how many ?<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )
