"""How much sooner an answer begins where the conversation was kept: `python -m train.benchmark talking`.

Questions about pictures of the generated world, one after the other in one conversation. At each turn the time from the
question to the first token is taken where the key/value cache holds what was read and said before (model/dialogue.py), and
where all of it is read again. The states are the same (tests/test_dialogue.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.dialogue import Dialogue
from model.mllm import MLLMConfig, load
from model.prefix import Turn
from sample.measures import Measure, show, spread
from sample.world_answers import exams
from train.machine import check_device, record, timed


@dataclass(frozen=True, kw_only=True)
class Talking:
    """Time the first token of each answer in a conversation, kept and read again."""

    mllm: str = "assets/world/mllm"
    """A folder or hub id."""
    device: str = "cpu"
    turns: int = 16
    """Questions of the conversation."""
    pictures: int = 4
    """How many of the first questions come with a picture."""
    side: int = 64
    """Pixels along a side of a picture."""
    repeats: int = 7
    """Timed conversations of each way."""
    json: Path | None = None
    """Where to write the measures."""


def talking(args: Talking) -> None:
    """Measures, prints and writes.

    Raises:
        ValueError: a size is below 1, there are more pictures than turns, or the device is not there.
    """
    if min(args.turns, args.side, args.repeats) < 1 or not 0 <= args.pictures <= args.turns:
        raise ValueError("give turns, side and repeats of at least 1, and no more pictures than turns")
    check_device(args.device)
    mllm = load(MLLMConfig(args.mllm)).to(args.device)
    turns = conversation(args)
    length = mllm.builder([turns[:-1]]).ids.shape[1]
    if length >= mllm.context:
        raise ValueError(f"turns: the conversation has {length} tokens and the model reads {mllm.context}; take fewer turns")
    ends = range(1, 2 * args.turns, 2)
    seconds: dict[tuple[str, int], list[float]] = {(way, end): [] for way in ("kept", "again") for end in ends}
    for repeat in range(args.repeats + 1):
        dialogue = Dialogue(mllm)
        for end in ends:
            asked = turns[:end]
            kept = timed(lambda asked=asked, dialogue=dialogue: list(dialogue.reply(asked, max_new_tokens=1)), mllm.device)
            again = timed(lambda asked=asked: list(mllm.reply(mllm.builder([asked]), max_new_tokens=1)), mllm.device)
            if repeat:  # the first of each warms up
                seconds["kept", end].append(kept)
                seconds["again", end].append(again)
    measures: dict[str, Measure] = {}
    for number, end in enumerate(ends, start=1):
        if number & (number - 1) and number != args.turns:  # of many turns, the powers of 2 and the last
            continue
        kept, again = seconds["kept", end], seconds["again", end]
        measures[f"talking.turn_{number}.tokens"] = Measure(mllm.builder([turns[:end]]).ids.shape[1])
        measures[f"talking.turn_{number}.kept"] = spread(kept, "s")
        measures[f"talking.turn_{number}.again"] = spread(again, "s")
        ratios = [slow / fast for fast, slow in zip(kept, again, strict=True)]
        measures[f"talking.turn_{number}.ratio"] = spread(ratios, "x")
    show(f"the first token, {args.turns} turns, {args.pictures} of them with a picture", measures)
    if args.json is not None:
        record(args.json, measures)


def conversation(args: Talking) -> list[Turn]:
    """Questions and their right answers in alternation; each of the first `pictures` is about a picture of its own."""
    asked = exams(0, "val", args.turns, args.side)
    first = list({exam.picture.tobytes(): exam for exam in asked}.values())[: args.pictures]
    rest = [exam for exam in asked if exam not in first][: args.turns - len(first)]
    turns: list[Turn] = []
    for number, exam in enumerate([*first, *rest]):
        pictures = (exam.picture,) if number < args.pictures else ()
        turns += [Turn("user", exam.question.text, pictures), Turn("assistant", exam.question.answer)]
    return turns
