"""Proof that an export works for somebody who has only Diffusers: a fresh process, plain classes, same images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.stock_files import left_out, pipeline_class


if TYPE_CHECKING:
    from torch import Tensor


TOLERANCE = 1e-4  # of images in [0, 1], float32

# Runs in the fresh process. It must not import this package: that is the point of it.
_SCRIPT = """
import inspect, json, sys
import diffusers, torch
from safetensors.torch import load_file, save_file

job = json.loads(sys.argv[1])
pipe = diffusers.DiffusionPipeline.from_pretrained(job["folder"], dtype=torch.float32, **job["without"])
pipe.set_progress_bar_config(disable=True)
pipe.watermark = None  # SDXL hides one in its images wherever a certain package is installed
if job["lora"]:
    pipe.load_lora_weights(job["lora"])
if job["scheduler"]:
    pipe.scheduler = getattr(diffusers, job["scheduler"][1]).from_pretrained(job["scheduler"][0])
call = {"num_inference_steps": job["steps"], "guidance_scale": job["guidance_scale"], "output_type": "np"}
accepted = inspect.signature(pipe.__call__).parameters
if "prompt" in accepted:
    call["prompt"] = job["prompts"]
else:
    call["class_labels"] = [int(p) if p.isdigit() else pipe.get_label_ids([p])[0] for p in job["prompts"]]
if "eta" in accepted:
    call["eta"] = job["eta"]
if job["size"] and "height" in accepted:
    call["height"] = call["width"] = job["size"]
if job["latents"]:
    call["latents"] = load_file(job["latents"])["latents"]
torch.manual_seed(job["seed"])
images = pipe(**call, generator=torch.Generator("cpu").manual_seed(job["seed"])).images
assert "stepdistill" not in sys.modules, "the check is not independent: stepdistill was imported"
save_file({"images": torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()}, job["output"])
"""


@dataclass(frozen=True)
class ImageRequest:
    """What a pipeline is asked for, so that two processes can be asked the same.

    Attributes:
        prompts: B texts, or class names or numbers for a class-conditional pipeline.
        steps: of the scheduler.
        guidance_scale: 1 for a distilled student.
        latents: unit-variance starting noise as the pipeline takes it, (B, C, h, w) for most. None lets the pipeline
            draw it first from the generator, which is the only way for DiTPipeline.
        seed: of the CPU generator that the pipeline is given, and of torch's own, from which DiTPipeline and
            flow-matching pipelines draw the noise between steps.
        eta: share of fresh noise between steps, for pipelines with such an argument and the sampler tcd.
        size: side of the images in pixels; None: what the pipeline makes of itself.
    """

    prompts: Sequence[str]
    steps: int
    guidance_scale: float = 1.0
    latents: Tensor | None = None
    seed: int = 0
    eta: float = 0.0
    size: int | None = None


class ExportMismatchError(RuntimeError):
    """The exported model does not give the images of the student in memory, or does not load at all."""


def verify_export(
    folder: str | Path,
    expected: Tensor,
    request: ImageRequest,
    *,
    lora: Path | None = None,
    tolerance: float = TOLERANCE,
) -> float:
    """Loads the export in a fresh Python process with plain Diffusers, on the CPU in float32, and compares images.

    Args:
        folder: the exported pipeline; with `lora`, the teacher's.
        expected: (B, 3, H, W) in [0, 1], made by the student in memory from the same noise.
        request: what to ask the pipeline for.
        lora: a folder written by `export_lora`; its scheduler is used if it holds one.
        tolerance: largest difference that passes.

    Returns:
        The largest absolute difference.

    Raises:
        ExportMismatchError: it did not load or run, has another shape, or differs by more than `tolerance`.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="stepdistill-verify-") as temporary:
        place = Path(temporary)
        latents = place / "latents.safetensors"
        job = {
            "folder": _absolute(folder),
            # With a LoRA it is a teacher's, where what only judges images may never have been downloaded.
            "without": left_out(pipeline_class(str(folder), None)) if lora else {},
            "lora": str(lora.resolve()) if lora else None,
            "scheduler": _lora_scheduler(lora) if lora else None,
            "prompts": list(request.prompts),
            "steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "latents": str(latents) if request.latents is not None else None,
            "seed": request.seed,
            "eta": request.eta,
            "size": request.size,
            "output": str(place / "images.safetensors"),
        }
        if request.latents is not None:
            save_file({"latents": request.latents.detach().float().cpu().contiguous()}, latents)
        _run(job, place)
        images = load_file(place / "images.safetensors")["images"]
    return _compare(images, expected.detach().float().cpu(), str(lora or folder), tolerance)


def _absolute(folder: str | Path) -> str:
    # A teacher may also be a hub id, which is not a path.
    return str(Path(folder).resolve()) if Path(folder).exists() else str(folder)


def _lora_scheduler(lora: Path) -> list[str] | None:
    """[folder, class name] of the scheduler that lies beside a LoRA."""
    config = lora.resolve() / "scheduler" / "scheduler_config.json"
    if not config.is_file():
        return None
    return [str(config.parent), json.loads(config.read_text())["_class_name"]]


def _run(job: Mapping[str, object], cwd: Path) -> None:
    # Offline: an export that needs the network is not complete. No CUDA: the comparison is exact on one device only.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(job)],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode != 0:
        tail = "\n".join(result.stderr.strip().splitlines()[-12:])
        raise ExportMismatchError(f"{job['lora'] or job['folder']}: does not run in plain Diffusers:\n{tail}")


def _compare(images: Tensor, expected: Tensor, name: str, tolerance: float) -> float:
    if images.shape != expected.shape:
        raise ExportMismatchError(f"{name}: gives images {tuple(images.shape)}, expected {tuple(expected.shape)}")
    difference = float((images - expected).abs().max())
    # "not <=" so that a NaN fails as well.
    if not difference <= tolerance:
        raise ExportMismatchError(
            f"{name}: a fresh process with plain Diffusers gives other images than the student in memory: "
            f"largest difference {difference:.2e}, allowed {tolerance:.0e}; do not publish this export"
        )
    return difference
