"""SiD's diffusion-GAN, its training on real networks, and the exported student."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.discriminator import ChannelMean
from stepdistill.errors import UserError
from stepdistill.export.pipeline import export_pipeline
from stepdistill.export.schedulers import student_scheduler
from stepdistill.families.base import ModelFamily
from stepdistill.finish import NOISE_SEED, in_memory
from stepdistill.objectives.base import Phase, Step
from stepdistill.objectives.matching import rollout
from stepdistill.objectives.sid import SiD
from stepdistill.recipe import Recipe, build_objective
from stepdistill.run import train
from tests.families.test_export import BETAS, LATENTS, PROMPTS, student_of
from tests.oracles.oracle import (
    AT_08,
    SCHEDULE,
    GivenNoise,
    Linear,
    Roles,
    batch_of,
    gaussian,
    label,
    linear_student,
)
from tests.tiny import LORA, tiny_recipe, trainer_of


ROOT = Path(__file__).resolve().parents[2]


class Critics(Roles):
    """Denoisers, and a head that notes what it is shown and says the same of everything."""

    def __init__(self, denoisers: dict[str, Denoiser]) -> None:
        super().__init__(denoisers)
        self.shown: list[tuple[Tensor, Tensor]] = []

    def head(self, role: str) -> Callable[[Denoiser, Tensor, Tensor, Condition], Tensor]:
        def logits(denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            assert role == "discriminator"
            assert denoiser is self.denoiser("critic")
            self.shown.append((x_t.detach(), t))
            return 0 * x_t.flatten(1)

        return logits


@pytest.mark.parametrize("game", ["non_saturating", "relativistic"])
def test_the_game_sees_both_at_the_same_noise_and_is_weighed_by_the_number_of_elements(game) -> None:
    network = Linear(0.0, -0.4)  # whatever the noise
    oracle = gaussian(label, 1.0)
    roles = Critics({"student": linear_student(network), "teacher": oracle, "critic": oracle})
    batch = batch_of(torch.randn(2, 3, 2, 2, dtype=torch.float64))
    real = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    object.__setattr__(batch, "latents", real)
    objective = SiD(timesteps=(2,), guidance=1.0, gan_weight=0.01, gan_loss=game)
    told = objective.critic_loss(roles, batch, Step(0)).terms["discriminator"].item()
    student = objective.student_loss(roles, batch, Step(0)).terms["adversarial"].item()
    paired = game == "relativistic"
    assert told == pytest.approx(0.5 * 12 * math.log(2) * (1 if paired else 2))
    assert student == pytest.approx(0.01 * 12 * math.log(2))
    assert len(roles.shown) == (4 if paired else 3)
    pairs = [(roles.shown[0], roles.shown[1])] + ([(roles.shown[3], roles.shown[2])] if paired else [])
    for (real_t, t), (made_t, s) in pairs:
        assert torch.equal(t, s)
        alpha = SCHEDULE.alpha(t).reshape(-1, 1, 1, 1)
        torch.testing.assert_close(real_t - alpha * real, made_t + alpha * 0.4, rtol=0, atol=1e-12)


def test_the_regulariser_is_weighed_as_the_game_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A logit that is the mean of x_t changes by alpha s where every element of the real sample grows by s."""
    oracle = gaussian(label, 1.0)
    roles = Critics({"student": linear_student(Linear(0.5, -0.4)), "teacher": oracle, "critic": oracle})
    monkeypatch.setattr(roles, "head", lambda role: lambda denoiser, x_t, t, c: x_t.flatten(1).mean(1, keepdim=True))
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    batch = batch_of(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    object.__setattr__(batch, "latents", torch.randn(4, 3, 2, 2, dtype=torch.float64))
    at = {"t_min": AT_08[0], "t_max": AT_08[1]}  # alpha is 0.8, and the perturbation 0.1
    objective = SiD(timesteps=(2,), guidance=1.0, gan_weight=0.01, r1_weight=3.0, **at)
    assert objective.critic_loss(roles, batch, Step(0)).terms["r1"].item() == pytest.approx(3 * 0.5 * 12 * 0.08**2)
    assert "r1" not in SiD(timesteps=(2,), guidance=1.0, gan_weight=0.01).critic_loss(roles, batch, Step(0)).terms


@pytest.mark.parametrize(
    "options", [{"t_min": AT_08[0], "t_max": AT_08[1]}, {"log_noise": (math.log(0.75), 0.0)}], ids=["range", "density"]
)
def test_the_game_looks_where_the_other_losses_look(options: dict[str, Any]) -> None:
    oracle = gaussian(label, 1.0)
    roles = Critics({"student": linear_student(Linear(0.5, -0.4)), "teacher": oracle, "critic": oracle})
    batch = batch_of(torch.randn(16, 3, 2, 2, dtype=torch.float64))
    object.__setattr__(batch, "latents", torch.randn(16, 3, 2, 2, dtype=torch.float64))
    objective = SiD(timesteps=(2,), guidance=1.0, gan_weight=0.01, **options)
    objective.critic_loss(roles, batch, Step(0))
    objective.student_loss(roles, batch, Step(0))
    assert len(roles.shown) == 3
    for _, t in roles.shown:
        assert torch.equal(t, torch.full((16,), 2 / 3, dtype=torch.float64)), "where sigma / alpha is 0.75"


def test_nothing_is_dropped_out_of_the_networks_while_they_are_trained(sd: ModelFamily) -> None:
    """A dropout layer that worked would draw numbers and change the losses of both turns."""
    objective = SiD(guidance=1.0)
    trainer = trainer_of(sd, objective, lora={"student": LORA, "critic": LORA})
    layers = [layer for layer in sd.network().modules() if isinstance(layer, torch.nn.Dropout)]
    assert layers
    batch = trainer.batches.next("prompts", 2)

    def losses(share: float) -> list[float]:
        for layer in layers:
            layer.p = share
        torch.manual_seed(0)
        found = []
        for phase in objective.phases(0):
            with trainer.cast.trainable(phase.updates):
                found.append(phase.loss(trainer.cast, batch, Step(0)).total.item())
        return found

    assert losses(0.9) == losses(0.0)
    sd.network().train()
    assert losses(0.9) != losses(0.0), "otherwise the comparison proves nothing"


def test_the_logits_are_means_over_channels_within_ten() -> None:
    maps, tokens = torch.randn(2, 8, 3, 3), 100 * torch.ones(2, 5, 4)
    logits = ChannelMean([(8, 3, 3), (5, 4)])([maps, tokens])
    torch.testing.assert_close(logits[:, :9], maps.mean(1).flatten(1))
    assert logits[:, 9:].tolist() == [[10.0] * 5] * 2


@pytest.mark.parametrize(("game", "stream"), [("hinge", "prompts"), ("relativistic", "images")])
def test_images_are_asked_for_only_where_the_game_compares_with_them(game, stream: str) -> None:
    def streams(phases: Any) -> list[str]:
        return [phase.stream for phase in phases if isinstance(phase, Phase)]

    assert streams(SiD().phases(0)) == ["prompts", "prompts"]
    assert streams(SiD(gan_weight=0.1, gan_loss=game).phases(0)) == ["images", stream]


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_a_student_is_trained_with_the_game_on_real_networks(
    name: str, sd_folder: str, dit_folder: str, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16), (200, 40, 40)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("3")
    (tmp_path / "prompts.txt").write_text("1\n3\n")
    objective = {"name": "sid", "guidance": 2.0, "critic_guidance": [1.0, -1.0, -1.0], "gan_weight": 0.001,
                 "timesteps": [625, 469, 312, 156], "sampler": "stochastic"}  # fmt: skip
    content = tiny_recipe(
        sd_folder if name == "sd" else dit_folder, tmp_path / "run",
        data={"prompts": str(tmp_path / "prompts.txt"), "images": str(tmp_path / "images"), "size": 16},
        stages=[{"objective": objective, "steps": 2, "batch_size": 2, "accumulate": 2, "checkpointing": True,
                 "players": {"student": {"weights": {"lora": {"rank": 2}}}}}],
    )  # fmt: skip
    train(Recipe.from_mapping(content))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"sid", "critic", "adversarial", "discriminator", "direction"} <= set(line)
    assert "discriminator/gradient_norm" not in line, "a mean over channels has nothing to train"
    assert line["dropped"] == 0


# ---- the exported student ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timesteps", "sampler"),
    [((625,), "deterministic"), ((625, 469, 312, 155), "deterministic"), ((625, 469, 312, 156), "stochastic")],
)
@torch.no_grad()
def test_the_rollout_makes_what_the_exported_stock_pipeline_makes(
    sd: ModelFamily, tmp_path, timesteps, sampler
) -> None:
    network, count = student_of(sd), len(timesteps)
    spec = SiD(timesteps=timesteps, sampler=sampler).inference()
    folder = export_pipeline(sd, network, spec, tmp_path / "pipeline", facts={})
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def stock(kind: str) -> Any:
        return pipe(PROMPTS, num_inference_steps=count, guidance_scale=1, latents=LATENTS, output_type=kind,
                    generator=torch.Generator().manual_seed(NOISE_SEED)).images  # fmt: skip

    batch = GivenNoise(sd.encode_prompts(PROMPTS), sd.null_condition(2), (4, 8, 8), torch.device("cpu"))
    object.__setattr__(batch, "z", LATENTS)
    last = next(s for s in map(Step, range(100)) if s.shared("rollout").randrange(count) == count - 1)

    def rolled(way: Any) -> Tensor:
        torch.manual_seed(NOISE_SEED)
        return rollout(sd.denoiser(OwnWeights(network)), batch, timesteps, last, way)

    expected = stock("latent")
    assert (rolled(sampler) - expected).abs().max() <= 1e-4
    other = "stochastic" if sampler == "deterministic" else "deterministic"
    assert (rolled(other) - expected).abs().max() > 1e-2, "the two ways to begin must be told apart"
    images = torch.from_numpy(stock("np")).permute(0, 3, 1, 2)
    assert (in_memory(sd, network, spec, LATENTS, PROMPTS) - images).abs().max() <= 1e-4


def recipe_objective(name: str) -> SiD:
    recipe = Recipe.load(str(ROOT / "recipes" / "shapes" / name))
    objective = build_objective(recipe.stages[-1].objective, name)
    assert isinstance(objective, SiD)
    return objective


def test_the_recipe_of_four_steps_takes_the_published_ones_as_far_as_a_stock_scheduler_does() -> None:
    published = tuple(int(625 * (1 - i / 4)) for i in range(4))
    assert published == (625, 468, 312, 156)
    spec = recipe_objective("sid_4step.yaml").inference()
    assert all(abs(a - b) <= 1 for a, b in zip(spec.timesteps, published, strict=True))
    scheduler = student_scheduler(BETAS, spec)
    scheduler.set_timesteps(4)
    assert tuple(scheduler.timesteps.tolist()) == spec.timesteps


def test_the_recipe_of_one_step_begins_with_scaled_noise_at_the_published_timestep() -> None:
    objective = recipe_objective("sid_1step.yaml")
    assert (objective.timesteps, objective.sampler, objective.critic_scales) == ((625,), "deterministic", (2.5,) * 3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [("sd", {"timesteps": [625, 100, 50], "sampler": "stochastic"}, "no stock Diffusers scheduler visits"),
     ("dit", {}, "train it with sampler: stochastic")],
)  # fmt: skip
def test_a_schedule_that_cannot_be_exported_is_refused_before_the_training(
    name: str, options: dict[str, Any], message: str, sd_folder: str, dit_folder: str, tmp_path: Path
) -> None:
    stages = [{"objective": {"name": "sid", **options}, "steps": 1, "batch_size": 2}]
    content = tiny_recipe(sd_folder if name == "sd" else dit_folder, tmp_path / "run", stages=stages,
                          export={"pipeline": True, "lora": False})  # fmt: skip
    with pytest.raises(UserError, match=message):
        train(Recipe.from_mapping(content))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
