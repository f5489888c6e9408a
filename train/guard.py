"""Loss of a step -> is the step taken? A pure decision on numbers that are equal on all ranks, so all ranks agree."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class GuardConfig:
    """When a step is refused, and when refusing becomes stopping."""

    spike: float = 20.0
    """Refuse a loss above this many times its running mean; 0 never does."""
    settle_steps: int = 100
    """Accepted steps before the running mean is trusted."""
    stop_after: int = 3
    """Refused steps in a row that take the run back to its last checkpoint, or end it."""
    rollbacks: int = 2
    """How often a run goes back, to go on past the samples up to there; 0: it ends at once."""

    def __post_init__(self) -> None:
        if self.stop_after < 1:
            raise ValueError(f"engine.guard.stop_after is {self.stop_after}; give 1 or more")
        if self.rollbacks < 0:
            raise ValueError(f"engine.guard.rollbacks is {self.rollbacks}; give 0 (none) or more")
        if self.spike and self.spike <= 1:
            raise ValueError(f"engine.guard.spike is {self.spike}; give a factor above 1, or 0 for none")


class Diverged(RuntimeError):
    """Too many steps in a row were refused."""


@dataclass
class Guard:
    """Counts refusals. Its fields are its whole state, and go into the checkpoint."""

    usual: float = 0.0
    """Running mean of the accepted losses (decay 0.98)."""
    accepted: int = 0
    refused: int = 0
    in_a_row: int = 0

    def objection(self, config: GuardConfig, loss: float, grad_norm: float = 0.0) -> str | None:
        """Why this step must not be taken, in words; None when it may."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        if config.spike and self.accepted >= config.settle_steps and loss > config.spike * self.usual:
            return f"loss {loss:.4g} is over {config.spike:g} times the usual {self.usual:.4g}"
        return None

    def record(self, loss: float, objection: str | None) -> None:
        """Count a step that was taken (no objection) or refused."""
        if objection is None:
            self.usual = loss if self.accepted == 0 else 0.98 * self.usual + 0.02 * loss
            self.accepted += 1
            self.in_a_row = 0
        else:
            self.refused += 1
            self.in_a_row += 1
