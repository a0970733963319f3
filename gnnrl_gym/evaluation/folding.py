"""Folding BatchNorm into the convolution before it: the same function in eval mode, nearly twice as fast on a CPU."""

from __future__ import annotations

from collections import Counter

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gnnrl_gym.graph.channels import Channels, Weight, operator_name


def foldable_pairs(channels: Channels) -> list[tuple[str, str]]:
    """(convolution, BatchNorm) module paths where the one feeds nothing but the other, and each runs once."""
    uses: Counter[str] = Counter()
    pairs = []
    for node in channels.values:
        weights = [v.name for v in map(channels.values.get, node.all_input_nodes) if isinstance(v, Weight)]
        uses.update(weights)
        source = node.all_input_nodes[0] if operator_name(node) == "batch_norm" else None
        if source is not None and operator_name(source).startswith("conv") and len(source.users) == 1:
            convolution = channels.values.get(source.all_input_nodes[1])
            if isinstance(convolution, Weight) and weights:
                pairs.append((convolution.name, weights[0]))
    return [
        (_module(conv), _module(norm)) for conv, norm in pairs if conv and uses[conv] == 1 and uses[norm] == 1
    ]


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]


def fold(model: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    """Fold each pair of `model` (eval mode), in place."""
    for conv_path, norm_path in pairs:
        conv, norm = model.get_submodule(conv_path), model.get_submodule(norm_path)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            model.set_submodule(conv_path, fuse_conv_bn_eval(conv, norm))
            model.set_submodule(norm_path, nn.Identity())
    return model
