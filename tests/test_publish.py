"""Published folders: they draw what the release draws, from nothing else, and every change to them is told."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]
from PIL import Image

from model.assets import ROOT
from model.files import dump_config, read_json, read_tensors, sha256_of
from model.store import load
from sample import publish
from sample.card import TOLD, _at
from sample.cli import run
from sample.diffusers_pipeline import MetaQueryPipeline
from sample.measures import Measure, share, write_json
from sample.pipeline import Pipeline
from sample.settings import Drawing
from tests import releases
from tests.test_diffusers_pipeline import classes  # noqa: F401  a fixture
from train.run import named

PROMPT, SEED, STEPS = "a red circle", 5, 2


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return releases.release(tmp_path_factory.mktemp("publish"))


@pytest.fixture(scope="module")
def measures(tmp_path_factory):
    """Files of one run and its measures, as commands leave them."""
    folder = tmp_path_factory.mktemp("told")
    told = {
        "generation.colour": share(9, 10),
        "generation.chance.colour": share(1, 10),
        "train.speed": Measure(3.0, unit="s"),
    }
    write_json(folder / "scores.json", told)
    (folder / "scores.command.txt").write_text("python -m sample.evaluate\n")
    (folder / "mine.run.json").write_text(json.dumps({"name": "mine", "schedule": {"steps": 7}, "optim": {"lr": 0.5}}))
    (folder / "mine.metrics.jsonl").write_text('{"step": 7, "loss": 0.25}\n{"step": 7, "event": "saved"}\n')
    return folder


def exported(release, out, *more: str, steps: int = STEPS):
    """The folder, written without the check that follows it."""
    argv = [str(release), "--out", str(out), "--prompt", PROMPT, "--seed", str(SEED), "--steps", str(steps), *more]
    publish.export(publish.tyro.cli(publish.Export, args=argv))
    return out


def pixels(folder):
    with Image.open(folder / "sample.png") as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def of_release(release):
    return np.asarray(Pipeline(load(release))([PROMPT], [SEED], Drawing(STEPS))[0]).astype(int)


@pytest.mark.parametrize("layout", [["--bundle-base"], ["--layout", "diffusers"]])
def test_a_whole_folder_draws_the_same_with_nothing_else_there(release, tmp_path, layout):
    moved = tmp_path / "release"
    shutil.copytree(release.parent, tmp_path / "world")
    folder = exported(tmp_path / "world" / "release", tmp_path / "out", *layout)
    shutil.rmtree(tmp_path / "world")  # what it was made from
    folder.rename(moved)
    assert np.array_equal(pixels(moved), of_release(release))
    assert np.array_equal(np.asarray(publish.redraw(moved)).astype(int), pixels(moved))


def test_check_is_another_process_and_export_ends_with_it(release, measures, tmp_path, capsys):
    """Through the command line, as users do it."""
    argv = ["export", str(release), "--out", str(tmp_path / "a"), "--bundle-base", "--steps", "1", "--measures"]
    assert run(publish.main, [*argv, str(measures / "scores.json")]) == 0
    out = capsys.readouterr().out
    assert "a new process draws the same picture" in out
    assert "every hash is right" in out
    assert f"hf upload ORG/a {tmp_path / 'a'}" in out
    sums = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path / "a", check=False)
    assert sums.returncode == 0


def test_another_machines_rounding_is_said(release, tmp_path, capsys):
    out = exported(release, tmp_path / "a", "--bundle-base")
    recorded = read_json(out / "publication.json")
    recorded["picture"] |= {"sha256": "another", "cpu": "AVX9"}
    (out / "publication.json").write_text(json.dumps(recorded))
    assert publish.compare(out, publish.redraw(out)) == []
    assert "within 0 of 255 levels (cpu AVX9 then and" in capsys.readouterr().out


def test_another_picture_is_told(release, tmp_path):
    out = exported(release, tmp_path / "a", "--bundle-base")
    assert publish.compare(out, publish.redraw(out)) == []
    recorded = read_json(out / "publication.json")
    recorded["picture"] |= {"seed": SEED + 1, "torch": "1.0"}
    (out / "publication.json").write_text(json.dumps(recorded))
    (told,) = publish.compare(out, publish.redraw(out))
    assert "draws another picture than sample.png, by up to" in told
    assert "(torch 1.0 then and" in told


def test_the_embedded_release_names_its_parts_and_stays_small(tmp_path):
    folder = exported(ROOT / "assets/world/release", tmp_path / "world", steps=1)
    trained = (ROOT / "assets/world/release/model.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in folder.rglob("*")) < trained + 4e5
    recorded = read_json(folder / "publication.json")
    assert recorded["base"] == {
        name: facts | {"here": False, "hub": False} for name, facts in read_json(folder / "config.json")["frozen"].items()
    }
    assert {facts["sha256"] for facts in recorded["base"].values()} <= {*(folder / "README.md").read_text().split("`")}


@pytest.mark.parametrize("layout", [["--bundle-base"], ["--layout", "diffusers"]])
def test_half_precision_halves_what_was_trained_and_little_else_changes(release, tmp_path, layout):
    whole, half = exported(release, tmp_path / "a", *layout), exported(release, tmp_path / "b", *layout, "--dtype", "bf16")
    assert 0 < abs(pixels(half) - pixels(whole)).max() < 40
    assert np.array_equal(np.asarray(publish.redraw(half)).astype(int), pixels(half))
    name = "model.safetensors" if "--bundle-base" in layout else "transformer/diffusion_pytorch_model.safetensors"
    assert {tensor.dtype for tensor in read_tensors(half / name).values()} == {torch.bfloat16}
    if "--bundle-base" in layout:
        assert sha256_of(half / "mllm" / "model.safetensors") == sha256_of(whole / "mllm" / "model.safetensors")


@pytest.mark.parametrize("layout", ["small", "diffusers"])
def test_a_labelled_decoder_is_published_too(classes, tmp_path, layout):  # noqa: F811
    folder = exported(classes, tmp_path / "classes", "--layout", layout)
    assert np.array_equal(np.asarray(publish.redraw(folder)).astype(int), pixels(folder))
    assert "class 0" in (folder / "README.md").read_text()


def test_the_card_is_filled_from_the_files(release, measures, tmp_path):
    out = exported(
        release,
        tmp_path / "a",
        "--bundle-base",
        "--run",
        f"{measures}/mine.run.json",
        "--measures",
        f"{measures}/scores.json",
    )
    text = (out / "README.md").read_text()
    front = dict(line.split(": ", 1) for line in text.split("---\n")[1].splitlines())
    assert {key: json.loads(value) for key, value in front.items()} == {
        "license": "apache-2.0",
        "library_name": "querybridge",
        "pipeline_tag": "text-to-image",
        "tags": ["querybridge", "metaquery", "small"],
    }
    for line in (
        "| schedule.steps | `7` |",
        "| optim.lr | `0.5` |",
        "| loss | 0.25 |",
        "`python -m sample.evaluate`",
        "| generation.colour | 90.0 % | 59.6 to 98.2 % | 10 |",
        "weakest that were measured: generation.colour, 90.0 %",
        "Trained at 16 x 16 pixels",
    ):
        assert line in text
    assert "weakest that were measured: generation.chance" not in text
    write_json(tmp_path / "scores.json", {"generation.colour": share(10, 10)})
    publish.main(["card", str(out), "--license", "mit", "--measures", str(tmp_path / "scores.json")])
    again = (out / "README.md").read_text()
    assert 'license: "mit"' in again
    assert "| generation.colour | 100.0 %" in again
    assert "| schedule.steps | `7` |" in again
    assert publish._verify(out) == []


def test_the_settings_that_a_card_tells_exist():
    settings = dump_config(named("metaquery.world")())
    assert [name for name in TOLD if name != "task.init" and _at(settings, name) is None] == []


@pytest.mark.parametrize("option", ["--measures", "--run"])
def test_a_card_that_cannot_be_made_changes_nothing(option, release, measures, tmp_path):
    out = exported(release, tmp_path / "a", "--bundle-base", "--run", f"{measures}/mine.run.json")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (tmp_path / "broken.json").write_text("no json")
    with pytest.raises(ValueError, match=r"broken\.json|run\.json"):
        publish.main(["card", str(out), "--license", "mit", option, str(tmp_path / "broken.json")])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_hub_ids_are_the_cards_base_models(release, tmp_path):
    out = exported(release, tmp_path / "a", "--bundle-base")
    recorded = read_json(out / "publication.json")
    recorded["base"]["mllm"] = publish._facts(
        {"path": "Qwen/Qwen2.5-VL-3B-Instruct", "revision": "66285546", "sha256": "0"}, False
    )
    (out / "publication.json").write_text(json.dumps(recorded))
    publish.main(["card", str(out)])
    text = (out / "README.md").read_text()
    assert 'base_model: ["Qwen/Qwen2.5-VL-3B-Instruct"]' in text
    assert "| mllm | Qwen/Qwen2.5-VL-3B-Instruct | 66285546 |" in text


def test_every_change_is_told_before_anything_is_loaded(release, tmp_path, capsys):
    out = exported(release, tmp_path / "a", "--bundle-base")
    tokenizer = out / "mllm" / "tokenizer.model"
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\0")
    (out / "vae" / "config.json").unlink()
    (out / "weights.bin").write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        publish.main(["check", str(out)])
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.split(f"{out}/")[1] for line in told] == [
        "mllm/tokenizer.model is not the file that was published; copy it again",
        "vae/config.json is missing; copy it again",
        "weights.bin is not in SHA256SUMS; remove it",
    ]
    with pytest.raises(ValueError, match=r"tokenizer\.model is not the file"):
        publish.main(["card", str(out)])  # a new card would vouch for it
    publish._seal(out)
    assert "weights.bin is of a kind that is not published" in publish.check(out)[0]


def test_what_cannot_be_published_is_one_sentence(release, tmp_path, capsys):
    twice = [str(tmp_path / name / "scores.json") for name in "mn"]
    for path in twice:
        write_json(Path(path), {"generation.colour": share(9, 10)})
    for argv, message in [
        (["export", str(release), "--out", str(tmp_path / "a")], "which others do not have; add --bundle-base"),
        (["export", str(tmp_path), "--out", str(tmp_path / "b")], "is no release"),
        (["export", str(release), "--out", str(release)], "is not an empty folder"),
        (["check", str(release)], "has no SHA256SUMS"),
        (["card", str(release)], "has no SHA256SUMS"),
        (
            ["export", str(release), "--out", str(tmp_path / "a"), "--bundle-base", "--measures", *twice],
            "two files are called scores.json",
        ),
    ]:
        assert run(publish.main, argv) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_diffusers_finds_the_class_by_the_line_beside(release, tmp_path):
    out = exported(release, tmp_path / "a", "--layout", "diffusers")
    pipe = DiffusionPipeline.from_pretrained(out, custom_pipeline=str(out), trust_remote_code=True)
    assert type(pipe) is MetaQueryPipeline
    (out / "pipeline.py").write_text("import os\n")
    publish._seal(out)
    assert "pipeline.py is not the line that export writes" in publish.check(out)[0]


def test_help_is_there_at_once():
    code = "import sys; from sample import publish; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        == "False\n"
    )
