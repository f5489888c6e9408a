"""How a picture is drawn, as values: what generate and evaluate share."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

MAX_SEED = 2**63 - 1  # that a generator of torch takes
SolverName = Literal["dpm++", "unipc", "euler", "heun", "euler_maruyama"]


@dataclass(frozen=True)
class Guidance:
    """How strongly a picture follows its conditions; 1 follows them as they are and costs no further branch."""

    text: Annotated[float, arg(name="guidance")] = 3.0
    """How strongly to follow the prompt; 1 follows it plainly, in half the time."""
    image: Annotated[float, arg(name="image-guidance")] = 3.0
    """How strongly to follow the pictures to start from; as strongly as the prompt, it costs no third branch."""
    start: Annotated[float, arg(name="guidance-start")] = 0.0
    """Guide at times from here (0 data, 1 noise; Kynkäänniemi et al. 2024); outside, the prompt alone decides."""
    end: Annotated[float, arg(name="guidance-end")] = 1.0
    """Guide at times up to here."""
    rescale: Annotated[float, arg(name="guidance-rescale")] = 0.0
    """In [0, 1]: how far to pull the contrast that guidance adds back (Lin et al. 2023, eq. 14 to 16)."""

    def __post_init__(self) -> None:
        for name, scale in (("guidance", self.text), ("image-guidance", self.image)):
            if not math.isfinite(scale):
                raise ValueError(f"{name}: {scale} is no strength; give a number")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"guidance: start {self.start} and end {self.end} must be ordered within [0, 1]")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance: rescale {self.rescale} must lie in [0, 1]")
        if self.rescale and self.text == 0:
            raise ValueError("guidance: rescale has nothing to pull back to at guidance 0; set one of them otherwise")

    def weights(self, with_images: bool) -> tuple[float, float, float]:
        """Weights of the branches (nothing, images only, everything); they sum to 1."""
        if not with_images:
            return 1 - self.text, 0.0, self.text
        return 1 - self.image, self.image - self.text, self.text


@dataclass(frozen=True)
class Drawing:
    """With the prompt and the seed, all that decides a picture."""

    steps: int = 30
    """Steps from noise to picture."""
    guidance: Guidance = Guidance()
    negative: str = ""
    """What to steer away from."""
    solver: SolverName = "dpm++"
    """How to step; euler_maruyama adds noise on the way."""
    height: int = 0
    """Pixels; 0: as the decoder was trained."""
    width: int = 0
    """Pixels; 0: as the decoder was trained."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: {self.steps} is too few; take at least one")

    def told(self) -> dict[str, object]:
        """Its values as a picture's file tells them."""
        values = {**vars(self), **vars(self.guidance)}
        values["guidance"] = values.pop("text")
        return values
