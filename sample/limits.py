"""What a server takes on at most, as values: of one request, and of all at once."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Of one request; what is above is refused before anything is computed."""

    body_megabytes: float = 16.0
    """Of the body."""
    body_seconds: float = 30.0
    """For the body to arrive."""
    images: int = 8
    """Pictures given."""
    megapixels: float = 4.0
    """Of each picture given."""
    characters: int = 16_000
    """Of all texts given; the model's own limits hold as well."""
    pictures: int = 8
    """Pictures asked for (n)."""
    enlarge: float = 4.0
    """Pixels of a picture asked for, as a multiple of those that the decoder was trained with."""
    steps: int = 100
    """Steps of a drawing."""
    answer_tokens: int = 1024
    """The longest answer that can be asked for."""
    request_seconds: float = 300.0
    """From the whole body to the end of the work."""
    requests: int = 256
    """Under way at once, waiting ones included."""

    def __post_init__(self) -> None:
        _positive(self)


@dataclass(frozen=True)
class Capacity:
    """How much is done, and waits, at a time."""

    batch: int = 8
    """Pictures drawn as one batch; changes speed and memory, and a picture by its rounding alone."""
    answers: int = 8
    """Answers under way; each holds a key/value cache."""
    waiting: int = 64
    """Pictures that may wait, and answers that may."""
    conversations: int = 4
    """Whose key/value caches are kept, so that a client that goes on with one waits for its new turns alone."""
    regather_seconds: float = 0.02
    """The longest wait for a batch as large as the last."""

    def __post_init__(self) -> None:
        _positive(self)


def _positive(values: Limits | Capacity) -> None:
    for field in fields(values):
        if not 0 < getattr(values, field.name) < float("inf"):
            name = field.name.replace("_", "-")
            raise ValueError(f"--{name} {getattr(values, field.name)} is no limit; give a number above 0")
