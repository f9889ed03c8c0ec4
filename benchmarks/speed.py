"""Whether the toolkit stays out of the way: time with it over time without it, three times.

    python benchmarks/speed.py [--parts training latency throughput] [--model runs/quickstart/pipeline] [--rounds 10]
    python benchmarks/speed.py --parts latency throughput --random sd15  # a network of that size, of random weights

training    an iteration of each objective over the bare network passes that it needs (see overhead.py)
latency     one image in one step by the exported pipeline over its denoiser and its decoder called bare; at most 1.05
throughput  a benchmark's cell, from loading to features, over loading and sampling as many images bare; at most 1.1

Both sides of a ratio take turns in one process, so that they meet the same machine; only the ratios mean something
elsewhere: medians of the rounds' own ratios, since a machine's speed changes between rounds more than within one.
Results go to benchmarks/results/speed.json; the exit code is the number of ratios above their limit.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the scripts beside this one

from benchmarks import overhead  # noqa: E402
from benchmarks.gpu.memory import write_teacher  # noqa: E402
from stepdistill.bench.benchmark import PLAIN, Runner, Scorer  # noqa: E402
from stepdistill.bench.generate import ModelUnderTest, Painter, load_pipeline  # noqa: E402
from stepdistill.bench.metrics.weights import Weights  # noqa: E402
from stepdistill.bench.prompts import ShapesProtocol  # noqa: E402
from stepdistill.bench.report import device_name, installed_versions, today  # noqa: E402


LATENCY_LIMIT, THROUGHPUT_LIMIT = 1.05, 1.1
PARTS = ("training", "latency", "throughput")

Work = Callable[[], object]


def row(model: str, measure: str, ours: Sequence[float], bare: Sequence[float], limit: float | None) -> dict[str, Any]:
    """A row of the results, from seconds of both sides, round by round."""
    rounds = list(zip(ours, bare, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    return {"model": model, "measure": measure, "seconds": statistics.median(ours),
            "seconds_bare": statistics.median(bare), "ratio": ratio, "rounds": rounds, "limit": limit,
            "passed": None if limit is None else ratio <= limit}  # fmt: skip


def in_turns(ours: Work, bare: Work, args: argparse.Namespace, *, warmup: int) -> tuple[list[float], list[float]]:
    """Seconds of both sides, one after the other, round by round."""
    device = torch.device(args.device)
    for _ in range(warmup):
        ours()
        bare()
    rounds = [(overhead.seconds_of(ours, device).clock, overhead.seconds_of(bare, device).clock)
              for _ in range(args.rounds)]  # fmt: skip
    return [a for a, _ in rounds], [b for _, b in rounds]


def training(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Iterations over bare passes; no limit is set, since it differs with what a game does besides."""
    options = argparse.Namespace(
        teacher=args.teacher, device=args.device, batch_size=args.batch_size, critic_updates=5, lora=False, rank=32,
        warmup=2, rounds=args.rounds,
    )  # fmt: skip
    for name in args.objectives:
        found = overhead.measure(name, options)
        gc.collect()  # the networks of one objective are not to be counted with the next one's
        seconds = zip(*found["rounds"], strict=True)
        yield row(found["model"], "iteration over bare passes", *seconds, None)


@torch.no_grad()
def latency(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The pipeline's call for one image, with text encoded before, over the two calls that it cannot avoid."""
    pipeline: Any = load_pipeline(tested(args, 1), device=args.device)
    embeds = pipeline.encode_prompt("a red circle", pipeline.device, 1, False)[0]
    side = pipeline.unet.config.sample_size
    noise = torch.randn(1, pipeline.unet.config.in_channels, side, side).to(embeds)

    def whole() -> None:
        pipeline(prompt_embeds=embeds, latents=noise, num_inference_steps=1, guidance_scale=1.0, output_type="pt")

    def bare() -> None:
        timestep = pipeline.scheduler.timesteps[0]
        x0 = pipeline.unet(noise, timestep, encoder_hidden_states=embeds, return_dict=False)[0]
        pipeline.vae.decode(x0 / pipeline.vae.config.scaling_factor, return_dict=False)

    seconds = in_turns(whole, bare, args, warmup=3)
    yield row(Path(args.model).name, "one-step pipeline over denoiser and decoder", *seconds, LATENCY_LIMIT)


def throughput(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A cell of the benchmark over the same images made without it."""
    protocol = ShapesProtocol(args.prompts, 8, evaluator=args.evaluator)
    study = Scorer(protocol, device=args.device).study(None, Weights())
    jobs = [(p, k) for p in range(protocol.prompts) for k in range(protocol.images_per_prompt)]
    for steps in args.steps:
        model = tested(args, steps)

        def benchmark(model: ModelUnderTest = model) -> None:
            with tempfile.TemporaryDirectory() as folder:  # a cell that is there already would not be measured again
                Runner(study, Path(folder), args.device, args.batch_size, 0, PLAIN).observe(model)

        def bare(model: ModelUnderTest = model) -> None:
            painter = Painter(load_pipeline(model, device=args.device), model, study.prompts)
            for start in range(0, len(jobs), args.batch_size):
                painter(jobs[start : start + args.batch_size])

        seconds = in_turns(benchmark, bare, args, warmup=0)
        yield row(f"{model.name}, {steps} steps", "benchmark over bare sampling", *seconds, THROUGHPUT_LIMIT)


def tested(args: argparse.Namespace, steps: int) -> ModelUnderTest:
    """The exported model, called without guidance."""
    return ModelUnderTest(Path(args.model).name, args.model, steps, 1.0, scheduler=args.scheduler)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--objectives", nargs="+", choices=overhead.OBJECTIVES, default=list(overhead.OBJECTIVES))
    parser.add_argument("--teacher", default="assets/shapes/teacher", help="of the iterations")
    parser.add_argument(
        "--model", default="assets/shapes/teacher", help="an exported pipeline; its size is what counts"
    )
    parser.add_argument("--random", choices=("sd15",), help="instead of a model: the shapes of a published one")
    parser.add_argument("--side", type=int, default=64, help="of its images in pixels; shapes has 64")
    parser.add_argument("--scheduler", default="lcm", help="of the model; lcm is what most students are exported with")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 25], help="of the throughput")
    parser.add_argument("--prompts", type=int, default=64, help="of the throughput, 8 images each")
    parser.add_argument("--evaluator", default="assets/shapes/clip")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/speed.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the number of ratios above their limit."""
    args = parsed(arguments)
    measures = {"training": training, "latency": latency, "throughput": throughput}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if args.random is not None:
            name = f"{args.random}, random weights, {args.side} px"
            args.model = write_teacher(args.random, Path(folder) / name, args.side)
        for part in args.parts:
            for found in measures[part](args):
                rows.append(found)
                print(json.dumps(found), flush=True)
    old = json.loads(args.output.read_text())["rows"] if args.output.is_file() else []
    measured = {(r["model"], r["measure"]) for r in rows}
    kept = [r for r in old if (r["model"], r["measure"]) not in measured]
    result = {"name": "speed", "date": today(), "device": device_name(args.device), "versions": installed_versions(),
              "seeds": {"noise": 0}, "recipe_sha256": None, "rows": [*kept, *rows]}  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    return sum(r["passed"] is False for r in rows)


if __name__ == "__main__":
    sys.exit(main())
