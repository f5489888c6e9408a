"""Every MLLM family, from a checkpoint in the hub's layout, against transformers' own class and processor."""

import json
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from data.batch import shorten
from model import mllm
from model.mllm import MLLMConfig
from model.prefix import Turn
from tests import tiny
from tests.tiny_families import BLIND, SEEING

QUERIES = 5


@pytest.fixture(scope="module", params=[*SEEING, *BLIND])
def family(request, tmp_path_factory):
    """The family's name, a checkpoint of it, ours and the stock model."""
    folder = (SEEING | BLIND)[request.param](tmp_path_factory.mktemp(request.param) / "mllm")
    kind = AutoModelForImageTextToText if request.param in SEEING else AutoModelForCausalLM
    stock = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return request.param, folder, mllm.load(MLLMConfig(str(folder), dtype="float32")), stock


def conversations(name: str) -> list[list[Turn]]:
    """Mixed lengths; no image, two in one turn, one; for those that see nothing, the same words."""
    if name in SEEING:
        return tiny.conversations()
    return [[replace(turn, images=()) for turn in turns] for turns in tiny.conversations()]


def whole(ours, stock, prefix, queries):
    """States [1, Q, D] of one unpadded row by the stock model's full pass: positions are its own, and the queries are
    spliced over the embeddings of as many words."""
    ids = torch.cat([prefix.ids, torch.full((1, QUERIES), 300)], dim=1)
    types = {"mm_token_type_ids": (ids == ours.builder.image_id).int()} if ours.position_axes else {}
    images = {name: tensor for name, tensor in ours.arguments(prefix).items() if name in prefix.images}
    splice = stock.get_input_embeddings().register_forward_hook(
        lambda module, given, embeds: torch.cat([embeds[:, :-QUERIES], queries.expand(1, -1, -1)], dim=1)
    )
    states = stock.model(input_ids=ids, attention_mask=torch.ones_like(ids), **types, **images).last_hidden_state
    splice.remove()
    return states[:, -QUERIES:]


def test_query_states_and_gradients_are_those_of_a_full_pass_of_the_stock_class(family):
    name, _, ours, stock = family
    queries = torch.randn(QUERIES, ours.width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    together = ours.read(ours.builder(conversations(name)), queries)  # padded, mixed
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    for row, turns in enumerate(conversations(name)):
        expected = whole(ours, stock, ours.builder([turns]), queries)
        torch.testing.assert_close(together[row], expected[0], rtol=1e-5, atol=1e-5)
        weights = torch.randn(expected.shape[1:], generator=torch.Generator().manual_seed(row))
        (by_cache,) = torch.autograd.grad((together[row] * weights).sum(), queries, retain_graph=True)
        (by_graph,) = torch.autograd.grad((expected[0] * weights).sum(), queries)
        assert by_graph.abs().max() > 1e-3
        assert (by_cache - by_graph).abs().max() <= 2e-5 * by_graph.abs().max()


def test_one_graph_over_everything_agrees(family):
    name, _, ours, _ = family
    queries = torch.randn(QUERIES, ours.width, generator=torch.Generator().manual_seed(1))
    prefix = ours.builder(conversations(name))
    torch.testing.assert_close(ours.read_full(prefix, queries), ours.read(prefix, queries), rtol=1e-5, atol=1e-5)


def drawings(name: str) -> tuple[list[str], list[list[Any]]]:
    """Prompts and pictures to draw from, of mixed lengths."""
    pictures = [[tiny.image((40, 24))], [], [tiny.image(), tiny.image((24, 40))], []] if name in SEEING else [[]] * 4
    return ["a", "a green cross above a yellow star and much more of the same", "like these", ""], pictures


@pytest.mark.parametrize("pass_tokens", [0, 10**6])
def test_a_head_read_once_and_rows_read_apart_change_nothing(family, monkeypatch, pass_tokens):
    """Every row apart, or all in one pass; the instruction to draw is read the first time only, padded rows or not."""
    name, _, ours, _ = family
    monkeypatch.setattr("model.prefilled.PASS_TOKENS", pass_tokens)
    queries = torch.randn(QUERIES, ours.width, generator=torch.Generator().manual_seed(1))
    prefix = ours.builder.draw(*drawings(name))
    assert len(prefix.head) > 8
    assert all(
        row[mask].tolist()[: len(prefix.head)] == list(prefix.head)
        for row, mask in zip(prefix.ids, prefix.mask, strict=True)
    )
    known = ours.prefill(prefix)
    torch.testing.assert_close(ours.read(known, queries), ours.read_full(prefix, queries), rtol=1e-5, atol=1e-5)
    plain = ours.prefill(replace(prefix, head=(), lengths=None))
    torch.testing.assert_close(known.last_states(50), plain.last_states(50), rtol=1e-5, atol=1e-5)
    assert torch.equal(known.next_positions, plain.next_positions)
    alone = ours.builder.draw([""])
    torch.testing.assert_close(ours.read(alone, queries), ours.read_full(alone, queries), rtol=1e-5, atol=1e-5)


def test_rows_take_their_images_along(family):
    name, _, ours, _ = family
    turns = conversations(name)
    picked, expected = ours.builder(turns).select([2, 1, 2]), ours.builder([turns[row] for row in (2, 1, 2)])
    assert picked.arguments().keys() == expected.arguments().keys()
    for argument, tensor in picked.arguments().items():
        assert torch.equal(tensor, expected.arguments()[argument]), argument
    assert picked.image_splits == expected.image_splits


def test_ids_and_images_are_those_of_the_family_s_own_processor(family):
    name, _, ours, _ = family
    if name in ("qwen2_5_vl", *BLIND):
        pytest.skip("test_prefix.py spells out the ids of Qwen; those that see nothing have no processor")
    if name == "qwen3_vl":
        pytest.skip("its image processor and the count of its tokens are Qwen2.5-VL's")
    processor = ours.builder.images.processor
    for turns in conversations(name):
        messages = [
            {"role": t.role, "content": [*({"type": "image"} for _ in t.images), {"type": "text", "text": t.text}]}
            for t in turns
        ]
        rendered = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images = [image for turn in turns for image in turn.images]
        expected = processor(text=[rendered], images=[images] if images else None, return_tensors="pt")
        given = ours.arguments(ours.builder([turns]))
        assert torch.equal(given["input_ids"], expected["input_ids"])
        for argument in set(given) & set(expected) - {"attention_mask"}:
            assert torch.equal(given[argument].squeeze(), expected[argument].squeeze()), argument


def test_answers_and_logits_are_those_of_the_stock_model(family):
    name, _, ours, stock = family
    prefix = ours.builder(conversations(name))
    answers = ours.answers(prefix, max_new_tokens=6)
    for row, turns in enumerate(conversations(name)):
        one = ours.builder([turns])
        given = ours.arguments(one)
        del given["position_ids"]
        if ours.position_axes:
            given["mm_token_type_ids"] = (one.ids == ours.builder.image_id).int()
        with torch.no_grad():
            torch.testing.assert_close(ours.logits(one), stock(**given).logits, rtol=1e-5, atol=1e-5)
        said = stock.generate(**given, max_new_tokens=6, do_sample=False)
        assert answers[row] == ours.builder.tokenizer.decode(said[0, one.ids.shape[1] :], skip_special_tokens=True)


def test_builders_go_to_worker_processes(family):
    name, _, ours, _ = family
    sent = pickle.loads(pickle.dumps(ours.builder))
    assert torch.equal(sent(conversations(name)).ids, ours.builder(conversations(name)).ids)


def test_frozen_and_its_context_is_known(family):
    _, _, ours, _ = family
    assert not any(parameter.requires_grad for parameter in ours.model.parameters())
    assert (ours.width, ours.context) == (32, 512)


def test_pixel_bounds_decide_how_many_tokens_an_image_has(tmp_path):
    folder = str(SEEING["qwen3_vl"](tmp_path / "mllm"))
    turns = [[Turn("user", "a", (tiny.image((32, 32)),))]]

    def tokens(**bounds: Any) -> int:
        builder = mllm.load_builder(MLLMConfig(folder, **bounds))
        return int((builder(turns).ids == builder.image_id).sum())

    assert tokens() == 16  # squares of 8 pixels
    assert tokens(max_pixels=256) == 4
    assert tokens(min_pixels=4096) == 64
    with pytest.raises(ValueError, match=r"mllm.min_pixels 512 and mllm.max_pixels 256: give a range"):
        tokens(min_pixels=512, max_pixels=256)


def test_tiles_are_bounded_where_a_family_cuts_pictures_up(tmp_path):
    folder = str(SEEING["llava_onevision"](tmp_path / "mllm"))
    picture = tiny.image((64, 64))
    whole, bounded = (
        mllm.load_builder(MLLMConfig(folder, max_pixels=pixels))([[Turn("user", "a", (picture,))]]).images["pixel_values"]
        for pixels in (None, 16 * 16)
    )
    small = mllm.load_builder(MLLMConfig(folder))([[Turn("user", "a", (picture.resize((16, 16)),))]]).images["pixel_values"]
    assert torch.equal(bounded, small)
    assert len(bounded) < len(whole)


def test_a_bound_that_would_only_blur_is_refused(tmp_path):
    folder = str(SEEING["idefics3"](tmp_path / "mllm"))
    with pytest.raises(ValueError, match=r"mllm.max_pixels: the model at .* has no such setting"):
        mllm.load_builder(MLLMConfig(folder, max_pixels=256))


def test_how_the_vision_tower_attends_can_be_said(tmp_path):
    folder = str(SEEING["qwen2_5_vl"](tmp_path / "mllm"))
    fused, plain = (mllm.load(MLLMConfig(folder, dtype="float32", vision_attention=kind)) for kind in (None, "eager"))
    kinds = [m.model.config.vision_config._attn_implementation for m in (fused, plain)]
    assert kinds == ["sdpa", "eager"]
    assert plain.model.config.text_config._attn_implementation == "sdpa"
    prefix = fused.builder([[Turn("user", "a", (tiny.image(),))]])
    torch.testing.assert_close(fused.logits(prefix), plain.logits(prefix), atol=1e-5, rtol=1e-5)


def test_what_a_family_cannot_do_is_refused_in_a_sentence(tmp_path):
    blind = str(BLIND["llama"](tmp_path / "llama"))
    with pytest.raises(ValueError, match="this MLLM reads text alone; leave the images out"):
        mllm.load_builder(MLLMConfig(blind))([[Turn("user", "a", (tiny.image(),))]])
    with pytest.raises(ValueError, match=r"mllm.max_pixels: the model at .* has no such setting; leave it out"):
        mllm.load_builder(MLLMConfig(blind, max_pixels=256))
    (tmp_path / "llama" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template; name a model that was tuned to converse"):
        mllm.load_builder(MLLMConfig(blind))


def without_one(folder, name: str) -> str:
    """The checkpoint in `folder`, less one tensor."""
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return str(folder)


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    folder = without_one(BLIND["qwen2"](tmp_path / "mllm"), "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"lacks 1 weights of a Qwen2ForCausalLM .* the first model.layers.1.mlp.up_proj"):
        mllm.load(MLLMConfig(folder))


def test_code_that_lies_with_a_model_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "strange", "auto_map": {"AutoConfig": "code.Strange"}}')
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="cannot be loaded"):
        mllm.load_builder(MLLMConfig(str(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_a_prefix_does_not_depend_on_the_day_it_is_read(tmp_path):
    folder = BLIND["llama"](tmp_path / "mllm")
    template = (folder / "chat_template.jinja").read_text()
    today = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    (folder / "chat_template.jinja").write_text(today + "{{ date_string }}" + template)
    builder = mllm.load_builder(MLLMConfig(str(folder)))
    assert builder.tokenizer.decode(builder.draw(["a"]).ids[0]).startswith("26 Jul 2024<|im_start|>")


def test_a_caption_that_was_shortened_is_read(tmp_path):
    """Where the template has a blank before the text, which may be a token of its own there."""
    config = MLLMConfig(str(SEEING["smolvlm"](tmp_path / "mllm")))
    for limit in range(8, 20):
        builder = mllm.load_builder(config)
        builder.max_text_tokens = limit
        for word in ("赤い", "7", "ω", "red"):
            assert builder.draw([shorten(f"{word} a red circle left of a blue square " * 3, builder)]).ids.shape[0] == 1


def test_a_sliding_window_is_refused(tmp_path):
    folder = BLIND["qwen2"](tmp_path / "mllm")
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    config["layer_types"] = ["sliding_attention", "sliding_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="attends through a sliding window"):
        mllm.load(MLLMConfig(str(folder)))
