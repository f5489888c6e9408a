"""A release -> a callable that draws: what is asked and one seed per picture in, pictures out.

A picture depends on what is asked, its seed and the settings, not on its neighbours: each distinct prompt is read by the
MLLM alone (one prefill, whatever the number of pictures and guidance branches), each seed has its own generator.

Shape letters: B pictures of a batch, Q queries, C conditioning width, c h w latent channels, height, width, H W pixels.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data.transforms import to_pil
from model.assets import fingerprint
from model.metaquery import MetaQuery
from model.prefix import digest_of
from model.store import load
from sample.guidance import Branch, Predict, guided
from sample.settings import Drawing, Guidance
from sample.solver import After, Fresh, solve

Pictures = tuple[Image.Image, ...]
REMEMBERED = 64  # conditions kept between calls; at 256 queries of width 2304 each takes 2.4 MB


@dataclass(frozen=True)
class Asked:
    """What a picture is drawn from: a prompt and the pictures to start from, or, in their place, what an MLLM that has read
    something longer tells the decoder."""

    prompt: str = ""
    images: Pictures = ()
    condition: Tensor | None = None  # [1, Q, C]


@dataclass(frozen=True)
class Progress:
    """How far a drawing is. `latents` [B, c, h, w] are what it would come to from here; `Pipeline.decode` shows them."""

    call: int
    """Of the decoder, from 1."""
    time: Tensor
    """[], from 1 (noise) to 0 (data)."""
    latents: Tensor


Watch = Callable[[Progress], None]
"""Looks at a drawing after each call of the decoder; what it raises ends the drawing."""


class Pipeline:
    """Draws with a model as it is. Make a new one after its weights changed: conditions are remembered."""

    def __init__(self, model: MetaQuery):
        self.model = model.eval()
        self._conditions: OrderedDict[tuple[str | bytes, ...], Tensor] = OrderedDict()  # each [1, Q, C]

    @classmethod
    def from_release(cls, folder: str | Path, device: torch.device | str | None = None) -> "Pipeline":
        """The pipeline of a release folder, on `device` (default: the GPU if there is one).

        Raises:
            ValueError: the folder is no release, or a part of it is missing or does not fit.
        """
        return cls(load(Path(folder)).place(device or default_device()))

    def __call__(
        self,
        asked: Sequence[Asked | str],
        seeds: Sequence[int],
        drawing: Drawing = Drawing(),
        watch: Watch | None = None,
    ) -> list[Image.Image]:
        """One RGB picture for each that is asked (a string is a prompt) and its seed; shapes that the decoder never learned
        come out as they may.

        Raises:
            ValueError: lengths differ, a prompt is too long, or a setting is impossible.
        """
        return [to_pil(pixels) for pixels in self.draw(asked, seeds, drawing, watch)]

    @torch.no_grad()
    def draw(
        self,
        asked: Sequence[Asked | str],
        seeds: Sequence[int],
        drawing: Drawing = Drawing(),
        watch: Watch | None = None,
    ) -> Tensor:
        """As `__call__`, before rounding: pixels [B, 3, H, W] in [-1, 1]."""
        if not asked or len(asked) != len(seeds):
            raise ValueError("draw: give as many seeds as pictures are asked for, at least one")
        whole = [Asked(each) if isinstance(each, str) else each for each in asked]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self.decode(self.latents(whole, generators, drawing, watch))

    @torch.no_grad()
    def latents(
        self,
        asked: Sequence[Asked],
        generators: Sequence[torch.Generator],
        drawing: Drawing = Drawing(),
        watch: Watch | None = None,
        after: After | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """As `draw`, before decoding: latents [B, c, h, w] of unit variance. A generator for each picture makes its noise;
        `start` [B, c, h, w] takes the place of the first."""
        model = self.model
        shape = model.shape_of(drawing.height or model.image_size, drawing.width or model.image_size)  # (c, h, w)
        fresh = noise_from(generators, shape, model.mllm.device)
        begin = fresh() if start is None else start.to(model.mllm.device)
        if begin.shape != (len(asked), *shape):
            raise ValueError(f"latents: {tuple(begin.shape)} given, {(len(asked), *shape)} needed; give noise of that shape")
        predict = guided(model.decoder, self._branches(asked, drawing.guidance, drawing.negative), drawing.guidance)
        predict = predict if watch is None else self._watched(predict, watch)
        return solve(predict, begin, drawing.steps, model.noising, drawing.solver, fresh, after)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, c, h, w] of unit variance -> pixels [B, 3, H, W] in [-1, 1]."""
        return self.model.vae.decode(latents)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the trained tensors: which model drew a picture."""
        return fingerprint(self.model.own_tensors())

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for a prompt that the MLLM cannot read; costs no pass through it."""
        for prompt in dict.fromkeys(prompts):
            self.model.mllm.builder.draw([prompt])

    def _watched(self, predict: Predict, watch: Watch) -> Predict:
        calls = count(1)

        def predict_and_tell(x: Tensor, t: Tensor) -> Tensor:
            prediction = predict(x, t)
            watch(Progress(next(calls), t[0], self.model.noising.to_data(x, prediction, t)))
            return prediction

        return predict_and_tell

    def _branches(self, asked: Sequence[Asked], guidance: Guidance, negative: str) -> list[Branch]:
        """Nothing, images only, everything; a branch of weight 0 is not read either."""
        weights = guidance.weights(with_images=any(each.images for each in asked))
        told = (
            [Asked(negative) for _ in asked],
            [Asked(negative, each.images) for each in asked],
            asked,
        )
        branches = [
            Branch(weight, self._told(branch))
            for weight, branch in zip(weights, told, strict=True)
            if weight != 0 or branch is asked
        ]
        self._forget()
        return branches

    def condition(self, asked: Sequence[Asked]) -> Tensor:
        """What the decoder is told [B, Q, C]; the MLLM reads each distinct prompt once."""
        told = self._told(asked)
        self._forget()
        return told

    @torch.no_grad()
    def _told(self, asked: Sequence[Asked]) -> Tensor:
        return torch.cat([self._remembered(each) if each.condition is None else each.condition for each in asked])

    def _forget(self) -> None:
        while len(self._conditions) > REMEMBERED:
            self._conditions.popitem(last=False)  # the one not used for longest

    def _remembered(self, asked: Asked) -> Tensor:
        key = asked.prompt, *map(digest_of, asked.images)
        if key not in self._conditions:
            prefix = self.model.mllm.builder.draw([asked.prompt], [asked.images]).to(self.model.mllm.device)
            self._conditions[key] = self.model.condition(prefix)
        self._conditions.move_to_end(key)
        return self._conditions[key]


def noise_from(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Fresh:
    """Asked for, gaussian noise [B, *shape] on `device`: a row from each generator, made where it lives."""

    def fresh() -> Tensor:
        rows = [torch.randn(*shape, generator=each, device=each.device) for each in generators]
        return torch.stack(rows).to(device)

    return fresh


def default_device() -> torch.device:
    """The GPU of this process's rank if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
