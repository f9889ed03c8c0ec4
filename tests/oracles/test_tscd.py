"""One stage of segmented consistency: its turns, its adversary, whose steps it follows, and a whole tiny training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.adapters import LoraSettings
from stepdistill.checkpoint import tensors_equal
from stepdistill.denoiser import Denoiser
from stepdistill.export.schedulers import student_scheduler
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import Batch, Frozen, Objective, Recorded, Step, Trained
from stepdistill.objectives.encoder_adversary import EncoderAdversary
from stepdistill.objectives.tcd import TCD
from stepdistill.objectives.trajectory import Trajectory
from stepdistill.objectives.tscd import SOURCE, TSCD
from stepdistill.sampling import solver_step
from stepdistill.times import trailing
from stepdistill.trainer import Trainer
from tests.oracles.oracle import Roles, constant, gaussian
from tests.oracles.trajectories import STD, VP, Table, images, tabled
from tests.tiny import LORA, PaintedLatents, trainer_of, weights_of


FULL = TSCD(segments=2, gan_weight=0.5, source="previous", target_decay=0.9)


# ---- turns ---------------------------------------------------------------------------------------------------------


def test_without_an_adversary_only_the_student_learns_and_nobody_is_copied_in_vain() -> None:
    assert TSCD(target_decay=0.0).roles() == {"teacher": Frozen(), "student": Trained()}
    assert TSCD().roles() == {"teacher": Frozen(), "student": Trained(), "target": Recorded("student")}
    (phase,) = TSCD().phases(0)
    assert (phase.name, phase.updates, phase.stream) == ("student", ("student",), "images")


def test_with_an_adversary_the_discriminator_learns_first() -> None:
    first, second = replace(FULL, discriminator_updates=3).phases(0)
    assert (first.name, first.updates, first.repeats) == ("discriminator", ("encoder", "discriminator"), 3)
    assert (second.name, second.updates, second.repeats) == ("student", ("student",), 1)
    assert FULL.roles()[SOURCE] == Recorded("student")
    assert FULL.roles()["encoder"] == Trained()


def test_one_stock_scheduler_serves_the_unified_student_with_8_4_2_and_1_steps() -> None:
    table = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler: Any = student_scheduler(table, TSCD().inference())
    assert type(scheduler).__name__ == "TCDScheduler"
    for steps in (8, 4, 2, 1):
        scheduler.set_timesteps(steps)
        assert tuple(scheduler.timesteps.tolist()) == trailing(VP, steps)


# ---- what the adversary is shown, and how its word is weighed ------------------------------------------------------


class Calls(Roles):
    """Roles that note whose network was called, on what and with a graph or without."""

    def __init__(self, denoisers: dict[str, Denoiser]) -> None:
        super().__init__(denoisers)
        self.seen: list[tuple[str, Tensor, bool]] = []
        for name, denoiser in denoisers.items():
            call = denoiser._call

            def noting(module: Any, x_t: Tensor, *rest: Any, name: str = name, call: Any = call) -> Tensor:
                self.seen.append((name, x_t, torch.is_grad_enabled()))
                return call(module, x_t, *rest)

            denoiser._call = noting


@pytest.fixture
def game(monkeypatch: pytest.MonkeyPatch) -> tuple[Calls, Batch, list[tuple[str, dict[str, Any]]]]:
    """Analytic roles, a batch, and an adversary that notes its arguments and says the sum of what is fake."""
    torch.manual_seed(0)
    roles = Calls({"teacher": gaussian(constant(0.0), STD, VP), "student": tabled(Table(8, 0.3)),
                   "target": tabled(Table(8, 0.5)), SOURCE: tabled(Table(8, 0.7))})  # fmt: skip
    noted: list[tuple[str, dict[str, Any]]] = []

    def term(self: Any, cast: Any, start: Any, real: Tensor, fake: Tensor, at: Tensor, batch: Any) -> Tensor:
        noted.append(("discriminator", {"start": start, "real": real, "fake": fake, "at": at}))
        return fake.sum()

    def student(self: Any, cast: Any, start: Any, fake: Tensor, at: Tensor, batch: Any) -> Tensor:
        noted.append(("student", {"start": start, "fake": fake, "at": at}))
        return fake.sum()

    monkeypatch.setattr(EncoderAdversary, "discriminator_term", term)
    monkeypatch.setattr(EncoderAdversary, "student_term", student)
    x0 = torch.randn(16, 2, 2, 2, dtype=torch.float64)
    return roles, images(x0, torch.randn_like(x0)), noted


GAME = TSCD(segments=2, gan_weight=0.5, solver_steps=8, guidance=1.0)


def leap_of(objective: TSCD, roles: Roles, batch: Batch, seed: int) -> Any:
    torch.manual_seed(seed)
    return objective.trajectory.leap(roles.denoiser("teacher"), batch)


@pytest.mark.parametrize("conditional", [True, False])
def test_the_discriminator_is_shown_both_jumps_where_they_end(game: Any, conditional: bool) -> None:
    roles, batch, noted = game
    objective = replace(GAME, conditional=conditional)
    torch.manual_seed(1)
    loss = objective.discriminator_loss(roles, batch, Step(0))
    ((turn, shown),) = noted
    assert turn == "discriminator" and set(loss.terms) == {"discriminator"}
    leap = leap_of(objective, roles, batch, 1)
    target = objective.trajectory.target(roles.denoiser("teacher"), roles.denoiser("target"), leap, batch)
    assert torch.equal(shown["real"], target) and torch.equal(shown["at"], leap.end)
    assert not shown["fake"].requires_grad and not shown["real"].requires_grad
    assert (shown["fake"] - shown["real"]).abs().max() > 1e-3
    if conditional:
        assert torch.equal(shown["start"][0], leap.x_t) and torch.equal(shown["start"][1], leap.t)
    else:
        assert shown["start"] is None


def test_the_students_loss_is_the_weighted_mix_on_one_jump(game: Any) -> None:
    roles, batch, noted = game

    def losses(**weights: float) -> dict[str, float]:
        torch.manual_seed(2)
        told = replace(GAME, **weights).student_loss(roles, batch, Step(0))
        return {name: value.item() for name, value in told.terms.items()}

    both = losses()
    jump = noted[-1][1]["fake"]
    leap = leap_of(GAME, roles, batch, 2)
    target = GAME.trajectory.target(roles.denoiser("teacher"), roles.denoiser("target"), leap, batch)
    assert both["trajectory"] == pytest.approx((jump - target).square().mean().item(), rel=1e-12)
    assert both["adversarial"] == pytest.approx(0.5 * jump.sum().item(), rel=1e-12)
    weighed = losses(distance_weight=3.0, gan_weight=2.0)
    assert weighed["trajectory"] == pytest.approx(3 * both["trajectory"], rel=1e-12)
    assert weighed["adversarial"] == pytest.approx(4 * both["adversarial"], rel=1e-12)
    assert set(losses(gan_weight=0.0)) == {"trajectory"}


def test_no_network_is_asked_whose_word_is_not_needed(game: Any) -> None:
    roles, batch, _ = game
    told = {
        "both": (replace(GAME), ["teacher", "target", "student"]),
        "no distance": (replace(GAME, distance_weight=0.0), ["student"]),
        "previous": (replace(GAME, source="previous"), [SOURCE, "target", "student"]),
        "itself": (replace(GAME, target_decay=0.0), ["teacher", "student", "student"]),
    }
    for name, (objective, expected) in told.items():
        roles.seen.clear()
        objective.student_loss(roles, batch, Step(0))
        assert [who for who, _, _ in roles.seen] == expected, name
        assert [graph for _, _, graph in roles.seen] == [False] * (len(expected) - 1) + [True], name
        assert all(len(x_t) == len(batch) for _, x_t, _ in roles.seen), "an unguided call has no second half"


def test_the_guided_teacher_is_asked_in_one_call_and_the_stage_before_without_guidance(game: Any) -> None:
    roles, batch, _ = game
    for source, rows in (("teacher", 2 * len(batch)), ("previous", len(batch))):
        roles.seen.clear()
        replace(GAME, guidance=4.0, source=source).student_loss(roles, batch, Step(0))
        assert len(roles.seen[0][1]) == rows, source


def test_the_stage_befores_student_leads_the_way(game: Any) -> None:
    roles, batch, _ = game
    objective = replace(GAME, segments=8, gan_weight=0.0, source="previous")
    torch.manual_seed(3)
    loss = objective.student_loss(roles, batch, Step(0)).total
    leap = leap_of(objective, roles, batch, 3)
    x_s, found = (
        solver_step(roles.denoiser(name), leap.x_t, leap.t, leap.s, batch.condition, batch.null, 1.0)
        for name in (SOURCE, "student")
    )
    assert loss.item() == pytest.approx((found - x_s).square().mean().item(), rel=1e-12)


def test_the_noise_offset_is_one_constant_per_channel_and_sample() -> None:
    torch.manual_seed(4)
    x0 = torch.zeros(4000, 3, 2, 2)
    oracle = gaussian(constant(0.0), STD, VP)
    leap = Trajectory(1, 50, noise_offset=0.05).leap(oracle, images(x0, x0))
    offset = leap.x_t / VP.sigma(leap.t)[:, None, None, None]
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset))
    assert offset[..., 0, 0].std().item() == pytest.approx(0.05, rel=0.05)
    assert torch.equal(Trajectory(1, 50).leap(oracle, images(x0, x0)).x_t, x0)


# ---- on a real, tiny network ---------------------------------------------------------------------------------------


def trainer_for(
    family: ModelFamily,
    objective: Objective,
    folder: Path | None = None,
    lora: LoraSettings | None = LORA,
    **settings: Any,
) -> Trainer:
    trainer = trainer_of(family, objective, lora={"student": lora} if lora else None, folder=folder, **settings)
    trainer.batches.latents = PaintedLatents()
    return trainer


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("objective", [TCD(), FULL], ids=["tcd", "tscd"])
def test_only_the_phases_own_roles_get_gradients(
    sd: ModelFamily, objective: Objective, lora: LoraSettings | None
) -> None:
    trainer = trainer_for(sd, objective, lora=lora)
    roles = [name for name, role in objective.roles().items() if not isinstance(role, Frozen)]
    for phase in objective.phases(0):
        batch = trainer.batches.next("images", 2)
        with trainer.cast.trainable(phase.updates):
            phase.loss(trainer.cast, batch, Step(0)).total.backward()
        for role in roles:
            found = [p.grad for p in trainer.cast.parameters(role).values() if p.grad is not None]
            assert any(bool(g.abs().max() > 0) for g in found) == (role in phase.updates), (phase.name, role)
            for parameter in trainer.cast.parameters(role).values():
                parameter.grad = None
    assert all(p.grad is None for name, p in sd.network().named_parameters() if ".lora_" not in name)


def test_the_target_is_the_students_moving_average_and_the_source_stays(sd: ModelFamily) -> None:
    trainer = trainer_for(sd, FULL, steps=3)
    before = {name: p.detach().clone() for name, p in trainer.cast.parameters("student").items()}
    expected: dict[str, Tensor] = {}
    for _ in range(3):
        trainer._iterate()
        now = {name: p.detach().clone() for name, p in trainer.cast.parameters("student").items()}
        expected = {name: 0.9 * expected[name] + 0.1 * now[name] for name in now} if expected else now
    target = trainer.cast.parameters("target")
    for name, value in expected.items():
        torch.testing.assert_close(target[name].detach(), value, rtol=0, atol=1e-7)
    assert tensors_equal(dict(trainer.cast.parameters(SOURCE)), before)
    assert not tensors_equal(dict(target), before)


def test_a_stage_of_everything_can_be_resumed_to_the_same_bits(sd_folder: str, tmp_path: Path) -> None:
    def make(folder: Path) -> Trainer:
        return trainer_for(load_family(sd_folder), FULL, folder, steps=2, checkpoint_every=1)

    whole = make(tmp_path / "whole")
    whole.run()
    resumed = make(tmp_path / "resumed")
    assert whole.checkpoints is not None
    resumed.resume(*whole.checkpoints.load(1))
    resumed.run()
    assert tensors_equal(weights_of(resumed), weights_of(whole))
    for role in ("target", SOURCE):
        assert tensors_equal(resumed.cast.tensors(role), whole.cast.tensors(role))


def test_a_flow_teacher_is_distilled_too(sd3: ModelFamily) -> None:
    objective = replace(FULL, gan_weight=0.0)
    trainer = trainer_for(sd3, objective, lora=None, steps=1)
    before = weights_of(trainer)
    trainer._iterate()
    assert all(bool(torch.isfinite(value).all()) for value in weights_of(trainer).values())
    assert not tensors_equal(weights_of(trainer), before)
