"""Makes pairs of noise and the teacher's sample, shard by shard."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from stepdistill.adapters import HALF
from stepdistill.data.cache import fingerprint_of
from stepdistill.data.pairs import (
    INDEX,
    STORAGE,
    PairSet,
    Progress,
    Storage,
    differences,
    load_pairs,
    pair_noise,
    read_index,
    shard_header,
    shard_path,
    shard_ranges,
    teacher_facts,
)
from stepdistill.data.prompts import PromptSet
from stepdistill.data.sampler import StockSampler, Trajectory
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.seeds import seed_of


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PairSettings:
    """Which pairs are made, and how.

    Attributes:
        count: how many; None: one per prompt. More than there are prompts begin anew with other noise.
        sampler: the stock scheduler: ddim, dpm++, euler or unipc.
        steps: of the sampler.
        guidance: standard guidance scale, 1 = none; or a range, from which every pair gets its own.
        seed: of the noise; that of a pair is a function of this and of the pair's number alone.
        states: timesteps at which what the network is given is kept too, falling; or "all" that the sampler visits.
        predictions: keep also what the guided network says there, for objectives that learn from the way.
        size: pixel size of the images; None: the teacher's own.
        precision: fp32, bf16 or fp16, by autocast; the sampler's arithmetic stays in fp32.
        storage: type of samples, states and predictions on disk: fp32, or fp16 and fp8 (e4m3), which leave the noise
            out: seed and number give it again.
        batch_size: pairs made at a time.
        shard_size: pairs per file; an interruption loses less than one file.
    """

    count: int | None = None
    sampler: str = "ddim"
    steps: int = 50
    guidance: float | tuple[float, float] = 3.0
    seed: int = 0
    states: tuple[int, ...] | Literal["all"] = ()
    predictions: bool = False
    size: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    storage: Storage = "fp32"
    batch_size: int = 64
    shard_size: int = 256

    def __post_init__(self) -> None:
        for name in ("count", "steps", "size", "batch_size", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.states != "all" and list(self.states) != sorted(set(self.states), reverse=True):
            raise UserError(f"states must be falling timesteps, got {list(self.states)}")
        if self.predictions and not self.states:
            raise UserError("predictions are kept where states are; add states=all, or some timesteps")
        if isinstance(self.guidance, tuple) and self.guidance[0] > self.guidance[1]:
            raise UserError(f"guidance {list(self.guidance)} is no range; give the lower scale first")


def make_pairs(
    family: ModelFamily,
    prompts: PromptSet,
    folder: str | Path,
    settings: PairSettings,
    *,
    fresh: bool = False,
    progress: Progress | None = None,
) -> PairSet:
    """Makes what is not there yet, and opens the pairs.

    Args:
        family: the teacher.
        prompts: pair i is of prompt i modulo their number.
        folder: where the shards go.
        settings: which pairs, and how.
        fresh: replace pairs that were made otherwise, instead of refusing.
        progress: gets the numbers of pairs done and to do.

    Raises:
        UserError: the folder holds something else (the text says what differs), the disk is full, or the settings do
            not fit the teacher; finished shards stay.
    """
    maker = _Maker(family, prompts, Path(folder), settings)
    maker.claim(fresh)
    try:
        maker.make(progress or (lambda done, total: None))
    except OSError as error:
        raise UserError(f"{folder}: pairs cannot be written ({error.strerror or error}); make room and run the same "
                        "command again, what is finished is kept") from error  # fmt: skip
    return load_pairs(folder)


class _Maker:
    def __init__(self, family: ModelFamily, prompts: PromptSet, folder: Path, settings: PairSettings) -> None:
        self._family, self._prompts, self._folder, self._settings = family, prompts, folder, settings
        _check_precision(family, settings)
        self._count = settings.count or len(prompts)
        self._shard_size = settings.shard_size
        self._shape = family.latent_shape(settings.size)
        self._sampler = StockSampler(
            family.denoiser(), family.pipeline.scheduler.config, name=settings.sampler, steps=settings.steps,
            guidance=settings.guidance if isinstance(settings.guidance, float | int) else 1.0, keep=settings.states,
        )  # fmt: skip
        facts = {
            **teacher_facts(family, settings.size),
            "prompts": prompts.fingerprint,
            "steps": settings.steps,
            "guidance": settings.guidance if isinstance(settings.guidance, tuple) else float(settings.guidance),
            "seed": settings.seed,
            "states": self._sampler.kept if settings.states == "all" else list(settings.states),
            "precision": settings.precision,
            # Named where they are used only, so that pairs without them keep their fingerprint.
            **({"predictions": True} if settings.predictions else {}),
            **({"storage": settings.storage} if settings.storage != "fp32" else {}),
            **({"network kept as": family.quantised} if family.quantised else {}),
            **{f"sampler.{name}": value for name, value in self._sampler.facts.items()},
        }
        self._facts: dict[str, Any] = json.loads(json.dumps(facts))  # as they will be read again
        self._fingerprint = fingerprint_of(self._facts)

    def claim(self, fresh: bool) -> None:
        """Finds that the folder is ours or makes it so."""
        index = read_index(self._folder)
        if index is None:
            files = self._folder.iterdir() if self._folder.is_dir() else []
            if any(not file.name.startswith(".") for file in files):  # a dot begins what a killed process was writing
                raise UserError(f"{self._folder} is not empty and holds no pairs; give another folder")
        elif fresh:
            for file in [*self._folder.glob("shard-*.safetensors"), self._folder / INDEX]:
                file.unlink()
        else:
            changed = differences(index["facts"], self._facts)
            if changed:
                raise UserError(f"{self._folder} holds pairs that were made otherwise ({changed}); give another "
                                "folder, or --fresh to replace them")  # fmt: skip
            self._shard_size = index["shard_size"]

    def make(self, progress: Progress) -> None:
        """Writes every shard that is not there and whole."""
        self._folder.mkdir(parents=True, exist_ok=True)
        index = {
            "fingerprint": self._fingerprint, "count": self._count, "shard_size": self._shard_size,
            "teacher": self._family.path, "prompts": self._prompts.source, "facts": self._facts,
        }  # fmt: skip
        self._put(self._folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
        for number, rows in shard_ranges(self._count, self._shard_size):
            path = shard_path(self._folder, number)
            if shard_header(path, self._fingerprint, len(rows)) is None:
                self._put(path, self._shard(rows, progress))
            progress(rows.stop, self._count)

    def _shard(self, rows: range, progress: Progress) -> bytes:
        parts: list[tuple[Tensor, Trajectory]] = []
        # Batches begin with the shard, so that a shard's bits do not depend on where an earlier run was stopped.
        for first in range(rows.start, rows.stop, self._settings.batch_size):
            batch = range(first, min(first + self._settings.batch_size, rows.stop))
            noise = torch.stack([pair_noise(self._settings.seed, number, self._shape) for number in batch])
            parts.append((noise, self._run(noise, batch)))
            progress(batch.stop, self._count)
        dtype = STORAGE[self._settings.storage]
        tensors = {
            "sample": torch.cat([made.sample for _, made in parts]).to("cpu", dtype),
            "prompt_index": torch.tensor([number % len(self._prompts) for number in rows]),
        }
        if dtype == torch.float32:
            tensors["noise"] = torch.cat([noise for noise, _ in parts])
        if isinstance(self._settings.guidance, tuple):
            tensors["guidance"] = self._scales(rows)
        if self._sampler.kept:
            tensors["states"] = self._stored([made.states for _, made in parts])
            tensors["state_timesteps"] = torch.tensor(self._facts["states"])
        if self._settings.predictions:
            tensors["predictions"] = self._stored([made.predictions for _, made in parts])
        # One entry only: safetensors writes several in an order of its own, and equal shards should be equal files.
        header = json.dumps({"fingerprint": self._fingerprint, "prompts": self._texts(rows)})
        content: bytes = save(tensors, metadata={"pairs": header})
        return content

    def _stored(self, parts: Sequence[Tensor | None]) -> Tensor:
        return torch.cat([part for part in parts if part is not None]).to("cpu", STORAGE[self._settings.storage])

    def _scales(self, numbers: range) -> Tensor:
        """The guidance scale of each pair, (N,), float64: a function of the seed and its number alone."""
        if not isinstance(self._settings.guidance, tuple):
            return torch.full((len(numbers),), float(self._settings.guidance), dtype=torch.float64)
        low, high = self._settings.guidance
        shares = [Random(seed_of(self._settings.seed, "guidance", number)).random() for number in numbers]
        return low + (high - low) * torch.tensor(shares, dtype=torch.float64)

    def _run(self, noise: Tensor, numbers: range) -> Trajectory:
        device, precision = self._family.device, self._settings.precision
        # One number for all spares the second half of every call at scale 1.
        scale = self._scales(numbers).to(device) if isinstance(self._settings.guidance, tuple) else None
        texts = self._texts(numbers)
        with torch.no_grad():
            condition = self._family.encode_prompts(texts).to(device)
            null = self._family.null_condition(len(texts)).to(device)
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            return self._sampler(noise.to(device), condition, null, scale)

    def _texts(self, numbers: range) -> list[str]:
        return self._prompts.batch([number % len(self._prompts) for number in numbers])

    def _put(self, path: Path, content: bytes) -> None:
        """Writes a file aside, forces it to disk and renames it: it is whole or absent."""
        new = path.with_name(f".{path.name}.new")
        try:
            with new.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)


def _check_precision(family: ModelFamily, settings: PairSettings) -> None:
    """Raises UserError for weights in half precision where nothing turns what goes into them into the same type."""
    dtype = next(p.dtype for p in family.network().parameters() if p.is_floating_point())
    if dtype in HALF and settings.precision == "fp32":
        raise UserError(f"precision: the teacher's weights are in {str(dtype).removeprefix('torch.')}, with which "
                        "nothing is computed in float32; make the pairs with precision=bf16, or set memory.base: "
                        "fp32")  # fmt: skip
