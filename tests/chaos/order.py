"""Rows D7 to D10, D12 and D13: an order of the data that nothing may change, and memory that does not grow."""

import gc
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from data.batch import T2IBatch, TextToImageCollate
from data.dropout import Dropout
from data.loader import Data, Loader, World
from data.order import Order
from data.shards import Shards
from model.files import dump_config, write_json
from model.mllm import MLLMConfig, load_builder
from model.noise import FlowConfig, build_noising, noise
from tests import test_order, tiny
from tests.chaos.rows import Outcome, row
from tests.chaos.shards import packed
from tests.test_loader import GLOBAL_BATCH, Names, global_batches
from tests.test_shards import png, write_tar
from tests.test_transforms import encoded, picture
from tests.two_ranks import tiny_run
from train import run


@row(
    "D7",
    "resumed at any step, on 1 to 4 ranks with 0 to 4 workers",
    "the same samples in each global batch, each once an epoch",
    "100 % of 200 cases; resuming < 50 ms for 10^6 samples",
    trials=200,
    fast=20,
)
def any_resume(trials: int, folder: Path) -> Outcome:
    """Random cases of the property in tests/test_order.py, then real shards read by workers."""
    outcome, draw = Outcome(), random.Random(0)
    holds = test_order.test_every_global_batch_is_the_same_set_however_it_is_read.hypothesis.inner_test  # pyright: ignore
    parts = [(1, 1), (2, 1), (3, 2), (4, 3), (1, 4), (2, 2)]
    for _ in range(trials):
        lengths = [draw.randint(1, 40) for _ in range(draw.randint(1, 3))]
        case = {
            "lengths": lengths, "weights": [draw.randint(1, 5) for _ in range(3)], "seed": draw.randrange(2**32),
            "parts": draw.choice(parts), "other": draw.choice(parts), "stop": draw.randint(0, 12),
        }  # fmt: skip
        try:
            holds(**case)
        except AssertionError:
            outcome.add(False, f"{case}")
        else:
            outcome.add(True, "")
    data = mixture(folder)
    straight = global_batches(data, steps=12)
    for _ in range(max(2, trials // 10)):
        workers, world, start = draw.randint(0, 4), draw.choice((1, 2, 3, 4)), draw.randint(0, 9)
        seen = global_batches(replace(data, workers=workers), 3, world, start=start * GLOBAL_BATCH)
        outcome.add(seen == straight[start : start + 3], f"{workers} workers, {world} ranks, from step {start}")
    taken = []
    for trial in range(5):
        began = time.process_time()
        order = Order([1_000_000], [1.0], trial)
        [order.place(n) for n in range(700_000 + trial, 700_064 + trial)]
        taken.append(1000 * (time.process_time() - began))
    outcome.add(min(taken) < 50, f"resuming took {min(taken):.1f} ms")
    outcome.seen = f"resuming within 10^6 samples, a batch of 64: {min(taken):.1f} ms of processor time"
    return outcome


def mixture(folder: Path) -> Data:
    """Two sets of shards, 10 and 23 samples, mixed 1:3."""
    sets = (packed(folder / "a", 10, name="a"), packed(folder / "b", 23, name="b"))
    return Data(sources=(replace(sets[0], weight=1.0), replace(sets[1], weight=3.0)))


@row(
    "D8",
    "epoch after epoch, workers of each kind",
    "another order each epoch, the same whatever reads it",
    "differs each epoch, equal across modes",
    trials=12,
    fast=4,
)
def epochs(trials: int, folder: Path) -> Outcome:
    """Epochs of 24 samples by no worker, by two that are forked, and by a spawned one."""
    outcome = Outcome()
    data = Data(sources=(packed(folder / "s", 24),))

    def order() -> list[str]:
        return [name for batch in global_batches(data, 2 * trials) for _, name in sorted(batch.items())]

    straight = order()
    each = [tuple(straight[at : at + 24]) for at in range(0, 24 * trials, 24)]
    for number, epoch in enumerate(each):
        fresh = sorted(epoch) == sorted(each[0]) and epoch not in each[:number]
        outcome.add(fresh, f"epoch {number} is not whole, or one that was there")
    for workers, method in ((2, "fork"), (1, "spawn"))[: 1 + (trials > 4)]:
        multiprocessing.set_start_method(method, force=True)
        data = replace(data, workers=workers)
        outcome.add(order() == straight, f"{workers} workers started by {method} see another order")
    return outcome


@row(
    "D9",
    "other numbers of ranks and workers",
    "captions dropped, noise and times of a sample stay",
    "equal",
    trials=6,
    fast=2,
)
def addressed(trials: int, folder: Path) -> Outcome:
    """What training draws for each sample, by its number: prompt after dropout, pixels, time and noise."""
    outcome = Outcome()
    builder = load_builder(MLLMConfig(str(tiny.mllm_folder(folder / "mllm"))))
    collate = TextToImageCollate(builder, 16, Dropout(text=0.5), seed=3)
    noising = build_noising(FlowConfig())

    def drawn(workers: int, world: int) -> dict[int, tuple[str, ...]]:
        seen = {}
        for rank in range(world):
            data = Data(sources=(World(), World(1)), image_size=16, workers=workers)
            loader = Loader(data, collate, 12 // world, rank, world, seed=3)
            for batch in islice(loader, 4):
                seen |= described(batch)
        return seen

    def described(batch: T2IBatch) -> dict[int, tuple[str, ...]]:
        eps = noise(batch.index, 3, (4, 8, 8))
        t = noising.times(batch.index, 3)
        assert batch.pixels is not None
        return {
            int(number): (
                str(batch.prefix.ids[row][batch.prefix.mask[row]].tolist()),
                str(batch.pixels[row].sum().item()), str(eps[row].flatten()[:4].tolist()), str(t[row].item()),
            )
            for row, number in enumerate(batch.index)
        }  # fmt: skip

    straight = drawn(0, 1)
    dropped = len({prompt for prompt, *_ in straight.values()})
    assert 1 < dropped < len(straight), "some captions are dropped and some are not"
    for workers, world in ((1, 1), (0, 2), (2, 1), (0, 4), (1, 3), (3, 2))[:trials]:
        outcome.add(drawn(workers, world) == straight, f"{workers} workers on {world} ranks draw something else")
    return outcome


@row(
    "D10",
    "the data has changed between two starts",
    "refused in one sentence; --allow-change goes on and tells",
    "detected",
    fast=1,
)
def changed_data(_: int, folder: Path) -> Outcome:
    """A sample more, less, moved or longer; a shard by another name; another share or seed. Another folder is no change."""
    outcome = Outcome()
    tiny.metaquery_config(folder)
    good = [(f"{n:02d}.{kind}", data) for n in range(12) for kind, data in (("png", png("red")), ("txt", b"a red circle"))]
    place = folder / "set"
    place.mkdir()

    def start(
        *words: str, steps: int, out: str = "run", urls: str = f"{place}/*.tar", weights: Sequence[float] = (1,)
    ) -> None:
        given = run.parse(
            tiny_run(folder, folder / out, "--schedule.steps", str(steps), "--schedule.save-every", "1", *words)
        )
        sources = tuple(Shards(urls, weight) for weight in weights)
        write_json(folder / "run.json", dump_config(replace(given, data=replace(given.data, sources=sources))))
        run.main([str(folder / "run.json")])

    def write(members: Any, name: str = "a.tar") -> None:
        for old in place.iterdir():
            old.unlink()
        write_tar(place / name, members)

    write(good)
    start(steps=1)
    told = "the data is not the one that"
    changes: dict[str, Any] = {
        "one more": [*good, ("99.png", png("blue")), ("99.txt", b"x")],
        "one less": good[:-2],
        "two exchanged": [*good[2:4], *good[:2], *good[4:]],
        "a longer caption": [*good[:-1], (good[-1][0], b"a longer caption")],
    }
    for members in changes.values():
        write(members)
        outcome.expect(told, lambda: start(steps=2))
    write(good, "b.tar")
    outcome.expect(told, lambda: start(steps=2))
    write(good)
    outcome.expect(told, lambda: start(steps=2, weights=(1, 2)))
    outcome.expect(told, lambda: start("--seed", "5", steps=2))
    place.rename(folder / "moved")
    start(steps=2, urls=f"{folder}/moved/*.tar")
    outcome.add((folder / "run/checkpoints/step-00000002").is_dir(), "the same shards in another folder were refused")
    start("--allow-change", "--seed", "5", steps=3, urls=f"{folder}/moved/*.tar")
    outcome.add((folder / "run/checkpoints/step-00000003").is_dir(), "--allow-change did not go on")
    return outcome


@row("D12", "sources mixed by weight", "their shares come out", "within 1 % over 10^5 samples", trials=10, fast=2)
def shares(trials: int, folder: Path) -> Outcome:
    """Two to five sources of random weights, some endless."""
    outcome, draw, furthest = Outcome(), random.Random(0), 0.0
    for _ in range(trials):
        weights = [draw.uniform(0.05, 1) for _ in range(draw.randint(2, 5))]
        order = Order([draw.choice((0, 50, 1000)) for _ in weights], weights, draw.randrange(1000))
        counts = Counter(order.place(sample).pool for sample in range(100_000))
        expected = [100_000 * weight / sum(weights) for weight in weights]
        apart = max(abs(counts[n] - share) / share for n, share in enumerate(expected))
        chi_square = sum((counts[n] - share) ** 2 / share for n, share in enumerate(expected))
        furthest = max(furthest, apart)
        outcome.add(apart < 0.01 and chi_square < 9.5, f"weights {weights}: {counts}")  # 9.5: 4 degrees of freedom, 5 %
    outcome.seen = f"furthest share {100 * furthest:.2f} % off"
    return outcome


@row("D13", "many samples", "memory does not grow", "< 20 MB over 2,000 samples", trials=2, fast=1)
def memory(trials: int, folder: Path) -> Outcome:
    """2,000 pictures of 256 pixels from 80 shards after 500 others, in the training process and in a worker."""
    outcome, seen = Outcome(), []
    packed(folder / "s", 800, shard_size=10, image=encoded(picture(256, 256), "JPEG"))
    for workers in range(trials):
        loader = Loader(Data((Shards(f"{folder}/s/*.tar"),), image_size=256, workers=workers), Names(), 10)
        batches, drift = iter(loader), []
        for at in range(251):
            next(batches)
            if at in (50, 250):
                gc.collect()
                drift.append(
                    sum(resident_mb(pid) for pid in (os.getpid(), *(c.pid for c in multiprocessing.active_children())))
                )
        outcome.add(drift[1] - drift[0] < 20, f"{workers} worker(s): {drift[0]:.0f} to {drift[1]:.0f} MB")
        seen.append(f"{drift[1] - drift[0]:+.1f} MB with {workers} worker(s)")
    outcome.seen = ", ".join(seen)
    return outcome


def resident_mb(pid: int | None) -> float:
    """Of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
