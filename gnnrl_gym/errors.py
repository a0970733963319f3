"""Errors that callers may want to catch by name."""

from __future__ import annotations


class UnsupportedOperation(RuntimeError):
    """A part of the network that can't be handled exactly, with the place and the mend in the message."""
