"""Features and scores of a local CLIP model: what FID, KID and the CLIP score are computed from.

Letters: B images or prompts, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def clip_scores(image_features: Tensor, text_features: Tensor) -> Tensor:
    """100 times the cosine of each image with its own prompt, at least 0: (B, D), (B, D) => (B,).

    torchmetrics has the same as CLIPScore, but its 1.9 reads `get_image_features` as a tensor, which transformers 5
    no longer returns, and it refuses models by path. That leaves one line to write.
    """
    return 100 * torch.cosine_similarity(image_features, text_features, dim=-1).clamp(min=0)


class ClipEvaluator:
    """A frozen CLIP model that gives features for metrics: float32, on the CPU, without gradients.

    Args:
        path: folder of a `CLIPModel` with its tokenizer and preprocessor_config.json.
        device: where it computes.

    Raises:
        UserError: if the folder cannot be loaded as such.
    """

    def __init__(self, path: str | Path, *, device: str = "cpu") -> None:
        from stepdistill.clip_model import ImageTextModel

        self._model = ImageTextModel(path, device, "evaluator")

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] => projected features (B, D), not normalised."""
        return self._model.image_features(images).cpu()

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Prompts => projected features (B, D), not normalised; long prompts are cut."""
        return self._model.text_features(prompts).cpu()
