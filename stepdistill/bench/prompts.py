"""The shapes benchmark's protocol: which prompts, how many images of each, and which real images to compare with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepdistill.data import shapes
from stepdistill.errors import UserError


if TYPE_CHECKING:
    from torch import Tensor

# Far from the seeds that recipes and the bundled networks are trained on.
HELD_OUT_SEED = 770_000
ORDINARY_COUNT = 2048  # images below which a Frechet distance is not called FID without its number


@dataclass(frozen=True)
class ShapesProtocol:
    """Prompts at held-out seeds, K images for each, and a reference of independent scenes of the same distribution.

    Args:
        prompts: how many.
        images_per_prompt: K; diversity needs at least 2.
        seed: data seed of the prompts; the reference and the scenes that diversity is compared with derive from it.
        reference: how many real images FID and KID compare with.
        evaluator: folder of the CLIPModel whose features they use.
    """

    prompts: int = 64
    images_per_prompt: int = 8
    seed: int = HELD_OUT_SEED
    reference: int = 2048
    evaluator: str = "assets/shapes/clip"

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("images_per_prompt", 1), ("reference", 2)):
            if getattr(self, name) < least:
                raise UserError(f"bench.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.prompts * self.images_per_prompt < 2:
            raise UserError("bench: one image alone has no distribution; raise prompts or images_per_prompt")

    @property
    def num_images(self) -> int:
        """Images that each model makes."""
        return self.prompts * self.images_per_prompt

    def captions(self) -> list[shapes.CaptionedScene]:
        """The prompts with what they demand."""
        return [shapes.captioned_scene(self.seed, index) for index in range(self.prompts)]

    def completions(self) -> list[list[shapes.Scene]]:
        """K real scenes for each prompt, what it leaves open drawn afresh: as varied as real data is."""
        return [
            [
                shapes.complete_scene(case.demand, random.Random(f"shapes-completion/{self.seed}/{index}/{k}"))
                for k in range(self.images_per_prompt)
            ]
            for index, case in enumerate(self.captions())
        ]

    def reference_scenes(self) -> list[shapes.Scene]:
        """The scenes of the reference, of other prompts than the benchmark's."""
        return [shapes.captioned_scene(self.seed + 1, index).scene for index in range(self.reference)]


def render_scenes(scenes: Sequence[shapes.Scene]) -> Tensor:
    """Scenes => images (B, 3, 64, 64) in [0, 1]."""
    return shapes.to_tensor([shapes.render(scene) for scene in scenes]).add(1).div(2)
