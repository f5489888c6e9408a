"""Counts -> named measures with intervals -> what a command prints, and the same as JSON.

Every measuring command writes `{"<name>": {"value", "low", "high", "n", "unit"}}`; names are stable and dotted
(`generation.colour`), so that a later run, a table or a test can read them. Beside them may stand, as "protocol", what they
were measured by (sample/protocol.py).
"""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from data.interval import wilson
from model.files import write_whole

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
PROTOCOL = "protocol"
ENOUGH = 6  # repeats whose least and most hold the true median between them with over 95 % confidence
NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")


@dataclass(frozen=True)
class Measure:
    """A value from `n` observations; `low` and `high` bound it as `spans` says, None where no interval is known."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int = 1
    unit: str = ""


def spread(values: Sequence[float], unit: str) -> Measure:
    """The median of repeated measurements, between the least and the most of them: of ENOUGH, a 95 % interval."""
    return Measure(statistics.median(values), min(values), max(values), len(values), unit)


def mean(values: Sequence[float], unit: str = "") -> Measure:
    """The mean of independent values, with its normal 95 % interval; of fewer than ENOUGH, without."""
    centre = statistics.fmean(values)
    if len(values) < ENOUGH:
        return Measure(centre, n=len(values), unit=unit)
    off = 1.96 * statistics.stdev(values) / len(values) ** 0.5
    return Measure(centre, centre - off, centre + off, len(values), unit)


def share(successes: int, n: int) -> Measure:
    """successes / n in [0, 1] with Wilson's 95 % interval (1927); of no trials, 0 with the interval [0, 1]."""
    assert 0 <= successes <= n, (successes, n)
    if n == 0:
        return Measure(0.0, 0.0, 1.0, 0, "share")
    return Measure(successes / n, *wilson(successes, n), n, "share")


def write_json(path: Path, measures: Mapping[str, Measure], protocol: Mapping[str, Any] | None = None) -> None:
    """Writes all measures as JSON, whole or not at all, and before them how they came about.

    Raises:
        ValueError: a name is not dotted lower case, or a number is not finite.
    """
    for name, measure in measures.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"measure {name!r}: the name must be dotted lower case, like generation.colour")
        if not all(math.isfinite(x) for x in (measure.value, measure.low, measure.high) if x is not None):
            raise ValueError(f"measure {name!r}: the value is not finite; nothing was written")
    told = {} if protocol is None else {PROTOCOL: protocol}
    text = json.dumps(told | {name: asdict(measure) for name, measure in measures.items()}, indent=2) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text))


def read_json(path: Path) -> dict[str, Measure]:
    """Measures that `write_json` wrote.

    Raises:
        ValueError: the file does not hold measures.
    """
    try:
        raw = json.loads(path.read_text())
        return {name: Measure(**fields) for name, fields in raw.items() if name != PROTOCOL}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold measures as --json writes them: {error}") from error


def read_protocol(path: Path) -> dict[str, Any]:
    """How the measures of a file came about; empty where it does not say."""
    return json.loads(path.read_text()).get(PROTOCOL, {})


def show(title: str, measures: Mapping[str, Measure], console: Console | None = None) -> None:
    """Prints measures as a table; shares in percent."""
    numbers = [Column(heading, justify="right") for heading in ("value", spans(measures.values()), "n")]
    table = Table("measure", *numbers, title=title, title_justify="left")
    for name, measure in measures.items():
        table.add_row(name, value_of(measure), interval_of(measure), str(measure.n))
    (console or Console()).print(table)


def value_of(measure: Measure) -> str:
    """The value as people read it: `97.5 %`, `1.604 G`, `22.91 TFLOP`."""
    if measure.unit == "share":
        return f"{_number(measure.value, 'share')} %"
    thousands = max(0, int(math.log10(abs(measure.value)) // 3)) if measure.value else 0
    if abs(measure.value) < 1e4 or thousands >= len(PREFIXES):
        return f"{_number(measure.value, '')} {measure.unit}".rstrip()
    return f"{_number(measure.value / 1000**thousands, '')} {PREFIXES[thousands]}{measure.unit}"


def spans(measures: Iterable[Measure]) -> str:
    """What the intervals of a table are: of fewer than ENOUGH repeats, no more than from the least to the most."""
    few = any(each.low is not None and each.unit != "share" and each.n < ENOUGH for each in measures)
    return "range" if few else "95 % interval"


def interval_of(measure: Measure) -> str:
    """`86.5 to 98.9` with the unit of a share; empty where no interval is known."""
    if measure.low is None or measure.high is None:
        return ""
    low, high = (_number(x, measure.unit) for x in (measure.low, measure.high))
    return f"{low} to {high}" + (" %" if measure.unit == "share" else "")


def _number(x: float, unit: str) -> str:
    return f"{100 * x:.1f}" if unit == "share" else f"{x:.4g}"
