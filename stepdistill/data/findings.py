"""What was left out of a source of data, by which rule, and where it happened first."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from stepdistill.errors import UserError


@dataclass
class Findings:
    """Counts entries that a rule leaves out, and faults, at which a training stops but a check does not.

    Attributes:
        strict: a fault is raised; otherwise it is counted like a rule.
        dropped: entries left out, by rule.
        first: where a rule left one out for the first time, by rule.
        faults: the rules among them that stop a training.
    """

    strict: bool = True
    dropped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    faults: set[str] = field(default_factory=set)

    def drop(self, rule: str, place: str) -> None:
        """One entry, named by its place, is left out."""
        self.dropped[rule] += 1
        self.first.setdefault(rule, place)

    def fault(self, rule: str, error: UserError) -> None:
        """One entry is broken; the error names its place."""
        if self.strict:
            raise error
        self.faults.add(rule)
        self.drop(rule, str(error))

    def reasons(self) -> str:
        """All rules with their counts and first places, in one line."""
        return "; ".join(f"{count} {rule}, first {self.first[rule]}" for rule, count in self.dropped.items())
