"""Entries with text in them, from files of any kind: what stands where.

file => (place, entry);  entry => text
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.data.findings import Findings
from stepdistill.data.source import Source, optional_library
from stepdistill.errors import UserError, first_line


Entries = Iterator[tuple[str, Any]]  # (place for messages, what stands there)
NO_PROMPT = "without a prompt"
NO_TEXT = "whose prompt is no text"
NO_JSON = "not valid JSON"


def text_of(entry: object, place: str, keys: Sequence[str], findings: Findings) -> str | None:
    """The text of one entry, stripped; None where it has none, which is a fault."""
    if isinstance(entry, Mapping):
        key = next((k for k in keys if k in entry), None)
        if key is None:
            found = ", ".join(map(str, entry)) or "none"
            findings.fault(NO_PROMPT, UserError(f"{place}: none of the keys {', '.join(keys)}; found {found}"))
            return None
        entry = entry[key]
    if entry is None:
        return ""
    if not isinstance(entry, str):
        findings.fault(NO_TEXT, UserError(f"{place}: a prompt must be text, got {type(entry).__name__}"))
        return None
    return entry.strip()


def file_entries(path: Path, source: Source, findings: Findings) -> Entries:
    """The entries of one file, read by its suffix.

    Raises:
        UserError: an unknown suffix, or a file that cannot be read at all.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_entries(path, source, findings)
    reader = _READERS.get(suffix)
    if reader is None:
        raise UserError(
            f'{path}: a prompt source is "shapes", hf:owner/name or a file ending in {", ".join(SUFFIXES)}; '
            "convert it or rename it, a plain text file with a prompt a line is enough"
        )
    return reader(path, _read_text(path), findings)


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a prompt file ({', '.join(SUFFIXES)})")
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


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return enumerate(text.split("\n") if not text.endswith("\n") else text[:-1].split("\n"), 1)


def _txt_entries(path: Path, text: str, findings: Findings) -> Entries:
    for number, line in _lines(text):
        yield f"{path}, line {number}", line


def _jsonl_entries(path: Path, text: str, findings: Findings) -> Entries:
    for number, line in _lines(text):
        if not line.strip():
            yield f"{path}, line {number}", ""
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            findings.fault(NO_JSON, UserError(f"{path}, line {number}: not valid JSON ({error.msg})"))
            continue
        yield f"{path}, line {number}", entry


def _json_entries(path: Path, text: str, findings: Findings) -> Entries:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(entries, list):
        raise UserError(f"{path}: must hold a list of prompts, got {type(entries).__name__}")
    for number, entry in enumerate(entries, 1):
        yield f"{path}, line {number}", entry


def _csv_entries(path: Path, text: str, findings: Findings) -> Entries:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error


def _parquet_entries(path: Path, source: Source, findings: Findings) -> Entries:
    """Rows of the text column alone, a batch at a time: files of captions often hold images as well."""
    parquet = optional_library("pyarrow.parquet", f"{path}: a .parquet file")
    arrow = optional_library("pyarrow", f"{path}: a .parquet file")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; check the path of the prompts")
    try:
        file = parquet.ParquetFile(path)
        columns = list(file.schema_arrow.names)
        key = next((name for name in source.prompt_keys if name in columns), None)
        if key is None:
            error = UserError(f"{path}: none of the keys {', '.join(source.prompt_keys)}; found {', '.join(columns)}")
            findings.fault(NO_PROMPT, error)
            findings.dropped[NO_PROMPT] += file.metadata.num_rows - 1  # the file stands for all its rows
            return
        number = 0
        for batch in file.iter_batches(columns=[key]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield f"{path}, row {number}", value
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({first_line(error)})") from error


_READERS: Mapping[str, Callable[[Path, str, Findings], Entries]] = {
    ".txt": _txt_entries,
    ".json": _json_entries,
    ".jsonl": _jsonl_entries,
    ".csv": _csv_entries,
}
SUFFIXES = (*_READERS, ".parquet", ".tar")
