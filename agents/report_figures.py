"""The pictures of a report, as SVG that stands in an HTML page. No text in them comes from a file."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_INK = "#010203"  # stands for the page's own colour of text, which differs in dark mode
_STYLE = {
    "font.size": 9,
    "font.sans-serif": "DejaVu Sans",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "gnnrl",  # equal runs have equal pages
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}
# of Okabe and Ito (2008), to be told apart by everyone, on light and dark ground
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
_LINES = ("-", "--", ":", "-.")
MOST_DOTS = 2000  # of a run: of longer ones evenly fewer are shown

Log = Sequence[dict[str, Any]]


def draw_search(logs: Sequence[Log], name: str) -> str:
    """Best search accuracy so far over the evaluations of each run, and the evaluations as dots, those above the budget
    hollow.

    Args:
        logs: the evaluations of each run, numbered from 1. name: what ids begin with, no other picture's in the page.
    """
    with style.context(_STYLE, after_reset=True):
        canvas = Figure(figsize=(7, 3.4), layout="constrained")
        axes = canvas.add_subplot()
        for number, log in enumerate(logs):
            _draw_run(axes, log, number)
        axes.set(xlabel="evaluations", ylabel="search accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.15, color=_INK)
        if len(logs) > 1:
            canvas.legend(frameon=False, loc="outside right upper")
        return _svg(canvas, name)


def _draw_run(axes: Any, log: Log, number: int) -> None:
    colour, line = _COLOURS[number % len(_COLOURS)], _LINES[number // len(_COLOURS) % len(_LINES)]
    dots = {"ms": 3, "mec": colour, "mew": 0.6, "alpha": 0.45}
    accuracies = 100 * np.array([entry["search_accuracy"] for entry in log], float)
    within = np.array([bool(entry["is_success"]) for entry in log], bool)
    places = np.arange(1, len(log) + 1)
    shown = places % (len(log) // MOST_DOTS + 1) == 0
    for which, fill in ((within, colour), (~within, "none")):
        axes.plot(places[which & shown], accuracies[which & shown], "o", mfc=fill, **dots)
    end = {"marker": "s", "ms": 4, "markevery": [-1]} if log else {}
    axes.plot(places, best_so_far(log), line, color=colour, label=f"run {number + 1}", drawstyle="steps-post", **end)


def best_so_far(log: Log) -> np.ndarray:
    """Percent, NaN until a plan was within the budget."""
    scores = [entry["search_accuracy"] if entry["is_success"] else -np.inf for entry in log]
    best = 100 * np.maximum.accumulate(np.array(scores, float))
    return np.where(np.isfinite(best), best, np.nan)


def draw_widths(shares: Sequence[float], name: str) -> str:
    """The kept share of every group, as bars. `name`: as for `draw_search`."""
    with style.context(_STYLE, after_reset=True):
        canvas = Figure(figsize=(7, 2.4), layout="constrained")
        axes = canvas.add_subplot()
        places = np.arange(len(shares))
        axes.bar(places, 100.0, color=_INK, alpha=0.1)
        axes.bar(places, 100 * np.asarray(shares, float), color=_COLOURS[0])
        axes.set(xlabel="group", ylabel="units kept, %", ylim=(0, 100), xlim=(-0.7, len(shares) - 0.3))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        return _svg(canvas, name)


def _svg(canvas: Figure, name: str) -> str:
    """The figure as an element, its ids its own: several stand in one page."""
    file = io.BytesIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    canvas.savefig(file, format="svg", transparent=True, metadata=empty)  # type: ignore[arg-type]
    text = file.getvalue().decode().partition("<svg")[2]  # without the XML head
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return f"<svg{text}".replace(_INK, "currentColor")
