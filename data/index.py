"""Shards -> their indexes, with the sha256 of each and the shapes of its pictures, made ahead of a training, in parallel.

    python -m data.index 'shards/*.tar'
    python -m data.index 'shards/*.tar' --verify        # later, or on another machine: is every byte what it was?
    python -m data.index 'https://example.org/{0000..0099}.tar' --out indexes       # then put them beside the shards

An index lies beside its shard as NAME.tar.idx.json (count, offsets and sizes of members, bytes, sha256), or in the user's
cache folder where the shard's folder cannot be written. Training makes missing ones by itself, without the sha256 and on one
core; of shards elsewhere it needs them, since each has to be fetched once for it. Exit code 1 when a shard is damaged or has
changed, each named.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from data.parallel import each_shard
from data.shard_index import index_shards, keep_index, kept_index, make_index, recorded_digest
from data.shards import expand
from data.storage import is_url, local_copy, name_of
from model.files import sha256_of


@dataclass(frozen=True, kw_only=True)
class Args:
    """Index shards."""

    urls: tyro.conf.Positional[str]
    """Paths of the shards, with braces and wildcards."""
    verify: bool = False
    """Read every shard again, and compare with the sha256 that its index has."""
    out: Path | None = None
    """A folder for the indexes; by default beside the shards, or for shards elsewhere in the user's cache folder."""
    jobs: int = 0
    """Processes; 0: one for each core."""


@dataclass(frozen=True)
class Indexed:
    """One shard."""

    samples: int = 0
    size: int = 0  # bytes
    problem: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when every shard is whole, 1 when one is not, 2 with one sentence for input that cannot be used."""
    args = tyro.cli(Args, args=arguments, prog="python -m data.index", description=__doc__)
    try:
        work = _verified if args.verify else partial(_indexed, out=args.out)
        paths = expand(args.urls)
        if args.out is not None and len({name_of(path) for path in paths}) < len(paths):
            raise ValueError("urls: two shards have the same name, and --out keeps indexes by it; index their folders apart")
        found = list(each_shard(work, paths, args.jobs, "verifying" if args.verify else "indexing"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for shard in found:
        if shard.problem:
            print(shard.problem, file=sys.stderr)
    whole = [shard for shard in found if not shard.problem]
    size = sum(shard.size for shard in whole)
    print(
        f"samples {sum(shard.samples for shard in whole):,}, shards {len(whole):,} of {len(found):,}, {size / 1e6:,.1f} MB"
    )
    return int(len(whole) < len(found))


def _indexed(path: str, out: Path | None) -> Indexed:
    try:
        with local_copy(path) as file:
            index = None if out is not None or is_url(path) else kept_index(path, digest=True, shapes=True)
            if index is None:
                index = keep_index(path, make_index(file, digest=True, shapes=True), out)
            return Indexed(len(index), os.path.getsize(file))
    except (ValueError, OSError) as error:
        return Indexed(problem=str(error))


def _verified(path: str) -> Indexed:
    try:
        known = recorded_digest(path)
        if not known:
            return Indexed(problem=f"shard {path} has no sha256 to compare with; index it first")
        with local_copy(path) as file:
            if sha256_of(Path(file)) != known["sha256"]:
                return Indexed(problem=f"shard {path} is damaged: its bytes are not those that were indexed; fetch it again")
            return Indexed(len(index_shards([path])[0]), os.path.getsize(file))
    except (ValueError, OSError) as error:
        return Indexed(problem=str(error))


if __name__ == "__main__":
    sys.exit(main())
