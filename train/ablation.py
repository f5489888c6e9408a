"""What each part of the bridge is worth: the runs of configs/ablation.py, trained, scored and set side by side.

    python -m train.ablation --n 50 --json docs/measures/ablation

Every run that draws sees the same pictures with the same noise, and every run that is told the same captions, so that
losses of a kind can be compared digit by digit. It goes on where it was stopped: a run with a JSON file is done.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tyro

from sample.cli import run
from sample.measures import Measure, read_json, write_json
from train.child import child
from train.run import names, read
from train.tell import TellTaskConfig

AGAIN = "run the ablation again to go on from there"
LAST = 10  # log records at the end of a run whose mean loss is its figure


@dataclass(frozen=True)
class Args:
    """Train and score every run of configs/ablation.py."""

    json: Path = Path("docs/measures/ablation")
    """Folder for one file of measures per run, of which `python -m sample.report` makes a table, and its log."""
    out: Path = Path("runs/ablation")
    """Where the runs lie."""
    n: int = 50
    """Held-out prompts per category and run."""
    steps: int | None = None
    """Optimizer steps of each run in place of its own number."""
    runs: tuple[str, ...] = ()
    """Only these of them, such as `queries_4 unaligned`: several processes can share the work. Empty: all."""


def main(argv: list[str] | None = None) -> None:
    """Trains and scores, one run after the other."""
    args = tyro.cli(Args, args=argv, description=Args.__doc__)
    known = [name.removeprefix("ablation.") for name in names() if name.startswith("ablation.")]
    for variant in args.runs:
        if variant not in known:
            raise ValueError(f"runs: {variant!r} is unknown; choose from {', '.join(known)}")
    args.json.mkdir(parents=True, exist_ok=True)
    for variant in args.runs or known:
        scores = args.json / f"{variant}.json"
        if scores.is_file():
            continue
        folder = args.out / variant
        steps = [] if args.steps is None else ["--schedule.steps", str(args.steps)]
        child("train.run", f"ablation.{variant}", "--out", str(folder), *steps, remedy=AGAIN)
        drawn = folder / "scores.json"
        child(
            "sample.evaluate",
            "world",
            "--release",
            f"{folder}/release",
            "--n",
            f"{args.n}",
            "--images",
            "0",
            "--json",
            f"{drawn}",
            remedy=AGAIN,
        )
        shutil.copyfile(folder / "metrics.jsonl", args.json / f"{variant}.metrics.jsonl")
        write_json(scores, training(folder) | read_json(drawn))


def training(folder: Path) -> dict[str, Measure]:
    """A finished run's loss over its last log records (of drawing, or of being told), what its decoder knew of the shape
    at each point (where it was aligned), and the samples it saw. How long a step takes is train.benchmark's to measure,
    on a quiet machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    last = logged[-LAST:]
    knew = [line["shape_accuracy"] for line in last if "shape_accuracy" in line]
    told = isinstance(read(folder / "run.json").task, TellTaskConfig)
    return {
        "training.told_error" if told else "training.loss": Measure(fmean(line["loss"] for line in last), n=len(last)),
        **({"training.shapes_known": Measure(fmean(knew), n=len(knew), unit="share")} if knew else {}),
        "training.samples": Measure(logged[-1]["samples"]),
    }


if __name__ == "__main__":
    sys.exit(run(main))
