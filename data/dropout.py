"""Sample number -> which of its conditions to drop, so that classifier-free guidance has its null branches."""

from dataclasses import dataclass
from typing import Literal

from data.address import uniform

Dropped = Literal["text", "image", "both"] | None


@dataclass(frozen=True)
class Dropout:
    """Probabilities of three events that exclude each other; what is left is the chance that all conditions stay."""

    text: float = 0.1  # only the text
    image: float = 0.0  # only the source images
    both: float = 0.0

    def __post_init__(self) -> None:
        for name in ("text", "image", "both"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.dropout.{name} is {getattr(self, name)}; give a probability from 0 to 1")
        if self.text + self.image + self.both > 1:
            raise ValueError("data.dropout: text, image and both exclude each other; let them sum to at most 1")


def drop(index: int, seed: int, probabilities: Dropout) -> Dropped:
    """What sample number `index` loses: a function of (seed, index) alone."""
    chance = uniform(seed, "dropout", index)
    if chance < probabilities.text:
        return "text"
    if chance < probabilities.text + probabilities.image:
        return "image"
    if chance < probabilities.text + probabilities.image + probabilities.both:
        return "both"
    return None
