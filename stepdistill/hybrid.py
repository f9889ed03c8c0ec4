"""Hybrid sampling: the base model makes the first step or steps of an image, its few-step student the others.

A student settles what an image shows in its first step, and settles it alike for every noise; the model that it was
made from does not. Gandikota and Bau 2025, "Distilling diversity and control in diffusion models", arXiv 2503.10637.
Nothing is trained, and both models are stock pipelines, called as such. Letters: B rows, C channels, H height, W
width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.labels import class_label
from stepdistill.routed import RoutedPipeline
from stepdistill.schedule import even_sigmas, flow_schedule
from stepdistill.stretch import Stretch, Watch, is_flow, levels


_SAME_SIGMA = 1e-3  # noise levels of two schedulers for one table differ by rounding alone


class Handover(NamedTuple):
    """Where the student takes over.

    Attributes:
        timestep: the first that the student is called at, as its scheduler numbers it.
        scale: what the student's scheduler multiplies its latents by there, to get alpha x0 + sigma eps; 1 for most.
    """

    timestep: float
    scale: float


@dataclass(frozen=True)
class HybridPipeline:
    """Two stock pipelines of one latent space, called as one.

        both = HybridPipeline(base, student, base_guidance=3.0)
        both(["a red circle"], num_inference_steps=4, guidance_scale=1).images

    The student is called as ever, but for its first `replaces` steps; the base model walks from pure noise to the very
    noise level where the student goes on, with even deterministic steps. An image costs `base_steps` network calls,
    doubled by guidance, and the student's steps less `replaces`: at the defaults, one more than the student alone.

    Args:
        base: usually the student's teacher; also with a LoRA or another fine-tuning on it.
        student: a few-step model with its own scheduler.
        replaces: how many of the student's steps the base model does; at least one is left.
        base_steps: steps of the base model; None: as many as it replaces.
        base_guidance: the base model's guidance scale, 1 = none.
        watch: is told about every network call.

    Raises:
        UserError: the two do not share a latent space or noise levels.
    """

    base: Any
    student: Any
    replaces: int = 1
    base_steps: int | None = None
    base_guidance: float = 3.0
    watch: Watch | None = None

    def __post_init__(self) -> None:
        if self.replaces < 1 or self.num_base_steps < 1:
            raise UserError(f"hybrid sampling: the base model does {self.num_base_steps} steps in place of "
                            f"{self.replaces} of the student's; both are at least 1")  # fmt: skip
        if is_flow(self.base.scheduler) != is_flow(self.student.scheduler):
            raise UserError("hybrid sampling: one model is of flow matching and the other is not; give the student's "
                            "own teacher as its base")  # fmt: skip
        configs = [pipeline.components["vae"].config for pipeline in (self.base, self.student)]
        spaces = [(config.latent_channels, config.scaling_factor) for config in configs]
        if spaces[0] != spaces[1]:
            raise UserError(f"hybrid sampling: the latents differ (channels and scale: {spaces[0]} of the base model, "
                            f"{spaces[1]} of the student); give the student's own teacher as its base")  # fmt: skip

    @property
    def num_base_steps(self) -> int:
        """Steps of the base model."""
        return self.replaces if self.base_steps is None else self.base_steps

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        device: torch.device = self.student.device
        return device

    @property
    def scheduler(self) -> Any:
        """The student's; the base model's own says no more than its noise levels."""
        return self.student.scheduler

    @property
    def components(self) -> dict[str, Any]:
        """The student's parts, and as `unet_of_base` and so on those of the base model that are not the student's."""
        own = self.student.components
        others = {name: part for name, part in self.base.components.items() if part is not own.get(name)}
        return {**own, **{f"{name}_of_base": part for name, part in others.items()}}

    def __call__(
        self,
        prompts: Sequence[Any],
        *,
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        eta: float | None = None,
        generator: Any = None,
        output_type: str = "pil",
        **options: Any,
    ) -> Any:
        """What the student's pipeline returns.

        Args:
            prompts: texts; class numbers for a DiTPipeline.
            num_inference_steps: of the student's schedule, those that the base model does included.
            guidance_scale: the student's.
            eta: the student's, if its pipeline has such an argument.
            generator: of the noise, first the base model's and then the student's.
            output_type: what images come as.
            options: other arguments of both pipelines' calls.

        Raises:
            UserError: no step would be left to the student, or the noise levels of the two differ.
        """
        handover = self._handover(num_inference_steps)
        latents = self._begin(prompts, handover, generator=generator, **options)
        accepted = _arguments(self.student)
        if eta is not None and "eta" in accepted:
            options["eta"] = eta
        # A pipeline without an argument for latents finds them where its scheduler should scale its noise.
        entry = None if "latents" in accepted else latents[: len(prompts)]
        if entry is None:
            options["latents"] = latents / handover.scale
        scheduler = Stretch(self.student.scheduler, start=self.replaces, entry=entry, watch=self.watch)
        return led(self.student, scheduler)(
            prompts, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, generator=generator,
            output_type=output_type, **options,
        )  # fmt: skip

    def _begin(self, prompts: Sequence[Any], handover: Handover, **options: Any) -> Tensor:
        """Noise => what the student is to go on from, alpha x0 + sigma eps, (B, C, H, W)."""
        # Where the base model's shift follows from the size of the images, the student has the one for this size.
        sizes = self.base.scheduler.config.get("use_dynamic_shifting")
        bent = self.student.scheduler if sizes else self.base.scheduler
        steps, times = self.num_base_steps, _grid(bent, handover.timestep, self.num_base_steps)
        watch = self.watch
        scheduler = Stretch(
            _walking(self.base.scheduler), stop=steps,
            grid={"sigmas" if is_flow(self.base.scheduler) else "timesteps": times},
            watch=None if watch is None else lambda seen: watch(seen._replace(base=True)),
        )  # fmt: skip
        led(self.base, scheduler)(
            prompts, num_inference_steps=steps, guidance_scale=self.base_guidance, output_type="latent", **options
        )
        assert scheduler.latents is not None
        return scheduler.latents

    def _handover(self, num_steps: int) -> Handover:
        if self.replaces >= num_steps:
            raise UserError(f"hybrid sampling: the base model is to do {self.replaces} of the student's {num_steps} "
                            "steps and would leave it none; the student needs at least one more")  # fmt: skip
        scheduler = copy.deepcopy(self.student.scheduler)
        if scheduler.config.get("use_dynamic_shifting"):
            raise UserError("hybrid sampling: the student's scheduler shifts its noise levels by the size of images; "
                            "give it use_dynamic_shifting: false and the shift that it was trained with")  # fmt: skip
        scheduler.set_timesteps(num_steps, **({"sigmas": even_sigmas(num_steps)} if _is_flux(self.student) else {}))
        timestep = scheduler.timesteps[self.replaces]
        scale = 1.0 if is_flow(scheduler) else float(scheduler.scale_model_input(torch.ones(1), timestep))
        sigmas = [float(levels(one, float(timestep))[1]) for one in (self.base.scheduler, scheduler)]
        if not abs(sigmas[0] - sigmas[1]) <= _SAME_SIGMA:
            raise UserError(f"hybrid sampling: at timestep {float(timestep):g} the noise level is {sigmas[0]:.4f} for "
                            f"the base model and {sigmas[1]:.4f} for the student; give the student's own teacher as "
                            "its base")  # fmt: skip
        return Handover(float(timestep), scale)


def model_called(pipeline: Any) -> Any:
    """A stock, hybrid or routed pipeline, or the student of a hybrid one, which takes what the hybrid one is given."""
    return pipeline.student if isinstance(pipeline, HybridPipeline) else pipeline


def asked(pipeline: Any, prompts: Sequence[str]) -> list[Any]:
    """What a pipeline is called with for these prompts: the texts, or for a `DiTPipeline` the numbers of the classes.

    Args:
        pipeline: a stock, hybrid or routed one; of a hybrid one, both models take the same.
        prompts: texts, numbers or names of classes.

    Raises:
        UserError: there is no such class.
    """
    drawing = model_called(pipeline)
    if type(drawing).__name__ != "DiTPipeline":
        return list(prompts)
    return [class_label(drawing, prompt) for prompt in prompts]


def watched(pipeline: Any, watch: Watch) -> Any:
    """The same pipeline, stock, hybrid or routed, which tells about every network call; its images stay the same."""
    if isinstance(pipeline, HybridPipeline):
        return replace(pipeline, watch=watch)
    return led(pipeline, Stretch(pipeline.scheduler, watch=watch))


def led(pipeline: Any, scheduler: Any) -> Any:
    """The same pipeline, networks shared, with another scheduler; the one that is given stays as it is."""
    shown = copy.copy(pipeline)
    if isinstance(pipeline, RoutedPipeline):
        shown.stock = led(pipeline.stock, scheduler)
    else:
        shown.register_modules(scheduler=scheduler)
    return shown


def _arguments(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """What a stock pipeline's call accepts; students that share one are called through it."""
    stock = pipeline.stock if isinstance(pipeline, RoutedPipeline) else pipeline
    return inspect.signature(stock.__call__).parameters


def _is_flux(pipeline: Any) -> bool:
    """Whether a pipeline gives its scheduler sigmas of its own to shift, as FLUX's does."""
    stock = pipeline.stock if isinstance(pipeline, RoutedPipeline) else pipeline
    return type(stock).__name__ == "FluxPipeline"


def _walking(scheduler: Any) -> Any:
    """A stock scheduler with the noise levels of this one, that makes deterministic steps between any of them.

    DPM-Solver++ of first order is DDIM (Lu et al. 2022, arXiv 2211.01095, section 4), and DDIMScheduler itself goes
    from one multiple of its own spacing to the next alone. Of the other options none is inherited.
    """
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    if is_flow(scheduler):
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=scheduler.config.num_train_timesteps, shift=1.0)
    return DPMSolverMultistepScheduler.from_config(
        scheduler.config, solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero", thresholding=False,
        variance_type=None, use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False,
        use_lu_lambdas=False, use_flow_sigmas=False,
    )  # fmt: skip


def _grid(scheduler: Any, timestep: float, steps: int) -> list[float]:
    """Even times from pure noise to a timestep, both included: timesteps, or sigmas of a flow-matching scheduler.

    The authors' code stops its base model at whichever of its own timesteps is nearest; this one stops at the very
    level where the student goes on.

    Raises:
        UserError: more steps than there are timesteps.
    """
    flow = flow_schedule({**scheduler.config, "_class_name": type(scheduler).__name__})
    if flow is not None:
        # Even in the time that the teacher's shift bends, as its own sampler's steps are.
        last = float(flow.t_from_model_time(torch.tensor(timestep)))
        sigmas: list[float] = flow.sigma(torch.linspace(1, last, steps + 1, dtype=torch.float64)).tolist()
        return sigmas
    first = scheduler.config.num_train_timesteps - 1
    times: list[float] = torch.linspace(first, timestep, steps + 1, dtype=torch.float64).round().int().tolist()
    if any(a <= b for a, b in pairwise(times)):
        raise UserError(f"hybrid sampling: the base model has no {steps} timesteps from {first} to {timestep:g}; give "
                        "it fewer steps")  # fmt: skip
    return times
