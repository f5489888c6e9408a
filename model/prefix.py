"""Conversations (text + images) -> Prefix: the ids, positions and image patches that a frozen MLLM reads.

The model's own chat template frames the turns. What users wrote is encoded apart from the frame, as plain text: a
`<|im_end|>` in a prompt cannot end the turn. Letters: B batch, P prefix tokens."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

DRAW_SYSTEM = "Draw the image that the user describes."
IGNORED = -100  # the target of a token that no loss looks at

RopeIndex = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
"""(ids [B, P], image tokens [B, P] 0 or 1, grids [images, 3], mask [B, P]) -> positions [3, B, P]."""


@dataclass(frozen=True)
class Turn:
    """One message; its images come before its text."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Prefix:
    """What an MLLM reads, padded on the left so that every row ends at the same column."""

    ids: Tensor  # [B, P] long
    mask: Tensor  # [B, P] bool, False on padding
    positions: Tensor  # [3, B, P] long (time, height, width), or [B, P] for models with one axis
    pixels: Tensor | None = None  # [patches, patch_dim], all images of all rows in order
    grids: Tensor | None = None  # [images, 3] long: patches along time, height, width
    images_per_row: tuple[int, ...] = ()  # how many of `grids` belong to each row; empty when there are none

    @property
    def batch_size(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> "Prefix":
        """The same prefix with its tensors on `device`."""
        return replace(
            self,
            ids=self.ids.to(device),
            mask=self.mask.to(device),
            positions=self.positions.to(device),
            pixels=None if self.pixels is None else self.pixels.to(device),
            grids=None if self.grids is None else self.grids.to(device),
        )

    def select(self, rows: Sequence[int]) -> "Prefix":
        """The prefix of these rows, in this order; padding columns stay."""
        index = torch.tensor(list(rows), device=self.ids.device)
        kept = replace(
            self,
            ids=self.ids[index],
            mask=self.mask[index],
            positions=self.positions[..., index, :],
        )
        if self.pixels is None or self.grids is None:
            return kept
        counts = self.images_per_row
        if not sum(counts[row] for row in rows):
            return replace(kept, pixels=None, grids=None, images_per_row=())
        grids = self.grids.split(counts)
        patches = self.pixels.split([int(grid.prod(-1).sum()) for grid in grids])
        return replace(
            kept,
            pixels=torch.cat([patches[row] for row in rows]),
            grids=torch.cat([grids[row] for row in rows]),
            images_per_row=tuple(counts[row] for row in rows),
        )


@dataclass
class _Row:
    """One conversation as token ids; `targets` repeats the ids that the assistant has to say."""

    ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    def add(self, ids: list[int], said: bool) -> None:
        self.ids += ids
        self.targets += ids if said else [IGNORED] * len(ids)


class PrefixBuilder:
    """Makes prefixes for one MLLM from its tokenizer and image processor; holds no weights."""

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        rope_index: RopeIndex,
        max_text_tokens: int = 256,
        image_token: str = "<|image_pad|>",
    ):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.rope_index = rope_index
        self.max_text_tokens = max_text_tokens
        self.image_id: int = tokenizer.convert_tokens_to_ids(image_token)
        self.pad_id: int = tokenizer.pad_token_id

    def __call__(self, conversations: Sequence[Sequence[Turn]], *, add_generation_prompt: bool = True) -> Prefix:
        """One row per conversation. ValueError for a user text longer than `max_text_tokens` or a wrong image type."""
        return self._build(conversations, add_generation_prompt)[0]

    def draw(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]] | None = None) -> Prefix:
        """What is read to draw: the drawing instruction, then the prompt with the images to start from.

        The empty prompt without images is the unconditional branch of guidance."""
        images = images if images is not None else [()] * len(prompts)
        system = Turn("system", DRAW_SYSTEM)
        return self([[system, Turn("user", p, tuple(i))] for p, i in zip(prompts, images, strict=True)])

    def with_targets(self, conversations: Sequence[Sequence[Turn]]) -> tuple[Prefix, Tensor]:
        """Whole conversations to train on, and targets [B, P]: the ids of what the assistant says, its closing mark
        included, `IGNORED` elsewhere. Targets are not shifted."""
        return self._build(conversations, add_generation_prompt=False)

    def _build(self, conversations: Sequence[Sequence[Turn]], add_generation_prompt: bool) -> tuple[Prefix, Tensor]:
        images = [image for turns in conversations for turn in turns for image in turn.images]
        pixels, grids = self._process(images)
        sizes = [] if grids is None else (grids.prod(-1) // self.image_processor.merge_size**2).tolist()
        remaining = iter(sizes)
        rows = [self._row(turns, remaining, add_generation_prompt) for turns in conversations]
        ids = self._pad([row.ids for row in rows], self.pad_id)  # [B, P]
        targets = self._pad([row.targets for row in rows], IGNORED)  # [B, P]
        mask = self._pad([[1] * len(row.ids) for row in rows], 0).bool()  # [B, P]
        prefix = Prefix(
            ids=ids,
            mask=mask,
            positions=self._positions(ids, mask, grids),
            pixels=pixels,
            grids=grids,
            images_per_row=tuple(sum(len(t.images) for t in turns) for turns in conversations) if images else (),
        )
        return prefix, targets

    def _row(self, turns: Sequence[Turn], image_sizes: Any, add_generation_prompt: bool) -> _Row:
        """Encode the frame and the texts apart; an image mark of the frame becomes as many as the image has tokens."""
        row = _Row()
        closes = False  # whether the next piece of frame begins with the mark that ends an answer
        for number, piece in self._pieces(turns, add_generation_prompt):
            if number is not None:
                row.add(self._encode_text(turns[number]), said=turns[number].role == "assistant")
                closes = turns[number].role == "assistant"
                continue
            frame = self.tokenizer.encode(piece, add_special_tokens=False)
            for place, token in enumerate(frame):
                if token == self.image_id:
                    row.add([token] * next(image_sizes), said=False)
                else:
                    row.add([token], said=closes and place == 0)
            closes = False
        return row

    def _pieces(self, turns: Sequence[Turn], add_generation_prompt: bool) -> list[tuple[int | None, str]]:
        """The rendered template, cut where the texts go: (None, frame) and (turn number, "") in order."""
        messages = [
            {
                "role": turn.role,
                "content": [{"type": "image"} for _ in turn.images] + [{"type": "text", "text": f"\ue000{number}\ue001"}],
            }
            for number, turn in enumerate(turns)
        ]
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        parts = re.split("\ue000(\\d+)\ue001", rendered)  # frame, number, frame, number, ..., frame
        return [(int(part), "") if place % 2 else (None, part) for place, part in enumerate(parts)]

    def _encode_text(self, turn: Turn) -> list[int]:
        try:
            turn.text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, as the shell's other encodings become
            raise ValueError(f"the text {turn.text[:40]!a} is not Unicode; give it in UTF-8") from error
        ids = self.tokenizer.encode(turn.text, add_special_tokens=False, split_special_tokens=True)
        if turn.role == "user" and len(ids) > self.max_text_tokens:
            raise ValueError(
                f"the prompt {turn.text[:40]!r}... has {len(ids)} tokens and the limit is {self.max_text_tokens}; shorten it"
            )
        return ids

    def _process(self, images: list[Image.Image]) -> tuple[Tensor | None, Tensor | None]:
        if not images:
            return None, None
        for image in images:
            if not isinstance(image, Image.Image):
                raise ValueError(f"an image is a {type(image).__name__}; give a PIL image")
        processed = self.image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return processed["pixel_values"], processed["image_grid_thw"]

    def _positions(self, ids: Tensor, mask: Tensor, grids: Tensor | None) -> Tensor:
        return self.rope_index(ids, (ids == self.image_id).int(), grids, mask)

    def _pad(self, rows: list[list[int]], value: int) -> Tensor:
        width = max(len(row) for row in rows)
        return torch.tensor([[value] * (width - len(row)) + row for row in rows], dtype=torch.long)
