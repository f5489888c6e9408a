import os
import runpy
import subprocess
import sys

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from sample import generate
from sample.cli import run
from tests import releases


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return releases.release(tmp_path_factory.mktemp("generate"))


def drawn(release, out, *arguments):
    assert run(generate.main, ["--release", str(release), "--out", str(out), "--steps", "2", *arguments]) == 0
    return pictures_in(out)


def pictures_in(folder) -> dict[str, PngImageFile]:
    return {path.name: PngImageFile(path) for path in sorted(folder.iterdir())}


def refusal(capsys, release, out, *arguments) -> str:
    """The one sentence of a command that fails with 2 and writes nothing."""
    assert run(generate.main, ["--release", str(release), "--out", str(out), "--steps", "2", *arguments]) == 2
    assert not out.exists()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_each_picture_carries_what_made_it(release, tmp_path):
    pictures = drawn(release, tmp_path / "out", "a red circle", "a star ☆", "--n", "2", "--seed", "7", "--guidance", "2")
    assert list(pictures) == [f"0000{i}.png" for i in range(4)]
    texts = [picture.text for picture in pictures.values()]
    assert [(t["prompt"], t["seed"]) for t in texts] == [
        ("a red circle", "7"),
        ("a red circle", "8"),
        ("a star ☆", "9"),
        ("a star ☆", "10"),
    ]
    assert len(texts[0]["release"]) == 64
    assert texts[0]["guidance"] == "2.0"
    assert texts[0]["steps"] == "2"
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask()}


def test_a_file_of_prompts_any_batch_size_and_any_number_of_ranks_give_the_same(release, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a star \na blue square\n", encoding="utf-8-sig")
    straight = drawn(release, tmp_path / "straight", "a red circle", "a star", "a blue square", "--batch-size", "3")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        drawn(release, tmp_path / "split", "--prompts", str(tmp_path / "prompts.txt"), "--batch-size", "1")
    split = pictures_in(tmp_path / "split")
    assert list(straight) == list(split)
    for name, picture in straight.items():
        assert picture.tobytes() == split[name].tobytes()
        assert picture.text == split[name].text


def test_grid_shows_all(release, tmp_path):
    pictures = drawn(release, tmp_path / "out", "a red circle", "a star", "--grid")
    assert list(pictures) == ["00000.png", "00001.png", "grid.png"]
    assert pictures["grid.png"].width > 2 * 128


def test_source_pictures_change_the_picture(release, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "source.png")
    plain = drawn(release, tmp_path / "plain", "a star")
    edited = drawn(release, tmp_path / "edited", "a star", "--image", str(tmp_path / "source.png"))
    assert plain["00000.png"].tobytes() != edited["00000.png"].tobytes()


def test_mistakes_are_told_in_one_sentence_and_write_nothing(release, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    Image.new("RGB", (4, 4)).save(tmp_path / "moving.gif")
    cases = {
        "no release": [tmp_path, "a star"],
        "there is no prompt": [release],
        "is empty; write one prompt per line": [release, "--prompts", tmp_path / "empty.txt"],
        "is not UTF-8 text": [release, "--prompts", tmp_path / "latin.txt"],
        "No such file": [release, "--prompts", tmp_path / "absent.txt"],
        "limit is 256": [release, "a star", "star " * 300],
        "broken.png: an image cannot be decoded": [release, "a star", "--image", tmp_path / "broken.png"],
        "is of type GIF": [release, "a star", "--image", tmp_path / "moving.gif"],
        "--n 0 is too small": [release, "a star", "--n", "0"],
        "cannot be counted up from": [release, "a star", "a circle", "--seed", str(2**63 - 2)],
        "is not Unicode": [release, "caf\udce9"],
    }
    for words, (folder, *arguments) in cases.items():
        assert words in refusal(capsys, folder, out, *map(str, arguments))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refusal(capsys, release, out, "a star", "--grid")
    monkeypatch.setenv("RANK", "2")
    assert "RANK is 2 and WORLD_SIZE 2" in refusal(capsys, release, out, "a star")
    for setting in (
        ["--guidance-start", "0.9", "--guidance-end", "0.1"],
        ["--steps", "0"],
        ["--guidance", "nan"],
        ["--solver", "ddim"],
    ):
        with pytest.raises(SystemExit, match="2"):
            generate.main(["--release", str(release), "a star", *setting])


def test_a_release_that_lost_its_weights_is_refused(tmp_path, capsys):
    release = releases.release(tmp_path)
    weights = release / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model.safetensors cannot be read" in refusal(capsys, release, tmp_path / "out", "a star")


def test_the_module_exits_with_two(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", "--release", str(tmp_path / "absent"), "a star"])
    monkeypatch.delitem(sys.modules, "sample.generate")
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("sample.generate", run_name="__main__")
    assert "is no release" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate"])
def test_help_comes_without_torch(command):
    code = f"""import sys
from sample import {command}
try:
    {command}.main(["--help"])
except SystemExit as end:
    assert end.code == 0
assert "torch" not in sys.modules and "diffusers" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
