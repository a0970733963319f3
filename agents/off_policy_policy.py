"""Actors and critics on graphs for DDPG, TD3 and SAC: one action component per decision node."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp, get_actor_critic_arch
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.sac.policies import Actor as SACActor
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import Actor as TD3Actor
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn

from agents.gnn import MultiStageGNN, split_features
from agents.policy import check_no_sde

PLACE = 8  # width of what is learned about a decision position

_TD3 = (
    "GraphTD3Policy is for DDPG and TD3, which have no use_sde: PPO and A2C take agents.GraphPolicy, SAC "
    "agents.GraphSACPolicy."
)
_SAC = "GraphSACPolicy is for SAC: PPO and A2C take agents.GraphPolicy, DDPG and TD3 agents.GraphTD3Policy."


class NodeActor(nn.Module):
    """One number per decision node, from its embedding and that of the whole graph.

    Args:
        hidden: width H of an embedding.
        decisions: D.
        arch, activation: hidden layers, shared by all nodes.
        start: output of the untrained network (approximately); padded entries always give exactly this.
        node_bias: a free offset per decision position; without, nothing that is saved depends on D.
        relative: the mean over all decisions is subtracted.
    """

    offset: Tensor  # [D]

    def __init__(
        self, hidden: int, decisions: int, arch: list[int], activation: type[nn.Module], start: float, node_bias: bool,
        relative: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.hidden, self.start, self.relative = hidden, start, relative
        self.net = nn.Sequential(*create_mlp(2 * hidden, 1, arch, activation))
        _set_by_position(self, "offset", torch.zeros(decisions), node_bias)
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.orthogonal_(last.weight, 0.01)
        nn.init.zeros_(last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] from features [B, (D + 1) * H]."""
        nodes, whole = split_features(features, self.hidden)
        real = real_decisions(nodes)
        found = self.net(torch.cat([nodes, whole[:, None].expand_as(nodes)], dim=2)).squeeze(2) + self.offset
        if self.relative:
            found = found - found.where(real, 0.0).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        return self.start + found.where(real, 0.0)


class NodeCritic(nn.Module):
    """The value of an action: every decision node is read with its component, then their mean with the whole graph.

    Args:
        hidden, decisions, arch, activation, node_bias: as in `NodeActor`; with `node_bias` a node is also told by its
            position.
    """

    place: Tensor  # [D, PLACE]

    def __init__(
        self, hidden: int, decisions: int, arch: list[int], activation: type[nn.Module], node_bias: bool
    ) -> None:
        super().__init__()
        self.hidden, self.decisions = hidden, decisions
        places = torch.randn(decisions, PLACE) if node_bias else torch.zeros(decisions, PLACE)
        _set_by_position(self, "place", places, node_bias)
        self.node = nn.Sequential(*create_mlp(hidden + PLACE + 1, -1, arch, activation))
        width = [hidden + PLACE + 1, *arch][-1]
        self.value = nn.Sequential(*create_mlp(width + hidden, 1, arch, activation))

    def forward(self, features_and_actions: Tensor) -> Tensor:
        """Values [B, 1] from features and actions, [B, (D + 1) * H + D]: what the critic of the library hands on."""
        features, actions = features_and_actions.tensor_split([-self.decisions], dim=1)
        nodes, whole = split_features(features, self.hidden)
        place = self.place.expand(len(nodes), -1, -1)
        read = self.node(torch.cat([nodes, place, actions[:, :, None]], dim=2))
        real = real_decisions(nodes)[:, :, None]
        mean = read.where(real, 0.0).sum(1) / real.sum(1).clamp(min=1)
        return self.value(torch.cat([mean, whole], dim=1))


def _set_by_position(module: nn.Module, name: str, values: Tensor, learned: bool) -> None:
    """If `values` are not learned, they are not saved, so that the rest fits graphs of any size."""
    if learned:
        module.register_parameter(name, nn.Parameter(values))
    else:
        module.register_buffer(name, values, persistent=False)


def real_decisions(nodes: Tensor) -> Tensor:
    """Which decisions [B, D] are no padding, from their embeddings [B, D, H]: those of padding are exactly zero."""
    return (nodes != 0).any(2)


class _GraphNetworks:
    """Puts the networks above in the place of a policy's own.

    Args:
        node_bias: decision positions differ in more than their features. Only sensible where the network to prune is
            always the same. Without, no parameter depends on the size of the graph, so `load_state_dict` moves a policy
            to another one.
        initial_mean: action of the untrained policy, in (-1, 1).
        relative: the mean over the decisions, before the squashing, stays that of `initial_mean`. Only sensible where
            what all components have in common does not matter, as with plans that land on a budget: a deterministic
            actor has no reason to stop in that direction, and ends where the squashing holds every component.
        others: as in the policies of Stable-Baselines3, but for `use_sde`.

    Raises:
        ValueError: `use_sde`, or an `initial_mean` that no squashed action has.
    """

    def __init__(
        self,
        *args: Any,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        features_extractor_class: type[BaseFeaturesExtractor] = MultiStageGNN,
        node_bias: bool = False,
        initial_mean: float = 0.0,
        relative: bool = False,
        **kwargs: Any,
    ) -> None:
        check_no_sde(kwargs)
        if not -1 < initial_mean < 1:
            raise ValueError(f"initial_mean must lie between -1 and 1, which tanh never reaches, got {initial_mean!r}.")
        self.node_bias, self.initial_mean, self.relative = node_bias, initial_mean, relative
        arch = [64] if net_arch is None else net_arch
        super().__init__(*args, net_arch=arch, features_extractor_class=features_extractor_class, **kwargs)  # type: ignore[call-arg]

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        critic: ContinuousCritic = super().make_critic(features_extractor)  # type: ignore[misc]
        for index in range(critic.n_critics):
            network = NodeCritic(*self._sizes(critic, of_critic=True), self.node_bias).to(critic.device)
            critic.add_module(f"qf{index}", network)
            critic.q_networks[index] = network  # type: ignore[call-overload]
        return critic

    def _node_actor(self, actor: Any, start: float, relative: bool = False) -> NodeActor:
        return NodeActor(*self._sizes(actor), start, self.node_bias, relative).to(actor.device)

    def _sizes(self, network: Any, of_critic: bool = False) -> tuple[int, int, list[int], type[nn.Module]]:
        arch = get_actor_critic_arch(self.net_arch)[of_critic]  # type: ignore[attr-defined]
        return network.features_extractor.hidden, network.action_space.shape[0], arch, self.activation_fn  # type: ignore[attr-defined]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"node_bias": self.node_bias, "initial_mean": self.initial_mean, "relative": self.relative}
        return {**super()._get_constructor_parameters(), **own}  # type: ignore[misc]

    def _start(self) -> float:
        """The initial mean before the squashing."""
        return float(torch.atanh(torch.tensor(self.initial_mean)))


class GraphTD3Policy(_GraphNetworks, TD3Policy):
    """Deterministic policy for DDPG and TD3 on the observations of `gnnrl_gym.wrappers.PadGraph`.

    Raises:
        TypeError: another algorithm.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "use_sde" in kwargs:  # that of SAC, PPO and A2C
            raise TypeError(_TD3)
        super().__init__(*args, **kwargs)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> TD3Actor:
        actor = super().make_actor(features_extractor)
        actor.mu = nn.Sequential(self._node_actor(actor, self._start(), self.relative), nn.Tanh())
        return actor


class MaskedSquashedGaussian(SquashedDiagGaussianDistribution):
    """A squashed Gaussian in which the components of the padding have no share."""

    mask: Tensor  # [B, D], bool

    def log_prob(self, actions: Tensor, gaussian_actions: Tensor | None = None) -> Tensor:
        """Log density [B] of the real components of `actions` [B, D]; `gaussian_actions`: before the squashing."""
        assert gaussian_actions is not None  # SAC asks for the density of what it has just drawn
        density = self.distribution.log_prob(gaussian_actions).where(self.mask, 0.0).sum(1)
        return density - torch.log(1 - actions**2 + self.epsilon).where(self.mask, 0.0).sum(1)


class _MaskedSACActor(SACActor):
    """Tells its distribution which decisions are real."""

    action_dist: MaskedSquashedGaussian  # type: ignore[assignment]

    def get_action_dist_params(self, obs: PyTorchObs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        assert isinstance(obs, dict)
        self.action_dist.mask = obs["decision_mask"].bool()
        return super().get_action_dist_params(obs)


class GraphSACPolicy(_GraphNetworks, SACPolicy):
    """Squashed Gaussian policy for SAC on the observations of `gnnrl_gym.wrappers.PadGraph`.

    Args:
        log_std_init: log standard deviation of the untrained policy, before the squashing.
    """

    def __init__(self, *args: Any, log_std_init: float = -0.7, **kwargs: Any) -> None:
        super().__init__(*args, log_std_init=log_std_init, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "actor_target":  # what TD3 and DDPG ask a policy for
            raise AttributeError(_SAC)
        return super().__getattr__(name)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> SACActor:
        actor = _MaskedSACActor(**self._update_features_extractor(self.actor_kwargs, features_extractor))
        actor = actor.to(self.device)
        actor.action_dist = MaskedSquashedGaussian(self.action_space.shape[0])  # type: ignore[index]
        actor.latent_pi = nn.Sequential()  # the heads read the features
        actor.mu = self._node_actor(actor, self._start(), self.relative)
        actor.log_std = self._node_actor(actor, actor.log_std_init)  # type: ignore[assignment]
        return actor
