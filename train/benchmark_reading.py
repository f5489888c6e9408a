"""How much the shared head and the groups of like length save where prompts are read: `python -m train.benchmark reading`.

Prompts of the generated world, some with the picture that an edit starts from, are read by the embedded MLLM: padded to
the longest in one pass; with what every prompt begins with read once; and with rows of like length apart as well. The
states are the same (tests/test_families.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from data.source import WorldSource
from model.mllm import MLLMConfig, load
from sample.measures import Measure, show, spread
from train.machine import record, timed


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Time the reading of prompts to draw, in three ways."""

    mllm: str = "assets/world/mllm"
    batch_size: int = 64
    pictures: int = 8
    """How many of the prompts come with a picture to start from."""
    repeats: int = 15
    """Timed readings of each way."""
    json: Path | None = None
    """Where to write the measures."""


def reading(args: Reading) -> None:
    """Measures, prints and writes.

    Raises:
        ValueError: a size is below 1, or there are more pictures than prompts.
    """
    if min(args.batch_size, args.repeats) < 1 or not 0 <= args.pictures <= args.batch_size:
        raise ValueError("give sizes and repeats of at least 1, and no more pictures than prompts")
    mllm = load(MLLMConfig(args.mllm))
    texts, edits = (WorldSource(0, "train", task, 64) for task in ("t2i", "edit"))
    samples = [(edits if number < args.pictures else texts).read(number) for number in range(args.batch_size)]
    whole = mllm.builder.draw([sample["txt"] for sample in samples], [sample.get("sources", ()) for sample in samples])
    ways = {"plain": replace(whole, head=(), lengths=None), "head": replace(whole, lengths=None), "both": whole}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(args.repeats + 1):
        for way, prefix in ways.items():
            elapsed = timed(partial(mllm.prefill, prefix), mllm.device)
            if repeat:  # the first of each warms up
                seconds[way].append(elapsed)
    measures = {f"reading.{way}": spread(elapsed, "s") for way, elapsed in seconds.items()}
    for way in ("head", "both"):
        ratios = [plain / ours for ours, plain in zip(seconds[way], seconds["plain"], strict=True)]
        measures[f"reading.{way}_ratio"] = spread(ratios, "x")
    lengths = whole.lengths or ()
    measures["reading.tokens"] = Measure(sum(lengths))
    measures["reading.padded_tokens"] = Measure(whole.ids.numel())
    measures["reading.head_tokens"] = Measure(len(whole.head))
    show(f"{args.batch_size} prompts, {args.pictures} of them with a picture", measures)
    if args.json is not None:
        record(args.json, measures)
