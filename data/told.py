"""What a picture's label tells a decoder in its own training: batch -> words and places for `model.labels`.

Letters: B batch, L tokens, K words a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data.address import uniform
from data.batch import LabelledBatch
from data.world.labels import OBJECTS, Withhold, absent, encode, labels_config
from data.world.scene import random_for
from model.labels import UNKNOWN, LabelsConfig

TELL_ALL = Withhold(0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class ScenesTold:
    """Scenes of the generated world, of which some facts are withheld."""

    withhold: Withhold = field(default_factory=Withhold)
    spare: int = 10
    """Up to so many further tokens, a new number for each batch, tell of things that are not there: a bridge has more
    queries than a scene has things."""

    def __post_init__(self) -> None:
        if self.spare < 0:
            raise ValueError(f"task.told.spare (or task.spare) is {self.spare}; give 0 or more")

    @property
    def tokens(self) -> int:
        """The most that a scene is told in."""
        return 1 + OBJECTS + self.spare

    def labels(self, width: int) -> LabelsConfig:
        """The shape of the label embedding."""
        return labels_config(width)

    def __call__(self, batch: LabelledBatch, seed: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Words [B, L, K] and places [B, L, 3], the same for a sample on any number of ranks."""
        step = int(batch.index[0]) // batch_size
        return self._encode(batch, seed, self.withhold, random_for(seed, "spare", step).randint(0, self.spare))

    def whole(self, batch: LabelledBatch, seed: int) -> tuple[Tensor, Tensor]:
        """The same with nothing withheld."""
        return self._encode(batch, seed, TELL_ALL, 0)

    def _encode(self, batch: LabelledBatch, seed: int, withhold: Withhold, spare: int) -> tuple[Tensor, Tensor]:
        told = [encode(scene, withhold, seed, n) for scene, n in zip(batch.scenes, batch.index.tolist(), strict=True)]
        words, places = (
            torch.from_numpy(np.stack([np.concatenate([own, none]) for own in part]))
            for part, none in zip(zip(*told, strict=True), absent(spare), strict=True)
        )
        return words, places


@dataclass(frozen=True)
class ClassesTold:
    """Class numbers, of which some are dropped for classifier-free guidance; with 0 classes, nothing is told at all."""

    classes: int = 1000
    dropout: float = 0.1
    plain: bool = False
    """Each class is one learned vector and nothing more, as published."""

    def __post_init__(self) -> None:
        if self.classes < 0 or not 0 <= self.dropout <= 1:
            raise ValueError("task.told: give classes of 0 or more and a dropout from 0 to 1")

    def labels(self, width: int) -> LabelsConfig:
        """The shape of the label embedding: class k is word k + 1."""
        return LabelsConfig(vocabulary=self.classes + 1, width=width, plain=self.plain)

    def __call__(self, batch: LabelledBatch, seed: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Words [B, 1, 1] and places [B, 1, 3] that say nothing, the same for a sample on any number of ranks."""
        dropped = [uniform(seed, "class", index) < self.dropout for index in batch.index.tolist()]
        words, places = self.whole(batch, seed)
        return words.masked_fill(torch.tensor(dropped).view(-1, 1, 1), UNKNOWN), places

    def whole(self, batch: LabelledBatch, seed: int) -> tuple[Tensor, Tensor]:
        """The same with nothing dropped."""
        count = len(batch.index)
        numbers = batch.labels if self.classes else torch.full((count,), UNKNOWN - 1)
        if not isinstance(numbers, Tensor):
            raise ValueError("data.sources label by scenes, and task.told expects class numbers; give task.told.classes 0")
        if int(numbers.max()) >= self.classes > 0:
            raise ValueError(f"a label is {int(numbers.max())} and task.told.classes is {self.classes}; raise it")
        return (numbers + 1).view(-1, 1, 1), torch.zeros(count, 1, 3)


Told = ScenesTold | ClassesTold
