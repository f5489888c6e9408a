"""Captions -> what a decoder is told while it is trained together with its VAE: a frozen MLLM reads them, and queries and
connector train along with the decoder.

Letters: B batch, Q queries, C conditioning width."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.batch import T2IBatch
from model.connector import Connector, ConnectorConfig
from model.decoder import SiTDecoder
from model.files import check_match
from model.metaquery import Bridge
from model.mllm import MLLMConfig, load
from model.prefix import Prefix
from model.queries import Queries
from train.metaquery import bridge_tensors


@dataclass(frozen=True)
class PromptsTold:
    """The captions of pictures, read by a MetaQuery's bridge."""

    mllm: MLLMConfig
    queries: int = 64
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    init: Path | None = None
    """The release of a MetaQuery whose queries and connector are the start. None: fresh ones."""

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"task.told.queries is {self.queries}; give 1 or more")

    def build(self, width: int, device: torch.device) -> Bridge:
        """The bridge to a decoder of this conditioning width. Raises ValueError where `init` does not fit."""
        mllm = load(self.mllm, device)
        mllm.to(device)
        queries = Queries(self.queries, mllm.width, mllm.embedding_std)
        connector = Connector(self.connector, mllm.width, width, SiTDecoder.condition_gain, mllm.seen_width)
        bridge = Bridge(mllm, queries, connector)
        if self.init is not None:
            tensors = bridge_tensors(self.init)
            check_match(tensors, bridge.state_dict(), self.init / "model.safetensors")
            bridge.load_state_dict(tensors)
        return bridge

    def __call__(self, batch: T2IBatch, seed: int, batch_size: int) -> tuple[Prefix]:
        """What the bridge reads; some captions are empty, for classifier-free guidance (data.dropout)."""
        return (batch.prefix,)

    def whole(self, batch: T2IBatch, seed: int) -> tuple[Prefix]:
        """The same: which captions are empty was decided when the batch was made."""
        return (batch.prefix,)
