"""Models by name, data by name or path."""

from gnnrl_gym.zoo.data import DataSplits, load_data
from gnnrl_gym.zoo.models import load_model
from gnnrl_gym.zoo.split import Split

__all__ = ["DataSplits", "Split", "load_data", "load_model"]
