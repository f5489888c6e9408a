"""A release -> a callable that draws: prompts (and pictures to start from) and one seed per picture in, pictures out.

A picture depends on its prompt, its seed and the settings, not on its neighbours: each distinct prompt is read by the MLLM
alone (one prefill, whatever the number of pictures and guidance branches), each seed has its own generator.

Shape letters: B pictures of a batch, Q queries, C conditioning width, c h w latent channels, height, width, H W pixels.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data.transforms import to_pil
from model.assets import fingerprint
from model.metaquery import MetaQuery
from model.store import load
from sample.guidance import Branch, guided
from sample.settings import Guidance, SolverName
from sample.solver import solve

Pictures = tuple[Image.Image, ...]
REMEMBERED = 64  # conditions kept between calls; at 256 queries of width 2304 each takes 2.4 MB


class Pipeline:
    """Draws with a model as it is. Make a new one after its weights changed: conditions are remembered."""

    def __init__(self, model: MetaQuery):
        self.model = model.eval()
        self._conditions: OrderedDict[bytes, Tensor] = OrderedDict()  # each [1, Q, C]

    @classmethod
    def from_release(cls, folder: str | Path, device: torch.device | str | None = None) -> "Pipeline":
        """The pipeline of a release folder, on `device` (default: the GPU if there is one).

        Raises:
            ValueError: the folder is no release, or a part of it is missing or does not fit.
        """
        return cls(load(Path(folder)).place(device or default_device()))

    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        images: Sequence[Sequence[Image.Image]] | None = None,
        steps: int = 30,
        guidance: float | Guidance = 3.0,
        negative: str = "",
        solver: SolverName = "dpm++",
        height: int = 0,
        width: int = 0,
    ) -> list[Image.Image]:
        """One RGB picture for each prompt and its seed; `images` are what each prompt's picture starts from.

        A plain number as `guidance` is text guidance; 1 runs no second branch. `negative` replaces the empty prompt. Height
        and width are pixels, 0 as trained; shapes that the decoder never learned come out as they may.

        Raises:
            ValueError: lengths differ, a prompt is too long, or a setting is impossible.
        """
        drawn = self.draw(prompts, seeds, images, steps, guidance, negative, solver, height, width)
        return [to_pil(pixels) for pixels in drawn]

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        images: Sequence[Sequence[Image.Image]] | None = None,
        steps: int = 30,
        guidance: float | Guidance = 3.0,
        negative: str = "",
        solver: SolverName = "dpm++",
        height: int = 0,
        width: int = 0,
    ) -> Tensor:
        """As `__call__`, before rounding: pixels [B, 3, H, W] in [-1, 1]."""
        if not prompts or len(prompts) != len(seeds) or (images is not None and len(images) != len(prompts)):
            raise ValueError("draw: give as many seeds (and lists of images) as prompts, at least one")
        guidance = guidance if isinstance(guidance, Guidance) else Guidance(text=guidance)
        sources = [tuple(pictures) for pictures in images or [()] * len(prompts)]
        model, generators = self.model, [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = model.shape_of(height or model.image_size, width or model.image_size)  # (c, h, w)

        def fresh() -> Tensor:
            rows = [torch.randn(shape, generator=generator) for generator in generators]
            return torch.stack(rows).to(model.mllm.device)  # [B, c, h, w]

        predict = guided(model.decoder, self._branches(prompts, sources, guidance, negative), guidance)
        latents = solve(predict, fresh(), steps, model.noising, solver, fresh)  # [B, c, h, w]
        return model.vae.decode(latents)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the trained tensors: which model drew a picture."""
        return fingerprint(self.model.own_tensors())

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for a prompt that the MLLM cannot read; costs no pass through it."""
        for prompt in dict.fromkeys(prompts):
            self.model.mllm.builder.draw([prompt])

    def _branches(
        self, prompts: Sequence[str], sources: Sequence[Pictures], guidance: Guidance, negative: str
    ) -> list[Branch]:
        """Nothing, images only, everything; a branch of weight 0 is not read either."""
        weights = guidance.weights(with_images=any(sources))
        asked = (
            [(negative, ()) for _ in prompts],
            [(negative, pictures) for pictures in sources],
            list(zip(prompts, sources, strict=True)),
        )
        branches = [
            Branch(weight, torch.cat([self._condition(prompt, pictures) for prompt, pictures in branch]))  # [B, Q, C]
            for weight, branch in zip(weights, asked, strict=True)
            if weight != 0 or branch is asked[-1]
        ]
        while len(self._conditions) > REMEMBERED:
            self._conditions.popitem(last=False)  # the one not used for longest
        return branches

    def _condition(self, prompt: str, pictures: Pictures) -> Tensor:
        """What the decoder is told [1, Q, C]; the MLLM reads each distinct prompt once."""
        key = _digest(prompt, pictures)
        if key not in self._conditions:
            prefix = self.model.mllm.builder.draw([prompt], [pictures]).to(self.model.mllm.device)
            self._conditions[key] = self.model.condition(prefix)
        self._conditions.move_to_end(key)
        return self._conditions[key]


def default_device() -> torch.device:
    """The GPU of this process's rank if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _digest(prompt: str, pictures: Pictures) -> bytes:
    digest = hashlib.sha256(prompt.encode())
    for picture in pictures:
        digest.update(f"\0{picture.mode}{picture.size}".encode() + picture.tobytes())
    return digest.digest()
