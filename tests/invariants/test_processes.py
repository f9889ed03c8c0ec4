"""Two processes are one: the same weights, the same checkpoints, and they stop together. On the CPU, through gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.cast import Cast
from stepdistill.checkpoint import Checkpoints, tensors_equal
from stepdistill.data.latents import LatentBatch
from stepdistill.denoiser import OwnWeights
from stepdistill.families import load_family
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.processes.sharding import Sharding, whole
from stepdistill.processes.share import divide
from stepdistill.trainer import Interrupted, Trainer
from tests.invariants.signals import terminate_at
from tests.tiny import LORA, PROMPTS, scramble, trainer_of


pytestmark = pytest.mark.dist
ROOT = Path(__file__).resolve().parents[2]
STEPS = 2
# Two roles and a head, a student of two steps whose inputs are drawn, real samples.
GAME = DMD2(timesteps=(999, 499), guidance=2.0, critic_updates=1, gan_weight=0.1, discriminator_weight=0.1)
# No Adam: where a gradient is nothing but rounding, it makes a whole step of it.
PLAYER = {"optimizer": torch.optim.SGD, "options": {"lr": 0.5, "momentum": 0.9}, "ema": 0.9}
BOTH = {"student": LORA, "critic": LORA}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": BOTH, "batch": (4, 1)},
    "full": {"lora": {}, "batch": (4, 1)},
    "accumulated": {"lora": BOTH, "batch": (2, 2)},
    "sharded": {"lora": {}, "batch": (2, 2), "checkpointing": True},
}

RESUMED = ("lora", "sharded")


class NumberedLatents:
    """An images stream in which every sample is a function of its number alone."""

    def batch(self, seed: int, start: int, count: int, parts: int = 1) -> LatentBatch:
        numbers = range(start, start + count)
        rows = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1000 * seed + n)) for n in numbers]
        return LatentBatch(1.5 + 0.5 * torch.stack(rows), [PROMPTS[n % len(PROMPTS)] for n in numbers])


def make(kind: str, teacher: str, folder: Path, **changes: Any) -> Trainer:
    """A trainer for however many processes there are; "sharded" divides full networks among them."""
    accelerator = Accelerator(cpu=True)
    told = {**KINDS[kind]}
    divided = kind == "sharded" and accelerator.num_processes > 1
    share = divide(*told.pop("batch"), accelerator.num_processes, "here", whole=divided)
    sharding = Sharding.over_all(accelerator.device, accelerator.num_processes) if divided else None
    options = {"steps": STEPS, "checkpoint_every": 1, "player": PLAYER, **vars(share), **told, **changes}
    trainer = trainer_of(
        load_family(teacher), GAME, folder=folder, accelerator=accelerator, sharding=sharding, **options
    )
    trainer.batches.latents = NumberedLatents()
    for role in told["lora"]:
        scramble(trainer.cast.parameters(role), scale=0.1)  # with B = 0 there would be next to no gradient
    return trainer


def all_weights(trainer: Trainer) -> dict[str, Tensor]:
    parameters = {role: trainer.cast.parameters(role) for role in trainer.players}
    return {f"{role}/{n}": whole(p.detach()).clone() for role, own in parameters.items() for n, p in own.items()}


def averages(trainer: Trainer) -> dict[str, Tensor]:
    states = {role: player.state() for role, player in trainer.players.items()}
    return {f"{r}/{i}": t for r, s in states.items() for i, t in enumerate(s["ema"]["shadow_params"])}


def resumed(kind: str, teacher: str, checkpoints: Path, folder: Path) -> dict[str, Tensor]:
    """Goes on from the checkpoint of step 1 => weights at the end."""
    trainer = make(kind, teacher, folder)
    trainer.resume(*Checkpoints(checkpoints / "checkpoints").load(1))
    trainer.run()
    return all_weights(trainer)


# ---- what each of the two processes does ---------------------------------------------------------------------------


def one_of_two(teacher: str, output: str) -> None:
    folder, rank = Path(output), Accelerator(cpu=True).process_index
    for kind in KINDS:
        trainer = make(kind, teacher, folder / "two" / kind)
        trainer.run()
        save_file(all_weights(trainer), folder / f"{kind}-{rank}.safetensors")
        save_file(averages(trainer), folder / f"{kind}-ema-{rank}.safetensors")
        if kind in RESUMED:
            again = resumed(kind, teacher, folder / "one" / kind, folder / "again" / kind)
            save_file(again, folder / f"{kind}-resumed-{rank}.safetensors")
    told = {"drift": drifting(teacher, folder, rank), "stopped": stopping(teacher, folder, rank)}
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


def drifting(teacher: str, folder: Path, rank: int) -> str:
    """One process' weights are changed behind the others' backs."""
    trainer = make("lora", teacher, folder / "drift")
    if rank == 1:
        with torch.no_grad():
            next(iter(trainer.cast.parameters("critic").values())).add_(1e-6)
    try:
        trainer.save()
    except RuntimeError as error:
        return str(error)
    return "nothing was noticed"


def stopping(teacher: str, folder: Path, rank: int) -> list[Any]:
    """One of the processes gets a signal."""
    trainer = make("lora", teacher, folder / "stop", steps=50, checkpoint_every=1000)
    if rank == 1:
        terminate_at(trainer, 2)
    with suppress(Interrupted):
        trainer.run()
    return [trainer.step, *Checkpoints(folder / "stop" / "checkpoints").steps()]


def start_two(teacher: str, output: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from tests.invariants.test_processes import *; one_of_two({teacher!r}, {str(output)!r})"
    processes = []
    for rank in range(2):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank),
                       "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}  # fmt: skip
        processes.append(subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE))
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in processes:
            process.kill()


# ---- what came of it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(sd_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one process' runs, and of the same by two."""
    folder = tmp_path_factory.mktemp("processes")
    for kind in KINDS:
        trainer = make(kind, sd_folder, folder / "one" / kind)
        save_file(all_weights(trainer), folder / f"{kind}-start.safetensors")
        trainer.run()
        save_file(all_weights(trainer), folder / f"{kind}-alone.safetensors")
        save_file(averages(trainer), folder / f"{kind}-ema-alone.safetensors")
    start_two(sd_folder, folder)
    return folder


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    worst = max((float((found[name] - wanted[name]).abs().max()), name) for name in wanted)
    assert worst[0] <= 1e-6, worst


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_with_the_weights_of_one(played: Path, kind: str) -> None:
    alone, start = (load_file(played / f"{kind}-{name}.safetensors") for name in ("alone", "start"))
    for role in ("student", "critic", "discriminator"):
        names = [name for name in alone if name.startswith(f"{role}/")]
        assert max(float((alone[name] - start[name]).abs().max()) for name in names) > 1e-4, "far beyond the tolerance"
    assert_close(load_file(played / f"{kind}-0.safetensors"), alone)
    assert_close(load_file(played / f"{kind}-ema-0.safetensors"), load_file(played / f"{kind}-ema-alone.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_both_processes_hold_the_same_bits(played: Path, kind: str) -> None:
    for name in (kind, f"{kind}-resumed") if kind in RESUMED else (kind,):
        first, second = (load_file(played / f"{name}-{rank}.safetensors") for rank in range(2))
        assert tensors_equal(first, second)


@pytest.mark.parametrize("kind", RESUMED)
def test_a_checkpoint_by_one_process_is_resumed_by_two(played: Path, kind: str) -> None:
    assert_close(load_file(played / f"{kind}-resumed-0.safetensors"), load_file(played / f"{kind}-alone.safetensors"))


@pytest.mark.parametrize("kind", RESUMED)
def test_a_checkpoint_by_two_processes_is_resumed_by_one(
    sd_folder: str, played: Path, tmp_path: Path, kind: str
) -> None:
    found = resumed(kind, sd_folder, played / "two" / kind, tmp_path)
    assert_close(found, load_file(played / f"{kind}-alone.safetensors"))


@pytest.mark.parametrize("kind", ["lora", "sharded"])
def test_both_numbers_of_processes_write_the_same_files(played: Path, kind: str) -> None:
    one, two = (Checkpoints(played / who / kind / "checkpoints").load(STEPS) for who in ("one", "two"))
    assert one[0].keys() == two[0].keys()
    for role in one[0]:
        assert_close(two[0][role], one[0][role])
    assert one[1]["drawn"] == two[1]["drawn"]


def test_processes_that_have_drifted_apart_write_no_checkpoint(played: Path) -> None:
    for rank in range(2):
        told = json.loads((played / f"told-{rank}.json").read_text())["drift"]
        assert "process 1 has other weights than process 0 for critic" in told
    assert not Checkpoints(played / "drift" / "checkpoints").steps()


def test_a_signal_to_one_process_stops_both_after_the_same_step(played: Path) -> None:
    first, second = (json.loads((played / f"told-{rank}.json").read_text())["stopped"] for rank in range(2))
    assert first == second == [2, 2]


def test_a_network_is_divided_before_the_next_is_made(sd_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else each device would hold every role's network whole for a while, which it is to be spared."""
    seen: list[str] = []

    class Noting(Sharding):
        def shard(self, network: nn.Module) -> Any:
            seen.append("divided")
            return OwnWeights(network)

    family = load_family(sd_folder)
    make_network = family.plain_network

    def noted(**options: Any) -> nn.Module:
        seen.append("made")
        return make_network(**options)

    monkeypatch.setattr(family, "plain_network", noted)
    cast = Cast(family, DMD2().roles(), checkpointing=True, sharding=Noting(None))
    assert {"student", "critic"} <= set(cast.trained)
    assert seen == ["made", "divided"] * 2
