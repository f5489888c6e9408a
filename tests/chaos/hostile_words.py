"""Rows S11, S12, S16 and S17: words that are taken for more, and words that must stay secret."""

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from PIL import Image

from model import store
from model.mllm import MLLMConfig, load_builder
from model.prefix import Turn
from sample import cli, generate
from tests import releases, tiny
from tests.chaos.hostile_data import everything
from tests.chaos.processes import launch, wait
from tests.chaos.rows import Outcome, row
from tests.test_layout import FILES, imported
from tests.tiny_families import SEEING
from tests.two_ranks import tiny_run
from train import checkpoint_cli, doctor, run


@row("S11", "YAML tags that make objects", "settings are Python or strict JSON; nothing reads YAML", "error")
def yaml_tags(_: int, folder: Path) -> Outcome:
    """No file imports a YAML library; run.json and release configs with tags are refused."""
    outcome, canary = Outcome(), folder / "canary"
    for path in FILES:
        outcome.add(not imported(path) & {"yaml", "ruamel", "omegaconf"}, f"{path} reads YAML")
    tag = f"!!python/object/apply:os.system ['touch {canary}']"
    for text in (tag, f"name: {tag}", json.dumps({"name": tag, "task": tag}), "&a [*a, *a]"):
        for name in ("run.json", "config.json"):
            (folder / name).write_text(text)
        outcome.expect("", lambda: run.read(folder / "run.json"))
        outcome.expect("", lambda: store.load(folder))
        with suppress(SystemExit, ValueError), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            run.parse(["metaquery.tiny", "--task.model.mllm.path", tag, "--data.sources", tag])
        outcome.add(not canary.exists(), f"{text[:40]!r} was run")
    return outcome


@row("S12", "special tokens in captions and in what users say", "they are text", "no special id from a user's text", fast=1)
def special_tokens(_: int, folder: Path) -> Outcome:
    """Every special token of every family's tokenizer that sees pictures, between two words; in chats and in captions."""
    outcome = Outcome()
    makers = {"qwen2_5_vl": tiny.mllm_folder, **SEEING}
    for name, make in makers.items():
        builder = load_builder(MLLMConfig(str(make(folder / name))))
        tokenizer = builder.tokenizer
        template = str(builder.template or tokenizer.chat_template)
        added = tokenizer.added_tokens_decoder.items()
        special = {
            i: token.content for i, token in added if token.special or i == builder.image_id or token.content in template
        }
        for text in {
            *special.values(),
            "<|im_start|>",
            "<|im_end|>",
            "<image>",
            "<|image_pad|>",
            "<|endoftext|>",
            "</s>",
            "<s>",
        }:
            for make_prefix in (
                lambda said, builder=builder: builder([[Turn("user", said)]]),
                lambda said, builder=builder: builder(
                    [[Turn("user", "a", (tiny.image(),)), Turn("assistant", "b"), Turn("user", said)]]
                ),
                lambda said, builder=builder: builder.draw([said]),
            ):
                attacked = [i for i in make_prefix(f"red {text} blue").ids[0].tolist() if i in special]
                plain = [i for i in make_prefix("red blue").ids[0].tolist() if i in special]
                outcome.add(attacked == plain, f"{name}: {text!r} became a token")
    outcome.seen = f"{len(makers)} families"
    return outcome


@row("S16", "prompts that look like paths", "pictures are named by number; the prompt stands within", "inside the folder")
def output_paths(_: int, folder: Path) -> Outcome:
    """Given on the command line and in a file of prompts."""
    outcome = Outcome()
    release, out = releases.release(folder / "parts"), folder / "a" / "out"
    prompts = [
        "../../x",
        "/tmp/chaos-s16",
        "..",
        "a/b",
        "~/x",
        "$HOME",
        "%s%n",
        "x" * 100,
        "CON",
        "a\tb",
        "-n",
        "--out /tmp/x",
    ]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    before = everything(folder, out)
    given = ["--release", str(release), "--prompts", str(folder / "prompts.txt"), "--out", str(out), "--steps", "1"]
    with redirect_stdout(io.StringIO()):
        code = cli.run(generate.main, given)
    outcome.add(code == 0 and everything(folder, out) == before, f"exit code {code}, something lies outside")
    for number, prompt in enumerate(prompts):
        with Image.open(out / f"{number:05d}.png") as picture:
            text = getattr(picture, "text", {})
            outcome.add(text.get("prompt") == prompt.strip(), f"{prompt!r} is told as {text.get('prompt')!r}")
    outcome.add(len(list(out.iterdir())) == len(prompts), f"{sorted(p.name for p in out.iterdir())}")
    return outcome


SECRETS = {
    "HF_TOKEN": "hf_chaosCanaryOfTheHub",
    "WANDB_API_KEY": "chaosCanaryOfWandb0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "chaosCanaryOfAws",
}


@row("S17", "secrets in the environment", "in no file, no output and no process's arguments", "absent")
def secrets(_: int, folder: Path) -> Outcome:
    """A training, its resume, a plan, the doctor, a list of checkpoints, an export, drawn pictures, what errors say."""
    outcome = Outcome()
    tiny.metaquery_config(folder)
    tokens = list(SECRETS.values())

    def work(rank: int) -> None:
        os.environ.update(SECRETS)
        given = tiny_run(folder, folder / "run")
        run.main(given)
        run.main([*given, "--schedule.steps", "7"])
        run.main([*given, "--plan", "--world", "2"])
        doctor.main(given)
        checkpoint_cli.main(["ls", str(folder / "run")])
        checkpoint_cli.main(
            ["export", str(folder / "run" / "checkpoints" / "step-00000006"), "--out", str(folder / "exported")]
        )
        generate.main(
            ["--release", str(folder / "exported"), "--out", str(folder / "drawn"), "--steps", "1", "a red circle"]
        )
        for wrong in (["--task.model.mllm.path", "no/where"], ["--optim.lr", "x"], ["--nothing", "1"]):
            with suppress(SystemExit):
                cli.run(run.main, [*given, *wrong])
        print(Path("/proc/self/cmdline").read_bytes())

    codes = wait(launch(1, work, folder / "log"), 200)
    outcome.add(codes == [0], f"exit codes {codes}: {(folder / 'log').read_text()[-500:]}")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        found = [token for token in tokens if token.encode() in content]
        outcome.add(not found, f"{path} holds {found}")
    outcome.seen = f"{len(files)} files and what was printed"
    return outcome
