"""Rows D1 to D6 and D11: shards and samples that are damaged."""

import random
import signal
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data import index as index_cli
from data.loader import Data, Loader
from data.pack import Item, write_shards
from data.shard_index import index_shard
from data.shards import Shards
from data.transforms import decode_image, to_rgb
from tests import test_lint
from tests.chaos.processes import die_at, fork, wait
from tests.chaos.rows import Outcome, row
from tests.test_lint import problems
from tests.test_loader import Names
from tests.test_shards import index_or_complaint, items, png, write_tar
from tests.test_transforms import encoded, picture


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
    "D2",
    "a bit of a shard flips",
    "no sample is lost in silence; --verify names every one",
    "0 silent of 400",
    trials=400,
    fast=40,
)
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
    "D3",
    "pictures of every kind, and what is none",
    "decoded by a documented rule, or replaced and counted",
    "no crash; colours within 2 of 255",
)
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
    "D4",
    "members missing, twice, apart from their sample, with dots or no extension in the name",
    "each named by shard and sample by data.lint",
    "all named",
)
def lint(_: int, folder: Path) -> Outcome:
    """The table of tests/test_lint.py."""
    outcome = Outcome()
    (mark,) = getattr(test_lint.test_each_problem_is_named, "pytestmark")  # noqa: B009 (pytest adds it)
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
    "D6",
    "a tenth of the pictures is bad",
    "their places are taken by others, and nothing sleeps",
    "< 5 % slower; no sample waits 5 ms",
    trials=15,
    fast=3,
)
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
            loader = Loader(Data((Shards(f"{folder}/{name}/a.tar"),), max_bad_share=0.2), Names(), 30)
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
    if trials >= 15:  # fewer are of one busy moment
        outcome.add(tenth < 1.05 * good, f"{100 * (tenth / good - 1):.1f} % slower")
        outcome.add(wait_ms < 5, f"a bad sample waits {wait_ms:.1f} ms")
    outcome.seen = f"{100 * (tenth / good - 1):+.1f} % of processor time; a bad sample waits {max(0.0, wait_ms):.2f} ms"
    return outcome


@row(
    "D11",
    "kill -9 while shards are packed",
    "no half shard is visible; packing again gives what it always gives",
    "0 half shards",
    trials=24,
    fast=4,
)
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
