"""A VAE and a folder of pictures -> how well it rebuilds them (`sample/vae_scores.py`)."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from sample.progress import progress


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


def vae(args: VAE) -> None:
    """Rebuilds, compares, prints the measures, and writes them where told.

    Raises:
        ValueError: a number is out of range, the folder holds no pictures, or a network cannot be loaded.
    """
    if args.size < 11 or args.batch_size < 1:
        raise ValueError("give a --size of at least 11 and a --batch-size of at least 1")
    from model.assets import fingerprint, tensors_of
    from model.files import check_new, sha256_of
    from model.perceptual import LPIPS, LPIPSConfig, load_perceptual
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
        batches = pixels_of(files, args.size, args.batch_size, progress("rebuilding"))
        measures = score(scored, batches, target, lpips, keep)
        if args.inception is not None:
            assert keep is not None
            found = by_inception(keep / REAL, keep / REBUILT, args.inception, args.batch_size, ("fid",))
            measures["vae.rfid"] = found["images.fid"]
    show(f"{args.vae} on {args.pictures}", measures)
    if args.json is not None:
        sha256 = {"vae": fingerprint(tensors_of(scored.autoencoder)), "features": fingerprint(tensors_of(target.encoder))}
        if isinstance(lpips, LPIPS):
            sha256["lpips"] = fingerprint(tensors_of(lpips))
        if args.inception is not None:
            sha256["inception"] = sha256_of(args.inception)
        write_json(args.json, measures, protocol(args, sha256, pictures=len(files)))
