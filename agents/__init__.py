"""Agents that speak Gymnasium: the multi-stage graph neural network and its Stable-Baselines3 policy."""

from agents.gnn import MultiStageGNN
from agents.policy import GraphPolicy

__all__ = ["GraphPolicy", "MultiStageGNN"]
