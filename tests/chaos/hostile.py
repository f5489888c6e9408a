"""Rows S1 to S12 and S16 to S18: shards, pictures, weights, texts and settings that were made to do harm."""

import ast
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from data import index, lint, precompute, preview, write
from data.loader import Data, Loader
from data.records import BadSample, to_record
from data.shard_index import IMAGES
from data.shards import Shards, ShardSource
from data.transforms import decode_image
from model import store
from model.decoder import DiffusersDecoderConfig, SiTDecoderConfig, build_decoder, save_sit
from model.files import read_json, read_tensors, sha256_of, write_json
from model.mllm import MLLMConfig, load_builder
from model.mllm import load as load_mllm
from model.perceptual import LPIPSConfig, load_perceptual
from model.prefix import Turn
from model.sit import SiT
from model.targets import TargetConfig, load_target
from model.vae import VAEConfig, load_vae
from sample import cli, convert, generate
from tests import releases, tiny, tiny_decoders
from tests.chaos.processes import launch, wait
from tests.chaos.rows import Outcome, row
from tests.test_layout import FILES, ROOT, imported
from tests.test_loader import Names
from tests.test_shards import png, write_tar
from tests.test_transforms import encoded
from tests.tiny_families import SEEING
from tests.toy import BATCH, Toy, advance, save
from tests.two_ranks import tiny_run
from train import checkpoint, checkpoint_cli, doctor, run
from train.engine import EngineConfig
from train.ranks import start

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
    urls = (f"pipe:{touch}", f"pipe: {touch}", f"{{pipe:{touch},real.tar}}", f"real.tar::pipe:{touch}", f"PIPE:{touch}", f"$({touch})",
            f"`{touch}`", f"real.tar; {touch}", f"|{touch}", f"file:real.tar|{touch}", f"exec:{touch}")  # fmt: skip
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
    names = ["../../x", "../../../../../../tmp/chaos-x", f"{folder}/absolute", "a/../../y", "<script>alert(1)</script>", "a\nb", "…/é"]
    kinds = {"a link": tarfile.SYMTYPE, "a hard link": tarfile.LNKTYPE, "a device": tarfile.CHRTYPE, "a pipe": tarfile.FIFOTYPE}
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
        "a WebP of 268 megapixels": b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<IIBBBBBBBB", 10, 0, 254, 63, 0, 254, 63, 0, 0, 0)[:18],
    }  # fmt: skip


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
        outcome.add(said != "decoded" and min(taken) < 0.005 and rose < 10, f"{what}: {said}, {1000 * min(taken):.1f} ms, {rose:.0f} MB")
    frames = [Image.new("P", (64, 64), n % 256) for n in range(1000)]
    for kind in ("GIF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        with peak_mb() as peak:
            began = time.process_time()
            decode_image(data)
            seconds = time.process_time() - began
            rose = peak()
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
    "S6", "text chunks, EXIF, colour profiles and captions of many MB", "bounded: refused, or read within the limits of a member",
    "< 150 MB, < 1 s",
)  # fmt: skip
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


@row("S7", "a pickle in place of weights", "refused: weights are safetensors, or tensors alone (sample.convert)", "canary absent")
def pickled_weights(_: int, folder: Path) -> Outcome:
    """Of every part that is loaded from a folder, and every file that is opened by torch."""
    outcome, canary = Outcome(), folder / "canary"
    tiny.metaquery_config(folder)
    tiny_decoders.sana(folder / "sana")
    save_sit(folder / "sit", SiT(tiny.sit_config()))
    release = releases.release(folder)
    loaders: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        "mllm": (folder / "mllm", lambda path: load_mllm(MLLMConfig(str(path)))),
        "vae": (folder / "vae", lambda path: load_vae(VAEConfig(str(path)))),
        "target": (folder / "mllm", lambda path: load_target(TargetConfig(str(path)))),
        "decoder": (folder / "sana", lambda path: build_decoder(DiffusersDecoderConfig(str(path)))),
        "sit": (folder / "sit", lambda path: build_decoder(SiTDecoderConfig(path=str(path)))),
        "release": (release, store.load),
    }
    for name, (good, load) in loaders.items():
        for stem in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "model.pth", "model.safetensors"):
            place = folder / "evil"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(good, place)
            for weights in [*place.rglob("*.safetensors")]:
                torch.save({"weight": Evil(canary)}, weights.with_name(stem))
                if stem != weights.name:
                    weights.unlink()
            outcome.expect("", lambda load=load, place=place: load(place))
            outcome.add(not canary.exists(), f"{name}: {stem} was run")
            canary.unlink(missing_ok=True)
    for name, command in (
        ("sample.convert", lambda path: convert.main([str(path / "a.pt"), "--out", str(folder / "converted")])),
        ("perceptual", lambda path: load_perceptual(LPIPSConfig(str(path)))),
    ):
        for held in (Evil(canary), {"ema": Evil(canary), "model": {}}, pickle.dumps(Evil(canary))):
            place = folder / "evil"
            for file in ("a.pt", "vgg16-397923af.pth", "vgg.pth"):
                torch.save(held, place / file) if not isinstance(held, bytes) else (place / file).write_bytes(held)
            try:
                command(place)
                said: Exception | None = None
            except Exception as error:
                said = error
            outcome.add(said is not None and not canary.exists(), f"{name}: {said}, ran: {canary.exists()}")
            canary.unlink(missing_ok=True)
    return outcome


def hostile_headers() -> dict[str, bytes]:
    """Files of safetensors that lie about themselves."""

    def file(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    def tensor(begin: int, end: int, shape: tuple[int, ...] = (4,)) -> dict[str, Any]:
        return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}

    return {
        "a header of 2^63 bytes": file({"a": tensor(0, 16)}, length=2**63),
        "a header of 200 MB": file({"a": tensor(0, 16)}, length=200_000_000),
        "tensors that overlap": file({"a": tensor(0, 16), "b": tensor(8, 24)}, bytes(24)),
        "a tensor beyond the end": file({"a": tensor(0, 4096, (1024,))}),
        "a shape that overflows": file({"a": tensor(0, 16, (2**62, 2**62))}, bytes(16)),
        "a hole": file({"a": tensor(0, 16), "b": tensor(32, 48)}, bytes(48)),
        "bytes that no tensor has": file({"a": tensor(0, 16)}, bytes(64)),
        "an end before its beginning": file({"a": tensor(16, 0)}, bytes(16)),
        "a negative offset": file(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}', bytes(16)),
        "no JSON": file(b"{" * 1000),
        "a dtype that is none": file(b'{"a": {"dtype": "PKL", "shape": [4], "data_offsets": [0, 16]}}', bytes(16)),
        "nothing": b"",
    }


@row("S8", "hostile headers of safetensors", "refused in one sentence, in releases as in checkpoints", "all refused")
def headers(_: int, folder: Path) -> Outcome:
    """In place of a release's weights, and of a checkpoint's with a manifest that has the right hash."""
    outcome = Outcome()
    task = Toy(start(60), EngineConfig(zero=1, precision="fp32"))
    advance(task, 0, 1)
    path = save(task, folder, 1)
    content = read_json(path / "manifest.json")
    for data in hostile_headers().values():
        (folder / "a.safetensors").write_bytes(data)
        outcome.expect("a.safetensors cannot be read", lambda: read_tensors(folder / "a.safetensors"))
        file = path / "main.weights.safetensors"
        file.write_bytes(data)
        write_json(path / "manifest.json", content | {"sha256": content["sha256"] | {file.name: sha256_of(file)}})
        outcome.expect("", lambda: checkpoint.load(checkpoint.verify(path) and path, task.engines, start(60)))
    return outcome


@row("S9", "model_index.json and config.json that name any class of any module", "refused", "error")
def any_class(_: int, folder: Path) -> Outcome:
    """As the network, the scheduler, the autoencoder, the class of a model."""
    outcome, canary = Outcome(), folder / "canary"
    tiny_decoders.sana(folder / "sana")
    whole = read_json(folder / "sana" / "model_index.json")
    for pair in (["os", "system"], ["subprocess", "Popen"], ["builtins", "eval"], ["evil", "Evil"], ["diffusers", "DiffusionPipeline"]):
        (folder / "sana" / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
        write_json(folder / "sana" / "model_index.json", whole | {"transformer": pair})
        outcome.expect("supported are", lambda: build_decoder(DiffusersDecoderConfig(str(folder / "sana"))))
    write_json(folder / "sana" / "model_index.json", whole)
    tiny.vae_folder(folder / "vae")
    config = read_json(folder / "vae" / "config.json")
    for name in ("system", "os.system", "DiffusionPipeline", "UNet2DConditionModel", None):
        write_json(folder / "vae" / "config.json", config | {"_class_name": name})
        outcome.expect("supported are", lambda: load_vae(VAEConfig(str(folder / "vae"))))
    tiny.mllm_folder(folder / "mllm")
    settings = read_json(folder / "mllm" / "config.json")
    for kind in ("os", "bert", "evil"):
        write_json(folder / "mllm" / "config.json", settings | {"model_type": kind, "architectures": ["system"]})
        outcome.expect("", lambda: load_mllm(MLLMConfig(str(folder / "mllm"))))
    outcome.add(not canary.exists(), "a module beside the model was imported")
    return outcome


@row("S10", "code that lies with a model (trust_remote_code)", "never run, and no setting runs it", "canary absent")
def remote_code(_: int, folder: Path) -> Outcome:
    """No file passes anything but False; and models of known and unknown kinds bring code along."""
    outcome, canary = Outcome(), folder / "canary"
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                never = isinstance(node.value, ast.Constant) and node.value.value is False
                outcome.add(never, f"{path.name}:{node.value.lineno} may run code that lies with a model")
    code = f"open({str(canary)!r}, 'w')\nclass Evil: pass\nclass EvilConfig: pass\n"
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoProcessor")
    for kind in ("known", "unknown"):
        place = tiny.mllm_folder(folder / kind)
        (place / "evil.py").write_text(code)
        for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            held = read_json(place / file) if (place / file).is_file() else {}
            held["auto_map"] = {name: "evil.Evil" for name in names} | {
                "AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoImageProcessor": "evil.Evil"
            }  # fmt: skip
            if kind == "unknown" and file == "config.json":
                held["model_type"] = "evil"
            write_json(place / file, held)
        for name, load in (("mllm", lambda p=place: load_mllm(MLLMConfig(str(p)))), ("target", lambda p=place: load_target(TargetConfig(str(p))))):
            with suppress(ValueError):
                load()
            outcome.add(not canary.exists(), f"{name}: the code of a model of {kind} kind was run")
            canary.unlink(missing_ok=True)
    return outcome


@row("S11", "YAML tags that make objects", "settings are Python or strict JSON; nothing reads YAML", "error")
def yaml_tags(_: int, folder: Path) -> Outcome:
    """No file imports a YAML library; run.json and release configs with tags are refused."""
    outcome, canary = Outcome(), folder / "canary"
    for path in FILES:
        outcome.add(not imported(path) & {"yaml", "ruamel", "omegaconf"}, f"{path} reads YAML")
    tag = f"!!python/object/apply:os.system ['touch {canary}']"
    for text in (tag, f"name: {tag}", json.dumps({"name": tag, "task": tag}), "&a [*a, *a]"):
        for name in ("run.json", "config.json"):
            (folder / name).write_text(text)
        outcome.expect("", lambda: run.read(folder / "run.json"))
        outcome.expect("", lambda: store.load(folder))
        with suppress(SystemExit, ValueError), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            run.parse(["metaquery.tiny", "--task.model.mllm.path", tag, "--data.sources", tag])
        outcome.add(not canary.exists(), f"{text[:40]!r} was run")
    return outcome


@row("S12", "special tokens in captions and in what users say", "they are text", "no special id from a user's text", fast=1)
def special_tokens(_: int, folder: Path) -> Outcome:
    """Every special token of every family's tokenizer that sees pictures, between two words; in chats and in captions."""
    outcome = Outcome()
    makers = {"qwen2_5_vl": tiny.mllm_folder, **SEEING}
    for name, make in makers.items():
        builder = load_builder(MLLMConfig(str(make(folder / name))))
        tokenizer = builder.tokenizer
        template = str(builder.template or tokenizer.chat_template)
        added = tokenizer.added_tokens_decoder.items()
        special = {i: token.content for i, token in added if token.special or i == builder.image_id or token.content in template}
        for text in {*special.values(), "<|im_start|>", "<|im_end|>", "<image>", "<|image_pad|>", "<|endoftext|>", "</s>", "<s>"}:
            for make_prefix in (
                lambda said: builder([[Turn("user", said)]]),
                lambda said: builder([[Turn("user", "a", (tiny.image(),)), Turn("assistant", "b"), Turn("user", said)]]),
                lambda said: builder.draw([said]),
            ):
                attacked = [i for i in make_prefix(f"red {text} blue").ids[0].tolist() if i in special]
                plain = [i for i in make_prefix("red blue").ids[0].tolist() if i in special]
                outcome.add(attacked == plain, f"{name}: {text!r} became a token")
    outcome.seen = f"{len(makers)} families"
    return outcome


@row("S16", "prompts that look like paths", "pictures are named by number; the prompt stands within", "inside the folder")
def output_paths(_: int, folder: Path) -> Outcome:
    """Given on the command line and in a file of prompts."""
    outcome = Outcome()
    release, out = releases.release(folder / "parts"), folder / "a" / "out"
    prompts = ["../../x", "/tmp/chaos-s16", "..", "a/b", "~/x", "$HOME", "%s%n", "x" * 100, "CON", "a\tb", "-n", "--out /tmp/x"]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    before = everything(folder, out)
    given = ["--release", str(release), "--prompts", str(folder / "prompts.txt"), "--out", str(out), "--steps", "1"]
    with redirect_stdout(io.StringIO()):
        code = cli.run(generate.main, given)
    outcome.add(code == 0 and everything(folder, out) == before, f"exit code {code}, something lies outside")
    for number, prompt in enumerate(prompts):
        with Image.open(out / f"{number:05d}.png") as picture:
            text = getattr(picture, "text", {})
            outcome.add(text.get("prompt") == prompt.strip(), f"{prompt!r} is told as {text.get('prompt')!r}")
    outcome.add(len(list(out.iterdir())) == len(prompts), f"{sorted(p.name for p in out.iterdir())}")
    return outcome


SECRETS = {"HF_TOKEN": "hf_chaosCanaryOfTheHub", "WANDB_API_KEY": "chaosCanaryOfWandb0123456789abcdef01234567", "AWS_SECRET_ACCESS_KEY": "chaosCanaryOfAws"}


@row("S17", "secrets in the environment", "in no file, no output and no process's arguments", "absent")
def secrets(_: int, folder: Path) -> Outcome:
    """A training, its resume, the doctor, the list of checkpoints, a plan, an export and drawn pictures; also what errors say."""
    outcome = Outcome()
    tiny.metaquery_config(folder)
    tokens = list(SECRETS.values())

    def work(rank: int) -> None:
        os.environ.update(SECRETS)
        given = tiny_run(folder, folder / "run")
        run.main(given)
        run.main([*given, "--schedule.steps", "7"])
        run.main([*given, "--plan", "--world", "2"])
        doctor.main(given)
        checkpoint_cli.main(["ls", str(folder / "run")])
        checkpoint_cli.main(["export", str(folder / "run" / "checkpoints" / "step-00000006"), "--out", str(folder / "exported")])
        generate.main(["--release", str(folder / "exported"), "--out", str(folder / "drawn"), "--steps", "1", "a red circle"])
        for wrong in (["--task.model.mllm.path", "no/where"], ["--optim.lr", "x"], ["--nothing", "1"]):
            with suppress(SystemExit):
                cli.run(run.main, [*given, *wrong])
        print(Path("/proc/self/cmdline").read_bytes())

    codes = wait(launch(1, work, folder / "log"), 200)
    outcome.add(codes == [0], f"exit codes {codes}: {(folder / 'log').read_text()[-500:]}")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        found = [token for token in tokens if token.encode() in content]
        outcome.add(not found, f"{path} holds {found}")
    outcome.seen = f"{len(files)} files and what was printed"
    return outcome


@row(
    "S18", "weights that are missing, of another shape, or too many", "refused by name; nothing is filled in at random", "error",
    trials=60, fast=12,
)  # fmt: skip
def wrong_weights(trials: int, folder: Path) -> Outcome:
    """A tensor of a release, a VAE, an MLLM, a SiT or a pipeline, left out or reshaped."""
    outcome, draw = Outcome(), random.Random(0)
    tiny.metaquery_config(folder)
    tiny_decoders.sana(folder / "sana")
    save_sit(folder / "sit", SiT(tiny.sit_config()))
    release = releases.release(folder)
    parts: list[tuple[Path, Callable[[], Any]]] = [
        (release / "model.safetensors", lambda: store.load(release)),
        (folder / "vae" / "diffusion_pytorch_model.safetensors", lambda: load_vae(VAEConfig(str(folder / "vae")))),
        (folder / "mllm" / "model.safetensors", lambda: load_mllm(MLLMConfig(str(folder / "mllm")))),
        (folder / "sit" / "model.safetensors", lambda: build_decoder(SiTDecoderConfig(path=str(folder / "sit")))),
        (next((folder / "sana" / "transformer").glob("*.safetensors")), lambda: build_decoder(DiffusersDecoderConfig(str(folder / "sana")))),
    ]
    for file, load in parts:
        load()
    for trial in range(trials):
        file, load = parts[trial % len(parts)]
        whole = file.read_bytes()
        tensors = load_file(file)
        name = draw.choice(sorted(tensors))
        if trial // len(parts) % 2:
            broken = {key: tensor for key, tensor in tensors.items() if key != name}
        else:
            broken = tensors | {name: torch.cat([tensors[name], tensors[name]])}
        save_file(broken, file, metadata={"format": "pt"})
        outcome.expect(name, load)
        file.write_bytes(whole)
    return outcome
