"""The fault catalogue, played through -> what survived and what was lost, as JSON and as a page.

    python -m tests.chaos --json docs/measures/reliability.json --page docs/reliability.md      # make chaos
    python -m tests.chaos --fast --rows C1 R1 --json /tmp/some.json

Each row has a process of its own. What rows came to is kept beside the JSON file until all are done, so that the same
command goes on where it was stopped. Exit code 1 when anything was lost.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import tyro
from rich.console import Console

from data.parallel import bar
from model.files import write_whole
from sample.cli import run
from tests.chaos.catalogue import ROWS
from tests.chaos.page import page
from tests.chaos.processes import HUNG, fork, wait
from tests.chaos.rows import LIMIT_SECONDS, Outcome


@dataclass(frozen=True, kw_only=True)
class Args:
    """Play the rows of the fault catalogue."""

    rows: tuple[str, ...] = ()
    """Which, such as C1 D7; none: all."""
    fast: bool = False
    """Few trials of each, as `make test` has them."""
    trials: int = 0
    """So many trials of each; 0: as many as the target asks for."""
    json: Path
    """Where the outcomes go."""
    page: Path | None = None
    """A page to write from them."""


def main(argv: list[str] | None = None) -> None:
    """Plays the rows one after the other. Raises SystemExit(1) when a trial was lost, ValueError for a row that is none."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    if unknown := sorted(set(args.rows) - set(ROWS)):
        raise ValueError(f"rows: {unknown[0]} is none of {', '.join(ROWS)}")
    names = [name for name in ROWS if name in args.rows or not args.rows]
    if args.fast:
        names = [name for name in names if ROWS[name].fast]
    import_all()
    draft = args.json.with_name(args.json.name + ".part")
    results: dict[str, Outcome] = {}
    if draft.is_file():
        results = {name: Outcome(**held) for name, held in json.loads(draft.read_text()).items() if name in names}
    console = Console(stderr=True, soft_wrap=True)
    progress = bar("rows")
    progress.live.auto_refresh = False  # it would be a thread, and what forks must have none
    with progress:
        task = progress.add_task("rows", total=len(names))
        for name in names:
            if name not in results:
                few = ROWS[name].fast if args.fast else ROWS[name].trials
                results[name] = played(name, args.trials or few)
                write(draft, results)
            result = results[name]
            console.print(
                f"{name}: {result.trials - len(result.lost)} of {result.trials} in {result.seconds:.1f} s; {result.seen}"
            )
            for sentence in result.lost[:3]:
                console.print(f"    {sentence}", markup=False)
            progress.update(task, advance=1, refresh=True)
    write(args.json, results)
    draft.unlink(missing_ok=True)
    if args.page:
        text = page({name: results[name] for name in names})
        write_whole(args.page, lambda path: path.write_text(text))
    if any(result.lost for result in results.values()):
        raise SystemExit(1)


def played(name: str, trials: int) -> Outcome:
    """What a row came to, in a process and a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{name}-"))
    began = time.monotonic()

    def play() -> None:
        torch.set_num_threads(1)
        work = folder / "work"
        work.mkdir()
        try:
            outcome = ROWS[name].play(trials, work)
        except Exception as error:  # a fault that the row did not foresee is a trial lost
            traceback.print_exc()
            outcome = Outcome(1, [f"{type(error).__name__}: {error}"])
        (folder / "outcome.json").write_text(json.dumps(asdict(outcome)))

    (code,) = wait([fork(play, folder / "log")], LIMIT_SECONDS)
    if code:
        said = f"took over {LIMIT_SECONDS:g} s" if code == HUNG else f"ended with exit code {code}"
        outcome = Outcome(1, [f"the row itself {said}"])
    else:
        outcome = Outcome(**json.loads((folder / "outcome.json").read_text()))
    if outcome.lost:
        print((folder / "log").read_text()[-3000:], file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    outcome.seconds = round(time.monotonic() - began, 1)
    return outcome


def import_all() -> None:
    """What training imports when it first needs it, so that forked ranks have it already."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


def write(path: Path, results: dict[str, Outcome]) -> None:
    """The outcomes so far, whole."""
    text = json.dumps({name: asdict(result) for name, result in results.items()}, indent=2, ensure_ascii=False)
    write_whole(path, lambda draft: draft.write_text(text + "\n"))


if __name__ == "__main__":
    sys.exit(run(main))
