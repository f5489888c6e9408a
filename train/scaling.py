"""Recipes -> how their training scales: the fastest setting on so many GPUs, where it should change, and what the MLLM's
place outside the engine saves. A calculation; what it rests on is measured by train.traffic and counted by train.plan.

    python -m train.scaling metaquery.base_sana metaquery.xlarge_sana --json docs/measures/scaling \\
        --plot docs/pictures/scaling.png
    python -m sample.report docs/scaling.md "How training scales" docs/measures/scaling docs/measures/traffic

A step takes its FLOP at a stated share of the GPU's peak, and its collectives (train/collectives.py) by rings: after each
other, or, with full overlap, the longer of the two; and never less than its data take to read. Of ZeRO 1 to 3 and all
micro-batches that divide a rank's pictures, the fastest that fits the memory is taken; of equal ones the lower stage and
fewer micro-batches. The batch is kept (the recipe's, over more GPUs) or grown (a GPU's share stays as on the fewest).
Not in it: the optimizer's own time, launches, stragglers, and that small micro-batches use a GPU less well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch
import tyro
from torch import nn
from tyro.conf import Positional

from model.decoder import DiffusersDecoderConfig
from model.metaquery import MetaQuery, blueprint
from sample import cli
from sample.measures import Measure, show, write_json
from train.collectives import Load, Network, messages, payload
from train.config import Run
from train.plan import GRADIENT_BYTES, activation_bytes, flops, memory, metaquery_of, shaped, unchecked

STAGES = (1, 2, 3)  # 0 trains in float32 alone
MASTERS = 12  # bytes of a trained weight in a checkpoint of DeepSpeed's: float32, and AdamW's two moments


@dataclass(frozen=True, kw_only=True)
class Args:
    """Calculate how recipes scale."""

    recipes: Positional[tuple[str, ...]]
    """Runs like metaquery.base_sana."""
    worlds: tuple[int, ...] = (8, 64, 512)
    """Numbers of GPUs; the first holds the recipe's batch where the batch is grown with them."""
    network: Network = field(default_factory=Network)
    peak_tflops: float = 989.0
    """10^12 FLOP per second of a GPU: an H100 in bfloat16, dense."""
    utilisation: float = 0.4
    """Share of the peak that the FLOP of a step reach."""
    memory_gb: float = 80.0
    reserve: float = 0.1
    """Share of the memory left to buckets, gathered weights and fragments."""
    storage_gbytes: float = 2.0
    """GB/s that a node reads."""
    picture_bytes: int = 100_000
    """Of a picture in its shard."""
    prefix_tokens: int = 150
    json: Path | None = None
    """Folder to write a file for each recipe to."""
    plot: Path | None = None
    """Where to draw the efficiencies; needs matplotlib."""


def main(argv: list[str] | None = None) -> None:
    """Calculates, prints and writes.

    Raises:
        ValueError: a run is no MetaQuery run, a number is impossible, or nothing fits the memory.
    """
    from train.run import named
    from train.scaling_plot import plot

    args = checked(tyro.cli(Args, args=argv, description=__doc__))
    recipes = {name.rpartition(".")[2]: Recipe(named(name)(), args.prefix_tokens) for name in args.recipes}
    found = {name: measures(recipe, args) for name, recipe in recipes.items()}
    for name, each in found.items():
        show(f"{name}, {args.peak_tflops:g} TFLOP/s at {args.utilisation:.0%}, {args.memory_gb:g} GB", each)
        if args.json is not None:
            write_json(args.json / f"{name}.json", each)
    if args.plot is not None:
        plot(recipes, args, args.plot)


def checked(args: Args) -> Args:
    """The same. ValueError for a number that cannot be."""
    for name in ("peak_tflops", "utilisation", "memory_gb", "storage_gbytes", "picture_bytes", "prefix_tokens"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give a number above 0")
    if not args.recipes or not args.worlds or min(args.worlds) < 1:
        raise ValueError("name at least one recipe, and give --worlds of at least 1")
    if args.utilisation > 1 or not 0 <= args.reserve < 1:
        raise ValueError("--utilisation is at most 1, and --reserve lies from 0 to below 1; give such shares")
    return args


class Recipe:
    """What a run takes, by train.plan."""

    def __init__(self, run: Run, prefix_tokens: int) -> None:
        config = shaped(metaquery_of(run))
        self.run, self.width, self.batch = run, GRADIENT_BYTES[run.engine.precision], run.schedule.batch_size
        self.model = blueprint(config)
        if run.engine.precision == "bf16":
            nn.Module.to(self.model, torch.bfloat16)
        self.activations = sum(activation_bytes(self.model, prefix_tokens).values())  # bytes of a picture
        counted = flops(blueprint(unchecked(config)), prefix_tokens)
        self.flop, self.encoding = sum(counted.values()), counted["vae"]
        self.latent_bytes = 2 * prod(self.model.latent_shape)  # as data.precompute keeps them
        mllm = self.model.mllm.model
        self.mllm = sum(p.numel() for p in mllm.parameters())
        self.table: int = mllm.get_input_embeddings().weight.numel()
        self.layers = sum(p.numel() for p in mllm.get_decoder().parameters()) - self.table
        self.load = load_of(self.model, self.width)

    @property
    def official_load(self) -> Load:
        """Of an engine that holds the MLLM too, its embeddings trained with the queries."""
        return replace(self.load, trained=self.load.trained + self.table, frozen=self.layers)

    def held(self, zero: int, world: int, official: bool = False) -> float:
        """Bytes on a rank, activations aside."""
        engine = replace(self.run.engine, zero=zero)  # pyright: ignore[reportArgumentType]
        kinds = memory(self.model, engine, world)
        state = sum(kinds[kind] for kind in ("weights", "gradients", "optimizer")) / self.load.trained
        shared = self.mllm * self.width * (1 - 1 / world) if zero == 3 else 0
        inside = (state - self.width / (world if zero == 3 else 1)) * self.table - shared  # its weights are in the MLLM's
        return sum(kinds.values()) + (inside if official else 0)


def load_of(model: MetaQuery, width: int) -> Load:
    """What trains of a model, and what of that lies in blocks that are computed again."""
    config, again = model.config, 0
    if config.connector.activation_checkpointing:
        again += _again(model.connector)
    if isinstance(config.decoder, DiffusersDecoderConfig) and config.decoder.activation_checkpointing:
        again += _again(model.decoder)
    return Load(sum(p.numel() for p in model.parameters() if p.requires_grad), width, again)


def _again(module: nn.Module) -> int:
    """Trained weights that are gathered once more for the blocks of a module's outermost stacks: computing a block again
    stops within its last layer, whose weights then stay for the way back."""
    count = 0
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            for block in child:
                last = [layer for layer in block.modules() if [*layer.parameters(recurse=False)]][-1]
                stay = {id(p) for p in last.parameters(recurse=False)}
                count += sum(p.numel() for p in block.parameters() if p.requires_grad and id(p) not in stay)
        else:
            count += _again(child)
    return count


@dataclass(frozen=True)
class Setting:
    """One way to take a step, and its seconds."""

    zero: int
    accumulation: int
    memory: float
    """Bytes on a rank."""
    compute: float
    collective: float
    data: float

    @property
    def step(self) -> float:
        """Compute and collectives one after the other; data are read meanwhile."""
        return max(self.compute + self.collective, self.data)

    @property
    def overlapped(self) -> float:
        """All at once."""
        return max(self.compute, self.collective, self.data)


def settings(recipe: Recipe, args: Args, world: int, pictures: int, official: bool = False) -> Iterator[Setting]:
    """All that fit the memory, for so many pictures of a rank in a step."""
    load = recipe.official_load if official else recipe.load
    near = min(world, args.network.gpus_per_node)
    data = pictures * near * args.picture_bytes / (args.storage_gbytes * 1e9)
    compute = pictures * recipe.flop / (args.peak_tflops * 1e12 * args.utilisation)
    for zero in STAGES:
        state = recipe.held(zero, world, official)
        for accumulation in (a for a in range(1, pictures + 1) if pictures % a == 0):
            held = state + pictures // accumulation * recipe.activations
            if held <= args.memory_gb * 1e9 * (1 - args.reserve):
                given = payload(load, zero, accumulation)
                collective = args.network.seconds(given, messages(given, load.width, zero, accumulation), world)
                yield Setting(zero, accumulation, held, compute, collective, data)


def fastest(recipe: Recipe, args: Args, world: int, pictures: int) -> Setting:
    """The one to take, without overlap. ValueError where none fits."""
    found = quickest(recipe, args, world, pictures)
    if found is None:
        raise ValueError(
            f"nothing of {recipe.run.name} fits {args.memory_gb:g} GB on {world} GPUs; give more --memory-gb or --worlds"
        )
    return found


def quickest(
    recipe: Recipe, args: Args, world: int, pictures: int, official: bool = False, zero: int | None = None
) -> Setting | None:
    """The same, of one stage where it is given; None where none fits."""
    fit = [each for each in settings(recipe, args, world, pictures, official) if zero in (None, each.zero)]
    return min(fit, key=lambda each: (each.step, each.zero, each.accumulation), default=None)


def shares(recipe: Recipe, args: Args, world: int) -> dict[str, int]:
    """Pictures of a rank in a step: of the recipe's batch, and of a batch that grows with the ranks."""
    for ranks in (world, args.worlds[0]):
        if recipe.batch % ranks:
            raise ValueError(
                f"the batch {recipe.batch} of {recipe.run.name} does not divide into --worlds {ranks}; give divisors"
            )
    return {"kept": recipe.batch // world, "grown": recipe.batch // args.worlds[0]}


def measures(recipe: Recipe, args: Args) -> dict[str, Measure]:
    """All that docs/scaling.md shows of a recipe."""
    network = args.network
    found = {
        "assumed.peak": Measure(args.peak_tflops * 1e12, unit="FLOP/s"),
        "assumed.utilisation": Measure(args.utilisation, unit="share"),
        "assumed.memory": Measure(args.memory_gb * 1e9, unit="B"),
        "assumed.reserve": Measure(args.reserve, unit="share"),
        "assumed.gpus_per_node": Measure(network.gpus_per_node),
        "assumed.within_node": Measure(network.nvlink_gbytes * 1e9, unit="B/s"),
        "assumed.within_node.latency": Measure(network.nvlink_us * 1e-6, unit="s"),
        "assumed.between_nodes": Measure(network.between_nodes, unit="B/s"),
        "assumed.between_nodes.latency": Measure(network.nic_us * 1e-6, unit="s"),
        "assumed.storage_of_node": Measure(args.storage_gbytes * 1e9, unit="B/s"),
        "assumed.picture": Measure(args.picture_bytes, unit="B"),
        "recipe.trained": Measure(recipe.load.trained),
        "recipe.picture.flop": Measure(recipe.flop, unit="FLOP"),
        "recipe.latents.bytes_saved": Measure(1 - recipe.latent_bytes / args.picture_bytes, unit="share"),
        "recipe.latents.flop_saved": Measure(recipe.encoding / recipe.flop, unit="share"),
    }
    for world in args.worlds:
        for batch, pictures in shares(recipe, args, world).items():
            best = fastest(recipe, args, world, pictures)
            found |= {
                f"{batch}.{world}.pictures": Measure(pictures),
                f"{batch}.{world}.zero": Measure(best.zero),
                f"{batch}.{world}.accumulation": Measure(best.accumulation),
                f"{batch}.{world}.memory": Measure(best.memory, unit="B"),
                f"{batch}.{world}.compute": Measure(best.compute, unit="s"),
                f"{batch}.{world}.collective": Measure(best.collective, unit="s"),
                f"{batch}.{world}.data": Measure(best.data, unit="s"),
                f"{batch}.{world}.pictures_per_second": Measure(pictures * world / best.step),
                f"{batch}.{world}.efficiency": Measure(best.compute / best.step, unit="share"),
                f"{batch}.{world}.efficiency_overlapped": Measure(best.compute / best.overlapped, unit="share"),
            }
            for zero in STAGES:
                if one := quickest(recipe, args, world, pictures, zero=zero):
                    found[f"{batch}.{world}.efficiency_zero{zero}"] = Measure(one.compute / one.step, unit="share")
        found |= limits(recipe, args, world) | outside(recipe, args, world)
    return found


def limits(recipe: Recipe, args: Args, world: int) -> dict[str, Measure]:
    """Up to where each stage fits: pictures of a micro-batch (more need accumulation), weights that train, memory."""
    found, room = {}, args.memory_gb * 1e9 * (1 - args.reserve)
    for zero in STAGES:
        kinds = memory(recipe.model, replace(recipe.run.engine, zero=zero), world)
        held, name = sum(kinds.values()), f"limit.{world}.zero{zero}"
        each = (held - kinds["frozen"]) / recipe.load.trained  # bytes of a weight that trains
        found[f"{name}.pictures"] = Measure(max(0, (room - held) // recipe.activations))
        found[f"{name}.trained"] = Measure(max(0.0, (room - kinds["frozen"] - recipe.activations) / each))
        found[f"{name}.least_memory"] = Measure((held + recipe.activations) / (1 - args.reserve), unit="B")
    return found


def outside(recipe: Recipe, args: Args, world: int) -> dict[str, Measure]:
    """What a step of the recipe's batch would take more with the MLLM inside the engine, as the official code has it: for
    each stage at which both fit, bytes given to collectives, seconds, bytes of a rank (fewer at ZeRO 3, which would share
    it); and of a checkpoint."""
    found, pictures = {}, recipe.batch // world
    for zero in STAGES:
        ours = quickest(recipe, args, world, pictures, zero=zero)
        theirs = quickest(recipe, args, world, pictures, official=True, zero=zero)
        if ours is None or theirs is None:
            continue
        name, load = f"outside.{world}.zero{zero}", recipe.official_load
        given = [sum(payload(each, zero, ours.accumulation).values()) for each in (load, recipe.load)]
        found[f"{name}.collective_bytes_saved"] = Measure(given[0] - given[1], unit="B")
        found[f"{name}.step_saved"] = Measure(theirs.step - ours.step, unit="s")
        held = recipe.held(zero, world, official=True) - recipe.held(zero, world)
        found[f"{name}.memory_saved"] = Measure(held, unit="B")
    kept_by_theirs = recipe.mllm * recipe.width + recipe.table * MASTERS
    return found | {f"outside.{world}.checkpoint_saved": Measure(kept_by_theirs, unit="B")}


if __name__ == "__main__":
    sys.exit(cli.run(main))
