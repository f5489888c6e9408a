import pytest
import torch
from PIL import Image

import sample.pipeline
from data.transforms import to_pil
from model.noise import DiffusionConfig, FlowConfig
from model.store import load
from sample.pipeline import Asked, Pipeline
from sample.settings import Drawing, Guidance
from tests import releases, tiny

PROMPTS = ["a red circle", "", "two blue stars left of a small yellow square", "a red circle"]
SEEDS = [3, 4, 5, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return releases.release(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture
def pipeline(model):
    model.mllm.prefills = 0
    return Pipeline(model)


def test_a_picture_has_the_releases_size_and_range(pipeline):
    drawn = pipeline.draw(PROMPTS, SEEDS, Drawing(3))
    assert drawn.shape == (4, 3, 16, 16)
    assert drawn.abs().max() <= 1
    pictures = pipeline(PROMPTS, SEEDS, Drawing(3))
    assert [p.tobytes() for p in pictures] == [to_pil(pixels).tobytes() for pixels in drawn]


def test_prompt_and_seed_both_matter(pipeline):
    first, other_prompt, other_seed = pipeline.draw(["a red circle", "a star", "a red circle"], [1, 1, 2], Drawing(3))
    assert (first - other_prompt).abs().max() > 0.01
    assert (first - other_seed).abs().max() > 0.01


@pytest.mark.parametrize("solver", ["dpm++", "unipc", "euler", "heun", "euler_maruyama"])
def test_batched_equals_single(model, solver):
    """A picture is a function of its prompt and seed: neighbours of any length change it by rounding at most."""
    drawing = Drawing(4, solver=solver)
    batched = Pipeline(model).draw(PROMPTS, SEEDS, drawing)
    alone = Pipeline(model)
    for row, prompt, seed in zip(batched, PROMPTS, SEEDS, strict=True):
        single = alone.draw([prompt], [seed], drawing)[0]
        assert (row - single).abs().max() < 1e-5


def test_batched_equals_single_with_images_of_different_numbers_and_sizes(pipeline):
    images = [[tiny.image()], [], [tiny.image((24, 16), 1), tiny.image((16, 32), 2)], [tiny.image(seed=3)]]
    asked = [Asked(prompt, tuple(sources)) for prompt, sources in zip(PROMPTS, images, strict=True)]
    drawing = Drawing(4, Guidance(text=3.0, image=1.5))
    batched = pipeline.draw(asked, SEEDS, drawing)
    for row, each, seed in zip(batched, asked, SEEDS, strict=True):
        single = pipeline.draw([each], [seed], drawing)[0]
        assert (row - single).abs().max() < 1e-5
    without = pipeline.draw(PROMPTS, SEEDS, Drawing(4))
    assert (batched - without).abs().amax((1, 2, 3))[0] > 1e-3


def test_each_distinct_prompt_is_read_once(pipeline):
    """Three distinct prompts (the empty one is also the null branch) for seven pictures, however often drawn."""
    mllm = pipeline.model.mllm
    pipeline.draw(PROMPTS + PROMPTS[:3], range(7), Drawing(2))
    assert mllm.prefills == 3
    pipeline.draw(PROMPTS, range(4), Drawing(2, Guidance(5.0)))
    assert mllm.prefills == 3


def test_images_cost_one_reading_for_each_branch(pipeline):
    asked = [Asked("a red circle", (tiny.image(),))] * 4
    pipeline.draw(asked, range(4), Drawing(2, Guidance(text=3.0, image=1.5)))
    assert pipeline.model.mllm.prefills == 3  # nothing; images only; images and text


def test_guidance_of_one_reads_and_runs_no_null_branch(pipeline):
    rows = []
    with pipeline.model.decoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0]))):
        pipeline.draw(["a red circle"] * 2, [0, 1], Drawing(2, Guidance(1.0)))
        assert pipeline.model.mllm.prefills == 1
        assert rows == [2, 2]
        pipeline.draw(["a red circle"] * 2, [0, 1], Drawing(2, Guidance(2.0)))
        assert pipeline.model.mllm.prefills == 2
        assert rows == [2, 2, 4, 4]


def test_a_negative_prompt_takes_the_empty_ones_place(pipeline):
    plain, steered, explicit = (
        pipeline.draw(["a star"], [0], Drawing(3, negative=negative)) for negative in ("", "a red circle", "")
    )
    assert torch.equal(plain, explicit)
    assert (plain - steered).abs().max() > 1e-3


def test_the_oldest_conditions_are_forgotten(pipeline, monkeypatch):
    """However many are asked for at once, each is read once; between calls only the latest stay."""
    monkeypatch.setattr(sample.pipeline, "REMEMBERED", 2)
    prompts = ["a star", "a red star", "a blue star", "a green star"]
    pipeline.draw(["a green star", *prompts], [0, *SEEDS], Drawing(1, Guidance(1.0)))
    assert pipeline.model.mllm.prefills == 4
    pipeline.draw(prompts[2:], SEEDS[2:], Drawing(1, Guidance(1.0)))
    assert pipeline.model.mllm.prefills == 4
    pipeline.draw(prompts[:1], SEEDS[:1], Drawing(1, Guidance(1.0)))
    assert pipeline.model.mllm.prefills == 5


def test_the_release_draws_what_the_model_draws(tmp_path):
    model = releases.model(tmp_path)
    made = Pipeline(model)
    again = Pipeline(load(releases.release(tmp_path)))
    assert torch.equal(made.draw(PROMPTS, SEEDS, Drawing(3)), again.draw(PROMPTS, SEEDS, Drawing(3)))
    assert made.fingerprint == again.fingerprint


@pytest.mark.parametrize("changes", [{"noise": DiffusionConfig("v")}, {"noise": FlowConfig(shift=3.0)}, {"read": "prompt"}])
def test_every_kind_of_bridge_draws(tmp_path, changes):
    drawn = Pipeline(releases.model(tmp_path, **changes)).draw(PROMPTS, SEEDS, Drawing(3))
    assert drawn.isfinite().all()
    assert drawn.std() > 0


def test_what_cannot_be_drawn_is_refused(pipeline):
    for arguments in (([], []), (["a"], [])):
        with pytest.raises(ValueError, match="as many seeds"):
            pipeline.draw(*arguments)
    with pytest.raises(ValueError, match="limit is 256"):
        pipeline.check(["a red circle", "star " * 300])
    with pytest.raises(ValueError, match="steps: 0"):
        pipeline(["a"], [0], Drawing(0))


def test_no_release_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no release"):
        Pipeline.from_release(tmp_path)


def test_pictures_with_other_modes_are_read_as_rgb(pipeline):
    grey = Image.new("L", (16, 16), 90)
    drawn = [pipeline.draw([Asked("a star", (image,))], [0], Drawing(2)) for image in (grey, grey.convert("RGB"))]
    assert torch.equal(*drawn)


def test_a_condition_draws_what_its_prompt_draws(pipeline):
    """What was read elsewhere is not read again, and draws the same beside prompts."""
    model = pipeline.model
    condition = model.condition(model.mllm.builder.draw(["a red circle"]))
    given, read = pipeline.draw([Asked(condition=condition), "a red circle"], [3, 3], Drawing(3))
    assert (given - read).abs().max() < 1e-5


def test_who_watches_sees_each_step_and_can_end_it(pipeline):
    seen = []
    drawn = pipeline.draw(["a star"], [0], Drawing(4), seen.append)
    assert [progress.call for progress in seen] == [1, 2, 3, 4]
    assert [float(progress.time) for progress in seen] == pytest.approx(pipeline.model.noising.grid(4)[:-1].tolist())
    assert torch.allclose(pipeline.decode(seen[-1].latents), drawn, atol=1e-5)  # the last step ends at its data

    def refuse(progress):
        if progress.call == 2:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError):
        pipeline.draw(["a star"], [0], Drawing(4), refuse)
