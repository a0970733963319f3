"""The same outputs in less time, of networks that are scored in bfloat16 on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnrl_gym.copies import copy_of
from gnnrl_gym.evaluation.folding import plain, replace
from gnnrl_gym.pruning.network import PrunableNetwork
from gnnrl_gym.pruning.probe import Probe


def cast_weights(model: nn.Module) -> nn.Module:
    """Cast the weights of torch's own convolutions and linear layers once, in place: autocast does it at every call."""
    for layer in model.modules():
        if plain(layer, nn.Conv2d) or plain(layer, nn.Linear):
            layer.to(torch.bfloat16)
    return model


def replace_relus(model: nn.Module) -> nn.Module:
    """Put `IntegerReLU` in the place of torch's own ReLUs that work in place."""
    relus = [layer for layer in model.modules() if plain(layer, nn.ReLU) and layer.inplace]
    replace(model, {relu: IntegerReLU(inplace=True) for relu in relus})
    return model


class IntegerReLU(nn.ReLU):
    """ReLU in place, where the bits of a number, read as an integer, have its sign.

    PyTorch's turns bfloat16 into float32 and back, which takes four times as long. Here -NaN gives zero.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != torch.bfloat16:
            return F.relu_(input)
        input.view(torch.int16).clamp_(min=0)
        return input


@torch.no_grad()
def can_be_quick(network: PrunableNetwork) -> bool:
    """Whether both leave what `network` computes as it is, to the bit, seen on noise: a forward may leave autocast."""
    probe = Probe(network.model, network.example_input)
    try:
        quick = cast_weights(replace_relus(copy_of(probe.dense)))
        with torch.autocast("cpu", torch.bfloat16):
            return torch.equal(probe.outputs(quick), probe.outputs(probe.dense))
    except Exception:  # whatever a forward raises when a layer is not what it expects
        return False
