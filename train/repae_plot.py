"""The files of a study of joint training -> a picture: losses by step, and what each arm came to, with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from model.files import write_whole
from sample.measures import Measure, read_json

SHOWN = {
    "decoder.local_feature_distance": "local feature distance",
    "vae.psnr": "reconstruction PSNR, dB",
    "vae.spatial_variance": "spatial variance of raw latents",
}


def plot(folder: Path, arms: Sequence[str], path: Path) -> None:
    """Writes a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib; pip install -e '.[plots]'") from error
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    curves, *bars = figure.subplots(1, 1 + len(SHOWN))
    for number, arm in enumerate(arms):
        runs = [losses(file) for file in sorted(folder.glob(f"{arm}-*.metrics.jsonl"))]
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        means = [fmean(run[step] for run in runs) for step in steps]
        curves.plot(steps, means, label=arm, color=f"C{number}")
        low, high = ([pick(run[step] for run in runs) for step in steps] for pick in (min, max))
        curves.fill_between(steps, low, high, alpha=0.2, color=f"C{number}")
    curves.set(xlabel="step", ylabel="velocity loss in training", yscale="log")
    curves.legend(fontsize=8)
    scores = {arm: read_json(folder / f"{arm}.json") for arm in arms}
    for axis, (name, title) in zip(bars, SHOWN.items(), strict=True):
        found = [scores[arm][name] for arm in arms]
        axis.bar(range(len(arms)), [m.value for m in found], color=[f"C{n}" for n in range(len(arms))])
        axis.errorbar(range(len(arms)), [m.value for m in found], yerr=reach(found), fmt="none", ecolor="black", capsize=3)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(arms)), arms, rotation=30, fontsize=8)
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=110))


def losses(file: Path) -> dict[int, float]:
    """Step -> the logged loss of the velocity."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def reach(found: Sequence[Measure]) -> list[list[float]]:
    """How far each interval reaches below its value, and above."""
    return [
        [m.value - (m.value if m.low is None else m.low) for m in found],
        [(m.value if m.high is None else m.high) - m.value for m in found],
    ]
