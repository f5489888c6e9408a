"""Rows C7 and C8: a run goes on from a checkpoint, on as many ranks at the same ZeRO stage, or on others at another."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from model.files import read_json, write_json
from tests.chaos.processes import launch, wait
from tests.chaos.rows import Outcome, row
from tests.toy import CLIP_NORM, STEPS, Toy, advance, digest, save
from train import checkpoint
from train.engine import EngineConfig
from train.ranks import Ranks, start

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = get_args(Stage)
WORLDS = (1, 2, 4)
SAVED_AT = STEPS // 2
LIMIT = 1e-6


class Recorded(Toy):
    """Remembers the samples of each micro-batch."""

    seen: list[int]

    def step(self, batch):
        self.seen = [*getattr(self, "seen", []), *batch]
        return super().step(batch)


def config(zero: Stage) -> EngineConfig:
    """float32 throughout."""
    return EngineConfig(zero=zero, precision="fp32", clip_norm=CLIP_NORM)


def run(task: Recorded, ranks: Ranks) -> dict[str, list]:
    """The steps after the save: their losses, and the samples of each over all ranks."""
    task.seen = []
    steps = advance(task, SAVED_AT, STEPS)
    count = len(task.seen) // len(steps)
    mine = [task.seen[at : at + count] for at in range(0, len(task.seen), count)]
    everyone = ranks.gather(mine)
    return {
        "losses": [step.loss for step in steps],
        "samples": [sorted(n for own in everyone for n in own[step]) for step in range(len(steps))],
    }


def straight(rank: int, folder: Path, stages: Iterable[Stage]) -> None:
    """Each stage from the start to the end, saved on the way; and the same resumed."""
    ranks, found = start(60), {}
    for zero in stages:
        task = Recorded(ranks, config(zero))
        advance(task, 0, SAVED_AT)
        path = save(task, folder / f"{ranks.world}-{zero}", SAVED_AT)
        found[zero] = run(task, ranks)
        resumed = Recorded(ranks, config(zero))
        checkpoint.load(path, resumed.engines, ranks)
        again = run(resumed, ranks)
        found[zero] |= {"bitwise": again == found[zero] and digest(task.engine) == digest(resumed.engine)}
    if ranks.first:
        write_json(folder / f"straight-{ranks.world}.json", found)


def moved(rank: int, folder: Path, stages: Iterable[Stage]) -> None:
    """Each stage from the checkpoints of every number of ranks at every stage."""
    ranks, found = start(60), {}
    for zero in stages:
        task = Recorded(ranks, config(zero))
        for path in sorted(folder.glob("?-?/step-*")):
            checkpoint.load(path, task.engines, ranks)
            found[f"{path.parent.name} {ranks.world}-{zero}"] = run(task, ranks)
    if ranks.first:
        write_json(folder / f"moved-{ranks.world}.json", found)


@row(
    "C7", "resumed on as many ranks", "losses, weights, moments, averages and data are those of a run that went through",
    "bit for bit", trials=12, fast=2,
)  # fmt: skip
def same_world(trials: int, folder: Path) -> Outcome:
    """3 + 3 steps against 6, at every ZeRO stage on 1, 2 and 4 ranks."""
    outcome = Outcome()
    worlds = (2,) if trials < 12 else WORLDS
    stages: tuple[Stage, ...] = (1, 3) if trials < 12 else STAGES
    for world in worlds:
        codes = wait(launch(world, partial(straight, folder=folder, stages=stages), folder / "log"), 120)
        assert codes == [0] * world, codes
        for zero, found in read_json(folder / f"straight-{world}.json").items():
            outcome.add(found["bitwise"], f"{world} rank(s) at ZeRO {zero}: the resumed run differs")
    return outcome


@row(
    "C8", "resumed on other ranks, at another ZeRO stage", "the same batches, the same losses",
    "losses within 1e-6 (fp32)", trials=144, fast=4,
)  # fmt: skip
def other_world(trials: int, folder: Path) -> Outcome:
    """3 steps on one number of ranks at one stage, the next 3 on another; against the run that stayed."""
    outcome = Outcome()
    worlds = (1, 2) if trials < 144 else WORLDS
    stages: tuple[Stage, ...] = (1,) if trials < 144 else STAGES
    for work in (straight, moved):
        for world in worlds:
            codes = wait(launch(world, partial(work, folder=folder, stages=stages), folder / "log"), 200)
            assert codes == [0] * world, codes
    stayed = {
        f"{world}-{zero}": found for world in worlds for zero, found in read_json(folder / f"straight-{world}.json").items()
    }
    off: dict[tuple[str, str], float] = {}
    for world in worlds:
        for name, found in read_json(folder / f"moved-{world}.json").items():
            before, after = name.split()
            apart = max(abs(a - b) for a, b in zip(found["losses"], stayed[before]["losses"], strict=True))
            alike = found["samples"] == stayed[before]["samples"]
            off[before, after] = apart
            outcome.add(
                alike and apart <= LIMIT, f"{before} to {after} (ranks-ZeRO): losses {apart:.1e} apart, batches {alike}"
            )
    outcome.seen = f"largest difference {max(off.values()):.1e}"
    outcome.table = _table(off)
    return outcome


def _table(off: dict[tuple[str, str], float]) -> list[list[str]]:
    """The largest difference of losses by ranks, over stages; and by stages, over ranks."""
    by_ranks: dict[str, list[float]] = {}
    by_stage: dict[str, list[float]] = {}
    for (before, after), apart in off.items():
        (ranks, stage), (other_ranks, other_stage) = before.split("-"), after.split("-")
        if ranks != other_ranks:
            by_ranks.setdefault(f"{ranks} to {other_ranks} ranks, all ZeRO stages", []).append(apart)
        if stage != other_stage:
            by_stage.setdefault(f"ZeRO {stage} to {other_stage}, all numbers of ranks", []).append(apart)
    moves = sorted(by_ranks.items()) + sorted(by_stage.items())
    head = ["mid-run", "moves", "largest difference of the losses after", "batches"]
    return [head, *([name, str(len(each)), f"{max(each):.1e}", "the same"] for name, each in moves)]
