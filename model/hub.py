"""A config's path -> what transformers loads from it: a folder on this machine, else a hub id at a revision."""

import sys
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging

from model.assets import locate
from model.frozen import MLLMConfig


def from_pretrained(kind: Any, config: MLLMConfig, **options: Any) -> Any:
    """`kind.from_pretrained` for the model that `config` names; ValueError with the remedy when there is none."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # its bars would fill log files
    folder = locate(config.path)
    try:
        if folder is not None:
            return kind.from_pretrained(folder, local_files_only=True, **options)
        return kind.from_pretrained(config.path, revision=config.revision, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"mllm.path {config.path!r} cannot be loaded ({str(error).splitlines()[0]}); "
            "name a model folder, or a hub id that is reachable or in the cache, or run make assets"
        ) from error
