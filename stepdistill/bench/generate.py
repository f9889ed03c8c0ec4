"""Makes images with an exported model, and counts what they cost: network calls, milliseconds, memory."""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepdistill.assets import resolve_model_path
from stepdistill.bench.loading import check_size, leave_out_checks, open_pipeline, put_on_adapter
from stepdistill.bench.meter import Meter, metered, timed_parts
from stepdistill.bench.rows import one_by_one, own_noise
from stepdistill.errors import UserError, first_line
from stepdistill.hybrid import HybridPipeline, asked
from stepdistill.routed import RoutedNetwork
from stepdistill.seeds import own_randomness
from stepdistill.stock_files import loading_errors, reason


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "unipc": "UniPCMultistepScheduler",
}
FLOW_SCHEDULERS = {"euler": "FlowMatchEulerDiscreteScheduler", "lcm": "FlowMatchLCMScheduler"}
TRAILING = "-trailing"  # behind a scheduler's name: its steps are counted from the last timestep
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelUnderTest:
    """A Diffusers folder, and how it is to be called.

    Args:
        name: what tables and pictures call it.
        path: Diffusers folder, hub id, or one file of weights; "assets/..." is found also if bundled. Or a folder of
            images made elsewhere, prompt by prompt in order of their names: nothing below matters for those.
        steps: `num_inference_steps`.
        guidance_scale: 1 is no guidance, more doubles the network's batch.
        eta: share of fresh noise between steps, of models with a TCDScheduler; pipelines without such an argument do
            without it.
        lora: folder or file for `load_lora_weights`, on top of the pipeline.
        scheduler: None keeps the folder's own; else a name of `SCHEDULERS` (of a flow-matching model, of
            `FLOW_SCHEDULERS`), made from the folder's own configuration, "-trailing" behind it for that spacing; or
            the path of a folder with a scheduler_config.json.
        precision: "fp32", "bf16" or "fp16". Noise is drawn in it too, so compare models of one precision.
        train_seconds: what its training took, if known: carried into the report.
        base: folder or hub id of the model that makes the first steps, for hybrid sampling; None: there is none.
        base_replaces: how many of the model's steps the base does.
        base_steps: steps of the base; None: as many.
        base_guidance: the base's guidance scale.
        adapter: folder or file for `stepdistill.load_adapter`, on top of the pipeline; `guidance_scale` is then what
            the adapter is told, and the network's batch is not doubled.
        config: of one file of weights, the Diffusers folder or hub id whose other files it goes with; None asks the
            hub for what fits.
        rule: of several students whose prompts are divided by a function, that function: "package.module:name".
        timesteps: those that the model is called at, instead of the scheduler's for so many steps.
        height: of the images in pixels; None: the pipeline's own.
        width: the same.
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
    base: str | None = None
    base_replaces: int = 1
    base_steps: int | None = None
    base_guidance: float = 3.0
    adapter: str | None = None
    config: str | None = None
    rule: str | None = None
    timesteps: tuple[int, ...] | None = None
    height: int | None = None
    width: int | None = None

    @property
    def size_options(self) -> dict[str, int]:
        """The arguments of a pipeline's call that say how large its images are; none where it decides itself."""
        sides = {"height": self.height, "width": self.width}
        return {name: side for name, side in sides.items() if side is not None}


@dataclass(frozen=True)
class Generated:
    """Images (N, 3, H, W), float32 in [0, 1] on the CPU, prompt by prompt, and what one of them cost.

    `nfe`: network calls per image. `ms_per_image`: denoiser and decoder. `peak_gib`: None unless on CUDA. `times`:
    milliseconds per image in text encoders, denoiser and decoder.
    """

    images: Tensor
    nfe: float
    ms_per_image: float
    peak_gib: float | None
    times: Mapping[str, float] = field(default_factory=dict)


def load_pipeline(model: ModelUnderTest, *, device: str = "cpu", bare: bool = False) -> DiffusionPipeline:
    """Loads a model under test, from safetensors only.

    Args:
        model: as above.
        device: where it computes.
        bare: without safety checker and watermark, which measuring leaves out.

    Raises:
        UserError: if the folder, the LoRA or the scheduler cannot be loaded, or it makes no images of that size; the
            text names the model.
    """
    if model.precision not in PRECISIONS:
        raise UserError(f"{model.name}: precision {model.precision!r} is unknown; choose from {', '.join(PRECISIONS)}")
    path, dtype = resolve_model_path(model.path), PRECISIONS[model.precision]
    pipeline = _opened(model, path, dtype)
    if not {"prompt", "class_labels"} & set(inspect.signature(pipeline.__call__).parameters):
        raise UserError(f"{model.name}: {type(pipeline).__name__} takes neither a prompt nor a class; give a "
                        "model that draws what it is told")  # fmt: skip
    check_size(pipeline, model.size_options, model.name)
    if model.lora is not None:
        _load_lora(pipeline, model)
    if model.adapter is not None:
        put_on_adapter(pipeline, model.adapter, model.guidance_scale, model.name)
    if model.scheduler is not None:
        pipeline.scheduler = _scheduler(model, pipeline.scheduler)
    if bare:
        leave_out_checks(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        # The loader leaves some parts in the precision of their files, and they would not fit the others.
        if isinstance(part, nn.Module) and any(p.dtype != dtype for p in part.parameters()):
            part.to(dtype)
    return _with_base(pipeline.to(device), model, bare)


def _opened(model: ModelUnderTest, path: str, dtype: torch.dtype) -> Any:
    try:
        return open_pipeline(model, path, dtype)
    except UserError as error:
        if str(error).startswith(f"{model.name}: "):
            raise
        raise UserError(f"{model.name}: {error}") from error
    except loading_errors() as error:
        why = reason(path, error)
        raise UserError(f"{model.name}: {path} cannot be loaded as a Diffusers pipeline ({why})") from error


def _with_base(pipeline: Any, model: ModelUnderTest, bare: bool) -> Any:
    """The pipeline itself, or behind the model that makes its first steps."""
    if model.base is None:
        return pipeline
    plain = replace(model, path=model.base, lora=None, scheduler=None, adapter=None, config=None, base=None,
                    timesteps=None)  # fmt: skip
    base = load_pipeline(plain, device=str(pipeline.device), bare=bare)
    return HybridPipeline(base, pipeline, model.base_replaces, model.base_steps, model.base_guidance)


def call_options(pipeline: DiffusionPipeline, model: ModelUnderTest) -> dict[str, Any]:
    """Arguments of the pipeline's call that say how the model is sampled, and how large.

    Raises:
        UserError: the model is called at timesteps of its own, which the pipeline does not take.
    """
    accepted = inspect.signature(pipeline.__call__).parameters
    options: dict[str, Any] = {"num_inference_steps": model.steps}
    if model.timesteps is not None:
        if "timesteps" not in accepted:
            raise UserError(f"{model.name}: {type(pipeline).__name__} takes no timesteps; leave them out")
        options = {"timesteps": list(model.timesteps)}
    options |= {"guidance_scale": model.guidance_scale if model.adapter is None else 1.0, **model.size_options}
    return {**options, "eta": model.eta} if "eta" in accepted else options


def _load_lora(pipeline: DiffusionPipeline, model: ModelUnderTest) -> None:
    try:
        pipeline.load_lora_weights(model.lora, use_safetensors=True)
    except AttributeError as error:
        kind = type(pipeline).__name__
        raise UserError(f"{model.name}: {kind} cannot load LoRA weights; give a folder with merged ones") from error
    except loading_errors() as error:
        why = first_line(error)
        raise UserError(f"{model.name}: {model.lora} cannot be loaded as LoRA weights ({why})") from error


def _scheduler(model: ModelUnderTest, present: Any) -> Any:
    """The scheduler that replaces the folder's own: a named one with its configuration, or one read from a folder."""
    import diffusers

    table = FLOW_SCHEDULERS if type(present).__name__.startswith("FlowMatch") else SCHEDULERS
    word = str(model.scheduler).removesuffix(TRAILING)
    if word in table and (word == model.scheduler or table is SCHEDULERS):
        spacing = {"timestep_spacing": "trailing"} if word != model.scheduler else {}
        return getattr(diffusers, table[word]).from_config(present.config, **spacing)
    path = Path(str(model.scheduler)) / "scheduler_config.json"
    if not path.is_file():
        raise UserError(
            f"{model.name}: scheduler {model.scheduler!r} is neither one of {', '.join(table)} nor a folder with "
            "a scheduler_config.json"
        )
    own = json.loads(path.read_text(encoding="utf-8"))
    return getattr(diffusers, own["_class_name"]).from_config(own)


def image_seed(seed: int, prompt: int, image: int) -> int:
    """The noise seed of one image: a function of these numbers alone, so that batches and models share it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt}/{image}".encode()).digest()[:7], "big")


Job = tuple[int, int]  # number of the prompt, number of its image


@dataclass(frozen=True)
class Painter:
    """Makes images of jobs with a loaded pipeline, each from its own random generator.

    A generator is seeded by (seed, number of the prompt, number of the image) alone and lives on the CPU, so that but
    for rounding the images depend neither on the batch size nor on the device's generator; `exact` rounds alike too.

    Args:
        pipeline: from `load_pipeline`.
        model: says how many steps at which guidance scale.
        prompts: texts of all prompts.
        seed: of the noise.
        exact: compute the rows of a batch one by one, so that an image has the same bits in every batch.
    """

    pipeline: DiffusionPipeline
    model: ModelUnderTest
    prompts: Sequence[str]
    seed: int = 0
    exact: bool = False

    @torch.no_grad()
    def __call__(self, jobs: Sequence[Job]) -> Tensor:
        """Images (B, 3, H, W) of the jobs, float32 in [0, 1] on the CPU."""
        pipeline, options = self.pipeline, call_options(self.pipeline, self.model)
        generators = [torch.Generator().manual_seed(image_seed(self.seed, p, k)) for p, k in jobs]
        rows: AbstractContextManager[None] = nullcontext()
        if self.exact:
            rows = one_by_one(self._modules())
        # A scheduler without generators draws the noise between steps from torch's own.
        own = own_randomness(image_seed(self.seed, *jobs[0]), pipeline.device)
        with own, own_noise(pipeline.components["scheduler"], generators), rows:
            made: Tensor = pipeline(
                asked(pipeline, [self.prompts[p] for p, _ in jobs]), generator=generators, output_type="pt", **options
            ).images
        return made.float().cpu()

    def _modules(self) -> list[nn.Module]:
        """Everything that computes on a batch."""
        if self.model.adapter is not None:
            raise UserError(f"{self.model.name}: an adapter is told about whole batches, so they cannot be computed "
                            "row by row; leave out --exact")  # fmt: skip
        parts = [part for _, part in timed_parts(self.pipeline)]
        vae = self.pipeline.components.get("vae")
        parts += [] if vae is None else [part for name, part in vae.named_children() if name.startswith("post_quant")]
        # Which of several students a row belongs to is settled for the whole batch; each of them then computes alone.
        return [one for part in parts for one in (part.networks if isinstance(part, RoutedNetwork) else [part])]


@dataclass
class Cost:
    """What batches have cost so far: network calls of all of them, seconds of those that are timed."""

    made: int = 0
    rows: int = 0
    timed: int = 0
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, other: Cost) -> None:
        """Takes in what other batches have cost."""
        self.made, self.rows = self.made + other.made, self.rows + other.rows
        self.timed, self.seconds = self.timed + other.timed, self.seconds + other.seconds
        self.parts = {name: self.parts.get(name, 0.0) + spent for name, spent in other.parts.items()}

    @property
    def nfe(self) -> float:
        """Network calls per image."""
        return self.rows / self.made

    @property
    def times(self) -> dict[str, float]:
        """Milliseconds per image of each part."""
        return {name: 1000 * spent / self.timed for name, spent in self.parts.items()} if self.timed else {}

    @property
    def ms_per_image(self) -> float:
        """Milliseconds per image without the text encoders."""
        return 1000 * (self.seconds - self.parts.get("text", 0.0)) / self.timed


def paint(painter: Painter, jobs: Sequence[Job], meter: Meter, *, timed: bool) -> tuple[Tensor, Cost]:
    """One batch, and what it cost; the seconds only if they are to be counted."""
    meter.take()
    rows, began = meter.rows, meter.now()
    images = painter(jobs)
    cost = Cost(made=len(jobs), rows=meter.rows - rows)
    if timed:
        cost.timed, cost.seconds, cost.parts = len(jobs), meter.now() - began, meter.take()
    return images, cost


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
    """Makes `images_per_prompt` images of every prompt, as `Painter` does.

    Time leaves out the text encoders and a first batch, which also pays for warming up; if there is only one batch it
    runs twice.

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
    painter, device = Painter(pipeline, model, prompts, seed), str(pipeline.device)
    reset_peak(device)
    if len(batches) == 1:
        painter(batches[0])
    images, total = [], Cost()
    with metered(pipeline) as meter:
        for number, batch in enumerate(batches):
            made, cost = paint(painter, batch, meter, timed=bool(number) or len(batches) == 1)
            images.append(made)
            total.add(cost)
            if on_progress is not None:
                on_progress(total.made, len(jobs))
    return Generated(torch.cat(images), total.nfe, total.ms_per_image, peak_gib(device), total.times)


def reset_peak(device: str) -> None:
    """Begins to watch the accelerator's memory anew."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def allocated(device: str) -> int:
    """Bytes of the accelerator's memory that are in use now; 0 unless on CUDA."""
    if not device.startswith("cuda"):
        return 0
    gc.collect()  # a model that is done with may still be held by cycles
    return torch.cuda.memory_allocated(device)


def peak_gib(device: str, beyond: int = 0) -> float | None:
    """The most memory since `reset_peak`, less so many bytes that were in use before; None unless on CUDA."""
    return (torch.cuda.max_memory_allocated(device) - beyond) / 2**30 if device.startswith("cuda") else None
