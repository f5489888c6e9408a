"""Qwen2.5-VL as a frozen MLLM, over transformers' class. Letters as in model/frozen.py."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DynamicCache,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2VLImageProcessorPil,
)

from model.assets import fingerprint, tensors_of
from model.frozen import MLLMConfig, Prefilled
from model.hub import from_pretrained
from model.prefix import Prefix, PrefixBuilder


class Qwen2_5_VL:
    """Qwen2.5-VL (Bai et al. 2025) of any size, over transformers' class."""

    model_class = Qwen2_5_VLForConditionalGeneration

    def __init__(self, config: MLLMConfig, model: Qwen2_5_VLForConditionalGeneration, builder: PrefixBuilder):
        self.config = config
        self.model: Any = model.eval().requires_grad_(False)  # Any: its annotations lag behind its signatures
        self.builder = builder
        self.prefills = 0
        embeddings = self.model.get_input_embeddings().weight  # [V, D]
        self.width: int = embeddings.shape[1]
        self.context: int = self.model.config.text_config.max_position_embeddings
        self.embedding_std = float(embeddings[: 1 << 14].float().std())
        self._ends = _end_ids(self.model.generation_config.eos_token_id, builder.tokenizer.eos_token_id)

    @staticmethod
    def make_builder(config: MLLMConfig) -> PrefixBuilder:
        tokenizer = from_pretrained(AutoTokenizer, config)
        processor = from_pretrained(Qwen2VLImageProcessorPil, config)
        model_config = cast(Qwen2_5_VLConfig, from_pretrained(AutoConfig, config))
        return PrefixBuilder(tokenizer, processor, QwenRopeIndex(model_config))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: torch.device | str) -> "Qwen2_5_VL":
        self.model.to(device)
        return self

    @torch.no_grad()
    def prefill(self, prefix: Prefix) -> Prefilled:
        self.prefills += 1
        with _own_dtype(self.device):
            out = self.model.model(**arguments(prefix.to(self.device)), use_cache=True)
        next_positions = prefix.positions.amax(dim=(0, 2))  # [B], over the axes of [3, B, P]
        return Prefilled(
            layers=tuple((layer.keys, layer.values) for layer in out.past_key_values.layers),
            mask=prefix.mask.to(self.device),
            next_positions=next_positions.to(self.device) + 1,
            states=out.last_hidden_state,
        )

    def read(self, prefix: Prefix | Prefilled, queries: Tensor) -> Tensor:
        known = prefix if isinstance(prefix, Prefilled) else self.prefill(prefix)
        batch, count = known.batch_size, queries.shape[0]
        embeds = queries.to(self.device, self.model.dtype).expand(batch, -1, -1)  # [B, Q, D]
        return self._continue(known, self._cache(known), embeds, _steps(known, count))

    def read_full(self, prefix: Prefix, queries: Tensor) -> Tensor:
        prefix = prefix.to(self.device)
        batch, count = prefix.batch_size, queries.shape[0]
        given = arguments(prefix)
        ids, pixels = given.pop("input_ids"), given.pop("pixel_values")
        grids = given.pop("image_grid_thw")
        embeds = self.model.get_input_embeddings()(ids)  # [B, P, D]
        with _own_dtype(self.device):
            if pixels is not None:
                features = torch.cat(self.model.get_image_features(pixels, grids, return_dict=True).pooler_output)
                places = (ids == self.builder.image_id).unsqueeze(-1).expand_as(embeds)
                embeds = embeds.masked_scatter(places, features.to(embeds.dtype))
            tail = queries.to(self.device, self.model.dtype).expand(batch, -1, -1)  # [B, Q, D]
            start = prefix.positions.amax(dim=(0, 2)) + 1  # [B]
            steps = (start[:, None] + torch.arange(count, device=self.device)).expand(3, -1, -1)  # [3, B, Q]
            out = self.model.model.language_model(
                inputs_embeds=torch.cat([embeds, tail], dim=1),
                attention_mask=torch.cat([prefix.mask, prefix.mask.new_ones(batch, count)], dim=1),
                position_ids=torch.cat([prefix.positions, steps], dim=-1),
                use_cache=False,
            )
        return out.last_hidden_state[:, -count:]

    def reply(
        self, prefix: Prefix | Prefilled, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        if prefix.batch_size != 1:
            raise ValueError(f"reply streams one conversation, not {prefix.batch_size}; use answers for a batch")
        ids: list[int] = []
        said = ""
        for token in self._generate(prefix, max_new_tokens, temperature, seed):
            if int(token) in self._ends:
                break
            ids.append(int(token))
            text = self._decode(ids)
            if not self._unfinished(text, ids[-1]):
                yield text[len(said) :]
                said = text
        rest = self._decode(ids)[len(said) :]
        if rest:
            yield rest

    def answers(self, prefix: Prefix | Prefilled, max_new_tokens: int = 256) -> list[str]:
        columns = list(self._generate(prefix, max_new_tokens, 0.0, 0))
        rows = torch.stack(columns, dim=1).tolist()  # [B, tokens]
        kept = [row[: next((n for n, token in enumerate(row) if token in self._ends), len(row))] for row in rows]
        return [self._decode(row) for row in kept]

    @torch.no_grad()
    def logits(self, prefix: Prefix) -> Tensor:
        with _own_dtype(self.device):
            return self.model(**arguments(prefix.to(self.device)), use_cache=False).logits

    def fingerprint(self) -> str:
        return fingerprint(tensors_of(self.model))

    @torch.no_grad()
    def _generate(self, prefix: Prefix | Prefilled, max_new_tokens: int, temperature: float, seed: int) -> Iterator[Tensor]:
        """Token ids [B], one column at a time, until every row has ended; the cache of a Prefilled stays as it is."""
        known = prefix if isinstance(prefix, Prefilled) else self.prefill(prefix)
        cache, random = self._cache(known), torch.Generator().manual_seed(seed)
        state, ended = known.states[:, -1:], torch.zeros(known.batch_size, dtype=torch.bool)
        for count in range(1, max_new_tokens + 1):
            with _own_dtype(self.device):
                scores = self.model.lm_head(state)[:, 0].float().cpu()  # [B, V]
            token = _pick(scores, temperature, random)  # [B]
            yield token
            ended |= torch.isin(token, torch.tensor(sorted(self._ends)))
            if bool(ended.all()) or count == max_new_tokens:
                return
            embeds = self.model.get_input_embeddings()(token.to(self.device)[:, None])  # [B, 1, D]
            state = self._continue(known, cache, embeds, _steps(known, count)[..., -1:])

    def _continue(self, known: Prefilled, cache: DynamicCache, embeds: Tensor, positions: Tensor) -> Tensor:
        """States [B, Q, D] of embeds [B, Q, D] that follow what `cache` holds."""
        seen = cache.get_seq_length() - known.mask.shape[1] + embeds.shape[1]  # tokens after the prefix
        with _own_dtype(self.device):
            out = self.model.model.language_model(
                inputs_embeds=embeds,
                attention_mask=torch.cat([known.mask, known.mask.new_ones(known.batch_size, seen)], dim=1),
                position_ids=positions.expand(3, -1, -1),
                past_key_values=cache,
                use_cache=True,
            )
        return out.last_hidden_state

    def _cache(self, known: Prefilled) -> DynamicCache:
        """A cache that starts with the prefilled tensors and grows by concatenation, which leaves them alone."""
        cache = DynamicCache(config=self.model.config.get_text_config())
        assert not any(cache.is_sliding), "a sliding window would forget the start of the prefix"
        layers: list[Any] = cache.layers
        for layer, (keys, values) in zip(layers, known.layers, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return cache

    def _unfinished(self, text: str, last: int) -> bool:
        """Whether the next token can still change the end of `text`: bytes of a character that is not whole yet."""
        token = self.builder.tokenizer.convert_ids_to_tokens(last)
        return text.endswith("�") or (token.startswith("<0x") and token.endswith(">"))

    def _decode(self, ids: list[int]) -> str:
        return self.builder.tokenizer.decode(ids, skip_special_tokens=True)


class QwenRopeIndex:
    """Multimodal rotary positions by transformers' own rule, without a model: the rule reads only the config."""

    get_rope_index = Qwen2_5_VLModel.get_rope_index
    get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids

    def __init__(self, config: Qwen2_5_VLConfig):
        self.config = config

    def __call__(self, ids: Tensor, image_tokens: Tensor, grids: Tensor | None, mask: Tensor) -> Tensor:
        """See `RopeIndex`; positions [3, B, P]."""
        rule = cast(Any, self).get_rope_index  # without the token types images would silently get 1-D positions
        return rule(ids, mm_token_type_ids=image_tokens, image_grid_thw=grids, attention_mask=mask)[0]


def arguments(prefix: Prefix) -> dict[str, Tensor | None]:
    """The prefix as the keyword arguments of transformers' Qwen2.5-VL. Positions are explicit: the model would keep
    its own guess between calls."""
    return {
        "input_ids": prefix.ids,
        "attention_mask": prefix.mask,
        "position_ids": prefix.positions,
        "pixel_values": prefix.pixels,
        "image_grid_thw": prefix.grids,
    }


def _own_dtype(device: torch.device) -> Any:
    """The frozen model computes in its own dtype, in training as in chat, whatever autocast surrounds it."""
    return torch.autocast(device.type, enabled=False)


def _steps(known: Prefilled, count: int) -> Tensor:
    """Positions [B, count] of the tokens that follow the prefix."""
    return known.next_positions[:, None] + torch.arange(count, device=known.mask.device)


def _pick(scores: Tensor, temperature: float, random: torch.Generator) -> Tensor:
    if temperature <= 0:
        return scores.argmax(dim=-1)
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature  # less the maximum: small temperatures overflow
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=random)[:, 0]


def _end_ids(*ids: int | list[int] | None) -> frozenset[int]:
    """Every id that ends an answer: the generation config has one, several or none."""
    flat = [i for item in ids for i in (item if isinstance(item, list) else [item])]
    return frozenset(i for i in flat if i is not None)
