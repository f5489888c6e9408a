"""A MetaQuery -> its parts, each as a step of its own on inputs of its own, to be counted (train/plan.py) or timed
(train/benchmark.py).

Letters: B batch, P prefix tokens, Q queries, D MLLM width, C conditioning width, c h w latent channels, height, width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.metaquery import MetaQuery
from model.prefix import Prefix


def parts(model: MetaQuery) -> dict[str, nn.Module | None]:
    """The modules by name."""
    return {
        "mllm": model.mllm.model,
        "vae": model.vae.autoencoder,
        "queries": model.queries,
        "connector": model.connector,
        "decoder": model.decoder,
    }


def steps(model: MetaQuery, prefix_tokens: int, batch_size: int = 1) -> dict[str, Callable[[], Tensor]]:
    """The forward of each part for a batch, from zeros on torch's default device; those of trained parts, and of the way of
    the queries through the MLLM, answer with a graph."""
    channels, height, width = model.latent_shape
    pixels = torch.zeros(batch_size, 3, model.image_size, model.image_size)
    prefix = blank_prefix(model, prefix_tokens, batch_size)
    vectors = torch.zeros(model.config.queries, model.mllm.width, requires_grad=True)  # [Q, D]
    known = model.mllm.prefill(prefix)
    states = torch.zeros(batch_size, *vectors.shape, requires_grad=True)  # [B, Q, D]
    looked = known.looked() if model.connector.config.looks else None
    condition = torch.zeros(batch_size, len(vectors), model.decoder.condition_width, requires_grad=True)  # [B, Q, C]
    x_t, t = torch.zeros(batch_size, channels, height, width), torch.zeros(batch_size)
    made: dict[str, Callable[[], Tensor]] = {
        "vae": lambda: model.vae.encode(pixels),
        "prefix": lambda: model.mllm.prefill(prefix).states,
        "queries": lambda: model.mllm.read(known, vectors),
        "connector": lambda: model.connector(states, looked),
        "decoder": lambda: model.decoder(x_t, t, condition),
    }
    if model.queries is None:
        del made["queries"]
    return made


def blank_prefix(model: MetaQuery, tokens: int, batch_size: int = 1) -> Prefix:
    """Rows of the first token over and over, [B, P], on torch's default device."""
    ids = torch.zeros(batch_size, tokens, dtype=torch.long)
    axes = model.mllm.position_axes
    positions = torch.arange(tokens).expand(ids.shape if axes is None else (axes, *ids.shape))
    return Prefix(ids, torch.ones_like(ids, dtype=torch.bool), positions, lengths=(tokens,) * batch_size)
