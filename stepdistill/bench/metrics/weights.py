"""Where the weights of metrics lie: named by the user, in the environment, in a cache, or on the hub if allowed.

A metric whose weights are nowhere is not measured; the rest still is.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from stepdistill.bench.metrics.base import MissingError
from stepdistill.errors import UserError, first_line


VARIABLE = "STEPDISTILL_WEIGHTS_"  # followed by the name in capitals
INCEPTION_FILE = "inception-2015-12-05.pt"  # clean-fid's, which it keeps in the folder for temporary files


@dataclass(frozen=True)
class Source:
    """One network that metrics use.

    Attributes:
        what: in words, for messages.
        hub: id of a repository on the hub; None if there is none that could be used as it is.
        folder: a folder is wanted, else a file.
    """

    what: str
    hub: str | None = None
    folder: bool = True


SOURCES: Mapping[str, Source] = {
    "inception": Source(f"clean-fid's {INCEPTION_FILE}", folder=False),
    "dinov2": Source("a Dinov2Model folder", "facebook/dinov2-large"),
    # DMD2, main/coco_eval: ViT-g/14, trained on LAION-2B
    "clip": Source("a CLIPModel folder", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"),
    "clip-l14": Source("a CLIPModel folder, ViT-L/14 of OpenAI", "openai/clip-vit-large-patch14"),
    "vgg16": Source("VGG16's convolutions as safetensors", folder=False),
    "hpsv2": Source("HPSv2's ViT-H/14 as a CLIPModel folder"),
    "pickscore": Source("PickScore's CLIPModel folder", "yuvalkirstain/PickScore_v1"),
    "aesthetic": Source("LAION's aesthetic predictor, the layers on ViT-L/14, as safetensors", folder=False),
    "image_reward": Source("a folder with ImageReward.pt and med_config.json"),
}


@dataclass(frozen=True)
class Weights:
    """What the user says about weights.

    Attributes:
        paths: name of `SOURCES` => file or folder.
        offline: nothing is looked for on the network.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    offline: bool = False

    def __post_init__(self) -> None:
        for name in self.paths:
            if name not in SOURCES:
                raise UserError(f"--weights {name}: no metric has weights of this name; choose from "
                                f"{', '.join(SOURCES)}")  # fmt: skip

    def named(self, name: str) -> str:
        """What tells a network in words: the path that was given, else the hub id that it comes from."""
        return self._given(name) or SOURCES[name].hub or SOURCES[name].what

    def _given(self, name: str) -> str | None:
        return self.paths.get(name) or os.environ.get(_variable(name))

    def find(self, name: str) -> str:
        """The file or folder of a network.

        Raises:
            MissingError: it is nowhere; says what was wanted and how to give it.
        """
        source, given, wanted = SOURCES[name], self._given(name), _wanted(name)
        if given is not None:
            place = Path(given)
            if place.is_dir() if source.folder else place.is_file():
                return str(place)
            raise MissingError(f"{given} is no {'folder' if source.folder else 'file'}; wanted {wanted}")
        if name == "inception":
            return self._inception(wanted)
        if source.hub is None:
            raise MissingError(f"wanted {wanted}")
        return self._from_hub(source.hub, wanted)

    def _inception(self, wanted: str) -> str:
        place = Path(tempfile.gettempdir()) / INCEPTION_FILE
        if not place.is_file():
            if self.offline:
                raise MissingError(f"{place} is not there and --offline was given; wanted {wanted}")
            try:
                _download_inception(place)
            except OSError as error:
                raise MissingError(f"{place} cannot be downloaded ({error}); wanted {wanted}") from error
        return str(place)

    def _from_hub(self, repository: str, wanted: str) -> str:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.txt", "*.safetensors"]
        try:
            return str(snapshot_download(repository, local_files_only=self.offline, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            reason = f"{repository} is not in the cache and not to be had ({first_line(error)})"
            raise MissingError(f"{reason}; wanted {wanted}") from error


def _download_inception(place: Path) -> None:
    """By clean-fid, which writes into the very file that others read: so aside, and by one process at a time."""
    from cleanfid.downloads_helper import check_download_inception

    with FileLock(place.with_name(f".{place.name}.lock")):
        if place.is_file():  # by whoever held the lock before
            return
        with tempfile.TemporaryDirectory(dir=place.parent) as aside:
            check_download_inception(aside)
            (Path(aside) / place.name).replace(place)


@contextmanager
def loading(*names: str) -> Iterator[None]:
    """Turns what goes wrong while a network is loaded into one metric that is missing.

    Args:
        names: of `SOURCES`, for the message.

    Raises:
        MissingError: says what went wrong, what was wanted and how to give it.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        wanted = " and ".join(_wanted(name) for name in names)
        raise MissingError(f"cannot be loaded ({first_line(error)}); wanted {wanted}") from error


def _wanted(name: str) -> str:
    return f"{SOURCES[name].what} for --weights {name}=PATH or {_variable(name)}"


def _variable(name: str) -> str:
    return VARIABLE + name.upper().replace("-", "_")


PLAIN = Weights()  # nothing is named, and the network may be asked


def fingerprint(path: str) -> str:
    """sha256 of a file, or of a folder's safetensors and JSON files with their names; of a hub id, the id itself."""
    place = Path(path)
    if place.is_file():
        with place.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    if not place.is_dir():
        return path
    total = hashlib.sha256()
    for file in sorted(f for f in place.rglob("*") if f.suffix in (".safetensors", ".json", ".txt", ".pt")):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        total.update(f"{file.relative_to(place)} {digest}\n".encode())
    return total.hexdigest()
