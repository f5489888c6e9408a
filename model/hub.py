"""A config's path -> what transformers loads from it: a folder on this machine, else a hub id at a revision."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import logging

from model.assets import locate
from model.frozen import MLLMConfig


def from_pretrained(kind: Any, config: MLLMConfig, **options: Any) -> Any:
    """`kind.from_pretrained` for the model that `config` names; ValueError with the remedy when there is none."""
    return _load(kind.from_pretrained, config, **options)


def chat_template(config: MLLMConfig) -> str | None:
    """The template that the model's processor has for conversations with images; None: its tokenizer's will do."""
    template = _load(ProcessorMixin.get_processor_dict, config)[0].get("chat_template")
    return template["default"] if isinstance(template, dict) else template


def assemble_processor(config: MLLMConfig) -> Any:
    """The processor of the model that `config` names, of its tokenizer and an image processor that needs no torchvision.

    What reads videos and sound is left out: loading it needs torchvision, and nothing here asks for it.

    Raises:
        ValueError: transformers has no processor for it, or a package that its processor needs is missing.
    """
    kind: Any = PROCESSOR_MAPPING.get(type(from_pretrained(AutoConfig, config)), None)
    if kind is None:
        raise ValueError(f"mllm.path {config.path!r}: transformers has no processor for it; choose a model that has one")
    settings, _ = _load(kind.get_processor_dict, config)
    given = {name: settings[name] for name in inspect.signature(kind.__init__).parameters if name in settings}
    parts: dict[str, Any] = dict.fromkeys(kind.get_attributes())
    parts["tokenizer"] = from_pretrained(AutoTokenizer, config)
    parts["image_processor"] = from_pretrained(AutoImageProcessor, config, backend="pil")
    processor = kind.__new__(kind)
    processor.check_argument_for_proper_class = lambda name, part: None  # its own check knows no missing part
    try:
        processor.__init__(**{**given, **parts, "chat_template": chat_template(config)})
    except ImportError as error:
        raise ValueError(f"mllm.path {config.path!r}: {str(error).strip().splitlines()[0]}") from error
    del processor.check_argument_for_proper_class
    return processor


@dataclass(frozen=True)
class Source:
    """Where a part comes from, and the setting that names it."""

    field: str
    path: str
    revision: str | None = None


def fetched(source: Source, loader: Callable[..., Any], **options: Any) -> Any:
    """What `loader` makes of a folder on this machine, else of a hub id at a revision; ValueError with the remedy when there
    is neither."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # its bars would fill log files
    folder = locate(source.path)
    try:
        if folder is not None:
            return loader(folder, local_files_only=True, **options)
        return loader(source.path, revision=source.revision, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{source.field} {source.path!r} cannot be loaded ({str(error).splitlines()[0]}); "
            "name a model folder, or a hub id that is reachable or in the cache, or run make assets"
        ) from error


def _load(loader: Callable[..., Any], config: MLLMConfig, **options: Any) -> Any:
    return fetched(Source("mllm.path", config.path, config.revision), loader, **options)
