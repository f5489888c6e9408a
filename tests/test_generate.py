import json
import os
import runpy
import subprocess
import sys

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from sample import generate
from sample.cli import run
from tests import releases, tiny


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
    """Bit for bit, where batches are of one size; else but for rounding."""
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a star \na blue square\n", encoding="utf-8-sig")
    prompts = "a red circle", "a star", "a blue square"
    straight = drawn(release, tmp_path / "straight", *prompts, "--batch-size", "1")
    together = drawn(release, tmp_path / "together", *prompts, "--batch-size", "3")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        drawn(release, tmp_path / "split", "--prompts", str(tmp_path / "prompts.txt"), "--batch-size", "1")
    split = pictures_in(tmp_path / "split")
    assert list(straight) == list(split)
    for name, picture in straight.items():
        assert picture.tobytes() == split[name].tobytes()
        assert tiny.near(picture, together[name])
        assert picture.text == split[name].text


def test_grid_shows_all(release, tmp_path):
    pictures = drawn(release, tmp_path / "out", "a red circle", "a star", "--grid")
    assert list(pictures) == ["00000.png", "00001.png"]
    assert PngImageFile(tmp_path / "out-grid.png").width > 2 * 128


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
        "--shard 8/8 is not of the form i/n": [release, "a star", "--shard", "8/8"],
        "--batch-size 0 is too small": [release, "a star", "--batch-size", "0"],
        "--layout takes the benchmark's own prompts": [release, "a star", "--layout", "dpg"],
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


def asked(path, *lines) -> str:
    """A JSONL file of prompts."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def mixed(folder) -> str:
    """Text to image, an edit, two subjects, a reconstruction; three shapes, own seeds and counts."""
    for name in ("one", "two"):
        tiny.image((20, 16), seed=len(name)).save(folder / f"{name}.png")
    return asked(
        folder / "list.jsonl",
        {"prompt": "a red circle", "n": 2},
        {"prompt": "a star", "images": ["one.png"], "height": 24, "width": 16},
        {"prompt": "a blue square", "seed": 3, "negative": "red"},
        {"prompt": "", "images": ["two.png"], "id": "again"},
        {"prompt": "a star", "images": ["one.png", "two.png"], "width": 24, "seed": 9},
    )


def test_a_picture_is_the_same_in_any_company(release, tmp_path):
    """One at once, by shards, and each line alone from the command line, bit for bit; one batch of all, but for rounding."""
    lines = mixed(tmp_path)
    whole = drawn(release, tmp_path / "whole", "--prompts", lines)
    drawn(release, tmp_path / "single", "--prompts", lines, "--batch-size", "1")
    for part in range(3):
        drawn(release, tmp_path / "shards", "--prompts", lines, "--shard", f"{part}/3", "--batch-size", "1")
    assert [picture.text["seed"] for picture in whole.values()] == ["0", "1", "2", "3", "4", "9"]
    assert [picture.size for picture in whole.values()] == [(16, 16)] * 2 + [(16, 24)] + [(16, 16)] * 2 + [(24, 16)]
    assert whole["00004.png"].text["id"] == "again"
    single, shards = (pictures_in(tmp_path / folder) for folder in ("single", "shards"))
    assert list(single) == list(shards) == list(whole)
    for name, picture in whole.items():
        assert single[name].tobytes() == shards[name].tobytes()
        assert tiny.near(single[name], picture)
        assert single[name].text == shards[name].text == picture.text
    alone = {
        "00001.png": ["a red circle", "--seed", "1"],
        "00002.png": ["a star", "--image", "one.png", "--seed", "2", "--height", "24"],
        "00003.png": ["a blue square", "--seed", "3", "--negative", "red"],
        "00004.png": ["--image", "two.png", "--seed", "4"],
        "00005.png": ["a star", "--image", "one.png", "--image", "two.png", "--seed", "9", "--width", "24"],
    }
    for name, arguments in alone.items():
        given = [str(tmp_path / word) if word.endswith("png") else word for word in arguments]
        one = drawn(release, tmp_path / f"alone-{name}", *given)["00000.png"]
        assert one.tobytes() == single[name].tobytes()


def test_it_goes_on_and_refuses_what_was_drawn_otherwise(release, tmp_path, capsys):
    lines, out = mixed(tmp_path), tmp_path / "out"
    whole = drawn(release, out, "--prompts", lines)
    (out / "00003.png").unlink()
    before = (out / "00000.png").stat().st_mtime_ns
    again = drawn(release, out, "--prompts", lines)
    assert "6 pictures in" in (told := capsys.readouterr().out)
    assert "5 of them there before" in told
    assert (out / "00000.png").stat().st_mtime_ns == before
    assert list(again) == list(whole)
    assert all(tiny.near(picture, whole[name]) for name, picture in again.items())
    tiny.image((20, 16), seed=8).save(tmp_path / "two.png")  # a source that is another picture by now
    for more, words in [
        ([], "images: it has"),
        (["--guidance", "2"], "guidance: it has '3.0', asked for is '2.0'"),
        (["--seed", "1"], "seed: it has '0', asked for is '1'"),
    ]:
        arguments = ["--release", str(release), "--out", str(out), "--steps", "2", "--prompts", lines, *more]
        assert run(generate.main, arguments) == 2
        assert f"was drawn with other settings; remove it, or name another folder ({words}" in capsys.readouterr().err
    (out / "00000.png").write_bytes(b"no picture")
    assert run(generate.main, ["--release", str(release), "--out", str(out), "--steps", "2", "--prompts", lines]) == 2
    assert "00000.png is no picture; remove it" in capsys.readouterr().err


def test_prompts_name_no_paths(release, tmp_path):
    line = {"prompt": "../../a red/circle", "id": "../b"}
    pictures = drawn(release, tmp_path / "deep" / "out", "--prompts", asked(tmp_path / "list.jsonl", line))
    assert pictures["00000.png"].text["id"] == "../b"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["00000.png", "list.jsonl"]


def test_a_line_that_is_wrong_is_named(release, tmp_path, capsys):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a"')
    for line, words in [
        ({"prompts": "a"}, "line 2: unknown key prompts; did you mean prompt?"),
        ({"prompt": "a", "n": 0}, "line 2: n 0 is too small"),
        ({"prompt": "a", "seed": -1}, "line 2: seed -1 cannot be counted up from"),
        ({"prompt": "a", "height": -8}, "line 2: height -8 is no size"),
        ({"prompt": "a", "width": 14}, "VAE and decoder take multiples of 4"),
        ({"prompt": "a", "images": "one.png"}, "line 2: images"),
        ({"prompt": "a", "images": ["absent.png"]}, "absent.png is not a file"),
        ({"prompt": ""}, "line 2 asks for nothing"),
        (["a"], "line 2"),
    ]:
        path = asked(tmp_path / "list.jsonl", {"prompt": "a star"}, line)
        assert words in refusal(capsys, release, tmp_path / "out", "--prompts", path)
    assert "line 2 is no JSON object" in refusal(
        capsys, release, tmp_path / "out", "--prompts", str(tmp_path / "broken.jsonl")
    )


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


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate", "layouts", "classes"])
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
