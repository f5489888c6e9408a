"""A trained REPA-E task -> the folders that users load, and the pictures that show how far it is."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.transforms import to_pil
from model.decoder import save_sit
from model.files import dump_config, publish, write_json, write_whole
from model.labels import LABELS_FILE
from model.noise import noise
from sample.grid import Cell, Row, table
from sample.labelled import NOISE_FILE
from sample.solver import solve

if TYPE_CHECKING:
    from train.repae import RepaeTask

SHOWN = 8  # pictures of a preview
DRAWING_STEPS = 16


def release(task: RepaeTask, folder: Path) -> None:
    """vae/: an AutoencoderKL whose config carries the statistics of its latents; sit/: the SiT, its labels beside it, both
    averaged; noise.json: the schedule. Every rank calls it, the first writes."""
    with _averaged(task):
        if not task.ranks.first:
            return
        autoencoder: Any = copy.deepcopy(task.coder.autoencoder)
        if task.sit is not None:
            mean, std = task.sit.norm.statistics()
            autoencoder.register_to_config(latents_mean=mean, latents_std=std)
        with publish(folder) as draft:
            autoencoder.save_pretrained(draft / "vae")
            if task.sit is not None:
                save_sit(draft / "sit", task.sit.sit, {LABELS_FILE: task.sit.labels.state_dict()})
                write_json(draft / NOISE_FILE, dump_config(task.config.noise))


def preview(task: RepaeTask, path: Path) -> None:
    """Pictures, the same rebuilt, and what is drawn from their whole labels, as one PNG. Every rank calls it."""
    with _averaged(task):
        if not task.ranks.first:
            return
        batch, device = next(task.batches(0)), task.ranks.device
        pixels = batch.pixels[:SHOWN].to(device)
        shape = task.coder.latent_shape(pixels)
        dtype = next(task.coder.parameters()).dtype
        rebuilt = task.coder(pixels.to(dtype), torch.zeros(1, device=device)).rebuilt
        headings, columns = ["picture", "rebuilt"], [pixels, rebuilt]
        if task.sit is not None:
            words, places = (part[:SHOWN].to(device) for part in task.config.told.whole(batch, task.seed))
            condition = task.sit.labels(words, places)
            start = noise(batch.index[:SHOWN], task.seed + 1, shape).to(device)
            latents = solve(lambda x, t: task.sit.sit(x, t, condition).prediction, start, DRAWING_STEPS, task.sit.noising)
            mean, std = (torch.tensor(part, device=device).view(1, -1, 1, 1) for part in task.sit.norm.statistics())
            headings.append("drawn")
            columns.append(task.coder.autoencoder.decode((latents * std + mean).to(dtype)).sample)
        cells = zip(*([to_pil(p) for p in column.float().clamp(-1, 1).cpu()] for column in columns), strict=True)
        picture = table(headings, [Row("", tuple(Cell(image) for image in row)) for row in cells], caption_pixels=0)
        write_whole(path, lambda part: picture.save(part, "PNG"))


def _averaged(task: RepaeTask) -> ExitStack:
    stack = ExitStack()
    for name in ("vae", "main"):
        if name in task.engines:
            stack.enter_context(task.engines[name].averaged())
    return stack
