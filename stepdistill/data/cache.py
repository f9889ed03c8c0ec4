"""Encoded prompts on disk, so that a text encoder works once and not at every step.

    <folder>/<first 16 digits of the fingerprint>/index.json, shard-00000.safetensors, ...

The fingerprint covers the encoder's weights, the tokenizer and the prompts: whatever would change an encoding changes
the folder, so a cache is never used for something it was not made from. Every file appears at once or not at all, and
a build that was interrupted goes on behind its last finished shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stepdistill.condition import Condition
from stepdistill.errors import UserError
from stepdistill.files import write_whole


if TYPE_CHECKING:
    from torch import Tensor, nn

    from stepdistill.data.prompts import PromptSet
    from stepdistill.families.base import ModelFamily

Progress = Callable[[int, int], None]  # (prompts done, prompts in all)

INDEX = "index.json"
FORMAT = 1  # of the files; part of the fingerprint, so a change makes new folders
SHARD_SIZE = 1024  # prompts; at most this much work is lost by an interruption


class Conditions(Protocol):
    """Where the trainer gets encoded prompts from: a cache, or the encoder itself."""

    def build(self, progress: Progress | None = None) -> None:
        """Does whatever can be done before training."""

    def conditions(self, indices: Sequence[int]) -> Condition:
        """The encoded prompts with these numbers."""


class EncodedOnTheFly:
    """The same interface without a cache: encodes the prompts whenever they are asked for.

    Args:
        family: the loaded teacher.
        prompts: what to encode.
    """

    def __init__(self, family: ModelFamily, prompts: PromptSet) -> None:
        self._family = family
        self._prompts = prompts

    def build(self, progress: Progress | None = None) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def conditions(self, indices: Sequence[int]) -> Condition:
        """The encoded prompts with these numbers, on the encoder's device."""
        return self._family.encode_prompts(self._prompts.batch(indices))


class ConditionCache:
    """Encoded prompts on disk, in the encoder's dtype, read through memory maps.

    Args:
        folder: may hold caches of other prompts and encoders beside this one.
        family: the loaded teacher.
        prompts: what to encode.
        batch_size: prompts encoded at a time.
        shard_size: prompts per file.
    """

    def __init__(
        self,
        folder: str | Path,
        family: ModelFamily,
        prompts: PromptSet,
        batch_size: int = 64,
        *,
        shard_size: int = SHARD_SIZE,
    ) -> None:
        self._family = family
        self._prompts = prompts
        self._batch_size = batch_size
        self._shard_size = shard_size
        self._shards: dict[int, dict[str, Tensor]] = {}
        self.facts = conditions_facts(family, prompts)
        self.fingerprint = fingerprint_of(self.facts)
        self.folder = Path(folder) / self.fingerprint[:16]

    def build(self, progress: Progress | None = None) -> None:
        """Encodes what is not on disk yet; call it once before `conditions`.

        Raises:
            UserError: the disk is full or the folder cannot be written; finished shards stay.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._adopt_index()
            for shard in range(-(-len(self._prompts) // self._shard_size)):
                numbers = self._numbers(shard)
                if not self._is_finished(shard):
                    self._write_shard(shard, self._encode(numbers))
                if progress is not None:
                    progress(numbers.stop, len(self._prompts))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.folder}: the cache of encoded prompts cannot be written ({error}); free some space or set "
                "data.cache=false; what is finished is kept"
            ) from error

    def conditions(self, indices: Sequence[int]) -> Condition:
        """The encoded prompts with these numbers, on the CPU.

        Raises:
            UserError: a shard is missing or damaged, or a number lies outside the prompts.
        """
        places = []
        for index in indices:
            if not 0 <= index < len(self._prompts):
                raise IndexError(f"prompt {index} of {len(self._prompts)}")
            places.append((self._shard(index // self._shard_size), index % self._shard_size))
        names = places[0][0].keys()
        return Condition({name: torch.stack([shard[name][row] for shard, row in places]) for name in names})

    def _adopt_index(self) -> None:
        """Writes index.json, or takes the shard size of an unfinished build from it."""
        file = self.folder / INDEX
        if file.is_file():
            index = json.loads(file.read_text())
            if index.get("fingerprint") == self.fingerprint:
                self._shard_size = int(index["shard_size"])
                return
        facts = {
            "format": FORMAT, "fingerprint": self.fingerprint, "prompts": len(self._prompts),
            "prompts_fingerprint": self._prompts.fingerprint, "shard_size": self._shard_size, "facts": self.facts,
        }  # fmt: skip
        for stale in self.folder.glob("shard-*.safetensors"):
            stale.unlink()  # of another fingerprint with the same first digits
        write_whole(file, lambda new: new.write_text(json.dumps(facts, indent=2) + "\n"))

    def _numbers(self, shard: int) -> range:
        first = shard * self._shard_size
        return range(first, min(first + self._shard_size, len(self._prompts)))

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def _is_finished(self, shard: int) -> bool:
        try:
            # Opening checks the header against the file's length, so a truncated shard is made again.
            with safe_open(self._path(shard), framework="pt") as file:
                return bool(file.metadata()["fingerprint"] == self.fingerprint)
        except (OSError, SafetensorError):
            return False

    @torch.no_grad()
    def _encode(self, numbers: range) -> Condition:
        parts = []
        for first in range(numbers.start, numbers.stop, self._batch_size):
            batch = range(first, min(first + self._batch_size, numbers.stop))
            parts.append(self._family.encode_prompts(self._prompts.batch(batch)).to(device="cpu"))
        return Condition.cat(parts)

    def _write_shard(self, shard: int, condition: Condition) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in condition.tensors.items()}
        header = {"fingerprint": self.fingerprint}
        write_whole(self._path(shard), lambda new: save_file(tensors, new, metadata=header))

    def _shard(self, shard: int) -> dict[str, Tensor]:
        """Tensors of one shard, (prompts, ...): memory maps, so only the rows that are read come from disk."""
        if shard not in self._shards:
            try:
                with safe_open(self._path(shard), framework="pt") as file:
                    self._shards[shard] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{self._path(shard)}: cannot be read ({error}); start again, the cache completes itself"
                ) from error
        return self._shards[shard]


class EncodedTexts:
    """Encodings that are asked for by their text instead of by their number.

    Args:
        conditions: where the encodings are, already built.
        prompts: the texts, in the order of their numbers.
    """

    def __init__(self, conditions: Conditions, prompts: PromptSet) -> None:
        self._conditions = conditions
        self._numbers = {text: number for number, text in enumerate(prompts.prompts)}

    def __call__(self, texts: Sequence[str]) -> Condition:
        return self._conditions.conditions([self._numbers[text] for text in texts])


def conditions_fingerprint(family: ModelFamily, prompts: PromptSet) -> str:
    """sha256 (hexadecimal) of all that determines the encoded prompts."""
    return fingerprint_of(conditions_facts(family, prompts))


def conditions_facts(family: ModelFamily, prompts: PromptSet) -> dict[str, object]:
    """All that determines the encoded prompts, by name: encoder weights, tokenizers, prompts."""
    parts: dict[str, object] = {"format": FORMAT, "family": family.name, "prompts": prompts.fingerprint}
    modules = family.text_modules()
    for name, module in modules.items():
        parts[name] = weights_fingerprint(module)
    if not modules:
        # Class labels: the encoding is a look-up in the teacher, cheap enough to be its own fingerprint.
        encoded = family.encode_prompts(prompts.prompts)
        parts["encoded"] = {name: _tensor_digest(tensor).hex() for name, tensor in encoded.tensors.items()}
    if family.encoding_facts:
        parts["encoding"] = family.encoding_facts
    for name, component in family.pipeline.components.items():
        if name.startswith("tokenizer") and component is not None:
            vocabulary = hashlib.sha256(json.dumps(sorted(component.get_vocab().items())).encode()).hexdigest()
            parts[name] = [component.model_max_length, vocabulary]
    return parts


def fingerprint_of(facts: Mapping[str, object]) -> str:
    """sha256 (hexadecimal) of facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def weights_fingerprint(module: nn.Module) -> str:
    """sha256 (hexadecimal) of a module's state: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    state: Mapping[str, Tensor] = module.state_dict()
    for name in sorted(state):
        digest.update(name.encode() + b"\n" + _tensor_digest(state[name]))
    return digest.hexdigest()


def _tensor_digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
