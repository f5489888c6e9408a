"""Folders of pictures -> how far drawn ones lie from real ones, and how well they fit their prompts.

By the features of any target encoder, which makes a local distance that is comparable with itself alone; or by Inception,
through torch-fidelity and a file of its weights, which makes the FID, IS and KID of the literature. Letters: B pictures of a
batch, E width of features, H W pixels."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.transforms import FORMATS, decode_image, resize_and_crop, to_tensor
from model.targets import Target
from sample.decoder_scores import FEATURE_GRID
from sample.fidelity import frechet, kernel_distance, precision_recall
from sample.measures import Measure
from sample.progress import Track

SPLITS = 10  # in which torch-fidelity parts pictures for the inception score; none may be empty
INCEPTION_ENDINGS = (".png", ".jpg", ".jpeg")  # of the files that torch-fidelity reads


def pictures_in(folder: Path) -> list[Path]:
    """The picture files below a folder, by name. Raises ValueError when there are none."""
    endings = {f".{name.lower()}" for name in FORMATS} | {".jpg", ".tif"}
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)
    if not found:
        raise ValueError(f"{folder} holds no pictures; name a folder of {', '.join(sorted(endings))} files")
    return found


@torch.no_grad()
def features(files: list[Path], target: Target, size: int, batch_size: int, device: torch.device, watch: Track) -> Tensor:
    """[B, E]: of each picture the mean over places, its central square scaled to `size` pixels."""
    batches = pixels_of(files, size, batch_size, watch)
    return torch.cat([target(pixels.to(device), FEATURE_GRID).mean(1).cpu() for pixels in batches])


def pixels_of(files: list[Path], size: int, batch_size: int, watch: Track) -> Iterator[Tensor]:
    """[B, 3, H, W] in [-1, 1], the central square of each picture scaled to `size` pixels."""
    for start in watch(range(0, len(files), batch_size)):
        yield _pixels(files[start : start + batch_size], size)


def local(real: Tensor, drawn: Tensor) -> dict[str, Measure]:
    """Distances by features [B, E]; named local, for they are not those of Inception."""
    precision, recall = precision_recall(real, drawn)
    return {
        "images.local_frechet": Measure(frechet(drawn, real), n=len(drawn)),
        "images.local_kernel": Measure(kernel_distance(drawn, real), n=len(drawn)),
        "images.local_precision": Measure(precision, n=len(drawn), unit="share"),
        "images.local_recall": Measure(recall, n=len(real), unit="share"),
    }


def check_inception(weights: Path) -> None:
    """ValueError where torch-fidelity cannot be imported or its weights are missing."""
    if not weights.is_file():
        raise ValueError(
            f"--inception {weights} is no file; give torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        )
    try:
        import torch_fidelity  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        problem = f"--inception needs torch-fidelity and torchvision ({error}); pip install -e '.[fidelity]'"
        raise ValueError(problem) from error


def check_alike(files: Sequence[Path]) -> None:
    """ValueError for pictures that torch-fidelity passes over, or cannot put into one batch."""
    sizes = {}
    for path in files:
        if path.suffix.lower() not in INCEPTION_ENDINGS:
            raise ValueError(f"--inception: {path} would be passed over; save it as .png or .jpg")
        with Image.open(path) as picture:
            sizes.setdefault(picture.size, path)
    if len(sizes) > 1:
        (first, one), (second, other), *_ = sizes.items()
        told = " and ".join(f"{path} has {w} x {h}" for (w, h), path in ((first, one), (second, other)))
        raise ValueError(f"--inception: pictures of a folder have one size, but {told} pixels; scale them first")


def by_inception(
    real: Path, drawn: Path, weights: Path, batch_size: int, metrics: Sequence[str] = ("fid", "isc", "kid", "prc")
) -> dict[str, Measure]:
    """FID, IS, KID, precision and recall as torch-fidelity computes them. Raises ValueError as `check_inception` does."""
    check_inception(weights)
    from torch_fidelity import calculate_metrics  # pyright: ignore[reportMissingImports]

    wanted = dict.fromkeys(metrics, True)
    options: dict[str, Any] = {"feature_extractor_weights_path": str(weights), "batch_size": batch_size}
    found = calculate_metrics(
        input1=str(drawn),
        input2=str(real),
        cuda=torch.cuda.is_available(),
        samples_find_deep=True,
        kid_subset_size=min(1000, len(pictures_in(drawn)), len(pictures_in(real))),
        **wanted,
        **options,
    )
    names = {
        "images.fid": ("frechet_inception_distance", ""),
        "images.inception_score": ("inception_score_mean", ""),
        "images.kid": ("kernel_inception_distance_mean", ""),
        "images.precision": ("recall", "share"),  # torch-fidelity takes its first input, which is scored, for the real ones
        "images.recall": ("precision", "share"),
    }
    n = len(pictures_in(drawn))
    return {name: Measure(float(found[key]), n=n, unit=unit) for name, (key, unit) in names.items() if key in found}


def picture_at(path: Path) -> Image.Image:
    """The picture of a file, whole. ValueError, which names it, for a file that is none."""
    try:
        return decode_image(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; remove it") from error


def _pixels(files: list[Path], size: int) -> Tensor:
    """[B, 3, H, W]. Raises ValueError for a file that is no picture."""
    return torch.stack([to_tensor(resize_and_crop(picture_at(path), size)) for path in files])
