"""The command line of train/checkpoint.py.

    python -m train.checkpoint ls runs/world
    python -m train.checkpoint verify runs/world                                  # every byte of every checkpoint
    python -m train.checkpoint export runs/world/checkpoints/step-00000500 --out releases/world

`export` writes the release that the run itself would write at that step, the averages of its weights. Exit code 1 when a
checkpoint is damaged.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from model.files import check_new, parse_config
from train import checkpoint
from train.config import Run
from train.ranks import start

DAMAGED = 1


@dataclass(frozen=True)
class Ls:
    """List the checkpoints of a run."""

    run: Positional[Path]
    """The folder of a run."""


@dataclass(frozen=True)
class Verify:
    """Compare every file with the hash that its checkpoint has of it."""

    path: Positional[Path]
    """The folder of a run, or one checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the release of a checkpoint."""

    checkpoint: Positional[Path]
    """Its folder."""
    out: Path
    """The release folder to write."""


def main(argv: list[str] | None = None) -> None:
    """Runs the command. Raises ValueError for what is no checkpoint, SystemExit when one is damaged."""
    args = tyro.extras.subcommand_cli_from_dict(
        {"ls": Ls, "verify": Verify, "export": Export}, args=argv, description=__doc__
    )
    if isinstance(args, Ls):
        listing(args.run)
    elif isinstance(args, Verify):
        verify(args.path)
    else:
        export(args.checkpoint, args.out)


def listing(run: Path) -> None:
    """One line for each checkpoint, oldest first."""
    table = Table("checkpoint", "step", "samples", "ranks", "ZeRO", "engines", "MB", title=f"{run}/checkpoints")
    for path in checkpoint.held(run / "checkpoints"):
        facts = checkpoint.manifest_of(path)
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        numbers = (f"{number:,}" for number in (facts.step, facts.samples, facts.world, facts.zero))
        table.add_row(path.name, *numbers, ", ".join(facts.counters), f"{size:,.1f}")
    if not table.row_count:
        raise ValueError(f"{run} has no checkpoints; name the folder of a run")
    Console().print(table)


def verify(path: Path) -> None:
    """Says of each checkpoint whether it is whole."""
    paths = [path] if (path / "manifest.json").is_file() else checkpoint.held(path / "checkpoints")
    if not paths:
        raise ValueError(f"{path} is neither a run with checkpoints nor a checkpoint; name one")
    damaged = False
    for each in paths:
        try:
            checkpoint.verify(each)
            print(f"{each}: whole")
        except ValueError as error:
            damaged = True
            print(f"{error}", file=sys.stderr)
    if damaged:
        raise SystemExit(DAMAGED)


def export(path: Path, out: Path) -> None:
    """Builds the run that wrote the checkpoint, fills it, and has it write its release."""
    check_new(out)
    manifest = checkpoint.verify(path)
    run = parse_config(Run, manifest.config, path / "manifest.json")
    ranks = start(run.engine.timeout_seconds)
    task = run.task.build(run, ranks)
    checkpoint.load(path, task.engines, ranks)
    checkpoint.check_frozen(path, manifest, task.frozen())
    task.release(out)
    print(f"{out}: step {manifest.step:,}, {manifest.samples:,} samples")
