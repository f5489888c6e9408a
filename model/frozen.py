"""What every frozen multimodal LLM offers: prefix + queries -> states [B, Q, D]; prefix -> a reply.

The queries come last under a causal mask, so nothing before them depends on them: the prefix runs once without a graph
into a key/value cache, and only the queries run with one. Letters: B batch, P prefix tokens, Q queries, D width, V
vocabulary."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.prefix import Prefix, PrefixBuilder


@dataclass(frozen=True)
class MLLMConfig:
    """Which model: a folder in the hub's layout, or a hub id at a revision."""

    path: str
    revision: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


@dataclass(frozen=True)
class Prefilled:
    """A prefix the model has read. Nothing grows it: every read and reply works on its own view of the cache."""

    layers: tuple[tuple[Tensor, Tensor], ...]  # keys, values [B, heads, P, D / heads] of each layer
    mask: Tensor  # [B, P] bool
    next_positions: Tensor  # [B] long: where the next token stands
    states: Tensor  # [B, P, D] after the last norm

    @property
    def batch_size(self) -> int:
        return self.mask.shape[0]

    def select(self, rows: Sequence[int]) -> "Prefilled":
        """These rows, in this order; a row named n times serves n images."""
        index = torch.tensor(list(rows), device=self.mask.device)
        return Prefilled(
            layers=tuple((keys[index], values[index]) for keys, values in self.layers),
            mask=self.mask[index],
            next_positions=self.next_positions[index],
            states=self.states[index],
        )

    def last_states(self, count: int) -> Tensor:
        """States of the last `count` prefix tokens, [B, count, D]; zero where a row is shorter."""
        states = self.states * self.mask.unsqueeze(-1)  # [B, P, D]
        missing = max(0, count - states.shape[1])
        return F.pad(states, (0, 0, missing, 0))[:, -count:]


class FrozenMLLM(Protocol):
    """An MLLM that is read and talked to, never trained."""

    config: MLLMConfig
    builder: PrefixBuilder
    width: int  # D
    context: int  # the longest sequence that it was made for, in tokens
    embedding_std: float  # of its token embeddings; queries start like them
    prefills: int  # how often a prefix was read, for tests and reports

    @property
    def device(self) -> torch.device: ...

    def to(self, device: torch.device | str) -> "FrozenMLLM":
        """Move in place; returns itself."""
        ...

    def prefill(self, prefix: Prefix) -> Prefilled:
        """Read the prefix without a graph."""
        ...

    def read(self, prefix: Prefix | Prefilled, queries: Tensor) -> Tensor:
        """What the model makes of queries [Q, D] after the prefix: [B, Q, D]; the graph reaches the queries only."""
        ...

    def read_full(self, prefix: Prefix, queries: Tensor) -> Tensor:
        """The same states and gradients by one pass over everything with a graph: slower, the reference."""
        ...

    def reply(
        self, prefix: Prefix | Prefilled, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """Stream the answer to a prefix of one row in pieces of text; temperature 0 takes the likeliest token."""
        ...

    def answers(self, prefix: Prefix | Prefilled, max_new_tokens: int = 256) -> list[str]:
        """The likeliest answer of every row, whole."""
        ...

    def logits(self, prefix: Prefix) -> Tensor:
        """[B, P, V], as the stock model computes them."""
        ...

    def fingerprint(self) -> str:
        """sha256 over all tensors."""
        ...
