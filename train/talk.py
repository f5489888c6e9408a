"""Conversations -> groups of batches of similar length; the generated world -> conversations of the kinds asked for."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from data.address import draw
from data.batch import ChatBatch, ChatCollate, count_tokens
from data.loader import Data, Positions, World
from data.records import Conversation
from data.world.conversations import Shares, conversation
from model.prefix import DRAW_SYSTEM, Turn

SYMBOLS = ((0x2600, 0x27BF), (0x1F300, 0x1FAFF))  # code points whose Unicode names the tokenizer learns to spell
GREETING = ("You are a helpful assistant.", "Hello! What can you do? I look at pictures and answer questions.")


@dataclass(frozen=True)
class GroupCollate:
    """Conversation records -> `batches` batches, each of conversations about as long as each other."""

    chat: ChatCollate
    batches: int
    max_answers: int
    seed: int

    def check(self, record: Conversation) -> None:
        """BadSample where what is left of it after the cut cannot be read."""
        self.chat.check(self._cut(record))

    def __call__(self, records: Sequence[Conversation], indices: Sequence[int]) -> list[ChatBatch]:
        cut = [self._cut(record) for record in records]
        order, size = list(range(len(cut))), len(cut) // self.batches
        if self.batches > 1:
            order.sort(key=[self._length(record) for record in cut].__getitem__)
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        parts.sort(key=lambda part: draw(self.seed, "group", min(indices[row] for row in part)))  # short ones not first
        return [self.chat([cut[row] for row in part], [indices[row] for row in part]) for part in parts]

    def _cut(self, record: Conversation) -> Conversation:
        answers = [place for place, turn in enumerate(record.turns) if turn.role == "assistant"]
        end = answers[: self.max_answers][-1] + 1
        return replace(record, turns=record.turns[:end])

    def _length(self, record: Conversation) -> int:
        """Near the number of its tokens: those of its texts, six around a turn, 18 in a small image with its marks."""
        return sum(count_tokens(turn.text, self.chat.builder) + 6 + 18 * len(turn.images) for turn in record.turns)


class Talk(Positions[list[ChatBatch]]):
    """Groups of batches of generated conversations in given shares."""

    def __init__(self, world: World, shares: Shares, collate: GroupCollate, rows: range, data: Data) -> None:
        super().__init__(rows, data.workers)
        self._world, self._shares, self._collate, self._size = world, shares, collate, data.image_size

    def fingerprint(self) -> str:
        """sha256 of what decides what is said, and in which batches."""
        said = self._world, self._shares, self._size, self._collate.batches, self._collate.max_answers, self._collate.seed
        return sha256(repr(said).encode()).hexdigest()

    def __getitem__(self, position: int) -> list[ChatBatch]:
        numbers = self.numbers(position)
        return self._collate([Conversation(str(number), self._turns(number)) for number in numbers], numbers)

    def _turns(self, number: int) -> tuple[Turn, ...]:
        return conversation(self._world.seed, number, self._world.split, size=self._size, shares=self._shares)


def training_text(conversations: int) -> Iterator[str]:
    """What the tokenizer of a fresh model should spell well: the world's words, the names of emoji, common courtesies."""
    for index in range(conversations):
        yield from (turn.text for turn in conversation(1, index, size=8))
    for first, last in SYMBOLS:
        yield from (name.lower() for code in range(first, last) if (name := unicodedata.name(chr(code), "")))
    yield from (DRAW_SYSTEM, *GREETING) * 20


def only_world(data: Data, otherwise: str) -> World:
    """The one source, a generated world. Raises ValueError, saying `otherwise`, when there are others."""
    if len(data.sources) != 1 or not isinstance(data.sources[0], World):
        raise ValueError(otherwise)
    return data.sources[0]
