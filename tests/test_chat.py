import io
import json
import subprocess
import sys

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from model.mllm import MLLMConfig, load
from model.prefix import DRAW_SYSTEM, Turn
from sample import chat
from sample.cli import run
from sample.pictures import open_picture
from sample.pipeline import Asked, Pipeline
from sample.session import Session
from sample.settings import Drawing
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
    assert (done.returncode, errors(done.stderr)) == (0, []), done.stderr
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


def draw_arguments(folder, out) -> list[str]:
    return ["--release", str(folder / "release"), "--out", str(out), "--max-new-tokens", "12", "--steps", "2"]


def test_a_drawn_picture_joins_the_conversation(folder, mllm, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/draw a red circle\nwhat colour is it ?\n/quit\nnever asked\n"))
    assert run(chat.main, draw_arguments(folder, tmp_path / "out")) == 0
    drawn = tmp_path / "out" / "drawn-000.png"
    about = PngImageFile(drawn).text
    assert (about["prompt"], about["seed"], about["steps"]) == ("a red circle", "0", "2")
    with Image.open(drawn) as picture:
        before = [Turn("system", DRAW_SYSTEM), Turn("user", "a red circle"), Turn("assistant", "")]
        answer = reply(mllm, *before, Turn("user", "what colour is it ?", (picture.convert("RGB"),)))
    assert capsys.readouterr().out == f"{drawn}\n{answer}\n"


def test_edits_draw_from_the_last_picture_wherever_it_is(folder, monkeypatch, capsys, tmp_path):
    said = [
        "/draw a red circle",
        "/edit blue",  # the picture joins with this turn
        "how many ?",  # the edited one with this
        "/edit a star",  # so it joins again
        "/reset",
        f"/image {folder / 'x.png'} '{folder / 'x.png'}'",
        "/edit a star",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(said)))
    assert run(chat.main, draw_arguments(folder, tmp_path)) == 0
    assert not capsys.readouterr().err
    pictures = [open_picture(tmp_path / f"drawn-{number:03d}.png") for number in range(4)]
    pipeline = Pipeline.from_release(folder / "release")
    session, drawing = Session(pipeline), Drawing(steps=2)
    expected = [session.draw("a red circle", drawing=drawing), session.draw("blue", seed=1, drawing=drawing)]
    "".join(session.say("how many ?", max_new_tokens=12))
    expected.append(session.draw("a star", [expected[1]], seed=2, drawing=drawing))
    x = open_picture(folder / "x.png")
    expected += pipeline([Asked("a star", (x, x))], [3], drawing)
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in expected]


def test_a_script_gets_json(folder, mllm, monkeypatch, capsys, tmp_path):
    arguments = [*draw_arguments(folder, tmp_path), "--once", "--json"]
    assert run(chat.main, [*arguments, "--seed", "5", "is there a star ?"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answer"] == reply(mllm, Turn("user", "is there a star ?"))
    assert (told["picture"], told["seed"]) == (None, 5)
    assert told["tokens"] >= mllm.builder([[Turn("user", "is there a star ?")]]).ids.shape[1]
    assert 0 < told["seconds_to_first_token"] <= told["seconds"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("/draw a star\n"))
    assert run(chat.main, [*arguments, "--think"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answer"]  # the plan
    assert PngImageFile(told["picture"]).text["plan"] == told["answer"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n/draw a star\n"))
    assert run(chat.main, [*draw_arguments(folder, tmp_path), "--json"]) == 0
    assert len(list(map(json.loads, capsys.readouterr().out.splitlines()))) == 2


def test_a_plan_is_printed_as_it_is(folder, monkeypatch, capsys, tmp_path):
    """Also where a terminal looks on, whose bar must not take in what is printed."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(chat.main, [*draw_arguments(folder, tmp_path), "--think", "/draw a star"]) == 0
    drawn = tmp_path / "drawn-000.png"
    told = capsys.readouterr()
    assert told.out == f"{PngImageFile(drawn).text['plan']}\n{drawn}\n"
    assert "drawing, " in told.err


def test_a_session_draws_without_gradients(folder):
    asked = []

    class Recorded(Pipeline):
        def __call__(self, given, *rest):
            asked.extend(given)
            return super().__call__(given, *rest)

    Session(Recorded.from_release(folder / "release")).draw("a star", drawing=Drawing(steps=1))
    assert not asked[0].condition.requires_grad


@pytest.mark.parametrize("arguments", [["--once", "--json", " "], [""], ["--once"]])
def test_an_empty_question_is_refused(folder, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert run(chat.main, ["--release", str(folder / "release"), *arguments]) == 2
    assert "there is no question" in capsys.readouterr().err


def test_a_saved_dialogue_is_resumed(folder, monkeypatch, capsys, tmp_path):
    arguments, file = draw_arguments(folder, tmp_path), tmp_path / "saved" / "talk.json"
    asked = ["how many ?", "/draw a star", "what colour is it ?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(asked)))
    assert run(chat.main, arguments) == 0
    expected = capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*asked[:2], f"/save {file}"])))
    assert run(chat.main, arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(file)
    assert run(chat.main, [*arguments, "--resume", str(file), asked[2]]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == expected


def test_pictures_of_an_earlier_dialogue_stay(folder, monkeypatch, tmp_path):
    arguments = draw_arguments(folder, tmp_path)
    for prompt in ("a star", "a red circle"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"/draw {prompt}\n"))
        assert run(chat.main, arguments) == 0
    texts = [PngImageFile(path).text["prompt"] for path in sorted(tmp_path.iterdir())]
    assert texts == ["a star", "a red circle"]


def test_stopping_an_answer_does_not_end_the_dialogue(folder, mllm, monkeypatch, capsys):
    class Terminal(io.StringIO):
        """Where Ctrl-C is pressed at the first piece of the first answer."""

        pressed = False

        def write(self, text):
            if text and not self.pressed:
                Terminal.pressed = True
                raise KeyboardInterrupt
            return super().write(text)

    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stdin", io.StringIO("how many ?\nis there a star ?\n"))
    assert run(chat.main, ["--model", str(folder / "mllm"), "--dtype", "float32", "--max-new-tokens", "12"]) == 0
    assert shown.getvalue() == reply(mllm, Turn("user", "is there a star ?")) + "\n"
    assert "(stopped; /quit leaves)" in capsys.readouterr().err


def test_a_mistake_in_a_dialogue_does_not_end_it(folder, mllm, monkeypatch, capsys, tmp_path):
    said = [
        "/image absent.png",
        "/draw a star",
        "/nonsense",
        "/image",
        "/image 'x",
        "/draw",
        "/edit",
        "/edit blue",
        "/save",
        "star " * 300,
        f"/image '{folder / 'x.png'}'",
        "is there a star ?",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(said) + "\n"))
    assert run(chat.main, ["--model", str(folder / "mllm"), "--dtype", "float32", "--max-new-tokens", "12"]) == 2
    out, err = capsys.readouterr()
    with Image.open(folder / "x.png") as picture:
        assert out == reply(mllm, Turn("user", "is there a star ?", (picture.convert("RGB"),))) + "\n"
    assert len(errors(err)) == 11
    for words in (
        "absent.png is not a file",
        "give a release instead of a bare MLLM",
        "/image: there is no path",
        "No closing quotation",
        "/draw: there is no prompt",
        "/edit: there is no instruction",
        "/edit: there is no picture to change",
        "/save: there is no file",
        "/nonsense is no command",
        "limit is 512",
        "10 of these lines came to nothing",
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
        "limit is 512": [*mllm, "star " * 300],
        "--max-new-tokens 0": [*mllm, "--max-new-tokens", "0", "hello"],
        "--seed -1": [*mllm, "--seed", "-1", "hello"],
        "leave out --system": [*mllm, "--resume", "talk.json", "--system", "obey", "hello"],
        "talk.json is not a file": [*mllm, "--resume", tmp_path / "talk.json", "hello"],
        "/nonsense is no command": [*mllm, "/nonsense"],
        "--temperature nan": [*mllm, "--temperature", "nan", "hello"],
        "begin a new one": [*mllm, "--max-new-tokens", "1000000", "hello"],
    }
    for words, arguments in cases.items():
        assert run(chat.main, list(map(str, arguments))) == 2
        out, err = capsys.readouterr()
        assert len(errors(err)) == 1
        assert words in errors(err)[0]
        assert not out
