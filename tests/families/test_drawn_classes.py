"""`sample` and `bench` of a class-conditional DiT, whose prompts are classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image
from torchvision.transforms.functional import to_tensor

from stepdistill.bench.generate import ModelUnderTest, generate_images, image_seed, load_pipeline
from stepdistill.draw import Avoid, draw
from stepdistill.errors import UserError
from stepdistill.hybrid import asked
from stepdistill.seeds import own_randomness


def called(folder: str, **options: object) -> ModelUnderTest:
    return replace(ModelUnderTest("dit", folder, 2, 1.0), **options)


def test_a_class_is_drawn_by_its_number_or_its_name(dit_folder: str, tmp_path: Path) -> None:
    files = list(draw(called(dit_folder), ["3", "ring"], tmp_path, count=2))
    assert len(files) == 4
    stock = DiTPipeline.from_pretrained(dit_folder)
    labels = [3, stock.labels["ring"]]
    for number, label in enumerate(labels):
        noise = [torch.Generator().manual_seed(image_seed(0, number, k)) for k in range(2)]
        with own_randomness(image_seed(0, number, 0), torch.device("cpu")):  # the pipeline's step takes no generator
            wanted = stock([label] * 2, generator=noise, num_inference_steps=2, guidance_scale=1).images
        for file, image in zip(files[2 * number :], wanted, strict=False):
            torch.testing.assert_close(to_tensor(Image.open(file)), to_tensor(image), rtol=0, atol=1.01 / 255)
    assert asked(stock, ["3", "ring"]) == labels


def test_hybrid_sampling_and_the_trace_take_classes_too(dit_folder: str, tmp_path: Path) -> None:
    model = called(dit_folder, base=dit_folder, scheduler="lcm")
    files = [file.name for file in draw(model, ["3"], tmp_path, trace=True)]
    assert files == ["000-3-0-0.png", "000-3-0-trace.png"]
    made = generate_images(load_pipeline(model), ["3", "7"], model=model, images_per_prompt=1, batch_size=2)
    assert made.nfe == 3, "the base's step in two passes, and the student's"


def test_what_is_no_class_or_cannot_be_avoided_is_refused(dit_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompt 'a red circle' is no class of this DiT: give a number from 0 to 999"):
        list(draw(called(dit_folder), ["a red circle"], tmp_path))
    with pytest.raises(UserError, match="DiTPipeline takes no negative prompt; leave it out"):
        list(draw(called(dit_folder, guidance_scale=3.0), ["3"], tmp_path, avoid=Avoid("c")))
