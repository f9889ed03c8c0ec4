"""An interrupted run, resumed, ends with the same bits as one that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.checkpoint import Checkpoints, load_tree, tensors_equal
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.player import Player, PlayerSettings
from stepdistill.recipe import Recipe
from stepdistill.run import train
from stepdistill.run_folder import RunFolder
from stepdistill.trainer import Interrupted, Trainer
from tests.invariants.signals import terminate_at
from tests.tiny import LORA, tiny_recipe, trainer_of, weights_of


STEPS = 6
ROOT = Path(__file__).resolve().parents[2]


# ---- whole runs in processes of their own --------------------------------------------------------------------------


def write_recipe(folder: Path, teacher: str, **changes: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(tiny_recipe(teacher, folder / "run", **changes)))  # JSON is YAML
    return file


def start(recipe: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "stepdistill", "train", str(recipe), "--quiet", *words],
        cwd=recipe.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def steps_logged(recipe: Path) -> list[int]:
    log = recipe.parent / "run" / "metrics.jsonl"
    text = log.read_text() if log.is_file() else ""
    return [json.loads(line)["step"] for line in text.split("\n")[:-1]]


def stop_at(recipe: Path, step: int, number: signal.Signals) -> tuple[int, str]:
    """Starts the run, sends the signal when `step` is logged => exit code and error stream."""
    process = start(recipe)
    try:
        deadline = time.monotonic() + 300
        while step not in steps_logged(recipe):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        return process.wait(300), process.communicate()[1]
    finally:
        process.kill()
        process.communicate()


def finish_run(recipe: Path) -> None:
    process = start(recipe)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def final_weights(run: Path) -> dict[str, Tensor]:
    """Weights of all roles with their averages, as the stage ended, by role and name."""
    found = {}
    for role, entry in load_tree(run / "checkpoints" / "stage-0" / "roles").items():
        found.update({f"{role}/{name}": tensor for name, tensor in entry["tensors"].items()})
    return found


def last_checkpoint(run: Path) -> tuple[dict[str, dict[str, Tensor]], Any]:
    checkpoints = Checkpoints(run / "checkpoints")
    return checkpoints.load(checkpoints.steps()[-1])


def assert_same_state(a: Any, b: Any, place: str = "state") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same_state(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{place}.{index}")
    else:
        assert a == b, place


@pytest.fixture(scope="module")
def undisturbed(sd_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run that went through, LoRA student, full critic, averages, two micro-batches."""
    recipe = write_recipe(tmp_path_factory.mktemp("undisturbed"), sd_folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that are killed
    yield train(Recipe.load(recipe)).folder
    torch.set_num_threads(threads)


def test_a_run_killed_at_random_steps_and_started_again_ends_with_the_same_bits(
    sd_folder: str, undisturbed: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, sd_folder)
    generator = random.Random("kill")
    first = generator.randrange(1, STEPS - 1)
    for step in (first, generator.randrange(first + 1, STEPS)):
        code, _ = stop_at(recipe, step, signal.SIGKILL)
        assert code == -signal.SIGKILL
        assert not (tmp_path / "run" / "checkpoints" / "stage-0").exists(), "killed before the end"
    finish_run(recipe)

    assert tensors_equal(final_weights(tmp_path / "run"), final_weights(undisturbed))
    roles, state = last_checkpoint(tmp_path / "run")
    roles_undisturbed, state_undisturbed = last_checkpoint(undisturbed)
    assert state["step"] == STEPS
    assert all(tensors_equal(roles[role], roles_undisturbed[role]) for role in ("student", "critic"))
    assert_same_state(state, state_undisturbed)
    assert steps_logged(recipe) == list(range(1, STEPS + 1))
    logs = [(run / "metrics.jsonl").read_text().splitlines() for run in (tmp_path / "run", undisturbed)]
    for line, other in zip(*logs, strict=True):
        a, b = json.loads(line), json.loads(other)
        timing = {"images_per_second": 0, "seconds": 0}
        assert {**a, **timing} == {**b, **timing}


def test_sigterm_leaves_a_checkpoint_of_the_last_whole_step_and_exits_with_130(
    sd_folder: str, undisturbed: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, sd_folder, checkpoints={"every": 1000})
    code, errors = stop_at(recipe, 2, signal.SIGTERM)
    assert code == 130, errors
    assert "Traceback" not in errors
    assert "interrupted: checkpoint left at" in errors
    steps = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    assert len(steps) == 1
    assert 2 <= steps[0] < STEPS
    assert steps_logged(recipe) == list(range(1, steps[0] + 1))
    finish_run(recipe)
    assert tensors_equal(final_weights(tmp_path / "run"), final_weights(undisturbed))


def test_the_weights_that_are_compared_were_trained(sd_folder: str, undisturbed: Path) -> None:
    final = final_weights(undisturbed)
    teacher = load_family(sd_folder).network().state_dict()
    critic = {name.removeprefix("critic/"): t for name, t in final.items() if name.startswith("critic/")}
    assert critic.keys() == teacher.keys()
    assert not any(torch.equal(critic[name], teacher[name]) for name in teacher)
    ups = [tensor for name, tensor in final.items() if name.startswith("student/") and "lora_B" in name]
    assert ups and all(tensor.abs().max() > 0 for tensor in ups)


# ---- the same inside of this process -------------------------------------------------------------------------------


def make(folder: Path, sd_folder: str, **changes: Any) -> Trainer:
    settings = {"steps": STEPS, "accumulate": 2, "checkpoint_every": 2, "lora": {"student": LORA},
                "player": {"ema": 0.9}, **changes}  # fmt: skip
    return trainer_of(load_family(sd_folder), DMD2(critic_updates=2), folder=folder, **settings)


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_every_step_can_be_resumed_from(sd_folder: str, tmp_path: Path, schedule: str) -> None:
    player = {"ema": 0.9, "schedule": schedule, "warmup_steps": 0 if schedule == "constant" else 2, "total_steps": 12}
    steps = 3
    whole = make(tmp_path / "whole", sd_folder, player=player, steps=steps, checkpoint_every=1)
    whole.checkpoints = Checkpoints(tmp_path / "whole" / "checkpoints", keep=steps)
    whole.run()
    for step in range(1, steps) if schedule == "cosine" else [1]:
        resumed = make(tmp_path / f"resumed-{step}", sd_folder, player=player, steps=steps)
        torch.randn(7)  # what the generators hold must not matter
        resumed.resume(*whole.checkpoints.load(step))
        assert resumed.step == step
        resumed.run()
        assert tensors_equal(weights_of(resumed), weights_of(whole)), step
        for name in whole.players:
            assert_same_state(resumed.players[name].state(), whole.players[name].state())
        rates = {name: player.learning_rate for name, player in resumed.players.items()}
        assert rates == {name: player.learning_rate for name, player in whole.players.items()}


def test_what_is_averaged_is_resumed_too(sd_folder: str, tmp_path: Path) -> None:
    whole = make(tmp_path, sd_folder, steps=4)
    whole.run()
    resumed = make(tmp_path / "resumed", sd_folder, steps=4)
    resumed.resume(*whole.checkpoints.load(2))
    resumed.run()
    with whole.players["student"].averaged(), resumed.players["student"].averaged():
        assert tensors_equal(weights_of(resumed), weights_of(whole))
        averaged = weights_of(whole)
    assert not tensors_equal(weights_of(whole), averaged), "the average lags behind the weights"


def test_the_same_recipe_gives_the_same_bits_and_another_seed_gives_others(sd_folder: str, tmp_path: Path) -> None:
    ends = []
    for number, seed in enumerate((0, 0, 1)):
        content = tiny_recipe(sd_folder, tmp_path / str(number), seed=seed)
        content["stages"][0]["steps"] = 1
        torch.manual_seed(number)  # a run must not depend on what happened before it in the process
        ends.append(final_weights(train(Recipe.from_mapping(content)).folder))
    assert tensors_equal(ends[0], ends[1])
    assert not tensors_equal(ends[0], ends[2])


def test_two_signals_stop_at_once_and_one_stops_after_the_step(sd_folder: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, sd_folder, checkpoint_every=1000)
    terminate_at(trainer, 3)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        trainer.run()
    assert signal.getsignal(signal.SIGTERM) is before
    assert trainer.checkpoints is not None
    assert trainer.checkpoints.steps() == [3]

    twice = make(tmp_path / "twice", sd_folder, checkpoint_every=1000)

    class Impatient(DMD2):
        def after_step(self, cast: Any, step: int) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # the interpreter handles signals between two of its own steps

    twice.objective = Impatient(critic_updates=2)
    with pytest.raises(KeyboardInterrupt) as caught:
        twice.run()
    assert not isinstance(caught.value, Interrupted)
    assert twice.step == 0


def test_a_signal_in_the_last_iteration_stops_what_would_follow(sd_folder: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, sd_folder, steps=2, checkpoint_every=1000)
    terminate_at(trainer, 2)
    with pytest.raises(Interrupted):
        trainer.run()
    assert trainer.checkpoints is not None
    again = make(tmp_path / "again", sd_folder, steps=2, checkpoint_every=1000)
    again.resume(*trainer.checkpoints.load(2))
    again.run()
    assert again.step == 2, "nothing is left to do but what follows"


def test_a_checkpoint_of_other_adapters_is_refused_with_its_reason(sd_folder: str, tmp_path: Path) -> None:
    from stepdistill.adapters import LoraSettings

    whole = make(tmp_path, sd_folder, steps=2)
    whole.run()
    other = make(tmp_path / "other", sd_folder, lora={"student": LoraSettings(3, 3.0, LORA.targets)})
    with pytest.raises(UserError, match=r"role 'student'.*another rank"):
        other.resume(*whole.checkpoints.load(2))


def test_the_log_of_a_killed_run_loses_what_will_be_repeated_and_half_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"stage": stage, "step": step}) for stage, step in [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]]
    folder.log.write_text("\n".join([*lines, '{"stage": 1, "st']))
    folder.truncate_log(1, 2)
    assert folder.log.read_text().splitlines() == lines[:4]
    folder.truncate_log(1, 0)
    assert folder.log.read_text().splitlines() == lines[:2]
    folder.log.unlink()
    folder.truncate_log(0, 0)
    assert not folder.log.exists()


def test_a_log_that_a_full_disk_does_not_let_shorten_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    text = "".join(json.dumps({"stage": 0, "step": step}) + "\n" for step in (1, 2))
    folder.log.write_text(text)

    def full(path: Path, *args: object, **options: object) -> None:
        path.write_bytes(b"")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"metrics\.jsonl could not be written \(No space left on device\); make room"):
        folder.truncate_log(0, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert folder.log.read_text() == text


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {"lr": 0.1, "amsgrad": True}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ("RMSprop", {"lr": 0.1, "centered": True}),
        ("Adafactor", {"lr": 0.1}),
        ("NAdam", {"lr": 0.1}),
        ("Adagrad", {"lr": 0.1}),
    ],
)
@pytest.mark.parametrize("schedule", ["constant", "cosine_with_restarts", "polynomial"])
def test_the_state_of_any_optimiser_and_schedule_survives_the_disk(
    tmp_path: Path, name: str, options: dict[str, Any], schedule: str
) -> None:
    from accelerate import Accelerator

    def player() -> Player:
        torch.manual_seed(0)
        network = torch.nn.Linear(3, 2)
        settings = PlayerSettings(getattr(torch.optim, name), options, schedule=schedule, total_steps=10, ema=0.5)
        return Player("student", dict(network.named_parameters()), settings, Accelerator(cpu=True))

    def play(one: Player, steps: range) -> None:
        for step in steps:
            for index, parameter in enumerate(one.parameters.values()):
                generator = torch.Generator().manual_seed(10 * step + index)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            one.step()

    whole, half = player(), player()
    play(whole, range(6))
    play(half, range(3))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"student": half.parameters}, half.state())
    roles, state = checkpoints.load(3)
    resumed = player()
    with torch.no_grad():
        for key, parameter in resumed.parameters.items():
            parameter.copy_(roles["student"][key])
    resumed.load_state(state)
    play(resumed, range(3, 6))
    assert tensors_equal(resumed.parameters, whole.parameters)
    assert_same_state(resumed.state(), whole.state())
