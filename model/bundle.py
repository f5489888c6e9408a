"""A release that names its frozen parts -> one that holds them too, and loads with no other file.

Only data travels: configs, tokenizers, templates and safetensors."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from model.assets import ROOT, locate
from model.decoder import NOISE_FILE
from model.files import read_json, write_json
from model.store import BESIDE, INSIDE

DATA = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Endings of the files that are copied; nothing that can be run is among them."""


def bundle(release: Path, out: Path) -> None:
    """Fill the folder `out` with the release and what it names. ValueError where a part is not on this machine."""
    config = read_json(release / "config.json")
    shutil.copyfile(release / "model.safetensors", out / "model.safetensors")
    for name, part in parts_of(config).items():
        for source, place in _files(name, found(release, part)):
            (out / name / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, out / name / place)
        for facts in (part, config.get("frozen", {}).get(name, {})):
            facts["path"] = INSIDE + name
            facts["revision"] = None
    write_json(out / "config.json", config)


def parts_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts that a release's config names by a path, as they stand in it."""
    parts = {name: config["model"][name] for name in ("mllm", "vae", "decoder")}
    return {name: part for name, part in parts.items() if part.get("path") is not None}


def of_this_machine(config: Mapping[str, Any]) -> list[str]:
    """Names of the parts that nobody else has: neither hub ids nor what lies in this repository."""
    paths = {name: part["path"] for name, part in parts_of(config).items()}
    return [
        name
        for name, path in paths.items()
        if path.startswith((BESIDE, INSIDE))
        or (locate(path) is not None and not (ROOT / path).resolve().is_relative_to(ROOT))
    ]


def found(release: Path, part: Mapping[str, Any]) -> Path:
    """The folder of a part: as its path says, else its snapshot in the hub's cache. ValueError where there is neither."""
    path = part["path"]
    folder = release / path if path.startswith((BESIDE, INSIDE)) else locate(path)
    if folder is not None and folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(path, revision=part.get("revision"), local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError) as error:
        raise ValueError(f"{path!r} is not on this machine, so it cannot be copied; hf download {path}") from error


def _files(name: str, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Those of a part that are read, and where they go."""
    if name == "vae" and not (folder / "config.json").is_file():
        folder = folder / "vae"  # of a pipeline
    only: tuple[str, ...] = ("",)
    if name == "decoder":
        whole = (folder / "model_index.json").is_file()
        only = (
            ("model_index.json", "scheduler/", "transformer/", "unet/")
            if whole
            else ("config.json", "model.safetensors", NOISE_FILE)
        )
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path.is_file() and path.suffix in DATA and str(place).startswith(only) and not str(place).startswith("."):
            yield path, place
