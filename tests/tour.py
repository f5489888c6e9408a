"""Every command of README.md, in order, as a new user would give it -> docs/tour.md, with what each printed.

    python -m tests.tour                # in a copy of this checkout, with the Python that runs this; some minutes

`ADDED` makes a training short; `LEFT_OUT` says why a command is not run that would take hours, a cluster or somebody's data.
Any other command that fails, fails the tour. Servers are started, asked, and stopped.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from model.assets import ROOT
from model.files import write_whole
from sample.cli import run

LINES = 12  # of a command's output that the page shows, at most
PATIENCE = 600.0  # seconds that a command may take
STOPPED = 130  # the exit code of what a signal ends
SHORT = "--schedule.steps 2 --schedule.save-every 2 --schedule.preview-every 0 --schedule.batch-size"

ADDED: tuple[tuple[str, str], ...] = (
    ("torchrun --nproc_per_node 2", f"{SHORT} 8"),
    ("deepspeed --module", f"{SHORT} 8"),
    ("train.run metaquery.xlarge_sana --plan", ""),
    ("train.run metaquery.emoji --data.max-aspect", f"{SHORT} 8 --data.sources.0.urls 'shards/mine/*.tar'"),
    ("train.run repae", f"{SHORT} 4"),
    ("train.run", f"{SHORT} 8"),
    ("train.doctor", "--schedule.batch-size 8"),
    ("sample.evaluate world", "--n 2 --images 4"),
    ("sample.evaluate edits", "--n 2"),
    ("sample.evaluate parity", "--images 2"),
    ("sample.evaluate decoder", "--images 8 --steps 2"),
    ("train.benchmark metaquery", "--batch-size 1 --repeats 1 --small.layers 2"),
    ("train.benchmark drawing", "--steps 2 --repeats 1"),
    ("train.benchmark loader", "--samples 100 --shard-size 50 --repeats 1"),
    ("data.world check", "--n 20"),
)
"""(a pattern that the command contains, what is added to it so that it takes seconds); the first that fits counts."""

GPUS, HUB, DATA = "it wants 8 GPUs", "it downloads from the hub", "it wants data of yours"
LEFT_OUT: tuple[tuple[str, str], ...] = (
    ("^make ", "it takes minutes: CI runs make test, and make demo and make chaos are run by hand"),
    ("--nproc_per_node 8", GPUS),
    ("^hf ", HUB),
    ("data.precompute 'shards/t2i", DATA),
    ("train.repae_study", "fifteen trainings; docs/results.md has what they came to"),
    ("train.ablation", "fifteen trainings; docs/results.md has what they came to"),
    ("sample.convert 0400000.pt", "it wants a checkpoint of the official code"),
    ("sample.classes", "it wants a decoder that was trained on classes"),
    ("sample.evaluate images --real", "it wants Inception's weights"),
    ("sample.evaluate vae --vae RUN", DATA),
    ("data.write jsonl LIST", DATA),
    ("apt-get", "it changes the machine"),
    ("data.write emoji", "it wants that font"),
    ("metaquery.emoji$", "it wants that font"),
    ("metaquery.emoji --data.sources.0.urls 'https", "it reads from a web server of yours"),
    ("data.index 'https", "it reads from a web server of yours"),
    ("--release RELEASE", "it wants a release of yours"),
    ("--config repae.xl_f8d4", "it wants a GPU"),
)
"""(a pattern that the command contains, why it is not run)."""

OWN = {line.strip().strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()} | {".git"}
"""What is no part of a checkout: what was made in it."""

SERVERS: tuple[tuple[str, str], ...] = (
    ("sample.app", "http://127.0.0.1:7860"),
    ("sample.serve", "http://127.0.0.1:8000/health"),
)
"""(what the command contains, the address that answers once it is up)."""

TYPED = "/draw a red circle\nwhat is in the picture?\n/quit\n"
"""What a dialogue is told."""


@dataclass(frozen=True)
class Done:
    """A command of the README and what came of it."""

    command: str
    added: str = ""
    why_not: str = ""
    code: int = 0
    output: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Args:
    """Run every command of README.md and write docs/tour.md."""

    page: Path = ROOT / "docs" / "tour.md"
    """The page to write."""
    only: str = ""
    """Run only the commands that contain this, and write nothing."""
    folder: Path = Path("/tmp/querybridge-tour")
    """Where the copy of the checkout is made; replaced."""


def commands(readme: str) -> list[str]:
    """The commands in the fenced blocks of a README that name no language, without remarks, continued lines joined."""
    kept, within = [], None
    for line in readme.splitlines():
        if line.startswith("```"):
            within = line[3:] if within is None else None
        elif within == "":
            kept.append(line)
    bare = [re.sub(r"\s{2,}#.*$|^#.*$", "", line) for line in "\n".join(kept).replace("\\\n", " ").splitlines()]
    return [command for line in bare if (command := re.sub(r"\s+", " ", line).strip())]


def plan(command: str) -> Done:
    """The command with what is added to it, or why it is not run."""
    for part, why in LEFT_OUT:
        if re.search(part, command):
            return Done(command, why_not=why)
    return Done(command, next((added for part, added in ADDED if re.search(part, command)), ""))


def tour(folder: Path, only: str = "") -> Iterator[Done]:
    """Runs the README's commands one after the other in a copy of this checkout."""
    copy(folder)
    for command in commands((ROOT / "README.md").read_text()):
        if only in command:
            yield carry_out(plan(command), folder)


def copy(folder: Path) -> None:
    """The checkout as it came, and what the commands expect of a user: a folder of pictures."""
    from PIL import Image

    from data.world.captions import describe
    from data.world.render import render
    from data.world.scene import make_scene, random_for

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        ROOT, folder, ignore=lambda at, names: OWN & {*names} if Path(at) == ROOT else {"__pycache__"} & {*names}
    )
    (folder / "PICTURES").mkdir()
    for number in range(8):
        scene = make_scene(1, number, "val")
        picture, words = Image.fromarray(render(scene, 64)), describe(scene, random_for("tour", number)).text
        picture.save(folder / "PICTURES" / f"{number}.jpg", quality=95)
        (folder / "PICTURES" / f"{number}.txt").write_text(words)


def carry_out(planned: Done, folder: Path) -> Done:
    """Runs one command to its end; a server until it answers."""
    if planned.why_not:
        return planned
    line = " ".join(part for part in (planned.command, planned.added) if part)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
    }
    began = time.perf_counter()
    (folder / "typed.txt").write_text(TYPED)
    with (folder / "output.txt").open("w+") as told, (folder / "typed.txt").open() as typed:
        process = subprocess.Popen(
            ["bash", "-c", line],
            cwd=folder,
            env=environment,
            stdin=typed,
            stdout=told,
            stderr=told,
            start_new_session=True,
        )
        address = next((address for part, address in SERVERS if part in planned.command), None)
        try:
            if address is not None and answers(address, process):
                os.killpg(process.pid, signal.SIGTERM)
                code = {STOPPED: 0}.get(process.wait(PATIENCE), process.returncode)
            else:
                code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        told.seek(0)
        output = told.read()
    return Done(planned.command, planned.added, "", code, output, time.perf_counter() - began)


def answers(address: str, process: subprocess.Popen) -> bool:
    """Waits for a server; False when its process has ended, or it takes too long."""
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        try:
            urllib.request.urlopen(address, timeout=5).read()
            return True
        except OSError:
            time.sleep(0.5)
    return False


def page(done: list[Done]) -> str:
    """The page: each command, what was added, and the end of what it printed."""
    ran = [one for one in done if not one.why_not]
    lines = [
        "# A tour: every command of the README",
        "",
        f"Written by `python -m tests.tour`, which gave {len(ran)} of these commands, in this order, in a copy of the",
        "checkout, with the embedded default and nothing else. The test suite takes the tour too.",
        "",
    ]
    for one in done:
        lines += ["```", f"$ {one.command}", *([f"    (with {one.added})"] if one.added else [])]
        lines += [f"    (not run here: {one.why_not})"] if one.why_not else shown(one.output)
        lines += ["```", ""]
    return "\n".join(lines)


def shown(output: str) -> list[str]:
    """The last lines, without what a terminal would paint."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output).replace("\r", "\n")
    lines = [line.rstrip()[:160] for line in plain.splitlines() if line.strip()]
    return (["..."] if len(lines) > LINES else []) + lines[-LINES:]


def main(argv: list[str] | None = None) -> None:
    """Takes the tour and writes the page; ValueError where a command failed."""
    args = tyro.cli(Args, args=argv, description=Args.__doc__)
    done = []
    for one in tour(args.folder, args.only):
        print(f"{'-' if one.why_not else one.code} {one.seconds:6.1f} s  {shlex.quote(one.command)}", flush=True)
        if one.code:
            print(one.output[-3000:])
        done.append(one)
    if failed := [one.command for one in done if one.code]:
        raise ValueError(f"{len(failed)} of {len(done)} commands failed, the first: {failed[0]}")
    if not args.only:
        write_whole(args.page, lambda path: path.write_text(page(done)))


if __name__ == "__main__":
    sys.exit(run(main))
