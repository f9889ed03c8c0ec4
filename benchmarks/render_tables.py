"""Renders the tables of README and docs from the measured results, so that no number is typed by hand.

    python benchmarks/render_tables.py            # rewrites the tables
    python benchmarks/render_tables.py --check    # exits 1 if one is stale, for continuous integration

A table stands between `<!-- results:NAME -->` and `<!-- /results -->` and shows the rows of
benchmarks/results/NAME.json, without the details that would not fit a page: `stepdistill compare` and the file itself
have them. With
`<!-- results:NAME rows:A,B -->` it shows the rows of models A and B alone, also of those called "A, 4 steps".
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepdistill.bench.report import markdown_table


ROOT = Path(__file__).resolve().parents[1]
START = re.compile(r"<!-- results:(?P<name>[\w.-]+)(?: rows:(?P<rows>[\w,.-]+))? -->\n")
END = "<!-- /results -->"
DETAILS = {"rounds", "times", "intervals", "latency_ms", "images_per_second", "parameters"}


def rendered(text: str, results: Path, *, source: str) -> str:
    """A document with every table replaced by what the results say now; a marker in a code block counts as well."""
    parts, position = [], 0
    while (start := START.search(text, position)) is not None:
        end = text.find(END, start.end())
        following = START.search(text, start.end())
        if end < 0 or (following is not None and following.start() < end):
            raise SystemExit(f"{source}: the table {start['name']} has no end; write {END} below it")
        path = results / f"{start['name']}.json"
        if not path.is_file():
            raise SystemExit(f"{source}: there is no {path.name} in {results}; run the benchmark, or mend the marker")
        rows = chosen(json.loads(path.read_text(encoding="utf-8"))["rows"], start["rows"], f"{source}: {path.name}")
        shown = [{key: value for key, value in row.items() if key not in DETAILS} for row in rows]
        parts += [text[position : start.end()], markdown_table(shown), "\n"]
        position = end
    return "".join([*parts, text[position:]])


def chosen(rows: Sequence[dict[str, Any]], names: str | None, where: str) -> list[dict[str, Any]]:
    """The rows of these models, in the order of the file; all where no names are given."""
    if names is None:
        return list(rows)
    wanted = names.split(",")
    called = {name: [row for row in rows if row["model"].split(", ")[0] == name] for name in wanted}
    missing = [name for name, found in called.items() if not found]
    if missing:
        raise SystemExit(f"{where} has no row of {', '.join(missing)}; mend the marker")
    return [row for row in rows if any(row in found for found in called.values())]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="*", type=Path, help="default: README.md and docs/**/*.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is stale")
    args = parser.parse_args(arguments)
    stale = []
    for path in args.documents or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = rendered(before, args.results, source=str(path))
        if after != before:
            stale.append(path)
            if not args.check:
                path.write_text(after, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'stale; run python benchmarks/render_tables.py' if args.check else 'rewritten'}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
