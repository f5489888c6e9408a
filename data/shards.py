"""Tar shards in webdataset's and img2dataset's layout -> raw samples by number, in any order.

A shard is an uncompressed tar; a sample is its members with the same name up to the first dot: `000000042.jpg`,
`000000042.txt`, `000000042.json`, and `000000042.source0.png` and so on for source images. Each shard is indexed once
(data/shard_index.py), and from then on a sample costs one pread a member. Nothing is extracted to disk, and nothing but
images, text and JSON is read.
"""

import glob
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
from PIL import Image

from data.latents import decode_array, note, rows_of
from data.records import BadSample
from data.shard_index import IMAGES, LATENT, MAX_BYTES, ShardIndex, index_shard
from data.transforms import decode_image, to_rgb

MAX_OPEN_FILES = 64


@dataclass(frozen=True)
class Shards:
    """Samples of local tar shards."""

    urls: str  # paths with braces and wildcards, e.g. "shards/{00000..00009}.tar" or "shards/*.tar"
    weight: float = 1.0  # this source's share of the samples, relative to the others'
    latents: str | None = None  # folder of data.precompute, read in place of the pictures to draw


class ShardSource:
    """Raw samples of all shards that a pattern names, by number."""

    def __init__(self, urls: str, latents: str | None = None, keep_pictures: bool = False):
        """`latents` stand for the pictures to draw, which are then not decoded unless `keep_pictures`."""
        self._take([index_shard(path) for path in expand(urls)])
        if latents is not None:
            recorded = note(Path(latents))["shards"]  # once: it names every shard
            self._latents = [_latents_of(index, Path(latents), recorded) for index in self._indexes]
            self._skipped = () if keep_pictures else IMAGES
        if not len(self):
            raise ValueError(f"data.sources urls {urls!r}: these shards hold no sample; name others")

    @classmethod
    def of(cls, index: ShardIndex) -> "ShardSource":
        """The samples of one shard, which may hold none."""
        source = cls.__new__(cls)
        source._take([index])
        return source

    def _take(self, indexes: list[ShardIndex]) -> None:
        self._indexes = indexes
        self._ends = list(accumulate(len(found) for found in indexes))
        self._latents: list[tuple[ShardIndex, np.ndarray]] | None = None
        self._skipped: tuple[str, ...] = ()  # extensions that are not read
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor, least recently used first

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> dict[str, Any]:
        """Sample number `index` of all, decoded; BadSample where a member is broken."""
        shard = bisect_right(self._ends, index)
        found = self._indexes[shard]
        row = index - (self._ends[shard] - len(found))
        latent = None if self._latents is None else self._latent(shard, row)
        members = {}
        for extension, (offset, size) in zip(found.extensions, found.spans[row].tolist(), strict=True):
            if size > MAX_BYTES[extension.rpartition(".")[2]]:
                raise BadSample("a member is larger than its kind may be")
            if size >= 0 and extension != LATENT and extension not in self._skipped:
                members[extension] = self._bytes(shard, offset, size)
        return decode_members(found.keys[row].decode(errors="replace"), members) | {"latent": latent}

    def fingerprint(self) -> str:
        """sha256 of the shards' names and of the names, places and sizes of their members: where they lie may change."""
        sha = hashlib.sha256()
        for found in self._indexes:
            sha.update(repr((os.path.basename(found.path), len(found), found.extensions)).encode())
            sha.update(found.keys.tobytes() + found.spans.tobytes())
        return sha.hexdigest()

    def _latent(self, shard: int, row: int) -> np.ndarray:
        assert self._latents is not None
        index, rows = self._latents[shard]
        if rows[row] < 0:
            raise BadSample("a picture has no latent: it could not be encoded")
        offset, size = index.spans[rows[row], index.extensions.index(LATENT)].tolist()
        return decode_array(self._bytes(~shard, offset, size))

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor(shard), size, offset)
        if len(data) != size:
            raise ValueError(f"shard {self._path(shard)} has shrunk since it was indexed; pack it again")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) == MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self._path(shard), os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _path(self, shard: int) -> str:
        """Of a shard, or for ~shard of its latents."""
        if shard >= 0:
            return self._indexes[shard].path
        assert self._latents is not None
        return self._latents[~shard][0].path

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}  # descriptors do not survive pickling to a worker


def decode_members(key: str, members: dict[str, bytes]) -> dict[str, Any]:
    """One sample's bytes by extension -> raw sample, its images upright RGB; BadSample where one cannot be decoded."""
    try:
        images = {name: to_rgb(decode_image(data)) for name, data in members.items() if name.rpartition(".")[2] in IMAGES}
        described = json.loads(members.get("json", b"{}"))
        text = members.get("txt", b"").decode()
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadSample("a json member cannot be parsed") from error
    except UnicodeDecodeError as error:
        raise BadSample("a text or json member is not UTF-8") from error
    except ValueError as error:
        raise BadSample(str(error)) from error  # decode_image's fixed phrases
    if not isinstance(described, dict):
        raise BadSample("a json member is not an object")
    image = next((images[extension] for extension in IMAGES if extension in images), None)
    return {"key": key, "image": image, "txt": text, "json": described, "sources": _sources(images), "mask": _mask(images)}


def _latents_of(index: ShardIndex, folder: Path, recorded: dict[str, str]) -> tuple[ShardIndex, np.ndarray]:
    """The index of a shard's latents, and where each sample's are in it."""
    name = os.path.basename(index.path)
    if not (folder / name).is_file():
        raise ValueError(
            f"data.sources latents {str(folder)!r} has none of shard {name}; go on with python -m data.precompute"
        )
    latents = index_shard(str(folder / name))
    return latents, rows_of(latents, index, recorded.get(name))


def _sources(images: dict[str, Image.Image]) -> tuple[Image.Image, ...]:
    """The images of members KEY.source0.EXT, KEY.source1.EXT, ... in the order of their numbers."""
    numbered = {}
    for name, image in images.items():
        if match := re.fullmatch(r"source(\d+)\.\w+", name):
            numbered[int(match[1])] = image
    return tuple(numbered[number] for number in sorted(numbered))


def _mask(images: dict[str, Image.Image]) -> Image.Image | None:
    """The image of member KEY.mask.EXT, grey, where there is one."""
    found = next((image for name, image in images.items() if name.startswith("mask.")), None)
    return found and found.convert("L")


def expand(urls: str) -> list[str]:
    """Sorted paths of the shards that a pattern of braces and wildcards names. ValueError for a part that names none."""
    if re.match(r"\w+:", urls):
        raise ValueError(f"data.sources urls {urls!r} is not a local path; download the shards and name their files")
    paths: set[str] = set()
    for pattern in braceexpand.braceexpand(urls):
        found = glob.glob(os.path.expanduser(pattern))
        if not found:
            raise ValueError(f"no shard matches {pattern!r} of data.sources urls {urls!r}; check the path")
        paths.update(found)
    return sorted(paths)
