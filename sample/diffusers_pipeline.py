"""A release, or a folder in diffusers' layout, -> a `DiffusionPipeline` that draws; and back.

Coats over sample/pipeline.py and sample/labelled.py in diffusers' words: the noise schedule, the solvers and guidance are
those, whatever the scheduler. A scheduler's class names the solver, its config the schedule of the training, which cannot
be changed. Letters: B pictures of a batch, Q queries, C conditioning width, c h w latent channels, height, width, H W
pixels."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch

# pyright: reportPrivateImportUsage=false
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, ImagePipelineOutput, PipelineQuantizationConfig
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data.transforms import to_pil
from model.components import ConnectorModel, LabelsModel, SiTModel
from model.decoder import SiTDecoder, SiTDecoderConfig
from model.diffusers_decoder import DiffusersDecoderConfig, adopt_network, noise_of_scheduler
from model.labels import UNKNOWN
from model.metaquery import MetaQuery, MetaQueryConfig
from model.mllm import MLLMConfig, adopt
from model.noise import FlowConfig, NoiseConfig, build_noising
from model.store import load
from model.vae import LatentVAE, VAEConfig
from sample.labelled import LabelledDecoder, load_decoder
from sample.pipeline import Asked, Pictures, Pipeline, noise_from
from sample.settings import Drawing, Guidance, SolverName
from sample.solver import After

Output = Literal["pil", "np", "pt", "latent"]
Callback = Callable[[Any, int, Tensor, dict[str, Any]], Mapping[str, Any] | None]
Generators = torch.Generator | Sequence[torch.Generator] | None
Sources = Image.Image | Sequence[Image.Image | Sequence[Image.Image]] | None

SOLVER_OF: dict[str, SolverName] = {
    "DPMSolverMultistepScheduler": "dpm++",
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "DDIMScheduler": "euler",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "HeunDiscreteScheduler": "heun",
}
"""Which solver a scheduler's class asks for."""
_READ = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # diffusers' `download` refuses parts of our library
_OURS = {"model.components"}  # beside the libraries that diffusers itself loads from


class _Coat(DiffusionPipeline):
    """What both pipelines share: loading that refuses what is not whole, the schedule, callbacks and outputs."""

    _callback_tensor_inputs = ("latents",)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Self:
        """As diffusers', of safetensors alone, with no code but this.

        Raises:
            ValueError: a component is of a library that is not known, or its files lack some of its weights, or a package
                that `quantization_config` asks for is missing.
        """
        if options.pop("trust_remote_code", False):
            raise ValueError("trust_remote_code: nothing here runs code that comes with weights; leave it out")
        options["use_safetensors"] = True
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            kept = ("cache_dir", "force_download", "local_files_only", "token", "revision")
            asked = {name: options[name] for name in kept if name in options}
            folder = Path(snapshot_download(pretrained_model_name_or_path, allow_patterns=_READ, **asked))
        index: Any = cls.load_config(folder)
        _known_libraries(folder, index)
        try:
            pipe = super().from_pretrained(folder, **options)
        except ImportError as error:
            raise ValueError(f"{folder} cannot be loaded so: {str(error).strip().splitlines()[0]}") from error
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and name not in options and "device_map" not in options:
                _whole(folder / name, part)
        return pipe

    @property
    def interrupt(self) -> bool:
        """Whether the drawing ends after the step that it is in; a callback sets `_interrupt`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Steps of the latest drawing."""
        return self._steps

    def enable_vae_tiling(self) -> None:
        """Decode large pictures in overlapping tiles, which takes less memory."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode pictures whole."""
        self.vae.disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Decode pictures one by one."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode pictures together."""
        self.vae.disable_slicing()

    def _begin(self, scheduler: Any) -> None:
        """Called last in a constructor: the schedule is that of the scheduler that came with the weights."""
        self._noise = _noise(scheduler)
        self._interrupt, self._steps, self._made = False, 0, None

    def _solver(self) -> SolverName:
        """What the scheduler's class asks for. ValueError where it is unknown, or its schedule is not the weights' own."""
        name = type(self.scheduler).__name__
        if name not in SOLVER_OF:
            raise ValueError(f"scheduler: {name} names no solver here; choose one of {', '.join(SOLVER_OF)}")
        if _noise(self.scheduler) != self._noise:
            raise ValueError(
                f"scheduler: its schedule is {_noise(self.scheduler)}, the weights were trained with {self._noise}; make it "
                "from scheduler.config with the same shift or betas"
            )
        return SOLVER_OF[name]

    def _bar(self, steps: int) -> Any:
        self._steps = steps
        return self.progress_bar(total=steps)  # pyright: ignore

    def _after(self, bar: Any, callback: Callback | None, inputs: Sequence[str]) -> After:
        if unknown := sorted({*inputs} - {*self._callback_tensor_inputs}):
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs: {unknown[0]} is unknown; there is {known}")
        self._interrupt = False

        def after(number: int, t: Tensor, x: Tensor) -> Tensor | None:
            bar.update()
            if callback is not None:
                told = {"latents": x} if inputs else {}
                x = (callback(self, number, t[0], told) or {}).get("latents", x)
            return None if self._interrupt else x

        return after

    def _given(self, latents: Tensor, vae: LatentVAE, output: Output, return_dict: bool) -> Any:
        """Latents [B, c, h, w] -> what was asked for; models that are kept elsewhere go back there."""
        if output == "latent":
            images: Any = latents
        else:
            pixels = vae.decode(latents)  # [B, 3, H, W] in [-1, 1]
            images = pixels / 2 + 0.5
            if output == "pil":
                images = [to_pil(each) for each in pixels]
            elif output == "np":
                images = images.permute(0, 2, 3, 1).float().cpu().numpy()  # [B, H, W, 3]
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images) if return_dict else (images,)


class MetaQueryPipeline(_Coat):
    """Draws from prompts and pictures with a frozen MLLM, a connector that holds its queries, and a decoder."""

    model_cpu_offload_seq = "mllm->connector->transformer->vae"
    _optional_components: ClassVar = ["image_processor"]

    def __init__(
        self,
        mllm: Any,
        tokenizer: Any,
        connector: ConnectorModel,
        transformer: Any,
        vae: Any,
        scheduler: Any,
        image_processor: Any = None,
    ):
        super().__init__()
        self.register_modules(
            mllm=mllm,
            tokenizer=tokenizer,
            image_processor=image_processor,
            connector=connector,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
        )
        self._begin(scheduler)

    @classmethod
    def from_release(cls, folder: str | Path) -> "MetaQueryPipeline":
        """Of a release folder, on the CPU. ValueError where it is none, or its parts are not what diffusers can hold."""
        return cls.of(load(Path(folder)))

    @classmethod
    def of(cls, model: MetaQuery) -> "MetaQueryPipeline":
        """Holds the very modules of `model`."""
        decoder, builder = model.decoder, model.mllm.builder
        if isinstance(model.config.decoder, DiffusersDecoderConfig) and model.config.decoder.lora is not None:
            raise ValueError("decoder.lora: diffusers' layout holds no adapters over a decoder; keep the release as it is")
        if builder.template is not None:
            builder.tokenizer.chat_template = builder.template
        image_processor = getattr(builder.images, "processor", None)
        adopt(model.mllm.model, builder.tokenizer, image_processor)  # refuses what could not be read again
        return cls(
            mllm=model.mllm.model,
            tokenizer=builder.tokenizer,
            image_processor=image_processor,
            connector=ConnectorModel.of(model.queries, model.connector, model.config.queries),
            transformer=SiTModel.of(decoder.sit) if isinstance(decoder, SiTDecoder) else decoder.model,
            vae=model.vae.autoencoder,
            scheduler=scheduler_for(model.config.noise or decoder.noise),
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Sources = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 3.0,
        image_guidance_scale: float = 3.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_prompt: str = "",
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: Output = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Pictures, `num_images_per_prompt` in a row for each prompt.

        `image`: pictures to start from; with one prompt all of them, with several one entry each (a picture or several), a
        single one for all. `prompt_embeds` [B, Q, C], of `encode_prompt`, take the place of prompts. `generator`: one for
        each picture makes a picture a function of its own; a single one goes from picture to picture. `latents` [B, c, h, w]
        are unit gaussian noise to begin with. `guidance_interval`: times (0 data, 1 noise) to guide at. The callback is told
        (pipeline, step number, its time in [0, 1], {"latents"}) and may return other latents. `output_type`: pil; np
        [B, H, W, 3] and pt [B, 3, H, W] in [0, 1]; latent [B, c, h, w] of unit variance.

        Raises:
            ValueError: numbers of prompts, pictures and generators differ, or a setting is impossible.
        """
        _check_output(output_type)
        if not isinstance(negative_prompt, str | None):
            raise ValueError("negative_prompt: one text holds for all prompts; give a string")
        asked = [each for each in _asked(prompt, image, prompt_embeds) for _ in range(_at_least_one(num_images_per_prompt))]
        guidance = Guidance(guidance_scale, image_guidance_scale, *guidance_interval, guidance_rescale)
        drawing = Drawing(num_inference_steps, guidance, negative_prompt or "", self._solver(), height or 0, width or 0)
        painter = self._painter()
        with self._bar(num_inference_steps) as bar:
            after = self._after(bar, callback_on_step_end, callback_on_step_end_tensor_inputs)
            drawn = painter.latents(asked, _generators(generator, len(asked)), drawing, after=after, start=latents)
        return self._given(drawn, painter.model.vae, output_type, return_dict)

    def encode_prompt(self, prompt: str | Sequence[str], image: Sources = None) -> Tensor:
        """What the decoder is told about each prompt, [B, Q, C]."""
        return self._painter().condition(_asked(prompt, image, None))

    def _painter(self) -> Pipeline:
        """What draws, over the components as they are; it remembers conditions for as long as they stay."""
        parts = (self.mllm, self.tokenizer, self.image_processor, self.connector, self.transformer, self.vae)
        held = (self._execution_device, *map(id, parts), *(part.dtype for part in parts if isinstance(part, nn.Module)))
        if self._made is None or self._made[0] != held:
            self._made = (held, Pipeline(self._model()))
        return self._made[1]

    def _model(self) -> MetaQuery:
        coat, vae = self.connector, LatentVAE(self.vae)
        known = isinstance(self.transformer, SiTModel)
        decoder = SiTDecoder(self.transformer) if known else adopt_network(self.transformer, self._noise)
        config = MetaQueryConfig(
            mllm=MLLMConfig("mllm"),
            decoder=SiTDecoderConfig(),
            vae=VAEConfig("vae"),
            queries=coat.config.num_queries,
            connector=coat.connector.config,
            noise=self._noise,
            read=coat.config.read,
        )
        return MetaQuery(config, adopt(self.mllm, self.tokenizer, self.image_processor), vae, coat.queries, coat, decoder)


class SiTPipeline(_Coat):
    """Draws classes with a SiT that was trained on labels."""

    model_cpu_offload_seq = "labels->transformer->vae"

    def __init__(self, labels: LabelsModel, transformer: SiTModel, vae: Any, scheduler: Any):
        super().__init__()
        self.register_modules(labels=labels, transformer=transformer, vae=vae, scheduler=scheduler)
        self._begin(scheduler)

    @classmethod
    def from_release(cls, folder: str | Path) -> "SiTPipeline":
        """Of the release of a run of configs/repae.py, on the CPU. ValueError where it is none, or was not told classes."""
        made = load_decoder(Path(folder))
        made.check_classes()
        noising: Any = made.noising
        parts = LabelsModel.of(made.labels), SiTModel.of(made.sit), made.vae.autoencoder
        return cls(*parts, scheduler_for(noising.config))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int | None] | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: Output = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Pictures, `num_images_per_prompt` in a row for each class; None tells no class. The rest as
        `MetaQueryPipeline.__call__`."""
        _check_output(output_type)
        decoder, device = self._decoder(), self._execution_device
        labels = [class_labels] if class_labels is None or isinstance(class_labels, int) else list(class_labels)
        words = [_word(label, decoder.classes) for label in labels for _ in range(_at_least_one(num_images_per_prompt))]
        if not words:
            raise ValueError("class_labels: there is none; give at least one")
        told = torch.tensor(words, device=device).view(-1, 1, 1), torch.zeros(len(words), 1, 3, device=device)
        fresh = noise_from(_generators(generator, len(words)), decoder.latent_shape, device)
        guidance = Guidance(guidance_scale, 1.0, *guidance_interval, guidance_rescale)
        with self._bar(num_inference_steps) as bar:
            after = self._after(bar, callback_on_step_end, callback_on_step_end_tensor_inputs)
            start = fresh() if latents is None else latents
            drawn = decoder.latents(told, start, fresh, num_inference_steps, self._solver(), guidance, after)
        return self._given(drawn, decoder.vae, output_type, return_dict)

    def _decoder(self) -> LabelledDecoder:
        # its labels and SiT are asked by call alone, and the coats answer as what they hold
        labels: Any = self.labels
        sit: Any = self.transformer
        return LabelledDecoder(sit, LatentVAE(self.vae), labels, build_noising(self._noise))


def scheduler_for(noise: NoiseConfig) -> DPMSolverMultistepScheduler:
    """A scheduler whose config says `noise`, and whose class asks for DPM-Solver++."""
    if isinstance(noise, FlowConfig):
        return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=noise.shift)
    return DPMSolverMultistepScheduler(
        prediction_type="v_prediction" if noise.prediction == "v" else "epsilon",
        num_train_timesteps=noise.train_steps,
        beta_schedule="scaled_linear",
        beta_start=noise.beta_start,
        beta_end=noise.beta_end,
    )


def quantized_mllm(kind: Literal["nf4", "int8", "int8wo"]) -> PipelineQuantizationConfig:
    """For `from_pretrained(quantization_config=...)`: the MLLM alone at 4 or 8 bit, by bitsandbytes (nf4, int8) or torchao
    (int8wo). ValueError where the package is missing."""
    package = "torchao" if kind == "int8wo" else "bitsandbytes"
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"quantized_mllm: {kind} needs {package}, which is not installed; pip install {package}")
    if kind == "int8wo":
        from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
        from transformers import TorchAoConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
        return PipelineQuantizationConfig(quant_mapping={"mllm": config})
    from transformers import BitsAndBytesConfig

    how: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    settings: Any = BitsAndBytesConfig(**how)
    return PipelineQuantizationConfig(quant_mapping={"mllm": settings})


def _noise(scheduler: Any) -> NoiseConfig:
    """The schedule that a scheduler's config stands for."""
    config, remedy = dict(scheduler.config), "make it from the config of the scheduler that came with the weights"
    shifts = {config[key] for key in ("shift", "flow_shift") if config.get(key) is not None}
    if len(shifts) > 1:  # diffusers leaves the other class's name behind, and its own at 1
        raise ValueError(
            "scheduler: it was made from the config of another class, which names the shift of times otherwise; give it "
            f"shift={max(shifts)} and flow_shift={max(shifts)}"
        )
    return noise_of_scheduler(type(scheduler).__name__, config, "scheduler", remedy)


def _known_libraries(folder: Path, index: Mapping[str, Any]) -> None:
    for name, part in index.items():
        if isinstance(part, list | tuple) and part and part[0] is not None and part[0] not in {*LOADABLE_CLASSES, *_OURS}:
            raise ValueError(f"{folder}/model_index.json: {name} is of {part[0]!r}, which is not loaded from; remove it")


def _whole(folder: Path, part: Any) -> None:
    """ValueError where the files of a component lack weights: libraries fill those with random numbers and go on."""
    if getattr(part, "is_quantized", False):
        return  # held otherwise than in the files
    held: dict[str, int] = {}  # numbers of each tensor
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                held |= {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}); copy it again") from error
    tensors = part.state_dict()
    absent = sorted(name for name in tensors if name not in held)
    once = {value.data_ptr() or name: value.numel() for name, value in tensors.items()}  # tied ones share their data
    if absent and sum(held.values()) < sum(once.values()):  # transformers may store them by other names
        raise ValueError(f"{folder} lacks weights, the first perhaps {absent[0]}; restore its files")


def _asked(prompt: str | Sequence[str] | None, image: Sources, prompt_embeds: Tensor | None) -> list[Asked]:
    """One for each prompt, with its pictures."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("prompt and prompt_embeds: give one of them")
    if prompt_embeds is not None:
        if image is not None:
            raise ValueError("image: prompt_embeds have read their pictures already; give a prompt, or leave image out")
        return [Asked(condition=row[None]) for row in prompt_embeds]
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    if not prompts:
        raise ValueError("prompt: there is none; give at least one")
    if image is None or isinstance(image, Image.Image):
        each = [_pictures(image)] * len(prompts)
    elif isinstance(prompt, str):
        each = [_pictures(image)]
    else:
        each = [_pictures(entry) for entry in image]
    if len(each) != len(prompts):
        raise ValueError(f"image: {len(each)} entries for {len(prompts)} prompts; give one for each, or a single picture")
    return [Asked(text, pictures) for text, pictures in zip(prompts, each, strict=True)]


def _pictures(image: Any) -> Pictures:
    pictures = () if image is None else (image,) if isinstance(image, Image.Image) else tuple(image)
    if wrong := [type(each).__name__ for each in pictures if not isinstance(each, Image.Image)]:
        raise ValueError(f"image: a {wrong[0]} is no PIL image; give PIL images")
    return pictures


def _generators(generator: Generators, count: int) -> list[torch.Generator]:
    if generator is None or isinstance(generator, torch.Generator):
        return [generator or torch.default_generator] * count
    if len(generator) != count:
        raise ValueError(f"generator: {len(generator)} for {count} pictures; give one for each, or a single one")
    return list(generator)


def _word(label: int | None, classes: int) -> int:
    """The word of a class; that of none is UNKNOWN."""
    if label is None:
        return UNKNOWN
    if not 0 <= label < classes:
        raise ValueError(f"class_labels: {label} is none of the {classes} classes; give 0 to {classes - 1}")
    return label + 1


def _at_least_one(count: int) -> int:
    if count < 1:
        raise ValueError(f"num_images_per_prompt: {count} is too few; give at least 1")
    return count


def _check_output(output: str) -> None:
    if output not in get_args(Output):
        raise ValueError(f"output_type: {output!r} is unknown; choose one of {', '.join(get_args(Output))}")
