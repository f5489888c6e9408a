"""The coats for diffusers against what they cover: the same pictures, saved and loaded, watched, ended, offloaded."""

import importlib.util
import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch

# pyright: reportPrivateImportUsage=false
from diffusers import FlowMatchEulerDiscreteScheduler, LMSDiscreteScheduler, UniPCMultistepScheduler
from safetensors.torch import load_file, save_file

from data.told import ClassesTold
from model.noise import DiffusionConfig, FlowConfig, build_noising, noise
from model.store import load
from sample.diffusers_pipeline import MetaQueryPipeline, SiTPipeline, quantized_mllm
from sample.labelled import START, load_decoder
from sample.pipeline import Asked, Pipeline
from sample.settings import Drawing, Guidance
from tests import releases, tiny
from tests.test_repae import FP32
from tests.tiny_repae import build, repae_run
from train.ranks import start

PROMPTS, SEEDS, STEPS = ["a red circle", "two blue stars"], [3, 4], 3


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return releases.release(tmp_path_factory.mktemp("pipe"), noise=FlowConfig(shift=2.0))


@pytest.fixture(scope="module")
def saved(release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "diffusers"
    MetaQueryPipeline.from_release(release).save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(saved):
    return quiet(MetaQueryPipeline.from_pretrained(saved))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawn(pipe, prompt=PROMPTS, seeds=SEEDS, **changes):
    """Pixels [B, 3, H, W] in [0, 1]."""
    settings = {"num_inference_steps": STEPS, "output_type": "pt"} | changes
    return pipe(prompt, generator=seeded(*seeds), **settings).images


def ours(release, asked=PROMPTS, drawing=Drawing(STEPS)):
    return Pipeline(load(release)).draw(asked, SEEDS, drawing) / 2 + 0.5


def test_saved_and_loaded_it_draws_what_our_pipeline_draws_bit_for_bit(release, saved, pipe):
    expected = ours(release)
    assert expected.std() > 0.01
    assert torch.equal(drawn(pipe), expected)
    assert torch.equal(drawn(quiet(MetaQueryPipeline.from_release(release))), expected)
    pictures = pipe(PROMPTS, generator=seeded(*SEEDS), num_inference_steps=STEPS).images
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in Pipeline(load(release))(PROMPTS, SEEDS, Drawing(STEPS))]
    assert json.loads((saved / "model_index.json").read_text())["connector"] == ["model.components", "ConnectorModel"]


def test_every_setting_reaches_the_drawing(release, pipe):
    image = tiny.image()
    changed = Drawing(STEPS, Guidance(2.0, 1.5, 0.2, 0.9, 0.5), "a star", "dpm++", 8, 24)
    expected = ours(release, [Asked(prompt, (image,)) for prompt in PROMPTS], changed)
    settings = dict(guidance_scale=2.0, image_guidance_scale=1.5, guidance_interval=(0.2, 0.9), guidance_rescale=0.5)
    assert torch.equal(drawn(pipe, image=image, negative_prompt="a star", height=8, width=24, **settings), expected)
    assert expected.shape == (2, 3, 8, 24)


def test_a_list_of_generators_makes_each_picture_its_own(pipe):
    together = drawn(pipe)
    for row, prompt, seed in zip(together, PROMPTS, SEEDS, strict=True):
        assert (drawn(pipe, prompt, [seed])[0] - row).abs().max() < 1e-5
    one = pipe("a star", num_images_per_prompt=2, generator=seeded(1)[0], num_inference_steps=1, output_type="pt").images
    assert not torch.equal(one[0], one[1])


def test_each_prompt_is_read_once_for_all_pictures_and_branches(pipe):
    pipe("a red circle", num_images_per_prompt=3, num_inference_steps=1)
    mllm = pipe._painter().model.mllm
    assert mllm.prefills == 2  # and nothing, for guidance
    pipe("a red circle", num_images_per_prompt=2, num_inference_steps=2, guidance_scale=5.0)
    assert mllm.prefills == 2
    pipe("a red circle", image=tiny.image(), image_guidance_scale=1.5, num_inference_steps=1)
    assert mllm.prefills == 4


def test_pictures_to_start_from_go_to_their_prompts(release, pipe):
    first, second = tiny.image(), tiny.image((24, 16), 1)
    expected = ours(release, [Asked(PROMPTS[0], (first, second)), Asked(PROMPTS[1])])
    assert torch.equal(drawn(pipe, image=[[first, second], []]), expected)
    both = drawn(pipe, PROMPTS[0], [SEEDS[0]], image=[first, second])  # one prompt: all are its own
    assert (both[0] - expected[0]).abs().max() < 1e-5


def test_every_output_is_the_same_picture(pipe):
    pt, array, latents = (drawn(pipe, output_type=kind) for kind in ("pt", "np", "latent"))
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert torch.equal(pipe._painter().decode(latents) / 2 + 0.5, pt)
    (pictures,) = pipe(PROMPTS, generator=seeded(*SEEDS), num_inference_steps=STEPS, return_dict=False)
    assert abs(np.stack([np.asarray(p) for p in pictures]) / 255 - array).max() <= 0.5 / 255 + 1e-6


def test_latents_and_embeddings_take_the_place_of_seeds_and_prompts(pipe):
    begin = torch.stack([torch.randn(4, 8, 8, generator=each) for each in seeded(*SEEDS)])
    given = pipe(
        prompt_embeds=pipe.encode_prompt(PROMPTS), latents=begin, num_inference_steps=STEPS, output_type="pt"
    ).images
    assert (given - drawn(pipe)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("scheduler", "solver"), [(UniPCMultistepScheduler, "unipc"), (FlowMatchEulerDiscreteScheduler, "euler")]
)
def test_the_schedulers_class_names_the_solver(release, pipe, scheduler, solver):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, shift=2.0)
    assert torch.equal(drawn(pipe), ours(release, drawing=Drawing(STEPS, solver=solver)))


def test_a_scheduler_with_another_schedule_is_refused(pipe):
    trained = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(trained.config)  # diffusers drops the shift in silence
    with pytest.raises(ValueError, match=r"give it shift=2\.0"):
        drawn(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(ValueError, match="the weights were trained with"):
        drawn(pipe)
    pipe.scheduler = LMSDiscreteScheduler()
    with pytest.raises(ValueError, match="LMSDiscreteScheduler names no solver"):
        drawn(pipe)


@pytest.mark.parametrize("config", [DiffusionConfig("v"), DiffusionConfig("epsilon", 500, 1e-3, 2e-2)])
def test_a_schedule_survives_its_scheduler(tmp_path, config):
    pipe = MetaQueryPipeline.of(releases.model(tmp_path, noise=config))
    pipe.save_pretrained(tmp_path / "saved")
    again = quiet(MetaQueryPipeline.from_pretrained(tmp_path / "saved"))
    assert again._noise == pipe._noise
    assert torch.equal(again._painter().model.noising.grid(4), build_noising(config).grid(4))
    assert torch.equal(drawn(again), drawn(quiet(pipe)))


def test_a_callback_sees_each_step_changes_it_and_ends_it(release, pipe):
    seen = []

    def watch(pipeline, step, time, told):
        seen.append((step, float(time), told["latents"]))
        return {"latents": told["latents"] * 0.5} if step == 0 else {}

    steered = drawn(pipe, callback_on_step_end=watch)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [time for _, time, _ in seen] == pytest.approx(build_noising(FlowConfig(shift=2.0)).grid(3)[:-1].tolist())
    assert pipe.num_timesteps == 3
    assert not torch.equal(steered, drawn(pipe))

    def stop(pipeline, step, time, told):
        seen.append(told)
        pipeline._interrupt = step == 1

    seen.clear()
    ended = drawn(pipe, callback_on_step_end=stop, output_type="latent")
    assert len(seen) == 2
    assert torch.equal(ended, seen[-1]["latents"])
    assert torch.equal(drawn(pipe), ours(release))  # the next drawing is whole again


def test_what_cannot_be_drawn_is_one_sentence(pipe):
    for changes, message in [
        (dict(output_type="jpg"), "output_type: 'jpg' is unknown"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt: 0"),
        (dict(num_inference_steps=0), "steps: 0"),
        (dict(height=9), "multiples of 4"),
        (dict(seeds=[1]), "generator: 1 for 2 pictures"),
        (dict(image=[tiny.image()]), "image: 1 entries for 2 prompts"),
        (dict(image="a.png"), "image: a str is no PIL image"),
        (dict(latents=torch.zeros(1, 4, 8, 8)), "latents: "),
        (dict(prompt=None), "prompt and prompt_embeds"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), "noise is unknown; there is latents"),
    ]:
        with pytest.raises(ValueError, match=message):
            drawn(pipe, **changes)


def test_models_that_are_kept_elsewhere_draw_the_same(release, pipe):
    """The mechanism is the same where the device is a GPU; sequential offload cannot compute on the CPU at all."""
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(drawn(pipe), ours(release))
    assert torch.equal(drawn(pipe), ours(release))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloaded_from_a_gpu_they_draw_the_same(saved, pipe, offload):
    whole = drawn(quiet(MetaQueryPipeline.from_pretrained(saved)).to("cuda")).cpu()
    getattr(pipe, offload)()
    for _ in range(2):
        assert torch.allclose(drawn(pipe).cpu(), whole, atol=1e-5)


def test_another_precision_is_taken_up(pipe):
    whole = drawn(pipe)
    half = drawn(pipe.to(torch.bfloat16))
    assert pipe.transformer.dtype == torch.bfloat16
    assert 0 < (half - whole).abs().max() < 0.3


def test_large_pictures_are_decoded_in_tiles(pipe):
    pipe.enable_vae_tiling()
    assert pipe.vae.use_tiling
    assert drawn(pipe, height=64, width=64).shape == (2, 3, 64, 64)
    pipe.disable_vae_tiling()
    assert not pipe.vae.use_tiling


@pytest.mark.parametrize("component", ["connector", "transformer", "vae", "mllm"])
def test_files_that_lack_a_weight_are_refused(saved, tmp_path, component):
    shutil.copytree(saved, tmp_path / "broken")
    (path,) = (tmp_path / "broken" / component).glob("*.safetensors")
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights"):
        MetaQueryPipeline.from_pretrained(tmp_path / "broken")


def test_pickles_other_libraries_and_foreign_code_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code"):
        MetaQueryPipeline.from_pretrained(saved, trust_remote_code=True)
    shutil.copytree(saved, tmp_path / "hostile")
    index = json.loads((saved / "model_index.json").read_text())
    (tmp_path / "hostile" / "model_index.json").write_text(json.dumps(index | {"vae": ["os", "system"]}))
    with pytest.raises(ValueError, match="vae is of 'os'"):
        MetaQueryPipeline.from_pretrained(tmp_path / "hostile")
    (tmp_path / "hostile" / "model_index.json").write_text(json.dumps(index))
    weights = tmp_path / "hostile" / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        MetaQueryPipeline.from_pretrained(tmp_path / "hostile")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="it is installed")
def test_quantising_without_its_package_is_one_sentence():
    with pytest.raises(ValueError, match="nf4 needs bitsandbytes, which is not installed"):
        quantized_mllm("nf4")


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    task = build(repae_run(folder, FP32, told=ClassesTold(classes=3), noise=FlowConfig(shift=2.0)), start(60))
    task.release(folder / "release")
    return folder / "release"


def test_a_labelled_decoder_draws_what_ours_draws(classes, tmp_path):
    SiTPipeline.from_release(classes).save_pretrained(tmp_path / "saved")
    pipe = quiet(SiTPipeline.from_pretrained(tmp_path / "saved"))
    decoder = load_decoder(classes)
    told = torch.tensor([1, 3]).view(2, 1, 1), torch.zeros(2, 1, 3)
    expected = decoder.draw(told, SEEDS, STEPS, guidance=Guidance(2.0)) / 2 + 0.5
    begin = noise(torch.tensor(SEEDS), START, decoder.latent_shape)
    settings: Any = dict(num_inference_steps=STEPS, guidance_scale=2.0, output_type="pt")
    assert torch.equal(pipe([0, 2], latents=begin, **settings).images, expected)
    both = pipe([0, None], generator=seeded(*SEEDS), **settings).images
    assert (pipe(0, generator=seeded(SEEDS[0]), **settings).images[0] - both[0]).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"latents: \(2, .* given, \(1, .* needed"):
        pipe(0, latents=begin, **settings)
    with pytest.raises(ValueError, match="class_labels: there is none"):
        pipe([], **settings)
    for label in (3, -1):
        with pytest.raises(ValueError, match="none of the 3 classes"):
            pipe(label, **settings)


def test_schedulers_of_diffusers_load_what_is_saved(saved):
    scheduler: Any = UniPCMultistepScheduler.from_pretrained(saved, subfolder="scheduler")
    assert scheduler.config.flow_shift == 2.0


def test_a_hub_id_is_fetched_with_our_parts(saved, pipe, tmp_path):
    """In the layout of the hub's cache, where diffusers' own `download` knows no library but its own."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    held = tmp_path / "models--org--world"
    shutil.copytree(saved, held / "snapshots" / commit)
    (held / "refs").mkdir()
    (held / "refs/main").write_text(commit)
    again = quiet(MetaQueryPipeline.from_pretrained("org/world", cache_dir=tmp_path, local_files_only=True))
    assert torch.equal(drawn(again), drawn(pipe))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negative_prompt": ["a star", "two"]}, "negative_prompt: one text"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, "needed"),
    ],
)
def test_what_cannot_be_drawn_is_named(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        drawn(pipe, **settings)
