"""A module's trainable parameters -> AdamW groups; step number -> learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter, 2019) with warm-up, then a cosine to a floor."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 100
    decay: Literal["cosine", "constant"] = "cosine"
    floor: float = 0.1
    """The last learning rate as a fraction of `lr`."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optim.lr is {self.lr}; give a number above 0")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"optim.floor is {self.floor}; give a fraction of optim.lr between 0 and 1")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps is {self.warmup_steps}; give 0 or more")


class AdamW(torch.optim.AdamW):
    """Fused AdamW whose next `step` can be withheld, so that a bad step leaves weights and moments untouched.

    The engine goes through its whole step either way and so clears its gradients, at every ZeRO stage.
    """

    withhold = False

    @torch.no_grad()
    def step(self, closure=None):
        """One update, or none while `withhold` is set."""
        return None if self.withhold else super().step(closure)


def adamw(module: nn.Module, config: OptimConfig) -> AdamW:
    """The optimizer over exactly the parameters of `module` that require a gradient.

    Raises ValueError when there are none.
    """
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in zip(split(module), (config.weight_decay, 0.0), strict=True)
        if params  # DeepSpeed fails on an empty group
    ]
    if not groups:
        raise ValueError(f"{type(module).__name__}: no parameter is trainable; check the task's `trainable` patterns")
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def split(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters with weight decay, and without: what is not the weight matrix of a layer does not decay.

    Without are norms and biases (one axis), embeddings and free vectors such as the queries and position tables
    (a parameter not named `weight`), and tables that modulate.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    seen: set[int] = set()  # tied parameters appear under several owners; the first one decides
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                axes = sum(size > 1 for size in parameter.shape)  # a norm's gain may be [1, 1, D]
                is_matrix = name == "weight" and axes >= 2 and not isinstance(owner, nn.Embedding)
                groups[is_matrix].append(parameter)
    return groups[True], groups[False]


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of the optimizer step number `step` (from 0): linear warm-up, then cosine down to the floor."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    return config.lr * (config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * progress)))
