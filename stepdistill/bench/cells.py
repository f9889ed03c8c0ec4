"""What was seen of one model's images, kept batch by batch, so that a benchmark that was stopped goes on.

A cell is one model at one number of steps. Each finished batch is one file, which appears at once or not at all; the
files of several processes lie side by side. Images themselves are not kept, but for the few that pictures show.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.bench.generate import Cost
from stepdistill.errors import UserError


FOLDER = "cells"
IMAGES, IMAGE_JOBS, JOBS = "images", "image_jobs", "jobs"


@dataclass(frozen=True)
class Share:
    """Which of several processes this is, and how they wait for each other; by default there is one.

    Attributes:
        index: from 0.
        count: of processes.
        wait: returns when all of them have called it.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    @classmethod
    def launched(cls) -> Share:
        """As `accelerate launch` has started this process."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, state.wait_for_everyone)


@dataclass(frozen=True)
class Stored:
    """All parts of a cell together.

    Attributes:
        values: name => one row for each image, prompt by prompt.
        images: of the first prompts, (n, 3, H, W) bytes.
        cost: of all batches.
        peak_gib: the most of any process.
    """

    values: Mapping[str, Tensor]
    images: Tensor
    cost: Cost
    peak_gib: float | None


class Cell:
    """The folder of one cell.

    Args:
        folder: of the report.
        name: the model's.
        identity: everything that the numbers depend on; a cell of another identity is another cell.
    """

    def __init__(self, folder: Path, name: str, identity: Mapping[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]
        words = "".join(c if c.isascii() and c.isalnum() else " " for c in name.lower()).split()
        self.slug = "-".join([*words, key])
        self.folder = folder / FOLDER / self.slug

    def missing(self, total: int) -> list[int]:
        """The numbers of the images, of `total`, that no part has yet."""
        done = {job for part in self._parts() for job in _read(part)[0][JOBS].tolist()}
        return [job for job in range(total) if job not in done]

    def save(
        self, jobs: Sequence[int], values: Mapping[str, Tensor], images: Mapping[int, Tensor], cost: Cost,
        peak_gib: float | None,
    ) -> None:  # fmt: skip
        """Writes one part.

        Args:
            jobs: numbers of its images.
            values: name => one row for each of them.
            images: the few to keep, number => bytes (3, H, W).
            cost: of the part.
            peak_gib: accelerator memory so far.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"value.{name}": tensor.contiguous() for name, tensor in values.items()}
        tensors[JOBS] = torch.tensor(list(jobs))
        if images:
            tensors[IMAGES] = torch.stack(list(images.values()))
            tensors[IMAGE_JOBS] = torch.tensor(list(images))
        facts = {"cost": json.dumps({**asdict(cost), "peak_gib": peak_gib})}
        name = f"part-{jobs[0]:08d}.safetensors"
        fresh = self.folder / f".{name}.new"
        save_file(tensors, fresh, metadata=facts)
        fresh.replace(self.folder / name)

    def load(self, total: int) -> Stored:
        """All parts in the order of their images.

        Raises:
            UserError: not all of the images are there.
        """
        missing = len(self.missing(total))
        if missing:
            raise UserError(f"{self.folder}: {missing} of {total} images are not there, another process must have "
                            "stopped; the same command goes on")  # fmt: skip
        parts = [_read(part) for part in self._parts()]
        tensors, facts = [part[0] for part in parts], [part[1] for part in parts]
        order = torch.cat([t[JOBS] for t in tensors]).argsort()
        names = [name for name in tensors[0] if name.startswith("value.")]
        cost = Cost()
        for fact in facts:
            cost.add(Cost(**{key: value for key, value in fact.items() if key != "peak_gib"}))
        pictured = [t for t in tensors if IMAGES in t]
        shown = torch.cat([t[IMAGE_JOBS] for t in pictured]).argsort()
        return Stored(
            {name.removeprefix("value."): torch.cat([t[name] for t in tensors])[order] for name in names},
            torch.cat([t[IMAGES] for t in pictured])[shown], cost,
            max((f["peak_gib"] for f in facts if f["peak_gib"] is not None), default=None),
        )  # fmt: skip

    def remember(self, facts: Mapping[str, Any]) -> None:
        """Keeps what was measured once for the whole cell."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self.folder / ".facts.json.new"
        fresh.write_text(json.dumps(facts), encoding="utf-8")
        fresh.replace(self.folder / "facts.json")

    def remembered(self) -> dict[str, Any] | None:
        """What `remember` was given; None if nothing."""
        file = self.folder / "facts.json"
        facts: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        return facts

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.safetensors"))


def _read(part: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(part, framework="pt") as opened:
            facts = json.loads(opened.metadata()["cost"])
            return {name: opened.get_tensor(name) for name in opened.keys()}, facts  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{part}: cannot be read ({error}); delete it, and its images are made again") from error
