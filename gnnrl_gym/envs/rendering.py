"""Pictures of a plan: what each channel group keeps, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gnnrl_gym.envs.budget import in_words
from gnnrl_gym.graph.groups import Ints
from gnnrl_gym.pruning.network import PrunableNetwork


def plan_table(network: PrunableNetwork, widths: Ints, budgets: Mapping[str, float], accuracy: float) -> str:
    """A line per channel group: its first layer, kept of full units, a bar."""
    lines = []
    for group, (name, kept, full) in enumerate(zip(network.group_names, widths, network.widths, strict=True)):
        bar = "#" * round(20 * kept / full)
        lines.append(f"{group:>4}  {name:<32.32} {kept:>5} / {full:<5} |{bar:<20}|")
    return "\n".join([*lines, _summary(network, widths, budgets, accuracy)])


def draw_plan(network: PrunableNetwork, widths: Ints, budgets: Mapping[str, float], accuracy: float) -> Any:
    """The same as bars in an image, uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and rarely needed
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.22 * len(widths)), 4.0), dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    places = np.arange(len(widths))
    axes.bar(places, network.widths, color="#d8dee9", label="removed")
    axes.bar(places, widths, color="#4c78a8", label="kept")
    axes.set(xlabel="channel group", ylabel="units", title=_summary(network, widths, budgets, accuracy))
    axes.legend(loc="upper left")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _summary(network: PrunableNetwork, widths: Ints, budgets: Mapping[str, float], accuracy: float) -> str:
    macs = network.macs(widths) / network.macs(network.widths)
    params = network.params(widths) / network.params(network.widths)
    scored = "" if accuracy < 0 else f", search accuracy {100 * accuracy:.1f} %"
    return f"{100 * macs:.1f} % of MACs, {100 * params:.1f} % of parameters (budget {in_words(budgets)}){scored}"
