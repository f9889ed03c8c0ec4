"""A frozen CLIP model that says how well images fit their prompts, with gradients to the images.

Letters: B images, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

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
        what: what messages call it.

    Raises:
        UserError: the folder cannot be loaded as such.
    """

    def __init__(self, path: str | Path, device: torch.device | str, what: str = "CLIP model") -> None:
        if not Path(path).is_dir():
            raise UserError(f"{what} {path}: no such folder; give the folder of a CLIPModel, as assets/shapes/clip")
        try:
            model = CLIPModel.from_pretrained(path, dtype=torch.float32, use_safetensors=True, local_files_only=True)
            self._tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
            processor = CLIPImageProcessor.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{what} {path}: cannot be loaded as a CLIPModel folder ({reason})") from error
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = device
        self._size = int(model.config.vision_config.image_size)
        self._max_tokens = int(model.config.text_config.max_position_embeddings)
        self._mean, self._std = (
            torch.tensor(value, device=device).view(3, 1, 1) for value in (processor.image_mean, processor.image_std)
        )

    def image_features(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] => projected features (B, D), not normalised; gradients reach the images.

        Args:
            images: other sizes than the model's own are resized, bicubic and antialiased.
            normalize: shift and scale the pixels as the model was trained with.
        """
        images = images.to(self._device, torch.float32)
        if images.shape[-2:] != (self._size, self._size):
            images = torch.nn.functional.interpolate(images, (self._size, self._size), mode="bicubic", antialias=True)
            images = images.clamp(0, 1)
        if normalize:
            images = (images - self._mean) / self._std
        return _tensor(self._model.get_image_features(pixel_values=images))

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Prompts => projected features (B, D), not normalised; long prompts are cut."""
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._device)
        return _tensor(self._model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask))

    def cosines(self, images: Tensor, prompts: Sequence[str], *, normalize: bool = True) -> Tensor:
        """Cosine of the features of each image, (B, 3, H, W), with those of its own prompt: (B,)."""
        seen = self.image_features(images, normalize=normalize)
        return torch.cosine_similarity(seen, self.text_features(prompts), dim=-1)


def _tensor(output: Any) -> Tensor:
    """transformers 5 returns the projected features as an output object's pooler_output, older ones as a tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output


@cache
def _loaded(path: str, device: torch.device) -> ImageTextModel:
    return ImageTextModel(path, device)


def image_text_model(path: str, device: torch.device) -> ImageTextModel:
    """The model of a folder ("assets/..." is found also if bundled), read once per process and device."""
    bundled = Path(path).parts[:1] == ("assets",)
    return _loaded(resolve_model_path(path) if bundled else path, device)
