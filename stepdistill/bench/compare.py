"""Two reports side by side: what differs, by how much, and whether that is more than chance."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from stepdistill.bench.quality import COSTS, LESS_IS_BETTER, interval, less_is_better
from stepdistill.bench.report import Report, headings, written, written_interval
from stepdistill.errors import UserError


if TYPE_CHECKING:
    from rich.table import Table

MACHINE_COLUMNS = ("ms_per_image", "latency_ms", "peak_gib", "train_seconds")
# Places of what hashes stand for, and what is compared otherwise.
NOT_COMPARED = {"models", "real", "missing", "cells", "folder", "clip", "exact", "prompts_file", "clip_network",
                "feature_network"}  # fmt: skip
HEADINGS = ("model", "figure", "A", "B", "B - A", "better")

Estimate = tuple[float, float, float]  # value, and the ends of its interval


class Verdict(StrEnum):
    """Which of two figures is better."""

    first = "A"
    second = "B"
    chance = "within chance"
    same = "same"
    unknown = "no interval"


@dataclass(frozen=True)
class Difference:
    """One figure of one model in both reports.

    Attributes:
        model: its name.
        column: of the report.
        first: row in report A.
        second: row in report B.
    """

    model: str
    column: str
    first: Mapping[str, Any]
    second: Mapping[str, Any]

    @property
    def value(self) -> float:
        """B - A."""
        return float(self.second[self.column]) - float(self.first[self.column])

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of B - A, if both figures have one; see `difference_interval`."""
        a, b = interval(self.first, self.column), interval(self.second, self.column)
        if a is None or b is None:
            return None
        return difference_interval((self.first[self.column], *a), (self.second[self.column], *b))

    @property
    def verdict(self) -> Verdict:
        """Which is better. Network calls are exact; everything else needs an interval to be sure of."""
        if self.value == 0:
            return Verdict.same
        found = self.interval
        if found is None and self.column != "nfe":
            return Verdict.unknown
        if found is not None and found[0] <= 0 <= found[1]:
            return Verdict.chance
        return Verdict.second if (self.value < 0) == less_is_better(self.column) else Verdict.first

    def cells(self) -> list[str]:
        """A row of the table."""
        rows = (self.first, self.second)
        name = headings(rows, [self.column])[0]
        texts = [f"{written(self.column, row[self.column])} {written_interval(row, self.column)}".rstrip()
                 for row in rows]  # fmt: skip
        return [self.model, name, *texts, self._written_difference(), self.verdict.value]

    def _written_difference(self) -> str:
        values = [self.value, *(self.interval or ())]
        # Written like the figures themselves, so that a share's difference is in percent.
        texts = [("+" if value > 0 else "") + written(self.column, value) for value in values]
        return texts[0] if len(texts) == 1 else f"{texts[0]} [{texts[1]}, {texts[2]}]"


@dataclass(frozen=True)
class Comparison:
    """What two reports say about the models that both of them have.

    Attributes:
        differences: model by model, figure by figure.
        only_first: names of models that only report A has.
        only_second: names of models that only report B has.
        cautions: what was not measured alike, a sentence each.
    """

    differences: tuple[Difference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    cautions: tuple[str, ...]

    def notes(self) -> list[str]:
        """What to know when reading the table."""
        notes = [*self.cautions]
        for names, where in ((self.only_first, "A"), (self.only_second, "B")):
            if names:
                notes.append(f"Only in {where}: {', '.join(names)}.")
        return [*notes, "Intervals are of 95 %; that of B - A takes the two errors for independent, so with the same "
                "prompts and noise it is rather too wide."]  # fmt: skip

    def to_table(self) -> Table:
        """For the terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(*HEADINGS)
        before = None
        for difference in self.differences:
            model, *cells = difference.cells()
            # As Text, for brackets in a model's name would be read as markup.
            table.add_row(Text("" if model == before else model), *(Text(cell) for cell in cells))
            before = model
        return table

    def to_markdown(self) -> str:
        """Table and notes."""
        lines = [HEADINGS, ["---"] * len(HEADINGS), *(difference.cells() for difference in self.differences)]
        table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]
        return "\n".join([*table, "", *(f"- {note}" for note in self.notes())]) + "\n"


def compare(first: Report, second: Report) -> Comparison:
    """Pairs the rows of two reports by the models' names; reports with one row each are paired whatever they say.

    Raises:
        UserError: no model is in both.
    """
    a, b = ({row.model: asdict(row) for row in report.rows} for report in (first, second))
    pairs = [(name, a[name], b[name]) for name in a if name in b]
    if not pairs and len(a) == len(b) == 1:
        ((name_a, row_a),), ((name_b, row_b),) = a.items(), b.items()
        pairs = [(f"{name_a} | {name_b}", row_a, row_b)]
        a = b = {}
    if not pairs:
        raise UserError(
            f"compare: no model is in both reports; A has {', '.join(a) or 'none'}, B has {', '.join(b) or 'none'}; "
            "measure them under the same name, as path,name=NAME"
        )
    differences = tuple(found for pair in pairs for found in _differences(*pair))
    missing = tuple(name for name in a if name not in b), tuple(name for name in b if name not in a)
    counts = [f"Caution: {name} has {row_a['images']} images in A and {row_b['images']} in B, and FID depends on that."
              for name, row_a, row_b in pairs if row_a["images"] != row_b["images"]]  # fmt: skip
    return Comparison(differences, *missing, (*_cautions(first, second), *counts))


def difference_interval(a: Estimate, b: Estimate) -> tuple[float, float]:
    """(value, low, high) of two figures => the interval of b - a, the two errors independent.

    The lengths on either side add up in squares, each side for itself, so that skew intervals stay skew (method of
    variance estimates recovery; G. Y. Zou and A. Donner, Statistics in Medicine 27, 2008).
    """
    (value_a, low_a, high_a), (value_b, low_b, high_b) = a, b
    # A bootstrap interval need not contain its figure.
    below = math.hypot(max(0.0, value_b - low_b), max(0.0, high_a - value_a))
    above = math.hypot(max(0.0, high_b - value_b), max(0.0, value_a - low_a))
    return value_b - value_a - below, value_b - value_a + above


def _differences(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Difference, ...]:
    columns = (*LESS_IS_BETTER, *COSTS)
    return tuple(Difference(name, column, a, b) for column in columns
                 if a.get(column) is not None and b.get(column) is not None)  # fmt: skip


def _cautions(first: Report, second: Report) -> tuple[str, ...]:
    """What makes figures of two reports differ for other reasons than the models."""
    found = []
    for key, a, b in _protocol_differences(first.protocol, second.protocol):
        found.append(f"Caution: {key} is {a} in A and {b} in B, so quality is not measured alike.")
    if first.seeds.get("noise") != second.seeds.get("noise"):
        found.append("The noise had different seeds.")
    if first.device != second.device:
        columns = ", ".join(headings([], MACHINE_COLUMNS))
        found.append(f"Caution: A was measured on {first.device}, B on {second.device}, so {columns} do not compare.")
    if bool(first.protocol.get("exact")) != bool(second.protocol.get("exact")):
        found.append("Caution: one was measured with --exact, which computes row by row, so times do not compare.")
    found += _version_caution(first.versions, second.versions)
    return tuple(found)


def _protocol_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    weights = [protocol.get("weights") or {} for protocol in (a, b)]
    known = {"evaluator"} if all("evaluator" in each for each in weights) else set()  # by its hash
    return _unlike({**a, "weights": weights[0]}, {**b, "weights": weights[1]}, {*a, *b} - known)


def _unlike(
    a: Mapping[str, Any], b: Mapping[str, Any], keys: Collection[str], above: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in A, value in B) of what differs; of what both have as mappings, the keys that both have."""
    for key in sorted({*keys} - NOT_COMPARED):
        one, other = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _unlike(one, other, one.keys() & other.keys(), f"{above}{key}.")
        elif one != other:
            yield f"{above}{key}", one, other


def _version_caution(a: Mapping[str, str], b: Mapping[str, str]) -> Sequence[str]:
    changed = [f"{name} {a.get(name, 'absent')} and {b.get(name, 'absent')}" for name in sorted({*a, *b})
               if a.get(name) != b.get(name)]  # fmt: skip
    return [f"Versions differ: {', '.join(changed)}."] if changed else []
