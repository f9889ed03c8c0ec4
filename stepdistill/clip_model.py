"""A frozen CLIP model that says how well images fit their prompts, with gradients to the images.

Letters: B images, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from stepdistill.assets import resolve_model_path
from stepdistill.errors import UserError


class ImageTextModel:
    """CLIP with its own preprocessing (Radford et al. 2021, arXiv 2103.00020), in float32 whatever its file holds.

    Args:
        path: local folder of a `CLIPModel` with its tokenizer and preprocessor_config.json.
        device: where it computes.

    Raises:
        UserError: the folder cannot be loaded as such.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        if not Path(path).is_dir():
            raise UserError(
                f"CLIP model {path}: no such folder; give the folder of a CLIPModel, as assets/shapes/clip"
            )
        try:
            model = CLIPModel.from_pretrained(path, dtype=torch.float32, use_safetensors=True, local_files_only=True)
            self._tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
            processor = CLIPImageProcessor.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"CLIP model {path}: cannot be loaded as a CLIPModel folder ({reason})") from error
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = device
        self._size = int(model.config.vision_config.image_size)
        self._max_tokens = int(model.config.text_config.max_position_embeddings)
        self._mean, self._std = (
            torch.tensor(value, device=device).view(3, 1, 1) for value in (processor.image_mean, processor.image_std)
        )

    def cosines(self, images: Tensor, prompts: Sequence[str], *, normalize: bool = True) -> Tensor:
        """Cosine of each image's features with those of its own prompt, (B,).

        Args:
            images: (B, 3, H, W) in [0, 1]; other sizes than the model's own are resized, bicubic and antialiased.
            prompts: B texts; long ones are cut.
            normalize: shift and scale the pixels as the model was trained with.
        """
        images = images.to(self._device, torch.float32)
        if images.shape[-2:] != (self._size, self._size):
            images = torch.nn.functional.interpolate(images, (self._size, self._size), mode="bicubic", antialias=True)
            images = images.clamp(0, 1)
        if normalize:
            images = (images - self._mean) / self._std
        seen = self._model.get_image_features(pixel_values=images).pooler_output
        return torch.cosine_similarity(seen, self._text_features(prompts), dim=-1)

    @torch.no_grad()
    def _text_features(self, prompts: Sequence[str]) -> Tensor:
        """Prompts => projected features, (B, D)."""
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._device)
        output = self._model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        features: Tensor = output.pooler_output
        return features


@cache
def _loaded(path: str, device: torch.device) -> ImageTextModel:
    return ImageTextModel(path, device)


def image_text_model(path: str, device: torch.device) -> ImageTextModel:
    """The model of a folder ("assets/..." is found also if bundled), read once per process and device."""
    bundled = Path(path).parts[:1] == ("assets",)
    return _loaded(resolve_model_path(path) if bundled else path, device)
