"""The scaling model: against what real ranks were seen to send and read, and against a ring walked step by step."""

import subprocess
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from data import precompute
from data.pack import write_shards
from data.shard_index import BLOCK_BYTES, index_shard
from model.metaquery import blueprint
from sample.measures import read_json
from tests import tiny
from tests.test_shards import items
from tests.two_ranks import ROOT, TORCHRUN, tiny_run
from train import plan, scaling, traffic
from train.collectives import Load, Network, payload
from train.optim import split
from train.run import parse
from train.scaling import Recipe, fastest, load_of, quickest, settings

CASES = {  # world, options of traffic, options of the run
    "official": (2, ("--inside", "--steps", "1"), ("--schedule.accumulation", "2")),
    "checkpointed": (4, ("--zero", "2", "3", "--steps", "1"), ("--task.model.connector.activation-checkpointing",)),
    "odd": (3, ("--zero", "1", "3", "--steps", "1"), ("--engine.precision", "bf16", "--schedule.batch-size", "6")),
}


def padded(sizes, multiple: int) -> int:
    return sum(-(-size // multiple) * multiple for size in sizes)


@pytest.mark.parametrize("case", CASES)
def test_formula_gives_the_bytes_that_ranks_were_seen_to_send(case, tmp_path):
    """To the byte, with each tensor filled up to a multiple of the ranks (ZeRO 1 and 2's groups of twice as many)."""
    world, options, overrides = CASES[case]
    tiny.metaquery_config(tmp_path)
    words = tiny_run(tmp_path, tmp_path / "out", *overrides)
    command = [*TORCHRUN, f"--nproc_per_node={world}"]
    out = tmp_path / "traffic.json"
    done = subprocess.run(
        [*command, "-m", "train.traffic", *words, *options, "--json", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = read_json(out)
    run = parse(words)
    width = plan.GRADIENT_BYTES[run.engine.precision]
    ways = {name.split(".")[1] for name in measured}
    assert len(ways) == (8 if case == "official" else 2)
    for way in ways:
        model, layers = blueprint(plan.metaquery_of(run)), []
        if way.startswith("official"):
            mllm = model.mllm.model
            model.add_module("inside", mllm)
            mllm.get_input_embeddings().weight.requires_grad_()
            layers = [p.numel() for p in mllm.get_decoder().parameters() if not p.requires_grad]
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        again = [p.numel() for name, p in model.connector.layers.named_parameters() if ".down." not in name]
        again = again if case == "checkpointed" else []
        zero, accumulation = int(way[-1]), run.schedule.accumulation
        sizes = [padded(each, world if zero == 3 else 1) for each in (trained, again, layers)]
        exact = payload(Load(sizes[0], width, sizes[1], sizes[2]), zero, accumulation)
        if zero in (1, 2):
            exact["all_gather"] = width * padded([sum(p.numel() for p in group) for group in split(model)], 2 * world)
        seen = {kind: measured.get(f"traffic.{way}.{kind}.bytes") for kind in ("all_reduce", "all_gather", "reduce_scatter")}
        assert {kind: each.value for kind, each in seen.items() if each} == exact
        load = replace(load_of(model, width), frozen=sum(layers))
        assert load.checkpointed == sum(again)
        for kind, size in payload(load, zero, accumulation).items():
            assert 0 <= exact[kind] / size - 1 < 0.01  # what filling up adds


def test_bytes_read_are_those_of_the_members(tmp_path):
    """Each step reads every sample of the set once, from its first member's header on to the last one's end, or with latents
    those in place of the picture."""
    tiny.metaquery_config(tmp_path)
    write_shards(items(8), lambda item: item, tmp_path / "set", shard_size=4)
    shards, latents = f"{tmp_path}/set/*.tar", tmp_path / "latents"
    given = ["--vae.path", str(tmp_path / "vae"), "--image-size", "32", "--out", str(latents)]
    assert precompute.main([shards, *given]) == 0

    def size(folder: Path, kinds: set[str]) -> int:
        total = 0
        for found in (index_shard(str(path)) for path in folder.glob("*.tar")):
            starts, sizes = found.spans[:, [found.extensions.index(kind) for kind in kinds]].transpose(2, 0, 1)
            total += int(((starts + sizes).max(1) - starts.min(1) + BLOCK_BYTES).sum())
        return total

    words = ["--zero", "1", "--steps", "1", "--schedule.batch-size", "8", "--data.sources.0.urls", shards]
    words = ["metaquery.emoji", *tiny_run(tmp_path, tmp_path / "out")[1:5], "--data.image-size", "32", *words]
    expected = {"pictures": size(tmp_path / "set", {"png", "txt", "json"})}
    expected["latents"] = size(tmp_path / "set", {"txt", "json"}) + size(latents, {"npy"})
    for what, more in {"pictures": [], "latents": ["--data.sources.0.latents", str(latents)]}.items():
        out = tmp_path / f"{what}.json"
        traffic.main([*words, *more, "--json", str(out)])
        assert read_json(out)["traffic.zero1.data.bytes"].value == expected[what]


def test_a_ring_takes_what_its_steps_take():
    network = Network(gpus_per_node=4, nvlink_gbytes=100, nic_gbits=80, nics_per_node=2, nvlink_us=2, nic_us=7)
    size, messages, far = 6e6, 3, 80e9 / 8 * 2 / 4
    for nodes, near in product((1, 2, 3), (1, 3, 4)):
        world = nodes * near
        if nodes > 1 and near < 4:
            continue
        held = {(node, gpu): [{(node, gpu)}] for node in range(nodes) for gpu in range(near)}
        seconds = 0.0
        for _ in range(nodes - 1):  # each rank to the next node, to the same place there
            sent = {rank: came[-1] for rank, came in held.items()}
            seconds += messages * 7e-6 + max(map(len, sent.values())) * size / world / far
            for (node, gpu), parts in sent.items():
                held[(node + 1) % nodes, gpu].append(parts)
        held = {rank: [set().union(*came)] for rank, came in held.items()}
        for _ in range(near - 1):  # each rank to the next of its node
            sent = {rank: came[-1] for rank, came in held.items()}
            seconds += messages * 2e-6 + max(map(len, sent.values())) * size / world / 100e9
            for (node, gpu), parts in sent.items():
                held[node, (gpu + 1) % near].append(parts)
        assert all(set().union(*came) == set(held) for came in held.values())
        assert network.pass_seconds(size, messages, world) == pytest.approx(seconds, abs=1e-15)


def test_alone_nothing_is_sent_and_more_is_never_less():
    network = Network()
    load = Load(trained=1e9, width=2, checkpointed=5e8, frozen=1e9)
    for zero, accumulation in product((0, 1, 2, 3), (1, 4)):
        given = payload(load, zero, accumulation)
        assert network.pass_seconds(sum(given.values()), 9, 1) == 0
        assert sum(payload(replace(load, trained=2e9), zero, accumulation).values()) > sum(given.values())
        assert sum(payload(load, zero, accumulation + 1).values()) >= sum(given.values())


def a_recipe(folder: Path, *overrides: str) -> Recipe:
    tiny.metaquery_config(folder)
    return Recipe(parse(tiny_run(folder, folder / "out", *overrides)), prefix_tokens=20)


ARGS = scaling.Args(
    recipes=("metaquery.tiny",), worlds=(2, 8), network=Network(gpus_per_node=2), prefix_tokens=20, picture_bytes=1
)


def test_memory_is_that_of_the_plan_and_of_an_engine_that_holds_the_mllm(tmp_path):
    recipe = a_recipe(tmp_path, "--engine.zero", "2")
    told = plan.plan(recipe.run, world=2, prefix_tokens=20)["plan.rank.bytes"].value
    assert recipe.held(2, 2) + 4 * recipe.activations == pytest.approx(told)
    outside = {zero: recipe.held(zero, 2, official=True) for zero in (1, 2, 3)}
    recipe.model.add_module("inside", recipe.model.mllm.model)
    recipe.model.mllm.model.get_input_embeddings().weight.requires_grad_()
    for zero, held in outside.items():
        engine = replace(recipe.run.engine, zero=zero)
        twice = 4 * recipe.mllm  # the plan counts an MLLM outside too
        assert held == pytest.approx(sum(plan.memory(recipe.model, engine, 2).values()) - twice)


def test_stages_give_way_where_the_limits_say(tmp_path):
    recipe = a_recipe(tmp_path)
    limits = scaling.limits(recipe, ARGS, 8)
    for zero in (1, 2, 3):
        least = limits[f"limit.8.zero{zero}.least_memory"].value / 1e9
        fitting = [{s.zero for s in settings(recipe, replace(ARGS, memory_gb=least * by), 8, 1)} for by in (1.0001, 0.9999)]
        assert [zero in stages for stages in fitting] == [True, False]
    assert fastest(recipe, ARGS, 8, 1).zero == 1
    assert fastest(recipe, ARGS, 8, 4).accumulation == 1
    tight = replace(ARGS, memory_gb=(recipe.held(1, 8) + 2 * recipe.activations) / (1 - ARGS.reserve) / 1e9 * 1.0001)
    one = quickest(recipe, tight, 8, 4, zero=1)
    assert one is not None
    assert one.accumulation == 2
    assert quickest(recipe, replace(tight, memory_gb=1e-9), 8, 4, zero=1) is None


def test_the_command_writes_measures_and_a_picture(tmp_path, capsys):
    options = ["--worlds", "1", "2", "4", "--network.gpus-per-node", "2", "--prefix-tokens", "20", "--picture-bytes", "1"]
    options += ["--storage-gbytes", "1000"]
    scaling.main(["metaquery.tiny", *options, "--json", str(tmp_path), "--plot", str(tmp_path / "scaling.png")])
    found = read_json(tmp_path / "tiny.json")
    assert found["kept.1.collective"].value == 0
    assert found["kept.1.efficiency"].value == 1
    assert found["kept.4.pictures"].value * 4 == found["grown.4.pictures"].value == 8
    assert found["grown.4.efficiency"].value > found["kept.4.efficiency"].value
    for batch in ("kept", "grown"):
        assert found[f"{batch}.4.efficiency_overlapped"].value >= found[f"{batch}.4.efficiency"].value
    assert found["outside.4.zero3.collective_bytes_saved"].value > found["outside.4.zero1.collective_bytes_saved"].value > 0
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("main", "words", "sentence"),
    [
        (scaling.main, ["metaquery.tiny", "--worlds", "3"], "the batch 8 of tiny does not divide into --worlds 3"),
        (scaling.main, ["metaquery.tiny", "--worlds", "2", "--memory-gb", "0.001"], "nothing of tiny fits 0.001 GB"),
        (scaling.main, ["metaquery.tiny", "--worlds", "4", "--network.gpus-per-node", "3"], "world 4 does not fill nodes"),
        (lambda words: Network(**words), {"nic_gbits": 0}, "network.nic_gbits is 0; give a number above 0"),
        (scaling.main, ["metaquery.tiny", "--utilisation", "1.5"], "--utilisation is at most 1"),
        (scaling.main, ["metaquery.tiny", "--picture-bytes", "0"], "--picture-bytes is 0"),
        (scaling.main, ["repae.xl_f8d4"], "is no MetaQuery run"),
        (traffic.main, ["metaquery.tiny", "--steps", "0"], "give --steps of at least 1"),
        (traffic.main, ["world.vae"], "is no MetaQuery run"),
    ],
)
def test_what_cannot_be_calculated_is_said_in_a_sentence(main, words, sentence):
    with pytest.raises(ValueError, match=sentence):
        main(words)
