"""What the text that names a source of data means: `place?key=value&key=value`.

shapes, shapes?objects=2            the bundled scenes, or those of so many objects
prompts.txt, captions/*.parquet     files; patterns and number ranges {0000..0012} name several
photos/                             a folder of images
shards/{0000..0012}.tar             webdataset shards
hf:owner/name?split=train           a data set of the `datasets` library, from the hub or a local folder
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepdistill.data.shapes import COUNTS
from stepdistill.errors import UserError
from stepdistill.recipe_text import nearest


SHAPES_SOURCE = "shapes"
HUB = "hf:"
PROMPT_KEYS = ("prompt", "caption", "text")  # tried in this order wherever entries have keys
IMAGE_KEYS = ("image", "img", "jpg", "jpeg", "png", "webp")
OPTIONS = ("prompt", "image")  # of every source with keys
HUB_OPTIONS = (*OPTIONS, "split", "config", "revision", "stream")
SHAPES_OPTIONS = ("objects",)
_QUERY = re.compile(r"^(?P<place>.+)\?(?P<query>\w+=[^&?]*(?:&\w+=[^&?]*)*)$")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Source:
    """Where data comes from.

    Attributes:
        text: as the user wrote it.
        place: without the options.
        options: by name.
    """

    text: str
    place: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_shapes(self) -> bool:
        """Whether the bundled scenes are meant."""
        return self.place == SHAPES_SOURCE

    @property
    def objects(self) -> int | None:
        """How many objects all of the bundled scenes are to have; None: as it comes."""
        return int(self.options["objects"]) if "objects" in self.options else None

    @property
    def is_hub(self) -> bool:
        """Whether the `datasets` library is to open it."""
        return self.place.startswith(HUB)

    @property
    def prompt_keys(self) -> tuple[str, ...]:
        """Where an entry may have its text: the key that was asked for, or the usual ones."""
        return (self.options["prompt"],) if "prompt" in self.options else PROMPT_KEYS

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Where an entry may have its image."""
        return (self.options["image"],) if "image" in self.options else IMAGE_KEYS

    def files(self) -> list[Path]:
        """The files that the place names, in the order of their names; a plain name need not exist.

        Raises:
            UserError: a pattern that no file matches, or a range that counts down.
        """
        found: list[Path] = []
        for name in _ranges(self.place):
            if not re.search(r"[*\[]", name) or Path(name).exists():  # a name may have brackets in it
                found.append(Path(name))
                continue
            # pathlib's own patterns are relative, and a pattern may begin with a root
            base = Path(Path(name).anchor)
            matches = sorted(base.glob(str(Path(name).relative_to(base))))
            if not matches:
                raise UserError(f"{name}: no file has such a name; check the pattern")
            found += matches
        return found


def parse_source(text: str | Path) -> Source:
    """Takes the text of a source apart.

    Raises:
        UserError: an option that this kind of source does not have, or a value that it cannot have.
    """
    match = _QUERY.match(str(text))
    if match is None:
        return Source(str(text), str(text))
    options = dict(pair.split("=", 1) for pair in match["query"].split("&"))
    shapes = match["place"] == SHAPES_SOURCE
    known = SHAPES_OPTIONS if shapes else HUB_OPTIONS if match["place"].startswith(HUB) else OPTIONS
    for name in options:
        if name not in known:
            raise UserError(f"{text}: unknown option {name!r}; {nearest(name, known)}")
    if shapes and options["objects"] not in map(str, COUNTS):
        raise UserError(f"{text}: a scene has {' or '.join(map(str, COUNTS))} objects, not {options['objects']}")
    return Source(str(text), match["place"], options)


def _ranges(place: str) -> list[str]:
    """`a-{08..10}.tar` => a-08.tar, a-09.tar, a-10.tar; leading zeros are kept."""
    match = _RANGE.search(place)
    if match is None:
        return [place]
    first, last, width = int(match[1]), int(match[2]), len(match[1])
    if last < first:
        raise UserError(f"{place}: the range {match[0]} counts down; write the smaller number first")
    names = [f"{place[: match.start()]}{number:0{width}d}{place[match.end() :]}" for number in range(first, last + 1)]
    return [name for each in names for name in _ranges(each)]


def optional_library(name: str, what: str) -> Any:
    """A library that only some sources need.

    Raises:
        UserError: it is not installed; says which extra brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{what} needs the library {name}, which is not installed: "
                        "pip install 'stepdistill[data]'") from error  # fmt: skip
