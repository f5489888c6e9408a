"""A module and its loss -> distributed AdamW steps. The only file that imports deepspeed.

DeepSpeed 0.19.8 is driven through its public engine; where the sharded state has to be read or written by parameter
name (checkpoint, averages), `_Shards` below holds all knowledge of its insides.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.compiled import compile_all
from train.ema import EmaConfig, decay, follow
from train.guard import Guard, GuardConfig
from train.optim import AdamW, OptimConfig, adamw, learning_rate
from train.ranks import Ranks

BUCKET = 500_000_000  # numbers that DeepSpeed reduces at once
KINDS = ("weights", "exp_avg", "exp_avg_sq", "average")
"""What is kept in float32 for each trained parameter: the master weight, AdamW's two moments, the moving average."""


@dataclass(frozen=True)
class EngineConfig:
    """How a module is spread over ranks, and in which precision it runs."""

    zero: Literal[0, 1, 2, 3] = 1
    """What is sharded: nothing, optimizer state, + gradients, + parameters (Rajbhandari et al., 2020)."""
    precision: Literal["fp32", "autocast", "bf16"] = "autocast"
    """autocast: float32 weights, bfloat16 matrix products; bf16: bfloat16 weights over float32 masters."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    deepspeed_json: Path | None = None
    """A DeepSpeed config merged over the derived one; contradictions are refused."""
    compile: bool = False
    """Compile the repeated blocks of what trains (torch.compile): faster on a GPU, after a minute's wait."""
    offload_optimizer: bool = False
    """At ZeRO 1 to 3, keep the masters, moments and averages in the host's memory and update them there."""
    timeout_seconds: float = 600.0
    """How long a rank waits for the others before it gives up."""

    def __post_init__(self) -> None:
        if self.zero == 0 and self.precision != "fp32":
            raise ValueError(
                f"engine.precision is {self.precision} with engine.zero 0, where DeepSpeed takes a phantom step; "
                "set engine.zero to 1 or engine.precision to fp32"
            )
        if self.zero == 3 and self.compile:
            raise ValueError(
                "engine.compile with engine.zero 3, whose gathering cuts every block apart; set engine.zero to 2"
            )
        if self.zero == 0 and self.offload_optimizer:
            raise ValueError(
                "engine.offload_optimizer with engine.zero 0, which offloads nothing; set engine.zero to 1 or more"
            )
        if self.clip_norm < 0:
            raise ValueError(f"engine.clip_norm is {self.clip_norm}; give 0 (off) or more")


@dataclass(frozen=True)
class Step:
    """What one optimizer step did; equal on all ranks."""

    loss: float
    grad_norm: float
    """Before clipping; of the mean gradient over ranks and micro-batches."""
    lr: float
    objection: str | None
    """Why the step was not taken."""


def micro_batch_size(batch_size: int, accumulation: int, world: int) -> int:
    """Samples per rank and micro-batch. Raises ValueError when the global batch does not divide."""
    size, rest = divmod(batch_size, accumulation * world)
    if rest or size == 0:
        raise ValueError(
            f"schedule.batch_size {batch_size} does not divide into {world} ranks x schedule.accumulation "
            f"{accumulation}; give a multiple of {accumulation * world}"
        )
    return size


def deepspeed_config(config: EngineConfig, *, batch_size: int, accumulation: int, world: int) -> dict[str, Any]:
    """The DeepSpeed dict of this run, with every value that 0.19.8 would otherwise choose for us written out.

    Raises ValueError when the user's `deepspeed_json` contradicts it.
    """
    derived: dict[str, Any] = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size(batch_size, accumulation, world),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip_norm,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,  # ours subclasses torch's AdamW
        "zero_optimization": {"stage": config.zero},
        "bf16": {"enabled": config.precision == "bf16"},
        "torch_autocast": {"enabled": config.precision == "autocast", "dtype": "bfloat16"},
    }
    if config.precision == "bf16":
        derived["bf16"]["check_grad_overflow"] = True
    if config.offload_optimizer:  # our AdamW updates there too: fused, and state by name as anywhere
        derived["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        derived["zero_force_ds_cpu_optimizer"] = False
    if config.zero == 3:  # above 0, a resumed autocast run differs in the last digits
        derived["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if config.deepspeed_json is None:
        return derived
    try:
        theirs = json.loads(config.deepspeed_json.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"engine.deepspeed_json: {config.deepspeed_json} is not JSON ({error})") from error
    if not isinstance(theirs, dict):
        raise ValueError(f"engine.deepspeed_json: {config.deepspeed_json} is no JSON object; give DeepSpeed's own format")
    zero = theirs.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, dict) else None
    if isinstance(offload, dict) and offload.get("device", "none") != "none" and not config.offload_optimizer:
        raise ValueError("engine.deepspeed_json: offload_optimizer is set there alone; set engine.offload_optimizer as well")
    for key in ("optimizer", "scheduler", "fp16", "amp"):
        if key in theirs:
            raise ValueError(f"engine.deepspeed_json: {key} is not read; remove it and set the run's optim and engine")
    return _merged(derived, theirs, at="engine.deepspeed_json")


def _merged(ours: dict[str, Any], theirs: dict[str, Any], at: str) -> dict[str, Any]:
    """Their keys over ours. A key that both set must agree; "auto", as in transformers' files, means ours."""
    merged = dict(ours)
    for key, value in theirs.items():
        mine = ours.get(key)
        if isinstance(mine, dict) and isinstance(value, dict):
            merged[key] = _merged(mine, value, at=f"{at}: {key}")
        elif key in ours and value not in (mine, "auto"):
            raise ValueError(
                f"{at}: {key} is {value} there and {mine} in the run; remove it there, or set it in the run alone"
            )
        elif value != "auto":
            merged[key] = value
    return merged


class Engine:
    """One trained module with its optimizer, averages and guard. Call it as the module, so that ZeRO can gather.

    Gradient accumulation is counted here: `step` after every micro-batch; each `accumulation`-th one updates.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optim: OptimConfig,
        config: EngineConfig,
        ema: EmaConfig,
        ranks: Ranks,
        batch_size: int,
        accumulation: int,
        total_steps: int,
    ) -> None:
        self.module, self.ranks = module, ranks
        self.optim, self.config, self.ema = optim, config, ema
        self.batch_size, self.accumulation, self.total_steps = batch_size, accumulation, total_steps
        self.guard = Guard()
        self.steps = self.images = 0  # optimizer steps tried, refused ones included, and the images that they saw
        self.last: Step | None = None
        self._loss = torch.zeros((), device=ranks.device)  # sum over the micro-batches of the running step
        self._micro = 0
        half = next((name for name, p in module.named_parameters() if p.requires_grad and p.dtype != torch.float32), None)
        if half is not None and config.zero == 0:
            raise ValueError(
                f"engine.zero is 0, where weights are updated as they are, and {half} has 16 bits, which lose most updates; "
                "set engine.zero to 1, or load it in float32 (decoder.dtype)"
            )
        if config.compile:
            compile_all(module)
        self._optimizer = adamw(module, optim)
        if config.precision == "bf16":  # inputs such as time stay float32; DeepSpeed switches an outer autocast off
            module.forward = torch.autocast(ranks.device.type, torch.bfloat16)(module.forward)
        settings = deepspeed_config(config, batch_size=batch_size, accumulation=accumulation, world=ranks.world)
        size = sum(p.numel() for p in module.parameters() if p.requires_grad)  # DeepSpeed makes a buffer of a bucket's size
        settings["zero_optimization"].setdefault("reduce_bucket_size", min(BUCKET, size))
        if config.zero < 3:  # else plain layers' gradients are rounded to bfloat16 and back
            settings["torch_autocast"].setdefault("lower_precision_safe_modules", [])
        self._engine = _initialize(module, self._optimizer, settings, config.timeout_seconds, ranks)
        self._shards = _Shards(self._engine, self._optimizer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        return self._engine(*args, **kwargs)

    def aside(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward in the engine's precision, for a pass of which only gradients with respect to its inputs are
        taken (`torch.autograd.grad`, all of it while `held_still`): the engine's own call would wait for a backward pass."""
        half = self.config.precision == "autocast"
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=half):
            return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this micro-batch's mean loss []."""
        self._loss += loss.detach()
        self._engine.backward(loss)

    def step(self) -> None:
        """Count one micro-batch; on the last of a step, update on all ranks together or on none."""
        self._micro += 1
        if self._micro < self.accumulation:
            self._engine.step()  # DeepSpeed only counts too
            return
        # DeepSpeed waits for the device here, to read the gradient norm; reading the loss adds no wait of its own.
        loss = self.ranks.sum(self._loss).item() / (self.accumulation * self.ranks.world)
        self.last = self._update(loss)
        self.guard.record(loss, self.last.objection)
        self.steps += 1
        self.images += self.batch_size
        if self.last.objection is None:
            self._shards.follow(decay(self.ema, images_seen=self.images, images=self.batch_size))
        self._loss.zero_()
        self._micro = 0

    def _update(self, loss: float) -> Step:
        """DeepSpeed's step at this step's learning rate, its effect withheld when the guard objects."""
        lr = learning_rate(self.optim, self.steps, self.total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = self._shards.whole_grad_norm() if self.config.zero == 0 else None
        objection = self.guard.objection(self.config.guard, loss, norm or 0.0)
        self._optimizer.withhold = objection is not None
        self._engine.step()
        if norm is None:  # known only now; infinite where DeepSpeed itself dropped the step
            norm = self._engine.get_global_grad_norm()
            assert norm is not None, "ZeRO 1 to 3 compute the norm"
            norm = float(norm)
            objection = objection or self.guard.objection(self.config.guard, loss, norm)
        return Step(loss, norm, lr, objection)

    @contextmanager
    def held_still(self) -> Iterator[None]:
        """Inside, no trained parameter asks for a gradient: `aside` saves nothing for theirs, and what is compiled computes
        none of it."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in trained:
                p.requires_grad_(True)

    @contextmanager
    def averaged(self, kind: str = "average") -> Iterator[nn.Module]:
        """The bare module, whole on every rank, in eval mode and float32, holding the averages, or another of KINDS; all
        ranks enter together."""
        mode = self.module.training
        with self._shards.whole(), torch.no_grad():
            averages = {id(p): self._shards.gather(p, kind).float() for _, p in self._shards.trained}
            state = [*self.module.parameters(), *self.module.buffers()]
            own = [tensor.data for tensor in state]
            for tensor in state:  # exchanged, not copied into: DeepSpeed's flat buffers behind them stay as they are
                tensor.data = averages.get(id(tensor), tensor.data.float() if tensor.is_floating_point() else tensor.data)
            self.module.eval()
            try:
                yield self.module
            finally:
                for tensor, data in zip(state, own, strict=True):
                    tensor.data = data
                self.module.train(mode)

    @contextmanager
    def averages_on_host(self, beside: Container[str]) -> Iterator[dict[str, Tensor]]:
        """The averages by name on the first rank, float32 in its host's memory, and none on the others, while the
        module's parameters that are named `beside` and do not train are whole; all ranks enter together. No device holds
        more of what trains than in a step."""
        held = dict(self.tensors("average", None if self.ranks.first else ()))
        with self._shards.whole(lambda name, p: name in beside and not p.requires_grad):
            yield held

    def tensors(self, kind: str, wanted: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 CPU copy) of one of KINDS, for every trained parameter or those that this rank wants; all ranks
        iterate together, to the end."""
        for name, p in self._shards.trained:
            whole = self._shards.gather(p, kind)
            if wanted is None or name in wanted:
                yield name, whole.to("cpu", torch.float32, copy=True)

    def load(self, read: Callable[[str, str], Tensor], counters: Mapping[str, Any]) -> None:
        """Take over the state that `read(kind, name)` and the counters give, whatever ranks and stage wrote it."""
        for name, p in self._shards.trained:
            self._shards.scatter(p, {kind: read(kind, name) for kind in KINDS})
        self._shards.set_step(counters["adam_step"])
        self.steps = counters["steps"]
        self.images = counters.get("images", self.steps * self.batch_size)  # older checkpoints did not count them
        self.guard = Guard(**counters["guard"])

    def counters(self) -> dict[str, Any]:
        """The small rest of the state, as JSON values."""
        return {
            "steps": self.steps,
            "images": self.images,
            "adam_step": self._shards.get_step(),
            "guard": asdict(self.guard),
        }

    def buffers(self) -> dict[str, Tensor]:
        """The module's persistent buffers by name; checkpoints keep rank 0's."""
        kept = self.module.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self.module.named_buffers() if name in kept}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of every trained parameter by name."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._shards.trained}


def _initialize(module: nn.Module, optimizer: AdamW, settings: dict[str, Any], timeout_seconds: float, ranks: Ranks):
    """The DeepSpeed engine, with what 0.19.8 needs before it starts (see the comments)."""
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)  # else it warns that it found no GPU
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import groups, logger

    # What 0.19.8 says of itself on every start: that it calls renamed collectives, and does not know our optimizer.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
    logger.addFilter(_not_about_our_optimizer)
    # A CPU kernel that training never calls; DeepSpeed would compile it for a minute and may hang on its lock.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, auto_mpi_discovery=False)
    if groups._WORLD_GROUP is None:  # its own clone of the world would ignore the timeout
        groups._WORLD_GROUP = dist.new_group(range(ranks.world), timeout=timedelta(seconds=timeout_seconds))
    module.to(ranks.device)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]


def _not_about_our_optimizer(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()


class _Shards:
    """Trained parameters by name, over the flat float32 tensors that each ZeRO stage cuts them into.

    Stage 0 keeps whole parameters; 1 and 2 one flat piece per parameter group and rank; 3 one per sub-group and rank.
    """

    def __init__(self, engine: Any, optimizer: AdamW) -> None:
        self.stage: int = engine.zero_optimization_stage()
        self.zero = engine.optimizer  # DeepSpeed's wrapper; at stage 0 the optimizer itself
        self.module: nn.Module = engine.module
        self.optimizer = optimizer
        self.trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        if self.stage == 0:
            self.flats: list[Tensor] = [p for _, p in self.trained]
        elif self.stage in (1, 2):
            self.flats = list(self.zero.single_partition_of_fp32_groups)
        else:
            self.flats = list(self.zero.fp32_partitioned_groups_flat)
        self._create_state()

    def _create_state(self) -> None:
        """AdamW's state now instead of at the first step, so that a checkpoint always has something to fill."""
        for flat in self.flats:
            self.optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
                "average": flat.detach().clone(),
            }
        if self.stage in (1, 2):  # 0.19.8 links after the first group's step, when later groups have no state yet
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def follow(self, keep: float) -> None:
        follow([self.optimizer.state[flat]["average"] for flat in self.flats], self.flats, keep)

    def get_step(self) -> int:
        return int(self.optimizer.state[self.flats[0]]["step"])

    def set_step(self, step: int) -> None:
        for flat in self.flats:
            self.optimizer.state[flat]["step"].fill_(step)

    def whole_grad_norm(self) -> float:
        """The norm of the reduced gradient at stage 0, where DeepSpeed clips by it but does not tell it."""
        grads = [p.grad for _, p in self.trained if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads).item()

    def gather(self, p: nn.Parameter, kind: str) -> Tensor:
        """One of KINDS of a parameter, whole, on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.stage == 0:
            return p.detach() if kind == "weights" else self.optimizer.state[p][kind]
        whole = safe_get_full_fp32_param(p) if kind == "weights" else safe_get_full_optimizer_state(p, kind)
        assert whole is not None, f"DeepSpeed holds no {kind} for a trained parameter"
        return whole

    @torch.no_grad()
    def scatter(self, p: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Set all KINDS of a parameter from whole CPU tensors."""
        if self.stage == 3:
            self._scatter_partitioned(p, state)
            return
        state = {kind: tensor.to(p.device) for kind, tensor in state.items()}
        p.copy_(state["weights"])
        for kind, tensor in state.items():
            if self.stage == 0 and kind != "weights":
                self.optimizer.state[p][kind].copy_(tensor)
            elif self.stage > 0:
                self._set_flat(p, tensor, kind)

    def _set_flat(self, p: nn.Parameter, whole: Tensor, kind: str) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind == "weights":
            safe_set_full_fp32_param(p, whole)
        else:
            safe_set_full_optimizer_state(p, whole, kind)

    def _scatter_partitioned(self, p: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Stage 3: this rank's part of the padded, flattened tensor; the whole-tensor setters fail on odd sizes."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        part: Tensor = p.ds_tensor  # pyright: ignore[reportAttributeAccessIssue] (DeepSpeed adds it)
        rank, world, size = dist.get_rank(), dist.get_world_size(), part.numel()

        def own(whole: Tensor) -> Tensor:
            padded = nn.functional.pad(whole.flatten(), (0, size * world - whole.numel()))
            return padded[size * rank : size * (rank + 1)].to(part.device)

        part.copy_(own(state["weights"]).view_as(part))
        if p.numel() == state["weights"].numel():  # a small parameter that stays whole on every rank
            p.copy_(state["weights"].to(p.device))
        for kind, tensor in state.items():
            if kind == "weights":
                safe_set_local_fp32_param(p, own(tensor))
            else:
                safe_set_local_optimizer_state(p, own(tensor), kind)

    @contextmanager
    def whole(self, wanted: Callable[[str, nn.Parameter], bool] = lambda name, p: True) -> Iterator[None]:
        """Parameters, or those of them that are wanted, whole on every rank and the module free of DeepSpeed's hooks, as
        sampling needs it."""
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        offload = self.zero.parameter_offload
        gathered = [p for name, p in self.module.named_parameters() if wanted(name, p)]
        with GatheredParameters(gathered, modifier_rank=None):
            offload._remove_module_hooks()
            offload.forward_hooks.clear()
            offload.backward_hooks.clear()
            try:
                yield
            finally:
                offload.setup_zero_stage3_hooks()
