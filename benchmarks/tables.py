"""Rebuild the tables and pictures of the public pages from the JSON records."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.registry import RESULTS, Benchmark, benchmarks
from gnnrl_gym.files import read_json, write_atomic

_MARKED = re.compile(r"(<!-- table: (?P<name>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def rebuild(page: Path, results: Path = RESULTS) -> int:
    """Replace what stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->`` in `page`; how many were.

    Raises:
        FileNotFoundError: a table has no record. ValueError: a record is damaged.
    """

    def fill(match: re.Match[str]) -> str:
        path = results / f"{match['name']}.json"
        if not path.is_file():
            raise FileNotFoundError(f"{page} wants the table {match['name']!r}, but there is no {path}.")
        record, benchmark = _read(path)
        text = benchmark.table(record)
        torch = record["versions"]["torch"]
        source = f"`{path.name}`: {record['machine']}; torch {torch}; seed {record['seed']}; {record['date']}"
        return f"{match[1]}{text}\n\n<sub>{source}</sub>\n{match[3]}"

    text, count = _MARKED.subn(fill, page.read_text())
    write_atomic(page, lambda file: file.write(text.encode()))
    return count


def draw(folder: Path, results: Path = RESULTS) -> list[Path]:
    """Draw every record that has a figure into `folder`.

    Raises:
        ValueError: a JSON file there is damaged, or no record.
    """
    drawn = []
    for path in sorted(results.glob("*.json")):
        record, benchmark = _read(path)
        if benchmark.figure is not None:
            benchmark.figure(record, folder / f"{path.stem}.png")
            drawn.append(folder / f"{path.stem}.png")
    return drawn


def _read(path: Path) -> tuple[dict[str, Any], Benchmark]:
    """A record, and the benchmark that wrote it."""
    record, known = read_json(path), benchmarks()
    if record.get("benchmark") not in known:
        raise ValueError(f"{str(path)!r} is no record of `gnnrl bench`: move it elsewhere.")
    return record, known[record["benchmark"]]
