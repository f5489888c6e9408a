import io
import subprocess
import sys

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from model.mllm import MLLMConfig, load
from model.prefix import Turn
from sample import chat
from sample.cli import run
from tests import releases, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    releases.release(folder)
    tiny.image((16, 16)).save(folder / "x.png")
    return folder


@pytest.fixture(scope="module")
def mllm(folder):
    return load(MLLMConfig(str(folder / "mllm"), dtype="float32"))


def reply(mllm, *turns: Turn, tokens: int = 12) -> str:
    return "".join(mllm.reply(mllm.builder([turns]), max_new_tokens=tokens))


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


def test_one_question_through_the_command(folder, mllm):
    """The command says what the stock model says: the bridge changes nothing about understanding."""
    options = ["--release", folder / "release", "--image", folder / "x.png", "--max-new-tokens", "12"]
    command = [sys.executable, "-m", "sample.chat", *map(str, options), "how many circle ?"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stderr
    assert done.returncode == 0
    with Image.open(folder / "x.png") as picture:
        assert done.stdout == reply(mllm, Turn("user", "how many circle ?", (picture.convert("RGB"),))) + "\n"


def test_a_dialogue_remembers_its_turns(folder, mllm, monkeypatch, capsys):
    first, second = "is there a star ?", "what colour is it ?"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{first}\n\n{second}\n/reset\n{second}\n"))
    assert run(chat.main, ["--model", str(folder / "mllm"), "--dtype", "float32", "--max-new-tokens", "12"]) == 0
    answer = reply(mllm, Turn("user", first))
    followed = reply(mllm, Turn("user", first), Turn("assistant", answer), Turn("user", second))
    alone = reply(mllm, Turn("user", second))
    assert capsys.readouterr().out == f"{answer}\n{followed}\n{alone}\n"


def test_a_drawn_picture_joins_the_conversation(folder, mllm, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/draw a red circle\nwhat colour is it ?\n/quit\nnever asked\n"))
    arguments = ["--release", folder / "release", "--out", tmp_path / "out", "--max-new-tokens", "12"]
    assert run(chat.main, list(map(str, arguments))) == 0
    drawn = tmp_path / "out" / "drawn-000.png"
    with PngImageFile(drawn) as picture:
        assert picture.text["prompt"] == "a red circle"
        answer = reply(mllm, Turn("user", "what colour is it ?", (picture.convert("RGB"),)))
    assert capsys.readouterr().out == f"{drawn}\n{answer}\n"


def test_pictures_of_an_earlier_dialogue_stay(folder, monkeypatch, tmp_path):
    arguments = ["--release", str(folder / "release"), "--out", str(tmp_path)]
    for prompt in ("a star", "a red circle"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"/draw {prompt}\n"))
        assert run(chat.main, arguments) == 0
    texts = [PngImageFile(path).text["prompt"] for path in sorted(tmp_path.iterdir())]
    assert texts == ["a star", "a red circle"]


def test_stopping_an_answer_does_not_end_the_dialogue(folder, mllm, monkeypatch, capsys):
    class Stopped(chat.Chat):
        def say(self, question):
            if question == "stop":
                raise KeyboardInterrupt
            super().say(question)

    monkeypatch.setattr(chat, "Chat", Stopped)
    monkeypatch.setattr(sys, "stdin", io.StringIO("stop\nis there a star ?\n"))
    assert run(chat.main, ["--model", str(folder / "mllm"), "--dtype", "float32", "--max-new-tokens", "12"]) == 0
    assert reply(mllm, Turn("user", "is there a star ?")) in capsys.readouterr().out


def test_a_mistake_in_a_dialogue_does_not_end_it(folder, mllm, monkeypatch, capsys, tmp_path):
    said = [
        "/image absent.png",
        "/draw a star",
        "/nonsense",
        "star " * 300,
        f"/image '{folder / 'x.png'}'",
        "is there a star ?",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(said) + "\n"))
    assert run(chat.main, ["--model", str(folder / "mllm"), "--dtype", "float32", "--max-new-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    with Image.open(folder / "x.png") as picture:
        assert out == reply(mllm, Turn("user", "is there a star ?", (picture.convert("RGB"),))) + "\n"
    assert len(errors(err)) == 4
    for words in (
        "absent.png is not a file",
        "start with --release",
        "/nonsense is no command",
        "limit is 256",
    ):
        assert words in err


def test_mistakes_on_the_command_line_exit_with_two(folder, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    mllm = ["--model", folder / "mllm"]
    cases = {
        "either --release or --model": ["hello"],
        "either --release or": [*mllm, "--release", folder / "release", "hello"],
        "is no release": ["--release", tmp_path, "hello"],
        "cannot be loaded": ["--model", tmp_path / "absent", "hello"],
        "broken.jpg: an image cannot be decoded": [*mllm, "--image", tmp_path / "broken.jpg", "hello"],
        "limit is 256": [*mllm, "star " * 300],
        "--max-new-tokens 0": [*mllm, "--max-new-tokens", "0", "hello"],
        "--temperature nan": [*mllm, "--temperature", "nan", "hello"],
        "/reset the conversation": [*mllm, "--max-new-tokens", "1000000", "hello"],
    }
    for words, arguments in cases.items():
        assert run(chat.main, list(map(str, arguments))) == 2
        out, err = capsys.readouterr()
        assert len(errors(err)) == 1
        assert words in errors(err)[0]
        assert not out
