"""A benchmark's own file of prompts -> the files that its evaluation reads; and whether all of them are there.

    python -m sample.generate --release RELEASE --layout geneval --prompts evaluation_metadata.jsonl --out gen/geneval
    python -m sample.layouts check gen/geneval --layout geneval --prompts evaluation_metadata.jsonl

    layout    --prompts                                        files
    geneval   prompts/evaluation_metadata.jsonl                00000/metadata.jsonl, 00000/samples/0000.png to 0003.png
    geneval2  geneval2_data.jsonl                              00000.png; filepaths.json, prompt to file
    dpg       the folder dpg_bench/prompts                     NAME.png for NAME.txt: four pictures, two a row
    wise      the folder data_verified, or a file of it        PROMPT_ID.png
    mjhq      meta_data.json                                   KEY.png
    coco      annotations/captions_val2014.json, or its like   IMAGE_ID.png, of each image's first caption

Nothing but pictures lies in the folders that evaluations list. To add a benchmark, add a line to `LAYOUTS`.
"""

import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from sample.cli import run
from sample.drawn import read_about
from sample.progress import progress
from sample.prompts import Job, Line, lines_of, read_text
from sample.settings import MAX_SEED

WISE_MERGED = "merge.json"  # beside the files whose prompts it repeats
SHOWN = 5  # names in a list of problems


@dataclass(frozen=True)
class Entry:
    """One prompt of a benchmark, the name that its pictures go by, and its record as the benchmark has it."""

    name: str
    prompt: str
    record: str = ""


@dataclass(frozen=True)
class Layout:
    """How one benchmark wants its pictures."""

    read: Callable[[Path], list[Entry]]
    """Its file of prompts -> entries, in order."""
    picture: str
    """Where a picture lies, by the entry's name and its number."""
    n: int = 1
    """Pictures for each prompt, as published."""
    prompts: int | None = None
    """How many were published."""
    tiled: bool = False
    """All pictures of a prompt in one file, two a row."""
    beside: Callable[[Path, Sequence[Entry]], Iterable[tuple[Path, str]]] = lambda folder, entries: ()
    """Further files for a folder, with what they say."""

    def entries(self, path: Path) -> list[Entry]:
        """The prompts of the benchmark's file. ValueError where it is another file, or two entries would share a name."""
        try:
            entries = self.read(path)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"--prompts {path} is not this benchmark's file ({type(error).__name__}: {error}); see --help of "
                "sample.layouts"
            ) from error
        if not entries:
            raise ValueError(f"--prompts {path} holds no prompt; name the benchmark's own file")
        for name, count in Counter(entry.name for entry in entries).items():
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"--prompts {path}: {name!r} cannot name a file; give letters, digits, _ and -")
            if count > 1:
                raise ValueError(f"--prompts {path}: {count} entries are called {name}; give each its own name")
        return entries

    def jobs(self, entries: Sequence[Entry], n: int | None = None, seed: int = 0) -> list[Job]:
        """Every file; the picture after the last of one prompt is the first of the next. ValueError for an impossible
        `n` or seed."""
        n = self.n if n is None else n
        most = 4 if self.tiled else 1 if "{number" not in self.picture else None
        if n < 1 or (most is not None and n > most):
            raise ValueError(f"--n {n}: this layout has room for {'1 or more' if most is None else f'1 to {most}'} a prompt")
        if not 0 <= seed <= MAX_SEED - n * len(entries):
            raise ValueError(f"--seed {seed} cannot be counted up from; give 0 to {MAX_SEED - n * len(entries)}")
        jobs = []
        for place, entry in enumerate(entries):
            seeds = range(seed + place * n, seed + (place + 1) * n)
            files = [tuple(seeds)] if self.tiled else [(one,) for one in seeds]
            line = Line(entry.prompt, id=entry.name)
            jobs += [Job(self.picture.format(name=entry.name, number=k), own, line) for k, own in enumerate(files)]
        return jobs


@dataclass
class Found:
    """A folder held against its layout; each list names files."""

    wanted: int
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    mistaken: list[str] = field(default_factory=list)
    """Drawn for another prompt."""
    foreign: list[str] = field(default_factory=list)
    """Pictures that do not belong."""
    duplicates: list[str] = field(default_factory=list)
    """The same pixels as another file."""
    beside: list[str] = field(default_factory=list)
    """Further files that are missing or say something else."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def complete(self) -> bool:
        """Whether an evaluation would read exactly what it should."""
        problems = (self.missing, self.damaged, self.mistaken, self.foreign, self.duplicates, self.beside)
        return not any(problems) and len(self.sizes) == 1

    def report(self) -> Iterator[str]:
        """What a person wants to know, line by line."""
        there = self.wanted - len(self.missing)
        yield f"{there:,} of {self.wanted:,} pictures"
        yield "sizes: " + (", ".join(f"{w} x {h} ({count:,})" for (w, h), count in self.sizes.most_common()) or "none")
        for name in ("missing", "damaged", "mistaken", "foreign", "duplicates", "beside"):
            if files := getattr(self, name):
                more = f" and {len(files) - SHOWN:,} more" if len(files) > SHOWN else ""
                yield f"{name}: {len(files):,}: {', '.join(files[:SHOWN])}{more}"


def check(folder: Path, jobs: Sequence[Job], beside: Iterable[tuple[Path, str]], watch: Callable = iter) -> Found:
    """Reads every picture, whole."""
    from PIL import Image

    found, same = Found(len(jobs)), defaultdict(list)
    for job in watch(jobs):
        path = folder / job.name
        if not path.is_file():
            found.missing.append(job.name)
            continue
        try:
            with Image.open(path) as picture:
                same[sha256(picture.convert("RGB").tobytes()).digest(), picture.size].append(job.name)
                found.sizes[picture.size] += 1
            if read_about(path).get("prompt", job.line.prompt) != job.line.prompt:
                found.mistaken.append(job.name)
        except (OSError, SyntaxError, ValueError):
            found.damaged.append(job.name)
    names = {job.name for job in jobs}
    there = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*.png")) if not path.name.startswith("."))
    found.foreign = [name for name in there if name not in names]
    found.duplicates = [name for group in same.values() for name in group[1:]]
    found.beside = [str(path.relative_to(folder)) for path, text in beside if not path.is_file() or path.read_text() != text]
    return found


def _geneval(path: Path) -> list[Entry]:
    return [Entry(f"{place:05d}", json.loads(line)["prompt"], line) for place, (_, line) in enumerate(lines_of(path))]


def _geneval_metadata(folder: Path, entries: Sequence[Entry]) -> Iterator[tuple[Path, str]]:
    yield from ((folder / entry.name / "metadata.jsonl", entry.record + "\n") for entry in entries)


def _geneval2_paths(folder: Path, entries: Sequence[Entry]) -> Iterator[tuple[Path, str]]:
    files = {entry.prompt: str((folder / f"{entry.name}.png").resolve()) for entry in entries}
    yield folder / "filepaths.json", json.dumps(files, indent=2, ensure_ascii=False) + "\n"


def _dpg(path: Path) -> list[Entry]:
    if not path.is_dir():
        raise ValueError(f"--prompts {path} is no folder; name the folder of one .txt file for each prompt")
    return [Entry(file.stem, read_text(file).strip()) for file in sorted(path.glob("*.txt"))]


def _wise(path: Path) -> list[Entry]:
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    files = [file for file in files if len(files) == 1 or file.name != WISE_MERGED]
    entries = [Entry(str(each["prompt_id"]), each["Prompt"]) for file in files for each in _json(file)]
    return sorted(entries, key=lambda entry: (len(entry.name), entry.name))  # so that each seed stays with its prompt


def _mjhq(path: Path) -> list[Entry]:
    return [Entry(key, each["prompt"]) for key, each in _json(path).items()]


def _coco(path: Path) -> list[Entry]:
    said = _json(path)["annotations"]
    first = {each["image_id"]: each["caption"].strip() for each in sorted(said, key=lambda each: -each["id"])}
    return [Entry(str(image), first[image]) for image in sorted(first)]


def _json(path: Path) -> Any:
    return json.loads(read_text(path))


LayoutName = Literal["geneval", "geneval2", "dpg", "wise", "mjhq", "coco"]
LAYOUTS: dict[LayoutName, Layout] = {
    "geneval": Layout(_geneval, "{name}/samples/{number:04d}.png", n=4, prompts=553, beside=_geneval_metadata),
    "geneval2": Layout(_geneval, "{name}.png", prompts=800, beside=_geneval2_paths),
    "dpg": Layout(_dpg, "{name}.png", n=4, prompts=1065, tiled=True),
    "wise": Layout(_wise, "{name}.png", prompts=1000),
    "mjhq": Layout(_mjhq, "{name}.png", prompts=30000),
    "coco": Layout(_coco, "{name}.png"),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """Is every picture of a benchmark there, whole, its own, and nothing else? Exit code 0; 1 where not."""

    folder: Positional[Path]
    """The folder that was drawn into."""
    layout: LayoutName
    """The benchmark."""
    prompts: Path
    """Its file of prompts, or the folder of them."""
    n: Annotated[int | None, arg(aliases=["-n"])] = None
    """Pictures for each prompt; None: as published."""


@dataclass(frozen=True, kw_only=True)
class List:
    """List the layouts."""


def main(argv: list[str] | None = None) -> None:
    """Prints what is there; exits with 1 when that is not all."""
    asked = tyro.extras.subcommand_cli_from_dict({"check": Check, "list": List}, args=argv, description=__doc__)
    if isinstance(asked, List):
        for name, layout in LAYOUTS.items():
            print(f"{name:9} {layout.prompts or 'any':>6} prompts x {layout.n}   {layout.picture}")
        return
    if not asked.folder.is_dir():
        raise ValueError(f"{asked.folder} is no folder; name the one that was drawn into")
    layout = LAYOUTS[asked.layout]
    entries = layout.entries(asked.prompts)
    jobs, beside = layout.jobs(entries, asked.n), layout.beside(asked.folder, entries)
    found = check(asked.folder, jobs, beside, progress("reading"))
    of = f" of the {layout.prompts:,} published" if layout.prompts else ""
    print(f"{asked.layout}: {len(entries):,}{of} prompts", *found.report(), sep="\n")
    if not found.complete:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run(main))
