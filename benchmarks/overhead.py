"""How much an iteration costs beyond the network passes that the algorithm needs, and its peak memory.

    python benchmarks/overhead.py [--objectives vsd dmd2_gan sid lcm scm] [--teacher assets/shapes/teacher] [--lora]

One iteration of each objective (all turns of it) is timed through the trainer, and, alternating
with it in the same process, the bare passes of the same networks on as many samples. Only the ratio means something
elsewhere: the median of the rounds' own ratios, since a machine's speed changes between rounds more than within one.
On a CPU the same is told of the process's own seconds, in which programs beside it have no part.
What an algorithm needs is the table `passes_of`; optimisers, noise, losses and data are the overhead.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from stepdistill.adapters import LoraSettings
from stepdistill.bench.report import device_name, installed_versions, today
from stepdistill.cast import Cast
from stepdistill.condition import Condition
from stepdistill.data.batches import Batches
from stepdistill.data.cache import EncodedOnTheFly, EncodedTexts
from stepdistill.data.latents import LatentBatch
from stepdistill.data.prompts import PromptSet, load_prompts
from stepdistill.families import load_family
from stepdistill.families.base import ModelFamily
from stepdistill.objectives.base import Batch, Objective, Trained
from stepdistill.objectives.dmd2 import DMD2
from stepdistill.objectives.lcm import LCM
from stepdistill.objectives.scm import SCM
from stepdistill.objectives.sid import SiD
from stepdistill.objectives.tscd import TSCD
from stepdistill.objectives.vsd import VSD
from stepdistill.player import Player, PlayerSettings
from stepdistill.resources.heap import kept_heap
from stepdistill.trainer import Trainer, TrainerSettings


STATUS, CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Pass:
    """One call of a network.

    Attributes:
        role: whose weights.
        rows: calls per sample; guidance needs 2.
        by: what a gradient is taken by: "weights", "input", "" for a pass without a graph, or "direction" for one in
            forward mode, which carries a derivative along.
        features: whether the pass ends at the layers that the discriminator sees, and goes on in its head.
    """

    role: str
    rows: int = 1
    by: str = ""
    features: bool = False


SAMPLE, LEARN = Pass("student"), Pass("student", by="weights")


def passes_of(name: str, critic_updates: int) -> tuple[Objective, list[Pass]]:
    """An objective and the network passes that one of its iterations needs by its paper's algorithm."""
    return matching(name, critic_updates) if name in MATCHING else trajectory(name)


def matching(name: str, critic_updates: int) -> tuple[Objective, list[Pass]]:
    """Of the objectives with a critic."""
    denoise = Pass("critic", by="weights")
    if name == "vsd":  # SwiftBrush, algorithm 1, teacher and critic guided
        return VSD(guidance=3.0), [LEARN, Pass("teacher", 2), Pass("critic", 2), SAMPLE, denoise]
    if name == "sid":  # SiD-LSG: all four guided, and the student's gradient goes through teacher and critic
        turn = [LEARN, Pass("teacher", 2, "input"), Pass("critic", 2, "input")]
        return SiD(guidance=3.0), [*turn, SAMPLE, Pass("critic", 2, "weights")]
    turn, critic_turn = [LEARN, Pass("teacher", 2), Pass("critic")], [SAMPLE, denoise]
    if name == "dmd2":
        return DMD2(guidance=3.0, critic_updates=critic_updates), turn + critic_updates * critic_turn
    # DMD2 section 4.3: real and generated samples through the critic's encoder in its turn, generated ones in the
    # student's.
    turn += [Pass("critic", by="input", features=True)]
    critic_turn += 2 * [Pass("critic", by="weights", features=True)]
    objective = DMD2(guidance=3.0, critic_updates=critic_updates, gan_weight=1e-3)
    return objective, turn + critic_updates * critic_turn


def trajectory(name: str) -> tuple[Objective, list[Pass]]:
    """Of the objectives that follow the guided teacher's path."""
    step = [Pass("teacher", 2), Pass("target"), LEARN]  # one step of the teacher, the target there, the student
    if name == "lcm":  # LCM, algorithm 1
        return LCM(guidance=3.0, embed_guidance=False), step
    if name == "tscd":  # Hyper-SD, section 3.1, its distance alone
        return TSCD(guidance=3.0), step
    # sCM, algorithm 1: the derivative of the student along the teacher's velocity, then the student
    return SCM(guidance=3.0), [Pass("teacher", 2), Pass("student", by="direction"), LEARN]


MATCHING, TRAJECTORY = ("vsd", "dmd2", "dmd2_gan", "sid"), ("lcm", "tscd", "scm")
OBJECTIVES = (*MATCHING, *TRAJECTORY)


class Precomputed:
    """Encoded prompts in memory, as a cache would give them: the text encoder is no part of an iteration."""

    def __init__(self, family: ModelFamily, prompts: PromptSet) -> None:
        self._all = EncodedOnTheFly(family, prompts).conditions(range(len(prompts)))

    def build(self, progress: object = None) -> None:
        """Nothing to do."""

    def conditions(self, indices: Sequence[int]) -> Condition:
        """Rows by number."""
        return self._all[torch.tensor(indices)]


class Posteriors:
    """Encoded images in memory, as a cache would give them; what they show does not matter here."""

    def __init__(self, family: ModelFamily, prompts: PromptSet) -> None:
        self._captions = prompts.prompts
        self._mean = torch.randn(len(prompts), *family.latent_shape(), device=family.device)

    def batch(self, seed: int, start: int, count: int, parts: int = 1) -> LatentBatch:
        """Draws around the means."""
        numbers = [n % len(self._captions) for n in range(start, start + count)]
        mean = self._mean[numbers]
        return LatentBatch(mean + 0.1 * torch.randn_like(mean), [self._captions[n] for n in numbers])


def trainer_of(objective: Objective, args: argparse.Namespace) -> Trainer:
    """A game on the given teacher."""
    family = load_family(args.teacher)
    settings = LoraSettings(args.rank, args.rank, family.lora_targets)
    trained = [name for name, role in objective.roles().items() if isinstance(role, Trained)]
    lora = dict.fromkeys(trained, settings) if args.lora else {}
    accelerator = Accelerator(cpu=args.device == "cpu")
    family.pipeline.to(accelerator.device)
    cast = Cast(family, objective.roles(), lora=lora)
    player = PlayerSettings(torch.optim.AdamW, {"lr": 1e-5})
    players = {name: Player(name, cast.parameters(name), player, accelerator) for name in cast.trained}
    prompts = load_prompts("shapes", count=256)
    conditions = Precomputed(family, prompts)
    batches = Batches(family, prompts, conditions, Posteriors(family, prompts), seed=0,
                      encode=EncodedTexts(conditions, prompts))  # fmt: skip
    return Trainer(cast, objective, players, batches, accelerator, TrainerSettings(10**6, args.batch_size))


def play(cast: Cast, batch: Batch, wanted: Pass) -> None:
    """One pass with nothing around it."""
    denoiser, rows = cast.denoiser(wanted.role), wanted.rows
    x = batch.noise().repeat(rows, 1, 1, 1).requires_grad_(wanted.by == "input")
    condition = Condition.cat([batch.condition] * rows)

    half = torch.full((len(x),), 0.5, dtype=torch.float64, device=x.device)

    def output() -> Tensor:
        if wanted.by == "direction":
            return denoiser.jvp(x, half, condition, torch.randn_like(x), half)[1]
        if wanted.features:
            return cast.head("discriminator")(denoiser, x, half, condition)
        with denoiser.weights.active():
            times = torch.full((len(x),), 500.0, device=x.device)
            return cast.family.forward(denoiser.weights.network, x, times, condition)

    if wanted.by in ("", "direction"):
        with torch.no_grad():
            output()
    elif wanted.by == "input":
        torch.autograd.grad(output().square().mean(), x)
    else:
        with cast.trainable((wanted.role, "discriminator") if wanted.features else (wanted.role,)):
            output().square().mean().backward()


def bare(trainer: Trainer, passes: Sequence[Pass]) -> Callable[[], None]:
    """All passes of an iteration on the trainer's own networks."""
    batch = trainer.batches.next("prompts", trainer.settings.batch_size)

    def run() -> None:
        for wanted in passes:
            play(trainer.cast, batch, wanted)
        for player in trainer.players.values():
            player.optimizer.zero_grad()

    return run


class Seconds(NamedTuple):
    """How long one call takes: by the clock, and of the process's own time on all of its threads."""

    clock: float
    process: float


def seconds_of(work: Callable[[], None], device: torch.device) -> Seconds:
    """How long one call takes, until the device has done all of it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter(), time.process_time()
    work()
    wait()
    return Seconds(time.perf_counter() - began[0], time.process_time() - began[1])


def peak_gib(work: Callable[[], None], device: torch.device) -> float | None:
    """Most memory in use during one call: the accelerator's, or what the whole process occupies (Linux only)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        CLEAR_PEAK.write_text("5")  # see proc(5): sets the largest resident size to the present one
        work()
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    except OSError:
        return None
    return int(found[1]) / 2**20 if found else None


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """A row of the results: iteration and bare passes in turns, so that both meet the same machine.

    Both with the heap that `Trainer.run` gives its iterations.
    """
    with kept_heap(torch.device(args.device)):
        return measured(name, args)


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row."""
    objective, passes = passes_of(name, args.critic_updates)
    trainer = trainer_of(objective, args)
    work, device = bare(trainer, passes), trainer.cast.family.device
    for _ in range(args.warmup):
        trainer._iterate()
        work()
    rounds = [(seconds_of(trainer._iterate, device), seconds_of(work, device)) for _ in range(args.rounds)]
    return {
        "model": f"{name}, {'LoRA' if args.lora else 'full'}",
        "batch_size": args.batch_size,
        "critic_updates": sum(p.repeats for p in objective.phases(0) if p.name == "critic"),
        "rows_through_networks": sum(p.rows for p in passes) * args.batch_size,
        "seconds_per_iteration": statistics.median(ours.clock for ours, _ in rounds),
        "seconds_of_bare_passes": statistics.median(bare.clock for _, bare in rounds),
        "ratio": statistics.median(ours.clock / bare.clock for ours, bare in rounds),
        **of_the_process(rounds, device),
        "rounds": [(ours.clock, bare.clock) for ours, bare in rounds],
        "peak_gib": peak_gib(trainer._iterate, device),
    }


def of_the_process(rounds: Sequence[tuple[Seconds, Seconds]], device: torch.device) -> dict[str, float]:
    """The ratio of the process's own seconds; an accelerator's work is none of them."""
    if device.type == "cuda":
        return {}
    return {"process_ratio": statistics.median(ours.process / bare.process for ours, bare in rounds)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--teacher", default="assets/shapes/teacher")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--critic-updates", type=int, default=5, help="of dmd2; other critics have one")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/overhead.json"))
    args = parser.parse_args(arguments)
    rows = []
    for name in args.objectives:
        rows.append(measure(name, args))
        print(json.dumps(rows[-1], indent=2), flush=True)
        gc.collect()  # the networks of one objective are not to be counted with the next one's
    old = json.loads(args.output.read_text())["rows"] if args.output.is_file() else []
    measured = {row["model"] for row in rows}
    rows = [*(row for row in old if row["model"] not in measured), *rows]
    result = {"name": "overhead", "date": today(), "device": device_name(args.device),
              "versions": installed_versions(), "seeds": {"data": 0}, "recipe_sha256": None, "rows": rows}  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
