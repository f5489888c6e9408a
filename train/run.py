"""Entry point: a run by name -> its trained weights.

    python -m train.run metaquery.world --optim.lr 3e-4
    torchrun --nproc_per_node 8 -m train.run metaquery.world --engine.zero 2
    deepspeed --module train.run metaquery.world
    python -m train.run runs/world/run.json          # what an earlier run wrote
    python -m train.run metaquery.base_sana --plan --world 8   # parameters, memory and FLOP, before anything is read

The same command again goes on where the run stopped. `python -m train.run NAME --help` lists every setting.
Exit codes: 0 finished, 1 diverged, 2 bad input, 6 hung, 69 another rank lost, 75 stopped by a signal after saving.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import tyro

import configs
from data.loader import World
from data.shards import Shards
from model.files import did_you_mean, dump_config, parse_config, read_json
from sample import cli
from train.config import Run
from train.guard import Diverged
from train.loop import fit, interruptible
from train.optim import learning_rate
from train.ranks import Lost, Ranks, others_answer, start

DIVERGED, LOST, INTERRUPTED = 1, os.EX_UNAVAILABLE, os.EX_TEMPFAIL
PLAN = "--plan"


def main(argv: list[str] | None = None) -> None:
    """Train one run to its end. Raises ValueError for what the user can mend, SystemExit for the other exit codes."""
    words = sys.argv[1:] if argv is None else argv
    if PLAN in words:
        from train import plan

        return plan.main([word for word in words if word != PLAN])
    run = parse(words)
    try:
        with others_answer():
            ranks = start(run.engine.timeout_seconds)
            with interruptible() as interrupted:
                code = train(run, ranks, interrupted)
                ranks.leave()
    except Lost as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(LOST) from error
    if code:
        raise SystemExit(code)


def train(run: Run, ranks: Ranks, interrupted: Sequence[str] | None = None) -> int:
    """Train one run to its end, or to a signal (`interrupted`: as of `fit`). The exit code, the same on all ranks; raises
    ValueError for what the user can mend."""
    task = run.build(ranks)
    if ranks.first and run.optim.warmup_steps >= run.schedule.steps:
        reached = learning_rate(run.optim, run.schedule.steps - 1, run.schedule.steps)
        print(
            f"optim.warmup_steps is {run.optim.warmup_steps:,} and schedule.steps {run.schedule.steps:,}: the learning rate "
            f"only rises, to {reached:.2g}"
        )
    try:
        finished = fit(
            task,
            run.schedule,
            seed=run.seed,
            folder=run.folder,
            config=dump_config(run),
            resume=run.resume,
            metrics=run.metrics,
            ranks=ranks,
            watch=run.watch,
            allow_change=run.allow_change,
            interrupted=interrupted,
        )
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return DIVERGED
    return 0 if finished else INTERRUPTED


def parse(argv: list[str]) -> Run:
    """NAME or a run.json, then overrides. Raises ValueError for an unknown name or option."""
    argv = [word for word in argv if not word.startswith(("--local_rank=", "--local-rank="))]  # deepspeed's launcher
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nruns: {', '.join(names())}")
        raise SystemExit(0 if argv else 2)
    name, *overrides = argv
    default = _moved(Path(name)) if name.endswith(".json") else named(name)()
    run, unknown = tyro.cli(
        Run,
        default=default,
        args=overrides,
        prog=f"python -m train.run {name}",
        description=inspect.getdoc(named(name)) if not name.endswith(".json") else f"What {name} describes.",
        return_unknown_args=True,
        config=(tyro.conf.AvoidSubcommands,),
    )
    if unknown:
        known = {f"--{key.replace('_', '-')}" for key in leaves(dump_config(run))}
        word = unknown[0].split("=")[0].replace("_", "-")
        if _belongs_elsewhere(word, known):
            raise ValueError(f"option {unknown[0]} has no place in {name}: give its part in a config of your own (configs/)")
        raise ValueError(f"unknown option {unknown[0]}{did_you_mean(word, known)}")
    return run


def _belongs_elsewhere(option: str, known: set[str]) -> bool:
    """Whether it is an option of a part that the run lacks, or has of another kind."""
    part, _, name = option.rpartition(".")
    of_sources = {field.name.replace("_", "-") for kind in (Shards, World) for field in fields(kind)}
    of_a_source = part.rpartition(".")[0] == "--data.sources" and name in of_sources
    return of_a_source or any(option == each or option.startswith(f"{each}.") for each in known)


def _moved(path: Path) -> Run:
    """The run that a run.json describes; in the folder where it lies, when checkpoints lie beside it."""
    run = read(path)
    beside = path.parent.absolute()
    if (beside / "checkpoints").is_dir() and beside != run.folder.absolute():
        return replace(run, out=beside)
    return run


def read(path: Path) -> Run:
    """The run that a run.json describes. Raises ValueError for an unknown field or a wrong value."""
    return parse_config(Run, read_json(path), path)


def leaves(values: Any, prefix: str = "") -> list[str]:
    """The dotted names of all settings in a run's JSON; parts of a list by their place."""
    if isinstance(values, list) and values and isinstance(values[0], dict):
        values = {str(place): value for place, value in enumerate(values)}
    if isinstance(values, dict) and values:
        return [name for key, value in values.items() for name in leaves(value, f"{prefix}{key}.")]
    return [prefix.removesuffix(".")]


def named(name: str) -> Callable[[], Run]:
    """The function `configs.<module>.<function>` of "module.function". Raises ValueError when there is none."""
    module, _, function = name.partition(".")
    if module in _modules():
        found = _runs(module).get(function)
        if found:
            return found
    hint = did_you_mean(name, names()) or f"; there are {', '.join(names())}"
    raise ValueError(f"unknown run {name}{hint}")


def names() -> list[str]:
    """Every run there is, as "module.function"."""
    return [f"{module}.{function}" for module in _modules() for function in _runs(module)]


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(configs.__path__)]


def _runs(module: str) -> dict[str, Callable[[], Run]]:
    """The public functions that a module of configs defines, by name."""
    imported = importlib.import_module(f"configs.{module}")
    functions = inspect.getmembers(imported, inspect.isfunction)
    return {n: f for n, f in functions if f.__module__ == imported.__name__ and not n.startswith("_")}


if __name__ == "__main__":
    sys.exit(cli.run(main))
