"""A tiny real release whose every weight matters: unlike a fresh model, it draws something and heeds its prompt."""

from pathlib import Path

import torch

from model.metaquery import MetaQuery, build
from model.store import save
from tests import tiny


def model(folder: Path, pixels: int = 16, **changes) -> MetaQuery:
    """A bridge with random weights that draws `pixels` a side."""
    sit = tiny.SiTDecoderConfig(sit=tiny.sit_config(latent_size=pixels // 2))
    made = build(tiny.metaquery_config(folder, decoder=sit, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.15 if parameter.ndim > 1 else 1.0, generator=generator)
    return made.eval()


def release(folder: Path, pixels: int = 16, **changes) -> Path:
    """The same as a release folder."""
    save(folder / "release", model(folder, pixels, **changes))
    return folder / "release"
