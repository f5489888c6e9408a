"""Every benchmark's files, drawn by the real command from a few lines in the benchmark's own form, and what is missing."""

import json
from pathlib import Path

import pytest
from PIL import Image

from sample import generate, layouts
from sample.cli import run
from sample.layouts import LAYOUTS
from sample.prompts import read_lines
from tests import releases, tiny

PROMPTS = ("a red circle", "two blue stars", "a green square")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return releases.release(tmp_path_factory.mktemp("layouts"))


def published(layout: str, folder: Path, prompts=PROMPTS) -> Path:
    """What `--prompts` names for a benchmark, with these prompts."""
    folder.mkdir(exist_ok=True)
    if layout == "dpg":
        for number, prompt in enumerate(prompts):
            (folder / f"COCOval2014_{number}.txt").write_text(prompt + "\n")
        return folder
    contents = {
        "geneval": "\n".join(json.dumps({"tag": "colors", "include": [], "prompt": p}) for p in prompts),
        "geneval2": "\n".join(json.dumps({"prompt": p, "atom_count": 3, "vqa_list": []}) for p in prompts),
        "wise": json.dumps([{"prompt_id": n + 9, "Prompt": p, "Explanation": ""} for n, p in enumerate(prompts)]),
        "mjhq": json.dumps({f"{n:040x}": {"category": "art", "prompt": p} for n, p in enumerate(prompts)}),
        "coco": json.dumps(
            {
                "images": [],
                "annotations": [
                    {"id": 10 - n, "image_id": 42 + n % len(prompts), "caption": p + "\n"}
                    for n, p in enumerate([*["not the first"] * len(prompts), *prompts])
                ],
            }
        ),
    }
    path = folder / ("data.jsonl" if layout.startswith("geneval") else "data.json")
    path.write_text(contents[layout])
    return path


FILES = {
    "geneval": [f"0000{p}/{f}" for p in range(3) for f in ["metadata.jsonl", *(f"samples/000{k}.png" for k in range(4))]],
    "geneval2": ["00000.png", "00001.png", "00002.png", "filepaths.json"],
    "dpg": [f"COCOval2014_{n}.png" for n in range(3)],
    "wise": ["10.png", "11.png", "9.png"],
    "mjhq": [f"{n:040x}.png" for n in range(3)],
    "coco": ["42.png", "43.png", "44.png"],
}


def draw(release, layout, prompts, out, *more: str) -> None:
    arguments = ["--release", str(release), "--layout", layout, "--prompts", str(prompts), "--out", str(out), "--steps", "1"]
    assert run(generate.main, [*arguments, *more]) == 0


def checked(layout, prompts, out, *more: str) -> int:
    """The check's exit code."""
    command = ["check", str(out), "--layout", layout, "--prompts", str(prompts), *more]
    try:
        return run(layouts.main, command)
    except SystemExit as end:
        return int(str(end.code))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_drawn_is_complete_the_last_prompt_too(release, layout, tmp_path, capsys):
    prompts, out = published(layout, tmp_path / "prompts"), tmp_path / "out"
    for part in ("1/2", "0/2"):
        assert checked(layout, prompts, out) != 0
        draw(release, layout, prompts, out, "--shard", part)
    assert checked(layout, prompts, out) == 0
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == sorted(FILES[layout])
    told = {Image.open(path).info["prompt"] for path in out.rglob("*.png")}
    assert told == set(PROMPTS)
    count = len(PROMPTS) * (4 if layout == "geneval" else 1)
    assert f"{count} of {count} pictures" in capsys.readouterr().out


def test_files_beside_the_pictures_say_what_their_evaluations_read(release, tmp_path):
    prompts = published("geneval", tmp_path / "geneval")
    draw(release, "geneval", prompts, tmp_path / "a", "-n", "1")
    lines = prompts.read_text().splitlines()
    assert [(tmp_path / "a" / f"0000{n}" / "metadata.jsonl").read_text() for n in range(3)] == [f"{x}\n" for x in lines]
    draw(release, "geneval2", published("geneval2", tmp_path / "geneval2"), tmp_path / "b")
    files = json.loads((tmp_path / "b" / "filepaths.json").read_text())
    assert list(files) == list(PROMPTS)
    assert [Image.open(files[prompt]).info["prompt"] for prompt in PROMPTS] == list(PROMPTS)


def test_a_tiled_file_holds_what_would_be_drawn_apart(release, tmp_path):
    """Four pictures of one prompt, two a row, drawn in batches that cut them apart; and the same four by their seeds."""
    draw(release, "dpg", published("dpg", tmp_path / "prompts"), tmp_path / "tiled", "--batch-size", "3", "--seed", "5")
    arguments = ["--release", str(release), "--out", str(tmp_path / "single"), "--steps", "1", "--seed", "9", "-n", "4"]
    assert run(generate.main, [*arguments, PROMPTS[1]]) == 0
    tiled = Image.open(tmp_path / "tiled" / "COCOval2014_1.png")
    assert tiled.size == (32, 32)
    assert tiled.info["seed"] == "9 10 11 12"
    for place in range(4):
        left, top = place % 2 * 16, place // 2 * 16
        single = Image.open(tmp_path / "single" / f"0000{place}.png")
        assert tiny.near(tiled.crop((left, top, left + 16, top + 16)), single)


def test_the_check_tells_what_is_wrong(release, tmp_path, capsys):
    prompts, out = published("geneval", tmp_path / "prompts"), tmp_path / "out"
    draw(release, "geneval", prompts, out)
    samples = [out / f"0000{n}" / "samples" for n in range(3)]
    (samples[2] / "0003.png").unlink()
    (samples[0] / "0000.png").write_bytes((samples[0] / "0000.png").read_bytes()[:-40])
    (samples[1] / "0001.png").write_bytes((samples[0] / "0001.png").read_bytes())
    Image.new("RGB", (8, 8)).save(samples[1] / "0002.png")
    Image.new("RGB", (8, 8), "red").save(samples[1] / "0009.png")
    (out / "00001" / "metadata.jsonl").write_text("{}")
    assert checked("geneval", prompts, out) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[told.index("11 of 12 pictures") :] == [
        "11 of 12 pictures",
        "sizes: 16 x 16 (9), 8 x 8 (1)",
        "missing: 1: 00002/samples/0003.png",
        "damaged: 1: 00000/samples/0000.png",
        "mistaken: 1: 00001/samples/0001.png",
        "foreign: 1: 00001/samples/0009.png",
        "duplicates: 1: 00001/samples/0001.png",
        "beside: 1: 00001/metadata.jsonl",
    ]


def test_what_is_no_benchmark_s_file_is_refused(release, tmp_path, capsys):
    geneval, evil = published("geneval", tmp_path / "geneval"), tmp_path / "evil.json"
    evil.write_text(json.dumps({"../../x": {"category": "art", "prompt": "a star"}}))
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps([{"prompt_id": 1, "Prompt": "a star"}] * 2))
    (tmp_path / "empty").mkdir()
    for layout, prompts, more, words in [
        ("mjhq", geneval, [], "is not this benchmark's file (JSONDecodeError"),
        ("coco", published("wise", tmp_path / "wise"), [], "is not this benchmark's file (TypeError"),
        ("mjhq", evil, [], "'../../x' cannot name a file"),
        ("wise", twice, [], "2 entries are called 1"),
        ("dpg", geneval, [], "is no folder"),
        ("dpg", tmp_path / "empty", [], "holds no prompt"),
        ("geneval2", geneval, ["--n", "2"], "this layout has room for 1 to 1 a prompt"),
        ("dpg", published("dpg", tmp_path / "dpg"), ["--n", "5"], "this layout has room for 1 to 4 a prompt"),
        ("geneval", geneval, ["--seed", "-1"], "--seed -1 cannot be counted up from"),
    ]:
        out = tmp_path / "out"
        arguments = ["--release", str(release), "--layout", layout, "--prompts", str(prompts), "--out", str(out)]
        assert run(generate.main, [*arguments, *more]) == 2
        assert words in capsys.readouterr().err
        assert not out.exists()
    assert checked("mjhq", evil, tmp_path / "absent") == 2


def test_the_merged_copy_of_wise_is_passed_over(tmp_path):
    whole = published("wise", tmp_path / "data")
    (whole.parent / "merge.json").write_text(whole.read_text())
    assert [entry.name for entry in LAYOUTS["wise"].entries(whole.parent)] == ["9", "10", "11"]


def test_published_counts_are_met_and_listed(tmp_path, capsys):
    """553 prompts of GenEval make 2,212 pictures, the last one included; each with its own seed."""
    prompts = published("geneval", tmp_path / "prompts", [f"prompt {n}" for n in range(553)])
    entries = LAYOUTS["geneval"].entries(prompts)
    jobs = LAYOUTS["geneval"].jobs(entries)
    assert [len(entries), len(jobs), jobs[-1].name] == [553, 2212, "00552/samples/0003.png"]
    assert [job.seeds for job in jobs] == [(n,) for n in range(2212)]
    layouts.main(["list"])
    listed = capsys.readouterr().out
    assert all(f"{name:9} {layout.prompts or 'any':>6} prompts x {layout.n}" in listed for name, layout in LAYOUTS.items())


def test_only_a_newline_ends_a_prompt(tmp_path):
    text = "one\u2028line\x0b\n\n  \ntwo\u0085lines\r\n"
    path = tmp_path / "prompts.txt"
    path.write_bytes(text.encode())
    assert [line.prompt for line in read_lines(path)] == ["one\u2028line", "two\u0085lines"]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [line.prompt for line in read_lines(path)] == ["a\u2028b"]
