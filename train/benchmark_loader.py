"""How fast batches come from shards, on one core: `python -m train.benchmark loader`.

JPEGs of 22 kB or so, made here, whose decoding costs what photographs' does: scenes of the generated world under light and
grain. Our loader makes pixels of them; so do webdataset's own pipeline with its usual decoder and Pillow's resizing, the
same pipeline with our decoding and resizing, and our decoding and resizing of bytes that lie in memory already. All make the
same tensors, to two levels, and take turns. Seconds are those of the processor, so that what else the machine does is not
counted; the shards are in the page cache.

A tenth of the samples of `loader.with_bad` cannot be used, each in one of five ways. `loader.decode` is from bytes to an RGB
array, by every decoder that is installed (`pip install -e '.[decoders]'`); draft is Pillow's decoding at a half, a quarter
or an eighth, where that is still no smaller than what is asked for, and changes levels then. `loader.resize` is from an
RGB image to a tensor.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from data.batch import LabelledCollate
from data.loader import Data, Loader
from data.parallel import bar
from data.records import label_of
from data.shards import Shards
from data.transforms import decode_image, resize_and_crop, to_tensor
from data.world.render import render
from data.world.scene import make_scene
from sample.measures import Measure, show, spread
from train.machine import record

ASPECTS = ((1, 1), (4, 3), (3, 2), (3, 4), (2, 3))  # width to height, in turn
QUALITY = 90
BAD_EVERY = 10
SHUFFLED = 1_000  # samples that webdataset's pipeline holds to shuffle them
COMPARED = 128  # pictures, by each decoder and resizer


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Time our loader against webdataset's pipeline, against bare decoding, and with bad samples among the good."""

    samples: int = 1_000
    """Samples in the shards; each round reads as many."""
    shard_size: int = 250
    short_side: int = 256
    """Pixels of the JPEGs' shorter side."""
    image_size: int = 224
    """Pixels a side of the batches' pictures."""
    batch_size: int = 25
    repeats: int = 9
    """Timed rounds, in which each has its turn."""
    json: Path | None = None
    """Where to write the measures."""


def loading(args: Loading) -> None:
    """Measures, prints and writes.

    Raises:
        ValueError: a size is below 1, or the samples do not fill shards and batches.
    """
    if min(args.samples, args.shard_size, args.short_side, args.image_size, args.batch_size, args.repeats) < 1:
        raise ValueError("give sizes and repeats of at least 1")
    if args.samples % args.batch_size or args.samples % BAD_EVERY:
        raise ValueError(f"samples is {args.samples}; give a multiple of {BAD_EVERY} and of the batch size")
    with one_core():
        measures = _measured(args)
        show(f"JPEGs of {args.short_side} pixels, made {args.image_size} x {args.image_size}, on one core", measures)
        if args.json is not None:
            record(args.json, measures)


def _measured(args: Loading) -> dict[str, Measure]:
    with bar("drawing") as progress:
        jpegs = [photograph(number, args.short_side) for number in progress.track(range(args.samples))]
    with tempfile.TemporaryDirectory() as folder:
        good, bad = Path(folder, "good"), Path(folder, "bad")
        pack(jpegs, good, args.shard_size, None)
        pack(jpegs, bad, args.shard_size, BAD_EVERY)
        ways: dict[str, Iterator[Any]] = {
            "ours": loader(good, args),
            "with_bad": loader(bad, args),
            "webdataset": webdataset(good, args, "pil", plain_pixels),
            "webdataset_with_our_map": webdataset(good, args, None, pixels),
            "bare_decode": bare(jpegs, args),
        }
        seconds = take_turns(ways, args.samples // args.batch_size, args.repeats)
    others = ("webdataset", "webdataset_with_our_map", "bare_decode")
    measures = {f"loader.ratio_to_{other}": _ratio(seconds[other], seconds["ours"]) for other in others}
    measures["loader.ratio_with_bad"] = _ratio(seconds["ours"], seconds["with_bad"])
    measures |= {f"loader.{way}": _rate(elapsed, args.samples) for way, elapsed in seconds.items()}
    measures["loader.jpeg_bytes"] = Measure(sum(map(len, jpegs)) / len(jpegs), n=len(jpegs), unit="B")
    measures |= compared("decode", decoders(jpegs[:COMPARED], args.image_size), args)
    return measures | compared("resize", resizers(jpegs[:COMPARED], args.image_size), args)


@contextmanager
def one_core() -> Iterator[None]:
    """This process on one core, torch with one thread."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def photograph(number: int, short_side: int) -> bytes:
    """A JPEG of a scene of the generated world, under uneven light, with grain of every coarseness as photographs have."""
    across, down = ASPECTS[number % len(ASPECTS)]
    width, height = (round(short_side * side / min(across, down)) for side in (across, down))
    random = np.random.default_rng(number)
    scene = render(make_scene(0, number, "train"), max(width, height))[:height, :width].astype(np.float32)
    light = 30 * np.sin(np.arange(height)[:, None] / 61 + number) * np.cos(np.arange(width)[None] / 97)
    for grain in (1, 2, 4, 8, 16, 32):
        noise = random.normal(size=(height // grain + 1, width // grain + 1)).astype(np.float32)
        light += 4 * grain**0.5 * np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    stream = io.BytesIO()
    Image.fromarray((scene + light[:, :, None]).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def pack(jpegs: list[bytes], folder: Path, shard_size: int, bad_every: int | None) -> None:
    """Shards in img2dataset's layout; every so many samples, one that cannot be used."""
    folder.mkdir()
    for first in range(0, len(jpegs), shard_size):
        with (folder / f"{first:05d}.tar").open("wb") as stream, TarWriter(stream, encoder=False) as tar:
            for number in range(first, min(first + shard_size, len(jpegs))):
                described = json.dumps({"key": f"{number:09d}", "status": "success", "label": number % 1000}).encode()
                members = {"jpg": jpegs[number], "txt": b"a picture of the world", "json": described}
                if bad_every and number % bad_every == 0:
                    members |= spoiled(jpegs[number], number // bad_every)
                tar.write({"__key__": f"{number:09d}"} | members)


def spoiled(jpeg: bytes, turn: int) -> dict[str, bytes]:
    """Members that make a sample unusable: a picture cut short, empty or none at all, a broken json, one without a label."""
    ways = (
        {"jpg": jpeg[: len(jpeg) // 2]},
        {"jpg": b""},
        {"jpg": b"<html>404 Not Found</html>"},
        {"json": b'{"label": '},
        {"json": b"{}"},
    )
    return ways[turn % len(ways)]


def loader(folder: Path, args: Loading) -> Iterator[Any]:
    """Our loader's batches, whatever share of the samples is bad."""
    data = Data((Shards(f"{folder}/*.tar"),), task="labelled", image_size=args.image_size, max_bad_share=1.0)
    for batch in Loader(data, LabelledCollate(args.image_size), args.batch_size):
        yield replace(batch, levels=batch.pixels)  # as floats, which the others make as well


def webdataset(
    folder: Path, args: Loading, decoder: str | None, prepare: Callable[[Any, int], Tensor]
) -> Iterator[tuple[Tensor, Any]]:
    """Batches of webdataset's own pipeline, as its documentation writes it, epoch after epoch."""
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    whole: Any = WebDataset(shards, shardshuffle=len(shards)).shuffle(SHUFFLED)
    decoded = whole.decode(decoder) if decoder else whole
    told = label_of if decoder else lambda described: label_of(json.loads(described))
    samples = decoded.to_tuple("jpg", "json").map_tuple(lambda picture: prepare(picture, args.image_size), told)
    return _endless(samples.batched(args.batch_size))


def bare(jpegs: list[bytes], args: Loading) -> Iterator[None]:
    """Our decoding and resizing of a batch's bytes, one picture after the other, kept nowhere."""
    following = itertools.cycle(jpegs)
    while True:
        for jpeg in itertools.islice(following, args.batch_size):
            pixels(jpeg, args.image_size)
        yield


def plain_pixels(image: Image.Image, size: int) -> Tensor:
    """RGB image -> [3, size, size] in [-1, 1]: central square, Pillow's antialiased bicubic, numpy, torch."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def pixels(jpeg: bytes, size: int) -> Tensor:
    """The same of a file's bytes, as our loader makes it."""
    return to_tensor(resize_and_crop(decode_image(jpeg), size))


def decoders(jpegs: list[bytes], size: int) -> dict[str, Iterator[Any]]:
    """Each decodes all JPEGs to RGB arrays [H, W, 3]."""

    def draft(jpeg: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(jpeg))
        image.draft("RGB", (size, size))
        return np.asarray(image)

    ways: dict[str, Callable[[bytes], Any]] = {
        "pillow": lambda jpeg: np.asarray(decode_image(jpeg)),
        "pillow_draft": draft,
    }
    if find_spec("simplejpeg"):
        simplejpeg: Any = import_module("simplejpeg")
        ways["simplejpeg"] = lambda jpeg: simplejpeg.decode_jpeg(jpeg, "RGB")

        def through_pillow(jpeg: bytes) -> np.ndarray:
            Image.open(io.BytesIO(jpeg))  # for its kind, size and orientation
            array = simplejpeg.decode_jpeg(jpeg, "RGBX")  # as Pillow keeps RGB: 4 bytes a pixel
            height, width = array.shape[:2]
            return np.asarray(Image.frombuffer("RGB", (width, height), array, "raw", "RGBX", 0, 1))

        ways["simplejpeg_through_pillow"] = through_pillow
    if find_spec("cv2"):
        cv2: Any = import_module("cv2")
        cv2.setNumThreads(1)
        ways["opencv"] = lambda jpeg: cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    return {name: map(way, itertools.cycle(jpegs)) for name, way in ways.items()}


def resizers(jpegs: list[bytes], size: int) -> dict[str, Iterator[Any]]:
    """Each makes planes [3, size, size] of all pictures' levels."""
    images = [decode_image(jpeg) for jpeg in jpegs]
    ways = {
        "pillow": lambda image: plain_pixels(image, size),
        "torch": lambda image: to_tensor(resize_and_crop(image, size)),
    }
    return {name: map(way, itertools.cycle(images)) for name, way in ways.items()}


def compared(what: str, ways: Mapping[str, Iterator[Any]], args: Loading) -> dict[str, Measure]:
    """How many pictures a second each does, and how many times as many as Pillow."""
    seconds = take_turns(ways, COMPARED, args.repeats)
    rates = {f"loader.{what}.{name}": _rate(elapsed, COMPARED) for name, elapsed in seconds.items()}
    others = {name: elapsed for name, elapsed in seconds.items() if name != "pillow"}
    return rates | {f"loader.{what}.{name}_ratio": _ratio(seconds["pillow"], elapsed) for name, elapsed in others.items()}


def take_turns(ways: Mapping[str, Iterator[Any]], steps: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of the processor that each takes for so many steps, a step of each at a time, in any order: what one leaves in
    the caches helps another. Of every round."""
    seconds: dict[str, list[float]] = {name: [0.0] * (repeats + 1) for name in ways}
    random = Random(0)
    for repeat in range(repeats + 1):
        for _ in range(steps):
            for name in random.sample(list(ways), len(ways)):
                began = time.process_time()
                next(ways[name])
                seconds[name][repeat] += time.process_time() - began
    return {name: elapsed[1:] for name, elapsed in seconds.items()}  # the first round warms up


def _endless(epoch: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from epoch


def _ratio(theirs: list[float], ours: list[float]) -> Measure:
    return spread([other / own for other, own in zip(theirs, ours, strict=True)], "x")


def _rate(seconds: list[float], samples: int) -> Measure:
    return spread([samples / elapsed for elapsed in seconds], "1/s")
