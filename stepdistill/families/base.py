"""What the toolkit must know about one Diffusers architecture, and nothing about any method."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights, Weights
from stepdistill.errors import UserError
from stepdistill.families.smaller import Plan
from stepdistill.framing import Framing
from stepdistill.network_shape import NetworkShape
from stepdistill.schedule import from_scheduler_config


ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class ModelFamily(ABC):
    """One loaded teacher: the stock pipeline and what is special about its architecture.

    Args:
        pipeline: the stock pipeline as loaded.
        path: the folder, hub id or file that it came from, or "tiny:" and a name.
        stored: whether plain Diffusers finds the same pipeline at `path`: no single file, nothing merged into it.

    Attributes:
        quantised: how the network's linear layers are kept, if with fewer bits than a floating-point number has.
        plain_fingerprint: the fingerprint of the network before it was quantised, where anybody will ask for it.
        name: the family's name in `stepdistill list`.
        pipeline_class: the stock pipeline class it serves.
        network_component: which component denoises, "unet" or "transformer".
        lora_targets: layers that get a LoRA unless a recipe names others.
        supports_lora_loading: whether the stock pipeline has `load_lora_weights`.
        kohya_naming: whether a LoRA's layers can be named as kohya's and ComfyUI's programs name them.
        sgm_blocks: whether those programs number its UNet's blocks as SDXL's own code does, `input_blocks` and so on.
        takes_latents: whether the stock pipeline has a `latents` argument.
        scales_noise: whether the stock pipeline multiplies its noise by what the scheduler asks for.
        takes_eta: whether the stock pipeline has an argument `eta` and hands it to its scheduler.
        even_sigmas: whether the stock pipeline gives its flow scheduler N even sigmas, 1 to 1/N, to shift; others let
            the scheduler choose.
        shifts_by_size: whether the family knows how its flow's shift follows from the size of an image.
        guidance_weight: the parameter of a network that takes a guidance scale as an input and of no other; None: the
            architecture has no such input.
        block_pattern: names of the modules whose outputs are those of the network's blocks, a regular expression.
        attention_pattern: the same of self-attention.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    network_component: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    supports_lora_loading: ClassVar[bool] = True
    kohya_naming: ClassVar[bool] = False  # Diffusers can rename those of UNets
    sgm_blocks: ClassVar[bool] = False
    takes_latents: ClassVar[bool] = True
    scales_noise: ClassVar[bool] = True
    takes_eta: ClassVar[bool] = True
    even_sigmas: ClassVar[bool] = False
    shifts_by_size: ClassVar[bool] = False
    guidance_weight: ClassVar[str | None] = None
    block_pattern: ClassVar[str] = r"transformer_blocks\.\d+"
    attention_pattern: ClassVar[str] = r".*\.attn1"

    def __init__(self, pipeline: Any, path: str, *, stored: bool = True) -> None:
        if pipeline.scheduler.config.get("use_dynamic_shifting") and not self.shifts_by_size:
            raise UserError(f"teacher: {path} shifts its noise levels by the size of the image, which is supported "
                            "for FLUX alone; give its scheduler use_dynamic_shifting: false and a shift")  # fmt: skip
        self.pipeline = pipeline
        self.path = path
        self.stored = stored
        self.quantised: str | None = None
        self.plain_fingerprint: str | None = None
        self.schedule, self.kind = from_scheduler_config(
            # a scheduler made in memory does not name its class in its configuration
            {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
        )
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()

    def network(self) -> nn.Module:
        """The teacher's denoising network, frozen."""
        network: nn.Module = self.pipeline.components[self.network_component]
        return network

    @property
    def network_config(self) -> Any:
        """The Diffusers configuration of the denoising network."""
        return self.pipeline.components[self.network_component].config

    @property
    @abstractmethod
    def feature_layers(self) -> tuple[str, ...]:
        """The modules whose outputs a discriminator looks at, unless an objective names others."""

    @property
    def spread_layers(self) -> tuple[str, ...]:
        """Modules at several depths, in the order of the pass: what a recipe means by `layers: [blocks]`.

        Here the last block of each quarter of the network.
        """
        blocks = [name for name, _ in self.network().named_modules() if re.fullmatch(self.block_pattern, name)]
        return tuple(dict.fromkeys(blocks[max(0, len(blocks) * quarter // 4 - 1)] for quarter in (1, 2, 3, 4)))

    @property
    def device(self) -> torch.device:
        """Where the teacher lives."""
        return next(self.network().parameters()).device

    def plain_network(self, *, embeds_guidance: bool = False, shape: NetworkShape | None = None) -> nn.Module:
        """A fresh network of the teacher's shape or a smaller one, on the teacher's device, to be filled with a state.

        Args:
            embeds_guidance: it takes a guidance scale as an input, whether the teacher does or not.
            shape: what it lacks; None: nothing.

        Raises:
            UserError: networks of this architecture cannot, or the shape does not fit this one.
        """
        network: Any = self.network()
        options = {**(self.guidance_options() if embeds_guidance else {}), **self.plan(shape).options}
        fresh: nn.Module = type(network).from_config(network.config, **options)
        dtype = next(network.parameters()).dtype
        if next(fresh.parameters()).dtype != dtype:  # Diffusers warns about every cast, also one that changes nothing
            fresh.to(dtype)
        return fresh.to(self.device).requires_grad_(False).eval()

    def at_size(self, size: int | None) -> None:
        """Hears the size of the images of a run, in pixels, before anything else; None: the teacher's own.

        For families whose noise levels follow from it.
        """
        return

    def plan(self, shape: NetworkShape | None) -> Plan:
        """A network of another shape in terms of the teacher's; for None, the teacher's own.

        Raises:
            UserError: the shape does not fit this network, or networks of this architecture cannot be made smaller.
        """
        return Plan() if shape is None else self.smaller(shape)

    def smaller(self, shape: NetworkShape) -> Plan:
        """The same for a shape; each architecture knows its own parts."""
        raise UserError(f"student.shape: the network of {self.pipeline_class} cannot be made smaller here")

    def denoiser(self, weights: Weights | None = None) -> Denoiser:
        """A view of this architecture; without weights, of the teacher's own."""
        return Denoiser(self.forward, weights or OwnWeights(self.network()), self.schedule, self.kind)

    @abstractmethod
    def forward(self, network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        """Calls a network of this architecture => native output of the shape of x_t, (B, C, H, W)."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Prompts => the condition exactly as the stock pipeline makes it."""

    @abstractmethod
    def null_condition(self, count: int) -> Condition:
        """The unconditional half of the stock pipeline's guidance, `count` rows."""

    @abstractmethod
    def text_modules(self) -> dict[str, nn.Module]:
        """The modules whose weights determine `encode_prompts`, by component name."""

    def guidance_options(self) -> dict[str, Any]:
        """What the configuration of a network says that takes a guidance scale as an input.

        Raises:
            UserError: networks of this architecture cannot.
        """
        raise UserError(f"the network of {self.pipeline_class} cannot take a guidance scale as an input; set the "
                        "objective's embed_guidance: false, which trains for one scale")  # fmt: skip

    @property
    def encoding_facts(self) -> dict[str, Any]:
        """What determines `encode_prompts` besides the weights of `text_modules` and the tokenizers, for caches."""
        return {}

    def pipeline_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) in the form that the stock pipeline's argument `latents` has."""
        return latents

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of the latent for square images of `size` pixels; None: the teacher's own size."""
        config = self.network_config
        side = int(config.sample_size) if size is None else size // self.vae_factor
        return int(config.in_channels), side, side

    @property
    def image_size(self) -> int:
        """Side of the teacher's own images, in pixels."""
        return self.latent_shape()[1] * self.vae_factor

    @property
    def vae_factor(self) -> int:
        """Pixels per latent pixel."""
        return int(2 ** (len(self.pipeline.vae.config.block_out_channels) - 1))

    @property
    def pixel_step(self) -> int:
        """Pixels of which the sides of images have to be multiples: those of one token, or of one latent pixel."""
        return self.vae_factor * int(self.network_config.get("patch_size") or 1)

    @property
    def latent_shift(self) -> float:
        """What the stock pipeline adds to a latent, after undoing its scaling, before it is decoded."""
        return 0.0

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] => scaled latents, a draw from the posterior, as Stable Diffusion was trained."""
        vae = self.pipeline.vae
        latents: Tensor = vae.encode(images.to(self.device, vae.dtype)).latent_dist.sample()
        return (latents - self.latent_shift) * float(vae.config.scaling_factor)

    @torch.no_grad()
    def image_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] => mean and standard deviation of the scaled latents, (B, C, H, W) each."""
        vae = self.pipeline.vae
        posterior = vae.encode(images.to(self.device, vae.dtype)).latent_dist
        scale = float(vae.config.scaling_factor)
        return (posterior.mean - self.latent_shift) * scale, posterior.std * scale

    def framed(self, condition: Condition, framings: Sequence[Framing]) -> Condition:
        """The condition for images that were cut out like this, a framing for each row; most networks are not told."""
        return condition

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents => images (B, 3, H, W) in [0, 1]."""
        vae = self.pipeline.vae
        with _without_fp16(latents.device.type):
            images: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + self.latent_shift).sample
        return (images / 2 + 0.5).clamp(0, 1)


def _without_fp16(device_type: str) -> AbstractContextManager[object]:
    """Inside, no autocast turns anything into fp16, which autoencoders such as Stable Diffusion XL's overflow."""
    if torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16:
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
