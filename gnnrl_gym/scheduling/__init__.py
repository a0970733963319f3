"""Job shops: problems, schedules, priority rules, and the graph of what is left to be done."""

from gnnrl_gym.scheduling.job_shop import JobShop
from gnnrl_gym.scheduling.rules import RULES, follow
from gnnrl_gym.scheduling.schedule import Schedule

__all__ = ["RULES", "JobShop", "Schedule", "follow"]
