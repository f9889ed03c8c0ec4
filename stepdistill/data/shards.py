"""Webdataset shards: tar files in which the members `name.png`, `name.txt`, `name.json` are one sample.

An uncompressed tar is read at any place, so its samples have numbers, an order of their own in every epoch, and a run
goes on with the right one without reading what was before. Shards that lie elsewhere open as `hf:` sources.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from stepdistill.data.entries import Entries
from stepdistill.data.findings import Findings
from stepdistill.data.source import Source
from stepdistill.data.stored import IMAGE_SUFFIXES, Found, Place
from stepdistill.errors import UserError


TEXT_ENDS = ("txt", "prompt", "caption", "text")  # ends of members that are a caption
Sample = dict[str, tarfile.TarInfo]  # end of the member's name, without its dot => member


def is_shard(path: Path) -> bool:
    """Whether the name is one of a shard, also of one that is packed and so refused with a remedy."""
    return path.suffix.lower() in (".tar", ".tgz") or path.name.lower().endswith((".tar.gz", ".tar.zst"))


def shard_images(paths: Sequence[Path], source: Source, findings: Findings) -> Iterator[Found]:
    """All samples that have an image, with their captions."""
    ends = _image_ends(source)
    for path in paths:
        for key, sample, tar in _samples(path):
            end = next((e for e in ends if e in sample), None)
            if end is None:
                findings.drop("without an image", f"{path}: sample {key} has {_ends(sample)}")
                continue
            member = sample[end]
            place = Place(path, member.name, member.offset_data, member.size)
            caption = _caption(tar, sample, source, f"{path}: sample {key}", findings)
            yield Found(place, None if caption is None else " ".join(caption.split()), f" has {_ends(sample)}")


def shard_texts(path: Path, source: Source, findings: Findings) -> Entries:
    """The captions of one shard as prompts; samples without one are left out."""
    for key, sample, tar in _samples(path):
        place = f"{path}: sample {key}"
        caption = _caption(tar, sample, source, place, findings)
        if caption is None:
            findings.drop("without a prompt", f"{place} has {_ends(sample)}")
        else:
            yield place, caption


def _image_ends(source: Source) -> tuple[str, ...]:
    asked = source.options.get("image")
    return (asked,) if asked else tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)


def _ends(sample: Sample) -> str:
    return ", ".join(sample) or "nothing"


def _samples(path: Path) -> Iterator[tuple[str, Sample, tarfile.TarFile]]:
    """Members that follow each other and agree in their name up to its first dot.

    Raises:
        UserError: no such file, compressed, or damaged.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            key, sample = "", Sample()
            for member in tar:
                if not member.isfile():
                    continue
                name = PurePosixPath(member.name)
                stem, _, end = name.name.partition(".")
                if str(name.parent / stem) != key:
                    if sample:
                        yield key, sample, tar
                    key, sample = str(name.parent / stem), Sample()
                sample[end.lower()] = member
            if sample:
                yield key, sample, tar
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such shard; check the path") from error
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: cannot be read as an uncompressed tar file ({error}); unpack compressed shards with "
                        "gunzip, since samples are read at any place") from error  # fmt: skip


def _caption(tar: tarfile.TarFile, sample: Sample, source: Source, place: str, findings: Findings) -> str | None:
    """The text of a sample: a member of its own, or a key of its .json; None: there is neither."""
    asked = source.options.get("prompt")
    for end in (asked,) if asked else TEXT_ENDS:
        if end in sample:
            return _decoded(tar, sample[end], place, findings)
    if "json" not in sample:
        return None
    text = _decoded(tar, sample["json"], place, findings)
    try:
        entry: Any = json.loads(text or "null")
    except json.JSONDecodeError as error:
        findings.fault("not valid JSON", UserError(f"{place}: its .json is not valid ({error.msg})"))
        return None
    key = next((k for k in source.prompt_keys if isinstance(entry, dict) and k in entry), None)
    return None if key is None else str(entry[key] or "")


def _decoded(tar: tarfile.TarFile, member: tarfile.TarInfo, place: str, findings: Findings) -> str | None:
    file = tar.extractfile(member)
    assert file is not None, "members that are no files were passed over"
    try:
        return file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        findings.fault("not UTF-8", UserError(f"{place}: {member.name} is not UTF-8 text; write it with UTF-8"))
        return None
