"""A run -> what it will take, before any weight is read: parameters, memory of a rank, FLOP of a picture.

    python -m train.plan metaquery.xlarge_sana --world 8 --prefix-tokens 150
    python -m train.run metaquery.xlarge_sana --plan --world 8          # the same

Every part is built at its full size on torch's meta device, where a step runs without computing: what FLOP it takes and what
it keeps for the backward pass is counted from the step itself; what activation checkpointing computes again is no FLOP of
the picture, but lowers what is kept. Models of the recipes need no download for it: their shapes lie in assets/shapes.
Pictures in a prompt count as prefix tokens; what the vision tower takes for them is not counted.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from model.assets import locate
from model.decoder import DiffusersDecoderConfig
from model.metaquery import MetaQuery, MetaQueryConfig, blueprint
from sample import cli
from sample.measures import Measure, show, write_json
from train.config import Run
from train.cost import flop, kept_bytes
from train.engine import EngineConfig, micro_batch_size
from train.metaquery import MetaQueryTaskConfig
from train.parts import parts, steps

SHAPES = "assets/shapes"
GRADIENT_BYTES = {"fp32": 4, "autocast": 4, "bf16": 2}  # of a weight, and of its gradient


@dataclass(frozen=True, kw_only=True)
class Args:
    """Tell what a MetaQuery run takes; every other option is the run's own."""

    world: int = 1
    """Ranks that train together."""
    prefix_tokens: int = 150
    """Tokens of a prompt, with its pictures'."""
    json: Path | None = None
    """Where to write the measures."""


def main(argv: list[str] | None = None) -> None:
    """Prints the plan of the run that the command line names, and writes it where told.

    Raises:
        ValueError: the run is no MetaQuery run, a number is below 1, or parts do not fit.
    """
    from train.run import parse

    words = sys.argv[1:] if argv is None else argv
    args, rest = tyro.cli(Args, args=words, description=__doc__, return_unknown_args=True)
    if args.world < 1 or args.prefix_tokens < 1:
        raise ValueError("give --world and --prefix-tokens of at least 1")
    run = parse(rest)
    measures = plan(run, args.world, args.prefix_tokens)
    show(f"{run.name} on {args.world} rank(s), ZeRO {run.engine.zero}, {args.prefix_tokens} prefix tokens", measures)
    if args.json is not None:
        write_json(args.json, measures)


def plan(run: Run, world: int, prefix_tokens: int) -> dict[str, Measure]:
    """Parameters of each part, bytes of each rank by kind (on its device, and what is offloaded to its host), FLOP of a
    picture by part, tokens of a step."""
    config = shaped(metaquery_of(run))
    size = micro_batch_size(run.schedule.batch_size, run.schedule.accumulation, world)
    model = blueprint(config)
    if run.engine.precision == "bf16":
        nn.Module.to(model, torch.bfloat16)
    activations = size * sum(activation_bytes(model, prefix_tokens).values())
    counted = flops(blueprint(unchecked(config)), prefix_tokens)
    rank = memory(model, run.engine, world) | {"activations": activations}
    host: dict[str, float] = {}
    if run.engine.offload_optimizer:  # its gradients go with it, in float32, and those that accumulate once more
        width = 4 + GRADIENT_BYTES[run.engine.precision] * (run.schedule.accumulation > 1)
        host = {"optimizer": rank.pop("optimizer"), "gradients": width * _trained(model) / world}
    tokens = prefix_tokens + config.queries
    measures = {f"plan.{part}.parameters": Measure(_size(module)) for part, module in parts(model).items()}
    measures |= {f"plan.{part}.trained": Measure(_trained(module)) for part, module in parts(model).items()}
    measures |= {f"plan.rank.{kind}.bytes": Measure(number, unit="B") for kind, number in rank.items()}
    measures |= {f"plan.host.{kind}.bytes": Measure(number, unit="B") for kind, number in host.items()}
    measures["plan.rank.bytes"] = Measure(sum(rank.values()), unit="B")
    measures |= {f"plan.{part}.flop": Measure(number, unit="FLOP") for part, number in counted.items()}
    measures["plan.picture.flop"] = Measure(sum(counted.values()), unit="FLOP")
    measures["plan.step.flop"] = Measure(run.schedule.batch_size * sum(counted.values()), unit="FLOP")
    measures["plan.step.tokens"] = Measure(run.schedule.batch_size * tokens)
    measures["plan.run.flop"] = Measure(run.schedule.steps * measures["plan.step.flop"].value, unit="FLOP")
    return measures


def metaquery_of(run: Run) -> MetaQueryConfig:
    """The model that the run trains. ValueError for one that trains something else."""
    if not isinstance(run.task, MetaQueryTaskConfig):
        raise ValueError(f"{run.name} is no MetaQuery run that draws; only those can be planned and timed")
    return run.task.model


def shaped(config: MetaQueryConfig) -> MetaQueryConfig:
    """The config whose hub ids are the shapes that lie with the code, where they do."""
    decoder = config.decoder if config.decoder.path is None else shaped_part(config.decoder)
    return replace(config, mllm=shaped_part(config.mllm), vae=shaped_part(config.vae), decoder=decoder)


def shaped_part(part: Any) -> Any:
    """One part's config, its hub id the shape that lies with the code, where it does."""
    lying = locate(part.path) is None and locate(f"{SHAPES}/{part.path}") is not None
    return replace(part, path=f"{SHAPES}/{part.path}") if lying else part


def unchecked(config: MetaQueryConfig) -> MetaQueryConfig:
    """The config without activation checkpointing: what is computed twice is no more use."""
    decoder = config.decoder
    if isinstance(decoder, DiffusersDecoderConfig):
        decoder = replace(decoder, activation_checkpointing=False)
    return replace(config, connector=replace(config.connector, activation_checkpointing=False), decoder=decoder)


def memory(model: MetaQuery, engine: EngineConfig, world: int) -> dict[str, float]:
    """Bytes on a rank by kind, activations aside. What ZeRO shards (Rajbhandari et al. 2020): from 1 on the optimizer's
    float32 copy, its two moments and the average; from 2 on the gradients; at 3 the weights."""
    trained, zero, width = _trained(model), engine.zero, GRADIENT_BYTES[engine.precision]
    outside = sum(_bytes(part) for part in (model.mllm.model, model.vae.autoencoder))
    held = {part: world if zero >= stage else 1 for part, stage in (("state", 1), ("gradients", 2), ("weights", 3))}
    copies = 4 if zero else 3  # float32: the master weights, except at stage 0, where the weights are their own
    return {
        "frozen": outside + _frozen_bytes(model, engine) / held["weights"],
        "weights": trained * width / held["weights"],
        "gradients": trained * width / held["gradients"],
        "optimizer": trained * 4 * copies / held["state"],
    }


def flops(model: MetaQuery, prefix_tokens: int) -> dict[str, float]:
    """FLOP of one picture by part, forward and backward."""
    with torch.device("meta"):
        return {part: float(flop(step)) for part, step in steps(model, prefix_tokens).items()}


def activation_bytes(model: MetaQuery, prefix_tokens: int) -> dict[str, float]:
    """Bytes that one picture keeps for the backward pass by part, with attention that keeps no scores (flash or
    memory-efficient)."""
    with torch.device("meta"):
        made = steps(model, prefix_tokens)
        return {part: float(kept_bytes(step, fused_attention=True)) for part, step in made.items()}


def _size(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def _trained(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters() if p.requires_grad)


def _frozen_bytes(model: MetaQuery, engine: EngineConfig) -> int:
    """Of what an engine holds and does not train, in its own dtype; a bf16 engine casts it."""
    frozen = (tensor for tensor in model.parameters() if not tensor.requires_grad)
    return sum(tensor.numel() * (2 if engine.precision == "bf16" else tensor.element_size()) for tensor in frozen)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


if __name__ == "__main__":
    sys.exit(cli.run(main))
