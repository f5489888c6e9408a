"""Pictures and their prompts -> CLIP score: 100 max(cos(picture, prompt), 0), by a CLIP of transformers (Hessel et al. 2021,
without their factor of 2.5). Letters: B pairs, E width."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from data.transforms import to_rgb
from model.assets import fingerprint, tensors_of
from model.hub import Source, fetched, weights
from sample.drawn import read_about
from sample.image_scores import picture_at
from sample.measures import Measure, mean
from sample.progress import Track
from sample.prompts import lines_of


class Clip:
    """A frozen CLIP with its own tokenizer and image processor, in float32."""

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        source = Source("--clip", path)
        self.model: Any = weights(source, CLIPModel, dtype=torch.float32).eval().requires_grad_(False).to(device)
        self.tokenizer = fetched(source, CLIPTokenizer.from_pretrained)
        self.processor = fetched(source, CLIPImageProcessorPil.from_pretrained)
        self.longest: int = self.model.config.text_config.max_position_embeddings  # tokens, with both marks

    @property
    def sha256(self) -> str:
        """Over all its tensors."""
        return fingerprint(tensors_of(self.model))

    @torch.no_grad()
    def cosines(self, pictures: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """[B]: of each picture with its prompt, cut to what the model reads."""
        texts = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        pixels = self.processor(list(pictures), return_tensors="pt")["pixel_values"]
        out = self.model(**texts.to(self.model.device), pixel_values=pixels.to(self.model.device))
        return (out.image_embeds * out.text_embeds).sum(-1).cpu()

    def cut(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than what the model reads."""
        return sum(len(ids) > self.longest for ids in self.tokenizer(list(prompts))["input_ids"])


def score(
    clip: Clip,
    files: Sequence[Path],
    prompts: Sequence[str],
    batch_size: int,
    watch: Track = iter,
) -> dict[str, Measure]:
    """The mean over all pictures, and the share of prompts that were cut."""
    found: list[float] = []
    for start in watch(range(0, len(files), batch_size)):
        batch = slice(start, start + batch_size)
        found += clip.cosines([to_rgb(picture_at(path)) for path in files[batch]], prompts[batch]).tolist()
    cut = Measure(clip.cut(prompts) / len(files), n=len(files), unit="share")
    return {"images.clip_score": mean([100 * max(cosine, 0) for cosine in found]), "images.clip_cut_prompts": cut}


def prompts_of(files: Sequence[Path], folder: Path, listed: Path | None) -> list[str]:
    """The prompt of each picture of a folder: from a JSONL file of objects with `file` (below the folder) and `prompt`, else
    from the pictures themselves.

    Raises:
        ValueError: a picture has none, or a line is not as it should be.
    """
    told = None if listed is None else _listed(listed)
    prompts = []
    for path in files:
        name = str(path.relative_to(folder))
        prompt = read_about(path).get("prompt") if told is None else told.get(name)
        if prompt is None:
            raise ValueError(f"{path} has no prompt; name a JSONL file of file and prompt with --prompts, or remove it")
        prompts.append(prompt)
    return prompts


def _listed(path: Path) -> dict[str, str]:
    told = {}
    for number, text in lines_of(path):
        try:
            line = json.loads(text)
            told[line["file"]] = line["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no object with file and prompt; mend it") from error
    return told
