"""Frozen multimodal LLMs: prefix + queries -> states [B, Q, D]; prefix -> a reply.

The queries come last under a causal mask, so nothing before them depends on them: the prefix runs once without a graph
into a key/value cache, and only the queries run with one. Whatever transformers' class it is, its `model` reads a prefix,
or goes on from a cache, and its `lm_head` names the next token; what differs between families is how a prefix is made
(model/mllm.py). Letters: B batch, P prefix tokens, Q queries, D width, V vocabulary."""

import inspect
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from model.assets import fingerprint, tensors_of
from model.prefilled import PASS_TOKENS, PASS_WORK, Prefilled, by_length, joined, looked_layers
from model.prefix import Prefix, PrefixBuilder


@dataclass(frozen=True)
class MLLMConfig:
    """Which model: a folder in the hub's layout, or a hub id at a revision."""

    path: str
    revision: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    min_pixels: int | None = None
    """Pictures of fewer pixels are enlarged, where the family knows such a bound; None: as the model's files say."""
    max_pixels: int | None = None
    """Pictures of more pixels are scaled down; each 28 x 28 pixels are a token in Qwen2.5-VL, 32 x 32 in Qwen3-VL."""
    vision_attention: str | None = None
    """How the vision tower attends, in transformers' words. flash_attention_2, where flash-attn is installed, takes all
    windows of Qwen2.5-VL's in one call; None (sdpa) takes one call each."""


@dataclass(frozen=True)
class Ended:
    """How a reply came to its end."""

    tokens: int
    """That were said."""
    whole: bool
    """By itself, not at the limit of tokens."""


class FrozenMLLM:
    """An MLLM that is read and talked to, never trained, over a transformers class with `model` and `lm_head`."""

    model_class: Any
    """Of transformers, whose `from_pretrained` loads what is wrapped here."""
    position_axes: int | None = None
    """Axes of the rotary positions; None: one, and positions are [B, P]."""

    def __init__(self, config: MLLMConfig, model: PreTrainedModel, builder: PrefixBuilder):
        self.config = config
        self.model: Any = model.eval().requires_grad_(False)  # Any: its annotations lag behind its signatures
        self.builder = builder
        self.prefills = 0  # how often a prefix was read, for tests and reports
        self._heads: dict[tuple[int, ...], Prefilled] = {}  # of each `Prefix.head` that was met
        self.width: int = self.model.get_input_embeddings().weight.shape[1]  # D
        self.context: int = self.model.config.get_text_config().max_position_embeddings  # its longest sequence, in tokens
        if any(DynamicCache(config=self.model.config.get_text_config()).is_sliding):
            raise ValueError(
                f"mllm.path {config.path!r} attends through a sliding window, which forgets the prompt; choose another"
            )
        self._ends = _end_ids(self.model.generation_config.eos_token_id, builder.tokenizer.eos_token_id)

    @cached_property
    def embedding_std(self) -> float:
        """Of the token embeddings; queries start like them."""
        return float(self.model.get_input_embeddings().weight[: 1 << 14].float().std())

    @property
    def seen_width(self) -> int:
        """Of what a connector may look at (`Looked.states`)."""
        text = self.model.config.get_text_config()
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return self.width + len(looked_layers(text.num_hidden_layers)) * text.num_key_value_heads * head

    @property
    def device(self) -> torch.device:
        """Where it computes; accelerate may keep its weights elsewhere until then."""
        if not hasattr(self.model, "_hf_hook"):
            return self.model.device
        hooks = (getattr(module, "_hf_hook", None) for module in self.model.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((device for device in devices if device is not None), self.model.device))

    def to(self, device: torch.device | str) -> "FrozenMLLM":
        """Move in place; returns itself."""
        self.model.to(device)
        self._heads.clear()
        return self

    @property
    def _pass_tokens(self) -> int:
        if self.device.type == "cpu":
            return PASS_TOKENS
        return max(PASS_TOKENS, int(PASS_WORK / sum(parameter.numel() for parameter in self.model.parameters())))

    @torch.no_grad()
    def prefill(self, prefix: Prefix) -> Prefilled:
        """Read the prefix without a graph: rows of like length together, what all of them begin with once per process."""
        self.prefills += 1
        prefix = prefix.to(self.device)
        groups = [[]] if prefix.lengths is None else by_length(prefix.lengths, self._pass_tokens)
        if len(groups) == 1:
            return self._prefill(prefix)
        return joined([self._prefill(prefix.select(rows).trimmed()) for rows in groups], groups)

    def read(self, prefix: Prefix | Prefilled, queries: Tensor) -> Tensor:
        """What the model makes of queries [Q, D] after the prefix: [B, Q, D]; the graph reaches the queries only."""
        known = prefix if isinstance(prefix, Prefilled) else self.prefill(prefix)
        batch, count = known.batch_size, queries.shape[0]
        embeds = queries.to(self.device, self.model.dtype).expand(batch, -1, -1)  # [B, Q, D]
        return self._continue(known, self._cache(known), embeds, _steps(known.next_positions, count))

    def read_full(self, prefix: Prefix, queries: Tensor) -> Tensor:
        """The same states and gradients by one pass over everything with a graph: slower, the reference."""
        prefix = prefix.to(self.device)
        batch, count = prefix.batch_size, queries.shape[0]
        given = self.arguments(prefix)
        tail = queries.to(self.device, self.model.dtype).expand(batch, -1, -1)  # [B, Q, D]
        embeds = torch.cat([self.model.get_input_embeddings()(given.pop("input_ids")), tail], dim=1)  # [B, P + Q, D]
        positions = self._on_axes(_steps(_ends_at(prefix) + 1, count))
        if prefix.padded:
            given["attention_mask"] = torch.cat([prefix.mask, prefix.mask.new_ones(batch, count)], dim=1)
        given["position_ids"] = torch.cat([prefix.positions, positions], dim=-1)
        with _own_dtype(self.device):  # without a cache, transformers would ask the device whether rows are packed
            states = self.model.model(inputs_embeds=embeds, **given, use_cache=True).last_hidden_state
        return states[:, -count:]

    def reply(
        self, prefix: Prefix | Prefilled, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> Generator[str, None, Ended]:
        """Stream the answer to a prefix of one row in pieces of text; temperature 0 takes the likeliest token."""
        if prefix.batch_size != 1:
            raise ValueError(f"reply streams one conversation, not {prefix.batch_size}; use answers for a batch")
        return (yield from self.speak(self.after(prefix), max_new_tokens, temperature, seed))

    def after(self, prefix: Prefix | Prefilled) -> "Tail":
        """Where tokens that are said will go; a Prefilled stays as it is."""
        known = prefix if isinstance(prefix, Prefilled) else self.prefill(prefix)
        return Tail(known, self._cache(known), [known.states[:, -1:]])

    def speak(self, tail: "Tail", max_new_tokens: int, temperature: float, seed: int) -> Generator[str, None, Ended]:
        """As `reply`; what was said is in the tail, also where nobody listens to the end."""
        ids: list[int] = []
        said, whole = "", False
        for token in self._generate(tail, max_new_tokens, temperature, seed):
            if int(token) in self._ends:
                whole = True
                break
            ids.append(int(token))
            text = self._decode(ids)
            if not self._unfinished(text, ids[-1]):
                yield text[len(said) :]
                said = text
        rest = self._decode(ids)[len(said) :]
        if rest:
            yield rest
        return Ended(len(ids), whole)

    def answers(self, prefix: Prefix | Prefilled, max_new_tokens: int = 256) -> list[str]:
        """The likeliest answer of every row, whole."""
        columns = list(self._generate(self.after(prefix), max_new_tokens, 0.0, 0))
        rows = torch.stack(columns, dim=1).tolist()  # [B, tokens]
        kept = [row[: next((n for n, token in enumerate(row) if token in self._ends), len(row))] for row in rows]
        return [self._decode(row) for row in kept]

    @torch.no_grad()
    def extend(self, known: Prefilled, rest: Prefix) -> Prefilled:
        """Read on: `known` holds the beginning of each row, and `rest` what follows, at its positions in the whole. `known`
        stays as it is."""
        self.prefills += 1
        return self._extend(known, rest.to(self.device))

    @torch.no_grad()
    def logits(self, prefix: Prefix) -> Tensor:
        """[B, P, V], as the stock model computes them."""
        with _own_dtype(self.device):
            return self.model(**self.arguments(prefix.to(self.device)), use_cache=False).logits

    def fingerprint(self) -> str:
        """sha256 over all tensors."""
        return fingerprint(tensors_of(self.model))

    def arguments(self, prefix: Prefix) -> dict[str, Tensor]:
        """The prefix as the keyword arguments of this family's class."""
        return prefix.arguments()

    def _prefill(self, prefix: Prefix) -> Prefilled:
        self._fetch()
        head = self._head(prefix)
        if head is None:
            return self._extend(None, prefix)
        return self._extend(head.repeated(prefix.batch_size), prefix.without_head())

    def _extend(self, known: Prefilled | None, rest: Prefix) -> Prefilled:
        given, cache, mask, padded = self.arguments(rest), self._cache(known), rest.mask, rest.padded
        if known is not None:
            mask, padded = torch.cat([known.mask, rest.mask], dim=1), known.padded or rest.padded
            if padded:
                given["attention_mask"] = mask
        with _own_dtype(self.device):
            states = self.model.model(**given, **_growing(self.model.model, cache)).last_hidden_state
        image_id = self.builder.image_id
        pictures = rest.mask & (rest.ids == (-1 if image_id is None else image_id))  # [B, P]
        return Prefilled(
            layers=_layers(cache),
            mask=mask,
            next_positions=_ends_at(rest) + 1,
            states=states if known is None else torch.cat([known.states, states], dim=1),
            pictures=pictures if known is None else torch.cat([known.pictures, pictures], dim=1),
            padded=padded,
        )

    def _head(self, prefix: Prefix) -> Prefilled | None:
        """What every row of the prefix begins with, read when it is first met; None where nothing is known of it."""
        if not prefix.head:
            return None
        if prefix.head not in self._heads:
            ids = torch.tensor([prefix.head], device=self.device)
            positions = _steps(ids.new_zeros(1), len(prefix.head))
            mask = torch.ones_like(ids, dtype=torch.bool)
            self._heads[prefix.head] = self._prefill(
                Prefix(ids, mask, self._on_axes(positions), lengths=(len(prefix.head),))
            )
        return self._heads[prefix.head]

    @torch.no_grad()
    def _generate(self, tail: "Tail", max_new_tokens: int, temperature: float, seed: int) -> Iterator[Tensor]:
        """Token ids [B], one column at a time, until every row has ended; the tail grows by all but the last."""
        known, random = tail.known, torch.Generator().manual_seed(seed)
        ended = torch.zeros(known.batch_size, dtype=torch.bool)
        for count in range(1, max_new_tokens + 1):
            with _own_dtype(self.device):
                scores = self.model.lm_head(tail.states[-1])[:, 0].float().cpu()  # [B, V]
            token = _pick(scores, temperature, random)  # [B]
            yield token
            ended |= torch.isin(token, torch.tensor(sorted(self._ends)))
            if bool(ended.all()) or count == max_new_tokens:
                return
            embeds = self.model.get_input_embeddings()(token.to(self.device)[:, None])  # [B, 1, D]
            tail.states.append(self._continue(known, tail.cache, embeds, tail.next_positions[:, None]))
            tail.ids.append(token)

    def _continue(self, known: Prefilled, cache: DynamicCache, embeds: Tensor, positions: Tensor) -> Tensor:
        """States [B, Q, D] of embeds [B, Q, D] at positions [B, Q] that follow what `cache` holds."""
        self._fetch()
        mask = None
        if known.padded:
            seen = cache.get_seq_length() - known.mask.shape[1] + embeds.shape[1]  # tokens after the prefix
            mask = torch.cat([known.mask, known.mask.new_ones(known.batch_size, seen)], dim=1)
        with _own_dtype(self.device):
            decoder = self.model.get_decoder()
            out = decoder(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=self._on_axes(positions),
                **_growing(decoder, cache),
            )
        return out.last_hidden_state

    def _fetch(self) -> None:
        """Weights that accelerate keeps elsewhere come when `forward` is called, which it never is here."""
        hook = getattr(self.model, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self.model)

    def _on_axes(self, positions: Tensor) -> Tensor:
        """Positions [B, Q] of text as this model takes them: the same on every axis."""
        return positions if self.position_axes is None else positions.expand(self.position_axes, -1, -1)

    def _cache(self, known: Prefilled | None = None) -> Any:
        """A cache that starts with the prefilled tensors (or empty) and grows by concatenation, which leaves them alone."""
        cache = DynamicCache(config=self.model.config.get_text_config())
        layers: list[Any] = cache.layers
        for layer, (keys, values) in zip(layers, known.layers if known is not None else (), strict=known is not None):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return cache

    def _unfinished(self, text: str, last: int) -> bool:
        """Whether the next token can still change the end of `text`: bytes of a character that is not whole yet."""
        token = self.builder.tokenizer.convert_ids_to_tokens(last) or ""  # a model may have more than its tokenizer knows
        return text.endswith("�") or (token.startswith("<0x") and token.endswith(">"))

    def _decode(self, ids: list[int]) -> str:
        return self.builder.tokenizer.decode(ids, skip_special_tokens=True)


@dataclass
class Tail:
    """What was said after a prefix, token by token, on a view of its cache."""

    known: Prefilled
    cache: Any
    states: list[Tensor]  # each [B, 1, D], first that of the prefix's last token
    ids: list[Tensor] = field(default_factory=list)  # each [B]

    @property
    def next_positions(self) -> Tensor:
        """[B]: where the next token stands."""
        return self.known.next_positions + len(self.ids)

    def prefilled(self) -> Prefilled:
        """The prefix and what was said, as if all of it had been read; whole even where a token was broken off."""
        known, count = self.known, len(self.ids)
        length, said = known.mask.shape[1] + count, known.mask.new_ones(known.batch_size, count)
        return Prefilled(
            layers=tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in _layers(self.cache)),
            mask=torch.cat([known.mask, said], dim=1),
            next_positions=self.next_positions,
            states=torch.cat([known.states, *self.states[1 : 1 + count]], dim=1),
            pictures=torch.cat([known.pictures, ~said], dim=1),
            padded=known.padded,
        )


def _layers(cache: Any) -> tuple[tuple[Tensor, Tensor], ...]:
    """Keys and values of each layer."""
    return tuple((layer.keys, layer.values) for layer in cache.layers)


def _growing(module: Any, cache: DynamicCache) -> dict[str, Any]:
    """The arguments that have a module of transformers read on from `cache` and add to it. Their name changed in 5.24."""
    return {"cache" if _names_cache(type(module)) else "past_key_values": cache, "use_cache": True}


@lru_cache
def _names_cache(kind: type) -> bool:
    return "cache" in inspect.signature(kind.forward).parameters


def _own_dtype(device: torch.device) -> Any:
    """The frozen model computes in its own dtype, in training as in chat, whatever autocast surrounds it."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _ends_at(prefix: Prefix) -> Tensor:
    """[B]: the highest position of each row, over all axes."""
    return prefix.positions.reshape(-1, *prefix.ids.shape).amax(dim=(0, 2))


def _steps(start: Tensor, count: int) -> Tensor:
    """Positions [B, count] from start [B] on."""
    return start[:, None] + torch.arange(count, device=start.device)


def _pick(scores: Tensor, temperature: float, random: torch.Generator) -> Tensor:
    if temperature <= 0:
        return scores.argmax(dim=-1)
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature  # less the maximum: small temperatures overflow
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=random)[:, 0]


def _end_ids(*ids: int | list[int] | None) -> frozenset[int]:
    """Every id that ends an answer: the generation config has one, several or none."""
    flat = [i for item in ids for i in (item if isinstance(item, list) else [item])]
    return frozenset(i for i in flat if i is not None)
