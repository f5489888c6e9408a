"""Rows C2 to C5, C9 to C11, C14 and C15: checkpoints that are damaged, absent, of something else or in use."""

import ast
import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.assets import fingerprint, tensors_of
from model.files import read_json, write_json
from model.mllm import load as load_mllm
from model.vae import VAEConfig, load_vae
from tests import tiny
from tests.chaos.processes import launch, until, wait
from tests.chaos.rows import Outcome, row
from tests.chaos.saving import PLAIN, SHARDED, loads, saved
from tests.test_checkpoint import KEEP, find
from tests.test_layout import ROOT
from tests.test_loop import state, train
from tests.toy import BATCH, Toy, accept, advance, net, save
from train import checkpoint
from train.ema import EmaConfig
from train.engine import KINDS, Engine
from train.optim import OptimConfig
from train.ranks import start


@row(
    "C2",
    "a file of the newest checkpoint is cut, damaged or missing",
    "all ranks take the one before, and say which and why",
    "agreed on all ranks in < 5 s",
    fast=1,
)
def agreed_on_all_ranks(_: int, folder: Path) -> Outcome:
    """Every file three ways on two ranks; then no checkpoint is left to take."""

    def work(rank: int) -> None:
        ranks, root, seen = start(60), folder / "run", []
        task = Toy(ranks, SHARDED)
        for step in (1, 2):
            advance(task, step - 1, step)
            save(task, root, step, KEEP)
        newest = root / "step-00000002"
        for file in sorted(newest.iterdir()):
            whole = file.read_bytes()
            for damage in ("cut", "flip", "missing"):
                ranks.barrier()
                if ranks.first:
                    _damage(file, damage, whole)
                seen.append([f"{file.name} {damage}", *_found(root)])
                ranks.barrier()
                if ranks.first:
                    file.write_bytes(whole)
        ranks.barrier()
        if ranks.first:
            for path in root.iterdir():
                (path / "manifest.json").unlink()
        seen.append(["no checkpoint is left", *_found(root)])
        write_json(folder / f"rank{rank}.json", seen)

    codes = wait(launch(2, work, folder / "log"), 120)
    first, second = (read_json(folder / f"rank{rank}.json") for rank in (0, 1))
    outcome = Outcome()
    for (name, *one), (_, *other) in zip(first, second, strict=True):
        agreed = one[0] == other[0] and max(one[2], other[2]) < 5
        told = one[0] == "step-00000001" and "step-00000002" in one[1]
        outcome.add(agreed and (told or "no checkpoint" in one[0]), f"{name}: rank 0 {one}, rank 1 {other}")
    outcome.add(codes == [0, 0], f"exit codes {codes}")
    slowest = max(float(seconds) for *_, seconds in first + second)
    outcome.seen = f"slowest {slowest:.2f} s"
    return outcome


def _damage(file: Path, how: str, whole: bytes) -> None:
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(whole[:-10] if how == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))


def _found(root: Path) -> tuple[str, str, float]:
    """What this rank takes or what it is told instead, what was said on the way, and after how many seconds."""
    began = time.monotonic()
    try:
        path, told = find(root)
        return path.name if path else "nothing", " ".join(told), time.monotonic() - began
    except ValueError as error:
        return str(error), "", time.monotonic() - began


@row(
    "C3",
    "a bit flips in a checkpoint",
    "noticed before a tensor is used",
    "200 of 200 noticed",
    trials=200,
    fast=20,
)
def flipped(trials: int, folder: Path) -> Outcome:
    """Any bit of any file."""
    outcome, draw = Outcome(), random.Random(0)
    saved(folder)
    files = sorted((folder / "step-00000002").iterdir())
    manifest = checkpoint.manifest_of(folder / "step-00000002")
    for _ in range(trials):
        file = draw.choice(files)
        whole = file.read_bytes()
        bit = draw.randrange(8 * len(whole))
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        file.write_bytes(broken)
        try:
            same = checkpoint.verify(folder / "step-00000002") == manifest and file.suffix == ".json"  # 1e-5 is 1E-5
        except ValueError as error:
            same = str(file.parent) in str(error)
        outcome.add(same, f"bit {bit} of {file.name} was not noticed")
        file.write_bytes(whole)
    return outcome


@row(
    "C4",
    "NaN or infinity in a checkpoint whose hashes are right",
    "refused by name before training goes on",
    "all refused",
)
def not_finite(_: int, folder: Path) -> Outcome:
    """One value of one tensor, of each kind in turn."""
    outcome = Outcome()
    saved(folder)
    path = folder / "step-00000002"
    for kind in KINDS:
        file = path / f"main.{kind}.safetensors"
        whole = load_file(file)
        for value in (float("nan"), float("inf"), -float("inf")):
            for name in ("queries", "head.2.bias"):
                broken = {key: tensor.clone() for key, tensor in whole.items()}
                broken[name].view(-1)[1] = value
                save_file(broken, file)
                accept(file)
                outcome.expect(f"{name} is not finite", lambda: find(folder, str(path)))
        save_file(whole, file)
        accept(file)
    return outcome


@row(
    "C5",
    "no checkpoint, empty or partial ones, a path that is none",
    "auto takes the newest whole one; must and paths refuse; nothing starts over in silence",
    "step 0 only in an empty folder or by the word never",
)
def none_there(_: int, folder: Path) -> Outcome:
    """What a folder may look like after a bad day, and each way to resume."""
    outcome = Outcome()
    saved(folder / "whole")
    empty, first, second = folder / "empty", *sorted((folder / "whole").iterdir())
    empty.mkdir()
    outcome.add(find(empty)[0] is None and find(empty, "never")[0] is None, "an empty folder was not fresh")
    outcome.expect("resume is must", lambda: find(empty, "must"))
    outcome.expect("is not a checkpoint", lambda: find(empty, str(folder / "nowhere")))
    outcome.expect("resume is never, but", lambda: find(folder / "whole", "never"))
    (folder / "whole" / "step-00000003").mkdir()
    outcome.add(find(folder / "whole")[0] == second, "an empty newest checkpoint hid the one before it")
    (second / "manifest.json").write_text("")
    outcome.add(find(folder / "whole")[0] == first, "an empty manifest hid the one before it")
    (first / "manifest.json").write_text(json.dumps({"format": 99}))
    for resume in ("auto", "must"):
        outcome.expect("valid", lambda resume=resume: find(folder / "whole", resume))
    outcome.expect("format 99", lambda: find(folder / "whole", str(first)))
    partial_only = folder / "partial"
    (partial_only / ".step-00000001.partial").mkdir(parents=True)
    outcome.add(find(partial_only)[0] is None, "a partial checkpoint was taken")
    return outcome


@row(
    "C9",
    "resumed with other settings",
    "harmless ones are told and taken; other shapes, and other data, are refused by name",
    "every difference named",
)
def other_settings(_: int, folder: Path) -> Outcome:
    """A table of settings; other data is row D10."""
    outcome = Outcome()
    task, _digests = saved(folder)
    path = folder / "step-00000002"
    old = {"optim": {"lr": 1.0, "betas": [0.9, 0.95]}, "schedule": {"steps": 10, "log_every": 1}, "seed": 0, "out": None}
    for at, key, value in (
        ("optim", "lr", 2.0),
        ("optim", "betas", [0.9, 0.99]),
        ("schedule", "steps", 20),
        ("", "seed", 1),
    ):
        new = json.loads(json.dumps(old))
        (new[at] if at else new)[key] = value
        was = (old[at] if at else old)[key]
        told = checkpoint.differences(old, new)
        outcome.add(told == [f"{at}.{key}: {was} -> {value}".lstrip(".")], f"{at}.{key} was told as {told}")
    for part, words in (
        (nn.Linear(3, 3), "main.bias is absent there and (3,) in this run"),
        (_wider(), "main.head.2.bias is (5,) there and (6,) in this run"),
        (_frozen(), "main.queries is (3, 7) there and not trained in this run"),
    ):
        engine = Engine(
            part, optim=OptimConfig(), config=PLAIN, ema=EmaConfig(), ranks=start(60), batch_size=BATCH, accumulation=1,
            total_steps=1,
        )  # fmt: skip
        outcome.expect(words, lambda engine=engine: checkpoint.load(path, {"main": engine}, start(60)))
    outcome.expect("this run trains ['other']", lambda: checkpoint.load(path, {"other": task.engine}, start(60)))
    return outcome


def _wider() -> nn.Module:
    module = net()
    module.head[2] = nn.Linear(11, 6)
    return module


def _frozen() -> nn.Module:
    module = net()
    module.queries.requires_grad_(False)
    return module


@row(
    "C10",
    "a frozen part is another than it was",
    "refused, with both hashes",
    "100 %",
    trials=40,
    fast=10,
)
def other_frozen_parts(trials: int, folder: Path) -> Outcome:
    """One bit of one value of the MLLM or the VAE."""
    outcome, draw = Outcome(), random.Random(0)
    config = tiny.metaquery_config(folder)
    parts = {
        "mllm": tensors_of(load_mllm(config.mllm).model),
        "vae": tensors_of(load_vae(VAEConfig(str(folder / "vae"))).autoencoder),
    }
    before = {name: fingerprint(tensors) for name, tensors in parts.items()}
    manifest = checkpoint.Manifest(checkpoint.FORMAT, 0, 0, 1, 0, {}, {}, {}, before)
    checkpoint.check_frozen(folder, manifest, before)
    for _ in range(trials):
        name = draw.choice(sorted(parts))
        tensor = draw.choice([t for t in parts[name].values() if t.dtype == torch.float32 and t.numel()])
        bits = tensor.detach().view(-1).view(torch.int32)
        place, bit = draw.randrange(len(bits)), 1 << draw.randrange(31)
        bits[place] ^= bit
        now = before | {name: fingerprint(parts[name])}
        said = f"{before[name]} there, {now[name]} here"
        outcome.expect(said, lambda now=now: checkpoint.check_frozen(folder, manifest, now))
        bits[place] ^= bit
    return outcome


COLLECTIVE = {"sum", "any", "share", "gather", "barrier", "averaged", "tensors", "on_first", "save", "load", "find", "means"}


@row(
    "C11",
    "what all ranks must do is done by rank 0 alone",
    "impossible: no collective stands under a rank's condition",
    "no hang",
)
def rank_0_alone(_: int, folder: Path) -> Outcome:
    """Every `if` on the first rank in train/ is read; then a run on two ranks saves, previews and releases."""
    outcome = Outcome()
    for path in sorted((ROOT / "train").glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not (isinstance(node, ast.If) and ast.unparse(node.test).endswith((".first", "._first"))):
                continue
            called = {
                ast.unparse(call.func)
                for statement in node.body
                for call in ast.walk(statement)
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
            }
            waits = sorted(
                name for name in called if name.split(".")[-1] in COLLECTIVE and ("ranks" in name or "engine" in name)
            )
            outcome.add(not waits, f"{path.name}:{node.lineno} has rank 0 alone call {waits}")

    class Previewing(Toy):
        def preview(self, folder: Path, step: int) -> dict[str, float]:
            with self.engine.averaged() as module:
                return {"weight": float(next(module.parameters()).sum())}

    for zero in (1, 2, 3):

        def work(rank: int, zero: int = zero) -> None:
            config = replace(SHARDED, zero=zero)
            train(folder / f"zero-{zero}", Previewing(start(20), config), preview_every=2)

        codes = wait(launch(2, work, folder / "log"), 60)
        outcome.add(codes == [0, 0], f"ZeRO {zero} on two ranks that save, preview and release: exit codes {codes}")
    return outcome


@row("C14", "a checkpoint lies where nothing can be written", "verified and loaded all the same", "no write needed")
def read_only(_: int, folder: Path) -> Outcome:
    """By a user who may read it and no more."""
    outcome = Outcome()
    run, log = folder / "run", folder / "log"
    assert wait(launch(1, lambda rank: write_json(folder / "digests.json", saved(run)[1]), log)) == [0]
    digests = read_json(folder / "digests.json")
    for path in (folder.parent, folder, *run.rglob("*"), run):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def work(rank: int) -> None:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            (run / "x").touch()
        except OSError:
            assert find(run)[0] == run / "step-00000002"
            assert loads(run / "step-00000002", digests)
        else:
            raise AssertionError("the folder can be written")

    codes = wait(launch(1, work, log))
    for path in (folder.parent, folder):
        path.chmod(0o755)
    outcome.add(codes == [0], f"exit codes {codes}: {log.read_text()[-300:]}")
    return outcome


@row(
    "C15",
    "a run is started twice in one folder",
    "the second refuses, and names who has it",
    "< 2 s",
    trials=3,
    fast=1,
)
def started_twice(trials: int, folder: Path) -> Outcome:
    """The second process starts while the first takes a long step; then the first ends as if alone."""
    outcome, slowest = Outcome(), 0.0

    class Slow(Toy):
        def step(self, batch):
            if batch[0] == 2 * BATCH:
                (run / "started").touch()
                until((run / "go").exists)
            return super().step(batch)

    for trial in range(trials):
        run = folder / str(trial)
        run.mkdir()
        (first,) = launch(1, lambda rank, run=run: train(run, Slow(start(60), SHARDED)), folder / "log")
        until((run / "started").exists)
        began = time.monotonic()
        second = wait(launch(1, lambda rank, run=run: train(run), run / "second"))
        slowest = max(slowest, time.monotonic() - began)
        (run / "go").touch()
        codes = wait([first])
        said = (run / "second").read_text().splitlines()[-1]
        named = f"another process (pid {first} on " in said
        soon = slowest < (2 if trials > 1 else 30)  # one is of a busy moment
        good = named and (codes, second) == ([0], [1]) and soon and state(run) == state(folder / "0")
        outcome.add(good, f"said {said!r} in {slowest:.1f} s, exit codes {second} and {codes}")
    outcome.seen = f"refused after {slowest:.2f} s, start included"
    return outcome
