"""The loop keeps its promises: who is trained when, by which gradients, and what happens when they are no good."""

from __future__ import annotations

import copy
import dataclasses
import itertools
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
from stepdistill.checkpoint import Checkpoints, tensors_equal
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.health import HealthSettings, Monitor
from stepdistill.objectives.base import Batch, Frozen, Head, Loss, Phase, Role, Step, Trained
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.vsd import VSD
from stepdistill.player import Player, PlayerSettings
from stepdistill.recipe import Recipe
from stepdistill.run import train
from stepdistill.trainer import Interrupted, Trainer
from tests.invariants.signals import terminate_at
from tests.tiny import LORA, PROMPTS, Copying, tiny_recipe, trainer_of, weights_of


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


# ---- what is not finite, and what has collapsed --------------------------------------------------------------------

SKIPPED = r"stage 1, step 4: phase 'copying': {} is not finite; 4 step\(s\) in a row were skipped"


@dataclasses.dataclass(frozen=True)
class FailingFrom(Copying):
    """Copying whose loss is not finite in some iterations."""

    first: int = 0
    last: int = 1000

    def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
        bad = self.first <= step.index <= self.last
        return Loss({"copying": super().loss(cast, batch, step).total * (float("nan") if bad else 1.0)})


def logged(folder: Path) -> list[dict[str, float]]:
    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_a_loss_that_stays_not_finite_stops_the_run_and_never_touches_the_weights(
    sd: ModelFamily, tmp_path: Path
) -> None:
    trainer = trainer_of(sd, Spoilt(spoil=lambda loss: loss / 0), lora={"student": LORA}, folder=tmp_path,
                         checkpoint_every=1, steps=9)  # fmt: skip
    before = weights_of(trainer)
    with pytest.raises(UserError, match=SKIPPED.format("copying") + ".*Lower the .*No checkpoint had been written"):
        trainer.run()
    assert tensors_equal(weights_of(trainer), before)
    assert not (tmp_path / "checkpoints").exists()
    assert [line["skipped"] for line in logged(tmp_path)] == [1.0] * 4


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(sd: ModelFamily) -> None:
    """sqrt has the finite value 0 and an infinite slope at 0."""
    spoilt = Spoilt(spoil=lambda loss: (loss - loss.detach()).abs().sqrt())
    trainer = trainer_of(sd, spoilt, lora={"student": LORA}, steps=9, player={"ema": 0.5})
    before = weights_of(trainer)
    with pytest.raises(UserError, match=SKIPPED.format("student/gradient_norm")):
        trainer.run()
    assert tensors_equal(weights_of(trainer), before)
    assert trainer.players["student"].updates == 0


def test_no_skips_stop_at_the_first_value_that_is_not_finite(sd: ModelFamily) -> None:
    trainer = trainer_of(sd, FailingFrom(first=1), lora={"student": LORA}, steps=9, skips=0)
    with pytest.raises(UserError, match=r"step 2: phase 'copying': copying is not finite; 1 step\(s\)"):
        trainer.run()


def test_a_few_bad_iterations_are_skipped_noted_and_survived(sd: ModelFamily, tmp_path: Path) -> None:
    trainer = trainer_of(sd, FailingFrom(first=1, last=2), lora={"student": LORA}, folder=tmp_path, steps=5,
                         checkpoint_every=1)  # fmt: skip
    trainer.checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9)
    seen, told = [weights_of(trainer)], []

    def remember(progress: Any) -> None:
        seen.append(weights_of(trainer))
        told.append(progress.doubts)

    trainer.on_step = remember
    trainer.run()
    same = [tensors_equal(before, after) for before, after in itertools.pairwise(seen)]
    assert same == [False, True, True, False, False]
    assert [line.get("skipped", 0.0) for line in logged(tmp_path)] == [0.0, 1.0, 1.0, 0.0, 0.0]
    assert ["copying" in line for line in logged(tmp_path)] == [True, False, False, True, True]
    assert [bool(doubts) for doubts in told] == [False, True, True, False, False]
    assert trainer.checkpoints.steps() == [1, 4, 5], "no checkpoint is written in doubt"
    assert trainer.players["student"].updates == 3


def test_repeated_nan_keeps_the_last_good_checkpoint_and_a_run_goes_on_from_it(sd_folder: str, tmp_path: Path) -> None:
    def make(objective: Any, folder: Path) -> Trainer:
        return trainer_of(load_family(sd_folder), objective, lora={"student": LORA}, folder=folder, steps=9,
                          checkpoint_every=1)  # fmt: skip

    failing = make(FailingFrom(first=3), tmp_path)
    snapshots = {}
    failing.on_step = lambda progress: snapshots.update({progress.step: weights_of(failing)})
    with pytest.raises(UserError, match=r"step 7: .*last good checkpoint is .*step-0000003.*--checkpoint 3"):
        failing.run()
    assert failing.checkpoints is not None
    assert failing.checkpoints.steps() == [2, 3]
    mended, straight = make(Copying(), tmp_path / "mended"), make(Copying(), tmp_path / "straight")
    mended.resume(*failing.checkpoints.load(3))
    assert tensors_equal(weights_of(mended), snapshots[3])
    mended.run()
    straight.run()
    assert tensors_equal(weights_of(mended), weights_of(straight))


def test_all_roles_of_a_phase_move_or_none_does(sd: ModelFamily) -> None:
    class Pair(Copying):
        def roles(self) -> dict[str, Role]:
            return {"teacher": Frozen(), "student": Trained(), "other": Trained()}

        def phases(self, step: int) -> Sequence[Phase]:
            return (Phase("pair", ("student", "other"), self.loss),)

        def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
            fine = super().loss(cast, batch, step).total
            other = super().loss(cast.renamed({"student": "other"}), batch, step).total
            return Loss({"fine": fine, "other": (other - other.detach()).abs().sqrt()})

    trainer = trainer_of(sd, Pair(), lora={"student": LORA, "other": LORA})
    before = weights_of(trainer)
    trainer._iterate()
    assert trainer._wrong == ["phase 'pair': other/gradient_norm is not finite"]
    assert tensors_equal(weights_of(trainer), before)
    assert all(p.grad is None for role in trainer.players for p in trainer.cast.parameters(role).values())


class Noting(torch.nn.Module):
    """A head that notes how often it was asked."""

    asked: Tensor

    def __init__(self, shapes: Sequence[Any]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            self.asked += 1
        return self.weight * features[0].mean()


def test_what_a_head_noted_in_a_skipped_update_is_forgotten(sd: ModelFamily) -> None:
    class Headed(Copying):
        def roles(self) -> dict[str, Role]:
            return {**super().roles(), "head": Head(Noting)}

        def phases(self, step: int) -> Sequence[Phase]:
            return (Phase("head", ("head",), self.loss),)

        def loss(self, cast: Cast, batch: Batch, step: Step) -> Loss:
            t = torch.full((len(batch),), 0.5, dtype=torch.float64)
            said = cast.head("head")(cast.denoiser("teacher"), batch.noise(), t, batch.condition)
            return Loss({"head": said * (float("inf") if step.index == 1 else 1.0)})

    trainer = trainer_of(sd, Headed(), lora={"student": LORA}, steps=4)
    trainer.run()
    assert trainer.cast.tensors("head")["asked"].item() == 3


@dataclasses.dataclass(frozen=True)
class Breaking(Copying):
    """Copying whose student gives one and the same picture from some iteration on."""

    at: int = 3

    def after_step(self, cast: Cast, step: int) -> None:
        if step == self.at:
            with torch.no_grad():
                cast.parameters("student")["conv_out.bias"].fill_(1e4)


def watched(family: ModelFamily, objective: Any, folder: Path, **settings: Any) -> Trainer:
    """A trainer with a monitor that looks after every iteration, and a checkpoint after each."""
    trainer = trainer_of(family, objective, folder=folder, **{"steps": 9, "checkpoint_every": 1, **settings})
    health = HealthSettings(every=1, prompts=2, teacher_steps=2, grace=0, patience=2)
    trainer.monitor = Monitor.of(trainer.cast, objective, PROMPTS, health)
    return trainer


def test_a_collapse_stops_the_run_with_a_diagnosis_and_a_run_goes_on_from_the_last_good_checkpoint(
    sd_folder: str, tmp_path: Path
) -> None:
    broken = watched(load_family(sd_folder), Breaking(), tmp_path)
    seen = []
    broken.on_step = seen.append
    with pytest.raises(UserError) as caught:
        broken.run()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("stage 1, step 5: the student has collapsed: ")
    for part in ("contrast", "diversity", "scale", " is above ", "in 2 measurement(s) in a row", "learning rate",
                 f"The last good checkpoint is {tmp_path / 'checkpoints' / 'step-0000003'}",
                 f"stepdistill export {tmp_path} --checkpoint 3"):  # fmt: skip
        assert part in text, part
    assert [bool(progress.doubts) for progress in seen] == [False, False, False, True, True]
    assert all(line["health/scale"] == p.health["scale"] for line, p in zip(logged(tmp_path), seen, strict=True))
    assert broken.checkpoints is not None
    assert broken.checkpoints.steps() == [2, 3], "nothing good was removed for something bad"
    mended = watched(load_family(sd_folder), Copying(), tmp_path / "mended")
    mended.resume(*broken.checkpoints.load(3))
    mended.run()
    straight = watched(load_family(sd_folder), Copying(), tmp_path / "straight")
    straight.run()
    assert tensors_equal(weights_of(mended), weights_of(straight))
    health = [[{k: v for k, v in line.items() if k.startswith("health/")} for line in logged(tmp_path / name)]
              for name in ("mended", "straight")]  # fmt: skip
    assert health[0] == health[1][3:]
    assert mended.monitor is not None and straight.monitor is not None
    assert mended.monitor.best == straight.monitor.best


def test_an_interrupted_run_in_doubt_leaves_the_good_checkpoint_as_the_newest(sd: ModelFamily, tmp_path: Path) -> None:
    trainer = watched(sd, Breaking(at=2), tmp_path)
    terminate_at(trainer, 3)
    with pytest.raises(Interrupted):
        trainer.run()
    assert trainer.checkpoints is not None
    assert trainer.checkpoints.steps() == [1, 2]


def test_an_absurd_learning_rate_ends_a_run_with_one_line(sd_folder: str, tmp_path: Path) -> None:
    content = tiny_recipe(sd_folder, tmp_path / "run", checkpoints={"every": 1})
    content["health"] = {"every": 1, "prompts": 2, "teacher_steps": 2, "grace": 0, "patience": 2}
    stage = content["stages"][0]
    stage.update(steps=12, accumulate=1, players={"default": {"optimizer": {"lr": 1e4}, "clip": None}})
    with pytest.raises(UserError, match=r"^stage 1, step \d+: .*(has collapsed|is not finite).*$"):
        train(Recipe.from_mapping(content))
    log = logged(tmp_path / "run")
    assert len(log) < 12
    assert not (tmp_path / "run" / "checkpoints" / "stage-0").exists()


def test_a_role_that_gets_no_gradient_is_named(sd: ModelFamily) -> None:
    anything = torch.ones((), requires_grad=True)
    trainer = trainer_of(sd, Spoilt(spoil=lambda loss: loss.detach() * anything), lora={"student": LORA})
    with pytest.raises(UserError, match=r"role 'student' got no gradient"):
        trainer.run()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("SGD", {"betas": (0.9, 0.99)}, r"\.betas: SGD does not take \(0\.9, 0\.99\) \(.*unexpected keyword"),
        ("AdamW", {"betas": (0.9, 2.0)}, r"\.betas: AdamW does not take \(0\.9, 2\.0\) \(Invalid beta parameter at "),
        ("AdamW", {"betas": (0.9,), "eps": 1e-6}, r"\.betas: AdamW does not take \(0\.9,\) \(tuple index out"),
        ("AdamW", {"fused": True, "foreach": True}, ": AdamW does not take these options .`fused` and `foreach`"),
        ("SGD", {"momentum": -1.0, "nesterov": True}, r": SGD does not take these options \(Invalid momentum"),
    ],
)
def test_options_that_an_optimiser_does_not_take_are_a_users_error(
    kind: str, options: dict[str, Any], message: str
) -> None:
    settings = PlayerSettings(getattr(torch.optim, kind), {"lr": 1.0, **options})
    with pytest.raises(UserError, match=rf"^players\.student\.optimizer{message}") as caught:
        Player("student", {"w": torch.nn.Parameter(torch.zeros(1))}, settings, Accelerator(cpu=True))
    assert "see the documentation of torch.optim." in str(caught.value)


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
