"""Patterns over parameter names -> which parameters train."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn


def choose_trainable(module: nn.Module, patterns: Sequence[str], what: str = "parameter") -> None:
    """Let exactly the parameters train whose name matches a pattern. Raises ValueError for a pattern that matches none."""
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            examples = ", ".join(names[:: max(1, len(names) // 4)])
            raise ValueError(f"trainable {pattern!r} matches no {what}; there are {examples}, ...")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
