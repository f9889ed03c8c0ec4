"""Runs exported models through one protocol and writes what came out."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stepdistill.bench import page, plots, report
from stepdistill.bench.cells import Cell, Share, Stored
from stepdistill.bench.generate import (
    Cost,
    Job,
    ModelUnderTest,
    Painter,
    allocated,
    load_pipeline,
    paint,
    peak_gib,
    reset_peak,
)
from stepdistill.bench.intervals import Resamples
from stepdistill.bench.loading import image_files
from stepdistill.bench.meter import denoisers, metered
from stepdistill.bench.metrics.base import Observer, Seen
from stepdistill.bench.metrics.networks import as_bytes
from stepdistill.bench.metrics.weights import Weights
from stepdistill.bench.models import Folder, identity
from stepdistill.bench.prompts import ShapesProtocol
from stepdistill.bench.protocols import PromptProtocol
from stepdistill.bench.quality import series
from stepdistill.bench.scorer import Scorer
from stepdistill.bench.study import Progress, Study
from stepdistill.errors import UserError
from stepdistill.files import writing


__all__ = ["Options", "Progress", "Provenance", "Scorer", "run_benchmark"]

SAMPLE_PROMPTS, SAMPLE_IMAGES = 8, 3  # of the picture: rows, and images of one model in a row
LATENCY_CALLS = 3  # of which the middle one counts, after one that does not
# Raised whenever the same images would give other numbers, or the same models other images, than an earlier version's;
# what was kept before is then made anew.
MEASURED_AS = 2
LEFT_OUT = ["safety checker", "watermark"]  # while measuring; see `loading.leave_out_checks`
TO_BASELINE = ("lpips", "clip_distance")

Tell = Callable[[Progress], None]


@dataclass(frozen=True)
class Provenance:
    """What a report says about where its models came from: its name, and the hash of the recipe that made them."""

    name: str = "shapes"
    recipe_sha256: str | None = None


@dataclass(frozen=True)
class Options:
    """How a benchmark is worked off.

    Attributes:
        metrics: names, see `stepdistill.bench.metrics.kit`; None takes the protocol's usual ones.
        weights: where the networks of metrics lie.
        exact: the rows of a batch are computed one by one, so that batch size and number of processes change not even
            the rounding; takes longer.
        save_images: also writes every image, below output/images.
        share: which of several processes this is.
    """

    metrics: tuple[str, ...] | None = None
    weights: Weights = field(default_factory=Weights)
    exact: bool = False
    save_images: bool = False
    share: Share = field(default_factory=Share)


PLAIN, UNKNOWN = Options(), Provenance()


def run_benchmark(  # noqa: PLR0913  # what the command asks for
    models: Sequence[ModelUnderTest],
    *,
    protocol: ShapesProtocol | PromptProtocol,
    output: Path,
    device: str = "cpu",
    batch_size: int = 64,
    seed: int = 0,
    on_progress: Tell | None = None,
    provenance: Provenance = UNKNOWN,
    options: Options = PLAIN,
) -> report.Report:
    """Measures every model on the same prompts from the same noise.

    What was seen of each batch is kept in output/cells, so that the same call goes on where it was stopped, and a
    further model costs only itself.

    Args:
        models: exported models, in the order of the table; distances between models are to the first, at the most
            steps that it is measured with.
        protocol: prompts, numbers and reference.
        output: folder that gets report.json, report.md, report.html, pareto.png and samples.png.
        device: "cpu", "cuda", "cuda:1".
        batch_size: images per call; does not change the images.
        seed: of the noise.
        on_progress: is told how far it is; nothing is printed here.
        provenance: name of the report and hash of the recipe.
        options: how it is worked off.

    Returns:
        The report. Processes but the first return one without rows, and write none.

    Raises:
        UserError: if no model is given, two have one name, one cannot be loaded, or the disk is full.
    """
    _check(models, batch_size)
    study = _study(protocol, device, options, on_progress)
    runner = Runner(study, output, device, batch_size, seed, options, on_progress)
    stored = {model.name: runner.observe(model) for model in models}
    measured = list(_rows(study, models, stored)) if options.share.index == 0 else []
    found = report.Report(
        name=provenance.name, date=report.today(), device=report.device_name(device),
        versions=report.installed_versions(), seeds={**study.seeds, "noise": seed},
        recipe_sha256=provenance.recipe_sha256, protocol=_facts(study, models, stored, measured, options.exact),
        rows=tuple(row for row, _ in measured),
    )  # fmt: skip
    if options.share.index == 0:
        samples = {name: _samples(cell.load(study.num_images), study.images_per_prompt)
                   for name, (cell, _) in stored.items()}  # fmt: skip
        with writing(output):
            _write(found, samples, study.prompts, output)
    return found


def _study(
    protocol: ShapesProtocol | PromptProtocol, device: str, options: Options, on_progress: Tell | None
) -> Study:
    if isinstance(protocol, ShapesProtocol):
        scorer = Scorer(protocol, device=device, on_progress=on_progress)
        return scorer.study(options.metrics, options.weights)
    return protocol.study(device, options.metrics, options.weights)


def _facts(
    study: Study, models: Sequence[ModelUnderTest], stored: Mapping[str, tuple[Cell, Mapping[str, Any]]],
    measured: Sequence[tuple[report.Row, Mapping[str, str]]], exact: bool,
) -> dict[str, Any]:  # fmt: skip
    """What a report says of how its figures were made, and which of them could not be."""
    missing = {**study.missing, **{what: why for _, reasons in measured for what, why in reasons.items()}}
    called = [{key: value for key, value in asdict(model).items() if key != "train_seconds"} for model in models]
    facts = {**study.facts, "models": called, "weights": study.weights, "missing": missing,
             "cells": {name: told for name, (_, told) in stored.items()}, "exact": exact, "left_out": LEFT_OUT,
             "measured_as": MEASURED_AS}  # fmt: skip
    if any(getattr(row, column) is not None for row, _ in measured for column in TO_BASELINE):
        facts["baseline"] = baseline_of(models).name
    return facts


@dataclass(frozen=True)
class Runner:
    """Works off the cells of a benchmark; arguments are those of `run_benchmark`."""

    study: Study
    output: Path
    device: str
    batch_size: int
    seed: int
    options: Options
    on_progress: Tell | None = None

    def observe(self, model: ModelUnderTest) -> tuple[Cell, dict[str, Any]]:
        """Makes what is missing of a model's images and takes from them what metrics need => its cell, and facts."""
        share, total, what = self.options.share, self.study.num_images, self._identity(model)
        cell = Cell(self.output, model.name, what)
        missing = cell.missing(total)
        files = image_files(model.path)
        share.wait()  # for all to have seen what is missing before the first adds to it
        batches = [missing[i : i + self.batch_size] for i in range(0, len(missing), self.batch_size)]
        mine, done = batches[share.index :: share.count], total - len(missing)
        self._tell(model, done)
        for batch, images, cost, peak in self._made(model, files, mine, cell):
            self._keep(cell, model, batch, images, cost, peak)
            done += len(batch)
            self._tell(model, done)
        share.wait()
        facts = {**(cell.remembered() or {}), "model": what["model"]}
        return cell, {**facts, "surplus": len(files) - total} if len(files) > total else facts

    def _made(
        self, model: ModelUnderTest, files: Sequence[Path], batches: Sequence[list[int]], cell: Cell
    ) -> Iterator[tuple[list[int], Tensor, Cost, float | None]]:
        """Batches with their images, cost, and peak of memory in GiB."""
        if files:
            if len(files) < self.study.num_images:
                raise UserError(f"{model.name}: {model.path} holds {len(files):,} images, the protocol wants "
                                f"{self.study.num_images:,}, those of a prompt together, by name")  # fmt: skip
            folder = Folder(model.name, files, self.study.images_per_prompt)
            for batch in batches:
                yield batch, folder(self._jobs(batch)), Cost(), None
            return
        if not batches:
            return
        before = allocated(self.device)  # networks of metrics
        pipeline = load_pipeline(model, device=self.device, bare=True)
        painter = Painter(pipeline, model, self.study.prompts, self.seed, self.options.exact)
        if self.options.share.index == 0 and cell.remembered() is None:
            size = sum(p.numel() for network in denoisers(pipeline) for p in network.parameters())
            with metered(pipeline) as meter:
                latency = _latency_ms(painter, meter.now)
            with writing(cell.folder):
                cell.remember({"latency_ms": latency, "parameters": size})
        if len(batches) == 1:
            painter(self._jobs(batches[0]))  # time leaves out a process's first batch, which also warms up
        with metered(pipeline) as meter:
            for number, batch in enumerate(batches):
                timed = bool(number) or len(batches) == 1
                reset_peak(self.device)  # between two batches metrics compute
                images, cost = paint(painter, self._jobs(batch), meter, timed=timed)
                yield batch, images, cost, peak_gib(self.device, before)

    def _keep(
        self, cell: Cell, model: ModelUnderTest, batch: list[int], images: Tensor, cost: Cost, peak: float | None
    ) -> None:
        if not torch.isfinite(images).all():
            raise UserError(f"{model.name}: made images with NaN or infinity; the model has diverged, or try fp32")
        prompts = [self.study.prompts[p] for p, _ in self._jobs(batch)]
        values = {name: self._look(observer, images, prompts) for name, observer in self.study.observers.items()}
        seen = as_bytes(images)
        kept = {job: seen[i] for i, job in enumerate(batch) if self._jobs([job])[0][0] < self.study.kept_prompts}
        if self.options.save_images:
            folder = self.output / "images" / cell.slug
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                for (prompt, k), image in zip(self._jobs(batch), seen, strict=True):
                    Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{prompt:06d}-{k}.png")
        with writing(cell.folder):
            cell.save(batch, values, kept, cost, peak)

    def _look(self, observer: Observer, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if not self.options.exact:
            return observer(images, prompts)
        return torch.cat([observer(images[i : i + 1], prompts[i : i + 1]) for i in range(len(images))])

    def _jobs(self, numbers: Sequence[int]) -> list[Job]:
        return [divmod(number, self.study.images_per_prompt) for number in numbers]

    def _identity(self, model: ModelUnderTest) -> dict[str, Any]:
        study, versions = self.study, report.installed_versions()
        prompts = hashlib.sha256("\n".join(study.prompts).encode()).hexdigest()
        return {
            "model": identity(model, offline=self.options.weights.offline),
            "prompts_sha256": prompts, "images_per_prompt": study.images_per_prompt,
            "seed": self.seed, "observers": sorted(study.observers), "weights": study.weights,
            "kept_prompts": study.kept_prompts, "exact": self.options.exact, "images": self.options.save_images,
            "prepared": {key: study.facts.get(key) for key in ("side", "features", "prefix")},
            "device": self.device.partition(":")[0], "measured_as": MEASURED_AS,
            "versions": {name: version for name, version in versions.items() if name != "stepdistill"},
        }  # fmt: skip

    def _tell(self, model: ModelUnderTest, done: int) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(model.name, done, self.study.num_images))


def _rows(
    study: Study, models: Sequence[ModelUnderTest], stored: Mapping[str, tuple[Cell, Mapping[str, Any]]]
) -> Iterator[tuple[report.Row, dict[str, str]]]:
    """All figures of every model, and why some of them could not be computed; one cell after another is read."""
    resamples, first = Resamples(len(study.prompts)), baseline_of(models).name
    columns = {entry.name for entry in fields(report.Row)}
    start = stored[first][0].load(study.num_images)
    baseline = Seen(study.prompts, study.images_per_prompt, start.values, start.images)
    for model in models:
        cell, facts = stored[model.name]
        parts, seen = start, baseline
        if model.name != first:
            parts = cell.load(study.num_images)
            seen = Seen(study.prompts, study.images_per_prompt, parts.values, parts.images, baseline)
        found = {name: e for metric in study.metrics for name, e in metric.figures(seen, resamples).items()}
        values = {name: estimate.value for name, estimate in found.items() if name in columns}
        others = {name: e.value for name, e in found.items() if name not in columns and e.value is not None}
        cost, timed = parts.cost, bool(parts.cost.timed)
        row = report.Row(
            model=model.name, nfe=cost.nfe if cost.made else None, images=study.num_images, **values,
            ms_per_image=cost.ms_per_image if timed else None, train_seconds=model.train_seconds,
            peak_gib=parts.peak_gib, latency_ms=facts.get("latency_ms"), parameters=facts.get("parameters"),
            images_per_second=cost.timed / cost.seconds if timed else None, times=cost.times or None,
            intervals={name: list(e.interval) for name, e in found.items() if e.interval is not None} or None,
            others=others or None,
        )  # fmt: skip
        yield row, {f"{name} of {model.name}": e.why for name, e in found.items() if e.why is not None}


def baseline_of(models: Sequence[ModelUnderTest]) -> ModelUnderTest:
    """What distances between models are to: the first model, where it is measured with the most steps."""
    return max((m for m in models if series(m.name) == series(models[0].name)), key=lambda model: model.steps)


def _samples(parts: Stored, images_per_prompt: int) -> Tensor:
    """(P, K, 3, H, W) in [0, 1] for the first prompts."""
    each = parts.images.reshape(-1, images_per_prompt, *parts.images.shape[1:])
    return each[:SAMPLE_PROMPTS, :SAMPLE_IMAGES].float() / 255


def _write(found: report.Report, samples: Mapping[str, Tensor], captions: Sequence[str], output: Path) -> None:
    report.save_report(found, output)
    plots.pareto(found, output / "pareto.png")
    plots.sample_grid(samples, captions, output / "samples.png")
    page.save_page(found, samples, captions, output / "report.html")


def _latency_ms(painter: Painter, now: Callable[[], float]) -> float:
    """Milliseconds of a call for one image, text included, when everything is warm."""
    painter([(0, 0)])
    spent = []
    for _ in range(LATENCY_CALLS):
        began = now()
        painter([(0, 0)])
        spent.append(now() - began)
    return 1000 * statistics.median(spent)


def _check(models: Sequence[ModelUnderTest], batch_size: int) -> None:
    names = [model.name for model in models]
    if not names:
        raise UserError("bench: no model to measure; name at least one")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"bench: two models are called {twice!r}; give each its own name")
    if batch_size < 1:
        raise UserError(f"bench.batch_size is {batch_size}; it must be at least 1")
