"""Rebuilds what ships with the code: the embedded MLLM, VAE, SiT and bridge, each from the ones before it. The VAE is made
alone, then tuned together with the SiT (REPA-E), and both go on alone from there.

    python -m train.assets            # all of them; goes on where it was stopped
    python -m train.assets tell_all   # one of them, on top of those that are there

Every stage is an ordinary run under runs/assets/. Its release replaces the folder in assets/world/, and
assets/world/README.md records command, seed, steps, wall time, losses and last metrics, read from the run's own files.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from model.assets import ROOT
from model.files import atomic_folder, read_json, write_whole
from sample.cli import run
from train.child import child

WAY = 6  # stretches of a run whose mean losses its line shows
ASSETS, RUNS = ROOT / "assets" / "world", ROOT / "runs" / "assets"


@dataclass(frozen=True)
class Stage:
    """A run, the folder of assets/world that its release becomes (None: only the next stage reads it), and its options."""

    name: str
    run: str
    becomes: str | None
    options: tuple[str, ...] = ()


STAGES = (
    Stage("language", "understand.language", None),
    Stage("see", "understand.see", None, ("--task.init", "runs/assets/language/release")),
    Stage("align", "understand.align", None, ("--task.init", "runs/assets/see/release")),
    Stage("mllm", "understand.instruct", "mllm", ("--task.init", "runs/assets/align/release")),
    Stage("vae", "world.vae", "vae"),
    Stage("vae_decoder", "world.vae_decoder", "vae"),
    Stage("coarse", "world.coarse_decoder", None),
    Stage("sit", "world.decoder", None, ("--task.init", "runs/assets/coarse/release")),
    Stage("joint", "repae.decoder", None, ("--task.init", "runs/assets/sit/release")),
    Stage("tuned_vae", "world.vae_decoder", "tuned_vae", ("--task.init", "runs/assets/joint/release/vae")),
    Stage(
        "tuned",
        "world.tuned_decoder",
        "sit",
        ("--task.init", "runs/assets/joint/release/sit", "--task.vae.path", "runs/assets/joint/release/vae"),
    ),
    Stage("tell", "metaquery.tell", None),
    Stage("bridge", "metaquery.world", None, ("--task.init", "runs/assets/tell/release", "--optim.lr", "2e-4")),
    Stage("tell_all", "metaquery.tell_all", "release", ("--task.init", "runs/assets/bridge/release")),
)


def main(argv: list[str] | None = None) -> None:
    """Runs the named stages, or all."""
    wanted = sys.argv[1:] if argv is None else argv
    if wanted and wanted[0] in ("-h", "--help"):
        print(__doc__)
        return
    known = [stage.name for stage in STAGES]
    for word in wanted:
        if word not in known:
            raise ValueError(f"stage {word!r} is unknown; choose from {', '.join(known)}")
    for stage in STAGES:
        if not wanted or stage.name in wanted:
            make(stage)
    write_whole(ASSETS / "README.md", lambda path: path.write_text(report()))


def make(stage: Stage) -> None:
    """Runs one stage to its end and puts its release in place."""
    folder = RUNS / stage.name
    print(f"{stage.name}:", end=" ")
    remedy = f"see {folder}/metrics.jsonl, then run the same command again"
    child("train.run", stage.run, "--out", str(folder.relative_to(ROOT)), *stage.options, remedy=remedy, cwd=ROOT)
    keep(stage)


def keep(stage: Stage) -> None:
    """Puts the release of a stage that has run in place, and its log beside the assets."""
    folder = RUNS / stage.name
    if stage.becomes:
        with atomic_folder(ASSETS / stage.becomes) as draft:
            shutil.copytree(folder / "release", draft, dirs_exist_ok=True)
    for kept in ("run.json", "metrics.jsonl"):
        target = ASSETS / "logs" / f"{stage.name}.{kept}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / kept, target)


def report() -> str:
    """The README of assets/world, from the logs beside the assets: STAGE.*, and STAGE.1.* for an earlier round of it."""
    lines = [
        "# Shipped weights of the generated world",
        "",
        "Written by `python -m train.assets` (`make assets`) from the files in `logs/`; nothing here is typed by hand. The",
        "shipped weights came about in rounds, each going on from the one before: NAME.1 first, NAME last; what a round",
        "started from may be overwritten since. A setting that is newer than a log takes its default.",
        "`make assets` trains the stages in one round each, `language` and `align` too, which have no log here: `see.1`",
        "began with an earlier MLLM, whose own is not kept. `tell_all.11` began with the mean of the two before it:",
        "`python -m train.checkpoint mean runs/tell_9/release runs/tell_10/release --out runs/tell_mean`.",
        "",
        "| stage | command | goes on from | seed | steps | samples | wall time | loss on the way | last metrics |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for stage in STAGES:
        earlier = sorted((ASSETS / "logs").glob(f"{stage.name}.*.metrics.jsonl"), key=_round)
        lines += [_row(log) for log in (*earlier, ASSETS / "logs" / f"{stage.name}.metrics.jsonl") if log.is_file()]
    return "\n".join(lines) + "\n"


def _round(log: Path) -> int:
    return int(log.name.split(".")[1])


def _row(log: Path) -> str:
    name = log.name.removesuffix(".metrics.jsonl")
    path = log.with_name(f"{name}.run.json")
    settings = read_json(path)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    logged = [record for record in records if "step_seconds" in record]
    begun = before = records[0]["step"] if records[0].get("event") == "stopped" else 0  # where the round before it was
    seconds = 0.0
    for record in logged:
        seconds += record["step_seconds"] * (record["step"] - before)
        before = record["step"]
    steps, samples = before - begun, logged[-1]["samples"] * (before - begun) // before
    skipped = ("step", "samples", "lr", "images_per_second", "step_seconds", "data_seconds", "refused", "time")
    last = ", ".join(f"{k} {v:.4g}" for k, v in logged[-1].items() if k not in skipped and isinstance(v, int | float))
    losses = [record.get("loss", record.get("l1")) for record in logged]
    way = " ".join(f"{fmean(part):.3g}" for part in parts(losses, WAY))
    command = f"python -m train.run {path.relative_to(ROOT)}"
    return (
        f"| {name} | `{command}` | {settings['task'].get('init') or ''} | {settings['seed']} | {steps} | "
        f"{samples} | {seconds / 60:.0f} min | {way} | {last} |"
    )


def parts(values: list[float], count: int) -> list[list[float]]:
    """A list in `count` stretches of about equal length, or one for each value where there are fewer."""
    count = min(count, len(values))
    edges = [round(number * len(values) / count) for number in range(count + 1)]
    return [values[start:end] for start, end in pairwise(edges)]


if __name__ == "__main__":
    sys.exit(run(main))
