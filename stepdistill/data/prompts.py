"""Prompt sets: where a run's captions come from, and in which order they are played.

source => PromptSet;  (seed, sample number) => prompt number, with no state to save
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from stepdistill.data.shapes import captioned_scene
from stepdistill.errors import UserError


SHAPES_SOURCE = "shapes"
PROMPT_KEYS = ("prompt", "caption", "text")  # tried in this order in .json, .jsonl and .csv
_Lines = Iterator[tuple[int, Any]]  # (line or entry number from 1, what stands there)


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


def load_prompts(source: str | Path, *, count: int | None = None, seed: int = 1) -> PromptSet:
    """Reads prompts from "shapes" or from a .txt, .json, .jsonl or .csv file.

    Blank entries are left out and counted. A file may hold fewer prompts than `count`: then all of them are used.

    Args:
        source: "shapes" (captions of the bundled scenes), or a file: a prompt a line (.txt), a list of texts or
            objects (.json), an object a line (.jsonl), a table with a header (.csv). Objects and tables name the text
            prompt, caption or text.
        count: at most this many, the first ones; None means all, which the endless "shapes" cannot give.
        seed: which endless series of scenes; only for "shapes".

    Raises:
        UserError: an unreadable, binary, malformed or empty file, naming file and line.
    """
    if count is not None and count < 1:
        raise UserError(f"prompts: count must be at least 1, got {count}")
    if str(source) == SHAPES_SOURCE:
        if count is None:
            raise UserError('prompts "shapes" are endless: say how many, for example count: 8192')
        captions = tuple(captioned_scene(seed, index).caption for index in range(count))
        return PromptSet(captions, f"{SHAPES_SOURCE} (seed {seed})")
    return _from_file(Path(source), count)


def _from_file(path: Path, count: int | None) -> PromptSet:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f'{path}: a prompt source is "{SHAPES_SOURCE}" or a file ending in {", ".join(_READERS)}; '
            "convert it or rename it, a plain text file with a prompt a line is enough"
        )
    prompts, dropped = [], Counter[str]()
    for number, entry in reader(path, _read_text(path)):
        text = _prompt_of(path, number, entry)
        if not text:
            dropped["blank"] += 1
        else:
            prompts.append(text)
    if not prompts:
        raise UserError(f"{path}: holds no prompt ({dropped['blank']} blank entries); write one prompt a line")
    return PromptSet(tuple(prompts[:count]), str(path), dict(dropped))


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a prompt file ({', '.join(_READERS)})")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check the path of the prompts"
        ) from error
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: binary data; prompts are plain UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file with UTF-8 encoding") from error


def _prompt_of(path: Path, number: int, entry: object) -> str:
    """The text of one entry, stripped; an object without a known key is a mistake, an empty value is not."""
    if isinstance(entry, Mapping):
        key = next((k for k in PROMPT_KEYS if k in entry), None)
        if key is None:
            found = ", ".join(map(str, entry)) or "none"
            raise UserError(f"{path}, line {number}: none of the keys {', '.join(PROMPT_KEYS)}; found {found}")
        entry = entry[key]
    if entry is None:
        return ""
    if not isinstance(entry, str):
        raise UserError(f"{path}, line {number}: a prompt must be text, got {type(entry).__name__}")
    return entry.strip()


def _txt_entries(path: Path, text: str) -> _Lines:
    return enumerate(text.split("\n") if not text.endswith("\n") else text[:-1].split("\n"), 1)


def _jsonl_entries(path: Path, text: str) -> _Lines:
    for number, line in _txt_entries(path, text):
        yield number, _parse_json(path, line, number - 1) if line.strip() else ""


def _json_entries(path: Path, text: str) -> _Lines:
    entries = _parse_json(path, text, 0)
    if not isinstance(entries, list):
        raise UserError(f"{path}: must hold a list of prompts, got {type(entries).__name__}")
    return enumerate(entries, 1)


def _parse_json(path: Path, text: str, lines_before: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {lines_before + error.lineno}: not valid JSON ({error.msg})") from error


def _csv_entries(path: Path, text: str) -> _Lines:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error


_READERS: Mapping[str, Callable[[Path, str], _Lines]] = {
    ".txt": _txt_entries,
    ".json": _json_entries,
    ".jsonl": _jsonl_entries,
    ".csv": _csv_entries,
}


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
