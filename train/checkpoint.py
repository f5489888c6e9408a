"""The state of a run <-> a folder from which the run goes on bit for bit: all of it, or (after a crash) none.

    <out>/checkpoints/step-00000500/
        main.weights.safetensors       float32 master weights by parameter name
        main.exp_avg.safetensors       AdamW's first moments
        main.exp_avg_sq.safetensors    AdamW's second moments
        main.average.safetensors       the moving average
        main.buffers.safetensors       buffers of the module, if it has any
        manifest.json                  step, samples, counters, resolved config, sha256 of each file
        measures.json                  what a preview measured then, if it did

Where several ranks write, a kind is in several files: main.weights.00001-of-00004.safetensors. Nothing in it depends on the
number of ranks or the ZeRO stage. The folder must be visible to all ranks. train/saving.py writes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.files import sha256_of, sync, write_json, write_whole
from train.engine import KINDS, Engine
from train.ranks import Ranks

FORMAT, READABLE = 2, (1, 2)  # 1 had each kind in one file
READERS = 8  # files of a checkpoint that are verified at a time
DIGEST = "sha256_of_this"  # in a manifest: of all else that it says
DECIDING = ("data", "seed", "task", "schedule.batch_size")  # settings that decide what a run reads begin so
T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself."""

    format: int
    step: int
    samples: int  # global samples consumed; the position of the data
    world: int
    zero: int
    counters: dict[str, dict[str, Any]]  # by engine name
    config: dict[str, Any]
    sha256: dict[str, str]  # by file name
    frozen: dict[str, str] = field(default_factory=dict)  # sha256 of what the run reads and does not train, data included
    skipped: list[tuple[int, int]] = field(default_factory=list)  # first and last sample of each window rolled back over


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the `last` so many, those of `every` so many steps (0: no others), and the one whose measure
    `best` is the highest (or lowest)."""

    last: int
    every: int = 0
    best: str | None = None
    lowest: bool = False


def publish(partial: Path, final: Path, manifest: Manifest) -> None:
    """Give a folder that holds all files its manifest and its name. Raises OSError when the disk does not take it."""
    _write_manifest(partial / "manifest.json", manifest)
    if final.exists():
        _drop(final)
    os.replace(partial, final)
    sync(final.parent)


def rewrite(path: Path, manifest: Manifest) -> None:
    """Let a checkpoint say something else about itself; a crash leaves the one or the other."""
    write_whole(path / "manifest.json", lambda draft: _write_manifest(draft, manifest))
    sync(path)


def prune(root: Path, keep: Keep) -> None:
    """Drop the checkpoints that are not to be kept."""
    best = best_of(root, keep)
    for old in held(root)[: -keep.last]:
        if old != best and (not keep.every or _step_of(old) % keep.every):
            _drop(old)


def note(path: Path, measures: Mapping[str, float]) -> None:
    """Put what was measured at a checkpoint beside its files; no part of the state."""
    write_whole(path / "measures.json", lambda draft: write_json(draft, dict(measures)))


def best_of(root: Path, keep: Keep) -> Path | None:
    """The earliest checkpoint with the best of what `keep` compares; None where that was not measured."""
    noted = {path: _noted(path).get(keep.best, nan) for path in held(root)} if keep.best else {}
    values = {path: value for path, value in noted.items() if isfinite(value)}
    return (min if keep.lowest else max)(values, key=values.__getitem__, default=None)


def _noted(path: Path) -> Mapping[str, float]:
    """What was measured at a checkpoint; nothing where nothing was, or a crash cut the note short. Raises OSError."""
    try:
        return json.loads((path / "measures.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def set_aside(root: Path, step: int, ranks: Ranks) -> None:
    """Move checkpoints later than `step` to `root/set-aside`: they belong to steps that are now taken another way, and would
    pass for the newest. Every rank calls it."""

    def move() -> None:
        for later in held(root):
            if later.name > path_of(root, step).name:
                target = root / "set-aside" / later.name
                target.parent.mkdir(exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)
                later.rename(target)

    on_first(ranks, move)


def find(root: Path, resume: str, ranks: Ranks, warn: Callable[[str], None] = print) -> Path | None:
    """The checkpoint to go on from, the same on every rank; None for a fresh run.

    `resume`: auto (the newest valid one, if any), must (likewise, but there has to be one), never (there must be
    none), or the path of a checkpoint. Raises ValueError when that cannot be met.
    """
    return on_first(ranks, lambda: _find(root, resume, warn))


def _find(root: Path, resume: str, warn: Callable[[str], None]) -> Path | None:
    if resume not in ("auto", "must", "never"):
        try:
            verify(Path(resume))
        except (ValueError, OSError) as error:
            raise ValueError(f"resume is {resume} ({error}); give auto, must, never or a whole checkpoint") from error
        return Path(resume)
    steps = held(root)
    if resume == "never":
        if steps:
            raise ValueError(f"resume is never, but {root} holds {steps[-1].name}; choose another out or resume auto")
        return None
    for path in reversed(steps):
        try:
            verify(path)
        except (ValueError, OSError) as error:
            warn(f"{error}; trying the one before it")
        else:
            return path
    if resume == "must":
        raise ValueError(f"resume is must, but {root} holds no valid checkpoint; start with resume auto")
    if steps:
        raise ValueError(f"no checkpoint in {root} is valid; remove the folder to start afresh")
    return None


def verify(path: Path) -> Manifest:
    """Read the manifest, compare every file with its hash, look at all numbers. Raises ValueError naming the file that is
    wrong."""
    manifest = manifest_of(path)
    with ThreadPoolExecutor(READERS) as pool:  # other ranks wait, and not for ever
        list(pool.map(_verify, (path / name for name in manifest.sha256), manifest.sha256.values()))
    return manifest


def _verify(file: Path, expected: str) -> None:
    if not file.is_file() or sha256_of(file) != expected:
        raise ValueError(f"{file} is {'damaged' if file.is_file() else 'missing'}")
    try:
        with safe_open(file, framework="pt") as tensors:
            check_finite(file, ((key, tensors.get_tensor(key)) for key in tensors.keys()))  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{file} is no file of tensors ({error})") from error


def check_finite(file: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """ValueError when the trained state that `file` is to hold has a NaN or an infinity, from which no run goes on. Buffers
    may have them."""
    if file.name.split(".")[1] in KINDS:
        for key, tensor in tensors:
            if not tensor.isfinite().all():
                raise ValueError(f"{file}: {key} is not finite")


def manifest_of(path: Path) -> Manifest:
    """What a checkpoint says about itself. ValueError when it is none that we know, or is damaged."""
    damaged = ValueError(f"{path / 'manifest.json'} is damaged")
    try:
        content = json.loads((path / "manifest.json").read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a checkpoint: it has no manifest.json") from error
    except ValueError as error:
        raise damaged from error
    if not isinstance(content, dict):
        raise damaged
    if content.get("format") not in READABLE:
        raise ValueError(f"{path} has checkpoint format {content.get('format')}; this program reads up to {FORMAT}")
    digest = content.pop(DIGEST, None)
    if content["format"] == FORMAT and digest != _digest(content):
        raise damaged
    content["skipped"] = [(first, last) for first, last in content.get("skipped", ())]
    return Manifest(**content)


def _write_manifest(path: Path, manifest: Manifest) -> None:
    content = json.loads(json.dumps(asdict(manifest)))  # as it will be read
    path.write_text(json.dumps(content | {DIGEST: _digest(content)}, indent=2))
    sync(path)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_frozen(path: Path, manifest: Manifest, frozen: Mapping[str, str], config: Any = None) -> None:
    """ValueError when what the run reads and does not train is not what the checkpoint was trained with; it names the
    settings of `config`, the run's own, that changed since and decide what is read."""
    for part in other_parts(manifest, frozen):
        changes = [] if config is None else [c for c in differences(manifest.config, config) if c.startswith(DECIDING)]
        since = f"; changed since: {', '.join(changes)}" if changes else ""
        raise ValueError(
            f"the {part} is not the one that {path} was trained with (sha256 {manifest.frozen[part]} there, {frozen[part]} "
            f"here{since}); restore it (of a hub id, give the revision), give another --out, or go on all the same: "
            "--allow-change"
        )


def other_parts(manifest: Manifest, frozen: Mapping[str, str]) -> list[str]:
    """The names of what the run reads and does not train that is not what the checkpoint was trained with."""
    return [part for part, sha256 in frozen.items() if manifest.frozen.get(part, sha256) != sha256]


def load(path: Path, engines: Mapping[str, Engine], ranks: Ranks) -> Manifest:
    """Fill the engines from a checkpoint that `find` returned. Every rank calls it.

    Raises ValueError, on every rank, when the checkpoint is of other modules or one rank does not see it.
    """
    return on_all(ranks, lambda: _load(path, engines))


def _load(path: Path, engines: Mapping[str, Engine]) -> Manifest:
    manifest = manifest_of(path)
    if set(manifest.counters) != set(engines):
        raise ValueError(f"{path} trains {sorted(manifest.counters)}, this run trains {sorted(engines)}; choose another out")
    for name, engine in engines.items():
        with ExitStack() as stack:
            files = {kind: _open(path, manifest, f"{name}.{kind}.", stack) for kind in KINDS}
            _compare(path, name, engine.shapes(), files["weights"])
            engine.load(lambda kind, key, files=files: files[kind][key].get_tensor(key), manifest.counters[name])
        if f"{name}.buffers.safetensors" in manifest.sha256:
            with safe_open(path / f"{name}.buffers.safetensors", framework="pt") as file:
                for key, buffer in engine.buffers().items():
                    buffer.copy_(file.get_tensor(key))
    return manifest


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Where two JSON values differ, one line each: "schedule.steps: 100 -> 200"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{at}.{key}".lstrip("."))]
    return [] if old == new else [f"{at}: {old} -> {new}"]


def _open(path: Path, manifest: Manifest, prefix: str, stack: ExitStack) -> dict[str, Any]:
    """The open file that holds each parameter, by its name."""
    try:
        files = [stack.enter_context(safe_open(path / f, framework="pt")) for f in manifest.sha256 if f.startswith(prefix)]
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path}: {error}") from error
    return {key: file for file in files for key in file.keys()}  # noqa: SIM118 (not a dict)


def _compare(path: Path, name: str, shapes: Mapping[str, tuple[int, ...]], files: Mapping[str, Any]) -> None:
    """The checkpoint must hold exactly the parameters that this run trains."""
    held = {key: tuple(file.get_slice(key).get_shape()) for key, file in files.items()}
    if held == shapes:
        return
    key = min(key for key in held.keys() | shapes.keys() if held.get(key) != shapes.get(key))
    raise ValueError(
        f"{path}: {name}.{key} is {held.get(key, 'absent')} there and {shapes.get(key, 'not trained')} in this run; "
        "resume with the config that wrote it, or choose another out"
    )


def on_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """Rank 0's result of `work` on every rank; what it raises for the user is raised on every rank."""
    result, error = None, None
    if ranks.first:
        try:
            result = work()
        except (ValueError, OSError) as caught:
            error = caught
    result, error = ranks.share((result, error))
    if error is not None:
        raise error
    return result


def on_all(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work`, which takes no other rank, gives on each; what it raises for the user on one is raised on every rank."""
    result, error = None, None
    try:
        result = work()
    except (ValueError, OSError) as caught:
        error = caught
    errors = [each for each in ranks.gather(error) if each is not None]
    if errors:
        raise errors[0]
    assert result is not None
    return result


def path_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"step-{step:08d}"


def held(root: Path) -> list[Path]:
    """Checkpoints under `root`, oldest first; a partial folder has another name."""
    return sorted(root.glob("step-*"))


def make_partial(folder: Path) -> None:
    """`folder`, new and empty, and no leftovers of earlier crashes beside it."""
    for leftover in folder.parent.glob(".step-*"):
        shutil.rmtree(leftover)
    folder.mkdir(parents=True)


def _drop(path: Path) -> None:
    """Remove a checkpoint: a crash meanwhile leaves nothing that has the name of one."""
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.dropped")))


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


if __name__ == "__main__":
    from sample.cli import run
    from train.checkpoint_cli import main

    sys.exit(run(main))
