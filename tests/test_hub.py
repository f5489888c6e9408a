"""Models by hub id, from a filled cache in the hub's own layout, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.files import dump_config, write_json
from tests.test_pairs import a_run
from tests.tiny_decoders import sana
from tests.tiny_families import SEEING

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """HF_HOME with three models, as a download leaves them: refs to commits, and snapshots."""
    home = tmp_path_factory.mktemp("home")
    for name, make in {"qwen": SEEING["qwen3_vl"], "sana": sana}.items():
        folder = home / "hub" / f"models--tiny--{name}"
        make(folder / "snapshots" / COMMIT)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
    return home


def offline(cache: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_training_and_drawing_offline_by_id_and_the_release_names_the_commit(cache, tmp_path):
    config = dump_config(a_run(Path("tiny"), "qwen", "sana", tmp_path / "out"))
    write_json(tmp_path / "run.json", config)
    done = offline(cache, "train.run", str(tmp_path / "run.json"))
    assert done.returncode == 0, done.stderr
    release = json.loads((tmp_path / "out" / "release" / "config.json").read_text())
    for part, name in (("mllm", "tiny/qwen"), ("vae", "tiny/sana"), ("decoder", "tiny/sana")):
        assert release["model"][part]["path"] == release["frozen"][part]["path"] == name
        assert release["model"][part]["revision"] == release["frozen"][part]["revision"] == COMMIT
    drawn = tmp_path / "drawn"
    given = ["--release", str(tmp_path / "out" / "release"), "--out", str(drawn), "--steps", "2", "a red circle"]
    done = offline(cache, "sample.generate", *given)
    assert done.returncode == 0, done.stderr
    assert list(drawn.glob("*.png"))


def test_a_model_that_is_not_there_is_named_with_the_remedy(cache, tmp_path):
    config = dump_config(a_run(Path("tiny"), "absent", "sana", tmp_path / "out"))
    write_json(tmp_path / "run.json", config)
    done = offline(cache, "train.run", str(tmp_path / "run.json"))
    assert done.returncode == 2
    assert "mllm.path 'tiny/absent' cannot be loaded" in done.stderr
    assert "hf download tiny/absent" in done.stderr
    assert not (tmp_path / "out").exists()
