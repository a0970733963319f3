"""One file per environment; `register_all` makes them known to Gymnasium."""

from __future__ import annotations

import gymnasium as gym


def register_all() -> None:
    """Register every environment once."""
    if "GNNRL-PruneMany-v0" not in gym.registry:
        gym.register("GNNRL-PruneMany-v0", entry_point="gnnrl_gym.envs.prune_many:PruneManyEnv")
    if "GNNRL-Prune-v0" not in gym.registry:
        gym.register(
            "GNNRL-Prune-v0",
            entry_point="gnnrl_gym.envs.prune:PruneEnv",
            vector_entry_point="gnnrl_gym.envs.prune_vector:PruneVectorEnv",
        )
    if "GNNRL-Relational-v0" not in gym.registry:
        gym.register("GNNRL-Relational-v0", entry_point="gnnrl_gym.envs.relational:RelationalEnv")
    if "GNNRL-JobShop-v0" not in gym.registry:
        gym.register("GNNRL-JobShop-v0", entry_point="gnnrl_gym.envs.job_shop:JobShopEnv")
    if "GNNRL-Mask-v0" not in gym.registry:
        gym.register("GNNRL-Mask-v0", entry_point="gnnrl_gym.envs.mask:MaskEnv")
