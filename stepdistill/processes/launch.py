"""`stepdistill train --num-processes N` starts itself again through accelerate; `accelerate launch` does the same."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from stepdistill.errors import UserError


if TYPE_CHECKING:
    from accelerate import Accelerator

    from stepdistill.processes.sharding import Sharding
    from stepdistill.processes.share import Share
    from stepdistill.recipe import Recipe


# Longer than the main process needs for what the others wait for, such as encoding prompts. A process that dies is
# noticed at once by accelerate's agent, which does not wait for this.
PATIENCE = timedelta(hours=2)


def rank() -> int:
    """Number of this process among those that a launcher has started; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def launched() -> bool:
    """Whether this process is one of several that a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def shares(recipe: Recipe, num_processes: int, *, sharded: bool) -> list[Share]:
    """What each of so many processes plays of every stage.

    Raises:
        UserError: a stage's batch cannot be divided evenly.
    """
    from stepdistill.processes.share import divide

    return [
        divide(stage.batch_size, stage.accumulate, num_processes, recipe.where(f"stages.{index}"), whole=sharded)
        for index, stage in enumerate(recipe.stages)
    ]


def check_launch(recipe: Recipe, num_processes: int, *, shard: bool) -> None:
    """Finds before anything is started what so many processes on this machine could not do.

    Raises:
        UserError: too few devices, or a batch or a precision that cannot be divided.
    """
    import torch

    devices = torch.cuda.device_count()
    if recipe.device != "cpu" and 0 < devices < num_processes:
        raise UserError(f"--num-processes {num_processes}: torch sees {devices} GPU(s), and every process needs "
                        f"one of its own; use --num-processes {devices}")  # fmt: skip
    _check_device(recipe)
    if shard:
        check_divided(recipe)
    shares(recipe, num_processes, sharded=shard)


def launch(words: Sequence[str], num_processes: int, *, shard: bool = False) -> int:
    """Runs `stepdistill WORDS` in so many processes on this machine => exit code.

    A process that ends with an error ends the others.

    Args:
        words: the command's, without what asks for several processes.
        num_processes: how many.
        shard: whether networks with full weights are divided among them.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Ranks other than 0 would otherwise skip loading weights: accelerate's way to save memory, for one model alone.
    divided = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_cpu_ram_efficient_loading", "false"]
    options = ["--num_processes", str(num_processes), "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    if "OMP_NUM_THREADS" in os.environ:
        options += ["--num_cpu_threads_per_process", os.environ["OMP_NUM_THREADS"]]
    arguments = launch_command_parser().parse_args(
        [*(divided if shard else ["--multi_gpu"]), *options, "--module", "stepdistill", *words]
    )
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode not in (2, 130):  # these have said what is to be said
            how = f"was killed by signal {-failure.exitcode}" if failure.exitcode < 0 else "ended with an error"
            sys.stderr.write(f"error: process {number} {how}, and the other processes were ended; the same command "
                             "goes on from the last checkpoint\n")  # fmt: skip
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException:
        return 130
    return 0


def open_accelerator(recipe: Recipe) -> Accelerator:
    """Joins the processes that were started, if any were.

    Raises:
        UserError: the recipe asks for a device that is not there, or the launcher for something that cannot be had.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    _check_device(recipe)
    _check_request(recipe)
    precision, cpu = {"fp32": "no"}.get(recipe.precision, recipe.precision), recipe.device == "cpu"
    if not launched():
        _forget_former_run(precision, cpu)
    patience = [InitProcessGroupKwargs(timeout=PATIENCE)] if launched() else []
    return Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=patience)


def _forget_former_run(precision: str, cpu: bool) -> None:
    """accelerate has one precision and device for a process; a second run in it, as in a notebook, has its own."""
    from accelerate.state import AcceleratorState

    former = AcceleratorState._shared_state
    if former and (former["_mixed_precision"], former["_cpu"]) != (precision, cpu):
        AcceleratorState._reset_state(reset_partial_state=True)


def open_sharding(accelerator: Accelerator) -> Sharding | None:
    """How full networks are divided; None where nobody asked for it, or there is one process."""
    from stepdistill.processes.sharding import Sharding, wanted

    if accelerator.num_processes == 1 or not wanted():
        return None
    return Sharding.over_all(accelerator.device, accelerator.num_processes)


def _check_device(recipe: Recipe) -> None:
    import torch

    if recipe.device == "cuda" and not torch.cuda.is_available():
        where = recipe.where("device")
        raise UserError(f"{where}: cuda was asked for, but torch sees no such device; use auto or cpu")


def _check_request(recipe: Recipe) -> None:
    """What `accelerate launch` was asked for and cannot be had."""
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise UserError("accelerate gives a run one DeepSpeed engine, for one network with one optimiser, and a "
                        "distillation trains several by turns; use --use_fsdp with --fsdp_version 2 (or stepdistill "
                        "train --num-processes N --shard), which divides gradients and optimiser states as ZeRO-2 "
                        "does, and weights as well")  # fmt: skip
    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("Megatron-LM holds language models only; use --multi_gpu, or --use_fsdp with --fsdp_version 2")
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("the first version of FSDP cannot train several networks by turns; add --fsdp_version 2")
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise UserError("FSDP with parameters in the CPU's memory is not supported; leave out --fsdp_offload_params")
    if launched() and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise UserError("every process loads the teacher itself; add --fsdp_cpu_ram_efficient_loading false")
    check_divided(recipe)


def check_divided(recipe: Recipe) -> None:
    """Raises UserError for what a recipe may ask for and divided networks cannot do."""
    if recipe.precision == "fp16":
        raise UserError(f"{recipe.where('precision')}: fp16 scales its losses, which divided networks do not support; "
                        "use bf16 or fp32")  # fmt: skip
    if recipe.memory.channels_last:
        raise UserError(f"{recipe.where('memory.channels_last')}: networks can be divided in torch's own memory "
                        "layout only; use channels_last: false")  # fmt: skip
    if recipe.memory.compile:
        raise UserError(f"{recipe.where('memory.compile')}: the blocks of divided networks are gathered while they "
                        "compute, which is not compiled; use compile: false")  # fmt: skip
