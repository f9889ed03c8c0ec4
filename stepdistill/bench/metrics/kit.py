"""Metrics by name: what the command line asks for => metrics that can be measured here, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.bench.metrics.base import Metric, MissingError, Observer
from stepdistill.bench.metrics.figures import (
    FeatureDistances,
    FeatureVariety,
    ImageDistances,
    MeanScore,
    Reference,
    TextAgreement,
)
from stepdistill.bench.metrics.weights import Weights, fingerprint, loading
from stepdistill.errors import UserError


if TYPE_CHECKING:
    from stepdistill.bench.metrics.networks import Clip

DISTANCES = {"fid": "frechet", "kid": "kernel", "precision": "precision", "recall": "recall"}
VARIETY = ("clip_distance", "feature_diversity", "vendi")
IMAGES = ("lpips", "lpips_diversity")
JUDGED = ("caption_accuracy", "images_all_correct", "diversity")  # on shapes alone, where contents are known
SCORES = ("hpsv2", "pickscore", "image_reward", "aesthetic")
NAMES = (*DISTANCES, "fd_dinov2", "patch_fid", "clip_score", *VARIETY, *IMAGES, *JUDGED, *SCORES)

Maker = Callable[[Sequence[str]], Metric]
Prepare = Callable[[Tensor], Tensor]  # images as they were made => as a network is shown them


@dataclass(frozen=True)
class Network:
    """A network that gives features, and what it is called.

    Attributes:
        name: under which its features are kept.
        sha256: of its weights.
    """

    name: str
    observer: Observer
    sha256: str


@dataclass(frozen=True)
class Kit:
    """What a protocol brings to the metrics.

    Attributes:
        weights: where networks lie.
        device: where they compute.
        features: the network of FID, KID, precision and recall; raises MissingError.
        clip: (name, sha256, network) of CLIP scores and variety; raises MissingError.
        reference: real images through a network; raises MissingError.
        seen: how images are prepared for FID and CLIP.
        patch: how they are prepared for patch FID.
        judged: the metric of what only shapes have; None elsewhere.
    """

    weights: Weights
    device: str
    features: Callable[[], Network]
    clip: Callable[[], tuple[str, str, Clip]]
    reference: Callable[[Network], Reference]
    seen: Prepare = lambda images: images
    patch: Prepare = lambda images: images
    judged: Maker | None = None

    def build(self, wanted: Sequence[str]) -> tuple[tuple[Metric, ...], dict[str, str]]:
        """Names => metrics, and of those that cannot be measured the reason.

        Raises:
            UserError: there is no metric of a name.
        """
        for name in wanted:
            if name not in NAMES and ":" not in name:
                raise UserError(f"metric {name!r} is unknown; choose from {', '.join(NAMES)}, or give a function as "
                                "package.module:name")  # fmt: skip
        metrics: list[Metric] = []
        missing: dict[str, str] = {}
        for names, make in self._makers(wanted):
            chosen = [name for name in wanted if name in names]
            try:
                metrics += [make(chosen)] if chosen else []
            except MissingError as error:
                missing |= dict.fromkeys(chosen, str(error))
        return tuple(metrics), missing

    def _makers(self, wanted: Sequence[str]) -> Iterator[tuple[Sequence[str], Maker]]:
        yield tuple(DISTANCES), self._distances
        yield ("patch_fid",), lambda _: self._inception_patch()
        yield ("fd_dinov2",), lambda _: self._dinov2()
        yield ("clip_score",), lambda _: self._agreement()
        yield VARIETY, self._variety
        yield IMAGES, self._images
        yield JUDGED, self.judged or _unjudged
        for name in SCORES:
            yield (name,), self._score
        for name in wanted:
            if ":" in name:
                yield (name,), _own

    def _distances(self, chosen: Sequence[str]) -> Metric:
        network = self.features()
        columns = {DISTANCES[name]: name for name in chosen}
        return FeatureDistances(network.name, network.observer, self.reference(network), columns,
                                {network.name: network.sha256}, self.device)  # fmt: skip

    def _inception_patch(self) -> Metric:
        network = patch_network(self.weights, self.device, self.patch)
        reference = self.reference(network)
        return FeatureDistances(network.name, network.observer, reference, {"frechet": "patch_fid"},
                                {network.name: network.sha256})  # fmt: skip

    def _dinov2(self) -> Metric:
        network = dinov2_network(self.weights, self.device, self.seen)
        reference = self.reference(network)
        return FeatureDistances(network.name, network.observer, reference, {"frechet": "fd_dinov2"},
                                {network.name: network.sha256})  # fmt: skip

    def _agreement(self) -> Metric:
        name, sha256, clip = self.clip()
        return TextAgreement(name, prepared(clip, self.seen), clip.texts, weights={name: sha256})

    def _variety(self, chosen: Sequence[str]) -> Metric:
        name, sha256, clip = self.clip()
        return FeatureVariety(name, prepared(clip, self.seen), tuple(chosen), {name: sha256})

    def _images(self, chosen: Sequence[str]) -> Metric:
        from stepdistill.lpips import load_lpips

        path, device = self.weights.find("vgg16"), self.device
        with loading("vgg16"):
            network = load_lpips(path, torch.device(device))
        return ImageDistances(
            lambda a, b: network(a.to(device), b.to(device)), tuple(chosen), {"vgg16": fingerprint(path)}
        )

    def _score(self, chosen: Sequence[str]) -> Metric:
        from stepdistill.bench.metrics.preferences import Aesthetic, ImageReward, Preference

        (name,) = chosen
        path = self.weights.find(name)
        weights = {name: fingerprint(path)}
        if name == "aesthetic":
            clip = self.weights.find("clip-l14")
            with loading(name, "clip-l14"):
                return MeanScore(name, Aesthetic(path, clip, self.device), {**weights, "clip-l14": fingerprint(clip)})
        with loading(name):
            if name == "image_reward":
                return MeanScore(name, ImageReward(path, self.device), weights)
            return MeanScore(name, Preference(path, self.device, 100.0 if name == "hpsv2" else None), weights)


def chosen(wanted: Sequence[str] | None, usual: Sequence[str]) -> tuple[str, ...]:
    """What is asked for, each name once; None, or "usual" among them, stands for the protocol's usual ones."""
    words = ["usual"] if wanted is None else wanted
    return tuple(dict.fromkeys(name for word in words for name in (usual if word == "usual" else [word])))


def inception_network(weights: Weights, device: str, seen: Prepare) -> Network:
    """clean-fid's Inception.

    Raises:
        MissingError: its weights are nowhere, or cannot be loaded.
    """
    from stepdistill.bench.metrics.networks import Inception

    path = weights.find("inception")
    with loading("inception"):
        return Network("inception", prepared(Inception(path, device), seen), fingerprint(path))


def patch_network(weights: Weights, device: str, patch: Prepare) -> Network:
    """The same on the middle of full-sized images.

    Raises:
        MissingError: its weights are nowhere, or cannot be loaded.
    """
    from stepdistill.bench.metrics.networks import Inception

    path = weights.find("inception")
    with loading("inception"):
        return Network("inception-patch", prepared(Inception(path, device, patch=True), patch), fingerprint(path))


def dinov2_network(weights: Weights, device: str, seen: Prepare) -> Network:
    """DINOv2.

    Raises:
        MissingError: its weights are nowhere, or cannot be loaded.
    """
    from stepdistill.bench.metrics.networks import DinoV2

    path = weights.find("dinov2")
    with loading("dinov2"):
        return Network("dinov2", prepared(DinoV2(path, device), seen), fingerprint(path))


def prepared(observer: Observer, prepare: Prepare) -> Observer:
    """The observer of images that are prepared first."""
    return lambda images, prompts: observer(prepare(images), prompts)


def _unjudged(chosen: Sequence[str]) -> Metric:
    raise MissingError("what an image should show is known of shapes alone")


def _own(chosen: Sequence[str]) -> Metric:
    from stepdistill.bench.metrics.networks import by_path

    return MeanScore(chosen[0], by_path(chosen[0]))
