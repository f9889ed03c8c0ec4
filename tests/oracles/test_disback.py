"""DisBack: the path from the teacher to the initial student and back, on Gaussians and in the real trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from stepdistill.cast import Cast, DenoiserHead
from stepdistill.checkpoint import tensors_equal
from stepdistill.condition import Condition
from stepdistill.denoiser import Denoiser, OwnWeights
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.objectives.base import (
    Batch,
    Frozen,
    InferenceSpec,
    Loss,
    NeedsSchedule,
    Phase,
    Recorded,
    Role,
    Step,
    Trained,
)
from stepdistill.objectives.denoising import Denoising
from stepdistill.objectives.disback import DisBack
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.f_distill import FDistill
from stepdistill.objectives.sid import SiD
from stepdistill.prediction import Levels, add_noise
from stepdistill.recipe import Recipe
from stepdistill.run import train
from stepdistill.schedule import FlowSchedule, NoiseSchedule
from tests.oracles.oracle import SCHEDULE, Linear
from tests.tiny import LORA, PaintedLatents, tiny_recipe, trainer_of, weights_of


M, S, A0, B0 = 0.7, 0.5, 1.3, -0.4  # teacher N(M, S^2), initial student N(B0, A0^2)


class Gaussian(nn.Module):
    """The clean mean of N(m, s^2) for every noise level: a critic of two numbers."""

    def __init__(self, m: float, s: float) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor(m, dtype=torch.float64))
        self.log_s = nn.Parameter(torch.tensor(s, dtype=torch.float64).log())

    def forward(self, x_t: Tensor, levels: Levels) -> Tensor:
        variance = (2 * self.log_s).exp()
        gain = levels.alpha * variance / (levels.alpha**2 * variance + levels.sigma**2)
        return self.m + gain * (x_t - levels.alpha * self.m)


class GaussianCast(Cast):
    """A cast without a pipeline: one linear student, everybody else a Gaussian that starts as the teacher."""

    def __init__(self, roles: Mapping[str, Role]) -> None:
        networks: dict[str, nn.Module] = {name: Gaussian(M, S) for name in roles}
        networks["student"] = Linear(A0, B0)
        self.family = SimpleNamespace(denoiser=lambda weights: Denoiser(call, weights, SCHEDULE, "sample"))
        self._weights = {name: OwnWeights(network) for name, network in networks.items()}
        self._heads, self._names, self.parked = {}, {}, {}


def call(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
    if isinstance(network, Linear):
        return network.a * x_t + network.b
    return network(x_t, Levels.at(SCHEDULE, SCHEDULE.t_from_model_time(model_time), x_t))


def batch_of(count: int) -> Batch:
    nothing = Condition({"none": torch.zeros(count, 1)})
    return Batch(nothing, nothing, (1,), torch.device("cpu"))


def numbers(cast: Cast, role: str) -> tuple[float, ...]:
    return tuple(p.item() for p in cast.parameters(role).values())


def play(objective: DisBack, cast: Cast, steps: range, lr: float) -> list[tuple[float, ...]]:
    """The critic's numbers after every iteration."""
    torch.manual_seed(0)
    roles = ("critic", "student")
    optimizers = {name: torch.optim.Adam(cast.parameters(name).values(), lr=lr) for name in roles}
    history = []
    for step in steps:
        for phase in objective.phases(step):
            with cast.trainable(phase.updates):
                phase.loss(cast, batch_of(1024), Step(step)).total.backward()
            for role in phase.updates:
                optimizers[role].step()
                optimizers[role].zero_grad()
        history.append(numbers(cast, "critic"))
        objective.after_step(cast, step)
    return history


def test_the_path_leads_from_the_teacher_to_the_untouched_student_without_a_detour() -> None:
    objective = DisBack(DMD2(timesteps=(2,), guidance=1.0, critic_updates=1), nodes=6, node_steps=60, interval=5)
    cast = GaussianCast(objective.roles())
    student = numbers(cast, "student")
    history = play(objective, cast, range(objective.recording), lr=0.009)
    assert numbers(cast, "student") == student == (A0, B0)
    path = [(M, S), *((m, torch.tensor(log_s).exp().item()) for m, log_s in history[59::60])]
    assert len(path) == 7
    for (m, s), (next_m, next_s) in pairwise(path[:4]):
        assert next_m < m
        assert next_s > s
    for (m, s), (next_m, next_s) in pairwise(path[3:]):  # arrived: what is left is noise
        assert next_m < m + 0.03
        assert next_s > s - 0.03
    assert path[-1] == (pytest.approx(B0, abs=0.05), pytest.approx(A0, abs=0.07))

    torch.manual_seed(1)
    x0 = A0 * torch.randn(2048, 1, dtype=torch.float64) + B0
    t = torch.full((2048,), 2 / 3, dtype=torch.float64)
    x_t = add_noise(SCHEDULE, x0, t, torch.randn_like(x0))
    critic, target, teacher = (
        cast.denoiser(role)(x_t, t, batch_of(2048).condition).x0.detach() for role in ("critic", "target", "teacher")
    )
    assert (critic - target).norm() < 0.2 * (critic - teacher).norm()


@dataclass(frozen=True)
class Watched:
    """A game that notes whom it was given as its teacher, and when."""

    seen: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def roles(self) -> Mapping[str, Role]:
        return {"teacher": Frozen(), "critic": Trained(), "student": Trained()}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase(f"student {step}", ("student",), self.loss),)

    def after_step(self, cast: Cast, step: int) -> None:
        self.ends.append(step)

    def inference(self) -> InferenceSpec:
        return InferenceSpec((2,))

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        self.seen.append((step.index, numbers(cast, "teacher")))
        return Loss({"nothing": sum(0 * p for p in cast.parameters("student").values())})


def test_every_node_is_the_target_once_for_its_interval_and_then_comes_the_teacher() -> None:
    base = Watched()
    objective = DisBack(base, nodes=4, node_steps=2, interval=3)
    cast = GaussianCast(objective.roles())
    history = play(objective, cast, range(8 + 9 + 4), lr=0.05)
    node = {number: history[2 * number - 1] for number in (1, 2, 3, 4)}
    assert len(set(node.values())) == 4
    teacher = numbers(cast, "teacher")
    assert teacher == numbers(GaussianCast(objective.roles()), "teacher"), "nobody writes into the teacher"
    assert [who for _, who in base.seen] == [node[3]] * 3 + [node[2]] * 3 + [node[1]] * 3 + [teacher] * 4
    assert [step for step, _ in base.seen] == list(range(13)), "the wrapped game counts from its own start"
    assert base.ends == list(range(13))
    assert [objective.node(step) for step in range(20)] == [None] * 8 + [3] * 3 + [2] * 3 + [1] * 3 + [0] * 3
    assert objective.phases(9)[0].name == "student 1"
    assert cast.parked == {}, "a node that was the target is not kept any longer"


def test_the_log_says_which_node_is_the_target() -> None:
    objective = DisBack(Watched(), nodes=2, node_steps=1, interval=1)
    cast = GaussianCast(objective.roles())
    play(objective, cast, range(2), lr=0.01)
    loss = objective.phases(2)[0].loss(cast, batch_of(2), Step(2))
    assert loss.logged["node"].item() == 1.0
    play(objective, cast, range(2, 3), lr=0.01)
    assert objective.phases(3)[0].loss(cast, batch_of(2), Step(3)).logged["node"].item() == 0.0


def test_without_nodes_it_is_the_wrapped_game_itself() -> None:
    base = DMD2(guidance=2.0, critic_updates=3)
    objective = DisBack(base, nodes=0)
    assert objective.roles() == base.roles()
    assert [objective.phases(step) for step in (0, 5)] == [base.phases(0), base.phases(5)]
    assert objective.inference() == base.inference()


def test_one_node_needs_no_role_for_it_and_goes_back_to_the_teacher_at_once() -> None:
    objective = DisBack(DMD2(), nodes=1, node_steps=3)
    assert "target" not in objective.roles()
    assert [objective.node(step) for step in range(5)] == [None, None, None, 0, 0]
    assert DisBack(DMD2(), nodes=2).roles()["target"] == Recorded(like="critic")


def test_recording_trains_the_unconditional_branch_of_as_many_samples_as_asked() -> None:
    nulls = []
    objective = DisBack(DMD2(timesteps=(2,)), nodes=1, condition_dropout=0.25)
    cast = GaussianCast(objective.roles())
    denoiser = cast.denoiser("critic")

    def recording(network: nn.Module, x_t: Tensor, model_time: Tensor, condition: Condition) -> Tensor:
        nulls.append(condition.tensors["null"])
        return call(network, x_t, model_time, condition)

    cast.denoiser = lambda role: (  # type: ignore[method-assign]
        Denoiser(recording, denoiser.weights, SCHEDULE, "sample") if role == "critic" else Cast.denoiser(cast, role)
    )
    rows = torch.zeros(4000)
    batch = Batch(Condition({"null": rows}), Condition({"null": rows + 1}), (1,), torch.device("cpu"))
    torch.manual_seed(0)
    objective.recording_loss(cast, batch, Step(0))
    assert nulls[0].mean().item() == pytest.approx(0.25, abs=0.03)


def test_around_sid_the_target_is_a_teacher_whose_gradient_is_known() -> None:
    """The wrapped loss with a node is SiD's own with this node as its teacher, through the node's input too."""
    base = SiD(timesteps=(2,), sampler="stochastic", guidance=1.0, weighting="constant")
    objective = DisBack(base, nodes=2, node_steps=30, interval=3)
    cast = GaussianCast(objective.roles())
    play(objective, cast, range(60), lr=0.009)
    step = Step(60)
    (student,) = (phase for phase in objective.phases(60) if phase.updates == ("student",))

    def gradient(loss: Any, cast: Cast, step: Step) -> list[float]:
        torch.manual_seed(3)
        with cast.trainable(("student",)):
            loss(cast, batch_of(64), step).total.backward()
            return [float(p.grad) for p in cast.parameters("student").values()]

    def without(roles: Cast) -> Cast:
        for p in roles.parameters("student").values():
            p.grad = None
        return roles

    found = gradient(student.loss, without(cast), step)
    known = cast.renamed({"teacher": "target"})
    assert found == gradient(base.student_loss, without(known), Step(0))
    assert found != gradient(base.student_loss, without(cast), Step(0)), "the node is not the teacher"
    assert all(p.grad is None for role in ("teacher", "critic", "target") for p in cast.parameters(role).values())


@pytest.mark.parametrize(
    "base",
    [DMD2(gan_weight=0.1, features="teacher", critic_updates=1),
     FDistill(features="teacher", critic_updates=1, bins=2)],
    ids=["dmd2", "f_distill"],
)  # fmt: skip
def test_a_discriminator_keeps_the_teachers_features_whoever_is_the_target(
    base: DMD2 | FDistill, sd_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = DisBack(base, nodes=3, node_steps=1, interval=1)
    trainer = trainer_of(load_family(sd_folder), objective, steps=6)
    trainer.batches.latents = PaintedLatents()
    whose, targets, judge, guided = [], [], DenoiserHead.__call__, Denoiser.guided

    def judging(self: DenoiserHead, denoiser: Denoiser, *given: Any) -> Tensor:
        whose.append(denoiser.weights)
        return judge(self, denoiser, *given)

    def guiding(self: Denoiser, *given: Any) -> Any:
        targets.append(self.weights)
        return guided(self, *given)

    monkeypatch.setattr(DenoiserHead, "__call__", judging)
    monkeypatch.setattr(Denoiser, "guided", guiding)
    ends: list[dict[str, Tensor]] = []
    trainer.on_step = lambda progress: ends.append(weights_of(trainer))
    trainer.run()
    weights = trainer.cast._weights
    assert len(whose) >= 3 * 3 and all(seen is weights["teacher"] for seen in whose)
    assert [next(name for name, w in weights.items() if w is seen) for seen in targets] == ["target"] * 2 + ["teacher"]
    assert not tensors_equal(ends[2], ends[3]) and not tensors_equal(ends[4], ends[5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": Denoising()}, "this one has student"),
        ({"base": DisBack(DMD2(), nodes=2)}, "no role 'target'"),
        ({"base": DMD2(), "nodes": -1}, "at least 0"),
        ({"base": DMD2(), "interval": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DisBack(**options)


@dataclass(frozen=True)
class Particular(NeedsSchedule, DMD2):
    """A game that goes with no schedule, or is called by the teacher's own scheduler."""

    own: bool = False

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        raise UserError("not with this teacher")

    def inference(self) -> InferenceSpec:
        return InferenceSpec((999,), "own") if self.own else super().inference()


def test_what_the_wrapped_game_asks_of_the_schedule_is_asked_too() -> None:
    schedule = FlowSchedule(1.0)
    DisBack(DMD2()).check_schedule(schedule)
    with pytest.raises(UserError, match="not with this teacher"):
        DisBack(Particular()).check_schedule(schedule)


def test_a_game_whose_student_keeps_the_teachers_scheduler_is_refused() -> None:
    with pytest.raises(UserError, match="a few-step student"):
        DisBack(Particular(own=True))


@pytest.mark.parametrize("lora", [{}, {"student": LORA, "critic": LORA}], ids=["full", "lora"])
def test_a_run_that_is_interrupted_on_the_path_ends_with_the_same_bits(
    sd_folder: str, tmp_path: Path, lora: dict
) -> None:
    """Steps 0 to 2 record, 3 and 4 go back by nodes 2 and 1, 5 has the teacher; stopped with two nodes parked."""
    objective = DisBack(DMD2(guidance=2.0, critic_updates=1), nodes=3, node_steps=1, interval=1)
    straight = trainer_of(load_family(sd_folder), objective, lora=lora, steps=6)
    start = {name: tensor for name, tensor in weights_of(straight).items() if name.startswith("student/")}
    ends = []
    straight.on_step = lambda progress: ends.append((progress.losses.get("node"), weights_of(straight)))
    straight.run()
    assert [node for node, _ in ends] == [None, None, None, 2.0, 1.0, 0.0]
    assert tensors_equal(start, {name: ends[2][1][name] for name in start}), "the student waits while recording"
    assert not tensors_equal(start, {name: ends[3][1][name] for name in start})

    first = trainer_of(load_family(sd_folder), objective, lora=lora, steps=2, folder=tmp_path)
    first.run()
    assert sorted(first.cast.parked) == ["node-1", "node-2"]
    second = trainer_of(load_family(sd_folder), objective, lora=lora, steps=6, folder=tmp_path)
    second.resume(*second.checkpoints.load(2))
    second.run()
    assert tensors_equal(weights_of(second), weights_of(straight))


def test_a_run_opens_the_data_and_plans_the_rates_of_what_comes_after_the_recording(
    sd_folder: str, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16), (200, 40, 40)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a")
    base = {"name": "dmd2", "gan_weight": 1e-3, "critic_updates": 1}
    content = tiny_recipe(sd_folder, tmp_path / "run")
    content["data"] |= {"images": str(tmp_path / "images"), "size": 16}
    content["stages"] = [{
        "objective": {"name": "disback", "base": base, "nodes": 1, "node_steps": 1}, "steps": 4, "batch_size": 2,
        "players": {"default": {"schedule": "linear", "optimizer": {"lr": 0.03}}},
    }]  # fmt: skip
    result = train(Recipe.from_mapping(content))
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert ["discriminator" in line for line in lines] == [False, True, True, True]
    assert "student/learning_rate" not in lines[0]
    assert [line["student/learning_rate"] for line in lines[1:]] == pytest.approx([0.02, 0.01, 0.0])
    assert [line["critic/learning_rate"] for line in lines] == pytest.approx([0.0225, 0.015, 0.0075, 0.0])
