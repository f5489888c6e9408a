"""Rows S7 to S10 and S18: models that were made to do harm, or do not fit."""

import ast
import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from model import store
from model.decoder import DiffusersDecoderConfig, SiTDecoderConfig, build_decoder, save_sit
from model.files import read_json, read_tensors, write_json
from model.mllm import MLLMConfig
from model.mllm import load as load_mllm
from model.perceptual import LPIPSConfig, load_perceptual
from model.sit import SiT
from model.targets import TargetConfig, load_target
from model.vae import VAEConfig, load_vae
from sample import convert
from tests import releases, tiny, tiny_decoders
from tests.chaos.hostile_data import Evil
from tests.chaos.rows import Outcome, row
from tests.test_layout import FILES
from tests.toy import Toy, accept, advance, save
from train import checkpoint
from train.engine import EngineConfig
from train.ranks import start


@row(
    "S7",
    "a pickle in place of weights",
    "refused: weights are safetensors, or tensors alone (sample.convert)",
    "canary absent",
)
def pickled_weights(_: int, folder: Path) -> Outcome:
    """Of every part that is loaded from a folder, and every file that is opened by torch."""
    outcome, canary = Outcome(), folder / "canary"
    tiny.metaquery_config(folder)
    tiny_decoders.sana(folder / "sana")
    save_sit(folder / "sit", SiT(tiny.sit_config()))
    release = releases.release(folder)
    loaders: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        "mllm": (folder / "mllm", lambda path: load_mllm(MLLMConfig(str(path)))),
        "vae": (folder / "vae", lambda path: load_vae(VAEConfig(str(path)))),
        "target": (folder / "mllm", lambda path: load_target(TargetConfig(str(path)))),
        "decoder": (folder / "sana", lambda path: build_decoder(DiffusersDecoderConfig(str(path)))),
        "sit": (folder / "sit", lambda path: build_decoder(SiTDecoderConfig(path=str(path)))),
        "release": (release, store.load),
    }
    for name, (good, load) in loaders.items():
        for stem in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "model.pth", "model.safetensors"):
            place = folder / "evil"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(good, place)
            for weights in [*place.rglob("*.safetensors")]:
                torch.save({"weight": Evil(canary)}, weights.with_name(stem))
                if stem != weights.name:
                    weights.unlink()
            outcome.expect("", lambda load=load, place=place: load(place))
            outcome.add(not canary.exists(), f"{name}: {stem} was run")
            canary.unlink(missing_ok=True)
    for name, command in (
        ("sample.convert", lambda path: convert.main([str(path / "a.pt"), "--out", str(folder / "converted")])),
        ("perceptual", lambda path: load_perceptual(LPIPSConfig(str(path)))),
    ):
        for held in (Evil(canary), {"ema": Evil(canary), "model": {}}, pickle.dumps(Evil(canary))):
            place = folder / "evil"
            for file in ("a.pt", "vgg16-397923af.pth", "vgg.pth"):
                torch.save(held, place / file) if not isinstance(held, bytes) else (place / file).write_bytes(held)
            try:
                command(place)
                said: Exception | None = None
            except Exception as error:
                said = error
            outcome.add(said is not None and not canary.exists(), f"{name}: {said}, ran: {canary.exists()}")
            canary.unlink(missing_ok=True)
    return outcome


def hostile_headers() -> dict[str, bytes]:
    """Files of safetensors that lie about themselves."""

    def file(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    def tensor(begin: int, end: int, shape: tuple[int, ...] = (4,)) -> dict[str, Any]:
        return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}

    return {
        "a header of 2^63 bytes": file({"a": tensor(0, 16)}, length=2**63),
        "a header of 200 MB": file({"a": tensor(0, 16)}, length=200_000_000),
        "tensors that overlap": file({"a": tensor(0, 16), "b": tensor(8, 24)}, bytes(24)),
        "a tensor beyond the end": file({"a": tensor(0, 4096, (1024,))}),
        "a shape that overflows": file({"a": tensor(0, 16, (2**62, 2**62))}, bytes(16)),
        "a hole": file({"a": tensor(0, 16), "b": tensor(32, 48)}, bytes(48)),
        "bytes that no tensor has": file({"a": tensor(0, 16)}, bytes(64)),
        "an end before its beginning": file({"a": tensor(16, 0)}, bytes(16)),
        "a negative offset": file(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}', bytes(16)),
        "no JSON": file(b"{" * 1000),
        "a dtype that is none": file(b'{"a": {"dtype": "PKL", "shape": [4], "data_offsets": [0, 16]}}', bytes(16)),
        "nothing": b"",
    }


@row("S8", "hostile headers of safetensors", "refused in one sentence, in releases as in checkpoints", "all refused")
def headers(_: int, folder: Path) -> Outcome:
    """In place of a release's weights, and of a checkpoint's with a manifest that has the right hash."""
    outcome = Outcome()
    task = Toy(start(60), EngineConfig(zero=1, precision="fp32"))
    advance(task, 0, 1)
    path = save(task, folder, 1)
    for data in hostile_headers().values():
        (folder / "a.safetensors").write_bytes(data)
        outcome.expect("a.safetensors cannot be read", lambda: read_tensors(folder / "a.safetensors"))
        file = path / "main.weights.safetensors"
        file.write_bytes(data)
        accept(file)
        outcome.expect("", lambda: checkpoint.load(checkpoint.verify(path) and path, task.engines, start(60)))
    return outcome


@row("S9", "model_index.json and config.json that name any class of any module", "refused", "error")
def any_class(_: int, folder: Path) -> Outcome:
    """As the network, the scheduler, the autoencoder, the class of a model."""
    outcome, canary = Outcome(), folder / "canary"
    tiny_decoders.sana(folder / "sana")
    whole = read_json(folder / "sana" / "model_index.json")
    for pair in (
        ["os", "system"],
        ["subprocess", "Popen"],
        ["builtins", "eval"],
        ["evil", "Evil"],
        ["diffusers", "DiffusionPipeline"],
    ):
        (folder / "sana" / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
        write_json(folder / "sana" / "model_index.json", whole | {"transformer": pair})
        outcome.expect("supported are", lambda: build_decoder(DiffusersDecoderConfig(str(folder / "sana"))))
    write_json(folder / "sana" / "model_index.json", whole)
    tiny.vae_folder(folder / "vae")
    config = read_json(folder / "vae" / "config.json")
    for name in ("system", "os.system", "DiffusionPipeline", "UNet2DConditionModel", None):
        write_json(folder / "vae" / "config.json", config | {"_class_name": name})
        outcome.expect("supported are", lambda: load_vae(VAEConfig(str(folder / "vae"))))
    tiny.mllm_folder(folder / "mllm")
    settings = read_json(folder / "mllm" / "config.json")
    for kind in ("os", "bert", "evil"):
        write_json(folder / "mllm" / "config.json", settings | {"model_type": kind, "architectures": ["system"]})
        outcome.expect("", lambda: load_mllm(MLLMConfig(str(folder / "mllm"))))
    outcome.add(not canary.exists(), "a module beside the model was imported")
    return outcome


@row("S10", "code that lies with a model (trust_remote_code)", "never run, and no setting runs it", "canary absent")
def remote_code(_: int, folder: Path) -> Outcome:
    """No file passes anything but False; and models of known and unknown kinds bring code along."""
    outcome, canary = Outcome(), folder / "canary"
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                never = isinstance(node.value, ast.Constant) and node.value.value is False
                outcome.add(never, f"{path.name}:{node.value.lineno} may run code that lies with a model")
    code = f"open({str(canary)!r}, 'w')\nclass Evil: pass\nclass EvilConfig: pass\n"
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoProcessor")
    for kind in ("known", "unknown"):
        place = tiny.mllm_folder(folder / kind)
        (place / "evil.py").write_text(code)
        for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            held = read_json(place / file) if (place / file).is_file() else {}
            held["auto_map"] = {name: "evil.Evil" for name in names} | {
                "AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoImageProcessor": "evil.Evil"
            }  # fmt: skip
            if kind == "unknown" and file == "config.json":
                held["model_type"] = "evil"
            write_json(place / file, held)
        for name, load in (
            ("mllm", lambda p=place: load_mllm(MLLMConfig(str(p)))),
            ("target", lambda p=place: load_target(TargetConfig(str(p)))),
        ):
            with suppress(ValueError):
                load()
            outcome.add(not canary.exists(), f"{name}: the code of a model of {kind} kind was run")
            canary.unlink(missing_ok=True)
    return outcome


@row(
    "S18",
    "weights that are missing, of another shape, or too many",
    "refused by name; nothing is filled in at random",
    "error",
    trials=60,
    fast=12,
)
def wrong_weights(trials: int, folder: Path) -> Outcome:
    """A tensor of a release, a VAE, an MLLM, a SiT or a pipeline, left out or reshaped."""
    outcome, draw = Outcome(), random.Random(0)
    tiny.metaquery_config(folder)
    tiny_decoders.sana(folder / "sana")
    save_sit(folder / "sit", SiT(tiny.sit_config()))
    release = releases.release(folder)
    parts: list[tuple[Path, Callable[[], Any]]] = [
        (release / "model.safetensors", lambda: store.load(release)),
        (folder / "vae" / "diffusion_pytorch_model.safetensors", lambda: load_vae(VAEConfig(str(folder / "vae")))),
        (folder / "mllm" / "model.safetensors", lambda: load_mllm(MLLMConfig(str(folder / "mllm")))),
        (folder / "sit" / "model.safetensors", lambda: build_decoder(SiTDecoderConfig(path=str(folder / "sit")))),
        (
            next((folder / "sana" / "transformer").glob("*.safetensors")),
            lambda: build_decoder(DiffusersDecoderConfig(str(folder / "sana"))),
        ),
    ]
    for _file, load in parts:
        load()
    for trial in range(trials):
        file, load = parts[trial % len(parts)]
        whole = file.read_bytes()
        tensors = load_file(file)
        name = draw.choice(sorted(tensors))
        if trial // len(parts) % 2:
            broken = {key: tensor for key, tensor in tensors.items() if key != name}
        else:
            broken = tensors | {name: torch.cat([tensors[name], tensors[name]])}
        save_file(broken, file, metadata={"format": "pt"})
        outcome.expect(name, load)
        file.write_bytes(whole)
    return outcome
