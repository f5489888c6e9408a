"""Shards -> what is wrong with them, each by shard and sample, before a training finds out.

    python -m data.lint 'shards/*.tar' --task t2i
    python -m data.lint 'shards/*.tar' --task edit --json problems.json

Reads every member of every sample as training would. Reported are damaged archives; names that no reader takes apart the
way their writer meant; members that occur twice, lie apart from the rest of their sample, are missing, too large, or of a
kind that is never read; pictures, texts and json that cannot be decoded; and samples that lack what the task needs.
Exit code 1 when there is any of it.
"""

import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import tyro

from data.parallel import each_shard
from data.records import BadSample, Task, to_record
from data.shard_index import IMAGES, MAX_BYTES, MEMBER, index_shard
from data.shards import ShardSource, expand_local
from model.files import write_json, write_whole

PICTURE = "picture"
SHOWN = 5  # problems of a kind that are printed in full
PLAIN = re.compile(r"(source\d+\.|mask\.)?\w+")
"""Extensions that are meant: of the sample's own member, of a source picture, of a mask."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Look for everything that is wrong with shards."""

    urls: tyro.conf.Positional[str]
    """Paths of the shards, with braces and wildcards."""
    task: Task = "t2i"
    """What the samples are for."""
    jobs: int = 0
    """Processes; 0: one for each core."""
    json: Path | None = None
    """Where to write all problems, as a list of {shard, key, problem}."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    shard: str
    key: str  # of the sample, or the name of the member; empty: the whole shard
    problem: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when nothing is wrong, 1 when something is, 2 with one sentence for input that cannot be used."""
    args = tyro.cli(Args, args=arguments, prog="python -m data.lint", description=__doc__)
    try:
        paths = expand_local(args.urls)
        found = [p for problems in each_shard(partial(lint, task=args.task), paths, args.jobs, "reading") for p in problems]
        if args.json is not None:
            write_whole(args.json, lambda path: write_json(path, [asdict(problem) for problem in found]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = Counter(problem.problem for problem in found)
    for what, count in counts.most_common():
        print(f"{count:,} x {what}")
        for problem in [problem for problem in found if problem.problem == what][:SHOWN]:
            print(f"    {problem.shard} {problem.key}")
    print(f"shards {len(paths):,}, problems {len(found):,}")
    return int(bool(found))


def lint(path: str, task: Task) -> list[Problem]:
    """All that is wrong with one shard, in the order of its members and then of its samples."""
    found = [Problem(path, name, what) for name, what in _structure(path)]
    try:
        index = index_shard(path)
    except (ValueError, OSError) as error:
        return [*found, Problem(path, "", _without(path, str(error)))]
    source, present = ShardSource.of(index), []
    names = [key.decode(errors="replace") for key in index.keys.tolist()]
    for row, name in enumerate(names):
        sizes = zip(index.extensions, index.spans[row, :, 1].tolist(), strict=True)
        present.append({_kind(extension) for extension, size in sizes if size >= 0})
        try:
            to_record(task, source.read(row))
        except BadSample as bad:
            found.append(Problem(path, name, bad.reason))
        except (ValueError, OSError) as error:  # another size than was indexed, or a disk that cannot be read
            found.append(Problem(path, name, _without(path, str(error))))
    seen = Counter(kind for kinds in present for kind in kinds)
    for kind in sorted(kind for kind, count in seen.items() if 0.9 * len(index) < count < len(index)):
        if task == "chat" and kind.endswith(PICTURE):
            continue  # conversations about nothing to be seen may stand among others
        lacking = [name for name, kinds in zip(names, present, strict=True) if kind not in kinds]
        found += [Problem(path, name, f"no {kind}, which the others have") for name in lacking]
    return found


def _kind(extension: str) -> str:
    """The extension; that of any picture is one: json, picture, source0.picture."""
    before, dot, last = extension.rpartition(".")
    return f"{before}{dot}{PICTURE if last in IMAGES else last}"


def _structure(path: str) -> Iterator[tuple[str, str]]:
    """(member, what is wrong with its name or place), as far as the archive can be read."""
    members: set[str] = set()
    keys: set[str] = set()
    current = ""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                if not member.isreg():
                    yield member.name, "a link or device, which is never read"
                    continue
                match = MEMBER.fullmatch(member.name)
                if match is None:
                    yield member.name, "a name without an extension, which is never read"
                    continue
                key, extension = match[1], match[2].lower()
                kind = extension.rpartition(".")[2]
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    yield member.name, "a name that points outside of the archive"
                if kind not in MAX_BYTES:
                    yield member.name, f"a member of kind {kind}, which is never read"
                elif not PLAIN.fullmatch(extension) and kind in (*IMAGES, "txt", "json"):
                    yield member.name, "a dot within the name: what follows the first is taken for the extension"
                if member.name in members:
                    yield member.name, "a member that occurs twice"
                elif key != current and key in keys:
                    yield member.name, "a member that lies apart from the rest of its sample"
                members.add(member.name)
                keys.add(key)
                current = key
    except (tarfile.TarError, EOFError, OSError):
        return  # index_shard says so


def _without(path: str, text: str) -> str:
    """The sentence without the shard's name, so that alike problems are counted together."""
    return text.replace(f"shard {path} ", "the shard ")


if __name__ == "__main__":
    sys.exit(main())
