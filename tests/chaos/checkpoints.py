"""Rows C1 to C6 and C9 to C16: checkpoints that are cut off, damaged, in the wrong place or of something else."""

import ast
import json
import os
import random
import resource
import shutil
import signal
import stat
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.assets import fingerprint, tensors_of
from model.files import read_json, sha256_of, write_json
from model.mllm import load as load_mllm
from model.vae import VAEConfig, load_vae
from tests import tiny
from tests.chaos.processes import die_at, fork, launch, until, wait
from tests.chaos.rows import Outcome, row
from tests.test_checkpoint import KEEP, find
from tests.test_layout import ROOT
from tests.test_loop import lines, state, train
from tests.toy import BATCH, Toy, advance, digest, net, save
from train import checkpoint
from train.ema import EmaConfig
from train.engine import KINDS, Engine, EngineConfig
from train.optim import OptimConfig
from train.ranks import start
from train.saving import Saver

PLAIN = EngineConfig(zero=0, precision="fp32")  # without collectives, so that a fork of the process can save
SHARDED = EngineConfig(zero=1, precision="fp32")


def saved(folder: Path, steps: int = 2, config: EngineConfig = PLAIN) -> tuple[Toy, dict[str, str]]:
    """A task that saved after each of so many steps; the digest of everything by the name of the checkpoint."""
    task, digests = Toy(start(60), config), {}
    for step in range(1, steps + 1):
        advance(task, step - 1, step)
        digests[save(task, folder, step, KEEP).name] = digest(task.engine)
    return task, digests


def loads(path: Path | None, digests: dict[str, str]) -> bool:
    """Whether a checkpoint can be gone on from, and is that of its step to the last bit."""
    if path is None:
        return False
    fresh = Toy(start(60), PLAIN)
    checkpoint.load(path, fresh.engines, start(60))
    return digest(fresh.engine) == digests[path.name]


@row(
    "C1", "kill -9 at any moment of a save", "the checkpoint before it loads, and what is partial is cleaned up",
    "0 unloadable of >= 50 moments", trials=80, fast=6,
)  # fmt: skip
def killed_in_a_save(trials: int, folder: Path) -> Outcome:
    """Half of them before one request to the system after the other, half at random moments of two ranks that save."""
    outcome = Outcome()
    at_random = _killed_at_random(trials - trials // 2, folder)
    task, digests = saved(folder / "whole")
    shutil.rmtree(folder / "whole" / "step-00000002")
    root = folder / "run"

    def write(point: int) -> None:
        count = die_at(point, root)
        save(task, root, 2, KEEP)
        (folder / "count").write_text(str(count()))

    def fresh() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(folder / "whole", root)

    fresh()
    assert wait([fork(partial(write, -1), folder / "log")]) == [0]
    moments = int((folder / "count").read_text())
    tried = sorted(random.Random(0).sample(range(moments), min(moments, trials // 2)))
    for point in tried:
        fresh()
        (code,) = wait([fork(partial(write, point), folder / "log")])
        found, _ = find(root)
        whole = code == -signal.SIGKILL and loads(found, digests)
        save(task, root, 3, KEEP)
        left = [path.name for path in root.iterdir() if not path.name.startswith("step-")]
        outcome.add(whole and not left, f"killed at request {point} of {moments}: found {found}, left behind {left}")
    for root, codes in at_random:
        held = checkpoint.held(root)
        found, told = find(root)
        if found is not None:
            checkpoint.load(found, task.engines, start(60))
        outcome.add(found == held[-1], f"killed at random: of {held} found {found}; {told}; exit codes {codes}")
    outcome.seen = f"{len(tried)} of a save's {moments} requests to the system, {len(at_random)} random moments on 2 ranks"
    return outcome


def _killed_at_random(trials: int, folder: Path) -> list[tuple[Path, list[int]]]:
    """What is left of two ranks that do little but save when one of them is killed, and their exit codes."""
    draw, done = random.Random(1), []

    def work(rank: int, root: Path) -> None:
        task = Toy(start(60), SHARDED)
        for step in range(1, 10_000):
            advance(task, step - 1, step)
            save(task, root, step, KEEP)

    for trial in range(trials):
        root = folder / f"random-{trial}"
        pids = launch(2, partial(work, root=root), folder / "log")
        until(lambda root=root: checkpoint.held(root))
        time.sleep(draw.random() / 4)
        os.kill(draw.choice(pids), signal.SIGKILL)
        done.append((root, wait(pids, 20)))
    return done


@row(
    "C2", "a file of the newest checkpoint is cut, damaged or missing", "all ranks take the one before, and say which and why",
    "agreed on all ranks in < 5 s", fast=1,
)  # fmt: skip
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
                if file.name == "manifest.json" and damage == "flip":
                    continue  # C3
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
    "C3", "a bit flips in a checkpoint", "noticed before a tensor is used", "200 of 200 noticed", trials=200, fast=20,
)  # fmt: skip
def flipped(trials: int, folder: Path) -> Outcome:
    """Any bit of any file of tensors."""
    outcome, draw = Outcome(), random.Random(0)
    saved(folder)
    files = sorted((folder / "step-00000002").glob("*.safetensors"))
    for _ in range(trials):
        file = draw.choice(files)
        whole = file.read_bytes()
        bit = draw.randrange(8 * len(whole))
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        file.write_bytes(broken)
        outcome.expect(f"{file} is damaged", lambda: checkpoint.verify(folder / "step-00000002"))
        file.write_bytes(whole)
    return outcome


@row(
    "C4", "NaN or infinity in a checkpoint whose hashes are right", "refused by name before training goes on", "all refused",
)  # fmt: skip
def not_finite(_: int, folder: Path) -> Outcome:
    """One value of one tensor, of each kind in turn."""
    outcome = Outcome()
    saved(folder)
    path = folder / "step-00000002"
    manifest = (path / "manifest.json").read_text()
    for kind in KINDS:
        file = path / f"main.{kind}.safetensors"
        whole = load_file(file)
        for value in (float("nan"), float("inf"), -float("inf")):
            for name in ("queries", "head.2.bias"):
                broken = {key: tensor.clone() for key, tensor in whole.items()}
                broken[name].view(-1)[1] = value
                save_file(broken, file)
                content = json.loads(manifest)
                content["sha256"][file.name] = sha256_of(file)
                write_json(path / "manifest.json", content)
                outcome.expect(f"{name} is not finite", lambda: find(folder, str(path)))
        save_file(whole, file)
    return outcome


@row(
    "C5", "no checkpoint, empty or partial ones, a path that is none",
    "auto takes the newest whole one; must and paths refuse; nothing starts over in silence",
    "step 0 only in an empty folder or by the word never",
)  # fmt: skip
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
    "C6", "the disk is full in a save", "said once a save; training goes on; the checkpoints before stay",
    "training goes on from save to save",
)  # fmt: skip
def disk_full(_: int, folder: Path) -> Outcome:
    """The system refuses files beyond a size that manifests keep and tensors do not; from the second save to the third."""
    outcome = Outcome()

    class Full(Toy):
        def step(self, batch):
            if batch[0] in (3 * BATCH, 5 * BATCH):
                most = 512 if batch[0] == 3 * BATCH else resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            return super().step(batch)

    for world in (1, 2):
        run = folder / f"of-{world}"

        def work(rank: int, run: Path = run) -> None:
            train(run, Full(start(60), SHARDED))

        codes = wait(launch(world, work, folder / "log"), 60)
        outcome.add(codes == [0] * world, f"{world} rank(s): exit codes {codes}")
        if codes != [0] * world:
            continue
        said = [line["step"] for line in lines(run) if line.get("event") == "not saved"]
        outcome.add(said == [4], f"{world} rank(s): said to be not saved {said}")
        held = [path.name for path in checkpoint.held(run / "checkpoints")]
        outcome.add(held == ["step-00000002", "step-00000006"], f"{world} rank(s): held {held}")
        checkpoint.verify(run / "checkpoints" / held[0])
    return outcome


@row(
    "C9", "resumed with other settings", "harmless ones are told and taken; other shapes, and other data, are refused by name",
    "every difference named",
)  # fmt: skip
def other_settings(_: int, folder: Path) -> Outcome:
    """A table of settings; other data is row D10."""
    outcome = Outcome()
    task, _digests = saved(folder)
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
        path = folder / "step-00000002"
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
    "C10", "a frozen part is another than it was", "refused, with both hashes", "100 %", trials=40, fast=10,
)  # fmt: skip
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
    "C11", "what all ranks must do is done by rank 0 alone", "impossible: no collective stands under a rank's condition",
    "no hang",
)  # fmt: skip
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


@row(
    "C12", "kill -9 while old checkpoints go", "never fewer than two whole ones; the new one is whole before an old one goes",
    "0 lost", trials=24, fast=6,
)  # fmt: skip
def killed_in_pruning(trials: int, folder: Path) -> Outcome:
    """Before each of the last requests of a save that has an old checkpoint to remove."""
    outcome = Outcome()
    task, digests = saved(folder / "whole", steps=3)
    shutil.rmtree(folder / "whole")
    saved(folder / "whole")
    root = folder / "run"

    def write(point: int) -> None:
        count = die_at(point, root)
        save(task, root, 3, KEEP)
        (folder / "count").write_text(str(count()))

    shutil.copytree(folder / "whole", root)
    assert wait([fork(partial(write, -1), folder / "log")]) == [0]
    moments = int((folder / "count").read_text())
    for point in range(max(0, moments - trials), moments):
        shutil.rmtree(root)
        shutil.copytree(folder / "whole", root)
        (code,) = wait([fork(partial(write, point), folder / "log")])
        whole = [path for path in checkpoint.held(root) if _is_whole(path)]
        good = code == -signal.SIGKILL and len(whole) >= 2 and loads(find(root)[0], digests)
        outcome.add(
            good, f"killed at request {point} of {moments}: whole are {[path.name for path in whole]}, exit code {code}"
        )
    return outcome


def _is_whole(path: Path) -> bool:
    try:
        checkpoint.verify(path)
    except ValueError:
        return False
    return True


@row("C13", "others must read what was saved", "permissions as the umask says", "0644 under umask 022")
def permissions(_: int, folder: Path) -> Outcome:
    """Each file under each usual umask."""
    outcome = Outcome()
    task = Toy(start(60), PLAIN)
    for umask in (0o022, 0o027, 0o002, 0o077):
        usual = os.umask(umask)
        path = save(task, folder / f"{umask:o}", 1, KEEP)
        os.umask(usual)
        for file in path.iterdir():
            mode = stat.S_IMODE(file.stat().st_mode)
            outcome.add(mode == 0o666 & ~umask, f"{file.name} has {mode:o} under umask {umask:o}")
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
    "C15", "a run is started twice in one folder", "the second refuses, and names who has it", "< 2 s", trials=3, fast=1,
)  # fmt: skip
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
        (first,) = launch(1, lambda rank: train(run, Slow(start(60), SHARDED)), folder / "log")
        until((run / "started").exists)
        began = time.monotonic()
        second = wait(launch(1, lambda rank: train(run), run / "second"))
        slowest = max(slowest, time.monotonic() - began)
        (run / "go").touch()
        codes = wait([first])
        said = (run / "second").read_text().splitlines()[-1]
        named = f"another process (pid {first} on " in said
        good = named and (codes, second) == ([0], [1]) and slowest < 2 and state(run) == state(folder / "0")
        outcome.add(good, f"said {said!r} in {slowest:.1f} s, exit codes {second} and {codes}")
    outcome.seen = f"refused after {slowest:.2f} s, start included"
    return outcome


@row(
    "C16", "a preemption leaves little time to save", "a save fits into it", "< 2 s for 100 MB", trials=3, fast=0,
)  # fmt: skip
def time_of_a_save(trials: int, folder: Path) -> Outcome:
    """6.25 million parameters: weights, two moments and averages in float32 are 100 MB. Fsynced and hashed."""
    outcome, speeds = Outcome(), []
    engine = Engine(
        nn.Sequential(*(nn.Linear(1250, 1250) for _ in range(4))), optim=OptimConfig(), config=PLAIN, ema=EmaConfig(),
        ranks=start(60), batch_size=BATCH, accumulation=1, total_steps=1,
    )  # fmt: skip
    saver = Saver(folder, {"main": engine}, {}, KEEP, start(60))
    for step in range(1, trials + 1):
        began = time.monotonic()
        path = saver.save(step, 0)
        seconds = time.monotonic() - began
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        speeds.append(size / seconds)
        outcome.add(seconds * 100 / size < 2, f"{size:.0f} MB took {seconds:.2f} s")
    outcome.seen = f"{min(speeds):,.0f} to {max(speeds):,.0f} MB/s"
    return outcome
