"""Recipes -> a picture of how efficient their steps are on more and more GPUs, without overlap and with a full one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from model.files import write_whole

if TYPE_CHECKING:
    from train.scaling import Args, Recipe


def plot(recipes: Mapping[str, Recipe], args: Args, path: Path) -> None:
    """Writes a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    from train.scaling import fastest, shares

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib; pip install -e '.[plots]'") from error
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    worlds = [args.worlds[0]]
    while worlds[-1] * 2 <= args.worlds[-1]:
        worlds.append(worlds[-1] * 2)
    for axis, batch in zip(figure.subplots(1, 2, sharey=True), ("kept", "grown"), strict=True):
        for number, (name, recipe) in enumerate(recipes.items()):
            best = [fastest(recipe, args, world, shares(recipe, args, world)[batch]) for world in worlds]
            axis.plot(worlds, [b.compute / b.step for b in best], "o-", color=f"C{number}", label=f"{name}, no overlap")
            axis.plot(
                worlds, [b.compute / b.overlapped for b in best], "--", color=f"C{number}", label=f"{name}, full overlap"
            )
        axis.set(xscale="log", xlabel="GPUs", ylim=(0, 1.05), title=f"the batch is {batch}")
        axis.set_xticks(worlds, [str(world) for world in worlds], minor=False)
        axis.minorticks_off()
    figure.axes[0].set_ylabel("share of the step that computes")
    figure.axes[0].legend(fontsize=8)
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=110))
