"""Scores that were trained on what people prefer; each needs its own weights.

Letters: B images, D features.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from stepdistill.bench.metrics.base import MissingError
from stepdistill.bench.metrics.networks import Clip, as_bytes
from stepdistill.clip_model import ImageTextModel
from stepdistill.errors import UserError


class Preference:
    """Scale times the cosine of image and prompt, by a CLIP model that was trained on preferences.

    HPSv2 (Wu et al. 2023, arXiv 2306.09341) is 100 times the cosine; PickScore (Kirstain et al. 2023,
    arXiv 2305.01569) has the scale that the model has learnt.

    Args:
        path: folder of a `CLIPModel`.
        device: where it computes.
        scale: None: exp of the model's own logit_scale.
    """

    def __init__(self, path: str, device: str, scale: float | None) -> None:
        self._model = ImageTextModel(path, device, "preference model")
        self._scale = _learnt_scale(path) if scale is None else scale

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._scale * self._model.cosines(images, prompts).cpu()


def _learnt_scale(path: str) -> float:
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            if "logit_scale" in opened.keys():  # noqa: SIM118  # it is no mapping
                return float(opened.get_tensor("logit_scale").float().exp())
    raise UserError(f"{path}: no safetensors file with a logit_scale; give the folder of a CLIPModel")


class Aesthetic:
    """LAION's aesthetic predictor: five linear layers on the normalised features of ViT-L/14, about 1 to 10.

    Args:
        layers: safetensors file with layers.0, .2, .4, .6, .7, as in the published one.
        clip: folder of the `CLIPModel`.
        device: where it computes.

    Raises:
        UserError: the file holds other layers.
    """

    WIDTHS = (768, 1024, 128, 64, 16, 1)
    PLACES = (0, 2, 4, 6, 7)  # between them is dropout

    def __init__(self, layers: str, clip: str, device: str) -> None:
        self._clip = Clip(clip, device)
        pairs = zip(self.PLACES, self.WIDTHS, self.WIDTHS[1:], strict=False)
        self._layers = nn.ModuleDict({str(place): nn.Linear(a, b) for place, a, b in pairs})
        given = {name.removeprefix("layers."): tensor.float() for name, tensor in load_file(layers).items()}
        try:
            self._layers.load_state_dict(given)
        except RuntimeError as error:
            raise UserError(f"{layers}: is not the aesthetic predictor on ViT-L/14: {error}") from error

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        hidden = nn.functional.normalize(self._clip(images), dim=-1)
        for layer in self._layers.values():
            hidden = layer(hidden)
        return hidden.flatten()


class ImageReward:
    """ImageReward (Xu et al. 2023, arXiv 2304.05977) by its own package, if that is installed.

    Args:
        path: folder with ImageReward.pt and med_config.json.
        device: where it computes.

    Raises:
        MissingError: there is no such package, or one of the files is not there.
    """

    def __init__(self, path: str, device: str) -> None:
        try:
            import ImageReward as package  # type: ignore[import-not-found]  # noqa: N813
        except ImportError as error:
            raise MissingError(f"needs the package image-reward ({error})") from error
        files = [Path(path) / name for name in ("ImageReward.pt", "med_config.json")]
        for file in files:
            if not file.is_file():
                raise MissingError(f"{file} is not there")
        self._model: Any = package.load(str(files[0]), device=device, med_config=str(files[1]))

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        from PIL import Image

        scores = []
        with tempfile.TemporaryDirectory() as folder:  # its score() opens files
            for number, (image, prompt) in enumerate(zip(as_bytes(images), prompts, strict=True)):
                file = Path(folder) / f"{number}.png"
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
                scores.append(float(self._model.score(prompt, str(file))))
        return torch.tensor(scores)
