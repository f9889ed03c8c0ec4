"""What was seen of one model's images, kept batch by batch, so that a benchmark that was stopped goes on.

A cell is one model at one number of steps. Each finished batch is one file, which appears at once or not at all; the
files of several processes lie side by side. A file that was torn all the same, as by a disk that lost power, counts as
not there. Images themselves are not kept, but for the few that pictures show.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
VALUE = "value."  # before the name of an observer


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


class Values(Mapping[str, Tensor]):
    """What observers gave of all images, prompt by prompt: read from the parts when asked for, and not kept.

    Args:
        parts: file => the numbers of its images, which together are 0 to N - 1.
        names: of the observers.
    """

    def __init__(self, parts: Mapping[Path, Tensor], names: Sequence[str]) -> None:
        self._parts, self._names = parts, tuple(names)

    def __getitem__(self, name: str) -> Tensor:
        """One row for each image, (N, ...)."""
        if name not in self._names:
            raise KeyError(name)
        total, found = 1 + max(int(jobs.max()) for jobs in self._parts.values()), None
        for part, jobs in self._parts.items():
            rows = _tensor(part, VALUE + name)
            found = rows.new_empty(total, *rows.shape[1:]) if found is None else found
            found[jobs] = rows
        assert found is not None, "there is at least one part"
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Stored:
    """All parts of a cell together.

    Attributes:
        values: observer's name => one row for each image, prompt by prompt; read when asked for.
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
        done = {job for jobs in self._parts().values() for job in jobs.tolist()}
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
        tensors = {VALUE + name: tensor.contiguous() for name, tensor in values.items()}
        tensors[JOBS] = torch.tensor(list(jobs))
        if images:
            tensors[IMAGES] = torch.stack(list(images.values()))
            tensors[IMAGE_JOBS] = torch.tensor(list(images))
        facts = {"cost": json.dumps({**asdict(cost), "peak_gib": peak_gib})}
        name = f"part-{jobs[0]:08d}.safetensors"
        fresh = self.folder / f".{name}.new"
        save_file(tensors, fresh, metadata=facts)
        with fresh.open("rb") as written:
            os.fsync(written.fileno())
        fresh.replace(self.folder / name)

    def load(self, total: int) -> Stored:
        """All parts in the order of their images.

        Raises:
            UserError: not all of the images are there.
        """
        parts = self._parts()
        missing = total - len({job for jobs in parts.values() for job in jobs.tolist()})
        if missing:
            raise UserError(f"{self.folder}: {missing} of {total} images are not there, another process must have "
                            "stopped; the same command goes on")  # fmt: skip
        cost, peaks, names, images, shown = Cost(), [], [], [], []
        for part in parts:
            with _opened(part) as opened:
                facts = json.loads(opened.metadata()["cost"])
                keys = list(opened.keys())
                if IMAGES in keys:
                    images.append(opened.get_tensor(IMAGES))
                    shown.append(opened.get_tensor(IMAGE_JOBS))
            peaks.append(facts.pop("peak_gib"))
            cost.add(Cost(**facts))
            names = [key.removeprefix(VALUE) for key in keys if key.startswith(VALUE)]
        return Stored(
            Values(parts, names), torch.cat(images)[torch.cat(shown).argsort()], cost,
            max((peak for peak in peaks if peak is not None), default=None),
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

    def _parts(self) -> dict[Path, Tensor]:
        """The files that can be read, and the numbers of their images."""
        found = {}
        for part in sorted(self.folder.glob("part-*.safetensors")):
            try:
                found[part] = _tensor(part, JOBS)
            except SafetensorError:
                continue  # torn, so its images are made again
        return found


@contextmanager
def _opened(part: Path) -> Iterator[Any]:
    try:
        with safe_open(part, framework="pt") as opened:
            yield opened
    except OSError as error:
        raise UserError(f"{part}: cannot be read ({error}); delete it, and its images are made again") from error


def _tensor(part: Path, name: str) -> Tensor:
    with _opened(part) as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor
