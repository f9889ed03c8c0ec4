"""A frozen CLIP model that says how well images fit their prompts, with gradients to the images.

Letters: B images, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from stepdistill.assets import resolve_model_path
from stepdistill.errors import UserError, first_line


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
            reason = first_line(error)
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
        return _tensor(self._model.get_image_features(pixel_values=self._pixels(images, normalize)))

    def image_tokens(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] => what the image tower holds behind these layers, each (B, N, C).

        Args:
            images: as above; gradients reach them.
            layers: from 1, behind the first layer, to the number of layers.
        """
        pixels = self._pixels(images, normalize=True)
        hidden = self._model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
        return [hidden[layer] for layer in layers]

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Prompts => projected features (B, D), not normalised; long prompts are cut."""
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._device)
        return _tensor(self._model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask))

    def _pixels(self, images: Tensor, normalize: bool) -> Tensor:
        """Images in [0, 1] => what the image tower takes."""
        images = images.to(self._device, torch.float32)
        if images.shape[-2:] != (self._size, self._size):
            images = torch.nn.functional.interpolate(images, (self._size, self._size), mode="bicubic", antialias=True)
            images = images.clamp(0, 1)
        return (images - self._mean) / self._std if normalize else images

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
    return _loaded(_found(path), device)


@dataclass(frozen=True)
class TowerSizes:
    """What must be known of a CLIP model to build something on it.

    Attributes:
        layers: of the image tower.
        width: of its tokens.
        features: length of a projected feature, of images and texts.
    """

    layers: int
    width: int
    features: int


@cache
def tower_sizes(path: str) -> TowerSizes:
    """The sizes of a folder's model, from its configuration alone.

    Raises:
        UserError: the folder has none.
    """
    folder = _found(path)
    if not (Path(folder) / "config.json").is_file():  # transformers would take its own defaults
        raise UserError(f"CLIP model {path}: no configuration of a CLIPModel there; give the folder of one, as "
                        "assets/shapes/clip")  # fmt: skip
    config = CLIPConfig.from_pretrained(folder, local_files_only=True)
    tower = config.vision_config
    return TowerSizes(int(tower.num_hidden_layers), int(tower.hidden_size), int(config.projection_dim))


def _found(path: str) -> str:
    return resolve_model_path(path) if Path(path).parts[:1] == ("assets",) else path
