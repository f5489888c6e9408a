"""A tar shard -> where every sample's members lie in it, found once and kept beside the shard as `NAME.tar.idx.json`.

Of a shard elsewhere, the index beside it or in the user's cache folder is read; `python -m data.index` makes it.

tarfile takes a broken or missing header for the end of the archive and says nothing, so an archive counts as whole only
if an end-of-archive block follows the last member and nothing but zeros follows that.
"""

import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.storage import beside, download, is_url, name_of, user_cache
from data.transforms import UNKNOWN, Shape, upright_shape
from model.files import sha256_of, write_whole

IMAGES = ("jpg", "jpeg", "png", "webp")
LATENT = "npy"  # the member of a tar of latents (data/latents.py)
CLASS = "cls"  # the member of a class number
MAX_BYTES = dict.fromkeys(IMAGES, 64 << 20) | {"txt": 1 << 20, "json": 4 << 20, CLASS: 64, LATENT: 16 << 20}
"""By extension, of the members that are read."""
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # key, then all past the first dot: webdataset's convention
VERSION = 3
BLOCK_BYTES = 512  # of tar's format
AT_ONCE = 256  # indexes from elsewhere, of which the bytes are held
HEAD_BYTES = 1 << 16  # of a picture, in which its header nearly always lies

log = logging.getLogger(__name__)


class Damaged(ValueError):
    """A shard that is not a whole tar."""


@dataclass(frozen=True)
class ShardIndex:
    """One shard's samples. Arrays, so that worker processes share their memory."""

    path: str
    keys: np.ndarray  # [samples] UTF-8 bytes
    extensions: tuple[str, ...]
    spans: np.ndarray  # [samples, extensions, 2] int64: offset and size in bytes; size -1 where there is no such member
    shapes: np.ndarray | None = None  # [samples, 2] int32: height and width of the upright picture, 0 0 where it has none

    def __len__(self) -> int:
        return len(self.keys)

    def places(self) -> tuple[tuple[str, ...], bytes]:
        """Extensions and spans of all members but class numbers, which tell nothing that was always read."""
        kept = [column for column, name in enumerate(self.extensions) if name != CLASS]
        return tuple(self.extensions[column] for column in kept), self.spans[:, kept].tobytes()


def index_shards(paths: Sequence[str], shapes: bool = False) -> list[ShardIndex]:
    """The indexes of shards, with the `shapes` of their pictures or without; those of local ones are made where they are
    missing. ValueError for a shard that is not a whole tar, or that lies elsewhere and has no index."""
    elsewhere = [path for path in paths if is_url(path)]
    found = dict(zip(elsewhere, _remote_indexes(elsewhere, shapes), strict=True)) if elsewhere else {}
    for path in paths:
        if path not in found and (index := kept_index(path, False, shapes)) is not None:
            found[path] = index
    if missing := len(set(paths) - found.keys()):
        log.warning(
            "%d of %d shards are indexed first, being new or changed; python -m data.index does so ahead",
            missing,
            len(paths),
        )
    return [found[path] if path in found else index_shard(path, shapes=shapes) for path in paths]


def index_shard(path: str, digest: bool = False, shapes: bool = False) -> ShardIndex:
    """The index of the local shard at `path`, read from its cache or made; with `digest`, its cache keeps the shard's sha256
    as it is now. ValueError if the shard is not a whole tar."""
    found = kept_index(path, digest, shapes)
    if found is None:
        content = make_index(path, digest, shapes)
        with suppress(OSError):  # made again the next time, then
            keep_index(path, content)
        found = _to_index(path, content)
    return found


def kept_index(path: str, digest: bool, shapes: bool) -> ShardIndex | None:
    """The index of the local shard at `path` from its cache; None where that says less, or of what has changed."""
    stamp = _stamp(path)
    for cache in _caches(path):
        content = _cached(cache, stamp)
        if content is not None and _suffices(content, digest, shapes):
            return _to_index(path, content)
    return None


def make_index(path: str, digest: bool, shapes: bool) -> dict[str, Any]:
    """What the index file of a local shard says."""
    content = _stamp(path) | scan(path)
    if shapes:
        content["shapes"] = _shapes(path, _to_index(path, content))
    if digest:
        return content | {"sha256": sha256_of(Path(path)), "hashed_mtime_ns": content["mtime_ns"]}
    return content | recorded_digest(path)


def keep_index(path: str, content: dict[str, Any], out: Path | None = None) -> ShardIndex:
    """Write the index of the shard at `path` into the folder `out`, by default where it is looked for. OSError where that
    fails."""
    places = _caches(path) if out is None else [out / (name_of(path) + ".idx.json")]
    if not any(_write(place, content) for place in places):
        where = " and ".join(str(place.parent) for place in places)
        raise OSError(f"the index of shard {path} cannot be written to {where}; name another folder with --out")
    return _to_index(path, content)


def _stamp(path: str) -> dict[str, int]:
    state = os.stat(path)
    return {"version": VERSION, "size": state.st_size, "mtime_ns": state.st_mtime_ns}


def _suffices(content: dict[str, Any], digest: bool, shapes: bool) -> bool:
    hashed = content.get("hashed_mtime_ns") == content.get("mtime_ns")
    return (hashed or not digest) and ("shapes" in content or not shapes)


def _shapes(path: str, index: ShardIndex) -> list[Shape]:
    """Of every sample's picture, from its header; UNKNOWN where it has none that can be read."""
    columns = [column for name in IMAGES for column, extension in enumerate(index.extensions) if extension == name]
    with open(path, "rb") as file:
        return [next((_shape(file, *s[column]) for column in columns if s[column][1] >= 0), UNKNOWN) for s in index.spans]


def _shape(file: BinaryIO, offset: int, size: int) -> Shape:
    file.seek(offset)
    head = file.read(min(size, HEAD_BYTES))
    shape = upright_shape(head)
    return shape if shape != UNKNOWN or len(head) == size else upright_shape(head + file.read(size - len(head)))


def _remote_indexes(urls: Sequence[str], shapes: bool) -> list[ShardIndex]:
    found = []
    for url, (content, why) in zip(urls, _elsewhere(urls), strict=True):
        if content is None or not _suffices(content, False, shapes):
            raise ValueError(
                f"shard {url} has no index of version {VERSION}{' with shapes' * shapes}; make it with data.index, or "
                f"set the source's stream{f' ({why})' * bool(why)}"
            )
        found.append(_to_index(url, content))
    return found


def _elsewhere(urls: Sequence[str]) -> Iterator[tuple[dict | None, str]]:
    """What the indexes of these shards say, from beside them or from this user's cache folder; None where there is none,
    and what was answered. OSError where none can be seen."""
    now = {"version": VERSION}
    for part in (urls[start : start + AT_ONCE] for start in range(0, len(urls), AT_ONCE)):
        for url, answer in zip(part, download([beside(url, ".idx.json") for url in part]), strict=True):
            content = _parsed(answer, now) if isinstance(answer, bytes) else None
            content = content or next((held for cache in _caches(url) if (held := _cached(cache, now))), None)
            if content is None and isinstance(answer, OSError) and not isinstance(answer, FileNotFoundError):
                raise answer
            yield content, "" if isinstance(answer, bytes) else str(answer)


def recorded_digest(path: str) -> dict[str, Any]:
    """The sha256 that an index of this shard has, whatever became of the shard since, and of when it was; else empty."""
    names = ("sha256", "hashed_mtime_ns")
    cached = (_cached(cache, {}) for cache in _caches(path))
    for content in (held for held, _ in _elsewhere([path])) if is_url(path) else cached:
        if content is not None and all(name in content for name in names):
            return {name: content[name] for name in names}
    return {}


def scan(path: str) -> dict[str, list]:
    """Keys, extensions and spans of a shard in the order of its members, as JSON holds them."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with open(path, "rb") as file:
        for key, extension, member in members_of(file, path):
            members = samples.setdefault(key, {})
            if extension in members:
                raise ValueError(
                    f"shard {path} holds two members {member.name!r}; give every sample its own name and pack it again"
                )
            members[extension] = (member.offset_data, member.size)
    extensions = sorted({extension for members in samples.values() for extension in members})
    spans = [[members.get(extension, (0, -1)) for extension in extensions] for members in samples.values()]
    return {"extensions": extensions, "keys": list(samples), "spans": spans}


def members_of(file: BinaryIO, path: str) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, extension, header) of every member of a tar that is read by anyone, in their order; between two of them the
    caller may read elsewhere in `file`. Damaged where the tar is not whole, at its end at the latest."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                match = MEMBER.fullmatch(member.name) if member.isreg() and not member.issparse() else None
                if match is not None and match[2].rpartition(".")[2].lower() in MAX_BYTES:
                    yield match[1], match[2].lower(), member
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise Damaged(f"shard {path} is damaged or not an uncompressed tar ({error}); fetch or pack it again") from error
    file.seek(end)
    block = file.read(BLOCK_BYTES)
    whole = len(block) == BLOCK_BYTES
    while block and not any(block):
        block = file.read(1 << 20)
    if block or not whole:
        raise Damaged(f"shard {path} is damaged: no clean end of archive after byte {end}; fetch or pack it again")


def _caches(path: str) -> list[Path]:
    """Beside the shard, or in the user's cache folder where the shard's folder is read-only or elsewhere."""
    absolute = path if is_url(path) else os.path.abspath(path)
    own = user_cache() / "shards" / (hashlib.sha256(absolute.encode()).hexdigest() + ".idx.json")
    return [own] if is_url(path) else [Path(absolute + ".idx.json"), own]


def _cached(cache: Path, stamp: dict[str, int]) -> dict | None:
    try:
        return _parsed(cache.read_bytes(), stamp)
    except OSError:
        return None


def _parsed(text: bytes, stamp: dict[str, int]) -> dict | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None  # cut short, or no index at all: make it anew
    fits = isinstance(content, dict) and all(content.get(name) == value for name, value in stamp.items())
    return content if fits else None


def _write(cache: Path, content: dict) -> bool:
    try:
        write_whole(cache, lambda path: path.write_text(json.dumps(content, separators=(",", ":"))))
    except OSError:
        return False
    return True


def _to_index(path: str, content: dict) -> ShardIndex:
    keys = np.array([key.encode(errors="surrogateescape") for key in content["keys"]], dtype=bytes)
    spans = np.array(content["spans"], dtype=np.int64).reshape(len(keys), len(content["extensions"]), 2)
    shapes = np.array(content["shapes"], dtype=np.int32).reshape(-1, 2) if "shapes" in content else None
    return ShardIndex(path, keys, tuple(content["extensions"]), spans, shapes)
