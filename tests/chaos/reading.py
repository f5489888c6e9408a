"""Rows D1 to D13: shards that are damaged, bad samples, and an order of the data that nothing may change."""

import gc
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data import index as index_cli
from data.batch import T2IBatch, TextToImageCollate
from data.dropout import Dropout
from data.loader import Data, Loader, World
from data.order import Order
from data.pack import Item, write_shards
from data.shard_index import index_shard
from data.shards import Shards
from data.transforms import decode_image, to_rgb
from model.files import dump_config, write_json
from model.mllm import MLLMConfig, load_builder
from model.noise import FlowConfig, build_noising, noise
from tests import test_lint, test_order, tiny
from tests.chaos.processes import die_at, fork, wait
from tests.chaos.rows import Outcome, row
from tests.test_lint import problems
from tests.test_loader import GLOBAL_BATCH, Names, global_batches
from tests.test_shards import index_or_complaint, items, png, write_tar
from tests.test_transforms import encoded, picture
from tests.two_ranks import tiny_run
from train import run


def packed(folder: Path, count: int, shard_size: int = 7, name: str = "s", image: bytes = b"") -> Shards:
    """Shards of so many samples with captions s0, s1, ..."""
    jobs = [Item(f"{name}{number}", image or png((number % 256, 0, 0))) for number in range(count)]
    write_shards(jobs, lambda item: item, folder, shard_size)
    return Shards(f"{folder}/*.tar")


@row("D1", "a shard is cut off", "a named error, or nothing but padding is gone", "0 silent", trials=160, fast=40)
def cut(trials: int, folder: Path) -> Outcome:
    """Cuts spread evenly over a shard, many of them within blocks."""
    outcome = Outcome()
    packed(folder / "set", 20, shard_size=20)
    whole = (folder / "set" / "00000.tar").read_bytes()
    expected = index_shard(str(folder / "set" / "00000.tar"))
    path = folder / "cut.tar"
    for trial in range(trials):
        at = len(whole) * trial // trials
        path.write_bytes(whole[:at])
        found = index_or_complaint(path)
        named = isinstance(found, str) and f"{path} is damaged" in found
        same = not isinstance(found, str) and np.array_equal(found.spans, expected.spans)
        outcome.add(named or same, f"cut at byte {at} of {len(whole)}: {found}")
    return outcome


@row(
    "D2", "a bit of a shard flips", "no sample is lost in silence; --verify names every one", "0 silent of 400", trials=400,
    fast=40,
)  # fmt: skip
def flipped(trials: int, folder: Path) -> Outcome:
    """Any bit. What the index of a training sees, and what `python -m data.index --verify` does."""
    outcome, draw, named = Outcome(), random.Random(0), 0
    packed(folder / "set", 7)
    path = folder / "set" / "00000.tar"
    whole, expected = path.read_bytes(), index_shard(str(path), digest=True)
    for _ in range(trials):
        bit = draw.randrange(8 * len(whole))
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        found = index_or_complaint(path)
        complained = isinstance(found, str)
        named += complained
        same = not complained and all(
            np.array_equal(a, b) for a, b in ((found.spans, expected.spans), (found.keys, expected.keys))
        )
        verified = index_cli._verified(str(path)).problem
        outcome.add((complained or same) and verified, f"bit {bit}: index {found}, verify {verified}")
    outcome.seen = f"{named} of {trials} named by the index alone, the others within a member's bytes; all by --verify"
    return outcome


def pictures() -> list[tuple[str, bytes, tuple[int, int, int] | None]]:
    """(what, its bytes, the colour of its first pixel; None: to be refused)."""
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    palette = Image.new("P", (8, 8))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    grey = Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16))
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (8, 4), (255, 0, 0))
    frames = [red.resize((8, 8)), Image.new("RGB", (8, 8), "blue")]
    photo = encoded(picture(40, 30), "JPEG")
    return [
        ("no bytes", b"", None),
        ("text", b"no picture", None),
        ("a web page", b"<!DOCTYPE html><html></html>", None),
        ("a cut JPEG", photo[: len(photo) // 2], None),
        ("a PNG cut within its header", encoded(red, "PNG")[:20], None),
        ("zeros", bytes(1000), None),
        ("PNG", encoded(red, "PNG"), (255, 0, 0)),
        ("JPEG", encoded(red, "JPEG", quality=100), (254, 0, 0)),
        ("WebP", encoded(red, "WEBP", lossless=True), (255, 0, 0)),
        ("a JPEG of CMYK", encoded(cmyk, "JPEG", quality=100), (255, 0, 0)),
        ("16-bit grey", encoded(grey, "PNG"), (100, 100, 100)),
        ("grey", encoded(Image.new("L", (8, 8), 100), "PNG"), (100, 100, 100)),
        ("one bit", encoded(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255)),
        ("transparency over white", encoded(clear, "PNG"), (255, 255, 255)),
        ("a palette", encoded(palette, "PNG"), (255, 0, 0)),
        ("a palette with transparency", encoded(palette, "PNG", transparency=0), (255, 255, 255)),
        (
            "an animated GIF, its first frame",
            encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            (255, 0, 0),
        ),
        (
            "an animated WebP",
            encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
            (255, 0, 0),
        ),
        ("EXIF rotation", encoded(turned, "JPEG", exif=exif, quality=100), (254, 0, 0)),
    ]


@row(
    "D3", "pictures of every kind, and what is none", "decoded by a documented rule, or replaced and counted",
    "no crash; colours within 2 of 255",
)  # fmt: skip
def odd_pictures(_: int, folder: Path) -> Outcome:
    """Each through the decoder, and as a sample between good ones through the loader."""
    outcome = Outcome()
    for number, (what, data, colour) in enumerate(pictures()):
        place = folder / str(number)
        place.mkdir()
        members = [(f"{n}.{kind}", d) for n in (0, 2) for kind, d in (("png", png("green")), ("txt", b"good"))]
        write_tar(place / "a.tar", [*members[:2], ("1.png", data), ("1.txt", b"odd"), *members[2:]])
        loader = Loader(Data((Shards(f"{place}/a.tar"),), image_size=8), Names(), 3)
        captions = sorted(next(iter(loader)).values())
        taken = captions == ["good", "good", "odd"] and not loader.rejects
        replaced = captions == ["good"] * 3 and loader.rejects.total() == 1
        if colour is None:
            outcome.add(replaced, f"{what}: {captions}, {loader.rejects}")
            continue
        image = to_rgb(decode_image(data))
        off = np.abs(np.array(image.getpixel((0, 0))) - colour).max()
        upright = image.size == ((4, 8) if what == "EXIF rotation" else (8, 8))
        outcome.add(taken and off <= 2 and upright, f"{what}: {captions}, colours {off} off, {image.size}")
    return outcome


@row(
    "D4", "members missing, twice, apart from their sample, with dots or no extension in the name",
    "each named by shard and sample by data.lint", "all named",
)  # fmt: skip
def lint(_: int, folder: Path) -> Outcome:
    """The table of tests/test_lint.py."""
    outcome = Outcome()
    (mark,) = [mark for mark in test_lint.test_each_problem_is_named.pytestmark if mark.name == "parametrize"]
    for members, expected in mark.args[1]:
        found = problems(folder, members)
        outcome.add(expected in found, f"{expected} is not in {found}")
    return outcome


@row("D5", "100 bad samples in a row", "the run ends with their reasons, exit 2", "ends, reasons listed", trials=3, fast=2)
def hundred_bad(trials: int, folder: Path) -> Outcome:
    """No caption, no picture, and broken pictures; read by the training process and by workers."""
    outcome = Outcome()
    kinds = {
        "no caption": lambda n: [(f"{n:03d}.png", png("red"))],
        "no image": lambda n: [(f"{n:03d}.txt", b"x")],
        "an image cannot be decoded": lambda n: [(f"{n:03d}.png", b"x"), (f"{n:03d}.txt", b"x")],
    }
    for reason, make in kinds.items():
        path = write_tar(folder / f"{reason[:5]}.tar", [member for n in range(150) for member in make(n)])
        for workers in range(trials):
            loader = Loader(Data((Shards(path),), workers=workers), Names(), 10)
            outcome.expect(f"x {reason} ({path})", lambda loader=loader: list(islice(loader, 3)))
    return outcome


@row(
    "D6", "a tenth of the pictures is bad", "their places are taken by others, and nothing sleeps",
    "< 5 % slower; no sample waits 5 ms", trials=7, fast=3,
)  # fmt: skip
def tenth_bad(trials: int, folder: Path) -> Outcome:
    """900 samples of 128 pixels with and without 90 broken headers, alternately; the fastest of each."""
    outcome = Outcome()
    photo = encoded(picture(128, 128), "JPEG")
    for name in ("good", "tenth"):
        (folder / name).mkdir()
        members = []
        for n in range(900):
            broken = name == "tenth" and n % 10 == 5
            members += [(f"{n:03d}.jpg", photo[:50] if broken else photo), (f"{n:03d}.txt", b"x")]
        write_tar(folder / name / "a.tar", members)
    seconds: dict[str, list[float]] = {"good": [], "tenth": []}
    waited: dict[str, list[float]] = {"good": [], "tenth": []}
    for _ in range(trials):
        for name, taken in seconds.items():
            loader = Loader(Data((Shards(f"{folder}/{name}/a.tar"),)), Names(), 30)
            batches = iter(loader)
            next(batches)
            began, slept = time.process_time(), time.perf_counter()
            for _batch in islice(batches, 29):
                pass
            taken.append(time.process_time() - began)
            waited[name].append(time.perf_counter() - slept)
            outcome.add((loader.rejects.total() > 80) == (name == "tenth"), f"{name}: {loader.rejects}")
    good, tenth = (min(taken) for taken in seconds.values())
    wait_ms = (min(waited["tenth"]) - min(waited["good"])) / 90 * 1000
    outcome.add(tenth < 1.05 * good, f"{100 * (tenth / good - 1):.1f} % slower")
    outcome.add(wait_ms < 5, f"a bad sample waits {wait_ms:.1f} ms")
    outcome.seen = f"{100 * (tenth / good - 1):+.1f} % of processor time; a bad sample waits {max(0.0, wait_ms):.2f} ms"
    return outcome


@row(
    "D7", "resumed at any step, on 1 to 4 ranks with 0 to 4 workers", "the same samples in each global batch, each once an epoch",
    "100 % of 200 cases; resuming < 50 ms for 10^6 samples", trials=200, fast=20,
)  # fmt: skip
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
    slowest = 0.0
    for trial in range(5):
        began = time.perf_counter()
        order = Order([1_000_000], [1.0], trial)
        [order.place(n) for n in range(700_000 + trial, 700_064 + trial)]
        slowest = max(slowest, time.perf_counter() - began)
    outcome.add(slowest < 0.05, f"resuming took {1000 * slowest:.1f} ms")
    outcome.seen = f"resuming within 10^6 samples, a batch of 64: {1000 * slowest:.1f} ms"
    return outcome


def mixture(folder: Path) -> Data:
    """Two sets of shards, 10 and 23 samples, mixed 1:3."""
    sets = (packed(folder / "a", 10, name="a"), packed(folder / "b", 23, name="b"))
    return Data(sources=(replace(sets[0], weight=1.0), replace(sets[1], weight=3.0)))


@row(
    "D8", "epoch after epoch, workers of each kind", "another order each epoch, the same whatever reads it",
    "differs each epoch, equal across modes", trials=12, fast=4,
)  # fmt: skip
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
    "D9", "other numbers of ranks and workers", "captions dropped, noise and times of a sample stay", "equal", trials=6, fast=2,
)  # fmt: skip
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
    "D10", "the data has changed between two starts", "refused in one sentence; --allow-change goes on and tells", "detected",
    fast=1,
)  # fmt: skip
def changed_data(_: int, folder: Path) -> Outcome:
    """A sample more, less, in another place or longer, a shard by another name, another share or seed; moved is not changed."""
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


@row(
    "D11", "kill -9 while shards are packed", "no half shard is visible; packing again gives what it always gives",
    "0 half shards", trials=24, fast=4,
)  # fmt: skip
def killed_in_packing(trials: int, folder: Path) -> Outcome:
    """Before one request to the system after the other, and the same of the index beside a shard."""
    outcome = Outcome()
    folder /= "here"
    folder.mkdir()

    def pack(out: Path) -> None:
        write_shards(items(9), lambda item: item, out, shard_size=3)

    def dying(work: Any, point: int) -> None:
        count = die_at(point, folder)
        work()
        (folder.parent / "count").write_text(str(count()))

    pack(folder / "whole")
    expected = {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    tar = folder / "whole" / "00000.tar"

    def index_anew() -> None:
        index_shard(str(tar))

    for what, work in (("packing", partial(pack, folder / "out")), ("indexing", index_anew)):
        assert wait([fork(partial(dying, work, -1), folder.parent / "log")]) == [0]
        moments = int((folder.parent / "count").read_text())
        for point in sorted(random.Random(0).sample(range(moments), min(moments, trials // 2))):
            for path in [*folder.glob("out/*"), *folder.glob("whole/*.json")]:
                path.unlink()
            if (folder / "out").exists():
                (folder / "out").rmdir()
            (code,) = wait([fork(partial(dying, work, point), folder.parent / "log")])
            seen = {path.name: path.read_bytes() for path in folder.glob("out/*")}
            whole = seen in ({}, expected)
            if what == "packing" and not seen:
                pack(folder / "out")
                whole = whole and {path.name: path.read_bytes() for path in folder.glob("out/*")} == expected
            whole = whole and len(index_shard(str(tar))) == 3
            outcome.add(code == -signal.SIGKILL and whole, f"{what} killed at request {point} of {moments}: {sorted(seen)}")
    return outcome


@row("D12", "sources mixed by weight", "their shares come out", "within 1 % over 10^5 samples", trials=10, fast=2)
def shares(trials: int, folder: Path) -> Outcome:
    """Two to five sources of random weights, some endless."""
    outcome, draw, furthest = Outcome(), random.Random(0), 0.0
    for _ in range(trials):
        weights = [draw.uniform(0.05, 1) for _ in range(draw.randint(2, 5))]
        order = Order([draw.choice((0, 50, 1000)) for _ in weights], weights, draw.randrange(1000))
        counts = Counter(order.place(sample).source for sample in range(100_000))
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
