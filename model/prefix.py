"""Conversations (text + images) -> Prefix: the ids, positions and image tensors that a frozen MLLM reads.

The model's own chat template frames the turns. What users wrote is encoded apart from the frame, as plain text: a
`<|im_end|>` in a prompt cannot end the turn. Letters: B batch, P prefix tokens."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

DRAW_SYSTEM = "Draw the image that the user describes."
THINK = "Plan the picture first: what is in it, and where."
DATE = "26 Jul 2024"  # Llama 3 tells the date, and would tell today's: a prefix must not depend on when it is read
IGNORED = -100  # the target of a token that no loss looks at

Positions = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(ids [B, P], mask [B, P], image tensors) -> positions [B, P], or [3, B, P] for models with three axes."""


@dataclass(frozen=True)
class Turn:
    """One message; its images come before its text."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True, eq=False)
class Seen:
    """What a model is given of one image."""

    tokens: list[int]  # in place of its mark
    tensors: dict[str, Tensor]  # by the model's own argument names; those of many images are joined on the first axis


def digest_of(image: Image.Image) -> bytes:
    """The same for the same pixels, and no other."""
    return hashlib.blake2b(f"{image.mode}{image.size}".encode() + image.tobytes()).digest()


class ImageReader(Protocol):
    """What turns images into tokens and tensors, the way that a family of models wants them."""

    image_id: int
    """The token that the rendered template has for an image, and that the model fills in with what it saw."""
    single_differs: bool
    """Whether the only image of a conversation is read differently from one of several."""

    def __call__(self, image: Image.Image, alone: bool) -> Seen:
        """Read one image; `alone`: it is the only one of its conversation."""
        ...


@dataclass(frozen=True)
class Prefix:
    """What an MLLM reads, padded on the left so that every row ends at the same column."""

    ids: Tensor  # [B, P] long
    mask: Tensor  # [B, P] bool, False on padding
    positions: Tensor  # [3, B, P] long (time, height, width), or [B, P] for models with one axis
    images: Mapping[str, Tensor] = field(default_factory=dict)  # by the model's argument names, of all rows in order
    image_splits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # how much of the first axis is each row's
    lengths: tuple[int, ...] | None = None  # of each row in tokens, known here, where asking costs nothing; None: unknown
    head: tuple[int, ...] = ()  # the ids that every row begins with, where they are those of every prefix of this kind

    @property
    def batch_size(self) -> int:
        return self.ids.shape[0]

    @property
    def padded(self) -> bool:
        """Whether any row is, or may be."""
        return self.lengths is None or min(self.lengths) < self.ids.shape[1]

    def arguments(self) -> dict[str, Tensor]:
        """The prefix as the keyword arguments of a transformers model. Positions are explicit: some models would keep
        their own guess between calls."""
        mask = {"attention_mask": self.mask} if self.padded else {}  # a mask of ones would cost the fast attention
        return {"input_ids": self.ids, **mask, "position_ids": self.positions, **self.images}

    def to(self, device: torch.device | str) -> "Prefix":
        """The same prefix with its tensors on `device`."""
        return replace(
            self,
            ids=self.ids.to(device),
            mask=self.mask.to(device),
            positions=self.positions.to(device),
            images={name: tensor.to(device) for name, tensor in self.images.items()},
        )

    def select(self, rows: Sequence[int]) -> "Prefix":
        """The prefix of these rows, in this order; padding columns stay."""
        index = torch.tensor(list(rows), device=self.ids.device)
        parts = {name: tensor.split(self.image_splits[name]) for name, tensor in self.images.items()}
        held = [{name: part[row] for name, part in parts.items() if len(part[row])} for row in rows]
        images, splits = join([[each] if each else [] for each in held])
        lengths = self.lengths and tuple(self.lengths[row] for row in rows)
        return replace(
            self,
            ids=self.ids[index],
            mask=self.mask[index],
            positions=self.positions[..., index, :],
            images=images,
            image_splits=splits,
            lengths=lengths,
        )

    def trimmed(self) -> "Prefix":
        """Without the columns that are padding in every row."""
        width = self.ids.shape[1] if self.lengths is None else max(self.lengths)
        return replace(self, ids=self.ids[:, -width:], mask=self.mask[:, -width:], positions=self.positions[..., -width:])

    def without_head(self) -> "Prefix":
        """What follows the head in each row, padded on the left by as much as before."""
        count = len(self.head)
        return replace(
            self,
            ids=self.ids[:, count:],  # under the padding lies some of the head
            mask=self.mask[:, : self.mask.shape[1] - count],
            positions=self.positions[..., count:],
            lengths=self.lengths and tuple(length - count for length in self.lengths),
            head=(),
        )

    def after(self, count: int, seen: Sequence[Seen]) -> "Prefix":
        """Of a single row, what follows its first `count` tokens, and the images therein."""
        images, splits = join([[image.tensors for image in seen]])
        return replace(
            self,
            ids=self.ids[:, count:],
            mask=self.mask[:, count:],
            positions=self.positions[..., count:],
            images=images,
            image_splits=splits,
            lengths=(self.ids.shape[1] - count,),
            head=(),
        )


def join(rows: Sequence[Sequence[Mapping[str, Tensor]]]) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """The image tensors of many rows of any number of parts, joined on the first axis, and how much of it is each row's."""
    names = dict.fromkeys(name for row in rows for part in row for name in part)
    joined = {name: torch.cat([part[name] for row in rows for part in row]) for name in names}
    return joined, {name: tuple(sum(len(part[name]) for part in row) for row in rows) for name in names}


def running_positions(ids: Tensor, mask: Tensor, images: Mapping[str, Tensor]) -> Tensor:
    """[B, P]: tokens counted from 0, padding aside; for models whose positions have one axis."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@dataclass
class Row:
    """One conversation as token ids; `targets` repeats the ids that the assistant has to say."""

    ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    images: list[Seen] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # where the tokens of each image begin

    def add(self, ids: list[int], said: bool) -> None:
        self.ids += ids
        self.targets += ids if said else [IGNORED] * len(ids)

    def show(self, image: Seen) -> None:
        self.starts.append(len(self.ids))
        self.images.append(image)
        self.add(image.tokens, said=False)


class PrefixBuilder:
    """Makes prefixes for one MLLM from its tokenizer, chat template and image reader; holds no weights.

    `images` None: the model reads text alone. `template` None: the tokenizer's own."""

    def __init__(
        self,
        tokenizer: Any,
        images: ImageReader | None,
        positions: Positions = running_positions,
        template: str | None = None,
        max_text_tokens: int = 256,
    ):
        self.tokenizer = tokenizer
        self.images = images
        self.positions = positions
        self.template = template
        self.max_text_tokens = max_text_tokens
        self.image_id: int | None = None if images is None else images.image_id
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def __call__(self, conversations: Sequence[Sequence[Turn]]) -> Prefix:
        """One row per conversation. ValueError for a user text longer than `max_text_tokens` or a wrong image type."""
        return self._build(conversations, add_generation_prompt=True)[0]

    def draw(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]] | None = None) -> Prefix:
        """What is read to draw: the drawing instruction, then the prompt with the images to start from.

        The empty prompt without images is the unconditional branch of guidance."""
        images = images if images is not None else [()] * len(prompts)
        system = Turn("system", DRAW_SYSTEM)
        prefix = self([[system, Turn("user", p, tuple(i))] for p, i in zip(prompts, images, strict=True)])
        return replace(prefix, head=self.draw_head)

    def with_targets(self, conversations: Sequence[Sequence[Turn]]) -> tuple[Prefix, Tensor]:
        """Whole conversations to train on, and targets [B, P]: the ids of what the assistant says, its closing mark
        included, `IGNORED` elsewhere. Targets are not shifted."""
        return self._build(conversations, add_generation_prompt=False)

    @cached_property
    def draw_head(self) -> tuple[int, ...]:
        """The ids of the instruction to draw and the frame before it: encoded apart from what follows, so always these."""
        try:
            pieces = self._pieces([Turn("system", DRAW_SYSTEM), Turn("user", "")], add_generation_prompt=True)
        except ValueError:  # the template knows no system's turn: it can be talked to, and `draw` says why it cannot draw
            return ()
        first_text = next(number for number, _ in pieces if number is not None)
        if first_text != 0:  # the template has the system's turn elsewhere
            return ()
        return tuple(self._row([Turn("system", DRAW_SYSTEM)], iter([]), pieces[:2]).ids)

    def row(self, turns: Sequence[Turn], *, add_generation_prompt: bool = True) -> Row:
        """One conversation, not a batch yet; errors as `__call__`."""
        seen = self._see([image for turn in turns for image in turn.images])
        return self._row(turns, iter(seen), self._pieces(turns, add_generation_prompt))

    def batch(self, rows: Sequence[Row]) -> Prefix:
        """Rows as the prefix that a model reads."""
        return self._batch(rows)[0]

    def _build(self, conversations: Sequence[Sequence[Turn]], add_generation_prompt: bool) -> tuple[Prefix, Tensor]:
        return self._batch([self.row(turns, add_generation_prompt=add_generation_prompt) for turns in conversations])

    def _batch(self, rows: Sequence[Row]) -> tuple[Prefix, Tensor]:
        ids = self._pad([row.ids for row in rows], self.pad_id)  # [B, P]
        targets = self._pad([row.targets for row in rows], IGNORED)  # [B, P]
        mask = self._pad([[1] * len(row.ids) for row in rows], 0).bool()  # [B, P]
        images, splits = join([[image.tensors for image in row.images] for row in rows])
        lengths = tuple(len(row.ids) for row in rows)
        return Prefix(ids, mask, self.positions(ids, mask, images), images, splits, lengths), targets

    def _see(self, images: list[Image.Image]) -> list[Seen]:
        if not images:
            return []
        if self.images is None:
            raise ValueError("this MLLM reads text alone; leave the images out, or choose one that sees")
        for image in images:
            if not isinstance(image, Image.Image):
                raise ValueError(f"an image is a {type(image).__name__}; give a PIL image")
        return [self.images(image.convert("RGB"), alone=len(images) == 1) for image in images]

    def _row(self, turns: Sequence[Turn], images: Iterator[Seen], pieces: Sequence[tuple[int | None, str]]) -> Row:
        """Encode the frame and the texts apart; an image's mark in the frame becomes its tokens."""
        row = Row()
        closes = False  # whether the next piece of frame begins with the mark that ends an answer
        blanks = ""  # at the end of a frame: words are tokens with the blank before them
        for number, piece in pieces:
            if number is not None:
                row.add(self._encode_text(turns[number], blanks), said=turns[number].role == "assistant")
                closes = turns[number].role == "assistant"
                continue
            frame = self.tokenizer.encode(piece.rstrip(" "), add_special_tokens=False)
            blanks = piece[len(piece.rstrip(" ")) :]
            for place, token in enumerate(frame):
                if token == self.image_id:
                    row.show(next(images))
                else:
                    row.add([token], said=closes and place == 0)
            closes = False
        return row

    def _pieces(self, turns: Sequence[Turn], add_generation_prompt: bool) -> list[tuple[int | None, str]]:
        """The rendered template, cut where the texts go: (None, frame) and (turn number, "") in order."""
        messages = [
            {"role": turn.role, "content": self._content(turn, f"\ue000{number}\ue001")} for number, turn in enumerate(turns)
        ]
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                date_string=DATE,
            )
        except TemplateError as error:  # by which templates refuse roles, or an order of them
            raise ValueError(f"messages: {error}, says the model's chat template; give turns as it takes them") from error
        parts = re.split("\ue000(\\d+)\ue001", rendered)  # frame, number, frame, number, ..., frame
        return [(int(part), "") if place % 2 else (None, part) for place, part in enumerate(parts)]

    def _content(self, turn: Turn, text: str) -> str | list[dict[str, str]]:
        """A message as templates expect it: a list of parts where the model sees, else plain text."""
        if self.images is None:
            return text
        return [{"type": "image"} for _ in turn.images] + [{"type": "text", "text": text}]

    def encode(self, text: str) -> list[int]:
        """Tokens of what somebody wrote: marks of turns and pictures within it stay text."""
        cuts = [found.start() + 1 for found in self._marks.finditer(text)] if self._marks else []
        pieces = [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])]
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return [token for piece in pieces for token in self.tokenizer.encode(piece, **options)]

    @cached_property
    def _marks(self) -> re.Pattern[str] | None:
        """Finds where marks of turns and pictures begin that this tokenizer does not call special, and would not split."""
        template = str(self.template or self.tokenizer.chat_template)
        added = [(i, token) for i, token in self.tokenizer.added_tokens_decoder.items() if not token.special]
        marks = [re.escape(token.content) for i, token in added if i == self.image_id or token.content in template]
        return re.compile(f"(?={'|'.join(marks)})") if marks else None

    def _encode_text(self, turn: Turn, blanks: str) -> list[int]:
        try:
            turn.text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, as the shell's other encodings become
            raise ValueError(f"the text {turn.text[:40]!a} is not Unicode; give it in UTF-8") from error
        ids = self.encode(blanks + turn.text)
        if turn.role == "user" and len(ids) > self.max_text_tokens:
            alone = len(self.encode(turn.text))  # blanks of the template may be a token of their own
            if alone > self.max_text_tokens:
                said, limit = turn.text[:40], self.max_text_tokens
                raise ValueError(f"the prompt {said!r}... has {alone} tokens and the limit is {limit}; shorten it")
        return ids

    def _pad(self, rows: list[list[int]], value: int) -> Tensor:
        width = max(len(row) for row in rows)
        return torch.tensor([[value] * (width - len(row)) + row for row in rows], dtype=torch.long)
