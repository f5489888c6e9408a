"""A folder of drawn pictures -> how far they lie from real ones (`sample/image_scores.py`), and how well they fit
their prompts (`sample/clip_score.py`)."""

from dataclasses import dataclass
from pathlib import Path

from sample.progress import progress


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
    if args.prompts is not None and args.clip is None:
        raise ValueError("--prompts is what a CLIP reads; name one with --clip, or leave it out")
    from model.assets import fingerprint, tensors_of
    from model.files import sha256_of
    from model.targets import TargetConfig, load_target
    from sample.clip_score import Clip, prompts_of
    from sample.clip_score import score as by_clip
    from sample.image_scores import SPLITS, by_inception, check_alike, check_inception, features, local, pictures_in
    from sample.measures import Measure, show, write_json
    from sample.pipeline import default_device
    from sample.protocol import protocol

    device, drawn = default_device(), pictures_in(args.drawn)
    counts = {"drawn": len(drawn)}
    measures: dict[str, Measure] = {}
    sha256: dict[str, str] = {}
    real = [] if args.real is None else pictures_in(args.real)
    if args.inception is not None:
        check_inception(args.inception)
        for files in (drawn, real):
            check_alike(files)
        if len(drawn) < SPLITS:
            raise ValueError(f"--drawn {args.drawn} holds {len(drawn)} pictures; --inception takes {SPLITS} or more")
    clip = None if args.clip is None else Clip(args.clip, device)
    prompts = [] if clip is None else prompts_of(drawn, args.drawn, args.prompts)
    if args.real is not None:
        counts["real"] = len(real)
        target = load_target(TargetConfig(args.features, dtype="float32")).to(device)
        looked = (args.size, args.batch_size, device)
        measures |= local(
            features(real, target, *looked, progress("real")), features(drawn, target, *looked, progress("drawn"))
        )
        sha256["features"] = fingerprint(tensors_of(target.encoder))
        if args.inception is not None:
            measures |= by_inception(args.real, args.drawn, args.inception, args.batch_size)
            sha256["inception"] = sha256_of(args.inception)
    if clip is not None:
        measures |= by_clip(clip, drawn, prompts, args.batch_size, progress("reading"))
        sha256["clip"] = clip.sha256
    show(f"{args.drawn} against {args.real or 'its prompts'}", measures)
    if args.json is not None:
        write_json(args.json, measures, protocol(args, sha256, pictures=counts))
