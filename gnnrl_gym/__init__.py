"""Topology-aware neural-network pruning as Gymnasium environments. Importing this registers them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gnnrl_gym.envs import register_all
from gnnrl_gym.errors import UnsupportedOperation
from gnnrl_gym.pruning.network import PrunableNetwork

__version__ = "0.1.0"
__all__ = ["PrunableNetwork", "UnsupportedOperation", "__version__"]

if TYPE_CHECKING:
    from gnnrl_gym import evaluation, export, relational, wrappers, zoo  # noqa: F401
else:
    _LATER = ("evaluation", "export", "relational", "wrappers", "zoo")

    def __getattr__(name: str) -> Any:
        """Parts that take long to import come when they are first asked for."""
        if name in _LATER:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_all()
