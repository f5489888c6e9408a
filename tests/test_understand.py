import itertools
import json
import os
import stat
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from configs import understand
from data.loader import Data, World
from data.shards import Shards as Tars
from data.world.conversations import Shares, conversation
from model.embedded import EmbeddedConfig, make, save
from model.files import dump_config, parse_config
from model.mllm import MLLMConfig, load, load_builder
from model.prefix import IGNORED, Turn
from model.qwen import Qwen2_5_VL
from model.vision import batch_equal_pictures
from sample.measures import read_json
from sample.world_answers import MEASURES, exams, understanding
from train.config import Run
from train.ranks import Ranks
from train.run import main
from train.talk import GroupCollate, Talk, training_text
from train.understand import Speaker, UnderstandTask, answers_of, choose_trainable

SMALL = EmbeddedConfig(
    vocabulary=400,
    width=32,
    mlp_width=48,
    layers=2,
    heads=2,
    kv_heads=1,
    vision_width=32,
    vision_mlp_width=48,
    vision_layers=2,
    vision_heads=2,
)
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fresh model whose every weight matters."""
    folder = tmp_path_factory.mktemp("understand") / "fresh"
    make(folder, SMALL, training_text(60))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15, generator=generator)
    model.save_pretrained(folder)
    return folder


def model_of(folder, dtype=torch.float32):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def talks(count, **shares):
    return [conversation(3, index, shares=Shares(**shares)) for index in range(count)]


def run_of(name, folder, out, **changes) -> Run:
    """A shipped run with a small model."""
    run = getattr(understand, name)()
    task = replace(run.task, fresh=SMALL, init=folder, text_conversations=60, exam_pictures=0, **changes.pop("task", {}))
    schedule = replace(run.schedule, steps=3, batch_size=8, log_every=1, save_every=2)
    return replace(run, out=out, task=task, schedule=schedule, **changes)


def task_of(run: Run, ranks: Ranks = ALONE) -> UnderstandTask:
    from train.ranks import start

    start(60)
    task = run.task.build(run, ranks)
    assert isinstance(task, UnderstandTask)
    return task


def parameters(folder):
    return {name: p.float() for name, p in model_of(folder, torch.bfloat16).named_parameters()}


def test_the_embedded_model_has_the_shipped_sizes(tmp_path):
    make(tmp_path / "a", EmbeddedConfig(vocabulary=600), training_text(60))
    mllm = load(MLLMConfig(str(tmp_path / "a"), dtype="float32"))
    assert isinstance(mllm, Qwen2_5_VL)
    assert sum(p.numel() for p in mllm.model.parameters()) == 5_249_728 - (1536 - 600) * 192
    prefix = mllm.builder([talks(1, read=0.0)[0]])
    assert (prefix.ids == mllm.builder.image_id).sum() == 16
    assert mllm.logits(prefix).shape == (1, prefix.ids.shape[1], 600)
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "a").iterdir()} == {0o666 & ~umask}


def test_the_same_config_makes_the_same_model_and_leaves_the_random_stream_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    for name in ("a", "b"):
        make(tmp_path / name, SMALL, training_text(60))
    assert torch.equal(torch.rand(1), expected)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    "changes", [{"width": 200, "heads": 6}, {"vision_heads": 5}, {"kv_heads": 4}, {"image_size": 60}], ids=str
)
def test_sizes_that_cannot_work_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        EmbeddedConfig(**changes)


def test_loss_and_gradients_are_those_of_transformers(folder):
    builder = load_builder(MLLMConfig(str(folder)))
    prefix, targets = builder.with_targets(talks(6, read=0.4))
    assert not prefix.mask.all()
    said = targets != IGNORED
    ours, theirs = model_of(folder), model_of(folder)
    logits, _ = Speaker(ours)(prefix, answers_of(targets)[0])
    loss = torch.nn.functional.cross_entropy(logits, targets[said])
    reference = theirs(
        input_ids=prefix.ids,
        attention_mask=prefix.mask.long(),
        **prefix.images,
        mm_token_type_ids=(prefix.ids == builder.image_id).int(),
        labels=targets,
    )
    torch.testing.assert_close(logits, reference.logits[:, :-1][said[:, 1:]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, reference.loss)
    loss.backward()
    reference.loss.backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_texts_alone_reach_every_parameter_and_change_no_prediction(folder):
    prefix, targets = load_builder(MLLMConfig(str(folder))).with_targets(talks(3, read=1.0))
    said = targets != IGNORED
    model = model_of(folder)
    logits, _ = Speaker(model)(prefix, answers_of(targets)[0])
    plain = model(input_ids=prefix.ids, attention_mask=prefix.mask, position_ids=prefix.positions).logits
    torch.testing.assert_close(logits, plain[:, :-1][said[:, 1:]])
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in model.model.visual.parameters())


def test_the_tower_learns_where_its_tokens_lie_only_when_asked(folder, tmp_path):
    """Rows and columns in the order of the visual tokens; texts alone leave head and tower where they are."""
    asked = task_of(run_of("instruct", folder, tmp_path, task={"place": 1.0}))
    assert asked.step(next(batch for batch in asked.batches(0) if batch.prefix.images))["place"] > 0
    asked.release(tmp_path / "release")
    assert parameters(tmp_path / "release").keys() == parameters(folder).keys()
    mllm = load(MLLMConfig(str(folder), dtype="float32"))
    assert isinstance(mllm, Qwen2_5_VL)
    speaker = Speaker(mllm.model.requires_grad_(True), tell_places=True)
    prefix, targets = mllm.builder.with_targets(talks(3, read=1.0))
    _, nowhere = speaker(prefix, answers_of(targets)[0])
    assert nowhere.item() == 0
    wide = mllm.builder([[Turn("user", "What is this?", (Image.new("RGB", (64, 32)),))]])
    _, off = speaker(wide, torch.arange(wide.ids.shape[1] - 1))
    rows, columns = (int(n) // 2 for n in wide.images["image_grid_thw"][0, 1:])
    assert rows < columns
    assert (wide.ids == mllm.builder.image_id).sum() == rows * columns
    off.backward()
    moved = {name for name, p in speaker.named_parameters() if p.grad is not None and p.grad.any()}
    assert "place.weight" in moved
    assert any("visual.blocks.0" in name for name in moved)
    assert not any("language_model" in name for name in moved)


def test_an_engine_that_rounds_leaves_rotary_frequencies(folder, tmp_path):
    """Rounded, they would teach the model positions that it does not have when it is loaded."""
    run = run_of("instruct", folder, tmp_path)
    speaker = task_of(replace(run, engine=replace(run.engine, precision="bf16"))).engine.module
    loaded = dict(Speaker(model_of(folder, torch.bfloat16)).named_buffers())
    assert loaded
    for name, buffer in speaker.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, loaded[name]), name
    assert {p.dtype for p in speaker.parameters()} == {torch.bfloat16}


def test_names_are_those_of_the_files(folder):
    model = model_of(folder)
    assert {name for name, _ in Speaker(model).named_parameters()} == {name for name, _ in model.named_parameters()}
    choose_trainable(model, ("model.visual.merger.*",))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("model.visual.merger.")}
    with pytest.raises(ValueError, match=r"'visual\.\*' matches no parameter"):
        choose_trainable(model, ("visual.*",))


@pytest.mark.parametrize("shares", [None, Shares(0.2, 0.2)], ids=["loader", "talk"])
def test_groups_hold_each_sample_once_and_go_on_from_any_step(folder, tmp_path, shares):
    run = run_of("instruct", folder, tmp_path, task={"shares": shares})
    task = task_of(run)
    straight = list(itertools.islice(task.batches(0), 8))
    for group in (straight[:4], straight[4:]):
        numbers = sorted(torch.cat([batch.index for batch in group]).tolist())
        assert numbers == list(range(numbers[0], numbers[0] + 32))
    for step in (1, 4, 6):
        batch = next(task.batches(8 * step))
        assert torch.equal(batch.index, straight[step].index)
        assert torch.equal(batch.targets, straight[step].targets)
        assert torch.equal(batch.prefix.ids, straight[step].prefix.ids)
    padded = sum(int((~batch.prefix.mask).sum()) for batch in straight)
    unsorted = task_of(replace(run, task=replace(run.task, group=1)))
    assert padded < 0.7 * sum(int((~batch.prefix.mask).sum()) for batch in itertools.islice(unsorted.batches(0), 8))


def test_ranks_share_a_group(folder, tmp_path):
    run = run_of("align", folder, tmp_path)
    groups = task_of(run).groups
    assert isinstance(groups, Talk)
    collate = groups._collate
    rows = [range(rank, 32, 2) for rank in range(2)]
    both = [next(iter(Talk(World(), Shares(1, 0), collate, own, run.data))) for own in rows]
    assert sorted(torch.cat([batch.index for group in both for batch in group]).tolist()) == list(range(32))


def test_long_conversations_are_cut(folder):
    from data.batch import ChatCollate
    from data.records import Conversation

    collate = GroupCollate(ChatCollate(load_builder(MLLMConfig(str(folder)))), 1, 2, 0)
    turns = [Turn("system", "draw"), *(Turn(role, "red") for role in ("user", "assistant") * 4)]
    [batch] = collate([Conversation("a", tuple(turns))], [0])
    end = collate.chat.builder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (batch.targets == end).sum() == 2
    assert (batch.prefix.ids == end).sum() == 5


def test_the_stages_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = {key: value for key, value in dump_config(SMALL).items() if value != getattr(EmbeddedConfig(), key)}
    tiny = [word for key, value in sizes.items() for word in (f"--task.fresh.{key.replace('_', '-')}", str(value))]
    few = ["--schedule.steps", "2", "--schedule.batch-size", "4", "--ema.halflife-images", "0"]
    few += ["--optim.lr", "0.01", "--optim.warmup-steps", "0"]  # far enough to be seen in bfloat16
    main(["understand.language", *tiny, *few, "--task.text-conversations", "60"])
    main(["understand.see", *few])
    main(["understand.align", *few, "--task.exam-pictures", "0"])
    main(["understand.instruct", *few, "--task.exam-pictures", "2"])
    folders = ("language/fresh", "language/release", "see/release", "align/release", "instruct/release")
    fresh, language, see, align, instruct = (parameters(f"runs/{name}") for name in folders)
    vision = "model.visual."
    for before, after, moves in ((fresh, language, "model.language_model."), (language, see, vision), (see, align, vision)):
        for name, p in before.items():
            if p.ndim > 1 or not name.startswith(moves):  # a bias may have no gradient
                assert torch.equal(p, after[name]) == (not name.startswith(moves)), name
    assert not any(torch.equal(align[name], instruct[name]) for name in align if name.endswith("proj.weight"))

    released = load(MLLMConfig("runs/instruct/release"))
    assert isinstance(released, Qwen2_5_VL)
    assert {p.dtype for p in released.model.parameters()} == {torch.bfloat16}
    measures = understanding(released, exams(0, "val", 2))
    assert read_json(tmp_path / "runs/instruct/previews/step-00000002.json") == measures
    lines = [json.loads(line) for line in (tmp_path / "runs/instruct/metrics.jsonl").read_text().splitlines()]
    [line] = [line for line in lines if line.get("event") == "preview"]
    assert {"understanding.colour", "understanding.blank.colour"} <= line.keys()
    assert line.keys() - {"step", "event"} <= set(MEASURES)
    capsys.readouterr()


def test_a_release_says_what_the_trained_model_says(folder, tmp_path):
    task = task_of(run_of("instruct", folder, tmp_path, ema=replace(understand.language().ema, halflife_images=0)))
    batches = task.batches(0)
    task.step(next(batches))
    scalars = task.step(next(batches))
    assert 0 < float(scalars["loss"]) < 20
    task.release(tmp_path / "release")
    batch = next(batches)
    before, _ = answers_of(batch.targets)
    with torch.no_grad():
        trained = task.engine(batch.prefix, before)[0]
        model = model_of(tmp_path / "release", torch.bfloat16)
        batch_equal_pictures(model.model.visual)  # as the task does: one sum in another order is no longer bit-equal
        released = Speaker(model)(batch.prefix, before)[0]
    assert torch.equal(trained, released)


def test_saving_takes_everything_but_the_weights_along(folder, tmp_path):
    save(tmp_path / "release", model_of(folder), folder)
    assert {file.name for file in (tmp_path / "release").iterdir()} == {file.name for file in folder.iterdir()}
    for name in ("tokenizer.model", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "release" / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((tmp_path / "release" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "eager" not in json.dumps(config)


@pytest.mark.parametrize("name", ["language", "align", "instruct"])
def test_shipped_runs_survive_json(name, tmp_path):
    run = getattr(understand, name)()
    assert parse_config(Run, json.loads(json.dumps(dump_config(run))), tmp_path) == run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data=Data(task="t2i")), "data.task is t2i"),
        (dict(data=Data(sources=(World(), World(1)), task="chat")), "task.shares need data.sources to be one"),
        (dict(data=Data(sources=(Tars("x.tar"),), task="chat")), "task.shares need data.sources to be one"),
        (dict(task={"trainable": ("visual",)}), "matches no parameter"),
    ],
)
def test_settings_that_cannot_work_are_refused(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        task_of(run_of("align", folder, tmp_path, **changes))


def test_a_missing_stage_is_named(tmp_path):
    with pytest.raises(ValueError, match="run the stage before it"):
        task_of(run_of("align", tmp_path / "absent", tmp_path))


def test_a_fresh_model_is_made_once(folder, tmp_path):
    run = run_of("language", None, tmp_path / "out")
    first = task_of(run)
    made_at = (first.source / "config.json").stat().st_mtime_ns
    again = task_of(run)
    assert again.source == first.source
    assert (again.source / "config.json").stat().st_mtime_ns == made_at
    texts = replace(run, task=replace(first.config, text_conversations=first.config.text_conversations + 50))
    (tmp_path / "out" / "checkpoints" / "step-00000001").mkdir(parents=True)
    for other in (texts, replace(run, task=replace(first.config, fresh=replace(SMALL, seed=1)))):
        with pytest.raises(ValueError, match=r"fresh was made by other settings, .*; give another --out"):
            task_of(other)
    more = task_of(replace(texts, out=tmp_path / "other"))
    assert more.frozen()["tokenizer"] != again.frozen()["tokenizer"] == first.frozen()["tokenizer"]
