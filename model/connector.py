"""What the MLLM answered to the queries [B, Q, D] -> conditioning of the decoder [B, Q, C].

A bidirectional transformer at the MLLM's width, then a projection (the Enc-Proj order of MetaQueries, Pan et al.
2025). Letters: B batch, Q queries, P prefix tokens, D MLLM width, S width
of what is looked at, C conditioning width."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import HeadNorm, RMSNorm, attend, merge_heads, split_heads
from model.prefilled import Looked

AGES = 8
"""The latest pictures, and the stretches of words between them, that get an age of their own; all earlier ones share the
oldest."""


@dataclass(frozen=True)
class ConnectorConfig:
    """`heads` None means one per 64 channels (per 32 where D is no multiple of 64). `layers` 0: projection only."""

    layers: int = 24
    heads: int | None = None
    mlp_ratio: float = 4.0
    looks: bool = False
    """Each layer also looks at what the MLLM made of pictures and words: where things stand in a picture is hard to say in
    few queries, and what an edit leaves alone has to stay where it is."""
    activation_checkpointing: bool = False


class Connector(nn.Module):
    """See the module's head. `gain` is what the decoder expects the RMS of its conditioning to be; `seen_width` is S, and
    matters where it looks."""

    def __init__(self, config: ConnectorConfig, width: int, out_width: int, gain: float = 1.0, seen_width: int = 0):
        super().__init__()
        heads = config.heads or _default_heads(width)
        if width % heads or (width // heads) % 2:
            raise ValueError(f"connector.heads {heads} must split the MLLM's width {width} into even parts")
        self.config = config
        self.layers = nn.ModuleList(
            ConnectorLayer(width, heads, int(config.mlp_ratio * width), seen_width * config.looks)
            for _ in range(config.layers)
        )
        self.ages = nn.Embedding(2 * AGES, seen_width) if config.looks else None  # of pictures, then of words
        self.project = nn.Sequential(
            nn.Linear(width, out_width), nn.GELU(approximate="tanh"), nn.Linear(out_width, out_width)
        )
        self.norm = RMSNorm(out_width, eps=1e-5)
        self._init_weights(gain)

    def forward(self, states: Tensor, looked: Looked | None = None) -> Tensor:
        """MLLM states [B, Q, D], and where it looks what was made of the prefix (None: of nothing) -> conditioning
        [B, Q, C]."""
        x = states.to(next(self.project.parameters()).dtype)  # [B, Q, D]
        seen, mask = self._context(x, looked)
        for layer in self.layers:
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, seen, mask, use_reentrant=False)
            else:
                x = layer(x, seen, mask)  # [B, Q, D]
        return self.norm(self.project(x).float())  # [B, Q, C]

    def _context(self, x: Tensor, looked: Looked | None) -> tuple[Tensor | None, Tensor | None]:
        """What each layer looks at, [B, 1 + P, S], whose first token stands for nothing, and its mask [B, 1, 1, 1 + P]; None
        where no layer looks."""
        if self.ages is None:
            return None, None
        if looked is None:
            ages = torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
            looked = Looked(x.new_zeros(len(x), 0, self.ages.embedding_dim), ages)
        kinds = (looked.ages.abs() - 1).clamp(0, AGES - 1) + AGES * (looked.ages < 0)
        seen = looked.states.to(x.dtype) + self.ages(kinds).to(x.dtype)  # [B, P, S]
        mask = F.pad(looked.ages != 0, (1, 0), value=True)[:, None, None]
        return F.pad(seen, (0, 0, 1, 0)), mask

    def _init_weights(self, gain: float) -> None:
        """Unit variance through every map; what joins the residual stream is smaller the more layers do so."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                joins = name.endswith((".out", ".down"))
                std = (module.in_features * (2 * len(self.layers) if joins else 1)) ** -0.5
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.norm.weight, gain)
        if self.ages is not None:
            nn.init.normal_(self.ages.weight, std=0.5)


class ConnectorLayer(nn.Module):
    """Pre-norm attention: to the prefix, where it looks, and over all queries, both ways; then SwiGLU."""

    def __init__(self, width: int, heads: int, mlp_width: int, seen_width: int = 0):
        super().__init__()
        self.look = Look(width, heads, seen_width) if seen_width else None
        self.heads = heads
        self.attention_norm = RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = HeadNorm(heads, width // heads), HeadNorm(heads, width // heads)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = RMSNorm(width, eps=1e-6)
        self.gate_up = nn.Linear(width, 2 * mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor, seen: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B, Q, D]; seen [B, 1 + P, S], mask [B, 1, 1, 1 + P] -> [B, Q, D]."""
        if self.look is not None and seen is not None:
            x = x + self.look(x, seen, mask)
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1))
        x = x + self.out(merge_heads(attend(rotate(self.q_norm(q)), rotate(self.k_norm(k)), v)))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Look(nn.Module):
    """Queries attend to the tokens of the prefix, or to one that stands for nothing."""

    def __init__(self, width: int, heads: int, seen_width: int):
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(width, eps=1e-6)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(seen_width, 2 * width)
        self.q_norm = HeadNorm(heads, width // heads)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, Q, D], seen [B, 1 + P, S] -> [B, Q, D]. Keys have no gain of their own: that of the queries, who
        are fewer, serves for both."""
        q = split_heads(self.q(self.norm(x)), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.kv(seen).chunk(2, dim=-1))
        return self.out(merge_heads(attend(self.q_norm(q), F.rms_norm(k, k.shape[-1:]), v, mask)))


def grown(tensors: Mapping[str, Tensor], connector: Connector) -> dict[str, Tensor]:
    """`tensors` of a connector of fewer layers, or of one that did not look, with what `connector` has beyond it, its output
    maps zeroed: the result is unchanged."""
    had = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("layers.")), default=-1)
    looked = "ages.weight" in tensors

    def is_new(name: str) -> bool:
        layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
        return layer >= had or (not looked and (".look." in name or name == "ages.weight"))

    more = {name: tensor.clone() for name, tensor in connector.state_dict().items() if is_new(name)}
    for name in more:
        if name.endswith((".out.weight", ".down.weight")):
            more[name].zero_()
    return {**tensors, **more}


def rotate(x: Tensor, theta: float = 1e4) -> Tensor:
    """Rotary position (Su et al. 2021) over the query index: x [B, heads, Q, d] with d even."""
    count, half = x.shape[-2], x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(count, device=x.device, dtype=torch.float32)[:, None] * speed  # [Q, d / 2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def _default_heads(width: int) -> int:
    return width // 64 if width % 64 == 0 else max(1, width // 32)
