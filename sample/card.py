"""A published folder -> its model card, README.md: every figure is read from a file that lies in the folder."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from model.files import read_json
from sample.measures import Measure, interval_of, value_of
from sample.measures import read_json as read_measures
from sample.report import CONTROLS, section

ABOUT, RUN, METRICS, MEASURES, PICTURE = "publication.json", "run.json", "metrics.jsonl", "measures", "sample.png"
FORMAT, VERSION = "querybridge.publication", 1
KINDS = {"metaquery": "MetaQueryPipeline", "labelled": "SiTPipeline"}
"""What draws, and the class that diffusers loads it with."""
LAYOUTS, DTYPES = ("small", "diffusers"), ("as_trained", "bf16")
WEAKEST = 3  # shares that the limitations name
LEFT_OUT = CONTROLS | {"clip_cut_prompts"}
TOLD = (
    "name",
    "seed",
    "data.task",
    "data.image_size",
    "data.dropout",
    "schedule.steps",
    "schedule.batch_size",
    "optim.lr",
    "optim.weight_decay",
    "optim.warmup_steps",
    "ema.halflife_images",
    "engine.precision",
    "task.align",
    "task.init",
)
"""Settings of a run that its card tells, where the run has them."""


def read_about(folder: Path) -> dict[str, Any]:
    """What export says of a folder. ValueError where it was not export that wrote it."""
    about = read_json(folder / ABOUT)
    known = {"format": (FORMAT,), "version": (VERSION,), "kind": (*KINDS,), "layout": LAYOUTS, "dtype": DTYPES}
    for key, values in known.items():
        if not isinstance(about, dict) or about.get(key) not in values:
            raise ValueError(f"{folder / ABOUT}: {key} is none of {', '.join(map(str, values))}; export the release again")
    return about


def card(folder: Path) -> str:
    """The whole README.md. ValueError where publication.json is missing or no measures are in a file of measures."""
    about = read_about(folder)
    parts = (
        _front(about),
        _head(about),
        _loading(about),
        _contents(about),
        _training(folder),
        _measured(folder),
        _limits(folder, about),
    )
    return "\n".join(parts)


def _front(about: Mapping[str, Any]) -> str:
    """The YAML that the hub reads; values as JSON strings, which are YAML too."""
    bases = [part["path"] for part in about["base"].values() if part["hub"]]
    told = {"license": about["license"], "library_name": "diffusers" if about["layout"] == "diffusers" else "querybridge"}
    if bases:
        told["base_model"] = bases
    told |= {"pipeline_tag": about["task"], "tags": ["querybridge", about["kind"], about["layout"]]}
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in told.items()), "---", ""])


def _head(about: Mapping[str, Any]) -> str:
    what = {
        "metaquery": "Learned queries read a frozen multimodal LLM and tell a diffusion decoder what to draw.",
        "labelled": "A diffusion transformer that draws classes, with the autoencoder it was trained together with.",
    }
    picture = about["picture"]
    return (
        f"# {about['name']}\n\n{what[about['kind']]}\n\n![{picture['asked']}]({PICTURE})\n\n"
        f"*{picture['asked']}*: seed {picture['seed']}, {picture['steps']} steps, as `sample.publish check` draws it.\n"
    )


def _loading(about: Mapping[str, Any]) -> str:
    """What to type, for this layout."""
    kind, asked = about["kind"], about["picture"]["asked"]
    call = f"pipe({asked!r})" if kind == "metaquery" else "pipe(class_labels=[0])"
    if about["layout"] == "diffusers":
        dtype = ", dtype=torch.bfloat16" if about["dtype"] == "bf16" else ""
        lines = [
            *(["import torch"] if dtype else []),
            f"from sample.diffusers_pipeline import {KINDS[kind]}  # of querybridge, which has to be installed",
            f'pipe = {KINDS[kind]}.from_pretrained("."{dtype})',
            f"{call}.images[0].save('picture.png')",
        ]
        return "## How to load\n\n```python\n" + "\n".join(lines) + "\n```\n"
    command = (
        f'python -m sample.generate "{asked}" --release FOLDER'
        if kind == "metaquery"
        else "python -m sample.classes --release FOLDER"
    )
    return f"## How to load\n\n```\n{command}\npython -m sample.publish check FOLDER\n```\n"


def _contents(about: Mapping[str, Any]) -> str:
    """What was trained, and what it stands on."""
    lines = [
        "## What is inside",
        "",
        f"Trained: {about['trained']['parameters']:,} parameters in {about['trained']['tensors']} tensors.",
    ]
    if about["base"]:
        lines += ["", "| frozen part | from | revision | sha256 of its tensors | inside |", "|---|---|---|---|---|"]
        lines += [
            f"| {name} | {part['path']} | {part['revision'] or ''} | `{part['sha256']}` | {'yes' * part['here'] or 'no'} |"
            for name, part in about["base"].items()
        ]
    return "\n".join(lines) + "\n"


def _training(folder: Path) -> str:
    lines = ["## Training", ""]
    if not (folder / RUN).is_file():
        return "\n".join([*lines, "No run.json was given when this card was written.", ""])
    run = read_json(folder / RUN)
    sources = run.get("data", {}).get("sources", [])
    rows = [(name, _at(run, name)) for name in TOLD] + [("data.sources", source) for source in sources]
    lines += ["| setting | value |", "|---|---|"]
    lines += [f"| {name} | `{json.dumps(value)}` |" for name, value in rows if value is not None]
    if last := _last_metrics(folder / METRICS):
        lines += ["", "The last line of its metrics:", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in last.items()]
    return "\n".join(lines) + "\n"


def _measured(folder: Path) -> str:
    files = sorted((folder / MEASURES).glob("*.json"))
    if not files:
        return "## Measures\n\nNone were given when this card was written.\n"
    return "\n".join(section(path, read_measures(path)) for path in files)


def _limits(folder: Path, about: Mapping[str, Any]) -> str:
    """What follows from the settings and the measures."""
    side = about["image_size"]
    lines = ["## Limitations", "", f"- Trained at {side} x {side} pixels; other shapes come out as they may."]
    if about["kind"] == "metaquery":
        lines += [
            f"- A prompt has up to {about['max_text_tokens']} tokens.",
            "- The language model is frozen: what it does not tell apart is not drawn apart, and its biases are those of "
            "the pictures.",
        ]
    if about["base"]:
        lines.append("- The licences of the frozen parts hold beside the one above.")
    for name, measure in list(_weakest(folder))[:WEAKEST]:
        within = f" ({interval})" if (interval := interval_of(measure)) else ""
        lines.append(f"- Among the weakest that were measured: {name}, {value_of(measure)}{within}.")
    return "\n".join([*lines, "- What is not among the measures was not measured.", ""])


def _weakest(folder: Path) -> Iterator[tuple[str, Measure]]:
    """Shares from low to high, without controls and those of which less is better."""
    held = [item for path in sorted((folder / MEASURES).glob("*.json")) for item in read_measures(path).items()]
    shares = [(name, m) for name, m in held if m.unit == "share" and not LEFT_OUT & {*name.split(".")}]
    yield from sorted(shares, key=lambda item: item[1].value)


def _at(values: Any, name: str) -> Any:
    for key in name.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _last_metrics(path: Path) -> dict[str, float]:
    """Of the last line that reports a loss; events are passed over."""
    last: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        values = json.loads(line)
        if "event" not in values:
            last = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return last
