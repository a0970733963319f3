"""How far a long call is: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Progress:
    """A bar on a terminal. In a pipe or a batch system, where a bar would be noise, `lines` lines on standard error.

    Args:
        total: steps. unit: what a step is. lines: how many, evenly over the steps. shown: False for nothing at all.
    """

    def __init__(self, total: int, unit: str, desc: str | None = None, lines: int = 10, shown: bool = True) -> None:
        self._bar = tqdm(total=total, unit=unit, desc=desc, disable=None if shown else True)
        self._plain = shown and self._bar.disable  # which tqdm is where there is no terminal
        self._head = f"{desc}: " if desc else ""
        self._total, self._unit, self._lines, self._done = total, unit, lines, 0
        self._unsaid = ""  # how it goes, since the last line

    def at(self, done: int, text: str) -> None:
        """`done` steps are done; `text` says how it goes."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._done)
        before, now = (count * self._lines // max(self._total, 1) for count in (self._done, done))
        self._done, self._unsaid = done, text
        if now > before:
            self._say()

    def close(self) -> None:
        """End the bar, or say how it went since the last line."""
        self._bar.close()
        self._say()

    def _say(self) -> None:
        text, self._unsaid = self._unsaid, ""  # before: an interruption may come right after the line
        if self._plain and text:
            print(f"{self._head}{self._done}/{self._total} {self._unit}s, {text}", file=sys.stderr, flush=True)
