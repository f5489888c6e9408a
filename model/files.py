"""Tensors and values -> files and folders that are complete or absent, and back."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from glob import escape
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

T = TypeVar("T")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; it takes the place of `folder` at the end, or vanishes if filling it failed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.draft")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.replaced")
    for left in folder.parent.glob(f".{escape(folder.name)}.*.replaced"):  # by one that was killed between its two renames
        shutil.rmtree(left) if folder.exists() else left.rename(folder)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        allowed = draft.stat().st_mode & 0o777  # safetensors writes 0600; the folder's mode knows the umask
        for path in draft.rglob("*"):
            path.chmod(allowed if path.is_dir() else allowed & 0o666)
            sync(path)
        sync(draft)
        if folder.exists():
            folder.rename(replaced)
        draft.rename(folder)
        sync(folder.parent)
    finally:
        if replaced.exists() and not folder.exists():  # stopped between the two
            replaced.rename(folder)
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def check_new(folder: Path, option: str = "--out") -> None:
    """ValueError where `folder`, which `option` names, holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{option} {folder} exists and is not an empty folder; name a new folder")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary neighbour of `path`, then renames it. Makes the folder; leaves nothing on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{token_hex(4)}.part")  # ids repeat on other machines
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; every tensor is stored once, contiguous, from the CPU."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; ValueError when it is absent or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy or train it again") from error


OTHER_CONFIG = "the weights belong to another config: use the config.json that was saved with them"


def check_match(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, remedy: str = OTHER_CONFIG) -> None:
    """ValueError unless both hold the same names with the same shapes."""
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"{path} lacks {len(missing)} tensors, the first {missing[0]}; {remedy}")
    if unknown := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"{path} has {len(unknown)} unknown tensors, the first {unknown[0]}; {remedy}")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
            raise ValueError(f"{path} has {name} of shape {shapes}; {remedy}")


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people: indented, one newline at the end."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; ValueError when the file is absent or is not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); name a folder that this program wrote") from error


def dump_config(config: Any) -> Any:
    """A config dataclass as JSON values."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def parse_config(kind: type[T], raw: Any, path: Path) -> T:
    """JSON values as a config dataclass; ValueError for wrong values, and for keys that the class does not have."""
    try:
        config = TypeAdapter(kind).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {where}: {first['msg']}; repair it or write it again") from error
    if unknown := _unknown(raw, dump_config(config)):
        raise ValueError(f"{path}: unknown key {unknown}; remove it, or update the code to a version that knows it")
    return config


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" when something known is close, else nothing."""
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown(raw: Any, known: Any) -> str | None:
    """The dotted name of the first key of `raw` that `known` lacks, and what it may have meant."""
    if isinstance(raw, list) and isinstance(known, list):
        raw, known = ({str(place): value for place, value in enumerate(values)} for values in (raw, known))
    if not isinstance(raw, dict) or not isinstance(known, dict):
        return None
    for key, value in raw.items():
        if key not in known:
            return key + did_you_mean(key, known)
        if below := _unknown(value, known[key]):
            return f"{key}.{below}"
    return None


def sha256_of(path: Path) -> str:
    """Of all bytes of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
