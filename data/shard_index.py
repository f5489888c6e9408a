"""A tar shard -> where every sample's members lie in it, found once and kept beside the shard as `NAME.tar.idx.json`.

tarfile takes a broken or missing header for the end of the archive and says nothing, so an archive counts as whole only
if an end-of-archive block follows the last member and nothing but zeros follows that.
"""

import hashlib
import json
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.files import sha256_of, write_whole

IMAGES = ("jpg", "jpeg", "png", "webp")
LATENT = "npy"  # the member of a tar of latents (data/latents.py)
MAX_BYTES = dict.fromkeys(IMAGES, 64 << 20) | {"txt": 1 << 20, "json": 4 << 20, LATENT: 16 << 20}  # and no other kinds
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # key, then all past the first dot: webdataset's convention
VERSION = 2
BLOCK_BYTES = 512  # of tar's format


@dataclass(frozen=True)
class ShardIndex:
    """One shard's samples. Arrays, so that worker processes share their memory."""

    path: str
    keys: np.ndarray  # [samples] UTF-8 bytes
    extensions: tuple[str, ...]
    spans: np.ndarray  # [samples, extensions, 2] int64: offset and size in bytes; size -1 where there is no such member

    def __len__(self) -> int:
        return len(self.keys)


def index_shard(path: str, digest: bool = False) -> ShardIndex:
    """The index of the shard at `path`, read from its cache or made; with `digest`, its cache keeps the shard's sha256 as it
    is now. ValueError if the shard is not a whole tar."""
    state = os.stat(path)
    stamp = {"version": VERSION, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    for cache in _caches(path):
        content = _cached(cache, stamp)
        if content is not None and (not digest or content.get("hashed_mtime_ns") == state.st_mtime_ns):
            return _to_index(path, content)
    known = {"sha256": sha256_of(Path(path)), "hashed_mtime_ns": state.st_mtime_ns} if digest else recorded_digest(path)
    content = stamp | scan(path) | known
    for cache in _caches(path):
        if _write(cache, content):
            break
    return _to_index(path, content)


def recorded_digest(path: str) -> dict[str, Any]:
    """The sha256 that an index of this shard has, whatever became of the shard since, and of when it was; else empty."""
    names = ("sha256", "hashed_mtime_ns")
    for cache in _caches(path):
        content = _cached(cache, {})
        if content is not None and all(name in content for name in names):
            return {name: content[name] for name in names}
    return {}


def scan(path: str) -> dict[str, list]:
    """Keys, extensions and spans of a shard in the order of its members, as JSON holds them."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    _add(samples, member, path)
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"shard {path} is damaged or not an uncompressed tar ({error}); fetch or pack it again") from error
    if not _ends_at(path, end):
        raise ValueError(f"shard {path} is damaged: no clean end of archive after byte {end}; fetch or pack it again")
    extensions = sorted({extension for members in samples.values() for extension in members})
    spans = [[members.get(extension, (0, -1)) for extension in extensions] for members in samples.values()]
    return {"extensions": extensions, "keys": list(samples), "spans": spans}


def _add(samples: dict[str, dict[str, tuple[int, int]]], member: tarfile.TarInfo, path: str) -> None:
    match = MEMBER.fullmatch(member.name)
    if match is None:
        return
    key, extension = match[1], match[2].lower()
    if extension.rpartition(".")[2] not in MAX_BYTES:
        return
    members = samples.setdefault(key, {})
    if extension in members:
        raise ValueError(f"shard {path} holds two members {member.name!r}; give every sample its own name and pack it again")
    members[extension] = (member.offset_data, member.size)


def _ends_at(path: str, end: int) -> bool:
    """Whether a zero block lies at byte `end`, and only zeros behind it."""
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(BLOCK_BYTES)
        whole = len(block) == BLOCK_BYTES
        while block and not any(block):
            block = file.read(1 << 20)
    return whole and not block


def _caches(path: str) -> tuple[Path, Path]:
    """Beside the shard, or in the user's cache folder where the shard's folder is read-only."""
    absolute = os.path.abspath(path)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "querybridge" / "shards"
    return Path(absolute + ".idx.json"), folder / (hashlib.sha256(absolute.encode()).hexdigest() + ".idx.json")


def _cached(cache: Path, stamp: dict[str, int]) -> dict | None:
    try:
        content = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return None  # none there, or cut short: make it anew
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
    return ShardIndex(path, keys, tuple(content["extensions"]), spans)
