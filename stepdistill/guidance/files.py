"""A guidance adapter as one safetensors file, and the one call that puts it on a stock pipeline.

`load_adapter(pipe, "adapter.safetensors", guidance=3.0)`, then `pipe("a red circle", guidance_scale=1)`: one network
call a step. What it returns has a `guidance` to set and a `remove` to call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.guidance import ADAPTER_FILE, HEADER
from stepdistill.guidance.attached import AttachedAdapter, Guidance, adapters_of
from stepdistill.guidance.modules import AdapterSettings, AttentionShape, GuidanceAdapter
from stepdistill.guidance.wiring import wiring_of


FORMAT = 1  # of the file


def build_adapter(network: nn.Module, settings: AdapterSettings, seed: int) -> GuidanceAdapter:
    """A fresh adapter for a network, on its device, in float32; its first values are a function of the seed.

    Raises:
        UserError: adapters are not made for this network.
    """
    device = next(network.parameters()).device
    if device.type == "meta":  # weights that wait elsewhere until they are needed; the adapter follows the call
        device = torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = GuidanceAdapter(settings, wiring_of(network).shape(network))
    return adapter.to(device).requires_grad_(False).eval()


def save_adapter(
    file: Path, network: nn.Module, settings: AdapterSettings, tensors: Mapping[str, Tensor], *, guidance: float
) -> None:
    """Writes one file: the adapter's tensors, and in its header what it fits and how it is called.

    Args:
        file: to write.
        network: what it was trained beside.
        settings: size and form.
        tensors: of a `GuidanceAdapter`, buffers included.
        guidance: the scale that it has until it is given another.
    """
    header = {
        "format": FORMAT, "network": type(network).__name__, "settings": asdict(settings),
        "shape": asdict(wiring_of(network).shape(network)), "guidance": guidance,
    }  # fmt: skip
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, file, metadata={HEADER: json.dumps(header)})


def load_adapter(pipeline: Any, path: str | Path, *, guidance: Guidance | None = None) -> AttachedAdapter:
    """Puts a guidance adapter on a loaded stock pipeline, whose class and weights stay as they are.

    It fits every checkpoint of the architecture that it was trained on, with or without LoRAs.

    Args:
        pipeline: a Diffusers pipeline; call it with guidance_scale=1.
        path: the file, or the folder that it is in.
        guidance: standard scale, or one for each image of a call; None: the one in the file.

    Returns:
        The adapter at work: set its `guidance` at any time; `remove` takes it off again.

    Raises:
        UserError: the file is no adapter, is one for another architecture, or the pipeline has one already.
    """
    network = pipeline.components.get("unet") or pipeline.components.get("transformer")
    if not isinstance(network, nn.Module):
        raise UserError(f"{type(pipeline).__name__} has neither unet nor transformer, so it cannot have an adapter")
    file = Path(path) / ADAPTER_FILE if Path(path).is_dir() else Path(path)
    header, tensors = _read(file)
    _check_fits(file, header, network)
    if adapters_of(network):
        raise UserError(f"this pipeline has a guidance adapter already, and both would act; remove() it before {file} "
                        "is loaded")  # fmt: skip
    adapter = build_adapter(network, header["settings"], seed=0)
    try:
        adapter.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{file}: is damaged, its tensors are not those that its header names") from error
    scale = header["guidance"] if guidance is None else guidance

    def doubled() -> bool:  # not all pipelines have the property; of those that do, it has no value before a call
        return bool(getattr(pipeline, "do_classifier_free_guidance", False))

    return AttachedAdapter(network, adapter, scale, doubled).install()


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """=> (header with settings and shape as objects, tensors)."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get(HEADER, "null"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a guidance adapter ({error}); give the folder adapter/ of a run, "
                        f"or its {ADAPTER_FILE}") from error  # fmt: skip
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{file}: is no guidance adapter of format {FORMAT}; a LoRA is loaded by load_lora_weights")
    try:
        for name, kind in (("settings", AdapterSettings), ("shape", AttentionShape)):
            header[name] = TypeAdapter(kind).validate_python(header[name])
    except (ValidationError, KeyError) as error:
        raise UserError(f"{file}: its header cannot be read; make the adapter again") from error
    return header, tensors


def _check_fits(file: Path, header: Mapping[str, Any], network: nn.Module) -> None:
    name = type(network).__name__
    if header["network"] != name:
        raise UserError(f"{file}: is for {header['network']}, and this pipeline has a {name}")
    here: AttentionShape = wiring_of(network).shape(network)
    there: AttentionShape = header["shape"]
    if here != there:
        sizes = [(shape.embeddings, shape.tokens, len(shape.sites), *shape.sites) for shape in (there, here)]
        first = next((a, b) for a, b in zip(*sizes, strict=False) if a != b)
        raise UserError(f"{file}: is for another architecture: {first[0]} there, {first[1]} here; an adapter fits "
                        "checkpoints of the shape that it was trained on")  # fmt: skip
