"""A SiT and its VAE -> how well they draw before there is any language model (`sample/decoder_scores.py`)."""

from dataclasses import dataclass
from pathlib import Path

from sample.progress import progress


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
        progress("drawing"),
    )
    show(f"{args.release}", measures)
    if args.json is not None:
        modules = {"sit": scored.sit, "vae": scored.vae.autoencoder, "labels": scored.labels, "features": target.encoder}
        write_json(args.json, measures, protocol(args, {k: fingerprint(tensors_of(v)) for k, v in modules.items()}))
