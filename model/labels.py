"""Labels -> conditioning tokens, to train a decoder before any language model is there.

A label is a few words from a closed vocabulary, and may have a place. A class label is one token of one word; a scene is a
token for its background and one for each object (colour, shape, size and place).
Letters: B batch, L tokens, K words a token, C conditioning width."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.assets import locate
from model.files import check_match, read_tensors

LABELS_FILE = "labels.safetensors"
"""Beside a trained SiT: what told it what to draw."""
UNKNOWN = 0  # the word of whatever is not told; a token of nothing else is the null condition


@dataclass(frozen=True)
class LabelsConfig:
    """`vocabulary` counts all words, UNKNOWN included. `plain`: a token is the sum of its words, with nothing learned on
    top, as published for classes."""

    vocabulary: int
    places: bool = False
    width: int = 384
    plain: bool = False


class Labels(nn.Module):
    """words [B, L, K] long, places [B, L, 3] (x, y, and how far off they may be, all in [0, 1]) -> [B, L, C].

    Tokens leave with mean square 1, as a connector's do for a SiT; plain ones as they are."""

    def __init__(self, config: LabelsConfig, frequencies: int = 16):
        super().__init__()
        self.config = config
        self.embed_word = nn.Embedding(config.vocabulary, config.width)
        self.speed: Tensor  # from half a wave to eight across the picture
        speed = math.pi * 2 ** torch.linspace(0, 4, frequencies)
        self.register_buffer("speed", speed, persistent=False)  # [frequencies]
        self.embed_place = nn.Linear(4 * frequencies + 1, config.width) if config.places else None
        self.mix = self.norm = None
        if not config.plain:
            width = config.width
            self.mix = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            self.norm = nn.RMSNorm(width)
        nn.init.normal_(self.embed_word.weight, std=0.02 if config.plain else 0.5)

    def forward(self, words: Tensor, places: Tensor | None = None) -> Tensor:
        tokens = self.embed_word(words).sum(dim=2)  # [B, L, C]
        if self.embed_place is not None:
            if places is None:
                raise ValueError("places: these labels were trained with places; give [B, L, 3]")
            x, y, spread = places.unbind(-1)  # [B, L] each
            angle = torch.stack([x, y], dim=-1)[..., None] * self.speed  # [B, L, 2, frequencies]
            waves = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(2)  # [B, L, 4 frequencies]
            tokens = tokens + self.embed_place(torch.cat([waves, spread[..., None]], dim=-1).to(tokens.dtype))
        return tokens if self.mix is None or self.norm is None else self.norm(tokens + self.mix(tokens))


def load_labels(folder: str | Path | None) -> Labels:
    """The frozen label embedding that a labelled SiT's release keeps beside it. Raises ValueError when there is none."""
    found = None if folder is None else locate(str(folder))
    if found is None or not (found / LABELS_FILE).is_file():
        raise ValueError(f"{str(folder)!r} has no {LABELS_FILE}; name the release of a decoder that was trained on labels")
    tensors = read_tensors(found / LABELS_FILE)
    vocabulary, width = tensors["embed_word.weight"].shape
    plain, places = "norm.weight" not in tensors, "embed_place.weight" in tensors
    labels = Labels(LabelsConfig(vocabulary, places=places, width=width, plain=plain))
    check_match(tensors, labels.state_dict(), found / LABELS_FILE)
    labels.load_state_dict(tensors)
    return labels.requires_grad_(False)
