"""Topology-aware neural-network pruning as Gymnasium environments. Importing this registers them."""

from gnnrl_gym.envs import register_all
from gnnrl_gym.errors import UnsupportedOperation
from gnnrl_gym.pruning.network import PrunableNetwork

__version__ = "0.1.0"
__all__ = ["PrunableNetwork", "UnsupportedOperation", "__version__"]

register_all()
