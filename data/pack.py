"""Items -> tar shards in img2dataset's layout: OUT/00000.tar with KEY.jpg|png|webp, KEY.txt and KEY.json.

The same items give the same bytes. OUT appears when everything is written, or not at all.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from webdataset.writer import TarWriter

from data.parallel import bar
from data.records import BadSample
from data.shard_index import MAX_BYTES
from data.transforms import decode_image
from model.files import check_new

KINDS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name of a format -> extension

NAMED = 5  # skipped jobs of each reason that are told by name

Job = TypeVar("Job")


@dataclass(frozen=True)
class Item:
    """One sample to write; images as encoded files, copied as they are."""

    caption: str = ""
    image: bytes | None = None
    sources: tuple[bytes, ...] = ()  # source images of an edit, or the images of a conversation
    described: dict[str, Any] = field(default_factory=dict)  # further fields of the json member
    mask: bytes | None = None  # of an edit: white where it changes the picture


@dataclass(frozen=True)
class Written:
    """What one call of `write_shards` did."""

    samples: int
    shards: int
    skipped: Counter[str]  # reason -> jobs
    named: dict[str, list[str]]  # reason -> the first NAMED of them


def write_shards(
    jobs: Sequence[Job],
    read: Callable[[Job], Item],
    out: Path,
    shard_size: int = 10_000,
    name: Callable[[Job], str] = str,
) -> Written:
    """Write read(job) for every job; a job that raises BadSample is skipped and counted, the first few by `name`. Shows a
    progress bar.

    ValueError if `out` holds files already, or if nothing could be written."""
    if shard_size < 1:
        raise ValueError(f"--shard-size is {shard_size}; give at least one sample to a shard")
    out = out.absolute()
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{os.getpid()}.tmp"
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed; process ids repeat
    partial.mkdir()
    try:
        written = _write(jobs, read, partial, shard_size, name)
        if not written.samples:
            common = written.skipped.most_common(3)
            reasons = "; ".join(f"{count} x {reason} ({written.named[reason][0]})" for reason, count in common)
            raise ValueError(f"nothing to write: {reasons or 'no input found'}; nothing was left in --out {out}")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already, unless something failed
    return written


def members(item: Item, key: str) -> dict[str, bytes]:
    """The files of one sample by extension; BadSample for an image or a text that readers would refuse."""
    described: dict[str, Any] = {"key": key, "status": "success"} | item.described
    files: dict[str, bytes] = {}
    for number, data in enumerate(item.sources):
        files[f"source{number}.{_inspect(data)['kind']}"] = data
    if item.mask is not None:
        files[f"mask.{_inspect(item.mask)['kind']}"] = item.mask
    if item.image is not None:
        facts = _inspect(item.image)
        files[facts.pop("kind")] = item.image
        described |= facts | {"sha256": hashlib.sha256(item.image).hexdigest()}
    try:
        if item.caption:
            files["txt"] = item.caption.encode()
            described["caption"] = described.get("caption") or item.caption
        files["json"] = json.dumps(described, ensure_ascii=False, sort_keys=True).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise BadSample("a text is not Unicode") from error
    if any(len(data) > MAX_BYTES[extension.rpartition(".")[2]] for extension, data in files.items()):
        raise BadSample("a member is larger than its kind may be")
    return files


def _write(
    jobs: Sequence[Job], read: Callable[[Job], Item], folder: Path, shard_size: int, name: Callable[[Job], str]
) -> Written:
    skipped: Counter[str] = Counter()
    named: dict[str, list[str]] = {}

    def skip(job: Job, reason: str) -> None:
        skipped[reason] += 1
        if skipped[reason] <= NAMED:
            named.setdefault(reason, []).append(name(job))

    samples = shards = 0
    with bar("packing") as progress:
        packed = _pack(progress.track(jobs), read, skip)
        while first := next(packed, None):
            with (
                open(folder / f"{shards:05d}.tar", "wb") as stream,
                TarWriter(stream, user="", group="", mtime=0, encoder=False) as tar,
            ):
                for sample in chain([first], islice(packed, shard_size - 1)):
                    tar.write(sample)
                    samples += 1
            shards += 1
    return Written(samples, shards, skipped, named)


def _pack(
    jobs: Iterable[Job], read: Callable[[Job], Item], skip: Callable[[Job, str], None]
) -> Iterator[dict[str, str | bytes]]:
    """webdataset's samples, numbered from 0 without gaps."""
    number = 0
    for job in jobs:
        key = f"{number:09d}"
        try:
            files = members(read(job), key)
        except BadSample as bad:
            skip(job, bad.reason)
            continue
        yield {"__key__": key} | files
        number += 1


def _inspect(data: bytes) -> dict[str, Any]:
    try:
        image = decode_image(data)
    except ValueError as error:
        raise BadSample(str(error)) from error
    if image.format not in KINDS:
        raise BadSample("an image is neither JPEG, PNG nor WebP")
    return {"kind": KINDS[image.format], "width": image.width, "height": image.height}
