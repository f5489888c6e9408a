"""A config's path -> what transformers loads from it: a folder on this machine, else a hub id at a revision."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import logging

from model.assets import locate
from model.frozen import MLLMConfig


def from_pretrained(kind: Any, config: MLLMConfig, **options: Any) -> Any:
    """`kind.from_pretrained`, of one of transformers' Auto classes, for the model that `config` names; code that lies with
    it is never run. ValueError with the remedy when there is none."""
    return _load(kind.from_pretrained, config, trust_remote_code=False, **options)


def chat_template(config: MLLMConfig) -> str | None:
    """The template that the model's processor has for conversations with images; None: its tokenizer's will do."""
    template = _load(ProcessorMixin.get_processor_dict, config)[0].get("chat_template")
    return template["default"] if isinstance(template, dict) else template


def image_processor(config: MLLMConfig) -> Any:
    """The model's image processor, in the class that needs no torchvision: transformers' Auto class asks for it in some
    versions. ValueError when there is none."""
    settings, _ = _load(ImageProcessingMixin.get_image_processor_dict, config)
    name = str(settings.get("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
    try:
        return _load(getattr(transformers, f"{name}Pil").from_pretrained, config)
    except (AttributeError, ImportError) as error:
        raise ValueError(
            f"mllm.path {config.path!r}: transformers {transformers.__version__} has no {name} that needs no torchvision; "
            "update it, or choose another model"
        ) from error


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
    parts["image_processor"] = image_processor(config)
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
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # ImportError: an attention without its package
        if source.path.count("/") == 1 and folder is None:
            remedy = f"download it (hf download {source.path}), or name a model folder"
        else:
            remedy = "name a model folder or a hub id, or run make assets"
        raise ValueError(
            f"{source.field} {source.path!r} cannot be loaded ({str(error).splitlines()[0]}); {remedy}"
        ) from error


def weights(source: Source, kind: Any, **options: Any) -> Any:
    """A model with the weights of `source`, safetensors alone. ValueError also where the files lack some of them, or have
    them in other shapes: libraries fill those with random numbers and go on."""
    reporting = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # mismatches are reported, and refused below
    model, report = fetched(source, kind.from_pretrained, use_safetensors=True, **reporting, **options)
    absent = sorted([*report["missing_keys"], *(key[0] for key in report.get("mismatched_keys") or ())])
    if absent:
        raise ValueError(
            f"{source.field} {source.path!r} lacks {len(absent)} weights of a {type(model).__name__} or has them in other "
            f"shapes, the first {absent[0]}; restore its files, or name another model"
        )
    return model


def commit_of(path: str, revision: str | None) -> str | None:
    """The commit that a hub id stood for when it was loaded, read off the cache; of a folder on this machine, `revision`."""
    if locate(path) is not None:
        return revision
    for file in ("config.json", "model_index.json"):
        cached = try_to_load_from_cache(path, file, revision=revision)
        if isinstance(cached, str):  # .../snapshots/COMMIT/FILE
            return Path(cached).parent.name
    return revision


def _load(loader: Callable[..., Any], config: MLLMConfig, **options: Any) -> Any:
    return fetched(Source("mllm.path", config.path, config.revision), loader, **options)
