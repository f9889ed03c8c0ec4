"""Runs exported models through one protocol and writes what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.assets import resolve_model_path
from stepdistill.bench import plots, report
from stepdistill.bench.generate import Generated, ModelUnderTest, generate_images, load_pipeline
from stepdistill.bench.metrics import shapes_judge
from stepdistill.bench.metrics.clip_score import ClipEvaluator, clip_scores
from stepdistill.bench.metrics.frechet import Moments, frechet_distance, kernel_distance
from stepdistill.bench.metrics.manifold import precision_recall
from stepdistill.bench.prompts import ShapesProtocol, render_scenes
from stepdistill.data import shapes
from stepdistill.errors import UserError


CHUNK = 128  # images that are rendered, and given to the evaluator, at a time
SAMPLE_PROMPTS, SAMPLE_IMAGES = 8, 3  # of the picture: rows, and images of one model in a row


@dataclass(frozen=True)
class Provenance:
    """What a report says about where its models came from: its name, and the hash of the recipe that made them."""

    name: str = "shapes"
    recipe_sha256: str | None = None


@dataclass(frozen=True)
class Progress:
    """How far a benchmark has come: `done` of `total` images of the part called `label`."""

    label: str
    done: int
    total: int


class Scorer:
    """Everything about a protocol that is the same for all models: prompts, evaluator, real features.

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
        self.protocol = protocol
        self.cases = protocol.captions()
        self.completions = protocol.completions()
        self.evaluator = ClipEvaluator(resolve_model_path(protocol.evaluator), device=device)
        self.reference = self._scene_features(protocol.reference_scenes(), on_progress)
        self.reference_moments = Moments(self.reference.shape[1]).add(self.reference)
        captions = [case.caption for case in self.cases]
        self.text_features = self.evaluator.text_features(captions).repeat_interleave(protocol.images_per_prompt, 0)

    def _scene_features(
        self, scenes: Sequence[shapes.Scene], on_progress: Callable[[Progress], None] | None = None
    ) -> Tensor:
        features = []
        for start in range(0, len(scenes), CHUNK):
            features.append(self.evaluator.image_features(render_scenes(scenes[start : start + CHUNK])))
            if on_progress is not None:
                on_progress(Progress("real images", min(start + CHUNK, len(scenes)), len(scenes)))
        return torch.cat(features)

    def feature_scores(self, features: Tensor) -> dict[str, float]:
        """Features of a model's images (N, D), prompt by prompt => fid, kid, clip_score, precision, recall."""
        return {
            "fid": frechet_distance(Moments(features.shape[1]).add(features), self.reference_moments),
            "kid": kernel_distance(features, self.reference),
            "clip_score": clip_scores(features, self.text_features).mean().item(),
            **precision_recall(features, self.reference[: len(features)])._asdict(),
        }

    def real_scores(self) -> dict[str, float]:
        """What real scenes for the same prompts would get: the best that a model can hope for, and its bias in FID."""
        return self.feature_scores(self._scene_features([scene for scenes in self.completions for scene in scenes]))

    def judge_scores(self, images: Tensor) -> dict[str, float | None]:
        """Images (N, 3, 64, 64) in [0, 1], prompt by prompt => caption_accuracy, images_all_correct, diversity."""
        per_prompt = self.protocol.images_per_prompt
        readings = shapes_judge.read_images(images)
        demands = [case.demand for case in self.cases]
        grouped = [readings[i : i + per_prompt] for i in range(0, len(readings), per_prompt)]
        shares = shapes_judge.accuracy(readings, [d for d in demands for _ in range(per_prompt)])
        return {**shares._asdict(), "diversity": shapes_judge.diversity(grouped, demands, self.completions)}

    def row(self, model: ModelUnderTest, made: Generated) -> report.Row:
        """All figures of one model."""
        images = made.images
        if not torch.isfinite(images).all():
            raise UserError(f"{model.name}: made images with NaN or infinity; the model has diverged, or try fp32")
        features = torch.cat([self.evaluator.image_features(chunk) for chunk in torch.split(images, CHUNK)])
        return report.Row(
            model=model.name, nfe=made.nfe, images=len(images), **self.feature_scores(features),
            **self.judge_scores(images), ms_per_image=made.ms_per_image, train_seconds=model.train_seconds,
            peak_gib=made.peak_gib,
        )  # fmt: skip


def run_benchmark(
    models: Sequence[ModelUnderTest],
    *,
    protocol: ShapesProtocol,
    output: Path,
    device: str = "cpu",
    batch_size: int = 64,
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
    provenance: Provenance = Provenance(),
) -> report.Report:
    """Measures every model on the same prompts from the same noise.

    Args:
        models: exported models, in the order of the table.
        protocol: prompts, numbers and evaluator.
        output: folder that gets report.json, report.md, pareto.png and samples.png.
        device: "cpu", "cuda", "cuda:1".
        batch_size: images per call; does not change the images.
        seed: of the noise.
        on_progress: is told how far it is; nothing is printed here.
        provenance: name of the report and hash of the recipe.

    Raises:
        UserError: if no model is given, two have one name, or one cannot be loaded.
    """
    _check(models, batch_size)
    scorer = Scorer(protocol, device=device, on_progress=on_progress)
    captions = [case.caption for case in scorer.cases]
    rows, samples = [], {}
    for model in models:

        def tell(done: int, total: int, label: str = model.name) -> None:
            if on_progress is not None:
                on_progress(Progress(label, done, total))

        made = generate_images(
            load_pipeline(model, device=device), captions, model=model, images_per_prompt=protocol.images_per_prompt,
            seed=seed, batch_size=batch_size, on_progress=tell,
        )  # fmt: skip
        rows.append(scorer.row(model, made))
        samples[model.name] = made.images.reshape(protocol.prompts, -1, *made.images.shape[1:])[
            :SAMPLE_PROMPTS, :SAMPLE_IMAGES
        ]
    result = report.Report(
        name=provenance.name, date=report.today(), device=report.device_name(device),
        versions=report.installed_versions(), seeds={"prompts": protocol.seed, "noise": seed},
        recipe_sha256=provenance.recipe_sha256, protocol=_described(protocol, models, scorer), rows=tuple(rows),
    )  # fmt: skip
    report.save_report(result, output)
    plots.pareto(result, output / "pareto.png")
    plots.sample_grid(samples, captions, output / "samples.png")
    return result


def _check(models: Sequence[ModelUnderTest], batch_size: int) -> None:
    names = [model.name for model in models]
    if not names:
        raise UserError("bench: no model to measure; name at least one")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"bench: two models are called {twice!r}; give each its own name")
    if batch_size < 1:
        raise UserError(f"bench.batch_size is {batch_size}; it must be at least 1")


def _described(protocol: ShapesProtocol, models: Sequence[ModelUnderTest], scorer: Scorer) -> Mapping[str, Any]:
    called = [{k: v for k, v in asdict(model).items() if k != "train_seconds"} for model in models]
    return {"kind": "shapes", **asdict(protocol), "models": called, "real": scorer.real_scores()}
