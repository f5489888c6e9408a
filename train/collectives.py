"""What trains, at a ZeRO stage, on so many ranks -> bytes that an optimizer step gives to collectives, and their seconds.

How many bytes: as train.traffic counts them in real runs. How long: rings of stated bandwidth and latency, in two levels
where there are several nodes: each GPU's ring over the nodes carries its part, then those of a node share theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}  # an all-reduce is a reduce-scatter and an all-gather

BUCKET = 500_000_000  # weights in a message, by DeepSpeed's defaults
PREFETCH = 50_000_000  # the same where ZeRO 3 gathers


@dataclass(frozen=True)
class Load:
    """What an engine holds, in numbers of weights."""

    trained: float
    width: int
    """Bytes of a weight, and of its gradient."""
    checkpointed: float = 0
    """Of the trained: those that are gathered once more because their blocks are computed again on the way back."""
    frozen: float = 0
    """Of frozen modules inside the engine, through which a gradient passes."""


def payload(load: Load, zero: int, accumulation: int) -> dict[str, float]:
    """Bytes of the whole tensors that an optimizer step gives to each kind of collective, on each rank.

    As DeepSpeed 0.19.8 does it: ZeRO 1 and 2 sum whole gradients on every rank (not only the part that it updates), ZeRO 2
    and 3 in each micro-batch; ZeRO 3 gathers weights on the way forward, on the way back, and for what is computed again.
    Left out are the ends that fill a tensor up to a multiple of the ranks, messages of one number, and that ZeRO 3 by its
    own settings keeps up to a billion weights between the two ways.
    """
    whole = load.trained * load.width
    if zero == 3:
        read = 2 * (load.trained + load.frozen) + load.checkpointed
        return {"all_gather": accumulation * read * load.width, "reduce_scatter": accumulation * whole}
    reduced = {"all_reduce": whole * (accumulation if zero == 2 else 1)}
    return reduced | ({"all_gather": whole} if zero else {})


def messages(given: Mapping[str, float], width: int, zero: int, accumulation: int) -> dict[str, int]:
    """In how many messages a payload goes: of DeepSpeed's default sizes, and one for each time that weights are gathered
    and gradients summed."""
    every = {2: {"all_reduce": accumulation}, 3: {"all_gather": 2 * accumulation, "reduce_scatter": accumulation}}
    times = every.get(zero, {})
    size = {kind: width * (PREFETCH if zero == 3 and kind == "all_gather" else BUCKET) for kind in given}
    return {kind: max(times.get(kind, 1), ceil(total / size[kind])) for kind, total in given.items()}


@dataclass(frozen=True)
class Network:
    """Nodes of GPUs; bandwidths are of one direction."""

    gpus_per_node: int = 8
    nvlink_gbytes: float = 450.0
    """GB/s of each GPU within its node."""
    nic_gbits: float = 400.0
    """Gbit/s of each network adapter."""
    nics_per_node: int = 8
    nvlink_us: float = 3.0
    """Microseconds before a message of a ring moves, within a node."""
    nic_us: float = 10.0
    """The same between nodes."""

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "nvlink_gbytes", "nic_gbits", "nics_per_node"):
            if not getattr(self, name) > 0:
                raise ValueError(f"network.{name} is {getattr(self, name)}; give a number above 0")
        for name in ("nvlink_us", "nic_us"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"network.{name} is {getattr(self, name)}; give 0 or more")

    @property
    def between_nodes(self) -> float:
        """B/s of each GPU to other nodes, when all of its node send."""
        return self.nic_gbits * 1e9 / 8 * self.nics_per_node / self.gpus_per_node

    def pass_seconds(self, size: float, messages: int, world: int) -> float:
        """Of an all-gather or a reduce-scatter of `size` bytes, cut into messages: of n ranks that pass the n-th part of
        what they share from one to the next, each n - 1 times."""
        near = min(world, self.gpus_per_node)
        nodes, rest = divmod(world, near)
        if rest:
            raise ValueError(f"world {world} does not fill nodes; give a multiple of network.gpus_per_node {near}")
        return (nodes - 1) * (messages * self.nic_us * 1e-6 + size / world / self.between_nodes) + (near - 1) * (
            messages * self.nvlink_us * 1e-6 + size / near / (self.nvlink_gbytes * 1e9)
        )

    def seconds(self, given: Mapping[str, float], messages: Mapping[str, int], world: int) -> float:
        """Of a payload whose kinds go in so many messages."""
        return sum(PASSES[kind] * self.pass_seconds(size, messages[kind], world) for kind, size in given.items())
