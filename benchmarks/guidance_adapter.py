"""Whether a guidance adapter says in one call what guidance says in two: at several scales, and on another checkpoint.

    stepdistill train recipes/shapes/agd.yaml
    stepdistill train recipes/shapes/sibling.yaml
    python benchmarks/guidance_adapter.py runs/shapes-agd [--sibling runs/shapes-sibling] [--scales 2.5 3.5 5]

At each scale the teacher with guidance and the teacher with the adapter make as many images in as many steps, from the
same noise; then the sibling, a checkpoint that was fine-tuned from the teacher and that the adapter has never seen. A
pair passes if FID is at most 3 % higher and caption accuracy at most 1 point lower, at half the network calls. Results
go to benchmarks/results/guidance_adapter.json, and what was measured is kept and not measured again; the exit code is
the number of pairs that miss.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepdistill.bench import report
from stepdistill.bench.benchmark import Provenance, run_benchmark
from stepdistill.bench.generate import ModelUnderTest
from stepdistill.bench.prompts import ShapesProtocol
from stepdistill.cli_models import model_under_test
from stepdistill.recipe import Recipe


ROOT = Path(__file__).resolve().parents[1]
LARGEST_RATIO, LARGEST_LOSS = 1.03, 0.01  # of FID, and of caption accuracy in shares


def pairs(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], ModelUnderTest, ModelUnderTest]]:
    """(what the rows say of it, guided model, model with the adapter)."""
    sibling = args.sibling and model_under_test(args.sibling, {}).path
    planned = [("teacher", args.teacher, args.scales), ("sibling", sibling, args.sibling_scales)]
    for checkpoint, path, scales in planned:
        for scale in scales if path else ():
            guided = ModelUnderTest(f"{checkpoint}, guidance {scale:g}", path, args.steps, scale)
            adapted = ModelUnderTest(f"{checkpoint}, adapter at {scale:g}", path, args.steps, scale,
                                     adapter=str(args.run / "adapter"))  # fmt: skip
            yield {"checkpoint": checkpoint, "scale": scale}, guided, adapted


def compared(mine: Mapping[str, Any], guided: Mapping[str, Any]) -> dict[str, Any]:
    """What the adapter gives up: a ratio of FID, and a loss of caption accuracy in shares."""
    ratio = mine["fid"] / guided["fid"]
    loss = guided["caption_accuracy"] - mine["caption_accuracy"]
    return {"fid_ratio": ratio, "accuracy_loss": loss, "passed": ratio <= LARGEST_RATIO and loss <= LARGEST_LOSS}


def trained_range(recipe: Recipe) -> tuple[float, float]:
    """Lowest and highest scale of the paths that a run of agd learnt from."""
    given = (recipe.data.make_pairs or {}).get("guidance")
    if given is None:
        raise SystemExit(f"{recipe.source}: data.make_pairs.guidance is missing, so no scale is known to be trained")
    low, high = given if isinstance(given, list | tuple) else (given, given)
    return float(low), float(high)


def measured(args: argparse.Namespace, recipe: Recipe) -> list[dict[str, Any]]:
    """Rows, a guided model's before the one with the adapter."""
    low, high = trained_range(recipe)  # before the work: a run that does not say it is refused
    planned = list(pairs(args))
    models = [model for _, *both in planned for model in both]
    found = run_benchmark(
        models, protocol=ShapesProtocol(args.prompts, 8), output=args.work, device=args.device,
        provenance=Provenance("guidance_adapter", recipe.sha256),
        on_progress=lambda progress: print(progress, flush=True),
    )  # fmt: skip
    rows = iter(found.rows)
    result = []
    for facts, *_ in planned:
        guided, mine = asdict(next(rows)), asdict(next(rows))
        result.append({**guided, **facts})
        result.append({**mine, **facts, "trained": low <= facts["scale"] <= high, **compared(mine, guided)})
    return result


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of agd")
    parser.add_argument("--teacher", default="assets/shapes/teacher")
    parser.add_argument("--sibling", help="a fine-tuned checkpoint; left out where none is given")
    parser.add_argument("--scales", type=float, nargs="+", default=[2.5, 3.5, 5.0])
    parser.add_argument("--sibling-scales", type=float, nargs="+", default=[2.5])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--prompts", type=int, default=256, help="of the benchmark, 8 images each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/guidance-adapter", help="keeps what was measured")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/guidance_adapter.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the number of pairs that miss."""
    args = parsed(arguments)
    recipe = Recipe.load(args.run / "recipe.yaml")
    rows = measured(args, recipe)
    result = {
        "name": "guidance_adapter", "date": report.today(), "device": report.device_name(args.device),
        "versions": report.installed_versions(), "seeds": {"prompts": ShapesProtocol().seed, "noise": 0},
        "recipe_sha256": recipe.sha256,
        "protocol": {"prompts": args.prompts, "images_per_prompt": 8, "largest_ratio": LARGEST_RATIO,
                     "largest_loss": LARGEST_LOSS},
        "rows": rows,
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(report.markdown_table(rows))
    return sum(row.get("passed") is False for row in rows)


if __name__ == "__main__":
    sys.exit(main())
