"""How many pictures a second our pipeline draws, by part, and against the plain way: `python -m train.benchmark drawing`.

The plain way reads the prompt anew for every picture and every branch of guidance: 2 n rows through the language model,
prefix and queries in one pass, nothing kept. Ours (sample/pipeline.py) reads each distinct prompt once, what all of them
begin with once per process, and hands the condition to all pictures. Both draw the same pictures (tests/test_benchmark.py)
with the same solver and decoder, of which the gain is the smaller part the more steps are taken. They take turns.

    python -m train.benchmark drawing --small --steps 4
    python -m train.benchmark drawing --config metaquery.large_sana --device cuda --steps 20 --precision bf16
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.metaquery import MetaQuery, blueprint
from model.prefix import Prefix
from model.store import load
from sample.guidance import Branch, Predict, guided
from sample.measures import Measure, show, spread
from sample.pipeline import Pipeline
from sample.settings import Drawing, Guidance
from sample.solver import solve
from train import stand_in
from train.machine import check_device, record, timed
from train.parts import blank_prefix
from train.plan import metaquery_of, shaped

PROMPT = "three big red circles to the left of a small blue square, above a green triangle and below two yellow stars"
EMPTY_TOKENS = 20
"""Of a prompt that says nothing, where prompts are numbers."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Time the drawing of pictures, whole and by part, against a fresh reading for each picture and branch."""

    release: Path = Path("assets/world/release")
    config: str | None = None
    """A run of configs, like metaquery.large_sana, at its full size on random weights; None: the release."""
    small: bool = False
    """The shapes of `train.stand_in` on random weights instead, a language model large beside its decoder."""
    prompt: str = PROMPT
    """What the release draws."""
    prefix_tokens: int = 128
    """Tokens of a prompt, instruction included, where weights are random and no tokenizer is there."""
    pictures: int = 4
    """Of a prompt; the parts are timed for one as well."""
    steps: int = 4
    guidance: float = 3.0
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of connector, decoder and VAE; the language model has its own."""
    repeats: int = 7
    """Timed drawings of each way."""
    json: Path | None = None
    """Where to write the measures."""


def drawn(args: Drawn) -> None:
    """Measures, prints and writes.

    Raises:
        ValueError: a size is below 1, there is nothing to guide, the run is no MetaQuery run, or the device is not there.
    """
    if min(args.prefix_tokens, args.pictures, args.repeats, args.steps) < 1 or args.guidance == 1:
        raise ValueError("give sizes, steps and repeats of at least 1, and a guidance other than 1, which has one branch")
    check_device(args.device)
    torch.manual_seed(0)
    model = build(args)
    seconds: dict[str, list[float]] = {}
    for repeat in range(args.repeats + 1):
        for way, draw in {"ours": ours, "plain": plain}.items():
            elapsed = timed(lambda draw=draw: draw(model, args, args.pictures), model.mllm.device)
            if repeat:  # the first of each warms up
                seconds.setdefault(way, []).append(elapsed)
    measures = {f"drawing.{way}.total": spread(elapsed, "s") for way, elapsed in seconds.items()}
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds["plain"], strict=True)]
    measures["drawing.ratio"] = spread(ratios, "x")
    for way in seconds:
        rate = args.pictures / measures[f"drawing.{way}.total"].value
        measures[f"drawing.{way}.rate"] = Measure(rate, n=args.repeats, unit="pictures/s")
    for count in sorted({1, args.pictures}):
        for part, work in parts(model, args, count).items():
            elapsed = [timed(work, model.mllm.device) for _ in range(args.repeats + 1)][1:]
            measures[f"drawing.{count}.{part}"] = spread(elapsed, "s")
    prefix = model.mllm.builder.draw([args.prompt]).ids.shape[1]
    measures["drawing.prefix_tokens"] = Measure(prefix)
    if args.device != "cpu":
        measures["drawing.peak_memory"] = Measure(torch.cuda.max_memory_allocated(), unit="B")
    drawer = args.config or ("small shapes" if args.small else args.release)
    where = f"{drawer} on {args.device}, {torch.get_num_threads()} thread(s)"
    show(f"{where}, {args.pictures} pictures of a prompt of {prefix} tokens, {args.steps} steps", measures)
    if args.json is not None:
        record(args.json, measures)


def build(args: Drawn) -> MetaQuery:
    """The release, or the run's model on random weights, with a builder of prefixes that say nothing."""
    if args.config is None and not args.small:
        model = load(args.release).place(args.device)
    else:
        model = _random(args)
        object.__setattr__(
            model.mllm, "builder", SimpleNamespace(draw=lambda *asked: blank(model, args, *asked), image_id=None)
        )
    if args.precision == "bf16":
        nn.Module.to(model, torch.bfloat16)
        nn.Module.to(model.vae.autoencoder, torch.bfloat16)
    return model.eval()


def _random(args: Drawn) -> MetaQuery:
    from train.run import parse

    if args.config is None:
        return stand_in.build(stand_in.Small(), args.device)
    return blueprint(shaped(metaquery_of(parse([args.config]))), args.device)


def blank(model: MetaQuery, args: Drawn, prompts: Sequence[str], images: Any = None) -> Prefix:
    """Prefixes of the lengths that prompts would have, padded from the left."""
    longest = args.prefix_tokens if any(prompts) else EMPTY_TOKENS
    lengths = tuple(args.prefix_tokens if prompt else EMPTY_TOKENS for prompt in prompts)
    with model.mllm.device:
        prefix = blank_prefix(model, longest, len(prompts))
        mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]  # [B, P]
    return replace(prefix, mask=mask, lengths=lengths)


def ours(model: MetaQuery, args: Drawn, count: int) -> Tensor:
    """Pixels [n, 3, H, W] of the prompt, one seed each; a pipeline that remembers nothing yet."""
    return Pipeline(model).draw([args.prompt] * count, range(count), Drawing(args.steps, Guidance(args.guidance)))


@torch.no_grad()
def plain(model: MetaQuery, args: Drawn, count: int) -> Tensor:
    """The same pixels."""
    rows = replace(model.mllm.builder.draw([""] * count + [args.prompt] * count), head=(), lengths=None)
    assert model.queries is not None
    if model.connector.config.looks:  # at what only a cache holds
        conditions = model.condition(rows)  # [2 n, Q, C]
    else:
        conditions = model.connector(model.mllm.read_full(rows, model.queries()))
    predict = guidance_of(model, args, *conditions.chunk(2))
    return model.vae.decode(solve(predict, noise(model, count), args.steps, model.noising))


def parts(model: MetaQuery, args: Drawn, count: int) -> dict[str, Callable[[], Any]]:
    """Our way cut up, for so many pictures of a prompt; `total` is all of it."""
    mllm, both = model.mllm, ["", args.prompt]
    prefixes = [mllm.builder.draw([prompt]) for prompt in both]
    with torch.no_grad():
        known = [mllm.prefill(prefix) for prefix in prefixes]
        empty, told = (model.condition(prefix).expand(count, -1, -1) for prefix in known)
    predict, x = guidance_of(model, args, empty, told), noise(model, count)
    t = torch.full((count,), 0.5, device=mllm.device)
    made: dict[str, Callable[[], Any]] = {
        "prefill": lambda: [mllm.prefill(mllm.builder.draw([prompt])) for prompt in both],
        "queries": lambda: [model.condition(prefix) for prefix in known],
        "step": lambda: predict(x, t),
        "steps": lambda: solve(predict, x, args.steps, model.noising),
        "decode": lambda: model.vae.decode(x),
        "total": lambda: ours(model, args, count),
    }
    return {name: torch.no_grad()(work) for name, work in made.items()}


def guidance_of(model: MetaQuery, args: Drawn, empty: Tensor, told: Tensor) -> Predict:
    """The guided prediction from two conditions [n, Q, C]."""
    branches = [Branch(1 - args.guidance, empty), Branch(args.guidance, told)]
    return guided(model.decoder, branches, Guidance(text=args.guidance))


def noise(model: MetaQuery, count: int) -> Tensor:
    """[n, c, h, w], as the pipeline draws it of seeds 0, 1, .."""
    rows = [torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    return torch.stack(rows).to(model.mllm.device)
