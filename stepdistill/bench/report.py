"""What a benchmark found, as a value: JSON for programs, Markdown and a terminal table for people."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.bench.prompts import ORDINARY_COUNT
from stepdistill.errors import UserError


if TYPE_CHECKING:
    from rich.table import Table

# Column => heading, how a value is written. Columns not named here are written as they come.
COLUMNS: Mapping[str, tuple[str, str]] = {
    "model": ("model", "{}"),
    "nfe": ("NFE", "{:g}"),
    "images": ("images", "{:,}"),
    "fid": ("FID", "{:.3g}"),
    "kid": ("KID", "{:.3g}"),
    "clip_score": ("CLIP score", "{:.1f}"),
    "caption_accuracy": ("caption accuracy", "{:.1%}"),
    "images_all_correct": ("all correct", "{:.1%}"),
    "diversity": ("diversity", "{:.2f}"),
    "precision": ("precision", "{:.2f}"),
    "recall": ("recall", "{:.2f}"),
    "fd_dinov2": ("FD-DINOv2", "{:.4g}"),
    "patch_fid": ("patch FID", "{:.3g}"),
    "lpips": ("LPIPS to teacher", "{:.3f}"),
    "clip_distance": ("CLIP distance to teacher", "{:.3f}"),
    "lpips_diversity": ("LPIPS within a prompt", "{:.3f}"),
    "feature_diversity": ("distance within a prompt", "{:.3f}"),
    "vendi": ("Vendi score", "{:.2f}"),
    "hpsv2": ("HPSv2", "{:.2f}"),
    "pickscore": ("PickScore", "{:.2f}"),
    "image_reward": ("ImageReward", "{:.3f}"),
    "aesthetic": ("aesthetic", "{:.2f}"),
    "ms_per_image": ("ms / image", "{:.3g}"),
    "text_ms": ("text, ms", "{:.3g}"),
    "denoiser_ms": ("denoiser, ms", "{:.3g}"),
    "vae_ms": ("decoder, ms", "{:.3g}"),
    "train_seconds": ("training, s", "{:,.0f}"),
    "peak_gib": ("peak GiB", "{:.2f}"),
    "latency_ms": ("latency, ms", "{:.3g}"),
    "images_per_second": ("images / s", "{:.3g}"),
    "parameters": ("parameters", "{:,}"),
}
DISTANCES = ("fid", "fd_dinov2", "patch_fid")  # which grow as images get fewer
THROUGH_CLIP = ("clip_score", "clip_distance", "feature_diversity", "vendi")
TERMINAL_COLUMNS = ("model", "nfe", "fid", "clip_score", "caption_accuracy", "diversity", "ms_per_image")


@dataclass(frozen=True)
class Row:
    """One model's results; None where a figure does not apply.

    `nfe`: network calls per image. `caption_accuracy`, `images_all_correct`: shares in [0, 1]. `diversity`: relative
    to real data. `precision`, `recall`: shares of features within the other set's neighbourhood. `peak_gib`:
    accelerator memory while making images, with the model and without the networks of metrics. `lpips`,
    `clip_distance`: to the first model's image of the same prompt and noise, at its most steps. `lpips_diversity`,
    `feature_diversity`, `vendi`: between the images of a prompt. `latency_ms`: of a call for one image, text included.
    `images_per_second`: text included. `parameters`: of the denoiser. `times`: milliseconds per image in text
    encoders, denoiser and decoder (text, denoiser, vae). `intervals`: column => 95 % interval. `others`: metrics of
    the user's own.
    """

    model: str
    nfe: float | None = None
    images: int | None = None
    fid: float | None = None
    kid: float | None = None
    clip_score: float | None = None
    caption_accuracy: float | None = None
    images_all_correct: float | None = None
    diversity: float | None = None
    precision: float | None = None
    recall: float | None = None
    ms_per_image: float | None = None
    train_seconds: float | None = None
    peak_gib: float | None = None
    fd_dinov2: float | None = None
    patch_fid: float | None = None
    lpips: float | None = None
    clip_distance: float | None = None
    lpips_diversity: float | None = None
    feature_diversity: float | None = None
    vendi: float | None = None
    hpsv2: float | None = None
    pickscore: float | None = None
    image_reward: float | None = None
    aesthetic: float | None = None
    latency_ms: float | None = None
    images_per_second: float | None = None
    parameters: int | None = None
    times: Mapping[str, float] | None = None
    intervals: Mapping[str, Sequence[float]] | None = None
    others: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Report:
    """Results with everything needed to get them again."""

    name: str
    date: str
    device: str
    versions: Mapping[str, str]
    seeds: Mapping[str, int]
    recipe_sha256: str | None
    protocol: Mapping[str, Any]
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """JSON text with the fields' names as keys."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "report") -> Report:
        """The inverse of `to_json`.

        Raises:
            UserError: if the text is no report; `source` says in the error where it came from.
        """
        try:
            data = json.loads(text)
            return cls(**{**data, "rows": tuple(Row(**row) for row in data["rows"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{source} is not a benchmark report ({error}); run `stepdistill bench` again") from error

    def to_markdown(self) -> str:
        """The table, the conditions it was measured under, and what to know when reading it."""
        rows = [asdict(row) for row in self.rows]
        seeds = ", ".join(f"{key} {value}" for key, value in self.seeds.items())
        versions = ", ".join(f"{key} {value}" for key, value in self.versions.items())
        lines = [f"# {self.name}", "", markdown_table(rows), "", *(f"- {note}" for note in self.notes()), ""]
        lines += [f"Measured {self.date} on {self.device}; seeds: {seeds}; {versions}."]
        if self.recipe_sha256 is not None:
            lines.append(f"Recipe sha256 {self.recipe_sha256}.")
        return "\n".join(lines) + "\n"

    def notes(self) -> list[str]:
        """What to know when reading the table."""
        notes = [
            "NFE counts network calls per image; a doubled batch, as guidance needs, counts twice.",
            "ms / image covers the denoiser and the decoder, after a warm-up batch; text encoding is left out.",
        ]
        notes += self._conditions()
        counts = sorted({row.images for row in self.rows if row.images is not None
                         and any(getattr(row, column) is not None for column in DISTANCES)})  # fmt: skip
        if counts and counts[0] < ORDINARY_COUNT:
            notes.append(
                f"Warning: FID grows as images get fewer, and {counts[0]:,} are fewer than {ORDINARY_COUNT:,}. These "
                "values compare with each other, not with FIDs of other numbers of images. KID has no such bias."
            )
        for metric, reason in self.protocol.get("missing", {}).items():
            notes.append(f"Not measured: {metric}: {reason}.")
        for model, facts in self.protocol.get("cells", {}).items():
            if facts.get("surplus"):
                notes.append(f"Caution: {model} has {facts['surplus']:,} images more in its folder than the protocol "
                             "wants; measured are the first by name, 2.png before 10.png.")  # fmt: skip
        real = self.protocol.get("real")
        if real:
            texts = [f"{COLUMNS[key][0]} {written(key, value)}" for key, value in real.items()]
            notes.append(f"Real scenes for the same prompts, as many as each model makes, have {', '.join(texts)}.")
        return notes

    def _conditions(self) -> Iterator[str]:
        """What the figures depend on, as far as the protocol says it."""
        said = self.protocol
        if said.get("exact"):
            yield "Rows were computed one by one (--exact), so times are longer than those of batches."
        if said.get("left_out"):
            yield f"Measured without {' and '.join(said['left_out'])}."
        if said.get("feature_network") and self._has("fid", "kid", "precision", "recall"):
            yield f"FID, KID, precision and recall are of features of {said['feature_network']}."
            yield f"How images are resized: {said.get('resize')}."
        if said.get("clip_network") and self._has(*THROUGH_CLIP):
            prefix = f"{said['prefix']!r} stands before" if said.get("prefix") else "nothing stands before"
            yield f"CLIP scores, 100 times the cosine, are of {said['clip_network']}; {prefix} the prompts."
        if said.get("baseline"):
            yield f"LPIPS and CLIP distance to teacher are to the images of {said['baseline']}."

    def _has(self, *columns: str) -> bool:
        return any(getattr(row, column) is not None for row in self.rows for column in columns)

    def to_table(self) -> Table:
        """The rows as a rich table for the terminal: the columns that fit 80 characters; report.md has all of them."""
        from rich.table import Table
        from rich.text import Text

        rows = [asdict(row) for row in self.rows]
        columns = [column for column in used_columns(rows) if column in TERMINAL_COLUMNS]
        table = Table(title=self.name)
        for number, heading in enumerate(headings(rows, columns)):
            table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
        for row in rows:
            # As Text, for brackets in a model's name would be read as markup.
            table.add_row(*(Text(written(column, row[column])) for column in columns))
        return table


def save_report(report: Report, folder: Path) -> None:
    """Writes report.json and report.md into `folder`, each aside first and then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.json", report.to_json()), ("report.md", report.to_markdown())):
        fresh = folder / f".{name}.new"
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(folder / name)


def load_report(path: Path) -> Report:
    """Reads a report.json, or the one in a folder.

    Raises:
        UserError: if there is none, or it is broken.
    """
    path = path / "report.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"report {path} cannot be read ({error}); run `stepdistill bench` to make one") from error
    return Report.from_json(text, source=str(path))


def used_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns with a value in some row, in order of `COLUMNS`; others follow as they come."""
    known_values = [(key, value) for row in rows for key, value in row.items() if value is not None]
    present = [key for key, value in known_values if not isinstance(value, Mapping)]  # times, intervals: no column
    known = [column for column in COLUMNS if column in present]
    return known + [key for key in dict.fromkeys(present) if key not in COLUMNS]


def headings(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """What tables call the columns."""
    return [distance_name(rows, c) if c in DISTANCES else COLUMNS.get(c, (c, ""))[0] for c in columns]


def distance_name(rows: Sequence[Mapping[str, Any]], column: str = "fid") -> str:
    """The heading of a Frechet distance: FID, or FID-N if some value is of N < 2,048 images, where it is biased."""
    name = COLUMNS[column][0]
    counts = {row["images"] for row in rows if row.get(column) is not None and row.get("images") is not None}
    if not counts or min(counts) >= ORDINARY_COUNT:
        return name
    return f"{name}-{min(counts)}" if len(counts) == 1 else f"{name}-N (N: images)"


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with what it holds as mappings as columns of their own: times (text_ms, denoiser_ms, vae_ms), others."""
    times = {f"{part}_ms": value for part, value in (row.get("times") or {}).items()}
    return {**row, **times, **(row.get("others") or {})}


def written_interval(row: Mapping[str, Any], column: str) -> str:
    """The 95 % interval of a figure as tables show it, such as [9.1, 10.2]; empty if there is none."""
    low, high = (row.get("intervals") or {}).get(column) or (None, None)
    return "" if low is None or high is None else f"[{written(column, low)}, {written(column, high)}]"


def written(column: str, value: Any) -> str:
    """A figure as tables show it."""
    if value is None:
        return "-"
    if column in COLUMNS:
        return COLUMNS[column][1].format(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows => a Markdown table of the columns that have any value; text to the left, numbers to the right."""
    rows = [flat(row) for row in rows]
    columns = used_columns(rows)
    numeric = [all(not isinstance(row.get(c), str) for row in rows) for c in columns]
    lines = [headings(rows, columns), ["---:" if n else "---" for n in numeric]]
    for row in rows:
        texts = (f"{written(column, row.get(column))} {written_interval(row, column)}" for column in columns)
        lines.append([text.rstrip().replace("|", "\\|") for text in texts])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def installed_versions() -> dict[str, str]:
    """Versions that results depend on."""
    import torch

    names = ("stepdistill", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pillow", "clean-fid",
             "torchmetrics")  # fmt: skip
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a checkout that is on the path but not installed
            versions[name] = "not installed"
    return versions


def device_name(device: str) -> str:
    """The device in words: the accelerator's name, or the CPU with its number of threads."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def today() -> str:
    """The date in UTC, as 2026-01-31."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()
