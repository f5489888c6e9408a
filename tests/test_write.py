"""The real command line on small real input: layout, counts, identical bytes, nothing half-written."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data.emoji import open_emoji_font
from data.pack import Item, write_shards
from data.records import BadSample, Conversation, Edit, Labelled, TextToImage, to_record
from data.shards import ShardSource
from data.write import main
from model.prefix import Turn

FONT = Path(os.environ.get("EMOJI_FONT", "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))  # fonts-noto-color-emoji


def picture(path: Path, colour, kind=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path, kind)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for number, name in enumerate(("b.jpg", "a.png", "deep/c.webp", "d.jpeg")):
        picture(folder / name, (number * 40, 0, 0)).with_suffix(".txt").write_text(f" photo {name}\n")
    return folder


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def test_folder_in_img2dataset_layout(photos, tmp_path):
    assert run("folder", photos, "--out", tmp_path / "out", "--shard-size", 3) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.tar", "00001.tar"]
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert tar.getnames() == [
            *("000000000.json", "000000000.png", "000000000.txt"),
            *("000000001.jpg", "000000001.json", "000000001.txt"),
            *("000000002.jpg", "000000002.json", "000000002.txt"),
        ]
        copied = tar.extractfile("000000000.png")
        assert copied is not None
        assert copied.read() == (photos / "a.png").read_bytes()
    source = ShardSource(str(tmp_path / "out" / "*.tar"))
    samples = [source.read(number) for number in range(len(source))]
    assert [raw["txt"] for raw in samples] == ["photo a.png", "photo b.jpg", "photo d.jpeg", "photo deep/c.webp"]
    assert samples[3]["json"] == {
        "key": "000000003",
        "status": "success",
        "caption": "photo deep/c.webp",
        "path": "deep/c.webp",
        "width": 6,
        "height": 4,
        "sha256": hashlib.sha256((photos / "deep/c.webp").read_bytes()).hexdigest(),
    }


def test_what_cannot_be_used_is_counted(photos, tmp_path, capsys):
    picture(photos / "lonely.png", "red")
    picture(photos / "mute.png", "red").with_suffix(".txt").write_text(" \n")
    picture(photos / "foreign.png", "red").with_suffix(".txt").write_bytes(b"\xff")
    picture(photos / "lying.png", "red", "GIF").with_suffix(".txt").write_text("a gif by another name")
    (photos / "broken.jpg").write_bytes((photos / "b.jpg").read_bytes()[:200])
    (photos / "broken.txt").write_text("cut short")
    (photos / "notes.md").write_text("x")
    (photos / ".hidden.png").write_text("x")
    assert run("folder", photos, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "samples 4, shards 1" in printed
    for reason in (
        "an image has no .txt file beside it",
        "a caption is empty",
        "a text file is not UTF-8",
        "an image is neither JPEG, PNG nor WebP",
        "an image cannot be decoded",
        "a file is neither jpg, png nor webp",
    ):
        assert f"skipped 1: {reason}" in printed


def test_the_same_input_gives_the_same_bytes(photos, tmp_path):
    run("folder", photos, "--out", tmp_path / "one", "--shard-size", 3)
    for path in photos.rglob("*"):
        os.utime(path, (0, 0))
    run("folder", photos, "--out", tmp_path / "two", "--shard-size", 3)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_jsonl_of_every_task(tmp_path):
    for name in ("red", "blue"):
        picture(tmp_path / f"images/{name}.png", name)
    lines = [
        {"image": "red.png", "caption": "red", "licence": "CC0"},
        {"image": "red.png", "text": "also red"},
        {"image": "red.png", "sources": ["blue.png"], "caption": "red", "instruction": "make it red"},
        {"images": ["blue.png"], "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "blue"}]},
        {"image": "blue.png", "label": 7},
    ]
    (tmp_path / "list.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    assert run("jsonl", tmp_path / "list.jsonl", "--images", tmp_path / "images", "--out", tmp_path / "out") == 0
    source = ShardSource(str(tmp_path / "out" / "*.tar"))
    plain, text, edit, chat, labelled = [source.read(number) for number in range(len(source))]
    red, blue = plain["image"], labelled["image"]
    assert plain["json"]["licence"] == "CC0"
    assert to_record("t2i", plain) == TextToImage("000000000", "red", red)
    assert to_record("t2i", text) == TextToImage("000000001", "also red", red)
    assert to_record("edit", edit) == Edit("000000002", (blue,), "make it red", red)
    assert edit["json"]["caption"] == "red"
    turns = (Turn("user", "?", (blue,)), Turn("assistant", "blue"))
    assert to_record("chat", chat) == Conversation("000000003", turns)
    assert to_record("labelled", labelled) == Labelled("000000004", blue, 7)


def test_a_list_as_llava_writes_it(tmp_path, capsys):
    picture(tmp_path / "images/a.png", "red")
    said = [{"from": "human", "value": "<image>\nwhich colour?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "llava.json").write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": said}], indent=1))
    assert run("jsonl", tmp_path / "llava.json", "--images", tmp_path / "images", "--out", tmp_path / "out") == 0
    raw = ShardSource(str(tmp_path / "out" / "*.tar")).read(0)
    turns = (Turn("user", "which colour?", (raw["image"],)), Turn("assistant", "red"))
    assert to_record("chat", raw) == Conversation("000000000", turns)
    for content, message in (("[1]", "entry 1 is not a JSON object"), ("[{]", "is no JSON list")):
        (tmp_path / "llava.json").write_text(content)
        assert run("jsonl", tmp_path / "llava.json", "--out", tmp_path / "other") == 2
        assert message in capsys.readouterr().err


def test_jsonl_lines_that_lack_something_are_counted(tmp_path, capsys):
    picture(tmp_path / "red.png", "red")
    lines = [
        {"image": "red.png", "caption": "red"},
        {"image": "missing.png", "caption": "red"},
        {"image": ["red.png"], "caption": "red"},
        {"image": "red.png"},
        {"caption": "red"},
        {"image": "red.png", "caption": 3},
        {"image": "red.png", "caption": "red", "sources": "red.png"},
        {"image": "red.png", "label": "cat"},
        {"image": "red.png", "messages": "hello"},
        {"image": "red.png", "caption": "half of a pair: \ud800"},
        {"image": "nothing\x00.png", "caption": "red"},
        {"image": "red.png", "caption": "  "},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert run("jsonl", tmp_path / "list.jsonl", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "samples 1, shards 1" in printed
    assert printed.count("skipped 1:") == 7
    assert printed.count("skipped 2:") == 2  # files that cannot be read; lines without a caption


def test_absent_columns_and_other_tasks_labels_cost_nothing(tmp_path, capsys):
    picture(tmp_path / "red.png", "red")
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "red"}]
    absent = dict.fromkeys(("sources", "images", "messages", "label", "caption", "image"))
    lines = [
        absent | {"image": "red.png", "caption": "red"},
        absent | {"messages": said},
        {"image": "red.png", "caption": "red", "label": "cat"},
        absent | {"caption": "red"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert run("jsonl", tmp_path / "list.jsonl", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "samples 3, shards 1" in printed
    assert 'skipped 1: a line has no "image" (line 4)' in printed


def test_skipped_files_are_named_and_foreign_names_are_kept(photos, tmp_path, capsys):
    for number in range(7):
        picture(photos / f"lonely{number}.png", "red")
    foreign = Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png"))
    picture(foreign, "red").with_suffix(".txt").write_text("a cafe")
    assert run("folder", photos, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "skipped 7: an image has no .txt file beside it (lonely0.png, lonely1.png, lonely2.png" in printed
    assert "lonely4.png, ...)" in printed
    source = ShardSource(str(tmp_path / "out" / "*.tar"))
    assert "caf\N{REPLACEMENT CHARACTER}.png" in {source.read(number)["json"]["path"] for number in range(len(source))}


@pytest.mark.parametrize("content", ['{"image": "a.png"', "[1]", "\x00"])
def test_a_line_that_is_no_object_is_named(tmp_path, capsys, content):
    (tmp_path / "list.jsonl").write_text('{"image": "a.png"}\n' + content)
    assert run("jsonl", tmp_path / "list.jsonl", "--out", tmp_path / "out") == 2
    assert "list.jsonl line 2 is not" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_input_gives_one_sentence_and_leaves_nothing(photos, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "not.ttf").write_bytes(b"x" * 100)
    before = sorted(tmp_path.rglob("*"))
    for arguments, sentence in (
        (("folder", tmp_path / "nowhere", "--out", tmp_path / "out"), "is not a folder"),
        (("folder", tmp_path / "empty", "--out", tmp_path / "out"), "nothing to write: no input found"),
        (("folder", photos, "--out", tmp_path / "full"), "exists and is not an empty folder"),
        (("folder", photos, "--out", tmp_path / "out", "--shard-size", 0), "--shard-size is 0"),
        (("jsonl", tmp_path / "nowhere.jsonl", "--out", tmp_path / "out"), "nowhere.jsonl"),
        (("emoji", "--font", tmp_path / "nowhere.ttf", "--out", tmp_path / "out"), "does not exist"),
        (("emoji", "--font", tmp_path / "not.ttf", "--out", tmp_path / "out"), "cannot be used"),
    ):
        assert run(*arguments) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert sentence in printed
        assert printed.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_options_exit_with_2(photos, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run("folder", photos, "--out", tmp_path / "out", "--shardsize", 3)
    assert caught.value.code == 2
    assert "--shard-size" in capsys.readouterr().err


def test_a_crash_leaves_no_folder(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (2, 2)).save(stream, "PNG")

    def read(number: int) -> Item:
        if number == 5:
            raise KeyboardInterrupt
        return Item("x", stream.getvalue())

    with pytest.raises(KeyboardInterrupt):
        write_shards(range(9), read, tmp_path / "out", shard_size=2)
    assert not list(tmp_path.iterdir())
    (tmp_path / f".out.{os.getpid()}.tmp").mkdir()  # left by one that was killed, where process ids repeat
    assert write_shards(range(5), read, tmp_path / "out", shard_size=2).samples == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not FONT.is_file(), reason=f"no {FONT}: install fonts-noto-color-emoji or set EMOJI_FONT")
def test_emoji_of_the_real_font(tmp_path):
    font = open_emoji_font(FONT)
    assert len(font.code_points) > 1300
    assert min(font.code_points) >= 0x80
    some = [ord(character) for character in "❤🍎🐸🟦"]
    written = [write_shards(some, font.item, tmp_path / name) for name in ("one", "two")]
    assert written[0].samples == 4
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    source = ShardSource(str(tmp_path / "one" / "*.tar"))
    samples = [source.read(number) for number in range(4)]
    assert [raw["txt"] for raw in samples] == ["heavy black heart", "red apple", "frog face", "large blue square"]
    assert {raw["image"].size for raw in samples} == {(128, 128)}
    assert {raw["image"].getpixel((0, 0)) for raw in samples} == {(255, 255, 255)}
    heart, apple, frog, square = [raw["image"].getpixel((64, 64)) for raw in samples]
    assert heart[0] > 200 > heart[1]
    assert apple[0] > apple[2]
    assert frog[1] > frog[2]
    assert square[2] > square[0]
    with pytest.raises(BadSample, match="the glyph is empty"):
        font.item(0x200D)  # the joiner of emoji sequences
    with pytest.raises(BadSample, match="no Unicode name"):
        font.item(0xFE82B)  # private use
