import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from data.transforms import to_tensor
from data.world.captions import holds
from data.world.questions import Question
from data.world.render import render
from data.world.scene import HELD_OUT_PAIRS
from model.store import load
from sample import evaluate
from sample.cli import run
from sample.drawn import save
from sample.fidelity import psnr, ssim
from sample.image_scores import check_alike, pictures_in
from sample.measures import interval_of, read_json, read_protocol, value_of
from sample.pipeline import Pipeline
from sample.report import CONTROLS
from sample.session import Session
from sample.settings import Drawing
from sample.world_answers import Exam, answers, best_guess, exams, understanding, wording
from sample.world_drawing import drawing, judge
from sample.world_suite import ASKED_OF, CATEGORIES, chance, suite
from tests import releases, tiny


@pytest.mark.parametrize("split", ASKED_OF)
def test_the_suite_is_a_function_of_its_arguments(split):
    asked = suite(0, split, 12)
    assert suite(0, split, 12) == asked != suite(1, split, 12)
    assert [a.category for a in asked] == [category for category in ASKED_OF[split] for _ in range(12)]
    fewer = suite(0, split, 5)
    assert [a for a in asked if a in fewer] == fewer


@pytest.mark.parametrize("split", ASKED_OF)
def test_a_clean_picture_of_the_prompts_own_scene_is_right(split):
    asked = suite(0, split, 20)
    assert all(holds(one.claim, one.scene) for one in asked)
    judged = judge(asked, [Image.fromarray(render(one.scene)) for one in asked])
    assert all(one.right for one in judged)


def test_prompts_say_what_their_category_judges():
    for one in suite(0, "val", 30):
        colours = {g.colour for g in one.claim.groups}
        kinds = {(t.colour, t.shape) for t in one.scene.objects}
        assert not kinds & HELD_OUT_PAIRS
        if one.category in ("binding", "position"):
            assert len(one.claim.groups) == 2
            assert len(colours) == 2
            assert (one.claim.link is None) == (one.category == "binding")
        elif one.category == "count":
            assert 2 <= one.claim.groups[0].count <= 4
            assert colours == {None}
        else:
            assert len(one.scene.objects) == 1
    assert {a.claim.groups[0].count for a in suite(0, "counts", 5)} == {5}
    for one in suite(0, "pairs", 10):
        assert {(t.colour, t.shape) for t in one.scene.objects} & HELD_OUT_PAIRS


@pytest.mark.parametrize("category", CATEGORIES)
def test_each_category_sees_its_own_mistake(category):
    """The right picture of another prompt of the category is wrong, but for what it shares by chance."""
    asked = [a for a in suite(0, "val", 39) if a.category == category]
    pictures = [Image.fromarray(render(one.scene)) for one in asked]
    swapped = sum(one.right for one in judge(asked, pictures[1:] + pictures[:1]))
    assert swapped <= {"count": 0, "colour": 15, "shape": 15}.get(category, 5)


def test_chance_is_what_random_scenes_earn():
    """By counting: a scene has one to four objects equally often, so a number of two to four is right one time in four."""
    asked = [a for a in suite(0, "val", 30) if a.category == "count"]
    assert chance(asked, seed=0) == pytest.approx(0.25, abs=0.05)
    assert chance([a for a in suite(0, "val", 30) if a.category == "binding"], seed=0) < 0.01


def test_scores_of_a_perfect_and_of_a_blind_drawer():
    asked = suite(0, "val", 6)
    truth = {one.text: Image.fromarray(render(one.scene)) for one in asked}
    truth[""] = truth[asked[0].text]
    seeds = []

    def perfect(prompts, numbers):
        seeds.extend(numbers)
        return [truth[prompt] for prompt in prompts]

    measures, judged = drawing(perfect, asked, "generation", seed=5, batch_size=4)
    assert all(measures[f"generation.{category}"].value == 1 for category in CATEGORIES)
    assert len(judged) == 36
    assert seeds == list(range(5, 5 + 36 + 6))
    assert measures["generation.empty.binding"].value == 0
    assert measures["generation.chance.count"].low is None


def test_the_guess_without_the_picture_is_the_best_constant():
    yes, no = (Question("existence", f"Is there a {c} star?", a, ("yes", "no")) for c, a in (("red", "yes"), ("blue", "no")))
    larger = [
        Question("comparison", f"Which is larger, the {a} or the {b}?", w, (a, b))
        for a, b, w in [
            ("red star", "blue star", "blue star"),
            ("pink cross", "cyan cross", "cyan cross"),
            ("red cross", "red star", "red cross"),
        ]
    ]
    assert best_guess([yes, yes, no, *larger]) == [True, True, False, True, True, False]
    assert wording("Is the red star left of the blue cross?") == wording("Is the pink square above the green circle?")
    assert (
        wording("How many crosses are there?")
        == wording("How many stars are there?")
        != wording("How many objects are there?")
    )


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return releases.release(tmp_path_factory.mktemp("evaluate"), pixels=48)


@pytest.fixture(scope="module")
def mllm(release):
    return load(release).mllm


def test_batched_answers_equal_single_replies(mllm):
    asked = exams(0, "val", 2, size=16)
    one_by_one = [answers(mllm, [exam], 1)[0] for exam in asked]
    assert answers(mllm, asked, 5) == one_by_one


def test_understanding_counts_right_answers_by_kind(mllm):
    """Questions whose wanted answer is what the model says anyway: all right with the picture."""
    asked = exams(0, "val", 2, size=16)
    said = answers(mllm, asked, 8)
    told = [
        Exam(Question(e.question.kind, e.question.text, answer, (answer, "other")), e.picture)
        for e, answer in zip(asked, said, strict=True)
    ]
    measures = understanding(mllm, told, 8)
    kinds = {e.question.kind for e in told}
    assert {f"understanding.{kind}" for kind in [*kinds, "all"]} <= set(measures)
    assert all(measures[f"understanding.{kind}"].value == 1 for kind in kinds)
    assert sum(measures[f"understanding.{kind}"].n for kind in kinds) == measures["understanding.all"].n == len(told)
    blank = answers(mllm, [Exam(e.question, Image.new("RGB", (16, 16), (128, 128, 128))) for e in told], 8)
    expected = np.mean([a == b for a, b in zip(blank, said, strict=True)])
    assert measures["understanding.blank.all"].value == pytest.approx(expected)


def test_the_command_prints_writes_and_repeats_itself(release, tmp_path, capsys):
    def once(name):
        arguments = f"world --release {release} --split val pairs --n 1 --images 1 --steps 1 --json {tmp_path / name}"
        arguments += f" --html {tmp_path / 'page.html'}"
        assert run(evaluate.main, [*arguments.split(), "--grid", str(tmp_path / "grid.png")]) == 0
        return read_json(tmp_path / name)

    measures = once("a.json")
    assert measures == once("b.json")
    assert {f"generation.{category}" for category in CATEGORIES} <= set(measures)
    assert {f"generation.pairs.{category}" for category in ASKED_OF["pairs"]} <= set(measures)
    assert {"generation.empty.colour", "generation.chance.colour", "understanding.all"} <= set(measures)
    assert set(json.loads((tmp_path / "a.json").read_text())["generation.colour"]) == {
        "value",
        "low",
        "high",
        "n",
        "unit",
    }
    assert "generation.colour" in capsys.readouterr().out
    with Image.open(tmp_path / "grid.png") as grid:
        assert 128 < grid.width < 2 * 128
        assert grid.height > 11 * 128
    told = read_protocol(tmp_path / "a.json")
    assert told == read_protocol(tmp_path / "b.json")
    model = load(release)
    assert told["sha256"]["release"] == Pipeline(model).fingerprint
    assert told["sha256"]["mllm"] == model.mllm.fingerprint()
    assert (told["settings"]["seed"], told["settings"]["drawing"]["steps"]) == (0, 1)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img ") == page.count("data:image/png;base64,") == len(CATEGORIES) + len(ASKED_OF["pairs"])
    assert not re.search(r"<script|https?://|<link", page)
    assert all(sha256 in page for sha256 in told["sha256"].values())
    assert all(value_of(m) in page for m in measures.values())
    assert all(interval_of(m) in page for name, m in measures.items() if not CONTROLS & {*name.split(".")})
    drawn = Pipeline(model)([suite(0, "val", 1)[0].text], [0], Drawing(steps=1))[0]
    assert np.abs(pictures(tmp_path / "page.html")[0] - np.asarray(drawn)).max() <= 1


def pictures(page):
    """The pictures [N, H, W, 3] of an HTML page."""
    encoded = [each.split('"')[0] for each in page.read_text().split("data:image/png;base64,")[1:]]
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in encoded]).astype(int)


def test_drawings_may_be_planned_first(tmp_path):
    """Of the shipped release: one of random weights plans without an end. A plan may say what the prompt alone says too, so
    that one picture may be as it is without; not all."""
    page, release = tmp_path / "page.html", "assets/world/release"
    command = f"world --release {release} --n 1 --images 0 --steps 1 --think --html {page}"
    assert run(evaluate.main, command.split()) == 0
    pipeline, texts = Pipeline.from_release(release), [asked.text for asked in suite(0, "val", 1)]
    once = Drawing(steps=1)
    planned = [Session(pipeline).draw(text, seed=seed, drawing=once, think=True) for seed, text in enumerate(texts)]
    assert np.abs(pictures(page) - np.stack([*map(np.asarray, planned)])).max() <= 1
    plain = pipeline(texts, range(len(texts)), once)
    assert np.abs(pictures(page) - np.stack([*map(np.asarray, plain)])).max() > 1


def test_mistakes_exit_with_two_and_write_nothing(release, tmp_path, capsys):
    small = releases.release(tmp_path / "small")
    out = tmp_path / "out.json"
    for words, arguments in {
        "is no release": ["--release", tmp_path],
        "above 0": ["--release", release, "--n", "0", "--images", "0"],
        "--grid shows": ["--release", release, "--n", "0", "--grid", out],
        "48": ["--release", small, "--n", "1", "--images", "0", "--steps", "1"],
    }.items():
        assert run(evaluate.main, ["world", *map(str, arguments), "--json", str(out)]) == 2
        assert words in capsys.readouterr().err
        assert not out.exists()
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["world", "--release", str(release), "--split", "test"])


def folder_of(path, seeds, size=(64, 64)):
    path.mkdir()
    for seed in seeds:
        tiny.image(size, seed).save(path / f"{seed}.png")
    return path


def test_folders_of_pictures_are_compared(tmp_path):
    """A folder lies nearer to its like than to pictures of inverted colours; what was compared how is written."""
    real, like = folder_of(tmp_path / "real", range(20)), folder_of(tmp_path / "like", range(20, 40))
    other = tmp_path / "other"
    other.mkdir()
    for path in like.iterdir():
        ImageOps.invert(Image.open(path)).save(other / path.name)
    found = {}
    for drawn in (real, like, other):
        evaluate.main(["images", "--real", str(real), "--drawn", str(drawn), "--json", str(tmp_path / "scores.json")])
        found[drawn.name] = read_json(tmp_path / "scores.json")
    assert found["real"]["images.local_frechet"].value == pytest.approx(0, abs=1e-2)
    assert found["real"]["images.local_precision"].value == 1
    assert found["like"]["images.local_frechet"].value < found["other"]["images.local_frechet"].value
    told = read_protocol(tmp_path / "scores.json")
    assert told["pictures"] == {"real": 20, "drawn": 20}
    assert told["settings"]["drawn"] == str(other)
    assert len(told["sha256"]["features"]) == 64


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    real = folder_of(tmp_path / "real", range(5))
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = folder_of(tmp_path / "broken", range(5))
    (broken / "9.png").write_bytes(b"no picture")
    asked = ["images", "--real", str(real), "--drawn"]
    for argv, message in [
        ([*asked, str(empty)], "holds no pictures"),
        ([*asked, str(broken)], "9.png: an image cannot be decoded; remove it"),
        (
            [*asked, str(real), "--inception", str(tmp_path / "none.pth")],
            "is no file; give torch-fidelity's weights",
        ),
    ]:
        assert run(evaluate.main, argv) == 2
        assert message in capsys.readouterr().err


def test_the_clip_score_is_that_of_the_stock_class(tmp_path, capsys):
    """Prompts from the pictures and from a list; batched, and each pair alone by transformers' own class and processors."""
    path, drawn = tiny_clip(tmp_path / "clip"), tmp_path / "drawn"
    prompts = ["a red circle", "a star", "a b c d e f g h i j k l m n o p"]
    for number, prompt in enumerate(prompts):
        save(drawn / f"{number}.png", tiny.image((40, 32), number), {"prompt": prompt})
    asked = f"images --drawn {drawn} --clip {path} --batch-size 2 --json {tmp_path}/a.json"
    assert run(evaluate.main, asked.split()) == 0
    stock, tokenizer = CLIPModel.from_pretrained(path).eval(), CLIPTokenizer.from_pretrained(path)
    processor = CLIPImageProcessorPil.from_pretrained(path)
    cosines = []
    for number, prompt in enumerate(prompts):
        text = tokenizer(prompt, truncation=True, max_length=12, return_tensors="pt")
        seen = processor(Image.open(drawn / f"{number}.png").convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            cosine = stock(**text, **seen).logits_per_image / stock.logit_scale.exp()  # [1, 1]
        cosines.append(float(cosine))
    found = read_json(tmp_path / "a.json")
    assert found["images.clip_score"].value == pytest.approx(np.mean([100 * max(c, 0) for c in cosines]), abs=1e-4)
    assert found["images.clip_score"].value > 0
    assert found["images.clip_cut_prompts"].value == pytest.approx(1 / 3)
    assert len(read_protocol(tmp_path / "a.json")["sha256"]["clip"]) == 64
    listed = tmp_path / "list.jsonl"
    tiny.image((40, 32)).save(drawn / "3.bmp")
    names = sorted(path.name for path in drawn.iterdir())
    listed.write_text("".join(json.dumps({"file": name, "prompt": "a star"}) + "\n" for name in names))
    assert run(evaluate.main, [*asked.split(), "--prompts", str(listed)]) == 0
    assert read_json(tmp_path / "a.json") != found
    (drawn / "3.bmp").unlink()
    assert run(evaluate.main, [*asked.split(), "--clip", str(tmp_path / "absent")]) == 2
    assert "absent' cannot be loaded" in capsys.readouterr().err
    (drawn / "plain.png").write_bytes((folder_of(tmp_path / "plain", [1]) / "1.png").read_bytes())
    for more in ([], ["--prompts", str(listed)]):
        assert run(evaluate.main, [*asked.split(), *more]) == 2
        assert "plain.png has no prompt" in capsys.readouterr().err
    assert run(evaluate.main, ["images", "--drawn", str(drawn)]) == 2
    assert "--real is missing" in capsys.readouterr().err
    assert run(evaluate.main, ["images", "--drawn", str(drawn), "--real", str(drawn), "--prompts", str(listed)]) == 2
    assert "--prompts is what a CLIP reads" in capsys.readouterr().err


def test_what_torch_fidelity_would_pass_over_or_not_batch_is_named(tmp_path):
    save(tmp_path / "a.png", tiny.image((40, 32)), {})
    save(tmp_path / "b.png", tiny.image((40, 32)), {})
    files = pictures_in(tmp_path)
    check_alike(files)
    save(tmp_path / "c.png", tiny.image((32, 32)), {})
    with pytest.raises(ValueError, match=r"a\.png has 40 x 32 and \S+c\.png has 32 x 32 pixels"):
        check_alike(pictures_in(tmp_path))
    tiny.image((40, 32)).save(tmp_path / "c.webp")
    with pytest.raises(ValueError, match=r"c\.webp would be passed over"):
        check_alike([*files, tmp_path / "c.webp"])


def tiny_clip(folder) -> str:
    """A random CLIP in the hub's layout: 12 tokens of letters, pictures of 16 pixels."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": 52, "eos_token_id": 53}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=shape | text, vision_config=shape | {"image_size": 16, "patch_size": 8}, projection_dim=16
    )
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


def test_a_vae_is_scored_on_a_folder(tmp_path):
    """Each picture alone, by two ways to one answer: the pictures that were kept, compared with one another."""
    real = folder_of(tmp_path / "real", range(6), (40, 32))
    vae = str(tiny.vae_folder(tmp_path / "vae"))
    asked = (
        f"vae --vae {vae} --pictures {real} --size 32 --batch-size 4 --keep {tmp_path}/kept --json {tmp_path}/scores.json"
    )
    evaluate.main(asked.split())
    found = read_json(tmp_path / "scores.json")
    before, after = (
        [to_tensor(Image.open(p)) for p in sorted((tmp_path / "kept" / n).iterdir())] for n in ("real", "rebuilt")
    )
    assert len(before) == len(after) == found["vae.psnr"].n == 6
    kept = psnr(torch.stack(after), torch.stack(before)).mean()
    assert found["vae.psnr"].value == pytest.approx(float(kept), abs=0.05)  # PNG files round
    assert found["vae.ssim"].value == pytest.approx(float(ssim(torch.stack(after), torch.stack(before)).mean()), abs=0.01)
    assert found["vae.local_frechet"].value > 0


def test_what_a_vae_cannot_be_asked_is_refused(tmp_path, capsys):
    vae, real = tiny.vae_folder(tmp_path / "vae"), folder_of(tmp_path / "real", range(2))
    for options, message in [
        (["--size", "33"], "--size is 33 and the VAE takes 2 pixels to a latent"),
        (["--size", "8"], "--size of at least 11"),
        (["--size", "32", "--inception", "none.pth"], "none.pth is no file"),
        (["--size", "32", "--lpips", str(tmp_path)], "lacks vgg16"),
    ]:
        assert run(evaluate.main, ["vae", "--vae", str(vae), "--pictures", str(real), *options]) == 2
        assert message in capsys.readouterr().err
