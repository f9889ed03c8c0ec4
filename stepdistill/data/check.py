"""What a training would make of a source of prompts or images: what it keeps, what each rule leaves out, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepdistill.data.findings import Findings
from stepdistill.data.hub import HubImages
from stepdistill.data.images import ImageSet, load_images
from stepdistill.data.prompts import load_prompts
from stepdistill.errors import UserError
from stepdistill.framing import Size


@dataclass(frozen=True)
class Checked:
    """One source, looked through to its end.

    Attributes:
        what: "prompts" or "images".
        source: as the user wrote it.
        kept: how many entries can be used; None: endless.
        facts: more about these, a line each.
        findings: what was left out.
        error: why nothing can be used at all, if so.
    """

    what: str
    source: str
    kept: int | None
    facts: tuple[str, ...]
    findings: Findings
    error: str | None = None

    @property
    def is_fine(self) -> bool:
        """Whether a training would start with it."""
        return self.error is None and not self.findings.faults

    def lines(self) -> list[str]:
        """For people: what is kept, and every rule with its count and the first place where it applied."""
        found = [f"{self.what} from {self.source}: {'endless' if self.kept is None else f'{self.kept} can be used'}"]
        found += [f"  {fact}" for fact in self.facts]
        for rule, count in self.findings.dropped.items():
            stops = "; a training stops here" if rule in self.findings.faults else ""
            place = self.findings.first.get(rule)
            found.append(f"  left out: {count} {rule}" + (f", first {place}" if place else "") + stops)
        if self.error is not None:
            found.append(f"  {self.error}")
        return found


def check_prompts(source: str, *, count: int | None = None) -> Checked:
    """Looks through all prompts of a source."""
    findings = Findings(strict=False)
    try:
        prompts = load_prompts(source, count=count, findings=findings)
    except UserError as error:
        return Checked("prompts", source, 0, (), findings, str(error))
    lengths = sorted(len(text) for text in prompts.prompts)
    facts = (
        f"{len(prompts) - len(set(prompts.prompts))} of them are repeated",
        f"{lengths[len(lengths) // 2]} characters in the middle, {lengths[-1]} at most",
        f"fingerprint {prompts.fingerprint[:16]}",
    )
    return Checked("prompts", source, len(prompts), facts, findings)


def check_images(
    source: str, size: int, *, buckets: Sequence[Size] = (), count: int | None = None, pixels: bool = False
) -> Checked:
    """Looks through all images of a source.

    Args:
        source: as for `load_images`.
        size: side of the squares in pixels.
        buckets: sizes to fit the images to instead.
        count: how many rows of a stream without a known end.
        pixels: decodes every image too, which finds those that were cut off behind their header.
    """
    findings = Findings(strict=False)
    try:
        images = load_images(source, size=size, buckets=buckets, count=count, findings=findings)
        kept = images.length
        if isinstance(images, HubImages):
            kept = images.survey(findings)
        elif kept is not None and pixels:
            kept -= _undecodable(images, kept, findings)
    except UserError as error:
        return Checked("images", source, 0, (), findings, str(error))
    return Checked("images", source, kept, _shapes(images) if buckets else (), findings)


def _undecodable(images: ImageSet, count: int, findings: Findings) -> int:
    broken = 0
    for index in range(count):
        try:
            images.batch([index])
        except UserError as error:
            broken += 1
            findings.fault("whose pixels cannot be read", error)
    return broken


def _shapes(images: ImageSet) -> tuple[str, ...]:
    """How many images each bucket gets; one with few of them repeats these to fill its batches."""
    targets = [images.framing(index).target for index in range(images.length or 0)]
    return tuple(f"{b.width}x{b.height}: {targets.count(b)}" for b in images.buckets)
