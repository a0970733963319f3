"""Agents for graph environments: the multi-stage GNN, the policies, the searchers and their runner."""

from agents.gnn import MultiStageGNN
from agents.off_policy_policy import GraphSACPolicy, GraphTD3Policy
from agents.policy import GraphPolicy
from agents.refine import evaluate_run, finetune_run
from agents.results import SearchResult
from agents.sb3 import make_sb3_env
from agents.search import search
from agents.transfer import train_policy

__all__ = [
    "GraphPolicy",
    "GraphSACPolicy",
    "GraphTD3Policy",
    "MultiStageGNN",
    "SearchResult",
    "evaluate_run",
    "finetune_run",
    "make_sb3_env",
    "search",
    "train_policy",
]
