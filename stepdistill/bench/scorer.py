"""What is measured on shapes, where the contents of every image are known.

Letters: N images, P prompts, K images of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stepdistill.assets import resolve_model_path
from stepdistill.bench.generate import Generated, ModelUnderTest
from stepdistill.bench.intervals import Estimate, Resamples
from stepdistill.bench.metrics import shapes_judge
from stepdistill.bench.metrics.base import Observer, Seen
from stepdistill.bench.metrics.clip_score import ClipEvaluator, clip_scores
from stepdistill.bench.metrics.figures import NEIGHBOURS, Reference
from stepdistill.bench.metrics.frechet import Moments, frechet_distance, kernel_distance
from stepdistill.bench.metrics.kit import DISTANCES, JUDGED, Kit, Network, chosen
from stepdistill.bench.metrics.manifold import equally_many, precision_recall
from stepdistill.bench.metrics.networks import Clip
from stepdistill.bench.metrics.weights import PLAIN, Weights, fingerprint
from stepdistill.bench.prompts import ShapesProtocol, render_scenes
from stepdistill.bench.report import Row
from stepdistill.bench.study import Progress, Study
from stepdistill.data import shapes
from stepdistill.errors import UserError


CHUNK = 128  # images that are rendered, and given to the evaluator, at a time
USUAL = (*DISTANCES, "clip_score", *JUDGED)
EVALUATOR = "evaluator"


class Scorer:
    """Everything about the shapes protocol that is the same for all models: prompts, evaluator, real features.

    Args:
        protocol: what is measured.
        device: where the evaluator computes.
        on_progress: is told while the reference is made.
    """

    def __init__(
        self,
        protocol: ShapesProtocol,
        *,
        device: str = "cpu",
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.protocol, self.device, self._tell = protocol, device, on_progress
        self.cases = protocol.captions()
        self.completions = protocol.completions()
        self.evaluator = ClipEvaluator(resolve_model_path(protocol.evaluator), device=device)
        self.reference = self._scene_features(protocol.reference_scenes(), self._look, on_progress)
        self.reference_moments = Moments(self.reference.shape[1]).add(self.reference)
        self.captions = [case.caption for case in self.cases]
        self.text_features = self.evaluator.text_features(self.captions)

    def feature_scores(self, features: Tensor) -> dict[str, float]:
        """Features of a model's images (N, D), prompt by prompt => fid, kid, clip_score, precision, recall.

        The last two are left out where there are too few images to have neighbours.
        """
        texts = self.text_features.repeat_interleave(self.protocol.images_per_prompt, 0)
        found = {
            "fid": frechet_distance(Moments(features.shape[1]).add(features), self.reference_moments),
            "kid": kernel_distance(features, self.reference),
            "clip_score": clip_scores(features, texts).mean().item(),
        }
        if len(features) > NEIGHBOURS:
            sets = equally_many(features, self.reference, self.protocol.images_per_prompt)
            found |= precision_recall(*sets, NEIGHBOURS, device=self.device)._asdict()
        return found

    def real_scores(self) -> dict[str, float]:
        """What real scenes for the same prompts would get: the best that a model can hope for, and its bias in FID."""
        scenes = [scene for each in self.completions for scene in each]
        return self.feature_scores(self._scene_features(scenes, self._look))

    def judge_scores(self, images: Tensor) -> dict[str, float | None]:
        """Images (N, 3, 64, 64) in [0, 1], prompt by prompt => caption_accuracy, images_all_correct, diversity."""
        found = self.judge().figures(self._seen(read(images)), Resamples(self.protocol.prompts, count=2))
        return {name: estimate.value for name, estimate in found.items()}

    def row(self, model: ModelUnderTest, made: Generated) -> Row:
        """All figures, without intervals, of images that are at hand.

        Raises:
            UserError: some are not finite.
        """
        images = made.images
        if not torch.isfinite(images).all():
            raise UserError(f"{model.name}: made images with NaN or infinity; the model has diverged, or try fp32")
        features = torch.cat([self._look(chunk) for chunk in torch.split(images, CHUNK)])
        figures: dict[str, Any] = {**self.feature_scores(features), **self.judge_scores(images)}
        return Row(
            model=model.name, nfe=made.nfe, images=len(images), **figures, ms_per_image=made.ms_per_image,
            train_seconds=model.train_seconds, peak_gib=made.peak_gib, times=made.times or None,
        )  # fmt: skip

    def judge(self, columns: Sequence[str] = JUDGED) -> Judged:
        """The metric of what images show."""
        demands = [case.demand for case in self.cases]
        return Judged(tuple(columns), demands, self.completions)

    def study(self, metrics: Sequence[str] | None = None, weights: Weights = PLAIN) -> Study:
        """This protocol, ready to measure.

        Args:
            metrics: names; None takes the usual ones.
            weights: where further networks lie.
        """
        folder = resolve_model_path(self.protocol.evaluator)
        sha256 = fingerprint(folder)
        kit = Kit(
            weights, self.device, features=lambda: Network(EVALUATOR, self._look, sha256),
            clip=lambda: (EVALUATOR, sha256, Clip(folder, self.device)), reference=self._reference, judged=self.judge,
        )  # fmt: skip
        found, missing = kit.build(chosen(metrics, USUAL))
        evaluator = f"the CLIP model {self.protocol.evaluator}"
        facts = {"kind": "shapes", **asdict(self.protocol), "real": self.real_scores(), "feature_network": evaluator,
                 "clip_network": evaluator, "resize": "no, but to the evaluator's own input"}  # fmt: skip
        kept = 64 if any(not metric.observers for metric in found) else 8
        return Study(
            tuple(self.captions), self.protocol.images_per_prompt, found, facts, missing,
            kept_prompts=min(kept, self.protocol.prompts), seeds={"prompts": self.protocol.seed},
        )  # fmt: skip

    def _look(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        return self.evaluator.image_features(images)

    def _reference(self, network: Network) -> Reference:
        if network.name == EVALUATOR:
            return Reference(self.reference_moments, self.reference)
        features = self._scene_features(self.protocol.reference_scenes(), network.observer, self._tell)
        return Reference(Moments(features.shape[1]).add(features), features)

    def _seen(self, readings: Tensor) -> Seen:
        return Seen(self.captions, self.protocol.images_per_prompt, {"readings": readings}, torch.empty(0))

    def _scene_features(
        self, scenes: Sequence[shapes.Scene], observer: Observer, tell: Callable[[Progress], None] | None = None
    ) -> Tensor:
        features = []
        for start in range(0, len(scenes), CHUNK):
            images = render_scenes(scenes[start : start + CHUNK])
            features.append(observer(images, [""] * len(images)))
            if tell is not None:
                tell(Progress("real images", min(start + CHUNK, len(scenes)), len(scenes)))
        return torch.cat(features)


@dataclass(frozen=True)
class Judged:
    """Caption accuracy, share of images with nothing wrong, and variety of what prompts leave open.

    Attributes:
        columns: those that are wanted.
        demands: of each prompt.
        real: K real scenes for each prompt.
    """

    columns: tuple[str, ...]
    demands: Sequence[shapes.Demand]
    real: Sequence[Sequence[shapes.Scene]]

    @property
    def observers(self) -> Mapping[str, Observer]:
        return {"readings": lambda images, prompts: read(images)}

    @property
    def weights(self) -> Mapping[str, str]:
        return {}

    def figures(self, seen: Seen, resamples: Resamples) -> Mapping[str, Estimate]:
        readings, count = decoded(seen.values["readings"]), seen.images_per_prompt
        grouped = [readings[i : i + count] for i in range(0, len(readings), count)]
        scores = [
            shapes_judge.attribute_scores(reading, demand)
            for images, demand in zip(grouped, self.demands, strict=True)
            for reading in images
        ]
        right, asked = (torch.tensor(column, dtype=torch.float64) for column in zip(*scores, strict=True))
        by_prompt = [values.reshape(-1, count).sum(1) for values in (right, asked)]
        found = {
            "caption_accuracy": resamples.ratio(*by_prompt, within=(0, 1)),
            "images_all_correct": resamples.mean((right == asked).double(), within=(0, 1)),
            "diversity": self._diversity(grouped, resamples),
        }
        return {column: found[column] for column in self.columns}

    def _diversity(self, grouped: Sequence[Sequence[shapes_judge.Reading]], resamples: Resamples) -> Estimate:
        """As `shapes_judge.diversity`; a prompt that leaves nothing open has entropy 0, and so does not count."""
        value = shapes_judge.diversity(grouped, self.demands, self.real)
        if value is None:
            return Estimate(None)
        ideal = [[shapes_judge.Reading.of_scene(scene) for scene in scenes] for scenes in self.real]
        made, real = (
            torch.tensor([shapes_judge.open_entropy([r], [d]) for r, d in zip(readings, self.demands, strict=True)])
            for readings in (grouped, ideal)
        )
        return replace(resamples.ratio(made, real), value=value)


# A reading as a row of numbers: background and number of objects, then shape, colour, size, x, y, agreement of each.
_SHAPES, _COLORS, _SIZES, _BACKGROUNDS = (
    tuple(known) for known in (shapes.SHAPES, shapes.COLORS, shapes.SIZES, shapes.BACKGROUNDS)
)


def read(images: Tensor) -> Tensor:
    """Images (B, 3, 64, 64) in [0, 1] => what the judge reads in each, as numbers: (B, F)."""
    rows = torch.zeros(len(images), 2 + 6 * shapes_judge.MAX_OBJECTS, dtype=torch.float64)
    for row, reading in zip(rows, shapes_judge.read_images(images), strict=True):
        row[0], row[1] = _number(_BACKGROUNDS, reading.background), len(reading.objects)
        for i, o in enumerate(reading.objects):
            named = [_number(_SHAPES, o.shape), _number(_COLORS, o.color), _number(_SIZES, o.size)]
            row[2 + 6 * i : 8 + 6 * i] = torch.tensor([*named, o.x, o.y, o.agreement], dtype=torch.float64)
    return rows


def decoded(rows: Tensor) -> list[shapes_judge.Reading]:
    """The inverse of `read`."""
    readings = []
    for background, count, *values in rows.tolist():
        objects = []
        for i in range(int(count)):
            shape, color, size, x, y, agreement = values[6 * i : 6 * i + 6]
            named = (_name(_SHAPES, shape), _name(_COLORS, color), _name(_SIZES, size))
            objects.append(shapes_judge.SeenObject(*named, x, y, agreement))
        readings.append(shapes_judge.Reading(tuple(objects), _name(_BACKGROUNDS, background)))
    return readings


def _number(names: Sequence[str], name: str | None) -> int:
    return -1 if name is None else names.index(name)


def _name(names: Sequence[str], number: float) -> str | None:
    return None if number < 0 else names[int(number)]
