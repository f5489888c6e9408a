"""A joint run (configs/repae.py) -> the same on parts and pictures of random numbers, for where only its speed is asked.

What it would fetch is made in the shapes that lie in assets/shapes and written in the hub's layout, so that the run builds
as any other."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel

from data.shards import Shards
from model.assets import locate
from model.perceptual import LPIPS, FeaturesConfig, LPIPSConfig, PerceptualConfig
from model.targets import TargetConfig
from model.vae import VAEConfig, load_vae
from train.config import Run
from train.plan import shaped_part
from train.repae import RepaeTaskConfig

PICTURES = 32


def furnish(run: Run, folder: Path) -> Run:
    """The run on random weights and pictures that are written into `folder`. ValueError for a part whose shape does not lie
    with the code, and for data other than class numbers."""
    task = run.task
    assert isinstance(task, RepaeTaskConfig)
    if run.data.task != "labelled" or not all(isinstance(source, Shards) for source in run.data.sources):
        raise ValueError(f"{run.name} reads no shards of class numbers; random pictures stand for those alone")
    task = replace(
        task,
        vae=replace(task.vae, path=_vae(task.vae, folder / "vae")),
        targets=tuple(_target(target, folder / f"target{number}") for number, target in enumerate(task.targets)),
        perceptual=_perceptual(task.perceptual, folder / "perceptual"),
    )
    shard = pictures(folder / "pictures.tar", run.data.image_size)
    return replace(run, task=task, data=replace(run.data, sources=(Shards(str(shard)),), workers=0))


def pictures(path: Path, side: int) -> Path:
    """A shard of so many pixels a side, class numbers beside them."""
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as shard:
        for number in range(PICTURES):
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            written = io.BytesIO()
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(written, "JPEG")
            label = json.dumps({"label": number}).encode()
            for ending, content in (("jpg", written.getvalue()), ("json", label)):
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return path


def _vae(config: VAEConfig, folder: Path) -> str:
    load_vae(_lying(config), weights=False).autoencoder.save_pretrained(folder)
    return str(folder)


def _target(config: TargetConfig, folder: Path) -> TargetConfig:
    shape = locate(_lying(config).path)
    assert shape is not None
    AutoModel.from_config(AutoConfig.from_pretrained(shape)).save_pretrained(folder)
    shutil.copy(shape / "preprocessor_config.json", folder)
    return replace(config, path=str(folder), revision=None)


def _perceptual(config: PerceptualConfig | None, folder: Path) -> PerceptualConfig | None:
    if isinstance(config, FeaturesConfig):
        return replace(config, target=_target(config.target, folder))
    if not isinstance(config, LPIPSConfig):
        return None
    fresh = LPIPS()
    linear = {f"lin{n}.model.1.weight": w.detach().view(1, -1, 1, 1) for n, w in enumerate(fresh.weights)}
    folder.mkdir()
    torch.save(
        {f"features.{name}": value for name, value in fresh.features.state_dict().items()}, folder / "vgg16-397923af.pth"
    )
    torch.save(linear, folder / "vgg.pth")
    return replace(config, path=str(folder))


def _lying(config: Any) -> Any:
    """The config of the shape that lies with the code."""
    found = shaped_part(config)
    if locate(found.path) is None:
        raise ValueError(f"the shape of {config.path!r} does not lie in assets/shapes; add its config.json there")
    return found
