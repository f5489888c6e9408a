"""Launcher environment -> rank, world size and device; the few collectives that the loop itself needs.

Works under `torchrun`, under `deepspeed`, under any launcher that sets RANK / WORLD_SIZE / LOCAL_RANK, and alone.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a small tensor on this rank's device; in place, also returned."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """True on every rank when `flag` is true on one."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0) if self.world > 1 else flag

    def share(self, value: Any) -> Any:
        """Rank 0's (picklable, small) value, on every rank."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's (picklable, small) value, by rank, on every rank."""
        held: list[Any] = [value]
        if self.world > 1:
            held = [None] * self.world
            dist.all_gather_object(held, value)
        return held

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()


def start(timeout_seconds: float) -> Ranks:
    """Join the process group that the launcher's environment describes (one process when it describes none).

    Raises ValueError when the environment is half set.
    """
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in variables if name not in os.environ]
    alone = {"RANK", "WORLD_SIZE"} <= set(missing)
    if missing and not alone:
        raise ValueError(f"environment: {', '.join(missing)} is not set; launch with torchrun or deepspeed, or unset RANK")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it too
    rank, world = (0, 1) if alone else (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_seconds)
        if alone:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] (documented; needs no port)
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
    return Ranks(rank, world, device)


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed torch for one micro-batch by address, so that what a module draws does not depend on what ran before."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
