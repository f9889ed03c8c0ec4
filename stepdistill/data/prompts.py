"""Prompt sets: where a run's captions come from, and in which order they are played.

source => PromptSet;  (seed, sample number) => prompt number, with no state to save
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from stepdistill.data.entries import Entries, file_entries, text_of
from stepdistill.data.findings import Findings
from stepdistill.data.shapes import captioned_scene
from stepdistill.data.source import PROMPT_KEYS, SHAPES_SOURCE, Source, parse_source
from stepdistill.errors import UserError


__all__ = ["PROMPT_KEYS", "SHAPES_SOURCE", "PromptSet", "epoch_indices", "load_prompts"]


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order, with a fingerprint that changes whenever any of them does.

    Attributes:
        prompts: the texts, at least one, stripped of surrounding white space.
        source: where they came from, for messages and the run's record.
        dropped: how many entries each rule left out, by rule.
    """

    prompts: tuple[str, ...]
    source: str = ""
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of the prompts and their order."""
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()

    def batch(self, indices: Sequence[int]) -> list[str]:
        """The prompts with these numbers."""
        return [self.prompts[i] for i in indices]

    def summary(self) -> str:
        """One line for the log: how many prompts there are and what was left out by which rule."""
        dropped = ", ".join(f"{count} {rule}" for rule, count in self.dropped.items())
        return f"{len(self)} prompts from {self.source}" + (f" (left out: {dropped})" if dropped else "")


def load_prompts(
    source: str | Path, *, count: int | None = None, seed: int = 1, findings: Findings | None = None
) -> PromptSet:
    """Reads prompts from "shapes", from files or from a data set of the `datasets` library.

    Blank entries are left out and counted. A source may hold fewer prompts than `count`: then all of them are used.

    Args:
        source: "shapes" (captions of the bundled scenes); a file or a pattern of files: a prompt a line (.txt), a list
            of texts or objects (.json), an object a line (.jsonl), a table (.csv, .parquet), webdataset shards (.tar);
            or hf:owner/name, hf:folder. Objects and tables name the text prompt, caption or text, or as the option
            `?prompt=name` behind the source says.
        count: at most this many, the first ones; None means all, which the endless "shapes" cannot give.
        seed: which endless series of scenes; only for "shapes".
        findings: gets what is left out; one that is not strict also counts what is broken instead of stopping there.

    Raises:
        UserError: an unreadable, binary, malformed or empty file, naming file and line; a library is missing.
    """
    if count is not None and count < 1:
        raise UserError(f"prompts: count must be at least 1, got {count}")
    parsed = parse_source(source)
    if parsed.is_shapes:
        if count is None:
            raise UserError('prompts "shapes" are endless: say how many, for example count: 8192')
        scenes = (captioned_scene(seed, index, objects=parsed.objects) for index in range(count))
        return PromptSet(tuple(scene.caption for scene in scenes), f"{parsed.text} (seed {seed})")
    findings = findings or Findings()
    prompts: list[str] = []
    for place, entry in _entries(parsed, findings):
        text = text_of(entry, place, parsed.prompt_keys, findings)
        if text:
            prompts.append(text)
        elif text is not None:
            findings.drop("blank", place)
        # A stream may be longer than memory; files end by themselves, and what they leave out is worth knowing.
        if parsed.is_hub and len(prompts) == count:
            break
    if not prompts:
        blank = findings.dropped["blank"]
        broken = f"; {findings.reasons()}" if findings.faults else ""
        raise UserError(f"{source}: holds no prompt ({blank} blank entries{broken}); write one prompt a line")
    return PromptSet(tuple(prompts[:count]), parsed.text, dict(findings.dropped))


def _entries(source: Source, findings: Findings) -> Entries:
    if source.is_hub:
        from stepdistill.data.hub import hub_entries

        yield from hub_entries(source)
        return
    for path in source.files():
        if path.suffix.lower() == ".tar":
            from stepdistill.data.shards import shard_texts

            yield from shard_texts(path, source, findings)
        else:
            yield from file_entries(path, source, findings)


def epoch_indices(seed: int, start: int, count: int, size: int) -> list[int]:
    """Which of `size` items the samples number `start` to `start + count - 1` of a run are.

    Every epoch plays each item once, in an order of its own. The answer depends on the arguments alone, so a resumed
    run goes on with the right items although no state was saved, and ranks take disjoint ranges of one series.

    Args:
        seed: of the run.
        start: number of the first sample, counted from the start of the run.
        count: how many samples.
        size: how many items there are, at least 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    return [_epoch_order(seed, n // size, size)[n % size] for n in range(start, start + count)]


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _epoch_order(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return tuple(order)
