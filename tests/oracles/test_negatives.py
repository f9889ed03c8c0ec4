"""SNOOPI in training: one random guidance scale for both networks (PG-SB), and negative prompts (NASA-T)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.attention import NASA
from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.objectives import negatives
from stepdistill.objectives.base import Step
from stepdistill.objectives.esd import ESD
from stepdistill.objectives.matching import draw_guidance
from stepdistill.objectives.negatives import steered_student
from stepdistill.objectives.vsd import VSD
from stepdistill.processes.share import SlicedDraws
from tests.oracles.oracle import Linear, Roles, batch_of, gaussian, label, linear_student
from tests.tiny import LORA, trainer_of, weights_of


STD, MEAN = 0.5, 0.7
POOL = ("a", "b", "c")
NEGATIVE = -2.0  # what the class below encodes every negative prompt to


class Encoding(Roles):
    """Roles that encode texts, and remember which."""

    def __init__(self, denoisers: Mapping[str, Denoiser]) -> None:
        super().__init__(denoisers)
        self.texts: list[str] = []

    def encode(self, prompts: Sequence[str]) -> Condition:
        self.texts += prompts
        return Condition({"label": torch.full((len(prompts),), NEGATIVE, dtype=torch.float64)})


class Guided(Denoiser):
    """A denoiser that remembers how its guided calls were made."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner._call, inner.weights, inner.schedule, inner.kind)
        self.nulls: list[float] = []
        self.scales: list[float] = []

    def guided(self, x_t: Tensor, t: Tensor, condition: Condition, null: Condition, scale: Any) -> Any:
        self.nulls.append(float(null.tensors["label"][0]))
        self.scales.append(scale)
        return super().guided(x_t, t, condition, null, scale)


@pytest.fixture
def strengths(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every strength that a student was steered with; the analytic student has no attention and stays as it is."""
    seen: list[float] = []

    def steered(denoiser: Denoiser, rule: NASA, negative: Condition) -> Denoiser:
        seen.append(rule.alpha)
        return denoiser

    monkeypatch.setattr(negatives, "steered", steered)
    return seen


def roles_at_the_match() -> tuple[Encoding, Linear]:
    """Student, teacher and critic agree on N(label, STD^2) of label MEAN."""
    network = Linear(STD, MEAN)
    oracle = gaussian(label, STD)
    student = linear_student(network)
    return Encoding({"student": student, "teacher": Guided(oracle), "critic": Guided(oracle)}), network


def noise() -> Tensor:
    return torch.randn(32, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def student_gradient(objective: VSD, step: int = 0) -> tuple[float, Encoding]:
    roles, network = roles_at_the_match()
    batch = batch_of(noise(), label=MEAN, null=0.0)
    objective.student_loss(roles, batch, Step(step)).total.backward()
    return abs(network.a.grad.item()) + abs(network.b.grad.item()), roles


def test_a_range_of_guidance_scales_is_drawn_from_uniformly() -> None:
    drawn = torch.tensor([draw_guidance((0.5, 4.0), Step(index)) for index in range(10_000)])
    assert 0.5 <= drawn.min() < 0.51 and 3.99 < drawn.max() <= 4.0
    counts = torch.histc(drawn, bins=10, min=0.5, max=4.0)
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_squared < 27.9, "9 degrees of freedom: one uniform sample in a thousand exceeds it"


def test_teacher_and_critic_get_the_same_scale_within_an_iteration_and_another_one_in_the_next() -> None:
    roles, _ = roles_at_the_match()
    batch = batch_of(noise(), label=MEAN, null=0.0)
    for step in range(5):
        VSD(guidance=(0.5, 4.0)).student_loss(roles, batch, Step(step))
    teacher, critic = roles.denoiser("teacher"), roles.denoiser("critic")
    assert isinstance(teacher, Guided) and isinstance(critic, Guided)
    assert teacher.scales == critic.scales
    assert len(set(teacher.scales)) == 5


@pytest.mark.parametrize("guidance", [0.5, 1.0, 4.0, (0.5, 4.0)])
def test_the_gradient_at_the_match_is_zero_for_any_scale_on_both_sides(guidance: Any) -> None:
    assert student_gradient(VSD(guidance=guidance))[0] == 0.0


def test_a_negative_prompt_on_the_teacher_alone_moves_the_student_from_the_match(strengths: list[float]) -> None:
    gradient, roles = student_gradient(VSD(guidance=2.0, negatives=POOL))
    assert gradient > 1e-3
    teacher, critic = roles.denoiser("teacher"), roles.denoiser("critic")
    assert isinstance(teacher, Guided) and isinstance(critic, Guided)
    assert (teacher.nulls, critic.nulls) == ([NEGATIVE], [0.0])


def test_the_student_is_steered_in_both_phases_with_a_strength_and_negatives_drawn_anew(
    strengths: list[float],
) -> None:
    roles, _ = roles_at_the_match()
    batch, objective = batch_of(noise(), label=MEAN, null=0.0), VSD(negatives=POOL, nasa=(0.2, 0.6))
    for index in range(50):
        objective.student_loss(roles, batch, Step(index, turn=0))
        objective.critic_loss(roles, batch, Step(index, turn=1))
    assert len(strengths) == len(set(strengths)) == 100
    assert 0.2 <= min(strengths) < 0.25 and 0.55 < max(strengths) <= 0.6
    assert len(roles.texts) == 100 * len(noise()), "one negative prompt for each row"
    assert set(roles.texts) == set(POOL)


def test_a_fixed_strength_is_taken_as_it_is(strengths: list[float]) -> None:
    student_gradient(VSD(negatives=POOL, nasa=0.5))
    assert strengths == [0.5]


def test_processes_that_share_a_batch_draw_the_negatives_of_one_process(strengths: list[float]) -> None:
    """Each row has the negative that it has in a run of one process, and all have one strength."""

    def texts(rows: int, part: int, parts: int) -> list[str]:
        roles, _ = roles_at_the_match()
        torch.manual_seed(5)  # a micro-batch has one seed for all processes
        with nullcontext() if parts == 1 else SlicedDraws(rows, part, parts):
            steered_student(roles, batch_of(noise()[:rows]), Step(3), POOL, (0.0, 1.0))
        return roles.texts

    whole = texts(24, 0, 1)
    assert whole == texts(12, 0, 2) + texts(12, 1, 2)
    assert whole[:12] != whole[12:]
    assert len(set(strengths)) == 1


def test_without_negatives_nothing_is_encoded_or_steered(strengths: list[float]) -> None:
    _, roles = student_gradient(VSD())
    assert (roles.texts, strengths) == ([], [])


def test_a_pool_may_be_a_file(strengths: list[float], tmp_path: Path) -> None:
    file = tmp_path / "negatives.txt"
    file.write_text("red\n\nblue\n")
    _, roles = student_gradient(VSD(negatives=str(file)))
    assert set(roles.texts) == {"red", "blue"}


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("dit", r"^negatives: this teacher is conditioned on classes, and on no text .*set negatives: \[\]$"),
        ("sd3", r"^negatives: a student is trained with NASA, .*joint attention.*set negatives: \[\], .*--nag"),
    ],
)
def test_a_teacher_whose_student_cannot_be_steered_is_told_with_the_option(teacher: str, message: str) -> None:
    family = load_family(f"tiny:{teacher}")
    trainer = trainer_of(family, VSD(negatives=POOL), texts=("1", "2", "3"))
    with pytest.raises(UserError, match=message):
        trainer.run()


def test_esd_without_entropy_is_vsd_with_the_same_negatives_to_the_bit(sd: ModelFamily) -> None:
    def losses(objective: VSD | ESD) -> list[float]:
        trainer = trainer_of(sd, objective)
        batch, found = trainer.batches.next("prompts", 2), []
        for phase in objective.phases(0):
            torch.manual_seed(3)
            found.append(phase.loss(trainer.cast, batch, Step(4)).total.item())
        return found

    same: dict[str, Any] = {"guidance": (1.0, 4.0), "condition_dropout": 0.0}
    with_them = losses(ESD(entropy=0.0, negatives=POOL, **same))
    assert with_them == losses(VSD(guide_critic=False, negatives=POOL, **same))
    without = losses(ESD(entropy=0.0, **same))
    assert all(one != other for one, other in zip(with_them, without, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_vsd_trains_a_real_student_with_negatives(sd: ModelFamily, checkpointing: bool) -> None:
    condition, x = sd.encode_prompts(["red"]), torch.randn(1, *sd.latent_shape())
    time = torch.tensor([0.9], dtype=torch.float64)
    before_output = sd.denoiser()(x, time, condition).native
    lora = {"student": LORA, "critic": LORA}
    trainer = trainer_of(sd, VSD(negatives=POOL), lora=lora, steps=2, checkpointing=checkpointing)
    before = weights_of(trainer)
    trainer.run()
    after = weights_of(trainer)
    changed = {name.partition("/")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"student", "critic"}
    assert torch.equal(trainer.cast.denoiser("teacher")(x, time, condition).native, before_output)
