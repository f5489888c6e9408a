"""No test asks a network: what is not on this machine is missing at once. None leaves the process another one's numerics."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import pytest
from torch.nn import functional

# What tests ask is on this machine, and the rights of files that they look at are the usual ones.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):  # rich would take what is captured for a terminal
    os.environ.pop(name, None)
os.umask(0o022)


@pytest.fixture(autouse=True)
def own_linear(monkeypatch):
    """DeepSpeed's ZeRO 3 puts its own in place for the whole process, and that rounds otherwise."""
    monkeypatch.setattr(functional, "linear", functional.linear)
