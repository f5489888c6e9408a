"""prefix -> [frozen MLLM + queries] -> connector -> decoder -> prediction, and which of its parameters train.

Letters: B batch, Q queries, D MLLM width, C conditioning width, c h w latent channels, height, width."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from model.assets import fingerprint
from model.connector import Connector, ConnectorConfig
from model.decoder import Decoder, DecoderConfig, build_decoder
from model.hub import commit_of
from model.mllm import FrozenMLLM, MLLMConfig, Prefilled, load, outline
from model.noise import NoiseConfig, Noising, build_noising
from model.prefilled import Looked, by_length
from model.prefix import Prefix
from model.queries import Queries
from model.sit import SiTOutput
from model.trainable import choose_trainable
from model.vae import LatentVAE, VAEConfig, load_vae

GROUP_TOKENS = 3072
"""What another pass through a connector that looks costs on a CPU, in tokens that could be looked at instead."""


@dataclass(frozen=True)
class MetaQueryConfig:
    """What the bridge is made of and what of it trains.

    `trainable`: patterns over the decoder's parameter names ("*", "sit.blocks.*.cross.*"); queries and connector
    always train. `learned_queries` False freezes random queries; `read` "prompt" hands the connector the last-layer
    states of the last `queries` prompt tokens instead (both for ablations)."""

    mllm: MLLMConfig
    decoder: DecoderConfig
    vae: VAEConfig
    queries: int = 64
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    noise: NoiseConfig | None = None
    """None: the decoder's own, which for a pretrained one is its scheduler's."""
    trainable: tuple[str, ...] = ()
    learned_queries: bool = True
    read: Literal["queries", "prompt"] = "queries"


class Heard(NamedTuple):
    """What a connector is given: what the MLLM made of the queries, and of all before them. A tuple, because ZeRO-3
    looks for tensors in tuples and looks into no dataclass."""

    states: Tensor  # [B, Q, D]
    looked: Looked | None = None

    def to(self, device: torch.device | str) -> "Heard":
        """The same on another device."""
        looked = self.looked and Looked(*(part.to(device) for part in self.looked))
        return Heard(self.states.to(device), looked)


def hear(mllm: FrozenMLLM, queries: Queries, connector: Connector, prefix: Prefix | Prefilled) -> Heard:
    """Ask the MLLM the queries after the prefix."""
    if not connector.config.looks:
        return Heard(mllm.read(prefix, queries()))
    known = prefix if isinstance(prefix, Prefilled) else mllm.prefill(prefix)
    return Heard(mllm.read(known, queries()), known.looked())


class Bridge(nn.Module):
    """Queries and connector alone: what a decoder is told, where it is trained by other means. The MLLM is held outside."""

    mllm: FrozenMLLM

    def __init__(self, mllm: FrozenMLLM, queries: Queries, connector: Connector):
        super().__init__()
        object.__setattr__(self, "mllm", mllm)
        self.queries, self.connector = queries, connector

    def forward(self, asked: Prefix | Prefilled | Heard) -> Tensor:
        """Prefix of B rows, or what the MLLM made of it -> conditioning [B, Q, C]. On a CPU, rows of like length are told
        apart, where that spares looking at padding; not at ZeRO 3, where ranks gather weights together, call by call."""
        states, looked = asked if isinstance(asked, Heard) else self.hear(asked)
        if looked is None or looked.ages.is_cuda or any(hasattr(p, "ds_id") for p in self.connector.parameters()):
            return self.connector(states, looked)
        lengths = (looked.ages != 0).sum(1).tolist()
        groups = by_length(lengths, GROUP_TOKENS)
        told = [self.connector(states[rows], looked.select(rows, max(lengths[row] for row in rows))) for rows in groups]
        return torch.cat(told)[torch.tensor([row for rows in groups for row in rows]).argsort()]

    def hear(self, prefix: Prefix | Prefilled) -> Heard:
        """Ask the MLLM the queries after the prefix."""
        return hear(self.mllm, self.queries, self.connector, prefix)


class MetaQuery(nn.Module):
    """Registers what may train: queries, connector, decoder. The MLLM and the VAE are held outside, so that neither an
    optimiser, a ZeRO engine nor a checkpoint ever sees them."""

    mllm: FrozenMLLM
    vae: LatentVAE

    def __init__(
        self,
        config: MetaQueryConfig,
        mllm: FrozenMLLM,
        vae: LatentVAE,
        queries: Queries | None,
        connector: Connector,
        decoder: Decoder,
    ):
        super().__init__()
        object.__setattr__(self, "mllm", mllm)
        object.__setattr__(self, "vae", vae)
        noise = config.noise or decoder.noise
        self.config = replace(config, noise=noise)
        self.noising: Noising = build_noising(noise)
        self.queries = queries
        self.connector = connector
        self.decoder = decoder
        self.latent_shape = decoder.latent_shape
        if self.queries is not None:
            self.queries.requires_grad_(config.learned_queries)
        choose_trainable(self.decoder, (*config.trainable, *decoder.trains), "decoder parameter")
        own = self.own_tensors().keys()
        # Taken now: a bf16 engine rounds what it does not train, and a release names what was loaded.
        frozen = {name: tensor for name, tensor in self.state_dict().items() if name not in own}
        self.decoder_sha256 = "" if any(tensor.is_meta for tensor in frozen.values()) else fingerprint(frozen)

    @overload
    def forward(self, prefix: Prefix | Prefilled, x_t: Tensor, t: Tensor) -> Tensor: ...
    @overload
    def forward(self, prefix: Prefix | Prefilled, x_t: Tensor, t: Tensor, aligned: Literal[True]) -> SiTOutput: ...
    def forward(self, prefix: Prefix | Prefilled, x_t: Tensor, t: Tensor, aligned: bool = False) -> Tensor | SiTOutput:
        """Prefix of B rows, x_t [B, c, h, w], t [B] in [0, 1] -> prediction [B, c, h, w]; when `aligned`, with the
        decoder's hidden layer that an alignment loss looks at."""
        decode = self.decoder.aligned if aligned else self.decoder
        return decode(x_t, t, self.condition(prefix))

    def condition(self, prefix: Prefix | Prefilled) -> Tensor:
        """What the decoder is told about each row, [B, Q, C]."""
        if self.queries is not None:
            return self.connector(*hear(self.mllm, self.queries, self.connector, prefix))
        known = prefix if isinstance(prefix, Prefilled) else self.mllm.prefill(prefix)
        looked = known.looked() if self.connector.config.looks else None
        return self.connector(known.last_states(self.config.queries), looked)

    @property
    def image_size(self) -> int:
        """Pixels along a side of what it draws."""
        return self.latent_shape[1] * self.vae.factor

    @property
    def multiple(self) -> int:
        """Pixels of which the sides of its pictures are multiples."""
        return self.vae.factor * self.decoder.patch

    def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of pictures of so many pixels. ValueError where VAE or decoder take other sides."""
        if min(height, width) < self.multiple or height % self.multiple or width % self.multiple:
            raise ValueError(f"height {height}, width {width}: VAE and decoder take multiples of {self.multiple}, give such")
        shape = self.latent_shape[0], height // self.vae.factor, width // self.vae.factor
        if self.decoder.one_shape and shape != self.latent_shape:
            side = self.image_size
            raise ValueError(f"height {height}, width {width}: this decoder draws {side} x {side} alone, give that")
        return shape

    def place(self, device: torch.device | str) -> "MetaQuery":
        """Move everything, the parts held outside included; returns itself."""
        self.mllm.to(device)
        self.vae.to(device)
        return self.to(device)

    def own_tensors(self) -> dict[str, Tensor]:
        """What a release has to contain: all that is registered, less the frozen part of a decoder that has a home."""
        state = self.state_dict()
        if self.config.decoder.path is None:
            return state
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        return {name: t for name, t in state.items() if not (name in frozen and name.startswith("decoder."))}


def build(
    config: MetaQueryConfig,
    mllm: FrozenMLLM | None = None,
    vae: LatentVAE | None = None,
    decoder: Decoder | None = None,
) -> MetaQuery:
    """Load the parts that are not given (a decoder with a path comes trained), make queries and connector fresh."""
    mllm = mllm if mllm is not None else load(config.mllm)
    vae = vae if vae is not None else load_vae(config.vae)
    decoder = decoder if decoder is not None else build_decoder(config.decoder, noise=config.noise)
    return assemble(_pinned(config), mllm, vae, decoder, mllm.embedding_std)


def blueprint(config: MetaQueryConfig, device: torch.device | str = "meta") -> MetaQuery:
    """The same with no weights read or downloaded: every shape on torch's meta device, or random weights on a real one."""
    with torch.device(device):
        decoder = build_decoder(config.decoder, weights=False, noise=config.noise)
        return assemble(config, outline(config.mllm), load_vae(config.vae, weights=False), decoder, embedding_std=1.0)


def assemble(config: MetaQueryConfig, mllm: FrozenMLLM, vae: LatentVAE, decoder: Decoder, embedding_std: float) -> MetaQuery:
    """Fresh queries and connector between these parts. Raises ValueError when they do not fit each other."""
    if decoder.latent_shape[0] != vae.latent_channels:
        raise ValueError(
            f"the decoder draws latents of {decoder.latent_shape[0]} channels and vae.path "
            f"{config.vae.path!r} has {vae.latent_channels}; choose a pair that was trained together"
        )
    if config.queries < 1:
        raise ValueError(f"queries is {config.queries}; give 1 or more")
    if decoder.condition_tokens is not None and config.queries > decoder.condition_tokens:
        raise ValueError(
            f"queries is {config.queries} and the decoder takes {decoder.condition_tokens} conditioning tokens; "
            "lower queries or raise the decoder's condition_tokens"
        )
    queries = Queries(config.queries, mllm.width, embedding_std) if config.read == "queries" else None
    connector = Connector(
        config.connector, mllm.width, decoder.condition_width, decoder.condition_gain, seen_width=mllm.seen_width
    )
    return MetaQuery(config, mllm, vae, queries, connector, decoder)


def _pinned(config: MetaQueryConfig) -> MetaQueryConfig:
    """The config whose hub ids are at the commits that were loaded just now."""

    def pinned(part: Any) -> Any:
        if part.path is None or not hasattr(part, "revision"):  # our SiT lies in a folder and has none
            return part
        return replace(part, revision=commit_of(part.path, part.revision))

    return replace(config, mllm=pinned(config.mllm), vae=pinned(config.vae), decoder=pinned(config.decoder))
