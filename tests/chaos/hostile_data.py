"""Rows S1 to S6: shards and pictures that were made to do harm."""

import io
import json
import os
import pickle
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data import index, lint, precompute, preview, write
from data.loader import Data, Loader
from data.records import BadSample, to_record
from data.shard_index import IMAGES
from data.shards import Shards, ShardSource
from data.transforms import decode_image
from model.mllm import MLLMConfig
from model.mllm import load as load_mllm
from tests import tiny
from tests.chaos.rows import Outcome, row
from tests.test_loader import Names
from tests.test_shards import png, write_tar
from tests.test_transforms import encoded

GOOD = [("good.png", png("red")), ("good.txt", b"good")]


class Evil:
    """Unpickled, it touches a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def every_reader(path: str, out: Path) -> None:
    """Everything in data/ that opens a shard, and what it says."""
    for command in (
        lambda: lint.main([path, "--jobs", "1"]),
        lambda: index.main([path, "--jobs", "1"]),
        lambda: preview.main([path, "--out", str(out / "page.html")]),
        lambda: next(iter(Loader(Data((Shards(path),)), Names(), 4))),
    ):
        with suppress(ValueError), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            command()
    source = ShardSource(path)
    for number in range(len(source)):
        with suppress(BadSample):
            to_record("t2i", source.read(number))


@row("S1", "a pickle within a shard", "never opened", "canary absent")
def pickle_in_shard(_: int, folder: Path) -> Outcome:
    """As a member of any name that readers decode, and within an array."""
    outcome, canary = Outcome(), folder / "canary"
    evil = pickle.dumps(Evil(canary))
    array = io.BytesIO()
    np.save(array, np.array([Evil(canary)], dtype=object), allow_pickle=True)
    kinds = ("pkl", "pickle", "pyd", "pth", "pt", "ten", "tb", "cbor", "msg", "mp", "npy", "npz", "json", "txt", *IMAGES)
    for kind in (*kinds, *(f"{kind}.gz" for kind in ("pkl", "pyd"))):
        data = array.getvalue() if kind == "npy" else evil
        members = [(name, held) for name, held in [*GOOD, (f"good.extra.{kind}", data), (f"evil.{kind}", data)]]
        every_reader(write_tar(folder / "a.tar", members), folder)
        outcome.add(not canary.exists(), f"a member of kind {kind} was unpickled")
        canary.unlink(missing_ok=True)
    return outcome


@row("S2", "`pipe:` and other programs in place of paths", "refused, nothing is run", "canary absent")
def pipes(_: int, folder: Path) -> Outcome:
    """In patterns of shards, on every command line that takes them, in settings and in lists of files."""
    outcome, canary = Outcome(), folder / "canary"
    os.chdir(folder)
    (folder / "real.tar").write_bytes(Path(write_tar(folder / "b.tar", GOOD)).read_bytes())
    touch = f"touch {canary}"
    urls = (
        *(
            f"{way}{touch}"
            for way in ("pipe:", "pipe: ", "PIPE:", "exec:", "|", "real.tar::pipe:", "file:real.tar|", "real.tar; ")
        ),
        *(f"{{pipe:{touch},real.tar}}", f"$({touch})", f"`{touch}`"),
    )
    commands: dict[str, Callable[[str], Any]] = {
        "training": lambda url: Loader(Data((Shards(url),)), Names(), 2),
        "latents": lambda url: Loader(Data((Shards("real.tar", latents=url),)), Names(), 2),
        "data.lint": lambda url: lint.main([url]),
        "data.index": lambda url: index.main([url]),
        "data.preview": lambda url: preview.main([url, "--out", "page.html"]),
        "data.precompute": lambda url: precompute.main([url, "--vae.path", url, "--image-size", "16", "--out", "out"]),
        "data.write folder": lambda url: write.main(["folder", url, "--out", "shards"]),
        "data.write jsonl": lambda url: write.main(["jsonl", _listed(folder, url), "--out", "shards"]),
        "mllm.path": lambda url: load_mllm(MLLMConfig(url)),
    }
    for url in urls:
        for name, command in commands.items():
            said: Any = None
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                try:
                    said = command(url)
                except ValueError as error:
                    said = str(error)
            refused = isinstance(said, str) or said == 2
            outcome.add(refused and not canary.exists(), f"{name} {url!r}: {said}, ran: {canary.exists()}")
            canary.unlink(missing_ok=True)
    return outcome


def _listed(folder: Path, image: str) -> str:
    path = folder / "list.jsonl"
    path.write_text(json.dumps({"image": image, "caption": "x"}) + "\n")
    return str(path)


@row("S3", "members named ../../x, absolute ones, links, devices", "nothing is written or read outside", "nothing outside")
def outside(_: int, folder: Path) -> Outcome:
    """Read by everything, previewed, and encoded to latents, which take their names from the samples'."""
    outcome = Outcome()
    here = folder / "a" / "b"
    (here / "shards").mkdir(parents=True)
    secret = folder / "secret.txt"
    secret.write_text("secret")
    tiny.vae_folder(folder / "vae")
    names = [
        "../../x",
        "../../../../../../tmp/chaos-x",
        f"{folder}/absolute",
        "a/../../y",
        "<script>alert(1)</script>",
        "a\nb",
        "…/é",
    ]
    kinds = {
        "a link": tarfile.SYMTYPE,
        "a hard link": tarfile.LNKTYPE,
        "a device": tarfile.CHRTYPE,
        "a pipe": tarfile.FIFOTYPE,
    }
    for number, name in enumerate([*names, *kinds]):
        path = here / "shards" / f"{number}.tar"
        with tarfile.open(path, "w") as tar:
            for extension, data in (("png", png("red")), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{name if name in names else 'odd'}.{extension}")
                if name in kinds and extension == "txt":
                    member.type, member.linkname = kinds[name], str(secret)
                    tar.addfile(member)
                    continue
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        before = everything(folder, here)
        every_reader(str(path), here)
        out = here / f"latents-{number}"
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            precompute.main([str(path), "--vae.path", str(folder / "vae"), "--image-size", "16", "--out", str(out)])
        raw = ShardSource(str(path)).read(0)
        page = (here / "page.html").read_text()
        stayed = everything(folder, here) == before and not Path("/tmp/chaos-x.png").exists()
        outcome.add(stayed and "secret" not in raw["txt"] and "<script" not in page, f"{name!r}: {raw['txt']!r}")
    return outcome


def everything(folder: Path, but: Path) -> dict[str, int]:
    """What lies in a folder outside of another, and when it was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and but not in path.parents}


@contextmanager
def peak_mb() -> Iterator[Callable[[], float]]:
    """How far the memory of this process has risen above what it was, at its highest."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    yield lambda: (_status("VmHWM") - before) / 1000


def _status(name: str) -> int:
    """kB, of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])


def chunk(kind: bytes, data: bytes) -> bytes:
    """One of PNG's."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG that says it is large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    """Small files of pictures with more pixels than anybody has taken."""
    white = Image.new("1", (13_000, 13_000), 1)
    jpeg = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    gif = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    bmp = bytearray(encoded(Image.new("RGB", (8, 8)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    return {
        "a PNG of 169 megapixels": encoded(white, "PNG"),
        "a TIFF of 169 megapixels": encoded(white, "TIFF", compression="group4"),
        "a PNG that claims 2^31 x 2^31": png_claiming(2**31 - 1, 2**31 - 1),
        "a PNG that claims 60,000 x 60,000": png_claiming(60_000, 60_000),
        "a JPEG that claims 65,500 x 65,500": bytes(jpeg),
        "a GIF that claims 65,535 x 65,535": bytes(gif),
        "a BMP that claims 60,000 x 60,000": bytes(bmp),
        "a PPM that claims 60,000 x 60,000": b"P6 60000 60000 255\n" + bytes(100),
        "a WebP of 268 megapixels": b"RIFF"
        + struct.pack("<I", 22)
        + b"WEBPVP8X"
        + struct.pack("<II", 10, 0)
        + b"\xfe\x3f\0" * 2,
    }


@row("S4", "a decompression bomb", "refused by its header", "< 5 ms and < 10 MB")
def pixel_bombs(_: int, folder: Path) -> Outcome:
    """Pictures that are large or say so; and an animation of 1,000 frames, of which only the first is decoded."""
    outcome, slowest, most = Outcome(), 0.0, 0.0
    with suppress(ValueError):
        decode_image(b"none")  # Pillow imports its plugins
    for what, data in bombs().items():
        with peak_mb() as peak:
            said, taken = "decoded", []
            for _try in range(3):
                began = time.process_time()
                try:
                    decode_image(data)
                except ValueError as error:
                    said = str(error)
                taken.append(time.process_time() - began)
            rose = peak()
        slowest, most = max(slowest, min(taken)), max(most, rose)
        outcome.add(
            said != "decoded" and min(taken) < 0.005 and rose < 10,
            f"{what}: {said}, {1000 * min(taken):.1f} ms, {rose:.0f} MB",
        )
    frames = [Image.new("P", (64, 64), n % 256) for n in range(1000)]
    for kind in ("GIF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        with peak_mb() as peak:
            taken = []
            for _try in range(3):
                began = time.process_time()
                decode_image(data)
                taken.append(time.process_time() - began)
            seconds, rose = min(taken), peak()
        slowest, most = max(slowest, seconds), max(most, rose)
        outcome.add(seconds < 0.005 and rose < 10, f"{kind} of 1,000 frames: {1000 * seconds:.1f} ms, {rose:.0f} MB")
    outcome.seen = f"at most {1000 * slowest:.2f} ms and {most:.1f} MB"
    return outcome


@row("S5", "a .gz member of 194 kB that holds 200 MB", "not inflated", "never opened; < 10 MB")
def inflated(_: int, folder: Path) -> Outcome:
    """Beside good members, in place of them, and as the whole archive."""
    import gzip

    outcome, most = Outcome(), 0.0
    every_reader(write_tar(folder / "a.tar", GOOD), folder)  # imports what it needs
    bomb = gzip.compress(bytes(200_000_000))
    for extension in ("txt.gz", "json.gz", "png.gz", "tar.gz", "txt.bz2", "json.zst"):
        path = write_tar(folder / "a.tar", [*GOOD, (f"good.{extension}", bomb)])
        with peak_mb() as peak:
            every_reader(path, folder)
            read = ShardSource(path).read(0)
            rose = peak()
        most = max(most, rose)
        outcome.add(rose < 10 and read["txt"] == "good", f"{extension}: {rose:.0f} MB, {read['txt'][:20]!r}")
    (folder / "b.tar").write_bytes(bomb)
    with peak_mb() as peak:
        outcome.expect("not an uncompressed tar", lambda: ShardSource(str(folder / "b.tar")))
        outcome.add(peak() < 10, f"a compressed archive: {peak():.0f} MB")
    outcome.seen = f"at most {most:.1f} MB"
    return outcome


def text_bombs() -> dict[str, list[tuple[str, bytes]]]:
    """Samples whose words or descriptions are too many."""
    header, rest = png("red")[:33], png("red")[33:]
    zeros = zlib.compress(bytes(100_000_000))
    info = PngInfo()
    info.add_text("words", "x" * 20_000_000)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<HHHII", 1, 0x0112, 3, 2**31, 8)
    pictures = {
        "a zTXt chunk of 100 MB": header + chunk(b"zTXt", b"a\0\0" + zeros) + rest,
        "an iTXt chunk of 100 MB": header + chunk(b"iTXt", b"a\0\1\0\0\0" + zeros) + rest,
        "100 zTXt chunks of 1 MB": header + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 100 + rest,
        "an iCCP chunk of 100 MB": header + chunk(b"iCCP", b"a\0\0" + zeros) + rest,
        "a tEXt chunk of 20 MB": encoded(Image.new("RGB", (8, 8)), "PNG", pnginfo=info),
        "EXIF data that claim 2^31 entries": header + chunk(b"eXIf", exif[6:]) + rest,
        "EXIF data of 20 MB": header + chunk(b"eXIf", exif[6:] + bytes(20_000_000)) + rest,
    }
    texts = {
        "a caption of 50 MB": [("a.txt", b"x" * 50_000_000)],
        "a caption of 50 MB within json": [("a.json", json.dumps({"caption": "x" * 50_000_000}).encode())],
        "json of 1,000,000 brackets": [("a.json", b"[" * 1_000_000)],
        "a json number of 1,000,000 digits": [("a.json", b'{"caption": ' + b"9" * 1_000_000 + b"}")],
        "a caption in a list of 3,000,000": [("a.json", b'{"caption": "x", "y": [' + b"0," * 1_900_000 + b"0]}")],
    }
    return {what: [("a.png", data), ("a.txt", b"x")] for what, data in pictures.items()} | {
        what: [("a.png", png("red")), *members] for what, members in texts.items()
    }


@row(
    "S6",
    "text chunks, EXIF, colour profiles and captions of many MB",
    "bounded: refused, or read within the limits of a member",
    "< 150 MB, < 1 s",
)
def words_without_end(_: int, folder: Path) -> Outcome:
    """The largest member that is read is 64 MiB (data/shard_index.py)."""
    outcome, most, slowest = Outcome(), 0.0, 0.0
    with suppress(ValueError):
        decode_image(b"none")
    for what, members in text_bombs().items():
        source, said = ShardSource(write_tar(folder / "a.tar", members)), "read"
        with peak_mb() as peak:
            began = time.process_time()
            try:
                to_record("t2i", source.read(0))
            except BadSample as bad:
                said = bad.reason
            seconds, rose = time.process_time() - began, peak()
        most, slowest = max(most, rose), max(slowest, seconds)
        outcome.add(rose < 150 and seconds < 1, f"{what}: {said}, {rose:.0f} MB, {seconds:.2f} s")
    outcome.seen = f"at most {most:.0f} MB and {1000 * slowest:.0f} ms"
    return outcome
