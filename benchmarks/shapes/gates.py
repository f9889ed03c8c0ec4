"""Measures what the bundled networks of the shapes benchmark must reach, on scenes none of them was trained on.

    python benchmarks/shapes/gates.py                       # everything, on the bundled assets
    python benchmarks/shapes/gates.py --parts vae,judge --vae runs/shapes-assets/autoencoder

Parts: `vae` (reconstruction PSNR), `clip` (caption-to-image retrieval), `judge` (its readings of real scenes, and of
reconstructions), `teacher` and `flow` (caption accuracy and diversity of the two teachers at 25 steps, over guidance
scales). Parts measured earlier stay in the results file. Exits 1 if a gate is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stepdistill.bench import benchmark, report
from stepdistill.bench.generate import ModelUnderTest, generate_images, load_pipeline
from stepdistill.bench.metrics import shapes_judge
from stepdistill.bench.metrics.clip_score import ClipEvaluator
from stepdistill.bench.prompts import ShapesProtocol, render_scenes
from stepdistill.data import shapes


ROOT = Path(__file__).resolve().parents[2]
SEED = 880_000  # held out: neither a training seed nor the benchmark's
CANDIDATES = 100  # images that a caption is to find its own among
CHUNK = 100
Rows = list[dict[str, Any]]


def gate(part: str, measure: str, value: float, target: float | None = None, **facts: Any) -> dict[str, Any]:
    """One row; a target of None is for information only."""
    passed = None if target is None else value >= target
    return {"model": part, "measure": measure, "value": round(value, 5), "target": target, "passed": passed, **facts}


def held_out(count: int, keep: float = 0.7) -> list[shapes.CaptionedScene]:
    """The first `count` scenes of this script's own data seed."""
    return [shapes.captioned_scene(SEED, index, keep=keep) for index in range(count)]


@torch.no_grad()
def reconstructions(path: Path, images: Tensor, device: str) -> Tensor:
    """Images (B, 3, 64, 64) in [0, 1] through the autoencoder's mean latents, in float32."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(path, use_safetensors=True).to(device, torch.float32).eval()
    decoded = [
        vae.decode(vae.encode(chunk.to(device) * 2 - 1).latent_dist.mean).sample.cpu() for chunk in images.split(CHUNK)
    ]
    return torch.cat(decoded).add(1).div(2).clamp(0, 1)


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: (B, 3, H, W) twice => (B,)."""
    return -10 * (first - second).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def measure_vae(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Reconstruction of held-out scenes: PSNR averaged over images, and the worst hundredth."""
    images = render_scenes([case.scene for case in held_out(args.count)])
    values = psnr(reconstructions(args.vae, images, args.device), images)
    yield gate("autoencoder", "mean PSNR, dB", values.mean().item(), 26.0, images=args.count)
    yield gate("autoencoder", "PSNR, dB, worst hundredth", values.quantile(0.01).item(), images=args.count)


def measure_clip(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Top-1 retrieval of a caption's own image among 100, and which attributes the evaluator sees at all.

    A caption may be true of several of the 100 images: of a twin, even if it names everything but the place, and of
    many if it leaves much open. So beside the gate, which asks for the very image, stands how often the caption is
    true of the image found.
    """
    evaluator = ClipEvaluator(args.clip, device=args.device)
    for keep, words, target in ((1.0, "captions that name everything", 0.9), (0.7, "ordinary captions", None)):
        same, true = [], []
        cases = held_out(args.count - args.count % CANDIDATES, keep)
        for start in range(0, len(cases), CANDIDATES):
            group = cases[start : start + CANDIDATES]
            texts = evaluator.text_features([case.caption for case in group])
            images = evaluator.image_features(render_scenes([case.scene for case in group]))
            cosines = torch.nn.functional.normalize(texts, dim=-1) @ torch.nn.functional.normalize(images, dim=-1).T
            for number, best in enumerate(cosines.argmax(1).tolist()):
                score = shapes_judge.attribute_scores(
                    shapes_judge.Reading.of_scene(group[best].scene), group[number].demand
                )
                same.append(best == number)
                true.append(score.fulfilled == score.demanded)
        facts = {"images": len(cases)}
        yield gate("clip", f"top-1 of {CANDIDATES}, {words}: the very image", sum(same) / len(same), target, **facts)
        yield gate("clip", f"top-1 of {CANDIDATES}, {words}: an image it is true of", sum(true) / len(true), **facts)
    for attribute in ("shape", "color", "size", "background"):
        share = siblings_told_apart(evaluator, held_out(args.count, 1.0), attribute)
        yield gate("clip", f"a scene and its sibling of another {attribute} told apart", share, images=args.count)


def siblings_told_apart(evaluator: ClipEvaluator, cases: Sequence[shapes.CaptionedScene], attribute: str) -> float:
    """How often a caption that names everything is nearer to its scene than to one that differs in one attribute."""
    rng = random.Random(f"{SEED}/siblings/{attribute}")
    others = [shapes.sibling(case.scene, rng, attribute) for case in cases]
    unit = partial(torch.nn.functional.normalize, dim=-1)
    texts = unit(evaluator.text_features([case.caption for case in cases]))
    own = unit(evaluator.image_features(render_scenes([case.scene for case in cases])))
    other = unit(evaluator.image_features(render_scenes(others)))
    return float(((texts * own).sum(-1) > (texts * other).sum(-1)).float().mean())


def attributes_right(images: Tensor, scenes: Sequence[shapes.Scene]) -> dict[str, float]:
    """Share of right readings of each attribute; an object is compared with the seen one that lies nearest.

    A place is right within a pixel and a half.
    """
    right: dict[str, list[bool]] = {}
    for reading, scene in zip(shapes_judge.read_images(images), scenes, strict=True):
        right.setdefault("number of objects", []).append(len(reading.objects) == len(scene.objects))
        right.setdefault("background", []).append(reading.background == scene.background)
        for o in scene.objects:
            near = min(reading.objects, key=lambda s: math.hypot(s.x - o.x, s.y - o.y), default=None)
            for attribute in ("shape", "color", "size"):
                hit = near is not None and getattr(near, attribute) == getattr(o, attribute)
                right.setdefault(attribute, []).append(hit)
            right.setdefault("place", []).append(near is not None and math.hypot(near.x - o.x, near.y - o.y) <= 1.5)
    return {attribute: sum(values) / len(values) for attribute, values in right.items()}


def measure_judge(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The judge's readings of real scenes and, if there is an autoencoder, of its reconstructions."""
    scenes = [case.scene for case in held_out(args.count)]
    images = render_scenes(scenes)
    kinds = [("real scenes", images, 0.99)]
    if args.vae.is_dir():
        kinds.append(("reconstructions", reconstructions(args.vae, images, args.device), 0.97))
    for kind, pictures, target in kinds:
        for attribute, share in attributes_right(pictures, scenes).items():
            yield gate("judge", f"{attribute}, {kind}", share, target, images=args.count)


def measure_teacher(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The UNet's gates."""
    return teacher_gates("teacher", args.teacher, args)


def measure_flow(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The flow-matching transformer's, which are the same."""
    return teacher_gates("flow teacher", args.flow, args)


def teacher_gates(name: str, folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A teacher over guidance scales; the gates apply to the scale of the highest caption accuracy."""
    protocol = ShapesProtocol(prompts=args.prompts, images_per_prompt=args.per_prompt, evaluator=str(args.clip))
    scorer = benchmark.Scorer(protocol, device=args.device)
    captions = [case.caption for case in scorer.cases]
    plain = ModelUnderTest(name, str(folder), steps=args.steps, guidance_scale=1.0)
    pipeline = load_pipeline(plain, device=args.device)
    found = []
    for scale in args.guidance:
        model = replace(plain, name=f"{name}, guidance {scale:g}", guidance_scale=scale)
        made = generate_images(
            pipeline, captions, model=model, images_per_prompt=args.per_prompt, batch_size=args.batch_size
        )
        found.append(scorer.row(model, made))
    best = max(found, key=lambda row: row.caption_accuracy or 0.0)
    for row in found:
        accuracy, diversity = (0.95, 0.9) if row is best else (None, None)
        facts = {"nfe": row.nfe, "images": row.images}
        yield gate(row.model, "caption accuracy", row.caption_accuracy or 0.0, accuracy, **facts)
        yield gate(row.model, "diversity", row.diversity or 0.0, diversity, **facts)
        for key in ("images_all_correct", "fid", "kid", "clip_score", "ms_per_image"):
            yield gate(row.model, key, getattr(row, key), **facts)
    for key, value in scorer.real_scores().items():
        yield gate("real scenes, same prompts", key, value, images=protocol.num_images)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "vae": measure_vae,
    "clip": measure_clip,
    "judge": measure_judge,
    "teacher": measure_teacher,
    "flow": measure_flow,
}


def show(rows: Rows) -> None:
    """Prints the table."""
    table = Table(title="Gates of the shapes benchmark", show_lines=False)
    for heading in ("model", "measure", "value", "target", ""):
        table.add_column(heading, justify="right" if heading in {"value", "target"} else "left")
    for row in rows:
        verdict = {True: "passed", False: "MISSED", None: ""}[row["passed"]]
        target = "" if row["target"] is None else f">= {row['target']:g}"
        table.add_row(row["model"], row["measure"], f"{row['value']:.4g}", target, verdict)
    Console().print(table)


def save(path: Path, measured: dict[str, Rows], device: str) -> None:
    """Writes the results, keeping parts that were measured earlier."""
    parts: dict[str, Rows] = {}
    if path.is_file():
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            parts.setdefault(row["part"], []).append(row)
    parts |= {part: [{"part": part, **row} for row in rows] for part, rows in measured.items()}
    seeds = {"scenes": SEED, "prompts": ShapesProtocol().seed, "noise": 0}
    data = {
        "name": "shapes_gates", "date": report.today(), "device": report.device_name(device),
        "versions": report.installed_versions(), "seeds": seeds,
        "recipe_sha256": None, "rows": [row for part in PARTS for row in parts.get(part, [])],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help="comma-separated; default: all, but flow only if there is such a teacher")
    parser.add_argument("--teacher", type=Path, default=ROOT / "assets/shapes/teacher")
    parser.add_argument("--flow", type=Path, default=ROOT / "assets/shapes/flow")
    parser.add_argument("--vae", type=Path, help="default: the teacher's")
    parser.add_argument("--clip", type=Path, default=ROOT / "assets/shapes/clip")
    parser.add_argument("--count", type=int, default=1000, help="held-out scenes for vae, clip and judge")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/shapes_gates.json")
    args = parser.parse_args()
    found = [part for part in PARTS if part != "flow" or args.flow.is_dir()]
    args.parts = found if args.parts is None else args.parts.split(",")
    args.vae = args.vae or args.teacher / "vae"
    unknown = sorted(set(args.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    if args.count < CANDIDATES:
        parser.error(f"--count is {args.count}; retrieval among {CANDIDATES} needs as many")
    return args


def main() -> int:
    """Returns the exit code."""
    args = parsed()
    measured: dict[str, Rows] = {}
    for part in args.parts:
        measured[part] = list(PARTS[part](args))
        show(measured[part])
        save(args.output, measured, args.device)
    return int(any(row["passed"] is False for rows in measured.values() for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
