"""Rows R6, R7 and R10 to R13: numbers that are none, odd sizes, and what must come out to the last bit."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from data.loader import Data, Loader
from data.shards import Shards
from model.assets import fingerprint, tensors_of
from model.files import read_json, write_json
from tests import tiny
from tests.chaos.processes import launch, wait
from tests.chaos.rows import Outcome, row
from tests.test_loop import lines, train
from tests.test_shards import png, write_tar
from tests.toy import BATCH, CLIP_NORM, STEPS, Toy, advance, plain_torch
from tests.two_ranks import tiny_run
from train import run
from train.engine import KINDS, EngineConfig
from train.guard import Diverged, GuardConfig
from train.ranks import start

CONFIG = EngineConfig(zero=1, precision="fp32")


@row(
    "R6",
    "the loss is not finite on one rank",
    "the step is refused on all ranks, weights untouched, samples named; 3 in a row end it",
    "weights bit-equal",
)
def not_finite(_: int, folder: Path) -> Outcome:
    """A poisoned sample that one of two ranks sees, at every ZeRO stage; then three steps of them."""
    outcome = Outcome()

    def work(rank: int) -> None:
        ranks, seen = start(60), []
        for zero in (0, 1, 2, 3):
            config = replace(CONFIG, zero=zero)
            for accumulation in (1, 2):
                task = Toy(ranks, config, accumulation=accumulation, poison=frozenset({2 * BATCH + 1}))
                advance(task, 0, 2)
                before = [tensor.tolist() for kind in KINDS for _, tensor in task.engine.tensors(kind)]
                refused = advance(task, 2, 3)[0].objection
                after = [tensor.tolist() for kind in KINDS for _, tensor in task.engine.tensors(kind)]
                goes_on = advance(task, 3, 4)[0].objection is None
                seen.append([f"ZeRO {zero}, {accumulation} micro-batches", refused, before == after, goes_on])
        write_json(folder / f"rank{rank}.json", seen)
        poison = frozenset({n * BATCH + 1 for n in (1, 2, 3)})
        try:
            train(folder / "run", Toy(ranks, replace(CONFIG, guard=GuardConfig(rollbacks=0)), poison=poison))
        except Diverged as error:
            raise SystemExit(1) from error

    codes = wait(launch(2, work, folder / "log"), 60)
    for rank in (0, 1):
        for name, refused, same, goes_on in read_json(folder / f"rank{rank}.json"):
            outcome.add(
                refused == "loss is nan" and same and goes_on, f"rank {rank}, {name}: {refused}, same {same}, on {goes_on}"
            )
    told = [(line["step"], line["samples"]) for line in lines(folder / "run") if line.get("event") == "refused"]
    expected = [(n + 1, f"{n * BATCH}-{(n + 1) * BATCH - 1}") for n in (1, 2, 3)]
    outcome.add(codes == [1, 1] and told == expected, f"three in a row: exit codes {codes}, told {told}")
    return outcome


@row(
    "R7",
    "a spike of the loss, short or for ever",
    "its steps are not taken; one that does not end ends the run",
    "no endless loop",
)
def spike(_: int, folder: Path) -> Outcome:
    """Spikes of one to five steps, and one that lasts; each run is started again until it ends, or five times."""
    outcome = Outcome()
    config = replace(CONFIG, guard=GuardConfig(settle_steps=2, stop_after=3))
    for length in (1, 2, 3, 5, 100):
        spiked = frozenset(n * BATCH for n in range(3, 3 + length))
        starts, diverged, steps, ended = 0, 0, 0, False
        while not ended and starts < 5:
            starts += 1
            task = Toy(start(60), config, spike=spiked)
            try:
                ended = train(folder / str(length), task, steps=12, save_every=1, keep=2)
            except Diverged:
                diverged += 1
            steps = task.engine.steps
        refused = [line["step"] for line in lines(folder / str(length)) if line.get("event") == "refused"]
        expected = refused == list(range(4, 4 + length)) if length < 3 else bool(refused)
        good = expected and (ended if length < 100 else diverged == starts)
        outcome.add(good and steps <= 12, f"a spike of {length} steps: {starts} starts, refused {refused}, ended {ended}")
    return outcome


@row(
    "R10",
    "shards of odd sizes on any number of ranks",
    "each rank takes the same number of steps, each sample comes once an epoch",
    "equal for 200 layouts",
    trials=200,
    fast=10,
)
def uneven(trials: int, folder: Path) -> Outcome:
    """Up to seven shards of one to nine samples on one to four ranks, read for two epochs and a part."""
    outcome, draw, picture = Outcome(), random.Random(0), png("red", (2, 2))
    for layout in range(trials):
        sizes = [draw.randint(1, 9) for _ in range(draw.randint(1, 7))]
        place, world, share = folder / str(layout), draw.randint(1, 4), draw.randint(1, 3)
        place.mkdir()
        for shard, size in enumerate(sizes):
            members = [
                (f"{shard}-{n}.{kind}", data) for n in range(size) for kind, data in (("png", picture), ("txt", b"x"))
            ]
            write_tar(place / f"{shard}.tar", members)
        data = Data(sources=(Shards(f"{place}/*.tar"),), image_size=2)
        total, steps = sum(sizes), (2 * sum(sizes)) // (world * share) + 1
        seen, counts = [], set()
        for rank in range(world):
            loader = Loader(data, Places(), share, rank, world)
            batches = [batch for batch, _ in zip(loader, range(steps), strict=False)]
            counts.add((len(batches), sum(len(batch) for batch in batches)))
            seen += [pair for batch in batches for pair in batch]
        numbers, keys = zip(*sorted(seen), strict=True)
        good = counts == {(steps, steps * share)} and numbers == tuple(range(steps * share * world))
        good = good and all(len(set(keys[at : at + total])) == total for at in (0, total))
        outcome.add(good, f"shards of {sizes} on {world} ranks x {share}: {counts}")
    return outcome


class Places:
    """Collate: (sample number, key) of each."""

    def __call__(self, records: Sequence[Any], indices: Sequence[int]) -> list[tuple[int, str]]:
        return [(index, record.key) for index, record in zip(indices, records, strict=True)]


@row("R11", "what clipping and accumulation mean", "losses and gradient norms of plain torch", "<= 1e-6")
def as_plain_torch(_: int, folder: Path) -> Outcome:
    """AdamW and clip_grad_norm_ on whole batches, against each ZeRO stage on one and two ranks, also in micro-batches."""
    outcome, losses, norms = Outcome(), *plain_torch(STEPS)[:2]

    def work(rank: int) -> None:
        ranks, seen = start(60), []
        for zero in (0, 1, 2, 3):
            for accumulation in (1, 2, 4)[: 3 if ranks.world == 1 else 2]:
                config = replace(CONFIG, zero=zero, clip_norm=CLIP_NORM)
                steps = advance(Toy(ranks, config, accumulation=accumulation), 0, STEPS)
                name = f"{ranks.world} rank(s), ZeRO {zero}, {accumulation} micro-batches"
                seen.append([name, [step.loss for step in steps], [step.grad_norm for step in steps]])
        if ranks.first:
            write_json(folder / f"{ranks.world}.json", seen)

    furthest = 0.0
    for world in (1, 2):
        assert wait(launch(world, work, folder / "log"), 60) == [0] * world
        for name, theirs, their_norms in read_json(folder / f"{world}.json"):
            apart = max(abs(a - b) for a, b in zip(theirs + their_norms, losses + norms, strict=True))
            furthest = max(furthest, apart)
            outcome.add(apart <= 1e-6, f"{name}: {apart:.1e} apart")
    outcome.seen = f"largest difference {furthest:.1e}"
    return outcome


@row(
    "R12",
    "50 steps with weight decay",
    "what is frozen stays frozen",
    "sha256 of every frozen tensor equal",
    trials=50,
    fast=5,
)
def frozen(trials: int, folder: Path) -> Outcome:
    """A whole bridge of which two parts of the decoder train: MLLM, VAE and the rest of the decoder, tensor by tensor."""
    outcome = Outcome()
    task = bridge(folder, "--task.model.trainable", "sit.blocks.1.*", "sit.unembed.*")
    trains = set(task.engine.shapes())

    def hashes() -> dict[str, str]:
        parts = {"mllm": task.model.mllm.model, "vae": task.model.vae.autoencoder, "bridge": task.model}
        tensors = {f"{name}.{key}": t for name, part in parts.items() for key, t in tensors_of(part).items()}
        return {key: fingerprint({"": t}) for key, t in tensors.items() if key.removeprefix("bridge.") not in trains}

    before, batches = hashes(), task.batches(0)
    for _ in range(trials):
        task.step(next(batches))
    after = hashes()
    for name, sha256 in before.items():
        outcome.add(after[name] == sha256, f"{name} has changed")
    outcome.seen = f"{len(before)} tensors after {trials} steps"
    return outcome


def bridge(folder: Path, *words: str) -> Any:
    """The tiny MetaQuery task with its parts below `folder`."""
    tiny.metaquery_config(folder)
    given = run.parse(tiny_run(folder, folder / "run", "--optim.weight-decay", "0.1", *words))
    torch.manual_seed(0)
    return given.task.build(given, start(60))


@row(
    "R13",
    "queries are attached and trained",
    "the MLLM answers as it did",
    "logits bit-equal; states of a prefix <= 1e-6 of the largest",
    trials=10,
    fast=2,
)
def understanding(trials: int, folder: Path) -> Outcome:
    """Against transformers' own class on the same weights, before and after training, on prefixes of texts and pictures."""
    outcome = Outcome()
    task = bridge(folder)
    mllm = task.model.mllm
    stock = AutoModelForImageTextToText.from_pretrained(folder / "mllm", dtype=torch.float32).eval()
    prefixes = [mllm.builder([turns]) for turns in tiny.conversations()]
    batches, furthest = task.batches(0), 0.0
    for step in range(trials + 1):
        for prefix in prefixes:
            with torch.no_grad():
                expected = stock(**mllm.arguments(prefix), use_cache=False).logits
                queries = task.model.queries()
                read, whole = mllm.read(prefix, queries), mllm.read_full(prefix, queries)
            furthest = max(furthest, float((read - whole).abs().max() / whole.abs().max()))
            same = torch.equal(mllm.logits(prefix), expected)
            outcome.add(same and furthest <= 1e-6, f"after {step} steps: logits equal {same}, states {furthest:.1e} apart")
        task.step(next(batches))
    outcome.seen = f"queries read from a kept prefix or with it: states {furthest:.1e} of the largest apart"
    return outcome
