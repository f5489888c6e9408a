"""The stages that rebuild the shipped weights, and the page that tells of them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from model.assets import ROOT
from tests import tiny
from tests.two_ranks import tiny_run
from train.assets import ASSETS, STAGES, main, parts, report
from train.run import named


def test_every_stage_is_a_run():
    for stage in STAGES:
        assert named(stage.run)().schedule.steps > 0


def test_the_page_has_a_row_for_every_log():
    logs = sorted((ASSETS / "logs").glob("*.metrics.jsonl"))
    assert logs
    page = report()
    names = {stage.name for stage in STAGES}
    for log in logs:
        name = log.name.removesuffix(".metrics.jsonl")
        assert name.partition(".")[0] in names
        [row] = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
        assert f"assets/world/logs/{name}.run.json`" in row
    assert page == (ASSETS / "README.md").read_text()


def test_a_round_that_goes_on_within_a_run_counts_its_own_steps():
    """`tell_all.8` begins at step 539 of its run, where it had stopped, and ends at step 1920."""
    row = next(line for line in report().splitlines() if line.startswith("| tell_all.8 |"))
    steps, samples, minutes = row.split(" | ")[4:7]
    assert (steps, samples) == ("1381", str(1381 * 128))
    assert 0 < int(minutes.removesuffix(" min")) < 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_is_stopped_saves_first(number, tmp_path):
    """SIGTERM comes to the command alone, Ctrl-C to all that a terminal runs."""
    tiny.metaquery_config(tmp_path)
    words = [*tiny_run(tmp_path, tmp_path / "run"), "--schedule.steps", "100000"]
    code = f"import sys, sample.cli, train.child\nwords = {words!r}\n"
    code += "sys.exit(sample.cli.run(lambda argv: train.child.child('train.run', *words, remedy='again')))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True) as command:
        end = time.monotonic() + 300
        while not (tmp_path / "run" / "metrics.jsonl").is_file() or not (tmp_path / "run" / "metrics.jsonl").stat().st_size:
            assert time.monotonic() < end
            assert command.poll() is None
            time.sleep(0.1)
        if number == signal.SIGINT:
            os.killpg(command.pid, number)
        else:
            command.send_signal(number)
        assert command.wait(300) in (2, 130)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert '"stopped"' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="language, see, align"):
        main(["everything"])


def test_a_curve_covers_all_of_a_run_in_order():
    for count in (1, 5, 6, 7, 100):
        stretches = parts([float(n) for n in range(count)], 6)
        assert [value for stretch in stretches for value in stretch] == list(range(count))
        assert len(stretches) == min(count, 6)
        assert all(stretches)
