"""No test asks a network: what is not on this machine is missing at once. None leaves the process another one's numerics."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import pytest
from torch.nn import functional


@pytest.fixture(autouse=True)
def own_linear(monkeypatch):
    """DeepSpeed's ZeRO 3 puts its own in place for the whole process, and that rounds otherwise."""
    monkeypatch.setattr(functional, "linear", functional.linear)
