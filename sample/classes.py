"""Classes -> PNG files and the .npz that image metrics read, the same pictures on any number of processes.

    torchrun --nproc_per_node 8 -m sample.classes --release runs/repae-xl-f8d4/release --n 50000 --out pictures
    python -m sample.classes --release runs/repae-xl-f8d4/release --n 50000 --out pictures --npz pictures.npz

Picture i has the seed `seed` + i and the name `00000i.png`. Pictures that are there already are not drawn again, so the same
command goes on where it was stopped, and the second one above only packs. The .npz is that of ADM's evaluation: arr_0 uint8
[n, H, W, 3], arr_1 labels [n].
"""

import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

from data.address import draw as address
from sample.cli import run
from sample.drawn import is_there, ranks, save, share
from sample.progress import progress
from sample.settings import Guidance, SolverName

if TYPE_CHECKING:
    from sample.labelled import LabelledDecoder


@dataclass(frozen=True, kw_only=True)
class Args:
    """Draw pictures of classes with a decoder that was trained on labels."""

    release: Path
    """The release folder of a run of configs/repae.py."""
    out: Path = Path("pictures")
    """The folder for the pictures."""
    n: int = 64
    """Pictures."""
    labels: Literal["balanced", "random"] = "balanced"
    """balanced: as many of each class, in turn; random: each drawn by itself. The two move a FID by about 0.1."""
    seed: int = 0
    """The first picture's seed; each further one is one higher."""
    solver: SolverName = "euler_maruyama"
    steps: int = 250
    guidance: float = 1.0
    """How strongly to follow the class; 1 follows it plainly, in half the time."""
    guidance_end: float = 1.0
    """Guide at times up to here (0 data, 1 noise)."""
    shard: str = "0/1"
    """i/n: draw every n-th picture from i on, counted from 0."""
    batch_size: int = 32
    """Pictures drawn at once; changes speed and memory, and a picture by its rounding alone."""
    npz: Path | None = None
    """Where to pack all pictures."""


def main(argv: list[str] | None = None) -> None:
    """Draws this rank's pictures, and packs all of them where told."""
    args = tyro.cli(Args, args=argv, description=Args.__doc__)
    if min(args.n, args.batch_size, args.steps) < 1:
        raise ValueError("give --n, --batch-size and --steps of at least 1")
    if args.npz is not None and (args.shard != "0/1" or ranks()[1] > 1):
        raise ValueError(
            "--npz packs what all processes drew; run it afterwards without torchrun and --shard, or leave it out"
        )
    from sample.labelled import load_decoder

    decoder = load_decoder(args.release)
    own = share(range(args.n), args.shard)
    draw(args, decoder, [n for n in own if not is_there(path_of(args, n), about(args, n, decoder))])
    if args.npz is not None:
        pack(args, decoder.classes)
        print(f"{args.n} pictures in {args.npz}")


def label(args: Args, number: int, classes: int) -> int:
    """The class of a picture; -1 where none is told."""
    if classes == 0:
        return -1
    return number % classes if args.labels == "balanced" else address(args.seed, "label", number) % classes


def draw(args: Args, decoder: "LabelledDecoder", numbers: list[int]) -> None:
    """Draws and writes the pictures of these numbers."""
    import torch

    from data.transforms import to_pil
    from sample.pipeline import default_device

    decoder.to(default_device())
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32, as the official script draws
    guidance = Guidance(args.guidance, end=args.guidance_end)
    starts = range(0, len(numbers), args.batch_size)
    for start in progress("drawing")(starts):
        batch = numbers[start : start + args.batch_size]
        words = torch.tensor([label(args, number, decoder.classes) + 1 for number in batch], device=default_device())
        told = words.view(-1, 1, 1), torch.zeros(len(batch), 1, 3, device=default_device())
        pixels = decoder.draw(told, [args.seed + number for number in batch], args.steps, args.solver, guidance)
        for number, picture in zip(batch, pixels.cpu(), strict=True):
            save(path_of(args, number), to_pil(picture), about(args, number, decoder))
    if numbers:
        print(f"{len(numbers)} pictures in {args.out}")


def about(args: Args, number: int, decoder: "LabelledDecoder") -> dict[str, object]:
    """What decides a picture."""
    kept = ("labels", "solver", "steps", "guidance", "guidance_end")
    own = {"class": label(args, number, decoder.classes), "seed": args.seed + number}
    return {"release": decoder.fingerprint, **{name: getattr(args, name) for name in kept}, **own}


def path_of(args: Args, number: int) -> Path:
    """The file of a picture."""
    return args.out / f"{number:0{max(6, len(str(args.n - 1)))}d}.png"


def pack(args: Args, classes: int) -> None:
    """Writes the .npz, one picture at a time, whole or not at all. Raises ValueError where one is missing."""
    from PIL import Image

    from model.files import write_whole

    missing = [number for number in range(args.n) if not path_of(args, number).is_file()]
    if missing:
        raise ValueError(f"--npz: {len(missing)} of {args.n} pictures are missing, the first {path_of(args, missing[0])}")
    labels = np.array([label(args, number, classes) for number in range(args.n)], dtype=np.int64)
    with Image.open(path_of(args, 0)) as first:
        shape = (args.n, first.height, first.width, 3)

    def write(part: Path) -> None:
        with zipfile.ZipFile(part, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)  # pyright: ignore[reportArgumentType]
                for number in range(args.n):
                    with Image.open(path_of(args, number)) as picture:
                        member.write(np.asarray(picture.convert("RGB")).tobytes())
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, labels)

    write_whole(args.npz, write)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    sys.exit(run(main))
