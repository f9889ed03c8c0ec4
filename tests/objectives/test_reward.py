"""Reward feedback: who judges, the hinge, the way of the gradient to the student, and the unified student's export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.clip_model import image_text_model
from stepdistill.data import shapes
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import Step
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.reward import Judge, RewardFeedback
from stepdistill.objectives.tscd import TSCD
from stepdistill.objectives.weighted_sum import Part, WeightedSum
from stepdistill.options import build_named, plain_options
from stepdistill.recipe import Recipe
from stepdistill.rewards import ClipScore
from stepdistill.run import train
from stepdistill.trainer import Trainer
from tests.tiny import tiny_recipe, trainer_of


HERE = "tests.objectives.test_reward"


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The mean over an image, and a little for the number of the letter that its prompt is."""
    return images.mean((1, 2, 3)) + torch.tensor([0.01 * (ord(prompt[0]) - ord("a")) for prompt in prompts])


@dataclass(frozen=True)
class Redness:
    """How much more red there is than blue."""

    scale: float = 1.0

    def __call__(self, images: Tensor, prompts: Sequence[str], /) -> Tensor:
        return self.scale * (images[:, 0] - images[:, 2]).mean((1, 2))


def one_number(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean()


def without_a_graph(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.detach().mean((1, 2, 3))


def game(*judges: dict[str, Any], **options: Any) -> RewardFeedback:
    built = build_named("reward", {"rewards": list(judges), **options}, "x")
    assert isinstance(built, RewardFeedback)
    return built


# ---- who judges ----------------------------------------------------------------------------------------------------


def test_a_reward_is_found_by_its_name_or_by_its_path_and_written_as_it_was_read() -> None:
    given = [
        {"reward": {"name": "clip", "model": "x"}, "margin": 0.8},
        {"reward": {"name": f"{HERE}:Redness", "scale": 3.0}, "margin": 1.0, "weight": 0.5},
        {"reward": {"name": f"{HERE}:brightness"}, "margin": 1, "label": "light"},
    ]
    objective = game(*given)
    clip, red, light = objective.rewards
    assert clip.reward == ClipScore("x") and red.reward == Redness(3.0) and light.reward is brightness
    assert [judge.name for judge in objective.rewards] == ["clip", "Redness", "light"]
    written = plain_options(objective)
    assert [entry["reward"] for entry in written["rewards"]] == [entry["reward"] for entry in given]
    assert build_named("reward", written, "x") == objective


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"reward": {"name": "clipp"}, "margin": 1}, r"unknown reward 'clipp'; did you mean 'clip'\?"),
        ({"reward": {"name": "nowhere:thing"}, "margin": 1}, "reward 'nowhere:thing' could not be imported"),
        ({"reward": {"name": f"{HERE}:HERE"}, "margin": 1}, "neither a function .* nor a dataclass"),
        ({"reward": {"name": "pathlib:Path"}, "margin": 1}, "neither a function .* nor a dataclass"),
        ({"reward": {"name": f"{HERE}:brightness", "scale": 1}, "margin": 1}, "scale: unknown key; .* is a function"),
        ({"reward": {"name": f"{HERE}:Redness", "scal": 1}, "margin": 1}, r"scal: unknown key; did you mean 'scale'"),
        ({"reward": {}, "margin": 1}, "name: expected a reward's name, got None"),
        ({"reward": {"name": "clip"}}, "margin: missing"),
    ],
)
def test_a_mistaken_reward_is_told_with_its_place(judge: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        game(judge)
    assert str(caught.value).startswith("x.rewards.0.")


def test_a_game_without_judges_and_judges_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="rewards must name one at least"):
        RewardFeedback(())
    with pytest.raises(UserError, match="two rewards are called 'brightness'; give them a label each"):
        RewardFeedback((Judge(brightness, 1.0), Judge(brightness, 2.0)))


@pytest.mark.parametrize(
    ("reward", "message"),
    [(one_number, r"'one_number' must give one number per image, .*\(2,\), not \(\)"),
     (without_a_graph, "'without_a_graph' must be differentiable"),
     (lambda images, prompts: 0.5, "must give one number per image, .* not float")],
)  # fmt: skip
def test_what_is_no_reward_is_told_by_its_name(reward: Any, message: str) -> None:
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(UserError, match=message):
        Judge(reward, 1.0).values(images, ("a", "b"))


def test_the_bundled_evaluator_judges_by_the_cosine_of_image_and_caption() -> None:
    scenes = [scene for _, scene in zip(range(8), shapes.captioned_scenes(7), strict=False)]
    images = shapes.to_tensor([shapes.render(scene.scene) for scene in scenes]) / 2 + 0.5
    captions = [scene.caption for scene in scenes]
    told = ClipScore()(images.requires_grad_(True), captions)
    expected = image_text_model("assets/shapes/clip", torch.device("cpu")).cosines(images, captions)
    assert torch.equal(told, expected) and told.shape == (8,)
    told.sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0


# ---- the way to the student ----------------------------------------------------------------------------------------


@pytest.fixture
def trainer(sd: ModelFamily) -> Trainer:
    return trainer_of(sd, RewardFeedback((Judge(brightness, 1.0),)))


def gradients(trainer: Trainer, objective: RewardFeedback, seed: int = 0) -> tuple[Any, dict[str, Tensor | None]]:
    """(loss, gradient by name) of one batch."""
    batch = trainer.batches.next("prompts", 2)
    parameters = trainer.cast.parameters("student")
    with trainer.cast.trainable(("student",)):
        torch.manual_seed(seed)
        loss = objective.student_loss(trainer.cast, batch, Step(0))
        loss.total.backward()
    found = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return loss, found


def test_the_gradient_is_that_of_one_long_graph(trainer: Trainer) -> None:
    judges = (Judge(brightness, 0.9, 0.25), Judge(Redness(2.0), 0.5))
    batch, cast = trainer.batches.next("prompts", 2), trainer.cast
    trainer.batches.restore({})
    loss, found = gradients(trainer, RewardFeedback(judges))
    with cast.trainable(("student",)):
        torch.manual_seed(0)
        x0 = cast.denoiser("student")(batch.noise(), torch.ones(2, dtype=torch.float64), batch.condition).x0
        images = cast.family.decode_latents(x0)
        values = brightness(images, batch.prompts), Redness(2.0)(images, batch.prompts)
        total = 0.25 * (0.9 - values[0]).relu().mean() + (0.5 - values[1]).relu().mean()
        total.backward()
    assert loss.total.item() == pytest.approx(total.item(), rel=1e-5)
    assert loss.logged["brightness"].item() == pytest.approx(values[0].mean().item(), rel=1e-5)
    parameters = cast.parameters("student")
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in cast.family.pipeline.vae.parameters())


def test_a_reward_beyond_its_margin_leaves_the_student_alone(trainer: Trainer) -> None:
    loss, found = gradients(trainer, RewardFeedback((Judge(brightness, -5.0),)))
    assert loss.total.item() == 0.0
    assert all(g is None or g.abs().max() == 0 for g in found.values())


def test_training_raises_the_reward(sd: ModelFamily) -> None:
    objective = RewardFeedback((Judge(brightness, 5.0),))
    trainer = trainer_of(sd, objective, steps=8, player={"options": {"lr": 1e-2}})
    before, _ = gradients(trainer, objective)
    trainer.run()
    trainer.batches.restore({})
    after, _ = gradients(trainer, objective)
    print(f"brightness {before.logged['brightness']:.3f} => {after.logged['brightness']:.3f}")
    assert after.logged["brightness"] > before.logged["brightness"] + 0.02


def test_only_the_last_prediction_of_several_steps_carries_a_gradient(trainer: Trainer) -> None:
    graphs: list[bool] = []
    handle = trainer.cast.denoiser("student").weights.network.register_forward_pre_hook(
        lambda module, inputs: graphs.append(torch.is_grad_enabled())
    )
    judge = Judge(brightness, 5.0)
    objective = RewardFeedback((judge,), timesteps=(999, 749, 499, 249), sampler="tcd", eta=0.5)
    batch = trainer.batches.next("prompts", 2)
    with handle:
        for index in range(12):
            objective.student_loss(trainer.cast, batch, Step(index))
    counts = "".join("1" if graph else "0" for graph in graphs).split("1")[:-1]
    assert {len(count) for count in counts} == {0, 1, 2, 3}
    assert len(counts) == 12


# ---- as a part of the unified student's last stage -----------------------------------------------------------------


def unified() -> WeightedSum:
    tscd = TSCD(segments=1, timesteps=(999, 749, 499, 249), target_decay=0.0)
    return WeightedSum((Part(DMD2()), Part(tscd, 0.5), Part(RewardFeedback((Judge(brightness, 1.0),)), 0.1)),
                       called_as="tscd")  # fmt: skip


def test_the_score_stage_says_itself_how_its_student_is_called() -> None:
    assert unified().inference() == TSCD(segments=1, timesteps=(999, 749, 499, 249)).inference()
    with pytest.raises(UserError, match=r"call the student differently .*called_as"):
        WeightedSum((Part(DMD2()), Part(TSCD())))
    with pytest.raises(UserError, match="called_as 'tcd' is no part; the parts are dmd2, tscd"):
        WeightedSum((Part(DMD2()), Part(TSCD())), called_as="tcd")


def test_score_trajectory_and_reward_train_one_student_in_one_turn() -> None:
    critic, student = unified().phases(0)
    assert critic.updates == ("critic",) and critic.stream == "prompts"
    assert student.updates == ("student",) and student.stream == "images"


def test_a_recipe_plays_the_stages_one_after_the_other(sd_folder: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    content = tiny_recipe(sd_folder, tmp_path / "run")
    from PIL import Image

    for number, caption in enumerate("abc"):
        Image.new("RGB", (16, 16), (80 * number, 90, 200)).save(tmp_path / "images" / f"{caption}.png")
        (tmp_path / "images" / f"{caption}.txt").write_text(caption)
    content["data"] |= {"images": str(tmp_path / "images"), "size": 16, "count": 8}
    tscd = {"name": "tscd", "timesteps": [999, 499], "guidance": 2.0}
    reward = {"name": "reward", "rewards": [{"reward": {"name": f"{HERE}:brightness"}, "margin": 1.0}]}
    both = {"timesteps": [999, 499], "sampler": "tcd"}
    last = {"name": "sum", "called_as": "tscd", "parts": [
        {"objective": {"name": "dmd2", "critic_updates": 1}},
        {"objective": {**tscd, "segments": 1}},
        {"objective": reward, "weight": 0.1},
    ]}  # fmt: skip
    (common,) = content["stages"]
    players = {"default": {"optimizer": {"lr": 1e-3}}, "student": {"weights": {"lora": {"rank": 2}}}}
    common |= {"steps": 1, "accumulate": 1, "players": players}
    objectives = [{**tscd, "segments": 2, "gan_weight": 0.5}, {**reward, **both}, last]
    content["stages"] = [{**common, "objective": objective} for objective in objectives]
    result = train(Recipe.from_mapping(content))
    first, second, third = (json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines())
    assert {"trajectory", "adversarial", "discriminator"} <= first.keys()
    assert {"reward", "brightness"} <= second.keys()
    assert {"dmd2/matching", "dmd2/critic", "tscd/trajectory", "reward/reward", "reward/brightness"} <= third.keys()
