"""The clamped CLIP loss: its clamp, its weight over time, and its way through the decoder to the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from stepdistill.clip_model import ImageTextModel, image_text_model
from stepdistill.data import shapes
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.losses import clamped_similarity_loss
from stepdistill.objectives.base import Step
from stepdistill.objectives.clip import Clip
from stepdistill.objectives.negatives import steered_student
from stepdistill.objectives.vsd import VSD
from stepdistill.objectives.weighted_sum import Part, WeightedSum
from stepdistill.recipe import Recipe
from stepdistill.run import train
from stepdistill.trainer import Trainer
from tests.tiny import tiny_recipe, trainer_of


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIPModel with random weights for 24 pixels, so that the tiny decoder's 16 are resized."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=52, eos_token_id=53, pad_token_id=53, projection_dim=8,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=24, patch_size=8,
        projection_dim=8,
    )  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    model.half().save_pretrained(folder)
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=8).save_pretrained(folder)
    CLIPImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return str(folder)


# ---- the loss ------------------------------------------------------------------------------------------------------


def test_samples_above_the_threshold_have_neither_loss_nor_gradient() -> None:
    cosines = torch.tensor([0.35, 0.4, 0.9], requires_grad=True)
    loss = clamped_similarity_loss(cosines, 0.35)
    loss.backward()
    assert loss.item() == 0.0
    assert cosines.grad.tolist() == [0, 0, 0]


def test_samples_below_it_have_the_gradient_of_minus_the_cosine() -> None:
    cosines = torch.tensor([0.1, 0.5, 0.3, -0.2], dtype=torch.float64, requires_grad=True)
    loss = clamped_similarity_loss(cosines, 0.35)
    loss.backward()
    assert loss.item() == pytest.approx((0.25 + 0 + 0.05 + 0.55) / 4)
    assert cosines.grad.tolist() == [-0.25, 0, -0.25, -0.25]


def test_clamping_the_batch_lets_good_samples_make_up_for_bad_ones() -> None:
    cosines = torch.tensor([0.1, 0.7], dtype=torch.float64, requires_grad=True)
    assert clamped_similarity_loss(cosines, 0.35, per_sample=False).item() == 0.0
    assert clamped_similarity_loss(cosines, 0.35).item() == pytest.approx(0.125)
    clamped_similarity_loss(cosines, 0.5, per_sample=False).backward()
    assert cosines.grad.tolist() == [-0.5, -0.5]


def test_the_weight_falls_in_a_line_from_the_first_iteration_to_the_last() -> None:
    objective = Clip(weight=0.1, weight_steps=5)
    assert [objective.weight_at(step) for step in range(7)] == pytest.approx([0.1, 0.075, 0.05, 0.025, 0, 0, 0])
    assert objective.weight_at(0) == 0.1
    assert objective.weight_at(4) == 0.0
    assert [len(objective.phases(step)) for step in range(7)] == [1, 1, 1, 1, 0, 0, 0], "nothing is decoded in vain"
    assert [Clip(weight=0.2).weight_at(step) for step in (0, 10**6)] == [0.2, 0.2]


def test_a_fall_needs_a_first_and_a_last_iteration() -> None:
    with pytest.raises(UserError, match="weight_steps must be at least 2"):
        Clip(weight_steps=1)


# ---- the model -----------------------------------------------------------------------------------------------------


def by_hand(folder: str, images: Tensor, prompts: list[str]) -> Tensor:
    model, tokenizer = CLIPModel.from_pretrained(folder, dtype=torch.float32), CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=8, return_tensors="pt")
    with torch.no_grad():
        return model(pixel_values=images, **tokens).logits_per_image.diagonal() / model.logit_scale.exp()


def test_the_cosines_are_those_of_the_stock_model_on_its_own_pixels(clip_folder: str) -> None:
    images, prompts = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0)), ["a b", "c", "d e f g h i"]
    clip = ImageTextModel(clip_folder, CPU)
    shifted = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    told = clip.cosines(images, prompts)
    torch.testing.assert_close(told, by_hand(clip_folder, shifted, prompts), rtol=0, atol=1e-5)
    raw = clip.cosines(images, prompts, normalize=False)
    torch.testing.assert_close(raw, by_hand(clip_folder, images, prompts), rtol=0, atol=1e-5)
    assert (told - raw).abs().max() > 1e-3


def test_images_of_another_size_are_resized_and_prompts_without_an_end_are_cut(clip_folder: str) -> None:
    flat = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1)
    clip = ImageTextModel(clip_folder, CPU)
    small, large = (clip.cosines(flat.expand(1, 3, side, side), ["x " * 50]) for side in (16, 24))
    torch.testing.assert_close(small, large, rtol=0, atol=1e-5)


def test_a_folder_that_is_no_clip_model_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        image_text_model(str(tmp_path / "nothing"), CPU)
    with pytest.raises(UserError, match="cannot be loaded as a CLIPModel"):
        ImageTextModel(str(tmp_path), CPU)


def test_the_bundled_model_knows_whose_caption_is_whose() -> None:
    scenes = [scene for _, scene in zip(range(32), shapes.captioned_scenes(99), strict=False)]
    images = shapes.to_tensor([shapes.render(scene.scene) for scene in scenes]) / 2 + 0.5
    captions = [scene.caption for scene in scenes]
    clip = image_text_model(Clip().model, CPU)
    own, foreign = clip.cosines(images, captions), clip.cosines(images, captions[1:] + captions[:1])
    print(f"cosine with its own caption: {own.mean():.3f} +- {own.std():.3f}, with another's: {foreign.mean():.3f}")
    assert own.mean() > foreign.mean() + 0.2


# ---- the way to the student ----------------------------------------------------------------------------------------


@pytest.fixture
def trainer(sd: ModelFamily) -> Trainer:
    return trainer_of(sd, Clip())


def test_the_gradient_reaches_the_student_alone_and_is_that_of_one_long_graph(
    clip_folder: str, trainer: Trainer
) -> None:
    cast = trainer.cast
    batch = trainer.batches.next("prompts", 2)
    objective = Clip(model=clip_folder, threshold=0.9, weight=0.25)
    parameters = cast.parameters("student")

    def gradient(loss: Any) -> dict[str, Tensor]:
        with cast.trainable(("student",)):
            torch.manual_seed(0)
            loss().backward()
        found = {name: p.grad for name, p in parameters.items()}
        for p in parameters.values():
            p.grad = None
        return found

    def one_long_graph() -> Tensor:
        x0 = cast.denoiser("student")(batch.noise(), torch.ones(2, dtype=torch.float64), batch.condition).x0
        cosines = image_text_model(clip_folder, CPU).cosines(cast.family.decode_latents(x0), batch.prompts)
        return 0.25 * (0.9 - cosines).relu().mean()

    told = objective.student_loss(cast, batch, Step(0))
    assert told.logged["cosine"].item() < 0.9
    found, expected = gradient(lambda: objective.student_loss(cast, batch, Step(0)).total), gradient(one_long_graph)
    assert any(g is not None and g.abs().max() > 0 for g in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in cast.family.pipeline.vae.parameters())
    assert all(p.grad is None for p in image_text_model(clip_folder, CPU)._model.parameters())


def test_nothing_happens_to_a_student_whose_images_fit(clip_folder: str, trainer: Trainer) -> None:
    with trainer.cast.trainable(("student",)):
        batch = trainer.batches.next("prompts", 2)
        loss = Clip(model=clip_folder, threshold=-1.0).student_loss(trainer.cast, batch, Step(0))
        loss.total.backward()
    assert loss.total.item() == 0.0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in trainer.cast.parameters("student").values())


def test_the_weight_at_the_step_is_in_the_loss(clip_folder: str, trainer: Trainer) -> None:
    objective = Clip(model=clip_folder, threshold=0.9, weight=0.25, weight_steps=11)
    batch = trainer.batches.next("prompts", 2)

    def value(step: int) -> float:
        torch.manual_seed(0)
        return objective.student_loss(trainer.cast, batch, Step(step)).total.item()

    assert value(4) == pytest.approx(0.6 * value(0), rel=1e-5)
    assert value(0) > 0


def test_with_the_negatives_of_vsd_it_judges_the_steered_image_of_the_same_pass(
    clip_folder: str, sd: ModelFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool: dict[str, Any] = {"negatives": ("x", "y", "z"), "nasa": (0.5, 1.0)}
    vsd, clip = VSD(guidance=1.0, guide_critic=False, **pool), Clip(model=clip_folder, threshold=0.9, **pool)
    trainer = trainer_of(sd, WeightedSum((Part(vsd), Part(clip))))
    cast, batch, step = trainer.cast, trainer.batches.next("prompts", 2), Step(3)
    calls, judged, decode = [], [], sd.decode_latents
    cast.networks()["student"].register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(sd, "decode_latents", lambda x: judged.append(x.detach()) or decode(x))

    def passes(objective: Any) -> int:
        calls.clear()
        torch.manual_seed(5)
        with cast.trainable(("student",)):
            objective.phases(0)[0].loss(cast, batch, step)
        return len(calls)

    assert passes(vsd) == 1
    assert passes(WeightedSum((Part(vsd), Part(clip)))) == 1
    assert passes(WeightedSum((Part(vsd), Part(Clip(model=clip_folder, threshold=0.9))))) == 2
    torch.manual_seed(5)
    student, _ = steered_student(cast, batch, step, pool["negatives"], pool["nasa"])
    noise, t = batch.noise(), torch.ones(2, dtype=torch.float64)
    steered, plain = (view(noise, t, batch.condition).x0.detach() for view in (student, cast.denoiser("student")))
    torch.testing.assert_close(judged[0], steered)
    assert (steered - plain).abs().max() > 1e-2


def test_a_recipe_adds_it_to_vsd(sd_folder: str, clip_folder: str, tmp_path: Path) -> None:
    content = tiny_recipe(sd_folder, tmp_path / "run")
    clip = {"name": "clip", "model": clip_folder, "threshold": 0.9, "weight_steps": 2}
    objective = {"name": "sum", "parts": [{"objective": {"name": "vsd"}}, {"objective": clip}]}
    stage = {**content["stages"][0], "objective": objective, "steps": 2, "accumulate": 1}
    result = train(Recipe.from_mapping({**content, "stages": [stage]}))
    first, last = (json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines())
    assert first["clip/similarity"] > 0
    assert "clip/cosine" in first
    assert not any(name.startswith("clip/") for name in last), "its weight has fallen to 0"
