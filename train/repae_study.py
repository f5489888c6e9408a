"""What joint training is worth: the runs of configs/repae.py over the same pictures, with several seeds, side by side.

    python -m train.repae_study --json docs/measures/repae --plot docs/pictures/repae.png

vanilla, repa, joint (REPA-E), joint_ldm (a fresh SiT on the VAE that joint tuned) and naive (the control) take equally many
steps. Each figure is the mean over seeds with Student's 95 % interval. It goes on where it was stopped.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from sample.cli import run
from sample.measures import Measure, read_json, write_json
from train.child import child
from train.repae_plot import plot

ARMS = {
    "vanilla": "repae.world_vanilla",
    "repa": "repae.world_repa",
    "joint": "repae.world",
    "joint_ldm": "repae.world_ldm",
    "naive": "repae.world_naive",
}
AGAIN = "run the study again to go on from there"
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantiles of t by the number of seeds


@dataclass(frozen=True)
class Args:
    """Train and score every arm with every seed."""

    json: Path = Path("docs/measures/repae")
    """Folder for one file of measures per arm, of which `python -m sample.report` makes a table, and the logs."""
    out: Path = Path("runs/repae-study")
    """Where the runs lie."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """At least two; several processes can share them, and the last one to be run with all of them writes the table."""
    steps: int = 250
    """Optimizer steps of each run."""
    images: int = 300
    """Held-out pictures that each run is scored on."""
    plot: Path | None = None
    """Where to draw the losses and the scores; needs matplotlib."""


def main(argv: list[str] | None = None) -> None:
    """Trains, scores, and sets the arms side by side."""
    args = tyro.cli(Args, args=argv, description=Args.__doc__)
    if len(set(args.seeds)) < len(args.seeds) or len(args.seeds) > max(STUDENT):
        raise ValueError(f"seeds: give different ones, at most {max(STUDENT)}")
    for seed in args.seeds:
        for arm in ARMS:
            if not scores(arm, seed, args).is_file():
                train(arm, seed, args)
    if len(args.seeds) < 2:
        return
    args.json.mkdir(parents=True, exist_ok=True)
    for arm in ARMS:
        files = [scores(arm, seed, args) for seed in args.seeds]
        write_json(args.json / f"{arm}.json", over_seeds([read_json(file) for file in files]))
        for seed, file in zip(args.seeds, files, strict=True):
            shutil.copyfile(file.parent / "metrics.jsonl", args.json / f"{arm}-{seed}.metrics.jsonl")
    if args.plot is not None:
        plot(args.json, list(ARMS), args.plot)


def scores(arm: str, seed: int, args: Args) -> Path:
    """Where a run's scores lie: other steps are another run, other pictures other scores."""
    return args.out / f"{arm}-{seed}-{args.steps}" / f"scores-{args.images}.json"


def train(arm: str, seed: int, args: Args) -> None:
    """One run and its scores."""
    file = scores(arm, seed, args)
    folder = file.parent
    steps = ["--schedule.steps", f"{args.steps}", "--schedule.preview-every", f"{args.steps}"]
    steps += ["--task.perceptual.target.dtype", "float32"]  # as the figures in docs/ were made
    tuned = ["--task.vae.path", str(scores("joint", seed, args).parent / "release" / "vae")] if arm == "joint_ldm" else []
    child("train.run", ARMS[arm], "--out", str(folder), "--seed", f"{seed}", *steps, *tuned, remedy=AGAIN)
    scored = ["--release", f"{folder}/release", "--images", f"{args.images}", "--steps", "12"]
    child("sample.evaluate", "decoder", *scored, "--json", f"{file}", remedy=AGAIN)


def over_seeds(runs: list[dict[str, Measure]]) -> dict[str, Measure]:
    """The mean of each measure over runs, with Student's interval."""
    found = {}
    for name, first in runs[0].items():
        values = [measures[name].value for measures in runs]
        centre = statistics.fmean(values)
        off = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
        found[name] = Measure(centre, centre - off, centre + off, len(values), first.unit)
    return found


if __name__ == "__main__":
    sys.exit(run(main))
