"""The prompts, images and stored pairs that belong to one of several students."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stepdistill.data.images import ImageBatch, ImageSet
from stepdistill.data.pairs import PairSet
from stepdistill.data.prompts import PromptSet, epoch_indices
from stepdistill.errors import UserError
from stepdistill.framing import Framing, Size


Route = Callable[[Sequence[str]], list[int]]  # prompts => numbers of their students


@dataclass(frozen=True)
class Part:
    """What one student is responsible for.

    Attributes:
        number: of the student, from 0.
        students: how many there are.
        route: prompts => numbers of their students.
    """

    number: int
    students: int
    route: Route

    @property
    def name(self) -> str:
        """As the log says it."""
        return f"student {self.number + 1} of {self.students}"

    def check_everyone(self, prompts: PromptSet) -> None:
        """Looks before this student is trained whether all others can be: with other prompts it would be another run.

        Raises:
            UserError: one of them has no prompts.
        """
        idle = set(range(self.students)) - set(self.route(prompts.prompts))
        if idle:
            raise UserError(_nobodys(prompts, f"student {min(idle) + 1} of {self.students}"))

    def prompts(self, prompts: PromptSet) -> PromptSet:
        """Those of the student, in their order, as often as they come.

        Raises:
            UserError: there are none.
        """
        kept = [text for text, number in zip(prompts.prompts, self.route(prompts.prompts), strict=True)
                if number == self.number]  # fmt: skip
        if not kept:
            raise UserError(_nobodys(prompts, self.name))
        dropped = {**prompts.dropped, "of other students": len(prompts) - len(kept)}
        return PromptSet(tuple(kept), prompts.source, dropped if self.students > 1 else prompts.dropped)

    def images(self, images: ImageSet, count: int | None) -> PartOfImages:
        """Those among the first `count` images (None: all) whose captions are of the student.

        Raises:
            UserError: there are none, or the images have no end and no number is given.
        """
        if images.length is None and count is None:
            raise UserError("images: these have no end; say how many the students are to share, with data.count")
        numbers = range(min(n for n in (images.length, count) if n is not None))
        captions = images.texts(numbers)
        kept = [i for i, number in zip(numbers, self.route(captions), strict=True) if number == self.number]
        if not kept:
            raise UserError(f"images: none of {len(numbers)} captions belongs to {self.name}; give more images or "
                            "fewer students")  # fmt: skip
        return PartOfImages(images, tuple(kept), images.size)

    def pairs(self, pairs: PairSet) -> PairSet:
        """Those whose prompts are of the student.

        Raises:
            UserError: there are none.
        """
        texts = pairs.prompts.prompts
        own = {text for text, number in zip(texts, self.route(texts), strict=True) if number == self.number}
        kept = [number for number, text in enumerate(pairs.texts) if text in own]
        if not kept:
            raise UserError(f"{pairs.folder}: none of the {len(pairs)} pairs belongs to {self.name}; make pairs of "
                            "more prompts (stepdistill data pairs), or have fewer students")  # fmt: skip
        return pairs.only(kept)


def _nobodys(prompts: PromptSet, student: str) -> str:
    return (f"{prompts.source}: none of the {len(prompts)} prompts belongs to {student}; give more prompts or fewer "
            "students")  # fmt: skip


@dataclass(frozen=True)
class PartOfImages(ImageSet):
    """Some images of a set.

    Attributes:
        images: the set.
        numbers: which of them.
        size: side in pixels.
    """

    images: ImageSet
    numbers: tuple[int, ...] = field(repr=False)
    size: int

    @property
    def length(self) -> int:
        """How many there are."""
        return len(self.numbers)

    @property
    def fingerprint(self) -> str:
        """Of the set and of the choice."""
        return hashlib.sha256(f"{self.images.fingerprint} {self.numbers}".encode()).hexdigest()

    @property
    def buckets(self) -> tuple[Size, ...]:
        """Those of the set."""
        return self.images.buckets

    def framing(self, index: int) -> Framing:
        """Of the image with this number among the chosen ones."""
        return self.images.framing(self.numbers[index])

    def indices(self, seed: int, start: int, count: int) -> list[int]:
        """Every epoch plays each image once, in an order of its own."""
        return epoch_indices(seed, start, count, len(self.numbers))

    def batch(self, indices: Sequence[int]) -> ImageBatch:
        """The images with these numbers, which count the chosen ones only."""
        return self.images.batch([self.numbers[i] for i in indices])

    def texts(self, indices: Sequence[int]) -> list[str]:
        """Their captions."""
        return self.images.texts([self.numbers[i] for i in indices])

    def summary(self) -> str:
        """How many there are, and of which."""
        return f"{len(self.numbers)} of one student among: {self.images.summary()}"
