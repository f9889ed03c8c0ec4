"""Features and scores of a local CLIP model: what FID, KID and the CLIP score are computed from.

Letters: B images or prompts, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import UserError


def clip_scores(image_features: Tensor, text_features: Tensor) -> Tensor:
    """100 times the cosine of each image with its own prompt, at least 0: (B, D), (B, D) => (B,).

    torchmetrics has the same as CLIPScore, but its 1.9 reads `get_image_features` as a tensor, which transformers 5
    no longer returns, and it refuses models by path. That leaves one line to write.
    """
    return 100 * torch.cosine_similarity(image_features, text_features, dim=-1).clamp(min=0)


class ClipEvaluator:
    """A frozen CLIP model with its own preprocessing, in float32 whatever its file holds.

    Args:
        path: folder of a `CLIPModel` with its tokenizer and preprocessor_config.json.
        device: where it computes.

    Raises:
        UserError: if the folder cannot be loaded as such.
    """

    def __init__(self, path: str | Path, *, device: str = "cpu") -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        if not Path(path).is_dir():
            raise UserError(f"evaluator {path}: no such folder; give the folder of a CLIPModel, as assets/shapes/clip")
        try:
            model = CLIPModel.from_pretrained(path, dtype=torch.float32, use_safetensors=True, local_files_only=True)
            self.tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
            processor = CLIPImageProcessor.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"evaluator {path}: cannot be loaded as a CLIPModel folder ({reason})") from error
        self.model = model.eval().requires_grad_(False).to(device)
        self.device = device
        self.size = int(model.config.vision_config.image_size)
        self.max_tokens = int(model.config.text_config.max_position_embeddings)
        self._mean, self._std = (
            torch.tensor(v, device=device).view(3, 1, 1) for v in (processor.image_mean, processor.image_std)
        )

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] => projected features (B, D), float32 on the CPU, not normalised.

        Other sizes than the model's own are resized, bicubic and antialiased.
        """
        images = images.to(self.device, torch.float32)
        if images.shape[-2:] != (self.size, self.size):
            images = torch.nn.functional.interpolate(
                images, size=(self.size, self.size), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        return _tensor(self.model.get_image_features(pixel_values=(images - self._mean) / self._std)).cpu()

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Prompts => projected features (B, D), float32 on the CPU, not normalised; long prompts are cut."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        return _tensor(
            self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        ).cpu()


def _tensor(output: Any) -> Tensor:
    """transformers 5 returns the projected features as an output object's pooler_output, older ones as a tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output
