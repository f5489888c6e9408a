"""The real entry point: kill and resume, settings that are wrong, and every run that ships."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sample import cli
from tests import tiny
from tests.two_ranks import ROOT, losses, tiny_run
from train import checkpoint, run
from train.engine import deepspeed_config
from train.metaquery import MetaQueryTaskConfig

STEPS, SAVE_EVERY = 16, 4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the killed process: sums over more threads would be rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny.metaquery_config(folder)
    return folder


def arguments(parts, out) -> list[str]:
    return tiny_run(parts, out, "--schedule.steps", str(STEPS), "--schedule.save-every", str(SAVE_EVERY))


@pytest.fixture(scope="module")
def straight(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    run.main(arguments(parts, out))
    return out


def test_a_signal_while_networks_are_read_stops_before_the_first_step(straight, parts, tmp_path, monkeypatch):
    built = MetaQueryTaskConfig.build

    def build(config, asked, ranks):
        os.kill(os.getpid(), signal.SIGTERM)
        return built(config, asked, ranks)

    with monkeypatch.context() as patched:
        patched.setattr(MetaQueryTaskConfig, "build", build)
        with pytest.raises(SystemExit, match=str(run.INTERRUPTED)):
            run.main(arguments(parts, tmp_path))
    assert not list(tmp_path.glob("checkpoints/*"))
    run.main(arguments(parts, tmp_path))
    assert losses(straight) == losses(tmp_path)


def test_sigkill_and_the_same_command_end_where_a_straight_run_ends(straight, parts, tmp_path):
    command = [sys.executable, "-m", "train.run", *arguments(parts, tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("checkpoints/step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    newest = max(tmp_path.glob("checkpoints/step-*")).name
    assert newest < f"step-{STEPS:08d}"

    run.main(arguments(parts, tmp_path))
    ends = [checkpoint.verify(out / "checkpoints" / f"step-{STEPS:08d}") for out in (straight, tmp_path)]
    assert ends[0].sha256 == ends[1].sha256  # weights, averages and both moments, byte for byte
    assert ends[0].counters == ends[1].counters
    assert ends[0].samples == ends[1].samples
    assert losses(straight) == losses(tmp_path)
    files = [(out / "release" / "model.safetensors").read_bytes() for out in (straight, tmp_path)]
    assert files[0] == files[1]


def test_a_run_goes_on_with_the_frozen_parts_that_it_began_with(parts, tmp_path):
    """A hub's branch may move between two starts, and a folder be overwritten."""
    moved = Path(shutil.copytree(parts, tmp_path / "parts"))
    given = tiny_run(moved, tmp_path / "out", "--schedule.save-every", "1")
    run.main([*given, "--schedule.steps", "1"])
    tiny.vae_folder(moved / "vae", seed=1)
    with pytest.raises(
        ValueError, match=r"the vae is not the one that .*step-00000001 was trained with \(sha256 .* here\); restore it"
    ):
        run.main([*given, "--schedule.steps", "2"])
    tiny.vae_folder(moved / "vae")
    run.main([*given, "--schedule.steps", "2"])
    assert (tmp_path / "out" / "checkpoints" / "step-00000002").is_dir()


def test_run_json_reads_back_and_is_strict(straight, parts, tmp_path):
    path = straight / "run.json"
    assert run.parse([str(path)]) == run.parse(arguments(parts, straight))
    content = json.loads(path.read_text())
    content["optim"]["lrr"] = 1.0
    wrong = tmp_path / "run.json"
    wrong.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"unknown key optim\.lrr; did you mean lr\?"):
        run.parse([str(wrong)])
    content = json.loads(path.read_text())
    content["data"]["sources"][0]["sead"] = 3
    wrong.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"unknown key data\.sources\.0\.sead; did you mean seed\?"):
        run.parse([str(wrong)])


def test_a_run_that_was_moved_goes_on_where_it_lies(straight, tmp_path):
    content = json.loads((straight / "run.json").read_text()) | {"out": None}
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert run.parse([str(tmp_path / "run.json")]).out is None
    (tmp_path / "checkpoints").mkdir()
    assert run.parse([str(tmp_path / "run.json")]).folder == tmp_path
    assert run.parse([str(tmp_path / "run.json"), "--out", "elsewhere"]).folder == Path("elsewhere")


def test_the_loss_falls(straight):
    seen = losses(straight)
    assert sum(seen[-4:]) < 0.97 * sum(seen[:4])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["metaquery.tinny"], "unknown run metaquery.tinny; did you mean metaquery.tiny?"),
        (["--optim.lrr", "3e-4"], "unknown option --optim.lrr; did you mean --optim.lr?"),
        (["--task.model.noise.shift.x", "3"], "option --task.model.noise.shift.x has no place in metaquery.tiny"),
        (["--schedule.batch_sise=4"], "unknown option --schedule.batch_sise=4; did you mean --schedule.batch-size?"),
        (["--task.model.decoder.sit.widht", "4"], "did you mean --task.model.decoder.sit.width?"),
        (["--optim.lr", "fast"], "could not convert string to float"),
        (["--schedule.steps", "0"], "schedule.steps is 0"),
        (["--engine.zero", "0", "--engine.precision", "bf16"], "engine.precision is bf16 with engine.zero 0"),
        (["--schedule.accumulation", "3"], "schedule.batch_size 8 does not divide"),
        (["--data.image-size", "32"], "data.image_size is 32, the decoder draws 16"),
        (["--task.model.mllm.path", "/nowhere"], "/nowhere"),
        (["--task.model.trainable", "nothing.*"], "'nothing.*' matches no decoder parameter"),
        (["--task.model.queries", "0"], "queries is 0"),
        (["--metrics.wandb", "p"], "pip install wandb"),
        (["--task.preview.steps", "0"], "task.preview.steps: 0 is too few"),
        (["--task.preview.prompts", "a " * 400], "task.preview.prompts: the prompt"),
        (["--data.sources.0.sead", "3"], "did you mean --data.sources.0.seed?"),
        (["--data.sources.0.urls", "x.tar"], "option --data.sources.0.urls has no place in metaquery.tiny"),
        (["--data.task", "chat"], "data.task is chat"),
        (["--resume", "must"], "resume is must"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence_and_exit_code_2(words, told, parts, tmp_path, capsys):
    out = tmp_path / "out"
    given = words if words[0].startswith("metaquery") else [*tiny_run(parts, out), *words]
    try:
        code = cli.run(run.main, given)
    except SystemExit as exit:  # tyro's own
        code = exit.code
    assert code == 2
    shown = capsys.readouterr().err
    assert told in " ".join(shown.replace("│", " ").split())
    assert "Traceback" not in shown
    assert not out.exists()


def test_exit_code_reaches_the_shell(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "train.run", "metaquery.tiny", "--optim.lrr", "1", "--out", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: unknown option --optim.lrr; did you mean --optim.lr?\n")
    assert not (tmp_path / "out").exists()


def test_deepspeeds_launcher_argument_is_accepted():
    assert run.parse(["--local_rank=0", "metaquery.tiny"]) == run.parse(["metaquery.tiny"])


@pytest.mark.parametrize("name", run.names())
def test_every_shipped_run_is_sound(name):
    given = run.named(name)()
    assert f"train.run {name}" in (run.named(name).__doc__ or "")
    size, parts = given.schedule.batch_size, given.schedule.accumulation
    settings = deepspeed_config(given.engine, batch_size=size, accumulation=parts, world=1)
    assert settings["gradient_clipping"] > 0
    assert run.parse([name]) == given
