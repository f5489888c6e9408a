"""Tar shards in webdataset's and img2dataset's layout -> raw samples by number, in any order.

A shard is an uncompressed tar; a sample is its members with the same name up to the first dot: `000000042.jpg`,
`000000042.txt`, `000000042.json`, and `000000042.source0.png` and so on for source images. Each shard is indexed once
(data/shard_index.py), and from then on a sample costs one pread a member. Nothing is extracted to disk, and nothing but
images, text, JSON and class numbers (`000000042.cls`) is read.
"""

import glob
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
from PIL import Image

from data.latents import decode_array, note, rows_of
from data.records import BadSample
from data.shard_index import BLOCK_BYTES, CLASS, IMAGES, LATENT, MAX_BYTES, ShardIndex, index_shard, index_shards
from data.storage import CacheConfig, Files, Span, Urls, is_url, name_of, store_of
from data.transforms import decode_image, to_rgb

SIZE_FIELD = 124 - BLOCK_BYTES, 136 - BLOCK_BYTES  # where a tar header says it, in octal digits; from the content on
MAX_GAP = 8 * BLOCK_BYTES  # between members that are read at once: their headers, and some kilobytes of others


@dataclass(frozen=True)
class Shards:
    """Samples of tar shards: local ones, or URLs (https, s3, gs, az, hf) that have an index (data.index) or are streamed."""

    urls: str  # paths with braces and wildcards, e.g. "shards/{00000..00009}.tar" or "shards/*.tar"
    weight: float = 1.0  # this source's share of the samples, relative to the others'
    latents: str | None = None  # folder of data.precompute, read in place of the pictures to draw
    stream: int = 0  # above 0: read from end to end, without an index, through a buffer of so many samples (data/stream.py)

    def __post_init__(self) -> None:
        if self.stream < 0:
            raise ValueError(
                f"data.sources stream is {self.stream}; give 0 (indexed) or the samples of a buffer, such as 1000"
            )
        if self.stream and self.latents is not None:
            raise ValueError("data.sources latents are found by index, and a stream has none; set stream to 0")


class ShardSource:
    """Raw samples of all shards that a pattern names, by number."""

    def __init__(
        self,
        urls: str,
        latents: str | None = None,
        keep_pictures: bool = False,
        shapes: bool = False,
        cache: CacheConfig = CacheConfig(),
    ):
        """`latents` stand for the pictures to draw, which are then not decoded unless `keep_pictures`. With `shapes`, those
        of all pictures are known."""
        self._take(index_shards(expand(urls), shapes), cache)
        if latents is not None:
            if self._storage is not self._files:
                raise ValueError(f"data.sources latents belong to local shards, and {urls!r} lie elsewhere; leave them out")
            recorded = note(Path(latents))["shards"]  # once: it names every shard
            self._latents = [_latents_of(index, Path(latents), recorded) for index in self._indexes]
            self._skipped = () if keep_pictures else IMAGES
        if not len(self):
            raise ValueError(f"data.sources urls {urls!r}: these shards hold no sample; name others")

    @classmethod
    def of(cls, index: ShardIndex) -> "ShardSource":
        """The samples of one shard, which may hold none."""
        source = cls.__new__(cls)
        source._take([index], CacheConfig())
        return source

    def _take(self, indexes: list[ShardIndex], cache: CacheConfig) -> None:
        self._indexes = indexes
        self._ends = list(accumulate(len(found) for found in indexes))
        self._latents: list[tuple[ShardIndex, np.ndarray]] | None = None
        self._skipped: tuple[str, ...] = ()  # extensions that are not read
        self._files = Files()
        self._storage = Urls(cache) if is_url(indexes[0].path) else self._files

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def shapes(self) -> np.ndarray:
        """[samples, 2] heights and widths of the pictures, of a source opened with them; 0 0 where one is not known."""
        known = [index.shapes for index in self._indexes if index.shapes is not None]
        assert len(known) == len(self._indexes)
        return np.concatenate(known)

    def origin(self, index: int) -> str:
        """The shard of sample number `index`."""
        return self._indexes[self._locate(index)[0]].path

    def fetch(self, indices: Sequence[int]) -> None:
        """Bring samples at once that will be read next; needless where they are local."""
        if self._storage is self._files:
            return
        spans: list[Span] = []
        for index in indices:
            with suppress(BadSample):  # `read` says so
                spans += _spans(*self._members(*self._locate(index)))
        self._storage.fetch(spans)

    def read(self, index: int) -> dict[str, Any]:
        """Sample number `index` of all, decoded; BadSample where a member is broken."""
        shard, row = self._locate(index)
        latent = None if self._latents is None else self._latent(shard, row)
        path, places = self._members(shard, row)
        key = self._indexes[shard].keys[row].decode(errors="replace")
        return decode_members(key, self._contents(path, places)) | {"latent": latent}

    def _locate(self, index: int) -> tuple[int, int]:
        """Shard number and row of a sample."""
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard] - len(self._indexes[shard]))

    def _members(self, shard: int, row: int) -> tuple[str, dict[str, tuple[int, int]]]:
        """The path of a shard, and offset and size of each member of a sample that is read; BadSample for one too large."""
        found = self._indexes[shard]
        given = zip(found.extensions, found.spans[row].tolist(), strict=True)
        skipped = (LATENT, *self._skipped)
        places = {ext: (at, size) for ext, (at, size) in given if size >= 0 and ext not in skipped}
        check_sizes({extension: size for extension, (_, size) in places.items()})
        return found.path, places

    def _contents(self, path: str, places: dict[str, tuple[int, int]]) -> dict[str, bytes]:
        """The bytes of a sample's members. ValueError where they are not the ones that were indexed."""
        contents = {}
        for span in _spans(path, places):
            data = self._storage.read(span)
            for extension, (offset, size) in places.items():
                if span.start < offset <= span.end:
                    at = offset - span.start
                    contents[extension] = _checked(data, at, size, path)
        return contents

    def fingerprint(self) -> str:
        """sha256 of the shards' names and of the names, places and sizes of their members: where they lie may change."""
        sha = hashlib.sha256()
        for found in self._indexes:
            extensions, spans = found.places()
            sha.update(repr((name_of(found.path), len(found), extensions)).encode())
            sha.update(found.keys.tobytes() + spans)
        return sha.hexdigest()

    def _latent(self, shard: int, row: int) -> np.ndarray:
        assert self._latents is not None
        index, rows = self._latents[shard]
        if rows[row] < 0:
            raise BadSample("a picture has no latent: it could not be encoded")
        offset, size = index.spans[rows[row], index.extensions.index(LATENT)].tolist()
        data = self._files.read(Span(index.path, offset - BLOCK_BYTES, offset + size))
        return decode_array(_checked(data, BLOCK_BYTES, size, index.path))


def check_sizes(sizes: dict[str, int]) -> None:
    """BadSample for a member, by extension, of more bytes than its kind may have."""
    if any(size > MAX_BYTES[extension.rpartition(".")[2]] for extension, size in sizes.items()):
        raise BadSample("a member is larger than its kind may be")


def _spans(path: str, places: dict[str, tuple[int, int]]) -> list[Span]:
    """What is read of a shard for members of these offsets and sizes: each with the header before it, neighbours at once."""
    spans: list[Span] = []
    for offset, size in sorted(places.values()):
        if spans and offset - spans[-1].end <= MAX_GAP:
            spans[-1] = Span(path, spans[-1].start, offset + size)
        else:
            spans.append(Span(path, offset - BLOCK_BYTES, offset + size))
    return spans


def _checked(data: bytes, at: int, size: int, path: str) -> bytes:
    """The member whose content begins at `at`. ValueError unless its header still says the size that was indexed."""
    begin, end = SIZE_FIELD
    said = data[at + begin : at + end].strip(b"\0 ")
    if len(data) < at + size or not said.isdigit() or int(said, 8) != size:
        raise ValueError(
            f"shard {path} is not what was indexed; fetch it again, or index what is there: remove "
            f"{name_of(path)}.idx.json, then python -m data.index"
        )
    return data[at : at + size]


def decode_members(key: str, members: dict[str, bytes]) -> dict[str, Any]:
    """One sample's bytes by extension -> raw sample, its images upright RGB; BadSample where one cannot be decoded."""
    try:
        described = json.loads(members.get("json", b"{}"))
        number = members.get(CLASS, b"").decode().strip()
        text = members.get("txt", b"").decode()
        images = {name: to_rgb(decode_image(data)) for name, data in members.items() if name.rpartition(".")[2] in IMAGES}
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadSample("a json member cannot be parsed") from error
    except UnicodeDecodeError as error:
        raise BadSample("a text, json or cls member is not UTF-8") from error
    except ValueError as error:
        raise BadSample(str(error)) from error  # decode_image's fixed phrases
    if not isinstance(described, dict):
        raise BadSample("a json member is not an object")
    if number and not isinstance(described.get("label"), int | dict):
        described["label"] = int(number) if re.fullmatch(r"-?\d+", number) else number
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
    """Sorted paths or URLs of the shards that a pattern of braces and wildcards names. ValueError for a part that names
    none, and for what is not read."""
    paths: set[str] = set()
    for pattern in braceexpand.braceexpand(urls):
        found = _listed(pattern) if is_url(pattern) else glob.glob(os.path.expanduser(pattern))
        if not found:
            raise ValueError(f"no shard matches {pattern!r} of data.sources urls {urls!r}; check the path")
        paths.update(found)
    if len({is_url(path) for path in paths}) > 1:
        raise ValueError(f"data.sources urls {urls!r} are partly local and partly elsewhere; give two sources")
    return sorted(paths)


def expand_local(urls: str) -> list[str]:
    """As `expand`, and ValueError for shards elsewhere."""
    paths = expand(urls)
    if is_url(paths[0]):
        raise ValueError(f"{urls!r} lie elsewhere, and only local shards can be worked on; fetch them first")
    return paths


def _listed(url: str) -> list[str]:
    if not glob.has_magic(url):
        return [url]
    if url.startswith("http"):
        if re.search(r"[*\[]", url):
            raise ValueError(
                f"data.sources urls {url!r}: no web server lists its files; name them with braces, {{0000..0099}}"
            )
        return [url]  # a question mark begins the query of a signed URL
    store = store_of(url)
    return [store.unstrip_protocol(path) for path in store.glob(url)]
