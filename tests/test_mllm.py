import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, DynamicCache

from model import mllm
from model.assets import fingerprint, tensors_of
from model.mllm import MLLMConfig
from model.prefix import Turn
from model.qwen import Qwen2_5_VL
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.mllm_folder(tmp_path_factory.mktemp("mllm") / "mllm")


@pytest.fixture(scope="module")
def model(folder):
    return mllm.load(MLLMConfig(str(folder), dtype="float32"))


@pytest.fixture(scope="module")
def prefix(model):
    return model.builder(tiny.conversations())


@pytest.fixture
def queries():
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()


def gradient(states, queries):
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    loss = (states * weights).sum() + states.square().mean()
    return loss, torch.autograd.grad(loss, queries, retain_graph=True)[0]


def close(a, b, relative=1e-5):
    return float((a - b).detach().abs().max()) <= relative * float(b.detach().abs().max())


def test_reading_through_the_cache_equals_the_full_graph(model, prefix, queries):
    """Left padding, mixed lengths, no image, one and two of different sizes."""
    cached, full = model.read(prefix, queries), model.read_full(prefix, queries)
    assert close(cached, full)
    (loss, by_cache), (reference, by_graph) = gradient(cached, queries), gradient(full, queries)
    assert close(loss, reference)
    assert close(by_cache, by_graph)


def test_the_queries_see_the_prompt_and_each_other(model, prefix, queries):
    states = model.read(prefix, queries)
    other = model.read(model.builder([[Turn("user", "a blue circle")]]), queries)
    assert not close(states[:1], other, relative=1e-2)
    changed = queries.detach().clone()
    changed[0] += 1
    assert not close(model.read(prefix, changed)[:, 1:], states[:, 1:], relative=1e-2)


def test_padding_and_company_change_nothing(model, prefix, queries):
    together = model.read(prefix, queries)
    for row, turns in enumerate(tiny.conversations()):
        alone = model.read(model.builder([turns]), queries)
        assert close(together[row], alone[0])
        assert close(gradient(together[row], queries)[1], gradient(alone[0], queries)[1])


def test_one_prefill_serves_many_reads_and_stays_as_it_is(model, prefix, queries):
    count = model.prefills
    known = model.prefill(prefix)
    before = [tensor.clone() for layer in known.layers for tensor in layer]
    first, second = model.read(known, queries), model.read(known, queries)
    rows = known.select([1, 1, 0])
    third = model.read(rows, queries)
    list(model.reply(known.select([0]), max_new_tokens=4))
    assert model.prefills == count + 1
    assert torch.equal(first, second)
    assert close(third, first[[1, 1, 0]])
    after = [tensor for layer in known.layers for tensor in layer]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_frozen_queries_leave_no_graph(model, prefix, queries):
    assert not model.read(prefix, queries.detach()).requires_grad
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert not any(module.training for module in model.model.modules())


def test_autocast_outside_changes_nothing(model, prefix, queries):
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.read(prefix, queries)
    assert torch.equal(inside, model.read(prefix, queries))


def test_reads_in_bfloat16(folder, prefix, queries):
    states = mllm.load(MLLMConfig(str(folder))).read(prefix, queries)
    assert states.dtype == torch.bfloat16
    assert gradient(states.float(), queries)[1].dtype == torch.float32


def test_logits_are_those_of_the_stock_model(model, folder, prefix):
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = stock(
            input_ids=prefix.ids,
            attention_mask=prefix.mask.long(),
            **prefix.images,
            mm_token_type_ids=(prefix.ids == model.builder.image_id).int(),
        ).logits
    assert torch.equal(model.logits(prefix), expected)


def test_the_reply_is_that_of_repeated_whole_passes(model):
    for row in range(3):
        prefix = model.builder([tiny.conversations()[row]])
        ids, said = prefix.ids, []
        for step in range(6):  # everything again for each token, no cache
            positions = torch.cat(
                [prefix.positions, (prefix.positions.max() + 1 + torch.arange(step)).expand(3, 1, -1)], dim=-1
            )
            with torch.no_grad():
                logits = model.model(
                    input_ids=ids,
                    position_ids=positions,
                    **prefix.images,
                    use_cache=False,
                ).logits
            token = int(logits[0, -1].argmax())
            if token == model.builder.tokenizer.eos_token_id:
                break
            said.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        expected = model.builder.tokenizer.decode(said, skip_special_tokens=True)
        assert "".join(model.reply(prefix, max_new_tokens=6)) == expected


def test_the_reply_equals_generate(model, prefix):
    for row in range(3):
        one = model.builder([tiny.conversations()[row]])
        types = (one.ids == model.builder.image_id).int()
        ids = model.model.generate(
            input_ids=one.ids,
            attention_mask=one.mask.long(),
            mm_token_type_ids=types,
            max_new_tokens=6,
            do_sample=False,
            **one.images,
        )
        expected = model.builder.tokenizer.decode(ids[0, one.ids.shape[1] :], skip_special_tokens=True)
        assert "".join(model.reply(one, max_new_tokens=6)) == expected
        assert model.answers(prefix, max_new_tokens=6)[row] == expected


def test_a_sampled_reply_is_a_function_of_its_seed(model, prefix):
    known = model.prefill(prefix).select([0])
    replies = [list(model.reply(known, 8, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert replies[0] == replies[1] != replies[2]


def test_a_batch_is_not_streamed(model, prefix):
    with pytest.raises(ValueError, match="answers"):
        next(model.reply(prefix))


def test_the_fingerprint_sees_every_tensor(model, folder):
    before = model.fingerprint()
    assert mllm.load(MLLMConfig(str(folder), dtype="float32")).fingerprint() == before
    other = mllm.load(MLLMConfig(str(folder), dtype="float32"))
    assert isinstance(other, Qwen2_5_VL)
    with torch.no_grad():
        other.model.model.visual.blocks[0].norm1.weight[0] += 1e-6
    assert other.fingerprint() != before
    assert fingerprint(tensors_of(model.model)) == before


def test_last_states_are_zero_where_the_prompt_is_shorter(model, prefix):
    known = model.prefill(prefix)
    states = known.last_states(100)
    assert states.shape == (3, 100, 32)
    assert (states[0, : 100 - int(prefix.mask[0].sum())] == 0).all()
    assert torch.equal(states[:, -5:], known.states[:, -5:])


def test_what_cannot_be_loaded_says_so(tmp_path):
    with pytest.raises(ValueError, match="make assets"):
        mllm.load(MLLMConfig("assets/nowhere/mllm"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="is a gpt2; supported are qwen2_5_vl"):
        mllm.load(MLLMConfig(str(tmp_path)))


def test_damaged_weights_are_refused_in_a_sentence(folder, tmp_path):
    broken = Path(shutil.copytree(folder, tmp_path / "mllm"))
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        mllm.load(MLLMConfig(str(broken)))


def test_the_library_cache_still_grows_by_concatenation():
    """`FrozenMLLM._cache` relies on it: an update must not write into the tensors it was given."""
    cache, keys = DynamicCache(), torch.ones(1, 1, 2, 4)
    cache.update(keys, keys, 0)
    grown, _ = cache.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), 0)
    assert grown.data_ptr() != keys.data_ptr()
    assert grown.shape[2] == 3
