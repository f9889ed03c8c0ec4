"""ADD: its distance to the teacher, its heads on an image network, and its way through the decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPModel

from stepdistill.assets import resolve_model_path
from stepdistill.clip_model import image_text_model, tower_sizes
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.losses import add_weight
from stepdistill.objectives.add import ADD
from stepdistill.objectives.base import Batch, InferenceSpec, Step
from stepdistill.prediction import Levels, add_noise
from stepdistill.trainer import Trainer
from stepdistill.vision_discriminator import (
    ProjectionHead,
    VisionDiscriminator,
    condition_of,
    input_penalty,
    tower_layers,
)
from tests.oracles.exact import exact, times_of
from tests.oracles.oracle import Linear, Roles, constant, four_signs, label, linear_student
from tests.oracles.trajectories import FLOW, STD, VP, images
from tests.tiny import LORA, PaintedLatents, trainer_of, weights_of


CLIP = "assets/shapes/clip"
CPU = torch.device("cpu")


# ---- the distance to the teacher -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "kind"), [(VP, "epsilon"), (FLOW, "flow")])
def test_with_its_weight_the_distance_has_the_gradient_of_score_distillation(
    exact_noise: Tensor, schedule: Any, kind: str
) -> None:
    """2 c (x - x0_teacher) = sigma^2 (eps_teacher - eps) for c = alpha sigma / 2."""
    teacher = exact(schedule, kind, constant(0.4), STD)
    roles: Any = Roles({"teacher": teacher})
    objective = ADD(weighting="sds", t_min=0.5, t_max=0.5)
    x0, eps = 1.3 * exact_noise, four_signs()[1]
    target, weight = objective.teachers_view(roles, x0, images(x0, x0))
    t = times_of(0.501 if schedule is VP else 0.5).expand(4)
    levels = Levels.at(schedule, t, x0)
    said = teacher(add_noise(schedule, x0, t, eps), t, images(x0, x0).condition)
    torch.testing.assert_close(target, said.x0, rtol=0, atol=1e-12)
    expected = levels.sigma**2 * (said.eps - eps)
    torch.testing.assert_close(2 * weight[:, None] * (x0 - target), expected, rtol=0, atol=1e-12)
    assert expected.abs().max() > 0.01


def test_the_exponential_weight_is_the_signal_level() -> None:
    levels = Levels.at(VP, times_of(0.2, 0.9), torch.zeros(2, 1))
    assert torch.equal(add_weight(levels, "exponential"), levels.alpha.flatten())
    assert torch.equal(add_weight(levels, "constant"), torch.ones(2).double())


def test_the_teacher_is_guided_and_gives_no_gradient() -> None:
    x0 = torch.randn(64, 1, dtype=torch.float64, requires_grad=True)
    seen = []
    for mean, guidance in ((label, 3.0), (constant(3.0), 1.0)):
        roles: Any = Roles({"teacher": exact(VP, "epsilon", mean, STD)})
        torch.manual_seed(0)
        seen.append(ADD(guidance=guidance).teachers_view(roles, x0, images(x0, x0, label=1.0))[0])
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-9)
    assert not seen[0].requires_grad


# ---- the heads -----------------------------------------------------------------------------------------------------


def test_the_tokens_are_those_of_the_stock_model_and_carry_gradients() -> None:
    network = image_text_model(CLIP, CPU)
    seen = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    tokens = network.image_tokens(seen, (1, 4))
    stock = CLIPModel.from_pretrained(resolve_model_path(CLIP), dtype=torch.float32)
    with torch.no_grad():
        pixels = (seen - network._mean) / network._std
        hidden = stock.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
        pooled = stock.vision_model.post_layernorm(tokens[1][:, 0])
        features = stock.visual_projection(pooled)
    for told, layer in zip(tokens, (1, 4), strict=True):
        torch.testing.assert_close(told, hidden[layer], rtol=0, atol=1e-5)
    torch.testing.assert_close(network.image_features(seen), features, rtol=0, atol=1e-4), "layer 4 is the last"
    (gradient,) = torch.autograd.grad(tokens[0].square().sum(), seen)
    assert gradient.abs().max() > 0


def test_the_heads_are_spread_over_the_layers_or_sit_where_they_are_told() -> None:
    sizes = tower_sizes(CLIP)
    assert (sizes.layers, sizes.width, sizes.features) == (4, 128, 64)
    assert tower_layers(CLIP, ()) == (1, 2, 3, 4)
    assert tower_layers(CLIP, (2, 4)) == (2, 4)
    with pytest.raises(UserError, match="layers 1 to 4, and not 5"):
        tower_layers(CLIP, (1, 5))


def test_a_folder_without_a_configuration_is_a_users_error(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="no configuration of a CLIPModel"):
        tower_sizes(str(tmp_path))


def test_up_to_five_heads_are_evenly_spaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from stepdistill import vision_discriminator
    from stepdistill.clip_model import TowerSizes

    monkeypatch.setattr(vision_discriminator, "tower_sizes", lambda model: TowerSizes(24, 8, 8))
    assert tower_layers("large", ()) == (5, 10, 14, 19, 24)


def test_a_head_asks_whether_the_image_is_real_and_whether_it_is_the_right_one() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(6, 4)
    tokens, one, other = torch.randn(3, 5, 6), torch.randn(3, 4), torch.randn(3, 4)
    real = head(tokens, torch.zeros(3, 4))
    seen = head.layers(tokens).mean(1)
    torch.testing.assert_close(real, head.real(seen))
    fits = head(tokens, one) - real
    torch.testing.assert_close(fits, (seen * head.project(one)).sum(1, keepdim=True) / 6**0.5)
    torch.testing.assert_close(head(tokens, one + other) - real, fits + head(tokens, other) - real)
    assert VisionDiscriminator(2, 6, 4)([tokens, tokens], one).shape == (3, 2)


def test_the_penalty_of_linear_heads_is_the_squared_size_of_their_weights() -> None:
    a, b = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    tokens = [torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    logits = torch.stack([(tokens[0] * a).sum((1, 2)), (tokens[1] * b).sum((1, 2))], dim=1)
    penalty = input_penalty(logits, tokens)
    assert penalty.item() == pytest.approx((a.square().sum() + b.square().sum()).item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(gradient, 2 * a.detach(), rtol=1e-9, atol=0)


def test_the_heads_know_the_prompt_and_the_image_that_the_student_could_see() -> None:
    network = image_text_model(CLIP, CPU)
    pictures, prompts = torch.rand(2, 3, 64, 64), ["a red circle", "a blue square"]
    told = condition_of(network, prompts, pictures, torch.tensor([True, False]))
    assert told.shape == (2, 128)
    texts = network.text_features(prompts)
    torch.testing.assert_close(told[:, :64], texts / texts.norm(dim=1, keepdim=True))
    assert told[0, 64:].norm().item() == pytest.approx(1, abs=1e-5)
    assert told[1, 64:].abs().max() == 0, "what it made of noise alone has nothing to do with that image"
    assert condition_of(network, prompts).shape == (2, 64)


# ---- in the real trainer -------------------------------------------------------------------------------------------


def game(folder: str, objective: ADD, lora: Any = None) -> Trainer:
    trainer = trainer_of(load_family(folder), objective, lora=lora)
    trainer.batches.latents = PaintedLatents()
    return trainer


def by_hand(objective: ADD, trainer: Trainer, batch: Batch, decode: Any) -> dict[str, Any]:
    """Samples, images, tokens and condition in one long graph, from the same random numbers."""
    cast = trainer.cast
    torch.manual_seed(0)
    x0, shown = objective.samples(cast, batch)
    network = image_text_model(CLIP, CPU)
    real = decode(batch.latents).detach()
    condition = condition_of(network, batch.prompts, real if objective.image_condition else None, shown)
    return {"x0": x0, "real": real, "fake": decode(x0), "condition": condition, "network": network}


@pytest.mark.parametrize("image_condition", [True, False])
def test_the_discriminators_loss_is_the_sum_of_its_heads_hinges_and_r1(sd_folder: str, image_condition: bool) -> None:
    objective = ADD((999, 499), r1_weight=0.5, image_condition=image_condition)
    trainer = game(sd_folder, objective)
    batch = trainer.batches.next("images", 2)
    torch.manual_seed(0)
    terms = objective.discriminator_loss(trainer.cast, batch, Step(0)).terms
    hand = by_hand(objective, trainer, batch, trainer.cast.family.decode_latents)
    heads: Any = trainer.cast.head("discriminator").module
    wanted, penalty = 0.0, 0.0
    real, fake = (hand["network"].image_tokens(hand[name].detach(), (1, 2, 3, 4)) for name in ("real", "fake"))
    for head, seen, made in zip(heads.heads, real, fake, strict=True):
        seen = seen.detach().requires_grad_(True)
        logit = head(seen, hand["condition"])
        wanted += (1 - logit).relu().mean().item() + (1 + head(made, hand["condition"])).relu().mean().item()
        penalty += torch.autograd.grad(logit.sum(), seen)[0].square().sum((1, 2)).mean().item()
    assert terms["discriminator"].item() == pytest.approx(wanted, rel=1e-4)
    assert terms["r1"].item() == pytest.approx(0.5 * penalty, rel=1e-4)


@pytest.mark.parametrize("where", ["pixels", "latents"])
def test_the_students_gradient_is_that_of_one_long_graph(sd_folder: str, where: Any) -> None:
    objective = ADD((999, 499), guidance=2.0, distill_in=where)
    trainer = game(sd_folder, objective)
    cast, batch = trainer.cast, trainer.batches.next("images", 2)
    decode, parameters = cast.family.decode_latents, cast.parameters("student")

    def one_long_graph() -> Tensor:
        hand = by_hand(objective, trainer, batch, decode)
        target, weight = objective.teachers_view(cast, hand["x0"].detach(), batch)
        tokens = hand["network"].image_tokens(hand["fake"], (1, 2, 3, 4))
        logits = cast.head("discriminator").module(tokens, hand["condition"])
        adversarial = -logits.sum(1).mean()
        here, there = (hand["fake"], decode(target)) if where == "pixels" else (hand["x0"], target)
        return adversarial + 2.5 * (weight * (here - there.detach()).square().flatten(1).mean(1)).mean()

    def told() -> Tensor:
        torch.manual_seed(0)
        return objective.student_loss(cast, batch, Step(0)).total

    found = []
    for loss in (told, one_long_graph):
        with cast.trainable(("student",)):
            value = loss()
            value.backward()
        found.append((value.item(), {name: p.grad for name, p in parameters.items()}))
        for p in parameters.values():
            p.grad = None
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert any(g is not None and g.abs().max() > 1e-6 for g in found[1][1].values())
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], gradient, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in cast.family.pipeline.vae.parameters())


def test_in_latents_the_distance_brings_samples_back_whose_pixels_are_clamped(
    sd_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page says about `distill_in`: beyond what can be shown, pixels have no gradient, and latents have."""
    slopes = {}
    for where in ("pixels", "latents"):
        objective = ADD((999,), distill_in=where, image_condition=False)
        trainer = game(sd_folder, objective)
        cast, batch = trainer.cast, trainer.batches.next("images", 2)
        # A decoder that shows the latents themselves: 15 times too large, all pixels are black or white.
        monkeypatch.setattr(cast.family, "decode_latents", lambda x: (x[:, :3] / 2 + 0.5).clamp(0, 1))
        grown = (15 * batch.latents.sign()).requires_grad_(True)
        target = batch.latents.sign() / 2
        monkeypatch.setattr(ADD, "samples", lambda self, *_, x0=grown: (x0, torch.zeros(2, dtype=torch.bool)))
        monkeypatch.setattr(ADD, "teachers_view", lambda self, *_, x0=target: (x0, torch.ones(2)))
        objective.student_loss(cast, batch, Step(0)).total.backward()
        slopes[where] = grown.grad
        size = 2.5 * 2 * (15 - 0.5) / grown[0].numel() / len(grown)  # of the mean of squares, times lambda
    assert slopes["pixels"].abs().max() == 0
    torch.testing.assert_close(slopes["latents"], size * batch.latents.sign(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("family", "options", "lora"),
    [
        ("sd_folder", {}, {"student": LORA}),
        ("sd_folder", {"distill_in": "latents", "image_condition": False}, {}),
        ("sd3_folder", {"layers": (2,), "image_condition": False, "r1_weight": 0.0}, {}),
    ],
    ids=["lora", "latents", "flow"],
)
def test_a_turn_leaves_gradients_and_changes_on_its_own_roles_only(
    family: str, options: dict[str, Any], lora: Any, request: pytest.FixtureRequest
) -> None:
    trainer = game(request.getfixturevalue(family), ADD((999, 499), **options), lora)
    for phase in trainer.objective.phases(0):
        before = weights_of(trainer)
        values = trainer._run_phase(phase, 0)
        after = weights_of(trainer)
        moved = {name.partition("/")[0] for name in before if not torch.equal(before[name], after[name])}
        assert moved == set(phase.updates)
        assert all(values[f"{role}/gradient_norm"] > 0 for role in phase.updates)
        assert ("r1" in values) == (phase.name == "discriminator" and trainer.objective.r1_weight > 0)
        assert all(p.grad is None for p in trainer.cast.family.network().parameters())


def test_what_the_student_could_not_see_is_told_with_its_samples() -> None:
    network = Linear(1.0, 0.0)
    roles: Any = Roles({"student": linear_student(network, VP)})
    data = torch.full((2000, 1), 50.0, dtype=torch.float64)
    torch.manual_seed(0)
    x0, shown = ADD().samples(roles, images(data, data))
    assert shown.double().mean().item() == pytest.approx(0.75, abs=0.03)
    assert x0[~shown].abs().max() < 6 < 8 < x0[shown].min()


def test_the_turns_and_limits_are_those_of_the_options() -> None:
    objective = ADD((999,), discriminator_updates=2)
    assert [(p.name, p.updates, p.stream, p.repeats) for p in objective.phases(0)] == [
        ("discriminator", ("discriminator",), "images", 2), ("student", ("student",), "images", 1),
    ]  # fmt: skip
    assert objective.inference() == InferenceSpec((999,), "stochastic")
    for options in ({"discriminator_updates": 0}, {"r1_weight": -1.0}, {"distill_weight": -1.0}):
        with pytest.raises(UserError):
            ADD(**options)
    assert isinstance(objective.roles()["discriminator"].build([(4, 2, 2)]), nn.Module)  # type: ignore[union-attr]
