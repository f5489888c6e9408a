"""Launcher environment -> rank, world size and device; the few collectives that the loop itself needs.

Works under `torchrun`, under `deepspeed`, under any launcher that sets RANK / WORLD_SIZE / LOCAL_RANK, and alone.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")
_SOURCE = r"\[\S+\.cc:\d+\] "  # where in torch's source an error was raised


class Lost(ConnectionError):
    """Another rank, or its machine, no longer answers."""


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

    def leave(self) -> None:
        """Wait for all ranks and part; the last that a process which ends well does with them.

        Without it, threads of Gloo that still hold a tensor when Python ends abort the process, now and then.
        """
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()


def start(timeout_seconds: float) -> Ranks:
    """Join the process group that the launcher's environment describes (one process when it describes none).

    Raises ValueError when the environment is half set, Lost when the others cannot be reached.
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
        local, seen = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= seen:
            raise ValueError(
                f"environment: LOCAL_RANK is {local} and this process sees {seen} GPU(s); start one process for each GPU, "
                "and let each see all of its machine"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_seconds)
        if alone:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] (documented; needs no port)
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        else:
            with others_answer():
                store, _, _ = next(rendezvous("env://", timeout=timeout))  # waits for the first machine, and its name
                store.set_timeout(timeout)
                store.set(f"device of {rank}", device.type)
                first = store.get("device of 0").decode()
                if first != device.type:
                    raise ValueError(
                        f"rank {rank} on {socket.gethostname()} computes on {device.type} and the first one on {first}; see "
                        "whether nvidia-smi finds its GPUs there"
                    )
                if interface := _interface(os.environ["MASTER_ADDR"]):
                    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
                dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return Ranks(rank, world, device)


@contextmanager
def others_answer() -> Iterator[None]:
    """Raises Lost for what torch raises when a collective inside does not come about, because a rank ended or is silent."""
    try:
        yield
    except RuntimeError as error:
        said = re.split(r"\.?(?:\n|$)|\. ", str(error))[0]
        if said.startswith("NCCL error"):  # the reason comes last
            said = " ".join(str(error).split())
        if not isinstance(error, dist.DistError) and "/gloo/" not in said:  # Gloo's have no class of their own
            raise
        who = f"rank {os.environ.get('RANK', 0)} on {socket.gethostname()}"
        raise Lost(
            f"{who} gets no answer from another: {re.sub(_SOURCE, '', said)}; "
            "find the rank that says why, or the machine that is silent, and run again to go on from the last checkpoint"
        ) from error


def _interface(host: str) -> str | None:
    """This machine's network interface from which `host` is reached; None where it is this machine by a loopback address.

    Gloo alone takes the address of the machine's own name, which on Debian is 127.0.1.1, where no other machine finds it.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as unsent:
        unsent.connect(address)  # of a datagram socket: chooses the way, sends nothing
        mine = unsent.getsockname()[0]
    if ipaddress.ip_address(mine).is_loopback:
        return None
    return next(name for name, held in psutil.net_if_addrs().items() if mine in (each.address for each in held))


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed torch for one micro-batch by address, so that what a module draws does not depend on what ran before."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
