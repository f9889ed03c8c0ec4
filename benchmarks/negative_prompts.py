"""Measures what a negative prompt does to a one-step student: how often a named background or colour still appears.

    python benchmarks/negative_prompts.py runs/shapes-dmd2-1step
    python benchmarks/negative_prompts.py runs/shapes-dmd2-1step --kinds background --nasa 0.3 0.5 --nag --prompts 512

For every background and colour, the prompts of the shapes benchmark that leave it open are drawn from the same noise
without a negative prompt, and with one that names it, by NASA and by NAG at several strengths. Beside the frequency of
what was named stands the caption accuracy of the same images, which must not suffer. Exits 1 if no strength halves the
frequency at a loss of at most two points of caption accuracy.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from stepdistill import cli
from stepdistill.attention import NAG, NASA, Rule, steer
from stepdistill.bench import report
from stepdistill.bench.generate import Generated, ModelUnderTest, generate_images, load_pipeline
from stepdistill.bench.metrics import shapes_judge
from stepdistill.bench.prompts import ShapesProtocol
from stepdistill.data import shapes


ROOT = Path(__file__).resolve().parents[1]
KINDS: Mapping[str, tuple[str, ...]] = {"background": tuple(shapes.BACKGROUNDS), "color": tuple(shapes.COLORS)}
WITHOUT = "no negative prompt"
LARGEST_RATIO, LARGEST_LOSS = 0.5, 0.02  # of the frequency; of caption accuracy
Rows = list[dict[str, Any]]
Make = Callable[[Sequence[str], str, Rule | None], Generated]  # captions, negative prompt, rule => images


def leaves_open(demand: shapes.Demand, kind: str, value: str) -> bool:
    """Whether a prompt may show the value and does not ask for it."""
    if kind == "background":
        return demand.background is None
    colors = [o.color for o in demand.objects]
    return None in colors and value not in colors


def shows(reading: shapes_judge.Reading, kind: str, value: str) -> bool:
    """Whether an image has the value: as its background, or as the colour of any object."""
    return reading.background == value if kind == "background" else value in [o.color for o in reading.objects]


class Maker:
    """Draws with one model, steered or not; the noise depends on prompt and image only."""

    def __init__(self, model: ModelUnderTest, images_per_prompt: int, *, device: str = "cpu", batch: int = 64) -> None:
        self._model, self._images_per_prompt, self._batch = model, images_per_prompt, batch
        self._pipeline: Any = load_pipeline(model, device=device)

    def __call__(self, captions: Sequence[str], negative: str, rule: Rule | None) -> Generated:
        """Images, prompt by prompt; without a rule the negative prompt is not used."""
        steering: AbstractContextManager[object] = nullcontext()
        if rule is not None:
            steering = steer(self._pipeline, negative, rule)
        with steering:
            return generate_images(
                self._pipeline, captions, model=self._model, images_per_prompt=self._images_per_prompt,
                batch_size=self._batch,
            )  # fmt: skip


def measured(
    make: Make, cases: Sequence[shapes.CaptionedScene], rules: Mapping[str, Rule], wordings: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """One row for every value and rule, and one for every value without.

    Args:
        make: the model.
        cases: prompts with what they demand.
        rules: by the name that the results call them.
        wordings: the negative prompt of each kind, {} standing for the value; kinds not named are not measured.
    """
    plain: dict[tuple[str, ...], Generated] = {}  # the same prompts leave all backgrounds open
    for kind, wording in wordings.items():
        for value in KINDS[kind]:
            chosen = [case for case in cases if leaves_open(case.demand, kind, value)]
            if not chosen:
                raise SystemExit(f"none of the prompts leaves the {kind} {value} open; raise --prompts")
            captions = tuple(case.caption for case in chosen)
            negative = re.sub(r"\ba (?=[aeiou])", "an ", wording.format(value))  # as captions have it
            if captions not in plain:
                plain[captions] = make(captions, negative, None)
            for name, rule in {WITHOUT: None, **rules}.items():
                made = plain[captions] if rule is None else make(captions, negative, rule)
                facts = {"model": name, "kind": kind, "value": value, "nfe": made.nfe}
                yield {**facts, **scored(made.images, [case.demand for case in chosen], kind, value)}


def scored(images: Tensor, demands: Sequence[shapes.Demand], kind: str, value: str) -> dict[str, Any]:
    """Images (N, 3, 64, 64), equally many for each demand in turn => frequency of the value and caption accuracy."""
    readings = shapes_judge.read_images(images)
    repeated = [demand for demand in demands for _ in range(len(images) // len(demands))]
    accuracy = shapes_judge.accuracy(readings, repeated).caption_accuracy
    frequency = sum(shows(reading, kind, value) for reading in readings) / len(readings)
    return {"images": len(images), "frequency": frequency, "caption_accuracy": accuracy}


def summary(details: Sequence[Mapping[str, Any]]) -> Rows:
    """A row for every kind and rule: means over the kind's values, compared with those without a negative prompt."""
    rows: Rows = []
    for kind, name in dict.fromkeys((row["kind"], row["model"]) for row in details):
        mine = {row["value"]: row for row in details if (row["kind"], row["model"]) == (kind, name)}
        base = {row["value"]: row for row in details if (row["kind"], row["model"]) == (kind, WITHOUT)}
        frequency, accuracy = (mean(r[key] for r in mine.values()) for key in ("frequency", "caption_accuracy"))
        row = {"model": name, "kind": kind, "nfe": max(r["nfe"] for r in mine.values()),
               "images": sum(r["images"] for r in mine.values()), "frequency": frequency,
               "caption_accuracy": accuracy}  # fmt: skip
        if name != WITHOUT:
            row |= compared(mine, base)
        rows.append({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def compared(mine: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a rule changes; `ratio` of mean frequencies, `worst_ratio` of the value that it changes least.

    A value that never appears without a negative prompt has no ratio; if none ever does, nothing is shown.
    """
    change = mean(mine[v]["caption_accuracy"] - base[v]["caption_accuracy"] for v in mine)
    before = mean(row["frequency"] for row in base.values())
    if before == 0:
        return {"ratio": None, "worst_ratio": None, "accuracy_change": change, "passed": False}
    ratio = mean(row["frequency"] for row in mine.values()) / before
    worst = max(mine[v]["frequency"] / base[v]["frequency"] for v in mine if base[v]["frequency"] > 0)
    passed = ratio <= LARGEST_RATIO and change >= -LARGEST_LOSS
    return {"ratio": ratio, "worst_ratio": worst, "accuracy_change": change, "passed": passed}


def mean(values: Iterable[float]) -> float:
    """Of at least one value."""
    given = list(values)
    return sum(given) / len(given)


def reached(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every kind has a strength that passes."""
    return {row["kind"] for row in rows} == {row["kind"] for row in rows if row.get("passed")}


def save(path: Path, rows: Rows, details: Rows, args: argparse.Namespace, recipe_sha256: str | None) -> None:
    """Writes the results file."""
    data = {
        "name": "negative_prompts", "date": report.today(), "device": report.device_name(args.device),
        "versions": report.installed_versions(), "seeds": {"prompts": ShapesProtocol().seed, "noise": 0},
        "recipe_sha256": recipe_sha256,
        "protocol": {"student": args.name, "prompts": args.prompts, "images_per_prompt": args.per_prompt,
                     "negative_prompts": args.wordings, "largest_ratio": LARGEST_RATIO,
                     "largest_loss": LARGEST_LOSS},
        "rows": rows, "values": details,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="a run's folder, or a Diffusers folder")
    parser.add_argument("--name", help="what the results call the student; default: the folder's name")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--nasa", type=float, nargs="*", default=[0.1, 0.2, 0.3, 0.5, 1.0], help="strengths alpha")
    parser.add_argument("--nag", type=float, nargs="*", default=[1.0, 2.0, 4.0, 8.0], help="strengths phi")
    parser.add_argument("--background", default="{}", help="negative prompt for a background")
    parser.add_argument("--color", default="a {} shape", help="negative prompt for a colour")
    parser.add_argument("--prompts", type=int, default=256, help="those that leave a value open are used for it")
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/negative_prompts.json")
    args = parser.parse_args(arguments)
    if not args.nasa + args.nag:
        parser.error("give at least one strength of --nasa or --nag")
    args.wordings = {kind: {"background": args.background, "color": args.color}[kind] for kind in args.kinds}
    args.rules = {**{f"NASA {a:g}": NASA(a) for a in args.nasa}, **{f"NAG {p:g}": NAG(p) for p in args.nag}}
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = parsed(arguments)
    model = cli._model_under_test(args.student, {})
    args.name = args.name or model.name
    make = Maker(model, args.per_prompt, device=args.device, batch=args.batch_size)
    details: Rows = []
    for row in measured(make, ShapesProtocol(prompts=args.prompts).captions(), args.rules, args.wordings):
        details.append(row)
        print(f"{row['kind']} {row['value']}, {row['model']}: {row['frequency']:.1%} of {row['images']} images, "
              f"caption accuracy {row['caption_accuracy']:.1%}", flush=True)  # fmt: skip
    rows = summary(details)
    save(args.output, rows, details, args, cli._facts(Path(model.path)).get("recipe_sha256"))
    print(report.markdown_table(rows))
    return int(not reached(rows))


if __name__ == "__main__":
    raise SystemExit(main())
