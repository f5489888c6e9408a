"""Steps that are refused -> the run from its last checkpoint on, past the samples that it came upon; or its end.

A single bad batch costs its step. Refused steps in a row say that the state itself leads nowhere: the step goes back to the
last checkpoint, the data does not, so that what follows is another way. All ranks see the same refusals and go together.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from train import checkpoint
from train.guard import Diverged
from train.metrics import Metrics
from train.ranks import Ranks
from train.task import Task

Skipped = list[tuple[int, int]]
"""The first and the last sample number of each window that was skipped."""


def refusals(task: Task, log: Metrics, step: int, samples: int, batch_size: int) -> str | None:
    """Log which engines refused this step, which began at sample number `samples`; says when that does not end."""
    endless = None
    for name, engine in task.engines.items():
        if engine.last is None or engine.last.objection is None:
            continue
        log.event(
            step, "refused", engine=name, reason=engine.last.objection, samples=f"{samples}-{samples + batch_size - 1}"
        )
        if engine.guard.in_a_row >= engine.config.guard.stop_after:
            endless = f"{engine.guard.in_a_row} steps in a row were refused up to step {step} ({engine.last.objection})"
    return endless


def roll_back(
    task: Task, root: Path, step: int, samples: int, skipped: Skipped, why: str, log: Metrics, ranks: Ranks
) -> checkpoint.Manifest:
    """Fill the engines from the newest valid checkpoint below `root`, whose manifest then says that the next sample is
    number `samples`, to whoever starts from it later. Every rank calls it, with no save under way, after `step` steps.

    Raises `Diverged` when that was done as often as `guard.rollbacks` allows, or there is no checkpoint.
    """
    allowed = max(engine.config.guard.rollbacks for engine in task.engines.values())
    path = checkpoint.find(root, "auto", ranks, log.console.print) if len(skipped) < allowed else None
    if path is None:
        before = f", after {len(skipped)} rollbacks" if skipped else ""
        raise Diverged(
            f"{why}{before}; lower optim.lr or look at these samples, then run again to go on from the last checkpoint"
        )
    manifest = checkpoint.load(path, task.engines, ranks)
    for engine in task.engines.values():
        engine.guard.in_a_row = 0
    window = (manifest.samples, samples - 1)
    manifest = replace(
        manifest,
        samples=samples,
        counters={name: engine.counters() for name, engine in task.engines.items()},
        skipped=[*skipped, window],
    )
    checkpoint.on_first(ranks, lambda: checkpoint.rewrite(path, manifest))
    checkpoint.set_aside(root, manifest.step, ranks)
    log.rewind(manifest.step)
    log.event(manifest.step, "rolled back", from_step=step, skipped=f"{window[0]}-{window[1]}", reason=why)
    return manifest
