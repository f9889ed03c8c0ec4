"""Pictures of an exported model for people to look at: one file each, by plain Diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepdistill.attention import NAG, NASA, Rule, steer
from stepdistill.bench import generate
from stepdistill.errors import UserError
from stepdistill.hybrid import asked, model_called, watched
from stepdistill.routed import RoutedPipeline
from stepdistill.seeds import own_randomness
from stepdistill.trace import Trace


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from stepdistill.bench.generate import ModelUnderTest


@dataclass(frozen=True)
class Avoid:
    """What pictures are to keep away from, and how.

    Attributes:
        prompt: the negative prompt.
        rule: NASA or NAG, at one network call; None: the pipeline's own way, which needs guidance and a second call.
    """

    prompt: str
    rule: Rule | None = None

    @classmethod
    def of(cls, prompt: str | None, nasa: float | None, nag: float | None) -> Avoid | None:
        """What the options of the command line mean; None if nothing is to be avoided.

        Raises:
            UserError: they contradict each other.
        """
        if nasa is not None and nag is not None:
            raise UserError("--nasa and --nag are two ways to do the same; give one of them")
        rules: list[Rule] = [NASA(nasa)] if nasa is not None else [NAG(nag)] if nag is not None else []
        if prompt is None:
            if rules:
                raise UserError("--nasa and --nag say how strongly to avoid something; add --negative-prompt TEXT")
            return None
        return cls(prompt, *rules)


def draw(
    model: ModelUnderTest, prompts: Sequence[str], output: Path, *, avoid: Avoid | None = None, seed: int = 0,
    count: int = 1, device: str = "cpu", trace: bool = False,
) -> Iterator[Path]:  # fmt: skip
    """Writes `count` images of every prompt, each from noise that depends on (seed, prompt, number) alone.

    Args:
        model: how it is called.
        prompts: texts.
        output: folder, made if it is missing.
        avoid: a negative prompt for all images.
        seed: of the noise.
        count: images of each prompt.
        device: torch device.
        trace: writes for each prompt what every network call predicted, too.

    Yields:
        The files, as they are written.

    Raises:
        UserError: the model cannot be loaded or steered, or a negative prompt would have no effect.
    """
    _check_options(model, avoid)
    pipeline: Any = generate.load_pipeline(model, device=device)
    stock = pipeline.stock if isinstance(pipeline, RoutedPipeline) else pipeline
    steering: AbstractContextManager[object] = nullcontext()
    options: dict[str, Any] = generate.call_options(pipeline, model)
    if avoid is not None and avoid.rule is not None:
        steering = steer(stock, avoid.prompt, avoid.rule)
    elif avoid is not None:
        _check_it_acts(stock)
        options["negative_prompt"] = [avoid.prompt] * count
    output.mkdir(parents=True, exist_ok=True)
    seen = Trace()
    if trace:
        pipeline = watched(pipeline, seen)
    for number, prompt in enumerate(prompts):
        generators = [torch.Generator().manual_seed(generate.image_seed(seed, number, k)) for k in range(count)]
        with steering, own_randomness(generate.image_seed(seed, number, 0), torch.device(device)):
            images = pipeline(asked(pipeline, [prompt] * count), generator=generators, **options).images
        for k, image in enumerate(images):
            file = output / f"{number:03d}-{_slug(prompt)}-{seed}-{k}.png"
            image.save(file)
            yield file
        if trace:
            file = output / f"{number:03d}-{_slug(prompt)}-{seed}-trace.png"
            seen.picture(pipeline, count, images[0].size).save(file)
            seen.clear()
            yield file


def _check_options(model: ModelUnderTest, avoid: Avoid | None) -> None:
    """Raises UserError where a negative prompt would have no effect, or could not be put into effect."""
    if avoid is None:
        return
    if avoid.rule is not None and model.base is not None:
        raise UserError("--nasa and --nag steer one network, and with --base two make an image; leave them out, and "
                        "the negative prompt acts where guidance does (--base-guidance 3), or leave out "
                        "--base")  # fmt: skip
    scale = model.guidance_scale if model.base is None else max(model.guidance_scale, model.base_guidance)
    if avoid.rule is None and scale <= 1:
        remedy = "say how strongly it is to act, with --nasa 0.3 or --nag 2"
        remedy = remedy if model.base is None else "give the base some, with --base-guidance 3"
        raise UserError(f"a negative prompt does nothing at guidance scale {scale:g}; {remedy}")


def _check_it_acts(pipeline: DiffusionPipeline) -> None:
    """Raises UserError where the unconditional half of guidance, which a negative prompt replaces, is never called."""
    drawing = model_called(pipeline)
    if "negative_prompt" not in inspect.signature(drawing.__call__).parameters:
        raise UserError(f"{type(drawing).__name__} takes no negative prompt; leave it out")
    unet = pipeline.components.get("unet")
    if unet is not None and unet.config.get("time_cond_proj_dim") is not None:
        raise UserError("a negative prompt does nothing to a network that takes the guidance scale as an input; say "
                        "how strongly it is to act, with --nasa 0.3 or --nag 2")  # fmt: skip
    if type(drawing).__name__ == "FluxPipeline":
        raise UserError("a negative prompt does nothing to FLUX, whose guidance takes one network call; say how "
                        "strongly it is to act, with --nag 2")  # fmt: skip


def _slug(prompt: str) -> str:
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in prompt.lower()).split()
    return "-".join(words)[:60].rstrip("-") or "prompt"
