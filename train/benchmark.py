"""How much faster and smaller the bridge's step is than the plain path, measured side by side in one run.

    python -m train.benchmark metaquery --prefix-tokens 256 --json speed.json

The plain path is the obvious way to train queries: as further rows of the token embeddings, which all get a gradient, and by
one pass over prefix and queries with a graph through the whole language model. Ours has a parameter of its own for the
queries, reads the prefix without a graph and runs only the queries with one (decisions 1 and 2 of the design). The model is
a Qwen2.5-VL of random weights; both paths compute the same gradients (tests/test_mllm.py). They take turns, so that whatever
else the machine does meets both.

`speed.flop_ratio` is what the matrix products alone would give, counted in both steps. What is missing from it is spent
where nothing is multiplied: norms, rotary positions, the growing cache; what is above it is memory that need not be moved.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from sample.cli import run
from sample.measures import Measure, show, write_json
from train.cost import flop, kept_bytes


@dataclass(frozen=True, kw_only=True)
class Metaquery:
    """Time a MetaQuery step and count the activations it keeps, against the plain path."""

    prefix_tokens: int = 256
    """Tokens before the queries."""
    queries: int = 64
    batch_size: int = 8
    width: int = 256
    layers: int = 8
    connector_layers: int = 2
    vocabulary: int = 32_000
    """Tokens of the language model, whose embeddings the plain path trains with the queries."""
    repeats: int = 7
    """Timed steps of each path."""
    json: Path | None = None
    """Where to write the measures."""


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark that the command line names."""
    metaquery(tyro.extras.subcommand_cli_from_dict({"metaquery": Metaquery}, args=argv))


def metaquery(args: Metaquery) -> None:
    """Measures, prints and writes.

    Raises:
        ValueError: a size is below 1.
    """
    if min(args.prefix_tokens, args.queries, args.batch_size, args.layers, args.repeats, args.vocabulary) < 1:
        raise ValueError("give sizes and repeats of at least 1")
    torch.manual_seed(0)
    step = build_step(args)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(args.repeats + 1):
        for plain in (False, True):
            began = time.perf_counter()
            step(plain).backward()
            if repeat:  # the first of each warms up
                seconds[plain].append(time.perf_counter() - began)
    ours, theirs = kept_bytes(lambda: step(False)), kept_bytes(lambda: step(True))
    ratios = [theirs / ours for ours, theirs in zip(seconds[False], seconds[True], strict=True)]
    measures = {
        "speed.step_ratio": Measure(statistics.median(ratios), min(ratios), max(ratios), args.repeats, "x"),
        "speed.step": _spread(seconds[False]),
        "speed.plain_step": _spread(seconds[True]),
        "speed.memory_saving": Measure(theirs / ours, n=1, unit="x"),
        "speed.activations": Measure(ours / 2**20, n=1, unit="MiB"),
        "speed.plain_activations": Measure(theirs / 2**20, n=1, unit="MiB"),
        "speed.flop_ratio": Measure(flop(lambda: step(True)) / flop(lambda: step(False)), n=1, unit="x"),
    }
    show(f"{args.prefix_tokens} prefix tokens, {args.queries} queries, {torch.get_num_threads()} thread(s)", measures)
    if args.json is not None:
        write_json(args.json, measures)


def build_step(args: Metaquery) -> Callable[[bool], Tensor]:
    """A function that runs one forward through language model, queries and connector, plainly or our way."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from model.connector import Connector, ConnectorConfig
    from model.mllm import MLLMConfig, NoBuilder
    from model.prefix import Prefix, PrefixBuilder
    from model.queries import Queries
    from model.qwen import Qwen2_5_VL

    heads = max(1, args.width // 64)
    half = args.width // heads // 2
    side = 3 * half // 8
    text = dict(
        vocab_size=args.vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rope_parameters=dict(rope_type="default", mrope_section=[half - 2 * side, side, side], rope_theta=1e4),
    )
    vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=args.width)
    stock = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    mllm = Qwen2_5_VL(MLLMConfig("benchmark", dtype="float32"), stock, cast(PrefixBuilder, NoBuilder))
    queries = Queries(args.queries, args.width, mllm.embedding_std)
    connector = Connector(ConnectorConfig(layers=args.connector_layers), args.width, args.width, 1.0)
    ids = torch.randint(10, 900, (args.batch_size, args.prefix_tokens))
    positions = torch.arange(args.prefix_tokens).expand(3, args.batch_size, -1)
    prefix = Prefix(ids, torch.ones_like(ids, dtype=torch.bool), positions)

    embeddings: Any = stock.get_input_embeddings()
    table = nn.Parameter(torch.cat([embeddings.weight.detach(), queries.vectors.detach()]))  # [V + Q, D]
    rows = torch.arange(args.vocabulary, len(table))

    def step(plain: bool) -> Tensor:
        states = mllm.read_full(prefix, F.embedding(rows, table)) if plain else mllm.read(prefix, queries())
        return connector(states).square().mean()

    return step


def _spread(seconds: list[float]) -> Measure:
    return Measure(statistics.median(seconds), min(seconds), max(seconds), len(seconds), "s")


if __name__ == "__main__":
    sys.exit(run(main))
