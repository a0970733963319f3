"""Gantt charts of schedules."""

from __future__ import annotations

import string
from typing import Any

import numpy as np

from gnnrl_gym.scheduling.schedule import Schedule

WIDTH = 72
LETTERS = string.digits + string.ascii_letters


def schedule_text(schedule: Schedule) -> str:
    """A line per machine: the jobs, by digit or letter, over the time; dots where it waits."""
    horizon = max(schedule.bound, 1)
    lines = []
    for machine, placed in enumerate(schedule.order):
        line = np.full(WIDTH, ".")
        for job, position in placed:
            start, duration = schedule.starts[job, position], schedule.problem.durations[job, position]
            first, end = start * WIDTH // horizon, (start + duration) * WIDTH // horizon
            line[first : max(first + 1, end)] = LETTERS[job % len(LETTERS)]
        lines.append(f"machine {machine:>3} |{''.join(line)}|")
    return "\n".join([*lines, _summary(schedule)])


def draw_schedule(schedule: Schedule) -> Any:
    """The same as bars in an image, uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and rarely needed
    from matplotlib.figure import Figure

    machines = schedule.problem.shape[2]
    figure = Figure(figsize=(8.0, 1.5 + 0.35 * machines), dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    placed = [(machine, job, position) for machine, order in enumerate(schedule.order) for job, position in order]
    for machine, job, position in placed:
        start, duration = schedule.starts[job, position], schedule.problem.durations[job, position]
        axes.barh(machine, duration, left=start, color=f"C{job % 10}", edgecolor="white")
        axes.text(start + duration / 2, machine, str(job), ha="center", va="center", fontsize=7)
    axes.set(xlabel="time", ylabel="machine", title=_summary(schedule), xlim=(0, max(schedule.bound, 1)))
    axes.set(ylim=(machines - 0.5, -0.5), yticks=range(machines))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _summary(schedule: Schedule) -> str:
    lower, total = schedule.problem.lower_bound, schedule.starts.size
    if schedule.complete:
        return f"makespan {schedule.bound}, at least {lower}"
    return f"{int(schedule.done.sum())} of {total} operations placed, makespan at least {schedule.bound}"
