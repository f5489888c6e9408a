"""The main job in a few minutes: train a bridge, draw before and after, score it, ask the MLLM about a picture.

    python -m train.demo              # make demo

Everything it writes lies in demo/: the run with its checkpoints and release, before-and-after.png, metrics.json.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image
from rich.console import Console

from model.files import write_whole
from sample.cli import run
from train.child import child


@dataclass(frozen=True)
class Args:
    """Train the bridge of the embedded default for a few minutes and show what it learned."""

    out: Path = Path("demo")
    """Where everything goes; an interrupted demo goes on from there."""
    tell: int = 600
    """Optimizer steps of 64 captions that teach the bridge its decoder's language."""
    steps: int = 40
    """Optimizer steps of 64 pictures after them."""
    n: int = 20
    """Held-out prompts per category to score."""


def main(argv: list[str] | None = None) -> None:
    """Runs the demo from start to end."""
    args = tyro.cli(Args, args=argv, description=Args.__doc__)
    console = Console()
    console.rule("1. train queries and connector on the generated world (DeepSpeed, CPU)")
    told = args.out / "told"
    _train("metaquery.tell", told, args.tell, "--optim.warmup-steps", "20", "--ema.halflife-images", "1000")
    _train("metaquery.demo", args.out / "run", args.steps, "--task.init", str(told / "release"))
    show(args, console)


def _train(name: str, out: Path, steps: int, *options: str) -> None:
    remedy = f"see {out}/metrics.jsonl, then run the demo again"
    child("train.run", name, "--out", str(out), "--schedule.steps", str(steps), *options, remedy=remedy)


def show(args: Args, console: Console) -> None:
    """Draws, scores and asks with the release that the training left."""
    import torch

    from data.world.render import render
    from model.metaquery import build
    from model.prefix import Turn
    from sample.grid import Cell, Row, table
    from sample.measures import show as show_measures
    from sample.measures import write_json
    from sample.pipeline import Pipeline
    from sample.world_drawing import drawing, judge
    from sample.world_suite import suite

    release = args.out / "run" / "release"
    pipeline = Pipeline.from_release(release)
    console.rule("2. held-out prompts, before and after")
    asked = suite(seed=0, split="val", per_category=args.n)
    torch.manual_seed(0)
    untrained = Pipeline(build(pipeline.model.config, pipeline.model.mllm, pipeline.model.vae))
    shown = [one for category in ("single_object", "count", "position", "binding") for one in _first(asked, category, 2)]
    seeds = list(range(len(shown)))
    texts = [one.text for one in shown]
    columns = [judge(shown, drawer(texts, seeds)) for drawer in (untrained, pipeline)]
    rows = [
        Row(one.text, (Cell(before.picture, before.right), Cell(after.picture, after.right)))
        for one, before, after in zip(shown, *columns, strict=True)
    ]
    picture = table(("before", "after"), rows)
    write_whole(args.out / "before-and-after.png", lambda path: picture.save(path, "PNG"))

    console.rule("3. scores by the pixel reader")
    measures, _ = drawing(pipeline, asked)
    show_measures(str(release), measures, console)
    write_json(args.out / "metrics.json", measures)

    console.rule("4. the same frozen MLLM looks at a held-out picture")
    scene = asked[-1].scene
    looked_at = Image.fromarray(render(scene, 64))
    write_whole(args.out / "asked-about.png", lambda path: looked_at.resize((256, 256), 0).save(path, "PNG"))
    for question in ("Describe the image.", "How many objects are there?"):
        turns = (Turn("user", question, (looked_at,)),)
        mllm = pipeline.model.mllm
        console.print(f"  {question} [bold]{''.join(mllm.reply(mllm.builder([turns]), max_new_tokens=48))}[/bold]")

    console.rule("where things are")
    for what, name in (
        ("before and after", "before-and-after.png"),
        ("scores", "metrics.json"),
        ("release", "run/release"),
        ("training log", "run/metrics.jsonl"),
        ("the picture asked about", "asked-about.png"),
    ):
        console.print(f"  {what}: {args.out / name}")
    console.print(f'  draw more: python -m sample.generate --release {release} "a red circle left of a blue square"')


def _first(asked: list, category: str, n: int) -> list:
    return [one for one in asked if one.category == category][:n]


if __name__ == "__main__":
    sys.exit(run(main))
