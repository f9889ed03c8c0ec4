"""The loop keeps its promises: who is trained when, by which gradients, and what happens when they are no good."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.cast import Cast
from stepdistill.checkpoint import tensors_equal
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import Batch, Loss, Phase, Step
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.vsd import VSD
from stepdistill.player import Player, PlayerSettings
from stepdistill.trainer import Trainer
from tests.tiny import LORA, Copying, trainer_of, weights_of


ROOT = Path(__file__).resolve().parents[2]
SGD = {"optimizer": torch.optim.SGD, "options": {"lr": 0.1}, "clip": None}


def of_role(weights: dict[str, Tensor], role: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name.startswith(f"{role}/")}


@dataclasses.dataclass(frozen=True)
class Spoilt(Copying):
    """Copying whose loss goes through a function of the test's."""

    spoil: Callable[[Tensor], Tensor] = lambda loss: loss

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        return Loss({"copying": self.spoil(super().loss(cast, batch, step).total)})


@pytest.mark.parametrize("objective", [DMD2(critic_updates=2), VSD()], ids=["dmd2", "vsd"])
@pytest.mark.parametrize("lora", [("student", "critic"), ("student",), ()], ids=["lora", "mixed", "full"])
def test_a_phase_changes_the_weights_of_its_own_roles_only(sd: ModelFamily, objective: Any, lora: Any) -> None:
    trainer = trainer_of(sd, objective, lora=dict.fromkeys(lora, LORA))
    for phase in objective.phases(0):
        before = weights_of(trainer)
        trainer._run_phase(phase, 0)
        after = weights_of(trainer)
        for role in trainer.players:
            same = [torch.equal(a, after[name]) for name, a in of_role(before, role).items()]
            if role in phase.updates:
                # the first update of a fresh adapter moves B alone, because A's gradient is proportional to B = 0
                assert same.count(False) >= len(same) / 2
            else:
                assert all(same)
        assert not any(p.requires_grad for role in trainer.players for p in trainer.cast.parameters(role).values())


def test_exactly_the_phases_roles_require_gradients_while_its_loss_is_computed(sd: ModelFamily) -> None:
    seen = []

    class Watching(DMD2):
        def phases(self, step: int) -> Sequence[Phase]:
            def watched(phase: Phase) -> Phase:
                def loss(cast: Cast, batch: Batch, step: Step) -> Loss:
                    trainable = {
                        r for r in ("student", "critic") for p in cast.parameters(r).values() if p.requires_grad
                    }
                    base = any(p.requires_grad for n, p in sd.network().named_parameters() if "lora_" not in n)
                    seen.append((phase.updates, tuple(trainable), base))
                    return phase.loss(cast, batch, step)

                return dataclasses.replace(phase, loss=loss)

            return [watched(phase) for phase in super().phases(step)]

    trainer = trainer_of(sd, Watching(critic_updates=2), lora={"student": LORA, "critic": LORA}, accumulate=2)
    trainer._iterate()
    assert seen == [(("critic",), ("critic",), False)] * 4 + [(("student",), ("student",), False)] * 2


@pytest.mark.parametrize("lora", [{"student": LORA}, {}], ids=["lora", "full"])
def test_four_micro_batches_of_one_are_one_batch_of_four(sd_folder: str, lora: Any) -> None:
    ends, losses = [], []
    for batch_size, accumulate in ((4, 1), (2, 2), (1, 4)):
        trainer = trainer_of(load_family(sd_folder), Copying(), lora=lora, player=SGD, batch_size=batch_size,
                             accumulate=accumulate, steps=2)  # fmt: skip
        reports: list[float] = []
        trainer.on_step = lambda progress, reports=reports: reports.append(progress.losses["copying"])
        start = weights_of(trainer)
        trainer.run()
        ends.append(weights_of(trainer))
        losses.append(reports)
    assert not tensors_equal(start, ends[0])
    for end, reports in zip(ends[1:], losses[1:], strict=True):
        assert reports == pytest.approx(losses[0], rel=1e-5)
        for name, value in end.items():
            torch.testing.assert_close(value, ends[0][name], rtol=1e-4, atol=1e-6)


def test_repeats_are_updates_on_fresh_data(sd: ModelFamily) -> None:
    trainer = trainer_of(sd, DMD2(critic_updates=3), lora={"student": LORA, "critic": LORA}, steps=2, accumulate=2)
    trainer.run()
    assert {name: player.updates for name, player in trainer.players.items()} == {"critic": 6, "student": 2}
    assert trainer.batches.drawn == {"prompts": 2 * 2 * (3 + 1)}


def test_the_average_moves_only_when_its_role_does(sd: ModelFamily) -> None:
    class Alternating(DMD2):
        """The critic at every iteration, the student at even ones."""

        def phases(self, step: int) -> Sequence[Phase]:
            return [phase for phase in super().phases(step) if phase.name == "critic" or step % 2 == 0]

    trainer = trainer_of(sd, Alternating(critic_updates=1), lora={"student": LORA}, player={"ema": 0.5}, steps=4)

    def averages() -> dict[str, Any]:
        return {name: copy.deepcopy(player.state()["ema"]) for name, player in trainer.players.items()}

    moved: dict[str, list[bool]] = {"student": [], "critic": []}
    for _ in range(4):
        before = averages()
        trainer._iterate()
        for name, after in averages().items():
            pairs = zip(before[name]["shadow_params"], after["shadow_params"], strict=True)
            moved[name].append(not all(torch.equal(a, b) for a, b in pairs))
    assert moved == {"student": [True, False, True, False], "critic": [True] * 4}
    assert averages()["student"]["optimization_step"] == 2
    assert averages()["critic"]["optimization_step"] == 4


def test_the_average_is_the_exponential_one_and_is_put_back_afterwards() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    settings = PlayerSettings(torch.optim.SGD, {"lr": 1.0}, ema=0.5, clip=None)
    player = Player("student", {"w": parameter}, settings, Accelerator(cpu=True))
    expected, value = 0.0, 0.0
    for step in range(1, 30):
        parameter.grad = torch.tensor([-1.0])
        player.step()
        value += 1
        decay = min(0.5, (1 + step - 1) / (10 + step - 1))  # Diffusers warms the decay up
        decay = 0.0 if step == 1 else decay
        expected = decay * expected + (1 - decay) * value
    with player.averaged():
        assert parameter.item() == pytest.approx(expected, rel=1e-5)
        assert parameter.item() < value - 0.5
    assert parameter.item() == value


def test_gradients_are_clipped_per_role_and_the_norm_before_is_reported() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    for clip, moved in ((1.0, [0.6, 0.8]), (None, [3.0, 4.0]), (10.0, [3.0, 4.0])):
        with torch.no_grad():
            parameter.zero_()
        settings = PlayerSettings(torch.optim.SGD, {"lr": 1.0}, clip=clip)
        player = Player("student", {"w": parameter}, settings, Accelerator(cpu=True))
        parameter.grad = torch.tensor([-3.0, -4.0])
        assert player.step() == pytest.approx(5.0)
        assert parameter.tolist() == pytest.approx(moved, abs=1e-5)
        assert parameter.grad is None


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_weights_and_checkpoints_alone(
    sd: ModelFamily, tmp_path: Path
) -> None:
    trainer = trainer_of(sd, Spoilt(spoil=lambda loss: loss / 0), lora={"student": LORA}, folder=tmp_path,
                         checkpoint_every=1)  # fmt: skip
    before = weights_of(trainer)
    with pytest.raises(UserError, match=r"phase 'copying', step 0: copying is not finite"):
        trainer.run()
    assert tensors_equal(weights_of(trainer), before)
    assert not (tmp_path / "checkpoints").exists()


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(sd: ModelFamily) -> None:
    """sqrt has the finite value 0 and an infinite slope at 0."""
    trainer = trainer_of(sd, Spoilt(spoil=lambda loss: (loss - loss.detach()).abs().sqrt()), lora={"student": LORA})
    before = weights_of(trainer)
    with pytest.raises(UserError, match=r"role 'student'.*gradient.*not finite"):
        trainer.run()
    assert tensors_equal(weights_of(trainer), before)


def test_a_role_that_gets_no_gradient_is_named(sd: ModelFamily) -> None:
    anything = torch.ones((), requires_grad=True)
    trainer = trainer_of(sd, Spoilt(spoil=lambda loss: loss.detach() * anything), lora={"student": LORA})
    with pytest.raises(UserError, match=r"role 'student' got no gradient"):
        trainer.run()


def test_options_that_an_optimiser_does_not_take_are_a_users_error() -> None:
    settings = PlayerSettings(torch.optim.SGD, {"lr": 1.0, "betas": (0.9, 0.99)})
    with pytest.raises(UserError, match=r"players\.student\.optimizer: SGD"):
        Player("student", {"w": torch.nn.Parameter(torch.zeros(1))}, settings, Accelerator(cpu=True))


def test_every_iteration_is_logged_with_losses_norms_and_learning_rates(sd: ModelFamily, tmp_path: Path) -> None:
    trainer = trainer_of(sd, DMD2(critic_updates=1), lora={"student": LORA}, folder=tmp_path, steps=2)
    heard = []
    trainer.on_step = heard.append
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [(0, 1), (0, 2)]
    for line, progress in zip(lines, heard, strict=True):
        assert {"critic", "matching", "direction", "student/gradient_norm", "critic/learning_rate"} <= line.keys()
        assert {name: line[name] for name in progress.losses} == progress.losses
    assert [progress.step for progress in heard] == [1, 2]
    assert heard[-1].seconds_left == 0


def test_a_step_is_drawn_from_seed_rank_stage_and_step_alone(sd_folder: str) -> None:
    def losses(disturbed: bool, **settings: Any) -> list[float]:
        trainer = trainer_of(load_family(sd_folder), DMD2(critic_updates=1), lora={"student": LORA}, **settings)
        seen: list[float] = []

        def remember(progress: Any) -> None:
            seen.append(progress.losses["matching"])
            if disturbed:
                torch.manual_seed(12345)

        trainer.on_step = remember
        trainer.run()
        return seen

    assert losses(False) == losses(True)
    assert losses(False) != losses(False, seed=1)
    assert losses(False) != losses(False, stage=1)


# ---- mixed precision -----------------------------------------------------------------------------------------------


@pytest.fixture
def bf16() -> Iterator[Accelerator]:
    """accelerate keeps one precision per process, so it has to be forgotten before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(sd: ModelFamily, bf16: Accelerator) -> None:
    dtypes = set()
    trainer = trainer_of(sd, DMD2(critic_updates=1), lora={"student": LORA}, accelerator=bf16, checkpointing=True)
    sd.network().mid_block.resnets[0].conv1.register_forward_hook(lambda m, i, output: dtypes.add(output.dtype))
    before = weights_of(trainer)
    trainer.run()
    after = weights_of(trainer)
    assert dtypes == {torch.bfloat16}
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert all(tensor.isfinite().all() for tensor in after.values())


# ---- several processes ---------------------------------------------------------------------------------------------


def one_process_of_two(teacher: str, output: str, lora: str) -> None:
    """What each of the processes below does."""
    trainer = trainer_of(load_family(teacher), Copying(), lora={"student": LORA} if lora == "lora" else {},
                         player=SGD, batch_size=1, steps=2)  # fmt: skip
    assert trainer.accelerator.num_processes == 2
    trainer.run()
    save_file(weights_of(trainer), f"{output}/{trainer.accelerator.process_index}.safetensors")


def start_two(teacher: str, output: Path, lora: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from tests.invariants.test_trainer import *; one_process_of_two({teacher!r}, {str(output)!r}, {lora!r})"
    processes = []
    for rank in range(2):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank),
                       "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}  # fmt: skip
        processes.append(subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE))
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()


@pytest.mark.dist
@pytest.mark.parametrize("lora", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_two_processes_with_half_a_batch_each_are_one_process_with_both_halves(
    sd_folder: str, tmp_path: Path, lora: str
) -> None:
    start_two(sd_folder, tmp_path, lora)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert tensors_equal(first, second), "the processes must not drift apart"
    alone: Trainer = trainer_of(load_family(sd_folder), Copying(), lora={"student": LORA} if lora == "lora" else {},
                                player=SGD, batch_size=2, steps=2)  # fmt: skip
    start = weights_of(alone)
    alone.run()
    end = weights_of(alone)
    assert not tensors_equal(start, end)
    for name, value in end.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
