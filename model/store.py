"""MetaQuery <-> release folder: config.json and model.safetensors, small, public and self-describing.

A release holds what was trained and names what was not: each frozen part by path, revision and sha256."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.assets import fingerprint, portable, tensors_of
from model.decoder import build_decoder
from model.files import (
    atomic_folder,
    check_match,
    dump_config,
    parse_config,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from model.metaquery import MetaQuery, MetaQueryConfig, build

FORMAT, VERSION = "querybridge.metaquery", 1
BESIDE, INSIDE = "../", "./"
"""What the path of a part starts with that lies beside the release folder, or in it, and moves with it."""


def save(folder: Path, model: MetaQuery, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write a release of `model`, complete or not at all; `tensors` replaces some of its own (an EMA, for one)."""
    own = model.own_tensors()
    if tensors is not None:
        assert tensors.keys() <= own.keys(), "a release cannot hold what the model does not own"
        own |= tensors
    with atomic_folder(folder) as draft:
        write_tensors(draft / "model.safetensors", own)
        write_json(
            draft / "config.json",
            {
                "format": FORMAT,
                "version": VERSION,
                "model": dump_config(_portable(model.config)),
                "frozen": frozen_parts(model),
            },
        )


def load(folder: Path) -> MetaQuery:
    """The model of a release, on CPU in eval mode. ValueError names what is missing, unknown, of another shape, or not the
    frozen part that it was trained with."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no release (it has no config.json); name the folder that training wrote")
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"{path}: format is not {FORMAT!r}; name a release folder that training wrote")
    if raw.get("version") != VERSION:
        raise ValueError(f"{path}: version {raw.get('version')} is unknown, this code reads {VERSION}; update the code")
    if unknown := sorted(raw.keys() - {"format", "version", "model", "frozen"}):
        raise ValueError(f"{path}: unknown key {unknown[0]}; remove it, or update the code to a version that knows it")
    frozen = raw.get("frozen", {})
    if not isinstance(frozen, dict) or not all(isinstance(facts, dict) for facts in frozen.values()):
        raise ValueError(f"{path}: frozen is no JSON object of objects; restore the file that training wrote")
    tensors = read_tensors(folder / "model.safetensors")
    config = _found_from(folder, parse_config(MetaQueryConfig, raw.get("model"), path))
    with torch.device("meta"):
        names = build_decoder(config.decoder, weights=False, noise=config.noise).state_dict()
    whole = all(f"decoder.{name}" in tensors for name in names)  # then those at its path are not read: it was trained whole
    model = build(config, decoder=build_decoder(config.decoder, not whole, config.noise))
    check_match(tensors, model.own_tensors(), folder / "model.safetensors")
    model.load_state_dict(tensors, strict=False)  # the names are checked; the rest came with the decoder
    _verify(frozen, frozen_parts(model), path)
    return model.eval()


def frozen_parts(model: MetaQuery) -> dict[str, dict[str, Any]]:
    """Path, revision and sha256 of everything that the release needs and does not contain."""
    config = _portable(model.config)
    parts = {
        "mllm": (config.mllm, model.mllm.fingerprint()),
        "vae": (config.vae, fingerprint(tensors_of(model.vae.autoencoder))),
    }
    if config.decoder.path is not None:
        parts["decoder"] = (config.decoder, model.decoder_sha256)
    return {
        name: {"path": part.path, "revision": getattr(part, "revision", None), "sha256": sha256}
        for name, (part, sha256) in parts.items()
    }


def _verify(recorded: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]], path: Path) -> None:
    for part, facts in found.items():
        if recorded.get(part, {}).get("sha256") != facts["sha256"]:
            raise ValueError(
                f"{path}: the {part} at {facts['path']!r} is not the one that this release was trained with; "
                "restore that version or train again"
            )


def _portable(config: MetaQueryConfig) -> MetaQueryConfig:
    """The config with paths that move with the code, and without how this machine computes."""
    config = replace(config, mllm=replace(config.mllm, vision_attention=None))
    return _each_path(config, lambda path: path if path.startswith((BESIDE, INSIDE)) else portable(path))


def _found_from(folder: Path, config: MetaQueryConfig) -> MetaQueryConfig:
    """The config whose parts beside the release are named by where they lie now."""
    return _each_path(config, lambda path: str((folder / path).resolve()) if path.startswith((BESIDE, INSIDE)) else path)


def _each_path(config: MetaQueryConfig, change: Callable[[str], str]) -> MetaQueryConfig:
    def changed(part: Any) -> Any:
        return part if part.path is None else replace(part, path=change(part.path))

    return replace(config, mllm=changed(config.mllm), vae=changed(config.vae), decoder=changed(config.decoder))
