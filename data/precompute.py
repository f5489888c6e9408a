"""Pictures of shards -> their latents, once, so that training need not encode them in every epoch.

    python -m data.precompute 'shards/t2i/*.tar' --vae.path Efficient-Large-Model/Sana_1600M_512px_diffusers \\
        --vae.dtype bfloat16 --image-size 512 --out latents/t2i
    python -m train.run metaquery.base_sana --data.sources.0.latents latents/t2i

Autoencoder, dtype and size are those of the run, which refuses others. A 512-pixel picture of Sana's is 16 KiB. Each shard
becomes a tar of the same name, whole or not at all: the same command goes on where it was stopped. `--part 0/8` takes every
eighth shard, for eight processes or machines.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import tyro
from webdataset.writer import TarWriter

from data.latents import NOTE, encode_array, latent_fingerprint, note, shard_state
from data.parallel import bar
from data.records import BadSample
from data.shard_index import ShardIndex, index_shard
from data.shards import ShardSource, expand_local
from data.transforms import resize_and_crop, to_tensor
from model.files import write_json, write_whole
from model.vae import LatentVAE, VAEConfig, load_vae


@dataclass(frozen=True, kw_only=True)
class Args:
    """Encode the pictures of shards."""

    urls: tyro.conf.Positional[str]
    """Paths of the shards, with braces and wildcards."""
    vae: VAEConfig
    out: Path
    """Folder for the latents."""
    image_size: int
    """Pixels a side, as the run that reads them will have it."""
    batch_size: int = 16
    part: str = "0/1"
    """I/N: only every N-th shard, from number I on; the parts of one machine share its GPUs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when every shard of this part has its latents, 2 with one sentence for input that cannot be used."""
    args = tyro.cli(Args, args=arguments, prog="python -m data.precompute", description=__doc__)
    try:
        encode(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def encode(args: Args) -> None:
    """Encodes every shard that is not there yet.

    Raises:
        ValueError: no shard or autoencoder is found, a number is impossible, or the folder holds other latents.
    """
    first, parts = _part(args.part)
    paths = expand_local(args.urls)
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError("urls: two shards have the same name, and latents lie under it; encode their folders apart")
    device = f"cuda:{first % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    vae = load_vae(args.vae).to(device)
    if args.image_size < vae.factor or args.image_size % vae.factor:
        raise ValueError(f"--image-size is {args.image_size}; the autoencoder takes multiples of {vae.factor}")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}; give 1 or more")
    fingerprint = latent_fingerprint(vae, args.image_size)
    indexes = [index_shard(path) for path in paths]
    _announce(args, fingerprint, {Path(index.path).name: shard_state(index) for index in indexes})
    skipped = 0
    with bar("encoding") as progress:
        for index in progress.track(indexes[first::parts]):
            target = args.out / Path(index.path).name
            if not target.is_file():
                skipped += _encode(index, vae, args, target, device)
    print(f"{args.out}: latents of {len(indexes[first::parts])} shards" + (f", {skipped} samples refused" * bool(skipped)))


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(f"--part is {text!r}; give I/N with I from 0 to N - 1, such as 0/8")
    return int(match[1]), int(match[2])


def _announce(args: Args, fingerprint: str, shards: dict[str, str]) -> None:
    """Write what the folder's latents are of, or see that it says so already; parts may meet here."""
    path = args.out / NOTE
    found = note(args.out) if path.is_file() else {"fingerprint": fingerprint, "shards": {}}
    known = found["shards"]
    changed = [name for name, state in shards.items() if known.get(name, state) != state]
    if changed or found["fingerprint"] != fingerprint:
        raise ValueError(f"--out {args.out} holds latents of another autoencoder, picture size or shards; name a new folder")
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"fingerprint": fingerprint, "vae": asdict(args.vae), "image_size": args.image_size, "shards": known | shards}
    write_whole(path, lambda draft: write_json(draft, content))


def _encode(index: ShardIndex, vae: LatentVAE, args: Args, target: Path, device: str) -> int:
    """Write the latents of one shard; returns how many samples have none."""
    refused = 0

    def pictures() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal refused
        source = ShardSource.of(index)
        for row, key in enumerate(index.keys.tolist()):
            try:
                image = source.read(row)["image"]
                if image is None:
                    raise BadSample("no image")
                yield key.decode(errors="surrogateescape"), to_tensor(resize_and_crop(image, args.image_size))
            except BadSample:
                refused += 1  # training counts it by its reason, as it would without latents

    def write(draft: Path) -> None:
        with open(draft, "wb") as stream, TarWriter(stream, user="", group="", mtime=0, encoder=False) as tar:
            rest = pictures()
            while batch := list(islice(rest, args.batch_size)):
                latents = vae.encode(torch.stack([pixels for _, pixels in batch]).to(device))  # [B, c, h, w]
                for (key, _), latent in zip(batch, latents.cpu().numpy().astype(np.float16), strict=True):
                    tar.write({"__key__": key, "npy": encode_array(latent)})

    write_whole(target, write)
    return refused


if __name__ == "__main__":
    sys.exit(main())
