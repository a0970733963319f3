"""Errors that callers may want to catch by name."""

from __future__ import annotations


class UnsupportedOperation(RuntimeError):
    """A part of the network that can't be handled exactly, with the place and the mend in the message."""


class MissingExtra(ImportError):
    """A package that not everybody needs is not installed; the message says how to install it."""
