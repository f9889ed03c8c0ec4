"""Data sets of the `datasets` library: rows in a fixed order, streamed or at any place.

    hf:owner/name?split=train&config=en&revision=main&prompt=caption&image=jpg&stream=false

A stream is played in windows of consecutive rows, shuffled inside of each: what sample number n is depends on the seed
and on n alone, so that a resumed run passes over the rows before and goes on exactly.
"""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from stepdistill.data.entries import Entries
from stepdistill.data.findings import Findings
from stepdistill.data.images import ImageBatch, ImageSet, digest
from stepdistill.data.pixels import fit, read_pixels, read_size
from stepdistill.data.prompts import epoch_indices
from stepdistill.data.shapes import to_tensor
from stepdistill.data.source import HUB, Source, optional_library
from stepdistill.errors import UserError, first_line
from stepdistill.framing import Size


WINDOW = 256  # rows of a stream that are held in memory, as they are stored, and shuffled with each other
SAVED = ("state.json", "dataset_dict.json")  # files that `Dataset.save_to_disk` leaves
Row = Mapping[str, Any]


class Rows:
    """A split of a data set as numbered rows.

    Args:
        source: names the data set and its options.

    Attributes:
        length: how many rows there are, where the data set says so.
        anywhere: whether a row can be read without those before it.

    Raises:
        UserError: the library is missing, or it cannot open the data set.
    """

    def __init__(self, source: Source) -> None:
        self._library = optional_library("datasets", source.text)
        self._source = source
        self._data = self._without_decoding(self._open())
        self.anywhere = isinstance(self._data, self._library.Dataset)
        self.length = len(self._data) if self.anywhere else self._told_length()
        self._next = 0
        self._stream: Iterator[Row] = iter(())

    def window(self, first: int, count: int) -> list[Row]:
        """The rows from `first` on, at most `count`; fewer at the end."""
        try:
            if self.anywhere:
                return [self._data[i] for i in range(first, min(first + count, len(self._data)))]
            if first != self._next or first == 0:
                self._stream = iter(self._data.skip(first))
            rows = [row for _, row in zip(range(count), self._stream, strict=False)]
            self._next = first + len(rows)
            return rows
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self._source.text}: rows from {first} on cannot be read ({first_line(error)}); run the "
                            "same command again to go on") from error  # fmt: skip

    def _open(self) -> Any:
        options, place = self._source.options, self._source.place.removeprefix(HUB)
        split = options.get("split", "train")
        try:
            if any(Path(place, name).is_file() for name in SAVED):
                data = self._library.load_from_disk(place)
                return data[split] if isinstance(data, Mapping) else data
            return self._library.load_dataset(
                place, options.get("config"), split=split, revision=options.get("revision"),
                streaming=options.get("stream", "true") != "false",
            )  # fmt: skip
        except KeyError as error:
            raise UserError(f"{self._source.text}: has no split {split!r}; name one with ?split=") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self._source.text}: cannot be opened ({first_line(error)}); check the name, and the "
                            "options split, config and revision behind it") from error  # fmt: skip

    def _without_decoding(self, data: Any) -> Any:
        """The same with images as bytes: one broken file is then one row that is left out, and not the end."""
        kind = self._library.Image
        for name, feature in (data.features or {}).items():
            if isinstance(feature, kind):
                data = data.cast_column(name, kind(decode=False))
        return data

    def _told_length(self) -> int | None:
        split = (self._data.info.splits or {}).get(self._source.options.get("split", "train"))
        return None if split is None else int(split.num_examples)

    def texts_only(self) -> None:
        """Leaves the other columns where they are, if it is known which ones there are."""
        names = list(self._data.features or {})
        key = next((k for k in self._source.prompt_keys if k in names), None)
        if key is not None:
            self._data = self._data.select_columns([key])


def hub_entries(source: Source) -> Entries:
    """The rows of a data set as entries with a prompt."""
    rows = Rows(source)
    rows.texts_only()
    first = 0
    while found := rows.window(first, WINDOW):
        for number, row in enumerate(found, first + 1):
            yield f"{source.text}, row {number}", row
        first += len(found)


class Sample(NamedTuple):
    """One row that can be used: its image as bytes, or as Pillow's where it came so, and its caption."""

    image: bytes | Image.Image
    caption: str
    name: str


class HubImages(ImageSet):
    """Captioned images of a data set.

    A row that cannot be used is replaced by another of its window, so that the numbers of all others stay.

    Args:
        source: names the data set.
        rows: its rows.
        size: side of the square images in pixels.
        length: how many of the rows are played.
    """

    def __init__(self, source: Source, rows: Rows, size: int, length: int) -> None:
        self.size = size
        self._source, self._rows, self._length = source, rows, length
        self._window = 1 if rows.anywhere else WINDOW
        self._kept: dict[int, list[Sample]] = {}
        self._lock = threading.Lock()  # images may be read by several threads
        self._findings = Findings()

    @property
    def length(self) -> int:
        """How many rows are played."""
        return self._length

    @property
    def fingerprint(self) -> str:
        """Of the name, its options, the size, and the first sample, which stands for all: a revision pins them."""
        first = self._sample(0)
        image = first.image if isinstance(first.image, bytes) else first.image.tobytes()
        return digest([self._source.text, self._length, self.size, first.caption, digest([image.hex()])])

    def indices(self, seed: int, start: int, count: int) -> list[int]:
        """Row numbers: shuffled over all rows where these are read at any place, inside of windows otherwise."""
        if self._rows.anywhere:
            return epoch_indices(seed, start, count, self._length)
        return [self._in_window(seed, number) for number in range(start, start + count)]

    def batch(self, indices: Sequence[int]) -> ImageBatch:
        """Reads, crops and resizes the images of these rows."""
        samples = [self._sample(index) for index in indices]
        target = Size(self.size, self.size)
        images = [
            read_pixels(io.BytesIO(s.image), s.name, target) if isinstance(s.image, bytes)
            else fit(s.image.convert("RGB"), target)
            for s in samples
        ]  # fmt: skip
        return ImageBatch(to_tensor(images), [s.caption for s in samples])

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The captions, without decoding the images."""
        return [self._sample(index).caption for index in indices]

    def survey(self, findings: Findings) -> int:
        """Reads every row that is played => how many can be used; the findings get those that cannot."""
        self._kept.clear()
        self._findings = findings
        return sum(len(self._load(number)) for number in range(-(-self._length // self._window)))

    def summary(self) -> str:
        """How many rows are played, and in which way."""
        way = "at any place" if self._rows.anywhere else f"streamed in windows of {self._window}"
        return f"{self._length} images from {self._source.text}, {way}"

    def _in_window(self, seed: int, number: int) -> int:
        epoch, place = divmod(number, self._length)
        first = place - place % self._window
        order = _window_order(seed, epoch, first, min(self._window, self._length - first))
        return first + order[place - first]

    def _sample(self, index: int) -> Sample:
        """The sample of a row; of an unusable one, another of its window, or of the next window that has any."""
        windows = -(-self._length // self._window)
        for step in range(windows):
            number = (index // self._window + step) % windows
            with self._lock:
                found = self._load(number)
            if found:
                return found[index % self._window % len(found)]
        raise UserError(f"{self._source.text}: none of {self._length} rows can be used ({self._findings.reasons()}); "
                        "name the columns with ?image= and &prompt=")  # fmt: skip

    def _load(self, number: int) -> list[Sample]:
        if number not in self._kept:
            first = number * self._window
            wanted = min(self._window, self._length - first)
            rows = self._rows.window(first, wanted)
            if len(rows) < wanted:
                raise UserError(f"{self._source.text}: ends after {first + len(rows)} rows, and {self._length} were "
                                f"to be played; set data.count={first + len(rows)}")  # fmt: skip
            while len(self._kept) > 2:  # a batch, the one after it, and one of another process's reach
                self._kept.pop(next(iter(self._kept)))
            samples = (self._read(row, first + place) for place, row in enumerate(rows, 1))
            self._kept[number] = [sample for sample in samples if sample is not None]
        return self._kept[number]

    def _read(self, row: Row, number: int) -> Sample | None:
        name = f"{self._source.text}, row {number}"
        caption = next((row[k] for k in self._source.prompt_keys if k in row), None)
        image = next((row[k] for k in self._source.image_keys if k in row), None)
        if not isinstance(caption, str) or not caption.strip():
            self._findings.drop("without a caption", f"{name} has {', '.join(row)}")
            return None
        stored = _stored(image)
        if stored is None:
            self._findings.drop("without an image", f"{name} has {', '.join(row)}")
            return None
        try:
            size = read_size(io.BytesIO(stored), name) if isinstance(stored, bytes) else Size(*stored.size[::-1])
        except UserError:
            self._findings.drop("unreadable", name)
            return None
        if min(size) < self.size:
            self._findings.drop(f"smaller than {self.size} pixels", name)
            return None
        return Sample(stored, " ".join(caption.split()), name)


def open_hub_images(source: Source, size: int, buckets: tuple[Size, ...], count: int | None) -> HubImages:
    """Opens the images of a data set.

    Raises:
        UserError: it cannot be opened, does not say how long it is, or buckets were asked for.
    """
    if buckets:
        raise UserError(f"{source.text}: buckets need the sizes of all images in advance, which a data set's rows do "
                        "not tell; save them as webdataset shards or a folder, or set data.buckets: null")  # fmt: skip
    rows = Rows(source)
    lengths = [n for n in (rows.length, count) if n is not None]
    if not lengths:
        raise UserError(f"{source.text}: does not say how many rows it has; set data.count")
    return HubImages(source, rows, size, min(lengths))


def _stored(image: Any) -> bytes | Image.Image | None:
    """The bytes of an image column's value, whatever way it holds them."""
    if isinstance(image, Mapping):
        content: bytes | None = image.get("bytes")
        if content is None and image.get("path") and Path(image["path"]).is_file():
            content = Path(image["path"]).read_bytes()
        return content
    return image if isinstance(image, bytes | Image.Image) else None


@lru_cache(maxsize=8)
def _window_order(seed: int, epoch: int, first: int, count: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"window/{seed}/{epoch}/{first}").shuffle(order)
    return tuple(order)
