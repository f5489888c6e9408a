"""Pictures of the world -> a vision tower that tells colours and shapes apart, before any word is learned.

From random weights, answers alone taught the tower nothing in a thousand steps; a picture's answer is one number, its points
are hundreds. Every visual token must name the colour and the shape at the points of its cell, and say where its cell lies:
rotary positions alone leave no trace of it in what a token carries, and left and right would be hard to read off.
Letters: B batch, T visual tokens of a picture, K points of a token's cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data.batch import LabelledBatch, LabelledCollate
from data.loader import Loader
from data.world.dense import points_of
from model.assets import fingerprint, locate, tensors_of
from model.embedded import save
from model.mllm import MLLMConfig, load
from model.prefix import join
from model.qwen import Qwen2_5_VL
from model.vision import batch_equal_pictures
from train.dense import CLASSES, dense_loss
from train.engine import Engine
from train.ranks import Ranks
from train.task import LoaderTask, engine_for, loader_for

if TYPE_CHECKING:
    from train.config import Run

PLACE = 2  # column and row of a token, each from -1 to 1


@dataclass(frozen=True)
class SeeTaskConfig:
    """Whose vision tower learns to see."""

    init: Path
    """A model folder; the release is the same model with a trained vision tower."""
    points: int = 4
    """Points along a side of each visual token's cell."""

    def build(self, run: Run, ranks: Ranks) -> SeeTask:
        """Load the model and put its vision tower, under a linear head, into an engine."""
        source = locate(str(self.init))
        if source is None:
            raise ValueError(f"task.init {self.init} does not exist; run understand.language first, or name a model folder")
        if run.data.task != "labelled":
            raise ValueError(f"data.task is {run.data.task}; a vision tower learns to see from labelled pictures")
        mllm = load(MLLMConfig(str(source), dtype="float32"))
        if not isinstance(mllm, Qwen2_5_VL):
            raise ValueError(f"task.init {source} is a {type(mllm).__name__}; this task trains Qwen2.5-VL only")
        tower = Tower(mllm.model.model.visual.requires_grad_(True).train(), self.points)
        loader = loader_for(LabelledCollate(run.data.image_size), run, ranks)
        return SeeTask(self, mllm, source, tower, engine_for(tower, run, ranks), loader, ranks)


class Tower(nn.Module):
    """Vision tower and head: patches -> what is at each point, and where each token is."""

    def __init__(self, visual: Any, points: int) -> None:
        super().__init__()
        batch_equal_pictures(visual)
        self.visual, self.points = visual, points
        self.head = nn.Linear(visual.config.out_hidden_size, points * points * sum(CLASSES))
        self.place = nn.Linear(visual.config.out_hidden_size, PLACE)

    def forward(self, patches: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
        """Patches of B pictures, grids [B, 3] -> logits [B, T, K, classes], places [B, T, 2] in [-1, 1]."""
        tokens = self.visual(patches.to(self.visual.dtype), grid_thw=grids).pooler_output  # [B T, D]
        seen = self.head(tokens).unflatten(0, (len(grids), -1)).float()
        told = self.place(through_noise(tokens)).unflatten(0, (len(grids), -1)).float()
        return seen.unflatten(-1, (-1, sum(CLASSES))), told


def through_noise(tokens: Tensor) -> Tensor:
    """Tokens [N, D] under noise as large as they are. What is read through it has to be said loudly: a place that was one
    fortieth of a token's variance could be read off, and no answer learned to."""
    return tokens + tokens.detach().square().mean().sqrt() * torch.randn_like(tokens)


def places(rows: int, columns: int) -> Tensor:
    """Column and row of each of rows x columns tokens in reading order, [rows columns, 2], from -1 to 1."""
    return torch.cartesian_prod(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns)).flip(-1)


class SeeTask(LoaderTask):
    """Trains the vision tower of an MLLM on dense labels; the language model is left alone."""

    def __init__(
        self,
        config: SeeTaskConfig,
        mllm: Qwen2_5_VL,
        source: Path,
        tower: Tower,
        engine: Engine,
        loader: Loader,
        ranks: Ranks,
    ) -> None:
        self.config, self.mllm, self.source, self.tower = config, mllm, source, tower
        self.engine, self.loader, self.ranks = engine, loader, ranks
        self.engines = {"main": engine}

    def step(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """What lies at the points of every token's cell, and the squared error of where the token lies."""
        pictures = [Image.fromarray(levels.permute(1, 2, 0).numpy()) for levels in batch.levels]
        look = self.mllm.builder.images
        assert look is not None
        seen = join([[look(picture, alone=True).tensors for picture in pictures]])[0]
        # tokens along a side of a picture, read before the grids [B, 3] move: from a GPU it would wait
        side = int(seen["image_grid_thw"][0, 1]) // self.tower.visual.spatial_merge_size
        points = points_of(batch.scenes, side, self.config.points)
        logits, told = self.engine(*(seen[name].to(self.ranks.device) for name in ("pixel_values", "image_grid_thw")))
        loss, accuracy = dense_loss(logits, *(part.to(self.ranks.device) for part in points))
        loss = loss + F.mse_loss(told, places(side, side).to(told).expand_as(told))
        self.engine.backward(loss)
        self.engine.step()
        return {"loss": loss.detach(), "shape_accuracy": accuracy}

    def frozen(self) -> dict[str, str]:
        """The language model."""
        tensors = tensors_of(self.mllm.model)
        return {"mllm": fingerprint({name: t for name, t in tensors.items() if not name.startswith("model.visual.")})}

    def release(self, folder: Path) -> None:
        """The whole model, in the hub's layout, with the averaged vision tower."""
        with self.engine.averaged():
            if self.ranks.first:
                save(folder, self.mllm.model, self.source)
