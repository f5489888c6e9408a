"""Rows of the fault catalogue: what goes wrong, what is to happen then, and a function that lets it go wrong often."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Outcome:
    """What became of a row's trials."""

    trials: int = 0
    lost: list[str] = field(default_factory=list)
    """What went another way than expected: one sentence for each trial that was lost."""
    seen: str = ""
    """Figures that were measured on the way."""
    table: list[list[str]] = field(default_factory=list)
    """The same set out, with a line of headings, where they are many."""

    seconds: float = 0.0

    def add(self, survived: object, otherwise: str) -> None:
        """Count one trial."""
        self.trials += 1
        if not survived:
            self.lost.append(otherwise)

    def expect(self, words: str, work: Callable[[], object]) -> None:
        """Count one trial, which survives when `work` raises the ValueError that holds these words."""
        try:
            work()
        except ValueError as error:
            self.add(words in str(error), f"said {str(error)!r} instead of {words!r}")
        else:
            self.add(False, f"nothing was said where {words!r} was expected")


Play = Callable[[int, Path], Outcome]


@dataclass(frozen=True)
class Row:
    """One row. `play(trials, folder)` works in an empty folder, in a process of its own; rows whose cases are a table of
    their own ignore the number."""

    fault: str
    expected: str
    target: str
    play: Play
    trials: int
    fast: int
    """Trials in `make test`; 0: none there."""


ENTERED: dict[str, Row] = {}
"""By the catalogue's number, as modules of rows are imported."""

LIMIT_SECONDS = 1200.0
"""After which a row is given up."""


def row(name: str, fault: str, expected: str, target: str, trials: int = 1, fast: int = 1) -> Callable[[Play], Play]:
    """Enter a function into ENTERED."""

    def enter(play: Play) -> Play:
        assert name not in ENTERED, name
        ENTERED[name] = Row(fault, expected, target, play, trials, fast)
        return play

    return enter
