"""Records -> the batches that training steps read.

A collate is built once with what it needs and called with (records, sample numbers). Sample numbers are global and never
come back: noise, time and condition dropping are drawn from them. Letters: B batch, P prefix tokens, H W pixels.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.address import uniform
from data.buckets import Buckets
from data.dropout import Dropout, drop
from data.records import BadSample, Conversation, Edit, Labelled, TextToImage
from data.transforms import resize_and_crop, unit
from data.world.dense import points_of
from model.prefix import Prefix, PrefixBuilder

Device = torch.device | str
MAX_ASPECT = 100  # Qwen's image processor fails above 200


@dataclass(frozen=True)
class T2IBatch:
    """Pictures with the conditions to draw them from."""

    index: torch.Tensor  # [B] long, global sample numbers
    prefix: Prefix
    levels: torch.Tensor | None  # [B, 3, H, W] uint8; None: the latents are known
    scenes: tuple[dict[str, Any] | None, ...]  # what each picture shows, where its source knows
    latents: torch.Tensor | None = None  # [B, c, h, w] float16, of unit variance

    @property
    def pixels(self) -> torch.Tensor:
        """[B, 3, H, W] in [-1, 1], where the batch is. Move it first: levels are a quarter of the bytes."""
        assert self.levels is not None
        return unit(self.levels)

    def to(self, device: Device) -> "T2IBatch":
        """The same batch on another device."""
        levels, latents = (part if part is None else part.to(device) for part in (self.levels, self.latents))
        return replace(self, index=self.index.to(device), prefix=self.prefix.to(device), levels=levels, latents=latents)


@dataclass(frozen=True)
class ChatBatch:
    """Conversations with the tokens to predict."""

    index: torch.Tensor  # [B] long, global sample numbers
    prefix: Prefix
    targets: torch.Tensor  # [B, P] long, -100 outside the assistant's words

    def to(self, device: Device) -> "ChatBatch":
        """The same batch on another device."""
        return ChatBatch(self.index.to(device), self.prefix.to(device), self.targets.to(device))


@dataclass(frozen=True)
class LabelledBatch:
    """Pictures with class numbers, or with the scenes they show."""

    index: torch.Tensor  # [B] long, global sample numbers
    labels: torch.Tensor | tuple[dict[str, Any], ...]  # [B] long for class numbers; scenes stay JSON objects
    levels: torch.Tensor  # [B, 3, H, W] uint8
    latents: torch.Tensor | None = None  # [B, c, h, w] float16, of unit variance, where they are known
    points: tuple[torch.Tensor, torch.Tensor] | None = None  # colours, shapes [B, T, K] of scenes, where asked for

    @property
    def pixels(self) -> torch.Tensor:
        """[B, 3, H, W] in [-1, 1], where the batch is. Move it first: levels are a quarter of the bytes."""
        return unit(self.levels)

    @property
    def scenes(self) -> tuple[dict[str, Any], ...]:
        """The labels of the generated world. ValueError for class numbers."""
        if isinstance(self.labels, torch.Tensor):
            raise ValueError("data.sources label by class number, and this task learns from scenes; give a generated world")
        return self.labels

    def to(self, device: Device) -> "LabelledBatch":
        """The same batch on another device."""
        labels = self.labels.to(device) if isinstance(self.labels, torch.Tensor) else self.labels
        latents = self.latents if self.latents is None else self.latents.to(device)
        points = self.points and (self.points[0].to(device), self.points[1].to(device))
        moved = {"index": self.index.to(device), "levels": self.levels.to(device)}
        return replace(self, **moved, labels=labels, latents=latents, points=points)


@dataclass(frozen=True)
class TextToImageCollate:
    """TextToImage and Edit records -> T2IBatch, some conditions dropped for classifier-free guidance.

    Dropped text becomes the empty prompt; dropped source images leave the prompt without images. A text longer than the
    model reads loses its last words."""

    builder: PrefixBuilder
    image_size: int  # pixels a side
    dropout: Dropout
    seed: int
    buckets: Buckets | None = None  # shapes of batches; None: squares

    def check(self, record: TextToImage | Edit) -> None:
        """BadSample for a source picture that image processors refuse."""
        _check_aspect(_conditions(record)[1])

    def __call__(self, records: Sequence[TextToImage | Edit], indices: Sequence[int]) -> T2IBatch:
        prompts: list[str] = []
        images: list[Sequence[Image.Image]] = []
        for record, index in zip(records, indices, strict=True):
            text, sources = _conditions(record)
            dropped = drop(index, self.seed, self.dropout)
            prompts.append("" if dropped in ("text", "both") else shorten(text, self.builder))
            images.append(() if dropped in ("image", "both") else sources)
        prefix = self.builder.draw(prompts, images)
        scenes = tuple(record.scene if isinstance(record, TextToImage) else None for record in records)
        latents = _latents(records)
        levels = None if latents is not None else _levels(records, self.image_size, self.buckets)
        return T2IBatch(torch.tensor(indices), prefix, levels, scenes, latents)


@dataclass(frozen=True)
class ChatCollate:
    """Conversation records -> ChatBatch."""

    builder: PrefixBuilder

    def check(self, record: Conversation) -> None:
        """BadSample for a picture that image processors refuse, or if a user's text is longer than the model reads: a
        question cut short has another answer."""
        _check_aspect([image for turn in record.turns for image in turn.images])
        texts = [turn.text for turn in record.turns if turn.role == "user"]
        if any(count_tokens(text, self.builder) > self.builder.max_text_tokens for text in texts):
            raise BadSample("a user's text has more tokens than the model reads (max_text_tokens)")

    def __call__(self, records: Sequence[Conversation], indices: Sequence[int]) -> ChatBatch:
        prefix, targets = self.builder.with_targets([record.turns for record in records])
        return ChatBatch(torch.tensor(indices), prefix, targets)


@dataclass(frozen=True)
class LabelledCollate:
    """Labelled records -> LabelledBatch; with `flip`, half of the pictures mirrored, by sample number. `points` (cells
    along a side, points along a side of a cell) asks what lies where in scenes."""

    image_size: int  # pixels a side
    flip: bool = False
    seed: int = 0
    buckets: Buckets | None = None  # shapes of batches; None: squares
    points: tuple[int, int] | None = None

    def __call__(self, records: Sequence[Labelled], indices: Sequence[int]) -> LabelledBatch:
        numbers = [record.label for record in records if isinstance(record.label, int)]
        scenes = tuple(record.label for record in records if isinstance(record.label, dict))
        if numbers and scenes:
            raise ValueError("data.sources mixes class numbers with scenes as labels; give sources of one kind")
        labels = torch.tensor(numbers) if numbers else scenes
        levels = _levels(records, self.image_size, self.buckets)
        if self.flip:
            mirrored = torch.tensor([uniform(self.seed, "flip", index) < 0.5 for index in indices])
            levels[mirrored] = levels[mirrored].flip(-1)
        batch = LabelledBatch(torch.tensor(indices), labels, levels, _latents(records))
        return batch if self.points is None else replace(batch, points=points_of(batch.scenes, *self.points))


def shorten(text: str, builder: PrefixBuilder) -> str:
    """The text, or as many of its first words as fit into the builder's `max_text_tokens`; of text without spaces, of its
    first letters."""
    while (tokens := count_tokens(text, builder)) > builder.max_text_tokens:
        words, letters = text.split(), len(text) * builder.max_text_tokens // tokens
        cut = " ".join(words[: len(words) * builder.max_text_tokens // tokens])  # always fewer words
        text = cut if 2 * len(cut) > letters else text[:letters]
    return text


def count_tokens(text: str, builder: PrefixBuilder) -> int:
    """How many tokens a user's text takes in a prefix."""
    return len(builder.encode(text))


def _check_aspect(images: Sequence[Image.Image]) -> None:
    if any(max(image.size) > MAX_ASPECT * min(image.size) for image in images):
        raise BadSample(f"a source picture is more than {MAX_ASPECT} times as long as wide")


def _conditions(record: TextToImage | Edit) -> tuple[str, tuple[Image.Image, ...]]:
    if isinstance(record, Edit):
        return record.instruction, record.sources
    return record.caption, ()


def _latents(records: Sequence[TextToImage | Edit | Labelled]) -> torch.Tensor | None:
    known = [record.latent for record in records if record.latent is not None]
    if known and len(known) < len(records):
        raise ValueError("data.sources: some have latents and some have none; give latents to all or to none")
    return torch.from_numpy(np.stack(known)) if known else None  # [B, c, h, w]


def _levels(records: Sequence[TextToImage | Edit | Labelled], size: int, buckets: Buckets | None) -> torch.Tensor:
    """[B, 3, H, W] uint8, of the bucket in which the loader has gathered them."""
    images = [record.image for record in records if record.image is not None]
    shapes = Counter((size, size) if buckets is None else buckets.shape_of(image) for image in images)
    height, width = shapes.most_common(1)[0][0]  # an index cannot see EXIF that a PNG stores after its pixels
    levels = torch.empty(len(images), 3, height, width, dtype=torch.uint8)
    for image, out in zip(images, levels, strict=True):
        out.copy_(resize_and_crop(image, (height, width)))
    return levels
