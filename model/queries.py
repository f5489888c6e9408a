"""The learned query vectors: one parameter [Q, D], read by the MLLM as input embeddings after the prompt."""

import torch
from torch import Tensor, nn


class Queries(nn.Module):
    """Q vectors of the MLLM's width D; `std` should be that of the MLLM's token embeddings."""

    def __init__(self, count: int, width: int, std: float = 0.02):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(count, width) * std)  # [Q, D]

    def forward(self) -> Tensor:
        """The vectors [Q, D]."""
        return self.vectors.clone()  # ZeRO-3 takes the parameter itself away when this returns
