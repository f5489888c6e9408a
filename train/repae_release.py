"""A trained REPA-E task -> the folders that users load, and the pictures that show how far it is."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.transforms import to_pil, unit
from model.decoder import SiTDecoder, SiTDecoderConfig, save_sit
from model.files import atomic_folder, write_whole
from model.labels import LABELS_FILE, Labels
from model.metaquery import Bridge, MetaQuery, MetaQueryConfig
from model.noise import noise
from model.store import BESIDE, save
from model.vae import LatentVAE, VAEConfig
from sample.grid import Cell, Row, table
from sample.solver import solve
from train.prompts import PromptsTold

if TYPE_CHECKING:
    from train.repae import RepaeTask

SHOWN = 8  # pictures of a preview
DRAWING_STEPS = 16


def release(task: RepaeTask, folder: Path) -> None:
    """vae/: an AutoencoderKL whose config carries the statistics of its latents; sit/: the SiT, its labels beside it; both
    averaged, but for a VAE that stays by now; where captions were read, bridge/: the MetaQuery of
    the two. Every rank calls it, the first writes."""
    with _averaged(task):
        if not task.ranks.first:
            return
        autoencoder: Any = copy.deepcopy(task.coder.autoencoder)
        if task.sit is not None:
            mean, std = task.sit.norm.statistics()
            autoencoder.register_to_config(latents_mean=mean, latents_std=std)
        with atomic_folder(folder) as draft:
            autoencoder.save_pretrained(draft / "vae")
            if task.sit is not None:
                teller = task.sit.teller
                beside = {LABELS_FILE: teller.state_dict()} if isinstance(teller, Labels) else {}
                save_sit(draft / "sit", task.sit.sit, task.config.noise, beside)
                if isinstance(teller, Bridge):
                    save(draft / "bridge", _metaquery(task, teller, LatentVAE(autoencoder)))


def _metaquery(task: RepaeTask, bridge: Bridge, vae: LatentVAE) -> MetaQuery:
    """The model whose decoder and VAE will lie beside its own folder."""
    told = task.config.told
    assert isinstance(told, PromptsTold)
    dtype: Any = str(vae.autoencoder.dtype).removeprefix("torch.")
    config = MetaQueryConfig(
        mllm=told.mllm,
        decoder=SiTDecoderConfig(path=BESIDE + "sit"),
        vae=VAEConfig(BESIDE + "vae", dtype=dtype),
        queries=told.queries,
        connector=told.connector,
        noise=task.config.noise,
    )
    own = copy.deepcopy((bridge.queries, bridge.connector, task.sit.sit))  # freezing them must not reach what trains
    return MetaQuery(config, bridge.mllm, vae, own[0], own[1], SiTDecoder(own[2]))


def preview(task: RepaeTask, path: Path) -> None:
    """Pictures, the same rebuilt, and what is drawn from their whole labels, as one PNG. Every rank calls it."""
    with _averaged(task):
        if not task.ranks.first:
            return
        assert task.shown is not None
        batch, device = task.shown, task.ranks.device
        pixels = unit(batch.levels[:SHOWN].to(device))
        shape = task.coder.latent_shape(pixels)
        dtype = next(task.coder.parameters()).dtype
        rebuilt = task.coder(pixels.to(dtype), torch.zeros(1, device=device)).rebuilt
        headings, columns = ["picture", "rebuilt"], [pixels, rebuilt]
        if task.sit is not None:
            told = (part.to(device) for part in task.config.told.whole(batch, task.seed))
            condition = task.sit.teller(*told)[:SHOWN]
            start = noise(batch.index[:SHOWN], task.seed + 1, shape).to(device)
            latents = solve(lambda x, t: task.sit.sit(x, t, condition).prediction, start, DRAWING_STEPS, task.sit.noising)
            mean, std = (torch.tensor(part, device=device).view(1, -1, 1, 1) for part in task.sit.norm.statistics())
            headings.append("drawn")
            columns.append(task.coder.autoencoder.decode((latents * std + mean).to(dtype)).sample)
        cells = zip(*([to_pil(p) for p in column.float().clamp(-1, 1).cpu()] for column in columns), strict=True)
        picture = table(headings, [Row("", tuple(Cell(image) for image in row)) for row in cells], caption_pixels=0)
        write_whole(path, lambda part: picture.save(part, "PNG"))


def _averaged(task: RepaeTask) -> ExitStack:
    """With the averages; of a VAE that stays since a step, with the weights that the SiT has gone on with."""
    stack = ExitStack()
    for name in ("vae", "main"):
        if name in task.engines:
            kind = "weights" if name == "vae" and not task.vae_trains else "average"
            stack.enter_context(task.engines[name].averaged(kind))
    return stack
