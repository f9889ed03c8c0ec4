"""How much an iteration costs beyond the network passes that the algorithm needs.

    python benchmarks/iteration_overhead.py [--teacher assets/shapes/teacher] [--batch-size 32] [--lora]

One DMD2 iteration (one student update, N critic updates) is timed through the trainer, and, alternating with it in
the same process, the bare passes of the same networks on the same batch. Only the ratio means something.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from stepdistill.adapters import LoraSettings
from stepdistill.bench.report import device_name, installed_versions, today
from stepdistill.cast import Cast
from stepdistill.condition import Condition
from stepdistill.data.batches import Batches
from stepdistill.data.cache import EncodedOnTheFly
from stepdistill.data.prompts import load_prompts
from stepdistill.families import load_family
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.player import Player, PlayerSettings
from stepdistill.trainer import Trainer, TrainerSettings


class Precomputed:
    """Encoded prompts in memory, as a cache would give them: the text encoder is no part of an iteration."""

    def __init__(self, family, prompts) -> None:
        self._all = EncodedOnTheFly(family, prompts).conditions(range(len(prompts)))

    def build(self, progress=None) -> None:
        """Nothing to do."""

    def conditions(self, indices):
        """Rows by number."""
        return self._all[torch.tensor(indices)]


def trainer_of(args: argparse.Namespace) -> Trainer:
    """A DMD2 game on the given teacher."""
    family = load_family(args.teacher)
    objective = DMD2(guidance=3.0, critic_updates=args.critic_updates)
    settings = LoraSettings(args.rank, args.rank, family.lora_targets)
    lora = {"student": settings, "critic": settings} if args.lora else {}
    accelerator = Accelerator(cpu=args.device == "cpu")
    family.pipeline.to(accelerator.device)
    cast = Cast(family, objective.roles(), lora=lora)
    player = PlayerSettings(torch.optim.AdamW, {"lr": 1e-5})
    players = {name: Player(name, cast.parameters(name), player, accelerator) for name in cast.trained}
    prompts = load_prompts("shapes", count=256)
    batches = Batches(family, prompts, Precomputed(family, prompts), None, seed=0)
    return Trainer(cast, objective, players, batches, accelerator, TrainerSettings(10**6, args.batch_size))


def bare_passes(trainer: Trainer, args: argparse.Namespace) -> Callable[[], None]:
    """The passes that the algorithm needs, on the trainer's own networks, with nothing around them."""
    cast, count = trainer.cast, args.batch_size
    batch = trainer.batches.next("prompts", count)
    t = torch.full((count,), 500.0, device=batch.device)
    family = cast.family

    def call(role: str, rows: int = 1) -> torch.Tensor:
        weights = cast.denoiser(role).weights
        condition = Condition.cat([batch.condition] * rows)
        with weights.active():
            return family.forward(weights.network, batch.noise().repeat(rows, 1, 1, 1), t.repeat(rows), condition)

    def passes() -> None:
        for _ in range(args.critic_updates):
            with torch.no_grad():
                call("student")
            with cast.trainable(("critic",)):
                call("critic").square().mean().backward()
        with cast.trainable(("student",)):
            call("student").square().mean().backward()
        with torch.no_grad():
            call("teacher", rows=2)
            call("critic")
        for player in trainer.players.values():
            player.optimizer.zero_grad()

    return passes


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """How long one call takes, until the device has done all of it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def measure(args: argparse.Namespace) -> dict[str, object]:
    """A row of the results: iteration and bare passes in turns, so that both meet the same machine."""
    trainer = trainer_of(args)
    passes, device = bare_passes(trainer, args), trainer.cast.family.device
    trainer._iterate()
    passes()
    rounds = [(seconds_of(trainer._iterate, device), seconds_of(passes, device)) for _ in range(args.rounds)]
    return {
        "model": f"dmd2, {'LoRA' if args.lora else 'full'}",
        "batch_size": args.batch_size,
        "critic_updates": args.critic_updates,
        "seconds_per_iteration": statistics.median(a for a, _ in rounds),
        "seconds_of_bare_passes": statistics.median(b for _, b in rounds),
        "ratio": statistics.median(a / b for a, b in rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="assets/shapes/teacher")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--critic-updates", type=int, default=5)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/iteration_overhead.json"))
    args = parser.parse_args()
    row = measure(args)
    print(json.dumps(row, indent=2))
    old = json.loads(args.output.read_text())["rows"] if args.output.is_file() else []
    rows = [r for r in old if r["model"] != row["model"]] + [row]
    result = {"name": "iteration_overhead", "date": today(), "device": device_name(args.device),
              "versions": installed_versions(), "seeds": {"data": 0}, "recipe_sha256": None, "rows": rows}  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
