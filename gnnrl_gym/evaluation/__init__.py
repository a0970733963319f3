"""Accuracy of candidate plans, and fine-tuning of the chosen one."""
