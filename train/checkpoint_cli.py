"""The command line of train/checkpoint.py.

    python -m train.checkpoint ls runs/world
    python -m train.checkpoint verify runs/world                                  # every byte of every checkpoint
    python -m train.checkpoint export runs/world/checkpoints/step-00000500 --out releases/world
    python -m train.checkpoint mean runs/first/release runs/second/release --out releases/mean

`export` writes the release that the run itself would write at that step, the averages of its weights. `mean` writes the mean
of a release and of what was trained on from it, which forgets less of what the first knew (Wortsman et al. 2022, "Robust
fine-tuning of zero-shot models"). Exit code 1 when a checkpoint is damaged.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from data.loader import World
from data.shards import Shards
from model import store
from model.files import check_match, check_new, parse_config
from train import checkpoint
from train.autoencoder import AutoencoderTaskConfig
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


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Write the mean of the weights of releases, each trained on from the one before."""

    releases: Positional[tuple[Path, ...]]
    """Their folders."""
    out: Path
    """The release folder to write."""


def main(argv: list[str] | None = None) -> None:
    """Runs the command. Raises ValueError for what is no checkpoint or release, SystemExit when one is damaged."""
    commands = {"ls": Ls, "verify": Verify, "export": Export, "mean": Mean}
    args = tyro.extras.subcommand_cli_from_dict(commands, args=argv, description=__doc__)
    if isinstance(args, Ls):
        listing(args.run)
    elif isinstance(args, Verify):
        verify(args.path)
    elif isinstance(args, Export):
        export(args.checkpoint, args.out)
    else:
        mean(args.releases, args.out)


def listing(run: Path) -> None:
    """One line for each checkpoint, oldest first."""
    table = Table("checkpoint", "step", "samples", "ranks", "ZeRO", "engines", "MB", title=f"{run}/checkpoints")
    for path in checkpoint.held(run / "checkpoints"):
        try:
            facts = checkpoint.manifest_of(path)
        except (ValueError, OSError) as error:
            table.add_row(path.name, f"{error}")
            continue
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
        except (ValueError, OSError) as error:
            damaged = True
            print(f"{error}", file=sys.stderr)
    if damaged:
        raise SystemExit(DAMAGED)


def export(path: Path, out: Path) -> None:
    """Builds the run that wrote the checkpoint, fills it, and has it write its release; only that of an autoencoder
    reads the run's shards, for its statistics."""
    check_new(out)
    manifest = checkpoint.verify(path)
    run = parse_config(Run, manifest.config, path / "manifest.json")
    if not isinstance(run.task, AutoencoderTaskConfig):
        sources = tuple(World() if isinstance(source, Shards) else source for source in run.data.sources)
        run = replace(run, data=replace(run.data, sources=sources))
    ranks = start(run.engine.timeout_seconds)
    task = run.build(ranks)  # what is drawn and stays as it was drawn is in no checkpoint
    checkpoint.load(path, task.engines, ranks)
    checkpoint.check_frozen(path, manifest, task.frozen())
    task.release(out)
    print(f"{out}: step {manifest.step:,}, {manifest.samples:,} samples")


def mean(releases: Sequence[Path], out: Path) -> None:
    """Of each tensor that they hold. Raises ValueError for releases of other shapes or settings."""
    check_new(out)
    if len(releases) < 2:
        raise ValueError("mean: there is nothing to take it of; name two releases or more")
    first, *others = (store.load(folder) for folder in releases)
    held = [first.own_tensors(), *(model.own_tensors() for model in others)]
    for folder, model, tensors in zip(releases[1:], others, held[1:], strict=True):
        check_match(tensors, held[0], folder)
        if model.config != first.config:
            raise ValueError(f"{folder} has other settings than {releases[0]}; name releases of one lineage")
    means = {name: torch.stack([t[name].float() for t in held]).mean(0).to(tensor) for name, tensor in held[0].items()}
    store.save(out, first, means)
    print(f"{out}: the mean of {len(held)} releases")
