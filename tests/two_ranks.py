"""Every case that needs two ranks, in one torchrun launch; `results` starts it once for all test files.

As `-m tests.two_ranks OUT` it is what each rank runs, and leaves OUT/rank0.json and OUT/rank1.json.
"""

import functools
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from tests import tiny, tiny_repae
from tests.toy import BATCH, CLIP_NORM, STEPS, Toy, advance, digest, rows, save
from train import checkpoint, run
from train.engine import KINDS, EngineConfig
from train.guard import GuardConfig
from train.loop import Schedule, fit
from train.metrics import MetricsConfig
from train.ranks import Ranks, start

ROOT = Path(__file__).parent.parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1")
SAVED_AT = 3
Stage = Literal[0, 1, 2, 3]
Precision = Literal["fp32", "autocast", "bf16"]
CASES: list[tuple[Stage, Precision]] = [
    (0, "fp32"),
    (1, "fp32"),
    (2, "fp32"),
    (3, "fp32"),
    (1, "autocast"),
    (2, "bf16"),
    (3, "autocast"),
]
ZERO_STAGES = (0, 1, 2, 3)
REPAE = [f"repae-{zero}-{accumulation}" for zero in ZERO_STAGES for accumulation in (1, 2)]
PROMPTED = "prompted-3-1"


def results() -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder of the launch, what rank 0 saw and what rank 1 saw."""
    out, done = launched()
    assert done.returncode == 0, done.stdout
    first, second = (json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1))
    return out, first, second


@functools.cache
def launched() -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder and how the launch ended; once, whether well or not."""
    out = Path(tempfile.mkdtemp(prefix="two-ranks-"))
    tiny.metaquery_config(out)
    tiny_repae.prompted_run(out, EngineConfig())
    command = ["timeout", "1200", *TORCHRUN, "--nproc_per_node=2", "-m", "tests.two_ranks", str(out)]
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    return out, subprocess.run(command, cwd=ROOT, stdout=pipe, stderr=both, text=True)


def tiny_run(parts: Path, out: Path, *overrides: str) -> list[str]:
    """Arguments of train.run: the shipped tiny run on the tiny MLLM and VAE below `parts`."""
    return [
        "metaquery.tiny",
        *("--task.model.mllm.path", str(parts / "mllm"), "--task.model.vae.path", str(parts / "vae")),
        *("--task.model.decoder.sit.latent-channels", "4", "--task.model.decoder.sit.latent-size", "8"),
        *("--task.model.decoder.sit.patch", "1", "--data.image-size", "16"),
        *("--out", str(out), *overrides),
    ]


def losses(out: Path) -> list[float]:
    """The losses in a run's metrics, step by step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def case(ranks: Ranks, out: Path, zero: Stage, precision: Precision) -> dict[str, Any]:
    """Straight run with a save and a look at the averages in the middle; resumed; moved; and with a NaN on rank 1."""
    config = EngineConfig(zero=zero, precision=precision, clip_norm=CLIP_NORM)
    task = Toy(ranks, config, accumulation=2)
    steps = advance(task, 0, SAVED_AT)
    path = save(task, out / f"{zero}-{precision}", SAVED_AT)
    with task.engine.averaged() as module:
        averages = {name: p.detach().float().tolist() for name, p in module.named_parameters() if p.requires_grad}
        answer = module(rows(range(4))[0]).tolist()
    steps += advance(task, SAVED_AT, STEPS)

    resumed = Toy(ranks, config, accumulation=2)
    checkpoint.load(path, resumed.engines, ranks)
    advance(resumed, SAVED_AT, STEPS)

    offload = replace(config, offload_optimizer=zero > 0)
    offloaded = Toy(ranks, offload, accumulation=2)
    offloaded_steps = advance(offloaded, 0, SAVED_AT)
    held = save(offloaded, out / f"offloaded-{zero}-{precision}", SAVED_AT)
    offloaded_steps += advance(offloaded, SAVED_AT, STEPS)
    again = Toy(ranks, offload, accumulation=2)
    checkpoint.load(held, again.engines, ranks)
    advance(again, SAVED_AT, STEPS)

    next_stage: dict[Stage, Stage] = {0: 1, 1: 2, 2: 3, 3: 0}
    moved = Toy(ranks, EngineConfig(zero=next_stage[zero], precision="fp32", clip_norm=CLIP_NORM))
    checkpoint.load(path, moved.engines, ranks)

    poisoned = Toy(ranks, config, poison=frozenset({2 * BATCH + 1}))  # an odd number: rank 1 alone sees it
    advance(poisoned, 0, 2)
    before = [tensor.tolist() for kind in KINDS for _, tensor in poisoned.engine.tensors(kind)]
    refused = advance(poisoned, 2, 3)[0]
    after = [tensor.tolist() for kind in KINDS for _, tensor in poisoned.engine.tensors(kind)]
    return {
        "losses": [step.loss for step in steps],
        "grad_norms": [step.grad_norm for step in steps],
        "straight": digest(task.engine),
        "resumed": digest(resumed.engine),
        "moved_losses": [step.loss for step in advance(moved, SAVED_AT, STEPS)],
        "offloaded_losses": [step.loss for step in offloaded_steps],
        "offloaded": digest(offloaded.engine),
        "offloaded_resumed": digest(again.engine),
        "averages": averages,
        "answer": answer,
        "objection": refused.objection,
        "refused": poisoned.engine.guard.refused,
        "unchanged": before == after,
        "goes_on": advance(poisoned, 3, 4)[0].objection is None,
    }


def diverging(ranks: Ranks, out: Path) -> dict[str, Any]:
    """A whole run that saves in the background and meets two batches with a NaN on rank 1 alone; then what a checkpoint says
    that rank 1 does not see."""
    guard = GuardConfig(stop_after=2, rollbacks=1)
    config = EngineConfig(zero=2, precision="fp32", guard=guard)
    task = Toy(ranks, config, poison=frozenset({2 * BATCH + 1, 3 * BATCH + 1}))
    schedule = Schedule(steps=STEPS, batch_size=BATCH, log_every=1, save_every=2)
    fit(task, schedule, seed=0, folder=out, config={}, resume="auto", metrics=MetricsConfig(), ranks=ranks)
    path = checkpoint.path_of(out / "checkpoints", STEPS)
    began, problem = time.monotonic(), ""
    try:
        checkpoint.load(path if ranks.first else out / "elsewhere", task.engines, ranks)
    except ValueError as error:
        problem = str(error)
    seconds, unlike = time.monotonic() - began, ""
    try:
        fit(
            Unlike(ranks, config),
            schedule,
            seed=0,
            folder=out.with_name("unlike"),
            config={},
            resume="auto",
            metrics=MetricsConfig(),
            ranks=ranks,
        )
    except ValueError as error:
        unlike = str(error)
    return {"digest": digest(task.engine), "problem": problem, "seconds": seconds, "unlike": unlike}


class Unlike(Toy):
    """Whose ranks read different data."""

    def reads(self) -> dict[str, str]:
        return {"data": f"shards of rank {self.ranks.rank}"}


def repae(ranks: Ranks, out: Path, name: str) -> dict[str, Any]:
    """REPA-E's three engines; rank 0 leaves their weights in OUT/NAME.pt."""
    kind, zero, accumulation = name.split("-")[0], *(int(part) for part in name.split("-")[1:])
    make = tiny_repae.repae_run if kind == "repae" else tiny_repae.prompted_run
    config = EngineConfig(zero=zero, precision="fp32", clip_norm=tiny_repae.CLIP_NORM)  # pyright: ignore[reportArgumentType]
    run = make(out, config, accumulation)
    task = tiny_repae.build(run, ranks)
    tiny_repae.advance(task, run)
    found = tiny_repae.weights(task)
    if ranks.first:
        torch.save(found, out / f"{name}.pt")
    return {"digest": "".join(digest(engine) for engine in task.engines.values())}


def main(out: Path) -> None:
    """What one rank does."""
    torch.set_num_threads(1)
    ranks = start(timeout_seconds=300)
    seen = {f"{zero}-{precision}": case(ranks, out, zero, precision) for zero, precision in CASES}
    seen["diverging"] = diverging(ranks, out / "diverging")
    seen |= {name: repae(ranks, out, name) for name in (*REPAE, PROMPTED)}
    for zero in ZERO_STAGES:
        assert run.train(run.parse(tiny_run(out, out / f"tiny-{zero}", "--engine.zero", str(zero))), ranks) == 0
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(seen))
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
