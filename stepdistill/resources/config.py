"""The part of a recipe that says how memory and speed are traded; free of torch, like all of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


Attention = Literal["auto", "sdpa", "flash", "efficient", "xformers", "math"]
Base = Literal["fp32", "bf16", "fp16", "int8", "nf4"]


class MemoryConfig(BaseModel):
    """How networks are kept and run; defaults change nothing.

    Attributes:
        base: how the frozen teacher is kept, text encoders included; what is trained stays float32 whatever this is.
            int8 needs torchao and nf4 bitsandbytes, and both need every network role to be a LoRA.
        compile: torch.compile of the networks' repeated blocks; a text names a backend other than inductor.
        channels_last: the memory layout of convolutions.
        tf32: whether float32 products may be rounded to TF32 on the accelerator.
        offload_optimizer: optimiser states wait in the host's memory while their role is not stepping.
        park_encoders: text encoders and autoencoder stay in the host's memory and visit the accelerator part by part.
        vae_slicing: the autoencoder takes one image at a time.
        vae_tiling: the autoencoder takes an image tile by tile.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Base = "fp32"
    compile: bool | str = False
    channels_last: bool = False
    tf32: bool = False
    offload_optimizer: bool = False
    park_encoders: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False

    @property
    def quantised(self) -> bool:
        """Whether the base's linear layers hold fewer bits than a floating-point number."""
        return self.base in ("int8", "nf4")
