"""Rebuild the tables and pictures of the public pages from the JSON records."""

from __future__ import annotations

import json
import re
from pathlib import Path

from agents.results import write_atomic
from benchmarks.registry import RESULTS, benchmarks

_MARKED = re.compile(r"(<!-- table: (?P<name>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def rebuild(page: Path, results: Path = RESULTS) -> int:
    """Replace what stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->`` in `page`; how many were.

    Raises:
        FileNotFoundError: a table has no record.
    """

    def fill(match: re.Match[str]) -> str:
        path = results / f"{match['name']}.json"
        if not path.is_file():
            raise FileNotFoundError(f"{page} wants the table {match['name']!r}, but there is no {path}.")
        record = json.loads(path.read_text())
        text = benchmarks()[record["benchmark"]].table(record)
        torch = record["versions"]["torch"]
        source = f"`{path.name}`: {record['machine']}; torch {torch}; seed {record['seed']}; {record['date']}"
        return f"{match[1]}{text}\n\n<sub>{source}</sub>\n{match[3]}"

    text, count = _MARKED.subn(fill, page.read_text())
    write_atomic(page, lambda file: file.write(text.encode()))
    return count


def draw(folder: Path, results: Path = RESULTS) -> list[Path]:
    """Draw every record that has a figure into `folder`."""
    drawn = []
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text())
        figure = benchmarks()[record["benchmark"]].figure
        if figure is not None:
            figure(record, folder / f"{path.stem}.png")
            drawn.append(folder / f"{path.stem}.png")
    return drawn
