"""Agents for graph environments: the multi-stage GNN, the policy, the searchers and their runner."""

from agents.gnn import MultiStageGNN
from agents.policy import GraphPolicy
from agents.results import SearchResult
from agents.sb3 import make_sb3_env
from agents.search import search

__all__ = ["GraphPolicy", "MultiStageGNN", "SearchResult", "make_sb3_env", "search"]
