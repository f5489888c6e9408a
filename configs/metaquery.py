"""MetaQuery runs: a frozen MLLM, learned queries and a connector drive a diffusion decoder.

First the embedded default, then the published models (Pan et al. 2025): Base, Large and X-Large with Sana or Stable
Diffusion 1.5, by the schedule of the paper, and `released` by that of its code. What they read is downloaded by the hub's
own tool (`hf download ID`). Their parameters, memory and cost are in docs/recipes.md, by `python -m train.plan`.
"""

from __future__ import annotations

from dataclasses import replace

from configs.world import NOISE
from data.dropout import Dropout
from data.loader import Data, World
from data.records import Task
from data.shards import Shards
from data.world.asks import Mix
from model.connector import ConnectorConfig
from model.decoder import DiffusersDecoderConfig, SiTDecoderConfig
from model.metaquery import MetaQueryConfig
from model.mllm import MLLMConfig
from model.sit import SiTConfig
from model.vae import VAEConfig
from train.config import Run
from train.ema import EmaConfig
from train.engine import EngineConfig
from train.loop import Schedule
from train.metaquery import MetaQueryTaskConfig
from train.optim import OptimConfig
from train.preview import PreviewConfig
from train.tell import TellTaskConfig


def world() -> Run:
    """The embedded default: draw scenes of the generated world.

    python -m train.run metaquery.world

    2 CPU cores, about an hour; the loss falls below that of the untrained bridge within the first hundred steps.
    """
    model = MetaQueryConfig(
        mllm=MLLMConfig("assets/world/mllm"),
        decoder=SiTDecoderConfig(path="assets/world/sit"),
        vae=VAEConfig("assets/world/tuned_vae"),
        queries=16,
        connector=ConnectorConfig(layers=2),
        noise=NOISE,  # as its SiT was trained
        trainable=("sit.embed_condition.*", "sit.condition_position"),
    )
    prompts = (
        "a red circle",
        "a blue square and a yellow star",
        "a green triangle left of a red square",
        "a large blue circle above a small green star",
    )
    return Run(
        name="world",
        task=MetaQueryTaskConfig(model, align=0.2, preview=PreviewConfig(prompts)),
        data=Data(sources=(World(),)),
        schedule=Schedule(steps=1500, batch_size=64, log_every=10, save_every=250, preview_every=500),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05, warmup_steps=100),
        ema=EmaConfig(halflife_images=5_000),
        engine=EngineConfig(zero=1, precision="bf16"),
    )


def tell() -> Run:
    """The world's bridge before it draws: its conditioning learns to be what the decoder was told in its own training.

    python -m train.run metaquery.tell

    2 CPU cores, about a quarter of an hour; the mean square error of tokens whose mean square is 1 falls to 0.02.
    """
    run = world()
    assert isinstance(run.task, MetaQueryTaskConfig)
    return replace(
        run,
        name="tell",
        task=TellTaskConfig(run.task.model, mix=CAPTIONS, preview=run.task.preview),
        schedule=replace(run.schedule, steps=2000, preview_every=0),
        optim=replace(run.optim, lr=2e-3),
    )


def tell_all() -> Run:
    """The same for all that may be asked: captions, edits of pictures, pictures once more, subjects, and dialogues.

    python -m train.run metaquery.tell_all --task.init runs/tell/release

    2 CPU cores and 12 GiB of memory, some hours: pools of 30,720 samples, each read once and learned from three times by
    the connector alone; with --engine.compile a step takes half as long, after two minutes. metrics.jsonl has the error of
    each kind; that of captions falls to a fifth in three hundred steps, once backgrounds are heard. On a GPU and 16 cores
    reading is cheap: give --task.pool 0, and the queries learn too.
    """
    run = tell()
    assert isinstance(run.task, TellTaskConfig)
    model = replace(run.task.model, connector=ConnectorConfig(layers=6, looks=True))
    return replace(
        run,
        name="tell_all",
        task=replace(run.task, model=model, mix=MIX, pool=30720, passes=3, legible=1.0, layout=True, ground=6.0),
        data=replace(run.data, dropout=Dropout(text=0.05, image=0.0, both=0.02), workers=2),
        schedule=replace(run.schedule, steps=9000, batch_size=128, log_every=20),
        optim=replace(run.optim, lr=8e-4, floor=0.02),
        ema=EmaConfig(halflife_images=15_000),
    )


def demo() -> Run:
    """What `make demo` trains after a short `tell`: the embedded default, for a few minutes.

    python -m train.run metaquery.demo

    2 CPU cores, about a minute; at a low learning rate, because what was told is soon forgotten.
    """
    run = world()
    return replace(
        run,
        name="demo",
        schedule=Schedule(steps=40, batch_size=64, log_every=5, save_every=20),
        optim=replace(run.optim, lr=2e-4, warmup_steps=5),
        ema=EmaConfig(halflife_images=1_000),
    )


def emoji() -> Run:
    """Real pictures with real captions: about 1,300 emoji, written as shards by

    python -m data.write emoji --font NotoColorEmoji.ttf --out shards/emoji
    python -m train.run metaquery.emoji

    2 CPU cores, some hours; it learns the colours and outlines of the pictures it has seen.
    """
    run = world()
    assert isinstance(run.task, MetaQueryTaskConfig)
    prompts = ("grinning face", "red apple", "blue heart", "snowman", "soccer ball", "cat face")
    model = replace(run.task.model, trainable=("*",))  # the world's SiT has never seen such pictures
    return replace(
        run,
        name="emoji",
        task=replace(run.task, model=model, align=0.0, preview=PreviewConfig(prompts)),
        data=Data(sources=(Shards("shards/emoji/*.tar"),)),
        schedule=replace(run.schedule, steps=4000, save_every=500, preview_every=1000),
    )


def tiny() -> Run:
    """A few steps with a fresh decoder of two layers, in float32: does the machine train at all?

    python -m train.run metaquery.tiny

    1 CPU core, seconds; the loss starts near 2 (unit-variance noise minus unit-variance data).
    """
    sit = SiTConfig(
        latent_channels=4,
        latent_size=16,
        patch=4,
        width=48,
        depth=2,
        heads=3,
        condition_width=48,
        condition_tokens=16,
        align_depth=1,
    )
    model = MetaQueryConfig(
        mllm=MLLMConfig("assets/world/mllm", dtype="float32"),
        decoder=SiTDecoderConfig(sit=sit),
        vae=VAEConfig("assets/world/vae"),
        queries=4,
        connector=ConnectorConfig(layers=1),
        trainable=("*",),
    )
    return Run(
        name="tiny",
        task=MetaQueryTaskConfig(model, preview=PreviewConfig(("a red circle",), steps=2)),
        schedule=Schedule(steps=6, batch_size=8, log_every=1, save_every=3),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        ema=EmaConfig(halflife_images=16),
        engine=EngineConfig(zero=1, precision="fp32"),
    )


CAPTIONS = Mix(caption=1.0, edit=0.0, reconstruct=0.0, subject=0.0)
MIX = Mix(caption=0.18, edit=0.24, swap=0.15, passing=0.07, reconstruct=0.05, subject=0.06)
"""Drawn evenly, swaps were 5 % of all, and 19 % of them came right; by 12 % of captions, backgrounds were not learned."""
BASE = MLLMConfig("llava-hf/llava-onevision-qwen2-0.5b-ov-hf")
LARGE = MLLMConfig("Qwen/Qwen2.5-VL-3B-Instruct", min_pixels=256 * 28**2, max_pixels=1280 * 28**2)
XLARGE = MLLMConfig("Qwen/Qwen2.5-VL-7B-Instruct", min_pixels=256 * 28**2, max_pixels=1280 * 28**2)
SANA = "Efficient-Large-Model/Sana_1600M_512px_diffusers"
SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PAIRS, CC12M, INSTRUCT, OMNIEDIT = 25_000_000, 10_968_539, 2_400_000, 1_200_000  # samples of the sets that are named so
PAPER = OptimConfig(lr=1e-4, weight_decay=0.1, warmup_steps=4000, floor=0.1)
NODE = 8  # GPUs: the released batch sizes are those of one; on more of them, lower schedule.accumulation


def base_sana() -> Run:
    """Base: LLaVA-OneVision 0.5B, Sana 1.6B trained whole; 8 epochs of 25 million pairs in batches of 4096.

    torchrun --nproc-per-node 8 -m train.run metaquery.base_sana
    """
    return _paper("base_sana", _sana(BASE), per_gpu=64)


def large_sana() -> Run:
    """Large: Qwen2.5-VL 3B, Sana 1.6B trained whole.

    torchrun --nproc-per-node 8 -m train.run metaquery.large_sana
    """
    return _paper("large_sana", _sana(LARGE), per_gpu=32)


def xlarge_sana() -> Run:
    """X-Large: Qwen2.5-VL 7B, Sana 1.6B trained whole.

    torchrun --nproc-per-node 8 -m train.run metaquery.xlarge_sana
    """
    return _paper("xlarge_sana", _sana(XLARGE), per_gpu=8)


def base_sd() -> Run:
    """Base with Stable Diffusion 1.5 frozen: queries and connector alone learn.

    torchrun --nproc-per-node 8 -m train.run metaquery.base_sd
    """
    return _paper("base_sd", _sd(BASE), per_gpu=128)


def large_sd() -> Run:
    """Large with Stable Diffusion 1.5 frozen.

    torchrun --nproc-per-node 8 -m train.run metaquery.large_sd
    """
    return _paper("large_sd", _sd(LARGE), per_gpu=64)


def xlarge_sd() -> Run:
    """X-Large with Stable Diffusion 1.5 frozen.

    torchrun --nproc-per-node 8 -m train.run metaquery.xlarge_sd
    """
    return _paper("xlarge_sd", _sd(XLARGE), per_gpu=16)


def base_sana_released() -> Run:
    """Base by the released settings: 10 epochs of CC12M, 64 pictures a GPU.

    torchrun --nproc-per-node 8 -m train.run metaquery.base_sana_released
    """
    return _released(base_sana(), "t2i", CC12M, epochs=10, per_gpu=64)


def large_sana_released() -> Run:
    """Large by the released settings: 32 pictures a GPU.

    torchrun --nproc-per-node 8 -m train.run metaquery.large_sana_released
    """
    return _released(large_sana(), "t2i", CC12M, epochs=10, per_gpu=32)


def xlarge_sana_released() -> Run:
    """X-Large by the released settings: 8 pictures a GPU, half the learning rate.

    torchrun --nproc-per-node 8 -m train.run metaquery.xlarge_sana_released
    """
    return _released(xlarge_sana(), "t2i", CC12M, epochs=10, per_gpu=8, lr=5e-5, floor=0.02)


def base_sd_released() -> Run:
    """Base with Stable Diffusion by the released settings: 128 pictures a GPU.

    torchrun --nproc-per-node 8 -m train.run metaquery.base_sd_released
    """
    return _released(base_sd(), "t2i", CC12M, epochs=10, per_gpu=128)


def large_sd_released() -> Run:
    """Large with Stable Diffusion by the released settings, in which the queries do learn: 64 pictures a GPU.

    torchrun --nproc-per-node 8 -m train.run metaquery.large_sd_released
    """
    return _released(large_sd(), "t2i", CC12M, epochs=10, per_gpu=64)


def xlarge_sd_released() -> Run:
    """X-Large with Stable Diffusion by the released settings, in which the queries do learn: 16 pictures a GPU.

    torchrun --nproc-per-node 8 -m train.run metaquery.xlarge_sd_released
    """
    return _released(xlarge_sd(), "t2i", CC12M, epochs=10, per_gpu=16)


def base_sana_instruct() -> Run:
    """Instruction tuning on `base_sana`: pictures and an instruction to a picture, 3 epochs in batches of 2048. What is
    drawn may keep the subject of the pictures: this is the subject-driven stage too. The paper's warm-up of 4,000 steps
    would outlast its 3,515; here it is the same share of them as in pre-training.

    torchrun --nproc-per-node 8 -m train.run metaquery.base_sana_instruct --task.init runs/base_sana/release
    """
    run = _stage(base_sana(), "base_sana_instruct", "instruct", INSTRUCT, epochs=3, batch_size=2048, per_gpu=16)
    return replace(run, optim=replace(PAPER, warmup_steps=300))


def base_sana_instruct_released() -> Run:
    """The same by the released settings: 10 epochs, 16 pictures a GPU.

    torchrun --nproc-per-node 8 -m train.run metaquery.base_sana_instruct_released --task.init runs/base_sana/release
    """
    return _released(base_sana(), "instruct", INSTRUCT, epochs=10, per_gpu=16, lr=5e-5, floor=0.02, warmup_steps=2000)


def large_sana_instruct_released() -> Run:
    """Instruction tuning on `large_sana` by the released settings: one picture a GPU.

    torchrun --nproc-per-node 8 -m train.run metaquery.large_sana_instruct_released --task.init runs/large_sana/release
    """
    return _released(large_sana(), "instruct", INSTRUCT, epochs=10, per_gpu=1, warmup_steps=2000)


def base_sana_edit() -> Run:
    """Editing on `base_sana`: 1,000 steps. The instruction is dropped as well as the picture, so that both branches of
    guidance are trained (the official stage never drops it). A source of 512 x 512 pixels is read in 3,699 tokens;
    --task.model.mllm.max-pixels 147456 (384 x 384) makes them about 1,460, as the official code crops it.

    torchrun --nproc-per-node 8 -m train.run metaquery.base_sana_edit --task.init runs/base_sana/release
    """
    run = _stage(base_sana(), "base_sana_edit", "edit", OMNIEDIT, epochs=1, batch_size=2048, per_gpu=32)
    return replace(run, schedule=replace(run.schedule, steps=1000), optim=replace(PAPER, warmup_steps=100))


def base_sana_edit_released() -> Run:
    """Editing by the released settings: 5 epochs, 32 pictures a GPU.

    torchrun --nproc-per-node 8 -m train.run metaquery.base_sana_edit_released --task.init runs/base_sana/release
    """
    return _released(base_sana(), "edit", OMNIEDIT, epochs=5, per_gpu=32)


def base_sana_reconstruct() -> Run:
    """Reconstruction on `base_sana`: a picture is drawn from itself, without words.

    torchrun --nproc-per-node 8 -m train.run metaquery.base_sana_reconstruct --task.init runs/base_sana/release
    """
    run = _stage(base_sana(), "base_sana_reconstruct", "i2i", CC12M, epochs=1, batch_size=2048, per_gpu=32)
    return replace(run, optim=replace(PAPER, warmup_steps=1000))


def _sana(mllm: MLLMConfig) -> MetaQueryConfig:
    decoder = DiffusersDecoderConfig(SANA, dtype="bfloat16", activation_checkpointing=True)
    return _published(mllm, decoder, queries=256, trainable=("*",))


def _sd(mllm: MLLMConfig) -> MetaQueryConfig:
    decoder = DiffusersDecoderConfig(SD, dtype="bfloat16", activation_checkpointing=True)
    return _published(mllm, decoder, queries=77, trainable=())


def _published(
    mllm: MLLMConfig, decoder: DiffusersDecoderConfig, queries: int, trainable: tuple[str, ...]
) -> MetaQueryConfig:
    return MetaQueryConfig(
        mllm=mllm,
        decoder=decoder,
        vae=VAEConfig(decoder.path, dtype="bfloat16"),
        queries=queries,
        connector=ConnectorConfig(layers=24, activation_checkpointing=True),
        trainable=trainable,
    )


def _paper(name: str, model: MetaQueryConfig, per_gpu: int) -> Run:
    """Pre-training as the paper has it: 25 million pairs 8 times, 4096 at a time, on a node in portions of `per_gpu`."""
    prompts = ("a red circle left of a blue square", "a cat that reads a newspaper", "the word HELLO on a wall")
    run = Run(
        name=name,
        task=MetaQueryTaskConfig(model, preview=PreviewConfig(prompts)),
        optim=PAPER,
        ema=EmaConfig(halflife_images=500_000),
        engine=EngineConfig(zero=1, precision="bf16", clip_norm=0.5),
    )
    return _stage(run, name, "t2i", PAIRS, epochs=8, batch_size=4096, per_gpu=per_gpu)


DROPOUT: dict[Task, Dropout] = {
    "t2i": Dropout(text=0.1),
    "i2i": Dropout(text=0.0, image=0.1),
    "edit": Dropout(text=0.05, image=0.05, both=0.05),
    "instruct": Dropout(text=0.1, image=0.1, both=0.1),
}


def _stage(run: Run, name: str, task: Task, samples: int, epochs: int, batch_size: int, per_gpu: int) -> Run:
    """`run` on the shards of a task, so many epochs of so many samples."""
    return replace(
        run,
        name=name,
        data=Data(sources=(Shards(f"shards/{task}/*.tar"),), task=task, image_size=512, dropout=DROPOUT[task], workers=8),
        schedule=Schedule(
            steps=samples * epochs // batch_size,
            batch_size=batch_size,
            accumulation=batch_size // (NODE * per_gpu),
            save_every=1000,
        ),
    )


def _released(
    run: Run,
    task: Task,
    samples: int,
    epochs: int,
    per_gpu: int,
    lr: float = 1e-4,
    floor: float = 0.1,
    warmup_steps: int = 5000,
) -> Run:
    """`run` by the settings of the released code, on one node of 8 GPUs (it does not say how many there were).

    What stays ours: the noise schedule is the decoder's own, while the released code trains Sana at shift 1 and draws at 3;
    an edit's words are dropped as well as its pictures; latents are the posterior's mean; a release holds the averages."""
    name = f"{run.name}_released" if task == "t2i" else f"{run.name}_{task}_released"
    staged = _stage(run, name, task, samples, epochs, per_gpu * NODE, per_gpu)
    return replace(staged, optim=replace(PAPER, lr=lr, floor=floor, warmup_steps=warmup_steps))
