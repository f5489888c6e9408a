"""Latents of shards, made once (data/precompute.py) and read in place of their pictures.

A folder of latents has a tar for every shard, of the same name, with `KEY.npy`: the unit-variance latents of the sample's
picture, float16 [c, h, w]; and `latents.json`, which says what they are latents of. Whoever trains on them checks both: that
autoencoder and picture size are its own, and that the shards are still those that were encoded.
"""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from data.records import BadSample
from data.shard_index import ShardIndex
from model.assets import fingerprint, tensors_of
from model.files import read_json
from model.vae import LatentVAE

NOTE = "latents.json"
TRANSFORM = "central square of whole pixels, antialiased bicubic on bytes, [-1, 1]"


def latent_fingerprint(vae: LatentVAE, image_size: int) -> str:
    """sha256 over everything that decides a latent: the autoencoder's tensors, the transform and the size of pictures."""
    digest = hashlib.sha256(fingerprint(tensors_of(vae.autoencoder)).encode())
    digest.update(json.dumps([vae.statistics, TRANSFORM, image_size]).encode())
    return digest.hexdigest()


def shard_state(index: ShardIndex) -> str:
    """sha256 over a shard's size, keys and places of members: what changes when it is packed again."""
    digest = hashlib.sha256(str(os.path.getsize(index.path)).encode())
    digest.update(index.keys.tobytes() + index.places()[1])
    return digest.hexdigest()


def note(folder: Path) -> dict[str, Any]:
    """What `latents.json` says. ValueError where there is none, or where it is damaged."""
    if not (folder / NOTE).is_file():
        raise ValueError(f"data.sources latents {str(folder)!r} has no {NOTE}; make it with python -m data.precompute")
    found = read_json(folder / NOTE)
    if not isinstance(found, dict) or not isinstance(found.get("shards"), dict) or "fingerprint" not in found:
        raise ValueError(f"{folder / NOTE} is no note of latents; make them again with python -m data.precompute")
    return found


def check_latents(folder: Path, vae: LatentVAE, image_size: int) -> None:
    """ValueError unless the latents are this autoencoder's, of pictures of this size."""
    found = note(folder)
    if found["fingerprint"] != latent_fingerprint(vae, image_size):
        raise ValueError(
            f"data.sources latents {str(folder)!r} were made with {found.get('vae')} at {found.get('image_size')} pixels, "
            "which is not this run's autoencoder, its dtype or picture size; make them again with python -m data.precompute"
        )


def rows_of(latents: ShardIndex, index: ShardIndex, recorded: str | None) -> np.ndarray:
    """Where the latents of each sample of a shard are in their own tar, [samples]; -1 where a sample has none. ValueError
    when the shard is not the one that was encoded."""
    if recorded != shard_state(index):
        raise ValueError(f"shard {index.path} is not the one whose latents are in {latents.path}; make them again")
    places = {key: row for row, key in enumerate(latents.keys.tolist())}
    return np.array([places.get(key, -1) for key in index.keys.tolist()])


def encode_array(latent: np.ndarray) -> bytes:
    """An array -> the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, latent, allow_pickle=False)
    return buffer.getvalue()


def decode_array(data: bytes) -> np.ndarray:
    """The bytes of an .npy file -> float16 [c, h, w]. BadSample where they are none."""
    try:
        latent = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadSample("a latent cannot be read") from error
    if latent.dtype != np.float16 or latent.ndim != 3:
        raise BadSample("a latent is no float16 [c, h, w]")
    return latent
