"""Which precision candidates are scored in."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gnnrl_gym.checks import check_choice
from gnnrl_gym.copies import copy_of
from gnnrl_gym.evaluation.threads import SMALL
from gnnrl_gym.graph.arguments import cloned
from gnnrl_gym.pruning.network import PrunableNetwork

PRECISIONS = ("auto", "float32", "bfloat16")


def fitting_dtype(precision: str, network: PrunableNetwork, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the processor computes in it and the network is not tiny: scores then move by a few
    tenths of a percent, less than the sampling error of the images, and cost a good half (ResNet-20 on an EPYC:
    0.49 s for 0.82 s). Where the network does not run in it, as some don't that fill tensors of their own making, it is
    float32, with a warning.

    Raises:
        ValueError: an unknown precision, or bfloat16 for a network that does not run in it.
    """
    check_choice("precision", precision, PRECISIONS)
    worth = network.macs(network.widths) >= SMALL and _has_bfloat16(device)
    if precision == "float32" or (precision == "auto" and not worth):
        return torch.float32
    if error := _failure(network, device):
        message = f"The network does not run in bfloat16 ({error})"
        if precision == "bfloat16":
            raise ValueError(f"{message}: use precision='float32'.") from error
        warnings.warn(f"{message}: it is scored in float32.", stacklevel=3)
        return torch.float32
    return torch.bfloat16


def _failure(network: PrunableNetwork, device: torch.device) -> Exception | None:
    """What the dense network raises in bfloat16, in eval mode, on its example."""
    trial, inputs = copy_of(network.model).eval().to(device), cloned(network.example_input)
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            trial(*tree_map_only(Tensor, lambda value: value.to(device), inputs))
    except Exception as error:  # whatever a forward raises
        return error
    return None


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
