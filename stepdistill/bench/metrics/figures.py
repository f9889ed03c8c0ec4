"""Figures of features, of kept images, and of single scores, with their intervals.

Letters: N images, P prompts, K images of each, D features, M reference images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from stepdistill.bench.intervals import Estimate, Resamples, groups_of, spread
from stepdistill.bench.metrics.base import Observer, Seen
from stepdistill.bench.metrics.clip_score import clip_scores
from stepdistill.bench.metrics.frechet import (
    Moments,
    frechet_distance,
    kernel_distance,
    kernel_influence,
    resampled_frechet,
)
from stepdistill.bench.metrics.manifold import coverage, equally_many


GROUP_BYTES = 2**29  # memory for the moments of groups of prompts
GROUPS = 64
NEIGHBOURS = 3  # Kynkaanniemi et al. 2019 (arXiv 1904.06991), section 3
WIDE, RESAMPLES_OF_WIDE = 512, 40  # from so many features on, a distance takes seconds


@dataclass(frozen=True)
class Reference:
    """Real images as features.

    Attributes:
        moments: of all of them.
        features: of some or all, (M, D), which KID, precision and recall need; None if there are none.
    """

    moments: Moments
    features: Tensor | None = None


@dataclass(frozen=True)
class FeatureDistances:
    """FID, KID, precision and recall on one observer's features.

    Attributes:
        name: of the observer.
        observer: gives (B, D).
        reference: real images.
        columns: the metric => the column that it fills: "frechet", "kernel", "precision", "recall".
        device: where precision and recall are computed.
    """

    name: str
    observer: Observer
    reference: Reference
    columns: Mapping[str, str]
    weights: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def observers(self) -> Mapping[str, Observer]:
        return {self.name: self.observer}

    def figures(self, seen: Seen, resamples: Resamples) -> Mapping[str, Estimate]:
        features, found = seen.values[self.name], {}
        if "frechet" in self.columns:
            found["frechet"] = self._frechet(features, resamples)
        real = self.reference.features
        if real is not None and "kernel" in self.columns:
            value, parts = kernel_distance(features, real), kernel_influence(features, real)
            drawn = resamples.weights @ _by_prompt(parts, resamples) / resamples.prompts
            found["kernel"] = resamples.spread(value, drawn)
        if real is not None and {"precision", "recall"} & set(self.columns):
            found |= _covered(*equally_many(features, real, seen.images_per_prompt), seen.images_per_prompt,
                              resamples, self.device)  # fmt: skip
        return {self.columns[name]: estimate for name, estimate in found.items() if name in self.columns}

    def _frechet(self, features: Tensor, resamples: Resamples) -> Estimate:
        dims, per_prompt = features.shape[1], len(features) // resamples.prompts
        at_most = max(8, min(GROUPS, GROUP_BYTES // (8 * dims * dims)))
        groups, total = [], Moments(dims)
        for prompts in groups_of(resamples.prompts, at_most):
            part = features[prompts.start * per_prompt : prompts.stop * per_prompt]
            groups.append(Moments(dims).add(part))
            total.add(part)
        value = frechet_distance(total, self.reference.moments)
        if len(groups) < 2:
            return Estimate(value)
        count = resamples.count if dims < WIDE else min(resamples.count, RESAMPLES_OF_WIDE)
        return spread(value, resampled_frechet(groups, self.reference.moments, count, resamples.seed))


@dataclass(frozen=True)
class TextAgreement:
    """CLIP score: 100 times the cosine between an image and its prompt.

    Attributes:
        text_features: all prompts => (P, D).
        scale: instead of 100.
    """

    name: str
    observer: Observer
    text_features: Callable[[Sequence[str]], Tensor]
    column: str = "clip_score"
    scale: float = 100.0
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def observers(self) -> Mapping[str, Observer]:
        return {self.name: self.observer}

    def figures(self, seen: Seen, resamples: Resamples) -> Mapping[str, Estimate]:
        texts = self.text_features(seen.prompts).repeat_interleave(seen.images_per_prompt, 0)
        scores = clip_scores(seen.values[self.name], texts) * (self.scale / 100)
        return {self.column: resamples.mean(scores)}


@dataclass(frozen=True)
class FeatureVariety:
    """How different the images of one prompt are, and how far they are from the first model's, by cosines of features.

    `feature_diversity`: mean of 1 - cosine over pairs of a prompt's images. `vendi`: exp of the entropy of the
    eigenvalues of their cosines' matrix / K, a number of different images between 1 and K (Friedman and Dieng 2023,
    arXiv 2210.02410, definition 3.1). `clip_distance`: 1 - cosine to the first model's image from the same noise.

    Attributes:
        columns: those that are wanted.
    """

    name: str
    observer: Observer
    columns: tuple[str, ...]
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def observers(self) -> Mapping[str, Observer]:
        return {self.name: self.observer}

    def figures(self, seen: Seen, resamples: Resamples) -> Mapping[str, Estimate]:
        features, count = normalize(seen.values[self.name].double(), dim=-1), seen.images_per_prompt
        found = dict.fromkeys(self.columns, Estimate(None))
        if count > 1:
            each = features.reshape(-1, count, features.shape[-1])
            cosines = each @ each.mT  # (P, K, K)
            pairs = 1 - (cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)) / (count * (count - 1))
            shares = torch.linalg.eigvalsh(cosines / count).clamp(min=0)
            found["feature_diversity"] = resamples.mean(pairs, within=(0, 2))
            found["vendi"] = resamples.mean(torch.special.entr(shares).sum(1).exp(), within=(1, count))
        if seen.baseline is not None:
            others = normalize(seen.baseline.values[self.name].double(), dim=-1)
            found["clip_distance"] = resamples.mean(1 - (features * others).sum(-1), within=(0, 2))
        return {column: found[column] for column in self.columns}


@dataclass(frozen=True)
class ImageDistances:
    """LPIPS to the first model's image from the same noise, and between the images of one prompt.

    Only the images that are kept take part: those of the first prompts.

    Attributes:
        distance: two batches (B, 3, H, W) in [0, 1] => (B,).
        columns: "lpips", "lpips_diversity", or both.
    """

    distance: Callable[[Tensor, Tensor], Tensor]
    columns: tuple[str, ...]
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def observers(self) -> Mapping[str, Observer]:
        return {}

    def figures(self, seen: Seen, resamples: Resamples) -> Mapping[str, Estimate]:
        count, found = seen.images_per_prompt, dict.fromkeys(self.columns, Estimate(None))
        draws = Resamples(len(seen.images) // count, resamples.count, resamples.seed)
        if "lpips" in found and seen.baseline is not None:
            sizes = ["{1} x {0}".format(*each.shape[-2:]) for each in (seen.images, seen.baseline.images)]
            if sizes[0] == sizes[1]:
                found["lpips"] = draws.mean(self._distances(seen.images, seen.baseline.images))
            else:
                why = f"its images have {sizes[0]} pixels, the first model's {sizes[1]}; wanted images of one size"
                found["lpips"] = Estimate(None, why=why)
        if "lpips_diversity" in found and count > 1:
            # Each image with the next one of its prompt: K of the K (K - 1) / 2 pairs, every image in two of them.
            each = seen.images.reshape(-1, count, *seen.images.shape[1:])
            found["lpips_diversity"] = draws.mean(self._distances(seen.images, each.roll(1, 1).flatten(0, 1)))
        return found

    @torch.no_grad()
    def _distances(self, images: Tensor, others: Tensor, chunk: int = 16) -> Tensor:
        pairs = zip(torch.split(images, chunk), torch.split(others, chunk), strict=True)
        return torch.cat([self.distance(a.float() / 255, b.float() / 255).cpu() for a, b in pairs])


@dataclass(frozen=True)
class MeanScore:
    """The mean of what an observer says of each image.

    Attributes:
        column: also the observer's name.
    """

    column: str
    observer: Observer
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def observers(self) -> Mapping[str, Observer]:
        return {self.column: self.observer}

    def figures(self, seen: Seen, resamples: Resamples) -> Mapping[str, Estimate]:
        return {self.column: resamples.mean(seen.values[self.column])}


def _covered(
    features: Tensor, real: Tensor, images_per_prompt: int, resamples: Resamples, device: str
) -> dict[str, Estimate]:
    """Precision and recall of sets of equal size, as the paper has them: both shares depend on both sizes."""
    if len(features) <= NEIGHBOURS:
        return {"precision": Estimate(None), "recall": Estimate(None)}
    good, met = coverage(features, real, NEIGHBOURS, device=device)
    # Precision is a share of made images, which come by prompts, recall one of real images.
    draws = [Resamples(n, resamples.count, resamples.seed) for n in (len(features) // images_per_prompt, len(met))]
    shares = [each.mean(covered, within=(0, 1)) for each, covered in zip(draws, (good, met), strict=True)]
    return dict(zip(("precision", "recall"), shares, strict=True))


def _by_prompt(values: Tensor, resamples: Resamples) -> Tensor:
    return values.double().reshape(resamples.prompts, -1).mean(1)
