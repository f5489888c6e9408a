"""`python -m data.world`: the real commands on a few samples."""

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from webdataset.compat import WebDataset

from data.records import Edit, to_record
from data.shards import ShardSource
from data.source import WorldSource
from data.world.__main__ import main
from data.world.edits import make_edit, mask
from data.world.render import render
from data.world.scene import Scene


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def hashes(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("task", ["t2i", "chat", "edit"])
def test_the_bytes_do_not_depend_on_the_workers(task, tmp_path):
    found = []
    for workers in (0, 1, 2):
        out = tmp_path / str(workers)
        assert run("shards", "--n", 90, "--shard-size", 40, "--task", task, "--workers", workers, "--out", out) == 0
        found.append(hashes(out))
    assert list(found[0]) == ["00000.tar", "00001.tar", "00002.tar"]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("task", ["t2i", "chat"])
def test_shards_hold_what_the_source_makes_on_the_fly(task, tmp_path):
    assert run("shards", "--n", 25, "--seed", 3, "--split", "val", "--task", task, "--out", tmp_path / "out") == 0
    shards, source = ShardSource(str(tmp_path / "out" / "*.tar")), WorldSource(3, "val", task)
    assert len(shards) == 25
    for index in range(25):
        read, made = shards.read(index), source.read(index)
        assert read["txt"] == made["txt"]
        assert read["json"].items() >= made["json"].items()
        assert read["json"]["world"] == {"seed": 3, "split": "val", "index": index}
        if made["image"] is None:
            assert read["image"] is None
        else:
            assert (np.asarray(read["image"]) == np.asarray(made["image"])).all()
        record = to_record(task, read)
        if task == "edit":
            assert isinstance(record, Edit)
            assert record.mask is not None
            assert (np.asarray(record.mask) == np.asarray(made["mask"])).all()


def test_webdataset_reads_edits(tmp_path):
    assert run("shards", "--n", 12, "--task", "edit", "--size", 48, "--out", tmp_path / "out") == 0
    samples = list(WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{index:09d}" for index in range(12)]
    for index, sample in enumerate(samples):
        edit = make_edit(0, index)
        assert sample["txt"].decode() == edit.instruction
        described = json.loads(sample["json"])
        assert Scene.from_json(described["edit"]["before"]) == edit.before
        assert Scene.from_json(described["scene"]) == edit.after
        for extension, scene in (("source0.png", edit.before), ("png", edit.after)):
            assert (np.asarray(Image.open(io.BytesIO(sample[extension]))) == render(scene, 48)).all()
        changed = np.asarray(Image.open(io.BytesIO(sample["mask.png"])))
        assert ((changed > 0) == mask(edit.before, edit.after, 48)).all()


def test_check_writes_its_measures(tmp_path, capsys):
    assert run("check", "--n", 20, "--json", tmp_path / "measures.json") == 0
    measures = json.loads((tmp_path / "measures.json").read_text())
    assert measures["reader.clean.right"]["value"] == 1
    assert measures["reader.clean.right"]["n"] == 20
    assert measures["reader.noise.wrong"]["value"] == 0
    assert all(set(measure) == {"value", "low", "high", "n", "unit"} for measure in measures.values())
    assert "clean" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_preview_writes_a_picture(task, tmp_path):
    out = tmp_path / "page.png"
    assert run("preview", "--out", out, "--task", task, "--n", 3, "--columns", 2, "--size", 64) == 0
    with Image.open(out) as page:
        assert page.width > 2 * 64
    assert [path.name for path in tmp_path.iterdir()] == ["page.png"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("shards", "--n", 0), "error: --n is 0; give at least 1"),
        (("shards", "--workers", -1), "error: --workers is -1; give at least 0"),
        (("shards", "--shard-size", 0), "error: --shard-size is 0"),
        (("preview", "--columns", 0), "error: --columns is 0"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, sentence, tmp_path, capsys):
    assert run(*arguments, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith(sentence)
    assert not list(tmp_path.iterdir())


def test_a_full_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert run("shards", "--n", 2, "--out", tmp_path) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_help_tells_all(capsys):
    for command in ("shards", "check", "preview"):
        with pytest.raises(SystemExit) as stop:
            run(command, "--help")
        assert stop.value.code == 0
        assert "--out" in (text := capsys.readouterr().out) or command == "check"
        assert "--n" in text
