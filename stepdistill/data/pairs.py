"""Stored pairs of noise and the teacher's sample, for objectives that learn which noise becomes which image.

    <folder>/index.json, shard-00000.safetensors, ...

A shard holds, for N pairs of latent shape (C, H, W): `noise` and `sample` (N, C, H, W), `prompt_index` (N,) and, where
they were asked for, `states` and `predictions` (N, K, C, H, W) at `state_timesteps` (K,), and `guidance` (N,) where
each pair has a scale of its own; its header holds the prompts as text and the fingerprint. Files of a narrow
type leave the noise out: it is a function of the seed and the pair's number. The fingerprint covers everything that
determines a pair: the teacher's weights, sampler, guidance, prompts and seed. Shards appear at once or not at all, so
making pairs goes on where it was stopped, to the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepdistill.condition import Condition
from stepdistill.data.cache import Conditions, fingerprint_of, weights_fingerprint
from stepdistill.data.prompts import PromptSet, epoch_indices
from stepdistill.errors import UserError
from stepdistill.families.base import ModelFamily
from stepdistill.seeds import seed_of


Progress = Callable[[int, int], None]  # (pairs done, pairs in all)

Storage = Literal["fp32", "fp16", "fp8"]
STORAGE: dict[Storage, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
FORMAT = 1  # of the files; part of the fingerprint
INDEX = "index.json"
REMEDY = "make them with: stepdistill data pairs RECIPE --output FOLDER"


class PairBatch(NamedTuple):
    """Some pairs, on the CPU.

    Attributes:
        noise: what the sampler began with, (B, C, H, W), unit variance.
        latents: what it ended with, (B, C, H, W).
        prompts: B texts.
        states: what the network was given on the way, (B, K, C, H, W); None where no states were kept.
    """

    noise: Tensor
    latents: Tensor
    prompts: tuple[str, ...]
    states: Tensor | None


class StateBatch(NamedTuple):
    """Some places on the way of some pairs, on the CPU.

    Attributes:
        states: what the network was given, (B, C, H, W), float32.
        predictions: what it said, guided, (B, C, H, W), float32.
        timesteps: what it was told, (B,), float64.
        guidance: standard scales, (B,), float64.
        prompts: B texts.
    """

    states: Tensor
    predictions: Tensor
    timesteps: Tensor
    guidance: Tensor
    prompts: tuple[str, ...]


class PairSet:
    """Pairs on disk, read through memory maps; `load_pairs` opens them.

    Args:
        folder: where they are.
        index: the content of its index.json.
        texts: the prompt of every pair.

    Attributes:
        texts: the prompt of every pair.
        prompts: the distinct prompts.
        facts: what determines the pairs, by name.
    """

    def __init__(self, folder: Path, index: Mapping[str, Any], texts: Sequence[str]) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = index["facts"]
        self.fingerprint: str = index["fingerprint"]
        self._shard_size: int = index["shard_size"]
        self._hold(range(len(texts)), texts)
        self._shards: dict[int, dict[str, Tensor]] = {}
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.texts)

    def only(self, numbers: Sequence[int]) -> PairSet:
        """The pairs with these numbers as a set of their own, counted from 0; the files are the same."""
        part = copy(self)
        part._hold([self._places[number] for number in numbers], [self.texts[number] for number in numbers])
        return part

    @property
    def state_timesteps(self) -> tuple[float, ...]:
        """Where the kept states lie, falling."""
        return tuple(self.facts["states"])

    @property
    def num_states(self) -> int:
        """How many places there are on the way of all pairs.

        Raises:
            UserError: none, or what the network said there was not kept.
        """
        if not self.facts.get("predictions"):
            raise UserError(f"{self.folder}: these pairs do not hold what the teacher said on the way; make others "
                            "with states=all predictions=true")  # fmt: skip
        return len(self) * len(self.state_timesteps)

    def states(self, indices: Sequence[int]) -> StateBatch:
        """Places on the way, numbered pair by pair; each is read alone, since all of a shard may be gigabytes.

        Raises:
            IndexError: a number lies outside the set.
            UserError: a shard cannot be read, or the pairs hold no such places.
        """
        total, per_pair = self.num_states, len(self.state_timesteps)
        found: dict[str, list[Tensor]] = {"states": [], "predictions": []}
        scales: list[float] = []
        for index in indices:
            if not 0 <= index < total:
                raise IndexError(f"state {index} of {total}")
            number, place = divmod(index, per_pair)
            shard, row = divmod(self._places[number], self._shard_size)
            file = self._opened(shard)
            for name, rows in found.items():
                rows.append(file.get_slice(name)[row : row + 1, place][0].float())
            given = self.facts["guidance"]
            scales.append(float(file.get_slice("guidance")[row : row + 1]) if isinstance(given, list) else given)
        timesteps = torch.tensor([self.state_timesteps[index % per_pair] for index in indices], dtype=torch.float64)
        texts = tuple(self.texts[index // per_pair] for index in indices)
        states, predictions = (torch.stack(rows) for rows in found.values())
        return StateBatch(states, predictions, timesteps, torch.tensor(scales, dtype=torch.float64), texts)

    def batch(self, indices: Sequence[int]) -> PairBatch:
        """The pairs with these numbers.

        Raises:
            IndexError: a number lies outside the set.
            UserError: a shard cannot be read.
        """
        places = []
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"pair {index} of {len(self)}")
            shard, row = divmod(self._places[index], self._shard_size)
            places.append((self._shard(shard), row))

        def rows(name: str) -> Tensor:
            return torch.stack([shard[name][row] for shard, row in places])

        texts = tuple(self.texts[index] for index in indices)
        return PairBatch(rows("noise"), rows("sample"), texts, rows("states") if self.state_timesteps else None)

    def prompt_numbers(self, texts: Sequence[str]) -> list[int]:
        """Where these texts stand in `prompts`."""
        return [self._numbers[text] for text in texts]

    def summary(self) -> str:
        """One line for the log."""
        facts, scale = self.facts, self.facts["guidance"]
        guidance = f"{scale[0]:g} to {scale[1]:g}" if isinstance(scale, list) else f"{scale:g}"
        return (f"{len(self)} pairs from {self.folder}: {facts['sampler.class']}, {facts['steps']} steps, guidance "
                f"{guidance}, seed {facts['seed']}")  # fmt: skip

    def _hold(self, places: Sequence[int], texts: Sequence[str]) -> None:
        """Takes the pairs at these places of the files, with these prompts, for all that there are."""
        self._places, self.texts = places, tuple(texts)
        self.prompts = PromptSet(tuple(dict.fromkeys(texts)), str(self.folder))
        self._numbers = {text: number for number, text in enumerate(self.prompts.prompts)}

    def _opened(self, number: int) -> Any:
        """A shard's file, open for reading slices."""
        if number not in self._open:
            path = shard_path(self.folder, number)
            try:
                self._open[number] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{path}: cannot be read ({error}); make the pairs again, whole shards stay"
                ) from error
        return self._open[number]

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            file = self._opened(number)
            # What was said on the way is as large as the way itself, and read by `states` alone.
            shard = {name: file.get_tensor(name) for name in file.keys() if name != "predictions"}  # noqa: SIM118
            self._shards[number] = self._widened(shard, first=number * self._shard_size)
        return self._shards[number]

    def _widened(self, shard: dict[str, Tensor], *, first: int) -> dict[str, Tensor]:
        """Floating point as float32, and the noise made again where the file leaves it out."""
        shard = {name: value.float() if value.is_floating_point() else value for name, value in shard.items()}
        if "noise" not in shard:
            count, *shape = shard["sample"].shape
            rows = [pair_noise(self.facts["seed"], first + row, shape) for row in range(count)]
            shard["noise"] = torch.stack(rows)
        return shard


@dataclass(frozen=True)
class PairStream:
    """Pairs in the order of a run, with their prompts encoded.

    Attributes:
        pairs: what is stored.
        conditions: the encodings of `pairs.prompts`.
    """

    pairs: PairSet
    conditions: Conditions

    def draw(self, seed: int, start: int, count: int) -> tuple[PairBatch, Condition]:
        """Samples `start` to `start + count - 1` of a run; every epoch plays all pairs in an order of its own."""
        found = self.pairs.batch(epoch_indices(seed, start, count, len(self.pairs)))
        return found, self.conditions.conditions(self.pairs.prompt_numbers(found.prompts))

    def draw_states(self, seed: int, start: int, count: int) -> tuple[StateBatch, Condition]:
        """The same of places on the way: an epoch comes by every state of every pair once."""
        found = self.pairs.states(epoch_indices(seed, start, count, self.pairs.num_states))
        return found, self.conditions.conditions(self.pairs.prompt_numbers(found.prompts))


def load_pairs(folder: str | Path, family: ModelFamily | None = None, *, size: int | None = None) -> PairSet:
    """Opens a folder of pairs.

    Args:
        folder: from `make_pairs`.
        family: the teacher that they have to be of; None: any.
        size: pixel size of the images to train for; None: the teacher's own.

    Raises:
        UserError: there are none, they are not all there, or they are another teacher's; says what differs.
    """
    folder = Path(folder)
    index = read_index(folder)
    if index is None:
        raise UserError(f"{folder}: holds no pairs, it has no {INDEX}; {REMEDY}")
    if family is not None:
        here = teacher_facts(family, size)
        changed = differences({name: index["facts"].get(name) for name in here}, here)
        if changed:
            raise UserError(f"{folder}: these pairs do not fit this run ({changed}); make others of its own teacher")
    texts: list[str] = []
    for number, rows in shard_ranges(index["count"], index["shard_size"]):
        header = shard_header(shard_path(folder, number), index["fingerprint"], len(rows))
        if header is None:
            raise UserError(f"{folder}: of {index['count']} pairs only {rows.start} are there and whole; the command "
                            "that began to make them completes them")  # fmt: skip
        texts += header["prompts"][: len(rows)]
    return PairSet(folder, index, texts)


# ---- the files' format, shared with whoever writes them ------------------------------------------------------------


def shard_path(folder: Path, number: int) -> Path:
    """The file of one shard."""
    return folder / f"shard-{number:05d}.safetensors"


def shard_ranges(count: int, shard_size: int) -> list[tuple[int, range]]:
    """(number of the shard, numbers of its pairs) for `count` pairs."""
    firsts = range(0, count, shard_size)
    return [(number, range(first, min(first + shard_size, count))) for number, first in enumerate(firsts)]


def shard_header(path: Path, fingerprint: str, rows: int) -> dict[str, Any] | None:
    """What a shard says about itself; None unless it is whole, of this fingerprint and of at least so many rows."""
    try:
        # Opening checks the header against the file's length, so a truncated file does not open.
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {}).get("pairs", "{}"))
    except (OSError, SafetensorError, ValueError):
        return None
    return header if header.get("fingerprint") == fingerprint and len(header["prompts"]) >= rows else None


def read_index(folder: Path) -> dict[str, Any] | None:
    """The content of index.json; None if there is none.

    Raises:
        UserError: it cannot be read, or is not what it says it is.
    """
    file = folder / INDEX
    if not file.is_file():
        return None
    try:
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if index["fingerprint"] == fingerprint_of(index["facts"]):
            return index
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error!r}); delete the folder and make the pairs again") from error
    raise UserError(f"{file}: was changed, its facts have another fingerprint; delete the folder and make them again")


def teacher_facts(family: ModelFamily, size: int | None) -> dict[str, Any]:
    """The part of a fingerprint that a training run can check."""
    texts = hashlib.sha256("".join(map(weights_fingerprint, family.text_modules().values())).encode()).hexdigest()
    return {
        "format": FORMAT,
        "teacher": family.plain_fingerprint or weights_fingerprint(family.network()),
        "text encoders": texts,
        "latent shape": list(family.latent_shape(size)),
    }


def pair_noise(seed: int, number: int, shape: Sequence[int]) -> Tensor:
    """The noise of one pair, (C, H, W): a function of these numbers alone, the same on every device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed_of(seed, "pair", number)))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Names and values of the facts that differ, or nothing."""

    def short(value: Any) -> str:
        return value[:8] if isinstance(value, str) and len(value) == 64 else str(value)

    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(f"{name}: {short(there.get(name))} there, {short(here.get(name))} here" for name in names)
