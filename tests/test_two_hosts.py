"""Two hosts, a rank each, under two launchers: they train as one process does; one dies, comes back, and nothing is lost."""

import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from model.files import dump_config
from tests import tiny, tiny_repae
from tests.hosts import Host, two_hosts
from tests.two_ranks import ROOT, losses, tiny_run
from train import checkpoint, run
from train.config import Run
from train.engine import EngineConfig
from train.loop import Schedule

STEPS, SAVE_EVERY = 24, 6
TIMEOUT_SECONDS = 60
END_SECONDS = 30
"""For launchers to end once their rank has, on a machine that does something else."""
KINDS = ("metaquery", "repae")
LAUNCHERS = {"multi_node.sh": KINDS, "deepspeed.sh": KINDS[::-1]}
"""What each trains: the first kind undisturbed, the second with a host that dies."""


@dataclass(frozen=True)
class Story:
    """What happened under one launcher."""

    folder: Path
    code: int
    """With which the survivor's launcher ended; `said` is its output, `seconds` how long after the other's death it did."""
    said: str
    seconds: float
    saved: int
    """The last step saved by then."""
    resumed: str
    """What rank 0 said of the same command, given again."""


def runs(parts: Path, out: Path) -> dict[str, Run]:
    """Both kinds, below `out`, from the tiny networks below `parts`."""
    engine = EngineConfig(zero=1, precision="fp32", clip_norm=tiny_repae.CLIP_NORM, timeout_seconds=TIMEOUT_SECONDS)
    schedule = Schedule(steps=STEPS, batch_size=8, log_every=1, save_every=SAVE_EVERY)
    made = {"metaquery": run.parse(tiny_run(parts, out)), "repae": tiny_repae.repae_run(parts, engine)}
    return {kind: replace(each, engine=engine, schedule=schedule, out=out / kind) for kind, each in made.items()}


def written(runs: dict[str, Run], out: Path) -> list[str]:
    """Their files, for tests.hosts to read."""
    out.mkdir()
    for kind, each in runs.items():
        (out / f"{kind}.json").write_text(json.dumps(dump_config(each)))
    return [str(out / f"{kind}.json") for kind in runs]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny.metaquery_config(folder)
    return folder


@pytest.fixture(scope="module")
def single(parts, tmp_path_factory):
    """The same runs in this process alone."""
    out = tmp_path_factory.mktemp("single")
    for path in written(runs(parts, out / "out"), out / "out"):
        run.main([path])
    return out / "out"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with ExitStack() as held:
        try:
            pair = held.enter_context(two_hosts(tmp_path_factory.mktemp("hosts")))
        except OSError as error:
            pytest.skip(f"this system lets us make no hosts: {error}")
        yield pair


@pytest.fixture(scope="module")
def stories(hosts, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    return {
        "multi_node.sh": story("multi_node.sh", hosts, parts, folder, dies=1, silently=True),
        "deepspeed.sh": story("deepspeed.sh", hosts, parts, folder, dies=0, silently=False),
    }


def story(launcher: str, hosts: tuple[Host, Host], parts: Path, folder: Path, *, dies: int, silently: bool) -> Story:
    """Start, kill one host once its second run has saved, wait for the other, start again. A host that dies silently is cut
    off first, so that the other hears nothing of the end of its connections."""
    out = folder / launcher
    made = runs(parts, out)
    words = written({kind: made[kind] for kind in LAUNCHERS[launcher]}, out)
    (out / "hostfile").write_text("".join(f"{host.address} slots=1\n" for host in hosts))
    environment = os.environ | {
        "VENV": sys.prefix, "OMP_NUM_THREADS": "1", "MODULE": "tests.hosts", "PROCESSES": "1", "NNODES": "2",
        "MASTER_ADDR": hosts[0].address, "HOSTFILE": str(out / "hostfile"),
    }  # fmt: skip

    def start() -> None:
        for rank, host in enumerate(hosts):
            host.start(ROOT / "launch" / launcher, *words, cwd=ROOT, env=environment | {"NODE_RANK": str(rank)})

    start()
    victim, survivor = hosts[dies], hosts[1 - dies]
    checkpoints = out / LAUNCHERS[launcher][1] / "checkpoints"
    deadline = time.monotonic() + 600
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
        gone = [host.ended(60) for host in hosts if host.processes[-1].poll() is not None]
        assert not gone, gone
        time.sleep(0.005)
    if silently:
        victim.plug(False)
    victim.kill()
    began = time.monotonic()
    if not silently:
        time.sleep(1)
        victim.plug(False)
    code, said = survivor.ended(TIMEOUT_SECONDS + END_SECONDS)
    seconds = time.monotonic() - began
    saved = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))

    victim.plug(True)
    start()
    ended = [host.ended(600) for host in hosts]
    assert [code for code, _ in ended] == [0, 0], ended
    return Story(out, code, said, seconds, saved, resumed=ended[0][1])


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_hosts_train_as_one_process_does(kind, launcher, stories, single):
    ours = losses(stories[launcher].folder / kind)
    assert len(ours) == STEPS
    assert ours == pytest.approx(losses(single / kind), rel=1e-6)


@pytest.mark.parametrize(("launcher", "code"), [("multi_node.sh", 1), ("deepspeed.sh", run.LOST)])
def test_the_host_that_is_left_says_so_and_ends_in_time(launcher, code, stories):
    story = stories[launcher]
    assert story.code == code, story.said
    (told,) = [line for line in story.said.splitlines() if line.startswith("error: ")]
    assert "gets no answer from another: " in told
    assert "run again to go on from the last checkpoint" in told
    assert story.seconds < TIMEOUT_SECONDS + END_SECONDS
    print(f"{launcher}: exit code {story.code} after {story.seconds:.1f} s; {told}")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_run_goes_on_from_the_last_step_saved_to_the_same_end(launcher, stories):
    """Byte for byte that of the other launcher, under which nobody died."""
    story, kind = stories[launcher], LAUNCHERS[launcher][1]
    assert 0 < story.saved < STEPS
    assert f"from step {story.saved} to {STEPS}" in " ".join(story.resumed.split())
    (other,) = [each for name, each in stories.items() if name != launcher]
    ends = [checkpoint.verify(each.folder / kind / "checkpoints" / f"step-{STEPS:08d}") for each in (story, other)]
    assert ends[0].sha256 == ends[1].sha256
    assert losses(story.folder / kind) == losses(other.folder / kind)
