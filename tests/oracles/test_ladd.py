"""LADD: what the student is shown, where it is judged, and how its game is played."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.discriminator import generator_loss
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.objectives.adversarial import Adversary
from stepdistill.objectives.base import InferenceSpec, Step
from stepdistill.objectives.ladd import LADD
from stepdistill.prediction import add_noise
from stepdistill.schedule import FlowSchedule
from tests.oracles.exact import exact
from tests.oracles.oracle import Linear, Roles, constant
from tests.oracles.trajectories import FLOW, VP, images
from tests.tiny import LORA, PaintedLatents, trainer_of, weights_of


class Noting:
    """A head that says a x_t + b and notes what it is shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[Tensor, Tensor]] = []

    def __call__(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.shown.append((x_t.detach(), t))
        return 0.5 * x_t - 0.1


class Game(Roles):
    def __init__(self, schedule: Any = VP, kind: str = "epsilon") -> None:
        self.network, self.told = Linear(0.8, 0.2), []

        def call(module: Any, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
            self.told.append((x_t.detach(), schedule.t_from_model_time(model_time)))
            return module.a * x_t + module.b

        student = Denoiser(call, OwnWeights(self.network), schedule, "sample")
        self.network.requires_grad_(True)
        super().__init__({"student": student, "teacher": exact(schedule, kind, constant(0.3), 0.5)})
        self.noting = Noting()

    def head(self, role: str) -> Noting:
        assert role == "discriminator"
        return self.noting


# ---- where samples are judged --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_noise_level_of_the_judgement_is_logit_normal(shift: float) -> None:
    schedule = FlowSchedule(shift)
    roles: Any = Game(schedule, "flow")
    torch.manual_seed(0)
    x0 = torch.randn(20_000, 1, dtype=torch.float64)
    Adversary(game="hinge", features="teacher", log_noise=(1.0, 0.5)).student_term(roles, x0, images(x0, x0))
    sigma = schedule.sigma(roles.noting.shown[0][1])
    logits = (sigma / (1 - sigma)).log()
    assert logits.mean().item() == pytest.approx(1.0, abs=0.02)
    assert logits.std().item() == pytest.approx(0.5, abs=0.02)


def test_a_table_of_timesteps_is_asked_at_what_it_has_learnt_and_without_an_option_evenly() -> None:
    roles: Any = Game()
    torch.manual_seed(0)
    x0 = torch.randn(5000, 1, dtype=torch.float64)
    for log_noise, mean in (((1.0, 1.0), None), (None, 499.5)):
        Adversary(features="teacher", log_noise=log_noise).student_term(roles, x0, images(x0, x0))
        index = VP.model_time(roles.noting.shown[-1][1])
        assert torch.equal(index, index.round())
        if mean is not None:
            assert index.mean().item() == pytest.approx(mean, abs=15)
        else:
            assert index.mean().item() > 600, "log(sigma / alpha) = 1 is a noisy place"


def test_the_students_loss_is_the_hinge_game_on_noised_samples() -> None:
    roles: Any = Game(FLOW, "flow")
    batch = images(*torch.randn(2, 64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(1)
    loss = LADD().student_loss(roles, batch, Step(0)).total
    (seen, t), (x_t, _) = roles.noting.shown[0], roles.told[0]
    assert loss.item() == pytest.approx(generator_loss(0.5 * seen - 0.1, "hinge").item(), abs=1e-12)
    loss.backward()
    # d/db of -mean(0.5 (alpha (a x_t + b) + sigma eps))
    assert roles.network.b.grad.item() == pytest.approx(-0.5 * FLOW.alpha(t).mean().item(), abs=1e-9)
    assert roles.network.a.grad.item() == pytest.approx(-0.5 * (FLOW.alpha(t)[:, None] * x_t).mean().item(), abs=1e-9)


def test_the_discriminator_compares_the_data_with_the_students_samples() -> None:
    roles: Any = Game(FLOW, "flow")
    data = torch.full((4000, 1), 3.0, dtype=torch.float64)
    torch.manual_seed(1)
    terms = LADD(r1_weight=2.0).discriminator_loss(roles, images(data, data), Step(0)).terms
    assert set(terms) == {"discriminator", "r1"}
    (real, t), *_ = roles.noting.shown
    noise = (real - FLOW.alpha(t)[:, None] * data) / FLOW.sigma(t)[:, None]
    assert noise.mean().item() == pytest.approx(0, abs=0.06)
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    # approximate R1 of 0.5 x_t: 2 E (0.5 alpha 0.1 n)^2
    assert terms["r1"].item() == pytest.approx(2 * 0.0025 * FLOW.alpha(t).square().mean().item(), rel=0.15)
    assert roles.network.a.grad is None


def test_misaligned_pairs_are_the_same_samples_and_noise_with_the_neighbours_prompts() -> None:
    roles: Any = Game(FLOW, "flow")
    data = torch.randn(4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = images(data, data)
    labels = torch.tensor([[1.0], [2.0], [3.0], [-4.0]], dtype=torch.float64)
    object.__setattr__(batch, "condition", Condition({"label": labels}))
    shown = []

    def head(denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        shown.append((x_t.detach(), t, condition.tensors["label"]))
        return condition.tensors["label"]

    roles.noting = head
    terms = LADD(misaligned_weight=0.5).discriminator_loss(roles, batch, Step(0)).terms
    (real, t, own), _, (seen, at, others) = shown
    assert torch.equal(real, seen)
    assert torch.equal(t, at)
    assert torch.equal(own, labels)
    assert others.flatten().tolist() == [-4.0, 1.0, 2.0, 3.0]
    # hinge: mean relu(1 + [-4, 1, 2, 3]) + mean relu(1 - [1, 2, 3, -4])
    assert terms["misaligned"].item() == pytest.approx(0.5 * (9 / 4 + 5 / 4), abs=1e-12)
    assert "misaligned" not in LADD().discriminator_loss(roles, batch, Step(0)).terms
    with pytest.raises(UserError, match="a single sample has no other's prompt"):
        LADD(misaligned_weight=0.5).discriminator_loss(roles, images(data[:1], data[:1]), Step(0))


# ---- what the student is shown -------------------------------------------------------------------------------------


def test_the_student_gets_noised_data_and_at_its_first_timestep_noise_alone() -> None:
    roles: Any = Game()
    data = torch.full((6000, 1), 50.0, dtype=torch.float64)
    torch.manual_seed(0)
    LADD(probabilities=(0.7, 0.1, 0.1, 0.1)).student_loss(roles, images(data, data), Step(0))
    ((x_t, t),) = roles.told
    shares = {value: (t - value).abs() < 1e-9 for value in (1.0, 0.75, 0.5, 0.25)}
    assert [rows.double().mean().item() for rows in shares.values()] == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=0.02)
    assert x_t[shares.pop(1.0)].mean().item() == pytest.approx(0, abs=0.05), "no trace of the data"
    for value, rows in shares.items():
        alpha = VP.alpha(torch.tensor(value)).item()
        assert x_t[rows].mean().item() == pytest.approx(50 * alpha, abs=0.15)


def test_the_probabilities_of_the_warm_up_give_way() -> None:
    objective = LADD(probabilities=(0.7, 0.1, 0.1, 0.1), warmup_probabilities=(0, 0, 0.5, 0.5), warmup_steps=5)
    assert [objective.probabilities_at(step) for step in (0, 4, 5)] == [
        (0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5), (0.7, 0.1, 0.1, 0.1),
    ]  # fmt: skip
    assert LADD().probabilities_at(0) == ()
    roles: Any = Game()
    data = torch.zeros(100, 1, dtype=torch.float64)
    objective.student_loss(roles, images(data, data), Step(0))
    assert roles.told[0][1].max() < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probabilities": (0.5, 0.5)}, "as many numbers as there are timesteps, 4"),
        ({"probabilities": (1, 0, 0, -1)}, "none negative"),
        ({"warmup_probabilities": (0, 0, 0, 0), "warmup_steps": 1}, "not all 0"),
        ({"warmup_steps": 3}, "no effect without warmup_probabilities"),
        ({"discriminator_updates": 0}, "at least 1"),
        ({"r1_weight": -1.0}, "at least 0"),
        ({"misaligned_weight": -1.0}, "at least 0"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LADD(**options)


# ---- turns ---------------------------------------------------------------------------------------------------------


def test_the_turns_and_their_data_are_those_of_the_options() -> None:
    objective = LADD((999,), data="pairs", discriminator_updates=4)
    assert [(p.name, p.updates, p.stream, p.repeats) for p in objective.phases(0)] == [
        ("discriminator", ("discriminator",), "pairs", 4), ("student", ("student",), "pairs", 1),
    ]  # fmt: skip
    assert objective.inference() == InferenceSpec((999,), "stochastic")
    assert [p.stream for p in LADD().phases(0)] == ["images", "images"]


@pytest.mark.parametrize(
    ("family", "options", "lora"),
    [
        ("sd_folder", {"layers": ("down_blocks.0", "mid_block", "up_blocks.0"), "r1_weight": 1.0}, {}),
        ("sd_folder", {"gan_loss": "relativistic"}, {"student": LORA}),
        ("sd3_folder", {}, {}),
    ],
    ids=["every block", "lora, relativistic", "flow"],
)
def test_a_turn_leaves_gradients_and_changes_on_its_own_roles_only(
    family: str, options: dict[str, Any], lora: Any, request: pytest.FixtureRequest
) -> None:
    trainer = trainer_of(load_family(request.getfixturevalue(family)), LADD((999, 499), **options), lora=lora)
    trainer.batches.latents = PaintedLatents()
    for phase in trainer.objective.phases(0):
        before = weights_of(trainer)
        values = trainer._run_phase(phase, 0)
        after = weights_of(trainer)
        moved = {name.partition("/")[0] for name in before if not torch.equal(before[name], after[name])}
        assert moved == set(phase.updates)
        assert all(values[f"{role}/gradient_norm"] > 0 for role in phase.updates)
        assert all(p.grad is None for p in trainer.cast.family.network().parameters())


def test_the_game_pulls_the_mean_of_a_student_to_that_of_the_data() -> None:
    """One number against the best linear discriminator of the moment: it ends at the data."""
    data = torch.full((256, 1), 2.0, dtype=torch.float64)
    roles: Any = Game(FLOW, "flow")
    torch.manual_seed(0)
    with torch.no_grad():
        roles.network.a.zero_()

    class Best:
        """The sign of the difference of the means, as a slope."""

        def __call__(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return (data.mean() - roles.network.b.detach()).clamp(-1, 1) * x_t

    roles.noting = Best()
    optimizer = torch.optim.SGD([roles.network.b], lr=0.5)
    for step in range(100):
        optimizer.zero_grad()
        LADD((999,)).student_loss(roles, images(data, data), Step(step)).total.backward()
        optimizer.step()
    assert roles.network.b.item() == pytest.approx(2.0, abs=0.05)
    assert add_noise(FLOW, data, torch.zeros(256), data).equal(data)
