"""`gnnrl report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agents.cli_common import newest_run, say


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            help="Run folders of `gnnrl search` or `gnnrl early`, in the order of the page.",
            show_default="the newest in runs",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file.", show_default="report.html in the run folder; of several runs, here"),
    ] = None,
) -> None:
    """Write a page about one run, or about several side by side: what was asked, what came of it, pictures."""
    from agents.report import write_report  # with Matplotlib, which takes its time

    say(f"report: {write_report(runs or [newest_run()], out)}")
