"""Protocols on photographs, as papers have them: prompts, their number, how images are prepared, and real statistics.

The real images are the user's own copies. `prepare` turns them into statistics once, in a folder that holds all that a
protocol needs:

    prompts.txt             a prompt a line; may be added later
    statistics.safetensors  <network>.mean, .covariance, .count, .features (some of them, for KID)
    protocol.json           how they were made, with hashes
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.bench.metrics.base import Metric, MissingError
from stepdistill.bench.metrics.figures import Reference
from stepdistill.bench.metrics.frechet import Moments
from stepdistill.bench.metrics.kit import (
    DISTANCES,
    Kit,
    Network,
    chosen,
    dinov2_network,
    inception_network,
    patch_network,
    prepared,
)
from stepdistill.bench.metrics.networks import Clip, by_path, square
from stepdistill.bench.metrics.weights import PLAIN, Weights, fingerprint, loading
from stepdistill.bench.own_copies import own_images, own_prompts, read_image
from stepdistill.bench.study import Study
from stepdistill.data.prompts import load_prompts
from stepdistill.errors import UserError
from stepdistill.files import replacing


FEATURES_KEPT = 10_000  # for KID, precision and recall, which want sets of equal size
PATCH_SIDE = 1024  # images are this large when patches of them are compared
PROMPTS, STATISTICS, FACTS = "prompts.txt", "statistics.safetensors", "protocol.json"
RECORDED = ("count", "side", "prefix", "reference", "seed", "source")  # of a standard, in FACTS
PREFIX = "A photo depicts "  # DMD2, main/coco_eval/coco_evaluator.py


@dataclass(frozen=True)
class Standard:
    """A protocol of the literature.

    Attributes:
        count: prompts, one image of each.
        side: both sides are cut to the middle square and resized to this by Lanczos's filter; None: neither.
        patch: patch FID is usual too.
        prefix: before the prompts of CLIP scores.
        reference: which real images, in words.
        real: how many of them.
        own_images: they are the prompts' own; else all of a data set.
        seed: of the noise in the source.
        source: where this is written.
    """

    count: int
    side: int | None
    patch: bool
    prefix: str
    reference: str
    real: int
    seed: int
    source: str
    own_images: bool = False


STANDARDS: Mapping[str, Standard] = {
    "coco30k": Standard(
        30_000, 256, False, PREFIX, "all 40,504 images of COCO val2014", 40_504, 10,
        "DMD2 (arXiv 2405.14867), main/coco_eval, after GigaGAN; captions_coco14_test.txt",
    ),
    "coco10k-sdxl": Standard(
        10_000, 512, True, PREFIX, "the 10,000 COCO images that belong to the prompts", 10_000, 10,
        "DMD2 (arXiv 2405.14867), main/test_folder_sd.py with eval_res 512; the first 10,000 captions",
        own_images=True,
    ),
    "mjhq30k": Standard(
        30_000, None, False, "", "the 30,000 images of MJHQ-30K", 30_000, 0,
        "Playground v2.5 (arXiv 2402.17245), used by PixArt-Sigma and Sana; prompts of its meta_data.json",
        own_images=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PromptProtocol:
    """Prompts of a file, and statistics of real images if they were prepared.

    Attributes:
        kind: name of a `Standard`, or "prompts".
        prompts: texts.
        prompts_sha256: of the file that they come from.
        images_per_prompt: K.
        folder: of `prepare`; None: there is no reference, so no distances to one.
        side, prefix: as in `Standard`.
        features: function that gives features instead of Inception, as package.module:name.
    """

    kind: str
    prompts: tuple[str, ...]
    prompts_sha256: str
    images_per_prompt: int = 1
    folder: str | None = None
    side: int | None = None
    prefix: str = ""
    features: str | None = None

    @classmethod
    def of_file(cls, file: str, *, count: int | None = None, images_per_prompt: int = 1) -> PromptProtocol:
        """The prompts of a file of one's own.

        Raises:
            UserError: it cannot be read.
        """
        found = load_prompts(file, count=count)
        return cls("prompts", found.prompts, fingerprint(file), images_per_prompt)

    @classmethod
    def standard(
        cls, kind: str, folder: Path, *, count: int | None = None, images_per_prompt: int = 1
    ) -> PromptProtocol:
        """A protocol of `STANDARDS` that was prepared in `folder`.

        Args:
            kind: its name.
            folder: of `prepare`.
            count: fewer prompts, the first ones: no longer the papers' protocol, and its FID is named accordingly.
            images_per_prompt: K; the papers have 1.

        Raises:
            UserError: it was not prepared; says how to.
        """
        file = folder / FACTS
        if not file.is_file():
            raise UserError(f"protocol {kind}: {file} is not there; make it with: stepdistill bench prepare {kind} "
                            f"--images DIR --prompts FILE --output {folder}")  # fmt: skip
        facts = _facts_of(folder, kind)
        if not (folder / PROMPTS).is_file():
            raise UserError(f"protocol {kind}: {folder} has no prompts; add them with: stepdistill bench prepare "
                            f"{kind} --prompts FILE --output {folder}")  # fmt: skip
        lines = (folder / PROMPTS).read_text(encoding="utf-8").splitlines()
        return cls(kind, tuple(lines[:count]), facts["prompts_sha256"], images_per_prompt, str(folder), facts["side"],
                   facts["prefix"], facts["features"])  # fmt: skip

    def study(self, device: str, metrics: Sequence[str] | None = None, weights: Weights = PLAIN) -> Study:
        """This protocol, ready to measure.

        Args:
            device: where metrics compute.
            metrics: names; None takes the usual ones.
            weights: where networks lie.
        """
        kit = Kit(
            weights, device, features=lambda: feature_network(weights, device, self.features, self._look),
            clip=lambda: self._clip(weights, device), reference=self._reference, seen=self._look,
            patch=functools.partial(square, side=PATCH_SIDE),
        )  # fmt: skip
        found, missing = kit.build(chosen(metrics, self._usual()))
        facts: dict[str, Any] = {key: value for key, value in asdict(self).items() if key != "prompts"}
        facts |= {"count": len(self.prompts), **self._words(weights, found)}
        if self.folder is not None:
            facts["prepared"] = json.loads((Path(self.folder) / FACTS).read_text(encoding="utf-8"))
            facts["statistics_sha256"] = fingerprint(str(Path(self.folder) / STATISTICS))
        return Study(
            self.prompts, self.images_per_prompt, found, facts, missing,
            kept_prompts=min(64 if any(not metric.observers for metric in found) else 8, len(self.prompts)),
        )  # fmt: skip

    def _words(self, weights: Weights, metrics: Sequence[Metric]) -> dict[str, str]:
        """What FID and CLIP scores look through, and how images are prepared for it."""
        cut = "no" if self.side is None else f"middle square, by PIL's Lanczos filter to {self.side} pixels of 8 bits"
        words = {"resize": cut if self.features else f"{cut}; for Inception by PIL's bicubic filter in float to 299"}
        if self.folder is not None:
            own = f"the function {self.features}"
            words["feature_network"] = own if self.features else "clean-fid's Inception of 2015-12-05, pool3"
        if any("clip" in metric.weights for metric in metrics):
            words["clip_network"] = f"the CLIP model {weights.named('clip')}"
        return words

    def _usual(self) -> tuple[str, ...]:
        distances = tuple(DISTANCES) if self.folder is not None else ()
        patch = ("patch_fid",) if self.kind in STANDARDS and STANDARDS[self.kind].patch else ()
        variety = ("feature_diversity", "vendi") if self.images_per_prompt > 1 else ()
        return (*distances, *patch, "clip_score", *variety)

    def _look(self, images: Tensor) -> Tensor:
        return images if self.side is None else square(images, self.side)

    def _clip(self, weights: Weights, device: str) -> tuple[str, str, Clip]:
        path = weights.find("clip")
        with loading("clip"):
            return "clip", fingerprint(path), Clip(path, device, self.prefix)

    def _reference(self, network: Network) -> Reference:
        if self.folder is None:
            raise MissingError("there are no real images to compare with; prepare a protocol")
        name, facts = network.name, json.loads((Path(self.folder) / FACTS).read_text(encoding="utf-8"))
        made_with = facts["weights"].get(name)
        if made_with is None:
            raise MissingError(f"{self.folder} has no statistics of {name}; prepare it again with its weights at hand")
        if made_with != network.sha256:
            raise MissingError(f"{self.folder} was prepared with other weights of {name} (sha256 {made_with[:12]}, "
                               f"those here {network.sha256[:12]}); name them by --weights, or prepare it "
                               "again")  # fmt: skip
        tensors = load_file(Path(self.folder) / STATISTICS)
        moments = Moments.of(int(tensors[f"{name}.count"]), tensors[f"{name}.mean"], tensors[f"{name}.covariance"])
        return Reference(moments, tensors[f"{name}.features"])


def feature_network(weights: Weights, device: str, path: str | None, look: Callable[[Tensor], Tensor]) -> Network:
    """What FID looks through: Inception, or a function of the user's.

    Raises:
        MissingError: Inception's weights are nowhere.
        UserError: there is no such function.
    """
    if path is None:
        return inception_network(weights, device, look)
    return Network(path, prepared(by_path(path), look), path)


@dataclass
class _Statistics:
    """What accumulates of real images through one network."""

    network: Network
    kept: list[Tensor] = field(default_factory=list)
    moments: Moments | None = None

    def add(self, images: Tensor) -> None:
        rows = self.network.observer(images, [""] * len(images))
        self.moments = (self.moments or Moments(rows.shape[1])).add(rows)
        if sum(map(len, self.kept)) < FEATURES_KEPT:
            self.kept.append(rows)

    def tensors(self) -> dict[str, Tensor]:
        assert self.moments is not None, "there is at least one image"
        name, moments = self.network.name, self.moments
        return {
            f"{name}.mean": moments.mean,
            f"{name}.covariance": moments.covariance,
            f"{name}.count": torch.tensor(moments.count),
            f"{name}.features": torch.cat(self.kept)[:FEATURES_KEPT],
        }


def prepare(  # noqa: PLR0913  # what the command asks for
    kind: str,
    images: Path | None,
    prompts: Path | None,
    folder: Path,
    *,
    weights: Weights = PLAIN,
    features: str | None = None,
    device: str = "cpu",
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Makes a protocol's folder from the user's own copy of its images.

    Args:
        kind: name of a `Standard`.
        images: folder with the real images, at any depth; None adds prompts to a folder that has statistics. Where a
            protocol has the images of its prompts, and the prompts' file names them, others are passed over; else
            there must be as many as the protocol wants.
        prompts: file with the prompts; entries of .json and .jsonl may name their image as `file_name`. None leaves
            them to be added later, since statistics need none.
        folder: where it is written.
        weights: where networks lie.
        features: function that gives features instead of Inception, as package.module:name.
        device: where networks compute.
        batch_size: images at a time.
        on_progress: gets the numbers of images done and to do.

    Returns:
        Networks that were left out, with the reason.

    Raises:
        UserError: there are other images than the protocol's, too few prompts, or not even FID's network is to be had.
    """
    if kind not in STANDARDS:
        raise UserError(f"protocol {kind!r} is unknown; choose from {', '.join(STANDARDS)}")
    standard = STANDARDS[kind]
    texts, told = ([], {}) if prompts is None else _prompts(prompts, standard)
    if images is None:
        _add_prompts(folder, kind, texts, told)
        return {}
    files = own_images(images, prompts, kind, standard)
    statistics, missing = _networks(standard, weights, features, device)
    digest = hashlib.sha256()
    for start in range(0, len(files), batch_size):
        for batch in _batches(files[start : start + batch_size], images, digest):
            for one in statistics:
                one.add(batch)
        if on_progress is not None:
            on_progress(min(start + batch_size, len(files)), len(files))
    facts = {
        "kind": kind, **{key: value for key, value in asdict(standard).items() if key in RECORDED},
        "features": features, **told, "images": len(files), "images_sha256": digest.hexdigest(),
        "weights": {one.network.name: one.network.sha256 for one in statistics},
    }  # fmt: skip
    tensors = {name: tensor.contiguous() for one in statistics for name, tensor in one.tensors().items()}
    _write(folder, texts, functools.partial(save_file, tensors), facts)
    return missing


def _write(folder: Path, texts: Sequence[str], save: Callable[[Path], object], facts: Mapping[str, Any]) -> None:
    with replacing(folder) as fresh:
        if texts:
            (fresh / PROMPTS).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        save(fresh / STATISTICS)
        (fresh / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _add_prompts(folder: Path, kind: str, texts: Sequence[str], told: Mapping[str, str]) -> None:
    if not texts or not (folder / FACTS).is_file():
        raise UserError(f"{folder}: has no statistics yet; give --images DIR, the folder with the real images")
    facts = {**_facts_of(folder, kind), **told}
    _write(folder, texts, functools.partial(shutil.copyfile, folder / STATISTICS), facts)


def _facts_of(folder: Path, kind: str) -> dict[str, Any]:
    """What `prepare` wrote about a folder.

    Raises:
        UserError: it is of another protocol.
    """
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    if facts["kind"] != kind:
        raise UserError(f"{folder / FACTS}: was prepared for {facts['kind']}, not for {kind}")
    return facts


def _prompts(file: Path, standard: Standard) -> tuple[list[str], dict[str, str]]:
    """The protocol's prompts from the user's own file, and facts of it."""
    return own_prompts(file, standard), {"prompts_file": file.name, "prompts_sha256": fingerprint(str(file))}


def _networks(
    standard: Standard, weights: Weights, features: str | None, device: str
) -> tuple[list[_Statistics], dict[str, str]]:
    """Every network whose weights are at hand, FID's first."""

    def look(images: Tensor) -> Tensor:
        return images if standard.side is None else square(images, standard.side)

    try:
        found = [_Statistics(feature_network(weights, device, features, look))]
    except MissingError as error:
        raise UserError(f"FID has no network: {error}; or give --features package.module:name") from error
    missing = {}
    makers: dict[str, Callable[[], Network]] = {"dinov2": lambda: dinov2_network(weights, device, look)}
    if standard.patch:
        enlarge = functools.partial(square, side=PATCH_SIDE)
        makers["inception-patch"] = lambda: patch_network(weights, device, enlarge)
    for name, make in makers.items():
        try:
            found.append(_Statistics(make()))
        except MissingError as error:
            missing[name] = str(error)
    return found, missing


def _batches(files: Sequence[Path], root: Path, digest: Any) -> list[Tensor]:
    """Images of one size together, (B, 3, H, W) in [0, 1]; their names and bytes go into the hash."""
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for file in files:
        data = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {hashlib.sha256(data).hexdigest()}\n".encode())
        image = read_image(file)
        groups.setdefault((image.shape[1], image.shape[2]), []).append(image)
    return [torch.stack(group) for group in groups.values()]
