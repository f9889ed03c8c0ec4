"""Distilled models that are known by their names, and how their makers call them.

Files of these models say nothing about their schedule, so the name is all there is to go by; what is found here is a
guess and is told as one. Sources: the models' cards and the sampling code of their repositories.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


TRAILING = 'timestep_spacing="trailing"'


@dataclass(frozen=True)
class Published:
    """How a known model is called.

    Attributes:
        name: of the model.
        pattern: what its file or folder is called.
        scheduler: class in Diffusers.
        options: of the scheduler, as Python writes them.
        steps: network calls, if the name does not say.
        guidance: guidance_scale; 0 and 1 are the same for networks that do not take it as an input.
        remark: what else to know.
        extra: more arguments of the call, as Python writes them.
    """

    name: str
    pattern: str
    scheduler: str
    options: str = ""
    steps: int = 4
    guidance: float = 1.0
    remark: str = ""
    extra: str = ""


# The first whose pattern is found counts, so the narrower stand before the wider.
MODELS = (
    Published("LCM-LoRA", r"lcm[-_]?lora", "LCMScheduler", remark="2 to 8 steps; guidance up to 2 doubles the calls."),
    Published("LCM", r"\blcm|latent[-_]consistency", "LCMScheduler", guidance=8.0,
              remark="Full models take the guidance scale as an input, so 8 costs nothing and 0 is not 1."),
    Published("DMD2 for one step", r"dmd2?.*(1|one)[-_]?step", "LCMScheduler", steps=1, extra="timesteps=[399]",
              remark="Of the model for SDXL; other students have their own timestep."),
    Published("DMD2", r"dmd2", "LCMScheduler", extra="timesteps=[999, 749, 499, 249]"),
    Published("Hyper-SD, UNet for one step", r"hyper.*1[-_]?step.*unet", "LCMScheduler", steps=1,
              extra="timesteps=[800]"),
    Published("Hyper-SD, unified LoRA", r"hyper.*1[-_]?step", "TCDScheduler", steps=1, extra="eta=1.0",
              remark="1 to 8 steps, with a lower eta for more of them."),
    Published("Hyper-SD for flow models", r"hyper[-_]?(flux|sd3)", "FlowMatchEulerDiscreteScheduler", steps=8,
              guidance=3.5, remark="Fuse the LoRA with scale 0.125."),
    Published("Hyper-SD with guidance", r"hyper.*cfg", "DDIMScheduler", TRAILING, steps=8, guidance=5.0),
    Published("Hyper-SD", r"hyper[-_]?sd", "DDIMScheduler", TRAILING),
    Published("SDXL-Lightning for one step", r"lightning.*1[-_]?step", "EulerDiscreteScheduler",
              f'{TRAILING}, prediction_type="sample"', steps=1),
    Published("SDXL-Lightning", r"lightning", "EulerDiscreteScheduler", TRAILING,
              remark="Each file is for its own number of steps."),
    Published("SDXL-Turbo", r"sdxl[-_]?turbo", "EulerAncestralDiscreteScheduler", TRAILING, steps=1,
              remark="For 512 pixels."),
    Published("SD-Turbo", r"sd[-_]?turbo", "EulerDiscreteScheduler", TRAILING, steps=1, remark="For 512 pixels."),
    Published("TCD-LoRA", r"\btcd|_tcd", "TCDScheduler", extra="eta=0.3", remark="4 steps or more."),
    Published("PCM", r"\bpcm|_pcm|phased", "DDIMScheduler", TRAILING,
              remark="2 to 16 steps, by the file's name; TCDScheduler works too, DDPMScheduler does not."),
    Published("SANA-Sprint", r"sprint", "SCMScheduler", steps=2, guidance=4.5,
              remark="The network takes the guidance scale as an input."),
    Published("SwiftBrush", r"swift[-_]?brush", "LCMScheduler", steps=1,
              remark="Its repository calls the UNet once at the last timestep, without a scheduler."),
    Published("FLUX.1-schnell", r"schnell", "FlowMatchEulerDiscreteScheduler", guidance=0.0),
)  # fmt: skip


@dataclass(frozen=True)
class Recognised:
    """A known model, and the number of steps that the name says or its makers recommend.

    Attributes:
        model: the known one.
        steps: as above.
        fixed: it is for so many steps and no others, as its name or its timesteps say.
    """

    model: Published
    steps: int
    fixed: bool = False


def recognise(text: str) -> Recognised | None:
    """The known model that a file's or folder's name, or its metadata, speaks of; None if there is none."""
    lowered = text.lower()
    found = next((model for model in MODELS if re.search(model.pattern, lowered)), None)
    if found is None:
        return None
    told = re.search(r"(\d+)[-_ ]?steps?(?![a-z])", lowered)
    own = "timesteps" in found.extra
    steps = found.steps if told is None or own else int(told[1])
    return Recognised(found, steps, own or told is not None)
