"""Actor-critic policy on graphs: one action component per decision node."""

from __future__ import annotations

from typing import Any, Literal

import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from agents.gnn import MultiStageGNN, split_features

Head = Literal["node", "pooled"]

_OFF_POLICY = "GraphPolicy is for PPO and A2C: SAC takes agents.GraphSACPolicy, DDPG and TD3 agents.GraphTD3Policy."


def check_no_sde(settings: dict[str, Any]) -> None:
    """Check that the settings don't ask for state-dependent exploration.

    Raises:
        ValueError: the state-dependent noise of Stable-Baselines3 is asked for, which knows no padding.
    """
    if settings.get("use_sde"):
        raise ValueError("The graph policies have no state-dependent exploration: leave use_sde out.")


class MaskedGaussian(DiagGaussianDistribution):
    """A diagonal Gaussian in which the components of the padding have no share.

    `action_dim` is the number of outputs of the mean network and of log stds: 1 where all decision nodes
    share them, the number of components otherwise.
    """

    mask: Tensor  # [B, D], bool

    def apply_mask(self, mask: Tensor) -> None:
        """Set the components that count: `mask` [B, D], nonzero for a real one."""
        self.mask = mask.bool()

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log density [B] of the real components of `actions` [B, D]."""
        return self.distribution.log_prob(actions).where(self.mask, 0.0).sum(dim=1)

    def entropy(self) -> Tensor:
        """Entropy [B] of the real components, in nats."""
        return self.distribution.entropy().where(self.mask, 0.0).sum(dim=1)


class GraphHeads(nn.Module):
    """The hidden layers of actor and critic, in the place of the `MlpExtractor` of Stable-Baselines3."""

    def __init__(self, hidden: int, head: Head, net_arch: dict[str, list[int]], activation: type[nn.Module]) -> None:
        super().__init__()
        self.hidden, self.head = hidden, head
        width = 2 * hidden if head == "node" else hidden
        actor, critic = net_arch.get("pi", []), net_arch.get("vf", [])
        self.policy_net = nn.Sequential(*create_mlp(width, -1, actor, activation))
        self.value_net = nn.Sequential(*create_mlp(hidden, -1, critic, activation))
        self.latent_dim_pi = [width, *actor][-1]
        self.latent_dim_vf = [hidden, *critic][-1]

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of actor and critic."""
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        """[B, D, latent_dim_pi] with the node head, [B, latent_dim_pi] with the pooled one."""
        decisions, pooled = split_features(features, self.hidden)
        if self.head == "pooled":
            return self.policy_net(pooled)
        return self.policy_net(torch.cat([decisions, pooled[:, None].expand_as(decisions)], dim=2))

    def forward_critic(self, features: Tensor) -> Tensor:
        """[B, latent_dim_vf], from the embedding of the whole graph."""
        return self.value_net(split_features(features, self.hidden)[1])


class GraphPolicy(ActorCriticPolicy):
    """Policy for PPO and A2C on the observations of `gnnrl_gym.wrappers.PadGraph`.

    Example:
        >>> PPO(GraphPolicy, make_sb3_env(gym.make("GNNRL-Prune-v0")), gamma=1.0)

    The off-policy algorithms have policies of their own, `GraphTD3Policy` (DDPG, TD3) and `GraphSACPolicy`.

    Args:
        head: "node": one network, shared by all decision nodes, maps a node's embedding and that of the
            whole graph to the mean of its action; one log std. No parameter depends on the size of the
            graph, so `load_state_dict` moves a policy to another network. "pooled": the published way
            (Yu et al., ICML 2022), all means and log stds from the embedding of the whole graph.
        node_bias: with the node head, a free offset per decision position. Only sensible where the
            network is always the same.
        initial_mean: mean of the untrained policy, in units of the policy's action space.
        log_std_init: log standard deviation of the untrained policy, in the same units.
        net_arch: hidden layers, `{"pi": [...], "vf": [...]}` or one list for both; default one of 64.
        others: as in `ActorCriticPolicy`, but for `use_sde`; the features extractor defaults to `MultiStageGNN`.

    Raises:
        ValueError: an unknown `head`, or `node_bias` with the pooled one; `use_sde`.
        TypeError: other observations than those of `PadGraph`.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.Tanh,
        log_std_init: float = -1.0,
        features_extractor_class: type[BaseFeaturesExtractor] = MultiStageGNN,
        head: Head = "node",
        node_bias: bool = False,
        initial_mean: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if "n_critics" in kwargs:  # DDPG's
            raise TypeError(_OFF_POLICY)
        check_no_sde(kwargs)
        if head not in ("node", "pooled") or (node_bias and head == "pooled"):
            wanted = "head must be 'node' or 'pooled', and node_bias needs 'node'"
            raise ValueError(f"{wanted}; got {head=}, {node_bias=}")
        self.head, self.initial_mean = head, initial_mean
        self.has_node_bias = node_bias
        arch = [64] if net_arch is None else net_arch
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=arch if isinstance(arch, dict) else {"pi": arch, "vf": arch},
            activation_fn=activation_fn,
            log_std_init=log_std_init,
            features_extractor_class=features_extractor_class,
            **kwargs,
        )

    def __getattr__(self, name: str) -> Any:
        if name == "actor":  # what an off-policy algorithm asks a policy for first
            raise AttributeError(_OFF_POLICY)
        return super().__getattr__(name)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Actions [B, D], values [B, 1] and log densities [B]."""
        self._mask_distribution(obs)
        return super().forward(obs, deterministic)  # type: ignore[arg-type]

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values [B, 1], log densities [B] of `actions` [B, D], and entropies [B]."""
        self._mask_distribution(obs)
        return super().evaluate_actions(obs, actions)

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        """The action distribution; its padding components have no share."""
        self._mask_distribution(obs)
        return super().get_distribution(obs)

    def _mask_distribution(self, obs: PyTorchObs) -> None:
        # The features do not say which decision nodes are real, and Stable-Baselines3 hands only them on.
        assert isinstance(obs, dict) and isinstance(self.action_dist, MaskedGaussian)
        self.action_dist.apply_mask(obs["decision_mask"])

    def _build_mlp_extractor(self) -> None:
        assert isinstance(self.features_extractor, MultiStageGNN) and isinstance(self.net_arch, dict)
        self.mlp_extractor = GraphHeads(  # type: ignore[assignment]
            self.features_extractor.hidden, self.head, self.net_arch, self.activation_fn
        ).to(self.device)
        decisions = self.action_space.shape[0]  # type: ignore[index]
        self.node_bias = nn.Parameter(torch.zeros(decisions)) if self.has_node_bias else None
        self.action_dist = MaskedGaussian(1 if self.head == "node" else decisions)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        # Stable-Baselines3 makes the weights of the last layer small and its bias 0.
        nn.init.constant_(self.action_net.bias, self.initial_mean)  # type: ignore[arg-type]

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Distribution:
        mean = self.action_net(latent_pi).flatten(1)  # [B, D, 1] or [B, D]
        if self.node_bias is not None:
            mean = mean + self.node_bias
        return self.action_dist.proba_distribution(mean, self.log_std)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"head": self.head, "node_bias": self.has_node_bias, "initial_mean": self.initial_mean}
        own["share_features_extractor"] = self.share_features_extractor  # which Stable-Baselines3 leaves out
        return {**super()._get_constructor_parameters(), **own}
