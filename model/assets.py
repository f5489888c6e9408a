"""Named parts of a model -> where they lie on this machine, and what they contain.

The embedded assets are named relative to the repository, so that a release can move with the code."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent


def locate(path: str) -> Path | None:
    """The folder or file that `path` names: as given, else below the repository root; None if neither exists."""
    for candidate in (Path(path), ROOT / path):
        if candidate.exists():
            return candidate
    return None


def portable(path: str) -> str:
    """`path` relative to the repository when it lies inside, so that a release can move with the code."""
    found = locate(path)
    if found is None:
        return path
    resolved = found.resolve()
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else str(resolved)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the names, types, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, the buffers that are not saved included."""
    return dict([*module.named_parameters(), *module.named_buffers()])
