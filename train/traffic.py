"""A run -> what an optimizer step of it says over the network, counted on real ranks, and where its time goes.

    torchrun --nproc_per_node 2 -m train.traffic metaquery.tiny --json traffic.json

Counted are the tensors that torch hands to its backend, whoever asked for them, and the bytes that a step reads from files;
timed, steps as they are, and steps of which each collective is waited for where it is called: what is left of a step is
compute. DeepSpeed's limits of live parameters are set to 0, so that a small model is gathered at ZeRO 3 as a large one is.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.batch import TextToImageCollate
from model.metaquery import build
from model.mllm import load
from sample import cli
from sample.measures import Measure, read_json, show, spread
from train.collectives import PASSES, Network
from train.config import Run
from train.machine import record
from train.metaquery import MetaQueryTask, MetaQueryTaskConfig
from train.plan import metaquery_of
from train.ranks import Ranks, start
from train.task import engine_for, loader_for

KINDS = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}
STRICT = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
WARM, PROBED_BYTES = 2, 16 << 20


@dataclass(frozen=True, kw_only=True)
class Args:
    """Count and time the steps of a MetaQuery run; every other option is the run's own."""

    zero: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    """Stages to measure, one after the other."""
    inside: bool = False
    """Also as the official code has it: the MLLM inside the engine, its embeddings trained with the queries, one pass with a
    graph."""
    steps: int = 3
    """Timed steps, and counted ones."""
    alone: Path | None = None
    """What one rank measured with the same share of the batch: predicts the step of several."""
    json: Path | None = None
    """Where to write the measures of rank 0."""


def main(argv: list[str] | None = None) -> None:
    """Measures on all ranks; rank 0 prints and writes.

    Raises:
        ValueError: the run is no MetaQuery run, or no step is asked for.
    """
    from train.run import parse

    args, rest = tyro.cli(Args, args=argv, description=__doc__, return_unknown_args=True)
    if args.steps < 1 or not args.zero:
        raise ValueError("give --steps of at least 1 and at least one stage to --zero")
    run = parse(rest)
    metaquery_of(run)
    run = replace(run, data=replace(run.data, workers=0))  # so that this process reads, and is seen to
    alone = {} if args.alone is None else read_json(args.alone)
    ranks = start(run.engine.timeout_seconds)
    network = probe(ranks)
    measures: dict[str, Measure] = {}
    for inside in (False, True) if args.inside else (False,):
        for zero in args.zero:
            way = f"{'official_' if inside else ''}zero{zero}"
            measures |= {f"traffic.{way}.{name}": m for name, m in measure(run, zero, inside, args.steps, ranks).items()}
            if args.alone is not None:
                measures |= predicted(f"traffic.{way}", measures, alone, network, ranks.world)
    if ranks.first:
        show(f"{run.name} on {ranks.world} rank(s), {run.schedule.accumulation} micro-batch(es) a step", measures)
        if args.json is not None:
            record(args.json, measures)
    ranks.leave()


class Collectives(TorchDispatchMode):
    """Counts what is handed to torch's backend while it is entered, and waits for each."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        _settle()
        began = time.perf_counter()
        answer = func(*args, **(kwargs or {}))
        for part in tree_leaves(answer):
            if hasattr(part, "wait") and not isinstance(part, Tensor):
                part.wait()
        _settle()
        self.seconds += time.perf_counter() - began
        name: str = str(func.overloadpacket).rpartition(".")[2]
        tensors = [[part for part in tree_leaves(arg) if isinstance(part, Tensor)] for arg in args]
        kind = KINDS.get(name, name.strip("_"))
        if max((tensor.numel() for given in tensors for tensor in given), default=0) <= 1:
            kind = "scalar"
        self.bytes[kind] += max(sum(tensor.nbytes for tensor in given) for given in tensors)  # the whole, not a rank's part
        self.calls[kind] += 1
        return answer


def measure(run: Run, zero: Literal[0, 1, 2, 3], inside: bool, steps: int, ranks: Ranks) -> dict[str, Measure]:
    """Bytes and seconds of an optimizer step of `run` at a stage."""
    with tempfile.TemporaryDirectory() as folder:
        strict = run.engine.deepspeed_json
        if zero == 3:
            theirs = json.loads(strict.read_text()) if strict else {}
            strict = Path(folder) / "strict.json"
            strict.write_text(json.dumps(theirs | {"zero_optimization": theirs.get("zero_optimization", {}) | STRICT}))
        engine = replace(run.engine, zero=zero, deepspeed_json=strict)
        run = replace(run, engine=engine)
        task: Any = official(run, ranks) if inside else run.build(ranks)
    batches = task.batches(0)
    for _ in range(WARM):
        one_step(task, batches, run)
    plain = [one_step(task, batches, run) for _ in range(steps)]
    counted = []
    for _ in range(steps):
        with Collectives() as collectives:
            whole, waited, _ = one_step(task, batches, run)
        counted.append((collectives, whole - waited - collectives.seconds))
    last = counted[-1][0]
    measures = {"trained": Measure(sum(torch.Size(shape).numel() for shape in task.engine.shapes().values()))}
    measures |= {f"{kind}.bytes": Measure(size, unit="B") for kind, size in sorted(last.bytes.items())}
    measures |= {f"{kind}.calls": Measure(calls) for kind, calls in sorted(last.calls.items())}
    measures["data.bytes"] = Measure(median(read for _, _, read in plain), n=steps, unit="B")
    measures["step"] = spread([whole for whole, _, _ in plain], "s")
    measures["data"] = spread([waited for _, waited, _ in plain], "s")
    measures["collective"] = spread([each.seconds for each, _ in counted], "s")
    measures["compute"] = spread([rest for _, rest in counted], "s")
    return measures


def one_step(task: MetaQueryTask, batches: Iterator[Any], run: Run) -> tuple[float, float, int]:
    """Seconds of an optimizer step, those of them that waited for data, and bytes read meanwhile."""
    began, waited, read = time.perf_counter(), 0.0, 0
    for _ in range(run.schedule.accumulation):
        asked, (before, own) = time.perf_counter(), _read_bytes()
        batch = next(batches)
        read += _read_bytes()[0] - before - own
        waited += time.perf_counter() - asked
        task.step(batch)
    _settle()
    return time.perf_counter() - began, waited, read


def _settle() -> None:
    """Wait for the device, which else still works on what a clock is to time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def official(run: Run, ranks: Ranks) -> MetaQueryTask:
    """The task with its MLLM where the official code has it (`--inside`)."""
    config = run.task
    assert isinstance(config, MetaQueryTaskConfig)
    model = build(config.model, mllm=load(config.model.mllm, ranks.device))
    model.place(ranks.device)
    model.add_module("inside", model.mllm.model)
    model.mllm.model.get_input_embeddings().weight.requires_grad_()
    model.mllm.read = model.mllm.read_full  # pyright: ignore[reportAttributeAccessIssue]
    collate = TextToImageCollate(model.mllm.builder, run.data.image_size, run.data.dropout, run.seed)
    return MetaQueryTask(
        config, model, None, engine_for(model, run, ranks), loader_for(collate, run, ranks, latents=True), run.seed, ranks
    )


def probe(ranks: Ranks) -> Network:
    """The network between these ranks, each a node of its own: from an all-reduce of one number and from one of many."""
    if ranks.world == 1:
        return Network(gpus_per_node=1)
    steps, seconds = 2 * (ranks.world - 1), {}
    for size in (4, PROBED_BYTES):
        values, found = torch.zeros(size // 4, device=ranks.device), []
        for _ in range(9):
            ranks.barrier()
            began = time.perf_counter()
            float(ranks.sum(values)[0])  # waits for the device
            found.append(time.perf_counter() - began)
        seconds[size] = median(found)
    moving = max(seconds[PROBED_BYTES] - seconds[4], 1e-9) / steps  # of a ring's step
    bits = 8 * PROBED_BYTES / ranks.world / moving
    return Network(gpus_per_node=1, nic_gbits=bits / 1e9, nics_per_node=1, nic_us=seconds[4] / steps * 1e6)


def predicted(way: str, here: dict[str, Measure], alone: dict[str, Measure], network: Network, world: int) -> Any:
    """The collectives of a step by the rings of the network that was probed, and the step: with what one rank computes."""
    if f"{way}.compute" not in alone:
        raise ValueError(f"--alone holds no {way}; measure one rank with the same --zero and --inside")
    seconds = sum(
        passes * network.pass_seconds(here[f"{way}.{kind}.bytes"].value, int(here[f"{way}.{kind}.calls"].value), world)
        for kind, passes in {**PASSES, "scalar": 2}.items()
        if f"{way}.{kind}.bytes" in here
    )
    step = seconds + alone[f"{way}.compute"].value + alone[f"{way}.data"].value
    return {f"{way}.predicted.collective": Measure(seconds, unit="s"), f"{way}.predicted.step": Measure(step, unit="s")}


def _read_bytes() -> tuple[int, int]:
    """Bytes that this process has read from files so far, and how many more looking has added."""
    text = Path("/proc/self/io").read_text()
    return int(text.split()[1]), len(text)


if __name__ == "__main__":
    sys.exit(cli.run(main))
