"""Recommended calls, as values and as Python to copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.inspection.published import Published, Recognised


BASES = {
    "Stable Diffusion 1.x": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "Stable Diffusion XL": "stabilityai/stable-diffusion-xl-base-1.0",
}


@dataclass(frozen=True)
class Call:
    """How a model is called.

    Attributes:
        steps: num_inference_steps.
        guidance: guidance_scale.
        scheduler: class to exchange the pipeline's own for; None keeps it.
        options: of that class, as Python writes them.
        extra: more arguments of the call, as Python writes them.
    """

    steps: int
    guidance: float
    scheduler: str | None = None
    options: str = ""
    extra: str = ""

    def arguments(self) -> str:
        """Of the pipeline's call; a list of timesteps stands for the number of steps."""
        steps = "" if self.extra.startswith("timesteps") else f"num_inference_steps={self.steps}, "
        extra = f", {self.extra}" if self.extra else ""
        return f'"a prompt", {steps}guidance_scale={self.guidance:g}{extra}'


@dataclass(frozen=True)
class Guess:
    """A call, and what it is based on."""

    call: Call
    because: str


def from_facts(facts: Mapping[str, Any]) -> Call:
    """What distillation_config.json says."""
    eta = f"eta={facts['eta']:g}" if facts.get("eta") else ""
    return Call(int(facts["steps"]), float(facts.get("guidance_scale", 1.0)), extra=eta)


def from_name(found: Recognised | None) -> Guess | None:
    """How the makers of a known model call it."""
    if found is None:
        return None
    known: Published = found.model
    call = Call(found.steps, known.guidance, known.scheduler, known.options, known.extra)
    remark = f" {known.remark}" if known.remark else ""
    return Guess(call, f"By its name this is {known.name}; the call is that of its makers, not read from the file."
                       f"{remark}")  # fmt: skip


def pipeline_code(folder: Path, call: Call) -> str:
    """Of a folder that Diffusers loads."""
    return _code([], [f"pipe = DiffusionPipeline.from_pretrained({str(folder)!r})"], call)


def lora_code(file: Path, base: str, call: Call | None, *, own_scheduler: str | None) -> str | None:
    """Of a LoRA on top of its base; `own_scheduler` is the class of the one that lies beside it."""
    if call is None:
        return None
    lines = [_base_line(base), f"pipe.load_lora_weights({str(file.parent)!r}, weight_name={file.name!r})"]
    if own_scheduler is not None:
        lines.append(f'pipe.scheduler = {own_scheduler}.from_pretrained({str(file.parent)!r}, subfolder="scheduler")')
        return _code([own_scheduler], lines, Call(call.steps, call.guidance, extra=call.extra))
    return _code([], lines, call)


def network_code(file: Path, base: str, call: Call | None, *, whole: bool) -> str | None:
    """Of weights in one file: of a whole model, or of its denoising network."""
    if call is None:
        return None
    if whole:
        kind = "StableDiffusionXLPipeline" if base == "Stable Diffusion XL" else "StableDiffusionPipeline"
        lines = [f"pipe = {kind}.from_single_file({str(file)!r})"]
        return _code([kind], lines, call, loader=False)
    lines = [_base_line(base), f"pipe.unet.load_state_dict(load_file({str(file)!r}))"]
    return "from safetensors.torch import load_file\n" + _code([], lines, call)


def _base_line(base: str) -> str:
    path = BASES.get(base, "BASE")
    return f'pipe = DiffusionPipeline.from_pretrained("{path}")'


def _code(imports: list[str], lines: list[str], call: Call, *, loader: bool = True) -> str:
    names = {*imports, *(["DiffusionPipeline"] if loader else []), *([call.scheduler] if call.scheduler else [])}
    body = list(lines)
    if call.scheduler is not None:
        options = f", {call.options}" if call.options else ""
        body.append(f"pipe.scheduler = {call.scheduler}.from_config(pipe.scheduler.config{options})")
    body.append(f"image = pipe({call.arguments()}).images[0]")
    return "\n".join([f"from diffusers import {', '.join(sorted(names))}", "", *body])
