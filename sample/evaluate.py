"""A release -> measures: how well it draws and how well its MLLM understands.

`world` asks for held-out scenes of the generated world and judges the pictures by the pixel reader (what is asked:
`sample/world_suite.py`), then asks the MLLM about held-out pictures (`sample/world_answers.py`). `edits` asks for changes of
held-out pictures, one by one and in conversations (`sample/world_edits.py`). `decoder` judges a SiT and its VAE before there
is any language model (`sample/decoder_scores.py`), `vae` a VAE alone (`sample/vae_scores.py`), `images` a folder of pictures
(`sample/image_scores.py`, `sample/clip_score.py`). `parity` proves that the MLLM is its base still (`sample/parity.py`). The
JSON of each says by what it was measured (`sample/protocol.py`).
"""

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from sample.cli import run
from sample.parity import Parity
from sample.settings import Drawing, Guidance


@dataclass(frozen=True, kw_only=True)
class World:
    """Score a release on held-out scenes of the generated world."""

    release: Path
    """The release folder to score."""
    split: tuple[Literal["val", "pairs", "counts"], ...] = ("val",)
    """val: seen pairs of colour and shape; pairs: held-out pairs; counts: more objects than training shows."""
    n: int = 100
    """Prompts for each category; 0 leaves drawing out."""
    images: int = 200
    """Pictures to ask the MLLM about; 0 leaves understanding out."""
    seed: int = 0
    """Decides prompts, pictures and questions."""
    batch_size: int = 32
    """Pictures drawn, and questions asked, at once."""
    json: Path | None = None
    """Where to write the measures."""
    grid: Path | None = None
    """Where to write a PNG of the first pictures of each category, with verdicts."""
    html: Path | None = None
    """Where to write all of it as one page, pictures included."""
    drawing: Annotated[Drawing, OmitArgPrefixes] = Drawing()


@dataclass(frozen=True, kw_only=True)
class Edits:
    """Score how a release edits held-out pictures, draws them once more, draws their subjects, and obeys in three turns."""

    release: Path
    """The release folder to score."""
    split: tuple[Literal["val", "pairs"], ...] = ("val",)
    """val: seen pairs of colour and shape; pairs: scenes with held-out pairs."""
    n: int = 100
    """Edits, and as many reconstructions, subjects and conversations."""
    seed: int = 0
    """Decides pictures, words and noise."""
    batch_size: int = 32
    """Pictures drawn at once."""
    json: Path | None = None
    """Where to write the measures."""
    grid: Path | None = None
    """Where to write a PNG of the first of each kind, with verdicts."""
    drawing: Annotated[Drawing, OmitArgPrefixes] = Drawing(guidance=Guidance(image=3.0))


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Score a SiT and its VAE, told the labels of held-out pictures of the world."""

    release: Path
    """The release folder of a run of configs/repae.py."""
    features: str = "assets/world/mllm"
    """Whose vision tower tells how far drawn pictures lie from real ones: a local distance, comparable with itself alone."""
    images: int = 1000
    """Pictures to draw and to compare with."""
    steps: int = 25
    """Of the solver, from noise to picture."""
    seed: int = 0
    """Decides noise and times."""
    batch_size: int = 50
    """Pictures at once."""
    json: Path | None = None
    """Where to write the measures."""


@dataclass(frozen=True, kw_only=True)
class VAE:
    """Score how a VAE rebuilds a folder of pictures."""

    vae: str
    """A folder in diffusers' layout, or a hub id."""
    pictures: Path
    """The folder of pictures; of each its central square is taken."""
    size: int = 256
    """Pixels a side to which they are scaled."""
    features: str = "assets/world/mllm"
    """Whose features tell how far rebuilt pictures lie from real ones: a local distance, comparable with itself alone."""
    lpips: Path | None = None
    """A folder with the weights of LPIPS (see model/perceptual.py), for that as well."""
    inception: Path | None = None
    """Weights of Inception, for the rFID by torch-fidelity as well: weights-inception-2015-12-05-6726825d.pth."""
    keep: Path | None = None
    """Where to write the pictures, as they went in and as they came out."""
    batch_size: int = 16
    """Pictures at once."""
    json: Path | None = None
    """Where to write the measures."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """Score a folder of drawn pictures against a folder of real ones, or against their prompts."""

    drawn: Path
    """The folder of drawn pictures."""
    real: Path | None = None
    """The folder of real ones."""
    clip: str | None = None
    """A CLIP in the hub's layout, a folder or a hub id, for the CLIP score as well."""
    prompts: Path | None = None
    """A JSONL file of objects with file and prompt; None: prompts are those in the pictures."""
    features: str = "assets/world/mllm"
    """Whose features tell how far they lie apart: a local distance, comparable with itself alone."""
    inception: Path | None = None
    """Weights of Inception, for FID, IS and KID by torch-fidelity as well: weights-inception-2015-12-05-6726825d.pth."""
    size: int = 64
    """Pixels a side to which pictures are scaled for the local features."""
    batch_size: int = 50
    """Pictures at once."""
    json: Path | None = None
    """Where to write the measures."""


def main(argv: list[str] | None = None) -> None:
    """Runs the evaluation that the command line names."""
    commands = {"world": World, "edits": Edits, "decoder": Decoder, "vae": VAE, "images": Images, "parity": Parity}
    args = tyro.extras.subcommand_cli_from_dict(commands, args=argv)
    work = {World: world, Edits: edits, Decoder: decoder, VAE: vae, Images: images, Parity: parity}
    work[type(args)](args)


def parity(args: Parity) -> None:
    """Asks the release and its base, prints what is the same; exits with 1 where anything differs."""
    from sample.parity import prove

    if not prove(args, _watch("asking")):
        sys.exit(1)


def images(args: Images) -> None:
    """Compares, prints the measures, and writes them where told.

    Raises:
        ValueError: a number is out of range, a folder holds no pictures, or a network cannot be loaded.
    """
    if min(args.size, args.batch_size) < 1:
        raise ValueError("give --size and --batch-size of at least 1")
    if args.real is None and (args.clip is None or args.inception is not None):
        raise ValueError(
            "--real is missing; name real pictures, or --clip alone to hold the drawn ones against their prompts"
        )
    from sample.image_scores import score
    from sample.measures import show, write_json
    from sample.protocol import protocol

    measures, sha256, counts = score(args, _watch)
    show(f"{args.drawn} against {args.real or 'its prompts'}", measures)
    if args.json is not None:
        write_json(args.json, measures, protocol(args, sha256, pictures=counts))


def vae(args: VAE) -> None:
    """Rebuilds, compares, prints the measures, and writes them where told.

    Raises:
        ValueError: a number is out of range, the folder holds no pictures, or a network cannot be loaded.
    """
    if args.size < 11 or args.batch_size < 1:
        raise ValueError("give a --size of at least 11 and a --batch-size of at least 1")
    from model.assets import fingerprint, tensors_of
    from model.files import check_new
    from model.perceptual import LPIPSConfig, load_perceptual
    from model.targets import TargetConfig, load_target
    from model.vae import VAEConfig, load_vae
    from sample.image_scores import by_inception, check_inception, pictures_in, pixels_of
    from sample.measures import show, write_json
    from sample.pipeline import default_device
    from sample.protocol import protocol
    from sample.vae_scores import REAL, REBUILT, score

    files, device = pictures_in(args.pictures), default_device()
    if len(files) < 2:
        raise ValueError(f"--pictures {args.pictures} holds one picture; give a folder of at least two")
    if args.lpips is not None and args.size < 16:
        raise ValueError("--lpips needs a --size of at least 16")
    if args.inception is not None:
        check_inception(args.inception)
    if args.keep is not None:
        for name in (REAL, REBUILT):
            check_new(args.keep / name, "--keep")
    scored = load_vae(VAEConfig(args.vae)).to(device)
    if args.size % scored.factor:
        raise ValueError(f"--size is {args.size} and the VAE takes {scored.factor} pixels to a latent; give a multiple")
    target = load_target(TargetConfig(args.features, dtype="float32")).to(device)
    lpips = None if args.lpips is None else load_perceptual(LPIPSConfig(str(args.lpips))).to(device)
    with tempfile.TemporaryDirectory() as folder:
        keep = args.keep or (Path(folder) if args.inception is not None else None)
        batches = pixels_of(files, args.size, args.batch_size, _watch("rebuilding"))
        measures = score(scored, batches, target, lpips, keep)
        if args.inception is not None:
            assert keep is not None
            found = by_inception(keep / REAL, keep / REBUILT, args.inception, args.batch_size, ("fid",))
            measures["vae.rfid"] = found["images.fid"]
    show(f"{args.vae} on {args.pictures}", measures)
    if args.json is not None:
        sha256 = {"vae": fingerprint(tensors_of(scored.autoencoder)), "features": fingerprint(tensors_of(target.encoder))}
        write_json(args.json, measures, protocol(args, sha256, pictures=len(files)))


def decoder(args: Decoder) -> None:
    """Draws, compares, prints the measures, and writes them where told.

    Raises:
        ValueError: a number is out of range, or the release or the encoder cannot be loaded.
    """
    if args.images < 2 or args.batch_size < 1 or args.steps < 1:
        raise ValueError("give --images of at least 2, and --batch-size and --steps of at least 1")
    from data.loader import Data
    from data.loader import World as Scenes
    from data.told import ScenesTold
    from model.assets import fingerprint, tensors_of
    from model.targets import TargetConfig, load_target
    from sample.decoder_scores import score
    from sample.labelled import load_decoder
    from sample.measures import show, write_json
    from sample.pipeline import default_device
    from sample.protocol import protocol

    scored = load_decoder(args.release).to(default_device())
    if not scored.labels.config.places:
        raise ValueError(f"--release {args.release} was told class numbers; only decoders told scenes can be scored")
    target = load_target(TargetConfig(args.features, dtype="float32")).to(default_device())
    measures = score(
        scored,
        target,
        ScenesTold(),
        Data(sources=(Scenes(split="val"),), task="labelled", image_size=scored.image_size),
        args.images,
        args.seed,
        args.batch_size,
        args.steps,
        _watch("drawing"),
    )
    show(f"{args.release}", measures)
    if args.json is not None:
        modules = {"sit": scored.sit, "vae": scored.vae.autoencoder, "labels": scored.labels, "features": target.encoder}
        write_json(args.json, measures, protocol(args, {k: fingerprint(tensors_of(v)) for k, v in modules.items()}))


def world(args: World) -> None:
    """Draws, asks, prints the measures, and writes them where told.

    Raises:
        ValueError: a number is out of range, or the release cannot be loaded or draws too small to be read.
    """
    if args.n < 0 or args.images < 0 or args.n + args.images == 0 or args.batch_size < 1:
        raise ValueError("give --n or --images above 0, none below, and a --batch-size of at least 1")
    if args.grid is not None and not args.n:
        raise ValueError("--grid shows drawn pictures; give --n above 0, or leave it out")
    # heavy imports wait until the arguments are right, so that --help stays instant
    from model.files import write_whole
    from sample.measures import Measure, show, write_json
    from sample.pipeline import Pipeline
    from sample.protocol import parts_of, protocol
    from sample.world_answers import exams, understanding
    from sample.world_drawing import Judged, drawing, picture_of
    from sample.world_suite import suite

    pipeline = Pipeline.from_release(args.release)

    def draw(prompts, seeds):
        return pipeline(prompts, seeds, args.drawing)

    measures: dict[str, Measure] = {}
    judged: list[Judged] = []
    for split in args.split if args.n else ():
        name = "generation" if split == "val" else f"generation.{split}"
        asked = suite(args.seed, split, args.n)
        scores, verdicts = drawing(draw, asked, name, args.seed, args.batch_size, _watch(f"drawing {split}"))
        measures |= scores
        judged += verdicts
    if args.images:
        asked = exams(args.seed, "val", args.images)
        measures |= understanding(pipeline.model.mllm, asked, args.batch_size, _watch("asking"))
    show(f"{args.release}", measures)
    if args.grid is not None:
        picture = picture_of(judged)
        write_whole(args.grid, lambda temporary: picture.save(temporary, format="PNG"))
    told = protocol(args, parts_of(pipeline.model))
    if args.json is not None:
        write_json(args.json, measures, told)
    if args.html is not None:
        from sample.report_html import page, world_figures

        text = page(f"What {args.release} draws and understands", measures, told, world_figures(judged))
        write_whole(args.html, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def edits(args: Edits) -> None:
    """Draws, judges, prints the measures, and writes them where told.

    Raises:
        ValueError: a number is out of range, or the release cannot be loaded or draws too small to be read.
    """
    if args.n < 1 or args.batch_size < 1:
        raise ValueError("give --n and --batch-size of at least 1")
    from model.files import write_whole
    from sample.measures import Measure, show, write_json
    from sample.pipeline import Pipeline
    from sample.protocol import parts_of, protocol
    from sample.world_edits import Dialogue, Judged, conversing, drawer, editing, grid

    pipeline = Pipeline.from_release(args.release)
    draw = drawer(pipeline, args.drawing)
    measures: dict[str, Measure] = {}
    judged: list[Judged] = []
    held: list[Dialogue] = []
    for split in args.split:
        scores, verdicts = editing(draw, split, args.n, args.seed, args.batch_size, _watch(f"editing {split}"))
        talked, dialogues = conversing(draw, split, args.n, args.seed, args.batch_size, _watch(f"conversing {split}"))
        measures |= scores | talked
        judged += verdicts
        held += dialogues
    show(f"{args.release}", measures)
    if args.grid is not None:
        picture = grid(judged, held)
        write_whole(args.grid, lambda temporary: picture.save(temporary, format="PNG"))
    if args.json is not None:
        write_json(args.json, measures, protocol(args, parts_of(pipeline.model)))


def _watch(what: str):
    """Wraps an iterable in a progress bar on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import track

    def watch(steps: Iterable) -> Iterable:
        return track(steps, what, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())

    return watch


if __name__ == "__main__":
    sys.exit(run(main))
