"""Peak memory and seconds per iteration at real sizes, beside what `stepdistill plan` says of the same recipe.

    python benchmarks/gpu/memory.py OUTPUT [--cases sdxl_lora sd15_lora sd15_compile attention stability] [--cap 24]

Networks have the real shapes of SD1.5 and SDXL and random weights, made from the configurations below: nothing is
downloaded. Every case runs in a process of its own under a cap on the allocator, leaves its row in OUTPUT/memory.json
or the reason why there is none, and lets the others go on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stepdistill.bench.report import device_name, installed_versions, today


GIB = 2**30
# Shapes of the published networks; see docs of Diffusers' UNet2DConditionModel for what each key means.
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
        "cross_attention_dim": 768, "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
# Text encoders at the widths of the real ones and of few layers: they wait on the host, and only the shape of what
# they say matters here.
WIDTHS = {"sd15": (768,), "sdxl": (768, 1280)}
LORA = {"default": {"weights": {"lora": {"rank": 64}}, "optimizer": {"lr": 1e-5}}}
SPARING = {"base": "bf16", "park_encoders": True}
DMD2_GAN = {"name": "dmd2", "guidance": 3.0, "critic_updates": 1, "gan_weight": 1e-3}
STAGE = {"objective": DMD2_GAN, "steps": 100, "batch_size": 1, "checkpointing": True, "players": LORA}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl_lora": ("sdxl", {"memory": SPARING, "stages": [STAGE]}),
    "sd15_lora": ("sd15", {"memory": SPARING, "stages": [{**STAGE, "checkpointing": False}]}),
    "sd15_full": ("sd15", {"memory": {**SPARING, "offload_optimizer": True}, "stages": [{**STAGE, "players": {}}]}),
    "sd15_compile": ("sd15", {"memory": {**SPARING, "compile": True}, "stages": [{**STAGE, "checkpointing": False}]}),
}


def tokenizer() -> Any:
    """Letters as tokens, made in memory."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def text_encoder(width: int, *, projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=width, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def write_teacher(name: str, folder: Path, side: int | None = None) -> str:
    """A pipeline of random weights, saved as bf16; made once.

    Args:
        name: key of UNETS.
        folder: where to.
        side: of its images in pixels; None: the published one.
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    if (folder / "model_index.json").is_file():
        return str(folder)
    torch.manual_seed(0)
    config = UNETS[name] if side is None else {**UNETS[name], "sample_size": side // 8}
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=8 * config["sample_size"],
    )  # fmt: skip
    parts: dict[str, Any] = {"unet": UNet2DConditionModel(**config), "scheduler": scheduler, "vae": vae}
    for index, width in enumerate(WIDTHS[name]):
        suffix = f"_{index + 1}" if index else ""
        parts[f"text_encoder{suffix}"] = text_encoder(width, projected=bool(index))
        parts[f"tokenizer{suffix}"] = tokenizer()
    if name == "sdxl":
        pipeline: Any = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True)
    else:
        pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                           requires_safety_checker=False)  # fmt: skip
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def recipe_of(name: str, work: Path, steps: int) -> Any:
    """The recipe of a case; nothing but training happens in it."""
    from stepdistill.recipe import Recipe

    model, content = CASES[name]
    work.mkdir(parents=True, exist_ok=True)
    prompts = work / "prompts.txt"
    prompts.write_text("\n".join("abcdefgh") + "\n")
    return Recipe.from_mapping({
        "name": name, "output": str(work / name), "teacher": write_teacher(model, work / model), "precision": "bf16",
        "device": "cuda", "data": {"prompts": str(prompts)}, "previews": None, "health": None,
        "export": {"pipeline": False, "lora": False}, **content,
        "stages": [{**stage, "steps": steps} for stage in content["stages"]],
    })  # fmt: skip


def trainer_of(recipe: Any) -> tuple[Any, Any]:
    """The recipe's own trainer, fed with random latents instead of images, and the recipe with all its defaults."""
    from benchmarks.overhead import Posteriors
    from stepdistill.console import Display
    from stepdistill.data.cache import EncodedTexts
    from stepdistill.processes.launch import open_accelerator
    from stepdistill.run import _Run
    from stepdistill.run_folder import RunFolder
    from stepdistill.streams import open_batches
    from stepdistill.teacher_kind import resolve

    recipe = resolve(recipe)
    folder = RunFolder(Path(recipe.output), keep=1)
    run = _Run(recipe, folder, Display(None), open_accelerator(recipe))
    run.batches = open_batches(recipe, run.objectives, run.family, folder, accelerator=run.accelerator,
                               display=run.display)  # fmt: skip
    run.batches.conditions.build()
    run.batches.latents = Posteriors(run.family, run.batches.prompts)
    run.batches.encode = EncodedTexts(run.batches.conditions, run.batches.prompts)
    trainer, _ = run._build_stage(0, {})
    trainer.checkpoints = trainer.log = trainer.on_step = None
    return trainer, recipe


def measure(name: str, work: Path, cap: float, rounds: int) -> dict[str, Any]:
    """One case: the plan, then the peak and the time of iterations under the cap."""
    from stepdistill.resources.apply import settings_of
    from stepdistill.resources.plan import plan

    recipe = recipe_of(name, work, rounds + 2)
    began = time.perf_counter()
    made = plan(recipe, device="this device", capacity_bytes=int(cap * GIB))
    planning = time.perf_counter() - began
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total))
    trainer, recipe = trainer_of(recipe)
    with settings_of(recipe):
        for _ in range(2):  # optimisers make their states, compiled blocks are compiled
            trainer._iterate()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            began = time.perf_counter()
            trainer._iterate()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated()
    return {
        "peak_gib": peak / GIB, "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "planned_gib": made.peak_bytes / GIB, "planned_to_measured": made.peak_bytes / peak,
        "seconds_per_iteration": statistics.median(seconds), "seconds_of_planning": planning, "cap_gib": cap,
    }  # fmt: skip


def attention(work: Path) -> dict[str, Any]:
    """Which kernels a pass of SD1.5 runs under each choice, and what the doctor finds."""
    from stepdistill.errors import UserError
    from stepdistill.resources.apply import one_pass, open_teacher
    from stepdistill.resources.attention import probe
    from stepdistill.resources.doctor import attention_findings

    recipe = recipe_of("sd15_lora", work, 1)
    family = open_teacher(recipe, "cuda")
    seen: dict[str, Any] = {}
    for choice in ("auto", "sdpa", "flash", "efficient", "math"):
        try:
            seen[choice] = probe(one_pass(family, recipe), choice, "UNet2DConditionModel")
        except UserError as error:
            seen[choice] = str(error)
    return {"kernels": seen, "doctor": {f.what: f.found for f in attention_findings("cuda", "bf16")}}


def stability(work: Path, iterations: int) -> dict[str, Any]:
    """DMD2 in bf16 on the bundled teacher: how many updates were left out, and how the losses went."""
    from stepdistill.recipe import Recipe
    from stepdistill.run import train

    output = work / "stability"
    changes = [f"output={output}", "device=cuda", "precision=bf16", "data.count=256", "previews=null",
               "export.pipeline=false", "export.lora=false", "bench=null", "checkpoints.every=1000"]  # fmt: skip
    recipe = Recipe.load("shapes/dmd2_plain_1step", changes)
    last = recipe.stages[-1].model_copy(update={"steps": iterations})
    train(recipe.model_copy(update={"stages": (last,)}), resume=False)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = {key: [row[key] for row in rows if key in row] for key in ("critic", "matching")}
    return {"iterations": len(rows), "skipped": sum(row.get("skipped", 0) for row in rows),
            "median_of_the_last_quarter": {key: statistics.median(values[-len(values) // 4 :])
                                           for key, values in losses.items() if values}}  # fmt: skip


def run_case(name: str, args: argparse.Namespace) -> dict[str, Any]:
    if name == "attention":
        return attention(args.work)
    if name == "stability":
        return stability(args.work, args.iterations)
    return measure(name, args.work, args.cap, args.rounds)


def guarded(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """A case in a process of its own, with a limit of time."""
    file = args.output / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, str(args.output), "--only", name, "--cap", str(args.cap), "--rounds",
               str(args.rounds), "--iterations", str(args.iterations), "--work", str(args.work)]  # fmt: skip
    began = time.perf_counter()
    try:
        code = subprocess.run(command, timeout=args.seconds, check=False).returncode
        failure = None if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        failure = f"not done after {args.seconds} s"
    row = json.loads(file.read_text()) if file.is_file() else {"failure": failure or "no result"}
    return {"case": name, **row, "wall_seconds": time.perf_counter() - began}


def main(arguments: Sequence[str] | None = None) -> None:
    names = [*CASES, "attention", "stability"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--cap", type=float, default=24.0, help="GiB that the allocator may take")
    parser.add_argument("--rounds", type=int, default=5, help="iterations that are timed")
    parser.add_argument("--iterations", type=int, default=200, help="of the case stability")
    parser.add_argument("--seconds", type=float, default=120, help="limit of each case")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_memory"))
    parser.add_argument("--only", choices=names, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.only:
        try:
            row = run_case(args.only, args)
        except Exception as error:  # the reason is a result too
            traceback.print_exc()
            row = {"failure": f"{type(error).__name__}: {error}"}
        (args.output / f"{args.only}.json").write_text(json.dumps(row, indent=2) + "\n")
        return
    rows = []
    for name in args.cases:
        rows.append(guarded(name, args))
        print(json.dumps(rows[-1], indent=2), flush=True)
        result = {"name": "memory", "date": today(), "device": device_name("cuda"), "versions": installed_versions(),
                  "rows": rows}  # fmt: skip
        (args.output / "memory.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
