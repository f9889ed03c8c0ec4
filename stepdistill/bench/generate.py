"""Makes images with an exported model, and counts what they cost: network calls, milliseconds, memory."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepdistill.assets import resolve_model_path
from stepdistill.errors import UserError
from stepdistill.seeds import own_randomness


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "lcm": "LCMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
FLOW_SCHEDULERS = {"euler": "FlowMatchEulerDiscreteScheduler", "lcm": "FlowMatchLCMScheduler"}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelUnderTest:
    """A Diffusers folder, and how it is to be called.

    Args:
        name: what tables and pictures call it.
        path: Diffusers folder or hub id; "assets/..." is found also if bundled.
        steps: `num_inference_steps`.
        guidance_scale: 1 is no guidance, more doubles the network's batch.
        eta: share of fresh noise between steps, of models with a TCDScheduler; pipelines without such an argument do
            without it.
        lora: folder or file for `load_lora_weights`, on top of the pipeline.
        scheduler: None keeps the folder's own; else a name of `SCHEDULERS` (of a flow-matching model, of
            `FLOW_SCHEDULERS`), made from the folder's own configuration, or the path of a folder with a
            scheduler_config.json.
        precision: "fp32", "bf16" or "fp16". Noise is drawn in it too, so compare models of one precision.
        train_seconds: what its training took, if known: carried into the report.
    """

    name: str
    path: str
    steps: int
    guidance_scale: float
    lora: str | None = None
    scheduler: str | None = None
    precision: str = "fp32"
    train_seconds: float | None = None
    eta: float = 0.0


@dataclass(frozen=True)
class Generated:
    """Images (N, 3, H, W), float32 in [0, 1] on the CPU, prompt by prompt, and what one of them cost.

    `nfe`: network calls per image. `ms_per_image`: denoiser and decoder. `peak_gib`: None unless on CUDA.
    """

    images: Tensor
    nfe: float
    ms_per_image: float
    peak_gib: float | None


def load_pipeline(model: ModelUnderTest, *, device: str = "cpu") -> DiffusionPipeline:
    """Loads a model under test, from safetensors only.

    Raises:
        UserError: if the folder, the LoRA or the scheduler cannot be loaded; the text names the model.
    """
    from diffusers import DiffusionPipeline

    if model.precision not in PRECISIONS:
        raise UserError(f"{model.name}: precision {model.precision!r} is unknown; choose from {', '.join(PRECISIONS)}")
    path = resolve_model_path(model.path)
    try:
        pipeline = DiffusionPipeline.from_pretrained(path, dtype=PRECISIONS[model.precision], use_safetensors=True)
    except (OSError, ValueError, AttributeError) as error:
        reason = _first_line(error)
        raise UserError(f"{model.name}: {path} cannot be loaded as a Diffusers pipeline ({reason})") from error
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise UserError(f"{model.name}: {type(pipeline).__name__} takes no prompt; the benchmark needs text-to-image")
    if model.lora is not None:
        _load_lora(pipeline, model)
    if model.scheduler is not None:
        pipeline.scheduler = _scheduler(model, pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        # The loader leaves some parts in the precision of their files, and they would not fit the others.
        if isinstance(part, nn.Module) and any(p.dtype != PRECISIONS[model.precision] for p in part.parameters()):
            part.to(PRECISIONS[model.precision])
    return pipeline.to(device)


def call_options(pipeline: DiffusionPipeline, model: ModelUnderTest) -> dict[str, float]:
    """Arguments of the pipeline's call that say how the model is sampled."""
    options = {"num_inference_steps": model.steps, "guidance_scale": model.guidance_scale}
    return {**options, "eta": model.eta} if "eta" in inspect.signature(pipeline.__call__).parameters else options


def _load_lora(pipeline: DiffusionPipeline, model: ModelUnderTest) -> None:
    try:
        pipeline.load_lora_weights(model.lora, use_safetensors=True)
    except AttributeError as error:
        kind = type(pipeline).__name__
        raise UserError(f"{model.name}: {kind} cannot load LoRA weights; give a folder with merged ones") from error
    except (OSError, ValueError) as error:
        reason = _first_line(error)
        raise UserError(f"{model.name}: {model.lora} cannot be loaded as LoRA weights ({reason})") from error


def _scheduler(model: ModelUnderTest, present: Any) -> Any:
    """The scheduler that replaces the folder's own: a named one with its configuration, or one read from a folder."""
    import diffusers

    table = FLOW_SCHEDULERS if type(present).__name__.startswith("FlowMatch") else SCHEDULERS
    if model.scheduler in table:
        return getattr(diffusers, table[model.scheduler]).from_config(present.config)
    path = Path(str(model.scheduler)) / "scheduler_config.json"
    if not path.is_file():
        raise UserError(
            f"{model.name}: scheduler {model.scheduler!r} is neither one of {', '.join(table)} nor a folder with "
            "a scheduler_config.json"
        )
    own = json.loads(path.read_text(encoding="utf-8"))
    return getattr(diffusers, own["_class_name"]).from_config(own)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def image_seed(seed: int, prompt: int, image: int) -> int:
    """The noise seed of one image: a function of these numbers alone, so that batches and models share it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt}/{image}".encode()).digest()[:7], "big")


@dataclass
class _Meter:
    """Counts denoiser rows, and seconds that are not the denoiser's or the decoder's."""

    device: str
    rows: int = 0
    text_seconds: float = 0.0
    _began: list[float] = field(default_factory=list)

    def now(self) -> float:
        """Seconds, with all work on the device done."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the denoiser: a batch of 2B counts 2B calls, which is what guidance costs."""
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        if not isinstance(sample, Tensor):
            raise TypeError(f"cannot count calls of {type(module).__name__}: no argument sample or hidden_states")
        self.rows += len(sample)

    def text_begins(self, *_: Any) -> None:
        """Forward pre-hook of a text encoder."""
        self._began.append(self.now())

    def text_ends(self, *_: Any) -> None:
        """Forward hook of a text encoder."""
        self.text_seconds += self.now() - self._began.pop()


@contextmanager
def _metered(pipeline: DiffusionPipeline, device: str) -> Iterator[_Meter]:
    """Hooks a meter into a pipeline's denoiser and text encoders for as long as the context lasts."""
    meter, parts = _Meter(device), pipeline.components
    denoiser = parts.get("unet") or parts.get("transformer")
    if denoiser is None:
        raise UserError(f"{type(pipeline).__name__} has neither unet nor transformer, so its calls cannot be counted")
    handles = [denoiser.register_forward_hook(meter.count, with_kwargs=True)]
    for name, part in parts.items():
        if name.startswith("text_encoder") and part is not None:
            handles += [part.register_forward_pre_hook(meter.text_begins), part.register_forward_hook(meter.text_ends)]
    try:
        yield meter
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def generate_images(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    model: ModelUnderTest,
    images_per_prompt: int,
    seed: int = 0,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> Generated:
    """Makes `images_per_prompt` images of every prompt, each from its own random generator.

    A generator is seeded by (seed, number of the prompt, number of the image) alone and lives on the CPU, so that the
    images depend neither on the batch size nor on the device's generator; where a pipeline draws the noise between
    steps without its generators, on the batch size only. Time leaves out the text encoders and a
    first batch, which also pays for warming up; if there is only one batch it runs twice.

    Args:
        pipeline: from `load_pipeline`.
        prompts: texts.
        model: says how many steps at which guidance scale.
        images_per_prompt: K.
        seed: of the noise.
        batch_size: images per call.
        on_progress: gets the numbers of images done and to do.
    """
    jobs = [(p, k) for p in range(len(prompts)) for k in range(images_per_prompt)]
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    device, options = str(pipeline.device), call_options(pipeline, model)

    def make(batch: list[tuple[int, int]]) -> Tensor:
        generators = [torch.Generator().manual_seed(image_seed(seed, p, k)) for p, k in batch]
        # Some pipelines hand their generators to the first noise alone, and draw the noise between steps from torch's.
        with own_randomness(image_seed(seed, *batch[0]), pipeline.device):
            images: Tensor = pipeline(
                [prompts[p] for p, _ in batch], generator=generators, output_type="pt", **options
            ).images
        return images.float().cpu()

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    if len(batches) == 1:
        make(batches[0])
    images: list[Tensor] = []
    seconds, timed = 0.0, 0
    with _metered(pipeline, device) as meter:
        for number, batch in enumerate(batches):
            began, text = meter.now(), meter.text_seconds
            images.append(make(batch))
            if number or len(batches) == 1:
                seconds += meter.now() - began - (meter.text_seconds - text)
                timed += len(batch)
            if on_progress is not None:
                on_progress(min((number + 1) * batch_size, len(jobs)), len(jobs))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.startswith("cuda") else None
    return Generated(torch.cat(images), meter.rows / len(jobs), 1000 * seconds / timed, peak)
