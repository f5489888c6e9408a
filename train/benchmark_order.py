"""What it costs to know the order of the data: `python -m train.benchmark order`.

The order is arithmetic (data/order.py): nothing is shuffled, held or replayed, so neither a sample's place nor going on in
the middle costs more for a thousand times as many samples.
"""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

from data.address import draw
from data.order import Order
from sample.measures import Measure, show, spread
from train.machine import record


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """Time the planning of samples, and going on in the middle of an epoch, for data of these sizes."""

    samples: tuple[int, ...] = (10**6, 10**8, 10**9)
    places: int = 10_000
    """Samples to find, anywhere in the epoch."""
    repeats: int = 7
    json: Path | None = None
    """Where to write the measures."""


def ordering(args: Ordering) -> None:
    """Measures, prints and writes. ValueError where a number is below 1."""
    if min(args.places, args.repeats, *args.samples) < 1:
        raise ValueError("give --samples, --places and --repeats of at least 1")
    measures: dict[str, Measure] = {}
    for size in args.samples:
        asked = [draw("benchmark", number) % size for number in range(args.places)]
        each, resumed = [], []
        for _ in range(args.repeats):
            began = time.perf_counter()
            order = Order([size, max(1, size // 3)], [3.0, 1.0], seed=0)
            order.place(size // 2)
            resumed.append(time.perf_counter() - began)
            began = time.perf_counter()
            for sample in asked:
                order.place(sample)
            each.append((time.perf_counter() - began) / args.places)
        tracemalloc.start()
        order = Order([size, max(1, size // 3)], [3.0, 1.0], seed=0)
        order.place(size // 2)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        name = f"order.{size:.0e}".replace("e+0", "e").replace("e+", "e")
        measures[f"{name}.resume"] = spread(resumed, "s")
        measures[f"{name}.place"] = spread(each, "s")
        measures[f"{name}.memory"] = Measure(float(held), unit="B")
    show("the order of two sources, mixed 3 to 1", measures)
    if args.json is not None:
        record(args.json, measures)
