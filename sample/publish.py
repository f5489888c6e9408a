"""A release -> a folder to publish: complete, hashed, with a model card, and drawn from once more before anybody else does.

    python -m sample.publish export runs/world/release --out dist/world --measures scores.json
    python -m sample.publish export runs/world/release --out dist/world --layout diffusers --dtype bf16
    python -m sample.publish check dist/world          # every hash, and the same picture again, in a new process
    python -m sample.publish card dist/world --measures new.json

`small` holds what was trained and names its base models by id, revision and hash, or with --bundle-base holds them too;
`diffusers` is what MetaQueryPipeline or SiTPipeline.from_pretrained reads, and always whole. Exit code 2 tells a problem.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tyro.conf import Positional

from sample.cli import run, sentence

if TYPE_CHECKING:
    from PIL import Image

Layout = Literal["small", "diffusers"]
SUMS, CODE = "SHA256SUMS", "pipeline.py"
ENDINGS = (".json", ".jsonl", ".safetensors", ".md", ".png", ".txt", ".model", ".jinja")
"""Of what a published folder may hold, beside the hashes and the line of code that diffusers asks for."""
NOTES = ("command", "machine", "note")  # that lie beside measures and are told of them (sample/report.py)
ROUNDING = 8  # levels of 255 by which another processor's or torch's rounding may change a picture
PROBLEM = 2


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a folder to publish, and check it."""

    release: Positional[Path]
    """A release folder: of a bridge, or vae/ and sit/ of a run of configs/repae.py."""
    out: Path
    """The folder to write."""
    layout: Layout = "small"
    """small: what was trained; diffusers: a pipeline's folder."""
    dtype: Literal["as_trained", "bf16"] = "as_trained"
    """bf16 halves what was trained in float32; frozen parts of the small layout stay as they are."""
    bundle_base: bool = False
    """Copy the frozen parts in, so that the folder loads with no other file; the diffusers layout always does."""
    run: Path | None = None
    """The run.json of the training; default: the one beside the release, if any. Its metrics lie beside it."""
    measures: tuple[Path, ...] = ()
    """JSON files that measuring commands wrote with --json."""
    license: str = "apache-2.0"
    """The licence of what was trained, as the hub names it."""
    prompt: str = "a red circle"
    """What the picture of the card shows; a labelled decoder shows its first class."""
    seed: int = 0
    """Of that picture."""
    steps: int = 20
    """Of that picture."""


@dataclass(frozen=True)
class Check:
    """Compare every hash, load the folder in a new process and draw its picture again."""

    folder: Positional[Path]
    """What export wrote."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """Write README.md anew, and its hash."""

    folder: Positional[Path]
    """What export wrote."""
    run: Path | None = None
    """Another run.json to tell of."""
    measures: tuple[Path, ...] = ()
    """More files of measures; those of the same name are replaced."""
    license: str | None = None
    """Another licence."""


def main(argv: list[str] | None = None) -> None:
    """Runs the command. Raises ValueError for what the user can mend, SystemExit where a check found problems."""
    args = tyro.extras.subcommand_cli_from_dict(
        {"export": Export, "check": Check, "card": Card}, args=argv, description=__doc__
    )
    if isinstance(args, Card):
        rewrite(args)
        print(f"{args.folder}/README.md is written anew")
        return
    folder = args.folder if isinstance(args, Check) else args.out
    if isinstance(args, Export):
        export(args)
    problems = check(folder)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        raise SystemExit(PROBLEM)
    print(f"{folder}: every hash is right")
    if isinstance(args, Export):
        print(f"to publish it: hf auth login && hf upload ORG/{folder.name} {folder}")


def export(args: Export) -> None:
    """Writes the folder, complete or not at all.

    Raises:
        ValueError: the release is none, a part of it is missing or only on this machine, or `out` holds something.
    """
    from model.files import atomic_folder, check_new, write_json
    from sample.card import ABOUT, FORMAT, PICTURE, VERSION

    check_new(args.out)
    kind = _kind(args.release)
    with atomic_folder(args.out) as draft:
        about = _metaquery(args, draft) if kind == "metaquery" else _labelled(args, draft)
        about |= {
            "format": FORMAT,
            "version": VERSION,
            "name": args.out.name,
            "kind": kind,
            "layout": args.layout,
            "dtype": args.dtype,
            "license": args.license,
        }
        asked = args.prompt if kind == "metaquery" else "class 0"
        about["picture"] = {"asked": asked, "seed": args.seed, "steps": args.steps} | _made_by()
        write_json(draft / ABOUT, about)
        picture = redraw(draft)
        picture.save(draft / PICTURE)
        about["picture"]["sha256"] = hashlib.sha256(picture.tobytes()).hexdigest()
        write_json(draft / ABOUT, about)
        beside = args.release.resolve().parent / "run.json"
        _tell(draft, args.run or (beside if beside.is_file() else None), args.measures)
        _seal(draft)


def rewrite(args: Card) -> None:
    """The card of a folder, whose other files have to be whole. It is made elsewhere first: what fails changes nothing.

    Raises:
        ValueError: the folder was not written by export, a file that the card does not change is not whole, or one that it
            is to tell of cannot be read.
    """
    from model.files import read_json, write_json, write_whole
    from sample.card import ABOUT, MEASURES, METRICS, RUN

    def told(name: str) -> bool:
        return name in (ABOUT, "README.md", RUN, METRICS) or name.startswith(f"{MEASURES}/")

    problems = [found for name, found in _verify(args.folder) if not told(name)]
    if problems:
        raise ValueError(problems[0])
    with TemporaryDirectory() as temporary:
        draft = Path(temporary)
        for name in _held(args.folder):
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            if told(name):
                shutil.copyfile(args.folder / name, draft / name)
            else:
                (draft / name).symlink_to((args.folder / name).resolve())
        if args.license is not None:
            write_json(draft / ABOUT, read_json(draft / ABOUT) | {"license": args.license})
        _tell(draft, args.run, args.measures)
        _seal(draft)
        for name in filter(told, _held(args.folder)):
            if not (draft / name).is_file():
                (args.folder / name).unlink()
        for name in (*filter(told, _held(draft)), SUMS):
            write_whole(args.folder / name, partial(shutil.copyfile, draft / name))


def check(folder: Path) -> list[str]:
    """What is wrong with a published folder, a sentence each; nothing is loaded from one whose hashes are wrong."""
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    problems = [problem for _, problem in _verify(folder)]
    if problems:
        return problems
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            return compare(folder, fresh.submit(redraw, folder.resolve()).result())
    except (ValueError, OSError) as error:
        return [f"{folder} cannot be loaded: {sentence(error)}"]
    except BrokenProcessPool:
        return [f"{folder} cannot be loaded: the process that drew its picture was ended; give it more memory"]


def compare(folder: Path, picture: Image.Image) -> list[str]:
    """What is wrong with a picture that was drawn from a published folder: nothing, or a sentence. Says that it is the same,
    or how near where another machine rounds otherwise."""
    from sample.card import PICTURE, read_about

    wanted = read_about(folder)["picture"]
    if hashlib.sha256(picture.tobytes()).hexdigest() == wanted["sha256"]:
        print(f"{folder}: a new process draws the same picture")
        return []
    off, here = _levels_apart(picture, folder / PICTURE), _made_by()
    changed = ", ".join(f"{name} {wanted[name]} then and {here[name]} now" for name in here if wanted[name] != here[name])
    if changed and off <= ROUNDING:
        print(f"{folder}: {PICTURE} comes out within {off} of 255 levels ({changed})")
        return []
    where = changed or "on a like machine"
    return [f"{folder} draws another picture than {PICTURE}, by up to {off} of 255 levels ({where})"]


def redraw(folder: Path) -> Image.Image:
    """The picture that a published folder records, drawn from it alone, on the CPU."""
    import torch
    from diffusers.utils import logging

    from data.transforms import to_pil
    from sample import diffusers_pipeline
    from sample.card import KINDS, read_about
    from sample.labelled import load_decoder
    from sample.pipeline import Pipeline
    from sample.settings import Drawing

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # its bars would fill log files
    about = read_about(folder)
    picture = about["picture"]
    if about["layout"] == "diffusers":
        options = {"dtype": torch.bfloat16} if about["dtype"] == "bf16" else {}
        pipe: Any = getattr(diffusers_pipeline, KINDS[about["kind"]]).from_pretrained(folder, **options)
        pipe.set_progress_bar_config(disable=True)
        generator = [torch.Generator().manual_seed(picture["seed"])]
        asked = picture["asked"] if about["kind"] == "metaquery" else 0
        return pipe(asked, num_inference_steps=picture["steps"], generator=generator).images[0]
    if about["kind"] == "metaquery":
        pipeline = Pipeline.from_release(folder, "cpu")
        return pipeline([picture["asked"]], [picture["seed"]], Drawing(picture["steps"]))[0]
    told = torch.ones(1, 1, 1, dtype=torch.long), torch.zeros(1, 1, 3)
    return to_pil(load_decoder(folder).draw(told, [picture["seed"]], picture["steps"])[0])


def _kind(release: Path) -> Literal["metaquery", "labelled"]:
    if (release / "config.json").is_file():
        return "metaquery"
    if (release / "sit").is_dir():
        return "labelled"
    raise ValueError(f"{release} is no release; name the folder of a bridge, or of a run of configs/repae.py")


def _metaquery(args: Export, draft: Path) -> dict[str, Any]:
    """Writes the model and tells what is in it."""
    from model.bundle import bundle, of_this_machine, parts_of
    from model.files import read_json
    from model.store import load

    config = read_json(args.release / "config.json")
    model = load(args.release)
    whole = args.layout == "diffusers" or args.bundle_base
    if args.layout == "diffusers":
        from sample.diffusers_pipeline import MetaQueryPipeline

        _save_pipeline(MetaQueryPipeline.of(model), args, draft)
    elif args.bundle_base:
        bundle(args.release, draft)
    elif local := of_this_machine(config):
        path = parts_of(config)[local[0]]["path"]
        raise ValueError(f"the {local[0]} is {path!r}, which others do not have; add --bundle-base, or train on a hub id")
    else:
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(args.release / name, draft / name)
    if args.layout == "small" and args.dtype == "bf16":
        _halve(draft / "model.safetensors")
    return {
        "task": "text-to-image",
        "image_size": model.image_size,
        "max_text_tokens": model.mllm.builder.max_text_tokens,
        "trained": _count(model.own_tensors().values()),
        "base": {name: _facts(facts, whole) for name, facts in config["frozen"].items()},
    }


def _labelled(args: Export, draft: Path) -> dict[str, Any]:
    """The same of a decoder that was trained on labels, of which every part is its own."""
    from model.assets import tensors_of
    from sample.labelled import load_decoder

    decoder = load_decoder(args.release)
    decoder.check_classes()
    if args.layout == "diffusers":
        from sample.diffusers_pipeline import SiTPipeline

        _save_pipeline(SiTPipeline.from_release(args.release), args, draft)
    else:
        for part in ("vae", "sit"):
            shutil.copytree(args.release / part, draft / part)
        for path in sorted(draft.rglob("*.safetensors")) if args.dtype == "bf16" else ():
            _halve(path)
    parts = (decoder.sit, decoder.labels, decoder.vae.autoencoder)
    return {
        "task": "unconditional-image-generation",
        "image_size": decoder.image_size,
        "trained": _count([tensor for part in parts for tensor in tensors_of(part).values()]),
        "base": {},
    }


def _save_pipeline(pipe: Any, args: Export, draft: Path) -> None:
    import torch
    from torch import nn

    for part in pipe.components.values() if args.dtype == "bf16" else ():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.bfloat16)  # diffusers' own `to` warns of what it does not do
    pipe.save_pretrained(draft)
    (draft / CODE).write_text(_code(type(pipe).__name__))


def _code(name: str) -> str:
    """What has diffusers find the class in the installed package: DiffusionPipeline.from_pretrained(FOLDER,
    custom_pipeline=FOLDER, trust_remote_code=True)."""
    return f"from sample.diffusers_pipeline import {name}  # noqa: F401\n"


def _halve(path: Path) -> None:
    import torch

    from model.files import read_tensors, write_tensors

    tensors = read_tensors(path)
    write_tensors(path, {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in tensors.items()})


def _count(tensors: Any) -> dict[str, int]:
    held = list(tensors)
    return {"tensors": len(held), "parameters": sum(tensor.numel() for tensor in held)}


def _facts(facts: dict[str, Any], here: bool) -> dict[str, Any]:
    from model.assets import locate

    path = facts["path"]
    return {**facts, "here": here, "hub": locate(path) is None and path.count("/") == 1 and not path.startswith(".")}


def _made_by() -> dict[str, str]:
    """What a picture's last bits depend on."""
    import torch

    return {"torch": torch.__version__, "machine": platform.machine(), "cpu": torch.backends.cpu.get_cpu_capability()}


def _tell(folder: Path, run_file: Path | None, measures: Sequence[Path]) -> None:
    """Copies what the card tells of into the folder. Raises ValueError for measures that cannot be read or told apart."""
    from sample.card import MEASURES, METRICS, RUN
    from sample.measures import read_json as read_measures

    for path in measures:
        read_measures(path)
        if sum(other.name == path.name for other in measures) > 1:
            raise ValueError(f"--measures: two files are called {path.name}; rename one")
    if run_file is not None:
        shutil.copyfile(run_file, folder / RUN)
        (folder / METRICS).unlink(missing_ok=True)  # those of the run before
        metrics = run_file.with_name(run_file.name.removesuffix("run.json") + "metrics.jsonl")
        if metrics.is_file():
            shutil.copyfile(metrics, folder / METRICS)
    for path in measures:
        (folder / MEASURES).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / MEASURES / path.name)
        for note in (path.with_suffix(f".{kind}.txt") for kind in NOTES):
            (folder / MEASURES / note.name).unlink(missing_ok=True)  # of the file before
            if note.is_file():
                shutil.copyfile(note, folder / MEASURES / note.name)


def _seal(folder: Path) -> None:
    """Writes the card, then the hash of every file, in the form that `sha256sum -c` reads."""
    from model.files import sha256_of, write_whole
    from sample.card import card

    text = card(folder)
    write_whole(folder / "README.md", lambda path: path.write_text(text))
    sums = "".join(f"{sha256_of(folder / name)}  {name}\n" for name in _held(folder))
    write_whole(folder / SUMS, lambda path: path.write_text(sums))


def _held(folder: Path) -> list[str]:
    """Every file of a folder by its place in it, the hashes left out, and what a download leaves behind."""
    places = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink())
    return [place.as_posix() for place in places if place.parts[0] not in (SUMS, ".cache", ".git", ".gitattributes")]


def _verify(folder: Path) -> list[tuple[str, str]]:
    """What is wrong with the files of a folder: each name and a sentence."""
    from model.files import sha256_of
    from sample.card import KINDS

    if not (folder / SUMS).is_file():
        raise ValueError(f"{folder} has no {SUMS}; name a folder that sample.publish export wrote")
    lines = [line.split("  ", 1) for line in (folder / SUMS).read_text().splitlines()]
    if not all(len(line) == 2 for line in lines):
        raise ValueError(f"{folder}/{SUMS} is damaged; copy it again")
    told = {name: sha256 for sha256, name in lines}
    held = _held(folder)
    problems = [(name, f"{folder}/{name} is missing; copy it again") for name in told.keys() - {*held}]
    for name in held:
        path = folder / name
        if name not in told:
            problems.append((name, f"{folder}/{name} is not in {SUMS}; remove it"))
        elif name != CODE and path.suffix not in ENDINGS:
            problems.append((name, f"{folder}/{name} is of a kind that is not published; remove it"))
        elif sha256_of(path) != told[name]:
            problems.append((name, f"{folder}/{name} is not the file that was published; copy it again"))
        elif name == CODE and path.read_text() not in {_code(each) for each in KINDS.values()}:
            problems.append((name, f"{folder}/{name} is not the line that export writes; remove it"))
    return sorted(problems)


def _levels_apart(picture: Image.Image, path: Path) -> int:
    import numpy as np
    from PIL import Image

    with Image.open(path) as recorded:
        wanted = np.asarray(recorded.convert("RGB")).astype(int)
    drawn = np.asarray(picture).astype(int)
    return int(abs(drawn - wanted).max()) if drawn.shape == wanted.shape else 255


if __name__ == "__main__":
    sys.exit(run(main))
